# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Draws the curves of one or several runs from their metrics; needs matplotlib:

    python -m diffusers_dod.training.plot_metrics outputs/dod-b outputs/fitv2-b --output outputs/curves.png
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..command_line import run_main
from ..files import METRICS_FILE, replacing
from ..options import option, parse_options
from ..records import read_lines
from .run_metrics import EVALUATIONS


PANELS = {
    "loss": ("loss",),
    "loss with and without a prior": ("loss_with_prior", "loss_without_prior"),
    "loss by time (sigma)": (
        "loss_sigma_0.00_0.25",
        "loss_sigma_0.25_0.50",
        "loss_sigma_0.50_0.75",
        "loss_sigma_0.75_1.00",
    ),
    "norm of the gradients": ("grad_norm",),
    "learning rate": ("learning_rate",),
    "images per second": ("images_per_second",),
    "alignment": ("alignment", "prior_alignment"),
    "Fréchet distance": ("fid_stage_1", "fid_stage_2", "fid_stage_3"),
}
NUM_COLUMNS = 3


def read_metrics(run_dir: Path) -> list[dict[str, float | None]]:
    """
    Reads the metrics of a run, and after them its evaluations.

    Args:
        run_dir (`Path`): Folder of the run.

    Returns:
        `list[dict]`: A dict for each line.

    Raises:
        `ValueError`: the run has no metrics.
    """
    metrics, evaluations = (read_lines(run_dir / name) for name in (METRICS_FILE, EVALUATIONS))
    if not metrics:
        raise ValueError(f"`run_dirs` must hold runs with metrics, got {run_dir} without a line in {METRICS_FILE}.")
    return metrics + evaluations


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """The running mean of `values` over the last `width` of them."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    starts = np.maximum(np.arange(1, len(sums)) - width, 0)
    return (sums[1:] - sums[starts]) / (np.arange(1, len(sums)) - starts)


def plot_metrics(run_dirs: Sequence[Path], output: Path, smoothing: int = 1) -> None:
    """
    Draws the curves of runs into one figure.

    Args:
        run_dirs (`Sequence[Path]`): Folders of the runs.
        output (`Path`): File of the figure.
        smoothing (`int`, defaults to 1): Number of lines of metrics that a point averages. Learning rates and Fréchet
            distances are drawn as they are.

    Raises:
        `ValueError`: a run has no metrics.
    """
    runs = {run_dir.name: read_metrics(run_dir) for run_dir in run_dirs}
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    known = {name for lines in runs.values() for line in lines for name, value in line.items() if value is not None}
    panels = {title: names for title, names in PANELS.items() if known & set(names)}
    num_rows = -(-len(panels) // NUM_COLUMNS)
    figure, axes = plt.subplots(num_rows, NUM_COLUMNS, figsize=(15, 4 * num_rows), layout="constrained", squeeze=False)
    for panel in axes.flat[len(panels) :]:
        panel.set_axis_off()
    for panel, (title, names) in zip(axes.flat, panels.items(), strict=False):
        for run, lines in runs.items():
            for name in names:
                points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
                if points:
                    steps, values = np.array(points).T
                    label = ", ".join([run] * (len(runs) > 1) + [name] * (len(names) > 1))
                    # A learning rate has no noise, and there are few distances, each from many samples.
                    width = 1 if name == "learning_rate" or name.startswith("fid") else smoothing
                    panel.plot(steps, smooth(values, width), label=label or None, linewidth=1.2)
        panel.set(title=title, xlabel="step")
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[1]:
            panel.legend(fontsize=8)
    with replacing(output) as unfinished:
        figure.savefig(unfinished, dpi=120)
    plt.close(figure)


@dataclass(frozen=True, kw_only=True)
class PlotOptions:
    """Options of the command."""

    run_dirs: tuple[Path, ...] = option(is_positional=True, help="Folders of the runs.")
    output: Path = option(help="File of the figure.")
    smoothing: int = option(1, at_least=1, help="Number of lines that a point averages.")


def main(argv: list[str] | None = None) -> None:
    """Runs the command; `argv` defaults to the process's arguments. Raises a `ValueError` if they do not fit."""
    options = parse_options(PlotOptions, argv, __doc__)
    plot_metrics(options.run_dirs, options.output, options.smoothing)
    print(f"Wrote {options.output}.")


if __name__ == "__main__":
    run_main(main)
