# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
FID, sFID, Inception Score, precision and recall of pictures, as ADM's evaluation defines them:

    python -m diffusers_dod.evaluation.evaluate outputs/samples.npz --reference VIRTUAL_imagenet256_labeled.npz \\
        --extractor inception --metrics fid sfid is precision_recall --output_file outputs/evaluation.json

Samples and reference are `*.npz` with `arr_0`, a folder of the sampler or of PNG files,
`textures:<number>:<seed>`, or, with `--resolution`, a folder with a sub-folder per class or a data set of the Hub.
A reference with `mu` and `sigma` is taken as statistics, and its pictures serve precision and recall only.
`--save_statistics` writes those of the samples:

    python -m diffusers_dod.evaluation.evaluate path/to/imagenet/train --resolution 256 --extractor inception \\
        --save_statistics imagenet256.npz
"""

import argparse
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from tqdm.auto import tqdm

from ..checks import check_at_least
from ..seeding import stateless_generator
from .extractors import Extractor, PictureFeatures, extract, load_extractor, load_statistics
from .frechet import frechet_distance
from .images import ImageSource, open_images
from .metrics import (
    RunningInceptionScore,
    RunningStatistics,
    fid_interval,
    merge_statistics,
    precision_recall,
)
from .results import as_metric, file_sha256, write_results


METRICS = ("fid", "sfid", "is", "precision_recall")
# What a metric is of; and the names of the statistics of these, which are those of ADM.
FEATURES = {"fid": "features", "sfid": "spatial_features", "is": "logits", "precision_recall": "features"}
SUFFIXES = {"features": "", "spatial_features": "_s"}
PUBLISHED_NUM_SAMPLES = 50_000


@dataclass
class FeatureSummary:
    """
    What metrics need of the features of pictures, without the features of all of them unless they do.

    Args:
        statistics (`dict[str, list[RunningStatistics]]`):
            Those of the `features` and, where there are any, the `spatial_features`, in random groups.
        inception_score ([`RunningInceptionScore`]): Of the logits, where there are any.
        features (`np.ndarray` of shape `(n, d)`, *optional*): The features of all pictures, in fp32.
    """

    statistics: dict[str, list[RunningStatistics]]
    inception_score: RunningInceptionScore
    features: np.ndarray | None = None


def compute_features(
    images: ImageSource,
    extractor: Extractor,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    num_images: int | None = None,
    num_groups: int = 1,
    keep_features: bool = False,
) -> FeatureSummary:
    """
    Runs pictures through an extractor.

    Args:
        images ([`ImageSource`]): The pictures.
        extractor (`Callable`): Pictures (B, 3, H, W) in uint8 -> features (B, d) or [`PictureFeatures`].
        batch_size (`int`, defaults to 64): Pictures at a time.
        device (`torch.device` or `str`, defaults to `"cpu"`): Where the extractor takes pictures.
        num_images (`int`, *optional*): How many pictures, from the first one on; all if not given.
        num_groups (`int`, defaults to 1): Random groups of the statistics, a function of the number of pictures alone.
        keep_features (`bool`, defaults to `False`): Whether to keep the features of all pictures.

    Returns:
        [`FeatureSummary`].

    Raises:
        `ValueError`: there are too few pictures, one cannot be read, or features are not finite.
    """
    num_images = len(images) if num_images is None else num_images
    check_at_least("num_groups", num_groups, 1)
    groups = torch.randperm(num_images, generator=stateless_generator(num_images)).numpy() % num_groups
    summary = FeatureSummary({}, RunningInceptionScore())
    kept, start = [], 0
    progress = tqdm(total=num_images, desc=images.name, unit="images", disable=None)
    with progress:
        for batch in images.batches(batch_size, num_images):
            output = extract(extractor, batch.to(device))
            rows = {name: None if value is None else value.float().cpu() for name, value in vars(output).items()}
            for name in SUFFIXES:
                if rows[name] is not None:
                    running = summary.statistics.setdefault(name, [RunningStatistics() for _ in range(num_groups)])
                    for group in np.unique(groups[start : start + len(batch)]):
                        running[group].update(rows[name][groups[start : start + len(batch)] == group])
            if rows["logits"] is not None:
                summary.inception_score.update(rows["logits"])
            if keep_features:
                kept.append(rows["features"].numpy())
            start += len(batch)
            progress.update(len(batch))
    if keep_features:
        summary.features = np.concatenate(kept)
    return summary


def save_statistics(path: Path, summary: FeatureSummary, extractor: str) -> None:
    """
    Writes the statistics of features as an npz file of ADM's form: `mu`, `sigma`, and of spatial features `mu_s` and
    `sigma_s`; with `num_images` and the `extractor`.

    Args:
        path (`Path`): The file.
        summary ([`FeatureSummary`]): What [`compute_features`] returns.
        extractor (`str`): Name of the extractor.
    """
    merged = {name: merge_statistics(groups) for name, groups in summary.statistics.items()}
    arrays: dict[str, Any] = {"num_images": merged["features"].num_rows, "extractor": extractor}
    for name, statistics in merged.items():
        arrays[f"mu{SUFFIXES[name]}"], arrays[f"sigma{SUFFIXES[name]}"] = statistics.result()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        np.savez(file, **arrays)


class Reference:
    """
    What samples are compared with: statistics, or pictures, or both, checked against the metrics that need them.

    Args:
        name (`str`): What names it, see [`open_images`]; or an npz file of statistics.
        metrics (`list[str]`): The metrics that need it.
        extractor (`str`): Name of the extractor, for statistics that say of which one they are.
        options (`Any`): Arguments of [`open_images`].

    Raises:
        `OSError`: something cannot be read.
        `ValueError`: it does not have what the metrics need.
    """

    def __init__(self, name: str, metrics: list[str], extractor: str, **options: Any):
        self.statistics: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.images: ImageSource | None = None
        names = _read_names(name) if name.endswith(".npz") else set()
        has_statistics = bool(names & {"mu", "sigma"})
        if has_statistics:
            if "extractor" in names:
                with np.load(name) as file:
                    found = str(file["extractor"])
                if found != extractor:
                    raise ValueError(f"`reference` must be of the extractor {extractor!r}, got {name} of {found!r}.")
            for metric in {"fid", "sfid"} & set(metrics):
                features = FEATURES[metric]
                self.statistics[features] = load_statistics(Path(name), SUFFIXES[features], "reference")
        if "precision_recall" in metrics and has_statistics and "arr_0" not in names:
            raise ValueError(
                f"`reference` must hold pictures for `precision_recall`, got {name} with {sorted(names)}."
            )
        if not has_statistics or "precision_recall" in metrics:
            self.images = open_images(name, **options)
        self.data = {"name": name, "sha256": file_sha256(Path(name))} if self.images is None else self.images.data
        self.data = {**self.data, "has_statistics": has_statistics}


def _read_names(path: str) -> set[str]:
    try:
        with np.load(path) as file:
            return set(file.files)
    except (ValueError, TypeError, AttributeError, EOFError, BadZipFile) as error:
        raise ValueError(f"`reference` must be an npz file, got {path}: {error}") from error


def build_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("samples", help="The pictures to evaluate.")
    parser.add_argument("--reference", help="What they are compared with.")
    parser.add_argument(
        "--extractor",
        required=True,
        help="`inception` (pip install diffusers-dod[evaluation]), `package.module:attribute`, `file.py:attribute`, "
        "or a TorchScript file.",
    )
    parser.add_argument("--trust_extractor", action="store_true", help="Let a TorchScript file run what it holds.")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, help="`fid` by default, where there is a reference.")
    parser.add_argument("--num_samples", type=int, help="The first so many pictures; all by default.")
    parser.add_argument("--resolution", type=int, help="Of pictures that are cropped, and of textures.")
    parser.add_argument("--image_column", default="image", help="Column of the pictures of a data set.")
    parser.add_argument("--label_column", default="label", help="Column of its class ids.")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--num_groups",
        type=int,
        default=10,
        help="Groups of the jackknife that gives the confidence intervals of FID and sFID; 0 for no interval of any.",
    )
    parser.add_argument("--output_file", type=Path, help="JSON file of the results.")
    parser.add_argument("--save_statistics", type=Path, help="npz file of the statistics of the samples.")
    return parser


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The options in `argv`; all errors are reported at once, in the way of `argparse`."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.metrics is None:
        args.metrics = [] if args.reference is None else ["fid"]
    errors = []
    for name, minimum in {"batch_size": 1, "num_samples": 2, "resolution": 1, "num_groups": 0}.items():
        try:
            if getattr(args, name) is not None:
                check_at_least(name, getattr(args, name), minimum)
        except ValueError as error:
            errors.append(str(error))
    if args.num_groups == 1:
        errors.append("`num_groups` must be 0 or an integer >= 2, got 1.")
    if len(set(args.metrics)) < len(args.metrics):
        errors.append(f"`metrics` must be different ones, got {args.metrics}.")
    if args.reference is None and set(args.metrics) - {"is"}:
        errors.append(f"`reference` must be given for the metrics {args.metrics}, got none.")
    if args.reference is not None and not set(args.metrics) - {"is"}:
        errors.append(f"`reference` must not be given for the metrics {args.metrics}, got {args.reference!r}.")
    if not args.metrics and args.save_statistics is None:
        errors.append("`metrics` or `save_statistics` must be given, got neither.")
    if args.save_statistics is not None and args.save_statistics.suffix != ".npz":
        errors.append(f"`save_statistics` must end with .npz, got {args.save_statistics}.")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:  # the latter where PyTorch was built without CUDA
        errors.append(f"`device` must be one that PyTorch has here, got {args.device!r}: {error}")
    if errors:
        parser.error("\n".join(errors))
    return args


def _check_fit(found: PictureFeatures, metrics: list[str], reference: Reference | None, name: str) -> None:
    """Raises unless the features of an extractor are those that metrics and reference need."""
    for metric in metrics:
        if getattr(found, FEATURES[metric]) is None:
            raise ValueError(f"`extractor` must give `{FEATURES[metric]}` for `{metric}`, got none from {name!r}.")
    for features, (mean, _) in ({} if reference is None else reference.statistics).items():
        number = getattr(found, features).shape[1]
        if number != len(mean):
            raise ValueError(
                f"`extractor` must give {len(mean)} `{features}` as `reference` has them, got {number} from {name!r}."
            )


def evaluate(args: argparse.Namespace) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """
    Computes the metrics that options ask for.

    Args:
        args (`argparse.Namespace`): What [`parse_args`] returns.

    Returns:
        `tuple[dict, dict]`: What [`as_metric`] returns for each number, by name; and what identifies the data.

    Raises:
        `ImportError`: the extractor needs what is not installed.
        `OSError`: something cannot be read.
        `ValueError`: pictures, reference, extractor and metrics do not fit each other.
    """
    options = {name: getattr(args, name) for name in ("resolution", "image_column", "label_column")}
    images = open_images(args.samples, **options)
    num_samples = len(images) if args.num_samples is None else args.num_samples
    if not max(2, args.num_groups) <= num_samples <= len(images):
        raise ValueError(
            f"`num_samples` must be an integer from {max(2, args.num_groups)}, for `num_groups` {args.num_groups}, "
            f"to the {len(images)} pictures of {args.samples!r}, got {num_samples}."
        )
    reference = None
    if args.reference is not None:
        reference = Reference(args.reference, args.metrics, args.extractor, **options)
        if reference.images is not None and reference.images.resolution != images.resolution:
            raise ValueError(
                f"`reference` must have pictures of {images.resolution} pixels as the samples have, "
                f"got {reference.images.resolution}."
            )
    extractor = load_extractor(args.extractor, args.trust_extractor, args.device, "extractor")
    black = torch.zeros(2, 3, *images.resolution, dtype=torch.uint8, device=args.device)
    _check_fit(extract(extractor, black), args.metrics, reference, args.extractor)
    if num_samples < PUBLISHED_NUM_SAMPLES and {"fid", "sfid"} & set(args.metrics):
        warnings.warn(
            f"FID of {num_samples:,} samples is larger than that of the {PUBLISHED_NUM_SAMPLES:,} of published ones, "
            "by more the fewer: compare it at this number only.",
            stacklevel=2,
        )

    keep = "precision_recall" in args.metrics
    settings = (extractor, args.batch_size, args.device)
    summary = compute_features(images, *settings, num_samples, max(1, args.num_groups), keep)
    if args.save_statistics is not None:
        save_statistics(args.save_statistics, summary, args.extractor)
    of_reference = None
    if reference is not None and reference.images is not None:
        of_reference = compute_features(reference.images, *settings, keep_features=keep)
        for metric in {"fid", "sfid"} & set(args.metrics):
            name = FEATURES[metric]
            if name not in reference.statistics:
                reference.statistics[name] = merge_statistics(of_reference.statistics[name]).result()

    metrics = {}
    for metric in args.metrics:
        if metric in ("fid", "sfid"):
            groups, statistics = summary.statistics[FEATURES[metric]], reference.statistics[FEATURES[metric]]
            interval = fid_interval(groups, statistics) if args.num_groups else None
            metrics[metric] = as_metric(frechet_distance(*merge_statistics(groups).result(), *statistics), interval)
        elif metric == "is":
            score = summary.inception_score.result()
            interval = score.interval() if args.num_groups else None
            metrics[metric] = as_metric(score.mean, interval, std=score.std, num_splits=len(score.splits))
        else:
            device = "cpu" if torch.device(args.device).type == "mps" else args.device  # which has no float64
            counts = precision_recall(summary.features, of_reference.features, device=device)
            for share in ("precision", "recall"):
                interval = counts.interval(share) if args.num_groups else None
                metrics[share] = as_metric(getattr(counts, share), interval)
    data = {"name": images.name, "num_samples": num_samples, "samples": images.data}
    return metrics, {**data, "reference": None if reference is None else reference.data}


def to_table(metrics: dict[str, dict[str, Any]]) -> str:
    """The numbers in `metrics` as a table in Markdown."""
    lines = ["| metric | value | 95 % interval |", "| --- | ---: | --- |"]
    for name, metric in metrics.items():
        interval = "" if metric["interval"] is None else " to ".join(f"{end:.4g}" for end in metric["interval"])
        lines.append(f"| {name} | {metric['value']:.5g} | {interval} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """The command; `argv` are its arguments, the process's by default. Raises a `ValueError` where they do not fit."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    metrics, data = evaluate(args)
    if metrics:
        print(to_table(metrics))
    if args.output_file is not None:
        names = ("extractor", "metrics", "batch_size", "num_groups", "resolution")
        settings = {name: getattr(args, name) for name in names}
        file = Path(args.extractor.rpartition(":")[0] or args.extractor)
        settings["extractor_sha256"] = file_sha256(file) if file.is_file() else None
        checkpoint = data["samples"].get("manifest", {}).get("checkpoint")
        write_results(args.output_file, "evaluate", argv, metrics, data, settings, args.device, checkpoint)


if __name__ == "__main__":
    main()
