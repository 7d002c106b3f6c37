# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Aspect-ratio buckets: images of many shapes, each cropped to the nearest of a few sizes of about the same area.

    folder/buckets.json             settings of the latents, the classes and the buckets; written last
    folder/bucket-<height>x<width>/   the latents of the images of one size, see [`LatentDataset`]

All samples of an optimizer step come from one bucket, so that they have one shape on every process.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..autoencoders import Autoencoder
from ..checks import check_at_least, check_number, check_type
from ..files import write_json
from ..image_reading import read_orientation
from ..options import check_options
from ..records import Count, FileName, find_record, one_of, read_record
from ..vision_features import VisionFeatures
from .encoding import (
    EncodingOptions,
    Share,
    encode_latents,
    finish_latents,
    latent_settings,
    read_note,
)
from .image_folder import check_bad_images
from .labelled_images import ImageDataset, LabelledImages
from .latents import BadImage, LatentDataset, Latents, LatentShape, Size, check_settings, is_complete
from .orders import BucketOrder


BUCKETS = "buckets.json"
BUCKETS_FORMAT = 1
SHARED_SETTINGS = ("class_names", "resolution", "random_flip", "autoencoder", "latents_dtype", "vision_model")


def bucket_sizes(resolution: int, multiple: int, max_aspect_ratio: float = 2.0) -> list[tuple[int, int]]:
    """
    Sizes of the buckets, of about the area of a square.

    Both sides are multiples of `multiple`, the area is at most that of the square, and the longer side is at most
    `max_aspect_ratio` times the shorter one. Sizes that fit into another one are left out. So each height has one
    width, the square is one of the sizes, and each size also occurs on its side.

    Args:
        resolution (`int`): Side of the square in pixels.
        multiple (`int`): Divisor of all sides: pixels per latent pixel times the patch size.
        max_aspect_ratio (`float`, defaults to 2.0): Largest ratio of longer to shorter side, at least 1.

    Returns:
        `list[tuple[int, int]]`: Heights and widths in pixels, from the lowest to the highest.

    Raises:
        `ValueError`, `TypeError`: an argument is out of range or of the wrong type.
    """
    check_at_least("multiple", multiple, 1)
    check_at_least("resolution", resolution, 1)
    if resolution % multiple:
        raise ValueError(f"`resolution` must be a multiple of `multiple` = {multiple}, got {resolution}.")
    check_number("max_aspect_ratio", max_aspect_ratio, 1)
    area = (resolution // multiple) ** 2
    sizes, widest = [], 0
    for height in range(int(min(area, resolution // multiple * max_aspect_ratio)), 0, -1):
        width = int(min(area // height, height * max_aspect_ratio))
        if width > widest and height <= width * max_aspect_ratio:
            sizes.append((height * multiple, width * multiple))
            widest = width
    return sizes[::-1]


class _AspectRatios(Dataset):
    """Logarithm of height / width of each image; 0 for an image that cannot be opened."""

    def __init__(self, images: ImageDataset):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> float:
        try:
            image, _ = self.images.open(index)
            with image:
                orientation = read_orientation(image)
                ratio = math.log(image.height / image.width)
        except MemoryError:
            raise
        except Exception:  # each library that reads files has its own
            return 0.0
        # Pillow has turned the size of a TIFF already.
        return -ratio if orientation in (5, 6, 7, 8) and image.format != "TIFF" else ratio


def assign_buckets(images: LabelledImages, sizes: Sequence[tuple[int, int]], num_workers: int = 0) -> list[int]:
    """
    Assigns each image to the size with the nearest aspect ratio, in the logarithm.

    Only headers are read, with the orientation of EXIF unless it is behind the pixels of a PNG. Images that cannot be
    opened count as squares, and encoding reports them later.

    Args:
        images ([`LabelledImages`]): Images whose `dataset` is an [`ImageDataset`].
        sizes (`Sequence[tuple[int, int]]`): Heights and widths, see [`bucket_sizes`].
        num_workers (`int`, defaults to 0): Processes that read headers; 0 reads them in this one.

    Returns:
        `list[int]`: An index of `sizes` for each image.

    Raises:
        `ValueError`, `TypeError`: there are no images or no sizes, or the images are no [`ImageDataset`].
    """
    check_type("images.dataset", images.dataset, ImageDataset)  # procedural images are squares
    for name, values in {"images": images.dataset, "sizes": sizes}.items():
        if len(values) == 0:
            raise ValueError(f"`{name}` must hold at least one, got 0.")
    loader = DataLoader(_AspectRatios(images.dataset), batch_size=256, num_workers=num_workers, collate_fn=np.array)
    ratios = np.concatenate(list(loader))
    targets = np.log([height / width for height, width in sizes])
    return np.abs(ratios[:, None] - targets).argmin(axis=1).tolist()


def split_images(
    images: LabelledImages, sizes: Sequence[tuple[int, int]], num_workers: int = 0
) -> dict[tuple[int, int], LabelledImages]:
    """
    Splits images into buckets; empty buckets are left out.

    Args:
        images ([`LabelledImages`]): Images whose `dataset` is an [`ImageDataset`].
        sizes (`Sequence[tuple[int, int]]`): Heights and widths, see [`bucket_sizes`].
        num_workers (`int`, defaults to 0): Processes that read headers; 0 reads them in this one.

    Returns:
        `dict[tuple[int, int], LabelledImages]`: The images by height and width, each bucket with its own fingerprint.

    Raises:
        `ValueError`, `TypeError`: see [`assign_buckets`].
    """
    assigned = np.array(assign_buckets(images, sizes, num_workers))
    buckets = {}
    for number in np.unique(assigned).tolist():
        height, width = sizes[number]
        indices = np.flatnonzero(assigned == number)
        digest = hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest()
        buckets[height, width] = replace(
            images,
            dataset=images.dataset.select(indices.tolist(), (height, width)),
            fingerprint=f"{images.fingerprint}-{height}x{width}-{digest}",
        )
    return buckets


def encode_buckets(
    images: LabelledImages,
    sizes: Sequence[tuple[int, int]],
    vae: Autoencoder | None,
    folder: Path,
    options: EncodingOptions | None = None,
    share: Share | None = None,
    vision: VisionFeatures | None = None,
    all_or_none: Callable[[], AbstractContextManager] = nullcontext,
) -> "BucketedLatents":
    """
    Encodes all buckets with all processes, unless this has been done, and opens their latents.

    A run that was stopped continues where it was.

    Args:
        images ([`LabelledImages`]): Images whose `dataset` is an [`ImageDataset`].
        sizes (`Sequence[tuple[int, int]]`): Heights and widths, see [`bucket_sizes`].
        vae ([`Autoencoder`] or `None`): The autoencoder; without one the latents are the pixels.
        folder (`Path`): Folder of the latents.
        options ([`EncodingOptions`], *optional*): Settings of the encoding; the defaults if not given.
        share ([`Share`], *optional*): The process's share of the shards; all of them if not given.
        vision ([`VisionFeatures`], *optional*): A vision model whose features of the images are stored too.
        all_or_none (`Callable`, defaults to `nullcontext`):
            Gives a context that waits at its end for all processes and raises in each if one has failed.

    Returns:
        [`BucketedLatents`].

    Raises:
        `ValueError`, `TypeError`: the folder has latents of other images, of other sizes or of another autoencoder, or
            there are no images or no sizes. It is a [`BadImagesError`] if an image cannot be read.
    """
    options, share = options or EncodingOptions(), share or Share()
    check_options(options)
    shared = latent_settings(images, vae, options, vision)
    settings = shared | {"transform": "ADM centre crop to buckets", "bucket_sizes": [list(size) for size in sizes]}
    with all_or_none():  # all have looked before anyone writes
        is_done = _is_done(folder, settings)
    if not is_done:
        with all_or_none():
            buckets = split_images(images, sizes, options.dataloader_num_workers or 0)
            num_shards = 0
            for size, bucket in buckets.items():
                start = (share.process_index - num_shards) % share.num_processes  # goes on where the last bucket ended
                part = Share(start, share.num_processes)
                encode_latents(bucket, vae, folder / _name(size), options, share=part, vision=vision)
                num_shards += -(-len(bucket.dataset) // options.shard_size)
        with all_or_none():
            if share.process_index == 0:
                _finish_buckets(folder, buckets, settings, shared, options.on_bad_image)
    latents = BucketedLatents(folder)
    check_settings(folder, latents.manifest, settings)
    check_bad_images(latents.manifest["bad_images"], options.on_bad_image)
    return latents


def _name(size: tuple[int, int]) -> str:
    return f"bucket-{size[0]}x{size[1]}"


class BucketEntry(TypedDict):
    """What the list of buckets says of a bucket."""

    folder: FileName
    height: Size
    width: Size
    num_samples: Count


class BucketManifest(TypedDict):
    """What the list of buckets has, beside the settings that latents depend on."""

    format: Annotated[int, one_of(BUCKETS_FORMAT)]
    class_names: list[str]
    num_samples: Count
    num_views: Annotated[int, one_of(1, 2)]
    latent_shape: LatentShape
    bad_images: list[BadImage]
    buckets: list[BucketEntry]


def _is_done(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether all buckets are there; raises a `ValueError` if they were made with other settings."""
    manifest = find_record(folder / BUCKETS, BucketManifest)
    if manifest is None:
        return False
    check_settings(folder, manifest, settings)
    return all(is_complete(folder / bucket["folder"]) for bucket in manifest["buckets"])


def _finish_buckets(
    folder: Path,
    buckets: dict[tuple[int, int], LabelledImages],
    settings: dict[str, Any],
    shared: dict[str, Any],
    on_bad_image: str,
) -> None:
    """Writes the manifests once all shards are there; `shared` has the settings of all images as one bucket."""
    bad, entries = [], []
    for (height, width), bucket in buckets.items():
        bucket_folder = folder / _name((height, width))
        notes = [read_note(bucket_folder, shard) for shard in range(len(list(bucket_folder.glob("shard-*.json"))))]
        unreadable = [entry for note in notes if note is not None for entry in note["bad_images"]]
        bad += [{**entry, "index": bucket.dataset.indices[entry["index"]]} for entry in unreadable]
        if len(unreadable) == len(bucket.dataset):
            continue  # nothing to train on
        own = {"images": bucket.fingerprint, "num_images": len(bucket.dataset)}
        manifest = finish_latents(bucket_folder, shared | own, on_bad_image="skip")
        factor = height // manifest["latent_shape"][1]
        count = manifest["num_samples"]
        entries.append({"folder": bucket_folder.name, "height": height, "width": width, "num_samples": count})
    bad.sort(key=lambda entry: entry["index"])
    check_bad_images(bad, on_bad_image)
    if not entries:
        raise ValueError(f"{folder} must hold at least one image, got none of {settings['num_images']}.")
    side = settings["resolution"] // factor
    content = {
        "format": BUCKETS_FORMAT,
        **settings,
        "num_samples": sum(entry["num_samples"] for entry in entries),
        "num_views": manifest["num_views"],
        "latent_shape": [manifest["latent_shape"][0], side, side],  # of the square
        "bad_images": bad,
        "buckets": entries,
    }
    write_json(folder / BUCKETS, content)


class BucketedLatents(Latents):
    """
    Latents that were written by [`encode_buckets`], with all buckets in a row.

    Args:
        folder (`Path`): Folder of the latents.

    Raises:
        `ValueError`: there is no list of buckets, it has another format, or a bucket is missing or was made with other
            settings.
    """

    def __init__(self, folder: Path):
        folder = Path(folder)
        try:
            manifest = read_record(folder / BUCKETS, BucketManifest)
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} must hold buckets, with a {BUCKETS}: {error}") from error
        #: The latents of each bucket.
        self.buckets = [LatentDataset(folder / bucket["folder"]) for bucket in manifest["buckets"]]
        shared = {name: manifest.get(name) for name in SHARED_SETTINGS}
        for bucket, entry in zip(self.buckets, manifest["buckets"], strict=True):
            if len(bucket) != entry["num_samples"]:
                raise ValueError(f"{bucket.folder} must hold {entry['num_samples']} latents, got {len(bucket)}.")
            check_settings(bucket.folder, bucket.manifest, shared)
        self._starts = np.cumsum([0, *self.bucket_lengths])
        super().__init__(folder, manifest, torch.cat([bucket.labels for bucket in self.buckets]))

    def _locate(self, index: int) -> tuple[LatentDataset, int]:
        """The bucket of an image, and its index there."""
        bucket = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.buckets[bucket], index - int(self._starts[bucket])

    @property
    def parts(self) -> list[Latents]:
        """The latents of each bucket."""
        return list(self.buckets)

    def order(self, images_per_step: int, seed: int) -> BucketOrder:
        return BucketOrder(self.bucket_lengths, images_per_step, seed)

    @property
    def bucket_lengths(self) -> list[int]:
        """Number of images of each bucket, in the order of the indices."""
        return [len(bucket) for bucket in self.buckets]

    def read(self, index: int, view: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
        bucket, row = self._locate(index)
        return bucket.read(row, view)

    def read_features(self, index: int, view: int = 0) -> torch.Tensor | None:
        bucket, row = self._locate(index)
        return bucket.read_features(row, view)
