"""Steps that are left out: counted on the device, and made by no optimizer."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from helpers import fresh_accelerator, normal

from diffusers_dod.options import from_values
from diffusers_dod.training import accelerator as accelerator_module
from diffusers_dod.training.ema import WeightAverage
from diffusers_dod.training.models import step_optimizer
from diffusers_dod.training.nonfinite import NonfiniteCounts, NonfiniteSteps
from diffusers_dod.training.train import Trainer
from diffusers_dod.training_options import TrainingOptions


def count(steps: NonfiniteSteps, are_finite: list[bool], first: int = 1) -> NonfiniteCounts:
    for step, is_finite in enumerate(are_finite, first):
        steps.add(step, torch.tensor(is_finite))
    return steps.read()


def test_steps_are_counted_and_rows_of_them():
    steps = NonfiniteSteps(torch.device("cpu"))
    assert count(steps, [True, True]) == NonfiniteCounts()
    assert count(steps, [False, False, True, False], 3) == NonfiniteCounts(total=3, in_a_row=1, longest=2, latest=6)
    assert count(steps, [False, True], 7) == NonfiniteCounts(total=4, in_a_row=0, longest=2, latest=7)
    assert count(steps, [True], 9) == NonfiniteCounts(total=4, in_a_row=0, longest=0, latest=7)


def test_counts_go_on_after_a_resume():
    steps = NonfiniteSteps(torch.device("cpu"), NonfiniteCounts(total=5, in_a_row=3, latest=8))
    assert steps.known.total == 5
    assert count(steps, [False], 9) == NonfiniteCounts(total=6, in_a_row=4, longest=4, latest=9)


@pytest.mark.parametrize("fused", [True, False])
def test_an_optimizer_leaves_a_step_out(fused):
    """Weights, moments and number of steps stay as they are, to the bit; later steps are as without it."""
    weights = []
    for kinds in ([True, False, True], [True, True]):
        with fresh_accelerator():
            weight = torch.nn.Parameter(normal(4, 3))
            optimizer = Accelerator().prepare(torch.optim.AdamW([weight], lr=0.1, fused=fused))
            for number, is_finite in enumerate(kinds):
                before = [value.clone() for value in (weight, *optimizer.state[weight].values())]
                weight.grad = normal(4, 3, seed=sum(kinds[:number])) if is_finite else torch.full((4, 3), torch.nan)
                step_optimizer(optimizer, weight.grad.isfinite().all())
                if not is_finite:
                    after = (weight, *optimizer.state[weight].values())
                    assert len(after) == 4 and all(map(torch.equal, before, after))
            weights.append(weight)
    assert torch.equal(*weights) and not torch.equal(weights[0], normal(4, 3))


def test_deepspeed_leaves_out_steps_of_bf16(tmp_path, monkeypatch):
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}})
    accelerator = SimpleNamespace(
        state=SimpleNamespace(deepspeed_plugin=plugin),
        distributed_type=SimpleNamespace(value="DEEPSPEED"),
        mixed_precision="bf16",
        gradient_accumulation_steps=1,
        num_processes=1,
    )
    monkeypatch.setattr(accelerator_module, "Accelerator", lambda **options: accelerator)
    accelerator_module.build_accelerator(from_values(TrainingOptions, {"output_dir": tmp_path}))
    assert plugin.deepspeed_config["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert plugin.deepspeed_config["gradient_clipping"] == 1.0


@pytest.mark.parametrize(("kind", "moves"), [("DEEPSPEED", False), ("MULTI_GPU", True)])
def test_averages_leave_out_weights_that_deepspeed_may_have_spoiled(kind, moves):
    """Elsewhere the weights of a step that is left out are those before it, and count once more."""
    model = torch.nn.ModuleDict({"transformer": torch.nn.Linear(2, 2)})
    average = WeightAverage(list(model.parameters()), decay=0.5)
    before = [tensor.clone() for tensor in average.shadow_params]
    with torch.no_grad():
        model["transformer"].weight.fill_(torch.nan if kind == "DEEPSPEED" else 3.0)
    accelerator = SimpleNamespace(distributed_type=SimpleNamespace(value=kind))
    trainer = SimpleNamespace(accelerator=accelerator, joint_model=model, emas={"first": average})
    Trainer._step_averages(trainer, torch.tensor(False))
    assert all(torch.isfinite(tensor).all() for tensor in average.shadow_params)
    assert torch.equal(average.shadow_params[0], before[0]) != moves
    if not moves:
        Trainer._step_averages(trainer, torch.tensor(True))  # as without the check
        assert not torch.isfinite(average.shadow_params[0]).all()
