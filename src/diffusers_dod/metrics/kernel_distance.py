# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
KID, the kernel inception distance (Bińkowski et al., 2018, arXiv:1801.01401): the squared maximum mean discrepancy of
two sets of features x and y under the cubic kernel k(a, b) = (a.b / d + 1)^3, by its unbiased estimator

    mean of k(x_i, x_j) over i != j + mean of k(y_i, y_j) over i != j - 2 mean of k(x_i, y_j).

It is 0 on average for samples of the reference's distribution, however few there are, and may be negative.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..checks import check_at_least
from ..results import as_metric
from ..seeding import stateless_generator
from .intervals import mean_interval
from .statistics import check_rows


SUBSET_SIZE = 1000
NUM_SUBSETS = 10  # at least, where there are enough images


@dataclass(frozen=True)
class KernelDistance:
    """
    The squared discrepancy of each pair of subsets.

    Args:
        subsets (`tuple[float, ...]`): One number for each pair.
    """

    subsets: tuple[float, ...]

    @property
    def mean(self) -> float:
        """KID: the mean over the subsets."""
        return float(np.mean(self.subsets))

    @property
    def std(self) -> float:
        """Standard deviation over the subsets, with their number as the divisor."""
        return float(np.std(self.subsets))

    def interval(self, confidence: float = 0.95) -> tuple[float, float] | None:
        """
        The [`mean_interval`] over the subsets, which share no image.

        Args:
            confidence (`float`, defaults to 0.95): Probability that the interval holds, in (0, 1).

        Returns:
            `tuple[float, float]`: Lower and upper end; `None` with less than two subsets.

        Raises:
            `ValueError`: the probability is out of range.
        """
        return mean_interval(self.subsets, confidence) if len(self.subsets) > 1 else None

    def as_metrics(self, has_interval: bool) -> dict[str, dict[str, Any]]:
        """
        Puts KID into the form of results.

        Args:
            has_interval (`bool`): Whether to add the interval.

        Returns:
            `dict[str, dict]`: [`as_metric`] of `kid`.
        """
        interval = self.interval() if has_interval else None
        return {"kid": as_metric(self.mean, interval, std=self.std, num_subsets=len(self.subsets))}


def squared_discrepancy(samples: np.ndarray, reference: np.ndarray) -> float:
    """
    The unbiased estimate of the squared maximum mean discrepancy under the cubic kernel, in float64.

    Args:
        samples (`np.ndarray` of shape `(n, d)`): Features of n >= 2 samples.
        reference (`np.ndarray` of shape `(m, d)`): Features of m >= 2 reference images.

    Returns:
        `float`: The estimate.

    Raises:
        `ValueError`: there are fewer than two, the shapes do not fit, or a feature is not finite.
    """
    x, y = check_rows("samples", samples, 2), check_rows("reference", reference, 2)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"`samples` and `reference` must have as many features, got {x.shape[1]} and {y.shape[1]}.")
    x, y = (torch.from_numpy(rows.astype(np.float64)) for rows in (x, y))

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def mean_of_pairs(rows: torch.Tensor) -> torch.Tensor:
        values = kernel(rows, rows)
        return (values.sum() - values.trace()) / (len(rows) * (len(rows) - 1))

    return float(mean_of_pairs(x) + mean_of_pairs(y) - 2 * kernel(x, y).mean())


def kernel_distance(
    samples: np.ndarray, reference: np.ndarray, subset_size: int | None = None, seed: int = 0
) -> KernelDistance:
    """
    Computes KID over subsets.

    Both sets are shuffled and dealt into as many subsets as the smaller set has of `subset_size`, so that every image
    is in one subset. The subset size does not change KID on average, only its variation.

    Args:
        samples (`np.ndarray` of shape `(n, d)`): Features of the samples.
        reference (`np.ndarray` of shape `(m, d)`): Features of the reference.
        subset_size (`int`, *optional*): Least number of images of a subset, from 2 to the size of the smaller set. By
            default 1,000, or a tenth of the smaller set if that has fewer than 10,000.
        seed (`int`, defaults to 0): Seed of the shuffling.

    Returns:
        [`KernelDistance`].

    Raises:
        `ValueError`, `TypeError`: an argument is out of range, the shapes do not fit, or a feature is not finite.
    """
    smaller = min(len(samples), len(reference))
    if subset_size is None:
        subset_size = min(SUBSET_SIZE, max(2, smaller // NUM_SUBSETS))
    check_at_least("subset_size", subset_size, 2)
    if subset_size > smaller:
        raise ValueError(
            f"`subset_size` must be in [2, {smaller}], for {len(samples)} samples and {len(reference)} reference "
            f"images, got {subset_size}."
        )
    check_at_least("seed", seed, 0, 2**64 - 1)
    parts = []
    for number, rows in enumerate((samples, reference)):
        order = torch.randperm(len(rows), generator=stateless_generator(seed, number)).numpy()
        parts.append([rows[part] for part in np.array_split(order, smaller // subset_size)])
    return KernelDistance(tuple(squared_discrepancy(x, y) for x, y in zip(*parts, strict=True)))
