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

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ..checks import MAX_SIDE, shown
from ..files import file_sha256
from ..records import Count, FileName, Sha256, check_safetensors_header, find_record, one_of, read_record, within
from .labelled_images import TRANSFORM, LabelledImages
from .orders import EpochOrder


SHARD_MANIFEST = "manifest.json"
SHARD_FORMAT = 1
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def _check_shape(name: str, value: list[int]) -> None:
    if len(value) != 3:
        raise ValueError(f"`{name}` must hold channels, height and width, got {shown(value)}.")


Size = Annotated[int, within(1, MAX_SIDE)]
LatentShape = Annotated[list[Size], _check_shape]


class ShardEntry(TypedDict):
    """What a manifest says of a shard."""

    file: FileName
    num_samples: Count
    sha256: Sha256


class BadImage(TypedDict):
    """An image that could not be read: its index among all images, its path, and why."""

    index: Count
    path: str
    reason: str


class ShardManifest(TypedDict):
    """What a manifest of latents has, beside the settings that they depend on."""

    format: Annotated[int, one_of(SHARD_FORMAT)]
    class_names: list[str]
    num_samples: Count
    num_views: Annotated[int, one_of(1, 2)]
    latent_shape: LatentShape
    bad_images: list[BadImage]
    shards: list[ShardEntry]
    latents_dtype: Annotated[str, one_of(*DTYPES)]
    vision_model: NotRequired[dict | None]


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
    manifest = find_record(folder / SHARD_MANIFEST, ShardManifest)
    return manifest is not None and all((folder / shard["file"]).is_file() for shard in manifest["shards"])


def find_damaged_shards(folder: Path) -> list[str]:
    """Names of the shards in `folder` that are missing or do not have the hash of the manifest."""
    shards = read_record(folder / SHARD_MANIFEST, ShardManifest)["shards"]
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


def _form(part: Any) -> tuple[str, tuple[int, ...]]:
    """Type and shape of a tensor, or of a slice of a file; both in the words of safetensors."""
    if isinstance(part, torch.Tensor):
        return "I64", tuple(part.shape)
    return part.get_dtype(), tuple(part.get_shape())


class MappedShards:
    """
    A row of safetensors files, which each process maps into memory when it needs them.

    Args:
        paths (`Sequence[Path]`): The files.
        latents (`str`): Name of the tensor (n, ...) that each file must hold beside its `labels` (n,), n >= 1.
        hashes (`Sequence[str]`, *optional*): SHA-256 of each file, which it must have when it is first read.

    Raises:
        `ValueError`: a file is damaged, or lacks one of these tensors.
    """

    def __init__(self, paths: Sequence[Path], latents: str, hashes: Sequence[str] | None = None):
        self.paths = list(paths)
        self._needed = {latents, "labels"}
        self._slices: dict[int, dict[str, Any]] = {}
        self._sizes: dict[int, int] = {}
        # The processes of a data loader share it: one of them hashes a file.
        self._is_hashed = torch.full((len(self.paths),), hashes is None).share_memory_()
        self._hashes = hashes
        labels = [self._map(shard)["labels"] for shard in range(len(self.paths))]
        #: Types and shapes of the tensors of each shard, by name.
        self.forms = [{name: _form(part) for name, part in self._slices[i].items()} for i in range(len(self.paths))]
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
        if not self._is_hashed[shard]:
            if file_sha256(self.paths[shard]) != self._hashes[shard]:
                raise ValueError(
                    f"{self.paths[shard]} must have the hash that its manifest states, got another: remove it and "
                    "encode again."
                )
            self._is_hashed[shard] = True
        return self._map(shard)

    def _map(self, shard: int) -> dict[str, Any]:
        if shard not in self._slices:
            check_safetensors_header(self.paths[shard])
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
        `ValueError`: there is no manifest, it has another format, a shard is missing or has other shapes, types or
            classes; or, when a shard is first read, its hash is another.
    """

    def __init__(self, folder: Path):
        folder = Path(folder)
        try:
            manifest = read_record(folder / SHARD_MANIFEST, ShardManifest)
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} must hold latents, with a {SHARD_MANIFEST}: {error}") from error
        shards = manifest["shards"]
        missing = [shard["file"] for shard in shards if not (folder / shard["file"]).is_file()]
        if missing:
            raise ValueError(f"{folder} must hold all shards of its {SHARD_MANIFEST}, got it without {missing}.")
        shards = [shard for shard in shards if shard["num_samples"]]
        paths, hashes = [folder / shard["file"] for shard in shards], [shard["sha256"] for shard in shards]
        self._shards = MappedShards(paths, "mean", hashes)
        super().__init__(folder, manifest, self._shards.labels)
        self._check_shards([shard["num_samples"] for shard in shards])

    def _check_shards(self, num_samples: list[int]) -> None:
        """Raises unless the shards have the shapes, types and classes of the manifest."""
        manifest, forms = self.manifest, self._shards.forms
        dtype = SAFETENSORS_DTYPES[manifest["latents_dtype"]]
        for path, number, form in zip(self._shards.paths, num_samples, forms, strict=True):
            expected = {"labels": ("I64", (number,)), "mean": (dtype, (number, self.num_views, *self.latent_shape))}
            if "std" in forms[0]:
                expected["std"] = expected["mean"]
            if "vision_model" in manifest:
                kind, shape = forms[0].get("features", ("F16", ()))
                expected["features"] = (kind, (number, self.num_views, *shape[2:]))
            if form != expected:
                name = min(name for name in form.keys() | expected if form.get(name) != expected.get(name))
                raise ValueError(
                    f"{path} must hold `{name}` as its {SHARD_MANIFEST} says, {expected.get(name)}, "
                    f"got {form.get(name)}."
                )
        num_classes = len(manifest["class_names"])
        if len(self) != manifest["num_samples"] or len(self) == 0:
            raise ValueError(
                f"{self.folder} must hold {manifest['num_samples']} latents, at least 1, got {len(self)}."
            )
        if not 0 <= int(self.labels.min()) <= int(self.labels.max()) < num_classes:
            raise ValueError(
                f"{self.folder} must hold labels in [0, {num_classes - 1}], got {int(self.labels.min())} to "
                f"{int(self.labels.max())}."
            )

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
