# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""What sampling costs, against the paper's figures and against what real pipelines do."""

import dataclasses
import inspect
import json
import re
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from helpers import says, tiny_pipeline, tiny_token_prior
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffusers_dod import DoDFlowMatchScheduler, DoDTransformer2DModel, Guidance, LatentEmbeddingModule
from diffusers_dod.autoencoders import decode_pixels
from diffusers_dod.compute import (
    ModelCost,
    _counted_once,
    count_flops,
    count_model,
    sampling_compute,
    steps_within_budget,
    training_cost,
)
from diffusers_dod.evaluation import compute
from diffusers_dod.evaluation.compute import GUIDED, PAPER_COSTS
from diffusers_dod.losses import DoDJointModel
from diffusers_dod.presets import PRESETS
from diffusers_dod.results import read_results


ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "compute.md").read_text()
# The autoencoder of Stable Diffusion, which the paper decodes with.
SD_AUTOENCODER = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}
DESK = ["--presets", "DoD-Desk", "FiTv2-Desk", "--steps", "10", "20"]


@lru_cache
def cost_of(name: str) -> ModelCost:
    return count_model(PRESETS[name])


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def sample(pipe, labels=(0, 1, 2), **kwargs):
    return pipe(list(labels), output_type=kwargs.pop("output_type", "latent"), seed=0, **kwargs)


# --------------------------------------------------------------------------------------------------------- the paper


@pytest.mark.parametrize(
    ("name", "steps", "scales", "total"),
    [
        ("FiTv2-B", [60], [1.0], 1638),
        ("FiTv2-B", [60], [1.5], 3276),
        ("DoD-B", [30], [1.0], 795),
        ("DoD-B", [30, 30], [1.0, 5.5], 2409.6),
        ("FiTv2-B", [240], [1.0], 6552),
        ("FiTv2-B", [240], [1.5], 13104),
        ("DoD-B", [120], [1.0], 3180),
        ("DoD-B", [120, 120], [1.0, 5.5], 9564.6),
    ],
)
def test_table_4(name, steps, scales, total):
    """The evaluations that are counted, at the paper's cost of one, make its totals."""
    stages = sampling_compute(PRESETS[name], steps, scales, cost=cost_of(name))["stages"]
    assert round(compute._by_paper(name, stages), 6) == total


def layer_norm_operations(model: torch.nn.Module, *inputs) -> int:
    """4 per number, and 5 with a weight and a bias."""
    total = 0

    def add(module, _, output):
        nonlocal total
        total += output.numel() * (4 if module.weight is None else 5)

    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.register_forward_hook(add)
    model(*inputs)
    return total


@pytest.mark.parametrize("name", PAPER_COSTS)
def test_figures_of_the_paper_are_multiply_adds_of_linears_and_layer_norms(name):
    preset, macs, paper = PRESETS[name], cost_of(name).linear_macs, PAPER_COSTS[name]
    with torch.device("meta"):
        latents = torch.empty(1, 4, 32, 32)
        transformer = DoDTransformer2DModel(**preset.transformer_config)
        norms = layer_norm_operations(transformer, latents, torch.empty(1), torch.zeros(1, dtype=torch.int64))
        assert round((max(macs.first_stage, macs.later_stages or 0) + norms) / 1e9, 1) == paper.first_stage
        if preset.latent_embedder_config is not None:
            norms = layer_norm_operations(LatentEmbeddingModule(**preset.latent_embedder_config), latents)
            assert round((macs.latent_embedder + norms) / 1e9, 1) == paper.latent_embedder


@pytest.mark.parametrize("name", ["DoD-Desk", "FiTv2-Desk"])
def test_a_model_costs_what_training_counts(name):
    preset, cost = PRESETS[name], cost_of(name)
    with torch.device("meta"):
        embedder = preset.latent_embedder_config and LatentEmbeddingModule(**preset.latent_embedder_config)
        model = DoDJointModel(DoDTransformer2DModel(**preset.transformer_config), embedder)
    assert count_flops(model, (4, 8, 8), 0)[0] == cost.flops.first_stage
    assert cost.transformer_parameters == sum(weight.numel() for weight in model.transformer.parameters())
    if embedder is not None:
        assert count_flops(model, (4, 8, 8), 1)[0] == cost.flops.later_stages + cost.flops.latent_embedder
        assert cost.latent_embedder_parameters == sum(weight.numel() for weight in embedder.parameters())


# ----------------------------------------------------------------------------------------------------- real pipelines


SETTINGS = {
    "paper": {"num_inference_steps": [3, 4], "guidance_scale": [1.0, 5.5]},
    "unguided": {"num_inference_steps": [3, 2], "guidance_scale": [1.0, 1.0]},
    "guided": {"num_inference_steps": [4, 3], "guidance_scale": [2.0, 0.0]},
    "stage 1": {"num_inference_steps": [3], "guidance_scale": [2.0]},
    "stage 3": {"num_inference_steps": [1, 2, 3], "guidance_scale": [1.0, 2.0, 3.0]},
    "interval": {
        "num_inference_steps": [10, 8],
        "guidance_scale": [2.0, 2.0],
        "guidance": Guidance(interval=(0.3, 0.75)),
    },
}
SOLVERS = {
    "default": None,
    "heun": "heun",
    "midpoint": "midpoint",
    "rk4": "rk4",
    "euler_maruyama": "euler_maruyama",
    "stochastic_heun": "stochastic_heun",
    "shifted": DoDFlowMatchScheduler(solver="heun", shift=3.0, num_train_timesteps=100),
    "Diffusers' Euler": FlowMatchEulerDiscreteScheduler(shift=2.0),
    "Diffusers' Heun": FlowMatchHeunDiscreteScheduler(),
    "Diffusers' DPM": DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", final_sigmas_type="zero"
    ),
}


def counts_of(statistics) -> list[tuple[int, int]]:
    return [(int(stage.num_evaluations[0]), int(stage.num_guided_evaluations[0])) for stage in statistics]


@pytest.mark.parametrize(
    ("setting", "solver"),
    [(setting, "default") for setting in SETTINGS]
    + [("interval", solver) for solver in SOLVERS if solver != "default"],
)
def test_evaluations_are_those_of_the_pipeline(pipe, setting, solver):
    kwargs = SETTINGS[setting] | {"schedulers": [SOLVERS[solver]] * len(SETTINGS[setting]["num_inference_steps"])}
    found = sampling_compute(pipe, **kwargs)
    output = sample(pipe, num_stages=len(found["stages"]), **kwargs)
    counts = [(stage["num_evaluations"], stage["num_guided_evaluations"]) for stage in found["stages"]]
    assert counts == counts_of(output.statistics)
    if setting == "interval":
        assert all(0 < guided < evaluations for evaluations, guided in counts)


@pytest.mark.parametrize("is_plain", [False, True])
def test_defaults_are_those_of_a_call(is_plain):
    kwargs = {"latent_embedder": None} if is_plain else {"default_num_stages": 3}
    pipe = tiny_pipeline(default_num_inference_steps=3, **kwargs)
    found = sampling_compute(pipe)
    assert [(s["num_evaluations"], s["num_guided_evaluations"]) for s in found["stages"]] == counts_of(
        sample(pipe).statistics
    )
    assert len(found["stages"]) == (1 if is_plain else 3)


def count_call(run) -> int:
    """FLOPs of a real call; fused attention on the CPU is not known to the counter."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def count_decoder(vae: AutoencoderKL, latents: torch.Tensor) -> int:
    """FLOPs of decoding, those of convolutions too."""
    with torch.no_grad():
        return count_call(lambda: decode_pixels(latents, vae))


@pytest.mark.parametrize("setting", SETTINGS)
def test_flops_are_those_of_a_call(pipe, setting):
    kwargs = SETTINGS[setting]
    found = sampling_compute(pipe, **kwargs)
    assert count_call(lambda: sample(pipe, num_stages=len(found["stages"]), **kwargs)) == 3 * found["flops"]
    assert found["flops"] == sum(stage["flops"] for stage in found["stages"])


@pytest.mark.parametrize("has_prior", [True, False])
def test_flops_of_a_weaker_model_are_those_of_a_call(pipe, has_prior):
    config = {"num_layers": 1, "sample_size": 4} | ({} if has_prior else {"prior_embed_dim": None})
    weaker = DoDTransformer2DModel.from_config(pipe.transformer.config, **config).eval()
    kwargs = SETTINGS["guided"] | {"guidance": Guidance(transformer=weaker)}
    found = sampling_compute(pipe, **kwargs)
    assert count_call(lambda: sample(pipe, num_stages=2, **kwargs)) == 3 * found["flops"]
    assert found["flops"] < sampling_compute(pipe, **SETTINGS["guided"])["flops"]


def test_flops_of_another_size_and_of_the_decoder(pipe):
    found = sampling_compute(pipe, latent_size=(12, 8))
    images = count_call(lambda: sample(pipe, [0], height=24, width=16, output_type="pt"))
    assert images == found["flops"] + count_decoder(pipe.vae, torch.empty(1, pipe.vae.config.latent_channels, 12, 8))
    assert found["flops"] > sampling_compute(pipe)["flops"]


@pytest.mark.parametrize(
    "settings",
    [{}, {"token_prior_num_inference_steps": 3}, {"token_prior_guidance_scale": 2.0, "num_inference_steps": [2, 1]}],
)
def test_flops_of_a_token_prior_are_those_of_a_call(settings):
    pipe = tiny_pipeline(token_prior=tiny_token_prior(), default_num_inference_steps=2)
    found = sampling_compute(pipe, use_token_prior=True, **settings)
    assert len(found["stages"]) == len(settings.get("num_inference_steps", [2]))
    num_stages = 1 + len(found["stages"])
    call = settings | {"use_token_prior": True, "num_stages": num_stages, "token_prior_truncation": 0.5}
    assert count_call(lambda: sample(pipe, **call)) == 3 * found["flops"]
    steps = settings.get("token_prior_num_inference_steps", 50)
    guided = steps if "token_prior_guidance_scale" in settings else 0
    own = found["token_prior"]
    assert (own["num_evaluations"], own["num_guided_evaluations"]) == (steps, guided)
    assert found["linear_macs"] == own["linear_macs"] + sum(stage["linear_macs"] for stage in found["stages"])
    assert found["flops"] < sampling_compute(pipe, [2] * num_stages)["flops"]


def test_an_adaptive_solver_is_counted_by_its_statistics():
    pipe = tiny_pipeline(scheduler=DoDFlowMatchScheduler(solver="dopri5", rtol=1e-2, atol=1e-2))
    with pytest.raises(ValueError, match=says("`schedulers`", "fixed steps", "'dopri5'")):
        sampling_compute(pipe)
    outputs = []
    flops = count_call(lambda: outputs.append(sample(pipe)))
    cost = count_model(pipe).flops
    stages = enumerate(outputs[0].statistics, start=1)
    assert flops == sum(
        cost.stage(number, stage.num_evaluations, stage.num_guided_evaluations).sum() for number, stage in stages
    )


def test_the_pipeline_is_left_alone(pipe):
    pipe.scheduler.set_timesteps(7)
    sampling_compute(pipe, [3, 2])
    assert pipe.scheduler.num_inference_steps == 7


def test_the_same_is_counted_once(pipe):
    """What has another config, another size or another class of the same name is not the same."""
    assert count_model(pipe) is count_model(tiny_pipeline())
    assert inspect.unwrap(training_cost) is not training_cost
    counted = []
    count = _counted_once(lambda preset, size=None: counted.append(preset) or len(counted))
    first, second = (type("Embedder", (LatentEmbeddingModule,), {}) for _ in range(2))
    preset = dataclasses.replace(PRESETS["DoD-Desk"].override(), latent_embedder_class=first)
    assert [count(preset), count(preset.override()), count(preset)] == [1, 1, 1]
    assert [count(preset, 8), count(preset.override(num_layers=2)), count(PRESETS["DoD-Desk"])] == [2, 3, 4]
    assert count(dataclasses.replace(preset, latent_embedder_class=second)) == 5
    preset.transformer_config["num_layers"] = 3
    assert count(preset) == 6


# ------------------------------------------------------------------------------------------------------ equal compute


@pytest.mark.parametrize("scales", [[1.0], [1.0, GUIDED], [GUIDED, GUIDED, 1.0]])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.7)])
def test_steps_are_the_most_within_the_budget(scales, interval):
    preset, cost = PRESETS["DoD-Desk"], cost_of("DoD-Desk")
    for budget in (3.1e8, 2.7e9, 1.9e10):
        number = steps_within_budget(budget, preset, scales, guidance=Guidance(interval=interval), cost=cost)
        less, more = (
            sampling_compute(preset, [steps] * len(scales), scales, guidance=Guidance(interval=interval), cost=cost)[
                "flops"
            ]
            for steps in (number, number + 1)
        )
        assert less <= budget < more


def test_a_budget_may_be_met_exactly_or_be_too_small():
    preset, cost = PRESETS["DoD-Desk"], cost_of("DoD-Desk")
    exact = sampling_compute(preset, [12, 12], [1.0, GUIDED], cost=cost)["flops"]
    assert [steps_within_budget(exact - less, preset, [1.0, GUIDED], cost=cost) for less in (0, 1)] == [12, 11]
    assert steps_within_budget(1e6, preset, [1.0], cost=cost) == 0
    with pytest.raises(ValueError, match=says("`budget`", "[0, inf)", "-1")):
        steps_within_budget(-1, preset, [1.0], cost=cost)


def test_the_claim_of_the_paper():
    """At the same number of steps DoD-B takes less than FiTv2-B, both guided: 65 % by the FLOPs that are counted."""
    dod = sampling_compute(PRESETS["DoD-B"], [30, 30], [1.0, 5.5], cost=cost_of("DoD-B"))
    fit = sampling_compute(PRESETS["FiTv2-B"], [60], [1.5], cost=cost_of("FiTv2-B"))
    assert dod["flops"] / fit["flops"] == pytest.approx(0.648, abs=1e-3)
    assert dod["linear_macs"] / fit["linear_macs"] == pytest.approx(0.650, abs=1e-3)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("kwargs", "fragments"),
    [
        ({"num_inference_steps": [0, 1]}, ["`num_inference_steps`", ">= 1", "got 0"]),
        ({"guidance_scale": [1.0, -1.0]}, ["`guidance_scale`", "[0, inf)", "-1.0"]),
        (
            {"num_inference_steps": [1, 1], "guidance_scale": [1.0]},
            ["`guidance_scale`", "list of 2", "got a list of 1"],
        ),
        ({"num_inference_steps": []}, ["stages", ">= 1", "got 0"]),
        ({"schedulers": ["euler"], "num_inference_steps": [1, 1]}, ["`schedulers`", "list of 2", "got a list of 1"]),
        ({"schedulers": ["euler", "leapfrog"]}, ["`schedulers`", "'euler'", "'leapfrog'"]),
        ({"guidance": Guidance(cosine_threshold=0.9)}, ["`guidance`", "known before", "cosine_threshold=0.9"]),
        ({"guidance": Guidance(prior_scale=2.0)}, ["`guidance`", "known before", "prior_scale=2.0"]),
        ({"guidance": Guidance(null_condition="class")}, ["`guidance`", "known before", "null_condition='class'"]),
        ({"use_token_prior": True}, ["`use_token_prior`", "without a `token_prior`"]),
        ({"token_prior_num_inference_steps": 3}, ["`token_prior_num_inference_steps`", "without `use_token_prior`"]),
        ({"latent_size": (8, 7)}, ["`latent_size`", "`patch_size` = 2", "(8, 7)"]),
    ],
)
def test_bad_arguments_are_named(pipe, kwargs, fragments):
    with pytest.raises(ValueError, match=says(*fragments)):
        sampling_compute(pipe, **kwargs)


def test_bad_models_are_named():
    with pytest.raises(TypeError, match=says("`model`", "Preset", "'DoD-B'")):
        sampling_compute("DoD-B")
    with pytest.raises(ValueError, match=says("1 without a latent embedder", "got 2")):
        sampling_compute(PRESETS["FiTv2-Desk"], [1, 1], cost=cost_of("FiTv2-Desk"))
    with pytest.raises(ValueError, match=says("`presets`", "'DoD-B'", "'DoD-M'")):
        compute.compute_tables(["DoD-M"])


# ------------------------------------------------------------------------------------------- command and documentation


def test_the_tables_of_the_documentation_are_those_of_the_command(capsys):
    compute.main(["--presets", "DoD-B", "FiTv2-B"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 20 and [row for row in rows if row not in DOCUMENT.splitlines()] == []


@pytest.mark.slow
def test_the_documentation_has_all_that_the_command_prints(capsys):
    compute.main([])
    assert capsys.readouterr().out.strip() in DOCUMENT


def test_the_tables_of_desk_size(capsys):
    compute.main(DESK)
    assert capsys.readouterr().out.strip() in DOCUMENT
    assert f"diffusers_dod.evaluation.compute {' '.join(DESK)}" in DOCUMENT


def test_the_decoder_in_the_documentation():
    with torch.device("meta"):
        flops = count_decoder(AutoencoderKL(**SD_AUTOENCODER), torch.empty(1, 4, 32, 32))
    assert f"{flops / 1e9:.0f} GFLOPs" in DOCUMENT


def test_numbers_are_written(tmp_path, capsys):
    argv = [*DESK, "--solver", "heun", "--guidance_interval", "0", "0.5", "--budget_gflops", "1", "0.001"]
    argv += ["--output_file", str(tmp_path / "compute.json")]
    compute.main(argv)
    printed = capsys.readouterr().out
    results = read_results(tmp_path / "compute.json")
    assert results["task"] == "compute" and results["argv"] == argv
    again = tmp_path / "again.json"
    compute.main([*results["argv"][:-1], str(again)])
    assert json.loads(again.read_text())["metrics"] == results["metrics"]
    preset, cost = PRESETS["DoD-Desk"], cost_of("DoD-Desk")
    found = sampling_compute(preset, [10, 10], [1.0, GUIDED], ["heun"] * 2, Guidance(interval=(0.0, 0.5)), cost=cost)
    assert results["metrics"]["DoD-Desk-G (S2)/20_steps_flops"]["value"] == found["flops"]
    assert f"| DoD-Desk-G (S2) | 10 + 10 | 40 | {found['stages'][1]['num_guided_evaluations']} |" in printed
    assert "with heun, guided where 0 <= sigma <= 0.5" in printed
    assert re.search(r"^\| FiTv2-Desk-G \| \d+ \| - \|$", printed, re.MULTILINE)


def test_all_errors_are_reported_at_once(capsys):
    with pytest.raises(SystemExit):
        compute.main(["--steps", "0", "--budget_gflops", "-1", "--guidance_interval", "1", "0"])
    message = capsys.readouterr().err
    assert all(name in message for name in ("`steps`", "`budget_gflops`", "`guidance_interval`"))
