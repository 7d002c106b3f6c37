# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Compares two sets of samples: the difference of each metric, first minus second, with an interval of its own.

    python -m diffusers_dod.evaluation.compare outputs/a outputs/b --reference VIRTUAL_imagenet256_labeled.npz \\
        --extractor inception --metrics fid kid precision_recall --output_file outputs/comparison.json

Both sets lose the same groups of images in turn, so what both have in common (labels, and noise if the seeds are the
same) does not widen the interval. Images, reference, extractor and metrics are those of `evaluate`.
"""

import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..command_line import run_main
from ..metrics.intervals import Jackknife, jackknife, jackknife_of_values
from ..metrics.summary import FeatureSummary
from ..metrics.table import METRICS, name_by_extractor
from ..options import option, parse_options
from ..results import as_metric
from ..tables import format_table
from .evaluate import Evaluator, JudgeOptions
from .features import launched_processes
from .images import ImageSource, open_images


MEANING = """\
The interval holds the mean difference of further sets of {number:,} samples of the same two models with 95 %.
If the models differed by the last column, 80 % of such comparisons would find it: 0 would be outside their interval.
Trained again from another seed, both models would differ further: only several trainings of each show how far."""


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Options of the command."""

    samples: str = option(is_positional=True, help="The first set of images.")
    others: str = option(is_positional=True, help="The second set, whose numbers are subtracted.")
    num_samples: int | None = option(
        None, at_least=2, help="Compare so many images of each set, drawn at random; all by default."
    )
    output_file: Path | None = option(None, writes="file", help="JSON file of the results.")
    judge: JudgeOptions

    def find_conflicts(self) -> list[str]:
        """Messages about options that do not fit each other."""
        found = []
        if self.judge.num_groups == 0:
            found.append("`num_groups` must be an integer >= 2 for a comparison, got 0.")
        if not self.judge.wanted_metrics:
            found.append("`metrics` or `reference` must be given, got neither.")
        return found


def describe_labels(first: ImageSource, second: ImageSource) -> str:
    """Says whether `first` and `second` have the same class ids at the same places, in a sentence."""
    if first.labels is None or second.labels is None:
        known = [f"{images.name} only" for images in (first, second) if images.labels is not None]
        return f"Class ids are known of {known[0] if known else 'neither set'}: they are not compared."
    if np.array_equal(first.labels, second.labels):
        return "Both sets have the same class ids, image by image."
    counts = [np.unique(images.labels, return_counts=True) for images in (first, second)]
    if all(np.array_equal(*pair) for pair in zip(*counts, strict=True)):
        return "Both sets have each class equally often, but in another order."
    return "The sets differ in their class ids: the differences are also those of the classes."


def compare_summaries(
    first: FeatureSummary, second: FeatureSummary, references: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """
    Takes the difference of each metric of two sets of samples, by the jackknife of both at once.

    Args:
        first ([`FeatureSummary`]): One set, in g >= 2 groups.
        second ([`FeatureSummary`]): The other set, in as many groups.
        references (`dict[str, Any]`): The data of the reference that each metric takes, by the name of the metric.

    Returns:
        `dict[str, dict]`: [`as_metric`] of each difference by the name of the metric, with the values `first` and
        `second`, and `detectable`, the difference that such comparisons find in 80 %.
    """
    metrics: dict[str, dict[str, Any]] = {}
    for name, reference in references.items():
        subsets = METRICS[name].subsets
        if subsets is None:
            metrics |= _leave_out_groups(name, first, second, reference)
        else:
            parts = [subsets(summary, reference) for summary in (first, second)]
            pairs = list(zip(*parts, strict=True))
            found = jackknife(pairs, lambda part: float(np.mean([a - b for a, b in part])))
            metrics[name] = _as_difference(found, *map(float, map(np.mean, parts)))
    return metrics


def _leave_out_groups(
    name: str, first: FeatureSummary, second: FeatureSummary, reference: Any
) -> dict[str, dict[str, Any]]:
    def compute(summary: FeatureSummary) -> dict[str, float]:
        found = METRICS[name].compute(summary, reference, False)
        return {key: metric["value"] for key, metric in found.items()}

    of_all = [compute(summary) for summary in (first, second)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the same that has been warned of
        rest = [[compute(summary.without(i)) for summary in (first, second)] for i in range(first.num_groups)]
    metrics = {}
    for key in of_all[0]:
        values = [found[key] for found in of_all]
        without = np.array([[found[key] for found in pair] for pair in rest])
        found = jackknife_of_values(values[0] - values[1], without[:, 0] - without[:, 1])
        metrics[key] = _as_difference(found, *values)
        if f"{key}_corrected" in METRICS:
            values = [jackknife_of_values(*pair).corrected for pair in zip(values, without.T, strict=True)]
            metrics[f"{key}_corrected"] = _as_difference(found, *values, is_corrected=True)
    return metrics


def _as_difference(found: Jackknife, first: float, second: float, is_corrected: bool = False) -> dict[str, Any]:
    value, interval = found.value, found.interval()
    if is_corrected:
        value, interval = found.corrected, found.corrected_interval()
    return as_metric(value, interval, first=first, second=second, detectable=found.detectable())


def to_table(metrics: dict[str, dict[str, Any]]) -> str:
    """Formats the differences in `metrics` as a Markdown table."""
    rows = []
    for name, metric in metrics.items():
        low, high = metric["interval"]
        numbers = [f"{metric[key]:.5g}" for key in ("first", "second")]
        numbers += [f"{metric['value']:+.4g}", f"{low:+.4g} to {high:+.4g}", f"{metric['detectable']:.3g}"]
        rows.append([name, *numbers])
    header = ["metric", "first", "second", "difference", "95 % interval", "found with 80 %"]
    return format_table(header, rows, text=["95 % interval"])


def main(argv: list[str] | None = None) -> None:
    """Runs the command; `argv` defaults to the process's arguments. Raises a `ValueError` if they do not fit."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse_options(CompareOptions, argv, __doc__)
    sets = [open_images(name, **options.judge.image_options) for name in (options.samples, options.others)]
    if len(sets[0]) != len(sets[1]) and options.num_samples is None:
        raise ValueError(
            f"`num_samples` must be given for sets of different sizes, got {len(sets[0])} images of {sets[0].name!r} "
            f"and {len(sets[1])} of {sets[1].name!r}: metrics depend on it."
        )
    with launched_processes(options.judge.device) as (device, is_main):
        options = replace(options, judge=replace(options.judge, device=device))
        evaluator = Evaluator(options.judge)
        summaries = [evaluator.summarize(images, options.num_samples) for images in sets]
        if is_main:
            _report(options, argv, evaluator, sets, summaries)


def _report(
    options: CompareOptions,
    argv: list[str],
    evaluator: Evaluator,
    sets: list[ImageSource],
    summaries: list[tuple[FeatureSummary, dict[str, Any]]],
) -> None:
    """Computes, prints and writes the differences."""
    (first, data), (second, other) = summaries
    references = {name: evaluator.prepared(name) for name in options.judge.wanted_metrics}
    metrics = name_by_extractor(compare_summaries(first, second, references), options.judge.extractor)
    labels = describe_labels(*sets)
    if len(sets[0]) != len(sets[1]):
        labels += " The sets differ in size: their images are drawn independently, not in pairs."
    print("\n\n".join([to_table(metrics), labels, MEANING.format(number=len(first.groups))]))
    if options.output_file is not None:
        data |= {"others": other["samples"], "labels": labels}
        evaluator.write(options.output_file, argv, metrics, data, task="compare")


if __name__ == "__main__":
    run_main(main)
