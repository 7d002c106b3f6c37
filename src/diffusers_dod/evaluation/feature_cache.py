# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Features of images in files, for other calls with the same images and extractor."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch

from ..data.labelled_images import TRANSFORM
from ..files import file_sha256, replacing, write_json
from ..metrics.extractors import ImageFeatures
from ..records import Sha256, read_record
from ..results import describe_versions
from .images import ImageSource


RECORD = "settings.json"
LABELS = "labels"
NAMES = {LABELS, *(output.name for output in fields(ImageFeatures))}  # of files, without suffix
_PACKAGE = Path(__file__).parents[1]
CODE = [*sorted((_PACKAGE / "metrics").glob("*.py")), _PACKAGE / "vision_features.py", _PACKAGE / "image_reading.py"]
VERSIONS = ("torch", "transformers", "Pillow", "device")

# Outputs of the extractor by name, and class ids if there are any, of some images.
Rows = tuple[dict[str, np.ndarray], np.ndarray | None]


class CachedFeatures(TypedDict):
    """The record of an entry of the cache."""

    settings: dict[str, Any]
    files: dict[str, Sha256]


class FeatureCache:
    """
    A folder of features, each entry of which is found by the hash of what it depends on.

    That is the contents of the images, the extractor, the batch size, the device, the code of this package's metrics,
    and the versions of PyTorch, `transformers` and Pillow. Versions of other packages do not count.

    Args:
        folder (`Path`): The folder.
        extractor (`str`): Text that differs for other extractors, such as [`extractor_sha256`] and [`code_sha256`].
    """

    def __init__(self, folder: Path, extractor: str):
        self.folder = folder
        self.extractor = extractor

    def settings(
        self, images: ImageSource, num_images: int, batch_size: int, device: torch.device | str
    ) -> dict[str, Any]:
        """
        Lists all that the features of images depend on.

        Args:
            images ([`ImageSource`]): The images.
            num_images (`int`): Number of images that are drawn of them.
            batch_size (`int`): Images at a time.
            device (`torch.device` or `str`): Device of the extractor.

        Returns:
            `dict`: Settings for [`FeatureCache.open`] and [`FeatureCache.writing`].
        """
        versions = describe_versions(device)
        labels = None if images.labels is None else hashlib.sha256(np.int64(images.labels).tobytes()).hexdigest()
        return {
            "images": {name: value for name, value in images.data.items() if name not in ("name", "manifest")},
            "labels_sha256": labels,
            "kind": type(images).__name__,
            "transform": TRANSFORM,
            "num_drawn": num_images,
            "extractor": self.extractor,
            "batch_size": batch_size,
            "code": file_sha256(*CODE),
            **{name: versions.get(name) for name in VERSIONS},
        }

    def _path(self, settings: dict[str, Any]) -> Path:
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        return self.folder / f"features-{key[:32]}"

    def open(self, settings: dict[str, Any]) -> Iterator[Rows] | None:
        """
        Opens an entry.

        Args:
            settings (`dict`): What it depends on, from [`FeatureCache.settings`].

        Returns:
            `Iterator` of the rows of a batch at a time; `None` if there is no such entry.

        Raises:
            `ValueError`: the entry is damaged.
        """
        path = self._path(settings)
        if not path.exists():
            return None
        record = read_record(path / RECORD, CachedFeatures)
        names = set(record["files"])
        fits = record["settings"] == json.loads(json.dumps(settings)) and {"features"} <= names <= NAMES
        if not fits or any(file_sha256(path / f"{name}.npy") != found for name, found in record["files"].items()):
            raise ValueError(f"`cache_dir` must hold undamaged features, got others in {path}: remove it.")
        arrays = {name: np.load(path / f"{name}.npy", mmap_mode="r") for name in sorted(names)}
        return self._read(arrays, settings["batch_size"])

    @staticmethod
    def _read(arrays: dict[str, np.ndarray], batch_size: int) -> Iterator[Rows]:
        labels = arrays.pop(LABELS, None)
        for start in range(0, len(arrays["features"]), batch_size):
            now = slice(start, start + batch_size)
            rows = {name: np.array(array[now]) for name, array in arrays.items()}
            yield rows, None if labels is None else np.array(labels[now])

    @contextmanager
    def writing(self, settings: dict[str, Any]) -> Iterator[Callable[[Rows], None]]:
        """
        Context that writes an entry, which is there as soon as the context ends without an error.

        Args:
            settings (`dict`): What it depends on, from [`FeatureCache.settings`].

        Returns:
            `Callable`: A function that adds the rows of the next images.
        """
        path = self._path(settings)
        with replacing(path) as unfinished:
            unfinished.mkdir()
            files: dict[str, Any] = {}
            with ExitStack() as stack:

                def add(rows: Rows) -> None:
                    arrays = rows[0] if rows[1] is None else {**rows[0], LABELS: rows[1]}
                    for name, values in arrays.items():
                        if name not in files:
                            files[name] = stack.enter_context(open(unfinished / f"{name}.npy", "wb"))
                            shape = (settings["num_drawn"], *values.shape[1:])
                            header = {"descr": values.dtype.str, "fortran_order": False, "shape": shape}
                            np.lib.format.write_array_header_1_0(files[name], header)
                        files[name].write(values.tobytes())

                yield add
            hashes = {name: file_sha256(unfinished / f"{name}.npy") for name in files}
            write_json(unfinished / RECORD, {"settings": settings, "files": hashes})
