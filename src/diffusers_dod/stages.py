# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""The plan of a call: which scheduler, how many steps and which guidance scale each stage has."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import is_compiled_module

from .checks import check_at_least, check_number, check_type
from .scheduling_dod import check_starts


def is_a(component: Any, name: str) -> bool:
    """
    Whether the class of a component is the one of that name or derived from it.

    Classes are told by name: a repository that is loaded with its own code has classes of its own. A compiled
    component counts as what was compiled.

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
    Raises unless a scheduler is a flow-match one: others would step along another path.

    Args:
        name (`str`): Name of the argument, for the message.
        scheduler (`SchedulerMixin`): What was received.

    Raises:
        `TypeError`: it is no scheduler.
        `ValueError`: it is one of another kind, or has settings that leave the path.
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
    What one stage of a call runs with.

    Args:
        number (`int`): 1 for the stage without a visual prior.
        scheduler (`SchedulerMixin`): Integrates the velocity.
        num_inference_steps (`int`): Number of intervals.
        guidance_scale (`float`): Scale of guidance; 1 is none.
        grid (`dict`): `sigmas` or `timesteps` in place of equal intervals, if any.
    """

    number: int
    scheduler: SchedulerMixin
    num_inference_steps: int
    guidance_scale: float
    grid: dict[str, Any]

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
        """Times of the steps that [`Stage.lay_out`] has laid out, in [0, 1], 0 = data."""
        # Some of Diffusers' schedulers round their timesteps, and none of them its sigmas.
        if self.is_ours:
            return self.scheduler.timesteps / self.scheduler.config.num_train_timesteps
        return self.scheduler.sigmas[: len(self.scheduler.timesteps)]

    def lay_out(self, device: torch.device | str | None = None) -> int | None:
        """
        Sets the scheduler's steps.

        Args:
            device (`torch.device`, *optional*): Where the times are needed; the CPU if not given.

        Returns:
            `int | None`: The number of steps. `None` if the solver chooses them.

        Raises:
            `ValueError`: the scheduler does not accept the grid.
        """
        scheduler = self.scheduler
        accepted = inspect.signature(scheduler.set_timesteps).parameters
        for name, values in self.grid.items():
            if self.is_adaptive or name not in accepted or (name == "timesteps" and not self.is_ours):
                solver = scheduler.config.solver if self.is_adaptive else type(scheduler).__name__
                raise ValueError(f"`{name}` must be None for {solver!r}, which has a grid of its own, got {values!r}.")
        if self.is_adaptive:
            return None
        if self.grid and self.is_ours:
            scheduler.set_timesteps(**self.grid, device=device)
        elif self.grid:
            starts = check_starts("sigmas", self.grid["sigmas"], 1)
            scheduler.set_timesteps(sigmas=starts.numpy(), device=device)
        elif "sigmas" in accepted and not self.is_ours:
            # Diffusers' own default ends at 1 / num_train_timesteps; N intervals of 1 / N are those of our scheduler.
            sigmas = np.linspace(1, 1 / self.num_inference_steps, self.num_inference_steps)
            scheduler.set_timesteps(sigmas=sigmas, device=device)
        else:
            scheduler.set_timesteps(self.num_inference_steps, device=device)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        return len(scheduler.timesteps)


def per_stage(name: str, values: Sequence | None, num_stages: int) -> list:
    """
    One value for each stage that is run.

    Args:
        name (`str`): Name of the argument, for the message.
        values (`Sequence` or `None`): The values; `None` stands for `None` in all stages.
        num_stages (`int`): Number of stages that are run.

    Returns:
        `list`: As many values.

    Raises:
        `TypeError`, `ValueError`: the values are no list or tuple, or not as many as the stages.
    """
    if values is None:
        return [None] * num_stages
    check_type(name, values, (list, tuple))
    if len(values) != num_stages:
        raise ValueError(f"`{name}` must hold {num_stages} values (one per stage that is run), got {len(values)}.")
    return list(values)


def _find_scheduler(scheduler: SchedulerMixin, solver: str | SchedulerMixin | None) -> SchedulerMixin:
    """The scheduler of one stage, of a pipeline with `scheduler`."""
    if isinstance(solver, str):
        if not is_a(scheduler, "DoDFlowMatchScheduler"):
            raise ValueError(
                "`stage_solvers` must hold schedulers where that of the pipeline is no `DoDFlowMatchScheduler` but a "
                f"`{type(scheduler).__name__}`, got {solver!r}."
            )
        try:
            return type(scheduler).from_config(scheduler.config, solver=solver)
        except ValueError as error:
            raise ValueError(f"`stage_solvers` must hold schedulers or solvers: {error}") from error
    if solver is not None:
        check_type("stage_solvers", solver, (str, SchedulerMixin))
    found = scheduler if solver is None else solver
    check_scheduler("scheduler" if solver is None else "stage_solvers", found)
    return found


def plan_stages(
    numbers: Sequence[int],
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    guidance_scales: Sequence[float],
    stage_inference_steps: Sequence[int | None] | None = None,
    stage_solvers: Sequence[str | SchedulerMixin | None] | None = None,
    grid: dict[str, Any] | None = None,
) -> list[Stage]:
    """
    The stages that are run, from the arguments of a call and the pipeline's defaults.

    Args:
        numbers (`Sequence[int]`): Numbers of the stages that are run.
        scheduler (`SchedulerMixin`): The pipeline's scheduler.
        num_inference_steps (`int`): Intervals of a stage that has no number of its own, >= 1.
        guidance_scales (`Sequence[float]`): Scale of each stage, >= 0.
        stage_inference_steps (`Sequence[int | None]`, *optional*): Intervals of each stage, >= 1.
        stage_solvers (`Sequence[str | SchedulerMixin | None]`, *optional*): Solver or scheduler of each stage.
        grid (`dict`, *optional*): `sigmas` or `timesteps` of all stages.

    Returns:
        `list[Stage]`.

    Raises:
        `TypeError`, `ValueError`: an argument is out of range, or there are not as many values as stages.
    """
    solvers = per_stage("stage_solvers", stage_solvers, len(numbers))
    steps = per_stage("stage_inference_steps", stage_inference_steps, len(numbers))
    for value in steps:
        if value is not None:
            check_at_least("stage_inference_steps", value, 1)
    scales = per_stage("stage_guidance_scales", guidance_scales, len(numbers))
    for scale in scales:
        check_number("stage_guidance_scales", scale, 0)
    return [
        Stage(
            number,
            _find_scheduler(scheduler, solver),
            num_inference_steps if value is None else value,
            float(scale),
            grid or {},
        )
        for number, solver, value, scale in zip(numbers, solvers, steps, scales, strict=True)
    ]
