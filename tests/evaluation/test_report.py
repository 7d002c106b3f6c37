"""The report: all that samples and reference allow, and the numbers by other conventions, against plain loops."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import says
from PIL import Image

from diffusers_dod.evaluation import evaluate, report
from diffusers_dod.evaluation.reproduce import reproduce
from diffusers_dod.metrics.frechet import feature_statistics, frechet_distance
from diffusers_dod.metrics.kernel_distance import squared_discrepancy
from diffusers_dod.metrics.table import COMPUTED, name_by_extractor
from diffusers_dod.results import as_metric, read_results


pytestmark = pytest.mark.filterwarnings("ignore:FID of", "ignore:The covariance", "ignore:The last split")

EXTRACTOR = """
from diffusers_dod.metrics.extractors import ImageFeatures

def extractor(images):
    features = images.double().mean(dim=(2, 3)) / 255
    return ImageFeatures(features, features * 2, logits=20 * features)

def plain(images):
    return extractor(images).features
"""


def draw(seed: int, number: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=(number, 4, 4, 3), dtype=np.uint8)


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(EXTRACTOR)
    np.savez("samples.npz", arr_0=draw(0, 40), arr_1=np.arange(40) % 3)
    np.savez("reference.npz", arr_0=draw(1, 50))
    return tmp_path


def run(*options, extractor="extractor", reference="reference.npz") -> dict:
    argv = ["samples.npz", "--against", reference, "--extractor", f"own.py:{extractor}", "--device", "cpu"]
    report.main([*argv, "--output_file", "report.json", *options])
    return read_results("report.json")


def test_a_report_has_all_metrics(world, capsys):
    results = run("--format", "markdown", "latex")
    printed = capsys.readouterr().out
    argv = ["samples.npz", "--reference", "reference.npz", "--extractor", "own.py:extractor", "--device", "cpu"]
    evaluate.main([*argv, "--metrics", *COMPUTED, "--output_file", "evaluation.json"])
    assert results["metrics"] == read_results("evaluation.json")["metrics"]
    assert results["data"]["left_out"] == {}
    fid = results["metrics"]["fid"]["value"]
    assert (
        f"| FID | {fid:.5g} |" in printed
        and rf"FID & {fid:.5g} & " in printed
        and r"95 \% interval \\ \hline" in printed
    )
    rows = reproduce(world / "report.json", 0.0, trust_extractor=True)
    assert len(rows) == len(results["metrics"]) and all(row["agrees"] for row in rows)


def test_the_conventions_by_their_definitions(world, capsys):
    found = run()["data"]["conventions"]
    assert list(found) == ["cut off", "10 splits", "drawn subsets"]
    features = [images.mean(axis=(1, 2)) / 255 for images in (draw(0, 40), draw(1, 50))]
    places = torch.rand(3, 4, 4, generator=report.stateless_generator(0)).permute(1, 2, 0).numpy() < 0.5
    darker = np.where(places, np.maximum(draw(0, 40), 1) - 1, draw(0, 40)).mean(axis=(1, 2)) / 255
    assert 0.3 < places.mean() < 0.7
    statistics = [array for rows in (darker, features[1]) for array in feature_statistics(rows)]
    assert found["cut off"] == pytest.approx(frechet_distance(*statistics), rel=1e-4)
    probabilities = np.exp(20 * features[0])
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    order = torch.randperm(40, generator=report.stateless_generator(0)).numpy()
    scores = []
    for part in np.split(probabilities[order], 10):
        scores.append(np.exp((part * np.log(part / part.mean(axis=0))).sum(axis=1).mean()))
    assert found["10 splits"] == pytest.approx(np.mean(scores), rel=1e-5)
    rng, values = np.random.default_rng(0), []
    for _ in range(100):
        values.append(squared_discrepancy(*(rows[rng.choice(len(rows), 40, replace=False)] for rows in features)))
    assert found["drawn subsets"] == pytest.approx(np.mean(values), rel=1e-3, abs=1e-7)
    assert "| 10 splits | Inception Score |" in capsys.readouterr().out
    assert run("--no-conventions")["data"]["conventions"] == {}


@pytest.mark.parametrize("extractor, title", [("inception", "FID"), ("dinov2", "FD-DINOv2")])
def test_a_convention_has_the_title_of_its_metric(extractor, title):
    metrics = name_by_extractor({"fid": as_metric(3.0)}, extractor)
    table, conventions = report.to_tables(metrics, {"cut off": 4.0}, extractor, ["markdown"])
    assert f"| {title} | 3 |" in table and f"| cut off | {title} | 4 |" in conventions


def test_images_are_resized_as_by_clean_fid():
    """Pillow resizes each channel in floating point."""
    images = torch.from_numpy(draw(0, 2)).permute(0, 3, 1, 2)
    for size in ((4, 4), (331, 350)):
        images = torch.nn.functional.interpolate(images, size)
        inception = SimpleNamespace(model=lambda resized: (resized.flatten(1), None, None))
        found = report.CleanInception(inception)(images).features.view(2, 3, 299, 299)
        for image, resized in zip(images.reshape(-1, *size), found.reshape(-1, 299, 299), strict=True):
            expected = Image.fromarray(image.numpy().astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC)
            np.testing.assert_allclose(resized, np.asarray(expected), rtol=1e-3, atol=1e-2)


def test_what_cannot_be_computed_is_left_out(world, capsys):
    left_out = run(extractor="plain")["data"]["left_out"]
    assert left_out.keys() == {"sfid", "is", "accuracy"} and "gives no `logits`" in left_out["is"]
    assert "Inception Score is left out: the extractor gives no `logits`." in capsys.readouterr().out
    evaluate.main(["reference.npz", "--extractor", "own.py:plain", "--save_statistics", "only.npz", "--device", "cpu"])
    np.savez("samples.npz", arr_0=draw(0, 40))
    results = run("--num_groups", "0", extractor="plain", reference="only.npz")
    assert list(results["metrics"]) == ["fid"]
    assert results["data"]["left_out"]["kid"] == "the reference has no images"
    assert results["data"]["left_out"]["fid_infinity"] == "there are fewer than 3 groups"
    left_out = run("--metrics", "fid", "accuracy")["data"]["left_out"]
    assert list(left_out) == ["accuracy"] and "no classifier" in left_out["accuracy"]


def test_published_numbers_of_others_name_the_files_to_download(world, request):
    """The file with ADM's numbers, whose logic is that of any file of results, on small files of the same names."""
    path = request.config.rootpath / "docs" / "published" / "adm_guided_upsampled_256.json"
    published = json.loads(path.read_text())
    samples, reference = (published["data"][key]["name"] for key in ("samples", "reference"))
    with pytest.raises(ValueError, match=says(samples, "download it from https://openaipublic", str(world))):
        reproduce(path, 0.006)
    np.savez(samples, arr_0=draw(0, 40))
    with pytest.raises(ValueError, match=says(reference, "download it from https://openaipublic")):
        reproduce(path, 0.006)
    np.savez(reference, arr_0=draw(1, 50))
    argv = [word if word != "inception" else "own.py:extractor" for word in published["argv"]]
    evaluate.main([*argv, "--output_file", "small.json"])
    measured = read_results("small.json")["metrics"]
    assert published["metrics"].keys() <= measured.keys()
    metrics = {name: {"value": 1.005 * measured[name]["value"], "interval": None} for name in published["metrics"]}
    metrics["sfid"]["value"] *= 1.01
    (world / "made.json").write_text(json.dumps({**published, "argv": argv, "metrics": metrics}))
    rows = reproduce(world / "made.json", 0.006, trust_extractor=True)
    assert {row["name"]: row["agrees"] for row in rows} == {name: name != "sfid" for name in metrics}
