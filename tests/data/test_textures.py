import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from diffusers_dod.data.textures import NUM_ATTRIBUTES, TEXTURE_CLASSES, TextureDataset, render_texture


def test_class_names_and_order():
    assert TEXTURE_CLASSES == (
        *("stripes", "checks", "dots", "rings", "voronoi", "marble"),
        *("wood", "bricks", "sphere", "plaid", "spiral", "polygon"),
    )


LUMA = np.array([0.299, 0.587, 0.114])
LABELS = range(len(TEXTURE_CLASSES))
ORIENTED = {"stripes", "checks", "dots", "marble", "wood", "bricks", "sphere", "plaid", "spiral", "polygon"}

each_class = pytest.mark.parametrize("label", LABELS, ids=TEXTURE_CLASSES)


@each_class
@pytest.mark.parametrize("size", [8, 32, 64])
def test_shapes_and_types(label, size):
    image, attributes = render_texture(label, 3, size)
    assert image.shape == (size, size, 3) and image.dtype == np.uint8
    assert attributes.shape == (NUM_ATTRIBUTES,) == (9,) and attributes.dtype == np.float32


@each_class
def test_same_arguments_give_same_bytes_in_any_order(label):
    expected = [render_texture(label, seed) for seed in range(3)]
    np.random.seed(0)
    render_texture((label + 1) % len(TEXTURE_CLASSES), 99)
    for seed in (2, 0, 1):
        image, attributes = render_texture(label, seed)
        assert image.tobytes() == expected[seed][0].tobytes()
        assert attributes.tobytes() == expected[seed][1].tobytes()


@each_class
def test_different_seeds_give_different_scenes(label):
    attributes = np.stack([render_texture(label, seed)[1] for seed in range(8)])
    assert len(np.unique(attributes, axis=0)) == 8
    # Colours and scale vary within the class and not just by rounding.
    assert (attributes[:, :7].std(0) > 0.01).all()


def test_seeds_that_look_alike_are_different():
    seeds = [0, (0, 0), (0, 0, 0), 1, (1, 0), (0, 1), 2**32, (0, 2**32), (2**32, 0), 2**64 - 1]
    assert len({render_texture(0, seed)[0].tobytes() for seed in seeds}) == len(seeds)


def test_equivalent_seeds_are_equal():
    expected = render_texture(6, (5,))[0]
    for seed in (5, [5], np.int64(5), np.array(5), np.array([5]), range(5, 6)):
        np.testing.assert_array_equal(render_texture(np.int32(6), seed)[0], expected)


@each_class
def test_scene_does_not_depend_on_size(label):
    small, small_attributes = render_texture(label, 11, 32)
    large, large_attributes = render_texture(label, 11, 64)
    np.testing.assert_array_equal(small_attributes, large_attributes)
    reduced = large.reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(small - reduced).mean() < 0.03 * 255
    assert np.corrcoef(small.ravel(), reduced.ravel())[0, 1] > 0.95


@each_class
def test_every_image_has_contrast(label):
    images = np.stack([render_texture(label, seed)[0] for seed in range(24)]) / 255.0
    assert (images @ LUMA).std((1, 2)).min() > 0.05


@each_class
def test_attributes_are_in_range(label):
    attributes = np.stack([render_texture(label, seed)[1] for seed in range(24)])
    assert np.isfinite(attributes).all()
    colors = attributes[:, :6].reshape(-1, 2, 3)
    assert colors.min() >= 0.0 and colors.max() <= 1.0
    assert np.abs(colors[:, 0] @ LUMA - colors[:, 1] @ LUMA).min() >= 0.25
    # From a feature of about four pixels in an image of 32 up to one that fills the image.
    assert attributes[:, 6].min() >= -3.01 and attributes[:, 6].max() <= 0.01
    length = np.hypot(attributes[:, 7], attributes[:, 8])
    np.testing.assert_allclose(length, float(TEXTURE_CLASSES[label] in ORIENTED), atol=1e-6)


@each_class
def test_mean_color_follows_the_palette(label):
    rendered = [render_texture(label, seed) for seed in range(16)]
    means = np.stack([image.mean((0, 1)) / 255.0 for image, _ in rendered])
    first, second = np.stack([attributes[:6] for _, attributes in rendered]).reshape(-1, 2, 3).transpose(1, 0, 2)

    def distance_to_palette(first, second):
        span = second - first
        along = ((means - first) * span).sum(-1) / (span * span).sum(-1)
        return np.linalg.norm(means - first - np.clip(along, 0.0, 1.0)[:, None] * span, axis=-1).mean()

    own = distance_to_palette(first, second)
    assert own < 0.13
    # The palette of the next image explains the colours of this one much worse. Wood is always some brown.
    if TEXTURE_CLASSES[label] != "wood":
        assert own < 0.6 * distance_to_palette(np.roll(first, 1, 0), np.roll(second, 1, 0))


@each_class
def test_pixels_spread_along_the_palette(label):
    # Light, shadow and outlines are gentle enough for every image to spread along its own pair of colours.
    for seed in range(8):
        image, attributes = render_texture(label, seed)
        span = attributes[3:6] - attributes[:3]
        position = (image / 255.0 - attributes[:3]) @ span / (span @ span)
        assert np.quantile(position, 0.95) - np.quantile(position, 0.05) > 0.3


def test_second_color_is_that_of_the_figure():
    label = TEXTURE_CLASSES.index("polygon")
    for seed in range(24):
        image, attributes = render_texture(label, seed)
        for pixel, own, other in ((image[16, 16], 3, 0), (image[0, 0], 0, 3)):
            distances = [np.abs(pixel / 255.0 - attributes[start : start + 3]).sum() for start in (own, other)]
            assert distances[0] < distances[1]


def test_scale_and_angle_describe_the_stripes():
    frequencies = np.fft.fftfreq(32)
    for seed in range(24):
        image, attributes = render_texture(0, seed)
        luma = image @ LUMA
        power = np.abs(np.fft.fft2(luma - luma.mean())) ** 2
        row, column = np.unravel_index(power.argmax(), power.shape)
        measured = np.array([frequencies[column], frequencies[row]])
        angle = 0.5 * math.atan2(attributes[8], attributes[7])
        expected = np.array([-math.sin(angle), math.cos(angle)]) / (32.0 * 2.0 ** attributes[6])
        # The spectrum is resolved to 1/32 cycle per pixel, and its sign means nothing.
        assert min(np.abs(measured - expected).max(), np.abs(measured + expected).max()) < 1.0 / 32.0


def test_sphere_is_lit_from_its_angle():
    label = TEXTURE_CLASSES.index("sphere")
    sides = []
    for seed in range(40):
        image, attributes = render_texture(label, seed)
        angle = 0.5 * math.atan2(attributes[8], attributes[7]) % math.pi
        row, column = np.unravel_index((image @ LUMA).argmax(), (32, 32))
        first, second = attributes[:3] @ LUMA, attributes[3:6] @ LUMA
        if second > first and abs(math.cos(angle)) > 0.5:
            # A light ball on a dark ground: its gloss is the brightest spot.
            center = np.argwhere(np.abs(image / 255.0 - attributes[:3]).sum(-1) > 0.5)[:, 1].mean()
            sides.append(np.sign(column - center) == np.sign(math.cos(angle)))
    assert len(sides) >= 5 and np.mean(sides) > 0.85


def test_dataset_samples():
    dataset = TextureDataset(24, size=64, seed=5)
    assert len(dataset) == 24
    sample = dataset[13]
    assert set(sample) == {"image", "label", "attributes"}
    assert type(sample["label"]) is int and sample["label"] == 1
    image, attributes = render_texture(1, (5, 13), 64)
    np.testing.assert_array_equal(sample["image"], image)
    np.testing.assert_array_equal(sample["attributes"], attributes)


def test_dataset_is_independent_of_call_order_and_length():
    forward = [sample["image"].tobytes() for sample in TextureDataset(24)]
    longer = TextureDataset(100)
    assert [longer[index]["image"].tobytes() for index in reversed(range(24))] == forward[::-1]


def test_dataset_labels_are_balanced():
    labels = [sample["label"] for sample in TextureDataset(36, size=8)]
    assert labels == [*LABELS] * 3


def test_dataset_indexes_like_a_list():
    dataset = TextureDataset(14)
    np.testing.assert_array_equal(dataset[-1]["image"], dataset[13]["image"])
    np.testing.assert_array_equal(dataset[-14]["image"], dataset[0]["image"])
    np.testing.assert_array_equal(dataset[np.int64(3)]["image"], dataset[3]["image"])
    for index in (14, -15):
        with pytest.raises(IndexError, match=rf"`index` must be an integer in -14\.\.13, but is {index}\."):
            dataset[index]
    with pytest.raises(TypeError, match=r"`index` must be .*, but is 1\.0 of type `float`"):
        dataset[1.0]


def test_held_out_set_is_disjoint():
    train = {sample["image"].tobytes() for sample in TextureDataset(120, seed=0)}
    held_out = {sample["image"].tobytes() for sample in TextureDataset(120, seed=1)}
    assert len(train) == len(held_out) == 120
    assert not train & held_out


def test_dataset_works_with_a_data_loader():
    batch = next(iter(DataLoader(TextureDataset(12), batch_size=12)))
    assert batch["image"].shape == (12, 32, 32, 3) and batch["image"].dtype == torch.uint8
    assert batch["label"].tolist() == [*LABELS]
    assert batch["attributes"].shape == (12, 9) and batch["attributes"].dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label": 12}, r"`label` must be an integer in 0\.\.11, but is 12\."),
        ({"label": -1}, r"`label` must be an integer in 0\.\.11, but is -1\."),
        ({"size": 0}, r"`size` must be a positive multiple of 8, but is 0\."),
        ({"size": -8}, r"`size` must be a positive multiple of 8, but is -8\."),
        ({"size": 30}, r"`size` must be a positive multiple of 8, but is 30\."),
        ({"seed": -1}, r"`seed` must be an integer in 0\.\.2\*\*64-1 or a .* sequence of them, but is -1\."),
        ({"seed": (3, -4)}, r"`seed` must be an integer in 0\.\.2\*\*64-1 .*, but is -4\."),
        ({"seed": 2**64}, rf"`seed` must be an integer in 0\.\.2\*\*64-1 .*, but is {2**64}\."),
        ({"seed": ()}, r"`seed` must be .* a non-empty sequence of them, but is \(\)\."),
    ],
)
def test_render_rejects_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        render_texture(**({"label": 0, "seed": 0} | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label": "dots"}, r"`label` must be an integer in 0\.\.11, but is 'dots' of type `str`"),
        ({"label": True}, r"`label` must be an integer in 0\.\.11, but is True of type `bool`"),
        ({"size": 32.0}, r"`size` must be a positive multiple of 8, but is 32\.0 of type `float`"),
        ({"seed": 0.5}, r"`seed` must be an integer in 0\.\.2\*\*64-1 .*, but is 0\.5 of type `float`"),
        ({"seed": None}, r"`seed` must be an integer in 0\.\.2\*\*64-1 .*, but is None of type `NoneType`"),
        ({"seed": "12"}, r"`seed` must be an integer in 0\.\.2\*\*64-1 .*, but is '12' of type `str`"),
        ({"seed": (1, "2")}, r"`seed` must be an integer in 0\.\.2\*\*64-1 .*, but is '2' of type `str`"),
    ],
)
def test_render_rejects_types(arguments, message):
    with pytest.raises(TypeError, match=message):
        render_texture(**({"label": 0, "seed": 0} | arguments))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_samples": 0}, ValueError, r"`num_samples` must be an integer of at least 1, but is 0\."),
        (
            {"num_samples": 2.5},
            TypeError,
            r"`num_samples` must be an integer of at least 1, but is 2\.5 of type `float`",
        ),
        ({"size": 12}, ValueError, r"`size` must be a positive multiple of 8, but is 12\."),
        ({"seed": -2}, ValueError, r"`seed` must be an integer in 0\.\.2\*\*64-1, but is -2\."),
        ({"seed": (1, 2)}, TypeError, r"`seed` must be an integer in 0\.\.2\*\*64-1, but is \(1, 2\) of type `tuple`"),
    ],
)
def test_dataset_rejects(arguments, error, message):
    with pytest.raises(error, match=message):
        TextureDataset(**({"num_samples": 10} | arguments))
