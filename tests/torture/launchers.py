"""Signals at every phase of a training, under each launcher; ranks that are killed or stand still."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launch import started, torchrun

from torture.jobs import TRAIN, Training
from torture.rows import TRY_LIMIT_S, Try, in_child, row


PHASES = {  # what is called in the middle of them, in `diffusers_dod.training.train` but for encoding
    "encoding": "write_json",
    "step": "Trainer.train_step",
    "checkpoint": "save_training_state",
    "validation": "stage_grid",
    "final pipeline": "replacing_contents",
}
SAVING = ("step", "checkpoint", "validation")  # phases in which a signal is promised a checkpoint
STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")


def strike_in(phase: str, strike: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    """Calls `strike` the second time that a phase comes, or the first time of a phase that comes once."""
    from diffusers_dod.data import encoding
    from diffusers_dod.training import train

    owner = encoding if phase == "encoding" else train
    *path, name = PHASES[phase].split(".")
    for part in path:
        owner = getattr(owner, part)
    called, calls, due = getattr(owner, name), [], 1 if phase == "final pipeline" else 2

    def call(*args, **kwargs):
        calls.append(name)
        if len(calls) == due:
            strike()
        return called(*args, **kwargs)

    patch.setattr(owner, name, call)


def check_end(job: Training, folder: Path, phase: str, name: str, has_ended: bool) -> None:
    """A promised checkpoint is there."""
    assert has_ended, "it has not ended"
    promised = {"step": 2, "checkpoint": 4, "validation": 4}[phase] if phase in SAVING else 0
    if name in STOP_SIGNALS and promised:
        lost = job.find_lost(folder, [promised])
        assert not lost, f"no checkpoint of step {promised}"


@row("every signal in every phase: python")
def python(shared: Path) -> Iterator[Try]:
    job = Training(shared)
    job.make_expected()

    def attempt(folder: Path, phase: str, name: str) -> None:
        def work() -> None:
            with pytest.MonkeyPatch.context() as patch:
                strike_in(phase, lambda: os.kill(os.getpid(), getattr(signal, name)), patch)
                job.run(folder / "run")

        ended = in_child(work)
        is_due = name in STOP_SIGNALS and phase == "step"  # the other phases fall into the last step
        assert not is_due or ended.code == 143, f"exit code {ended.code}: {ended.text}"
        check_end(job, folder / "run", phase, name, True)
        (folder / "reported").touch()
        job.check(folder / "run", folder / "reported")

    for phase in PHASES:
        for name in (*STOP_SIGNALS, "SIGHUP", "SIGKILL"):
            yield f"{name} in {phase}", lambda folder, phase=phase, name=name: attempt(folder, phase, name)


def wait_for_group(group: int, limit_s: float) -> None:
    """Waits for the processes that outlive their launcher, to save what they have."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise subprocess.TimeoutExpired("the processes of the launcher", limit_s)


class Launched(Training):
    """The same training under a launcher; `TORTURE` says to the script below what to do, and when."""

    num_processes = 2

    def launcher(self, folder: Path) -> list[str]:
        return torchrun(folder / "logs", self.num_processes)

    def launch(self, folder: Path, strike: str = "") -> int:
        """Exit code of a run that ends by itself."""
        folder.mkdir(exist_ok=True)
        batch = ["--train_batch_size", 4 // self.num_processes]
        arguments = [*TRAIN, "--output_dir", folder / "run", *self.arguments(), *batch]
        environment = {"TORTURE": strike, "HF_DATASETS_CACHE": str(self.shared / "cache")}
        with started([*self.launcher(folder), __file__, *arguments], folder / "output", environment) as process:
            try:
                code = process.wait(TRY_LIMIT_S / 3)
                wait_for_group(process.pid, TRY_LIMIT_S / 3)
                return code
            except subprocess.TimeoutExpired:
                return -1

    def make_expected(self) -> list[str]:
        code = self.launch(self.shared / "launched")
        assert code == 0, (self.shared / "launched" / "output").read_text()[-2000:]
        shutil.move(self.shared / "launched" / "run", self.shared / "whole")
        return []

    def attempt(self, folder: Path, strike: str) -> None:
        phase, name, _ = strike.split(":")
        code = self.launch(folder / "first", strike)
        text = (folder / "first" / "output").read_text()[-300:]
        assert code != -1, f"no end: {text}"
        if name not in ("SIGKILL", "SIGSTOP"):
            check_end(self, folder / "first" / "run", phase, name, True)
        if name == "SIGSTOP":
            assert code == 0, f"exit code {code}: {text}"
        (folder / "first" / "run").mkdir(exist_ok=True)
        shutil.move(folder / "first", folder / "second")
        if name != "SIGSTOP":
            code = self.launch(folder / "second")
            assert code == 0, (folder / "second" / "output").read_text()[-300:]
        found, expected = self.result(folder / "second" / "run"), self.result(self.shared / "whole")
        assert found == expected, "another result"


class LaunchedByAccelerate(Launched):
    num_processes = 1

    def launcher(self, folder: Path) -> list[str]:
        return [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"]


def launch_all(job: Launched, cases: list[tuple[str, str, str]]) -> Iterator[Try]:
    job.make_expected()
    for phase, name, target in cases:
        yield (
            f"{name} in {phase} to the {target}",
            lambda folder, strike=f"{phase}:{name}:{target}": job.attempt(folder, strike),
        )


SIGNALLED = [(phase, "SIGTERM", "launcher") for phase in SAVING]
SIGNALLED += [("step", name, "launcher") for name in ("SIGINT", "SIGKILL")]


@row("signals in three phases: torchrun, two ranks")
def torchrun_row(shared: Path) -> Iterator[Try]:
    yield from launch_all(Launched(shared), SIGNALLED)


@row("signals in three phases: accelerate launch")
def accelerate_row(shared: Path) -> Iterator[Try]:
    yield from launch_all(LaunchedByAccelerate(shared), SIGNALLED)


@row("a rank is killed, or stands still for a while")
def ranks(shared: Path) -> Iterator[Try]:
    cases = [("step", "SIGKILL", "rank"), ("validation", "SIGKILL", "rank"), ("step", "SIGSTOP", "rank")]
    yield from launch_all(Launched(shared), cases)


def strike_as_told(phase: str, name: str, target: str) -> None:
    """What a launched process does to its launcher (the first process) or to itself (the second one)."""
    rank, number = int(os.environ.get("RANK", 0)), getattr(signal, name)

    def strike() -> None:
        if target == "launcher" and rank == 0:
            os.kill(os.getppid(), number)
        elif target == "rank" and rank == 1 and name == "SIGSTOP":
            command = f"sleep 5; kill -CONT {os.getpid()}"
            subprocess.Popen(["sh", "-c", command], start_new_session=True)
            os.kill(os.getpid(), number)
        elif target == "rank" and rank == 1:
            os.kill(os.getpid(), number)
        time.sleep(0.5)  # so that the signal comes in this phase

    strike_in(phase, strike, pytest.MonkeyPatch())


if __name__ == "__main__":
    from helpers import quicken_training

    from diffusers_dod.command_line import run_main
    from diffusers_dod.training.train import main

    quicken_training(pytest.MonkeyPatch())
    if os.environ["TORTURE"]:
        strike_as_told(*os.environ["TORTURE"].split(":"))
    run_main(main)
