"""
Waits of the host for a GPU, and tensors on the wrong device, found without a GPU: see `virtual_device.py`.

The device is registered for a whole process. So the tests run this file as a command, which writes what it has found.
"""

import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler
from diffusers.guiders import AdaptiveProjectedGuidance
from helpers import FIXED_STEP_SOLVERS, assert_none, noise, tiny_pipeline, tiny_transformer
from launch import run_command, torchrun

from diffusers_dod import DoDFlowMatchScheduler, DoDPipeline, Guidance


SIZED = dict(height=20, width=12, num_inference_steps=1)
TWO_STAGES = dict(num_inference_steps=2, guidance_scale=3.0)
UNIPC = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0)
# Ways to call the pipeline, which must work on any device.
CALLS = {
    **{solver: dict(schedulers=solver, **TWO_STAGES) for solver in FIXED_STEP_SOLVERS},
    **{name: dict(guidance=Guidance(null_condition=name), **TWO_STAGES) for name in ("class", "prior")},
    "no stages": dict(num_stages=1, num_inference_steps=1),
    "three stages": dict(num_stages=3, num_inference_steps=1),
    "scales": dict(num_inference_steps=1, guidance_scale=[2.0, 3.0]),
    "prior scale": dict(guidance=Guidance(prior_scale=2.0), **TWO_STAGES),
    "interval": dict(guidance=Guidance(interval=(0.0, 0.6)), **TWO_STAGES),
    "power, channels, rescale": dict(guidance=Guidance(power=2.0, channels=3, rescale=0.5), **TWO_STAGES),
    "cosine": dict(guidance=Guidance(cosine_threshold=0.5), **TWO_STAGES),
    "guider": dict(guidance=AdaptiveProjectedGuidance(3.0), num_inference_steps=2),
    "image": dict(image=torch.zeros(3, 16, 16), num_inference_steps=1),
    "latents as prior": dict(prior_latents=noise(1), num_inference_steps=1),
    "copies": dict(num_images_per_label=2, num_images_per_prior=2, num_inference_steps=1),
    "labels": dict(class_labels=[1, None], num_inference_steps=1, output_type="pil"),
    "noise": dict(latents=noise(1), num_stages=1, num_inference_steps=1),
    "sigmas": dict(sigmas=[1.0, 0.3]),
    "FlowMatchEuler": dict(schedulers=FlowMatchEulerDiscreteScheduler(), **TWO_STAGES),
    "FlowMatchHeun": dict(schedulers=FlowMatchHeunDiscreteScheduler(), num_inference_steps=2),
    "UniPC": dict(schedulers=UNIPC, **TWO_STAGES),
}
ADAPTIVE = {
    "": dict(guidance_scale=3.0),
    " with an interval": dict(guidance_scale=3.0, guidance=Guidance(interval=(0.0, 0.6))),
}


def call(pipe: DoDPipeline, **arguments):
    return pipe(**{"class_labels": [1, 2], "seed": 0, "output_type": "latent", **arguments})


def moved(pipe: DoDPipeline) -> DoDPipeline:
    from virtual_device import DEVICE

    return pipe.to(DEVICE)


def sample_in_all_ways() -> dict[str, str]:
    """What is wrong with a call, by its name: an error, or other samples than on the CPU."""
    from virtual_device import DEVICE, virtual_device

    tokens, weak = noise(3, channels=4)[:, 0, :4], dict(seed=5, prior_embed_dim=None)
    special: dict[str, Callable[[DoDPipeline, object], dict]] = {
        "tokens": lambda pipe, device: dict(prior_tokens=tokens.to(device)),
        "tokens of images": lambda pipe, device: dict(prior_tokens=pipe.get_prior_tokens(torch.zeros(3, 16, 16))),
        "latents on the device": lambda pipe, device: dict(prior_latents=noise(1).to(device)),
        "weak model": lambda pipe, device: dict(guidance=Guidance(transformer=tiny_transformer(**weak).to(device))),
        "callback": lambda pipe, device: dict(
            callback_on_step_end=lambda pipe, step, time, inputs: {"latents": inputs["latents"] * 0.9}
        ),
        "generators": lambda pipe, device: dict(
            generator=[torch.Generator().manual_seed(i) for i in (0, 1)], seed=None
        ),
        "sizes": lambda pipe, device: pipe.set_pos_interpolation("yarn") or SIZED,
    }
    calls = {name: lambda pipe, device, given=given: given for name, given in CALLS.items()}
    calls |= {
        name: lambda pipe, device, build=build: {"num_inference_steps": 2, **build(pipe, device)}
        for name, build in special.items()
    }
    wrong = {}
    for name, arguments in calls.items():
        expected = call(pipe := tiny_pipeline(), **arguments(pipe, "cpu")).images
        try:
            with virtual_device():
                pipe = moved(tiny_pipeline())
                found = call(pipe, **arguments(pipe, DEVICE)).images
            if isinstance(found, torch.Tensor) and (found.inner - expected).abs().max() > 1e-3:
                wrong[name] = f"samples differ by {(found.inner - expected).abs().max()}"
        except Exception as error:
            wrong[name] = f"{type(error).__name__}: {error}"
    return wrong


def count_waits_of_sampling() -> dict[str, str]:
    """The calls that wait more often than once in a stage, or with dopri5 than twice in a step, by name."""
    from virtual_device import virtual_device

    found = {}
    with virtual_device() as log:
        pipe = moved(tiny_pipeline(transformer=tiny_transformer(num_layers=1)))
        for solver in ("euler", "heun", "stochastic_heun", "with an interval"):
            counts = []
            for steps in (2, 3):
                arguments = dict(schedulers=solver)
                if solver not in FIXED_STEP_SOLVERS:
                    arguments = dict(guidance=Guidance(interval=(0.0, 0.6)))
                log.clear()
                call(pipe, num_inference_steps=steps, guidance_scale=3.0, **arguments)
                counts.append(len(log.syncs))
            if counts[0] != counts[1]:
                found[solver] = log.table()
        for name, arguments in ADAPTIVE.items():
            pipe.scheduler = DoDFlowMatchScheduler(solver="dopri5", rtol=0.1, atol=0.1)
            log.clear()
            output = call(pipe, **arguments)
            waits = [sync for sync in log.syncs if "adaptive.py" in sync or "guidance.py" in sync]
            steps = sum(int(stage.num_accepted_steps.max()) for stage in output.statistics)
            if len(waits) > 2 * steps or len(log.syncs) > 2 * steps + 10:
                found[f"dopri5{name}"] = f"{steps} steps\n{log.table()}"
    return found


def notice() -> list[str]:
    """What the device does not notice, or notices for nothing."""
    from virtual_device import DEVICE, virtual_device

    pinned = lambda: torch.zeros(3).pin_memory().to(DEVICE, non_blocking=True)  # noqa: E731
    waiting = {
        "item": lambda x: x[0].item(),
        "bool": lambda x: bool((x > 0).all()),
        "tolist": lambda x: x.tolist(),
        "to the CPU": lambda x: x.cpu(),
        "to the device": lambda x: torch.zeros(3).to(DEVICE),
        "not pinned": lambda x: torch.zeros(3).to(DEVICE, non_blocking=True),
        "new": lambda x: x.new_tensor([1.0, 2.0]),
        "copy": lambda x: x.copy_(torch.zeros(3)),
        "mask": lambda x: x[x > 0],
        "index on the CPU": lambda x: x[torch.tensor([0, 1])],
        "nonzero": lambda x: x.nonzero(),
    }
    free = {
        "math": lambda x: (x + 1) * x.mean(),
        "fill": lambda x: torch.full((3,), 0.5, device=DEVICE) + torch.zeros(()),
        "pinned": lambda x: pinned(),
        "index": lambda x: x[torch.zeros(2, dtype=torch.long, device=DEVICE)],
    }
    wrong = []
    with virtual_device() as log:
        x = torch.rand(3, device=DEVICE) + 0.5
        for cases, expected in ((waiting, 1), (free, 0)):
            for name, case in cases.items():
                log.clear()
                case(x)
                if len(log.syncs) != expected or not all(__file__ in sync for sync in log.syncs):
                    wrong.append(f"{name}: {log.syncs}")
        for name, case in {"sum": lambda: x + torch.ones(3), "cat": lambda: torch.cat([x, torch.ones(3)])}.items():
            try:
                case()
                wrong.append(name)
            except RuntimeError as error:
                assert "same device" in str(error)
    return wrong


TRAIN = "--preset DoD-Desk --train_batch_size 4 --dataset_name textures --num_train_samples 16 --resolution 8".split()
TRAIN += "--logging_steps 100 --max_train_steps 100 --ema_sigma_rel 0.1".split()
NUM_STEPS = 5


def count_waits_of_training(folder: Path) -> list[str]:
    """The waits in a few steps of the trainer, after the first."""
    from accelerate.state import AcceleratorState, PartialState
    from helpers import fresh_accelerator
    from virtual_device import DEVICE, virtual_device

    from diffusers_dod.options import parse_options
    from diffusers_dod.training.train import Trainer, build_accelerator
    from diffusers_dod.training_options import TrainingOptions

    class Enough(Exception):
        pass

    class ShortTrainer(Trainer):
        def train_step(self):
            if self.step == 1:
                log.clear()
            elif self.step == 1 + NUM_STEPS:
                raise Enough
            super().train_step()

        def _clip_gradients(self):
            if accelerator.num_processes > 1:  # as DDP does, whose C++ takes no tensors of Python
                for parameter in self.model.parameters():
                    torch.distributed.all_reduce(parameter.grad)
            return super()._clip_gradients()

    options = parse_options(TrainingOptions, [*TRAIN, "--output_dir", str(folder)])
    with fresh_accelerator(), virtual_device() as log:
        accelerator = build_accelerator(options)
        os.environ["ACCELERATE_USE_CPU"] = "false"  # any more
        for state in (PartialState, AcceleratorState):
            state._shared_state["device"] = DEVICE
        accelerator.prepare_model = lambda model, **options: model.to(DEVICE)
        trainer = ShortTrainer(options, accelerator)
        assert next(trainer.joint_model.parameters()).device == DEVICE
        with pytest.raises(Enough):
            trainer.train()
        assert trainer.step == 1 + NUM_STEPS and log.num_launches > 1000
        return log.table().splitlines()


def run(folder: Path, *checks: Callable[..., object], num_processes: int = 1) -> dict[str, object]:
    """Runs functions of this file in one process, or in several, and returns the results of the first by name."""
    launcher = [sys.executable] if num_processes == 1 else torchrun(folder / "log", num_processes)
    run_command([*launcher, __file__, folder, *(check.__name__ for check in checks)], folder / "log.txt")
    return json.loads((folder / "result-0.json").read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, object]:
    """What all quick checks of one process have found: its start takes longer than they do."""
    return run(tmp_path_factory.mktemp("device"), notice, count_waits_of_sampling, count_waits_of_training)


def test_the_device_notes_what_a_gpu_waits_for(found):
    assert_none(found["notice"])


def test_sampling_does_not_wait_for_the_device(found):
    assert_none(f"{name}: {error}" for name, error in found["count_waits_of_sampling"].items())


def test_training_does_not_wait_for_the_device(found):
    assert_none(found["count_waits_of_training"])


@pytest.mark.slow
def test_training_in_two_processes_does_not_wait_for_the_device(tmp_path):
    assert_none(run(tmp_path, count_waits_of_training, num_processes=2)["count_waits_of_training"])


@pytest.mark.slow
def test_no_tensor_is_on_another_device(tmp_path):
    found = run(tmp_path, sample_in_all_ways)["sample_in_all_ways"]
    assert_none(f"{name}: {error}" for name, error in found.items())


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    results = {}
    for name in sys.argv[2:]:
        check = globals()[name]
        results[name] = check(folder / "run") if inspect.signature(check).parameters else check()
    (folder / f"result-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(results))
