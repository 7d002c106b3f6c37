# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Settings of an image in its own PNG file, as JSON in a text chunk: whoever has the image can draw it again.

    {"format": 1, "task": "sample", "options": {"class_labels": ["marble"], "seed": 3, ...},
     "checkpoint": {"path": ..., "sha256": ...}, "pixels_sha256": ..., "versions": {...}}
"""

import hashlib
import json
import os
from pathlib import Path
from typing import IO, Annotated, Any, TypedDict

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .records import Sha256, check_record, one_of, parse_json
from .results import CheckpointIdentity, describe_versions


SETTINGS_KEY = "diffusers_dod"  # of the text chunk
IMAGE_FORMAT = 1


class ImageSettings(TypedDict):
    """What an image says of itself. `task` is the command that has drawn it, which knows what its options mean."""

    format: Annotated[int, one_of(IMAGE_FORMAT)]
    task: str
    options: dict[str, Any]
    checkpoint: CheckpointIdentity
    pixels_sha256: Sha256
    versions: dict[str, str | None]


def pixels_sha256(image: Image.Image) -> str:
    """The SHA-256 of mode, size and pixels of an `image`, whatever its file."""
    return hashlib.sha256(f"{image.mode} {image.width} {image.height} ".encode() + image.tobytes()).hexdigest()


def save_with_settings(
    image: Image.Image,
    file: str | os.PathLike | IO[bytes],
    task: str,
    options: dict[str, Any],
    checkpoint: CheckpointIdentity,
    device: torch.device | str,
) -> None:
    """
    Writes an image as PNG, with the settings that it was drawn with.

    Args:
        image (`PIL.Image.Image`): The image.
        file (`str`, `os.PathLike` or binary file): Where it goes.
        task (`str`): Name of the command that has drawn it.
        options (`dict`): Settings that the image depends on, ready for JSON; the command can draw it again by them.
        checkpoint (`dict`): `path` of the pipeline, a folder or a repository on the Hub, and `sha256`, see
            [`checkpoint_sha256`].
        device (`torch.device` or `str`): The device that has drawn it.

    Raises:
        `OSError`: the file cannot be written.
        `TypeError`, `ValueError`: JSON cannot hold the settings.
    """
    settings = {
        "format": IMAGE_FORMAT,
        "task": task,
        "options": options,
        "checkpoint": checkpoint,
        "pixels_sha256": pixels_sha256(image),
        "versions": describe_versions(device),
    }
    text = PngInfo()
    text.add_text(SETTINGS_KEY, json.dumps(settings, allow_nan=False))
    image.save(file, "PNG", pnginfo=text)


def read_image_settings(path: str | os.PathLike, name: str = "path") -> ImageSettings:
    """
    Reads the settings that [`save_with_settings`] has put into an image.

    Args:
        path (`str` or `os.PathLike`): The PNG file.
        name (`str`, defaults to `"path"`): Name of the argument, for the message.

    Returns:
        [`ImageSettings`]: Settings that may come from anybody. Only their form is checked.

    Raises:
        `ValueError`: it is no PNG file, or one without such settings.
        `OSError`: the file cannot be read.
    """
    wanted = f"`{name}` must be a PNG file of this package with its settings"
    try:
        with Image.open(Path(path), formats=["PNG"]) as image:
            text = image.info.get(SETTINGS_KEY)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # damaged ones have many
        raise ValueError(f"{wanted}, got {str(path)!r}: {error}") from error
    if not isinstance(text, str):
        raise ValueError(f"{wanted}, got {str(path)!r} without any.")
    try:
        settings = parse_json(text.encode())
        check_record(settings, ImageSettings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{wanted}, got {str(path)!r} with others: {error}") from error
    return settings
