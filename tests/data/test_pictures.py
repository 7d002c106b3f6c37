"""Pictures, and the stream of training samples as a function of (seed, position)."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader

from diffusers_dod.data.pictures import Pictures, center_crop, load_pictures, to_rgb
from diffusers_dod.data.sample_stream import SampleDraws, StreamSampler, TrainingStream, collate_priors_first
from diffusers_dod.data.textures import TEXTURE_CLASSES, TextureDataset


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
    """16 of 21 rows or columns remain: two fall away before and three behind."""
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


GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOR = np.asarray(noise_picture(16, 16))
ALPHA = GREY[::-1, :, None] / 255


def grey_rgb(values: np.ndarray) -> np.ndarray:
    return np.repeat(np.asarray(values)[..., None], 3, axis=-1)


def palette(transparency=None) -> Image.Image:
    """Index 0 where `GREY` is dark, else index 1."""
    image = Image.fromarray(GREY // 128)
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette([10, 20, 30, 200, 100, 50])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def in_palette(dark, light) -> np.ndarray:
    return np.where((GREY < 128)[..., None], dark, light)


def with_key(image: Image.Image, transparent) -> Image.Image:
    image.info["transparency"] = transparent
    return image


WIDE = GREY.astype(np.uint16) * 256 + GREY  # 257 times
# Name -> the picture, how it is written, and the pixels it has.
MODES = {
    "RGB": (Image.fromarray(COLOR), "png", COLOR),
    "grey": (Image.fromarray(GREY), "png", grey_rgb(GREY)),
    "1 bit": (Image.fromarray(GREY >= 128), "png", in_palette([0] * 3, [255] * 3)),
    "grey in 16 bits": (Image.fromarray(WIDE), "png", grey_rgb(GREY)),
    "grey in 16 bits, big-endian": (
        Image.frombytes("I;16B", (16, 16), WIDE.astype(">u2").tobytes()),
        "tiff",
        grey_rgb(GREY),
    ),
    "grey in 32 bits": (Image.fromarray(WIDE.astype(np.int32)), "tiff", grey_rgb(GREY)),
    "palette": (palette(), "png", in_palette([10, 20, 30], [200, 100, 50])),
    "palette with a transparent colour": (palette(1), "png", in_palette([10, 20, 30], [255] * 3)),
    "palette with alpha": (palette(bytes([0, 255])), "png", in_palette([255] * 3, [200, 100, 50])),
    "GIF": (palette(0), "gif", in_palette([255] * 3, [200, 100, 50])),
    "RGB with a transparent colour": (
        with_key(Image.fromarray(in_palette([10, 20, 30], [200, 100, 50]).astype(np.uint8)), (10, 20, 30)),
        "png",
        in_palette([255] * 3, [200, 100, 50]),
    ),
    "RGBA": (
        Image.fromarray(np.concatenate([COLOR, GREY[::-1, :, None]], axis=-1)),
        "png",
        COLOR * ALPHA + 255 * (1 - ALPHA),
    ),
    "LA": (
        Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(GREY[::-1].copy())]),
        "png",
        GREY[..., None] * ALPHA + 255 * (1 - ALPHA) + np.zeros(3),
    ),
    "CMYK": (Image.fromarray(np.dstack([255 - COLOR, 0 * GREY]), mode="CMYK"), "tiff", COLOR),
}


@pytest.mark.parametrize(("image", "kind", "expected"), MODES.values(), ids=MODES)
def test_every_mode_becomes_rgb(image, kind, expected):
    file = io.BytesIO()
    image.save(file, kind, **({"transparency": 0} if kind == "gif" else {}))
    read = Image.open(io.BytesIO(file.getvalue()))
    np.testing.assert_allclose(center_crop(read, 16).astype(float), expected, rtol=0, atol=1)
    np.testing.assert_allclose(center_crop(image, 16).astype(float), expected, rtol=0, atol=1)


def test_grey_in_32_bits_is_clipped():
    values = np.array([[-5, 0, 257, 65535, 70000]], dtype=np.int32)
    assert np.asarray(to_rgb(Image.fromarray(values)))[0, :, 0].tolist() == [0, 0, 1, 255, 255]


# What undoes each orientation of EXIF.
ORIENTATIONS = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda pixels: np.rot90(pixels),
}


@pytest.mark.parametrize(("orientation", "turn"), ORIENTATIONS.items(), ids=map(str, ORIENTATIONS))
@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_a_picture_is_turned_as_its_orientation_says(kind, orientation, turn):
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    noise_picture(20, 12).save(file, kind, exif=exif)
    rgb = to_rgb(Image.open(io.BytesIO(file.getvalue())))
    np.testing.assert_array_equal(np.asarray(rgb), turn(np.asarray(noise_picture(20, 12))))


# ---------------------------------------------------------------------------------------------------------------------
# Where pictures come from


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
    # A resumed run on a machine that has lost its cache has the same pictures.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "another_cache"))
    assert load(train_data_dir=folder).fingerprint == first.fingerprint
    Image.new("RGB", (20, 18), "white").save(folder / "ant" / "2.png")
    assert load(train_data_dir=folder).fingerprint != first.fingerprint


def test_pictures_that_change_have_another_fingerprint(tmp_path):
    folder = write_pictures(tmp_path / "pictures", ("ant", "newt"))
    first = load(train_data_dir=folder).fingerprint
    path = folder / "ant" / "0.png"
    then = path.stat().st_mtime_ns
    Image.new("RGB", (20, 18), "white").save(path)
    os.utime(path, ns=(then + 10**9, then + 10**9))
    assert load(train_data_dir=folder).fingerprint != first


@pytest.mark.parametrize("empty", ["aardvark", "badger", "zebra"])
def test_a_folder_without_pictures_keeps_its_id(tmp_path, empty):
    names = sorted(["ant", "newt", empty])
    folder = write_pictures(tmp_path / "pictures", ("ant", "newt"))
    (folder / empty).mkdir()
    pictures = load(train_data_dir=folder)
    assert pictures.class_names == tuple(names)
    red_of = {names.index("ant"): 0, names.index("newt"): 50}
    for row in (pictures.dataset[i] for i in range(4)):
        assert row["image"][8, 8, 0] == red_of[row["label"]]


def test_a_folder_that_loses_its_pictures_keeps_its_id(tmp_path):
    folder = write_pictures(tmp_path / "pictures", ("ant", "bee", "newt"))
    before = load(train_data_dir=folder)
    for path in (folder / "ant").iterdir():
        path.unlink()
    after = load(train_data_dir=folder)
    assert after.class_names == before.class_names == ("ant", "bee", "newt")
    assert sorted(after.dataset[i]["label"] for i in range(4)) == [1, 1, 2, 2]
    assert after.fingerprint != before.fingerprint


@pytest.mark.parametrize("hidden", [".cache", "__MACOSX"])
def test_folders_that_datasets_does_not_read_are_no_classes(tmp_path, hidden):
    folder = write_pictures(tmp_path / "pictures", ("ant", "newt"))
    (folder / hidden).mkdir()
    assert load(train_data_dir=folder).class_names == ("ant", "newt")


def test_what_cannot_be_read_has_a_path(tmp_path):
    folder = write_pictures(tmp_path / "pictures", ("ant", "newt"))
    (folder / "newt" / "0.png").write_text("no picture")
    pictures = load(train_data_dir=folder)
    paths = [pictures.path_of(i) for i in range(4)]
    assert sorted(paths) == sorted(str(path) for path in folder.glob("*/*.png"))
    with pytest.raises(UnidentifiedImageError):
        pictures.dataset[paths.index(str(folder / "newt" / "0.png"))]
    assert load("textures").path_of(3) == "row 3"


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


def test_labels_that_are_no_classes(tmp_path):
    folder = tmp_path / "measured"
    folder.mkdir()
    rows = [f"{i}.png,{i / 2}" for i in range(4)]
    for i in range(4):
        noise_picture(16, 16).save(folder / f"{i}.png")
    (folder / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    with pytest.raises(ValueError, match="`label_column` must be a column of class labels.*got 'label'.*float64"):
        load(train_data_dir=folder)


# ---------------------------------------------------------------------------------------------------------------------
# The stream


NUM_CLASSES = 9


class NumberedLatents:
    """Latents whose mean is everywhere 10 * picture + view, so that a sample shows where it comes from."""

    latent_shape = (2, 4, 4)

    def __init__(self, count: int = 7, views: int = 1, std: float | None = None):
        self.labels = torch.arange(count) % NUM_CLASSES
        self.num_views = views
        self.std = std

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int, view: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert 0 <= view < self.num_views
        mean = torch.full(self.latent_shape, 10.0 * index + view)
        return mean, None if self.std is None else torch.full(self.latent_shape, self.std)


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


def test_a_sample_does_not_depend_on_the_order_of_access():
    latents = NumberedLatents(views=2, std=1.0)
    forwards = [TrainingStream(latents, SampleDraws(NUM_CLASSES, seed=5))[position] for position in range(30)]
    stream = TrainingStream(latents, SampleDraws(NUM_CLASSES, seed=5))
    torch.manual_seed(123)
    for position in [29, 3, 3, 17, 0, 28, 8, 6, 7]:  # back and forth between five passes over the data
        assert_same_sample(stream[position], forwards[position])


def test_workers_see_the_same_stream():
    stream = TrainingStream(NumberedLatents(std=1.0), SampleDraws(NUM_CLASSES, seed=5))
    batches = [
        list(DataLoader(stream, 4, sampler=range(12), collate_fn=collate_priors_first, num_workers=workers))
        for workers in (0, 2)
    ]
    for one, other in zip(*batches, strict=True):
        assert_same_sample(one, other)


def test_every_picture_once_per_pass_and_every_pass_in_its_own_order():
    stream = TrainingStream(NumberedLatents(count=20), SampleDraws(NUM_CLASSES, seed=0))
    passes = [[picture_and_view(stream[20 * epoch + i])[0] for i in range(20)] for epoch in range(4)]
    for order in passes:
        assert sorted(order) == list(range(20)) and order != list(range(20))
    assert len({tuple(order) for order in passes}) == 4


def correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([first.double().flatten(), second.double().flatten()]))[0, 1])


COUNT = 4000


@pytest.fixture(scope="module")
def drawn() -> list[dict]:
    """4,000 samples of two views with posterior noise of standard deviation 0.01, which leaves the mean readable."""
    latents = NumberedLatents(views=2, std=0.01)
    stream = TrainingStream(latents, SampleDraws(NUM_CLASSES, seed=1, label_dropout_prob=0.1, prior_dropout_prob=0.3))
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
def test_certain_events(probability):
    latents = NumberedLatents()
    stream = TrainingStream(
        latents, SampleDraws(NUM_CLASSES, seed=0, label_dropout_prob=probability, prior_dropout_prob=probability)
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


def test_noises_and_time_are_normal_and_their_own_at_every_position():
    std = 3.0
    stream = TrainingStream(NumberedLatents(count=1, std=std), SampleDraws(NUM_CLASSES, seed=2))  # mean 0
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


def test_the_same_picture_has_new_noise_in_every_pass():
    stream = TrainingStream(NumberedLatents(count=1, std=1.0), SampleDraws(NUM_CLASSES, seed=2))
    first, second = stream[0], stream[1]
    for name in ("latents", "noise", "sigma"):
        assert not torch.equal(first[name], second[name]), name


def test_the_seed_decides():
    latents = NumberedLatents(count=20, views=2)
    one, same, other = (TrainingStream(latents, SampleDraws(NUM_CLASSES, seed=seed)) for seed in (0, 0, 1))
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
def test_all_or_none_with_a_prior(kept):
    stream = TrainingStream(
        NumberedLatents(), SampleDraws(NUM_CLASSES, seed=0, prior_dropout_prob=0.0 if kept else 1.0)
    )
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


# ---------------------------------------------------------------------------------------------------------------------
# Exact shares


@pytest.mark.parametrize(("size", "dropped_labels", "dropped_priors"), [(10, 1, 5), (8, 1, 4), (7, 1, 4)])
def test_exact_shares_of_each_group_are_dropped(size, dropped_labels, dropped_priors):
    stream = TrainingStream(NumberedLatents(), SampleDraws(NUM_CLASSES, seed=3, exact_dropout_size=size))
    patterns = set()
    for group in range(6):
        samples = [stream[position] for position in range(group * size, (group + 1) * size)]
        labels = [sample["class_label"] == NUM_CLASSES for sample in samples]
        priors = [not sample["has_prior"] for sample in samples]
        assert (sum(labels), sum(priors)) == (dropped_labels, dropped_priors)
        patterns.add((tuple(labels), tuple(priors)))
    assert len(patterns) > 3  # others in each group


def test_exact_shares_change_nothing_else():
    exact = TrainingStream(NumberedLatents(std=1.0), SampleDraws(NUM_CLASSES, seed=3, exact_dropout_size=4))
    independent = TrainingStream(NumberedLatents(std=1.0), SampleDraws(NUM_CLASSES, seed=3))
    for position in (0, 5, 13):
        for name in ("latents", "noise", "sigma"):
            assert torch.equal(exact[position][name], independent[position][name])


def test_nothing_or_everything_is_dropped_exactly():
    for probability in (0.0, 1.0):
        stream = TrainingStream(
            NumberedLatents(), SampleDraws(NUM_CLASSES, 3, probability, probability, exact_dropout_size=6)
        )
        assert {stream[position]["has_prior"] for position in range(12)} == {probability == 0}


def test_time_of_another_distribution():
    """logit(sigma) ~ N(mean, std^2), and then shifted: the logit gains log(shift)."""
    plain = SampleDraws(NUM_CLASSES, 3)
    moved = SampleDraws(NUM_CLASSES, 3, logit_mean=-0.4, logit_std=1.5, time_shift=3.0)
    for position in range(20):
        normal = torch.logit(plain(position).sigma.double())
        logit = torch.logit(moved(position).sigma.double())
        torch.testing.assert_close(logit, -0.4 + 1.5 * normal + np.log(3.0), atol=1e-4, rtol=1e-4)
