"""
Commands and functions in processes of their own. What they wait for is long: only what hangs takes it, not what is
slow.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path

import pytest


PATIENCE_S = 1200

# After SIGTERM torchrun would give its workers 30 s; gloo would ask for the name of the machine.
ENVIRONMENT = {
    "ACCELERATE_USE_CPU": "true",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(PATIENCE_S),
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),  # helpers
    **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
}


def torchrun(log_dir: Path, num_processes: int = 2) -> list[str]:
    """What a script's path is appended to: its processes meet at a port that the system chooses."""
    limits = "join_timeout", "close_timeout", "read_timeout", "heartbeat_timeout", "keep_alive_max_attempt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local_addr", "127.0.0.1"]
    command += ["--rdzv_conf", ",".join(f"{limit}={PATIENCE_S}" for limit in limits)]
    return [*command, "--nproc_per_node", str(num_processes), "--log_dir", str(log_dir)]


def tail(output: Path, num_lines: int = 25) -> str:
    return "\n".join(output.read_text(errors="replace").splitlines()[-num_lines:])


@contextmanager
def started(
    command: Sequence[object], output: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen]:
    """A command whose output goes to a file; at the end of the block it is killed with all that it has started."""
    with output.open("w") as file:
        process = subprocess.Popen(
            list(map(str, command)),
            env=os.environ | ENVIRONMENT | dict(environment or {}),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def run_command(
    command: Sequence[object], output: Path, environment: Mapping[str, str] | None = None, succeeds: bool = True
) -> str:
    """Runs a command to its end, which must be success, or failure, and returns its output."""
    with started(command, output, environment) as process:
        try:
            code = process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"No end within {PATIENCE_S} s:\n{tail(output)}", pytrace=False)
    if (code == 0) != succeeds:
        pytest.fail(f"Exit code {code}:\n{tail(output)}", pytrace=False)
    return output.read_text()


def run_forked(work: Callable[..., object], *arguments: object, output: Path, num_processes: int = 2) -> None:
    """
    Runs a function in copies of this process, which find each other as those of torchrun do, and need no imports.

    All must end without an error.
    """
    if sys.platform != "linux":
        pytest.skip("forks a process with libraries loaded, which only Linux does safely")
    import torch
    from torch.distributed import TCPStore

    context = multiprocessing.get_context("fork")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # at a port that the system chooses
    environment = ENVIRONMENT | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    environment |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(num_processes))

    def run(rank: int) -> None:
        os.environ.update(environment | dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)))
        sys.stdout = sys.stderr = output.open("a", buffering=1)
        for descriptor in (1, 2):
            os.dup2(sys.stdout.fileno(), descriptor)
        torch.set_num_threads(1)  # OpenMP's threads of the parent do not live here
        work(*arguments)

    processes = [context.Process(target=run, args=(rank,)) for rank in range(num_processes)]
    try:
        for process in processes:
            process.start()
        running = {process.sentinel: process for process in processes}
        while running:
            ended = wait(running, PATIENCE_S)
            if not ended:
                pytest.fail(f"No end within {PATIENCE_S} s:\n{tail(output)}", pytrace=False)
            for sentinel in ended:
                if code := running.pop(sentinel).exitcode:
                    pytest.fail(f"Exit code {code}:\n{tail(output)}", pytrace=False)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


def wait_until(condition: Callable[[], bool], process: subprocess.Popen | None = None) -> None:
    """Waits until something is so, as long as the process lasts that makes it so."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        has_ended = process is not None and process.poll() is not None
        assert not has_ended or condition(), f"The process has ended with exit code {process.returncode}."
        assert time.monotonic() < end, f"No such thing within {PATIENCE_S} s."
        time.sleep(0.02)
