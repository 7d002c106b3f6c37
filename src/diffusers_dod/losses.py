# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""The joint training objective of backbone and LEM (paper, Sections 3.1 and 3.3)."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from .latent_embedding import LatentEmbeddingModule
from .rectified_flow import NUM_TRAIN_TIMESTEPS, interpolate, velocity_target
from .transformer_dod import DoDTransformer2DModel


class DoDJointModel(nn.Module):
    """
    Backbone and LEM as the one module that is trained, so that data parallelism wraps both at once.

    The prior comes from the clean latents themselves, and only for the first `num_priors` samples of a batch; the
    others learn with the sample token S (paper, Section 3.3: dropped with probability p_s).

    Args:
        transformer ([`DoDTransformer2DModel`]): The backbone.
        latent_embedder ([`LatentEmbeddingModule`], *optional*): The LEM; `None` trains a plain FiTv2.
    """

    def __init__(self, transformer: DoDTransformer2DModel, latent_embedder: LatentEmbeddingModule | None = None):
        super().__init__()
        self.transformer = transformer
        self.latent_embedder = latent_embedder

    def forward(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        sigmas: torch.Tensor,
        class_labels: torch.Tensor,
        num_priors: int = 0,
    ) -> torch.Tensor:
        """
        The rectified-flow loss of each sample (paper, Eq. 3): mean over its elements of (noise - latents - v)^2.

        Args:
            latents (`torch.Tensor` of shape `(B, C, H, W)`): Clean, normalised latents, those with a prior first.
            noise (`torch.Tensor` of shape `(B, C, H, W)`): Standard normal noise.
            sigmas (`torch.Tensor` of shape `(B,)`): Time in [0, 1], 0 = data.
            class_labels (`torch.Tensor` of shape `(B,)`): Class ids, `num_classes` where the class is dropped.
            num_priors (`int`, defaults to 0): Number K of leading samples that are given their own visual prior.

        Returns:
            `torch.Tensor` of shape `(B,)`, in fp32.
        """
        prior_embeds = self.latent_embedder(latents[:num_priors]).prior_embeds if num_priors > 0 else None
        noisy_latents = interpolate(latents, noise, sigmas)
        velocity = self.transformer(
            noisy_latents, sigmas * NUM_TRAIN_TIMESTEPS, class_labels, prior_embeds=prior_embeds
        ).sample
        loss = F.mse_loss(velocity.float(), velocity_target(latents, noise).float(), reduction="none")
        return loss.mean(dim=(1, 2, 3)) + self._touch_unused(num_priors, latents.shape[0])

    def _touch_unused(self, num_priors: int, batch_size: int) -> torch.Tensor | float:
        """
        Zero, but with every parameter in the graph: a batch without priors does not use the LEM and one with all its
        priors does not use S, and data parallelism waits for the gradients of both.
        """
        unused: list[nn.Parameter] = []
        if self.latent_embedder is not None and num_priors == 0:
            unused += [*self.latent_embedder.parameters(), *self.transformer.prior_proj.parameters()]
        if self.latent_embedder is not None and num_priors == batch_size:
            unused += [self.transformer.sample_token]
        return sum((0.0 * parameter.sum() for parameter in unused), 0.0)
