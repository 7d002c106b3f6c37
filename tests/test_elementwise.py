"""Elementwise parts of a block: eager and compiled forms agree with their formulas in values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.activations import SwiGLU
from diffusers.models.embeddings import apply_rotary_emb

from diffusers_dod.elementwise import (
    GatedSilu,
    PlainLayerNorm,
    add_gated,
    add_modulations,
    modulate,
    rotate,
    split_rows,
)


BATCH_SIZE, NUM_TOKENS, DIM = 5, 6, 8

every_num_priors = pytest.mark.parametrize("num_priors", [0, 2, BATCH_SIZE])


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype).requires_grad_()


def draw_rows(num_priors: int, chunks: int) -> torch.Tensor:
    return draw(num_priors * NUM_TOKENS + BATCH_SIZE - num_priors, chunks * DIM)


def broadcast(rows: torch.Tensor, num_priors: int) -> torch.Tensor:
    """A row for each token of every sample, (B, T, ...)."""
    per_token = rows[: num_priors * NUM_TOKENS].unflatten(0, (num_priors, NUM_TOKENS))
    return torch.cat([per_token, rows[num_priors * NUM_TOKENS :, None].expand(-1, NUM_TOKENS, -1)])


def assert_same_with_gradients(actual: torch.Tensor, expected: torch.Tensor, *inputs: torch.Tensor) -> None:
    weight = draw(*expected.shape).detach()
    torch.testing.assert_close(actual, expected)
    grads = (torch.autograd.grad((output * weight).sum(), inputs) for output in (actual, expected))
    for grad, expected_grad in zip(*grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)


@every_num_priors
def test_modulation_agrees_with_the_broadcast_form(num_priors):
    x, rows = draw(BATCH_SIZE, NUM_TOKENS, DIM), draw_rows(num_priors, 2)
    shift, scale = split_rows(rows, num_priors, NUM_TOKENS, 2)
    per_token = broadcast(rows, num_priors)
    expected = x * (1 + per_token[..., DIM:]) + per_token[..., :DIM]
    assert_same_with_gradients(modulate(x, shift, scale), expected, x, rows)


@every_num_priors
def test_the_gated_sum_agrees_with_the_broadcast_form(num_priors):
    residual, x = draw(BATCH_SIZE, NUM_TOKENS, DIM), draw(BATCH_SIZE, NUM_TOKENS, DIM) * 2
    rows = draw_rows(num_priors, 1)
    (gate,) = split_rows(rows, num_priors, NUM_TOKENS, 1)
    expected = residual + x * broadcast(rows, num_priors)
    assert_same_with_gradients(add_gated(residual, x, gate), expected, residual, x, rows)


@every_num_priors
def test_all_chunks_of_the_rows_get_their_gradients(num_priors):
    rows = draw_rows(num_priors, 3)
    chunks = split_rows(rows, num_priors, NUM_TOKENS, 3)
    assert [part.shape[:2] for part in chunks[0]] == [
        shape for shape in ((num_priors, NUM_TOKENS), (BATCH_SIZE - num_priors, 1)) if shape[0] > 0
    ]
    total = sum((index + 1) * part.square().sum() for index, parts in enumerate(chunks) for part in parts)
    factors = torch.arange(1, 4).repeat_interleave(DIM)
    torch.testing.assert_close(torch.autograd.grad(total, rows)[0], 2 * factors * rows)


@every_num_priors
def test_modulations_are_added_with_their_gradients(num_priors):
    own, shared = draw_rows(num_priors, 6), draw_rows(num_priors, 6) * 2
    chunks = add_modulations(own, shared, num_priors, NUM_TOKENS)
    expected = split_rows(own + shared, num_priors, NUM_TOKENS, 6)
    for actual_parts, parts in zip(chunks, expected, strict=True):
        for actual, part in zip(actual_parts, parts, strict=True):
            torch.testing.assert_close(actual, part)
    total = sum((index + 1) * part.square().sum() for index, parts in enumerate(chunks) for part in parts)
    factors = torch.arange(1, 7).repeat_interleave(DIM)
    for grad in torch.autograd.grad(total, (own, shared)):
        torch.testing.assert_close(grad, 2 * factors * (own + shared))


def test_shifts_share_no_memory_with_what_the_backward_pass_needs():
    rows = draw_rows(2, 6)
    storages = [parts[0].untyped_storage().data_ptr() for parts in add_modulations(rows, rows, 2, NUM_TOKENS)]
    shifts, others = {storages[0], storages[3]}, {*storages[1:3], *storages[4:]}
    assert len(shifts) == len(others) == 1 and shifts != others


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_and_keys_are_rotated_together_as_each_alone(dtype):
    query, key = draw(2, NUM_TOKENS, 3, DIM, dtype=dtype), draw(2, NUM_TOKENS, 3, DIM, dtype=dtype) * 2
    angles = draw(NUM_TOKENS, DIM // 2, dtype=torch.float32).detach()
    rotation = torch.stack([angles.cos(), angles.sin()], dim=-1)
    together = rotate(torch.cat([query, key], dim=2), rotation, 3)
    apart = [rotate(x, rotation, 3)[0] for x in (query, key)]
    assert_same_with_gradients(torch.cat(together, dim=2), torch.cat(apart, dim=2), query, key)


def test_rotation_agrees_with_diffusers():
    x, angles = draw(2, NUM_TOKENS, 3, DIM), draw(NUM_TOKENS, DIM // 2).detach().float()
    rotation = torch.stack([angles.cos(), angles.sin()], dim=-1)
    cos, sin = rotation.double().repeat_interleave(2, dim=1).unbind(-1)
    x_float = x.float()
    expected = apply_rotary_emb(x_float, (cos.float(), sin.float()), sequence_dim=1)
    assert_same_with_gradients(rotate(x_float, rotation, 3)[0], expected, x)


def test_rotation_in_bf16_rounds_only_its_result():
    x = draw(2, NUM_TOKENS, 3, DIM, dtype=torch.bfloat16)
    angles = draw(NUM_TOKENS, DIM // 2, dtype=torch.float32).detach()
    rotation = torch.stack([angles.cos(), angles.sin()], dim=-1)
    (rotated,) = rotate(x, rotation, 3)
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, rotate(x.float(), rotation, 3)[0].bfloat16())


def test_the_gated_silu_agrees_with_diffusers():
    x = draw(3, NUM_TOKENS, DIM)
    theirs = SwiGLU(DIM, 12).double()
    ours = GatedSilu(theirs.proj)
    weight = draw(3, NUM_TOKENS, 12).detach()
    torch.testing.assert_close(ours(x), theirs(x))
    grads = []
    for module in (ours, theirs):
        grads.append(torch.autograd.grad((module(x) * weight).sum(), [x, *module.parameters()]))
    for grad, expected in zip(*grads, strict=True):
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_computes_in_fp32_and_keeps_the_dtype_under_autocast(dtype):
    x = (100 + draw(4, 64, dtype=torch.float32).detach()).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        normed = PlainLayerNorm(64)(x)
    assert normed.dtype == dtype
    expected = F.layer_norm(x.double(), (64,), eps=1e-6)
    torch.testing.assert_close(normed, expected.to(dtype), atol=2e-5 if dtype == torch.float32 else 1e-2, rtol=1e-2)


@every_num_priors
def test_a_compiler_sees_formulas_with_the_same_values(num_priors):
    def block(x, rows, rotation, hidden):
        shift, scale, gate = split_rows(rows, num_priors, NUM_TOKENS, 3)
        x = add_gated(x, modulate(PlainLayerNorm(DIM)(x), shift, scale), gate)
        return rotate(x.unflatten(-1, (2, -1)), rotation, 2)[0].sum() + activation(hidden).sum()

    activation = GatedSilu(torch.nn.Linear(DIM, 24)).double()
    rotation = torch.randn(NUM_TOKENS, DIM // 4, 2, generator=torch.Generator().manual_seed(0)).double()
    inputs = (draw(BATCH_SIZE, NUM_TOKENS, DIM), draw_rows(num_priors, 3), rotation, draw(2, 3, DIM))
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    assert_same_with_gradients(compiled(*inputs), block(*inputs), inputs[0], inputs[1], inputs[3])
    torch._dynamo.reset()


def test_transforms_of_functions_work():
    x, rows = draw(BATCH_SIZE, NUM_TOKENS, DIM), draw_rows(2, 3)
    rotation = torch.randn(NUM_TOKENS, DIM // 4, 2, generator=torch.Generator().manual_seed(0)).double()
    activation = GatedSilu(torch.nn.Linear(DIM, 24)).double()

    def loss(x):
        shift, scale, gate = split_rows(rows, 2, NUM_TOKENS, 3)
        x = add_gated(x, modulate(x, shift, scale), gate)
        return rotate(x.unflatten(-1, (2, -1)), rotation, 2)[0].square().sum() + activation(x).sum()

    torch.testing.assert_close(torch.func.grad(loss)(x), torch.autograd.grad(loss(x), x)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_without_gradients_are_the_same(dtype):
    def block():
        rows = draw_rows(2, 6).to(dtype)
        shift, scale, gate, *_ = add_modulations(rows, rows, 2, NUM_TOKENS)
        x = draw(BATCH_SIZE, NUM_TOKENS, DIM, dtype=dtype)
        x = add_gated(x, modulate(x, shift, scale), gate)
        rotation = draw(NUM_TOKENS, DIM // 4, 2, dtype=torch.float32).detach()
        return torch.cat(rotate(x.unflatten(-1, (2, -1)), rotation, 1), dim=2)

    with torch.no_grad():
        values = block()
    assert not values.requires_grad and torch.equal(values, block())
