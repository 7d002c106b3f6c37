"""Operations and bytes: closed counts of small functions, and bounds for the blocks of the largest model."""

from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from diffusers_dod.compute import TrainingStep, count_kept_bytes, count_work, training_cost, training_work
from diffusers_dod.losses import DoDJointModel
from diffusers_dod.operations import Operation, OperationCounter, Work
from diffusers_dod.presets import PRESETS


XL = PRESETS["DoD-XL"]
BATCH_SIZE, NUM_PRIORS = 32, 16
LATENTS = (4, 32, 32)


def count(function, *args) -> list[tuple[str, int, int]]:
    with OperationCounter() as counter:
        function(*args)
    return sorted((key.name, key.flops, key.num_bytes) for key in counter.work.elements())


def test_views_are_free_and_numbers_are_read_once():
    x = torch.ones(6, 4)
    assert count(lambda: x.t().reshape(2, 2, 6)[:1].unsqueeze(0).expand(3, -1, -1, -1)) == []
    assert count(torch.add, x, x) == [("add", 0, 2 * 96)]
    assert count(torch.mul, x, torch.ones(1, 4).expand(6, 4)) == [("mul", 0, 2 * 96 + 16)]
    assert count(x.add_, 1) == [("add_", 0, 2 * 96)]
    assert count(lambda: torch.empty(3, 3)) == []


def test_an_output_is_only_written():
    x, out = torch.ones(6, 4), torch.empty(6, 4)
    assert count(lambda: torch.mul(x, 2.0, out=out)) == [("mul", 0, 2 * 96)]
    assert count(out.copy_, x) == [("copy_", 0, 2 * 96)]


def test_a_norm_copies_what_is_not_contiguous():
    x = torch.ones(5, 2, 8)
    assert count(F.layer_norm, x, (8,)) == [("native_layer_norm", 0, 2 * x.nbytes + 2 * 10 * 4)]
    names = [name for name, _, _ in count(F.layer_norm, x.transpose(0, 1), (8,))]
    assert names == ["clone", "native_layer_norm"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrix_products_have_flops(dtype):
    a, b = torch.ones(3, 5, dtype=dtype), torch.ones(5, 7, dtype=dtype)
    ((name, flops, num_bytes),) = count(torch.mm, a, b)
    assert (name, flops, num_bytes) == ("mm", 2 * 3 * 5 * 7, (15 + 35 + 21) * dtype.itemsize)
    q = torch.ones(2, 3, 10, 8, dtype=dtype, requires_grad=True)
    attention = count(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward())
    forward = 4 * 2 * 3 * 10 * 10 * 8
    assert [flops for _, flops, _ in attention if flops > 0] == [forward, 5 * forward // 2]


def test_the_roofline_takes_the_longer_time():
    work = Work(
        {
            Operation("mm", 1000, 10, torch.bfloat16): 2,
            Operation("mm", 1000, 10, torch.float32): 1,
            Operation("mm", 10, 500, torch.float32): 1,
            Operation("add", 0, 30, torch.float32): 3,
        }
    )
    assert (work.num_operations, work.num_bytes) == (7, 620)
    seconds = work.seconds({torch.bfloat16: 100.0, torch.float32: 10.0}, bandwidth=10.0)
    assert seconds == {True: 2 * 10 + 100 + 50, False: 9}


# ------------------------------------------------------------------------------- the largest model, at its full width


def fake_model(num_layers: int) -> DoDJointModel:
    transformer, embedder = XL.override(num_layers=num_layers).build(LATENTS, 1000)
    return DoDJointModel(transformer, embedder)


def fake_batch() -> dict[str, torch.Tensor]:
    latents = torch.empty(BATCH_SIZE, *LATENTS)
    labels = torch.zeros(BATCH_SIZE, dtype=torch.int64)
    return {"latents": latents, "noise": latents.clone(), "sigmas": torch.empty(BATCH_SIZE), "class_labels": labels}


@lru_cache
def training(num_layers: int) -> tuple[Work, int]:
    """The work of a training step, and the bytes it keeps."""
    with FakeTensorMode():
        model, batch = fake_model(num_layers), fake_batch()
        work = count_work(model, batch, NUM_PRIORS, "bf16")
        return work, count_kept_bytes(model, batch, NUM_PRIORS, "bf16")[0]


@lru_cache
def guided(num_layers: int) -> Work:
    """A guided evaluation in stage 2, with weights in bf16."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode():
            model = fake_model(num_layers).transformer
    finally:
        torch.set_default_dtype(torch.float32)
    with model.x_embedder.weight.fake_mode, torch.no_grad(), OperationCounter() as counter:
        latents, labels = torch.empty(2 * BATCH_SIZE, *LATENTS), torch.zeros(2 * BATCH_SIZE, dtype=torch.int64)
        priors = torch.empty(BATCH_SIZE, (LATENTS[1] // 2) ** 2, model.config.prior_embed_dim)
        model(latents, 500.0, labels, prior_embeds=priors)  # the unconditional half has no priors
    return counter.work


def test_a_block_trains_within_its_bounds():
    (one, kept_one), (two, kept_two) = training(1), training(2)
    assert two.num_operations - one.num_operations <= 112
    assert two.num_bytes - one.num_bytes <= 5.49e9
    assert kept_two - kept_one <= BATCH_SIZE * 15.5e6


def test_a_block_samples_within_its_bounds():
    one, two = guided(1), guided(2)
    assert two.num_operations - one.num_operations <= 34
    assert two.num_bytes - one.num_bytes <= 3.56e9


@pytest.mark.slow
def test_a_step_of_the_largest_model_is_within_its_bounds():
    work, kept = training(28)
    step = TrainingStep(batch_size=BATCH_SIZE)
    assert training_work(XL, LATENTS, 1000, step) == work
    assert training_cost(XL, LATENTS, 1000, step).activation_bytes == kept
    assert work.num_operations <= 4_000 and work.num_bytes <= 170e9
    assert kept <= BATCH_SIZE * 491e6
