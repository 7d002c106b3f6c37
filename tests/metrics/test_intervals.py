# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Intervals against Student's, Wilson's and each other."""

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from helpers import says

from diffusers_dod.metrics.intervals import jackknife, mean_interval, wilson_interval
from diffusers_dod.metrics.precision_recall import PrecisionRecall


def test_the_jackknife_of_a_mean_is_the_usual_interval():
    values = np.random.default_rng(3).normal(5, 2, size=40)
    found = jackknife(list(values), lambda part: float(np.mean(part)))
    assert found.interval() == pytest.approx(mean_interval(values), rel=1e-9)
    assert found.corrected_interval() == pytest.approx(mean_interval(values), rel=1e-9)
    assert found.corrected == pytest.approx(found.value) == pytest.approx(values.mean())  # a mean has no bias
    margin = 2.0227 * values.std(ddof=1) / 40**0.5  # Student's t of 39 degrees of freedom
    assert mean_interval(values) == pytest.approx((values.mean() - margin, values.mean() + margin), rel=1e-4)
    assert mean_interval([1.0, 3.0]) == pytest.approx((2 - 12.706, 2 + 12.706), rel=1e-4)
    square = jackknife(list(values), lambda part: float(np.mean(part)) ** 2)
    assert square.corrected == pytest.approx(values.mean() ** 2 - values.var(ddof=1) / 40)  # the exact correction
    for values, name in (([1.0], "`len(values)`"), ([], "`len(values)`")):
        with pytest.raises(ValueError, match=says(name, ">= 2")):
            mean_interval(values)
    with pytest.raises(ValueError, match=says("`confidence`", "got 1")):
        mean_interval([1.0, 2.0], confidence=1)


def test_detectable_numbers_are_found_in_eight_of_ten():
    """Simulated means of normal numbers, and the effect that power tables give for ten differences."""
    for number in (10, 40):
        values = np.random.default_rng(0).normal(size=number)
        found = jackknife(list(values), lambda part: float(np.mean(part)))
        for power in (0.8, 0.9):
            effect = found.detectable(power) / found.error
            rng = np.random.default_rng(1)
            means, errors = rng.normal(effect, size=100_000), rng.chisquare(number - 1, size=100_000) / (number - 1)
            share = (np.abs(means) > scipy.stats.t.ppf(0.975, number - 1) * errors**0.5).mean()
            assert share == pytest.approx(power, abs=0.01)
    ten = jackknife(list(range(10)), lambda part: float(np.mean(part)))
    assert ten.detectable() / np.std(range(10), ddof=1) == pytest.approx(0.996, abs=0.002)
    with pytest.raises(ValueError, match=says("`power`", "got 1")):
        ten.detectable(power=1)


def test_intervals_of_shares():
    """Wilson's, by SciPy, which takes counts."""
    for number, total in ((30, 100), (0, 10), (7, 7), (1, 3)):
        for confidence in (0.95, 0.8):
            expected = scipy.stats.binomtest(number, total).proportion_ci(confidence, method="wilson")
            found = wilson_interval(number / total, total, confidence)
            assert found == pytest.approx((expected.low, expected.high), abs=1e-12)
            assert 0 <= found[0] <= number / total <= found[1] <= 1
    assert wilson_interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)  # a textbook's
    for arguments, name in (((1.5, 10), "`share`"), ((0.5, 0), "`num_samples`"), ((0.5, 9, 1.0), "`confidence`")):
        with pytest.raises(ValueError, match=says(name)):
            wilson_interval(*arguments)
    ours = PrecisionRecall(30, 100, 50, 50)
    assert ours.precision_interval() == wilson_interval(0.3, 100)
