"""Each way of guiding: against formulas by hand, FiTv2's own guided samples, and what it may cost."""

import dataclasses
import inspect
import math
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import FirstBlockCacheConfig, guiders
from golden_data import golden, golden_model, timestep_of
from helpers import assert_near, normal, record_calls, says, tiny_latent_embedder, tiny_pipeline, tiny_transformer

from diffusers_dod import DoDFlowMatchScheduler, DoDTransformer2DModel
from diffusers_dod.guidance import (
    FAILING_GUIDERS,
    Guidance,
    GuidedVelocity,
    classifier_free_guidance,
    combine,
    power_cosine_scale,
    rescale_guidance,
)


pytestmark = pytest.mark.usefixtures("no_grad")

FITV2 = golden("fitv2_tiny_io")
NULL_CLASS = 10
LABELS = torch.tensor([1, 3])
ALL, FIRST = [0, 1, 2, 3], [0]  # blocks whose attention is computed


LATENTS, PRIORS = normal(2, 4, 8, 8), normal(2, 16, 32, seed=1)
IMAGE = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def model() -> DoDTransformer2DModel:
    return tiny_transformer()


def guide(model, scale=3.0, priors=PRIORS, timestep=600.0, latents=LATENTS, labels=LABELS, **guidance):
    """A guided velocity by a `GuidedVelocity` of its own."""
    return GuidedVelocity(model, len(latents), Guidance(**guidance))(latents, timestep, labels, priors, scale)


def predict(model, labels=LABELS, priors=None, timestep=600.0, latents=LATENTS):
    return model(latents, timestep, labels, priors).sample


def predictions(model) -> SimpleNamespace:
    """What guidance puts together: under class and prior, without one, the other, and both."""
    null = torch.full_like(LABELS, NULL_CLASS)
    return SimpleNamespace(
        full=predict(model, priors=PRIORS),
        no_class=predict(model, null, PRIORS),
        no_prior=predict(model),
        null=predict(model, null),
    )


def sizes(calls) -> list[int]:
    return [len(call.hidden_states) for call in calls]


def rows(calls) -> list[tuple[int, int]]:
    """Rows of each forward pass, and how many of them have a prior."""
    return [(len(c.hidden_states), 0 if c.prior_embeds is None else len(c.prior_embeds)) for c in calls]


def sample(pipe, class_labels=(1, 3), **kwargs):
    latents = [normal(len(class_labels), 4, 8, 8, seed=seed) for seed in (2, 3)]
    if {"image", "prior_latents"} & set(kwargs) or pipe.latent_embedder is None or kwargs.get("num_stages") == 1:
        latents = latents[:1]
    return pipe(list(class_labels), **{"output_type": "latent", "latents": latents, **kwargs})


assert_near = partial(assert_near, rtol=2e-5, atol=2e-5)


def assert_differ(actual: torch.Tensor, other: torch.Tensor) -> None:
    assert (actual - other).abs().max() > 1e-2


# ----------------------------------------------------------------------------------------------------------- FiTv2


@pytest.mark.parametrize("shape", ["sq8x8", "ns8x12"])
@pytest.mark.parametrize(("channels", "name"), [(None, "allch"), (4, "allch"), (3, "first3ch")])
def test_guided_velocities_agree_with_fitv2(shape, channels, name):
    data = {key.removeprefix(f"cfg_{shape}."): value for key, value in FITV2.items()}
    kwargs = {"latents": data["latents"], "timestep": timestep_of(data["t"]), "labels": data["y"], "priors": None}
    velocity = guide(golden_model(), 4.0, channels=channels, **kwargs)
    torch.testing.assert_close(velocity, -data[f"velocity_cfg_{name}"], atol=5e-5, rtol=0)
    torch.testing.assert_close(guide(golden_model(), 1.0, **kwargs), -data["velocity_cond"], atol=1e-5, rtol=0)
    assert_differ(data["velocity_cfg_allch"], data["velocity_cfg_first3ch"])


@pytest.mark.parametrize(("name", "scale"), [("nocfg", 1.0), ("cfg4_first3ch", 4.0)])
def test_euler_samples_agree_with_fitv2(name, scale):
    guided_velocity = GuidedVelocity(golden_model(), len(FITV2["sample.y"]), Guidance(channels=3))
    scheduler = DoDFlowMatchScheduler()
    scheduler.set_timesteps(10)
    output = scheduler.solve(
        lambda latents, timestep, indices: guided_velocity(latents, timestep, FITV2["sample.y"], None, scale, indices),
        FITV2["sample.noise"],
    )
    torch.testing.assert_close(output.prev_sample, FITV2[f"sample.euler_pts11.{name}"], atol=5e-5, rtol=0)
    assert set(guided_velocity.num_evaluations.tolist()) == {int(FITV2[f"sample.euler_pts11.{name}.nfe"])}
    assert set(guided_velocity.num_guided_evaluations.tolist()) == {0 if scale == 1 else 10}


# ---------------------------------------------------------------------------------------- null conditions, by hand

WAYS = {
    # guidance, rows, of them with a prior, labels after those of the samples, and the formula for scale 3
    "class and prior": ({}, (4, 2), [NULL_CLASS] * 2, lambda v: v.null + 3 * (v.full - v.null)),
    "class": ({"null_condition": "class"}, (4, 4), [NULL_CLASS] * 2, lambda v: v.no_class + 3 * (v.full - v.no_class)),
    "prior": ({"null_condition": "prior"}, (4, 2), [1, 3], lambda v: v.no_prior + 3 * (v.full - v.no_prior)),
    "separate": (
        {"prior_scale": 1.5},
        (6, 2),
        [1, 3] + [NULL_CLASS] * 2,
        lambda v: v.null + 3 * (v.no_prior - v.null) + 1.5 * (v.full - v.no_prior),
    ),
    "separate without prior": (
        {"prior_scale": 0},
        (6, 2),
        [1, 3] + [NULL_CLASS] * 2,
        lambda v: v.null + 3 * (v.no_prior - v.null),
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_null_condition_is_its_formula_in_one_pass(model, way):
    guidance, expected_rows, null_labels, formula = WAYS[way]
    by_hand = {name: entry[-1](predictions(model)) for name, entry in WAYS.items()}
    calls = record_calls(model)
    velocity = guide(model, 3.0, **guidance)
    assert rows(calls) == [expected_rows]
    (call,) = calls
    assert call.class_labels.tolist() == [1, 3, *null_labels]
    for copy in call.hidden_states.split(2):
        assert torch.equal(copy, LATENTS)
    for priors in call.prior_embeds.split(2):
        assert torch.equal(priors, PRIORS)
    assert call.timestep.tolist() == [600.0] * len(call.hidden_states)
    assert_near(velocity, by_hand.pop(way))
    for other in by_hand.values():
        assert_differ(velocity, other)


@pytest.mark.parametrize("way", WAYS)
def test_without_a_prior_it_is_the_class_that_the_null_condition_lacks(model, way):
    null, conditional = predict(model, torch.full_like(LABELS, NULL_CLASS)), predict(model)
    calls = record_calls(model)
    assert_near(guide(model, 3.0, priors=None, **WAYS[way][0]), null + 3 * (conditional - null))
    assert rows(calls) == [(4, 0)] and calls[0].class_labels.tolist() == [1, 3, NULL_CLASS, NULL_CLASS]


def test_equal_scales_are_the_default(model):
    assert_near(guide(model, 3.0, prior_scale=3.0), guide(model, 3.0))
    assert_differ(guide(model, 3.0, prior_scale=2.0), guide(model, 3.0))


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_scale_of_the_prior_at_ends(model, scale):
    v = predictions(model)
    assert_near(guide(model, scale, prior_scale=0.0), v.null + scale * (v.no_prior - v.null))
    assert_near(guide(model, 1.0, prior_scale=scale), v.no_prior + scale * (v.full - v.no_prior))


@pytest.mark.parametrize(
    "guidance",
    [
        {"prior_scale": 1.0},
        {"null_condition": "class"},
        {"null_condition": "prior"},
        {"rescale": 1.0, "power": 2.0, "channels": 2, "cosine_threshold": 0.5},
        {"transformer": tiny_transformer(seed=9)},
    ],
    ids=str,
)
def test_scale_1_is_the_conditional_velocity_at_its_cost(model, guidance):
    conditional = predict(model, priors=PRIORS)
    calls = record_calls(model)
    assert torch.equal(guide(model, 1.0, **guidance), conditional)
    assert rows(calls) == [(2, 2)]


def test_classifier_free_guidance_by_hand():
    conditional, unconditional = torch.full((2, 1, 1, 1), 3.0), torch.full((2, 1, 1, 1), 1.0)
    for scale, expected in ((0.0, 1.0), (1.0, 3.0), (2.5, 6.0)):
        assert (classifier_free_guidance(conditional, unconditional, scale) == expected).all()
        assert (combine([unconditional, conditional], [scale]) == expected).all()
    scales = torch.tensor([0.0, 2.0]).reshape(2, 1, 1, 1)
    assert classifier_free_guidance(conditional, unconditional, scales).flatten().tolist() == [1.0, 5.0]
    middle = torch.full((2, 1, 1, 1), 2.5)
    assert (combine([unconditional, middle, conditional], [5.0, 3.0]) == 1.0 + 5.0 * 1.5 + 3.0 * 0.5).all()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_other_channels_are_the_conditional_ones(model, channels):
    velocity, full = guide(model, channels=channels), guide(model)
    assert torch.equal(velocity[:, :channels], full[:, :channels])
    assert_near(velocity[:, channels:], predict(model, priors=PRIORS)[:, channels:])
    if channels < 4:
        assert_differ(velocity[:, channels:], full[:, channels:])


# --------------------------------------------------------------------------------------------------------- interval


@pytest.mark.parametrize(
    ("sigma", "is_guided"), [(1.0, False), (0.501, False), (0.5, True), (0.3, True), (0.25, True), (0.249, False)]
)
@pytest.mark.parametrize("way", WAYS)
def test_no_unconditional_rows_are_computed_outside_the_interval(model, way, sigma, is_guided):
    guidance, guided_rows, *_ = WAYS[way]
    timestep = 1000 * sigma
    expected = guide(model, 3.0 if is_guided else 1.0, timestep=timestep, **guidance)
    if not is_guided:
        expected = predict(model, priors=PRIORS, timestep=timestep)
    calls = record_calls(model)
    velocity = guide(model, timestep=timestep, interval=(0.25, 0.5), **guidance)
    assert rows(calls) == [guided_rows if is_guided else (2, 2)]
    assert torch.equal(velocity, expected)


@pytest.mark.parametrize("interval", [(0.0, 0.5), (0.5, 1.0), (0, 1), [0.0, 1.0], (0.5, 0.5)], ids=str)
def test_an_interval_holds_both_of_its_ends(model, interval):
    guided_velocity = GuidedVelocity(model, 2, Guidance(interval=interval))
    for end in interval:
        for timestep in (1000 * end, torch.tensor(1000.0 * end), torch.tensor([1000.0 * end] * 2)):
            assert guided_velocity.rows_to_guide(timestep, 3.0).tolist() == [True, True]
    outside = {(0.0, 0.5): [0.51, 1.0], (0.5, 1.0): [0.0, 0.49], (0.5, 0.5): [0.49, 0.51]}
    for sigma in outside.get(tuple(interval), []):
        assert not guided_velocity.rows_to_guide(1000 * sigma, 3.0).any()


@pytest.mark.parametrize("steps", [2, 3, 7, 10, 12, 30, 50])
def test_an_interval_that_ends_on_a_step_holds_the_step(model, steps):
    """Times are fp32, and the ends of an interval are not: both are the same numbers all the same."""
    scheduler = DoDFlowMatchScheduler()
    scheduler.set_timesteps(steps)
    missed = []
    for index, timestep in enumerate(scheduler.timesteps):
        sigma = (steps - index) / steps
        for interval in ((0.0, sigma), (sigma, 1.0), (sigma, sigma)):
            if not GuidedVelocity(model, 1, Guidance(interval=interval)).rows_to_guide(timestep, 3.0):
                missed.append(interval)
    assert missed == []


@pytest.mark.parametrize("num_train_timesteps", [13, 15, 100, 1000])
@pytest.mark.parametrize("options", [{"interval": (0.4, 1.0)}, {"power": 1.5}], ids=str)
def test_pure_noise_is_sigma_1_for_every_scheduler(pipe, options, num_train_timesteps):
    guidance = Guidance(**options)
    expected = sample(pipe, guidance=guidance)
    pipe.scheduler = DoDFlowMatchScheduler(num_train_timesteps=num_train_timesteps)
    output = sample(pipe, guidance=guidance)
    assert_near(output.images, expected.images)
    assert output.statistics[1].num_guided_evaluations.tolist() == [2, 2]


@pytest.mark.parametrize("way", [*WAYS, "weak model"])
@pytest.mark.parametrize("more", [{}, {"power": 2.0}, {"rescale": 0.5, "channels": 3}], ids=str)
def test_samples_at_times_of_their_own_are_as_alone(model, way, more):
    guidance = {"transformer": tiny_transformer(seed=7)} if way == "weak model" else WAYS[way][0]
    guidance = {"interval": (0.2, 0.7), **guidance, **more}
    latents, priors, labels = normal(5, 4, 8, 8), normal(5, 16, 32, seed=1), torch.tensor([1, 3, 3, 0, 9])
    timestep = torch.tensor([900.0, 500.0, 100.0, 700.0, 200.0])
    guided_velocity = GuidedVelocity(model, 5, Guidance(**guidance))
    calls = record_calls(model)
    together = guided_velocity(latents, timestep, labels, priors, 3.0)
    per_sample = {"separate": 2, "separate without prior": 2, "weak model": 0}.get(way, 1)
    assert rows(calls) == [(5 + 3 * per_sample, 8 if way == "class" else 5)]
    assert guided_velocity.num_evaluations.tolist() == [1] * 5
    assert guided_velocity.num_guided_evaluations.tolist() == [0, 1, 0, 1, 1]
    for i in range(5):
        one = slice(i, i + 1)
        kwargs = {"priors": priors[one], "timestep": timestep[one], "latents": latents[one], "labels": labels[one]}
        assert_near(together[one], guide(model, **kwargs, **guidance))
        is_guided = i in (1, 3, 4)
        assert ((together[one] - guide(model, 1.0, **kwargs)).abs().max() > 1e-2) == is_guided


# ----------------------------------------------------------------------------------------------------- power-cosine


@pytest.mark.parametrize("power", [0.25, 1.0, 2.0, 6.0])
@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_power_cosine_rises_from_1_in_noise_to_the_scale_at_the_data(power, scale):
    sigma = torch.linspace(1, 0, 21)
    scales = power_cosine_scale(scale, sigma, power)
    assert scales.shape == sigma.shape and scales[0] == 1
    torch.testing.assert_close(scales[-1], torch.tensor(scale))
    assert (scales.diff() * (scale - 1) >= 0).all()
    by_hand = [1 + (scale - 1) * 0.5 * (1 - math.cos(math.pi * (1 - s) ** power)) for s in sigma.tolist()]
    torch.testing.assert_close(scales, torch.tensor(by_hand))


def test_a_larger_power_sets_in_later():
    sigma = torch.tensor([0.9, 0.5, 0.1])
    scales = torch.stack([power_cosine_scale(4.0, sigma, power) for power in (0.5, 1.0, 2.0, 4.0)])
    assert (scales.diff(dim=0) < -1e-4).all()
    torch.testing.assert_close(power_cosine_scale(4.0, torch.tensor(0.5), 1.0), torch.tensor(2.5))  # half way


@pytest.mark.parametrize("way", ["class and prior", "class", "prior"])
def test_the_power_scales_guidance_by_the_time(model, way):
    guidance = WAYS[way][0]
    for timestep in (800.0, 500.0, 100.0):
        scale = 1 + 2 * 0.5 * (1 - math.cos(math.pi * (1 - timestep / 1000) ** 2))
        velocity = guide(model, 3.0, timestep=timestep, power=2.0, **guidance)
        assert_near(velocity, guide(model, scale, timestep=timestep, **guidance))
    assert_near(guide(model, timestep=1000.0, power=2.0), predict(model, priors=PRIORS, timestep=1000.0))
    assert_near(guide(model, timestep=0.0, power=2.0), guide(model, timestep=0.0))


def test_a_time_that_rounding_puts_above_pure_noise_is_pure_noise(model):
    timestep = torch.nextafter(torch.tensor(1000.0), torch.tensor(math.inf))
    for guidance in ({"power": 1.5}, {"power": 1.5, "interval": (0.5, 1.0)}):
        assert_near(guide(model, timestep=timestep, **guidance), predict(model, priors=PRIORS, timestep=timestep))
    assert_near(guide(model, timestep=timestep, interval=(0.5, 1.0)), guide(model, timestep=timestep))


def test_the_power_holds_for_the_scale_of_the_prior(model):
    part = 0.5 * (1 - math.cos(math.pi * 0.4**0.5))
    expected = guide(model, 1 + 2 * part, prior_scale=1 + 4 * part)
    assert_near(guide(model, 3.0, prior_scale=5.0, power=0.5), expected)
    assert_near(guide(model, 1.0, prior_scale=5.0, power=0.5), guide(model, 1.0, prior_scale=1 + 4 * part))


# ---------------------------------------------------------------------------------------------------------- rescale


def std(velocity: torch.Tensor) -> torch.Tensor:
    return velocity.flatten(1).std(dim=1)


@pytest.mark.parametrize("scale", [0.0, 8.0])
def test_rescale_takes_the_deviation_of_each_sample_to_that_of_the_conditional(model, scale):
    latents = LATENTS * torch.tensor([1.0, 0.05]).reshape(2, 1, 1, 1)  # samples that are not alike
    conditional = guide(model, 1.0, latents=latents)
    plain, half, whole = (guide(model, scale, latents=latents, rescale=rescale) for rescale in (0.0, 0.5, 1.0))
    assert torch.equal(plain, guide(model, scale, latents=latents))
    torch.testing.assert_close(std(whole), std(conditional))
    torch.testing.assert_close(std(half), (std(conditional) + std(plain)) / 2)
    ratio = std(conditional) / std(plain)
    assert (ratio - 1).abs().min() > 1e-2 and ratio.diff().abs() > 1e-2
    assert_near(half, plain * (0.5 * ratio + 0.5).reshape(2, 1, 1, 1))


def test_rescale_tempers_oversaturated_samples(pipe):
    deviations = [
        std(sample(pipe, guidance_scale=20.0, guidance=Guidance(rescale=rescale)).images)
        for rescale in (0.0, 0.5, 1.0)
    ]
    assert (torch.stack(deviations).diff(dim=0) < -0.1).all()


def test_rescale_guidance_by_hand():
    conditional = torch.tensor([[-1.0, 1.0], [-2.0, 2.0]]).reshape(2, 2, 1, 1)
    guided = torch.tensor([[-4.0, 4.0], [-2.0, 6.0]]).reshape(2, 2, 1, 1)
    expected = torch.tensor([[-1.0, 1.0], [-1.0, 3.0]]).reshape(2, 2, 1, 1)  # the mean is scaled as well
    torch.testing.assert_close(rescale_guidance(guided, conditional, 1.0), expected)
    torch.testing.assert_close(rescale_guidance(guided, conditional, 0.5), (expected + guided) / 2)
    assert torch.equal(rescale_guidance(guided, conditional, 0.0), guided)


def test_rescale_leaves_a_model_that_predicts_nothing_alone(pipe):
    fresh = DoDTransformer2DModel.from_config(pipe.transformer.config)  # its output layer is all zeros
    assert guide(fresh, rescale=0.5).abs().max() == 0


# -------------------------------------------------------------------------------------------------- cosine threshold


def cosines(model, timestep=600.0, latents=LATENTS, null_priors=None) -> torch.Tensor:
    conditional = predict(model, priors=PRIORS, timestep=timestep, latents=latents)
    null = predict(model, torch.full_like(LABELS, NULL_CLASS), null_priors, timestep=timestep, latents=latents)
    return F.cosine_similarity(conditional.flatten(1), null.flatten(1))


def test_a_sample_whose_predictions_agree_is_not_guided_again(model):
    cosine = cosines(model)
    sooner = int(cosine.argmax())
    later = 1 - sooner
    other = next(
        latents
        for seed in range(20)
        if (cosines(model, latents=(latents := normal(2, 4, 8, 8, seed=seed))) < cosine.mean()).all()
    )
    guided_velocity = GuidedVelocity(model, 2, Guidance(cosine_threshold=float(cosine.mean())))
    calls = record_calls(model)
    first = guided_velocity(LATENTS, 600.0, LABELS, PRIORS, 3.0)
    assert_near(first, guide(model))  # it is guided once more with what was computed
    calls.clear()
    for _ in range(2):  # for good: here its predictions do not agree
        velocity = guided_velocity(other, 600.0, LABELS, PRIORS, 3.0)
    assert rows(calls) == [(3, 2)] * 2
    assert_near(velocity[later], guide(model, latents=other)[later])
    assert_near(velocity[sooner], guide(model, 1.0, latents=other)[sooner])
    assert guided_velocity.num_evaluations.tolist() == [3, 3]
    assert guided_velocity.num_guided_evaluations[[sooner, later]].tolist() == [1, 3]


@pytest.mark.parametrize("null_condition", ["class_and_prior", "class"])
def test_the_threshold_is_the_cosine_of_both_predictions(model, null_condition):
    cosine = cosines(model, null_priors=PRIORS if null_condition == "class" else None)
    for sample_index in range(2):
        for above in (-1e-4, 1e-4):
            guidance = Guidance(null_condition, cosine_threshold=float(cosine[sample_index]) + above)
            guided_velocity = GuidedVelocity(model, 2, guidance)
            guided_velocity(LATENTS, 600.0, LABELS, PRIORS, 3.0)
            goes_on = guided_velocity.rows_to_guide(600.0, 3.0)
            assert goes_on[sample_index] == (above > 0)


def test_the_threshold_does_not_depend_on_the_scale(model):
    threshold = float(cosines(model).min()) - 1e-4
    for scale in (0.5, 2.0, 50.0):
        guided_velocity = GuidedVelocity(model, 2, Guidance(cosine_threshold=threshold))
        guided_velocity(LATENTS, 600.0, LABELS, PRIORS, scale)
        assert not guided_velocity.rows_to_guide(600.0, scale).any()


def trajectory_of_cosines(pipe, label, steps) -> list[float]:
    found = []

    def record(module, args, kwargs, output):
        conditional, unconditional = output.sample.flatten(1)
        found.append(float(F.cosine_similarity(conditional, unconditional, dim=0)))

    handle = pipe.transformer.register_forward_hook(record, with_kwargs=True)
    sample(pipe, [label], guidance_scale=3.0, num_inference_steps=steps)
    handle.remove()
    return found


def test_a_threshold_is_the_interval_from_where_it_is_reached():
    pipe, steps = tiny_pipeline(latent_embedder=None), 8
    kwargs = {"guidance_scale": 3.0, "num_inference_steps": steps}
    stops = {}
    for label in range(5):
        found = trajectory_of_cosines(pipe, label, steps)
        # The last step within the trajectory at which the cosine is larger than ever before.
        records = [i for i in range(1, steps - 2) if found[i] > max(found[:i]) + 1e-3]
        if records:
            stop = records[-1]
            threshold = (found[stop] + max(found[:stop])) / 2
            adaptive = sample(pipe, [label], guidance=Guidance(cosine_threshold=threshold), **kwargs)
            fixed = sample(pipe, [label], guidance=Guidance(interval=(1 - stop / steps, 1.0)), **kwargs)
            assert torch.equal(adaptive.images, fixed.images)
            for output in (adaptive, fixed):
                assert output.statistics[0].num_evaluations.tolist() == [steps]
                assert output.statistics[0].num_guided_evaluations.tolist() == [stop + 1]
            assert not torch.equal(adaptive.images, sample(pipe, [label], **kwargs).images)
            stops[label] = stop
    assert len(set(stops.values())) > 1


def test_samples_that_stop_at_times_of_their_own_are_as_alone(pipe):
    noises = [normal(4, 4, 8, 8, seed=seed) for seed in (2, 3)]
    labels = [0, 1, 2, 3]
    kwargs = {"guidance": Guidance(cosine_threshold=0.6), "num_inference_steps": 6, "guidance_scale": 3.0}
    together = sample(pipe, labels, latents=noises, **kwargs)
    counts = together.statistics[1].num_guided_evaluations
    assert len(set(counts.tolist())) > 1
    for i, label in enumerate(labels):
        alone = sample(pipe, [label], latents=[noise[i : i + 1] for noise in noises], **kwargs)
        assert_near(together.images[i : i + 1], alone.images)
        assert alone.statistics[1].num_guided_evaluations.tolist() == [counts[i]]


def test_a_sample_is_stopped_for_its_stage_only(pipe):
    guidance = Guidance(cosine_threshold=-0.999)
    output = sample(pipe, guidance_scale=[3.0, None], guidance=guidance, num_inference_steps=4)
    for statistics in output.statistics:
        assert statistics.num_guided_evaluations.tolist() == [1, 1]


# -------------------------------------------------------------------------------------------------------- weak model


@pytest.mark.parametrize("weak_has_priors", [True, False])
def test_a_weak_model_predicts_under_the_same_condition(model, weak_has_priors):
    weak = tiny_transformer(seed=7, num_layers=1, prior_embed_dim=32 if weak_has_priors else None)
    weak_priors = PRIORS if weak_has_priors else None
    unconditional, conditional = predict(weak, priors=weak_priors), predict(model, priors=PRIORS)
    calls, weak_calls = record_calls(model), record_calls(weak)
    assert_near(guide(model, 3.0, transformer=weak), unconditional + 3 * (conditional - unconditional))
    assert rows(calls) == [(2, 2)] and rows(weak_calls) == [(2, 2 if weak_has_priors else 0)]
    assert weak_calls[0].class_labels.tolist() == [1, 3] and torch.equal(weak_calls[0].hidden_states, LATENTS)
    assert_near(guide(model, 0.0, transformer=weak), unconditional)


def test_a_weak_model_without_priors_to_guide_by(model):
    weak = tiny_transformer(seed=7)
    unconditional, conditional = predict(weak), predict(model)
    expected = unconditional + 3 * (conditional - unconditional)
    assert_near(guide(model, 3.0, priors=None, transformer=weak), expected)


def test_a_weak_model_is_asked_for_guided_samples_only(model):
    weak = tiny_transformer(seed=7)
    weak_calls = record_calls(weak)
    guided_velocity = GuidedVelocity(model, 2, Guidance(transformer=weak, interval=(0.0, 0.5)))
    for timestep in (torch.tensor([900.0, 400.0]), 900.0):
        guided_velocity(LATENTS, timestep, LABELS, PRIORS, 3.0)
    (call,) = weak_calls
    assert torch.equal(call.hidden_states, LATENTS[1:]) and torch.equal(call.prior_embeds, PRIORS[1:])
    assert (call.class_labels.tolist(), call.timestep.tolist()) == ([3], [400.0])


@pytest.mark.parametrize("is_same_object", [True, False])
def test_a_weak_model_that_is_as_strong_changes_nothing(model, is_same_object):
    weak = model if is_same_object else tiny_transformer()
    assert_near(guide(model, 5.0, transformer=weak), predict(model, priors=PRIORS))


@pytest.mark.parametrize(("strong", "weak"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_weak_model_may_be_of_another_dtype(pipe, strong, weak):
    weak_model = tiny_transformer(seed=7)
    expected = sample(pipe, guidance=Guidance(transformer=weak_model)).images
    pipe.transformer.to(getattr(torch, strong))
    weak_model.to(getattr(torch, weak))
    images = sample(pipe, guidance=Guidance(transformer=weak_model)).images
    assert images.dtype == torch.float32 and (images - expected).abs().mean() < 0.1 * expected.std()


def test_a_weak_model_has_a_cache_of_its_own():
    strong, weak = tiny_transformer(num_layers=4), tiny_transformer(seed=7, num_layers=4)
    kwargs = {"timestep": torch.tensor([900.0, 400.0]), "transformer": weak, "interval": (0.0, 0.5)}
    expected = guide(strong, **kwargs)
    for model in (strong, weak):
        model.enable_cache(FirstBlockCacheConfig(threshold=1e6))
    for _ in range(2):
        assert torch.equal(guide(strong, **kwargs), expected)


# ----------------------------------------------------------------------------------------------- samples of a batch


def test_samples_that_are_left_of_a_batch_are_as_alone(model):
    latents, priors, labels = normal(4, 4, 8, 8), normal(4, 16, 32, seed=1), torch.tensor([1, 3, 5, 7])
    indices, timestep = torch.tensor([2, 0]), torch.tensor([300.0, 800.0])
    kwargs = {"latents": latents[indices], "priors": priors[indices], "labels": labels[indices], "timestep": timestep}
    guided_velocity = GuidedVelocity(model, 4, Guidance(interval=(0.0, 0.5)))
    velocity = guided_velocity(*(kwargs[k] for k in ("latents", "timestep", "labels", "priors")), 3.0, indices)
    assert_near(velocity, guide(model, interval=(0.0, 0.5), **kwargs))
    assert guided_velocity.num_evaluations.tolist() == [1, 0, 1, 0]
    assert guided_velocity.num_guided_evaluations.tolist() == [0, 0, 1, 0]


def test_a_stop_belongs_to_the_sample_not_to_its_place(model):
    guided_velocity = GuidedVelocity(model, 4, Guidance(cosine_threshold=-0.999))  # stops at once
    guided_velocity(LATENTS[:1], 600.0, LABELS[:1], PRIORS[:1], 3.0, torch.tensor([2]))
    assert guided_velocity.rows_to_guide(600.0, 3.0).tolist() == [True, True, False, True]
    assert guided_velocity.rows_to_guide(600.0, 3.0, torch.tensor([3, 2])).tolist() == [True, False]
    calls = record_calls(model)
    guided_velocity(LATENTS, 600.0, LABELS, PRIORS, 3.0, torch.tensor([2, 1]))
    assert rows(calls) == [(3, 2)] and calls[0].class_labels.tolist() == [1, 3, NULL_CLASS]
    assert guided_velocity.num_evaluations.tolist() == [0, 1, 2, 0]
    assert guided_velocity.num_guided_evaluations.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize(
    "timestep",
    [600, 600.0, torch.tensor(600), torch.tensor([600.0, 600.0]), torch.tensor(600.0, dtype=torch.float64)],
    ids=repr,
)
@pytest.mark.parametrize("guidance", [{}, {"power": 2.0}, {"power": 2.0, "interval": (0.1, 0.9)}], ids=str)
def test_a_time_may_be_of_any_form(model, timestep, guidance):
    velocity = guide(model, timestep=timestep, **guidance)
    assert velocity.dtype == torch.float32
    assert_near(velocity, guide(model, timestep=torch.full((2,), 600.0), **guidance))


@pytest.mark.parametrize("way", [*WAYS, "weak model"])
@pytest.mark.parametrize("timestep", [torch.tensor([900.0, 600.0]), 600.0], ids=["partly", "guided"])
def test_a_model_in_bf16_gives_fp32(model, way, timestep):
    guidance = {"transformer": tiny_transformer(seed=7)} if way == "weak model" else WAYS[way][0]
    guidance = {"interval": (0.0, 0.8), "power": 1.5, "rescale": 0.5, **guidance}
    expected = guide(model, timestep=timestep, **guidance)
    for module in (model, guidance.get("transformer")):
        if module is not None:
            module.to(torch.bfloat16)
    velocity = guide(model, timestep=timestep, priors=PRIORS.bfloat16(), **guidance)
    guided = velocity[1]  # put together in fp32, not only returned so
    assert velocity.dtype == torch.float32 and not torch.equal(guided, guided.bfloat16().float())
    assert (velocity - expected).abs().mean() < 0.1 * expected.std()
    unguided = guide(model, timestep=900.0, priors=PRIORS.bfloat16(), **guidance)
    assert unguided.dtype == torch.float32 and torch.equal(unguided, unguided.bfloat16().float())


# ------------------------------------------------------------------------------------------------------------ caches


@contextmanager
def contexts_of(model):
    """The names of the cache contexts that the model is evaluated in."""
    names, cache_context = [], model.cache_context
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "cache_context", lambda name: names.append(name) or cache_context(name))
        yield names


def test_caches_are_told_guided_and_unguided_batches_apart(model):
    weak = tiny_transformer(seed=7)
    mixed = torch.tensor([900.0, 400.0])
    with contexts_of(model) as names, contexts_of(weak) as weak_names:
        for transformer in (None, weak):
            guidance = Guidance(interval=(0.0, 0.5), transformer=transformer)
            guided_velocity = GuidedVelocity(model, 2, guidance, cache_name="here")
            for timestep in (900.0, mixed, 400.0):
                guided_velocity(LATENTS, timestep, LABELS, PRIORS, 3.0)
    assert names[:3] == ["here_unguided", "here_partly_guided", "here_guided"]
    assert names[3:] == ["here_unguided"] * 3 and weak_names == ["here_weak"] * 2


def test_stages_have_cache_contexts_of_their_own(pipe):
    with contexts_of(pipe.transformer) as names:
        sample(pipe, guidance=Guidance(interval=(0.0, 0.6)), guidance_scale=3.0)
    assert names == ["stage_1_unguided"] * 2 + ["stage_2_unguided", "stage_2_guided"]


def record_blocks(model) -> list[list[int]]:
    """For every later evaluation of the model, the blocks whose attention is computed in it."""
    evaluations = []
    model.register_forward_pre_hook(lambda *_: evaluations.append([]))
    for index, block in enumerate(model.transformer_blocks):
        block.attn.to_q.register_forward_hook(lambda *_, index=index: evaluations[-1].append(index))
    return evaluations


@pytest.mark.parametrize("with_weak_model", [False, True])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"timestep": 900.0}, {"timestep": 400.0}),
        ({"timestep": torch.tensor([900.0, 400.0])}, {"timestep": 400.0}),
        ({"timestep": torch.tensor([900.0, 400.0])}, {"timestep": torch.tensor([400.0, 900.0])}),
        ({"indices": torch.tensor([0, 1])}, {"indices": torch.tensor([1, 2])}),
        ({"guidance_scale": 3.0}, {"guidance_scale": 1.0}),
    ],
    ids=["begins", "one begins", "another one", "other samples", "ends"],
)
def test_a_cache_starts_anew_when_the_layout_changes(first, second, with_weak_model):
    model, weak = tiny_transformer(num_layers=4), tiny_transformer(seed=7, num_layers=4)
    evaluations, weak_evaluations = record_blocks(model), record_blocks(weak)
    for transformer in (model, weak):
        transformer.enable_cache(FirstBlockCacheConfig(threshold=1e6))
    guidance = Guidance(interval=(0.0, 0.5), transformer=weak if with_weak_model else None)
    guided_velocity = GuidedVelocity(model, 3, guidance)
    both = torch.tensor([0, 1])

    def evaluate(timestep=400.0, guidance_scale=3.0, indices=both):
        return guided_velocity(LATENTS, timestep, LABELS, PRIORS, guidance_scale, indices)

    for changes in (first, first, second, second, first):
        evaluate(**changes)
    assert evaluations == [ALL, FIRST, ALL, FIRST, ALL]
    if with_weak_model:
        is_guided = [guided_velocity_rows(changes) for changes in (first, first, second, second, first)]
        expected = [blocks for blocks, guided in zip(evaluations, is_guided, strict=True) if guided]
        assert weak_evaluations == expected


def guided_velocity_rows(changes) -> bool:
    """Whether any sample is guided within (0, 0.5)."""
    is_late = (torch.as_tensor(changes.get("timestep", 400.0)) <= 500).any()
    return bool(is_late) and changes.get("guidance_scale", 3.0) != 1


# --------------------------------------------------------------------------------------------- calls of the pipeline

WEAK = tiny_transformer(seed=7)
OPTIONS = {
    "null_condition": "prior",
    "prior_scale": 1.5,
    "channels": 2,
    "interval": (0.4, 0.8),
    "power": 2.0,
    "rescale": 0.7,
    "cosine_threshold": 0.2,
    "transformer": WEAK,
}


def test_every_field_is_among_the_options_of_these_tests():
    assert list(OPTIONS) == [field.name for field in dataclasses.fields(Guidance)]


@pytest.mark.parametrize("name", OPTIONS)
def test_guidance_of_a_call_is_that_of_its_velocities(pipe, name):
    guidance = Guidance(**{name: OPTIONS[name]})
    prior_latents, steps = normal(1, 4, 8, 8, seed=6), 3
    call = {"prior_latents": prior_latents, "guidance_scale": 3.0, "num_inference_steps": steps}
    output = sample(pipe, **call, guidance=guidance)
    prior_embeds = pipe.latent_embedder(prior_latents).prior_embeds.expand(2, -1, -1)
    guided_velocity = GuidedVelocity(pipe.transformer, 2, guidance)
    latents = normal(2, 4, 8, 8, seed=2)
    for step in range(steps):
        timestep = 1000.0 * (1 - step / steps)
        latents = latents - guided_velocity(latents, timestep, LABELS, prior_embeds, 3.0) / steps
    assert_near(output.images, latents)
    assert_differ(output.images, sample(pipe, **call).images)
    (statistics,) = output.statistics
    assert torch.equal(statistics.num_guided_evaluations, guided_velocity.num_guided_evaluations)


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_need_a_prior_pass_over_stage_1_and_no_others(pipe, name):
    kwargs = {"guidance_scale": [3.0, 3.0], "return_stages": True}
    plain = sample(pipe, **kwargs)
    calls = record_calls(pipe.transformer)
    output = sample(pipe, **kwargs, guidance=Guidance(**{name: OPTIONS[name]}))
    if name in ("null_condition", "prior_scale"):
        assert torch.equal(output.stages[0], plain.stages[0])
        later = (4, 2) if name == "null_condition" else (6, 2)
        assert rows(calls) == [(4, 0)] * 2 + [later] * 2
    else:
        assert_differ(output.stages[0], plain.stages[0])
    assert_differ(output.stages[1], plain.stages[1])


def test_a_scale_of_the_prior_does_not_make_stage_1_a_guided_one(pipe):
    calls = record_calls(pipe.transformer)
    output = sample(pipe, guidance=Guidance(prior_scale=3.0), guidance_scale=1.0, num_inference_steps=1)
    assert rows(calls) == [(2, 0), (6, 2)]
    assert [statistics.num_guided_evaluations.tolist() for statistics in output.statistics] == [[0, 0], [1, 1]]


def test_without_a_latent_embedder_the_only_stage_is_guided_all_ways():
    pipe = tiny_pipeline(latent_embedder=None)
    plain = sample(pipe, guidance_scale=3.0).images
    for name in list(OPTIONS)[2:]:
        value = tiny_transformer(seed=7, prior_embed_dim=None) if name == "transformer" else OPTIONS[name]
        assert_differ(sample(pipe, guidance_scale=3.0, guidance=Guidance(**{name: value})).images, plain)


@pytest.mark.parametrize("solver", ["heun", "dopri5"])
def test_options_hold_for_every_solver(pipe, solver):
    scheduler = DoDFlowMatchScheduler(solver=solver, rtol=1e-2, atol=1e-2)
    kwargs = {"guidance_scale": 3.0, "schedulers": [None, scheduler]}
    calls = record_calls(pipe.transformer)
    plain = sample(pipe, **kwargs)
    full = sum(sizes(calls))
    calls.clear()
    output = sample(pipe, guidance=Guidance(interval=(0.2, 0.6)), **kwargs)
    statistics = output.statistics[1]
    expected = sum(int((s.num_evaluations + s.num_guided_evaluations).sum()) for s in output.statistics)
    assert sum(sizes(calls)) == expected and (solver == "dopri5" or expected < full)
    assert (statistics.num_guided_evaluations > 0).all()
    assert (statistics.num_guided_evaluations < statistics.num_evaluations).all()
    assert_differ(output.images, plain.images)


# -------------------------------------------------------------------------------------------------------- statistics


def test_statistics_count_by_stage_and_sample(pipe):
    kwargs = {"guidance_scale": 3.0, "guidance": Guidance(interval=(0.0, 0.75)), "num_inference_steps": [2, 4]}
    first, second = sample(pipe, num_images_per_prior=1, **kwargs).statistics
    for statistics, evaluations, guided in ((first, 2, 0), (second, 4, 3)):
        assert statistics.num_evaluations.tolist() == [evaluations] * 2
        assert statistics.num_guided_evaluations.tolist() == [guided] * 2
        assert statistics.num_evaluations.dtype == statistics.num_guided_evaluations.dtype == torch.int64
        assert statistics.num_accepted_steps is None and statistics.num_rejected_steps is None


@pytest.mark.parametrize(("solver", "evaluations"), [("euler", 3), ("heun", 6), ("midpoint", 6), ("rk4", 12)])
def test_statistics_count_every_evaluation_of_a_solver(pipe, solver, evaluations):
    output = sample(pipe, num_stages=1, schedulers=solver, num_inference_steps=3, guidance_scale=[2.0])
    assert output.statistics[0].num_evaluations.tolist() == [evaluations] * 2
    assert output.statistics[0].num_guided_evaluations.tolist() == [evaluations] * 2


@pytest.mark.parametrize("error_norm", ["sample", "batch"])
def test_statistics_of_an_adaptive_solver(error_norm):
    pipe = tiny_pipeline(scheduler=DoDFlowMatchScheduler(solver="dopri5", error_norm=error_norm))
    output = sample(pipe, [1, 3, 5], latents=normal(3, 4, 8, 8), num_stages=1)
    (statistics,) = output.statistics
    steps = statistics.num_accepted_steps + statistics.num_rejected_steps
    assert statistics.num_accepted_steps.shape == (3,) and (statistics.num_accepted_steps > 0).all()
    assert torch.equal(statistics.num_evaluations, 2 + 6 * steps)
    assert statistics.num_guided_evaluations.tolist() == [0] * 3


def test_statistics_of_the_stages_that_were_run(pipe):
    assert len(sample(pipe, num_stages=3, latents=normal(2, 4, 8, 8)).statistics) == 3
    assert len(sample(pipe, image=IMAGE).statistics) == 1
    copies = sample(pipe, num_images_per_prior=3, latents=normal(2, 4, 8, 8)).statistics
    assert [len(statistics.num_evaluations) for statistics in copies] == [2, 6]

    def stop(pipe, step_index, timestep, kwargs):
        pipe._interrupt = step_index == 2

    interrupted = sample(
        pipe, num_stages=3, num_inference_steps=2, latents=normal(2, 4, 8, 8), callback_on_step_end=stop
    )
    assert [statistics.num_evaluations.tolist() for statistics in interrupted.statistics] == [[2, 2], [1, 1]]
    assert len(sample(pipe, return_dict=False, return_stages=True)) == 2


# -------------------------------------------------------------------------------------------------------- bad values

BAD = [
    ({"null_condition": "both"}, ValueError, ["`null_condition`", "'class_and_prior', 'class', 'prior'", "'both'"]),
    ({"null_condition": None}, ValueError, ["`null_condition`", "'class_and_prior', 'class', 'prior'", "None"]),
    ({"prior_scale": -1.0}, ValueError, ["`prior_scale`", "[0, inf)", "-1.0"]),
    ({"prior_scale": math.inf}, ValueError, ["`prior_scale`", "[0, inf)", "got inf"]),
    ({"prior_scale": "2"}, TypeError, ["`prior_scale`", "int or float", "'2'"]),
    ({"prior_scale": True}, TypeError, ["`prior_scale`", "int or float", "True"]),
    ({"channels": 0}, ValueError, ["`channels`", ">= 1", "got 0"]),
    ({"channels": 5}, ValueError, ["`channels`", "[1, 4]", "got 5"]),
    ({"channels": 3.0}, TypeError, ["`channels`", "int", "3.0"]),
    ({"channels": True}, TypeError, ["`channels`", "int", "True"]),
    ({"interval": None}, ValueError, ["`interval`", "(low, high)", "got None"]),
    ({"interval": 0.5}, ValueError, ["`interval`", "(low, high)", "got 0.5"]),
    ({"interval": (0.1, 0.2, 0.3)}, ValueError, ["`interval`", "(low, high)", "(0.1, 0.2, 0.3)"]),
    ({"interval": (0.5, 0.4)}, ValueError, ["`interval`", "low <= high", "(0.5, 0.4)"]),
    ({"interval": (-0.1, 0.4)}, ValueError, ["`interval`", "[0, 1]", "-0.1"]),
    ({"interval": (200, 800)}, ValueError, ["`interval`", "[0, 1]", "got 200"]),
    ({"interval": (0.0, math.nan)}, ValueError, ["`interval`", "[0, 1]", "nan"]),
    ({"interval": ("0", 1)}, TypeError, ["`interval`", "int or float", "'0'"]),
    ({"power": 0}, ValueError, ["`power`", "(0, inf)", "got 0"]),
    ({"power": -2.0}, ValueError, ["`power`", "(0, inf)", "got -2.0"]),
    ({"power": "1"}, TypeError, ["`power`", "int or float", "'1'"]),
    ({"rescale": 1.1}, ValueError, ["`rescale`", "[0, 1]", "got 1.1"]),
    ({"rescale": -0.1}, ValueError, ["`rescale`", "[0, 1]", "got -0.1"]),
    ({"rescale": None}, TypeError, ["`rescale`", "int or float", "None"]),
    ({"cosine_threshold": -1}, ValueError, ["`cosine_threshold`", "(-1, 1]", "got -1"]),
    ({"cosine_threshold": 1.01}, ValueError, ["`cosine_threshold`", "(-1, 1]", "got 1.01"]),
    ({"cosine_threshold": []}, TypeError, ["`cosine_threshold`", "int or float", "[]"]),
    ({"transformer": "weak"}, TypeError, ["`transformer`", "DoDTransformer2DModel", "str"]),
    (
        {"transformer": tiny_latent_embedder()},
        TypeError,
        ["`transformer`", "DoDTransformer2DModel", "LatentEmbeddingModule"],
    ),
    (
        {"transformer": tiny_transformer(in_channels=3)},
        ValueError,
        ["`transformer`", "`in_channels`, 4", "got 3"],
    ),
    (
        {"transformer": tiny_transformer(num_classes=5)},
        ValueError,
        ["`transformer`", "`num_classes`, 10", "got 5"],
    ),
    (
        {"transformer": tiny_transformer(patch_size=4)},
        ValueError,
        ["`transformer`", "`patch_size`, 2", "got 4"],
    ),
    (
        {"transformer": tiny_transformer(prior_embed_dim=16)},
        ValueError,
        ["`transformer`", "`prior_embed_dim`", "32, or None", "got 16"],
    ),
    (
        {"null_condition": "class", "prior_scale": 2.0},
        ValueError,
        ["Only one of", "got ['`null_condition`', '`prior_scale`']"],
    ),
    (
        {"null_condition": "prior", "transformer": WEAK},
        ValueError,
        ["Only one of", "got ['`null_condition`', '`transformer`']"],
    ),
    (
        {"prior_scale": 2.0, "transformer": WEAK},
        ValueError,
        ["Only one of", "got ['`prior_scale`', '`transformer`']"],
    ),
]
BAD_WITH_ONE_STAGE = [
    ({"null_condition": "class"}, ValueError, ["`null_condition`", "one stage", "'class_and_prior'"]),
    ({"null_condition": "prior"}, ValueError, ["`null_condition`", "one stage", "got 'prior'"]),
    ({"prior_scale": 2.0}, ValueError, ["`prior_scale`", "None", "got 2.0"]),
]


@pytest.fixture(scope="module")
def idle_pipe():
    """A pipeline that is called in vain, and notes if a model of it runs all the same."""
    pipe = tiny_pipeline()
    pipe.evaluated = []
    for module in (pipe.transformer, pipe.latent_embedder, pipe.vae.encoder):
        module.register_forward_pre_hook(lambda *_: pipe.evaluated.append(1))
    return pipe


@pytest.mark.parametrize(("options", "error", "fragments"), BAD, ids=lambda value: str(value)[:60])
def test_bad_values_are_refused_before_anything_is_computed(idle_pipe, options, error, fragments):
    with pytest.raises(error, match=says(*fragments)):
        idle_pipe([1], image=IMAGE, guidance=Guidance(**options))
    assert not idle_pipe.evaluated


@pytest.mark.parametrize(("options", "error", "fragments"), BAD_WITH_ONE_STAGE, ids=str)
@pytest.mark.parametrize("has_priors", [True, False])
def test_options_of_a_prior_are_refused_with_one_stage(idle_pipe, options, error, fragments, has_priors):
    pipe, stages = (idle_pipe, {"num_stages": 1}) if has_priors else (tiny_pipeline(latent_embedder=None), {})
    with pytest.raises(error, match=says(*fragments)):
        pipe([1], guidance=Guidance(**options), **stages)
    assert not idle_pipe.evaluated


@pytest.mark.parametrize("value", [0, 1.0])
def test_ends_of_the_ranges_are_accepted(pipe, value):
    guidance = Guidance(prior_scale=value, rescale=value, cosine_threshold=value, interval=[value, value])
    assert sample(pipe, num_inference_steps=1, guidance=guidance).images.isfinite().all()


# -------------------------------------------------------------------------------------------------- Diffusers' guiders

GUIDERS = {
    "plain": guiders.ClassifierFreeGuidance,
    "adaptive projected": lambda **kwargs: guiders.AdaptiveProjectedGuidance(
        adaptive_projected_guidance_momentum=-0.5, adaptive_projected_guidance_rescale=2.0, eta=0.5, **kwargs
    ),
    "adaptive projected mix": lambda **kwargs: guiders.AdaptiveProjectedMixGuidance(
        adaptive_projected_guidance_scale=3.0,
        adaptive_projected_guidance_rescale=2.0,
        adaptive_projected_guidance_start_step=1,
        eta=0.5,
        **kwargs,
    ),
    "zero star": guiders.ClassifierFreeZeroStarGuidance,
    "tangential": guiders.TangentialClassifierFreeGuidance,
}


def sample_by_guider(pipe, combine_by_hand, scale, steps):
    """Stage 2 by Euler steps, its predictions one after the other; `combine_by_hand(step, conditional, null)`."""
    prior_latents, latents = normal(1, 4, 8, 8, seed=6), normal(2, 4, 8, 8, seed=2)
    priors = pipe.latent_embedder(prior_latents).prior_embeds.expand(2, -1, -1)
    for step in range(steps):
        timestep = 1000.0 * (1 - step / steps)
        conditional = predict(pipe.transformer, priors=priors, timestep=timestep, latents=latents)
        null = predict(pipe.transformer, torch.full_like(LABELS, NULL_CLASS), timestep=timestep, latents=latents)
        latents = latents - combine_by_hand(step, conditional, null) / steps
    return sample(pipe, prior_latents=prior_latents, num_inference_steps=steps, guidance=scale).images, latents


def test_plain_guider_is_guidance_to_the_bit(pipe):
    guider = guiders.ClassifierFreeGuidance(guidance_scale=3.0)
    kwargs = {"num_inference_steps": 4, "return_stages": True}
    for scales in ({}, {"guidance_scale": 3.0}, {"guidance_scale": [3.0, 3.0]}, {"guidance_scale": [3.0, 1.0]}):
        found = sample(pipe, guidance=guider, **scales, **kwargs)
        expected = sample(pipe, **{"guidance_scale": 3.0, **scales}, **kwargs)
        assert all(torch.equal(*pair) for pair in zip(found.stages, expected.stages, strict=True))
        for statistics, others in zip(found.statistics, expected.statistics, strict=True):
            assert torch.equal(statistics.num_guided_evaluations, others.num_guided_evaluations)


@pytest.mark.parametrize(("name", "last_plain_step"), [("adaptive projected", -1), ("adaptive projected mix", 1)])
def test_adaptive_projected_guidance(pipe, name, last_plain_step):
    """Momentum, updates of limited norm, half of their part along the conditional one (Sadat et al. 2024)."""
    average = [0.0]

    def by_hand(step, conditional, null):
        average[0] = (conditional - null) - 0.5 * average[0]
        if step <= last_plain_step:
            return null + 4.0 * (conditional - null)
        update = average[0] * (2.0 / average[0].flatten(1).norm(dim=1)).clamp(max=1).reshape(-1, 1, 1, 1)
        direction = F.normalize(conditional.flatten(1).double(), dim=1).view_as(conditional)
        parallel = ((update * direction).sum((1, 2, 3), keepdim=True) * direction).float()
        return null + (4.0 if last_plain_step < 0 else 3.0) * (update - parallel + 0.5 * parallel)

    guider = GUIDERS[name](guidance_scale=4.0)
    for _ in range(2):  # the momentum is that of a stage
        average[0] = 0.0
        assert_near(*sample_by_guider(pipe, by_hand, guider, 4))


def test_zero_star_guidance(pipe):
    """The null prediction by its best multiple, and nothing in the first step (Fan et al. 2025)."""

    def by_hand(step, conditional, null):
        best = (conditional * null).sum((1, 2, 3), keepdim=True) / (null**2).sum((1, 2, 3), keepdim=True)
        return best * null + 4.0 * (conditional - best * null) if step > 0 else torch.zeros_like(null)

    assert_near(*sample_by_guider(pipe, by_hand, GUIDERS["zero star"](guidance_scale=4.0), 4))


def test_tangential_guidance(pipe):
    """The null prediction by its part along the main direction of both (Kwon et al. 2025)."""

    def by_hand(step, conditional, null):
        both = torch.stack([conditional, null], dim=1).flatten(2)
        main = torch.linalg.svd(both, full_matrices=False).Vh[:, :1]
        null = ((null.flatten(1)[:, None] * main).sum(-1, keepdim=True) * main).view_as(null)
        return null + 4.0 * (conditional - null)

    assert_near(*sample_by_guider(pipe, by_hand, GUIDERS["tangential"](guidance_scale=4.0), 4))


@pytest.mark.parametrize("name", GUIDERS)
def test_a_guider_leaves_stage_1_alone_unless_asked(pipe, name):
    guider = GUIDERS[name](guidance_scale=4.0)
    unguided = sample(pipe, guidance_scale=[1.0, 1.0], return_stages=True)
    calls = record_calls(pipe.transformer)
    output = sample(pipe, guidance=guider, return_stages=True)
    assert torch.equal(output.stages[0], unguided.stages[0]) and sizes(calls) == [2, 2, 4, 4]
    assert_differ(output.stages[1], unguided.stages[1])
    assert torch.equal(sample(pipe, guidance=guider, guidance_scale=[1.0, 1.0]).images, unguided.images)
    assert_differ(
        sample(pipe, guidance=guider, guidance_scale=[4.0, 1.0], return_stages=True).stages[0], output.stages[0]
    )


def test_a_guider_guides_stage_1_at_its_own_scale_if_the_checkpoint_guides_it():
    pipe = tiny_pipeline(default_first_stage_guidance_scale=1.5)
    guider = guiders.AdaptiveProjectedGuidance(guidance_scale=4.0)
    found = sample(pipe, guidance=guider, num_inference_steps=3, return_stages=True)
    expected = sample(
        tiny_pipeline(), guidance=guider, guidance_scale=[4.0, 4.0], num_inference_steps=3, return_stages=True
    )
    assert all(torch.equal(*pair) for pair in zip(found.stages, expected.stages, strict=True))


def test_every_guider_of_diffusers_is_documented_or_refused(idle_pipe):
    """The page lists those that work, and names the one that fits but fails in Diffusers."""
    page = (Path(__file__).parents[1] / "docs" / "sampling.md").read_text()
    _, _, table = page.partition("| guider | |")
    documented = {line.split("`")[1] for line in table.partition("\n\n")[0].splitlines() if line.startswith("| `")}
    assert documented == {type(build(guidance_scale=4.0)).__name__ for build in GUIDERS.values()}
    fitting = {
        name
        for name, kind in vars(guiders).items()
        if isinstance(kind, type)
        and kind._input_predictions == ["pred_cond", "pred_uncond"]
        and "guidance_scale" in inspect.signature(kind).parameters
        and kind.prepare_models.__qualname__ == "BaseGuidance.prepare_models"
    }
    assert fitting - documented == set(FAILING_GUIDERS) and all(name in page for name in FAILING_GUIDERS)


def test_a_guider_starts_and_stops_by_steps(pipe):
    guider = guiders.ClassifierFreeGuidance(guidance_scale=3.0, start=0.25, stop=0.75)
    output = sample(pipe, guidance=guider, num_inference_steps=4)
    fixed = sample(pipe, guidance_scale=3.0, guidance=Guidance(interval=(0.5, 0.75)), num_inference_steps=4)
    assert torch.equal(output.images, fixed.images)
    assert output.statistics[1].num_guided_evaluations.tolist() == [2, 2]


def test_a_guider_without_a_latent_embedder_guides_the_only_stage():
    pipe = tiny_pipeline(latent_embedder=None)
    guider = guiders.ClassifierFreeGuidance(guidance_scale=3.0)
    assert torch.equal(sample(pipe, guidance=guider).images, sample(pipe, guidance_scale=3.0).images)


def frequency_decoupled_guidance() -> guiders.FrequencyDecoupledGuidance:
    """The guider without kornia, which its constructor needs."""
    guider = object.__new__(guiders.FrequencyDecoupledGuidance)
    guider.guidance_scales = [10.0, 5.0]
    return guider


@pytest.mark.parametrize(
    ("kwargs", "error", "fragments"),
    [
        ({"guidance": 4.0}, TypeError, ["`guidance`", "Guidance", "guiders", "got 4.0"]),
        ({"guidance": {"rescale": 0.5}}, TypeError, ["`guidance`", "got {'rescale': 0.5}"]),
        ({"guidance_scale": 2.0}, ValueError, ["`guidance_scale`", "3.0", "or 1", "got 2.0"]),
        ({"guidance_scale": [1.0, 2.0]}, ValueError, ["`guidance_scale`", "3.0", "or 1", "got 2.0"]),
        ({"schedulers": "dopri5"}, ValueError, ["`guidance`", "own steps", "ClassifierFreeGuidance in stage 2"]),
        (
            {"guidance": guiders.AutoGuidance(auto_guidance_layers=[0], dropout=0.1)},
            ValueError,
            ["`guidance`", "AutoGuidance, which changes the model"],
        ),
        (
            {"guidance": guiders.SkipLayerGuidance(skip_layer_guidance_layers=[0])},
            ValueError,
            ["`guidance`", "conditional and an unconditional", "SkipLayerGuidance"],
        ),
        (
            {"guidance": "frequency decoupled"},
            ValueError,
            [
                "`guidance`",
                "one `guidance_scale`",
                "got FrequencyDecoupledGuidance, which has several scales, [10.0, 5",
            ],
        ),
        (
            {"guidance": guiders.MagnitudeAwareGuidance(guidance_scale=3.0)},
            ValueError,
            ["`guidance`", "another guider", "fails", "got MagnitudeAwareGuidance"],
        ),
    ],
    ids=str,
)
def test_what_a_guider_cannot_do_is_refused(idle_pipe, kwargs, error, fragments):
    if kwargs.get("guidance") == "frequency decoupled":  # which has no text before its constructor has run
        kwargs = {"guidance": frequency_decoupled_guidance()}
    with pytest.raises(error, match=says(*fragments)):
        idle_pipe([1], **{"guidance": guiders.ClassifierFreeGuidance(guidance_scale=3.0), **kwargs})
    assert not idle_pipe.evaluated


def test_all_modules_are_asked_for_their_dtype_as_often_in_many_steps_as_in_few(monkeypatch):
    asked, dtype = [], DoDTransformer2DModel.dtype

    def ask(model):
        asked.append(model)
        return dtype.fget(model)

    monkeypatch.setattr(DoDTransformer2DModel, "dtype", property(ask))
    pipe, numbers = tiny_pipeline(), []
    for num_inference_steps in (2, 5):
        asked.clear()
        pipe([1, 3], num_stages=2, num_inference_steps=num_inference_steps, seed=0, output_type="latent")
        numbers.append(len(asked))
    assert numbers[0] == numbers[1]
