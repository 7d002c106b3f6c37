# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""How images are read and cropped: the same for those to train on, to measure, and to take a visual prior from."""

import os

import numpy as np
import torch
from diffusers.utils import load_image
from PIL import ExifTags, Image

from .checks import check_type


MAX_ASPECT_RATIO = 200  # of an image that is cropped; of a longer one hardly anything would be left
# What turns an image upright, by its orientation in EXIF.
TRANSPOSES = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_orientation(image: Image.Image) -> int:
    """
    Reads the orientation of an image from its EXIF, and no other tag, since other tags are often damaged.

    Args:
        image (`PIL.Image.Image`): An image. The EXIF of a PNG may lie behind its pixels, so load it before.

    Returns:
        `int`: The orientation, 1 to 8; 1 if there is none that can be read.
    """
    try:
        # The class's own method would decode a PNG.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except MemoryError:
        raise
    except Exception:  # damaged EXIF has many ways to fail
        return 1
    return orientation if orientation in TRANSPOSES else 1


def to_rgb(image: Image.Image) -> Image.Image:
    """
    Converts an image to 8-bit RGB.

    It is rotated as its EXIF orientation says, and transparent parts become white. Grey in 16 bits is scaled. Grey in
    32 bits is scaled from 8 or 16 bits, the fewest that hold its values.

    Args:
        image (`PIL.Image.Image`): An image of any mode.

    Returns:
        `PIL.Image.Image` of mode RGB.

    Raises:
        `ValueError`: the image holds floats, or integers below 0 or above 65535.
    """
    if image.mode == "F":
        raise ValueError("an image of floats has no range that is known")
    image.load()
    kind, transpose = image.format, TRANSPOSES[read_orientation(image)]
    image = image if transpose is None else image.transpose(transpose)
    if image.mode.startswith("I"):  # Pillow would clip the values at 255
        image = Image.fromarray(_to_8_bits(np.asarray(image), image.mode, kind))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_8_bits(values: np.ndarray, mode: str, kind: str | None) -> np.ndarray:
    """Scales integers (H, W) of grey to uint8."""
    smallest, largest = int(values.min()), int(values.max())
    if smallest < 0 or largest > 65535:
        raise ValueError(f"an image of integers from {smallest} to {largest} has no range that is known")
    # The format, not the values, tells 16 bits in modes for 16 bits, and in PNM and PNG.
    if largest <= 255 and mode == "I" and kind not in ("PPM", "PNG"):
        return values.astype(np.uint8)
    return (values.astype(np.float64) / 257).round().astype(np.uint8)


def cover_and_crop(image: Image.Image, height: int, width: int) -> np.ndarray:
    """
    Scales an image to the smallest size that covers a rectangle, and crops its centre.

    A box filter halves it while it is at least twice as large. The rest is bicubic.

    Args:
        image (`PIL.Image.Image`): An image of any mode and size, with an aspect ratio of at most 200.
        height (`int`): Height of the rectangle in pixels.
        width (`int`): Width of the rectangle in pixels.

    Returns:
        `np.ndarray` of shape `(height, width, 3)`, uint8 RGB.

    Raises:
        `ValueError`: one side of the image is more than 200 times the other, or see [`to_rgb`].
    """
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):  # else its long side would be scaled too
        raise ValueError(
            f"an image of {image.width} x {image.height} pixels has an aspect ratio above {MAX_ASPECT_RATIO}"
        )
    image = to_rgb(image)
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample=Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.array(image.crop((left, top, left + width, top + height)))


def center_crop(image: Image.Image, resolution: int) -> np.ndarray:
    """
    ADM's centre crop: [`cover_and_crop`] for a square.

    Args:
        image (`PIL.Image.Image`): An image of any mode and size, with an aspect ratio of at most 200.
        resolution (`int`): Side of the square in pixels.

    Returns:
        `np.ndarray` of shape `(resolution, resolution, 3)`, uint8 RGB.

    Raises:
        `ValueError`: see [`cover_and_crop`].
    """
    return cover_and_crop(image, resolution, resolution)


def to_image(image: str | os.PathLike | Image.Image | np.ndarray | torch.Tensor) -> Image.Image:
    """
    Opens an image of any form.

    Args:
        image (`str`, `os.PathLike`, `PIL.Image.Image`, `np.ndarray` or `torch.Tensor`):
            A path, an URL, an image of any mode, or an array (H, W) or (H, W, C) or tensor (C, H, W) of 1 to 4
            channels: grey, grey and alpha, RGB, RGB and alpha. Numbers are uint8, or floats in [0, 1], which are
            rounded to 8 bits; grey alone also comes in uint16 and int32.

    Returns:
        `PIL.Image.Image`, of any mode.

    Raises:
        `TypeError`: the value is none of these.
        `ValueError`: it has another shape or range.
        `OSError`: the file cannot be read.
    """
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        return load_image(image, convert_method=lambda loaded: loaded)
    if isinstance(image, (str, os.PathLike)):
        return Image.open(image)
    check_type("image", image, (str, os.PathLike, Image.Image, np.ndarray, torch.Tensor))
    values = image
    if isinstance(image, torch.Tensor):
        values = (image.detach().float() if image.is_floating_point() else image).cpu().numpy()
        values = np.moveaxis(values, 0, -1) if values.ndim == 3 else values
    values = values[..., 0] if values.ndim == 3 and values.shape[-1] == 1 else values
    if values.ndim not in (2, 3) or 0 in values.shape or values.shape[2:] not in ((), (2,), (3,), (4,)):
        raise ValueError(
            "`image` must have the shape (H, W) or (H, W, C) as an array, (C, H, W) as a tensor, with 1 to 4 channels "
            f"C, none of them 0, got {tuple(image.shape)}."
        )
    is_wide = values.ndim == 2 and values.dtype in (np.uint16, np.int32)
    if values.dtype != np.uint8 and not is_wide:
        low, high = float(values.min()), float(values.max())
        if not np.issubdtype(values.dtype, np.floating) or not (0 <= low and high <= 1):  # NaN compares false
            raise ValueError(
                "`image` must be uint8 or floats in [0, 1], or grey in uint16 or int32, "
                f"got {image.dtype} in [{low}, {high}]."
            )
        values = (values * 255).round().astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(values))


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """Converts `images` (B, H, W, 3) in uint8 to pixels (B, 3, H, W) in [-1, 1], fp32."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1
