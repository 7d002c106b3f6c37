"""The joint objective against a computation by hand, and its gradients where a batch does not use every parameter."""

import pytest
import torch
from helpers import tiny_latent_embedder, tiny_transformer

from diffusers_dod.losses import DoDJointModel


BATCH_SIZE = 3


def joint_model() -> DoDJointModel:
    return DoDJointModel(tiny_transformer(), tiny_latent_embedder())


def plain_model() -> DoDJointModel:
    return DoDJointModel(tiny_transformer(prior_embed_dim=None))


def draw_batch(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "latents": torch.randn(BATCH_SIZE, 4, 8, 8, generator=generator),
        "noise": torch.randn(BATCH_SIZE, 4, 8, 8, generator=generator),
        "sigmas": torch.tensor([0.2, 0.5, 0.9]),
        "class_labels": torch.tensor([3, 10, 0]),  # 10 is the null class
    }


def loss_by_hand(model: DoDJointModel, batch: dict[str, torch.Tensor], num_priors: int) -> torch.Tensor:
    """Sample by sample, with Eqs. 1 and 3 written out."""
    losses = []
    for i in range(BATCH_SIZE):
        clean, noise, sigma = batch["latents"][i : i + 1], batch["noise"][i : i + 1], batch["sigmas"][i]
        prior_embeds = model.latent_embedder(clean).prior_embeds if i < num_priors else None
        noisy = (1 - sigma) * clean + sigma * noise
        label = batch["class_labels"][i : i + 1]
        velocity = model.transformer(noisy, 1000 * sigma, label, prior_embeds=prior_embeds).sample
        losses.append(((noise - clean - velocity) ** 2).mean())
    return torch.stack(losses)


@pytest.mark.parametrize("num_priors", range(BATCH_SIZE + 1))
@torch.no_grad()
def test_losses_against_a_computation_by_hand(num_priors):
    model, batch = joint_model(), draw_batch()
    losses = model(**batch, num_priors=num_priors)
    assert losses.shape == (BATCH_SIZE,)
    torch.testing.assert_close(losses, loss_by_hand(model, batch, num_priors), rtol=1e-5, atol=1e-6)
    if num_priors > 0:  # and the prior matters, or the comparison says nothing about it
        without = model(**batch)
        assert (losses - without)[:num_priors].abs().min() > 1e-3


@torch.no_grad()
def test_plain_model_against_a_computation_by_hand():
    model, batch = plain_model(), draw_batch()
    torch.testing.assert_close(model(**batch), loss_by_hand(model, batch, 0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_priors", range(BATCH_SIZE + 1))
@torch.no_grad()
def test_the_latent_embedder_sees_the_clean_latents_of_the_kept_samples_only(num_priors):
    model, batch = joint_model(), draw_batch()
    seen = []
    model.latent_embedder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    model(**batch, num_priors=num_priors)
    assert len(seen) == (num_priors > 0)
    for latents in seen:
        torch.testing.assert_close(latents, batch["latents"][:num_priors], rtol=0, atol=0)


def gradients(model: DoDJointModel, num_priors: int) -> dict[str, torch.Tensor | None]:
    model(**draw_batch(), num_priors=num_priors).mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("num_priors", range(BATCH_SIZE + 1))
def test_every_parameter_has_a_gradient(num_priors):
    """Data parallelism waits for all of them."""
    missing = [name for name, gradient in gradients(joint_model(), num_priors).items() if gradient is None]
    assert missing == []


def test_every_parameter_of_a_plain_model_has_a_gradient():
    missing = [name for name, gradient in gradients(plain_model(), 0).items() if gradient is None]
    assert missing == []


def test_nothing_but_the_sample_token_is_learned_without_priors():
    for name, gradient in gradients(joint_model(), 0).items():
        if name.startswith("latent_embedder") or "prior_proj" in name:
            assert gradient.abs().max() == 0, name
    assert gradients(joint_model(), 0)["transformer.sample_token"].abs().max() > 1e-5


def test_the_sample_token_learns_nothing_where_all_have_priors():
    found = gradients(joint_model(), BATCH_SIZE)
    assert found["transformer.sample_token"].abs().max() == 0
    # Through the whole embedder, down to its first layer.
    for name in ("x_embedder.weight", "latent_queries", "to_latent.weight", "mask_token", "proj_out.bias"):
        assert found[f"latent_embedder.{name}"].abs().max() > 1e-5, name


def test_a_mixed_batch_teaches_both():
    found = gradients(joint_model(), 1)
    assert found["transformer.sample_token"].abs().max() > 1e-5
    assert found["latent_embedder.x_embedder.weight"].abs().max() > 1e-5


@pytest.mark.parametrize("num_priors", [0, 2, BATCH_SIZE])
@torch.no_grad()
def test_loss_is_fp32_under_bf16(num_priors):
    model, batch = joint_model(), draw_batch()
    velocities = []
    model.transformer.register_forward_hook(lambda module, inputs, output: velocities.append(output.sample))
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(**batch, num_priors=num_priors)
    assert losses.dtype == torch.float32 and velocities[0].dtype == torch.bfloat16
    # Only the velocity is rounded; target, square and mean are not.
    target = batch["noise"].double() - batch["latents"].double()
    expected = ((target - velocities[0].double()) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=0)


@torch.no_grad()
def test_loss_of_a_bf16_model_is_fp32():
    model = joint_model().to(torch.bfloat16)
    batch = draw_batch()
    batch |= {name: batch[name].to(torch.bfloat16) for name in ("latents", "noise")}
    losses = model(**batch, num_priors=1)
    assert losses.dtype == torch.float32
    assert not torch.equal(losses, losses.to(torch.bfloat16).float())


@pytest.mark.parametrize("num_priors", [0, 2])
@torch.no_grad()
def test_a_perfect_velocity_costs_nothing_and_points_from_data_to_noise(num_priors):
    """With no weights in its last layer the model answers its bias: one number per channel."""
    model, batch = joint_model(), draw_batch()
    velocity = torch.tensor([1.0, -2.0, 0.5, 3.0])
    model.transformer.proj_out.weight.zero_()
    model.transformer.proj_out.bias.copy_(velocity.repeat_interleave(4))  # a patch has 2 x 2 pixels, channel slowest
    offset = velocity.reshape(1, 4, 1, 1)

    perfect = model(**{**batch, "noise": batch["latents"] + offset}, num_priors=num_priors)
    torch.testing.assert_close(perfect, torch.zeros(BATCH_SIZE), rtol=0, atol=1e-10)
    reversed_ = model(**{**batch, "noise": batch["latents"] - offset}, num_priors=num_priors)
    torch.testing.assert_close(reversed_, (2 * velocity).square().mean().expand(BATCH_SIZE))


def test_gradient_checkpointing_changes_nothing():
    expected = gradients(joint_model(), 2)
    model = joint_model()
    model.transformer.enable_gradient_checkpointing()
    model.latent_embedder.enable_gradient_checkpointing()
    for name, gradient in gradients(model, 2).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7, msg=lambda text, n=name: n + text)
