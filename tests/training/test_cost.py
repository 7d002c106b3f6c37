"""What training costs, against closed formulas, real models, real optimizers and real passes."""

import json
import re
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from helpers import says, tiny_pipeline, tiny_vae
from torch._subclasses.fake_tensor import FakeTensorMode

from diffusers_dod import DoDTransformer2DModel, LatentEmbeddingModule
from diffusers_dod.compute import (
    OPTIMIZERS,
    TrainingCost,
    TrainingStep,
    _count_by_blocks,
    _count_step,
    count_flops,
    count_kept_bytes,
    training_cost,
    training_work,
)
from diffusers_dod.finetuning import LoraOptions, add_lora
from diffusers_dod.losses import DoDJointModel
from diffusers_dod.operations import Operation, Work
from diffusers_dod.options import parse_options
from diffusers_dod.presets import PRESETS, Preset
from diffusers_dod.training import cost
from diffusers_dod.training.cost import (
    BANDWIDTH_SHARE,
    COMPILED_BYTES,
    COMPILED_LAUNCHES,
    GPU,
    GPUS,
    LAUNCH_SECONDS,
    LINK_BANDWIDTH,
    PEAK_SHARE,
    StepTime,
    describe_run,
    estimate_run,
    estimate_step,
)
from diffusers_dod.training.ema import averaged_parameters
from diffusers_dod.training.encode_latents import load_autoencoder
from diffusers_dod.training.models import build_models, build_optimizer
from diffusers_dod.training_options import TrainingOptions


ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "training_cost.md").read_text()
SHAPE, CLASSES = (4, 8, 8), 12
SIZES = dict(num_attention_heads=2, attention_head_dim=64)
BACKBONE = dict(num_layers=1, sample_size=8, num_classes=CLASSES, **SIZES)
LEM = dict(num_encoder_layers=1, num_decoder_layers=1, num_latent_tokens=4, latent_token_dim=8, sample_size=8, **SIZES)
TINY = {"Tiny": Preset(BACKBONE | {"prior_embed_dim": 128}, LEM), "Tiny-FiTv2": Preset(BACKBONE)}


@pytest.fixture(autouse=True)
def tiny_presets(monkeypatch):
    for name, preset in TINY.items():
        monkeypatch.setitem(PRESETS, name, preset)


@lru_cache
def tiny_cost(preset="Tiny", **kwargs) -> TrainingCost:
    return training_cost(TINY[preset], SHAPE, CLASSES, TrainingStep(**{"batch_size": 4, **kwargs}))


def test_a_preset_without_a_depth_has_that_of_the_model():
    sizes = {name: value for name, value in BACKBONE.items() if name != "num_layers"}
    assert training_cost(Preset(sizes), SHAPE, CLASSES) == training_cost(
        Preset(sizes | {"num_layers": 12}), SHAPE, CLASSES
    )
    with pytest.raises(ValueError, match=says("`num_layers`", "got 0")):
        training_cost(Preset(sizes | {"num_layers": 0}), SHAPE, CLASSES)


def options(tmp_path, *argv):
    source = () if "--latents_dir" in argv else ("--train_data_dir", str(tmp_path / "images"))
    return parse_options(TrainingOptions, [*source, "--output_dir", str(tmp_path / "run"), *map(str, argv)])


def tiny_model(tmp_path, *argv):
    args = options(tmp_path, "--preset", "Tiny", *argv)
    return args, build_models(args.model, SHAPE, CLASSES)


# -------------------------------------------------------------------------------------------------------- operations


def forward_flops(name: str, has_prior: bool) -> int:
    """2 FLOPs per multiply-add of every matrix, 4 T^2 d for the two products of an attention layer."""
    config = PRESETS[name].transformer_config
    dim, layers = config["num_attention_heads"] * config["attention_head_dim"], config["num_layers"]
    hidden, rank, patch = 4 * dim * 2 // 3, dim // 4, 16
    tokens = (config.get("sample_size", 32) // 2) ** 2
    rows = tokens if has_prior else 1  # of the conditioning
    total = 2 * (256 * dim + dim * dim)  # time
    total += 2 * tokens * (2 * patch * dim + layers * (4 * dim**2 + 3 * dim * hidden))
    total += 2 * rows * (6 * dim**2 + layers * (dim * rank + 6 * rank * dim) + 2 * dim**2)
    total += layers * 4 * tokens**2 * dim
    if has_prior:
        lem = PRESETS[name].latent_embedder_config
        width = lem["num_attention_heads"] * lem["attention_head_dim"]
        number, narrow = lem["num_latent_tokens"], lem["latent_token_dim"]
        total += 2 * tokens * (width * dim + dim**2)  # projection of the prior
        total += 2 * tokens * (patch * width + width**2)
        total += 2 * number * width * narrow + 2 * (tokens + number) * narrow * width
        blocks = lem["num_encoder_layers"] + lem["num_decoder_layers"]
        total += blocks * (2 * (tokens + number) * 12 * width**2 + 4 * (tokens + number) ** 2 * width)
    return total


@pytest.mark.parametrize(
    ("name", "has_prior"),
    [("Tiny", True), ("Tiny", False), ("Tiny-FiTv2", False)],
)
def test_flops_are_those_of_the_formulas(name, has_prior):
    found = tiny_cost(name, prior_dropout_prob=0.0 if has_prior else 1.0)
    forward = forward_flops(name, has_prior)
    assert found.forward_flops == forward
    # The backward pass is twice the forward pass, but for gradients of what enters: patches and features of the time.
    config = PRESETS[name].transformer_config
    dim, tokens = config["num_attention_heads"] * config["attention_head_dim"], SHAPE[1] * SHAPE[2] // 4
    inputs = 2 * tokens * 16 * dim + 2 * 256 * dim
    if has_prior:
        inputs += 2 * tokens * 16 * config["prior_embed_dim"]
    assert found.training_flops == 3 * forward - inputs


@lru_cache
def flops_of_base(num_priors: int) -> tuple[int, int]:
    with torch.device("meta"):
        backbone = DoDTransformer2DModel(**PRESETS["DoD-B"].transformer_config)
        model = DoDJointModel(backbone, LatentEmbeddingModule(**PRESETS["DoD-B"].latent_embedder_config))
    return count_flops(model, (4, 32, 32), num_priors)


def test_flops_of_the_paper():
    """The paper's GFLOPs are multiply-adds of the Linears: 26.431 of the backbone and 24.619 of the LEM, of DoD-B."""
    forward = flops_of_base(num_priors=1)[0]
    assert forward == forward_flops("DoD-B", has_prior=True)
    attention = 4 * 768 * (12 * 256**2 + 12 * 288**2)
    assert (forward - attention) / 2e9 == pytest.approx(26.431 + 24.619, abs=1e-3)


def test_images_with_and_without_a_prior_are_mixed():
    """The LEM works for a share of 1 - p_s, and so does all that has a row per token."""
    costs = {share: tiny_cost(prior_dropout_prob=share) for share in (0.0, 0.25, 1.0)}
    for name in ("forward_flops", "training_flops"):
        with_prior, mixed, without = (getattr(found, name) for found in costs.values())
        assert without < mixed < with_prior
        assert mixed == pytest.approx(0.75 * with_prior + 0.25 * without)
    bytes_kept = [found.activation_bytes for found in costs.values()]
    assert bytes_kept == sorted(bytes_kept, reverse=True) and len(set(bytes_kept)) == 3


def test_a_fitv2_has_no_priors_to_drop():
    assert tiny_cost("Tiny-FiTv2", prior_dropout_prob=0.0) == tiny_cost("Tiny-FiTv2", prior_dropout_prob=1.0)


def test_gradient_checkpointing_trades_operations_for_memory():
    deeper = Preset(TINY["Tiny"].transformer_config | {"num_layers": 4}, LEM)
    plain, checkpointed = (
        training_cost(deeper, SHAPE, options=TrainingStep(gradient_checkpointing=value)) for value in (False, True)
    )
    assert checkpointed.forward_flops == plain.forward_flops
    repeated = (checkpointed.training_flops - plain.training_flops) / plain.forward_flops
    assert 0.6 < repeated < 1
    assert checkpointed.activation_bytes < 0.6 * plain.activation_bytes


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("Tiny", {"mixed_precision": "no", "prior_dropout_prob": 0.25}),
        # The input of the first block has no gradient, so that the second one is larger.
        ("Tiny-FiTv2", {"gradient_checkpointing": True, "lora": LoraOptions(lora_rank=4)}),
        pytest.param("Tiny", {"gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param("Tiny", {"trainable_parameters": "difffit", "optimizer": "adamw_8bit"}, marks=pytest.mark.slow),
    ],
)
def test_blocks_after_the_second_are_like_it(name, step):
    """All numbers are those of the whole model."""
    if "lora" in step:
        pytest.importorskip("peft")
    preset, step = TINY[name].override(num_layers=3), TrainingStep(batch_size=4, **step)
    found, (whole, largest_block) = (
        training_cost(preset, SHAPE, CLASSES, step),
        _count_step(preset, SHAPE, CLASSES, step),
    )
    share = step.prior_dropout_prob if name == "Tiny" else 1.0
    for kind in ("forward", "training"):
        assert getattr(found, f"{kind}_flops") == share * whole[kind, 0] + (1 - share) * whole[kind, 1]
    assert found.activation_bytes == whole["kept"] + largest_block
    assert (found.backbone_parameters, found.trainable_parameters) == (whole["backbone"], whole["trainable"])
    assert found.backbone_parameters + found.latent_embedder_parameters == whole["all"]
    assert found.moment_bytes == whole["moments"]


def test_a_model_may_have_one_block_or_two():
    counts = {1: Work(a=3, b=1), 2: Work(a=5, b=1, c=2)}
    presets = [Preset({"num_layers": number}) for number in (1, 2, 4)]
    found = [_count_by_blocks(preset, lambda one: counts[one.transformer_config["num_layers"]]) for preset in presets]
    assert found == [counts[1], counts[2], Work(a=9, b=1, c=6)]


def test_a_few_trainable_parameters_cost_less():
    everything, few = (tiny_cost(batch_size=32, trainable_parameters=value) for value in ("all", "difffit"))
    assert few.trainable_parameters < 0.1 * everything.trainable_parameters
    assert few.weight_bytes == everything.weight_bytes and few.average_bytes == everything.average_bytes
    assert 1.9 < few.training_flops / few.forward_flops < 2.1  # no products for gradients of matrices
    assert few.activation_bytes < everything.activation_bytes


# ------------------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize(
    ("trainable", "optimizer"),
    [("all", "adamw"), ("difffit", "adamw"), ("all", "adamw_8bit"), ("lora", "adamw")],
)
def test_states_are_those_of_a_real_step(tmp_path, trainable, optimizer):
    if optimizer == "adamw_8bit":
        pytest.importorskip("torchao")
    lora = LoraOptions(lora_rank=4, lora_latent_embedder=True) if trainable == "lora" else LoraOptions()
    trainable = "all" if trainable == "lora" else trainable
    args, model = tiny_model(tmp_path, "--trainable_parameters", trainable, "--optimizer", optimizer)
    if lora.lora_rank is not None:
        pytest.importorskip("peft")
        add_lora(model, lora)
    adam, ema = build_optimizer(args.optimizer, model), EMAModel(list(averaged_parameters(model).values()))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    with torch.compiler.set_stance("force_eager"):  # of torchao's step
        adam.step()

    def size(tensors) -> int:
        total = 0
        for tensor in tensors:
            parts = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else []
            total += sum(getattr(tensor, part).nbytes for part in parts) if parts else tensor.nbytes
        return total

    found = tiny_cost(num_averages=3, trainable_parameters=trainable, optimizer=optimizer, lora=lora)
    assert found.backbone_parameters == sum(parameter.numel() for parameter in model.transformer.parameters())
    assert found.latent_embedder_parameters == sum(weight.numel() for weight in model.latent_embedder.parameters())
    assert found.weight_bytes == size(model.parameters())
    assert found.gradient_bytes == size(weight.grad for weight in model.parameters() if weight.grad is not None)
    states = adam.state.values()
    assert found.moment_bytes == size(state[name] for state in states for name in ("exp_avg", "exp_avg_sq"))
    assert found.average_bytes == 3 * size(ema.shadow_params)


@pytest.mark.parametrize(
    ("mixed_precision", "checkpointing"), [("no", False), ("bf16", False), ("fp16", False), ("bf16", True)]
)
def test_kept_bytes_are_those_of_a_real_pass(tmp_path, mixed_precision, checkpointing):
    argv = ["--gradient_checkpointing"] if checkpointing else []
    _, model = tiny_model(tmp_path, *argv)
    latents, labels = torch.randn(4, *SHAPE), torch.zeros(4, dtype=torch.int64)
    batch = {"latents": latents, "noise": latents.clone(), "sigmas": torch.rand(4), "class_labels": labels}
    kept, weights = [], {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        kept.append(tensor)
        return tensor

    dtype = torch.float16 if mixed_precision == "fp16" else torch.bfloat16
    autocast = torch.autocast("cpu", dtype, enabled=mixed_precision != "no")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        loss = model(**batch, num_priors=2).mean()
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    real = sum(size for address, size in storages.items() if address not in weights)
    assert loss.requires_grad and real > 0

    found = tiny_cost(mixed_precision=mixed_precision, gradient_checkpointing=checkpointing)
    block = count_kept_bytes(tiny_model(tmp_path)[1], batch, 2, mixed_precision)[1] if checkpointing else 0
    assert found.activation_bytes == real + block


def test_a_block_keeps_what_it_keeps():
    """More blocks of a kind keep more of the same batch by what a single one does."""
    sizes = []
    for layers in (2, 4):
        with FakeTensorMode():
            model = DoDJointModel(DoDTransformer2DModel(**BACKBONE | {"num_layers": layers}))
            latents, labels = torch.empty(8, *SHAPE), torch.zeros(8, dtype=torch.int64)
            batch = {"latents": latents, "noise": latents.clone(), "sigmas": torch.empty(8), "class_labels": labels}
            sizes.append(count_kept_bytes(model, batch, 0, "no"))
    (two, block), (four, same_block) = sizes
    assert block == same_block and 0.99 * 2 * block < four - two <= 2 * block  # the first keeps the conditioning


def test_memory_of_several_processes():
    found = TrainingCost(90, 10, 60, 0.0, 0.0, moment_bytes=480, num_averages=2, activation_bytes=1000)
    weights, gradients, averages = 400, 240, 800
    assert (found.weight_bytes, found.gradient_bytes, found.average_bytes) == (weights, gradients, averages)
    states = weights + gradients + 480 + averages
    assert found.memory() == found.memory(1, "fsdp2") == found.memory(1, "zero2") == states + 1000
    assert found.memory(8) == states + gradients + 1000
    assert found.memory(8, "fsdp2") == states / 8 + 1000
    assert found.memory(8, "zero2") == states / 8 + weights + 1000
    with pytest.raises(ValueError, match=says("`num_processes`", ">= 1", "got 0")):
        found.memory(0)
    with pytest.raises(ValueError, match=says("`sharding`", "'none', 'zero2', 'fsdp2'", "got 'zero9'")):
        found.memory(8, "zero9")


# -------------------------------------------------------------------------------------------------------------- time


H100 = GPU(80e9, 1e12 / BANDWIDTH_SHARE, dict.fromkeys(("bf16", "fp16", "tf32", "fp32"), 1e12 / PEAK_SHARE))
# A second of matrix products that compute, and two of all else, which moves bytes; in 1000 operations.
WORK = Work({Operation("mm", 10**10, 1, torch.bfloat16): 100, Operation("add", 0, 10**10, torch.bfloat16): 200})
SIZES_OF_STATES = TrainingCost(10**9, 0, 10**9, 0.0, 0.0, moment_bytes=8 * 10**9, num_averages=2, activation_bytes=0)


def test_a_step_is_its_parts():
    step = estimate_step(WORK, SIZES_OF_STATES, H100, num_micro_batches=2, num_processes=8, data_seconds=0.5)
    assert (step.products, step.elementwise, step.gpu) == pytest.approx((2, 4, 6))
    assert step.launching == pytest.approx(600 * LAUNCH_SECONDS)
    # Reads and writes: 3 by clipping, 7 by AdamW, 3 by each average, 3 by the sum over micro-batches, of 4 GB each.
    assert step.optimizer == pytest.approx((3 + 7 + 2 * 3 + 3) * 4e-3)
    assert step.all_reduce == pytest.approx(2 * 7 / 8 * 4e9 / LINK_BANDWIDTH)
    assert step.total == pytest.approx(6 + step.optimizer)  # the rest is hidden
    compiled = estimate_step(WORK, SIZES_OF_STATES, H100, is_compiled=True)
    assert (compiled.products, compiled.elementwise) == pytest.approx((1, 2 * COMPILED_BYTES))
    assert compiled.launching == pytest.approx(300 * LAUNCH_SECONDS * COMPILED_LAUNCHES)
    assert compiled.all_reduce == 0


def test_the_slowest_part_of_a_step_counts():
    step = StepTime(products=1.0, elementwise=2.0, launching=0.5)
    assert step.total == 3
    assert replace(step, launching=4.0).total == 4
    assert replace(step, data=1.0).total == 3 and replace(step, data=4.0).total == 4.5
    assert replace(step, data=2.0, num_workers=2).total == 3 and replace(step, data=4.0, num_workers=2).total == 4
    assert replace(step, optimizer=1.0).total == 4
    assert replace(step, all_reduce=2.0).total == 3 and replace(step, all_reduce=2.5).total == 3.5


def test_workers_share_the_reading_of_a_batch():
    alone, shared = (
        estimate_step(WORK, SIZES_OF_STATES, H100, data_seconds=4.0, num_workers=number) for number in (0, 8)
    )
    assert (alone.data, shared.data) == (4.0, 0.5)
    assert alone.total == pytest.approx(4.0 + alone.launching + alone.optimizer)
    assert shared.total == pytest.approx(shared.gpu + shared.optimizer)


@pytest.mark.parametrize(("argv", "expected"), [((), 8), (("--dataloader_num_workers", 0), 0)])
def test_a_run_has_the_workers_that_cuda_has_by_default(tmp_path, argv, expected):
    run = cost._Run.count(options(tmp_path, "--preset", "Tiny", "--resolution", 8, *argv), num_processes=2)
    assert run.step_time(H100, is_compiled=False).num_workers == expected


def test_precision_decides_about_the_peak():
    peaks = {"bf16": 4e12, "fp16": 4e12, "tf32": 2e12, "fp32": 1e12}
    work = Work({Operation("mm", 10**12, 1, torch.float32): 1})
    gpu = GPU(80e9, 1e12, peaks)
    seconds = [estimate_step(work, SIZES_OF_STATES, gpu, precision).products for precision in ("fp32", "tf32", "bf16")]
    assert seconds == pytest.approx([1 / PEAK_SHARE, 0.5 / PEAK_SHARE, 1 / PEAK_SHARE])


def test_time_and_price():
    run = estimate_run(0.5, images_per_step=500, num_steps=7200, num_gpus=4, price_per_gpu_hour=3)
    assert run.images_per_second == 1000
    assert (run.hours, run.gpu_hours, run.price) == (1, 4, 12)
    assert GPUS["H100"].peak_flops["bf16"] == 989e12


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("step_seconds", 0, "(0, inf)"),
        ("step_seconds", float("nan"), "(0, inf)"),
        ("images_per_step", 0, ">= 1"),
        ("num_steps", 0, ">= 1"),
        ("num_gpus", 0, ">= 1"),
        ("price_per_gpu_hour", -1, "[0, inf)"),
    ],
)
def test_bad_estimates_are_refused(name, value, accepted):
    with pytest.raises(ValueError, match=says(f"`{name}`", accepted, f"got {value}")):
        estimate_run(**{"step_seconds": 1.0, "images_per_step": 1, "num_steps": 1, name: value})


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("batch_size", 0, ">= 1"),
        ("num_averages", -1, ">= 0"),
        ("prior_dropout_prob", 2, "[0, 1]"),
        ("mixed_precision", "fp8", "'no', 'fp16', 'bf16'"),
        ("optimizer", "sgd", ", ".join(map(repr, OPTIMIZERS))),
        ("trainable_parameters", "some", "'all', 'difffit'"),
    ],
)
def test_bad_settings_are_refused(name, value, accepted):
    with pytest.raises(ValueError, match=says(f"`{name}`", accepted, f"got {value!r}")):
        training_cost(TINY["Tiny"], SHAPE, options=TrainingStep(**{name: value}))


def test_the_shape_of_latents_is_three_numbers():
    with pytest.raises(ValueError, match=says("`latent_shape`", "(C, h, w)", "got (4, 8)")):
        training_cost(TINY["Tiny"], (4, 8))


# ----------------------------------------------------------------------------------------------------------- reports


RUN = "--preset Tiny --train_batch_size 4 --max_train_steps 100 --mixed_precision bf16".split()


def test_a_run_is_described_without_data(tmp_path):
    argv = "--resolution 8 --gradient_accumulation_steps 2 --hub_token secret-token --ema_decay 0.9 0.99".split()
    report = describe_run(options(tmp_path, *RUN, *argv), num_processes=3)
    found = training_cost(TINY["Tiny"], (3, 8, 8), CLASSES, TrainingStep(batch_size=4, num_averages=2))
    assert "secret-token" not in report and "hub_token" not in report
    assert "\n  max_train_steps: 100\n" in report and "\n  ema_decay: [0.9, 0.99]\n" in report
    assert f"{found.backbone_parameters:,} of the backbone, {found.latent_embedder_parameters:,} of the LEM" in report
    assert "latents: 3x8x8, 24 images per step, 2,400 in all" in report
    assert f"{24 * found.training_flops / 1e12:.1f} T per step" in report
    assert f"activations {found.activation_bytes / 1e9:.2f}" in report and "2 averages" in report
    assert "3 x H100:" in report and "3 x H200:" in report and "of 141 GB" in report
    assert "70% of 989 TFLOP/s (bf16, dense), 85% of 3.35 TB/s" in report and "$2.50 per GPU-hour" in report
    work = training_work(TINY["Tiny"], (3, 8, 8), CLASSES, TrainingStep(batch_size=4))
    assert f"{work.num_operations:,} operations" in report
    assert report.count("    eager: ") == report.count("    compiled: ") == 2
    eager = report.split("3 x H100:")[1].split("eager: ")[1]
    parallel = {"num_micro_batches": 2, "num_processes": 3}
    time = estimate_step(work, found, GPUS["H100"], **parallel, data_seconds=8 * 191e-6, num_workers=8).total
    assert f"{24 / time:,.0f} images/s" in eager.splitlines()[0]
    assert "12 classes: the data are not looked at" in report and "Computed, not measured" in report


def test_precision_and_processes_are_the_launchers(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    argv = "--preset Tiny-FiTv2 --resolution 8 --train_batch_size 4".split()
    report = describe_run(options(tmp_path, *argv))
    assert "2 x H100" in report and "latents: 3x8x8, 8 images per step" in report
    assert "70% of 67 TFLOP/s (fp32, dense)" in report
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    report = describe_run(options(tmp_path, *argv, "--num_processes", 5))
    assert "989 TFLOP/s (bf16, dense)" in report and "5 x H100" in report
    assert cost._precision(options(tmp_path, *argv, "--mixed_precision", "fp16")) == "fp16"
    assert cost._precision(options(tmp_path, *argv, "--mixed_precision", "no", "--allow_tf32")) == "tf32"


def test_latents_are_those_of_the_autoencoder(tmp_path):
    tiny_vae(latent_channels=6, latents_mean=None, latents_std=None).save_config(tmp_path / "vae")
    argv = [*RUN, "--resolution", 16, "--pretrained_vae_name_or_path"]
    args = options(tmp_path, *argv, tmp_path / "vae")
    assert cost._find_latents(args) == ((6, 8, 8), CLASSES, ["12 classes: the data are not looked at"])
    shape, _, assumptions = cost._find_latents(options(tmp_path, *argv, tmp_path / "no-vae"))
    assert shape == (4, 2, 2) and "latents of 4 channels and 8 pixels a side" in assumptions[1]
    assert "a model of pixels" in cost._find_latents(options(tmp_path, *RUN, "--resolution", 16))[2][1]
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")  # its own is the default
    argv_of_pipeline = [*RUN, "--resolution", 16, "--pretrained_model_name_or_path", tmp_path / "pipeline"]
    assert cost._find_latents(options(tmp_path, *argv_of_pipeline))[0] == (4, 8, 8)
    load_autoencoder(None, torch.device("cpu"), str(tmp_path / "pipeline"))
    assert cost._find_latents(args)[0] == (6, 8, 8)
    tiny_pipeline().transformer.save_config(tmp_path / "transformer")
    with pytest.raises(TypeError, match=says("`pretrained_vae_name_or_path`", "AutoencoderKL", "DoDTransformer")):
        describe_run(options(tmp_path, *argv, tmp_path / "transformer"))


@pytest.mark.parametrize("is_given", [True, False])
def test_latents_that_are_there_say_what_they_are(tmp_path, is_given):
    folder = tmp_path / "latents" if is_given else tmp_path / "run" / "latents"
    folder.mkdir(parents=True)
    manifest = {"latent_shape": [5, 16, 16], "class_names": ["a", "b", "c"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    args = options(tmp_path, *RUN, *(["--latents_dir", folder] if is_given else []))
    assert cost._find_latents(args) == ((5, 16, 16), 3, [])


def parameters_of(report: str) -> list[int]:
    line = next(line for line in report.splitlines() if line.startswith("  parameters:"))
    return [int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", line)]


@pytest.mark.parametrize("is_plain", [False, True])
def test_a_saved_model_is_described_by_its_configs(tmp_path, is_plain):
    """A plain FiTv2 becomes the backbone of a DoD; the count is that of what the trainer builds."""
    pipe = tiny_pipeline(vae=None, in_channels=4, **({"latent_embedder": None} if is_plain else {}))
    pipe.save_pretrained(tmp_path / "model")
    argv = [*RUN, "--resolution", 16, "--pretrained_model_name_or_path", tmp_path / "model"]
    tiny_vae().save_config(tmp_path / "vae")
    args = options(tmp_path, *argv, "--pretrained_vae_name_or_path", tmp_path / "vae")
    model = build_models(args.model, (4, 8, 8), CLASSES)
    sizes = [sum(weight.numel() for weight in part.parameters()) for part in model.children()]
    assert parameters_of(describe_run(args)) == [*sizes, sum(sizes)]


def test_a_saved_model_out_of_reach_is_assumed(tmp_path):
    args = options(tmp_path, *RUN, "--pretrained_model_name_or_path", tmp_path / "no-model")
    preset, assumptions = cost.find_preset(args)
    assert preset == TINY["Tiny"] and "a model of the preset's size" in assumptions[0]


def test_other_latent_tokens(tmp_path):
    args = options(tmp_path, *RUN, "--num_latent_tokens", 6)
    assert cost.find_preset(args)[0].latent_embedder_config == LEM | {"num_latent_tokens": 6}


def rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("| ")]


def test_the_tables_of_the_documentation_are_those_of_the_command(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    cost.main(["training/recipes/fitv2-b-imagenet256.yaml"])
    printed = rows(capsys.readouterr().out)
    assert len(printed) == 12 and sum("fitv2-b-imagenet256" in row for row in printed) == 4
    assert [row for row in printed if row not in DOCUMENT.splitlines()] == []


@pytest.mark.slow
def test_the_documentation_has_all_that_the_command_prints(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    cost.main([])
    assert capsys.readouterr().out.strip() in DOCUMENT


def test_the_options_of_the_command(monkeypatch, capsys, tmp_path):
    recipe = tmp_path / "small.yaml"
    recipe.write_text("preset: Tiny-FiTv2\nresolution: 8\ntrain_batch_size: 2\nmax_train_steps: 500000\n")
    cost.main([str(recipe), "--gpu", "H200", "--utilisation", "0.2", "--price", "10", "--num_processes", "4"])
    captured = capsys.readouterr()
    assert "H200 of 141 GB" in captured.out and "20% of 67 TFLOP/s (fp32, dense), $10.00" in captured.out
    assert "| small | 3x8x8 |" in captured.out and "| 4.0 |" in captured.out  # million images
    assert "hours, 20% utilisation |" in captured.out and "A step on" not in captured.out
    assert "12 classes" in captured.err
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cost.main(["dod-m-imagenet256"])
    assert "`recipes` must be a YAML file, or one of the recipes" in capsys.readouterr().err


@pytest.mark.parametrize(("num_processes", "batch_size", "expected"), [(8, 32, 0.10), (64, 4, 0.40)])
def test_waiting_for_the_process_with_the_most_priors(num_processes, batch_size, expected):
    """Numbers of docs/training.md: how much longer than the mean of independent micro-batches the longest takes."""
    plain, with_prior = (flops_of_base(number)[1] for number in (0, 1))
    assert with_prior / plain == pytest.approx(2.3, abs=0.05)
    num_priors = np.random.default_rng(0).binomial(batch_size, 0.5, size=(20_000, num_processes))
    flops = (batch_size - num_priors) * plain + num_priors * with_prior
    assert flops.max(axis=1).mean() / flops.mean() - 1 == pytest.approx(expected, abs=0.01)
