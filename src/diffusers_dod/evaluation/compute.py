# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Counts the cost of sampling, beside the figures of the paper (Tables 1 and 4):

    python -m diffusers_dod.evaluation.compute --presets DoD-B FiTv2-B --steps 30 120

A multiply-add is 2 FLOPs. FLOPs include the matrix products of attention. The paper's "GFLOPs" are multiply-adds of
Linears and LayerNorms, without attention; multiply-adds of Linears are printed beside them. Models are on the meta
device, so that nothing is computed. docs/compute.md explains the tables.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checks import attempt, check_choice
from ..command_line import run_main
from ..compute import UNITS, EvaluationCost, ModelCost, count_model, sampling_compute, steps_within_budget
from ..guidance import Guidance
from ..guidance_options import build_guidance, guidance_option
from ..options import option, parse_options
from ..presets import PRESETS
from ..results import as_metric, write_results
from ..tableaus import SOLVERS
from ..tables import format_table


# The paper's Table 1, in 10^6: backbone and LEM.
PAPER_PARAMETERS = {"DoD-S": (27, 21), "DoD-B": (105, 86), "DoD-XL": (527, 86)}
# Its Table 4, in 10^9 of its FLOPs: one figure for the backbone, with and without a prior.
PAPER_COSTS = {"FiTv2-B": EvaluationCost(27.3), "DoD-B": EvaluationCost(26.5, 26.5, 24.6)}
PAPER_STEPS = (30, 120)  # of each stage of a DoD; a FiTv2, of one stage, takes twice as many
GUIDED = 2.0  # any scale but 1
PARTS = ("first_stage", "later_stages", "latent_embedder")  # of the costs of an evaluation
IMAGENET_PRESETS = tuple(name for name in PRESETS if not name.endswith("-Desk"))


def _variants(name: str) -> list[tuple[str, list[float]]]:
    """Ways in which the paper samples a preset: a name as in Table 4, and the scale of each stage."""
    if PRESETS[name].latent_embedder_config is None:
        return [(name, [1.0]), (f"{name}-G", [GUIDED])]
    return [(f"{name} (S1)", [1.0]), (f"{name}-G (S2)", [1.0, GUIDED])]


def _by_paper(name: str, stages: Sequence[dict[str, Any]]) -> float | None:
    """A total by the paper's figures, in its GFLOPs; `None` if it has none for the preset."""
    if name not in PAPER_COSTS:
        return None
    return sum(
        PAPER_COSTS[name].stage(number, stage["num_evaluations"], stage["num_guided_evaluations"])
        for number, stage in enumerate(stages, start=1)
    )


def _format(value: float | None, unit: float = 1.0) -> str:
    if value is None:
        return "-"
    value = value / unit
    return f"{value:,.1f}" if value == 0 or value >= 10 else f"{value:#.3g}"


def _evaluation_table(costs: dict[str, ModelCost]) -> str:
    header = ["model", "backbone, M", "LEM, M", "paper, M"]
    header += [f"{part}, {unit}" for unit in ("GMACs", "GFLOPs") for part in ("stage 1", "stage 2", "LEM")]
    rows = []
    for name, cost in costs.items():
        row = [name, *(_format(size, 1e6) for size in (cost.transformer_parameters, cost.latent_embedder_parameters))]
        row.append(" + ".join(map(str, PAPER_PARAMETERS[name])) if name in PAPER_PARAMETERS else "-")
        for figures in (cost.linear_macs, cost.flops):
            row += [_format(getattr(figures, part), 1e9) for part in PARTS]
        paper = PAPER_COSTS.get(name, EvaluationCost(None))
        rows.append([*row, _format(paper.first_stage), _format(paper.latent_embedder)])
    return format_table([*header, "paper, backbone", "paper, LEM"], rows)


def compute_tables(
    presets: Sequence[str] = IMAGENET_PRESETS,
    steps: Sequence[int] = PAPER_STEPS,
    solver: str = "euler",
    guidance: Guidance | None = None,
    budgets: Sequence[float] | None = None,
) -> tuple[str, dict[str, dict[str, Any]]]:
    """
    Compares presets: the cost of an evaluation, the cost of sampling, and steps of equal cost.

    Args:
        presets (`Sequence[str]`, defaults to `IMAGENET_PRESETS`): Names among [`PRESETS`].
        steps (`Sequence[int]`, defaults to `PAPER_STEPS`): Numbers of steps of each stage of a DoD; a FiTv2 takes
            twice as many.
        solver (`str`, defaults to `"euler"`): One of fixed steps.
        guidance ([`Guidance`], *optional*): Guidance of guided stages, see [`sampling_compute`].
        budgets (`Sequence[float]`, *optional*): FLOPs of one image; those of the first FiTv2, guided, with each
            number of steps, if not given.

    Returns:
        `tuple[str, dict]`: The tables as Markdown, and their numbers by name, as [`as_metric`] returns them.

    Raises:
        `TypeError`, `ValueError`: an argument is out of range.
    """
    for name in presets:
        check_choice("presets", name, tuple(PRESETS))
    costs = {name: count_model(PRESETS[name]) for name in presets}
    models = [(name, *variant) for name in presets for variant in _variants(name)]
    settings = {
        label: dict(
            guidance_scale=scales,
            schedulers=solver,
            guidance=guidance,
            cost=costs[name],
        )
        for name, label, scales in models
    }
    metrics = {
        f"{name}/{part}_{unit}": as_metric(figure)
        for name, cost in costs.items()
        for unit in UNITS
        for part in PARTS
        if (figure := getattr(getattr(cost, unit), part)) is not None
    }

    sampling: list[list[str]] = []
    references: dict[str, list[float]] = {}
    for number in steps:
        for name, label, scales in models:
            is_plain = PRESETS[name].latent_embedder_config is None
            per_stage = [2 * number] if is_plain else [number] * len(scales)
            found = sampling_compute(PRESETS[name], per_stage, **settings[label])
            stages = found["stages"]
            row = [label, " + ".join(map(str, per_stage))]
            row += [str(sum(stage[f"num_{kind}evaluations"] for stage in stages)) for kind in ("", "guided_")]
            row += [_format(found["linear_macs"], 1e9), _format(found["flops"], 1e9)]
            sampling.append([*row, _format(_by_paper(name, stages))])
            metrics |= {f"{label}/{sum(per_stage)}_steps_{unit}": as_metric(found[unit]) for unit in UNITS}
            if is_plain and scales == [GUIDED]:
                references.setdefault(label, []).append(found["flops"])
    if budgets is None:
        budgets = next(iter(references.values()), [])
    equal = []
    for name, label, scales in models:
        numbers = [steps_within_budget(budget, PRESETS[name], **settings[label]) for budget in budgets]
        metrics |= {
            f"{label}/steps_within_{budget:.0f}_flops": as_metric(number)
            for budget, number in zip(budgets, numbers, strict=True)
        }
        equal.append([label, *(" + ".join([str(number)] * len(scales)) if number else "-" for number in numbers)])

    low, high = (guidance or Guidance()).interval
    parts = [
        "Parameters, and one evaluation of one image (counted; and as the paper prints them)",
        _evaluation_table(costs),
        f"Sampling of one image with {solver}, guided where {low:g} <= sigma <= {high:g} (counted; and by the paper's "
        "figures for an evaluation)",
        format_table(["model", "steps", "evaluations", "guided", "GMACs", "GFLOPs", "by the paper's"], sampling),
    ]
    if budgets:
        parts += [
            "Steps of each stage within a budget for one image (computed)",
            format_table(["model", *(f"{_format(budget, 1e9)} GFLOPs" for budget in budgets)], equal),
        ]
    return "\n\n".join(parts), metrics


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """Options of the command."""

    presets: tuple[str, ...] = option(IMAGENET_PRESETS, choices=PRESETS, help="Models to compare.")
    steps: tuple[int, ...] = option(
        PAPER_STEPS,
        at_least=1,
        help="Steps of each stage of a DoD; a FiTv2, of one stage, takes twice as many, as in Table 4.",
    )
    solver: str = option(
        "euler",
        choices=[name for name, solver in SOLVERS.items() if not (solver.is_adaptive or solver.is_stochastic)],
        help="Solver of all stages.",
    )
    guidance_interval: tuple[float, float] = guidance_option("guidance_interval")
    budget_gflops: tuple[float, ...] | None = option(
        None,
        at_least=0,
        help="GFLOPs of one image, for steps that cost the same; those of the first FiTv2, guided, by default.",
    )
    output_file: Path | None = option(None, writes="file", help="JSON file that the numbers go to as well.")

    def find_conflicts(self) -> list[str]:
        """Messages about options that do not fit each other."""
        errors: list[str] = []
        attempt(errors, build_guidance, {"guidance_interval": self.guidance_interval})
        return errors


def main(argv: list[str] | None = None) -> None:
    """Runs the command; `argv` defaults to the process's arguments. All errors are reported at once."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse_options(ComputeOptions, argv, __doc__)
    budgets = None if options.budget_gflops is None else [1e9 * value for value in options.budget_gflops]
    text, metrics = compute_tables(
        list(dict.fromkeys(options.presets)),
        options.steps,
        options.solver,
        build_guidance({"guidance_interval": options.guidance_interval}),
        budgets,
    )
    print(text)
    if options.output_file is not None:
        write_results(
            options.output_file,
            task="compute",
            argv=argv,
            metrics=metrics,
            data={},
            settings={"flops_per_multiply_add": 2, "linear_macs": "multiply-adds of Linears alone"},
            device="meta",
        )


if __name__ == "__main__":
    run_main(main)
