"""Metrics against closed forms, plain loops and SciPy."""

import warnings

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from helpers import says

from diffusers_dod.metrics.frechet import feature_statistics, fid_interval, frechet_distance
from diffusers_dod.metrics.inception_score import InceptionScore, RunningInceptionScore
from diffusers_dod.metrics.intervals import jackknife_interval, mean_interval, wilson_interval
from diffusers_dod.metrics.precision_recall import PrecisionRecall, ReferenceManifold, precision_recall
from diffusers_dod.metrics.statistics import RunningStatistics, merge_statistics


def accumulate(rows: np.ndarray, size: int) -> RunningStatistics:
    running = RunningStatistics()
    for start in range(0, len(rows), size):
        running.update(rows[start : start + size])
    return running


def score(logits: np.ndarray, split_size: int = 5000, size: int = 64) -> InceptionScore:
    running = RunningInceptionScore(split_size)
    for start in range(0, len(logits), size):
        running.update(logits[start : start + size])
    return running.result()


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2500, 6)).astype(np.float32) @ np.diag([1, 2, 3, 4, 5, 6]) + 3


# Statistics


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
    with pytest.warns(UserWarning, match=says("6 features", "6 pictures", "no full rank")):
        accumulate(rows[:6], 6).result()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accumulate(rows[:7], 7).result()


# Intervals of the distance


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
    assert fid_interval(groups_of(rows, 5), reference) == pytest.approx(expected, rel=1e-6)


def test_the_jackknife_of_a_mean_is_the_usual_interval():
    values = np.random.default_rng(3).normal(5, 2, size=40)
    found = jackknife_interval(list(values), lambda part: float(np.mean(part)))
    assert found == pytest.approx(mean_interval(values), rel=1e-9)
    margin = 2.0227 * values.std(ddof=1) / 40**0.5  # Student's t of 39 degrees of freedom
    assert mean_interval(values) == pytest.approx((values.mean() - margin, values.mean() + margin), rel=1e-4)
    assert mean_interval([1.0, 3.0]) == pytest.approx((2 - 12.706, 2 + 12.706), rel=1e-4)
    assert jackknife_interval([-1.0, 0.0, 1.0], lambda part: float(np.mean(part)))[0] == 0
    for values, name in (([1.0], "`len(values)`"), ([], "`len(values)`")):
        with pytest.raises(ValueError, match=says(name, ">= 2")):
            mean_interval(values)
    with pytest.raises(ValueError, match=says("`confidence`", "got 1")):
        mean_interval([1.0, 2.0], confidence=1)


def test_intervals_hold_the_expected_distance_as_often_as_they_say():
    rng = np.random.default_rng(0)
    drawn = [rng.normal(size=(300, 4)) * [1, 2, 0.5, 1] + 0.3 for _ in range(200)]
    reference = (np.zeros(4), np.eye(4))
    expected = np.mean([frechet_distance(*feature_statistics(rows), *reference) for rows in drawn])
    held = [low <= expected <= high for low, high in (fid_interval(groups_of(rows), reference) for rows in drawn)]
    assert 0.9 < np.mean(held) < 0.99


def test_interval_is_never_below_zero_and_grows_with_confidence(rows):
    reference = accumulate(rows, 100).result()
    low, high = fid_interval(groups_of(rows), reference)
    assert low == 0 < high
    assert fid_interval(groups_of(rows), reference, confidence=0.99)[1] > high


def test_what_intervals_refuse(rows):
    reference = (np.zeros(6), np.eye(6))
    with pytest.raises(ValueError, match=says("`len(groups)`", ">= 2", "got 1")):
        fid_interval(groups_of(rows, 1), reference)
    with pytest.raises(ValueError, match=says("`confidence`", "got 1")):
        fid_interval(groups_of(rows), reference, confidence=1.0)


# Inception Score


def test_score_of_equal_predictions_is_one_and_of_k_certain_classes_is_k():
    assert score(np.zeros((100, 12))).mean == pytest.approx(1, abs=1e-12)
    certain = np.full((120, 13), -1e4)  # exp of it is exactly 0; and no picture is of the last class
    certain[np.arange(120), np.arange(120) % 12] = 0
    assert score(certain).mean == pytest.approx(12, rel=1e-12)


def test_score_against_plain_loops():
    logits = np.random.default_rng(0).normal(size=(250, 7)) * 3
    expected = []
    for start in (0, 100, 200):  # the last split has the 50 that are left
        part = np.array([np.exp(row) / np.exp(row).sum() for row in logits[start : start + 100]])
        mean = part.mean(axis=0)
        expected.append(np.exp(np.mean([sum(p * (np.log(p) - np.log(mean))) for p in part])))
    for size in (1, 64, 250):
        ours = score(logits, split_size=100, size=size)
        np.testing.assert_allclose(ours.splits, expected, rtol=1e-12)
    assert ours.mean == pytest.approx(np.mean(expected)) and ours.std == pytest.approx(np.std(expected))
    low, high = ours.interval()
    margin = 4.3026527 * np.std(expected, ddof=1) / 3**0.5  # Student's t with 2 degrees of freedom
    assert (low, high) == pytest.approx((ours.mean - margin, ours.mean + margin))


def test_one_split_has_no_interval_and_its_order_does_not_matter():
    logits = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    ours = score(logits.numpy())
    assert len(ours.splits) == 1 and ours.interval() is None and ours.std == 0
    assert score(logits.flip(0).numpy()).mean == pytest.approx(ours.mean, rel=1e-12)


def test_a_split_of_exactly_its_size_leaves_nothing_over():
    assert len(score(np.zeros((200, 3)), split_size=100).splits) == 2


def test_what_scores_refuse():
    running = RunningInceptionScore()
    with pytest.raises(ValueError, match="`logits`.*got none"):
        running.result()
    running.update(np.zeros((2, 3)))
    with pytest.raises(ValueError, match=says("`logits`", "3 classes", "got 4")):
        running.update(np.zeros((2, 4)))
    with pytest.raises(ValueError, match=says("`logits`", "finite")):
        running.update(np.array([[np.inf, 0, 0]]))
    with pytest.raises(ValueError, match=says("`split_size`", ">= 1", "got 0")):
        RunningInceptionScore(0)


def test_places_in_another_order_than_that_of_the_samples():
    logits = np.random.default_rng(5).normal(size=(230, 4)) * 3
    places = np.random.default_rng(6).permutation(230)
    running = RunningInceptionScore(100)
    for start in range(0, 230, 48):
        running.update(logits[places[start : start + 48]], places[start : start + 48])
    with pytest.warns(UserWarning, match=says("30 samples", "those of 100", "multiple of 100")):
        assert running.result().splits == pytest.approx(score(logits, 100).splits, rel=1e-12)


def test_splits_of_one_size_are_not_warned_of():
    logits = np.random.default_rng(5).normal(size=(200, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(score(logits, 100).splits) == 2
        assert len(score(logits[:70], 100).splits) == 1


# Precision and recall


def naive(samples: np.ndarray, reference: np.ndarray, k: int = 3) -> tuple[float, float]:
    def share(points, others):
        rests = [np.delete(others, i, axis=0) for i in range(len(others))]
        radii = [np.sort(np.linalg.norm(rest - a, axis=1))[k - 1] for a, rest in zip(others, rests, strict=True)]
        return np.mean([any(np.linalg.norm(p - a) <= r for a, r in zip(others, radii, strict=True)) for p in points])

    return share(samples, reference), share(reference, samples)


@pytest.fixture(scope="module")
def sets() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(60, 5)).astype(np.float32) + 50.4, rng.normal(size=(45, 5)).astype(np.float32) * 0.8 + 50


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_against_plain_loops(sets, k):
    expected = naive(*sets, k=k)
    assert 0.1 < expected[0] < 0.95 and 0.1 < expected[1] < 0.95 and expected[0] != expected[1]
    ours = precision_recall(*sets, num_neighbours=k)
    assert (ours.precision, ours.recall) == expected
    swapped = precision_recall(*sets[::-1], num_neighbours=k)
    assert (swapped.recall, swapped.precision) == expected


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


def test_what_precision_and_recall_refuse(sets):
    with pytest.raises(ValueError, match=says("`samples`", "n >= 4", "got (3, 5)")):
        precision_recall(sets[0][:3], sets[1])
    with pytest.raises(ValueError, match=says("`reference`", "n >= 3", "got (2, 5)")):
        precision_recall(sets[0], sets[1][:2], num_neighbours=2)
    assert precision_recall(sets[0][:4], sets[1]).num_samples == 4
    with pytest.raises(ValueError, match=says("as many features", "got 5 and 4")):
        precision_recall(sets[0], sets[1][:, :4])
    broken = sets[1].copy()
    broken[2, 0] = np.nan
    with pytest.raises(ValueError, match=says("`reference`", "finite", "1 of 45")):
        precision_recall(sets[0], broken)
    with pytest.raises(ValueError, match=says("`num_neighbours`", ">= 1", "got 0")):
        precision_recall(*sets, num_neighbours=0)
