"""The tables and the plot of both models at their tuned rates: four judges, four sets of labels, several seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from judge_priors import REAL, WRONG
from study_results import DIFFERENCE_HEADER, TOKENS, Number, Results, difference_cells, show, show_at, stage_label

from diffusers_dod.metrics.intervals import mean_interval
from diffusers_dod.results import half_width
from diffusers_dod.tables import format_table


STEP = 4000
NUM_SEEDS = 6
FID = "fid_corrected"
# By the name of a judge: what its numbers are called, see `way_of`. The first one was trained on the 12 classes.
JUDGES = {"classes": "", "attributes": "attribute", "ImageNet": "imagenet", "spectrum": "spectrum"}
LABELS = {"none": 1, "kinds": 3, "classes": 12, "hues": 72}  # numbers of labels
REAL_PRIORS = "real images"
COLOURS = {"two stages": "#D55E00", "tokens drawn": "#0072B2", REAL_PRIORS: "#888888"}  # of the sources of priors


@dataclass(frozen=True)
class Contender:
    """
    A way to draw samples.

    Args:
        name (`str`): Name of the way in tables.
        model (`str`): `dod` or `fitv2`, as the names of runs have it.
        prefix (`str`): Scales of the stages before the last one, such as `1:`.
        steps (`int`): Steps of each stage.
        trained_steps (`int`): Steps of the training.
        is_weaker (`bool`): Whether its only stage is guided by a weaker model where there are no labels.
        has_tokens (`bool`): Whether a token prior takes the place of stage 1.
        prior_noise (`float`): Level of the noise that the LEM sees in samples.
    """

    name: str
    model: str
    prefix: str
    steps: int = 20
    trained_steps: int = STEP
    is_weaker: bool = False
    has_tokens: bool = False
    prior_noise: float = 0.0

    def way(self, labels: str, judge: str) -> str:
        """Name of the numbers by a `judge` with a set of `labels`, see `way_of`."""
        parts = ["weaker"] * (self.is_weaker and labels == "none") + [TOKENS] * self.has_tokens
        parts += [f"noise {self.prior_noise}"] * (self.prior_noise > 0)
        return "/".join(filter(None, [*parts, JUDGES[judge]]))

    def runs(self, labels: str, seeds: Sequence[int]) -> tuple[str, ...]:
        """The trainings of the model with a set of `labels`."""
        return tuple(f"{labels}-{self.model}-seed{seed}" for seed in seeds)

    def is_in(self, results: Results, labels: str, seed: int) -> bool:
        """Whether there are results of its training with a set of `labels` and a `seed`."""
        return f"{self.runs(labels, [seed])[0]}-{self.trained_steps}" in results.metrics


LONG = {"model": "fitv2-long", "trained_steps": 6000}
FITV2, FITV2_40, LONG_FITV2, LONG_FITV2_40, STAGE_1, STAGE_2, BOTH, NOISED, NOISED_25, DRAWN = CONTENDERS = (
    Contender("FiTv2, guided", "fitv2", "", is_weaker=True),
    Contender("FiTv2, guided, 40 steps", "fitv2", "", steps=40, is_weaker=True),
    Contender("FiTv2, trained longer", prefix="", **LONG),
    Contender("FiTv2, trained longer, 40 steps", prefix="", steps=40, **LONG),
    Contender("DoD, stage 1, guided", "dod", "", is_weaker=True),
    Contender("DoD, stage 2", "dod", "1:"),
    Contender("DoD, stage 2 after a guided stage 1", "dod", "3:"),
    Contender("DoD of noised priors, stage 2", "noised-dod", "1:"),
    Contender("DoD of noised priors, stage 2, noise 0.25", "noised-dod", "1:", prior_noise=0.25),
    Contender("DoD, tokens drawn", "dod", "", has_tokens=True),
)
COMPARISONS = (
    ("stage 2 - FiTv2, 40 steps", STAGE_2, FITV2_40),
    ("stage 2 - FiTv2, trained longer, 40 steps", STAGE_2, LONG_FITV2_40),
    ("stage 2 - stage 1", STAGE_2, STAGE_1),
    ("stage 2, both guided - stage 2", BOTH, STAGE_2),
    ("stage 2 of noised priors - stage 2", NOISED, STAGE_2),
    ("stage 2 of noised priors, noise 0.25 - stage 2", NOISED_25, STAGE_2),
    ("tokens drawn - FiTv2", DRAWN, FITV2),
    ("tokens drawn - FiTv2, trained longer", DRAWN, LONG_FITV2),
    ("tokens drawn - stage 1", DRAWN, STAGE_1),
    ("tokens drawn - stage 2", DRAWN, STAGE_2),
    ("stage 1 - FiTv2", STAGE_1, FITV2),
)

VARIANTS = {
    "p_s 0.5, 4 tokens": "dod-stable-4e-3-lem5e-4",
    "p_s 0.25": "dod-stable-ps25",
    "p_s 0.75": "dod-stable-ps75",
    "2 tokens": "dod-stable-n2",
    "8 tokens": "dod-stable-n8",
}


class TunedResults:
    """
    The trainings with one set of labels, of the seeds of which both models have results.

    Args:
        results (`Results`): All numbers of the study.
        labels (`str`): The set, a key of [`LABELS`].
        contenders ([`Contender`]): More that must have results.
    """

    def __init__(self, results: Results, labels: str, *contenders: Contender):
        self.results = results
        self.labels = labels
        needed = (STAGE_2, FITV2, *contenders)
        self.seeds = [seed for seed in range(NUM_SEEDS) if all(one.is_in(results, labels, seed) for one in needed)]

    def best(self, contender: Contender, judge: str) -> str | None:
        """The scales of a contender with the smallest FID by a judge, in the mean over the seeds; `None` without."""
        if not self.seeds:
            return None
        runs = contender.runs(self.labels, self.seeds)
        options = {"step": contender.trained_steps, "steps": contender.steps}
        options["way"] = contender.way(self.labels, judge)
        choices = self.results.scales(runs, contender.prefix, FID, **options)
        return self.results.best(runs, contender.prefix, choices, FID, **options)

    def metrics(self, contender: Contender, judge: str, name: str = FID) -> list[dict]:
        """A metric of a contender at its best scales by a judge, for each seed; empty if there is none."""
        scales = self.best(contender, judge)
        if scales is None:
            return []
        label = stage_label(name, scales, contender.steps, contender.way(self.labels, judge))
        return self.results.find_all(contender.runs(self.labels, self.seeds), label, contender.trained_steps)

    def values(self, contender: Contender, judge: str) -> list[float]:
        """FID of a contender at its best scales by a judge, for each seed."""
        return [metric["value"] for metric in self.metrics(contender, judge)]

    def bounds(self, judge: str, name: str) -> list[dict]:
        """FID of stage 2 with priors of the set `name` of judge_priors.py, for each seed; empty if there is none."""
        return self.results.find_all(STAGE_2.runs(self.labels, self.seeds), f"{FID}/{judge}/{name}", STEP)

    def gains(self, source: str, judge: str) -> list[float]:
        """By how many per cent of FiTv2's mean FID that of DoD is below FiTv2's, for each seed."""
        if source == REAL_PRIORS:
            fitv2, found = FITV2, [metric["value"] for metric in self.bounds(judge, REAL)]
        else:
            dod, fitv2 = PAIRS[source]
            found = self.values(dod, judge)
        others = self.values(fitv2, judge)
        return (100 * np.subtract(others, found) / np.mean(others)).tolist() if found and others else []

    def difference(self, one: Contender, other: Contender, judge: str) -> list[float]:
        """FID of `one` less that of `other`, each at its best scales, for each seed."""
        values = [self.values(contender, judge) for contender in (one, other)]
        return np.subtract(*values).tolist() if all(values) else []


def _show_mean(metrics: list[dict], digits: int | None = 2, percent: bool = False) -> str:
    """The mean over trainings with Student's interval, or the number of one with that of its samples."""
    if not metrics:
        return show(None)
    if digits is None:  # three that count
        digits = int(np.clip(2 - np.floor(np.log10(np.abs(metrics[0]["value"]) + 1e-9)), 0, 4))
    if len(metrics) == 1:
        number = Number(metrics[0]["value"], half_width(metrics[0]), is_of_samples=True)
    else:
        values = [metric["value"] for metric in metrics]
        low, high = mean_interval(values)
        number = Number(np.mean(values), (high - low) / 2)
    return show(number, digits, percent)


def tuned_table(results: Results) -> str:
    """Table of the ways to draw samples of 12 classes, by judge."""
    rows = []
    for judge in JUDGES:
        for contender in CONTENDERS:
            tuned = TunedResults(results, "classes", contender)
            if found := tuned.metrics(contender, judge):
                names = ("kid", "density", "coverage")
                others = [_show_mean(tuned.metrics(contender, judge, name), None) for name in names]
                share = _show_mean(tuned.metrics(contender, judge, "accuracy"), 1, percent=True)
                scales, trainings = tuned.best(contender, judge), str(len(found))
                rows.append([judge, contender.name, trainings, scales, _show_mean(found), *others, share])
    return format_table(
        ["judge", "samples", "trainings", "scales", "FID, corrected", "KID", "density", "coverage", "recognised, %"],
        rows,
        text=["judge", "samples"],
    )


def tuned_differences_table(results: Results) -> str:
    """Table of the differences between them, seed by seed."""
    rows = []
    for judge in JUDGES:
        for label, one, other in COMPARISONS:
            tuned = TunedResults(results, "classes", one, other)
            if found := tuned.difference(one, other, judge):
                rows.append([judge, label, f"{tuned.best(one, judge)} - {tuned.best(other, judge)}", *_cells(found)])
    return format_table(["judge", "", "scales", *DIFFERENCE_HEADER], rows, text=["judge", ""])


def _cells(found: list[float]) -> list[str]:
    """The cells of a difference; one seed has no interval."""
    return difference_cells(found) if len(found) > 1 else [show(Number(found[0])), "-", f"{found[0]:.2f}"]


# What is compared at each number of labels: each way of DoD, and FiTv2 with as much sampling compute.
PAIRS = {"two stages": (STAGE_2, FITV2_40), "tokens drawn": (DRAWN, FITV2)}


def grid_table(results: Results) -> str:
    """Table of guidance scales of the trainings that chose them, by judge."""
    rows, scales = [], ["1", "2", "3", "4", "5.5"]
    fitv2, dod = "fitv2-stable-4e-3", "dod-stable-4e-3-lem5e-4"
    for label, run, prefix in (
        ("FiTv2", fitv2, ""),
        ("DoD, stage 1", dod, ""),
        ("DoD, stage 2", dod, "1:"),
        ("DoD, stage 2 after a guided stage 1", dod, "3:"),
    ):
        for scale in scales:
            numbers = [results.stage(run, FID, prefix + scale, STEP, way=judge) for judge in JUDGES.values()]
            if any(numbers):
                rows.append([label, prefix + scale, *map(show, numbers)])
    return format_table(["", "scales", *JUDGES], rows)


def variants_table(results: Results) -> str:
    """Table of other p_s and numbers of tokens at the chosen rates, one training each at its best scales, by judge."""
    runs = {label: run for label, run in VARIANTS.items() if f"{run}-{STEP}" in results.metrics}
    rows = []
    for label, run in runs.items():
        for contender in (STAGE_1, STAGE_2, DRAWN):
            cells = []
            for judge in JUDGES:
                options = {"step": STEP, "way": contender.way("classes", judge)}
                choices = results.scales(tuple(runs.values()), contender.prefix, FID, **options)
                scales = results.best(run, contender.prefix, choices, FID, **options)
                cells.append(show_at(results, run, scales, FID, **options))
            rows.append([label, contender.name.removeprefix("DoD, "), *cells])
    return format_table(["DoD", "samples", *JUDGES], rows, text=["samples"])


def map_table(results: Results) -> str:
    """Table of the gain of visual priors over FiTv2 with as much sampling compute, by what labels say."""
    rows = []
    for labels, number in LABELS.items():
        tuned = TunedResults(results, labels)
        for judge in JUDGES:
            for name, (dod, fitv2) in PAIRS.items():
                if found := tuned.difference(dod, fitv2, judge):
                    cells = [_show_mean(tuned.metrics(contender, judge)) for contender in (fitv2, dod)]
                    scales = f"{tuned.best(dod, judge)} - {tuned.best(fitv2, judge)}"
                    bits, trainings = f"{log2(number):.1f}", str(len(found))
                    rows.append([str(number), bits, trainings, judge, name, *cells, scales, *_cells(found)])
    header = ["labels", "bits", "trainings", "judge", "prior", "FiTv2", "DoD", "scales", *DIFFERENCE_HEADER]
    return format_table(header, rows, text=["judge", "prior"])


def bounds_table(results: Results) -> str:
    """Table of DoD's sources of priors beside real images: of the same label, and of another one."""
    rows = []
    for labels, number in LABELS.items():
        tuned = TunedResults(results, labels)
        for judge in JUDGES:
            bounds = [tuned.bounds(judge, name) for name in (REAL, WRONG)]
            if any(bounds):
                cells = [tuned.metrics(contender, judge) for contender in (STAGE_2, DRAWN)] + bounds
                rows.append([str(number), judge, *map(_show_mean, cells)])
    header = ["labels", "judge", "two stages", "tokens drawn", "real images of the label", "of another label"]
    return format_table(header, rows, text=["judge"])


def draw_map(results: Results, folder: Path) -> None:
    """
    Draws `label_map.png` in `folder`: by how much DoD's FID is below FiTv2's, against the bits of the label.

    Priors of real images are a bound: no source of priors is expected to be better. The figure takes sets of labels
    with at least two trainings of each model; if there are none it draws nothing.
    """
    if not any(len(TunedResults(results, labels).seeds) > 1 for labels in LABELS):
        return
    figure, axes = plt.subplots(1, len(JUDGES), figsize=(12, 3.8), layout="constrained", sharey=True)
    bits = {labels: log2(number) for labels, number in LABELS.items()}
    for axis, judge in zip(axes, JUDGES, strict=True):
        for shift, (name, colour) in zip((-0.06, 0.06, 0.0), COLOURS.items(), strict=True):
            points = []
            for labels in LABELS:
                gains = TunedResults(results, labels).gains(name, judge)
                if len(gains) > 1:
                    low, high = mean_interval(gains)
                    points.append((bits[labels] + shift, np.mean(gains), (high - low) / 2))
            if points:
                xs, ys, halves = zip(*points, strict=True)
                axis.errorbar(xs, ys, halves, marker="o", markersize=5, capsize=3, label=name, color=colour)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(list(bits.values()), [f"{value:.1f}" for value in bits.values()])
        axis.set(xlabel="bits of the label", title=f"judge: {judge}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("FID of DoD below FiTv2's, %")
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend(title="visual prior of", fontsize=9)
    figure.savefig(folder / "label_map.png", dpi=110)
    plt.close(figure)
