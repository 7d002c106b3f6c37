# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Latents of an image data set, on disk: safetensors shards and a manifest that describes them.

    folder/manifest.json          what the latents depend on, the classes, the shards and their hashes
    folder/shard-00000.safetensors   `mean` and, unless the autoencoder is deterministic, `std` (n, views, C, h, w) of
                                     the normalised posterior, and `labels` (n,); if wanted `features` (n, views,
                                     rows, columns, D) of a vision model, in float16
    folder/shard-00000.json       written after its shard: tells a resumed run that the shard is done

A shard holds the images of a fixed range of indices, so that any number of processes write the same files. View 0 is
the image, view 1 its mirror image. Shards are mapped into memory: a sample is read on access.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ..files import file_sha256, read_object
from .labelled_images import TRANSFORM, LabelledImages
from .orders import EpochOrder


SHARD_MANIFEST = "manifest.json"
SHARD_FORMAT = 1
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def describe_difference(found: Any, expected: Any) -> tuple[str, str]:
    """
    Describes two different values; of lists the length and the first entry that differs.

    Args:
        found (`Any`): A value.
        expected (`Any`): Another one.

    Returns:
        `tuple[str, str]`: Texts of both, in this order.
    """
    if isinstance(found, list) and isinstance(expected, list):
        index = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), None)
        index = min(len(found), len(expected)) if index is None else index
        return tuple(f"{len(values)} with {values[index : index + 1]} at {index}" for values in (found, expected))
    return repr(found), repr(expected)


def check_settings(folder: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """
    Raises unless latents were made with the expected settings.

    Args:
        folder (`Path`): Folder of the latents, for the message.
        found (`dict`): Settings of the latents.
        expected (`dict`): Settings from [`latent_settings`].

    Raises:
        `ValueError`: a field differs; the message names it.
    """
    for name, value in expected.items():
        if found.get(name) != value:
            received, wanted = describe_difference(found.get(name), value)
            raise ValueError(
                f"{folder} must hold latents with `{name}` = {wanted}, got {received}: remove it, or use another "
                "folder."
            )


def is_complete(folder: Path) -> bool:
    """Whether `folder` has a manifest, which is not torn, and all of its shards."""
    manifest = read_object(folder / SHARD_MANIFEST)
    return manifest is not None and all((folder / shard["file"]).is_file() for shard in manifest["shards"])


def find_damaged_shards(folder: Path) -> list[str]:
    """Names of the shards in `folder` that are missing or do not have the hash of the manifest."""
    shards = json.loads((folder / SHARD_MANIFEST).read_text())["shards"]
    return [
        shard["file"]
        for shard in shards
        if not (folder / shard["file"]).is_file() or file_sha256(folder / shard["file"]) != shard["sha256"]
    ]


class Latents(ABC):
    """
    Base class of the latents of an image data set, whatever their files.

    Args:
        folder (`Path`): Folder of the latents.
        manifest (`dict`): Description with at least `num_views`, `latent_shape`, `class_names` and `bad_images`.
        labels (`torch.Tensor` of shape `(n,)`): Class ids.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], labels: torch.Tensor):
        self.folder = Path(folder)
        #: The manifest.
        self.manifest = manifest
        #: Class ids, (n,).
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_views(self) -> int:
        """1, or 2 with the mirror images."""
        return self.manifest["num_views"]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape (C, h, w) of the latents. Latents in buckets give the shape of a square, even without a square one."""
        return tuple(self.manifest["latent_shape"])

    @property
    def parts(self) -> list["Latents"]:
        """Parts with one shape and one folder each: the buckets, or these latents alone if there are no buckets."""
        return [self]

    def order(self, images_per_step: int, seed: int) -> Callable[[int], int]:
        """
        Order of the images in the training.

        Args:
            images_per_step (`int`): Positions of an optimizer step, whose latents have one shape.
            seed (`int`): Seed of the order.

        Returns:
            `Callable[[int], int]`: The index of the image at a position.
        """
        return EpochOrder(len(self), seed)

    @abstractmethod
    def read(self, index: int, view: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Reads the normalised posterior of an image.

        Args:
            index (`int`): Index of the image, in [0, n - 1].
            view (`int`, defaults to 0): 0 is the image, 1 its mirror image.

        Returns:
            `tuple[torch.Tensor, torch.Tensor | None]`: Mean and standard deviation (C, h, w) in fp32. Latents in
            buckets have the bucket's shape. The second is `None` without a deviation.
        """

    def read_features(self, index: int, view: int = 0) -> torch.Tensor | None:
        """
        Reads the features of an image.

        Args:
            index (`int`): Index of the image, in [0, n - 1].
            view (`int`, defaults to 0): 0 is the image, 1 its mirror image.

        Returns:
            `torch.Tensor` of shape `(rows, columns, D)` in fp32, or `None` if no vision model was given.
        """
        return None


class MappedShards:
    """
    A row of safetensors files, which each process maps into memory when it needs them.

    Args:
        paths (`Sequence[Path]`): The files.
        latents (`str`): Name of the tensor (n, ...) that each file must hold beside its `labels` (n,), n >= 1.

    Raises:
        `ValueError`: a file is damaged, or lacks one of these tensors.
    """

    def __init__(self, paths: Sequence[Path], latents: str):
        self.paths = list(paths)
        self._needed = {latents, "labels"}
        self._slices: dict[int, dict[str, Any]] = {}
        self._sizes: dict[int, int] = {}
        labels = [self.open(shard)["labels"] for shard in range(len(self.paths))]
        self._starts = np.cumsum([0, *map(len, labels)])
        #: Class ids, (n,).
        self.labels = torch.cat(labels)
        self._slices.clear()

    def open(self, shard: int) -> dict[str, Any]:
        """
        Opens a shard.

        Args:
            shard (`int`): Index of the shard, in the order of the paths.

        Returns:
            `dict`: The `labels` (n,), and slices of its other tensors, by name.

        Raises:
            `ValueError`: the file is damaged, or lacks a tensor.
        """
        if shard not in self._slices:
            try:
                file = safe_open(self.paths[shard], framework="pt")
            except SafetensorError as error:
                raise ValueError(
                    f"{self.paths[shard]} must be an undamaged shard, got {error}: remove it and encode again."
                ) from error
            names = set(file.keys())
            if not self._needed <= names:
                needed = " and ".join(f"`{name}`" for name in sorted(self._needed))
                raise ValueError(f"{self.paths[shard]} must hold {needed}, got {sorted(names)}.")
            slices = {name: file.get_slice(name) for name in names - {"labels"}}
            self._slices[shard] = {"labels": file.get_tensor("labels").long(), **slices}
        return self._slices[shard]

    def locate(self, index: int) -> tuple[dict[str, Any], int]:
        """Opens the shard of the image `index`, and gives its row there."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        slices = self.open(shard)
        self._check_size(shard)
        return slices, index - int(self._starts[shard])

    def _check_size(self, shard: int) -> None:
        """Raises a `ValueError` if a shard has been cut since it was mapped: reading it would kill the process."""
        try:
            size = self.paths[shard].stat().st_size
        except FileNotFoundError:  # what is mapped stays
            return
        if size < self._sizes.setdefault(shard, size):
            raise ValueError(
                f"{self.paths[shard]} must keep its {self._sizes[shard]} bytes while it is read, got {size}: remove "
                "it and encode again."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_slices": {}}  # open files stay with their process


class LatentDataset(Latents):
    """
    Latents that were written by [`encode_latents`] and [`finish_latents`].

    Args:
        folder (`Path`): Folder of the latents.

    Raises:
        `ValueError`: there is no manifest, it has another format, or a shard is missing.
    """

    def __init__(self, folder: Path):
        folder = Path(folder)
        try:
            manifest = json.loads((folder / SHARD_MANIFEST).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} must hold latents, with a {SHARD_MANIFEST}, got none: {error}") from error
        if manifest.get("format") != SHARD_FORMAT:
            raise ValueError(f"{folder} must hold latents of format {SHARD_FORMAT}, got {manifest.get('format')}.")
        shards = manifest["shards"]
        missing = [shard["file"] for shard in shards if not (folder / shard["file"]).is_file()]
        if missing:
            raise ValueError(f"{folder} must hold all shards of its {SHARD_MANIFEST}, got it without {missing}.")
        self._shards = MappedShards([folder / shard["file"] for shard in shards if shard["num_samples"]], "mean")
        super().__init__(folder, manifest, self._shards.labels)

    def read(self, index: int, view: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
        slices, row = self._shards.locate(index)
        mean = slices["mean"][row, view].float()
        return mean, (slices["std"][row, view].float() if "std" in slices else None)

    def read_features(self, index: int, view: int = 0) -> torch.Tensor | None:
        if "vision_model" not in self.manifest:
            return None
        slices, row = self._shards.locate(index)
        return slices["features"][row, view].float()


def images_of(latents: LatentDataset, images: LabelledImages) -> np.ndarray:
    """
    Indices of the images that latents were made of; latents lack images that could not be read.

    Args:
        latents ([`LatentDataset`]): The latents.
        images ([`LabelledImages`]): The images that they were made of.

    Returns:
        `np.ndarray` of shape `(n,)`: Indices into `images.dataset`, in ascending order.

    Raises:
        `ValueError`: the latents were made of other images.
    """
    expected = {
        "images": images.fingerprint,
        "num_images": len(images.dataset),
        "transform": TRANSFORM,
        "resolution": images.resolution,
    }
    check_settings(latents.folder, latents.manifest, expected)
    bad = [entry["index"] for entry in latents.manifest["bad_images"]]
    return np.delete(np.arange(len(images.dataset)), bad)
