"""The process, the disk or the machine ends before a change of files; the command is then started again."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import run_trainer
from hub_server import Hub

from diffusers_dod.checkpoint_manifest import CHECKPOINT_MANIFEST, find_damage

from .jobs import Archive, Encoding, Job, Sampling, Training, find_differences
from .rows import Ended, Try, in_child, row


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


REPO = "user/run"


class PushedTraining(Training):
    """The same run, which pushes its checkpoints to a Hub on this machine."""

    def push(self, hub: Hub, folder: Path) -> Ended:
        """Runs the command, whose process notes its number."""

        def work() -> None:
            folder.with_name("pid").write_text(str(os.getpid()))
            with pytest.MonkeyPatch.context() as patch:
                hub.set_environment(patch, folder.with_name("home"))
                push = [
                    "--push_to_hub",
                    "--push_training_state",
                    "--push_every",
                    1,
                    "--hub_model_id",
                    REPO,
                    "--hub_token",
                    "hf_writes",
                ]
                run_trainer(self.options, folder, *self.arguments(), *push)

        return in_child(work)

    def download(self, hub: Hub, folder: Path) -> dict[str, str]:
        """Writes what the repository has, and gives the hash of each file."""
        files = hub.repos[REPO].files if REPO in hub.repos else {}
        for path, file in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(hub.contents[file.sha256])
        return {path: file.sha256 for path, file in files.items()}


class Killer(list):
    """The requests of a Hub, of which the one of this `number` ends the process that the file `pid` names."""

    def __init__(self, number: int, pid: Path):
        super().__init__()
        self.number, self.pid = number, pid

    def append(self, request: str) -> None:
        super().append(request)
        if len(self) == self.number:
            os.kill(int(self.pid.read_text()), signal.SIGKILL)


@row("kill -9 before every request to the Hub: pushes of a training")
def pushes(shared: Path) -> Iterator[Try]:
    job = PushedTraining(shared)
    with Hub() as hub:
        job.push(hub, shared / "whole").check()
        expected, num_requests = job.download(hub, shared / "repository"), len(hub.requests)
    weights = {path: sha256 for path, sha256 in expected.items() if path.endswith((".safetensors", "config.json"))}

    def attempt(folder: Path, number: int) -> None:
        with Hub() as hub:
            hub.requests = Killer(number, folder / "pid")
            ended = job.push(hub, folder / "run")
            # The last requests of a run may be fewer: a push that a newer one overtakes is left out.
            assert ended.code == -signal.SIGKILL or len(hub.requests) < number, f"not killed: {ended.text}"
            if CHECKPOINT_MANIFEST in job.download(hub, folder / "seen"):
                assert not (damage := find_damage(folder / "seen")), f"a torn commit: {damage}"
            job.push(hub, folder / "run").check()
            found = job.download(hub, folder / "repository")
        assert found.keys() == expected.keys(), f"other files: {sorted(found.keys() ^ expected.keys())}"
        assert {path: found[path] for path in weights} == weights, "other weights in the repository"
        differences = list(find_differences(job.result(folder / "run"), job.result(shared / "whole")))
        assert not differences, f"another result: {', '.join(differences)}"

    for number in range(1, num_requests + 1):
        yield f"request {number}", lambda folder, number=number: attempt(folder, number)
