# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Samples and evaluates a checkpoint over guidance scales x steps x solvers x averages of the weights, for each stage:

    python -m diffusers_dod.evaluation.sweep --pretrained_model_name_or_path checkpoints/dod-desk \\
        --reference textures:20000:101 --resolution 32 --extractor training/desk/texture_features.py:extractor \\
        --metrics fid accuracy --num_images 1200 --first_stage_guidance_scales 1 3 --guidance_scales 1 2 3 4 \\
        --num_inference_steps 10 20 --seeds 0 1 --output_dir outputs/sweep

    output_dir/reference.npz  statistics of the reference, unless its images are needed
    output_dir/settings/      results of each stage, setting and seed, for a run that was stopped
    output_dir/sweep.json     all numbers, as `<metric>/stage-<n>/<average>/<steps>/<solver>/<scales>`
    output_dir/sweep.md       all numbers as a table
    output_dir/*.png          FID against scale and against compute, precision against recall (needs matplotlib)

Scales are named for all stages up to the judged one, such as `1:3`: stage 1 at one of `--first_stage_guidance_scales`,
all later stages at one of `--guidance_scales`. With one stage there are only the first scales. Without a latent
embedder both options mean the only stage. With `--use_token_prior` they begin with stage 2. Every setting is sampled
and judged as by the commands `sample` and `evaluate`, in one process. `--samples_dir` keeps the samples, for a second
sweep with another judge.
"""

import itertools
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from ..checkpoint_manifest import STATE_FOLDER, check_checkpoint
from ..command_line import run_main
from ..compute import count_model, has_known_cost, sampling_compute
from ..files import file_sha256, in_use, replacing, write_json
from ..guidance_options import GuidanceOptions
from ..losses import DoDJointModel
from ..metrics.intervals import mean_interval
from ..metrics.table import METRICS
from ..options import check_options, option, parse_options, to_argv, to_json, to_values
from ..pipeline_dod import DoDPipeline
from ..records import read_record
from ..results import (
    as_metric,
    checkpoint_sha256,
    half_width,
    identify_checkpoint,
    lora_sha256,
    read_results,
    write_results,
)
from ..sampling_options import CallOptions, TokenPriorOptions, find_idle_noise
from ..scheduling_dod import DoDFlowMatchScheduler
from ..shipped import find_shipped
from ..tableaus import SOLVERS
from ..tables import format_table
from . import evaluate, sample
from .evaluate import EvaluationOptions, JudgeOptions
from .images import open_images
from .options import DTYPES, load_pipeline, lora_weights_option
from .sample import LABELS, SamplingOptions


PIPELINE = "pipeline"  # the average that a checkpoint's pipeline has
PLACES = ("output_dir", "output_file", "samples_dir")


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """Options of the command."""

    pretrained_model_name_or_path: str = option(help="Folder of the pipeline.")
    num_images: int = option(10_000, at_least=2, help="Number of images of each setting and seed.")
    labels: str = option("balanced", choices=LABELS, help="Classes of the images, see the command `sample`.")
    dtype: str = option("float32", choices=DTYPES, help="Data type of the weights of all models.")
    seeds: tuple[int, ...] = option(
        (0,), at_least=0, below=2**64, is_distinct=True, help="Seeds; with several, intervals are of their mean."
    )
    num_stages: int | None = option(
        None, at_least=1, help="Number of stages, all of which are judged; the checkpoint's by default."
    )
    first_stage_guidance_scales: tuple[float, ...] | None = option(
        None, at_least=0, is_distinct=True, help="Scales of stage 1; the checkpoint's by default, which is 1 for most."
    )
    guidance_scales: tuple[float, ...] | None = option(
        None,
        at_least=0,
        is_distinct=True,
        help="Scales from stage 2 on, or of the only stage without a LEM; the checkpoint's by default.",
    )
    num_inference_steps: tuple[int, ...] | None = option(
        None, at_least=1, is_distinct=True, help="Steps of each stage; the checkpoint's by default."
    )
    solvers: tuple[str, ...] | None = option(
        None, choices=SOLVERS, is_distinct=True, help="Solvers of all stages; the checkpoint's by default."
    )
    averages: tuple[str, ...] = option(
        (PIPELINE,),
        is_distinct=True,
        help=f"Averages of a training checkpoint, e.g. decay-0.9999; `{PIPELINE}` is its own.",
    )
    prior_noise: float = option(0.0, at_least=0, at_most=1, help="Level of the noise that the LEM sees in samples.")
    guidance_model: str | None = sample.guidance_model_option()
    lora_weights: str | None = lora_weights_option()
    token_prior: TokenPriorOptions = field(default_factory=TokenPriorOptions)
    output_dir: Path = option(writes="folder", help="Folder of the sweep.")
    samples_dir: Path | None = option(
        None,
        writes="folder",
        help="Folder that keeps the images of every setting: a sweep with another judge takes them from there.",
    )
    output_file: Path | None = option(None, writes="file", help="`sweep.json` in `--output_dir` by default.")
    judge: JudgeOptions
    guidance: GuidanceOptions = field(default_factory=GuidanceOptions)

    def find_conflicts(self) -> list[str]:
        """Messages about options that do not fit each other."""
        found = find_idle_noise(self.prior_noise, self.token_prior.use_token_prior)
        if self.token_prior.use_token_prior and self.first_stage_guidance_scales is not None:
            found.append(
                "`first_stage_guidance_scales` must not be given with `use_token_prior`, which takes the place of "
                f"stage 1, got {list(self.first_stage_guidance_scales)}."
            )
        if self.num_images < self.judge.num_groups:
            found.append(f"`num_images` must be an integer >= {self.judge.num_groups}, got {self.num_images}.")
        if not self.judge.wanted_metrics:
            found.append("`reference` or `metrics` must be given, got neither.")
        return found


def write_average(checkpoint: Path, name: str, folder: Path) -> None:
    """
    Saves the pipeline of a training checkpoint with another average of the weights.

    Args:
        checkpoint (`Path`): The checkpoint.
        name (`str`): The average, such as `decay-0.9999`, as its file `training_state/ema-<name>.safetensors` says.
        folder (`Path`): Folder for the pipeline.

    Raises:
        `ValueError`: the checkpoint has no such average.
    """
    state = checkpoint / STATE_FOLDER
    path = state / f"ema-{name}.safetensors"
    if not path.is_file():
        found = [PIPELINE] + sorted(file.stem.removeprefix("ema-") for file in state.glob("ema-*.safetensors"))
        raise ValueError(f"`averages` must be among {found} of {checkpoint}, got {name!r}.")
    check_checkpoint("pretrained_model_name_or_path", checkpoint)
    pipeline = DoDPipeline.from_pretrained(checkpoint)
    DoDJointModel(pipeline.transformer, pipeline.latent_embedder).load_state_dict(load_file(path))
    with replacing(folder) as unfinished:
        pipeline.save_pretrained(unfinished)


def mean_over_seeds(metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """
    Averages a number over several seeds.

    Args:
        metrics (`Sequence[dict]`): An [`as_metric`] for each seed.

    Returns:
        `dict`: The mean with its 95 % interval (Student's). The number of a single seed stays as it is.
    """
    values = [metric["value"] for metric in metrics]
    interval = mean_interval(values) if len(values) > 1 else metrics[0]["interval"]
    return as_metric(np.mean(values), interval, seeds=values)


def format_scales(scales: Sequence[float]) -> str:
    """Formats the guidance `scales` of stages as one word, such as `1:5.5`; different numbers stay different."""
    return ":".join(np.format_float_positional(scale, trim="-") for scale in scales)


def list_scales(options: SweepOptions, has_embedder: bool) -> list[list[float]]:
    """
    Lists the guidance scales of all stages that are run, for each setting.

    Args:
        options ([`SweepOptions`]): The options, with the checkpoint's defaults.
        has_embedder (`bool`): Whether the pipeline has a latent embedder.

    Returns:
        `list[list[float]]`: A scale for each stage, for each setting.
    """
    if not has_embedder:
        return [[scale] for scale in options.guidance_scales or options.first_stage_guidance_scales]
    if options.token_prior.use_token_prior:
        return [[scale] * (options.num_stages - 1) for scale in options.guidance_scales]
    later_scales = options.guidance_scales if options.num_stages > 1 else [None]
    grid = itertools.product(options.first_stage_guidance_scales, later_scales)
    return [[first] + [later] * (options.num_stages - 1) for first, later in grid]


class Sweep:
    """
    Samples and judges settings, except for settings that are done.

    Args:
        options ([`SweepOptions`]): The options, with the checkpoint's defaults.

    Raises:
        `ImportError`, `OSError`: see [`Evaluator`].
        `ValueError`: see [`Evaluator`]; or the folder belongs to another sweep.
    """

    def __init__(self, options: SweepOptions):
        self.options = options
        self.checkpoint = find_shipped(Path(options.pretrained_model_name_or_path))
        self.evaluator = evaluate.Evaluator(options.judge)
        device = torch.device(options.judge.device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # which accelerate then takes
        self.accelerator = Accelerator(cpu=device.type == "cpu")
        self._check_folder()
        if self.evaluator.reference is not None:
            self.evaluator.reference.cache = options.output_dir / "reference.npz"

    def _check_folder(self) -> None:
        """Raises unless all settings in the folder belong to one sweep."""
        options = self.options
        names = ("extractor", "resolution", "num_groups", "num_images", "batch_size", "labels", "dtype", "prior_noise")
        settings = {name: value for name, value in to_values(options).items() if name in names}
        settings |= to_values(options.guidance) | to_values(options.token_prior)
        settings = to_json(settings | {"metrics": options.judge.wanted_metrics})
        settings["extractor_sha256"] = self.evaluator.extractor_sha256
        settings["reference"] = self.evaluator.reference and self.evaluator.reference.data
        settings["checkpoint_sha256"] = checkpoint_sha256(self.checkpoint)
        model, adapters = options.guidance_model, options.lora_weights
        settings["guidance_model_sha256"] = None if model is None else checkpoint_sha256(model)
        settings["lora_weights_sha256"] = None if adapters is None else lora_sha256(adapters)
        for average in options.averages:
            path = self.checkpoint / STATE_FOLDER / f"ema-{average}.safetensors"
            settings[f"{average}_sha256"] = file_sha256(path) if path.is_file() else None
        path = options.output_dir / "options.json"
        found = read_record(path, dict[str, Any]) if path.exists() else {}
        for name, value in settings.items():
            # A sweep may go on with more averages; older ones had no noise of priors, token prior and other weights.
            is_average = name.endswith("_sha256") and name not in ("guidance_model_sha256", "lora_weights_sha256")
            missing = value if is_average else None
            if found and found.get(name, {"prior_noise": 0.0, "use_token_prior": False}.get(name, missing)) != value:
                raise ValueError(
                    f"`output_dir` must be the folder of a sweep with `{name}` = {value!r}, got {options.output_dir} "
                    f"with {found.get(name)!r}: use another one."
                )
        write_json(path, found | settings)

    def pipeline_folder(self, average: str) -> Path:
        """Folder of the pipeline with an `average` of the weights; it is written if needed, see [`write_average`]."""
        if average == PIPELINE:
            return self.checkpoint
        folder = self.options.output_dir / "pipelines" / average
        if not folder.exists():
            write_average(self.checkpoint, average, folder)
        return folder

    def run_setting(
        self, average: str, num_inference_steps: int, solver: str, scales: Sequence[float], seed: int
    ) -> dict[int, dict[str, dict[str, Any]]]:
        """
        Samples and judges all stages of one setting, except for stages that have been judged.

        Args:
            average (`str`): The average of the weights.
            num_inference_steps (`int`): Steps of each stage.
            solver (`str`): Solver of all stages, or the class of the checkpoint's scheduler if that has no solvers.
            scales (`Sequence[float]`): Guidance scale of each stage that is run.
            seed (`int`): Seed of the samples.

        Returns:
            `dict[int, dict]`: The metrics of each stage, in the form of results.

        Raises:
            `ValueError`: the options of sampling and judging do not fit.
        """
        options, first = self.options, self.options.token_prior.first_stage
        paths = {}
        for number, stage in enumerate(range(first, first + len(scales)), start=1):
            parts = (average, num_inference_steps, solver, format_scales(scales[:number]).replace(":", "-"), seed)
            paths[stage] = options.output_dir / "settings" / f"{'_'.join(map(str, parts))}_stage-{stage}.json"
        missing = [stage for stage, path in paths.items() if not path.exists()]
        if missing:
            scales = scales[: missing[-1] - first + 1]
            samples = (options.samples_dir or options.output_dir / "samples") / paths[missing[-1]].stem
            sampling = SamplingOptions(
                pretrained_model_name_or_path=str(self.pipeline_folder(average)),
                output_dir=samples,
                num_images=options.num_images,
                batch_size=options.judge.batch_size,
                labels=options.labels,
                seed=seed,
                format="npz",
                all_stages=True,
                dtype=options.dtype,
                guidance_model=options.guidance_model,
                lora_weights=options.lora_weights,
                call=CallOptions(
                    num_stages=first - 1 + len(scales),
                    num_inference_steps=num_inference_steps,
                    stage_solvers=(solver,) * len(scales) if solver in SOLVERS else None,
                    stage_guidance_scales=tuple(scales),
                    prior_noise=options.prior_noise,
                    token_prior=options.token_prior,
                ),
                guidance=options.guidance,
            )
            check_options(sampling)
            try:
                sample.sample(sampling, self.accelerator)
            except ValueError as error:
                if options.samples_dir is None:
                    raise
                raise ValueError(str(error).replace("`output_dir`", "`samples_dir`", 1)) from error
            for stage in missing:
                archive = str(samples / f"stage-{stage}" / sample.ARCHIVE)
                metrics, data = self.evaluator.evaluate(open_images(archive, options.judge.resolution))
                judging = EvaluationOptions(samples=archive, judge=options.judge, output_file=paths[stage])
                self.evaluator.write(paths[stage], to_argv(judging), metrics, data)
            if options.samples_dir is None:
                shutil.rmtree(samples)
                if not any(samples.parent.iterdir()):
                    samples.parent.rmdir()
        return {stage: read_results(path)["metrics"] for stage, path in paths.items()}

    def run(self) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
        """
        Runs all settings.

        Returns:
            `tuple[dict, list[dict]]`: The numbers by `<metric>/<stage>/<setting>`, and a row for each stage of each
            setting.

        Raises:
            `ValueError`: see [`Sweep.run_setting`] and [`write_average`].
        """
        options = self.options
        pipeline = load_pipeline(
            str(self.checkpoint), options.lora_weights, use_token_prior=options.token_prior.use_token_prior
        )
        side = pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
        num_classes = None if options.labels == "null" else pipeline.transformer.config.num_classes
        self.evaluator.check((side, side), num_classes)  # before anything is sampled
        cost = count_model(pipeline)
        guidance = sample.load_guidance(options.guidance, options.guidance_model, pipeline.dtype)
        token_prior, first = to_values(options.token_prior), options.token_prior.first_stage
        del token_prior["token_prior_truncation"]  # which costs nothing
        metrics: dict[str, dict[str, Any]] = {}
        rows: dict[str, dict[str, Any]] = {}
        all_scales = list_scales(options, pipeline.latent_embedder is not None)
        grid = itertools.product(options.averages, options.num_inference_steps, options.solvers, all_scales)
        for average, num_steps, solver, scales in grid:
            of_seeds = [self.run_setting(average, num_steps, solver, scales, seed) for seed in options.seeds]
            for number, stage in enumerate(range(first, options.num_stages + 1), start=1):
                label = f"stage-{stage}/{average}/{num_steps}/{solver}/{format_scales(scales[:number])}"
                if label in rows:
                    continue  # it is the same for all scales of later stages
                row = rows[label] = {
                    "average": average,
                    "num_inference_steps": num_steps,
                    "solver": solver,
                    "scales": format_scales(scales[:number]),
                    "scale": scales[number - 1],
                    "stage": stage,
                    "gflops": None,
                }
                is_known = solver != "dopri5" and has_known_cost(guidance)
                if is_known and options.lora_weights is None:
                    solvers = [solver] * number if solver in SOLVERS else None
                    steps = [num_steps] * number
                    found = sampling_compute(
                        pipeline, steps, scales[:number], solvers, guidance, cost=cost, **token_prior
                    )
                    row["gflops"] = found["flops"] / 1e9
                for name in of_seeds[0][stage]:
                    row[name] = mean_over_seeds([found[stage][name] for found in of_seeds])
                    metrics[f"{name}/{label}"] = row[name]
        return metrics, list(rows.values())


def to_table(rows: Sequence[dict[str, Any]]) -> str:
    """Formats the `rows` of a sweep as a Markdown table."""
    names = [name for name in METRICS if name in rows[0]]
    header = ["stage", "average", "steps", "solver", "scales", "GFLOPs", *(METRICS[name].title for name in names)]
    lines = []
    for row in rows:
        cells = [str(row["stage"]), row["average"], str(row["num_inference_steps"]), row["solver"]]
        cells += [row["scales"], "-" if row["gflops"] is None else f"{row['gflops']:.4g}"]
        for name in names:
            half = "" if row[name]["interval"] is None else f" ± {half_width(row[name]):.2g}"
            cells.append(f"{row[name]['value']:.4g}{half}")
        lines.append(cells)
    return format_table(header, lines, text=["average", "solver"])


def draw_plots(rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """
    Draws the plots of a sweep.

    Args:
        rows (`Sequence[dict]`): Rows of the sweep.
        folder (`Path`): Folder for the plots.

    Returns:
        `list[Path]`: `fid_scale.png` and `fid_gflops.png` if there is an FID, `precision_recall.png` if there are
        both.

    Raises:
        `ImportError`: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    distance = next((name for name in ("fd-dinov2", "fid") if name in rows[0]), "fid")
    title = METRICS[distance].title
    plots = {
        "fid_scale": ("scale", distance, "guidance scale of the stage", title),
        "fid_gflops": ("gflops", distance, "GFLOPs of an image", title),
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
                if ":" in row["scales"]:
                    constant += f", stage {row['stage'] - row['scales'].count(':')} at {row['scales'].split(':')[0]}"
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
        with replacing(paths[-1]) as unfinished:
            figure.savefig(unfinished, dpi=120)
        plt.close(figure)
    return paths


def fill_in_defaults(options: SweepOptions) -> SweepOptions:
    """
    Fills in missing options with the values of the checkpoint.

    Args:
        options ([`SweepOptions`]): The options.

    Returns:
        [`SweepOptions`]: Options with number of stages, scales, steps and solvers.

    Raises:
        `ValueError`: there is no pipeline, the options do not fit it, or there are several processes.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"The command must run in one process, got {os.environ['WORLD_SIZE']}.")
    checkpoint = find_shipped(Path(options.pretrained_model_name_or_path))
    if not (checkpoint / "model_index.json").is_file():
        raise ValueError(f"`pretrained_model_name_or_path` must be the folder of a pipeline, got {checkpoint}.")
    config = DoDPipeline.load_config(checkpoint)
    scheduler = DoDFlowMatchScheduler.load_config(checkpoint, subfolder="scheduler")
    has_embedder = config["latent_embedder"][0] is not None
    num_stages, first_scales = options.num_stages, options.first_stage_guidance_scales
    if num_stages is None:
        num_stages = config["default_num_stages"] if has_embedder else 1
    if num_stages > 1 and not has_embedder:
        raise ValueError(f"`num_stages` must be 1 without a latent embedder, got {num_stages}.")
    if wrong := find_idle_noise(options.prior_noise, num_stages=num_stages):
        raise ValueError("\n".join(wrong))
    if options.token_prior.use_token_prior:
        if config.get("token_prior", [None])[0] is None:
            raise ValueError("`use_token_prior` must be False without a `token_prior`, got True.")
        if num_stages < 2:
            raise ValueError(f"`num_stages` must be >= 2 with `use_token_prior`, got {num_stages}.")
    elif has_embedder:
        first_scales = first_scales or (config.get("default_first_stage_guidance_scale", 1.0),)
    later_scales = options.guidance_scales
    if num_stages == 1 and first_scales and later_scales:
        raise ValueError(
            "`guidance_scales` must not be given for one stage, whose scales are `first_stage_guidance_scales`, "
            f"got {list(later_scales)}."
        )
    if later_scales is None and (num_stages > 1 or not first_scales):
        later_scales = (config["default_guidance_scale"],)
    return replace(
        options,
        num_stages=num_stages,
        first_stage_guidance_scales=first_scales,
        guidance_scales=later_scales,
        num_inference_steps=options.num_inference_steps or (config["default_num_inference_steps"],),
        solvers=options.solvers or (scheduler.get("solver", scheduler["_class_name"]),),
    )


def main(argv: list[str] | None = None) -> None:
    """Runs the command; `argv` defaults to the process's arguments. Raises a `ValueError` if they do not fit."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse_options(SweepOptions, argv, __doc__, fill_in_defaults)
    with in_use(options.output_dir):
        sweep = Sweep(options)
        metrics, rows = sweep.run()
        table = to_table(rows)
        with replacing(options.output_dir / "sweep.md") as unfinished:
            unfinished.write_text(table + "\n")
        print(table)
        try:
            draw_plots(rows, options.output_dir)
        except ImportError:
            print("No plots: drawing them needs matplotlib.", file=sys.stderr)
        settings = to_json({name: value for name, value in to_values(options).items() if name not in PLACES})
        settings |= {"metrics": options.judge.wanted_metrics, "extractor_sha256": sweep.evaluator.extractor_sha256}
        if options.guidance_model is not None:
            settings["guidance_model_sha256"] = checkpoint_sha256(options.guidance_model)
        if options.lora_weights is not None:
            settings["lora_weights_sha256"] = lora_sha256(options.lora_weights)
        reference = sweep.evaluator.reference
        write_results(
            options.output_file or options.output_dir / "sweep.json",
            task="sweep",
            argv=argv,
            metrics=metrics,
            data={
                "name": options.judge.reference,
                "num_samples": options.num_images,
                "reference": reference and reference.data,
            },
            settings=settings,
            device=options.judge.device,
            checkpoint=identify_checkpoint(options.pretrained_model_name_or_path, options.lora_weights),
        )


if __name__ == "__main__":
    run_main(main)
