# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Latents of other projects, with the interface of [`LatentDataset`].

Neither form says which autoencoder it comes from. The trainer must get the right one, as its statistics normalise the
latents.

- LightningDiT: `latents_rank00_shard000.safetensors`, ... with `latents`, `latents_flip` (n, C, h, w) and `labels`
  (n,): samples, without a deviation.
- EDM2 and REPA: `dataset.json` with `labels`, pairs of a file and a class, and NumPy files (2C, h, w) with mean and
  deviation. EDM2's come from pixels in [0, 1], not [-1, 1], and nothing in them says so.
"""

from pathlib import Path
from typing import TypedDict

import numpy as np
import torch

from ..autoencoders import Autoencoder, latent_statistics
from ..checks import MAX_CLASSES
from ..records import FileName, check_record, read_record
from .buckets import BUCKETS, BucketedLatents
from .latents import SHARD_MANIFEST, LatentDataset, Latents, MappedShards


LIGHTNING_DIT_SHARDS = "latents_rank*_shard*.safetensors"
EDM2_INDEX = "dataset.json"


class _ForeignLatents(Latents):
    """Latents that another project encoded, normalised with the statistics of the autoencoder."""

    def __init__(self, folder: Path, labels: torch.Tensor, num_views: int, shape: tuple[int, ...], vae: Autoencoder):
        if len(labels) == 0 or bool(((labels < 0) | (labels >= MAX_CLASSES)).any()):
            found = [] if len(labels) == 0 else [int(labels.min()), int(labels.max())]
            raise ValueError(f"{folder} must hold latents with class ids in [0, {MAX_CLASSES - 1}], got {found}.")
        mean, std = latent_statistics(vae, torch.zeros(1))
        self._mean, self._std = mean[0], std[0]
        if self._mean.shape[0] not in (1, shape[0]):
            raise ValueError(
                f"{folder} must hold latents of the autoencoder's {self._mean.shape[0]} channels, got {shape[0]}."
            )
        manifest = {
            "class_names": [str(index) for index in range(int(labels.max()) + 1)],
            "resolution": None,
            "random_flip": num_views == 2,
            "num_views": num_views,
            "latent_shape": shape,
            "bad_images": [],
        }
        super().__init__(folder, manifest, labels)


class LightningDiTLatents(_ForeignLatents):
    """
    Latents in shards of LightningDiT.

    Args:
        folder (`Path`): Folder of the shards.
        vae ([`Autoencoder`]): The autoencoder that they come from.

    Raises:
        `ValueError`: a file is damaged, or does not hold such latents.
    """

    def __init__(self, folder: Path, vae: Autoencoder):
        paths = sorted(folder.glob(LIGHTNING_DIT_SHARDS))
        self._shards = MappedShards(paths, "latents")
        shards = [self._shards.open(index) for index in range(len(paths))]
        shapes = {tuple(slices["latents"].get_shape()[1:]) for slices in shards}
        has_flip = {"latents_flip" in slices for slices in shards}
        if len(shapes) != 1 or len(has_flip) != 1:
            raise ValueError(f"{folder} must hold shards of one form, got latents of {sorted(shapes)}.")
        super().__init__(folder, self._shards.labels, 1 + has_flip.pop(), shapes.pop(), vae)

    def read(self, index: int, view: int = 0) -> tuple[torch.Tensor, None]:
        slices, row = self._shards.locate(index)
        latents = slices["latents_flip" if view else "latents"][row]
        return (latents.float() - self._mean) / self._std, None


class _Edm2Index(TypedDict):
    labels: list[list] | None


class Edm2Latents(_ForeignLatents):
    """
    Latents in arrays of EDM2 and REPA.

    Args:
        folder (`Path`): Folder of `dataset.json` and the arrays.
        vae ([`Autoencoder`]): The autoencoder that they come from.

    Raises:
        `ValueError`: the index has no labels, or the arrays have another form.
    """

    def __init__(self, folder: Path, vae: Autoencoder):
        try:
            entries = read_record(folder / EDM2_INDEX, _Edm2Index)["labels"] or []
            self._files = [name for name, _ in entries]
            check_record(self._files, list[FileName], "labels")
            check_record([label for _, label in entries], list[int], "labels")
            labels = torch.tensor([label for _, label in entries], dtype=torch.int64)
        except (RuntimeError, TypeError, ValueError) as error:  # the first one with an integer beyond 64 bits
            raise ValueError(
                f"{folder / EDM2_INDEX} must hold `labels`, pairs of a file and a class: {error}"
            ) from error
        if not self._files:
            raise ValueError(f"{folder / EDM2_INDEX} must hold at least one label, got none.")
        shape = self._open(folder / self._files[0]).shape
        if len(shape) != 3 or shape[0] % 2:
            raise ValueError(f"{folder} must hold arrays (2C, h, w) of mean and deviation, got {shape}.")
        super().__init__(folder, labels, 1, (shape[0] // 2, *shape[1:]), vae)

    @staticmethod
    def _open(path: Path) -> np.ndarray:
        """Maps an array into memory, which its file must be long enough for."""
        try:
            return np.lib.format.open_memmap(path, mode="r")
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} must be an undamaged file of NumPy, got {error}.") from error

    def read(self, index: int, view: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        path, (channels, height, width) = self.folder / self._files[index], self.latent_shape
        array = self._open(path)
        if array.shape != (2 * channels, height, width):
            raise ValueError(f"{path} must have shape {(2 * channels, height, width)}, got {array.shape}.")
        mean, std = torch.from_numpy(np.array(array)).float().chunk(2)
        return (mean - self._mean) / self._std, std / self._std


def open_latents(folder: Path, vae: Autoencoder | None) -> Latents:
    """
    Opens latents of any form.

    Args:
        folder (`Path`): Folder of the latents.
        vae ([`Autoencoder`] or `None`): The autoencoder that they come from.

    Returns:
        [`Latents`].

    Raises:
        `ValueError`: the form is unknown, or it is another project's and there is no autoencoder.
    """
    if (folder / BUCKETS).exists():
        return BucketedLatents(folder)
    if (folder / SHARD_MANIFEST).exists():
        return LatentDataset(folder)
    forms = {LightningDiTLatents: any(folder.glob(LIGHTNING_DIT_SHARDS)), Edm2Latents: (folder / EDM2_INDEX).exists()}
    form = next((form for form, is_there in forms.items() if is_there), None)
    if form is None:
        raise ValueError(
            f"`latents_dir` must hold a {SHARD_MANIFEST}, LightningDiT's {LIGHTNING_DIT_SHARDS} or EDM2's "
            f"{EDM2_INDEX}, got {folder}."
        )
    if vae is None:
        raise ValueError(
            f"`pretrained_vae_name_or_path` must be the autoencoder that the latents in {folder} come from, got None."
        )
    return form(folder, vae)
