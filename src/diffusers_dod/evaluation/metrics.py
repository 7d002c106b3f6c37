# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
FID's statistics, the Inception Score, and precision and recall, as ADM defines them, in float64 and in bounded memory.

FID is [`frechet_distance`] of two [`RunningStatistics`] (Heusel et al., 2017); sFID is the same on spatial features
(Nash et al., 2021).
"""

import warnings
from collections.abc import Iterator
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
        """Of the `done` rows so far with `number` further ones."""
        total = done + number
        delta = mean - self._mean
        between = np.outer(delta, delta) * (done * number / total)
        self._mean = self._mean + delta * (number / total)
        self._scatter = self._scatter + scatter + between

    def merge(self, other: "RunningStatistics") -> None:
        """
        Adds the rows of another one.

        Args:
            other ([`RunningStatistics`]): Of rows of the same length; its result stays as it is.

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


def fid_interval(
    groups: list[RunningStatistics], reference: tuple[np.ndarray, np.ndarray], confidence: float = 0.95
) -> tuple[float, float]:
    """
    Confidence interval of a Fréchet distance by the delete-a-group jackknife (Student's t).

    It says how far the distance of other samples of the same number from the same model would lie from this one. The
    reference counts as fixed, and the bias of the distance, which is too large by about a constant over the number of
    samples, is neither removed nor part of the interval. A bootstrap would repeat samples, which adds such a bias.
    Where there are hardly more samples than features, the interval is rough.

    Args:
        groups (`list[RunningStatistics]`):
            The samples in g >= 2 random groups of about the same size; 10 is usual. Groups that differ, as by class,
            make the interval too wide.
        reference (`tuple[np.ndarray, np.ndarray]`): Mean and covariance of the reference.
        confidence (`float`, defaults to 0.95): Probability that the interval holds, in (0, 1).

    Returns:
        `tuple[float, float]`: Both ends; the lower one is at least 0.

    Raises:
        `ValueError`: there are fewer than two groups, or an argument is out of range.
    """
    check_at_least("len(groups)", len(groups), 2)
    check_number("confidence", confidence, 0, 1, open_minimum=True, open_maximum=True)
    distance = frechet_distance(*merge_statistics(groups).result(), *reference)
    rest = [merge_statistics(groups[:i] + groups[i + 1 :]) for i in range(len(groups))]
    without = np.array([frechet_distance(*part.result(), *reference) for part in rest])
    error = np.sqrt((len(groups) - 1) * without.var())
    margin = float(stats.t.ppf((1 + confidence) / 2, len(groups) - 1) * error)
    return max(0.0, distance - margin), distance + margin


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
        Confidence interval of the mean over the splits (Student's t); the bias of a split's size is no part of it.

        Args:
            confidence (`float`, defaults to 0.95): Probability that the interval holds, in (0, 1).

        Returns:
            `tuple[float, float]`: Both ends; `None` with less than two splits.

        Raises:
            `ValueError`: the probability is out of range.
        """
        check_number("confidence", confidence, 0, 1, open_minimum=True, open_maximum=True)
        if len(self.splits) < 2:
            return None
        error = np.std(self.splits, ddof=1) / np.sqrt(len(self.splits))
        margin = float(stats.t.ppf((1 + confidence) / 2, len(self.splits) - 1) * error)
        return self.mean - margin, self.mean + margin


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
        self._finished: list[float] = []
        self._start_split()

    def _start_split(self) -> None:
        self._num_rows, self._negative_entropy, self._probabilities = 0, 0.0, 0.0

    def _score(self) -> float:
        mean = self._probabilities / self._num_rows
        mean_entropy = -(mean * np.log(np.where(mean > 0, mean, 1))).sum()
        return float(np.exp(self._negative_entropy / self._num_rows + mean_entropy))

    def update(self, logits: np.ndarray | torch.Tensor) -> None:
        """
        Adds samples.

        Args:
            logits (`np.ndarray` or `torch.Tensor` of shape `(n, k)`): Their logits of k classes.

        Raises:
            `ValueError`: their shape does not fit, or one is not finite.
        """
        rows = torch.from_numpy(_check_rows("logits", logits).astype(np.float64))
        if self._num_rows and len(self._probabilities) != rows.shape[1]:
            raise ValueError(f"`logits` must be of {len(self._probabilities)} classes, got {rows.shape[1]}.")
        while len(rows):
            part, rows = rows.tensor_split([self.split_size - self._num_rows])
            log_probabilities = part.log_softmax(dim=1)
            probabilities = log_probabilities.exp()
            self._negative_entropy += (probabilities * log_probabilities).sum().item()
            self._probabilities = self._probabilities + probabilities.sum(dim=0).numpy()
            self._num_rows += len(part)
            if self._num_rows == self.split_size:
                self._finished.append(self._score())
                self._start_split()

    def result(self) -> InceptionScore:
        """
        What was accumulated.

        Returns:
            [`InceptionScore`].

        Raises:
            `ValueError`: there are no samples.
        """
        if not self._finished and not self._num_rows:
            raise ValueError("`logits` must be of one sample or more, got none.")
        return InceptionScore((*self._finished, *([self._score()] if self._num_rows else [])))


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

    def interval(self, which: str, confidence: float = 0.95) -> tuple[float, float]:
        """
        Wilson's confidence interval of a share: of precision with the reference, of recall with the samples as given.

        Args:
            which (`str`): `"precision"` or `"recall"`.
            confidence (`float`, defaults to 0.95): Probability that the interval holds, in (0, 1).

        Returns:
            `tuple[float, float]`: Both ends, in [0, 1].

        Raises:
            `ValueError`: an argument is out of range.
        """
        counts = {
            "precision": (self.num_precise, self.num_samples),
            "recall": (self.num_recalled, self.num_reference),
        }
        if which not in counts:
            raise ValueError(f"`which` must be one of {', '.join(map(repr, counts))}, got {which!r}.")
        check_number("confidence", confidence, 0, 1, open_minimum=True, open_maximum=True)
        share = stats.binomtest(*counts[which]).proportion_ci(confidence, method="wilson")
        return float(share.low), float(share.high)


def _squared_distances(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """(n, d) and (m, d) -> (n, m) in float64; what is zero but for rounding is zero."""
    norms = rows.square().sum(dim=1)[:, None] + columns.square().sum(dim=1)
    distances = torch.addmm(norms, rows, columns.T, alpha=-2)
    return distances.masked_fill_(distances <= 1e-13 * norms, 0)


def precision_recall(
    samples: np.ndarray,
    reference: np.ndarray,
    num_neighbours: int = 3,
    block_size: int = 2048,
    device: torch.device | str = "cpu",
) -> PrecisionRecall:
    """
    Improved precision and recall (Kynkäänniemi et al., 2019), as ADM computes them on `pool_3` with k = 3.

    The manifold of a set is the union of balls around its members; the radius of a ball is the distance to the k-th
    nearest other member, and its surface belongs to it. Squared distances are in float64 here, where ADM's are in
    float16 if these are finite and else in float32: its values differ in the last digits that it gives.

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
        `ValueError`: there are k pictures or fewer in a set, the shapes do not fit, or a feature is not finite.
    """
    check_at_least("num_neighbours", num_neighbours, 1)
    check_at_least("block_size", block_size, 1)
    named = {"samples": samples, "reference": reference}
    sets = [_check_rows(name, rows, num_neighbours + 1) for name, rows in named.items()]
    if sets[0].shape[1] != sets[1].shape[1]:
        raise ValueError(
            f"`samples` and `reference` must have as many features, got {sets[0].shape[1]} and {sets[1].shape[1]}."
        )
    center = sets[1].mean(axis=0, dtype=np.float64)  # distances are the same, and their rounding is less

    def blocks(rows: np.ndarray) -> Iterator[tuple[slice, torch.Tensor]]:
        for start in range(0, len(rows), block_size):
            place = slice(start, start + block_size)
            yield place, torch.from_numpy(rows[place].astype(np.float64) - center).to(device)

    def find_radii(rows: np.ndarray) -> torch.Tensor:
        radii = torch.empty(len(rows), dtype=torch.float64, device=device)
        for place, block in blocks(rows):
            nearest = torch.empty(len(block), 0, dtype=torch.float64, device=device)
            for _, others in blocks(rows):
                nearest = torch.cat([nearest, _squared_distances(block, others)], dim=1)
                nearest = nearest.topk(min(num_neighbours + 1, nearest.shape[1]), largest=False).values
            radii[place] = nearest[:, -1]  # beside k others there is itself, at distance 0
        return radii

    radii = [find_radii(rows) for rows in sets]
    is_within = [torch.zeros(len(rows), dtype=torch.bool, device=device) for rows in sets]
    for place, block in blocks(sets[0]):
        for other_place, others in blocks(sets[1]):
            distances = _squared_distances(block, others)
            is_within[0][place] |= (distances <= radii[1][other_place]).any(dim=1)
            is_within[1][other_place] |= (distances <= radii[0][place, None]).any(dim=0)
    counts = [int(within.sum()) for within in is_within]
    return PrecisionRecall(counts[0], len(sets[0]), counts[1], len(sets[1]))
