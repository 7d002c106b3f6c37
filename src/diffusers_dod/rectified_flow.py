# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Rectified flow (paper, Eqs. 1-3 and 11): the straight path between data and noise.

This is the only file that knows the direction of time: `sigma` runs from 0 (data) to 1 (noise), the model's `timestep`
is 1000 * sigma, and the velocity points from data to noise.
"""

import torch


NUM_TRAIN_TIMESTEPS = 1000


def _expand_like(sigma: float | torch.Tensor, sample: torch.Tensor) -> float | torch.Tensor:
    """Reshapes `sigma` from (B,) to (B, 1, ..., 1), so that it broadcasts over `sample`."""
    if isinstance(sigma, torch.Tensor):
        sigma = sigma.to(device=sample.device, dtype=sample.dtype)
        if sigma.ndim == 1:
            sigma = sigma.reshape(-1, *[1] * (sample.ndim - 1))
    return sigma


def interpolate(sample: torch.Tensor, noise: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
    """
    The forward process (paper, Eq. 1): x_sigma = (1 - sigma) * sample + sigma * noise.

    Args:
        sample (`torch.Tensor` of shape `(B, ...)`): Data.
        noise (`torch.Tensor` of shape `(B, ...)`): Standard normal noise.
        sigma (`float` or `torch.Tensor` of shape `()` or `(B,)`): Time in [0, 1], 0 = data.

    Returns:
        `torch.Tensor` of shape `(B, ...)`.
    """
    sigma = _expand_like(sigma, sample)
    return (1 - sigma) * sample + sigma * noise


def velocity_target(sample: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The regression target of the model (paper, Eq. 3): d x_sigma / d sigma = `noise` - `sample`."""
    return noise - sample


def noise_from_velocity(
    noisy_sample: torch.Tensor, velocity: torch.Tensor, sigma: float | torch.Tensor
) -> torch.Tensor:
    """
    Estimates the noise in a noisy sample (paper, Eqs. 1 and 3): x_sigma + (1 - sigma) * velocity.

    The score is -1 / sigma times this noise.

    Args:
        noisy_sample (`torch.Tensor` of shape `(B, ...)`): The sample x_sigma.
        velocity (`torch.Tensor` of shape `(B, ...)`): Velocity (noise - data) at that sample.
        sigma (`float` or `torch.Tensor` of shape `()` or `(B,)`): Time in [0, 1], 0 = data.

    Returns:
        `torch.Tensor` of shape `(B, ...)`.
    """
    return noisy_sample + (1 - _expand_like(sigma, noisy_sample)) * velocity


def euler_step(
    noisy_sample: torch.Tensor, velocity: torch.Tensor, sigma: float | torch.Tensor, next_sigma: float | torch.Tensor
) -> torch.Tensor:
    """
    One Euler step of the flow (paper, Eq. 2). It goes towards data if next_sigma < sigma.

    Args:
        noisy_sample (`torch.Tensor` of shape `(B, ...)`): The sample at `sigma`.
        velocity (`torch.Tensor` of shape `(B, ...)`): Velocity (noise - data) at that sample.
        sigma (`float` or `torch.Tensor` of shape `()` or `(B,)`): Time in [0, 1], 0 = data.
        next_sigma (`float` or `torch.Tensor` of shape `()` or `(B,)`): The time to go to.

    Returns:
        `torch.Tensor` of shape `(B, ...)`: The sample at `next_sigma`.
    """
    return noisy_sample + _expand_like(next_sigma - sigma, noisy_sample) * velocity


def logit_normal_sigma(normal: torch.Tensor, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
    """
    Logit-normal training times (paper, Eq. 11): sigma = 1 / (1 + exp(-logit)) with logit = mean + std * normal.

    The paper prints the inverse function. With its mean of 0 the density is symmetric about 1/2, so that it does not
    matter which end of the path is called 0.

    Args:
        normal (`torch.Tensor`): Standard normal draws of any shape.
        mean (`float`, defaults to 0.0): Mean of the logit; a larger one means more noise.
        std (`float`, defaults to 1.0): Standard deviation of the logit, positive.

    Returns:
        `torch.Tensor`: Times in (0, 1), of the same shape.
    """
    return torch.sigmoid(mean + std * normal)


def shift_sigma(sigma: torch.Tensor, shift: float) -> torch.Tensor:
    """
    Moves times towards noise (Esser et al. 2024, arXiv:2403.03206, Eq. 23): shift * sigma / (1 + (shift - 1) * sigma).

    Latents with more dimensions need it, if the schedule was made for fewer.

    Args:
        sigma (`torch.Tensor`): Times in [0, 1] of any shape.
        shift (`float`): The shift, positive; 1 changes nothing, and larger values move towards noise.

    Returns:
        `torch.Tensor`: Times in [0, 1], of the same shape.
    """
    return sigma if shift == 1 else shift * sigma / (1 + (shift - 1) * sigma)
