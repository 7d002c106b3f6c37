"""Streams of images: order, draws, bad images, and runs that go on exactly where another one stopped."""

import io
import itertools
import json
import tarfile
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import says
from PIL import Image

from diffusers_dod.data.encoding import EncodingOptions, Share
from diffusers_dod.data.labelled_images import ImageOptions
from diffusers_dod.data.sample_stream import PositionSampler, SampleDraws
from diffusers_dod.data.streaming import ImageStream, build_stream_loader, open_stream
from diffusers_dod.image_reading import center_crop, to_pixels


SHARD_SIZES = (3, 5, 1, 4, 0, 7)
NUM_IMAGES = sum(SHARD_SIZES)
CLASS_NAMES = ("ant", "bee", "cat")
LATENT_SHAPE = (2, 3, 4)
FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASS_NAMES))})


def png(number: int) -> bytes:
    """An image that shows its number in red, and which side is left in green."""
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[..., 0] = number
    pixels[:, 4:, 1] = 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def number_of(pixels: torch.Tensor) -> int:
    return round((float(pixels[0, 0, 0]) + 1) * 127.5)


def row(number: int, **changes) -> dict:
    return {"image": {"bytes": png(number), "path": f"{number}.png"}, "label": number % 3} | changes


def write_parquet(folder: Path, shards: list[list[dict]], features: datasets.Features = FEATURES) -> Path:
    folder.mkdir()
    for index, rows in enumerate(shards):
        table = pa.Table.from_pylist(rows, schema=features.arrow_schema)
        pq.write_table(table, folder / f"{index}.parquet", row_group_size=2)
    return folder


def write_tars(folder: Path, shards: list[list[dict]]) -> Path:
    folder.mkdir()
    for index, rows in enumerate(shards):
        with tarfile.open(folder / f"{index}.tar", "w") as tar:
            for number, row in enumerate(rows):
                for kind, content in (("png", row["image"]["bytes"]), ("cls", str(row["label"]).encode())):
                    entry = tarfile.TarInfo(f"{index}-{number:03d}.{kind}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """All images, in shards of different lengths."""
    numbers = itertools.count()
    shards = [[row(next(numbers)) for _ in range(size)] for size in SHARD_SIZES]
    folder = tmp_path_factory.mktemp("data")
    write_parquet(folder / "parquet", shards)
    write_tars(folder / "tars", shards)
    return folder


@pytest.fixture(scope="module")
def stream(folder) -> datasets.IterableDataset:
    return open_folder(folder / "parquet")[0]


def open_folder(path: Path, class_names: list[str] | None = None, **columns: str) -> tuple:
    return open_stream(ImageOptions(train_data_dir=str(path), **columns), class_names)


def images_of(
    stream,
    seed=0,
    batch_size=3,
    flip=False,
    probabilities=(0.0, 0.5),
    columns=None,
    num_workers=0,
    on_bad_image="error",
    process_index=0,
    num_processes=1,
    state=None,
) -> ImageStream:
    return ImageStream(
        stream,
        CLASS_NAMES,
        SampleDraws(len(CLASS_NAMES), seed, *probabilities),
        LATENT_SHAPE,
        batch_size=batch_size,
        images=ImageOptions(resolution=8, **columns or {}),
        encoding=EncodingOptions(random_flip=flip, on_bad_image=on_bad_image, dataloader_num_workers=num_workers),
        share=Share(process_index, num_processes),
        state=state,
    )


def take(images: ImageStream, count: int) -> list[dict]:
    return list(itertools.islice(build_stream_loader(images), count))


def seen(batches: list[dict]) -> list[tuple[int, int]]:
    """Pass and number of each sample."""
    return [
        (int(state[0]), number_of(pixels))
        for batch in batches
        for pixels, state in zip(batch["pixels"], batch["reader_state"], strict=True)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The order


@pytest.mark.parametrize("kind", ["parquet", "tars"])
@pytest.mark.parametrize(("num_processes", "num_workers"), [(1, 0), (2, 0), (1, 2), (2, 2)])
def test_every_image_once_per_pass(folder, kind, num_processes, num_workers):
    columns = {} if kind == "parquet" else {"image_column": "png", "label_column": "cls"}
    names = None if kind == "parquet" else list(CLASS_NAMES)
    stream, class_names = open_folder(folder / kind, names, **columns)
    assert class_names == CLASS_NAMES and stream.num_shards == len(SHARD_SIZES)
    samples, labels = [], {}
    for index in range(num_processes):
        settings = {"process_index": index, "num_processes": num_processes, "columns": columns}
        images = images_of(stream, num_workers=num_workers, **settings)
        batches = take(images, 20)  # two passes for the reader with the longest shards
        samples += seen(batches)
        for batch in batches:
            labels |= dict(zip(map(number_of, batch["pixels"]), batch["class_labels"].tolist(), strict=True))
    for epoch in (0, 1):
        assert sorted(number for when, number in samples if when == epoch) == list(range(NUM_IMAGES))
    assert labels == {number: number % 3 for number in range(NUM_IMAGES)}


def test_passes_and_seeds_have_orders_of_their_own(stream):
    orders = []
    for seed in (0, 1):
        images = images_of(stream, seed, batch_size=NUM_IMAGES, probabilities=(0.0, 0.0))  # none is moved
        numbers = [number for _, number in seen(take(images, 2))]
        orders += [tuple(numbers[:NUM_IMAGES]), tuple(numbers[NUM_IMAGES:])]
    assert len(set(orders)) == 4 and all(sorted(order) == list(range(NUM_IMAGES)) for order in orders)
    # The same shard has another order in another pass, and shards come in another order.
    last = [[number for number in order if number >= NUM_IMAGES - SHARD_SIZES[-1]] for order in orders]
    assert len(set(map(tuple, last))) == 4 and all(numbers != sorted(numbers) for numbers in last)
    of_shard = np.repeat(np.arange(len(SHARD_SIZES)), SHARD_SIZES)
    assert len({tuple(dict.fromkeys(of_shard[list(order)])) for order in orders}) == 4


def test_a_reader_gets_other_shards_in_other_passes(stream):
    numbers = {epoch: set() for epoch in range(6)}
    for epoch, number in seen(take(images_of(stream, num_processes=2), 18)):
        numbers[epoch].add(number)
    assert len({frozenset(numbers[epoch]) for epoch in range(3)}) == 3


# ---------------------------------------------------------------------------------------------------------------------
# The samples


@pytest.mark.parametrize(("num_processes", "num_workers"), [(1, 0), (2, 0), (2, 2)])
def test_draws_are_those_of_the_position(stream, num_processes, num_workers):
    draws = SampleDraws(len(CLASS_NAMES), 0, 0.5, 0.5)
    for index in range(num_processes):
        images = images_of(
            stream,
            probabilities=(0.5, 0.5),
            flip=True,
            num_workers=num_workers,
            process_index=index,
            num_processes=num_processes,
        )
        positions = iter(PositionSampler(0, 5, 3, process_index=index, num_processes=num_processes))
        for batch in take(images, 5):
            expected = [draws(position) for position in itertools.islice(positions, 3)]
            expected.sort(key=lambda draw: draw.drops_prior)
            assert batch["num_priors"] == sum(not draw.drops_prior for draw in expected)
            for place, draw in enumerate(expected):
                assert torch.equal(batch["noise"][place], torch.randn(LATENT_SHAPE, generator=draw.generator))
                noise = torch.randn(LATENT_SHAPE, generator=draw.generator)
                assert torch.equal(batch["posterior_noise"][place], noise)
                assert batch["sigmas"][place] == draw.sigma
                pixels, label = batch["pixels"][place], int(batch["class_labels"][place])
                assert label == (3 if draw.drops_label else number_of(pixels) % 3)
                assert (pixels[1, :, 0] == (1 if draw.view >= 0.5 else -1)).all()
                assert (pixels[1, :, 7] == (-1 if draw.view >= 0.5 else 1)).all()


def test_nothing_is_mirrored_by_default(stream):
    assert all((batch["pixels"][:, 1, :, 0] == -1).all() for batch in take(images_of(stream), 10))


def test_pixels_are_those_of_the_crop(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (21, 30, 3), dtype=np.uint8))
    file = io.BytesIO()
    image.save(file, "png")
    write_parquet(tmp_path / "one", [[row(0, image={"bytes": file.getvalue(), "path": None})]])
    batch = take(images_of(open_folder(tmp_path / "one")[0], batch_size=1), 1)[0]
    expected = to_pixels(torch.from_numpy(center_crop(image, 8))[None])
    assert batch["pixels"].dtype == torch.float32 and torch.equal(batch["pixels"], expected)


# ---------------------------------------------------------------------------------------------------------------------
# Going on


def assert_same_batches(first: list[dict], second: list[dict]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[name])), name


def run_with_states(images: ImageStream, count: int) -> tuple[list[dict], list[str]]:
    """The batches, and the state before each of them as JSON."""
    batches, states = [], []
    for batch in itertools.islice(build_stream_loader(images), count):
        states.append(json.dumps(images.state.state_dict()))
        batches.append(dict(batch))
        images.state.update(batch)
        assert "reader_state" not in batch
    return batches, states


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_stream_goes_on_exactly(stream, num_workers):
    settings = {"num_workers": num_workers, "process_index": 1, "num_processes": 2, "flip": True}
    batches, states = run_with_states(images_of(stream, **settings), 18)
    readers = [json.loads(state)["readers"] for state in states]
    assert any(reader[0] > 0 for reader in readers[9])  # some stops are in later passes
    for stop in range(18) if num_workers == 0 else (1, 2, 5, 8, 13):
        resumed = images_of(stream, **settings, state=json.loads(states[stop]))
        assert resumed.state.num_batches == stop
        assert_same_batches(take(resumed, min(6, 18 - stop)), batches[stop : stop + 6])


def test_stops_at_the_end_of_a_shard_within_one_and_in_a_later_pass(tmp_path):
    """One shard of four images and batches of two: every other stop is at the end of the shard and of the pass."""
    write_parquet(tmp_path / "one", [[row(number) for number in range(4)]])
    stream = open_folder(tmp_path / "one")[0]
    batches, states = run_with_states(images_of(stream, batch_size=2), 7)
    readers = [json.loads(state)["readers"][0][:3] for state in states]
    assert readers == [[0, 0, 0], [0, 0, 2], [0, 0, 4], [1, 0, 2], [1, 0, 4], [2, 0, 2], [2, 0, 4]]
    for stop, state in enumerate(states):
        resumed = images_of(stream, batch_size=2, state=json.loads(state))
        assert_same_batches(take(resumed, 7 - stop), batches[stop:])


def test_a_loader_that_is_made_anew_goes_on_behind_the_last_batch_that_was_used(stream):
    images = images_of(stream, num_workers=2)
    expected = take(images_of(stream, num_workers=2), 6)
    loader = build_stream_loader(images)
    batches = []
    for _ in range(2):  # its workers have read ahead when it is left
        for batch in itertools.islice(loader, 3):
            batches.append(dict(batch))
            images.state.update(batch)
    assert_same_batches(batches, expected)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("num_processes", {"num_processes": 1, "process_index": 0}),
        ("num_processes", {"num_processes": 3}),
        ("num_workers", {"num_workers": 1}),
        ("process_index", {"process_index": 0}),
        ("batch_size", {"batch_size": 4}),
        ("seed", {"seed": 1}),
    ],
)
def test_another_run_cannot_go_on(stream, name, change):
    settings = {"num_processes": 2, "num_workers": 2, "process_index": 1}
    state = images_of(stream, **settings).state
    changed = settings | change
    message = says(
        f"`{name}` must be {getattr(state, name)} ", f"got {changed[name]}", "exact only at the same number"
    )
    with pytest.raises(ValueError, match=message):
        images_of(stream, **changed, state=state.state_dict())


def test_other_data_cannot_go_on(stream, tmp_path):
    state = images_of(stream).state.state_dict()
    write_parquet(tmp_path / "one", [[row(0)]])
    with pytest.raises(ValueError, match=says("`num_shards` must be 6", "got 1")):
        images_of(open_folder(tmp_path / "one")[0], state=state)


def test_no_worker_counts_as_one(stream):
    _, states = run_with_states(images_of(stream), 4)
    resumed = images_of(stream, num_workers=1, state=json.loads(states[3]))
    assert_same_batches(take(resumed, 2), take(images_of(stream), 5)[3:])


# ---------------------------------------------------------------------------------------------------------------------
# Bad images, and data without any


BAD_ROWS = {
    "no image": ({"image": None}, "lacks its image", None),
    "neither bytes nor path": ({"image": {"bytes": None, "path": None}}, "lacks its image", None),
    "no label": ({"label": None}, "lacks its label", "9.png"),
    "label too large": ({"label": 3}, "its label is 3, not in [0, 2]", "9.png"),
    "label below 0": ({"label": -1}, "its label is -1, not in [0, 2]", "9.png"),
    "truncated": ({"image": {"bytes": png(9)[:50], "path": "9.png"}}, "truncated", "9.png"),
    "other contents": ({"image": {"bytes": b"text", "path": "9.png"}}, "cannot identify image file", "9.png"),
    "no file": ({"image": {"bytes": None, "path": "/no/such.png"}}, "there is no such file", "/no/such.png"),
}


@pytest.mark.parametrize(("change", "reason", "path"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_image_is_an_error_that_says_where_and_why(tmp_path, change, reason, path):
    write_parquet(tmp_path / "bad", [[row(0)], [row(1), row(2), row(9, **change), row(3)]])
    images = images_of(open_folder(tmp_path / "bad")[0])
    with pytest.raises(ValueError, match=says("row 2 of shard 1", reason, path or "row", "`on_bad_image` = 'skip'")):
        take(images, 3)


@pytest.mark.slow  # such a worker is waited for 5 seconds
def test_a_bad_image_is_an_error_in_a_worker_too(tmp_path):
    write_parquet(tmp_path / "bad", [[row(9, label=3)]])
    images = images_of(open_folder(tmp_path / "bad")[0], num_workers=1)
    with pytest.raises(ValueError, match=says("9.png, row 0 of shard 0", "its label is 3")):
        take(images, 1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_images_are_left_out_and_counted(tmp_path, num_workers):
    bad = [row(9, **change) for change, _, _ in BAD_ROWS.values()]
    shards = [[row(0), *bad[:4], row(1)], bad[4:], [row(2), row(3), row(4), row(5)]]
    stream = open_folder(write_parquet(tmp_path / "bad", shards))[0]
    settings = {"batch_size": 2, "num_workers": num_workers, "on_bad_image": "skip"}
    images = images_of(stream, **settings)
    batches, states = run_with_states(images, 14)
    samples = seen(batches)
    assert sorted(number for epoch, number in samples if epoch == 0) == list(range(6))
    if num_workers == 0:  # a pass is three batches; a bad image counts when the next good one comes
        counts = [json.loads(state)["readers"][0][3] for state in states]
        assert len(bad) * 3 <= counts[12] <= len(bad) * 4 and counts == sorted(counts)
    assert images.state.num_bad_images == sum(state[3] for state in images.state.readers) > 0
    for stop in (1, 4, 7):
        resumed = images_of(stream, **settings, state=json.loads(states[stop]))
        assert_same_batches(take(resumed, 4), batches[stop : stop + 4])


@pytest.mark.parametrize("shards", [[[], []], [[row(0, label=7)], [row(1, image=None)]]], ids=["empty", "bad"])
def test_data_without_any_image_end(tmp_path, shards):
    stream = open_folder(write_parquet(tmp_path / "none", shards))[0]
    for index in range(2):
        images = images_of(stream, on_bad_image="skip", process_index=index, num_processes=2)
        with pytest.raises(ValueError, match=says("2 shards with none that can be read", "[0, 2]")):
            take(images, 1)


def test_a_reader_without_images_in_a_pass_waits_for_the_next(tmp_path):
    shards = [[row(0), row(1)], [], [row(2, label=7)]]
    stream = open_folder(write_parquet(tmp_path / "sparse", shards))[0]
    for index in range(3):
        images = images_of(stream, on_bad_image="skip", process_index=index, num_processes=3)
        assert Counter(number for _, number in seen(take(images, 4))) == {0: 6, 1: 6}


# ---------------------------------------------------------------------------------------------------------------------
# What is opened


def test_only_what_is_needed_is_kept(folder, stream):
    assert list(stream.features) == ["image", "label"] and stream.features["image"].decode is False
    tars = open_folder(folder / "tars", list(CLASS_NAMES), image_column="png", label_column="cls")[0]
    assert list(tars.features) == ["png", "cls"]


def test_a_data_set_by_name(tmp_path):
    write_parquet(tmp_path / "named", [[row(0), row(1)], [row(2)]])
    stream, class_names = open_stream(ImageOptions(dataset_name=str(tmp_path / "named")))
    assert class_names == CLASS_NAMES and stream.num_shards == 2
    assert sorted(number for _, number in seen(take(images_of(stream), 1))) == [0, 1, 2]


@pytest.mark.parametrize(
    ("feature", "image"),
    [
        (datasets.Value("binary"), png(1)),
        ({"bytes": datasets.Value("binary"), "path": datasets.Value("string")}, {"bytes": png(1), "path": "1.png"}),
    ],
    ids=["bytes", "bytes and path"],
)
def test_images_that_are_not_marked_as_such_and_labels_that_are_names(tmp_path, feature, image):
    features = datasets.Features({"image": feature, "label": datasets.Value("string")})
    rows = [{"image": image, "label": "cat"}, {"image": image, "label": "dog"}]
    write_parquet(tmp_path / "plain", [rows], features)
    stream, class_names = open_folder(tmp_path / "plain", list(CLASS_NAMES))
    assert class_names == CLASS_NAMES
    batch = take(images_of(stream, on_bad_image="skip"), 1)[0]
    assert batch["class_labels"].tolist() == [2, 2, 2] and number_of(batch["pixels"][0]) == 1
    with pytest.raises(ValueError, match=says("row 1 of shard 0", "its label is 'dog'")):
        take(images_of(stream), 1)


def test_images_in_files_of_their_own(tmp_path):
    (tmp_path / "1.png").write_bytes(png(1))
    write_parquet(tmp_path / "paths", [[row(1, image={"bytes": None, "path": str(tmp_path / "1.png")})]])
    batch = take(images_of(open_folder(tmp_path / "paths")[0]), 1)[0]
    assert number_of(batch["pixels"][0]) == 1


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ({"dataset_name": "both"}, ["Exactly one of `dataset_name` and `train_data_dir`", "'both'"]),
        ({"train_data_dir": None}, ["Exactly one of `dataset_name` and `train_data_dir`", "got None and None"]),
        ({"dataset_name": "textures", "train_data_dir": None}, ["`dataset_name`", "procedural", "got 'textures'"]),
        ({"image_column": "jpg"}, ["`image_column` must be one of", "'image', 'label'", "got 'jpg'"]),
        ({"label_column": "kind"}, ["`label_column` must be one of", "got 'kind'"]),
        ({"image_column": "label"}, ["`image_column` must be a column of images", "got 'label' of type ClassLabel"]),
        ({"label_column": "image"}, ["`label_column` must be a column of class labels", "got 'image' of type"]),
        ({"class_names": ["ant", "bee"]}, ["`class_names` must be those of 'label'", "'cat']", "got ['ant', 'bee']"]),
    ],
)
def test_what_cannot_be_opened(folder, arguments, fragments):
    arguments = {"train_data_dir": str(folder / "parquet")} | arguments
    class_names = arguments.pop("class_names", None)
    with pytest.raises(ValueError, match=says(*fragments)):
        open_stream(ImageOptions(**arguments), class_names)


@pytest.mark.parametrize("path", ["nothing", "."])
def test_a_folder_without_shards(folder, path):
    with pytest.raises(ValueError, match=says("`train_data_dir`", "Parquet or tar files", repr(str(folder / path)))):
        open_folder(folder / path)


def test_classes_must_be_known_in_advance(folder, tmp_path):
    message = says("`class_names` must be given", "got None for 'cls' of type Value('int64')")
    with pytest.raises(ValueError, match=message):
        open_folder(folder / "tars", image_column="png", label_column="cls")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    write_parquet(tmp_path / "names", [[row(0, label="crane")]], features)
    with pytest.raises(ValueError, match=says("`class_names` must differ", "['crane', 'crane']")):
        open_folder(tmp_path / "names", ["crane", "crane"])


@pytest.mark.parametrize(
    ("reason", "hint"), [("is a gated dataset on the Hub.", "hf auth login"), ("is not there", "")]
)
def test_a_data_set_that_is_not_there_for_all(monkeypatch, reason, hint):
    def refuse(name, **options):
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' {reason}")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match=says("`dataset_name`", "got 'a/b'", reason, hint)) as error:
        open_stream(ImageOptions(dataset_name="a/b"))
    assert ("log in" in str(error.value)) == bool(hint)


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"num_processes": 7}, ["`num_shards`", "7 x 1", "got 6"]),
        (
            {"num_processes": 2, "num_workers": 4},
            ["`num_shards`", "processes times that of workers", "2 x 4", "got 6"],
        ),
        ({"process_index": 1}, ["`process_index` must be less than 1, got 1"]),
        ({"batch_size": 0}, ["`batch_size`", ">= 1", "got 0"]),
        ({"num_workers": -1}, ["`dataloader_num_workers`", "[0, 1024]", "got -1"]),
        ({"on_bad_image": "ignore"}, ["`on_bad_image`", "'error', 'skip'", "got 'ignore'"]),
    ],
)
def test_arguments_out_of_range(stream, options, fragments):
    with pytest.raises(ValueError, match=says(*fragments)):
        images_of(stream, **options)


def test_as_many_classes_as_the_draws_have(stream):
    with pytest.raises(ValueError, match=says("`class_names` must be 4 names, got 3")):
        ImageStream(stream, CLASS_NAMES, SampleDraws(4, 0), LATENT_SHAPE, batch_size=1)


def test_a_loader_with_another_number_of_workers(stream):
    with pytest.raises(ValueError, match=says("`num_workers` of the loader must be 2, got 1")):
        next(iter(images_of(stream, num_workers=2)))
