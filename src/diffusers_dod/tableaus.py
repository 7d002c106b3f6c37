# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Solvers as data: the coefficients of Runge-Kutta methods, and the table of all solvers. A new one is a row here."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ButcherTableau:
    """
    An explicit Runge-Kutta method.

    Args:
        order (`int`): The order of convergence.
        nodes (`tuple[float, ...]`): Place of each evaluation, from 0, the start of the interval, to 1, its end.
        weights (`tuple[tuple[float, ...], ...]`):
            Weights of the earlier evaluations, for each evaluation. They lead to its sample.
        solution (`tuple[float, ...]`): Weights of the evaluations in the step.
        error (`tuple[float, ...]`, *optional*):
            Weights of the estimated error: `solution` less an embedded method. Methods with an error estimate choose
            their own steps. Their last evaluation is the first one of the next step.
    """

    order: int
    nodes: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]
    solution: tuple[float, ...]
    error: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Solver:
    """
    A row of the table of solvers.

    Args:
        tableau (`ButcherTableau`): The method of an interval.
        is_stochastic (`bool`, defaults to `False`): Whether it solves the SDE, so that each step draws noise.
        noise_before (`bool`, defaults to `False`):
            Whether an interval's noise is added before the interval. It is added at the end if not.
    """

    tableau: ButcherTableau
    is_stochastic: bool = False
    noise_before: bool = False

    @property
    def is_adaptive(self) -> bool:
        """Whether the solver chooses its own steps."""
        return self.tableau.error is not None


EULER = ButcherTableau(1, (0.0,), ((),), (1.0,))
MIDPOINT = ButcherTableau(2, (0.0, 1 / 2), ((), (1 / 2,)), (0.0, 1.0))
HEUN = ButcherTableau(2, (0.0, 1.0), ((), (1.0,)), (1 / 2, 1 / 2))
RK4 = ButcherTableau(
    4, (0.0, 1 / 2, 1 / 2, 1.0), ((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)
)
# Dormand and Prince (1980), with the error estimate of Shampine (1986), which torchdiffeq has as well.
DOPRI5 = ButcherTableau(
    5,
    (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    (
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
    (
        35 / 384 - 1951 / 21600,
        0.0,
        500 / 1113 - 22642 / 50085,
        125 / 192 - 451 / 720,
        -2187 / 6784 + 12231 / 42400,
        11 / 84 - 649 / 6300,
        -1 / 60,
    ),
)

SOLVERS = {
    "euler": Solver(EULER),
    "midpoint": Solver(MIDPOINT),
    "heun": Solver(HEUN),
    "rk4": Solver(RK4),
    "euler_maruyama": Solver(EULER, is_stochastic=True),
    "stochastic_heun": Solver(HEUN, is_stochastic=True, noise_before=True),
    "dopri5": Solver(DOPRI5),
}


def weighted_sum(weights: Sequence[float], velocities: Sequence[torch.Tensor]) -> torch.Tensor:
    """
    The weighted sum of evaluations.

    Args:
        weights (`Sequence[float]`): One weight for each evaluation. Evaluations of weight 0 are left out.
        velocities (`Sequence[torch.Tensor]`): The evaluations, of one shape.

    Returns:
        `torch.Tensor` of that shape.
    """
    return sum(weight * velocity for weight, velocity in zip(weights, velocities, strict=True) if weight != 0)
