import math

import pytest
import torch

from diffusers_dod import rectified_flow as rf


def test_the_path_starts_at_the_data_and_ends_in_noise():
    sample, noise = torch.full((2, 3), 5.0), torch.full((2, 3), -1.0)
    torch.testing.assert_close(rf.interpolate(sample, noise, 0.0), sample)
    torch.testing.assert_close(rf.interpolate(sample, noise, 1.0), noise)
    torch.testing.assert_close(
        rf.interpolate(sample, noise, torch.tensor([0.25, 0.5])), torch.tensor([[3.5], [2.0]]).expand(2, 3)
    )


def test_the_velocity_is_the_derivative_of_the_path():
    sample, noise = torch.randn(2, 4, 5, dtype=torch.float64), torch.randn(2, 4, 5, dtype=torch.float64)
    sigma = torch.tensor(0.3, dtype=torch.float64)
    path = lambda sigma: rf.interpolate(sample, noise, sigma)  # noqa: E731
    derivative = torch.func.jvp(path, (sigma,), (torch.ones_like(sigma),))[1]
    torch.testing.assert_close(rf.velocity_target(sample, noise), derivative)
    assert torch.equal(rf.velocity_target(torch.zeros(1), torch.ones(1)), torch.ones(1))  # towards noise


def test_the_noise_is_recovered_from_the_velocity():
    sample, noise, sigma = torch.randn(3, 2), torch.randn(3, 2), torch.tensor([0.0, 0.4, 1.0])
    noisy = rf.interpolate(sample, noise, sigma)
    torch.testing.assert_close(rf.noise_from_velocity(noisy, rf.velocity_target(sample, noise), sigma), noise)


def test_an_euler_step_along_a_straight_path_is_exact_in_both_directions():
    sample, noise = torch.randn(2, 3), torch.randn(2, 3)
    velocity = rf.velocity_target(sample, noise)
    torch.testing.assert_close(rf.euler_step(noise, velocity, torch.tensor(1.0), torch.tensor(0.0)), sample)
    torch.testing.assert_close(rf.euler_step(sample, velocity, torch.tensor(0.0), torch.tensor(1.0)), noise)


def test_logit_normal_times():
    assert rf.logit_normal_sigma(torch.tensor(0.0)) == 0.5
    assert rf.logit_normal_sigma(torch.tensor(math.log(3.0))) == pytest.approx(0.75)
    sigma = rf.logit_normal_sigma(torch.randn(200_000, generator=torch.Generator().manual_seed(0)))
    assert ((sigma > 0) & (sigma < 1)).all()
    # P(sigma < q) = Phi(logit q); the quartiles of a standard normal are at +-0.67449.
    quartile = 1 / (1 + math.exp(0.67449))
    assert (sigma < quartile).double().mean() == pytest.approx(0.25, abs=0.005)
