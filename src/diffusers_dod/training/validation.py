# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Samples during a run: a grid of images of each stage, and the Fréchet distance of each stage."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image

from ..data.image_grid import make_grid
from ..metrics.extractors import Extractor, extract
from ..metrics.frechet import feature_statistics, frechet_distance
from ..pipeline_dod import DoDPipeline


def _never() -> bool:
    return False


def _sample_own(
    pipeline: DoDPipeline,
    labels: list[int],
    seed: int,
    accelerator: Accelerator,
    batch_size: int,
    is_stopped: Callable[[], bool],
    **call: Any,
) -> list[tuple[int, list[np.ndarray]]]:
    """
    Draws this process's share of samples: pairs of a place and images (stages, H, W, 3) in uint8 of that place.

    Raises in all processes a `FloatingPointError` if samples of one are not finite, and an `InterruptedError` if one
    is stopped, which it asks before each step of a solver.
    """

    def interrupt(pipeline: DoDPipeline, *step: Any) -> dict:
        pipeline._interrupt = is_stopped()
        return {}

    samples, error = [], None
    own = list(range(accelerator.process_index, len(labels), accelerator.num_processes))
    for start in range(0, len(own), batch_size):
        places = own[start : start + batch_size]
        try:
            with accelerator.autocast():
                output = pipeline(
                    [labels[place] for place in places],
                    seed=seed,
                    sample_indices=places,
                    return_stages=True,
                    output_type="np",
                    callback_on_step_end=interrupt,
                    **call,
                )
        except FloatingPointError as caught:
            error = FloatingPointError(str(caught))
            break
        if is_stopped():
            error = InterruptedError("Samples are not whole.")
            break
        stages = [(np.asarray(stage) * 255).round().astype(np.uint8) for stage in output.stages]
        samples += [(place, [stage[i] for stage in stages]) for i, place in enumerate(places)]
    for failure in filter(None, gather_object([error])):
        raise failure
    return samples


def stage_grid(
    pipeline: DoDPipeline,
    seed: int,
    accelerator: Accelerator,
    num_columns: int = 12,
    samples_per_class: int = 2,
    title: str | None = None,
    is_stopped: Callable[[], bool] = _never,
    **call: Any,
) -> Image.Image:
    """
    Draws a grid of samples: a column per class, and for each sample a row per stage, with stage 1 on top.

    Captions name class and stage.

    Args:
        pipeline ([`DoDPipeline`]): The model.
        seed (`int`): Seed of the noise.
        accelerator (`Accelerator`): The processes. They share the samples.
        num_columns (`int`, defaults to 12): Number of classes to show, from the first.
        samples_per_class (`int`, defaults to 2): Number of samples of each class.
        title (`str`, *optional*): Caption of the grid.
        is_stopped (`Callable`, defaults to `_never`): Tells before each step of a solver whether to stop.
        call (`Any`): Further arguments of the pipeline's call.

    Returns:
        `PIL.Image.Image`: The grid. Its images are enlarged by the largest integer that keeps them within 64 pixels.

    Raises:
        `FloatingPointError`: samples are not finite, in any process.
        `InterruptedError`: a process is stopped.
    """
    classes = list(range(min(num_columns, pipeline.transformer.config.num_classes)))
    labels = classes * samples_per_class
    own = _sample_own(pipeline, labels, seed, accelerator, batch_size=len(classes), is_stopped=is_stopped, **call)
    samples = dict(gather_object(own))
    rows = []
    for start in range(0, len(labels), len(classes)):
        columns = [samples[start + i] for i in range(len(classes))]
        rows += [[Image.fromarray(column[stage]) for column in columns] for stage in range(len(columns[0]))]
    num_stages = len(rows) // samples_per_class
    return make_grid(
        rows,
        scale=max(1, 64 // rows[0][0].width),
        title=title,
        column_names=[pipeline.id2label.get(label, f"class {label}") for label in classes],
        row_names=[f"stage {stage + 1}" for stage in range(num_stages)] * samples_per_class,
    )


def stage_distances(
    pipeline: DoDPipeline,
    extractor: Extractor,
    reference: tuple[np.ndarray, np.ndarray],
    num_samples: int,
    seed: int,
    accelerator: Accelerator,
    batch_size: int = 64,
    is_stopped: Callable[[], bool] = _never,
    **call: Any,
) -> dict[str, float]:
    """
    Computes the Fréchet distance of each stage's samples to a reference; the fewer samples, the more it is too large.

    Args:
        pipeline ([`DoDPipeline`]): The model.
        extractor (`Callable`): Images (B, 3, H, W) in uint8 -> features (B, d) or [`ImageFeatures`].
        reference (`tuple[np.ndarray, np.ndarray]`): Mean and covariance of the reference features.
        num_samples (`int`): Number of samples, of all classes in turn.
        seed (`int`): Seed of the noise.
        accelerator (`Accelerator`): The processes. They share the samples.
        batch_size (`int`, defaults to 64): Samples per call of the pipeline.
        is_stopped (`Callable`, defaults to `_never`): Tells before each step of a solver whether to stop.
        call (`Any`): Further arguments of the pipeline's call.

    Returns:
        `dict[str, float]`: `fid_stage_<n>` for each stage.

    Raises:
        `FloatingPointError`: samples are not finite, in any process.
        `InterruptedError`: a process is stopped.
    """
    num_classes = pipeline.transformer.config.num_classes
    labels = [place % num_classes for place in range(num_samples)]
    own = _sample_own(pipeline, labels, seed, accelerator, batch_size=batch_size, is_stopped=is_stopped, **call)
    features: list[tuple[int, list[np.ndarray]]] = []
    for start in range(0, len(own), batch_size):
        if is_stopped():
            break
        chunk = own[start : start + batch_size]
        of_stages = []
        for stage in range(len(chunk[0][1])):
            images = torch.from_numpy(np.stack([images[stage] for _, images in chunk])).permute(0, 3, 1, 2)
            of_stages.append(extract(extractor, images.to(accelerator.device)).features.float().cpu().numpy())
        features += [(place, [rows[i] for rows in of_stages]) for i, (place, _) in enumerate(chunk)]
    all_features = dict(gather_object(features))
    if len(all_features) < num_samples:
        raise InterruptedError("Features are not whole.")
    return {
        f"fid_stage_{stage + 1}": frechet_distance(
            *feature_statistics(np.stack([all_features[place][stage] for place in range(num_samples)])), *reference
        )
        for stage in range(len(all_features[0]))
    }
