# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""KID against plain loops, its expectation in closed form, and its subsets."""

import itertools

import numpy as np
import pytest
from helpers import says

from diffusers_dod.metrics import kernel_distance as module
from diffusers_dod.metrics.intervals import mean_interval
from diffusers_dod.metrics.kernel_distance import KernelDistance, kernel_distance, squared_discrepancy


def rows(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def discrepancy_by_loops(samples: np.ndarray, reference: np.ndarray) -> float:
    """One pair after the other, in Python's numbers."""

    def kernel(a, b):
        return (sum(float(p) * float(q) for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    def within(features):
        pairs = list(itertools.permutations(features, 2))
        return sum(kernel(a, b) for a, b in pairs) / len(pairs)

    between = [kernel(a, b) for a in samples for b in reference]
    return within(samples) + within(reference) - 2 * sum(between) / len(between)


def mean_kernel_of_gaussians(mean_1: np.ndarray, mean_2: np.ndarray, std_1: float, std_2: float) -> float:
    """
    Mean of (a.b / d + 1)^3 for independent a ~ N(mean_1, std_1^2) and b ~ N(mean_2, std_2^2) in d dimensions.

    Given a, a.b / d + 1 is normal with mean s = a.mean_2 / d + 1 and variance v = std_2^2 |a|^2 / d^2, and the mean of
    its cube is s^3 + 3 s v. The rest are moments of a.
    """
    d = len(mean_1)
    center = mean_1 @ mean_2 / d + 1
    spread = std_1**2 * (mean_2 @ mean_2) / d**2  # variance of s
    square = mean_1 @ mean_1 + d * std_1**2  # E |a|^2
    covariance = 2 * std_1**2 * (mean_1 @ mean_2) / d  # of s and |a|^2
    return center**3 + 3 * center * spread + 3 * std_2**2 / d**2 * (center * square + covariance)


@pytest.mark.parametrize(("num_samples", "num_reference", "num_features"), [(2, 2, 1), (7, 5, 3), (4, 12, 6)])
def test_the_estimate_is_that_of_plain_loops(num_samples, num_reference, num_features):
    samples, reference = rows(num_samples, num_features), rows(num_reference, num_features, seed=1) * 2 + 0.5
    expected = discrepancy_by_loops(samples, reference)
    assert squared_discrepancy(samples, reference) == pytest.approx(expected, rel=1e-12)
    assert squared_discrepancy(samples.astype(np.float32), reference) == pytest.approx(expected, rel=1e-5)


def test_the_estimate_by_hand():
    """Features of one number: k(1, 1) = k(-1, -1) = 8, k(1, -1) = 0, k(2, 0) = 1."""
    assert squared_discrepancy(np.array([[1.0], [1.0]]), np.array([[-1.0], [-1.0]])) == 16
    assert squared_discrepancy(np.array([[1.0], [-1.0]]), np.array([[2.0], [0.0]])) == 0 + 1 - 2 * (27 + 1 - 1 + 1) / 4


def test_pairs_of_an_image_with_itself_do_not_count():
    samples = rows(50, 4)
    assert squared_discrepancy(samples, samples) < 0  # the biased estimate of a set and itself is 0


def test_the_expectation_in_closed_form():
    mean_1, mean_2, std_1, std_2 = np.array([0.5, -1.0, 0.3]), np.array([0.1, 0.4, -0.2]), 1.2, 0.7
    same = (
        mean_kernel_of_gaussians(mean_1, mean_1, std_1, std_1),
        mean_kernel_of_gaussians(mean_2, mean_2, std_2, std_2),
    )
    expected = sum(same) - 2 * mean_kernel_of_gaussians(mean_1, mean_2, std_1, std_2)
    rng = np.random.default_rng(0)
    found = [
        squared_discrepancy(mean_1 + std_1 * rng.normal(size=(20, 3)), mean_2 + std_2 * rng.normal(size=(30, 3)))
        for _ in range(4000)
    ]
    error = np.std(found) / 4000**0.5
    assert error < 0.03 * expected
    assert abs(np.mean(found) - expected) < 4 * error


@pytest.mark.parametrize("count", [2, 5, 40])
def test_it_is_zero_on_average_for_the_reference_itself_however_few_there_are(count):
    rng = np.random.default_rng(count)
    found = [squared_discrepancy(rng.normal(size=(count, 3)), rng.normal(size=(count, 3))) for _ in range(3000)]
    assert min(found) < 0 < max(found)
    assert abs(np.mean(found)) < 4 * np.std(found) / 3000**0.5


def test_it_grows_with_the_difference():
    reference = rows(400, 8)
    values = [squared_discrepancy(rows(300, 8, seed=1) + shift, reference) for shift in (0, 0.5, 1)]
    assert abs(values[0]) < 0.1 < values[1] < values[2]


# ------------------------------------------------------------------------------------------------------------ subsets


def test_every_image_is_in_one_subset(monkeypatch):
    subsets = []
    monkeypatch.setattr(module, "squared_discrepancy", lambda x, y: subsets.append((x, y)) or float(len(subsets)))
    samples, reference = np.arange(23.0)[:, None], np.arange(31.0)[:, None]
    assert kernel_distance(samples, reference, subset_size=5).subsets == (1, 2, 3, 4)
    for number, rows in enumerate((samples, reference)):
        parts = [subset[number] for subset in subsets]
        assert min(map(len, parts)) >= 5 and max(map(len, parts)) - min(map(len, parts)) <= 1
        assert sorted(np.concatenate(parts).tolist()) == rows.tolist()
        assert np.concatenate(parts).tolist() != rows.tolist()  # at random


def test_one_subset_is_everything():
    samples, reference = rows(30, 4), rows(40, 4, seed=1)
    found = kernel_distance(samples, reference, subset_size=30)
    assert found.subsets == pytest.approx([squared_discrepancy(samples, reference)])
    assert found.interval() is None and found.std == 0
    assert found.as_metrics(True)["kid"]["interval"] is None


def test_the_default_is_at_least_ten_subsets_of_up_to_a_thousand():
    for count, number in ((20, 10), (25, 12), (9000, 10), (10_000, 10), (12_500, 12)):
        assert len(kernel_distance(rows(count, 1), rows(12_500, 1, seed=1)).subsets) == number
    assert len(kernel_distance(rows(3, 1), rows(12, 1)).subsets) == 1


def test_the_seed_decides():
    samples, reference = rows(200, 4), rows(200, 4, seed=1)
    first, again, other = (kernel_distance(samples, reference, seed=seed).subsets for seed in (0, 0, 1))
    assert first == again != other


def test_the_subset_size_makes_no_difference_on_average():
    rng = np.random.default_rng(0)
    found = np.array(
        [
            [kernel_distance(x, y, subset_size=size).mean for size in (4, 20, 60)]
            for x, y in ((rng.normal(size=(60, 3)) + 0.4, rng.normal(size=(60, 3))) for _ in range(600))
        ]
    )
    errors = found.std(axis=0) / 600**0.5
    assert (np.abs(found.mean(axis=0) - found[:, 2].mean()) < 4 * errors).all()
    assert errors[0] > errors[2]  # small ones vary more


def test_intervals_hold_the_expectation_as_often_as_they_say():
    """For two normal distributions in one dimension, one of them moved by 1."""
    one, zero = np.ones(1), np.zeros(1)
    expected = mean_kernel_of_gaussians(one, one, 1, 1) + mean_kernel_of_gaussians(zero, zero, 1, 1)
    expected -= 2 * mean_kernel_of_gaussians(one, zero, 1, 1)
    rng = np.random.default_rng(0)
    drawn = [kernel_distance(rng.normal(size=(600, 1)) + 1, rng.normal(size=(600, 1))) for _ in range(400)]
    held = [low <= expected <= high for low, high in (distance.interval() for distance in drawn)]
    assert 0.9 < np.mean(held) < 0.98


def test_what_results_hold():
    distance = KernelDistance((1.0, 2.0, 4.5))
    assert distance.mean == 2.5 and distance.std == pytest.approx(np.std([1, 2, 4.5]))
    metric = distance.as_metrics(True)["kid"]
    assert metric["value"] == 2.5 and metric["num_subsets"] == 3 and metric["std"] == distance.std
    assert metric["interval"] == pytest.approx(mean_interval([1, 2, 4.5]))
    assert distance.as_metrics(False)["kid"]["interval"] is None


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ((rows(9, 2), rows(12, 2), 10), ["`subset_size`", "[2, 9]", "9 samples", "12 reference", "got 10"]),
        ((rows(12, 2), rows(9, 2), 10), ["`subset_size`", "[2, 9]", "12 samples", "9 reference", "got 10"]),
        ((rows(9, 2), rows(9, 2), 1), ["`subset_size`", ">= 2", "got 1"]),
        ((rows(9, 2), rows(9, 2), 3, -1), ["`seed`", ">= 0", "got -1"]),
        ((rows(9, 2), rows(9, 2), 3, 2**64), ["`seed`", f"{2**64 - 1}", f"got {2**64}"]),
        ((rows(1, 2), rows(9, 2)), ["`subset_size`", "1 samples"]),
        ((rows(9, 2), rows(9, 3), 9), ["`samples` and `reference`", "as many features", "2 and 3"]),
        ((rows(9, 2) + np.nan, rows(9, 2)), ["`samples`", "finite"]),
        ((rows(9, 2), rows(9, 2) * np.inf, 9), ["`reference`", "finite"]),
    ],
)
def test_what_is_refused(arguments, fragments):
    with pytest.raises(ValueError, match=says(*fragments)):
        kernel_distance(*arguments)
