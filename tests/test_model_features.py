"""What Diffusers' model API promises, for the backbone (with and without priors) and the latent embedder alike."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.utils import send_to_device
from diffusers import (
    AutoModel,
    BitsAndBytesConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    TorchAoConfig,
)
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.training_utils import EMAModel
from helpers import says, tiny_latent_embedder, tiny_transformer
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounter
from torch.export import Dim

from diffusers_dod import DoDTransformer2DModel, LatentEmbeddingModule
from diffusers_dod.transformer_dod import DoDAttnProcessor


CLASSES = {
    "transformer": DoDTransformer2DModel,
    "transformer with priors": DoDTransformer2DModel,
    "latent embedder": LatentEmbeddingModule,
}
PRIORS = "transformer with priors"
every_model = pytest.mark.parametrize("name", ["transformer", "latent embedder"])
every_case = pytest.mark.parametrize("name", CLASSES)
WEIGHTS = "diffusion_pytorch_model.safetensors"
ATTENTION_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
# Wide enough for the layers that are stored in fewer bits to outweigh the others.
WIDE = {"num_attention_heads": 4, "attention_head_dim": 64}


def make(name: str, **overrides) -> torch.nn.Module:
    return tiny_latent_embedder(**overrides) if name == "latent embedder" else tiny_transformer(**overrides)


def inputs(
    name: str, seed: int = 0, batch_size: int = 4, height: int = 8, width: int = 8, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Random arguments of a model, with priors for the first two samples of `PRIORS`."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch_size, 4, height, width, generator=generator).to(dtype)
    if name == "latent embedder":
        return {"latents": latents}
    arguments = {
        "hidden_states": latents,
        "timestep": torch.rand(batch_size, generator=generator) * 1000,
        "class_labels": torch.randint(0, 11, (batch_size,), generator=generator),
    }
    if name == PRIORS:
        arguments["prior_embeds"] = torch.randn(2, height * width // 4, 32, generator=generator).to(dtype)
    return arguments


def run(model: torch.nn.Module, name: str, attention_kwargs: dict | None = None, **kwargs) -> torch.Tensor:
    return model(**inputs(name, **kwargs), attention_kwargs=attention_kwargs, return_dict=False)[0]


def blocks_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    if isinstance(model, LatentEmbeddingModule):
        return [*model.encoder_blocks, *model.decoder_blocks]
    return list(model.transformer_blocks)


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value.float() - expected.float()).norm() / expected.float().norm()).item()


def assert_same_weights(model: torch.nn.Module, other: torch.nn.Module) -> None:
    weights, others = model.state_dict(), other.state_dict()
    assert list(weights) == list(others)
    for key, value in weights.items():
        assert torch.equal(value, others[key]), key


class Calls:
    """Counts the forward passes of modules, one count per module and round."""

    def __init__(self, modules: list[torch.nn.Module]):
        self.counts = [0] * len(modules)
        for i, module in enumerate(modules):
            module.register_forward_hook(lambda *args, i=i: self._count(i))

    def _count(self, i: int) -> None:
        self.counts[i] += 1

    def take(self) -> list[int]:
        """The counts since the last time."""
        counts, self.counts = self.counts, [0] * len(self.counts)
        return counts


# Saving and loading


@every_model
def test_variants_have_names_of_their_own(name, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path, variant="fp16")
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.fp16.safetensors"}
    assert_same_weights(type(model).from_pretrained(tmp_path, variant="fp16"), model)
    with pytest.raises(OSError, match=says(type(model).__name__, str(tmp_path))):
        type(model).from_pretrained(tmp_path)


@every_model
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards(name, variant, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path, max_shard_size="20KB", variant=variant)
    index_file = tmp_path / f"{WEIGHTS}.index.{'' if variant is None else variant + '.'}json"
    weight_map = json.loads(index_file.read_text())["weight_map"]
    assert set(weight_map) == set(model.state_dict())
    assert len(set(weight_map.values())) > 2
    assert not (tmp_path / WEIGHTS).exists()
    assert_same_weights(type(model).from_pretrained(tmp_path, variant=variant), model)


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_models_load_in_half_precision_but_for_what_must_stay_precise(name, dtype, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype
    in_fp32 = {key for key, value in loaded.state_dict().items() if value.dtype == torch.float32}
    in_half = {key for key, value in loaded.state_dict().items() if value.dtype == dtype}
    assert in_fp32 == {key for key in model.state_dict() if key.startswith("time_embed.")}
    assert in_fp32 | in_half == set(model.state_dict())
    output = run(loaded, name, dtype=dtype)
    assert output.dtype == dtype
    assert relative_error(output, run(model, name)) < 0.03  # measured: up to 0.009 in bf16


@every_model
def test_a_model_saved_again_has_the_same_config(name, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path / "first")
    loaded = type(model).from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    first, second = ((tmp_path / folder / "config.json").read_text() for folder in ("first", "second"))
    assert first == second
    assert "_name_or_path" not in first
    assert loaded.config._name_or_path == tmp_path / "first"  # only what is saved lacks it


def save_with_foreign_weight(name: str, folder: Path) -> torch.nn.Module:
    """Saves a model, one weight of which gets another name."""
    model = make(name)
    model.save_pretrained(folder)
    weights = load_file(folder / WEIGHTS)
    weights["foreign.weight"] = weights.pop("proj_out.weight")
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    return model


@every_model
def test_weights_of_another_model_are_refused(name, tmp_path):
    model = save_with_foreign_weight(name, tmp_path)
    fragments = (
        f"`pretrained_model_name_or_path` must hold the config and the weights of a `{type(model).__name__}`",
        str(tmp_path),
        "1 weights are missing (proj_out.weight) and 1 are unknown (foreign.weight)",
    )
    with pytest.raises(ValueError, match=says(*fragments)):
        type(model).from_pretrained(tmp_path)


@every_model
def test_whoever_asks_for_the_loading_info_gets_incomplete_weights(name, tmp_path):
    model = save_with_foreign_weight(name, tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model)
    assert (info["missing_keys"], info["unexpected_keys"]) == (["proj_out.weight"], ["foreign.weight"])
    assert torch.equal(loaded.x_embedder.weight, model.x_embedder.weight)


@every_model
def test_weights_of_other_sizes_are_refused(name, tmp_path):
    make(name).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "in_channels": 3}))
    with pytest.raises(ValueError, match=says(CLASSES[name].__name__, str(tmp_path), "12]", "16]")):
        CLASSES[name].from_pretrained(tmp_path)


def test_weights_of_other_sizes_are_left_out_where_this_is_asked_for(tmp_path):
    """The latent embedder only: Diffusers refuses it for models with layers that stay in fp32."""
    model = make("latent embedder")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "in_channels": 3}))
    loaded = type(model).from_pretrained(tmp_path, ignore_mismatched_sizes=True, low_cpu_mem_usage=False)
    assert loaded.x_embedder.weight.shape == (32, 12)
    assert torch.equal(loaded.proj_out.weight, model.proj_out.weight)


@every_model
def test_a_truncated_file_is_refused_with_its_reason(name, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[: len(content) // 2])
    fragments = (f"weights of a `{type(model).__name__}`, got {str(tmp_path)!r}", WEIGHTS, "incomplete metadata")
    with pytest.raises(OSError, match=says(*fragments)):
        type(model).from_pretrained(tmp_path)


@every_model
def test_the_config_of_another_class_is_refused(name, tmp_path):
    make(name).save_pretrained(tmp_path)
    cls, other = DoDTransformer2DModel, LatentEmbeddingModule
    if name == "transformer":
        cls, other = other, cls
    fragments = (f"must hold a `{cls.__name__}`", str(tmp_path), f"that of a `{other.__name__}`")
    for load in (cls.from_pretrained, cls.load_config):
        with pytest.raises(ValueError, match=says(*fragments)):
            load(tmp_path)


@every_model
@pytest.mark.parametrize("missing", ["folder", "config.json", WEIGHTS])
def test_what_is_missing_is_named(name, missing, tmp_path):
    folder = tmp_path / "model"
    model = make(name)
    if missing != "folder":
        model.save_pretrained(folder)
        (folder / missing).unlink()
    fragments = [f"`{type(model).__name__}`", str(folder)]
    if missing == "config.json":
        fragments.append(missing)
    with pytest.raises(OSError, match=says(*fragments)):
        type(model).from_pretrained(folder)


@every_model
def test_pickled_weights_are_read_unless_safetensors_are_asked_for(name, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.bin"}
    assert_same_weights(type(model).from_pretrained(tmp_path), model)
    with pytest.raises(OSError, match=says(type(model).__name__, str(tmp_path), WEIGHTS)):
        type(model).from_pretrained(tmp_path, use_safetensors=True)


@every_model
def test_auto_model_and_from_config(name, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(str(tmp_path))
    assert type(loaded) is type(model) and not loaded.training
    assert_same_weights(loaded, model)
    for cls in (type(model), AutoModel):
        fresh = cls.from_config(loaded.config)
        assert type(fresh) is type(model)
        public = [{key: value for key, value in m.config.items() if key[0] != "_"} for m in (model, fresh)]
        assert public[0] == public[1]


@every_model
def test_moving_averages_are_saved_and_loaded(name, tmp_path):
    model = make(name)
    ema = EMAModel(model.parameters(), decay=0.5, model_cls=type(model), model_config=model.config)
    start = make(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    ema.step(model.parameters())
    ema.save_pretrained(tmp_path)
    loaded = EMAModel.from_pretrained(tmp_path, type(model))
    assert loaded.optimization_step == 1 and loaded.decay == 0.5
    loaded.copy_to(start.parameters())
    for average, parameter in zip(start.parameters(), ema.shadow_params, strict=True):
        assert torch.equal(average, parameter)


# Training


@every_case
def test_gradient_checkpointing_runs_every_block_twice(name):
    results = []
    for checkpointing in (False, True):
        model = make(name).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        assert model.is_gradient_checkpointing is checkpointing
        calls = Calls([block.attn for block in blocks_of(model)])
        output = run(model, name)
        output.square().mean().backward()
        assert set(calls.take()) == {2 if checkpointing else 1}
        results.append((output, {key: parameter.grad for key, parameter in model.named_parameters()}))
        with torch.no_grad():
            run(model, name)
        assert set(calls.take()) == {1}
    (output, gradients), (checkpointed, recomputed) = results
    assert torch.equal(checkpointed, output)
    for key, gradient in gradients.items():
        if gradient is None:  # the prior projection, without priors
            assert recomputed[key] is None and key.startswith("prior_proj") and name == "transformer"
        else:
            torch.testing.assert_close(recomputed[key], gradient, msg=key)
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing
    run(model, name).square().mean().backward()
    assert set(calls.take()) == {1}


# Attention


class RecordingProcessor(DoDAttnProcessor):
    def __init__(self):
        self.calls = []

    def __call__(self, attn, hidden_states, image_rotary_emb=None, note=None):
        self.calls.append((tuple(hidden_states.shape), image_rotary_emb is not None, note))
        return super().__call__(attn, hidden_states, image_rotary_emb)


@every_case
@torch.no_grad()
def test_attention_processors_are_replaced(name):
    model = make(name)
    expected = run(model, name)
    num_blocks = len(blocks_of(model))
    assert len(model.attn_processors) == num_blocks
    assert all(type(processor) is DoDAttnProcessor for processor in model.attn_processors.values())

    shared = RecordingProcessor()
    model.set_attn_processor(shared)
    assert torch.equal(run(model, name), expected)
    # The latent embedder's 4 latent tokens go through its blocks together with the 16 patches.
    call = ((4, 20, 32), False, None) if name == "latent embedder" else ((4, 16, 32), True, None)
    assert shared.calls == [call] * num_blocks

    own = {key: RecordingProcessor() for key in model.attn_processors}
    model.set_attn_processor(dict(own))
    assert torch.equal(run(model, name), expected)
    assert model.attn_processors == own
    assert [len(processor.calls) for processor in own.values()] == [1] * num_blocks
    assert len(shared.calls) == num_blocks

    too_few = dict(list(own.items())[1:])
    with pytest.raises(ValueError, match=says("number of processors", str(num_blocks - 1), str(num_blocks))):
        model.set_attn_processor(too_few)


@torch.no_grad()
def test_attention_kwargs_reach_the_processors():
    model = make("transformer")
    processor = RecordingProcessor()
    model.set_attn_processor(processor)
    run(model, "transformer", attention_kwargs={"note": "here"})
    assert [note for _, _, note in processor.calls] == ["here", "here"]
    with pytest.raises(ValueError, match=says("`attention_kwargs`", "'scale'", "note")):
        run(make("latent embedder"), "latent embedder", attention_kwargs={"note": "here"})


@pytest.fixture
def default_attention_backend():
    """`set_attention_backend` changes the backend of all models of a process."""
    backend, _ = _AttentionBackendRegistry.get_active_backend()
    yield backend
    _AttentionBackendRegistry.set_active_backend(backend)


@every_case
@torch.no_grad()
def test_attention_backends(name, default_attention_backend):
    model = make(name)
    expected = run(model, name)
    for backend in ("native", "_native_math"):
        model.set_attention_backend(backend)
        assert {processor._attention_backend.value for processor in model.attn_processors.values()} == {backend}
        torch.testing.assert_close(run(model, name), expected, atol=1e-5, rtol=1e-5)
    model.reset_attention_backend()
    assert {processor._attention_backend for processor in model.attn_processors.values()} == {None}
    with pytest.raises(ValueError, match="no_such_backend"):
        model.set_attention_backend("no_such_backend")


@torch.no_grad()
def test_the_chosen_attention_backend_is_the_one_that_computes(default_attention_backend, monkeypatch):
    model = make("transformer")
    model.set_attention_backend("_native_math")
    _AttentionBackendRegistry.set_active_backend(default_attention_backend)  # what is left is the model's own choice
    monkeypatch.setitem(
        _AttentionBackendRegistry._backends,
        AttentionBackendName._NATIVE_MATH,
        lambda query, key, value, **kwargs: torch.zeros_like(query),
    )
    calls = []
    for block in blocks_of(model):
        block.attn.to_out[0].register_forward_pre_hook(lambda module, args: calls.append(args[0].abs().max().item()))
    run(model, "transformer")
    assert calls == [0, 0]


@every_case
@torch.no_grad()
def test_fused_projections_are_one_layer(name):
    model = make(name)
    expected = run(model, name)
    keys = set(model.state_dict())
    model.fuse_qkv_projections()
    assert all(block.attn.to_qkv.weight.shape == (96, 32) for block in blocks_of(model))
    calls = Calls([block.attn.to_qkv for block in blocks_of(model)] + [block.attn.to_q for block in blocks_of(model)])
    torch.testing.assert_close(run(model, name), expected, atol=1e-5, rtol=1e-5)
    num_blocks = len(blocks_of(model))
    assert calls.take() == [1] * num_blocks + [0] * num_blocks
    model.unfuse_qkv_projections()
    assert set(model.state_dict()) == keys
    assert torch.equal(run(model, name), expected)


# Compilation


@every_case
@torch.no_grad()
def test_compiles_as_one_graph_and_only_once(name, fresh_compiler):
    model = make(name)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (0, 1):
            output = compiled(**inputs(name, seed=seed), return_dict=False)[0]
            torch.testing.assert_close(output, run(model, name, seed=seed))


@pytest.mark.slow
@every_case
@torch.no_grad()
def test_one_dynamic_graph_serves_every_size(name, fresh_compiler):
    one_block = {"num_layers": 1} if name != "latent embedder" else {}
    model = make(name, **one_block)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    # Sizes that happen to be equal in the first call are not taken for the same.
    with torch.fx.experimental._config.patch(use_duck_shape=False):
        with torch._dynamo.config.patch(error_on_recompile=True):
            for batch_size, height, width in ((4, 8, 8), (4, 8, 12), (5, 12, 8), (6, 16, 16)):
                sizes = {"batch_size": batch_size, "height": height, "width": width}
                output = compiled(**inputs(name, **sizes), return_dict=False)[0]
                torch.testing.assert_close(output, run(model, name, **sizes))


@every_model
@torch.no_grad()
def test_repeated_blocks_are_compiled_once(name, fresh_compiler):
    deeper = {"num_encoder_layers": 2, "num_decoder_layers": 2} if name == "latent embedder" else {"num_layers": 3}
    model = make(name, **deeper)
    expected = run(model, name)
    counter = CompileCounter()
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    for seed in (0, 1):
        output = run(model, name, seed=seed)
    assert counter.frame_count == 1
    torch.testing.assert_close(run(model, name), expected)
    assert not torch.equal(output, expected)
    if name == "transformer":  # a batch of which a part has priors is another graph, and neither drives the other out
        for layout in (PRIORS, "transformer") * 2:
            run(model, layout)
        assert counter.frame_count == 2


@pytest.mark.slow
@every_case
@torch.no_grad()
def test_exports_for_every_size(name):
    model = make(name)
    batch, rows, columns = Dim("batch", min=4, max=64), Dim("rows", min=2, max=32), Dim("columns", min=2, max=32)
    latents = {0: batch, 2: 2 * rows, 3: 2 * columns}
    dynamic_shapes = {
        "latents": latents,
        "hidden_states": latents,
        "timestep": {0: batch},
        "class_labels": {0: batch},
        "prior_embeds": {1: Dim.AUTO},
    }
    example = inputs(name, batch_size=5, height=8, width=12)
    exported = torch.export.export(model, (), example, dynamic_shapes={key: dynamic_shapes[key] for key in example})
    other = {"batch_size": 6, "height": 12, "width": 16}
    torch.testing.assert_close(exported.module()(**inputs(name, **other))[0], run(model, name, **other))


@pytest.mark.slow
@pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "c++"), "c++", "g++", "clang++"))),
    reason="Inductor needs a C++ compiler",
)
@every_case
@torch.no_grad()
def test_inductor_agrees_with_eager(name, fresh_compiler):
    model = make(name)
    expected = run(model, name)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(**inputs(name), return_dict=False)[0], expected, atol=1e-5, rtol=1e-5)
    model.compile_repeated_blocks(fullgraph=True)
    torch.testing.assert_close(run(model, name), expected, atol=1e-5, rtol=1e-5)


# Where the weights are


@every_case
@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}], ids=["auto", "cpu"])
@torch.no_grad()
def test_device_maps(name, device_map, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, device_map=device_map)
    assert set(map(str, loaded.hf_device_map.values())) <= {"cpu", "0"}
    torch.testing.assert_close(run(loaded, name).cpu(), run(model, name), atol=1e-5, rtol=1e-5)


@every_case
@torch.no_grad()
def test_a_part_is_offloaded_to_disk(name, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path / "model")
    on_disk = ["encoder_blocks", "to_latent"] if name == "latent embedder" else ["transformer_blocks.1", "prior_proj"]
    in_memory = [key for key, _ in [*model.named_children(), *model.named_parameters(recurse=False)]]
    if name != "latent embedder":
        in_memory[in_memory.index("transformer_blocks")] = "transformer_blocks.0"
    device_map = {**dict.fromkeys(in_memory, "cpu"), **dict.fromkeys(on_disk, "disk")}
    loaded = type(model).from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=str(tmp_path / "offloaded")
    )
    away = {key for key, parameter in loaded.named_parameters() if parameter.device.type == "meta"}
    assert away == {key for key, _ in model.named_parameters() if key.startswith(tuple(on_disk))}
    for seed in (0, 1):
        torch.testing.assert_close(run(loaded, name, seed=seed), run(model, name, seed=seed))


@every_model
@torch.no_grad()
def test_outputs_can_be_moved(name):
    output = make(name)(**inputs(name))
    moved = send_to_device(output, "cpu")  # by accelerate's hooks, which build it anew
    assert type(moved) is type(output)
    torch.testing.assert_close(dict(moved), dict(output))


@every_case
@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
@pytest.mark.parametrize("to_disk", [False, True], ids=["memory", "disk"])
@torch.no_grad()
def test_group_offload(name, offload_type, to_disk, tmp_path):
    model = make(name)
    expected = [run(model, name, seed=seed) for seed in (0, 1)]
    model.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type=offload_type,
        num_blocks_per_group=1 if offload_type == "block_level" else None,
        offload_to_disk_path=str(tmp_path) if to_disk else None,
    )
    assert bool(list(tmp_path.glob("*.safetensors"))) == to_disk
    for seed in (0, 1):
        torch.testing.assert_close(run(model, name, seed=seed), expected[seed])


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
@torch.no_grad()
def test_encode_and_decode_alone_under_group_offload(offload_type, tmp_path):
    model = make("latent embedder")
    latents = inputs("latent embedder")["latents"]
    latent_tokens = model.encode(latents)
    prior_embeds = model.decode(latent_tokens, 8, 8)
    model.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type=offload_type,
        num_blocks_per_group=1 if offload_type == "block_level" else None,
        offload_to_disk_path=str(tmp_path),
    )
    torch.testing.assert_close(model.encode(latents), latent_tokens)
    torch.testing.assert_close(model.decode(latent_tokens, 8, 8), prior_embeds)


def test_no_parallel_plan_is_shipped():
    for cls in (DoDTransformer2DModel, LatentEmbeddingModule):
        assert cls._cp_plan is None and cls._tp_plan is None


# Caches


@pytest.fixture
def cached_model():
    """A backbone of four blocks, and counters of the passes through them."""
    model = make("transformer", num_layers=4)
    return model, Calls([block.attn.to_q for block in model.transformer_blocks])


def output_with_residual(seed: int, residual_seed: int, first: int) -> torch.Tensor:
    """
    The output for the inputs of `seed` whose blocks from `first` on are replaced by what the same blocks added to the
    hidden states for the inputs of `residual_seed`.
    """
    model = make("transformer", num_layers=4)
    before, after = {}, {}
    blocks = model.transformer_blocks
    for s in (seed, residual_seed):
        handles = [
            blocks[first].register_forward_pre_hook(lambda module, args, s=s: before.update({s: args[0]})),
            blocks[-1].register_forward_hook(lambda module, args, output, s=s: after.update({s: output})),
        ]
        run(model, PRIORS, seed=s)
        for handle in handles:
            handle.remove()
    hidden_states = before[seed] + after[residual_seed] - before[residual_seed]
    blocks[-1].register_forward_hook(lambda *args: hidden_states)
    return run(model, PRIORS, seed=seed)


@torch.no_grad()
def test_first_block_cache_with_threshold_zero_changes_nothing(cached_model):
    model, calls = cached_model
    expected = [run(model, PRIORS, seed=seed) for seed in range(3)]
    calls.take()
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    with model.cache_context("cond"):
        for seed in range(3):
            assert torch.equal(run(model, PRIORS, seed=seed), expected[seed])
            assert calls.take() == [1, 1, 1, 1]


@torch.no_grad()
def test_first_block_cache_skips_all_blocks_but_the_first(cached_model):
    model, calls = cached_model
    model.enable_cache(FirstBlockCacheConfig(threshold=1e6))
    assert model.is_cache_enabled
    with model.cache_context("cond"):
        run(model, PRIORS, seed=0)
        assert calls.take() == [1, 1, 1, 1]
        output = run(model, PRIORS, seed=1)
        assert calls.take() == [1, 0, 0, 0]
    torch.testing.assert_close(output, output_with_residual(1, 0, first=1), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_mag_cache_skips_all_blocks(cached_model):
    model, calls = cached_model
    model.enable_cache(MagCacheConfig(threshold=1e6, num_inference_steps=4, retention_ratio=0.0, mag_ratios=[1.0] * 4))
    with model.cache_context("cond"):
        run(model, PRIORS, seed=0)
        assert calls.take() == [1, 1, 1, 1]
        output = run(model, PRIORS, seed=1)
        assert calls.take() == [0, 0, 0, 0]
    torch.testing.assert_close(output, output_with_residual(1, 0, first=0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        FirstBlockCacheConfig(threshold=1e6),
        MagCacheConfig(threshold=1e6, num_inference_steps=9, retention_ratio=0.0, mag_ratios=[1.0] * 9),
        TaylorSeerCacheConfig(cache_interval=4, disable_cache_before_step=1, taylor_factors_dtype=torch.float32),
    ],
    ids=lambda config: type(config).__name__,
)
@torch.no_grad()
def test_cache_contexts_do_not_mix_and_end_with_a_reset(cached_model, config):
    model, calls = cached_model
    expected = run(model, PRIORS, seed=1)
    model.enable_cache(config)
    with model.cache_context("alone"):
        run(model, PRIORS, seed=0)
        cached = run(model, PRIORS, seed=1)
    assert not torch.allclose(cached, expected, atol=1e-3)
    model._reset_stateful_cache()

    calls.take()
    with model.cache_context("cond"):
        run(model, PRIORS, seed=0)
    with model.cache_context("uncond"):
        run(model, PRIORS, seed=2)
    assert calls.take() == [2, 2, 2, 2]  # neither the reset nor the other context left anything to reuse
    with model.cache_context("cond"):
        assert torch.equal(run(model, PRIORS, seed=1), cached)

    with pytest.raises(ValueError, match="already been enabled"):
        model.enable_cache(config)
    model.disable_cache()
    assert not model.is_cache_enabled
    calls.take()
    assert torch.equal(run(model, PRIORS, seed=1), expected)
    assert calls.take() == [1, 1, 1, 1]


@torch.no_grad()
def test_pyramid_attention_broadcast_computes_every_second_attention(cached_model):
    model, calls = cached_model
    expected = run(model, PRIORS, seed=0)
    calls.take()
    timestep = 500
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: timestep
    )
    model.enable_cache(config)
    outputs = [run(model, PRIORS, seed=seed) for seed in (0, 0, 1, 1)]
    assert calls.take() == [2, 2, 2, 2]
    assert torch.equal(outputs[0], expected) and torch.equal(outputs[1], expected)
    assert not torch.equal(outputs[2], expected) and torch.equal(outputs[3], outputs[2])
    timestep = 900  # not in the range in which it skips
    run(model, PRIORS, seed=0)
    run(model, PRIORS, seed=0)
    assert calls.take() == [2, 2, 2, 2]
    model._reset_stateful_cache()
    timestep = 500
    assert torch.equal(run(model, PRIORS, seed=0), expected)
    assert calls.take() == [1, 1, 1, 1]
    model.disable_cache()
    assert torch.equal(run(model, PRIORS, seed=0), expected)


@torch.no_grad()
def test_taylorseer_predicts_the_attention(cached_model):
    model, calls = cached_model
    expected = run(model, PRIORS)
    calls.take()
    config = TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=1, max_order=1, taylor_factors_dtype=torch.float32
    )
    model.enable_cache(config)
    computed = []
    with model.cache_context("cond"):
        for _ in range(5):  # of a constant the prediction is exact
            torch.testing.assert_close(run(model, PRIORS), expected, atol=1e-5, rtol=1e-5)
            computed.append(calls.take())
    assert computed == [[1] * 4, [0] * 4, [1] * 4, [0] * 4, [1] * 4]


# LoRA


@pytest.fixture
def lora_config():
    peft = pytest.importorskip("peft")

    def config(**overrides):
        return peft.LoraConfig(
            **{"r": 2, "lora_alpha": 2, "target_modules": ATTENTION_LAYERS, "init_lora_weights": False, **overrides}
        )

    return config


def make_with_lora(name: str, config, seed: int = 0, adapter_name: str = "default") -> torch.nn.Module:
    """A model with an adapter of random weights."""
    torch.manual_seed(seed)
    model = make(name)
    model.add_adapter(config, adapter_name=adapter_name)
    return model


@every_case
def test_only_the_adapter_learns_and_it_starts_as_nothing(name, lora_config):
    expected = run(make(name), name)
    model = make(name)
    model.add_adapter(lora_config(init_lora_weights=True))
    output = run(model, name)
    torch.testing.assert_close(output, expected)
    output.square().mean().backward()
    learning = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {key for key, _ in model.named_parameters() if "lora_" in key}
    assert len(learning) == 2 * 4 * len(blocks_of(model))
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (key in learning), key
        # B starts at zero, so that A has no gradient yet; what is added to all keys cannot change a softmax.
        if "lora_B" in key:
            assert parameter.grad.abs().max() > 0, key


@every_case
@torch.no_grad()
def test_adapters_are_saved_and_loaded(name, lora_config, tmp_path):
    base = run(make(name), name)
    model = make_with_lora(name, lora_config(lora_alpha=6))
    adapted = run(model, name)
    assert not torch.allclose(adapted, base, atol=1e-3)
    model.save_lora_adapter(tmp_path)
    fresh = make(name)
    fresh.load_lora_adapter(tmp_path, prefix=None, adapter_name="again", use_safetensors=True)
    assert fresh.peft_config["again"].lora_alpha == 6
    torch.testing.assert_close(run(fresh, name), adapted)
    fresh.unload_lora()
    assert_same_weights(fresh, make(name))
    assert torch.equal(run(fresh, name), base)


@every_case
@torch.no_grad()
def test_weights_of_adapters(name, lora_config):
    base = run(make(name), name)
    model = make_with_lora(name, lora_config(), adapter_name="one")
    one = run(model, name)
    model.add_adapter(lora_config(), adapter_name="two")
    model.set_adapter("two")
    two = run(model, name)
    assert not torch.allclose(one, two, atol=1e-3)

    model.set_adapters(["one", "two"], [1.0, 0.0])
    torch.testing.assert_close(run(model, name), one)
    model.set_adapters("one", 0.5)
    half = run(model, name)
    assert not torch.allclose(half, one, atol=1e-3) and not torch.allclose(half, base, atol=1e-3)
    model.set_adapters("one", 1.0)
    torch.testing.assert_close(run(model, name, attention_kwargs={"scale": 0.5}), half)
    torch.testing.assert_close(run(model, name, attention_kwargs={"scale": 0.0}), base)
    torch.testing.assert_close(run(model, name), one)  # the scale held for that call only

    model.disable_adapters()
    assert torch.equal(run(model, name), base)
    model.enable_adapters()
    model.delete_adapters("one")
    assert set(model.peft_config) == {"two"}
    model.set_adapters("two")
    torch.testing.assert_close(run(model, name), two)


@every_case
@torch.no_grad()
def test_fused_adapters_give_the_same_output(name, lora_config):
    base = run(make(name), name)
    model = make_with_lora(name, lora_config())
    adapted = run(model, name)
    layer = blocks_of(model)[0].attn.to_q
    calls = Calls([layer.lora_A["default"]])
    model.fuse_lora()
    torch.testing.assert_close(run(model, name), adapted, atol=1e-5, rtol=1e-5)
    assert calls.take() == [0]
    model.unfuse_lora()
    torch.testing.assert_close(run(model, name), adapted, atol=1e-5, rtol=1e-5)
    assert calls.take() == [1]
    model.unload_lora()
    torch.testing.assert_close(run(model, name), base, atol=1e-5, rtol=1e-5)


@every_model
@torch.no_grad()
def test_adapters_are_swapped_in_place(name, lora_config, tmp_path):
    first, second = (make_with_lora(name, lora_config(), seed=seed) for seed in (0, 1))
    second.save_lora_adapter(tmp_path)
    expected = run(second, name)
    assert not torch.allclose(run(first, name), expected, atol=1e-3)
    places = {key: parameter.data_ptr() for key, parameter in first.named_parameters()}
    first.load_lora_adapter(tmp_path, prefix=None, adapter_name="default", hotswap=True, use_safetensors=True)
    assert {key: parameter.data_ptr() for key, parameter in first.named_parameters()} == places
    torch.testing.assert_close(run(first, name), expected)


# Weights in fewer bits

# The Linears that may be stored in fewer bits. Everything that adaptive normalisation passes through stays precise,
# as does what an error would spread from to all tokens: the times, the classes and the narrow latent tokens.
BLOCK_LAYERS = [*(f"attn.{layer}" for layer in ATTENTION_LAYERS), "ff.net.0.proj", "ff.net.2"]


def block_layers(model: torch.nn.Module) -> set[str]:
    """The names of all Linears of attention and feed-forward layers."""
    names = {key for key, block in model.named_modules() if any(block is other for other in blocks_of(model))}
    return {f"{block}.{layer}" for block in names for layer in BLOCK_LAYERS}


@every_case
@pytest.mark.parametrize("compute_dtype", [torch.bfloat16, torch.float32], ids=str)
@torch.no_grad()
def test_layerwise_casting(name, compute_dtype, tmp_path):
    make(name, **WIDE).save_pretrained(tmp_path)
    model = CLASSES[name].from_pretrained(tmp_path, dtype=compute_dtype)
    dtypes = {key: parameter.dtype for key, parameter in model.named_parameters()}
    expected = run(model, name, dtype=compute_dtype)
    footprint = model.get_memory_footprint()

    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=compute_dtype)
    layers = block_layers(model)
    if name != "latent embedder":
        layers |= {"prior_proj.linear_1", "prior_proj.linear_2"}
    stored = {key for key, parameter in model.named_parameters() if parameter.dtype == torch.float8_e4m3fn}
    assert stored == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    for key, parameter in model.named_parameters():
        assert key in stored or parameter.dtype == dtypes[key], key
    num_stored = sum(parameter.numel() for key, parameter in model.named_parameters() if key in stored)
    assert footprint - model.get_memory_footprint() == num_stored * (compute_dtype.itemsize - 1)

    assert model.dtype == compute_dtype
    output = run(model, name, dtype=compute_dtype)
    assert output.dtype == compute_dtype
    assert relative_error(output, expected) < 0.1  # measured: 0.035 to 0.040
    assert {key for key, parameter in model.named_parameters() if parameter.dtype == torch.float8_e4m3fn} == stored


@pytest.fixture
def int8_config():
    quantization = pytest.importorskip("torchao.quantization")
    return lambda **kwargs: TorchAoConfig(quantization.Int8WeightOnlyConfig(), **kwargs)


def quantized_layers(model: torch.nn.Module) -> set[str]:
    from torchao.utils import TorchAOBaseTensor

    linears = {key: module for key, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return {key for key, module in linears.items() if isinstance(module.weight, TorchAOBaseTensor)}


@every_case
@torch.no_grad()
def test_int8_weights(name, int8_config, tmp_path):
    make(name, **WIDE).save_pretrained(tmp_path / "fp32")
    model = CLASSES[name].from_pretrained(tmp_path / "fp32", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    expected = run(model, name, dtype=torch.bfloat16)
    cls = type(model)
    quantized = cls.from_pretrained(tmp_path / "fp32", dtype=torch.bfloat16, quantization_config=int8_config())
    layers = block_layers(model) | {"x_embedder", "proj_out"}
    if name != "latent embedder":
        layers |= {"prior_proj.linear_1", "prior_proj.linear_2"}
    assert quantized_layers(quantized) == layers
    output = run(quantized, name, dtype=torch.bfloat16)
    assert 0 < relative_error(output, expected) < 0.045  # measured: 0.013 to 0.019

    quantized.save_pretrained(tmp_path / "int8")
    sizes = {folder: (tmp_path / folder / WEIGHTS).stat().st_size for folder in ("bf16", "int8")}
    # Measured: 0.70, as much of the backbone is adaptive normalisation, and 0.52.
    assert sizes["int8"] < (0.55 if name == "latent embedder" else 0.73) * sizes["bf16"]
    loaded = cls.from_pretrained(tmp_path / "int8", dtype=torch.bfloat16)
    assert quantized_layers(loaded) == layers
    assert torch.equal(run(loaded, name, dtype=torch.bfloat16), output)


@every_case
@pytest.mark.parametrize("storage", ["fp8", "int8"])
def test_adapters_learn_over_weights_in_fewer_bits(name, storage, int8_config, lora_config, tmp_path):
    make(name).save_pretrained(tmp_path)
    stored = {"quantization_config": int8_config()} if storage == "int8" else {}
    model = CLASSES[name].from_pretrained(tmp_path, dtype=torch.bfloat16, **stored).train()
    model.requires_grad_(False)
    model.add_adapter(lora_config(init_lora_weights=True))
    if storage == "fp8":
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    adapter = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in key for key in adapter)
    optimizer = torch.optim.SGD(adapter.values(), lr=1.0)
    losses = []
    for _ in range(3):
        loss = run(model, name, dtype=torch.bfloat16).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


@every_model
@pytest.mark.parametrize("given", [None, ["proj_out"], "proj_out"], ids=str)
def test_quantization_skips_what_the_model_and_the_user_name(name, given, int8_config, tmp_path):
    make(name).save_pretrained(tmp_path)
    config = int8_config(modules_to_not_convert=given)
    model = CLASSES[name].from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=config)
    assert config.modules_to_not_convert == given  # the user's object is not changed
    skipped = model.config.quantization_config.modules_to_not_convert
    assert skipped[: 0 if given is None else 1] == ([] if given is None else ["proj_out"])
    assert set(model._skip_quantization_modules) <= set(skipped)
    assert ("proj_out" in quantized_layers(model)) == (given is None)
    for layer in model._skip_quantization_modules:
        assert not any(layer in key.split(".") for key in quantized_layers(model)), layer


@every_model
def test_quantization_configs_may_be_dicts(name, int8_config, tmp_path):
    make(name).save_pretrained(tmp_path)
    given = int8_config(modules_to_not_convert=["proj_out"]).to_dict()
    before = str(given)
    model = CLASSES[name].from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=given)
    same = int8_config(modules_to_not_convert=["proj_out"])
    expected = CLASSES[name].from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=same)
    assert quantized_layers(model) == quantized_layers(expected)
    assert str(given) == before


def test_quantization_configs_of_bitsandbytes_have_another_name_for_the_skipped_layers():
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["proj_out"])
    skipping = LatentEmbeddingModule._skip_in(config)  # bitsandbytes itself need not be here
    assert skipping.llm_int8_skip_modules == ["proj_out", *LatentEmbeddingModule._skip_quantization_modules]
    assert config.llm_int8_skip_modules == ["proj_out"]


def test_layers_that_stay_precise():
    assert DoDTransformer2DModel._keep_in_fp32_modules == ["time_embed"]
    assert LatentEmbeddingModule._keep_in_fp32_modules is None
    for model in (make("transformer"), make("latent embedder")):
        parts = {part for key, _ in model.named_modules() for part in key.split(".")}
        assert set(model._skip_quantization_modules) <= parts  # no name without a layer
        assert set(model._no_split_modules) == set(model._repeated_blocks) == {type(blocks_of(model)[0]).__name__}
