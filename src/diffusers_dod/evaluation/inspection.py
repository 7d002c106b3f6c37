# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""What an evaluation shows beside its numbers: samples with their nearest reference images, and the worst classes."""

from pathlib import Path

import numpy as np
from PIL import Image

from ..data.image_grid import make_grid
from ..files import replacing
from ..metrics.precision_recall import ReferenceManifold
from ..metrics.summary import FeatureSummary
from .images import ImageSource


NUM_ROWS = 12  # samples in a grid
NUM_NEAREST = 5  # reference images of each
MIN_SIDE = 64  # pixels of an image in a grid, at least
NUM_NEIGHBORS = 3  # of precision and recall


def _read(images: ImageSource, indices: np.ndarray) -> dict[int, Image.Image]:
    """The images at some indices, by index."""
    indices = np.unique(indices)
    arrays = (image for batch, _ in images.batches(16, indices) for image in batch.permute(0, 2, 3, 1).numpy())
    return {int(index): Image.fromarray(array) for index, array in zip(indices, arrays, strict=True)}


def draw_nearest(
    path: Path,
    samples: ImageSource,
    indices: np.ndarray,
    summary: FeatureSummary,
    reference: ImageSource,
    manifold: ReferenceManifold,
) -> None:
    """
    Draws the samples that are nearest to a reference image, each beside its nearest reference images.

    Captions say the index of a sample, and the distance in features of its nearest reference image.

    Args:
        path (`Path`): The PNG file.
        samples ([`ImageSource`]): The samples.
        indices (`np.ndarray` of shape `(n,)`): Indices of the samples in the summary.
        summary ([`FeatureSummary`]): The features of these samples.
        reference ([`ImageSource`]): The reference.
        manifold ([`ReferenceManifold`]): The features of all its images.
    """
    number = min(NUM_NEAREST, len(reference))
    distances, nearest = manifold.find_nearest(summary.rows["features"], number)
    chosen = np.argsort(distances[:, 0], kind="stable")[:NUM_ROWS]
    sampled, found = _read(samples, indices[chosen]), _read(reference, nearest[chosen])
    rows = [[sampled[int(indices[i])], *(found[int(j)] for j in nearest[i])] for i in chosen]
    grid = make_grid(
        rows,
        scale=max(1, MIN_SIDE // rows[0][0].width),
        title=f"{len(chosen)} of {len(indices):,} samples, nearest to the reference",
        column_names=["sample", *(f"nearest {rank}" for rank in range(1, number + 1))],
        row_names=[f"{indices[i]}: {distances[i, 0]:.3g}" for i in chosen],
    )
    with replacing(path) as unfinished:
        grid.save(unfinished, format="png")


def accuracy_by_class(summary: FeatureSummary) -> list[tuple[int, float, int]]:
    """The accuracy of the samples of each class in `summary`: class id, accuracy, number; the worst first."""
    found = []
    for label in np.unique(summary.labels):
        is_correct = summary.is_correct[summary.labels == label]
        found.append((int(label), float(is_correct.mean()), len(is_correct)))
    return sorted(found, key=lambda row: row[1:])


def recall_by_class(
    summary: FeatureSummary, reference: np.ndarray, labels: np.ndarray
) -> list[tuple[int, float, int]]:
    """
    The recall of each class: the share of its reference images within the manifold of its own samples.

    Args:
        summary ([`FeatureSummary`]): The samples, with features and class ids.
        reference (`np.ndarray` of shape `(m, d)`): Features of the reference.
        labels (`np.ndarray` of shape `(m,)`): Class ids of the reference.

    Returns:
        `list[tuple[int, float, int]]`: Class id, recall and number of samples, the worst first. A class with no
        more than 3 samples or reference images has no recall, and is left out.
    """
    found = []
    for label in np.intersect1d(summary.labels, labels):
        parts = [summary.rows["features"][summary.labels == label], reference[labels == label]]
        if min(map(len, parts)) > NUM_NEIGHBORS:
            manifold = ReferenceManifold(parts[1], NUM_NEIGHBORS)
            found.append((int(label), manifold.compare(parts[0]).recall, len(parts[0])))
    return sorted(found, key=lambda row: row[1:])
