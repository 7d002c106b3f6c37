# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Mean and covariance against NumPy."""

import warnings

import numpy as np
import pytest
from helpers import says

from diffusers_dod.metrics.statistics import RunningStatistics, merge_statistics


def accumulate(rows: np.ndarray, size: int) -> RunningStatistics:
    running = RunningStatistics()
    for start in range(0, len(rows), size):
        running.update(rows[start : start + size])
    return running


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2500, 6)).astype(np.float32) @ np.diag([1, 2, 3, 4, 5, 6]) + 3


def test_statistics_of_chunks_are_those_of_all_rows(rows):
    mean, cov = accumulate(rows, 300).result()
    assert mean.dtype == cov.dtype == np.float64
    np.testing.assert_allclose(mean, rows.astype(np.float64).mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(cov, np.cov(rows.astype(np.float64), rowvar=False), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 7, 1024, 2500])
def test_the_size_of_chunks_makes_no_difference_at_all(rows, size):
    for ours, theirs in zip(accumulate(rows, size).result(), accumulate(rows, 300).result(), strict=True):
        assert np.array_equal(ours, theirs)


def test_the_order_of_rows_makes_a_difference_of_rounding_only(rows):
    shuffled = np.random.default_rng(1).permutation(rows)
    np.testing.assert_allclose(accumulate(shuffled, 300).result()[1], accumulate(rows, 300).result()[1], atol=1e-12)


def test_a_mean_far_from_zero_cancels_nothing(rows):
    """The sum of squares over n less the squared mean would have no digit left."""
    _, cov = accumulate(rows.astype(np.float64) + 1e8, 300).result()
    np.testing.assert_allclose(cov, np.cov(rows.astype(np.float64), rowvar=False), rtol=1e-6, atol=1e-6)


def test_merged_statistics(rows):
    parts = [accumulate(rows[:10], 3), RunningStatistics(), accumulate(rows[10:1300], 50), accumulate(rows[1300:], 50)]
    before = parts[2].result()
    merged = merge_statistics(parts)
    assert merged.num_rows == 2500
    np.testing.assert_allclose(merged.result()[1], np.cov(rows.astype(np.float64), rowvar=False), atol=1e-12)
    assert np.array_equal(parts[2].result()[1], before[1])
    merged.update(rows)  # goes on
    assert merged.num_rows == 5000
    np.testing.assert_allclose(merged.result()[0], rows.astype(np.float64).mean(axis=0), rtol=1e-12)


def test_what_statistics_refuse(rows):
    running = accumulate(rows[:5], 5)
    with pytest.raises(ValueError, match=says("`rows`", "length 6", "got 4")):
        running.update(np.zeros((2, 4)))
    with pytest.raises(ValueError, match=says("`rows`", "finite", "got 1 of 2")):
        running.update(np.array([[0.0] * 6, [0.0] * 5 + [np.nan]]))
    with pytest.raises(ValueError, match=says("`rows`", "shape (n, d)", "got (6,)")):
        running.update(np.zeros(6))
    with pytest.raises(ValueError, match=says("`other`", "length 6", "got 4")):
        running.merge(accumulate(np.zeros((2, 4)), 2))
    with pytest.raises(ValueError, match=says("two or more", "got 1")):
        accumulate(rows[:1], 1).result()


def test_fewer_rows_than_features_are_warned_of(rows):
    with pytest.warns(UserWarning, match=says("6 features", "6 images", "no full rank")):
        accumulate(rows[:6], 6).result()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accumulate(rows[:7], 7).result()
