# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""PSNR and SSIM by hand, by their definitions and in closed form."""

import numpy as np
import pytest
from helpers import says
from skimage.metrics import peak_signal_noise_ratio

from diffusers_dod.data.textures import TextureDataset
from diffusers_dod.metrics.pairs import psnr, ssim


def random_images(num: int, side: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, side, side, 3), dtype=np.uint8)


def test_psnr_by_hand():
    references = np.full((3, 16, 16, 3), 100, dtype=np.uint8)
    images = references.copy()
    images[0] += 5
    images[1, 0, 0, 0] = 116  # an error of 256 in one of 768 numbers
    expected = [10 * np.log10(255**2 / 25), 10 * np.log10(255**2 * 768 / 256), np.inf]
    np.testing.assert_allclose(psnr(images, references), expected, rtol=1e-14)
    images, references = random_images(2), random_images(2, seed=1)
    libraries = [peak_signal_noise_ratio(*pair, data_range=255) for pair in zip(references, images, strict=True)]
    np.testing.assert_allclose(psnr(images, references), libraries, rtol=1e-12)


def ssim_by_windows(image: np.ndarray, reference: np.ndarray) -> float:
    """The definition itself: every window of 11 x 11 pixels in every channel."""
    axis = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    weights = np.outer(axis, axis) / axis.sum() ** 2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for channel in range(3):
        for row in range(image.shape[0] - 10):
            for column in range(image.shape[1] - 10):
                place = slice(row, row + 11), slice(column, column + 11), channel
                x, y = image[place].astype(float), reference[place].astype(float)
                mx, my = (weights * x).sum(), (weights * y).sum()
                vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
                vxy = (weights * (x - mx) * (y - my)).sum()
                values.append((2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return np.mean(values)


def test_ssim_is_its_definition():
    references = np.stack([TextureDataset(3, size=16, seed=5)[index]["image"] for index in range(3)])
    images = (references * 0.8 + random_images(3) * 0.2).astype(np.uint8)
    expected = [ssim_by_windows(*pair) for pair in zip(images, references, strict=True)]
    np.testing.assert_allclose(ssim(images, references), expected, rtol=1e-9)
    assert (0.2 < ssim(images, references)).all() and (ssim(images, references) < 0.99).all()


def test_ssim_in_closed_form():
    images, references = np.full((2, 1, 12, 12, 3), 0, dtype=np.uint8)
    images[:], references[:] = 100, 140  # without any variance only the means matter
    c1 = (0.01 * 255) ** 2
    np.testing.assert_allclose(ssim(images, references), (2 * 100 * 140 + c1) / (100**2 + 140**2 + c1), rtol=1e-12)
    np.testing.assert_array_equal(ssim(random_images(2), random_images(2)), [1.0, 1.0])


def test_measures_refuse_other_images():
    images = random_images(2)
    for measure in (psnr, ssim):
        with pytest.raises(ValueError, match=says("`images`", "uint8", "float64")):
            measure(images / 255, images)
        with pytest.raises(ValueError, match=says("`images`", "(2, 16, 16, 3)", "(1, 16, 16, 3)")):
            measure(images, images[:1])
    with pytest.raises(ValueError, match=says("at least 11", "(2, 8, 8, 3)")):
        ssim(random_images(2, side=8), random_images(2, side=8))
