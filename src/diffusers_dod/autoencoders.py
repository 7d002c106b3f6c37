# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""One interface to Diffusers' autoencoders: pixels in [-1, 1] to normalised latents, and back."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.nn as nn
from diffusers import AsymmetricAutoencoderKL, AutoencoderDC, AutoencoderKL, AutoencoderRAE, AutoencoderTiny, VQModel

from .checks import check_number
from .devices import send


#: The autoencoders of images that are known; others with the same methods and settings are taken as well.
Autoencoder: TypeAlias = (
    AutoencoderKL | AutoencoderDC | AutoencoderRAE | AutoencoderTiny | AsymmetricAutoencoderKL | VQModel
)
# Settings with the widths of the levels, between which the encoder halves the sides.
LEVELS = ("encoder_block_out_channels", "down_block_out_channels", "block_out_channels")


def _is_rae(vae: Autoencoder) -> bool:
    # Told by the config, as compiled models and remote code have other classes.
    return "encoder_input_size" in vae.config


def latent_channels(vae: Autoencoder) -> int:
    """Number of channels of the latents of `vae`."""
    return vae.config.encoder_hidden_size if _is_rae(vae) else vae.config.latent_channels


def spatial_factor(vae: Autoencoder) -> int:
    """Pixels per latent pixel of `vae`, along each side."""
    if _is_rae(vae):
        return vae.config.patch_size
    return 2 ** (len(next(vae.config[name] for name in LEVELS if vae.config.get(name))) - 1)


def check_autoencoder(name: str, vae: Any) -> None:
    """
    Raises unless a model is an autoencoder of images whose latents can be normalised.

    Args:
        name (`str`): Name of the argument, for the message.
        vae (`Any`): The value received.

    Raises:
        `TypeError`: the value is no model that encodes images and decodes latents.
        `ValueError`: its settings give latents no finite mean, or no standard deviation above 0.
    """
    is_model = isinstance(vae, torch.nn.Module)
    config = getattr(vae, "config", {})
    if (
        not is_model
        or not all(callable(getattr(vae, method, None)) for method in ("encode", "decode"))
        or not ("encoder_input_size" in config or ("latent_channels" in config and any(map(config.get, LEVELS))))
        or any(isinstance(module, (torch.nn.Conv1d, torch.nn.Conv3d)) for module in vae.modules())  # sound, video
    ):
        raise TypeError(
            f"`{name}` must be an autoencoder of images with `encode` and `decode`, such as AutoencoderKL, "
            f"AutoencoderDC, AutoencoderRAE or AutoencoderTiny, got {type(vae).__name__ if is_model else repr(vae)}."
        )
    if _is_rae(vae):
        return
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        check_number(f"scaling_factor` of `{name}", config.get("scaling_factor"), 0, open_minimum=True)
        check_number(f"shift_factor` of `{name}", config.get("shift_factor") or 0.0, -math.inf)
        return
    for setting, values, minimum in (("latents_mean", mean, -math.inf), ("latents_std", std, 0)):
        values = values.flatten().tolist() if isinstance(values, torch.Tensor) else values
        if not isinstance(values, Sequence) or len(values) not in (1, config.latent_channels):
            raise ValueError(
                f"`{setting}` of `{name}` must hold 1 or {config.latent_channels} numbers, one per channel of the "
                f"latents, got {values!r}."
            )
        for value in values:
            check_number(f"{setting}` of `{name}", value, minimum, open_minimum=True)


def check_image_size(vae: Autoencoder, height: int, width: int) -> None:
    """
    Raises unless an autoencoder takes images of this size.

    Args:
        vae ([`Autoencoder`]): The autoencoder.
        height (`int`): Height of the images in pixels.
        width (`int`): Width of the images in pixels.

    Raises:
        `ValueError`: an `AutoencoderRAE` takes one size only, and this is another one.
    """
    if not _is_rae(vae):
        return
    side = vae.config.encoder_input_size // vae.config.encoder_patch_size * vae.config.patch_size
    if (height, width) != (side, side):
        raise ValueError(
            f"The height and width of images must be {side}, the size of this `vae`, got {height} x {width}."
        )


def latent_statistics(vae: Autoencoder, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Mean and standard deviation that normalise an autoencoder's latents.

    They are `latents_mean` and `latents_std` of its config if it has both, else `shift_factor` and 1 /
    `scaling_factor`. An `AutoencoderRAE` normalises its latents itself.

    Args:
        vae ([`Autoencoder`]): The autoencoder.
        latents (`torch.Tensor`): Any tensor with the wanted device and dtype.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Mean and standard deviation of shape `(1, C, 1, 1)`, or `(1, 1, 1, 1)`.
    """
    config = vae.config
    if _is_rae(vae):
        mean, std = [0.0], [1.0]
    elif config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, std = config.latents_mean, config.latents_std
    else:
        mean, std = [config.get("shift_factor") or 0.0], [1.0 / config.scaling_factor]
    statistics = (torch.as_tensor(statistic, dtype=latents.dtype) for statistic in (mean, std))
    return tuple(send(statistic, latents.device).reshape(1, -1, 1, 1) for statistic in statistics)


def normalize_latents(latents: torch.Tensor, vae: Autoencoder) -> torch.Tensor:
    """
    Normalises latents of an autoencoder for the transformer, by [`latent_statistics`].

    Args:
        latents (`torch.Tensor` of shape `(B, C, h, w)`): Latents from the autoencoder's encoder.
        vae ([`Autoencoder`]): The autoencoder.

    Returns:
        `torch.Tensor` of shape `(B, C, h, w)`.
    """
    mean, std = latent_statistics(vae, latents)
    return (latents - mean) / std


def denormalize_latents(latents: torch.Tensor, vae: Autoencoder) -> torch.Tensor:
    """The inverse of [`normalize_latents`]: `latents` (B, C, h, w) of the transformer -> latents for `vae`."""
    mean, std = latent_statistics(vae, latents)
    return latents * std + mean


@contextmanager
def _within_range(vae: Autoencoder) -> Iterator[torch.dtype]:
    """
    Context in which a float16 autoencoder that overflows there (`force_upcast`) is in float32, as in Diffusers' SDXL.
    """
    needs_upcasting = vae.dtype == torch.float16 and bool(vae.config.get("force_upcast"))
    if needs_upcasting:
        nn.Module.to(vae, torch.float32)  # without the warning of Diffusers' `to`
    try:
        yield vae.dtype
    finally:
        if needs_upcasting:
            nn.Module.to(vae, torch.float16)


def encode_moments(pixels: torch.Tensor, vae: Autoencoder | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Mean and standard deviation of an autoencoder's posterior of images.

    Args:
        pixels (`torch.Tensor` of shape `(B, 3, H, W)`): Pixels in [-1, 1].
        vae ([`Autoencoder`] or `None`): The autoencoder; without one the latents are the pixels.

    Returns:
        `tuple[torch.Tensor, torch.Tensor | None]`: Mean and standard deviation of the normalised latents, (B, C, h, w)
        in fp32; the second is `None` for a deterministic autoencoder.

    Raises:
        `ValueError`: an `AutoencoderRAE` takes images of another size.
    """
    if vae is None:
        return pixels.float(), None
    check_image_size(vae, *pixels.shape[2:])
    with _within_range(vae) as dtype:
        pixels = pixels.to(dtype)
        encoded = vae.encode(pixels / 2 + 0.5 if _is_rae(vae) else pixels)
    posterior = getattr(encoded, "latent_dist", None)
    if posterior is None:
        (latents,) = encoded.to_tuple()
        return normalize_latents(latents.float(), vae), None
    return normalize_latents(posterior.mean.float(), vae), posterior.std.float() / latent_statistics(
        vae, pixels.float()
    )[1]


def decode_pixels(latents: torch.Tensor, vae: Autoencoder | None) -> torch.Tensor:
    """
    Decodes normalised latents to images.

    Args:
        latents (`torch.Tensor` of shape `(B, C, h, w)`): Normalised latents.
        vae ([`Autoencoder`] or `None`): The autoencoder; without one the latents are the pixels.

    Returns:
        `torch.Tensor` of shape `(B, 3, H, W)`: Pixels in about [-1, 1], in fp32.
    """
    if vae is None:
        return latents.float()
    with _within_range(vae) as dtype:
        pixels = vae.decode(denormalize_latents(latents, vae).to(dtype)).sample.float()
    return pixels * 2 - 1 if _is_rae(vae) else pixels
