"""Samples beside their nearest reference images, and the classes that are worst."""

import numpy as np
import pytest
from helpers import says
from PIL import Image

from diffusers_dod.evaluation import evaluate
from diffusers_dod.evaluation.images import draw_indices
from diffusers_dod.evaluation.inspection import accuracy_by_class, recall_by_class
from diffusers_dod.metrics.precision_recall import ReferenceManifold
from diffusers_dod.metrics.summary import FeatureSummary
from diffusers_dod.results import read_results


pytestmark = pytest.mark.filterwarnings("ignore:FID of", "ignore:The covariance")

EXTRACTOR = """
import torch
from diffusers_dod.metrics.extractors import ImageFeatures

def extractor(images):
    features = images.double().mean(dim=(2, 3))
    return ImageFeatures(features, logits=features)
"""


@pytest.fixture
def world(tmp_path):
    """40 samples of flat color; two of them, 7 and 31, are nearly reference images 3 and 20."""
    (tmp_path / "own.py").write_text(EXTRACTOR)
    rng = np.random.default_rng(0)
    colors, others = rng.integers(0, 250, size=(40, 3)), rng.integers(0, 250, size=(30, 3))
    colors[[7, 31]] = others[[3, 20]] + [[1, 0, 0], [0, 2, 0]]
    for name, values in (("samples", colors), ("reference", others)):
        images = np.zeros((len(values), 8, 8, 3), np.uint8) + values[:, None, None].astype(np.uint8)
        np.savez(tmp_path / f"{name}.npz", arr_0=images, arr_1=np.arange(len(values)) % 3)
    np.savez(tmp_path / "unlabelled.npz", arr_0=images)
    return tmp_path, colors, others


def run(folder, *options, reference="reference.npz"):
    argv = [str(folder / "samples.npz"), "--reference", str(folder / reference), "--device", "cpu"]
    argv += ["--extractor", f"{folder / 'own.py'}:extractor", "--output_file", str(folder / "results.json")]
    evaluate.main([*argv, *map(str, options)])
    return read_results(folder / "results.json")["metrics"]


@pytest.mark.parametrize("number", [40, 36])
def test_a_grid_has_the_copies_on_top(world, number):
    folder, colors, others = world
    options = ("--metrics", "authenticity", "--nearest_grid", folder / "nearest.png", "--num_samples", number)
    found = run(folder, *options)
    assert found["authenticity"]["value"] < 1 and found["authenticity"]["interval"] is not None
    drawn = np.sort(draw_indices(40, number))
    distances = np.linalg.norm(colors[drawn][:, None] - others, axis=2)
    order = np.argsort(distances.min(axis=1))
    grid = np.asarray(Image.open(folder / "nearest.png"))
    side, gap = 64, 2
    for row, i in enumerate(order[:12]):
        middle = grid.shape[0] - (12 - row) * (side + gap) + gap + side // 2
        expected = [colors[drawn[i]], *others[np.argsort(distances[i])[:5]]]
        for column, color in enumerate(expected):
            place = grid.shape[1] - (6 - column) * (side + gap) + gap + side // 2
            assert grid[middle, place].tolist() == color.tolist()
    if number == 40:
        assert drawn[order[:2]].tolist() == [7, 31]


def test_the_worst_classes_are_shown(world, capsys):
    folder, colors, others = world
    worst = run(folder, "--metrics", "precision_recall", "--worst_classes", 2)["recall"]["worst_classes"]
    expected = []
    for label in range(3):
        parts = [rows[np.arange(len(rows)) % 3 == label] for rows in (colors, others)]
        expected.append((ReferenceManifold(parts[1]).compare(parts[0]).recall, len(parts[0]), label))
    assert [(row["value"], row["num_samples"], row["label"]) for row in worst] == sorted(expected)[:2]
    assert f"| {worst[0]['label']} | {worst[0]['value']:.3f} | {worst[0]['num_samples']} |" in capsys.readouterr().out
    (folder / "results.json").unlink()
    with pytest.raises(ValueError, match=says("`reference`", "class ids", "got none")):
        run(folder, "--metrics", "precision_recall", "--worst_classes", 2, reference="unlabelled.npz")
    assert set(read_results(folder / "results.json")["metrics"]) >= {"precision", "recall"}  # nothing is lost
    for options, text in (
        (("--metrics", "fid", "--worst_classes", 1), "`accuracy` or `precision_recall`"),
        (("--metrics", "fid", "--nearest_grid", folder / "nearest.png"), "`authenticity` for `nearest_grid`"),
    ):
        with pytest.raises(SystemExit):
            run(folder, *options)
        assert text in capsys.readouterr().err
    argv = [str(folder / "samples.npz"), "--extractor", f"{folder / 'own.py'}:extractor", "--metrics", "accuracy"]
    argv += ["--output_file", str(folder / "results.json"), "--worst_classes", "1", "--device", "cpu"]
    evaluate.main(argv)
    (worst,) = read_results(folder / "results.json")["metrics"]["accuracy"]["worst_classes"]
    is_correct = colors.argmax(axis=1) == np.arange(40) % 3
    shares = [(is_correct[label::3].mean(), len(is_correct[label::3]), label) for label in range(3)]
    assert (worst["value"], worst["num_samples"], worst["label"]) == min(shares)


def test_classes_with_too_few_images_have_no_recall():
    rng = np.random.default_rng(0)
    labels, others = np.array([0] * 10 + [1] * 3 + [2] * 10), np.array([0] * 8 + [1] * 8 + [2] * 3 + [5] * 4)
    rows = {"features": rng.normal(size=(23, 2))}
    summary = FeatureSummary(np.zeros(23, int), {}, [], labels, np.arange(23) % 2 == 1, rows)
    assert [row[0] for row in recall_by_class(summary, rng.normal(size=(23, 2)), others)] == [0]
    assert accuracy_by_class(summary) == [(1, 1 / 3, 3), (0, 0.5, 10), (2, 0.5, 10)]
