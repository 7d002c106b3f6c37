"""Samples on the way of a run: a signal ends their drawing at once, and the resumed run draws them."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from helpers import fresh_accelerator

from diffusers_dod import DoDTransformer2DModel
from diffusers_dod.training.train import main


RUN = "--preset DoD-Desk --dataset_name textures --num_train_samples 8 --resolution 8 --train_batch_size 2".split()
RUN += "--max_train_steps 3 --checkpointing_steps 100 --validation_steps 2".split()


@pytest.fixture
def distances(tmp_path) -> list[str]:
    (tmp_path / "colours.py").write_text("def mean(images):\n    return images.float().mean((2, 3)) / 255\n")
    np.savez(tmp_path / "reference.npz", mu=np.full(3, 0.5), sigma=0.02 * np.eye(3))
    return ["--fid_extractor", f"{tmp_path / 'colours.py'}:mean", "--fid_reference", str(tmp_path / "reference.npz")]


@pytest.mark.parametrize("computes_distances", [True, False])
def test_a_signal_stops_the_drawing_of_samples(tmp_path, monkeypatch, distances, computes_distances):
    """Three batches of 20 steps in two stages are to come, or a grid; no step comes after that of the signal."""
    run = tmp_path / "run"
    arguments = [*RUN, "--output_dir", str(run), *(distances if computes_distances else [])]
    forward, num_evaluations = DoDTransformer2DModel.forward, 0

    def forward_with_a_signal(self, *args, **kwargs):
        nonlocal num_evaluations
        if not torch.is_grad_enabled():
            num_evaluations += 1
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, *args, **kwargs)

    with monkeypatch.context() as patch, fresh_accelerator(), pytest.raises(SystemExit) as ended:
        patch.setattr(DoDTransformer2DModel, "forward", forward_with_a_signal)
        main([*arguments, "--fid_num_samples", "130"])
    assert ended.value.code == 143 and num_evaluations == 1
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (run / "samples").exists() and not (run / "evaluations.jsonl").exists()

    with fresh_accelerator():
        main([*arguments, "--fid_num_samples", "4", "--resume_from_checkpoint", "latest"])
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["step-0000002.png", "step-0000003.png"]
    if computes_distances:
        lines = (run / "evaluations.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [2, 3]
