"""How images are read: the crop, every mode, every orientation, and every form in which they come."""

import http.server
import io
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import noise_image, record_calls, says, tiny_pipeline
from PIL import Image

from diffusers_dod.image_reading import center_crop, cover_and_crop, to_image, to_pixels, to_rgb


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
# Forms


RGB = np.array(noise_image(30, 20))


def forms(pixels: np.ndarray) -> dict[str, object]:
    """Arrays and tensors of an image (H, W) or (H, W, C) in uint8."""
    tensor = torch.from_numpy(pixels)
    tensor = tensor.permute(2, 0, 1) if pixels.ndim == 3 else tensor
    return {
        "array": pixels,
        "array of floats": pixels.astype(np.float32) / 255,
        "tensor": tensor,
        "tensor of floats": tensor.double() / 255,
    }


PIXELS = {
    "grey": RGB[..., 0],
    "a grey channel": RGB[..., :1],
    "grey and alpha": np.dstack([RGB[..., 0], RGB[::-1, :, 0]]),
    "RGB": RGB,
    "RGBA": np.dstack([RGB, RGB[::-1, :, 0]]),
}


@pytest.mark.parametrize("form", forms(RGB))
@pytest.mark.parametrize("kind", PIXELS)
def test_arrays_and_tensors_are_read_as_files_are(kind, form):
    pixels = PIXELS[kind]
    image = forms(pixels)[form]
    expected = center_crop(Image.fromarray(pixels.squeeze()), 16)
    np.testing.assert_array_equal(center_crop(to_image(image), 16), expected)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_grey_in_many_bits_is_read_as_files_are(dtype):
    np.testing.assert_array_equal(center_crop(to_image(WIDE.astype(dtype)), 16), grey_rgb(GREY))
    if dtype == np.int32:
        np.testing.assert_array_equal(center_crop(to_image(torch.from_numpy(WIDE.astype(dtype))), 16), grey_rgb(GREY))


@pytest.fixture
def site(tmp_path):
    """Address of a server of the files in `tmp_path`."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def write_turned(path: Path) -> np.ndarray:
    """Writes an image with alpha that lies on its side, and gives the crop of it that the trainer reads."""
    image = Image.fromarray(PIXELS["RGBA"])
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    with Image.open(path) as read:
        return cover_and_crop(read, 16, 12)


def test_paths_and_addresses_are_read_as_the_trainer_does(tmp_path, site):
    expected = write_turned(tmp_path / "image.png")
    for image in (tmp_path / "image.png", str(tmp_path / "image.png"), f"{site}/image.png"):
        np.testing.assert_array_equal(cover_and_crop(to_image(image), 16, 12), expected)


@pytest.mark.parametrize(
    ("image", "exception", "fragments"),
    [
        (5, TypeError, ["`image`", "got 5"]),
        (
            RGB.astype(np.int64),
            ValueError,
            ["uint8 or floats", "uint16 or int32", "got int64 in [0.0, 255.0]"],
        ),
        (RGB.astype(np.uint16), ValueError, ["grey in uint16", "got uint16"]),
        (RGB.astype(np.float32), ValueError, ["floats in [0, 1]", "in [0.0, 255.0]"]),
        (np.full((4, 4, 3), np.nan), ValueError, ["floats in [0, 1]", "nan"]),
        (np.zeros((4, 4, 5)), ValueError, ["1 to 4 channels", "got (4, 4, 5)"]),
        (torch.zeros(16, 16, 3), ValueError, ["(C, H, W) as a tensor", "got (16, 16, 3)"]),
        (np.zeros((0, 4, 3), np.uint8), ValueError, ["none of them 0", "got (0, 4, 3)"]),
        (np.zeros(4, np.uint8), ValueError, ["(H, W)", "got (4,)"]),
        ("missing.png", OSError, ["missing.png"]),
    ],
)
def test_what_is_no_image_is_refused(image, exception, fragments):
    with pytest.raises(exception, match=says(*fragments)):
        to_image(image)


# ---------------------------------------------------------------------------------------------------------------------
# The pipeline


def prior_pixels(**kwargs) -> torch.Tensor:
    """The pixels that a pipeline of 16 x 16 pixels encodes."""
    pipe = tiny_pipeline()
    calls = record_calls(pipe.vae.encoder)
    pipe(1, num_inference_steps=1, output_type="latent", **kwargs)
    return calls[0].sample


@pytest.mark.parametrize(
    ("given", "size"),
    [({}, (16, 16)), ({"height": 24}, (24, 16)), ({"height": 8, "width": 20}, (8, 20)), ({"width": 32}, (16, 32))],
)
def test_the_pipeline_crops_an_image_of_any_size_as_the_trainer_does(tmp_path, given, size):
    write_turned(tmp_path / "image.png")
    with Image.open(tmp_path / "image.png") as read:
        expected = to_pixels(torch.from_numpy(cover_and_crop(read, *size))[None])
        assert torch.equal(prior_pixels(image=read, **given), expected)
    assert torch.equal(prior_pixels(image=str(tmp_path / "image.png"), **given), expected)


def test_floats_of_the_right_size_are_not_rounded():
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(prior_pixels(image=image), (2 * image - 1)[None])


def test_images_of_several_sizes_and_forms_go_together(tmp_path):
    write_turned(tmp_path / "image.png")
    pipe = tiny_pipeline()
    images = [RGB, tmp_path / "image.png", Image.fromarray(RGB[:9]), torch.rand(3, 50, 40)]
    assert len(pipe([1, 2, 3, 4], image=images, num_inference_steps=1).images) == 4
    tokens = pipe.get_prior_tokens(images, height=24, width=32)
    latents = pipe.encode_image(to_pixels(torch.from_numpy(cover_and_crop(Image.fromarray(RGB), 24, 32))[None]))
    torch.testing.assert_close(tokens[:1], pipe.get_prior_tokens(latents=latents), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("image", "fragments"),
    [
        (Image.new("F", (16, 16)), ["`image`", "an image of floats"]),
        (Image.new("RGB", (1, 500)), ["`image`", "aspect ratio above 200"]),
    ],
)
def test_an_image_that_the_trainer_refuses(image, fragments):
    with pytest.raises(ValueError, match=says(*fragments)):
        prior_pixels(image=image)


@pytest.mark.parametrize("label", [(), (None,), ([None],)], ids=["no argument", "None", "a list"])
def test_no_label_is_no_class(label):
    pipe = tiny_pipeline()
    settings = dict(image=RGB, seed=3, num_inference_steps=1, output_type="pt")
    assert torch.equal(pipe(*label, **settings).images, pipe([None], **settings).images)
    assert pipe(*label, seed=0, num_inference_steps=1, output_type="pt").images.shape == (1, 3, 16, 16)


@pytest.mark.parametrize("size", [100, 3000], ids=["in its header", "in its pixels"])
def test_a_cut_file_is_refused_by_name(tmp_path, size):
    noise_image(64, 64).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:size])
    with pytest.raises(ValueError, match=says("`image` must be one that can be read", str(tmp_path / "cut.jpg"))):
        prior_pixels(image=tmp_path / "cut.jpg")
