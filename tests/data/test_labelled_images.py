"""Images: what is opened."""

from pathlib import Path

import numpy as np
import pytest
from helpers import noise_image, says
from PIL import Image, UnidentifiedImageError

from diffusers_dod.data.labelled_images import ImageOptions, LabelledImages, load_labelled_images
from diffusers_dod.data.textures import TEXTURE_CLASSES, TextureDataset


# ---------------------------------------------------------------------------------------------------------------------
# Where images come from


def load(
    dataset_name=None, train_data_dir=None, resolution=16, num_train_samples=8, seed=0, **columns
) -> LabelledImages:
    folder = None if train_data_dir is None else str(train_data_dir)
    images = ImageOptions(dataset_name=dataset_name, train_data_dir=folder, resolution=resolution, **columns)
    return load_labelled_images(images, num_train_samples, seed)


def write_images(folder: Path, names: tuple[str, ...], count: int = 2) -> Path:
    """Images of one colour each: red is the class' position in `names`, green the image's number."""
    for position, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (20, 18), (50 * position, 50 * number, 7)).save(folder / name / f"{number}.png")
    return folder


@pytest.mark.parametrize(("name", "folder"), [(None, None), ("textures", "somewhere")])
def test_exactly_one_source(name, folder):
    with pytest.raises(ValueError, match="Exactly one of `dataset_name` and `train_data_dir`") as error:
        load(name, folder)
    assert repr(name) in str(error.value) and repr(folder) in str(error.value)


def test_unknown_folder(tmp_path):
    with pytest.raises(ValueError, match="`train_data_dir` must be an existing folder") as error:
        load(train_data_dir=tmp_path / "nothing")
    assert "nothing" in str(error.value)


def test_textures():
    images = load("textures", num_train_samples=8, seed=3)
    assert images.class_names == TEXTURE_CLASSES and len(images.dataset) == 8
    np.testing.assert_array_equal(images.dataset[5]["image"], TextureDataset(8, size=16, seed=3)[5]["image"])
    same = load("textures", num_train_samples=8, seed=3)
    others = [
        load("textures", num_train_samples=8, seed=4),
        load("textures", num_train_samples=9, seed=3),
        load("textures", resolution=8, num_train_samples=8, seed=3),
    ]
    assert same.fingerprint == images.fingerprint
    assert len({images.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_image_folder(tmp_path):
    folder = write_images(tmp_path / "images", ("zebra", "ant", "newt"))
    images = load(train_data_dir=folder)
    assert images.class_names == ("ant", "newt", "zebra")  # in alphabetical order, whatever the file system's
    assert len(images.dataset) == 6
    red_of = {"zebra": 0, "ant": 50, "newt": 100}
    seen = set()
    for row in (images.dataset[i] for i in range(6)):
        assert row["image"].shape == (16, 16, 3) and row["image"].dtype == np.uint8
        red, green, blue = row["image"][8, 8]
        assert red == red_of[images.class_names[row["label"]]] and blue == 7
        seen.add((int(red), int(green)))
    assert len(seen) == 6


def test_fingerprint_of_an_image_folder(tmp_path, monkeypatch):
    import datasets

    folder = write_images(tmp_path / "images", ("ant", "newt"))
    first = load(train_data_dir=folder)
    assert load(train_data_dir=folder).fingerprint == first.fingerprint
    # A resumed run on a machine that has lost its cache has the same images.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "another_cache"))
    assert load(train_data_dir=folder).fingerprint == first.fingerprint
    Image.new("RGB", (20, 18), "white").save(folder / "ant" / "2.png")
    assert load(train_data_dir=folder).fingerprint != first.fingerprint


def test_images_that_change_have_another_fingerprint(tmp_path):
    folder = write_images(tmp_path / "images", ("ant", "newt"))
    first = load(train_data_dir=folder).fingerprint
    path = folder / "ant" / "0.png"
    size = path.stat().st_size
    noise_image(20, 18).save(path)
    assert path.stat().st_size != size
    assert load(train_data_dir=folder).fingerprint != first


@pytest.mark.parametrize("empty", ["aardvark", "badger", "zebra"])
def test_a_folder_without_images_keeps_its_id(tmp_path, empty):
    names = sorted(["ant", "newt", empty])
    folder = write_images(tmp_path / "images", ("ant", "newt"))
    (folder / empty).mkdir()
    images = load(train_data_dir=folder)
    assert images.class_names == tuple(names)
    red_of = {names.index("ant"): 0, names.index("newt"): 50}
    for row in (images.dataset[i] for i in range(4)):
        assert row["image"][8, 8, 0] == red_of[row["label"]]


def test_a_folder_that_loses_its_images_keeps_its_id(tmp_path):
    folder = write_images(tmp_path / "images", ("ant", "bee", "newt"))
    before = load(train_data_dir=folder)
    for path in (folder / "ant").iterdir():
        path.unlink()
    after = load(train_data_dir=folder)
    assert after.class_names == before.class_names == ("ant", "bee", "newt")
    assert sorted(after.dataset[i]["label"] for i in range(4)) == [1, 1, 2, 2]
    assert after.fingerprint != before.fingerprint


@pytest.mark.parametrize("hidden", [".cache", "__MACOSX"])
def test_folders_that_datasets_does_not_read_are_no_classes(tmp_path, hidden):
    folder = write_images(tmp_path / "images", ("ant", "newt"))
    (folder / hidden).mkdir()
    assert load(train_data_dir=folder).class_names == ("ant", "newt")


def test_what_cannot_be_read_has_a_path(tmp_path):
    folder = write_images(tmp_path / "images", ("ant", "newt"))
    (folder / "newt" / "0.png").write_text("no image")
    images = load(train_data_dir=folder)
    paths = [images.path_of(i) for i in range(4)]
    assert sorted(paths) == sorted(str(path) for path in folder.glob("*/*.png"))
    with pytest.raises(UnidentifiedImageError):
        images.dataset[paths.index(str(folder / "newt" / "0.png"))]
    index = paths.index(str(folder / "newt" / "0.png"))
    with pytest.raises(ValueError, match=says("Images must be readable", paths[index], "UnidentifiedImageError")):
        images[index]
    np.testing.assert_array_equal(images[0]["image"], images.dataset[0]["image"])
    assert load("textures").path_of(3) == "row 3"


def test_missing_columns(tmp_path):
    folder = write_images(tmp_path / "images", ("ant", "newt"))
    with pytest.raises(ValueError, match="`image_column` must be one of the columns") as error:
        load(train_data_dir=folder, image_column="photo")
    assert "'image', 'label'" in str(error.value) and "'photo'" in str(error.value)
    with pytest.raises(ValueError, match="`label_column` must be one of the columns"):
        load(train_data_dir=folder, label_column="kind")

    flat = tmp_path / "flat"
    flat.mkdir()
    noise_image(16, 16).save(flat / "image.png")
    with pytest.raises(ValueError, match=r"`train_data_dir` must be .*one sub-folder of images per class.*image\.png"):
        load(train_data_dir=flat)


def test_a_table_beside_images_gives_them_no_classes(tmp_path):
    folder = tmp_path / "measured"
    folder.mkdir()
    rows = [f"{i}.png,{i / 2}" for i in range(4)]
    for i in range(4):
        noise_image(16, 16).save(folder / f"{i}.png")
    (folder / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    with pytest.raises(ValueError, match=r"one sub-folder of images per class.*4 \(0\.png.*1 \(metadata\.csv\)"):
        load(train_data_dir=folder)


def test_names_of_folders_are_checked_before_anything_is_read(tmp_path, caplog):
    folder = write_images(tmp_path / "images", ("ant", "newt, "))
    assert load(train_data_dir=folder).class_names == ("ant", "newt") and "'newt, ' to 'newt'" in caplog.text
    (folder / " ").mkdir()
    with pytest.raises(ValueError, match=says("`class_names`", "must not be blank", "got ' ' for class 0")):
        load(train_data_dir=folder)
