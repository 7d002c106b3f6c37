# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Improved precision and recall (Kynkäänniemi et al., 2019) as ADM defines them, and density and coverage (Naeem et al.,
2020, arXiv:2002.09797), in float64 and in bounded memory. All count points in balls around the members of a set, whose
radii are the distances to the k-th nearest other member. With balls around m reference images and n samples

    density = number of pairs of a sample and a ball that it lies in / (k n)
    coverage = number of balls that a sample lies in / m.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..checks import check_at_least
from ..results import as_metric
from .intervals import mean_interval, wilson_interval
from .statistics import check_rows


@dataclass(frozen=True)
class PrecisionRecall:
    """
    Improved precision and recall, as counts.

    Args:
        num_precise (`int`): Number of samples within the manifold of the reference.
        num_samples (`int`): Number of all samples.
        num_recalled (`int`): Number of reference images within the manifold of the samples.
        num_reference (`int`): Number of all reference images.
    """

    num_precise: int
    num_samples: int
    num_recalled: int
    num_reference: int

    @property
    def precision(self) -> float:
        """Share of the samples within the manifold of the reference."""
        return self.num_precise / self.num_samples

    @property
    def recall(self) -> float:
        """Share of the reference within the manifold of the samples."""
        return self.num_recalled / self.num_reference

    def precision_interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """
        The [`wilson_interval`] of precision, for other samples against the same reference.

        Recall has none. All reference images are compared with the same samples, so their counts do not show how it
        varies.

        Args:
            confidence (`float`, defaults to 0.95): Probability that the interval holds, in (0, 1).

        Returns:
            `tuple[float, float]`: Lower and upper end, in [0, 1].

        Raises:
            `ValueError`: an argument is out of range.
        """
        return wilson_interval(self.precision, self.num_samples, confidence)

    def as_metrics(self, has_interval: bool) -> dict[str, dict[str, Any]]:
        """
        Turns precision and recall into the metrics of results.

        Args:
            has_interval (`bool`): Whether precision gets an interval.

        Returns:
            `dict[str, dict]`: [`as_metric`] of `precision` and `recall`.
        """
        interval = self.precision_interval() if has_interval else None
        return {"precision": as_metric(self.precision, interval), "recall": as_metric(self.recall)}


@dataclass(frozen=True)
class DensityCoverage:
    """
    Density and coverage (Naeem et al., 2020), as counts.

    Args:
        num_balls (`np.ndarray` of shape `(n,)`): Number of balls of the reference that each sample lies in.
        num_covered (`int`): Number of balls of the reference that a sample lies in.
        num_reference (`int`): Number of all reference images, each of which has a ball.
        num_neighbors (`int`): The number k of neighbours.
    """

    num_balls: np.ndarray
    num_covered: int
    num_reference: int
    num_neighbors: int

    @property
    def density(self) -> float:
        """Number of balls in which a sample lies on average, divided by k; it may be larger than 1."""
        return float(self.num_balls.mean() / self.num_neighbors)

    @property
    def coverage(self) -> float:
        """Share of the reference images whose balls have a sample."""
        return self.num_covered / self.num_reference

    def as_metrics(self, has_interval: bool) -> dict[str, dict[str, Any]]:
        """
        Turns density and coverage into the metrics of results.

        Args:
            has_interval (`bool`): Whether density gets an interval, for other samples against the same reference.
                Coverage has none, as recall has none.

        Returns:
            `dict[str, dict]`: [`as_metric`] of `density` and `coverage`.
        """
        interval = mean_interval(self.num_balls / self.num_neighbors) if has_interval else None
        return {"density": as_metric(self.density, interval), "coverage": as_metric(self.coverage)}


ROUNDING = 1e-12  # of a squared distance, relative to the squared norms; float64 has some 1e-14


def _squared_distances(rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared distances (n, m) between rows (n, d) and (m, d), in float64, and a bound of their rounding (n, m)."""
    norms = rows.square().sum(dim=1)[:, None] + columns.square().sum(dim=1)
    return torch.addmm(norms, rows, columns.T, alpha=-2), ROUNDING * norms


class ReferenceManifold:
    """
    The manifold of a reference (Kynkäänniemi et al., 2019): the union of balls around its members.

    The radius of a ball is the distance to the k-th nearest other member. Its surface belongs to it, and so do points
    that are as close to it as rounding. Any number of samples can be compared with the manifold.

    Args:
        reference (`np.ndarray` of shape `(m, d)`): Features of the reference, m > k.
        num_neighbors (`int`, defaults to 3): The number k of neighbours.
        block_size (`int`, *optional*):
            At most this number squared of distances are in memory at once. By default 512 on a CPU, whose caches hold
            them, and 2048 elsewhere.
        device (`torch.device` or `str`, defaults to `"cpu"`): Device that computes distances. It must have float64.

    Raises:
        `ValueError`: there are k images or fewer, a feature is not finite, or a number is out of range.
    """

    def __init__(
        self,
        reference: np.ndarray,
        num_neighbors: int = 3,
        block_size: int | None = None,
        device: torch.device | str = "cpu",
    ):
        check_at_least("num_neighbors", num_neighbors, 1)
        if block_size is None:
            block_size = 512 if torch.device(device).type == "cpu" else 2048
        check_at_least("block_size", block_size, 1)
        self.num_neighbors = num_neighbors
        #: Features of the reference, of shape (m, d).
        self.rows = check_rows("reference", reference, num_neighbors + 1)
        self.block_size = block_size
        self.device = device
        self._center = self.rows.mean(axis=0, dtype=np.float64)  # distances are the same, and their rounding is less
        self._radii = self._find_radii(self.rows)

    def _blocks(self, rows: np.ndarray) -> Iterator[tuple[slice, torch.Tensor]]:
        for start in range(0, len(rows), self.block_size):
            place = slice(start, start + self.block_size)
            yield place, torch.from_numpy(rows[place].astype(np.float64) - self._center).to(self.device)

    def _find_radii(self, rows: np.ndarray) -> torch.Tensor:
        radii = torch.empty(len(rows), dtype=torch.float64, device=self.device)
        for place, block in self._blocks(rows):
            nearest = torch.empty(len(block), 0, dtype=torch.float64, device=self.device)
            for _, others in self._blocks(rows):
                nearest = torch.cat([nearest, _squared_distances(block, others)[0]], dim=1)
                nearest = nearest.topk(min(self.num_neighbors + 1, nearest.shape[1]), largest=False).values
            radii[place] = nearest[:, -1]  # beside k others there is itself, at distance 0
        return radii

    def compare(self, samples: np.ndarray) -> PrecisionRecall:
        """
        Computes improved precision and recall (Kynkäänniemi et al., 2019); ADM takes features `pool_3` and k = 3.

        Each is the share of one set within the manifold of the other. Squared distances are in float64 here. ADM's are
        in float16 if these are finite, else in float32, so its values differ in the last digits.

        Both depend on the numbers of images: compare them at the same numbers only. Equal sets have both at 1. If more
        than k members of a set are the same, their balls have radius 0.

        Args:
            samples (`np.ndarray` of shape `(n, d)`): Features of the samples, n > k.

        Returns:
            [`PrecisionRecall`].

        Raises:
            `ValueError`: there are k images or fewer, the shapes do not fit, or a feature is not finite.
        """
        samples = self._check_samples(samples, self.num_neighbors + 1)
        radii = self._find_radii(samples)
        is_precise = torch.zeros(len(samples), dtype=torch.bool, device=self.device)
        is_recalled = torch.zeros(len(self.rows), dtype=torch.bool, device=self.device)
        for place, other_place, distances, _ in self._distances(samples):
            is_precise[place] |= (distances <= self._radii[other_place]).any(dim=1)
            is_recalled[other_place] |= (distances <= radii[place, None]).any(dim=0)
        return PrecisionRecall(int(is_precise.sum()), len(samples), int(is_recalled.sum()), len(self.rows))

    def density_coverage(self, samples: np.ndarray) -> DensityCoverage:
        """
        Computes density and coverage (Naeem et al., 2020), who take k = 5.

        Both use the balls of the reference alone, so that outliers among the samples have no large ones. Samples of
        the reference's distribution have density 1 and coverage 1 - 2^-k on average, if there are as many of them.

        Args:
            samples (`np.ndarray` of shape `(n, d)`): Features of the samples, n >= 2.

        Returns:
            [`DensityCoverage`].

        Raises:
            `ValueError`: there are fewer than two samples, the shapes do not fit, or a feature is not finite.
        """
        samples = self._check_samples(samples, 2)
        num_balls = torch.zeros(len(samples), dtype=torch.int64, device=self.device)
        is_covered = torch.zeros(len(self.rows), dtype=torch.bool, device=self.device)
        for place, other_place, distances, _ in self._distances(samples):
            is_within = distances <= self._radii[other_place]
            num_balls[place] += is_within.sum(dim=1)
            is_covered[other_place] |= is_within.any(dim=0)
        return DensityCoverage(num_balls.cpu().numpy(), int(is_covered.sum()), len(self.rows), self.num_neighbors)

    def _check_samples(self, samples: np.ndarray, minimum: int) -> np.ndarray:
        samples = check_rows("samples", samples, minimum)
        if samples.shape[1] != self.rows.shape[1]:
            raise ValueError(
                "`samples` and `reference` must have as many features, "
                f"got {samples.shape[1]} and {self.rows.shape[1]}."
            )
        return samples

    def count_authentic(self, samples: np.ndarray) -> int:
        """
        Counts the samples that are authentic (Alaa et al., 2022): not closer to their nearest reference image than k
        others of the reference are to that image, where k is 1 by definition.

        A sample at equal distances from several images is authentic if it is so for each of them.

        Args:
            samples (`np.ndarray` of shape `(n, d)`): Features of the samples.

        Returns:
            `int`: Their number. All samples that are copies of reference images are not among them.

        Raises:
            `ValueError`: the shapes do not fit, or a feature is not finite.
        """
        samples = self._check_samples(samples, 1)
        nearest = torch.full((len(samples),), torch.inf, dtype=torch.float64, device=self.device)
        for place, _, distances, rounding in self._distances(samples):
            nearest[place] = torch.minimum(nearest[place], (distances + 4 * rounding).min(dim=1).values)
        is_copied = torch.zeros(len(samples), dtype=torch.bool, device=self.device)
        for place, other_place, distances, _ in self._distances(samples):
            is_nearest = distances <= nearest[place, None]
            is_copied[place] |= (is_nearest & (distances <= self._radii[other_place])).any(dim=1)
        return int((~is_copied).sum())

    def find_nearest(self, samples: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
        """
        Finds the reference images that are nearest to each sample.

        Args:
            samples (`np.ndarray` of shape `(n, d)`): Features of the samples.
            number (`int`): Number of images for each sample, from 1 to that of the reference.

        Returns:
            `tuple[np.ndarray, np.ndarray]`: Distances and indices of the images, both `(n, number)`, nearest first.

        Raises:
            `ValueError`: an argument is out of range, the shapes do not fit, or a feature is not finite.
        """
        samples = self._check_samples(samples, 1)
        check_at_least("number", number, 1, len(self.rows))
        squares = torch.empty(len(samples), number, dtype=torch.float64, device=self.device)
        indices = torch.empty(len(samples), number, dtype=torch.int64, device=self.device)
        for place, block in self._blocks(samples):
            best = torch.empty(len(block), 0, dtype=torch.float64, device=self.device)
            found = torch.empty(len(block), 0, dtype=torch.int64, device=self.device)
            for other_place, others in self._blocks(self.rows):
                columns = torch.arange(other_place.start, other_place.start + len(others), device=self.device)
                best = torch.cat([best, _squared_distances(block, others)[0]], dim=1)
                found = torch.cat([found, columns.expand(len(block), -1)], dim=1)
                best, chosen = best.topk(min(number, best.shape[1]), largest=False)
                found = found.gather(1, chosen)
            squares[place], indices[place] = best, found
        return squares.clamp(min=0).sqrt().cpu().numpy(), indices.cpu().numpy()

    def _distances(self, samples: np.ndarray) -> Iterator[tuple[slice, slice, torch.Tensor, torch.Tensor]]:
        """
        Blocks of squared distances of samples and reference, with the bound of their rounding.

        They are so much too small that points on surfaces are within balls.
        """
        for place, block in self._blocks(samples):
            for other_place, others in self._blocks(self.rows):
                distances, rounding = _squared_distances(block, others)
                yield place, other_place, distances - 2 * rounding, rounding  # the distance's and the radius's
