"""The process, the disk or the machine ends before a change of files; the command is then started again."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

from .jobs import Archive, Encoding, Job, Sampling, Training
from .rows import Try, row


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_before(job: Job, changes: range) -> Iterator[Try]:
    """Kills a command before each of its changes."""

    def attempt(folder: Path, change: int) -> None:
        ended = job.run_until(folder / "run", folder / "reported", change, kill)
        assert ended.code == -signal.SIGKILL, f"not killed, but exit code {ended.code}: {ended.text}"
        job.check(folder / "run", folder / "reported")

    for change in changes:
        yield f"change {change}", lambda folder, change=change: attempt(folder, change)


def start_of_final_pipeline(changes: list[str]) -> int:
    """Number of the first change of the finished pipeline."""
    return next(number for number, path in enumerate(changes) if Path(path).name.endswith("-contents"))


@row("kill -9 before every change of files: training")
def training(shared: Path) -> Iterator[Try]:
    job = Training(shared)
    yield from kill_before(job, range(start_of_final_pipeline(job.make_expected())))


@row("kill -9 before every change of files: final pipeline")
def final_pipeline(shared: Path) -> Iterator[Try]:
    job = Training(shared)
    changes = job.make_expected()
    yield from kill_before(job, range(start_of_final_pipeline(changes), len(changes)))


@row("kill -9 before every change of files: encoding")
def encoding(shared: Path) -> Iterator[Try]:
    job = Encoding(shared)
    yield from kill_before(job, range(len(job.make_expected())))


@row("kill -9 before every change of files: sampling, PNG")
def sampling(shared: Path) -> Iterator[Try]:
    job = Sampling(shared)
    yield from kill_before(job, range(len(job.make_expected())))


@row("kill -9 before every change of files: sampling, NPZ")
def archive(shared: Path) -> Iterator[Try]:
    job = Archive(shared)
    yield from kill_before(job, range(len(job.make_expected())))
