# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""What a guided evaluation is: classifier-free guidance over class and visual prior (paper, Section 3.3)."""

from typing import Any

import torch

from .transformer_dod import DoDTransformer2DModel


def classifier_free_guidance(
    conditional: torch.Tensor, unconditional: torch.Tensor, guidance_scale: float
) -> torch.Tensor:
    """
    `unconditional + guidance_scale * (conditional - unconditional)`, on all channels.

    Args:
        conditional (`torch.Tensor` of shape `(B, C, H, W)`): Prediction under the condition.
        unconditional (`torch.Tensor` of shape `(B, C, H, W)`): Prediction under the null condition.
        guidance_scale (`float`): 1 is the conditional prediction, 0 the unconditional one, above 1 extrapolates.

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`.
    """
    return unconditional + guidance_scale * (conditional - unconditional)


def guided_velocity(
    transformer: DoDTransformer2DModel,
    latents: torch.Tensor,
    timestep: torch.Tensor | float,
    class_labels: torch.Tensor,
    prior_embeds: torch.Tensor | None,
    guidance_scale: float,
    attention_kwargs: dict[str, Any] | None = None,
) -> torch.Tensor:
    """
    The velocity under classifier-free guidance, in one batched pass [conditional, unconditional].

    The null condition is (null class, sample token S): only the conditional half has priors, so its modulation is per
    token and that of the unconditional half one token wide. At a scale of 1 the unconditional half is not computed.

    Args:
        transformer ([`DoDTransformer2DModel`]): The model.
        latents (`torch.Tensor` of shape `(B, C, H, W)`): Noisy latents.
        timestep (`float` or `torch.Tensor` of shape `()` or `(B,)`): Time in [0, 1000], 0 = data.
        class_labels (`torch.Tensor` of shape `(B,)`): Class ids.
        prior_embeds (`torch.Tensor` of shape `(B, T, d_l)` or `None`): Visual priors of the conditional half.
        guidance_scale (`float`): The scale, see [`classifier_free_guidance`].
        attention_kwargs (`dict`, *optional*): Those of the model.

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`, in fp32.
    """
    model_input = latents.to(transformer.dtype)
    if guidance_scale == 1:
        return transformer(
            model_input, timestep, class_labels, prior_embeds=prior_embeds, attention_kwargs=attention_kwargs
        ).sample.float()
    if isinstance(timestep, torch.Tensor) and timestep.ndim == 1:
        timestep = torch.cat([timestep, timestep])
    null_labels = torch.full_like(class_labels, transformer.config.num_classes)
    velocity = transformer(
        torch.cat([model_input, model_input]),
        timestep,
        torch.cat([class_labels, null_labels]),
        prior_embeds=prior_embeds,
        attention_kwargs=attention_kwargs,
    ).sample
    conditional, unconditional = velocity.float().chunk(2)
    return classifier_free_guidance(conditional, unconditional, guidance_scale)
