"""The difference of two sets of samples, against plain loops and simulated models."""

import numpy as np
import pytest
from helpers import says

from diffusers_dod.evaluation import compare, evaluate, features
from diffusers_dod.evaluation.images import open_images
from diffusers_dod.evaluation.reproduce import reproduce
from diffusers_dod.metrics.inception_score import RunningInceptionScore
from diffusers_dod.metrics.precision_recall import ReferenceManifold
from diffusers_dod.metrics.statistics import RunningStatistics
from diffusers_dod.metrics.summary import FeatureSummary
from diffusers_dod.options import parse_options
from diffusers_dod.results import read_results


pytestmark = pytest.mark.filterwarnings("ignore:FID of", "ignore:The covariance", "ignore:The last split")

EXTRACTOR = """
import torch
from diffusers_dod.metrics.extractors import ImageFeatures

def extractor(images):
    features = torch.stack([images[:, i].double().mean(dim=(1, 2)) for i in range(3)], dim=1) / 255
    return ImageFeatures(features, features * 2, logits=20 * features)
"""
ALL = ("fid", "sfid", "kid", "is", "precision_recall", "accuracy")


def draw(seed: int, number: int = 60) -> np.ndarray:
    """Images of classes 0, 1 and 2 in turn, brightest in the channel of their class."""
    images = np.random.default_rng(seed).integers(0, 200, size=(number, 2, 2, 3))
    images[np.arange(number), :, :, np.arange(number) % 3] += 40 + 5 * seed
    return images.clip(0, 255).astype(np.uint8)


@pytest.fixture
def world(tmp_path):
    (tmp_path / "own.py").write_text(EXTRACTOR)
    np.savez(tmp_path / "a.npz", arr_0=draw(1), arr_1=np.arange(60) % 3)
    np.savez(tmp_path / "b.npz", arr_0=draw(2), arr_1=np.arange(60) % 3)
    np.savez(tmp_path / "reference.npz", arr_0=draw(3, 80))
    return tmp_path


def arguments(world, *options, metrics=ALL) -> list[str]:
    argv = ["--reference", str(world / "reference.npz"), "--extractor", f"{world / 'own.py'}:extractor"]
    return [*argv, "--metrics", *metrics, "--device", "cpu", *map(str, options)]


def run(world, *options, first="a.npz", second="b.npz", **settings) -> dict:
    output = world / "comparison.json"
    argv = [str(world / first), str(world / second), *arguments(world, *options, **settings)]
    compare.main([*argv, "--output_file", str(output)])
    return read_results(output)


def judge(world, images: np.ndarray, labels: np.ndarray, metrics) -> dict:
    """The numbers of `evaluate` for these images."""
    np.savez(world / "part.npz", arr_0=images, arr_1=labels)
    argv = [str(world / "part.npz"), *arguments(world, metrics=metrics), "--num_groups", "0"]
    options = parse_options(evaluate.EvaluationOptions, argv)
    found, _ = evaluate.Evaluator(options.judge).evaluate(open_images(options.samples))
    return {name: metric["value"] for name, metric in found.items()}


def test_differences_against_leaving_out_the_images_themselves(world, capsys):
    results = run(world, "--num_groups", 3)
    found, labels = results["metrics"], np.arange(60) % 3
    printed = capsys.readouterr().out
    assert list(found) == [
        *("fid", "fid_corrected", "sfid", "sfid_corrected", "kid", "is", "precision", "recall", "accuracy")
    ]
    names = [name for name in ALL if name != "kid"]
    groups = features.assign_groups(60, 3, labels)
    whole = [judge(world, images, labels, ALL) for images in (draw(1), draw(2))]
    without = [
        [judge(world, images[groups != i], labels[groups != i], names) for images in (draw(1), draw(2))]
        for i in range(3)
    ]
    for name in set(found) - {"kid", "fid_corrected", "sfid_corrected"}:
        assert (found[name]["first"], found[name]["second"]) == pytest.approx([of[name] for of in whole])
        differences = np.array([first[name] - second[name] for first, second in without])
        value, error = whole[0][name] - whole[1][name], 2**0.5 * differences.std()
        assert found[name]["value"] == pytest.approx(value)
        margin = 4.3026527 * error  # Student's t of 2 degrees of freedom
        assert found[name]["interval"] == pytest.approx([value - margin, value + margin], rel=1e-5)
        assert found[name]["detectable"] == pytest.approx((4.3026527 + 1.0606602) * error, rel=1e-5)
        if name in ("fid", "sfid"):
            corrected = found[f"{name}_corrected"]
            assert corrected["value"] == pytest.approx(3 * value - 2 * differences.mean())
            assert corrected["value"] == pytest.approx(corrected["first"] - corrected["second"])
            assert np.ptp(corrected["interval"]) == pytest.approx(2 * margin, rel=1e-5)
    assert found["kid"]["value"] == pytest.approx(whole[0]["kid"] - whole[1]["kid"])
    assert "60 samples of the same two models" in printed and "same class ids, image by image" in printed
    assert "80 %" in printed and "several trainings" in printed
    assert results["data"]["samples"] != results["data"]["others"]


def test_a_set_compared_with_itself_differs_by_nothing(world):
    for metric in run(world, second="a.npz")["metrics"].values():
        assert metric["value"] == metric["detectable"] == 0 and metric["interval"] == [0, 0]


def test_a_comparison_can_be_computed_again(world):
    run(world, metrics=["fid", "kid"])
    rows = reproduce(world / "comparison.json", 0.0, trust_extractor=True)
    assert [row["name"] for row in rows] == ["fid", "fid_corrected", "kid"]
    assert all(row["agrees"] for row in rows)


def test_sets_that_differ_in_size_or_classes(world, capsys):
    np.savez(world / "few.npz", arr_0=draw(2)[:45], arr_1=np.arange(45) % 3)
    with pytest.raises(ValueError, match=says("`num_samples`", "different sizes", "60 images", "45 of")):
        run(world, second="few.npz")
    assert "in size" in run(world, "--num_samples", 30, second="few.npz", metrics=["fid"])["data"]["labels"]
    for labels, text in (
        (np.repeat(np.arange(3), 20), "in another order"),
        (np.arange(60) % 2, "also those of the classes"),
        (None, "a.npz only: they are not compared"),
    ):
        np.savez(world / "other.npz", arr_0=draw(2), **({} if labels is None else {"arr_1": labels}))
        assert text in run(world, second="other.npz", metrics=["fid"])["data"]["labels"]
    for options, text in ((["--num_groups", "0"], "got 0"), (["--num_samples", "1"], "`num_samples`")):
        with pytest.raises(SystemExit):
            run(world, *options)
        assert text in capsys.readouterr().err


def summarize(rows: np.ndarray, groups: np.ndarray) -> FeatureSummary:
    parts = [RunningStatistics() for _ in range(10)]
    for group, part in enumerate(parts):
        part.update(rows[groups == group])
    scores = [RunningInceptionScore() for _ in range(10)]
    return FeatureSummary(groups, {"features": parts}, scores, rows={"features": rows})


def test_intervals_hold_the_mean_difference_of_further_sets():
    """Two models with common noise: 95 % of the intervals hold what their sets differ by on average."""
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(150, 3))
    references = {
        "fid": (reference.mean(axis=0), np.cov(reference.T)),
        "kid": reference,
        "precision_recall": ReferenceManifold(reference),
    }
    groups, found, alone = features.assign_groups(120, 10), [], []
    for _ in range(40):
        noise = rng.normal(size=(120, 3))
        sets = [summarize(noise * scale + shift, groups) for scale, shift in ((1.2, 0.4), (0.9, 0.3))]
        found.append(compare.compare_summaries(*sets, references))
        alone.append(found[-1]["fid"]["first"])
    for name in ("fid", "fid_corrected", "kid", "precision", "recall"):
        values = np.array([metrics[name]["value"] for metrics in found])
        intervals = np.array([metrics[name]["interval"] for metrics in found])
        holds = (intervals[:, 0] <= values.mean()) & (values.mean() <= intervals[:, 1])
        assert 0.85 <= holds.mean() <= 1, name
        widths = np.ptp(intervals, axis=1) / 2 / 2.2622  # Student's t of 9 degrees of freedom, of ten subsets too
        assert 0.75 * values.std() < widths.mean() < 1.6 * values.std(), name
    differences = np.array([metrics["fid"]["value"] for metrics in found])
    assert differences.std() < 0.8 * 2**0.5 * np.std(alone)  # what pairing gains
