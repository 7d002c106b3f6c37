"""Pictures, their latents, and the stream of training samples as a function of (seed, position)."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from diffusers_dod.training.data import (
    LatentDataset,
    Pictures,
    StreamSampler,
    TrainingStream,
    center_crop,
    collate_priors_first,
    encode_pictures,
    latents_fingerprint,
    load_pictures,
)
from diffusers_dod.training.textures import TEXTURE_CLASSES, TextureDataset


# ---------------------------------------------------------------------------------------------------------------------
# The crop


def adm_center_crop(image: Image.Image, size: int) -> np.ndarray:
    """What ADM does (openai/guided-diffusion, `center_crop_arr`), in its own words."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC)
    array = np.array(image)
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[y : y + size, x : x + size]


def noise_picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "size", [(16, 16), (32, 32), (40, 24), (24, 40), (33, 100), (131, 17), (200, 200), (7, 5), (1, 9), (16, 31)]
)
def test_crop_is_that_of_adm(size):
    cropped = center_crop(noise_picture(*size), 16)
    assert cropped.shape == (16, 16, 3) and cropped.dtype == np.uint8
    np.testing.assert_array_equal(cropped, adm_center_crop(noise_picture(*size), 16))


@pytest.mark.parametrize("axis", [0, 1])
def test_crop_position(axis):
    """Of 21 rows or columns, 16 remain: two fall away before and three behind."""
    ramp = np.broadcast_to(10 * np.arange(21, dtype=np.uint8), (16, 21))
    if axis == 0:
        ramp = ramp.T
    picture = np.stack([ramp, 255 - ramp, ramp], axis=-1)
    cropped = center_crop(Image.fromarray(np.ascontiguousarray(picture)), 16)
    kept = picture[2:18] if axis == 0 else picture[:, 2:18]
    np.testing.assert_array_equal(cropped, kept)


def test_a_picture_twice_as_large_is_averaged_in_boxes():
    picture = noise_picture(32, 32)
    means = np.asarray(picture).astype(float).reshape(16, 2, 16, 2, 3).mean((1, 3))
    assert np.abs(center_crop(picture, 16) - means).max() <= 1  # Pillow rounds after each of two passes


def test_every_mode_becomes_rgb():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    color = np.asarray(noise_picture(16, 16))

    cropped = center_crop(Image.fromarray(grey), 16)
    np.testing.assert_array_equal(cropped, np.stack([grey] * 3, axis=-1))

    with_alpha = Image.fromarray(np.concatenate([color, grey[..., None]], axis=-1))
    assert with_alpha.mode == "RGBA"
    np.testing.assert_array_equal(center_crop(with_alpha, 16), color)

    grey_with_alpha = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(grey[::-1].copy())])
    np.testing.assert_array_equal(center_crop(grey_with_alpha, 16), np.stack([grey] * 3, axis=-1))

    palette = Image.fromarray(grey // 128, mode="L").convert("P")
    palette.putpalette([10, 20, 30, 200, 100, 50])
    expected = np.where((grey < 128)[..., None], [10, 20, 30], [200, 100, 50])
    np.testing.assert_array_equal(center_crop(palette, 16), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Where pictures come from


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """`datasets` keeps what it has read; here it does so below the test's own folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def load(dataset_name=None, train_data_dir=None, resolution=16, num_train_samples=8, seed=0, **columns) -> Pictures:
    folder = None if train_data_dir is None else str(train_data_dir)
    return load_pictures(dataset_name, folder, resolution, num_train_samples, seed, **columns)


def write_pictures(folder: Path, names: tuple[str, ...], count: int = 2) -> Path:
    """Pictures of one colour each: red is the class' position in `names`, green the picture's number."""
    for position, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (20, 18), (50 * position, 50 * number, 7)).save(folder / name / f"{number}.png")
    return folder


@pytest.mark.parametrize(("name", "folder"), [(None, None), ("textures", "somewhere")])
def test_exactly_one_source(name, folder):
    with pytest.raises(ValueError, match="Exactly one of `dataset_name` and `train_data_dir`") as error:
        load(name, folder)
    assert repr(name) in str(error.value) and repr(folder) in str(error.value)


def test_unknown_folder(tmp_path):
    with pytest.raises(ValueError, match="`train_data_dir` must be an existing folder") as error:
        load(train_data_dir=tmp_path / "nothing")
    assert "nothing" in str(error.value)


def test_textures():
    pictures = load("textures", num_train_samples=8, seed=3)
    assert pictures.class_names == TEXTURE_CLASSES and len(pictures.dataset) == 8
    np.testing.assert_array_equal(pictures.dataset[5]["image"], TextureDataset(8, size=16, seed=3)[5]["image"])
    same = load("textures", num_train_samples=8, seed=3)
    others = [
        load("textures", num_train_samples=8, seed=4),
        load("textures", num_train_samples=9, seed=3),
        load("textures", resolution=8, num_train_samples=8, seed=3),
    ]
    assert same.fingerprint == pictures.fingerprint
    assert len({pictures.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_image_folder(tmp_path):
    folder = write_pictures(tmp_path / "pictures", ("zebra", "ant", "newt"))
    pictures = load(train_data_dir=folder)
    assert pictures.class_names == ("ant", "newt", "zebra")  # in alphabetical order, whatever the file system's
    assert len(pictures.dataset) == 6
    red_of = {"zebra": 0, "ant": 50, "newt": 100}
    seen = set()
    for row in (pictures.dataset[i] for i in range(6)):
        assert row["image"].shape == (16, 16, 3) and row["image"].dtype == np.uint8
        red, green, blue = row["image"][8, 8]
        assert red == red_of[pictures.class_names[row["label"]]] and blue == 7
        seen.add((int(red), int(green)))
    assert len(seen) == 6


def test_fingerprint_of_an_image_folder(tmp_path, monkeypatch):
    import datasets

    folder = write_pictures(tmp_path / "pictures", ("ant", "newt"))
    first = load(train_data_dir=folder)
    assert load(train_data_dir=folder).fingerprint == first.fingerprint
    assert load(train_data_dir=folder, resolution=8).fingerprint != first.fingerprint
    # A resumed run on a machine that has lost its cache has the same pictures.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "another_cache"))
    assert load(train_data_dir=folder).fingerprint == first.fingerprint
    Image.new("RGB", (20, 18), "white").save(folder / "ant" / "2.png")
    assert load(train_data_dir=folder).fingerprint != first.fingerprint


def test_missing_columns(tmp_path):
    folder = write_pictures(tmp_path / "pictures", ("ant", "newt"))
    with pytest.raises(ValueError, match="`image_column` must be one of the columns") as error:
        load(train_data_dir=folder, image_column="photo")
    assert "'image', 'label'" in str(error.value) and "'photo'" in str(error.value)
    with pytest.raises(ValueError, match="`label_column` must be one of the columns"):
        load(train_data_dir=folder, label_column="kind")

    flat = tmp_path / "flat"
    flat.mkdir()
    noise_picture(16, 16).save(flat / "picture.png")
    with pytest.raises(ValueError, match="`label_column` must be .*one sub-folder per class"):
        load(train_data_dir=flat)


def test_labels_without_names(tmp_path):
    folder = tmp_path / "numbered"
    folder.mkdir()
    rows = [f"{i}.png,{i % 2}" for i in range(4)]
    for i in range(4):
        noise_picture(16, 16).save(folder / f"{i}.png")
    (folder / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    with pytest.raises(ValueError, match="`label_column` must be a ClassLabel column, got 'label'.*int64"):
        load(train_data_dir=folder)


# ---------------------------------------------------------------------------------------------------------------------
# Latents


LATENTS_MEAN, LATENTS_STD = [0.5, -0.25], [2.0, 0.5]


def tiny_vae(**overrides) -> AutoencoderKL:
    torch.manual_seed(0)
    config = dict(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=2,
        norm_num_groups=4,
        sample_size=16,
        latents_mean=LATENTS_MEAN,
        latents_std=LATENTS_STD,
    )
    return AutoencoderKL(**{**config, **overrides}).eval()


def textures(count: int = 5) -> Pictures:
    return Pictures(TextureDataset(count, size=16), TEXTURE_CLASSES, f"textures-{count}")


def encode(pictures, vae, path, random_flip=False, batch_size=3) -> LatentDataset:
    encode_pictures(pictures, vae, path, random_flip, batch_size, num_workers=0)
    return LatentDataset(path)


@pytest.mark.parametrize(
    ("config", "mean", "std"),
    [
        ({}, LATENTS_MEAN, LATENTS_STD),
        ({"latents_mean": None, "latents_std": None, "scaling_factor": 0.25}, [0.0, 0.0], [4.0, 4.0]),
        (
            {"latents_mean": None, "latents_std": None, "scaling_factor": 0.5, "shift_factor": 0.1},
            [0.1, 0.1],
            [2.0, 2.0],
        ),
    ],
    ids=["statistics", "scaling_factor", "shift_factor"],
)
@torch.no_grad()
def test_latents_are_the_normalised_posterior(tmp_path, config, mean, std):
    vae, pictures = tiny_vae(**config), textures()
    latents = encode(pictures, vae, tmp_path / "latents.safetensors")
    assert len(latents) == 5
    assert latents.mean.shape == latents.std.shape == (5, 1, 2, 8, 8)
    assert latents.labels.tolist() == [0, 1, 2, 3, 4]
    mean, std = torch.tensor(mean).reshape(2, 1, 1), torch.tensor(std).reshape(2, 1, 1)
    for i in range(5):
        pixels = torch.from_numpy(pictures.dataset[i]["image"]).permute(2, 0, 1)[None] / 127.5 - 1
        moments = vae.quant_conv(vae.encoder(pixels))[0]  # mean, then log of the variance
        torch.testing.assert_close(latents.mean[i, 0], (moments[:2] - mean) / std, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(latents.std[i, 0], (0.5 * moments[2:]).exp() / std, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_second_view_is_that_of_the_mirrored_picture(tmp_path):
    vae = tiny_vae()
    latents = encode(textures(), vae, tmp_path / "latents.safetensors", random_flip=True)
    plain = encode(textures(), vae, tmp_path / "plain.safetensors")
    assert latents.mean.shape == latents.std.shape == (5, 2, 2, 8, 8)
    torch.testing.assert_close(latents.mean[:, :1], plain.mean, rtol=1e-4, atol=1e-5)
    for i in range(5):
        mirrored = np.ascontiguousarray(textures().dataset[i]["image"][:, ::-1])
        pixels = torch.from_numpy(mirrored).permute(2, 0, 1)[None] / 127.5 - 1
        moments = vae.quant_conv(vae.encoder(pixels))[0]
        mean = (moments[:2] - torch.tensor(LATENTS_MEAN).reshape(2, 1, 1)) / torch.tensor(LATENTS_STD).reshape(2, 1, 1)
        torch.testing.assert_close(latents.mean[i, 1], mean, rtol=1e-4, atol=1e-5)
        # Not the mirrored latents: a convolution is not symmetric.
        assert (latents.mean[i, 1] - latents.mean[i, 0].flip(-1)).abs().max() > 1e-3


def test_pixel_space(tmp_path):
    latents = encode(textures(), None, tmp_path / "latents.safetensors", random_flip=True)
    images = np.stack([textures().dataset[i]["image"] for i in range(5)])
    expected = torch.from_numpy(images.astype(np.float32).transpose(0, 3, 1, 2) / 127.5 - 1)
    torch.testing.assert_close(latents.mean[:, 0], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(latents.mean[:, 1], expected.flip(-1), rtol=0, atol=1e-6)
    assert latents.std.abs().max() == 0
    assert -1 <= latents.mean.min() < -0.5 and 0.5 < latents.mean.max() <= 1


def test_batch_size_does_not_matter_and_nothing_unfinished_remains(tmp_path):
    vae = tiny_vae()
    one = encode(textures(), vae, tmp_path / "deep" / "one.safetensors", batch_size=1)
    five = encode(textures(), vae, tmp_path / "deep" / "five.safetensors", batch_size=5)
    torch.testing.assert_close(one.mean, five.mean, rtol=1e-4, atol=1e-5)
    assert one.labels.tolist() == five.labels.tolist()
    names = sorted(path.name for path in (tmp_path / "deep").iterdir())
    assert names == ["five.safetensors", "one.safetensors"]


def test_fingerprint_says_what_the_latents_depend_on(tmp_path):
    vae, pictures = tiny_vae(), textures()
    fingerprint = encode(pictures, vae, tmp_path / "latents.safetensors").fingerprint
    assert (
        fingerprint == latents_fingerprint(pictures, vae, False) == latents_fingerprint(textures(), tiny_vae(), False)
    )

    other_weights = tiny_vae()
    with torch.no_grad():
        other_weights.encoder.conv_in.weight[0, 0, 0, 0] += 1e-3
    others = {
        latents_fingerprint(pictures, vae, True),
        latents_fingerprint(pictures, None, False),
        latents_fingerprint(pictures, other_weights, False),
        latents_fingerprint(pictures, tiny_vae(latents_mean=[0.5, 0.25]), False),
        latents_fingerprint(replace(pictures, fingerprint="others"), vae, False),
    }
    assert len(others | {fingerprint}) == 6


def test_fingerprint_does_not_depend_on_where_the_autoencoder_lies(tmp_path):
    vae = tiny_vae()
    fingerprints = set()
    for name in ("here", "there"):
        vae.save_pretrained(tmp_path / name)
        loaded = AutoencoderKL.from_pretrained(tmp_path / name)
        fingerprints.add(latents_fingerprint(textures(), loaded, False))
    assert len(fingerprints) == 1


# ---------------------------------------------------------------------------------------------------------------------
# The stream


NUM_CLASSES = 9


def write_latents(
    folder: Path, count: int = 7, views: int = 1, std: float = 0.0, shape: tuple[int, int, int] = (2, 4, 4)
) -> LatentDataset:
    """Latents whose mean is everywhere 10 * picture + view, so that a sample shows where it comes from."""
    mean = 10.0 * torch.arange(count).reshape(-1, 1) + torch.arange(views)
    mean = mean.reshape(count, views, 1, 1, 1).expand(-1, -1, *shape).contiguous()
    tensors = {"mean": mean, "std": torch.full_like(mean, std), "labels": torch.arange(count) % NUM_CLASSES}
    save_file(tensors, folder / "latents.safetensors", metadata={"fingerprint": "test"})
    return LatentDataset(folder / "latents.safetensors")


def picture_and_view(sample: dict) -> tuple[int, int]:
    """For latents without posterior noise."""
    return divmod(int(sample["latents"].flatten()[0]), 10)


def assert_same_sample(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for name in first:
        if isinstance(first[name], torch.Tensor):
            assert torch.equal(first[name], second[name]), name
        else:
            assert first[name] == second[name], name


def test_a_sample_does_not_depend_on_the_order_of_access(tmp_path):
    latents = write_latents(tmp_path, views=2, std=1.0)
    forwards = [TrainingStream(latents, NUM_CLASSES, seed=5)[position] for position in range(30)]
    stream = TrainingStream(latents, NUM_CLASSES, seed=5)
    torch.manual_seed(123)
    for position in [29, 3, 3, 17, 0, 28, 8, 6, 7]:  # back and forth between five passes over the data
        assert_same_sample(stream[position], forwards[position])


def test_workers_see_the_same_stream(tmp_path):
    stream = TrainingStream(write_latents(tmp_path, std=1.0), NUM_CLASSES, seed=5)
    batches = [
        list(DataLoader(stream, 4, sampler=range(12), collate_fn=collate_priors_first, num_workers=workers))
        for workers in (0, 2)
    ]
    for one, other in zip(*batches, strict=True):
        assert_same_sample(one, other)


def test_every_picture_once_per_pass_and_every_pass_in_its_own_order(tmp_path):
    stream = TrainingStream(write_latents(tmp_path, count=20), NUM_CLASSES, seed=0)
    passes = [[picture_and_view(stream[20 * epoch + i])[0] for i in range(20)] for epoch in range(4)]
    for order in passes:
        assert sorted(order) == list(range(20)) and order != list(range(20))
    assert len({tuple(order) for order in passes}) == 4


def correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([first.double().flatten(), second.double().flatten()]))[0, 1])


COUNT = 4000


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> list[dict]:
    """4,000 samples of two views with posterior noise of standard deviation 0.01, which leaves the mean readable."""
    latents = write_latents(tmp_path_factory.mktemp("drawn"), views=2, std=0.01)
    stream = TrainingStream(latents, NUM_CLASSES, seed=1, label_dropout_prob=0.1, prior_dropout_prob=0.3)
    return [stream[position] for position in range(COUNT)]


def origin(sample: dict) -> tuple[int, int]:
    return divmod(round(float(sample["latents"].mean())), 10)


def events(drawn: list[dict]) -> dict[str, torch.Tensor]:
    return {
        "dropped label": torch.tensor([sample["class_label"] == NUM_CLASSES for sample in drawn]).double(),
        "dropped prior": torch.tensor([not sample["has_prior"] for sample in drawn]).double(),
        "mirrored": torch.tensor([origin(sample)[1] for sample in drawn]).double(),
    }


@pytest.mark.parametrize(("event", "share"), [("dropped label", 0.1), ("dropped prior", 0.3), ("mirrored", 0.5)])
def test_shares(drawn, event, share):
    assert float(events(drawn)[event].mean()) == pytest.approx(share, abs=4 * (share * (1 - share) / COUNT) ** 0.5)


def test_draws_are_independent_of_each_other(drawn):
    values = events(drawn)
    values["time"] = torch.stack([sample["sigma"] for sample in drawn]).double()
    values["noise"] = torch.stack([sample["noise"].flatten()[0] for sample in drawn]).double()
    values["posterior"] = torch.stack([sample["latents"].std() for sample in drawn]).double()
    values["picture"] = torch.tensor([origin(sample)[0] for sample in drawn]).double()
    names = list(values)
    for i, name in enumerate(names):
        for other in names[:i]:
            assert abs(correlation(values[name], values[other])) < 4 / COUNT**0.5, (name, other)
        # Nor does a position say anything about the next one.
        if name != "picture":  # which must not come twice in a pass
            assert abs(correlation(values[name][1:], values[name][:-1])) < 4 / COUNT**0.5, name


def test_a_dropped_class_is_the_null_class_and_others_keep_their_own(drawn):
    for sample in drawn:
        assert sample["class_label"] in (NUM_CLASSES, origin(sample)[0] % NUM_CLASSES)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_certain_events(tmp_path, probability):
    latents = write_latents(tmp_path)
    stream = TrainingStream(
        latents, NUM_CLASSES, seed=0, label_dropout_prob=probability, prior_dropout_prob=probability
    )
    for sample in (stream[position] for position in range(100)):
        assert (sample["class_label"] == NUM_CLASSES) == (probability == 1)
        assert sample["has_prior"] == (probability == 0)


def assert_standard_normal(values: torch.Tensor) -> None:
    """Mean, variance and fourth moment within four standard errors."""
    values = values.double().flatten()
    count = len(values)
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (4, 3, 96)):
        assert float((values**power).mean()) == pytest.approx(expected, abs=4 * (variance / count) ** 0.5), power


def test_noises_and_time_are_normal_and_their_own_at_every_position(tmp_path):
    std = 3.0
    stream = TrainingStream(write_latents(tmp_path, count=1, std=std), NUM_CLASSES, seed=2)  # mean 0
    samples = [stream[position] for position in range(2000)]
    posterior = torch.stack([sample["latents"] for sample in samples]) / std
    noise = torch.stack([sample["noise"] for sample in samples])
    sigma = torch.stack([sample["sigma"] for sample in samples])
    assert noise.shape == posterior.shape == (2000, 2, 4, 4) and sigma.shape == (2000,)
    assert_standard_normal(posterior)
    assert_standard_normal(noise)
    assert 0 < sigma.min() and sigma.max() < 1
    assert_standard_normal(torch.logit(sigma.double()))  # paper, Eq. 11

    limit = 4 / noise.numel() ** 0.5
    assert abs(correlation(posterior, noise)) < limit
    assert abs(correlation(posterior[1:], posterior[:-1])) < limit
    assert abs(correlation(noise[1:], noise[:-1])) < limit
    assert len(torch.unique(sigma)) == 2000


def test_the_same_picture_has_new_noise_in_every_pass(tmp_path):
    stream = TrainingStream(write_latents(tmp_path, count=1, std=1.0), NUM_CLASSES, seed=2)
    first, second = stream[0], stream[1]
    for name in ("latents", "noise", "sigma"):
        assert not torch.equal(first[name], second[name]), name


def test_the_seed_decides(tmp_path):
    latents = write_latents(tmp_path, count=20, views=2)
    one, same, other = (TrainingStream(latents, NUM_CLASSES, seed=seed) for seed in (0, 0, 1))
    for position in range(25):
        assert_same_sample(one[position], same[position])
        assert not torch.equal(one[position]["noise"], other[position]["noise"])
    orders = [[picture_and_view(stream[i])[0] for i in range(20)] for stream in (one, other)]
    assert orders[0] != orders[1]


def test_samples_with_a_prior_come_first_in_their_own_order():
    has_prior = [False, True, False, True, True]
    samples = [
        {
            "latents": torch.full((2, 4, 4), float(i)),
            "noise": torch.full((2, 4, 4), 10.0 + i),
            "sigma": torch.tensor(i / 10),
            "class_label": i + 20,
            "has_prior": kept,
        }
        for i, kept in enumerate(has_prior)
    ]
    batch = collate_priors_first(samples)
    order = torch.tensor([1, 3, 4, 0, 2])
    assert batch["num_priors"] == 3
    assert batch["latents"].shape == batch["noise"].shape == (5, 2, 4, 4)
    assert torch.equal(batch["latents"][:, 0, 0, 0], order.float())
    assert torch.equal(batch["noise"][:, 0, 0, 0], 10.0 + order)
    torch.testing.assert_close(batch["sigmas"], order / 10)
    assert torch.equal(batch["class_labels"], 20 + order) and batch["class_labels"].dtype == torch.int64
    assert [sample["class_label"] for sample in samples] == [20, 21, 22, 23, 24]  # the caller's list is untouched


@pytest.mark.parametrize("kept", [True, False])
def test_all_or_none_with_a_prior(tmp_path, kept):
    stream = TrainingStream(write_latents(tmp_path), NUM_CLASSES, seed=0, prior_dropout_prob=0.0 if kept else 1.0)
    batch = collate_priors_first([stream[position] for position in range(4)])
    assert batch["num_priors"] == (4 if kept else 0)
    expected = torch.stack([stream[position]["noise"] for position in range(4)])
    assert torch.equal(batch["noise"], expected)


# ---------------------------------------------------------------------------------------------------------------------
# Who gets which position


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (2, 1), (1, 2), (2, 2), (3, 4)])
def test_processes_and_accumulation_share_the_positions_of_one_batch(processes, accumulation):
    batch_size, num_steps = 3, 4
    samplers = [StreamSampler(0, num_steps, batch_size, accumulation, index, processes) for index in range(processes)]
    together = processes * accumulation * batch_size
    alone = list(StreamSampler(0, num_steps, together))
    per_step = accumulation * batch_size
    positions = [list(sampler) for sampler in samplers]
    for sampler, own in zip(samplers, positions, strict=True):
        assert len(own) == len(sampler) == num_steps * per_step
    for step in range(num_steps):
        shared = [position for own in positions for position in own[step * per_step : (step + 1) * per_step]]
        assert sorted(shared) == alone[step * together : (step + 1) * together]
    assert alone == list(range(num_steps * together))


@pytest.mark.parametrize("start_step", [0, 1, 3, 5])
def test_a_resumed_sampler_goes_on_where_it_stopped(start_step):
    whole = list(StreamSampler(0, 5, 3, accumulation=2, process_index=1, num_processes=2))
    rest = StreamSampler(start_step, 5, 3, accumulation=2, process_index=1, num_processes=2)
    assert list(rest) == whole[start_step * 6 :]
    assert len(rest) == (5 - start_step) * 6
    assert list(rest) == list(rest)  # a sampler may be read twice


def test_latents_are_plain_safetensors(tmp_path):
    """Anything that reads safetensors can read them: the header names tensors and fingerprint."""
    encode(textures(2), None, tmp_path / "latents.safetensors")
    raw = (tmp_path / "latents.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert set(header) == {"mean", "std", "labels", "__metadata__"}
    assert re.fullmatch("[0-9a-f]{64}", header["__metadata__"]["fingerprint"])
