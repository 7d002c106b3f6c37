"""Bad arguments of the two models: each message names the argument, what is accepted and what was received."""

import inspect
import math

import numpy as np
import pytest
import torch
from helpers import says, table, tiny_latent_embedder, tiny_pipeline, tiny_transformer

from diffusers_dod import DoDFlowMatchScheduler, DoDTransformer2DModel, LatentEmbeddingModule


NAN, INF = math.nan, math.inf

BAD_COUNTS = [
    (0, ValueError, ">= 1", "got 0"),
    (-4, ValueError, ">= 1", "got -4"),
    (8.0, TypeError, "int", "got 8.0"),
    (True, TypeError, "int", "got True"),
    ("8", TypeError, "int", "got '8'"),
]
# A ratio that is too small leaves the MLP no width.
BAD_RATIOS = [
    (0, ValueError, "got 0"),
    (-1.0, ValueError, "got -1.0"),
    (NAN, ValueError, "got nan"),
    (INF, ValueError, "got inf"),
    (1e-3, ValueError, "got 0.001"),
    ("4", TypeError, "float", "got '4'"),
    (True, TypeError, "float", "got True"),
]
BAD_NUMBERS = {
    tiny_transformer: {
        "sample_size": BAD_COUNTS,
        "patch_size": BAD_COUNTS,
        "in_channels": BAD_COUNTS,
        "num_layers": BAD_COUNTS,
        "num_attention_heads": BAD_COUNTS,
        "attention_head_dim": BAD_COUNTS,
        "num_classes": BAD_COUNTS,
        "adaln_lora_dim": BAD_COUNTS,
        "prior_embed_dim": BAD_COUNTS,
        "mlp_ratio": BAD_RATIOS,
    },
    tiny_latent_embedder: {
        "sample_size": BAD_COUNTS,
        "patch_size": BAD_COUNTS,
        "in_channels": BAD_COUNTS,
        "num_latent_tokens": BAD_COUNTS,
        "latent_token_dim": BAD_COUNTS,
        "num_encoder_layers": BAD_COUNTS,
        "num_decoder_layers": BAD_COUNTS,
        "num_attention_heads": BAD_COUNTS,
        "attention_head_dim": BAD_COUNTS,
        "mlp_ratio": BAD_RATIOS,
    },
}
BAD_OF_BOTH = [
    ("pos_interpolation", dict(pos_interpolation="cubic"), ValueError, "'ntk'", "got 'cubic'"),
    ("pos_interpolation", dict(pos_interpolation=None), ValueError, "'none'", "got None"),
    ("pos_interpolation_decoupled", dict(pos_interpolation_decoupled=1), TypeError, "bool", "got 1"),
    ("sample_size", dict(sample_size=9), ValueError, "multiple of `patch_size` = 2", "got 9"),
]
BAD_TRANSFORMERS = [
    *BAD_OF_BOTH,
    ("attention_head_dim", dict(attention_head_dim=18), ValueError, "multiple of 4", "got 18"),
]
BAD_LATENT_EMBEDDERS = [
    *BAD_OF_BOTH,
    ("latent_token_dim", dict(latent_token_dim=6), ValueError, "multiple of 4", "got 6"),
    ("attention_head_dim", dict(attention_head_dim=15), ValueError, "multiple of 4", "got 2 * 15"),
    ("num_attention_heads", dict(num_attention_heads=3, attention_head_dim=2), ValueError, "of 4", "got 3 * 2"),
]


def latents(batch_size=2, channels=4, height=8, width=8):
    return torch.zeros(batch_size, channels, height, width)


def priors(batch_size=2, tokens=16, width=32):
    return torch.zeros(batch_size, tokens, width)


BAD_LATENTS = [
    (latents()[0], "(batch, 4, height, width)", "got (4, 8, 8)"),
    (latents(channels=3), "(batch, 4, height, width)", "got (2, 3, 8, 8)"),
    (latents(height=7), "multiples of `patch_size` = 2", "got 7 x 8"),
    (latents(width=5), "multiples of `patch_size` = 2", "got 8 x 5"),
    (latents(height=0), "positive multiples", "got 0 x 8"),
]
BAD_FORWARDS = [
    *[("hidden_states", dict(hidden_states=value), ValueError, *expected) for value, *expected in BAD_LATENTS],
    ("timestep", dict(timestep=torch.zeros(3)), ValueError, "(2,)", "got (3,)"),
    ("timestep", dict(timestep=torch.zeros(2, 1)), ValueError, "(2,)", "got (2, 1)"),
    ("hidden_states", dict(hidden_states=[1.0]), TypeError, "Tensor", "got [1.0]"),
    ("class_labels", dict(class_labels=[1, 2]), TypeError, "Tensor", "got [1, 2]"),
    ("class_labels", dict(class_labels=torch.tensor([1.0, 2.0])), TypeError, "integers", "got torch.float32"),
    ("class_labels", dict(class_labels=torch.tensor(1)), ValueError, "(2,)", "got ()"),
    ("class_labels", dict(class_labels=torch.tensor([1])), ValueError, "(2,)", "got (1,)"),
    ("class_labels", dict(class_labels=torch.tensor([[1], [2]])), ValueError, "(2,)", "got (2, 1)"),
    ("prior_embeds", dict(prior_embeds=priors()[0]), ValueError, "(K, 16, 32)", "0 <= K <= 2", "got (16, 32)"),
    ("prior_embeds", dict(prior_embeds=priors(3)), ValueError, "(K, 16, 32)", "0 <= K <= 2", "got (3, 16, 32)"),
    ("prior_embeds", dict(prior_embeds=priors(2, 15)), ValueError, "(K, 16, 32)", "got (2, 15, 32)"),
    # One token would broadcast over all.
    ("prior_embeds", dict(prior_embeds=priors(2, 1)), ValueError, "(K, 16, 32)", "got (2, 1, 32)"),
    ("prior_embeds", dict(prior_embeds=priors(2, 16, 31)), ValueError, "(K, 16, 32)", "got (2, 16, 31)"),
]
BAD_DECODES = [
    ("latent_tokens", dict(latent_tokens=torch.zeros(4, 8)), ValueError, "(batch, 4, 8)", "got (4, 8)"),
    ("latent_tokens", dict(latent_tokens=torch.zeros(2, 5, 8)), ValueError, "(batch, 4, 8)", "got (2, 5, 8)"),
    ("latent_tokens", dict(latent_tokens=torch.zeros(2, 4, 7)), ValueError, "(batch, 4, 8)", "got (2, 4, 7)"),
    ("height", dict(height=0), ValueError, ">= 1", "got 0"),
    ("height", dict(height=7), ValueError, "multiple of `patch_size` = 2", "got 7"),
    ("height", dict(height=8.0), TypeError, "int", "got 8.0"),
    ("width", dict(width=-2), ValueError, ">= 1", "got -2"),
    ("width", dict(width=3), ValueError, "multiple of `patch_size` = 2", "got 3"),
    ("width", dict(width=None), TypeError, "int", "got None"),
]


@pytest.fixture(scope="module")
def transformer():
    return tiny_transformer()


@pytest.fixture(scope="module")
def latent_embedder():
    return tiny_latent_embedder()


@pytest.mark.parametrize(("make", "argument"), [(make, name) for make, rows in BAD_NUMBERS.items() for name in rows])
def test_bad_numbers(make, argument):
    for value, exception, *fragments in BAD_NUMBERS[make][argument]:
        with pytest.raises(exception, match=says(f"`{argument}`", *fragments)):
            make(**{argument: value})


@table(BAD_TRANSFORMERS)
def test_bad_arguments_of_the_transformer(argument, kwargs, exception, fragments):
    with pytest.raises(exception, match=says(f"`{argument}`", *fragments)):
        tiny_transformer(**kwargs)


@table(BAD_LATENT_EMBEDDERS)
def test_bad_arguments_of_the_latent_embedder(argument, kwargs, exception, fragments):
    with pytest.raises(exception, match=says(f"`{argument}`", *fragments)):
        tiny_latent_embedder(**kwargs)


@table(BAD_FORWARDS)
def test_bad_inputs_of_the_transformer(transformer, argument, kwargs, exception, fragments):
    inputs = dict(hidden_states=latents(), timestep=500.0, class_labels=torch.tensor([1, 2])) | kwargs
    with pytest.raises(exception, match=says(f"`{argument}`", *fragments)):
        transformer(**inputs)


def test_a_plain_transformer_refuses_priors():
    transformer = tiny_transformer(prior_embed_dim=None)
    with pytest.raises(ValueError, match=says("`prior_embeds`", "must be None", "got a tensor of shape (2, 16, 32)")):
        transformer(latents(), 500.0, torch.tensor([1, 2]), prior_embeds=priors())


@pytest.mark.parametrize(("value", "fragments"), [(value, fragments) for value, *fragments in BAD_LATENTS])
@pytest.mark.parametrize("method", ["encode", "forward"])
def test_bad_inputs_of_the_latent_embedder(latent_embedder, method, value, fragments):
    with pytest.raises(ValueError, match=says("`latents`", *fragments)):
        getattr(latent_embedder, method)(value)


@table(BAD_DECODES)
def test_bad_inputs_of_decode(latent_embedder, argument, kwargs, exception, fragments):
    inputs = dict(latent_tokens=torch.zeros(2, 4, 8), height=8, width=8) | kwargs
    with pytest.raises(exception, match=says(f"`{argument}`", *fragments)):
        latent_embedder.decode(**inputs)


@pytest.mark.parametrize(
    ("function", "rows", "numbers"),
    [
        (DoDTransformer2DModel.__init__, BAD_TRANSFORMERS, BAD_NUMBERS[tiny_transformer]),
        (LatentEmbeddingModule.__init__, BAD_LATENT_EMBEDDERS, BAD_NUMBERS[tiny_latent_embedder]),
        (DoDTransformer2DModel.forward, BAD_FORWARDS, {}),
        (LatentEmbeddingModule.decode, BAD_DECODES, {}),
    ],
    ids=["transformer", "latent embedder", "forward", "decode"],
)
def test_every_argument_has_a_bad_value(function, rows, numbers):
    # Two are taken by their truth, as everywhere in Diffusers; `attention_kwargs` goes to the processors.
    exempt = {"self", "return_dict", "output_hidden_states", "attention_kwargs"}
    assert {row[0] for row in rows} | set(numbers) == set(inspect.signature(function).parameters) - exempt


def test_the_smallest_accepted_values():
    transformer = tiny_transformer(
        sample_size=1,
        patch_size=1,
        in_channels=1,
        num_layers=1,
        num_attention_heads=1,
        attention_head_dim=4,
        num_classes=1,
        adaln_lora_dim=1,
        prior_embed_dim=1,
        mlp_ratio=0.5,
    )
    sample = transformer(latents(1, 1, 1, 1), 0, torch.tensor([1]), prior_embeds=priors(1, 1, 1)).sample
    assert sample.shape == (1, 1, 1, 1) and sample.isfinite().all()
    latent_embedder = tiny_latent_embedder(
        sample_size=1,
        patch_size=1,
        in_channels=1,
        num_latent_tokens=1,
        latent_token_dim=4,
        num_attention_heads=1,
        attention_head_dim=4,
        mlp_ratio=0.25,
    )
    assert latent_embedder(latents(1, 1, 1, 1)).prior_embeds.shape == (1, 1, 4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny_transformer(num_layers=np.int64(1), num_classes=np.int32(5), mlp_ratio=np.float32(3.0)),
        lambda: tiny_latent_embedder(num_latent_tokens=np.int64(4), mlp_ratio=np.float64(3.0)),
        lambda: DoDFlowMatchScheduler(shift=np.float32(2.0), num_train_timesteps=np.int64(100)),
        lambda: tiny_pipeline(default_num_stages=np.int64(2), default_guidance_scale=np.float32(1.5)),
    ],
    ids=["transformer", "latent embedder", "scheduler", "pipeline"],
)
def test_numbers_of_numpy_can_be_saved(make, tmp_path):
    made = make()
    assert not any(isinstance(value, np.generic) for value in made.config.values())
    made.save_pretrained(tmp_path)
    loaded = type(made).from_pretrained(tmp_path)
    chosen = [name for name, value in made.config.items() if isinstance(value, (int, float))]
    assert {name: loaded.config[name] for name in chosen} == {name: made.config[name] for name in chosen}
