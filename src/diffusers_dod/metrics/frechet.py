# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
The Fréchet distance between two sets of features, in float64 (Heusel et al., 2017: FID on Inception features), and
its extrapolation over 1 / n to any number of samples (Chong & Forsyth, 2020, arXiv:1911.07023).
"""

from typing import Any

import numpy as np

from ..checks import check_at_least, check_type
from ..results import as_metric
from .intervals import jackknife
from .statistics import RunningStatistics, merge_statistics


def feature_statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Mean and unbiased covariance of features.

    Args:
        features (`np.ndarray` of shape `(n, d)`): The features of n >= 2 samples.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Mean of shape `(d,)` and covariance of shape `(d, d)`, in float64.

    Raises:
        `ValueError`: there are fewer than two samples, or a feature is not finite.
    """
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or features.shape[0] < 2:
        raise ValueError(f"`features` must have shape (n, d) with n >= 2, got {features.shape}.")
    if not np.isfinite(features).all():
        bad = int((~np.isfinite(features)).any(axis=1).sum())
        raise ValueError(f"`features` must be finite, got {bad} of {len(features)} rows that are not.")
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


def covariance_root(cov: np.ndarray) -> np.ndarray:
    """The symmetric square root (d, d) of a covariance `cov` (d, d), whose negative eigenvalues are rounding."""
    values, vectors = np.linalg.eigh(cov)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def frechet_distance(
    mean_1: np.ndarray,
    cov_1: np.ndarray,
    mean_2: np.ndarray,
    cov_2: np.ndarray,
    root_2: np.ndarray | None = None,
) -> float:
    """
    |mean_1 - mean_2|^2 + tr(cov_1 + cov_2 - 2 (cov_1 cov_2)^(1/2)), the squared 2-Wasserstein distance of Gaussians.

    The last trace is the sum of the square roots of the eigenvalues of cov_2^(1/2) cov_1 cov_2^(1/2), which is
    symmetric: nothing complex arises, and singular covariances need no offset.

    Args:
        mean_1 (`np.ndarray` of shape `(d,)`): Mean of one Gaussian.
        cov_1 (`np.ndarray` of shape `(d, d)`): Covariance of that Gaussian.
        mean_2 (`np.ndarray` of shape `(d,)`): Mean of the other Gaussian.
        cov_2 (`np.ndarray` of shape `(d, d)`): Covariance of the other Gaussian.
        root_2 (`np.ndarray` of shape `(d, d)`, *optional*): The [`covariance_root`] of `cov_2`, if it is known.

    Returns:
        `float`: The squared distance, 0 for the same Gaussian.

    Raises:
        `TypeError`: an argument is no array of real numbers.
        `ValueError`: the shapes do not fit, or a number is not finite.
    """
    for name, value in {"mean_1": mean_1, "cov_1": cov_1, "mean_2": mean_2, "cov_2": cov_2}.items():
        check_type(name, value, np.ndarray)
        if value.dtype.kind not in "fiu":
            raise TypeError(f"`{name}` must hold real numbers, got {value.dtype}.")
        if not np.isfinite(value).all():
            raise ValueError(f"`{name}` must be finite, got others.")
    (d,) = mean_1.shape if mean_1.ndim == 1 else (-1,)
    if mean_2.shape != (d,) or cov_1.shape != (d, d) or cov_2.shape != (d, d):
        raise ValueError(
            "`mean_1`, `mean_2` must have shape (d,) and `cov_1`, `cov_2` (d, d), got "
            f"{mean_1.shape}, {mean_2.shape}, {cov_1.shape} and {cov_2.shape}."
        )
    root = covariance_root(cov_2) if root_2 is None else root_2
    trace_root = np.sqrt(np.linalg.eigvalsh(root @ cov_1 @ root).clip(min=0)).sum()
    distance = ((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1) + np.trace(cov_2) - 2 * trace_root
    return max(float(distance), 0.0)  # rounding alone makes it negative


def as_fid(
    name: str, groups: list[RunningStatistics], reference: tuple[np.ndarray, ...], has_interval: bool
) -> dict[str, dict[str, Any]]:
    """
    A Fréchet distance as results hold it: plain, and by the jackknife without the bias of few samples.

    The bias is about a constant divided by the number of samples; the constant is that of the samples. Both intervals
    say how far the distance would move with as many other samples of the same model, and the reference counts as
    fixed. They are rough if there are hardly more samples than features.

    Args:
        name (`str`): Name of the number.
        groups (`list[RunningStatistics]`): The samples in g >= 2 groups as [`assign_groups`] makes them; 10 is usual.
        reference (`tuple[np.ndarray, ...]`): Mean and covariance of the reference, and its root if it is known.
        has_interval (`bool`): Whether there are intervals, and the corrected distance, which needs groups as well.

    Returns:
        `dict[str, dict]`: [`as_metric`] of the distance, whose interval does not go below 0, and of
        `<name>_corrected`, which may be negative as the estimate of a small distance.
    """

    def distance(part: list[RunningStatistics]) -> float:
        return frechet_distance(*merge_statistics(part).result(), *reference)

    if not has_interval:
        return {name: as_metric(distance(groups))}
    found = jackknife(groups, distance)
    low, high = found.interval()
    return {
        name: as_metric(found.value, (max(low, 0.0), high)),
        f"{name}_corrected": as_metric(found.corrected, found.corrected_interval()),
    }


def fid_infinity(groups: list[RunningStatistics], reference: tuple[np.ndarray, ...]) -> float:
    """
    Extrapolates the Fréchet distance to any number of samples (Chong & Forsyth, 2020).

    A line over 1 / n is fitted to the mean distances of all neighbouring groups, from half of them up to all, by least
    squares. The jackknife's corrected distance is the line through the last two of these points.

    Args:
        groups (`list[RunningStatistics]`): The samples in g >= 2 groups as [`assign_groups`] makes them.
        reference (`tuple[np.ndarray, ...]`): Mean and covariance of the reference, and its root if it is known.

    Returns:
        `float`: The height of the line at 1 / n = 0, which may be negative.

    Raises:
        `ValueError`: there are fewer than two groups.
    """
    number = len(groups)
    check_at_least("len(groups)", number, 2)
    points = []
    for size in range((number + 1) // 2, number + 1):
        starts = range(number if size < number else 1)
        parts = [merge_statistics([groups[(start + i) % number] for i in range(size)]) for start in starts]
        distances = [frechet_distance(*part.result(), *reference) for part in parts]
        points.append((np.mean([1 / part.num_rows for part in parts]), np.mean(distances)))
    return float(np.polyfit(*np.transpose(points), 1)[1])
