# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Processes of a run: a check of the launched ones, their end by a signal, and tensors that they share."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch.distributed.tensor import DTensor, distribute_tensor


STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")  # of schedulers, of Ctrl-C, and Slurm's warning
# 128 + 15: the status that shells report for a process that SIGTERM has ended.
STOPPED_EXIT_CODE = 143
DISTRIBUTED_TYPES = ("no", "multi_cpu", "multi_gpu", "fsdp", "deepspeed")

# Longest waits for another process: within a step, after which all end; and while one encodes, reads or writes.
STEP_TIMEOUT = timedelta(minutes=30)
WAIT_TIMEOUT = timedelta(hours=24)


def process_group_timeout() -> InitProcessGroupKwargs:
    """The handler by which an `Accelerator` gives the processes `STEP_TIMEOUT`."""
    return InitProcessGroupKwargs(timeout=STEP_TIMEOUT)


@lru_cache(maxsize=1)
def _waiting_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """All processes once more, with `WAIT_TIMEOUT`, on the CPU: no GPU is busy with waiting."""
    return dist.new_group(backend="gloo", timeout=WAIT_TIMEOUT)


def gather_patiently(entry: Any) -> list[Any]:
    """
    Gathers an object of each process, which may take up to `WAIT_TIMEOUT` until they ask; all must call it.

    Args:
        entry (`Any`): The object of this process, which can be pickled.

    Returns:
        `list`: The objects of all processes, in the order of their ranks.
    """
    if not dist.is_initialized():
        return [entry]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, entry, group=_waiting_group(dist.group.WORLD))
    return gathered


def check_processes(
    accelerator: Accelerator, num_processes: int | None = None, distributed_type: str | None = None
) -> None:
    """
    Raises unless the run has the processes that the launcher or the options asked for.

    Launchers may fall back silently: to one process if the configuration is not for several, or from FSDP to plain
    data parallelism on a CPU.

    Args:
        accelerator (`Accelerator`): The accelerator of the run.
        num_processes (`int`, *optional*): Number of processes that there must be.
        distributed_type (`str`, *optional*): One of `"no"`, `"multi_cpu"`, `"multi_gpu"`, `"fsdp"`, `"deepspeed"`.

    Raises:
        `ValueError`: the run has other processes.
    """
    obtained = accelerator.distributed_type.value.lower()
    in_environment = os.environ.get("WORLD_SIZE")
    for source, expected in {"`num_processes`": num_processes, "the launcher's WORLD_SIZE": in_environment}.items():
        if expected is not None and int(expected) != accelerator.num_processes:
            raise ValueError(
                f"The run must have the number of processes of {source}, {expected}, got {accelerator.num_processes}: "
                "give `accelerate launch` a configuration for several processes, e.g. with `--multi_gpu`."
            )
    for name in () if in_environment is not None else ("SLURM_NTASKS", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"):
        if int(os.environ.get(name, 1)) not in (1, accelerator.num_processes):
            raise ValueError(
                f"The run must have the {os.environ[name]} processes of {name}, got {accelerator.num_processes}: "
                "`srun` and `mpirun` alone start runs that know nothing of each other. Start `torchrun` or "
                f"`accelerate launch` once on each machine, or `unset {name}` for a run of one process."
            )
    for name in ("fsdp", "deepspeed"):
        is_asked_for = os.environ.get(f"ACCELERATE_USE_{name.upper()}", "false").lower() in ("true", "1")
        if is_asked_for and obtained != name:
            raise ValueError(f"The run must be of the launcher's distributed type, {name!r}, got {obtained!r}.")
    if distributed_type is not None and obtained != distributed_type:
        raise ValueError(f"The run must be of `distributed_type` {distributed_type!r}, got {obtained!r}.")
    if obtained == "fsdp" and not accelerator.is_fsdp2:
        raise ValueError("The run must have `fsdp_version` 2 in the launcher's configuration, got 1.")


def end_with_launcher(launcher: int | None = None) -> None:
    """
    Makes this process end with its launcher, by SIGTERM from the kernel; Linux only.

    Args:
        launcher (`int`, *optional*): Id of the process that has started this one, from before the long imports. If it
            has ended meanwhile, this process ends now.
    """
    is_launched = "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    if is_launched and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if launcher not in (None, os.getppid()):
            sys.exit(STOPPED_EXIT_CODE)


class StopSignal:
    """
    Context in which the first SIGTERM, SIGINT or SIGUSR1 is noted and does not end the process; a second SIGINT does.

    Args:
        accelerator (`Accelerator`): The processes. They stop together.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        #: Name of the first signal that this process has received, or another reason to stop.
        self.name: str | None = None
        self._asked: tuple[dist.Work, torch.Tensor] | None = None  # the latest question to all processes
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for name in STOP_SIGNALS:
            if hasattr(signal, name):  # Windows has not all of them
                number = getattr(signal, name)
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.note(signal.Signals(number).name)
        if number == signal.SIGINT:
            signal.signal(number, self._previous[number])

    def note(self, name: str) -> None:
        """Stops the processes as a signal would, for the reason `name`."""
        self.name = self.name or name

    def is_noted(self) -> bool:
        """Whether this process has received a signal, or another reason to stop."""
        return self.name is not None

    def is_received(self, at_once: bool = True) -> bool:
        """
        Whether any process has received a signal; all must ask, and all get the same answer. No GPU waits for that.

        Args:
            at_once (`bool`, defaults to `True`):
                Whether to wait for the others. If not, the answer of several processes is that to the question before,
                which they have had the time to answer.

        Returns:
            `bool`: The answer.
        """
        if self.accelerator.num_processes == 1:
            return self.is_noted()
        before, flag = self._asked, torch.tensor(float(self.is_noted()))
        self._asked = dist.all_reduce(flag, group=_waiting_group(dist.group.WORLD), async_op=True), flag
        answered = self._asked if at_once else before
        if answered is None:
            return False
        answered[0].wait()
        return bool(answered[1] > 0)


def describe_error(error: BaseException) -> str:
    """The message of an `error` in one block of lines, its notes included."""
    return "\n".join([str(error) or type(error).__name__, *getattr(error, "__notes__", [])])


class OtherProcessError(RuntimeError):
    """Raised in a process when another one has failed."""


def end_processes(accelerator: Accelerator) -> None:
    """
    Ends trackers and process groups, so that nothing keeps the interpreter from its end; all must call it.

    Args:
        accelerator (`Accelerator`): The processes.
    """
    accelerator.end_training()
    _waiting_group.cache_clear()


DEFAULT_WORKERS = 8  # at most, of a GPU


def choose_num_workers(num_workers: int | None, device: torch.device, num_processes: int) -> int:
    """
    Chooses how many processes read data for this one.

    Args:
        num_workers (`int` or `None`): The number that was asked for.
        device (`torch.device`): Device that waits for the data.
        num_processes (`int`): Number of processes, all on this machine unless the launcher says otherwise.

    Returns:
        `int`: That number; without one, on CUDA a GPU's share of the cores, up to 8, and else 0.
    """
    if num_workers is not None or device.type != "cuda":
        return num_workers or 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(DEFAULT_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", num_processes)))


def worker_settings(num_workers: int) -> dict[str, Any]:
    """
    Settings of a `DataLoader` whose workers outlive the signals that stop a run.

    Args:
        num_workers (`int`): Number of workers.

    Returns:
        `dict`: Arguments by name. Each worker holds four batches ready.
    """
    settings: dict[str, Any] = {"num_workers": num_workers, "worker_init_fn": outlive_stop_signals}
    return settings | ({"persistent_workers": True, "prefetch_factor": 4} if num_workers > 0 else {})


def outlive_stop_signals(worker_id: int) -> None:
    """
    Makes a worker of a `DataLoader` ignore the signals that stop a run, unless its own process sends them.

    Schedulers signal all processes. A worker that ends by that would end its process before its checkpoint.

    Args:
        worker_id (`int`): Index of the worker.
    """
    for name in STOP_SIGNALS:
        if name != "SIGTERM" and hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS and Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_by_sigterm_of, args=(multiprocessing.parent_process().pid,), daemon=True).start()


def _end_by_sigterm_of(pid: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != pid:
        pass
    os._exit(0)  # as PyTorch's workers end by this signal, so that their process raises no error


@contextmanager
def all_or_none() -> Iterator[None]:
    """Context that waits for all processes at its end, and raises an error in each if one has failed."""
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    messages = gather_patiently(None if error is None else describe_error(error))
    if error is not None:
        raise error
    for message in messages:
        if message is not None:
            raise OtherProcessError(f"Another process failed: {message}")


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Gathers `tensor` if this process holds only a shard of it; then every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Shards `tensor`, which every process has in full, in the same way as `like`, which has the same shape."""
    tensor = tensor.to(like.device)
    if isinstance(like, DTensor):
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return tensor


def find_nonfinite(tensors: dict[str, torch.Tensor], accelerator: Accelerator) -> list[str]:
    """
    Finds tensors that are not finite, with one transfer from the device; all processes must call it.

    Args:
        tensors (`dict[str, torch.Tensor]`): Tensors by name, of any shapes, or this process's shards of them.
        accelerator (`Accelerator`): The processes.

    Returns:
        `list[str]`: The names of those with a value that is not finite in any process.
    """
    own = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors.values()]
    is_bad = torch.stack([~tensor.detach().isfinite().all() for tensor in own]).to(accelerator.device, torch.float32)
    return [name for name, bad in zip(tensors, accelerator.reduce(is_bad).tolist(), strict=True) if bad]
