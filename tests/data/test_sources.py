"""Where images come from: image folders, Parquet, WebDataset's tar files, data sets of the Hub."""

import io
import os
import shutil
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from helpers import says
from PIL import Image

from diffusers_dod.data.labelled_images import ImageOptions, LabelledImages, find_shards, load_labelled_images
from diffusers_dod.data.sample_stream import SampleDraws
from diffusers_dod.data.streaming import ImageStream, open_stream
from diffusers_dod.image_reading import center_crop


def load(folder: Path, **columns: str) -> LabelledImages:
    return load_labelled_images(ImageOptions(train_data_dir=str(folder), resolution=16, **columns), 1, 0)


@pytest.fixture
def images() -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)) for _ in range(4)]


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(folder, images, labels, feature, column="label") -> None:
    folder.mkdir()
    features = datasets.Features({"image": datasets.Image(), column: feature})
    half = len(images) // 2
    for number, part in enumerate((slice(0, half), slice(half, None))):  # several files in order
        rows = {"image": images[part], column: labels[part]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"part-{number}.parquet")


def write_tars(folder, images, labels) -> None:
    folder.mkdir()
    for number in range(2):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for index in range(2 * number, 2 * number + 2):
                for name, content in ((f"{index}.png", png(images[index])), (f"{index}.cls", str(labels[index]))):
                    content = content if isinstance(content, bytes) else content.encode()
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))


def assert_holds(loaded, images, labels, class_names) -> None:
    assert loaded.class_names == class_names and len(loaded.dataset) == len(images)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        sample = loaded.dataset[index]
        assert sample["label"] == label
        np.testing.assert_array_equal(sample["image"], center_crop(image, 16))


def test_webdataset(tmp_path, images):
    write_tars(tmp_path / "tars", images, [2, 0, 0, 1])
    loaded = load(tmp_path / "tars", image_column="png", label_column="cls")
    assert_holds(loaded, images, [2, 0, 0, 1], ("0", "1", "2"))
    assert loaded.path_of(3) == "3.png"


@pytest.mark.parametrize(
    ("feature", "labels", "ids", "class_names"),
    [
        (datasets.ClassLabel(names=["ant", "bee", "cat"]), [1, 0, 0, 1], [1, 0, 0, 1], ("ant", "bee", "cat")),
        (datasets.Value("string"), ["b", "a", "c", "a"], [1, 0, 2, 0], ("a", "b", "c")),
        (datasets.Value("int64"), [3, 0, 0, 1], [3, 0, 0, 1], ("0", "1", "2", "3")),
    ],
    ids=["class labels", "names", "ids"],
)
def test_parquet(tmp_path, images, feature, labels, ids, class_names):
    write_parquet(tmp_path / "parquet", images, labels, feature, "kind")
    loaded = load(tmp_path / "parquet", label_column="kind")
    assert_holds(loaded, images, ids, class_names)


NO_CLASSES = {
    "floats": (datasets.Value("float32"), [0.5] * 4, ["class labels, names or ids from 0", "float32"]),
    "lists": (datasets.List(datasets.Value("int64")), [[0, 1]] * 4, ["class labels, names or ids from 0", "List("]),
    "mappings": ({"id": datasets.Value("int64")}, [{"id": 0}] * 4, ["class labels, names or ids from 0", "'id'"]),
    "negative": (datasets.Value("int64"), [-1, 0, 1, 2], ["ids from 0 to 999999", "those from -1 to 2"]),
    "nine digits": (datasets.Value("int64"), [1, 123456789, 2, 3], ["ids from 0 to 999999", "from 1 to 123456789"]),
    "none": (datasets.Value("int64"), [None] * 4, ["names of classes, or ids", "with none"]),
}


@pytest.mark.parametrize(("feature", "labels", "fragments"), NO_CLASSES.values(), ids=NO_CLASSES)
def test_labels_that_are_no_classes(tmp_path, images, feature, labels, fragments):
    write_parquet(tmp_path / "parquet", images, labels, feature)
    with pytest.raises(ValueError, match=says("`label_column`", "got 'label'", *fragments)):
        load(tmp_path / "parquet")


def test_names_that_differ_by_mistakes_are_one_class(tmp_path, images, caplog):
    """Stored or streamed, labels have the same ids."""
    labels = ["cat\n", "B\u00e4r", "cat,", "Ba\u0308r"]
    write_parquet(tmp_path / "parquet", images, labels, datasets.Value("string"))
    loaded = load(tmp_path / "parquet")
    assert_holds(loaded, images, [1, 0, 1, 0], ("B\u00e4r", "cat"))
    assert loaded.dataset.count_images() == {0: 2, 1: 2} and "Names of classes are changed" in caplog.text
    stream, class_names = open_stream(
        ImageOptions(train_data_dir=str(tmp_path / "parquet")), ["Ba\u0308r", "\ufeffcat"]
    )
    assert class_names == ("B\u00e4r", "cat")
    draws = SampleDraws(num_classes=2, seed=0, label_dropout_prob=0.0)
    rows = iter(ImageStream(stream, class_names, draws, (3, 16, 16), 1, images=ImageOptions(resolution=16)))
    assert sorted(next(rows)["class_label"] for _ in range(4)) == [0, 0, 1, 1]


def test_other_columns_are_other_images(tmp_path, images):
    folder = tmp_path / "parquet"
    folder.mkdir()
    features = {"image": datasets.Image(), "label": datasets.Value("int64"), "kind": datasets.Value("int64")}
    rows = {"image": images, "label": [0, 1, 0, 1], "kind": [1, 1, 0, 0]}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(folder / "data.parquet")
    fingerprints = {load(folder, label_column=column).fingerprint for column in ("label", "kind")}
    assert len(fingerprints) == 2


def test_a_gated_data_set_says_what_to_do(monkeypatch):
    def refuse(name, split):
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' is a gated dataset on the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    name = "ILSVRC/imagenet-1k"
    message = says("`dataset_name`", f"got '{name}'", f"https://huggingface.co/datasets/{name}", "hf auth login")
    with pytest.raises(ValueError, match=message):
        load_labelled_images(ImageOptions(dataset_name=name, resolution=16), 1, 0)


def test_a_data_set_that_does_not_exist(monkeypatch):
    def refuse(name, split):
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match=says("`dataset_name`", "got 'no/such'", "doesn't exist")) as error:
        load_labelled_images(ImageOptions(dataset_name="no/such", resolution=16), 1, 0)
    assert "licence" not in str(error.value)


# Names of Parquet files -> those that are read; the others are left out.
SPLITS = {
    "no split": (["part-0", "part-1"], ["part-0", "part-1"]),
    "the Hub's layout": (
        ["data/test-00000-of-00001", "data/train-00000-of-00002", "data/train-00001-of-00002", "data/validation-0"],
        ["data/train-00000-of-00002", "data/train-00001-of-00002"],
    ),
    "one split of another name": (["test-0", "test-1"], ["test-0", "test-1"]),
    "words only": (["train-0", "contrast-0", "devices", "imagenet1k_val_0"], ["contrast-0", "devices", "train-0"]),
    "hidden": (["part-0", "._part-0"], ["part-0"]),
}


@pytest.mark.parametrize(("files", "expected"), SPLITS.values(), ids=SPLITS)
def test_files_of_other_splits_are_left_out(tmp_path, images, files, expected):
    folder = tmp_path / "parquet[1]*?"  # no character has a meaning
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for name in files:
        label = sorted(files).index(name)
        path = folder / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict({"image": images[:1], "label": [label]}, features=features).to_parquet(path)
    (folder / "README.md").write_text("text")
    labels = [sorted(files).index(name) for name in expected]
    loaded = load(folder)
    assert [loaded.dataset[index]["label"] for index in range(len(labels))] == labels
    assert len(loaded.dataset) == len(labels) == len(find_shards(str(folder)).paths)
    visible = [name for name in files if "._" not in name]
    assert sum(part.count for part in loaded.left_out.values()) == len(visible) - len(expected)
    assert f"class {labels[0]}, {labels[0]}: 1 images" in loaded.describe()
    stream, _ = open_stream(ImageOptions(train_data_dir=str(folder)), list(map(str, range(len(files)))))
    assert [row["label"] for row in stream] == labels


def test_files_are_known_by_names_and_sizes(tmp_path, images):
    write_parquet(tmp_path / "parquet", images, [0, 1, 0, 1], datasets.Value("int64"))
    first = load(tmp_path / "parquet").fingerprint
    shutil.copytree(tmp_path / "parquet", tmp_path / "copy")
    os.utime(tmp_path / "copy" / "part-0.parquet", (1, 1))
    (tmp_path / "copy" / "README.md").write_text("text")
    assert load(tmp_path / "copy").fingerprint == first
    (tmp_path / "copy" / "part-1.parquet").unlink()
    assert load(tmp_path / "copy").fingerprint != first


def test_a_path_that_datasets_splits(tmp_path, images):
    write_parquet(tmp_path / "parquet", images, [0, 1, 0, 1], datasets.Value("int64"))
    (tmp_path / "parquet").rename(tmp_path / "a::b")
    with pytest.raises(ValueError, match=says("`train_data_dir`", "`::`", "a::b")):
        load(tmp_path / "a::b")
