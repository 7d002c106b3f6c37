# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
What sampling costs, counted, beside the figures of the paper (Tables 1 and 4):

    python -m diffusers_dod.evaluation.compute --presets DoD-B FiTv2-B --steps 30 120

A multiply-add is 2 FLOPs, and the matrix products of attention are among them. The paper's "GFLOPs" are multiply-adds
of Linears and LayerNorms, without attention; multiply-adds of Linears stand beside them. Models are on the meta
device, so that nothing is computed. docs/compute.md explains the tables.
"""

import argparse
import copy
import sys
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch.utils.flop_counter import FlopCounterMode

from ..autoencoders import Autoencoder, decode_pixels, latent_channels
from ..checks import attempt, check_at_least, check_choice, check_number, check_type
from ..guidance import Guidance, GuidedVelocity
from ..latent_embedding import LatentEmbeddingModule
from ..presets import PRESETS, Preset
from ..rectified_flow import NUM_TRAIN_TIMESTEPS
from ..scheduling_dod import DoDFlowMatchScheduler
from ..stages import Stage, plan_stages
from ..tableaus import SOLVERS
from ..training.cost import format_table
from ..transformer_dod import DoDTransformer2DModel
from .results import as_metric, check_output, write_results


@dataclass(frozen=True)
class EvaluationCost:
    """
    What one evaluation of a model costs for one image, in any unit.

    Args:
        first_stage (`float`): The backbone without a prior: in stage 1, and in the unconditional half of any stage.
        later_stages (`float`, *optional*): The backbone with a prior.
        latent_embedder (`float`, *optional*): The LEM, which runs once before each later stage.
    """

    first_stage: float
    later_stages: float | None = None
    latent_embedder: float | None = None

    def stage(self, stage: int, num_evaluations: int, num_guided_evaluations: int) -> float:
        """
        The cost of a stage for one image, with the LEM before it.

        Args:
            stage (`int`): Its number, from 1.
            num_evaluations (`int`): Evaluations of the conditional velocity.
            num_guided_evaluations (`int`): How many of them have an unconditional half as well.

        Returns:
            `float`: The cost.
        """
        unconditional = num_guided_evaluations * self.first_stage
        if stage == 1:
            return num_evaluations * self.first_stage + unconditional
        return self.latent_embedder + num_evaluations * self.later_stages + unconditional


@dataclass(frozen=True)
class ModelCost:
    """
    Size of a model, and what its evaluations cost in two units.

    Args:
        transformer_parameters (`int`): Parameters of the backbone.
        latent_embedder_parameters (`int`): Parameters of the LEM, 0 without one.
        flops ([`EvaluationCost`]): FLOPs of all matrix products, those of attention too.
        linear_macs ([`EvaluationCost`]): Multiply-adds of the Linears alone.
    """

    transformer_parameters: int
    latent_embedder_parameters: int
    flops: EvaluationCost
    linear_macs: EvaluationCost


# The paper's Table 1, in 10^6: backbone and LEM.
PAPER_PARAMETERS = {"DoD-S": (27, 21), "DoD-B": (105, 86), "DoD-XL": (527, 86)}
# Its Table 4, in 10^9 of its FLOPs: one figure for the backbone, with and without a prior.
PAPER_COSTS = {"FiTv2-B": EvaluationCost(27.3), "DoD-B": EvaluationCost(26.5, 26.5, 24.6)}
PAPER_STEPS = (30, 120)  # of each stage of a DoD; a FiTv2, of one stage, takes twice as many
GUIDED = 2.0  # any scale but 1
UNITS = ("flops", "linear_macs")
# The autoencoder of Stable Diffusion, which the paper decodes with.
SD_AUTOENCODER = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}
IMAGENET_PRESETS = tuple(name for name in PRESETS if not name.endswith("-Desk"))


def _count_operations(run: Callable[[], Any]) -> tuple[int, int]:
    """FLOPs of all matrix products, and multiply-adds of those of Linears."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    linears = (torch.ops.aten.addmm, torch.ops.aten.mm)
    counts = counter.get_flop_counts()["Global"]
    return counter.get_total_flops(), sum(counts.get(operation, 0) for operation in linears) // 2


def _latent_size(transformer: DoDTransformer2DModel, latent_size: tuple[int, int] | None) -> tuple[int, int]:
    patch_size = transformer.config.patch_size
    if latent_size is None:
        return (transformer.config.sample_size,) * 2
    if len(latent_size) != 2 or any(side < 1 or side % patch_size for side in latent_size):
        raise ValueError(f"`latent_size` must be two multiples of `patch_size` = {patch_size}, got {latent_size}.")
    return latent_size


def count_model(model: Preset | DiffusionPipeline, latent_size: tuple[int, int] | None = None) -> ModelCost:
    """
    Counts parameters and operations, by the configs alone: adapters are not among them.

    Args:
        model ([`Preset`] or [`DoDPipeline`]): The model.
        latent_size (`tuple[int, int]`, *optional*): Height and width of the latents, the trained ones if not given.

    Returns:
        [`ModelCost`], of one image.

    Raises:
        `TypeError`, `ValueError`: the model is neither, or does not take latents of this size.
    """
    check_type("model", model, (Preset, DiffusionPipeline))
    if isinstance(model, Preset):
        transformer_config, embedder_config = model.transformer_config, model.latent_embedder_config
    else:
        transformer_config = model.transformer.config
        embedder_config = None if model.latent_embedder is None else model.latent_embedder.config
    with torch.device("meta"):
        transformer = DoDTransformer2DModel.from_config(transformer_config)
        embedder = None if embedder_config is None else LatentEmbeddingModule.from_config(embedder_config)
        latents = torch.empty(1, transformer.config.in_channels, *_latent_size(transformer, latent_size))
        inputs = latents, torch.empty(1), torch.zeros(1, dtype=torch.int64)
        counts = [_count_operations(lambda: transformer(*inputs))]
        if embedder is not None:
            prior_embeds = embedder(latents).prior_embeds
            counts.append(_count_operations(lambda: transformer(*inputs, prior_embeds=prior_embeds)))
            counts.append(_count_operations(lambda: embedder(latents)))
    flops, linear_macs = (EvaluationCost(*figures) for figures in zip(*counts, strict=True))
    embedder_parameters = 0 if embedder is None else embedder.num_parameters()
    return ModelCost(transformer.num_parameters(), embedder_parameters, flops, linear_macs)


def count_decoder(vae: Autoencoder, latent_size: tuple[int, int]) -> int:
    """
    FLOPs of decoding one image, those of convolutions too.

    Args:
        vae (`AutoencoderKL`, `AutoencoderDC` or `AutoencoderRAE`): The autoencoder, of which the config is looked at.
        latent_size (`tuple[int, int]`): Height and width of the latents.

    Returns:
        `int`: The FLOPs.
    """
    with torch.device("meta"):
        vae = type(getattr(vae, "_orig_mod", vae)).from_config(vae.config)
        latents = torch.empty(1, latent_channels(vae), *latent_size)
        return _count_operations(lambda: decode_pixels(latents, vae))[0]


def _count_guided(stage: Stage, guidance: Guidance) -> int:
    """How many evaluations of the steps that a stage has laid out are guided."""
    velocity = GuidedVelocity(transformer=None, batch_size=len(stage.sigmas), guidance=guidance)
    return int(velocity.rows_to_guide(stage.sigmas * NUM_TRAIN_TIMESTEPS, stage.guidance_scale).sum())


def sampling_compute(
    model: Preset | DiffusionPipeline,
    stage_inference_steps: Sequence[int] | None = None,
    stage_guidance_scales: Sequence[float] | None = None,
    stage_solvers: Sequence[str | SchedulerMixin | None] | None = None,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    latent_size: tuple[int, int] | None = None,
    cost: ModelCost | None = None,
) -> dict[str, Any]:
    """
    What it costs to sample the latents of one image from stage 1 on. Arguments that a call of [`DoDPipeline`] has as
    well mean the same here and have the same defaults; the null condition is the default, (null class, S).

    Args:
        model ([`Preset`] or [`DoDPipeline`]): The model.
        stage_inference_steps (`Sequence[int]`, *optional*): Intervals of each stage.
        stage_guidance_scales (`Sequence[float]`, *optional*): Scale of each stage; 1 is no guidance, any other costs
            the same.
        stage_solvers (`Sequence[str | SchedulerMixin | None]`, *optional*): Solver of each stage, of fixed steps.
        guidance_interval (`tuple[float, float]`, defaults to `(0.0, 1.0)`): Guides where low <= sigma <= high only.
        latent_size (`tuple[int, int]`, *optional*): Height and width of the latents, the trained ones if not given.
        cost ([`ModelCost`], *optional*): What [`count_model`] returned before.

    Returns:
        `dict`: `flops` and `linear_macs`, the sums over `stages`, of which each has these two, with the LEM before
        it, `num_evaluations` and `num_guided_evaluations`.

    Raises:
        `TypeError`, `ValueError`: an argument is out of range, or a solver chooses its own steps.
    """
    cost = count_model(model, latent_size) if cost is None else cost
    is_preset = isinstance(model, Preset)
    defaults = model.pipeline_config if is_preset else model.config
    scheduler = DoDFlowMatchScheduler() if is_preset else copy.deepcopy(model.scheduler)
    has_embedder = cost.flops.latent_embedder is not None
    given = next((values for values in (stage_inference_steps, stage_guidance_scales) if values is not None), None)
    num_stages = len(given) if given is not None else defaults["default_num_stages"] if has_embedder else 1
    if stage_guidance_scales is None:
        unguided = [1.0] * has_embedder
        stage_guidance_scales = (unguided + [defaults["default_guidance_scale"]] * num_stages)[:num_stages]
    if num_stages < 1 or (num_stages > 1 and not has_embedder):
        accepted = ">= 1" if has_embedder else "1 without a latent embedder"
        raise ValueError(f"The number of stages must be {accepted}, got {num_stages}.")
    guidance = Guidance(interval=guidance_interval)
    planned = plan_stages(
        range(1, num_stages + 1),
        scheduler,
        defaults["default_num_inference_steps"],
        stage_guidance_scales,
        stage_inference_steps,
        copy.deepcopy(stage_solvers),
    )
    stages = []
    for stage in planned:
        num_evaluations = stage.lay_out()
        if num_evaluations is None:
            raise ValueError(
                "`stage_solvers` must hold solvers of fixed steps, whose evaluations are known before, "
                f"got {stage.scheduler.config.solver!r}."
            )
        num_guided = _count_guided(stage, guidance)
        stages.append(
            {
                "num_evaluations": num_evaluations,
                "num_guided_evaluations": num_guided,
                "flops": cost.flops.stage(stage.number, num_evaluations, num_guided),
                "linear_macs": cost.linear_macs.stage(stage.number, num_evaluations, num_guided),
            }
        )
    return {name: sum(stage[name] for stage in stages) for name in UNITS} | {"stages": stages}


def steps_within_budget(
    budget: float,
    model: Preset | DiffusionPipeline,
    stage_guidance_scales: Sequence[float],
    stage_solvers: Sequence[str | SchedulerMixin | None] | None = None,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    latent_size: tuple[int, int] | None = None,
    cost: ModelCost | None = None,
) -> int:
    """
    The most steps, as many in every stage, that cost no more than a budget: for comparisons at equal compute.

    Args:
        budget (`float`): FLOPs of one image.
        model ([`Preset`] or [`DoDPipeline`]): The model.
        stage_guidance_scales (`Sequence[float]`): Scale of each stage; 1 is no guidance.
        stage_solvers (`Sequence[str | SchedulerMixin | None]`, *optional*): Solver of each stage, of fixed steps.
        guidance_interval (`tuple[float, float]`, defaults to `(0.0, 1.0)`): Guides where low <= sigma <= high only.
        latent_size (`tuple[int, int]`, *optional*): Height and width of the latents, the trained ones if not given.
        cost ([`ModelCost`], *optional*): What [`count_model`] returned before.

    Returns:
        `int`: The number of intervals of each stage, 0 if a single one costs more.

    Raises:
        `TypeError`, `ValueError`: an argument is out of range, or a solver chooses its own steps.
    """
    check_number("budget", budget, 0)
    cost = count_model(model, latent_size) if cost is None else cost

    def flops(num_inference_steps: int) -> float:
        steps = [num_inference_steps] * len(stage_guidance_scales)
        return sampling_compute(model, steps, stage_guidance_scales, stage_solvers, guidance_interval, cost=cost)[
            "flops"
        ]

    return bisect_right(range(1, int(budget // cost.flops.first_stage) + 2), budget, key=flops)


def _variants(name: str) -> list[tuple[str, list[float]]]:
    """How a preset is sampled in the paper: a name as in Table 4, and the scale of each stage."""
    if PRESETS[name].latent_embedder_config is None:
        return [(name, [1.0]), (f"{name}-G", [GUIDED])]
    return [(f"{name} (S1)", [1.0]), (f"{name}-G (S2)", [1.0, GUIDED])]


def _by_paper(name: str, stages: Sequence[dict[str, Any]]) -> float | None:
    """A total by the paper's figures, in its GFLOPs, where it has some for the preset."""
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
            row += [_format(figure, 1e9) for figure in vars(figures).values()]
        paper = PAPER_COSTS.get(name, EvaluationCost(None))
        rows.append([*row, _format(paper.first_stage), _format(paper.latent_embedder)])
    return format_table([*header, "paper, backbone", "paper, LEM"], rows)


def compute_tables(
    presets: Sequence[str] = IMAGENET_PRESETS,
    steps: Sequence[int] = PAPER_STEPS,
    solver: str = "euler",
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    budgets: Sequence[float] | None = None,
) -> tuple[str, dict[str, dict[str, Any]]]:
    """
    Presets beside each other: what an evaluation costs, what sampling costs, and which steps cost the same.

    Args:
        presets (`Sequence[str]`, defaults to `IMAGENET_PRESETS`): Names among [`PRESETS`].
        steps (`Sequence[int]`, defaults to `PAPER_STEPS`): Numbers of steps of each stage of a DoD; a FiTv2 takes
            twice as many.
        solver (`str`, defaults to `"euler"`): One of fixed steps.
        guidance_interval (`tuple[float, float]`, defaults to `(0.0, 1.0)`): Guides where low <= sigma <= high only.
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
            stage_guidance_scales=scales,
            stage_solvers=[solver] * len(scales),
            guidance_interval=guidance_interval,
            cost=costs[name],
        )
        for name, label, scales in models
    }
    metrics = {
        f"{name}/{part}_{unit}": as_metric(figure)
        for name, cost in costs.items()
        for unit in UNITS
        for part, figure in vars(getattr(cost, unit)).items()
        if figure is not None
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

    low, high = guidance_interval
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


def main(argv: list[str] | None = None) -> None:
    """The command; `argv` are its arguments, the process's by default. All errors are reported at once."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--presets", nargs="+", default=list(IMAGENET_PRESETS), choices=list(PRESETS))
    parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        default=list(PAPER_STEPS),
        help="Steps of each stage of a DoD; a FiTv2, of one stage, takes twice as many, as in Table 4.",
    )
    fixed_steps = [name for name, solver in SOLVERS.items() if not (solver.is_adaptive or solver.is_stochastic)]
    parser.add_argument("--solver", default="euler", choices=fixed_steps)
    parser.add_argument(
        "--guidance_interval", type=float, nargs=2, default=[0.0, 1.0], help="Sigmas between which guided stages are."
    )
    parser.add_argument(
        "--budget_gflops",
        type=float,
        nargs="+",
        help="Of one image, for steps that cost the same; those of the first FiTv2, guided, by default.",
    )
    parser.add_argument("--output_file", type=Path, help="JSON file that the numbers go to as well.")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    errors: list[str] = []
    for value in args.steps:
        attempt(errors, check_at_least, "steps", value, 1)
    for value in args.budget_gflops or ():
        attempt(errors, check_number, "budget_gflops", value, 0)
    attempt(errors, Guidance, "class_and_prior", None, None, args.guidance_interval)
    attempt(errors, check_output, "output_file", args.output_file)
    if errors:
        parser.error("\n".join(errors))
    budgets = None if args.budget_gflops is None else [1e9 * value for value in args.budget_gflops]
    interval = tuple(args.guidance_interval)
    text, metrics = compute_tables(list(dict.fromkeys(args.presets)), args.steps, args.solver, interval, budgets)
    print(text)
    if args.output_file is not None:
        settings = {"flops_per_multiply_add": 2, "linear_macs": "multiply-adds of Linears alone"}
        write_results(args.output_file, "compute", argv, metrics, {}, settings, "meta")


if __name__ == "__main__":
    main()
