# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Measures images per second and FLOP/s of training steps on this machine.

The measured utilisation can replace the assumed one of docs/training_cost.md.

    python benchmarks/bench_training.py --preset DoD-B --batch_size 32 --mixed_precision bf16 --peak_tflops 989

A step is the trainer's, on random latents, half of them with a prior: forward, backward, clipping, AdamW. Data and
averages of the weights are not included.
"""

import argparse
import time
from contextlib import nullcontext

import torch

from diffusers_dod.compute import TrainingStep, training_cost
from diffusers_dod.presets import PRESETS
from diffusers_dod.training.models import build_models, build_optimizer, use_fast_attention
from diffusers_dod.training_options import ModelOptions, OptimizerOptions


WARM_UP_STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="DoD-Desk", choices=list(PRESETS))
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--mixed_precision", default="bf16", choices=["no", "bf16"])
    parser.add_argument("--compile", action="store_true", help="Compile the repeated blocks, as the trainer does.")
    parser.add_argument("--peak_tflops", type=float, help="Dense peak of the device in this precision.")
    options = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    preset = PRESETS[options.preset]
    config = preset.transformer_config
    size, num_classes = config.get("sample_size", 32), config.get("num_classes", 1000)
    latent_shape = (config.get("in_channels", 4), size, size)
    num_priors = 0 if preset.latent_embedder_config is None else options.batch_size // 2

    model = build_models(ModelOptions(preset=options.preset), latent_shape, num_classes).to(device)
    optimization = OptimizerOptions()
    optimizer = build_optimizer(optimization, model)
    use_fast_attention(model, device)
    if options.compile:
        for module in model.children():
            module.compile_repeated_blocks()
    batch = {
        "latents": torch.randn(options.batch_size, *latent_shape, device=device),
        "noise": torch.randn(options.batch_size, *latent_shape, device=device),
        "sigmas": torch.rand(options.batch_size, device=device),
        "class_labels": torch.randint(num_classes, (options.batch_size,), device=device),
    }
    in_bf16 = options.mixed_precision == "bf16"

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16) if in_bf16 else nullcontext():
            losses = model(**batch, num_priors=num_priors)
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optimization.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(WARM_UP_STEPS):
        step()
    synchronize()
    start = time.perf_counter()
    for _ in range(options.steps):
        step()
    synchronize()
    images_per_second = options.steps * options.batch_size / (time.perf_counter() - start)

    work = TrainingStep(
        batch_size=options.batch_size,
        prior_dropout_prob=1 - num_priors / options.batch_size,
        mixed_precision=options.mixed_precision,
        num_averages=0,
    )
    cost = training_cost(preset, latent_shape, num_classes, work)
    flops = images_per_second * cost.training_flops
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    compiled = "compiled" if options.compile else "eager"
    setting = f"batch {options.batch_size}, {options.mixed_precision}, {compiled}, torch {torch.__version__}"
    print(f"{options.preset}, {setting}")
    print(f"{name}: {images_per_second:,.1f} images/s, {flops / 1e12:,.3g} TFLOP/s")
    if options.peak_tflops is not None:
        print(f"utilisation: {flops / options.peak_tflops / 1e12:.3f} of {options.peak_tflops:g} TFLOP/s")
    if device.type == "cuda":
        print(f"memory: {torch.cuda.max_memory_allocated() / 1e9:.2f} GB, computed {cost.memory() / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
