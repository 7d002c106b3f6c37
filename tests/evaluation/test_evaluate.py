"""The command from images to a file of results, and what extractors must be."""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import constant_inception_weights, says

from diffusers_dod.data.labelled_images import LabelledImages
from diffusers_dod.data.textures import TextureDataset
from diffusers_dod.evaluation import evaluate, features
from diffusers_dod.evaluation.images import DatasetImages, draw_indices, open_images
from diffusers_dod.evaluation.reproduce import reproduce
from diffusers_dod.files import file_sha256
from diffusers_dod.metrics import inception
from diffusers_dod.metrics.extractors import (
    ImageFeatures,
    check_extractor,
    extract,
    extractor_file,
    extractor_sha256,
    load_extractor,
)
from diffusers_dod.metrics.frechet import as_fid, feature_statistics, frechet_distance
from diffusers_dod.metrics.inception_score import RunningInceptionScore
from diffusers_dod.metrics.intervals import wilson_interval
from diffusers_dod.metrics.kernel_distance import kernel_distance
from diffusers_dod.metrics.precision_recall import ReferenceManifold
from diffusers_dod.metrics.statistics import RunningStatistics
from diffusers_dod.results import read_results


pytestmark = pytest.mark.filterwarnings("ignore:FID of", "ignore:.*torch.jit")

EXTRACTOR = """
import torch
from diffusers_dod.metrics.extractors import ImageFeatures
from neighbour import SCALE

def colours(images):
    return images.double().mean(dim=(2, 3)) / SCALE

def everything(images):
    features = torch.cat([colours(images), images.double().std(dim=(2, 3)) / SCALE], dim=1)
    return ImageFeatures(features, images.float()[:, :, ::16, ::16].flatten(1), 10 * features)

def broken(images):
    return colours(images) / 0

number = 3
"""


def draw(number: int, seed: int) -> np.ndarray:
    dataset = TextureDataset(number, seed=seed)
    return np.stack([dataset[index]["image"] for index in range(number)])


def expected_features(images: np.ndarray) -> np.ndarray:
    images = images.astype(np.float64)
    return np.concatenate([images.mean(axis=(1, 2)), images.std(axis=(1, 2), ddof=1)], axis=1) / 255


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    np.savez(folder / "samples.npz", arr_0=draw(60, 1))
    np.savez(folder / "reference.npz", arr_0=draw(80, 2))
    (folder / "colours.py").write_text(EXTRACTOR)
    (folder / "neighbour.py").write_text("SCALE = 255\n")
    return folder


def run(world: Path, *options, samples: str = "samples.npz", extractor: str = "everything") -> dict:
    output = world / "results.json"
    output.unlink(missing_ok=True)
    argv = [str(world / samples), "--extractor", f"{world / 'colours.py'}:{extractor}", "--device", "cpu"]
    argv += [str(option) for option in options]
    evaluate.main([*argv, "--output_file", str(output)])
    return read_results(output)


def reference_of(world: Path) -> tuple:
    return ("--reference", world / "reference.npz")


def test_all_metrics_against_what_they_are_made_of(world, capsys):
    results = run(world, *reference_of(world), "--metrics", "fid", "sfid", "kid", "is", "precision_recall")
    metrics = results["metrics"]
    assert list(metrics) == ["fid", "fid_corrected", "sfid", "sfid_corrected", "kid", "is", "precision", "recall"]
    samples, reference = draw(60, 1), draw(80, 2)
    features = [expected_features(images).astype(np.float32) for images in (samples, reference)]
    expected = frechet_distance(*(array for rows in features for array in feature_statistics(rows)))
    assert metrics["fid"]["value"] == pytest.approx(expected, rel=1e-5)
    spatial = [p[:, ::16, ::16].transpose(0, 3, 1, 2).reshape(len(p), -1) for p in (samples, reference)]
    expected = frechet_distance(*(array for rows in spatial for array in feature_statistics(rows)))
    assert metrics["sfid"]["value"] == pytest.approx(expected, rel=1e-9)
    assert metrics["kid"]["value"] == pytest.approx(kernel_distance(*features).mean, rel=1e-4)
    assert metrics["kid"]["num_subsets"] == 10
    probabilities = np.exp(10 * features[0].astype(np.float64))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    divergence = (probabilities * np.log(probabilities / probabilities.mean(axis=0))).sum(axis=1).mean()
    assert metrics["is"]["value"] == pytest.approx(np.exp(divergence), rel=1e-5)
    counts = ReferenceManifold(features[1]).compare(features[0])
    assert (metrics["precision"]["value"], metrics["recall"]["value"]) == (counts.precision, counts.recall)
    assert metrics["recall"]["interval"] is None  # all of the reference is compared with the same samples
    for name in ("fid", "sfid", "kid", "precision"):
        low, high = metrics[name]["interval"]
        assert low < metrics[name]["value"] < high
    assert metrics["is"]["interval"] is None and metrics["is"]["num_splits"] == 1
    printed = capsys.readouterr().out
    assert all(f"| {name} | {metrics[name]['value']:.5g} |" in printed for name in metrics)

    assert results["task"] == "evaluate" and results["checkpoint"] is None
    data = results["data"]
    assert data["name"] == str(world / "samples.npz") and data["num_samples"] == 60
    assert data["samples"]["sha256"] == file_sha256(world / "samples.npz")
    assert data["reference"]["sha256"] == file_sha256(world / "reference.npz")
    assert data["reference"]["num_images"] == 80 and data["reference"]["has_statistics"] is False
    everything = load_extractor(f"{world / 'colours.py'}:everything")
    assert results["settings"]["extractor_sha256"] == extractor_sha256(
        f"{world / 'colours.py'}:everything", everything
    )
    assert data["selection"] == "all"


def test_results_can_be_computed_again(world, tmp_path):
    run(world, *reference_of(world), "--metrics", "fid", "kid", "precision_recall")
    rows = reproduce(world / "results.json", 0.0, tmp_path / "again.json", trust_extractor=True)
    assert [row["name"] for row in rows] == ["fid", "fid_corrected", "kid", "precision", "recall"] and all(
        row["agrees"] for row in rows
    )
    assert read_results(world / "results.json")["metrics"] == read_results(tmp_path / "again.json")["metrics"]


def test_batches_make_no_difference(world):
    every = ("--metrics", "fid", "sfid", "kid", "is", "precision_recall")
    first, *others = (run(world, *reference_of(world), *every, "--batch_size", n)["metrics"] for n in (1, 7, 100))
    for metrics in others:
        for name, metric in metrics.items():
            assert metric["value"] == pytest.approx(first[name]["value"], rel=1e-9)
            if metric["interval"] is not None:
                assert metric["interval"] == pytest.approx(first[name]["interval"], rel=1e-9)


def test_some_of_the_samples_are_drawn_at_random(world, tmp_path):
    np.savez(tmp_path / "few.npz", arr_0=draw(60, 1)[sorted(draw_indices(60, 25))])
    few = run(world, *reference_of(world), samples=tmp_path / "few.npz")["metrics"]
    results = run(world, *reference_of(world), "--num_samples", 25)
    assert results["metrics"] == few and results["data"]["num_samples"] == 25
    assert results["data"]["selection"] == "at random out of 60"
    assert list(few) == ["fid", "fid_corrected"]  # the default


def test_samples_that_are_drawn_from_sorted_ones_have_splits_of_all_classes(tmp_path, monkeypatch):
    """The score of images that are sorted by class is that of the random order."""
    labels = np.repeat(np.arange(4), 50)
    images = np.full((200, 4, 4, 3), 60 * labels[:, None, None, None], dtype=np.uint8)
    np.savez(tmp_path / "sorted.npz", arr_0=images, arr_1=labels)

    def extractor(images: torch.Tensor) -> ImageFeatures:
        label = images[:, 0, 0, 0].long() // 60
        return ImageFeatures(label[:, None].float(), logits=50.0 * torch.nn.functional.one_hot(label, 4))

    monkeypatch.setattr(features, "RunningInceptionScore", lambda: RunningInceptionScore(30))
    summary = evaluate.compute_features(open_images(str(tmp_path / "sorted.npz")), extractor, 7, num_images=120)
    drawn = labels[draw_indices(200, 120)]
    expected = RunningInceptionScore(30)
    expected.update(50.0 * np.eye(4)[drawn])
    assert summary.inception_score().splits == pytest.approx(expected.result().splits)
    assert len(expected.result().splits) == 4 and min(expected.result().splits) > 3
    assert (
        summary.is_correct.sum() == 120 and summary.labels.tolist() == labels[sorted(draw_indices(200, 120))].tolist()
    )
    # All images of a file that is sorted by class, or of a data set, are taken in a random order as well.
    splits = (
        evaluate.compute_features(open_images(str(tmp_path / "sorted.npz")), extractor, 7).inception_score().splits
    )
    assert min(splits) > 3
    rows = [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)]
    images = DatasetImages("sorted", LabelledImages(rows, tuple("abcd"), "sorted", 4))
    splits = evaluate.compute_features(images, extractor, 7).inception_score().splits
    assert len(splits) == 7 and min(splits) > 2.5


def test_saved_statistics_take_the_place_of_their_images(world, tmp_path):
    path = tmp_path / "deep" / "statistics.npz"
    run(world, "--save_statistics", path, samples="reference.npz")
    with np.load(path) as file:
        names = ["extractor", "extractor_sha256", "mu", "mu_s", "num_images", "sigma", "sigma_s"]
        assert sorted(file.files) == names
        assert file["num_images"] == 80 and file["mu"].dtype == np.float64
        arrays = dict(file)
    metrics = ("--metrics", "fid", "sfid")
    of_images = run(world, *reference_of(world), *metrics)["metrics"]
    results = run(world, "--reference", path, *metrics)
    for name, metric in results["metrics"].items():
        assert metric["value"] == pytest.approx(of_images[name]["value"], rel=1e-9)
    assert results["data"]["reference"] == {"name": str(path), "sha256": file_sha256(path), "has_statistics": True}

    # ADM's form: the distance is to `mu` and `sigma`, precision and recall are those of the images.
    del arrays["extractor"], arrays["extractor_sha256"], arrays["num_images"]
    arrays["mu"] = arrays["mu"] + 0.5
    np.savez(tmp_path / "adm.npz", arr_0=draw(80, 2)[:40], **arrays)
    found = run(world, "--reference", tmp_path / "adm.npz", "--metrics", "fid", "precision_recall")
    far = frechet_distance(*feature_statistics(expected_features(draw(60, 1))), arrays["mu"], arrays["sigma"])
    assert found["metrics"]["fid"]["value"] == pytest.approx(far, rel=1e-5)
    manifold = ReferenceManifold(expected_features(draw(80, 2)[:40]))
    recall = manifold.compare(expected_features(draw(60, 1))).recall
    assert found["metrics"]["recall"]["value"] == recall
    assert found["data"]["reference"]["has_statistics"] and found["data"]["reference"]["num_images"] == 40


def test_the_same_images_have_no_distance(world):
    metrics = run(
        world, "--reference", world / "samples.npz", "--metrics", "fid", "precision_recall", "--num_groups", 0
    )["metrics"]
    assert metrics["fid"]["value"] == pytest.approx(0, abs=1e-9)
    assert metrics["precision"]["value"] == metrics["recall"]["value"] == 1
    assert all(metric["interval"] is None for metric in metrics.values())


# Accuracy


CLASSIFIER = """
import torch
from diffusers_dod.metrics.extractors import ImageFeatures

def classifier(images, num_classes=10):
    label = images[:, 0, 0, 0].long()
    logits = torch.nn.functional.one_hot(label, num_classes).float()
    return ImageFeatures(images[:, 0, 0, :2].float(), logits=logits)

def thousand(images):
    return classifier(images, 1008)
"""


@pytest.fixture
def classified(tmp_path) -> Path:
    """40 images of 10 classes, of which a classifier takes 12 for another one."""
    (tmp_path / "classifier.py").write_text(CLASSIFIER)
    labels = np.arange(40) % 10
    shown = np.where(np.arange(40) < 12, (labels + 1) % 10, labels)
    images = np.zeros((40, 4, 4, 3), np.uint8) + shown[:, None, None, None].astype(np.uint8)
    np.savez(tmp_path / "samples.npz", arr_0=images, arr_1=labels)
    return tmp_path


def classify(folder: Path, *options: str, name: str = "classifier", samples: str = "samples.npz") -> dict:
    argv = [str(folder / samples), "--metrics", "accuracy", "--extractor", f"{folder / 'classifier.py'}:{name}"]
    evaluate.main([*argv, "--device", "cpu", "--output_file", str(folder / "results.json"), *options])
    return read_results(folder / "results.json")["metrics"]["accuracy"]


def write_manifest(folder: Path, **content) -> None:
    manifest = {"images": "arr_0 of samples.npz", "sha256": file_sha256(folder / "samples.npz"), **content}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_accuracy_is_the_share_of_samples_of_their_own_class(classified):
    found = classify(classified)
    assert found["value"] == 28 / 40 and found["interval"] == pytest.approx(wilson_interval(0.7, 40))
    drawn = draw_indices(40, 15)
    assert classify(classified, "--num_samples", "15")["value"] == (drawn >= 12).mean()
    assert classify(classified, "--num_groups", "0")["interval"] is None
    write_manifest(classified, num_classes=10)
    assert classify(classified, "--batch_size", "7") == found


def test_accuracy_needs_the_logits_of_the_samples_classes(classified, capsys):
    np.savez(classified / "unlabelled.npz", arr_0=np.zeros((12, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match=says("`samples`", "class ids", "got none")):
        classify(classified, samples="unlabelled.npz")
    np.savez(classified / "many.npz", arr_0=np.zeros((12, 4, 4, 3), np.uint8), arr_1=np.arange(12))
    with pytest.raises(ValueError, match=says("`samples`", "[0, 9]", "classifier.py", "got 0 to 11")):
        classify(classified, samples="many.npz")
    write_manifest(classified, num_classes=1000)
    for name, number in {"classifier": 10, "thousand": 1008}.items():
        with pytest.raises(ValueError, match=says("`extractor`", "1000 classes", "`accuracy`", f"got {number}", name)):
            classify(classified, name=name)
    textures = ["textures:24:0", "--extractor", f"{classified / 'classifier.py'}:classifier", "--metrics", "accuracy"]
    with pytest.raises(ValueError, match=says("`extractor`", "12 classes", "got 10")):
        evaluate.main(textures)
    for name in ("inception", "inception:own.pth"):
        with pytest.raises(SystemExit):
            evaluate.main(["samples.npz", "--extractor", name, "--metrics", "accuracy"])
        assert "`extractor` must be a classifier of the samples' classes" in capsys.readouterr().err


def test_few_samples_are_warned_of(world):
    with pytest.warns(UserWarning, match=says("60 samples", "50,000", "of as many samples only")):
        run(world, *reference_of(world))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(world, "--metrics", "is")


def test_options_are_refused_at_once(world, capsys):
    options = ["--batch_size", 0, "--num_samples", 1, "--num_groups", 1, "--metrics", "fid", "fid"]
    with pytest.raises(SystemExit):
        run(world, *options, "--device", "nowhere", "--save_statistics", "a.txt", "--resolution", 0)
    message = capsys.readouterr().err
    for name in ("batch_size", "num_samples", "num_groups", "resolution", "reference", "device"):
        assert f"`{name}` must be" in message, name
    assert "`metrics` must hold different values, got ['fid', 'fid']" in message
    assert "`save_statistics` must end with .npz, got a.txt" in message
    for options, text in (
        ((), "`metrics` or `save_statistics` must be given"),
        (("--metrics", "is", *reference_of(world)), "`reference` must not be given"),
    ):
        with pytest.raises(SystemExit):
            run(world, *options)
        assert text in capsys.readouterr().err


def test_what_does_not_fit_is_refused(world, tmp_path):
    np.savez(tmp_path / "small.npz", arr_0=draw(60, 1)[:, :16, :16])
    np.savez(tmp_path / "mean.npz", mu=np.zeros(6))
    np.savez(tmp_path / "plain.npz", mu=np.zeros(6), sigma=np.eye(6))
    np.savez(tmp_path / "wide.npz", mu=np.zeros(7), sigma=np.eye(7))
    np.savez(tmp_path / "other.npz", mu=np.zeros(6), sigma=np.eye(6), extractor="inception")
    np.savez(tmp_path / "infinite.npz", mu=np.zeros(6), sigma=np.diag([np.nan, np.inf, 1, 1, 1, 1]))
    own = f"{world / 'colours.py'}:everything"
    np.savez(tmp_path / "changed.npz", mu=np.zeros(6), sigma=np.eye(6), extractor=own, extractor_sha256="abc")
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    refusals = [
        (("--num_samples", 61), ("`num_samples`", "60 images", "got 61")),
        (("--num_samples", 9), ("`num_samples`", "from 10", "got 9")),
        (("--num_samples", 3, "--num_groups", 2), ("`num_samples`", "from 4", "`num_groups` 2", "got 3")),
        (("--reference", tmp_path / "infinite.npz"), ("`reference`", "finite `sigma`", "2 numbers")),
        (("--reference", tmp_path / "small.npz"), ("`reference`", "(32, 32)", "(16, 16)")),
        (("--reference", tmp_path / "mean.npz"), ("`reference`", "`sigma`", "['mu']")),
        (("--reference", tmp_path / "plain.npz", "--metrics", "sfid"), ("`reference`", "`mu_s`", "['mu', 'sigma']")),
        (("--reference", tmp_path / "plain.npz", "--metrics", "precision_recall"), ("`reference`", "hold images")),
        (("--reference", tmp_path / "plain.npz", "--metrics", "fid", "kid"), ("`reference`", "hold images for `kid`")),
        (("--reference", tmp_path / "wide.npz"), ("`extractor`", "7 `features`", "got 6")),
        (("--reference", tmp_path / "other.npz"), ("`reference`", "colours.py:everything", "'inception'")),
        (("--reference", tmp_path / "array.npz"), ("`reference`", "npz")),
        (("--reference", tmp_path / "changed.npz"), ("`reference`", "`extractor_sha256`", "changed.npz of 'abc'")),
    ]
    for options, fragments in refusals:
        with pytest.raises(ValueError, match=says(*fragments)):
            run(world, *reference_of(world), *options)
    for metric, name in (("sfid", "spatial_features"), ("is", "logits")):
        with pytest.raises(ValueError, match=says("`extractor`", f"`{name}`", f"`{metric}`", "colours.py:colours")):
            run(world, *reference_of(world), "--metrics", metric, "fid", extractor="colours")
    with pytest.raises(ValueError, match=says("`extractor`", "finite `features`", "60 of 60", "samples.npz")):
        run(world, *reference_of(world), extractor="broken")


# Extractors


class Flat(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=(2, 3))


def test_torchscript_is_run_only_when_trusted(world, tmp_path):
    path = str(tmp_path / "flat.pt")
    torch.jit.script(Flat()).save(path)
    with pytest.raises(ValueError, match=says("`extractor`", "trusted", "program", "--trust_extractor", "flat.pt")):
        load_extractor(path, argument="extractor")
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = extract(load_extractor(path, trust=True, device="cpu"), images)
    assert torch.equal(features.features, images.float().mean(dim=(2, 3))) and features.logits is None
    (tmp_path / "text.ts").write_text("no module")
    with pytest.raises(ValueError, match=says("`extractor`", "TorchScript", "text.ts")):
        load_extractor(str(tmp_path / "text.ts"), trust=True, argument="extractor")


def test_extractors_by_name(world):
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    folders = list(sys.path)
    assert extract(load_extractor(f"{world / 'colours.py'}:colours"), images).features.shape == (2, 3)
    assert sys.path == folders
    assert isinstance(load_extractor(f"{__name__}:FLAT"), Flat) and not FLAT.training
    refusals = {
        f"{world / 'colours.py'}:nothing": ("no attribute", "nothing"),
        f"{world / 'colours.py'}:number": ("something to call", "got 3"),
        f"{world / 'missing.py'}:colours": ("missing.py",),
        "colours": ("package.module:attribute", "'colours'"),
    }
    for name, fragments in refusals.items():
        with pytest.raises(ValueError, match=says("`extractor`", *fragments)):
            load_extractor(name, argument="extractor")


FLAT = Flat()


def test_inception_is_known_by_the_file_of_its_weights(world, tmp_path, monkeypatch):
    torch.save(constant_inception_weights(), tmp_path / "weights.pt")
    sha256 = file_sha256(tmp_path / "weights.pt")
    name = f"inception:{tmp_path / 'weights.pt'}"
    output = tmp_path / "inception.json"
    argv = [str(world / "samples.npz"), "--extractor", name, "--metrics", "is", "--num_samples", "2"]
    evaluate.main([*argv, "--num_groups", "0", "--device", "cpu", "--output_file", str(output)])
    results = json.loads(output.read_text())
    assert results["settings"]["extractor_sha256"] == sha256 and results["settings"]["extractor"] == name

    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    features = extract(load_extractor(name), images)
    assert {name: len(values[0]) for name, values in vars(features).items()} == {
        "features": 2048,
        "spatial_features": 17 * 17 * 7,
        "logits": 1008,
    }
    assert extractor_file(name) is None

    monkeypatch.setenv("INCEPTION_WEIGHTS", str(tmp_path / "weights.pt"))
    with pytest.raises(ValueError, match=says("`extractor`", "published weights", sha256)):
        load_extractor("inception", argument="extractor")
    monkeypatch.setattr(inception, "WEIGHTS_SHA256", sha256[:8])
    assert extractor_sha256("inception", load_extractor("inception")) == sha256


class Weighted(torch.nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (2, 3)):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(6, dtype=dtype).reshape(shape))
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=(2, 3)) @ self.weight.T.float()


def test_an_extractor_is_known_by_its_code_and_its_weights(tmp_path):
    name = f"{__name__}:FLAT"
    first = extractor_sha256(name, Weighted())
    assert extractor_sha256(name, Weighted()) == first == extractor_sha256(name, Weighted().eval())
    others = [Weighted(torch.float64), Weighted(torch.bfloat16), Weighted(shape=(3, 2)), FLAT, Weighted(), Weighted()]
    others[4].weight.data[1, 2] += 1e-6
    others[5].scale += 1
    hashes = [extractor_sha256(name, other) for other in others]
    hashes.append(extractor_sha256("inception", Weighted()))  # has no file
    assert len({first, *hashes}) == 8

    path = tmp_path / "moved" / "code.py"
    path.parent.mkdir()
    path.write_text(Path(__file__).read_text())
    assert extractor_sha256(f"{path}:Weighted", Weighted()) == first
    path.write_text(Path(__file__).read_text() + "# changed")
    assert extractor_sha256(f"{path}:Weighted", Weighted()) != first
    torch.jit.script(Flat()).save(tmp_path / "flat.pt")
    assert extractor_file(str(tmp_path / "flat.pt")) == tmp_path / "flat.pt"
    assert len(extractor_sha256(str(tmp_path / "flat.pt"), torch.jit.load(tmp_path / "flat.pt"))) == 64
    assert extractor_file("sys:exit") is None


def test_what_extractors_must_give():
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    refusals = {
        "got list": lambda images: [1.0],
        "`features` of shape (2, n)": lambda images: torch.zeros(3, 4),
        "got (2, 3, 4, 4)": lambda images: images,
        "`logits` of shape (2, n)": lambda images: ImageFeatures(torch.zeros(2, 4), logits=torch.zeros(2)),
    }
    for fragment, extractor in refusals.items():
        with pytest.raises(ValueError, match=says("`extractor`", fragment)):
            extract(extractor, images)
    for bad in (images.float(), images[0], images[:, :1]):
        with pytest.raises(ValueError, match=says("`images`", "uint8", str(tuple(bad.shape)))):
            extract(FLAT, bad)
    weights = torch.ones(3, 2, requires_grad=True)
    assert not extract(lambda images: FLAT(images) @ weights, images).features.requires_grad
    check_extractor(FLAT, 3, 8, "cpu")
    check_extractor(lambda images: ImageFeatures(FLAT(images)), 3, 8, "cpu")
    with pytest.raises(ValueError, match=says("(2, 4)", "got (2, 3)")):
        check_extractor(FLAT, 4, 8, "cpu")


def test_balanced_classes_are_dealt_out_evenly():
    rng = np.random.default_rng(0)
    labels = np.arange(1200) % 12
    groups = features.assign_groups(1200, 10, labels)
    assert all(np.bincount(groups[labels == label], minlength=10).tolist() == [10] * 10 for label in range(12))
    assert not np.array_equal(groups, np.arange(1200) // 12 % 10)  # but at random within a class
    for others in (None, rng.integers(0, 12, 1200)):  # classes by chance belong to what is random
        random = features.assign_groups(1200, 10, others)
        assert np.bincount(random).tolist() == [120] * 10
        assert max(np.ptp(np.bincount(random[labels == label], minlength=10)) for label in range(12)) > 5
    one_each = features.assign_groups(25, 10, rng.permutation(25))
    assert sorted(np.bincount(one_each).tolist()) == [2] * 5 + [3] * 5


def test_intervals_of_balanced_samples_are_as_wide_as_other_samples_lie_apart():
    rng = np.random.default_rng(1)
    means = 3 * rng.normal(size=(12, 6))
    reference = (means.mean(axis=0) + 1, np.cov(means.T) + np.eye(6))
    labels = np.arange(600) % 12
    halves, distances = {True: [], False: []}, []
    for _ in range(80):
        rows = means[labels] + rng.normal(size=(600, 6))
        distances.append(frechet_distance(*feature_statistics(rows), *reference))
        for is_known, of_kind in halves.items():
            groups = features.assign_groups(600, 10, labels if is_known else None)
            parts = [RunningStatistics() for _ in range(10)]
            for group, part in enumerate(parts):
                part.update(rows[groups == group])
            low, high = as_fid("fid", parts, reference, True)["fid"]["interval"]
            of_kind.append((high - low) / 2 / 2.2622)  # Student's t of 9 degrees of freedom
    expected = np.std(distances, ddof=1)
    assert np.mean(halves[True]) == pytest.approx(expected, rel=0.25)
    assert np.mean(halves[False]) > 2 * expected


def test_features_are_those_of_the_images_in_order(world):
    images = open_images(str(world / "samples.npz"))
    summary = evaluate.compute_features(images, FLAT, 7, num_images=50, num_groups=4, keep=["features"])
    expected = draw(60, 1)[sorted(draw_indices(60, 50))].astype(np.float64).mean(axis=(1, 2))
    np.testing.assert_allclose(summary.rows["features"], expected, rtol=1e-5)
    sizes = [group.num_rows for group in summary.statistics["features"]]
    assert sum(sizes) == 50 and set(sizes) == {12, 13}
    assert evaluate.compute_features(images, FLAT, 7).rows == {}


def test_groups_do_not_follow_the_classes():
    """Images of 12 classes in turn, in 12 groups: each group has each class as often as others, or once more."""
    summary = evaluate.compute_features(open_images("textures:240:0"), FLAT, 60, num_groups=12)
    counts = [np.bincount(summary.labels[summary.groups == group], minlength=12) for group in range(12)]
    assert np.unique(counts).tolist() == [1, 2]
    assert [group.num_rows for group in summary.statistics["features"]] == [20] * 12


@pytest.mark.slow
def test_the_desk_classifier_is_an_extractor(tmp_path):
    root = Path(__file__).parents[2]
    extractor = f"{root / 'training' / 'desk' / 'texture_features.py'}:extractor"
    argv = ["textures:240:7", "--reference", "textures:240:8", "--extractor", extractor]
    evaluate.main([*argv, "--metrics", "fid", "is", "precision_recall", "--output_file", str(tmp_path / "r.json")])
    metrics = json.loads((tmp_path / "r.json").read_text())["metrics"]
    assert (
        10 < metrics["is"]["value"] < 12 and metrics["precision"]["value"] > 0.8 and metrics["recall"]["value"] > 0.8
    )
