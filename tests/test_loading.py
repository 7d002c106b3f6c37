"""What comes of folders that hold a pipeline, one that is damaged or none: the pipeline, or an error that names it."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from helpers import ID2LABEL, says, tiny_latent_embedder, tiny_pipeline, tiny_transformer, tiny_vae

from diffusers_dod import DoDFlowMatchScheduler, DoDPipeline, DoDTransformer2DModel, LatentEmbeddingModule
from diffusers_dod.training.checkpoints import save_checkpoint


WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = "model_index.json"
OURS = {"transformer": "DoDTransformer2DModel", "latent_embedder": "LatentEmbeddingModule"}
ALL = {**OURS, "vae": "AutoencoderKL", "scheduler": "DoDFlowMatchScheduler"}
every_class = pytest.mark.parametrize("cls", [DoDPipeline, DiffusionPipeline])
every_one_of_ours = pytest.mark.parametrize("name", OURS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A saved pipeline to be damaged."""
    return shutil.copytree(saved, tmp_path / "pipeline")


def sample(pipe: DoDPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe([1, 3], output_type="pt", generator=torch.Generator().manual_seed(0)).images


def half_of(file: Path) -> bytes:
    content = file.read_bytes()
    return content[: len(content) // 2]


# ---------------------------------------------------------------------------------------- checkpoints of a training


def damage_weights(folder: Path) -> None:
    path = folder / "transformer" / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def take_other_weights(folder: Path) -> None:
    tiny_transformer(seed=5).save_pretrained(folder / "transformer")


def add_an_index(folder: Path) -> None:
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return save_checkpoint(tmp_path, 7, tiny_pipeline().save_pretrained)


@pytest.mark.parametrize("damage", [damage_weights, take_other_weights, add_an_index])
def test_a_damaged_checkpoint_is_no_model(checkpoint, damage):
    damage(checkpoint)
    LatentEmbeddingModule.from_pretrained(checkpoint, subfolder="latent_embedder")
    for arguments in ({"subfolder": "transformer"}, {}):
        path = checkpoint if arguments else checkpoint / "transformer"
        with pytest.raises(ValueError, match=says("undamaged", str(checkpoint), "transformer/diffusion_pytorch_mod")):
            DoDTransformer2DModel.from_pretrained(path, **arguments)


@every_class
@pytest.mark.parametrize("damage", [damage_weights, take_other_weights, add_an_index])
def test_a_damaged_checkpoint_is_no_pipeline(checkpoint, cls, damage):
    assert torch.equal(sample(cls.from_pretrained(checkpoint)), sample(cls.from_pretrained(checkpoint)))
    damage(checkpoint)
    with pytest.raises(ValueError, match=says("undamaged", str(checkpoint), "transformer/diffusion_pytorch_model")):
        cls.from_pretrained(checkpoint)


def test_a_pipeline_needs_no_state_of_the_training(checkpoint):
    """The state may be left behind when a checkpoint is copied."""
    (checkpoint / "training_state").mkdir()
    (checkpoint / "training_state" / "model.safetensors").write_bytes(b"damaged")
    DoDPipeline.from_pretrained(checkpoint)


# ------------------------------------------------------------------------------------------------ no pipeline there


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize(
    "where", ["absolute", "no-such/folder", "no-such-folder", "no/such/folder", "./no-such-folder"]
)
def test_a_missing_folder(where, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = kind(tmp_path / "a" / "b" if where == "absolute" else where)
    with pytest.raises(OSError, match=says("`pretrained_model_name_or_path`", INDEX, "Hub", f"got {str(path)!r}")):
        DoDPipeline.from_pretrained(path)


@pytest.mark.parametrize("name", ["user/no-such-repository", "no-such-repository"])
def test_a_repository_that_is_not_in_the_cache(name, tmp_path):
    with pytest.raises(OSError, match=says("`pretrained_model_name_or_path`", INDEX, "Hub", f"got {name!r}")):
        DoDPipeline.from_pretrained(name, local_files_only=True, cache_dir=tmp_path)


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("content", ["nothing", "a component"])
def test_a_folder_without_an_index(folder, content, kind, tmp_path):
    path = folder / "transformer" if content == "a component" else tmp_path / "empty"
    path.mkdir(exist_ok=True)
    fragments = ("`pretrained_model_name_or_path`", INDEX, f"got {str(path)!r}, which has none")
    with pytest.raises(OSError, match=says(*fragments)):
        DoDPipeline.from_pretrained(kind(path))


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("file", [INDEX, f"transformer/{WEIGHTS}"])
def test_a_file_in_place_of_the_folder(folder, file, kind):
    path = folder / file
    with pytest.raises((OSError, ValueError), match=says("`pretrained_model_name_or_path`", INDEX, str(path))):
        DoDPipeline.from_pretrained(kind(path))


@every_class
def test_an_index_that_is_no_json(folder, cls):
    (folder / INDEX).write_text("<html>")
    with pytest.raises(OSError, match=says(str(folder / INDEX), "JSON")):
        cls.from_pretrained(folder)


def test_another_pipeline(tmp_path):
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    unet = UNet2DModel(sample_size=8, layers_per_block=1, norm_num_groups=4, **blocks)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=says("DoDPipeline", "'transformer'", "{'scheduler'}")):
        DoDPipeline.from_pretrained(tmp_path)


# --------------------------------------------------------------------------------------------- damaged components


@pytest.mark.parametrize("name", ALL)
def test_the_folder_of_a_component_is_missing(folder, name):
    shutil.rmtree(folder / name)
    fragments = ("`pretrained_model_name_or_path`", INDEX, f"got {str(folder)!r} without `{name}` ({ALL[name]})")
    with pytest.raises(OSError, match=says(*fragments)):
        DoDPipeline.from_pretrained(folder)


@every_class
@every_one_of_ours
@pytest.mark.parametrize("missing", ["config.json", WEIGHTS])
def test_a_file_of_a_component_is_missing(folder, cls, name, missing):
    (folder / name / missing).unlink()
    with pytest.raises(OSError, match=says(f"weights of a `{OURS[name]}`", f"got {str(folder / name)!r}")):
        cls.from_pretrained(folder)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"


@every_class
@every_one_of_ours
@pytest.mark.parametrize(
    ("damage", "reason"),
    [(half_of, "file not fully covered"), (lambda file: b"", "header too small"), (lambda file: POINTER, "git-lfs")],
    ids=["truncated", "empty", "LFS pointer"],
)
def test_weights_that_are_incomplete(folder, cls, name, damage, reason):
    file = folder / name / WEIGHTS
    file.write_bytes(damage(file))
    with pytest.raises(OSError, match=says(f"weights of a `{OURS[name]}`", f"got {str(folder / name)!r}", reason)):
        cls.from_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "fragments"),
    [(half_of, ["vae", WEIGHTS]), (lambda file: POINTER, ["git-lfs"])],
    ids=["truncated", "LFS"],
)
def test_incomplete_weights_of_a_stock_component(folder, damage, fragments):
    file = folder / "vae" / WEIGHTS
    file.write_bytes(damage(file))
    with pytest.raises(OSError, match=says(*fragments)):
        DoDPipeline.from_pretrained(folder)


@every_class
@every_one_of_ours
def test_weights_of_another_component(folder, cls, name):
    shutil.copy(folder / "vae" / WEIGHTS, folder / name / WEIGHTS)
    fragments = (
        f"weights of a `{OURS[name]}`",
        f"got {str(folder / name)!r}",
        "weights are missing",
        "unknown (decoder",
    )
    with pytest.raises(ValueError, match=says(*fragments)):
        cls.from_pretrained(folder)


@every_class
@every_one_of_ours
def test_the_config_of_another_class(folder, cls, name):
    shutil.copy(folder / "vae" / "config.json", folder / name / "config.json")
    with pytest.raises(ValueError, match=says(f"a `{OURS[name]}`", f"got {str(folder / name)!r}", "`AutoencoderKL`")):
        cls.from_pretrained(folder)


def test_components_that_do_not_fit_together(folder):
    tiny_latent_embedder(num_attention_heads=1).save_pretrained(folder / "latent_embedder")
    with pytest.raises(ValueError, match=says("`latent_embedder`", "the width 32", "got 16")):
        DoDPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("entry", "fragments"),
    [
        ({"default_num_stages": 0}, ["`default_num_stages`", ">= 1", "got 0"]),
        ({"id2label": {"10": "owl"}}, ["`id2label`", "[0, 9]", "'owl'"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@every_class
def test_a_bad_entry_of_the_index(folder, cls, entry, fragments):
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**index, **entry}))
    with pytest.raises(ValueError, match=says(*fragments)):
        cls.from_pretrained(folder)


@every_class
def test_an_index_that_names_an_unknown_class(folder, cls):
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**index, "transformer": ["diffusers_dod", "DiT"]}))
    with pytest.raises((AttributeError, ValueError), match="diffusers_dod.* has no (attribute|class) .DiT"):
        cls.from_pretrained(folder)  # Diffusers' own error, which became a `ValueError` in 0.42.1


# ------------------------------------------------------------------------------------------------ kinds of weights


@every_class
def test_a_variant_that_only_one_component_has(folder, cls):
    other = tiny_transformer(seed=7)
    other.save_pretrained(folder / "transformer", variant="fp16")
    plain, variant = cls.from_pretrained(folder), cls.from_pretrained(folder, variant="fp16")
    assert torch.equal(plain.transformer.proj_out.weight, tiny_transformer().proj_out.weight)
    assert torch.equal(variant.transformer.proj_out.weight, other.proj_out.weight)
    for name in ("vae", "latent_embedder"):
        for weight, same in zip(
            plain.components[name].parameters(), variant.components[name].parameters(), strict=True
        ):
            assert torch.equal(weight, same)
    assert not torch.equal(sample(plain), sample(variant))

    (folder / "transformer" / WEIGHTS).unlink()
    assert torch.equal(sample(cls.from_pretrained(folder, variant="fp16")), sample(variant))
    with pytest.raises(OSError, match=says("`DoDTransformer2DModel`", str(folder / "transformer"))):
        cls.from_pretrained(folder)


@every_class
def test_a_variant_that_no_component_has(folder, cls):
    with pytest.raises(ValueError, match="variant=fp16"):
        cls.from_pretrained(folder, variant="fp16")


def test_a_pipeline_is_saved_as_a_variant(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path, variant="ema")
    files = {file.name for file in tmp_path.rglob("*.safetensors")}
    assert files == {"diffusion_pytorch_model.ema.safetensors"}
    assert torch.equal(sample(DoDPipeline.from_pretrained(tmp_path, variant="ema")), sample(pipe))


@every_class
def test_pickled_weights_are_refused_if_safetensors_are_asked_for(cls, tmp_path):
    pipe = tiny_pipeline(vae=None, in_channels=3)
    pipe.save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.rglob("*.safetensors")) and len(list(tmp_path.rglob("*.bin"))) == 2
    assert torch.equal(sample(cls.from_pretrained(tmp_path)), sample(pipe))
    with pytest.raises(OSError, match=says(WEIGHTS, str(tmp_path))):
        cls.from_pretrained(tmp_path, use_safetensors=True)


@every_class
def test_a_folder_needs_no_network(saved, cls, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("nothing is to be looked up")

    monkeypatch.setattr("socket.socket.connect", refuse)
    pipe = cls.from_pretrained(str(saved), local_files_only=True)
    assert torch.equal(sample(pipe), sample(tiny_pipeline()))


# -------------------------------------------------------------------------------- what takes the place of the saved


OTHERS = {
    "transformer": lambda: tiny_transformer(seed=7),
    "latent_embedder": lambda: tiny_latent_embedder(seed=7),
    "vae": lambda: tiny_vae(seed=7),
    "scheduler": lambda: DoDFlowMatchScheduler(solver="heun"),
}


@every_class
@pytest.mark.parametrize("name", OTHERS)
def test_components_that_are_passed_are_used(saved, cls, name):
    other = OTHERS[name]()
    pipe = cls.from_pretrained(saved, **{name: other})
    assert getattr(pipe, name) is other
    assert torch.equal(sample(pipe), sample(tiny_pipeline(**{name: other})))


@every_class
@pytest.mark.parametrize("name", OTHERS)
def test_components_that_are_passed_need_no_folder(folder, cls, name):
    shutil.rmtree(folder / name)
    other = OTHERS[name]()
    pipe = cls.from_pretrained(folder, **{name: other})
    assert getattr(pipe, name) is other


def test_components_that_are_passed_are_checked(saved):
    with pytest.raises(TypeError, match=says("`transformer`", "DoDTransformer2DModel", "got AutoencoderKL")):
        DoDPipeline.from_pretrained(saved, transformer=tiny_vae())
    with pytest.raises(ValueError, match=says("`vae`", "4", "got 3")):
        vae = tiny_vae(latent_channels=3, latents_mean=None, latents_std=None)
        DoDPipeline.from_pretrained(saved, vae=vae)


@every_class
def test_what_is_no_component_is_replaced_too(saved, cls):
    pipe = cls.from_pretrained(saved, id2label=None, default_num_stages=3, default_guidance_scale=1.5)
    assert pipe.id2label == {} and pipe.label2ids == {} and pipe.config.id2label is None
    assert (pipe.config.default_num_stages, pipe.config.default_guidance_scale) == (3, 1.5)
    assert pipe.config.default_num_inference_steps == 2  # as saved
    with pytest.raises(ValueError, match=says("`class_labels`", "0 names", "got 'goldfish'")):
        pipe("goldfish")
    pipe = cls.from_pretrained(saved, id2label={4: "owl"})
    assert pipe.id2label == {4: "owl"}
    assert cls.from_pretrained(saved).id2label == ID2LABEL


# -------------------------------------------------------------------------------------------- paths of this machine


def assert_no_paths(folder: Path, origin: Path) -> None:
    files = sorted(folder.rglob("*.json"))
    assert len(files) == 5  # the index and the four components
    for file in files:
        assert "_name_or_path" not in file.read_text(), file
        assert str(origin) not in file.read_text() and os.path.expanduser("~") + os.sep not in file.read_text(), file


@every_class
def test_a_pipeline_that_is_saved_again_names_no_path(folder, cls, tmp_path):
    pipe = cls.from_pretrained(folder)
    names = {
        name: component.config._name_or_path
        for name, component in pipe.components.items()
        if component is not None and name != "scheduler"
    }
    assert all(str(tmp_path) in name for name in names.values())
    pipe.save_pretrained(tmp_path / "again")
    assert_no_paths(tmp_path / "again", tmp_path)
    for file in folder.rglob("*.json"):
        assert (tmp_path / "again" / file.relative_to(folder)).read_text() == file.read_text()
    # Only what is saved lacks it.
    assert names == {name: pipe.components[name].config._name_or_path for name in names}
    assert str(pipe.config._name_or_path) == str(folder)


def test_stock_components_from_elsewhere_name_no_path(folder, tmp_path):
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(tmp_path / "scheduler")
    tiny_vae(seed=7).save_pretrained(tmp_path / "vae")
    pipe = DoDPipeline.from_pretrained(
        folder,
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "scheduler"),
        vae=AutoencoderKL.from_pretrained(tmp_path / "vae"),
    )
    assert str(pipe.vae.config._name_or_path) == str(tmp_path / "vae")
    DoDPipeline.from_pipe(pipe).save_pretrained(tmp_path / "again")
    assert_no_paths(tmp_path / "again", tmp_path)
    loaded = DoDPipeline.from_pretrained(tmp_path / "again")
    assert loaded.scheduler.config.shift == 3.0
    assert torch.equal(sample(loaded), sample(pipe))


def test_paths_are_back_after_saving_failed(folder, tmp_path):
    pipe = DoDPipeline.from_pretrained(folder)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        pipe.save_pretrained(tmp_path / "file")
    assert str(pipe.config._name_or_path) == str(folder)
    assert pipe.transformer.config._name_or_path == str(folder / "transformer")


# ------------------------------------------------------------------------------------------- configs made to harm


HARM = {
    "transformer": {
        "num_layers": [10**9, 0, None, [2], "2", True, 2.5, {}],
        "num_attention_heads": [10**9, -1],
        "attention_head_dim": [10**9],
        "num_classes": [10**9, 10**30],
        "in_channels": [10**9],
        "sample_size": [10**9],
        "patch_size": [10**9],
        "mlp_ratio": [1e9, -1.0, "4"],
        "adaln_lora_dim": [10**9],
        "prior_embed_dim": [10**9],
    },
    "latent_embedder": {
        "num_encoder_layers": [10**9],
        "num_decoder_layers": [10**9],
        "num_latent_tokens": [10**9],
        "latent_token_dim": [10**9],
        "mlp_ratio": [1e9],
    },
    "scheduler": {"num_train_timesteps": [10**9], "shift": [1e9], "rtol": [1e9], "atol": [1e9]},
    ".": {"default_num_stages": [10**9], "default_num_inference_steps": [10**9], "default_guidance_scale": [1e30]},
}
CONFIGS = {"scheduler": "scheduler_config.json", ".": INDEX}


@pytest.mark.parametrize(
    "name, field, value",
    [(name, field, value) for name in HARM for field in HARM[name] for value in HARM[name][field]],
)
def test_values_out_of_range_are_refused_by_name(folder, name, field, value):
    path = folder / name / CONFIGS.get(name, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises((ValueError, TypeError), match=says(field if 10**30 != value else "20 digits")):
        DoDPipeline.from_pretrained(folder)


@pytest.mark.parametrize("content", ["[]", "null", "{", '{"num_layers": 1, "num_layers": 2}', "[" * 100_000, b"\xff"])
@pytest.mark.parametrize("name", [*OURS, "scheduler"])
def test_configs_that_are_none_are_refused_by_file(folder, name, content):
    path = folder / name / CONFIGS.get(name, "config.json")
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((ValueError, OSError), match=says(str(path))):
        DoDPipeline.from_pretrained(folder)


@pytest.mark.parametrize("name", ["../transformer", "/tmp", "a/../../b"])
def test_components_elsewhere_are_refused(folder, name):
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(index | {name: index["transformer"]}))
    with pytest.raises(OSError, match=says(INDEX, "same folder", name)):
        DoDPipeline.from_pretrained(folder)


# ------------------------------------------------------------------------------------------------------------ saving


def test_whole_weights_over_shards_can_be_loaded(tmp_path):
    tiny_transformer().save_pretrained(tmp_path, max_shard_size="40KB")
    assert list(tmp_path.glob("*.index.json"))
    other = tiny_transformer(seed=9)
    other.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.index.json"))
    loaded = DoDTransformer2DModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in other.state_dict().items())
    other.save_pretrained(tmp_path, max_shard_size="40KB")
    DoDTransformer2DModel.from_pretrained(tmp_path)


def test_a_pipeline_with_adapters_in_its_weights_is_not_saved(tmp_path):
    peft = pytest.importorskip("peft")
    pipe = tiny_pipeline()
    config = peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    pipe.transformer.add_adapter(config, adapter_name="style")
    pipe.fuse_lora()
    with pytest.raises(ValueError, match=says("DoDTransformer2DModel", "no adapters", "style", "unload_lora_weights")):
        pipe.save_pretrained(tmp_path)
    expected = sample(pipe)
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path)
    torch.testing.assert_close(sample(DoDPipeline.from_pretrained(tmp_path)), expected)
