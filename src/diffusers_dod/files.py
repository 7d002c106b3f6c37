# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Atomic writing of files, hashes of their content, and folders that one command has to itself."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

UNFINISHED = ".unfinished"
METRICS_FILE = "metrics.jsonl"  # metrics of a training run, in its folder


def file_sha256(*paths: Path) -> str:
    """The SHA-256 of the bytes of the files at `paths`, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def folder_sha256(folder: Path, files: Iterable[Path] | None = None) -> str:
    """
    Hash of names and contents of the files in a folder, independent of its place and of their times.

    Args:
        folder (`Path`): The folder.
        files (`Iterable[Path]`, *optional*): Some of its files, in order. By default all but hidden ones.

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


def sha256_of_weights(weights: dict[str, torch.Tensor]) -> str:
    """The SHA-256 of names and fp32 values of `weights`, the state of a model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode() + tensor.cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_output(name: str, path: Path | None, is_folder: bool = False, suffix: str = "") -> None:
    """
    Raises unless a file or a folder can be written; called before anything is computed.

    Args:
        name (`str`): Name of the option, for the message.
        path (`Path` or `None`): Path of the file or folder. `None` passes.
        is_folder (`bool`, defaults to `False`): Whether it is a folder.
        suffix (`str`, defaults to `""`): End of its name, such as `.npz`.

    Raises:
        `ValueError`: something else is in the way, or the parent folder cannot be written to.
    """
    if path is None:
        return
    if not str(path).endswith(suffix):
        raise ValueError(f"`{name}` must end with {suffix}, got {path}.")
    path = Path(path).absolute()
    folder = next(parent for parent in ([path] * is_folder + list(path.parents)) if parent.exists())
    is_free = not path.exists() or path.is_dir() == is_folder
    if not (is_free and folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise ValueError(f"`{name}` must be a {'folder' if is_folder else 'file'} that can be written, got {path}.")


@contextmanager
def replacing(path: Path, folder: Path | None = None) -> Iterator[Path]:
    """
    Context that writes a file or a folder atomically: it is written to a path of its own, and then moved into place.

    Args:
        path (`Path`): The final path.
        folder (`Path`, *optional*): The folder to write in. By default the folder of the final path.

    Returns:
        `Path`: A path of this process alone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = (folder or path.parent) / f".{path.name}.{os.getpid()}{UNFINISHED}"
    try:
        yield unfinished
        if unfinished.is_file():  # some libraries create files that only their owner can read
            umask = os.umask(0)
            os.umask(umask)
            unfinished.chmod(0o666 & ~umask)
        os.replace(unfinished, path)
    except Exception:
        shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any, folder: Path | None = None) -> None:
    """
    Writes a JSON file atomically, see [`replacing`].

    Args:
        path (`Path`): The file.
        content (`Any`): The content, ready for JSON. All numbers must be finite.
        folder (`Path`, *optional*): The folder to write in. By default the folder of the file.

    Raises:
        `TypeError`, `ValueError`: JSON cannot hold the content.
    """
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    with replacing(path, folder) as unfinished:
        unfinished.write_text(text)


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """
    Locks a folder against other commands, if the system can lock folders.

    Args:
        folder (`Path`): The folder.

    Raises:
        `ValueError`: another command works in the folder.
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
