# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Labelled images of a folder, of the Hub or procedural, cropped to squares."""

import glob
import hashlib
import io
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ..checks import MAX_CLASSES
from ..image_reading import cover_and_crop
from ..options import option
from ._procedural import ProceduralDataset
from .class_names import clean_class_name, clean_class_names, list_classes
from .image_folder import ImageFolder, LeftOut, check_bad_images
from .scenes import SceneDataset
from .textures import TextureDataset


logger = logging.getLogger(__name__)

#: Sets of images that are rendered, by the name that `dataset_name` has.
PROCEDURAL: dict[str, type[ProceduralDataset]] = {"textures": TextureDataset, "scenes": SceneDataset}
SHARD_SUFFIXES = {"parquet": ".parquet", "webdataset": ".tar"}  # by builder of `datasets`
TRAIN_WORDS = frozenset(("train", "training"))  # in names of files
OTHER_SPLIT_WORDS = frozenset(("dev", "eval", "test", "testing", "val", "valid", "validation"))


@dataclass(frozen=True)
class Columns:
    """
    The columns of a data set that hold images and classes.

    Args:
        image (`str`, defaults to `"image"`): Column of the images.
        label (`str`, defaults to `"label"`): Column of the classes.
        class_ids (`dict`, *optional*): Ids of the names of classes. A label that is none of them is its own id.
    """

    image: str = "image"
    label: str = "label"
    class_ids: dict[str, int] | None = None

    def class_id(self, label: Any) -> Any:
        """The id of a `label`, whose name may need [`clean_class_name`]; the label itself if it is no known name."""
        name = clean_class_name(label) if isinstance(label, str) else None
        return (self.class_ids or {}).get(name, label)


def read_row(row: dict[str, Any], columns: Columns, name: str = "it") -> tuple[Image.Image, int]:
    """
    Reads the class of a row and the header of its image.

    Args:
        row (`dict`): Values by column, with the image as `bytes` or `path` of its file.
        columns ([`Columns`]): The columns of the image and the class.
        name (`str`, defaults to `"it"`): Name of the row in messages.

    Returns:
        `tuple[PIL.Image.Image, int]`: The image, to be closed by the caller, and the class id.

    Raises:
        `ValueError`: the row lacks its image or its label.
        `OSError`: the image cannot be opened.
    """
    source, label = row[columns.image], row[columns.label]
    has_image = source is not None and any(source.values())
    if not has_image or label is None:
        raise ValueError(f"{name} lacks its {'label' if has_image else 'image'}")
    image = Image.open(source["path"] if source["bytes"] is None else io.BytesIO(source["bytes"]))
    return image, columns.class_id(label)


class ImageDataset(Dataset):
    """
    Labelled images of a folder or a `datasets.Dataset` as uint8 arrays, cropped by [`cover_and_crop`].

    Args:
        dataset ([`ImageFolder`] or `datasets.Dataset`): The images that are not opened.
        columns ([`Columns`]): The columns of images and classes.
        size (`tuple[int, int]`): Height and width of the crop in pixels.
        indices (`Sequence[int]`, *optional*): Rows of the data set, in the order wanted. By default all.
    """

    def __init__(
        self,
        dataset: ImageFolder | datasets.Dataset,
        columns: Columns,
        size: tuple[int, int],
        indices: Sequence[int] | None = None,
    ):
        if isinstance(dataset, datasets.Dataset):
            # Read here, so that what cannot be read has a path and a reason.
            dataset = dataset.cast_column(columns.image, datasets.Image(decode=False))
        self.dataset = dataset
        self.columns = columns
        self.size = size
        self.indices = range(len(dataset)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def open(self, index: int) -> tuple[Image.Image, int]:
        """Opens the image at `index`, reading only its header, and gives its class id; see [`read_row`]."""
        row = self.indices[index]
        return read_row(self.dataset[row], self.columns, f"row {row}")

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self.open(index)
        with image:
            return {"image": cover_and_crop(image, *self.size), "label": label}

    def path_of(self, index: int) -> str:
        """The path of the image at `index`, or its row in the data set if it has none."""
        row = self.indices[index]
        return (self.dataset[row][self.columns.image] or {}).get("path") or f"row {row}"

    @property
    def labels(self) -> np.ndarray:
        """Class ids of all images, of shape (n,), without opening them; -1 for those without a label."""
        if isinstance(self.dataset, ImageFolder):
            labels = self.dataset.labels
        else:
            labels = self.dataset[self.columns.label][:]
            labels = np.array([self.columns.class_id(label) if label is not None else -1 for label in labels])
        return labels[self.indices] if len(self) else np.zeros(0, np.int64)

    def count_images(self) -> Counter[int]:
        """Counts the images by class id. It opens none, and passes over those without a label."""
        ids, counts = np.unique(self.labels, return_counts=True)
        return Counter({int(label): int(count) for label, count in zip(ids, counts, strict=True) if label >= 0})

    def select(self, indices: Sequence[int], size: tuple[int, int]) -> "ImageDataset":
        """The images at `indices`, cropped to another `size`."""
        return ImageDataset(self.dataset, self.columns, size, [self.indices[index] for index in indices])


@dataclass(frozen=True)
class LabelledImages:
    """
    A data set of images, its class names and its fingerprint.

    Args:
        dataset (`torch.utils.data.Dataset`): Yields dicts with the `image`, uint8 (H, W, 3), and the `label`, an id.
        class_names (`tuple[str, ...]`): Names of the classes in the order of their ids.
        fingerprint (`str`): A text that differs for other images.
        resolution (`int`): Side of the images in pixels.
        left_out (`Mapping[str, LeftOut]`, defaults to `{}`): What was left out of their folder, by reason.
    """

    dataset: Dataset
    class_names: tuple[str, ...]
    fingerprint: str
    resolution: int
    left_out: Mapping[str, LeftOut] = field(default_factory=dict)

    def describe(self) -> str:
        """Describes the images in lines: their number, that of the first classes, and what was left out."""
        lines = [f"{len(self.dataset):,} images of {len(self.class_names)} classes"]
        counts = self.dataset.count_images() if isinstance(self.dataset, ImageDataset) else None
        if counts is not None and (empty := sum(not counts[label] for label in range(len(self.class_names)))):
            lines[0] += f", {empty} of them without an image"
        lines += list_classes(self.class_names, counts)
        return "\n".join(lines + [f"  left out, {reason}: {part}" for reason, part in self.left_out.items()])

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sample at `index` of the data set. Raises a `ValueError` that names the image if it cannot be read."""
        try:
            return self.dataset[index]
        except MemoryError:
            raise
        except Exception as error:  # each library that reads files has its own
            raise ValueError(
                f"Images must be readable, got {self.path_of(index)}: {type(error).__name__}: {error}"
            ) from error

    def path_of(self, index: int) -> str:
        """The path of the image at `index`, or its row in the data set if it has none."""
        return self.dataset.path_of(index) if hasattr(self.dataset, "path_of") else f"row {index}"


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """Source of images."""

    dataset_name: str | None = option(
        None,
        is_place=True,
        is_free=True,
        help="`textures` or `scenes` (procedural), or a data set that `datasets` can load.",
    )
    train_data_dir: str | None = option(
        None,
        is_private=True,
        is_free=True,
        help="Folder with one sub-folder of images per class, or of Parquet or tar files.",
    )
    image_column: str = option("image", is_free=True, help="Column of the images.")
    label_column: str = option("label", is_free=True, help="Column of the class ids.")
    resolution: int = option(256, at_least=1, is_free=True, help="Side of the centre crop in pixels.")

    @property
    def has_source(self) -> bool:
        """Whether images are given at all."""
        return self.dataset_name is not None or self.train_data_dir is not None

    def find_source_errors(self, is_needed: bool = True) -> list[str]:
        """
        Finds out whether images have one source.

        Args:
            is_needed (`bool`, defaults to `True`): Whether there must be one. If not, latents may take its place.

        Returns:
            `list[str]`: A message if they do not.
        """
        sources = [self.dataset_name, self.train_data_dir]
        if None in sources and (any(sources) or not is_needed):
            return []
        return [
            "Exactly one of `dataset_name` and `train_data_dir` must be given"
            f"{'' if is_needed else ', or none beside `latents_dir`'}, got {sources[0]!r} and {sources[1]!r}."
        ]


def load_labelled_images(
    images: ImageOptions, num_train_samples: int, seed: int, on_bad_image: str = "error"
) -> LabelledImages:
    """
    Opens the procedural `textures` or `scenes`, a data set of the Hub, or a folder.

    A folder has one sub-folder of images per class, see [`ImageFolder`], or no such images but Parquet files or
    WebDataset's tar files, see [`find_shards`].

    Args:
        images ([`ImageOptions`]): Source of the images, and their size.
        num_train_samples (`int`): Number of procedural images.
        seed (`int`): Seed of the procedural images.
        on_bad_image (`str`, defaults to `"error"`):
            Whether images of a folder that lie beside its class folders, and links to nothing, are an `"error"`, or
            are left out (`"skip"`).

    Returns:
        [`LabelledImages`].

    Raises:
        `ValueError`: both or neither source is given, it cannot be opened, or it has no such columns or no classes. It
            is a [`BadImagesError`] if images have no class, or links lead to nothing.
    """
    if errors := images.find_source_errors():
        raise ValueError(errors[0])
    dataset_name, folder, resolution = images.dataset_name, images.train_data_dir, images.resolution
    image_column, label_column = images.image_column, images.label_column
    if dataset_name in PROCEDURAL:
        dataset = PROCEDURAL[dataset_name](num_train_samples, size=resolution, seed=seed)
        fingerprint = f"{dataset_name}-{resolution}-{num_train_samples}-{seed}"
        return LabelledImages(dataset, dataset.class_names, fingerprint, resolution)

    if folder is None:
        source, left_out = open_dataset(dataset_name), {}
        identity = source._fingerprint
    else:
        source, identity, left_out = _open_folder(folder, on_bad_image)
    for name, column in {"image_column": image_column, "label_column": label_column}.items():
        if column not in source.column_names:
            raise ValueError(f"`{name}` must be one of the columns {sorted(source.column_names)}, got {column!r}.")
    if isinstance(source, ImageFolder):
        class_names, class_ids = source.class_names, None
    else:
        class_names, class_ids = _classes(source, label_column)
    class_names = clean_class_names(class_names)
    dataset = ImageDataset(source, Columns(image_column, label_column, class_ids), (resolution, resolution))
    fingerprint = f"{identity}-{image_column}-{label_column}"
    return LabelledImages(dataset, class_names, fingerprint, resolution, left_out)


def _open_folder(folder: str, on_bad_image: str) -> tuple[ImageFolder | datasets.Dataset, str, Mapping[str, LeftOut]]:
    """Opens the images of a folder, with a text that differs for other images, and what was left out by reason."""
    if not os.path.isdir(folder):
        raise ValueError(f"`train_data_dir` must be an existing folder, got {folder!r}.")
    images = ImageFolder(folder)
    if len(images):
        check_bad_images(images.bad, on_bad_image)
        return images, images.fingerprint, images.left_out
    if (shards := find_shards(folder)) is not None:
        source = datasets.load_dataset(shards.builder, data_files=shards.patterns, split="train")
        return source, shards.fingerprint, shards.left_out
    found = "; ".join(f"{reason}: {part}" for reason, part in images.left_out.items())
    raise ValueError(
        "`train_data_dir` must be a folder with one sub-folder of images per class, or with Parquet or tar files, got "
        f"{folder!r} with {len(images.class_names)} sub-folders, which hold no image"
        f"{f'. Left out are {found}' if found else ''}."
    )


@dataclass(frozen=True)
class Shards:
    """
    Files with many images each.

    Args:
        builder (`str`): The builder in `datasets` that reads them.
        paths (`list[str]`): Their paths.
        left_out (`Mapping[str, LeftOut]`): Files of other splits, if there are any, by reason.
    """

    builder: str
    paths: list[str]
    left_out: Mapping[str, LeftOut]

    @property
    def patterns(self) -> list[str]:
        """What `datasets` takes for the paths: no character in them has a meaning."""
        for path in self.paths:
            if "::" in path:
                raise ValueError(
                    f"`train_data_dir` must not have `::` in its path, which `datasets` splits, got {path}."
                )
        return [glob.escape(path) for path in self.paths]

    @property
    def fingerprint(self) -> str:
        """A hash of names and sizes of the files, wherever their folder lies."""
        lines = [f"{os.path.basename(path)} {os.path.getsize(path)}\n" for path in self.paths]
        return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def find_shards(folder: str) -> Shards | None:
    """
    Finds the Parquet files of a folder, or its tar files in the form of WebDataset.

    They lie in the folder itself, or in its sub-folder `data`, as on the Hub. If some names have the word `train`,
    files whose names have the word of another split are left out.

    Args:
        folder (`str`): The folder.

    Returns:
        [`Shards`], or `None` if there are none.
    """
    for place in (Path(folder), Path(folder, "data")):
        for builder, suffix in SHARD_SUFFIXES.items():
            names = sorted(path.name for path in place.iterdir()) if place.is_dir() else []
            names = [name for name in names if name.endswith(suffix) and not name.startswith(".")]
            words = {name: set(re.findall("[a-z]+", name.lower())) for name in names}
            left_out: dict[str, LeftOut] = {}
            if any(found & TRAIN_WORDS for found in words.values()):
                for name in [
                    name for name in names if words[name] & OTHER_SPLIT_WORDS and not words[name] & TRAIN_WORDS
                ]:
                    names.remove(name)
                    left_out.setdefault("of another split than `train`", LeftOut()).add(name)
            if names:
                return Shards(builder, [os.path.abspath(place / name) for name in names], left_out)
    return None


def source_files(folder: str) -> list[Path]:
    """The files that the images of a `folder` come from, sorted: the images themselves, or their shards."""
    images = ImageFolder(folder)
    if len(images):
        return sorted(Path(images.path(index)) for index in range(len(images)))
    shards = find_shards(folder)
    return [] if shards is None else [Path(path) for path in shards.paths]


def open_dataset(name: str, **options: Any) -> datasets.Dataset | datasets.IterableDataset:
    """
    Opens the training split of a data set of the Hub.

    Args:
        name (`str`): Name for `datasets.load_dataset`.
        options (`Any`): Further arguments of `datasets.load_dataset`.

    Returns:
        `datasets.Dataset`, or with `streaming=True` a `datasets.IterableDataset`.

    Raises:
        `ValueError`: there is no such data set, or its licence has not been accepted.
    """
    try:
        return datasets.load_dataset(name, split="train", **options)
    except datasets.exceptions.DatasetNotFoundError as error:
        hint = ""
        if "gated" in str(error):
            hint = f" Accept its licence at https://huggingface.co/datasets/{name}, then log in with `hf auth login`."
        raise ValueError(
            f"`dataset_name` must be a data set that can be opened, got {name!r}: {error}{hint}"
        ) from error


def check_label_column(feature: Any, label_column: str) -> None:
    """Raises a `ValueError` unless a `feature` of `datasets`, that of `label_column`, can hold labels of classes."""
    dtype = str(getattr(feature, "dtype", ""))  # lists and mappings have none, or one of another kind
    is_plain = isinstance(feature, datasets.ClassLabel | datasets.Value)
    if not is_plain or not dtype.startswith(("int", "uint", "bool", "string", "large_string")):
        raise ValueError(
            "`label_column` must be a column of class labels, names or ids from 0, "
            f"got {label_column!r} of type {feature}."
        )


def _classes(source: datasets.Dataset, label_column: str) -> tuple[list[str], dict[str, int] | None]:
    """Names of a data set's classes by id, and the ids of labels that are not ids themselves."""
    feature = source.features[label_column]
    check_label_column(feature, label_column)
    if getattr(feature, "names", None) is not None:
        return list(feature.names), None
    labels = {label for label in source.unique(label_column) if label is not None}
    if labels and all(isinstance(label, str) for label in labels):
        names = sorted(set(map(clean_class_name, labels)))
        if changed := sorted(labels - set(names)):
            logger.warning(
                f"Names of classes are changed, such as {changed[0]!r} to {clean_class_name(changed[0])!r}."
            )
        return names, {name: index for index, name in enumerate(names)}
    if not labels or min(labels) < 0 or max(labels) >= MAX_CLASSES:
        found = f"those from {min(labels)} to {max(labels)}" if labels else "none"
        raise ValueError(
            f"`label_column` must hold names of classes, or ids from 0 to {MAX_CLASSES - 1}, got {label_column!r} "
            f"with {found}."
        )
    return [str(index) for index in range(max(labels) + 1)], None


MAX_WORKERS = 1024  # processes that read images; more would only fill the machine
TRANSFORM = "ADM centre crop"
