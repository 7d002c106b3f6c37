# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Training checkpoints: safetensors and JSON only, never half written.

A checkpoint is written into a hidden folder, hashed, flushed to disk and renamed, by a thread if that is asked for. A
checkpoint whose hashes do not match is never resumed. `checkpoint-<step>/` is a `DoDPipeline` folder with the EMA
weights, and also holds `training_state/`.
"""

import itertools
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..checkpoint_manifest import CHECKPOINT_MANIFEST, STATE_FOLDER, find_damage, write_manifest
from ..files import file_sha256, flush, remove_folder, replacing
from ..finetuning import has_lora
from ..losses import DoDJointModel
from ..processes import all_or_none, full_tensor, gather_patiently, sharded_like
from ..records import Count, read_record
from .ema import averaged_parameters
from .history import HistoryRecord
from .models import set_learning_rates


logger = logging.getLogger(__name__)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Lists all `checkpoint-<step>` folders below `output_dir`, oldest first, valid or not."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """The optimizer step in the name of the folder `checkpoint`, `checkpoint-<step>`."""
    return int(checkpoint.name.split("-")[1])


def find_latest_checkpoint(output_dir: Path) -> Path | None:
    """Finds the newest undamaged and finite checkpoint below `output_dir`; others are skipped with a warning."""
    for checkpoint in reversed(list_checkpoints(output_dir)):
        problem = find_damage(checkpoint) or find_nonfinite_tensor(checkpoint)
        if problem is None:
            return checkpoint
        logger.warning(f"Passing over {checkpoint}: {problem}.")
    return None


def find_nonfinite_tensor(checkpoint: Path) -> str | None:
    """Names a tensor of weights, averages or moments in `checkpoint` that is not finite; `None` if there is none."""
    patterns = (f"{STATE_FOLDER}/*.safetensors", "*/diffusion_pytorch_*.safetensors")
    for path in sorted(path for pattern in patterns for path in checkpoint.glob(pattern)):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                if not bool(file.get_tensor(name).isfinite().all()):
                    return f"{name} in {path.relative_to(checkpoint)} is not finite"
    return None


def set_aside_later(output_dir: Path, step: int) -> None:
    """
    Renames the checkpoints after a step from which a run goes on anew, so that none of them is taken for its latest.

    Args:
        output_dir (`Path`): The folder of the run.
        step (`int`): The step of the checkpoint that the run goes on from. `checkpoint-<later>` becomes
            `checkpoint-<later>-abandoned`, with a number if there is one.
    """
    for checkpoint in list_checkpoints(output_dir):
        if checkpoint_step(checkpoint) > step:
            suffixes = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
            paths = (output_dir / f"{checkpoint.name}-abandoned{suffix}" for suffix in suffixes)
            aside = next(path for path in paths if not path.exists())
            os.replace(checkpoint, aside)
            logger.warning(f"The run goes on from step {step}: {checkpoint.name} is now {aside.name}.")
    flush(output_dir)


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str | None) -> Path | None:
    """
    Finds the checkpoint from which a run continues.

    Args:
        output_dir (`Path`): The folder of the run.
        resume_from_checkpoint (`str` or `None`): The folder of a checkpoint, its name in `output_dir`, or `"latest"`
            for the newest of the run.

    Returns:
        `Path | None`: The checkpoint; `None` for a run that starts from scratch.

    Raises:
        `ValueError`: there are checkpoints and the run is not to be resumed, or none of those asked for is undamaged.
    """
    if resume_from_checkpoint is None:
        if list_checkpoints(output_dir):
            raise ValueError(
                f"`output_dir` {output_dir} holds checkpoints: continue with `--resume_from_checkpoint latest`, or "
                "use another folder."
            )
        return None
    if resume_from_checkpoint != "latest":
        checkpoint = Path(resume_from_checkpoint)
        if not checkpoint.exists() and (output_dir / checkpoint).is_dir():
            checkpoint = output_dir / checkpoint
        if (damage := find_damage(checkpoint)) is not None:
            raise ValueError(f"`resume_from_checkpoint` must be an undamaged checkpoint, got {checkpoint}: {damage}.")
        return checkpoint
    checkpoint = find_latest_checkpoint(output_dir)
    if checkpoint is None and list_checkpoints(output_dir):
        raise ValueError(f"`output_dir` {output_dir} must hold an undamaged checkpoint with finite weights, got none.")
    if checkpoint is None:
        logger.info(f"No checkpoint in {output_dir}, starting from scratch.")
    return checkpoint


def agree_on_checkpoint(output_dir: Path, resume_from_checkpoint: str | None, accelerator: Accelerator) -> Path | None:
    """
    Finds the checkpoint from which a run continues in the main process, see [`find_checkpoint`]; all must call it.

    Args:
        output_dir (`Path`): The folder of the run.
        resume_from_checkpoint (`str` or `None`): The folder of a checkpoint, or `"latest"` for the newest of the run.
        accelerator (`Accelerator`): The processes.

    Returns:
        `Path | None`: The checkpoint; `None` for a run that starts from scratch.

    Raises:
        `ValueError`: see [`find_checkpoint`], or not all processes see the same files of the checkpoint.
    """
    checkpoint = None
    with all_or_none():
        if accelerator.is_main_process:
            checkpoint = find_checkpoint(output_dir, resume_from_checkpoint)
    checkpoint, main_output_dir = gather_patiently((checkpoint, output_dir))[0]
    if checkpoint is None or accelerator.num_processes == 1:
        return checkpoint
    if checkpoint.is_relative_to(main_output_dir):  # each process reads its own folder of the run
        checkpoint = output_dir / checkpoint.relative_to(main_output_dir)
    state = checkpoint / STATE_FOLDER
    try:
        seen = file_sha256(checkpoint / CHECKPOINT_MANIFEST, state / "state.json", state / "model.safetensors")
    except OSError as error:
        seen = f"{type(error).__name__}: {error}"
    all_seen = gather_patiently(seen)
    for index, other in enumerate(all_seen):
        if other != all_seen[0]:
            raise ValueError(
                f"`output_dir` must be a folder that all processes share, got {checkpoint}, of which process {index} "
                f"sees other files than process 0: {other[:100]} and {all_seen[0][:100]}."
            )
    return checkpoint


def save_checkpoint(
    output_dir: Path, step: int, write: Callable[[Path], None], total_limit: int | None = None
) -> Path:
    """
    Saves `checkpoint-<step>` atomically and durably, then removes the oldest ones beyond `total_limit`.

    Args:
        output_dir (`Path`): Folder of the run.
        step (`int`): Number of finished optimizer steps.
        write (`Callable`): Writes the files of the checkpoint into the folder in its argument.
        total_limit (`int`, *optional*): Number of checkpoints to keep, at least 1. `None` keeps all.

    Returns:
        `Path`: The folder of the checkpoint.
    """
    checkpoint = output_dir / f"checkpoint-{step}"
    with replacing(checkpoint) as unfinished:
        unfinished.mkdir()
        write(unfinished)
        write_manifest(unfinished, step)
    if total_limit is not None:
        # The checkpoint just written is known to be valid, so it stays whatever else there is.
        others = [path for path in list_checkpoints(output_dir) if path != checkpoint]
        for old in others[: max(0, len(others) + 1 - total_limit)]:
            try:
                remove_folder(old)
            except OSError as error:
                logger.warning(f"{old} is in the way of `checkpoints_total_limit` and cannot be removed: {error}.")
    return checkpoint


class CheckpointWriter:
    """
    Writes one checkpoint at a time in a thread, from copies of the tensors in memory of the host.

    The thread ends with the process, of which it leaves what a kill leaves: the whole checkpoint or none.

    Args:
        device (`torch.device`): Device of the tensors. From CUDA they are copied into pinned memory.
        on_error (`Callable`, *optional*): Is called in the thread if a checkpoint cannot be written.
    """

    def __init__(self, device: torch.device, on_error: Callable[[], None] | None = None):
        is_cuda = device.type == "cuda"
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=is_cuda,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=is_cuda,
            )
        )
        self._on_error = on_error
        self._writing: Future[Path] | None = None

    def copy(self, tensors: dict[str, dict[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
        """
        Copies tensors to memory of the host, which the next copies of the same tensors use again.

        Args:
            tensors (`dict[str, dict[str, torch.Tensor]]`): Tensors from [`gather_training_state`].

        Returns:
            `dict[str, dict[str, torch.Tensor]]`: The copies. No checkpoint may be under way that needs earlier ones.
        """
        return self._stager.stage(tensors)

    def start(self, write: Callable[[], Path]) -> None:
        """
        Starts to write a checkpoint. The one before must have been taken.

        Args:
            write (`Callable`): Writes a checkpoint and returns its folder.
        """
        self._writing = Future()
        threading.Thread(target=self._write, args=(write, self._writing), name="CheckpointWriter", daemon=True).start()

    def _write(self, write: Callable[[], Path], writing: "Future[Path]") -> None:
        try:
            writing.set_result(write())
        except BaseException as error:
            writing.set_exception(error)
            if self._on_error is not None:
                self._on_error()

    @property
    def is_whole(self) -> bool:
        """Whether a checkpoint is whole that has not been taken."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is None

    def take(self) -> Path | None:
        """
        Waits until the checkpoint that is being written is whole.

        Returns:
            `Path | None`: The folder of the checkpoint; `None` if there is none to wait for.

        Raises:
            `Exception`: what has kept it from being written.
        """
        writing, self._writing = self._writing, None
        return None if writing is None else writing.result()

    def finish(self) -> None:
        """Waits as [`CheckpointWriter.take`], where another error ends the run: one of the writer is logged."""
        try:
            self.take()
        except Exception as error:
            logger.error(f"A checkpoint could not be written: {error}")


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of an optimizer's moments under `<parameter>.<name>`; an 8-bit moment consists of several."""
    for index, entry in optimizer.state_dict()["state"].items():
        for name, tensor in entry.items():
            if is_traceable_wrapper_subclass(tensor) and not isinstance(tensor, DTensor):
                for part in tensor.__tensor_flatten__()[0]:
                    yield f"{index}.{name}.{part}", getattr(tensor, part)
            else:
                yield f"{index}.{name}", tensor


def _state_to_save(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state of a model, without the weights under its adapters, if it has some."""
    state = model.state_dict()
    if not has_lora(model):
        return state
    return {name: state[name] for name, parameter in model.named_parameters() if parameter.requires_grad}


def gather_training_state(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    averages: dict[str, EMAModel] | None = None,
    keep: bool = True,
) -> dict[str, dict[str, torch.Tensor]]:
    """
    Gathers the tensors that a resumed run needs beyond the pipeline. If they are sharded, all processes must call it.

    Args:
        model (`torch.nn.Module`): The model with its raw weights, not the average.
        optimizer (`torch.optim.Optimizer`, *optional*): The optimizer. Its moments are gathered, not its settings.
        averages (`dict[str, EMAModel]`, *optional*): The averages by name, without the pipeline's.
        keep (`bool`, defaults to `True`): Whether this process keeps the tensors, or only helps the others.

    Returns:
        `dict[str, dict[str, torch.Tensor]]`: Tensors by name for each file of [`save_training_state`]; empty without
        `keep`.
    """
    names = list(averaged_parameters(model))
    sources = {"model": _state_to_save(model)}
    if optimizer is not None:
        sources["optimizer"] = dict(_optimizer_tensors(optimizer))
    for key, average in (averages or {}).items():
        sources[f"ema-{key}"] = dict(zip(names, average.shadow_params, strict=True))
    gathered: dict[str, dict[str, torch.Tensor]] = {file: {} for file in sources if keep}
    for file, tensors in sources.items():
        for name, tensor in tensors.items():
            full = full_tensor(tensor)
            if keep:  # gathered tensors go to the CPU, as all of them may be too large for the device
                full = full.cpu() if full is not tensor else full
                gathered[file][name] = full.contiguous()
    return gathered


def save_training_state(folder: Path, tensors: dict[str, dict[str, torch.Tensor]], state: dict) -> None:
    """
    Writes the state that a resumed run needs beyond the pipeline to `training_state/`.

    Args:
        folder (`Path`): The checkpoint. It must not have this sub-folder yet.
        tensors (`dict[str, dict[str, torch.Tensor]]`): Tensors from [`gather_training_state`].
        state (`dict`): All other state, ready for JSON.
    """
    folder = folder / STATE_FOLDER
    folder.mkdir()
    for file, entries in tensors.items():
        save_file(entries, folder / f"{file}.safetensors")
    (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n")


class TrainingState(TypedDict):
    """What the JSON state of every checkpoint has."""

    step: Count
    num_nonfinite_steps: Count
    nonfinite_in_a_row: Count
    average: str
    history: NotRequired[HistoryRecord]
    gradient_scaler: dict[str, float] | None
    metrics: NotRequired[list[dict[str, list[float]]] | None]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Reads the JSON state of [`save_training_state`] in `checkpoint`; a `ValueError` tells what is wrong in it."""
    return read_record(checkpoint / STATE_FOLDER / "state.json", TrainingState)


def load_training_state(
    checkpoint: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    averages: dict[str, EMAModel] | None = None,
) -> dict:
    """
    Loads the state of [`save_training_state`]. Sharded models load their shards of it.

    Args:
        checkpoint (`Path`): The folder of the checkpoint.
        model (`torch.nn.Module`): Takes the raw weights.
        optimizer (`torch.optim.Optimizer`): Takes the moments; it keeps its own learning rates and other settings.
        averages (`dict[str, EMAModel]`, *optional*):
            The averages by name, without the pipeline's. They take the weights.

    Returns:
        `dict`: The JSON state.

    Raises:
        `ValueError`: the checkpoint lacks an average, or belongs to another model or optimizer.
    """
    folder = checkpoint / STATE_FOLDER
    for key, average in (averages or {}).items():
        path = folder / f"ema-{key}.safetensors"
        if not path.is_file():
            raise ValueError(
                f"`resume_from_checkpoint` must hold the average {key!r}, got {checkpoint}, which does not: an "
                "average cannot start in the middle of a run."
            )
        tensors = load_file(path)
        average.shadow_params = [
            sharded_like(tensors[name], parameter) for name, parameter in averaged_parameters(model).items()
        ]
    weights, own = load_file(folder / "model.safetensors"), _state_to_save(model)
    shapes, own_shapes = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (weights, own))
    if shapes != own_shapes:
        name = min(name for name in shapes.keys() | own_shapes.keys() if shapes.get(name) != own_shapes.get(name))
        raise ValueError(
            f"`resume_from_checkpoint` must hold the model of this run, with {name} of shape {own_shapes.get(name)}, "
            f"got {checkpoint} with {shapes.get(name)}: resume with the options of the run that wrote it."
        )
    model.load_state_dict(
        {name: sharded_like(weights[name], like) for name, like in own.items()}, strict=not has_lora(model)
    )
    path = folder / "optimizer.safetensors"
    if not path.is_file():
        raise ValueError(f"`resume_from_checkpoint` must hold the moments of the optimizer, got {checkpoint} without.")
    saved = load_file(path)
    if saved:  # or no step has been made so far, as none was finite
        _create_moments(optimizer)
    moments = dict(_optimizer_tensors(optimizer))
    if saved.keys() != moments.keys():
        name = min(saved.keys() ^ moments.keys())
        raise ValueError(
            f"`resume_from_checkpoint` must hold the moments of the optimizer of this run, got {checkpoint}, where "
            f"{name} is {'missing' if name in moments else 'left over'}."
        )
    for name, tensor in moments.items():
        tensor.copy_(sharded_like(saved[name], tensor))
    return read_state(checkpoint)


def load_average(checkpoint: Path, model: DoDJointModel) -> list[torch.Tensor]:
    """
    Loads the average that the pipeline of a checkpoint has.

    Args:
        checkpoint (`Path`): The folder of the checkpoint.
        model ([`DoDJointModel`]): The model that is trained.

    Returns:
        `list[torch.Tensor]`: The weights in the order of [`averaged_parameters`], sharded as those of the model.
    """
    transformer = type(model.transformer).from_pretrained(checkpoint, subfolder="transformer")
    embedder = model.latent_embedder
    if embedder is not None:
        embedder = type(embedder).from_pretrained(checkpoint, subfolder="latent_embedder")
    weights = averaged_parameters(DoDJointModel(transformer, embedder))
    return [sharded_like(weights[name].detach(), like) for name, like in averaged_parameters(model).items()]


def _create_moments(optimizer: torch.optim.Optimizer) -> None:
    """Makes an optimizer create its moments, by a step that changes nothing."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's would ask a gradient scaler
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    set_learning_rates(optimizer, [0.0] * len(rates))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    set_learning_rates(optimizer, rates)
