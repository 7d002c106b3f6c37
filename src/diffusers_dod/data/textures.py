# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Procedural textures: an unlimited, class-conditional set of small images that needs no download.

Every image is a pure function of a label and a seed. A class function draws a *pattern*: the place of the two colours,
and the light on them. Palette, lighting, grain and anti-aliasing are the same for all classes. They are applied
afterwards in one place.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ._procedural import (
    SUPERSAMPLING,
    ProceduralDataset,
    average_samples,
    check_label,
    check_seeds,
    check_size,
    draw_palette,
    draw_timber,
    make_generator,
    to_bytes,
)


class _Pattern(NamedTuple):
    """
    Pattern of a texture, by pixel, and its main feature.

    `mix` blends from the first colour (0) to the second (1). `light` shades the blend: -1 is black, 0 leaves it as it
    is and +1 is white. `scale` is the length of the main feature in canvas units, and `angle` its orientation in
    radians, `None` for a class without one.
    """

    mix: np.ndarray
    scale: float
    angle: float | None = None
    light: np.ndarray | float = 0.0


NUM_ATTRIBUTES = 9

# Patterns are laid out on a canvas of this many units, whatever the size of the image in pixels. All lengths below are
# in these units, so a larger image shows the same scene with finer detail.
_EXTENT = 32.0
_GRAIN_STD = 0.016


# Building blocks


def _rotate(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates along and across the direction `angle`."""
    cos, sin = math.cos(angle), math.sin(angle)
    return cos * x + sin * y, cos * y - sin * x


def _coverage(distance: np.ndarray, px: float) -> np.ndarray:
    """Anti-aliased inside of a shape from the signed distance to its outline, positive inside."""
    return np.clip(distance / px + 0.5, 0.0, 1.0)


def _band(phase: np.ndarray, duty: float = 0.5) -> np.ndarray:
    """Signed distance, in periods, to the edge of bands that fill the fraction `duty` of each unit of `phase`."""
    return 0.5 * duty - np.abs(phase - np.floor(phase) - 0.5)


def _value_noise(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Smooth noise in -1..1 with features about one unit of `u` and `v` wide."""
    lattice = rng.uniform(-1.0, 1.0, (16, 16)).astype(np.float32)
    row, column = np.floor(v), np.floor(u)
    fv, fu = v - row, u - column
    fv, fu = fv * fv * (3.0 - 2.0 * fv), fu * fu * (3.0 - 2.0 * fu)
    top, left = row.astype(np.int32) & 15, column.astype(np.int32) & 15
    bottom, right = (top + 1) & 15, (left + 1) & 15
    upper = lattice[top, left] * (1.0 - fu) + lattice[top, right] * fu
    lower = lattice[bottom, left] * (1.0 - fu) + lattice[bottom, right] * fu
    return upper * (1.0 - fv) + lower * fv


# The classes: each takes the generator, the coordinates of the samples (origin in the middle, y pointing down) and the
# distance between neighbouring samples


def _stripes(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, px: float) -> _Pattern:
    period, angle = rng.uniform(5.0, 11.0), rng.uniform(0.0, math.pi)
    across = _rotate(x, y, angle)[1]
    distance = period * _band(across / period + rng.uniform(), rng.uniform(0.38, 0.62))
    return _Pattern(_coverage(distance, px), period, angle)


def _checks(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, px: float) -> _Pattern:
    cell, angle = rng.uniform(4.0, 9.0), rng.uniform(-math.pi / 4, math.pi / 4)
    u, v = _rotate(x, y, angle)
    columns = _coverage(2.0 * cell * _band(0.5 * u / cell + rng.uniform()), px)
    rows = _coverage(2.0 * cell * _band(0.5 * v / cell + rng.uniform()), px)
    return _Pattern(columns * rows + (1.0 - columns) * (1.0 - rows), cell, angle)


def _dots(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, px: float) -> _Pattern:
    spacing, angle = rng.uniform(7.0, 12.0), rng.uniform(0.0, math.pi / 3)
    u, v = _rotate(x, y, angle)
    # A hexagonal lattice is two rectangular ones, the second moved by half a cell in both directions.
    u, v = u / spacing + rng.uniform(), v / (spacing * math.sqrt(3.0)) + rng.uniform()
    nearest = [
        np.hypot(u + shift - np.rint(u + shift), math.sqrt(3.0) * (v + shift - np.rint(v + shift)))
        for shift in (0.0, 0.5)
    ]
    distance = spacing * (rng.uniform(0.25, 0.36) - np.minimum(*nearest))
    return _Pattern(_coverage(distance, px), spacing, angle)


def _rings(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, px: float) -> _Pattern:
    period = rng.uniform(5.0, 9.0)
    radius = np.hypot(x - rng.uniform(-7.0, 7.0), y - rng.uniform(-7.0, 7.0))
    distance = period * _band(radius / period + rng.choice([0.0, 0.5]), rng.uniform(0.42, 0.58))
    return _Pattern(_coverage(distance, px), period)


def _voronoi(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, px: float) -> _Pattern:
    cell = rng.uniform(8.0, 13.0)
    # One jittered point per square of a grid that reaches past the border, so that cells have similar sizes.
    ticks = cell * np.arange(-math.ceil(16.0 / cell) - 1, math.ceil(16.0 / cell) + 1)
    points = np.stack(np.meshgrid(ticks, ticks), -1).reshape(-1, 2) + cell * rng.uniform(0.0, 0.85, (ticks.size**2, 2))
    points = points.astype(np.float32)
    squared = (x[0] - points[:, :1])[:, None, :] ** 2 + (y[:, 0] - points[:, 1:])[:, :, None] ** 2
    first = squared.argmin(0)
    nearest = squared.min(0)
    np.put_along_axis(squared, first[None], np.inf, 0)
    second = squared.argmin(0)
    border = 0.5 * (squared.min(0) - nearest) / np.linalg.norm(points[second] - points[first], axis=-1)
    # Evenly spread shades in random order: no two images are alike, yet cells never all have one shade.
    shades = rng.permutation(np.linspace(0.0, 1.0, len(points), dtype=np.float32))
    edge = _coverage(rng.uniform(0.6, 0.9) - border, px)
    return _Pattern(shades[first], cell, light=rng.choice([-0.75, 0.8]) * edge)


def _marble(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, px: float) -> _Pattern:
    period, angle = rng.uniform(11.0, 17.0), rng.uniform(0.0, math.pi)
    along, across = _rotate(x, y, angle)
    # Turbulence stretched across the veins bends them without tearing them into closed loops.
    warp = sum(_value_noise(rng, along * f / 11.0, across * f / 18.0) / f**1.2 for f in (1.0, 2.0, 4.0))
    vein = 1.0 - np.abs(np.sin(math.pi * (across / period + rng.uniform() + rng.uniform(0.45, 0.7) * warp)))
    # Veins fade in and out along their way and lie in a faint cloud of their own colour.
    cloud = 0.5 + 0.5 * _value_noise(rng, x / 8.0, y / 8.0)
    return _Pattern(np.clip(vein ** (1.0 + 1.6 * cloud) + 0.25 * (1.0 - cloud), 0.0, 1.0), period, angle)


def _wood(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, px: float) -> _Pattern:
    period, angle = rng.uniform(4.5, 7.5), rng.uniform(0.0, math.pi)
    along, across = _rotate(x, y, angle)
    # A saw cut at a slant through the trunk turns its growth rings into long ellipses.
    along, across = along - rng.uniform(-12.0, 12.0), across - rng.uniform(-12.0, 12.0)
    radius = np.hypot(rng.uniform(0.14, 0.3) * along, across) + 2.2 * _value_noise(rng, along / 14.0, across / 7.0)
    phase = radius / period + rng.uniform()
    ring = phase - np.floor(phase)
    # A ring darkens slowly over the summer and ends abruptly in winter.
    late = ring**1.5 * np.clip((1.0 - ring) / (1.5 * px / period), 0.0, 1.0)
    fibre = _value_noise(rng, along / 9.0, across / 1.3)
    return _Pattern(np.clip(late + 0.1 * fibre, 0.0, 1.0), period, angle)


def _bricks(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, px: float) -> _Pattern:
    height, angle = rng.uniform(5.0, 8.0), rng.uniform(-0.25, 0.25)
    width, mortar = height * rng.uniform(1.8, 2.3), rng.uniform(0.55, 0.8)
    u, v = _rotate(x, y, angle)
    v = v / height + rng.uniform()
    row = np.floor(v)
    u = u / width + rng.uniform() + 0.5 * (row % 2.0)
    column = np.floor(u)
    inset = np.minimum(height * (0.5 - np.abs(v - row - 0.5)), width * (0.5 - np.abs(u - column - 0.5)))
    brick = _coverage(inset - mortar, px)
    shades = rng.uniform(-0.28, 0.16, (16, 16)).astype(np.float32)
    return _Pattern(brick, height, angle, brick * shades[row.astype(int) & 15, column.astype(int) & 15])


def _sphere(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, px: float) -> _Pattern:
    radius, angle = rng.uniform(7.0, 11.0), rng.uniform(0.15, 0.85) * math.pi
    slope = rng.uniform(0.0, 0.25)
    dx, dy = (x - rng.uniform(-3.5, 3.5)) / radius, (y - rng.uniform(-3.5, 2.0)) / radius
    # The lamp hangs above the ball and half way to the eye; `angle` turns it from the right over the top to the left.
    lamp_x, lamp_y, lamp_z = 0.75 * math.cos(angle), -0.75 * math.sin(angle), 0.66
    height = np.sqrt(np.clip(1.0 - dx * dx - dy * dy, 0.0, 1.0))
    lambert = np.clip(dx * lamp_x + dy * lamp_y + height * lamp_z, 0.0, 1.0)
    gloss = np.clip(2.0 * lambert * height - lamp_z, 0.0, 1.0) ** 14
    ball = _coverage(radius * (1.0 - np.hypot(dx, dy)), px)
    shadow = np.exp(-1.6 * (((dx + 0.7 * lamp_x) / 1.1) ** 2 + ((dy - 0.85) / 0.6) ** 2))
    ground = slope * y / 16.0 - 0.65 * shadow
    return _Pattern(ball, 2.0 * radius, angle, ball * (0.75 * lambert - 0.7 + gloss) + (1.0 - ball) * ground)


def _plaid(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, px: float) -> _Pattern:
    period, angle = rng.uniform(9.0, 14.0), rng.uniform(-0.3, 0.3)
    wide, thin = rng.uniform(0.4, 0.5), 1.4 / period
    bands, lines = [], []
    for coordinate in _rotate(x, y, angle):
        phase = coordinate / period + rng.uniform()
        bands.append(_coverage(period * _band(phase, wide), px))
        # The thin line runs in the middle of the gap between two wide bands, as in a tartan.
        lines.append(_coverage(period * _band(phase + 0.5, thin), px))
    return _Pattern(0.5 * (bands[0] + bands[1]), period, angle, rng.choice([-0.35, 0.45]) * np.maximum(*lines))


def _spiral(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, px: float) -> _Pattern:
    arms, period = int(rng.integers(2, 5)), rng.uniform(7.0, 11.0)
    angle = rng.uniform(0.0, 2.0 * math.pi / arms)
    turn = float(rng.choice([-1.0, 1.0]))
    dx, dy = x - rng.uniform(-4.0, 4.0), turn * (y - rng.uniform(-4.0, 4.0))
    radius = np.hypot(dx, dy)
    phase = arms * (np.arctan2(dy, dx) - angle) / (2.0 * math.pi) + radius / period
    # The arms pinch together at the centre; dividing by the gradient turns the phase into a distance everywhere.
    gradient = np.hypot(1.0 / period, arms / (2.0 * math.pi * np.maximum(radius, px)))
    return _Pattern(_coverage(_band(phase, rng.uniform(0.42, 0.58)) / gradient, px), period, turn * angle)


def _polygon(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, px: float) -> _Pattern:
    sides = int(rng.integers(3, 7))
    # A triangle fills little of its circumscribed circle, so figures with fewer sides get a larger one.
    radius = rng.uniform(9.0, 12.0) * (1.0 + 1.0 / sides)
    angle = rng.uniform(0.0, 2.0 * math.pi / sides)
    dx, dy = x - rng.uniform(-2.5, 2.5), y - rng.uniform(-2.5, 2.5)
    # All sides are copies of one: fold the plane into a single sector and measure the distance to that side.
    sector = 2.0 * math.pi / sides
    folded = (np.arctan2(dy, dx) - angle) % sector - 0.5 * sector
    inside = radius * math.cos(0.5 * sector) - np.hypot(dx, dy) * np.cos(folded)
    fill = _coverage(inside, px)
    outline = fill * _coverage(1.5 - inside, px)
    return _Pattern(fill, 2.0 * radius, angle, rng.choice([-0.8, 0.85]) * outline)


_CLASSES: dict[str, Callable[[np.random.Generator, np.ndarray, np.ndarray, float], _Pattern]] = {
    "stripes": _stripes,
    "checks": _checks,
    "dots": _dots,
    "rings": _rings,
    "voronoi": _voronoi,
    "marble": _marble,
    "wood": _wood,
    "bricks": _bricks,
    "sphere": _sphere,
    "plaid": _plaid,
    "spiral": _spiral,
    "polygon": _polygon,
}

TEXTURE_CLASSES: tuple[str, ...] = tuple(_CLASSES)


# Public API


def render_texture(label: int, seed: int | Sequence[int], size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """
    Renders one textured image.

    The image depends on nothing but the arguments. The scene is independent of `size`: two sizes show the same scene
    (up to the grain) in different resolution.

    Args:
        label (`int`):
            Class of the image, a position in `TEXTURE_CLASSES` (0..11).
        seed (`int` or `Sequence[int]`):
            Seed of the image: an integer in 0..2**64-1 or a non-empty sequence of them. Neighbouring seeds give
            independent images. `seed` and `(seed,)` mean the same image.
        size (`int`, defaults to 32):
            Height and width in pixels, a positive multiple of 8.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: The image, `uint8` RGB of shape `(size, size, 3)`, and its attributes,
        `float32` of shape `(9,)`. They describe the image:

        - 0..2: first colour (RGB in 0..1), of the ground, the mortar or the gaps,
        - 3..5: second colour (RGB in 0..1), of the figure,
        - 6: log2 of the length of the main feature (period, cell or diameter) divided by the width of the image,
        - 7..8: cos(2 * angle) and sin(2 * angle) of the orientation, both 0 for a class without one.

        The angle runs clockwise from the x axis and is given modulo the rotational symmetry of the figure. For a
        sphere it is the direction towards the light, counterclockwise in 0..pi.

    Raises:
        `ValueError`: an argument is outside its range.
        `TypeError`: an argument is not an integer (or, for `seed`, a sequence of integers).

    Examples:
        ```py
        >>> image, attributes = render_texture(TEXTURE_CLASSES.index("marble"), seed=7)
        >>> image.shape, attributes.shape
        ((32, 32, 3), (9,))
        ```
    """
    label, seeds, size = check_label(label, len(TEXTURE_CLASSES)), check_seeds(seed), check_size(size)
    rng = make_generator(label, seeds)
    samples = SUPERSAMPLING * size
    px = _EXTENT / samples
    axis = ((np.arange(samples) + 0.5) * px - 0.5 * _EXTENT).astype(np.float32)
    x, y = np.meshgrid(axis, axis)

    name = TEXTURE_CLASSES[label]
    # Wood in any colour reads as warped stripes; in brown it reads as wood.
    colors = draw_timber(rng) if name == "wood" else draw_palette(rng)
    sun, strength = rng.uniform(0.0, 2.0 * math.pi), rng.uniform(0.0, 0.16)
    pattern = _CLASSES[name](rng, x, y, px)

    canvas = colors[0] + pattern.mix[..., None] * (colors[1] - colors[0])
    light = np.broadcast_to(np.asarray(pattern.light, dtype=np.float32), x.shape)[..., None]
    canvas = canvas * (1.0 - np.clip(-light, 0.0, 1.0)) + (1.0 - canvas) * np.clip(light, 0.0, 1.0)
    canvas = canvas * (1.0 + strength * _rotate(x, y, sun)[0] / (0.5 * _EXTENT))[..., None]
    image = average_samples(canvas, size)
    # The grain is grey: coloured noise would be three times as hard to imitate for a generator, and look worse.
    image = image + _GRAIN_STD * rng.standard_normal((size, size, 1), dtype=np.float32)

    pose = (0.0, 0.0) if pattern.angle is None else (math.cos(2.0 * pattern.angle), math.sin(2.0 * pattern.angle))
    attributes = np.array([*colors.ravel(), math.log2(pattern.scale / _EXTENT), *pose], dtype=np.float32)
    return to_bytes(image), attributes


class TextureDataset(ProceduralDataset):
    """
    Map-style dataset of procedural textures with balanced classes.

    Nothing is stored. An image is rendered on access and depends only on `seed` and its index, in every process and in
    any order. Its label is its index modulo 12.

    Args:
        num_samples (`int`):
            Number of images, at least 1.
        size (`int`, defaults to 32):
            Height and width in pixels, a positive multiple of 8.
        seed (`int`, defaults to 0):
            Seed of the set, an integer in 0..2**64-1. Sets with different seeds are disjoint, so a second seed gives a
            held-out set.

    Raises:
        `ValueError`: an argument is outside its range.
        `TypeError`: an argument is not an integer.

    Examples:
        ```py
        >>> train, held_out = TextureDataset(60_000), TextureDataset(1_200, seed=1)
        >>> sample = train[4]
        >>> sample["image"].shape, TEXTURE_CLASSES[sample["label"]], sample["attributes"].shape
        ((32, 32, 3), 'voronoi', (9,))
        ```
    """

    class_names = TEXTURE_CLASSES
    default_size = 32

    def __init__(self, num_samples: int, size: int = default_size, seed: int = 0) -> None:
        super().__init__(num_samples, size, seed)

    render = staticmethod(render_texture)
