"""The tables and the plot of both models at their tuned rates: four judges, four sets of labels, several seeds."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log2
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from judge_priors import REAL, WRONG
from study_results import (
    DIFFERENCE_HEADER,
    TOKENS,
    WEAKER,
    Number,
    Results,
    difference_cells,
    show,
    show_at,
    stage_label,
)

from diffusers_dod.metrics.intervals import mean_interval
from diffusers_dod.results import half_width
from diffusers_dod.tables import format_table


STEP = 4000
NUM_SEEDS = 6
MIN_TRAININGS = 3  # of a point of the map: an interval of two says nothing
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
        is_weaker (`bool`): Whether a weaker model is the guide (autoguidance), or else the null class.
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

    def way(self, judge: str) -> str:
        """Name of the numbers by a `judge`, see `way_of`."""
        parts = [WEAKER] * self.is_weaker + [f"noise {self.prior_noise}"] * (self.prior_noise > 0)
        return "/".join(filter(None, [*parts, *[TOKENS] * self.has_tokens, JUDGES[judge]]))

    def runs(self, labels: str, seeds: Sequence[int]) -> tuple[str, ...]:
        """The trainings of the model with a set of `labels`."""
        return tuple(f"{labels}-{self.model}-seed{seed}" for seed in seeds)


LONG = {"model": "fitv2-long", "trained_steps": 6500}
FITV2 = Contender("FiTv2, guided", "fitv2", "")
FITV2_40 = replace(FITV2, name="FiTv2, guided, 40 steps", steps=40)
STAGE_1 = Contender("DoD, stage 1, guided", "dod", "")
STAGE_2 = Contender("DoD, stage 2", "dod", "1:")
BOTH = Contender("DoD, stage 2 after a guided stage 1", "dod", "3:")
NOISED = Contender("DoD of noised priors, stage 2", "noised-dod", "1:")
NOISED_25 = replace(NOISED, name="DoD of noised priors, stage 2, noise 0.25", prior_noise=0.25)
DRAWN = Contender("DoD, tokens drawn", "dod", "", has_tokens=True)
GUIDED = (FITV2, FITV2_40, STAGE_1, STAGE_2, BOTH, NOISED, NOISED_25, DRAWN)
AUTO_FITV2 = replace(FITV2, name="FiTv2, autoguided", is_weaker=True)
AUTO_FITV2_40 = replace(FITV2_40, name="FiTv2, autoguided, 40 steps", is_weaker=True)
LONG_FITV2 = replace(AUTO_FITV2, name="FiTv2, trained longer, autoguided", **LONG)
LONG_FITV2_40 = replace(AUTO_FITV2_40, name="FiTv2, trained longer, autoguided, 40 steps", **LONG)
AUTO_STAGE_1 = replace(STAGE_1, name="DoD, stage 1, autoguided", is_weaker=True)
AUTO_STAGE_2 = replace(STAGE_2, name="DoD, stage 2, autoguided", is_weaker=True)
AUTO_DRAWN = replace(DRAWN, name="DoD, tokens drawn, autoguided", is_weaker=True)
AUTOGUIDED = (AUTO_FITV2, AUTO_FITV2_40, LONG_FITV2, LONG_FITV2_40, AUTO_STAGE_1, AUTO_STAGE_2, AUTO_DRAWN)
CONTENDERS = (*GUIDED, *AUTOGUIDED)
COMPARISONS = (
    ("stage 2 - FiTv2, 40 steps", STAGE_2, FITV2_40),
    ("stage 2 - stage 1", STAGE_2, STAGE_1),
    ("stage 2, both guided - stage 2", BOTH, STAGE_2),
    ("stage 2 of noised priors - stage 2", NOISED, STAGE_2),
    ("stage 2 of noised priors, noise 0.25 - stage 2", NOISED_25, STAGE_2),
    ("tokens drawn - FiTv2", DRAWN, FITV2),
    ("tokens drawn - stage 1", DRAWN, STAGE_1),
    ("tokens drawn - stage 2", DRAWN, STAGE_2),
    ("stage 1 - FiTv2", STAGE_1, FITV2),
    ("autoguided: FiTv2 - FiTv2, guided", AUTO_FITV2, FITV2),
    ("autoguided: stage 2 - FiTv2, 40 steps", AUTO_STAGE_2, AUTO_FITV2_40),
    ("autoguided: stage 2 - FiTv2, trained longer, 40 steps", AUTO_STAGE_2, LONG_FITV2_40),
    ("autoguided: stage 2 - stage 1", AUTO_STAGE_2, AUTO_STAGE_1),
    ("autoguided: tokens drawn - FiTv2", AUTO_DRAWN, AUTO_FITV2),
    ("autoguided: tokens drawn - FiTv2, trained longer", AUTO_DRAWN, LONG_FITV2),
    ("autoguided: tokens drawn - stage 1", AUTO_DRAWN, AUTO_STAGE_1),
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
    The trainings with one set of labels, of the seeds of which all of some contenders have results by a judge.

    Args:
        results (`Results`): All numbers of the study.
        labels (`str`): The set, a key of [`LABELS`].
        judge (`str`): The judge, a key of [`JUDGES`].
        contenders ([`Contender`]): The contenders.
    """

    def __init__(self, results: Results, labels: str, judge: str, *contenders: Contender):
        self.results = results
        self.labels = labels
        self.judge = judge
        self.seeds = [
            seed for seed in range(NUM_SEEDS) if all(self._scales(contender, [seed]) for contender in contenders)
        ]

    def _options(self, contender: Contender) -> dict[str, Any]:
        return {"step": contender.trained_steps, "steps": contender.steps, "way": contender.way(self.judge)}

    def _scales(self, contender: Contender, seeds: Sequence[int]) -> list[str]:
        """The last scales at which a contender has results of all `seeds`."""
        runs = contender.runs(self.labels, seeds)
        if any(f"{run}-{contender.trained_steps}" not in self.results.metrics for run in runs):
            return []
        return self.results.scales(runs, contender.prefix, FID, **self._options(contender))

    def best(self, contender: Contender) -> str | None:
        """The scales of a contender with the smallest FID, in the mean over the seeds; `None` without."""
        if not self.seeds:
            return None
        runs, choices = contender.runs(self.labels, self.seeds), self._scales(contender, self.seeds)
        return self.results.best(runs, contender.prefix, choices, FID, **self._options(contender))

    def metrics(self, contender: Contender, name: str = FID) -> list[dict]:
        """A metric of a contender at its best scales, for each seed; empty if there is none."""
        scales = self.best(contender)
        if scales is None:
            return []
        label = stage_label(name, scales, contender.steps, contender.way(self.judge))
        return self.results.find_all(contender.runs(self.labels, self.seeds), label, contender.trained_steps)

    def values(self, contender: Contender) -> list[float]:
        """FID of a contender at its best scales, for each seed."""
        return [metric["value"] for metric in self.metrics(contender)]

    def difference(self, one: Contender, other: Contender) -> list[float]:
        """FID of `one` less that of `other`, each at its best scales, for each seed."""
        values = [self.values(contender) for contender in (one, other)]
        return np.subtract(*values).tolist() if all(values) else []

    def bounds(self, name: str) -> list[dict]:
        """FID of stage 2 with priors of the set `name` of judge_priors.py, for each seed that has it."""
        runs = STAGE_2.runs(self.labels, self.seeds)
        label = f"{WEAKER}/{FID}/{self.judge}/{name}"
        found = [self.results.find_all((run,), label, STEP) for run in runs]
        return [metric for metrics in found for metric in metrics]


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
            tuned = TunedResults(results, "classes", judge, contender)
            if found := tuned.metrics(contender):
                names = ("kid", "density", "coverage")
                others = [_show_mean(tuned.metrics(contender, name), None) for name in names]
                share = _show_mean(tuned.metrics(contender, "accuracy"), 1, percent=True)
                rows.append(
                    [judge, contender.name, str(len(found)), tuned.best(contender), _show_mean(found), *others, share]
                )
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
            tuned = TunedResults(results, "classes", judge, one, other)
            if found := tuned.difference(one, other):
                rows.append([judge, label, f"{tuned.best(one)} - {tuned.best(other)}", *_cells(found)])
    return format_table(["judge", "", "scales", *DIFFERENCE_HEADER], rows, text=["judge", ""])


def _cells(found: list[float]) -> list[str]:
    """The cells of a difference; one seed has no interval."""
    return difference_cells(found) if len(found) > 1 else [show(Number(found[0])), "-", f"{found[0]:.2f}"]


# What is compared at each number of labels: each way of DoD, and a FiTv2 with more sampling compute.
PAIRS = {"two stages": (AUTO_STAGE_2, AUTO_FITV2_40), "tokens drawn": (AUTO_DRAWN, AUTO_FITV2)}


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
                options = {"step": STEP, "way": contender.way(judge)}
                choices = results.scales(tuple(runs.values()), contender.prefix, FID, **options)
                scales = results.best(run, contender.prefix, choices, FID, **options)
                cells.append(show_at(results, run, scales, FID, **options))
            rows.append([label, contender.name.removeprefix("DoD, "), *cells])
    return format_table(["DoD", "samples", *JUDGES], rows, text=["samples"])


def map_table(results: Results) -> str:
    """Table of the gain of visual priors over FiTv2 with more sampling compute, by what labels say."""
    rows = []
    for labels, number in LABELS.items():
        for judge in JUDGES:
            for name, pair in PAIRS.items():
                tuned, (dod, fitv2) = TunedResults(results, labels, judge, *pair), pair
                if found := tuned.difference(dod, fitv2):
                    cells = [_show_mean(tuned.metrics(contender)) for contender in (fitv2, dod)]
                    scales = f"{tuned.best(dod)} - {tuned.best(fitv2)}"
                    bits, trainings = f"{log2(number):.1f}", str(len(found))
                    rows.append([str(number), bits, trainings, judge, name, *cells, scales, *_cells(found)])
    header = ["labels", "bits", "trainings", "judge", "prior", "FiTv2", "DoD", "scales", *DIFFERENCE_HEADER]
    return format_table(header, rows, text=["judge", "prior"])


def bounds_table(results: Results) -> str:
    """Table of DoD's sources of priors beside real images: of the same label, and of another one."""
    rows = []
    for labels, number in LABELS.items():
        for judge in JUDGES:
            tuned = TunedResults(results, labels, judge, AUTO_STAGE_2, AUTO_DRAWN)
            if any(bounds := [tuned.bounds(name) for name in (REAL, WRONG)]):
                cells = [tuned.metrics(contender) for contender in (AUTO_STAGE_2, AUTO_DRAWN)] + bounds
                rows.append([str(number), judge, str(len(bounds[0])), *map(_show_mean, cells)])
    header = [
        "labels",
        "judge",
        "trainings",
        "two stages",
        "tokens drawn",
        "real images of the label",
        "of another",
    ]
    return format_table(header, rows, text=["judge"])


def gains(results: Results, labels: str, source: str, judge: str) -> list[float]:
    """By how many per cent of FiTv2's mean FID that of DoD with a `source` of priors is below, for each seed."""
    dod, fitv2 = PAIRS.get(source, (AUTO_DRAWN, AUTO_FITV2))
    tuned = TunedResults(results, labels, judge, dod, fitv2)
    found = [metric["value"] for metric in tuned.bounds(REAL)] if source == REAL_PRIORS else tuned.values(dod)
    others = tuned.values(fitv2)
    if not found or len(found) != len(others):
        return []
    return (100 * np.subtract(others, found) / np.mean(others)).tolist()


def draw_map(results: Results, folder: Path) -> None:
    """
    Draws `label_map.png` in `folder`: by how much DoD's FID is below FiTv2's, against the bits of the label.

    Priors of real images stand beside DoD's sources. The figure takes sets of labels with at least three trainings of
    each model; if there are none it draws nothing.
    """
    points = {
        (labels, source, judge): found
        for labels, source, judge in itertools.product(LABELS, COLOURS, JUDGES)
        if len(found := gains(results, labels, source, judge)) >= MIN_TRAININGS
    }
    if not points:
        return
    figure, axes = plt.subplots(1, len(JUDGES), figsize=(12, 3.8), layout="constrained", sharey=True)
    bits = {labels: log2(number) for labels, number in LABELS.items()}
    for axis, judge in zip(axes, JUDGES, strict=True):
        for shift, (name, colour) in zip((-0.06, 0.06, 0.0), COLOURS.items(), strict=True):
            found = {labels: points[labels, name, judge] for labels in LABELS if (labels, name, judge) in points}
            if found:
                intervals = np.array([mean_interval(values) for values in found.values()])
                places = [bits[labels] + shift for labels in found]
                halves = (intervals[:, 1] - intervals[:, 0]) / 2
                style = {"marker": "o", "markersize": 5, "capsize": 3, "label": name, "color": colour}
                axis.errorbar(places, intervals.mean(axis=1), halves, **style)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(list(bits.values()), [f"{value:.1f}" for value in bits.values()])
        axis.set(xlabel="bits of the label", title=f"judge: {judge}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("FID of DoD below FiTv2's, %")
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend(title="visual prior of", fontsize=9)
    figure.savefig(folder / "label_map.png", dpi=110)
    plt.close(figure)
