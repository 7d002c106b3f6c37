"""The job for Slurm, with stand-ins for its commands: it starts the trainer, and queues itself again if warned."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launch import PATIENCE_S, wait_until


ROOT = Path(__file__).parents[1]
JOB = ROOT / "training" / "slurm" / "train.sbatch"
ARGUMENTS = ["--config", "desk", "--output_dir", "outputs/a run"]
STAND_INS = {
    # As Slurm does, it kills the step if it gets SIGTERM itself.
    "srun": 'printf "%q " "$@" > srun.txt\n$STEP &\necho $! > step.pid\ntrap "kill -KILL $!" TERM\nwait $!',
    "scancel": '[ "$*" = "--signal=TERM 12.0" ] && kill -TERM $(cat step.pid)',
    "scontrol": 'if [ "$1" = show ]; then echo node-7; else echo "$@" > scontrol.txt; fi',
}

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="bash")


@pytest.fixture
def start(tmp_path):
    for name, script in STAND_INS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "12", "SLURM_JOB_NUM_NODES": "4", "SLURM_JOB_NODELIST": "node-[7-10]"}

    def start(step):
        environment = (
            os.environ | slurm | {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "STEP": step}
        )
        return subprocess.Popen(["bash", str(JOB), *ARGUMENTS], cwd=tmp_path, env=environment)

    return start


def test_the_trainer_gets_the_arguments_on_all_machines(start, tmp_path):
    assert start("true").wait(PATIENCE_S) == 0
    words = shlex.split((tmp_path / "srun.txt").read_text())
    place = words.index("training/train_dod.py")
    assert words[0] == "torchrun" and "node-7:29500" in words[:place]
    assert words[place + 1 :] == [*ARGUMENTS, "--resume_from_checkpoint", "latest"]
    assert not (tmp_path / "scontrol.txt").exists()


def test_a_training_that_fails_ends_the_job(start, tmp_path):
    assert start("false").wait(PATIENCE_S) == 1
    assert not (tmp_path / "scontrol.txt").exists()


def test_a_warning_is_passed_on_and_the_job_queued_again(start, tmp_path):
    (tmp_path / "step").write_text(
        "#!/bin/bash\ntrap 'touch stopped; exit 1' TERM\ntouch ready\nwhile :; do sleep 0.01; done\n"
    )
    (tmp_path / "step").chmod(0o755)
    job = start("./step")
    try:
        wait_until((tmp_path / "ready").exists, job)
        job.send_signal(signal.SIGTERM)
        assert job.wait(PATIENCE_S) == 0
    finally:
        job.kill()
    assert (tmp_path / "stopped").exists()
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 12\n"
