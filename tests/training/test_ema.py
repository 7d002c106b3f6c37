"""Averages of the weights, and averages that are put together after the training."""

import math

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from helpers import says

from diffusers_dod.training.ema import PowerFunctionEMA, WeightAverage, power_of, reconstruction_weights


@pytest.mark.parametrize("sigma_rel", [0.02, 0.05, 0.1, 0.2, 0.28])
def test_the_width_of_the_profile(sigma_rel):
    gamma = power_of(sigma_rel)
    assert gamma > 0
    # Mean and variance of the density (gamma + 1) x^gamma on [0, 1].
    variance = (gamma + 1) / (gamma + 3) - ((gamma + 1) / (gamma + 2)) ** 2
    assert math.sqrt(variance) == pytest.approx(sigma_rel, rel=1e-6)


def averages(values: np.ndarray, sigma_rel: float) -> np.ndarray:
    """The power-function average of numbers after each step."""
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    ema, found = PowerFunctionEMA([parameter], sigma_rel), []
    for value in values:
        parameter.data.fill_(value)
        ema.step([parameter])
        found.append(float(ema.shadow_params[0]))
    return np.array(found)


def test_the_first_step_is_the_first_average():
    assert averages(np.array([3.0, 5.0]), 0.1)[0] == 3


def test_a_constant_stays():
    np.testing.assert_allclose(averages(np.full(50, 2.5), 0.05), 2.5)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.2])
def test_the_average_of_a_ramp_is_the_mean_of_the_profile(sigma_rel):
    """The average at step n of weights that grow with the step is n (gamma + 1) / (gamma + 2)."""
    gamma, steps = power_of(sigma_rel), 2000
    found = averages(np.arange(1, steps + 1, dtype=float), sigma_rel)
    assert found[-1] / steps == pytest.approx((gamma + 1) / (gamma + 2), rel=2e-3)
    assert found[steps // 2 - 1] / (steps // 2) == pytest.approx((gamma + 1) / (gamma + 2), rel=4e-3)


def test_a_snapshot_is_its_own_reconstruction():
    weights, rest = reconstruction_weights([(100, 0.05), (100, 0.1), (200, 0.05), (200, 0.1)], 200, 0.1)
    np.testing.assert_allclose(weights, [0, 0, 0, 1], atol=1e-6)
    assert rest < 1e-4


@pytest.mark.parametrize("sigma_rel", [0.06, 0.08, 0.12, 0.15])
def test_averages_of_other_lengths_come_from_snapshots_of_two(sigma_rel):
    steps, every = 1600, 100
    values = np.cumsum(np.random.default_rng(0).normal(size=steps)) + 5  # a random walk
    kept = {width: averages(values, width) for width in (0.05, 0.1)}
    snapshots = [(step, width) for step in range(every, steps + 1, every) for width in kept]
    weights, rest = reconstruction_weights(snapshots, steps, sigma_rel)
    found = sum(w * kept[width][step - 1] for w, (step, width) in zip(weights, snapshots, strict=True))
    expected = averages(values, sigma_rel)[-1]
    assert weights.sum() == pytest.approx(1, abs=2e-2) and rest < 0.05
    nearest = min(abs(kept[width][-1] - expected) for width in kept)
    assert abs(found - expected) < 0.2 * nearest + 0.02 * values.std()


def test_bad_reconstructions_are_refused():
    with pytest.raises(ValueError, match=says("`step`", "200", "got 300")):
        reconstruction_weights([(100, 0.05), (200, 0.05)], 300, 0.05)
    with pytest.raises(ValueError, match=says("`step`", "None", "got 1")):
        reconstruction_weights([], 1, 0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_is_that_of_diffusers_to_the_bit(dtype):
    """Over many steps, with a weight that is not trained, and in fp32 for weights in bf16."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in (3, 1000, 7)]
    weights[1].requires_grad_(False)
    ours, theirs = WeightAverage(weights, decay=0.999), EMAModel(weights, decay=0.999, foreach=True)
    for average in (ours, theirs):
        average.to(dtype=torch.float32)
    for _ in range(200):
        for weight in weights:
            weight.data += torch.randn(weight.shape, generator=generator).to(dtype)
        for average in (ours, theirs):
            average.step(weights)
    assert ours.cur_decay_value == theirs.cur_decay_value
    for average, expected in zip(ours.shadow_params, theirs.shadow_params, strict=True):
        assert average.dtype == torch.float32 and torch.equal(average, expected)


def test_the_decay_is_ramped_as_the_documentation_says():
    """By s / (s + 9), up to `--ema_decay`."""
    average = EMAModel(torch.nn.Linear(1, 1).parameters(), decay=0.9995)
    for step, decay in ((2000, 0.9955), (8000, 0.99888), (17_990, 0.9995), (17_991, 0.9995), (40_000, 0.9995)):
        assert average.get_decay(step) == pytest.approx(min(0.9995, step / (step + 9)), rel=1e-12)
        assert average.get_decay(step) == pytest.approx(decay, abs=5e-5)
    for decay, step in {0.999: 8991, 0.9995: 17_991, 0.9999: 89_991}.items():
        average.decay = decay
        assert average.get_decay(step - 1) < decay - 1e-12 and average.get_decay(step) == pytest.approx(
            decay, abs=1e-12
        )
