# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""The SDEs that share the marginals of the rectified flow (SiT, Ma et al. 2024): drift, noise and last step."""

import math
from dataclasses import dataclass

import torch

from .rectified_flow import noise_from_velocity


DIFFUSION_FORMS = ("constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing")
SBDM_MAX_SIGMA = 0.999


@dataclass(frozen=True)
class Diffusion:
    """
    The diffusion w(sigma) of the SDE dx = (v - w score) dsigma + sqrt(2 w) dW, which runs from sigma = 1 to 0.

    Args:
        form (`str`): One of `DIFFUSION_FORMS`.
        norm (`float`): The factor c, at least 0.
    """

    form: str
    norm: float

    def is_bounded(self, sigma: float) -> bool:
        """
        Whether an interval may start there. The form `"SBDM"` is infinite at sigma = 1.

        Args:
            sigma (`float`): Start of the interval, in [0, 1].
        """
        return self.form != "SBDM" or sigma <= SBDM_MAX_SIGMA

    def over_sigma(self, sigma: float) -> float:
        """
        The diffusion w over sigma, which is the factor of the noise in the SDE's drift.

        Args:
            sigma (`float`): Time in (0, 1], where the diffusion is bounded.

        Raises:
            `ValueError`: the form is unknown.
        """
        if self.form in ("sigma", "linear"):
            return self.norm
        if self.form == "SBDM":
            return self.norm / (1 - sigma)
        if self.form == "constant":
            return self.norm / sigma
        if self.form == "decreasing":
            return 0.25 * (1 - self.norm * math.cos(math.pi * sigma)) ** 2 / sigma
        if self.form == "increasing-decreasing":
            return self.norm * math.sin(math.pi * sigma) ** 2 / sigma
        raise ValueError(f"`form` must be one of {', '.join(map(repr, DIFFUSION_FORMS))}, got {self.form!r}.")

    def drift(self, sample: torch.Tensor, velocity: torch.Tensor, sigma: float) -> torch.Tensor:
        """
        The SDE's drift dx / dsigma = v - w score.

        Args:
            sample (`torch.Tensor` of shape `(B, ...)`): The sample x_sigma.
            velocity (`torch.Tensor` of shape `(B, ...)`): Velocity (noise - data) there.
            sigma (`float`): Time in (0, 1], where the diffusion is bounded.

        Returns:
            `torch.Tensor` of shape `(B, ...)`.
        """
        return velocity + self.over_sigma(sigma) * noise_from_velocity(sample, velocity, sigma)

    def noise_scale(self, sigma: float, next_sigma: float) -> float:
        """
        Standard deviation of the noise of an interval, sqrt(2 w dsigma).

        Args:
            sigma (`float`): Start of the interval, in [0, 1].
            next_sigma (`float`): End of the interval, at most `sigma`.
        """
        if sigma == next_sigma or not self.is_bounded(sigma):
            return 0.0
        return math.sqrt(2 * self.over_sigma(sigma) * sigma * (sigma - next_sigma))


@dataclass(frozen=True)
class LastStep:
    """
    A way to end the SDE: what its last interval keeps.

    Args:
        has_drift (`bool`): Whether the last interval follows the drift of the SDE. It follows the ODE if not.
        has_noise (`bool`): Whether it has the noise of the SDE.
    """

    has_drift: bool
    has_noise: bool


LAST_STEPS = {
    "mean": LastStep(has_drift=True, has_noise=False),
    "euler": LastStep(has_drift=False, has_noise=False),
    "tweedie": LastStep(has_drift=False, has_noise=False),  # to the expected data, where the velocity leads as well
    "none": LastStep(has_drift=True, has_noise=True),
}
