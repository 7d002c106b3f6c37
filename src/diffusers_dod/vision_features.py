# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Features of a frozen vision model: of patches, as targets for tokens (REPA, Yu et al. 2024, arXiv:2410.06940), and of
images, for metrics.

Any vision transformer of `transformers` will do if its last hidden state ends with its patches: ViT, DINOv2 with or
without registers, and the vision towers of CLIP and SigLIP.
"""

import inspect
import logging
import os
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModel
from transformers.image_processing_base import ImageProcessingMixin

from .checks import check_at_least
from .devices import send
from .files import sha256_of_weights


logger = logging.getLogger(__name__)

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]


def _read_preprocessor(path: str | os.PathLike) -> dict[str, Any]:
    """Reads the config of the model's image processor, which may itself need torchvision; empty if there is none."""
    try:
        return ImageProcessingMixin.get_image_processor_dict(path)[0]
    except OSError:
        return {}


def _side(preprocessor: dict[str, Any]) -> int | None:
    """Side in pixels of the square that an image processor makes of an image, if its config says so."""
    crops = preprocessor.get("crop_size") is not None and preprocessor.get("do_center_crop", True)
    size = preprocessor.get("crop_size" if crops else "size")
    if isinstance(size, dict):
        size = size.get("height", size.get("shortest_edge"))
    return size


def _is_pooler(name: str) -> bool:
    """Whether a weight has no effect on the tokens: many models are saved without their pooler."""
    return "pooler" in name.split(".")


class VisionFeatures:
    """
    A frozen vision model as a function from images to the features of their patches.

    Args:
        path (`str` or `os.PathLike`): A folder or a repository on the Hub with a model of `transformers`.
        device (`torch.device` or `str`, defaults to `"cpu"`): Device of the model.
        dtype (`torch.dtype`, defaults to `torch.float32`): Dtype of the model.
        image_size (`int`, *optional*):
            Side in pixels that images are resized to. By default the side of the model's image processor, else of its
            config. The model does not see a rest at the right or the bottom that fills no patch.

    Raises:
        `ValueError`: there is no such model, it lacks weights, gives no tokens of square patches, or does not take
            images of this size.
        `TypeError`: `image_size` is no integer.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        image_size: int | None = None,
    ):
        try:
            model, loading = AutoModel.from_pretrained(path, dtype=dtype, output_loading_info=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"`path` must hold a model of `transformers`, got {str(path)!r}: {error}") from error
        if missing := sorted(name for name in loading["missing_keys"] if not _is_pooler(name)):
            raise ValueError(f"`path` must hold all weights of its model, got {str(path)!r} without {missing[:5]}.")
        model = getattr(model, "vision_model", model)  # of CLIP and SigLIP
        patch_size = getattr(model.config, "patch_size", None)
        parameters = inspect.signature(model.forward).parameters
        if not isinstance(patch_size, int) or "pixel_values" not in parameters:
            raise ValueError(
                "`path` must hold a vision transformer with square patches, "
                f"got {str(path)!r} with a `{type(model).__name__}`."
            )
        self.model = model.requires_grad_(False).eval().to(device)
        preprocessor = _read_preprocessor(path)
        if image_size is None:
            image_size = _side(preprocessor) or getattr(model.config, "image_size", None)
        check_at_least("image_size", image_size, patch_size)
        #: Side in pixels that images are resized to.
        self.image_size: int = image_size
        self._mean, self._std = preprocessor.get("image_mean"), preprocessor.get("image_std")
        if self._mean is None or self._std is None:
            logger.warning(f"{path} does not say how images are normalised: it is taken for ImageNet's way.")
            self._mean, self._std = IMAGENET_MEAN, IMAGENET_STD
        # Models with learned positions take images of another size than in their training only if asked to.
        self._options = {}
        if "interpolate_pos_encoding" in parameters:
            self._options["interpolate_pos_encoding"] = image_size != model.config.image_size
        #: Rows and columns of the features, whatever the size of the images.
        self.grid: tuple[int, int] = (image_size // patch_size, image_size // patch_size)
        #: Width D of the features.
        self.feature_dim: int = self(torch.zeros(1, 3, image_size, image_size)).shape[-1]

    def describe(self) -> dict[str, Any]:
        """
        Settings that the features depend on, as the manifest of latents states them.

        Returns:
            `dict`: Kind and hash of the vision model's weights, and the preparation of images for it.
        """
        weights = {name: tensor for name, tensor in self.model.state_dict().items() if not _is_pooler(name)}
        return {
            "model_type": self.model.config.model_type,
            "weights_sha256": sha256_of_weights(weights),
            "image_size": self.image_size,
            "image_mean": self._mean,
            "image_std": self._std,
        }

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """
        Computes the features of images: the last hidden state of the model, without tokens that belong to no patch.

        Args:
            pixels (`torch.Tensor` of shape `(B, 3, H, W)`): Pixels in [-1, 1], on any device.

        Returns:
            `torch.Tensor` of shape `(B, rows, columns, D)`: Features in fp32, on the device of the model.

        Raises:
            `ValueError`: the pixels have another shape, or the model does not give the tokens of its patches.
        """
        # Class and register tokens come first.
        return self._last_hidden_state(pixels)[:, -self.grid[0] * self.grid[1] :].unflatten(1, self.grid)

    def pooled(self, pixels: torch.Tensor) -> torch.Tensor:
        """
        Computes one feature vector per image: the class token of the last hidden state.

        Args:
            pixels (`torch.Tensor` of shape `(B, 3, H, W)`): Pixels in [-1, 1], on any device.

        Returns:
            `torch.Tensor` of shape `(B, D)`: Features in fp32; the mean of the patches if there is no other token.

        Raises:
            `ValueError`: the pixels have another shape, or the model does not give the tokens of its patches.
        """
        tokens = self._last_hidden_state(pixels)
        return tokens.mean(dim=1) if tokens.shape[1] == self.grid[0] * self.grid[1] else tokens[:, 0]

    @torch.no_grad()
    def _last_hidden_state(self, pixels: torch.Tensor) -> torch.Tensor:
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(f"`pixels` must have shape (batch, 3, height, width), got {tuple(pixels.shape)}.")
        weight = next(self.model.parameters())
        side = (self.image_size, self.image_size)
        pixels = pixels.to(weight.device).float() / 2 + 0.5
        pixels = F.interpolate(pixels, side, mode="bicubic", antialias=True).clamp(0, 1)  # as Pillow does
        mean, std = (send(torch.tensor(numbers), pixels.device)[:, None, None] for numbers in (self._mean, self._std))
        pixels = (pixels - mean) / std
        tokens = self.model(pixel_values=pixels.to(weight.dtype), **self._options).last_hidden_state
        num_patches = self.grid[0] * self.grid[1]
        if tokens.ndim != 3 or tokens.shape[1] < num_patches:
            raise ValueError(
                f"The vision model must give a token for each of its {num_patches} patches, got a last hidden state "
                f"of shape {tuple(tokens.shape)} from a `{type(self.model).__name__}`."
            )
        return tokens.float()
