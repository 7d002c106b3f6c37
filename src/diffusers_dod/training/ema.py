# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Averages of the weights over the training: exponential ones, and those with a power function for a profile, from whose
snapshots an average of any length is put together after the training (Karras et al. 2024, arXiv:2312.02696).
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from diffusers.training_utils import EMAModel


def averaged_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The weights of a [`DoDJointModel`], `model`, by name, that are averaged: those of its pipeline."""
    parts = ("transformer.", "latent_embedder.")
    return {name: parameter for name, parameter in model.named_parameters() if name.startswith(parts)}


def power_of(sigma_rel: float) -> float:
    """
    The exponent gamma of a power-function profile.

    Args:
        sigma_rel (`float`): Its standard deviation over the length of the training, in (0, 1 / sqrt(12)).

    Returns:
        `float`: The gamma > 0 for which sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).
    """
    roots = np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2])
    return float(roots.real.max())


class PowerFunctionEMA(EMAModel):
    """
    An average of the weights in which those of step s weigh s^gamma: longer, the longer the training.

    Args:
        parameters (`Iterable[torch.nn.Parameter]`): The weights to follow.
        sigma_rel (`float`): Width of the profile over the length of the training, in (0, 1 / sqrt(12)).
        kwargs: Passed on to `EMAModel`.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], sigma_rel: float, **kwargs):
        super().__init__(parameters, **kwargs)
        self.power_gamma = power_of(sigma_rel)

    def get_decay(self, optimization_step: int) -> float:
        """The share of the average that stays in `optimization_step`, counted from 1."""
        return (1 - 1 / optimization_step) ** (self.power_gamma + 1)


def _log_inner_product(step: float, sigma_rel: float, other_step: float, other_sigma_rel: float) -> float:
    gamma, other_gamma = power_of(sigma_rel), power_of(other_sigma_rel)
    shorter = min(step, other_step)
    return (
        math.log(gamma + 1)
        + math.log(other_gamma + 1)
        - math.log(gamma + other_gamma + 1)
        + (gamma + other_gamma + 1) * math.log(shorter)
        - (gamma + 1) * math.log(step)
        - (other_gamma + 1) * math.log(other_step)
    )


def reconstruction_weights(
    snapshots: Sequence[tuple[int, float]], step: int, sigma_rel: float
) -> tuple[np.ndarray, float]:
    """
    How snapshots of power-function averages add up to another one, by least squares of the profiles.

    Args:
        snapshots (`Sequence[tuple[int, float]]`): Step and `sigma_rel` of each.
        step (`int`): Where the wanted average ends, at most the last step.
        sigma_rel (`float`): Its width, in (0, 1 / sqrt(12)).

    Returns:
        `tuple[np.ndarray, float]`: A weight for each snapshot, and the norm of what is left of the profile, over its
        own.

    Raises:
        `ValueError`: there is no snapshot, or none as late as `step`.
    """
    if not snapshots or step > max(snapshot[0] for snapshot in snapshots):
        latest = max((snapshot[0] for snapshot in snapshots), default=None)
        raise ValueError(f"`step` must be at most that of the latest snapshot, {latest}, got {step}.")
    products = np.array([[math.exp(_log_inner_product(*a, *b)) for b in snapshots] for a in snapshots])
    wanted = np.array([math.exp(_log_inner_product(*a, step, sigma_rel)) for a in snapshots])
    weights = np.linalg.lstsq(products, wanted, rcond=1e-12)[0]
    square = math.exp(_log_inner_product(step, sigma_rel, step, sigma_rel))
    rest = square - 2 * weights @ wanted + weights @ products @ weights
    return weights, math.sqrt(max(rest, 0.0) / square)
