"""
dopri5 against known answers: the closed form of the flow to Gaussian data, torchdiffeq's own trajectories and the
protocols of SiT and FiTv2; then what each sample gets, and where the integration gives up.
"""

import functools
import itertools
import math
import weakref

import pytest
import torch
from golden_data import GAUSSIAN, gaussian_error, gaussian_velocity, golden, golden_model, solve_gaussian
from helpers import says
from torchdiffeq import odeint

from diffusers_dod import DoDFlowMatchScheduler, adaptive
from diffusers_dod.adaptive import integrate_by_batch, integrate_by_sample
from diffusers_dod.guidance import GuidedVelocity
from diffusers_dod.tableaus import ButcherTableau


FITV2 = golden("fitv2_tiny_io")


def test_dopri5_protocol_agrees_with_fit():
    output = solve_gaussian("dopri5", error_norm="batch")
    torch.testing.assert_close(output.prev_sample, GAUSSIAN["dopri5_pts50_tclamp1"], atol=1e-4, rtol=0)
    assert output.num_evaluations.tolist() == [GAUSSIAN["dopri5_pts50_tclamp1.nfe"]] * 2
    # 2 to choose the first step, then 6 per step (the seventh stage is the next step's first).
    assert torch.equal(output.num_evaluations, 2 + 6 * (output.num_accepted + output.num_rejected))


def test_dopri5_that_lands_on_the_end_is_better_and_cheaper_than_sits():
    ours = solve_gaussian("dopri5")
    assert gaussian_error(ours.prev_sample) < gaussian_error(GAUSSIAN["dopri5_pts50"])
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


def velocity_at_sigma(velocity_fn, sample: torch.Tensor, sigma: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return velocity_fn(sample, (1000 * sigma).float(), indices)


def integrate_with_torchdiffeq(velocity_fn, sample: torch.Tensor, rtol: float, method: str):
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
    return odeint(velocity, sample, sigmas, rtol=rtol, atol=1e-6, method=method, options=options)[-1], counts


def assert_dopri5_is_torchdiffeqs(velocity_fn, sample: torch.Tensor, rtol: float):
    """
    In fp64: the errors of the first steps, which are small, are those of rounding in fp32, and with them differ the
    lengths of the steps that follow.
    """
    expected, (num_evaluations, num_rejected) = integrate_with_torchdiffeq(
        velocity_fn, sample.double(), rtol, "dopri5"
    )
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
        return solve_gaussian("dopri5", **config).num_evaluations.sum()

    assert evaluations(rtol=1e-5) > evaluations() < evaluations(rtol=1e-8, atol=1e-5) < evaluations(rtol=1e-8)
    precise, rough = solve_gaussian("dopri5", rtol=1e-6), solve_gaussian("dopri5")
    assert gaussian_error(precise.prev_sample) < 1e-4 < gaussian_error(rough.prev_sample)


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
def test_dopri5_gives_up_after_so_many_attempts(error_norm, monkeypatch):
    """No step resolves a velocity that changes its sign all the time, but for steps that would take days."""
    monkeypatch.setattr(adaptive, "MAX_ATTEMPTS", 100)
    signs = itertools.cycle([1.0, -1.0])
    scheduler = DoDFlowMatchScheduler(solver="dopri5", error_norm=error_norm)
    with pytest.raises(ValueError, match=says("`rtol`", "`atol`", "got 0.001 and 1e-06", "100 attempts")):
        scheduler.solve(at_most(2 + 6 * 100, lambda x, t, indices: torch.full_like(x, next(signs))), START)


BOGACKI_SHAMPINE = ButcherTableau(
    3,
    (0.0, 1 / 2, 3 / 4, 1.0),
    ((), (1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    (2 / 9, 1 / 3, 4 / 9, 0.0),
    (2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8),
)


@pytest.mark.parametrize("rtol", [1e-3, 1e-6])
def test_another_method_with_an_error_estimate_is_torchdiffeqs(rtol):
    noise = GAUSSIAN["noise"][:1].double()
    expected, (num_evaluations, num_rejected) = integrate_with_torchdiffeq(gaussian_velocity, noise, rtol, "bosh3")
    velocity = functools.partial(velocity_at_sigma, gaussian_velocity)
    actual, counts = integrate_by_sample(velocity, noise, BOGACKI_SHAMPINE, rtol, 1e-6)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert counts[[0, 2], 0].tolist() == [num_evaluations, num_rejected]
    by_batch, _ = integrate_by_batch(velocity, noise, "bosh3", rtol, 1e-6)
    torch.testing.assert_close(by_batch, expected, atol=10 * rtol, rtol=0)  # as it interpolates


@pytest.mark.parametrize("error_norm", ["sample", "batch"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_dopri5_needs_finite_velocities(error_norm, bad):
    def velocity(sample, timestep, indices):
        is_bad = (indices == 1) & (timestep < 500)  # one of the samples, from some time on
        return torch.where(is_bad[:, None], bad, -sample)

    with pytest.raises(ValueError, match=says("`velocity_fn` must return finite numbers", "at sigma")) as caught:
        DoDFlowMatchScheduler(solver="dopri5", error_norm=error_norm).solve(at_most(1000, velocity), START)
    assert 0 <= float(str(caught.value).split()[-1].rstrip(".")) < 0.5


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


def test_dopri5_samples_in_protocol_mode_agree_with_fitv2():
    """
    One step of this trajectory ends within rounding of sigma = 0: whether it counts as past the end, or needs one more
    step of 6 evaluations, depends on the processor. Among several roundings of fp32 some take the recorded path.
    """
    expected, num_evaluations = FITV2["sample.dopri5_pts50.nocfg"], int(FITV2["sample.dopri5_pts50.nocfg.nfe"])
    guided, labels = GuidedVelocity(golden_model(), 2), FITV2["sample.y"]

    def velocity(sample, timestep, indices):
        velocity = guided(sample, timestep, labels, None, 1.0, indices)
        return velocity * (1 + 1e-7 * torch.randn_like(velocity))

    torch.manual_seed(0)
    paths = set()
    for _ in range(20):
        scheduler = DoDFlowMatchScheduler(solver="dopri5", error_norm="batch")
        output = scheduler.solve(velocity, FITV2["sample.noise"])
        paths.add(output.num_evaluations[0].item())
        same_path = output.num_evaluations[0] == num_evaluations
        torch.testing.assert_close(output.prev_sample, expected, atol=1e-4 if same_path else 1e-3, rtol=0)
    assert num_evaluations in paths and paths <= {num_evaluations - 6, num_evaluations}
