"""Aspect-ratio buckets: their sizes, who goes into which, and their latents on disk."""

import json
import threading
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import contents, says, tiny_latent_embedder, tiny_pipeline, tiny_transformer, tiny_vae
from launch import PATIENCE_S
from PIL import Image
from torch.utils.data import DataLoader
from transformers import ViTConfig, ViTModel

from diffusers_dod.autoencoders import encode_moments
from diffusers_dod.data.buckets import (
    BUCKETS,
    BucketedLatents,
    assign_buckets,
    bucket_sizes,
    encode_buckets,
    split_images,
)
from diffusers_dod.data.encoding import EncodingOptions, Share
from diffusers_dod.data.image_folder import BadImagesError
from diffusers_dod.data.labelled_images import ImageOptions, LabelledImages, load_labelled_images
from diffusers_dod.data.latents import LatentDataset
from diffusers_dod.data.sample_stream import PositionSampler, SampleDraws, TrainingSamples, collate_priors_first
from diffusers_dod.image_reading import center_crop, cover_and_crop, to_pixels, to_rgb
from diffusers_dod.losses import DoDJointModel
from diffusers_dod.vision_features import VisionFeatures


SIZES = [(12, 20), (16, 16), (20, 12)]  # those of resolution 16 in steps of 4


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# Width and height of the images of each class; three are wide, four about square, four high.
SHAPES = {"ant": [(20, 12), (40, 25), (16, 16), (12, 20), (33, 70)], "newt": [(17, 16), (30, 33), (50, 90)]}
SHAPES["zebra"] = [(64, 40), (16, 17), (24, 40)]


@pytest.fixture
def images(tmp_path) -> LabelledImages:
    for name, shapes in SHAPES.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        for number, shape in enumerate(shapes):
            random_image(*shape, seed=number).save(tmp_path / "images" / name / f"{number}.png")
    return reload(tmp_path / "images")


def reload(folder: Path) -> LabelledImages:
    return load_labelled_images(ImageOptions(train_data_dir=str(folder), resolution=16), 0, 0)


def encode(
    images: LabelledImages,
    folder: Path,
    vae=None,
    sizes=SIZES,
    share=None,
    vision=None,
    all_or_none=nullcontext,
    **options,
) -> BucketedLatents:
    encoding = EncodingOptions(**{"shard_size": 2, "encoding_batch_size": 2, **options})
    return encode_buckets(images, sizes, vae, folder, encoding, share=share, vision=vision, all_or_none=all_or_none)


# ---------------------------------------------------------------------------------------------------------------------
# Sizes


def test_sizes_of_256():
    high = [(272, 240), (288, 224), (304, 208), (336, 192), (352, 176)]
    wide = [(width, height) for height, width in reversed(high)]
    assert bucket_sizes(256, 16) == [*wide, (256, 256), *high]


@pytest.mark.parametrize("ratio", [1, 1.5, 2.0, 4 / 3, 3.0, 1e6])
@pytest.mark.parametrize(("resolution", "multiple"), [(16, 16), (16, 4), (15, 3), (96, 8), (7, 1)])
def test_sizes_are_those_that_fit_into_no_other(resolution, multiple, ratio):
    sides = range(multiple, resolution**2 // multiple + 1, multiple)
    allowed = [(h, w) for h in sides for w in sides if h * w <= resolution**2 and max(h, w) <= min(h, w) * ratio]
    largest = [a for a in allowed if not any(a != b and a[0] <= b[0] and a[1] <= b[1] for b in allowed)]
    sizes = bucket_sizes(resolution, multiple, ratio)
    assert sizes == sorted(largest)
    assert (resolution, resolution) in sizes
    assert sorted((width, height) for height, width in sizes) == sizes


@pytest.mark.parametrize(
    ("arguments", "error", "fragments"),
    [
        ((250, 16), ValueError, ("`resolution`", "multiple of `multiple` = 16", "250")),
        ((0, 16), ValueError, ("`resolution`", ">= 1", "0")),
        ((256, 0), ValueError, ("`multiple`", ">= 1", "0")),
        ((256, 16, 0.5), ValueError, ("`max_aspect_ratio`", "[1, inf)", "0.5")),
        ((256, 16, float("inf")), ValueError, ("`max_aspect_ratio`", "finite", "inf")),
        ((256.0, 16), TypeError, ("`resolution`", "int", "256.0")),
    ],
)
def test_sizes_that_there_are_not(arguments, error, fragments):
    with pytest.raises(error, match=says(*fragments)):
        bucket_sizes(*arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Who goes into which bucket


def test_the_nearest_ratio(images):
    assigned = dict(zip(map(images.path_of, range(11)), assign_buckets(images, SIZES), strict=True))
    border = (12 / 20) ** 0.5  # halfway between 12 / 20 and 1
    for path, number in assigned.items():
        width, height = SHAPES[Path(path).parent.name][int(Path(path).stem)]
        assert number == (0 if height / width < border else 2 if height / width > 1 / border else 1), path
    assert Counter(assigned.values()) == {0: 3, 1: 4, 2: 4}
    assert assign_buckets(images, SIZES, num_workers=2) == list(assigned.values())


@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 7, 8])
def test_the_orientation_counts(tmp_path, images, kind, orientation):
    exif, path = Image.Exif(), tmp_path / "turned" / "ant" / f"0.{kind}"
    exif[0x0112] = orientation
    path.parent.mkdir(parents=True)
    random_image(40, 24).save(path, kind, exif=exif)
    turned = to_rgb(Image.open(path)).size == (24, 40)
    assert turned == (orientation >= 5)
    assert assign_buckets(reload(tmp_path / "turned"), SIZES) == [2 if turned else 0]


@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_only_the_header_is_read(tmp_path, images, kind):
    path = tmp_path / "images" / "ant" / f"cut.{kind}"
    random_image(400, 240).save(path, kind)
    path.write_bytes(path.read_bytes()[:2000])  # of which nothing can be decoded
    images = reload(tmp_path / "images")
    index = [images.path_of(i) for i in range(12)].index(str(path))
    with pytest.raises(OSError):
        images.dataset[index]
    assert assign_buckets(images, SIZES)[index] == 0


def test_what_cannot_be_opened_is_square(tmp_path, images):
    path = tmp_path / "images" / "ant" / "0.png"
    path.write_text("no image")
    images = reload(tmp_path / "images")
    assert assign_buckets(images, SIZES)[[images.path_of(i) for i in range(11)].index(str(path))] == 1


def test_images_that_have_no_buckets(images):
    textures = load_labelled_images(ImageOptions(dataset_name="textures", resolution=16), 4, 0)
    with pytest.raises(TypeError, match=says("`images.dataset`", "ImageDataset", "TextureDataset")):
        assign_buckets(textures, SIZES)
    with pytest.raises(ValueError, match=says("`sizes`", "at least one", "0")):
        assign_buckets(images, [])
    images = replace(images, dataset=images.dataset.select([], (16, 16)))
    with pytest.raises(ValueError, match=says("`images`", "at least one", "0")):
        assign_buckets(images, SIZES)


# ---------------------------------------------------------------------------------------------------------------------
# The crop


@pytest.mark.parametrize("size", [(16, 16), (40, 24), (33, 100), (131, 17), (200, 200), (1, 9), (16, 31)])
def test_the_crop_of_a_square_is_that_of_squares(size):
    np.testing.assert_array_equal(cover_and_crop(random_image(*size), 16, 16), center_crop(random_image(*size), 16))


@pytest.mark.parametrize("size", [(20, 12), (64, 64), (41, 24), (100, 33), (1, 1), (700, 5), (5, 700), (39, 23)])
@pytest.mark.parametrize(("height", "width"), [(12, 20), (20, 12)])
def test_the_crop_covers_the_bucket(size, height, width):
    """Pillow fills what lies outside of an image with black."""
    cropped = cover_and_crop(Image.new("RGB", size, (10, 200, 30)), height, width)
    assert cropped.shape == (height, width, 3) and cropped.dtype == np.uint8
    assert (cropped == [10, 200, 30]).all()


def test_position_of_the_crop():
    pixels = (np.arange(20 * 17 * 3).reshape(17, 20, 3) % 251).astype(np.uint8)
    np.testing.assert_array_equal(cover_and_crop(Image.fromarray(pixels), 12, 20), pixels[2:14])
    turned = np.ascontiguousarray(pixels.transpose(1, 0, 2))
    np.testing.assert_array_equal(cover_and_crop(Image.fromarray(turned), 20, 12), turned[:, 2:14])


def test_large_images_are_averaged_in_boxes():
    """48 x 100 to 24 x 50 to 12 x 25, which is not twice as large as the bucket along both sides."""
    large = random_image(100, 48)
    means = np.asarray(large).astype(float).reshape(12, 4, 25, 4, 3).mean((1, 3))
    assert np.abs(cover_and_crop(large, 12, 20) - means[:, 2:22]).max() <= 2  # Pillow rounds in between


def test_images_of_a_bucket(images):
    buckets = split_images(images, SIZES)
    assert {size: len(bucket.dataset) for size, bucket in buckets.items()} == {(12, 20): 3, (16, 16): 4, (20, 12): 4}
    rows = {images.path_of(i): i for i in range(11)}
    for (height, width), bucket in buckets.items():
        assert (bucket.class_names, bucket.resolution) == (images.class_names, 16)
        for index in range(len(bucket.dataset)):
            path = bucket.path_of(index)
            sample, row = bucket.dataset[index], rows.pop(path)
            assert images.class_names[sample["label"]] == Path(path).parent.name
            assert sample["label"] == images.dataset[row]["label"]
            np.testing.assert_array_equal(sample["image"], cover_and_crop(Image.open(path), height, width))
    assert not rows


def test_other_images_in_a_bucket_have_another_fingerprint(images):
    three, two = split_images(images, SIZES), split_images(images, SIZES[:2])
    assert three[12, 20].fingerprint == two[12, 20].fingerprint  # the same ones
    assert len({bucket.fingerprint for buckets in (three, two) for bucket in buckets.values()}) == 4


def test_a_bucket_without_images_is_left_out(images):
    assert list(split_images(images, [(16, 16), (4, 64)])) == [(16, 16)]


# ---------------------------------------------------------------------------------------------------------------------
# Latents


def test_latents_of_buckets(tmp_path, images):
    vae = tiny_vae()
    latents = encode(images, tmp_path / "latents", vae, random_flip=True)
    assert isinstance(latents, BucketedLatents)
    assert latents.bucket_lengths == [3, 4, 4] and len(latents) == 11
    assert latents.num_views == 2 and latents.latent_shape == (4, 8, 8)
    index = 0
    for bucket in split_images(images, SIZES).values():
        for sample in bucket.dataset:
            assert int(latents.labels[index]) == sample["label"]
            pixels = to_pixels(torch.from_numpy(sample["image"])[None])
            for view, pixels_of_view in enumerate((pixels, pixels.flip(-1))):
                for read, expected in zip(latents.read(index, view), encode_moments(pixels_of_view, vae), strict=True):
                    torch.testing.assert_close(read, expected[0].detach(), rtol=1e-4, atol=1e-4)
            assert latents.read_features(index) is None
            index += 1
    assert index == 11


def test_what_is_written(tmp_path, images):
    folder = tmp_path / "latents"
    encode(images, folder)
    manifest = json.loads((folder / BUCKETS).read_text())
    assert manifest.pop("bad_images") == [] and manifest.pop("autoencoder") is None
    assert manifest == {
        "format": 1,
        "images": images.fingerprint,
        "num_images": 11,
        "class_names": ["ant", "newt", "zebra"],
        "transform": "ADM centre crop to buckets",
        "resolution": 16,
        "random_flip": False,
        "latents_dtype": "float32",
        "bucket_sizes": [[12, 20], [16, 16], [20, 12]],
        "num_samples": 11,
        "num_views": 1,
        "latent_shape": [3, 16, 16],
        "buckets": [
            {"folder": f"bucket-{height}x{width}", "height": height, "width": width, "num_samples": count}
            for (height, width), count in zip(SIZES, (3, 4, 4), strict=True)
        ],
    }
    assert sorted(path.name for path in folder.iterdir()) == ["bucket-12x20", "bucket-16x16", "bucket-20x12", BUCKETS]
    for (height, width), count in zip(SIZES, (3, 4, 4), strict=True):
        bucket = LatentDataset(folder / f"bucket-{height}x{width}")  # an ordinary folder of latents
        assert bucket.latent_shape == (3, height, width) and len(bucket) == count


def test_features_of_a_vision_model(tmp_path, images):
    config = ViTConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    ViTModel(config).save_pretrained(tmp_path / "vision")
    vision = VisionFeatures(tmp_path / "vision")
    latents = encode(images, tmp_path / "latents", vision=vision)
    assert latents.manifest["vision_model"] == vision.describe()
    for index in (0, 5, 10):  # whatever the shape of the bucket
        features = vision(latents.read(index)[0][None])[0]
        torch.testing.assert_close(latents.read_features(index), features, rtol=2e-3, atol=2e-3)


class Together:
    """What keeps the processes of a run together, for threads."""

    def __init__(self, count: int):
        self.barrier = threading.Barrier(count, timeout=PATIENCE_S)
        self.errors: list[Exception] = []

    @contextmanager
    def __call__(self):
        try:
            yield
        except Exception as error:
            self.errors.append(error)
        self.barrier.wait()
        if self.errors:
            raise self.errors[0]


@pytest.mark.parametrize("count", [2, 4])
def test_any_number_of_processes_writes_the_same(tmp_path, images, count):
    encode(images, tmp_path / "alone")
    results, together = {}, Together(count)

    def run(index: int) -> None:
        results[index] = encode(images, tmp_path / "shared", share=Share(index, count), all_or_none=together)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not together.errors
    assert [len(results[index]) for index in range(count)] == [11] * count
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")


def test_the_shards_of_all_buckets_are_dealt_in_turn(tmp_path, images):
    """Six shards, two of each bucket: no process is left with the first of every bucket."""
    written = []
    for index in range(4):
        folder = tmp_path / f"process-{index}"
        with pytest.raises(ValueError):  # alone it cannot finish
            encode(images, folder, share=Share(index, 4))
        written.append([path.relative_to(folder) for path in folder.rglob("*.safetensors")])
    assert [len(paths) for paths in written] == [2, 2, 1, 1]
    assert len({path for paths in written for path in paths}) == 6


def test_a_run_that_was_stopped_goes_on(tmp_path, images):
    folder = tmp_path / "latents"
    with pytest.raises(ValueError, match=says("must hold 2 shards")):
        encode(images, folder, share=Share(0, 2))  # without the other one
    assert not (folder / BUCKETS).exists()
    with pytest.raises(ValueError, match=says(BUCKETS, "No such file")):
        BucketedLatents(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert len(before) == 3
    assert len(encode(images, folder)) == 11
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_what_is_done_is_not_done_again(tmp_path, images):
    folder = tmp_path / "latents"
    encode(images, folder)
    before = contents(folder)
    for path in (tmp_path / "images").rglob("*.png"):
        path.unlink()  # neither images nor headers are read
    assert len(encode(images, folder)) == 11
    assert contents(folder) == before


def test_a_lost_shard_is_encoded_again(tmp_path, images):
    folder = tmp_path / "latents"
    encode(images, folder)
    before = contents(folder)
    (folder / "bucket-20x12" / "shard-00001.safetensors").unlink()
    with pytest.raises(ValueError, match=says("bucket-20x12", "shard-00001")):
        BucketedLatents(folder)
    encode(images, folder)
    assert contents(folder) == before


@pytest.mark.parametrize("state", ["finished", "unfinished", "damaged"])
@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"random_flip": True}, "random_flip"),
        ({"latents_dtype": "float16"}, "latents_dtype"),
        ({"vae": "another"}, "autoencoder"),
        ({"sizes": [(12, 20), (16, 16)]}, "bucket_sizes"),
        ({"fingerprint": "other images"}, "images"),
    ],
)
def test_other_settings_are_refused(tmp_path, images, changed, name, state):
    folder = tmp_path / "latents"
    encode(images, folder)
    if state == "damaged":
        (folder / "bucket-12x20" / "shard-00000.safetensors").unlink()
    if state == "unfinished":
        (folder / BUCKETS).unlink()
        name = "num_images" if name == "bucket_sizes" else name  # there are others in a bucket
    before = contents(folder)
    if "fingerprint" in changed:
        images, changed = replace(images, **changed), {}
    if "vae" in changed:
        changed = {"vae": tiny_vae()}
    with pytest.raises(ValueError, match=says("must hold latents with", f"`{name}`")):
        encode(images, folder, **changed)
    assert contents(folder) == before


def test_a_bucket_of_other_settings_is_refused(tmp_path, images):
    encode(images, tmp_path / "one")
    encode(images, tmp_path / "other", random_flip=True)
    (tmp_path / "one" / "bucket-12x20").rename(tmp_path / "away")
    (tmp_path / "other" / "bucket-12x20").rename(tmp_path / "one" / "bucket-12x20")
    with pytest.raises(ValueError, match=says("bucket-12x20", "`random_flip`")):
        BucketedLatents(tmp_path / "one")


def test_buckets_of_another_format(tmp_path):
    (tmp_path / BUCKETS).write_text('{"format": 7}')
    with pytest.raises(ValueError, match=says("`format` must be 1", "7")):
        BucketedLatents(tmp_path)


def test_bad_images(tmp_path, images):
    """One cannot be opened, one of another bucket cannot be decoded."""
    bad = [tmp_path / "images" / "ant" / "0.png", tmp_path / "images" / "newt" / "2.png"]
    bad[0].write_text("no image")
    bad[1].write_bytes(bad[1].read_bytes()[:200])
    images, folder = reload(tmp_path / "images"), tmp_path / "latents"
    rows = [[images.path_of(i) for i in range(11)].index(str(path)) for path in bad]
    with pytest.raises(BadImagesError) as error:
        encode(images, folder)
    assert [(entry["index"], entry["path"]) for entry in error.value.bad] == [
        (row, str(path)) for row, path in zip(rows, bad, strict=True)
    ]
    assert not (folder / BUCKETS).exists()
    latents = encode(images, folder, on_bad_image="skip")
    assert latents.bucket_lengths == [2, 4, 3] and latents.manifest["num_images"] == 11
    assert latents.manifest["bad_images"] == error.value.bad
    with pytest.raises(BadImagesError):
        encode(images, folder)


def test_a_bucket_of_bad_images_only(tmp_path, images):
    for path in (tmp_path / "images").rglob("*.png"):
        if Image.open(path).height * 20 <= Image.open(path).width * 13:
            path.write_bytes(path.read_bytes()[:200])
    images = reload(tmp_path / "images")
    latents = encode(images, tmp_path / "latents", on_bad_image="skip")
    assert latents.bucket_lengths == [4, 4] and len(latents.manifest["bad_images"]) == 3
    assert len(encode(images, tmp_path / "latents", on_bad_image="skip")) == 8
    for path in (tmp_path / "images").rglob("*.png"):
        path.write_text("no image")
    with pytest.raises(ValueError, match=says("must hold at least one image", "none of 11")):
        encode(reload(tmp_path / "images"), tmp_path / "nothing", on_bad_image="skip")


# ---------------------------------------------------------------------------------------------------------------------
# Training


@pytest.fixture
def latents(tmp_path, images) -> BucketedLatents:
    return encode(images, tmp_path / "latents", tiny_vae(), random_flip=True)


def loader_of(latents: BucketedLatents, batch_size: int, accumulation=1, process=(0, 1), steps=(0, 12), workers=0):
    sampler = PositionSampler(*steps, batch_size, accumulation, *process)
    stream = TrainingSamples(latents, SampleDraws(3, seed=5), sampler.images_per_step)
    return DataLoader(stream, batch_size, sampler=sampler, collate_fn=collate_priors_first, num_workers=workers)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_all_batches_of_a_step_have_one_shape(latents, processes, accumulation):
    batches = [list(loader_of(latents, 3, accumulation, (index, processes))) for index in range(processes)]
    shapes = set()
    for step in range(12):
        micro = range(step * accumulation, (step + 1) * accumulation)
        of_step = {tuple(own[number]["latents"].shape) for own in batches for number in micro}
        assert len(of_step) == 1
        shapes |= of_step
    assert shapes == {(3, 4, 6, 10), (3, 4, 8, 8), (3, 4, 10, 6)}


def test_processes_share_the_samples_of_one(latents):
    def noises(loaders) -> list[set]:
        """The noises of each step; a noise tells which position a sample is of."""
        steps = zip(*loaders, strict=True)
        return [{float(noise.sum()) for batch in step for noise in batch["noise"]} for step in steps]

    assert noises([loader_of(latents, 4)]) == noises([loader_of(latents, 2, 1, (index, 2)) for index in range(2)])


def test_a_resumed_run_and_workers_have_the_same_batches(latents):
    whole = list(loader_of(latents, 4))
    for rest in (loader_of(latents, 4, steps=(5, 12)), loader_of(latents, 4, steps=(5, 12), workers=2)):
        for batch, expected in zip(rest, whole[5:], strict=True):
            assert batch.keys() == expected.keys()
            assert all(torch.equal(torch.as_tensor(batch[name]), torch.as_tensor(expected[name])) for name in batch)


def test_a_model_trains_on_buckets_and_gives_images_of_their_sizes(latents):
    model = DoDJointModel(tiny_transformer(num_classes=3), tiny_latent_embedder()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = {}
    for batch in loader_of(latents, 8, steps=(0, 80)):
        loss = model(**batch).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.setdefault(tuple(batch["latents"].shape[2:]), []).append(loss.item())
    assert set(losses) == {(6, 10), (8, 8), (10, 6)}
    for values in losses.values():
        assert np.isfinite(values).all()
        assert np.mean(values[-4:]) < 0.85 * np.mean(values[:4])
    model.eval()
    pipe = tiny_pipeline(transformer=model.transformer, latent_embedder=model.latent_embedder, id2label=None)
    for height, width in SIZES:
        assert pipe(0, height=height, width=width, seed=0).images[0].size == (width, height)
