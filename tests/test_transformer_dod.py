import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from golden_data import CONFIG, SHAPES, golden, golden_model, timestep_of
from helpers import says

from diffusers_dod import DoDTransformer2DModel
from diffusers_dod.transformer_dod import DoDAttention, patchify, unpatchify


PRIOR_DIM = 24


@pytest.fixture(scope="module")
def model() -> DoDTransformer2DModel:
    """The golden backbone with a random prior projection and a random S."""
    torch.manual_seed(0)
    model = golden_model(prior_embed_dim=PRIOR_DIM)
    for parameter in [model.sample_token, *model.prior_proj.parameters()]:
        torch.nn.init.normal_(parameter, std=0.5)
    return model.requires_grad_(False)


def inputs(batch_size: int, height: int = 8, width: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(batch_size, 4, height, width, generator=generator),
        torch.rand(batch_size, generator=generator) * 1000,
        torch.randint(0, 11, (batch_size,), generator=generator),
    )


def priors(batch_size: int, num_tokens: int = 16) -> torch.Tensor:
    return torch.randn(batch_size, num_tokens, PRIOR_DIM, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_velocity_agrees_with_fitv2(shape):
    data = {key.removeprefix(f"{shape}."): value for key, value in golden("fitv2_tiny_io").items()}
    velocity = golden_model()(data["latents"], timestep_of(data["t"]), data["y"]).sample
    torch.testing.assert_close(velocity, -data["velocity"], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_intermediates_agree_with_fitv2(shape):
    data = {key.removeprefix(f"{shape}."): value for key, value in golden("fitv2_tiny_io").items()}
    model = golden_model()
    height, width = data["latents"].shape[2:]
    rotation = model.pos_embed(height // 2, width // 2, torch.device("cpu"))
    cos, sin = rotation.repeat_interleave(2, dim=1).unbind(-1)  # the reference has one for each channel of a pair
    torch.testing.assert_close(cos, data["rope_cos"], atol=1e-6, rtol=0)
    torch.testing.assert_close(sin, data["rope_sin"], atol=1e-6, rtol=0)
    torch.testing.assert_close(model.x_embedder(patchify(data["latents"], 2)), data["x_emb"], atol=1e-5, rtol=0)
    torch.testing.assert_close(model.time_embed(timestep_of(data["t"])), data["t_emb"], atol=1e-5, rtol=0)
    torch.testing.assert_close(model.class_embed(data["y"]), data["y_emb"])


@torch.no_grad()
@pytest.mark.parametrize("shape", ["sq8x8", "ns8x12"])
def test_conditioning_per_token_agrees_with_the_reference(shape):
    data = {key.removeprefix(f"{shape}."): value for key, value in golden("dod_pertoken_refimpl_io").items()}
    model = golden_model(prior_embed_dim=64)
    model.prior_proj = torch.nn.Identity()  # the reference adds e_s straight to c
    model.sample_token.copy_(data["S"])
    arguments = (data["latents"], timestep_of(data["t"]), data["y"])
    with_prior = model(*arguments, prior_embeds=data["e_s"]).sample
    without_prior = model(*arguments).sample
    torch.testing.assert_close(with_prior, -data["velocity_e_s"], atol=1e-5, rtol=0)
    torch.testing.assert_close(without_prior, -data["velocity_S"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_time_runs_from_data_to_noise():
    """Converted weights expect t = 1 - sigma; a model that took sigma for t would give another time's velocity."""
    data = golden("fitv2_tiny_io")
    model = golden_model()
    right = model(data["sq8x8.latents"], timestep_of(data["sq8x8.t"]), data["sq8x8.y"]).sample
    flipped = model(data["sq8x8.latents"], 1000 * data["sq8x8.t"], data["sq8x8.y"]).sample
    assert (right - flipped).abs().max() > 0.01
    assert (right + data["sq8x8.velocity"]).abs().max() < 1e-5 < (right - data["sq8x8.velocity"]).abs().max()


def test_patches_are_row_major_with_the_channel_slowest():
    latents = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).reshape(2, 3, 4, 6)
    tokens = patchify(latents, 2)
    assert tokens.shape == (2, 6, 12)
    assert torch.equal(tokens[1, 4], latents[1, :, 2:4, 2:4].flatten())  # second row, second column
    assert torch.equal(unpatchify(tokens, 2, 4, 6), latents)


@pytest.mark.parametrize("num_priors", [0, 2, 5])
def test_split_modulation_agrees_with_the_broadcast_form(model, num_priors):
    """K = 0, 0 < K < B and K = B: the same as a pass in which every sample has one conditioning vector per token."""
    latents, timestep, labels = inputs(5)
    prior_embeds = priors(num_priors)
    split = model(latents, timestep, labels, prior_embeds=prior_embeds).sample

    c = (model.time_embed(timestep) + model.class_embed(labels))[:, None].expand(-1, 16, -1)
    shared = model.sample_token.expand(5 - num_priors, 16, -1)
    broadcast = torch.nn.functional.silu(c + torch.cat([model.prior_proj(prior_embeds), shared]))
    model._conditioning = lambda *args: broadcast.flatten(0, 1)
    try:
        expected = model(latents, timestep, labels, prior_embeds=priors(5)).sample
    finally:
        del model._conditioning
    torch.testing.assert_close(split, expected, atol=1e-5, rtol=0)


def test_samples_without_a_prior_have_one_row_of_conditioning(model):
    num_rows = []
    handle = model.transformer_blocks[0].register_forward_pre_hook(
        lambda module, args: num_rows.append((args[1].shape[0], args[2].shape[0], args[3]))
    )
    latents, timestep, labels = inputs(5)
    model(latents, timestep, labels)
    model(latents, timestep, labels, prior_embeds=priors(2))
    handle.remove()
    assert num_rows == [(5, 5, 0), (2 * 16 + 3, 2 * 16 + 3, 2)]


def test_the_sample_token_is_added_to_the_condition(model):
    latents, timestep, labels = inputs(3)
    plain = golden_model()
    plain.class_embed.weight.data += model.sample_token  # S added to c through the class table
    torch.testing.assert_close(
        model(latents, timestep, labels).sample, plain(latents, timestep, labels).sample.detach(), atol=1e-5, rtol=0
    )


def test_a_batch_equals_its_samples(model):
    latents, timestep, labels = inputs(4)
    batch = model(latents, timestep, labels, prior_embeds=priors(2)).sample
    for i in range(4):
        prior = priors(2)[i : i + 1] if i < 2 else None
        single = model(latents[i : i + 1], timestep[i], labels[i : i + 1], prior_embeds=prior).sample
        torch.testing.assert_close(single, batch[i : i + 1], atol=1e-5, rtol=1e-5)


def test_a_scalar_timestep_serves_the_whole_batch(model):
    latents, _, labels = inputs(3)
    expected = model(latents, torch.full((3,), 250.0), labels).sample
    assert torch.equal(model(latents, 250.0, labels).sample, expected)
    assert torch.equal(model(latents, torch.tensor(250), labels, return_dict=False)[0], expected)


def test_the_time_embedding_knows_no_tf32():
    """Nothing tells on a CPU but the way around it: products of fp64, rounded once."""
    timesteps = torch.arange(0, 1001, 50, dtype=torch.float32)
    model = golden_model().time_embed
    features = get_timestep_embedding(timesteps / 1000, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        embedded = model.mlp.linear_1(features)
        assert torch.compile(model, backend="eager", fullgraph=True)(timesteps).dtype == torch.float32
    finally:
        torch.set_float32_matmul_precision(before)
    linear = model.mlp.linear_1.double()
    expected = torch.nn.functional.linear(features.double(), linear.weight, linear.bias)
    assert torch.equal(embedded, expected.float())


def test_the_time_embedding_computes_in_fp32_under_bf16(tmp_path):
    """bf16 has only half of the integers up to 1000: neighbouring timesteps must be embedded apart all the same."""
    timesteps = torch.arange(1001, dtype=torch.float32)
    expected = golden_model().time_embed(timesteps)

    golden_model().save_pretrained(tmp_path)
    loaded = DoDTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert loaded.dtype == loaded.x_embedder.weight.dtype == torch.bfloat16
    assert loaded.time_embed.mlp.linear_1.weight.dtype == torch.float32  # so that no bit of the weights is lost
    cast = golden_model().to(torch.bfloat16)
    assert cast.time_embed.mlp.linear_1.weight.dtype == torch.bfloat16  # a cast is a cast, as in Diffusers
    for model, tolerance in ((loaded, 1e-6), (cast, 2e-2)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            embedding = model.time_embed(timesteps)
        assert embedding.dtype == torch.float32
        torch.testing.assert_close(embedding, expected, atol=tolerance, rtol=tolerance)
        assert (embedding.diff(dim=0).abs().amax(dim=1) > 0).all()

    model = loaded
    latents, _, labels = inputs(1)
    latents = latents.to(torch.bfloat16)
    with torch.no_grad():
        velocities = [model(latents, torch.tensor([t]), labels).sample for t in (511.0, 512.0, 513.0)]
    assert velocities[0].dtype == torch.bfloat16
    assert not torch.equal(velocities[0], velocities[1]) and not torch.equal(velocities[1], velocities[2])


def test_bf16_stays_close_to_fp32(model):
    latents, timestep, labels = inputs(3)
    expected = model(latents, timestep, labels, prior_embeds=priors(2)).sample
    low = golden_model(prior_embed_dim=PRIOR_DIM)
    low.load_state_dict(model.state_dict())
    low.to(torch.bfloat16)
    with torch.no_grad():
        velocity = low(latents.bfloat16(), timestep, labels, prior_embeds=priors(2).bfloat16()).sample.float()
    assert (velocity - expected).abs().max() < 0.05 * expected.abs().max()


def test_gradient_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    gradients = []
    for checkpointing in (False, True):
        model = golden_model(prior_embed_dim=PRIOR_DIM).train()
        torch.nn.init.constant_(model.prior_proj.linear_2.weight, 0.1)
        torch.nn.init.constant_(model.prior_proj.linear_1.weight, 0.1)
        if checkpointing:
            model.enable_gradient_checkpointing()
        latents, timestep, labels = inputs(3)
        model(latents, timestep, labels, prior_embeds=priors(2)).sample.square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_fused_projections_give_the_same_velocity(model):
    latents, timestep, labels = inputs(2)
    expected = model(latents, timestep, labels).sample
    model.fuse_qkv_projections()
    fused = model(latents, timestep, labels).sample
    model.unfuse_qkv_projections()
    torch.testing.assert_close(fused, expected, atol=1e-5, rtol=0)


def test_a_new_model_predicts_zero_and_its_priors_can_learn():
    torch.manual_seed(0)
    model = DoDTransformer2DModel(**CONFIG, prior_embed_dim=PRIOR_DIM)
    latents, timestep, labels = inputs(2)
    assert torch.equal(model(latents, timestep, labels, prior_embeds=priors(1)).sample, torch.zeros(2, 4, 8, 8))
    assert model.sample_token.std().item() == pytest.approx(0.02, rel=0.3)
    assert model.class_embed.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.prior_proj.linear_2.weight.abs().max() > 0
    assert all(block.adaln_up.weight.abs().max() == 0 for block in model.transformer_blocks)


def test_save_and_load(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = DoDTransformer2DModel.from_pretrained(tmp_path)
    latents, timestep, labels = inputs(2)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    expected = model(latents, timestep, labels, prior_embeds=priors(1)).sample
    torch.testing.assert_close(loaded(latents, timestep, labels, prior_embeds=priors(1)).sample, expected)
    half = DoDTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.proj_out.weight.dtype == torch.bfloat16
    assert half.time_embed.mlp.linear_2.weight.dtype == torch.float32


@pytest.mark.parametrize(("labels", "found"), [([0, 11], "got [11]"), ([-1, 3], "got [-1]"), ([2**40, -5], "-5]")])
def test_labels_out_of_range_are_refused(model, labels, found):
    hidden_states, timestep, _ = inputs(2)
    with pytest.raises(ValueError, match=says("`class_labels`", "[0, 10]", found)):
        model(hidden_states, timestep, torch.tensor(labels))


@pytest.mark.parametrize(
    ("replaced", "fragments"),
    [
        ({"hidden_states": None}, ["`hidden_states`", "Tensor", "got None"]),
        ({"hidden_states": torch.zeros(2, 4, 8, 8, dtype=torch.long)}, ["`hidden_states`", "floating-point", "int64"]),
        ({"timestep": "0.5"}, ["`timestep`", "got '0.5'"]),
        ({"timestep": None}, ["`timestep`", "got None"]),
    ],
)
def test_arguments_of_other_types(model, replaced, fragments):
    names = ("hidden_states", "timestep", "class_labels")
    with pytest.raises(TypeError, match=says(*fragments)):
        model(**{**dict(zip(names, inputs(2), strict=True)), **replaced})


def test_projections_are_three_tensors_and_hooks_of_norms_see_their_own():
    attention = DoDAttention(8, heads=2, dim_head=4)
    tokens = torch.randn(1, 3, 8)
    plain = attention(tokens)
    shapes, seen = [], []
    for is_training in (True, False):
        with torch.set_grad_enabled(is_training):
            shapes.append([tuple(part.shape) for part in attention.project(tokens)])
    assert shapes == [[(1, 3, 8)] * 3] * 2
    attention.norm_k.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    torch.testing.assert_close(attention(tokens), plain)
    assert seen == [(1, 3, 2, 4)]
