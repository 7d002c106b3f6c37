# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Times what the package does against peers that do the same, on one thread of a CPU, in one table.

    make bench
    python benchmarks/bench.py --rows "stage 1 / broadcast, fp32" --repetitions 21

A row is a ratio of two times. Both are measured in turns, so that what else the machine does slows both down, and the
row has the median of the ratios with their quartiles. Rows named "growth with" have in place of a ratio the exponent b
of time ~ size^b: the slope over the upper half of the sizes, both in logarithms. A row has moved if its quartiles and
those of `benchmarks/results.json` do not meet. Rows that `--output_file` has already are not measured again: remove it
to start anew. `--update` makes what is measured the results to compare with, and puts them into docs/benchmarks.md.
"""

import argparse
import gc
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DiTTransformer2DModel
from diffusers.training_utils import EMAModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from diffusers_dod import DoDFlowMatchScheduler, DoDPipeline
from diffusers_dod.data.encoding import EncodingOptions, encode_latents, finish_latents, latent_settings
from diffusers_dod.data.labelled_images import LabelledImages
from diffusers_dod.data.latents import LatentDataset
from diffusers_dod.data.sample_stream import PositionSampler, SampleDraws, TrainingSamples, collate_priors_first
from diffusers_dod.data.textures import TEXTURE_CLASSES, TextureDataset
from diffusers_dod.evaluation.sample import SamplingOptions, sample
from diffusers_dod.files import write_json
from diffusers_dod.losses import DoDJointModel
from diffusers_dod.metrics.frechet import frechet_distance
from diffusers_dod.metrics.kernel_distance import kernel_distance
from diffusers_dod.metrics.precision_recall import ReferenceManifold
from diffusers_dod.metrics.statistics import RunningStatistics
from diffusers_dod.operations import FLOP_FORMULAS
from diffusers_dod.options import from_values
from diffusers_dod.presets import PRESETS
from diffusers_dod.tables import format_table
from diffusers_dod.training.ema import WeightAverage
from diffusers_dod.training.models import use_fast_attention


ROOT = Path(__file__).parents[1]
COMMITTED = Path(__file__).with_name("results.json")
PAGE = ROOT / "docs/benchmarks.md"
NUM_LAYERS, BATCH_SIZE, DTYPES = 3, 2, {"fp32": torch.float32, "bf16": torch.bfloat16}
Run = Callable[[], Any]


# ------------------------------------------------------------------------------------------------------- the backbone


class Backbone:
    """
    A few blocks of DoD-S, its inputs, and a DiT of Diffusers of the same size.

    Args:
        dtype (`torch.dtype`): Dtype of weights and inputs.
        batch_size (`int`): Number of samples.
        size (`int`): Side of the latents.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, batch_size: int = BATCH_SIZE, size: int = 32):
        torch.manual_seed(0)
        preset = PRESETS["DoD-S"].override(num_layers=NUM_LAYERS, sample_size=size)
        self.model = torch.nn.Module.to(preset.build()[0], dtype)  # Diffusers' own warns about the time
        self.model.time_embed.float()
        config = self.model.config
        heads = {"num_attention_heads": config.num_attention_heads, "attention_head_dim": config.attention_head_dim}
        self.dit = DiTTransformer2DModel(**heads, num_layers=NUM_LAYERS, sample_size=size, attention_bias=True).to(
            dtype
        )
        self.latents = torch.randn(batch_size, 4, size, size, dtype=dtype)
        self.labels = torch.zeros(batch_size, dtype=torch.int64)
        self.priors = torch.randn(batch_size, (size // 2) ** 2, config.prior_embed_dim, dtype=dtype)

    def stage_1(self) -> torch.Tensor:
        """The velocity without priors."""
        return self.model(self.latents, 500.0, self.labels).sample

    def stage_1_broadcast(self) -> torch.Tensor:
        """The same with a row of conditioning for each token."""
        return self.model(self.latents, 500.0, self.labels, prior_embeds=torch.zeros_like(self.priors)).sample

    def mixed(self) -> torch.Tensor:
        """Twice the samples, the first half with priors: a guided evaluation, or a pass of the training."""
        latents, labels = torch.cat([self.latents] * 2), torch.cat([self.labels] * 2)
        return self.model(latents, 500.0, labels, prior_embeds=self.priors).sample

    def mixed_broadcast(self) -> torch.Tensor:
        """The same with a row of conditioning for each token of all samples."""
        latents, labels = torch.cat([self.latents] * 2), torch.cat([self.labels] * 2)
        priors = torch.cat([self.priors, torch.zeros_like(self.priors)])
        return self.model(latents, 500.0, labels, prior_embeds=priors).sample

    def stage_1_dit(self) -> torch.Tensor:
        """The prediction of the DiT."""
        timesteps = torch.full_like(self.labels, 500)
        return self.dit(self.latents, timestep=timesteps, class_labels=self.labels).sample


def without_gradients(run: Run) -> Run:
    """`run` as in sampling."""

    def sample() -> None:
        with torch.no_grad():
            run()

    return sample


def with_gradients(model: torch.nn.Module, run: Run) -> Run:
    """`run` and its backward pass."""

    def train() -> None:
        model.zero_grad(set_to_none=True)
        run().float().square().mean().backward()

    return train


def flops(run: Run) -> int:
    """FLOPs of matrix products, including those of attention in plain products."""
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        run()
    return counter.get_total_flops()


class MatrixProducts(TorchDispatchMode):
    """Records all matrix products with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[Callable, Sequence[Any], dict[str, Any]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in FLOP_FORMULAS:
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def products_of(run: Run) -> Run:
    """The matrix products of `run`, and nothing else."""
    with MatrixProducts() as recorded:
        run()

    def repeat() -> None:
        with torch.no_grad():
            for func, args, kwargs in recorded.calls:
                func(*args, **kwargs)

    return repeat


# ----------------------------------------------------------------------------------------------------------- the rows

# A row has two runs and the factor on their ratio: of amounts of work, for instance.
Row = tuple[Run, Run, float]


def against_broadcast(kind: str, dtype: str) -> Row:
    bench = Backbone(DTYPES[dtype])
    if kind == "stage 1":
        return without_gradients(bench.stage_1), without_gradients(bench.stage_1_broadcast), 1.0
    if kind == "guided":
        return without_gradients(bench.mixed), without_gradients(bench.mixed_broadcast), 1.0
    use_fast_attention(DoDJointModel(bench.model), torch.device("cpu"))
    runs = (with_gradients(bench.model, run) for run in (bench.mixed, bench.mixed_broadcast))
    return *runs, 1.0


def against_dit(dtype: str) -> Row:
    bench = Backbone(DTYPES[dtype])
    ours, theirs = without_gradients(bench.stage_1), without_gradients(bench.stage_1_dit)
    return ours, theirs, flops(theirs) / flops(ours)


def against_products(dtype: str) -> Row:
    bench = Backbone(DTYPES[dtype])
    ours = without_gradients(bench.stage_1)
    return ours, products_of(ours), 1.0


def average() -> Row:
    parameters = list(Backbone().model.parameters())
    ours, theirs = (kind(parameters, decay=0.999) for kind in (WeightAverage, EMAModel))
    return lambda: ours.step(parameters), lambda: theirs.step(parameters), 1.0


def optimizer() -> Row:
    runs = []
    for is_fused in (True, False):
        model = Backbone().model
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.01)
        runs.append(torch.optim.AdamW(model.parameters(), fused=is_fused).step)
    return *runs, 1.0


def desk_pipeline() -> DoDPipeline:
    pipe = DoDPipeline.from_pretrained(ROOT / "checkpoints" / "dod-desk")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline_overhead() -> Row:
    pipe = desk_pipeline()
    num_steps, labels = 20, torch.zeros(4, dtype=torch.int64)
    latents = torch.randn(4, pipe.transformer.config.in_channels, *[pipe.transformer.config.sample_size] * 2)

    def call() -> None:
        pipe([0] * 4, num_stages=1, num_inference_steps=num_steps, seed=0, output_type="latent")

    def evaluate() -> None:
        for step in range(num_steps):
            pipe.transformer(latents, 50.0 * step, labels)

    return call, without_gradients(evaluate), 1.0


def in_a_new_process(code: str) -> Run:
    """Runs `code` in a Python of its own."""

    def run() -> None:
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)

    return run


def importing() -> Row:
    theirs = "from diffusers import DiTPipeline, AutoencoderKL, FlowMatchEulerDiscreteScheduler"
    return in_a_new_process("import diffusers_dod; diffusers_dod.DoDPipeline"), in_a_new_process(theirs), 1.0


def first_image() -> Row:
    code = "from diffusers_dod import DoDPipeline; pipe = DoDPipeline.from_pretrained('checkpoints/dod-desk')"
    call = "pipe('marble', num_inference_steps=1, num_stages=1)"
    return (
        in_a_new_process(f"{code}; {call}"),
        in_a_new_process("from diffusers import DiTPipeline, AutoencoderKL"),
        1.0,
    )


def _images(num_images: int) -> LabelledImages:
    return LabelledImages(TextureDataset(num_images, size=64, seed=0), TEXTURE_CLASSES, "benchmark", 64)


def _autoencoder() -> AutoencoderKL:
    torch.manual_seed(0)
    channels = {"block_out_channels": [32, 64], "down_block_types": ["DownEncoderBlock2D"] * 2}
    return AutoencoderKL(**channels, up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4).eval()


def loading() -> Row:
    num_samples, batch_size = 256, 32
    folder = Path(tempfile.mkdtemp())
    images, options = _images(num_samples), EncodingOptions(random_flip=True)
    encode_latents(images, None, folder, options)
    finish_latents(folder, latent_settings(images, None, options))
    latents = LatentDataset(folder)
    draws = SampleDraws(num_classes=len(TEXTURE_CLASSES), seed=0, label_dropout_prob=0.1, prior_dropout_prob=0.5)
    shape = latents.latent_shape
    plain = TensorDataset(torch.randn(num_samples, *shape), torch.zeros(num_samples, dtype=torch.int64))

    def ours() -> None:
        positions = PositionSampler(
            start_step=0, num_steps=8, batch_size=batch_size, accumulation=1, process_index=0, num_processes=1
        )
        samples = TrainingSamples(latents, draws, positions.images_per_step, 0, None)
        loader = DataLoader(samples, batch_size, sampler=positions, collate_fn=collate_priors_first)
        for _ in loader:
            pass

    def theirs() -> None:
        for _, _ in DataLoader(plain, batch_size, shuffle=True):
            torch.randn(batch_size, *shape)  # the noise

    return ours, theirs, 1.0


def encoding() -> Row:
    num_images, vae = 16, _autoencoder()
    images = _images(num_images)
    pixels = torch.stack([torch.as_tensor(images.dataset[index]["image"]) for index in range(num_images)])
    pixels = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    options = EncodingOptions(random_flip=True, encoding_batch_size=4)

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            encode_latents(images, vae, Path(folder), options)

    def theirs() -> None:
        for batch in pixels.split(4):
            vae.encode(batch)
            vae.encode(batch.flip(-1))

    return ours, without_gradients(theirs), 1.0


def growth(kind: str) -> Row:
    small = Backbone()
    large = Backbone(batch_size=2 * BATCH_SIZE) if kind == "batch" else Backbone(size=64)
    ours, theirs = without_gradients(large.stage_1), without_gradients(small.stage_1)
    return ours, theirs, flops(theirs) / flops(ours)


# -------------------------------------------------------------------------------------------------- how times grow

# A curve has a run for each size.
Curve = dict[int, Run]


def batch_curve(batch_size: int) -> Run:
    return without_gradients(Backbone(batch_size=batch_size).stage_1)


def token_curve(num_tokens: int) -> Run:
    return without_gradients(Backbone(size=2 * math.isqrt(num_tokens)).stage_1)


def stage_curve(num_stages: int) -> Run:
    pipe = desk_pipeline()
    call = {"num_inference_steps": 2, "seed": 0, "output_type": "latent"}
    return lambda: pipe([0] * 4, num_stages=num_stages, **call)


def class_curve(num_classes: int) -> Run:
    transformer, latent_embedder = PRESETS["DoD-Desk"].override(num_classes=num_classes).build()
    names = {index: f"class {index}" for index in range(num_classes)}
    pipe = DoDPipeline(transformer, DoDFlowMatchScheduler(), latent_embedder=latent_embedder, id2label=names)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_stages": 1, "num_inference_steps": 4, "seed": 0, "output_type": "latent"}
    return lambda: pipe([f"class {num_classes - 1}"] * 4, **call)


def shard_curve(num_shards: int) -> Run:
    num_samples, folder = 256, Path(tempfile.mkdtemp())
    images = LabelledImages(TextureDataset(num_samples, size=8, seed=0), TEXTURE_CLASSES, "benchmark", 8)
    options = EncodingOptions(shard_size=num_samples // num_shards)
    encode_latents(images, None, folder, options)
    finish_latents(folder, latent_settings(images, None, options))
    order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(0)).tolist()

    def read() -> None:
        latents = LatentDataset(folder)
        for index in order:
            latents.read(index)

    return read


def sampling_curve(num_images: int) -> Run:
    values = {"pretrained_model_name_or_path": str(ROOT / "checkpoints" / "dod-desk"), "num_images": num_images}
    values |= {"batch_size": 16, "num_stages": 1, "num_inference_steps": 1}

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            sample(from_values(SamplingOptions, values | {"output_dir": Path(folder) / "samples"}), Accelerator())

    return run


def _features(num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of samples, and as many of a reference."""
    generator = np.random.default_rng(0)
    return tuple(generator.standard_normal((num_samples, 64), dtype=np.float32) for _ in range(2))


def fid_curve(num_samples: int) -> Run:
    groups = _features(num_samples)

    def run() -> None:
        statistics = [RunningStatistics() for _ in groups]
        for part, rows in zip(statistics, groups, strict=True):
            part.update(rows)
        frechet_distance(*statistics[0].result(), *statistics[1].result())

    return run


def kid_curve(num_samples: int) -> Run:
    samples, reference = _features(num_samples)
    return lambda: kernel_distance(samples, reference)


def precision_curve(num_samples: int) -> Run:
    samples, reference = _features(num_samples)
    return lambda: ReferenceManifold(reference).compare(samples)


# By what grows: what makes the run of a size, the sizes, and what the exponent is at most. The attention compares all
# pairs of tokens, and the other products grow with their number; precision and recall are about all pairs of samples.
# From 10,000 samples on KID compares subsets of one size, whose number grows.
CURVES: dict[str, tuple[Callable[[int], Run], tuple[int, ...], float]] = {
    "the batch": (batch_curve, (1, 2, 4, 8), 1.05),
    "the tokens": (token_curve, (64, 144, 256, 576, 1024), 1.3),
    "the stages of a call": (stage_curve, (1, 2, 4, 8, 16), 1.1),
    "the classes, of a call": (class_curve, (100, 1000, 10_000, 100_000), 0.1),
    "the shards that are read": (shard_curve, (4, 16, 64, 256), 1.05),
    "the images of a sampling run": (sampling_curve, (8, 32, 128, 512), 1.05),
    "the samples, FID": (fid_curve, (2500, 10_000, 40_000, 160_000), 1.05),
    "the samples, KID": (kid_curve, (5000, 10_000, 20_000, 40_000), 1.05),
    "the samples, precision and recall": (precision_curve, (512, 1024, 2048, 4096), 2.2),
}


# By the name of a row: what makes it, and the goal of its ratio, or of its exponent.
ROWS: dict[str, tuple[Callable[[], Row | Curve], float | None]] = {}
for _dtype, _floor in (("fp32", 1.15), ("bf16", 1.35)):
    for _kind, _goal in (("stage 1", 0.82), ("guided", 0.92), ("training", None)):
        ROWS[f"{_kind} / broadcast, {_dtype}"] = (
            lambda kind=_kind, dtype=_dtype: against_broadcast(kind, dtype),
            _goal,
        )
    ROWS[f"stage 1 / DiT, by FLOP, {_dtype}"] = (lambda dtype=_dtype: against_dit(dtype), 0.95)
    ROWS[f"stage 1 / its matrix products, {_dtype}"] = (lambda dtype=_dtype: against_products(dtype), _floor)
ROWS |= {
    "average / EMAModel": (average, 0.45),
    "AdamW, fused / not": (optimizer, 0.40),
    "pipeline / its evaluations": (pipeline_overhead, None),
    "import / Diffusers'": (importing, None),
    "first image / Diffusers' import": (first_image, None),
    "data loader / tensors in memory": (loading, None),
    "encoding / its autoencoder": (encoding, None),
    "twice the batch, by FLOP": (lambda: growth("batch"), None),
    "four times the tokens, by FLOP": (lambda: growth("tokens"), None),
}
for _kind, (_make, _sizes, _goal) in CURVES.items():
    ROWS[f"growth with {_kind}"] = (
        lambda make=_make, sizes=_sizes: {size: make(size) for size in sizes},
        _goal,
    )


# --------------------------------------------------------------------------------------------------------- measuring


def exponent(times: Mapping[int, float]) -> float:
    """The slope of the upper half of `times`, by size, both in logarithms."""
    upper = sorted(times.items())[(len(times) - 1) // 2 :]
    return float(np.polyfit(*np.log(upper).T, deg=1)[0])


def measure(row: Row | Curve, num_repetitions: int) -> dict[str, float]:
    """
    Quartiles of the ratios of times, or of the exponents of their growth.

    Times are those of this process's CPU, or the wall's where it only waits.
    """
    runs = list(row.values()) if isinstance(row, dict) else row[:2]
    found = []
    for repetition in range(num_repetitions + 1):
        times = []
        for run in runs:
            gc.collect()
            start, cpu_start = time.perf_counter(), time.process_time()
            run()
            wall, cpu = time.perf_counter() - start, time.process_time() - cpu_start
            times.append(cpu if cpu > 0.1 * wall else wall)
        if repetition > 0:  # the first is a warm-up
            is_curve = isinstance(row, dict)
            found.append(exponent(dict(zip(row, times, strict=True))) if is_curve else times[0] / times[1] * row[2])
    lower, median, upper = statistics.quantiles(found, n=4, method="inclusive")
    return {"lower": round(lower, 4), "median": round(median, 4), "upper": round(upper, 4)}


def compare(found: dict[str, float], committed: dict[str, float] | None) -> str:
    """Says whether a row has moved beyond its noise."""
    if committed is None:
        return "new"
    if found["lower"] > committed["upper"]:
        return "slower"
    return "faster" if found["upper"] < committed["lower"] else ""


def describe(results: dict[str, dict[str, float]], committed: dict[str, dict[str, float]]) -> str:
    """The table of `results` beside the `committed` ones."""
    lines = []
    for name, found in results.items():
        goal, before = ROWS[name][1], committed.get(name)
        lines.append(
            [
                name,
                f"{found['median']:.2f}",
                f"{found['lower']:.2f} to {found['upper']:.2f}",
                "" if before is None else f"{before['median']:.2f}",
                "" if goal is None else f"{goal:.2f}",
                compare(found, before),
            ]
        )
    return format_table(["ratio of times, or exponent", "median", "quartiles", "committed", "goal", "moved"], lines)


def fill_page(page: str, committed: dict[str, dict[str, float]]) -> str:
    """Puts the table of the `committed` results into a page, between `<!-- results -->` and `<!-- end -->`."""
    lines = []
    for name in filter(committed.__contains__, ROWS):
        goal, found = ROWS[name][1], committed[name]
        missed = goal is not None and round(found["median"], 2) > goal
        quartiles = f"{found['lower']:.2f} to {found['upper']:.2f}"
        cells = ["" if goal is None else f"{goal:.2f}", "missed" if missed else ""]
        lines.append([name, f"{found['median']:.2f}", quartiles, *cells])
    table = format_table(["ratio of times, or exponent", "median", "quartiles", "goal, at most", ""], lines)
    start, _, rest = page.partition("<!-- results -->\n")
    return f"{start}<!-- results -->\n{table}\n{rest[rest.index('<!-- end -->') :]}"


def main(argv: list[str] | None = None) -> None:
    """Runs the command; `argv` defaults to the process's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=[*ROWS], choices=ROWS, metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--output_file", type=Path, default=Path("outputs/bench.json"))
    parser.add_argument("--update", action="store_true", help="Write the rows to benchmarks/results.json too.")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    committed = json.loads(COMMITTED.read_text()) if COMMITTED.exists() else {}
    results = json.loads(args.output_file.read_text()) if args.output_file.exists() else {}
    for name in args.rows:
        if name not in results:
            results[name] = measure(ROWS[name][0](), args.repetitions)
            write_json(args.output_file, results)
            print(f"{name}: {results[name]}", file=sys.stderr, flush=True)
    shown = {name: results[name] for name in args.rows}
    print(describe(shown, committed))
    if args.update:
        page = fill_page(PAGE.read_text(encoding="utf-8"), committed | shown)
        write_json(COMMITTED, committed | shown)
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
