# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Numbers with what they are of: every result is a JSON file that names checkpoint, data, settings, versions and command.

    {"format": 1, "task": "evaluate", "argv": [...], "checkpoint": {"path": ..., "sha256": ...}, "data": {...},
     "settings": {...}, "versions": {...}, "metrics": {"fid": {"value": 4.2, "interval": [4.0, 4.5]}}}
"""

import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from tqdm.auto import tqdm


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FORMAT = 1
PACKAGES = ("diffusers-dod", "torch", "diffusers", "transformers", "accelerate", "numpy", "scipy", "Pillow")
PACKAGES += ("scikit-image", "torch-fidelity", "torchvision")  # where they are installed
UNFINISHED = ".unfinished"


def file_sha256(*paths: Path) -> str:
    """The SHA-256 of the bytes of the files at `paths`, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def folder_sha256(folder: Path, files: Iterable[Path] | None = None) -> str:
    """
    A hash of names and contents of the files in a folder, wherever it lies and whenever they were written.

    Args:
        folder (`Path`): The folder.
        files (`Iterable[Path]`, *optional*): Some of its files, in order; all but hidden ones if not given.

    Returns:
        `str`: A SHA-256.
    """
    if files is None:
        found = sorted(path for path in folder.rglob("*") if path.is_file())
        found = [path for path in found if not any(part[0] == "." for part in path.relative_to(folder).parts)]
        files = tqdm(found, desc=f"Hashing {folder}", unit="files", disable=None)
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(folder).as_posix()} {file_sha256(file)}\n".encode())
    return digest.hexdigest()


def checkpoint_sha256(path: str | os.PathLike) -> str:
    """
    What identifies a saved pipeline: a hash of its configs and weights, and of nothing else in its folder.

    Args:
        path (`str` or `os.PathLike`): A folder, or a repository on the Hub.

    Returns:
        `str`: A SHA-256.

    Raises:
        `ValueError`: there is no pipeline.
        `OSError`: the repository cannot be reached.
    """
    folder = Path(path) if Path(path).is_dir() else Path(snapshot_download(str(path)))
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(f"`path` must hold a pipeline, with a model_index.json, got {str(path)!r}.")
    components = [name for name, value in json.loads(index.read_text()).items() if isinstance(value, list)]
    files = [index] + [file for name in components for file in (folder / name).rglob("*") if file.is_file()]
    return folder_sha256(folder, sorted(files))


def _find_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@lru_cache
def git_commit() -> str | None:
    """The commit of the package's source tree, with `-dirty` if it has been changed; `None` if it is no checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(Path(__file__).parents[1]), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # it may be installed within the checkout of something else
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def describe_versions(device: torch.device | str) -> dict[str, str | None]:
    """Versions of what computes, and the kind of `device` that it computes on."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "python": platform.python_version(),
        **{package: found for package in PACKAGES if (found := _find_version(package)) is not None},
        "git_commit": git_commit(),
        "device": name,
        "num_threads": str(torch.get_num_threads()),
    }


def check_output(name: str, path: Path | None, is_folder: bool = False) -> None:
    """
    Raises unless a file or a folder can be written, so that this shows before anything is computed.

    Args:
        name (`str`): Name of the option, for the message.
        path (`Path` or `None`): Where it is to go, if anywhere.
        is_folder (`bool`, defaults to `False`): Whether it is a folder.

    Raises:
        `ValueError`: something else is in the way, or its folder is not one that can be written to.
    """
    if path is None:
        return
    path = Path(path).absolute()
    folder = next(parent for parent in ([path] * is_folder + list(path.parents)) if parent.exists())
    is_free = not path.exists() or path.is_dir() == is_folder
    if not (is_free and folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise ValueError(f"`{name}` must be a {'folder' if is_folder else 'file'} that can be written, got {path}.")


@contextmanager
def replacing(path: Path, folder: Path | None = None) -> Iterator[Path]:
    """
    Where to write a file or a folder that then takes its place, so that it is there as a whole or not at all.

    Args:
        path (`Path`): The place.
        folder (`Path`, *optional*): The folder that it is in until then; that of its place if not given.

    Returns:
        `Path`: A path of this process alone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = (folder or path.parent) / f".{path.name}.{os.getpid()}{UNFINISHED}"
    try:
        yield unfinished
        os.replace(unfinished, path)
    except Exception:
        shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink(missing_ok=True)
        raise


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """
    Keeps other commands out of a folder while one works in it, where the system can lock folders.

    Args:
        folder (`Path`): The folder.

    Raises:
        `ValueError`: another command works in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ValueError(f"`output_dir` must not be in use by another command, got {folder}.") from error
    except OSError:  # no file system of this machine
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def as_metric(value: float, interval: tuple[float, float] | None = None, **details: Any) -> dict[str, Any]:
    """
    A number as results hold it.

    Args:
        value (`float`): The number.
        interval (`tuple[float, float]`, *optional*): Its 95 % confidence interval.
        details (`Any`): More about it that JSON can hold.

    Returns:
        `dict`: With `value` and `interval`.

    Raises:
        `ValueError`: it is not finite, or an end of the interval is not.
    """
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
    """How far the interval of `metric`, what [`as_metric`] returns, reaches from the number, at the longer side."""
    return 0.0 if metric["interval"] is None else max(abs(end - metric["value"]) for end in metric["interval"])


def write_results(
    path: Path,
    task: str,
    argv: list[str],
    metrics: dict[str, dict[str, Any]],
    data: dict[str, Any],
    settings: dict[str, Any],
    device: torch.device | str,
    checkpoint: str | os.PathLike | dict[str, str] | None = None,
) -> dict[str, Any]:
    """
    Writes a result, as a whole or not at all.

    Args:
        path (`Path`): The JSON file.
        task (`str`): Name of the module in `diffusers_dod.evaluation` whose `main(argv)` computes it.
        argv (`list[str]`): The arguments of that.
        metrics (`dict[str, dict]`): What [`as_metric`] returns for each number, by name.
        data (`dict`): What identifies the data.
        settings (`dict`): All that the numbers depend on beside.
        device (`torch.device` or `str`): What computed them.
        checkpoint (`str`, `os.PathLike` or `dict`, *optional*):
            The pipeline; or the `path` and `sha256` of one, as a manifest of samples has them.

    Returns:
        `dict`: What was written.

    Raises:
        `TypeError`, `ValueError`: something is nothing that JSON can hold, or a number that is not finite.
        `OSError`: the file cannot be written, or the checkpoint not be reached.
    """
    if checkpoint is not None and not isinstance(checkpoint, dict):
        checkpoint = {"path": str(checkpoint), "sha256": checkpoint_sha256(checkpoint)}
    results = {
        "format": FORMAT,
        "task": task,
        "argv": argv,
        "checkpoint": checkpoint,
        "data": data,
        "settings": settings,
        "versions": describe_versions(device),
        "metrics": metrics,
    }
    content = json.dumps(results, indent=2, allow_nan=False) + "\n"
    with replacing(Path(path)) as unfinished:
        unfinished.write_text(content)
    return results


def read_results(path: Path) -> dict[str, Any]:
    """
    Reads what [`write_results`] wrote.

    Args:
        path (`Path`): The JSON file.

    Returns:
        `dict`: Its content.

    Raises:
        `ValueError`: it is no such file.
    """
    try:
        results = json.loads(Path(path).read_text())
        missing = {"format", "task", "argv", "metrics"} - results.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"`path` must be a file of results, got {path}: {error}") from error
    if missing:
        raise ValueError(f"`path` must be a file of results, got {path} without {', '.join(sorted(missing))}.")
    if results["format"] != FORMAT:
        raise ValueError(f"`path` must be a file of results of format {FORMAT}, got {path} of {results['format']!r}.")
    return results
