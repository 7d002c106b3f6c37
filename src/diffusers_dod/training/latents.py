# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Latents of a picture data set, on disk: safetensors shards and a manifest that says what they are.

    folder/manifest.json          what the latents depend on, the classes, the shards and their hashes
    folder/shard-00000.safetensors   `mean` and, unless the autoencoder is deterministic, `std` (n, views, C, h, w) of
                                     the normalised posterior, and `labels` (n,); if wanted `features` (n, views,
                                     rows, columns, D) of a vision model, in float16
    folder/shard-00000.json       written after its shard: what a run that was stopped need not do again

A shard holds the pictures of a fixed range of indices, so that any number of processes write the same files. View 0 is
the picture, view 1 its mirror image. Shards are mapped into memory: a sample is read when it is asked for.
"""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..autoencoders import Autoencoder, encode_moments
from ..checks import check_choice
from ..evaluation.results import file_sha256
from .data import Pictures, to_pixels


if TYPE_CHECKING:
    from .alignment import VisionFeatures

MANIFEST = "manifest.json"
FORMAT = 1
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ON_BAD_IMAGE = ("error", "skip")
SHARD_SIZE = 4096
TRANSFORM = "ADM centre crop"


class BadImagesError(ValueError):
    """
    Pictures that could not be read.

    Args:
        bad (`list[dict]`): The `index`, the `path` and the `reason` of each.
    """

    def __init__(self, bad: list[dict[str, Any]]):
        shown = "; ".join(f"{entry['path']}: {entry['reason']}" for entry in bad[:20])
        more = f"; and {len(bad) - 20} more" if len(bad) > 20 else ""
        super().__init__(
            f"{len(bad)} pictures cannot be read: {shown}{more}. Repair or remove them, or leave them out with "
            "`on_bad_image` = 'skip'."
        )
        self.bad = bad


def sha256_of_weights(weights: dict[str, torch.Tensor]) -> str:
    """The SHA-256 of names and fp32 values of `weights`, the state of a model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode() + tensor.cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def describe_autoencoder(vae: Autoencoder | None) -> dict[str, str] | None:
    """What identifies an autoencoder: the class of `vae` and hashes of its config and its weights."""
    if vae is None:
        return None
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    return {
        "class_name": type(vae).__name__,
        "config_sha256": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
        "weights_sha256": sha256_of_weights(vae.state_dict()),
    }


def latent_settings(
    pictures: Pictures,
    vae: Autoencoder | None,
    random_flip: bool,
    latents_dtype: str = "float32",
    vision: "VisionFeatures | None" = None,
) -> dict[str, Any]:
    """
    What latents depend on, as their manifest states it.

    Args:
        pictures ([`Pictures`]): The pictures.
        vae ([`Autoencoder`] or `None`): The autoencoder; without one the latents are the pixels.
        random_flip (`bool`): Whether the mirror images are encoded too.
        latents_dtype (`str`, defaults to `"float32"`): `"float32"`, `"float16"` or `"bfloat16"`, on disk.
        vision ([`VisionFeatures`], *optional*): The vision model whose features are stored too.

    Returns:
        `dict`: The settings, which JSON can hold.
    """
    check_choice("latents_dtype", latents_dtype, tuple(DTYPES))
    settings = {
        "pictures": pictures.fingerprint,
        "num_pictures": len(pictures.dataset),
        "class_names": list(pictures.class_names),
        "transform": TRANSFORM,
        "resolution": pictures.resolution,
        "random_flip": random_flip,
        "autoencoder": describe_autoencoder(vae),
        "latents_dtype": latents_dtype,
    }
    return settings if vision is None else {**settings, "vision_model": vision.describe()}


class _Readable(Dataset):
    """A picture data set that gives the reason of what cannot be read in place of it."""

    def __init__(self, pictures: Pictures):
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            sample = self.pictures.dataset[index]
        except MemoryError:
            raise
        except Exception as error:  # of whatever reads the file
            return {"index": index, "reason": f"{type(error).__name__}: {error}"}
        num_classes = len(self.pictures.class_names)
        if not 0 <= int(sample["label"]) < num_classes:
            return {"index": index, "reason": f"its label is {sample['label']}, not in [0, {num_classes - 1}]"}
        return {"index": index, **sample}


def _shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


def _publish(path: Path, write: Callable[[Path], None]) -> None:
    """Writes a file that is there as a whole or not at all, readable for whom the process's other files are."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    write(unfinished)
    umask = os.umask(0)
    os.umask(umask)
    unfinished.chmod(0o666 & ~umask)
    os.replace(unfinished, path)


def _write_json(path: Path, content: Any) -> None:
    _publish(path, lambda unfinished: unfinished.write_text(json.dumps(content, indent=2) + "\n"))


def _read_note(folder: Path, shard: int) -> dict[str, Any] | None:
    """What was noted of a shard, `None` unless both are there."""
    path = _shard_path(folder, shard)
    note = path.with_suffix(".json")
    return json.loads(note.read_text()) if note.exists() and path.exists() else None


def _is_done(folder: Path, shard: int, settings: dict[str, Any], on_bad_image: str) -> bool:
    """
    Whether a shard was written under the same settings; raises a `ValueError` if under others. Where bad pictures are
    an error, they are tried again.
    """
    note = _read_note(folder, shard)
    if note is None:
        return False
    check_settings(folder, note["settings"], settings)
    return on_bad_image == "skip" or not note["bad_images"]


def _describe_difference(found: Any, expected: Any) -> tuple[str, str]:
    if isinstance(found, list) and isinstance(expected, list):
        index = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), None)
        index = min(len(found), len(expected)) if index is None else index
        return tuple(f"{len(values)} with {values[index : index + 1]} at {index}" for values in (found, expected))
    return repr(found), repr(expected)


def check_settings(folder: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """
    Raises unless latents were made as they should have been.

    Args:
        folder (`Path`): Where they are.
        found (`dict`): Their settings.
        expected (`dict`): What [`latent_settings`] gives.

    Raises:
        `ValueError`: a field differs; the message names it.
    """
    for name, value in expected.items():
        if found.get(name) != value:
            received, wanted = _describe_difference(found.get(name), value)
            raise ValueError(
                f"{folder} must hold latents with `{name}` = {wanted}, got {received}: remove it, or use another "
                "folder."
            )


@torch.no_grad()
def encode_latents(
    pictures: Pictures,
    vae: Autoencoder | None,
    folder: Path,
    random_flip: bool,
    batch_size: int = 64,
    num_workers: int = 0,
    latents_dtype: str = "float32",
    shard_size: int = SHARD_SIZE,
    on_bad_image: str = "error",
    process_index: int = 0,
    num_processes: int = 1,
    vision: "VisionFeatures | None" = None,
) -> None:
    """
    Writes the shards that fall to one process, but for those that are there already.

    Args:
        pictures ([`Pictures`]): The pictures.
        vae ([`Autoencoder`] or `None`): The autoencoder; without one the latents are the pixels.
        folder (`Path`): Where the shards go.
        random_flip (`bool`): Whether to encode the mirror images too.
        batch_size (`int`, defaults to 64): Pictures per pass of the autoencoder.
        num_workers (`int`, defaults to 0): Processes that read pictures; 0 reads them in this one.
        latents_dtype (`str`, defaults to `"float32"`): See [`latent_settings`].
        shard_size (`int`, defaults to 4096): Pictures per shard.
        on_bad_image (`str`, defaults to `"error"`):
            Pictures that cannot be read are left out and noted; with `"error"` the next call tries them again.
        process_index (`int`, defaults to 0): Which process this is; it writes every `num_processes`-th shard.
        num_processes (`int`, defaults to 1): Number of processes.
        vision ([`VisionFeatures`], *optional*): A vision model whose features of the pictures are stored too.

    Raises:
        `ValueError`: the folder has shards with other settings, latents are too large for `latents_dtype`, or features
            for float16.
    """
    check_choice("on_bad_image", on_bad_image, ON_BAD_IMAGE)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {**latent_settings(pictures, vae, random_flip, latents_dtype, vision), "shard_size": shard_size}
    device = next(vae.parameters()).device if vae is not None else torch.device("cpu")
    dtype = DTYPES[latents_dtype]
    num_pictures = len(pictures.dataset)
    shards = range(process_index, -(-num_pictures // shard_size), num_processes)
    todo = [shard for shard in shards if not _is_done(folder, shard, settings, on_bad_image)]
    batches = [
        list(range(start, min(start + batch_size, (shard + 1) * shard_size, num_pictures)))
        for shard in todo
        for start in range(shard * shard_size, min((shard + 1) * shard_size, num_pictures), batch_size)
    ]
    loader = iter(DataLoader(_Readable(pictures), batch_sampler=batches, num_workers=num_workers, collate_fn=list))
    progress = tqdm(total=sum(map(len, batches)), desc="Encoding pictures", disable=process_index > 0)
    for shard in todo:
        parts: dict[str, list[torch.Tensor]] = {"mean": [], "std": [], "labels": [], "features": []}
        bad = []
        for _ in range(-(-min(shard_size, num_pictures - shard * shard_size) // batch_size)):
            rows = next(loader)
            progress.update(len(rows))
            bad += [{"index": row["index"], "reason": row["reason"]} for row in rows if "reason" in row]
            rows = [row for row in rows if "reason" not in row]
            if not rows:
                continue
            pixels = to_pixels(torch.from_numpy(np.stack([row["image"] for row in rows]))).to(device)
            views = [pixels, pixels.flip(-1)] if random_flip else [pixels]
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
                f"`latents_dtype` must hold the latents, got {latents_dtype!r}, in which some are not finite."
            )
        path = _shard_path(folder, shard)
        path.with_suffix(".json").unlink(missing_ok=True)
        _publish(path, lambda unfinished, tensors=tensors: save_file(tensors, unfinished))
        for entry in bad:
            entry["path"] = pictures.path_of(entry["index"])
        note = {
            "settings": settings,
            "num_samples": len(tensors["labels"]) if tensors else 0,
            "latent_shape": list(tensors["mean"].shape[2:]) if tensors else None,
            "sha256": file_sha256(path),
            "bad_images": bad,
        }
        _write_json(path.with_suffix(".json"), note)
    progress.close()


def finish_latents(folder: Path, settings: dict[str, Any], on_bad_image: str = "error") -> dict[str, Any]:
    """
    Writes the manifest once all shards are there.

    Args:
        folder (`Path`): Where the shards are.
        settings (`dict`): What [`latent_settings`] gives.
        on_bad_image (`str`, defaults to `"error"`):
            `"error"` refuses data with pictures that could not be read, `"skip"` leaves them out and counts them.

    Returns:
        `dict`: The manifest.

    Raises:
        `ValueError`: a shard is missing or has other settings, no picture could be read, or, as a [`BadImagesError`],
            some could not.
    """
    check_choice("on_bad_image", on_bad_image, ON_BAD_IMAGE)
    first = _read_note(folder, 0)
    shard_size = SHARD_SIZE if first is None else first["settings"]["shard_size"]
    num_shards = -(-settings["num_pictures"] // shard_size)
    notes = [_read_note(folder, shard) for shard in range(num_shards)]
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
        raise ValueError(f"{folder} must hold at least one picture, got none of {settings['num_pictures']}.")
    manifest = {
        "format": FORMAT,
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
    _write_json(folder / MANIFEST, manifest)
    return manifest


def check_bad_images(bad: list[dict[str, Any]], on_bad_image: str) -> None:
    """Raises a `BadImagesError` if there are `bad` pictures and `on_bad_image` is `"error"`."""
    if bad and on_bad_image == "error":
        raise BadImagesError(bad)


def is_complete(folder: Path) -> bool:
    """Whether `folder` has a manifest and all of its shards."""
    if not (folder / MANIFEST).exists():
        return False
    shards = json.loads((folder / MANIFEST).read_text())["shards"]
    return all((folder / shard["file"]).is_file() for shard in shards)


def find_damaged_shards(folder: Path) -> list[str]:
    """Names of the shards in `folder` that are missing or do not have the hash of the manifest."""
    shards = json.loads((folder / MANIFEST).read_text())["shards"]
    return [
        shard["file"]
        for shard in shards
        if not (folder / shard["file"]).is_file() or file_sha256(folder / shard["file"]) != shard["sha256"]
    ]


class Latents(ABC):
    """
    Latents of a picture data set, in whatever files they are.

    Args:
        folder (`Path`): Where they are.
        manifest (`dict`): What they are, with at least `num_views`, `latent_shape`, `class_names` and `bad_images`.
        labels (`torch.Tensor` of shape `(n,)`): Class ids.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], labels: torch.Tensor):
        self.folder = Path(folder)
        #: What the manifest says.
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
        """Shape (C, h, w) of the latents; of those in buckets that of a square, whether or not there are any."""
        return tuple(self.manifest["latent_shape"])

    @abstractmethod
    def read(self, index: int, view: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        The normalised posterior of a picture.

        Args:
            index (`int`): Which picture, in [0, n - 1].
            view (`int`, defaults to 0): 1 is its mirror image.

        Returns:
            `tuple[torch.Tensor, torch.Tensor | None]`: Mean and standard deviation (C, h, w) in fp32, of the bucket's
            shape where there are buckets; the second is `None` without a deviation.
        """

    def read_features(self, index: int, view: int = 0) -> torch.Tensor | None:
        """
        The features of a picture.

        Args:
            index (`int`): Which picture, in [0, n - 1].
            view (`int`, defaults to 0): 1 is its mirror image.

        Returns:
            `torch.Tensor` of shape `(rows, columns, D)` in fp32, or `None` where no vision model was given.
        """
        return None


class MappedShards:
    """
    Safetensors files of pictures in a row, mapped into memory, in each process when they are needed.

    Args:
        paths (`Sequence[Path]`): The files.
        latents (`str`): Name of the tensor (n, ...) that each must hold beside its `labels` (n,), n >= 1.

    Raises:
        `ValueError`: a file is damaged, or does not hold them.
    """

    def __init__(self, paths: Sequence[Path], latents: str):
        self.paths = list(paths)
        self._needed = {latents, "labels"}
        self._slices: dict[int, dict[str, Any]] = {}
        labels = [self.open(shard)["labels"] for shard in range(len(self.paths))]
        self._starts = np.cumsum([0, *map(len, labels)])
        #: Class ids, (n,).
        self.labels = torch.cat(labels)
        self._slices.clear()

    def open(self, shard: int) -> dict[str, Any]:
        """
        Opens a shard.

        Args:
            shard (`int`): Which one, in the order of the paths.

        Returns:
            `dict`: Its `labels` (n,), and slices of its other tensors, by name.

        Raises:
            `ValueError`: the file is damaged, or does not hold what it must.
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
        """The shard of the picture `index`, opened, and its row there."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.open(shard), index - int(self._starts[shard])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_slices": {}}  # open files stay with their process


class LatentDataset(Latents):
    """
    The latents that [`encode_latents`] and [`finish_latents`] wrote.

    Args:
        folder (`Path`): Where they are.

    Raises:
        `ValueError`: there is no manifest, it is of another format, or a shard is missing.
    """

    def __init__(self, folder: Path):
        folder = Path(folder)
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} must hold latents, with a {MANIFEST}, got none: {error}") from error
        if manifest.get("format") != FORMAT:
            raise ValueError(f"{folder} must hold latents of format {FORMAT}, got {manifest.get('format')}.")
        shards = manifest["shards"]
        missing = [shard["file"] for shard in shards if not (folder / shard["file"]).is_file()]
        if missing:
            raise ValueError(f"{folder} must hold all shards of its {MANIFEST}, got it without {missing}.")
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


def pictures_of(latents: LatentDataset, pictures: Pictures) -> np.ndarray:
    """
    Which picture each of the latents is of: pictures that could not be read are left out of them.

    Args:
        latents ([`LatentDataset`]): The latents.
        pictures ([`Pictures`]): The pictures that they were made of.

    Returns:
        `np.ndarray` of shape `(n,)`: Indices into `pictures.dataset`, in ascending order.

    Raises:
        `ValueError`: the latents were made of other pictures.
    """
    expected = {
        "pictures": pictures.fingerprint,
        "num_pictures": len(pictures.dataset),
        "transform": TRANSFORM,
        "resolution": pictures.resolution,
    }
    check_settings(latents.folder, latents.manifest, expected)
    bad = [entry["index"] for entry in latents.manifest["bad_images"]]
    return np.delete(np.arange(len(pictures.dataset)), bad)
