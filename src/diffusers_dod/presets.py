# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Model sizes by name: the paper's DoD-S/B/XL (Table 1), its FiTv2 baselines, and one that trains on two CPU cores."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """
    Arguments of the two models, and their sampling defaults.

    Args:
        transformer_config (`dict`): Arguments of [`DoDTransformer2DModel`].
        latent_embedder_config (`dict`, *optional*): Arguments of [`LatentEmbeddingModule`]. FiTv2 has none.
        pipeline_config (`dict`, defaults to `{}`): Sampling defaults of [`DoDPipeline`].
    """

    transformer_config: dict[str, Any]
    latent_embedder_config: dict[str, Any] | None = None
    pipeline_config: dict[str, Any] = field(default_factory=dict)


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
