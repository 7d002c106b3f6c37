"""The end of a run by a signal under both launchers, and processes other than those asked for."""

import ctypes
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from helpers import fresh_accelerator, says
from launch import PATIENCE_S, started, tail, torchrun, wait_until
from torch.utils.data import DataLoader

from diffusers_dod.processes import (
    StopSignal,
    check_processes,
    choose_num_workers,
    end_with_launcher,
    outlive_stop_signals,
)
from diffusers_dod.training.checkpoints import find_latest_checkpoint
from diffusers_dod.training.train import main


ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "training" / "accelerate").glob("*.yaml"))
ACCELERATE = (
    "-m accelerate.commands.launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
)
RUN = "--preset DoD-Desk --dataset_name textures --num_train_samples 8 --resolution 8 --train_batch_size 2".split()
RUN += "--logging_steps 1 --max_train_steps 100000 --checkpointing_steps 100000".split()


def processes_of(run: Path) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if str(run).encode() in (folder / "cmdline").read_bytes() and "Z" not in (folder / "stat").read_text():
                found.append(int(folder.name))
        except OSError:  # it has ended meanwhile
            pass
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize(
    ("launcher", "target", "code"),
    [
        pytest.param("torchrun", "launcher", 1, marks=pytest.mark.slow),
        pytest.param("torchrun", "worker", 1, marks=pytest.mark.slow),
        ("accelerate", "launcher", -signal.SIGTERM),
        pytest.param("accelerate", "worker", 1, marks=pytest.mark.slow),
    ],
)
def test_sigterm_saves_and_ends_all_processes(tmp_path, launcher, target, code):
    run, output_file = tmp_path / "run", tmp_path / "output"
    metrics = run / "metrics.jsonl"
    command = torchrun(tmp_path / "logs") if launcher == "torchrun" else [sys.executable, *ACCELERATE.split()]
    num_workers = 2 if launcher == "torchrun" else 1
    with started([*command, ROOT / "training" / "train_dod.py", *RUN, "--output_dir", run], output_file) as process:
        try:
            wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, process)
            workers = [pid for pid in processes_of(run) if pid != process.pid]
            assert len(workers) == num_workers
            os.kill(process.pid if target == "launcher" else workers[0], signal.SIGTERM)
            assert process.wait(PATIENCE_S) == code, tail(output_file)
            wait_until(lambda: not processes_of(run))
        finally:
            for pid in processes_of(run):
                os.kill(pid, signal.SIGKILL)
    output = output_file.read_text()
    last_step = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert find_latest_checkpoint(run) == run / f"checkpoint-{last_step}"
    assert f"Stopped by SIGTERM after step {last_step}, with a checkpoint." in output
    if target == "worker" and launcher == "torchrun":
        assert "exitcode  : 143" in output


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends a process with its launcher")
@pytest.mark.parametrize("is_importing", [True, False])
@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_no_trainer_outlives_its_launcher(tmp_path, name, is_importing):
    run, output_file = tmp_path / "run", tmp_path / "output"
    metrics = run / "metrics.jsonl"
    command = [sys.executable, *ACCELERATE.split(), ROOT / "training" / "train_dod.py", *RUN, "--output_dir", run]
    with started([*command, "--max_train_steps", "300"], output_file) as process:
        if is_importing:
            wait_until(lambda: len(processes_of(run)) == 2, process)
        else:
            wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, process)
        os.kill(process.pid, getattr(signal, name))
        process.wait(PATIENCE_S)
        wait_until(lambda: not processes_of(run))
    checkpoints = [path.name for path in run.glob("checkpoint-*")]
    last = 0 if is_importing else json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert last < 300 and checkpoints == ([] if is_importing else [f"checkpoint-{last}"])


def test_a_launcher_that_has_ended_during_the_imports(monkeypatch):
    end_with_launcher(0)  # of a process that no launcher has started
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    if sys.platform == "linux":
        monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(prctl=lambda *arguments: None))
        end_with_launcher(os.getppid())
        with pytest.raises(SystemExit):
            end_with_launcher(0)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_a_signal_to_all_processes_leaves_a_checkpoint(tmp_path, name):
    """Schedulers signal workers of data loaders too; a worker that ends by it would end its trainer."""
    run, output_file = tmp_path / "run", tmp_path / "output"
    metrics = run / "metrics.jsonl"
    command = [sys.executable, ROOT / "training" / "train_dod.py", *RUN, "--dataloader_num_workers", "2"]
    with started([*command, "--output_dir", run], output_file) as process:
        wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, process)
        assert len(processes_of(run)) == 3
        os.killpg(process.pid, getattr(signal, name))
        assert process.wait(PATIENCE_S) == 143, tail(output_file)
        wait_until(lambda: not processes_of(run))
    last_step = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert find_latest_checkpoint(run) == run / f"checkpoint-{last_step}"


class EndlessData(torch.utils.data.IterableDataset):
    def __iter__(self):
        return itertools.repeat(torch.zeros(1))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the system does not tell who has sent a signal")
def test_workers_end_with_their_process():
    """Also after an error, whose traceback keeps the loader until Python itself ends its workers."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_processes as tests; tests.fail_while_loading()"
    ended = subprocess.run(
        [sys.executable, "-c", code, Path(__file__).parent], capture_output=True, timeout=PATIENCE_S
    )
    assert ended.stderr.strip().endswith(b"KeyError: 'expected'") and b"Worker" not in ended.stderr


def fail_while_loading() -> None:
    loader = iter(DataLoader(EndlessData(), num_workers=1, worker_init_fn=outlive_stop_signals))
    next(loader)
    raise KeyError("expected")


@pytest.mark.slow
def test_exit_code(tmp_path, monkeypatch):
    """What the trainer itself ends with: 143, after a checkpoint that goes on as if nothing had happened."""
    from diffusers_dod.training import train as training

    step = training.Trainer.train_step

    def step_with_a_signal(self):
        step(self)
        if self.step == 3 and not self.options.output.resume_from_checkpoint:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(training.Trainer, "train_step", step_with_a_signal)
    before = signal.getsignal(signal.SIGTERM)
    arguments = [*RUN, "--max_train_steps", "5", "--logging_steps", "2", "--learning_rate", "1e-2"]
    with fresh_accelerator(), pytest.raises(SystemExit) as ended:
        main([*arguments, "--output_dir", str(tmp_path / "run")])
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
    assert not (tmp_path / "run" / "model_index.json").exists()
    with fresh_accelerator():
        main([*arguments, "--output_dir", str(tmp_path / "run"), "--resume_from_checkpoint", "latest"])
    monkeypatch.undo()
    with fresh_accelerator():
        main([*arguments, "--output_dir", str(tmp_path / "whole")])
    runs = [tmp_path / name for name in ("run", "whole")]
    manifests = [json.loads((run / "checkpoint-5" / "manifest.json").read_text()) for run in runs]
    assert manifests[0] == manifests[1]
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    assert [line["step"] for line in lines[0]] == [2, 4, 5]  # also those that go across the signal
    for ours, expected in zip(*lines, strict=True):
        for name in ours.keys() - {"images_per_second", "data_wait"}:
            assert ours[name] == expected[name], name


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="Windows has no such signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_signals_are_noted(name):
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    before = [signal.getsignal(number) for number in numbers]
    with fresh_accelerator(), StopSignal(Accelerator()) as stop:
        assert not stop.is_received() and stop.name is None
        os.kill(os.getpid(), getattr(signal, name))
        assert stop.is_received() and stop.name == name
        os.kill(os.getpid(), signal.SIGTERM)  # as a launcher's, which got the first one too
        assert stop.name == name
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_second_sigint_ends_the_process_at_once():
    before = signal.getsignal(signal.SIGINT)
    with fresh_accelerator(), pytest.raises(KeyboardInterrupt), StopSignal(Accelerator()) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_received()
        os.kill(os.getpid(), signal.SIGINT)
        signal.sigtimedwait([], 5)  # not reached
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("name", ["SIGINT", "SIGUSR1"])
def test_a_signal_ends_a_run_with_a_checkpoint(tmp_path, monkeypatch, name, caplog):
    from diffusers_dod.training import train as training

    step = training.Trainer.train_step

    def step_with_a_signal(self):
        step(self)
        os.kill(os.getpid(), getattr(signal, name))

    monkeypatch.setattr(training.Trainer, "train_step", step_with_a_signal)
    with fresh_accelerator(), pytest.raises(SystemExit) as ended:
        main([*RUN, "--max_train_steps", "5", "--output_dir", str(tmp_path / "run")])
    assert ended.value.code == 143 and find_latest_checkpoint(tmp_path / "run").name == "checkpoint-1"
    assert f"Stopped by {name} after step 1, with a checkpoint." in caplog.text


# ---------------------------------------------------------------------------------------------- what was asked for


@pytest.mark.parametrize(
    ("options", "environment", "fragments"),
    [
        ({"num_processes": 2}, {}, ["`num_processes`", "2", "got 1", "--multi_gpu"]),
        ({"distributed_type": "fsdp"}, {}, ["`distributed_type`", "'fsdp'", "got 'no'"]),
        ({}, {"WORLD_SIZE": "4"}, ["WORLD_SIZE", "4", "got 1"]),
        ({}, {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, ["2 processes of SLURM_NTASKS", "got 1", "torchrun"]),
        ({}, {"PMI_SIZE": "4"}, ["4 processes of PMI_SIZE", "got 1", "torchrun"]),
        ({}, {"OMPI_COMM_WORLD_SIZE": "4"}, ["4 processes of OMPI_COMM_WORLD_SIZE", "got 1", "torchrun"]),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, ["launcher's", "'fsdp'", "got 'no'"]),
        ({}, {"ACCELERATE_USE_DEEPSPEED": "true"}, ["launcher's", "'deepspeed'", "got 'no'"]),
    ],
)
def test_other_processes_are_refused(monkeypatch, options, environment, fragments):
    with fresh_accelerator():
        accelerator = Accelerator()
        check_processes(accelerator, 1, "no")
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=says(*fragments)):
            check_processes(accelerator, **options)


def test_the_trainer_asks(tmp_path):
    with fresh_accelerator(), pytest.raises(ValueError, match=says("`num_processes`", "8", "got 1")):
        main([*RUN, "--output_dir", str(tmp_path / "run"), "--num_processes", "8"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_configurations_are_what_accelerate_reads(path):
    """Not run here: they need GPUs."""
    config = load_config_from_file(str(path))
    assert config.num_processes % config.num_machines == 0 and config.mixed_precision == "bf16"
    text = path.read_text()
    assert f"--config_file training/accelerate/{path.name}" in text and "Not run here" in text
    assert set(yaml.safe_load(text)) <= set(vars(config))
    if path.stem.startswith("fsdp2"):
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"] == "DoDTransformerBlock"
    if path.stem == "fsdp2_multi_node":  # a copy of the model on each machine
        copies, shards = (
            config.parallelism_config[f"parallelism_config_dp_{kind}_size"] for kind in ("replicate", "shard")
        )
        assert copies == config.num_machines and copies * shards == config.num_processes
    if path.stem == "deepspeed_zero2":
        assert config.deepspeed_config["zero_stage"] == 2


def test_all_ways_have_a_configuration():
    assert [path.stem for path in CONFIGS] == [*("ddp", "deepspeed_zero2", "fsdp2", "fsdp2_multi_node", "multi_node")]


def test_workers_of_a_gpu_share_the_cores(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(24)), raising=False)
    assert [choose_num_workers(None, cuda, num_processes) for num_processes in (1, 4, 24, 32)] == [8, 6, 1, 0]
    assert [choose_num_workers(number, cuda, 1) for number in (0, 20)] == [0, 20]
    assert [choose_num_workers(number, cpu, 1) for number in (None, 3)] == [0, 3]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")  # of 32 on four machines
    assert choose_num_workers(None, cuda, 32) == 3
