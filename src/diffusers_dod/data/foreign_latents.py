# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Latents of other projects, with the interface of [`LatentDataset`].

Neither form says which autoencoder it comes from. The trainer must get the right one, as its statistics normalise the
latents.

- LightningDiT: `latents_rank00_shard000.safetensors`, ... with `latents`, `latents_flip` (n, C, h, w) and `labels`
  (n,): samples, without a deviation.
- EDM2 and REPA: `dataset.json` with `labels`, pairs of a file and a class, and NumPy files (2C, h, w) with mean and
  deviation.
"""

import json
from pathlib import Path

import numpy as np
import torch

from ..autoencoders import Autoencoder, latent_statistics
from .buckets import BUCKETS, BucketedLatents
from .latents import SHARD_MANIFEST, LatentDataset, Latents, MappedShards


LIGHTNING_DIT_SHARDS = "latents_rank*_shard*.safetensors"
EDM2_INDEX = "dataset.json"


class _ForeignLatents(Latents):
    """Latents that another project encoded, normalised with the statistics of the autoencoder."""

    def __init__(self, folder: Path, labels: torch.Tensor, num_views: int, shape: tuple[int, ...], vae: Autoencoder):
        if len(labels) == 0 or bool((labels < 0).any()):
            raise ValueError(f"{folder} must hold latents with class ids from 0, got {labels[:5].tolist()}.")
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
            entries = json.loads((folder / EDM2_INDEX).read_text())["labels"] or []
            self._files = [str(name) for name, _ in entries]
            labels = torch.tensor([int(label) for _, label in entries], dtype=torch.int64)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{folder / EDM2_INDEX} must hold `labels`, pairs of a file and a class: {error}"
            ) from error
        if not self._files:
            raise ValueError(f"{folder / EDM2_INDEX} must hold at least one label, got none.")
        shape = np.load(folder / self._files[0], mmap_mode="r").shape
        if len(shape) != 3 or shape[0] % 2:
            raise ValueError(f"{folder} must hold arrays (2C, h, w) of mean and deviation, got {shape}.")
        super().__init__(folder, labels, 1, (shape[0] // 2, *shape[1:]), vae)

    def read(self, index: int, view: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = torch.from_numpy(np.load(self.folder / self._files[index])).float().chunk(2)
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
