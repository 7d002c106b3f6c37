# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Solvers of the rectified flow's ODE (paper, Eq. 2) and of its SDEs, from noise (sigma = 1) to data (sigma = 0)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np
import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from .adaptive import StepCallback, VelocityFunction, integrate_by_batch, integrate_by_sample
from .checks import (
    MAX_SHIFT,
    MAX_STEPS,
    check_at_least,
    check_choice,
    check_device,
    check_number,
    check_tensor,
    check_type,
    to_plain,
)
from .devices import send
from .records import StrictConfigMixin
from .rectified_flow import NUM_TRAIN_TIMESTEPS, euler_step, interpolate, shift_sigma
from .sde import DIFFUSION_FORMS, LAST_STEPS, Diffusion
from .tableaus import EULER, SOLVERS, ButcherTableau, Solver, weighted_sum


ERROR_NORMS = ("sample", "batch")


@dataclass
class DoDFlowMatchSchedulerOutput(BaseOutput):
    """
    Output of [`DoDFlowMatchScheduler`].

    Args:
        prev_sample (`torch.Tensor`): The sample at the next, lower sigma; after `solve`, at sigma = 0.
        num_evaluations (`torch.Tensor` of shape `(B,)`, *optional*):
            Evaluations of each sample's velocity, int64 on the CPU. Only `solve` sets the counts.
        num_accepted (`torch.Tensor` of shape `(B,)`, *optional*): Accepted steps.
        num_rejected (`torch.Tensor` of shape `(B,)`, *optional*): Rejected steps, of adaptive solvers.
    """

    prev_sample: torch.Tensor
    num_evaluations: torch.Tensor | None = None
    num_accepted: torch.Tensor | None = None
    num_rejected: torch.Tensor | None = None


def _check_like(name: str, velocity: torch.Tensor, sample: torch.Tensor) -> None:
    check_tensor(name, velocity)
    if velocity.shape != sample.shape:
        raise ValueError(
            f"`{name}` must have the shape of `sample`, {tuple(sample.shape)}, got {tuple(velocity.shape)}."
        )


def _check_sample(sample: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None = None) -> None:
    """Raises unless there is a batch of samples, and one generator or one for each of them, if any."""
    check_tensor("sample", sample)
    if sample.ndim == 0:
        raise ValueError("`sample` must have a batch dimension, got a scalar.")
    check_type("generator", generator, (torch.Generator, list, type(None)))
    if isinstance(generator, list):
        for entry in generator:
            check_type("generator", entry, torch.Generator)
        if len(generator) != len(sample):
            raise ValueError(
                f"`generator` must be one generator or a list of {len(sample)}, got a list of {len(generator)}."
            )


def _check_timestep(timestep: float | torch.Tensor) -> None:
    """Raises unless a time is one number; its value may be on an accelerator, which is not waited for."""
    check_type("timestep", timestep, (Real, torch.Tensor))
    if isinstance(timestep, torch.Tensor) and (timestep.numel() != 1 or timestep.is_complex()):
        raise ValueError(f"`timestep` must be one real number, got {timestep.dtype} of shape {tuple(timestep.shape)}.")


def check_starts(
    name: str, values: Sequence[float], maximum: float, num_inference_steps: int | None = None
) -> torch.Tensor:
    """
    Raises unless an argument is a grid of times.

    Args:
        name (`str`): Name of the argument, for the message.
        values (`Sequence[float]`): The values received.
        maximum (`float`): The greatest time.
        num_inference_steps (`int`, *optional*): The number of times, if it was given.

    Returns:
        `torch.Tensor` of shape `(N,)`: The times in fp32.

    Raises:
        `ValueError`: the values are not strictly decreasing and above 0, or have another number.
    """
    expected = f"`{name}` must be strictly decreasing numbers in (0, {maximum}]"
    try:
        starts = torch.as_tensor(values, dtype=torch.float32).cpu()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{expected}, got {values!r}.") from error
    valid = starts.ndim == 1 and len(starts) > 0 and bool((starts > 0).all()) and bool((starts <= maximum).all())
    if not valid or not bool((starts.diff() < 0).all()):
        raise ValueError(f"{expected}, got {starts.tolist()}.")
    if num_inference_steps is not None and num_inference_steps != len(starts):
        raise ValueError(
            f"`num_inference_steps` must be None or the number of `{name}`, {len(starts)}, got {num_inference_steps}."
        )
    return starts


class DoDFlowMatchScheduler(StrictConfigMixin, SchedulerMixin, ConfigMixin):
    r"""
    Rectified-flow scheduler with fixed-step and adaptive solvers of the ODE and of the SDEs that share its marginals.

    Time is Diffusers' own: sigma in [0, 1], 0 = data, `timestep` = 1000 * sigma. The model predicts the velocity
    noise - data.

    The fixed-step solvers serve `set_timesteps` and `step`, with one entry of `timesteps` per evaluation of the model.
    `solve` integrates a whole trajectory with any solver, and is the only way for the adaptive one.

    The SDE is dx = (v - w score) dsigma + sqrt(2 w) dW in reversed time (SiT, Ma et al. 2024), with the diffusion w
    of `diffusion_form`. Its last interval is a deterministic step, see `last_step`.

    Args:
        num_train_timesteps (`int`, defaults to 1000): Ratio of `timestep` to sigma. DoD models are trained with 1000.
        solver (`str`, defaults to `"euler"`):
            Name of the solver. For the ODE: `"euler"` (N evaluations for N steps), `"midpoint"` (2N), `"heun"` (2N),
            `"rk4"` (4N) or `"dopri5"` (adaptive). For the SDE: `"euler_maruyama"` (N) or `"stochastic_heun"` (2N - 1).
        shift (`float`, defaults to 1.0): Time shift of the fixed steps, shift * s / (1 + (shift - 1) * s).
        rtol (`float`, defaults to 1e-3): Relative tolerance of dopri5.
        atol (`float`, defaults to 1e-6): Absolute tolerance of dopri5.
        error_norm (`str`, defaults to `"sample"`):
            `"sample"` gives every sample steps of its own, which land exactly on sigma = 0: no sample depends on its
            neighbours, and those that are done are not evaluated again. `"batch"` is the protocol of SiT and FiT, by
            torchdiffeq: one root-mean-square over the whole batch, steps past the end with the time clamped at
            sigma = 0, and interpolation back.
        diffusion_form (`str`, defaults to `"sigma"`):
            The SDE's diffusion w for c = `diffusion_norm`: `"constant"` c, `"sigma"` and `"linear"` c sigma,
            `"decreasing"` (1 - c cos(pi sigma))^2 / 4, `"increasing-decreasing"` c sin(pi sigma)^2, `"SBDM"`
            c sigma / (1 - sigma). The last is infinite at sigma = 1: an interval that begins above 0.999 is a step
            of the ODE, which has the same marginals.
        diffusion_norm (`float`, defaults to 1.0): The factor c.
        last_step (`str`, defaults to `"mean"`):
            Last step of the SDE: `"mean"` follows the SDE without its noise, `"euler"` follows the ODE, and
            `"tweedie"` goes to the expected data, which for a velocity is the same. `"none"` has no such step: the SDE
            runs to sigma = 0, and the noise of the last interval stays in the sample.
        last_step_size (`float`, defaults to 0.04): Sigma at which the last step begins.

    Raises:
        `ValueError`, `TypeError`: an argument is out of range or of the wrong type.
    """

    _compatibles = []
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = NUM_TRAIN_TIMESTEPS,
        solver: str = "euler",
        shift: float = 1.0,
        rtol: float = 1e-3,
        atol: float = 1e-6,
        error_norm: str = "sample",
        diffusion_form: str = "sigma",
        diffusion_norm: float = 1.0,
        last_step: str = "mean",
        last_step_size: float = 0.04,
    ):
        check_at_least("num_train_timesteps", num_train_timesteps, 1, MAX_STEPS)
        check_choice("solver", solver, tuple(SOLVERS))
        check_number("shift", shift, 0, MAX_SHIFT, open_minimum=True)
        check_number("rtol", rtol, 0, 1, open_minimum=True)
        check_number("atol", atol, 0, 1, open_minimum=True)
        check_choice("error_norm", error_norm, ERROR_NORMS)
        check_choice("diffusion_form", diffusion_form, DIFFUSION_FORMS)
        check_number("diffusion_norm", diffusion_norm, 0, 1000)
        check_choice("last_step", last_step, tuple(LAST_STEPS))
        check_number("last_step_size", last_step_size, 0, 1, open_minimum=True, open_maximum=True)

        self.num_inference_steps: int | None = None
        # Until `set_timesteps`, the training grid, as in Diffusers' flow-match schedulers.
        self._set_sigmas(torch.linspace(1, 0, num_train_timesteps + 1))

    def register_to_config(self, **kwargs) -> None:
        """Adds entries `kwargs` to the config as `ConfigMixin.register_to_config` does."""
        super().register_to_config(**to_plain(kwargs))

    def _set_sigmas(
        self,
        sigmas: torch.Tensor,
        timesteps: torch.Tensor | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        """
        Lays out the evaluations for the boundaries of the intervals, (N + 1,) strictly decreasing to 0, and for their
        times, if these are given.
        """
        self.sigmas = sigmas  # kept on the CPU
        timesteps = sigmas * self.config.num_train_timesteps if timesteps is None else timesteps
        starts, ends = timesteps[:-1, None], timesteps[1:, None]
        first, last = (torch.tensor(self._tableau(interval).nodes) for interval in (0, len(starts) - 1))
        evaluated = torch.lerp(starts[:-1], ends[:-1], first), torch.lerp(starts[-1:], ends[-1:], last)
        self.timesteps = torch.cat([times.flatten() for times in evaluated]).to(device)
        self._reset()

    def _reset(self) -> None:
        self._step_index: int | None = None
        self._begin_index: int | None = None
        # The first interval, and its sigma if entered after its start.
        self._late_start: tuple[int, float] | None = None
        self._interval_start: torch.Tensor | None = None  # the sample there, while the interval is under way,
        self._velocities: list[torch.Tensor] = []  # and its evaluations

    @property
    def _solver(self) -> Solver:
        return SOLVERS[self.config.solver]

    @property
    def _has_last_step(self) -> bool:
        """Whether the last interval is a step that ends the SDE."""
        return self.is_stochastic and not LAST_STEPS[self.config.last_step].has_noise

    def _tableau(self, interval: int) -> ButcherTableau:
        """The method of an interval."""
        # At sigma = 0, where `last_step` = "none" ends, the score is infinite.
        takes_one_evaluation = self.is_adaptive or (self.is_stochastic and self._is_last(interval))
        return EULER if takes_one_evaluation else self._solver.tableau

    def _is_last(self, interval: int) -> bool:
        return interval == len(self.sigmas) - 2

    @property
    def is_adaptive(self) -> bool:
        """Whether the solver chooses its own steps, so that only `solve` can run it."""
        return self._solver.is_adaptive

    @property
    def is_stochastic(self) -> bool:
        """Whether the solver is one of the SDE, so that each step draws noise."""
        return self._solver.is_stochastic

    @property
    def init_noise_sigma(self) -> float:
        """
        Standard deviation of the initial noise: 1, except for the stochastic Heun solver.

        That solver adds noise before each interval. The initial noise includes the noise of the first interval.
        """
        return math.sqrt(1 + self._noise_scale(0) ** 2) if self._solver.noise_before else 1.0

    @property
    def _diffusion(self) -> Diffusion:
        return Diffusion(self.config.diffusion_form, self.config.diffusion_norm)

    def _noise_scale(self, interval: int) -> float:
        """Standard deviation of the noise of an interval, 0 where it has none."""
        is_past_end = interval >= len(self.sigmas) - 1
        if not self.is_stochastic or is_past_end or (self._has_last_step and self._is_last(interval)):
            return 0.0
        return self._diffusion.noise_scale(*self._interval_ends(interval))

    def _interval_ends(self, interval: int) -> tuple[float, float]:
        sigma, next_sigma = self.sigmas[interval].item(), self.sigmas[interval + 1].item()
        starts_late = self._late_start is not None and interval == self._late_start[0]
        return (self._late_start[1] if starts_late else sigma), next_sigma

    def _drift(self, sample: torch.Tensor, velocity: torch.Tensor, sigma: float, interval: int) -> torch.Tensor:
        """Direction dx / dsigma of an evaluation, at `sigma` in an interval."""
        has_drift = self.is_stochastic and (not self._is_last(interval) or LAST_STEPS[self.config.last_step].has_drift)
        diffusion = self._diffusion
        # At sigma = 0 a step has no length.
        if not has_drift or sigma == 0 or not diffusion.is_bounded(self._interval_ends(interval)[0]):
            return velocity
        return diffusion.drift(sample, velocity, sigma)

    @property
    def step_index(self) -> int | None:
        """Index into `timesteps` of the next `step`, `None` before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first timestep that will be used, if it was set."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """
        Sets the index of the first timestep to be used.

        Args:
            begin_index (`int`, defaults to 0): Index into `timesteps`.

        Raises:
            `ValueError`, `TypeError`: `begin_index` is no index into `timesteps`.
        """
        check_at_least("begin_index", begin_index, 0)
        if begin_index >= len(self.timesteps):
            raise ValueError(f"`begin_index` must be in [0, {len(self.timesteps) - 1}], got {begin_index}.")
        self._begin_index = begin_index

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """Returns `sample` unchanged at any `timestep`; other schedulers of Diffusers scale it."""
        return sample

    def scale_noise(self, sample: torch.Tensor, timestep: float | torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """
        The forward process (paper, Eq. 1).

        Args:
            sample (`torch.Tensor` of shape `(B, ...)`): Data.
            timestep (`float` or `torch.Tensor` of shape `()` or `(B,)`): Any time in [0, 1000], 0 = data.
            noise (`torch.Tensor` of shape `(B, ...)`): Standard normal noise.

        Returns:
            `torch.Tensor` of shape `(B, ...)`.

        Raises:
            `ValueError`, `TypeError`: a timestep is outside the range, or a type or shape does not fit.
        """
        _check_sample(sample)
        _check_like("noise", noise, sample)
        check_type("timestep", timestep, (Real, torch.Tensor, np.ndarray, list, tuple))
        try:
            timestep = torch.as_tensor(timestep, dtype=torch.float32)
        except (TypeError, ValueError) as error:
            raise TypeError(f"`timestep` must be one number or one for each sample, got {timestep!r}.") from error
        if timestep.ndim > 1 or (timestep.ndim == 1 and timestep.shape[0] not in (1, sample.shape[0])):
            raise ValueError(
                f"`timestep` must be a scalar or of shape ({sample.shape[0]},), got {tuple(timestep.shape)}."
            )
        maximum = self.config.num_train_timesteps
        if not bool(((timestep >= 0) & (timestep <= maximum)).all()):
            raise ValueError(f"`timestep` must be in [0, {maximum}], got {timestep.tolist()}.")
        return interpolate(sample, noise, timestep / maximum)

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: float | torch.Tensor
    ) -> torch.Tensor:
        """
        [`scale_noise`] under the name and in the order of arguments of Diffusers' diffusion schedulers.

        Args:
            original_samples (`torch.Tensor` of shape `(B, ...)`): Data.
            noise (`torch.Tensor` of shape `(B, ...)`): Standard normal noise.
            timesteps (`float` or `torch.Tensor` of shape `()` or `(B,)`): Any times in [0, 1000], 0 = data.

        Returns:
            `torch.Tensor` of shape `(B, ...)`.
        """
        return self.scale_noise(original_samples, timesteps, noise)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """
        Lays out the fixed steps.

        Args:
            num_inference_steps (`int`, *optional*):
                Number N of intervals between sigma = 1 and sigma = 0. The last step of an SDE is one of them.
            device (`str` or `torch.device`, *optional*): Device of `timesteps`.
            sigmas (`Sequence[float]`, *optional*):
                The N strictly decreasing starts of the intervals in (0, 1], before the shift; the end 0 is appended.
                1, 1 - 1/N, ..., 1/N by default; for an SDE from 1 to `last_step_size` in equal steps.
            timesteps (`Sequence[float]`, *optional*):
                The same as times in (0, 1000], as the model sees them: the shift does not apply.

        Raises:
            `ValueError`, `TypeError`: an argument is out of range, or the solver chooses its own steps.
        """
        self._refuse_adaptive("set_timesteps")
        check_device("device", device)
        if sigmas is not None and timesteps is not None:
            raise ValueError(f"Only one of `sigmas` and `timesteps` must be given, got {sigmas!r} and {timesteps!r}.")
        shift = self.config.shift
        has_last_step = self._has_last_step
        if sigmas is not None:
            starts = check_starts("sigmas", sigmas, 1, num_inference_steps)
        elif timesteps is not None:
            maximum = self.config.num_train_timesteps
            timesteps = check_starts("timesteps", timesteps, maximum, num_inference_steps)
            starts, shift = timesteps / maximum, 1.0
            timesteps = torch.cat([timesteps, torch.zeros(1)])
        else:
            check_at_least("num_inference_steps", num_inference_steps, 2 if has_last_step else 1, MAX_STEPS)
            starts = torch.linspace(1, 0, num_inference_steps + 1)[:-1]
            if has_last_step:
                last = self.config.last_step_size
                starts = torch.linspace(1, last / (shift - (shift - 1) * last), num_inference_steps)
        starts = shift_sigma(starts, shift)
        if len(starts) < 2 and has_last_step:
            raise ValueError(
                f"`{'timesteps' if sigmas is None else 'sigmas'}` must hold at least 2 for the solver "
                f"{self.config.solver!r}, whose last step is none of the SDE, got {len(starts)}."
            )
        self.num_inference_steps = len(starts)
        self._set_sigmas(torch.cat([starts, torch.zeros(1)]), timesteps, device)

    def _refuse_adaptive(self, method: str) -> None:
        if self.is_adaptive:
            fixed_step_solvers = ", ".join(repr(name) for name, solver in SOLVERS.items() if not solver.is_adaptive)
            raise ValueError(
                f"`{method}` serves the solvers {fixed_step_solvers}; "
                f"`solver` is {self.config.solver!r}, which chooses its own steps: use `solve`."
            )

    def _init_step_index(self, timestep: float | torch.Tensor) -> None:
        if self._begin_index is not None:
            self._step_index = self._begin_index
            return
        # Heun lists a timestep twice, as the end of an interval and as the start of the next: a start is meant.
        evaluations = self._evaluations_per_interval
        starts = self.timesteps[::evaluations].tolist()
        timestep = float(timestep)
        rounding = 1e-6 * self.config.num_train_timesteps  # 502 is not 1000 times the fp32 of 0.502
        if not 0 <= timestep <= starts[0] + rounding:
            raise ValueError(f"`timestep` must be in [0, {starts[0]}], got {timestep}.")
        interval = sum(start >= timestep - rounding for start in starts) - 1  # the last that starts at or before it
        if abs(starts[interval] - timestep) > rounding:
            self._late_start = interval, timestep / self.config.num_train_timesteps
        self._step_index = interval * evaluations

    @property
    def _evaluations_per_interval(self) -> int:
        """Evaluations of each interval. The last one of an SDE has a single evaluation."""
        return len(self._solver.tableau.nodes)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> DoDFlowMatchSchedulerOutput | tuple[torch.Tensor]:
        """
        Advances the sample by one evaluation of the model.

        Between the evaluations of an interval the sample is a prediction: the next evaluation takes place there.

        Args:
            model_output (`torch.Tensor`): Velocity (noise - data) at `timestep`.
            timestep (`float` or `torch.Tensor`):
                The current entry of `timesteps`. Without a begin index the first call begins there, and so does a call
                after the last step. Another time within the range leads to the end of its interval.
            sample (`torch.Tensor`): The current sample.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of an SDE's noise, one for all samples or one for each.
            variance_noise (`torch.Tensor`, *optional*):
                An SDE's standard normal noise, in place of a draw; the solvers of the ODE use none.
            return_dict (`bool`, defaults to `True`): Whether to return a [`DoDFlowMatchSchedulerOutput`].

        Returns:
            [`DoDFlowMatchSchedulerOutput`], or a tuple with the sample; in the dtype of `sample`, computed in fp32.

        Raises:
            `ValueError`: a time or a shape does not fit, all steps from the begin index on are done, or the solver
                chooses its own steps.
        """
        self._refuse_adaptive("step")
        _check_sample(sample, generator)
        _check_like("model_output", model_output, sample)
        _check_timestep(timestep)
        if variance_noise is not None:
            _check_like("variance_noise", variance_noise, sample)
        is_done = self._step_index is not None and self._step_index >= len(self.timesteps)
        if is_done and self._begin_index is not None:
            raise ValueError(
                f"All {len(self.timesteps)} steps are done, got `timestep` {timestep}: call `set_timesteps` again."
            )
        if is_done or self._step_index is None:
            self._init_step_index(timestep)
        interval, evaluation = divmod(self._step_index, self._evaluations_per_interval)
        tableau = self._tableau(interval)
        if evaluation == 0:
            self._interval_start, self._velocities = sample.float(), []
        elif len(self._velocities) != evaluation:
            raise ValueError(
                f"`timestep` must start an interval of the solver {self.config.solver!r} first, got {timestep}."
            )
        sigma, next_sigma = self._interval_ends(interval)
        evaluated_at = sigma + tableau.nodes[evaluation] * (next_sigma - sigma)
        self._velocities.append(self._drift(sample.float(), model_output.float(), evaluated_at, interval))

        is_end = evaluation == len(tableau.nodes) - 1
        weights = tableau.solution if is_end else tableau.weights[evaluation + 1]
        prev_sample = euler_step(self._interval_start, weighted_sum(weights, self._velocities), sigma, next_sigma)
        if is_end:
            noise_scale = self._noise_scale(interval + 1 if self._solver.noise_before else interval)
            if noise_scale > 0:
                if variance_noise is None:
                    variance_noise = randn_tensor(
                        sample.shape, generator=generator, device=sample.device, dtype=torch.float32
                    )
                prev_sample = prev_sample + noise_scale * variance_noise.to(prev_sample)
            self._late_start, self._interval_start, self._velocities = None, None, []
        self._step_index += 1

        prev_sample = prev_sample.to(sample.dtype)
        if not return_dict:
            return (prev_sample,)
        return DoDFlowMatchSchedulerOutput(prev_sample=prev_sample)

    @torch.no_grad()
    def solve(
        self,
        velocity_fn: VelocityFunction,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        callback: StepCallback | None = None,
        times_on_cpu: bool = False,
    ) -> DoDFlowMatchSchedulerOutput:
        """
        Integrates from noise to data.

        Args:
            velocity_fn (`Callable`):
                `velocity_fn(sample, timestep, indices)` returns the velocity (noise - data) of a batch, in which
                `indices` (b,) of the samples are left. `timestep` in [0, 1000] is fp32, a scalar, or of shape (b,)
                where every sample has steps of its own.
            sample (`torch.Tensor` of shape `(B, ...)`): The noise at sigma = 1, times `init_noise_sigma`.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of an SDE's noise, one for all samples or one for each.
            callback (`Callable`, *optional*):
                `callback(index, timestep, sample)` after each evaluation of the fixed steps, or after each step of
                dopri5 that some sample accepted: its index, where it started, and the samples it led to. With
                `error_norm="sample"` the time is of shape (B,), 0 for the samples that are done. Returning `False`
                stops the integration with these samples.
            times_on_cpu (`bool`, defaults to `False`):
                Whether both functions get times and indices on the CPU, where they can be read without waiting for
                the device of `sample`. By default they are on that device.

        Returns:
            [`DoDFlowMatchSchedulerOutput`] with the counts of evaluations, accepted and rejected steps.

        Raises:
            `ValueError`: the fixed steps were not laid out with `set_timesteps`, or dopri5 meets numbers that are not
                finite or a tolerance that it cannot reach.
            `TypeError`: an argument, or what a function returns, has another type.
        """
        _check_sample(sample, generator)
        for name, function in (("velocity_fn", velocity_fn), ("callback", callback)):
            if not callable(function) and not (name == "callback" and function is None):
                raise TypeError(f"`{name}` must be callable, got {function!r} of type {type(function).__name__}.")
        device = torch.device("cpu") if times_on_cpu else sample.device
        if self.is_adaptive:
            return self._solve_adaptively(velocity_fn, sample, callback, device)
        if self.num_inference_steps is None:
            raise ValueError("`num_inference_steps` is None: call `set_timesteps` before `solve`.")
        self._reset()
        self.set_begin_index(0)
        indices = torch.arange(sample.shape[0], device=device)
        num_evaluations = 0
        for timestep in self.timesteps.cpu() if times_on_cpu else self.timesteps:
            velocity = velocity_fn(sample, timestep, indices)
            _check_like("velocity_fn", velocity, sample)
            sample = self.step(velocity, timestep, sample, generator=generator).prev_sample
            num_evaluations += 1
            if callback is not None and callback(num_evaluations - 1, timestep, sample) is False:
                break
        is_whole = num_evaluations == len(self.timesteps)
        num_accepted = len(self.sigmas) - 1 if is_whole else num_evaluations // self._evaluations_per_interval
        counts = torch.tensor([num_evaluations, num_accepted, 0])[:, None].repeat(1, sample.shape[0])
        return DoDFlowMatchSchedulerOutput(sample, *counts)

    def _solve_adaptively(
        self, velocity_fn: VelocityFunction, sample: torch.Tensor, callback: StepCallback | None, device: torch.device
    ) -> DoDFlowMatchSchedulerOutput:
        """Runs a solver that chooses its own steps, on the CPU; times and indices go to the caller on a device."""
        if not bool(torch.isfinite(sample).all()):
            raise ValueError(f"`sample` must be finite for {self.config.solver}, got others.")

        def timestep_of(sigma: torch.Tensor) -> torch.Tensor:
            return send((sigma * self.config.num_train_timesteps).to(torch.float32), device)

        def velocity(state: torch.Tensor, sigma: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
            velocity = velocity_fn(state, timestep_of(sigma), send(indices, device))
            _check_like("velocity_fn", velocity, state)
            return velocity.to(state.dtype)

        def report(index: int, sigma: torch.Tensor, sample: torch.Tensor) -> bool | None:
            return callback(index, timestep_of(sigma), sample)

        by_sample = self.config.error_norm == "sample"
        integrate = integrate_by_sample if by_sample else integrate_by_batch
        method = self._solver.tableau if by_sample else self.config.solver
        sample, counts = integrate(
            velocity,
            sample,
            method,
            rtol=self.config.rtol,
            atol=self.config.atol,
            callback=None if callback is None else report,
        )
        return DoDFlowMatchSchedulerOutput(sample, *counts)

    def __len__(self) -> int:
        return self.config.num_train_timesteps
