"""
Measures how much an image depends on its batch: compares latents sampled alone with latents in a batch of 12.

    python benchmarks/bench_batch_independence.py

Both of two stages are guided, with seed 0. Matrix products of other sizes round differently, and nothing else may
differ. The last column shows how sensitive the model is by itself: it changes the noise by 1e-7, the rounding of fp32.
A difference is the largest of 12 norms, relative to the norm of a sample's latents.
"""

import argparse

import torch

from diffusers_dod import DoDPipeline
from diffusers_dod.seeding import stateless_noise
from diffusers_dod.tableaus import SOLVERS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", default="checkpoints/dod-desk")
    parser.add_argument("--num_inference_steps", type=int, default=20)
    args = parser.parse_args()
    print(f"{args.pretrained_model_name_or_path}, torch {torch.__version__}, {args.num_inference_steps} steps")
    print(f"{'solver':16s} {'fp32':>8s} {'bf16':>8s} {'noise + 1e-7':>13s}")
    for solver in SOLVERS:
        errors = []
        for dtype in (torch.float32, torch.bfloat16):
            pipe = DoDPipeline.from_pretrained(
                args.pretrained_model_name_or_path, dtype={"default": torch.float32, "transformer": dtype}
            )
            pipe.set_progress_bar_config(disable=True)
            pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, solver=solver)
            settings = {"guidance_scale": [3.0, 3.0], "seed": 0, "output_type": "latent"}
            if not pipe.scheduler.is_adaptive:
                settings["num_inference_steps"] = args.num_inference_steps
            labels = list(range(12))
            together = pipe(labels, **settings).images
            alone = torch.cat([pipe(i, sample_indices=[i], **settings).images for i in labels])
            errors.append(largest_error(alone, together))
            if dtype == torch.float32:
                shape = together.shape[1:]
                noises = [
                    torch.stack([stateless_noise(tuple(shape), 0, i, 0, stage, 0) for i in labels]) for stage in (1, 2)
                ]
                torch.manual_seed(0)
                moved = [noise + 1e-7 * torch.randn(noise.shape) for noise in noises]
                sensitivity = largest_error(pipe(labels, latents=moved, **settings).images, together)
        print(f"{solver:16s} {errors[0]:8.1e} {errors[1]:8.3f} {sensitivity:13.1e}")


def largest_error(latents: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest norm of a sample's difference, relative to its norm."""
    difference = (latents - expected).flatten(1).norm(dim=1)
    return (difference / expected.flatten(1).norm(dim=1)).max().item()


if __name__ == "__main__":
    main()
