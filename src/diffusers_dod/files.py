# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Durable and atomic writing of files, hashes of their content, and folders that one command has to itself."""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_logger = logging.getLogger(__name__)

UNFINISHED = ".unfinished-"  # how names of files and folders begin that are being written or removed
OLD = "-old"  # how those of folders end that are being replaced
LOCK_FILE = ".in-use"  # says which process works in a folder, as long as it does
NUM_FLUSHES = 16  # at a time
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)  # on the disk, and within a quota
METRICS_FILE = "metrics.jsonl"  # metrics of a training run, in its folder

UMASK = os.umask(0)  # read here, since reading it changes it for a moment, which other threads must not see
os.umask(UMASK)


def file_sha256(*paths: Path) -> str:
    """The SHA-256 of the bytes of the files at `paths`, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def folder_sha256(folder: Path, files: Iterable[Path]) -> str:
    """
    Hash of names and contents of files in a folder, independent of its place and of their times.

    Args:
        folder (`Path`): The folder.
        files (`Iterable[Path]`): The files, in order.

    Returns:
        `str`: A SHA-256.
    """
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


def flush(path: Path) -> None:
    """Waits until the content of a file, or the names in a folder, are on the disk; `path` is either."""
    is_windows = os.name == "nt"
    if is_windows and path.is_dir():  # which it cannot do
        return
    descriptor = os.open(path, os.O_RDWR if is_windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot do it either
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Makes `folder` with its parents, so that a loss of power does not remove it again."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        flush(folder.parent)


def _aside(path: Path, folder: Path | None = None) -> Path:
    return (folder or path.parent) / f"{UNFINISHED}{os.getpid()}-{path.name}"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _put_back(old: Path) -> None:
    """Gives a folder that was to be replaced its name again, unless the new one is there."""
    name = re.fullmatch(rf"{re.escape(UNFINISHED)}\d+-(.+){OLD}", old.name)
    if name is not None and old.exists() and not (path := old.with_name(name[1])).exists():
        os.replace(old, path)


def _is_being_written(unfinished: Path) -> bool:
    """Whether the process that writes a file or a folder lives on this machine."""
    number = re.match(rf"{re.escape(UNFINISHED)}(\d+)-", unfinished.name)
    try:
        os.kill(int(number[1]), 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError, TypeError):  # the last one of a name without a number
        return False
    return True


def _read_umask() -> int:
    """The umask of this process. Only Linux tells it; elsewhere it is that of the import."""
    try:
        return int(re.search(r"^Umask:\s*([0-7]+)", Path("/proc/self/status").read_text(), re.MULTILINE)[1], 8)
    except (OSError, TypeError):
        return UMASK


def _settle(path: Path) -> None:
    """Flushes a file, or a folder with all in it, and gives files the permissions that new files have."""
    mode = 0o666 & ~_read_umask()
    inner = [*path.rglob("*"), path]
    for file in inner:
        if file.is_file():  # some libraries create files that only their owner can read
            file.chmod(mode)
    if len(inner) == 1:
        flush(path)
        return
    with ThreadPoolExecutor(NUM_FLUSHES) as pool:  # a disk flushes many files in about the time of one
        list(pool.map(flush, inner))


@contextmanager
def naming_full_disk(path: Path, unfinished: Path | None = None) -> Iterator[None]:
    """
    Context in which the error of a full disk names the file, what it needs and what is still valid.

    Args:
        path (`Path`): The file or folder that is written.
        unfinished (`Path`, *optional*): Where it is written until it is whole.

    Raises:
        `OSError`: the disk is full, or a quota is used up. Other errors pass as they are.
    """
    try:
        yield
    except Exception as error:  # libraries have their own, with the text of the system
        code = getattr(error, "errno", None)
        if code not in FULL_DISK and not any(os.strerror(full) in str(error) for full in FULL_DISK):
            raise
        written = unfinished or path
        files = [file for file in [written, *written.rglob("*")] if file.is_file()]
        kept = "as it was before" if path.exists() else "not there; files that were finished before are valid"
        raise OSError(
            code or errno.ENOSPC,
            f"{os.strerror(code or errno.ENOSPC)}: it takes more than the {sum(map(_size, files)):,} bytes written so "
            f"far, and {shutil.disk_usage(path.parent).free:,} bytes are free. It is {kept}",
            str(path),
        ) from error


def _size(path: Path) -> int:
    return path.stat().st_size


@contextmanager
def replacing(path: Path, folder: Path | None = None) -> Iterator[Path]:
    """
    Context that writes a file or a folder atomically and durably.

    It is written to a path of its own and flushed to the disk. Then it is moved into place.

    Args:
        path (`Path`): The final path.
        folder (`Path`, *optional*): The folder to write in. By default the folder of the final path.

    Returns:
        `Path`: A path of this process alone, with the same suffix.

    Raises:
        `OSError`: it cannot be written. If the disk is full, the message has the sizes and what is still valid.
    """
    make_folder(path.parent)
    unfinished = _aside(path, folder)
    _remove(unfinished)  # of a process with the same number
    old = _aside(path).with_name(f"{_aside(path).name}{OLD}")
    try:
        with naming_full_disk(path, unfinished):
            yield unfinished
            _settle(unfinished)
        if unfinished.is_dir() and path.is_dir():  # which cannot be replaced in one step
            os.replace(path, old)
        os.replace(unfinished, path)
        flush(path.parent)
        _remove(old)
    except BaseException:
        _put_back(old)
        _remove(unfinished)
        raise


@contextmanager
def replacing_contents(folder: Path, index: str) -> Iterator[Path]:
    """
    Context that replaces files and folders in a folder together; all else in it stays.

    They are written to a folder of their own and flushed to the disk. Then `index` is removed, all others are moved
    into place, and `index` comes last. So a crash leaves the old ones, the new ones, or a folder without `index`.

    Args:
        folder (`Path`): The folder.
        index (`str`): Name of the file without which the others cannot be read.

    Returns:
        `Path`: A folder of this process alone.

    Raises:
        `OSError`: it cannot be written, see [`replacing`].
    """
    make_folder(folder)
    unfinished = _aside(folder / "contents")
    try:
        with naming_full_disk(folder, unfinished):
            yield unfinished
            _settle(unfinished)
        (folder / index).unlink(missing_ok=True)
        flush(folder)
        for path in sorted(unfinished.iterdir(), key=lambda path: path.name == index):
            with replacing(folder / path.name) as aside:
                os.replace(path, aside)
    finally:
        _remove(unfinished)


@contextmanager
def replacing_files(folder: Path, aside: Path | None = None) -> Iterator[Path]:
    """
    Context that writes files of a folder, each atomically. All are durable at its end; all else in the folder stays.

    They are flushed together, which takes a tenth of the time of one by one.

    Args:
        folder (`Path`): The folder.
        aside (`Path`, *optional*): The folder to write in. By default the folder itself.

    Returns:
        `Path`: A folder of this process alone, for files with their final names.
    """
    make_folder(folder)
    unfinished = _aside(folder / "files", aside)
    _remove(unfinished)  # of a process with the same number
    unfinished.mkdir()
    try:
        yield unfinished
        _settle(unfinished)
        for path in sorted(unfinished.iterdir()):
            os.replace(path, folder / path.name)
        flush(folder)
    finally:
        _remove(unfinished)


def remove_unfinished(folder: Path) -> None:
    """Removes what stopped commands left unfinished in `folder`, and in its sub-folders that no command works in."""
    for place in [folder, *(path for path in folder.glob("*") if path.is_dir())]:
        found = list(place.glob(f"{UNFINISHED}*"))  # in this order: a lock that comes now has files that come later
        if place == folder or not (place / LOCK_FILE).exists():
            for unfinished in found:
                if not _is_being_written(unfinished):
                    _put_back(unfinished)
                    _remove(unfinished)


def remove_folder(folder: Path) -> None:
    """Removes `folder`, of which a crash leaves all or nothing under its name."""
    removed = _aside(folder)
    os.replace(folder, removed)
    flush(folder.parent)
    _remove(removed)


def write_json(path: Path, content: Any, folder: Path | None = None) -> None:
    """
    Writes a JSON file atomically and durably, see [`replacing`].

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
def in_use(folder: Path, name: str = "output_dir", waits: bool = False) -> Iterator[None]:
    """
    Locks a folder against other commands, and removes what stopped ones left unfinished in it.

    The lock is on a file in the folder that says who has it. It ends with the process. On systems and file systems
    without locks the folder is used without one.

    Args:
        folder (`Path`): The folder.
        name (`str`, defaults to `"output_dir"`): Name of the option, for the message.
        waits (`bool`, defaults to `False`): Whether to wait for another command, instead of an error.

    Raises:
        `ValueError`: another command works in the folder.
    """
    make_folder(folder)
    path = folder / LOCK_FILE
    descriptor = _lock(path, name, waits)
    if descriptor is None:
        yield
        return
    try:
        owner = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S %z')}"
        os.ftruncate(descriptor, 0)
        os.write(descriptor, owner.encode())
        remove_unfinished(folder)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(path: Path, name: str, waits: bool) -> int | None:
    """Locks the file `path` and returns its descriptor; `None` if it cannot be locked here. See [`in_use`]."""
    if fcntl is None:
        return None
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:  # a folder that can only be read
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(descriptor, 1000, 0).decode(errors="replace") or "another process"
            if not waits:
                os.close(descriptor)
                raise ValueError(
                    f"`{name}` must not be in use by another command, got {path.parent}, in use by {owner}."
                ) from error
            _logger.warning(f"Waiting for {owner}, which works in {path.parent}.")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            path.unlink(missing_ok=True)
            os.close(descriptor)
            return None
        try:
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)  # its last owner has removed it meanwhile
