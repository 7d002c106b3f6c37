# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""What procedural sets of images share: their colours, their seeds, and the data set."""

import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset


SUPERSAMPLING = 2  # rows and columns of samples in a pixel
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
SEED_LIMIT = 2**64


# Colours


def with_luma(hue: float, saturation: float, luma: float) -> np.ndarray:
    """RGB colour of exactly the given luma, darkened towards black or tinted towards white as needed."""
    pure = np.clip(np.abs((6.0 * hue + np.array([0.0, 4.0, 2.0])) % 6.0 - 3.0) - 1.0, 0.0, 1.0)
    color = (1.0 - saturation * (1.0 - pure)).astype(np.float32)
    natural = float(color @ LUMA)
    if luma <= natural:
        return color * (luma / natural)
    return color + (1.0 - color) * ((luma - natural) / (1.0 - natural))


def painters_hue(turn: float) -> float:
    """HSV hue at a turn of the painters' colour wheel, which gives green less and orange more room than HSV does."""
    return float(np.interp(turn % 1.0, np.arange(7) / 6.0, [0.0, 0.07, 0.145, 0.36, 0.6, 0.78, 1.0]))


def draw_palette(rng: np.random.Generator) -> np.ndarray:
    """Two colours, (2, 3): related hues, one dark and one light, in either order."""
    hue = rng.uniform()
    # Analogous, split, triadic and complementary hues are the pairs that painters call harmonious.
    other = hue + rng.choice([-1.0, 1.0]) * rng.choice([0.08, 0.2, 0.33, 0.5]) + rng.normal(0.0, 0.02)
    dark = rng.uniform(0.12, 0.42)
    light = rng.uniform(dark + 0.34, 0.92)
    colors = [
        with_luma(painters_hue(hue), rng.uniform(0.5, 0.9), dark),
        with_luma(painters_hue(other), rng.uniform(0.25, 0.75), light),
    ]
    return np.stack(colors if rng.uniform() < 0.5 else colors[::-1])


def draw_timber(rng: np.random.Generator) -> np.ndarray:
    """Two browns, (2, 3): light early wood and dark late wood, from maple to mahogany."""
    hue = rng.uniform(0.03, 0.12)
    dark = rng.uniform(0.12, 0.32)
    light = rng.uniform(dark + 0.3, 0.8)
    return np.stack(
        [
            with_luma(hue + rng.uniform(0.0, 0.02), rng.uniform(0.45, 0.75), light),
            with_luma(hue, rng.uniform(0.55, 0.85), dark),
        ]
    )


def average_samples(canvas: np.ndarray, size: int) -> np.ndarray:
    """Means over the samples of each pixel: (size * [`SUPERSAMPLING`], same, 3) to (size, size, 3)."""
    return canvas.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING, 3).mean((1, 3))


def to_bytes(image: np.ndarray) -> np.ndarray:
    """Colours in 0..1, cut off there, as uint8."""
    return np.rint(255.0 * np.clip(image, 0.0, 1.0)).astype(np.uint8)


# Checks of the input


def check_integer(name: str, value: Any, accepted: str) -> int:
    """Converts `value` to a plain `int`; a `bool` is refused."""
    if not isinstance(value, bool | np.bool_):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"`{name}` must be {accepted}, but is {value!r} of type `{type(value).__name__}`.")


def check_label(label: Any, num_classes: int) -> int:
    """Converts `label` to a plain `int` in 0..num_classes-1."""
    accepted = f"an integer in 0..{num_classes - 1}"
    number = check_integer("label", label, accepted)
    if not 0 <= number < num_classes:
        raise ValueError(f"`label` must be {accepted}, but is {number}.")
    return number


def check_size(size: Any) -> int:
    """Converts `size` to a plain `int`, a positive multiple of 8."""
    accepted = "a positive multiple of 8"
    number = check_integer("size", size, accepted)
    if number < 1 or number % 8:
        raise ValueError(f"`size` must be {accepted}, but is {number}.")
    return number


def check_seed(seed: Any, accepted: str = "an integer in 0..2**64-1") -> int:
    """Converts `seed` to a plain `int` in 0..2**64-1."""
    number = check_integer("seed", seed, accepted)
    if not 0 <= number < SEED_LIMIT:
        raise ValueError(f"`seed` must be {accepted}, but is {number}.")
    return number


def check_seeds(seed: Any) -> list[int]:
    """Converts `seed`, an integer or a sequence of them, to a list."""
    accepted = "an integer in 0..2**64-1 or a non-empty sequence of them"
    if isinstance(seed, np.ndarray):
        seed = seed.tolist()
    if isinstance(seed, str | bytes) or not isinstance(seed, Sequence):
        return [check_seed(seed, accepted)]
    if len(seed) == 0:
        raise ValueError(f"`seed` must be {accepted}, but is {seed!r}.")
    return [check_seed(part, accepted) for part in seed]


def make_generator(label: int, seeds: list[int]) -> np.random.Generator:
    """The generator of the image of a label and seeds; other seeds have another one."""
    # `SeedSequence` pads with zeros and cuts long integers into words of 32 bits. Adding the length and both words of
    # every part keeps different seeds different: (5,) and (5, 0), or (2**32,) and (0, 1).
    words = [word for part in seeds for word in (part & 0xFFFFFFFF, part >> 32)]
    return np.random.default_rng([label, len(seeds), *words])


class ProceduralDataset(Dataset[dict[str, Any]], ABC):
    """
    Base class of map-style data sets whose images are rendered, with balanced classes.

    Nothing is stored. An image is rendered on access and depends only on `seed` and its index, in every process and in
    any order. Its label is its index modulo the number of classes.

    Args:
        num_samples (`int`):
            Number of images, at least 1.
        size (`int`):
            Height and width in pixels, a positive multiple of 8.
        seed (`int`):
            Seed of the set, an integer in 0..2**64-1. Sets with different seeds are disjoint, so a second seed gives a
            held-out set.

    Raises:
        `ValueError`: an argument is outside its range.
        `TypeError`: an argument is not an integer.
    """

    #: Names of the classes, by label.
    class_names: tuple[str, ...]
    #: Height and width in pixels for which the images were designed.
    default_size: int

    def __init__(self, num_samples: int, size: int, seed: int) -> None:
        self.num_samples = check_integer("num_samples", num_samples, "an integer of at least 1")
        if self.num_samples < 1:
            raise ValueError(f"`num_samples` must be an integer of at least 1, but is {self.num_samples}.")
        self.size = check_size(size)
        self.seed = check_seed(seed)

    @staticmethod
    @abstractmethod
    def render(label: int, seed: Sequence[int], size: int) -> tuple[np.ndarray, np.ndarray]:
        """
        Renders one image.

        Args:
            label (`int`): Class of the image.
            seed (`Sequence[int]`): Seed of the image.
            size (`int`): Height and width in pixels.

        Returns:
            `tuple[np.ndarray, np.ndarray]`: The image (size, size, 3), `uint8`, and its attributes, `float32`.
        """

    def __len__(self) -> int:
        return self.num_samples

    @property
    def labels(self) -> np.ndarray:
        """Labels of all images, of shape (n,), without rendering them."""
        return np.arange(self.num_samples) % len(self.class_names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """
        Renders one image.

        Args:
            index (`int`):
                Position of the image, in `-len(self)..len(self)-1`. As in a list, negative positions count from the
                end.

        Returns:
            `dict[str, Any]`: `"image"`, `uint8` RGB of shape `(size, size, 3)`; `"label"`, an `int`; `"attributes"`,
            `float32`, as the function that renders explains.

        Raises:
            `IndexError`: `index` is out of range.
            `TypeError`: `index` is not an integer.
        """
        accepted = f"an integer in {-self.num_samples}..{self.num_samples - 1}"
        position = check_integer("index", index, accepted)
        if not -self.num_samples <= position < self.num_samples:
            raise IndexError(f"`index` must be {accepted}, but is {position}.")
        position %= self.num_samples
        label = position % len(self.class_names)
        image, attributes = self.render(label, (self.seed, position), self.size)
        return {"image": image, "label": label, "attributes": attributes}
