"""What the demo draws: the images of the pipeline, at the cost that was told, and it stops when it is told to."""

import io
import struct
import threading
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import noise_image, says, tiny_pipeline
from launch import PATIENCE_S
from PIL import Image

from diffusers_dod.demo.settings import default_settings
from diffusers_dod.evaluation.gallery import Limits, Result, Sampler, Stopped, draw_again, open_photo, stream
from diffusers_dod.image_reading import cover_and_crop
from diffusers_dod.image_settings import read_image_settings


CHECKPOINT = {"path": "tiny", "sha256": "0" * 64}


@pytest.fixture(scope="module")
def sampler():
    return Sampler(tiny_pipeline(), Limits(max_batch_size=3), CHECKPOINT)


@pytest.fixture
def evaluations(sampler):
    """Number of rows of each forward pass of the transformer from now on."""
    rows = []
    hook = sampler.pipe.transformer.register_forward_hook(lambda module, inputs, output: rows.append(len(output[0])))
    yield rows
    hook.remove()


def settings_of(sampler, **values):
    return default_settings(sampler.pipe, sampler.limits, **values)


def photo(side=16, seed=0):
    return noise_image(side, side, seed)


def pixels(rows):
    return np.stack([np.stack([np.asarray(drawn.image, dtype=int) for drawn in row]) for row in rows])


def assert_same_images(actual, expected):
    """The same but for rounding, which differs with the size of the batch."""
    assert np.abs(np.asarray(actual, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1


CASES = [
    {},
    {"num_stages": 1, "scales": (3.0,)},
    {"num_stages": 3, "scales": (2.0, 1.0, 3.0), "solver": "heun"},
    {"mode": "variations", "num_images": 4},
    {"mode": "between", "classes": (1, 2, 3), "num_between": 5},
    {"mode": "between", "photos": [1], "num_between": 2},
    {"mode": "grid", "grid_scales": (1.0, 2.0)},
    {"mode": "grid", "grid_scales": (1.0, 2.0), "first_scales": (1.0, 3.0), "num_images": 1},
    {"mode": "grid", "num_stages": 1, "scales": (1.0,), "grid_scales": (1.0, 4.0)},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_request_costs_what_is_told_before(sampler, evaluations, case):
    case = dict(case)
    photos = {end: photo(seed=end) for end in case.pop("photos", [0] if case.get("mode") == "variations" else [])}
    settings, reports = settings_of(sampler, **case), []
    cost = sampler.cost(settings, photos)
    result = sampler.sample(settings, photos, lambda *report: reports.append(report))
    assert sum(evaluations) == cost.num_evaluations
    assert [done for done, _, _ in reports] == list(range(1, cost.num_steps + 1))
    assert {total for _, total, _ in reports} == {cost.num_steps}
    first = 2 if settings.mode == "variations" else 1
    assert sorted({stage for _, _, stage in reports}) == list(range(first, settings.num_stages + 1))
    assert all(len(row) == len(result.column_names) for row in result.rows)
    assert len(result.rows) == len(result.row_names)


def test_flops_are_those_of_the_cost_functions(sampler):
    from diffusers_dod.compute import sampling_compute

    settings = settings_of(sampler, steps=3)
    expected = 4 * sampling_compute(sampler.pipe, [3, 3], [1.0, 2.0])["flops"]
    assert sampler.cost(settings).flops == expected


def test_classes_are_drawn_as_by_one_call_for_each(sampler):
    result = sampler.sample(settings_of(sampler, classes=(7, 1), seed=5))
    output = sampler.pipe([7, 7, 1, 1], sample_indices=[0, 1, 0, 1], seed=5, return_stages=True)
    assert_same_images(pixels(result.rows), np.stack([np.stack(list(map(np.asarray, s))) for s in output.stages], 1))
    assert result.row_names == ["junco 1", "junco 2", "goldfish 1", "goldfish 2"]
    assert result.column_names == ["stage 1", "stage 2"]


def test_the_size_of_a_batch_changes_no_image(sampler):
    settings = settings_of(sampler, num_images=5)
    alone = Sampler(sampler.pipe, Limits(max_batch_size=1), CHECKPOINT)
    assert_same_images(pixels(sampler.sample(settings).rows), pixels(alone.sample(settings).rows))


def test_the_ends_in_between_are_the_images_of_both_classes(sampler):
    settings = settings_of(sampler, classes=(2, 4), num_images=1)
    ends = pixels(sampler.sample(settings).rows)[:, -1]
    between = pixels(sampler.sample(replace(settings, mode="between", num_between=3)).rows)[0]
    assert_same_images(between[[0, -1]], ends)
    assert np.abs(between[1] - between[0]).max() > 1


def test_photos_take_the_place_of_ends(sampler):
    settings = settings_of(sampler, mode="between", classes=(2, 4), num_between=2)
    plain = pixels(sampler.sample(settings).rows)[0]
    with_photo = pixels(sampler.sample(settings, {1: photo()}).rows)[0]
    assert_same_images(with_photo[0], plain[0])
    assert np.abs(with_photo[1] - plain[1]).max() > 1


def test_a_column_of_the_grid_is_that_guidance_scale(sampler):
    settings = settings_of(sampler, num_images=1)
    grid = sampler.sample(replace(settings, mode="grid", grid_scales=(1.0, 2.0, 6.0), first_scales=(1.0, 3.0)))
    assert grid.column_names == ["scale 1", "scale 2", "scale 6"]
    assert grid.row_names[1] == "ostrich at 3"
    expected = pixels(sampler.sample(replace(settings, scales=(3.0, 6.0))).rows)[:, -1]
    assert_same_images(pixels(grid.rows)[[1, 3], 2], expected)


def test_variations_are_guided_by_the_photo(sampler):
    result = sampler.sample(settings_of(sampler, mode="variations", classes=(3,), num_images=2), {0: photo()})
    assert result.rows[0][0].options is None
    assert_same_images(result.rows[0][0].image, photo())
    expected = sampler.pipe([3, 3], image=photo(), num_stages=2, seed=0).images
    assert_same_images(pixels(result.rows)[0, 1:], np.stack(list(map(np.asarray, expected))))


def test_variations_need_a_photo(sampler):
    with pytest.raises(ValueError, match="need a photo"):
        sampler.sample(settings_of(sampler, mode="variations"))


def test_sizes_are_multiples_of_a_patch(sampler):
    with pytest.raises(ValueError, match=says("`size`", "multiple of 4", "18")):
        sampler.check(settings_of(sampler, size=18))
    image = sampler.sample(settings_of(sampler, size=24, num_images=1)).rows[0][-1].image
    assert image.size == (24, 24)


def test_each_file_holds_its_settings(sampler, tmp_path):
    settings = settings_of(sampler, mode="between", seed=9, num_between=3)
    drawn = sampler.sample(settings).rows[0][1]
    sampler.save(drawn, tmp_path / "image.png")
    read = read_image_settings(tmp_path / "image.png")
    assert (read["task"], read["checkpoint"]) == ("demo", CHECKPOINT)
    expected = {"seed": 9, "weight": 0.5, "stage": 2, "class_label": 5, "class_name": "crane", "mode": "between"}
    assert read["options"].items() >= expected.items()
    assert read["options"]["stage_guidance_scales"] == [1.0, 2.0]


@pytest.mark.parametrize("case", [case for case in CASES if case.get("mode") != "variations"], ids=str)
def test_a_file_is_enough_to_draw_an_image_again(sampler, tmp_path, case):
    case = dict(case)
    photos = {end: photo(seed=end) for end in case.pop("photos", [])}
    for row in sampler.sample(settings_of(sampler, **case, steps=2), photos).rows:
        sampler.save(row[-1], tmp_path / "image.png")
        options = read_image_settings(tmp_path / "image.png")["options"]
        if photos:
            with pytest.raises(ValueError, match=says("`like`", "classes alone", "a photo")):
                draw_again(sampler.pipe, options)
        else:
            assert np.array_equal(draw_again(sampler.pipe, options), row[-1].image)
    with pytest.raises(ValueError, match=says("`batch_size`", ">= 1", "got 0")):
        draw_again(sampler.pipe, options | {"batch_size": 0})


# ------------------------------------------------------------------------------------------------------------- stop


def test_sampling_stops_after_the_step_that_asks_for_it(sampler, evaluations):
    def report(done, total, stage):
        if done == 3:
            raise Stopped

    settings = settings_of(sampler, steps=50, num_images=1)
    with pytest.raises(Stopped):
        sampler.sample(settings, report=report)
    assert len(evaluations) == 3
    again = sampler.sample(replace(settings, steps=2))  # for the next visitor
    assert_same_images(pixels(again.rows), pixels(sampler.sample(replace(settings, steps=2)).rows))


def test_a_closed_stream_ends_the_sampling():
    has_ended, is_endless = threading.Event(), True

    def sample(report):
        try:
            while is_endless:
                report(1, 2, 1)
        finally:
            has_ended.set()

    events = stream(sample)
    assert next(events) == (1, 2, 1)
    events.close()
    assert has_ended.wait(PATIENCE_S)


def test_a_stream_ends_with_the_result_or_the_error(sampler):
    settings = settings_of(sampler)
    *reports, result = stream(lambda report: sampler.sample(settings, report=report))
    assert len(reports) == sampler.cost(settings).num_steps and isinstance(result, Result)
    with pytest.raises(ValueError, match="need a photo"):
        list(stream(lambda report: sampler.sample(replace(settings, mode="variations"), report=report)))


# ------------------------------------------------------------------------------------------------------------ photos


def test_a_photo_is_cropped_as_the_pipeline_does(sampler, tmp_path):
    path = tmp_path / "photo.jpg"
    upright = noise_image(60, 90)
    exif = Image.Exif()
    exif[274] = 6  # orientation: turned by 90 degrees
    upright.save(path, exif=exif)
    crop = open_photo(path, Limits(), 16, 16)
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(crop), cover_and_crop(image, 16, 16))
    tokens = [sampler.pipe.get_prior_tokens(image=given) for given in (crop, str(path))]
    torch.testing.assert_close(*tokens, rtol=0, atol=0)


def huge_png() -> bytes:
    """A small file that claims 100,000 x 100,000 pixels."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    "content, fragments",
    [
        (b"", ["damaged, or no image"]),
        (b"once upon a time", ["damaged, or no image", "PNG, JPEG"]),
        (encoded(noise_image(40, 40), "PNG")[:700], ["damaged, or no image"]),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", ["damaged, or no image"]),
        (encoded(noise_image(8, 8), "TIFF"), ["damaged, or no image"]),
        (huge_png(), ["cannot be read"]),
        (encoded(Image.new("L", (4000, 2000)), "PNG"), ["4000 x 2000", "1 million"]),
        (encoded(Image.new("L", (1000, 2)), "PNG"), ["1000 x 2", "aspect ratio"]),
    ],
    ids=["empty", "text", "cut", "svg", "tiff", "bomb", "large", "long"],
)
def test_what_is_no_photo_is_refused(tmp_path, content, fragments):
    (tmp_path / "photo.png").write_bytes(content)
    with pytest.raises(ValueError, match=says("The photo cannot be read", *fragments)) as raised:
        open_photo(tmp_path / "photo.png", Limits(max_megapixels=1), 16, 16)
    assert str(tmp_path) not in str(raised.value)
