# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""The Fréchet distance against closed forms and SciPy, and its interval against plain loops."""

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from helpers import says

from diffusers_dod.metrics.frechet import as_fid, feature_statistics, fid_infinity, frechet_distance
from diffusers_dod.metrics.intervals import jackknife
from diffusers_dod.metrics.statistics import RunningStatistics


def accumulate(rows: np.ndarray, size: int) -> RunningStatistics:
    running = RunningStatistics()
    for start in range(0, len(rows), size):
        running.update(rows[start : start + size])
    return running


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2500, 6)).astype(np.float32) @ np.diag([1, 2, 3, 4, 5, 6]) + 3


def test_closed_form_for_diagonal_gaussians():
    mean_1, mean_2 = np.array([0.0, 1.0, -2.0]), np.array([1.0, 1.0, 0.0])
    std_1, std_2 = np.array([1.0, 2.0, 0.5]), np.array([3.0, 2.0, 0.0])
    expected = ((mean_1 - mean_2) ** 2).sum() + ((std_1 - std_2) ** 2).sum()
    assert frechet_distance(mean_1, np.diag(std_1**2), mean_2, np.diag(std_2**2)) == pytest.approx(expected)


def test_agrees_with_an_independent_matrix_root():
    rng = np.random.default_rng(0)
    sets = [rng.normal(size=(500, 16)) @ rng.normal(size=(16, 16)) + rng.normal(size=16) for _ in range(2)]
    (mean_1, cov_1), (mean_2, cov_2) = (feature_statistics(features) for features in sets)
    root = scipy.linalg.sqrtm(cov_1 @ cov_2).real
    expected = ((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1 + cov_2 - 2 * root)
    assert frechet_distance(mean_1, cov_1, mean_2, cov_2) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(mean_2, cov_2, mean_1, cov_1) == pytest.approx(expected, rel=1e-9)


def test_identical_and_rank_deficient_sets():
    features = np.random.default_rng(0).normal(size=(5, 20))  # fewer samples than dimensions
    statistics = feature_statistics(features)
    assert frechet_distance(*statistics, *statistics) == pytest.approx(0, abs=1e-6)


def test_statistics_are_float64_and_unbiased():
    features = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    mean, cov = feature_statistics(features)
    centred = features.astype(np.float64) - features.astype(np.float64).mean(axis=0)
    assert mean.dtype == cov.dtype == np.float64
    np.testing.assert_allclose(cov, centred.T @ centred / 6)


def test_bad_features_are_refused():
    with pytest.raises(ValueError, match=r"`features` must have shape \(n, d\) with n >= 2, got \(1, 4\)"):
        feature_statistics(np.zeros((1, 4)))
    features = np.zeros((5, 4))
    features[3, 1] = np.nan
    with pytest.raises(ValueError, match=r"`features` must be finite, got 1 of 5 rows"):
        feature_statistics(features)
    with pytest.raises(ValueError, match=r"`mean_1`.*got \(2,\), \(3,\)"):
        frechet_distance(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3))


def test_distance_of_gaussians_with_a_known_one():
    """N(0, 1) and N(m, s^2) in each dimension: the sum of m^2 + (s - 1)^2."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(200_000, 3)) * [1.0, 2.0, 0.5] + [0.0, 1.0, -2.0]
    measured = frechet_distance(*accumulate(rows, 5000).result(), np.zeros(3), np.eye(3))
    assert measured == pytest.approx(1 + 4 + 1 + 0.25, rel=0.01)


def test_distance_against_scipy(rows):
    other = rows[::2] ** 2 / 5
    (mean_1, cov_1), (mean_2, cov_2) = accumulate(rows, 64).result(), accumulate(other, 64).result()
    root = scipy.linalg.sqrtm(np.cov(rows, rowvar=False) @ np.cov(other, rowvar=False)).real
    expected = ((rows.mean(0) - other.mean(0)) ** 2).sum() + np.trace(
        np.cov(rows, rowvar=False) + np.cov(other, rowvar=False) - 2 * root
    )
    assert frechet_distance(mean_1, cov_1, mean_2, cov_2) == pytest.approx(expected, rel=1e-5)


def groups_of(rows: np.ndarray, number: int = 10) -> list[RunningStatistics]:
    return [accumulate(rows[i::number], 100) for i in range(number)]


def test_interval_is_the_jackknife_of_plain_loops(rows):
    reference = (np.zeros(6), np.eye(6))
    distances = [
        frechet_distance(*feature_statistics(np.delete(rows, np.s_[i::5], axis=0)), *reference) for i in range(5)
    ]
    error = np.sqrt(4 / 5 * ((np.array(distances) - np.mean(distances)) ** 2).sum())
    center = frechet_distance(*feature_statistics(rows), *reference)
    expected = (center - 2.7764451 * error, center + 2.7764451 * error)  # Student's t with 4 degrees of freedom
    found = as_fid("fid", groups_of(rows, 5), reference, True)
    assert found["fid"]["interval"] == pytest.approx(expected, rel=1e-6)
    assert found["fid_corrected"]["value"] == pytest.approx(5 * center - 4 * np.mean(distances), rel=1e-6)
    half_widths = [np.ptp(number["interval"]) / 2 for number in found.values()]
    assert half_widths == pytest.approx([2.7764451 * error] * 2, rel=1e-6)
    assert as_fid("fid", groups_of(rows, 5), reference, False) == {
        "fid": {"value": pytest.approx(center), "interval": None}
    }


def test_intervals_hold_what_they_are_said_to_hold():
    """The plain one the expected distance of as many samples, and the corrected one the distance of the model."""
    rng = np.random.default_rng(0)
    scales = np.array([1, 2, 0.5, 1])
    drawn = [rng.normal(size=(300, 4)) * scales + 0.3 for _ in range(200)]
    reference = (np.zeros(4), np.eye(4))
    expected = np.mean([frechet_distance(*feature_statistics(rows), *reference) for rows in drawn])
    exact = frechet_distance(np.full(4, 0.3), np.diag(scales.astype(float) ** 2), *reference)
    found = [as_fid("fid", groups_of(rows), reference, True) for rows in drawn]
    for name, center in (("fid", expected), ("fid_corrected", exact)):
        held = [low <= center <= high for low, high in (number[name]["interval"] for number in found)]
        assert 0.9 < np.mean(held) < 0.99
    bias = expected - exact
    assert bias > 5 * abs(np.mean([number["fid_corrected"]["value"] for number in found]) - exact)


def test_the_extrapolated_distance_by_plain_loops(rows):
    reference = (np.zeros(6), np.eye(6))
    groups = [rows[i::5] for i in range(5)]
    points = []
    for size in (3, 4):
        chosen = [np.concatenate([groups[(start + i) % 5] for i in range(size)]) for start in range(5)]
        distances = [frechet_distance(*feature_statistics(part), *reference) for part in chosen]
        points.append((np.mean([1 / len(part) for part in chosen]), np.mean(distances)))
    points.append((1 / len(rows), frechet_distance(*feature_statistics(rows), *reference)))
    x, y = np.array(points).T
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    assert fid_infinity(groups_of(rows, 5), reference) == pytest.approx(y.mean() - slope * x.mean(), rel=1e-6)
    with pytest.raises(ValueError, match=says("`len(groups)`", ">= 2", "got 1")):
        fid_infinity(groups_of(rows, 1), reference)


def test_the_extrapolated_distance_agrees_with_the_corrected_one():
    """Gaussians with a known distance, of which the plain one of 200 samples is far too large."""
    rng = np.random.default_rng(0)
    scales = np.linspace(0.5, 1.5, 10)
    reference = (np.zeros(10), np.eye(10), np.eye(10))
    exact = 10 * 0.1**2 + ((scales - 1) ** 2).sum()
    found = []
    for _ in range(12):
        groups = groups_of(rng.normal(size=(200, 10)) * scales + 0.1)
        numbers = as_fid("fid", groups, reference, True)
        found.append([fid_infinity(groups, reference), *(number["value"] for number in numbers.values())])
    infinity, plain, corrected = np.mean(found, axis=0)
    error = np.std(found, axis=0)[2] / 12**0.5
    assert plain - exact > 4 * error
    assert abs(infinity - exact) < 3 * error and abs(corrected - exact) < 3 * error
    assert abs(infinity - corrected) < 0.1 * (plain - exact)


def test_a_distance_lies_in_its_interval(rows):
    reference = accumulate(rows, 100).result()
    found = as_fid("fid", groups_of(rows), reference, True)["fid"]
    assert found["interval"][0] == 0 <= found["value"] <= found["interval"][1]


def test_what_intervals_refuse(rows):
    reference = (np.zeros(6), np.eye(6))
    with pytest.raises(ValueError, match=says("`len(groups)`", ">= 2", "got 1")):
        as_fid("fid", groups_of(rows, 1), reference, True)
    with pytest.raises(ValueError, match=says("`confidence`", "got 1")):
        jackknife([1.0, 2.0], np.mean).interval(confidence=1.0)


MEAN, COVARIANCE = np.zeros(2), np.eye(2)


@pytest.mark.parametrize(
    ("replaced", "exception", "fragments"),
    [
        ({"mean_1": [0.0, 0.0]}, TypeError, ["`mean_1`", "ndarray", "got [0.0, 0.0]"]),
        ({"cov_2": None}, TypeError, ["`cov_2`", "ndarray", "got None"]),
        ({"mean_2": np.array(["a", "b"])}, TypeError, ["`mean_2`", "real numbers"]),
        ({"cov_1": COVARIANCE * 1j}, TypeError, ["`cov_1`", "real numbers", "complex128"]),
        ({"cov_1": COVARIANCE * np.nan}, ValueError, ["`cov_1`", "finite"]),
        ({"mean_1": np.zeros((2, 1)), "mean_2": np.zeros((2, 1))}, ValueError, ["shape (d,)", "(2, 1)"]),
        ({"mean_1": np.zeros(()), "mean_2": np.zeros(())}, ValueError, ["shape (d,)", "()"]),
        ({"cov_2": np.eye(3)}, ValueError, ["(d, d)", "(3, 3)"]),
    ],
)
def test_what_are_no_statistics(replaced, exception, fragments):
    arguments = {"mean_1": MEAN, "cov_1": COVARIANCE, "mean_2": MEAN, "cov_2": COVARIANCE}
    with pytest.raises(exception, match=says(*fragments)):
        frechet_distance(**{**arguments, **replaced})
