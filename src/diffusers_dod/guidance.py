# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Guidance: the wanted predictions, one batched pass, and their combination (paper, Section 3.3).

A guided velocity starts from the weakest prediction, and takes a step towards each stronger one. Each step has a
scale.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.guiders import BaseGuidance
from diffusers.utils import logging

from .checks import check_at_least, check_choice, check_number
from .devices import send
from .rectified_flow import NUM_TRAIN_TIMESTEPS
from .stages import Stage, is_a, is_per_stage, per_stage
from .transformer_dod import DoDTransformer2DModel


logger = logging.get_logger(__name__)

#: Guiders of Diffusers that fail on images: the norm over three dimensions is none of PyTorch's `torch.norm`.
FAILING_GUIDERS = ("MagnitudeAwareGuidance",)
TIME_ROUNDING = 1e-6  # times are fp32, and the ends of an interval are not


@dataclass(frozen=True)
class Prediction:
    """
    A velocity, described by its condition.

    Args:
        has_class (`bool`, defaults to `True`): Whether the condition has the class. If not, it has the null class.
        has_prior (`bool`, defaults to `True`): Whether the condition has the visual prior, if there is one. If not, it
            has S.
        is_weak (`bool`, defaults to `False`): Whether the weaker model predicts it.
    """

    has_class: bool = True
    has_prior: bool = True
    is_weak: bool = False


NULL_CONDITIONS = {
    "class_and_prior": Prediction(has_class=False, has_prior=False),
    "class": Prediction(has_class=False),
    "prior": Prediction(has_prior=False),
}


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


def combine(predictions: Sequence[torch.Tensor], scales: Sequence[float | torch.Tensor]) -> torch.Tensor:
    """
    Steps from the weakest prediction to the strongest. Two predictions give [`classifier_free_guidance`].

    Args:
        predictions (`Sequence[torch.Tensor]`): Predictions (B, C, H, W), the weakest first, the conditional one last.
        scales (`Sequence[float | torch.Tensor]`):
            Scale of each step, a number or (B, 1, 1, 1). If all are 1, the result is the conditional prediction.

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`.
    """
    guided = classifier_free_guidance(predictions[1], predictions[0], scales[0])
    for weak, strong, scale in zip(predictions[1:-1], predictions[2:], scales[1:], strict=True):
        guided = guided + scale * (strong - weak)
    return guided


def power_cosine_scale(guidance_scale: float, sigma: torch.Tensor, power: float) -> torch.Tensor:
    """
    The power-cosine schedule of MDT (Gao et al. 2023): no guidance in pure noise, full guidance at the data.

    Args:
        guidance_scale (`float`): The scale w at sigma = 0.
        sigma (`torch.Tensor`): Times in [0, 1], 0 = data.
        power (`float`): Exponent. A larger one starts the guidance later.

    Returns:
        `torch.Tensor`: 1 + (w - 1) (1 - cos(pi (1 - sigma)^power)) / 2, of the shape of `sigma`.
    """
    return 1 + (guidance_scale - 1) * (1 - torch.cos(math.pi * (1 - sigma) ** power)) / 2


def rescale_guidance(guided: torch.Tensor, conditional: torch.Tensor, guidance_rescale: float) -> torch.Tensor:
    """
    Rescales a guided prediction to the conditional one's standard deviation (Lin et al. 2023, Eqs. 15 and 16).

    This reduces oversaturation.

    Args:
        guided (`torch.Tensor` of shape `(B, C, H, W)`): The guided prediction.
        conditional (`torch.Tensor` of shape `(B, C, H, W)`): The conditional prediction.
        guidance_rescale (`float`): Strength in [0, 1]. 0 changes nothing, 1 matches the standard deviation.

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`.
    """
    dims = tuple(range(1, guided.ndim))
    std, guided_std = conditional.std(dim=dims, keepdim=True), guided.std(dim=dims, keepdim=True)
    ratio = torch.where(guided_std > 0, std / guided_std, 1.0)
    return guided * (guidance_rescale * ratio + (1 - guidance_rescale))


def _field(default: Any, help: str, **description: Any) -> Any:
    """Declares a field with what its option says in `--help`."""
    return field(default=default, metadata={"help": help, **description})


@dataclass(frozen=True)
class Guidance:
    """
    Settings of guidance, apart from the scale.

    Args:
        null_condition (`str`, defaults to `"class_and_prior"`):
            Part of the condition that the null condition lacks: `"class_and_prior"` is (null class, S), `"class"` is
            (null class, prior), and `"prior"` is (class, S). Without a prior it lacks the class.
        prior_scale (`float`, *optional*):
            Separate scale for the prior, >= 0, with three evaluations. The guided velocity is v(null, S) + scale *
            (v(class, S) - v(null, S)) + prior_scale * (v(class, prior) - v(class, S)). By default scales are equal.
        channels (`int`, *optional*): Number of leading channels to guide, >= 1. DiT, SiT and FiT guide 3 of 4.
        interval (`tuple[float, float]`, defaults to `(0.0, 1.0)`):
            Interval of guidance: only where low <= sigma <= high (Kynkaanniemi et al. 2024).
        power (`float`, *optional*):
            Power of the schedule [`power_cosine_scale`], > 0. By default the scale is constant.
        rescale (`float`, defaults to 0.0): Strength of [`rescale_guidance`], in [0, 1].
        cosine_threshold (`float`, *optional*):
            Guidance of a sample stops for good once the cosine between its conditional and its unconditional velocity
            reaches this threshold in (-1, 1] (Adaptive Guidance, Castillo et al. 2023).
        transformer ([`DoDTransformer2DModel`], *optional*):
            A weaker model that predicts under the same condition, in place of the null condition (autoguidance, Karras
            et al. 2024).

    Raises:
        `ValueError`, `TypeError`: a value is out of range, or two exclude each other.
    """

    null_condition: str = _field("class_and_prior", "Part of the condition that the null condition lacks.")
    prior_scale: float | None = _field(None, "Separate scale for the prior, >= 0, with three evaluations.")
    channels: int | None = _field(None, "Leading channels to guide, >= 1; all by default.")
    interval: tuple[float, float] = _field(
        (0.0, 1.0), "Sigmas in [0, 1] between which stages are guided.", metavar=("LOW", "HIGH")
    )
    power: float | None = _field(None, "Power of the power-cosine schedule, > 0; a constant scale by default.")
    rescale: float = _field(0.0, "Strength in [0, 1] of the rescaling against oversaturation.")
    cosine_threshold: float | None = _field(
        None, "Cosine in (-1, 1] of both velocities, from which a sample is not guided any more."
    )
    transformer: DoDTransformer2DModel | None = None

    def __post_init__(self):
        check_choice("null_condition", self.null_condition, tuple(NULL_CONDITIONS))
        if self.prior_scale is not None:
            check_number("prior_scale", self.prior_scale, 0)
        if self.channels is not None:
            check_at_least("channels", self.channels, 1)
        if isinstance(self.interval, list):
            object.__setattr__(self, "interval", tuple(self.interval))
        if isinstance(self.interval, (np.ndarray, torch.Tensor)):
            object.__setattr__(self, "interval", tuple(self.interval.tolist()) if self.interval.ndim == 1 else ())
        if not isinstance(self.interval, tuple) or len(self.interval) != 2:
            raise ValueError(f"`interval` must be a pair (low, high) of sigmas, got {self.interval!r}.")
        for end in self.interval:
            check_number("interval", end, 0, 1)
        if self.interval[0] > self.interval[1]:
            raise ValueError(f"`interval` must be (low, high) with low <= high, got {self.interval}.")
        if self.power is not None:
            check_number("power", self.power, 0, open_minimum=True)
        check_number("rescale", self.rescale, 0, 1)
        if self.cosine_threshold is not None:
            check_number("cosine_threshold", self.cosine_threshold, -1, 1, open_minimum=True)
        exclusive = {
            "null_condition": self.null_condition != "class_and_prior",
            "prior_scale": self.prior_scale is not None,
            "transformer": self.transformer is not None,
        }
        given = [f"`{name}`" for name, is_given in exclusive.items() if is_given]
        if len(given) > 1:
            raise ValueError(f"Only one of {', '.join(f'`{name}`' for name in exclusive)} must be given, got {given}.")


def check_guidance(
    guidance: Guidance | BaseGuidance, transformer: DoDTransformer2DModel, num_stages: int, stages: Sequence[Stage]
) -> None:
    """
    Raises unless guidance fits the model and the stages of a call.

    Args:
        guidance ([`Guidance`] or one of Diffusers' guiders): The guidance.
        transformer ([`DoDTransformer2DModel`]): The model.
        num_stages (`int`): Number of stages of the call, including a stage that a given prior replaces.
        stages (`Sequence[Stage]`): The stages to run.

    Raises:
        `TypeError`, `ValueError`: the guidance has another type, or does not fit.
    """
    if is_a(guidance, "BaseGuidance"):
        _check_guider(guidance, stages)
        return
    if not is_a(guidance, "Guidance"):
        raise TypeError(
            "`guidance` must be a `Guidance` or one of Diffusers' guiders, "
            f"got {guidance!r} of type {type(guidance).__name__}."
        )
    config, weak = transformer.config, guidance.transformer
    if guidance.channels is not None and guidance.channels > config.in_channels:
        raise ValueError(f"`channels` of `guidance` must be in [1, {config.in_channels}], got {guidance.channels}.")
    for name, value, default in (
        ("null_condition", guidance.null_condition, "class_and_prior"),
        ("prior_scale", guidance.prior_scale, None),
    ):
        if value != default and num_stages == 1:
            raise ValueError(
                f"`{name}` of `guidance` must be {default!r} with one stage, which has no prior, got {value!r}."
            )
    if weak is None:
        return
    if not is_a(weak, "DoDTransformer2DModel"):
        raise TypeError(
            f"`transformer` of `guidance` must be of type DoDTransformer2DModel, got {type(weak).__name__}."
        )
    for name in ("in_channels", "num_classes", "patch_size"):
        if weak.config[name] != config[name]:
            raise ValueError(
                f"`transformer` of `guidance` must have the pipeline's `{name}`, {config[name]}, "
                f"got {weak.config[name]}."
            )
    if config.prior_embed_dim is not None and weak.config.prior_embed_dim not in (None, config.prior_embed_dim):
        raise ValueError(
            "`transformer` of `guidance` must have the pipeline's `prior_embed_dim`, "
            f"{config.prior_embed_dim}, or None, got {weak.config.prior_embed_dim}."
        )


def warn_of_idle_arguments(
    stages: Sequence[Stage],
    num_inference_steps: int | Sequence[int | None] | None,
    guidance_scale: float | Sequence[float | None] | None,
    guidance: Guidance | BaseGuidance,
    has_priors: bool,
) -> None:
    """
    Warns of numbers of steps, of a scale and of guidance that no stage uses.

    Args:
        stages (`Sequence[Stage]`): The stages to run.
        num_inference_steps (`int` or `Sequence[int | None]` or `None`): The argument of the call.
        guidance_scale (`float` or `Sequence[float | None]` or `None`): The argument of the call.
        guidance ([`Guidance`] or one of Diffusers' guiders): The guidance.
        has_priors (`bool`): Whether the model has a latent embedder.
    """
    given_steps = per_stage("num_inference_steps", num_inference_steps, len(stages))
    idle = [stage.is_adaptive and steps is not None for stage, steps in zip(stages, given_steps, strict=True)]
    if any(idle) if is_per_stage(num_inference_steps) else all(idle):
        logger.warning(
            f"`num_inference_steps` = {num_inference_steps} has no effect where the solver chooses its own steps."
        )
    is_single = guidance_scale is not None and not is_per_stage(guidance_scale)
    if is_single and has_priors and stages[-1].number == 1:
        logger.warning(
            f"`guidance_scale` = {guidance_scale} has no effect with one stage: a single scale applies from stage "
            f"2 on. `guidance_scale=[{guidance_scale}]` guides stage 1."
        )
    has_prior_scale = stages[-1].number > 1 and getattr(guidance, "prior_scale", None) not in (None, 1)
    is_unguided = all(stage.guidance_scale == 1 for stage in stages) and not has_prior_scale
    is_asked_for = set(per_stage("guidance_scale", guidance_scale, len(stages))) == {1}
    if is_unguided and not is_asked_for and guidance != Guidance():
        logger.warning(
            f"The {type(guidance).__name__} given as `guidance` has no effect, as the scale of every stage is 1: "
            "`guidance_scale=[...]` with a scale for each stage that is run guides them."
        )


def _check_guider(guider: BaseGuidance, stages: Sequence[Stage]) -> None:
    # A guider that changes the model or asks for more predictions is for models of another kind.
    if type(guider).prepare_models.__qualname__ != "BaseGuidance.prepare_models":
        reason = "which changes the model"
    elif guider._input_predictions != ["pred_cond", "pred_uncond"]:
        reason = f"which combines {', '.join(guider._input_predictions)}"
    elif not hasattr(guider, "guidance_scale"):
        scales = getattr(guider, "guidance_scales", None)
        reason = "which has no such scale" if scales is None else f"which has several scales, {scales}"
    else:
        reason = None
    if reason is not None:
        raise ValueError(
            "`guidance` must be a guider with one `guidance_scale` that combines a conditional and an unconditional "
            f"prediction and leaves the model as it is, got {type(guider).__name__}, {reason}."
        )
    if any(is_a(guider, name) for name in FAILING_GUIDERS):
        raise ValueError(
            f"`guidance` must be another guider than {', '.join(FAILING_GUIDERS)}, whose norm fails on images in "
            f"Diffusers, got {type(guider).__name__}."
        )
    for stage in stages:
        if stage.guidance_scale not in (1, guider.guidance_scale):
            raise ValueError(
                f"`guidance_scale` must be None, {guider.guidance_scale} as in the guider, or 1 for a stage without "
                f"guidance, got {stage.guidance_scale}: set the scale of the guider."
            )
        if stage.is_adaptive and stage.guidance_scale != 1:
            raise ValueError(
                "`guidance` must be a `Guidance` in a stage whose solver chooses its own steps, as guiders count "
                f"steps, got {type(guider).__name__} in stage {stage.number}."
            )


def wanted_predictions(guidance: Guidance, guidance_scale: float, has_prior: bool) -> list[tuple[Prediction, float]]:
    """
    Lists the predictions that guidance needs besides the conditional one, and the scales of its steps.

    | guidance | from | by | over | by |
    | --- | --- | --- | --- | --- |
    | `null_condition="class_and_prior"`, or no prior | v(null, S) | w | | |
    | `null_condition="class"` | v(null, prior) | w | | |
    | `null_condition="prior"` | v(class, S) | w | | |
    | `prior_scale` | v(null, S) | w | v(class, S) | `prior_scale` |
    | `transformer` | v of the weaker model | w | | |

    Args:
        guidance ([`Guidance`]): The guidance.
        guidance_scale (`float`): The scale w.
        has_prior (`bool`): Whether the samples have visual priors.

    Returns:
        `list[tuple[Prediction, float]]`: Each prediction with the scale of the step to the next one, the weakest
        first; the last step leads to the conditional prediction.
    """
    if guidance.transformer is not None:
        return [(Prediction(is_weak=True), guidance_scale)]
    if not has_prior:
        return [(NULL_CONDITIONS["class_and_prior"], guidance_scale)]
    if guidance.prior_scale not in (None, guidance_scale):
        return [
            (NULL_CONDITIONS["class_and_prior"], guidance_scale),
            (NULL_CONDITIONS["prior"], guidance.prior_scale),
        ]
    return [(NULL_CONDITIONS[guidance.null_condition], guidance_scale)]


def _spread(timestep: torch.Tensor | float, latents: torch.Tensor) -> torch.Tensor:
    """The time of each of `latents` (b, ...), (b,) in fp32 on their device, without waiting for it."""
    if not isinstance(timestep, torch.Tensor) or (timestep.ndim == 0 and timestep.device.type == "cpu"):
        return torch.full((len(latents),), float(timestep), dtype=torch.float32, device=latents.device)
    return send(timestep.float(), latents.device).expand(len(latents))


@dataclass
class GuidedVelocity:
    """
    Guided velocity of a batch of samples, with a count of its evaluations.

    Args:
        transformer ([`DoDTransformer2DModel`]): The model.
        batch_size (`int`): Number B of samples.
        guidance ([`Guidance`] or one of Diffusers' guiders, *optional*): Settings of guidance. By default
            `Guidance()`, whose null condition lacks class and prior.
        attention_kwargs (`dict`, *optional*): Passed on to the model.
        cache_name (`str`, defaults to `"velocity"`):
            Name of the model's cache contexts; `_guided`, `_unguided` or `_partly_guided` is added to it. Caches are
            emptied when the layout of the batch changes.
    """

    transformer: DoDTransformer2DModel
    batch_size: int
    guidance: Guidance | BaseGuidance | None = None
    attention_kwargs: dict[str, Any] | None = None
    cache_name: str = "velocity"

    def __post_init__(self):
        self._guider = self.guidance if is_a(self.guidance, "BaseGuidance") else None
        self.guidance = Guidance() if self._guider is not None or self.guidance is None else self.guidance
        #: Evaluations of each sample, and how many of them were guided, (B,) int64.
        self.num_evaluations = torch.zeros(self.batch_size, dtype=torch.int64)
        self.num_guided_evaluations = torch.zeros(self.batch_size, dtype=torch.int64)
        self._is_stopped = torch.zeros(self.batch_size, dtype=torch.bool)
        self._layout: tuple[list[int], list[bool]] | None = None
        self._rows: slice | torch.Tensor = slice(0)  # of the guided samples, in that layout

    @cached_property
    def _dtype(self) -> torch.dtype:
        return self.transformer.dtype  # which asks all modules

    def rows_to_guide(
        self, timestep: torch.Tensor | float, guidance_scale: float, indices: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Tells which samples need an unconditional prediction at a time.

        Args:
            timestep (`float` or `torch.Tensor` of shape `()` or `(b,)`):
                Time in [0, 1000], 0 = data. One on another device than the CPU is waited for if the guidance has an
                interval.
            guidance_scale (`float`): The scale.
            indices (`torch.Tensor` of shape `(b,)`, *optional*): Indices of the samples among all B. By default all.

        Returns:
            `torch.Tensor` of shape `(b,)`: Booleans on the CPU.
        """
        is_stopped = self._is_stopped if indices is None else self._is_stopped[indices.cpu()]
        if guidance_scale == 1 and self.guidance.prior_scale in (None, 1):
            return torch.zeros_like(is_stopped)
        rows = ~is_stopped
        if self._guider is not None:
            rows = rows & (self._guider.num_conditions > 1)
        if tuple(self.guidance.interval) != (0.0, 1.0):
            low, high = self.guidance.interval
            sigma = torch.as_tensor(timestep).double().cpu() / NUM_TRAIN_TIMESTEPS
            rows = rows & (sigma >= low - TIME_ROUNDING) & (sigma <= high + TIME_ROUNDING)
        return rows

    def start_step(self, step: int, num_steps: int, timestep: torch.Tensor) -> None:
        """
        Tells a guider the current step; other guidance depends on the time alone.

        Args:
            step (`int`): Number of evaluations so far.
            num_steps (`int`): Number of all evaluations of the stage.
            timestep (`torch.Tensor`): Time of the next evaluation, as the scheduler counts it.
        """
        if self._guider is not None:
            self._guider.set_state(step=step, num_inference_steps=num_steps, timestep=timestep)

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
        Computes the guided velocity in one batched pass [conditional, unconditional].

        Samples with a prior come first in that batch. Only they have a modulation per token; for the others it is one
        token wide. The unconditional prediction of a sample that is not guided is not computed.

        With `timestep` and `indices` on the CPU the host does not wait for the device of the latents, unless the
        guidance has a `cosine_threshold`.

        Args:
            latents (`torch.Tensor` of shape `(b, C, H, W)`): Noisy latents.
            timestep (`float` or `torch.Tensor` of shape `()` or `(b,)`): Time in [0, 1000], 0 = data.
            class_labels (`torch.Tensor` of shape `(b,)`): Class ids.
            prior_embeds (`torch.Tensor` of shape `(b, T, d_l)` or `None`): Visual priors.
            guidance_scale (`float`): The scale, see [`classifier_free_guidance`].
            indices (`torch.Tensor` of shape `(b,)`, *optional*): Indices of the samples among all B. By default all.

        Returns:
            `torch.Tensor` of shape `(b, C, H, W)`, in fp32.
        """
        samples = torch.arange(self.batch_size) if indices is None else indices.cpu()
        guided_rows = self.rows_to_guide(timestep, guidance_scale, indices)
        self.num_evaluations[samples] += 1
        self.num_guided_evaluations[samples[guided_rows]] += 1
        self._lay_out(samples, guided_rows, latents.device)
        rows, is_guided = self._rows, bool(guided_rows.any())
        timestep = _spread(timestep, latents)
        steps = wanted_predictions(self.guidance, guidance_scale, prior_embeds is not None) if is_guided else []
        wanted, scales = [prediction for prediction, _ in steps], [scale for _, scale in steps]
        velocity, others = self._predict(
            wanted, rows, latents, timestep=timestep, class_labels=class_labels, prior_embeds=prior_embeds
        )
        if self._guider is not None and guidance_scale != 1:
            return self._combine_by_guider(velocity, others)
        if not is_guided:
            return velocity
        conditional = velocity[rows]
        guided = self._combine([*others, conditional], scales, timestep[rows])
        if self.guidance.cosine_threshold is not None:
            cosine = F.cosine_similarity(conditional.flatten(1), others[0].flatten(1))
            self._is_stopped[samples[guided_rows]] = (cosine >= self.guidance.cosine_threshold).cpu()
        return guided if isinstance(rows, slice) else velocity.index_copy(0, rows, guided)

    def _lay_out(self, samples: torch.Tensor, guided_rows: torch.Tensor, device: torch.device) -> None:
        """Finds the rows to guide, and resets the models' caches of other samples or of a batch of another shape."""
        layout = (samples.tolist(), guided_rows.tolist())
        if layout == self._layout:
            return
        for model in (self.transformer, self.guidance.transformer):
            if model is not None:
                model._reset_stateful_cache()
        self._layout = layout
        if bool(guided_rows.all()) or not bool(guided_rows.any()):  # all rows or none are no copy
            self._rows = slice(None if bool(guided_rows.all()) else 0)
        else:
            self._rows = send(guided_rows.nonzero()[:, 0], device)

    def _predict(
        self,
        wanted: list[Prediction],
        rows: slice | torch.Tensor,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        prior_embeds: torch.Tensor | None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Computes the conditional prediction of all samples and the wanted ones of some; one pass for each model."""
        own = [prediction for prediction in reversed(wanted) if not prediction.is_weak]  # those with a prior first
        some_labels = class_labels[rows]
        null_labels = torch.full_like(some_labels, self.transformer.config.num_classes)
        labels = [class_labels, *(some_labels if entry.has_class else null_labels for entry in own)]
        if prior_embeds is not None:
            prior_embeds = torch.cat([prior_embeds, *(prior_embeds[rows] for entry in own if entry.has_prior)])
        kind = "unguided" if not own else "guided" if isinstance(rows, slice) else "partly_guided"
        with self.transformer.cache_context(f"{self.cache_name}_{kind}"):
            velocities = self.transformer(
                torch.cat([latents] + [latents[rows]] * len(own)).to(self._dtype),
                torch.cat([timestep] + [timestep[rows]] * len(own)),
                torch.cat(labels),
                prior_embeds=prior_embeds,
                attention_kwargs=self.attention_kwargs,
            ).sample.float()
        velocity, *others = velocities.split([len(latents)] + [len(some_labels)] * len(own))
        by_condition = dict(zip(own, others, strict=True))
        if any(prediction.is_weak for prediction in wanted):
            some_priors = None if prior_embeds is None else prior_embeds[: len(latents)][rows]
            by_condition[Prediction(is_weak=True)] = self._predict_weakly(
                latents[rows], timestep[rows], some_labels, some_priors
            )
        return velocity, [by_condition[prediction] for prediction in wanted]

    def _predict_weakly(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        prior_embeds: torch.Tensor | None,
    ) -> torch.Tensor:
        """Computes the prediction of the weaker model under the same condition."""
        weak = self.guidance.transformer
        takes_priors = prior_embeds is not None and weak.config.prior_embed_dim is not None
        with weak.cache_context(f"{self.cache_name}_weak"):
            return weak(
                latents.to(weak.dtype), timestep, class_labels, prior_embeds.to(weak.dtype) if takes_priors else None
            ).sample.float()

    def _combine(self, predictions: list[torch.Tensor], scales: list[float], timestep: torch.Tensor) -> torch.Tensor:
        """Combines predictions to the guided velocity; the weakest comes first, the conditional one last."""
        guidance, conditional = self.guidance, predictions[-1]
        if guidance.power is not None:
            sigma = (timestep / NUM_TRAIN_TIMESTEPS).clamp(0, 1).reshape(-1, 1, 1, 1)
            scales = [power_cosine_scale(scale, sigma, guidance.power) for scale in scales]
        guided = combine(predictions, scales)
        if guidance.channels is not None:
            guided = torch.cat([guided[:, : guidance.channels], conditional[:, guidance.channels :]], dim=1)
        if guidance.rescale > 0:
            guided = rescale_guidance(guided, conditional, guidance.rescale)
        return guided

    def _combine_by_guider(self, velocity: torch.Tensor, others: list[torch.Tensor]) -> torch.Tensor:
        """Combines the conditional and the unconditional velocity by one of Diffusers' guiders."""
        batches = self._guider.prepare_inputs({})
        for batch, prediction in zip(batches, [velocity, *others], strict=True):
            batch.noise_pred = prediction
        return self._guider(batches).pred
