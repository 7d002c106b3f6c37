"""Folders of images as users, their tools and their disks leave them: classes, images, and what is left out."""

import os
import pickle
import shutil
import unicodedata
from pathlib import Path

import datasets
import pytest
from helpers import says
from PIL import Image

from diffusers_dod.data import image_folder
from diffusers_dod.data.image_folder import (
    BESIDE,
    DANGLING,
    HIDDEN,
    LIKE_IMAGE,
    OTHER,
    SEEN,
    BadImagesError,
    ImageFolder,
)
from diffusers_dod.data.labelled_images import ImageOptions, LabelledImages, load_labelled_images
from diffusers_dod.evaluation.images import open_images


def load(folder: Path, on_bad_image: str = "error") -> LabelledImages:
    return load_labelled_images(ImageOptions(train_data_dir=str(folder), resolution=8), 0, 0, on_bad_image)


def write(folder: Path, *paths: str) -> Path:
    """Writes small images, and other files where the suffix is none of an image; `a -> b` is a link to `b`."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        path, _, target = path.partition(" -> ")
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        if target:
            (folder / path).symlink_to(target)
        elif path.endswith("/"):
            (folder / path).mkdir(exist_ok=True)
        elif Path(path).suffix.lower() in (".png", ".jpg", ".jpeg", ".webp") and not Path(path).name.startswith("._"):
            Image.new("RGB", (8, 8), (len(path), 7, 9)).save(folder / path)
        else:
            (folder / path).write_text("text")
    return folder


# Name -> what is in the folder, the images by class, and what is left out by reason.
FOLDERS = {
    "deeper folders are just places": (
        ["cat/2024/0.png", "coffee/2024/0.png", "brick/0.png"],
        {"brick": ["brick/0.png"], "cat": ["cat/2024/0.png"], "coffee": ["coffee/2024/0.png"]},
        {},
    ),
    "a class without images": (
        ["ant/", "bee/0.png", "cow/deep/"],
        {"ant": [], "bee": ["bee/0.png"], "cow": []},
        {},
    ),
    "names of splits": (
        [
            *("train/0.png", "test/0.png", "val/0.png", "dev/eval/0.png", "steam train/0.png", "test tube/0.png"),
            *("validation/COCO_val2014_1.jpg", "wolf/ILSVRC2012_val_00000001.JPEG", "wolf/train_1.png"),
        ],
        {
            "dev": ["dev/eval/0.png"],
            "steam train": ["steam train/0.png"],
            "test": ["test/0.png"],
            "test tube": ["test tube/0.png"],
            "train": ["train/0.png"],
            "val": ["val/0.png"],
            "validation": ["validation/COCO_val2014_1.jpg"],
            "wolf": ["wolf/ILSVRC2012_val_00000001.JPEG", "wolf/train_1.png"],
        },
        {},
    ),
    "patterns": (
        ["a[1]/0.png", "b*/[x]?.png", "c::d/0.png", "ab/0.png", "{e}/~.png"],
        {
            "a[1]": ["a[1]/0.png"],
            "ab": ["ab/0.png"],
            "b*": ["b*/[x]?.png"],
            "c::d": ["c::d/0.png"],
            "{e}": ["{e}/~.png"],
        },
        {},
    ),
    "suffixes in any case": (
        ["ant/0.png", "ant/1.PNG", "ant/2.JpEg", "bee/3.WEBP"],
        {"ant": ["ant/0.png", "ant/1.PNG", "ant/2.JpEg"], "bee": ["bee/3.WEBP"]},
        {},
    ),
    "other files": (
        ["ant/0.png", "metadata.csv", "ant/metadata.jsonl", "bee/images.zip", "README.md", "ant.parquet", "n.tar"],
        {"ant": ["ant/0.png"], "bee": []},
        {OTHER: ["README.md", "ant.parquet", "metadata.csv", "n.tar", "ant/metadata.jsonl", "bee/images.zip"]},
    ),
    "hidden": (
        [".DS_Store", ".git/0.png", "__MACOSX/ant/0.png", "ant/._0.png", "ant/0.png", "ant/.thumbs/0.png"],
        {"ant": ["ant/0.png"]},
        {HIDDEN: [".DS_Store", ".git", "__MACOSX", "ant/._0.png", "ant/.thumbs"]},
    ),
    "a folder named like an image": (
        ["ant/0.png", "ant/1.png/0.png", "mr.tif/0.png"],
        {"ant": ["ant/0.png"], "mr.tif": ["mr.tif/0.png"]},
        {LIKE_IMAGE: ["ant/1.png"]},
    ),
    "links": (
        ["../elsewhere/deep/0.png", "../elsewhere/1.png", "ant -> ../elsewhere", "bee/0.png -> ../../elsewhere/1.png"],
        {"ant": ["ant/1.png", "ant/deep/0.png"], "bee": ["bee/0.png"]},
        {},
    ),
    "loops": (
        ["ant/0.png", "ant/up -> ..", "ant/deep/again -> .", "bee/more -> ../ant", "bee/1.png", "cow -> ."],
        {
            "ant": ["ant/0.png"],
            "bee": ["bee/1.png", "bee/more/0.png"],
            "cow": [],
        },
        {SEEN: ["ant/deep/again", "ant/up", "bee/more/deep/again", "bee/more/up", "cow"]},
    ),
}


@pytest.mark.parametrize(("paths", "classes", "left_out"), FOLDERS.values(), ids=FOLDERS)
def test_what_is_found(tmp_path, paths, classes, left_out):
    images = load(write(tmp_path / "images", *paths))
    assert images.class_names == tuple(classes)
    expected = [(path, label) for label, (_, files) in enumerate(classes.items()) for path in files]
    found = [
        (os.path.relpath(images.path_of(index), tmp_path / "images"), images.dataset[index]["label"])
        for index in range(len(images.dataset))
    ]
    assert found == sorted(expected)
    assert {reason: part.count for reason, part in images.left_out.items()} == {
        reason: len(files) for reason, files in left_out.items()
    }
    assert {reason: sorted(part.paths) for reason, part in images.left_out.items()} == {
        reason: sorted(sorted(files, key=lambda path: files.index(path))[:5]) for reason, files in left_out.items()
    }
    read = open_images(str(tmp_path / "images"), 8)
    assert read.num_classes == len(classes) and len(read) == len(expected)


def test_an_ordinary_folder_is_read_as_by_datasets(tmp_path):
    names = ["ant", "ant-1", "ant 1", "Bee", "bee", "cow.x", "zebra", "Ünze"]
    paths = [f"{name}/{file}" for name in names for file in ("10.png", "9.png", "b.jpg", "B.png", "a-b.png")]
    folder = write(tmp_path / "images", *paths)
    theirs = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", drop_labels=False)
    theirs = theirs.cast_column("image", datasets.Image(decode=False))
    ours = ImageFolder(str(folder))
    assert len(ours) == len(theirs) == 40 and list(ours.class_names) == theirs.features["label"].names
    for mine, other in zip((ours[index] for index in range(40)), theirs, strict=True):
        assert mine["image"]["path"] == other["image"]["path"] and mine["label"] == other["label"]


BAD = {
    "an image beside the classes": ("3.png", f"3.png: {BESIDE}"),
    "a link to nothing": ("ant/3.png -> nowhere", f"ant/3.png: {DANGLING}"),
    "a class that leads to nothing": ("bee -> /no/such/disk", f"bee: {DANGLING}"),
    "a link to itself": ("ant/3.png -> 3.png", f"ant/3.png: {DANGLING}"),
}


@pytest.mark.parametrize(("path", "message"), BAD.values(), ids=BAD)
def test_images_that_are_nowhere_are_bad(tmp_path, path, message):
    folder = write(tmp_path / "images", "ant/0.png", "cow/0.png", path)
    with pytest.raises(BadImagesError, match=says("1 images", f"{folder}/{message}", "`on_bad_image` = 'skip'")):
        load(folder)
    with pytest.raises(ValueError, match=says(f"{folder}/{message}")):
        open_images(str(folder), 8)
    images = load(folder, "skip")
    assert images.class_names == (("ant", "bee", "cow") if "bee" in path else ("ant", "cow"))
    assert len(images.dataset) == 2 and message.split(": ")[0] in images.describe()


@pytest.mark.parametrize("name", ["[x]", "a*b?", "a::b", "test", "val-1", ".hidden", "__special"])
def test_the_name_of_the_folder_means_nothing(tmp_path, name):
    images = load(write(tmp_path / name / "images[0]", "ant/0.png", "bee/1.png"))
    assert images.class_names == ("ant", "bee") and len(images.dataset) == 2
    assert images.dataset[1]["image"].shape == (8, 8, 3)


def test_a_folder_without_images_says_what_is_there(tmp_path):
    folder = write(tmp_path / "images", "ant/a.txt", "b.zip", "bee/")
    with pytest.raises(ValueError, match=says("`train_data_dir`", repr(str(folder)), "2 sub-folders", "b.zip, ant/a")):
        load(folder)
    with pytest.raises(ValueError, match=says("`train_data_dir`", "0 sub-folders")):
        load(write(tmp_path / "empty"))


def test_images_are_known_by_names_and_sizes(tmp_path):
    folder = write(tmp_path / "images", "ant/0.png", "bee/1.png")
    first = load(folder).fingerprint
    shutil.copytree(folder, tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("*"):
        os.utime(path, (1, 1))
    write(tmp_path / "copy", ".DS_Store", "README.md", "ant/notes.txt", "ant/.cache/0.png")
    assert load(tmp_path / "copy").fingerprint == first
    evaluated = [open_images(str(path), 8).data["fingerprint"] for path in (folder, tmp_path / "copy")]
    assert evaluated[0] == evaluated[1]
    (tmp_path / "copy" / "ant" / "0.png").rename(tmp_path / "copy" / "ant" / "2.png")
    assert load(tmp_path / "copy").fingerprint != first


def test_names_have_one_form(tmp_path):
    """Systems spell an umlaut as one letter or as two."""
    composed, split = (unicodedata.normalize(form, "Bär/ö.png") for form in ("NFC", "NFD"))
    one, two = load(write(tmp_path / "one", composed, "Bz/0.png")), load(write(tmp_path / "two", split, "Bz/0.png"))
    assert composed != split and one.class_names == two.class_names == ("Bz", "Bär")
    assert one.fingerprint == two.fingerprint and len(two.dataset) == 2
    assert two.dataset[1]["label"] == 1 and two.path_of(1) == str(tmp_path / "two" / split)
    with pytest.raises(ValueError, match=says("class folders whose names differ", "['Bär'] twice")):
        load(write(tmp_path / "one", split))


def test_names_that_are_no_text(tmp_path):
    folder = write(tmp_path / "images", "ant/0.png")
    name = os.fsencode(folder / "ant") + b"/\xff.png"
    os.rename(folder / "ant" / "0.png", name)
    images = load(folder)
    assert os.fsencode(images.path_of(0)) == name and images.dataset[0]["label"] == 0


def test_the_images_of_each_class_are_described(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers_dod.data.class_names.NUM_SHOWN", 2)
    hidden = [f"ant/.{number}" for number in range(7)]
    folder = write(tmp_path / "images", "ant/0.png", "ant/deep/1.png", "bee/", "cow/0.png", "a.txt", *hidden)
    assert load(folder).describe().splitlines() == [
        "3 images of 3 classes, 1 of them without an image",
        "  class 0, ant: 2 images",
        "  class 1, bee: 0 images",
        "  and 1 more classes",
        f"  left out, {OTHER}: 1 (a.txt)",
        f"  left out, {HIDDEN}: 7 (ant/.0, ant/.1, ant/.2, ant/.3, ant/.4 and 2 more)",
    ]


def test_workers_get_the_images(tmp_path):
    images = load(write(tmp_path / "images", "ant/0.png", "bee/1.png")).dataset
    copy = pickle.loads(pickle.dumps(images))
    assert [copy.path_of(index) for index in range(2)] == [images.path_of(index) for index in range(2)]
    assert copy[1]["label"] == 1 and images.select([1], (4, 4)).path_of(0) == images.path_of(1) == images.path_of(-1)


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    folder, scandir = write(tmp_path / "images", "ant/0.png", "bee/0.png"), os.scandir

    def refuse(path):  # permissions mean nothing to the superuser
        if str(path).endswith("bee"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(image_folder.os, "scandir", refuse)
    with pytest.raises(BadImagesError, match=says(f"{folder}/bee", "cannot be listed (Permission denied)")):
        load(folder)
