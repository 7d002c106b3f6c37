"""Latents of LightningDiT, EDM2 and REPA, in files written as those projects write them."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from helpers import fresh_accelerator, says
from safetensors.torch import save_file

from diffusers_dod import DoDPipeline
from diffusers_dod.autoencoders import latent_statistics
from diffusers_dod.data.foreign_latents import Edm2Latents, LightningDiTLatents, open_latents
from diffusers_dod.training.train import main


LABELS = [2, 0, 1, 0, 2]


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.5,
        shift_factor=0.25,
    ).eval()


def arrays(channels: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(5, channels, 8, 8, generator=torch.Generator().manual_seed(seed))


def write_lightning_dit(folder: Path, flip: bool = True) -> Path:
    folder.mkdir()
    for number, rows in enumerate((slice(0, 3), slice(3, 5))):
        tensors = {"latents": arrays()[rows].clone(), "labels": torch.tensor(LABELS[rows])}
        if flip:
            tensors["latents_flip"] = arrays(seed=1)[rows].clone()
        metadata = {"total_size": str(len(tensors["labels"])), "dtype": "torch.float32", "device": "cpu"}
        save_file(tensors, folder / f"latents_rank00_shard{number:03d}.safetensors", metadata)
    torch.save({"mean": torch.zeros(1, 4, 1, 1), "std": torch.ones(1, 4, 1, 1)}, folder / "latents_stats.pt")
    return folder


def write_edm2(folder: Path) -> Path:
    moments = torch.cat([arrays(), arrays(seed=1).abs()], dim=1)
    names = [f"{index // 3:05d}/img-mean-std-{index:08d}.npy" for index in range(5)]
    for name, array in zip(names, moments, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / name, array.numpy())
    labels = [[name, label] for name, label in zip(names, LABELS, strict=True)]
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    return folder


@pytest.mark.parametrize("flip", [True, False])
def test_lightning_dit(tmp_path, vae, flip):
    latents = open_latents(write_lightning_dit(tmp_path / "shards", flip), vae)
    assert isinstance(latents, LightningDiTLatents)
    assert (len(latents), latents.num_views, latents.latent_shape) == (5, 1 + flip, (4, 8, 8))
    assert latents.labels.tolist() == LABELS and latents.manifest["class_names"] == ["0", "1", "2"]
    mean, std = latent_statistics(vae, torch.zeros(1))
    for reader in (latents, pickle.loads(pickle.dumps(latents))):
        for view in range(latents.num_views):
            for index in range(5):
                found, deviation = reader.read(index, view)
                torch.testing.assert_close(found, ((arrays(seed=view)[index] - mean) / std)[0])
                assert deviation is None


def test_edm2(tmp_path, vae):
    latents = open_latents(write_edm2(tmp_path / "arrays"), vae)
    assert isinstance(latents, Edm2Latents)
    assert (len(latents), latents.num_views, latents.latent_shape) == (5, 1, (4, 8, 8))
    assert latents.labels.tolist() == LABELS
    mean, std = latent_statistics(vae, torch.zeros(1))
    for index in range(5):
        found, deviation = latents.read(index)
        torch.testing.assert_close(found, ((arrays()[index] - mean) / std)[0])
        torch.testing.assert_close(deviation, (arrays(seed=1)[index].abs() / std)[0])


@pytest.mark.parametrize("write", [write_lightning_dit, write_edm2])
def test_training_on_them(tmp_path, vae, write):
    vae.save_pretrained(tmp_path / "vae")
    options = [
        "--preset",
        "DoD-Desk",
        "--train_batch_size",
        4,
        "--max_train_steps",
        2,
        "--output_dir",
        tmp_path / "run",
    ]
    options += ["--latents_dir", write(tmp_path / "latents"), "--pretrained_vae_name_or_path", tmp_path / "vae"]
    with fresh_accelerator():
        main([str(option) for option in options])
    pipe = DoDPipeline.from_pretrained(tmp_path / "run")
    assert pipe.transformer.config.num_classes == 3 and pipe.transformer.config.sample_size == 8
    assert "16 x 16" in (tmp_path / "run" / "README.md").read_text()


def test_they_need_their_autoencoder(tmp_path, vae):
    with pytest.raises(ValueError, match=says("`pretrained_vae_name_or_path`", "got None")):
        open_latents(write_edm2(tmp_path / "arrays"), None)
    other = AutoencoderKL(latent_channels=3, latents_mean=[0.0] * 3, latents_std=[1.0] * 3)
    with pytest.raises(ValueError, match=says("3 channels", "got 4")):
        open_latents(tmp_path / "arrays", other)


def test_what_is_none_of_them(tmp_path, vae):
    with pytest.raises(ValueError, match=says("`latents_dir`", "manifest.json", "dataset.json", str(tmp_path))):
        open_latents(tmp_path, vae)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="format"):
        open_latents(tmp_path, vae)


@pytest.mark.parametrize(
    ("index", "fragment"),
    [
        ({}, "`labels`"),
        ({"labels": None}, "at least one"),
        ({"labels": [["a.npy", "x"]]}, "`labels[0]`"),
        ({"labels": [["a.npy", 1.0]]}, "`labels[0]`"),
        ({"labels": [["a.npy"]]}, "`labels`"),
        ({"labels": [7]}, "`labels[0]`"),
        ({"labels": [["../a.npy", 0]]}, "same folder"),
        ({"labels": [["a.npy", 2**63]]}, "`labels`"),
    ],
)
def test_bad_indices(tmp_path, vae, index, fragment):
    (tmp_path / "dataset.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=says(fragment, "dataset.json")):
        open_latents(tmp_path, vae)


def test_classes_without_end_are_refused(tmp_path, vae):
    folder = write_edm2(tmp_path)
    index = json.loads((folder / "dataset.json").read_text())
    index["labels"][0][1] = 10**12
    (folder / "dataset.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=says("class ids in [0, 999999]", "1000000000000")):
        open_latents(folder, vae)


def test_arrays_of_another_shape_are_refused_when_read(tmp_path, vae):
    folder = write_edm2(tmp_path)
    latents = open_latents(folder, vae)
    files = sorted(folder.rglob("*.npy"))
    np.save(files[1], np.zeros((8, 300, 300)))
    files[2].write_bytes(files[2].read_bytes()[:-1])
    with pytest.raises(ValueError, match=says(files[1].name, "(8, 8, 8)", "got (8, 300, 300)")):
        [latents.read(index) for index in range(len(latents))]
    np.save(files[1], np.zeros((8, 8, 8)))
    with pytest.raises(ValueError, match=says(files[2].name, "undamaged")):
        [latents.read(index) for index in range(len(latents))]


def test_bad_arrays_and_shards(tmp_path, vae):
    folder = write_edm2(tmp_path / "arrays")
    np.save(folder / "00000" / "img-mean-std-00000000.npy", np.zeros((3, 8, 8)))
    with pytest.raises(ValueError, match=says("(2C, h, w)", "got (3, 8, 8)")):
        open_latents(folder, vae)
    folder = write_lightning_dit(tmp_path / "shards")
    shard = folder / "latents_rank00_shard001.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ValueError, match=says("shard001", "undamaged")):
        open_latents(folder, vae)
    save_file({"latents": arrays()[:, :3].contiguous(), "labels": torch.zeros(5)}, shard)
    with pytest.raises(ValueError, match=says("one form", "(3, 8, 8)")):
        open_latents(folder, vae)
    save_file({"features": arrays()}, shard)
    with pytest.raises(ValueError, match=says("`labels` and `latents`", "['features']")):
        open_latents(folder, vae)
