# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Procedural scenes: a solid on a floor, each of a material, under one lamp. An unlimited set that needs no download.

Every image is a pure function of a label and a seed. The label says which solid stands there. It leaves materials,
colours, light, view and size unsaid.
"""

import math
from collections.abc import Callable, Sequence

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


# A solid is about 1.3 high, and stands on the floor y = 0 at the origin. x points to the right, y up, z to the viewer.
# All points are float32 of shape (n, 3).
_MIDDLE, _RADIUS = np.array([0.0, 0.65, 0.0], dtype=np.float32), 1.25  # of a ball that holds every solid
_EYE_DISTANCE = 5.0
_HALF_WIDTH = 0.235  # of the image, one unit away from the eye
_SUN_COLOR = np.array([1.0, 0.95, 0.88], dtype=np.float32)
_HIT = 0.004  # a ray this close to a solid has met it
_MARCH_STEPS, _SHADOW_STEPS = 40, 16

Distance = Callable[[np.ndarray], np.ndarray]


def _dot(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.einsum("...i,...i->...", first, second)


def _length(vectors: np.ndarray) -> np.ndarray:
    return np.sqrt(_dot(vectors, vectors))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(_length(vectors), 1e-6)[..., None]


# The solids: each draws its shape, and returns the signed distance (n,) of points to it, or less than that.


def _sphere(rng: np.random.Generator) -> Distance:
    radius = rng.uniform(0.62, 0.72)
    return lambda p: _length(p - np.float32([0.0, radius, 0.0])) - radius


def _cube(rng: np.random.Generator) -> Distance:
    half, rounding = rng.uniform(0.5, 0.58), 0.05

    def distance(p: np.ndarray) -> np.ndarray:
        outside = np.abs(p - np.float32([0.0, half, 0.0])) - np.float32(half - rounding)
        farthest = np.maximum(np.maximum(outside[:, 0], outside[:, 1]), outside[:, 2])
        return _length(np.maximum(outside, 0.0)) + np.minimum(farthest, 0.0) - rounding

    return distance


def _cylinder(rng: np.random.Generator) -> Distance:
    radius, half, rounding = rng.uniform(0.4, 0.5), rng.uniform(0.55, 0.68), 0.04

    def distance(p: np.ndarray) -> np.ndarray:
        side, top = np.hypot(p[:, 0], p[:, 2]) - radius + rounding, np.abs(p[:, 1] - half) - half + rounding
        outside = np.hypot(np.maximum(side, 0.0), np.maximum(top, 0.0))
        return outside + np.minimum(np.maximum(side, top), 0.0) - rounding

    return distance


def _slanted(rng: np.random.Generator, across: Callable[[np.ndarray], np.ndarray]) -> Distance:
    """A solid with a tip: `across` is how far its cross-sections reach, in units of their size."""
    radius, height = rng.uniform(0.6, 0.72), rng.uniform(1.15, 1.4)
    normal = np.float32([height, radius]) / math.hypot(height, radius)
    return lambda p: np.maximum(across(p) * normal[0] + (p[:, 1] - height) * normal[1], -p[:, 1])


def _cone(rng: np.random.Generator) -> Distance:
    return _slanted(rng, lambda p: np.hypot(p[:, 0], p[:, 2]))


def _pyramid(rng: np.random.Generator) -> Distance:
    return _slanted(rng, lambda p: np.maximum(np.abs(p[:, 0]), np.abs(p[:, 2])))


def _ring(rng: np.random.Generator) -> Distance:
    radius, tube = 0.5, rng.uniform(0.19, 0.25)  # it stands upright
    return lambda p: np.hypot(np.hypot(p[:, 0], p[:, 1] - radius - tube) - radius, p[:, 2]) - tube


def _capsule(rng: np.random.Generator) -> Distance:
    radius, half = rng.uniform(0.34, 0.42), rng.uniform(0.4, 0.5)  # it lies

    def distance(p: np.ndarray) -> np.ndarray:
        along = p[:, 0] - np.clip(p[:, 0], -half, half)
        return np.sqrt(along**2 + (p[:, 1] - radius) ** 2 + p[:, 2] ** 2) - radius

    return distance


def _vase(rng: np.random.Generator) -> Distance:
    height, phase = rng.uniform(1.2, 1.4), rng.uniform(-0.3, 0.3)

    def distance(p: np.ndarray) -> np.ndarray:
        profile = 0.38 + 0.16 * np.sin(2.0 * math.pi * (0.95 * p[:, 1] / height - 0.02) + phase)
        side = 0.75 * (np.hypot(p[:, 0], p[:, 2]) - profile)  # its wall is at most that much nearer
        return np.maximum(side, np.abs(p[:, 1] - 0.5 * height) - 0.5 * height)

    return distance


_SOLIDS: dict[str, Callable[[np.random.Generator], Distance]] = {
    "sphere": _sphere,
    "cube": _cube,
    "cylinder": _cylinder,
    "cone": _cone,
    "pyramid": _pyramid,
    "ring": _ring,
    "capsule": _capsule,
    "vase": _vase,
}
# A ring seen from its edge, or a capsule from its end, could be anything.
_MAX_YAW = {"ring": 0.9, "capsule": 0.8}

SCENE_CLASSES: tuple[str, ...] = tuple(_SOLIDS)


# The materials: each draws its pattern, and returns how much (n,) of the second colour there is at points, 0 to 1.
# Edges are as wide as a sample, `px`.


def _coverage(distance: np.ndarray, px: float | np.ndarray) -> np.ndarray:
    return np.clip(distance / px + 0.5, 0.0, 1.0)


def _to_edge(phase: np.ndarray) -> np.ndarray:
    """Distance to the nearest whole number."""
    return np.abs(phase - np.rint(phase))


def _noise(rng: np.random.Generator, p: np.ndarray) -> np.ndarray:
    """Smooth noise in -1..1 with features about one unit wide."""
    lattice = rng.uniform(-1.0, 1.0, (8, 8, 8)).astype(np.float32)
    cell = np.floor(p)
    weight = p - cell
    weight = (weight * weight * (3.0 - 2.0 * weight)).T
    low = cell.astype(np.int32).T & 7
    corners = [low, (low + 1) & 7]
    noise = 0.0
    for corner in np.ndindex(2, 2, 2):
        share = math.prod(weight[i] if high else 1.0 - weight[i] for i, high in enumerate(corner))
        noise = noise + share * lattice[tuple(corners[high][i] for i, high in enumerate(corner))]
    return noise


def _draw_direction(rng: np.random.Generator) -> np.ndarray:
    return _unit(rng.standard_normal(3)).astype(np.float32)


def _draw_shift(rng: np.random.Generator, number: int) -> np.ndarray:
    return rng.uniform(size=number).astype(np.float32)


def _plain(rng: np.random.Generator, p: np.ndarray, px: float | np.ndarray) -> np.ndarray:
    return np.zeros(len(p), dtype=np.float32)


def _stripes(rng: np.random.Generator, p: np.ndarray, px: float | np.ndarray) -> np.ndarray:
    period = rng.uniform(0.4, 0.6)
    phase = p @ _draw_direction(rng) / period + rng.uniform()
    return _coverage(period * (_to_edge(phase) - 0.25), px)


def _checks(rng: np.random.Generator, p: np.ndarray, px: float | np.ndarray) -> np.ndarray:
    cell = rng.uniform(0.38, 0.52)
    mix = np.zeros(len(p), dtype=np.float32)
    for phase in (0.5 * p / cell + _draw_shift(rng, 3)).T:
        band = _coverage(2.0 * cell * (_to_edge(phase) - 0.25), px)
        mix = mix + band - 2.0 * mix * band
    return mix


def _dots(rng: np.random.Generator, p: np.ndarray, px: float | np.ndarray) -> np.ndarray:
    cell, radius = rng.uniform(0.5, 0.65), rng.uniform(0.3, 0.36)
    place = p / cell + _draw_shift(rng, 3)
    nearest = np.minimum(*(_length(place + shift - np.rint(place + shift)) for shift in (0.0, 0.5)))
    return _coverage(cell * (radius - nearest), px)


def _marble(rng: np.random.Generator, p: np.ndarray, px: float | np.ndarray) -> np.ndarray:
    warp = sum(_noise(rng, 1.5 * f * p) / f for f in (1.0, 2.0))
    phase = p @ _draw_direction(rng) / rng.uniform(0.7, 1.0) + rng.uniform() + 0.7 * warp
    return (1.0 - np.abs(np.sin(math.pi * phase))) ** 1.8


def _wood(rng: np.random.Generator, p: np.ndarray, px: float | np.ndarray) -> np.ndarray:
    along = _draw_direction(rng)
    across = p - rng.uniform(-0.5, 0.5, 3).astype(np.float32)
    across = across - (across @ along)[:, None] * along
    phase = (_length(across) + 0.1 * _noise(rng, 1.2 * p)) / rng.uniform(0.22, 0.32)
    ring = phase - np.floor(phase)
    # A ring darkens slowly over the summer and ends abruptly in winter.
    return ring**1.5 * np.clip(5.0 * (1.0 - ring), 0.0, 1.0)


def _tiles(rng: np.random.Generator, p: np.ndarray, px: float | np.ndarray) -> np.ndarray:
    cell = rng.uniform(0.75, 1.05)
    inset = cell * _to_edge(p[:, ::2] / cell + _draw_shift(rng, 2)).min(-1)
    return _coverage(0.045 - inset, px)


def _planks(rng: np.random.Generator, p: np.ndarray, px: float | np.ndarray) -> np.ndarray:
    width, tints = rng.uniform(0.5, 0.7), 0.5 * _draw_shift(rng, 16)
    row = np.floor(p[:, 2] / width)
    gap = _coverage(0.025 - width * _to_edge(p[:, 2] / width), px)
    return np.maximum(tints[row.astype(np.int32) & 15], gap)


Material = Callable[[np.random.Generator, np.ndarray, float | np.ndarray], np.ndarray]
_SOLID_MATERIALS: dict[str, Material] = {
    "plain": _plain,
    "stripes": _stripes,
    "checks": _checks,
    "dots": _dots,
    "marble": _marble,
    "wood": _wood,
}
_FLOOR_MATERIALS: dict[str, Material] = {"plain": _plain, "tiles": _tiles, "checks": _checks, "planks": _planks}

NUM_ATTRIBUTES = 12 + len(_SOLID_MATERIALS) + len(_FLOOR_MATERIALS) + 4


def _draw_material(rng: np.random.Generator, materials: dict[str, Material]) -> tuple[int, Material, np.ndarray]:
    """A material's place in `materials`, its pattern, and its two colours (2, 3)."""
    place = int(rng.integers(len(materials)))
    name, pattern = list(materials.items())[place]
    return place, pattern, draw_timber(rng) if name in ("wood", "planks") else draw_palette(rng)


def _blend(colors: np.ndarray, mix: np.ndarray) -> np.ndarray:
    """Linear light (n, 3) of a mix (n,) of two colours."""
    first, second = colors**2
    return first + mix[:, None] * (second - first)


# Rays


def _march(distance: Distance, start: np.ndarray, rays: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Follows rays from the lengths `start` to `end`; the lengths (n,) at which they meet the solid, or infinity."""
    met = np.full(len(rays), np.inf, dtype=np.float32)
    places, lengths = np.arange(len(rays)), start
    for _ in range(_MARCH_STEPS):
        free = distance(lengths[:, None] * rays)
        has_met = free < _HIT
        met[places[has_met]] = lengths[has_met]
        lengths = lengths + free
        live = ~has_met & (lengths < end)
        places, lengths, rays, end = places[live], lengths[live], rays[live], end[live]
        if not len(places):
            break
    return met


def _cross_ball(origins: np.ndarray, rays: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whether rays cross a ball around the middle of the solid, and the lengths at which they enter and leave it."""
    offset = origins - _MIDDLE
    middle = -_dot(offset, rays)
    squared = middle**2 - _dot(offset, offset) + radius**2
    half = np.sqrt(np.maximum(squared, 0.0))
    return (squared > 0) & (middle + half > 0), middle - half, middle + half


def _light_of(distance: Distance, points: np.ndarray, lamp: np.ndarray, radius: float) -> np.ndarray:
    """How much light of the lamp reaches points of the floor, 0 to 1: the solid, in a ball, casts a soft shadow."""
    light = np.ones(len(points), dtype=np.float32)
    near = np.flatnonzero(_cross_ball(points, np.broadcast_to(lamp, points.shape), radius)[0])
    lengths, least = np.full(len(near), 0.02, dtype=np.float32), np.ones(len(near), dtype=np.float32)
    for _ in range(_SHADOW_STEPS):
        free = np.maximum(distance(points[near] + lengths[:, None] * lamp), 0.0)
        least = np.minimum(least, 9.0 * free / lengths)
        lengths += np.maximum(free, 0.03)
    light[near] = least
    return light


class _Scene:
    """What there is in an image, and how it looks from the eye."""

    def __init__(self, name: str, rng: np.random.Generator):
        self._rng = rng
        self._elevation, self._scale = rng.uniform(0.26, 0.58), rng.uniform(0.85, 1.15)
        max_yaw = _MAX_YAW.get(name, math.pi)
        yaw, sun = rng.uniform(-max_yaw, max_yaw), rng.uniform(-0.25 * math.pi, 1.25 * math.pi)  # it is not behind
        self._lamp = _unit(np.float32([math.cos(sun), rng.uniform(0.6, 1.0), math.sin(sun)]))
        shift = rng.uniform(-0.15, 0.15, 2)
        self._solid_kind, self._solid_pattern, self._solid_colors = _draw_material(rng, _SOLID_MATERIALS)
        self._floor_kind, self._floor_pattern, colors = _draw_material(rng, _FLOOR_MATERIALS)
        self._floor_colors = colors.mean(0) + 0.5 * (colors - colors.mean(0))  # calmer than the solid
        self._gloss, haze = rng.uniform(0.0, 0.7), rng.uniform(0.75, 1.0)
        self._sky = (0.55 * colors.mean(0) + 0.45 * haze).astype(np.float32) ** 2
        self._shape = _SOLIDS[name](rng)
        self._radius = self._scale * _RADIUS + abs(self._scale - 1.0)  # its middle moves with its size
        cos, sin = math.cos(yaw), math.sin(yaw)
        self._turn = np.float32([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]])
        height = 0.6 + 0.5 * shift[1] + _EYE_DISTANCE * math.sin(self._elevation)
        self._eye = np.float32([shift[0], height, _EYE_DISTANCE * math.cos(self._elevation)])

    @property
    def attributes(self) -> np.ndarray:
        """The attributes, as [`render_scene`] explains."""
        kinds = [*np.eye(len(_SOLID_MATERIALS))[self._solid_kind], *np.eye(len(_FLOOR_MATERIALS))[self._floor_kind]]
        place = [self._lamp[0], self._lamp[2], self._elevation, math.log2(self._scale)]
        is_plain = list(_SOLID_MATERIALS)[self._solid_kind] == "plain"
        solid_colors = self._solid_colors[[0, 0] if is_plain else [0, 1]]
        values = [*solid_colors.ravel(), *self._floor_colors.ravel(), *kinds, *place]
        return np.array(values, dtype=np.float32)

    def _distance(self, points: np.ndarray) -> np.ndarray:
        return self._shape(points @ self._turn / np.float32(self._scale)) * np.float32(self._scale)

    def _cast(self, side: int) -> tuple[np.ndarray, float]:
        """Rays from the eye through `side` * `side` places of the image, and how wide one is at the solid."""
        cos, sin = math.cos(self._elevation), math.sin(self._elevation)
        axis = ((2.0 * np.arange(side) + 1.0) / side - 1.0).astype(np.float32) * np.float32(_HALF_WIDTH)
        u, v = np.meshgrid(axis, -axis)
        rays = _unit(np.stack([u, cos * v - sin, -sin * v - cos], -1).reshape(-1, 3))
        return rays, _EYE_DISTANCE * 2.0 * _HALF_WIDTH / side

    def draw_floor(self, side: int) -> np.ndarray:
        """Linear light (side * side, 3) of the floor, which fades into the sky."""
        rays, px = self._cast(side)
        canvas = np.broadcast_to(self._sky, rays.shape).copy()
        hits = np.flatnonzero(rays[:, 1] < -0.02)
        lengths = -self._eye[1] / rays[hits, 1]
        points = self._eye + lengths[:, None] * rays[hits]
        px = px * lengths / _EYE_DISTANCE / np.maximum(-rays[hits, 1], 0.15)
        # It is dark where the solid stands, and in its shadow.
        touch = np.clip(0.5 + 1.2 * self._distance(points + np.float32([0.0, 0.06, 0.0])), 0.0, 1.0)
        sun = 0.85 * self._lamp[1] * _light_of(self._distance, points, self._lamp, self._radius)
        light = 0.42 * touch[:, None] + sun[:, None] * _SUN_COLOR
        floor = _blend(self._floor_colors, self._floor_pattern(self._rng, points, px)) * light
        canvas[hits] = self._sky + np.exp(-np.maximum(lengths - 4.0, 0.0) / 6.0)[:, None] * (floor - self._sky)
        return canvas

    def draw_solid(self, side: int) -> tuple[np.ndarray, np.ndarray]:
        """The places (n,) of `side` * `side` that show the solid, and their linear light (n, 3)."""
        rays, px = self._cast(side)
        crosses, enter, leave = _cross_ball(self._eye, rays, self._radius)
        place = np.flatnonzero(crosses)
        met = _march(lambda p: self._distance(self._eye + p), enter[place], rays[place], leave[place])
        place, met = place[np.isfinite(met)], met[np.isfinite(met)]
        rays = rays[place]
        points = self._eye + met[:, None] * rays
        steps = np.float32(_HIT) * np.eye(3, dtype=np.float32)
        normals = _unit(np.stack([self._distance(points + d) - self._distance(points - d) for d in steps], -1))
        albedo = _blend(self._solid_colors, self._solid_pattern(self._rng, points @ self._turn, px))
        diffuse = np.maximum(normals @ self._lamp, 0.0)
        shine = self._gloss * np.maximum(_dot(normals, _unit(self._lamp - rays)), 0.0) ** 40
        ambient, below = 0.3 + 0.2 * normals[:, 1], 0.5 - 0.5 * normals[:, 1]
        lit = albedo * (ambient[:, None] + 0.95 * diffuse[:, None] * _SUN_COLOR)
        return place, lit + 0.15 * below[:, None] * self._floor_colors.mean(0) ** 2 + shine[:, None]


# Public API


def render_scene(label: int, seed: int | Sequence[int], size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """
    Renders one scene.

    The image depends on nothing but the arguments. The scene is independent of `size`: two sizes show the same scene
    in different resolution.

    Args:
        label (`int`):
            Class of the image, a position in `SCENE_CLASSES` (0..7).
        seed (`int` or `Sequence[int]`):
            Seed of the image: an integer in 0..2**64-1 or a non-empty sequence of them. Neighbouring seeds give
            independent images. `seed` and `(seed,)` mean the same image.
        size (`int`, defaults to 64):
            Height and width in pixels, a positive multiple of 8.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: The image, `uint8` RGB of shape `(size, size, 3)`, and its attributes,
        `float32` of shape `(26,)`. They describe the scene:

        - 0..5: both colours of the solid (RGB in 0..1); those of a plain one are the same,
        - 6..11: both colours of the floor; a plain one shows the first, and the sky has a mix of both,
        - 12..17: which material the solid has, one of them 1: plain, stripes, checks, dots, marble, wood,
        - 18..21: which material the floor has: plain, tiles, checks, planks,
        - 22..23: where the light comes from: to the right, and towards the viewer,
        - 24: height of the eye above the horizon in radians,
        - 25: log2 of the size.

    Raises:
        `ValueError`: an argument is outside its range.
        `TypeError`: an argument is not an integer (or, for `seed`, a sequence of integers).

    Examples:
        ```py
        >>> image, attributes = render_scene(SCENE_CLASSES.index("vase"), seed=7)
        >>> image.shape, attributes.shape
        ((64, 64, 3), (26,))
        ```
    """
    label, seeds, size = check_label(label, len(SCENE_CLASSES)), check_seeds(seed), check_size(size)
    scene = _Scene(SCENE_CLASSES[label], make_generator(label, seeds))
    floor = scene.draw_floor(size).reshape(size, size, 3)
    canvas = floor.repeat(SUPERSAMPLING, axis=0).repeat(SUPERSAMPLING, axis=1).reshape(-1, 3)
    place, solid = scene.draw_solid(SUPERSAMPLING * size)
    canvas[place] = solid
    return to_bytes(np.sqrt(average_samples(canvas, size))), scene.attributes


class SceneDataset(ProceduralDataset):
    """
    Map-style dataset of procedural scenes with balanced classes.

    Nothing is stored. An image is rendered on access and depends only on `seed` and its index, in every process and in
    any order. Its label is its index modulo 8.

    Args:
        num_samples (`int`):
            Number of images, at least 1.
        size (`int`, defaults to 64):
            Height and width in pixels, a positive multiple of 8.
        seed (`int`, defaults to 0):
            Seed of the set, an integer in 0..2**64-1. Sets with different seeds are disjoint, so a second seed gives a
            held-out set.

    Raises:
        `ValueError`: an argument is outside its range.
        `TypeError`: an argument is not an integer.

    Examples:
        ```py
        >>> train, held_out = SceneDataset(60_000), SceneDataset(1_200, seed=1)
        >>> sample = train[4]
        >>> sample["image"].shape, SCENE_CLASSES[sample["label"]], sample["attributes"].shape
        ((64, 64, 3), 'pyramid', (26,))
        ```
    """

    class_names = SCENE_CLASSES
    default_size = 64

    def __init__(self, num_samples: int, size: int = default_size, seed: int = 0) -> None:
        super().__init__(num_samples, size, seed)

    render = staticmethod(render_scene)
