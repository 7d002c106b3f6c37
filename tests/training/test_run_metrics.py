"""Sums over steps and processes by their names, and that a resumed run goes on with them."""

import json

import pytest
import torch
from accelerate import Accelerator
from helpers import fresh_accelerator

from diffusers_dod.training import run_metrics
from diffusers_dod.training.plot_metrics import plot_metrics
from diffusers_dod.training.run_metrics import SUMS, TrainingMetrics


@pytest.fixture
def accelerator():
    with fresh_accelerator():
        yield Accelerator()


def add_step(metrics: TrainingMetrics, losses: list[float], num_priors: int, is_finite: bool = True) -> None:
    metrics.add_losses(torch.tensor(losses), torch.tensor([0.1, 0.6, 1.0]), num_priors)
    metrics.add_alignment(torch.tensor([0.5, 0.25, 0.0]), torch.tensor([0.125] * num_priors))
    metrics.end_step(torch.tensor(4.0), torch.tensor(is_finite))


def test_means_have_their_names(tmp_path, accelerator):
    metrics = TrainingMetrics(tmp_path / "metrics.jsonl", accelerator, images_per_step=3)
    add_step(metrics, [1.0, 2.0, 6.0], num_priors=1)
    add_step(metrics, [3.0, 4.0, 8.0], num_priors=2)
    add_step(metrics, [100.0, 100.0, 100.0], num_priors=1, is_finite=False)  # does not count
    line = metrics.write(2, 1e-3)
    expected = {
        "step": 2,
        "loss": 4.0,
        "loss_with_prior": 8 / 3,
        "loss_without_prior": 16 / 3,
        "loss_sigma_0.00_0.25": 2.0,
        "loss_sigma_0.25_0.50": None,
        "loss_sigma_0.50_0.75": 3.0,
        "loss_sigma_0.75_1.00": 7.0,
        "alignment": 0.25,
        "prior_alignment": 0.125,
        "grad_norm": 4.0,
        "learning_rate": 1e-3,
    }
    assert {name: line[name] for name in expected} == pytest.approx(expected)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == line
    assert not metrics.sums.any()


def test_a_clock_that_stands_still(tmp_path, accelerator, monkeypatch):
    monkeypatch.setattr(run_metrics.time, "perf_counter", lambda: 7.0)
    metrics = TrainingMetrics(tmp_path / "metrics.jsonl", accelerator, images_per_step=3)
    add_step(metrics, [1.0, 2.0, 6.0], num_priors=1)
    line = metrics.write(1, 1e-3)
    assert line["images_per_second"] is None and line["data_wait"] is None and line["loss"] == 3.0
    plot_metrics([tmp_path], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").exists()


def test_sums_of_the_step_under_way(tmp_path, accelerator):
    metrics = TrainingMetrics(tmp_path / "metrics.jsonl", accelerator, images_per_step=3)
    metrics.add_losses(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.1, 0.6, 1.0]), num_priors=1)
    assert metrics.step_sum("loss_with_prior") == [1.0, 1.0] and metrics.step_sum("loss_without_prior") == [8.0, 2.0]


def test_a_resumed_run_goes_on(tmp_path, accelerator):
    whole = TrainingMetrics(tmp_path / "whole.jsonl", accelerator, images_per_step=3)
    add_step(whole, [1.0, 2.0, 6.0], num_priors=1)
    state = json.loads(json.dumps(whole.state()))
    assert [list(sums) for sums in state] == [list(SUMS)]
    resumed = TrainingMetrics(tmp_path / "resumed.jsonl", accelerator, 3, step=1, sums=state)
    twice = TrainingMetrics(tmp_path / "twice.jsonl", accelerator, 3, step=1, sums=state * 2)  # of two processes
    for metrics in (whole, resumed):
        add_step(metrics, [3.0, 4.0, 8.0], num_priors=2)
    assert torch.equal(whole.sums, resumed.sums)
    assert twice.step_sum("loss_with_prior") == [0.0, 0.0] and twice.sums[0].tolist() == [2.0, 2.0]
