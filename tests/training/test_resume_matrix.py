"""
An uninterrupted run against one that was stopped after k steps and resumed: bit-identical for all k, workers and
processes. pytest starts this very file under torchrun for two processes: `work` is what each of them does.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from helpers import quicken_training
from launch import run_command, torchrun
from PIL import Image

from diffusers_dod.training.train import main


pytestmark = pytest.mark.slow

NUM_STEPS = 5
STOPS = (1, 2, 3, 4)  # 10 images in batches of 4: all but the last in the middle of a pass over the data
WORKERS = (0, 2)
TRAIN = "--preset DoD-Desk --resolution 8 --random_flip --learning_rate 1e-2 --logging_steps 2 --checkpointing_steps 1"
TRAIN += f" --max_train_steps {NUM_STEPS} --validation_steps 3 --ema_decay 0.9 0.99 --ema_sigma_rel 0.1"


def train(folder: Path, name: str, batch_size: int, *arguments: object) -> None:
    where = ["--train_data_dir", folder / "images", "--output_dir", folder / name, "--train_batch_size", batch_size]
    main([*TRAIN.split(), *map(str, [*where, *arguments])])


def run_all(folder: Path, batch_size: int, is_main: bool, wait) -> None:
    """The whole run, and a resumed one for every stop and number of workers."""
    quicken_training(pytest.MonkeyPatch())
    train(folder, "whole", batch_size)
    for stop in STOPS:
        for workers in WORKERS:
            name = f"stop-{stop}-workers-{workers}"
            if is_main:  # the run as a crash after step `stop` leaves it, with metrics of later steps
                shutil.copytree(folder / "whole", folder / name)
                for step in range(stop + 1, NUM_STEPS + 1):
                    shutil.rmtree(folder / name / f"checkpoint-{step}")
            wait()
            arguments = ["--resume_from_checkpoint", "latest", "--dataloader_num_workers", workers]
            train(folder, name, batch_size, *arguments)


def work(folder: Path) -> None:
    accelerator = Accelerator()
    assert accelerator.num_processes == 2
    Accelerator.end_training = lambda self: None  # or the processes could not train again
    run_all(folder, 2, accelerator.is_main_process, accelerator.wait_for_everyone)


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def folder(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("matrix")
    rng = np.random.default_rng(0)
    for name in ("ant", "newt"):
        (folder / "images" / name).mkdir(parents=True)
        for i in range(5):
            image = Image.fromarray(rng.integers(0, 256, (12, 11, 3), dtype=np.uint8))
            image.save(folder / "images" / name / f"{i}.png")
    launcher = [sys.executable] if request.param == 1 else torchrun(folder / "logs")
    environment = {"HF_DATASETS_CACHE": str(folder / "cache")}
    run_command([*launcher, __file__, folder, request.param], folder / "output", environment)
    return folder


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("stop", STOPS)
def test_a_resumed_run_is_the_same_run(folder, stop, workers):
    run, whole = folder / f"stop-{stop}-workers-{workers}", folder / "whole"
    manifests = [json.loads((path / f"checkpoint-{NUM_STEPS}" / "manifest.json").read_text()) for path in (run, whole)]
    # The hashes of weights, moments, averages (of the pipeline and beside it), and of the sums of metrics.
    assert manifests[0] == manifests[1] and len(manifests[0]["sha256"]) >= 9
    lines = [[json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in (run, whole)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]] == [2, 4, 5]
    for ours, expected in zip(*lines, strict=True):
        assert ours.keys() == expected.keys()
        for name in ours.keys() - {"images_per_second", "data_wait"}:
            assert ours[name] == expected[name], name
    grids = [(path / "samples" / f"step-{NUM_STEPS:07d}.png").read_bytes() for path in (run, whole)]
    assert grids[0] == grids[1]


if __name__ == "__main__":
    if sys.argv[2] == "2":
        work(Path(sys.argv[1]))
    else:
        Accelerator.end_training = lambda self: None
        run_all(Path(sys.argv[1]), 4, True, lambda: None)
