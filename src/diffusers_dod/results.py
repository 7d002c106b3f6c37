# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Results as JSON files: each has its numbers, checkpoint, data, settings, versions and command.

    {"format": 2, "task": "evaluate", "argv": [...], "checkpoint": {"path": ..., "sha256": ...}, "data": {...},
     "settings": {...}, "versions": {...}, "metrics": {"fid": {"value": 4.2, "interval": [4.0, 4.5]}},
     "sha256": ...}

The hash is that of all other entries. Files of format 1 have none.
"""

import hashlib
import json
import math
import os
import platform
import subprocess
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from numbers import Real
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import torch
from huggingface_hub import snapshot_download

from .checks import check_type
from .files import file_sha256, folder_sha256, write_json
from .lora import find_lora_file
from .records import Count, Sha256, one_of, read_record
from .shipped import find_shipped


RESULTS_FORMAT = 2
PACKAGES = ("diffusers-dod", "torch", "diffusers", "transformers", "accelerate", "numpy", "scipy", "Pillow")
PACKAGES += ("scikit-image",)  # where it is installed


def find_checkpoint(path: str | os.PathLike) -> Path:
    """
    Finds the folder of a saved pipeline; one on the Hub is downloaded whole, if it is not in the cache.

    Args:
        path (`str` or `os.PathLike`): A folder, or a repository on the Hub.

    Returns:
        `Path`: The folder.

    Raises:
        `ValueError`: there is no pipeline.
        `OSError`: the repository cannot be reached.
    """
    path = find_shipped(os.fspath(path))
    folder = Path(path) if Path(path).is_dir() else Path(snapshot_download(path))
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"`path` must hold a pipeline, with a model_index.json, got {path!r}.")
    return folder


def checkpoint_sha256(path: str | os.PathLike) -> str:
    """
    Hash of a saved pipeline: of its configs and weights, and of nothing else in its folder.

    Args:
        path (`str` or `os.PathLike`): A folder, or a repository on the Hub.

    Returns:
        `str`: A SHA-256.

    Raises:
        `ValueError`, `OSError`: see [`find_checkpoint`].
    """
    folder = find_checkpoint(path)
    index = folder / "model_index.json"
    components = [name for name, value in read_record(index, dict[str, Any]).items() if isinstance(value, list)]
    files = [index] + [file for name in components for file in (folder / name).rglob("*") if file.is_file()]
    return folder_sha256(folder, sorted(files))


class LoraIdentity(TypedDict):
    """The LoRA adapters that a pipeline has."""

    path: str
    sha256: Sha256


class CheckpointIdentity(TypedDict):
    """The pipeline that results are of."""

    path: str
    sha256: Sha256
    lora_weights: NotRequired[LoraIdentity]


def identify_checkpoint(path: str | os.PathLike, lora_weights: str | os.PathLike | None = None) -> CheckpointIdentity:
    """
    Finds out which pipeline a path is, and which LoRA adapters it has.

    Args:
        path (`str` or `os.PathLike`): A folder, or a repository on the Hub.
        lora_weights (`str` or `os.PathLike`, *optional*): The adapters, see [`find_lora_file`].

    Returns:
        [`CheckpointIdentity`].

    Raises:
        `ValueError`, `OSError`: there is no pipeline, or there are no adapters.
    """
    identity: CheckpointIdentity = {"path": str(path), "sha256": checkpoint_sha256(path)}
    if lora_weights is not None:
        identity["lora_weights"] = {"path": str(lora_weights), "sha256": lora_sha256(lora_weights)}
    return identity


def lora_sha256(lora_weights: str | os.PathLike) -> str:
    """Hash of the file of LoRA adapters, see [`find_lora_file`], of which `lora_weights` is the place."""
    return file_sha256(find_lora_file(lora_weights))


def check_same_checkpoint(wanted: CheckpointIdentity, found: CheckpointIdentity, which: str) -> None:
    """
    Raises unless two pipelines are the same, adapters included, wherever they lie.

    Args:
        wanted ([`CheckpointIdentity`]): The wanted one.
        found ([`CheckpointIdentity`]): The other one.
        which (`str`): What the wanted one is, for the message.

    Raises:
        `ValueError`: they differ.
    """
    pairs = {"checkpoint": (wanted, found), "lora_weights": [one.get("lora_weights") for one in (wanted, found)]}
    for name, pair in pairs.items():
        expected, received = (part and part["sha256"] for part in pair)
        if expected != received:
            place = "" if pair[1] is None else f" in {pair[1]['path']}"
            raise ValueError(f"`{name}` must be {which}, of SHA-256 {expected}, got {received}{place}.")


@lru_cache  # it reads files, and samples ask for each chunk
def _find_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@lru_cache
def git_commit() -> str | None:
    """Commit of the package's source tree, with `-dirty` if it has changes; `None` if it is no checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # it may be installed within the checkout of something else
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def describe_versions(device: torch.device | str) -> dict[str, str | None]:
    """Versions of the software, and the kind of the `device`."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "python": platform.python_version(),
        **{package: found for package in PACKAGES if (found := _find_version(package)) is not None},
        "git_commit": git_commit(),
        "device": name,
        "num_threads": str(torch.get_num_threads()),
    }


def as_metric(value: float, interval: tuple[float, float] | None = None, **details: Any) -> dict[str, Any]:
    """
    Puts a number and its interval into the form of results.

    Args:
        value (`float`): The number.
        interval (`tuple[float, float]`, *optional*): The 95 % confidence interval.
        details (`Any`): Further entries, which JSON must be able to hold.

    Returns:
        `dict`: The entries `value` and `interval`, and the details.

    Raises:
        `TypeError`: the number is none.
        `ValueError`: the number or an end of the interval is not finite.
    """
    check_type("value", value, Real)
    if not math.isfinite(value):
        raise ValueError(f"`value` must be finite, got {value}.")
    if interval is not None and not all(math.isfinite(end) for end in interval):
        raise ValueError(f"`interval` must be finite, got {interval}.")
    return {
        "value": float(value),
        "interval": None if interval is None else [float(end) for end in interval],
        **details,
    }


def half_width(metric: dict[str, Any]) -> float:
    """Length of the longer side of the interval around the number of `metric`, an [`as_metric`]."""
    return 0.0 if metric["interval"] is None else max(abs(end - metric["value"]) for end in metric["interval"])


def write_results(
    path: Path,
    task: str,
    argv: list[str],
    metrics: dict[str, dict[str, Any]],
    data: dict[str, Any],
    settings: dict[str, Any],
    device: torch.device | str,
    checkpoint: str | os.PathLike | CheckpointIdentity | None = None,
) -> dict[str, Any]:
    """
    Writes a result atomically.

    Args:
        path (`Path`): The JSON file.
        task (`str`): Name of the module in `diffusers_dod.evaluation` whose `main(argv)` computes it.
        argv (`list[str]`): The arguments of that `main`.
        metrics (`dict[str, dict]`): An [`as_metric`] for each number, by name.
        data (`dict`): Identity of the data.
        settings (`dict`): All other settings that the numbers depend on.
        device (`torch.device` or `str`): The device that computed the numbers.
        checkpoint (`str`, `os.PathLike` or `dict`, *optional*):
            The pipeline; or its identity, as in a manifest of samples.

    Returns:
        `dict`: The content of the file.

    Raises:
        `TypeError`, `ValueError`: JSON cannot hold an entry, or a number is not finite.
        `OSError`: the file cannot be written, or the checkpoint cannot be reached.
    """
    if checkpoint is not None and not isinstance(checkpoint, dict):
        checkpoint = identify_checkpoint(checkpoint)
    results = {
        "format": RESULTS_FORMAT,
        "task": task,
        "argv": argv,
        "checkpoint": checkpoint,
        "data": data,
        "settings": settings,
        "versions": describe_versions(device),
        "metrics": metrics,
    }
    results["sha256"] = _hash_content(results)
    write_json(Path(path), results)
    return results


class Metric(TypedDict):
    """A number in results, see [`as_metric`]."""

    value: float
    interval: list[float] | None


class SampledSettings(TypedDict):
    """What the settings of samples have; see `evaluation.sample`."""

    stage: Count


class SampledBy(TypedDict):
    """How samples were drawn, if a command of this package drew them."""

    argv: NotRequired[list[str]]
    settings: NotRequired[SampledSettings]


class SamplesIdentity(TypedDict):
    """The samples that results are of; a manifest may lie beside them."""

    manifest: NotRequired[SampledBy | None]


class ResultsData(TypedDict):
    """The data that results are of."""

    samples: NotRequired[SamplesIdentity]


class Results(TypedDict):
    """What a file of results has."""

    format: Annotated[int, one_of(1, RESULTS_FORMAT)]
    task: str
    argv: list[str]
    metrics: dict[str, Metric]
    checkpoint: NotRequired[CheckpointIdentity | None]
    data: ResultsData
    settings: dict
    versions: NotRequired[dict[str, str | None]]
    sha256: NotRequired[Sha256]


def _hash_content(results: dict[str, Any]) -> str:
    content = {name: value for name, value in results.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def read_results(path: Path) -> dict[str, Any]:
    """
    Reads a file of [`write_results`].

    Args:
        path (`Path`): The JSON file.

    Returns:
        `dict`: The content of the file.

    Raises:
        `ValueError`: it is not a file of results, or it has changed since it was written.
    """
    try:
        results = read_record(Path(path), Results)
    except (OSError, ValueError) as error:
        raise ValueError(f"`path` must be a file of results: {error}") from error
    if results["format"] > 1 and results.get("sha256") != _hash_content(results):
        raise ValueError(f"`path` must be a file of results as it was written, got {path} with another hash.")
    return results
