# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Training checkpoints: safetensors and JSON only, never half written.

A checkpoint is written into a hidden folder, hashed, flushed to disk and renamed; one whose hashes do not match is not
taken up again. `checkpoint-<step>/` is itself a `DoDPipeline` folder with the EMA weights, next to `training_state/`.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file


logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE_FOLDER = "training_state"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """All `checkpoint-<step>` folders below `output_dir`, oldest first, valid or not."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """The optimizer step in the name of the folder `checkpoint`, `checkpoint-<step>`."""
    return int(checkpoint.name.split("-")[1])


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with the folder `checkpoint`, or `None` if every file has the hash that its manifest states."""
    try:
        hashes = dict(json.loads((checkpoint / MANIFEST).read_text())["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    present = {str(path.relative_to(checkpoint)) for path in _files(checkpoint)}
    if missing := sorted(set(hashes) - present):
        return f"files are missing: {', '.join(missing)}"
    for name, expected in hashes.items():
        if _sha256(checkpoint / name) != expected:
            return f"{name} does not have the hash that the manifest states"
    return None


def find_latest_checkpoint(output_dir: Path) -> Path | None:
    """The newest undamaged checkpoint below `output_dir`; damaged ones are passed over with a warning."""
    for checkpoint in reversed(list_checkpoints(output_dir)):
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint
        logger.warning(f"Passing over {checkpoint}: {damage}.")
    return None


def save_checkpoint(
    output_dir: Path, step: int, write: Callable[[Path], None], total_limit: int | None = None
) -> Path:
    """
    Saves `checkpoint-<step>` atomically, then removes the oldest ones beyond `total_limit`.

    Args:
        output_dir (`Path`): Folder of the run.
        step (`int`): Number of finished optimizer steps.
        write (`Callable`): Writes the files of the checkpoint into the folder that it is given.
        total_limit (`int`, *optional*): How many checkpoints to keep, at least 1; `None` keeps all.

    Returns:
        `Path`: The folder of the checkpoint.
    """
    checkpoint = output_dir / f"checkpoint-{step}"
    unfinished = output_dir / f".unfinished-checkpoint-{step}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    write(unfinished)
    hashes = {str(path.relative_to(unfinished)): _sha256(path) for path in _files(unfinished)}
    (unfinished / MANIFEST).write_text(json.dumps({"step": step, "sha256": hashes}, indent=2) + "\n")
    for path in unfinished.rglob("*"):
        _flush(path)
    if checkpoint.exists():  # a damaged one of the same step, passed over when the run was resumed
        shutil.rmtree(checkpoint)
    os.rename(unfinished, checkpoint)
    _flush(output_dir)
    if total_limit is not None:
        # The one just written is known to be valid, so it stays whatever else there is.
        others = [path for path in list_checkpoints(output_dir) if path != checkpoint]
        for old in others[: max(0, len(others) + 1 - total_limit)]:
            shutil.rmtree(old)
    return checkpoint


def save_training_state(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """
    Writes what a resumed run needs beyond the pipeline to `training_state/`.

    Args:
        folder (`Path`): The checkpoint, which has no such sub-folder yet.
        model (`torch.nn.Module`): Its raw weights are written, not the EMA.
        optimizer (`torch.optim.Optimizer`): Its moments are written, not its settings.
        state (`dict`): Anything else that JSON can hold.
    """
    folder = folder / STATE_FOLDER
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    tensors = {
        f"{index}.{name}": tensor.contiguous()
        for index, entry in optimizer.state_dict()["state"].items()
        for name, tensor in entry.items()
    }
    save_file(tensors, folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n")


def load_training_state(checkpoint: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """
    Loads what [`save_training_state`] wrote.

    Args:
        checkpoint (`Path`): The folder of the checkpoint.
        model (`torch.nn.Module`): Takes the raw weights.
        optimizer (`torch.optim.Optimizer`): Takes the moments; it keeps its own learning rates and other settings.

    Returns:
        `dict`: The JSON state.
    """
    folder = checkpoint / STATE_FOLDER
    model.load_state_dict(load_file(folder / "model.safetensors"))
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(folder / "optimizer.safetensors").items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    # The parameter groups (learning rates, betas) come from the run's own arguments.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return json.loads((folder / "state.json").read_text())


def _average_file(checkpoint: Path, name: str) -> Path:
    return checkpoint / STATE_FOLDER / f"ema-{name}.safetensors"


def save_averages(folder: Path, model: torch.nn.Module, averages: dict[str, EMAModel]) -> None:
    """
    Writes averages of the weights beside that of the pipeline to `training_state/ema-<name>.safetensors`.

    Args:
        folder (`Path`): The checkpoint.
        model (`torch.nn.Module`): The model, for the names of its weights.
        averages (`dict[str, EMAModel]`): The averages by name.
    """
    names = [name for name, _ in model.named_parameters()]
    for key, average in averages.items():
        tensors = {name: value.contiguous() for name, value in zip(names, average.shadow_params, strict=True)}
        save_file(tensors, _average_file(folder, key))


def load_averages(checkpoint: Path, model: torch.nn.Module, averages: dict[str, EMAModel]) -> None:
    """
    Loads what [`save_averages`] wrote.

    Args:
        checkpoint (`Path`): The folder of the checkpoint.
        model (`torch.nn.Module`): The model, for the names and devices of its weights.
        averages (`dict[str, EMAModel]`): The averages by name, which take the weights.

    Raises:
        `ValueError`: the checkpoint lacks an average.
    """
    for key, average in averages.items():
        if not _average_file(checkpoint, key).is_file():
            raise ValueError(
                f"`resume_from_checkpoint` must hold the average {key!r}, got {checkpoint}, which does not: an "
                "average cannot start in the middle of a run."
            )
        tensors = load_file(_average_file(checkpoint, key))
        average.shadow_params = [tensors[name].to(parameter.device) for name, parameter in model.named_parameters()]
