# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
The images of a folder with one sub-folder per class, found by one walk.

The class of an image is the first folder on its path, and deeper folders are just places. No name has a meaning:
`train` and `test` are classes like others, and files of metadata do not count. Links are followed.
"""

import hashlib
import os
import stat
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np


IMAGE_SUFFIXES = frozenset(
    ".apng .avif .bmp .dib .gif .j2k .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tga .tif .tiff .webp".split()
)
NUM_SHOWN = 20  # paths of a kind, or classes, that a message lists
NUM_SHOWN_LEFT_OUT = 5

# Reasons for leaving something out.
HIDDEN = "a hidden file or folder"
OTHER = "no image by its suffix"
LIKE_IMAGE = "a folder named like an image"
SEEN = "a link to a folder that holds it, or that its class has already"
BESIDE = "an image beside the folders of the classes"
DANGLING = "a link to nothing"


class BadImagesError(ValueError):
    """
    Raised for images that could not be read.

    Args:
        bad (`list[dict]`): `path` and `reason` of each image.
    """

    def __init__(self, bad: list[dict[str, Any]]):
        shown = "; ".join(f"{entry['path']}: {entry['reason']}" for entry in bad[:NUM_SHOWN])
        more = f"; and {len(bad) - NUM_SHOWN} more" if len(bad) > NUM_SHOWN else ""
        super().__init__(
            f"{len(bad)} images cannot be read: {shown}{more}. Repair or remove them. Training and encoding leave "
            "them out with `on_bad_image` = 'skip'."
        )
        self.bad = bad


def check_bad_images(bad: list[dict[str, Any]], on_bad_image: str) -> None:
    """Raises a `BadImagesError` if there are `bad` images and `on_bad_image` is `"error"`."""
    if bad and on_bad_image == "error":
        raise BadImagesError(bad)


@dataclass
class LeftOut:
    """
    Files and folders that were left out for one reason.

    Args:
        count (`int`, defaults to 0): Their number.
        paths (`list[str]`, defaults to `[]`): The first of their paths, relative to the folder that was walked.
    """

    count: int = 0
    paths: list[str] = field(default_factory=list)

    def add(self, path: str) -> None:
        """Counts the file or folder at `path`."""
        self.count += 1
        if len(self.paths) < NUM_SHOWN_LEFT_OUT:
            self.paths.append(path)

    def __str__(self) -> str:
        more = self.count - len(self.paths)
        return f"{self.count:,} ({', '.join(self.paths)}{f' and {more:,} more' if more else ''})"


class ImageFolder:
    """
    Images of a folder with one sub-folder per class, in the order of their relative paths.

    Paths are compared in their composed form (NFC), so that a copy from another system has the same order. A million
    of them is held in about 50 MB, whatever the number of processes that read.

    Args:
        folder (`str`): The folder. No character in its name has a meaning.

    Raises:
        `ValueError`: two class folders have one name in its composed form.
    """

    #: Names of the values of a row, see [`ImageFolder.__getitem__`].
    column_names = ("image", "label")

    def __init__(self, folder: str):
        self.folder = os.path.abspath(folder)
        #: Images that have no class, and links to nothing: `path` and `reason` of each.
        self.bad: list[dict[str, str]] = []
        #: All that was left out, with its number and first paths by reason.
        self.left_out: dict[str, LeftOut] = {}
        classes: list[str] = []
        found: list[tuple[str, str, int]] = []  # composed and own relative path, and size
        self._walk("", classes.append, self._leave_out_beside)
        root = _identity(self.folder)
        for name in classes:
            identity = _identity(os.path.join(self.folder, name))
            if identity == root:
                self._leave_out(name, SEEN)
            elif identity is not None:  # no link to nothing
                self._walk_class(name, {root, identity}, found)
        composed = sorted(map(_compose, classes))
        if repeated := {name for name, following in zip(composed, composed[1:], strict=False) if name == following}:
            raise ValueError(
                f"{folder} must hold class folders whose names differ in their composed form (NFC), got "
                f"{sorted(repeated)} twice."
            )
        found.sort()
        ids = {name: index for index, name in enumerate(composed)}
        digest = hashlib.sha256()
        for path, _, size in found:
            digest.update(f"{path}\0{size}\n".encode(errors="surrogateescape"))
        paths = [os.fsencode(path) for _, path, _ in found]
        #: Names of the classes, those of all sub-folders, in the order of their ids.
        self.class_names: tuple[str, ...] = tuple(composed)
        #: Class ids of the images, (n,).
        self.labels = np.array([ids[path.split("/", 1)[0]] for path, _, _ in found], dtype=np.int64)
        #: A hash of relative paths and sizes of the images.
        self.fingerprint = digest.hexdigest()
        self._paths, self._ends = b"".join(paths), np.cumsum([len(path) for path in paths], dtype=np.int64)

    def _walk(self, place: str, on_folder: Callable[[str], None], on_image: Callable[[str, int], None]) -> None:
        """Looks at what is in the folder at the relative path `place`, in the order of names."""
        try:
            with os.scandir(os.path.join(self.folder, place)) as entries:
                entries = sorted(entries, key=lambda entry: entry.name)
        except PermissionError as error:
            self._refuse(place, f"a folder that cannot be listed ({error.strerror})")
            return
        for entry in entries:
            path = f"{place}/{entry.name}" if place else entry.name
            if entry.name.startswith("."):
                self._leave_out(path, HIDDEN)
                continue
            try:
                status = entry.stat()
            except OSError:  # a link without a target, or to itself
                self._refuse(path, DANGLING)
                if not place and not _is_named_like_image(entry.name):
                    on_folder(path)  # so that ids stay the same while a disk is away
                continue
            if stat.S_ISDIR(status.st_mode):
                self._leave_out(path, HIDDEN) if entry.name.startswith("__") else on_folder(path)
            elif stat.S_ISREG(status.st_mode) and _is_named_like_image(entry.name):
                on_image(path, status.st_size)
            else:
                self._leave_out(path, OTHER)

    def _walk_class(self, place: str, seen: set[tuple[int, int]], found: list[tuple[str, str, int]]) -> None:
        """Adds the images below a folder to `found`, and its sub-folders to those that its class has `seen`."""

        def on_folder(path: str) -> None:
            identity = _identity(os.path.join(self.folder, path))
            if _is_named_like_image(path):
                self._leave_out(path, LIKE_IMAGE)
            elif identity in seen:  # else a link to a folder above would never end
                self._leave_out(path, SEEN)
            else:
                seen.add(identity)
                self._walk_class(path, seen, found)

        self._walk(place, on_folder, lambda path, size: found.append((_compose(path), path, size)))

    def _leave_out_beside(self, path: str, size: int) -> None:
        self._refuse(path, BESIDE)

    def _leave_out(self, path: str, reason: str) -> None:
        self.left_out.setdefault(reason, LeftOut()).add(path)

    def _refuse(self, path: str, reason: str) -> None:
        self._leave_out(path, reason)
        self.bad.append({"path": os.path.join(self.folder, path), "reason": reason})

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        """The absolute path of the image at `index`."""
        start = int(self._ends[index - 1]) if index else 0
        return os.path.join(self.folder, os.fsdecode(self._paths[start : int(self._ends[index])]))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The row of the image at `index`, not opened, in the form of `datasets` with images that are not decoded."""
        return {"image": {"bytes": None, "path": self.path(index)}, "label": int(self.labels[index])}


def _is_named_like_image(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES


def _compose(path: str) -> str:
    return unicodedata.normalize("NFC", path)


def _identity(path: str) -> tuple[int, int] | None:
    """What all paths of one folder have in common; `None` for a link to nothing."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
