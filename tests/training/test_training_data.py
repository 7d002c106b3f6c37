"""The one face of training data: stored latents and streamed images as inputs of the model, and where they go on."""

import itertools
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from helpers import says, tiny_vae, write_images

from diffusers_dod.autoencoders import encode_moments
from diffusers_dod.data.buckets import bucket_sizes, encode_buckets
from diffusers_dod.data.encoding import EncodingOptions
from diffusers_dod.data.foreign_latents import Edm2Latents
from diffusers_dod.data.labelled_images import ImageOptions, load_labelled_images
from diffusers_dod.data.latents import Latents
from diffusers_dod.data.sample_stream import PositionSampler, SampleDraws
from diffusers_dod.data.streaming import StreamState, open_stream
from diffusers_dod.training import training_data
from diffusers_dod.training.training_data import StoredLatents, StreamedImages, TrainingData


CPU = torch.device("cpu")
DRAWS = SampleDraws(2, seed=3)
INPUTS = {"latents", "noise", "sigmas", "class_labels", "num_priors"}


class Corners:
    """A vision model whose features are the pixels of one corner."""

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels[:, :, :1, :1].movedim(1, -1)

    def describe(self) -> dict[str, str]:
        return {"model_type": "corners"}


class Marked(Latents):
    """Six latents whose mean is everywhere the index, with features where the manifest names a vision model."""

    def __init__(self, **manifest):
        shape = {"num_views": 1, "latent_shape": (3, 4, 4), "resolution": 4, "random_flip": False}
        super().__init__(Path("marked"), {**shape, "class_names": ["ant", "newt"], **manifest}, torch.arange(6) % 2)

    def read(self, index: int, view: int = 0) -> tuple[torch.Tensor, None]:
        return torch.full((3, 4, 4), float(index)), None

    def read_features(self, index: int, view: int = 0) -> torch.Tensor:
        return torch.full((1, 1, 3), float(index))


def images_of_marked() -> list[dict[str, np.ndarray]]:
    return [{"image": np.full((4, 4, 3), 40 * index, dtype=np.uint8)} for index in range(6)]


@pytest.fixture
def shards(tmp_path) -> Path:
    """Ten images of two classes in three Parquet files."""
    (tmp_path / "images").mkdir()
    (tmp_path / "shards").mkdir()
    paths = sorted(write_images(tmp_path / "images", [(8, 8)] * 5).rglob("*.png"))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "newt"])})
    for number in range(3):
        rows = [{"image": str(path), "label": path.parent.name} for path in paths[number::3]]
        datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "shards" / f"{number}.parquet")
    return tmp_path / "shards"


IMAGES = ImageOptions(resolution=8)


def open_folder(shards: Path) -> tuple:
    return open_stream(ImageOptions(train_data_dir=str(shards)))


def streamed(shards: Path, vae=None, vision=None) -> StreamedImages:
    encoding = EncodingOptions(random_flip=True)
    return StreamedImages(*open_folder(shards), vae, IMAGES, encoding, CPU, vision)


def inputs_of(data: TrainingData, count: int, positions: PositionSampler | None = None, **options) -> list[dict]:
    positions = positions or PositionSampler(0, 20, batch_size=2, accumulation=2)
    return [data.to_inputs(batch) for batch in itertools.islice(data.batches(DRAWS, positions, **options), count)]


def assert_same(ours: list[dict], expected: list[dict]) -> None:
    for one, other in zip(ours, expected, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name])) for name in one)


# ---------------------------------------------------------------------------------------------------------------------
# Both kinds


@pytest.mark.parametrize("kind", ["stored", "streamed"])
def test_inputs_are_those_of_the_model(kind, shards):
    data = StoredLatents(Marked(), 1, CPU) if kind == "stored" else streamed(shards)
    assert (data.class_names, data.latent_shape[0]) == (("ant", "newt"), 3)
    for inputs in inputs_of(data, 3):
        assert inputs.keys() == INPUTS and inputs["latents"].shape == (2, *data.latent_shape)


@pytest.mark.parametrize("kind", ["stored", "streamed", "features"])
def test_alignment_ends_with_its_last_step(kind, shards):
    """Features are there in both micro-batches of the first three steps, whenever the run begins."""
    if kind == "streamed":
        data = streamed(shards, vision=Corners())
    elif kind == "stored":
        data = StoredLatents(Marked(), 1, CPU, Corners(), images_of_marked())
    else:
        data = StoredLatents(Marked(vision_model=Corners().describe()), 1, CPU, Corners())
    has_features = ["features" in inputs for inputs in inputs_of(data, 10, num_aligned_steps=3)]
    assert has_features == [True] * 6 + [False] * 4
    assert not any("features" in inputs for inputs in inputs_of(data, 2))


@pytest.mark.parametrize("kind", ["stored", "streamed"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_goes_on(kind, num_workers, shards):
    def build() -> TrainingData:
        if kind == "stored":
            return StoredLatents(Marked(), 1, CPU, Corners(), images_of_marked())
        return streamed(shards, vision=Corners())

    expected = inputs_of(build(), 10, num_workers=num_workers, num_aligned_steps=4)
    data = build()
    assert_same(inputs_of(data, 6, num_workers=num_workers, num_aligned_steps=4), expected[:6])
    state = json.loads(json.dumps(data.state()))
    assert state.keys() == ({"stream"} if kind == "streamed" else set())
    rest = PositionSampler(3, 20, batch_size=2, accumulation=2)
    resumed = inputs_of(build(), 4, rest, num_workers=num_workers, num_aligned_steps=4, state=state)
    assert_same(resumed, expected[6:])


def test_frozen_models_in_bf16_give_about_the_same(shards):
    """Latents and features are in fp32 all the same, and close to what fp32 gives."""
    vae = tiny_vae()
    exact, rounded = streamed(shards, vae), streamed(shards, vae)
    rounded.in_bf16 = True
    for ours, expected in zip(inputs_of(rounded, 3), inputs_of(exact, 3), strict=True):
        assert ours["latents"].dtype == torch.float32 and not torch.equal(ours["latents"], expected["latents"])
        torch.testing.assert_close(ours["latents"], expected["latents"], atol=0.1, rtol=0.02)


def test_workers_of_a_stream_have_shards_of_their_own(shards, monkeypatch):
    """By default there are no more workers than shards, and a resumed run has as many as before."""
    monkeypatch.setattr(training_data, "choose_num_workers", lambda *_: 8)
    data = streamed(shards)
    next(data.batches(DRAWS, PositionSampler(0, 20, batch_size=2), num_workers=None))
    assert data.state()["stream"][0]["num_workers"] == 3
    state = {"stream": [StreamState(3, 3, 1, 2, 0, 2).state_dict()]}
    next(data.batches(DRAWS, PositionSampler(0, 20, batch_size=2), num_workers=None, state=state))
    assert data.state()["stream"][0]["num_workers"] == 2


# ---------------------------------------------------------------------------------------------------------------------
# Stored latents


def test_features_of_images_and_stored_features_are_those_of_the_sample():
    images = StoredLatents(Marked(), 1, CPU, Corners(), images_of_marked())
    stored = StoredLatents(Marked(vision_model=Corners().describe()), 1, CPU, Corners())
    for ours, theirs in zip(*(inputs_of(data, 4, num_aligned_steps=9) for data in (images, stored)), strict=True):
        index = ours["latents"][:, 0, 0, 0]
        torch.testing.assert_close(ours["features"][:, 0, 0, 0], 40 * index / 127.5 - 1)
        assert torch.equal(theirs["features"][:, 0, 0, 0], index)


def test_features_that_are_not_there():
    with pytest.raises(ValueError, match=says("`repa_model_name_or_path`", "square images", "stored features")):
        StoredLatents(Marked(), 1, CPU, Corners())
    with pytest.raises(ValueError, match=says("marked must hold", "`vision_model`", "'corners'", "'other'")):
        StoredLatents(Marked(vision_model={"model_type": "other"}), 1, CPU, Corners())


def test_what_the_latents_decide(tmp_path):
    data = StoredLatents(Marked(resolution=32, random_flip=True), 8, CPU)
    assert (data.resolution, data.random_flip, data.describe()) == (32, True, "6 images of 2 classes")
    np.save(tmp_path / "0.npy", np.ones((8, 6, 6), dtype=np.float32))
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [["0.npy", 1]]}))
    foreign = StoredLatents(Edm2Latents(tmp_path, tiny_vae()), 2, CPU)
    assert (foreign.resolution, foreign.random_flip, foreign.latent_shape) == (12, False, (4, 6, 6))


def test_steps_of_buckets_have_one_shape(tmp_path):
    (tmp_path / "images").mkdir()
    folder = write_images(tmp_path / "images", [(12, 20), (16, 16), (20, 12)])
    images = load_labelled_images(ImageOptions(train_data_dir=str(folder), resolution=16), 0, 0)
    latents = encode_buckets(images, bucket_sizes(16, 4), None, tmp_path / "latents")
    data = StoredLatents(latents, 1, CPU)
    shapes = [tuple(inputs["latents"].shape[1:]) for inputs in inputs_of(data, 40)]
    assert shapes[::2] == shapes[1::2] and set(shapes) == set(data.latent_shapes) and len(data.latent_shapes) == 3
    data.check_patch_size(4)
    with pytest.raises(ValueError, match=says("multiples of the model's patch size 16", "got (3, 12, 20)")):
        data.check_patch_size(16)


# ---------------------------------------------------------------------------------------------------------------------
# Streamed images


def test_images_are_encoded_as_the_model_trains(shards):
    vae, positions = tiny_vae(), PositionSampler(0, 20, batch_size=2)
    data = streamed(shards, vae, Corners())
    assert (data.latent_shape, data.resolution, data.describe()) == ((4, 4, 4), 8, "streamed images of 2 classes")
    plain = [dict(batch) for batch in itertools.islice(streamed(shards, vae).batches(DRAWS, positions), 4)]
    for inputs, batch in zip(inputs_of(data, 4, positions, num_aligned_steps=9), plain, strict=True):
        with torch.no_grad():
            mean, std = encode_moments(batch["pixels"], vae)
        torch.testing.assert_close(inputs["latents"], mean + std * batch["posterior_noise"])
        assert torch.equal(inputs["features"], Corners()(batch["pixels"])) and not inputs["latents"].requires_grad


def test_a_resolution_that_the_autoencoder_does_not_take(shards):
    with pytest.raises(ValueError, match=says("`resolution` must be a multiple of 2", "got 9")):
        StreamedImages(*open_folder(shards), tiny_vae(), ImageOptions(resolution=9), EncodingOptions(), CPU)


def test_bad_images_are_counted(shards, caplog):
    rows = {"image": [{"bytes": b"text", "path": None}], "label": [0]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "newt"])})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(shards / "3.parquet")
    data = StreamedImages(*open_folder(shards), None, IMAGES, EncodingOptions(on_bad_image="skip"), CPU)
    inputs_of(data, 10)
    bad = sum(reader[-1] for reader in data.state()["stream"][0]["readers"])
    assert bad >= 1 and f"{bad} images that cannot be read have been left out so far." in caplog.text
