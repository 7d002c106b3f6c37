import math

import pytest
import torch
from helpers import says

from diffusers_dod import LatentEmbeddingModule
from diffusers_dod.latent_embedding import sincos_pos_embed


@pytest.fixture(scope="module")
def embedder() -> LatentEmbeddingModule:
    torch.manual_seed(0)
    module = LatentEmbeddingModule(
        sample_size=8,
        num_latent_tokens=5,
        latent_token_dim=8,
        num_encoder_layers=2,
        num_decoder_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
    )
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module.eval().requires_grad_(False)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 12), (12, 6)])
def test_shapes(embedder, height, width):
    latents = torch.randn(3, 4, height, width)
    tokens = embedder.encode(latents)
    priors = embedder.decode(tokens, height, width)
    assert tokens.shape == (3, 5, 8)
    assert priors.shape == (3, height * width // 4, 32)
    output = embedder(latents)
    assert torch.equal(output.latent_tokens, tokens) and torch.equal(output.prior_embeds, priors)
    as_tuple = embedder(latents, return_dict=False)
    assert torch.equal(as_tuple[0], priors) and torch.equal(as_tuple[1], tokens)


def test_positions_are_sine_cosine_with_the_column_first():
    embedding = sincos_pos_embed(8, rows=3, columns=4, device=torch.device("cpu"), dtype=torch.float32)
    assert embedding.shape == (12, 8)
    row, column = 2, 3
    expected = [
        f(position * 10000 ** (-k / 2)) for position in (column, row) for f in (math.sin, math.cos) for k in range(2)
    ]
    torch.testing.assert_close(embedding[row * 4 + column], torch.tensor(expected))


def test_equations_6_and_7(embedder):
    """The encoder sees [patches + PE, queries] and keeps the queries; the decoder sees [mask + PE, tokens]."""
    seen = {}
    handles = [
        blocks[0].register_forward_pre_hook(lambda module, args, name=name: seen.update({name: args[0]}))
        for name, blocks in (("encoder", embedder.encoder_blocks), ("decoder", embedder.decoder_blocks))
    ]
    latents = torch.randn(2, 4, 8, 8)
    tokens = embedder.encode(latents)
    embedder.decode(tokens, 8, 8)
    for handle in handles:
        handle.remove()
    assert torch.equal(seen["encoder"][:, 16:], embedder.latent_queries.expand(2, -1, -1))  # no PE on the queries
    patch = latents[0, :, 2:4, 4:6].flatten()  # row 1, column 2
    position = sincos_pos_embed(32, 4, 4, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(seen["encoder"][0, 6], embedder.x_embedder(patch) + position[6])
    torch.testing.assert_close(seen["decoder"][:, 16:], embedder.from_latent(tokens))  # nor on the tokens
    mask = embedder.mask_token + sincos_pos_embed(8, 4, 4, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(seen["decoder"][0, :16], embedder.from_latent(mask))


def test_the_prior_passes_through_the_tokens_only(embedder):
    """Two images with the same code have the same prior, whatever else differs."""
    tokens = torch.randn(1, 5, 8)
    assert torch.equal(embedder.decode(tokens, 8, 8), embedder.decode(tokens.clone(), 8, 8))
    different = embedder.decode(tokens + 0.1, 8, 8)
    assert (embedder.decode(tokens, 8, 8) - different).abs().max() > 1e-3


def test_a_batch_equals_its_samples(embedder):
    latents = torch.randn(3, 4, 8, 8)
    batch = embedder(latents).prior_embeds
    for i in range(3):
        torch.testing.assert_close(embedder(latents[i : i + 1]).prior_embeds, batch[i : i + 1], atol=1e-5, rtol=0)


def test_every_parameter_learns_with_and_without_checkpointing():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        module = LatentEmbeddingModule(
            sample_size=8, num_encoder_layers=1, num_decoder_layers=1, num_attention_heads=2, attention_head_dim=8
        )
        if checkpointing:
            module.enable_gradient_checkpointing()
        module(
            torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        ).prior_embeds.square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in module.named_parameters()})
    for name, gradient in gradients[0].items():
        # A bias shared by all keys cannot change a softmax.
        assert gradient.abs().max() > 0 or name.endswith("to_k.bias"), name
        torch.testing.assert_close(gradients[1][name], gradient)


def test_save_and_load(embedder, tmp_path):
    embedder.save_pretrained(tmp_path)
    loaded = LatentEmbeddingModule.from_pretrained(tmp_path)
    latents = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(loaded(latents).prior_embeds, embedder(latents).prior_embeds)


@pytest.mark.parametrize(
    ("call", "fragments"),
    [
        (lambda embedder: embedder.decode(None, 8, 8), ["`latent_tokens`", "Tensor", "got None"]),
        (lambda embedder: embedder.decode(torch.zeros(1, 5, 8).long(), 8, 8), ["`latent_tokens`", "floating-point"]),
        (lambda embedder: embedder.decode(torch.zeros(1, 5, 8), "8", 8), ["`height`", "int", "got '8'"]),
        (lambda embedder: embedder.encode([1.0]), ["`latents`", "Tensor", "got [1.0]"]),
        (lambda embedder: embedder.encode(torch.zeros(1, 4, 8, 8).long()), ["`latents`", "floating-point"]),
    ],
)
def test_arguments_of_other_types(embedder, call, fragments):
    with pytest.raises(TypeError, match=says(*fragments)):
        call(embedder)
