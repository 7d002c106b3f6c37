# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Grids of images."""

from PIL import Image


def make_grid(rows: list[list[Image.Image]], scale: int = 1, gap: int = 2) -> Image.Image:
    """
    Puts images of one size into rows, on white.

    Args:
        rows (`list[list[PIL.Image.Image]]`): The images. Rows may differ in length.
        scale (`int`, defaults to 1): Factor by which each image is enlarged, without smoothing.
        gap (`int`, defaults to 2): White pixels between neighbours.

    Returns:
        `PIL.Image.Image`: The grid.
    """
    width, height = (side * scale for side in rows[0][0].size)
    columns = max(len(row) for row in rows)
    grid = Image.new("RGB", (columns * (width + gap) - gap, len(rows) * (height + gap) - gap), "white")
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            enlarged = image.resize((width, height), Image.Resampling.NEAREST)
            grid.paste(enlarged, (j * (width + gap), i * (height + gap)))
    return grid
