import inspect
import itertools
import math
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from golden_data import GAUSSIAN, gaussian_velocity
from helpers import FIXED_STEP_SOLVERS, ODE_SOLVERS, SDE_SOLVERS, says, table

from diffusers_dod import DoDFlowMatchScheduler
from diffusers_dod.operations import OperationCounter
from diffusers_dod.tableaus import SOLVERS


NAN, INF = math.nan, math.inf
SAMPLE = torch.linspace(-1, 1, 12).reshape(2, 6)
VELOCITY = torch.linspace(2, -1, 12).reshape(2, 6)
NOISE = torch.linspace(0, 3, 12).reshape(2, 6)

# Evaluations per interval; the last one of `stochastic_heun` has a single one.
FORMS = ("constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing")
LAST_STEPS = ("mean", "euler", "tweedie", "none")

all_solvers = pytest.mark.parametrize("solver", [*FIXED_STEP_SOLVERS, "dopri5"])
fixed_step_solvers = pytest.mark.parametrize("solver", FIXED_STEP_SOLVERS)
sde_solvers = pytest.mark.parametrize("solver", SDE_SOLVERS)


def test_every_solver_is_tested_and_documented():
    assert [*FIXED_STEP_SOLVERS, "dopri5"] == list(SOLVERS), "a new solver must be added to tests/helpers.py"
    page = (Path(__file__).parents[1] / "docs" / "sampling.md").read_text()
    assert [name for name in SOLVERS if f"\n| `{name}` |" not in page] == [], "docs/sampling.md needs a row"


def laid_out(num_inference_steps=4, **kwargs):
    """A scheduler with `num_inference_steps` intervals."""
    scheduler = DoDFlowMatchScheduler(**kwargs)
    scheduler.set_timesteps(num_inference_steps)
    return scheduler


@fixed_step_solvers
def test_steps_are_laid_out_all_together(solver):
    """As many operations for 10 steps as for 1,000."""
    counts = []
    for num_steps in (10, 1000):
        with OperationCounter() as counter:
            laid_out(num_steps, solver=solver)
        counts.append(counter.work.total())
    assert counts[0] == counts[1] < 40


def ready(solver, **kwargs):
    """A scheduler to `solve` with."""
    return DoDFlowMatchScheduler(solver=solver, **kwargs) if solver == "dopri5" else laid_out(solver=solver, **kwargs)


def generator(seed):
    return torch.Generator().manual_seed(seed)


# ----------------------------------------------------------------------------------------------------------- layout


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        (dict(), [1000, 750, 500, 250]),
        # One entry per evaluation: each interval at its start and at its end, or its middle.
        (dict(solver="heun"), [1000, 750, 750, 500, 500, 250, 250, 0]),
        (dict(solver="midpoint"), [1000, 875, 750, 625, 500, 375, 250, 125]),
        (
            dict(solver="rk4"),
            [1000, 875, 875, 750, 750, 625, 625, 500, 500, 375, 375, 250, 250, 125, 125, 0],
        ),
        (dict(num_train_timesteps=100), [100, 75, 50, 25]),
        # shift * s / (1 + (shift - 1) * s) at s = 1, 3/4, 1/2, 1/4.
        (dict(shift=3.0), [1000, 900, 750, 500]),
        (dict(shift=3.0, solver="heun"), [1000, 900, 900, 750, 750, 500, 500, 0]),
        # Equal steps down to the last one, which begins at `last_step_size` and is evaluated once.
        (dict(solver="euler_maruyama"), [1000, 680, 360, 40]),
        (dict(solver="stochastic_heun"), [1000, 680, 680, 360, 360, 40, 40]),
        (dict(solver="stochastic_heun", last_step_size=0.1), [1000, 700, 700, 400, 400, 100, 100]),
        (dict(solver="euler_maruyama", last_step="tweedie", last_step_size=0.1), [1000, 700, 400, 100]),
        (dict(solver="euler_maruyama", num_train_timesteps=50), [50, 34, 18, 2]),
        # It is at sigma = 0.04 whatever the shift: that of 3 s / (1 + 2 s) at s = 1, 49/73, 25/73, 1/73.
        (dict(solver="euler_maruyama", shift=3.0), [1000, 49000 / 57, 25000 / 41, 40]),
        # There is none, nor a `last_step_size`.
        (dict(solver="euler_maruyama", last_step="none", last_step_size=0.1), [1000, 750, 500, 250]),
        (dict(solver="stochastic_heun", last_step="none"), [1000, 750, 750, 500, 500, 250, 250]),
        (dict(solver="euler_maruyama", last_step="none", shift=3.0), [1000, 900, 750, 500]),
    ],
    ids=str,
)
def test_timesteps_are_one_per_evaluation(kwargs, expected):
    scheduler = laid_out(4, **kwargs)
    torch.testing.assert_close(scheduler.timesteps, torch.tensor(expected, dtype=torch.float32))
    assert scheduler.num_inference_steps == 4
    assert scheduler.sigmas.shape == (5,) and scheduler.sigmas[0] == 1 and scheduler.sigmas[-1] == 0


def test_sigmas_of_the_caller():
    scheduler = DoDFlowMatchScheduler()
    for sigmas in ([0.8, 0.3], torch.tensor([0.8, 0.3])):
        scheduler.set_timesteps(sigmas=sigmas)
        torch.testing.assert_close(scheduler.timesteps, torch.tensor([800.0, 300.0]))
        torch.testing.assert_close(scheduler.sigmas, torch.tensor([0.8, 0.3, 0.0]))
        assert scheduler.num_inference_steps == 2
    scheduler = DoDFlowMatchScheduler(shift=3.0)
    scheduler.set_timesteps(2, sigmas=[1.0, 0.5])  # before the shift
    torch.testing.assert_close(scheduler.timesteps, torch.tensor([1000.0, 750.0]))


@fixed_step_solvers
@pytest.mark.parametrize("maximum", [1000, 50])
def test_timesteps_of_the_caller_are_sigmas_without_the_shift(solver, maximum):
    by_sigma = DoDFlowMatchScheduler(solver=solver, num_train_timesteps=maximum)
    by_sigma.set_timesteps(sigmas=[0.8, 0.3])
    by_time = DoDFlowMatchScheduler(solver=solver, num_train_timesteps=maximum, shift=3.0)
    for timesteps in ([0.8 * maximum, 0.3 * maximum], torch.tensor([0.8, 0.3]) * maximum):
        by_time.set_timesteps(timesteps=timesteps)
        torch.testing.assert_close(by_time.sigmas, by_sigma.sigmas)
        torch.testing.assert_close(by_time.timesteps, by_sigma.timesteps)
        assert by_time.num_inference_steps == 2
    by_time.set_timesteps(2, timesteps=timesteps)  # the number may be given if it is right


def test_device_is_that_of_the_timesteps():
    scheduler = DoDFlowMatchScheduler()
    scheduler.set_timesteps(4, device="meta")
    assert scheduler.timesteps.device.type == "meta"
    assert scheduler.sigmas.device.type == "cpu"  # read by `step` without waiting for a device
    for device in ("nodevice", 1.5):
        with pytest.raises(ValueError, match=says("`device`", f"got {device!r}")):
            scheduler.set_timesteps(4, device=device)


def test_too_many_steps_are_refused():
    with pytest.raises(ValueError, match=says("`num_inference_steps`", "[1, 1000000]", "got 1000000000000")):
        DoDFlowMatchScheduler().set_timesteps(10**12)


def test_constants():
    scheduler = DoDFlowMatchScheduler()
    assert scheduler.init_noise_sigma == 1.0
    assert scheduler.order == 1
    assert torch.equal(scheduler.scale_model_input(SAMPLE, 500.0), SAMPLE)
    assert len(scheduler) == 1000 and len(DoDFlowMatchScheduler(num_train_timesteps=7)) == 7


@all_solvers
def test_kind_of_solver(solver):
    scheduler = DoDFlowMatchScheduler(solver=solver)
    assert scheduler.is_stochastic == (solver in SDE_SOLVERS)
    assert scheduler.is_adaptive == (solver == "dopri5")
    assert (scheduler.init_noise_sigma == 1) == (solver != "stochastic_heun")  # see test_sde.py


# ------------------------------------------------------------------------------------------------------------ steps


@fixed_step_solvers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_step_returns_the_dtype_of_the_sample_and_computes_in_fp32(solver, dtype):
    # Thirds, unlike quarters, are not exact in bf16.
    scheduler, reference = laid_out(3, solver=solver), laid_out(3, solver=solver)
    sample, velocity, noise = SAMPLE.to(dtype), VELOCITY.to(dtype), NOISE.to(dtype)
    for timestep in scheduler.timesteps[: FIXED_STEP_SOLVERS[solver]]:  # all evaluations of an interval
        actual = scheduler.step(velocity, timestep, sample, variance_noise=noise).prev_sample
        expected = reference.step(velocity.float(), timestep, sample.float(), variance_noise=noise.float()).prev_sample
        assert actual.dtype == dtype and torch.equal(actual, expected.to(dtype))
    # A velocity in less precision than the sample, as under autocast.
    assert laid_out(solver=solver).step(VELOCITY.bfloat16(), 1000.0, SAMPLE).prev_sample.dtype == torch.float32


@all_solvers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_solve_returns_the_dtype_of_the_sample(solver, dtype):
    output = ready(solver).solve(lambda sample, timestep, indices: VELOCITY.to(dtype), SAMPLE.to(dtype))
    assert output.prev_sample.dtype == dtype and output.prev_sample.shape == SAMPLE.shape
    for counts in (output.num_evaluations, output.num_accepted, output.num_rejected):
        assert counts.dtype == torch.int64 and counts.shape == (2,) and counts.device.type == "cpu"


@all_solvers
@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 2, 2, 1, 1)], ids=str)
def test_samples_have_any_number_of_dimensions(solver, shape):
    for error_norm in ("sample", "batch"):
        output = ready(solver, error_norm=error_norm, diffusion_norm=0).solve(
            lambda sample, timestep, indices: torch.ones_like(sample), torch.zeros(shape)
        )
        torch.testing.assert_close(output.prev_sample, -torch.ones(shape))


@all_solvers
def test_solve_evaluates_the_whole_batch_at_one_time(solver):
    def velocity(sample, timestep, indices):
        assert timestep.ndim == 0 and timestep.dtype == torch.float32
        assert torch.equal(indices, torch.arange(2)) and sample.shape == SAMPLE.shape
        return VELOCITY

    ready(solver, error_norm="batch").solve(velocity, SAMPLE)


def test_step_returns_a_tuple_on_request():
    (sample,) = laid_out().step(VELOCITY, 1000.0, SAMPLE, return_dict=False)
    output = laid_out().step(VELOCITY, 1000.0, SAMPLE)
    assert torch.equal(sample, output.prev_sample) and torch.equal(sample, output[0])
    assert torch.equal(sample, SAMPLE - VELOCITY / 4)


@pytest.mark.parametrize(
    ("solver", "evaluations", "half"),
    [
        ("euler", 4, 2),
        ("midpoint", 8, 4),
        ("heun", 8, 4),
        ("rk4", 16, 8),
        ("euler_maruyama", 4, 2),
        ("stochastic_heun", 7, 3),
    ],
)
def test_steps_are_counted_and_one_too_many_is_refused(solver, evaluations, half):
    scheduler = laid_out(4, solver=solver)
    assert scheduler.step_index is None and len(scheduler.timesteps) == evaluations
    for index, timestep in enumerate(scheduler.timesteps):
        scheduler.step(VELOCITY, timestep, SAMPLE)
        assert scheduler.step_index == index + 1
    scheduler.set_timesteps(2)
    assert scheduler.step_index is None
    scheduler.set_begin_index(0)
    for timestep in scheduler.timesteps:
        scheduler.step(VELOCITY, timestep, SAMPLE)
    message = says(f"All {half} steps are done", "`timestep`", "`set_timesteps`")
    with pytest.raises(ValueError, match=message):
        scheduler.step(VELOCITY, scheduler.timesteps[-1], SAMPLE)


@fixed_step_solvers
@pytest.mark.parametrize(
    ("timesteps", "length"), [(None, 0.001), ([1000, 502, 127], 0.375)], ids=["training grid", "timesteps"]
)
def test_times_that_fp32_does_not_hold_as_sigmas_begin_an_interval(solver, timesteps, length):
    """1000 * fp32(0.502) is less than 502, which would leave nothing of an interval but its end."""
    scheduler = DoDFlowMatchScheduler(solver=solver, diffusion_norm=0)
    if timesteps is not None:
        scheduler.set_timesteps(timesteps=timesteps)
    sample = SAMPLE
    for _ in range(FIXED_STEP_SOLVERS[solver]):
        sample = scheduler.step(VELOCITY, 502, sample).prev_sample
    torch.testing.assert_close(sample, SAMPLE - length * VELOCITY)


@fixed_step_solvers
@pytest.mark.parametrize("steps", [4, None])
def test_single_steps_may_start_at_any_time(solver, steps):
    """
    Each leads to the end of the interval it lies in: the velocity is constant, so all solvers are exact, those of the
    SDE without its diffusion.
    """
    # Without `set_timesteps` with the training grid, of 1000 intervals.
    scheduler = DoDFlowMatchScheduler(solver=solver, diffusion_norm=0)
    if steps is not None:
        scheduler.set_timesteps(timesteps=[1000, 750, 500, 250])
    intervals = steps or 1000
    for timestep, end in (
        (1000.0, 1 - 1 / intervals),
        (0, 0.0),
        (0.25, 0.0),
        (torch.tensor(250.0), None),
        (875.25, 0.75 if steps else 0.875),
    ):
        scheduler._reset()
        sample = SAMPLE
        is_last = float(timestep) <= 1000 / intervals
        for _ in range(1 if is_last and solver in SDE_SOLVERS else FIXED_STEP_SOLVERS[solver]):
            sample = scheduler.step(VELOCITY, timestep, sample).prev_sample
        start = float(timestep) / 1000
        end = start - 1 / intervals if end is None else end
        torch.testing.assert_close(sample, SAMPLE + (end - start) * VELOCITY)
    assert scheduler.step_index is not None


@sde_solvers
@pytest.mark.parametrize("form", FORMS)
def test_an_sde_entered_at_any_time_stays_finite(solver, form):
    for last_step, num_inference_steps in itertools.product(LAST_STEPS, (None, 3)):
        scheduler = DoDFlowMatchScheduler(solver=solver, diffusion_form=form, last_step=last_step)
        if num_inference_steps is not None:
            scheduler.set_timesteps(num_inference_steps)
        for timestep in (1000, 999.5, 500.3, 40, 1e-3, 0):
            scheduler._reset()
            sample = scheduler.step(VELOCITY, timestep, SAMPLE, variance_noise=NOISE).prev_sample
            assert torch.isfinite(sample).all(), last_step
            if timestep == 0:  # there is nothing left to do
                assert torch.equal(sample, SAMPLE)


def test_an_sde_entered_within_an_interval_takes_the_rest_of_it():
    scheduler = DoDFlowMatchScheduler(solver="euler_maruyama")
    scheduler.set_timesteps(sigmas=[1.0, 0.5, 0.25])
    sample = scheduler.step(VELOCITY, 400.0, SAMPLE, variance_noise=NOISE).prev_sample
    drift = VELOCITY + (SAMPLE + 0.6 * VELOCITY)  # the diffusion is sigma
    expected = SAMPLE - 0.15 * drift + math.sqrt(2 * 0.4 * 0.15) * NOISE
    torch.testing.assert_close(sample, expected)


def test_after_the_last_step_a_timestep_is_looked_up_again():
    scheduler = laid_out(4)
    last = scheduler.step(VELOCITY, scheduler.timesteps[-1], SAMPLE).prev_sample
    again = scheduler.step(VELOCITY, scheduler.timesteps[-1], SAMPLE).prev_sample
    first = scheduler.step(VELOCITY, scheduler.timesteps[0], SAMPLE).prev_sample
    torch.testing.assert_close(last, SAMPLE - VELOCITY / 4)
    assert torch.equal(last, again) and torch.equal(first, last)
    assert scheduler.step_index == 1


@pytest.mark.parametrize("how", ["begin index", "timestep"])
@fixed_step_solvers
def test_steps_may_begin_in_between(solver, how):
    scheduler = DoDFlowMatchScheduler(solver=solver, diffusion_norm=0)
    scheduler.set_timesteps(timesteps=[1000, 750, 500, 250])
    evaluations = FIXED_STEP_SOLVERS[solver]
    index = 2 * evaluations
    if how == "begin index":
        scheduler.set_begin_index(index)
        assert scheduler.begin_index == index
    # Heun's list has 500 twice, as the end of an interval and as the start of the next: a first step starts one.
    assert scheduler.timesteps[index] == 500
    sample = SAMPLE
    for timestep in scheduler.timesteps[index : index + evaluations]:
        sample = scheduler.step(VELOCITY, timestep, sample).prev_sample
    assert scheduler.step_index == index + evaluations
    torch.testing.assert_close(sample, SAMPLE - VELOCITY / 4)


@pytest.mark.parametrize(
    ("solver", "evaluations"),
    [("euler", 4), ("midpoint", 8), ("heun", 8), ("rk4", 16), ("euler_maruyama", 4), ("stochastic_heun", 7)],
)
def test_solve_counts_and_calls_back(solver, evaluations):
    scheduler, seen, timesteps = laid_out(4, solver=solver), [], []

    def velocity(sample, timestep, indices):
        timesteps.append(float(timestep))
        return VELOCITY

    def callback(index, timestep, sample):
        seen.append((index, float(timestep), sample))

    for _ in range(2):  # a trajectory leaves nothing behind for the next
        seen.clear(), timesteps.clear()
        output = scheduler.solve(velocity, SAMPLE, callback=callback)
        assert timesteps == scheduler.timesteps.tolist() == [timestep for _, timestep, _ in seen]
        assert [index for index, *_ in seen] == list(range(evaluations))
        assert torch.equal(seen[-1][2], output.prev_sample)
        assert output.num_evaluations.tolist() == [evaluations] * 2
        assert output.num_accepted.tolist() == [4, 4] and output.num_rejected.tolist() == [0, 0]


@fixed_step_solvers
def test_a_solve_that_is_stopped_counts_its_whole_intervals(solver):
    evaluations = FIXED_STEP_SOLVERS[solver]
    stop_after = 2 * evaluations + (evaluations - 1)  # within the third interval, if there is anything within
    output = ready(solver).solve(
        lambda sample, timestep, indices: VELOCITY,
        SAMPLE,
        callback=lambda index, timestep, sample: index + 1 < stop_after,
    )
    assert output.num_evaluations.tolist() == [stop_after] * 2
    assert output.num_accepted.tolist() == [2, 2] and output.num_rejected.tolist() == [0, 0]


@fixed_step_solvers
def test_no_more_is_kept_than_the_evaluations_of_an_interval(solver):
    scheduler = laid_out(4, solver=solver)

    def kept():
        values = [value for item in vars(scheduler).values() for value in (item if isinstance(item, list) else [item])]
        return sum(isinstance(value, torch.Tensor) and value.shape == SAMPLE.shape for value in values)

    counts = []
    for timestep in scheduler.timesteps:
        scheduler.step(VELOCITY, timestep, SAMPLE)
        counts.append(kept())
    assert max(counts) <= FIXED_STEP_SOLVERS[solver] and counts[-1] == 0
    if solver in ("euler", "euler_maruyama"):  # single evaluations leave nothing behind
        assert max(counts) == 0


@all_solvers
def test_callback_stops_solve(solver):
    seen = []

    def callback(index, timestep, sample):
        seen.append(sample)
        return index < 1

    output = ready(solver).solve(lambda sample, timestep, indices: torch.sin(9 * sample), SAMPLE, callback=callback)
    assert len(seen) == 2 and torch.equal(output.prev_sample, seen[-1])
    if solver == "dopri5":
        assert output.num_accepted.max() >= 2


@fixed_step_solvers
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


@all_solvers
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


def test_explicit_sigmas_and_shift():
    plain, explicit, shifted = (DoDFlowMatchScheduler(shift=shift) for shift in (1.0, 1.0, 3.0))
    plain.set_timesteps(4)
    explicit.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    shifted.set_timesteps(4)
    assert torch.equal(plain.timesteps, explicit.timesteps)
    torch.testing.assert_close(plain.timesteps, torch.tensor([1000.0, 750.0, 500.0, 250.0]))
    torch.testing.assert_close(shifted.sigmas, torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))


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


# ------------------------------------------------------------------------------------------------------ noise of SDEs


def draw(solver, seed=None, **kwargs):
    output = ready(solver, **kwargs).solve(
        lambda sample, timestep, indices: VELOCITY[indices],
        SAMPLE,
        generator=None if seed is None else generator(seed),
    )
    return output.prev_sample


@sde_solvers
def test_noise_comes_from_the_generator(solver):
    assert torch.equal(draw(solver, 0), draw(solver, 0))
    assert not torch.isclose(draw(solver, 0), draw(solver, 1)).any()
    torch.manual_seed(5)
    first, second = draw(solver), draw(solver)
    torch.manual_seed(5)
    assert torch.equal(first, draw(solver)) and not torch.equal(first, second)
    assert torch.equal(draw("euler", 0), draw("euler", 1))


@sde_solvers
def test_a_generator_for_each_sample_makes_it_independent_of_its_neighbours(solver):
    def solve(samples, seeds):
        output = laid_out(solver=solver).solve(
            lambda sample, timestep, indices: torch.zeros_like(sample),
            SAMPLE[samples],
            generator=[generator(seed) for seed in seeds],
        )
        return output.prev_sample

    both = solve([0, 1], [7, 8])
    assert torch.equal(both[:1], solve([0], [7])) and torch.equal(both[1:], solve([1], [8]))


@sde_solvers
def test_given_noise_stands_for_the_drawn_one(solver):
    drawn, given = laid_out(solver=solver), laid_out(solver=solver)
    source, same_source, sample = generator(0), generator(0), SAMPLE
    evaluations, num_draws = FIXED_STEP_SOLVERS[solver], 0
    for index, timestep in enumerate(drawn.timesteps):
        before = source.get_state()
        expected = drawn.step(VELOCITY, timestep, sample, generator=source).prev_sample
        noise = NOISE
        # Noise is drawn only where it is used: not by predictions, nor by the last step, nor before it.
        if not torch.equal(source.get_state(), before):
            num_draws += 1
            assert index % evaluations == evaluations - 1
            noise = torch.randn(SAMPLE.shape, generator=same_source)
        sample = given.step(VELOCITY, timestep, sample, variance_noise=noise).prev_sample
        assert torch.equal(sample, expected)
    assert num_draws == (3 if solver == "euler_maruyama" else 2)


@pytest.mark.parametrize("solver", ODE_SOLVERS)
def test_solvers_of_the_ode_use_no_noise(solver):
    with_noise, without = laid_out(solver=solver), laid_out(solver=solver)
    for timestep in without.timesteps:
        expected = without.step(VELOCITY, timestep, SAMPLE).prev_sample
        assert torch.equal(with_noise.step(VELOCITY, timestep, SAMPLE, variance_noise=NOISE).prev_sample, expected)


# ------------------------------------------------------------------------------------------------------------ noise


@pytest.mark.parametrize(
    ("timestep", "sigma"),
    [
        (0, [0.0, 0.0]),
        (1000, [1.0, 1.0]),
        (250.0, [0.25, 0.25]),
        (torch.tensor(250.0), [0.25, 0.25]),
        (torch.tensor([250.0]), [0.25, 0.25]),
        (torch.tensor([100.0, 750.0]), [0.1, 0.75]),
        (torch.tensor([100, 750]), [0.1, 0.75]),
    ],
    ids=str,
)
def test_noise_is_added_by_eq_1(timestep, sigma):
    sigma = torch.tensor(sigma)[:, None]
    expected = (1 - sigma) * SAMPLE + sigma * NOISE
    scheduler = DoDFlowMatchScheduler()
    torch.testing.assert_close(scheduler.scale_noise(SAMPLE, timestep, NOISE), expected)
    assert torch.equal(scheduler.add_noise(SAMPLE, NOISE, timestep), scheduler.scale_noise(SAMPLE, timestep, NOISE))


def test_noise_is_added_in_the_time_and_dtype_of_the_caller():
    hundred = DoDFlowMatchScheduler(num_train_timesteps=100)
    torch.testing.assert_close(hundred.scale_noise(SAMPLE, 25, NOISE), 0.75 * SAMPLE + 0.25 * NOISE)
    assert hundred.scale_noise(SAMPLE.bfloat16(), 25, NOISE.bfloat16()).dtype == torch.bfloat16
    images = SAMPLE.reshape(2, 3, 2, 1)  # one time per sample, whatever the number of dimensions
    noisy = hundred.scale_noise(images, torch.tensor([0, 100]), NOISE.reshape(2, 3, 2, 1))
    assert torch.equal(noisy[0], images[0]) and torch.equal(noisy[1], NOISE.reshape(2, 3, 2, 1)[1])


# ----------------------------------------------------------------------------------------------------------- config

CONFIG = dict(
    num_train_timesteps=500,
    solver="stochastic_heun",
    shift=2.0,
    rtol=1e-2,
    atol=1e-4,
    error_norm="batch",
    diffusion_form="decreasing",
    diffusion_norm=0.5,
    last_step="tweedie",
    last_step_size=0.1,
)


def test_config_survives_saving(tmp_path):
    assert set(CONFIG) == set(inspect.signature(DoDFlowMatchScheduler).parameters)
    DoDFlowMatchScheduler(**CONFIG).save_pretrained(tmp_path)
    loaded = DoDFlowMatchScheduler.from_pretrained(tmp_path)
    assert {name: loaded.config[name] for name in CONFIG} == CONFIG
    loaded.set_timesteps(3)
    assert torch.equal(loaded.timesteps, laid_out(3, **CONFIG).timesteps)
    # None of them is a default.
    defaults = inspect.signature(DoDFlowMatchScheduler).parameters
    assert all(value != defaults[name].default for name, value in CONFIG.items())


def test_config_passes_to_and_from_the_stock_scheduler():
    stock = FlowMatchEulerDiscreteScheduler.from_config(
        DoDFlowMatchScheduler(shift=3.0, num_train_timesteps=500).config
    )
    assert stock.config.shift == 3.0 and stock.config.num_train_timesteps == 500
    ours = DoDFlowMatchScheduler.from_config(stock.config)
    assert (ours.config.shift, ours.config.num_train_timesteps, ours.config.solver) == (3.0, 500, "euler")

    # And then both mean the same by it.
    sigmas = [1.0, 0.6, 0.2]
    stock.set_timesteps(sigmas=sigmas)
    ours.set_timesteps(sigmas=sigmas)
    torch.testing.assert_close(ours.timesteps, stock.timesteps)
    sample = SAMPLE
    for timestep in ours.timesteps:
        stock_sample = stock.step(VELOCITY, timestep, sample).prev_sample
        sample = ours.step(VELOCITY, timestep, sample).prev_sample
        torch.testing.assert_close(sample, stock_sample)


def test_config_of_another_solver():
    scheduler = DoDFlowMatchScheduler.from_config(DoDFlowMatchScheduler(**CONFIG).config, solver="euler")
    assert scheduler.config.solver == "euler" and scheduler.config.shift == 2.0


# -------------------------------------------------------------------------------------------------------- bad input


# Argument, keyword arguments, exception, and what its message must hold beside the argument's name: what is accepted
# and what was received.
BAD_CONSTRUCTION = [
    ("num_train_timesteps", dict(num_train_timesteps=0), ValueError, ">= 1", "got 0"),
    ("num_train_timesteps", dict(num_train_timesteps=-1), ValueError, ">= 1", "got -1"),
    ("num_train_timesteps", dict(num_train_timesteps=10.5), TypeError, "int", "got 10.5"),
    ("num_train_timesteps", dict(num_train_timesteps=True), TypeError, "int", "got True"),
    ("solver", dict(solver="rk45"), ValueError, ", ".join(map(repr, [*FIXED_STEP_SOLVERS, "dopri5"])), "got 'rk45'"),
    ("solver", dict(solver=None), ValueError, "'euler'", "'dopri5'", "got None"),
    ("shift", dict(shift=0), ValueError, "(0, 1000]", "got 0"),
    ("shift", dict(shift=-1.0), ValueError, "(0, 1000]", "got -1.0"),
    ("shift", dict(shift=NAN), ValueError, "(0, 1000]", "got nan"),
    ("shift", dict(shift=INF), ValueError, "(0, 1000]", "got inf"),
    ("shift", dict(shift="1"), TypeError, "float", "got '1'"),
    ("rtol", dict(rtol=0.0), ValueError, "(0, 1]", "got 0.0"),
    ("rtol", dict(rtol=NAN), ValueError, "(0, 1]", "got nan"),
    ("rtol", dict(rtol=None), TypeError, "float", "got None"),
    ("atol", dict(atol=0.0), ValueError, "(0, 1]", "got 0.0"),
    ("atol", dict(atol=-1e-6), ValueError, "(0, 1]", "got -1e-06"),
    ("atol", dict(atol="1e-6"), TypeError, "float", "got '1e-6'"),
    ("error_norm", dict(error_norm="max"), ValueError, "'sample', 'batch'", "got 'max'"),
    ("diffusion_form", dict(diffusion_form="sbdm"), ValueError, ", ".join(map(repr, FORMS)), "got 'sbdm'"),
    ("diffusion_form", dict(diffusion_form=None), ValueError, "'constant'", "got None"),
    ("diffusion_norm", dict(diffusion_norm=-0.1), ValueError, "[0, 1000]", "got -0.1"),
    ("diffusion_norm", dict(diffusion_norm=NAN), ValueError, "[0, 1000]", "got nan"),
    ("diffusion_norm", dict(diffusion_norm=INF), ValueError, "[0, 1000]", "got inf"),
    ("diffusion_norm", dict(diffusion_norm="1"), TypeError, "float", "got '1'"),
    ("last_step", dict(last_step="Mean"), ValueError, ", ".join(map(repr, LAST_STEPS)), "got 'Mean'"),
    ("last_step", dict(last_step=None), ValueError, "'none'", "got None"),
    ("last_step_size", dict(last_step_size=0), ValueError, "(0, 1)", "got 0"),
    ("last_step_size", dict(last_step_size=1.0), ValueError, "(0, 1)", "got 1.0"),
    ("last_step_size", dict(last_step_size=NAN), ValueError, "(0, 1)", "got nan"),
    ("last_step_size", dict(last_step_size=None), TypeError, "float", "got None"),
]

BAD_LAYOUTS = [
    ("num_inference_steps", dict(num_inference_steps=0), ValueError, ">= 1", "got 0"),
    ("num_inference_steps", dict(num_inference_steps=-3), ValueError, ">= 1", "got -3"),
    ("num_inference_steps", dict(num_inference_steps=2.5), TypeError, "int", "got 2.5"),
    ("num_inference_steps", dict(num_inference_steps=True), TypeError, "int", "got True"),
    ("num_inference_steps", dict(), TypeError, "int", "got None"),
    ("num_inference_steps", dict(num_inference_steps=3, sigmas=[1.0, 0.5]), ValueError, "`sigmas`, 2", "got 3"),
    ("sigmas", dict(sigmas=[]), ValueError, "strictly decreasing", "(0, 1]", "got []"),
    ("sigmas", dict(sigmas=[0.5, 0.5]), ValueError, "strictly decreasing", "(0, 1]", "got [0.5, 0.5]"),
    ("sigmas", dict(sigmas=[0.25, 0.75]), ValueError, "strictly decreasing", "(0, 1]", "got [0.25, 0.75]"),
    ("sigmas", dict(sigmas=[1.5, 0.5]), ValueError, "strictly decreasing", "(0, 1]", "got [1.5, 0.5]"),
    ("sigmas", dict(sigmas=[0.5, 0.0]), ValueError, "strictly decreasing", "(0, 1]", "got [0.5, 0.0]"),
    ("sigmas", dict(sigmas=[NAN]), ValueError, "strictly decreasing", "(0, 1]", "got [nan]"),
    ("sigmas", dict(sigmas=0.5), ValueError, "strictly decreasing", "(0, 1]", "got 0.5"),
    ("sigmas", dict(sigmas=[[1.0]]), ValueError, "strictly decreasing", "(0, 1]", "got [[1.0]]"),
    ("sigmas", dict(sigmas=["1.0"]), (TypeError, ValueError), "strictly decreasing", "(0, 1]", "got ['1.0']"),
    ("sigmas", dict(sigmas=[1.0, 0.5], timesteps=[1000, 500]), ValueError, "`timesteps`", "got [1.0, 0.5]", "[1000"),
    ("num_inference_steps", dict(num_inference_steps=3, timesteps=[1000]), ValueError, "`timesteps`, 1", "got 3"),
    ("timesteps", dict(timesteps=[]), ValueError, "strictly decreasing", "(0, 1000]", "got []"),
    ("timesteps", dict(timesteps=[500, 500]), ValueError, "strictly decreasing", "(0, 1000]", "got [500.0, 500.0]"),
    ("timesteps", dict(timesteps=[250, 750]), ValueError, "strictly decreasing", "(0, 1000]", "got [250.0, 750.0]"),
    (
        "timesteps",
        dict(timesteps=[1000.5, 500]),
        ValueError,
        "strictly decreasing",
        "(0, 1000]",
        "got [1000.5, 500.0]",
    ),
    ("timesteps", dict(timesteps=[500, 0]), ValueError, "strictly decreasing", "(0, 1000]", "got [500.0, 0.0]"),
    ("timesteps", dict(timesteps=[INF]), ValueError, "strictly decreasing", "(0, 1000]", "got [inf]"),
    ("timesteps", dict(timesteps=[NAN]), ValueError, "strictly decreasing", "(0, 1000]", "got [nan]"),
    ("timesteps", dict(timesteps=500), ValueError, "strictly decreasing", "(0, 1000]", "got 500.0"),
    ("timesteps", dict(timesteps=[[1000]]), ValueError, "strictly decreasing", "(0, 1000]", "got [[1000.0]]"),
    ("timesteps", dict(timesteps=["1000"]), ValueError, "strictly decreasing", "(0, 1000]", "got ['1000']"),
]

BAD_NOISE = [
    ("noise", dict(noise=NOISE[:1]), ValueError, "(2, 6)", "got (1, 6)"),
    ("noise", dict(noise=NOISE[:, :1]), ValueError, "(2, 6)", "got (2, 1)"),
    ("timestep", dict(timestep=torch.zeros(3)), ValueError, "scalar", "(2,)", "got (3,)"),
    ("timestep", dict(timestep=torch.zeros(2, 1)), ValueError, "scalar", "(2,)", "got (2, 1)"),
    ("timestep", dict(timestep=-1), ValueError, "[0, 1000]", "got -1.0"),
    ("timestep", dict(timestep=1000.5), ValueError, "[0, 1000]", "got 1000.5"),
    ("timestep", dict(timestep=torch.tensor([0.0, NAN])), ValueError, "[0, 1000]", "got [0.0, nan]"),
]

BAD_STEPS = [
    ("timestep", dict(timestep=1000.5), ValueError, "[0, 1000.0]", "got 1000.5"),
    ("timestep", dict(timestep=-0.5), ValueError, "[0, 1000.0]", "got -0.5"),
    ("timestep", dict(timestep=float("nan")), ValueError, "[0, 1000.0]", "got nan"),
    ("model_output", dict(model_output=VELOCITY[:1]), ValueError, "(2, 6)", "got (1, 6)"),
    ("model_output", dict(model_output=VELOCITY[0, 0]), ValueError, "(2, 6)", "got ()"),
    ("model_output", dict(model_output=VELOCITY[None]), ValueError, "(2, 6)", "got (1, 2, 6)"),
    ("variance_noise", dict(variance_noise=NOISE[:1]), ValueError, "(2, 6)", "got (1, 6)"),
    ("variance_noise", dict(variance_noise=NOISE[0, 0]), ValueError, "(2, 6)", "got ()"),
]

BAD_BEGIN_INDICES = [
    ("begin_index", dict(begin_index=-1), ValueError, ">= 0", "got -1"),
    ("begin_index", dict(begin_index=1.5), TypeError, "int", "got 1.5"),
    ("begin_index", dict(begin_index=True), TypeError, "int", "got True"),
    ("begin_index", dict(begin_index=None), TypeError, "int", "got None"),
]


@table(BAD_CONSTRUCTION)
def test_bad_arguments_of_the_constructor(argument, kwargs, exception, fragments):
    with pytest.raises(exception, match=says(f"`{argument}`", *fragments)):
        DoDFlowMatchScheduler(**kwargs)


@table(BAD_LAYOUTS)
def test_bad_arguments_of_set_timesteps(argument, kwargs, exception, fragments):
    scheduler = laid_out(3)
    with pytest.raises(exception, match=says(f"`{argument}`", *fragments)):
        scheduler.set_timesteps(**kwargs)
    assert scheduler.num_inference_steps == 3 and len(scheduler.timesteps) == 3  # as it was


@table(BAD_NOISE)
def test_bad_arguments_of_scale_noise_and_add_noise(argument, kwargs, exception, fragments):
    scheduler = DoDFlowMatchScheduler()
    kwargs = dict(sample=SAMPLE, timestep=500, noise=NOISE) | kwargs
    with pytest.raises(exception, match=says(f"`{argument}`", *fragments)):
        scheduler.scale_noise(**kwargs)
    with pytest.raises(exception, match=says(f"`{argument}", *fragments)):
        scheduler.add_noise(kwargs["sample"], kwargs["noise"], kwargs["timestep"])


@sde_solvers
@pytest.mark.parametrize(
    ("kwargs", "fragments"),
    [
        (dict(num_inference_steps=1), ["`num_inference_steps`", ">= 2", "got 1"]),
        (dict(sigmas=[0.5]), ["`sigmas` must hold at least 2", "got 1"]),
        (dict(timesteps=[500]), ["`timesteps` must hold at least 2", "got 1"]),
    ],
    ids=str,
)
def test_an_sde_needs_a_step_before_its_last_one(solver, kwargs, fragments):
    scheduler = laid_out(3, solver=solver)
    with pytest.raises(ValueError, match=says(*fragments)):
        scheduler.set_timesteps(**kwargs)
    assert scheduler.num_inference_steps == 3 and len(scheduler.sigmas) == 4  # as it was
    scheduler = DoDFlowMatchScheduler(solver=solver, last_step="none")
    scheduler.set_timesteps(**kwargs)
    assert len(scheduler.timesteps) == 1


@table(BAD_STEPS)
@fixed_step_solvers
def test_bad_arguments_of_step(solver, argument, kwargs, exception, fragments):
    scheduler = laid_out(4, solver=solver)
    with pytest.raises(exception, match=says(f"`{argument}`", *fragments)):
        scheduler.step(**(dict(model_output=VELOCITY, timestep=1000.0, sample=SAMPLE) | kwargs))


@table(BAD_BEGIN_INDICES)
def test_bad_arguments_of_set_begin_index(argument, kwargs, exception, fragments):
    with pytest.raises(exception, match=says(f"`{argument}`", *fragments)):
        laid_out().set_begin_index(**kwargs)


@pytest.mark.parametrize(
    ("function", "rows", "exempt"),
    [
        (DoDFlowMatchScheduler.__init__, BAD_CONSTRUCTION, set()),
        (DoDFlowMatchScheduler.set_timesteps, BAD_LAYOUTS, {"device"}),  # torch's own error
        (DoDFlowMatchScheduler.scale_noise, BAD_NOISE, {"sample"}),  # the noise is compared with it
        (
            DoDFlowMatchScheduler.step,
            BAD_STEPS,
            {"sample", "generator", "return_dict"},
        ),  # the same; Diffusers' error; a flag
        (DoDFlowMatchScheduler.set_begin_index, BAD_BEGIN_INDICES, set()),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_argument_has_a_bad_value(function, rows, exempt):
    assert {row[0] for row in rows} == set(inspect.signature(function).parameters) - {"self"} - exempt


@all_solvers
def test_a_velocity_of_another_shape_is_refused_by_solve(solver):
    # It would broadcast: one sample would drive all.
    with pytest.raises(ValueError, match=says("`velocity_fn`", "(2, 6)", "got (1, 6)")):
        ready(solver).solve(lambda sample, timestep, indices: VELOCITY[:1], SAMPLE)


@fixed_step_solvers
def test_solving_needs_a_layout(solver):
    scheduler = DoDFlowMatchScheduler(solver=solver)
    with pytest.raises(ValueError, match=says("`num_inference_steps` is None", "`set_timesteps` before `solve`")):
        scheduler.solve(lambda sample, timestep, indices: VELOCITY, SAMPLE)


@pytest.mark.parametrize("solver", [solver for solver, number in FIXED_STEP_SOLVERS.items() if number > 1])
def test_steps_start_with_a_whole_interval(solver):
    for evaluation in range(1, FIXED_STEP_SOLVERS[solver]):
        scheduler = DoDFlowMatchScheduler(solver=solver)
        scheduler.set_timesteps(sigmas=[1.0, 0.5])
        scheduler.set_begin_index(evaluation)
        timestep = scheduler.timesteps[evaluation]
        with pytest.raises(ValueError, match=says("`timestep`", "start an interval", repr(solver), f"got {timestep}")):
            scheduler.step(VELOCITY, timestep, SAMPLE)


def test_the_adaptive_solver_points_to_solve():
    scheduler = DoDFlowMatchScheduler(solver="dopri5")
    others = ", ".join(map(repr, FIXED_STEP_SOLVERS))
    with pytest.raises(ValueError, match=says("`step`", others, "'dopri5'", "use `solve`")):
        scheduler.step(VELOCITY, 1000.0, SAMPLE)
    with pytest.raises(ValueError, match=says("`set_timesteps`", others, "'dopri5'", "use `solve`")):
        scheduler.set_timesteps(4)


TEXT, SCALAR = "0.5", torch.tensor(1.0)
ARGUMENTS = tuple(inspect.signature(DoDFlowMatchScheduler).parameters)


@pytest.mark.parametrize(
    ("call", "exception", "fragments"),
    [
        (lambda s: s.step(None, 1000, SAMPLE), TypeError, ["`model_output`", "Tensor", "got None"]),
        (lambda s: s.step(VELOCITY.numpy(), 1000, SAMPLE), TypeError, ["`model_output`", "Tensor"]),
        (lambda s: s.step(VELOCITY.long(), 1000, SAMPLE), TypeError, ["`model_output`", "floating-point", "int64"]),
        (lambda s: s.step(VELOCITY, 1000, SAMPLE.tolist()), TypeError, ["`sample`", "Tensor"]),
        (lambda s: s.step(SCALAR, 1000, SCALAR), ValueError, ["`sample`", "batch dimension"]),
        (lambda s: s.step(VELOCITY, TEXT, SAMPLE), TypeError, ["`timestep`", "got '0.5'"]),
        (lambda s: s.step(VELOCITY, torch.ones(2), SAMPLE), ValueError, ["`timestep`", "one", "shape (2,)"]),
        (lambda s: s.step(VELOCITY, 1000, SAMPLE, generator=3), TypeError, ["`generator`", "got 3"]),
        (lambda s: s.step(VELOCITY, 1000, SAMPLE, generator=[3, 4]), TypeError, ["`generator`", "got 3"]),
        (lambda s: s.step(VELOCITY, 1000, SAMPLE, generator=[]), ValueError, ["`generator`", "list of 2", "of 0"]),
        (lambda s: s.step(VELOCITY, 1000, SAMPLE, variance_noise=3), TypeError, ["`variance_noise`", "got 3"]),
        (lambda s: s.scale_noise(None, 500, NOISE), TypeError, ["`sample`", "got None"]),
        (lambda s: s.scale_noise(SAMPLE, 500, 3), TypeError, ["`noise`", "got 3"]),
        (lambda s: s.scale_noise(SAMPLE, TEXT, NOISE), TypeError, ["`timestep`", "got '0.5'"]),
        (lambda s: s.scale_noise(SAMPLE, [[1], [2, 3]], NOISE), TypeError, ["`timestep`", "one for each sample"]),
        (lambda s: s.add_noise(SAMPLE, NOISE, None), TypeError, ["`timestep`", "got None"]),
        (lambda s: s.solve(3, SAMPLE), TypeError, ["`velocity_fn`", "callable", "got 3"]),
        (lambda s: s.solve(lambda *_: 3, SAMPLE), TypeError, ["`velocity_fn`", "Tensor", "got 3"]),
        (lambda s: s.solve(lambda x, *_: x, SAMPLE, callback=3), TypeError, ["`callback`", "callable", "got 3"]),
        (lambda s: s.solve(lambda x, *_: x, None), TypeError, ["`sample`", "got None"]),
    ],
)
@pytest.mark.parametrize("solver", ["euler", "euler_maruyama"])
def test_arguments_of_other_types_and_shapes(solver, call, exception, fragments):
    with pytest.raises(exception, match=says(*fragments)):
        call(laid_out(solver=solver))


def test_an_adaptive_scheduler_has_the_other_methods_of_schedulers(tmp_path):
    scheduler = DoDFlowMatchScheduler(solver="dopri5")
    assert torch.equal(scheduler.add_noise(SAMPLE, NOISE, 500.0), (SAMPLE + NOISE) / 2)
    assert torch.equal(scheduler.scale_noise(SAMPLE, torch.tensor([0.0, 1000.0]), NOISE)[1], NOISE[1])
    assert scheduler.scale_model_input(SAMPLE, 500.0) is SAMPLE
    assert scheduler.init_noise_sigma == 1 and scheduler.order == 1 and len(scheduler) == 1000
    assert len(scheduler.timesteps) == 1000 and len(scheduler.sigmas) == 1001
    scheduler.set_begin_index(3)
    assert scheduler.begin_index == 3 and scheduler.step_index is None
    scheduler.save_pretrained(tmp_path)
    for loaded in (DoDFlowMatchScheduler.from_pretrained(tmp_path), scheduler.from_config(scheduler.config)):
        assert {name: loaded.config[name] for name in ARGUMENTS} == {
            name: scheduler.config[name] for name in ARGUMENTS
        }
    assert scheduler.compatibles == [DoDFlowMatchScheduler]
    for method in (lambda: scheduler.set_timesteps(4), lambda: scheduler.step(VELOCITY, 1000, SAMPLE)):
        with pytest.raises(ValueError, match=says("'dopri5'", "use `solve`")):
            method()
