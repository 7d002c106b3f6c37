# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Model sizes by name: the paper's DoD-S/B/XL (Table 1), its FiTv2 baselines, and one that trains on two CPU cores."""

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from diffusers import DiffusionPipeline

from .latent_embedding import LatentEmbeddingModule, VisualPriorMixin, find_visual_prior_class
from .transformer_dod import DoDTransformer2DModel


def _arguments(cls: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """Picks the entries of a model's config that are arguments of its constructor."""
    return {name: config[name] for name in inspect.signature(cls).parameters if name in config}


@dataclass(frozen=True)
class Preset:
    """
    Arguments of the two models, and their sampling defaults.

    Args:
        transformer_config (`dict`): Arguments of [`DoDTransformer2DModel`].
        latent_embedder_config (`dict`, *optional*): Arguments of the latent embedder. FiTv2 has none.
        pipeline_config (`dict`, defaults to `{}`): Sampling defaults of [`DoDPipeline`].
        latent_embedder_class (`type[VisualPriorMixin]`, defaults to `LatentEmbeddingModule`):
            Class of the latent embedder.
    """

    transformer_config: dict[str, Any]
    latent_embedder_config: dict[str, Any] | None = None
    pipeline_config: dict[str, Any] = field(default_factory=dict)
    latent_embedder_class: type[VisualPriorMixin] = LatentEmbeddingModule

    @classmethod
    def from_pipeline(cls, pipeline: DiffusionPipeline) -> Self:
        """
        Makes a preset with the arguments of a pipeline's models.

        Args:
            pipeline ([`DoDPipeline`]): The pipeline. A compiled model counts as the original.

        Returns:
            [`Preset`].
        """
        defaults = {name: value for name, value in pipeline.config.items() if name.startswith("default_")}
        transformer = _arguments(DoDTransformer2DModel, pipeline.transformer.config)
        if pipeline.latent_embedder is None:
            return cls(transformer, None, defaults)
        embedder_class = type(getattr(pipeline.latent_embedder, "_orig_mod", pipeline.latent_embedder))
        embedder = _arguments(embedder_class, pipeline.latent_embedder.config)
        return cls(transformer, embedder, defaults, embedder_class)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike) -> Self:
        """
        Makes a preset with the arguments of a saved pipeline's models; it does not load their weights.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A folder or a repository on the Hub.

        Returns:
            [`Preset`].

        Raises:
            `OSError`: a config is missing or cannot be reached.
            `ValueError`: a config belongs to another class, or the latent embedder's class has not been imported.
        """
        path = pretrained_model_name_or_path
        index = DiffusionPipeline.load_config(path)
        defaults = {name: value for name, value in index.items() if name.startswith("default_")}
        config = DoDTransformer2DModel.load_config(path, subfolder="transformer")
        transformer = _arguments(DoDTransformer2DModel, config)
        if index["latent_embedder"][0] is None:
            return cls(transformer, None, defaults)
        embedder_class = find_visual_prior_class(index["latent_embedder"][1])
        embedder = _arguments(embedder_class, embedder_class.load_config(path, subfolder="latent_embedder"))
        return cls(transformer, embedder, defaults, embedder_class)

    def override(self, **overrides: Any) -> Self:
        """
        Makes a preset with other arguments of the models.

        Args:
            overrides: Arguments. Each goes to every model whose constructor takes it.

        Returns:
            [`Preset`]: A new preset.

        Raises:
            `ValueError`: no model takes an argument.
        """
        models = [(DoDTransformer2DModel, dict(self.transformer_config))]
        if self.latent_embedder_config is not None:
            models.append((self.latent_embedder_class, dict(self.latent_embedder_config)))
        for name, value in overrides.items():
            takers = [config for model, config in models if name in inspect.signature(model).parameters]
            if not takers:
                names = " or a ".join(model.__name__ for model, _ in models)
                raise ValueError(f"`{name}` must not be given for a {names}, which has no such argument, got {value}.")
            for config in takers:
                config[name] = value
        configs = [config for _, config in models] + [None]
        return replace(self, transformer_config=configs[0], latent_embedder_config=configs[1])

    def build_latent_embedder(self) -> VisualPriorMixin | None:
        """Builds the latent embedder with new weights, if there is one."""
        config = self.latent_embedder_config
        return None if config is None else self.latent_embedder_class(**config)

    def build(
        self, latent_shape: tuple[int, ...] | None = None, num_classes: int | None = None, **overrides: Any
    ) -> tuple[DoDTransformer2DModel, VisualPriorMixin | None]:
        """
        Builds both models with new weights.

        Args:
            latent_shape (`tuple[int, ...]`, *optional*): Shape (C, h, w) of the latents. By default the preset's.
            num_classes (`int`, *optional*): Number of classes. By default the preset's.
            overrides: Other arguments of the models, see [`Preset.override`].

        Returns:
            `tuple[DoDTransformer2DModel, VisualPriorMixin | None]`: Backbone and latent embedder.

        Raises:
            `ValueError`, `TypeError`: an argument is out of range or has the wrong type, or no model takes it.
        """
        if latent_shape is not None:
            overrides |= {"in_channels": latent_shape[0], "sample_size": latent_shape[1]}
        if num_classes is not None:
            overrides["num_classes"] = num_classes
        preset = self.override(**overrides)
        return DoDTransformer2DModel(**preset.transformer_config), preset.build_latent_embedder()


def _preset(
    layers: int,
    heads: int,
    head_dim: int,
    lem: tuple[int, int, int, int] | None = None,  # encoder layers, decoder layers, heads, head_dim
    tokens: tuple[int, int] = (32, 16),  # number and width of the latent tokens
    scale: float = 5.5,
    steps: int = 30,
    **shared: Any,
) -> Preset:
    transformer = dict(num_layers=layers, num_attention_heads=heads, attention_head_dim=head_dim, **shared)
    if lem is None:
        return Preset(
            transformer,
            pipeline_config=dict(
                default_guidance_scale=scale, default_num_inference_steps=steps, default_num_stages=1
            ),
        )
    transformer["prior_embed_dim"] = lem[2] * lem[3]
    latent_embedder = dict(
        num_encoder_layers=lem[0],
        num_decoder_layers=lem[1],
        num_attention_heads=lem[2],
        attention_head_dim=lem[3],
        num_latent_tokens=tokens[0],
        latent_token_dim=tokens[1],
        **{name: value for name, value in shared.items() if name in ("sample_size", "patch_size", "in_channels")},
    )
    return Preset(
        transformer,
        latent_embedder,
        dict(default_guidance_scale=scale, default_num_inference_steps=steps, default_num_stages=2),
    )


PRESETS: dict[str, Preset] = {
    # name              layers heads head_dim  LEM: encoder, decoder layers, heads, head_dim
    "DoD-S": _preset(12, 6, 64, (8, 4, 6, 64)),
    "DoD-B": _preset(12, 12, 64, (8, 4, 12, 64)),
    "DoD-XL": _preset(28, 16, 72, (8, 4, 12, 64), scale=3.5),
    "FiTv2-B": _preset(15, 12, 64, scale=1.5),
    "FiTv2-XL": _preset(36, 16, 72, scale=1.5),
    "FiTv2-3B": _preset(40, 24, 96, scale=1.5),
    "DoD-Desk": _preset(6, 4, 32, (3, 2, 4, 32), tokens=(4, 8), scale=3.0, steps=20, sample_size=8, num_classes=12),
    "FiTv2-Desk": _preset(8, 4, 32, scale=3.0, steps=20, sample_size=8, num_classes=12),
}
