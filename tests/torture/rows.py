"""Rows of the table: each is a fault and its tries. A try runs in a process of its own, with a limit of time."""

import ctypes
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path


TRY_LIMIT_S = 600  # for what hangs, not for what is slow

Try = tuple[str, Callable[[Path], None]]  # a name, and what raises if something is lost; its argument is a new folder


class Skipped(Exception):
    """Raised by a row that this machine cannot run."""


@dataclass(frozen=True)
class Row:
    """
    A row of the table.

    Args:
        name: The fault.
        tries: Gives the tries, after what they share has been made in the folder of its argument.
        weight: Number of inputs of a try, if it has several.
    """

    name: str
    tries: Callable[[Path], Iterable[Try]]
    weight: int = 1


@dataclass
class Outcome:
    """What the tries of a row came to."""

    name: str
    num_tries: int = 0
    losses: list[str] = field(default_factory=list)
    skipped: str | None = None
    seconds: float = 0.0


ROWS: dict[str, Row] = {}


def row(name: str, weight: int = 1) -> Callable[[Callable[[Path], Iterable[Try]]], Callable[[Path], Iterable[Try]]]:
    """Decorator that adds a row."""

    def add(tries: Callable[[Path], Iterable[Try]]) -> Callable[[Path], Iterable[Try]]:
        ROWS[name] = Row(name, tries, weight)
        return tries

    return add


# ---------------------------------------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class Ended:
    """How a child process has ended: its exit code (negative for a signal), and its last words."""

    code: int
    text: str

    def check(self) -> None:
        """Raises unless it succeeded."""
        assert self.code == 0, f"exit code {self.code}: {self.text}"


def in_child(work: Callable[[], object], limit_s: float = TRY_LIMIT_S, max_bytes: int | None = None) -> Ended:
    """
    Runs `work` in a fork of this process, in a session of its own that is killed at the end.

    Args:
        work: What to run. A `SystemExit` is its exit code, any other error is exit code 1.
        limit_s: Seconds until it is killed, which is told in the text.
        max_bytes: Limit of memory beyond what this process has.
    """
    with tempfile.TemporaryFile() as output:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            _work(work, output.fileno(), max_bytes)
        deadline, status, is_late = time.monotonic() + limit_s, None, False
        while status is None:
            found, code = os.waitpid(child, os.WNOHANG)
            if found:
                status = os.waitstatus_to_exitcode(code)
            elif time.monotonic() > deadline and not is_late:
                is_late = True
                os.kill(child, signal.SIGKILL)
            else:
                time.sleep(0.01)
        try:
            os.killpg(child, signal.SIGKILL)
        except ProcessLookupError:
            pass
        output.seek(0)
        text = output.read().decode(errors="replace").strip()
    lines = text.splitlines() or [""]
    last = next((line for line in reversed(lines) if re.match(r"[\w.]*(Error|Exception)\b", line)), lines[-1])
    return Ended(status, f"no end within {limit_s} s" if is_late else last)


def _work(work: Callable[[], object], output: int, max_bytes: int | None) -> None:
    code = 1
    try:
        os.setsid()
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nothing outlives the command
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = (open(fd, "w", errors="replace", closefd=False) for fd in (1, 2))
        if max_bytes is not None:
            own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (own + max_bytes,) * 2)
        work()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


# --------------------------------------------------------------------------------------------------------------- runs


def choose(tries: Iterable[Try], limit: int | None) -> list[Try]:
    """At most `limit` of the tries, evenly spread."""
    tries = list(tries)
    if limit is None or len(tries) <= limit:
        return tries
    return [tries[i * len(tries) // limit] for i in range(limit)]


def run_row(name: str, limit: int | None = None) -> Outcome:
    """Runs at most `limit` tries of the row `name`."""
    outcome, start = Outcome(name), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        shared = Path(folder) / "shared"
        shared.mkdir()
        try:
            for number, (case, attempt) in enumerate(choose(ROWS[name].tries(shared), limit)):
                own = Path(folder) / f"{number}"
                own.mkdir()
                ended = in_child(lambda attempt=attempt, own=own: attempt(own))
                outcome.num_tries += 1
                if ended.code != 0:
                    outcome.losses.append(f"{case}: {ended.text}" if ended.text else f"{case}: {ended.code}")
                _remove(own)
        except Skipped as reason:
            outcome.skipped = str(reason)
        except Exception as error:  # of what the tries share
            outcome.losses.append(f"before the tries: {type(error).__name__}: {error}")
    outcome.seconds = time.monotonic() - start
    return outcome


def _remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    folder.rmdir()


def run_rows(names: Iterable[str], num_processes: int = 1, limit: int | None = None) -> Iterator[Outcome]:
    """Runs rows, several at a time, and gives their outcomes in order."""
    with ProcessPoolExecutor(num_processes) as pool:
        yield from pool.map(run_row, names, [limit] * len(list(names)))


def to_table(outcomes: Iterable[Outcome]) -> str:
    """The table in Markdown, and below it what was lost and what was left out."""
    lines = ["| fault | tries | survived | lost |", "|---|---:|---:|---:|"]
    notes = []
    for outcome in outcomes:
        name, weight = outcome.name, ROWS[outcome.name].weight
        if outcome.skipped is not None:
            lines.append(f"| {name} | skipped | | |")
            notes.append(f"Skipped: {name}: {outcome.skipped}")
            continue
        lost = len(outcome.losses)
        lines.append(
            f"| {name} | {outcome.num_tries * weight:,} | {(outcome.num_tries - lost) * weight:,} | {lost:,} |"
        )
        notes += [f"Lost: {name}: {loss}" for loss in outcome.losses]
    return "\n".join(lines + ([""] + notes if notes else []))
