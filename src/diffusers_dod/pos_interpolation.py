# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Positions on grids larger than the trained one, as in FiT (Lu et al. 2024)."""

import math
from collections.abc import Callable

import torch

from .checks import check_choice, check_type


POS_INTERPOLATIONS = ("none", "linear", "ntk", "yarn")

# Rotations within the trained length below which YaRN interpolates frequencies, and above which it keeps them.
YARN_MIN_ROTATIONS = 1
YARN_MAX_ROTATIONS = 32


MAX_TABLES = 64  # of positions that a model keeps


class PositionTables:
    """Tables of positions that a model has made. Copies of it, pickled ones too, make their own."""

    def __init__(self):
        self._tables: dict[tuple, torch.Tensor] = {}

    def find(self, key: tuple, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """
        Looks a table up, or makes and keeps it.

        Args:
            key (`tuple`): All that the table depends on.
            make (`Callable`): Makes the table.

        Returns:
            `torch.Tensor`.
        """
        if torch.compiler.is_compiling():
            return make()
        key = (*key, torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE))  # a fake table is for its mode
        table = self._tables.get(key)
        if table is None:
            with torch.inference_mode(False), torch.no_grad():  # for training too, whoever asks first
                table = make()
            if len(self._tables) >= MAX_TABLES:
                self._tables.clear()
            self._tables[key] = table
        return table

    def __reduce__(self) -> tuple[type["PositionTables"], tuple[()]]:
        return PositionTables, ()


class PosInterpolationMixin:
    """
    The choice of how positions are treated, for models that have positions.

    A model's constructor takes `pos_interpolation` and `pos_interpolation_decoupled`, so that saved configs can hold
    them.
    """

    def set_pos_interpolation(
        self, pos_interpolation: str = "none", pos_interpolation_decoupled: bool = False
    ) -> None:
        """
        Chooses how positions on grids larger than the trained one are treated.

        Nothing changes at the trained size or below it. The config keeps the choice.

        Args:
            pos_interpolation (`str`, defaults to `"none"`):
                Let s be how many times larger the grid is. `"none"` keeps the trained frequencies. `"linear"` divides
                all of them by s. `"ntk"` divides the lowest by s and higher ones by less. `"yarn"` divides the
                frequencies that make less than one turn within the trained grid, and sharpens the attention where
                positions are rotations.
            pos_interpolation_decoupled (`bool`, defaults to `False`):
                Whether rows and columns have each their own s. If not, the longer side's s holds for both.

        Raises:
            `ValueError`, `TypeError`: an argument has another value or type.
        """
        self._check_pos_interpolation(pos_interpolation, pos_interpolation_decoupled)
        self.register_to_config(
            pos_interpolation=pos_interpolation, pos_interpolation_decoupled=pos_interpolation_decoupled
        )

    @staticmethod
    def _check_pos_interpolation(pos_interpolation: str, pos_interpolation_decoupled: bool) -> None:
        check_choice("pos_interpolation", pos_interpolation, POS_INTERPOLATIONS)
        check_type("pos_interpolation_decoupled", pos_interpolation_decoupled, bool)


def grid_scales(rows: int, columns: int, trained_size: int, decoupled: bool) -> tuple[float, float]:
    """
    Ratios of a grid's sides to the trained grid's, at least 1.

    Args:
        rows (`int`): Rows of the grid.
        columns (`int`): Columns of the grid.
        trained_size (`int`): Rows and columns of the trained grid.
        decoupled (`bool`): Whether each axis has its own scale. If not, the larger scale holds for both.

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
    Adapts the frequencies of an axis to a grid that is larger than the trained one.

    Args:
        frequencies (`torch.Tensor` of shape `(n,)`): The trained frequencies, theta^(-i / n).
        scale (`float`): Ratio of the grid's side to the trained one, see [`grid_scales`]; 1 changes nothing.
        pos_interpolation (`str`):
            `"none"` keeps the frequencies. `"linear"` divides them by the scale. `"ntk"` divides the lowest by the
            scale and higher ones by less, the highest by 1. `"yarn"` divides frequencies that make less than one turn
            within the trained length, and keeps those that make more than 32. In between it blends linearly over the
            index: from the index of 32 turns, rounded down, to the index of 1 turn, rounded up.
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
    Factor of queries and keys, which sharpens the attention.

    Args:
        scale (`float`): Ratio of the grid's longer side to the trained one.
        pos_interpolation (`str`): Mode of interpolation. The factor is 1 for all but `"yarn"`.
        device (`torch.device`, *optional*): Device of the factor.

    Returns:
        `torch.Tensor` of shape `()`: YaRN's 1 + ln(scale) / 10, or 1.
    """
    # The logarithm of a tensor: a compiler would tie that of a float to one scale.
    return 1 + 0.1 * torch.full((), scale if pos_interpolation == "yarn" else 1.0, device=device).log()
