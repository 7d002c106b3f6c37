# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Guidance scales x steps x solvers x averages of the weights, and the stages of each, for one checkpoint:

    python -m diffusers_dod.evaluation.sweep --pretrained_model_name_or_path checkpoints/dod-desk \\
        --reference textures:20000:101 --resolution 32 --extractor training/desk/texture_features.py:extractor \\
        --metrics fid accuracy --num_images 1200 --first_stage_guidance_scales 1 3 --guidance_scales 1 2 3 4 \\
        --num_inference_steps 10 20 --seeds 0 1 --output_dir outputs/sweep

    output_dir/reference.npz  statistics of the reference, unless its pictures are needed
    output_dir/settings/      results of each stage, setting and seed: what a run that was stopped need not do again
    output_dir/sweep.json     all numbers, as `<metric>/stage-<n>/<average>/<steps>/<solver>/<scales>`
    output_dir/sweep.md       all numbers as a table
    output_dir/*.png          FID against scale and against compute, precision against recall (needs matplotlib)

Scales are those of all stages up to the one that is judged, such as `1:3`: stage 1 at one of
`--first_stage_guidance_scales`, all later ones at one of `--guidance_scales`. With one stage there are only the first;
without a latent embedder both options mean the only stage. Every setting is sampled by [`sample`](sample.html) and
judged as [`evaluate`](evaluate.html) does, in one process.
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
from accelerate import Accelerator
from safetensors.torch import load_file

from ..checks import attempt, check_at_least, check_number
from ..compute import count_model, sampling_compute
from ..files import check_output, file_sha256, in_use, replacing
from ..guidance import Guidance
from ..losses import DoDJointModel
from ..metrics.intervals import mean_interval
from ..pipeline_dod import DoDPipeline
from ..results import as_metric, checkpoint_sha256, half_width, read_results, write_results
from ..scheduling_dod import DoDFlowMatchScheduler
from ..tableaus import SOLVERS
from ..training.checkpoints import STATE_FOLDER
from . import evaluate, sample
from .images import open_images
from .options import DTYPES


PIPELINE = "pipeline"  # the average that a checkpoint's pipeline has
NAMES = {"fid": "FID", "sfid": "sFID", "is": "IS", "precision": "precision", "recall": "recall"}
NAMES |= {"accuracy": "accuracy"}
SCALES = ("first_stage_guidance_scales", "guidance_scales")


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
    with replacing(folder) as unfinished:
        pipeline.save_pretrained(unfinished)


def mean_over_seeds(metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """
    One number out of those of several seeds.

    Args:
        metrics (`Sequence[dict]`): What [`as_metric`] returned for each seed.

    Returns:
        `dict`: The mean, with Student's 95 % interval of it; of a single seed the number as it is.
    """
    values = [metric["value"] for metric in metrics]
    interval = mean_interval(values) if len(values) > 1 else metrics[0]["interval"]
    return as_metric(np.mean(values), interval, seeds=values)


def format_scales(scales: Sequence[float]) -> str:
    """The guidance `scales` of stages in one word that tells all numbers apart, such as `1:5.5`."""
    return ":".join(np.format_float_positional(scale, trim="-") for scale in scales)


def list_scales(args: argparse.Namespace, has_embedder: bool) -> list[list[float]]:
    """
    The guidance scales of all stages, of each setting.

    Args:
        args (`argparse.Namespace`): The options of the command.
        has_embedder (`bool`): Whether the pipeline has a latent embedder.

    Returns:
        `list[list[float]]`: One scale for each stage.
    """
    if not has_embedder:
        return [[scale] for scale in args.guidance_scales or args.first_stage_guidance_scales]
    later_scales = args.guidance_scales if args.num_stages > 1 else [None]
    grid = itertools.product(args.first_stage_guidance_scales, later_scales)
    return [[first] + [later] * (args.num_stages - 1) for first, later in grid]


def evaluate_argv(args: argparse.Namespace, samples: str) -> list[str]:
    """
    The arguments of [`evaluate`] for samples of the sweep.

    Args:
        args (`argparse.Namespace`): The options of the sweep.
        samples (`str`): Where the samples are.

    Returns:
        `list[str]`: The arguments.
    """
    argv = [samples, "--extractor", args.extractor, "--metrics", *args.metrics]
    argv += ["--num_groups", str(args.num_groups), "--batch_size", str(args.batch_size), "--device", args.device]
    for name in ("reference", "resolution"):
        argv += [] if getattr(args, name) is None else [f"--{name}", str(getattr(args, name))]
    return argv + ["--trust_extractor"] * args.trust_extractor


def guidance_argv(args: argparse.Namespace) -> list[str]:
    """The options of [`add_guidance_arguments`] in `args` as arguments."""
    argv = []
    for name in sample.GUIDANCE_OPTIONS:
        value = getattr(args, name)
        if value is not None:
            argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return argv


def has_known_cost(guidance: Guidance) -> bool:
    """Whether [`sampling_compute`] tells what `guidance` costs."""
    has_default_condition = guidance.null_condition == "class_and_prior" and guidance.prior_scale is None
    return has_default_condition and guidance.cosine_threshold is None


class Sweep:
    """
    Samples and judges settings, but for what has been done.

    Args:
        args (`argparse.Namespace`): What [`parse_args`] returns.

    Raises:
        `ImportError`, `OSError`: see [`Evaluator`].
        `ValueError`: see [`Evaluator`]; or the folder is that of another sweep.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.checkpoint = Path(args.pretrained_model_name_or_path)
        self.evaluator = evaluate.Evaluator(evaluate.parse_args(evaluate_argv(args, "samples")))
        device = torch.device(args.device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # which accelerate then takes
        self.accelerator = Accelerator(cpu=device.type == "cpu")
        self._check_folder()
        if self.evaluator.reference is not None:
            self.evaluator.reference.cache = args.output_dir / "reference.npz"

    def _check_folder(self) -> None:
        """Makes sure that all settings in the folder are of one sweep."""
        args = self.args
        names = ("extractor", "metrics", "resolution", "num_groups", "num_images", "batch_size", "labels", "dtype")
        options = {name: getattr(args, name) for name in (*names, *sample.GUIDANCE_OPTIONS)}
        options["extractor_sha256"] = self.evaluator.extractor_sha256
        options["reference"] = self.evaluator.reference and self.evaluator.reference.data
        options["checkpoint_sha256"] = checkpoint_sha256(self.checkpoint)
        for average in args.averages:
            path = self.checkpoint / STATE_FOLDER / f"ema-{average}.safetensors"
            options[f"{average}_sha256"] = file_sha256(path) if path.is_file() else None
        path = args.output_dir / "options.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        for name, value in options.items():
            if found.get(name, value) != value:  # a sweep may go on with more averages
                raise ValueError(
                    f"`output_dir` must be the folder of a sweep with `{name}` = {value!r}, got {args.output_dir} "
                    f"with {found[name]!r}: use another one."
                )
        with replacing(path) as unfinished:
            unfinished.write_text(json.dumps(found | options, indent=2) + "\n")

    def pipeline_folder(self, average: str) -> Path:
        """The pipeline with an `average` of the weights, which is written if need be; see [`write_average`]."""
        if average == PIPELINE:
            return self.checkpoint
        folder = self.args.output_dir / "pipelines" / average
        if not folder.exists():
            write_average(self.checkpoint, average, folder)
        return folder

    def run_setting(
        self, average: str, num_inference_steps: int, solver: str, scales: Sequence[float], seed: int
    ) -> dict[int, dict[str, dict[str, Any]]]:
        """
        Samples and judges all stages of one setting, but for those that have been judged.

        Args:
            average (`str`): The average of the weights.
            num_inference_steps (`int`): Steps of each stage.
            solver (`str`): Solver of all stages; the class of the checkpoint's scheduler if that has no solvers.
            scales (`Sequence[float]`): Guidance scale of each stage.
            seed (`int`): Seed of the samples.

        Returns:
            `dict[int, dict]`: The metrics of each stage, as results hold them.

        Raises:
            `ValueError`: the options of sampling and judging do not fit.
        """
        args = self.args
        paths = {}
        for stage in range(1, len(scales) + 1):
            parts = (average, num_inference_steps, solver, format_scales(scales[:stage]).replace(":", "-"), seed)
            paths[stage] = args.output_dir / "settings" / f"{'_'.join(map(str, parts))}_stage-{stage}.json"
        missing = [stage for stage, path in paths.items() if not path.exists()]
        if missing:
            scales = scales[: missing[-1]]
            samples = args.output_dir / "samples" / paths[missing[-1]].stem
            argv = ["--pretrained_model_name_or_path", str(self.pipeline_folder(average)), "--all_stages"]
            argv += ["--num_images", str(args.num_images), "--batch_size", str(args.batch_size), "--format", "npz"]
            argv += ["--labels", args.labels, "--seed", str(seed), "--dtype", args.dtype]
            argv += ["--num_stages", str(len(scales)), "--num_inference_steps", str(num_inference_steps)]
            argv += ["--stage_solvers", *[solver] * len(scales)] if solver in SOLVERS else []
            argv += ["--stage_guidance_scales", *map(str, scales), *guidance_argv(args), "--output_dir", str(samples)]
            sample.sample(sample.parse_args(argv), argv, self.accelerator)
            for stage in missing:
                archive = str(samples / f"stage-{stage}" / sample.ARCHIVE)
                metrics, data = self.evaluator.evaluate(open_images(archive, args.resolution))
                argv = [*evaluate_argv(args, archive), "--output_file", str(paths[stage])]
                self.evaluator.write(paths[stage], argv, metrics, data)
            if not args.keep_samples:
                shutil.rmtree(samples)
                if not any(samples.parent.iterdir()):
                    samples.parent.rmdir()
        return {stage: read_results(path)["metrics"] for stage, path in paths.items()}

    def run(self) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
        """
        Runs all settings.

        Returns:
            `tuple[dict, list[dict]]`: The numbers by `<metric>/<stage>/<setting>`, and a row of all that belongs
            together for each stage of each setting.

        Raises:
            `ValueError`: see [`Sweep.run_setting`] and [`write_average`].
        """
        args = self.args
        pipeline = DoDPipeline.from_pretrained(self.checkpoint)
        side = pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
        num_classes = None if args.labels == "null" else pipeline.transformer.config.num_classes
        self.evaluator.check((side, side), num_classes)  # before anything is sampled
        cost = count_model(pipeline)
        metrics: dict[str, dict[str, Any]] = {}
        rows: dict[str, dict[str, Any]] = {}
        all_scales = list_scales(args, pipeline.latent_embedder is not None)
        grid = itertools.product(args.averages, args.num_inference_steps, args.solvers, all_scales)
        for average, num_steps, solver, scales in grid:
            of_seeds = [self.run_setting(average, num_steps, solver, scales, seed) for seed in args.seeds]
            for stage in range(1, args.num_stages + 1):
                label = f"stage-{stage}/{average}/{num_steps}/{solver}/{format_scales(scales[:stage])}"
                if label in rows:
                    continue  # it is the same for all scales of later stages
                row = rows[label] = {
                    "average": average,
                    "num_inference_steps": num_steps,
                    "solver": solver,
                    "scales": format_scales(scales[:stage]),
                    "scale": scales[stage - 1],
                    "stage": stage,
                    "gflops": None,
                }
                if solver != "dopri5" and has_known_cost(sample.build_guidance(args)):
                    solvers = [solver] * stage if solver in SOLVERS else None
                    interval = tuple(args.guidance_interval)
                    found = sampling_compute(
                        pipeline, [num_steps] * stage, scales[:stage], solvers, interval, cost=cost
                    )
                    row["gflops"] = found["flops"] / 1e9
                for name in of_seeds[0][stage]:
                    row[name] = mean_over_seeds([found[stage][name] for found in of_seeds])
                    metrics[f"{name}/{label}"] = row[name]
        return metrics, list(rows.values())


def to_table(rows: Sequence[dict[str, Any]]) -> str:
    """The `rows` of a sweep as a table in Markdown."""
    names = [name for name in NAMES if name in rows[0]]
    header = ["stage", "average", "steps", "solver", "scales", "GFLOPs", *(NAMES[name] for name in names)]
    lines = ["| " + " | ".join(header) + " |", "| ---: | --- | ---: | --- | ---: |" + " ---: |" * (len(names) + 1)]
    for row in rows:
        cells = [str(row["stage"]), row["average"], str(row["num_inference_steps"]), row["solver"]]
        cells += [row["scales"], "-" if row["gflops"] is None else f"{row['gflops']:.4g}"]
        for name in names:
            half = "" if row[name]["interval"] is None else f" ± {half_width(row[name]):.2g}"
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
        "fid_scale": ("scale", "fid", "guidance scale of the stage", "FID"),
        "fid_gflops": ("gflops", "fid", "GFLOPs of an image", "FID"),
        "precision_recall": ("recall", "precision", "recall", "precision"),
    }
    paths = []
    for file, (x, y, x_label, y_label) in plots.items():
        known = [row for row in rows if row.get(x) is not None and y in row]
        if not known:
            continue
        figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
        lines: dict[str, list[tuple]] = {}
        for row in known:
            point = [row[name]["value"] if isinstance(row[name], dict) else row[name] for name in (x, y)]
            if x == "gflops":
                constant = f"scales {row['scales']}"
            else:  # a line goes along the scales of a stage
                constant = f"{row['num_inference_steps']} steps"
                if row["stage"] > 1:
                    constant += f", stage 1 at {row['scales'].split(':')[0]}"
            parts = [f"stage {row['stage']}", row["average"], row["solver"], constant]
            half = half_width(row[y])
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
    parser.add_argument("--reference", help="See the command `evaluate`, as the next six.")
    parser.add_argument("--extractor", required=True)
    parser.add_argument("--trust_extractor", action="store_true")
    parser.add_argument("--metrics", nargs="+", default=["fid"], choices=evaluate.METRICS)
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--num_groups", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--num_images", type=int, default=10_000, help="Of each setting and seed.")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--labels", default="balanced", choices=sample.LABELS)
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="With several, intervals are of their mean.")
    parser.add_argument("--num_stages", type=int, help="All of them are judged; the checkpoint's by default.")
    parser.add_argument(
        "--first_stage_guidance_scales", type=float, nargs="+", help="Of stage 1, 1 by default where others follow."
    )
    parser.add_argument(
        "--guidance_scales",
        type=float,
        nargs="+",
        help="From stage 2 on, or of the only stage without a LEM; the checkpoint's by default.",
    )
    parser.add_argument(
        "--num_inference_steps", type=int, nargs="+", help="Of each stage; the checkpoint's by default."
    )
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, help="Of all stages; the checkpoint's by default.")
    parser.add_argument(
        "--averages",
        nargs="+",
        default=[PIPELINE],
        help=f"Averages of a training checkpoint, e.g. decay-0.9999; `{PIPELINE}` is its own.",
    )
    sample.add_guidance_arguments(parser.add_argument_group("guidance", "The same for all settings of a folder."))
    parser.add_argument("--keep_samples", action="store_true", help="Keep the images of every setting.")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--output_file", type=Path, help="`sweep.json` in `--output_dir` by default.")
    return parser


def _fill_in_defaults(args: argparse.Namespace, config: dict[str, Any], scheduler: dict[str, Any]) -> None:
    """Gives options that are not given the values of a checkpoint, whose configs these are."""
    has_embedder = config["latent_embedder"][0] is not None
    if args.num_stages is None:
        args.num_stages = config["default_num_stages"] if has_embedder else 1
    if has_embedder:
        args.first_stage_guidance_scales = args.first_stage_guidance_scales or [1.0]
    has_default_scale = args.num_stages > 1 or not args.first_stage_guidance_scales
    if args.guidance_scales is None and has_default_scale:
        args.guidance_scales = [config["default_guidance_scale"]]
    args.num_inference_steps = args.num_inference_steps or [config["default_num_inference_steps"]]
    args.solvers = args.solvers or [scheduler.get("solver", scheduler["_class_name"])]


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The options in `argv`, with the checkpoint's defaults; all errors are reported at once, as `argparse` does."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error(f"The command must run in one process, got {os.environ['WORLD_SIZE']}.")
    checkpoint = Path(args.pretrained_model_name_or_path)
    if not (checkpoint / "model_index.json").is_file():
        parser.error(f"`pretrained_model_name_or_path` must be the folder of a pipeline, got {checkpoint}.")
    config = DoDPipeline.load_config(checkpoint)
    has_embedder = config["latent_embedder"][0] is not None
    _fill_in_defaults(args, config, DoDFlowMatchScheduler.load_config(checkpoint, subfolder="scheduler"))
    errors = evaluate.find_errors(evaluate.build_parser().parse_args(evaluate_argv(args, "samples")))
    attempt(errors, check_at_least, "num_images", args.num_images, max(2, args.num_groups))
    attempt(errors, check_at_least, "num_stages", args.num_stages, 1)
    for value in args.num_inference_steps:
        attempt(errors, check_at_least, "num_inference_steps", value, 1)
    for value in args.seeds:
        attempt(errors, check_number, "seeds", value, 0, 2**64, open_maximum=True)
    for name in SCALES:
        for value in getattr(args, name) or ():
            attempt(errors, check_number, name, value, 0)
    attempt(errors, sample.build_guidance, args)
    for name in (*SCALES, "num_inference_steps", "solvers", "averages", "seeds"):
        values = getattr(args, name) or []
        if len(set(values)) < len(values):
            errors.append(f"`{name}` must hold different values, got {values}.")
    if args.num_stages > 1 and not has_embedder:
        errors.append(f"`num_stages` must be 1 without a latent embedder, got {args.num_stages}.")
    if args.num_stages == 1 and args.first_stage_guidance_scales and args.guidance_scales:
        errors.append(
            "`guidance_scales` must not be given for one stage, whose scales are `first_stage_guidance_scales`, "
            f"got {args.guidance_scales}."
        )
    attempt(errors, check_output, "output_dir", args.output_dir, is_folder=True)
    attempt(errors, check_output, "output_file", args.output_file)
    if errors:
        parser.error("\n".join(errors))
    return args


def main(argv: list[str] | None = None) -> None:
    """The command; `argv` are its arguments, the process's by default. Raises a `ValueError` where they do not fit."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    with in_use(args.output_dir):
        sweep = Sweep(args)
        metrics, rows = sweep.run()
        table = to_table(rows)
        (args.output_dir / "sweep.md").write_text(table + "\n")
        print(table)
        try:
            draw_plots(rows, args.output_dir)
        except ImportError:
            print("No plots: drawing them needs matplotlib.", file=sys.stderr)
        settings = {name: value for name, value in vars(args).items() if name not in ("output_dir", "output_file")}
        settings["extractor_sha256"] = sweep.evaluator.extractor_sha256
        reference = sweep.evaluator.reference
        data = {"name": args.reference, "num_samples": args.num_images, "reference": reference and reference.data}
        path = args.output_file or args.output_dir / "sweep.json"
        write_results(path, "sweep", argv, metrics, data, settings, args.device, args.pretrained_model_name_or_path)


if __name__ == "__main__":
    main()
