"""
Compares all solvers on the desk-size checkpoint: FID against evaluations of the model, as a table and a plot.

    python training/desk/compare_solvers.py --output_file outputs/solvers.json --plot outputs/solvers.png

There is one guided stage at a scale of 3, and all solvers start from the same noise. Evaluations count the guided
velocity. It takes about an hour of one CPU core. Settings that are in the output file already are not run again.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from texture_classifier import HELD_OUT_SEED
from texture_features import extractor
from tqdm.auto import tqdm

from diffusers_dod import DoDFlowMatchScheduler, DoDPipeline
from diffusers_dod.data.textures import TEXTURE_CLASSES, TextureDataset
from diffusers_dod.metrics.frechet import feature_statistics, frechet_distance
from diffusers_dod.results import checkpoint_sha256


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
# Name -> the scheduler, and evaluations per step; None for adaptive steps, whose tolerances take the place of numbers.
SOLVERS = {
    "euler": (DoDFlowMatchScheduler(solver="euler"), 1),
    "midpoint": (DoDFlowMatchScheduler(solver="midpoint"), 2),
    "heun": (DoDFlowMatchScheduler(solver="heun"), 2),
    "rk4": (DoDFlowMatchScheduler(solver="rk4"), 4),
    "dopri5": (DoDFlowMatchScheduler(solver="dopri5"), None),
    "euler_maruyama": (DoDFlowMatchScheduler(solver="euler_maruyama"), 1),
    "stochastic_heun": (DoDFlowMatchScheduler(solver="stochastic_heun"), 2),
    "FlowMatchEuler": (FlowMatchEulerDiscreteScheduler(), 1),
    "FlowMatchHeun": (FlowMatchHeunDiscreteScheduler(), 2),
    "UniPC": (UniPCMultistepScheduler(**FLOW), 1),
    "DPM-Solver++": (DPMSolverMultistepScheduler(**FLOW), 1),
}
TOLERANCES = (0.3, 0.1, 0.03, 0.01)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="checkpoints/dod-desk")
    parser.add_argument("--solvers", nargs="+", default=list(SOLVERS), choices=list(SOLVERS))
    parser.add_argument("--num_evaluations", nargs="+", type=int, default=[4, 8, 16, 32])
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--num_samples", type=int, default=1200)
    parser.add_argument("--num_reference", type=int, default=20_000)
    parser.add_argument("--batch_size", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_file", type=Path, required=True)
    parser.add_argument("--plot", type=Path, help="PNG; needs matplotlib.")
    return parser.parse_args()


@torch.no_grad()
def statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the features of `images` (n, 3, 32, 32) in uint8."""
    chunks = torch.from_numpy(images).split(250)
    return feature_statistics(torch.cat([extractor(chunk).features for chunk in chunks]).numpy())


def run(pipeline: DoDPipeline, steps: int | None, args: argparse.Namespace) -> tuple[np.ndarray, float, float]:
    """Images (n, 3, 32, 32) in uint8, and the mean and the largest number of evaluations of a sample."""
    images, evaluations = [], []
    labels = np.arange(args.num_samples) % len(TEXTURE_CLASSES)
    for indices in np.array_split(np.arange(args.num_samples), -(-args.num_samples // args.batch_size)):
        output = pipeline(
            labels[indices].tolist(),
            num_stages=1,
            num_inference_steps=steps,
            guidance_scale=[args.guidance_scale],
            seed=args.seed,
            sample_indices=indices.tolist(),
            output_type="pt",
        )
        images.append((output.images * 255).round().to(torch.uint8))
        evaluations.append(output.statistics[0].num_evaluations.double())
    evaluations = torch.cat(evaluations)
    return torch.cat(images).numpy(), evaluations.mean().item(), evaluations.max().item()


def plot(results: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    twins = {"FlowMatchEuler": "euler", "FlowMatchHeun": "heun"}  # the same method has the same colour
    colours = dict(zip([name for name in SOLVERS if name not in twins], plt.colormaps["tab10"].colors, strict=False))
    for name in SOLVERS:
        points = sorted((row["num_evaluations"], row["fid"]) for row in results if row["solver"] == name)
        if points:
            ours = {"linestyle": "-", "markersize": 4}
            style = ours if name.islower() else {"linestyle": "--", "markersize": 8, "markerfacecolor": "none"}
            style |= {"marker": "o", "linewidth": 1.2, "color": colours[twins.get(name, name)]}
            axes.plot(*zip(*points, strict=True), label=name, **style)
    axes.set(xscale="log", yscale="log", xlabel="evaluations of the guided velocity", ylabel="FID (texture features)")
    ticks = [4, 8, 16, 32, 64]
    axes.set_xticks(ticks, ticks)
    axes.set_yticks(fids := [3, 5, 10, 20, 50, 100], fids)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    args = parse_args()
    settings = {name: getattr(args, name) for name in ("guidance_scale", "num_samples", "num_reference", "seed")}
    settings["checkpoint_sha256"] = checkpoint_sha256(args.pipeline)
    results = []
    if args.output_file.exists():
        report = json.loads(args.output_file.read_text())
        if report["settings"] != settings:
            raise ValueError(f"`output_file` must hold results of the settings {settings}, got {report['settings']}.")
        results = report["results"]
    pipeline = DoDPipeline.from_pretrained(args.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    reference = None
    todo = []
    for name in args.solvers:
        scheduler, evaluations = SOLVERS[name]
        numbers = [(rtol, None) for rtol in TOLERANCES]
        if evaluations is not None:
            numbers = [(None, n // evaluations) for n in args.num_evaluations if n >= 2 * evaluations or n == 4]
        done = {(row["rtol"], row["steps"]) for row in results if row["solver"] == name}
        todo += [(name, scheduler, *number) for number in numbers if number not in done]
    for name, scheduler, rtol, steps in tqdm(todo):
        if reference is None:
            dataset = TextureDataset(args.num_reference, seed=HELD_OUT_SEED)
            images = np.stack([dataset[index]["image"] for index in range(args.num_reference)])
            reference = statistics(images.transpose(0, 3, 1, 2))
        if rtol is not None:
            scheduler = DoDFlowMatchScheduler.from_config(scheduler.config, rtol=rtol, atol=rtol / 100)
        pipeline.scheduler = scheduler
        images, mean_evaluations, max_evaluations = run(pipeline, steps, args)
        fid = frechet_distance(*statistics(images), *reference)
        row = {"solver": name, "steps": steps, "rtol": rtol, "num_evaluations": mean_evaluations}
        results.append({**row, "max_num_evaluations": max_evaluations, "fid": fid})
        args.output_file.parent.mkdir(parents=True, exist_ok=True)
        args.output_file.write_text(json.dumps({"settings": settings, "results": results}, indent=2) + "\n")

    print("| solver | FID (evaluations of a sample, in the mean) | | | |\n|---|---:|---:|---:|---:|")
    for name in SOLVERS:
        rows = sorted((row["num_evaluations"], row["fid"]) for row in results if row["solver"] == name)
        cells = [f"{fid:.2f} ({evaluations:.0f})" for evaluations, fid in rows]
        print(f"| {name} | {' | '.join(cells)} |")
    if args.plot is not None:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
