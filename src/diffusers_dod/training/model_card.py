# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""The model card of a run, from what the run itself knows."""

import json
import logging
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import yaml

from ..evaluation.cards import CARD, CURVES, fill_card, read_model
from .arguments import PLACES, to_recipe
from .checkpoints import list_checkpoints
from .metrics import EVALUATIONS, METRICS
from .plot_metrics import plot_metrics


logger = logging.getLogger(__name__)

RECIPE = "recipe.yaml"
CARD_FILES = (RECIPE, CURVES)  # what is written beside the card


def _read_evaluation(args: Namespace) -> dict[str, dict[str, Any]]:
    """The latest line of evaluations, if there is one, in the form of results."""
    path = args.output_dir / EVALUATIONS
    lines = path.read_text().splitlines() if path.exists() else []
    if not lines:
        return {}
    line = json.loads(lines[-1])
    is_public = args.dataset_name is not None and not Path(args.dataset_name).exists()
    return {
        EVALUATIONS: {
            "task": "train",
            "data": {"name": args.dataset_name if is_public else "own pictures", "num_samples": line["num_samples"]},
            "settings": {"extractor": args.fid_extractor, "step": line["step"]},
            "metrics": {
                name: {"value": value, "interval": None}
                for name, value in line.items()
                if name.startswith("fid_stage_") and math.isfinite(value)
            },
        }
    }


def _draw_curves(folder: Path) -> None:
    metrics = folder / METRICS
    if not metrics.exists() or metrics.stat().st_size == 0:
        return
    try:
        plot_metrics([folder], folder / CURVES, smoothing=10)
    except ImportError:
        logger.warning("The model card has no curves: drawing them needs matplotlib.")


def write_model_card(
    args: Namespace,
    class_names: tuple[str, ...] | None = None,
    images_per_step: int | None = None,
    step: int = 0,
) -> str:
    """
    Writes `README.md` into the folder of a run, and beside it the recipe and, if there are metrics, their curves.

    Args:
        args (`Namespace`): The run's arguments.
        class_names (`tuple[str]`, *optional*): Names of the classes, once they are known.
        images_per_step (`int`, *optional*): Samples per optimizer step over all processes, once they are known.
        step (`int`, defaults to 0): Number of finished steps.

    Returns:
        `str`: The card.
    """
    folder = args.output_dir
    recipe = yaml.safe_dump(to_recipe(args), sort_keys=False)
    left_out = [name for name in PLACES if getattr(args, name) is not None and Path(getattr(args, name)).exists()]
    if left_out:
        recipe += f"# To be given as well, since the run had folders of its machine for it: {', '.join(left_out)}\n"
    (folder / RECIPE).write_text(recipe)
    if step > 0:
        _draw_curves(folder)
    pipelines = [folder, *reversed(list_checkpoints(folder))]
    saved = next((path for path in pipelines if (path / "model_index.json").exists()), None)
    card = fill_card(
        args,
        folder / RECIPE,
        path="path/or/hub-id",
        name=folder.resolve().name,
        step=step,
        images_per_step=images_per_step,
        class_names=class_names or (),
        folder=folder,
        model=None if saved is None or step == 0 else read_model(saved)[0],
        results=_read_evaluation(args) if step > 0 else None,
    )
    card.save(folder / CARD)
    return str(card)
