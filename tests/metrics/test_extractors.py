# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Statistics of reference features, as files hold them, and the code of extractors."""

import sys

import numpy as np
import pytest
from helpers import says

from diffusers_dod.metrics.extractors import code_sha256, load_extractor, load_statistics
from diffusers_dod.metrics.frechet import feature_statistics


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("num_samples", [5, 1000])
def test_statistics_of_features_are_taken(tmp_path, dtype, num_samples):
    """Five samples have a singular covariance, and float32 rounds it."""
    features = np.random.default_rng(0).normal(size=(num_samples, 64)) * np.logspace(-3, 3, 64)
    mean, covariance = feature_statistics(features)
    np.savez(tmp_path / "statistics.npz", mu=mean.astype(dtype), sigma=covariance.astype(dtype))
    np.testing.assert_allclose(load_statistics(tmp_path / "statistics.npz")[1], covariance, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("covariance", "fragments"),
    [
        (np.array([[1.0, 2.0], [2.0, 1.0]]), ["positive semidefinite", "eigenvalue -1"]),
        (np.diag([1.0, -0.01]), ["positive semidefinite", "eigenvalue -0.01"]),
        (np.array([[1.0, 0.5], [0.0, 1.0]]), ["symmetric"]),
    ],
)
def test_what_is_no_covariance_is_refused(tmp_path, covariance, fragments):
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(2), sigma=covariance)
    with pytest.raises(ValueError, match=says("`fid_reference`", "`sigma`", "statistics.npz", *fragments)):
        load_statistics(tmp_path / "statistics.npz")


def test_the_hash_of_code_is_that_of_all_that_is_imported_from_its_folder(tmp_path):
    (tmp_path / "own_extractor.py").write_text("import own_neighbour\n\ndef extractor(images):\n    return images\n")
    (tmp_path / "own_neighbour.py").write_text("SCALE = 1\n")
    (tmp_path / "unused.py").write_text("")
    name = f"{tmp_path / 'own_extractor.py'}:extractor"
    load_extractor(name)
    before = code_sha256(name)
    (tmp_path / "unused.py").write_text("SCALE = 2\n")
    assert code_sha256(name) == before
    (tmp_path / "own_neighbour.py").write_text("SCALE = 2\n")
    assert code_sha256(name) != before
    assert code_sha256("inception") is None and code_sha256("dinov2") is None
    del sys.modules["own_neighbour"]
