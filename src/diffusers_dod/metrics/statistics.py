# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Mean and covariance of features, in float64 and in bounded memory."""

import warnings

import numpy as np
import torch


_CHUNK_SIZE = 1024


def check_rows(name: str, rows: np.ndarray | torch.Tensor, minimum: int = 1) -> np.ndarray:
    """
    Checks that rows are finite, and returns them as an array.

    Args:
        name (`str`): Name of the argument, for the message.
        rows (`np.ndarray` or `torch.Tensor` of shape `(n, d)`): Features.
        minimum (`int`, defaults to 1): The smallest n.

    Returns:
        `np.ndarray` of shape `(n, d)`: The same numbers.

    Raises:
        `ValueError`: there are fewer rows, their shape does not fit, or a number is not finite.
    """
    rows = rows.detach().cpu().numpy() if isinstance(rows, torch.Tensor) else np.asarray(rows)
    if rows.ndim != 2 or len(rows) < minimum or rows.shape[1] < 1:
        raise ValueError(f"`{name}` must have shape (n, d) with n >= {minimum} and d >= 1, got {rows.shape}.")
    is_finite = np.isfinite(rows).all(axis=1)
    if not is_finite.all():
        raise ValueError(f"`{name}` must be finite, got {(~is_finite).sum()} of {len(rows)} rows that are not.")
    return rows


class RunningStatistics:
    """
    Mean and covariance of rows that come in chunks, in float64 (Chan et al., 1979).

    Rows are accumulated in chunks of 1,024, so the chunks in which they come make no difference at all. Nothing
    cancels, however far the mean is from zero.
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
            rows (`np.ndarray` or `torch.Tensor` of shape `(n, d)`): Features of n >= 1 images.

        Raises:
            `ValueError`: the shape does not fit, or a number is not finite.
        """
        rows = check_rows("rows", rows)
        if self.num_rows and rows.shape[1] != self.num_features:
            raise ValueError(f"`rows` must have length {self.num_features} as those before, got {rows.shape[1]}.")
        self._pending.append(rows)
        self.num_rows += len(rows)
        if sum(map(len, self._pending)) >= _CHUNK_SIZE:
            self._accumulate(whole_chunks=True)

    @property
    def num_features(self) -> int:
        """Length d of the rows so far."""
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
        Adds the rows of other statistics.

        Args:
            other ([`RunningStatistics`]): Statistics of rows of the same length. They are not changed.

        Raises:
            `ValueError`: the rows of `other` have another length.
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
        Mean and covariance of the rows so far.

        A warning says if there are no more rows than dimensions, since the covariance then has no full rank.

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
                f"The covariance of {self.num_features} features out of {self.num_rows} images has no full rank: a "
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
