# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""The features of samples, in the form in which metrics take them."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..results import as_metric
from .inception_score import RunningInceptionScore
from .intervals import wilson_interval
from .statistics import RunningStatistics


@dataclass
class FeatureSummary:
    """
    Summary of the features of images. It keeps the features of all images only where a metric needs them.

    Args:
        statistics (`dict[str, list[RunningStatistics]]`):
            Mean and covariance of the `features` and of the `spatial_features`, where there are any, by group.
        inception_score ([`RunningInceptionScore`]): The score of the logits, where there are any.
        num_images (`int`, defaults to 0): Number of images.
        num_correct (`int`, defaults to 0): Images whose largest logit is that of their class.
        rows (`dict[str, np.ndarray]`, defaults to `{}`):
            Outputs of the extractor that are kept, for all images: `features` of shape `(n, d)`, in fp32.
    """

    statistics: dict[str, list[RunningStatistics]]
    inception_score: RunningInceptionScore
    num_images: int = 0
    num_correct: int = 0
    rows: dict[str, np.ndarray] = field(default_factory=dict)


def as_accuracy(summary: FeatureSummary, has_interval: bool) -> dict[str, Any]:
    """
    Accuracy as results hold it: the share of images whose largest logit is that of their own class.

    Args:
        summary ([`FeatureSummary`]): The images.
        has_interval (`bool`): Whether it gets Wilson's interval.

    Returns:
        `dict`: [`as_metric`] of the share.
    """
    share = summary.num_correct / summary.num_images
    return as_metric(share, wilson_interval(share, summary.num_images) if has_interval else None)
