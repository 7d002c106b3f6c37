# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Reports all metrics of samples that extractor and reference allow, as tables in Markdown and LaTeX:

    python -m diffusers_dod.evaluation.report outputs/samples --against VIRTUAL_imagenet256_labeled.npz \\
        --extractor inception --output_file outputs/report.json

A second table has the numbers that other programs give where their conventions differ from ADM's. Each of them that
changes images takes another pass over them; `--no-conventions` leaves the table out.
"""

import sys
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..command_line import run_main
from ..metrics.extractors import Extractor, ImageFeatures, InceptionFeatures, extract, is_inception
from ..metrics.frechet import frechet_distance
from ..metrics.inception import INPUT_SIZE
from ..metrics.inception_score import RunningInceptionScore
from ..metrics.kernel_distance import SUBSET_SIZE, squared_discrepancy
from ..metrics.statistics import merge_statistics
from ..metrics.summary import FeatureSummary
from ..metrics.table import COMPUTED, METRICS, name_by_extractor
from ..options import option, parse_options
from ..records import read_npz_headers
from ..seeding import stateless_generator
from ..tables import format_latex, format_table
from .evaluate import SUFFIXES, Evaluator, JudgeOptions
from .features import compute_features, launched_processes
from .images import ImageSource, open_images


FORMATS = {"markdown": format_table, "latex": format_latex}
NUM_SPLITS = 10
NUM_SUBSETS = 100
# Name of a convention -> the metric, and how it differs.
CONVENTIONS = {
    "clean-fid": ("fid", "images resized bicubically with antialiasing, here bilinearly without, as in TensorFlow"),
    "cut off": ("fid", "pixels of samples cut off, as by ADM's sampler, here rounded: half a grey level darker"),
    "10 splits": ("is", "ten splits in random order as in torch-fidelity, here splits of 5,000"),
    "drawn subsets": ("kid", "100 subsets of 1,000 drawn anew as in torch-fidelity, here each image in one subset"),
}


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Options of the command."""

    samples: str = option(is_positional=True, help="The images to report on.")
    format: tuple[str, ...] = option(("markdown",), choices=FORMATS, is_distinct=True, help="Forms of the tables.")
    conventions: bool = option(True, help="Compute what the conventions of other programs give.")
    num_samples: int | None = option(
        None, at_least=2, help="Take so many of the images, drawn at random; all by default."
    )
    output_file: Path | None = option(None, writes="file", help="JSON file of the results.")
    judge: JudgeOptions

    def find_conflicts(self) -> list[str]:
        """Messages about options that do not fit each other."""
        return [] if self.judge.reference is not None else ["`reference` must be given, got none."]


def find_metrics(
    options: JudgeOptions, samples: ImageSource, extractor: Extractor
) -> tuple[tuple[str, ...], dict[str, str]]:
    """
    Finds the metrics that samples, extractor and reference allow.

    Args:
        options ([`JudgeOptions`]): Reference and extractor; metrics, if only some are wanted.
        samples ([`ImageSource`]): The samples.
        extractor (`Callable`): The loaded extractor.

    Returns:
        `tuple[tuple[str, ...], dict[str, str]]`: The metrics; and those that are left out, each with the reason.
    """
    black = torch.zeros(2, 3, *samples.resolution, dtype=torch.uint8, device=options.device)
    outputs = extract(extractor, black)
    names = read_npz_headers(Path(options.reference)) if options.reference.endswith(".npz") else {"arr_0": None}
    left_out = {}
    for name in COMPUTED if options.metrics is None else options.metrics:
        metric = METRICS[name]
        if getattr(outputs, metric.of) is None:
            left_out[name] = f"the extractor gives no `{metric.of}`"
        elif metric.needs == "features" and "arr_0" not in names:
            left_out[name] = "the reference has no images"
        elif metric.needs == "statistics" and "mu" in names and f"mu{SUFFIXES[metric.of]}" not in names:
            left_out[name] = f"the reference has no statistics of `{metric.of}`"
        elif name == "fid_infinity" and options.num_groups < 3:
            left_out[name] = "there are fewer than 3 groups"
        elif name == "accuracy" and not _is_classifier(options, samples, outputs.logits.shape[1]):
            left_out[name] = "the extractor is no classifier of the samples' classes, or they have none"
    wanted = COMPUTED if options.metrics is None else options.metrics
    return tuple(name for name in wanted if name not in left_out), left_out


def _is_classifier(options: JudgeOptions, samples: ImageSource, num_logits: int) -> bool:
    """Whether the extractor has a logit for each class of the samples."""
    if is_inception(options.extractor) or (samples.labels is None and samples.num_classes is None):
        return False
    fits = samples.labels is None or 0 <= samples.labels.min() <= samples.labels.max() < num_logits
    return fits and samples.num_classes in (None, num_logits)


class CutOff:
    """
    An extractor of images whose pixels are cut off where they were rounded, but for chance.

    What was rounded from x is floor(x) or floor(x) + 1, each as often: half of the pixels lose 1, the same ones of all
    images.

    Args:
        extractor (`Callable`): The extractor.
    """

    def __init__(self, extractor: Extractor):
        self.extractor = extractor

    def __call__(self, images: torch.Tensor) -> torch.Tensor | ImageFeatures:
        """The features of `images`, cut off."""
        places = torch.rand(images.shape[1:], generator=stateless_generator(0)).to(images.device) < 0.5
        return self.extractor(torch.where(places, images.clamp(min=1) - 1, images))


class CleanInception:
    """
    Inception on images that are resized as by clean-fid (Parmar et al., 2022): bicubically, with antialiasing.

    Args:
        inception ([`InceptionFeatures`]): Inception.
    """

    def __init__(self, inception: InceptionFeatures):
        self.inception = inception

    def __call__(self, images: torch.Tensor) -> ImageFeatures:
        """The features of `images`, resized."""
        side = (INPUT_SIZE, INPUT_SIZE)
        resized = F.interpolate(images.float(), side, mode="bicubic", antialias=True)
        return ImageFeatures(*self.inception.model(resized))


def _statistics(summary: FeatureSummary) -> tuple[np.ndarray, np.ndarray]:
    return merge_statistics(summary.statistics["features"]).result()


def compute_conventions(
    evaluator: Evaluator, samples: ImageSource, summary: FeatureSummary, num_samples: int | None
) -> dict[str, float]:
    """
    Computes numbers by the conventions of other programs, those of `CONVENTIONS` that the metrics allow.

    Args:
        evaluator ([`Evaluator`]): The metrics and the reference.
        samples ([`ImageSource`]): The samples.
        summary ([`FeatureSummary`]): The samples, from [`Evaluator.summarize`], with logits if there are any.
        num_samples (`int` or `None`): Number of samples that were drawn, if not all.

    Returns:
        `dict[str, float]`: A number for each convention.
    """
    found: dict[str, float] = {}
    metrics, extractor, reading = evaluator.options.wanted_metrics, evaluator.extractor, evaluator.options.reading
    if "fid" in metrics:
        reference = evaluator.reference
        # Statistics that come with images may be of more images than these, as ADM's are.
        has_own_images = reference.images is not None and not reference.data["has_statistics"]
        if isinstance(extractor, InceptionFeatures) and has_own_images:
            clean = CleanInception(extractor)
            own = compute_features(samples, clean, num_images=num_samples, **reading)
            other = compute_features(reference.images, clean, **reading)
            found["clean-fid"] = frechet_distance(*_statistics(own), *_statistics(other))
        cut_off = compute_features(samples, CutOff(extractor), num_images=num_samples, **reading)
        found["cut off"] = frechet_distance(*_statistics(cut_off), *evaluator.prepared("fid"))
    if "is" in metrics and len(summary.groups) >= NUM_SPLITS:
        logits = summary.rows["logits"]
        order = torch.randperm(len(logits), generator=stateless_generator(0)).numpy()
        scores = [RunningInceptionScore(len(logits)) for _ in range(NUM_SPLITS)]
        for score, part in zip(scores, np.array_split(order, NUM_SPLITS), strict=True):
            score.update(logits[part])
        found["10 splits"] = float(np.mean([score.result().mean for score in scores]))
    if "kid" in metrics:
        found["drawn subsets"] = _drawn_kid(summary.rows["features"], evaluator.prepared("kid"))
    return found


def _drawn_kid(samples: np.ndarray, reference: np.ndarray) -> float:
    size = min(SUBSET_SIZE, len(samples), len(reference))
    rng = np.random.default_rng(0)
    drawn = [
        [rows[rng.choice(len(rows), size, replace=False)] for rows in (samples, reference)] for _ in range(NUM_SUBSETS)
    ]
    return float(np.mean([squared_discrepancy(*pair) for pair in drawn]))


def _title(metric: str, extractor: str) -> str:
    """Title of a metric on the features of an extractor."""
    (name,) = name_by_extractor({metric: None}, extractor)
    return METRICS[name].title


def to_tables(
    metrics: dict[str, dict[str, Any]], conventions: dict[str, float], extractor: str, formats: Collection[str]
) -> list[str]:
    """
    Formats a report.

    Args:
        metrics (`dict[str, dict]`): The numbers by name.
        conventions (`dict[str, float]`): The numbers of [`compute_conventions`].
        extractor (`str`): Name of the extractor of both, which some titles depend on.
        formats (`Collection[str]`): Names among `FORMATS`.

    Returns:
        `list[str]`: The table of the metrics in each format, and that of the conventions in Markdown.
    """
    rows = []
    for name, metric in metrics.items():
        interval = "" if metric["interval"] is None else " to ".join(f"{end:.4g}" for end in metric["interval"])
        rows.append([METRICS[name].title, f"{metric['value']:.5g}", interval])
    header = ["metric", "value", "95 % interval"]
    tables = [FORMATS[name](header, rows, text=["95 % interval"]) for name in formats]
    if conventions:
        rows = [
            [name, _title(CONVENTIONS[name][0], extractor), f"{value:.5g}", CONVENTIONS[name][1]]
            for name, value in conventions.items()
        ]
        tables.append(
            format_table(["convention", "metric", "value", "what differs"], rows, ["metric", "what differs"])
        )
    return tables


def main(argv: list[str] | None = None) -> None:
    """Runs the command; `argv` defaults to the process's arguments. Raises a `ValueError` if they do not fit."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse_options(ReportOptions, argv, __doc__)
    with launched_processes(options.judge.device) as (device, is_main):
        judge = replace(options.judge, device=device)
        samples = open_images(options.samples, **judge.image_options)
        extractor = judge.load_extractor()
        names, left_out = find_metrics(judge, samples, extractor)
        evaluator = Evaluator(replace(judge, metrics=names), extractor)
        keep = {"logits"} & {METRICS[name].of for name in names}
        summary, data = evaluator.summarize(samples, options.num_samples, keep=keep)
        conventions = {}
        if options.conventions:
            conventions = compute_conventions(evaluator, samples, summary, options.num_samples)
        if is_main:
            metrics = evaluator.compute(summary, judge.num_groups > 0)
            print("\n\n".join(to_tables(metrics, conventions, judge.extractor, options.format)))
            for name, reason in left_out.items():
                print(f"\n{_title(name, judge.extractor)} is left out: {reason}.")
            if options.output_file is not None:
                data |= {"conventions": conventions, "left_out": left_out}
                evaluator.write(options.output_file, argv, metrics, data, task="report")


if __name__ == "__main__":
    run_main(main)
