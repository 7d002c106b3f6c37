# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Improved precision and recall, density and coverage against plain loops."""

import numpy as np
import pytest
from helpers import says

from diffusers_dod.metrics.intervals import mean_interval
from diffusers_dod.metrics.precision_recall import PrecisionRecall, ReferenceManifold


def precision_recall(samples: np.ndarray, reference: np.ndarray, **options) -> PrecisionRecall:
    return ReferenceManifold(reference, **options).compare(samples)


def naive(samples: np.ndarray, reference: np.ndarray, k: int = 3) -> tuple[float, float]:
    def share(points, others):
        rests = [np.delete(others, i, axis=0) for i in range(len(others))]
        radii = [np.sort(np.linalg.norm(rest - a, axis=1))[k - 1] for a, rest in zip(others, rests, strict=True)]
        return np.mean([any(np.linalg.norm(p - a) <= r for a, r in zip(others, radii, strict=True)) for p in points])

    return share(samples, reference), share(reference, samples)


def naive_density_coverage(samples: np.ndarray, reference: np.ndarray, k: int) -> tuple[float, float]:
    """By the definitions of the paper, one pair of points after the other."""
    num_pairs, covered = 0, set()
    for i, center in enumerate(reference):
        others = [np.linalg.norm(center - other) for j, other in enumerate(reference) if j != i]
        for point in samples:
            if np.linalg.norm(center - point) <= sorted(others)[k - 1]:
                num_pairs += 1
                covered.add(i)
    return num_pairs / (k * len(samples)), len(covered) / len(reference)


@pytest.fixture(scope="module")
def sets() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(60, 5)).astype(np.float32) + 50.4, rng.normal(size=(45, 5)).astype(np.float32) * 0.8 + 50


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_against_plain_loops(sets, k):
    expected = naive(*sets, k=k)
    assert 0.1 < expected[0] < 0.95 and 0.1 < expected[1] < 0.95 and expected[0] != expected[1]
    ours = precision_recall(*sets, num_neighbors=k)
    assert (ours.precision, ours.recall) == expected
    swapped = precision_recall(*sets[::-1], num_neighbors=k)
    assert (swapped.recall, swapped.precision) == expected


@pytest.mark.parametrize("k", [1, 5])
def test_density_and_coverage_against_plain_loops(sets, k):
    expected = naive_density_coverage(*sets, k)
    assert 0.1 < expected[0] < 2 and 0.1 < expected[1] < 1
    rng = np.random.default_rng(1)
    for block_size in (1, 7, 60):
        shuffled = [rng.permutation(rows) for rows in sets]
        ours = ReferenceManifold(shuffled[1], k, block_size).density_coverage(shuffled[0])
        assert (ours.density, ours.coverage) == pytest.approx(expected, rel=1e-12)
    metrics = ours.as_metrics(True)
    assert metrics["density"]["interval"] == pytest.approx(mean_interval(ours.num_balls / k))
    assert metrics["coverage"]["interval"] is None


def test_density_and_coverage_of_the_reference_distribution():
    """Density 1, and coverage 1 - 1/2^k (Naeem et al., 2020, Lemma 2, for many images)."""
    rng, found = np.random.default_rng(0), []
    for _ in range(20):
        manifold = ReferenceManifold(rng.normal(size=(300, 4)), 5)
        found.append(manifold.density_coverage(rng.normal(size=(300, 4))))
    assert np.mean([each.density for each in found]) == pytest.approx(1, abs=0.03)
    assert np.mean([each.coverage for each in found]) == pytest.approx(1 - 2**-5, abs=0.01)
    # An outlier among the samples adds nothing, unlike to recall.
    samples = rng.normal(size=(300, 4))
    few = manifold.density_coverage(samples)
    more = manifold.density_coverage(np.concatenate([samples, [[50.0] * 4]]))
    assert more.num_covered == few.num_covered and more.num_balls.tolist() == [*few.num_balls, 0]


def test_authentic_samples_by_the_definition(sets):
    """The samples that are further from their nearest reference image than that is from its own nearest one."""

    def is_authentic(point):
        distances = [np.linalg.norm(point - member) for member in reference]
        nearest = int(np.argmin(distances))
        others = [np.linalg.norm(reference[nearest] - member) for member in np.delete(reference, nearest, axis=0)]
        return min(others) < distances[nearest]

    samples, reference = (rows.astype(np.float64) for rows in sets)
    expected = sum(map(is_authentic, samples))
    assert 10 < expected < 55
    for block_size in (1, 7, 60):
        assert ReferenceManifold(reference, 1, block_size).count_authentic(samples) == expected
    copies = np.concatenate([samples, reference, reference[:3] + 1e-9])
    assert ReferenceManifold(reference, 1).count_authentic(copies) == expected
    # Halfway between a close pair and a lone image: a copy of the lone one, however the tie is broken.
    line = np.array([[0.0], [1.0], [21.0], [400.0]])
    for shift in (0.0, 1e5 / 3):
        assert ReferenceManifold(line + shift, 1).count_authentic(np.array([[11.0], [0.5]]) + shift) == 0


def test_nearest_images_by_sorting(sets):
    samples, reference = sets
    distances = np.linalg.norm(samples[:, None].astype(np.float64) - reference, axis=2)
    for block_size in (2, 7, 60):
        found, indices = ReferenceManifold(reference, 1, block_size).find_nearest(samples, 5)
        np.testing.assert_array_equal(indices, np.argsort(distances, axis=1)[:, :5])
        np.testing.assert_allclose(found, np.sort(distances, axis=1)[:, :5], rtol=1e-6)
    with pytest.raises(ValueError, match=says("`number`", "45", "got 46")):
        ReferenceManifold(reference, 1).find_nearest(samples, 46)


def test_samples_in_turn_with_one_reference(sets):
    manifold = ReferenceManifold(sets[1])
    for samples in (sets[0], sets[0][:30], sets[0]):
        assert manifold.compare(samples) == precision_recall(samples, sets[1])


@pytest.mark.parametrize("block_size", [1, 7, 60])
def test_blocks_and_order_make_no_difference(sets, block_size):
    rng = np.random.default_rng(1)
    shuffled = [rng.permutation(rows) for rows in sets]
    assert precision_recall(*shuffled, block_size=block_size) == precision_recall(*sets)


def test_equal_sets_have_both_at_one(sets):
    ours = precision_recall(sets[0], sets[0][::-1])
    assert ours == PrecisionRecall(60, 60, 60, 60)


def test_sets_of_copies_have_balls_of_radius_zero():
    """However far from the origin: what rounding leaves of a distance of 0 must not put copies outside."""
    copies = np.repeat(np.random.default_rng(0).normal(size=(30, 700)).astype(np.float32) * 100, 5, axis=0)
    shuffled = np.random.default_rng(1).permutation(copies)
    assert precision_recall(copies, shuffled, block_size=7) == PrecisionRecall(150, 150, 150, 150)
    near = copies + 1e-2
    assert precision_recall(near, copies) == PrecisionRecall(0, 150, 0, 150)


def test_dropped_modes_lower_recall_and_noise_lowers_precision():
    rng = np.random.default_rng(0)

    def draw(number, modes, std=1.0):
        return rng.normal(size=(number, 8)) * std + 20 * np.eye(8)[np.arange(number) % modes]

    reference = draw(400, 4)
    whole, dropped, noisy = (precision_recall(draw(400, *of), reference) for of in ((4,), (1,), (4, 2.0)))
    assert whole.precision > 0.8 and whole.recall > 0.8
    assert dropped.recall < 0.4 and dropped.precision > 0.8
    assert noisy.precision < 0.5 and noisy.recall > 0.8


def test_what_precision_and_recall_refuse(sets):
    with pytest.raises(ValueError, match=says("`samples`", "n >= 4", "got (3, 5)")):
        precision_recall(sets[0][:3], sets[1])
    with pytest.raises(ValueError, match=says("`reference`", "n >= 3", "got (2, 5)")):
        precision_recall(sets[0], sets[1][:2], num_neighbors=2)
    assert precision_recall(sets[0][:4], sets[1]).num_samples == 4
    with pytest.raises(ValueError, match=says("as many features", "got 5 and 4")):
        precision_recall(sets[0], sets[1][:, :4])
    broken = sets[1].copy()
    broken[2, 0] = np.nan
    with pytest.raises(ValueError, match=says("`reference`", "finite", "1 of 45")):
        precision_recall(sets[0], broken)
    with pytest.raises(ValueError, match=says("`num_neighbors`", ">= 1", "got 0")):
        precision_recall(*sets, num_neighbors=0)


@pytest.mark.parametrize("block_size", [9, 64, 2048])
def test_points_on_surfaces_are_within(block_size):
    """Integer features have many equal distances; plain loops over exact integers say which points are within."""
    rng = np.random.default_rng(0)
    reference, samples = (rng.integers(0, 4, size=(200, 5)) * 1.0 for _ in range(2))

    def count(points, members):
        distances = ((members[:, None] - members) ** 2).sum(axis=-1)
        radii = np.sort(distances, axis=1)[:, 3]
        return int((((points[:, None] - members) ** 2).sum(axis=-1) <= radii).any(axis=1).sum())

    distances = [((rows[:, None] - reference) ** 2).sum(axis=-1) for rows in (samples, reference)]
    is_within = distances[0] <= np.sort(distances[1], axis=1)[:, 3]
    expected = PrecisionRecall(count(samples, reference), 200, count(reference, samples), 200)
    for scale, shift in ((1, 0), (1 / 3, 1000.1)):  # neither is exact in floating point after the shift
        moved = [rows * scale + shift for rows in (reference, samples)]
        manifold = ReferenceManifold(moved[0], block_size=block_size)
        assert manifold.compare(moved[1]) == expected
        found = manifold.density_coverage(moved[1])
        assert found.num_balls.tolist() == is_within.sum(axis=1).tolist()
        assert found.num_covered == is_within.any(axis=0).sum()
