# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Solvers of the rectified flow's ODE (paper, Eq. 2) and of its SDEs, from noise (sigma = 1) to data (sigma = 0)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from .checks import check_at_least, check_choice, check_number
from .rectified_flow import NUM_TRAIN_TIMESTEPS, euler_step, interpolate, noise_from_velocity


@dataclass(frozen=True)
class ButcherTableau:
    """
    An explicit Runge-Kutta method.

    Args:
        nodes (`tuple[float, ...]`): Where each evaluation is, from 0, the start of the interval, to 1, its end.
        weights (`tuple[tuple[float, ...], ...]`):
            For each evaluation the weights of the ones before it, which lead to its sample.
        solution (`tuple[float, ...]`): Weights of the evaluations in the step.
        error (`tuple[float, ...]`, *optional*): Weights of the estimated error: `solution` less an embedded method.
    """

    nodes: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]
    solution: tuple[float, ...]
    error: tuple[float, ...] | None = None


EULER = ButcherTableau((0.0,), ((),), (1.0,))
MIDPOINT = ButcherTableau((0.0, 1 / 2), ((), (1 / 2,)), (0.0, 1.0))
HEUN = ButcherTableau((0.0, 1.0), ((), (1.0,)), (1 / 2, 1 / 2))
RK4 = ButcherTableau(
    (0.0, 1 / 2, 1 / 2, 1.0), ((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)
)
# Dormand and Prince (1980), of order 5, with the error estimate of Shampine (1986), which torchdiffeq has as well. The
# last evaluation is the first of the next step.
DOPRI5 = ButcherTableau(
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

ODE_SOLVERS = {"euler": EULER, "midpoint": MIDPOINT, "heun": HEUN, "rk4": RK4}
SDE_SOLVERS = {"euler_maruyama": EULER, "stochastic_heun": HEUN}
FIXED_STEP_SOLVERS = ODE_SOLVERS | SDE_SOLVERS
SOLVERS = (*FIXED_STEP_SOLVERS, "dopri5")
ERROR_NORMS = ("sample", "batch")
DIFFUSION_FORMS = ("constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing")
SBDM_MAX_SIGMA = 0.999
MAX_ATTEMPTS = 10_000  # of dopri5's steps
LAST_STEPS = ("mean", "euler", "tweedie", "none")

VelocityFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
StepCallback = Callable[[int, torch.Tensor, torch.Tensor], bool | None]


def _combine(weights: Sequence[float], velocities: Sequence[torch.Tensor]) -> torch.Tensor:
    """The weighted sum of evaluations, without those of weight 0."""
    return sum(weight * velocity for weight, velocity in zip(weights, velocities, strict=True) if weight != 0)


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


def _check_velocity(name: str, velocity: torch.Tensor, sample: torch.Tensor) -> None:
    if velocity.shape != sample.shape:
        raise ValueError(
            f"`{name}` must have the shape of `sample`, {tuple(sample.shape)}, got {tuple(velocity.shape)}."
        )


def check_starts(
    name: str, values: Sequence[float], maximum: float, num_inference_steps: int | None = None
) -> torch.Tensor:
    """
    Raises unless an argument is a grid of times.

    Args:
        name (`str`): Name of the argument, for the message.
        values (`Sequence[float]`): What was received.
        maximum (`float`): The greatest time.
        num_inference_steps (`int`, *optional*): The number of times, if it was given.

    Returns:
        `torch.Tensor` of shape `(N,)`: The times in fp32.

    Raises:
        `ValueError`: they are no strictly decreasing numbers above 0, or of another number.
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


class _Stop(Exception):
    """Raised inside torchdiffeq to leave it early; carries the sample that was reached."""

    def __init__(self, sample: torch.Tensor):
        self.sample = sample


class DoDFlowMatchScheduler(SchedulerMixin, ConfigMixin):
    r"""
    Rectified-flow scheduler with fixed-step and adaptive solvers of the ODE and of the SDEs that share its marginals.
    Time is Diffusers' own: sigma in [0, 1], 0 = data, `timestep` = 1000 * sigma, and the model predicts the velocity
    noise - data.

    The fixed-step solvers serve `set_timesteps` and `step`, with one entry of `timesteps` per evaluation of the model.
    `solve` integrates a whole trajectory with any solver, and is the only way for the adaptive one.

    The SDE is dx = (v - w score) dsigma + sqrt(2 w) dW in reversed time (SiT, Ma et al. 2024), with the diffusion w
    of `diffusion_form`. Its last interval is a deterministic step, see `last_step`.

    Args:
        num_train_timesteps (`int`, defaults to 1000): `timestep` / sigma. DoD models are trained with 1000.
        solver (`str`, defaults to `"euler"`):
            For the ODE `"euler"` (N evaluations for N steps), `"midpoint"` (2N), `"heun"` (2N), `"rk4"` (4N) or
            `"dopri5"` (adaptive). For the SDE `"euler_maruyama"` (N) or `"stochastic_heun"` (2N - 1).
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
            How the SDE ends: `"mean"` follows the SDE without its noise, `"euler"` the ODE, and `"tweedie"` goes to
            the expected data, which is the same for a velocity. `"none"` has no such step: the SDE runs to sigma = 0,
            and the noise of the last interval stays in the sample.
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
        check_at_least("num_train_timesteps", num_train_timesteps, 1)
        check_choice("solver", solver, SOLVERS)
        check_number("shift", shift, 0, open_minimum=True)
        check_number("rtol", rtol, 0, open_minimum=True)
        check_number("atol", atol, 0, open_minimum=True)
        check_choice("error_norm", error_norm, ERROR_NORMS)
        check_choice("diffusion_form", diffusion_form, DIFFUSION_FORMS)
        check_number("diffusion_norm", diffusion_norm, 0)
        check_choice("last_step", last_step, LAST_STEPS)
        check_number("last_step_size", last_step_size, 0, 1, open_minimum=True, open_maximum=True)

        self.num_inference_steps: int | None = None
        # Until `set_timesteps`, the training grid, as in Diffusers' flow-match schedulers.
        self._set_sigmas(torch.linspace(1, 0, num_train_timesteps + 1))

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
        evaluated = [
            torch.lerp(start, end, node)
            for interval, (start, end) in enumerate(zip(timesteps[:-1], timesteps[1:], strict=True))
            for node in self._tableau(interval).nodes
        ]
        self.timesteps = torch.stack(evaluated).to(device)
        self._reset()

    def _reset(self) -> None:
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._late_start: tuple[int, float] | None = (
            None  # the first interval, and its sigma if entered after its start
        )
        self._interval_start: torch.Tensor | None = None  # the sample there, while the interval is under way,
        self._velocities: list[torch.Tensor] = []  # and its evaluations

    def _tableau(self, interval: int) -> ButcherTableau:
        """The method of an interval."""
        # At sigma = 0, where `last_step` = "none" ends, the score is infinite.
        if self.is_stochastic and interval == len(self.sigmas) - 2:
            return EULER
        return FIXED_STEP_SOLVERS.get(self.config.solver, EULER)

    @property
    def is_adaptive(self) -> bool:
        """Whether the solver chooses its own steps, so that only `solve` can run it."""
        return self.config.solver not in FIXED_STEP_SOLVERS

    @property
    def is_stochastic(self) -> bool:
        """Whether the solver is one of the SDE, so that each step draws noise."""
        return self.config.solver in SDE_SOLVERS

    @property
    def init_noise_sigma(self) -> float:
        """
        Standard deviation of the initial noise: 1, but for the stochastic Heun solver, which adds noise before each
        interval and not after it: that of the first one is in here.
        """
        if self.config.solver != "stochastic_heun":
            return 1.0
        return math.sqrt(1 + self._noise_scale(0) ** 2)

    def _diffusion_over_sigma(self, sigma: float) -> float:
        """The SDE's diffusion w over sigma, the factor of the noise in its drift."""
        form, norm = self.config.diffusion_form, self.config.diffusion_norm
        if form in ("sigma", "linear"):
            return norm
        if form == "SBDM":
            return norm / (1 - sigma) if sigma <= SBDM_MAX_SIGMA else 0.0
        if form == "constant":
            diffusion = norm
        elif form == "decreasing":
            diffusion = 0.25 * (1 - norm * math.cos(math.pi * sigma)) ** 2
        else:
            diffusion = norm * math.sin(math.pi * sigma) ** 2
        return diffusion / sigma

    def _noise_scale(self, interval: int) -> float:
        """Standard deviation of the noise of an interval, sqrt(2 w dsigma), 0 where it has none."""
        is_last_step = interval == len(self.sigmas) - 2 and self.config.last_step != "none"
        if not self.is_stochastic or is_last_step or interval >= len(self.sigmas) - 1:
            return 0.0
        sigma, next_sigma = self._interval_ends(interval)
        if sigma == next_sigma:
            return 0.0
        return math.sqrt(2 * self._diffusion_over_sigma(sigma) * sigma * (sigma - next_sigma))

    def _interval_ends(self, interval: int) -> tuple[float, float]:
        sigma, next_sigma = self.sigmas[interval].item(), self.sigmas[interval + 1].item()
        starts_late = self._late_start is not None and interval == self._late_start[0]
        return (self._late_start[1] if starts_late else sigma), next_sigma

    def _drift(self, velocity: torch.Tensor, sample: torch.Tensor, sigma: float, interval: int) -> torch.Tensor:
        """dx / dsigma: the velocity, for the SDE less w times the score."""
        is_last = interval == len(self.sigmas) - 2
        follows_ode = not self.is_stochastic or (is_last and self.config.last_step in ("euler", "tweedie"))
        if self.config.diffusion_form == "SBDM" and self._interval_ends(interval)[0] > SBDM_MAX_SIGMA:
            follows_ode = True
        if follows_ode or sigma == 0:  # where a step has no length
            return velocity
        return velocity + self._diffusion_over_sigma(sigma) * noise_from_velocity(sample, velocity, sigma)

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
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """
        Lays out the fixed steps.

        Args:
            num_inference_steps (`int`, *optional*):
                Number N of intervals between sigma = 1 and sigma = 0. The last step of an SDE is one of them.
            device (`str` or `torch.device`, *optional*): Where `timesteps` goes.
            sigmas (`Sequence[float]`, *optional*):
                The N strictly decreasing starts of the intervals in (0, 1], before the shift; the end 0 is appended.
                1, 1 - 1/N, ..., 1/N by default; for an SDE from 1 to `last_step_size` in equal steps.
            timesteps (`Sequence[float]`, *optional*):
                The same as times in (0, 1000], as the model sees them: the shift does not apply.

        Raises:
            `ValueError`, `TypeError`: an argument is out of range, or the solver chooses its own steps.
        """
        self._refuse_adaptive("set_timesteps")
        if sigmas is not None and timesteps is not None:
            raise ValueError(f"Only one of `sigmas` and `timesteps` must be given, got {sigmas!r} and {timesteps!r}.")
        shift = self.config.shift
        has_last_step = self.is_stochastic and self.config.last_step != "none"
        if sigmas is not None:
            starts = check_starts("sigmas", sigmas, 1, num_inference_steps)
        elif timesteps is not None:
            maximum = self.config.num_train_timesteps
            timesteps = check_starts("timesteps", timesteps, maximum, num_inference_steps)
            starts, shift = timesteps / maximum, 1.0
            timesteps = torch.cat([timesteps, torch.zeros(1)])
        else:
            check_at_least("num_inference_steps", num_inference_steps, 2 if has_last_step else 1)
            starts = torch.linspace(1, 0, num_inference_steps + 1)[:-1]
            if has_last_step:
                last = self.config.last_step_size
                starts = torch.linspace(1, last / (shift - (shift - 1) * last), num_inference_steps)
        starts = shift * starts / (1 + (shift - 1) * starts)
        if len(starts) < 2 and has_last_step:
            raise ValueError(
                f"`{'timesteps' if sigmas is None else 'sigmas'}` must hold at least 2 for the solver "
                f"{self.config.solver!r}, whose last step is none of the SDE, got {len(starts)}."
            )
        self.num_inference_steps = len(starts)
        self._set_sigmas(torch.cat([starts, torch.zeros(1)]), timesteps, device)

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
        """That of all intervals but, for the SDE, the last one."""
        return len(FIXED_STEP_SOLVERS[self.config.solver].nodes)

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
        Advances the sample by one evaluation of the model. Between the evaluations of an interval the sample is a
        prediction, where the next one takes place.

        Args:
            model_output (`torch.Tensor`): Velocity (noise - data) at `timestep`.
            timestep (`float` or `torch.Tensor`):
                The current entry of `timesteps`. Without a begin index the first call begins there, and so does one
                after the last step: another time within the range leads to the end of the interval it lies in.
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
        _check_velocity("model_output", model_output, sample)
        if variance_noise is not None:
            _check_velocity("variance_noise", variance_noise, sample)
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
        self._velocities.append(self._drift(model_output.float(), sample.float(), evaluated_at, interval))

        is_end = evaluation == len(tableau.nodes) - 1
        weights = tableau.solution if is_end else tableau.weights[evaluation + 1]
        prev_sample = euler_step(self._interval_start, _combine(weights, self._velocities), sigma, next_sigma)
        if is_end:
            # Euler-Maruyama adds the noise of an interval at its end, the stochastic Heun solver before its start.
            noise_scale = self._noise_scale(interval + (self.config.solver == "stochastic_heun"))
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

        Returns:
            [`DoDFlowMatchSchedulerOutput`] with the counts of evaluations, accepted and rejected steps.

        Raises:
            `ValueError`: the fixed steps were not laid out with `set_timesteps`, or dopri5 meets numbers that are not
                finite or a tolerance that it cannot reach.
        """
        if self.is_adaptive:
            if not bool(torch.isfinite(sample).all()):
                raise ValueError("`sample` must be finite for dopri5, got others.")
            solve = self._solve_by_sample if self.config.error_norm == "sample" else self._solve_by_batch
            return solve(velocity_fn, sample, callback)
        if self.num_inference_steps is None:
            raise ValueError("`num_inference_steps` is None: call `set_timesteps` before `solve`.")
        self._reset()
        self.set_begin_index(0)
        indices = torch.arange(sample.shape[0], device=sample.device)
        num_evaluations = 0
        for timestep in self.timesteps:
            velocity = velocity_fn(sample, timestep, indices)
            _check_velocity("velocity_fn", velocity, sample)
            sample = self.step(velocity, timestep, sample, generator=generator).prev_sample
            num_evaluations += 1
            if callback is not None and callback(num_evaluations - 1, timestep, sample) is False:
                break
        is_whole = num_evaluations == len(self.timesteps)
        num_accepted = len(self.sigmas) - 1 if is_whole else num_evaluations // self._evaluations_per_interval
        return self._output(sample, num_evaluations, num_accepted, 0)

    @staticmethod
    def _output(sample: torch.Tensor, *counts: int) -> DoDFlowMatchSchedulerOutput:
        return DoDFlowMatchSchedulerOutput(
            sample, *(torch.full((sample.shape[0],), count, dtype=torch.int64) for count in counts)
        )

    def _unreachable(self) -> str:
        return (
            "`rtol` and `atol` must be tolerances that the model's precision allows, "
            f"got {self.config.rtol} and {self.config.atol}, which dopri5 does not reach."
        )

    def _checked_velocity(
        self, velocity_fn: VelocityFunction, sample: torch.Tensor, sigma: torch.Tensor, indices: torch.Tensor
    ) -> torch.Tensor:
        """An evaluation of dopri5, whose error control finite numbers are needed for."""
        timestep = (sigma * self.config.num_train_timesteps).to(torch.float32)
        velocity = velocity_fn(sample, timestep, indices)
        _check_velocity("velocity_fn", velocity, sample)
        finite = torch.isfinite(velocity).reshape(len(velocity), -1).all(dim=1)
        if not finite.all():
            found = timestep if timestep.ndim == 0 else timestep[~finite][0]
            raise ValueError(f"`velocity_fn` must return finite numbers, got others at timestep {float(found)}.")
        return velocity.to(sample.dtype)

    def _solve_by_sample(
        self, velocity_fn: VelocityFunction, sample: torch.Tensor, callback: StepCallback | None
    ) -> DoDFlowMatchSchedulerOutput:
        """Dormand-Prince with the error control of Hairer, Norsett and Wanner (Solving ODEs I, II.4) by sample."""
        dtype = sample.dtype if sample.dtype == torch.float64 else torch.float32
        device, batch_size = sample.device, sample.shape[0]
        counts = torch.zeros(3, batch_size, dtype=torch.int64, device=device)
        num_evaluations, num_accepted, num_rejected = counts

        def rms(value: torch.Tensor) -> torch.Tensor:
            return value.reshape(len(value), -1).to(torch.float64).square().mean(dim=1).sqrt()

        def expand(value: torch.Tensor) -> torch.Tensor:
            return value.reshape(-1, *[1] * (sample.ndim - 1))

        def evaluate(state: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            num_evaluations[indices] += 1
            return self._checked_velocity(velocity_fn, state, sigma, indices)

        # Of the samples that are left: which they are, where they are, and the length of the next step.
        indices = torch.arange(batch_size, device=device)
        state = sample.to(dtype)
        sigma = torch.ones(batch_size, dtype=torch.float64, device=device)
        result, result_sigma = state.clone(), sigma.clone()
        first = evaluate(state, sigma)
        tolerance = self.config.atol + self.config.rtol * state.abs()
        size, slope = rms(state / tolerance), rms(first / tolerance)
        guess = torch.where((size < 1e-5) | (slope < 1e-5), 1e-6, 0.01 * size / slope).clamp(max=1)
        second = evaluate(state - expand(guess.to(dtype)) * first, sigma - guess)
        curvature = rms((second - first) / tolerance) / guess
        largest = torch.maximum(slope, curvature)
        length = torch.where(largest <= 1e-15, (guess * 1e-3).clamp(min=1e-6), (0.01 / largest) ** (1 / 5))
        length = torch.minimum(100 * guess, length)

        num_attempts = num_steps = 0
        while len(indices) > 0:
            length = torch.minimum(length, sigma)
            num_attempts += 1
            if num_attempts > MAX_ATTEMPTS or bool((sigma - length == sigma).any()):
                raise ValueError(self._unreachable())
            velocities = [first]
            for node, weights in zip(DOPRI5.nodes[1:], DOPRI5.weights[1:], strict=True):
                stage = state - expand(length.to(dtype)) * _combine(weights, velocities)
                velocities.append(evaluate(stage, torch.lerp(sigma, sigma - length, node)))
            error = expand(length.to(dtype)) * _combine(DOPRI5.error, velocities)
            # The last evaluation is at the end of the step, `stage`.
            tolerance = self.config.atol + self.config.rtol * torch.maximum(state.abs(), stage.abs())
            ratio = rms(error / tolerance)
            accepted = ratio <= 1
            num_accepted[indices] += accepted
            num_rejected[indices] += ~accepted
            started_at = sigma
            is_last = accepted & (length == sigma)
            state = torch.where(expand(accepted), stage, state)
            first = torch.where(expand(accepted), velocities[-1], first)
            sigma = torch.where(accepted, sigma - length, sigma)
            # At most 10 times longer; after a rejection at most 5 times shorter.
            factor = (0.9 / ratio.clamp(min=1e-10) ** (1 / 5)).clamp(min=0.2, max=10)
            length = length * torch.where(accepted, factor.clamp(min=1), factor)

            result[indices], result_sigma[indices] = state, sigma
            if callback is not None and bool(accepted.any()):
                timestep = torch.zeros_like(result_sigma)
                timestep[indices] = started_at * self.config.num_train_timesteps
                if callback(num_steps, timestep.to(torch.float32), result.to(sample.dtype, copy=True)) is False:
                    break
                num_steps += 1
            if bool(is_last.any()):
                indices, state, first, sigma, length = (
                    value[~is_last] for value in (indices, state, first, sigma, length)
                )
        return DoDFlowMatchSchedulerOutput(result.to(sample.dtype), *counts.cpu())

    def _solve_by_batch(
        self, velocity_fn: VelocityFunction, sample: torch.Tensor, callback: StepCallback | None
    ) -> DoDFlowMatchSchedulerOutput:
        """Dormand-Prince as SiT and FiT run it, by torchdiffeq."""
        try:
            from torchdiffeq import odeint
        except ImportError as error:
            message = "`error_norm` = 'batch' needs the torchdiffeq library: pip install torchdiffeq."
            raise ImportError(message) from error

        maximum = self.config.num_train_timesteps
        indices = torch.arange(sample.shape[0], device=sample.device)
        num_evaluations = num_accepted = num_rejected = 0
        step_start: float | None = None  # starting time of the latest accepted step, whose end is not known yet

        def velocity(sigma: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
            nonlocal num_evaluations
            num_evaluations += 1
            # Steps past the end see the end's time, as in FiT.
            return self._checked_velocity(velocity_fn, state, sigma.clamp(min=0.0), indices)

        def report(end: torch.Tensor) -> None:
            if callback is not None and step_start is not None:
                timestep = torch.tensor(step_start * maximum, dtype=torch.float32, device=end.device)
                if callback(num_accepted - 1, timestep, end.to(sample.dtype)) is False:
                    raise _Stop(end)

        def accepted(sigma: torch.Tensor, state: torch.Tensor, step_size: torch.Tensor) -> None:
            # torchdiffeq reports a step with the state at its start, which is where the step before it ended.
            nonlocal step_start, num_accepted
            report(state)
            step_start = float(sigma)
            num_accepted += 1

        def rejected(sigma: torch.Tensor, state: torch.Tensor, step_size: torch.Tensor) -> None:
            nonlocal num_rejected
            num_rejected += 1

        velocity.callback_accept_step = accepted
        velocity.callback_reject_step = rejected

        start = sample if sample.dtype == torch.float64 else sample.float()
        sigmas = torch.tensor([1.0, 0.0], dtype=torch.float64, device=sample.device)
        try:
            state = odeint(velocity, start, sigmas, method="dopri5", rtol=self.config.rtol, atol=self.config.atol)[-1]
            report(state)
        except AssertionError as error:
            if not str(error).startswith("underflow in dt"):  # which is how torchdiffeq gives up
                raise
            raise ValueError(self._unreachable()) from error
        except _Stop as stop:
            state = stop.sample
        return self._output(state.to(sample.dtype), num_evaluations, num_accepted, num_rejected)

    def __len__(self) -> int:
        return self.config.num_train_timesteps
