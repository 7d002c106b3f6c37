import math

import numpy as np
import pytest
from helpers import says

from diffusers_dod.data import scenes
from diffusers_dod.data.labelled_images import ImageOptions, load_labelled_images
from diffusers_dod.data.scenes import NUM_ATTRIBUTES, SCENE_CLASSES, SceneDataset, render_scene
from diffusers_dod.evaluation.images import open_images


LABELS = range(len(SCENE_CLASSES))
LUMA = np.array([0.299, 0.587, 0.114])
each_class = pytest.mark.parametrize("label", LABELS, ids=SCENE_CLASSES)


@each_class
@pytest.mark.parametrize("size", [8, 64])
def test_shapes_types_and_ranges(label, size):
    image, attributes = render_scene(label, 3, size)
    assert image.shape == (size, size, 3) and image.dtype == np.uint8
    assert attributes.shape == (NUM_ATTRIBUTES,) == (26,) and attributes.dtype == np.float32
    assert attributes[:12].min() >= 0 and attributes[:12].max() <= 1
    for kinds in (attributes[12:18], attributes[18:22]):
        assert sorted(kinds) == [0] * (len(kinds) - 1) + [1]
    assert 0.26 <= attributes[24] <= 0.58 and math.log2(0.85) <= attributes[25] <= math.log2(1.15)


def test_a_plain_solid_has_one_colour():
    of_seeds = [render_scene(0, seed, 8)[1] for seed in range(40)]
    same = [np.array_equal(attributes[:3], attributes[3:6]) for attributes in of_seeds]
    assert same == [attributes[12] == 1 for attributes in of_seeds]
    assert 0 < sum(same) < len(same)


@each_class
def test_an_image_is_a_function_of_label_and_seed(label):
    first = render_scene(label, 5, 16)
    np.random.seed(0)
    again, other = render_scene(label, (5,), 16), render_scene(label, 6, 16)
    assert first[0].tobytes() == again[0].tobytes() and first[1].tobytes() == again[1].tobytes()
    assert first[0].tobytes() != other[0].tobytes()


@each_class
def test_scene_does_not_depend_on_size(label):
    (small, attributes), (large, same) = render_scene(label, 11, 32), render_scene(label, 11, 64)
    np.testing.assert_array_equal(attributes, same)
    reduced = large.reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(small - reduced).mean() < 0.02 * 255


def _solid_of(label: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The image (32, 32, 3) of a plain solid in 0..1, its attributes, and where its hue is nearer than the floor's."""

    def to_hue(colors: np.ndarray) -> np.ndarray:
        return colors / np.maximum(colors.sum(-1, keepdims=True), 1e-3)

    for candidate in range(seed, 10_000, 100):
        attributes = render_scene(label, candidate, 8)[1]
        solid, *floor = to_hue(attributes[[0, 1, 2, *range(6, 12)]].reshape(3, 3))
        is_light = attributes[:3].max() > 0.5  # what the floor casts on a dark one changes its hue
        if attributes[12] == 1 and is_light and min(np.abs(solid - color).sum() for color in floor) > 0.3:
            break
    image = render_scene(label, candidate, 32)[0] / 255
    distances = [np.abs(to_hue(image) - color).sum(-1) for color in (solid, *floor)]
    return image, attributes, distances[0] < np.minimum(*distances[1:])


@each_class
def test_a_solid_stands_in_the_middle(label):
    places, shares = [], []
    for seed in range(3):
        _, _, is_solid = _solid_of(label, seed)
        places.append(np.argwhere(is_solid).mean(0))
        shares.append(is_solid.mean())
    assert 0.06 < np.mean(shares) < 0.5 and np.abs(np.mean(places, 0) - 15.5).max() < 6


@each_class
def test_a_ball_holds_the_solid(label):
    """Rays outside of it are not followed."""
    rng = np.random.default_rng(0)
    points = (scenes._MIDDLE + scenes._RADIUS * scenes._unit(rng.standard_normal((2000, 3)))).astype(np.float32)
    points = points[points[:, 1] > 0]
    for seed in range(20):
        assert scenes._SOLIDS[SCENE_CLASSES[label]](np.random.default_rng(seed))(points).min() > 0


def test_light_comes_from_where_the_attributes_say():
    label, sides = SCENE_CLASSES.index("sphere"), []
    for seed in range(12):
        image, attributes, is_solid = _solid_of(label, seed)
        if abs(attributes[22]) > 0.3:
            luma = np.where(is_solid, image @ LUMA, np.nan)
            middle = int(np.argwhere(is_solid)[:, 1].mean())
            sides.append(
                np.sign(np.nanmean(luma[:, middle:]) - np.nanmean(luma[:, :middle])) == np.sign(attributes[22])
            )
    assert len(sides) >= 5 and all(sides)


def test_a_larger_solid_covers_more():
    label = SCENE_CLASSES.index("sphere")
    sizes, shares = zip(
        *((found[1][25], found[2].mean()) for found in (_solid_of(label, s) for s in range(12))), strict=True
    )
    assert np.corrcoef(sizes, shares)[0, 1] > 0.6


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ((8, 0), ValueError, ["`label`", "0..7", "8"]),
        ((1.0, 0), TypeError, ["`label`", "1.0"]),
        ((0, -1), ValueError, ["`seed`", "-1"]),
        ((0, []), ValueError, ["`seed`", "[]"]),
        ((0, 0, 60), ValueError, ["`size`", "multiple of 8", "60"]),
    ],
)
def test_bad_arguments_are_named(arguments, error, words):
    with pytest.raises(error, match=says(*words)):
        render_scene(*arguments)


def test_data_set_and_its_names_in_commands():
    dataset = SceneDataset(20, seed=5)
    sample = dataset[13]
    assert sample["label"] == 5 and sample["image"].shape == (64, 64, 3)
    np.testing.assert_array_equal(sample["image"], render_scene(5, (5, 13))[0])
    assert dataset.labels.tolist() == [i % 8 for i in range(20)]
    images = load_labelled_images(ImageOptions(dataset_name="scenes", resolution=16), 20, 5)
    assert images.class_names == SCENE_CLASSES
    source = open_images("scenes:20:5")
    assert source.resolution == (64, 64)
    with pytest.raises(ValueError, match=says("scenes:<number>:<seed>", "'scenes:20'")):
        open_images("scenes:20")
