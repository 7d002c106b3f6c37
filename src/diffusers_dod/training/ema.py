# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Averages of the weights over the training: exponential ones, and power-function ones (Karras et al. 2024,
arXiv:2312.02696).

Snapshots of power-function averages can be combined to an average of any length after the training.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from diffusers.training_utils import EMAModel

from ..finetuning import LORA_MARK
from ..training_options import AverageOptions


def averaged_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The weights to average of the [`DoDJointModel`] `model`, by name: all of the pipeline, or of its adapters."""
    parts = ("transformer.", "latent_embedder.")
    weights = {name: parameter for name, parameter in model.named_parameters() if name.startswith(parts)}
    return {name: parameter for name, parameter in weights.items() if LORA_MARK in name} or weights


def power_of(sigma_rel: float) -> float:
    """
    The exponent gamma of a power-function profile.

    Args:
        sigma_rel (`float`):
            Standard deviation of the profile divided by the length of the training, in (0, 1 / sqrt(12)).

    Returns:
        `float`: The gamma > 0 for which sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).
    """
    roots = np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2])
    return float(roots.real.max())


class WeightAverage(EMAModel):
    """Diffusers' `EMAModel` with the same values, whose step moves half of the bytes and needs no temporary memory."""

    @torch.no_grad()
    def step(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """
        Moves the average towards the weights, and copies weights that are not trained.

        Args:
            parameters (`Iterable[torch.nn.Parameter]`): The weights, in the order of the constructor.
        """
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        trained, frozen = [], []
        for average, parameter in zip(self.shadow_params, parameters, strict=True):
            (trained if parameter.requires_grad else frozen).append((average, parameter.to(average.dtype)))
        if trained:
            torch._foreach_lerp_(*map(list, zip(*trained, strict=True)), 1 - self.cur_decay_value)
        if frozen:
            torch._foreach_copy_(*map(list, zip(*frozen, strict=True)))


class PowerFunctionEMA(WeightAverage):
    """
    An average in which the weights of step s count s^gamma, so that its length grows with the training.

    Args:
        parameters (`Iterable[torch.nn.Parameter]`): The weights to follow.
        sigma_rel (`float`): Width of the profile divided by the length of the training, in (0, 1 / sqrt(12)).
        kwargs: Passed on to `EMAModel`.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], sigma_rel: float, **kwargs):
        super().__init__(parameters, **kwargs)
        self.power_gamma = power_of(sigma_rel)

    def get_decay(self, optimization_step: int) -> float:
        """Share of the old average that is kept in `optimization_step`, counted from 1."""
        return (1 - 1 / optimization_step) ** (self.power_gamma + 1)


def build_averages(options: AverageOptions, parameters: Sequence[torch.nn.Parameter]) -> dict[str, EMAModel]:
    """
    Builds the averages of a run in fp32: small changes of weights in bf16, which DeepSpeed trains, would be lost.

    Args:
        options ([`AverageOptions`]): The options of the averages.
        parameters (`Sequence[torch.nn.Parameter]`): The weights to follow.

    Returns:
        `dict[str, EMAModel]`: The averages by name.
    """
    averages: dict[str, EMAModel] = {
        f"decay-{decay}": WeightAverage(parameters, decay=decay) for decay in options.ema_decay
    }
    averages |= {f"sigma-rel-{width}": PowerFunctionEMA(parameters, width) for width in options.ema_sigma_rel}
    for average in averages.values():
        average.to(dtype=torch.float32)
    return averages


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
    Weights with which snapshots of power-function averages add up to another average, by least squares.

    Args:
        snapshots (`Sequence[tuple[int, float]]`): Step and `sigma_rel` of each snapshot.
        step (`int`): Last step of the wanted average, at most that of the latest snapshot.
        sigma_rel (`float`): Width of the wanted average, in (0, 1 / sqrt(12)).

    Returns:
        `tuple[np.ndarray, float]`: A weight for each snapshot, and the error of the profile: the norm of the
        difference divided by the norm of the wanted profile.

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
