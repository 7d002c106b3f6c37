"""
Where should a visual prior come from? Four judges compare samples of a checkpoint of textures.

    python training/study/judge_priors.py --pipeline outputs/desk-tokens --output_file docs/results/desk_judges.json

All sets have the same classes and the same noise. `--pipeline` is the checkpoint with its token prior (`dod
token-prior`). Samples go to `--samples_dir`, where another call finds them. It takes about an hour of one CPU core.
With `--bounds` there are only the priors of real images, of the same label and of another one.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from study import LABELS
from tqdm.auto import tqdm

from diffusers_dod import DoDPipeline, DoDTransformer2DModel, Guidance
from diffusers_dod.data.textures import TEXTURE_CLASSES, TextureDataset
from diffusers_dod.evaluation.compare import compare_summaries
from diffusers_dod.evaluation.evaluate import Evaluator, JudgeOptions
from diffusers_dod.evaluation.images import open_images
from diffusers_dod.files import replacing
from diffusers_dod.results import checkpoint_sha256, half_width, write_results
from diffusers_dod.tables import format_table


REFERENCE_SEED = 101  # of the images that the judges compare with
IMAGE_SEED = 102  # of the images that priors are computed of: neither the judges' nor the generator's
JUDGES_FOLDER = Path(__file__).parents[1] / "desk"
# Arguments of the pipeline's call. `image` says whose visual prior an image has: one of its class, or of another.
ONE, TWO = {"num_stages": 1}, {"num_stages": 2}
REAL, WRONG = "stage 2, priors of real images", "stage 2, priors of another class"
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
    REAL: {**TWO, "guidance_scale": 3.0, "image": "own class"},
    WRONG: {**TWO, "guidance_scale": 3.0, "image": "another class"},
}
PAIRS = [
    ("stage 2 after unguided stage 1", "stage 1, guided"),
    ("stage 2 after guided stage 1", "stage 1, guided"),
    ("stage 2, tokens drawn", "stage 1, guided"),
    ("stage 2, tokens drawn", "stage 2 after unguided stage 1"),
    ("stage 2, tokens drawn", "stage 2 after guided stage 1"),
    (REAL, "stage 2 after guided stage 1"),
]
JUDGES = {
    "classes": "texture_features.py",
    "attributes": "attribute_features.py",
    "ImageNet": "imagenet_features.py",
    "spectrum": "spectrum_features.py",
}
METRICS = ("fid", "kid", "density_coverage")
SETTINGS = ("labels", "guidance_model", "num_samples", "batch_size", "seed")
SHOWN = {"fid_corrected": 2, "kid": 4, "density": 2, "coverage": 2}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", required=True)
    parser.add_argument("--labels", choices=["classes", "none", *LABELS], default="classes", help="What is given.")
    parser.add_argument("--bounds", action="store_true", help="Only the sets with priors of real images.")
    parser.add_argument("--guidance_scale", type=float, default=3.0, help="Of stage 2.")
    parser.add_argument("--guidance_model", help="Pipeline whose transformer, a weaker one, guides all stages.")
    parser.add_argument("--num_samples", type=int, default=2400)
    parser.add_argument("--num_reference", type=int, default=20_000)
    parser.add_argument("--batch_size", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples_dir", type=Path, default=Path("outputs/judge-priors"))
    parser.add_argument("--cache_dir", type=Path, help="Of the features; `features` in `--samples_dir` by default.")
    parser.add_argument("--output_file", type=Path, required=True)
    args = parser.parse_args(argv)
    if args.num_samples % len(TEXTURE_CLASSES) or args.num_samples < 1:
        parser.error(f"`num_samples` must be a multiple of {len(TEXTURE_CLASSES)}, got {args.num_samples}.")
    return args


def reference_name(args: argparse.Namespace) -> str:
    """Name of the images that the judges compare with."""
    return f"textures:{args.num_reference}:{REFERENCE_SEED}"


def find_sets(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The sets that are wanted, with the scale of their last stage."""
    scale, found = args.guidance_scale, {}
    for name, call in SETS.items():
        if args.bounds and "image" not in call or name == WRONG and args.labels == "none":
            continue
        scales = call["guidance_scale"]
        if call["num_stages"] > 1:
            scales = [*scales[:-1], scale] if isinstance(scales, list) else scale
        found[name] = {**call, "guidance_scale": scales}
    return found


def label_images(labels: str, number: int) -> np.ndarray:
    """The label (n,) of each texture of [`IMAGE_SEED`]."""
    return LABELS[labels](number, IMAGE_SEED)[1] if labels in LABELS else np.arange(number) % len(TEXTURE_CLASSES)


def find_source(labels: np.ndarray, index: int, of_another: bool) -> int:
    """The image whose prior image `index` has: itself, or one of another label of its twelve, in turn."""
    if not of_another:
        return index
    number = len(TEXTURE_CLASSES)
    row = index - index % number
    places = [row + (index + shift) % number for shift in range(1, number)]
    places = [place for place in places if labels[place] != labels[index]]
    return places[index // number % len(places)]


def draw_samples(
    pipeline: DoDPipeline, call: dict[str, Any], labels: np.ndarray, args: argparse.Namespace
) -> np.ndarray:
    """Images (n, 32, 32, 3) in uint8 of the `labels`."""
    side = pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
    sources, batches = TextureDataset(args.num_samples, size=side, seed=IMAGE_SEED), []
    for start in tqdm(range(0, args.num_samples, args.batch_size)):
        indices = range(start, min(start + args.batch_size, args.num_samples))
        options = dict(call)
        if "image" in call:
            places = [find_source(labels, index, call["image"] == "another class") for index in indices]
            images = np.stack([sources[place]["image"] for place in places])
            options["image"] = torch.from_numpy(images).permute(0, 3, 1, 2)
        classes = [None] * len(indices) if args.labels == "none" else labels[indices.start : indices.stop].tolist()
        output = pipeline(classes, seed=args.seed, sample_indices=list(indices), output_type="np", **options)
        batches.append(np.round(255 * output.images).astype(np.uint8))
    return np.concatenate(batches)


def sample_all(args: argparse.Namespace) -> dict[str, Path]:
    """The archive of each set, in ADM's layout; those that are missing are sampled."""
    pipeline = DoDPipeline.from_pretrained(args.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    labels = label_images(args.labels, args.num_samples)
    identity = f"{checkpoint_sha256(args.pipeline)} {args.num_samples} {args.seed} {args.batch_size}"
    identity += f" {args.labels}" * (args.labels != "classes")
    guidance = Guidance()
    if args.guidance_model is not None:
        identity += f" {checkpoint_sha256(args.guidance_model)}"
        weaker = DoDTransformer2DModel.from_pretrained(args.guidance_model, subfolder="transformer")
        guidance = Guidance(transformer=weaker)
    archives = {}
    for name, call in find_sets(args).items():
        key = hashlib.sha256(f"{identity} {sorted(call.items())}".encode()).hexdigest()[:12]
        archives[name] = args.samples_dir / f"{name.replace(',', '').replace(' ', '-')}-{key}.npz"
        if not archives[name].is_file():
            print(name, flush=True)
            args.samples_dir.mkdir(parents=True, exist_ok=True)
            images = draw_samples(pipeline, {**call, "guidance": guidance}, labels, args)
            with replacing(archives[name]) as unfinished, unfinished.open("wb") as file:
                np.savez(file, arr_0=images, arr_1=labels)
    return archives


def judge(name: str, archives: dict[str, Path], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All numbers of one judge: of each set, and the differences of [`PAIRS`]."""
    options = JudgeOptions(
        reference=reference_name(args),
        extractor=f"{JUDGES_FOLDER / JUDGES[name]}:extractor",
        metrics=METRICS + ("accuracy",) * (name == args.labels),
        resolution=32,
        device="cpu",
        cache_dir=args.cache_dir or args.samples_dir / "features",
    )
    evaluator = Evaluator(options)
    summaries = {label: evaluator.summarize(open_images(str(file), 32))[0] for label, file in archives.items()}
    found = {}
    for label, summary in summaries.items():
        found |= {f"{key}/{name}/{label}": metric for key, metric in evaluator.compute(summary, True).items()}
    references = {metric: evaluator.prepared(metric) for metric in METRICS}
    for first, second in find_pairs(summaries):
        differences = compare_summaries(summaries[first], summaries[second], references)
        found |= {f"{key}/{name}/{first} - {second}": metric for key, metric in differences.items()}
    return found


def find_pairs(sets: Iterable[str]) -> list[tuple[str, str]]:
    """The [`PAIRS`] of the sets."""
    return [pair for pair in PAIRS if set(pair) <= set(sets)]


def to_tables(metrics: dict[str, dict[str, Any]], sets: Iterable[str]) -> str:
    """Tables of the sets and of the differences, a column for each judge, for each of [`SHOWN`]."""
    tables = []
    for rows in (list(sets), [f"{first} - {second}" for first, second in find_pairs(sets)]):
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
    sets = find_sets(args)
    print(to_tables(metrics, sets))
    write_results(
        args.output_file,
        task="judges",
        argv=sys.argv[1:],
        metrics=metrics,
        data={"reference": reference_name(args), "images": f"textures, seed {IMAGE_SEED}"},
        settings={
            "sets": sets,
            **{
                name: getattr(args, name) for name in ("labels", "guidance_model", "num_samples", "batch_size", "seed")
            },
        },
        device="cpu",
        checkpoint=args.pipeline,
    )


if __name__ == "__main__":
    main()
