# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Integration from noise (sigma = 1) to data (sigma = 0) in steps that an error estimate chooses."""

from collections.abc import Callable

import torch

from .devices import send
from .tableaus import ButcherTableau, weighted_sum


VelocityFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
StepCallback = Callable[[int, torch.Tensor, torch.Tensor], bool | None]

MAX_ATTEMPTS = 10_000  # attempted steps, including accepted ones


class _Stop(Exception):
    """Raised inside torchdiffeq to leave it early; carries the sample that was reached."""

    def __init__(self, sample: torch.Tensor):
        self.sample = sample


def _check_attempt(attempt: int, sigma: torch.Tensor, length: torch.Tensor, rtol: float, atol: float) -> None:
    """Raises unless step number `attempt` moves every sample, and not too many came before it."""
    vanishes = sigma - length == sigma
    if attempt <= MAX_ATTEMPTS and not bool(vanishes.any()):
        return
    stuck = sigma[vanishes].max() if bool(vanishes.any()) else sigma.max()
    reason = "steps vanish" if bool(vanishes.any()) else f"{MAX_ATTEMPTS} attempts of a step came no further"
    raise ValueError(
        f"`rtol` and `atol` must be tolerances that the model's precision allows, got {rtol} and {atol}: "
        f"{reason} at sigma = {stuck.item():.4g}."
    )


def _check_finite(are_finite: torch.Tensor, sigmas: list[torch.Tensor]) -> None:
    """Raises unless all evaluations, at (n, b) on the CPU, were finite; the error estimate needs that."""
    for is_finite, sigma in zip(are_finite, sigmas, strict=True):
        if not bool(is_finite.all()):
            found = sigma if sigma.ndim == 0 else sigma[~is_finite][0]
            raise ValueError(f"`velocity_fn` must return finite numbers, got others at sigma = {found.item():.4g}.")


def _are_finite(velocity: torch.Tensor) -> torch.Tensor:
    """Tells which samples' velocities are finite, (b,), on their device."""
    return torch.isfinite(velocity).reshape(len(velocity), -1).all(dim=1)


def _rms(value: torch.Tensor) -> torch.Tensor:
    """The root mean square of each sample, (b,)."""
    return value.reshape(len(value), -1).to(torch.float64).square().mean(dim=1).sqrt()


def integrate_by_sample(
    velocity: VelocityFunction,
    sample: torch.Tensor,
    tableau: ButcherTableau,
    rtol: float,
    atol: float,
    callback: StepCallback | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Integrates every sample in steps of its own. The last step lands exactly on sigma = 0.

    The error control is that of Hairer, Norsett and Wanner (Solving ODEs I, II.4). It runs on the CPU, which reads the
    errors once for each attempted step.

    Args:
        velocity (`Callable`):
            `velocity(sample, sigma, indices)` returns finite velocities (noise - data) in the dtype of `sample` for
            the samples `indices` (b,) that are left. `sigma` (b,) is fp64. Both are on the CPU.
        sample (`torch.Tensor` of shape `(B, ...)`): The noise at sigma = 1.
        tableau (`ButcherTableau`): A method with an error estimate.
        rtol (`float`): Relative tolerance.
        atol (`float`): Absolute tolerance.
        callback (`Callable`, *optional*):
            `callback(index, sigma, sample)` after each step that some sample accepted: its index, the time (B,) where
            it started, 0 for samples that are done, on the CPU, and the samples it led to. Returning `False` ends the
            integration.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The samples at sigma = 0, in their dtype but computed in fp32 at least;
        and their evaluations, accepted steps and rejected steps, (3, B), int64 on the CPU.

    Raises:
        `ValueError`: velocities are not finite, steps vanish, or there are too many of them.
    """
    dtype = sample.dtype if sample.dtype == torch.float64 else torch.float32
    device, batch_size = sample.device, sample.shape[0]
    counts = torch.zeros(3, batch_size, dtype=torch.int64)
    num_evaluations, num_accepted, num_rejected = counts
    unread: list[tuple[torch.Tensor, torch.Tensor]] = []  # evaluations: their times, and whether they are finite

    def expand(value: torch.Tensor) -> torch.Tensor:
        """A number of each sample, from the CPU, to be multiplied with the samples."""
        return send(value, device).reshape(-1, *[1] * (sample.ndim - 1))

    def evaluate(state: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        num_evaluations[indices] += 1
        result = velocity(state, sigma, indices)
        unread.append((sigma, _are_finite(result)))
        return result

    def read(*values: torch.Tensor) -> list[torch.Tensor]:
        """Numbers of each sample on the CPU, once it is known that all velocities are finite; this waits."""
        numbers = torch.stack([*values, *(is_finite.to(torch.float64) for _, is_finite in unread)]).cpu()
        _check_finite(numbers[len(values) :].bool(), [at for at, _ in unread])
        unread.clear()
        return list(numbers[: len(values)])

    # For the samples that are left: their indices, their times, and the lengths of their next steps, on the CPU.
    indices = torch.arange(batch_size)
    state = sample.to(dtype)
    sigma = torch.ones(batch_size, dtype=torch.float64)
    result, rows = state.clone(), send(indices, device)
    first = evaluate(state, sigma)
    tolerance = atol + rtol * state.abs()
    size, slope = read(_rms(state / tolerance), _rms(first / tolerance))
    guess = torch.where((size < 1e-5) | (slope < 1e-5), 1e-6, 0.01 * size / slope).clamp(max=1)
    second = evaluate(state - expand(guess.to(dtype)) * first, sigma - guess)
    (curvature,) = read(_rms((second - first) / tolerance))
    curvature = curvature / guess
    largest = torch.maximum(slope, curvature)
    length = torch.where(largest <= 1e-15, (guess * 1e-3).clamp(min=1e-6), (0.01 / largest) ** (1 / tableau.order))
    length = torch.minimum(100 * guess, length)

    num_attempts = num_steps = 0
    while len(indices) > 0:
        length = torch.minimum(length, sigma)
        num_attempts += 1
        _check_attempt(num_attempts, sigma, length, rtol, atol)
        velocities, step = [first], expand(length.to(dtype))
        for node, weights in zip(tableau.nodes[1:], tableau.weights[1:], strict=True):
            stage = state - step * weighted_sum(weights, velocities)
            velocities.append(evaluate(stage, torch.lerp(sigma, sigma - length, node)))
        error = step * weighted_sum(tableau.error, velocities)
        # The last evaluation is at the end of the step, `stage`.
        tolerance = atol + rtol * torch.maximum(state.abs(), stage.abs())
        (ratio,) = read(_rms(error / tolerance))
        accepted = ratio <= 1
        num_accepted[indices] += accepted
        num_rejected[indices] += ~accepted
        started_at = sigma
        is_left = ~accepted | (length < sigma)
        is_moved = expand(accepted)
        state = torch.where(is_moved, stage, state)
        first = torch.where(is_moved, velocities[-1], first)
        sigma = torch.where(accepted, sigma - length, sigma)
        # At most 10 times longer; after a rejection at most 5 times shorter.
        factor = (0.9 / ratio.clamp(min=1e-10) ** (1 / tableau.order)).clamp(min=0.2, max=10)
        length = length * torch.where(accepted, factor.clamp(min=1), factor)

        result[rows] = state
        if callback is not None and bool(accepted.any()):
            start = torch.zeros(batch_size, dtype=torch.float64)
            start[indices] = started_at
            if callback(num_steps, start, result.to(sample.dtype, copy=True)) is False:
                break
            num_steps += 1
        if not bool(is_left.all()):
            kept = send(is_left.nonzero()[:, 0], device)
            rows, state, first = rows[kept], state[kept], first[kept]
            indices, sigma, length = indices[is_left], sigma[is_left], length[is_left]
    return result.to(sample.dtype), counts


def integrate_by_batch(
    velocity: VelocityFunction,
    sample: torch.Tensor,
    method: str,
    rtol: float,
    atol: float,
    callback: StepCallback | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Integrates the batch in common steps as SiT and FiT do, by torchdiffeq.

    The last step goes past sigma = 0, with the time clamped there. The result is interpolated.

    Args:
        velocity (`Callable`):
            `velocity(sample, sigma, indices)` returns finite velocities (noise - data) in the dtype of `sample`.
            `sigma` is an fp64 scalar, and `indices` (B,) are all samples. Both are on the CPU.
        sample (`torch.Tensor` of shape `(B, ...)`): The noise at sigma = 1.
        method (`str`): Name of an adaptive method of torchdiffeq.
        rtol (`float`): Relative tolerance.
        atol (`float`): Absolute tolerance. Both hold for the root mean square over the whole batch.
        callback (`Callable`, *optional*):
            `callback(index, sigma, sample)` after each accepted step: its index, the time where it started, on the
            CPU, and the samples it led to. Returning `False` ends the integration.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The samples at sigma = 0, in their dtype but computed in fp32 at least;
        and their evaluations, accepted steps and rejected steps, (3, B), int64 on the CPU.

    Raises:
        `ImportError`: torchdiffeq is missing.
        `ValueError`: velocities are not finite, steps vanish, or there are too many of them.
    """
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        message = "`error_norm` = 'batch' needs the torchdiffeq library: pip install torchdiffeq."
        raise ImportError(message) from error

    indices = torch.arange(sample.shape[0])
    num_evaluations = num_accepted = num_rejected = 0
    step_start: torch.Tensor | None = None  # time of the latest accepted step, whose end is not known yet

    def evaluate(sigma: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        nonlocal num_evaluations
        num_evaluations += 1
        sigma = sigma.cpu().clamp(min=0.0)  # steps past the end see the end's time, as in FiT
        result = velocity(state, sigma, indices)
        _check_finite(_are_finite(result)[None].cpu(), [sigma])
        return result

    def report(end: torch.Tensor) -> None:
        if callback is not None and step_start is not None:
            if callback(num_accepted - 1, step_start, end.to(sample.dtype)) is False:
                raise _Stop(end)

    def attempted(sigma: torch.Tensor, state: torch.Tensor, length: torch.Tensor) -> None:
        _check_attempt(num_accepted + num_rejected + 1, sigma, length, rtol, atol)

    def accepted(sigma: torch.Tensor, state: torch.Tensor, length: torch.Tensor) -> None:
        # torchdiffeq reports a step with the state at its start, which is where the step before it ended.
        nonlocal step_start, num_accepted
        report(state)
        step_start = sigma.cpu()
        num_accepted += 1

    def rejected(sigma: torch.Tensor, state: torch.Tensor, length: torch.Tensor) -> None:
        nonlocal num_rejected
        num_rejected += 1

    evaluate.callback_step = attempted
    evaluate.callback_accept_step = accepted
    evaluate.callback_reject_step = rejected

    start = sample if sample.dtype == torch.float64 else sample.float()
    sigmas = torch.tensor([1.0, 0.0], dtype=torch.float64, device=sample.device)
    try:
        state = odeint(evaluate, start, sigmas, method=method, rtol=rtol, atol=atol)[-1]
        report(state)
    except _Stop as stop:
        state = stop.sample
    counts = torch.tensor([num_evaluations, num_accepted, num_rejected])
    return state.to(sample.dtype), counts[:, None].repeat(1, sample.shape[0])
