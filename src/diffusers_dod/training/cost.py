# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Cost of a training run, computed from counted operations and bytes, not measured.

    python -m diffusers_dod.training.cost --utilisation 0.4 --price 2.5 training/recipes/dod-b-imagenet256.yaml

A multiply-add is 2 FLOPs. Matrix products are counted, including attention, and nothing else. Models and batches are
on the meta device or fake, so that nothing is computed. docs/training_cost.md explains the model.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import torch

from ..autoencoders import AUTOENCODERS, check_image_size, latent_channels, spatial_factor
from ..checks import check_at_least, check_choice, check_number
from ..compute import TrainingCost, training_cost
from ..data.latents import SHARD_MANIFEST
from ..presets import PRESETS, Preset
from ..tables import format_table
from .arguments import parse_args, read_config


@dataclass(frozen=True)
class GPU:
    """
    A kind of GPU, by its data sheet.

    Args:
        memory (`float`): Memory in bytes.
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
_NUM_GPUS = (1, 8, 64)  # in the tables


@dataclass(frozen=True)
class RunEstimate:
    """
    Time and price of a run.

    Args:
        images_per_second (`float`): Images per second on all GPUs together.
        days (`float`): Duration in days.
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


def find_preset(args: argparse.Namespace) -> tuple[Preset, list[str]]:
    """
    Finds the model that the options name, from configs alone, and the assumptions about it.

    Args:
        args (`argparse.Namespace`): The options of `training/train_dod.py`.
    """
    preset, assumptions = PRESETS[args.preset], []
    if args.pretrained_model_name_or_path is not None:
        path = args.pretrained_model_name_or_path
        try:
            saved = Preset.from_pretrained(path)
            if saved.latent_embedder_config is None and preset.latent_embedder_config is not None:
                # A FiTv2 becomes the backbone of a DoD.
                saved = replace(
                    saved.override(prior_embed_dim=preset.transformer_config["prior_embed_dim"]),
                    latent_embedder_config=preset.latent_embedder_config,
                    latent_embedder_class=preset.latent_embedder_class,
                ).override(patch_size=saved.transformer_config["patch_size"])
            preset = saved
        except OSError:
            assumptions.append(f"a model of the preset's size: the configs of {path!r} cannot be reached")
    names = ("num_latent_tokens", "latent_token_dim", "patch_size")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return preset.override(**given), assumptions


def _find_latents(args: argparse.Namespace) -> tuple[tuple[int, int, int], int, list[str]]:
    """Finds shape of latents and number of classes without data, and the assumptions about them."""
    manifest = (args.latents_dir or args.output_dir / "latents") / SHARD_MANIFEST
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
    """Cost of a run with these options, the shape of its latents, and the assumptions."""
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
    """The option `mixed_precision`, by default the launcher's configuration."""
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
    Describes a run and its cost, without data, weights or computation.

    It does not check that saved models, data and options fit each other. The run itself does.

    Args:
        args (`argparse.Namespace`): The options of the trainer.
        num_processes (`int`, *optional*): Number of processes. By default that of the options or of the launcher.
        utilisation (`float`, defaults to `UTILISATION`): Assumed share of the peak FLOP/s, in (0, 1].
        price_per_gpu_hour (`float`, defaults to `PRICE_PER_GPU_HOUR`): Assumed price in US dollars, >= 0.

    Returns:
        `str`: Lines with options, parameters, FLOPs, memory, time and assumptions.

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


def format_tables(
    recipes: Sequence[Path],
    gpu: str = "H100",
    utilisation: float = UTILISATION,
    price_per_gpu_hour: float = PRICE_PER_GPU_HOUR,
    num_processes: int = RECIPE_PROCESSES,
) -> str:
    """
    Formats the cost of recipes as Markdown tables.

    Args:
        recipes (`Sequence[Path]`): The files.
        gpu (`str`, defaults to `"H100"`): Name of the GPU in [`GPUS`].
        utilisation (`float`, defaults to `UTILISATION`): Assumed share of the peak FLOP/s, in (0, 1].
        price_per_gpu_hour (`float`, defaults to `PRICE_PER_GPU_HOUR`): Assumed price in US dollars, >= 0.
        num_processes (`int`, defaults to 8): Number of processes. A recipe's batch is multiplied by it.

    Returns:
        `str`: Tables of operations, of memory, and of time and price. Assumptions about latents and classes go to the
        standard error.

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
