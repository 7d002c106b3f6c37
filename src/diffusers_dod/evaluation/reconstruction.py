# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Reconstruction: how much of an image does its visual prior keep (paper, Tables 2 and 3, Figure 4 left)?

Stage 2 draws real images again, each from its own class and its own prior. rFID, PSNR and SSIM compare the result with
the image.

    python -m diffusers_dod.evaluation.reconstruction --pretrained_model_name_or_path outputs/dod-b \\
        --train_data_dir path/to/imagenet/val --guidance_scales 1 2.5 4 5.5 7 --extractor inception \\
        --output_file results/reconstruction.json

The row `autoencoder` only encodes and decodes: no model in its latents can do better on PSNR and SSIM, except by
chance. rFID is the Fréchet distance to the images themselves, with the 95 % interval of a jackknife. PSNR and SSIM are
means over images, with Student's interval. All metrics use uint8 images, rounded as round(255 x). A run that was
stopped continues after its finished rows.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ..command_line import run_main
from ..data.class_names import check_classes
from ..data.image_grid import make_grid
from ..files import replacing
from ..guidance import Guidance
from ..guidance_options import guidance_option
from ..image_reading import to_pixels
from ..metrics.extractors import Extractor, extract, extractor_sha256, load_extractor
from ..metrics.frechet import frechet_distance
from ..metrics.intervals import jackknife, mean_interval
from ..metrics.pairs import load_structural_similarity, psnr, ssim
from ..metrics.statistics import RunningStatistics, merge_statistics
from ..metrics.table import METRICS
from ..options import option, parse_options
from ..pipeline_dod import DoDPipeline
from ..results import as_metric, describe_versions, half_width, identify_checkpoint, read_results, write_results
from ..tableaus import SOLVERS
from ..tables import format_table
from .options import ComparisonOptions, draw_labelled_images, load_with_embedder, read_batches


AUTOENCODER = "autoencoder"
GRID_COLUMNS = 12
NUM_GROUPS = 10  # of the jackknife


@torch.no_grad()
def reconstruct(
    pipeline: DoDPipeline,
    images: torch.Tensor,
    labels: torch.Tensor,
    indices: list[int],
    guidance_scale: float | None,
    seed: int,
    **call: Any,
) -> np.ndarray:
    """
    Draws images again from their own classes and visual priors: stage 2, with the images in place of stage 1.

    Args:
        pipeline ([`DoDPipeline`]): The model.
        images (`torch.Tensor` of shape `(B, H, W, 3)`): Images in uint8.
        labels (`torch.Tensor` of shape `(B,)`): Class ids of the images.
        indices (`list[int]`): A number for each image. Its noise depends on this number and the seed alone.
        guidance_scale (`float` or `None`): Scale of classifier-free guidance; `None` only encodes and decodes.
        seed (`int`): Seed of the noise.
        call (`Any`): Further arguments of the pipeline's call.

    Returns:
        `np.ndarray` of shape `(B, H, W, 3)`, in uint8.

    Raises:
        `FloatingPointError`: the model gives numbers that are not finite.
        `ValueError`: the model does not take the arguments.
    """
    if guidance_scale is None:
        latents = pipeline.encode_image(to_pixels(images).to(pipeline.device))
        outputs = pipeline.decode_latents(latents, "pt")
    else:
        outputs = pipeline(
            labels,
            num_stages=2,
            guidance_scale=guidance_scale,
            image=images.permute(0, 3, 1, 2),
            height=images.shape[1],
            width=images.shape[2],
            seed=seed,
            sample_indices=indices,
            output_type="pt",
            **call,
        ).images
    return (255 * outputs.float()).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


@dataclass
class Comparison:
    """
    Result of comparing images with their originals.

    Args:
        psnr (`np.ndarray` of shape `(n,)`): PSNR of each image, see [`psnr`].
        ssim (`np.ndarray` of shape `(n,)`): SSIM of each image, see [`ssim`].
        rfid (`float`, *optional*): Fréchet distance of the features, if there is an extractor.
        rfid_interval (`tuple[float, float]`, *optional*): Interval of that distance, see [`rfid_interval`].
    """

    psnr: np.ndarray
    ssim: np.ndarray
    rfid: float | None = None
    rfid_interval: tuple[float, float] | None = None


def _rfid(pairs: list[tuple[RunningStatistics, RunningStatistics]]) -> float:
    images, originals = (merge_statistics(list(side)).result() for side in zip(*pairs, strict=True))
    return frechet_distance(*images, *originals)


def rfid_interval(groups: list[tuple[RunningStatistics, RunningStatistics]]) -> tuple[float, float] | None:
    """
    The interval of the Fréchet distance of images to their own originals, by the jackknife.

    It leaves out images together with their originals, and says how far the distance would move with as many other
    images.

    Args:
        groups (`list[tuple[RunningStatistics, RunningStatistics]]`):
            Features of the images and of their originals in random groups of about the same size.

    Returns:
        `tuple[float, float]`: Lower and upper end, the lower one at least 0; `None` if a group has less than two
        images.
    """
    if min(images.num_rows for images, _ in groups) < 2:
        return None
    low, high = jackknife(groups, _rfid).interval()
    return max(low, 0.0), high


def compare(
    pairs: Iterable[tuple[np.ndarray, np.ndarray]],
    extractor: Extractor | None = None,
    device: torch.device | str = "cpu",
) -> Comparison:
    """
    Compares images with their originals; only two numbers per image stay in memory.

    Args:
        pairs (`Iterable[tuple[np.ndarray, np.ndarray]]`):
            Batches of images and of their originals, (B, H, W, 3) in uint8.
        extractor (`Callable`, *optional*): Images (B, 3, H, W) in uint8 -> features. Without it there is no rFID.
        device (`torch.device` or `str`, defaults to `"cpu"`): Device on which the extractor takes images.

    Returns:
        [`Comparison`].

    Raises:
        `ValueError`: images of a pair do not fit, there are fewer than two images, or features are not finite.
    """
    ratios: list[np.ndarray] = []
    similarities: list[np.ndarray] = []
    groups = [(RunningStatistics(), RunningStatistics()) for _ in range(NUM_GROUPS)]
    rng, num_pairs = np.random.default_rng(0), 0
    for pair in pairs:
        ratios.append(psnr(*pair))
        similarities.append(ssim(*pair))
        if extractor is None:
            continue
        # Dealt in turn and then shuffled, so that groups have the same size and differ in nothing else.
        numbers = rng.permutation((num_pairs + np.arange(len(pair[0]))) % NUM_GROUPS)
        num_pairs += len(pair[0])
        for side, images in enumerate(pair):
            tensor = torch.from_numpy(images).permute(0, 3, 1, 2).to(device)
            features = extract(extractor, tensor).features.float().cpu().numpy()
            for number in np.unique(numbers):
                groups[number][side].update(features[numbers == number])
    rfid, interval = (None, None) if extractor is None else (_rfid(groups), rfid_interval(groups))
    return Comparison(np.concatenate(ratios), np.concatenate(similarities), rfid, interval)


def as_metrics(name: str, comparison: Comparison) -> dict[str, dict[str, Any]]:
    """
    Puts a comparison into the form of results. An infinite PSNR, of an image that is met exactly, is left out.

    Args:
        name (`str`): Name of the compared images, the end of each number's name.
        comparison ([`Comparison`]): The comparison.

    Returns:
        `dict[str, dict]`: An [`as_metric`] for `rfid_<name>`, `psnr_<name>` and `ssim_<name>`.
    """
    metrics = {}
    if comparison.rfid is not None:
        metrics[f"rfid_{name}"] = as_metric(comparison.rfid, comparison.rfid_interval)
    for kind, values in {"psnr": comparison.psnr, "ssim": comparison.ssim}.items():
        if np.isfinite(values).all():
            metrics[f"{kind}_{name}"] = as_metric(values.mean(), mean_interval(values))
    return metrics


def to_table(rows: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Formats `rows`, an [`as_metrics`] by name, as a Markdown table."""
    lines = []
    for name, metrics in rows.items():
        cells = [name]
        for kind, digits, missing in (("rfid", 3, "-"), ("psnr", 2, "inf"), ("ssim", 4, "")):
            metric = metrics.get(f"{kind}_{name}")
            cell = missing if metric is None else f"{metric['value']:.{digits}f}"
            if metric is not None and metric["interval"] is not None:
                cell += f" ± {half_width(metric):.{digits}f}"
            cells.append(cell)
        lines.append(cells)
    return format_table(["reconstruction", *(METRICS[kind].title for kind in ("rfid", "psnr", "ssim"))], lines)


@dataclass(frozen=True, kw_only=True)
class ReconstructionOptions:
    """Options of the command."""

    comparison: ComparisonOptions
    guidance_scales: tuple[float, ...] | None = option(
        None, at_least=0, help="Guidance scales to compare; the checkpoint's default if not given."
    )
    null_condition: str = guidance_option("null_condition")
    num_inference_steps: int | None = option(None, at_least=1, help="Steps; the checkpoint's default if not given.")
    solver: str | None = option(
        None, choices=SOLVERS, help="Solver; the checkpoint's if not given. The paper's is dopri5."
    )
    extractor: str | None = option(None, help="Extractor of the features of rFID; no rFID without one.")
    trust_extractor: bool = option(False, help="Run the code of an extractor in a file.")
    grid_file: Path | None = option(
        None,
        writes="file",
        suffix=".png",
        help="PNG file of the first images above their reconstructions.",
    )

    def find_conflicts(self) -> list[str]:
        """Messages about options that do not fit each other."""
        found, resolution, scales = [], self.comparison.images.resolution, self.guidance_scales or ()
        if resolution < 11:
            found.append(f"`resolution` must be an integer >= 11, the window of SSIM, got {resolution}.")
        if len({f"{scale:g}" for scale in scales}) < len(scales):  # as they are named
            found.append(f"`guidance_scales` must be different numbers, in 6 digits, got {list(scales)}.")
        return found


def read_rows(path: Path, identity: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """
    Reads the finished rows of a run that was stopped.

    Args:
        path (`Path`): The file that it wrote.
        identity (`dict`): Settings that the numbers depend on. The file must have the same.

    Returns:
        `dict[str, dict]`: An [`as_metrics`] for each row, by name; empty if the file belongs to another run.
    """
    try:
        found = read_results(path)
    except ValueError:
        return {}
    if {name: found.get(name) for name in identity} != json.loads(json.dumps(identity)):
        return {}
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for name, metric in found["metrics"].items():
        rows.setdefault(name.partition("_")[2], {})[name] = metric
    return rows


def main(argv: list[str] | None = None) -> None:
    """Runs the command; `argv` defaults to the process's arguments. Raises a `ValueError` if they do not fit."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse_options(ReconstructionOptions, argv, __doc__)
    comparison = options.comparison
    load_structural_similarity()  # missing packages show before hours of sampling
    extractor = None
    if options.extractor is not None:
        extractor = load_extractor(options.extractor, options.trust_extractor, comparison.device, "extractor")
    pipeline = load_with_embedder(comparison)
    images, indices, data = draw_labelled_images(comparison, comparison.num_images)
    check_classes(pipeline, images.class_names)
    indices.sort()

    guidance_scales = options.guidance_scales or (pipeline.config.default_guidance_scale,)
    # In a pixel-space model there is no autoencoder to measure.
    scales: dict[str, float | None] = {} if pipeline.vae is None else {AUTOENCODER: None}
    scales |= {f"scale_{scale:g}": scale for scale in guidance_scales}
    call = {
        "seed": comparison.seed,
        "guidance": Guidance(null_condition=options.null_condition),
        "num_inference_steps": options.num_inference_steps,
        "schedulers": options.solver,
    }
    identity = {
        "checkpoint": identify_checkpoint(comparison.pretrained_model_name_or_path, comparison.lora_weights),
        "data": data,
        "settings": {
            "class_labels": "those of the images",
            "null_condition": options.null_condition,
            "num_inference_steps": options.num_inference_steps or pipeline.config.default_num_inference_steps,
            "scheduler": {name: value for name, value in pipeline.scheduler.config.items() if name[0] != "_"},
            "solver": options.solver,
            "seed": comparison.seed,
            "batch_size": comparison.batch_size,
            "dtype": comparison.dtype,
            "rounding": "round(255 x)",
            "extractor": options.extractor,
            "extractor_sha256": None if extractor is None else extractor_sha256(options.extractor, extractor),
            "ssim": "scikit-image, 11 x 11 Gaussian window, sigma 1.5, K1 0.01, K2 0.03, range 255, mean of channels",
        },
    }

    def pairs(name: str, scale: float | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        batches = read_batches(images, indices, comparison.batch_size, comparison.dataloader_num_workers)
        progress = tqdm(batches, desc=name, total=-(-len(indices) // comparison.batch_size), disable=None)
        for places, originals, labels in progress:
            yield reconstruct(pipeline, originals, labels, places, scale, **call), originals.numpy()

    def write(path: Path, rows: dict[str, dict[str, dict[str, Any]]], **settings: Any) -> None:
        metrics = {key: metric for metrics in rows.values() for key, metric in metrics.items()}
        settings = {**identity["settings"], **settings}
        write_results(
            path,
            task="reconstruction",
            argv=argv,
            metrics=metrics,
            data=data,
            settings=settings,
            device=comparison.device,
            checkpoint=identity["checkpoint"],
        )

    rows_file = comparison.output_file.with_name(f".{comparison.output_file.name}.rows")
    done = read_rows(rows_file, {**identity, "versions": describe_versions(comparison.device)})
    rows = {}
    for name, scale in scales.items():
        rows[name] = done.get(name) or as_metrics(name, compare(pairs(name, scale), extractor, comparison.device))
        write(rows_file, done | rows)
    if options.grid_file is not None:
        places, originals, labels = next(read_batches(images, indices[:GRID_COLUMNS], GRID_COLUMNS))
        grid = [originals.numpy()]
        grid += [reconstruct(pipeline, originals, labels, places, scale, **call) for scale in scales.values()]
        image = make_grid(
            [list(map(Image.fromarray, row)) for row in grid],
            scale=max(1, 64 // comparison.images.resolution),
            title=f"Images, and stage 2 from their own classes and visual priors, seed {comparison.seed}",
            column_names=[images.class_names[label] for label in labels.tolist()],
            row_names=["images", *scales],
        )
        with replacing(options.grid_file) as unfinished:
            image.save(unfinished)
    print(to_table(rows))
    write(comparison.output_file, rows, guidance_scales=guidance_scales)
    rows_file.unlink(missing_ok=True)


if __name__ == "__main__":
    run_main(main)
