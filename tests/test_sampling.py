"""Where an image's noise comes from, what a stage may have of its own, and that every solver reaches the answer."""

import itertools
import math
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.utils.torch_utils import randn_tensor
from helpers import FIXED_STEP_SOLVERS, assert_near, noise, record_calls, says, tiny_latent_embedder, tiny_pipeline
from launch import run_command

from diffusers_dod import DoDFlowMatchScheduler, DoDPipeline, DoDPipelineOutput, Guidance
from diffusers_dod.seeding import stateless_generator, stateless_noise


SOLVERS = [*FIXED_STEP_SOLVERS, "dopri5"]
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
LABELS = [1, 3, 7, 0, 9, 2]  # of the indices 0, 1, ..., 5
IMAGE = np.random.default_rng(0).integers(0, 256, (16, 8, 3), dtype=np.uint8)  # not square: H and W differ


def sample(pipe: DoDPipeline, labels=(1, 3), **kwargs) -> DoDPipelineOutput:
    """Latents of all stages, with noise of seed 0 unless it comes from elsewhere."""
    if kwargs.keys().isdisjoint({"generator", "seed"}):
        kwargs["seed"] = 0
    return pipe(list(labels), **{"output_type": "latent", "return_stages": True, **kwargs})


assert_near = partial(assert_near, rtol=0, atol=1e-4)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def assert_stages_near(actual: DoDPipelineOutput, expected: DoDPipelineOutput, tolerance: float = 1e-4) -> None:
    for latents, others in zip(actual.stage_latents, expected.stage_latents, strict=True):
        assert_near(latents, others, atol=tolerance)


# ------------------------------------------------------------------------- an image depends on its seed and its index


def sample_indices(pipe: DoDPipeline, indices, solver: str, **kwargs) -> DoDPipelineOutput:
    """Guided stages of the images with these indices: three, or two of the solver that takes many steps."""
    num_stages, steps = (2, None) if solver == "dopri5" else (3, 3)
    return sample(
        pipe,
        [LABELS[index] for index in indices],
        seed=5,
        sample_indices=list(indices),
        num_stages=num_stages,
        num_inference_steps=steps,
        schedulers=[solver] * num_stages,
        guidance_scale=[2.0, *[3.0] * (num_stages - 1)],
        **kwargs,
    )


def tolerance_of(solver: str) -> float:
    """By how much the rounding in another batch may change latents of 1 to 4; in dopri5 it changes step sizes too."""
    return 30 * DoDFlowMatchScheduler().config.rtol if solver == "dopri5" else 1e-4


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("chunks", [[[0], [1, 2, 3, 4], [5]], [[5, 3, 1], [4, 0, 2]]], ids=str)
def test_an_image_does_not_depend_on_its_batch(pipe, solver, chunks):
    together = sample_indices(pipe, range(6), solver)
    parts = [sample_indices(pipe, chunk, solver) for chunk in chunks]
    order, num_others = sum(chunks, []), 0
    for stage, latents in enumerate(together.stage_latents):
        joined = torch.cat([part.stage_latents[stage] for part in parts])
        assert_near(joined, latents[order], atol=tolerance_of(solver))
        counts = torch.cat([part.statistics[stage].num_evaluations for part in parts])
        num_others += int((counts != together.statistics[stage].num_evaluations[order]).sum())
    # dopri5 takes the same steps, but for one that rounding may refuse. With one error for a batch, 3 and 6 differ.
    assert num_others <= (solver == "dopri5")


@pytest.mark.parametrize(
    "guidance",
    [
        Guidance(interval=(0.3, 0.8), power=2.0, channels=3),
        Guidance(prior_scale=2.0, rescale=0.7),
        Guidance(null_condition="class", cosine_threshold=0.5),
    ],
    ids=str,
)
def test_an_image_does_not_depend_on_its_batch_under_other_guidance(pipe, guidance):
    plain = sample_indices(pipe, range(4), "heun").images
    together = sample_indices(pipe, range(4), "heun", guidance=guidance).images
    parts = [sample_indices(pipe, chunk, "heun", guidance=guidance).images for chunk in ([3], [1, 0, 2])]
    assert_near(torch.cat(parts), together[[3, 1, 0, 2]])
    assert (together - plain).flatten(1).abs().amax(1).min() > 0.05


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_image_depends_on_its_index_not_on_its_place(pipe, solver):
    implicit = sample(pipe, LABELS[:2], schedulers=[solver] * 2)
    explicit = sample(pipe, LABELS[:2], schedulers=[solver] * 2, sample_indices=[0, 1])
    assert torch.equal(implicit.images, explicit.images)  # 0, 1, 2, ... if not given
    other = sample(pipe, LABELS[:2], schedulers=[solver] * 2, sample_indices=[0, 7])
    assert_near(other.images[0], implicit.images[0], atol=tolerance_of(solver))
    assert (other.images[1] - implicit.images[1]).abs().max() > 0.5


def test_an_image_in_bf16_depends_on_its_batch_by_rounding_only(pipe):
    pipe.transformer.to(torch.bfloat16)
    for solver in ("euler", "rk4", "euler_maruyama"):
        together = sample_indices(pipe, range(6), solver).images
        for chunk in ([0], [3], [4, 1], [2, 0, 5]):
            # Measured: up to 0.087 after three stages, of latents with a standard deviation of 2.4.
            assert_near(sample_indices(pipe, chunk, solver).images, together[chunk], atol=0.25)
        for one, other in itertools.combinations(together, 2):
            assert (one - other).abs().max() > 2


def chunked(indices_of_chunks) -> dict[str, torch.Tensor]:
    """The images of a solver of each kind, chunk by chunk."""
    pipe = tiny_pipeline()
    return {
        solver: torch.cat([sample_indices(pipe, indices, solver).images for indices in indices_of_chunks])
        for solver in ("heun", "stochastic_heun", "dopri5")
    }


@pytest.mark.slow
def test_an_image_is_the_same_in_another_process(tmp_path):
    script = (
        "import sys, torch, test_sampling;"
        "torch.save((torch.get_num_threads(), test_sampling.chunked([[0, 1, 2], [3]])), sys.argv[1])"
    )
    command = [sys.executable, "-c", script, tmp_path / "images.pt"]
    run_command(command, tmp_path / "output", {"OMP_NUM_THREADS": "2"})
    num_threads, images = torch.load(tmp_path / "images.pt")
    assert num_threads == 2
    for solver, expected in chunked([[0], [1, 2, 3]]).items():
        assert_near(images[solver], expected, atol=tolerance_of(solver))


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_image_depends_on_its_own_generator_alone(pipe, solver):
    def run(order):
        labels = [LABELS[index] for index in order]
        return sample(pipe, labels, generator=generators(*order), schedulers=[solver] * 2).images

    together = run([0, 1, 2])
    assert_near(run([2, 0, 1]), together[[2, 0, 1]], atol=tolerance_of(solver))
    assert_near(torch.cat([run([0]), run([1, 2])]), together, atol=tolerance_of(solver))


def test_one_generator_serves_all_images_in_turn(pipe):
    output = sample(pipe, LABELS[:2], generator=torch.Generator().manual_seed(4), num_stages=3)
    generator = torch.Generator().manual_seed(4)
    noises = [randn_tensor((2, 4, 8, 8), generator=generator) for _ in range(3)]
    assert_stages_near(sample(pipe, LABELS[:2], latents=noises, num_stages=3), output, 0)
    moved = sample(pipe, LABELS[1:2], generator=torch.Generator().manual_seed(4), num_stages=3).images
    assert (moved - output.images[1:]).abs().max() > 0.5  # as in Diffusers, another place is another image


def test_one_generator_also_draws_the_noise_of_an_sde(pipe):
    solver = "euler_maruyama"
    output = sample(
        pipe, generator=torch.Generator().manual_seed(4), num_stages=1, num_inference_steps=4, schedulers=[solver]
    )
    generator = torch.Generator().manual_seed(4)
    scheduler = DoDFlowMatchScheduler(solver=solver)
    scheduler.set_timesteps(4)

    @torch.no_grad()
    def velocity(latents, timestep, indices):
        return pipe.transformer(latents, timestep, torch.tensor([1, 3])).sample

    by_hand = scheduler.solve(velocity, randn_tensor((2, 4, 8, 8), generator=generator), generator=generator)
    assert_near(output.images, by_hand.prev_sample)


def drawn_noises(pipe: DoDPipeline, monkeypatch: pytest.MonkeyPatch, **kwargs) -> list[torch.Tensor]:
    """All noise of a call with an SDE, each as a vector: that at the start of its stages and that of its steps."""
    noises, inputs = [], record_calls(pipe.transformer)
    step = DoDFlowMatchScheduler.step

    def recording_step(scheduler, *args, variance_noise, **kwargs):
        noises.extend(variance_noise.flatten(1))
        return step(scheduler, *args, variance_noise=variance_noise, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(DoDFlowMatchScheduler, "step", recording_step)
        sample(pipe, schedulers=["euler_maruyama"] * 3, num_stages=3, num_inference_steps=2, **kwargs)
    for call in inputs:
        if call.timestep[0] == 1000:
            noises.extend(call.hidden_states.flatten(1))
    return noises


def test_seeds_images_stages_steps_and_copies_have_noise_of_their_own(monkeypatch):
    noises = []
    for seed, indices in itertools.product([0, 1, 2**63], [[0, 1], [2, 2**40]]):
        kwargs = {"guidance_scale": 1.0, "num_images_per_prior": 2}  # unguided: a sample is evaluated once
        noises += drawn_noises(tiny_pipeline(), monkeypatch, seed=seed, sample_indices=indices, **kwargs)
    # Of 3 * 4 images 1 + 2 + 2 samples in the three stages, each with noise at the start and after both steps.
    assert len(noises) == 12 * 5 * 3
    correlations = torch.corrcoef(torch.stack(noises)).fill_diagonal_(0)
    assert correlations.abs().max() < 6 / noises[0].numel() ** 0.5


# ------------------------------------------------------------------------------------------------- noise without state


def test_noise_without_state_is_standard_normal():
    values = torch.stack([stateless_noise((64,), 3, index) for index in range(2000)])
    assert values.dtype == torch.float32
    assert abs(values.mean()) < 4 / values.numel() ** 0.5
    assert values.var() == pytest.approx(1, abs=4 * (2 / values.numel()) ** 0.5)
    assert values.pow(4).mean() == pytest.approx(3, abs=4 * (96 / values.numel()) ** 0.5)
    assert abs((values[1:] * values[:-1]).mean()) < 4 / values.numel() ** 0.5  # of neighbours


def test_noise_without_state_belongs_to_its_numbers():
    expected = stateless_noise((4, 8, 8), 1, 2, 3)
    assert expected.shape == (4, 8, 8)
    torch.manual_seed(99)
    np.random.seed(99)
    before = torch.get_rng_state()
    assert torch.equal(stateless_noise((4, 8, 8), 1, 2, 3), expected)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(stateless_noise((256,), 1, 2, 3), expected.flatten())
    for ids in [(1, 2, 4), (2, 1, 3), (1, 2), (1, 2, 3, 0), (0, 1, 2, 3), (1 + 2**32, 2, 3)]:
        assert not torch.isclose(stateless_noise((4, 8, 8), *ids), expected).any()


def test_noise_without_state_has_more_than_the_32_bits_that_torch_keeps_of_a_seed():
    one, other = (0, 2048, 0, 1, 3), (0, 17490, 0, 1, 1)  # found by trying 400,000
    seeds = [stateless_generator(*ids).initial_seed() for ids in (one, other)]
    assert seeds[0] != seeds[1] and seeds[0] % 2**32 == seeds[1] % 2**32
    draws = [torch.randn(64, generator=stateless_generator(*ids)) for ids in (one, other)]
    assert torch.equal(*draws)
    assert not torch.isclose(stateless_noise((64,), *one), stateless_noise((64,), *other)).any()


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ((0,), [0.4422069489955902, -0.1334790587425232, -0.2643882930278778, -0.188115656375885]),
        ((0, 0, 0, 1, 0), [0.3733013868331909, -1.4240895509719849, 3.5683071613311768, 0.47702136635780334]),
        ((1, 2, 3, 4, 5), [0.7295765280723572, 1.597220540046692, 1.7943341732025146, -0.6122711300849915]),
        ((2**64 - 1, 7), [-0.5948342680931091, 1.3868759870529175, 0.5144633054733276, -0.8951290845870972]),
    ],
)
def test_noise_without_state_is_that_of_earlier_versions(ids, expected):
    torch.testing.assert_close(stateless_noise((4,), *ids), torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("ids", [(-1,), (0, -3), (2**64,), (5, 2**70)])
def test_noise_without_state_refuses_numbers_out_of_range(ids):
    with pytest.raises(ValueError, match=says("`ids`", ">= 0", "< 2**64", f"got {ids}")):
        stateless_noise((2,), *ids)


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint8])
def test_a_seed_may_be_a_number_of_numpy(pipe, kind):
    output = sample(pipe, seed=kind(3), sample_indices=[kind(0), kind(1)])
    assert torch.equal(output.images, sample(pipe, seed=3).images)


# -------------------------------------------------------------------------------------------- several images per prior

COPIES = 3


@pytest.mark.parametrize("source", ["seed", "generators", "one generator"])
def test_the_first_image_of_a_prior_is_the_one_of_a_single_image(pipe, source):
    # One generator keeps the noise of the first image only, whatever is drawn after it.
    labels = [1] if source == "one generator" else [1, 3]

    def draw():
        if source == "seed":
            return {"seed": 2}
        return {"generator": generators(*labels) if source == "generators" else torch.Generator().manual_seed(2)}

    single = sample(pipe, labels, **draw())
    several = sample(pipe, labels, **draw(), num_images_per_prior=COPIES)
    assert torch.equal(several.stage_latents[0], single.stage_latents[0])  # one sample of stage 1 for all copies
    assert len(several.images) == COPIES * len(labels)
    assert_near(several.images[::COPIES], single.images)
    for one, other in itertools.combinations(several.images, 2):
        assert (one - other).abs().max() > 0.5


def test_images_of_a_prior_share_it_and_their_label(pipe):
    embedded, calls = [], record_calls(pipe.transformer)
    pipe.latent_embedder.register_forward_pre_hook(lambda module, args: embedded.append(args[0]))
    output = sample(pipe, num_stages=3, num_images_per_prior=COPIES, num_images_per_label=2, guidance_scale=1.0)
    assert [len(latents) for latents in output.stage_latents] == [4, 12, 12]
    assert torch.equal(embedded[0], output.stage_latents[0])  # each sample of stage 1 once
    assert torch.equal(embedded[1], output.stage_latents[1])  # from then on they go their own ways
    labels = [call.class_labels.tolist() for call in calls]
    assert labels == [[1, 1, 3, 3]] * 2 + [[1] * 6 + [3] * 6] * 4
    groups = calls[2].prior_embeds.unflatten(0, (4, COPIES))
    assert (groups == groups[:, :1]).all()
    for one, other in itertools.combinations(groups[:, 0], 2):
        assert (one - other).abs().max() > 1e-2
    assert not (calls[4].prior_embeds.unflatten(0, (4, COPIES)) == calls[4].prior_embeds[::COPIES, None]).all()


@pytest.mark.parametrize("solver", ["euler", "euler_maruyama"])
def test_images_of_a_prior_under_a_seed_keep_their_noise_in_every_stage(pipe, solver):
    kwargs = {"num_stages": 3, "num_images_per_label": 2, "sample_indices": [4, 0, 9, 2]}
    kwargs["schedulers"] = [solver] * 3
    single = sample(pipe, **kwargs)
    several = sample(pipe, **kwargs, num_images_per_prior=COPIES)
    fewer = sample(pipe, **kwargs, num_images_per_prior=COPIES - 1)
    for stage in (1, 2):
        groups = several.stage_latents[stage].unflatten(0, (4, COPIES))
        assert_near(groups[:, 0], single.stage_latents[stage])
        assert_near(groups[:, : COPIES - 1].flatten(0, 1), fewer.stage_latents[stage])


def test_noise_can_be_given_for_every_image_of_a_prior(pipe):
    noises = [noise(0, 2), noise(1, 2 * COPIES), noise(2, 2 * COPIES)]
    output = sample(pipe, num_stages=3, num_images_per_prior=COPIES, latents=noises)
    for copy in range(COPIES):
        alone = [noises[0], noises[1][copy::COPIES], noises[2][copy::COPIES]]
        expected = sample(pipe, num_stages=3, latents=alone)
        for stage in (1, 2):
            assert_near(output.stage_latents[stage][copy::COPIES], expected.stage_latents[stage])
    # One generator draws the same shapes in turn.
    generator = torch.Generator().manual_seed(6)
    drawn = [randn_tensor(latents.shape, generator=generator) for latents in noises]
    kwargs = {"num_stages": 3, "num_images_per_prior": COPIES}
    by_generator = sample(pipe, generator=torch.Generator().manual_seed(6), **kwargs)
    assert_stages_near(by_generator, sample(pipe, latents=drawn, **kwargs), 0)


@pytest.mark.parametrize("shared", [False, True])
def test_images_of_an_image(pipe, shared):
    images = [IMAGE] if shared else [IMAGE, IMAGE[::-1].copy()]
    given = noise(3, 2 * 2 * COPIES, width=4)
    embedded = []
    pipe.latent_embedder.register_forward_pre_hook(lambda module, args: embedded.append(len(args[0])))
    kwargs = {"latents": given, "width": 8}
    output = sample(pipe, image=images, num_images_per_label=2, num_images_per_prior=COPIES, **kwargs)
    assert embedded == [len(images)]
    each = [image for image in images for _ in range(2 * COPIES * 2 // len(images))]
    labels = [1] * 2 * COPIES + [3] * 2 * COPIES
    assert_near(output.images, sample(pipe, labels, image=each, **kwargs).images)


# --------------------------------------------------------------------------------------------- priors in other forms


def test_a_second_stage_can_be_run_on_its_own(pipe):
    whole = sample(pipe, guidance_scale=3.0)
    tokens = pipe.get_prior_tokens(latents=whole.stage_latents[0])
    assert tokens.shape == (2, 4, 8)
    for prior in ({"prior_latents": whole.stage_latents[0]}, {"prior_tokens": tokens}):
        calls = record_calls(pipe.transformer)
        output = sample(pipe, guidance_scale=3.0, **prior)
        assert len(output.stage_latents) == 1 and len(calls) == 2 and pipe.num_timesteps == 2
        assert_near(output.images, whole.images, atol=1e-5)
        swapped = {name: value.flip(0) for name, value in prior.items()}
        assert (sample(pipe, guidance_scale=3.0, **swapped).images - whole.images).abs().max() > 0.1


def test_later_stages_follow_a_given_prior(pipe):
    whole = sample(pipe, num_stages=4)
    output = sample(pipe, num_stages=4, prior_latents=whole.stage_latents[0])
    assert len(output.stage_latents) == 3
    for latents, expected in zip(output.stage_latents, whole.stage_latents[1:], strict=True):
        assert_near(latents, expected)


def test_tokens_of_images_stand_for_the_images(pipe):
    images = [IMAGE, IMAGE[::-1].copy()]
    tokens = pipe.get_prior_tokens(image=images, width=8)
    expected = sample(pipe, image=images, width=8).images
    assert_near(sample(pipe, prior_tokens=tokens, width=8).images, expected)
    shared = sample(pipe, prior_tokens=tokens[:1], width=8, num_images_per_label=2).images
    assert_near(shared, sample(pipe, image=IMAGE, width=8, num_images_per_label=2).images)
    with torch.no_grad():
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1
        latents = pipe.encode_image(pixels)
    assert_near(pipe.get_prior_tokens(latents=latents), tokens)
    assert_near(sample(pipe, prior_latents=latents).images, expected)


def test_between_the_tokens_of_two_priors_lie_others(pipe):
    first, second = pipe.get_prior_tokens(latents=noise(0))
    images = {
        weight: sample(pipe, [4], prior_tokens=torch.lerp(first, second, weight)[None], num_inference_steps=4).images
        for weight in (0.0, 0.5, 0.501, 1.0)
    }
    assert_near(images[0.0], sample(pipe, [4], prior_latents=noise(0)[:1], num_inference_steps=4).images)
    assert_near(images[1.0], sample(pipe, [4], prior_latents=noise(0)[1:], num_inference_steps=4).images)
    whole = (images[1.0] - images[0.0]).norm()
    for end in (0.0, 1.0):
        assert 0.1 * whole < (images[0.5] - images[end]).norm() < whole
    assert 0 < (images[0.501] - images[0.5]).norm() < 0.01 * whole


def test_the_size_follows_the_latents_of_a_prior(pipe):
    output = sample(pipe, prior_latents=noise(0, height=12, width=4), output_type="pt")
    assert output.images.shape == (2, 3, 24, 8)
    again = sample(pipe, prior_latents=noise(0, height=12, width=4), height=24, width=8, output_type="pt")
    assert torch.equal(again.images, output.images)
    tokens = pipe.get_prior_tokens(latents=noise(0, height=12, width=4))  # which have no size
    assert sample(pipe, prior_tokens=tokens).images.shape == (2, 4, 8, 8)
    given = sample(pipe, prior_tokens=tokens, height=24, width=8, output_type="pt")
    assert_near(given.images, output.images)


@pytest.mark.parametrize("prior", [{"image": IMAGE}, {"latents": noise(0)}], ids=["image", "latents"])
def test_nothing_stays_on_the_device_when_tokens_are_extracted(pipe, monkeypatch, prior):
    events = []
    pipe.vae.encoder.register_forward_pre_hook(lambda *_: events.append("vae"))
    pipe.latent_embedder.encoder_blocks[0].register_forward_pre_hook(lambda *_: events.append("latent_embedder"))
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: events.append("free"))
    tokens = pipe.get_prior_tokens(**prior)
    assert events == [*(["vae"] if "image" in prior else []), "latent_embedder", "free"]
    assert not tokens.requires_grad


@pytest.mark.parametrize(
    ("kwargs", "exception", "fragments"),
    [
        ({}, ValueError, ["`image`", "`latents`", "got neither"]),
        ({"image": IMAGE, "latents": noise(0)}, ValueError, ["`image`", "`latents`", "got both"]),
        ({"latents": noise(0)[:, :3]}, ValueError, ["`latents`", "4, 8, 8)", "got (2, 3, 8, 8)"]),
        ({"latents": noise(0, width=7)}, ValueError, ["`latents`", "multiples of 2", "got (2, 4, 8, 7)"]),
        ({"latents": noise(0)[0]}, ValueError, ["`latents`", "4, height, width)", "got (4, 8, 8)"]),
        ({"latents": noise(0) * math.nan}, ValueError, ["`latents`", "finite", "nan"]),
        ({"latents": [noise(0)]}, TypeError, ["`latents`", "Tensor", "got [tensor"]),
        ({"image": IMAGE, "height": 15}, ValueError, ["`height`", "multiple of 4", "got 15"]),
        ({"image": []}, ValueError, ["`image`", "at least one image", "got 0"]),
        ({"image": 5}, TypeError, ["`image`", "Image", "got 5"]),
    ],
)
def test_bad_arguments_of_get_prior_tokens(pipe, kwargs, exception, fragments):
    with pytest.raises(exception, match=says(*fragments)):
        pipe.get_prior_tokens(**kwargs)


def test_tokens_need_a_latent_embedder():
    with pytest.raises(ValueError, match=says("`latent_embedder`", "got None")):
        tiny_pipeline(latent_embedder=None).get_prior_tokens(latents=noise(0))
    for name, prior in (("prior_latents", noise(0)), ("prior_tokens", torch.zeros(2, 4, 8))):
        with pytest.raises(ValueError, match=says(f"`{name}`")):
            sample(tiny_pipeline(latent_embedder=None), **{name: prior})


def test_the_scale_of_adapters_also_acts_on_given_tokens():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    embedder = tiny_latent_embedder()
    embedder.add_adapter(
        peft.LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    )
    pipe = tiny_pipeline(latent_embedder=embedder)
    tokens = torch.randn(2, 4, 8)
    plain = sample(tiny_pipeline(), prior_tokens=tokens).images
    full, half, none = (
        sample(pipe, prior_tokens=tokens, attention_kwargs={"scale": scale}).images for scale in (1.0, 0.5, 0.0)
    )
    assert torch.equal(sample(pipe, prior_tokens=tokens).images, full)
    assert_near(none, plain)
    assert (full - plain).abs().max() > 1e-2 and (full - half).abs().max() > 1e-2
    assert torch.equal(sample(pipe, prior_tokens=tokens).images, full)  # the scale is back where it was


# ------------------------------------------------------------------------------------------------- stage by stage

STAGE_OPTIONS = {
    "steps": ("num_inference_steps", 5),
    "solver": ("schedulers", "heun"),
    "scheduler": ("schedulers", DoDFlowMatchScheduler(shift=3.0)),
    "stock scheduler": ("schedulers", FlowMatchEulerDiscreteScheduler(shift=3.0)),
    "scale": ("guidance_scale", 4.0),
}


@pytest.mark.parametrize("option", STAGE_OPTIONS)
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_an_entry_acts_on_its_own_stage(pipe, option, stage):
    name, value = STAGE_OPTIONS[option]
    default = [None] * 3
    noises = [noise(seed) for seed in range(3)]
    plain = sample(pipe, num_stages=3, latents=noises)
    assert_stages_near(sample(pipe, num_stages=3, latents=noises, **{name: default}), plain, 0)
    changed = sample(
        pipe, num_stages=3, latents=noises, **{name: [value if i == stage else default[i] for i in range(3)]}
    )
    for i in range(stage):
        assert torch.equal(changed.stage_latents[i], plain.stage_latents[i])
    # Later stages have another prior, but go on as before from there.
    expected = sample(pipe, num_stages=2, prior_latents=changed.stage_latents[stage], latents=noises[-1])
    assert (changed.stage_latents[stage] - plain.stage_latents[stage]).abs().max() > 0.05
    if stage < 2:
        rest = [noises[i] for i in range(stage + 1, 3)]
        expected = sample(pipe, num_stages=3 - stage, prior_latents=changed.stage_latents[stage], latents=rest)
        for latents, others in zip(changed.stage_latents[stage + 1 :], expected.stage_latents, strict=True):
            assert_near(latents, others)


@pytest.mark.parametrize("option", STAGE_OPTIONS)
def test_a_single_value_is_that_of_all_stages_but_for_the_scale(pipe, option):
    name, value = STAGE_OPTIONS[option]
    values = [1.0 if name == "guidance_scale" else value, value, value]
    single, each = (sample(pipe, num_stages=3, **{name: given}) for given in (value, values))
    assert_stages_near(single, each, 0)
    assert (single.images - sample(pipe, num_stages=3).images).abs().max() > 0.05


def test_entries_belong_to_the_stages_that_are_run(pipe):
    given = noise(0)
    kwargs = {"num_stages": 3, "prior_latents": given}
    output = sample(pipe, **kwargs, num_inference_steps=[3, 5], guidance_scale=[1.0, 3.0])
    assert [entry.num_evaluations.tolist() for entry in output.statistics] == [[3, 3], [5, 5]]
    assert [entry.num_guided_evaluations.tolist() for entry in output.statistics] == [[0, 0], [5, 5]]


def test_a_scale_of_the_only_stage_without_a_latent_embedder():
    pipe = tiny_pipeline(latent_embedder=None)
    output = sample(pipe, guidance_scale=[3.0])
    assert torch.equal(output.images, sample(pipe, guidance_scale=3.0).images)
    assert not torch.equal(output.images, sample(pipe, guidance_scale=2.0).images)


def test_schedulers_of_both_kinds_follow_each_other(pipe):
    stock, ours = FlowMatchEulerDiscreteScheduler(shift=3.0), DoDFlowMatchScheduler(solver="heun")
    output = sample(pipe, schedulers=[stock, ours], num_inference_steps=[4, 3])
    expected = sample(pipe, schedulers=[DoDFlowMatchScheduler(shift=3.0), "heun"], num_inference_steps=[4, 3])
    assert_stages_near(output, expected, 1e-5)
    assert pipe.num_timesteps == 4 + 2 * 3
    # With one of Diffusers' schedulers in the pipeline, ours are given as objects.
    pipe = tiny_pipeline(scheduler=stock)
    assert_stages_near(sample(pipe, schedulers=[None, ours], num_inference_steps=[4, 3]), expected, 1e-5)


EVALUATIONS = {
    "euler": lambda steps: steps,
    "midpoint": lambda steps: 2 * steps,
    "heun": lambda steps: 2 * steps,
    "rk4": lambda steps: 4 * steps,
    "euler_maruyama": lambda steps: steps,
    "stochastic_heun": lambda steps: 2 * steps - 1,
}


@pytest.mark.parametrize(
    "solvers", [["euler", "midpoint", "heun", "rk4"], ["stochastic_heun", "euler_maruyama", "rk4"], ["heun"]], ids=str
)
def test_evaluations_are_counted_by_stage(pipe, solvers):
    calls = record_calls(pipe.transformer)
    steps = [2, 3, 4, 5][: len(solvers)]
    output = sample(pipe, num_stages=len(solvers), schedulers=solvers, num_inference_steps=steps)
    expected = [EVALUATIONS[solver](number) for solver, number in zip(solvers, steps, strict=True)]
    assert len(output.statistics) == len(output.stage_latents) == len(solvers)
    for stage, (statistics, number) in enumerate(zip(output.statistics, expected, strict=True)):
        assert statistics.num_evaluations.tolist() == [number] * 2
        assert statistics.num_guided_evaluations.tolist() == [number if stage > 0 else 0] * 2
        assert statistics.num_accepted_steps is None and statistics.num_rejected_steps is None
    assert len(calls) == pipe.num_timesteps == sum(expected)


def test_adaptive_and_fixed_stages_mix(pipe):
    solvers, steps = ["dopri5", "euler", "dopri5"], [None, 3, None]
    output = sample(pipe, num_stages=3, schedulers=solvers, num_inference_steps=steps, num_images_per_prior=2)
    assert pipe.num_timesteps is None
    for statistics, batch_size in zip(output.statistics[::2], (2, 4), strict=True):
        steps = statistics.num_accepted_steps + statistics.num_rejected_steps
        assert statistics.num_accepted_steps.shape == (batch_size,) and (statistics.num_accepted_steps > 1).all()
        assert torch.equal(statistics.num_evaluations, 2 + 6 * steps)
    assert output.statistics[1].num_evaluations.tolist() == [3] * 4
    first = sample(pipe, num_stages=1, schedulers=["dopri5"])
    assert_near(output.stage_latents[0], first.images, atol=0)
    alone = sample(
        pipe,
        prior_latents=first.images,
        schedulers=["euler"],
        num_inference_steps=3,
        num_images_per_prior=2,
    )
    assert_near(output.stage_latents[1], alone.images)


def test_steps_that_some_stage_takes_are_not_announced_as_without_effect(pipe, caplog):
    sample(pipe, num_inference_steps=3, schedulers=["dopri5", None])
    assert not caplog.text
    sample(pipe, num_inference_steps=3, schedulers=["dopri5", "dopri5"])
    assert "`num_inference_steps` = 3 has no effect" in caplog.text


@pytest.mark.parametrize("output_type", ["pt", "np", "latent"])
def test_latents_of_the_stages_decode_to_the_stages(pipe, output_type):
    output = sample(pipe, num_stages=3, output_type=output_type, num_images_per_prior=2)
    assert len(output.stage_latents) == 3
    for latents, images in zip(output.stage_latents, output.stages, strict=True):
        assert latents.dtype == torch.float32 and latents.shape == (len(images), 4, 8, 8)
        with torch.no_grad():
            np.testing.assert_array_equal(pipe.decode_latents(latents, output_type), images)
    plain = sample(pipe, num_stages=3, output_type=output_type, return_stages=False, num_images_per_prior=2)
    assert plain.stage_latents is None and plain.stages is None and len(plain.statistics) == 3
    np.testing.assert_array_equal(plain.images, output.images)


# ------------------------------------------------------------------------------------------------------ explicit grids


def model_times(pipe: DoDPipeline, **kwargs) -> list[float]:
    """The times of the evaluations of one unguided stage."""
    calls = record_calls(pipe.transformer)
    sample(pipe, [1], num_stages=1, **kwargs)
    return [float(call.timestep[0]) for call in calls]


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("solver", FIXED_STEP_SOLVERS)
def test_sigmas_of_a_call_and_timesteps_of_a_scheduler_are_two_names_of_a_grid(shift, solver):
    pipe = tiny_pipeline(scheduler=DoDFlowMatchScheduler(shift=shift, solver=solver))
    sigmas = [1.0, 0.6, 0.2]
    timesteps = [1000 * shift * sigma / (1 + (shift - 1) * sigma) for sigma in sigmas]  # after the shift
    output = sample(pipe, sigmas=sigmas)
    assert pipe.num_timesteps == 2 * EVALUATIONS[solver](3)
    times = pipe.scheduler.timesteps.clone()
    pipe.scheduler.set_timesteps(timesteps=timesteps)
    torch.testing.assert_close(pipe.scheduler.timesteps, times)
    regular = sample(pipe, num_inference_steps=3)
    for one, other in zip(output.stage_latents, regular.stage_latents, strict=True):
        assert (one - other).abs().max() > 0.01
    assert model_times(pipe, sigmas=sigmas)[0] == 1000
    if solver == "euler":
        assert model_times(pipe, sigmas=sigmas) == pytest.approx(timesteps)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_regular_grid_as_sigmas(shift):
    pipe = tiny_pipeline(scheduler=DoDFlowMatchScheduler(shift=shift))
    expected = sample(pipe, num_inference_steps=4)
    assert_stages_near(sample(pipe, sigmas=[1.0, 0.75, 0.5, 0.25]), expected, 1e-5)
    assert_stages_near(sample(pipe, sigmas=np.linspace(1, 0.25, 4)), expected, 1e-5)
    assert_stages_near(sample(pipe, sigmas=torch.linspace(1, 0.25, 4)), expected, 1e-5)


@pytest.mark.parametrize(
    ("ours", "stock"),
    [
        (DoDFlowMatchScheduler(), FlowMatchEulerDiscreteScheduler()),
        (DoDFlowMatchScheduler(shift=3.0), FlowMatchEulerDiscreteScheduler(shift=3.0)),
        (DoDFlowMatchScheduler(), FlowMatchEulerDiscreteScheduler(num_train_timesteps=100)),
    ],
    ids=["plain", "shift", "other number of training timesteps"],
)
def test_sigmas_reach_a_stock_scheduler(pipe, ours, stock):
    sigmas = [1.0, 0.6, 0.2]
    outputs = [sample(pipe, sigmas=sigmas, schedulers=[scheduler] * 2) for scheduler in (ours, stock)]
    assert_stages_near(*outputs, 1e-5)
    default = sample(pipe, num_inference_steps=3, schedulers=[stock] * 2)
    assert (outputs[1].images - default.images).abs().max() > 0.05


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
@pytest.mark.parametrize(
    "make",
    [
        lambda: FlowMatchEulerDiscreteScheduler(),
        lambda: FlowMatchLCMScheduler(),
        lambda: UniPCMultistepScheduler(**FLOW),
        lambda: DoDFlowMatchScheduler(),
    ],
    ids=["Euler", "LCM", "UniPC", "ours"],
)
def test_the_model_sees_the_sigmas_of_a_call_in_every_form(pipe, make, kind):
    times = model_times(pipe, sigmas=kind([1.0, 0.6, 0.2]), schedulers=[make()])
    assert times == pytest.approx([1000, 600, 200], abs=0.01)


# ----------------------------------------------------------------------------------------------- closed-form solutions

MEAN = torch.tensor([0.5, -1.0, 0.0, 2.0]).reshape(1, 4, 1, 1)
STD = torch.tensor([0.5, 1.5, 0.2, 1.0]).reshape(1, 4, 1, 1)


def gaussian_pipeline(**overrides) -> tuple[DoDPipeline, list[torch.Tensor]]:
    """A pipeline whose data is N(MEAN, STD^2), the flow to which is known, and the times its model will see."""
    pipe, times = tiny_pipeline(vae=None, **overrides), []

    def forward(hidden_states, timestep, class_labels, prior_embeds=None, attention_kwargs=None):
        times.append(timestep)
        mean, std = MEAN.double(), STD.double()
        sigma = timestep.double().reshape(-1, 1, 1, 1) / 1000
        variance = ((1 - sigma) * std) ** 2 + sigma**2
        velocity = -(mean + ((1 - sigma) * std**2 - sigma) / variance * (hidden_states - (1 - sigma) * mean))
        return SimpleNamespace(sample=velocity.to(hidden_states.dtype))

    pipe.transformer.forward = forward
    return pipe, times


def exact(latents: torch.Tensor, sigma: float = 1.0) -> torch.Tensor:
    """Where the flow leads from a sample at sigma: MEAN + STD * noise."""
    std = (((1 - sigma) * STD) ** 2 + sigma**2) ** 0.5
    return MEAN + STD * (latents - (1 - sigma) * MEAN) / std


def errors_of_stages(pipe: DoDPipeline, scheduler, steps: int | None, sigma: float = 1.0) -> float:
    """The largest error of three stages, which all start from noise of their own."""
    noises = [noise(seed) for seed in range(3)]
    output = sample(
        pipe,
        num_stages=3,
        num_inference_steps=steps,
        schedulers=[scheduler] * 3,
        guidance_scale=1.0,
        latents=noises,
    )
    return max(
        float((latents - exact(given, sigma)).abs().max())
        for latents, given in zip(output.stage_latents, noises, strict=True)
    )


CONVERGENCE = {
    # The scheduler, two numbers of steps, the least order of convergence between them and the largest error at the end
    "euler": (lambda: DoDFlowMatchScheduler(), (64, 128), 0.9, 0.1),
    "midpoint": (lambda: DoDFlowMatchScheduler(solver="midpoint"), (16, 32), 1.9, 1e-3),
    "heun": (lambda: DoDFlowMatchScheduler(solver="heun"), (32, 64), 1.8, 1e-3),
    "rk4": (lambda: DoDFlowMatchScheduler(solver="rk4"), (8, 16), 3.8, 5e-5),
    "shifted heun": (lambda: DoDFlowMatchScheduler(solver="heun", shift=3.0), (32, 64), 1.6, 5e-3),
    "stock Euler": (lambda: FlowMatchEulerDiscreteScheduler(), (64, 128), 0.9, 0.1),
    "stock Euler, 100": (lambda: FlowMatchEulerDiscreteScheduler(num_train_timesteps=100), (64, 128), 0.9, 0.1),
    "stock Heun": (lambda: FlowMatchHeunDiscreteScheduler(), (32, 64), 1.8, 1e-3),
    "shifted stock Heun": (lambda: FlowMatchHeunDiscreteScheduler(shift=3.0), (32, 64), 1.6, 5e-3),
}


@pytest.mark.parametrize("name", CONVERGENCE)
def test_solvers_converge_to_the_exact_solution_in_every_stage(name):
    make, steps, order, tolerance = CONVERGENCE[name]
    pipe, _ = gaussian_pipeline()
    coarse, fine = (errors_of_stages(pipe, make(), number) for number in steps)
    assert fine < tolerance
    assert math.log2(coarse / fine) > order


@pytest.mark.parametrize("kind", [UniPCMultistepScheduler, DPMSolverMultistepScheduler])
@pytest.mark.parametrize("config", [{}, {"flow_shift": 2.0, "num_train_timesteps": 500}], ids=str)
def test_multistep_solvers_of_diffusers_converge_to_the_exact_solution_in_every_stage(kind, config):
    pipe, _ = gaussian_pipeline()
    scheduler = kind(**FLOW, **config)
    errors = []
    for steps in (16, 64):
        scheduler.set_timesteps(steps)
        # DPM-Solver takes the noise for a sample at its own first sigma, just below 1.
        errors.append(errors_of_stages(pipe, scheduler, steps, sigma=float(scheduler.sigmas[0])))
    assert errors[1] < 0.02 and math.log(errors[0] / errors[1], 4) > 1


@pytest.mark.parametrize("rtol", [1e-3, 1e-5])
def test_the_adaptive_solver_reaches_the_exact_solution_in_every_stage(rtol):
    pipe, _ = gaussian_pipeline()
    assert errors_of_stages(pipe, DoDFlowMatchScheduler(solver="dopri5", rtol=rtol), None) < 50 * rtol


@pytest.mark.parametrize("solver", ["euler_maruyama", "stochastic_heun"])
@pytest.mark.parametrize("diffusion_form", ["sigma", "SBDM"])
def test_stochastic_solvers_reach_the_mean_and_the_deviation_of_the_data(solver, diffusion_form):
    pipe, _ = gaussian_pipeline()
    pipe.scheduler = DoDFlowMatchScheduler(solver=solver, diffusion_form=diffusion_form, last_step="tweedie")
    output = sample(pipe, [1] * 128, num_stages=2, num_inference_steps=40, guidance_scale=1.0)
    for latents in output.stage_latents:
        values = latents.transpose(0, 1).flatten(1)
        # Of 8192 values of a channel the mean is known to 0.011 of the deviation, the deviation to 0.008.
        assert_near(values.mean(1) / STD.flatten(), MEAN.flatten() / STD.flatten(), atol=0.05)
        assert_near(values.std(1) / STD.flatten(), torch.ones(4), atol=0.06)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(),
        FlowMatchEulerDiscreteScheduler(num_train_timesteps=100, shift=3.0),
        FlowMatchHeunDiscreteScheduler(),
        UniPCMultistepScheduler(**FLOW),
        UniPCMultistepScheduler(**FLOW, num_train_timesteps=300),
        DPMSolverMultistepScheduler(**FLOW),
        DPMSolverMultistepScheduler(**FLOW, num_train_timesteps=300),
    ],
    ids=lambda scheduler: f"{type(scheduler).__name__}-{scheduler.config.num_train_timesteps}",
)
def test_the_model_sees_the_time_of_a_stock_scheduler_unrounded(scheduler):
    pipe, times = gaussian_pipeline(scheduler=scheduler)
    sample(pipe, num_stages=2, num_inference_steps=7, guidance_scale=1.0)
    seen = torch.stack(times)[:, 0]
    expected = 1000 * scheduler.sigmas[: len(scheduler.timesteps)]
    assert torch.equal(seen, expected.repeat(2))
    assert scheduler.timesteps.is_floating_point() or not torch.equal(seen, seen.round())


def test_the_adaptive_solver_rejects_steps_of_the_samples_that_need_it():
    pipe, _ = gaussian_pipeline()

    def forward(latents, timestep, class_labels, **kwargs):
        is_hard = (class_labels == 1).reshape(-1, 1, 1, 1)
        slope = -30 * torch.sin(30 * timestep / 1000).reshape(-1, 1, 1, 1)  # of cos(30 sigma)
        return SimpleNamespace(sample=torch.where(is_hard, slope, 0.1) + torch.zeros_like(latents))

    pipe.transformer.forward = forward
    seen = []

    def callback(pipe, step_index, timestep, kwargs):
        seen.append((float(timestep), kwargs["latents"]))

    solver = {"num_stages": 1, "schedulers": ["dopri5"]}
    output = sample(pipe, [1, 2], **solver, callback_on_step_end=callback)
    statistics = output.statistics[0]
    assert statistics.num_rejected_steps[0] > 0 == statistics.num_rejected_steps[1]
    assert statistics.num_evaluations[0] > 3 * statistics.num_evaluations[1]
    # The time is that of the hard sample, long after the easy one is done.
    times = [time for time, _ in seen]
    assert times[0] == 1000 and times == sorted(times, reverse=True) and times[-1] > 0
    is_done = [torch.equal(latents[1], output.images[1]) for _, latents in seen]
    assert is_done.index(True) < len(seen) / 2 and times[is_done.index(True)] > 500
    hard = sample(pipe, [1], **solver)
    assert torch.equal(hard.statistics[0].num_evaluations, statistics.num_evaluations[:1])


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_noise_has_the_deviation_that_the_solver_starts_from(solver):
    scheduler = DoDFlowMatchScheduler(solver=solver)
    pipe, _ = gaussian_pipeline(scheduler=scheduler)
    inputs = record_calls(pipe.transformer)
    sample(pipe, latents=[noise(0), noise(1)], num_inference_steps=None if solver == "dopri5" else 4)
    if solver != "dopri5":
        scheduler.set_timesteps(4)
    factor = scheduler.init_noise_sigma
    assert (factor > 1.2) == (solver == "stochastic_heun")
    first = [call for call in inputs if (call.timestep == 1000).all()]
    assert_near(first[0].hidden_states, noise(0) * factor, atol=1e-6)
    assert any(torch.allclose(call.hidden_states[:2], noise(1) * factor) for call in first[1:])


# ------------------------------------------------------------------------------------- stochastic schedulers, not ours

STOCHASTIC = {
    "LCM": FlowMatchLCMScheduler,
    "DPM-Solver": lambda: DPMSolverMultistepScheduler(**FLOW, algorithm_type="sde-dpmsolver++"),
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_stochastic_scheduler_of_diffusers_is_as_independent_of_the_batch(name):
    pipe = tiny_pipeline(scheduler=STOCHASTIC[name]())

    def run(indices, **kwargs):
        labels = [LABELS[index] for index in indices]
        return sample(pipe, labels, sample_indices=indices, num_inference_steps=4, num_images_per_prior=2, **kwargs)

    together = run([0, 1, 2])
    torch.manual_seed(7)
    assert_stages_near(run([0, 1, 2]), together, 0)  # the global generator has no part in it
    moved = run([2, 0])
    assert_near(moved.stage_latents[0], together.stage_latents[0][[2, 0]])
    assert_near(moved.images, together.images[[4, 5, 0, 1]])
    assert (run([0, 1, 2], seed=1).images - together.images).abs().max() > 0.5


def test_every_step_of_a_stochastic_scheduler_of_diffusers_has_noise_of_its_own(monkeypatch):
    seeds, step = [], FlowMatchLCMScheduler.step

    def recording_step(scheduler, *args, generator, **kwargs):
        seeds.extend(entry.initial_seed() for entry in generator)
        return step(scheduler, *args, generator=generator, **kwargs)

    monkeypatch.setattr(FlowMatchLCMScheduler, "step", recording_step)
    pipe = tiny_pipeline(scheduler=FlowMatchLCMScheduler())
    for seed in (0, 1):
        sample(pipe, seed=seed, num_stages=3, num_inference_steps=3, num_images_per_prior=2)
    assert len(set(seeds)) == len(seeds) == 2 * 3 * (2 + 4 + 4)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_the_noise_of_a_stochastic_scheduler_of_diffusers_is_seeded_too(name):
    """The same initial noise, so that only that of the steps can make a difference."""
    pipe = tiny_pipeline(scheduler=STOCHASTIC[name]())
    kwargs = {"num_stages": 1, "latents": noise(0), "num_inference_steps": 4}
    images = [sample(pipe, seed=seed, **kwargs).images for seed in (0, 0, 1)]
    assert torch.equal(images[0], images[1]) and (images[0] - images[2]).abs().max() > 0.05
    by_generator = [sample(pipe, generator=generators(*seeds), **kwargs).images for seeds in [(0, 1), (0, 2)]]
    assert_near(by_generator[0][0], by_generator[1][0])
    assert (by_generator[0][1] - by_generator[1][1]).abs().max() > 0.05
