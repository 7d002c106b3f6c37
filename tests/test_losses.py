"""
The joint objective and representation alignment against computations by hand, and their gradients where a batch does
not use every parameter.
"""

import pytest
import torch
from helpers import randomize, says, tiny_latent_embedder, tiny_transformer

from diffusers_dod.losses import DoDJointModel, RepresentationProjector, alignment_loss


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


@torch.no_grad()
def test_the_latent_embedder_sees_noise_where_it_is_given():
    model, batch = joint_model(), draw_batch()
    noise, sigmas = draw_batch(seed=1)["noise"], torch.tensor([0.0, 0.5, 1.0])
    seen = []
    model.latent_embedder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    model(**batch, num_priors=2, prior_noise=noise, prior_sigmas=sigmas)
    expected = batch["latents"][:2].clone()
    expected[1] = 0.5 * expected[1] + 0.5 * noise[1]
    torch.testing.assert_close(seen[0], expected)
    with pytest.raises(ValueError, match=says("`prior_sigmas` must be given with `prior_noise`", "got None")):
        model(**batch, num_priors=2, prior_noise=noise)


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


# ---------------------------------------------------------------------------------------------------------------------
# Representation alignment


FEATURE_DIM = 12
NUM_LAYERS = 4


def projector(seed: int) -> RepresentationProjector:
    return randomize(RepresentationProjector(32, FEATURE_DIM, hidden_dim=24), seed)


def aligned_model(alignment_layer: int = 2) -> DoDJointModel:
    transformer = tiny_transformer(num_layers=NUM_LAYERS)
    return DoDJointModel(transformer, tiny_latent_embedder(), projector(3), projector(4), alignment_layer)


def draw_features(*grid: int) -> torch.Tensor:
    return torch.randn(BATCH_SIZE, *(grid or (4, 4)), FEATURE_DIM, generator=torch.Generator().manual_seed(7))


def minus_cosine(tokens: torch.Tensor, features: torch.Tensor) -> float:
    """Mean over tokens of -a.b / |a||b|, token by token in fp64."""
    pairs = zip(tokens.double(), features.double(), strict=True)
    return -sum(float(a @ b / (a @ a).sqrt() / (b @ b).sqrt()) for a, b in pairs) / len(tokens)


def test_the_projector_is_a_three_layer_mlp():
    model = projector(0)
    tokens = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    first, second, third = (layer for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    expected = third(torch.nn.functional.silu(second(torch.nn.functional.silu(first(tokens)))))
    assert torch.equal(model(tokens), expected) and expected.shape == (2, 5, FEATURE_DIM)
    widths = [layer.weight.shape for layer in RepresentationProjector(32, 7).mlp[::2]]
    assert widths == [(2048, 32), (2048, 2048), (7, 2048)]
    with pytest.raises(ValueError, match=says("`feature_dim` must be an integer >= 1", "got 0")):
        RepresentationProjector(32, 0)


def test_the_alignment_loss_is_minus_the_mean_cosine():
    features = torch.tensor([3.0, 4.0]).expand(1, 1, 4, 2)
    projected = torch.tensor([[3.0, 4.0], [-6.0, -8.0], [4.0, -3.0], [5.0, 0.0]]).reshape(1, 1, 4, 2)
    torch.testing.assert_close(alignment_loss(projected, features), torch.tensor([-(1 - 1 + 0 + 0.6) / 4]))
    # Lengths do not matter, and each sample has its own mean.
    both = alignment_loss(torch.cat([projected, features]), torch.cat([100 * features, features]))
    torch.testing.assert_close(both, torch.tensor([-0.15, -1.0]))


def test_features_of_another_grid_are_resized_bilinearly():
    """A ramp keeps its values at the places of the other grid: no token fits better than one of the same value."""

    def loss_of(ramp: torch.Tensor, values: list[float]) -> float:
        projected = torch.stack([torch.ones(4, 4), torch.tensor(values)[:, None].expand(4, 4)], dim=-1)[None]
        return float(alignment_loss(projected, torch.stack([torch.ones_like(ramp), ramp], dim=-1)[None]))

    up = torch.arange(2.0)[:, None].expand(2, 6)
    assert loss_of(up, [0.0, 0.25, 0.75, 1.0]) == pytest.approx(-1, abs=1e-6)
    # Half as many places: a filter of (1, 3, 3, 1) / 8, cut and normalised at the border.
    down = torch.arange(8.0)[:, None].expand(8, 2)
    first = (3 * 0 + 3 * 1 + 1 * 2) / 7
    assert loss_of(down, [first, 2.5, 4.5, 7 - first]) == pytest.approx(-1, abs=1e-6)
    assert loss_of(down, [first, 2.5, 4.5, 7.5 - first]) > -1 + 1e-5


@pytest.mark.parametrize("shape", [(2, 4, 4, 12), (3, 4, 4, 11), (3, 16, 12), (3, 4, 4, 12, 1)])
def test_features_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=says("`features` must have shape (3, rows, columns, 12)", f"got {shape}")):
        aligned_model()(**draw_batch(), features=torch.zeros(shape))


@pytest.mark.parametrize("num_priors", range(BATCH_SIZE + 1))
@pytest.mark.parametrize("layer", [1, 3, NUM_LAYERS])
@torch.no_grad()
def test_alignment_against_a_computation_by_hand(num_priors, layer):
    """Sample by sample, in the order of the batch, with the tokens that a hook sees after the block."""
    model, batch, features = aligned_model(layer), draw_batch(), draw_features()
    seen = []
    model.transformer.transformer_blocks[layer - 1].register_forward_hook(lambda *args: seen.append(args[-1]))
    loss, alignment, prior_alignment = model(**batch, num_priors=num_priors, features=features)
    assert torch.equal(loss, model(**batch, num_priors=num_priors))
    assert (alignment.shape, prior_alignment.shape) == ((BATCH_SIZE,), (num_priors,))
    expected = [minus_cosine(model.projector(seen[0][i]), features[i].flatten(0, 1)) for i in range(BATCH_SIZE)]
    torch.testing.assert_close(alignment, torch.tensor(expected), rtol=1e-4, atol=1e-6)
    assert len({round(value, 3) for value in expected}) == BATCH_SIZE
    for i in range(num_priors):
        prior = model.latent_embedder(batch["latents"][i : i + 1]).prior_embeds[0]
        expected = minus_cosine(model.prior_projector(prior), features[i].flatten(0, 1))
        assert float(prior_alignment[i]) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("grid", [(8, 8), (2, 2), (7, 5)])
@torch.no_grad()
def test_any_grid_of_features_is_taken(grid):
    features = draw_features(*grid)
    loss, alignment, prior_alignment = aligned_model()(**draw_batch(), num_priors=2, features=features)
    resized = torch.nn.functional.interpolate(features.permute(0, 3, 1, 2), (4, 4), mode="bilinear", antialias=True)
    same = aligned_model()(**draw_batch(), num_priors=2, features=resized.permute(0, 2, 3, 1))
    torch.testing.assert_close((loss, alignment, prior_alignment), same)


@torch.no_grad()
def test_grids_need_not_be_square():
    model, batch = aligned_model(), draw_batch()
    batch |= {name: batch[name][:, :, :4] for name in ("latents", "noise")}  # 2 x 4 tokens
    features = draw_features(2, 4)
    seen = []
    model.transformer.transformer_blocks[1].register_forward_hook(lambda *args: seen.append(args[-1]))
    _, alignment, prior_alignment = model(**batch, num_priors=1, features=features)
    expected = [minus_cosine(model.projector(seen[0][i]), features[i].flatten(0, 1)) for i in range(BATCH_SIZE)]
    torch.testing.assert_close(alignment, torch.tensor(expected), rtol=1e-4, atol=1e-6)
    prior = model.latent_embedder(batch["latents"][:1]).prior_embeds[0]
    expected = minus_cosine(model.prior_projector(prior), features[0].flatten(0, 1))
    assert float(prior_alignment[0]) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
@torch.no_grad()
def test_hidden_states_are_those_that_hooks_see(checkpointing):
    model, batch = tiny_transformer(num_layers=NUM_LAYERS), draw_batch()
    if checkpointing:
        model.enable_gradient_checkpointing()
    arguments = (batch["latents"], 1000 * batch["sigmas"], batch["class_labels"])
    seen = []
    hooks = [model.x_embedder.register_forward_hook(lambda *args: seen.append(args[-1]))]
    hooks += [
        block.register_forward_hook(lambda *args: seen.append(args[-1]), always_call=True)
        for block in model.transformer_blocks
    ]
    with torch.set_grad_enabled(checkpointing):
        output = model(*arguments, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    assert len(output.hidden_states) == len(seen) == NUM_LAYERS + 1
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(output.hidden_states, seen, strict=True))
    plain = model(*arguments)
    assert plain.hidden_states is None and list(plain) == ["sample"] and torch.equal(plain.sample, output.sample)
    assert len(model(*arguments, return_dict=False)) == 1
    sample, hidden_states = model(*arguments, return_dict=False, output_hidden_states=True)
    assert torch.equal(sample, plain.sample) and torch.equal(hidden_states[-1], seen[-1])


def alignment_gradients(model: DoDJointModel, num_priors: int, index: int) -> dict[str, torch.Tensor | None]:
    """Gradients of one part of what the model returns: 0 loss, 1 alignment, 2 prior alignment."""
    model(**draw_batch(), num_priors=num_priors, features=draw_features())[index].sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def reached(gradients: dict[str, torch.Tensor | None], prefix: str) -> bool:
    found = [value for name, value in gradients.items() if name.startswith(prefix)]
    assert found
    return any(value is not None and float(value.abs().max()) > 1e-7 for value in found)


@pytest.mark.parametrize("layer", [1, 2, NUM_LAYERS])
def test_alignment_teaches_the_blocks_before_it_only(layer):
    found = alignment_gradients(aligned_model(layer), 1, 1)
    blocks = [reached(found, f"transformer.transformer_blocks.{i}.") for i in range(NUM_LAYERS)]
    assert blocks == [i < layer for i in range(NUM_LAYERS)]
    assert reached(found, "transformer.x_embedder") and reached(found, "projector.mlp.0")
    assert not any(reached(found, f"{name}.") for name in ("transformer.proj_out", "prior_projector"))
    assert reached(found, "latent_embedder.x_embedder")  # through the prior


def test_prior_alignment_teaches_the_latent_embedder_by_the_kept_samples_only():
    model, batch = aligned_model(), draw_batch()
    batch["latents"].requires_grad_(True)
    _, _, prior_alignment = model(**batch, num_priors=2, features=draw_features())
    prior_alignment.sum().backward()
    per_sample = batch["latents"].grad.abs().amax((1, 2, 3))
    assert (per_sample[:2] > 1e-6).all() and per_sample[2] == 0
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name in ("x_embedder.weight", "latent_queries", "to_latent.weight", "mask_token", "proj_out.bias"):
        assert reached(found, f"latent_embedder.{name}"), name
    assert reached(found, "prior_projector.mlp.0")
    assert not reached(found, "transformer.") and not reached(found, "projector.")


@pytest.mark.parametrize("num_priors", range(BATCH_SIZE + 1))
@pytest.mark.parametrize("has_features", [True, False])
def test_every_parameter_of_an_aligned_model_has_a_gradient(num_priors, has_features):
    model = aligned_model()
    losses = model(**draw_batch(), num_priors=num_priors, features=draw_features() if has_features else None)
    total = losses[0].mean() + losses[1].mean() + losses[2].sum() if has_features else losses.mean()
    total.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert [name for name, gradient in found.items() if gradient is None] == []
    assert reached(found, "projector.") == has_features
    assert reached(found, "prior_projector.") == (has_features and num_priors > 0)


def test_the_loss_of_a_model_with_projectors_is_that_of_one_without():
    batch = draw_batch()
    model = aligned_model()
    assert torch.equal(
        model(**batch, num_priors=2), DoDJointModel(model.transformer, model.latent_embedder)(**batch, num_priors=2)
    )


def test_a_plain_model_is_aligned_too():
    model = DoDJointModel(tiny_transformer(prior_embed_dim=None), projector=projector(3), alignment_layer=1)
    loss, alignment, prior_alignment = model(**draw_batch(), features=draw_features())
    assert (loss.shape, alignment.shape, prior_alignment.shape) == ((BATCH_SIZE,), (BATCH_SIZE,), (0,))
    model(**draw_batch()).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
def test_alignment_is_fp32_under_bf16():
    model, features = aligned_model(), draw_features()
    exact = model(**draw_batch(), num_priors=2, features=features)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(**draw_batch(), num_priors=2, features=features)
    for ours, expected in zip(rounded, exact, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, expected, rtol=0.05, atol=0.02)
    assert not torch.equal(rounded[1], rounded[1].to(torch.bfloat16).float())


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ({"alignment_layer": 0}, ["`alignment_layer` must be an integer >= 1", "got 0"]),
        ({"alignment_layer": 3}, ["`alignment_layer` must be an integer in [1, 2]", "got 3"]),
        ({"projector": None}, ["`projector` must be given", "`prior_projector`", "got None"]),
        ({"latent_embedder": None}, ["`latent_embedder` must be given", "`prior_projector`", "got None"]),
    ],
)
def test_projectors_that_do_not_fit(arguments, fragments):
    given = {"latent_embedder": tiny_latent_embedder(), "projector": projector(3), "alignment_layer": 1}
    with pytest.raises(ValueError, match=says(*fragments)):
        DoDJointModel(tiny_transformer(), **{**given, "prior_projector": projector(4), **arguments})


def test_features_without_a_projector_are_refused():
    with pytest.raises(ValueError, match=says("`features` must be None", "no `projector`", "(3, 4, 4, 12)")):
        joint_model()(**draw_batch(), features=draw_features())


def test_alignment_is_learned():
    """By tokens and priors alike, beside the loss itself."""
    model, batch, features = aligned_model().train(), draw_batch(), draw_features()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    history = []
    for _ in range(60):
        losses = model(**batch, num_priors=2, features=features)
        loss, alignment, prior_alignment = (part.mean() for part in losses)
        (loss + 0.5 * alignment + 0.5 * prior_alignment).backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(torch.stack([loss, alignment, prior_alignment]).detach())
    first, last = history[0], history[-1]
    assert last[0] < first[0] and (last[1:] < first[1:] - 0.3).all(), (first, last)


# ------------------------------------------------------------------------------------------------------- compilation


@pytest.mark.slow
def test_compiled_blocks_have_few_graphs_over_all_batches(fresh_compiler):
    """Steps with batches of two sizes, any number of priors and latents of four shapes; a graph break is an error."""
    model = joint_model().train()
    for part in (model.transformer, model.latent_embedder):
        part.compile_repeated_blocks(backend="eager", fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    for step in range(24):
        batch_size = (6, 4)[step // 12]
        num_priors = int(torch.randint(batch_size + 1, (), generator=generator))
        shape = [(8, 8), (4, 16), (16, 4), (6, 10)][step % 4]
        latents = torch.randn(batch_size, 4, *shape, generator=generator)
        labels = torch.zeros(batch_size, dtype=torch.int64)
        loss = model(latents, torch.randn_like(latents), torch.rand(batch_size), labels, num_priors)
        loss.mean().backward()
        assert torch.isfinite(loss).all()
    # No prior, one, some, all but one or all, before and after the size of the batch is a symbol; one or some of them
    # in the embedder; and the first ones, whose sizes are numbers.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 18
