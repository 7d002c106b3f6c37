# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Positions on grids larger than the trained one, as in FiT (Lu et al. 2024)."""

import math

import torch


POS_INTERPOLATIONS = ("none", "linear", "ntk", "yarn")

# Rotations within the trained length below which YaRN interpolates a frequency, and above which it keeps it.
YARN_MIN_ROTATIONS = 1
YARN_MAX_ROTATIONS = 32


def grid_scales(rows: int, columns: int, trained_size: int, decoupled: bool) -> tuple[float, float]:
    """
    How many times larger than the trained one a grid is.

    Args:
        rows (`int`): Rows of the grid.
        columns (`int`): Columns of the grid.
        trained_size (`int`): Rows and columns of the trained grid.
        decoupled (`bool`): Whether each axis has a scale of its own; the larger one holds for both if not.

    Returns:
        `tuple[float, float]`: The scales of the rows and of the columns, both at least 1.
    """
    if not decoupled:
        rows = columns = max(rows, columns)
    return max(1.0, rows / trained_size), max(1.0, columns / trained_size)


def interpolate_frequencies(
    frequencies: torch.Tensor, scale: float, pos_interpolation: str, trained_size: int
) -> torch.Tensor:
    """
    Frequencies of an axis for a grid that is larger than the trained one.

    Args:
        frequencies (`torch.Tensor` of shape `(n,)`): The trained ones, a geometric sequence from 1 downwards.
        scale (`float`): How many times larger the grid is, see [`grid_scales`]; 1 changes nothing.
        pos_interpolation (`str`):
            `"none"` keeps them, `"linear"` divides them by the scale, `"ntk"` divides the lowest by it and the higher
            ones by less, and `"yarn"` divides those that the trained grid did not turn around once, and keeps those
            that it turned around 32 times.
        trained_size (`int`): Length of the trained axis.

    Returns:
        `torch.Tensor` of shape `(n,)`.
    """
    if pos_interpolation == "none" or scale == 1:
        return frequencies
    if pos_interpolation == "linear":
        return frequencies / scale
    if pos_interpolation == "ntk":
        position = torch.linspace(0, 1, len(frequencies), device=frequencies.device, dtype=frequencies.dtype)
        return frequencies * scale**-position
    rotations = trained_size * frequencies / (2 * math.pi)
    kept = ((rotations - YARN_MIN_ROTATIONS) / (YARN_MAX_ROTATIONS - YARN_MIN_ROTATIONS)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scale


def attention_factor(scale: float, pos_interpolation: str) -> float | torch.Tensor:
    """
    The factor of queries and keys, which sharpens the attention: YaRN's 1 + ln(`scale`) / 10, 1 for every other
    `pos_interpolation`.
    """
    # A tensor's logarithm, which a compiler does not tie to one scale.
    return 0.1 * torch.full((), scale).log() + 1 if pos_interpolation == "yarn" else 1.0
