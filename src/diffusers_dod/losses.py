# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
The joint training objective of backbone and LEM (paper, Sections 3.1 and 3.3).

Representation alignment (REPA, Yu et al. 2024, arXiv:2410.06940) is an optional second loss.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from .checks import check_at_least
from .latent_embedding import VisualPriorMixin, check_visual_prior
from .rectified_flow import NUM_TRAIN_TIMESTEPS, interpolate, velocity_target
from .transformer_dod import DoDTransformer2DModel


class RepresentationProjector(nn.Module):
    """
    REPA's trainable map from tokens to a vision model's features: three Linears with SiLU in between.

    Args:
        dim (`int`): Width d of the tokens.
        feature_dim (`int`): Width D of the features.
        hidden_dim (`int`, defaults to 2048): Width of the hidden layers. The default is REPA's.

    Raises:
        `ValueError`, `TypeError`: a width is not an integer of at least 1.
    """

    def __init__(self, dim: int, feature_dim: int, hidden_dim: int = 2048):
        super().__init__()
        for name, value in {"dim": dim, "feature_dim": feature_dim, "hidden_dim": hidden_dim}.items():
            check_at_least(name, value, 1)
        self.feature_dim = feature_dim
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden_dim),
            nn.SiLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.SiLU(),
            nn.Linear(hidden_dim, feature_dim),
        )
        for layer in self.mlp[::2]:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Maps `tokens` (..., dim) to (..., feature_dim)."""
        return self.mlp(tokens)


def alignment_loss(projected: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """
    REPA's loss by sample: the negative cosine similarity of tokens and features, averaged over the tokens.

    Args:
        projected (`torch.Tensor` of shape `(B, rows, columns, D)`): The projected tokens on their grid.
        features (`torch.Tensor` of shape `(B, rows', columns', D)`):
            Features of the clean images. If their grid differs from that of the tokens, they are resized to it:
            bilinearly, with antialiasing where they shrink.

    Returns:
        `torch.Tensor` of shape `(B,)`: Values in [-1, 1], in fp32.

    Raises:
        `ValueError`: the number of samples or the width differs.
    """
    batch_size, *grid, feature_dim = projected.shape
    if features.ndim != 4 or (features.shape[0], features.shape[3]) != (batch_size, feature_dim):
        raise ValueError(
            f"`features` must have shape ({batch_size}, rows, columns, {feature_dim}), got {tuple(features.shape)}."
        )
    features = features.float()
    if list(features.shape[1:3]) != grid:
        channels_first = features.permute(0, 3, 1, 2)
        features = F.interpolate(channels_first, grid, mode="bilinear", antialias=True).permute(0, 2, 3, 1)
    return -F.cosine_similarity(projected.float(), features, dim=-1).mean(dim=(1, 2))


class DoDJointModel(nn.Module):
    """
    Backbone and LEM as one trainable module, so that data parallelism wraps both at once.

    The first `num_priors` samples of a batch get the prior of their own clean latents. The others get the sample token
    S: their prior was dropped, which happens with probability p_s (paper, Section 3.3).

    Args:
        transformer ([`DoDTransformer2DModel`]): The backbone.
        latent_embedder ([`VisualPriorMixin`], *optional*): The LEM or another; `None` trains a plain FiTv2.
        projector ([`RepresentationProjector`], *optional*):
            Projects the backbone's tokens for representation alignment. Only training uses it.
        prior_projector ([`RepresentationProjector`], *optional*):
            Projects the LEM's visual priors for representation alignment. Only training uses it.
        alignment_layer (`int`, defaults to 8):
            The backbone's tokens are aligned after this many blocks. REPA has 8 of 28, 8 of 24 and 4 of 12.

    Raises:
        `ValueError`, `TypeError`: the two models do not fit together, the backbone has no such block, or
            `prior_projector` comes without `projector` or `latent_embedder`.
    """

    def __init__(
        self,
        transformer: DoDTransformer2DModel,
        latent_embedder: VisualPriorMixin | None = None,
        projector: RepresentationProjector | None = None,
        prior_projector: RepresentationProjector | None = None,
        alignment_layer: int = 8,
    ):
        super().__init__()
        if latent_embedder is not None:
            check_visual_prior(latent_embedder, transformer)
        self.transformer = transformer
        self.latent_embedder = latent_embedder
        self.projector = projector
        self.prior_projector = prior_projector
        self.alignment_layer = alignment_layer
        if projector is not None:
            check_at_least("alignment_layer", alignment_layer, 1)
            num_layers = transformer.config.num_layers
            if alignment_layer > num_layers:
                raise ValueError(f"`alignment_layer` must be an integer in [1, {num_layers}], got {alignment_layer}.")
        if prior_projector is not None and (projector is None or latent_embedder is None):
            missing = "projector" if projector is None else "latent_embedder"
            raise ValueError(f"`{missing}` must be given where there is a `prior_projector`, got None.")

    def enable_gradient_checkpointing(self) -> None:
        """Makes blocks compute again in the backward pass, also in the encoder if it supports that."""
        self.transformer.enable_gradient_checkpointing()
        if self.latent_embedder is not None and self.latent_embedder._supports_gradient_checkpointing:
            self.latent_embedder.enable_gradient_checkpointing()

    def forward(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        sigmas: torch.Tensor,
        class_labels: torch.Tensor,
        num_priors: int = 0,
        features: torch.Tensor | None = None,
        prior_noise: torch.Tensor | None = None,
        prior_sigmas: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        The rectified-flow loss by sample (paper, Eq. 3): the mean over its elements of (noise - latents - v)^2.

        Args:
            latents (`torch.Tensor` of shape `(B, C, H, W)`): Clean, normalised latents; samples with a prior first.
            noise (`torch.Tensor` of shape `(B, C, H, W)`): Standard normal noise.
            sigmas (`torch.Tensor` of shape `(B,)`): Time in [0, 1], 0 = data.
            class_labels (`torch.Tensor` of shape `(B,)`): Class ids, `num_classes` where the class is dropped.
            num_priors (`int`, defaults to 0): Number K of leading samples that get their own visual prior.
            features (`torch.Tensor` of shape `(B, rows, columns, D)`, *optional*):
                A vision model's features of the clean images, in the order of the latents.
            prior_noise (`torch.Tensor` of shape `(B, C, H, W)`, *optional*):
                Standard normal noise that the latents are mixed with for the LEM (conditioning augmentation). By
                default it sees them clean.
            prior_sigmas (`torch.Tensor` of shape `(B,)`, *optional*): Level of that noise in [0, 1].

        Returns:
            `torch.Tensor` of shape `(B,)`, in fp32. With `features` the tuple `(loss, alignment, prior_alignment)`:
            the last two are the [`alignment_loss`] of the backbone's tokens, (B,), and of the visual priors, (K,).
            Without a `prior_projector` the last one is empty.

        Raises:
            `ValueError`: a shape does not fit, or there are features and no projector.
        """
        if features is not None and self.projector is None:
            raise ValueError(
                "`features` must be None: this model has no `projector`, "
                f"got a tensor of shape {tuple(features.shape)}."
            )
        if (prior_noise is None) != (prior_sigmas is None):
            given, missing = ("noise", "sigmas") if prior_sigmas is None else ("sigmas", "noise")
            raise ValueError(f"`prior_{missing}` must be given with `prior_{given}`, got None.")
        prior_embeds = None
        if num_priors > 0:
            seen = latents[:num_priors]
            if prior_noise is not None:
                seen = interpolate(seen, prior_noise[:num_priors], prior_sigmas[:num_priors])
            prior_embeds = self.latent_embedder(seen).prior_embeds
        noisy_latents = interpolate(latents, noise, sigmas)
        output = self.transformer(
            noisy_latents,
            sigmas * NUM_TRAIN_TIMESTEPS,
            class_labels,
            prior_embeds=prior_embeds,
            output_hidden_states=features is not None,
        )
        loss = F.mse_loss(output.sample.float(), velocity_target(latents, noise).float(), reduction="none")
        loss = loss.mean(dim=(1, 2, 3)) + self._touch_unused(num_priors, latents.shape[0], features is not None)
        if features is None:
            return loss

        patch_size = self.transformer.config.patch_size
        grid = (latents.shape[2] // patch_size, latents.shape[3] // patch_size)
        tokens = output.hidden_states[self.alignment_layer].unflatten(1, grid)
        alignment = alignment_loss(self.projector(tokens), features)
        prior_alignment = loss.new_empty(0)
        if self.prior_projector is not None and num_priors > 0:
            prior_tokens = prior_embeds.unflatten(1, grid)
            prior_alignment = alignment_loss(self.prior_projector(prior_tokens), features[:num_priors])
        return loss, alignment, prior_alignment

    def _touch_unused(self, num_priors: int, batch_size: int, is_aligned: bool) -> torch.Tensor | float:
        """
        Returns zero with every unused parameter in its graph, as data parallelism waits for the gradients of all.

        A batch without priors does not use the LEM. A batch with all its priors does not use S. A batch without
        features does not use the projectors.
        """
        unused: list[nn.Parameter] = []
        if self.latent_embedder is not None and num_priors == 0:
            unused += [*self.latent_embedder.parameters(), *self.transformer.prior_proj.parameters()]
        if self.latent_embedder is not None and num_priors == batch_size:
            unused += [self.transformer.sample_token]
        if self.projector is not None and not is_aligned:
            unused += self.projector.parameters()
        if self.prior_projector is not None and not (is_aligned and num_priors > 0):
            unused += self.prior_projector.parameters()
        return sum((0.0 * parameter.sum() for parameter in unused), 0.0)
