"""Images: the crop, and what is opened."""

import io
from pathlib import Path

import numpy as np
import pytest
from helpers import says
from PIL import Image, UnidentifiedImageError

from diffusers_dod.data.labelled_images import (
    ImageOptions,
    LabelledImages,
    center_crop,
    load_labelled_images,
    to_rgb,
)
from diffusers_dod.data.textures import TEXTURE_CLASSES, TextureDataset


# ---------------------------------------------------------------------------------------------------------------------
# The crop


def adm_center_crop(image: Image.Image, size: int) -> np.ndarray:
    """What ADM does (openai/guided-diffusion, `center_crop_arr`), in its own words."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC)
    array = np.array(image)
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[y : y + size, x : x + size]


def noise_image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "size", [(16, 16), (32, 32), (40, 24), (24, 40), (33, 100), (131, 17), (200, 200), (7, 5), (1, 9), (16, 31)]
)
def test_crop_is_that_of_adm(size):
    cropped = center_crop(noise_image(*size), 16)
    assert cropped.shape == (16, 16, 3) and cropped.dtype == np.uint8
    np.testing.assert_array_equal(cropped, adm_center_crop(noise_image(*size), 16))


@pytest.mark.parametrize("axis", [0, 1])
def test_crop_position(axis):
    """16 of 21 rows or columns remain: two fall away before and three behind."""
    ramp = np.broadcast_to(10 * np.arange(21, dtype=np.uint8), (16, 21))
    if axis == 0:
        ramp = ramp.T
    image = np.stack([ramp, 255 - ramp, ramp], axis=-1)
    cropped = center_crop(Image.fromarray(np.ascontiguousarray(image)), 16)
    kept = image[2:18] if axis == 0 else image[:, 2:18]
    np.testing.assert_array_equal(cropped, kept)


def test_an_image_twice_as_large_is_averaged_in_boxes():
    image = noise_image(32, 32)
    means = np.asarray(image).astype(float).reshape(16, 2, 16, 2, 3).mean((1, 3))
    assert np.abs(center_crop(image, 16) - means).max() <= 1  # Pillow rounds after each of two passes


GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOR = np.asarray(noise_image(16, 16))
ALPHA = GREY[::-1, :, None] / 255


def grey_rgb(values: np.ndarray) -> np.ndarray:
    return np.repeat(np.asarray(values)[..., None], 3, axis=-1)


def palette(transparency=None) -> Image.Image:
    """Index 0 where `GREY` is dark, else index 1."""
    image = Image.fromarray(GREY // 128)
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette([10, 20, 30, 200, 100, 50])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def in_palette(dark, light) -> np.ndarray:
    return np.where((GREY < 128)[..., None], dark, light)


def with_key(image: Image.Image, transparent) -> Image.Image:
    image.info["transparency"] = transparent
    return image


WIDE = GREY.astype(np.uint16) * 256 + GREY  # 257 times
# Name -> the image, how it is written, and the pixels it has.
MODES = {
    "RGB": (Image.fromarray(COLOR), "png", COLOR),
    "grey": (Image.fromarray(GREY), "png", grey_rgb(GREY)),
    "1 bit": (Image.fromarray(GREY >= 128), "png", in_palette([0] * 3, [255] * 3)),
    "grey in 16 bits": (Image.fromarray(WIDE), "png", grey_rgb(GREY)),
    "grey in 16 bits, big-endian": (
        Image.frombytes("I;16B", (16, 16), WIDE.astype(">u2").tobytes()),
        "tiff",
        grey_rgb(GREY),
    ),
    "grey in 32 bits": (Image.fromarray(WIDE.astype(np.int32)), "tiff", grey_rgb(GREY)),
    "palette": (palette(), "png", in_palette([10, 20, 30], [200, 100, 50])),
    "palette with a transparent colour": (palette(1), "png", in_palette([10, 20, 30], [255] * 3)),
    "palette with alpha": (palette(bytes([0, 255])), "png", in_palette([255] * 3, [200, 100, 50])),
    "GIF": (palette(0), "gif", in_palette([255] * 3, [200, 100, 50])),
    "RGB with a transparent colour": (
        with_key(Image.fromarray(in_palette([10, 20, 30], [200, 100, 50]).astype(np.uint8)), (10, 20, 30)),
        "png",
        in_palette([255] * 3, [200, 100, 50]),
    ),
    "RGBA": (
        Image.fromarray(np.concatenate([COLOR, GREY[::-1, :, None]], axis=-1)),
        "png",
        COLOR * ALPHA + 255 * (1 - ALPHA),
    ),
    "LA": (
        Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(GREY[::-1].copy())]),
        "png",
        GREY[..., None] * ALPHA + 255 * (1 - ALPHA) + np.zeros(3),
    ),
    "CMYK": (Image.fromarray(np.dstack([255 - COLOR, 0 * GREY]), mode="CMYK"), "tiff", COLOR),
}


@pytest.mark.parametrize(("image", "kind", "expected"), MODES.values(), ids=MODES)
def test_every_mode_becomes_rgb(image, kind, expected):
    file = io.BytesIO()
    image.save(file, kind, **({"transparency": 0} if kind == "gif" else {}))
    read = Image.open(io.BytesIO(file.getvalue()))
    np.testing.assert_allclose(center_crop(read, 16).astype(float), expected, rtol=0, atol=1)
    np.testing.assert_allclose(center_crop(image, 16).astype(float), expected, rtol=0, atol=1)


# Name -> values, format of the file, and grey of the pixels.
RANGES = {
    "8 bits in 32": (np.array([[0, 1, 128, 255]], dtype=np.int32), "tiff", [0, 1, 128, 255]),
    "16 bits in 32": (np.array([[0, 1, 257, 65535]], dtype=np.int32), "tiff", [0, 0, 1, 255]),
    "dark 16 bits": (np.array([[0, 1, 128, 255]], dtype=np.uint16), "tiff", [0, 0, 0, 1]),
    "dark 16 bits of PNG": (np.array([[0, 1, 128, 255]], dtype=np.uint16), "png", [0, 0, 0, 1]),
    "dark 16 bits of PNM": (np.array([[0, 1, 128, 255]], dtype=np.uint16), "ppm", [0, 0, 0, 1]),
}


@pytest.mark.parametrize(("values", "kind", "expected"), RANGES.values(), ids=RANGES)
def test_grey_has_the_range_of_its_mode(values, kind, expected):
    file = io.BytesIO()
    Image.fromarray(values).save(file, kind)
    assert np.asarray(to_rgb(Image.open(io.BytesIO(file.getvalue()))))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("value", [-5, 70000, 2**31 - 1])
def test_grey_without_a_known_range(value):
    with pytest.raises(ValueError, match=says("integers from", str(value), "no range that is known")):
        to_rgb(Image.fromarray(np.array([[7, value]], dtype=np.int32)))


@pytest.mark.parametrize(("width", "height"), [(1, 201), (201, 1), (1, 100_000), (402, 2)])
def test_an_image_that_is_too_long_is_refused_before_it_is_scaled(width, height):
    with pytest.raises(ValueError, match=says(f"an image of {width} x {height} pixels", "aspect ratio above 200")):
        center_crop(Image.new("RGB", (width, height)), 256)


@pytest.mark.parametrize("size", [(1, 200), (600, 3)])
def test_the_longest_image(size):
    assert center_crop(Image.new("RGB", size), 16).shape == (16, 16, 3)


# What undoes each orientation of EXIF.
ORIENTATIONS = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda pixels: np.rot90(pixels),
}


@pytest.mark.parametrize(("orientation", "turn"), ORIENTATIONS.items(), ids=map(str, ORIENTATIONS))
@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_an_image_is_turned_as_its_orientation_says(kind, orientation, turn):
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    noise_image(20, 12).save(file, kind, exif=exif)
    rgb = to_rgb(Image.open(io.BytesIO(file.getvalue())))
    np.testing.assert_array_equal(np.asarray(rgb), turn(np.asarray(noise_image(20, 12))))


def write_exif(kind: str, exif: bytes) -> Image.Image:
    file = io.BytesIO()
    noise_image(20, 12).save(file, kind, exif=exif, quality=100, lossless=True)
    return Image.open(io.BytesIO(file.getvalue()))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about the damage
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_damaged_exif_harms_no_image(kind):
    """Each byte of EXIF but those of the orientation is damaged in turn."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0112], exif[0x011A] = "a maker of cameras", 6, 72.0
    sound = exif.tobytes()
    start = sound.index(b"\x01\x12\x00\x03")
    turned = np.asarray(to_rgb(write_exif(kind, sound)))
    unturned = np.asarray(to_rgb(write_exif(kind, b"")))
    assert turned.shape == (20, 12, 3) and unturned.shape == (12, 20, 3)
    num_turned = 0
    for place in [*range(6, start), *range(start + 12, len(sound))]:
        image = write_exif(kind, sound[:place] + bytes([255]) + sound[place + 1 :])
        pixels = np.asarray(to_rgb(image))
        num_turned += pixels.shape == turned.shape
        np.testing.assert_array_equal(pixels, turned if pixels.shape == turned.shape else unturned)
    assert num_turned > 0.7 * (len(sound) - 18)  # of the others, nothing can be read


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
