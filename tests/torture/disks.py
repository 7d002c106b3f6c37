"""Disks that fill up and disks that lose their power: file systems of their own, which only root can mount."""

import fcntl
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .jobs import Archive, Encoding, Job, Sampling, Training
from .kills import kill
from .rows import Skipped, Try, row


FS_IOC_SHUTDOWN, WITHOUT_JOURNAL = 0x8004587D, 2
IMAGE_BYTES = 256 * 2**20
NUM_POWER_LOSSES = 24


def _call(*command: object) -> None:
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if ended.returncode != 0:
        raise OSError(f"{command[0]}: {ended.stderr.strip()}")


def check_mounts(*tools: str) -> None:
    """Raises [`Skipped`] where file systems cannot be mounted."""
    if sys.platform != "linux" or os.geteuid() != 0:
        raise Skipped("only root can mount file systems, on Linux")
    if missing := [tool for tool in ("mount", "umount", *tools) if shutil.which(tool) is None]:
        raise Skipped(f"needs {', '.join(missing)}")


@contextmanager
def mounted(folder: Path, *options: object) -> Iterator[Path]:
    """A folder with a file system of its own; `options` are those of mount."""
    folder.mkdir(exist_ok=True)
    _call("mount", *options, folder)
    try:
        yield folder
    finally:
        _call("umount", folder)


# --------------------------------------------------------------------------------------------------------- power loss


def lose_power(folder: Path) -> None:
    """Cuts the file system off: what the disk has not yet got is lost, the journal's last entries too."""
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.ioctl(descriptor, FS_IOC_SHUTDOWN, struct.pack("I", WITHOUT_JOURNAL))
    kill()


def lose_power_before(job: Job, num_changes: int) -> Iterator[Try]:
    def attempt(folder: Path, change: int) -> None:
        image, disk = folder / "image", folder / "disk"
        with image.open("wb") as file:
            file.truncate(IMAGE_BYTES)
        _call("mkfs.ext4", "-q", "-F", image)
        with mounted(disk, "-o", "loop", image):
            ended = job.run_until(disk / "run", folder / "reported", change, lambda: lose_power(disk))
            assert ended.code == -signal.SIGKILL, f"not killed, but exit code {ended.code}: {ended.text}"
        with mounted(disk, "-o", "loop", image):
            job.check(disk / "run", folder / "reported")

    for number in range(min(NUM_POWER_LOSSES, num_changes)):
        change = (2 * number + 1) * num_changes // (2 * min(NUM_POWER_LOSSES, num_changes))
        yield f"change {change}", lambda folder, change=change: attempt(folder, change)


def _power_row(kind: type[Job], name: str) -> None:
    @row(f"power loss on ext4: {name}")
    def tries(shared: Path) -> Iterator[Try]:
        check_mounts("mkfs.ext4")
        job = kind(shared)
        yield from lose_power_before(job, len(job.make_expected()))


for kind, name in ((Training, "training"), (Encoding, "encoding"), (Sampling, "sampling, PNG"), (Archive, "NPZ")):
    _power_row(kind, name)


# ---------------------------------------------------------------------------------------------------------- disk full


def fill_disk(job: Job, sizes: range) -> Iterator[Try]:
    """Runs a command on a disk of each size, in KiB, and again when there is room."""

    def attempt(folder: Path, size: int) -> None:
        with mounted(folder / "disk", "-t", "tmpfs", "-o", f"size={size}k", "none") as disk:
            ended = job.run_until(disk / "run", folder / "reported", -1, kill)
            assert ended.code == 0 or "No space left" in ended.text, f"exit code {ended.code}: {ended.text}"
            _call("mount", "-o", f"remount,size={IMAGE_BYTES}", disk)
            job.check(disk / "run", folder / "reported")

    for size in sizes:
        yield f"{size} KiB", lambda folder, size=size: attempt(folder, size)


def _full_row(kind: type[Job], name: str, num_sizes: int) -> None:
    @row(f"disk full: {name}")
    def tries(shared: Path) -> Iterator[Try]:
        check_mounts()
        job = kind(shared)
        job.make_expected()
        size = sum(path.stat().st_size for path in (shared / "whole").rglob("*") if path.is_file()) // 1024
        yield from fill_disk(job, range(size // num_sizes, size, max(1, size // num_sizes)))


for kind, name, num_sizes in ((Training, "training", 16), (Encoding, "encoding", 8), (Sampling, "sampling", 8)):
    _full_row(kind, name, num_sizes)
