"""Images from archives, folders and data sets: the same ones, whole, and refused where they are not."""

import hashlib
import json
import os
import shutil
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import says, write_images
from PIL import Image
from torch.utils.data import Subset

from diffusers_dod.data.labelled_images import ImageOptions, load_labelled_images
from diffusers_dod.data.textures import TextureDataset
from diffusers_dod.evaluation.images import DatasetImages, FolderImages, NpzImages, draw_indices, open_images
from diffusers_dod.evaluation.options import read_batches
from diffusers_dod.image_reading import center_crop


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, size=(7, 6, 8, 3), dtype=np.uint8)


def write_folder(folder: Path, pixels: np.ndarray, **manifest) -> Path:
    folder.mkdir()
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{index:06d}.png")
    if manifest:
        (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def write_npz(path: Path, **arrays) -> Path:
    np.savez(path, **arrays)
    return path


def read(source, batch_size: int = 3, indices: list[int] | None = None) -> np.ndarray:
    batches = [batch for batch, _ in source.batches(batch_size, indices)]
    assert all(batch.dtype == torch.uint8 and len(batch) == batch_size for batch in batches[:-1])
    return torch.cat(batches).permute(0, 2, 3, 1).numpy()


def read_labels(source, indices: list[int] | None = None) -> list[int]:
    return torch.cat([labels for _, labels in source.batches(3, indices)]).tolist()


def sha256_of(folder: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.glob("*.png")))).hexdigest()


def test_archives_and_folders_hold_the_same_images(pixels, tmp_path):
    labels = np.arange(7)
    np.savez_compressed(tmp_path / "compressed.npz", arr_1=labels, arr_0=pixels)
    sources = {
        NpzImages: [write_npz(tmp_path / "a.npz", arr_0=pixels, arr_1=labels), tmp_path / "compressed.npz"],
        FolderImages: [write_folder(tmp_path / "folder", pixels)],
    }
    for kind, paths in sources.items():
        for path in paths:
            source = open_images(str(path))
            assert isinstance(source, kind) and len(source) == 7 and tuple(source.resolution) == (6, 8)
            for batch_size in (1, 3, 7, 100):
                assert np.array_equal(read(source, batch_size), pixels)
            assert np.array_equal(read(source, 2, [1, 2, 6]), pixels[[1, 2, 6]])
            assert np.array_equal(read(source), pixels)  # again from the start
            assert kind is FolderImages or np.array_equal(source.labels, labels)
            assert kind is FolderImages or read_labels(source, [1, 4, 5, 6]) == [1, 4, 5, 6]
            assert kind is NpzImages or [labels for _, labels in source.batches(4)] == [None, None]
            assert source.data["num_images"] == 7 and source.data["resolution"] == [6, 8]
            json.dumps(source.data)


def test_folders_are_sorted_by_name(pixels, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for index in (3, 0, 6, 1, 5, 2, 4):
        Image.fromarray(pixels[index]).save(folder / f"{index}.png")
    assert np.array_equal(read(open_images(str(folder))), pixels)


def test_images_that_there_are_not_are_refused(pixels, tmp_path):
    source = open_images(str(write_npz(tmp_path / "a.npz", arr_0=pixels)))
    for indices in ([0, 7], [-1, 2], [3, 2], [1, 1]):
        with pytest.raises(ValueError, match=says("`indices`", "[0, 6]", "a.npz")):
            list(source.batches(3, indices))
    assert list(source.batches(3, [])) == []
    with pytest.raises(ValueError, match=says("`batch_size`", ">= 1", "got 0")):
        list(source.batches(0))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_memory_does_not_grow_with_the_number_of_images(save, tmp_path):
    peaks = []
    for number in (200, 4000):
        path = tmp_path / f"{number}.npz"
        save(path, arr_0=np.random.default_rng(0).integers(0, 256, size=(number, 32, 32, 3), dtype=np.uint8))
        tracemalloc.start()
        count = sum(len(batch) for batch, _ in NpzImages(path).batches(10))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert count == number
    assert peaks[1] < 1.2 * peaks[0] + 100_000 and peaks[1] < 1_000_000  # out of 12.3 MB


def test_what_archives_refuse(pixels, tmp_path):
    bad = {
        "floats": (dict(arr_0=pixels / 255), ("`arr_0`", "uint8", "float64")),
        "grey": (dict(arr_0=pixels[..., 0]), ("`arr_0`", "(n, H, W, 3)", "(7, 6, 8)")),
        "channels first": (dict(arr_0=pixels.transpose(0, 3, 1, 2).copy()), ("`arr_0`", "(7, 3, 6, 8)")),
        "fortran": (dict(arr_0=np.asfortranarray(pixels)), ("`arr_0`", "Fortran")),
        "empty": (dict(arr_0=pixels[:0]), ("`arr_0`", "(0, 6, 8, 3)")),
        "statistics": (dict(mu=np.zeros(3)), ("`arr_0`", "npz")),
        "labels": (dict(arr_0=pixels, arr_1=np.arange(6)), ("`arr_1`", "7 class ids", "(6,)")),
    }
    for name, (arrays, fragments) in bad.items():
        with pytest.raises(ValueError, match=says(*fragments)):
            open_images(str(write_npz(tmp_path / f"{name}.npz", **arrays)))
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ValueError, match=says("npz", "text.npz")):
        open_images(str(tmp_path / "text.npz"))
    with pytest.raises(FileNotFoundError):
        open_images(str(tmp_path / "missing.npz"))


def test_damaged_archives_are_noticed(pixels, tmp_path):
    path = write_npz(tmp_path / "a.npz", arr_0=pixels)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # a bit of an image
    path.write_bytes(content)
    with pytest.raises(ValueError, match=says("`arr_0`", "damaged")):
        read(open_images(str(path)))
    header = np.lib.format.header_data_from_array_1_0(pixels)
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as archive, archive.open("arr_0.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.write(pixels[:5].tobytes())
    with pytest.raises(ValueError, match=says("short.npz", "`arr_0.npy`", "(7, 6, 8, 3)", "cannot hold")):
        open_images(str(tmp_path / "short.npz"))


def test_manifests_of_the_sampler_come_along(pixels, tmp_path):
    folder = write_folder(tmp_path / "png", pixels)
    manifest = {"num_images": 7, "sha256": sha256_of(folder), "labels": "labels.txt", "images": "*.png"}
    manifest["num_classes"] = 9
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "labels.txt").write_text("".join(f"{label}\n" for label in range(7)))
    source = open_images(str(folder))
    assert source.data["manifest"] == manifest and np.array_equal(source.labels, np.arange(7))
    assert source.num_classes == 9 and read_labels(source, [2, 3, 5]) == [2, 3, 5]

    archive = write_npz(tmp_path / "samples.npz", arr_0=pixels)
    manifest = {"num_images": 7, "sha256": hashlib.sha256(archive.read_bytes()).hexdigest()}
    manifest["images"] = "arr_0 of samples.npz"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    for name in (archive, tmp_path):  # the folder names its archive
        source = open_images(str(name))
        assert source.data["manifest"] == manifest and np.array_equal(read(source), pixels)
    assert "manifest" not in open_images(str(write_npz(tmp_path / "others.npz", arr_0=pixels))).data
    np.savez(archive, arr_0=pixels[::-1])
    with pytest.raises(ValueError, match=says("manifest", "another one")):
        open_images(str(archive))


def test_what_folders_refuse(pixels, tmp_path):
    write_folder(tmp_path / "count", pixels, num_images=8)
    write_folder(tmp_path / "others", pixels, num_images=7, sha256="0" * 64)
    write_folder(tmp_path / "unfinished", pixels)
    (tmp_path / "unfinished" / "chunks").mkdir()
    Image.fromarray(pixels[0, :5]).save(write_folder(tmp_path / "sizes", pixels) / "a.png")
    Image.fromarray(pixels[0, ..., 0]).save(write_folder(tmp_path / "modes", pixels) / "a.png")
    Image.fromarray(pixels[0]).save(write_folder(tmp_path / "jpeg", pixels) / "a.jpg")
    (write_folder(tmp_path / "text", pixels) / "a.png").write_text("no image")
    (write_folder(tmp_path / "json", pixels) / "manifest.json").write_text("{")
    (write_folder(tmp_path / "list", pixels) / "manifest.json").write_text("[]")
    (write_folder(tmp_path / "labels", pixels, labels="labels.txt") / "labels.txt").write_text("1\n2\n")
    write_folder(tmp_path / "resolution", pixels)
    refusals = {
        "count": ("the 8 PNG files of its manifest", "with 7"),
        "others": ("manifest", "got others"),
        "unfinished": ("complete", "has not ended"),
        "sizes": ("one size", "a.png", "8 x 5", "8 x 6"),
        "modes": ("RGB", "a.png", "in L"),
        "jpeg": ("PNG files only", "a.jpg"),
        "text": ("images", "a.png"),
        "json": ("`manifest.json`", "cannot be read"),
        "list": ("`manifest.json`", "dict", "list"),
        "labels": ("`labels.txt`", "7 class ids", "got 2"),
    }
    for name, fragments in refusals.items():
        with pytest.raises(ValueError, match=says(*fragments)):
            open_images(str(tmp_path / name))
    with pytest.raises(ValueError, match=says("`resolution`", "(6, 8)", "got 8")):
        open_images(str(tmp_path / "resolution"), 8)
    with pytest.raises(ValueError, match=says("`path` must hold PNG files", "empty")):
        FolderImages(tmp_path / "empty")


def test_names_of_no_images(tmp_path):
    (tmp_path / "empty" / "class").mkdir(parents=True)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "readme.md").write_text("no image")
    for name in ("empty", "text", "missing"):
        for resolution in (8,) if name != "empty" else (None, 8):
            with pytest.raises(ValueError, match=says("`name`", "images", str(tmp_path / name))):
                open_images(str(tmp_path / name), resolution)


def test_truncated_images_are_named(pixels, tmp_path):
    folder = write_folder(tmp_path / "folder", np.repeat(pixels, 20, axis=1))
    path = folder / "000003.png"
    path.write_bytes(path.read_bytes()[:-1500])
    with pytest.raises(ValueError, match="000003.png"):
        read(open_images(str(folder)))


def test_procedural_images():
    source = open_images("textures:14:5", 16)
    expected = TextureDataset(14, size=16, seed=5)
    assert isinstance(source, DatasetImages) and len(source) == 14
    assert np.array_equal(read(source), np.stack([expected[i]["image"] for i in range(14)]))
    assert read_labels(source) == [*range(12), 0, 1] and source.num_classes == 12
    assert open_images("textures:2:0").resolution == (32, 32)
    for name in ("textures", "textures:12", "textures:a:0", "textures:-1:0", "textures:1:2:3"):
        with pytest.raises(ValueError, match=says("textures:<number>:<seed>", repr(name))):
            open_images(name)


def test_a_folder_may_have_the_name_of_procedural_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "scenes"
    folder.mkdir()
    write_images(folder, [(8, 8)] * 3)
    source = open_images("scenes", 8)
    assert len(source) == 6 and source.num_classes == 2
    assert open_images("scenes:5:0", 8).num_classes == 8


def test_folders_of_classes_are_cropped(pixels, tmp_path):
    for index, image in enumerate(pixels):
        folder = tmp_path / "ab"[index % 2]
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{index}.png")
    expected = [center_crop(Image.fromarray(pixels[index]), 4) for index in (0, 2, 4, 6, 1, 3, 5)]
    source = open_images(str(tmp_path), 4)
    assert np.array_equal(read(source), np.stack(expected)) and source.resolution == (4, 4)
    with pytest.raises(ValueError, match=says("`resolution` must be given", str(tmp_path))):
        open_images(str(tmp_path))
    assert read_labels(source) == [0, 0, 0, 0, 1, 1, 1] and source.num_classes == 2
    (tmp_path / "b" / "1.png").write_text("no image")
    with pytest.raises(ValueError, match=says(str(tmp_path), "1.png")):
        read(open_images(str(tmp_path), 4))


def test_images_that_are_drawn():
    assert draw_indices(7).tolist() == draw_indices(7, 7).tolist() == list(range(7))
    drawn = draw_indices(1000, 100)
    assert len(set(drawn.tolist())) == 100 and drawn.max() > 900 and drawn.tolist() != sorted(drawn)
    assert draw_indices(1000, 40).tolist() == drawn[:40].tolist()  # of the same order, whatever the state of torch
    assert draw_indices(1001, 40).tolist() != drawn[:40].tolist()
    for number in (0, 8):
        with pytest.raises(ValueError, match=says("`num_images`", str(number))):
            draw_indices(7, number)


def test_a_folder_is_known_by_names_and_contents(pixels, tmp_path):
    """Wherever and whenever it was written."""
    for index, image in enumerate(pixels[:4]):
        (tmp_path / "first" / "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "first" / "ab"[index % 2] / f"{index}.png")
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    for number, path in enumerate((tmp_path / "copy").rglob("*.png")):
        os.utime(path, (number, number))
    (tmp_path / "copy" / ".hidden").write_text("of the system")

    def identity(name: str) -> str:
        return open_images(str(tmp_path / name), 4).data["fingerprint"]

    first = identity("first")
    assert identity("copy") == first
    moved = tmp_path / "copy" / "a" / "0.png"
    moved.rename(moved.with_name("00.png"))
    assert identity("copy") != first
    moved.with_name("00.png").rename(moved)
    content = moved.read_bytes()
    moved.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert identity("copy") != first


def test_images_of_a_folder_may_be_of_any_data_set(pixels, tmp_path):
    """Their identity is that of the folder, but for what their own fingerprint adds."""
    for index, image in enumerate(pixels[:4]):
        (tmp_path / "ab"[index % 2]).mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "ab"[index % 2] / f"{index}.png")
    images = load_labelled_images(ImageOptions(train_data_dir=str(tmp_path), resolution=4), 0, 0)
    whole = DatasetImages("whole", images, str(tmp_path)).data["fingerprint"]
    part = replace(images, dataset=Subset(images.dataset, [2, 0]), fingerprint=f"{images.fingerprint}-part")
    source = DatasetImages("part", part, str(tmp_path))
    assert source.data["fingerprint"] == f"{whole}-part" and whole.endswith("-image-label")
    assert np.array_equal(read(source), [images.dataset[2]["image"], images.dataset[0]["image"]])


def test_class_ids_of_data_sets_are_known_before_images_are_read(tmp_path):
    write_images(tmp_path, [(8, 8), (9, 9)])
    (tmp_path / "ant" / "1.png").write_bytes(b"no image")
    images = open_images(str(tmp_path), resolution=8)
    assert images.labels.tolist() == [0, 0, 1, 1]
    textures = open_images("textures:30:5")
    assert textures.labels.tolist() == torch.cat([labels for _, labels in textures.batches(30)]).tolist()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named(tmp_path, num_workers):
    for name in ("ant", "newt"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "0.png")
    path = tmp_path / "newt" / "1.png"
    Image.new("RGB", (1, 20_000)).save(path)
    message = says("Images must be readable", f"{path}: ValueError: an image of 1 x 20000 pixels")
    with pytest.raises(ValueError, match=message):
        list(open_images(str(tmp_path), resolution=8).batches(2))
    images = load_labelled_images(ImageOptions(train_data_dir=str(tmp_path), resolution=8), 0, 0)
    with pytest.raises(ValueError, match=message):
        list(read_batches(images, [0, 1, 2], 2, num_workers))


def test_archives_of_absurd_size_are_not_read(pixels, tmp_path, monkeypatch):
    monkeypatch.setattr(np, "load", lambda *_: pytest.fail("It is read."))
    labels = np.zeros(10**7, np.int64)
    np.savez_compressed(tmp_path / "labels.npz", arr_0=pixels, arr_1=labels)
    with pytest.raises(ValueError, match=says("`arr_1` must hold", "10000000")):
        open_images(str(tmp_path / "labels.npz"))
    np.savez_compressed(tmp_path / "side.npz", arr_0=np.zeros((1, 9000, 9000, 3), np.uint8))
    with pytest.raises(ValueError, match=says("`arr_0`", "pixels", "9000")):
        open_images(str(tmp_path / "side.npz"))
