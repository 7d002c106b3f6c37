"""
Judges a texture checkpoint stage by stage: class accuracy of an independent classifier, and FID on its features.

    python training/desk/evaluate.py --pipeline checkpoints/dod-desk --classifier checkpoints/texture-classifier \
        --settings 1 2 3 4 5 3:2 3:4 --seeds 0 1 2 --output_file outputs/evaluation.json

A setting is the guidance scale of each stage, joined by colons: `3` is one stage at scale 3, `1:5.5` a second stage at
5.5 after an unguided first; every stage from the second on has the last scale. `real:5.5` gives the prior of real
pictures to stage 2 (reconstruction), and `real` passes them through the autoencoder only, the bound of all samples.
FID here is the Fréchet distance on 64 features of the texture classifier, not on Inception's: compare it within
this table only.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from texture_classifier import HELD_OUT_SEED, TextureClassifier

from diffusers_dod import DoDPipeline
from diffusers_dod.evaluation.frechet import feature_statistics, frechet_distance
from diffusers_dod.training.data import to_pixels
from diffusers_dod.training.textures import TEXTURE_CLASSES, TextureDataset


REAL = "real"
PRIOR_SEED = 102  # of the pictures whose priors `real` uses: neither trained on nor in the reference


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, required=True)
    parser.add_argument("--classifier", type=Path, required=True)
    parser.add_argument("--settings", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--num_samples", type=int, default=1200, help="Per setting and seed, classes balanced.")
    parser.add_argument("--num_reference", type=int, default=20_000, help="Held-out real pictures.")
    parser.add_argument("--num_inference_steps", type=int)
    parser.add_argument("--batch_size", type=int, default=120)
    parser.add_argument("--output_file", type=Path, required=True)
    return parser.parse_args()


@torch.no_grad()
def judge(classifier: TextureClassifier, pixels: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, 64) and predicted classes (n,) of pixels (n, 3, 32, 32) in [-1, 1]."""
    parts = [classifier(chunk) for chunk in pixels.split(250)]
    return tuple(torch.cat(column).numpy() for column in ([p[0] for p in parts], [p[1].argmax(dim=1) for p in parts]))


def real_pixels(num_pictures: int, seed: int) -> torch.Tensor:
    dataset = TextureDataset(num_pictures, seed=seed)
    return torch.cat([to_pixels(torch.from_numpy(dataset[i]["image"])[None]) for i in range(num_pictures)])


@torch.no_grad()
def sample(
    pipeline: DoDPipeline, setting: str, seed: int, args: argparse.Namespace
) -> tuple[torch.Tensor, np.ndarray]:
    """Pixels (n, 3, 32, 32) in [-1, 1] of the last stage, and their classes (n,)."""
    scales = setting.split(":")
    labels = np.arange(args.num_samples) % len(TEXTURE_CLASSES)
    priors = (real_pixels(args.num_samples, PRIOR_SEED + seed) + 1) / 2 if scales[0] == REAL else None
    generator = torch.Generator().manual_seed(seed)
    if scales == [REAL]:
        latents = [pipeline.encode_image(chunk * 2 - 1) for chunk in priors.split(args.batch_size)]
        return torch.cat([pipeline.decode_latents(chunk, "pt") for chunk in latents]) * 2 - 1, labels
    images = []
    for start in range(0, args.num_samples, args.batch_size):
        chunk = slice(start, start + args.batch_size)
        batch = pipeline(
            labels[chunk].tolist(),
            num_stages=len(scales),
            num_inference_steps=args.num_inference_steps,
            first_stage_guidance_scale=1.0 if priors is not None else float(scales[0]),
            guidance_scale=float(scales[-1]) if len(scales) > 1 else None,
            image=priors[chunk] if priors is not None else None,
            generator=generator,
            output_type="pt",
        ).images
        images.append(batch * 2 - 1)
    return torch.cat(images), labels


def main() -> None:
    args = parse_args()
    classifier = TextureClassifier.load(args.classifier)
    pipeline = DoDPipeline.from_pretrained(args.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    reference = feature_statistics(judge(classifier, real_pixels(args.num_reference, HELD_OUT_SEED))[0])

    results = []
    for setting in args.settings:
        rows = []
        start = time.perf_counter()
        for seed in args.seeds:
            pixels, labels = sample(pipeline, setting, seed, args)
            features, predicted = judge(classifier, pixels)
            fid = frechet_distance(*feature_statistics(features), *reference)
            rows.append({"seed": seed, "fid": fid, "accuracy": float((predicted == labels).mean())})
        fids, accuracies = (np.array([row[name] for row in rows]) for name in ("fid", "accuracy"))
        result = {
            "setting": setting,
            "fid": fids.mean(),
            "fid_standard_error": fids.std(ddof=1) / np.sqrt(len(fids)) if len(fids) > 1 else None,
            "accuracy": accuracies.mean(),
            "seeds": rows,
        }
        results.append(result)
        error = result["fid_standard_error"]
        print(
            f"{setting:>10}  FID {result['fid']:7.3f}{f' +- {error:.3f}' if error is not None else ''}"
            f"  accuracy {result['accuracy']:.3f}  ({time.perf_counter() - start:.0f} s)",
            flush=True,
        )
        args.output_file.parent.mkdir(parents=True, exist_ok=True)
        report = {
            "num_samples": args.num_samples,
            "num_reference": args.num_reference,
            "num_inference_steps": args.num_inference_steps or pipeline.config.default_num_inference_steps,
            "solver": pipeline.scheduler.config.solver,
            "results": results,
        }
        args.output_file.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
