import inspect
import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from helpers import says

from diffusers_dod import DoDFlowMatchScheduler


NAN, INF = math.nan, math.inf
SAMPLE = torch.linspace(-1, 1, 12).reshape(2, 6)
VELOCITY = torch.linspace(2, -1, 12).reshape(2, 6)
NOISE = torch.linspace(0, 3, 12).reshape(2, 6)

all_solvers = pytest.mark.parametrize("solver", ["euler", "heun", "dopri5"])


def laid_out(num_inference_steps=4, **kwargs):
    """A scheduler with `num_inference_steps` intervals."""
    scheduler = DoDFlowMatchScheduler(**kwargs)
    scheduler.set_timesteps(num_inference_steps)
    return scheduler


# ----------------------------------------------------------------------------------------------------------- layout


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        (dict(), [1000, 750, 500, 250]),
        # One entry per evaluation: each interval at its start and at its end.
        (dict(solver="heun"), [1000, 750, 750, 500, 500, 250, 250, 0]),
        (dict(num_train_timesteps=100), [100, 75, 50, 25]),
        # shift * s / (1 + (shift - 1) * s) at s = 1, 3/4, 1/2, 1/4.
        (dict(shift=3.0), [1000, 900, 750, 500]),
        (dict(shift=3.0, solver="heun"), [1000, 900, 900, 750, 750, 500, 500, 0]),
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


def test_device_is_that_of_the_timesteps():
    scheduler = DoDFlowMatchScheduler()
    scheduler.set_timesteps(4, device="meta")
    assert scheduler.timesteps.device.type == "meta"
    assert scheduler.sigmas.device.type == "cpu"  # read by `step` without waiting for a device


def test_constants():
    scheduler = DoDFlowMatchScheduler()
    assert scheduler.init_noise_sigma == 1.0
    assert scheduler.order == 1
    assert torch.equal(scheduler.scale_model_input(SAMPLE, 500.0), SAMPLE)
    assert len(scheduler) == 1000 and len(DoDFlowMatchScheduler(num_train_timesteps=7)) == 7


# ------------------------------------------------------------------------------------------------------------ steps


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_step_returns_the_dtype_of_the_sample_and_computes_in_fp32(solver, dtype):
    # Thirds, unlike quarters, are not exact in bf16.
    scheduler, reference = laid_out(3, solver=solver), laid_out(3, solver=solver)
    sample, velocity = SAMPLE.to(dtype), VELOCITY.to(dtype)
    for timestep in scheduler.timesteps[:2]:  # for Heun, both evaluations of an interval
        actual = scheduler.step(velocity, timestep, sample).prev_sample
        expected = reference.step(velocity.float(), timestep, sample.float()).prev_sample
        assert actual.dtype == dtype and torch.equal(actual, expected.to(dtype))
    # A velocity in less precision than the sample, as under autocast.
    assert laid_out(solver=solver).step(VELOCITY.bfloat16(), 1000.0, SAMPLE).prev_sample.dtype == torch.float32


@all_solvers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_solve_returns_the_dtype_of_the_sample(solver, dtype):
    scheduler = DoDFlowMatchScheduler(solver=solver) if solver == "dopri5" else laid_out(solver=solver)
    output = scheduler.solve(lambda sample, timestep: VELOCITY.to(dtype), SAMPLE.to(dtype))
    assert output.prev_sample.dtype == dtype and output.prev_sample.shape == SAMPLE.shape


def test_step_returns_a_tuple_on_request():
    (sample,) = laid_out().step(VELOCITY, 1000.0, SAMPLE, return_dict=False)
    output = laid_out().step(VELOCITY, 1000.0, SAMPLE)
    assert torch.equal(sample, output.prev_sample) and torch.equal(sample, output[0])
    assert torch.equal(sample, SAMPLE - VELOCITY / 4)


@pytest.mark.parametrize(("solver", "evaluations"), [("euler", 4), ("heun", 8)])
def test_steps_are_counted_and_one_too_many_is_refused(solver, evaluations):
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
    message = says(f"All {evaluations // 2} steps are done", "`timestep`", "`set_timesteps`")
    with pytest.raises(ValueError, match=message):
        scheduler.step(VELOCITY, scheduler.timesteps[-1], SAMPLE)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("steps", [4, None])
def test_single_steps_may_start_at_any_time(solver, steps):
    """Each leads to the end of the interval it lies in: the velocity is constant, so both solvers are exact."""
    scheduler = DoDFlowMatchScheduler(solver=solver)  # with the training grid, of 1000 intervals
    if steps is not None:
        scheduler.set_timesteps(steps)
    evaluations = 2 if solver == "heun" else 1
    intervals = steps or 1000
    for timestep, end in ((1000.0, 1 - 1 / intervals), (0, 0.0), (0.25, 0.0), (torch.tensor(250.0), None)):
        scheduler._reset()
        sample = SAMPLE
        for _ in range(evaluations):
            sample = scheduler.step(VELOCITY, timestep, sample).prev_sample
        start = float(timestep) / 1000
        end = start - 1 / intervals if end is None else end
        torch.testing.assert_close(sample, SAMPLE + (end - start) * VELOCITY)
    assert scheduler.step_index is not None


def test_after_the_last_step_a_timestep_is_looked_up_again():
    scheduler = laid_out(4)
    last = scheduler.step(VELOCITY, scheduler.timesteps[-1], SAMPLE).prev_sample
    again = scheduler.step(VELOCITY, scheduler.timesteps[-1], SAMPLE).prev_sample
    first = scheduler.step(VELOCITY, scheduler.timesteps[0], SAMPLE).prev_sample
    torch.testing.assert_close(last, SAMPLE - VELOCITY / 4)
    assert torch.equal(last, again) and torch.equal(first, last)
    assert scheduler.step_index == 1


@pytest.mark.parametrize("how", ["begin index", "timestep"])
@pytest.mark.parametrize(("solver", "index"), [("euler", 2), ("heun", 4)])
def test_steps_may_begin_in_between(solver, index, how):
    scheduler = laid_out(4, solver=solver)
    if how == "begin index":
        scheduler.set_begin_index(index)
        assert scheduler.begin_index == index
    # Heun's list has 500 twice, as the end of an interval and as the start of the next: a first step starts one.
    assert scheduler.timesteps[index] == 500
    sample = scheduler.step(VELOCITY, scheduler.timesteps[index], SAMPLE).prev_sample
    assert scheduler.step_index == index + 1
    torch.testing.assert_close(sample, SAMPLE - VELOCITY / 4)


@pytest.mark.parametrize(("solver", "evaluations"), [("euler", 1), ("heun", 2)])
def test_solve_counts_and_calls_back(solver, evaluations):
    scheduler, seen, timesteps = laid_out(4, solver=solver), [], []

    def velocity(sample, timestep):
        timesteps.append(float(timestep))
        return VELOCITY

    def callback(index, timestep, sample):
        seen.append((index, float(timestep), sample))

    for _ in range(2):  # a trajectory leaves nothing behind for the next
        seen.clear(), timesteps.clear()
        output = scheduler.solve(velocity, SAMPLE, callback=callback)
        assert timesteps == scheduler.timesteps.tolist() == [timestep for _, timestep, _ in seen]
        assert [index for index, *_ in seen] == list(range(4 * evaluations))
        assert torch.equal(seen[-1][2], output.prev_sample)
        assert (output.num_evaluations, output.num_accepted, output.num_rejected) == (4 * evaluations, 4, 0)


@all_solvers
def test_callback_stops_solve(solver):
    scheduler = DoDFlowMatchScheduler(solver=solver) if solver == "dopri5" else laid_out(solver=solver)
    seen = []

    def callback(index, timestep, sample):
        seen.append(sample)
        return index < 1

    output = scheduler.solve(lambda sample, timestep: torch.sin(9 * sample), SAMPLE, callback=callback)
    assert len(seen) == 2 and torch.equal(output.prev_sample, seen[-1])
    if solver == "dopri5":
        assert output.num_accepted >= 2


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

CONFIG = dict(num_train_timesteps=500, solver="heun", shift=2.0, rtol=1e-2, atol=1e-4, error_norm="batch")


def test_config_survives_saving(tmp_path):
    assert set(CONFIG) == set(inspect.signature(DoDFlowMatchScheduler).parameters)
    DoDFlowMatchScheduler(**CONFIG).save_pretrained(tmp_path)
    loaded = DoDFlowMatchScheduler.from_pretrained(tmp_path)
    assert {name: loaded.config[name] for name in CONFIG} == CONFIG
    loaded.set_timesteps(3)
    assert torch.equal(loaded.timesteps, laid_out(3, **CONFIG).timesteps)


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


def table(rows):
    """Rows (argument, kwargs, exception, *fragments) as parameters named after the argument."""
    return pytest.mark.parametrize(
        ("argument", "kwargs", "exception", "fragments"),
        [
            pytest.param(argument, kwargs, exception, fragments, id=f"{argument}-{number}")
            for number, (argument, kwargs, exception, *fragments) in enumerate(rows)
        ],
    )


# Argument, keyword arguments, exception, and what its message must hold beside the argument's name: what is accepted
# and what was received.
BAD_CONSTRUCTION = [
    ("num_train_timesteps", dict(num_train_timesteps=0), ValueError, ">= 1", "got 0"),
    ("num_train_timesteps", dict(num_train_timesteps=-1), ValueError, ">= 1", "got -1"),
    ("num_train_timesteps", dict(num_train_timesteps=10.5), TypeError, "int", "got 10.5"),
    ("num_train_timesteps", dict(num_train_timesteps=True), TypeError, "int", "got True"),
    ("solver", dict(solver="rk4"), ValueError, "'euler', 'heun', 'dopri5'", "got 'rk4'"),
    ("solver", dict(solver=None), ValueError, "'euler', 'heun', 'dopri5'", "got None"),
    ("shift", dict(shift=0), ValueError, "(0, inf)", "got 0"),
    ("shift", dict(shift=-1.0), ValueError, "(0, inf)", "got -1.0"),
    ("shift", dict(shift=NAN), ValueError, "(0, inf)", "got nan"),
    ("shift", dict(shift=INF), ValueError, "(0, inf)", "got inf"),
    ("shift", dict(shift="1"), TypeError, "float", "got '1'"),
    ("rtol", dict(rtol=0.0), ValueError, "(0, inf)", "got 0.0"),
    ("rtol", dict(rtol=NAN), ValueError, "(0, inf)", "got nan"),
    ("rtol", dict(rtol=None), TypeError, "float", "got None"),
    ("atol", dict(atol=0.0), ValueError, "(0, inf)", "got 0.0"),
    ("atol", dict(atol=-1e-6), ValueError, "(0, inf)", "got -1e-06"),
    ("atol", dict(atol="1e-6"), TypeError, "float", "got '1e-6'"),
    ("error_norm", dict(error_norm="max"), ValueError, "'sample', 'batch'", "got 'max'"),
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


@table(BAD_STEPS)
@pytest.mark.parametrize("solver", ["euler", "heun"])
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
        (DoDFlowMatchScheduler.step, BAD_STEPS, {"sample", "generator", "return_dict"}),  # the same; not used; a flag
        (DoDFlowMatchScheduler.set_begin_index, BAD_BEGIN_INDICES, set()),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_argument_has_a_bad_value(function, rows, exempt):
    assert {row[0] for row in rows} == set(inspect.signature(function).parameters) - {"self"} - exempt


@all_solvers
def test_a_velocity_of_another_shape_is_refused_by_solve(solver):
    scheduler = DoDFlowMatchScheduler(solver=solver) if solver == "dopri5" else laid_out(solver=solver)
    # It would broadcast: one sample would drive all.
    with pytest.raises(ValueError, match=says("(2, 6)", "got (1, 6)")):
        scheduler.solve(lambda sample, timestep: VELOCITY[:1], SAMPLE)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_solving_needs_a_layout(solver):
    scheduler = DoDFlowMatchScheduler(solver=solver)
    with pytest.raises(ValueError, match=says("`num_inference_steps` is None", "`set_timesteps` before `solve`")):
        scheduler.solve(lambda sample, timestep: VELOCITY, SAMPLE)


def test_heun_starts_with_a_whole_interval():
    scheduler = laid_out(4, solver="heun")
    scheduler.set_begin_index(1)  # the second evaluation of the first interval
    with pytest.raises(ValueError, match=says("`timestep`", "start an interval", "got 750")):
        scheduler.step(VELOCITY, scheduler.timesteps[1], SAMPLE)


def test_the_adaptive_solver_points_to_solve():
    scheduler = DoDFlowMatchScheduler(solver="dopri5")
    with pytest.raises(ValueError, match=says("`step`", "'euler', 'heun'", "'dopri5'", "use `solve`")):
        scheduler.step(VELOCITY, 1000.0, SAMPLE)
    with pytest.raises(ValueError, match=says("`set_timesteps`", "'euler', 'heun'", "'dopri5'", "use `solve`")):
        scheduler.set_timesteps(4)
