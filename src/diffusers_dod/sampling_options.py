# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Options of commands for the call of the pipeline. Manifests and cards use the same names."""

from dataclasses import dataclass, field
from typing import Any

from .options import find_given, option, to_values
from .tableaus import SOLVERS


STAGE_OPTIONS = ("stage_inference_steps", "stage_solvers", "stage_guidance_scales")  # a value for each stage


@dataclass(frozen=True, kw_only=True)
class TokenPriorOptions:
    """A token prior in place of stage 1, see docs/sampling.md."""

    use_token_prior: bool = option(False, help="The pipeline's token prior draws latent tokens in place of stage 1.")
    token_prior_num_inference_steps: int | None = option(
        None, at_least=1, needs="use_token_prior", help="Its steps; 50 by default."
    )
    token_prior_guidance_scale: float | None = option(
        None, at_least=0, needs="use_token_prior", help="Scale of its class guidance; 1, none, by default."
    )
    token_prior_truncation: float | None = option(
        None,
        at_least=0,
        at_most=1,
        needs="use_token_prior",
        help="Share of the distance between its tokens and the mean of their class that is kept; 1 by default.",
    )

    @property
    def first_stage(self) -> int:
        """Number of the first stage that is run."""
        return 2 if self.use_token_prior else 1


def find_idle_noise(prior_noise: float, use_token_prior: bool = False, num_stages: int | None = None) -> list[str]:
    """
    Finds noise of priors where no sample has a prior that can be noised.

    Args:
        prior_noise (`float`): The level of the noise.
        use_token_prior (`bool`, defaults to `False`): Whether the token prior takes the place of stage 1.
        num_stages (`int`, *optional*): Number of stages, if it is known.

    Returns:
        `list[str]`: A message, if there is such noise.
    """
    if prior_noise > 0 and use_token_prior:
        return [f"`prior_noise` must be 0 with `use_token_prior`, got {prior_noise}."]
    if prior_noise > 0 and num_stages == 1:
        return [f"`prior_noise` must be 0 with one stage, got {prior_noise}."]
    return []


@dataclass(frozen=True, kw_only=True)
class CallOptions:
    """Arguments of the pipeline's call, see docs/sampling.md."""

    num_stages: int | None = option(None, at_least=1, help="Number of stages; the checkpoint's by default.")
    num_inference_steps: int | None = option(None, at_least=1, help="Steps of a stage; the checkpoint's by default.")
    guidance_scale: float | None = option(
        None, at_least=0, help="From stage 2 on, or of the only stage without a LEM; the checkpoint's by default."
    )
    first_stage_guidance_scale: float | None = option(
        None, at_least=0, help="Scale of stage 1 with a LEM; the checkpoint's by default, which is 1 for most."
    )
    stage_inference_steps: tuple[int, ...] | None = option(None, at_least=1, help="Steps of each stage.")
    stage_solvers: tuple[str, ...] | None = option(None, choices=SOLVERS, help="Solver of each stage.")
    stage_guidance_scales: tuple[float, ...] | None = option(None, at_least=0, help="Guidance scale of each stage.")
    prior_noise: float = option(0.0, at_least=0, at_most=1, help="Level of the noise that the LEM sees in samples.")
    height: int | None = option(None, at_least=1, help="Height in pixels; the trained size by default.")
    width: int | None = option(None, at_least=1, help="Width in pixels; the trained size by default.")
    token_prior: TokenPriorOptions = field(default_factory=TokenPriorOptions)

    def find_conflicts(self) -> list[str]:
        """Messages about options that do not fit each other."""
        found = [] if self.num_stages is None else self.find_stage_conflicts(self.num_stages)
        found += find_idle_noise(self.prior_noise, self.token_prior.use_token_prior)
        if self.token_prior.use_token_prior and "first_stage_guidance_scale" in find_given(self):
            found.append(
                "`first_stage_guidance_scale` must not be given with `use_token_prior`, which takes the place of "
                f"stage 1, got {self.first_stage_guidance_scale}."
            )
        return found + [
            f"`stage_guidance_scales` and `{name}` must not both be given, got {list(self.stage_guidance_scales)} and "
            f"{getattr(self, name)}."
            for name in ("guidance_scale", "first_stage_guidance_scale")
            if self.stage_guidance_scales is not None and name in find_given(self)
        ]

    def find_stage_conflicts(self, num_stages: int) -> list[str]:
        """Messages about options that do not fit the number of stages, `num_stages` in all."""
        number = num_stages - self.token_prior.first_stage + 1
        if self.token_prior.use_token_prior and number < 1:
            return [f"`num_stages` must be >= 2 with `use_token_prior`, which stands for stage 1, got {num_stages}."]
        lists = {name: getattr(self, name) for name in STAGE_OPTIONS}
        return find_idle_noise(self.prior_noise, num_stages=num_stages) + [
            f"`{name}` must hold {number} values, one for each stage that is run, got {len(values)}."
            for name, values in lists.items()
            if values is not None and len(values) != number
        ]

    def to_call(self, num_stages: int) -> dict[str, Any]:
        """
        Turns the options into arguments of a call of the pipeline.

        Args:
            num_stages (`int`): Number of stages.

        Returns:
            `dict`: The arguments.
        """
        guidance_scale, first_scale = self.guidance_scale, self.first_stage_guidance_scale
        if self.stage_guidance_scales is not None:
            guidance_scale = self.stage_guidance_scales
        elif first_scale is not None:  # which is not given with a token prior, nor without a latent embedder
            guidance_scale = [first_scale, *[guidance_scale] * (num_stages - 1)]
        return {
            "num_stages": num_stages,
            "num_inference_steps": self.stage_inference_steps or self.num_inference_steps,
            "guidance_scale": guidance_scale,
            "schedulers": self.stage_solvers,
            "prior_noise": self.prior_noise,
            "height": self.height,
            "width": self.width,
            **to_values(self.token_prior),
        }
