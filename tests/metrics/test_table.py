# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""The table of metrics, against what commands take, what results hold and what documents name."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from diffusers_dod.metrics.extractors import ImageFeatures
from diffusers_dod.metrics.inception_score import RunningInceptionScore
from diffusers_dod.metrics.statistics import RunningStatistics
from diffusers_dod.metrics.summary import FeatureSummary
from diffusers_dod.metrics.table import COMPUTED, METRICS


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", COMPUTED)
def test_numbers_have_names_of_the_table(name):
    """A metric gives numbers that are rows themselves; those of as many other samples lie in intervals of a width."""
    rng, metric = np.random.default_rng(0), METRICS[name]
    scores = [RunningInceptionScore(10) for _ in range(4)]
    summary = FeatureSummary(np.repeat(np.arange(4), 10), {}, scores, is_correct=np.arange(40) < 30)
    for score in scores:
        score.update(rng.normal(size=(10, 5)), np.arange(0, 40, 4))
    summary.rows = {"features": rng.normal(size=(40, 4))}
    for output in ("features", "spatial_features"):
        summary.statistics[output] = [RunningStatistics() for _ in range(4)]
        for group in summary.statistics[output]:
            group.update(rng.normal(size=(10, 4)))
    features = rng.normal(size=(50, 4))
    reference = {None: None, "statistics": (features.mean(axis=0), np.cov(features, rowvar=False))}.get(metric.needs)
    if metric.needs == "features":
        reference = features
    if metric.prepare is not None:
        reference = metric.prepare(reference, "cpu")
    for has_interval in (True, False):
        found = metric.compute(summary, reference, has_interval)
        assert set(found) <= METRICS.keys()
        assert all(np.isfinite(number["value"]) for number in found.values())
        has_any = has_interval and name != "fid_infinity"
        assert any(number["interval"] is not None for number in found.values()) == has_any


def test_rows_fit_each_other():
    outputs = {field.name for field in dataclasses.fields(ImageFeatures)}
    for name, metric in METRICS.items():
        assert re.fullmatch("[a-z0-9-]+(_recall|_coverage|_corrected|_infinity)?", name) and metric.title
        assert metric.needs in (None, "statistics", "features")
        assert (metric.of in outputs) == (metric.compute is not None), name
        assert metric.compute is not None or metric.needs is metric.prepare is None
    titles = [metric.title for metric in METRICS.values()]
    assert len(set(titles)) == len(titles)


def test_published_numbers_are_of_the_table():
    kinds = set()
    for path in ROOT.glob("docs/results/**/*.json"):
        results = json.loads(path.read_text())
        if results.get("task") in ("evaluate", "sweep", "reconstruction", "linear_probe"):
            kinds |= {re.match("[^_/]+", name)[0] for name in results["metrics"]}
    assert len(kinds) > 8 and kinds <= METRICS.keys()


def test_documentation_names_what_can_be_computed():
    text = (ROOT / "docs" / "evaluation.md").read_text()
    (row,) = re.findall(r"^\| `training/evaluate_dod.py` \| (.+) \|$", text, re.MULTILINE)
    assert [name for name in COMPUTED if METRICS[name].title not in row] == []
    assert [name for name in COMPUTED if not re.search(rf"--metrics [a-z_ ]*\b{name}\b", text)] == []
