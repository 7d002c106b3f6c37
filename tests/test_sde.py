"""The SDEs against known answers: SiT's own solvers, single steps by hand, and the laws of Gaussian data."""

import itertools
import math

import pytest
import torch
from golden_data import GAUSSIAN, gaussian_velocity
from helpers import SDE_SOLVERS, says

from diffusers_dod import DoDFlowMatchScheduler
from diffusers_dod.sde import DIFFUSION_FORMS, LAST_STEPS, Diffusion


FORMS = ("constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing")
each_sde = pytest.mark.parametrize("solver", SDE_SOLVERS)
each_form = pytest.mark.parametrize("form", FORMS)


def diffusion(form: str, sigma: float, norm: float = 1.0) -> float:
    return {
        "constant": norm,
        "SBDM": norm * sigma / (1 - sigma),
        "sigma": norm * sigma,
        "linear": norm * sigma,
        "decreasing": 0.25 * (1 - norm * math.cos(math.pi * sigma)) ** 2,
        "increasing-decreasing": norm * math.sin(math.pi * sigma) ** 2,
    }[form]


def test_forms_and_last_steps_are_those_tested_here():
    assert DIFFUSION_FORMS == FORMS and tuple(LAST_STEPS) == ("mean", "euler", "tweedie", "none")


@each_form
@pytest.mark.parametrize("norm", [1.0, 0.3])
def test_diffusion_is_that_of_its_form(form, norm):
    for sigma in (0.04, 0.5, 0.9):
        assert Diffusion(form, norm).over_sigma(sigma) * sigma == pytest.approx(diffusion(form, sigma, norm))
        scale = math.sqrt(2 * diffusion(form, sigma, norm) * 0.03)
        assert Diffusion(form, norm).noise_scale(sigma, sigma - 0.03) == pytest.approx(scale)
    assert Diffusion(form, norm).noise_scale(0.0, 0.0) == 0
    assert Diffusion(form, norm).is_bounded(1.0) == (form != "SBDM") and Diffusion(form, norm).is_bounded(0.999)


def test_a_form_that_is_none_is_refused():
    with pytest.raises(ValueError, match=says("`form`", "'increasing-decreasing'", "got 'Sigma'")):
        Diffusion("Sigma", 1.0).over_sigma(0.5)


@each_form
def test_the_drift_is_the_velocity_less_the_diffusion_times_the_score(form):
    """The score of N(mean, std^2) data is -(x - (1 - sigma) mean) / variance."""
    sample, sigma = torch.linspace(-2, 2, 9, dtype=torch.float64), 0.3
    velocity = scalar_velocity(sample, torch.tensor(1000 * sigma, dtype=torch.float64))
    score = -(sample - (1 - sigma) * MEAN) / (((1 - sigma) * STD) ** 2 + sigma**2)
    expected = velocity - diffusion(form, sigma, 0.7) * score
    torch.testing.assert_close(Diffusion(form, 0.7).drift(sample, velocity, sigma), expected)


def walk(scheduler: DoDFlowMatchScheduler, velocity_fn, sample: torch.Tensor, draws) -> torch.Tensor:
    """Steps to the end with the noise of `draws`, one for each interval that ends, and zeros when there is no more."""
    draws = iter(draws)
    evaluations = 2 if scheduler.config.solver == "stochastic_heun" else 1
    for index, timestep in enumerate(scheduler.timesteps):
        noise = torch.zeros_like(sample)
        if index % evaluations == evaluations - 1:
            noise = next(draws, noise)
        sample = scheduler.step(velocity_fn(sample, timestep), timestep, sample, variance_noise=noise).prev_sample
    return sample


@pytest.mark.parametrize(
    ("solver", "form", "last_step"),
    [
        ("Euler", "sigma", "Mean"),
        ("Euler", "linear", "Mean"),
        ("Euler", "constant", "Mean"),
        ("Euler", "decreasing", "Mean"),
        ("Euler", "sigma", "Tweedie"),
        ("Euler", "sigma", "Euler"),
        ("Euler", "sigma", "None"),
        ("Heun", "sigma", "Mean"),
    ],
)
def test_sde_solvers_agree_with_sit(solver, form, last_step):
    name = f"sde_{solver}_{form}_last{last_step}_n20"
    scheduler = DoDFlowMatchScheduler(
        solver={"Euler": "euler_maruyama", "Heun": "stochastic_heun"}[solver],
        diffusion_form=form,
        last_step=last_step.lower(),
    )
    scheduler.set_timesteps(19 if last_step == "None" else 20)
    sample, draws = GAUSSIAN["noise"], list(GAUSSIAN["sde_noise_n20"])
    if solver == "Heun":  # whose first noise we have in the initial sample
        sample = sample + math.sqrt(scheduler.init_noise_sigma**2 - 1) * draws.pop(0)
    sample = walk(scheduler, gaussian_velocity, sample, draws)
    torch.testing.assert_close(sample, GAUSSIAN[name], atol=5e-6, rtol=0)
    # SiT evaluates the model twice, for the drift and for the score, but for a last step that needs one of them.
    assert len(scheduler.timesteps) == math.ceil(int(GAUSSIAN[f"{name}.nfe"]) / 2)


def test_no_recorded_sde_is_left_out():
    recorded = {name for name in GAUSSIAN if name.startswith("sde_") and name.endswith(".nfe")}
    assert len(recorded) == len(test_sde_solvers_agree_with_sit.pytestmark[0].args[1])


STEP = dict(sample=torch.tensor([[0.5, -1.0]]), velocity=torch.tensor([[2.0, 0.7]]), noise=torch.tensor([[0.3, -1.1]]))


def first_steps(number: int = 1, sigmas=(0.9, 0.5, 0.2), noise=STEP["noise"], **config) -> torch.Tensor:
    """A few evaluations, all with the same velocity."""
    scheduler = DoDFlowMatchScheduler(**config)
    scheduler.set_timesteps(sigmas=sigmas)
    sample = STEP["sample"]
    for timestep in scheduler.timesteps[:number]:
        sample = scheduler.step(STEP["velocity"], timestep, sample, variance_noise=noise).prev_sample
    return sample


@each_form
@pytest.mark.parametrize("norm", [1.0, 0.3])
def test_drift_and_noise_are_those_of_the_diffusion(form, norm):
    config = dict(diffusion_form=form, diffusion_norm=norm)
    sample, velocity, noise = STEP.values()
    w = diffusion(form, 0.9, norm)

    def drift(x, sigma):  # the score is the noise over -sigma
        return velocity + diffusion(form, sigma, norm) / sigma * (x + (1 - sigma) * velocity)

    expected = sample - 0.4 * drift(sample, 0.9)
    actual = first_steps(solver="euler_maruyama", **config)
    torch.testing.assert_close(actual, expected + math.sqrt(2 * w * 0.4) * noise)
    predicted = first_steps(solver="stochastic_heun", **config)
    torch.testing.assert_close(predicted, expected)
    # The stochastic Heun solver adds the noise of the next interval, from 0.5 to 0.2, before that begins.
    expected = sample - 0.4 * (drift(sample, 0.9) + drift(expected, 0.5)) / 2
    actual = first_steps(2, solver="stochastic_heun", **config)
    torch.testing.assert_close(actual, expected + math.sqrt(2 * diffusion(form, 0.5, norm) * 0.3) * noise)
    scheduler = DoDFlowMatchScheduler(solver="stochastic_heun", **config)
    scheduler.set_timesteps(sigmas=[0.9, 0.5, 0.2])
    assert scheduler.init_noise_sigma == pytest.approx(math.sqrt(1 + 2 * w * 0.4))


@each_sde
@pytest.mark.parametrize("start", [1.0, 0.9995])
def test_an_infinite_diffusion_is_replaced_by_the_ode(solver, start):
    sigmas, config = (start, 0.5, 0.2), dict(solver=solver, diffusion_form="SBDM")
    if solver == "euler_maruyama":
        assert torch.equal(first_steps(1, sigmas, **config), first_steps(1, sigmas, solver="euler"))
    else:
        actual = first_steps(2, sigmas, noise=torch.zeros(1, 2), **config)
        assert torch.equal(actual, first_steps(2, sigmas, solver="heun"))
        scheduler = DoDFlowMatchScheduler(**config)
        scheduler.set_timesteps(sigmas=sigmas)
        assert scheduler.init_noise_sigma == 1


@each_sde
@pytest.mark.parametrize("last_step", LAST_STEPS)
def test_last_step(solver, last_step):
    for form in FORMS:
        check_last_step(solver, form, last_step)


def check_last_step(solver, form, last_step):
    scheduler = DoDFlowMatchScheduler(solver=solver, diffusion_form=form, last_step=last_step)
    scheduler.set_timesteps(sigmas=[0.8, 0.3])
    sample, velocity, noise = STEP.values()
    actual = scheduler.step(velocity, scheduler.timesteps[-1], sample, variance_noise=noise).prev_sample
    if last_step in ("euler", "tweedie"):
        expected = sample - 0.3 * velocity
    else:
        w = diffusion(form, 0.3)
        expected = sample - 0.3 * (velocity + w / 0.3 * (sample + 0.7 * velocity))
        if last_step == "none" and solver == "euler_maruyama":  # the other has added it before
            expected = expected + math.sqrt(2 * w * 0.3) * noise
    torch.testing.assert_close(actual, expected, msg=lambda text: f"{form}: {text}")

    if solver == "stochastic_heun":
        # The last step from a noise of diffusion 1 forgets where it began.
        scheduler = DoDFlowMatchScheduler(solver=solver, diffusion_form=form, diffusion_norm=0.5, last_step=last_step)
        scheduler.set_timesteps(sigmas=[0.8, 0.3])
        with_noise, without = (
            walk(scheduler, lambda x, t: velocity, sample, draws) for draws in ([noise], [torch.zeros(1, 2)])
        )
        assert torch.equal(with_noise, without) == (last_step != "none"), form


@pytest.mark.parametrize(("solver", "ode_solver"), [("euler_maruyama", "euler"), ("stochastic_heun", "heun")])
def test_no_diffusion_is_the_ode(solver, ode_solver):
    for form in ("constant", "sigma", "linear", "SBDM", "increasing-decreasing"):
        stochastic = DoDFlowMatchScheduler(solver=solver, diffusion_form=form, diffusion_norm=0)
        stochastic.set_timesteps(8)
        grid = stochastic.sigmas[:-1]
        deterministic = DoDFlowMatchScheduler(solver=ode_solver)
        deterministic.set_timesteps(sigmas=grid)
        assert stochastic.init_noise_sigma == 1
        sample = expected = GAUSSIAN["noise"]
        for index, timestep in enumerate(stochastic.timesteps):
            if timestep == 40 and ode_solver == "heun" and index == len(stochastic.timesteps) - 1:
                deterministic = DoDFlowMatchScheduler()  # the last step is one of Euler
                deterministic.set_timesteps(sigmas=grid)
            sample = stochastic.step(gaussian_velocity(sample, timestep), timestep, sample).prev_sample
            expected = deterministic.step(gaussian_velocity(expected, timestep), timestep, expected).prev_sample
            assert torch.equal(sample, expected)


MEAN, STD = 0.6, 0.5


def scalar_velocity(sample: torch.Tensor, timestep: torch.Tensor, indices=None) -> torch.Tensor:
    sigma = float(timestep) / 1000
    data, variance = 1 - sigma, ((1 - sigma) * STD) ** 2 + sigma**2
    return -(MEAN + (data * STD**2 - sigma) / variance * (sample - data * MEAN))


def law(num_inference_steps: int, **config) -> torch.Tensor:
    """
    Mean and variance of all that a scheduler can draw, (2,): what it computes of the initial sample and of its draws
    is affine for Gaussian data, so that one element for each of them tells the coefficients.
    """
    scheduler = DoDFlowMatchScheduler(**config)
    scheduler.set_timesteps(num_inference_steps)
    units = torch.eye(num_inference_steps + 2)[:, None]
    ends = walk(scheduler, scalar_velocity, units[0], units[1:])[0].double()
    mean = ends[-1]
    initial, *others = (ends[:-1] - mean).square()
    return torch.stack([mean, scheduler.init_noise_sigma**2 * initial + sum(others)])


def law_in_the_limit(**config) -> torch.Tensor:
    """Without the first order of the steps' size, by Richardson's extrapolation."""
    return 2 * law(120, **config) - law(60, **config)


def exact_law(form: str, last_step: str, sigma: float = 0.04) -> torch.Tensor:
    """The marginal at the start of the last step, led on by it."""
    if last_step == "none":
        return torch.tensor([MEAN, STD**2], dtype=torch.float64)
    variance = ((1 - sigma) * STD) ** 2 + sigma**2
    # The expected data and the expected noise are so much of the deviation from the mean.
    data, noise = (1 - sigma) * STD**2 / variance, sigma / variance
    slope = data - (diffusion(form, sigma) if last_step == "mean" else 0) * noise
    return torch.tensor([MEAN, slope**2 * variance], dtype=torch.float64)


@each_sde
@each_form
def test_every_sde_has_the_marginals_of_the_flow(solver, form):
    for shift, last_step in [(1.7, last_step) for last_step in LAST_STEPS] + [(1.0, "mean"), (3.0, "mean")]:
        actual = law_in_the_limit(solver=solver, diffusion_form=form, shift=shift, last_step=last_step)
        expected, where = exact_law(form, last_step), f"shift {shift}, last step {last_step}"
        torch.testing.assert_close(actual, expected, atol=0, rtol=0.008, msg=lambda text, at=where: f"{at}: {text}")


@each_sde
@pytest.mark.parametrize(
    "config", [dict(diffusion_norm=0.3), dict(diffusion_norm=2.0), dict(last_step_size=0.2)], ids=str
)
def test_marginals_do_not_depend_on_the_norm_nor_on_where_the_last_step_begins(solver, config):
    actual = law_in_the_limit(solver=solver, last_step="euler", **config)
    expected = exact_law("sigma", "euler", config.get("last_step_size", 0.04))
    torch.testing.assert_close(actual, expected, atol=0, rtol=0.008)


@each_sde
@each_form
def test_samples_are_distributed_as_they_should(solver, form):
    """
    Within five standard errors, std / sqrt(n) of the mean and variance * sqrt(2 / n) of the variance: one test in
    a million fails for another seed.
    """
    for shift, last_step in [(1.0, "mean"), (1.7, "none"), (3.0, "tweedie"), (1.7, "euler")]:
        config = dict(solver=solver, diffusion_form=form, shift=shift, last_step=last_step)
        scheduler, number = DoDFlowMatchScheduler(**config), 2**15
        scheduler.set_timesteps(12)
        generator = torch.Generator().manual_seed(1)
        noise = scheduler.init_noise_sigma * torch.randn(4, number // 4, generator=generator)
        samples = scheduler.solve(scalar_velocity, noise, generator=generator).prev_sample
        assert torch.isfinite(samples).all(), config
        mean, variance = law(12, **config).tolist()
        assert samples.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / number)), config
        assert samples.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / number)), config


@each_sde
def test_an_sde_stays_finite_in_two_steps_and_in_many(solver):
    for form, steps, shift in itertools.product(FORMS, (2, 3, 100), (0.2, 1.0, 20.0)):
        scheduler = DoDFlowMatchScheduler(solver=solver, diffusion_form=form, shift=shift)
        scheduler.set_timesteps(steps)
        noise = scheduler.init_noise_sigma * torch.linspace(-3, 3, 7)[None]
        samples = scheduler.solve(scalar_velocity, noise, generator=torch.Generator().manual_seed(0)).prev_sample
        assert torch.isfinite(samples).all() and samples.abs().max() < (10 if steps == 100 else 1000), form
