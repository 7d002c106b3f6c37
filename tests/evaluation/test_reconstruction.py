# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Images drawn again from their own priors: the measures by hand, the noise by hand, and the command as a whole."""

import json

import numpy as np
import pytest
import torch
from helpers import says, tiny_pipeline, tiny_transformer
from PIL import Image

from diffusers_dod.data.image_grid import LINE
from diffusers_dod.data.textures import TEXTURE_CLASSES, TextureDataset
from diffusers_dod.evaluation import reconstruction
from diffusers_dod.evaluation.options import draw_labelled_images, read_batches
from diffusers_dod.evaluation.reconstruction import (
    ReconstructionOptions,
    as_metrics,
    check_classes,
    compare,
    reconstruct,
    rfid_interval,
)
from diffusers_dod.guidance import NULL_CONDITIONS, Guidance
from diffusers_dod.metrics.frechet import feature_statistics, frechet_distance
from diffusers_dod.metrics.statistics import RunningStatistics
from diffusers_dod.options import parse_options
from diffusers_dod.results import read_results
from diffusers_dod.seeding import stateless_noise


EXTRACTOR = "def extractor(images):\n    return images.float().mean(dim=(2, 3))\n"
INDICES = [3, 7, 30]


def texture_pipeline(**overrides):
    defaults = dict(transformer=tiny_transformer(num_classes=12), id2label=dict(enumerate(TEXTURE_CLASSES)))
    return tiny_pipeline(**{**defaults, **overrides})


@pytest.fixture(scope="module")
def pipeline():
    return texture_pipeline()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, pipeline):
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(folder)
    (folder / "features.py").write_text(EXTRACTOR)
    return folder


def random_images(num: int, side: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, side, side, 3), dtype=np.uint8)


def textures(num: int = len(INDICES)) -> tuple[torch.Tensor, torch.Tensor]:
    dataset = TextureDataset(num, size=16, seed=5)
    images = torch.from_numpy(np.stack([dataset[i]["image"] for i in range(num)]))
    return images, torch.tensor([dataset[i]["label"] for i in range(num)])


def test_the_noise_is_that_of_seed_and_index():
    """A velocity of zero leaves the noise of stage 2 as it is."""
    pipe = texture_pipeline(
        transformer=tiny_transformer(num_classes=12, in_channels=3), vae=None, latent_embedder=None
    )
    pipe = tiny_pipeline(in_channels=3, vae=None)
    torch.nn.init.zeros_(pipe.transformer.proj_out.weight)
    torch.nn.init.zeros_(pipe.transformer.proj_out.bias)
    images, _ = textures()
    outputs = reconstruct(pipe, images[:, :8, :8], torch.tensor([0, 1, 2]), INDICES, 2.0, seed=9)
    noise = torch.stack([stateless_noise((3, 8, 8), 9, index, 0, 2, 0) for index in INDICES])
    expected = np.rint(255 * (noise / 2 + 0.5).clamp(0, 1).numpy()).astype(np.uint8)
    np.testing.assert_array_equal(outputs, expected.transpose(0, 2, 3, 1))


def test_reconstruction_is_stage_two_on_the_image_and_its_class(pipeline):
    images, labels = textures()
    outputs = reconstruct(pipeline, images, labels, INDICES, 3.0, seed=1, num_inference_steps=3)
    direct = pipeline(
        [TEXTURE_CLASSES[label] for label in labels],
        image=[Image.fromarray(image) for image in images.numpy()],
        guidance_scale=3.0,
        num_inference_steps=3,
        seed=1,
        sample_indices=INDICES,
    ).images
    np.testing.assert_array_equal(outputs, np.stack([np.asarray(image) for image in direct]))
    changes = [
        reconstruct(pipeline, images.flip(1), labels, INDICES, 3.0, seed=1, num_inference_steps=3),
        reconstruct(pipeline, images, (labels + 1) % 12, INDICES, 3.0, seed=1, num_inference_steps=3),
        reconstruct(pipeline, images, labels, INDICES, 1.0, seed=1, num_inference_steps=3),
        reconstruct(pipeline, images, labels, INDICES, 3.0, seed=2, num_inference_steps=3),
    ]
    for change in changes:
        assert all((outputs[i] != change[i]).any() for i in range(3))
    alone = reconstruct(pipeline, images[1:2], labels[1:2], INDICES[1:2], 3.0, seed=1, num_inference_steps=3)
    assert np.abs(alone[0].astype(int) - outputs[1]).max() <= 1  # rounding of another batch


@torch.no_grad()
def test_the_bound_of_the_autoencoder(pipeline):
    images, labels = textures()
    outputs = reconstruct(pipeline, images, labels, INDICES, None, seed=0)
    mean = pipeline.vae.encode(images.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mean  # no noise
    decoded = pipeline.vae.decode(mean).sample.permute(0, 2, 3, 1).numpy()
    expected = np.rint(255 * np.clip(decoded / 2 + 0.5, 0, 1))
    assert np.abs(outputs - expected).max() <= 1  # there and back through the normalisation
    # Without an autoencoder it is perfect.
    pixel_space = tiny_pipeline(in_channels=3, vae=None)
    np.testing.assert_array_equal(reconstruct(pixel_space, images, labels, INDICES, None, seed=0), images.numpy())


def test_images_that_are_not_finite_are_refused():
    pipe = texture_pipeline()
    pipe.transformer.proj_out.weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=says("finite", "of index 3, 7, 30")):
        reconstruct(pipe, *textures(), INDICES, 2.0, seed=0)


def mean_colour(images: torch.Tensor) -> torch.Tensor:
    return images.float().mean(dim=(2, 3))


def test_a_perfect_and_a_constant_reconstruction():
    originals = textures(60)[0].numpy()
    perfect = compare([(originals, originals)], mean_colour)
    assert perfect.rfid == pytest.approx(0, abs=1e-6)
    assert (perfect.ssim == 1).all() and np.isinf(perfect.psnr).all()
    metrics = as_metrics("perfect", perfect)
    assert metrics.keys() == {"rfid_perfect", "ssim_perfect"}  # JSON has no infinity
    assert "| perfect |" in reconstruction.to_table({"perfect": metrics})
    assert "| inf |" in reconstruction.to_table({"perfect": metrics})

    constant = compare([(np.full_like(originals, 128), originals)], mean_colour)
    features = mean_colour(torch.from_numpy(originals).permute(0, 3, 1, 2)).double()
    # Of the two Gaussians one is a point.
    expected = ((features.mean(0) - 128) ** 2).sum() + features.var(0).sum()
    assert constant.rfid == pytest.approx(float(expected), rel=1e-6)
    error = ((originals - 128.0) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(constant.psnr, 10 * np.log10(255**2 / error))


def test_numbers_do_not_depend_on_the_batches():
    originals, outputs = textures(50)[0].numpy(), random_images(50)
    whole = compare([(outputs, originals)], mean_colour)
    parts = compare([(outputs[i : i + 7], originals[i : i + 7]) for i in range(0, 50, 7)], mean_colour)
    np.testing.assert_array_equal(whole.psnr, parts.psnr)
    np.testing.assert_array_equal(whole.ssim, parts.ssim)
    features = [mean_colour(torch.from_numpy(side).permute(0, 3, 1, 2)).numpy() for side in (outputs, originals)]
    expected = frechet_distance(*feature_statistics(features[0]), *feature_statistics(features[1]))
    assert whole.rfid == pytest.approx(expected, rel=1e-9) and parts.rfid == pytest.approx(expected, rel=1e-9)
    assert compare([(outputs, originals)]).rfid is None


def test_intervals_of_the_means():
    originals, outputs = textures(30)[0].numpy(), random_images(30)
    comparison = compare([(outputs, originals)])
    metric = as_metrics("x", comparison)["psnr_x"]
    margin = 2.0452 * np.std(comparison.psnr, ddof=1) / 30**0.5  # Student's t of 29 degrees of freedom
    assert metric["value"] == pytest.approx(comparison.psnr.mean())
    assert metric["interval"] == pytest.approx([metric["value"] - margin, metric["value"] + margin], rel=1e-4)


def groups_of(images: np.ndarray, originals: np.ndarray) -> list[tuple[RunningStatistics, RunningStatistics]]:
    groups = [(RunningStatistics(), RunningStatistics()) for _ in range(10)]
    for number, pair in enumerate(groups):
        for side, rows in zip(pair, (images, originals), strict=True):
            side.update(rows[number::10])
    return groups


def test_the_interval_of_rfid_is_as_wide_as_rfid_varies():
    """Features whose means differ by 1, where images follow their originals closely, and where they do not."""
    rng = np.random.default_rng(0)
    distances, margins, unpaired = [], [], []
    for _ in range(100):
        originals, others = rng.standard_normal((2, 200, 2))
        images = originals + 1 + 0.5 * rng.standard_normal((200, 2))
        low, high = rfid_interval(groups_of(images, originals))
        distances.append((low + high) / 2)
        margins.append((high - low) / 2)
        unpaired.append(frechet_distance(*feature_statistics(images), *feature_statistics(others)))
    margin = 2.262 * np.std(distances)  # Student's t of 9 degrees of freedom
    assert np.mean(margins) == pytest.approx(margin, rel=0.25)
    assert np.std(unpaired) > 1.5 * np.std(distances)
    assert rfid_interval(groups_of(images[:19], originals[:19])) is None


def test_classes_of_images_must_be_those_of_the_model(pipeline):
    check_classes(pipeline, TEXTURE_CLASSES)
    check_classes(pipeline, tuple(f"n{label:08d}" for label in range(12)))  # folders with other names
    with pytest.raises(ValueError, match=says("12 classes", "got 3")):
        check_classes(pipeline, TEXTURE_CLASSES[:3])
    with pytest.raises(ValueError, match=says("ids of the model", "'bricks' for 0", "'stripes'")):
        check_classes(pipeline, tuple(sorted(TEXTURE_CLASSES)))


def arguments(checkpoint, output_file, *more: str) -> list[str]:
    command = f"--pretrained_model_name_or_path {checkpoint} --dataset_name textures --resolution 16 --num_images 26"
    return [*command.split(), "--batch_size", "8", "--device", "cpu", "--output_file", str(output_file), *more]


def test_the_command(checkpoint, tmp_path, capsys, pipeline):
    more = [
        "--guidance_scales",
        "1",
        "2.5",
        "--num_inference_steps",
        "3",
        "--seed",
        "4",
        "--grid_file",
        str(tmp_path / "grid.png"),
    ]
    argv = arguments(checkpoint, tmp_path / "first.json", *more, "--extractor", f"{checkpoint}/features.py:extractor")
    reconstruction.main(argv)
    table = capsys.readouterr().out
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == ["| autoencoder", "| scale_1", "| scale_2.5"]
    first = read_results(tmp_path / "first.json")
    kinds = [f"{kind}_{name}" for name in ("autoencoder", "scale_1", "scale_2.5") for kind in ("rfid", "psnr", "ssim")]
    assert list(first["metrics"]) == kinds
    assert first["data"]["num_images"] == 26 and first["data"]["resolution"] == 16
    assert first["settings"]["num_inference_steps"] == 3 and first["settings"]["class_labels"] == "those of the images"
    with Image.open(tmp_path / "grid.png") as grid:
        left, top = grid.width - (12 * 66 - 2), grid.height - (4 * 66 - 2)  # of the images; captions take the rest
        assert left > 30 and top == 2 * LINE
        corner = np.asarray(
            grid.crop((left + 66, top, left + 130, top + 64)).resize((16, 16), Image.Resampling.NEAREST)
        )
        np.testing.assert_array_equal(corner, TextureDataset(26, size=16, seed=1)[1]["image"])

    # The numbers are those of the images that the options name, and the same again.
    images, indices, _ = draw_labelled_images(parse_options(ReconstructionOptions, argv).comparison, 26)
    batches = read_batches(images, sorted(indices), 8)
    pairs = [
        (reconstruct(pipeline, originals, labels, places, 2.5, 4, num_inference_steps=3), originals.numpy())
        for places, originals, labels in batches
    ]
    assert [len(pair[0]) for pair in pairs] == [8, 8, 8, 2]
    assert first["metrics"]["psnr_scale_2.5"]["value"] == pytest.approx(compare(pairs).psnr.mean(), rel=1e-12)
    again = [
        str(tmp_path / "again.json") if entry == str(tmp_path / "first.json") else entry for entry in first["argv"]
    ]
    reconstruction.main(again)
    assert read_results(tmp_path / "again.json")["metrics"] == first["metrics"]


def test_what_the_null_condition_lacks(checkpoint, tmp_path, pipeline):
    found = {}
    for condition in NULL_CONDITIONS:
        more = ["--guidance_scales", "3", "--null_condition", condition, "--num_inference_steps", "2"]
        reconstruction.main(arguments(checkpoint, tmp_path / f"{condition}.json", *more))
        results = read_results(tmp_path / f"{condition}.json")
        assert results["settings"]["null_condition"] == condition
        images, indices, _ = draw_labelled_images(parse_options(ReconstructionOptions, results["argv"]).comparison, 26)
        call = {"num_inference_steps": 2, "guidance": Guidance(null_condition=condition)}
        pairs = [
            (reconstruct(pipeline, originals, labels, places, 3.0, 0, **call), originals.numpy())
            for places, originals, labels in read_batches(images, sorted(indices), 8)
        ]
        found[condition] = results["metrics"]["psnr_scale_3"]["value"]
        assert found[condition] == pytest.approx(compare(pairs).psnr.mean(), rel=1e-12)
    assert len(set(found.values())) == 3


def rows_of(path) -> list[str]:
    """Names of the rows in a file of results."""
    return list(dict.fromkeys(name.partition("_")[2] for name in read_results(path)["metrics"]))


def test_a_run_that_is_stopped_goes_on_with_the_next_row(checkpoint, tmp_path, monkeypatch):
    output, rows_file = tmp_path / "r.json", tmp_path / ".r.json.rows"
    more = ["--num_inference_steps", "1", "--extractor", f"{checkpoint}/features.py:extractor", "--guidance_scales"]
    reconstruction.main(arguments(checkpoint, tmp_path / "whole.json", *more, "1", "2", "3"))
    compared = []

    def compare_two(*args):
        if len(compared) == 2:
            raise KeyboardInterrupt
        compared.append(args)
        return compare(*args)

    with monkeypatch.context() as patch:
        patch.setattr(reconstruction, "compare", compare_two)
        with pytest.raises(KeyboardInterrupt):
            reconstruction.main(arguments(checkpoint, output, *more, "1", "2", "3"))
    assert not output.exists() and rows_of(rows_file) == ["autoencoder", "scale_1"]
    stopped = rows_file.read_bytes()

    scales = []
    monkeypatch.setattr(
        reconstruction, "reconstruct", lambda *args, **call: (scales.append(args[4]), reconstruct(*args, **call))[1]
    )
    reconstruction.main(arguments(checkpoint, output, *more, "1", "2", "3"))
    assert set(scales) == {2.0, 3.0} and not rows_file.exists()
    assert read_results(output)["metrics"] == read_results(tmp_path / "whole.json")["metrics"]
    assert read_results(output)["settings"]["guidance_scales"] == [1, 2, 3]
    # With other scales too, and the rows come in the order of the options.
    rows_file.write_bytes(stopped)
    scales.clear()
    reconstruction.main(arguments(checkpoint, output, *more, "4", "1", "--grid_file", str(tmp_path / "grid.png")))
    assert rows_of(output) == ["autoencoder", "scale_4", "scale_1"] and scales == [4.0] * 4 + [None, 4.0, 1.0]
    # Rows of other settings, of other code or damaged ones are of no use.
    changes = [more[:1] + ["2"] + more[2:] + ["1"], [*more, "1", "--seed", "5"], [*more, "1", "--num_images", "25"]]
    content = json.loads(stopped)
    content["versions"]["git_commit"] = "another"
    others = [stopped] * 3 + [stopped[:-30], json.dumps(content).encode(), b""]
    for options, rows in zip(changes + [[*more, "1"]] * 3, others, strict=True):
        rows_file.write_bytes(rows)
        scales.clear()
        reconstruction.main(arguments(checkpoint, output, *options))
        assert set(scales) == {None, 1.0} and not rows_file.exists()


def test_the_defaults_are_those_of_the_checkpoint_and_pixel_space_has_no_autoencoder(tmp_path):
    backbone = tiny_transformer(in_channels=3, num_classes=12)
    pipe = tiny_pipeline(in_channels=3, vae=None, default_num_stages=1, transformer=backbone, id2label=None)
    pipe.save_pretrained(tmp_path / "pipeline")
    reconstruction.main(arguments(tmp_path / "pipeline", tmp_path / "results.json"))
    results = read_results(tmp_path / "results.json")
    assert list(results["metrics"]) == ["psnr_scale_2", "ssim_scale_2"]
    assert results["settings"]["num_inference_steps"] == 2


def test_all_options_that_are_wrong_are_named_at_once(tmp_path, capsys):
    wrong = "--guidance_scales -1 2 2.0000001 --num_inference_steps 0 --data_seed -1 --train_data_dir x"
    wrong += " --grid_file grid.jpg"
    with pytest.raises(SystemExit):
        parse_options(
            ReconstructionOptions,
            arguments("x", tmp_path / "r.json", *wrong.split(), "--resolution", "8", "--device", "nonsense"),
        )
    message = capsys.readouterr().err
    for name in (
        "guidance_scales` must be a finite",
        "guidance_scales` must be different",
        "num_inference_steps",
        "data_seed",
        "train_data_dir",
        "grid_file",
        "resolution",
        "device",
    ):
        assert name in message


def test_a_pipeline_without_latent_embedder_has_no_priors(tmp_path):
    tiny_pipeline(latent_embedder=None).save_pretrained(tmp_path / "pipeline")
    with pytest.raises(ValueError, match=says("`latent_embedder`", "pipeline")):
        reconstruction.main(arguments(tmp_path / "pipeline", tmp_path / "results.json"))
