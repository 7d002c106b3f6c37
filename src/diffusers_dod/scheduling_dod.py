# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Solvers of the rectified flow's ODE (paper, Eq. 2), from noise (sigma = 1) to data (sigma = 0)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput

from .checks import check_at_least, check_choice, check_number
from .rectified_flow import NUM_TRAIN_TIMESTEPS, euler_step, interpolate


FIXED_STEP_SOLVERS = {"euler": 1, "heun": 2}  # evaluations per interval
SOLVERS = (*FIXED_STEP_SOLVERS, "dopri5")
ERROR_NORMS = ("sample", "batch")

VelocityFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
StepCallback = Callable[[int, torch.Tensor, torch.Tensor], bool | None]


@dataclass
class DoDFlowMatchSchedulerOutput(BaseOutput):
    """
    Output of [`DoDFlowMatchScheduler`].

    Args:
        prev_sample (`torch.Tensor`): The sample at the next, lower sigma; after `solve`, at sigma = 0.
        num_evaluations (`int`, *optional*): Evaluations of the velocity. Only `solve` sets the counts.
        num_accepted (`int`, *optional*): Accepted steps.
        num_rejected (`int`, *optional*): Rejected steps.
    """

    prev_sample: torch.Tensor
    num_evaluations: int | None = None
    num_accepted: int | None = None
    num_rejected: int | None = None


def _check_velocity(name: str, velocity: torch.Tensor, sample: torch.Tensor) -> None:
    if velocity.shape != sample.shape:
        raise ValueError(
            f"`{name}` must have the shape of `sample`, {tuple(sample.shape)}, got {tuple(velocity.shape)}."
        )


class _Stop(Exception):
    """Raised inside torchdiffeq to leave it early; carries the sample that was reached."""

    def __init__(self, sample: torch.Tensor):
        self.sample = sample


class DoDFlowMatchScheduler(SchedulerMixin, ConfigMixin):
    r"""
    Rectified-flow scheduler with fixed-step and adaptive solvers. Time is Diffusers' own: sigma in [0, 1], 0 = data,
    `timestep` = 1000 * sigma, and the model predicts the velocity noise - data.

    The fixed-step solvers serve `set_timesteps` and `step`, with one entry of `timesteps` per evaluation of the model.
    `solve` integrates a whole trajectory with any solver, and is the only way for the adaptive one.

    Args:
        num_train_timesteps (`int`, defaults to 1000): `timestep` / sigma. DoD models are trained with 1000.
        solver (`str`, defaults to `"euler"`):
            `"euler"` (N evaluations for N steps), `"heun"` (2N) or `"dopri5"` (adaptive, torchdiffeq).
        shift (`float`, defaults to 1.0): Time shift of the fixed steps, shift * s / (1 + (shift - 1) * s).
        rtol (`float`, defaults to 1e-3): Relative tolerance of dopri5.
        atol (`float`, defaults to 1e-6): Absolute tolerance of dopri5.
        error_norm (`str`, defaults to `"sample"`):
            `"sample"` holds every sample to the tolerance by itself and lands exactly on sigma = 0. `"batch"` is the
            protocol of SiT and FiT: one root-mean-square over the whole batch, steps past the end with the time
            clamped at sigma = 0, and interpolation back.

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
    ):
        check_at_least("num_train_timesteps", num_train_timesteps, 1)
        check_choice("solver", solver, SOLVERS)
        check_number("shift", shift, 0, open_minimum=True)
        check_number("rtol", rtol, 0, open_minimum=True)
        check_number("atol", atol, 0, open_minimum=True)
        check_choice("error_norm", error_norm, ERROR_NORMS)

        self.num_inference_steps: int | None = None
        # Until `set_timesteps`, the training grid, as in Diffusers' flow-match schedulers.
        self._set_sigmas(torch.linspace(1, 0, num_train_timesteps + 1))

    def _set_sigmas(self, sigmas: torch.Tensor, device: str | torch.device | None = None) -> None:
        """Lays out the evaluations for the boundaries of the intervals, (N + 1,) from 1 to 0."""
        self.sigmas = sigmas  # kept on the CPU
        if self.config.solver == "heun":  # each interval is evaluated at its start and at its end
            evaluated = torch.stack([sigmas[:-1], sigmas[1:]], dim=1).flatten()
        else:
            evaluated = sigmas[:-1]
        self.timesteps = (evaluated * self.config.num_train_timesteps).to(device)
        self._reset()

    def _reset(self) -> None:
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._start_sigma: float | None = None  # where the first interval is entered, if not at its start
        self._first_velocity: torch.Tensor | None = None  # of the Heun step under way, and where it started
        self._first_sample: torch.Tensor | None = None

    @property
    def is_adaptive(self) -> bool:
        """Whether the solver chooses its own steps, so that only `solve` can run it."""
        return self.config.solver not in FIXED_STEP_SOLVERS

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the initial noise: 1."""
        return 1.0

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
            `ValueError`, `TypeError`: it is no index into `timesteps`.
        """
        check_at_least("begin_index", begin_index, 0)
        if begin_index >= len(self.timesteps):
            raise ValueError(f"`begin_index` must be in [0, {len(self.timesteps) - 1}], got {begin_index}.")
        self._begin_index = begin_index

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """Returns `sample` as it is at any `timestep`; for interchangeability with schedulers that scale it."""
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
            `ValueError`: a timestep is outside the range, or the shapes do not fit.
        """
        if noise.shape != sample.shape:
            raise ValueError(
                f"`noise` must have the shape of `sample`, {tuple(sample.shape)}, got {tuple(noise.shape)}."
            )
        timestep = torch.as_tensor(timestep, dtype=torch.float32)
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
    ) -> None:
        """
        Lays out the fixed steps.

        Args:
            num_inference_steps (`int`, *optional*): Number N of intervals between sigma = 1 and sigma = 0.
            device (`str` or `torch.device`, *optional*): Where `timesteps` goes.
            sigmas (`Sequence[float]`, *optional*):
                The N strictly decreasing starts of the intervals in (0, 1], before the shift; the end 0 is appended.
                1, 1 - 1/N, ..., 1/N by default.

        Raises:
            `ValueError`, `TypeError`: an argument is out of range, or the solver chooses its own steps.
        """
        self._refuse_adaptive("set_timesteps")
        if sigmas is not None:
            try:
                sigmas = torch.as_tensor(sigmas, dtype=torch.float32).cpu()
            except (TypeError, ValueError) as error:
                raise ValueError(f"`sigmas` must be strictly decreasing numbers in (0, 1], got {sigmas!r}.") from error
            valid = sigmas.ndim == 1 and len(sigmas) > 0 and bool((sigmas > 0).all()) and bool((sigmas <= 1).all())
            if not valid or not bool((sigmas.diff() < 0).all()):
                raise ValueError(f"`sigmas` must be strictly decreasing numbers in (0, 1], got {sigmas.tolist()}.")
            if num_inference_steps is not None and num_inference_steps != len(sigmas):
                raise ValueError(
                    f"`num_inference_steps` must be None or the number of `sigmas`, {len(sigmas)}, "
                    f"got {num_inference_steps}."
                )
            num_inference_steps = len(sigmas)
        else:
            check_at_least("num_inference_steps", num_inference_steps, 1)
            sigmas = torch.linspace(1, 0, num_inference_steps + 1)[:-1]
        sigmas = self.config.shift * sigmas / (1 + (self.config.shift - 1) * sigmas)

        self.num_inference_steps = num_inference_steps
        self._set_sigmas(torch.cat([sigmas, torch.zeros(1)]), device)

    def _refuse_adaptive(self, method: str) -> None:
        if self.is_adaptive:
            raise ValueError(
                f"`{method}` serves the solvers {', '.join(map(repr, FIXED_STEP_SOLVERS))}; "
                f"`solver` is {self.config.solver!r}, which chooses its own steps: use `solve`."
            )

    def _init_step_index(self, timestep: float | torch.Tensor) -> None:
        if self._begin_index is not None:
            self._step_index = self._begin_index
            return
        # Heun lists a timestep twice, as the end of an interval and as the start of the next: a start is meant.
        evaluations = FIXED_STEP_SOLVERS[self.config.solver]
        starts = self.timesteps[::evaluations].tolist()
        timestep = float(timestep)
        if not 0 <= timestep <= starts[0]:
            raise ValueError(f"`timestep` must be in [0, {starts[0]}], got {timestep}.")
        interval = sum(start >= timestep for start in starts) - 1  # the last that starts at or before it
        if starts[interval] != timestep:
            self._start_sigma = timestep / self.config.num_train_timesteps
        self._step_index = interval * evaluations

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> DoDFlowMatchSchedulerOutput | tuple[torch.Tensor]:
        """
        Advances the sample by one evaluation of the model. Between the two evaluations of a Heun interval the sample
        is the Euler prediction of its end.

        Args:
            model_output (`torch.Tensor`): Velocity (noise - data) at `timestep`.
            timestep (`float` or `torch.Tensor`):
                The current entry of `timesteps`. Without a begin index the first call begins there, and so does one
                after the last step: another time within the range leads to the end of the interval it lies in.
            sample (`torch.Tensor`): The current sample.
            generator (`torch.Generator`, *optional*): Not used, all solvers here are deterministic.
            return_dict (`bool`, defaults to `True`): Whether to return a [`DoDFlowMatchSchedulerOutput`].

        Returns:
            [`DoDFlowMatchSchedulerOutput`], or a tuple with the sample; in the dtype of `sample`.

        Raises:
            `ValueError`: a time or a shape does not fit, all steps from the begin index on are done, or the solver
                chooses its own steps.
        """
        self._refuse_adaptive("step")
        _check_velocity("model_output", model_output, sample)
        is_done = self._step_index is not None and self._step_index >= len(self.timesteps)
        if is_done and self._begin_index is not None:
            raise ValueError(
                f"All {len(self.timesteps)} steps are done, got `timestep` {timestep}: call `set_timesteps` again."
            )
        if is_done or self._step_index is None:
            self._init_step_index(timestep)
        num_evaluations = FIXED_STEP_SOLVERS[self.config.solver]
        interval, evaluation = divmod(self._step_index, num_evaluations)
        sigma, next_sigma = self.sigmas[interval], self.sigmas[interval + 1]
        if self._start_sigma is not None:
            sigma = torch.tensor(self._start_sigma)
        velocity, start = model_output.float(), sample.float()

        if evaluation == 1:  # Heun: the interval again, with the mean of the velocities at both ends
            if self._first_velocity is None:
                raise ValueError(f"`timestep` must start an interval of the Heun solver first, got {timestep}.")
            velocity, start = (self._first_velocity + velocity) / 2, self._first_sample
            self._first_velocity = self._first_sample = None
        elif self.config.solver == "heun":
            self._first_velocity, self._first_sample = velocity, start
        prev_sample = euler_step(start, velocity, sigma, next_sigma).to(sample.dtype)
        self._step_index += 1
        if evaluation == num_evaluations - 1:
            self._start_sigma = None

        if not return_dict:
            return (prev_sample,)
        return DoDFlowMatchSchedulerOutput(prev_sample=prev_sample)

    @torch.no_grad()
    def solve(
        self,
        velocity_fn: VelocityFunction,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        callback: StepCallback | None = None,
    ) -> DoDFlowMatchSchedulerOutput:
        """
        Integrates from noise to data.

        Args:
            velocity_fn (`Callable`): `velocity_fn(sample, timestep)` returns the velocity (noise - data); `timestep`
                is a scalar fp32 tensor in [0, 1000].
            sample (`torch.Tensor`): The noise, at sigma = 1.
            generator (`torch.Generator`, *optional*): Not used, all solvers here are deterministic.
            callback (`Callable`, *optional*):
                `callback(index, timestep, sample)` after each evaluation of the fixed steps, or after each accepted
                step of dopri5: the step's index, its starting time and the sample it led to. Returning `False` stops
                the integration with that sample.

        Returns:
            [`DoDFlowMatchSchedulerOutput`] with the counts of evaluations, accepted and rejected steps.

        Raises:
            `ValueError`: the fixed steps were not laid out with `set_timesteps`.
        """
        if self.is_adaptive:
            return self._solve_dopri5(velocity_fn, sample, callback)
        if self.num_inference_steps is None:
            raise ValueError("`num_inference_steps` is None: call `set_timesteps` before `solve`.")
        self._reset()
        self.set_begin_index(0)
        num_evaluations = 0
        for timestep in self.timesteps:
            velocity = velocity_fn(sample, timestep)
            _check_velocity("velocity_fn", velocity, sample)
            sample = self.step(velocity, timestep, sample).prev_sample
            num_evaluations += 1
            if callback is not None and callback(num_evaluations - 1, timestep, sample) is False:
                break
        return DoDFlowMatchSchedulerOutput(
            prev_sample=sample,
            num_evaluations=num_evaluations,
            num_accepted=num_evaluations // FIXED_STEP_SOLVERS[self.config.solver],
            num_rejected=0,
        )

    def _solve_dopri5(
        self, velocity_fn: VelocityFunction, sample: torch.Tensor, callback: StepCallback | None
    ) -> DoDFlowMatchSchedulerOutput:
        try:
            from torchdiffeq import odeint
        except ImportError as error:
            raise ImportError("`solver` = 'dopri5' needs the torchdiffeq library: pip install torchdiffeq.") from error

        maximum = self.config.num_train_timesteps
        counts = dict(num_evaluations=0, num_accepted=0, num_rejected=0)
        step_start: float | None = None  # starting time of the latest accepted step, whose end is not known yet

        def velocity(sigma: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
            counts["num_evaluations"] += 1
            # Steps past the end, which only the "batch" protocol takes, see the end's time, as in FiT.
            timestep = (sigma.clamp(min=0.0) * maximum).to(torch.float32)
            result = velocity_fn(state, timestep)
            _check_velocity("velocity_fn", result, state)
            if not torch.isfinite(result).all():
                raise ValueError(
                    f"`velocity_fn` must return finite numbers, got others at timestep {float(timestep)}."
                )
            return result.to(state.dtype)

        def report(end: torch.Tensor) -> None:
            if callback is not None and step_start is not None:
                timestep = torch.tensor(step_start * maximum, dtype=torch.float32, device=end.device)
                if callback(counts["num_accepted"] - 1, timestep, end.to(sample.dtype)) is False:
                    raise _Stop(end)

        def accepted(sigma: torch.Tensor, state: torch.Tensor, step_size: torch.Tensor) -> None:
            # torchdiffeq reports a step with the state at its start, which is where the step before it ended.
            nonlocal step_start
            report(state)
            step_start = float(sigma)
            counts["num_accepted"] += 1

        def rejected(sigma: torch.Tensor, state: torch.Tensor, step_size: torch.Tensor) -> None:
            counts["num_rejected"] += 1

        velocity.callback_accept_step = accepted
        velocity.callback_reject_step = rejected

        start = sample if sample.dtype == torch.float64 else sample.float()
        end = torch.zeros((), dtype=torch.float64, device=sample.device)
        options = {}
        if self.config.error_norm == "sample":
            # The largest of the samples' own norms: whatever a sample's neighbours are, it meets the tolerance.
            batch_size = sample.shape[0]
            options = {
                "step_t": end[None],
                "norm": lambda error: error.reshape(batch_size, -1).square().mean(dim=1).sqrt().max(),
            }
        try:
            sigmas = torch.stack([torch.ones_like(end), end])
            state = odeint(
                velocity,
                start,
                sigmas,
                method="dopri5",
                rtol=self.config.rtol,
                atol=self.config.atol,
                options=options,
            )[-1]
            report(state)
        except _Stop as stop:
            state = stop.sample
        return DoDFlowMatchSchedulerOutput(prev_sample=state.to(sample.dtype), **counts)

    def __len__(self) -> int:
        return self.config.num_train_timesteps
