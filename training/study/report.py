"""
Writes the tables and plots of docs/study.md from docs/results/study:

    python training/study/report.py

A table stands between `<!-- table: name -->` and `<!-- end -->`; nothing else of the page changes. A number is the
mean over runs that differ in their seed alone, with half of Student's 95 % interval after "±"; or it is the number of
one run, with half of the interval of its samples after "±ₛ". Until all runs have been evaluated, it is the number of
the first run. A dash means not measured.
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from study import RESULTS
from study_results import (
    DIFFERENCE_HEADER,
    IMAGES_PER_STEP,
    STEPS,
    Number,
    Results,
    difference_cells,
    show,
    show_at,
    stage_label,
)
from tuned import (
    AUTO_DRAWN,
    AUTO_FITV2,
    AUTO_FITV2_40,
    AUTO_STAGE_2,
    LONG_FITV2,
    LONG_FITV2_40,
    bounds_table,
    draw_map,
    grid_table,
    map_table,
    tuned_differences_table,
    tuned_table,
    variants_table,
)

from diffusers_dod import DoDFlowMatchScheduler, DoDPipeline, Guidance, TokenPrior
from diffusers_dod.compute import TrainingStep, count_model, sampling_compute, training_cost
from diffusers_dod.presets import PRESETS
from diffusers_dod.results import half_width, read_results
from diffusers_dod.tables import format_table


PAGE = Path("docs/study.md")
JUDGES = Path("docs/results/desk_judges.json")  # of training/study/judge_priors.py
IMAGES = Path("docs/images")
DOD = ("dod-seed0", "dod-seed1", "dod-seed2")
OFTEN = ("dod-ps25", "dod-ps25-seed1", "dod-ps25-seed2")  # DoD that has its prior more often: p_s = 0.25
FITV2 = ("fitv2-seed0", "fitv2-seed1", "fitv2-seed2")
LATENT_SHAPE, NUM_CLASSES, NUM_IMAGES = (4, 8, 8), 12, 192_000
TOKEN_PRIOR_STEPS, TOKENS_PER_STEP = 10_000, 256
COLOURS = {"stage 1": "#0072B2", "stage 2": "#D55E00", "stage 2 of p_s 0.25": "#009E73", "FiTv2": "#555555"}


def samples_row(results: Results, label: str, runs, scales: str | None, **options) -> list[str]:
    """FID, IS and accuracy of samples."""
    if scales is None:
        return [label, "-", "-", "-", "-"]
    numbers = [results.stage(runs, name, scales, **options) for name in ("fid", "is", "accuracy")]
    return [label, scales, show(numbers[0]), show(numbers[1]), show(numbers[2], 1, percent=True)]


SCALES = ["1", "2", "3", "4", "5.5"]
BRIEF = ["3", "4"]  # what all models and numbers of steps have


def stages_table(results: Results) -> str:
    """Table of claim a: the stages, with and without guidance."""
    rows = [samples_row(results, "stage 1", DOD, scales) for scales in SCALES]
    rows += [samples_row(results, "stage 2", DOD, f"1:{scale}") for scale in SCALES]
    rows.append(samples_row(results, "stage 3", DOD, "1:3:3"))
    rows += [samples_row(results, "stage 2, both guided", DOD, f"3:{scale}") for scale in ("2", "3", "4")]
    return format_table(["", "scales", "FID", "IS", "recognised, %"], rows)


def differences_table(results: Results) -> str:
    """Table of the comparisons of claims a and e, seed by seed."""
    first, second = results.best(DOD, "", BRIEF), results.best(DOD, "1:", BRIEF)
    often_first, often_second = results.best(OFTEN, "", BRIEF), results.best(OFTEN, "1:", BRIEF)
    fitv2 = results.best(FITV2, "", BRIEF)
    long_first, long_fitv2 = (results.best(runs, "", BRIEF, steps=40) for runs in (DOD, FITV2))
    rows = []
    for label, one, other in (
        ("stage 2 - stage 1, both unguided", (DOD, "1:1", 20), (DOD, "1", 20)),
        ("stage 2 - unguided stage 1, as in the paper", (DOD, second, 20), (DOD, "1", 20)),
        ("stage 2 - stage 1, guided", (DOD, second, 20), (DOD, first, 20)),
        ("stage 2 - stage 1, guided, 40 steps", (DOD, second, 20), (DOD, long_first, 40)),
        ("stage 2, both guided - stage 2", (DOD, "3:3", 20), (DOD, "1:3", 20)),
        ("stage 2, both guided - stage 1, guided", (DOD, "3:3", 20), (DOD, first, 20)),
        ("stage 2, both guided - stage 1, guided, 40 steps", (DOD, "3:3", 20), (DOD, long_first, 40)),
        ("stage 3 - stage 2", (DOD, "1:3:3", 20), (DOD, "1:3", 20)),
        ("stage 1, guided - FiTv2, guided", (DOD, first, 20), (FITV2, fitv2, 20)),
        ("stage 2 - FiTv2, guided, 40 steps", (DOD, second, 20), (FITV2, long_fitv2, 40)),
        ("stage 2, both guided - FiTv2, guided, 40 steps", (DOD, "3:3", 20), (FITV2, long_fitv2, 40)),
        ("p_s 0.25: stage 2 - stage 1, guided", (OFTEN, often_second, 20), (OFTEN, often_first, 20)),
        ("p_s 0.25: stage 2, both guided - stage 1, guided", (OFTEN, "3:3", 20), (OFTEN, often_first, 20)),
        ("p_s 0.25: stage 2 - FiTv2, guided, 40 steps", (OFTEN, often_second, 20), (FITV2, long_fitv2, 40)),
        ("p_s 0.25: stage 2, both guided - FiTv2, guided, 40 steps", (OFTEN, "3:3", 20), (FITV2, long_fitv2, 40)),
    ):
        found = []
        if None not in (one[1], other[1]):
            found = results.differences(
                *((runs, stage_label("fid", scales, steps)) for runs, scales, steps in (one, other))
            )
        rows.append([label, f"{one[1]} - {other[1]}" if found else "-", *difference_cells(found)])
    return format_table(["", "scales", *DIFFERENCE_HEADER], rows)


def guidance_table(results: Results) -> str:
    """Table of stage 2 of one run, guided away from several null conditions."""
    rows = []
    for label, way in (
        ("(null class, S)", ""),
        ("(null class, prior)", "class"),
        ("(class, S)", "prior"),
    ):
        row = [label]
        for scales in ("1:2", "1:3", "1:4"):
            numbers = [results.stage(DOD[0], name, scales, way=way) for name in ("fid", "accuracy")]
            row += [show(numbers[0]), show(numbers[1], 1, percent=True)]
        rows.append(row)
    header = [cell for scales in ("1:2", "1:3", "1:4") for cell in (f"FID, {scales}", "recognised, %")]
    return format_table(["guided away from", *header], rows)


def unconditional_table(results: Results) -> str:
    """Table of models without classes."""
    dod, fitv2 = "dod-unconditional", "fitv2-unconditional"
    rows = []
    for label, run, scales, steps in (
        ("FiTv2", fitv2, "1", 20),
        ("FiTv2, 40 steps", fitv2, "1", 40),
        ("DoD, stage 1", dod, "1", 20),
        ("DoD, stage 1, 40 steps", dod, "1", 40),
        *(("DoD, stage 2", dod, f"1:{scale}", 20) for scale in SCALES),
        ("DoD, stage 3", dod, "1:4:4", 20),
    ):
        numbers = [results.stage(run, name, scales, steps=steps) for name in ("fid", "is")]
        rows.append([label, scales, *map(show, numbers)])
    return format_table(["", "scales", "FID", "IS"], rows)


def longer_table(results: Results) -> str:
    """Table of the stages of one run and its baseline, after more steps of training."""
    rows = []
    for step in (STEPS, 20000):
        best = [results.best(DOD[0], prefix, scales, step=step) for prefix, scales in (("", BRIEF), ("1:", BRIEF))]
        best += ["1:3:3", "3:3"]
        cells = [show_at(results, DOD[0], scales, step=step) for scales in ("1", *best)]
        for steps in (20, 40):
            scales = results.best(FITV2[0], "", BRIEF, step=step, steps=steps)
            cells.append(show_at(results, FITV2[0], scales, step=step, steps=steps))
        rows.append([f"{step:,}", *cells])
    header = ["stage 1", "stage 1, guided", "stage 2", "stage 3", "stage 2, both guided"]
    return format_table(["trained", *header, "FiTv2, guided", "FiTv2, guided, 40 steps"], rows)


def learning_rates_table(results: Results) -> str:
    """Table of both models with other learning rates."""
    step, rows = 4000, []
    runs = {
        ("FiTv2", "5e-4"): "fitv2-lr5e-4",
        ("FiTv2", "1e-3"): FITV2[0],
        ("FiTv2", "2e-3"): "fitv2-lr2e-3",
        ("DoD", "1e-3 (LEM 5e-4)"): DOD[0],
        ("DoD", "2e-3 (LEM 1e-3)"): "dod-lr2e-3",
    }
    for label, run in runs.items():
        best = [results.best(run, prefix, BRIEF, step=step) for prefix in ("", "1:")]
        rows.append([*label, *(show_at(results, run, scales, step=step) for scales in ("1", *best, "3:3"))])
    header = ["stage 1", "stage 1, guided", "stage 2", "stage 2, both guided"]
    return format_table(["", "learning rate", *header], rows)


def tuning_table(results: Results) -> str:
    """Table of the learning rates that fall to zero: FID corrected for few samples, by guidance scales."""
    rows, choices = [], ("2", "3", "4", "3:2", "3:3", "3:4")
    for label, name in (("FiTv2", "fitv2"), ("DoD", "dod")):
        for schedule, kind in (("all steps", "tune"), ("the second half", "stable")):
            for rate in ("1e-3", "2e-3", "4e-3", "8e-3", "4e-3-lem5e-4"):
                run = f"{name}-{kind}-{rate}"
                cells = [show(results.stage(run, "fid_corrected", scales, step=4000)) for scales in choices]
                if set(cells) != {"-"}:
                    rate, _, of_embedder = rate.partition("-lem")
                    rows.append([label, schedule, f"{rate} (LEM {of_embedder})" if of_embedder else rate, *cells])
    return format_table(["", "falls in", "learning rate", *choices], rows, text=["falls in"])


def tasks_table(results: Results) -> str:
    """Table of stage 1 with fewer blocks, and with half of the images."""
    rows = []
    for step in (2000, 4000, STEPS):
        runs = (FITV2[0], "dod-ps100", DOD[0])
        cells = [show(results.stage(run, "fid", "1", step=step)) for run in runs]
        cells += [show_at(results, run, results.best(run, "", BRIEF, step=step), step=step) for run in runs]
        rows.append([f"{step * IMAGES_PER_STEP:,}", *cells])
    models = ["FiTv2", "DoD, never a prior", "DoD"]
    return format_table(["images", *models, *(f"{model}, guided" for model in models)], rows)


def reconstruction_table(results: Results) -> str:
    """Table of claim b: reconstruction by guidance scale."""
    rows = []
    for label, name in [("autoencoder alone", "autoencoder")] + [(f"scale {s}", f"scale_{s}") for s in SCALES]:
        numbers = [results.find(DOD, f"{metric}_{name}") for metric in ("rfid", "psnr", "ssim")]
        rows.append([label, show(numbers[0]), show(numbers[1], 1), show(numbers[2], 3)])
    return format_table(["", "rFID", "PSNR, dB", "SSIM"], rows)


def reconstruction_differences_table(results: Results) -> str:
    """Table of rFID at the scales around the best one, seed by seed."""
    rows = []
    for scale in ("2", "4"):
        found = results.differences((DOD, f"rfid_scale_{scale}"), (DOD, "rfid_scale_3"))
        rows.append([f"scale {scale} - scale 3", *difference_cells(found)])
    return format_table(["", "difference of rFID", *DIFFERENCE_HEADER[1:]], rows)


def ablation_rows(results: Results, runs: dict[str, str | tuple[str, ...]]) -> list[list[str]]:
    """A row for each of `runs`, with the columns of the paper's Tables 2 and 3."""
    rows = []
    for label, names in runs.items():
        if not isinstance(names, str) and results.group(names) != names:
            continue  # the row of the first one is there already
        first, second = results.best(names, "", BRIEF), results.best(names, "1:", BRIEF)
        rfids = {scale: number for scale in SCALES if (number := results.find(names, f"rfid_scale_{scale}"))}
        scale = min(rfids, key=rfids.get, default=None)
        rows.append(
            [
                label,
                show(results.stage(names, "fid", "1")),
                *(show_at(results, names, scales) for scales in (first, second)),
                "-" if second is None else show(results.stage(names, "is", second)),
                show(results.stage(names, "fid", "3:3")),
                "-" if scale is None else f"{show(rfids[scale])} ({scale})",
                show(results.find(names, f"psnr_scale_{scale}"), 1),
                show(results.find(names, f"ssim_scale_{scale}"), 3),
                *(
                    show(results.find(names, name), 1, percent=True)
                    for name in ("top1_lem", "top1_random_lem", "knn_lem")
                ),
            ]
        )
    return rows


ABLATION_HEADER = ["FID S1", "FID S1, guided (scale)", "FID S2 (scales)", "IS S2", "FID S2 at 3:3"]
ABLATION_HEADER += ["rFID (scale)", "PSNR", "SSIM", "top-1, %", "untrained, top-1, %", "k-NN, %"]


def tokens_table(results: Results) -> str:
    """Table of claim c: numbers of latent tokens."""
    runs = {"2 (16)": "dod-n2", "4 (32)": DOD[0], "8 (64)": "dod-n8", "32 (256)": "dod-n32", "4, three seeds": DOD}
    return format_table(["tokens (numbers)", *ABLATION_HEADER], ablation_rows(results, runs))


def dropout_table(results: Results) -> str:
    """Table of claim d: probabilities of dropping the prior."""
    runs = {"0.25": OFTEN[0], "0.5": DOD[0], "0.75": "dod-ps75", "1, no prior at all": "dod-ps100"}
    runs |= {"0.25, three seeds": OFTEN, "0.5, three seeds": DOD}
    return format_table(["p_s", *ABLATION_HEADER], ablation_rows(results, runs))


def dropout_differences_table(results: Results) -> str:
    """Table of the changes by a lower p_s, seed by seed."""
    rows = []
    for label, scales in (
        ("stage 1", "1"),
        ("stage 1, guided", results.best(DOD, "", BRIEF)),
        ("stage 2", results.best(DOD, "1:", BRIEF)),
        ("stage 2, both guided", "3:3"),
    ):
        found = []
        if scales is not None:
            found = results.differences(*((runs, stage_label("fid", scales)) for runs in (OFTEN, DOD)))
        rows.append([label, scales or "-", *difference_cells(found)])
    return format_table(["p_s 0.25 - p_s 0.5", "scales", *DIFFERENCE_HEADER], rows)


def compute_table(results: Results) -> str:
    """Table of claim e: FID at equal sampling compute."""
    rows, counts = [], {name: count_model(PRESETS[name]) for name in ("FiTv2-Desk", "DoD-Desk")}
    for label, runs, preset, first, choices in (
        ("FiTv2, guided", FITV2, "FiTv2-Desk", "", BRIEF),
        ("DoD, stage 1 guided", DOD, "DoD-Desk", "", BRIEF),
        ("DoD, stage 2", DOD, "DoD-Desk", "1:", BRIEF),
        ("DoD, both stages guided", DOD, "DoD-Desk", "3:", ["3"]),
        ("DoD of p_s 0.25, stage 2", OFTEN, "DoD-Desk", "1:", BRIEF),
        ("DoD of p_s 0.25, both stages guided", OFTEN, "DoD-Desk", "3:", ["3"]),
    ):
        for steps in (10, 20, 40) if not first else (10, 20):
            scales = results.best(runs, first, choices, steps=steps)
            if scales is None:
                continue
            numbers = [float(scale) for scale in scales.split(":")]
            steps_of_stages = [steps] * len(numbers)
            cost = sampling_compute(PRESETS[preset], steps_of_stages, numbers, cost=counts[preset])["flops"]
            number = show(results.stage(runs, "fid", scales, steps=steps))
            rows.append((cost, [label, " + ".join([str(steps)] * len(numbers)), scales, f"{cost / 1e9:.3f}", number]))
    return format_table(["", "steps", "scales", "GFLOPs", "FID"], [row for _, row in sorted(rows)])


def training_compute_table(results: Results) -> str:
    """Table of the cost and the results of trainings of one seed."""
    rows, costs = [], {}
    for label, run, preset, dropout, step in (
        ("FiTv2", FITV2[0], "FiTv2-Desk", 0.5, STEPS),
        ("FiTv2", FITV2[0], "FiTv2-Desk", 0.5, 10000),
        ("FiTv2", FITV2[0], "FiTv2-Desk", 0.5, 12000),
        ("DoD, p_s 0.75", "dod-ps75", "DoD-Desk", 0.75, STEPS),
        ("DoD, p_s 0.5", DOD[0], "DoD-Desk", 0.5, STEPS),
        ("DoD, p_s 0.25", OFTEN[0], "DoD-Desk", 0.25, STEPS),
    ):
        if (preset, dropout) not in costs:  # counting takes a second
            costs[preset, dropout] = training_cost(
                PRESETS[preset], LATENT_SHAPE, NUM_CLASSES, TrainingStep(prior_dropout_prob=dropout)
            )
        cost = costs[preset, dropout]
        parameters = (cost.backbone_parameters + cost.latent_embedder_parameters) / 1e6
        teraflops = cost.training_flops * IMAGES_PER_STEP * step / 1e12
        best = [results.best(run, prefix, BRIEF, step=step) for prefix in ("", "1:")]
        cells = [show_at(results, run, scales, step=step) for scales in best]
        cells.append(show(results.stage(run, "fid", "3:3", step=step)))
        rows.append([label, f"{parameters:.1f} M", f"{step:,}", f"{teraflops:.1f}", *cells])
    header = ["", "parameters", "steps", "TFLOPs", "FID, guided (scale)", "FID S2 (scales)", "FID S2 at 3:3"]
    return format_table(header, rows)


def map_compute_table(results: Results) -> str:
    """Table of what the models of the map cost; it has no results."""
    pipelines, training = {}, {}
    for name in ("FiTv2-Desk", "DoD-Desk"):
        transformer, embedder = PRESETS[name].build(LATENT_SHAPE, NUM_CLASSES)
        prior = None if embedder is None else TokenPrior(*embedder.token_shape, NUM_CLASSES)
        pipelines[name] = DoDPipeline(transformer, DoDFlowMatchScheduler(), None, embedder, prior)
        training[name] = training_cost(PRESETS[name], LATENT_SHAPE, NUM_CLASSES, TrainingStep()).training_flops
    cost = count_model(pipelines["DoD-Desk"]).flops
    tokens = NUM_IMAGES * (cost.latent_embedder - cost.latent_decoder)  # the tokens of all images, then forth and back
    tokens += 3 * TOKEN_PRIOR_STEPS * TOKENS_PER_STEP * cost.token_prior
    rows = []
    for contender in (AUTO_FITV2, AUTO_FITV2_40, LONG_FITV2, LONG_FITV2_40, AUTO_STAGE_2, AUTO_DRAWN):
        name = "DoD-Desk" if contender in (AUTO_STAGE_2, AUTO_DRAWN) else "FiTv2-Desk"
        pipe, has_tokens = pipelines[name], contender.has_tokens
        scales = [1.0, 3.0] if contender is AUTO_STAGE_2 else [3.0]
        steps = [contender.steps] * len(scales)
        scale = 2.0 if has_tokens else None
        guidance = Guidance(transformer=pipe.transformer)  # of the same size
        sampling = sampling_compute(
            pipe,
            steps,
            scales,
            guidance=guidance,
            use_token_prior=has_tokens,
            token_prior_guidance_scale=scale,
        )["flops"]
        teraflops = training[name] * IMAGES_PER_STEP * contender.trained_steps + tokens * has_tokens
        cells = f"{contender.trained_steps:,}", f"{teraflops / 1e12:.1f}", " + ".join(map(str, steps))
        rows.append([contender.name, *cells, f"{sampling / 1e9:.2f}"])
    header = ["", "steps of training", "TFLOPs of training", "steps of sampling", "GFLOPs an image"]
    return format_table(header, rows)


def training_table(results: Results) -> str:
    """Table of claim f: FID by images seen."""
    rows = []
    for step in (2000, 4000, 8000):
        fitv2, first = results.best(FITV2, "", BRIEF, step=step), results.best(DOD, "", BRIEF, step=step)
        second = results.best(DOD, "1:", BRIEF, step=step)
        row = [f"{step * IMAGES_PER_STEP:,}"]
        row += [show(results.stage(runs, "fid", "1", step=step)) for runs in (FITV2, DOD)]
        for runs, scales in ((FITV2, fitv2), (DOD, first), (DOD, second)):
            row.append(show_at(results, runs, scales, step=step))
        rows.append([*row, show(results.stage(DOD, "fid", "3:3", step=step))])
    header = ["images", "FiTv2", "DoD S1", "FiTv2 (scale)", "DoD S1 (scale)", "DoD S2 (scales)", "DoD S2 at 3:3"]
    return format_table(header, rows)


def training_differences_table(results: Results) -> str:
    """Table of the comparisons of claim f, seed by seed."""
    rows = []
    for step in (2000, 4000, STEPS):
        fitv2, first = results.best(FITV2, "", BRIEF, step=step), results.best(DOD, "", BRIEF, step=step)
        second = results.best(DOD, "1:", BRIEF, step=step)
        for label, one, other in (
            ("DoD, stage 1 - FiTv2, guided", (DOD, first), (FITV2, fitv2)),
            ("DoD, stage 2 - FiTv2, guided", (DOD, second), (FITV2, fitv2)),
            ("DoD, both stages guided - FiTv2, guided", (DOD, "3:3"), (FITV2, fitv2)),
        ):
            found = []
            if None not in (one[1], other[1]):
                found = results.differences(
                    *((runs, stage_label("fid", scales)) for runs, scales in (one, other)), step=step
                )
            scales = f"{one[1]} - {other[1]}" if found else "-"
            rows.append([f"{step * IMAGES_PER_STEP:,}", label, scales, *difference_cells(found)])
    return format_table(["images", "", "scales", *DIFFERENCE_HEADER], rows)


def class_table(results: Results) -> str:
    """Table of classifiers on the tokens."""
    rows = []
    for label, runs, step in (
        ("with classes, 8,000 steps", DOD, STEPS),
        ("with classes, 4,000 steps", DOD[0], 4000),
        ("without classes, 4,000 steps", "dod-unconditional", 4000),
        ("without classes, 8,000 steps", "dod-unconditional", STEPS),
    ):
        row = [label]
        for features in ("lem", "random_lem", "latents"):
            row += [show(results.find(runs, f"{name}_{features}", step), 1, percent=True) for name in ("top1", "knn")]
        rows.append(row)
    header = [
        f"{features}, {name}, %" for features in ("LEM", "untrained LEM", "latents") for name in ("top-1", "k-NN")
    ]
    return format_table(["DoD trained", *header], rows)


def _judges_rows(labels: Callable[[dict], list[str]]) -> tuple[list[str], list[list[str]]]:
    """The judges of [`JUDGES`], and a row of their corrected FIDs for each of the `labels` of its metrics."""
    metrics = read_results(JUDGES)["metrics"]
    judges = list(dict.fromkeys(name.split("/")[1] for name in metrics))

    def cell(judge: str, label: str) -> str:
        metric = metrics[f"fid_corrected/{judge}/{label}"]
        return show(Number(metric["value"], half_width(metric), is_of_samples=True))

    return judges, [[label, *(cell(judge, label) for judge in judges)] for label in labels(metrics)]


def judges_table(results: Results) -> str:
    """Table of sources of priors by several judges."""
    metrics, prefix = read_results(JUDGES)["metrics"], "accuracy/classes/"
    shares = {name.removeprefix(prefix): metric for name, metric in metrics.items() if name.startswith(prefix)}
    judges, rows = _judges_rows(lambda _: list(shares))
    for row in rows:
        share = shares[row[0]]
        row.append(show(Number(share["value"], half_width(share), is_of_samples=True), 1, percent=True))
    return format_table(["samples", *judges, "recognised, %"], rows)


def judges_differences_table(results: Results) -> str:
    """Table of the differences between sources of priors by several judges."""
    start = "fid_corrected/classes/"
    judges, rows = _judges_rows(
        lambda metrics: [name.removeprefix(start) for name in metrics if name.startswith(start) and " - " in name]
    )
    return format_table(["difference", *judges], rows)


def draw_plots(results: Results, folder: Path) -> None:
    """Draws `study.png` in `folder`: FID and rFID by scale, FID and losses of training by images seen."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    axes = axes.flat

    def draw(axis: plt.Axes, label: str, points: dict[float, Number | None], shift: float = 0, **style) -> None:
        # Lines are shifted against each other, so that their intervals do not cover each other.
        points = {x + shift * len(axis.containers): number for x, number in points.items() if number is not None}
        if points:
            ys, halves, _ = zip(*points.values(), strict=True)
            axis.errorbar(list(points), ys, yerr=halves, marker="o", markersize=4, capsize=3, label=label, **style)

    lines = {"stage 1, 20 steps": ("", DOD), "stage 2, 20 + 20 steps": ("1:", DOD)}
    lines |= {"stage 2 of p_s 0.25": ("1:", OFTEN), "FiTv2, 20 steps": ("", FITV2)}
    for label, (prefix, runs) in lines.items():
        points = {float(scale): results.stage(runs, "fid", prefix + scale) for scale in SCALES}
        draw(axes[0], label, points, shift=0.06, color=COLOURS[label.split(",")[0]])
    axes[0].set(xlabel="guidance scale of the last stage", ylabel="FID", title="Samples")
    for label, run, colour in (
        ("2 tokens", "dod-n2", "#56B4E9"),
        ("4", DOD[0], "#D55E00"),
        ("8", "dod-n8", "#009E73"),
        ("32, no compression", "dod-n32", "#555555"),
    ):
        points = {float(scale): results.find(run, f"rfid_scale_{scale}") for scale in SCALES}
        draw(axes[1], label, points, color=colour)
    axes[1].set(xlabel="guidance scale", ylabel="rFID", title="Real images from their priors")
    lines["stage 2 of p_s 0.25, seed 0"] = (lines.pop("stage 2 of p_s 0.25")[0], OFTEN[0])
    for label, (prefix, runs) in lines.items():
        steps = (2000, 4000, 8000)
        best = {step: results.best(runs, prefix, BRIEF, step=step) for step in steps}
        points = {
            step * IMAGES_PER_STEP / 1000: results.stage(runs, "fid", scales, step=step)
            for step, scales in best.items()
            if scales is not None
        }
        draw(axes[2], label, points, shift=5, color=COLOURS[label.split(",")[0]])
    axes[2].set(xlabel="images seen, thousands", ylabel="FID, the better of scales 3 and 4", title="Training")
    for share, run, colour in (
        ("0.25", OFTEN[0], "#009E73"),
        ("0.5", DOD[0], "#D55E00"),
        ("0.75", "dod-ps75", "#0072B2"),
        ("1", "dod-ps100", "#555555"),
    ):
        for name, style in (("without", "--"), ("with", "-")):
            images, values = results.losses(run, f"loss_{name}_prior")
            if images:
                label = f"p_s {share}, {name} a prior"
                axes[3].plot(np.array(images) / 1000, values, linestyle=style, color=colour, label=label)
    axes[3].set(xlabel="images seen, thousands", ylabel="training loss", title="What a prior tells")
    for axis in axes:
        axis.grid(alpha=0.3)
    for axis in axes[:3]:
        axis.set_ylim(bottom=0)
    for axis in axes:
        if axis.has_data():
            axis.legend(fontsize=8)
    figure.savefig(folder / "study.png", dpi=110)
    plt.close(figure)


TABLES: dict[str, Callable[[Results], str]] = {
    "stages": stages_table,
    "differences": differences_table,
    "guidance": guidance_table,
    "unconditional": unconditional_table,
    "longer": longer_table,
    "learning-rates": learning_rates_table,
    "tuning": tuning_table,
    "tasks": tasks_table,
    "reconstruction": reconstruction_table,
    "reconstruction-differences": reconstruction_differences_table,
    "tokens": tokens_table,
    "dropout": dropout_table,
    "dropout-differences": dropout_differences_table,
    "compute": compute_table,
    "training": training_table,
    "training-differences": training_differences_table,
    "training-compute": training_compute_table,
    "class": class_table,
    "grid": grid_table,
    "variants": variants_table,
    "map": map_table,
    "map-compute": map_compute_table,
    "bounds": bounds_table,
    "tuned": tuned_table,
    "tuned-differences": tuned_differences_table,
    "judges": judges_table,
    "judges-differences": judges_differences_table,
}


def fill_page(page: str, results: Results) -> str:
    """
    Puts the tables into a page.

    Args:
        page (`str`): The page, with the places of the tables.
        results (`Results`): The numbers.

    Returns:
        `str`: The page with all of its tables.

    Raises:
        `ValueError`: the page has another set of tables.
    """
    names = re.findall(r"<!-- table: ([\w-]+) -->", page)
    if sorted(names) != sorted(TABLES):
        raise ValueError(f"`page` must have places for the tables {sorted(TABLES)}, got {sorted(names)}.")
    for name, make in TABLES.items():
        start = f"<!-- table: {name} -->"
        pattern = re.escape(start) + r".*?<!-- end -->"
        page = re.sub(pattern, lambda _: f"{start}\n{make(results)}\n<!-- end -->", page, flags=re.DOTALL)  # noqa: B023
    return page


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    results = Results(RESULTS)
    PAGE.write_text(fill_page(PAGE.read_text(), results))
    draw_plots(results, IMAGES)
    draw_map(results, IMAGES)


if __name__ == "__main__":
    main()
