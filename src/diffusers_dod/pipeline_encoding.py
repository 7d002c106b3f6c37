# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Images, latents and visual priors of a DoD pipeline: encoded and decoded."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.image_processor import PipelineImageInput

from .autoencoders import decode_pixels, encode_moments, latent_channels
from .checks import check_choice, check_tensor
from .pipeline_inputs import check_prior, find_image_size, preprocess_image
from .seeding import NoiseSource
from .stages import LARGEST, check_samples, find_sound, one_at_a_time


OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class DoDPipelineEncodingMixin:
    """Encodes images to latents and visual priors, and decodes latents, with the models of a [`DoDPipeline`]."""

    @property
    def _num_channels(self) -> int:
        """Number of channels of images."""
        if self.vae is not None:
            return self.vae.config.get("in_channels", 3)
        return 3 if self.transformer is None else self.transformer.config.in_channels

    def _read_image(
        self, image: PipelineImageInput, num_labels: int | None, height: int | None, width: int | None
    ) -> torch.Tensor:
        """Reads the images of a visual prior as pixels of a size, see [`preprocess_image`]."""
        size = find_image_size(height, width, self.transformer, self.vae)
        return preprocess_image(image, num_labels, (self._num_channels, *size))

    @one_at_a_time
    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """
        Encodes images by the mean of the autoencoder's posterior; a pixel-space model takes them as they are.

        Args:
            pixels (`torch.Tensor` of shape `(B, 3, H, W)`): Pixels in [-1, 1].

        Returns:
            `torch.Tensor` of shape `(B, C, h, w)`: Normalised latents in fp32.

        Raises:
            `FloatingPointError`: the autoencoder gives numbers that are not finite, or absurdly large.
            `ValueError`, `TypeError`: the pixels have another type or shape.
        """
        factor = self.vae_scale_factor
        check_tensor("pixels", pixels, (None, self._num_channels, None, None))
        if any(side % factor for side in pixels.shape[2:]):
            raise ValueError(
                f"`pixels` must have a height and width that are multiples of {factor}, got {tuple(pixels.shape)}."
            )
        latents = encode_moments(pixels, self.vae)[0]
        check_samples("Latents of images", find_sound(latents), range(len(latents)))
        return latents

    @one_at_a_time
    @torch.no_grad()
    def get_prior_tokens(
        self,
        image: PipelineImageInput | None = None,
        latents: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> torch.Tensor:
        """
        Computes the latent tokens of images or latents, for `prior_tokens`.

        `torch.lerp` of two of them gives a prior in between.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, `str` or a list of them, *optional*):
                Images of any size, as in a call.
            latents (`torch.Tensor` of shape `(B, C, h, w)`, *optional*):
                Normalised latents in place of images, such as `stage_latents` of [`DoDPipelineOutput`].
            attention_kwargs (`dict`, *optional*): `{"scale": ...}` is the scale of LoRA adapters.
            height (`int`, *optional*): Height to which images are scaled and cropped, in pixels. By default the
                trained one.
            width (`int`, *optional*): Width, likewise.

        Returns:
            `torch.Tensor` of shape `(B, num_latent_tokens, latent_token_dim)`.

        Raises:
            `ValueError`, `TypeError`: neither or both are given, the input does not fit, or there is no latent
                embedder.
        """
        if self.latent_embedder is None:
            raise ValueError("`latent_embedder` must be loaded to extract tokens, got None.")
        if (image is None) == (latents is None):
            raise ValueError(
                f"One of `image` and `latents` must be given, got {'neither' if image is None else 'both'}."
            )
        device = self._execution_device
        if latents is None:
            latents = self.encode_image(self._read_image(image, None, height, width).to(device))
        else:
            check_prior("latents", latents, None, self.latent_embedder)
        tokens = self.latent_embedder.encode(latents.to(device), attention_kwargs=attention_kwargs)
        self.maybe_free_model_hooks()
        return tokens

    @one_at_a_time
    @torch.no_grad()
    def decode_latents(
        self, latents: torch.Tensor, output_type: str
    ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        """
        Decodes latents to images.

        Args:
            latents (`torch.Tensor` of shape `(B, C, h, w)`): Normalised latents.
            output_type (`str`): `"pil"`, `"np"` or `"pt"`, or `"latent"` for unchanged latents.

        Returns:
            `list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`, as in [`DoDPipelineOutput`].

        Raises:
            `FloatingPointError`: the autoencoder gives numbers that are not finite, or absurdly large.
            `ValueError`, `TypeError`: the latents have another type or shape or are not finite, or `output_type` is
                another one.
        """
        channels = self._num_channels if self.vae is None else latent_channels(self.vae)
        check_tensor("latents", latents, (None, channels, None, None))
        check_choice("output_type", output_type, OUTPUT_TYPES)
        if not bool(find_sound(latents).all()):
            raise ValueError(f"`latents` must be finite and at most {LARGEST} in size, got others.")
        return self._decode(latents, output_type, "Decoded images", range(len(latents)))

    def _decode(
        self, latents: torch.Tensor, output_type: str, name: str, sample_indices: Sequence[int]
    ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        if output_type == "latent":
            return latents
        pixels = decode_pixels(latents, self.vae)
        check_samples(name, find_sound(pixels), sample_indices)
        return self.image_processor.postprocess(pixels, output_type=output_type)

    def _draw_prior_tokens(
        self, class_labels: torch.Tensor, source: NoiseSource, settings: dict[str, Any]
    ) -> torch.Tensor:
        """Draws latent tokens of `class_labels` (B,) with the token prior, from the noise of `source`."""
        noise = source.draw(0, self.token_prior.token_shape, class_labels.device)
        tokens = self.token_prior.generate(class_labels, noise, **settings)
        check_samples("Latent tokens of the token prior", find_sound(tokens), source.sample_indices)
        return tokens

    def _prior_embeds(
        self,
        latents: torch.Tensor | None,
        latent_tokens: torch.Tensor | None,
        size: tuple[int, int],
        attention_kwargs: dict[str, Any] | None,
    ) -> torch.Tensor:
        """Computes the visual priors of latents or of latent tokens, for the next stage."""
        embedder, device = self.latent_embedder, self._execution_device
        scale = {name: value for name, value in (attention_kwargs or {}).items() if name == "scale"}
        if latent_tokens is None:
            prior_embeds = embedder(latents.to(device, embedder.dtype), attention_kwargs=scale).prior_embeds
        else:
            prior_embeds = embedder.decode(latent_tokens.to(device), *size, attention_kwargs=scale)
        return prior_embeds.to(self.transformer.dtype)
