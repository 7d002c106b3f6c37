import difflib
import inspect
import io
import json
import math
import os
import re
import warnings

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.utils.torch_utils import randn_tensor
from helpers import (
    ID2LABEL,
    assert_near,
    noise,
    record_calls,
    says,
    table,
    tiny_latent_embedder,
    tiny_pipeline,
    tiny_transformer,
    tiny_vae,
)
from PIL import Image

from diffusers_dod import DoDFlowMatchScheduler, DoDPipeline, DoDPipelineOutput, Guidance
from diffusers_dod.autoencoders import denormalize_latents, normalize_latents
from diffusers_dod.compute import sampling_compute
from diffusers_dod.pipeline_inputs import to_label_ids
from diffusers_dod.seeding import PRIOR_NOISE, stateless_noise


NULL_CLASS = len(ID2LABEL)


def sample(pipe, class_labels=(1, 3), **kwargs):
    """Calls the pipeline with fixed noise unless given other, for latents unless asked otherwise."""
    if "generator" not in kwargs and "latents" not in kwargs:
        kwargs["generator"] = torch.Generator().manual_seed(0)
    return pipe(list(class_labels), **{"output_type": "latent", **kwargs})


def batch_sizes(calls):
    return [call.hidden_states.shape[0] for call in calls]


@torch.no_grad()
def sample_by_hand(pipe, class_labels, noises, scales, num_steps):
    """Paper, Eq. 4, by Euler's method with the two passes of guidance one after the other; samples of all stages."""
    class_labels = torch.tensor(class_labels)
    null_labels = torch.full_like(class_labels, NULL_CLASS)
    stages, prior_embeds = [], None
    for latents, scale in zip(noises, scales, strict=True):
        if stages:
            prior_embeds = pipe.latent_embedder(stages[-1]).prior_embeds
        for step in range(num_steps):
            timestep = 1000 * (1 - step / num_steps)
            conditional = pipe.transformer(latents, timestep, class_labels, prior_embeds=prior_embeds).sample
            unconditional = pipe.transformer(latents, timestep, null_labels).sample
            latents = latents - (unconditional + scale * (conditional - unconditional)) / num_steps
        stages.append(latents)
    return stages


# ------------------------------------------------------------------------------------------------- what is computed


def test_stages_equal_eq_4_by_hand(pipe):
    noises = [noise(0), noise(1), noise(2)]
    output = sample(
        pipe,
        [1, 3],
        num_stages=3,
        num_inference_steps=3,
        guidance_scale=[1.5, 3.0, 3.0],
        latents=noises,
        return_stages=True,
    )
    expected = sample_by_hand(pipe, [1, 3], noises, scales=[1.5, 3.0, 3.0], num_steps=3)
    for actual, by_hand in zip(output.stages, expected, strict=True):
        assert_near(actual, by_hand)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_forms_and_shapes_of_two_stages(pipe, output_type):
    output = sample(pipe, num_stages=2, output_type=output_type, return_stages=True)
    assert len(output.stages) == 2
    for images in output.stages:
        if output_type == "pil":
            assert [(image.size, image.mode) for image in images] == [((16, 16), "RGB")] * 2
        elif output_type == "np":
            assert isinstance(images, np.ndarray) and images.shape == (2, 16, 16, 3)
            assert images.min() >= 0 and images.max() <= 1
        elif output_type == "pt":
            assert isinstance(images, torch.Tensor) and images.shape == (2, 3, 16, 16)
            assert images.min() >= 0 and images.max() <= 1
        else:
            assert images.shape == (2, 4, 8, 8) and images.dtype == torch.float32


def test_forms_hold_the_same_image(pipe):
    latents = sample(pipe)
    tensors, arrays, images = (sample(pipe, output_type=form).images for form in ("pt", "np", "pil"))
    np.testing.assert_array_equal(arrays, tensors.permute(0, 2, 3, 1).numpy())
    for array, image in zip(arrays, images, strict=True):
        np.testing.assert_array_equal((array * 255).round().astype(np.uint8), np.asarray(image))
    # The way back from normalised latents, by hand.
    mean, std = (torch.tensor(pipe.vae.config[name]).reshape(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        decoded = pipe.vae.decode(latents.images * std + mean).sample
    assert_near(tensors, (decoded / 2 + 0.5).clamp(0, 1))


def test_return_forms(pipe):
    output = sample(pipe)
    assert isinstance(output, DoDPipelineOutput) and output.stages is None
    with_stages = sample(pipe, return_stages=True)
    assert torch.equal(with_stages.images, output.images)
    assert torch.equal(with_stages.stages[-1], output.images)
    assert not torch.equal(with_stages.stages[0], output.images)

    (images,) = sample(pipe, return_dict=False)
    assert torch.equal(images, output.images)
    images, stages = sample(pipe, return_dict=False, return_stages=True)
    assert torch.equal(images, output.images) and len(stages) == 2
    assert torch.equal(stages[0], with_stages.stages[0])


def test_defaults_are_those_of_the_config():
    pipe = tiny_pipeline(default_guidance_scale=3.0, default_num_inference_steps=3, default_num_stages=3)
    given = sample(tiny_pipeline(), guidance_scale=3.0, num_inference_steps=3, num_stages=3).images
    assert torch.equal(sample(pipe).images, given)
    assert tiny_pipeline().config.default_num_stages == 2
    single = tiny_pipeline(latent_embedder=None)  # the default of 2 does not reach a model without priors
    assert len(single([1], return_stages=True, output_type="latent").stages) == 1


def test_a_checkpoint_may_guide_stage_1_by_default(tmp_path):
    tiny_pipeline(default_guidance_scale=3.0, default_first_stage_guidance_scale=2.0).save_pretrained(tmp_path)
    pipe, plain = load(tmp_path), tiny_pipeline(default_guidance_scale=3.0)
    for scale, expected in (
        (None, [2.0, 3.0]),
        (1.5, [2.0, 1.5]),  # a single scale is for stages from 2 on
        ([None, None], [2.0, 3.0]),
        ([1.0, 4.0], [1.0, 4.0]),
    ):
        assert torch.equal(sample(pipe, guidance_scale=scale).images, sample(plain, guidance_scale=expected).images)
    assert torch.equal(sample(pipe, num_stages=1).images, sample(plain, num_stages=1, guidance_scale=[2.0]).images)
    for scale, message in ((-3, "got -3"), (NAN, "got nan"), ("abc", "got 'abc'")):  # although one stage needs none
        with pytest.raises((ValueError, TypeError), match=says("`guidance_scale`", message)):
            pipe([1], num_stages=1, guidance_scale=scale)
    guided = sampling_compute(pipe)["stages"][0]["num_guided_evaluations"]
    assert guided == sampling_compute(plain)["stages"][1]["num_guided_evaluations"] > 0


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_batch_equals_single_samples(solver):
    pipe = tiny_pipeline(scheduler=DoDFlowMatchScheduler(solver=solver))
    noises = [noise(0, batch_size=3), noise(1, batch_size=3)]
    together = sample(pipe, [7, 0, 7], latents=noises, guidance_scale=2.0).images
    for i, label in enumerate([7, 0, 7]):
        alone = sample(pipe, [label], latents=[stage_noise[i : i + 1] for stage_noise in noises], guidance_scale=2.0)
        assert_near(together[i : i + 1], alone.images)


# ------------------------------------------------------------------------------------------------------------ noise


def test_one_stage_is_the_first_of_two(pipe):
    noises = [noise(0), noise(1)]
    two = sample(pipe, num_stages=2, latents=noises, return_stages=True)
    one = sample(pipe, num_stages=1, latents=noises[:1])
    assert torch.equal(one.images, two.stages[0])


def test_latents_as_list_are_the_noise_of_each_stage(pipe):
    first = sample(pipe, latents=[noise(0), noise(1)], return_stages=True)
    again = sample(pipe, latents=[noise(0), noise(1)], return_stages=True)
    other_second = sample(pipe, latents=[noise(0), noise(2)], return_stages=True)
    other_first = sample(pipe, latents=[noise(2), noise(1)], return_stages=True)
    assert all(torch.equal(a, b) for a, b in zip(first.stages, again.stages, strict=True))
    assert torch.equal(first.stages[0], other_second.stages[0])
    assert not torch.equal(first.stages[1], other_second.stages[1])
    # The same noise in stage 2, so only the visual prior can make the difference.
    assert not torch.allclose(first.stages[1], other_first.stages[1], atol=1e-3)


def test_latents_as_tensor_are_the_noise_of_the_first_stage(pipe):
    generator = torch.Generator().manual_seed(3)
    given = sample(pipe, latents=noise(0), generator=generator).images
    drawn = randn_tensor((2, 4, 8, 8), generator=torch.Generator().manual_seed(3))
    assert torch.equal(given, sample(pipe, latents=[noise(0), drawn]).images)


def test_latents_are_not_changed(pipe):
    noises = [noise(0), noise(1)]
    sample(pipe, latents=noises)
    assert torch.equal(noises[0], noise(0)) and torch.equal(noises[1], noise(1))


def test_seed_decides(pipe):
    images = [sample(pipe, generator=torch.Generator().manual_seed(seed)).images for seed in (0, 0, 1)]
    assert torch.equal(images[0], images[1])
    assert not torch.allclose(images[0], images[2], atol=1e-2)


def test_list_of_generators_gives_each_sample_its_own(pipe):
    together = sample(pipe, [1, 3], generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)]).images
    for i, (label, seed) in enumerate([(1, 5), (3, 6)]):
        for generator in (torch.Generator().manual_seed(seed), [torch.Generator().manual_seed(seed)]):
            assert_near(together[i : i + 1], sample(pipe, [label], generator=generator).images)


# --------------------------------------------------------------------------------------------------------- guidance


@pytest.mark.parametrize(
    ("first_stage_scale", "scale", "expected"),
    [
        (1.0, 1.0, [2, 2, 2, 2]),  # a scale of 1 costs one evaluation per sample
        (1.0, 3.0, [2, 2, 4, 4]),
        (3.0, 1.0, [4, 4, 2, 2]),
        (0.0, 0.0, [4, 4, 4, 4]),
    ],
)
def test_evaluations_of_guided_and_unguided_stages(pipe, first_stage_scale, scale, expected):
    calls = record_calls(pipe.transformer)
    sample(pipe, guidance_scale=[first_stage_scale, scale])
    assert batch_sizes(calls) == expected


def test_scales_apply_to_their_own_stages(pipe):
    noises = [noise(0), noise(1)]
    plain = sample(pipe, latents=noises, guidance_scale=1.0, return_stages=True)
    later = sample(pipe, latents=noises, guidance_scale=3.0, return_stages=True)
    first = sample(pipe, latents=noises, guidance_scale=[3.0, 1.0], return_stages=True)
    assert torch.equal(later.stages[0], plain.stages[0])
    assert not torch.allclose(later.stages[1], plain.stages[1], atol=1e-2)
    assert not torch.allclose(first.stages[0], plain.stages[0], atol=1e-2)


def test_priors_and_labels_belong_to_the_conditional_half(pipe):
    calls = record_calls(pipe.transformer)
    sample(pipe, [1, 3], guidance_scale=[3.0, 3.0], num_inference_steps=1)
    first, second = calls
    assert first.prior_embeds is None
    assert second.prior_embeds.shape == (2, 16, 32) and second.hidden_states.shape[0] == 4
    for call in calls:
        assert call.class_labels.tolist() == [1, 3, NULL_CLASS, NULL_CLASS]
        assert torch.equal(call.hidden_states[:2], call.hidden_states[2:])


def test_latent_embedder_runs_once_per_later_stage(pipe):
    calls = record_calls(pipe.latent_embedder)
    stages = sample(pipe, num_stages=3, num_inference_steps=3, return_stages=True).stages
    assert len(calls) == 2
    for call, previous in zip(calls, stages, strict=False):
        assert torch.equal(call.latents, previous)


def test_guidance_scale_is_announced_as_without_effect_on_one_stage(pipe, caplog):
    sample(pipe, num_stages=1, guidance_scale=3.0)
    assert "`guidance_scale` = 3.0 has no effect" in caplog.text
    caplog.clear()
    sample(pipe, num_stages=2, guidance_scale=3.0)
    sample(pipe, num_stages=1)
    assert not caplog.text


@pytest.mark.parametrize("guidance", [Guidance(rescale=0.5), ClassifierFreeGuidance(guidance_scale=4.0)], ids=str)
def test_guidance_is_announced_as_without_effect_where_no_stage_is_guided(pipe, caplog, guidance):
    for kwargs in (dict(num_stages=1), dict(num_stages=1, guidance_scale=[None])):
        caplog.clear()
        output = sample(pipe, guidance=guidance, **kwargs)
        assert not any(stage.num_guided_evaluations.any() for stage in output.statistics)
        assert "as `guidance` has no effect" in caplog.text and "`guidance_scale=[...]`" in caplog.text
    caplog.clear()
    sample(pipe, guidance=guidance)
    sample(pipe, guidance=guidance, num_stages=1, guidance_scale=[4.0])
    for scale in (1.0, [1.0, 1.0]):  # asked for
        sample(pipe, guidance=guidance, guidance_scale=scale)
    sample(pipe, guidance=Guidance(), num_stages=1)  # nothing but defaults
    sample(pipe, guidance=Guidance(prior_scale=2.0), guidance_scale=1.0)  # guides by the prior
    assert not caplog.text


@pytest.mark.parametrize("form", [np.array, torch.tensor, tuple], ids=["array", "tensor", "tuple"])
def test_values_of_the_stages_in_any_form(pipe, form):
    expected = sample(pipe, num_inference_steps=[1, 3], guidance_scale=[2.0, 3.0], return_stages=True)
    output = sample(pipe, num_inference_steps=form([1, 3]), guidance_scale=form([2.0, 3.0]), return_stages=True)
    assert all(torch.equal(*pair) for pair in zip(output.stages, expected.stages, strict=True))


def test_without_latent_embedder_one_stage_is_guided_by_guidance_scale():
    pipe = tiny_pipeline(latent_embedder=None)
    calls = record_calls(pipe.transformer)
    output = sample(pipe, latents=[noise(0)], guidance_scale=3.0, return_stages=True)
    assert batch_sizes(calls) == [4, 4] and len(output.stages) == 1
    assert_near(output.images, sample_by_hand(pipe, [1, 3], [noise(0)], scales=[3.0], num_steps=2)[0])
    assert all(call.prior_embeds is None for call in calls)


# ------------------------------------------------------------------------------------------------------------ image

IMAGE = np.random.default_rng(0).integers(0, 256, (16, 8, 3), dtype=np.uint8)  # not square: H and W differ


def image_forms():
    floats = IMAGE.astype(np.float32) / 255
    tensor = torch.from_numpy(floats).permute(2, 0, 1)
    return {
        "PIL": Image.fromarray(IMAGE),
        "uint8 array": IMAGE,
        "float array": floats,
        "float tensor": tensor,
        "uint8 tensor": torch.from_numpy(IMAGE).permute(2, 0, 1),
        "batch of one": IMAGE[None],
        "batched array": np.stack([floats, floats]),
        "batched tensor": torch.stack([tensor, tensor]),
        "list of PIL": [Image.fromarray(IMAGE)] * 2,
        "list of one": [IMAGE],
        "list of arrays": [IMAGE, IMAGE],
        "list of tensors": [tensor, tensor],
        "RGBA PIL": Image.fromarray(IMAGE).convert("RGBA"),
    }


@pytest.mark.parametrize("form", image_forms())
def test_every_form_of_image_gives_the_same_result(pipe, form):
    kwargs = dict(image=Image.fromarray(IMAGE), latents=noise(1, width=4), width=8)
    expected = sample(pipe, **kwargs).images
    assert expected.shape == (2, 4, 8, 4)
    assert_near(sample(pipe, **{**kwargs, "image": image_forms()[form]}).images, expected)


def test_a_batched_image_raises_no_warning(pipe):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(pipe, image=np.stack([IMAGE, IMAGE]))
        sample(pipe, image=torch.from_numpy(np.stack([IMAGE, IMAGE])).permute(0, 3, 1, 2))


def test_every_image_of_a_list_is_read_by_its_own_dtype(pipe):
    mixed = [IMAGE, IMAGE.astype(np.float32) / 255]
    expected = sample(pipe, image=[IMAGE, IMAGE]).images
    assert_near(sample(pipe, image=mixed).images, expected)


@pytest.mark.parametrize("file_first", [True, False])
def test_images_from_files_and_from_memory_mix(pipe, file_first):
    file = io.BytesIO()
    Image.fromarray(IMAGE).save(file, "PNG")
    images = [Image.open(file), Image.fromarray(IMAGE)]  # a PngImageFile and an Image
    images = images if file_first else images[::-1]
    assert_near(sample(pipe, image=images).images, sample(pipe, image=IMAGE).images)


def test_each_label_has_its_own_image(pipe):
    images = [IMAGE, IMAGE[::-1].copy()]
    noises = noise(1, width=4)
    together = sample(pipe, [1, 3], image=images, latents=noises, width=8).images
    for i, label in enumerate([1, 3]):
        alone = sample(pipe, [label], image=images[i], latents=noises[i : i + 1], width=8).images
        assert_near(together[i : i + 1], alone)


STATISTICS = {
    "mean and std": dict(latents_mean=[0.5, -0.25, 0.0, 0.125], latents_std=[1.0, 2.0, 0.5, 1.5]),
    "scale and shift": dict(latents_mean=None, latents_std=None, scaling_factor=0.4, shift_factor=0.3),
    "scale": dict(latents_mean=None, latents_std=None, scaling_factor=0.4),
}


@pytest.mark.parametrize("statistics", STATISTICS)
def test_image_is_encoded_by_the_mode_and_normalised(statistics):
    pipe = tiny_pipeline(vae=tiny_vae(**STATISTICS[statistics]))
    calls = record_calls(pipe.latent_embedder)
    sample(pipe, image=IMAGE, width=8)
    pixels = torch.from_numpy(IMAGE).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        mode = pipe.vae.encode(pixels).latent_dist.mode()
    if statistics == "mean and std":
        expected = mode.clone()
        for channel, (mean, std) in enumerate(zip([0.5, -0.25, 0.0, 0.125], [1.0, 2.0, 0.5, 1.5], strict=True)):
            expected[:, channel] = (mode[:, channel] - mean) / std
    else:
        expected = (mode - (0.3 if statistics == "scale and shift" else 0.0)) * 0.4
    assert_near(calls[0].latents, expected)  # once for both labels
    assert_near(normalize_latents(mode, pipe.vae), expected)
    assert_near(denormalize_latents(expected, pipe.vae), mode)


def test_image_takes_the_place_of_stage_1(pipe):
    calls = record_calls(pipe.transformer)
    drawn = randn_tensor((2, 4, 8, 4), generator=torch.Generator().manual_seed(3))
    output = sample(
        pipe,
        image=IMAGE,
        width=8,
        num_stages=2,
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(3),
        return_stages=True,
    )
    # One stage of three guided steps from the generator's first noise; stage 1 is counted but not run.
    assert batch_sizes(calls) == [4, 4, 4] and pipe.num_timesteps == 3
    assert all(call.prior_embeds is not None for call in calls)
    assert len(output.stages) == 1 and torch.equal(output.stages[0], output.images)
    again = sample(pipe, image=IMAGE, width=8, num_inference_steps=3, guidance_scale=3.0, latents=[drawn])
    assert torch.equal(again.images, output.images)


def test_image_and_three_stages_run_two(pipe):
    calls = record_calls(pipe.latent_embedder)
    output = sample(
        pipe, image=IMAGE, width=8, num_stages=3, latents=[noise(0, width=4), noise(1, width=4)], return_stages=True
    )
    assert len(output.stages) == 2 and len(calls) == 2 and pipe.num_timesteps == 4
    assert torch.equal(calls[1].latents, output.stages[0])


# --------------------------------------------------------------------------------------------- sizes and pixel space


def test_height_and_width_need_not_be_equal(pipe):
    output = sample(pipe, height=24, width=8, output_type="pt", return_stages=True)
    assert [stage.shape for stage in output.stages] == [(2, 3, 24, 8)] * 2
    assert [image.size for image in sample(pipe, height=24, width=8, output_type="pil").images] == [(8, 24)] * 2
    assert sample(pipe, height=24).images.shape == (2, 4, 12, 8)  # the trained size where none is given


def test_pixel_space_model():
    pipe = tiny_pipeline(vae=None, in_channels=3)
    latents = sample(pipe, return_stages=True)
    assert [stage.shape for stage in latents.stages] == [(2, 3, 8, 8)] * 2
    images = sample(pipe, output_type="pt").images
    assert_near(images, (latents.images / 2 + 0.5).clamp(0, 1))
    assert sample(pipe, output_type="pil").images[0].size == (8, 8)

    calls = record_calls(pipe.latent_embedder)
    image = IMAGE[:6, :8]  # only a multiple of the patch size is asked for here
    assert sample(pipe, image=image, height=6).images.shape == (2, 3, 6, 8)
    expected = torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1
    assert_near(calls[0].latents, expected)


# -------------------------------------------------------------------------------------------------------- callbacks


@pytest.mark.parametrize(
    ("solver", "timesteps"), [("euler", [1000, 500]), ("heun", [1000, 500, 500, 0])], ids=["euler", "heun"]
)
def test_callback_sees_one_step_index_over_all_stages(solver, timesteps):
    pipe = tiny_pipeline(scheduler=DoDFlowMatchScheduler(solver=solver))
    seen = []

    def callback(pipe_, step_index, timestep, kwargs):
        assert pipe_ is pipe and set(kwargs) == {"latents", "prior_embeds", "class_labels"}
        assert kwargs["latents"].shape == (2, 4, 8, 8) and kwargs["class_labels"].tolist() == [1, 3]
        assert pipe.guidance_scale == (1.0 if kwargs["prior_embeds"] is None else 3.0)
        seen.append((step_index, float(timestep), kwargs["prior_embeds"] is not None))

    sample(
        pipe,
        guidance_scale=3.0,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "prior_embeds", "class_labels"],
    )
    per_stage = len(timesteps)
    assert [step_index for step_index, *_ in seen] == list(range(2 * per_stage))
    assert [timestep for _, timestep, *_ in seen] == timesteps * 2
    assert [has_prior for *_, has_prior in seen] == [False] * per_stage + [True] * per_stage
    assert pipe.num_timesteps == 2 * per_stage


def test_callback_gets_only_the_tensors_it_asks_for(pipe):
    seen = []
    sample(pipe, callback_on_step_end=lambda pipe, step, timestep, kwargs: seen.append(set(kwargs)))
    assert seen == [{"latents"}] * 4


def test_callback_replaces_latents(pipe):
    inputs = record_calls(pipe.transformer)
    replacement = noise(9)

    def callback(pipe, step_index, timestep, kwargs):
        return {"latents": replacement} if step_index in (0, 3) else None

    output = sample(pipe, callback_on_step_end=callback)
    assert torch.equal(inputs[1].hidden_states[:2], replacement)  # the next evaluation starts from it
    assert torch.equal(output.images, replacement)  # and after the last step it is the result


def test_callback_replaces_prior_and_labels(pipe):
    calls = record_calls(pipe.transformer)
    prior_embeds = torch.ones(2, 16, 32)

    def callback(pipe, step_index, timestep, kwargs):
        if step_index == 0:
            return {"class_labels": torch.tensor([8, 9])}
        if step_index == 2:
            return {"prior_embeds": prior_embeds}

    sample(pipe, guidance_scale=1.0, callback_on_step_end=callback)
    assert [call.class_labels.tolist() for call in calls] == [[1, 3]] + [[8, 9]] * 3
    assert not torch.equal(calls[2].prior_embeds, prior_embeds) and torch.equal(calls[3].prior_embeds, prior_embeds)


@pytest.mark.parametrize("last_step", [1, 4], ids=["in stage 1", "in stage 2"])
def test_interrupt_returns_the_sample_reached(pipe, last_step):
    seen = []

    def callback(pipe, step_index, timestep, kwargs):
        seen.append(kwargs["latents"])
        pipe._interrupt = step_index == last_step

    output = sample(pipe, num_inference_steps=3, callback_on_step_end=callback, return_stages=True)
    assert len(seen) == last_step + 1
    assert torch.equal(output.images, seen[-1])
    assert len(output.stages) == (1 if last_step < 3 else 2)
    # The next call starts anew.
    torch.testing.assert_close(sample(pipe).images, sample(tiny_pipeline()).images)


def test_a_scale_set_in_a_callback_holds_from_the_next_step_to_the_end_of_the_stage(pipe):
    calls = record_calls(pipe.transformer)

    def callback(pipe, step_index, timestep, kwargs):
        if step_index == 0:
            pipe._guidance_scale = 2.0
        if step_index == 3:
            pipe._guidance_scale = 1.0

    sample(pipe, num_inference_steps=3, guidance_scale=3.0, callback_on_step_end=callback)
    assert pipe.guidance_scale == 1.0
    assert batch_sizes(calls) == [2, 4, 4, 4, 2, 2]


@pytest.mark.parametrize(
    ("result", "exception", "fragments"),
    [
        ({"noise": torch.zeros(1)}, ValueError, ["'latents', 'prior_embeds', 'class_labels'", "got 'noise'"]),
        ([torch.zeros(1)], TypeError, ["dict", "got", "list"]),
        # In the last step nothing after it would notice.
        ({"latents": torch.zeros(1, 4, 8, 8)}, ValueError, ["`latents`", "(2, 4, 8, 8)", "got shape (1, 4, 8, 8)"]),
    ],
    ids=["unknown name", "not a dict", "wrong shape"],
)
def test_result_of_a_callback_is_checked(pipe, result, exception, fragments):
    def callback(pipe, step_index, timestep, kwargs):
        return result if step_index == 3 else None

    with pytest.raises(exception, match=says("`callback_on_step_end`", *fragments)):
        sample(pipe, callback_on_step_end=callback)


@pytest.mark.parametrize("with_image", [False, True])
def test_progress_bar_names_the_stage(pipe, capsys, with_image):
    pipe.set_progress_bar_config(disable=False)
    sample(pipe, num_stages=3, num_inference_steps=3, image=IMAGE if with_image else None)
    stages = re.findall(r"Stage (\d)/3: 100%\S* 3/3", capsys.readouterr().err)
    assert list(dict.fromkeys(stages)) == (["2", "3"] if with_image else ["1", "2", "3"])  # a slow bar is drawn again


# -------------------------------------------------------------------------------------------------- adaptive solver


@pytest.fixture
def adaptive_pipe():
    return tiny_pipeline(scheduler=DoDFlowMatchScheduler(solver="dopri5", rtol=1e-2, atol=1e-2))


def test_adaptive_solver_calls_back_after_accepted_steps(adaptive_pipe):
    pipe, seen = adaptive_pipe, []

    def callback(pipe, step_index, timestep, kwargs):
        assert timestep.shape == ()  # that of the slowest sample
        seen.append((step_index, float(timestep), kwargs["latents"]))

    output = sample(pipe, callback_on_step_end=callback)
    assert pipe.num_timesteps is None
    indices, timesteps, latents = zip(*seen, strict=True)
    assert indices == tuple(range(len(seen)))
    starts = [index for index, timestep in enumerate(timesteps) if timestep == 1000]
    assert len(starts) == 2 and starts[0] == 0 and 1 < starts[1] < len(seen) - 1  # several steps in both stages
    for stage in (timesteps[: starts[1]], timesteps[starts[1] :]):
        assert all(later < earlier for earlier, later in zip(stage, stage[1:], strict=False))
    assert torch.equal(latents[-1], output.images)


def test_adaptive_solver_agrees_with_small_fixed_steps():
    fine = sample(tiny_pipeline(scheduler=DoDFlowMatchScheduler(solver="heun")), num_inference_steps=30).images
    adaptive = sample(tiny_pipeline(scheduler=DoDFlowMatchScheduler(solver="dopri5", rtol=1e-4, atol=1e-4))).images
    coarse = sample(tiny_pipeline(), num_inference_steps=2).images
    assert (adaptive - fine).abs().max() < 0.02 < (coarse - fine).abs().max()


def test_adaptive_solver_refuses_other_latents(adaptive_pipe):
    with pytest.raises(ValueError, match=says("`callback_on_step_end`", "`latents`", "step 1")):
        sample(
            adaptive_pipe,
            callback_on_step_end=lambda pipe, step, timestep, kwargs: {"latents": noise(9)} if step == 1 else {},
        )


def test_adaptive_solver_is_interrupted(adaptive_pipe):
    seen = []

    def callback(pipe, step_index, timestep, kwargs):
        seen.append(kwargs["latents"])
        pipe._interrupt = step_index == 1

    output = sample(adaptive_pipe, callback_on_step_end=callback, return_stages=True)
    assert len(seen) == 2 and len(output.stages) == 1
    assert torch.equal(output.images, seen[-1])


def test_adaptive_solver_announces_that_steps_have_no_effect(adaptive_pipe, caplog):
    given = sample(adaptive_pipe, num_inference_steps=7).images
    assert "`num_inference_steps` = 7 has no effect" in caplog.text
    caplog.clear()
    assert torch.equal(sample(adaptive_pipe).images, given)
    assert not caplog.text


def test_adaptive_solver_has_a_progress_bar(adaptive_pipe, capsys):
    adaptive_pipe.set_progress_bar_config(disable=False)
    sample(adaptive_pipe)
    assert re.findall(r"Stage (\d)/2: 100%\S* 1000/1000", capsys.readouterr().err) == ["1", "2"]


# ------------------------------------------------------------------------------------------------- Diffusers around


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_stock_scheduler_gives_the_same_images(shift):
    stock = FlowMatchEulerDiscreteScheduler(shift=shift)
    noises = [noise(0), noise(1)]
    ours = sample(
        tiny_pipeline(scheduler=DoDFlowMatchScheduler(shift=shift)), latents=noises, num_inference_steps=4
    ).images
    assert_near(sample(tiny_pipeline(scheduler=stock), latents=noises, num_inference_steps=4).images, ours)
    sigmas = torch.linspace(1, 1 / 4, 4)
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    torch.testing.assert_close(stock.sigmas, torch.cat([sigmas, torch.zeros(1)]))


def test_model_sees_its_own_time_whatever_the_scheduler_counts():
    pipe = tiny_pipeline(scheduler=DoDFlowMatchScheduler(num_train_timesteps=100))
    assert_near(sample(pipe).images, sample(tiny_pipeline()).images)


def load(path, **kwargs):
    pipe = DoDPipeline.from_pretrained(path, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def strings_in(value):
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from (key, *strings_in(entry))
    elif isinstance(value, list):
        for entry in value:
            yield from strings_in(entry)
    elif isinstance(value, str):
        yield value


def test_saved_pipeline_is_the_same_pipeline(tmp_path):
    pipe = tiny_pipeline(default_guidance_scale=3.5, default_num_inference_steps=3, default_num_stages=3)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "DoDPipeline"
    assert index["transformer"] == ["diffusers_dod", "DoDTransformer2DModel"]
    assert index["latent_embedder"] == ["diffusers_dod", "LatentEmbeddingModule"]
    assert index["scheduler"] == ["diffusers_dod", "DoDFlowMatchScheduler"]
    assert index["vae"] == ["diffusers", "AutoencoderKL"]

    loaded = load(tmp_path)
    for name in ("default_guidance_scale", "default_num_inference_steps", "default_num_stages", "id2label"):
        assert loaded.config[name] == pipe.config[name]
    assert loaded.config.default_guidance_scale == 3.5
    assert {int(key): name for key, name in loaded.config.id2label.items()} == ID2LABEL
    assert loaded.get_label_ids("Tinca tinca") == [0]
    torch.testing.assert_close(sample(loaded).images, sample(pipe).images)


def test_names_are_compared_in_their_composed_form():
    for spelling in ("B\u00e4r", "Ba\u0308r"):
        pipe = tiny_pipeline(id2label={3: spelling})
        assert pipe.get_label_ids("B\u00e4r") == pipe.get_label_ids("Ba\u0308r") == [3]


def test_generic_loading_gives_a_dod_pipeline(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is DoDPipeline
    torch.testing.assert_close(sample(loaded).images, sample(pipe).images)


def test_saved_files_name_no_folder_of_this_machine(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    tiny_pipeline().save_pretrained(first)
    load(first).save_pretrained(second)  # a loaded pipeline knows where it came from
    for folder in (first, second):
        files = sorted(folder.rglob("*.json"))
        assert len(files) == 5  # the index and the four components
        for file in files:
            assert str(tmp_path) not in file.read_text()
            strings = list(strings_in(json.loads(file.read_text())))
            assert not [entry for entry in strings if os.path.isabs(entry) or entry == "_name_or_path"]
    assert (first / "model_index.json").read_text() == (second / "model_index.json").read_text()


def test_loading_with_a_stock_scheduler(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "ours")
    loaded = load(tmp_path / "ours", scheduler=FlowMatchEulerDiscreteScheduler())
    assert isinstance(loaded.scheduler, FlowMatchEulerDiscreteScheduler)
    assert_near(sample(loaded).images, sample(pipe).images)
    loaded.save_pretrained(tmp_path / "stock")
    assert isinstance(load(tmp_path / "stock").scheduler, FlowMatchEulerDiscreteScheduler)


@pytest.mark.parametrize("missing", ["vae", "latent_embedder"])
def test_saving_without_an_optional_component(tmp_path, missing):
    overrides = dict(vae=None, in_channels=3) if missing == "vae" else dict(latent_embedder=None)
    pipe = tiny_pipeline(**overrides)
    pipe.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert getattr(loaded, missing) is None
    torch.testing.assert_close(sample(loaded).images, sample(pipe).images)


# ----------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("class_labels", "ids"),
    [
        (4, [4]),
        ("goldfish", [1]),
        ("tench", [0]),
        ("Tinca tinca", [0]),
        (["house finch", 9, "robin", 0], [6, 9, 9, 0]),
        (("junco", 2), [7, 2]),
        (torch.tensor([3, 1]), [3, 1]),
        (torch.tensor(5), [5]),
        (torch.tensor([3], dtype=torch.uint8), [3]),
        ([torch.tensor(3), 1], [3, 1]),
        (np.int64(3), [3]),
        ([np.int32(3), np.uint8(4)], [3, 4]),
        (np.array([3, 1]), [3, 1]),
        ([[3], [1]], [3, 1]),
        (torch.tensor([[3], [1]]), [3, 1]),
        ([3, None], [3, 10]),
        (None, [10]),
    ],
    ids=repr,
)
def test_label_forms(pipe, class_labels, ids):
    assert pipe.get_label_ids(class_labels) == ids
    calls = record_calls(pipe.transformer)
    images = pipe(class_labels, num_stages=1, num_inference_steps=1, output_type="latent").images
    assert images.shape[0] == len(ids) and calls[0].class_labels.tolist() == ids


def test_no_label_is_an_image_of_no_class(pipe):
    kwargs = {"num_inference_steps": 1, "output_type": "latent", "seed": 0}
    images = [pipe(**labels, **kwargs).images for labels in ({}, {"class_labels": None}, {"class_labels": [None]})]
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
    assert not torch.equal(images[0], pipe(3, **kwargs).images)


def test_a_name_given_twice_to_one_class_is_not_ambiguous():
    assert tiny_pipeline(id2label={3: "crane, Crane, crane"}).get_label_ids("crane") == [3]


def test_an_unknown_name_is_looked_for_among_the_likely_ones(monkeypatch):
    """Difflib compares a hundred of 21,841 names, as many as ImageNet-21k has."""
    compared, compare = [], difflib.get_close_matches

    def count_and_compare(word, names, **settings):
        compared.append(len(names))
        return compare(word, names, **settings)

    monkeypatch.setattr(difflib, "get_close_matches", count_and_compare)
    letters = np.random.default_rng(0).integers(ord("a"), ord("z") + 1, (21_840, 12), dtype=np.uint8)
    label2ids = {bytes(name).decode(): [index] for index, name in enumerate(letters)} | {"golden retriever": [21_840]}
    with pytest.raises(ValueError, match=says("21841 names", "such as 'golden retriever'", "got 'Golden Retreiver'")):
        to_label_ids("Golden Retreiver", label2ids, 21_841)
    assert compared == [100]


def test_names_need_id2label():
    pipe = tiny_pipeline(id2label=None)
    assert pipe.get_label_ids([9]) == [9]
    with pytest.raises(ValueError, match=says("`class_labels`", "0 names", "got 'goldfish'")):
        pipe("goldfish")


# -------------------------------------------------------------------------------------------------------- bad input

NAN, INF = math.nan, math.inf
SEED = torch.Generator()
FLOW = dict(use_flow_sigmas=True, prediction_type="flow_prediction")


def floats(*shape, low=0.0, high=1.0):
    return np.linspace(low, high, math.prod(shape), dtype=np.float32).reshape(shape)


# Argument, the call's keyword arguments, exception, and what its message must hold beside the argument's name: what is
# accepted and what was received.
BAD_CALLS = [
    ("class_labels", dict(class_labels=[1, 10]), ValueError, "[0, 9]", "got 10 (the null class"),
    ("class_labels", dict(class_labels=11), ValueError, "[0, 9]", "got 11"),
    ("class_labels", dict(class_labels=[-1, 2]), ValueError, "[0, 9]", "got -1"),
    ("class_labels", dict(class_labels=torch.tensor([1, 12])), ValueError, "[0, 9]", "got 12"),
    ("class_labels", dict(class_labels=[]), ValueError, "at least one label", "got []"),
    ("class_labels", dict(class_labels=torch.tensor([], dtype=torch.int64)), ValueError, "at least one", "got []"),
    ("class_labels", dict(class_labels=True), TypeError, "integers or names", "got True"),
    ("class_labels", dict(class_labels=[1, False]), TypeError, "integers or names", "got False"),
    ("class_labels", dict(class_labels=1.5), TypeError, "an int, a str", "got 1.5"),
    ("class_labels", dict(class_labels=[1, 2.0]), TypeError, "integers or names", "got 2.0"),
    ("class_labels", dict(class_labels={1}), TypeError, "an int, a str", "got {1}"),
    (
        "class_labels",
        dict(class_labels="gold fish"),
        ValueError,
        "names in `label2ids`",
        "'goldfish'",
        "got 'gold fish'",
    ),
    ("class_labels", dict(class_labels=[1, "crane"]), ValueError, "[2, 5]", "'crane'"),
    ("class_labels", dict(class_labels=torch.ones(2)), ValueError, "integer", "got torch.float32"),
    ("class_labels", dict(class_labels=torch.tensor([True])), ValueError, "integer", "got torch.bool"),
    ("class_labels", dict(class_labels=torch.tensor([[1, 2]])), ValueError, "vector", "shape (1, 2)"),
    ("class_labels", dict(class_labels=[[1, 2], [3]]), TypeError, "integers or names", "got [1, 2]"),
    ("num_images_per_label", dict(num_images_per_label=0), ValueError, ">= 1", "got 0"),
    ("num_images_per_label", dict(num_images_per_label=1.5), TypeError, "int", "got 1.5"),
    ("use_token_prior", dict(use_token_prior=True), ValueError, "without a `token_prior`"),
    ("token_prior_num_inference_steps", dict(token_prior_num_inference_steps=5), ValueError, "`use_token_prior`", "5"),
    ("token_prior_guidance_scale", dict(token_prior_guidance_scale=2), ValueError, "`use_token_prior`", "got 2"),
    ("token_prior_truncation", dict(token_prior_truncation=0.5), ValueError, "`use_token_prior`", "got 0.5"),
    ("prior_noise", dict(prior_noise=1.5), ValueError, "[0, 1]", "got 1.5"),
    ("prior_noise", dict(prior_noise="a"), TypeError, "float", "got 'a'"),
    ("prior_noise", dict(prior_noise=0.5, num_stages=1), ValueError, "0 with one stage", "got 0.5"),
    ("num_images_per_label", dict(num_images_per_label=10**12), ValueError, "[1, 1000000]", "got 1000000000000"),
    ("num_images_per_prior", dict(num_images_per_prior=10**12), ValueError, "[1, 1000000]", "got 1000000000000"),
    ("num_inference_steps", dict(num_inference_steps=10**9), ValueError, "[1, 1000000]", "got 1000000000"),
    ("height", dict(height=10**6, width=10**6), ValueError, "[1, 65536]", "got 1000000"),
    ("class_labels", dict(class_labels=10**400), ValueError, "[0, 9]", "an integer of 1329 bits"),
    ("class_labels", dict(class_labels=np.array(["goldfish"])), (TypeError, ValueError), "got"),
    ("num_stages", dict(num_stages=0), ValueError, ">= 1", "got 0"),
    ("num_stages", dict(num_stages=-1), ValueError, ">= 1", "got -1"),
    ("num_stages", dict(num_stages=1.5), TypeError, "int", "got 1.5"),
    ("num_stages", dict(num_stages=True), TypeError, "int", "got True"),
    ("num_stages", dict(num_stages="2"), TypeError, "int", "got '2'"),
    ("num_stages", dict(num_stages=1, image=IMAGE), ValueError, ">= 2", "`image`", "got 1"),
    ("num_inference_steps", dict(num_inference_steps=0), ValueError, ">= 1", "got 0"),
    ("num_inference_steps", dict(num_inference_steps=-3), ValueError, ">= 1", "got -3"),
    ("num_inference_steps", dict(num_inference_steps=2.5), TypeError, "int", "got 2.5"),
    ("num_inference_steps", dict(num_inference_steps=True), TypeError, "int", "got True"),
    ("guidance_scale", dict(guidance_scale=NAN), ValueError, "[0, inf)", "got nan"),
    ("guidance_scale", dict(guidance_scale=-0.5), ValueError, "[0, inf)", "got -0.5"),
    ("guidance_scale", dict(guidance_scale=INF), ValueError, "[0, inf)", "got inf"),
    ("guidance_scale", dict(guidance_scale="3"), TypeError, "float", "got '3'"),
    ("guidance_scale", dict(guidance_scale=True), TypeError, "float", "got True"),
    ("height", dict(height=10), ValueError, "multiple of 4", "got 10"),
    ("height", dict(height=0), ValueError, ">= 1", "got 0"),
    ("height", dict(height=-4), ValueError, ">= 1", "got -4"),
    ("height", dict(height=16.0), TypeError, "int", "got 16.0"),
    ("width", dict(width=18), ValueError, "multiple of 4", "got 18"),
    ("width", dict(width=0), ValueError, ">= 1", "got 0"),
    ("width", dict(width=16.0), TypeError, "int", "got 16.0"),
    ("image", dict(image=torch.rand(16, 16, 3)), ValueError, "1 to 4 channels", "got (16, 16, 3)"),
    ("image", dict(image=floats(16, 16, 5)), ValueError, "1 to 4 channels", "got (16, 16, 5)"),
    ("image", dict(image=Image.new("F", (16, 16))), ValueError, "can be read", "floats"),
    ("image", dict(image=Image.new("RGB", (3000, 2))), ValueError, "can be read", "3000 x 2", "aspect ratio"),
    ("image", dict(image=floats(1, 1, 16, 16, 3)), ValueError, "(H, W, C)", "got (1, 1, 16, 16, 3)"),
    ("image", dict(image=np.zeros((0, 16, 3), np.float32)), ValueError, "(H, W, C)", "0"),
    ("image", dict(image=[IMAGE] * 3), ValueError, "1 or 2 images", "got 3"),
    ("image", dict(image=torch.rand(3, 3, 16, 16)), ValueError, "1 or 2 images", "got 3"),
    ("image", dict(image=floats(16, 16, 3, high=255.0)), ValueError, "[0, 1]", "in [0.0, 255.0]"),
    ("image", dict(image=floats(16, 16, 3, low=-1.0)), ValueError, "[0, 1]", "in [-1.0, 1.0]"),
    ("image", dict(image=floats(16, 16, 3, high=NAN)), ValueError, "[0, 1]", "nan"),
    ("image", dict(image=[IMAGE, floats(16, 8, 3, high=2.0)]), ValueError, "[0, 1]", "in [0.0, 2.0]"),
    ("image", dict(image=IMAGE.astype(np.int64)), ValueError, "uint8", "in [0.0, 255.0]"),
    ("image", dict(image=5), TypeError, "str or PathLike or Image", "got 5"),
    ("image", dict(image=[None]), TypeError, "Image", "got None"),
    ("image", dict(image=[]), ValueError, "1 or 2 images", "got 0"),
    ("generator", dict(generator=[SEED] * 3), ValueError, "list of 2", "got a list of 3"),
    ("generator", dict(generator=[]), ValueError, "list of 2", "got a list of 0"),
    ("generator", dict(generator=0), TypeError, "Generator", "got 0"),
    ("generator", dict(generator=[SEED, 0]), TypeError, "Generator", "got 0"),
    ("latents", dict(latents=torch.zeros(2, 4, 8, 4)), ValueError, "(2, 4, 8, 8)", "got (2, 4, 8, 4)"),
    ("latents", dict(latents=torch.zeros(1, 4, 8, 8)), ValueError, "(2, 4, 8, 8)", "got (1, 4, 8, 8)"),
    ("latents", dict(latents=[noise(0), noise(1)[:1]]), ValueError, "(2, 4, 8, 8)", "got (1, 4, 8, 8)"),
    ("latents", dict(latents=noise(0) * NAN), ValueError, "finite", "nan"),
    ("latents", dict(latents=noise(0).long()), TypeError, "floating-point", "got torch.int64"),
    ("latents", dict(latents=[noise(0)]), ValueError, "a list of 2", "got a list of 1"),
    ("latents", dict(latents=[noise(0, width=4)] * 2, image=IMAGE), ValueError, "list of 1", "got a list of 2"),
    ("latents", dict(latents=[]), ValueError, "a list of 2", "got a list of 0"),
    ("latents", dict(latents="noise"), TypeError, "Tensor", "got 'noise'"),
    ("latents", dict(latents=[noise(0), None]), TypeError, "Tensor", "got None"),
    ("seed", dict(seed=-1), ValueError, ">= 0", "got -1"),
    ("seed", dict(seed=1.0), TypeError, "int", "got 1.0"),
    ("seed", dict(seed=True), TypeError, "int", "got True"),
    ("seed", dict(seed=torch.tensor(0)), TypeError, "int", "got tensor(0)"),
    ("seed", dict(seed=2**64, image=IMAGE), ValueError, "2**64", "got 18446744073709551616"),
    ("seed", dict(seed=0, generator=SEED), ValueError, "Only one of `generator` and `seed`", "and 0"),
    ("sample_indices", dict(sample_indices=[0, 1]), ValueError, "None without a `seed`", "got [0, 1]"),
    ("sample_indices", dict(sample_indices=[0, 1], generator=SEED), ValueError, "None without a `seed`", "got [0, 1]"),
    ("sample_indices", dict(seed=0, sample_indices=[0]), ValueError, "2 integers (one per image)", "got 1"),
    (
        "sample_indices",
        dict(seed=0, sample_indices=range(2), num_images_per_label=2),
        ValueError,
        "4 integers (one per image)",
        "got 2",
    ),
    ("sample_indices", dict(seed=0, sample_indices=[0, -1]), ValueError, ">= 0", "got -1"),
    ("sample_indices", dict(seed=0, sample_indices=[0, 1.0]), TypeError, "int", "got 1.0"),
    ("sample_indices", dict(seed=0, sample_indices=[0, None]), TypeError, "int", "got None"),
    ("sample_indices", dict(seed=0, sample_indices=1), TypeError, "list or tuple or range", "got 1"),
    ("sample_indices", dict(seed=0, sample_indices=[0, 2**64], image=IMAGE), ValueError, "2**64", "got 1844674407"),
    *[
        (
            argument,
            {argument: given[argument], other: given[other]},
            ValueError,
            "Only one of `image`, `prior_latents`, `prior_tokens`",
            f"got ['{argument}', '{other}']",
        )
        for given in [dict(image=IMAGE, prior_latents=torch.zeros(1, 4, 8, 4), prior_tokens=torch.zeros(1, 4, 8))]
        for argument, other in [
            ("image", "prior_latents"),
            ("image", "prior_tokens"),
            ("prior_latents", "prior_tokens"),
        ]
    ],
    *[
        ("prior_latents", dict(prior_latents=torch.zeros(shape)), ValueError, accepted, f"got {shape}")
        for shape, accepted in [
            ((3, 4, 8, 8), "(1 or 2, 4, 8, 8)"),
            ((0, 4, 8, 8), "(1 or 2, 4, height, width)"),
            ((2, 3, 8, 8), "(2, 4, 8, 8)"),
            ((2, 4, 8, 7), "(1 or 2, 4, height, width) with sides that are multiples of 2"),
            ((4, 8, 8), "(1 or 2, 4, height, width)"),
            ((), "(1 or 2, 4, height, width)"),
        ]
    ],
    ("prior_latents", dict(prior_latents=noise(0) * NAN), ValueError, "finite", "nan"),
    ("prior_latents", dict(prior_latents=noise(0).long()), TypeError, "floating-point", "got torch.int64"),
    ("prior_latents", dict(prior_latents=noise(0).numpy()), TypeError, "Tensor", "got array"),
    ("num_stages", dict(num_stages=1, prior_latents=noise(0)), ValueError, ">= 2", "`prior_latents`", "got 1"),
    ("height", dict(height=8, prior_latents=noise(0)), ValueError, "`prior_latents`, 16", "got 8"),
    ("width", dict(width=8, prior_latents=noise(0)), ValueError, "`prior_latents`, 16", "got 8"),
    *[
        ("prior_tokens", dict(prior_tokens=torch.zeros(shape)), ValueError, accepted, f"got {shape}")
        for shape, accepted in [
            ((3, 4, 8), "(1 or 2, 4, 8)"),
            ((0, 4, 8), "(1 or 2, 4, 8)"),
            ((1, 5, 8), "(1, 4, 8)"),
            ((2, 4, 7), "(2, 4, 8)"),
            ((4, 8), "(1 or 2, 4, 8)"),
            ((), "(1 or 2, 4, 8)"),
        ]
    ],
    ("prior_tokens", dict(prior_tokens=torch.full((1, 4, 8), INF)), ValueError, "finite", "inf"),
    ("prior_tokens", dict(prior_tokens=[torch.zeros(4, 8)]), TypeError, "Tensor", "of type list"),
    ("num_stages", dict(num_stages=1, prior_tokens=torch.zeros(1, 4, 8)), ValueError, "`prior_tokens`", "got 1"),
    ("num_images_per_prior", dict(num_images_per_prior=0), ValueError, ">= 1", "got 0"),
    ("num_images_per_prior", dict(num_images_per_prior=1.5), TypeError, "int", "got 1.5"),
    ("num_images_per_prior", dict(num_images_per_prior=2, num_stages=1), ValueError, "1 with one stage", "got 2"),
    (
        "latents",
        dict(latents=[noise(0), noise(1)], num_images_per_prior=2),
        ValueError,
        "(4, 4, 8, 8)",
        "got (2, 4, 8, 8)",
    ),
    *[
        (
            name,
            {name: values, **kwargs},
            ValueError,
            f"{number} (one per stage that is run)",
            f"got a list of {length}.",
        )
        for name, value in [("num_inference_steps", 2), ("schedulers", "heun"), ("guidance_scale", 2.0)]
        for kwargs, number in [(dict(), 2), (dict(num_stages=3), 3), (dict(image=IMAGE), 1)]
        for length in (0, number + 1)
        for values in [[value] * length]
    ],
    ("num_inference_steps", dict(num_inference_steps=[2, 0]), ValueError, "of stage 2", ">= 1", "got 0"),
    ("num_inference_steps", dict(num_inference_steps=np.ones(3, int)), ValueError, "list of 2", "got a list of 3"),
    ("guidance_scale", dict(guidance_scale=torch.ones(3)), ValueError, "list of 2", "got a list of 3"),
    ("guidance_scale", dict(guidance_scale=torch.ones(2, 1)), TypeError, "of stage 1", "int or float", "got [1.0]"),
    ("guidance_scale", dict(guidance_scale=[-2], image=IMAGE), ValueError, "of stage 2", "[0, inf)", "got -2"),
    ("guidance_scale", dict(guidance_scale=-2), ValueError, "`guidance_scale` must", "got -2"),
    ("num_inference_steps", dict(num_inference_steps=[2.0, 2]), TypeError, "int", "got 2.0"),
    ("num_inference_steps", dict(num_inference_steps="2"), TypeError, "int", "got '2'"),
    ("schedulers", dict(schedulers=5), TypeError, "SchedulerMixin", "got 5"),
    ("schedulers", dict(schedulers="ralston"), ValueError, "'midpoint'", "got 'ralston'"),
    ("schedulers", dict(schedulers=["euler", "ralston"]), ValueError, "'midpoint'", "got 'ralston'"),
    ("schedulers", dict(schedulers=[None, 5]), TypeError, "of stage 2", "SchedulerMixin", "got 5"),
    ("schedulers", dict(schedulers=[DDIMScheduler(), None]), ValueError, "FlowMatch", "got DDIMScheduler"),
    (
        "schedulers",
        dict(schedulers=[None, UniPCMultistepScheduler(use_flow_sigmas=True)]),
        ValueError,
        "flow_prediction",
        "got",
        "'epsilon'",
    ),
    *[
        ("schedulers", dict(schedulers=[None, scheduler]), ValueError, "got")  # other paths, or another way
        for scheduler in [
            UniPCMultistepScheduler(**FLOW, use_karras_sigmas=True),
            DPMSolverMultistepScheduler(**FLOW, use_karras_sigmas=True),
            UniPCMultistepScheduler(**FLOW, final_sigmas_type="sigma_min"),
            FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
            FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            FlowMatchLCMScheduler(scale_factors=[1, 2]),
        ]
    ],
    ("guidance_scale", dict(guidance_scale=[1.0, -1]), ValueError, "of stage 2", "[0, inf)", "got -1"),
    ("guidance_scale", dict(guidance_scale=[NAN, 1.0]), ValueError, "of stage 1", "[0, inf)", "got nan"),
    ("guidance_scale", dict(guidance_scale=[1.0, "3"]), TypeError, "float", "got '3'"),
    *[
        ("sigmas", dict(sigmas=values), ValueError, "strictly decreasing numbers in (0, 1]", "got")
        for values in [[0.5, 1], [1, 1], [2, 1], [1, 0], [1, NAN], [], 0.5, "all", [[1], [0.5]]]
    ],
    ("sigmas", dict(sigmas=[[1, 0.5], [1, 0.4]]), ValueError, "one list", "the same for all stages", "[1, 0.4]"),
    *[
        (
            "sigmas",
            dict(sigmas=[1.0, 0.5], num_inference_steps=steps),
            ValueError,
            "Only one of `sigmas` and `num_inference_steps`",
            f"got {steps}",
        )
        for steps in (2, [2, None])
    ],
    *[
        ("sigmas", dict(sigmas=[1.0, 0.5], schedulers=[None, solver]), ValueError, "None", name, "got [1.0, 0.5]")
        for solver, name in [("dopri5", "dopri5"), (FlowMatchHeunDiscreteScheduler(), "FlowMatchHeunDiscrete")]
    ],
    (
        "num_inference_steps",
        dict(num_inference_steps=1, schedulers=[None, "euler_maruyama"]),
        ValueError,
        ">= 2",
        "got 1",
    ),
    # What a `Guidance` and a guider may be is asked in tests/test_guidance.py.
    ("guidance", dict(guidance=4.0), TypeError, "`Guidance`", "guiders", "got 4.0"),
    ("guidance", dict(guidance=Guidance(channels=5)), ValueError, "`channels`", "[1, 4]", "got 5"),
    ("output_type", dict(output_type="tensor"), ValueError, "'pil', 'np', 'pt', 'latent'", "got 'tensor'"),
    ("output_type", dict(output_type=None), ValueError, "'pil', 'np', 'pt', 'latent'", "got None"),
    ("attention_kwargs", dict(attention_kwargs=5), TypeError, "dict", "got 5"),
    ("callback_on_step_end", dict(callback_on_step_end=5), TypeError, "call", "got 5"),
    (
        "callback_on_step_end_tensor_inputs",
        dict(callback_on_step_end_tensor_inputs=["latents", "noise"]),
        ValueError,
        "'latents', 'prior_embeds', 'class_labels'",
        "got 'noise'",
    ),
    (
        "callback_on_step_end_tensor_inputs",
        dict(callback_on_step_end_tensor_inputs=5),
        TypeError,
        "list or tuple",
        "got 5",
    ),
]

BAD_COMPONENTS = [
    ("transformer", lambda: dict(transformer=5), TypeError, "DoDTransformer2DModel", "got 5"),
    ("transformer", lambda: dict(transformer=tiny_vae()), TypeError, "DoDTransformer2DModel", "AutoencoderKL"),
    ("scheduler", lambda: dict(scheduler="euler"), TypeError, "SchedulerMixin", "got 'euler'"),
    ("vae", lambda: dict(vae="vae"), TypeError, "got 'vae'"),
    ("token_prior", lambda: dict(token_prior=tiny_vae()), TypeError, "TokenPrior", "AutoencoderKL"),
    (
        "vae",
        lambda: dict(vae=tiny_vae(latent_channels=3, latents_mean=None, latents_std=None)),
        ValueError,
        "4",
        "got 3",
    ),
    ("latent_embedder", lambda: dict(latent_embedder="lem"), TypeError, "VisualPriorMixin", "got 'lem'"),
    (
        "latent_embedder",
        lambda: dict(latent_embedder=tiny_latent_embedder(num_attention_heads=1)),
        ValueError,
        "the width 32",
        "got 16",
    ),
    (
        "latent_embedder",
        lambda: dict(transformer=tiny_transformer(prior_embed_dim=None)),
        ValueError,
        "the width None, the transformer's `prior_embed_dim`",
        "got 32",
    ),
    (
        "latent_embedder",
        lambda: dict(latent_embedder=tiny_latent_embedder(in_channels=3)),
        ValueError,
        "`in_channels`",
        "4",
        "got 3",
    ),
    (
        "latent_embedder",
        lambda: dict(latent_embedder=tiny_latent_embedder(patch_size=1)),
        ValueError,
        "`patch_size`",
        "2",
        "got 1",
    ),
    ("id2label", lambda: dict(id2label=["tench"]), TypeError, "dict", "got ['tench']"),
    ("id2label", lambda: dict(id2label={10: "owl"}), ValueError, "[0, 9]", "got 10: 'owl'"),
    ("id2label", lambda: dict(id2label={-1: "owl"}), ValueError, "[0, 9]", "got -1: 'owl'"),
    ("id2label", lambda: dict(id2label={"9" * 5000: "owl"}), ValueError, "[0, 9]", "...", "'owl'"),
    ("id2label", lambda: dict(id2label={"a": "owl"}), ValueError, "[0, 9]", "got 'a': 'owl'"),
    ("id2label", lambda: dict(id2label={0.5: "owl"}), ValueError, "[0, 9]", "got 0.5: 'owl'"),
    ("id2label", lambda: dict(id2label={True: "owl"}), ValueError, "[0, 9]", "got True: 'owl'"),
    ("id2label", lambda: dict(id2label={0: "owl", "0": "cat"}), ValueError, "each once", "got '0': 'cat'"),
    ("id2label", lambda: dict(id2label={0: "owl, "}), ValueError, "not empty", "got 0: 'owl, '"),
    ("id2label", lambda: dict(id2label={0: 5}), ValueError, "names (str, not empty)", "got 0: 5"),
    ("default_guidance_scale", lambda: dict(default_guidance_scale=NAN), ValueError, "[0, 1000000]", "got nan"),
    ("default_guidance_scale", lambda: dict(default_guidance_scale=-1), ValueError, "[0, 1000000]", "got -1"),
    (
        "default_first_stage_guidance_scale",
        lambda: dict(default_first_stage_guidance_scale=-1),
        ValueError,
        "[0, 1000000]",
        "got -1",
    ),
    ("default_guidance_scale", lambda: dict(default_guidance_scale="5"), TypeError, "float", "got '5'"),
    ("default_num_inference_steps", lambda: dict(default_num_inference_steps=0), ValueError, ">= 1", "got 0"),
    ("default_num_inference_steps", lambda: dict(default_num_inference_steps=2.5), TypeError, "int", "got 2.5"),
    ("default_num_stages", lambda: dict(default_num_stages=0), ValueError, ">= 1", "got 0"),
    ("default_num_stages", lambda: dict(default_num_stages=1.5), TypeError, "int", "got 1.5"),
]


@pytest.fixture(scope="module")
def refusing_pipe():
    """One pipeline for all bad calls, which leave nothing behind, and the names of its models that were evaluated."""
    pipe, evaluated = tiny_pipeline(), []
    models = {
        "transformer": [pipe.transformer],
        "latent_embedder": [pipe.latent_embedder.encoder_blocks[0], pipe.latent_embedder.decoder_blocks[0]],
        "vae": [pipe.vae.encoder, pipe.vae.decoder],
    }
    for name, modules in models.items():
        for module in modules:
            module.register_forward_pre_hook(lambda *_, name=name: evaluated.append(name))
    return pipe, evaluated


@table(BAD_CALLS)
def test_bad_arguments_of_a_call(refusing_pipe, argument, kwargs, exception, fragments):
    pipe, evaluated = refusing_pipe
    evaluated.clear()
    with pytest.raises(exception, match=says(f"`{argument}`", *fragments)):
        pipe(**{"class_labels": [1, 3], "output_type": "latent", **kwargs})
    assert evaluated == []  # found before anything is computed


def test_the_watch_over_bad_calls_sees_every_model(refusing_pipe):
    pipe, evaluated = refusing_pipe
    pipe(1, image=IMAGE, num_inference_steps=1)
    assert set(evaluated) == {"transformer", "latent_embedder", "vae"}


@pytest.mark.parametrize(
    ("argument", "kwargs", "fragments"),
    [
        ("schedulers", dict(schedulers=[None, "heun"]), ["schedulers", "FlowMatchEuler", "got 'heun'"]),
        ("sigmas", dict(sigmas=[0.5, 1.0]), ["strictly decreasing", "(0, 1]", "got [0.5, 1.0]"]),
        ("sigmas", dict(sigmas=[2.0, 1.0]), ["strictly decreasing", "(0, 1]", "got [2.0, 1.0]"]),
        ("sigmas", dict(sigmas=[]), ["strictly decreasing", "(0, 1]", "got []"]),
        ("sigmas", dict(sigmas="all"), ["strictly decreasing", "(0, 1]", "got 'all'"]),
    ],
)
def test_bad_arguments_of_a_call_with_a_stock_scheduler(refusing_pipe, argument, kwargs, fragments):
    pipe, evaluated = refusing_pipe
    evaluated.clear()
    ours, pipe.scheduler = pipe.scheduler, FlowMatchEulerDiscreteScheduler()
    try:
        with pytest.raises(ValueError, match=says(f"`{argument}`", *fragments)):
            pipe([1, 3], output_type="latent", **kwargs)
    finally:
        pipe.scheduler = ours
    assert evaluated == []


@table(BAD_COMPONENTS)
def test_bad_arguments_of_the_constructor(argument, kwargs, exception, fragments):
    kwargs = kwargs()
    with pytest.raises(exception, match=says(f"`{argument}`", *fragments)):
        tiny_pipeline(**kwargs)


@pytest.mark.parametrize(
    ("function", "rows", "flags"),
    [
        (DoDPipeline.__call__, BAD_CALLS, {"return_dict", "return_stages"}),
        (DoDPipeline.__init__, BAD_COMPONENTS, set()),
    ],
    ids=["call", "constructor"],
)
def test_every_argument_has_a_bad_value(function, rows, flags):
    # Flags are taken by their truth, as everywhere in Diffusers.
    assert {row[0] for row in rows} == set(inspect.signature(function).parameters) - {"self"} - flags


def test_num_stages_without_latent_embedder():
    with pytest.raises(ValueError, match=says("`num_stages`", "must be 1 without a `latent_embedder`", "got 2")):
        tiny_pipeline(latent_embedder=None)([1], num_stages=2)


def test_a_pixel_space_model_of_other_channels_takes_numbers_alone():
    pipe = tiny_pipeline(vae=None, in_channels=4)
    image = torch.rand(4, 8, 8)
    assert sample(pipe, image=image).images.shape == (2, 4, 8, 8)
    for other in (Image.new("RGB", (8, 8)), image[:3], image[:, :4]):
        with pytest.raises(ValueError, match=says("`image`", "4 channels and 8 x 8 pixels", "got")):
            pipe([1], image=other)


def test_a_diffusion_scheduler_is_refused_and_flow_ones_are_not():
    pipe = tiny_pipeline()
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match=says("`scheduler`", "FlowMatch", "use_flow_sigmas", "got DDIMScheduler")):
        pipe([1])
    pipe.scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    assert pipe([1], num_inference_steps=2, output_type="pt").images.isfinite().all()


def test_names_lead_to_ids_and_back():
    pipe = tiny_pipeline()
    assert pipe.id2label == {int(key): name for key, name in pipe.config.id2label.items()}
    (tench,) = (key for key, name in pipe.id2label.items() if name == "tench, Tinca tinca")
    assert pipe.get_label_ids(["tench", "Tinca tinca", "tench, Tinca tinca"]) == [tench] * 3


def test_a_stochastic_stock_scheduler_belongs_to_its_seed():
    pipe = tiny_pipeline(scheduler=FlowMatchEulerDiscreteScheduler(stochastic_sampling=True))
    images = [
        pipe([1], num_inference_steps=3, output_type="pt", generator=torch.Generator().manual_seed(seed)).images
        for seed in (0, 0, 1)
    ]
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


def test_one_image_is_encoded_once_for_all_labels():
    pipe = tiny_pipeline()
    sizes = []
    handle = pipe.vae.encoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    many = pipe([1, 1, 3], image=IMAGE, num_inference_steps=1, latents=torch.ones(3, 4, 8, 8), output_type="latent")
    handle.remove()
    assert sizes == [1]
    torch.testing.assert_close(many.images[0], many.images[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("call", "exception", "fragments"),
    [
        (lambda pipe: pipe.encode_image(None), TypeError, ["`pixels`", "Tensor", "got None"]),
        (lambda pipe: pipe.encode_image(torch.zeros(1, 3, 16, 16).byte()), TypeError, ["`pixels`", "uint8"]),
        (lambda pipe: pipe.encode_image(torch.zeros(3, 16, 16)), ValueError, ["(any, 3, any, any)", "(3, 16, 16)"]),
        (lambda pipe: pipe.encode_image(torch.zeros(1, 4, 16, 16)), ValueError, ["(any, 3, any, any)"]),
        (lambda pipe: pipe.encode_image(torch.zeros(1, 3, 16, 15)), ValueError, ["multiples of 2", "15)"]),
        (lambda pipe: pipe.decode_latents([1.0], "pt"), TypeError, ["`latents`", "Tensor", "got [1.0]"]),
        (lambda pipe: pipe.decode_latents(noise(0).long(), "pt"), TypeError, ["`latents`", "int64"]),
        (lambda pipe: pipe.decode_latents(noise(0)[0], "pt"), ValueError, ["(any, 4, any, any)", "(4, 8, 8)"]),
        (lambda pipe: pipe.decode_latents(noise(0)[:, :3], "latent"), ValueError, ["(any, 4, any, any)"]),
        (lambda pipe: pipe.decode_latents(noise(0)[:0], "pt"), ValueError, ["(any, 4, any, any)", "(0, 4, 8, 8)"]),
        (lambda pipe: pipe.decode_latents(noise(0), "jpeg"), ValueError, ["`output_type`", "'pil'", "got 'jpeg'"]),
        (lambda pipe: pipe.decode_latents(noise(0), None), ValueError, ["`output_type`", "got None"]),
        (lambda pipe: pipe.decode_latents(noise(0) * NAN, "latent"), ValueError, ["`latents`", "finite"]),
    ],
)
def test_bad_arguments_of_encoding_and_decoding(refusing_pipe, call, exception, fragments):
    with pytest.raises(exception, match=says(*fragments)):
        call(refusing_pipe[0])


@pytest.mark.parametrize("form", [np.array, torch.tensor, list, tuple], ids=lambda form: form.__name__)
def test_indices_and_intervals_come_in_any_form(pipe, form):
    def draw(indices, interval):
        settings = dict(seed=1, sample_indices=indices, guidance=Guidance(interval=interval))
        return pipe([1, 3], num_inference_steps=3, output_type="latent", **settings).images

    assert torch.equal(draw(form([7, 2]), form([0.25, 0.75])), draw(range(7, 1, -5), (0.25, 0.75)))
    assert len({Guidance(interval=form([0.25, 0.75])), Guidance(interval=(0.25, 0.75))}) == 1


def test_the_latent_embedder_sees_noise_of_each_image(pipe):
    def draw(**arguments):
        settings = dict(num_inference_steps=2, output_type="latent", seed=3, sample_indices=[4, 9])
        return pipe([1, 3], **settings, **arguments).images

    clean = noise(7, batch_size=1)
    drawn = torch.stack([stateless_noise(clean.shape[1:], 3, index, 0, 2, PRIOR_NOISE) for index in (4, 9)])
    expected = draw(prior_latents=0.75 * clean + 0.25 * drawn)
    torch.testing.assert_close(draw(prior_latents=clean, prior_noise=0.25), expected)
    assert not torch.allclose(draw(prior_latents=clean), expected)
    assert not torch.allclose(draw(prior_noise=0.25), draw())  # of a sample of stage 1
    assert torch.equal(draw(prior_noise=0.0), draw())


@pytest.mark.parametrize("index", [np.array(7), torch.tensor(7)], ids=["array", "tensor"])
def test_an_index_without_dimensions(pipe, index):
    def draw(indices):
        settings = dict(num_inference_steps=2, output_type="latent", seed=1, sample_indices=indices)
        return pipe([1], num_stages=1, **settings).images

    assert torch.equal(draw(index), draw([7]))


@pytest.mark.parametrize("values", [np.array([0.5, 1.5]), torch.tensor([0.5, 1.5])])
def test_indices_that_are_no_integers(pipe, values):
    with pytest.raises(TypeError, match=says("`sample_indices`", "int", "got 0.5")):
        pipe([1, 3], seed=0, sample_indices=values)


def test_labels_that_a_callback_puts_are_checked(pipe):
    with pytest.raises(ValueError, match=says("`class_labels`", "[0, 10]", "got [11]")):
        pipe([1, 3], callback_on_step_end=lambda *_: {"class_labels": torch.tensor([0, 11])})
    with pytest.raises(ValueError, match=says("`latents`", "torch.float32", "got torch.int64")):
        pipe([1, 3], callback_on_step_end=lambda *_: {"latents": torch.zeros(2, 4, 8, 8).long()})
