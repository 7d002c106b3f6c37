# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Confidence intervals for any number (jackknife), for means (Student's t) and for shares (Wilson)."""

from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

from ..checks import check_at_least, check_number


def jackknife_interval(
    groups: list, estimate: Callable[[list], float], confidence: float = 0.95
) -> tuple[float, float]:
    """
    Confidence interval of a non-negative number, by the delete-a-group jackknife (Student's t).

    It says how far the number would move with as many other samples. The bias of the number, if it has any, is neither
    removed nor part of the interval. A bootstrap would repeat samples, which adds a bias.

    Args:
        groups (`list`): The samples in g >= 2 random groups of about the same size. Groups that differ more than by
            chance, for example by class, make the interval too wide.
        estimate (`Callable[[list], float]`): Computes the number from all groups or from all but one.
        confidence (`float`, defaults to 0.95): Probability that the interval holds, in (0, 1).

    Returns:
        `tuple[float, float]`: Lower and upper end; the lower one is at least 0.

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
