# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Diffusion on Diffusion (DoD) for Diffusers: multi-stage class-conditional image generation with visual priors."""

import diffusers
from diffusers import ModelMixin, SchedulerMixin
from diffusers.pipelines import pipeline_loading_utils

from .guidance import Guidance
from .latent_embedding import LatentEmbeddingModule, LatentEmbeddingOutput, VisualPriorMixin
from .pipeline_dod import DoDPipeline
from .pipeline_output import DoDPipelineOutput
from .scheduling_dod import DoDFlowMatchScheduler, DoDFlowMatchSchedulerOutput
from .shipped import desk_checkpoint
from .token_prior import TokenPrior
from .transformer_dod import DoDTransformer2DModel, DoDTransformerOutput


__version__ = "0.1.0.dev0"

__all__ = [
    "DoDFlowMatchScheduler",
    "DoDFlowMatchSchedulerOutput",
    "DoDPipeline",
    "DoDPipelineOutput",
    "DoDTransformer2DModel",
    "DoDTransformerOutput",
    "Guidance",
    "LatentEmbeddingModule",
    "LatentEmbeddingOutput",
    "ModelMixin",
    "SchedulerMixin",
    "TokenPrior",
    "VisualPriorMixin",
    "desk_checkpoint",
]


def _register_with_diffusers() -> None:
    """
    Makes Diffusers save and load these classes under the flat library name `diffusers_dod`.

    It looks base classes up by name in the library of a component, which is why `ModelMixin` and `SchedulerMixin` are
    names of this package too, and pipelines and automatic models by name in `diffusers` itself. An encoder of visual
    priors in another module is saved under that module's name, and there has `VisualPriorMixin` for a base class.
    """
    methods = ["save_pretrained", "from_pretrained"]
    classes = dict.fromkeys(("ModelMixin", "SchedulerMixin", "VisualPriorMixin"), methods)
    pipeline_loading_utils.LOADABLE_CLASSES[__name__] = classes
    pipeline_loading_utils.ALL_IMPORTABLE_CLASSES.update(classes)
    for cls in (DoDPipeline, DoDTransformer2DModel, LatentEmbeddingModule, TokenPrior, DoDFlowMatchScheduler):
        setattr(diffusers, cls.__name__, cls)


_register_with_diffusers()
