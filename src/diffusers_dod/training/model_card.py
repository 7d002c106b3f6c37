# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""The model card of a finished run, from what the run itself knows."""

import json
from argparse import Namespace
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData


def write_model_card(
    folder: Path, args: Namespace, class_names: tuple[str, ...], images_per_step: int, note: str = ""
) -> None:
    """
    Writes `folder/README.md`.

    Args:
        folder (`Path`): The pipeline's folder.
        args (`Namespace`): The run's arguments.
        class_names (`tuple[str]`): Names of the classes.
        images_per_step (`int`): Samples per optimizer step over all processes.
        note (`str`, defaults to `""`): Text that goes in front of the recipe.
    """
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        license="apache-2.0",
        tags=["diffusion-on-diffusion", "diffusers_dod", "rectified-flow", "class-conditional"],
    )
    recipe = {name: str(value) if isinstance(value, Path) else value for name, value in sorted(vars(args).items())}
    for private in ("hub_token", "output_dir", "resume_from_checkpoint", "train_data_dir", "latents_dir"):
        recipe.pop(private, None)
    # A Hub id is public, a folder of this machine is not.
    for source in ("pretrained_model_name_or_path", "pretrained_vae_name_or_path", "dataset_name"):
        if recipe[source] is not None and Path(recipe[source]).exists():
            recipe.pop(source)
    shown = ", ".join(class_names[:20]) + (", ..." if len(class_names) > 20 else "")
    card = ModelCard.from_template(
        data,
        template_str="\n".join(
            [
                "---",
                "{{ card_data }}",
                "---",
                "",
                f"# {args.preset}, {args.resolution} x {args.resolution}",
                "",
                "A class-conditional generator after *Diffusion Models Need Visual Priors for Image Generation*.",
                note,
                "",
                "```python",
                "import diffusers_dod  # noqa: F401, registers the pipeline",
                "from diffusers import DiffusionPipeline",
                "",
                'pipe = DiffusionPipeline.from_pretrained("path/or/hub-id")',
                "image = pipe(class_labels=[0], num_stages=2).images[0]"
                if args.preset.startswith("DoD")
                else "image = pipe(class_labels=[0]).images[0]",
                "```",
                "",
                "## Training",
                "",
                f"- {len(class_names)} classes: {shown}",
                f"- {args.max_train_steps:,} steps of {images_per_step} images "
                f"({args.max_train_steps * images_per_step:,} in all); the weights are their average (EMA)",
                "",
                "```json",
                json.dumps(recipe, indent=2),
                "```",
                "",
            ]
        ),
    )
    card.save(folder / "README.md")
