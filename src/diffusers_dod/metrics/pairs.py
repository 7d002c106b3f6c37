# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""PSNR and SSIM of images beside their references."""

from collections.abc import Callable

import numpy as np


def psnr(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """
    Peak signal-to-noise ratio of 8-bit images: 10 log10(255^2 / mean squared error over pixels and channels).

    Args:
        images (`np.ndarray` of shape `(B, H, W, 3)`): Images in uint8.
        references (`np.ndarray` of shape `(B, H, W, 3)`): Their references in uint8.

    Returns:
        `np.ndarray` of shape `(B,)`: PSNR in decibels, float64; infinite for equal images.

    Raises:
        `ValueError`: shapes differ, or images are not in uint8.
    """
    _check_pair(images, references)
    error = ((images.astype(np.float64) - references.astype(np.float64)) ** 2).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / error)


def ssim(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """
    Structural similarity of 8-bit images (Wang et al. 2004), by scikit-image.

    It has a Gaussian window of 11 x 11 pixels with sigma 1.5, K1 = 0.01, K2 = 0.03 and range 255. It is the mean over
    channels and over all windows within the image.

    Args:
        images (`np.ndarray` of shape `(B, H, W, 3)`): Images in uint8, at least 11 pixels high and wide.
        references (`np.ndarray` of shape `(B, H, W, 3)`): Their references in uint8.

    Returns:
        `np.ndarray` of shape `(B,)`: SSIM in [-1, 1], float64; 1 for equal images.

    Raises:
        `ValueError`: shapes differ, or images are not in uint8 or are smaller.
        `ImportError`: scikit-image is not installed.
    """
    _check_pair(images, references)
    if min(images.shape[1:3]) < 11:
        raise ValueError(f"`images` must be at least 11 pixels high and wide, got shape {images.shape}.")
    structural_similarity = load_structural_similarity()
    pairs = zip(images, references, strict=True)
    return np.array(
        [
            structural_similarity(
                image,
                reference,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
                data_range=255,
                channel_axis=-1,
            )
            for image, reference in pairs
        ]
    )


def load_structural_similarity() -> Callable:
    """Loads the function of scikit-image; raises an `ImportError` if that is not installed."""
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise ImportError("SSIM needs scikit-image: `pip install 'diffusers-dod[evaluation]'`.") from error
    return structural_similarity


def _check_pair(images: np.ndarray, references: np.ndarray) -> None:
    for name, array in {"images": images, "references": references}.items():
        if array.ndim != 4 or array.dtype != np.uint8 or array.shape != references.shape:
            raise ValueError(
                f"`{name}` must be uint8 of shape (B, H, W, 3), the same as `references`, "
                f"got {array.dtype} of shape {array.shape} beside {references.shape}."
            )
