# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""The features of samples, in the form in which metrics take them."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..results import as_metric
from .inception_score import InceptionScore, RunningInceptionScore
from .intervals import wilson_interval
from .precision_recall import ReferenceManifold
from .statistics import RunningStatistics


@dataclass
class FeatureSummary:
    """
    Summary of the features of images. It keeps the features of all images only where a metric needs them.

    Args:
        groups (`np.ndarray` of shape `(n,)`): The group of each image, from 0 on, see [`jackknife`].
        statistics (`dict[str, list[RunningStatistics]]`):
            Mean and covariance of the `features` and of the `spatial_features`, where there are any, by group.
        inception_scores (`list[RunningInceptionScore]`): The score of the logits, where there are any, by group.
        labels (`np.ndarray` of shape `(n,)`, *optional*): Class ids of the images, if they have any.
        is_correct (`np.ndarray` of shape `(n,)`, *optional*):
            Whether the largest logit of each image is that of its class, if there are both.
        rows (`dict[str, np.ndarray]`, defaults to `{}`):
            Outputs of the extractor that are kept, for all images: `features` of shape `(n, d)`, in fp32.
    """

    groups: np.ndarray
    statistics: dict[str, list[RunningStatistics]]
    inception_scores: list[RunningInceptionScore]
    labels: np.ndarray | None = None
    is_correct: np.ndarray | None = None
    rows: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def num_groups(self) -> int:
        """Number of groups."""
        return len(self.inception_scores)

    def inception_score(self) -> InceptionScore:
        """The score of all images."""
        merged = RunningInceptionScore(self.inception_scores[0].split_size)
        for score in self.inception_scores:
            merged.merge(score)
        return merged.result()

    def without(self, group: int) -> "FeatureSummary":
        """The summary of all images but those of the group `group`."""
        is_kept = self.groups != group

        def drop(values: list) -> list:
            return values[:group] + values[group + 1 :]

        def keep(values: np.ndarray | None) -> np.ndarray | None:
            return None if values is None else values[is_kept]

        return FeatureSummary(
            self.groups[is_kept] - (self.groups[is_kept] > group),
            {name: drop(groups) for name, groups in self.statistics.items()},
            drop(self.inception_scores),
            labels=keep(self.labels),
            is_correct=keep(self.is_correct),
            rows={name: rows[is_kept] for name, rows in self.rows.items()},
        )


def as_accuracy(summary: FeatureSummary, has_interval: bool) -> dict[str, Any]:
    """
    Accuracy as results hold it: the share of images whose largest logit is that of their own class.

    Args:
        summary ([`FeatureSummary`]): The images.
        has_interval (`bool`): Whether it gets Wilson's interval.

    Returns:
        `dict`: [`as_metric`] of the share.
    """
    share, number = float(summary.is_correct.mean()), len(summary.groups)
    return as_metric(share, wilson_interval(share, number) if has_interval else None)


def as_authenticity(summary: FeatureSummary, manifold: ReferenceManifold, has_interval: bool) -> dict[str, Any]:
    """
    Authenticity as results hold it: the share of samples that are no copies; 100 times it is AuthPct.

    Args:
        summary ([`FeatureSummary`]): The samples.
        manifold ([`ReferenceManifold`]): The images of the training, with 1 neighbour.
        has_interval (`bool`): Whether it gets Wilson's interval.

    Returns:
        `dict`: [`as_metric`] of the share.
    """
    number = len(summary.groups)
    share = manifold.count_authentic(summary.rows["features"]) / number
    return as_metric(share, wilson_interval(share, number) if has_interval else None)
