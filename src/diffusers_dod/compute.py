# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Cost of training and sampling: counted operations and bytes.

A multiply-add is 2 FLOPs. Models are on the meta device or fake, so that nothing is computed.
"""

import copy
import inspect
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from typing import Any, TypeVar

import torch
import torch.nn as nn
from diffusers import DiffusionPipeline, SchedulerMixin
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from .checks import check_at_least, check_choice, check_number, check_type
from .finetuning import TRAINABLE_PARAMETERS, LoraOptions, add_lora, difffit_parameters, freeze_all_but
from .guidance import Guidance, GuidedVelocity
from .losses import DoDJointModel
from .operations import OperationCounter, Work
from .options import check_options, option
from .pipeline_inputs import check_token_settings
from .presets import Preset
from .rectified_flow import NUM_TRAIN_TIMESTEPS
from .scheduling_dod import DoDFlowMatchScheduler
from .stages import Stage, is_per_stage, plan_stages
from .token_prior import GENERATION_DEFAULTS, TokenPrior
from .transformer_dod import DoDTransformer2DModel


_FLOAT_BYTES = 4  # weights, gradients, moments and averages are in fp32

F = TypeVar("F", bound=Callable)
C = TypeVar("C", bound=Counter)


def _counted_once(count: F) -> F:
    """Makes a function that counts once for the same arguments: each card of a run, for one, asks for them again."""
    results: dict[tuple, Any] = {}

    @wraps(count)
    def remembered(*args: Any, **kwargs: Any) -> Any:
        # Presets hold dicts, which are not hashable, and a class, which its name does not tell.
        presets = [value for value in (*args, *kwargs.values()) if isinstance(value, Preset)]
        key = repr((args, kwargs)), *(preset.latent_embedder_class for preset in presets)
        if key not in results:
            results[key] = count(*args, **kwargs)
        return results[key]

    return remembered


@dataclass(frozen=True)
class TrainingCost:
    """
    Cost of training a model.

    Args:
        backbone_parameters (`int`): Parameters of the backbone.
        latent_embedder_parameters (`int`): Parameters of the LEM, 0 without one.
        trainable_parameters (`int`): Parameters of both that are trained.
        forward_flops (`float`): FLOPs of the forward pass of an image, the mean over images with and without a prior.
        training_flops (`float`): FLOPs of forward and backward pass of an image, including repeats by checkpointing.
        moment_bytes (`int`): Bytes of Adam's two moments of the trained weights.
        num_averages (`int`): Number of averages of the weights.
        activation_bytes (`int`): Bytes kept for the backward pass of a micro-batch, including autocast's copies of
            the weights.
        averaged_parameters (`int`, *optional*): Parameters that an average holds; all by default, those of adapters
            alone if they are trained.
    """

    backbone_parameters: int
    latent_embedder_parameters: int
    trainable_parameters: int
    forward_flops: float
    training_flops: float
    moment_bytes: int
    num_averages: int
    activation_bytes: int
    averaged_parameters: int | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights."""
        return _FLOAT_BYTES * (self.backbone_parameters + self.latent_embedder_parameters)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients of the trained weights."""
        return _FLOAT_BYTES * self.trainable_parameters

    @property
    def average_bytes(self) -> int:
        """Bytes of the averages."""
        if self.averaged_parameters is None:
            return self.num_averages * self.weight_bytes
        return self.num_averages * _FLOAT_BYTES * self.averaged_parameters

    def memory(self, num_processes: int = 1, sharding: str = "none") -> float:
        """
        Bytes on each GPU: weights, gradients, moments, averages and activations.

        - `"none"`: nothing is divided. With several processes DDP's buckets are the gradients.
        - `"fsdp2"`: all but the activations are divided by the number of processes. The few blocks whose weights are
          gathered at a time are left out.
        - `"zero2"`: as `"fsdp2"`, but all weights stay gathered from the forward to the backward pass.

        Args:
            num_processes (`int`, defaults to 1): Number of processes, with a GPU each.
            sharding (`str`, defaults to `"none"`): `"none"`, `"zero2"` or `"fsdp2"`.

        Returns:
            `float`: The bytes.

        Raises:
            `TypeError`, `ValueError`: an argument is of the wrong type or out of range.
        """
        check_at_least("num_processes", num_processes, 1)
        check_choice("sharding", sharding, ("none", "zero2", "fsdp2"))
        states = self.weight_bytes + self.gradient_bytes + self.moment_bytes + self.average_bytes
        if num_processes == 1:
            return states + self.activation_bytes
        if sharding == "none":
            return states + self.gradient_bytes + self.activation_bytes
        gathered = self.weight_bytes if sharding == "zero2" else 0
        return states / num_processes + gathered + self.activation_bytes


def _joint_model(
    preset: Preset, latent_shape: tuple[int, int, int], num_classes: int, options: "TrainingStep"
) -> DoDJointModel:
    """Builds the models without weights."""
    with torch.device("meta"):
        model = DoDJointModel(*preset.build(latent_shape, num_classes))
        if options.trainable_parameters == "difffit":
            freeze_all_but(model, difffit_parameters(model))
        if options.lora.lora_rank is not None:
            add_lora(model, options.lora)
    return model


def _with_fake_weights(model: DoDJointModel) -> DoDJointModel:
    """Gives a model without weights those of the `FakeTensorMode` that is active, in which PEFT adds no adapters."""
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty(weight.shape), requires_grad=weight.requires_grad))
    return model


def _moment_bytes(count: int, optimizer: str) -> int:
    """
    Bytes of both Adam moments of a weight with `count` numbers.

    In 8 bits a moment has a scale per 256 numbers and a table, unless the weight is small.
    """
    if optimizer == "adamw_8bit" and count >= 4096 and count % 256 == 0:
        return 2 * (count + _FLOAT_BYTES * (count // 256 + 256))
    return 2 * _FLOAT_BYTES * count


def _empty_batch(batch_size: int, latent_shape: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    latents = torch.empty(batch_size, *latent_shape)
    labels = torch.zeros(batch_size, dtype=torch.int64)
    return {"latents": latents, "noise": latents.clone(), "sigmas": torch.empty(batch_size), "class_labels": labels}


def count_flops(model: DoDJointModel, latent_shape: tuple[int, int, int], num_priors: int) -> tuple[int, int]:
    """
    FLOPs of the matrix products of one image.

    Args:
        model ([`DoDJointModel`]): The model, on the meta device, where attention is two plain products.
        latent_shape (`tuple[int, int, int]`): Shape (C, h, w) of the latents.
        num_priors (`int`): 1 if the image has a prior from the LEM, or 0.

    Returns:
        `tuple[int, int]`: FLOPs of the forward pass, and of forward and backward pass.
    """
    with torch.device("meta"):
        batch = _empty_batch(1, latent_shape)
    with FlopCounterMode(display=False) as counter:
        loss = model(**batch, num_priors=num_priors).mean()
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops()


def _autocast(mixed_precision: str) -> AbstractContextManager:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def count_kept_bytes(
    model: DoDJointModel, batch: dict[str, torch.Tensor], num_priors: int, mixed_precision: str
) -> tuple[int, int]:
    """
    Bytes that a forward pass keeps for the backward pass: each storage once, without the parameters.

    Args:
        model ([`DoDJointModel`]): The model, on the CPU or fake. Autocast's copies of its weights count as kept.
        batch (`dict[str, torch.Tensor]`): Arguments of the model's forward pass.
        num_priors (`int`): Number of leading samples with a prior.
        mixed_precision (`str`): `"no"`, `"fp16"` or `"bf16"`.

    Returns:
        `tuple[int, int]`: All bytes, and the bytes of the largest single block.
    """
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address comes twice
    starts, blocks = [], [0]

    def total() -> int:
        return sum(storage.nbytes() for storage in kept.values())

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage
        return tensor

    hooks = []
    for part in model.children():
        for module in part.modules():
            if type(module).__name__ in getattr(part, "_repeated_blocks", ()):
                hooks.append(module.register_forward_pre_hook(lambda *_: starts.append(total())))
                hooks.append(module.register_forward_hook(lambda *_: blocks.append(total() - starts.pop())))
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), _autocast(mixed_precision):
            loss = model(**batch, num_priors=num_priors).mean()  # noqa: F841 (holds the graph)
    finally:
        for hook in hooks:
            hook.remove()
    return total(), max(blocks)


def count_work(model: DoDJointModel, batch: dict[str, torch.Tensor], num_priors: int, mixed_precision: str) -> Work:
    """
    Operations of a forward and backward pass; only the first pass makes tables of positions, which are left out.

    Args:
        model ([`DoDJointModel`]): The model, on the CPU or fake.
        batch (`dict[str, torch.Tensor]`): Arguments of the model's forward pass.
        num_priors (`int`): Number of leading samples with a prior.
        mixed_precision (`str`): `"no"`, `"fp16"` or `"bf16"`.

    Returns:
        [`Work`].
    """
    with torch.no_grad(), _autocast(mixed_precision):
        model(**batch, num_priors=num_priors)
    with OperationCounter() as counter:
        with _autocast(mixed_precision):
            loss = model(**batch, num_priors=num_priors).mean()
        loss.backward()
    return counter.work


OPTIMIZERS = ("adamw", "adamw_8bit")


@dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """Options of a training step that its cost depends on."""

    batch_size: int = option(32, at_least=1, help="Images per process and micro-batch.")
    prior_dropout_prob: float = option(0.5, at_least=0, at_most=1, help="Share p_s of images without a prior.")
    mixed_precision: str = option("bf16", choices=("no", "fp16", "bf16"), help="Precision of matrix products.")
    gradient_checkpointing: bool = option(False, help="Whether blocks are computed again in the backward pass.")
    num_averages: int = option(1, at_least=0, help="Averages of the weights.")
    trainable_parameters: str = option("all", choices=TRAINABLE_PARAMETERS, help="See [`difffit_parameters`].")
    optimizer: str = option("adamw", choices=OPTIMIZERS, help="AdamW, or its form with moments of 8 bits.")
    lora: LoraOptions = field(default_factory=LoraOptions)


def _prior_share(preset: Preset, options: TrainingStep) -> float:
    """Share of the images that have a prior."""
    return 0.0 if preset.latent_embedder_config is None else 1 - options.prior_dropout_prob


def _count_by_blocks(preset: Preset, count: Callable[[Preset], C]) -> C:
    """What `count` counts in a model, from backbones of one and of two blocks: other blocks are like the second."""
    default = inspect.signature(DoDTransformer2DModel).parameters["num_layers"].default
    num_layers = preset.transformer_config.get("num_layers", default)
    check_at_least("num_layers", num_layers, 1)

    def count_blocks(number: int) -> C:
        return count(replace(preset, transformer_config={**preset.transformer_config, "num_layers": number}))

    one = count_blocks(1)
    if num_layers == 1:
        return one
    two = count_blocks(2)
    return type(one)({key: one[key] + (num_layers - 1) * (two[key] - one[key]) for key in {*one, *two}})


def _count_step(
    preset: Preset, latent_shape: tuple[int, int, int], num_classes: int, options: TrainingStep
) -> tuple[Counter[Any], int]:
    """Counts all that blocks add to, and the bytes of the largest block if it is computed again, or 0."""
    model, fake = (_joint_model(preset, latent_shape, num_classes, options) for _ in range(2))
    prior_share = _prior_share(preset, options)
    if options.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    counts: Counter[Any] = Counter()
    for num_priors in {math.floor(prior_share), math.ceil(prior_share)}:
        flops = count_flops(model, latent_shape, num_priors)
        counts["forward", num_priors], counts["training", num_priors] = flops
    with FakeTensorMode():
        fake = _with_fake_weights(fake)
        batch, num_priors = _empty_batch(options.batch_size, latent_shape), round(prior_share * options.batch_size)
        largest_block = 0
        if options.gradient_checkpointing:
            _, largest_block = count_kept_bytes(fake, batch, num_priors, options.mixed_precision)
            fake.enable_gradient_checkpointing()
        counts["kept"], _ = count_kept_bytes(fake, batch, num_priors, options.mixed_precision)
    trainable = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    counts["trainable"] = sum(trainable)
    counts["moments"] = sum(_moment_bytes(number, options.optimizer) for number in trainable)
    counts["backbone"] = sum(parameter.numel() for parameter in model.transformer.parameters())
    counts["all"] = sum(parameter.numel() for parameter in model.parameters())
    return counts, largest_block


@_counted_once
def training_cost(
    preset: Preset,
    latent_shape: tuple[int, int, int] = (4, 32, 32),
    num_classes: int = 1000,
    options: TrainingStep | None = None,
) -> TrainingCost:
    """
    Counts what training costs.

    One image with and one without a prior are counted, and mixed by their shares. Bytes are those of a micro-batch
    with the expected number of priors. With gradient checkpointing they are the kept tensors and the
    largest block, which is computed again. Backbones of one and of two blocks are counted; other blocks are like the
    second.

    Args:
        preset ([`Preset`]): The model.
        latent_shape (`tuple[int, int, int]`, defaults to `(4, 32, 32)`): Shape (C, h, w) of the latents.
        num_classes (`int`, defaults to 1000): Number of classes.
        options ([`TrainingStep`], *optional*): The work of a step; the defaults of its fields if not given.

    Returns:
        [`TrainingCost`].

    Raises:
        `TypeError`, `ValueError`: an argument is of the wrong type or out of range.
    """
    if len(latent_shape) != 3:
        raise ValueError(f"`latent_shape` must be three integers (C, h, w), got {latent_shape}.")
    options = options or TrainingStep()
    check_options(options)
    prior_share = _prior_share(preset, options)
    shares = {num_priors: share for num_priors, share in ((0, 1 - prior_share), (1, prior_share)) if share > 0}
    largest_blocks = []

    def count(preset: Preset) -> Counter[Any]:
        counts, largest_block = _count_step(preset, latent_shape, num_classes, options)
        largest_blocks.append(largest_block)
        return counts

    counts = _count_by_blocks(preset, count)
    forward, training = (
        sum(share * counts[name, num_priors] for num_priors, share in shares.items())
        for name in ("forward", "training")
    )
    return TrainingCost(
        backbone_parameters=counts["backbone"],
        latent_embedder_parameters=counts["all"] - counts["backbone"],
        trainable_parameters=counts["trainable"],
        forward_flops=forward,
        training_flops=training,
        moment_bytes=counts["moments"],
        num_averages=options.num_averages,
        activation_bytes=counts["kept"] + max(largest_blocks),
        averaged_parameters=None if options.lora.lora_rank is None else counts["trainable"],
    )


def training_work(
    preset: Preset,
    latent_shape: tuple[int, int, int] = (4, 32, 32),
    num_classes: int = 1000,
    options: TrainingStep | None = None,
) -> Work:
    """
    Counts the operations of a micro-batch with the expected number of priors, forward and backward.

    Backbones of one and of two blocks are counted; other blocks are like the second.

    Args:
        preset ([`Preset`]): The model.
        latent_shape (`tuple[int, int, int]`, defaults to `(4, 32, 32)`): Shape (C, h, w) of the latents.
        num_classes (`int`, defaults to 1000): Number of classes.
        options ([`TrainingStep`], *optional*): The work of a step; the defaults of its fields if not given.

    Returns:
        [`Work`].

    Raises:
        `TypeError`, `ValueError`: an argument is of the wrong type or out of range.
    """
    options = options or TrainingStep()
    check_options(options)
    num_priors = round(_prior_share(preset, options) * options.batch_size)

    def count(preset: Preset) -> Work:
        model = _joint_model(preset, latent_shape, num_classes, options)
        if options.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        with FakeTensorMode():
            batch = _empty_batch(options.batch_size, latent_shape)
            return count_work(_with_fake_weights(model), batch, num_priors, options.mixed_precision)

    return _count_by_blocks(preset, count)


@dataclass(frozen=True)
class EvaluationCost:
    """
    Cost of one evaluation of a model for one image, in any unit.

    Args:
        first_stage (`float`): The backbone without a prior: in stage 1, and in the unconditional half of any stage.
        later_stages (`float`, *optional*): The backbone with a prior, if it takes one.
        latent_embedder (`float`, *optional*): The LEM, which runs once before each later stage.
        latent_decoder (`float`, *optional*): The decoder of the LEM alone, for latent tokens that are given.
        token_prior (`float`, *optional*): The token prior, each half of a guided evaluation.
    """

    first_stage: float
    later_stages: float | None = None
    latent_embedder: float | None = None
    latent_decoder: float | None = None
    token_prior: float | None = None

    def stage(
        self,
        stage: int,
        num_evaluations: int,
        num_guided_evaluations: int,
        has_tokens: bool = False,
        weaker: "EvaluationCost | None" = None,
    ) -> float:
        """
        The cost of a stage for one image, with the LEM before it.

        Args:
            stage (`int`): Number of the stage, from 1.
            num_evaluations (`int`): Evaluations of the conditional velocity.
            num_guided_evaluations (`int`): Evaluations among them that also have an unconditional half.
            has_tokens (`bool`, defaults to `False`): Whether latent tokens are given, which the LEM only decodes.
            weaker ([`EvaluationCost`], *optional*): Cost of a weaker model, whose prediction takes the place of the
                unconditional one. It gets the same prior, if it takes one.

        Returns:
            `float`: The cost.
        """
        guiding = self.first_stage if weaker is None else weaker.first_stage
        if stage == 1:
            return num_evaluations * self.first_stage + num_guided_evaluations * guiding
        if weaker is not None and weaker.later_stages is not None:
            guiding = weaker.later_stages
        embedder = self.latent_decoder if has_tokens else self.latent_embedder
        return embedder + num_evaluations * self.later_stages + num_guided_evaluations * guiding


@dataclass(frozen=True)
class ModelCost:
    """
    Size of a model, and the cost of its evaluations in two units.

    Args:
        transformer_parameters (`int`): Parameters of the backbone.
        latent_embedder_parameters (`int`): Parameters of the LEM, 0 without one.
        flops ([`EvaluationCost`]): FLOPs of all matrix products, including attention.
        linear_macs ([`EvaluationCost`]): Multiply-adds of the Linears alone.
    """

    transformer_parameters: int
    latent_embedder_parameters: int
    flops: EvaluationCost
    linear_macs: EvaluationCost


UNITS = ("flops", "linear_macs")


def _count_operations(run: Callable[[], Any]) -> tuple[int, int]:
    """FLOPs of all matrix products, and multiply-adds of the Linears among them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    linears = (torch.ops.aten.addmm, torch.ops.aten.mm)
    counts = counter.get_flop_counts()["Global"]
    return counter.get_total_flops(), sum(counts.get(operation, 0) for operation in linears) // 2


def _latent_size(transformer: DoDTransformer2DModel, latent_size: tuple[int, int] | None) -> tuple[int, int]:
    patch_size = transformer.config.patch_size
    if latent_size is None:
        return (transformer.config.sample_size,) * 2
    if len(latent_size) != 2 or any(side < 1 or side % patch_size for side in latent_size):
        raise ValueError(f"`latent_size` must be two multiples of `patch_size` = {patch_size}, got {latent_size}.")
    return latent_size


def count_model(model: Preset | DiffusionPipeline, latent_size: tuple[int, int] | None = None) -> ModelCost:
    """
    Counts parameters and operations of a model, from the configs alone: without adapters.

    Args:
        model ([`Preset`] or [`DoDPipeline`]): The model.
        latent_size (`tuple[int, int]`, *optional*): Height and width of the latents. By default the trained ones.

    Returns:
        [`ModelCost`], of one image.

    Raises:
        `TypeError`, `ValueError`: the model is neither, or does not take latents of this size.
    """
    check_type("model", model, (Preset, DiffusionPipeline))
    cost = _count_preset(_as_preset(model), latent_size)
    token_prior = getattr(model, "token_prior", None)
    return cost if token_prior is None else _with_token_prior(cost, token_prior)


def _as_preset(model: Preset | DiffusionPipeline) -> Preset:
    return model if isinstance(model, Preset) else Preset.from_pipeline(model)


def _count_weaker(
    weaker: DoDTransformer2DModel, model: Preset | DiffusionPipeline, latent_size: tuple[int, int] | None
) -> ModelCost:
    """Counts the `weaker` model that guides `model`, on the latents of that."""
    with torch.device("meta"):
        latent_size = _latent_size(_as_preset(model).build()[0], latent_size)
    arguments = {name: value for name, value in weaker.config.items() if not name.startswith("_")}
    return _count_preset(Preset(arguments), latent_size)


def _with_token_prior(cost: ModelCost, token_prior: TokenPrior) -> ModelCost:
    with torch.device("meta"):
        inputs = torch.empty(1, *token_prior.token_shape), torch.empty(1), torch.zeros(1, dtype=torch.int64)
        figures = _count_operations(partial(TokenPrior.from_config(token_prior.config), *inputs))
    costs = {unit: getattr(cost, unit) for unit in UNITS}
    return replace(
        cost, **{unit: replace(costs[unit], token_prior=figure) for unit, figure in zip(UNITS, figures, strict=True)}
    )


@_counted_once
def _count_preset(preset: Preset, latent_size: tuple[int, int] | None) -> ModelCost:
    with torch.device("meta"):
        transformer, embedder = preset.build()
        latents = torch.empty(1, transformer.config.in_channels, *_latent_size(transformer, latent_size))
        inputs = latents, torch.empty(1), torch.zeros(1, dtype=torch.int64)
        counts = [_count_operations(lambda: transformer(*inputs))]
        if transformer.config.prior_embed_dim is not None:
            num_patches = latents[0, 0].numel() // transformer.config.patch_size**2
            prior_embeds = torch.empty(1, num_patches, transformer.config.prior_embed_dim)
            counts.append(_count_operations(lambda: transformer(*inputs, prior_embeds=prior_embeds)))
        if embedder is not None:
            tokens = embedder.encode(latents)
            counts.append(_count_operations(lambda: embedder(latents)))
            counts.append(_count_operations(lambda: embedder.decode(tokens, *latents.shape[2:])))
    flops, linear_macs = (EvaluationCost(*figures) for figures in zip(*counts, strict=True))
    embedder_parameters = 0 if embedder is None else embedder.num_parameters()
    return ModelCost(transformer.num_parameters(), embedder_parameters, flops, linear_macs)


def _count_guided(stage: Stage, guidance: Guidance) -> int:
    """Number of guided evaluations in the steps of a stage."""
    velocity = GuidedVelocity(transformer=None, batch_size=len(stage.sigmas), guidance=guidance)
    return int(velocity.rows_to_guide(stage.sigmas * NUM_TRAIN_TIMESTEPS, stage.guidance_scale).sum())


def has_known_cost(guidance: Guidance) -> bool:
    """Whether [`sampling_compute`] can count the cost of `guidance`, which is known before a call."""
    has_default_condition = guidance.null_condition == "class_and_prior" and guidance.prior_scale is None
    return has_default_condition and guidance.cosine_threshold is None


def sampling_compute(
    model: Preset | DiffusionPipeline,
    num_inference_steps: int | Sequence[int | None] | None = None,
    guidance_scale: float | Sequence[float | None] | None = None,
    schedulers: str | SchedulerMixin | Sequence[str | SchedulerMixin | None] | None = None,
    guidance: Guidance | None = None,
    latent_size: tuple[int, int] | None = None,
    cost: ModelCost | None = None,
    use_token_prior: bool = False,
    token_prior_num_inference_steps: int | None = None,
    token_prior_guidance_scale: float | None = None,
) -> dict[str, Any]:
    """
    Counts the cost of sampling the latents of one image from stage 1 on.

    All arguments that a call of [`DoDPipeline`] has, too, have the same meaning. A list has an entry for each stage
    that is run: stage 1 is not with `use_token_prior`.

    Args:
        model ([`Preset`] or [`DoDPipeline`]): The model.
        num_inference_steps (`int` or `Sequence[int | None]`, *optional*): Intervals of all stages, or of each stage.
        guidance_scale (`float` or `Sequence[float | None]`, *optional*): Scale from stage 2 on, or of each stage. 1 is
            no guidance; all other scales cost the same.
        schedulers (`str`, `SchedulerMixin` or `Sequence[str | SchedulerMixin | None]`, *optional*): Solver of all
            stages, or of each stage. It must have fixed steps.
        guidance ([`Guidance`], *optional*): Guidance, one that [`has_known_cost`].
        latent_size (`tuple[int, int]`, *optional*): Height and width of the latents. By default the trained ones.
        cost ([`ModelCost`], *optional*): Cost of the model on these latents, if [`count_model`] has counted it.
        use_token_prior (`bool`, defaults to `False`): Whether the pipeline's token prior takes the place of stage 1.
        token_prior_num_inference_steps (`int`, *optional*): Number of its steps.
        token_prior_guidance_scale (`float`, *optional*): Scale of its class guidance.

    Returns:
        `dict`: The sums `flops` and `linear_macs`, and `stages`. Each stage has its own `flops` and `linear_macs`
        (with the LEM before it), `num_evaluations` and `num_guided_evaluations`, and so has `token_prior` if it is
        used.

    Raises:
        `TypeError`, `ValueError`: an argument is out of range, or the cost of a solver or of the guidance is not known
            before a call.
    """
    cost = count_model(model, latent_size) if cost is None else cost
    is_preset = isinstance(model, Preset)
    defaults = model.pipeline_config if is_preset else model.config
    scheduler = DoDFlowMatchScheduler() if is_preset else copy.deepcopy(model.scheduler)
    has_embedder = cost.flops.latent_embedder is not None
    token_settings = check_token_settings(
        use_token_prior,
        getattr(model, "token_prior", None),
        getattr(model, "latent_embedder", None),
        prior=None,
        num_inference_steps=token_prior_num_inference_steps,
        guidance_scale=token_prior_guidance_scale,
    )
    first = 2 if use_token_prior else 1
    lists = [values for values in (num_inference_steps, guidance_scale, schedulers) if is_per_stage(values)]
    num_stages = first - 1 + len(lists[0]) if lists else defaults["default_num_stages"] if has_embedder else 1
    if num_stages < first or (num_stages > 1 and not has_embedder):
        accepted = f">= {first}" if has_embedder else "1 without a latent embedder"
        raise ValueError(f"The number of stages must be {accepted}, got {num_stages}.")
    guidance = Guidance() if guidance is None else guidance
    check_type("guidance", guidance, Guidance)
    if not has_known_cost(guidance):
        raise ValueError(
            "`guidance` must be one whose cost is known before a call, with the default `null_condition` and without "
            f"`prior_scale` and `cosine_threshold`, got {guidance}."
        )
    planned = plan_stages(
        range(first, num_stages + 1),
        scheduler,
        default_num_inference_steps=defaults["default_num_inference_steps"],
        default_guidance_scale=defaults["default_guidance_scale"],
        has_priors=has_embedder,
        default_first_stage_guidance_scale=defaults.get("default_first_stage_guidance_scale", 1.0),
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        schedulers=copy.deepcopy(schedulers),
    )
    weaker = None if guidance.transformer is None else _count_weaker(guidance.transformer, model, latent_size)
    stages = []
    for stage in planned:
        num_evaluations = stage.lay_out()
        if num_evaluations is None:
            raise ValueError(
                "`schedulers` must hold solvers of fixed steps, whose evaluations are known before, "
                f"got {stage.scheduler.config.solver!r}."
            )
        counts = num_evaluations, _count_guided(stage, guidance)
        has_tokens = use_token_prior and stage.number == first
        found = {
            unit: getattr(cost, unit).stage(
                stage.number, *counts, has_tokens=has_tokens, weaker=weaker and getattr(weaker, unit)
            )
            for unit in UNITS
        }
        stages.append(dict(zip(("num_evaluations", "num_guided_evaluations"), counts, strict=True)) | found)
    token_prior = {"token_prior": _token_prior_compute(cost, token_settings)} if use_token_prior else {}
    sums = {unit: sum(part[unit] for part in [*token_prior.values(), *stages]) for unit in UNITS}
    return sums | {"stages": stages} | token_prior


def _token_prior_compute(cost: ModelCost, settings: dict[str, Any]) -> dict[str, Any]:
    """The cost of drawing the tokens of an image, with the settings that are given to [`TokenPrior.generate`]."""
    settings = GENERATION_DEFAULTS | settings
    num_evaluations = settings["num_inference_steps"]
    num_guided = 0 if settings["guidance_scale"] == 1 else num_evaluations
    found = {unit: (num_evaluations + num_guided) * getattr(cost, unit).token_prior for unit in UNITS}
    return {"num_evaluations": num_evaluations, "num_guided_evaluations": num_guided, **found}


def steps_within_budget(
    budget: float,
    model: Preset | DiffusionPipeline,
    guidance_scale: Sequence[float | None],
    schedulers: str | SchedulerMixin | Sequence[str | SchedulerMixin | None] | None = None,
    guidance: Guidance | None = None,
    latent_size: tuple[int, int] | None = None,
    cost: ModelCost | None = None,
) -> int:
    """
    The largest number of steps of each stage within a budget, for comparisons at equal compute.

    Args:
        budget (`float`): FLOPs of one image.
        model ([`Preset`] or [`DoDPipeline`]): The model.
        guidance_scale (`Sequence[float | None]`): Scale of each stage; 1 is no guidance.
        schedulers (`str`, `SchedulerMixin` or `Sequence[str | SchedulerMixin | None]`, *optional*): Solver of all
            stages, or of each stage. It must have fixed steps.
        guidance ([`Guidance`], *optional*): Guidance, one that [`has_known_cost`].
        latent_size (`tuple[int, int]`, *optional*): Height and width of the latents. By default the trained ones.
        cost ([`ModelCost`], *optional*): Cost of the model, if [`count_model`] has counted it already.

    Returns:
        `int`: The number of intervals of each stage, 0 if a single one costs more.

    Raises:
        `TypeError`, `ValueError`: an argument is out of range, or the cost of a solver or of the guidance is not known
            before a call.
    """
    check_number("budget", budget, 0)
    cost = count_model(model, latent_size) if cost is None else cost

    def flops(num_inference_steps: int) -> float:
        return sampling_compute(model, num_inference_steps, guidance_scale, schedulers, guidance, cost=cost)["flops"]

    return bisect_right(range(1, int(budget // cost.flops.first_stage) + 2), budget, key=flops)
