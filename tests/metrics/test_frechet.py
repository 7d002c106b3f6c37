import numpy as np
import pytest
import scipy.linalg

from diffusers_dod.metrics.frechet import feature_statistics, frechet_distance


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
