"""Samples that are no numbers end a call by name; calls of several threads take turns."""

import math
import threading
from functools import partial

import pytest
import torch
from helpers import noise, says, tiny_pipeline, tiny_vae

from diffusers_dod import DoDPipeline
from diffusers_dod.stages import LARGEST, check_samples, find_sound


NAN = math.nan


def poison(parameter: torch.nn.Parameter, value: float = NAN) -> None:
    with torch.no_grad():
        parameter.fill_(value)


def replace_a_sample(step: int, value: float, pipe, index: int, timestep, tensors: dict) -> dict:
    """A callback that puts a number into the second sample after one of the steps."""
    if index == step:
        tensors["latents"][1, 0, 0, 0] = value
    return tensors


OUTPUT_TYPES = ["pil", "np", "pt", "latent"]
every_output = pytest.mark.parametrize("output_type", OUTPUT_TYPES)


@every_output
@pytest.mark.parametrize(
    ("break_it", "where"),
    [
        (lambda pipe: poison(pipe.transformer.proj_out.bias), "stage 1 .* from step 1 of 2 on"),
        (lambda pipe: poison(pipe.transformer.proj_out.bias, math.inf), "stage 1 .* from step 1 of 2 on"),
        (lambda pipe: poison(pipe.latent_embedder.proj_out.bias), "stage 2 .* from step 1 of 2 on"),
    ],
    ids=["NaN", "infinity", "NaN in the prior"],
)
def test_weights_that_are_no_numbers(pipe, break_it, where, output_type):
    break_it(pipe)
    with pytest.raises(FloatingPointError, match=f"Samples of {where} in 2 of 2 samples, of index 0, 1"):
        pipe([1, 3], output_type=output_type, seed=0)


@every_output
@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf, 1e37])
def test_a_callback_that_breaks_one_sample(pipe, value, output_type):
    kwargs = dict(num_inference_steps=3, seed=0, sample_indices=[7, 40], output_type=output_type)
    callback = partial(replace_a_sample, 4, value)
    with pytest.raises(FloatingPointError, match="stage 2 .* from step 2 of 3 on in 1 of 2 samples, of index 40:"):
        pipe([1, 3], callback_on_step_end=callback, **kwargs)


@every_output
def test_a_scale_that_no_number_holds(pipe, output_type):
    with pytest.raises(FloatingPointError, match="stage 2"):
        pipe([1, 3], guidance_scale=1e30, output_type=output_type)


def test_the_range_of_half_precision(pipe):
    pipe.transformer.half()
    with torch.no_grad():
        pipe.transformer.proj_out.weight.mul_(6e4)
    with pytest.raises(FloatingPointError, match="stage 1"):
        pipe([1, 3], output_type="np")


@every_output
@pytest.mark.parametrize("argument", ["latents", "prior_latents"])
def test_given_latents_that_no_image_has(pipe, argument, output_type):
    with pytest.raises(ValueError, match=says(f"`{argument}`", f"at most {LARGEST}", "1e+37")):
        pipe([1, 3], output_type=output_type, **{argument: noise(0).fill_(1e37)})


@pytest.mark.parametrize("output_type", OUTPUT_TYPES[:3])
def test_a_decoder_that_gives_no_numbers(pipe, output_type):
    poison(pipe.vae.decoder.conv_out.bias)
    assert pipe([1, 3], output_type="latent").images.isfinite().all()
    with pytest.raises(FloatingPointError, match="Decoded images of stage 2 .* in 2 of 2 samples, of index 5, 6:"):
        pipe([1, 3], output_type=output_type, seed=0, sample_indices=[5, 6])
    with pytest.raises(FloatingPointError, match="Decoded images"):
        pipe.decode_latents(noise(0), output_type)


def test_an_encoder_that_gives_no_numbers():
    vae = tiny_vae()
    poison(vae.quant_conv.bias)
    with pytest.raises(FloatingPointError, match="Latents of images"):
        tiny_pipeline(vae=vae)([1, 3], image=torch.zeros(3, 16, 16))


def test_an_adaptive_solver_names_stage_and_sample(pipe):
    pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, solver="dopri5", rtol=0.1, atol=0.1)
    poison(pipe.latent_embedder.proj_out.bias)
    with pytest.raises(FloatingPointError, match="Velocities of stage 2 .* 2 of 2 samples, of index 7, 9:"):
        pipe([1, 3], seed=0, sample_indices=[7, 9], output_type="latent")


def test_samples_of_one_image_share_its_index():
    are_sound = torch.tensor([[True] * 4, [True, True, False, True]])
    check_samples("Samples", are_sound[0], [3, 8])
    with pytest.raises(FloatingPointError, match="from step 2 of 2 on in 1 of 4 samples, of index 8:"):
        check_samples("Samples", are_sound, [3, 8])


def test_what_is_sound():
    samples = torch.tensor([[0.0, LARGEST], [0.0, -1e5], [NAN, 0.0], [0.0, math.inf]])
    assert find_sound(samples).tolist() == [True, False, False, False]
    assert find_sound(samples.half()).tolist() == [True, False, False, False]


# ------------------------------------------------------------------------------------------------------------- threads


@pytest.mark.parametrize(
    "share", [lambda pipe: pipe, DoDPipeline.from_pipe], ids=["one pipeline", "shared components"]
)
def test_calls_of_several_threads_take_turns(pipe, share):
    scales = [1.5, 2.0, 3.0, 4.0]
    settings = dict(num_inference_steps=3, output_type="pt")
    alone = [pipe([1, 3], guidance_scale=scale, seed=i, **settings).images for i, scale in enumerate(scales)]
    pipes = [pipe, *(share(pipe) for _ in scales[1:])]
    start = threading.Barrier(len(scales))
    steps, images, errors = [], [None] * len(scales), []

    def call(i: int) -> None:
        pipes[i].set_progress_bar_config(disable=True)
        start.wait()
        try:
            images[i] = pipes[i](
                [1, 3],
                guidance_scale=scales[i],
                seed=i,
                callback_on_step_end=lambda *_: steps.append(i) or {},
                **settings,
            ).images
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(scales))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert all(torch.equal(together, image) for together, image in zip(images, alone, strict=True))
    turns = steps[::6]
    assert steps == [i for i in turns for _ in range(6)] and sorted(turns) == list(range(len(scales)))


def test_a_callback_may_call_its_own_pipeline_again(pipe):
    def call_again(pipe, index, timestep, tensors):
        return {} if index else pipe.get_prior_tokens(latents=tensors["latents"]) is None or {}

    assert pipe([1, 3], callback_on_step_end=call_again, output_type="pt").images.isfinite().all()
