# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
The manifest of a training checkpoint: its step, and the hash of every file.

Who reads a checkpoint compares its files with the manifest: the pipeline those that it loads, a resumed run all.
"""

import json
import os
import re
from collections.abc import Collection, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TypedDict

from .files import file_sha256
from .records import Count, FileName, Sha256, read_record


CHECKPOINT_MANIFEST = "manifest.json"
STATE_FOLDER = "training_state"
INDEX = "model_index.json"
ADAPTER = "pytorch_lora_weights.safetensors"  # what a checkpoint of adapters has in place of the index
UNLOADED = "samples"  # a folder that a repository on the Hub has beside a checkpoint


class CheckpointManifest(TypedDict):
    """What the manifest of a checkpoint has: the number of optimizer steps, and the hash of each other file."""

    step: Count
    sha256: dict[FileName, Sha256]


def _find_files(checkpoint: Path) -> Iterator[str]:
    """Names of the files that somebody could load; other files may lie beside the index, and hidden ones anywhere."""
    main = INDEX if (checkpoint / INDEX).exists() else ADAPTER
    for folder, folders, files in os.walk(checkpoint):
        name = Path(folder).relative_to(checkpoint)
        folders[:] = [inner for inner in folders if not inner.startswith(".") and (name / inner).parts != (UNLOADED,)]
        for file in sorted(files):
            if not file.startswith(".") and (name.parts or file == main):
                yield (name / file).as_posix()


@lru_cache(maxsize=4096)
def _hash_once(path: Path, size: int, time_ns: int) -> str:
    return file_sha256(path)


def _hash(path: Path) -> str:
    """The hash of a file, which this process computes once, unless the file changes."""
    status = path.stat()
    return _hash_once(path.absolute(), status.st_size, status.st_mtime_ns)


def write_manifest(checkpoint: Path, step: int) -> None:
    """Writes the manifest into a folder `checkpoint` that is still being written, with the number of its `step`."""
    hashes = {name: file_sha256(checkpoint / name) for name in sorted(_find_files(checkpoint))}
    content = json.dumps({"step": step, "sha256": hashes}, indent=2)
    (checkpoint / CHECKPOINT_MANIFEST).write_text(content + "\n")


def find_damage(checkpoint: Path, parts: Collection[str] | None = None) -> str | None:
    """
    Compares a checkpoint with its manifest.

    Args:
        checkpoint (`Path`): The folder.
        parts (`Collection[str]`, *optional*): Names of the folders and files right in it that count; all by default.

    Returns:
        `str`, *optional*: The damage; `None` if all files, and no others, have the hashes of the manifest.
    """
    try:
        manifest = read_record(checkpoint / CHECKPOINT_MANIFEST, CheckpointManifest)
    except (OSError, ValueError) as error:
        return f"its {CHECKPOINT_MANIFEST} cannot be read ({error})"
    step = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    if step is not None and int(step[1]) != manifest["step"]:
        return f"its {CHECKPOINT_MANIFEST} is that of step {manifest['step']}"
    hashes, present = (
        {name for name in names if parts is None or name.partition("/")[0] in parts}
        for names in (manifest["sha256"], _find_files(checkpoint))
    )
    if missing := sorted(hashes - present):
        return f"files are missing: {', '.join(missing)}"
    if unknown := sorted(present - hashes):
        return f"files are not in its {CHECKPOINT_MANIFEST}: {', '.join(unknown)}"
    if manifest["sha256"].keys().isdisjoint((INDEX, ADAPTER)):
        return f"files are missing: {INDEX}"
    for name in sorted(hashes):
        if _hash(checkpoint / name) != manifest["sha256"][name]:
            return f"{name} does not have the hash that the manifest states"
    return None


def check_checkpoint(name: str, checkpoint: Path, parts: Collection[str] | None = None) -> None:
    """
    Raises if a checkpoint is damaged.

    Args:
        name (`str`): Name of the argument, for the message.
        checkpoint (`Path`): The folder.
        parts (`Collection[str]`, *optional*): Names of the folders and files right in it that count; all by default.

    Raises:
        `ValueError`: the files are not those of the manifest.
    """
    if (damage := find_damage(checkpoint, parts)) is not None:
        raise ValueError(f"`{name}` must hold what its training has saved, undamaged, got {checkpoint}: {damage}.")
