# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Pictures to evaluate, from wherever they lie, through one interface and in bounded memory."""

import hashlib
import io
import json
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..checks import check_at_least
from ..training.data import TEXTURES, Pictures, load_pictures
from .results import file_sha256


MANIFEST = "manifest.json"
LABELS = "labels.txt"
OTHER_SUFFIXES = (".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TEXTURE_RESOLUTION = 32


class ImageSource(ABC):
    """
    Pictures of one size in a fixed order.

    Args:
        name (`str`): What messages and results call them.
        resolution (`tuple[int, int]`): Their height and width in pixels.
        labels (`np.ndarray` of shape `(n,)`, *optional*): Their class ids, where these are known without reading all.
        data (`dict`, *optional*): What identifies them, as JSON can hold it.
    """

    def __init__(
        self,
        name: str,
        resolution: tuple[int, int],
        labels: np.ndarray | None = None,
        data: dict[str, Any] | None = None,
    ):
        self.name = name
        self.resolution = resolution
        self.labels = labels
        self.data = {"name": name, "num_images": len(self), "resolution": list(resolution), **(data or {})}

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _read_batches(self, sizes: list[int]) -> Iterator[np.ndarray]:
        """The first pictures in batches of these sizes: uint8 (B, H, W, 3)."""

    def batches(self, batch_size: int, num_images: int | None = None) -> Iterator[torch.Tensor]:
        """
        Reads pictures in order.

        Args:
            batch_size (`int`): Pictures in a batch; the last one has what is left.
            num_images (`int`, *optional*): How many, from the first one on; all if not given.

        Returns:
            `Iterator[torch.Tensor]`: Batches (B, 3, H, W) in uint8 on the CPU.

        Raises:
            `ValueError`: there are not so many, or one cannot be read.
        """
        check_at_least("batch_size", batch_size, 1)
        num_images = len(self) if num_images is None else num_images
        check_at_least("num_images", num_images, 1)
        if num_images > len(self):
            raise ValueError(
                f"`num_images` must be at most the {len(self)} pictures of {self.name!r}, got {num_images}."
            )
        sizes = [min(batch_size, num_images - start) for start in range(0, num_images, batch_size)]
        for batch in self._read_batches(sizes):
            yield torch.from_numpy(batch).permute(0, 3, 1, 2)


class NpzImages(ImageSource):
    """
    The array `arr_0` (n, H, W, 3) in uint8 of an npz file, as ADM has it; `arr_1`, if it is there, are class ids (n,).
    It is read as a stream: no more than a batch is in memory.

    Args:
        path (`Path`): The file. If a `manifest.json` beside it names it, it must be the one.

    Raises:
        `OSError`: the file cannot be read.
        `ValueError`: it has no such array, or is not that of its manifest.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                with archive.open("arr_0.npy") as file:
                    self._shape, is_fortran, dtype = self._read_header(file)
                has_labels = "arr_1.npy" in archive.namelist()
            labels = None
            if has_labels:
                with np.load(path) as arrays:
                    labels = arrays["arr_1"]
        except (KeyError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"`path` must be an npz file with `arr_0`, got {path}: {error}") from error
        if len(self._shape) != 4 or self._shape[3] != 3 or dtype != np.uint8 or is_fortran or 0 in self._shape:
            raise ValueError(
                f"`arr_0` must have shape (n, H, W, 3), be uint8 and in C order, got {self._shape} in {dtype}"
                f"{' and Fortran order' if is_fortran else ''} from {path}."
            )
        if labels is not None and (labels.shape != self._shape[:1] or labels.dtype.kind not in "iu"):
            raise ValueError(
                f"`arr_1` must hold {self._shape[0]} class ids, got {labels.shape} in {labels.dtype} from {path}."
            )
        data: dict[str, Any] = {"sha256": file_sha256(path)}
        manifest = _read_manifest(path.parent)
        if manifest is not None and manifest.get("images") == f"arr_0 of {path.name}":
            if manifest.get("sha256") != data["sha256"]:
                raise ValueError(f"`path` must be the file of the manifest beside it, got another one in {path}.")
            data["manifest"] = manifest
        super().__init__(str(path), self._shape[1:3], labels, data)

    @staticmethod
    def _read_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            return np.lib.format.read_array_header_1_0(file)
        return np.lib.format.read_array_header_2_0(file)

    def __len__(self) -> int:
        return self._shape[0]

    def _read_batches(self, sizes: list[int]) -> Iterator[np.ndarray]:
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
            self._read_header(file)
            for size in sizes:
                shape = (size, *self._shape[1:])
                try:
                    data = file.read(int(np.prod(shape)))
                except (zipfile.BadZipFile, EOFError) as error:
                    raise ValueError(f"`arr_0` of {self.path} is damaged: {error}") from error
                if len(data) < np.prod(shape):
                    raise ValueError(f"`arr_0` of {self.path} is damaged: it ends before its {len(self)} pictures.")
                yield np.frombuffer(bytearray(data), dtype=np.uint8).reshape(shape)


class FolderImages(ImageSource):
    """
    The PNG files of a folder, all RGB and of one size, sorted by name. A `manifest.json` of the sampler must fit them.

    Args:
        path (`Path`): The folder.

    Raises:
        `ValueError`: there are none, they differ in size, or they are not those of the manifest.
    """

    def __init__(self, path: Path):
        self.paths = sorted(path.glob("*.png"))
        if not self.paths:
            raise ValueError(f"`path` must hold PNG files, got {path}.")
        others = [file.name for file in path.iterdir() if file.suffix.lower() in OTHER_SUFFIXES]
        if others:
            raise ValueError(f"`path` must hold PNG files only, got {path} with {len(others)} others: {others[0]}.")
        manifest = _read_manifest(path)
        if manifest is None and (path / "chunks").is_dir():
            raise ValueError(f"`path` must hold samples that are complete, got {path}, whose sampling has not ended.")
        wanted = None if manifest is None else manifest.get("num_images")
        if wanted not in (None, len(self.paths)):
            raise ValueError(f"`path` must hold the {wanted} PNG files of its manifest, got {path} with {len(self)}.")
        digest, first = hashlib.sha256(), None
        for file in self.paths:
            content = file.read_bytes()
            digest.update(content)
            try:
                with Image.open(io.BytesIO(content)) as image:
                    form = (image.mode, image.size)
            except OSError as error:
                raise ValueError(f"`path` must hold pictures, got {file}: {error}") from error
            first = first or form
            if form != first or image.mode != "RGB":
                raise ValueError(
                    f"`path` must hold RGB pictures of one size, got {file} in {image.mode} of {image.width} x "
                    f"{image.height} and {self.paths[0].name} in {first[0]} of {first[1][0]} x {first[1][1]} pixels."
                )
        data: dict[str, Any] = {"sha256": digest.hexdigest()}
        if manifest is not None:
            if manifest.get("sha256") not in (None, data["sha256"]):
                raise ValueError(f"`path` must hold the pictures of its manifest, got others in {path}.")
            data["manifest"] = manifest
        super().__init__(str(path), first[1][::-1], self._read_labels(manifest), data)

    def __len__(self) -> int:
        return len(self.paths)

    def _read_labels(self, manifest: dict[str, Any] | None) -> np.ndarray | None:
        file = self.paths[0].parent / LABELS
        if manifest is None or manifest.get("labels") != LABELS:
            return None
        try:
            labels = np.array([int(line) for line in file.read_text().split()])
        except (OSError, ValueError) as error:
            raise ValueError(f"`{LABELS}` must hold the class ids of the pictures, got {file}: {error}") from error
        if len(labels) != len(self):
            raise ValueError(f"`{LABELS}` must hold {len(self)} class ids, got {len(labels)} in {file}.")
        return labels

    def _read_batches(self, sizes: list[int]) -> Iterator[np.ndarray]:
        paths = iter(self.paths)
        for size in sizes:
            batch = []
            for _ in range(size):
                path = next(paths)
                try:
                    with Image.open(path) as image:
                        batch.append(np.asarray(image))
                except OSError as error:
                    raise ValueError(f"`path` must hold pictures that can be read, got {path}: {error}") from error
            yield np.stack(batch)


class DatasetImages(ImageSource):
    """
    Pictures of [`load_pictures`], cropped as ADM does.

    Args:
        name (`str`): What messages and results call them.
        pictures ([`Pictures`]): The pictures.
    """

    def __init__(self, name: str, pictures: Pictures):
        self.pictures = pictures
        super().__init__(name, (pictures.resolution,) * 2, data={"fingerprint": pictures.fingerprint})

    def __len__(self) -> int:
        return len(self.pictures.dataset)

    def _read_batches(self, sizes: list[int]) -> Iterator[np.ndarray]:
        index = 0
        for size in sizes:
            batch = []
            for _ in range(size):
                try:
                    batch.append(self.pictures.dataset[index]["image"])
                except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                    place = self.pictures.path_of(index)
                    raise ValueError(f"{self.name!r} must hold pictures, got {place}: {error}") from error
                index += 1
            yield np.stack(batch)


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"`{MANIFEST}` must be JSON, got {path}: {error}") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"`{MANIFEST}` must be a mapping, got {path} with a {type(manifest).__name__}.")
    return manifest


def open_images(
    name: str,
    resolution: int | None = None,
    image_column: str = "image",
    label_column: str = "label",
) -> ImageSource:
    """
    Opens pictures by what names them: `*.npz`; a folder of the sampler or of PNG files;
    `textures:<number>:<seed>`, the procedural ones; a folder with a sub-folder per class, or with Parquet or tar
    files; or a data set of the Hub. The last two are cropped as ADM does, to the resolution that must be given.

    Args:
        name (`str`): The name.
        resolution (`int`, *optional*): Height and width in pixels; of textures 32 if not given.
        image_column (`str`, defaults to `"image"`): Column of the pictures of a data set.
        label_column (`str`, defaults to `"label"`): Column of its classes.

    Returns:
        [`ImageSource`].

    Raises:
        `OSError`: something cannot be read.
        `ValueError`: there are no such pictures, or they are not of this resolution.
    """
    if resolution is not None:
        check_at_least("resolution", resolution, 1)
    path = Path(name)
    if path.is_dir() and (manifest := _read_manifest(path)) is not None:
        archive = str(manifest.get("images")).removeprefix("arr_0 of ")
        if archive.endswith(".npz"):
            path = path / archive
            name = str(path)
    if name.endswith(".npz") or (path.is_dir() and any(path.glob("*.png"))):
        source = NpzImages(path) if name.endswith(".npz") else FolderImages(path)
        if resolution is not None and tuple(source.resolution) != (resolution, resolution):
            raise ValueError(f"`resolution` must be that of {name!r}, {source.resolution}, got {resolution}.")
        return source
    if name.split(":")[0] == TEXTURES:
        numbers = name.split(":")[1:]
        if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
            raise ValueError(f"Procedural pictures must be named as `textures:<number>:<seed>`, got {name!r}.")
        pictures = load_pictures(TEXTURES, None, resolution or TEXTURE_RESOLUTION, *map(int, numbers))
        return DatasetImages(name, pictures)
    if path.is_dir() and (stages := sorted(file.parent for file in path.glob("*/manifest.json"))):
        raise ValueError(f"Samples of several stages must be named one by one, such as {stages[-1]}, got {name!r}.")
    if resolution is None:
        raise ValueError(f"`resolution` must be given for pictures that are cropped to it, got none for {name!r}.")
    source = (None, name) if path.is_dir() else (name, None)
    return DatasetImages(name, load_pictures(*source, resolution, 0, 0, image_column, label_column))
