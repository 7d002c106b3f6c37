"""
Solvers against known answers: data N(mu_c, s_c^2) per channel, for which the flow is known in closed form, and the end
points of SiT's own solvers on it, of the ODE and of the SDEs; then the golden backbone sampled by FiTv2's own loop.
"""

import itertools
import math
import weakref

import pytest
import torch
from golden_data import golden, golden_model
from helpers import ODE_SOLVERS, SDE_SOLVERS, says
from torchdiffeq import odeint

from diffusers_dod import DoDFlowMatchScheduler
from diffusers_dod.guidance import Guidance, GuidedVelocity, classifier_free_guidance


GAUSSIAN = golden("ode_gaussian")
FITV2 = golden("fitv2_tiny_io")


def gaussian_velocity(sample: torch.Tensor, timestep: torch.Tensor, indices=None) -> torch.Tensor:
    mean, std = GAUSSIAN["mu"].double(), GAUSSIAN["s"].double()
    sigma = timestep.double().reshape(-1, 1, 1, 1) / 1000
    data, variance = 1 - sigma, ((1 - sigma) * std) ** 2 + sigma**2
    velocity = -(mean + (data * std**2 - sigma) / variance * (sample.double() - data * mean))
    return velocity.to(sample.dtype)


def solve(solver: str, num_inference_steps: int | None = None, sample=GAUSSIAN["noise"], **config):
    scheduler = DoDFlowMatchScheduler(solver=solver, **config)
    if num_inference_steps is not None:
        scheduler.set_timesteps(num_inference_steps)
    return scheduler.solve(gaussian_velocity, sample)


def error(sample: torch.Tensor) -> float:
    return (sample - GAUSSIAN["exact"]).abs().max().item()


@pytest.mark.parametrize(
    ("solver", "steps", "name"),
    [
        ("euler", 10, "euler_pts11"),
        ("euler", 50, "euler_pts51"),
        ("midpoint", 10, "midpoint_pts11"),
        ("heun", 10, "heun2_pts11"),
        ("heun", 50, "heun2_pts51"),
    ],
)
def test_fixed_steps_agree_with_sit(solver, steps, name):
    output = solve(solver, steps)
    torch.testing.assert_close(output.prev_sample, GAUSSIAN[name], atol=5e-6, rtol=0)
    assert output.num_evaluations.tolist() == [GAUSSIAN[f"{name}.nfe"]] * 2
    assert output.num_accepted.tolist() == [steps] * 2 and output.num_rejected.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("solver", "steps", "order"), [("euler", 64, 1), ("midpoint", 16, 2), ("heun", 16, 2), ("rk4", 5, 4)]
)
def test_order_of_convergence(solver, steps, order):
    """
    Of d x / d sigma = -4 sin(x), for which tan(x / 2) is an exponential: for the Gaussian flow, which is linear in x,
    midpoint has a higher order. More steps would show the rounding of fp32.
    """
    noise = torch.linspace(0.2, 0.8, 8, dtype=torch.float64)[:, None]
    exact = 2 * torch.atan(torch.tan(noise / 2) * math.exp(4))
    errors = []
    for num_inference_steps in (steps, 2 * steps, 4 * steps):
        scheduler = DoDFlowMatchScheduler(solver=solver)
        scheduler.set_timesteps(num_inference_steps)
        output = scheduler.solve(lambda x, t, indices: -4 * torch.sin(x), noise)
        errors.append((output.prev_sample / exact - 1).abs().max().item())
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize(
    ("solver", "steps", "tolerance"),
    [("euler", 50, 0.1), ("midpoint", 50, 2e-5), ("heun", 50, 1e-3), ("rk4", 12, 2e-5)],
)
def test_the_closed_form_is_reached(solver, steps, tolerance):
    assert error(solve(solver, steps).prev_sample) < tolerance


@pytest.mark.parametrize("solver", [*ODE_SOLVERS, *SDE_SOLVERS])
def test_stepping_is_solving(solver):
    scheduler = DoDFlowMatchScheduler(solver=solver)
    scheduler.set_timesteps(7)
    sample, generator = GAUSSIAN["noise"], torch.Generator().manual_seed(0)
    for timestep in scheduler.timesteps:
        velocity = gaussian_velocity(sample, timestep)
        sample = scheduler.step(velocity, timestep, sample, generator=generator).prev_sample
    generator = torch.Generator().manual_seed(0)
    output = scheduler.solve(gaussian_velocity, GAUSSIAN["noise"], generator=generator)
    assert torch.equal(sample, output.prev_sample)


@pytest.mark.parametrize("solver", [*ODE_SOLVERS, *SDE_SOLVERS, "dopri5"])
@pytest.mark.parametrize("error_norm", ["sample", "batch"])
def test_num_train_timesteps_is_but_the_unit_of_time(solver, error_norm):
    samples = []
    for maximum in (1000, 250):  # a power of two apart, so that all roundings are the same
        scheduler = DoDFlowMatchScheduler(maximum, solver, error_norm=error_norm)
        if solver != "dopri5":
            scheduler.set_timesteps(5)
        samples.append(
            scheduler.solve(
                lambda x, t, indices, unit=1000 / maximum: gaussian_velocity(x, unit * t),
                GAUSSIAN["noise"],
                generator=torch.Generator().manual_seed(0),
            ).prev_sample
        )
    assert torch.equal(*samples)


def test_a_flipped_direction_is_noticed():
    scheduler = DoDFlowMatchScheduler()
    scheduler.set_timesteps(50)
    wrong_sign = scheduler.solve(lambda x, t, indices: -gaussian_velocity(x, t), GAUSSIAN["noise"]).prev_sample
    wrong_time = scheduler.solve(lambda x, t, indices: gaussian_velocity(x, 1000 - t), GAUSSIAN["noise"]).prev_sample
    assert error(solve("euler", 50).prev_sample) < 0.1 < min(error(wrong_sign), error(wrong_time))


def test_explicit_sigmas_and_shift():
    plain, explicit, shifted = (DoDFlowMatchScheduler(shift=shift) for shift in (1.0, 1.0, 3.0))
    plain.set_timesteps(4)
    explicit.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    shifted.set_timesteps(4)
    assert torch.equal(plain.timesteps, explicit.timesteps)
    torch.testing.assert_close(plain.timesteps, torch.tensor([1000.0, 750.0, 500.0, 250.0]))
    torch.testing.assert_close(shifted.sigmas, torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))


# ------------------------------------------------------------------------------------------------------------- SDEs

FORMS = ("constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing")
LAST_STEPS = ("mean", "euler", "tweedie", "none")
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
@each_form
@pytest.mark.parametrize("last_step", LAST_STEPS)
def test_last_step(solver, form, last_step):
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
    torch.testing.assert_close(actual, expected)

    if solver == "stochastic_heun":
        # The last step from a noise of diffusion 1 forgets where it began.
        scheduler = DoDFlowMatchScheduler(solver=solver, diffusion_form=form, diffusion_norm=0.5, last_step=last_step)
        scheduler.set_timesteps(sigmas=[0.8, 0.3])
        with_noise, without = (
            walk(scheduler, lambda x, t: velocity, sample, draws) for draws in ([noise], [torch.zeros(1, 2)])
        )
        assert torch.equal(with_noise, without) == (last_step != "none")


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
@pytest.mark.parametrize(
    ("shift", "last_step"), [(1.7, last_step) for last_step in LAST_STEPS] + [(1.0, "mean"), (3.0, "mean")]
)
def test_every_sde_has_the_marginals_of_the_flow(solver, form, shift, last_step):
    actual = law_in_the_limit(solver=solver, diffusion_form=form, shift=shift, last_step=last_step)
    torch.testing.assert_close(actual, exact_law(form, last_step), atol=0, rtol=0.008)


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
@pytest.mark.parametrize(("shift", "last_step"), [(1.0, "mean"), (1.7, "none"), (3.0, "tweedie"), (1.7, "euler")])
def test_samples_are_distributed_as_they_should(solver, form, shift, last_step):
    """
    Within five standard errors, std / sqrt(n) of the mean and variance * sqrt(2 / n) of the variance: one test in
    a million fails for another seed.
    """
    config = dict(solver=solver, diffusion_form=form, shift=shift, last_step=last_step)
    scheduler, number = DoDFlowMatchScheduler(**config), 2**15
    scheduler.set_timesteps(12)
    generator = torch.Generator().manual_seed(1)
    noise = scheduler.init_noise_sigma * torch.randn(4, number // 4, generator=generator)
    samples = scheduler.solve(scalar_velocity, noise, generator=generator).prev_sample
    assert torch.isfinite(samples).all()
    mean, variance = law(12, **config).tolist()
    assert samples.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / number))
    assert samples.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / number))


@each_sde
@each_form
def test_an_sde_stays_finite_in_two_steps_and_in_many(solver, form):
    for steps, shift in itertools.product((2, 3, 100), (0.2, 1.0, 20.0)):
        scheduler = DoDFlowMatchScheduler(solver=solver, diffusion_form=form, shift=shift)
        scheduler.set_timesteps(steps)
        noise = scheduler.init_noise_sigma * torch.linspace(-3, 3, 7)[None]
        samples = scheduler.solve(scalar_velocity, noise, generator=torch.Generator().manual_seed(0)).prev_sample
        assert torch.isfinite(samples).all() and samples.abs().max() < (10 if steps == 100 else 1000)


# ----------------------------------------------------------------------------------------------------------- dopri5


def test_dopri5_protocol_agrees_with_fit():
    output = solve("dopri5", error_norm="batch")
    torch.testing.assert_close(output.prev_sample, GAUSSIAN["dopri5_pts50_tclamp1"], atol=1e-4, rtol=0)
    assert output.num_evaluations.tolist() == [GAUSSIAN["dopri5_pts50_tclamp1.nfe"]] * 2
    # 2 to choose the first step, then 6 per step (the seventh stage is the next step's first).
    assert torch.equal(output.num_evaluations, 2 + 6 * (output.num_accepted + output.num_rejected))


def test_dopri5_that_lands_on_the_end_is_better_and_cheaper_than_sits():
    ours = solve("dopri5")
    assert error(ours.prev_sample) < error(GAUSSIAN["dopri5_pts50"])
    assert (ours.num_evaluations < GAUSSIAN["dopri5_pts50.nfe"]).all()


def test_dopri5_never_leaves_the_interval_unless_the_protocol_says_so():
    """The protocol steps past the end, where FiT clamps the time; landing never asks for a time outside [0, 1000]."""
    for error_norm in ("sample", "batch"):
        times = []

        def velocity(x, t, indices, seen=times):
            seen.append(t)
            return gaussian_velocity(x, t)

        scheduler = DoDFlowMatchScheduler(solver="dopri5", error_norm=error_norm)
        scheduler.solve(velocity, GAUSSIAN["noise"])
        assert {time.shape for time in times} == {(2,) if error_norm == "sample" else ()}
        for sample in range(2):
            seen = torch.stack([time.expand(2)[sample] for time in times])
            assert max(seen) == 1000 and 0 <= min(seen) < 1e-30  # torchdiffeq looks just beside a prescribed point
            # The end itself is evaluated by the last stages of the last step, the clamped time again and again.
            assert (sum(seen < 1e-30) <= 2) == (error_norm == "sample")


def torchdiffeq_dopri5(velocity_fn, sample: torch.Tensor, rtol: float):
    """With a step that ends at sigma = 0, and the number of evaluations and of rejected steps."""
    counts = [0, 0]

    def velocity(sigma, x):
        counts[0] += 1
        return velocity_fn(x, (1000 * sigma.clamp(min=0)).float()[None], torch.tensor([0]))

    def rejected(*_):
        counts[1] += 1

    velocity.callback_reject_step = rejected
    sigmas = torch.tensor([1.0, 0.0], dtype=torch.float64)
    options = dict(step_t=torch.tensor([0.0], dtype=torch.float64))
    return odeint(velocity, sample, sigmas, rtol=rtol, atol=1e-6, method="dopri5", options=options)[-1], counts


def assert_dopri5_is_torchdiffeqs(velocity_fn, sample: torch.Tensor, rtol: float):
    """
    In fp64: the errors of the first steps, which are small, are those of rounding in fp32, and with them differ the
    lengths of the steps that follow.
    """
    expected, (num_evaluations, num_rejected) = torchdiffeq_dopri5(velocity_fn, sample.double(), rtol)
    output = DoDFlowMatchScheduler(solver="dopri5", rtol=rtol).solve(velocity_fn, sample.double())
    assert output.prev_sample.dtype == torch.float64
    torch.testing.assert_close(output.prev_sample, expected, atol=1e-5, rtol=0)
    assert output.num_evaluations.tolist() == [num_evaluations]
    assert output.num_rejected.tolist() == [num_rejected]


@pytest.mark.parametrize("sample", [0, 1])
@pytest.mark.parametrize("rtol", [1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
def test_dopri5_of_one_gaussian_sample_is_torchdiffeqs(sample, rtol):
    assert_dopri5_is_torchdiffeqs(gaussian_velocity, GAUSSIAN["noise"][sample : sample + 1], rtol)


@torch.no_grad()
@pytest.mark.parametrize("sample", [0, 1])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_dopri5_of_one_sample_of_fitv2_is_torchdiffeqs(sample, scale):
    guided, labels = GuidedVelocity(golden_model(), 1), FITV2["sample.y"][sample : sample + 1]

    def velocity(x, t, indices):
        return guided(x, t, labels, None, scale, indices).to(x.dtype)

    assert_dopri5_is_torchdiffeqs(velocity, FITV2["sample.noise"][sample : sample + 1], 1e-3)


@torch.no_grad()
@pytest.mark.parametrize("sample", [0, 1])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_error_norms_agree_for_one_sample(sample, scale):
    """The protocol of FiT still steps past the end and interpolates, within ten times the tolerance of a step."""
    guided, labels = GuidedVelocity(golden_model(), 1), FITV2["sample.y"][sample : sample + 1]
    samples = [
        DoDFlowMatchScheduler(solver="dopri5", rtol=1e-3, error_norm=error_norm)
        .solve(
            lambda x, t, indices: guided(x, t, labels, None, scale, indices),
            FITV2["sample.noise"][sample : sample + 1],
        )
        .prev_sample
        for error_norm in ("sample", "batch")
    ]
    torch.testing.assert_close(*samples, atol=1e-2, rtol=0)


def test_dopri5_holds_every_sample_to_the_tolerance():
    """A sample that needs small steps gets them, however easy its neighbours are; under the batch norm it does not."""
    hard, easy = torch.ones(1, 1), torch.zeros(31, 1)

    def velocity(sample, timestep, indices):
        timestep = timestep.reshape(-1, 1)
        return -30 * torch.sin(30 * timestep / 1000) * (sample != 0)  # d/dsigma of cos(30 sigma), for the hard one

    def accepted(error_norm, noise):
        scheduler = DoDFlowMatchScheduler(solver="dopri5", error_norm=error_norm)
        return scheduler.solve(velocity, noise).num_accepted[-1].item()

    alone = accepted("sample", hard)
    assert accepted("batch", hard) == pytest.approx(alone, abs=1)  # the norms of a batch of one agree
    assert accepted("sample", torch.cat([easy, hard])) == alone
    assert accepted("batch", torch.cat([easy, hard])) < alone - 1


RATES = torch.tensor([8.0, 40.0, 1.0, 20.0])
START = torch.linspace(-1, 1, 12).reshape(4, 3)


def oscillate(sample: torch.Tensor, timestep: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
    """d/dsigma of sample + cos(rate sigma), and something that depends on the sample."""
    rates = rates[:, None]
    return -rates * torch.sin(rates * timestep[:, None] / 1000) - sample


def test_dopri5_gives_each_sample_what_it_gets_alone():
    scheduler = DoDFlowMatchScheduler(solver="dopri5")
    together = scheduler.solve(lambda x, t, indices: oscillate(x, t, RATES[indices]), START)
    assert len(set(together.num_evaluations.tolist())) == 4 and together.num_rejected.max() > 0
    for index in range(4):
        alone = scheduler.solve(lambda x, t, _, rates=RATES[[index]]: oscillate(x, t, rates), START[[index]])
        torch.testing.assert_close(alone.prev_sample[0], together.prev_sample[index])
        for name in ("num_evaluations", "num_accepted", "num_rejected"):
            assert alone[name][0] == together[name][index]


def test_dopri5_leaves_samples_alone_that_are_done():
    batches = []

    def velocity(sample, timestep, indices):
        assert sample.shape == (len(indices), 3) and timestep.shape == indices.shape
        assert timestep.dtype == torch.float32 and timestep.min() >= 0 and timestep.max() <= 1000
        batches.append(indices.tolist())
        return oscillate(sample, timestep, RATES[indices])

    output = DoDFlowMatchScheduler(solver="dopri5").solve(velocity, START)
    sizes = [len(batch) for batch in batches]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 4 and sizes[-1] == 1
    for index in range(4):
        assert sum(index in batch for batch in batches) == output.num_evaluations[index]
    assert sum(sizes) == output.num_evaluations.sum()
    assert torch.equal(output.num_evaluations, 2 + 6 * (output.num_accepted + output.num_rejected))
    assert batches[-1] == [1]  # the one with the highest rate


def test_dopri5_depends_on_its_tolerances():
    def evaluations(**config):
        return solve("dopri5", **config).num_evaluations.sum()

    assert evaluations(rtol=1e-5) > evaluations() < evaluations(rtol=1e-8, atol=1e-5) < evaluations(rtol=1e-8)
    assert error(solve("dopri5", rtol=1e-6).prev_sample) < 1e-4 < error(solve("dopri5").prev_sample)


def test_dopri5_gets_past_a_jump():
    """Roughly, for the error estimate hardly sees one in the first third of a step; but it comes to an end."""
    output = DoDFlowMatchScheduler(solver="dopri5").solve(
        lambda x, t, indices: torch.where(t[:, None] > 300, 1.0, -1.0).expand_as(x), START
    )
    torch.testing.assert_close(output.prev_sample, START - 0.7 + 0.3, atol=0.25, rtol=0)
    assert (output.num_rejected > 0).all() and (output.num_evaluations < 300).all()


class Endless(Exception):
    pass


def at_most(number: int, velocity_fn):
    """`velocity_fn`, which raises after so many evaluations."""
    calls = itertools.count(1)

    def velocity(sample, timestep, indices):
        if next(calls) > number:
            raise Endless
        return velocity_fn(sample, timestep, indices)

    return velocity


@pytest.mark.parametrize(
    ("config", "velocity_fn"),
    [
        (dict(rtol=1e-30, atol=1e-30), lambda x, t, indices: 5 * torch.sin(3 * x)),
        (dict(), lambda x, t, indices: -10 * x**3),  # goes to infinity at sigma = 0.95
        (dict(error_norm="batch"), lambda x, t, indices: -10 * x**3),
    ],
    ids=["tolerance", "singularity", "singularity-batch"],
)
def test_dopri5_gives_up_where_its_steps_vanish(config, velocity_fn):
    scheduler = DoDFlowMatchScheduler(solver="dopri5", **config)
    with pytest.raises(ValueError, match=says("`rtol`", "`atol`", f"got {scheduler.config.rtol}")):
        scheduler.solve(at_most(10000, velocity_fn), torch.ones(2, 3))


@pytest.mark.parametrize("error_norm", ["sample", "batch"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_dopri5_needs_finite_velocities(error_norm, bad):
    def velocity(sample, timestep, indices):
        is_bad = (indices == 1) & (timestep < 500)  # one of the samples, from some time on
        return torch.where(is_bad[:, None], bad, -sample)

    with pytest.raises(ValueError, match=says("`velocity_fn` must return finite numbers", "at timestep")) as caught:
        DoDFlowMatchScheduler(solver="dopri5", error_norm=error_norm).solve(at_most(1000, velocity), START)
    assert 0 <= float(str(caught.value).split()[-1].rstrip(".")) < 500


@pytest.mark.parametrize("error_norm", ["sample", "batch"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_dopri5_needs_finite_samples(error_norm, bad):
    """Also where the velocity does not show it."""
    sample = torch.where(torch.arange(12).reshape(4, 3) == 5, bad, START)
    scheduler = DoDFlowMatchScheduler(solver="dopri5", error_norm=error_norm)
    with pytest.raises(ValueError, match=says("`sample`", "finite", "got ")):
        scheduler.solve(at_most(1000, lambda x, t, indices: torch.ones_like(x)), sample)


def test_dopri5_keeps_the_evaluations_of_one_step():
    alive, peak, number = set(), 0, itertools.count()

    def velocity(sample, timestep, indices):
        nonlocal peak
        result = oscillate(sample, timestep, RATES[indices])
        alive.add(key := next(number))
        weakref.finalize(result, alive.discard, key)
        peak = max(peak, len(alive))
        return result

    DoDFlowMatchScheduler(solver="dopri5").solve(velocity, START)
    assert 7 <= peak <= 9  # seven stages, and those with which the length of the first step was chosen


def test_dopri5_calls_back_with_each_samples_own_time():
    scheduler, seen = DoDFlowMatchScheduler(solver="dopri5"), []

    def velocity(sample, timestep, indices):
        return oscillate(sample, timestep, RATES[indices])

    output = scheduler.solve(velocity, START, callback=lambda *args: seen.append((*args, args[2].clone())))
    assert [index for index, *_ in seen] == list(range(len(seen)))
    times = torch.stack([timestep for _, timestep, *_ in seen])
    assert times.dtype == torch.float32 and times.shape == (len(seen), 4)
    assert (times[0] == 1000).all() and (times.diff(dim=0) <= 0).all() and (times >= 0).all()
    # A sample that is done stays at 0 and as it is.
    for sample in range(4):
        column = times[:, sample]
        assert len(column[column > 0].unique()) == output.num_accepted[sample]
        final = [samples[sample] for *_, samples in seen][int((column > 0).sum()) - 1 :]
        assert all(torch.equal(samples, output.prev_sample[sample]) for samples in final)
    assert torch.equal(seen[-1][3], output.prev_sample)
    # What a callback was given does not change later on.
    assert all(torch.equal(given, copy) for _, _, given, copy in seen)

    stopped = scheduler.solve(velocity, START, callback=lambda index, timestep, sample: index < 3)
    assert torch.equal(stopped.prev_sample, seen[3][3])
    assert (stopped.num_accepted <= 4).all() and stopped.num_accepted.max() == 4


@pytest.mark.parametrize("error_norm", ["sample", "batch"])
@pytest.mark.parametrize("solver", [*ODE_SOLVERS, "dopri5"])
def test_callbacks_see_each_step_and_can_stop(solver, error_norm):
    scheduler = DoDFlowMatchScheduler(solver=solver, error_norm=error_norm)
    if solver != "dopri5":
        scheduler.set_timesteps(3)
    seen = []
    full = scheduler.solve(
        gaussian_velocity, GAUSSIAN["noise"], callback=lambda i, t, x: seen.append((i, t, x.clone()))
    )
    expected = full.num_accepted.max() if solver == "dopri5" else full.num_evaluations[0]
    assert [index for index, _, _ in seen] == list(range(expected))
    assert (seen[0][1] == 1000).all()
    assert torch.equal(seen[-1][2], full.prev_sample)

    stopped = scheduler.solve(gaussian_velocity, GAUSSIAN["noise"], callback=lambda i, t, x: i < 1)
    assert torch.equal(stopped.prev_sample, seen[1][2])


# ------------------------------------------------------------------------------------------------------------ FiTv2


@torch.no_grad()
@pytest.mark.parametrize("shape", ["sq8x8", "ns8x12"])
def test_guided_velocity_agrees_with_fitv2(shape):
    data = {key.removeprefix(f"cfg_{shape}."): value for key, value in FITV2.items()}
    model = golden_model()
    timestep = 1000 * (1 - data["t"])
    velocity = GuidedVelocity(model, 2)(data["latents"], timestep, data["y"], None, 4.0)
    torch.testing.assert_close(velocity, -data["velocity_cfg_allch"], atol=5e-5, rtol=0)
    first_channels = GuidedVelocity(model, 2, Guidance(channels=3))(data["latents"], timestep, data["y"], None, 4.0)
    torch.testing.assert_close(first_channels, -data["velocity_cfg_first3ch"], atol=5e-5, rtol=0)
    conditional = GuidedVelocity(model, 2)(data["latents"], timestep, data["y"], None, 1.0)
    torch.testing.assert_close(conditional, -data["velocity_cond"], atol=1e-5, rtol=0)
    by_hand = classifier_free_guidance(data["velocity_cond"], data["velocity_uncond"], 4.0)
    torch.testing.assert_close(velocity, -by_hand, atol=5e-5, rtol=0)


def sample_fitv2(scheduler: DoDFlowMatchScheduler, guidance_scale: float, channels: int | None = None, rounding=0.0):
    guided, labels = GuidedVelocity(golden_model(), 2, Guidance(channels=channels)), FITV2["sample.y"]

    def velocity(sample, timestep, indices):
        velocity = guided(sample, timestep, labels, None, guidance_scale, indices)
        return velocity * (1 + rounding * torch.randn_like(velocity))

    return scheduler.solve(velocity, FITV2["sample.noise"])


@pytest.mark.parametrize(("name", "scale", "channels"), [("nocfg", 1.0, None), ("cfg4_first3ch", 4.0, 3)])
def test_euler_samples_agree_with_fitv2(name, scale, channels):
    scheduler = DoDFlowMatchScheduler()
    scheduler.set_timesteps(10)
    output = sample_fitv2(scheduler, scale, channels)
    torch.testing.assert_close(output.prev_sample, FITV2[f"sample.euler_pts11.{name}"], atol=5e-5, rtol=0)
    assert output.num_evaluations.tolist() == [FITV2[f"sample.euler_pts11.{name}.nfe"]] * 2


def test_dopri5_samples_in_protocol_mode_agree_with_fitv2():
    """
    One step of this trajectory ends within rounding of sigma = 0: whether it counts as past the end, or needs one more
    step of 6 evaluations, depends on the processor. Among several roundings of fp32 some take the recorded path.
    """
    expected, num_evaluations = FITV2["sample.dopri5_pts50.nocfg"], int(FITV2["sample.dopri5_pts50.nocfg.nfe"])
    torch.manual_seed(0)
    paths = set()
    for _ in range(20):
        scheduler = DoDFlowMatchScheduler(solver="dopri5", error_norm="batch")
        output = sample_fitv2(scheduler, 1.0, rounding=1e-7)
        paths.add(output.num_evaluations[0].item())
        same_path = output.num_evaluations[0] == num_evaluations
        torch.testing.assert_close(output.prev_sample, expected, atol=1e-4 if same_path else 1e-3, rtol=0)
    assert num_evaluations in paths and paths <= {num_evaluations - 6, num_evaluations}
