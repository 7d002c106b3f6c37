# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""The Inception Score (Salimans et al., 2016) as ADM defines it, in float64 and in bounded memory."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..checks import check_at_least
from ..results import as_metric
from .intervals import mean_interval
from .statistics import check_rows


@dataclass(frozen=True)
class InceptionScore:
    """
    The Inception Score of each split of samples.

    Args:
        splits (`tuple[float, ...]`): A score for each split.
    """

    splits: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The score: the mean over the splits."""
        return float(np.mean(self.splits))

    @property
    def std(self) -> float:
        """Standard deviation over the splits, divided by their number as papers do."""
        return float(np.std(self.splits))

    def interval(self, confidence: float = 0.95) -> tuple[float, float] | None:
        """
        The [`mean_interval`] over the splits. It does not include the bias of a split's size.

        Args:
            confidence (`float`, defaults to 0.95): Probability that the interval holds, in (0, 1).

        Returns:
            `tuple[float, float]`: Lower and upper end; `None` with less than two splits.

        Raises:
            `ValueError`: the probability is out of range.
        """
        return mean_interval(self.splits, confidence) if len(self.splits) > 1 else None

    def as_metrics(self, has_interval: bool) -> dict[str, dict[str, Any]]:
        """
        The score as results hold it.

        Args:
            has_interval (`bool`): Whether it gets an interval.

        Returns:
            `dict[str, dict]`: [`as_metric`] of `is`.
        """
        interval = self.interval() if has_interval else None
        return {"is": as_metric(self.mean, interval, std=self.std, num_splits=len(self.splits))}


class RunningInceptionScore:
    """
    The Inception Score (Salimans et al., 2016) of logits that come in chunks, as ADM defines it.

    It is exp of the mean KL divergence of p(y|x) from p(y), in each split of `split_size` samples in a row. The last
    split may be smaller. Samples that are sorted by class have splits of few classes, and get too low a score.

    Args:
        split_size (`int`, defaults to 5000): Samples in a split.

    Raises:
        `ValueError`: the size is less than one.
    """

    def __init__(self, split_size: int = 5000):
        check_at_least("split_size", split_size, 1)
        self.split_size = split_size
        self.num_rows = 0
        # For each split: number of samples, sum of their negative entropies, sum of their probabilities.
        self._splits: dict[int, tuple[int, float, np.ndarray]] = {}

    def update(self, logits: np.ndarray | torch.Tensor, places: np.ndarray | None = None) -> None:
        """
        Adds samples.

        Args:
            logits (`np.ndarray` or `torch.Tensor` of shape `(n, k)`): Logits of the samples for k classes.
            places (`np.ndarray` of shape `(n,)`, *optional*):
                Places of the samples in the order that is split. By default they follow the earlier samples.

        Raises:
            `ValueError`: the shape does not fit, or a logit is not finite.
        """
        rows = torch.from_numpy(check_rows("logits", logits).astype(np.float64))
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

    def merge(self, other: "RunningInceptionScore") -> None:
        """
        Adds the samples of another score, to the same splits.

        Args:
            other ([`RunningInceptionScore`]): A score of other places, with splits of the same size.

        Raises:
            `ValueError`: the splits of `other` have another size.
        """
        if other.split_size != self.split_size:
            raise ValueError(f"`other` must have splits of {self.split_size}, got {other.split_size}.")
        self.num_rows += other.num_rows
        for split, (number, negative_entropy, total) in other._splits.items():
            before = self._splits.get(split, (0, 0.0, 0.0))
            self._splits[split] = (before[0] + number, before[1] + negative_entropy, before[2] + total)

    def result(self) -> InceptionScore:
        """
        The score so far, with a warning if the last of several splits is smaller than the others.

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
