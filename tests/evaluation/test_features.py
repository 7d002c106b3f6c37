"""Features from workers, processes and the cache are those of one process, to the last bit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import says
from launch import run_command, run_forked, torchrun
from PIL import Image
from torch import distributed

from diffusers_dod.evaluation import evaluate, features
from diffusers_dod.evaluation.feature_cache import FeatureCache
from diffusers_dod.evaluation.images import open_images
from diffusers_dod.metrics.extractors import ImageFeatures
from diffusers_dod.metrics.summary import FeatureSummary
from diffusers_dod.processes import OtherProcessError
from diffusers_dod.results import read_results


pytestmark = pytest.mark.filterwarnings("ignore:FID of", "ignore:The covariance", "ignore:This process")
WEIGHTS = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))


def extractor(images: torch.Tensor) -> ImageFeatures:
    pooled = torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1) / 255
    rows = torch.tanh(pooled @ WEIGHTS)
    return ImageFeatures(rows, rows[:, :6] * 2, rows[:, :4])


def broken(images: torch.Tensor) -> torch.Tensor:
    rows = extractor(images).features
    return torch.where(images[:, :1, 0, 0] > 250, torch.nan, rows)


@pytest.fixture
def sources(tmp_path) -> list[str]:
    """The same kind of images as an npz file, PNG files and a data set."""
    images = np.random.default_rng(0).integers(0, 250, size=(37, 6, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "file.npz", arr_0=images, arr_1=np.arange(37) % 4)
    (tmp_path / "png").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "png" / f"{i:02}.png")
    return [str(tmp_path / "file.npz"), str(tmp_path / "png"), "textures:37:3"]


def summarize(name: str, **options) -> FeatureSummary:
    settings = {"batch_size": 3, "num_groups": 4, "keep": ("features", "logits"), **options}
    return features.compute_features(open_images(name), extractor, **settings)


def assert_same(found: FeatureSummary, expected: FeatureSummary) -> None:
    np.testing.assert_array_equal(found.groups, expected.groups)
    assert found.statistics.keys() == expected.statistics.keys() == {"features", "spatial_features"}
    for name, groups in expected.statistics.items():
        for one, other in zip(found.statistics[name], groups, strict=True):
            for array, same in zip(one.result(), other.result(), strict=True):
                np.testing.assert_array_equal(array, same)
    assert found.inception_score() == expected.inception_score()
    for name in ("labels", "is_correct"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert found.rows.keys() == expected.rows.keys()
    for name, rows in expected.rows.items():
        np.testing.assert_array_equal(found.rows[name], rows)


def test_workers_make_no_difference(sources):
    for name in sources:
        assert_same(summarize(name, num_workers=2), summarize(name))


def test_an_error_in_a_worker_is_that_of_the_image(sources):
    (Path(sources[1]) / "20.png").write_bytes(b"no image")
    images = open_images(sources[2])
    assert len(list(images.batches(5, num_workers=2, part=(1, 3)))) == 3
    with pytest.raises(ValueError, match=says("`path`", "20.png")):
        open_images(sources[1])
    Image.new("RGB", (6, 6)).save(Path(sources[1]) / "20.png")
    images = open_images(sources[1])
    (Path(sources[1]) / "20.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=says("`path`", "20.png")) as caught:
        list(images.batches(5, num_workers=2))
    assert "Caught" not in str(caught.value)


def check_summaries(folder: Path, expected: dict[str, FeatureSummary], whole: FeatureSummary) -> None:
    """What each of two processes does."""
    distributed.init_process_group("gloo")
    for name, summary in expected.items():
        assert_same(summarize(name, num_images=31), summary)
    path, cache = str(folder / "png"), FeatureCache(folder / "cache", "0" * 64)
    for _ in ("written", "read"):
        assert_same(summarize(path, cache=cache), whole)
    rank = distributed.get_rank()
    with pytest.raises(OtherProcessError if rank else ValueError) as error:
        features.compute_features(open_images(path), extractor if rank else broken, 3)
    assert rank or "`extractor` must give finite" in str(error.value)


def test_two_processes_have_the_numbers_of_one(sources, tmp_path):
    Image.new("RGB", (6, 6), "white").save(Path(sources[1]) / "00.png")
    expected = {name: summarize(name, num_images=31) for name in sources}
    run_forked(check_summaries, tmp_path, expected, summarize(sources[1]), output=tmp_path / "output")
    assert len(list((tmp_path / "cache").iterdir())) == 1


def never(images: torch.Tensor) -> torch.Tensor:
    raise AssertionError("The features are cached.")


def test_cached_features_are_found_by_all_that_they_depend_on(sources, tmp_path):
    cache = FeatureCache(tmp_path / "cache", "0" * 64)
    for name in sources:
        expected = summarize(name)
        assert_same(summarize(name, cache=cache), expected)
        settings = {"batch_size": 3, "num_groups": 4, "keep": ("features", "logits"), "cache": cache}
        assert_same(features.compute_features(open_images(name), never, **settings), expected)
    others = [
        (sources[1], {"cache": FeatureCache(tmp_path / "cache", "1" * 64)}),
        (sources[1], {"cache": cache, "num_images": 36}),
        (sources[1], {"cache": cache, "batch_size": 4}),
        ("textures:37:4", {"cache": cache}),
    ]
    for name, options in others:
        settings = {"batch_size": 3, **options}
        with pytest.raises(AssertionError, match="cached"):
            features.compute_features(open_images(name), never, **settings)
    Image.new("RGB", (6, 6)).save(Path(sources[1]) / "20.png")
    with pytest.raises(AssertionError, match="cached"):
        features.compute_features(open_images(sources[1]), never, 3, cache=cache)
    assert sum(path.is_dir() for path in (tmp_path / "cache").iterdir()) == 3  # failures leave nothing


def test_cached_features_belong_to_the_class_ids(sources, tmp_path):
    folder, cache = Path(sources[1]), FeatureCache(tmp_path / "cache", "0" * 64)
    (folder / "manifest.json").write_text('{"labels": "labels.txt"}')
    found = []
    for labels in ([0] * 37, [0] * 36 + [1]):
        (folder / "labels.txt").write_text("\n".join(map(str, labels)))
        assert summarize(str(folder), cache=cache).labels.tolist() == labels
        found.append(cache.settings(open_images(str(folder)), 37, 3, "cpu"))
    assert found[0] != found[1] and len(list((tmp_path / "cache").iterdir())) == 2


def test_damaged_features_are_refused(sources, tmp_path):
    cache = FeatureCache(tmp_path / "cache", "0" * 64)
    summarize(sources[0], cache=cache)
    (entry,) = (tmp_path / "cache").iterdir()
    content = bytearray((entry / "logits.npy").read_bytes())
    content[-1] ^= 1
    (entry / "logits.npy").write_bytes(content)
    with pytest.raises(ValueError, match=says("`cache_dir`", entry.name, "remove it")):
        summarize(sources[0], cache=cache)


@pytest.mark.slow
def test_the_command_on_two_processes(sources, tmp_path):
    (tmp_path / "own.py").write_text(
        "from diffusers_dod.metrics.extractors import ImageFeatures\n"
        "def extractor(images):\n    rows = images.float().mean(dim=(2, 3))\n    return ImageFeatures(rows)\n"
    )
    argv = [sources[0], "--reference", sources[1], "--extractor", f"{tmp_path / 'own.py'}:extractor"]
    argv += ["--metrics", "fid", "kid", "precision_recall", "density_coverage", "--batch_size", "4", "--device", "cpu"]
    script = Path(__file__).parents[2] / "training" / "evaluate_dod.py"
    evaluate.main([*argv, "--output_file", str(tmp_path / "one.json")])
    command = [*torchrun(tmp_path / "logs"), script, *argv, "--output_file", tmp_path / "two.json"]
    run_command(command, tmp_path / "output.txt")
    one, two = (read_results(tmp_path / f"{name}.json") for name in ("one", "two"))
    assert one["metrics"] == two["metrics"] and one["settings"] == two["settings"]
