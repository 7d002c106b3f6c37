# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Features of images and their statistics: read by workers, extracted by any number of processes, kept for other calls.

Numbers are the same for any number of processes and workers, and from a cache: the batches are the same, and each
process accumulates the rows of all in the same order.
"""

import math
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import distributed
from tqdm.auto import tqdm

from ..checks import check_at_least
from ..files import replacing
from ..metrics.extractors import Extractor, extract
from ..metrics.inception_score import RunningInceptionScore
from ..metrics.statistics import RunningStatistics, merge_statistics
from ..metrics.summary import FeatureSummary
from ..processes import (
    all_or_none,
    check_processes,
    choose_num_workers,
    end_processes,
    end_with_launcher,
    gather_patiently,
    process_group_timeout,
)
from ..seeding import stateless_generator
from .feature_cache import FeatureCache, Rows
from .images import DatasetImages, ImageSource, draw_indices


# Ends of the names of statistics in files, as ADM has them.
SUFFIXES = {"features": "", "spatial_features": "_s"}
BATCHES_PER_ROUND = 8  # of each of several processes, before they exchange their rows


@contextmanager
def launched_processes(device: str) -> Iterator[tuple[str, bool]]:
    """
    Context of a command that `accelerate launch` may have started in several processes, which share the extraction.

    Args:
        device (`str`): The device of a single process.

    Returns:
        `tuple[str, bool]`: The device of this process, and whether it is the one that computes and writes numbers.

    Raises:
        `ValueError`: the run has other processes than the launcher asked for.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield device, True
        return
    end_with_launcher()
    accelerator = Accelerator(cpu=torch.device(device).type == "cpu", kwargs_handlers=[process_group_timeout()])
    check_processes(accelerator)
    yield str(accelerator.device), accelerator.is_main_process
    end_processes(accelerator)


def _rank_and_world() -> tuple[int, int]:
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def assign_groups(num_images: int, num_groups: int, labels: np.ndarray | None = None) -> np.ndarray:
    """
    Deals images at random to the groups of a jackknife; the same arguments give the same groups.

    If all classes occur equally often, as with balanced labels, each group gets an equal share of each class. Random
    groups would count variation of the classes between groups as an error of sampling. They would make an interval
    several times too wide if features tell classes apart.

    Args:
        num_images (`int`): Number of images.
        num_groups (`int`): Number of groups. Their sizes differ by at most one.
        labels (`np.ndarray` of shape `(num_images,)`, *optional*): Class ids, if they are known.

    Returns:
        `np.ndarray` of shape `(num_images,)`: The group of each image.
    """
    order = torch.randperm(num_images, generator=stateless_generator(num_images)).numpy()
    if labels is not None and np.ptp(np.unique(labels, return_counts=True)[1]) <= 1:
        by_class = np.lexsort((order, labels))
        order[by_class] = np.arange(num_images)
    return order % num_groups


def _extract_batch(
    images: ImageSource, extractor: Extractor, batch: torch.Tensor, device: torch.device | str
) -> dict[str, np.ndarray]:
    output = extract(extractor, batch.to(device))
    rows = {name: value.float().cpu() for name, value in vars(output).items() if value is not None}
    for name, values in rows.items():
        if not bool(values.isfinite().all()):
            number = int((~values.isfinite()).any(dim=1).sum())
            raise ValueError(
                f"`extractor` must give finite `{name}`, got {number} of {len(values)} images of {images.name!r} with "
                "others."
            )
    return {name: values.numpy() for name, values in rows.items()}


def _extract_rows(
    images: ImageSource,
    indices: np.ndarray,
    extractor: Extractor,
    batch_size: int,
    device: torch.device | str,
    num_workers: int | None,
) -> Iterator[Rows]:
    """The rows of all batches in order, of which each process extracts its share."""
    rank, world = _rank_and_world()
    workers = choose_num_workers(num_workers, torch.device(device), world)
    own = images.batches(batch_size, indices, workers, part=(rank, world))
    in_round = 1 if world == 1 else BATCHES_PER_ROUND
    for _ in range(math.ceil(len(indices) / batch_size / world / in_round)):
        found: list[Rows] = []
        with all_or_none():
            for batch, labels in islice(own, in_round):
                rows = _extract_batch(images, extractor, batch, device)
                found.append((rows, None if labels is None else labels.numpy()))
        for of_all in zip_longest(*gather_patiently(found)):
            yield from filter(None, of_all)
    with all_or_none():
        next(own, None)  # to the end, where a file has its checksum


def _read_rows(
    images: ImageSource, indices: np.ndarray, extractor: Extractor, cache: FeatureCache | None, **reading: Any
) -> Iterator[Rows]:
    """The rows of all images in order: from the cache if all processes have them there, which else the first fills."""
    if cache is None:
        yield from _extract_rows(images, indices, extractor, **reading)
        return
    settings = cache.settings(images, len(indices), reading["batch_size"], reading["device"])
    with all_or_none():
        cached = cache.open(settings)
    if all(gather_patiently(cached is not None)):
        yield from cached
        return
    with cache.writing(settings) if _rank_and_world()[0] == 0 else nullcontext() as write:
        for rows in _extract_rows(images, indices, extractor, **reading):
            if write is not None:
                write(rows)
            yield rows


def compute_features(
    images: ImageSource,
    extractor: Extractor,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    num_images: int | None = None,
    num_groups: int = 1,
    keep: Collection[str] = (),
    num_workers: int | None = 0,
    cache: FeatureCache | None = None,
) -> FeatureSummary:
    """
    Runs images through an extractor. All processes of a group must call it; all get the same summary of all images.

    Args:
        images ([`ImageSource`]): The images.
        extractor (`Callable`): Images (B, 3, H, W) in uint8 -> features (B, d) or [`ImageFeatures`].
        batch_size (`int`, defaults to 64): Images at a time.
        device (`torch.device` or `str`, defaults to `"cpu"`): Device on which the extractor takes images.
        num_images (`int`, *optional*): Number of images, drawn by [`draw_indices`]. By default all.
        num_groups (`int`, defaults to 1): Groups of the statistics, see [`assign_groups`].
        keep (`Collection[str]`, defaults to `()`): Outputs of the extractor to keep for all images.
        num_workers (`int` or `None`, defaults to 0): Processes that read images, see [`choose_num_workers`].
        cache ([`FeatureCache`], *optional*): Where features are taken from, or kept for other calls.

    Returns:
        [`FeatureSummary`].

    Raises:
        `ValueError`: there are too few images, an image cannot be read, or features are not finite.
    """
    check_at_least("num_groups", num_groups, 1)
    is_sorted = images.labels is not None and bool((np.diff(images.labels) >= 0).all())
    indices = draw_indices(len(images), num_images, shuffle=isinstance(images, DatasetImages) or is_sorted)
    places = np.argsort(indices)  # in the random order, of the images in the order in which they are read
    known = None if images.labels is None else images.labels[indices[places]]
    groups = assign_groups(len(places), num_groups, known)
    summary = FeatureSummary(groups, {}, [RunningInceptionScore() for _ in range(num_groups)])
    kept: dict[str, list[np.ndarray]] = {name: [] for name in keep}
    all_labels, is_correct = [], []
    reading = {"batch_size": batch_size, "device": device, "num_workers": num_workers}
    is_hidden = None if _rank_and_world()[0] == 0 else True  # where there is no terminal, or in each process but one
    start = 0
    with tqdm(total=len(places), desc=images.name, unit="images", disable=is_hidden) as progress:
        for rows, labels in _read_rows(images, indices[places], extractor, cache, **reading):
            now = slice(start, start + len(rows["features"]))
            _accumulate(summary, rows, groups[now], places[now])
            if labels is not None:
                all_labels.append(labels)
            if labels is not None and "logits" in rows:
                is_correct.append(rows["logits"].argmax(axis=1) == labels)
            for name in keep:
                kept[name].append(rows[name])
            progress.update(now.stop - start)
            start = now.stop
    summary.labels = np.concatenate(all_labels) if all_labels else None
    summary.is_correct = np.concatenate(is_correct) if is_correct else None
    summary.rows = {name: np.concatenate(chunks) for name, chunks in kept.items()}
    return summary


def _accumulate(summary: FeatureSummary, rows: dict[str, np.ndarray], groups: np.ndarray, places: np.ndarray) -> None:
    """Adds rows of images, whose groups and places in the random order are given, to statistics and scores."""
    for name in SUFFIXES:
        if name in rows and name not in summary.statistics:
            summary.statistics[name] = [RunningStatistics() for _ in range(summary.num_groups)]
    for group in np.unique(groups):
        is_of_group = groups == group
        for name, running in summary.statistics.items():
            running[group].update(rows[name][is_of_group])
        if "logits" in rows:
            summary.inception_scores[group].update(rows["logits"][is_of_group], places[is_of_group])


def save_statistics(path: Path, summary: FeatureSummary, extractor: str, extractor_sha256: str) -> None:
    """
    Writes the statistics of features as an npz file of ADM's form.

    It has `mu` and `sigma`, for spatial features also `mu_s` and `sigma_s`, then `num_images` and the identity of the
    extractor.

    Args:
        path (`Path`): The file.
        summary ([`FeatureSummary`]): Summary from [`compute_features`].
        extractor (`str`): Name of the extractor.
        extractor_sha256 (`str`): Hash of the extractor, see [`extractor_sha256`].
    """
    merged = {name: merge_statistics(groups) for name, groups in summary.statistics.items()}
    arrays: dict[str, Any] = {"num_images": merged["features"].num_rows}
    arrays |= {"extractor": extractor, "extractor_sha256": extractor_sha256}
    for name, statistics in merged.items():
        arrays[f"mu{SUFFIXES[name]}"], arrays[f"sigma{SUFFIXES[name]}"] = statistics.result()
    with replacing(path) as unfinished, open(unfinished, "wb") as file:
        np.savez(file, **arrays)
