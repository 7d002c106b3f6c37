# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Cost of a training run, computed from counted operations and bytes, not measured.

    python -m diffusers_dod.training.cost --utilisation 0.4 --price 2.5 training/recipes/dod-b-imagenet256.yaml

A multiply-add is 2 FLOPs. Matrix products are counted, including attention, and nothing else. Models and batches are
on the meta device or fake, so that nothing is computed. docs/training_cost.md explains the model.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

import diffusers
import torch

from ..autoencoders import check_autoencoder, check_image_size, latent_channels, spatial_factor
from ..checks import check_at_least, check_choice, check_number
from ..command_line import run_main
from ..compute import TrainingCost, training_cost
from ..data.latents import SHARD_MANIFEST, LatentShape
from ..options import describe, find_given, option, parse_options, read_recipe
from ..presets import PRESETS, Preset
from ..records import read_record
from ..tables import format_table
from ..training_options import TrainingOptions
from .encode_latents import find_autoencoder


class _LatentsManifest(TypedDict):
    class_names: list[str]
    latent_shape: LatentShape


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


def find_preset(options: TrainingOptions) -> tuple[Preset, list[str]]:
    """
    Finds the model that the options name, from configs alone, and the assumptions about it.

    Args:
        options ([`TrainingOptions`]): The options of the trainer.
    """
    preset, assumptions = PRESETS[options.model.preset], []
    if options.model.pretrained_model_name_or_path is not None:
        path = options.model.pretrained_model_name_or_path
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
    given = {name: value for name, value in find_given(options.model).items() if name in names}
    return preset.override(**given), assumptions


def _find_latents(options: TrainingOptions) -> tuple[tuple[int, int, int], int, list[str]]:
    """Finds shape of latents and number of classes without data, and the assumptions about them."""
    manifest = (options.data.latents_dir or options.output.output_dir / "latents") / SHARD_MANIFEST
    if manifest.is_file():
        content = read_record(manifest, _LatentsManifest)
        return tuple(content["latent_shape"]), len(content["class_names"]), []
    num_classes = PRESETS[options.model.preset].transformer_config.get("num_classes", 1000)
    assumptions = [f"{num_classes} classes: the data are not looked at"]
    path, pipeline = options.data.pretrained_vae_name_or_path, options.model.pretrained_model_name_or_path
    channels, factor = 3, 1
    try:
        if (found := find_autoencoder(path, pipeline)) is not None:
            config = diffusers.AutoModel.load_config(found[0], subfolder=found[1])
            cls = getattr(diffusers, str(config.get("_class_name")), None)
            with torch.device("meta"):
                vae = config.get("_class_name") if cls is None else cls.from_config(config)
            check_autoencoder("pretrained_vae_name_or_path", vae)
            check_image_size(vae, options.data.images.resolution, options.data.images.resolution)
            channels, factor = latent_channels(vae), spatial_factor(vae)
        else:
            assumptions.append("a model of pixels, as `pretrained_vae_name_or_path` is not given")
    except OSError:
        channels, factor = LATENT_CHANNELS, SPATIAL_FACTOR
        assumptions.append(
            f"latents of {channels} channels and {factor} pixels a side: the config of {path or pipeline!r} cannot be "
            "reached"
        )
    side = options.data.images.resolution // factor
    return (channels, side, side), num_classes, assumptions


def _run_cost(
    options: TrainingOptions, gradient_checkpointing: bool
) -> tuple[TrainingCost, tuple[int, int, int], list[str]]:
    """Cost of a run with these options, the shape of its latents, and the assumptions."""
    preset, model_assumptions = find_preset(options)
    latent_shape, num_classes, data_assumptions = _find_latents(options)
    step = replace(
        options.training_step, mixed_precision=_mixed_precision(options), gradient_checkpointing=gradient_checkpointing
    )
    cost = training_cost(preset, latent_shape, num_classes, step)
    return cost, latent_shape, model_assumptions + data_assumptions


def _mixed_precision(options: TrainingOptions) -> str:
    """The option `mixed_precision`, by default the launcher's configuration."""
    return options.precision.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def _precision(options: TrainingOptions) -> str:
    """Precision of the matrix products."""
    mixed_precision = _mixed_precision(options)
    return mixed_precision if mixed_precision != "no" else "tf32" if options.precision.allow_tf32 else "fp32"


def _num_images(options: TrainingOptions, num_processes: int) -> int:
    return (
        options.optimizer.max_train_steps
        * options.optimizer.train_batch_size
        * options.optimizer.gradient_accumulation_steps
        * num_processes
    )


def _assumed_speed(peak_flops: float, precision: str, utilisation: float, price_per_gpu_hour: float) -> str:
    return (
        f"{utilisation:.0%} of {peak_flops / 1e12:g} TFLOP/s ({precision}, dense), "
        f"${price_per_gpu_hour:.2f} per GPU-hour, and no time for anything but matrix products"
    )


def describe_run(
    options: TrainingOptions,
    num_processes: int | None = None,
    utilisation: float = UTILISATION,
    price_per_gpu_hour: float = PRICE_PER_GPU_HOUR,
) -> str:
    """
    Describes a run and its cost, without data, weights or computation.

    It does not check that saved models, data and options fit each other. The run itself does.

    Args:
        options ([`TrainingOptions`]): The options of the trainer.
        num_processes (`int`, *optional*): Number of processes. By default that of the options or of the launcher.
        utilisation (`float`, defaults to `UTILISATION`): Assumed share of the peak FLOP/s, in (0, 1].
        price_per_gpu_hour (`float`, defaults to `PRICE_PER_GPU_HOUR`): Assumed price in US dollars, >= 0.

    Returns:
        `str`: Lines with options, parameters, FLOPs, memory, time and assumptions.

    Raises:
        `TypeError`, `ValueError`: an argument is out of range, or the options do not fit the autoencoder.
    """
    if num_processes is None:
        num_processes = options.processes.num_processes or int(os.environ.get("WORLD_SIZE", 1))
    check_at_least("num_processes", num_processes, 1)
    cost, latent_shape, assumptions = _run_cost(options, options.model.gradient_checkpointing)
    num_images = _num_images(options, num_processes)
    images_per_step = num_images // options.optimizer.max_train_steps
    precision = _precision(options)
    states = {"weights": cost.weight_bytes, "gradients": cost.gradient_bytes, "moments": cost.moment_bytes}
    states |= {f"{cost.num_averages} averages": cost.average_bytes, "activations": cost.activation_bytes}
    lines = ["Options"]
    lines += [f"  {name}: {value}" for name, value in sorted(describe(options).items())]
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
            num_gpus=num_processes,
            peak_flops=gpu.peak_flops[precision],
            utilisation=utilisation,
            price_per_gpu_hour=price_per_gpu_hour,
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
        if "--latents_dir" not in read_recipe(recipe):
            argv += ["--latents_dir", os.devnull]  # images need not be named
        options = parse_options(TrainingOptions, argv)
        cost, latent_shape, assumptions = _run_cost(options, options.model.gradient_checkpointing)
        checkpointed, _, _ = _run_cost(options, gradient_checkpointing=True)
        for assumption in assumptions:
            print(f"{recipe}: assumed {assumption}", file=sys.stderr)
        num_images, precision = _num_images(options, num_processes), _precision(options)
        peak_flops = GPUS[gpu].peak_flops[precision]
        speeds[precision] = _assumed_speed(peak_flops, precision, utilisation, price_per_gpu_hour)
        runs = [
            estimate_run(
                cost.training_flops,
                num_images,
                num_gpus=number,
                peak_flops=peak_flops,
                utilisation=utilisation,
                price_per_gpu_hour=price_per_gpu_hour,
            )
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
        memory.append([name, str(options.optimizer.train_batch_size), *(f"{size / 1e9:.1f}" for size in sizes)])
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


@dataclass(frozen=True, kw_only=True)
class CostOptions:
    """Options of the command."""

    recipes: tuple[Path, ...] = option(
        (),
        is_positional=True,
        nargs="*",
        help="Recipes of the trainer, those of ImageNet in training/recipes by default.",
    )
    gpu: str = option("H100", choices=GPUS, help="Kind of GPU.")
    utilisation: float = option(UTILISATION, above=0, at_most=1, help="Assumed share of the peak FLOP/s.")
    price: float = option(PRICE_PER_GPU_HOUR, at_least=0, help="Assumed dollars per GPU-hour.")
    num_processes: int = option(
        RECIPE_PROCESSES, at_least=1, help="Number of processes that the batch of a recipe is multiplied by."
    )


def find_recipes(options: CostOptions) -> CostOptions:
    """Fills in the recipes of `options` if none are given. Raises a `ValueError` if there are none to be found."""
    recipes = options.recipes or tuple(sorted(Path("training/recipes").glob("*-imagenet256*.yaml")))
    if not recipes:
        raise ValueError("`recipes` must be given where there is no folder training/recipes, got none.")
    return replace(options, recipes=recipes)


def main(argv: list[str] | None = None) -> None:
    """Runs the command; `argv` defaults to the process's arguments. Raises a `ValueError` if they do not fit."""
    options = parse_options(CostOptions, argv, __doc__, find_recipes)
    print(format_tables(options.recipes, options.gpu, options.utilisation, options.price, options.num_processes))


if __name__ == "__main__":
    run_main(main)
