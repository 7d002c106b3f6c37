# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""The plan of a call: its turn, the scheduler, the number of steps and the guidance scale of each stage."""

import functools
import inspect
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import is_compiled_module

from .checks import MAX_STEPS, abbreviate, check_at_least, check_number, check_type
from .scheduling_dod import check_starts


_new_lock = threading.Lock()
_locks: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # component of a pipeline -> its lock


def one_at_a_time(method: Callable) -> Callable:
    """
    Makes calls of a pipeline's method take turns with all that share a component with them, in any thread.

    Schedulers, caches and adapters hold the state of one call.

    Args:
        method (`Callable`): A method of a pipeline.

    Returns:
        `Callable`: The method, which waits for its turn.
    """

    @functools.wraps(method)
    def wrapper(self, *args, **kwargs):
        components = [component for component in self.components.values() if component is not None]
        with _new_lock:
            locks = [_locks.setdefault(component, threading.RLock()) for component in components]
        with ExitStack() as stack:
            for lock in sorted(locks, key=id):  # in the same order everywhere, so that no two wait for each other
                stack.enter_context(lock)
            return method(self, *args, **kwargs)

    return wrapper


def is_a(component: Any, name: str) -> bool:
    """
    Whether a component's class has this name, or is derived from a class with this name.

    Names are compared because a repository with its own code has its own classes. A compiled component counts as the
    original.

    Args:
        component (`Any`): A model, a scheduler or anything else.
        name (`str`): Name of a class.

    Returns:
        `bool`.
    """
    component = component._orig_mod if is_compiled_module(component) else component
    return name in {base.__name__ for base in type(component).__mro__}


def check_scheduler(name: str, scheduler: SchedulerMixin) -> None:
    """
    Raises unless a scheduler is a flow-match scheduler: others would step along another path.

    Args:
        name (`str`): Name of the argument, for the message.
        scheduler (`SchedulerMixin`): The value received.

    Raises:
        `TypeError`: the value is no scheduler.
        `ValueError`: the scheduler is of another kind, or has settings that leave the path.
    """
    check_type(name, scheduler, SchedulerMixin)
    if is_a(scheduler, "DoDFlowMatchScheduler"):
        return
    accepted: dict[str, tuple] = {
        "invert_sigmas": (False,),
        "use_dynamic_shifting": (False,),
        "scale_factors": (None,),
        "final_sigmas_type": ("zero",),
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
    }
    if not type(scheduler).__name__.startswith("FlowMatch"):
        accepted |= {"use_flow_sigmas": (True,), "prediction_type": ("flow_prediction",)}
        accepted |= dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), (False,))
    for setting, values in accepted.items():
        received = scheduler.config.get(setting, False if setting == "use_flow_sigmas" else values[0])
        if received not in values:
            raise ValueError(
                f"`{name}` must be a `DoDFlowMatchScheduler`, one of Diffusers' `FlowMatch...` or one with "
                f"`use_flow_sigmas=True, prediction_type='flow_prediction'`, where `{setting}` is "
                f"{' or '.join(map(repr, values))}, got {type(scheduler).__name__} with {received!r}."
            )


@dataclass
class Stage:
    """
    Settings of one stage of a call.

    Args:
        number (`int`): Number of the stage. Stage 1 has no visual prior.
        scheduler (`SchedulerMixin`): Integrates the velocity.
        num_inference_steps (`int`): Number of intervals.
        guidance_scale (`float`): Scale of guidance; 1 is none.
        starts (`Sequence[float]`, *optional*): Starts of the intervals, `sigmas` of the call. By default intervals are
            equal.
    """

    number: int
    scheduler: SchedulerMixin
    num_inference_steps: int
    guidance_scale: float
    starts: Sequence[float] | None = None

    @property
    def is_ours(self) -> bool:
        """Whether the scheduler is a [`DoDFlowMatchScheduler`]."""
        return is_a(self.scheduler, "DoDFlowMatchScheduler")

    @property
    def is_adaptive(self) -> bool:
        """Whether the solver chooses its own steps."""
        return getattr(self.scheduler, "is_adaptive", False)

    @property
    def sigmas(self) -> torch.Tensor:
        """Times of the steps from [`Stage.lay_out`], in [0, 1], 0 = data, on the CPU."""
        # Some of Diffusers' schedulers round their timesteps. None rounds its sigmas.
        if self.is_ours:
            return self.scheduler.timesteps.cpu() / self.scheduler.config.num_train_timesteps
        return self.scheduler.sigmas.cpu()[: len(self.scheduler.timesteps)]

    def lay_out(self, device: torch.device | str | None = None) -> int | None:
        """
        Sets the scheduler's steps.

        Args:
            device (`torch.device`, *optional*): Device of the times. By default the CPU.

        Returns:
            `int | None`: The number of steps. `None` if the solver chooses them.

        Raises:
            `ValueError`: the scheduler does not accept `sigmas`, or not these values.
        """
        scheduler = self.scheduler
        accepts_sigmas = "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
        if self.starts is not None and (self.is_adaptive or not accepts_sigmas):
            solver = scheduler.config.solver if self.is_adaptive else type(scheduler).__name__
            raise ValueError(
                f"`sigmas` must be None for {solver!r}, which has a grid of its own, got {self.starts!r}."
            )
        if self.is_adaptive:
            return None
        if self.starts is not None and self.is_ours:
            scheduler.set_timesteps(sigmas=self.starts, device=device)
        elif self.starts is not None:
            scheduler.set_timesteps(sigmas=check_starts("sigmas", self.starts, 1).numpy(), device=device)
        elif accepts_sigmas and not self.is_ours:
            # Diffusers' own default ends at 1 / num_train_timesteps; N intervals of 1 / N are those of our scheduler.
            sigmas = np.linspace(1, 1 / self.num_inference_steps, self.num_inference_steps)
            scheduler.set_timesteps(sigmas=sigmas, device=device)
        else:
            scheduler.set_timesteps(self.num_inference_steps, device=device)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        return len(scheduler.timesteps)


#: Greatest size of a number in latents, which are about 1 in size, and in pixels: that of float16.
LARGEST = 65504


def find_sound(samples: torch.Tensor) -> torch.Tensor:
    """Tells which of `samples` (B, ...) are finite and at most [`LARGEST`] in size: (B,), on their device."""
    return (samples.detach().abs() <= LARGEST).flatten(1).all(dim=1)  # NaN compares false


def check_samples(name: str, are_sound: torch.Tensor, sample_indices: Sequence[int]) -> None:
    """
    Raises unless the samples are sound in the end; this waits for the device.

    Args:
        name (`str`): What the samples are, for the message.
        are_sound (`torch.Tensor` of shape `(B,)` or `(steps, B)`): Results of [`find_sound`], at the end or after
            each step.
        sample_indices (`Sequence[int]`): Index of each sample, or of each group of neighbours of one size.

    Raises:
        `FloatingPointError`: some samples are not finite, or absurdly large. The message has the first such step.
    """
    are_sound = torch.atleast_2d(are_sound).cpu()
    is_bad = ~are_sound[-1]
    if not bool(is_bad.any()):
        return
    group = len(is_bad) // len(sample_indices)
    indices = dict.fromkeys(str(int(sample_indices[row // group])) for row in is_bad.nonzero()[:, 0].tolist())
    first = int((~are_sound[:, is_bad]).any(dim=1).int().argmax()) + 1
    since = f" from step {first} of {len(are_sound)} on" if len(are_sound) > 1 else ""
    raise FloatingPointError(
        f"{name} must be finite and at most {LARGEST} in size, got others{since} in {is_bad.sum()} of {len(is_bad)} "
        f"samples, of index {abbreviate(list(indices))}: weights that are not finite, a great guidance scale and the "
        "range of float16 lead there."
    )


def is_per_stage(value: Any) -> bool:
    """Whether `value` has a value for each stage: a sequence, a NumPy array or a 1-d tensor."""
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, str)


def per_stage(name: str, value: Any, num_stages: int) -> list:
    """
    Turns an argument into a list with one value for each stage of the call.

    Args:
        name (`str`): Name of the argument, for the message.
        value (`Any`): A value for all stages, or a sequence, array or tensor with a value for each.
        num_stages (`int`): Number of stages of the call.

    Returns:
        `list`: A value for each stage.

    Raises:
        `ValueError`: the number of values differs from the number of stages.
    """
    if not is_per_stage(value):
        return [value] * num_stages
    if len(value) != num_stages:
        raise ValueError(
            f"`{name}` must be one value or a list of {num_stages} (one per stage that is run), "
            f"got a list of {len(value)}."
        )
    return value.tolist() if isinstance(value, (np.ndarray, torch.Tensor)) else list(value)


def _find_scheduler(scheduler: SchedulerMixin, given: str | SchedulerMixin | None) -> SchedulerMixin:
    """Finds the scheduler of one stage: the given one, or the pipeline's with the given solver."""
    if given is None:
        check_scheduler("scheduler", scheduler)
        return scheduler
    check_type("schedulers", given, (str, SchedulerMixin))
    if not isinstance(given, str):
        check_scheduler("schedulers", given)
        return given
    if not is_a(scheduler, "DoDFlowMatchScheduler"):
        raise ValueError(
            "`schedulers` must hold schedulers where that of the pipeline is no `DoDFlowMatchScheduler` but a "
            f"`{type(scheduler).__name__}`, got {given!r}."
        )
    try:
        return type(scheduler).from_config(scheduler.config, solver=given)
    except ValueError as error:
        raise ValueError(f"`schedulers` must hold schedulers or solvers: {error}") from error


def plan_stages(
    numbers: Sequence[int],
    scheduler: SchedulerMixin,
    default_num_inference_steps: int,
    default_guidance_scale: float,
    has_priors: bool,
    default_first_stage_guidance_scale: float = 1.0,
    num_inference_steps: int | Sequence[int | None] | None = None,
    guidance_scale: float | Sequence[float | None] | None = None,
    schedulers: str | SchedulerMixin | Sequence[str | SchedulerMixin | None] | None = None,
    sigmas: Sequence[float] | None = None,
) -> list[Stage]:
    """
    Plans the stages of a call, from its arguments and the pipeline's defaults.

    A single `guidance_scale` is for stages from 2 on, or for the only stage of a model without priors.

    Args:
        numbers (`Sequence[int]`): Numbers of the stages to run.
        scheduler (`SchedulerMixin`): The pipeline's scheduler.
        default_num_inference_steps (`int`): Intervals of a stage for which the call gives none.
        default_guidance_scale (`float`): Scale of a guided stage for which the call gives none.
        has_priors (`bool`): Whether the model has a latent embedder.
        default_first_stage_guidance_scale (`float`, defaults to 1.0): Scale of stage 1 of a model with priors, unless
            `guidance_scale` has one for it; 1, the paper's, is no guidance.
        num_inference_steps (`int` or `Sequence[int | None]`, *optional*): Intervals of all stages, or of each, >= 1.
        guidance_scale (`float` or `Sequence[float | None]`, *optional*): Scale, or a scale for each stage, >= 0.
        schedulers (`str`, `SchedulerMixin` or a sequence of them, *optional*):
            Solver or scheduler, or one for each stage.
        sigmas (`Sequence[float]`, *optional*): Starts of the intervals, one list for all stages.

    Returns:
        `list[Stage]`.

    Raises:
        `TypeError`, `ValueError`: an argument is out of range, or has another number of values than stages.
    """
    if sigmas is not None and num_inference_steps is not None:
        raise ValueError(f"Only one of `sigmas` and `num_inference_steps` must be given, got {num_inference_steps}.")
    if is_per_stage(sigmas) and any(map(is_per_stage, sigmas)):
        raise ValueError(
            "`sigmas` must be one list of strictly decreasing numbers in (0, 1], the same for all stages, "
            f"got a list of lists: {sigmas!r}."
        )
    has_scales = is_per_stage(guidance_scale)
    has_lists = has_scales or is_per_stage(num_inference_steps) or is_per_stage(schedulers)
    planned = []
    for number, steps, scale, given in zip(
        numbers,
        per_stage("num_inference_steps", num_inference_steps, len(numbers)),
        per_stage("guidance_scale", guidance_scale, len(numbers)),
        per_stage("schedulers", schedulers, len(numbers)),
        strict=True,
    ):
        steps = default_num_inference_steps if steps is None else steps
        is_first = number == 1 and has_priors
        if scale is None:
            scale = default_first_stage_guidance_scale if is_first else default_guidance_scale
        try:
            check_at_least("num_inference_steps", steps, 1, MAX_STEPS)
            check_number("guidance_scale", scale, 0)
            found = _find_scheduler(scheduler, given)
        except (TypeError, ValueError) as error:
            where = f" of stage {number}" if has_lists else ""
            raise type(error)(str(error).replace("` must", f"`{where} must", 1)) from error
        scale = default_first_stage_guidance_scale if is_first and not has_scales else scale
        planned.append(Stage(number, found, steps, float(scale), sigmas))
    return planned
