# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""One interface to images for evaluation, whatever their source, in bounded memory."""

import math
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm.auto import tqdm

from ..checks import check_at_least
from ..data.image_folder import IMAGE_SUFFIXES, ImageFolder
from ..data.labelled_images import PROCEDURAL, ImageOptions, LabelledImages, load_labelled_images, source_files
from ..files import file_sha256, folder_sha256
from ..processes import worker_settings
from ..records import DAMAGED_ZIP, Count, read_npz_headers, read_record
from ..seeding import stateless_generator


# Files beside samples: their manifest, the class id of each PNG file, and the notes of finished chunks.
SAMPLES_MANIFEST = "manifest.json"
MAX_PIXELS = 1 << 26  # of an image
LABELS_FILE = "labels.txt"
CHUNKS = "chunks"


def draw_indices(num_available: int, num_images: int | None = None, shuffle: bool = False) -> np.ndarray:
    """
    Draws indices of images: the first ones of a random order, which depends on the number of images alone.

    Args:
        num_available (`int`): Number of images.
        num_images (`int`, *optional*): Number of images to take.
        shuffle (`bool`, defaults to `False`):
            Whether to use the random order even if all are taken. If images are sorted by class, as those of data sets
            often are, the splits of an Inception Score would hold a few classes each.

    Returns:
        `np.ndarray` of shape `(num_images,)`: Different indices in that order; if all are taken, from 0 on.

    Raises:
        `ValueError`: there are fewer images.
    """
    num_images = num_available if num_images is None else num_images
    check_at_least("num_images", num_images, 1)
    if num_images > num_available:
        raise ValueError(f"`num_images` must be at most the {num_available} images there are, got {num_images}.")
    if num_images == num_available and not shuffle:
        return np.arange(num_available)
    return torch.randperm(num_available, generator=stateless_generator(num_available))[:num_images].numpy()


class ImageSource(ABC):
    """
    Images of one size in a fixed order.

    Args:
        name (`str`): Name of the images in messages and results.
        resolution (`tuple[int, int]`): Height and width of the images in pixels.
        labels (`np.ndarray` of shape `(n,)`, *optional*): Class ids, if they are known without reading all images.
        num_classes (`int`, *optional*): Number of classes, if it is known.
        data (`dict`, *optional*): Identity of the images, ready for JSON.
    """

    #: Processes that may read images at a time, at most.
    max_workers: int | None = None

    def __init__(
        self,
        name: str,
        resolution: tuple[int, int],
        labels: np.ndarray | None = None,
        num_classes: int | None = None,
        data: dict[str, Any] | None = None,
    ):
        self.name = name
        self.resolution = resolution
        self.labels = labels
        self.num_classes = num_classes
        self.data = {"name": name, "num_images": len(self), "resolution": list(resolution), **(data or {})}

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _read(self, indices: Sequence[int]) -> Iterator[tuple[np.ndarray, int | None]]:
        """Reads the images at increasing indices, uint8 (H, W, 3), each with its class id if it has one."""

    def batches(
        self,
        batch_size: int,
        indices: Sequence[int] | None = None,
        num_workers: int = 0,
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """
        Reads images in batches.

        Args:
            batch_size (`int`): Images in a batch. The last batch may be smaller.
            indices (`Sequence[int]`, *optional*): Indices of the images, in increasing order. By default all.
            num_workers (`int`, defaults to 0): Processes that read ahead; 0 reads in this process.
            part (`tuple[int, int]`, defaults to `(0, 1)`): First batch and step of the batches to read.

        Returns:
            `Iterator[tuple[torch.Tensor, torch.Tensor | None]]`: Batches (B, 3, H, W) in uint8 on the CPU with their
            class ids (B,), if they have any.

        Raises:
            `ValueError`: an index is out of range or not in order, or an image cannot be read.
        """
        check_at_least("batch_size", batch_size, 1)
        indices = np.arange(len(self)) if indices is None else np.asarray(indices)
        if len(indices) and (indices[0] < 0 or indices[-1] >= len(self) or (np.diff(indices) <= 0).any()):
            raise ValueError(f"`indices` must increase within [0, {len(self) - 1}], got others for {self.name!r}.")
        reading = _Batches(self, indices, batch_size, part)
        if num_workers == 0:
            yield from reading
            return
        settings = worker_settings(min(num_workers, self.max_workers or num_workers)) | {"persistent_workers": False}
        for batch in DataLoader(reading, batch_size=None, collate_fn=_as_it_is, **settings):
            if isinstance(batch, Exception):
                raise batch
            yield batch


def _as_it_is(batch: Any) -> Any:
    return batch


class _Batches(IterableDataset):
    """Batches of a source, dealt to workers in turn. In a worker an error takes the place of a batch."""

    def __init__(self, source: ImageSource, indices: np.ndarray, batch_size: int, part: tuple[int, int]):
        self.source = source
        self.indices = indices
        self.batch_size = batch_size
        self.part = part

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        if worker is None:
            yield from self._read(*self.part)
            return
        first, step = self.part
        try:
            yield from self._read(first + worker.id * step, step * worker.num_workers)
        except (ValueError, OSError) as error:
            yield error

    def _read(self, first: int, step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        indices = self.indices
        if step > 1:
            indices = indices[np.arange(len(indices)) // self.batch_size % step == first]
        rows = self.source._read(indices)
        while batch := list(islice(rows, self.batch_size)):
            images, labels = zip(*batch, strict=True)
            tensor = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
            yield tensor, None if labels[0] is None else torch.tensor(labels)


class NpzImages(ImageSource):
    """
    Images in an npz file, as ADM has them.

    `arr_0` (n, H, W, 3) in uint8 has the images, and `arr_1`, which is optional, the class ids (n,). The file is read
    as a stream: no more than a batch is in memory.

    Args:
        path (`Path`): The file. If a `manifest.json` beside it names it, both must fit.

    Raises:
        `OSError`: the file cannot be read.
        `ValueError`: it has no such array, or does not fit its manifest.
    """

    max_workers = 1  # each of them would read the file from its start

    def __init__(self, path: Path):
        self.path = path
        try:
            headers = read_npz_headers(path)
            with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
                self._shape, is_fortran, dtype = self._read_header(file)
        except (KeyError, ValueError) as error:
            raise ValueError(f"`path` must be an npz file with `arr_0`, got {path}: {error}") from error
        if len(self._shape) != 4 or self._shape[3] != 3 or dtype != np.uint8 or is_fortran or 0 in self._shape:
            raise ValueError(
                f"`arr_0` must have shape (n, H, W, 3), be uint8 and in C order, got {self._shape} in {dtype}"
                f"{' and Fortran order' if is_fortran else ''} from {path}."
            )
        if math.prod(self._shape[1:3]) > MAX_PIXELS:
            raise ValueError(
                f"`arr_0` must have images of at most {MAX_PIXELS} pixels, got {self._shape} from {path}."
            )
        labels = None
        if "arr_1" in headers:
            shape, dtype = headers["arr_1"]
            if shape != self._shape[:1] or dtype.kind not in "iu":
                raise ValueError(f"`arr_1` must hold {self._shape[0]} class ids, got {shape} in {dtype} from {path}.")
            try:
                with np.load(path) as arrays:
                    labels = arrays["arr_1"]
            except (ValueError, EOFError, *DAMAGED_ZIP) as error:
                raise ValueError(f"`arr_1` of {path} is damaged: {error}") from error
        data: dict[str, Any] = {"sha256": file_sha256(path)}
        manifest = _read_manifest(path.parent)
        if manifest is not None and manifest.get("images") == f"arr_0 of {path.name}":
            if manifest.get("sha256") != data["sha256"]:
                raise ValueError(f"`path` must be the file of the manifest beside it, got another one in {path}.")
            data["manifest"] = manifest
        num_classes = (manifest or {}).get("num_classes") if "manifest" in data else None
        super().__init__(str(path), self._shape[1:3], labels, num_classes, data)

    @staticmethod
    def _read_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            return np.lib.format.read_array_header_1_0(file)
        return np.lib.format.read_array_header_2_0(file)

    def __len__(self) -> int:
        return self._shape[0]

    def _read(self, indices: Sequence[int]) -> Iterator[tuple[np.ndarray, int | None]]:
        shape, wanted = self._shape[1:], set(map(int, indices))
        size = int(np.prod(shape))
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
            self._read_header(file)
            for index in range(len(self)):  # to the end, where the checksum is
                try:
                    image = file.read(size)
                except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                    raise ValueError(f"`arr_0` of {self.path} is damaged: {error}") from error
                if len(image) < size:
                    raise ValueError(f"`arr_0` of {self.path} is damaged: it ends before its {len(self)} images.")
                if index in wanted:
                    label = None if self.labels is None else int(self.labels[index])
                    yield np.frombuffer(image, dtype=np.uint8).reshape(shape), label


class ImagesManifest(TypedDict, total=False):
    """What a manifest may say of the images beside it."""

    num_images: Count
    images: str
    labels: str | None
    num_classes: Count | None
    sha256: str


class SamplesManifest(ImagesManifest):
    """What the manifest of the sampler has of them."""

    sha256: str
    settings: dict[str, Any]
    versions: list[dict[str, str | None]]


class FolderImages(ImageSource):
    """
    The PNG files of a folder, all RGB and of one size, sorted by name. A `manifest.json` of the sampler must fit them.

    Args:
        path (`Path`): The folder.

    Raises:
        `ValueError`: there are no files, they differ in size, or they do not fit the manifest.
    """

    def __init__(self, path: Path):
        images = _find_images(path)
        self.paths = [file for file in images if file.suffix.lower() == ".png"]
        if not self.paths:
            raise ValueError(f"`path` must hold PNG files, got {path}.")
        if others := [file.name for file in images if file.suffix.lower() != ".png"]:
            raise ValueError(f"`path` must hold PNG files only, got {path} with {len(others)} others: {others[0]}.")
        manifest = _read_manifest(path)
        if manifest is None and (path / CHUNKS).is_dir():
            raise ValueError(f"`path` must hold samples that are complete, got {path}, whose sampling has not ended.")
        wanted = None if manifest is None else manifest.get("num_images")
        if wanted not in (None, len(self.paths)):
            raise ValueError(f"`path` must hold the {wanted} PNG files of its manifest, got {path} with {len(self)}.")
        first = None
        for file in self.paths:
            try:
                with Image.open(file) as image:
                    form = (image.mode, image.size)
            except OSError as error:
                raise ValueError(f"`path` must hold images, got {file}: {error}") from error
            first = first or form
            if form != first or image.mode != "RGB":
                raise ValueError(
                    f"`path` must hold RGB images of one size, got {file} in {image.mode} of {image.width} x "
                    f"{image.height} and {self.paths[0].name} in {first[0]} of {first[1][0]} x {first[1][1]} pixels."
                )
        data: dict[str, Any] = {"sha256": file_sha256(*self.paths)}
        num_classes = None
        if manifest is not None:
            if manifest.get("sha256") not in (None, data["sha256"]):
                raise ValueError(f"`path` must hold the images of its manifest, got others in {path}.")
            data["manifest"] = manifest
            num_classes = manifest.get("num_classes")
        super().__init__(str(path), first[1][::-1], self._read_labels(manifest), num_classes, data)

    def __len__(self) -> int:
        return len(self.paths)

    def _read_labels(self, manifest: dict[str, Any] | None) -> np.ndarray | None:
        file = self.paths[0].parent / LABELS_FILE
        if manifest is None or manifest.get("labels") != LABELS_FILE:
            return None
        try:
            labels = np.array([int(line) for line in file.read_text().split()])
        except (OSError, ValueError) as error:
            raise ValueError(f"`{LABELS_FILE}` must hold class ids of images, got {file}: {error}") from error
        if len(labels) != len(self):
            raise ValueError(f"`{LABELS_FILE}` must hold {len(self)} class ids, got {len(labels)} in {file}.")
        return labels

    def _read(self, indices: Sequence[int]) -> Iterator[tuple[np.ndarray, int | None]]:
        for index in indices:
            path = self.paths[index]
            try:
                with Image.open(path) as image:
                    pixels = np.asarray(image)
            except OSError as error:
                raise ValueError(f"`path` must hold images that can be read, got {path}: {error}") from error
            yield pixels, None if self.labels is None else int(self.labels[index])


def image_identity(images: LabelledImages, folder: str | None) -> str:
    """
    Fingerprint of `images`, wherever their `folder` lies and whenever it was written, if they have one.

    The fingerprint of a folder begins with a hash of sizes of its files. A hash of their contents takes its place.
    """
    if folder is None:
        return images.fingerprint
    root = Path(folder).absolute()
    files = tqdm(source_files(folder), desc=f"Hashing {folder}", unit="files", disable=None)
    return "-".join([folder_sha256(root, files), *images.fingerprint.split("-")[1:]])


class DatasetImages(ImageSource):
    """
    Images of [`load_labelled_images`], cropped as ADM does.

    Args:
        name (`str`): Name of the images in messages and results.
        images ([`LabelledImages`]): The images.
        folder (`str`, *optional*): Folder of the images.
    """

    def __init__(self, name: str, images: LabelledImages, folder: str | None = None):
        self.images = images
        data = {"fingerprint": image_identity(images, folder)}
        labels = getattr(images.dataset, "labels", None)  # a source of its own may tell them by reading only
        super().__init__(name, (images.resolution,) * 2, labels, num_classes=len(images.class_names), data=data)

    def __len__(self) -> int:
        return len(self.images.dataset)

    def _read(self, indices: Sequence[int]) -> Iterator[tuple[np.ndarray, int | None]]:
        for index in map(int, indices):
            row = self.images[index]
            yield row["image"], int(row["label"])


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / SAMPLES_MANIFEST
    if not path.is_file():
        return None
    try:
        return read_record(path, ImagesManifest)
    except ValueError as error:
        raise ValueError(f"`{SAMPLES_MANIFEST}` must be that of images: {error}") from error


def _find_images(folder: Path) -> list[Path]:
    """The images that lie in a folder itself, sorted; hidden files are none."""
    files = [file for file in folder.glob("*") if file.suffix.lower() in IMAGE_SUFFIXES and not file.is_dir()]
    return sorted(file for file in files if not file.name.startswith("."))


def _is_flat(folder: Path) -> bool:
    """Whether a folder itself has PNG files, and its sub-folders have no images, beside which these would lie."""
    has_files = any(file.suffix.lower() == ".png" for file in _find_images(folder))
    return has_files and ((folder / SAMPLES_MANIFEST).is_file() or len(ImageFolder(str(folder))) == 0)


def open_images(
    name: str,
    resolution: int | None = None,
    image_column: str = "image",
    label_column: str = "label",
) -> ImageSource:
    """
    Opens images by their name.

    - `*.npz`: an npz file.
    - `textures:<number>:<seed>` or `scenes:<number>:<seed>`: procedural images.
    - A folder of the sampler or of PNG files.
    - A folder with a sub-folder per class, or with Parquet or tar files; or a data set of the Hub. Their images are
      cropped as ADM does, to the resolution, which must be given.

    Args:
        name (`str`): The name.
        resolution (`int`, *optional*): Height and width in pixels. By default 32 for textures and 64 for scenes.
        image_column (`str`, defaults to `"image"`): Column of the images of a data set.
        label_column (`str`, defaults to `"label"`): Column of the classes of a data set.

    Returns:
        [`ImageSource`].

    Raises:
        `OSError`: a file cannot be read.
        `ValueError`: there are no such images, or they have another resolution.
    """
    if resolution is not None:
        check_at_least("resolution", resolution, 1)
    path = Path(name)
    if path.is_dir() and (manifest := _read_manifest(path)) is not None:
        archive = str(manifest.get("images")).removeprefix("arr_0 of ")
        if archive.endswith(".npz"):
            path = path / archive
            name = str(path)
    if name.endswith(".npz") or (path.is_dir() and _is_flat(path)):
        source = NpzImages(path) if name.endswith(".npz") else FolderImages(path)
        if resolution is not None and tuple(source.resolution) != (resolution, resolution):
            raise ValueError(f"`resolution` must be that of {name!r}, {source.resolution}, got {resolution}.")
        return source
    kind, *numbers = name.split(":")
    if kind in PROCEDURAL and (numbers or not path.is_dir()):
        if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
            raise ValueError(f"Procedural images must be named as `{kind}:<number>:<seed>`, got {name!r}.")
        options = ImageOptions(dataset_name=kind, resolution=resolution or PROCEDURAL[kind].default_size)
        return DatasetImages(name, load_labelled_images(options, *map(int, numbers)))
    if path.is_dir() and (stages := sorted(file.parent for file in path.glob("*/manifest.json"))):
        raise ValueError(f"Samples of several stages must be named one by one, such as {stages[-1]}, got {name!r}.")
    if resolution is None:
        if path.is_dir() and not source_files(name):
            raise ValueError(f"`name` must be that of images, got {name!r}, a folder without them.")
        raise ValueError(f"`resolution` must be given for images that are cropped to it, got none for {name!r}.")
    folder = name if path.is_dir() else None
    source = {"train_data_dir": name} if path.is_dir() else {"dataset_name": name}
    columns = {"image_column": image_column, "label_column": label_column}
    try:
        images = load_labelled_images(ImageOptions(**source, **columns, resolution=resolution), 0, 0)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"`name` must be that of images, got {name!r}: {error}") from error
    return DatasetImages(name, images, folder)
