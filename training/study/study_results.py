"""The numbers of docs/results/study, and how they stand in the tables of docs/study.md."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusers_dod.files import METRICS_FILE
from diffusers_dod.metrics.intervals import jackknife, mean_interval
from diffusers_dod.results import as_metric, half_width, read_results


STEPS = 8000
IMAGES_PER_STEP = 64
DEFAULT = "class_and_prior"  # the null condition of the pipeline
JUDGE = "texture"  # most results are by the classifier of textures

TOKENS = "tokens"  # the way of a token prior
WEAKER = "weaker"  # the way of a weaker model as the guide


class Number(NamedTuple):
    """A number with half of its 95 % interval: over trainings, or, with another sign, over the samples of one."""

    value: float
    half: float = 0.0
    is_of_samples: bool = False


def way_of(settings: dict[str, Any]) -> str:
    """
    Name of what sets an evaluation apart from most.

    It has its null condition, weaker model, noise of priors, token prior and judge.
    """
    parts = []
    if settings.get("null_condition", DEFAULT) != DEFAULT:
        parts.append(settings["null_condition"])
    if settings.get("guidance_model") is not None:
        parts.append(WEAKER)
    if settings.get("prior_noise"):
        parts.append(f"noise {settings['prior_noise']}")
    if settings.get("use_token_prior"):
        parts.append(TOKENS)
    judge = Path(settings.get("extractor") or JUDGE).stem.removesuffix("_features")
    return "/".join([*parts, *([judge] if judge != JUDGE else [])])


def stage_label(name: str, scales: str, steps: int = 20, way: str = "") -> str:
    """Label of a metric of the last stage, with guidance `scales` such as `1:3` and `steps` steps each."""
    stage = scales.count(":") + (2 if TOKENS in way.split("/") else 1)  # tokens take the place of stage 1
    label = f"{name}/stage-{stage}/pipeline/{steps}/euler/{scales}"
    return f"{way}/{label}" if way else label


class Results:
    """
    All numbers of the study.

    Args:
        folder (`Path`): Folder of the results, with a folder for each checkpoint.

    Raises:
        `ValueError`: a folder has results of several checkpoints. A checkpoint with a token prior is another one.
    """

    def __init__(self, folder: Path):
        self.metrics: dict[str, dict[str, dict]] = {}
        checkpoints: dict[tuple[str, bool], str] = {}
        for file in sorted(folder.glob("*/*.json")):
            results = read_results(file)
            sha256 = (results["checkpoint"] or {}).get("sha256")
            key = (file.parent.name, bool(results["settings"].get("use_token_prior")))
            if checkpoints.setdefault(key, sha256) != sha256:
                raise ValueError(
                    f"All results in `{file.parent}` must be of one checkpoint, got another in {file.name}."
                )
            way = way_of(results["settings"])
            metrics = {f"{way}/{name}" if way else name: found for name, found in results["metrics"].items()}
            self.metrics.setdefault(file.parent.name, {}).update(metrics)
        self.trainings = {
            file.parent.name: [json.loads(line) for line in file.read_text().splitlines()]
            for file in folder.glob(f"*/{METRICS_FILE}")
        }

    def group(self, runs: str | tuple[str, ...], step: int = STEPS) -> tuple[str, ...]:
        """Chooses the `runs` to show after `step` steps: all if all have numbers, else the first one."""
        runs = (runs,) if isinstance(runs, str) else runs
        return runs if all(f"{run}-{step}" in self.metrics for run in runs) else runs[:1]

    def find_all(self, runs: tuple[str, ...], name: str, step: int = STEPS) -> list[dict]:
        """Finds the metric `name` of the checkpoints of `runs` after `step` steps; empty if one of them lacks it."""
        found = [self.metrics.get(f"{run}-{step}", {}).get(name) for run in runs]
        return [] if None in found else found

    def find(self, runs: str | tuple[str, ...], name: str, step: int = STEPS) -> Number | None:
        """Mean of the metric `name` over the [`group`] of `runs`, if all of them have it."""
        found = self.find_all(self.group(runs, step), name, step)
        if not found:
            return None
        values = [metric["value"] for metric in found]
        is_spread = np.ptp(values) > 1e-9 * abs(np.mean(values))  # or it does not depend on the training
        interval = mean_interval(values) if is_spread else found[0]["interval"]
        mean = as_metric(np.mean(values), interval)
        return Number(mean["value"], half_width(mean), not is_spread)

    def losses(self, run: str, name: str, window: int = 10) -> tuple[list[int], np.ndarray]:
        """Images seen, and means of the loss `name` over `window` lines of a training; empty if it has none."""
        lines = [line for line in self.trainings.get(run, []) if line["step"] <= STEPS and line[name] is not None]
        images = [line["step"] * IMAGES_PER_STEP for line in lines][window - 1 :]
        values = np.array([line[name] for line in lines])
        return images, np.convolve(values, np.full(window, 1 / window), mode="valid") if images else values[:0]

    def stage(
        self, runs: str | tuple[str, ...], name: str, scales: str, step: int = STEPS, **options
    ) -> Number | None:
        """A metric of the samples of the last stage, see [`stage_label`]."""
        return self.find(runs, stage_label(name, scales, **options), step)

    def differences(self, one: tuple, other: tuple, step: int = STEPS) -> list[float]:
        """Difference of a metric of `one` to that of `other`, both (runs, name), for each seed."""
        values = [[metric["value"] for metric in self.find_all(runs, name, step)] for runs, name in (one, other)]
        return np.subtract(*values).tolist() if all(values) else []

    def scales(self, runs: tuple[str, ...], prefix: str, name: str = "fid", step: int = STEPS, **options) -> list[str]:
        """Scales of the last stage, after `prefix`, at which all of `runs` have the metric `name`."""
        start = stage_label(name, prefix + "*", **options).removesuffix("*")
        names = [{*self.metrics.get(f"{run}-{step}", {})} for run in runs]
        found = {name.removeprefix(start) for name in set.intersection(*names) if name.startswith(start)}
        return sorted((scales for scales in found if ":" not in scales), key=float)

    def best(
        self, runs: str | tuple[str, ...], prefix: str, choices: list[str], name: str = "fid", **options
    ) -> str | None:
        """The scales with the smallest metric `name` among `prefix` followed by each of `choices`."""
        numbers = {prefix + choice: self.stage(runs, name, prefix + choice, **options) for choice in choices}
        numbers = {scales: number[0] for scales, number in numbers.items() if number is not None}
        return min(numbers, key=numbers.get) if numbers else None


def show(number: Number | None, digits: int = 2, percent: bool = False) -> str:
    """A number as a cell of a table."""
    if number is None:
        return "-"
    value, half = (100 * part if percent else part for part in number[:2])
    sign = "±ₛ" if number.is_of_samples else "±"
    return f"{value:.{digits}f}" + (f" {sign} {half:.{digits}f}" if half else "")


def show_at(results: Results, runs: str | tuple[str, ...], scales: str | None, name: str = "fid", **options) -> str:
    """The metric `name` at guidance `scales`, which stand beside it, as a cell of a table."""
    number = None if scales is None else results.stage(runs, name, scales, **options)
    return show(number) if number is None else f"{show(number)} ({scales})"


DIFFERENCE_HEADER = ["difference of FID", "found with 80 %", "of each seed"]


def difference_cells(found: list[float]) -> list[str]:
    """The mean of differences, the one that as many seeds would have found with a probability of 80 %, and each."""
    if not found:
        return ["-"] * 3
    mean = jackknife(found, np.mean)
    number = show(Number(mean.value, half_width(as_metric(mean.value, mean.interval()))))
    values = ", ".join(f"{round(value, 2) + 0.0:.2f}" for value in found)  # no -0.00
    return [number, f"{mean.detectable():.2f}", values]
