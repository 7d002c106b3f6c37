# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
FID's statistics, the Inception Score, and precision and recall, as ADM defines them, in float64 and in bounded memory;
and the confidence intervals of all numbers.

FID is [`frechet_distance`] of two [`RunningStatistics`] (Heusel et al., 2017); sFID is the same on spatial features
(Nash et al., 2021).
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats

from ..checks import check_at_least, check_number
from .frechet import frechet_distance


_CHUNK_SIZE = 1024


def _check_rows(name: str, rows: np.ndarray | torch.Tensor, minimum: int = 1) -> np.ndarray:
    """An array (n, d) of finite numbers."""
    rows = rows.detach().cpu().numpy() if isinstance(rows, torch.Tensor) else np.asarray(rows)
    if rows.ndim != 2 or len(rows) < minimum or rows.shape[1] < 1:
        raise ValueError(f"`{name}` must have shape (n, d) with n >= {minimum} and d >= 1, got {rows.shape}.")
    is_finite = np.isfinite(rows).all(axis=1)
    if not is_finite.all():
        raise ValueError(f"`{name}` must be finite, got {(~is_finite).sum()} of {len(rows)} rows that are not.")
    return rows


class RunningStatistics:
    """
    Mean and covariance of rows that come in chunks, in float64 (Chan et al., 1979). They are accumulated in chunks of
    1,024 rows, whatever the chunks they come in: these make no difference at all. However far the mean is from zero,
    nothing cancels.
    """

    def __init__(self):
        self.num_rows = 0
        self._mean: np.ndarray | float = 0.0
        self._scatter: np.ndarray | float = 0.0  # sum of the outer products of deviations from the mean
        self._pending: list[np.ndarray] = []  # rows that wait for a chunk to be full

    def update(self, rows: np.ndarray | torch.Tensor) -> None:
        """
        Adds rows.

        Args:
            rows (`np.ndarray` or `torch.Tensor` of shape `(n, d)`): Features of n >= 1 pictures.

        Raises:
            `ValueError`: their shape does not fit, or one is not finite.
        """
        rows = _check_rows("rows", rows)
        if self.num_rows and rows.shape[1] != self.num_features:
            raise ValueError(f"`rows` must have length {self.num_features} as those before, got {rows.shape[1]}.")
        self._pending.append(rows)
        self.num_rows += len(rows)
        if sum(map(len, self._pending)) >= _CHUNK_SIZE:
            self._accumulate(whole_chunks=True)

    @property
    def num_features(self) -> int:
        """The d of the rows so far."""
        return self._pending[0].shape[1] if self._pending else len(self._mean)

    def _accumulate(self, whole_chunks: bool) -> None:
        rows = np.concatenate(self._pending)
        end = len(rows) - len(rows) % _CHUNK_SIZE if whole_chunks else len(rows)
        done = self.num_rows - len(rows)
        for start in range(0, end, _CHUNK_SIZE):
            chunk = rows[start : min(start + _CHUNK_SIZE, end)].astype(np.float64)
            mean = chunk.mean(axis=0)
            deviations = chunk - mean
            self._combine(done, len(chunk), mean, deviations.T @ deviations)
            done += len(chunk)
        self._pending = [rows[end:]] if end < len(rows) else []

    def _combine(self, done: int, number: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        """Merges the mean and scatter of `number` new rows into those of the `done` rows so far."""
        total = done + number
        delta = mean - self._mean
        between = np.outer(delta, delta) * (done * number / total)
        self._mean = self._mean + delta * (number / total)
        self._scatter = self._scatter + scatter + between

    def merge(self, other: "RunningStatistics") -> None:
        """
        Adds the rows of another one.

        Args:
            other ([`RunningStatistics`]): Statistics of rows of the same length. They are not changed.

        Raises:
            `ValueError`: its rows have another length.
        """
        if other.num_rows == 0:
            return
        if self.num_rows and self.num_features != other.num_features:
            raise ValueError(f"`other` must have rows of length {self.num_features}, got {other.num_features}.")
        for statistics in (self, other):
            if statistics._pending:
                statistics._accumulate(whole_chunks=False)
        self._combine(self.num_rows, other.num_rows, other._mean, other._scatter)
        self.num_rows += other.num_rows

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """
        What was accumulated, with a warning where there are no more rows than dimensions, since the covariance then
        has no full rank.

        Returns:
            `tuple[np.ndarray, np.ndarray]`: Mean (d,) and unbiased covariance (d, d), in float64.

        Raises:
            `ValueError`: there are fewer than two rows.
        """
        if self.num_rows < 2:
            raise ValueError(f"`rows` must be two or more for a covariance, got {self.num_rows}.")
        if self._pending:
            self._accumulate(whole_chunks=False)
        if self.num_rows <= self.num_features:
            warnings.warn(
                f"The covariance of {self.num_features} features out of {self.num_rows} pictures has no full rank: a "
                "Fréchet distance with it is far too large.",
                stacklevel=2,
            )
        return self._mean, self._scatter / (self.num_rows - 1)


def merge_statistics(groups: list[RunningStatistics]) -> RunningStatistics:
    """The [`RunningStatistics`] of all rows of `groups`."""
    merged = RunningStatistics()
    for group in groups:
        merged.merge(group)
    return merged


def jackknife_interval(
    groups: list, estimate: Callable[[list], float], confidence: float = 0.95
) -> tuple[float, float]:
    """
    Confidence interval of a number that is not negative, by the delete-a-group jackknife (Student's t).

    It says how far the number for as many other samples would lie from this one. The bias of the number, if it has
    any, is neither removed nor part of the interval. A bootstrap would repeat samples, which adds a bias.

    Args:
        groups (`list`): The samples in g >= 2 random groups of about the same size. Groups that differ more than by
            chance, as by class, make the interval too wide.
        estimate (`Callable[[list], float]`): The number, of all groups or of all but one.
        confidence (`float`, defaults to 0.95): Probability that the interval holds, in (0, 1).

    Returns:
        `tuple[float, float]`: Both ends; the lower one is at least 0.

    Raises:
        `ValueError`: there are fewer than two groups, or an argument is out of range.
    """
    check_at_least("len(groups)", len(groups), 2)
    check_number("confidence", confidence, 0, 1, open_minimum=True, open_maximum=True)
    value = estimate(groups)
    without = np.array([estimate(groups[:i] + groups[i + 1 :]) for i in range(len(groups))])
    error = np.sqrt((len(groups) - 1) * without.var())
    margin = float(stats.t.ppf((1 + confidence) / 2, len(groups) - 1) * error)
    return max(0.0, value - margin), value + margin


def mean_interval(values: Sequence[float] | np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """
    Confidence interval of a mean (Student's t).

    Args:
        values (`Sequence[float]` or `np.ndarray` of shape `(n,)`): The n >= 2 independent numbers.
        confidence (`float`, defaults to 0.95): Probability that the interval holds, in (0, 1).

    Returns:
        `tuple[float, float]`: Both ends.

    Raises:
        `ValueError`: there are fewer than two numbers, or the probability is out of range.
    """
    check_at_least("len(values)", len(values), 2)
    check_number("confidence", confidence, 0, 1, open_minimum=True, open_maximum=True)
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    margin = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1) * error)
    return float(np.mean(values)) - margin, float(np.mean(values)) + margin


def wilson_interval(share: float, num_samples: int, confidence: float = 0.95) -> tuple[float, float]:
    """
    Wilson's confidence interval of a share.

    Args:
        share (`float`): The share found, in [0, 1].
        num_samples (`int`): In how many independent samples.
        confidence (`float`, defaults to 0.95): Probability that the interval holds, in (0, 1).

    Returns:
        `tuple[float, float]`: Both ends, in [0, 1].

    Raises:
        `ValueError`: an argument is out of range.
    """
    check_number("share", share, 0, 1)
    check_at_least("num_samples", num_samples, 1)
    check_number("confidence", confidence, 0, 1, open_minimum=True, open_maximum=True)
    z = float(stats.norm.ppf((1 + confidence) / 2))
    center = share + z**2 / (2 * num_samples)
    margin = z * np.sqrt(share * (1 - share) / num_samples + z**2 / (4 * num_samples**2))
    ends = ((center + sign * margin) / (1 + z**2 / num_samples) for sign in (-1, 1))
    return tuple(float(np.clip(end, 0, 1)) for end in ends)


def fid_interval(
    groups: list[RunningStatistics], reference: tuple[np.ndarray, np.ndarray], confidence: float = 0.95
) -> tuple[float, float]:
    """
    The [`jackknife_interval`] of a Fréchet distance: how far the distance of other samples of the same number from the
    same model would lie from this one.

    The reference counts as fixed. The bias of the distance is about a constant over the number of samples. Where there
    are hardly more samples than features, the interval is rough.

    Args:
        groups (`list[RunningStatistics]`): The samples in g >= 2 groups as [`assign_groups`] makes them; 10 is usual.
        reference (`tuple[np.ndarray, np.ndarray]`): Mean and covariance of the reference.
        confidence (`float`, defaults to 0.95): Probability that the interval holds, in (0, 1).

    Returns:
        `tuple[float, float]`: Both ends; the lower one is at least 0.

    Raises:
        `ValueError`: there are fewer than two groups, or an argument is out of range.
    """

    def distance(part: list[RunningStatistics]) -> float:
        return frechet_distance(*merge_statistics(part).result(), *reference)

    return jackknife_interval(groups, distance, confidence)


@dataclass(frozen=True)
class InceptionScore:
    """
    The Inception Score of each split of samples.

    Args:
        splits (`tuple[float, ...]`): One for each split.
    """

    splits: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The score: the mean over the splits."""
        return float(np.mean(self.splits))

    @property
    def std(self) -> float:
        """Standard deviation over the splits, with their number as the divisor, as papers give it."""
        return float(np.std(self.splits))

    def interval(self, confidence: float = 0.95) -> tuple[float, float] | None:
        """
        The [`mean_interval`] over the splits; the bias of a split's size is no part of it.

        Args:
            confidence (`float`, defaults to 0.95): Probability that the interval holds, in (0, 1).

        Returns:
            `tuple[float, float]`: Both ends; `None` with less than two splits.

        Raises:
            `ValueError`: the probability is out of range.
        """
        return mean_interval(self.splits, confidence) if len(self.splits) > 1 else None


class RunningInceptionScore:
    """
    The Inception Score (Salimans et al., 2016) of logits that come in chunks, as ADM has it: exp of the mean KL
    divergence of p(y|x) from p(y) in each split of so many samples in a row. The last split has what is left.

    Samples that are sorted by class have splits of few classes, and too low a score.

    Args:
        split_size (`int`, defaults to 5000): Samples in a split.

    Raises:
        `ValueError`: the size is less than one.
    """

    def __init__(self, split_size: int = 5000):
        check_at_least("split_size", split_size, 1)
        self.split_size = split_size
        self.num_rows = 0
        # Of each split: samples, the sum of their negative entropies, the sum of their probabilities.
        self._splits: dict[int, tuple[int, float, np.ndarray]] = {}

    def update(self, logits: np.ndarray | torch.Tensor, places: np.ndarray | None = None) -> None:
        """
        Adds samples.

        Args:
            logits (`np.ndarray` or `torch.Tensor` of shape `(n, k)`): Their logits of k classes.
            places (`np.ndarray` of shape `(n,)`, *optional*): Their places in the order that is split; after those
                before if not given.

        Raises:
            `ValueError`: their shape does not fit, or one is not finite.
        """
        rows = torch.from_numpy(_check_rows("logits", logits).astype(np.float64))
        num_classes = next((len(probabilities) for _, _, probabilities in self._splits.values()), rows.shape[1])
        if num_classes != rows.shape[1]:
            raise ValueError(f"`logits` must be of {num_classes} classes, got {rows.shape[1]}.")
        places = self.num_rows + np.arange(len(rows)) if places is None else places
        self.num_rows += len(rows)
        for split in np.unique(places // self.split_size):
            log_probabilities = rows[places // self.split_size == split].log_softmax(dim=1)
            probabilities = log_probabilities.exp()
            number, negative_entropy, total = self._splits.get(split, (0, 0.0, 0.0))
            self._splits[split] = (
                number + len(probabilities),
                negative_entropy + (probabilities * log_probabilities).sum().item(),
                total + probabilities.sum(dim=0).numpy(),
            )

    def result(self) -> InceptionScore:
        """
        What was accumulated, with a warning where the last of several splits is smaller than the others.

        Returns:
            [`InceptionScore`].

        Raises:
            `ValueError`: there are no samples.
        """
        if not self._splits:
            raise ValueError("`logits` must be of one sample or more, got none.")
        if self.num_rows > self.split_size and self.num_rows % self.split_size:
            warnings.warn(
                f"The last split of the Inception Score has {self.num_rows % self.split_size:,} samples and counts as "
                f"much as those of {self.split_size:,}: take a multiple of {self.split_size:,}.",
                stacklevel=2,
            )
        scores = []
        for _, (number, negative_entropy, total) in sorted(self._splits.items()):
            mean = total / number
            mean_entropy = -(mean * np.log(np.where(mean > 0, mean, 1))).sum()
            scores.append(float(np.exp(negative_entropy / number + mean_entropy)))
        return InceptionScore(tuple(scores))


@dataclass(frozen=True)
class PrecisionRecall:
    """
    Improved precision and recall, as counts.

    Args:
        num_precise (`int`): Samples within the manifold of the reference.
        num_samples (`int`): Out of so many.
        num_recalled (`int`): Reference pictures within the manifold of the samples.
        num_reference (`int`): Out of so many.
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
        The [`wilson_interval`] of precision, for other samples against the same reference. Recall has none: all
        reference pictures are compared with the same samples, so their counts say nothing of how it varies.

        Args:
            confidence (`float`, defaults to 0.95): Probability that the interval holds, in (0, 1).

        Returns:
            `tuple[float, float]`: Both ends, in [0, 1].

        Raises:
            `ValueError`: an argument is out of range.
        """
        return wilson_interval(self.precision, self.num_samples, confidence)


def _squared_distances(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """(n, d) and (m, d) -> (n, m) in float64; what is zero but for rounding is zero."""
    norms = rows.square().sum(dim=1)[:, None] + columns.square().sum(dim=1)
    distances = torch.addmm(norms, rows, columns.T, alpha=-2)
    return distances.masked_fill_(distances <= 1e-13 * norms, 0)


class ReferenceManifold:
    """
    The manifold of a reference (Kynkäänniemi et al., 2019), with which any number of samples can be compared: the
    union of balls around its members. The radius of a ball is the distance to the k-th nearest other member, and its
    surface belongs to it.

    Args:
        reference (`np.ndarray` of shape `(m, d)`): Features of the reference, m > k.
        num_neighbours (`int`, defaults to 3): The number k of neighbours.
        block_size (`int`, defaults to 2048): Distances of so many times so many pairs are in memory at once.
        device (`torch.device` or `str`, defaults to `"cpu"`): Where distances are computed; it must have float64.

    Raises:
        `ValueError`: there are k pictures or fewer, a feature is not finite, or a number is out of range.
    """

    def __init__(
        self,
        reference: np.ndarray,
        num_neighbours: int = 3,
        block_size: int = 2048,
        device: torch.device | str = "cpu",
    ):
        check_at_least("num_neighbours", num_neighbours, 1)
        check_at_least("block_size", block_size, 1)
        self.num_neighbours = num_neighbours
        self.block_size = block_size
        self.device = device
        self._rows = _check_rows("reference", reference, num_neighbours + 1)
        self._center = self._rows.mean(axis=0, dtype=np.float64)  # distances are the same, and their rounding is less
        self._radii = self._find_radii(self._rows)

    def _blocks(self, rows: np.ndarray) -> Iterator[tuple[slice, torch.Tensor]]:
        for start in range(0, len(rows), self.block_size):
            place = slice(start, start + self.block_size)
            yield place, torch.from_numpy(rows[place].astype(np.float64) - self._center).to(self.device)

    def _find_radii(self, rows: np.ndarray) -> torch.Tensor:
        radii = torch.empty(len(rows), dtype=torch.float64, device=self.device)
        for place, block in self._blocks(rows):
            nearest = torch.empty(len(block), 0, dtype=torch.float64, device=self.device)
            for _, others in self._blocks(rows):
                nearest = torch.cat([nearest, _squared_distances(block, others)], dim=1)
                nearest = nearest.topk(min(self.num_neighbours + 1, nearest.shape[1]), largest=False).values
            radii[place] = nearest[:, -1]  # beside k others there is itself, at distance 0
        return radii

    def compare(self, samples: np.ndarray) -> PrecisionRecall:
        """
        Improved precision and recall, see [`precision_recall`].

        Args:
            samples (`np.ndarray` of shape `(n, d)`): Features of the samples, n > k.

        Returns:
            [`PrecisionRecall`].

        Raises:
            `ValueError`: there are k pictures or fewer, the shapes do not fit, or a feature is not finite.
        """
        samples = _check_rows("samples", samples, self.num_neighbours + 1)
        if samples.shape[1] != self._rows.shape[1]:
            raise ValueError(
                "`samples` and `reference` must have as many features, "
                f"got {samples.shape[1]} and {self._rows.shape[1]}."
            )
        radii = self._find_radii(samples)
        is_precise = torch.zeros(len(samples), dtype=torch.bool, device=self.device)
        is_recalled = torch.zeros(len(self._rows), dtype=torch.bool, device=self.device)
        for place, block in self._blocks(samples):
            for other_place, others in self._blocks(self._rows):
                distances = _squared_distances(block, others)
                is_precise[place] |= (distances <= self._radii[other_place]).any(dim=1)
                is_recalled[other_place] |= (distances <= radii[place, None]).any(dim=0)
        return PrecisionRecall(int(is_precise.sum()), len(samples), int(is_recalled.sum()), len(self._rows))


def precision_recall(
    samples: np.ndarray,
    reference: np.ndarray,
    num_neighbours: int = 3,
    block_size: int = 2048,
    device: torch.device | str = "cpu",
) -> PrecisionRecall:
    """
    Improved precision and recall (Kynkäänniemi et al., 2019), as ADM computes them on `pool_3` with k = 3: the share
    of each set within the manifold of the other one, see [`ReferenceManifold`].

    Squared distances are in float64 here, where ADM's are in float16 if these are finite and else in float32: its
    values differ in the last digits that it gives.

    Both depend on the numbers of pictures: compare them at the same numbers only. Sets that are the same have both at
    1. Sets in which more than k members are the same have balls of radius 0.

    Args:
        samples (`np.ndarray` of shape `(n, d)`): Features of the samples, n > k.
        reference (`np.ndarray` of shape `(m, d)`): Features of the reference, m > k.
        num_neighbours (`int`, defaults to 3): The number k of neighbours.
        block_size (`int`, defaults to 2048): Distances of so many times so many pairs are in memory at once.
        device (`torch.device` or `str`, defaults to `"cpu"`): Where distances are computed; it must have float64.

    Returns:
        [`PrecisionRecall`].

    Raises:
        `ValueError`: there are k pictures or fewer in a set, the shapes do not fit, a feature is not finite, or a
            number is out of range.
    """
    return ReferenceManifold(reference, num_neighbours, block_size, device).compare(samples)
