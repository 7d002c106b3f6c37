# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Confidence intervals for any number (jackknife), for means (Student's t) and for shares (Wilson)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ..checks import check_at_least, check_number


@dataclass(frozen=True)
class Jackknife:
    """
    A number of samples, what it would be without the bias of few samples, and how far both vary.

    Args:
        value (`float`): The number.
        corrected (`float`): The number without its bias of order 1 / n (Quenouille, 1956).
        error (`float`): Standard error of both.
        num_groups (`int`): Number of groups that were left out in turn.
    """

    value: float
    corrected: float
    error: float
    num_groups: int

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """
        Confidence interval of the number's expected value at this number of samples (Student's t).

        Another set of samples gives a number that lies further away: within sqrt(2) times the width as often.

        Args:
            confidence (`float`, defaults to 0.95): Probability that the interval holds, in (0, 1).

        Returns:
            `tuple[float, float]`: Lower and upper end.

        Raises:
            `ValueError`: the probability is out of range.
        """
        return self._around(self.value, confidence)

    def corrected_interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """
        Confidence interval of what the number would be with any number of samples (Student's t).

        Args:
            confidence (`float`, defaults to 0.95): Probability that the interval holds, in (0, 1).

        Returns:
            `tuple[float, float]`: Lower and upper end.

        Raises:
            `ValueError`: the probability is out of range.
        """
        return self._around(self.corrected, confidence)

    def detectable(self, power: float = 0.8, confidence: float = 0.95) -> float:
        """
        The true number whose interval would exclude 0 with a given probability, at the error found (Student's t).

        Args:
            power (`float`, defaults to 0.8): That probability, in [0.5, 1).
            confidence (`float`, defaults to 0.95): Probability that the interval holds, in (0, 1).

        Returns:
            `float`: The number, without a sign.

        Raises:
            `ValueError`: a probability is out of range.
        """
        check_number("confidence", confidence, 0, 1, open_minimum=True, open_maximum=True)
        check_number("power", power, 0.5, 1, open_maximum=True)
        edges = stats.t.ppf([(1 + confidence) / 2, power], self.num_groups - 1)
        return float(edges.sum()) * self.error

    def _around(self, center: float, confidence: float) -> tuple[float, float]:
        check_number("confidence", confidence, 0, 1, open_minimum=True, open_maximum=True)
        margin = float(stats.t.ppf((1 + confidence) / 2, self.num_groups - 1)) * self.error
        return center - margin, center + margin


def jackknife(groups: list, estimate: Callable[[list], float]) -> Jackknife:
    """
    Leaves out each group of samples in turn (delete-a-group jackknife).

    A bootstrap would repeat samples, which adds a bias.

    Args:
        groups (`list`): The samples in g >= 2 random groups of about the same size. Groups that differ more than by
            chance, for example by class, make the error too large.
        estimate (`Callable[[list], float]`): Computes the number from all groups or from all but one.

    Returns:
        [`Jackknife`].

    Raises:
        `ValueError`: there are fewer than two groups.
    """
    check_at_least("len(groups)", len(groups), 2)
    without = [estimate(groups[:i] + groups[i + 1 :]) for i in range(len(groups))]
    return jackknife_of_values(estimate(groups), without)


def jackknife_of_values(value: float, without: Sequence[float] | np.ndarray) -> Jackknife:
    """
    The [`jackknife`] of numbers that are known.

    Args:
        value (`float`): The number of all samples.
        without (`Sequence[float]` or `np.ndarray` of shape `(g,)`): The number without each of g >= 2 groups.

    Returns:
        [`Jackknife`].

    Raises:
        `ValueError`: there are fewer than two groups.
    """
    number, without = len(without), np.asarray(without)
    check_at_least("len(without)", number, 2)
    corrected = float(number * value - (number - 1) * without.mean())
    return Jackknife(float(value), corrected, float(np.sqrt((number - 1) * without.var())), number)


def mean_interval(values: Sequence[float] | np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """
    Confidence interval of a mean (Student's t).

    Args:
        values (`Sequence[float]` or `np.ndarray` of shape `(n,)`): The n >= 2 independent numbers.
        confidence (`float`, defaults to 0.95): Probability that the interval holds, in (0, 1).

    Returns:
        `tuple[float, float]`: Lower and upper end.

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
        num_samples (`int`): Number of independent samples.
        confidence (`float`, defaults to 0.95): Probability that the interval holds, in (0, 1).

    Returns:
        `tuple[float, float]`: Lower and upper end, in [0, 1].

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
