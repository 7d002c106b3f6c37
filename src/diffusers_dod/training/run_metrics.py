# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Metrics of a run: sums over steps and processes, and `metrics.jsonl`."""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..files import naming_full_disk, replacing
from ..records import read_lines


EVALUATIONS = "evaluations.jsonl"  # beside `METRICS_FILE`: what is computed of samples
NUM_TIME_BINS = 4  # parts of [0, 1] whose losses are logged apart
TIME_BINS = tuple(f"loss_sigma_{i / NUM_TIME_BINS:.2f}_{(i + 1) / NUM_TIME_BINS:.2f}" for i in range(NUM_TIME_BINS))
# Metrics with a sum and a count: by sample, except for the gradient norm, which is by step.
SUMS = ("loss_with_prior", "loss_without_prior", "grad_norm", "alignment", "prior_alignment", *TIME_BINS)
ROWS = {name: row for row, name in enumerate(SUMS)}


class TrainingMetrics:
    """
    Means over the steps since the latest line of `metrics.jsonl`; steps with non-finite gradients do not count.

    Args:
        path (`Path`): The file.
        accelerator (`Accelerator`): The processes. Their sums are added up.
        images_per_step (`int`): Samples per optimizer step over all processes.
        step (`int`, defaults to 0): Number of finished steps.
        sums (`list[dict[str, list[float]]]`, *optional*): The `state` in that step, to continue from.
    """

    def __init__(
        self,
        path: Path,
        accelerator: Accelerator,
        images_per_step: int,
        step: int = 0,
        sums: list[dict[str, list[float]]] | None = None,
    ):
        self.path = path
        self.accelerator = accelerator
        self.images_per_step = images_per_step
        # Sum and count by the rows of `SUMS`: one tensor, so that processes add theirs up in one call.
        self.sums = torch.zeros(len(SUMS), 2, device=accelerator.device)
        self.step_sums = torch.zeros_like(self.sums)
        if sums is not None:
            given = torch.tensor([[of_process[name] for name in SUMS] for of_process in sums]).to(accelerator.device)
            if len(sums) == accelerator.num_processes:
                self.sums += given[accelerator.process_index]
            elif accelerator.is_main_process:  # written by another number of processes
                self.sums += given.sum(0)
        self._start(step)

    def _start(self, step: int) -> None:
        self.timed_from, self.timed_from_step, self.data_seconds = time.perf_counter(), step, 0.0

    def add_losses(self, losses: torch.Tensor, sigmas: torch.Tensor, num_priors: int) -> None:
        """
        Adds a micro-batch to the step.

        Args:
            losses (`torch.Tensor` of shape `(B,)`): Loss of each sample; samples with a prior come first.
            sigmas (`torch.Tensor` of shape `(B,)`): Time of each sample.
            num_priors (`int`): Number of samples with a prior.
        """
        self._add("loss_with_prior", losses[:num_priors])
        self._add("loss_without_prior", losses[num_priors:])
        bins = (sigmas * NUM_TIME_BINS).long().clamp(max=NUM_TIME_BINS - 1)
        self.step_sums.index_add_(
            0, ROWS[TIME_BINS[0]] + bins, torch.stack([losses, torch.ones_like(losses)], dim=1).to(self.step_sums)
        )

    def _add(self, name: str, values: torch.Tensor) -> None:
        row = self.step_sums[ROWS[name]]
        row[0] += values.sum()
        row[1] += values.numel()

    def step_sum(self, name: str) -> list[float]:
        """Sum and count of `name`, one of `SUMS`, over the micro-batches of the current step."""
        return self.step_sums[ROWS[name]].tolist()

    def add_alignment(self, alignment: torch.Tensor, prior_alignment: torch.Tensor) -> None:
        """
        Adds the alignment of a micro-batch to the step.

        Args:
            alignment (`torch.Tensor` of shape `(B,)`): Alignment of the backbone's tokens.
            prior_alignment (`torch.Tensor` of shape `(K,)`): Alignment of the prior's tokens; may be empty.
        """
        self._add("alignment", alignment)
        self._add("prior_alignment", prior_alignment)

    def end_step(self, grad_norm: torch.Tensor, is_finite: torch.Tensor) -> None:
        """
        Ends an optimizer step.

        Args:
            grad_norm (`torch.Tensor` of shape `()`): Norm of the step's gradients.
            is_finite (`torch.Tensor` of shape `()`): Whether the gradients were finite, so that the step was made.
        """
        self._add("grad_norm", grad_norm)
        self.sums += self.step_sums.masked_fill(~is_finite, 0)
        self.step_sums.zero_()

    def pause(self, seconds: float) -> None:
        """Excludes `seconds` from the measured speed, as they were not spent on training."""
        self.timed_from += seconds

    def state(self) -> list[dict[str, list[float]]]:
        """Sums and counts of each process since the latest line, for a resumed run; all processes must call it."""
        return gather_object([dict(zip(SUMS, self.sums.tolist(), strict=True))])

    def write(self, step: int, learning_rate: float) -> dict[str, Any]:
        """
        Writes a line, sends it to the trackers and starts anew; all processes must call it.

        Args:
            step (`int`): The step that has just finished.
            learning_rate (`float`): Learning rate of that step.

        Returns:
            `dict`: The line. A value without any sample, step or time is `None`.
        """
        totals = dict(zip(SUMS, self.accelerator.reduce(self.sums).tolist(), strict=True))
        seconds = time.perf_counter() - self.timed_from
        num_steps = step - self.timed_from_step

        def mean(*names: str) -> float | None:
            count = sum(totals[name][1] for name in names)
            value = sum(totals[name][0] for name in names) / count if count else math.nan
            return value if math.isfinite(value) else None  # JSON has no NaN

        line = {
            "step": step,
            "loss": mean("loss_with_prior", "loss_without_prior"),
            **{name: mean(name) for name in ("loss_with_prior", "loss_without_prior", *TIME_BINS)},
            **{name: mean(name) for name in ("alignment", "prior_alignment") if totals[name][1]},
            "grad_norm": mean("grad_norm"),
            "learning_rate": learning_rate,
            # A coarse clock stands still between quick steps.
            "images_per_second": round(num_steps * self.images_per_step / seconds, 1) if seconds > 0 else None,
            "data_wait": round(self.data_seconds / seconds, 4) if seconds > 0 else None,
        }
        append_line(self.path, line, self.accelerator)
        self.sums.zero_()
        self._start(step)
        return line


def append_line(path: Path, line: dict[str, Any], accelerator: Accelerator) -> None:
    """
    Adds a line to a file of JSON lines and to the trackers, in the main process.

    Args:
        path (`Path`): The file.
        line (`dict`): Values by name, including `step`.
        accelerator (`Accelerator`): The processes.
    """
    if accelerator.is_main_process:
        with naming_full_disk(path), open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
    accelerator.log({name: value for name, value in line.items() if value is not None}, step=line["step"])


def drop_metrics_after(path: Path, step: int) -> None:
    """Removes from the file `path` the lines after `step`, which a resumed run writes again, and damaged ones."""
    if path.exists():
        kept = "".join(json.dumps(line) + "\n" for line in read_lines(path) if line["step"] <= step)
        with replacing(path) as unfinished:
            unfinished.write_text(kept)
