# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Measures ways to sample faster: FID against evaluations, FLOPs and time, as a table and a plot.

    python benchmarks/inference_modes.py --output_file outputs/inference_modes.json --plot outputs/inference_modes.png

All modes draw the same samples of the desk-size checkpoint, by seed: two stages, both guided at a scale of 3.
Evaluations count the velocities of a sample over both stages, a guided one as two. FLOPs are counted while a batch is
drawn, so that they lack what a cache leaves out. Times are ratios to the first mode, on one thread of a CPU, measured
in turns. It takes about an hour of a core. Modes that are in the output file already are not run again; int8 needs
torchao, and is left out without it.
"""

import argparse
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import flops, measure
from bench_precision import load
from diffusers import (
    DPMSolverMultistepScheduler,
    FirstBlockCacheConfig,
    TaylorSeerCacheConfig,
    UniPCMultistepScheduler,
)

from diffusers_dod import DoDFlowMatchScheduler, DoDPipeline, Guidance
from diffusers_dod.data.textures import TextureDataset
from diffusers_dod.files import write_json
from diffusers_dod.metrics.extractors import load_extractor
from diffusers_dod.metrics.frechet import as_fid
from diffusers_dod.metrics.statistics import RunningStatistics
from diffusers_dod.results import checkpoint_sha256
from diffusers_dod.tables import format_table


NUM_GROUPS = 10  # of samples, by which intervals are computed
REFERENCE_SEED = 101  # of the images textures:20000:101
MULTISTEP = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SOLVERS = {
    "Euler": DoDFlowMatchScheduler(),
    "Heun": DoDFlowMatchScheduler(solver="heun"),
    "dopri5": DoDFlowMatchScheduler(solver="dopri5", rtol=0.1, atol=1e-3),
    "UniPC": UniPCMultistepScheduler(**MULTISTEP),
    "DPM-Solver++": DPMSolverMultistepScheduler(**MULTISTEP),
}


@dataclass(frozen=True)
class Mode:
    """
    A way to sample.

    Args:
        solver (`str`): Name in `SOLVERS`.
        steps (`int`, *optional*): Number of steps of each stage; `None` for adaptive ones.
        call (`dict`): Further arguments of the call.
        precision (`str`): Precision of the weights, as `bench_precision.py` has them.
        change (`Callable`, *optional*): Changes the pipeline.
        is_counted (`bool`): Whether FLOPs are counted; else they are those of the first mode.
    """

    solver: str = "Euler"
    steps: int | None = 20
    call: dict[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    change: Callable[[DoDPipeline], object] | None = None
    is_counted: bool = True


def cached(config: object) -> Callable[[DoDPipeline], object]:
    return lambda pipe: pipe.transformer.enable_cache(config)


def taylor(interval: int) -> Callable[[DoDPipeline], object]:
    return cached(TaylorSeerCacheConfig(interval, taylor_factors_dtype=torch.float32, use_lite_mode=True))


INTERVAL = {"guidance": Guidance(interval=(0.1, 0.8))}
MODES = {
    "Euler, 20 steps": Mode(),
    "Euler, 10 steps": Mode(steps=10),
    "Euler, 5 steps": Mode(steps=5),
    "DPM-Solver++, 10 steps": Mode("DPM-Solver++", 10),
    "DPM-Solver++, 5 steps": Mode("DPM-Solver++", 5),
    "UniPC, 10 steps": Mode("UniPC", 10),
    "UniPC, 5 steps": Mode("UniPC", 5),
    "Heun, 5 steps": Mode("Heun", 5),
    "dopri5, rtol 0.1": Mode("dopri5", None),
    "Euler, 10 steps, guidance interval": Mode(steps=10, call=INTERVAL),
    "DPM-Solver++, 10 steps, guidance interval": Mode("DPM-Solver++", 10, INTERVAL),
    "guidance interval": Mode(call=INTERVAL),
    "adaptive guidance, 0.99": Mode(call={"guidance": Guidance(cosine_threshold=0.99)}),
    "first-block cache, 0.1": Mode(change=cached(FirstBlockCacheConfig(threshold=0.1))),
    "first-block cache, 0.2": Mode(change=cached(FirstBlockCacheConfig(threshold=0.2))),
    "Taylor cache, every 2nd": Mode(change=taylor(2)),
    "Taylor cache, every 4th": Mode(change=taylor(4)),
    "compiled": Mode(change=lambda pipe: pipe.transformer.compile_repeated_blocks(), is_counted=False),
    "bf16": Mode(precision="bf16"),
    "int8": Mode(precision="int8", is_counted=False),
    "Euler, 40 steps": Mode(steps=40),
}
BASE = next(iter(MODES))


def build(mode: Mode, path: str) -> DoDPipeline:
    """Builds the pipeline of a mode."""
    torch.compiler.reset()
    pipe = load(path, mode.precision)
    pipe.scheduler = SOLVERS[mode.solver]
    pipe.set_progress_bar_config(disable=True)
    if mode.change is not None:
        mode.change(pipe)
    return pipe


def draw(pipe: DoDPipeline, mode: Mode, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws the samples of `indices`: images (n, 3, 32, 32) in uint8, and the evaluations of each (n,)."""
    output = pipe(
        (indices % pipe.transformer.config.num_classes).tolist(),
        num_stages=2,
        num_inference_steps=mode.steps,
        guidance_scale=[3.0, 3.0],
        seed=0,
        sample_indices=indices.tolist(),
        output_type="pt",
        **mode.call,
    )
    evaluations = sum(stage.num_evaluations + stage.num_guided_evaluations for stage in output.statistics)
    return (output.images.float() * 255).round().to(torch.uint8), evaluations.double()


def describe_features(images: torch.Tensor, extractor: Callable) -> RunningStatistics:
    """Mean and covariance of the features of images (n, 3, 32, 32) in uint8."""
    statistics = RunningStatistics()
    with torch.no_grad():
        for chunk in images.split(250):
            statistics.update(extractor(chunk).features)
    return statistics


def read_reference(num_images: int, extractor: Callable) -> tuple[np.ndarray, np.ndarray]:
    """Statistics of the reference images."""
    dataset = TextureDataset(num_images, seed=REFERENCE_SEED)
    images = np.stack([dataset[index]["image"] for index in range(num_images)])
    return describe_features(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), extractor).result()


def run(name: str, args: argparse.Namespace, extractor: Callable, reference: tuple) -> dict[str, Any]:
    """Measures the quality of a mode, and what it computes."""
    mode = MODES[name]
    pipe = build(mode, args.pipeline)
    chunks = np.array_split(np.arange(args.num_samples), NUM_GROUPS)  # each with as many of each class
    images, evaluations = zip(*(draw(pipe, mode, chunk) for chunk in chunks), strict=True)
    metrics = as_fid("fid", [describe_features(group, extractor) for group in images], reference, has_interval=True)
    counted = np.arange(args.timed_batch_size)
    num_flops = flops(lambda: draw(pipe, mode, counted)) if mode.is_counted else None
    return {
        "num_evaluations": torch.cat(evaluations).mean().item(),
        "gflops": num_flops and num_flops / len(counted) / 1e9,
        **metrics,
    }


def time_ratio(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Measures the time of a mode, divided by that of the first one."""
    runs = []
    for mode in (MODES[name], MODES[BASE]):
        pipe = build(mode, args.pipeline)
        runs.append(lambda pipe=pipe, mode=mode: draw(pipe, mode, np.arange(args.timed_batch_size)))
    return measure((*runs, 1.0), args.repetitions)


def plot(results: dict[str, dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    known = {name: row for name, row in results.items() if row["gflops"] is not None}  # else as the first mode
    names = sorted(known, key=lambda name: (known[name]["gflops"], known[name]["fid_corrected"]["value"]))
    for number, name in enumerate(names, 1):
        gflops, fid = known[name]["gflops"], known[name]["fid_corrected"]
        is_solver = name.split(",")[0] in SOLVERS and name.count(",") == 1
        color = "tab:blue" if is_solver else "tab:orange"
        axes.vlines(gflops, *fid["interval"], color=color, alpha=0.3)
        marker = {"marker": f"${number}$", "markersize": 6 if number < 10 else 9}
        axes.plot(gflops, fid["value"], linestyle="none", color=color, label=name, **marker)
    axes.set(xscale="log", yscale="log", xlabel="GFLOPs of an image", ylabel="FID (texture features), corrected")
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    axes.set_xticks(ticks := [1, 2, 3, 4, 5], ticks)
    axes.set_yticks(ticks := [1, 2, 3, 5, 10, 20, 40], ticks)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def to_table(results: dict[str, dict]) -> str:
    """The table in Markdown."""
    rows = []
    for name, row in results.items():
        gflops = results[BASE]["gflops"] if row["gflops"] is None else row["gflops"]
        ratio = row.get("time")
        time = "" if ratio is None else f"{ratio['median']:.2f} ({ratio['lower']:.2f} to {ratio['upper']:.2f})"
        fid = "{value:.2f} ({interval[0]:.2f} to {interval[1]:.2f})".format(**row["fid_corrected"])
        rows.append([name, f"{row['num_evaluations']:.0f}", f"{gflops:.2f}", time, fid])
    return format_table(["mode", "evaluations", "GFLOPs", "time", "FID, corrected"], rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="checkpoints/dod-desk")
    parser.add_argument("--extractor", default="training/desk/texture_features.py:extractor")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--num_samples", type=int, default=240, help="A multiple of 120: 10 groups of 12 classes.")
    parser.add_argument("--num_reference", type=int, default=5000)
    parser.add_argument("--timed_batch_size", type=int, default=12)
    parser.add_argument("--repetitions", type=int, default=5, help="Of the times; 0 measures none.")
    parser.add_argument("--output_file", type=Path, required=True)
    parser.add_argument("--plot", type=Path, help="PNG; needs matplotlib.")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    settings = {name: getattr(args, name) for name in ("num_samples", "num_reference")}
    settings |= {"checkpoint_sha256": checkpoint_sha256(args.pipeline), "torch": torch.__version__}
    report = {"settings": settings, "results": {}}
    if args.output_file.exists():
        report = json.loads(args.output_file.read_text())
        if report["settings"] != settings:
            raise ValueError(f"`output_file` must hold results of the settings {settings}, got {report['settings']}.")
    results, extractor, reference = report["results"], load_extractor(args.extractor), None
    modes = [name for name in args.modes if MODES[name].precision != "int8" or importlib.util.find_spec("torchao")]
    for name in modes:
        if name not in results:
            reference = reference or read_reference(args.num_reference, extractor)
            results[name] = run(name, args, extractor, reference)
            write_json(args.output_file, report)
            print(name, results[name], flush=True)
    for name in modes:
        if args.repetitions > 0 and "time" not in results[name]:
            results[name]["time"] = time_ratio(name, args)
            write_json(args.output_file, report)
            print(name, results[name], flush=True)
    results = {name: results[name] for name in MODES if name in results}
    print(to_table(results))
    if args.plot is not None:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
