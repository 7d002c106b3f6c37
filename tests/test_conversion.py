import pytest
import torch
from golden_data import golden, golden_model, timestep_of

from diffusers_dod.conversion import fitv2_to_dod, reverse_time


def test_reverse_time_is_exact_and_its_own_inverse():
    torch.manual_seed(0)
    weight = torch.randn(5, 256, dtype=torch.float64)
    frequencies = torch.exp(-torch.log(torch.tensor(10000.0, dtype=torch.float64)) * torch.arange(128) / 128)
    time = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)[:, None]

    def features(t):
        return torch.cat([torch.cos(t * frequencies), torch.sin(t * frequencies)], dim=1)

    torch.testing.assert_close(features(time) @ reverse_time(weight).T, features(1 - time) @ weight.T)
    torch.testing.assert_close(reverse_time(reverse_time(weight)), weight)


def test_every_weight_is_used_once():
    source = golden("fitv2_tiny")
    converted = fitv2_to_dod(source)
    assert sum(t.numel() for t in converted.values()) == sum(t.numel() for t in source.values())
    assert set(converted) == set(golden_model().state_dict())


@torch.no_grad()
def test_with_priors_training_starts_from_exactly_the_fitv2():
    data = golden("fitv2_tiny_io")
    model = golden_model(prior_embed_dim=20)
    arguments = (data["sq8x8.latents"], timestep_of(data["sq8x8.t"]), data["sq8x8.y"])
    expected = golden_model()(*arguments).sample
    torch.testing.assert_close(model(*arguments).sample, expected, atol=1e-6, rtol=0)
    prior = torch.randn(3, 16, 20)
    torch.testing.assert_close(model(*arguments, prior_embeds=prior).sample, expected, atol=1e-5, rtol=0)
    assert model.prior_proj.linear_1.weight.abs().max() > 0  # else the projection could never learn


def test_missing_and_unknown_names_are_refused():
    source = golden("fitv2_tiny")
    with pytest.raises(ValueError, match=r"`state_dict` must hold nothing but a FiTv2 model, got also \['extra'\]"):
        fitv2_to_dod({**source, "extra": torch.zeros(1)})
    del source["blocks.1.attn.qkv.weight"]
    with pytest.raises(ValueError, match=r"`state_dict`.*none named 'blocks.1.attn.qkv.weight'"):
        fitv2_to_dod(source)
    with pytest.raises(ValueError, match=r"`state_dict` must have blocks 0, 1, .*got blocks \[\]"):
        fitv2_to_dod({})
