# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Computes FID, sFID, Inception Score, precision and recall as ADM defines them, KID, density and
coverage, and class accuracy:

    python -m diffusers_dod.evaluation.evaluate outputs/samples.npz --reference VIRTUAL_imagenet256_labeled.npz \\
        --extractor inception --metrics fid sfid is precision_recall --output_file outputs/evaluation.json

Samples and reference are `*.npz` with `arr_0`, a folder of the sampler or of PNG files,
`textures:<number>:<seed>`, or, with `--resolution`, a folder with a sub-folder per class or a data set of the Hub.
A reference with `mu` and `sigma` is taken as statistics, and its images serve the metrics of all features.
`accuracy` is the share of samples whose largest logit is that of their own class.
`--save_statistics` writes statistics of the samples:

    python -m diffusers_dod.evaluation.evaluate path/to/imagenet/train --resolution 256 --extractor inception \\
        --save_statistics imagenet256.npz
"""

import sys
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..command_line import run_main
from ..data.labelled_images import MAX_WORKERS
from ..files import file_sha256
from ..metrics.extractors import (
    Extractor,
    code_sha256,
    extract,
    extractor_sha256,
    is_inception,
    load_extractor,
    load_statistics,
)
from ..metrics.statistics import merge_statistics
from ..metrics.summary import FeatureSummary
from ..metrics.table import COMPUTED, METRICS, name_by_extractor
from ..options import option, parse_options
from ..records import read_npz_headers
from ..results import write_results
from ..tables import format_table
from .feature_cache import FeatureCache
from .features import SUFFIXES, compute_features, launched_processes, save_statistics
from .images import ImageSource, draw_indices, open_images
from .inspection import accuracy_by_class, draw_nearest, recall_by_class
from .options import device_option


PUBLISHED_NUM_SAMPLES = 50_000
MAX_NAME_BYTES = 16384  # of a name of an extractor, in an npz file


def outputs_for(metrics: Sequence[str], needs: str) -> set[str]:
    """Outputs of the extractor whose `needs`, `"statistics"` or `"features"`, the `metrics` take of a reference."""
    return {METRICS[metric].of for metric in metrics if METRICS[metric].needs == needs}


class Reference:
    """
    The reference of samples: statistics, images or both, checked against the metrics that need them.

    Args:
        name (`str`): Name for [`open_images`], or an npz file of statistics.
        metrics (`Sequence[str]`): The metrics that need the reference.
        extractor (`str`): Name of the extractor, to be compared with that of the statistics.
        extractor_sha256 (`str`): Hash of the extractor.
        options (`Any`): Arguments of [`open_images`].

    Raises:
        `OSError`: a file cannot be read.
        `ValueError`: the reference lacks data that a metric needs.
    """

    def __init__(self, name: str, metrics: Sequence[str], extractor: str, extractor_sha256: str, **options: Any):
        self.metrics = metrics
        self.statistics: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        #: Features of all images, by output of the extractor, where metrics need them.
        self.rows: dict[str, np.ndarray] = {}
        self._prepared: dict[str, Any] = {}
        self.images: ImageSource | None = None
        #: Class ids of the images, once they are read, if they have any.
        self.labels: np.ndarray | None = None
        #: A file that keeps the statistics for other processes with the same images and extractor.
        self.cache: Path | None = None
        self._extractor = (extractor, extractor_sha256)
        names = _read_headers(name) if name.endswith(".npz") else {}
        has_statistics = "mu" in names or "sigma" in names
        if has_statistics:
            identity = {"extractor_sha256": extractor_sha256, "extractor": extractor}
            for key in [key for key in identity if key in names][:1]:
                shape, kind = names[key]
                if shape != () or kind.kind != "U" or kind.itemsize > MAX_NAME_BYTES:
                    raise ValueError(f"`reference` must have a text as `{key}`, got {name} with {shape} of {kind}.")
                with np.load(name) as file:
                    found = str(file[key])
                if found != identity[key]:
                    raise ValueError(
                        f"`reference` must be of the extractor {extractor!r} with `{key}` = {identity[key]!r}, "
                        f"got {name} of {found!r}."
                    )
            for features in outputs_for(metrics, "statistics"):
                self.statistics[features] = load_statistics(Path(name), SUFFIXES[features], "reference")
        of_images = [metric for metric in metrics if METRICS[metric].needs == "features"]
        if of_images and has_statistics and "arr_0" not in names:
            raise ValueError(
                f"`reference` must hold images for {' and '.join(f'`{metric}`' for metric in of_images)}, "
                f"got {name} with {sorted(names)}."
            )
        if not has_statistics or of_images:
            self.images = open_images(name, **options)
        self.data = {"name": name, "sha256": file_sha256(Path(name))} if self.images is None else self.images.data
        self.data = {**self.data, "has_statistics": has_statistics}

    def read(self, extractor: Extractor, **reading: Any) -> None:
        """
        Computes the features that metrics need, unless that has been done.

        Args:
            extractor (`Callable`): Images (B, 3, H, W) in uint8 -> features (B, d) or [`ImageFeatures`].
            reading (`Any`): Further arguments of [`compute_features`].
        """
        wanted, keep = outputs_for(self.metrics, "statistics"), outputs_for(self.metrics, "features")
        if keep <= self.rows.keys() and wanted <= self.statistics.keys():
            return
        cache = None if keep else self.cache
        if cache is not None and cache.exists():
            for features in wanted:
                self.statistics[features] = load_statistics(cache, SUFFIXES[features], "reference")
            return
        summary = compute_features(self.images, extractor, keep=keep, **reading)
        self.rows, self.labels = summary.rows, summary.labels
        if cache is not None:
            save_statistics(cache, summary, *self._extractor)
        for features in wanted - self.statistics.keys():
            self.statistics[features] = merge_statistics(summary.statistics[features]).result()

    def prepare(self, name: str, device: torch.device | str) -> Any:
        """
        Prepares what a metric takes of the reference after [`Reference.read`], unless that has been done.

        Args:
            name (`str`): Name of the metric.
            device (`torch.device` or `str`): Device that may compute it.

        Returns:
            `Any`: What `compute` of [`Metric`] takes; `None` if it takes nothing.
        """
        metric = METRICS[name]
        if metric.needs is not None and name not in self._prepared:
            data = (self.statistics if metric.needs == "statistics" else self.rows)[metric.of]
            has_float64 = torch.device(device).type != "mps"
            is_ready = metric.prepare is None
            self._prepared[name] = data if is_ready else metric.prepare(data, device if has_float64 else "cpu")
        return self._prepared.get(name)


def _read_headers(path: str) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    try:
        return read_npz_headers(Path(path))
    except ValueError as error:
        raise ValueError(f"`reference` must be an npz file: {error}") from error


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """Metrics, and what they need."""

    reference: str | None = option(
        None, aliases=("against",), help="Images or statistics that the samples are compared with."
    )
    extractor: str = option(
        help="`inception`, `inception:path/weights.pth`, `dinov2`, `transformers:FOLDER_OR_ID`, "
        "`package.module:attribute`, `file.py:attribute`, or a TorchScript file."
    )
    trust_extractor: bool = option(False, help="Let a TorchScript file run what it holds.")
    metrics: tuple[str, ...] | None = option(
        None, choices=COMPUTED, is_distinct=True, help="`fid` by default, if there is a reference."
    )
    resolution: int | None = option(None, at_least=1, help="Side in pixels of images that are cropped or rendered.")
    image_column: str = option("image", help="Column of the images of a data set.")
    label_column: str = option("label", help="Column of its class ids.")
    batch_size: int = option(64, at_least=1, help="Images at a time.")
    device: str = device_option()
    dataloader_num_workers: int | None = option(
        None,
        at_least=0,
        at_most=MAX_WORKERS,
        help="Processes that read images; by default a GPU's share of the cores, up to 8, and none without one.",
    )
    cache_dir: Path | None = option(
        None, writes="folder", help="Where features are kept for other calls with the same images and extractor."
    )
    num_groups: int = option(
        10,
        at_least=0,
        help="Groups of the jackknife that gives the intervals of FID and sFID; 0 for no interval of any metric.",
    )

    @property
    def wanted_metrics(self) -> tuple[str, ...]:
        """The metrics to compute: those that are given, or `fid` if there is a reference."""
        if self.metrics is None:
            return () if self.reference is None else ("fid",)
        return self.metrics

    def load_extractor(self) -> Extractor:
        """Loads the extractor onto its device, see [`load_extractor`]."""
        return load_extractor(self.extractor, self.trust_extractor, self.device, "extractor")

    @property
    def reading(self) -> dict[str, Any]:
        """Arguments of [`compute_features`], without the cache."""
        return {
            "batch_size": self.batch_size,
            "device": self.device,
            "num_workers": self.dataloader_num_workers,
        }

    @property
    def image_options(self) -> dict[str, Any]:
        """Arguments of [`open_images`]."""
        return {name: getattr(self, name) for name in ("resolution", "image_column", "label_column")}

    def find_conflicts(self) -> list[str]:
        """Messages about options that do not fit each other."""
        found, metrics = [], self.wanted_metrics
        if self.num_groups == 1:
            found.append("`num_groups` must be 0 or an integer >= 2, got 1.")
        if "fid_infinity" in metrics and self.num_groups < 3:
            found.append(f"`num_groups` must be an integer >= 3 for `fid_infinity`, got {self.num_groups}.")
        needs_reference = any(METRICS[metric].needs is not None for metric in metrics)
        if needs_reference and self.reference is None:
            found.append(f"`reference` must be given for the metrics {list(metrics)}, got none.")
        if not needs_reference and self.reference is not None:
            found.append(f"`reference` must not be given for the metrics {list(metrics)}, got {self.reference!r}.")
        if "accuracy" in metrics and is_inception(self.extractor):
            found.append(
                "`extractor` must be a classifier of the samples' classes for `accuracy`, "
                f"got {self.extractor!r}, whose 1008 logits are those of other classes."
            )
        return found


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Options of the command."""

    samples: str = option(is_positional=True, help="The images to evaluate.")
    num_samples: int | None = option(
        None, at_least=2, help="Evaluate so many of the images, drawn at random; all by default."
    )
    output_file: Path | None = option(None, writes="file", help="JSON file of the results.")
    save_statistics: Path | None = option(
        None, writes="file", suffix=".npz", help="npz file of the statistics of the samples."
    )
    nearest_grid: Path | None = option(
        None,
        writes="file",
        suffix=".png",
        help="PNG file of samples beside their nearest reference images, those with the nearest first; with "
        "`authenticity`.",
    )
    worst_classes: int | None = option(
        None,
        at_least=1,
        help="Show so many classes with the least `accuracy`, or else `recall`.",
    )
    judge: JudgeOptions

    def find_conflicts(self) -> list[str]:
        """Messages about options that do not fit each other."""
        found, metrics = [], self.judge.wanted_metrics
        if not metrics and self.save_statistics is None:
            found.append("`metrics` or `save_statistics` must be given, got neither.")
        if self.nearest_grid is not None and "authenticity" not in metrics:
            found.append(f"`metrics` must have `authenticity` for `nearest_grid`, got {list(metrics)}.")
        if self.worst_classes is not None and not {"accuracy", "precision_recall"} & set(metrics):
            found.append(
                f"`metrics` must have `accuracy` or `precision_recall` for `worst_classes`, got {list(metrics)}."
            )
        return found


class Evaluator:
    """
    Evaluates any number of sets of samples. The extractor is loaded once, and the reference computed once.

    Args:
        options ([`JudgeOptions`]): Metrics, reference and extractor.
        extractor (`Callable`, *optional*): The extractor if it has been loaded.

    Raises:
        `ImportError`: the extractor needs a package that is not installed.
        `OSError`: a file cannot be read.
        `ValueError`: reference, extractor and metrics do not fit each other.
    """

    def __init__(self, options: JudgeOptions, extractor: Extractor | None = None):
        self.options = options
        self.extractor = options.load_extractor() if extractor is None else extractor
        #: Hash of the extractor, see [`extractor_sha256`].
        self.extractor_sha256 = extractor_sha256(options.extractor, self.extractor)
        self.reference = None
        if options.reference is not None:
            identity = (options.extractor, self.extractor_sha256)
            self.reference = Reference(options.reference, options.wanted_metrics, *identity, **options.image_options)

    def evaluate(
        self, samples: ImageSource, num_samples: int | None = None, statistics_file: Path | None = None
    ) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        """
        Computes the metrics of samples.

        Args:
            samples ([`ImageSource`]): The samples.
            num_samples (`int`, *optional*): Number of samples, drawn by [`draw_indices`]. By default all.
            statistics_file (`Path`, *optional*): File for their statistics, see [`save_statistics`].

        Returns:
            `tuple[dict, dict]`: An [`as_metric`] for each number, by name; and the identity of the data.

        Raises:
            `OSError`: a file cannot be read.
            `ValueError`: samples, reference, extractor and metrics do not fit each other, or features are not finite.
        """
        summary, data = self.summarize(samples, num_samples)
        if statistics_file is not None:
            save_statistics(statistics_file, summary, self.options.extractor, self.extractor_sha256)
        return self.compute(summary, self.options.num_groups > 0), data

    def summarize(
        self, samples: ImageSource, num_samples: int | None = None, keep: Collection[str] = ()
    ) -> tuple[FeatureSummary, dict[str, Any]]:
        """
        Computes the features of samples, and those of the reference unless that has been done.

        Args:
            samples ([`ImageSource`]): The samples.
            num_samples (`int`, *optional*): Number of samples, drawn by [`draw_indices`]. By default all.
            keep (`Collection[str]`, defaults to `()`): Further outputs of the extractor to keep for all samples.

        Returns:
            `tuple[FeatureSummary, dict]`: The summary, and the identity of the data.

        Raises:
            `OSError`: a file cannot be read.
            `ValueError`: samples, reference, extractor and metrics do not fit each other, or features are not finite.
        """
        options, reference = self.options, self.reference
        num_samples = len(samples) if num_samples is None else num_samples
        minimum = max(
            4 if options.num_groups == 2 else 2, options.num_groups
        )  # without any one group, two samples are left
        if not minimum <= num_samples <= len(samples):
            raise ValueError(
                f"`num_samples` must be an integer from {minimum}, for `num_groups` {options.num_groups}, to the "
                f"{len(samples)} images of {samples.name!r}, got {num_samples}."
            )
        self.check(samples.resolution, samples.num_classes, samples.labels)
        if num_samples < PUBLISHED_NUM_SAMPLES and outputs_for(options.wanted_metrics, "statistics"):
            warnings.warn(
                f"FID of {num_samples:,} samples is larger than that of {PUBLISHED_NUM_SAMPLES:,}, which published "
                "ones have: compare it with those of as many samples only.",
                stacklevel=2,
            )
        reading = options.reading
        if options.cache_dir is not None:
            identity = f"{self.extractor_sha256} {code_sha256(options.extractor)}"
            reading["cache"] = FeatureCache(options.cache_dir, identity)
        keep, num_groups = outputs_for(options.wanted_metrics, "features") | set(keep), max(1, options.num_groups)
        summary = compute_features(
            samples, self.extractor, num_images=num_samples, num_groups=num_groups, keep=keep, **reading
        )
        if reference is not None:
            reference.read(self.extractor, **reading)
        data = {
            "name": samples.name,
            "num_samples": num_samples,
            "selection": "all" if num_samples == len(samples) else f"at random out of {len(samples)}",
            "samples": samples.data,
            "reference": None if reference is None else reference.data,
        }
        return summary, data

    def compute(self, summary: FeatureSummary, has_intervals: bool) -> dict[str, dict[str, Any]]:
        """
        Computes the metrics of a summary from [`Evaluator.summarize`], or of a part of its groups.

        Args:
            summary ([`FeatureSummary`]): The samples.
            has_intervals (`bool`): Whether the numbers get intervals.

        Returns:
            `dict[str, dict]`: An [`as_metric`] for each number, by name.
        """
        metrics: dict[str, dict[str, Any]] = {}
        for name in self.options.wanted_metrics:
            metrics |= METRICS[name].compute(summary, self.prepared(name), has_intervals)
        return name_by_extractor(metrics, self.options.extractor)

    def prepared(self, name: str) -> Any:
        """The data of the reference that the metric `name` takes; `None` if it takes none."""
        return None if self.reference is None else self.reference.prepare(name, self.options.device)

    def check(
        self, resolution: tuple[int, int], num_classes: int | None = None, labels: np.ndarray | None = None
    ) -> None:
        """
        Raises unless samples, reference, extractor and metrics fit each other.

        Args:
            resolution (`tuple[int, int]`): Height and width of the samples in pixels.
            num_classes (`int`, *optional*): Number of classes, if it is known.
            labels (`np.ndarray` of shape `(n,)`, *optional*): Class ids, if they are known.

        Raises:
            `ValueError`: they do not fit.
        """
        options, reference = self.options, self.reference
        if reference is not None and reference.images is not None:
            if tuple(reference.images.resolution) != tuple(resolution):
                raise ValueError(
                    f"`reference` must have images of {tuple(resolution)} pixels as the samples have, "
                    f"got {tuple(reference.images.resolution)}."
                )
        black = torch.zeros(2, 3, *resolution, dtype=torch.uint8, device=options.device)
        found = extract(self.extractor, black)
        for metric in options.wanted_metrics:
            name = METRICS[metric].of
            if getattr(found, name) is None:
                raise ValueError(
                    f"`extractor` must give `{name}` for `{metric}`, got none from {options.extractor!r}."
                )
        for name, (mean, _) in ({} if reference is None else reference.statistics).items():
            number = getattr(found, name).shape[1]
            if number != len(mean):
                raise ValueError(
                    f"`extractor` must give {len(mean)} `{name}` as `reference` has them, got {number} from "
                    f"{options.extractor!r}."
                )
        if "accuracy" in options.wanted_metrics:
            number = found.logits.shape[1]
            if labels is None and num_classes is None:
                raise ValueError("`samples` must have class ids for `accuracy`, got none.")
            if num_classes not in (None, number):
                raise ValueError(
                    f"`extractor` must give `logits` of the {num_classes} classes of the samples for `accuracy`, "
                    f"got {number} from {options.extractor!r}."
                )
            if labels is not None and not 0 <= labels.min() <= labels.max() < number:
                raise ValueError(
                    f"`samples` must have class ids in [0, {number - 1}] for `accuracy`, of which "
                    f"{options.extractor!r} gives logits, got {labels.min()} to {labels.max()}."
                )

    def write(
        self,
        path: Path,
        argv: list[str],
        metrics: dict[str, dict[str, Any]],
        data: dict[str, Any],
        task: str = "evaluate",
    ) -> dict[str, Any]:
        """
        Writes results.

        Args:
            path (`Path`): The JSON file.
            argv (`list[str]`): The arguments with which the command computes them.
            metrics (`dict`): Numbers from [`Evaluator.evaluate`].
            data (`dict`): Identity of the data from [`Evaluator.evaluate`].
            task (`str`, defaults to `"evaluate"`): Name of the command, see [`write_results`].

        Returns:
            `dict`: The content of the file, see [`write_results`].
        """
        names = ("extractor", "metrics", "batch_size", "num_groups", "resolution")
        settings = {name: getattr(self.options, name) for name in names}
        settings |= {"metrics": self.options.wanted_metrics, "extractor_sha256": self.extractor_sha256}
        checkpoint = data["samples"].get("manifest", {}).get("checkpoint")
        return write_results(
            path,
            task=task,
            argv=argv,
            metrics=metrics,
            data=data,
            settings=settings,
            device=self.options.device,
            checkpoint=checkpoint,
        )


def find_worst_classes(
    evaluator: Evaluator, summary: FeatureSummary, number: int
) -> tuple[str, list[dict[str, float]]]:
    """
    Finds the classes with the least accuracy, or recall if accuracy is no metric.

    Args:
        evaluator ([`Evaluator`]): The metrics and the reference.
        summary ([`FeatureSummary`]): The samples, from [`Evaluator.summarize`].
        number (`int`): Number of classes.

    Returns:
        `tuple[str, list[dict]]`: Name of the metric, and for each class its `label`, `value` and `num_samples`.

    Raises:
        `ValueError`: samples or reference images have no class ids.
    """
    if "accuracy" in evaluator.options.wanted_metrics:
        name, rows = "accuracy", accuracy_by_class(summary)
    else:
        labels, name = evaluator.reference.labels, "recall"
        for argument, found in {"samples": summary.labels, "reference": labels}.items():
            if found is None:
                raise ValueError(f"`{argument}` must have class ids for `worst_classes`, got none.")
        rows = recall_by_class(summary, evaluator.prepared("precision_recall").rows, labels)
    return name, [dict(zip(("label", "value", "num_samples"), row, strict=True)) for row in rows[:number]]


def to_table(metrics: dict[str, dict[str, Any]]) -> str:
    """Formats the numbers in `metrics` as a Markdown table."""
    rows = []
    for name, metric in metrics.items():
        interval = "" if metric["interval"] is None else " to ".join(f"{end:.4g}" for end in metric["interval"])
        rows.append([name, f"{metric['value']:.5g}", interval])
    return format_table(["metric", "value", "95 % interval"], rows, text=["95 % interval"])


def main(argv: list[str] | None = None) -> None:
    """Runs the command; `argv` defaults to the process's arguments. Raises a `ValueError` if they do not fit."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse_options(EvaluationOptions, argv, __doc__)
    with launched_processes(options.judge.device) as (device, is_main):
        options = replace(options, judge=replace(options.judge, device=device))
        samples = open_images(options.samples, **options.judge.image_options)
        evaluator = Evaluator(options.judge)
        summary, data = evaluator.summarize(samples, options.num_samples)
        if not is_main:
            return
        if options.save_statistics is not None:
            save_statistics(options.save_statistics, summary, options.judge.extractor, evaluator.extractor_sha256)
        metrics = evaluator.compute(summary, options.judge.num_groups > 0)
        if metrics:
            print(to_table(metrics))
        if options.output_file is not None:  # already here, as what follows may fail
            evaluator.write(options.output_file, argv, metrics, data)
        if options.worst_classes is not None:
            _show_worst_classes(options.worst_classes, evaluator, summary, metrics)
            if options.output_file is not None:
                evaluator.write(options.output_file, argv, metrics, data)
        if options.nearest_grid is not None:
            images = (samples, np.sort(draw_indices(len(samples), options.num_samples)), summary)
            draw_nearest(options.nearest_grid, *images, evaluator.reference.images, evaluator.prepared("authenticity"))


def _show_worst_classes(
    number: int, evaluator: Evaluator, summary: FeatureSummary, metrics: dict[str, dict[str, Any]]
) -> None:
    """Shows so many of the worst classes, and adds them to their metric in `metrics`."""
    name, worst = find_worst_classes(evaluator, summary, number)
    metrics[name]["worst_classes"] = worst
    rows = [[str(row["label"]), f"{row['value']:.3f}", str(row["num_samples"])] for row in worst]
    print("\n" + format_table(["class", name, "samples"], rows))


if __name__ == "__main__":
    run_main(main)
