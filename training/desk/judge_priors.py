"""
Where should a visual prior come from? Four judges compare samples of the desk-size checkpoint.

    python training/desk/judge_priors.py --pipeline outputs/desk-tokens --output_file docs/results/desk_judges.json

All sets have the same classes and the same noise. `--pipeline` is the checkpoint with its token prior (`dod
token-prior`). Samples go to `--samples_dir`, where another call finds them. It takes about an hour of one CPU core.
"""

import argparse
import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from texture_classifier import HELD_OUT_SEED
from tqdm.auto import tqdm

from diffusers_dod import DoDPipeline
from diffusers_dod.data.textures import TEXTURE_CLASSES, TextureDataset
from diffusers_dod.evaluation.compare import compare_summaries
from diffusers_dod.evaluation.evaluate import Evaluator, JudgeOptions
from diffusers_dod.evaluation.images import open_images
from diffusers_dod.files import replacing
from diffusers_dod.results import checkpoint_sha256, half_width, write_results
from diffusers_dod.tables import format_table


IMAGE_SEED = 102  # of the images whose priors are bounds: neither the judges' nor the generator's
# Arguments of the pipeline's call. `image` says whose visual prior an image has: one of its class, or of another.
ONE, TWO = {"num_stages": 1}, {"num_stages": 2}
SETS: dict[str, dict[str, Any]] = {
    "stage 1, unguided": {**ONE, "guidance_scale": [1.0]},
    "stage 1, guided": {**ONE, "guidance_scale": [3.0]},
    "stage 2 after unguided stage 1": {**TWO, "guidance_scale": [1.0, 3.0]},
    "stage 2 after guided stage 1": {**TWO, "guidance_scale": [3.0, 3.0]},
    "stage 2, tokens drawn": {
        **TWO,
        "guidance_scale": 3.0,
        "use_token_prior": True,
        "token_prior_guidance_scale": 2.0,
    },
    "stage 2, priors of real images": {**TWO, "guidance_scale": 3.0, "image": "own class"},
    "stage 2, priors of another class": {**TWO, "guidance_scale": 3.0, "image": "another class"},
}
PAIRS = [
    ("stage 2 after unguided stage 1", "stage 1, guided"),
    ("stage 2 after guided stage 1", "stage 1, guided"),
    ("stage 2, tokens drawn", "stage 1, guided"),
    ("stage 2, tokens drawn", "stage 2 after guided stage 1"),
    ("stage 2, priors of real images", "stage 2 after guided stage 1"),
]
JUDGES = {
    "classes": "texture_features.py",
    "attributes": "attribute_features.py",
    "ImageNet": "imagenet_features.py",
    "spectrum": "spectrum_features.py",
}
METRICS = ("fid", "kid", "density_coverage")
SHOWN = {"fid_corrected": 2, "kid": 4, "density": 2, "coverage": 2}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", required=True)
    parser.add_argument("--num_samples", type=int, default=2400)
    parser.add_argument("--num_reference", type=int, default=20_000)
    parser.add_argument("--batch_size", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples_dir", type=Path, default=Path("outputs/judge-priors"))
    parser.add_argument("--output_file", type=Path, required=True)
    args = parser.parse_args()
    if args.num_samples % len(TEXTURE_CLASSES) or args.num_samples < 1:
        parser.error(f"`num_samples` must be a multiple of {len(TEXTURE_CLASSES)}, got {args.num_samples}.")
    return args


def draw_samples(pipeline: DoDPipeline, call: dict[str, Any], args: argparse.Namespace) -> np.ndarray:
    """Images (n, 32, 32, 3) in uint8, with all classes in turn."""
    number, side = len(TEXTURE_CLASSES), pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
    sources, batches = TextureDataset(args.num_samples, size=side, seed=IMAGE_SEED), []
    for start in tqdm(range(0, args.num_samples, args.batch_size)):
        indices = range(start, min(start + args.batch_size, args.num_samples))
        labels = [index % number for index in indices]
        options = dict(call)
        if "image" in call:  # image i is of class i modulo 12
            of_another = call["image"] == "another class"  # each of the other classes in turn
            shifts = [of_another * (1 + index // number % (number - 1)) for index in indices]
            places = [
                index - index % number + (index + shift) % number for index, shift in zip(indices, shifts, strict=True)
            ]
            images = np.stack([sources[place]["image"] for place in places])
            options["image"] = torch.from_numpy(images).permute(0, 3, 1, 2)
        output = pipeline(labels, seed=args.seed, sample_indices=list(indices), output_type="np", **options)
        batches.append(np.round(255 * output.images).astype(np.uint8))
    return np.concatenate(batches)


def sample_all(args: argparse.Namespace) -> dict[str, Path]:
    """The archive of each set, in ADM's layout; those that are missing are sampled."""
    pipeline = DoDPipeline.from_pretrained(args.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    labels = np.arange(args.num_samples) % len(TEXTURE_CLASSES)
    identity = f"{checkpoint_sha256(args.pipeline)} {args.num_samples} {args.seed} {args.batch_size}"
    archives = {}
    for name, call in SETS.items():
        key = hashlib.sha256(f"{identity} {sorted(call.items())}".encode()).hexdigest()[:12]
        archives[name] = args.samples_dir / f"{name.replace(',', '').replace(' ', '-')}-{key}.npz"
        if not archives[name].is_file():
            print(name, flush=True)
            args.samples_dir.mkdir(parents=True, exist_ok=True)
            images = draw_samples(pipeline, call, args)
            with replacing(archives[name]) as unfinished, unfinished.open("wb") as file:
                np.savez(file, arr_0=images, arr_1=labels)
    return archives


def judge(name: str, archives: dict[str, Path], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All numbers of one judge: of each set, and the differences of [`PAIRS`]."""
    options = JudgeOptions(
        reference=f"textures:{args.num_reference}:{HELD_OUT_SEED}",
        extractor=f"{Path(__file__).parent / JUDGES[name]}:extractor",
        metrics=METRICS + ("accuracy",) * (name == "classes"),
        resolution=32,
        device="cpu",
        cache_dir=args.samples_dir / "features",
    )
    evaluator = Evaluator(options)
    summaries = {label: evaluator.summarize(open_images(str(file), 32))[0] for label, file in archives.items()}
    found = {}
    for label, summary in summaries.items():
        found |= {f"{key}/{name}/{label}": metric for key, metric in evaluator.compute(summary, True).items()}
    references = {metric: evaluator.prepared(metric) for metric in METRICS}
    for first, second in PAIRS:
        differences = compare_summaries(summaries[first], summaries[second], references)
        found |= {f"{key}/{name}/{first} - {second}": metric for key, metric in differences.items()}
    return found


def to_tables(metrics: dict[str, dict[str, Any]]) -> str:
    """Tables of the sets and of the differences, a column for each judge, for each of [`SHOWN`]."""
    tables = []
    for rows in (list(SETS), [f"{first} - {second}" for first, second in PAIRS]):
        for key, digits in SHOWN.items():
            cells = [
                [row]
                + [
                    f"{metric['value']:.{digits}f} ± {half_width(metric):.{digits}f}"
                    for metric in (metrics[f"{key}/{name}/{row}"] for name in JUDGES)
                ]
                for row in rows
            ]
            tables.append(format_table([key, *JUDGES], cells))
    return "\n\n".join(tables)


def main() -> None:
    args = parse_args()
    archives = sample_all(args)
    metrics = {key: metric for name in JUDGES for key, metric in judge(name, archives, args).items()}
    print(to_tables(metrics))
    write_results(
        args.output_file,
        task="judges",
        argv=sys.argv[1:],
        metrics=metrics,
        data={"reference": f"textures:{args.num_reference}:{HELD_OUT_SEED}", "images": f"textures, seed {IMAGE_SEED}"},
        settings={"sets": SETS, "num_samples": args.num_samples, "batch_size": args.batch_size, "seed": args.seed},
        device="cpu",
        checkpoint=args.pipeline,
    )


if __name__ == "__main__":
    main()
