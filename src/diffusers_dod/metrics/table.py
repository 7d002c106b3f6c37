# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
The table of metrics. A new metric is a file with its formula, and a row here.

`evaluate`, `sweep` and model cards read this table. Metrics without `compute` belong to other commands.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..results import as_metric
from .frechet import as_fid, covariance_root, fid_infinity
from .kernel_distance import kernel_distance
from .precision_recall import ReferenceManifold
from .summary import FeatureSummary, as_accuracy, as_authenticity
from .vision import is_dinov2


@dataclass(frozen=True)
class Metric:
    """
    A row of the table.

    Args:
        title (`str`): Name in tables and on cards.
        hub_type (`str`, *optional*): Name on the Hub, if it differs.
        of (`str`, *optional*): Output of the extractor that the metric takes, a field of [`ImageFeatures`].
        needs (`str`, *optional*):
            Data of the reference that the metric needs: `"statistics"` (mean and covariance) or `"features"` of all
            images.
        compute (`Callable`, *optional*):
            Takes a [`FeatureSummary`] of samples, the data of the reference, and whether to give intervals. Returns an
            [`as_metric`] for each number, by name.
        subsets (`Callable`, *optional*):
            Takes what `compute` takes but the last. Returns the numbers of independent parts of the samples, of which
            the metric is the mean; the difference of two models is taken from these parts.
        prepare (`Callable`, *optional*):
            Takes the data that the metric needs of the reference, and a device. Returns the data that `compute` takes
            in their place; they are made once for any number of sets of samples.
    """

    title: str
    hub_type: str | None = None
    of: str | None = None
    needs: str | None = None
    compute: Callable[[FeatureSummary, Any, bool], dict[str, dict[str, Any]]] | None = None
    subsets: Callable[[FeatureSummary, Any], tuple[float, ...]] | None = None
    prepare: Callable[[Any, torch.device | str], Any] | None = None


def _with_root(statistics: tuple[np.ndarray, np.ndarray], _: torch.device | str) -> tuple[np.ndarray, ...]:
    return (*statistics, covariance_root(statistics[1]))


# Metrics by name. Names in results may have more after `_` or `/`, such as `fid_stage_1`.
METRICS = {
    "fid": Metric(
        title="FID",
        of="features",
        needs="statistics",
        prepare=_with_root,
        compute=lambda samples, *data: as_fid("fid", samples.statistics["features"], *data),
    ),
    "fid_corrected": Metric(title="FID, corrected"),
    "fid_infinity": Metric(
        title="FID-infinity",
        of="features",
        needs="statistics",
        prepare=_with_root,
        compute=lambda samples, reference, _: {
            "fid_infinity": as_metric(fid_infinity(samples.statistics["features"], reference))
        },
    ),
    "fd-dinov2": Metric(title="FD-DINOv2"),
    "fd-dinov2_corrected": Metric(title="FD-DINOv2, corrected"),
    "fd-dinov2_infinity": Metric(title="FD-DINOv2-infinity"),
    "sfid": Metric(
        title="sFID",
        of="spatial_features",
        needs="statistics",
        prepare=_with_root,
        compute=lambda samples, *data: as_fid("sfid", samples.statistics["spatial_features"], *data),
    ),
    "sfid_corrected": Metric(title="sFID, corrected"),
    "kid": Metric(
        title="KID",
        hub_type="kernel_inception_distance",
        of="features",
        needs="features",
        compute=lambda samples, reference, interval: kernel_distance(samples.rows["features"], reference).as_metrics(
            interval
        ),
        subsets=lambda samples, reference: kernel_distance(samples.rows["features"], reference).subsets,
    ),
    "is": Metric(
        title="Inception Score",
        hub_type="inception_score",
        of="logits",
        compute=lambda samples, _, interval: samples.inception_score().as_metrics(interval),
    ),
    "precision_recall": Metric(
        title="precision and recall",
        of="features",
        needs="features",
        prepare=lambda features, device: ReferenceManifold(features, device=device),
        compute=lambda samples, manifold, interval: manifold.compare(samples.rows["features"]).as_metrics(interval),
    ),
    "density_coverage": Metric(
        title="density and coverage",
        of="features",
        needs="features",
        prepare=lambda features, device: ReferenceManifold(features, num_neighbors=5, device=device),
        compute=lambda samples, manifold, interval: manifold.density_coverage(samples.rows["features"]).as_metrics(
            interval
        ),
    ),
    "density": Metric(title="density"),
    "coverage": Metric(title="coverage"),
    "authenticity": Metric(
        title="authenticity",
        of="features",
        needs="features",
        prepare=lambda features, device: ReferenceManifold(features, num_neighbors=1, device=device),
        compute=lambda samples, *data: {"authenticity": as_authenticity(samples, *data)},
    ),
    # The Hub's `precision` and `recall` are metrics of classifiers.
    "precision": Metric(title="precision", hub_type="improved_precision"),
    "recall": Metric(title="recall", hub_type="improved_recall"),
    "accuracy": Metric(
        title="accuracy",
        of="logits",
        compute=lambda samples, _, interval: {"accuracy": as_accuracy(samples, interval)},
    ),
    "rfid": Metric(title="rFID"),
    "psnr": Metric(title="PSNR, dB"),
    "ssim": Metric(title="SSIM"),
    "top1": Metric(title="top-1 accuracy"),
    "top5": Metric(title="top-5 accuracy"),
    "knn": Metric(title="k-NN accuracy"),
}
COMPUTED = tuple(name for name, metric in METRICS.items() if metric.compute is not None)


def name_by_extractor(metrics: dict[str, Any], extractor: str) -> dict[str, Any]:
    """Names the numbers in `metrics` by the name of their `extractor`: the FID on features of DINOv2 is FD-DINOv2."""
    if not is_dinov2(extractor):
        return metrics
    return {re.sub(r"^fid(?=_|$)", "fd-dinov2", name): metric for name, metric in metrics.items()}
