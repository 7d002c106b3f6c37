# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Positions on grids larger than the trained one, as in FiT (Lu et al. 2024)."""

import math

import torch


POS_INTERPOLATIONS = ("none", "linear", "ntk", "yarn")

# Rotations within the trained length below which YaRN interpolates frequencies, and above which it keeps them.
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
    frequencies: torch.Tensor, scale: float, pos_interpolation: str, trained_size: int, theta: float = 10000.0
) -> torch.Tensor:
    """
    Frequencies of an axis for a grid that is larger than the trained one.

    Args:
        frequencies (`torch.Tensor` of shape `(n,)`): The trained ones, theta^(-i / n).
        scale (`float`): How many times larger the grid is, see [`grid_scales`]; 1 changes nothing.
        pos_interpolation (`str`):
            `"none"` keeps them, `"linear"` divides them by the scale, and `"ntk"` divides the lowest by it and the
            higher ones by less, the highest by 1. `"yarn"` divides those that the trained grid did not turn around
            once, keeps those that it turned around 32 times, and goes from one to the other over the whole indices
            that lie around these two, linearly.
        trained_size (`int`): Length of the trained axis.
        theta (`float`, defaults to 10000.0): Base of the frequencies.

    Returns:
        `torch.Tensor` of shape `(n,)`.
    """
    if pos_interpolation == "none" or scale == 1:
        return frequencies
    if pos_interpolation == "linear":
        return frequencies / scale
    num = len(frequencies)
    index = torch.arange(num, device=frequencies.device, dtype=frequencies.dtype)
    if pos_interpolation == "ntk":
        return frequencies * scale ** -(index / max(num - 1, 1))

    def index_of(rotations: int) -> float:
        return num * math.log(trained_size / (2 * math.pi * rotations)) / math.log(theta)

    low = max(math.floor(index_of(YARN_MAX_ROTATIONS)), 0)
    high = max(min(math.ceil(index_of(YARN_MIN_ROTATIONS)), num - 1), low + 0.001)
    kept = 1 - ((index - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scale


def attention_factor(scale: float, pos_interpolation: str, device: torch.device | None = None) -> torch.Tensor:
    """
    The factor of queries and keys, which sharpens the attention.

    Args:
        scale (`float`): How many times larger than the trained one the longer side of the grid is.
        pos_interpolation (`str`): `"yarn"`, or one of the other modes, whose factor is 1.
        device (`torch.device`, *optional*): Where the factor is computed.

    Returns:
        `torch.Tensor` of shape `()`: YaRN's 1 + ln(scale) / 10, or 1.
    """
    # A tensor's logarithm, which a compiler does not tie to one scale.
    return 1 + 0.1 * torch.full((), scale if pos_interpolation == "yarn" else 1.0, device=device).log()
