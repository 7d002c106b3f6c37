# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""The probe on features of known worth, nearest neighbours by hand, the tokens, their file, and the command."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import says, tiny_pipeline
from PIL import Image
from safetensors import safe_open

from diffusers_dod.data.labelled_images import ImageOptions, LabelledImages, load_labelled_images
from diffusers_dod.evaluation import linear_probe
from diffusers_dod.evaluation.linear_probe import (
    LinearProbeOptions,
    ProbeOptions,
    knn_scores,
    probe,
    split_validation,
    standardise,
    to_features,
    top_k_accuracy,
    train_classifiers,
)
from diffusers_dod.evaluation.options import draw_labelled_images
from diffusers_dod.evaluation.token_features import (
    FEATURES,
    compute_tokens,
    pool_latents,
    random_latent_embedder,
    read_tokens,
    write_tokens,
)
from diffusers_dod.options import parse_options
from diffusers_dod.results import checkpoint_sha256, read_results


CLASSES = 12
pytestmark = pytest.mark.filterwarnings("ignore:The best of")
PROBE = ProbeOptions(learning_rates=(1e-3, 1e-2, 1e-1), num_epochs=20, probe_batch_size=64, num_seeds=2)
ONE_SEED = replace(PROBE, num_seeds=1)


def draw(num: int, seed: int, signal: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Features whose first numbers tell the class, as far as `signal` says, on another scale than the rest."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (num,), generator=generator)
    features = torch.randn(num, 20, generator=generator)
    features[:, :CLASSES] += signal * F.one_hot(labels, CLASSES)
    return 100 + 7 * features, labels


def test_separable_features_are_told_apart_without_an_error():
    metrics = probe(draw(600, 0, signal=20.0), draw(200, 1, signal=20.0), CLASSES, PROBE)
    assert [metrics[name]["value"] for name in ("top1", "top5", "knn")] == [1, 1, 1]
    assert metrics["top1"]["standard_error"] == 0
    assert metrics["top1"]["interval"] == pytest.approx([200 / (200 + 1.96**2), 1])


def test_features_without_a_signal_stay_at_chance():
    metrics = probe(draw(1200, 0, signal=0.0), draw(1200, 1, signal=0.0), CLASSES, PROBE)
    for name, chance in (("top1", 1 / 12), ("top5", 5 / 12), ("knn", 1 / 12)):
        assert metrics[name]["value"] == pytest.approx(chance, abs=4 * (chance * (1 - chance) / 1200) ** 0.5)


def test_the_test_images_choose_nothing():
    """The best on the validation images of each seed, which are not trained on, whatever the test images say."""
    train, (test, _) = draw(300, 0, signal=1.5), draw(300, 1, signal=1.5)
    features, test_features = standardise(train[0], test)
    for seed in range(PROBE.num_seeds):
        fit, validation = split_validation(300, seed)
        models = train_classifiers(features[fit], train[1][fit], CLASSES, PROBE, seed)
        accuracies = [top_k_accuracy(model(features[validation]), train[1][validation], 1) for model in models]
        best, worst = int(np.argmax(accuracies)), int(np.argmin(accuracies))
        assert accuracies[best] > accuracies[worst]
        labels = models[worst](test_features).argmax(dim=1)  # on which the worst makes no error
        found = probe(train, (test, labels), CLASSES, ONE_SEED, seed)["top1"]
        assert found["validation_accuracies"] == [accuracies[best]]
        assert found["learning_rates"] == [PROBE.learning_rates[best]]
        assert found["value"] == top_k_accuracy(models[best](test_features), labels, 1) < 1


def test_the_probe_is_deterministic_and_seeds_differ():
    data = (draw(300, 0, signal=1.5), draw(300, 1, signal=1.5), CLASSES)
    torch.manual_seed(1)
    first = probe(*data, PROBE)
    torch.manual_seed(2)
    assert probe(*data, PROBE) == first
    values = first["top1"]["values"]
    assert values[0] != values[1] and first["top1"]["value"] == pytest.approx(np.mean(values))
    assert first["top1"]["standard_error"] == pytest.approx(abs(values[0] - values[1]) / 2)
    assert probe(*data, ONE_SEED)["top1"]["standard_error"] is None


def test_few_classes_have_no_top_5():
    train, labels = draw(200, 0, signal=5.0)
    metrics = probe((train, labels % 3), (train, labels % 3), 3, PROBE)
    assert metrics.keys() == {"top1", "knn"}


@pytest.mark.filterwarnings("always:The best of")
def test_a_best_learning_rate_at_the_end_of_the_sweep_is_said(recwarn):
    # Mixed features in two epochs: 31 % of 400 images at 0.1, 21 to 22 % at the others, so that no rounding decides.
    mixing = torch.randn(20, 20, generator=torch.Generator().manual_seed(5))
    (train, labels), (test, test_labels) = draw(4000, 0, signal=1.0), draw(300, 1, signal=1.0)
    data = (((train - 100) @ mixing, labels), ((test - 100) @ mixing, test_labels), CLASSES)
    at_end, within, equal = (1e-6, 0.1, 1e-4), (100.0, 0.1, 1e-4), (1e-8, 1e-7, 1e-6)
    for rates, is_said in ((at_end, True), (within, False), (equal, False)):
        recwarn.clear()
        probe(*data, replace(ONE_SEED, learning_rates=rates, num_epochs=2))
        assert ["`learning_rates` is at their end, 0.1" in str(entry.message) for entry in recwarn] == [True] * is_said


def test_the_split():
    for seed in (0, 1):
        fit, validation = split_validation(100, seed)
        assert (len(fit), len(validation)) == (90, 10)
        assert sorted([*fit.tolist(), *validation.tolist()]) == list(range(100))
    assert split_validation(100, 0)[1].tolist() != split_validation(100, 1)[1].tolist()
    assert [len(part) for part in split_validation(2, 0)] == [1, 1]
    with pytest.raises(ValueError, match=says("`num_samples`", ">= 2", "1")):
        split_validation(1, 0)


def test_classifiers_reach_the_optimum_and_know_nothing_of_each_other():
    features, labels = draw(400, 0, signal=1.0)
    features, _ = standardise(features, features)
    labels = labels % 3
    options = ProbeOptions(learning_rates=(1e-5, 0.05), num_epochs=300, probe_batch_size=400)
    slow, fast = train_classifiers(features, labels, 3, options, 0)
    F.cross_entropy(fast(features), labels).backward()
    assert fast.weight.grad.abs().max() < 1e-4  # the loss is convex: this is its minimum
    assert slow.weight.abs().max() < 0.01 < fast.weight.abs().max()
    alone = train_classifiers(features, labels, 3, replace(options, learning_rates=(1e-5,)), 0)[0]
    torch.testing.assert_close(alone.weight, slow.weight, rtol=1e-4, atol=1e-7)


def test_standardised_features():
    train, test = draw(300, 0, signal=1.0)[0], draw(50, 1, signal=1.0)[0]
    train[:, 3], test[:, 3] = 5.0, 6.0  # constant
    train_out, test_out = standardise(train, test)
    varying = [i for i in range(20) if i != 3]
    torch.testing.assert_close(train_out[:, varying].mean(0), torch.zeros(19), atol=1e-5, rtol=0)
    torch.testing.assert_close(train_out[:, varying].std(0, correction=0), torch.ones(19))
    expected = (test - train.mean(0)) / train.std(0, correction=0)
    torch.testing.assert_close(test_out[:, varying], expected[:, varying], rtol=1e-4, atol=1e-4)
    assert (train_out[:, 3] == 0).all() and (test_out[:, 3] == 1).all()


def test_nearest_neighbours_by_brute_force():
    (train, train_labels), (test, _) = draw(90, 0, signal=1.0), draw(25, 1, signal=1.0)
    scores = knn_scores(train, train_labels, test, CLASSES, k=7, temperature=0.1, batch_size=4)
    expected = np.zeros((25, CLASSES))
    for row, image in enumerate(test.double().numpy()):
        others = train.double().numpy()
        cosines = others @ image / (np.linalg.norm(others, axis=1) * np.linalg.norm(image))
        for neighbour in sorted(range(90), key=lambda i, cosines=cosines: -cosines[i])[:7]:
            expected[row, train_labels[neighbour]] += np.exp(cosines[neighbour] / 0.1)
    np.testing.assert_allclose(scores, expected, rtol=1e-4)
    for k in (0, 91):
        with pytest.raises(ValueError, match=says("`k`", "[1, 90]", str(k))):
            knn_scores(train, train_labels, test, CLASSES, k=k)


def test_top_k_accuracy():
    scores = torch.tensor([[3.0, 2, 1], [1, 3, 2], [1, 2, 3], [3, 2, 1]])
    labels = torch.tensor([0, 2, 0, 0])
    assert [top_k_accuracy(scores, labels, k) for k in (1, 2, 3)] == [0.5, 0.75, 1]


def test_tokens_become_features():
    tokens = torch.arange(24.0).reshape(2, 3, 4)
    torch.testing.assert_close(to_features(tokens, "flatten"), tokens.reshape(2, 12))
    torch.testing.assert_close(to_features(tokens, "mean"), tokens.sum(1) / 3)
    with pytest.raises(ValueError, match=says("`pooling`", "'flatten', 'mean'", "'max'")):
        to_features(tokens, "max")


def test_pooled_latents():
    latents = torch.arange(2 * 3 * 4 * 4.0).reshape(2, 3, 4, 4)
    whole = pool_latents(latents, 10_000)
    torch.testing.assert_close(whole[1, 5], latents[1, :, 1, 1])  # no finer than they are, channels last
    quarter = pool_latents(latents, 13)  # 2 * 2 * 3 = 12 is nearest
    assert quarter.shape == (2, 4, 3)
    torch.testing.assert_close(quarter[0, 3], latents[0, :, 2:, 2:].mean(dim=(1, 2)))
    assert pool_latents(latents, 1).shape == (2, 1, 3)


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, pipeline):
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(folder)
    return folder


def test_a_random_latent_embedder(pipeline):
    state = torch.get_rng_state()
    first, second, third = (random_latent_embedder(pipeline.latent_embedder, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    weights = [model.x_embedder.weight for model in (first, second, third, pipeline.latent_embedder)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[3])
    assert first.config.num_latent_tokens == pipeline.latent_embedder.config.num_latent_tokens


@torch.no_grad()
def test_tokens_are_those_of_the_pipeline(pipeline):
    images = load_labelled_images(ImageOptions(dataset_name="textures", resolution=16), 40, seed=1)
    indices = [3, 5, 8, 21, 34]
    tokens = compute_tokens(pipeline, images, indices, batch_size=2)
    originals = [Image.fromarray(images.dataset[i]["image"]) for i in indices]
    assert tokens["labels"].tolist() == [3, 5, 8, 9, 10]
    torch.testing.assert_close(tokens["lem"], pipeline.get_prior_tokens(image=originals), rtol=1e-4, atol=1e-5)
    assert tokens["random_lem"].shape == tokens["lem"].shape == (5, 4, 8)
    assert (tokens["random_lem"] - tokens["lem"]).abs().mean() > 0.1
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in originals])).permute(0, 3, 1, 2) / 127.5 - 1
    latents = pipeline.encode_image(pixels)
    torch.testing.assert_close(tokens["latents"], pool_latents(latents, 32), rtol=1e-4, atol=1e-5)

    few = LabelledImages(images.dataset, images.class_names[:4], "few", 16)
    with pytest.raises(ValueError, match=says("[0, 3]", "5")):
        compute_tokens(pipeline, few, [0, 5], batch_size=2)


def test_a_file_of_other_tokens_is_refused(tmp_path):
    tokens = {name: torch.rand(2, 3, 4) for name in FEATURES} | {"labels": torch.tensor([0, 1])}
    settings = {"checkpoint": "abc", "data": {"seed": 1, "size": [16, 16]}}
    path = tmp_path / "cache" / "tokens.safetensors"
    write_tokens(path, tokens, settings)
    assert [entry.name for entry in path.parent.iterdir()] == ["tokens.safetensors"]
    found = read_tokens(path, settings)
    assert found.keys() == tokens.keys() and all(torch.equal(found[name], tokens[name]) for name in tokens)
    with pytest.raises(ValueError, match=says("`checkpoint`", "'abd'", "'abc'")):
        read_tokens(path, {**settings, "checkpoint": "abd"})
    with pytest.raises(ValueError, match=says("`data`", "'seed': 2", "'seed': 1")):
        read_tokens(path, {**settings, "data": {"seed": 2, "size": [16, 16]}})
    with pytest.raises(ValueError, match=says("`data`", "None")):
        read_tokens(path, {"checkpoint": "abc"})
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=says("undamaged", "tokens.safetensors")):
        read_tokens(path, settings)


def arguments(checkpoint, output_file, *more: str) -> list[str]:
    command = f"--pretrained_model_name_or_path {checkpoint} --resolution 16 --num_images 120 --num_test_images 40"
    command += " --batch_size 32 --device cpu --num_epochs 3 --num_seeds 2"
    return [*command.split(), "--output_file", str(output_file), *more]


def test_the_command_and_its_cache(checkpoint, tmp_path, capsys):
    more = ["--dataset_name", "textures", "--cache_dir", str(tmp_path / "cache")]
    linear_probe.main(arguments(checkpoint, tmp_path / "first.json", *more))
    table = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[:2] for line in table[2:]] == [
        ["| lem", "32"],
        ["| random_lem", "32"],
        ["| latents", "36"],
    ]
    first = read_results(tmp_path / "first.json")
    assert list(first["metrics"])[:3] == ["top1_lem", "top5_lem", "knn_lem"] and len(first["metrics"]) == 9
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert len(files) == 2  # to train and to test on

    linear_probe.main([entry.replace("first.json", "again.json") for entry in first["argv"]])
    assert read_results(tmp_path / "again.json")["metrics"] == first["metrics"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == files
    linear_probe.main(arguments(checkpoint, tmp_path / "new.json", *more[:2]))  # without a cache
    assert read_results(tmp_path / "new.json")["metrics"] == first["metrics"]

    # What stands in the files is what is probed, and a file under the name of another is refused.
    sizes: dict[int, Path] = {}
    images: list[tuple[float, ...]] = []
    for path in files:
        with safe_open(path, framework="pt") as file:
            settings = json.loads(file.metadata()["settings"])
        assert settings["checkpoint"] == checkpoint_sha256(checkpoint)
        assert settings["data"]["images"] == "textures-16-160-1"
        tokens = read_tokens(path, settings)
        sizes[len(tokens["labels"])] = path
        images += [tuple(row.tolist()) for row in tokens["latents"].flatten(1)]
        tokens["lem"] = F.one_hot(tokens["labels"], 32).float().reshape(-1, 4, 8)
        write_tokens(path, tokens, settings)
    assert sizes.keys() == {120, 40} and len(set(images)) == 160  # none is both trained and tested on
    linear_probe.main(arguments(checkpoint, tmp_path / "edited.json", *more, "--learning_rates", "0.1"))
    assert read_results(tmp_path / "edited.json")["metrics"]["top1_lem"]["value"] == 1
    sizes[120].write_bytes(sizes[40].read_bytes())
    with pytest.raises(ValueError, match=says("`indices`")):
        linear_probe.main(arguments(checkpoint, tmp_path / "edited.json", *more))
    # Other images have files of their own.
    linear_probe.main(arguments(checkpoint, tmp_path / "other.json", *more, "--data_seed", "2"))
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_images_to_train_and_to_test_on_are_disjoint_and_drawn_by_the_seed(tmp_path):
    options = parse_options(LinearProbeOptions, arguments("x", "r.json", "--dataset_name", "textures")).comparison
    _, chosen, _ = draw_labelled_images(options, 160)
    assert sorted(chosen) == list(range(160)) and chosen != sorted(chosen)
    assert draw_labelled_images(replace(options, data_seed=2), 160)[1] != chosen


def test_folders(checkpoint, tmp_path):
    rng = np.random.default_rng(0)
    for split, num in (("train", 10), ("val", 4), ("others", 4)):
        for name, value in (("dark", 40), ("light", 200)):
            folder = tmp_path / split / (name if split != "others" else f"{name}er")
            folder.mkdir(parents=True)
            for i in range(num):
                pixels = rng.integers(value - 40, value + 40, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    sizes = ["--num_images", "16", "--num_test_images", "8", "--num_neighbors", "3", "--learning_rates", "0.1"]
    argv = arguments(checkpoint, tmp_path / "r.json", *sizes, "--train_data_dir", str(tmp_path / "train"))
    linear_probe.main([*argv, "--test_data_dir", str(tmp_path / "val"), "--features", "latents"])
    results = read_results(tmp_path / "r.json")
    assert {name: metric["value"] for name, metric in results["metrics"].items()} == {
        "top1_latents": 1,
        "knn_latents": 1,
    }
    assert results["data"]["train"]["num_available"] == 20 and results["data"]["test"]["num_available"] == 8
    with pytest.raises(ValueError, match=says("`test_data_dir`", "classes")):
        linear_probe.main([*argv, "--test_data_dir", str(tmp_path / "others")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=says("`train_data_dir`", "images", str(tmp_path / "empty"))):
        linear_probe.main([*argv, "--test_data_dir", str(tmp_path / "empty")])
    shutil.copytree(tmp_path / "train", tmp_path / "copy")
    with pytest.raises(ValueError, match=says("`test_data_dir`", "other images", "copy")):
        linear_probe.main([*argv, "--test_data_dir", str(tmp_path / "copy")])
    with pytest.raises(ValueError, match=says("at most the 8", "9")):
        linear_probe.main([*argv, "--test_data_dir", str(tmp_path / "val"), "--num_test_images", "9"])


def test_all_options_that_are_wrong_are_named_at_once(capsys):
    wrong = "--dataset_name textures --test_data_dir x --num_epochs 0 --learning_rates 0 --num_neighbors 121"
    with pytest.raises(SystemExit):
        parse_options(LinearProbeOptions, arguments("x", "r.json", *wrong.split(), "--batch_size", "0"))
    message = capsys.readouterr().err
    for name in ("test_data_dir", "num_epochs", "learning_rates", "num_neighbors", "batch_size"):
        assert f"`{name}`" in message
