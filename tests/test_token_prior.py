# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""The generator of latent tokens, and the pipeline with it: `training/test_train_token_prior.py` has its training."""

import json

import pytest
import torch
from helpers import assert_near, normal, says, table, tiny_latent_embedder, tiny_pipeline, tiny_token_prior

from diffusers_dod import DoDPipeline, TokenPrior
from diffusers_dod.seeding import NoiseSource


LABELS = torch.tensor([0, 3, 10])


@pytest.fixture
def pipe() -> DoDPipeline:
    return tiny_pipeline(token_prior=tiny_token_prior())


def draw(pipe: DoDPipeline, class_labels=(1, 2), **kwargs) -> torch.Tensor:
    arguments = {"num_stages": 2, "use_token_prior": True, "seed": 0, "output_type": "latent"}
    return pipe(list(class_labels), **{**arguments, **kwargs}).images


def test_a_new_model_draws_normal_tokens_with_the_statistics_of_images():
    """The MLP gives zero, so the flow is that of a normal distribution, which has a closed form."""
    prior = TokenPrior(2, 4, num_classes=2)
    tokens = normal(500, 2, 4) * torch.linspace(0.5, 3, 8).view(2, 4) + torch.linspace(-5, 5, 8).view(2, 4)
    prior.set_statistics(tokens, torch.arange(500) % 2)
    noise = normal(4, 2, 4, seed=1)
    drawn = prior.generate(torch.tensor([0, 1, 2, 0]), noise, num_inference_steps=400)
    std, mean = torch.std_mean(tokens, dim=0, correction=0)
    assert_near(drawn, mean + std * noise, rtol=0, atol=5e-2)


def test_from_config_keeps_positional_arguments():
    prior = TokenPrior(2, 4, 5, hidden_dim=8)
    again = TokenPrior.from_config(prior.config)
    assert again.token_shape == (2, 4) and again.config.num_classes == 5 and again.config.hidden_dim == 8
    assert prior.config["_use_default_values"] == ["num_layers"]


def test_statistics_are_those_of_the_tokens():
    prior = TokenPrior(2, 4, num_classes=2)
    tokens, labels = normal(50, 2, 4) * 3 + 1, torch.arange(50) % 2
    tokens[:, 0, 0] = 7.0  # the same in all images: it is shifted, not divided by zero
    prior.set_statistics(tokens, labels)
    standardised = (tokens - prior.token_mean) / prior.token_std
    assert_near(standardised.mean(0), torch.zeros(2, 4))
    assert_near(standardised.std(0, correction=0).flatten()[1:], torch.ones(7))
    for label in range(2):
        assert_near(prior.class_means[label], standardised[labels == label].mean(0))
    assert_near(prior.class_means[2], torch.zeros(2, 4))


def test_statistics_need_no_float64_on_the_device():
    class OnDevice(torch.Tensor):
        """A tensor of a device without float64, as MPS is."""

        def double(self):
            raise TypeError("This device has no float64.")

        def cpu(self) -> torch.Tensor:
            return self.as_subclass(torch.Tensor)

    tokens, labels = normal(50, 2, 4), torch.arange(50) % 2
    expected, found = (TokenPrior(2, 4, num_classes=2) for _ in range(2))
    expected.set_statistics(tokens, labels)
    found.set_statistics(tokens.as_subclass(OnDevice), labels.as_subclass(OnDevice))
    assert torch.equal(found.token_mean, expected.token_mean)
    assert torch.equal(found.class_means, expected.class_means)


def test_guidance_extrapolates_from_the_null_class():
    """In one step the tokens are a linear function of the velocity."""
    prior, noise = tiny_token_prior(), normal(3, 4, 8)
    null = torch.full_like(LABELS, 10)
    drawn = {scale: prior.generate(LABELS, noise, 1, guidance_scale=scale) for scale in (0, 1, 3)}
    unguided = prior.generate(null, noise, 1)
    assert_near(drawn[0], unguided, atol=1e-4)
    assert_near(drawn[3], unguided + 3 * (drawn[1] - unguided), atol=1e-4)
    assert not torch.allclose(drawn[1][:2], unguided[:2], atol=1e-2)
    assert_near(drawn[3][2], drawn[1][2], atol=1e-4)  # of the null class


def test_truncation_pulls_tokens_towards_the_mean_of_their_class():
    prior, noise = tiny_token_prior(), normal(3, 4, 8)
    means = prior.token_mean + prior.token_std * prior.class_means[LABELS]
    whole, half, none = (prior.generate(LABELS, noise, 4, truncation=share) for share in (1, 0.5, 0))
    assert_near(none, means)
    assert_near(half, (means + whole) / 2)
    assert not torch.allclose(whole, means, atol=0.1)


def test_a_saved_model_has_its_statistics(tmp_path):
    prior, noise = tiny_token_prior(), normal(3, 4, 8)
    prior.save_pretrained(tmp_path)
    assert torch.equal(TokenPrior.from_pretrained(tmp_path).generate(LABELS, noise), prior.generate(LABELS, noise))


def test_half_precision_keeps_the_range_of_the_flow():
    prior, noise = tiny_token_prior(), normal(3, 4, 8)
    expected = prior.generate(LABELS, noise, 10)
    assert_near(prior.to(torch.bfloat16).generate(LABELS, noise, 10), expected, rtol=0.1, atol=0.3)


@table(
    [
        ("num_latent_tokens", {"num_latent_tokens": 0}, ValueError, ">= 1", "got 0"),
        ("hidden_dim", {"hidden_dim": 1.5}, TypeError, "1.5"),
        ("num_latent_tokens * latent_token_dim", {"num_latent_tokens": 32768}, ValueError, "[1, 32768]"),
    ]
)
def test_a_model_out_of_range_is_refused(argument, kwargs, exception, fragments):
    with pytest.raises(exception, match=says(f"`{argument}`", *fragments)):
        TokenPrior(**kwargs)


@table(
    [
        ("class_labels", {"class_labels": torch.tensor([0, 1, 11])}, ValueError, "[0, 10]", "11"),
        ("noise", {"noise": normal(2, 4, 8)}, ValueError, "(3, 4, 8)", "(2, 4, 8)"),
        ("num_inference_steps", {"num_inference_steps": 0}, ValueError, "got 0"),
        ("guidance_scale", {"guidance_scale": -1}, ValueError, "got -1"),
        ("truncation", {"truncation": 1.1}, ValueError, "[0, 1]", "1.1"),
    ]
)
def test_tokens_that_cannot_be_drawn(argument, kwargs, exception, fragments):
    with pytest.raises(exception, match=says(f"`{argument}`", *fragments)):
        tiny_token_prior().generate(**{"class_labels": LABELS, "noise": normal(3, 4, 8), **kwargs})


@table(
    [
        ("tokens", {"tokens": normal(20, 4, 7)}, ValueError, "(any, 4, 8)", "(20, 4, 7)"),
        ("tokens", {"tokens": normal(20, 4, 8).log()}, ValueError, "finite"),
        ("labels", {"labels": torch.arange(20) % 9}, ValueError, "all 10 classes", "[9]"),
        ("labels", {"labels": torch.arange(20) % 11}, ValueError, "[0, 9]", "10"),
    ]
)
def test_statistics_of_other_tokens_are_refused(argument, kwargs, exception, fragments):
    arguments = {"tokens": normal(20, 4, 8), "labels": torch.arange(20) % 10, **kwargs}
    with pytest.raises(exception, match=says(f"`{argument}`", *fragments)):
        tiny_token_prior().set_statistics(**arguments)


# ----------------------------------------------------------------------------------------------------- the pipeline


def test_its_tokens_take_the_place_of_stage_1(pipe):
    source = NoiseSource(0, 2, 1, generator=None, seed=0, sample_indices=[0, 1])
    noise = source.draw(0, (4, 8), torch.device("cpu"))
    settings = {"num_inference_steps": 5, "guidance_scale": 2.0, "truncation": 0.7}
    tokens = pipe.token_prior.generate(torch.tensor([1, 2]), noise, **settings)
    drawn = draw(pipe, **{f"token_prior_{name}": value for name, value in settings.items()})
    assert torch.equal(drawn, draw(pipe, use_token_prior=False, prior_tokens=tokens))
    assert not torch.allclose(drawn, draw(pipe), atol=1e-3)
    assert not torch.allclose(draw(pipe), draw(pipe, use_token_prior=False), atol=1e-3)


def test_an_image_belongs_to_its_seed_and_index(pipe):
    batch = draw(pipe, (1, 2, 3))
    assert_near(draw(pipe, (3, 1), sample_indices=[2, 0]), batch[[2, 0]])
    assert not torch.allclose(draw(pipe, (1, 2, 3), seed=1), batch, atol=1e-2)
    generators = [torch.Generator().manual_seed(number) for number in range(2)]
    pair = draw(pipe, seed=None, generator=generators)
    assert_near(draw(pipe, [2], seed=None, generator=[torch.Generator().manual_seed(1)]), pair[1:])


def test_each_image_has_tokens_of_its_own(pipe):
    def tokens_of(**kwargs) -> torch.Tensor:
        seen = []

        def keep(pipe, step, timestep, tensors):
            seen.append(tensors["prior_embeds"])

        draw(pipe, **kwargs, callback_on_step_end=keep, callback_on_step_end_tensor_inputs=["prior_embeds"])
        return seen[0]

    priors = tokens_of(num_images_per_label=2)
    assert len(priors) == 4 and not torch.allclose(priors[0], priors[1], atol=1e-3)
    priors = tokens_of(num_images_per_prior=2)
    assert len(priors) == 4 and torch.equal(priors[0], priors[1]) and not torch.allclose(priors[1], priors[2])


def test_later_stages_follow_and_the_null_class_has_tokens(pipe):
    output = pipe([None, "goldfish"], num_stages=3, use_token_prior=True, seed=0, return_stages=True)
    assert len(output.stages) == 2 and len(output.images) == 2


def test_a_saved_pipeline_has_it(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = DoDPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(draw(loaded), draw(pipe))
    assert DoDPipeline.from_pretrained(tmp_path, token_prior=None).token_prior is None
    assert DoDPipeline.from_pipe(pipe).token_prior is pipe.token_prior


def test_a_pipeline_without_it_is_saved_as_ever(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    assert "token_prior" not in json.loads((tmp_path / "model_index.json").read_text())
    assert pipe.config["token_prior"] == (None, None) and pipe.components["token_prior"] is None
    assert DoDPipeline.from_pretrained(tmp_path).token_prior is None


def test_tokens_that_are_not_finite_are_an_error(pipe):
    with torch.no_grad():
        pipe.token_prior.token_mean[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=says("Latent tokens of the token prior", "index 0, 1")):
        draw(pipe)


@table(
    [
        ("num_stages", {"num_stages": 1}, ValueError, "`use_token_prior`", "got 1"),
        ("prior_tokens", {"prior_tokens": normal(2, 4, 8)}, ValueError, "`use_token_prior`"),
        ("prior_latents", {"prior_latents": normal(2, 4, 8, 8)}, ValueError, "`use_token_prior`"),
        ("image", {"image": torch.zeros(3, 16, 16)}, ValueError, "`use_token_prior`"),
        ("prior_noise", {"prior_noise": 0.5}, ValueError, "`use_token_prior`"),
        ("token_prior_num_inference_steps", {"token_prior_num_inference_steps": 0}, ValueError, "got 0"),
        ("token_prior_guidance_scale", {"token_prior_guidance_scale": -1.0}, ValueError, "-1.0"),
        ("token_prior_truncation", {"token_prior_truncation": 2}, ValueError, "[0, 1]", "got 2"),
        (
            "token_prior_truncation",
            {"use_token_prior": False, "token_prior_truncation": 0.5},
            ValueError,
            "without `use_token_prior`",
        ),
    ]
)
def test_calls_that_do_not_fit(pipe, argument, kwargs, exception, fragments):
    with pytest.raises(exception, match=says(f"`{argument}`", *fragments)):
        draw(pipe, **kwargs)


def test_a_call_without_the_components_is_refused():
    with pytest.raises(ValueError, match=says("`use_token_prior` must be False without a `token_prior`")):
        draw(tiny_pipeline())
    pipe = tiny_pipeline(token_prior=tiny_token_prior())
    pipe.register_modules(latent_embedder=None)
    with pytest.raises(ValueError, match=says("without a `latent_embedder`")):
        draw(pipe)


def test_components_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=says("`token_prior`", "`num_classes` = 10", "got 9")):
        tiny_pipeline(token_prior=tiny_token_prior(num_classes=9))
    with pytest.raises(ValueError, match=says("`token_prior`", "(4, 8)", "got (4, 4)")):
        tiny_pipeline(token_prior=tiny_token_prior(latent_token_dim=4))
    with pytest.raises(TypeError, match=says("`token_prior` must be of type TokenPrior")):
        tiny_pipeline(token_prior=tiny_latent_embedder())
