# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""The model card of a run, from what the run itself knows."""

import json
import logging
from argparse import Namespace
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .arguments import PLACES, to_recipe
from .metrics import EVALUATIONS
from .plot_metrics import plot_metrics


logger = logging.getLogger(__name__)

RECIPE, CURVES = "recipe.yaml", "curves.png"
CARD_FILES = (RECIPE, CURVES)  # what is written beside the card


def _evaluation(folder: Path) -> dict[str, float] | None:
    """The latest line of evaluations, if there is one."""
    path = folder / EVALUATIONS
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1]) if lines else None


def _model_index(args: Namespace, evaluation: dict[str, float]) -> list[EvalResult]:
    dataset = args.dataset_name if args.dataset_name and not Path(args.dataset_name).exists() else "own pictures"
    return [
        EvalResult(
            task_type="unconditional-image-generation",
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type="fid",
            metric_name=f"Fréchet distance of stage {name.rsplit('_', 1)[1]}, {evaluation['num_samples']:,} samples, "
            f"features of {Path(args.fid_extractor).name}",
            metric_value=round(value, 4),
        )
        for name, value in evaluation.items()
        if name.startswith("fid_stage_")
    ]


def _draw_curves(folder: Path) -> bool:
    try:
        plot_metrics([folder], folder / CURVES, smoothing=10)
    except ImportError:
        logger.warning("The model card has no curves: drawing them needs matplotlib.")
    return (folder / CURVES).exists()


def write_model_card(
    args: Namespace,
    class_names: tuple[str, ...] | None = None,
    images_per_step: int | None = None,
    step: int = 0,
    note: str = "",
) -> str:
    """
    Writes `README.md` into the folder of a run, and beside it the recipe and, if there are metrics, their curves.

    Args:
        args (`Namespace`): The run's arguments.
        class_names (`tuple[str]`, *optional*): Names of the classes, once they are known.
        images_per_step (`int`, *optional*): Samples per optimizer step over all processes, once they are known.
        step (`int`, defaults to 0): Number of finished steps.
        note (`str`, defaults to `""`): Text that goes in front of the recipe.

    Returns:
        `str`: The card.
    """
    folder = args.output_dir
    recipe = yaml.safe_dump(to_recipe(args), sort_keys=False)
    left_out = [name for name in PLACES if getattr(args, name) is not None and Path(getattr(args, name)).exists()]
    if left_out:
        recipe = (
            f"# To be given as well, since the run had folders of its machine for it: {', '.join(left_out)}\n{recipe}"
        )
    (folder / RECIPE).write_text(recipe)
    evaluation = _evaluation(folder) if step > 0 else None
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        license="apache-2.0",
        tags=["diffusion-on-diffusion", "diffusers_dod", "rectified-flow", "class-conditional"],
        model_name=folder.resolve().name if evaluation else None,
        eval_results=_model_index(args, evaluation) if evaluation else None,
    )
    lines = [
        f"# {args.preset}, {args.resolution} x {args.resolution}",
        "",
        "A class-conditional generator after *Diffusion Models Need Visual Priors for Image Generation*.",
        note,
    ]
    samples = sorted((folder / "samples").glob("step-*.png"))
    if samples:
        lines += [
            f"![samples](samples/{samples[-1].name})",
            "",
            "One column per class, and for each sample one row per stage, the first one on top.",
            "",
        ]
    lines += [
        "```python",
        "import diffusers_dod  # noqa: F401, registers the pipeline",
        "from diffusers import DiffusionPipeline",
        "",
        'pipe = DiffusionPipeline.from_pretrained("path/or/hub-id")',
        f"image = pipe(class_labels=[0]{', num_stages=2' if args.preset.startswith('DoD') else ''}).images[0]",
        "```",
        "",
        "## Training",
        "",
    ]
    if class_names is not None:
        shown = ", ".join(class_names[:20]) + (", ..." if len(class_names) > 20 else "")
        lines.append(f"- {len(class_names)} classes: {shown}")
    of = "" if step == args.max_train_steps else f" of {args.max_train_steps:,}"
    images = "" if images_per_step is None else f" of {images_per_step} images ({step * images_per_step:,} in all)"
    lines += [
        f"- {step:,}{of} steps{images}; the weights are their average (EMA)",
        "",
        f"`{RECIPE}`, for `accelerate launch training/train_dod.py --config {RECIPE} --output_dir ...`:",
        "",
        "```yaml",
        recipe.strip(),
        "```",
        "",
    ]
    metrics = folder / "metrics.jsonl"
    if step > 0 and metrics.exists() and metrics.stat().st_size > 0 and _draw_curves(folder):
        lines += [f"![curves]({CURVES})", ""]
    if evaluation:
        lines += [
            f"## Fréchet distance after {evaluation['step']:,} steps",
            "",
            f"Of {evaluation['num_samples']:,} samples, features of `{Path(args.fid_extractor).name}`. So few samples "
            "make it larger than many would; it compares steps and stages of one run.",
            "",
            "| stage | distance |",
            "|---:|---:|",
            *(
                f"| {name.rsplit('_', 1)[1]} | {value:.3f} |"
                for name, value in evaluation.items()
                if name.startswith("fid_stage_")
            ),
            "",
        ]
    card = ModelCard("---\n" + data.to_yaml() + "\n---\n\n" + "\n".join(lines))
    card.save(folder / "README.md")
    return str(card)
