# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""What turns pictures into the features of which a Fréchet distance is computed."""

import importlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch


Extractor = Callable[[torch.Tensor], torch.Tensor]


def load_extractor(name: str) -> Extractor:
    """
    A function or module by its name, `package.module:attribute`.

    Args:
        name (`str`): Its name. It takes pictures (B, 3, H, W) in uint8 and returns features (B, d).

    Returns:
        `Callable`: What has the name.

    Raises:
        `ValueError`: there is nothing of this name that can be called.
    """
    module, _, attribute = name.partition(":")
    try:
        extractor = getattr(importlib.import_module(module), attribute)
    except (ImportError, ValueError, AttributeError) as error:
        raise ValueError(
            f"An extractor of features must be named as `package.module:attribute`, got {name!r}: {error}."
        ) from error
    if not callable(extractor):
        raise ValueError(f"An extractor of features must be something to call, got {extractor!r} for {name!r}.")
    return extractor


def load_statistics(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """
    Mean and covariance of the features of reference pictures.

    Args:
        path (`Path`): An npz file with `mu` (d,) and `sigma` (d, d), as of ADM's evaluation.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Both, in float64.

    Raises:
        `OSError`: the file cannot be read.
        `ValueError`: it does not have them.
    """
    with np.load(path) as file:
        missing = {"mu", "sigma"} - set(file.files)
        if missing:
            raise ValueError(f"Statistics must be an npz file with `mu` and `sigma`, got {path} with {file.files}.")
        return file["mu"].astype(np.float64), file["sigma"].astype(np.float64)
