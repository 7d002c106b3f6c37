# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Makes an average of the weights of any length after the training (Karras et al. 2024, arXiv:2312.02696).

It needs the checkpoints of a run with `--ema_sigma_rel 0.05 0.1`:

    python -m diffusers_dod.training.posthoc_ema --run_dir outputs/dod-b --sigma_rel 0.08 --output_dir outputs/longer
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from ..checkpoint_manifest import STATE_FOLDER, check_checkpoint
from ..checks import check_at_least, check_number
from ..command_line import run_main
from ..files import replacing_contents
from ..losses import DoDJointModel
from ..options import option, parse_options
from ..pipeline_dod import DoDPipeline
from .checkpoints import checkpoint_step, list_checkpoints
from .ema import reconstruction_weights


def find_snapshots(run_dir: Path) -> dict[tuple[int, float], Path]:
    """Files of all power-function averages in the checkpoints of `run_dir`, by step and width."""
    found = {}
    for checkpoint in list_checkpoints(run_dir):
        for path in sorted((checkpoint / STATE_FOLDER).glob("ema-sigma-rel-*.safetensors")):
            width = float(re.fullmatch(r"ema-sigma-rel-(.+)\.safetensors", path.name)[1])
            found[checkpoint_step(checkpoint), width] = path
    return found


def reconstruct(run_dir: Path, sigma_rel: float, step: int | None = None) -> tuple[DoDPipeline, float]:
    """
    Makes a pipeline whose weights are an average of any length.

    Args:
        run_dir (`Path`): Folder of the run, with its checkpoints.
        sigma_rel (`float`): Width of the average divided by the length of the training, in (0, 1 / sqrt(12)).
        step (`int`, *optional*): Last step of the average. By default the step of the last checkpoint.

    Returns:
        `tuple[DoDPipeline, float]`: The pipeline, and the relative error of its profile.

    Raises:
        `ValueError`: there are no snapshots, or none as late as `step`, a checkpoint is damaged, or an argument is out
            of range.
    """
    check_number("sigma_rel", sigma_rel, 0, 12**-0.5, open_minimum=True, open_maximum=True)
    snapshots = find_snapshots(run_dir)
    if not snapshots:
        raise ValueError(f"`run_dir` must hold checkpoints of a run with `--ema_sigma_rel`, got {run_dir}.")
    if step is None:
        step = max(snapshot[0] for snapshot in snapshots)
    check_at_least("step", step, 1)
    weights, rest = reconstruction_weights(list(snapshots), step, sigma_rel)
    for checkpoint in list_checkpoints(run_dir):
        check_checkpoint("run_dir", checkpoint)
    total: dict[str, torch.Tensor] = {}
    for weight, path in zip(weights.tolist(), snapshots.values(), strict=True):
        for name, tensor in load_file(path).items():
            part = weight * tensor.double()
            total[name] = total[name] + part if name in total else part
    pipeline = DoDPipeline.from_pretrained(list_checkpoints(run_dir)[-1])
    model = DoDJointModel(pipeline.transformer, pipeline.latent_embedder)
    model.load_state_dict({name: tensor.float() for name, tensor in total.items()})
    return pipeline, rest


@dataclass(frozen=True, kw_only=True)
class PosthocOptions:
    """Options of the command."""

    run_dir: Path = option(help="Folder of the run, with its checkpoints.")
    sigma_rel: float = option(above=0, below=12**-0.5, help="Width divided by the length of the training.")
    step: int | None = option(
        None, at_least=1, help="Last step of the average; that of the last checkpoint by default."
    )
    output_dir: Path = option(help="Folder that the pipeline goes to.")


def main(argv: list[str] | None = None) -> None:
    """Runs the command; `argv` defaults to the process's arguments. Raises a `ValueError` if they do not fit."""
    options = parse_options(PosthocOptions, argv, __doc__)
    pipeline, rest = reconstruct(options.run_dir, options.sigma_rel, options.step)
    with replacing_contents(options.output_dir, DoDPipeline.config_name) as unfinished:
        pipeline.save_pretrained(unfinished)
    print(f"Wrote {options.output_dir}. Error of the profile: {rest:.2%} of its norm.")


if __name__ == "__main__":
    run_main(main)
