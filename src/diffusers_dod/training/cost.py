# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Cost of a training run, computed from counted operations and bytes, not measured.

    python -m diffusers_dod.training.cost --price 2.5 dod-b-imagenet256

The time of a step is that of a roofline: every operation takes the longer of its FLOPs and its bytes. Models and
batches are on the meta device or fake, so that nothing is computed. docs/training_cost.md explains the model.
"""

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

import diffusers
import torch
from tqdm.auto import tqdm

from ..autoencoders import check_autoencoder, check_image_size, latent_channels, spatial_factor
from ..checks import check_at_least, check_choice, check_number
from ..command_line import run_main
from ..compute import TrainingCost, TrainingStep, training_cost, training_work
from ..data.latents import SHARD_MANIFEST, LatentShape
from ..operations import Work
from ..options import describe, find_given, option, parse_options, read_recipe
from ..presets import PRESETS, Preset
from ..processes import DEFAULT_WORKERS
from ..records import read_record
from ..shipped import RECIPES, find_recipe, find_shipped
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
        bandwidth (`float`): Bytes per second of the memory.
        peak_flops (`dict[str, float]`): Dense FLOP/s of matrix products in `"bf16"`, `"fp16"`, `"tf32"` and `"fp32"`.
    """

    memory: float
    bandwidth: float
    peak_flops: dict[str, float]


# NVIDIA's data sheets of the SXM cards, whose numbers "with sparsity" are twice the dense ones.
_HOPPER_PEAK_FLOPS = {"bf16": 989e12, "fp16": 989e12, "tf32": 494.5e12, "fp32": 67e12}
GPUS = {"H100": GPU(80e9, 3.35e12, _HOPPER_PEAK_FLOPS), "H200": GPU(141e9, 4.8e12, _HOPPER_PEAK_FLOPS)}

# Assumptions.
PEAK_SHARE = 0.7  # of the peak FLOP/s, that matrix products reach
BANDWIDTH_SHARE = 0.85  # of the memory's bytes per second, that all operations reach
LAUNCH_SECONDS = 5e-6  # of the CPU, to launch an operation
LINK_BANDWIDTH = 0.7 * 450e9  # bytes per second from a GPU to the next (NVLink)
OVERLAP = 2 / 3  # of forward and backward pass, during which gradients are summed: the backward pass
SAMPLE_SECONDS, NUMBER_SECONDS = 190e-6, 5e-9  # of a CPU core, to read a sample and each number of its latents
# What a compiler leaves of the bytes of elementwise operations and of the launches, by benchmarks/count_compiled.py.
COMPILED_BYTES, COMPILED_LAUNCHES = 0.84, 0.85
PRICE_PER_GPU_HOUR = 2.5  # US dollars
RECIPE_PROCESSES = 8  # of the ImageNet recipes, whose batch is that of one of them
LATENT_CHANNELS, SPATIAL_FACTOR = 4, 8  # of an autoencoder whose config cannot be reached


@dataclass(frozen=True)
class StepTime:
    """
    Seconds of an optimizer step on a GPU, by what they are spent for.

    Args:
        products (`float`): The GPU on matrix products of forward and backward pass.
        elementwise (`float`): The GPU on all else of them.
        launching (`float`): The CPU on launching both.
        data (`float`, defaults to 0.0): Reading the batch, by all workers at the same time.
        num_workers (`int`, defaults to 0): Processes that read; with 0 the launching process reads.
        optimizer (`float`, defaults to 0.0): Clipping, AdamW and averages.
        all_reduce (`float`, defaults to 0.0): Sum of the gradients of all processes.
    """

    products: float
    elementwise: float
    launching: float
    data: float = 0.0
    num_workers: int = 0
    optimizer: float = 0.0
    all_reduce: float = 0.0

    @property
    def gpu(self) -> float:
        """Forward and backward pass on the GPU."""
        return self.products + self.elementwise

    @property
    def total(self) -> float:
        """The step: GPU and CPU work at the same time, the sum of gradients overlaps the backward pass."""
        cpu = self.launching + (self.data if self.num_workers == 0 else 0.0)
        passes = max(self.gpu, cpu)
        step = passes + max(self.all_reduce - OVERLAP * passes, 0.0) + self.optimizer
        return max(step, self.data)


def estimate_step(
    work: Work,
    cost: TrainingCost,
    gpu: GPU,
    precision: str = "bf16",
    num_micro_batches: int = 1,
    num_processes: int = 1,
    is_compiled: bool = False,
    data_seconds: float = 0.0,
    num_workers: int = 0,
) -> StepTime:
    """
    Time of an optimizer step under the assumptions above.

    Args:
        work ([`Work`]): Operations of a micro-batch, forward and backward.
        cost ([`TrainingCost`]): Sizes of weights, gradients, moments and averages.
        gpu ([`GPU`]): The kind of GPU.
        precision (`str`, defaults to `"bf16"`): `"tf32"` if matrix products in fp32 are in TF32, else any.
        num_micro_batches (`int`, defaults to 1): Micro-batches of the step.
        num_processes (`int`, defaults to 1): Number of processes, with a GPU each.
        is_compiled (`bool`, defaults to `False`): Whether blocks are compiled.
        data_seconds (`float`, defaults to 0.0): Seconds of a CPU core to read the images of the step.
        num_workers (`int`, defaults to 0): Processes that read them.

    Returns:
        [`StepTime`].
    """
    fp32 = "tf32" if precision == "tf32" else "fp32"
    dtypes = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: fp32}
    peak_flops = {dtype: PEAK_SHARE * gpu.peak_flops[name] for dtype, name in dtypes.items()}
    bandwidth = BANDWIDTH_SHARE * gpu.bandwidth
    seconds = work.seconds(peak_flops, bandwidth)
    left_bytes, left_launches = (COMPILED_BYTES, COMPILED_LAUNCHES) if is_compiled else (1.0, 1.0)
    # Clipping reads gradients twice and writes them; AdamW reads them, and reads and writes weights and moments; an
    # average is read and written, and reads the weights.
    trained = cost.gradient_bytes
    optimizer_bytes = (3 + 1 + 2) * trained + 2 * cost.moment_bytes + 3 * cost.average_bytes
    optimizer_bytes += 3 * trained * (num_micro_batches - 1)  # gradients are added up
    return StepTime(
        products=num_micro_batches * seconds[True],
        elementwise=num_micro_batches * seconds[False] * left_bytes,
        launching=num_micro_batches * work.num_operations * left_launches * LAUNCH_SECONDS,
        data=data_seconds / max(num_workers, 1),
        num_workers=num_workers,
        optimizer=optimizer_bytes / bandwidth,
        all_reduce=2 * (num_processes - 1) / num_processes * cost.gradient_bytes / LINK_BANDWIDTH,
    )


@dataclass(frozen=True)
class RunEstimate:
    """
    Time and price of a run.

    Args:
        images_per_second (`float`): Images per second on all GPUs together.
        hours (`float`): Duration in hours.
        gpu_hours (`float`): GPU-hours.
        price (`float`): US dollars.
    """

    images_per_second: float
    hours: float
    gpu_hours: float
    price: float


def estimate_run(
    step_seconds: float,
    images_per_step: int,
    num_steps: int,
    num_gpus: int = 1,
    price_per_gpu_hour: float = PRICE_PER_GPU_HOUR,
) -> RunEstimate:
    """
    Time and price of a run of equal steps.

    Args:
        step_seconds (`float`): Seconds of a step, > 0.
        images_per_step (`int`): Images of a step on all GPUs, >= 1.
        num_steps (`int`): Steps of the run, >= 1.
        num_gpus (`int`, defaults to 1): Number of GPUs.
        price_per_gpu_hour (`float`, defaults to `PRICE_PER_GPU_HOUR`): US dollars, >= 0.

    Returns:
        [`RunEstimate`].

    Raises:
        `TypeError`, `ValueError`: an argument is of the wrong type or out of range.
    """
    for name, value in (("images_per_step", images_per_step), ("num_steps", num_steps), ("num_gpus", num_gpus)):
        check_at_least(name, value, 1)
    check_number("step_seconds", step_seconds, 0, open_minimum=True)
    check_number("price_per_gpu_hour", price_per_gpu_hour, 0)
    hours = num_steps * step_seconds / 3600
    gpu_hours = num_gpus * hours
    return RunEstimate(images_per_step / step_seconds, hours, gpu_hours, gpu_hours * price_per_gpu_hour)


def find_preset(options: TrainingOptions) -> tuple[Preset, list[str]]:
    """
    Finds the model and sampling defaults that the options name, from configs alone, and the assumptions about them.

    Args:
        options ([`TrainingOptions`]): The options of the trainer.
    """
    preset, assumptions = PRESETS[options.model.preset], []
    if options.model.pretrained_model_name_or_path is not None:
        path = options.model.pretrained_model_name_or_path
        try:
            saved = Preset.from_pretrained(find_shipped(path))
            if saved.latent_embedder_config is None and preset.latent_embedder_config is not None:
                # A FiTv2 becomes the backbone of a DoD; its other sampling defaults are those of its only stage.
                kept = ("default_num_inference_steps",)
                saved = replace(
                    saved.override(prior_embed_dim=preset.transformer_config["prior_embed_dim"]),
                    latent_embedder_config=preset.latent_embedder_config,
                    latent_embedder_class=preset.latent_embedder_class,
                    pipeline_config=preset.pipeline_config
                    | {name: value for name, value in saved.pipeline_config.items() if name in kept},
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
            # Of any class. After it has loaded a model, `AutoModel` looks for the config under another name.
            config = diffusers.AutoencoderKL.load_config(found[0], subfolder=found[1])
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


def _training_step(options: TrainingOptions, gradient_checkpointing: bool) -> TrainingStep:
    return replace(
        options.training_step, mixed_precision=_mixed_precision(options), gradient_checkpointing=gradient_checkpointing
    )


@dataclass(frozen=True)
class _Run:
    """What a run with given options costs on any GPU, and what is assumed about its data and models."""

    options: TrainingOptions
    num_processes: int
    latent_shape: tuple[int, int, int]
    num_classes: int
    cost: TrainingCost
    work: Work
    assumptions: list[str]

    @classmethod
    def count(cls, options: TrainingOptions, num_processes: int) -> "_Run":
        preset, model_assumptions = find_preset(options)
        latent_shape, num_classes, data_assumptions = _find_latents(options)
        step = _training_step(options, options.model.gradient_checkpointing)
        cost = training_cost(preset, latent_shape, num_classes, step)
        work = training_work(preset, latent_shape, num_classes, step)
        return cls(
            options,
            num_processes,
            latent_shape=latent_shape,
            num_classes=num_classes,
            cost=cost,
            work=work,
            assumptions=model_assumptions + data_assumptions,
        )

    @property
    def images_per_step(self) -> int:
        optimizer = self.options.optimizer
        return optimizer.train_batch_size * optimizer.gradient_accumulation_steps * self.num_processes

    @property
    def num_images(self) -> int:
        return self.options.optimizer.max_train_steps * self.images_per_step

    def step_time(self, gpu: GPU, is_compiled: bool) -> StepTime:
        num_workers = self.options.data.encoding.dataloader_num_workers
        sample_seconds = SAMPLE_SECONDS + NUMBER_SECONDS * math.prod(self.latent_shape)
        return estimate_step(
            self.work,
            self.cost,
            gpu,
            precision=_precision(self.options),
            num_micro_batches=self.options.optimizer.gradient_accumulation_steps,
            num_processes=self.num_processes,
            is_compiled=is_compiled,
            data_seconds=sample_seconds * self.images_per_step / self.num_processes,
            num_workers=DEFAULT_WORKERS if num_workers is None else num_workers,
        )

    def estimates(
        self, gpu: GPU, utilisation: float | None, price: float
    ) -> dict[str, tuple[RunEstimate, StepTime | None]]:
        """Estimates of the run and the parts of its step, eager and compiled, or by an assumed utilisation alone."""
        if utilisation is None:
            modes = {"eager": False, "compiled": True}
            parts = {mode: self.step_time(gpu, is_compiled) for mode, is_compiled in modes.items()}
            steps = {mode: (time.total, time) for mode, time in parts.items()}
        else:
            check_number("utilisation", utilisation, 0, 1, open_minimum=True)
            flops = self.images_per_step * self.cost.training_flops / self.num_processes
            peak_flops = gpu.peak_flops[_precision(self.options)]
            steps = {f"{utilisation:.0%} utilisation": (flops / peak_flops / utilisation, None)}
        run = self.images_per_step, self.options.optimizer.max_train_steps, self.num_processes, price
        return {mode: (estimate_run(seconds, *run), time) for mode, (seconds, time) in steps.items()}


def _mixed_precision(options: TrainingOptions) -> str:
    """The option `mixed_precision`, by default the launcher's configuration."""
    return options.precision.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def _precision(options: TrainingOptions) -> str:
    """Precision of the matrix products."""
    mixed_precision = _mixed_precision(options)
    return mixed_precision if mixed_precision != "no" else "tf32" if options.precision.allow_tf32 else "fp32"


def _assumed_speed(gpu: GPU, precision: str, utilisation: float | None, price_per_gpu_hour: float) -> str:
    peak = f"{gpu.peak_flops[precision] / 1e12:g} TFLOP/s ({precision}, dense)"
    price = f"${price_per_gpu_hour:.2f} per GPU-hour"
    if utilisation is not None:
        return f"{utilisation:.0%} of {peak}, {price}, and no time for anything but matrix products"
    return (
        f"{PEAK_SHARE:.0%} of {peak}, {BANDWIDTH_SHARE:.0%} of {gpu.bandwidth / 1e12:g} TB/s, "
        f"{LAUNCH_SECONDS * 1e6:g} us for a launch, {LINK_BANDWIDTH / 1e9:g} GB/s between GPUs, {price}"
    )


def _format_time(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours < 24 else f"{hours / 24:,.1f} days"


def _describe_step(time: StepTime) -> str:
    """The parts of a step in milliseconds."""
    parts = {"matrix products": time.products, "elementwise": time.elementwise, "launching": time.launching}
    parts |= {"data": time.data, "optimizer": time.optimizer, "all-reduce": time.all_reduce}
    return ", ".join(f"{name} {1000 * seconds:.1f}" for name, seconds in parts.items())


def describe_run(
    options: TrainingOptions,
    num_processes: int | None = None,
    utilisation: float | None = None,
    price_per_gpu_hour: float = PRICE_PER_GPU_HOUR,
) -> str:
    """
    Describes a run and its cost, without data, weights or computation.

    It does not check that saved models, data and options fit each other. The run itself does.

    Args:
        options ([`TrainingOptions`]): The options of the trainer.
        num_processes (`int`, *optional*): Number of processes. By default that of the options or of the launcher.
        utilisation (`float`, *optional*): Assumed share of the peak FLOP/s, in (0, 1]. By default the time of a step
            comes from its operations and bytes, see [`estimate_step`].
        price_per_gpu_hour (`float`, defaults to `PRICE_PER_GPU_HOUR`): Assumed price in US dollars, >= 0.

    Returns:
        `str`: Lines with options, parameters, FLOPs, memory, time and assumptions.

    Raises:
        `TypeError`, `ValueError`: an argument is out of range, or the options do not fit the autoencoder.
    """
    if num_processes is None:
        num_processes = options.processes.num_processes or int(os.environ.get("WORLD_SIZE", 1))
    check_at_least("num_processes", num_processes, 1)
    run = _Run.count(options, num_processes)
    cost, precision, num_images = run.cost, _precision(options), run.num_images
    states = {"weights": cost.weight_bytes, "gradients": cost.gradient_bytes, "moments": cost.moment_bytes}
    states |= {f"{cost.num_averages} averages": cost.average_bytes, "activations": cost.activation_bytes}
    lines = ["Options"]
    lines += [f"  {name}: {value}" for name, value in sorted(describe(options).items())]
    lines += [
        "Computed, not measured",
        f"  parameters: {cost.backbone_parameters:,} of the backbone, {cost.latent_embedder_parameters:,} of the LEM, "
        f"{cost.trainable_parameters:,} trainable",
        f"  latents: {'x'.join(map(str, run.latent_shape))}, {run.images_per_step} images per step, "
        f"{num_images:,} in all",
        f"  FLOPs: {cost.forward_flops / 1e9:.1f} G per image forward, {cost.training_flops / 1e9:.1f} G training, "
        f"{run.images_per_step * cost.training_flops / 1e12:.1f} T per step, "
        f"{num_images * cost.training_flops / 1e18:.3g} E in all",
        f"  a micro-batch, eager: {run.work.num_operations:,} operations, {run.work.num_bytes / 1e9:.1f} GB moved",
        f"  memory in GB: {', '.join(f'{name} {count / 1e9:.2f}' for name, count in states.items())}",
    ]
    assumptions = run.assumptions
    for name, gpu in GPUS.items():
        needed, sharded = cost.memory(num_processes), cost.memory(num_processes, "fsdp2")
        lines += [
            f"  {num_processes} x {name}: {needed / 1e9:.1f} of {gpu.memory / 1e9:.0f} GB "
            f"({sharded / 1e9:.1f} GB with FSDP2)"
        ]
        for mode, (estimate, parts) in run.estimates(gpu, utilisation, price_per_gpu_hour).items():
            lines += [
                f"    {mode}: {estimate.images_per_second:,.0f} images/s, {_format_time(estimate.hours)}, "
                f"{estimate.gpu_hours:,.1f} GPU-hours, ${estimate.price:,.0f}"
            ]
            lines += [] if parts is None else [f"      a step in ms: {_describe_step(parts)}"]
        assumptions += [f"{name}: " + _assumed_speed(gpu, precision, utilisation, price_per_gpu_hour)]
    return "\n".join([*lines, "Assumed", *(f"  {assumption}" for assumption in assumptions)])


def _read_recipe(recipe: Path) -> TrainingOptions:
    argv = ["--config", str(recipe), "--output_dir", os.devnull]
    if "--latents_dir" not in read_recipe(recipe):
        argv += ["--latents_dir", os.devnull]  # images need not be named
    return parse_options(TrainingOptions, argv)


def _operation_cells(run: _Run) -> list[str]:
    cost = run.cost
    return [
        "x".join(map(str, run.latent_shape)),
        f"{cost.backbone_parameters / 1e6:.1f}",
        f"{cost.latent_embedder_parameters / 1e6:.1f}",
        f"{cost.forward_flops / 1e9:.1f}",
        f"{cost.training_flops / 1e9:.1f}",
        f"{run.work.num_operations:,}",
        f"{run.work.num_bytes / 1e9:.1f}",
        f"{run.num_images / 1e6:.1f}",
        f"{run.num_images * cost.training_flops / 1e18:.1f}",
    ]


def _memory_cells(run: _Run) -> list[str]:
    cost = run.cost
    preset, _ = find_preset(run.options)
    checkpointed = training_cost(preset, run.latent_shape, run.num_classes, _training_step(run.options, True))
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
    return [str(run.options.optimizer.train_batch_size), *(f"{size / 1e9:.1f}" for size in sizes)]


def _step_cells(run: _Run, gpu: GPU) -> list[str]:
    eager, compiled = (run.step_time(gpu, is_compiled) for is_compiled in (False, True))
    seconds = (
        eager.products,
        eager.elementwise,
        eager.launching,
        eager.data,
        eager.optimizer,
        eager.all_reduce,
        eager.total,
        compiled.total,
    )
    flops = run.images_per_step * run.cost.training_flops / run.num_processes
    shares = (flops / time.total / gpu.peak_flops[_precision(run.options)] for time in (eager, compiled))
    return [f"{1000 * part:.1f}" for part in seconds] + [f"{share:.0%}" for share in shares]


def format_tables(
    recipes: Sequence[Path],
    gpu: str = "H100",
    utilisation: float | None = None,
    price_per_gpu_hour: float = PRICE_PER_GPU_HOUR,
    num_processes: int = RECIPE_PROCESSES,
) -> str:
    """
    Formats the cost of recipes as Markdown tables.

    Args:
        recipes (`Sequence[Path]`): The files.
        gpu (`str`, defaults to `"H100"`): Name of the GPU in [`GPUS`].
        utilisation (`float`, *optional*): Assumed share of the peak FLOP/s, in (0, 1]. By default the time of a step
            comes from its operations and bytes, see [`estimate_step`].
        price_per_gpu_hour (`float`, defaults to `PRICE_PER_GPU_HOUR`): Assumed price in US dollars, >= 0.
        num_processes (`int`, defaults to 8): Number of processes. A recipe's batch is multiplied by it.

    Returns:
        `str`: Tables of operations, of memory, of a step, and of time and price. Assumptions about latents and classes
        go to the standard error.

    Raises:
        `TypeError`, `ValueError`: an argument is of the wrong type or out of range.
    """
    check_choice("gpu", gpu, tuple(GPUS))
    check_at_least("num_processes", num_processes, 1)
    card = GPUS[gpu]
    progress = tqdm(recipes, desc="Counting", unit="recipes", delay=1, disable=None)
    runs = {recipe: _Run.count(_read_recipe(recipe), num_processes) for recipe in progress}
    for recipe, run in runs.items():
        for assumption in run.assumptions:
            print(f"{recipe}: assumed {assumption}", file=sys.stderr)
    precisions = dict.fromkeys(_precision(run.options) for run in runs.values())
    speeds = "; ".join(_assumed_speed(card, name, utilisation, price_per_gpu_hour) for name in precisions)
    estimates = {recipe: run.estimates(card, utilisation, price_per_gpu_hour) for recipe, run in runs.items()}
    modes = list(next(iter(estimates.values()), ()))

    def rows(cells: Callable[[_Run], list[str]]) -> list[list[str]]:
        return [[recipe.stem, *cells(run)] for recipe, run in runs.items()]

    parts = [
        f"Operations of an image, of a batch and of a run on {num_processes} processes (computed, not measured)",
        format_table(
            ["recipe", "latents", "backbone, M", "LEM, M", "forward, GFLOPs", "training, GFLOPs"]
            + ["operations", "moved, GB", "images, M", "run, EFLOPs"],
            rows(_operation_cells),
        ),
        f"Memory on one {gpu} of {card.memory / 1e9:.0f} GB, in GB (computed, not measured)",
        format_table(
            ["recipe", "batch", "weights", "gradients", "moments", "averages", "activations", "sum"]
            + ["sum, checkpointing", "sum, FSDP2 on 8"],
            rows(_memory_cells),
        ),
    ]
    if utilisation is None:
        parts += [
            f"A step on one of {num_processes} {gpu}s, in ms (computed, not measured; assumed: {speeds})",
            format_table(
                ["recipe", "matrix products", "elementwise", "launching", "data", "optimizer", "all-reduce"]
                + ["step, eager", "step, compiled", "utilisation, eager", "utilisation, compiled"],
                rows(lambda run: _step_cells(run, card)),
            ),
        ]
    cells = {
        "images/s": lambda estimate: f"{estimate.images_per_second:,.0f}",
        "hours": lambda estimate: f"{estimate.hours:,.1f}",
        "GPU-hours": lambda estimate: f"{estimate.gpu_hours:,.0f}",
        "price": lambda estimate: f"${estimate.price:,.0f}",
    }
    parts += [
        f"Time and price on {num_processes} {gpu}s (computed, not measured; assumed: {speeds})",
        format_table(
            ["recipe", *(f"{title}, {mode}" for title in cells for mode in modes)],
            [
                [recipe.stem, *(cell(by_mode[mode][0]) for cell in cells.values() for mode in modes)]
                for recipe, by_mode in estimates.items()
            ],
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
        help="Recipes of the trainer, by file or by name; those of ImageNet by default.",
    )
    gpu: str = option("H100", choices=GPUS, help="Kind of GPU.")
    utilisation: float | None = option(
        None,
        above=0,
        at_most=1,
        help="Assumed share of the peak FLOP/s, in place of the time of operations and bytes.",
    )
    price: float = option(PRICE_PER_GPU_HOUR, at_least=0, help="Assumed dollars per GPU-hour.")
    num_processes: int = option(
        RECIPE_PROCESSES, at_least=1, help="Number of processes that the batch of a recipe is multiplied by."
    )


def find_recipes(options: CostOptions) -> CostOptions:
    """Fills in the recipes of `options` if none are given. Raises a `ValueError` if one is not to be found."""
    recipes = options.recipes or sorted(find_shipped(RECIPES).glob("*-imagenet256*.yaml"))
    return replace(options, recipes=tuple(find_recipe(recipe, "recipes") for recipe in recipes))


def main(argv: list[str] | None = None) -> None:
    """Runs the command; `argv` defaults to the process's arguments. Raises a `ValueError` if they do not fit."""
    options = parse_options(CostOptions, argv, __doc__, find_recipes)
    print(format_tables(options.recipes, options.gpu, options.utilisation, options.price, options.num_processes))


if __name__ == "__main__":
    run_main(main)
