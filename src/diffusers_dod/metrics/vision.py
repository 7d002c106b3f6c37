# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Vision transformers of `transformers` as extractors of features. The Fréchet distance on those of DINOv2-L is
FD-DINOv2 (Stein et al., 2023, arXiv:2306.04675).
"""

import hashlib
import json

import torch
import torch.nn.functional as F

from ..image_reading import to_pixels
from ..vision_features import IMAGENET_MEAN, IMAGENET_STD, VisionFeatures


DINOV2 = "dinov2"
DINOV2_MODEL = "facebook/dinov2-large"
DINOV2_SIZE = 224
BUILT_IN_MODELS = (DINOV2, "transformers")


def is_dinov2(name: str) -> bool:
    """Whether `name` is that of DINOv2: `dinov2`, or `dinov2:` and another folder or repository."""
    return name.partition(":")[0] == DINOV2


class VisionExtractor(torch.nn.Module):
    """
    A vision transformer of `transformers` as an extractor: the class token of its last hidden state.

    Images (B, 3, H, W) in uint8 -> features (B, D). Images are resized as Pillow does (bicubic, antialiased, rounded),
    and normalized as the config of the image processor says. DINOv2 takes 224 x 224 pixels and the mean and
    standard deviation of ImageNet, as in the code of Stein et al. (2023). A model without a class token gives the mean
    of its patches.

    Args:
        name (`str`): `dinov2` has the published weights of DINOv2-L. `dinov2:FOLDER_OR_ID` is another DINOv2, and
            `transformers:FOLDER_OR_ID` any vision transformer, see [`VisionFeatures`].
        argument (`str`, defaults to `"fid_extractor"`): Name of the argument, for messages.

    Raises:
        `ValueError`: there is no such model, or it is none of DINOv2.
    """

    def __init__(self, name: str, argument: str = "fid_extractor"):
        super().__init__()
        kind, _, path = name.partition(":")
        path = path or (DINOV2_MODEL if kind == DINOV2 else "")
        try:
            self._vision = VisionFeatures(path, image_size=DINOV2_SIZE if kind == DINOV2 else None)
        except ValueError as error:
            raise ValueError(f"`{argument}` must be a vision model, got {name!r}: {error}") from error
        self.model = self._vision.model
        settings = self._vision.describe()
        if kind == DINOV2:
            found = (settings["model_type"], settings["image_mean"], settings["image_std"])
            if found != (DINOV2, IMAGENET_MEAN, IMAGENET_STD):
                raise ValueError(
                    f"`{argument}` must be a DINOv2 with mean {IMAGENET_MEAN} and deviation {IMAGENET_STD} of pixels, "
                    f"got {name!r} of {found}."
                )
            _fix_positions(self.model, DINOV2_SIZE)
        #: Hash of the weights and of how images are prepared.
        self.sha256: str = hashlib.sha256(json.dumps([kind, settings], sort_keys=True).encode()).hexdigest()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The features (B, D) of `images`."""
        side = (self._vision.image_size,) * 2
        images = F.interpolate(images.float(), side, mode="bicubic", antialias=True).round().clamp(0, 255)
        return self._vision.pooled(to_pixels(images.byte().permute(0, 2, 3, 1)))


def _fix_positions(model: torch.nn.Module, size: int) -> None:
    """
    Interpolates the positions of a DINOv2 to images of one size as its own code does, with an offset of 0.1 patches.

    `transformers` has left the offset out, with which the published models were evaluated.
    """
    embeddings, grid = model.embeddings, size // model.config.patch_size
    positions = embeddings.position_embeddings
    side = round((positions.shape[1] - 1) ** 0.5)
    if side != grid:
        patches = positions[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        scale = ((grid + 0.1) / side,) * 2
        patches = F.interpolate(patches, scale_factor=scale, mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
        embeddings.position_embeddings = torch.nn.Parameter(torch.cat([positions[:, :1], patches], dim=1), False)
