# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Pictures of samples: one column per class, one row per stage."""

import torch
from PIL import Image

from ..pipeline_dod import DoDPipeline


def make_grid(rows: list[list[Image.Image]], scale: int = 1, gap: int = 2) -> Image.Image:
    """
    Pictures of one size in rows, on white.

    Args:
        rows (`list[list[PIL.Image.Image]]`): The pictures; rows may differ in length.
        scale (`int`, defaults to 1): How many times each is enlarged, without smoothing.
        gap (`int`, defaults to 2): White pixels between neighbours.

    Returns:
        `PIL.Image.Image`: The grid.
    """
    width, height = (side * scale for side in rows[0][0].size)
    columns = max(len(row) for row in rows)
    grid = Image.new("RGB", (columns * (width + gap) - gap, len(rows) * (height + gap) - gap), "white")
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            enlarged = picture.resize((width, height), Image.Resampling.NEAREST)
            grid.paste(enlarged, (j * (width + gap), i * (height + gap)))
    return grid


def stage_grid(
    pipeline: DoDPipeline, seed: int, num_columns: int = 12, samples_per_class: int = 2, **call_arguments
) -> Image.Image:
    """
    Samples of the first `num_columns` classes: for each of `samples_per_class`, a row per stage, stage 1 on top.

    Args:
        pipeline ([`DoDPipeline`]): The model.
        seed (`int`): Seed of the noise.
        num_columns (`int`, defaults to 12): How many classes to show.
        samples_per_class (`int`, defaults to 2): How many samples of each.
        call_arguments: Further arguments of the pipeline's call.

    Returns:
        `PIL.Image.Image`: The grid, its pictures enlarged by the largest whole factor that keeps them within 64
        pixels.
    """
    labels = list(range(min(num_columns, pipeline.transformer.config.num_classes)))
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(samples_per_class):
        rows += pipeline(labels, generator=generator, return_stages=True, **call_arguments).stages
    return make_grid(rows, scale=max(1, 64 // rows[0][0].width))
