# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""The Inception Score against closed forms and plain loops."""

import warnings

import numpy as np
import pytest
import torch
from helpers import says

from diffusers_dod.metrics.inception_score import InceptionScore, RunningInceptionScore


def score(logits: np.ndarray, split_size: int = 5000, size: int = 64) -> InceptionScore:
    running = RunningInceptionScore(split_size)
    for start in range(0, len(logits), size):
        running.update(logits[start : start + size])
    return running.result()


def test_score_of_equal_predictions_is_one_and_of_k_certain_classes_is_k():
    assert score(np.zeros((100, 12))).mean == pytest.approx(1, abs=1e-12)
    certain = np.full((120, 13), -1e4)  # exp of it is exactly 0; and no image is of the last class
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


def test_scores_of_parts_are_merged_to_that_of_all():
    logits, places = np.random.default_rng(0).normal(size=(70, 4)), np.random.default_rng(1).permutation(70)
    parts = [RunningInceptionScore(20) for _ in range(3)]
    for part, indices in zip(parts, np.array_split(np.arange(70), 3), strict=True):
        part.update(logits[indices], places[indices])
    merged = RunningInceptionScore(20)
    for part in parts:
        merged.merge(part)
    assert merged.num_rows == 70
    ordered = logits[np.argsort(places)]
    assert merged.result().splits == pytest.approx(score(ordered, split_size=20).splits, rel=1e-12)
    with pytest.raises(ValueError, match=says("`other`", "20", "got 5000")):
        merged.merge(RunningInceptionScore())


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
