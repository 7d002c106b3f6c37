# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""What a guided evaluation is: classifier-free guidance over class and visual prior (paper, Section 3.3)."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .checks import check_at_least, check_choice, check_number
from .rectified_flow import NUM_TRAIN_TIMESTEPS
from .transformer_dod import DoDTransformer2DModel


TIME_ROUNDING = 1e-6  # times are fp32, and the ends of an interval are not
NULL_CONDITIONS = ("class_and_prior", "class", "prior")


def classifier_free_guidance(
    conditional: torch.Tensor, unconditional: torch.Tensor, guidance_scale: float | torch.Tensor
) -> torch.Tensor:
    """
    `unconditional + guidance_scale * (conditional - unconditional)`.

    Args:
        conditional (`torch.Tensor` of shape `(B, C, H, W)`): Prediction under the condition.
        unconditional (`torch.Tensor` of shape `(B, C, H, W)`): Prediction under the null condition.
        guidance_scale (`float` or `torch.Tensor` of shape `(B, 1, 1, 1)`):
            1 is the conditional prediction, 0 the unconditional one, above 1 extrapolates.

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`.
    """
    return unconditional + guidance_scale * (conditional - unconditional)


def power_cosine_scale(guidance_scale: float, sigma: torch.Tensor, power: float) -> torch.Tensor:
    """
    The power-cosine schedule of MDT (Gao et al. 2023): no guidance in pure noise, all of it at the data.

    Args:
        guidance_scale (`float`): The scale w at sigma = 0.
        sigma (`torch.Tensor`): Times in [0, 1], 0 = data.
        power (`float`): The larger, the later the guidance sets in.

    Returns:
        `torch.Tensor`: 1 + (w - 1) (1 - cos(pi (1 - sigma)^power)) / 2, of the shape of `sigma`.
    """
    return 1 + (guidance_scale - 1) * (1 - torch.cos(math.pi * (1 - sigma) ** power)) / 2


def rescale_guidance(guided: torch.Tensor, conditional: torch.Tensor, guidance_rescale: float) -> torch.Tensor:
    """
    Takes the standard deviation of a guided prediction back to that of the conditional one (Lin et al. 2023, Eqs. 15
    and 16), against oversaturation.

    Args:
        guided (`torch.Tensor` of shape `(B, C, H, W)`): The guided prediction.
        conditional (`torch.Tensor` of shape `(B, C, H, W)`): The conditional prediction.
        guidance_rescale (`float`): From 0, nothing, to 1, all the way.

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`.
    """
    dims = tuple(range(1, guided.ndim))
    std, guided_std = conditional.std(dim=dims, keepdim=True), guided.std(dim=dims, keepdim=True)
    ratio = torch.where(guided_std > 0, std / guided_std, 1.0)
    return guided * (guidance_rescale * ratio + (1 - guidance_rescale))


@dataclass(frozen=True)
class Guidance:
    """
    How predictions are guided, but for the scale.

    Args:
        null_condition (`str`, defaults to `"class_and_prior"`):
            What the null condition lacks, compared with the condition: `"class_and_prior"` is (null class, S),
            `"class"` (null class, prior) and `"prior"` (class, S). Without a prior it lacks the class.
        prior_scale (`float`, *optional*):
            A scale of its own for the prior, >= 0, in three evaluations: the guided velocity is v(null, S) + scale *
            (v(class, S) - v(null, S)) + prior_scale * (v(class, prior) - v(class, S)). Equal scales are the default.
        channels (`int`, *optional*): Guides the first channels only, >= 1; DiT, SiT and FiT guide 3 of 4.
        interval (`tuple[float, float]`, defaults to `(0.0, 1.0)`):
            Guides where low <= sigma <= high only (Kynkaanniemi et al. 2024).
        power (`float`, *optional*): Power of the schedule [`power_cosine_scale`], > 0; a constant scale if not given.
        rescale (`float`, defaults to 0.0): See [`rescale_guidance`], in [0, 1].
        cosine_threshold (`float`, *optional*):
            Stops to guide a sample for good once the cosine between its conditional and its unconditional velocity has
            reached this, in (-1, 1] (Adaptive Guidance, Castillo et al. 2023).
        transformer ([`DoDTransformer2DModel`], *optional*):
            Guides by a weaker model under the same condition in place of the null condition (autoguidance, Karras et
            al. 2024).

    Raises:
        `ValueError`, `TypeError`: a value is out of range, or two exclude each other. The messages name the arguments
            as those of [`DoDPipeline`].
    """

    null_condition: str = "class_and_prior"
    prior_scale: float | None = None
    channels: int | None = None
    interval: tuple[float, float] = (0.0, 1.0)
    power: float | None = None
    rescale: float = 0.0
    cosine_threshold: float | None = None
    transformer: DoDTransformer2DModel | None = None

    def __post_init__(self):
        check_choice("null_condition", self.null_condition, NULL_CONDITIONS)
        if self.prior_scale is not None:
            check_number("prior_guidance_scale", self.prior_scale, 0)
        if self.channels is not None:
            check_at_least("guidance_channels", self.channels, 1)
        if not isinstance(self.interval, (tuple, list)) or len(self.interval) != 2:
            raise ValueError(f"`guidance_interval` must be a pair (low, high) of sigmas, got {self.interval!r}.")
        for end in self.interval:
            check_number("guidance_interval", end, 0, 1)
        if self.interval[0] > self.interval[1]:
            raise ValueError(f"`guidance_interval` must be (low, high) with low <= high, got {self.interval}.")
        if self.power is not None:
            check_number("guidance_power", self.power, 0, open_minimum=True)
        check_number("guidance_rescale", self.rescale, 0, 1)
        if self.cosine_threshold is not None:
            check_number("guidance_cosine_threshold", self.cosine_threshold, -1, 1, open_minimum=True)
        exclusive = {
            "null_condition": self.null_condition != "class_and_prior",
            "prior_guidance_scale": self.prior_scale is not None,
            "guidance_transformer": self.transformer is not None,
        }
        given = [f"`{name}`" for name, is_given in exclusive.items() if is_given]
        if len(given) > 1:
            raise ValueError(f"Only one of {', '.join(f'`{name}`' for name in exclusive)} must be given, got {given}.")


@dataclass
class GuidedVelocity:
    """
    The velocity of a batch of samples under guidance, and how much of it was computed.

    Args:
        transformer ([`DoDTransformer2DModel`]): The model.
        batch_size (`int`): Number B of samples.
        guidance ([`Guidance`], *optional*): How they are guided; as in the paper if not given.
        attention_kwargs (`dict`, *optional*): Those of the model.
        cache_name (`str`, defaults to `"velocity"`):
            Name of the model's cache contexts, to which `_guided`, `_unguided` or `_partly_guided` is added. What a
            cache holds is dropped when the layout of the batch changes.
    """

    transformer: DoDTransformer2DModel
    batch_size: int
    guidance: Guidance | None = None
    attention_kwargs: dict[str, Any] | None = None
    cache_name: str = "velocity"

    def __post_init__(self):
        self.guidance = self.guidance or Guidance()
        #: Evaluations of each sample, and how many of them were guided, (B,) int64.
        self.num_evaluations = torch.zeros(self.batch_size, dtype=torch.int64)
        self.num_guided_evaluations = torch.zeros(self.batch_size, dtype=torch.int64)
        self._is_stopped = torch.zeros(self.batch_size, dtype=torch.bool)
        self._layout: tuple[list[int], list[bool]] | None = None

    def rows_to_guide(
        self, timestep: torch.Tensor | float, guidance_scale: float, indices: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Which samples need an unconditional prediction at a time.

        Args:
            timestep (`float` or `torch.Tensor` of shape `()` or `(b,)`): Time in [0, 1000], 0 = data.
            guidance_scale (`float`): The scale.
            indices (`torch.Tensor` of shape `(b,)`, *optional*): Which of the B samples there are; all if not given.

        Returns:
            `torch.Tensor` of shape `(b,)`: Booleans on the CPU.
        """
        is_stopped = self._is_stopped if indices is None else self._is_stopped[indices.cpu()]
        if guidance_scale == 1 and self.guidance.prior_scale in (None, 1):
            return torch.zeros_like(is_stopped)
        rows = ~is_stopped
        if tuple(self.guidance.interval) != (0.0, 1.0):  # a time on an accelerator is waited for only where it matters
            low, high = self.guidance.interval
            sigma = torch.as_tensor(timestep).double().cpu() / NUM_TRAIN_TIMESTEPS
            rows = rows & (sigma >= low - TIME_ROUNDING) & (sigma <= high + TIME_ROUNDING)
        return rows

    def __call__(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor,
        prior_embeds: torch.Tensor | None,
        guidance_scale: float,
        indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        The guided velocity, in one batched pass [conditional, unconditional].

        Samples with a prior come first in it: only they have a modulation per token, the others one that is a token
        wide. Where a sample is not guided, its unconditional prediction is not computed.

        Args:
            latents (`torch.Tensor` of shape `(b, C, H, W)`): Noisy latents.
            timestep (`float` or `torch.Tensor` of shape `()` or `(b,)`): Time in [0, 1000], 0 = data.
            class_labels (`torch.Tensor` of shape `(b,)`): Class ids.
            prior_embeds (`torch.Tensor` of shape `(b, T, d_l)` or `None`): Visual priors.
            guidance_scale (`float`): The scale, see [`classifier_free_guidance`].
            indices (`torch.Tensor` of shape `(b,)`, *optional*): Which of the B samples these are; all if not given.

        Returns:
            `torch.Tensor` of shape `(b, C, H, W)`, in fp32.
        """
        guidance = self.guidance
        samples = torch.arange(self.batch_size) if indices is None else indices.cpu()
        guided_rows = self.rows_to_guide(timestep, guidance_scale, indices)
        rows = torch.nonzero(guided_rows)[:, 0].to(latents.device)
        self.num_evaluations[samples] += 1
        self.num_guided_evaluations[samples[guided_rows]] += 1
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=latents.device).expand(latents.shape[0])
        layout = (samples.tolist(), guided_rows.tolist())
        if layout != self._layout:  # other samples, or a batch of another shape, than caches have seen
            for model in (self.transformer, guidance.transformer):
                if model is not None:
                    model._reset_stateful_cache()
            self._layout = layout
        if len(rows) == 0:
            return self._predict("unguided", latents, timestep, class_labels, prior_embeds)

        kind = "guided" if len(rows) == len(latents) else "partly_guided"
        null_labels = torch.full_like(class_labels[rows], self.transformer.config.num_classes)
        some_latents, some_timesteps = latents[rows], timestep[rows]
        some_priors = None if prior_embeds is None else prior_embeds[rows]
        without_class = None  # of separate scales
        if guidance.transformer is not None:
            velocity = self._predict("unguided", latents, timestep, class_labels, prior_embeds)
            weak = guidance.transformer
            weak_priors = None
            if some_priors is not None and weak.config.prior_embed_dim is not None:
                weak_priors = some_priors.to(weak.dtype)
            with weak.cache_context(f"{self.cache_name}_weak"):
                unconditional = weak(
                    some_latents.to(weak.dtype), some_timesteps, class_labels[rows], weak_priors
                ).sample.float()
        else:
            labels, priors, copies = [class_labels], prior_embeds, 1
            if prior_embeds is not None and guidance.prior_scale not in (None, guidance_scale):
                labels += [class_labels[rows], null_labels]  # (class, S), (null class, S)
                copies = 2
            elif prior_embeds is not None and guidance.null_condition == "prior":
                labels += [class_labels[rows]]
            else:
                labels += [null_labels]
                if prior_embeds is not None and guidance.null_condition == "class":
                    priors = torch.cat([prior_embeds, some_priors])
            velocity, *others = self._predict(
                kind,
                torch.cat([latents] + [some_latents] * copies),
                torch.cat([timestep] + [some_timesteps] * copies),
                torch.cat(labels),
                priors,
            ).split([len(latents)] + [len(rows)] * copies)
            unconditional = others[0]
            if copies == 2:
                unconditional, without_class = others[1], others[0]

        conditional = velocity[rows]
        scale = guidance_scale
        if guidance.power is not None:
            sigma = (some_timesteps / NUM_TRAIN_TIMESTEPS).clamp(0, 1).reshape(-1, 1, 1, 1)
            scale = power_cosine_scale(guidance_scale, sigma, guidance.power)
        if without_class is None:
            guided = classifier_free_guidance(conditional, unconditional, scale)
        else:
            prior_scale = guidance.prior_scale
            if guidance.power is not None:
                prior_scale = power_cosine_scale(prior_scale, sigma, guidance.power)
            guided = classifier_free_guidance(without_class, unconditional, scale)
            guided = guided + prior_scale * (conditional - without_class)
        if guidance.channels is not None:
            guided = torch.cat([guided[:, : guidance.channels], conditional[:, guidance.channels :]], dim=1)
        if guidance.rescale > 0:
            guided = rescale_guidance(guided, conditional, guidance.rescale)
        if guidance.cosine_threshold is not None:
            cosine = F.cosine_similarity(conditional.flatten(1), unconditional.flatten(1))
            self._is_stopped[samples[guided_rows]] = (cosine >= guidance.cosine_threshold).cpu()
        return guided if len(rows) == len(latents) else velocity.index_copy(0, rows, guided)

    def _predict(
        self,
        kind: str,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        prior_embeds: torch.Tensor | None,
    ) -> torch.Tensor:
        with self.transformer.cache_context(f"{self.cache_name}_{kind}"):
            return self.transformer(
                latents.to(self.transformer.dtype),
                timestep,
                class_labels,
                prior_embeds=prior_embeds,
                attention_kwargs=self.attention_kwargs,
            ).sample.float()
