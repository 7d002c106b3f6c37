# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Encodes images into shards for [`LatentDataset`]. All processes share the work, and a stopped run continues."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..autoencoders import Autoencoder, encode_moments
from ..checks import check_at_least, check_choice
from ..files import file_sha256, make_folder, replacing, sha256_of_weights, write_json
from ..image_reading import to_pixels
from ..options import check_options, option
from ..records import Count, Sha256, find_record
from ..vision_features import VisionFeatures
from .image_folder import check_bad_images
from .labelled_images import MAX_WORKERS, TRANSFORM, LabelledImages
from .latents import DTYPES, SHARD_FORMAT, SHARD_MANIFEST, BadImage, check_settings


ON_BAD_IMAGE = ("error", "skip")
SHARD_SIZE = 4096


@dataclass(frozen=True, kw_only=True)
class EncodingOptions:
    """Encoding of images."""

    random_flip: bool = option(False, is_free=True, help="Mirror half of the images.")
    max_aspect_ratio: float | None = option(
        None,
        at_least=1,
        excludes="streaming",
        is_free=True,
        help="Buckets of shapes up to this ratio of sides, about as large as the square, instead of squares.",
    )
    latents_dtype: str = option(
        "float32", choices=DTYPES, excludes="streaming", is_free=True, help="Data type of the latents on disk."
    )
    on_bad_image: str = option(
        "error",
        choices=ON_BAD_IMAGE,
        is_free=True,
        help="Whether images that cannot be read are an error, or are left out and counted.",
    )
    shard_size: int = option(
        SHARD_SIZE, at_least=1, excludes="streaming", is_free=True, help="Images in a shard, the unit of the work."
    )
    dataloader_num_workers: int | None = option(
        None,
        at_least=0,
        at_most=MAX_WORKERS,
        is_free=True,
        help="Processes that read images, or latents; 0 reads in the process itself. By default on CUDA a "
        "GPU's share of the cores, up to 8, and else 0.",
    )
    encoding_batch_size: int = option(
        64, at_least=1, excludes="streaming", is_free=True, help="Images that are encoded at a time."
    )


@dataclass(frozen=True)
class Share:
    """
    Part of the work that falls to one process.

    Args:
        process_index (`int`, defaults to 0): Number of the process, from 0.
        num_processes (`int`, defaults to 1): Number of processes.
    """

    process_index: int = 0
    num_processes: int = 1

    def __post_init__(self):
        check_at_least("num_processes", self.num_processes, 1)
        check_at_least("process_index", self.process_index, 0)
        if self.process_index >= self.num_processes:
            raise ValueError(f"`process_index` must be less than {self.num_processes}, got {self.process_index}.")


def describe_autoencoder(vae: Autoencoder | None) -> dict[str, str] | None:
    """Identity of an autoencoder: the class of `vae`, and hashes of its config and its weights."""
    if vae is None:
        return None
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    return {
        "class_name": type(vae).__name__,
        "config_sha256": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
        "weights_sha256": sha256_of_weights(vae.state_dict()),
    }


def latent_settings(
    images: LabelledImages,
    vae: Autoencoder | None,
    options: EncodingOptions,
    vision: VisionFeatures | None = None,
) -> dict[str, Any]:
    """
    Settings that latents depend on, as their manifest states them.

    Args:
        images ([`LabelledImages`]): The images.
        vae ([`Autoencoder`] or `None`): The autoencoder; without one the latents are the pixels.
        options ([`EncodingOptions`]): Settings of the encoding.
        vision ([`VisionFeatures`], *optional*): The vision model whose features are stored too.

    Returns:
        `dict`: The settings, ready for JSON.
    """
    settings = {
        # In this order they are compared: what tells most about a difference comes first.
        "class_names": list(images.class_names),
        "num_images": len(images.dataset),
        "images": images.fingerprint,
        "transform": TRANSFORM,
        "resolution": images.resolution,
        "random_flip": options.random_flip,
        "autoencoder": describe_autoencoder(vae),
        "latents_dtype": options.latents_dtype,
    }
    if vae is not None and vae.device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        settings["tf32"] = True  # in convolutions
    return settings if vision is None else {**settings, "vision_model": vision.describe()}


class _Readable(Dataset):
    """An image data set that yields `{index, reason}` in place of an image that cannot be read."""

    def __init__(self, images: LabelledImages):
        self.images = images

    def __len__(self) -> int:
        return len(self.images.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            sample = self.images.dataset[index]
        except MemoryError:
            raise
        except Exception as error:  # each library that reads files has its own
            return {"index": index, "reason": f"{type(error).__name__}: {error}"}
        num_classes = len(self.images.class_names)
        if not 0 <= int(sample["label"]) < num_classes:
            return {"index": index, "reason": f"its label is {sample['label']}, not in [0, {num_classes - 1}]"}
        return {"index": index, **sample}


def _shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


class ShardNote(TypedDict):
    """What the note of a shard has."""

    settings: dict[str, Any]
    num_samples: Count
    latent_shape: list[int] | None
    sha256: Sha256
    bad_images: list[BadImage]
    note_sha256: Sha256


def read_note(folder: Path, shard: int) -> dict[str, Any] | None:
    """Reads the note of `shard` in `folder`; `None` if the shard is missing, or its note is missing or damaged."""
    path = _shard_path(folder, shard)
    note = find_record(path.with_suffix(".json"), ShardNote) if path.exists() else None
    return note if note is not None and note.pop("note_sha256") == _hash_note(note) else None


def _hash_note(note: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(note, sort_keys=True).encode()).hexdigest()


def _is_done(folder: Path, shard: int, settings: dict[str, Any], on_bad_image: str) -> bool:
    """
    Whether a shard was written with the same settings; raises a `ValueError` if it was written with others.

    If bad images are an error, a shard with bad images counts as not done, so that they are tried again.
    """
    note = read_note(folder, shard)
    if note is None:
        return False
    check_settings(folder, note["settings"], settings)
    return on_bad_image == "skip" or not note["bad_images"]


@torch.no_grad()
def encode_latents(
    images: LabelledImages,
    vae: Autoencoder | None,
    folder: Path,
    options: EncodingOptions | None = None,
    share: Share | None = None,
    vision: VisionFeatures | None = None,
) -> None:
    """
    Writes one process's share of the shards, except for shards that exist already.

    Args:
        images ([`LabelledImages`]): The images.
        vae ([`Autoencoder`] or `None`): The autoencoder; without one the latents are the pixels.
        folder (`Path`): Folder of the shards.
        options ([`EncodingOptions`], *optional*): Settings of the encoding; the defaults if not given. Images that
            cannot be read are left out and noted; if they are an error, the next call tries them again.
        share ([`Share`], *optional*): The process's share of the shards; all of them if not given.
        vision ([`VisionFeatures`], *optional*): A vision model whose features of the images are stored too.

    Raises:
        `ValueError`: an option is out of range, the folder has shards with other settings, latents are too large for
            `latents_dtype`, or features for float16.
    """
    options, share = options or EncodingOptions(), share or Share()
    check_options(options)
    shard_size, batch_size = options.shard_size, options.encoding_batch_size
    make_folder(folder)
    settings = {**latent_settings(images, vae, options, vision), "shard_size": shard_size}
    device = next(vae.parameters()).device if vae is not None else torch.device("cpu")
    dtype = DTYPES[options.latents_dtype]
    num_images = len(images.dataset)
    shards = range(share.process_index, -(-num_images // shard_size), share.num_processes)
    todo = [shard for shard in shards if not _is_done(folder, shard, settings, options.on_bad_image)]
    batches = [
        list(range(start, min(start + batch_size, (shard + 1) * shard_size, num_images)))
        for shard in todo
        for start in range(shard * shard_size, min((shard + 1) * shard_size, num_images), batch_size)
    ]
    loader = iter(
        DataLoader(
            _Readable(images),
            batch_sampler=batches,
            num_workers=options.dataloader_num_workers or 0,
            collate_fn=list,
        )
    )
    progress = tqdm(
        total=sum(map(len, batches)), desc="Encoding images", disable=True if share.process_index else None
    )
    for shard in todo:
        parts: dict[str, list[torch.Tensor]] = {"mean": [], "std": [], "labels": [], "features": []}
        bad = []
        for _ in range(-(-min(shard_size, num_images - shard * shard_size) // batch_size)):
            rows = next(loader)
            progress.update(len(rows))
            bad += [{"index": row["index"], "reason": row["reason"]} for row in rows if "reason" in row]
            rows = [row for row in rows if "reason" not in row]
            if not rows:
                continue
            pixels = to_pixels(torch.from_numpy(np.stack([row["image"] for row in rows]))).to(device)
            views = [pixels, pixels.flip(-1)] if options.random_flip else [pixels]
            means, stds = zip(*(encode_moments(view, vae) for view in views), strict=True)
            parts["mean"].append(torch.stack(means, dim=1).to(dtype).cpu())  # (B, views, C, h, w)
            if stds[0] is not None:
                parts["std"].append(torch.stack(stds, dim=1).to(dtype).cpu())
            parts["labels"].append(torch.tensor([int(row["label"]) for row in rows]))
            if vision is not None:  # (B, views, rows, columns, D)
                parts["features"].append(torch.stack([vision(view).half() for view in views], dim=1).cpu())
        tensors = {name: torch.cat(chunks) for name, chunks in parts.items() if chunks}
        nonfinite = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
        if nonfinite == ["features"]:
            raise ValueError("`vision` must give features that float16 can hold, got some that are not finite in it.")
        if nonfinite:
            raise ValueError(
                f"`latents_dtype` must hold the latents, got {options.latents_dtype!r}, in which some are not finite."
            )
        path = _shard_path(folder, shard)
        path.with_suffix(".json").unlink(missing_ok=True)
        with replacing(path) as unfinished:
            save_file(tensors, unfinished)
        for entry in bad:
            entry["path"] = images.path_of(entry["index"])
        note = {
            "settings": settings,
            "num_samples": len(tensors["labels"]) if tensors else 0,
            "latent_shape": list(tensors["mean"].shape[2:]) if tensors else None,
            "sha256": file_sha256(path),
            "bad_images": bad,
        }
        write_json(path.with_suffix(".json"), {**note, "note_sha256": _hash_note(note)})
    progress.close()


def finish_latents(folder: Path, settings: dict[str, Any], on_bad_image: str = "error") -> dict[str, Any]:
    """
    Writes the manifest once all shards are there.

    Args:
        folder (`Path`): Folder of the shards.
        settings (`dict`): Settings from [`latent_settings`].
        on_bad_image (`str`, defaults to `"error"`):
            `"error"` refuses data with images that could not be read. `"skip"` leaves them out and counts them.

    Returns:
        `dict`: The manifest.

    Raises:
        `ValueError`: a shard is missing or has other settings, or no image could be read. It is a [`BadImagesError`]
            if some images could not be read.
    """
    check_choice("on_bad_image", on_bad_image, ON_BAD_IMAGE)
    first = read_note(folder, 0)
    shard_size = SHARD_SIZE if first is None else first["settings"]["shard_size"]
    num_shards = -(-settings["num_images"] // shard_size)
    notes = [read_note(folder, shard) for shard in range(num_shards)]
    if None in notes:
        missing = [_shard_path(folder, shard).name for shard, note in enumerate(notes) if note is None]
        raise ValueError(
            f"{folder} must hold {num_shards} shards, got {num_shards - len(missing)}, without "
            f"{', '.join(missing[:5])}: encode the rest first."
        )
    for note in notes:
        check_settings(folder, note["settings"], {**settings, "shard_size": shard_size})
    bad = [entry for note in notes for entry in note["bad_images"]]
    check_bad_images(bad, on_bad_image)
    num_samples = sum(note["num_samples"] for note in notes)
    if num_samples == 0:
        raise ValueError(f"{folder} must hold at least one image, got none of {settings['num_images']}.")
    manifest = {
        "format": SHARD_FORMAT,
        **settings,
        "num_samples": num_samples,
        "num_views": 2 if settings["random_flip"] else 1,
        "latent_shape": next(note["latent_shape"] for note in notes if note["latent_shape"] is not None),
        "bad_images": bad,
        "shards": [
            {"file": _shard_path(folder, shard).name, "num_samples": note["num_samples"], "sha256": note["sha256"]}
            for shard, note in enumerate(notes)
        ],
    }
    write_json(folder / SHARD_MANIFEST, manifest)
    return manifest
