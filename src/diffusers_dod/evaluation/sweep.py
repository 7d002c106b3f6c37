# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Guidance scales x steps x solvers x averages of the weights, and the stages of each, for one checkpoint:

    python -m diffusers_dod.evaluation.sweep --pretrained_model_name_or_path checkpoints/dod-desk \\
        --reference textures:20000:101 --resolution 32 --extractor training/desk/texture_features.py:extractor \\
        --num_images 1200 --guidance_scales 1 2 3 4 --num_inference_steps 10 20 --seeds 0 1 --output_dir outputs/sweep

    output_dir/settings/      results of each setting and seed: what a run that was stopped need not do again
    output_dir/sweep.json     all numbers; `sweep.md` has them as a table
    output_dir/*.png          FID against scale and against compute, precision against recall (needs matplotlib)

Every setting is sampled by [`sample`](sample.html) and judged by [`evaluate`](evaluate.html), in one process.
"""

import argparse
import itertools
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from scipy import stats

from ..checks import check_at_least, check_number
from ..losses import DoDJointModel
from ..pipeline_dod import DoDPipeline
from ..scheduling_dod import SOLVERS
from ..training.checkpoints import STATE_FOLDER
from . import evaluate, sample
from .compute import count_model, sampling_compute
from .results import as_metric, checkpoint_sha256, file_sha256, read_results, write_results


PIPELINE = "pipeline"  # the average that a checkpoint's pipeline has
NAMES = {"fid": "FID", "sfid": "sFID", "is": "IS", "precision": "precision", "recall": "recall"}


def write_average(checkpoint: Path, name: str, folder: Path) -> None:
    """
    Saves the pipeline of a training checkpoint with another average of the weights.

    Args:
        checkpoint (`Path`): The checkpoint.
        name (`str`): The average, such as `decay-0.9999`, as its file `training_state/ema-<name>.safetensors` says.
        folder (`Path`): Where the pipeline goes.

    Raises:
        `ValueError`: the checkpoint has no such average.
    """
    state = checkpoint / STATE_FOLDER
    path = state / f"ema-{name}.safetensors"
    if not path.is_file():
        found = [PIPELINE] + sorted(file.stem.removeprefix("ema-") for file in state.glob("ema-*.safetensors"))
        raise ValueError(f"`averages` must be among {found} of {checkpoint}, got {name!r}.")
    pipeline = DoDPipeline.from_pretrained(checkpoint)
    DoDJointModel(pipeline.transformer, pipeline.latent_embedder).load_state_dict(load_file(path))
    pipeline.save_pretrained(folder)


def mean_over_seeds(metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """
    One number out of those of several seeds.

    Args:
        metrics (`Sequence[dict]`): What [`as_metric`] returned for each seed.

    Returns:
        `dict`: The mean, with Student's 95 % interval of it; of a single seed the number as it is.
    """
    values = [metric["value"] for metric in metrics]
    if len(values) == 1:
        return as_metric(values[0], metrics[0]["interval"], seeds=values)
    quantile = stats.t.ppf(0.975, len(values) - 1)
    mean, error = np.mean(values), np.std(values, ddof=1) / np.sqrt(len(values))
    return as_metric(mean, (mean - quantile * error, mean + quantile * error), seeds=values)


def run_setting(args: argparse.Namespace, checkpoint: Path, setting: dict[str, Any], seed: int) -> dict[int, dict]:
    """
    Samples and judges all stages of one setting, unless that has been done.

    Args:
        args (`argparse.Namespace`): The options of the command.
        checkpoint (`Path`): The pipeline.
        setting (`dict`): `average`, `num_inference_steps`, `solver` and `guidance_scale`.
        seed (`int`): Seed of the samples.

    Returns:
        `dict[int, dict]`: The metrics of each stage, as results hold them.

    Raises:
        `ValueError`: the options of sampling and judging do not fit.
    """
    name = "_".join(f"{value}" for value in setting.values()) + f"_{seed}"
    samples = args.output_dir / "samples" / name
    num_stages = args.num_stages
    paths = {stage: args.output_dir / "settings" / f"{name}_stage-{stage}.json" for stage in range(1, num_stages + 1)}
    judged = ["--extractor", args.extractor, "--metrics", *args.metrics, "--num_groups", str(args.num_groups)]
    judged += ["--batch_size", str(args.batch_size), "--reference", args.reference]
    judged += ["--trust_extractor"] * args.trust_extractor
    judged += ["--resolution", str(args.resolution)] if args.resolution is not None else []
    if not all(path.exists() for path in paths.values()):
        scale = setting["guidance_scale"]
        sampling = ["--pretrained_model_name_or_path", str(checkpoint), "--output_dir", str(samples), "--all_stages"]
        sampling += ["--num_images", str(args.num_images), "--batch_size", str(args.batch_size), "--format", "npz"]
        sampling += ["--labels", args.labels, "--seed", str(seed), "--dtype", args.dtype]
        sampling += ["--num_stages", str(num_stages), "--num_inference_steps", str(setting["num_inference_steps"])]
        sampling += ["--stage_solvers", *[setting["solver"]] * num_stages]
        sampling += ["--guidance_scale", str(scale)]
        sampling += ["--first_stage_guidance_scale", str(args.first_stage_guidance_scale)]
        sample.main(sampling)
        for stage, path in paths.items():
            archive = samples / f"stage-{stage}" / sample.ARCHIVE
            evaluate.main([str(archive), *judged, "--output_file", str(path)])
        if not args.keep_samples:
            shutil.rmtree(samples)
            if not any(samples.parent.iterdir()):
                samples.parent.rmdir()
    return {stage: read_results(path)["metrics"] for stage, path in paths.items()}


def check_folder(args: argparse.Namespace) -> None:
    """
    Makes sure that all settings in a folder are of one sweep.

    Args:
        args (`argparse.Namespace`): The options of the command.

    Raises:
        `ValueError`: the folder is that of another checkpoint, or of other options than those that are swept over.
    """
    names = ("reference", "extractor", "metrics", "resolution", "num_groups", "num_images", "batch_size", "labels")
    names += ("dtype", "num_stages", "first_stage_guidance_scale")
    options = {name: getattr(args, name) for name in names}
    checkpoint = Path(args.pretrained_model_name_or_path)
    options["checkpoint_sha256"] = checkpoint_sha256(checkpoint)
    files = {
        "extractor_sha256": args.extractor.rpartition(":")[0] or args.extractor,
        "reference_sha256": args.reference,
    }
    files |= {
        f"{average}_sha256": str(checkpoint / STATE_FOLDER / f"ema-{average}.safetensors")
        for average in args.averages
        if average != PIPELINE
    }
    options |= {name: file_sha256(Path(file)) if Path(file).is_file() else None for name, file in files.items()}
    path = args.output_dir / "options.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for name, value in options.items():
        if found.get(name, value) != value:  # a sweep may go on with more averages
            raise ValueError(
                f"`output_dir` must be the folder of a sweep with `{name}` = {value!r}, got {args.output_dir} with "
                f"{found[name]!r}: use another one."
            )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(".options.json.unfinished")
    unfinished.write_text(json.dumps(found | options, indent=2) + "\n")
    os.replace(unfinished, path)


def sweep(args: argparse.Namespace) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """
    Runs all settings.

    Args:
        args (`argparse.Namespace`): What [`parse_args`] returns.

    Returns:
        `tuple[dict, list[dict]]`: The numbers by `<metric>/<stage>/<setting>`, and a row of all that belongs together
        for each stage of each setting.

    Raises:
        `ValueError`: see [`check_folder`], [`run_setting`] and [`write_average`].
    """
    check_folder(args)
    checkpoint = Path(args.pretrained_model_name_or_path)
    pipelines = {}
    for average in args.averages:
        pipelines[average] = checkpoint
        if average != PIPELINE:
            pipelines[average] = args.output_dir / "pipelines" / average
            if not (pipelines[average] / "model_index.json").exists():
                write_average(checkpoint, average, pipelines[average])
    pipeline = DoDPipeline.from_pretrained(checkpoint)
    cost = count_model(pipeline)
    metrics: dict[str, dict[str, Any]] = {}
    rows = []
    grid = itertools.product(args.averages, args.num_inference_steps, args.solvers, args.guidance_scales)
    for average, num_steps, solver, scale in grid:
        setting = {
            "average": average,
            "num_inference_steps": num_steps,
            "solver": solver,
            "guidance_scale": scale,
        }
        of_seeds = [run_setting(args, pipelines[average], setting, seed) for seed in args.seeds]
        for stage in range(1, args.num_stages + 1):
            scales = ([args.first_stage_guidance_scale] + [scale] * stage)[:stage]
            if pipeline.latent_embedder is None:
                scales = [scale]
            elif stage == 1 and scale != args.guidance_scales[0]:
                continue  # it is the same for all scales of later stages
            compute = None
            if solver != "dopri5":
                compute = sampling_compute(pipeline, [num_steps] * stage, scales, [solver] * stage, cost=cost)["flops"]
            row = {
                **setting,
                "guidance_scale": scales[-1],
                "stage": stage,
                "gflops": None if compute is None else compute / 1e9,
            }
            label = "/".join(str(value) for value in (f"stage-{stage}", average, num_steps, solver, scales[-1]))
            for name in of_seeds[0][stage]:
                row[name] = mean_over_seeds([found[stage][name] for found in of_seeds])
                metrics[f"{name}/{label}"] = row[name]
            rows.append(row)
    return metrics, rows


def to_table(rows: Sequence[dict[str, Any]]) -> str:
    """The `rows` of a sweep as a table in Markdown."""
    names = [name for name in NAMES if name in rows[0]]
    header = ["stage", "average", "steps", "solver", "scale", "GFLOPs", *(NAMES[name] for name in names)]
    lines = ["| " + " | ".join(header) + " |", "| ---: | --- | ---: | --- | ---: |" + " ---: |" * (len(names) + 1)]
    for row in rows:
        cells = [str(row["stage"]), row["average"], str(row["num_inference_steps"]), row["solver"]]
        cells += [f"{row['guidance_scale']:g}", "-" if row["gflops"] is None else f"{row['gflops']:.4g}"]
        for name in names:
            interval = row[name]["interval"]
            half = "" if interval is None else f" ± {(interval[1] - interval[0]) / 2:.2g}"
            cells.append(f"{row[name]['value']:.4g}{half}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_plots(rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """
    Draws what a sweep has found.

    Args:
        rows (`Sequence[dict]`): Its rows.
        folder (`Path`): Where the pictures go.

    Returns:
        `list[Path]`: `fid_scale.png` and `fid_gflops.png` where there is an FID, `precision_recall.png` where there
        are both.

    Raises:
        `ImportError`: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plots = {
        "fid_scale": ("guidance_scale", "fid", "guidance scale", "FID", "num_inference_steps"),
        "fid_gflops": ("gflops", "fid", "GFLOPs of an image", "FID", "guidance_scale"),
        "precision_recall": ("recall", "precision", "recall", "precision", "num_inference_steps"),
    }
    paths = []
    for file, (x, y, x_label, y_label, constant) in plots.items():
        if y not in rows[0] or (x not in rows[0]):
            continue
        figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
        lines: dict[str, list[tuple]] = {}
        for row in rows:
            point = [row[name]["value"] if isinstance(row[name], dict) else row[name] for name in (x, y)]
            if point[0] is None:
                continue
            parts = [f"stage {row['stage']}", row["average"], row["solver"], f"{constant}: {row[constant]:g}"]
            half = 0.0 if row[y]["interval"] is None else (row[y]["interval"][1] - row[y]["interval"][0]) / 2
            lines.setdefault(", ".join(part for part in parts if part != PIPELINE), []).append((*point, half))
        for label, points in lines.items():
            xs, ys, halves = np.array(sorted(points) if x != "recall" else points).T
            axes.errorbar(xs, ys, yerr=halves, marker="o", markersize=4, capsize=2, linewidth=1.2, label=label)
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
        paths.append(folder / f"{file}.png")
        figure.savefig(paths[-1], dpi=120)
        plt.close(figure)
    return paths


def build_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--pretrained_model_name_or_path", required=True, help="Folder of the pipeline.")
    parser.add_argument("--reference", required=True, help="See the command `evaluate`, as the next five.")
    parser.add_argument("--extractor", required=True)
    parser.add_argument("--trust_extractor", action="store_true")
    parser.add_argument("--metrics", nargs="+", default=["fid"], choices=evaluate.METRICS)
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--num_groups", type=int, default=10)
    parser.add_argument("--num_images", type=int, default=10_000, help="Of each setting and seed.")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--labels", default="balanced", choices=sample.LABELS)
    parser.add_argument("--dtype", default="float32", choices=list(sample.DTYPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="With several, intervals are of their mean.")
    parser.add_argument("--num_stages", type=int, help="All of them are judged; the checkpoint's by default.")
    parser.add_argument(
        "--guidance_scales", type=float, nargs="+", help="From stage 2 on; the checkpoint's by default."
    )
    parser.add_argument("--first_stage_guidance_scale", type=float, default=1.0)
    parser.add_argument(
        "--num_inference_steps", type=int, nargs="+", help="Of each stage; the checkpoint's by default."
    )
    parser.add_argument("--solvers", nargs="+", default=["euler"], choices=SOLVERS)
    parser.add_argument(
        "--averages",
        nargs="+",
        default=[PIPELINE],
        help=f"Averages of a training checkpoint, e.g. decay-0.9999; `{PIPELINE}` is its own.",
    )
    parser.add_argument("--keep_samples", action="store_true", help="Keep the images of every setting.")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--output_file", type=Path, help="`sweep.json` in `--output_dir` by default.")
    return parser


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The options in `argv`, with the checkpoint's defaults; all errors are reported at once, as `argparse` does."""
    parser = build_parser()
    args = parser.parse_args(argv)
    errors = []
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error(f"The command must run in one process, got {os.environ['WORLD_SIZE']}.")
    checkpoint = Path(args.pretrained_model_name_or_path)
    if not (checkpoint / "model_index.json").is_file():
        parser.error(f"`pretrained_model_name_or_path` must be the folder of a pipeline, got {checkpoint}.")
    config = DoDPipeline.load_config(checkpoint)
    has_embedder = config["latent_embedder"][0] is not None
    if args.num_stages is None:
        args.num_stages = config["default_num_stages"] if has_embedder else 1
    args.guidance_scales = args.guidance_scales or [config["default_guidance_scale"]]
    args.num_inference_steps = args.num_inference_steps or [config["default_num_inference_steps"]]
    for name in ("num_images", "batch_size", "num_stages"):
        try:
            check_at_least(name, getattr(args, name), 2 if name == "num_images" else 1)
        except ValueError as error:
            errors.append(str(error))
    for name, check in {"num_inference_steps": check_at_least, "seeds": check_at_least}.items():
        for value in getattr(args, name):
            try:
                check(name, value, 0 if name == "seeds" else 1)
            except ValueError as error:
                errors.append(str(error))
    for value in [*args.guidance_scales, args.first_stage_guidance_scale]:
        try:
            check_number("guidance_scales", value, 0)
        except ValueError as error:
            errors.append(str(error))
    for name in ("seeds", "guidance_scales", "num_inference_steps", "solvers", "averages", "metrics"):
        if len(set(getattr(args, name))) < len(getattr(args, name)):
            errors.append(f"`{name}` must hold different values, got {getattr(args, name)}.")
    if args.num_stages > 1 and not has_embedder:
        errors.append(f"`num_stages` must be 1 without a latent embedder, got {args.num_stages}.")
    if errors:
        parser.error("\n".join(errors))
    return args


def main(argv: list[str] | None = None) -> None:
    """The command; `argv` are its arguments, the process's by default. Raises a `ValueError` where they do not fit."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    metrics, rows = sweep(args)
    table = to_table(rows)
    (args.output_dir / "sweep.md").write_text(table + "\n")
    print(table)
    try:
        draw_plots(rows, args.output_dir)
    except ImportError:
        print("No plots: drawing them needs matplotlib.", file=sys.stderr)
    settings = {name: value for name, value in vars(args).items() if name not in ("output_dir", "output_file")}
    write_results(
        args.output_file or args.output_dir / "sweep.json",
        "sweep",
        argv,
        metrics,
        {"name": args.reference, "num_samples": args.num_images},
        settings,
        "cuda" if torch.cuda.is_available() else "cpu",
        args.pretrained_model_name_or_path,
    )


if __name__ == "__main__":
    main()
