# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Extractors: they turn images into the features that metrics compare."""

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from ..files import file_sha256, folder_sha256
from ..records import DAMAGED_ZIP, read_npz_headers
from ..shipped import find_shipped
from .inception import load_inception
from .vision import BUILT_IN_MODELS, DINOV2, VisionExtractor


INCEPTION = "inception"
TORCHSCRIPT = (".pt", ".ts")
ROUNDING = 1e-6  # of the entries of a covariance, relative to the largest, as in float32


@dataclass
class ImageFeatures:
    """
    The features of B images.

    Args:
        features (`torch.Tensor` of shape `(B, d)`): Features for the Fréchet distance, precision and recall.
        spatial_features (`torch.Tensor` of shape `(B, s)`, *optional*): Features of all places in one row, for sFID.
        logits (`torch.Tensor` of shape `(B, k)`, *optional*): Logits of k classes, for the Inception Score.
    """

    features: torch.Tensor
    spatial_features: torch.Tensor | None = None
    logits: torch.Tensor | None = None


MAX_FEATURES = 16384  # width of features, whose covariance has the square of it


Extractor = Callable[[torch.Tensor], torch.Tensor | ImageFeatures]


def extract(extractor: Extractor, images: torch.Tensor) -> ImageFeatures:
    """
    Computes the features of images, in one form and without gradients.

    Args:
        extractor (`Callable`): Images (B, 3, H, W) in uint8 -> features (B, d) or [`ImageFeatures`].
        images (`torch.Tensor` of shape `(B, 3, H, W)`): The images, in uint8.

    Returns:
        [`ImageFeatures`].

    Raises:
        `ValueError`: the images or the features have another form.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        raise ValueError(
            f"`images` must have shape (B, 3, H, W) and be uint8, got {tuple(images.shape)} in {images.dtype}."
        )
    # Convolutions in TF32, PyTorch's default on GPUs, have 10 bits.
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        output = extractor(images)
    features = ImageFeatures(output) if isinstance(output, torch.Tensor) else output
    if not isinstance(features, ImageFeatures):
        raise ValueError(
            "`extractor` must give a tensor of features or ImageFeatures, "
            f"got {type(output).__name__} from {extractor!r}."
        )
    for name, values in vars(features).items():
        if values is not None and (values.ndim != 2 or len(values) != len(images)):
            raise ValueError(
                f"`extractor` must give `{name}` of shape ({len(images)}, n) for {len(images)} images, "
                f"got {tuple(values.shape)} from {extractor!r}."
            )
    return features


def is_inception(name: str) -> bool:
    """Whether `name` is that of Inception: `inception`, or `inception:` and the file of its weights."""
    return name.partition(":")[0] == INCEPTION


def has_code(name: str) -> bool:
    """Whether the extractor `name` is code of its own, and none of this package or of `transformers`."""
    return name.partition(":")[0] not in (INCEPTION, *BUILT_IN_MODELS)


class InceptionFeatures(torch.nn.Module):
    """
    [`InceptionV3`] as an extractor, for comparison with ADM's numbers.

    Images (B, 3, H, W) in uint8 -> `pool_3` (B, 2048), the first 7 channels of `mixed_6/conv` (B, 17 * 17 * 7), and
    logits without the bias (B, 1008).

    Args:
        name (`str`, defaults to `"inception"`):
            `inception` has the published weights. `inception:path/weights.pth` has any weights of this network.
        argument (`str`, defaults to `"fid_extractor"`): Name of the argument, for messages.

    Raises:
        `OSError`: the file of the weights is missing.
        `ValueError`: the file does not hold such weights.
    """

    def __init__(self, name: str = INCEPTION, argument: str = "fid_extractor"):
        super().__init__()
        path = None if name == INCEPTION else Path(name.partition(":")[2])
        self.model, self.sha256 = load_inception(path, argument)

    def forward(self, images: torch.Tensor) -> ImageFeatures:
        """The [`ImageFeatures`] of `images`."""
        return ImageFeatures(*self.model(images))


def load_extractor(
    name: str,
    trust: bool = False,
    device: torch.device | str | None = None,
    argument: str = "fid_extractor",
) -> Extractor:
    """
    Loads an extractor by its name.

    `inception` and `inception:path/weights.pth` are [`InceptionFeatures`]. `dinov2`, `dinov2:FOLDER` and
    `transformers:FOLDER_OR_ID` are a [`VisionExtractor`]. `package.module:attribute` and
    `path/file.py:attribute` name any callable that takes images (B, 3, H, W) in uint8 and returns features (B, d) or
    [`ImageFeatures`]. A file `*.pt` or `*.ts` is a TorchScript module that returns features.

    Args:
        name (`str`): Name of the extractor.
        trust (`bool`, defaults to `False`): Whether a TorchScript file may be run.
        device (`torch.device` or `str`, *optional*): Device for a module. By default it stays where it is.
        argument (`str`, defaults to `"fid_extractor"`): Name of the argument, for messages.

    Returns:
        `Callable`: The extractor; a module in evaluation mode.

    Raises:
        `OSError`: the weights of Inception are missing.
        `ValueError`: the name leads to nothing that can be called, to a program that is not trusted, or to other
            weights than Inception's.
    """
    if is_inception(name):
        extractor = InceptionFeatures(name, argument)
    elif name.endswith(TORCHSCRIPT):
        extractor = _load_torchscript(name, trust, argument)
    elif not has_code(name):
        extractor = VisionExtractor(name, argument)
    else:
        extractor = _load_attribute(name, argument)
    if not callable(extractor):
        raise ValueError(f"`{argument}` must be something to call, got {extractor!r} for {name!r}.")
    if isinstance(extractor, torch.nn.Module):
        extractor.eval()
        if device is not None:
            extractor.to(device)
    return extractor


def _load_torchscript(name: str, trust: bool, argument: str) -> Extractor:
    if not trust:
        raise ValueError(
            f"`{argument}` must not be a TorchScript file that is not trusted, got {name!r}: such a file is a "
            "program that looks like weights. Pass `--trust_extractor` if you know where it comes from."
        )
    try:
        return torch.jit.load(name, map_location="cpu")
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"`{argument}` must be a TorchScript file, got {name!r}: {error}") from error


def _load_attribute(name: str, argument: str) -> Extractor:
    module, _, attribute = name.rpartition(":")
    try:
        loaded = (
            _import_file(find_shipped(Path(module))) if module.endswith(".py") else importlib.import_module(module)
        )
        return getattr(loaded, attribute)
    except (ImportError, OSError, ValueError, TypeError, AttributeError) as error:
        names = (INCEPTION, f"{INCEPTION}:weights.pth", DINOV2, "transformers:FOLDER_OR_ID")
        raise ValueError(
            f"`{argument}` must be named as `package.module:attribute`, or `file.py:attribute`, be one of "
            f"{names}, or be a TorchScript file, got {name!r}: {error}."
        ) from error


def _import_file(path: Path) -> ModuleType:
    """Imports a Python file; it finds its neighbours as if it were run as a script."""
    spec = importlib.util.spec_from_file_location(f"_extractor_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def extractor_file(name: str) -> Path | None:
    """Finds the file with the code of the loaded extractor `name`; `None` without code of its own."""
    if not has_code(name):
        return None
    module = name if name.endswith(TORCHSCRIPT) else name.rpartition(":")[0]
    if not module.endswith((".py", *TORCHSCRIPT)):
        module = getattr(sys.modules.get(module), "__file__", None)
    return None if module is None else find_shipped(Path(module))


def extractor_sha256(name: str, extractor: Extractor) -> str:
    """
    Hash that identifies an extractor: of the file of its code and, if it is a module, of its weights.

    For Inception it is the hash of the file of its weights, for models of `transformers` that of the weights and of
    the preparation of images.

    Args:
        name (`str`): Name of the extractor, see [`load_extractor`].
        extractor (`Callable`): The loaded extractor.

    Returns:
        `str`: A SHA-256.
    """
    if isinstance(extractor, (InceptionFeatures, VisionExtractor)):
        return extractor.sha256
    file = extractor_file(name)
    digest = hashlib.sha256(f"{None if file is None else file_sha256(file)}\n".encode())
    state = extractor.state_dict() if isinstance(extractor, torch.nn.Module) else {}
    for key, value in state.items():
        is_tensor = isinstance(value, torch.Tensor)
        digest.update(f"{key} {(value.dtype, tuple(value.shape)) if is_tensor else value}\n".encode())
        if is_tensor:
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def code_sha256(name: str) -> str | None:
    """
    Hash of the code of the loaded extractor `name` and of all modules that are loaded from its folder or below.

    It may change without need, but does so whenever code changes that the extractor imports from there.

    Args:
        name (`str`): Name of the extractor, see [`load_extractor`].

    Returns:
        `str`: A SHA-256; `None` without code of its own.
    """
    file = extractor_file(name)
    if file is None:
        return None
    folder = file.resolve().parent
    loaded = [Path(module.__file__).resolve() for module in sys.modules.values() if getattr(module, "__file__", None)]
    return folder_sha256(folder, sorted({file.resolve(), *(path for path in loaded if folder in path.parents)}))


def load_statistics(path: Path, suffix: str = "", argument: str = "fid_reference") -> tuple[np.ndarray, np.ndarray]:
    """
    Loads mean and covariance of the features of reference images.

    Args:
        path (`Path`): An npz file with `mu` (d,) and `sigma` (d, d), as in ADM's evaluation.
        suffix (`str`, defaults to `""`): End of both names: `"_s"` for spatial features.
        argument (`str`, defaults to `"fid_reference"`): Name of the argument, for messages.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Mean and covariance, in float64.

    Raises:
        `OSError`: the file cannot be read.
        `ValueError`: the arrays are missing, have other shapes, are not finite, or the second is no covariance.
    """
    names = [f"mu{suffix}", f"sigma{suffix}"]
    try:
        headers = read_npz_headers(path)
    except ValueError as error:  # a single array is none of them
        raise ValueError(f"`{argument}` must be an npz file: {error}.") from error
    if not headers.keys() >= set(names):
        raise ValueError(f"`{argument}` must have `{names[0]}` and `{names[1]}`, got {path} with {sorted(headers)}.")
    shapes, kinds = zip(*(headers[name] for name in names), strict=True)
    if len(shapes[0]) != 1 or shapes[1] != shapes[0] * 2 or shapes[0][0] > MAX_FEATURES:
        raise ValueError(
            f"`{argument}` must have `{names[0]}` (d,) and `{names[1]}` (d, d), d <= {MAX_FEATURES}, got {path} with "
            f"{shapes[0]} and {shapes[1]}."
        )
    if any(kind.kind not in "fiu" for kind in kinds):
        raise ValueError(f"`{argument}` must have real numbers, got {path} with {kinds[0]} and {kinds[1]}.")
    try:
        with np.load(path) as file:
            mean, covariance = arrays = [file[name].astype(np.float64) for name in names]
    except (ValueError, EOFError, *DAMAGED_ZIP) as error:
        raise ValueError(f"`{argument}` must be an undamaged npz file, got {path}: {error}.") from error
    for name, array in zip(names, arrays, strict=True):
        if not np.isfinite(array).all():
            number = int((~np.isfinite(array)).sum())
            raise ValueError(
                f"`{argument}` must have a finite `{name}`, got {path} with {number} numbers that are not."
            )
    tolerance = ROUNDING * np.abs(covariance).max()
    if np.abs(covariance - covariance.T).max() > tolerance:
        raise ValueError(f"`{argument}` must have a symmetric `{names[1]}`, got another one in {path}.")
    smallest = np.linalg.eigvalsh(covariance)[0]
    if smallest < -tolerance * len(mean):  # else distances could be negative
        raise ValueError(
            f"`{argument}` must have a positive semidefinite `{names[1]}`, got {path} with the eigenvalue "
            f"{smallest:.3g}."
        )
    return mean, covariance


def check_extractor(extractor: Extractor, num_features: int, resolution: int, device: torch.device | str) -> None:
    """
    Raises unless an extractor's features fit a reference.

    Args:
        extractor (`Callable`): Images (B, 3, H, W) in uint8 -> features (B, d) or [`ImageFeatures`].
        num_features (`int`): Width d of the reference's features.
        resolution (`int`): Height and width of images in pixels.
        device (`torch.device` or `str`): Device of the images.

    Raises:
        `ValueError`: the extractor gives something else for two black images.
    """
    wanted = f"`fid_extractor` must give features of shape (2, {num_features}), as `fid_reference` has them"
    images = torch.zeros(2, 3, resolution, resolution, dtype=torch.uint8, device=device)
    try:
        found = tuple(extract(extractor, images).features.shape)
    except ValueError as error:
        raise ValueError(f"{wanted}, for two images: {error}") from error
    if found != (2, num_features):
        raise ValueError(f"{wanted}, for two images, got {found} from {extractor!r}.")
