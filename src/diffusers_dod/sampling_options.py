# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Options of commands for the call of the pipeline. Manifests and cards use the same names."""

from dataclasses import dataclass
from typing import Any

from .options import find_given, option
from .tableaus import SOLVERS


@dataclass(frozen=True, kw_only=True)
class CallOptions:
    """Arguments of the pipeline's call, see docs/sampling.md."""

    num_stages: int | None = option(None, at_least=1, help="Number of stages; the checkpoint's by default.")
    num_inference_steps: int | None = option(None, at_least=1, help="Steps of a stage; the checkpoint's by default.")
    guidance_scale: float | None = option(
        None, at_least=0, help="From stage 2 on, or of the only stage without a LEM; the checkpoint's by default."
    )
    first_stage_guidance_scale: float = option(1.0, at_least=0, help="Guidance scale of stage 1.")
    stage_inference_steps: tuple[int, ...] | None = option(None, at_least=1, help="Steps of each stage.")
    stage_solvers: tuple[str, ...] | None = option(None, choices=SOLVERS, help="Solver of each stage.")
    stage_guidance_scales: tuple[float, ...] | None = option(None, at_least=0, help="Guidance scale of each stage.")
    prior_noise: float = option(0.0, at_least=0, at_most=1, help="Level of the noise that the LEM sees in samples.")
    height: int | None = option(None, at_least=1, help="Height in pixels; the trained size by default.")
    width: int | None = option(None, at_least=1, help="Width in pixels; the trained size by default.")

    def find_conflicts(self) -> list[str]:
        """Messages about options that do not fit each other."""
        of_stages = {name: getattr(self, name) for name in ("stage_inference_steps", "stage_solvers")}
        of_stages["stage_guidance_scales"] = self.stage_guidance_scales
        return [
            f"`{name}` must hold {self.num_stages} values, got {len(values)}."
            for name, values in of_stages.items()
            if None not in (values, self.num_stages) and len(values) != self.num_stages
        ] + [
            f"`stage_guidance_scales` and `{name}` must not both be given, got {list(self.stage_guidance_scales)} and "
            f"{getattr(self, name)}."
            for name in ("guidance_scale", "first_stage_guidance_scale")
            if self.stage_guidance_scales is not None and name in find_given(self)
        ]

    def to_call(self, num_stages: int, has_priors: bool) -> dict[str, Any]:
        """
        Turns the options into arguments of a call of the pipeline.

        Args:
            num_stages (`int`): Number of stages.
            has_priors (`bool`): Whether the pipeline has a latent embedder; without one there is one scale only.

        Returns:
            `dict`: The arguments.
        """
        guidance_scale, first_scale = self.guidance_scale, self.first_stage_guidance_scale
        if self.stage_guidance_scales is not None:
            guidance_scale = self.stage_guidance_scales
        elif has_priors and first_scale != 1:
            guidance_scale = [first_scale, *[guidance_scale] * (num_stages - 1)]
        return {
            "num_stages": num_stages,
            "num_inference_steps": self.stage_inference_steps or self.num_inference_steps,
            "guidance_scale": guidance_scale,
            "schedulers": self.stage_solvers,
            "prior_noise": self.prior_noise,
            "height": self.height,
            "width": self.width,
        }
