"""Latents on disk: what the shards and the manifest hold, who writes them, what is refused, and training from them."""

import json
import os
import pickle
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderOobleck
from helpers import contents, fresh_accelerator, says, tiny_vae, write_images
from launch import run_command, torchrun
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_autoencoders import make_dc, make_rae
from torch.utils.data import DataLoader, Dataset, Subset

from diffusers_dod import files
from diffusers_dod.data import encoding
from diffusers_dod.data import latents as latents_module
from diffusers_dod.data.encoding import (
    EncodingOptions,
    Share,
    describe_autoencoder,
    encode_latents,
    finish_latents,
    latent_settings,
)
from diffusers_dod.data.image_folder import BadImagesError
from diffusers_dod.data.labelled_images import (
    Columns,
    ImageDataset,
    ImageOptions,
    LabelledImages,
    load_labelled_images,
)
from diffusers_dod.data.latents import SHARD_MANIFEST, LatentDataset, check_settings, find_damaged_shards, is_complete
from diffusers_dod.data.sample_stream import SampleDraws, TrainingSamples, collate_priors_first
from diffusers_dod.data.textures import TEXTURE_CLASSES, TextureDataset
from diffusers_dod.files import file_sha256
from diffusers_dod.image_reading import to_pixels
from diffusers_dod.options import parse_options
from diffusers_dod.training import encode_latents as command
from diffusers_dod.training import train
from diffusers_dod.training_options import TrainingOptions


class Watched(Dataset):
    """Textures that note which of them were read; `stop_at` is where the process is killed."""

    def __init__(self, count: int, size: int = 16, stop_at: int | None = None, bad: tuple[int, ...] = ()):
        self.textures = TextureDataset(count, size=size)
        self.stop_at = stop_at
        self.bad = bad
        self.seen: list[int] = []

    def __len__(self) -> int:
        return len(self.textures)

    def __getitem__(self, index: int) -> dict:
        self.seen.append(index)
        if index == self.stop_at:
            raise KeyboardInterrupt
        if index in self.bad:
            raise OSError(f"number {index} is bad")
        return self.textures[index]


def textures(count: int = 11, size: int = 16, **options) -> LabelledImages:
    return LabelledImages(Watched(count, size, **options), TEXTURE_CLASSES, f"textures-{count}", size)


def write(
    folder: Path, images: LabelledImages, vae=None, on_bad_image="error", processes=(0,), **options
) -> LatentDataset:
    """All shards, of four images each in batches of three, and the manifest."""
    options = EncodingOptions(**{"shard_size": 4, "encoding_batch_size": 3, "on_bad_image": on_bad_image, **options})
    for process in processes:
        encode_latents(images, vae, folder, options, share=Share(process, len(processes)))
    finish_latents(folder, latent_settings(images, vae, options), on_bad_image)
    return LatentDataset(folder)


def settings_of(images: LabelledImages, vae=None, **options) -> dict:
    return latent_settings(images, vae, EncodingOptions(**options))


def all_moments(latents: LatentDataset, view: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
    means, stds = zip(*(latents.read(index, view) for index in range(len(latents))), strict=True)
    return torch.stack(means), None if stds[0] is None else torch.stack(stds)


def pixels_of(images: LabelledImages) -> torch.Tensor:
    return to_pixels(torch.from_numpy(np.stack([row["image"] for row in map(images.dataset.__getitem__, range(11))])))


# ---------------------------------------------------------------------------------------------------------------------
# What is written


def test_manifest(tmp_path):
    vae = tiny_vae()
    latents = write(tmp_path / "deep" / "latents", textures(), vae, random_flip=True, latents_dtype="float16")
    manifest = json.loads((tmp_path / "deep" / "latents" / SHARD_MANIFEST).read_text())
    shards = manifest.pop("shards")
    assert manifest == {
        "format": 1,
        "images": "textures-11",
        "num_images": 11,
        "class_names": list(TEXTURE_CLASSES),
        "transform": "ADM centre crop",
        "resolution": 16,
        "random_flip": True,
        "autoencoder": describe_autoencoder(vae),
        "latents_dtype": "float16",
        "num_samples": 11,
        "num_views": 2,
        "latent_shape": [4, 8, 8],
        "bad_images": [],
    }
    assert [(shard["file"], shard["num_samples"]) for shard in shards] == [
        ("shard-00000.safetensors", 4),
        ("shard-00001.safetensors", 4),
        ("shard-00002.safetensors", 3),
    ]
    for shard in shards:
        assert re.fullmatch("[0-9a-f]{64}", shard["sha256"])
    assert find_damaged_shards(latents.folder) == []
    assert latents.manifest == {**manifest, "shards": shards}
    names = [f"shard-0000{i}.{kind}" for i in range(3) for kind in ("json", "safetensors")]
    assert sorted(path.name for path in latents.folder.iterdir()) == [SHARD_MANIFEST, *names]  # nothing unfinished
    assert (len(latents), latents.num_views, latents.latent_shape) == (11, 2, (4, 8, 8))
    assert latents.labels.tolist() == list(range(11))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"latents_mean": None, "latents_std": None, "scaling_factor": 0.25},
        {"latents_mean": None, "latents_std": None, "scaling_factor": 0.5, "shift_factor": 0.1},
    ],
    ids=["statistics", "scaling factor", "shift factor"],
)
@torch.no_grad()
def test_latents_are_the_normalised_posterior(tmp_path, config):
    vae, images = tiny_vae(**config), textures()
    mean, std = all_moments(write(tmp_path / "latents", images, vae))
    own = vae.encode(pixels_of(images)).latent_dist
    if config:
        shift, scale = config.get("shift_factor", 0.0), 1 / config["scaling_factor"]
    else:
        shift, scale = (torch.tensor(vae.config[name]).reshape(4, 1, 1) for name in ("latents_mean", "latents_std"))
    assert mean.dtype == std.dtype == torch.float32
    torch.testing.assert_close(mean, (own.mean - shift) / scale, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(std, own.std / scale, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [make_dc, make_rae, lambda: None], ids=["DC", "RAE", "pixels"])
@torch.no_grad()
def test_a_deterministic_autoencoder_has_no_standard_deviation(tmp_path, make):
    torch.manual_seed(0)
    vae, images = make(), textures()
    vae = vae and vae.eval()
    latents = write(tmp_path / "latents", images, vae, random_flip=True)
    with safe_open(tmp_path / "latents" / "shard-00000.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"mean", "labels"}
    pixels = pixels_of(images)
    for view, seen in enumerate((pixels, pixels.flip(-1))):
        mean, std = all_moments(latents, view)
        assert std is None
        if vae is None:
            expected = seen
        elif isinstance(vae, type(make_rae())):
            expected = vae.encode(seen / 2 + 0.5).latent
        else:
            expected = vae.encode(seen).latent * vae.config.scaling_factor
        torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-5)
    sample = TrainingSamples(latents, SampleDraws(12, seed=0))[0]
    assert min((sample["latents"] - latents.read(i, v)[0]).abs().max() for i in range(11) for v in (0, 1)) == 0


@torch.no_grad()
def test_a_shard_that_is_cut_while_it_is_read(tmp_path):
    """Reading beyond the end of a cut shard would kill the process. A removed shard stays readable."""
    latents = write(tmp_path / "cut", textures(64), shard_size=32)
    expected = latents.read(63)[0].clone()  # of what is mapped
    path = tmp_path / "cut" / "shard-00001.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match=says("shard-00001.safetensors", "must keep its", "encode again")):
        latents.read(63)
    other = write(tmp_path / "other", textures(64), shard_size=32)
    assert torch.equal(other.read(63)[0], expected)
    (tmp_path / "other" / "shard-00001.safetensors").unlink()
    assert torch.equal(other.read(63)[0], expected)


def test_the_second_view_is_that_of_the_mirrored_image(tmp_path):
    vae, images = tiny_vae(), textures()
    latents = write(tmp_path / "two", images, vae, random_flip=True)
    plain = write(tmp_path / "one", images, vae)
    assert (latents.num_views, plain.num_views) == (2, 1)
    assert torch.equal(all_moments(latents)[0], all_moments(plain)[0])
    own = vae.encode(pixels_of(images).flip(-1)).latent_dist
    statistics = (torch.tensor(vae.config[name]).reshape(4, 1, 1) for name in ("latents_mean", "latents_std"))
    shift, scale = statistics
    mean, std = all_moments(latents, 1)
    torch.testing.assert_close(mean, (own.mean - shift) / scale, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(std, own.std / scale, rtol=1e-4, atol=1e-5)
    # Not the mirrored latents: a convolution is not symmetric.
    assert (mean - all_moments(latents)[0].flip(-1)).abs().amax((1, 2, 3)).min() > 1e-3
    with pytest.raises(IndexError):
        plain.read(0, 1)


@pytest.mark.parametrize(("name", "bits"), [("float16", 11), ("bfloat16", 8)])
def test_lower_precision_on_disk(tmp_path, name, bits):
    vae = tiny_vae()
    latents = write(tmp_path / "low", textures(), vae, latents_dtype=name)
    full = write(tmp_path / "full", textures(), vae)
    on_disk = load_file(tmp_path / "low" / "shard-00000.safetensors")
    assert on_disk["mean"].dtype == on_disk["std"].dtype == getattr(torch, name)
    assert on_disk["mean"].shape == (4, 1, 4, 8, 8) and on_disk["labels"].dtype == torch.int64
    for ours, exact in zip(all_moments(latents), all_moments(full), strict=True):
        assert ours.dtype == torch.float32
        assert ((ours - exact).abs() <= exact.abs() * 2.0**-bits + 2.0**-25).all() and not torch.equal(ours, exact)


def test_an_unknown_precision_is_refused(tmp_path):
    with pytest.raises(ValueError, match=says("`latents_dtype`", "bfloat16", "got 'float8'")):
        encode_latents(textures(), None, tmp_path, EncodingOptions(latents_dtype="float8"))


@pytest.mark.parametrize(
    ("shard_size", "sizes"), [(1, [1] * 11), (4, [4, 4, 3]), (5, [5, 5, 1]), (11, [11]), (50, [11])]
)
def test_shards(tmp_path, shard_size, sizes):
    latents = write(tmp_path / "latents", textures(), shard_size=shard_size)
    assert [shard["num_samples"] for shard in latents.manifest["shards"]] == sizes
    assert torch.equal(all_moments(latents)[0], pixels_of(textures()))
    assert latents.labels.tolist() == list(range(11))
    assert torch.equal(torch.stack([latents.read(index)[0] for index in range(len(latents))]), all_moments(latents)[0])
    for index in (-1, 11):
        with pytest.raises(IndexError):
            latents.read(index)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_batch_size_does_not_matter(tmp_path, batch_size):
    vae = tiny_vae()
    ours = write(tmp_path / "ours", textures(), vae, encoding_batch_size=batch_size)
    expected = write(tmp_path / "expected", textures(), vae)
    for one, other in zip(all_moments(ours), all_moments(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert ours.manifest.keys() == expected.manifest.keys()


def test_reading_processes_do_not_matter(tmp_path):
    write(tmp_path / "ours", textures(bad=(5,)), on_bad_image="skip", dataloader_num_workers=2)
    write(tmp_path / "expected", textures(bad=(5,)), on_bad_image="skip")
    assert contents(tmp_path / "ours") == contents(tmp_path / "expected")


@pytest.mark.parametrize("processes", [(0, 1), (1, 0), (2, 0, 1), (3, 1, 4, 0, 2)])
def test_several_processes_write_the_same_files(tmp_path, processes):
    vae = tiny_vae()
    write(tmp_path / "ours", textures(), vae, processes=processes)
    write(tmp_path / "expected", textures(), vae)
    assert contents(tmp_path / "ours") == contents(tmp_path / "expected")


@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")
def test_whoever_may_read_the_manifest_may_read_the_shards(tmp_path):
    write(tmp_path / "latents", textures())
    modes = {path.name: oct(path.stat().st_mode) for path in (tmp_path / "latents").iterdir()}
    assert len(set(modes.values())) == 1, modes


# ---------------------------------------------------------------------------------------------------------------------
# Stopped, and gone on


@pytest.mark.parametrize(("stop_at", "again"), [(0, range(11)), (5, range(4, 11)), (10, range(8, 11))])
def test_a_stopped_run_goes_on_where_it_was(tmp_path, stop_at, again):
    vae = tiny_vae()
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "ours", textures(stop_at=stop_at), vae)
    assert not (tmp_path / "ours" / SHARD_MANIFEST).exists()
    with pytest.raises(ValueError, match=says("manifest.json", "No such file")):
        LatentDataset(tmp_path / "ours")
    images = textures()
    write(tmp_path / "ours", images, vae, processes=(0, 1))
    assert sorted(images.dataset.seen) == list(again)
    write(tmp_path / "expected", textures(), vae)
    assert contents(tmp_path / "ours") == contents(tmp_path / "expected")


@pytest.mark.parametrize("kind", ["safetensors", "json"])
def test_a_shard_that_has_gone_is_written_again(tmp_path, kind):
    write(tmp_path / "latents", textures())
    expected = contents(tmp_path / "latents")
    (tmp_path / "latents" / f"shard-00001.{kind}").unlink()
    (tmp_path / "latents" / SHARD_MANIFEST).unlink()
    images = textures()
    write(tmp_path / "latents", images)
    assert images.dataset.seen == [4, 5, 6, 7]
    assert contents(tmp_path / "latents") == expected


def test_a_shard_that_was_being_written_is_no_shard(tmp_path, monkeypatch):
    """Killed between the shard and its note, or while it writes the note."""
    rename = os.replace
    for target in ("shard-00001.safetensors", "shard-00001.json", SHARD_MANIFEST):

        def killed(source, path, target=target):
            if Path(path).name == target:
                raise KeyboardInterrupt
            rename(source, path)

        folder = tmp_path / target
        with monkeypatch.context() as patch:
            patch.setattr(files.os, "replace", killed)
            with pytest.raises(KeyboardInterrupt):
                write(folder, textures())
        assert not (folder / target).exists() and not (folder / SHARD_MANIFEST).exists()
        write(folder, textures())
        write(tmp_path / f"expected {target}", textures())
        assert contents(folder) == contents(tmp_path / f"expected {target}")


@pytest.mark.parametrize("kind", ["*", "safetensors"])
def test_no_manifest_without_all_shards(tmp_path, kind):
    folder = tmp_path / "latents"
    encode_latents(textures(), None, folder, EncodingOptions(shard_size=4))
    for path in folder.glob(f"shard-00001.{kind}"):
        path.unlink()
    with pytest.raises(ValueError, match=says("must hold 3 shards", "got 2")):
        finish_latents(folder, settings_of(textures()))
    assert not (folder / SHARD_MANIFEST).exists()


def test_no_manifest_of_no_shards(tmp_path):
    with pytest.raises(ValueError, match=says("must hold 1 shards", "got 0")):
        finish_latents(tmp_path, settings_of(textures()))


def test_no_manifest_of_shards_of_two_sizes(tmp_path):
    """Two processes write their own shard 0 and 1 of 2, of other images."""
    for process, shard_size in ((0, 6), (1, 8)):
        encode_latents(
            textures(), None, tmp_path, EncodingOptions(shard_size=shard_size), share=Share(process, num_processes=2)
        )
    with pytest.raises(ValueError, match=says("`shard_size`", "6", "8")):
        finish_latents(tmp_path, settings_of(textures()))


# ---------------------------------------------------------------------------------------------------------------------
# Other settings


def other_weights() -> AutoencoderKL:
    vae = tiny_vae()
    with torch.no_grad():
        vae.encoder.conv_in.weight[0, 0, 0, 0] += 1e-3
    return vae


# Field -> what is changed about `textures()`, the autoencoder and the options.
CHANGES = {
    "images": lambda images: (replace(images, fingerprint="others"), tiny_vae(), {}),
    "num_images": lambda images: (replace(textures(12), fingerprint="textures-11"), tiny_vae(), {}),
    "class_names": lambda images: (replace(images, class_names=("a", *TEXTURE_CLASSES)), tiny_vae(), {}),
    "resolution": lambda images: (replace(images, resolution=8), tiny_vae(), {}),
    "random_flip": lambda images: (images, tiny_vae(), {"random_flip": True}),
    "autoencoder": lambda images: (images, None, {}),
    "autoencoder: weights": lambda images: (images, other_weights(), {}),
    "autoencoder: config": lambda images: (images, tiny_vae(latents_mean=[0.5] * 4), {}),
    "latents_dtype": lambda images: (images, tiny_vae(), {"latents_dtype": "float16"}),
    "shard_size": lambda images: (images, tiny_vae(), {"shard_size": 5}),
}


@pytest.mark.parametrize(("field", "change"), CHANGES.items(), ids=CHANGES)
def test_latents_of_other_settings_are_refused(tmp_path, field, change):
    latents = write(tmp_path / "latents", textures(), tiny_vae())
    before = contents(latents.folder)
    images, vae, options = change(textures())
    message = says(str(latents.folder), f"`{field.split(':')[0]}`", "remove it, or use another folder")
    with pytest.raises(ValueError, match=message):
        write(latents.folder, images, vae, **options)
    if field != "shard_size":
        settings = settings_of(images, vae, **options)
        with pytest.raises(ValueError, match=message):
            check_settings(latents.folder, latents.manifest, settings)
        with pytest.raises(ValueError, match=r"`\w+`|must hold"):
            finish_latents(latents.folder, settings)
    assert contents(latents.folder) == before


def test_where_the_autoencoder_lies_does_not_matter(tmp_path):
    vae = tiny_vae()
    vae.save_pretrained(tmp_path / "here")
    vae.save_pretrained(tmp_path / "there")
    loaded = [command.load_autoencoder(str(tmp_path / name), "cpu") for name in ("here", "there")]
    assert describe_autoencoder(vae) == describe_autoencoder(loaded[0]) == describe_autoencoder(loaded[1])


@pytest.mark.parametrize("make", [tiny_vae, make_dc, make_rae], ids=["KL", "DC", "RAE"])
def test_autoencoders_of_all_kinds_are_loaded(tmp_path, make):
    vae = make()
    vae.save_pretrained(tmp_path)
    loaded = command.load_autoencoder(str(tmp_path), torch.device("cpu"))
    assert type(loaded) is type(vae) and not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert describe_autoencoder(loaded) == describe_autoencoder(vae)


def test_other_models_are_no_autoencoder(tmp_path):
    size = dict(encoder_hidden_size=4, downsampling_ratios=[2], channel_multiples=[1], decoder_channels=4)
    AutoencoderOobleck(**size).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=says("`pretrained_vae_name_or_path`", "AutoencoderDC", "AutoencoderOobleck")):
        command.load_autoencoder(str(tmp_path), torch.device("cpu"))
    assert command.load_autoencoder(None, torch.device("cpu")) is None


# ---------------------------------------------------------------------------------------------------------------------
# What is read


@pytest.mark.parametrize("shard", [0, 2])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"),
        lambda path: path.write_bytes(b""),
        Path.unlink,
    ],
    ids=["cut", "changed", "empty", "missing"],
)
def test_damaged_shards_are_found(tmp_path, shard, damage):
    folder = write(tmp_path / "latents", textures()).folder
    assert find_damaged_shards(folder) == []
    damage(folder / f"shard-0000{shard}.safetensors")
    assert find_damaged_shards(folder) == [f"shard-0000{shard}.safetensors"]


def flip_a_bit(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)


def swap(shard: Path) -> None:
    other = shard.with_name("shard-00000.safetensors")
    content = shard.read_bytes()
    shard.write_bytes(other.read_bytes())
    other.write_bytes(content)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("damage", [flip_a_bit, swap])
def test_a_shard_of_another_content_is_refused_when_it_is_first_read(tmp_path, damage, num_workers):
    folder = write(tmp_path / "latents", textures()).folder
    damage(folder / "shard-00001.safetensors")
    latents = LatentDataset(folder)
    samples = Subset(TrainingSamples(latents, SampleDraws(12, seed=0)), range(11))  # an epoch
    with pytest.raises(ValueError, match=says("hash", "shard-0000", "encode again")):
        list(DataLoader(samples, num_workers=num_workers, collate_fn=list))


def test_a_shard_is_hashed_once(tmp_path, monkeypatch):
    latents = write(tmp_path / "latents", textures())
    hashed = []
    monkeypatch.setattr(latents_module, "file_sha256", lambda path: hashed.append(path) or file_sha256(path))
    for _ in range(2):
        for index in range(len(latents)):
            latents.read(index)
    assert sorted(path.name for path in hashed) == [f"shard-0000{shard}.safetensors" for shard in range(3)]


def change_tensors(folder: Path, change) -> None:
    """Changes the first shard, and its hash, too: what nobody but a program with a fault would write."""
    path = folder / "shard-00000.safetensors"
    tensors = change(load_file(path))
    save_file(tensors, path)
    manifest = json.loads((folder / SHARD_MANIFEST).read_text())
    manifest["shards"][0]["sha256"] = file_sha256(path)
    (folder / SHARD_MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "change, fragments",
    [
        (lambda tensors: tensors | {"labels": tensors["labels"] + 900}, ["labels in [0, ", "got "]),
        (lambda tensors: tensors | {"labels": tensors["labels"] - 900}, ["labels in [0, ", "got -"]),
        (lambda tensors: {name: tensor[1:] for name, tensor in tensors.items()}, ["`labels`", "(4,)", "(3,)"]),
        (lambda tensors: tensors | {"mean": tensors["mean"].half()}, ["`mean`", "'F32'", "'F16'"]),
        (lambda tensors: tensors | {"mean": tensors["mean"][..., 1:].contiguous()}, ["`mean`", "says"]),
        (lambda tensors: tensors | {"more": tensors["mean"] + 1}, ["`more`", "None"]),
    ],
    ids=["labels", "negative labels", "number", "dtype", "shape", "more"],
)
def test_shards_that_do_not_fit_the_manifest_are_refused_at_once(tmp_path, change, fragments):
    folder = write(tmp_path / "latents", textures()).folder
    change_tensors(folder, change)
    with pytest.raises(ValueError, match=says(str(folder), *fragments)):
        LatentDataset(folder)


@pytest.mark.parametrize(
    "change, fragments",
    [
        ({"num_views": 3}, ["`num_views`", "1 or 2", "got 3"]),
        ({"latent_shape": [3, 10**9, 4]}, ["`latent_shape[1]`", "1000000000"]),
        ({"latent_shape": [3, 4]}, ["`latent_shape`", "channels, height and width"]),
        ({"num_samples": 12}, ["12 latents", "got 11"]),
        ({"class_names": [1]}, ["`class_names[0]`", "str"]),
        ({"latents_dtype": "int8"}, ["`latents_dtype`", "'int8'"]),
        ({"shards": [{"file": "/etc/passwd", "num_samples": 4, "sha256": "0" * 64}]}, ["`shards[0].file`", "folder"]),
        ({"shards": [{"file": "a", "num_samples": 4}]}, ["`shards[0].sha256`", "must be there"]),
    ],
)
def test_manifests_that_say_something_else_are_refused_by_entry(tmp_path, change, fragments):
    folder = write(tmp_path / "latents", textures()).folder
    manifest = json.loads((folder / SHARD_MANIFEST).read_text())
    (folder / SHARD_MANIFEST).write_text(json.dumps(manifest | change))
    with pytest.raises(ValueError, match=says(str(folder), *fragments)):
        LatentDataset(folder)


def test_a_header_without_end_is_refused(tmp_path):
    folder = write(tmp_path / "latents", textures()).folder
    shard = folder / "shard-00000.safetensors"
    shard.write_bytes((99 << 20).to_bytes(8, "little") + shard.read_bytes()[8:])
    with pytest.raises(ValueError, match=says(str(shard), "header too large")):
        LatentDataset(folder)


def test_latents_without_a_shard_are_refused(tmp_path):
    folder = write(tmp_path / "latents", textures()).folder
    (folder / "shard-00001.safetensors").unlink()
    with pytest.raises(ValueError, match=says(str(folder), "all shards", "['shard-00001.safetensors']")):
        LatentDataset(folder)


def test_latents_with_a_shard_that_was_cut_are_refused(tmp_path):
    folder = write(tmp_path / "latents", textures()).folder
    shard = folder / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=says("shard-00001.safetensors")):
        LatentDataset(folder)


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        (None, ["manifest.json", "No such file"]),
        ('{"format": 1, "shar', ["manifest.json", "cannot be read"]),
        ('{"format": 2}', ["`format` must be 1", "got 2"]),
        ("{}", ["`format`", "got []"]),
    ],
    ids=["missing", "half", "other format", "no format"],
)
def test_what_is_no_manifest(tmp_path, text, fragments):
    if text is not None:
        (tmp_path / SHARD_MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=says(str(tmp_path), *fragments)):
        LatentDataset(tmp_path)


class Noise(Dataset):
    """Images of 0.75 MiB of pixels in fp32."""

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> dict:
        return {"image": np.full((256, 256, 3), index, dtype=np.uint8), "label": index}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux says how much memory a process has")
def test_only_what_is_read_is_in_memory(tmp_path):
    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    write(
        tmp_path / "latents",
        LabelledImages(Noise(), tuple(map(str, range(96))), "noise", 256),
        shard_size=48,
        encoding_batch_size=8,
    )
    size = sum(path.stat().st_size for path in (tmp_path / "latents").iterdir()) / 2**20
    before = resident()
    latents = LatentDataset(tmp_path / "latents")
    read = [latents.read(index)[0] for index in (95, 3, 50)]
    assert [round(float((mean[0, 0, 0] + 1) * 127.5)) for mean in read] == [95, 3, 50]
    assert resident() - before < 12 and size > 70


def assert_same_batches(first: list[dict], second: list[dict]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            same = (
                torch.equal(one[name], other[name])
                if isinstance(one[name], torch.Tensor)
                else one[name] == other[name]
            )
            assert same, name


def test_reading_processes_see_the_same_samples(tmp_path):
    latents = write(tmp_path / "latents", textures(), tiny_vae(), random_flip=True)
    stream = TrainingSamples(latents, SampleDraws(12, seed=5))
    alone = list(DataLoader(stream, 4, sampler=range(24), collate_fn=collate_priors_first))
    # Those processes start with the files open that this one has read.
    assert_same_batches(
        list(DataLoader(stream, 4, sampler=range(24), collate_fn=collate_priors_first, num_workers=2)), alone
    )
    # What is pickled, where processes are not forked, holds no open file and no latents.
    copied = pickle.dumps(stream)
    assert len(copied) < 5000
    assert_same_batches(
        list(DataLoader(pickle.loads(copied), 4, sampler=range(24), collate_fn=collate_priors_first)), alone
    )


# ---------------------------------------------------------------------------------------------------------------------
# Images that cannot be read


GOOD, BAD = (
    ["ant/0.png", "ant/3.png", "bee/0.png", "newt/2.png"],
    ["ant/1.png", "ant/2.png", "newt/0.png", "newt/1.jpg"],
)


@pytest.fixture
def spoilt(tmp_path) -> Path:
    """Eight images of three classes; red tells the class and green the number. Four of them cannot be read."""
    folder = tmp_path / "images"
    for name in ("ant", "bee", "newt"):
        (folder / name).mkdir(parents=True)
    for name in (*GOOD, *BAD):
        kind, number = name.split("/")
        color = (50 * ["ant", "bee", "newt"].index(kind), 50 * int(number[0]), 7)
        Image.new("RGB", (40, 36), color).save(folder / name, quality=90)
    image = folder / "ant" / "1.png"
    image.write_bytes(image.read_bytes()[:60])
    (folder / "ant" / "2.png").write_bytes(b"")
    (folder / "newt" / "0.png").write_text("a note, not an image")
    image = folder / "newt" / "1.jpg"
    image.write_bytes(image.read_bytes()[:400])
    return folder


def load(folder: Path) -> LabelledImages:
    return load_labelled_images(ImageOptions(train_data_dir=str(folder), resolution=16), 1, 0)


class Counted(Dataset):
    def __init__(self, dataset):
        self.dataset = dataset
        self.count = 0
        self.path_of = dataset.path_of

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        self.count += 1
        return self.dataset[index]


@pytest.mark.parametrize("processes", [(0,), (1, 0)])
def test_all_images_that_cannot_be_read_are_named_at_once(tmp_path, spoilt, processes):
    with pytest.raises(BadImagesError) as error:
        write(tmp_path / "latents", load(spoilt), processes=processes)
    assert sorted(entry["path"] for entry in error.value.bad) == sorted(str(spoilt / name) for name in BAD)
    message = str(error.value)
    assert "4 images cannot be read" in message and "`on_bad_image` = 'skip'" in message
    for entry in error.value.bad:
        assert entry["path"] in message and entry["reason"] in message
    reasons = {
        Path(entry["path"]).parent.name + Path(entry["path"]).stem: entry["reason"] for entry in error.value.bad
    }
    assert "UnidentifiedImageError" in reasons["ant2"] and "UnidentifiedImageError" in reasons["newt0"]
    assert all("truncated" in reasons[name].lower() for name in ("ant1", "newt1"))
    assert not (tmp_path / "latents" / SHARD_MANIFEST).exists()


def test_an_image_that_is_too_long_is_named(tmp_path, spoilt):
    for name in BAD:
        (spoilt / name).unlink()
    path = spoilt / "bee" / "long.png"
    Image.new("RGB", (1, 20_000)).save(path)
    with pytest.raises(BadImagesError, match=says("1 images", f"{path}: ValueError: an image of 1 x 20000 pixels")):
        write(tmp_path / "latents", load(spoilt))


@pytest.mark.parametrize("shard_size", [1, 2, 3, 8])
def test_images_that_cannot_be_read_are_left_out(tmp_path, spoilt, shard_size):
    images = load(spoilt)
    images = replace(images, dataset=Counted(images.dataset))
    folder, options = tmp_path / "latents", {"shard_size": shard_size}
    with pytest.raises(BadImagesError):
        write(folder, images, **options)
    assert images.dataset.count == 8
    latents = write(folder, images, on_bad_image="skip", **options)
    assert images.dataset.count == 8  # nothing is encoded again
    assert latents.manifest["num_images"] == 8 and latents.manifest["num_samples"] == len(latents) == 4
    assert sorted(entry["path"] for entry in latents.manifest["bad_images"]) == sorted(str(spoilt / n) for n in BAD)
    for entry in latents.manifest["bad_images"]:
        assert images.path_of(entry["index"]) == entry["path"] and entry["reason"]
    assert len(latents.labels) == 4
    seen = []
    for index, label in enumerate(latents.labels.tolist()):
        mean, _ = latents.read(index)
        red, green, _ = ((mean[:, 8, 8] + 1) * 127.5).round().int().tolist()
        assert label == red // 50
        seen.append(f"{['ant', 'bee', 'newt'][label]}/{green // 50}.png")
    assert sorted(seen) == GOOD


def test_a_shard_without_an_image(tmp_path):
    images = textures(bad=(4, 5, 6, 7, 9))
    latents = write(tmp_path / "latents", images, tiny_vae(), on_bad_image="skip")
    assert [shard["num_samples"] for shard in latents.manifest["shards"]] == [4, 0, 2]
    assert latents.labels.tolist() == [0, 1, 2, 3, 8, 10]
    assert [entry["path"] for entry in latents.manifest["bad_images"]] == [f"row {i}" for i in (4, 5, 6, 7, 9)]
    full = write(tmp_path / "full", textures(), tiny_vae())
    for ours, index in enumerate(latents.labels.tolist()):
        torch.testing.assert_close(latents.read(ours)[0], full.read(index)[0], rtol=1e-4, atol=1e-5)
    assert find_damaged_shards(latents.folder) == []


@pytest.mark.parametrize("bad", [(0, 1, 2, 3), (0, 1, 2, 3, 4, 5, 6, 7)])
def test_first_shards_without_an_image(tmp_path, bad):
    latents = write(tmp_path / "latents", textures(bad=bad), on_bad_image="skip")
    assert latents.labels.tolist() == list(range(len(bad), 11)) and latents.latent_shape == (3, 16, 16)
    assert torch.equal(latents.read(0)[0], pixels_of(textures())[len(bad)])


def test_no_image_at_all(tmp_path):
    images = textures(bad=tuple(range(11)))
    with pytest.raises(BadImagesError, match=says("11 images cannot be read")):
        write(tmp_path / "latents", images)
    with pytest.raises(ValueError, match=says("at least one image", "got none of 11")):
        write(tmp_path / "latents", images, on_bad_image="skip")
    assert not (tmp_path / "latents" / SHARD_MANIFEST).exists()


def test_a_long_list_is_cut(tmp_path):
    images = textures(30, bad=tuple(range(25)))
    with pytest.raises(BadImagesError, match=says("25 images", "number 19 is bad; and 5 more")) as error:
        write(tmp_path / "latents", images)
    assert "number 20" not in str(error.value) and len(error.value.bad) == 25


def test_rows_without_an_image_or_a_label(tmp_path):
    import datasets

    image = Image.new("RGB", (16, 16))
    features = datasets.Features({"photo": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b"])})
    rows = {"photo": [image, None, image, image], "kind": [0, 1, None, 1]}
    source = datasets.Dataset.from_dict(rows, features=features)
    images = LabelledImages(ImageDataset(source, Columns("photo", "kind"), (16, 16)), ("a", "b"), "rows", 16)
    latents = write(tmp_path / "latents", images, on_bad_image="skip")
    assert latents.labels.tolist() == [0, 1]
    reasons = {entry["path"]: entry["reason"] for entry in latents.manifest["bad_images"]}
    assert reasons == {
        "row 1": "ValueError: row 1 lacks its image",
        "row 2": "ValueError: row 2 lacks its label",
    }


def test_what_to_do_about_them_is_one_of_two(tmp_path):
    encode_latents(textures(), None, tmp_path)
    with pytest.raises(ValueError, match=says("`on_bad_image`", "'error'", "'skip'", "got 'ignore'")):
        finish_latents(tmp_path, settings_of(textures()), "ignore")


def test_what_the_autoencoder_refuses_is_no_bad_image(tmp_path):
    with pytest.raises(ValueError, match=says("must be 16", "got 32 x 32")):
        write(tmp_path / "latents", textures(size=32), make_rae(), on_bad_image="skip")


# ---------------------------------------------------------------------------------------------------------------------
# The command, and training from what it writes


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = write_images(tmp_path_factory.mktemp("images"), [(18, 22)] * 5)
    (folder / "bee").mkdir()
    return folder


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    tiny_vae().save_pretrained(folder)
    return folder


@pytest.fixture
def data(images, vae_folder) -> list:
    options = ["--train_data_dir", images, "--resolution", 16, "--random_flip"]
    return [*options, "--pretrained_vae_name_or_path", vae_folder]


def encode(*arguments) -> None:
    with fresh_accelerator():
        command.main(list(map(str, arguments)))


def trained(output_dir: Path, *arguments) -> dict[str, bytes]:
    options = ["--preset", "DoD-Desk", "--train_batch_size", 4, "--max_train_steps", 2, "--logging_steps", 1]
    with fresh_accelerator():
        train.main(list(map(str, [*options, "--output_dir", output_dir, *arguments])))
    return load_file(output_dir / "checkpoint-2" / "training_state" / "model.safetensors")


@pytest.mark.slow
def test_training_from_latents_alone_is_training_from_the_images(tmp_path, data, vae_folder):
    from_images = trained(tmp_path / "images", *data)
    encode(*data, "--latents_dir", tmp_path / "latents")
    before = contents(tmp_path / "latents")
    assert before == contents(tmp_path / "images" / "latents")
    alone = ["--latents_dir", tmp_path / "latents", "--pretrained_vae_name_or_path", vae_folder]
    from_latents = trained(tmp_path / "alone", *alone, "--dataloader_num_workers", 2)
    assert from_latents.keys() == from_images.keys()
    for name in from_images:
        assert torch.equal(from_latents[name], from_images[name]), name
    assert contents(tmp_path / "latents") == before and not (tmp_path / "alone" / "latents").exists()
    ids = [json.loads((tmp_path / run / "model_index.json").read_text())["id2label"] for run in ("alone", "images")]
    assert ids == [{"0": "ant", "1": "bee", "2": "newt"}] * 2
    card = (tmp_path / "alone" / "README.md").read_text()
    assert str(tmp_path) not in card and "16 x 16" in card

    # Both together: the latents are those of the images, and nothing is encoded.
    trained(tmp_path / "both", *data, "--latents_dir", tmp_path / "latents")
    assert contents(tmp_path / "latents") == before and not (tmp_path / "both" / "latents").exists()


def test_the_command_is_idempotent_and_checks_what_it_finds(tmp_path, data, images):
    shared = [*data, "--latents_dir", tmp_path / "latents"]
    encode(*shared, "--latents_dtype", "bfloat16")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "latents").iterdir()}
    encode(*shared, "--latents_dtype", "bfloat16", "--encoding_batch_size", 2)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "latents").iterdir()} == times
    with pytest.raises(ValueError, match=says("`latents_dtype` = 'float32'", "got 'bfloat16'")):
        encode(*shared)
    with pytest.raises(ValueError, match=says("`autoencoder` = None")):
        encode("--train_data_dir", images, "--resolution", 16, "--random_flip", *shared[-2:])


def test_the_command_and_images_that_cannot_be_read(tmp_path, spoilt, caplog):
    shared = ["--train_data_dir", spoilt, "--resolution", 16, "--latents_dir", tmp_path / "latents"]
    with pytest.raises(BadImagesError, match=says(*(str(spoilt / name) for name in BAD))):
        encode(*shared)
    encode(*shared, "--on_bad_image", "skip")
    assert "4 images that cannot be read are left out" in caplog.text
    assert len(LatentDataset(tmp_path / "latents")) == 4


@pytest.mark.parametrize("wrong", ["none", "weights", "config"])
def test_latents_of_another_autoencoder_are_refused(tmp_path, data, wrong):
    encode(*data, "--latents_dir", tmp_path / "latents")
    vae = other_weights() if wrong == "weights" else tiny_vae(latents_std=[1.0] * 4)
    vae.save_pretrained(tmp_path / "vae")
    options = [] if wrong == "none" else ["--pretrained_vae_name_or_path", tmp_path / "vae"]
    with pytest.raises(ValueError, match=says(str(tmp_path / "latents"), "`autoencoder`")):
        trained(tmp_path / "run", "--latents_dir", tmp_path / "latents", *options)
    assert list((tmp_path / "run").iterdir()) == []


def test_training_from_a_folder_without_latents_is_refused(tmp_path):
    with pytest.raises(ValueError, match=says(str(tmp_path / "latents"), "manifest.json", "`latents_dir` must hold")):
        trained(tmp_path / "run", "--latents_dir", tmp_path / "latents")
    assert not (tmp_path / "latents").exists()


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--dataset_name", "textures"], ["`latents_dir`", "got None"]),
        (["--latents_dir", "here"], ["Exactly one of `dataset_name` and `train_data_dir`", "got None and None"]),
        (["--latents_dir", "here", "--dataset_name", "a", "--train_data_dir", "b"], ["Exactly one", "'a' and 'b'"]),
        (["--latents_dir", "here", "--dataset_name", "a", "--resolution", "0"], ["`resolution`", "got 0"]),
        (["--latents_dir", "here", "--dataset_name", "a", "--latents_dtype", "int8"], ["--latents_dtype", "float16"]),
        (["--latents_dir", "here", "--dataset_name", "a", "--on_bad_image", "no"], ["--on_bad_image", "skip"]),
    ],
)
def test_arguments_that_do_not_fit(arguments, fragments, capsys):
    with pytest.raises(SystemExit) as error:
        command.main(arguments)
    assert error.value.code == 2
    message = capsys.readouterr().err
    for fragment in fragments:
        assert fragment in message
    if "here" in arguments and "'b'" in fragments[-1]:
        with pytest.raises(SystemExit):
            parse_options(TrainingOptions, [*arguments, "--preset", "DoD-Desk", "--output_dir", "run"])


# ---------------------------------------------------------------------------------------------------------------------
# Two processes


# More than one shard of the command's own size.
MANY = "--dataset_name textures --num_train_samples 4200 --resolution 8 --latents_dtype float16".split()


@pytest.mark.slow
def test_two_processes_of_the_command_write_the_files_of_one(tmp_path):
    script = Path(__file__).parents[2] / "training" / "encode_latents.py"
    command = [*torchrun(tmp_path / "logs"), script, *MANY, "--latents_dir", tmp_path / "two"]
    output = run_command(command, tmp_path / "output")
    encode(*MANY, "--latents_dir", tmp_path / "one")
    assert "with 2 process(es) on cpu" in output  # some ways to launch two processes run one
    assert len(LatentDataset(tmp_path / "two").manifest["shards"]) == 2
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.parametrize("damage", ["empty", "cut", "a bit", "no object", "of another shard"])
def test_a_damaged_note_of_an_unfinished_encoding_is_made_good(tmp_path, monkeypatch, damage):
    """The shard is encoded again, and no other; a torn manifest is written again."""
    folder, images, options = tmp_path / "latents", textures(), EncodingOptions(shard_size=4)
    expected = contents(write(folder, images).folder)
    note, content = folder / "shard-00001.json", bytearray(expected["shard-00001.json"])
    if damage == "a bit":
        content[content.index(b'"num_samples": 4') + 15] ^= 1  # 5 samples
    note.write_bytes(
        {
            "empty": b"",
            "cut": bytes(content[:-3]),
            "a bit": bytes(content),
            "no object": b"[]",
            "of another shard": b'{"settings": {}}',
        }[damage]
    )
    (folder / SHARD_MANIFEST).write_bytes(expected[SHARD_MANIFEST][:-5])
    assert not is_complete(folder)
    saved = []
    save_file = encoding.save_file
    monkeypatch.setattr(encoding, "save_file", lambda *args: (saved.append(1), save_file(*args)))
    encode_latents(images, None, folder, options)
    finish_latents(folder, latent_settings(images, None, options))
    assert contents(folder) == expected and len(saved) == 1


def test_the_manifest_states_tf32(monkeypatch):
    vae = tiny_vae()
    with_vae = settings_of(textures(), vae)
    monkeypatch.setattr(type(vae), "device", torch.device("cuda"))
    for is_allowed, stated in ((False, {}), (True, {"tf32": True})):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", is_allowed)
        assert settings_of(textures(), vae) == with_vae | stated
    assert "tf32" not in settings_of(textures())  # pixels as they are
