# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Ten minutes on a card: is it correct, and how fast is it? One JSON file with an entry for each check.

    python benchmarks/gpu_check.py --output_file outputs/gpu_check.json

It has not been run on a card yet. `--device cpu --size tiny` runs the same checks on a CPU, where their times say
nothing about a card. A check that raises is an entry with its error; the exit code is then 1, as it is if a result is
wrong.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from diffusers_dod import DoDFlowMatchScheduler, DoDPipeline
from diffusers_dod.compute import TrainingStep, sampling_compute, training_cost, training_work
from diffusers_dod.files import write_json
from diffusers_dod.losses import DoDJointModel
from diffusers_dod.options import parse_options
from diffusers_dod.presets import PRESETS
from diffusers_dod.tableaus import SOLVERS
from diffusers_dod.training.cost import GPUS, PEAK_SHARE, estimate_step
from diffusers_dod.training.models import build_models, build_optimizer, use_fast_attention
from diffusers_dod.training.train import Trainer, build_accelerator
from diffusers_dod.training_options import ModelOptions, OptimizerOptions, TrainingOptions
from diffusers_dod.transformer_dod import DoDAttention


ROOT = Path(__file__).parents[1]
PEAK_FLOPS = GPUS["H100"].peak_flops
BACKENDS = ("native", "_native_flash", "_native_cudnn", "_native_efficient", "_native_math")
TRAINER = "--preset DoD-Desk --dataset_name textures --resolution 16 --num_train_samples 256".split()
TRAINER += "--validation_steps 1000000 --checkpointing_steps 1000000".split()
# Largest relative errors of a loss and its gradients, against fp32 on the CPU.
TOLERANCES = {"fp32": 1e-3, "fp32 compiled": 1e-3, "bf16": 0.1, "bf16 compiled": 0.1}


@dataclass(frozen=True)
class Setting:
    """
    What the checks run.

    Args:
        device (`torch.device`): The device.
        presets (`tuple[str, ...]`): Models whose steps are timed; the first is sampled too.
        batch_size (`int`): Images of a training step and of a sampled batch.
        num_steps (`int`): Timed steps, and steps of a solver.
    """

    device: torch.device
    presets: tuple[str, ...]
    batch_size: int
    num_steps: int

    @property
    def is_cuda(self) -> bool:
        """Whether the device is a GPU of NVIDIA."""
        return self.device.type == "cuda"

    @cached_property
    def compiler(self) -> str:
        """A compiler for GPUs; on a CPU one that needs no C++, as its times say nothing."""
        return "inductor" if self.is_cuda else "aot_eager"

    def synchronize(self) -> None:
        """Waits until the device has nothing left to do."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], Any]) -> float:
        """The median time of `run` over the timed steps, after three to warm up."""
        times = []
        for _ in range(3 + self.num_steps):
            self.synchronize()
            start = time.perf_counter()
            run()
            self.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times[3:])


SIZES = {"full": (("DoD-B", "DoD-XL"), 32, 20), "tiny": (("DoD-Desk",), 2, 2)}


# --------------------------------------------------------------------------------------------------------- the parts


def _latent_shape(preset: str) -> tuple[int, int, int]:
    config = PRESETS[preset].transformer_config
    size = config.get("sample_size", 32)
    return (config.get("in_channels", 4), size, size)


def _num_classes(preset: str) -> int:
    return PRESETS[preset].transformer_config.get("num_classes", 1000)


def _model(preset: str, setting: Setting, is_compiled: bool = False) -> DoDJointModel:
    """A model with random weights; a new one would predict zeros."""
    model = build_models(ModelOptions(preset=preset), _latent_shape(preset), _num_classes(preset))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    model.to(setting.device)
    use_fast_attention(model, setting.device)
    if is_compiled:
        for module in model.children():
            module.compile_repeated_blocks(backend=setting.compiler)
    return model


def _batch(preset: str, setting: Setting) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    size = setting.batch_size
    latents, noise = torch.randn(2, size, *_latent_shape(preset), generator=generator)
    batch = {
        "latents": latents,
        "noise": noise,
        "sigmas": torch.rand(size, generator=generator),
        "class_labels": torch.randint(_num_classes(preset), (size,), generator=generator),
    }
    return {name: tensor.to(setting.device) for name, tensor in batch.items()} | {"num_priors": size // 2}


def _autocast(setting: Setting, is_bf16: bool) -> Any:
    return torch.autocast(setting.device.type, torch.bfloat16) if is_bf16 else nullcontext()


def _loss_and_gradients(model: DoDJointModel, batch: dict[str, Any], setting: Setting, is_bf16: bool) -> torch.Tensor:
    """The losses and all gradients in one vector on the CPU."""
    with _autocast(setting, is_bf16):
        losses = model(**batch)
    losses.mean().backward()
    gradients = [parameter.grad.flatten().cpu() for parameter in model.parameters()]
    return torch.cat([losses.detach().cpu().float(), *gradients])


def _pipeline(preset: str, setting: Setting, dtype: torch.dtype = torch.float32) -> DoDPipeline:
    model = _model(preset, setting).eval()
    pipeline = DoDPipeline(model.transformer, DoDFlowMatchScheduler(), latent_embedder=model.latent_embedder, vae=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(dtype)


def _sample(pipeline: DoDPipeline, setting: Setting, scale: float = 4.0) -> torch.Tensor:
    steps = {} if pipeline.scheduler.is_adaptive else {"num_inference_steps": setting.num_steps}
    labels = [0] * setting.batch_size
    settings = {"num_stages": 2, "guidance_scale": [1.0, scale], "seed": 0, "output_type": "latent"}
    return pipeline(labels, **settings, **steps).images


def _relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@contextmanager
def _waits(setting: Setting) -> Iterator[list[str]]:
    """Collects the places where the CPU waits for the GPU; none are seen on a CPU."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if setting.is_cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if setting.is_cuda:
                torch.cuda.set_sync_debug_mode("default")
    found += [f"{item.filename}:{item.lineno}" for item in caught if "synchroniz" in str(item.message)]


# -------------------------------------------------------------------------------------------------------- the checks


def check_correctness(setting: Setting) -> dict[str, Any]:
    """Losses and gradients of a training step, and samples, against fp32 on the CPU."""
    preset = "DoD-Desk"
    cpu = Setting(torch.device("cpu"), setting.presets, setting.batch_size, setting.num_steps)
    expected = _loss_and_gradients(_model(preset, cpu), _batch(preset, cpu), cpu, is_bf16=False)
    errors = {}
    for name in TOLERANCES:
        torch._dynamo.reset()
        model = _model(preset, setting, is_compiled=name.endswith("compiled"))
        actual = _loss_and_gradients(model, _batch(preset, setting), setting, is_bf16=name.startswith("bf16"))
        errors[name] = _relative(actual, expected)
    samples = _relative(_sample(_pipeline(preset, setting), setting).cpu(), _sample(_pipeline(preset, cpu), cpu))
    is_right = all(errors[name] <= bound for name, bound in TOLERANCES.items()) and samples <= 1e-2
    return {"training": errors, "samples": samples, "tolerances": TOLERANCES, "is_right": is_right}


def check_training(setting: Setting) -> dict[str, Any]:
    """Speed, utilisation and memory of a training step in bf16, eager and compiled, measured and computed."""
    found = {}
    for preset in setting.presets:
        for is_compiled in (False, True):
            torch._dynamo.reset()
            gc.collect()  # of the model before, whose memory is not to count
            if setting.is_cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            found[f"{preset}, {'compiled' if is_compiled else 'eager'}"] = _time_training(preset, setting, is_compiled)
    return found


def _time_training(preset: str, setting: Setting, is_compiled: bool) -> dict[str, float]:
    model, batch = _model(preset, setting, is_compiled), _batch(preset, setting)
    options = OptimizerOptions()
    optimizer = build_optimizer(options, model)

    def step() -> None:
        with _autocast(setting, is_bf16=True):
            losses = model(**batch)
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds = setting.seconds(step)
    shape, classes = _latent_shape(preset), _num_classes(preset)
    work = TrainingStep(batch_size=setting.batch_size, num_averages=0)
    cost = training_cost(PRESETS[preset], shape, classes, work)
    operations = training_work(PRESETS[preset], shape, classes, work)
    flops = setting.batch_size * cost.training_flops
    found = {
        "seconds": seconds,
        "seconds_computed": estimate_step(operations, cost, GPUS["H100"], is_compiled=is_compiled).total,
        "images_per_second": setting.batch_size / seconds,
        "utilisation_of_989_tflops": flops / seconds / PEAK_FLOPS["bf16"],
        "memory_computed": cost.memory(),
    }
    return found | ({"memory": torch.cuda.max_memory_allocated()} if setting.is_cuda else {})


def check_attention(setting: Setting) -> dict[str, Any]:
    """Seconds of a pass in bf16, forward and backward, with each backend of attention, and what it changes."""
    preset = setting.presets[0]
    batch, found, expected = _batch(preset, setting), {}, None
    for backend in BACKENDS:
        model = _model(preset, setting)
        try:
            for module in model.transformer.modules():
                if isinstance(module, DoDAttention):  # the model's own method would change that of later models too
                    module.set_attention_backend(backend)
            actual = _loss_and_gradients(model, batch, setting, is_bf16=True)
        except Exception as error:  # this device, or this version of PyTorch, has no such kernel
            found[backend] = {"error": str(error).splitlines()[0]}
            continue
        expected = actual if expected is None else expected
        seconds = setting.seconds(lambda model=model: _loss_and_gradients(model, batch, setting, is_bf16=True))
        found[backend] = {"seconds": seconds, "error_of_gradients": _relative(actual, expected)}
    return found


def check_waits(setting: Setting) -> dict[str, Any]:
    """How often, and where, the CPU waits for the GPU, in steps of the trainer and in a call with each solver."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        argv = [*TRAINER, "--output_dir", folder, "--train_batch_size", setting.batch_size, "--max_train_steps", 100]
        options = parse_options(TrainingOptions, list(map(str, argv)))
        trainer = Trainer(options, build_accelerator(options))
        trainer.train_step()
        with _waits(setting) as waits:
            for _ in range(setting.num_steps):
                trainer.train_step()
        found["training"] = {"steps": setting.num_steps, "waits": len(waits), "places": sorted(set(waits))}
    pipeline = _pipeline("DoD-Desk", setting)
    for solver in SOLVERS:
        pipeline.scheduler = DoDFlowMatchScheduler(solver=solver)
        _sample(pipeline, setting)
        with _waits(setting) as waits:
            _sample(pipeline, setting)
        found[solver] = {"waits": len(waits), "places": sorted(set(waits))}
    return found


def check_sampling(setting: Setting) -> dict[str, Any]:
    """Speed of both stages in bf16, the second guided, and the floor: matrix products at 70 % of the peak."""
    preset = setting.presets[0]
    pipeline = _pipeline(preset, setting, torch.bfloat16)
    seconds = setting.seconds(lambda: _sample(pipeline, setting)) / setting.batch_size
    flops = sampling_compute(PRESETS[preset], [setting.num_steps] * 2, [1.0, 4.0])["flops"]
    floor = flops / (PEAK_SHARE * PEAK_FLOPS["bf16"])
    return {"preset": preset, "images_per_second": 1 / seconds, "seconds": seconds, "seconds_of_the_floor": floor}


def check_several(setting: Setting) -> dict[str, Any]:
    """Images per second of the trainer under DDP and FSDP2 on all GPUs; on a CPU, of two processes under DDP."""
    num_processes = torch.cuda.device_count() if setting.is_cuda else 2
    if num_processes < 2:
        return {"skipped": "there is one GPU"}
    found = {}
    for name in ("ddp", "fsdp2") if setting.is_cuda else ("ddp",):
        with tempfile.TemporaryDirectory() as folder:
            launch = ["--config_file", str(ROOT / "training" / "accelerate" / f"{name}.yaml")]
            launch = launch if setting.is_cuda else ["--cpu", "--num_machines", "1", "--mixed_precision", "no"]
            command = [sys.executable, "-m", "accelerate.commands.launch", *launch, "--num_processes", num_processes]
            command += [ROOT / "training" / "train_dod.py", *TRAINER, "--preset", setting.presets[-1]]
            command += ["--output_dir", folder, "--train_batch_size", setting.batch_size]
            command += ["--max_train_steps", 5 * setting.num_steps, "--logging_steps", setting.num_steps]
            run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
            if run.returncode:
                raise RuntimeError(f"{name} on {num_processes} processes: {run.stderr[-2000:]}")
            lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
            found[name] = {"images_per_second": json.loads(lines[-1])["images_per_second"]}
    return found | {"num_processes": num_processes}


CHECKS = {
    "correctness": check_correctness,
    "training": check_training,
    "attention": check_attention,
    "waits": check_waits,
    "sampling": check_sampling,
    "several": check_several,
}


def main(argv: list[str] | None = None) -> int:
    """Runs the checks; `argv` defaults to the process's arguments. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--size", default="full", choices=SIZES, help="DoD-B and DoD-XL, or DoD-Desk.")
    parser.add_argument("--checks", nargs="+", default=[*CHECKS], choices=CHECKS)
    parser.add_argument("--output_file", type=Path, default=Path("outputs/gpu_check.json"))
    args = parser.parse_args(argv)
    setting = Setting(torch.device(args.device), *SIZES[args.size])
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    name = torch.cuda.get_device_name() if setting.is_cuda else "CPU"
    results: dict[str, Any] = {"device": name, "torch": torch.__version__, "size": args.size, "checks": {}}
    is_right = True
    for check in args.checks:
        start = time.perf_counter()
        try:
            found = CHECKS[check](setting)
        except Exception:
            found = {"error": traceback.format_exc(), "is_right": False}
        is_right &= found.get("is_right", True)
        found["seconds_of_the_check"] = time.perf_counter() - start
        results["checks"][check] = found
        write_json(args.output_file, results)  # what is done is not lost
        print(f"{check}: {json.dumps(found)}", flush=True)
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
