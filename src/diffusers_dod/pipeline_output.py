# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Output of the DoD pipeline: images, those of each stage, and what the stages cost."""

from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput


@dataclass
class DoDStageStatistics(BaseOutput):
    """
    Cost of a stage, by sample.

    Args:
        num_evaluations (`torch.Tensor` of shape `(B,)`): Evaluations of the conditional velocity, int64.
        num_guided_evaluations (`torch.Tensor` of shape `(B,)`):
            Guided evaluations among them. Guidance intervals and thresholds saved the difference.
        num_accepted_steps (`torch.Tensor` of shape `(B,)`, *optional*): Steps that an adaptive solver accepted.
        num_rejected_steps (`torch.Tensor` of shape `(B,)`, *optional*): Steps that an adaptive solver took again.
    """

    num_evaluations: torch.Tensor
    num_guided_evaluations: torch.Tensor
    num_accepted_steps: torch.Tensor | None = None
    num_rejected_steps: torch.Tensor | None = None


@dataclass
class DoDPipelineOutput(BaseOutput):
    """
    Output of [`DoDPipeline`].

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            The images of the last stage: a list of B PIL images, an array (B, H, W, 3) or a tensor (B, 3, H, W) in
            [0, 1], or with `output_type="latent"` the normalised latents (B, C, h, w).
        stages (`list`, *optional*): Images of every stage of the call, in the form of `images`, if
            `return_stages=True`.
        stage_latents (`list[torch.Tensor]`, *optional*):
            Normalised latents (B, C, h, w) of every stage of the call, if `return_stages=True`.
        statistics (`list[DoDStageStatistics]`, *optional*): Cost of every stage that was run.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    stages: list | None = None
    stage_latents: list[torch.Tensor] | None = None
    statistics: list[DoDStageStatistics] | None = None
