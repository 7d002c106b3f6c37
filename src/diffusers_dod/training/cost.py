# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
What a training run costs: computed from counted operations and bytes, not measured.

    python -m diffusers_dod.training.cost --utilisation 0.4 --price 2.5 training/recipes/dod-b-imagenet256.yaml

A multiply-add is 2 FLOPs. Matrix products are counted, those of attention too, and nothing else. Models and batches
are on the meta device or fake, so that nothing is computed. docs/training_cost.md explains the model.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ..autoencoders import AUTOENCODERS, check_image_size, latent_channels, spatial_factor
from ..checks import check_at_least, check_choice, check_number
from ..latent_embedding import LatentEmbeddingModule
from ..losses import DoDJointModel
from ..pipeline_dod import DoDPipeline
from ..presets import PRESETS, Preset
from ..transformer_dod import DoDTransformer2DModel
from .arguments import parse_args, read_config
from .finetuning import TRAINABLE_PARAMETERS, difffit_parameters, freeze_all_but
from .latents import MANIFEST
from .models import OPTIMIZERS


@dataclass(frozen=True)
class GPU:
    """
    A kind of GPU, by its data sheet.

    Args:
        memory (`float`): Its memory in bytes.
        peak_flops (`dict[str, float]`): Dense FLOP/s of matrix products in `"bf16"`, `"fp16"`, `"tf32"` and `"fp32"`.
    """

    memory: float
    peak_flops: dict[str, float]


# NVIDIA's data sheets of the SXM cards, whose numbers "with sparsity" are twice the dense ones.
_HOPPER_PEAK_FLOPS = {"bf16": 989e12, "fp16": 989e12, "tf32": 494.5e12, "fp32": 67e12}
GPUS = {"H100": GPU(80e9, _HOPPER_PEAK_FLOPS), "H200": GPU(141e9, _HOPPER_PEAK_FLOPS)}

# Assumptions.
UTILISATION = 0.4  # share of the peak FLOP/s that training reaches
PRICE_PER_GPU_HOUR = 2.5  # US dollars
RECIPE_PROCESSES = 8  # of the ImageNet recipes, whose batch is that of one of them
LATENT_CHANNELS, SPATIAL_FACTOR = 4, 8  # of an autoencoder whose config cannot be reached

_FLOAT_BYTES = 4  # weights, gradients, moments and averages are in fp32
_NUM_GPUS = (1, 8, 64)  # in the tables


@dataclass(frozen=True)
class TrainingCost:
    """
    What training a model costs.

    Args:
        backbone_parameters (`int`): Parameters of the backbone.
        latent_embedder_parameters (`int`): Parameters of the LEM, 0 without one.
        trainable_parameters (`int`): How many of both are trained.
        forward_flops (`float`): FLOPs of the forward pass of an image, the mean over images with and without a prior.
        training_flops (`float`): FLOPs of forward and backward pass of an image, with what checkpointing repeats.
        moment_bytes (`int`): Bytes of Adam's two moments of what is trained.
        num_averages (`int`): Averages of the weights.
        activation_bytes (`int`): Bytes kept for the backward pass of a micro-batch, autocast's copies of the weights
            among them.
    """

    backbone_parameters: int
    latent_embedder_parameters: int
    trainable_parameters: int
    forward_flops: float
    training_flops: float
    moment_bytes: int
    num_averages: int
    activation_bytes: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights."""
        return _FLOAT_BYTES * (self.backbone_parameters + self.latent_embedder_parameters)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients of what is trained."""
        return _FLOAT_BYTES * self.trainable_parameters

    @property
    def average_bytes(self) -> int:
        """Bytes of the averages, which hold all weights."""
        return self.num_averages * self.weight_bytes

    def memory(self, num_processes: int = 1, sharding: str = "none") -> float:
        """
        Bytes on each GPU: weights, gradients, moments, averages, and activations, which are always whole.

        - `"none"`: nothing is divided, and with several processes DDP's buckets hold the gradients a second time.
        - `"fsdp2"`: the first four are divided by the number of processes. The few blocks whose weights are gathered
          at a time are left out.
        - `"zero2"`: as before, and all weights stay gathered from the forward to the backward pass.

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


@dataclass(frozen=True)
class RunEstimate:
    """
    What a run takes.

    Args:
        images_per_second (`float`): Images per second on all GPUs together.
        days (`float`): Days that it lasts.
        gpu_hours (`float`): GPU-hours.
        price (`float`): US dollars.
    """

    images_per_second: float
    days: float
    gpu_hours: float
    price: float


def estimate_run(
    training_flops: float,
    num_images: float,
    num_gpus: int = 1,
    peak_flops: float = GPUS["H100"].peak_flops["bf16"],
    utilisation: float = UTILISATION,
    price_per_gpu_hour: float = PRICE_PER_GPU_HOUR,
) -> RunEstimate:
    """
    Time and price of a run whose GPUs do nothing but its matrix products, all at the same assumed speed.

    Args:
        training_flops (`float`): FLOPs of an image, > 0.
        num_images (`float`): Images of the run, > 0.
        num_gpus (`int`, defaults to 1): Number of GPUs.
        peak_flops (`float`, defaults to `GPUS["H100"].peak_flops["bf16"]`): Peak FLOP/s of a GPU, > 0.
        utilisation (`float`, defaults to `UTILISATION`): Share of the peak that is reached, in (0, 1].
        price_per_gpu_hour (`float`, defaults to `PRICE_PER_GPU_HOUR`): US dollars, >= 0.

    Returns:
        [`RunEstimate`].

    Raises:
        `TypeError`, `ValueError`: an argument is of the wrong type or out of range.
    """
    check_at_least("num_gpus", num_gpus, 1)
    for name, value in (("training_flops", training_flops), ("num_images", num_images), ("peak_flops", peak_flops)):
        check_number(name, value, 0, open_minimum=True)
    check_number("utilisation", utilisation, 0, 1, open_minimum=True)
    check_number("price_per_gpu_hour", price_per_gpu_hour, 0)
    images_per_second = num_gpus * peak_flops * utilisation / training_flops
    hours = num_images / images_per_second / 3600
    return RunEstimate(images_per_second, hours / 24, hours * num_gpus, hours * num_gpus * price_per_gpu_hour)


def _build(
    preset: Preset, latent_shape: tuple[int, int, int], num_classes: int, trainable_parameters: str
) -> DoDJointModel:
    channels, sample_size, _ = latent_shape
    shape = {"in_channels": channels, "sample_size": sample_size}
    transformer = DoDTransformer2DModel(**(preset.transformer_config | shape | {"num_classes": num_classes}))
    latent_embedder = None
    if preset.latent_embedder_config is not None:
        latent_embedder = LatentEmbeddingModule(**(preset.latent_embedder_config | shape))
    model = DoDJointModel(transformer, latent_embedder)
    if trainable_parameters == "difffit":
        freeze_all_but(model, difffit_parameters(model))
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
        num_priors (`int`): 1 if the image has a prior, which the LEM makes, or 0.

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


def count_kept_bytes(
    model: DoDJointModel, batch: dict[str, torch.Tensor], num_priors: int, mixed_precision: str
) -> tuple[int, int]:
    """
    Bytes of what a forward pass keeps for the backward pass: each storage once, and not the parameters.

    Args:
        model ([`DoDJointModel`]): The model, on the CPU or fake. Autocast's copies of its weights count as kept.
        batch (`dict[str, torch.Tensor]`): Arguments of the model's forward pass.
        num_priors (`int`): Number of leading samples with a prior.
        mixed_precision (`str`): `"no"`, `"fp16"` or `"bf16"`.

    Returns:
        `tuple[int, int]`: Bytes of all, and the most that a single block adds.
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
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)
    autocast = nullcontext() if dtype is None else torch.autocast("cpu", dtype)
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
            loss = model(**batch, num_priors=num_priors).mean()  # noqa: F841 (holds the graph)
    finally:
        for hook in hooks:
            hook.remove()
    return total(), max(blocks)


def training_cost(
    preset: Preset,
    latent_shape: tuple[int, int, int] = (4, 32, 32),
    num_classes: int = 1000,
    batch_size: int = 32,
    prior_dropout_prob: float = 0.5,
    mixed_precision: str = "bf16",
    gradient_checkpointing: bool = False,
    num_averages: int = 1,
    trainable_parameters: str = "all",
    optimizer: str = "adamw",
) -> TrainingCost:
    """
    Counts what training costs.

    An image with a prior and one without are counted and mixed by `prior_dropout_prob`. Bytes are those of a
    micro-batch with the expected number of priors. With gradient checkpointing they are what is kept then, and the
    largest block, which is computed again.

    Args:
        preset ([`Preset`]): The model.
        latent_shape (`tuple[int, int, int]`, defaults to `(4, 32, 32)`): Shape (C, h, w) of the latents.
        num_classes (`int`, defaults to 1000): Number of classes.
        batch_size (`int`, defaults to 32): Images per process and micro-batch.
        prior_dropout_prob (`float`, defaults to 0.5): The share p_s of images without a prior.
        mixed_precision (`str`, defaults to `"bf16"`): `"no"`, `"fp16"` or `"bf16"`.
        gradient_checkpointing (`bool`, defaults to `False`): Whether blocks are computed again in the backward pass.
        num_averages (`int`, defaults to 1): Averages of the weights.
        trainable_parameters (`str`, defaults to `"all"`): `"all"` or `"difffit"`, see [`difffit_parameters`].
        optimizer (`str`, defaults to `"adamw"`): `"adamw"` or `"adamw_8bit"`.

    Returns:
        [`TrainingCost`].

    Raises:
        `TypeError`, `ValueError`: an argument is of the wrong type or out of range.
    """
    if len(latent_shape) != 3:
        raise ValueError(f"`latent_shape` must be three integers (C, h, w), got {latent_shape}.")
    check_at_least("batch_size", batch_size, 1)
    check_at_least("num_averages", num_averages, 0)
    check_number("prior_dropout_prob", prior_dropout_prob, 0, 1)
    check_choice("mixed_precision", mixed_precision, ("no", "fp16", "bf16"))
    check_choice("trainable_parameters", trainable_parameters, TRAINABLE_PARAMETERS)
    check_choice("optimizer", optimizer, OPTIMIZERS)
    prior_share = 0.0 if preset.latent_embedder_config is None else 1 - prior_dropout_prob

    with torch.device("meta"):
        model = _build(preset, latent_shape, num_classes, trainable_parameters)
    if gradient_checkpointing:
        for part in model.children():
            part.enable_gradient_checkpointing()
    shares = {num_priors: share for num_priors, share in ((0, 1 - prior_share), (1, prior_share)) if share > 0}
    counts = {num_priors: count_flops(model, latent_shape, num_priors) for num_priors in shares}
    forward, training = (
        sum(share * counts[num_priors][index] for num_priors, share in shares.items()) for index in (0, 1)
    )

    with FakeTensorMode():
        fake = _build(preset, latent_shape, num_classes, trainable_parameters)
        batch, num_priors = _empty_batch(batch_size, latent_shape), round(prior_share * batch_size)
        activations, largest_block = count_kept_bytes(fake, batch, num_priors, mixed_precision)
        if gradient_checkpointing:
            for part in fake.children():
                part.enable_gradient_checkpointing()
            activations = largest_block + count_kept_bytes(fake, batch, num_priors, mixed_precision)[0]

    embedder = [] if model.latent_embedder is None else [*model.latent_embedder.parameters()]
    trainable = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    return TrainingCost(
        backbone_parameters=sum(parameter.numel() for parameter in model.transformer.parameters()),
        latent_embedder_parameters=sum(parameter.numel() for parameter in embedder),
        trainable_parameters=sum(trainable),
        forward_flops=forward,
        training_flops=training,
        moment_bytes=sum(_moment_bytes(count, optimizer) for count in trainable),
        num_averages=num_averages,
        activation_bytes=activations,
    )


def find_preset(args: argparse.Namespace) -> tuple[Preset, list[str]]:
    """
    The model that the options name, out of configs alone, and what is assumed of it.

    Args:
        args (`argparse.Namespace`): The options of `training/train_dod.py`.
    """
    preset, assumptions = PRESETS[args.preset], []
    if args.pretrained_model_name_or_path is not None:
        path = args.pretrained_model_name_or_path
        try:
            transformer = _public(DoDTransformer2DModel.load_config(path, subfolder="transformer"))
            embedder = preset.latent_embedder_config
            if DoDPipeline.load_config(path)["latent_embedder"][0] is not None:
                embedder = _public(LatentEmbeddingModule.load_config(path, subfolder="latent_embedder"))
            elif embedder is not None:  # a FiTv2 becomes the backbone of a DoD
                width = embedder["num_attention_heads"] * embedder["attention_head_dim"]
                transformer |= {"prior_embed_dim": width}
                embedder = embedder | {"patch_size": transformer["patch_size"]}
            preset = Preset(transformer, embedder)
        except OSError:
            assumptions.append(f"a model of the preset's size: the configs of {path!r} cannot be reached")
    given = {name: getattr(args, name) for name in ("num_latent_tokens", "latent_token_dim")}
    overrides = {name: value for name, value in given.items() if value is not None}
    if overrides:
        preset = replace(preset, latent_embedder_config=preset.latent_embedder_config | overrides)
    if args.patch_size is not None:
        patch = {"patch_size": args.patch_size}
        embedder = preset.latent_embedder_config
        preset = Preset(preset.transformer_config | patch, None if embedder is None else embedder | patch)
    return preset, assumptions


def _public(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _find_latents(args: argparse.Namespace) -> tuple[tuple[int, int, int], int, list[str]]:
    """Shape of the latents and number of classes, without data, and what is assumed of them."""
    manifest = (args.latents_dir or args.output_dir / "latents") / MANIFEST
    if manifest.is_file():
        content = json.loads(manifest.read_text())
        return tuple(content["latent_shape"]), len(content["class_names"]), []
    num_classes = PRESETS[args.preset].transformer_config.get("num_classes", 1000)
    assumptions = [f"{num_classes} classes: the data are not looked at"]
    path = args.pretrained_vae_name_or_path
    channels, factor = 3, 1
    if path is not None:
        try:
            config = diffusers.AutoModel.load_config(path)
            check_choice("pretrained_vae_name_or_path", config.get("_class_name"), AUTOENCODERS)
            with torch.device("meta"):
                vae = getattr(diffusers, config["_class_name"]).from_config(config)
            check_image_size(vae, args.resolution, args.resolution)
            channels, factor = latent_channels(vae), spatial_factor(vae)
        except OSError:
            channels, factor = LATENT_CHANNELS, SPATIAL_FACTOR
            assumptions.append(
                f"latents of {channels} channels and {factor} pixels a side: the config of {path!r} cannot be reached"
            )
    side = args.resolution // factor
    return (channels, side, side), num_classes, assumptions


def _run_cost(
    args: argparse.Namespace, gradient_checkpointing: bool
) -> tuple[TrainingCost, tuple[int, int, int], list[str]]:
    """What the options cost, for latents of which shape, and under which assumptions."""
    preset, model_assumptions = find_preset(args)
    latent_shape, num_classes, data_assumptions = _find_latents(args)
    cost = training_cost(
        preset,
        latent_shape,
        num_classes,
        args.train_batch_size,
        args.prior_dropout_prob,
        _mixed_precision(args),
        gradient_checkpointing,
        len(args.ema_decay) + len(args.ema_sigma_rel),
        args.trainable_parameters,
        args.optimizer,
    )
    return cost, latent_shape, model_assumptions + data_assumptions


def _mixed_precision(args: argparse.Namespace) -> str:
    """The option `mixed_precision`, or what the launcher is configured for."""
    return args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def _precision(args: argparse.Namespace) -> str:
    """Precision of the matrix products."""
    mixed_precision = _mixed_precision(args)
    return mixed_precision if mixed_precision != "no" else "tf32" if args.allow_tf32 else "fp32"


def _num_images(args: argparse.Namespace, num_processes: int) -> int:
    return args.max_train_steps * args.train_batch_size * args.gradient_accumulation_steps * num_processes


def _assumed_speed(peak_flops: float, precision: str, utilisation: float, price_per_gpu_hour: float) -> str:
    return (
        f"{utilisation:.0%} of {peak_flops / 1e12:g} TFLOP/s ({precision}, dense), "
        f"${price_per_gpu_hour:.2f} per GPU-hour, and no time for anything but matrix products"
    )


def describe_run(
    args: argparse.Namespace,
    num_processes: int | None = None,
    utilisation: float = UTILISATION,
    price_per_gpu_hour: float = PRICE_PER_GPU_HOUR,
) -> str:
    """
    What a run would be and cost, without data, weights or computation. Whether saved models, data and options fit each
    other is left to the run itself.

    Args:
        args (`argparse.Namespace`): The options of the trainer.
        num_processes (`int`, *optional*): Number of processes, that of the options or of the launcher if not given.
        utilisation (`float`, defaults to `UTILISATION`): Assumed share of the peak FLOP/s, in (0, 1].
        price_per_gpu_hour (`float`, defaults to `PRICE_PER_GPU_HOUR`): Assumed price in US dollars, >= 0.

    Returns:
        `str`: Options, parameters, FLOPs, memory, time and assumptions, in lines.

    Raises:
        `TypeError`, `ValueError`: an argument is out of range, or the options do not fit the autoencoder.
    """
    if num_processes is None:
        num_processes = args.num_processes or int(os.environ.get("WORLD_SIZE", 1))
    check_at_least("num_processes", num_processes, 1)
    cost, latent_shape, assumptions = _run_cost(args, args.gradient_checkpointing)
    num_images = _num_images(args, num_processes)
    images_per_step = num_images // args.max_train_steps
    precision = _precision(args)
    states = {"weights": cost.weight_bytes, "gradients": cost.gradient_bytes, "moments": cost.moment_bytes}
    states |= {f"{cost.num_averages} averages": cost.average_bytes, "activations": cost.activation_bytes}
    lines = ["Options"]
    lines += [f"  {name}: {value}" for name, value in sorted(vars(args).items()) if name != "hub_token"]
    lines += [
        "Computed, not measured",
        f"  parameters: {cost.backbone_parameters:,} of the backbone, {cost.latent_embedder_parameters:,} of the LEM, "
        f"{cost.trainable_parameters:,} trainable",
        f"  latents: {'x'.join(map(str, latent_shape))}, {images_per_step} images per step, {num_images:,} in all",
        f"  FLOPs: {cost.forward_flops / 1e9:.1f} G per image forward, {cost.training_flops / 1e9:.1f} G training, "
        f"{images_per_step * cost.training_flops / 1e12:.1f} T per step, "
        f"{num_images * cost.training_flops / 1e18:.3g} E in all",
        f"  memory in GB: {', '.join(f'{name} {count / 1e9:.2f}' for name, count in states.items())}",
    ]
    for name, gpu in GPUS.items():
        needed, sharded = cost.memory(num_processes), cost.memory(num_processes, "fsdp2")
        run = estimate_run(
            cost.training_flops,
            num_images,
            num_processes,
            gpu.peak_flops[precision],
            utilisation,
            price_per_gpu_hour,
        )
        lines += [
            f"  {num_processes} x {name}: {run.images_per_second:,.0f} images/s, {run.days:.2f} days, "
            f"{run.gpu_hours:,.1f} GPU-hours, ${run.price:,.0f}; "
            f"{needed / 1e9:.1f} of {gpu.memory / 1e9:.0f} GB ({sharded / 1e9:.1f} GB with FSDP2)"
        ]
        assumptions += [
            f"{name}: " + _assumed_speed(gpu.peak_flops[precision], precision, utilisation, price_per_gpu_hour)
        ]
    return "\n".join([*lines, "Assumed", *(f"  {assumption}" for assumption in assumptions)])


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of `rows` under their `header`, whose first column is text and whose others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def format_tables(
    recipes: Sequence[Path],
    gpu: str = "H100",
    utilisation: float = UTILISATION,
    price_per_gpu_hour: float = PRICE_PER_GPU_HOUR,
    num_processes: int = RECIPE_PROCESSES,
) -> str:
    """
    What recipes cost, as Markdown.

    Args:
        recipes (`Sequence[Path]`): The files.
        gpu (`str`, defaults to `"H100"`): Which of [`GPUS`].
        utilisation (`float`, defaults to `UTILISATION`): Assumed share of the peak FLOP/s, in (0, 1].
        price_per_gpu_hour (`float`, defaults to `PRICE_PER_GPU_HOUR`): Assumed price in US dollars, >= 0.
        num_processes (`int`, defaults to 8): Processes by which a recipe's batch is multiplied.

    Returns:
        `str`: Tables of operations, of memory, and of time and price. What is assumed of latents and classes goes to
        the standard error.

    Raises:
        `TypeError`, `ValueError`: an argument is of the wrong type or out of range.
    """
    check_choice("gpu", gpu, tuple(GPUS))
    check_at_least("num_processes", num_processes, 1)
    operations, memory, time, speeds = [], [], [], {}
    for recipe in recipes:
        argv = ["--config", str(recipe), "--output_dir", os.devnull]
        if "--latents_dir" not in read_config(recipe):
            argv += ["--latents_dir", os.devnull]  # pictures need not be named
        args = parse_args(argv)
        cost, latent_shape, assumptions = _run_cost(args, args.gradient_checkpointing)
        checkpointed, _, _ = _run_cost(args, gradient_checkpointing=True)
        for assumption in assumptions:
            print(f"{recipe}: assumed {assumption}", file=sys.stderr)
        num_images, precision = _num_images(args, num_processes), _precision(args)
        peak_flops = GPUS[gpu].peak_flops[precision]
        speeds[precision] = _assumed_speed(peak_flops, precision, utilisation, price_per_gpu_hour)
        runs = [
            estimate_run(cost.training_flops, num_images, number, peak_flops, utilisation, price_per_gpu_hour)
            for number in _NUM_GPUS
        ]
        name = recipe.stem
        operations.append(
            [
                name,
                "x".join(map(str, latent_shape)),
                f"{cost.backbone_parameters / 1e6:.1f}",
                f"{cost.latent_embedder_parameters / 1e6:.1f}",
                f"{cost.forward_flops / 1e9:.1f}",
                f"{cost.training_flops / 1e9:.1f}",
                f"{num_images / 1e6:.1f}",
                f"{num_images * cost.training_flops / 1e18:.1f}",
            ]
        )
        sizes = (
            cost.weight_bytes,
            cost.gradient_bytes,
            cost.moment_bytes,
            cost.average_bytes,
            cost.activation_bytes,
            cost.memory(),
            checkpointed.memory(),
            cost.memory(8, "fsdp2"),
        )
        memory.append([name, str(args.train_batch_size), *(f"{size / 1e9:.1f}" for size in sizes)])
        time.append(
            [
                name,
                *(f"{run.images_per_second:,.0f}" for run in runs),
                *(f"{run.days:.3f}" for run in runs),
                f"{runs[0].gpu_hours:,.0f}",
                f"${runs[0].price:,.0f}",
            ]
        )
    header = ["recipe", "latents", "backbone, M", "LEM, M", "forward, GFLOPs", "training, GFLOPs", "images, M"]
    parts = [
        f"Operations, of an image and of a run with the batch of {num_processes} processes (computed, not measured)",
        format_table([*header, "run, EFLOPs"], operations),
        f"Memory on one {gpu} of {GPUS[gpu].memory / 1e9:.0f} GB, in GB (computed, not measured)",
        format_table(
            ["recipe", "batch", "weights", "gradients", "moments", "averages", "activations", "sum"]
            + ["sum, checkpointing", "sum, FSDP2 on 8"],
            memory,
        ),
        f"Time and price on {gpu}s (computed, not measured; assumed: {'; '.join(speeds.values())})",
        format_table(
            ["recipe", *(f"images/s on {number}" for number in _NUM_GPUS)]
            + [*(f"days on {number}" for number in _NUM_GPUS), "GPU-hours", "price"],
            time,
        ),
    ]
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    """The command; `argv` are its arguments, the process's by default. Raises a `ValueError` where they do not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "recipes",
        type=Path,
        nargs="*",
        help="Recipes of the trainer, those of ImageNet in training/recipes by default.",
    )
    parser.add_argument("--gpu", default="H100", choices=list(GPUS))
    parser.add_argument("--utilisation", type=float, default=UTILISATION, help="Assumed share of the peak FLOP/s.")
    parser.add_argument("--price", type=float, default=PRICE_PER_GPU_HOUR, help="Assumed dollars per GPU-hour.")
    parser.add_argument(
        "--num_processes", type=int, default=RECIPE_PROCESSES, help="By which the batch of a recipe is multiplied."
    )
    args = parser.parse_args(argv)
    recipes = args.recipes or sorted(Path("training/recipes").glob("*-imagenet256*.yaml"))
    if not recipes:
        parser.error("`recipes` must be given where there is no folder training/recipes, got none.")
    print(format_tables(recipes, args.gpu, args.utilisation, args.price, args.num_processes))


if __name__ == "__main__":
    main()
