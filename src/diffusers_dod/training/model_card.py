# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Writes model cards: of a run while it trains, and of models from files that list the sources of each card.

    python -m diffusers_dod.training.model_card model_cards/*.yaml

A card goes beside its file, and into the pipeline's folder as `README.md`. docs/model_cards.md says more.
"""

import logging
import math
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from ..cards import CARD, CURVES, describe_loading, fill_card, read_model
from ..checkpoint_manifest import CHECKPOINT_MANIFEST, CheckpointManifest
from ..checks import check_at_least, shown
from ..command_line import run_main
from ..data.labelled_images import PROCEDURAL
from ..files import METRICS_FILE, replacing
from ..metrics.extractors import INCEPTION
from ..options import build_parser, find_places, from_values, option, parse_options, read_recipe, to_recipe
from ..presets import PRESETS, Preset
from ..records import read_lines, read_record, read_yaml
from ..results import checkpoint_sha256, read_results
from ..training_options import TrainingOptions
from .checkpoints import list_checkpoints
from .cost import find_preset
from .history import TrainingHistory
from .plot_metrics import plot_metrics
from .run_metrics import EVALUATIONS


logger = logging.getLogger(__name__)

RECIPE = "recipe.yaml"
CARD_FILES = (RECIPE, CURVES)  # what is written beside the card

# Names in the file of a card.
SOURCES = {
    "recipe": str,
    "pipeline": str,
    "repo_id": str,
    "results": list,
    "num_processes": int,
    "license": str,
    "datasets": list,
    "hardware": str,
    "description": str,
    "data": str,
    "training": str,
    "limitations": str,
    "paper": list,
}


def _read_evaluation(options: TrainingOptions) -> dict[str, dict[str, Any]]:
    """Reads the latest line of evaluations, if there is one, in the form of results."""
    lines = read_lines(options.output.output_dir / EVALUATIONS)
    if not lines:
        return {}
    line = lines[-1]
    is_public = options.data.images.dataset_name is not None and not Path(options.data.images.dataset_name).exists()
    return {
        EVALUATIONS: {
            "task": "train",
            "data": {
                "name": options.data.images.dataset_name if is_public else "own images",
                "num_samples": line["num_samples"],
            },
            "settings": {"extractor": options.validation.fid_extractor, "step": line["step"]},
            "metrics": {
                name: {"value": value, "interval": None}
                for name, value in line.items()
                if name.startswith("fid_stage_") and math.isfinite(value)
            },
        }
    }


def _draw_curves(folder: Path) -> None:
    if not read_lines(folder / METRICS_FILE):
        return
    try:
        plot_metrics([folder], folder / CURVES, smoothing=10)
    except ImportError:
        logger.warning("The model card has no curves: drawing them needs matplotlib.")


def _save_card(card: ModelCard, path: Path) -> None:
    with replacing(path) as unfinished:
        card.save(unfinished)


def write_model_card(
    options: TrainingOptions,
    class_names: tuple[str, ...] | None = None,
    images_per_step: int | None = None,
    step: int = 0,
    history: TrainingHistory | None = None,
) -> str:
    """
    Writes `README.md` into the folder of a run, and beside it the recipe and, if there are metrics, their curves.

    Args:
        options ([`TrainingOptions`]): The run's options.
        class_names (`tuple[str]`, *optional*): Names of the classes, if they are known yet.
        images_per_step (`int`, *optional*): Samples per optimizer step over all processes, if they are known yet.
        step (`int`, defaults to 0): Number of finished steps.
        history ([`TrainingHistory`], *optional*): What the steps were trained with, if resumed runs have changed it.

    Returns:
        `str`: The card.
    """
    changes = [] if history is None else history.describe_changes()
    folder = options.output.output_dir
    recipe = yaml.safe_dump(to_recipe(options), sort_keys=False)
    if left_out := find_places(options):
        recipe += f"# To be given as well, since the run had folders of its machine for it: {', '.join(left_out)}\n"
    recipe += "".join(f"# {change}\n" for change in changes)
    with replacing(folder / RECIPE) as unfinished:
        unfinished.write_text(recipe)
    if step > 0:
        _draw_curves(folder)
    pipelines = [folder, *reversed(list_checkpoints(folder))]
    saved = next((path for path in pipelines if (path / "model_index.json").exists()), None)
    card = fill_card(
        options,
        folder / RECIPE,
        path="path/or/hub-id",
        name=folder.resolve().name,
        step=step,
        images_per_step=images_per_step,
        class_names=class_names or (),
        folder=folder,
        model=None if saved is None or step == 0 else read_model(saved)[0],
        results=_read_evaluation(options) if step > 0 else None,
        num_images=None if history is None else history.num_images,
        changes=changes,
    )
    _save_card(card, folder / CARD)
    return str(card)


def describe_end(options: TrainingOptions, resolution: int, class_names: tuple[str, ...] = ()) -> str:
    """
    Says where the pipeline, or the adapters, of a finished run are, and which commands sample and evaluate them.

    Args:
        options ([`TrainingOptions`]): The run's options.
        resolution (`int`): Side of the images in pixels.
        class_names (`tuple[str]`, defaults to `()`): Names of the classes.

    Returns:
        `str`: A line, and a line for each command.
    """
    images, folder = options.data.images, os.path.abspath(options.output.output_dir)
    has_adapters, place = options.model.lora.lora_rank is not None, shlex.quote(folder)
    if has_adapters:
        place = f"{shlex.quote(str(options.model.pretrained_model_name_or_path))} --lora_weights {place}"
    reference = images.train_data_dir or images.dataset_name or "path/to/images"
    if reference in PROCEDURAL:
        reference = f"{reference}:{options.data.num_train_samples}:{options.data.seed + 1}"
    samples, extractor = f"{folder}-samples", options.validation.fid_extractor or INCEPTION
    commands = [
        f"sample --pretrained_model_name_or_path {place} --num_images 1000 --output_dir {shlex.quote(samples)}",
        f"evaluate {shlex.quote(samples)} --reference {shlex.quote(reference)} --resolution {resolution} "
        f"--extractor {shlex.quote(extractor)} --output_file {shlex.quote(samples + '.json')}",
    ]
    lines = [f"  python -m diffusers_dod.evaluation.{command}" for command in commands]
    if not has_adapters:
        return "\n".join([f"The pipeline is in {folder}. To sample it, and to evaluate the samples:", *lines])
    loading = [f"  {line}" for line in describe_loading(options, folder, class_names)]
    first = f"The LoRA adapters are in {folder}. To sample with them, and to evaluate the samples:"
    return "\n".join([first, *lines, "To load them:", *loading])


def read_sources(path: Path) -> dict[str, Any]:
    """
    Reads the file with the sources of a card.

    Args:
        path (`Path`): The YAML file. Paths in it are relative to the current folder.

    Returns:
        `dict`: The content of the file.

    Raises:
        `ValueError`: it is not such a file, or it names results without their pipeline.
        `OSError`: the file cannot be read.
    """
    try:
        sources = read_yaml(path)
    except ValueError as error:
        raise ValueError(f"`path` must be a file of YAML: {error}") from error
    if not isinstance(sources, dict):
        raise ValueError(f"`path` must map names to what a card is filled from, got {path} with {shown(sources)}.")
    for name, value in sources.items():
        if name not in SOURCES or not isinstance(value, SOURCES[name]):
            accepted = ", ".join(f"{key} ({kind.__name__})" for key, kind in SOURCES.items())
            raise ValueError(f"`path` must have the names {accepted}, got {shown(name)}: {shown(value)} in {path}.")
    if "recipe" not in sources:
        raise ValueError(f"`recipe` must be given, got {', '.join(sources)} in {path}.")
    if sources.get("results") and "pipeline" not in sources:
        raise ValueError(f"`pipeline` must be given with `results`, which are of its weights, got none in {path}.")
    return sources


def _check_model(model: Preset, options: TrainingOptions) -> None:
    """Raises unless a pipeline has the backbone of its recipe; recipes that start from another model pass."""
    names = ("num_layers", "num_attention_heads", "attention_head_dim")
    expected, found = (
        {name: config[name] for name in names}
        for config in (PRESETS[options.model.preset].transformer_config, model.transformer_config)
    )
    if options.model.pretrained_model_name_or_path is None and found != expected:
        raise ValueError(
            f"`pipeline` must be of the recipe's preset {options.model.preset}, {expected}, got one with {found}."
        )


def _read_step(folder: Path) -> int:
    """Number of training steps after which the pipeline in `folder` was saved."""
    if (folder / CHECKPOINT_MANIFEST).exists():  # a checkpoint
        return read_record(folder / CHECKPOINT_MANIFEST, CheckpointManifest)["step"]
    lines = read_lines(folder / METRICS_FILE)  # of a run
    if not lines:
        raise ValueError(
            f"`pipeline` must be a folder whose {CHECKPOINT_MANIFEST} or {METRICS_FILE} says how long it was trained, "
            f"got {str(folder)!r}."
        )
    return lines[-1]["step"]


def build_card(sources: Mapping[str, Any], name: str) -> ModelCard:
    """
    Fills the card of a model.

    Args:
        sources (`Mapping[str, Any]`): Sources from [`read_sources`].
        name (`str`): Name of the model.

    Returns:
        `ModelCard`: The card.

    Raises:
        `ValueError`: a file has another form, or results belong to another checkpoint.
        `OSError`: a file cannot be read.
    """
    recipe = Path(sources["recipe"])
    argv = [*read_recipe(recipe), "--output_dir", os.devnull]
    options = from_values(
        TrainingOptions, vars(build_parser(TrainingOptions).parse_args(argv))
    )  # images need no source
    num_processes = sources.get("num_processes", options.processes.num_processes or 1)
    check_at_least("num_processes", num_processes, 1)
    images_per_step = (
        options.optimizer.train_batch_size * options.optimizer.gradient_accumulation_steps * num_processes
    )
    folder, step, class_names = None, 0, ()
    if "pipeline" in sources:
        folder = Path(sources["pipeline"])
        if not folder.is_dir():
            raise ValueError(f"`pipeline` must be a folder, got {sources['pipeline']!r}.")
        checkpoint = checkpoint_sha256(folder)
        model, class_names = read_model(folder)
        _check_model(model, options)
        step = _read_step(folder)
    else:
        model, _ = find_preset(options)
    results = {file: read_results(Path(file)) for file in sources.get("results", ())}
    for file, content in results.items():
        identity = content.get("checkpoint") or {}
        if identity.get("sha256") != checkpoint or "lora_weights" in identity:
            found = f"{identity.get('sha256')}{' with LoRA adapters' if 'lora_weights' in identity else ''}"
            raise ValueError(f"`results` must be of the checkpoint {checkpoint} in {folder}, got {file} of {found}.")
    return fill_card(
        options,
        recipe,
        path=f"outputs/{recipe.stem}" if folder is None else folder.as_posix(),
        name=name,
        step=step,
        images_per_step=images_per_step,
        class_names=class_names,
        folder=folder,
        model=model,
        results=results,
        with_cost=True,
        texts=sources,
    )


@dataclass(frozen=True, kw_only=True)
class CardOptions:
    """Options of the command."""

    cards: tuple[Path, ...] = option(is_positional=True, help="Files that say what cards are filled from.")


def main(argv: list[str] | None = None) -> None:
    """Runs the command; `argv` defaults to the process's arguments. Raises a `ValueError` if they do not fit."""
    for path in parse_options(CardOptions, argv, __doc__).cards:
        sources = read_sources(path)
        card = build_card(sources, path.stem)
        _save_card(card, path.with_suffix(".md"))
        if "pipeline" in sources:
            _save_card(card, Path(sources["pipeline"]) / CARD)


if __name__ == "__main__":
    run_main(main)
