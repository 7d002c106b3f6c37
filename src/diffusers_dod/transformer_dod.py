# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""The DoD backbone: a FiTv2 transformer (paper, Appendix A.1) whose conditioning may differ from token to token."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import FasterCacheConfig
from diffusers.configuration_utils import register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import (
    PixArtAlphaTextProjection,
    TimestepEmbedding,
    get_timestep_embedding,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import apply_lora_scale

from .checks import MAX_CLASSES, MAX_SIZE, check_at_least, check_label_ids, check_latents, check_number, check_type
from .elementwise import (
    GatedSilu,
    PlainLayerNorm,
    add_gated,
    add_modulations,
    modulate,
    rotate,
    split_rows,
    without_autocast,
)
from .modeling_utils import DoDModelMixin, FP32Linear
from .pos_interpolation import (
    PosInterpolationMixin,
    PositionTables,
    attention_factor,
    grid_scales,
    interpolate_frequencies,
)
from .rectified_flow import NUM_TRAIN_TIMESTEPS


# Limits of configs, far beyond any model: a file cannot make a program allocate or loop for minutes.
MAX_LAYERS = 1000
MAX_RATIO = 64


@dataclass
class DoDTransformerOutput(Transformer2DModelOutput):
    """
    Output of [`DoDTransformer2DModel`].

    Args:
        sample (`torch.Tensor` of shape `(B, C, H, W)`): The predicted velocity.
        hidden_states (`tuple[torch.Tensor, ...]`, *optional*):
            Tokens (B, T, d) after the embedding and after each block, if `output_hidden_states` was set.
    """

    hidden_states: tuple[torch.Tensor, ...] | None = None


def patchify(hidden_states: torch.Tensor, patch_size: int) -> torch.Tensor:
    """
    Cuts latents into tokens in row-major order; within a token the channel is slowest.

    Args:
        hidden_states (`torch.Tensor` of shape `(B, C, H, W)`): Latents.
        patch_size (`int`): Side p of a patch, which divides H and W.

    Returns:
        `torch.Tensor` of shape `(B, H/p * W/p, C*p*p)`.
    """
    batch, channels, height, width = hidden_states.shape
    hidden_states = hidden_states.reshape(
        batch, channels, height // patch_size, patch_size, width // patch_size, patch_size
    )
    return hidden_states.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(tokens: torch.Tensor, patch_size: int, height: int, width: int) -> torch.Tensor:
    """
    The inverse of [`patchify`].

    Args:
        tokens (`torch.Tensor` of shape `(B, H/p * W/p, C*p*p)`): Tokens in row-major order.
        patch_size (`int`): Side p of a patch.
        height (`int`): Height H of the latents.
        width (`int`): Width W of the latents.

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`.
    """
    rows, columns = height // patch_size, width // patch_size
    tokens = tokens.reshape(tokens.shape[0], rows, columns, -1, patch_size, patch_size)
    return tokens.permute(0, 3, 1, 4, 2, 5).reshape(tokens.shape[0], -1, height, width)


def _is_plain(layer: nn.Module | None, cls: type[nn.Module]) -> bool:
    """Whether a layer is of exactly this class: no adapter, no quantization and no hook."""
    if type(layer) is not cls or "forward" in vars(layer):
        return False
    return not any((layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks))


class DoDAttnProcessor:
    """Self-attention: softmax(LN(q) LN(k)^T / sqrt(head_dim)) v (paper, Eq. 9; its 1/d_k is a misprint)."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "DoDAttention",
        hidden_states: torch.Tensor,
        image_rotary_emb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Runs an attention layer.

        Args:
            attn ([`DoDAttention`]): The layer, for its weights.
            hidden_states (`torch.Tensor` of shape `(B, T, query_dim)`): The tokens.
            image_rotary_emb (`torch.Tensor` of shape `(T, head_dim / 2, 2)`, *optional*):
                Cosines and sines from [`DoDRotaryPosEmbed`]. Without them queries and keys are not rotated.

        Returns:
            `torch.Tensor` of shape `(B, T, query_dim)`.
        """
        # (B, T, heads, head_dim) each, but queries and keys may be one tensor (B, T, 2 * heads, head_dim).
        *queries_keys, value = (part.unflatten(-1, (-1, attn.head_dim)) for part in attn._project(hidden_states))
        if attn.norm_q is not None:
            queries_keys = [norm(part) for norm, part in zip((attn.norm_q, attn.norm_k), queries_keys, strict=False)]
        if image_rotary_emb is not None:
            queries_keys = [x for part in queries_keys for x in rotate(part, image_rotary_emb, attn.heads)]
        query, key = queries_keys if len(queries_keys) == 2 else queries_keys[0].chunk(2, dim=2)

        hidden_states = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        hidden_states = hidden_states.flatten(2, 3)
        return attn.to_out[1](attn.to_out[0](hidden_states))


class DoDAttention(nn.Module, AttentionModuleMixin):
    """
    Self-attention with biases.

    Args:
        query_dim (`int`): Width of the tokens.
        heads (`int`): Number of attention heads.
        dim_head (`int`): Width of a head.
        qk_norm (`bool`, defaults to `True`):
            Whether each query and key head gets a LayerNorm without affine parameters.
        processor (`Callable`, *optional*): Computes the attention. By default a [`DoDAttnProcessor`].
    """

    _default_processor_cls = DoDAttnProcessor
    _available_processors = [DoDAttnProcessor]

    def __init__(self, query_dim: int, heads: int, dim_head: int, qk_norm: bool = True, processor=None):
        super().__init__()
        self.head_dim = dim_head
        self.heads = heads
        self.inner_dim = heads * dim_head
        self.use_bias = True
        self.norm_q = PlainLayerNorm(dim_head) if qk_norm else None
        self.norm_k = PlainLayerNorm(dim_head) if qk_norm else None
        self.to_q = nn.Linear(query_dim, self.inner_dim)
        self.to_k = nn.Linear(query_dim, self.inner_dim)
        self.to_v = nn.Linear(query_dim, self.inner_dim)
        self.to_out = nn.ModuleList([nn.Linear(self.inner_dim, query_dim), nn.Dropout(0.0)])
        self.set_processor(processor or self._default_processor_cls())

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Maps tokens to queries, keys and values.

        Args:
            hidden_states (`torch.Tensor` of shape `(B, T, query_dim)`): The tokens.

        Returns:
            `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: Each of shape `(B, T, heads * dim_head)`.
        """
        *queries_keys, value = self._project(hidden_states)
        query, key = queries_keys if len(queries_keys) == 2 else queries_keys[0].chunk(2, dim=-1)
        return query, key, value

    def _project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As `project`, but queries and keys are one tensor if one product makes them and one norm can take both."""
        is_one = _is_plain(self.norm_q, PlainLayerNorm) and _is_plain(self.norm_k, PlainLayerNorm)
        sizes = (2 * self.inner_dim, self.inner_dim) if is_one else (self.inner_dim,) * 3
        if self.fused_projections:
            return self.to_qkv(hidden_states).split(sizes, dim=-1)
        layers = (self.to_q, self.to_k, self.to_v)
        if torch.is_grad_enabled() and all(
            _is_plain(layer, nn.Linear) for layer in layers
        ):  # one product for all three
            weight = torch.cat([layer.weight for layer in layers])
            bias = torch.cat([layer.bias for layer in layers])
            return F.linear(hidden_states, weight, bias).split(sizes, dim=-1)
        return tuple(layer(hidden_states) for layer in layers)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """Maps `hidden_states` (B, T, query_dim) to the same shape; `kwargs` go to the processor."""
        return self.processor(self, hidden_states, **kwargs)


class DoDRotaryPosEmbed(nn.Module):
    """
    2D rotary position embedding: the first half of every head rotates with the row, the second with the column.

    Args:
        dim (`int`): Width of a head, a multiple of 4.
        theta (`float`, defaults to 10000.0): Base of the frequencies.
    """

    def __init__(self, dim: int, theta: float = 10000.0):
        super().__init__()
        self.dim = dim
        self.theta = theta
        self._tables = PositionTables()

    def forward(
        self,
        rows: int,
        columns: int,
        device: torch.device,
        trained_size: int | None = None,
        pos_interpolation: str = "none",
        pos_interpolation_decoupled: bool = False,
    ) -> torch.Tensor:
        """
        Computes the rotations for a grid of tokens, once for each grid.

        Args:
            rows (`int`): Rows of the grid.
            columns (`int`): Columns of the grid.
            device (`torch.device`): Device of the result.
            trained_size (`int`, *optional*): Rows of the trained grid, equal to its columns. Interpolation needs it.
            pos_interpolation (`str`, defaults to `"none"`): Mode of interpolation, see [`interpolate_frequencies`].
            pos_interpolation_decoupled (`bool`, defaults to `False`):
                Whether rows and columns are scaled separately, see [`grid_scales`].

        Returns:
            `torch.Tensor` of shape `(rows * columns, dim / 2, 2)`: Cosine and sine of each pair of channels in fp32,
            for tokens in row-major order.
        """
        key = (rows, columns, device, trained_size, pos_interpolation, pos_interpolation_decoupled)
        return self._tables.find(key, lambda: self._rotation(*key))

    def _rotation(
        self,
        rows: int,
        columns: int,
        device: torch.device,
        trained_size: int | None,
        pos_interpolation: str,
        pos_interpolation_decoupled: bool,
    ) -> torch.Tensor:
        scales = (1.0, 1.0)
        if pos_interpolation != "none":
            scales = grid_scales(rows, columns, trained_size, pos_interpolation_decoupled)
        row = torch.arange(rows, device=device, dtype=torch.float32).repeat_interleave(columns)
        column = torch.arange(columns, device=device, dtype=torch.float32).repeat(rows)
        factor = attention_factor(max(scales), pos_interpolation, device)
        exponents = torch.arange(0, self.dim // 2, 2, device=device, dtype=torch.float32) / (self.dim // 2)
        parts = []
        for position, scale in zip((row, column), scales, strict=True):
            frequencies = interpolate_frequencies(
                1.0 / self.theta**exponents, scale, pos_interpolation, trained_size, self.theta
            )
            angles = torch.outer(position, frequencies)
            parts.append(factor * torch.stack([angles.cos(), angles.sin()], dim=-1))
        return torch.cat(parts, dim=1)


class DoDTimestepEmbedding(nn.Module):
    """
    Sinusoidal features of sigma and a two-layer MLP, computed in at least fp32 whatever the dtype of the model.

    bf16 can hold only half of the 1001 integer timesteps, and neighbouring timesteps have features that are even
    closer. So neither times nor features are ever rounded to bf16, neither under autocast nor in a cast model.

    Args:
        embedding_dim (`int`): Width of the embedding.
        num_features (`int`, defaults to 256): Number of features, half of them cosines and half sines.
    """

    def __init__(self, embedding_dim: int, num_features: int = 256):
        super().__init__()
        self.num_features = num_features
        self.mlp = TimestepEmbedding(num_features, embedding_dim)
        self.mlp.linear_1 = FP32Linear(num_features, embedding_dim)
        self.mlp.linear_2 = FP32Linear(embedding_dim, embedding_dim)

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        """Embeds `timestep` (B,) in [0, 1000] as (B, embedding_dim)."""
        sigma = timestep.to(torch.float32) / NUM_TRAIN_TIMESTEPS
        with without_autocast(timestep.device.type):
            features = get_timestep_embedding(sigma, self.num_features, flip_sin_to_cos=True, downscale_freq_shift=0)
            return self.mlp(features)


class DoDTransformerBlock(nn.Module):
    """
    Attention and SwiGLU (paper, Eqs. 8-9), modulated by a global AdaLN plus a low-rank one (Eq. 10).

    Args:
        dim (`int`): Width d of the tokens.
        num_attention_heads (`int`): Number of attention heads.
        attention_head_dim (`int`): Width of a head.
        ff_inner_dim (`int`): Width of the SwiGLU.
        adaln_lora_dim (`int`): Rank of the block's own modulation.
    """

    def __init__(
        self, dim: int, num_attention_heads: int, attention_head_dim: int, ff_inner_dim: int, adaln_lora_dim: int
    ):
        super().__init__()
        self.norm1 = PlainLayerNorm(dim)
        self.attn = DoDAttention(dim, num_attention_heads, attention_head_dim)
        self.norm2 = PlainLayerNorm(dim)
        self.ff = FeedForward(dim, inner_dim=ff_inner_dim, activation_fn="swiglu")
        self.ff.net[0] = GatedSilu(self.ff.net[0].proj)
        self.adaln_down = nn.Linear(dim, adaln_lora_dim)
        self.adaln_up = nn.Linear(adaln_lora_dim, 6 * dim)

    def forward(
        self,
        hidden_states: torch.Tensor,  # (B, T, d)
        conditioning: torch.Tensor,  # (K * T + B - K, d)
        global_modulation: torch.Tensor,  # (K * T + B - K, 6d)
        num_priors: int,
        image_rotary_emb: torch.Tensor,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """
        Runs the block.

        The conditioning of K samples with a prior has one row per token, that of the others one row per sample.

        Args:
            hidden_states (`torch.Tensor` of shape `(B, T, d)`): The tokens; samples with a prior first.
            conditioning (`torch.Tensor` of shape `(K * T + B - K, d)`): SiLU(c).
            global_modulation (`torch.Tensor` of shape `(K * T + B - K, 6 * d)`): The AdaLN that all blocks share.
            num_priors (`int`): Number K of samples with a prior.
            image_rotary_emb (`torch.Tensor` of shape `(T, head_dim / 2, 2)`):
                Cosines and sines from [`DoDRotaryPosEmbed`].
            attention_kwargs (`dict`, *optional*): Further arguments of the attention processor.

        Returns:
            `torch.Tensor` of shape `(B, T, d)`.
        """
        modulation = self.adaln_up(self.adaln_down(conditioning))
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = add_modulations(
            modulation, global_modulation, num_priors, hidden_states.shape[1]
        )

        attn_output = self.attn(
            modulate(self.norm1(hidden_states), shift_msa, scale_msa),
            image_rotary_emb=image_rotary_emb,
            **(attention_kwargs or {}),
        )
        hidden_states = add_gated(hidden_states, attn_output, gate_msa)
        ff_output = self.ff(modulate(self.norm2(hidden_states), shift_mlp, scale_mlp))
        return add_gated(hidden_states, ff_output, gate_mlp)


class DoDTransformer2DModel(DoDModelMixin, PeftAdapterMixin, CacheMixin, AttentionMixin, PosInterpolationMixin):
    r"""
    The DoD backbone: a FiTv2 transformer that predicts the rectified-flow velocity (paper, Eqs. 5 and 8-10).

    The velocity is noise - data. It is conditioned on the time, the class and, optionally, a visual prior per token.
    Without a prior all tokens share one conditioning vector c = time + class + S. The sample token S is trainable.
    With a prior, the projected prior of each token takes the place of S. Height and width are free.

    Args:
        sample_size (`int`, defaults to 32):
            Height and width of the latents that the model was trained on. Pipelines use it as the default; the model
            itself takes any height and width.
        patch_size (`int`, defaults to 2): Side of a token's patch in latent pixels.
        in_channels (`int`, defaults to 4): Channels of the latents and of the predicted velocity.
        num_layers (`int`, defaults to 12): Number of transformer blocks.
        num_attention_heads (`int`, defaults to 12): Number of attention heads.
        attention_head_dim (`int`, defaults to 64): Width of a head, a multiple of 4. The model's width d is
            `num_attention_heads` times this.
        num_classes (`int`, defaults to 1000): Number of classes. `num_classes` itself is the id of the null class.
        mlp_ratio (`float`, defaults to 4.0): Width of a plain MLP divided by d. The SwiGLU is 2/3 as wide.
        adaln_lora_dim (`int`, *optional*): Rank of the blocks' own modulation (paper, Eq. 10), d / 4 by default.
        prior_embed_dim (`int`, *optional*):
            Width of the visual prior's tokens. `None` makes a plain FiTv2: it has neither S nor the projection, and
            refuses `prior_embeds`.
        pos_interpolation (`str`, defaults to `"none"`):
            Treatment of positions on grids larger than the trained one: `"none"`, `"linear"`, `"ntk"` or `"yarn"`, see
            `set_pos_interpolation`.
        pos_interpolation_decoupled (`bool`, defaults to `False`): Whether rows and columns are scaled separately.

    Raises:
        `ValueError`, `TypeError`: an argument is out of range or of the wrong type.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DoDTransformerBlock"]
    _repeated_blocks = ["DoDTransformerBlock"]
    _keep_in_fp32_modules = ["time_embed"]
    _skip_layerwise_casting_patterns = ["x_embedder", "time_embed", "class_embed", "adaln", "norm"]
    _skip_quantization_modules = ["adaln_global", "adaln_down", "adaln_up", "adaln_out"]  # beside those in fp32

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        num_layers: int = 12,
        num_attention_heads: int = 12,
        attention_head_dim: int = 64,
        num_classes: int = 1000,
        mlp_ratio: float = 4.0,
        adaln_lora_dim: int | None = None,
        prior_embed_dim: int | None = None,
        pos_interpolation: str = "none",
        pos_interpolation_decoupled: bool = False,
    ):
        super().__init__()
        for name, value in {
            "patch_size": patch_size,
            "sample_size": sample_size,
            "in_channels": in_channels,
            "num_layers": num_layers,
            "num_attention_heads": num_attention_heads,
            "attention_head_dim": attention_head_dim,
            "num_classes": num_classes,
        }.items():
            check_at_least(name, value, 1, MAX_CLASSES if name == "num_classes" else MAX_SIZE)
        check_at_least("num_layers", num_layers, 1, MAX_LAYERS)
        if sample_size % patch_size:
            raise ValueError(f"`sample_size` must be a multiple of `patch_size` = {patch_size}, got {sample_size}.")
        if attention_head_dim % 4:
            raise ValueError(
                f"`attention_head_dim` must be a multiple of 4 (2D rotary embedding), got {attention_head_dim}."
            )
        dim = num_attention_heads * attention_head_dim
        check_at_least("num_attention_heads * attention_head_dim", dim, 1, MAX_SIZE)
        check_number("mlp_ratio", mlp_ratio, 2 / dim, MAX_RATIO)  # a hidden layer of at least one unit
        ff_inner_dim = int(mlp_ratio * dim) * 2 // 3
        if adaln_lora_dim is None:
            adaln_lora_dim = max(dim // 4, 1)
        check_at_least("adaln_lora_dim", adaln_lora_dim, 1, MAX_SIZE)
        if prior_embed_dim is not None:
            check_at_least("prior_embed_dim", prior_embed_dim, 1, MAX_SIZE)
        self._check_pos_interpolation(pos_interpolation, pos_interpolation_decoupled)

        self.inner_dim = dim
        self.out_channels = in_channels

        self.x_embedder = nn.Linear(in_channels * patch_size**2, dim)
        self.pos_embed = DoDRotaryPosEmbed(attention_head_dim)
        self.time_embed = DoDTimestepEmbedding(dim)
        self.class_embed = nn.Embedding(num_classes + 1, dim)
        if prior_embed_dim is not None:
            self.sample_token = nn.Parameter(torch.empty(1, dim))
            self.prior_proj = PixArtAlphaTextProjection(prior_embed_dim, dim, act_fn="silu")
        self.adaln_global = nn.Linear(dim, 6 * dim)
        self.transformer_blocks = nn.ModuleList(
            [
                DoDTransformerBlock(dim, num_attention_heads, attention_head_dim, ff_inner_dim, adaln_lora_dim)
                for _ in range(num_layers)
            ]
        )
        self.norm_out = PlainLayerNorm(dim)
        self.adaln_out = nn.Linear(dim, 2 * dim)
        self.proj_out = nn.Linear(dim, in_channels * patch_size**2)

        self.gradient_checkpointing = False
        self._init_weights()

    def _init_weights(self) -> None:
        """Draws Xavier-uniform Linears and N(0, 0.02) embeddings; modulation and output layers start at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for weight in (
            self.class_embed.weight,
            self.time_embed.mlp.linear_1.weight,
            self.time_embed.mlp.linear_2.weight,
        ):
            nn.init.normal_(weight, std=0.02)
        if self.config.prior_embed_dim is not None:
            nn.init.normal_(self.sample_token, std=0.02)
        zero_layers = [block.adaln_up for block in self.transformer_blocks]
        for layer in [*zero_layers, self.adaln_global, self.adaln_out, self.proj_out]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, num_classes: int | None = None, **kwargs: Any
    ):
        """
        Loads a model as `ModelMixin.from_pretrained` does, optionally with a label table for other classes.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A folder or a repository on the Hub.
            num_classes (`int`, *optional*):
                Number of classes to fine-tune on. If it differs from the saved number, the label table is resized, see
                `resize_class_embed`.
            kwargs: Passed on to [`DoDModelMixin.from_pretrained`].

        Raises:
            `OSError`, `ValueError`: see [`DoDModelMixin.from_pretrained`].
        """
        if num_classes is not None:
            check_at_least("num_classes", num_classes, 1)
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if num_classes not in (None, model.config.num_classes):
            model.resize_class_embed(num_classes)
        return loaded

    def enable_cache(self, config: Any) -> None:
        """
        Enables one of Diffusers' caches as `CacheMixin.enable_cache` does.

        Args:
            config (`FirstBlockCacheConfig`, `PyramidAttentionBroadcastConfig`, ...): Settings of the cache.

        Raises:
            `ValueError`: a `FasterCacheConfig` lacks `is_guidance_distilled=True`.
        """
        if isinstance(config, FasterCacheConfig) and not config.is_guidance_distilled:
            raise ValueError(
                "`is_guidance_distilled` of a `FasterCacheConfig` must be True, got False: else FasterCache takes one "
                "half of every batch for unconditional, and here only samples that are guided have such a prediction."
            )
        super().enable_cache(config)

    def resize_class_embed(self, num_classes: int, source_classes: Sequence[int | None] | None = None) -> None:
        """
        Replaces the label table by one for other classes; the null class keeps its row.

        Each class starts as a copy of a class that the model knows, by default of the null class, which stands for
        images of any class. Nothing but the table changes.

        Args:
            num_classes (`int`): Number of classes from now on, >= 1.
            source_classes (`Sequence[int | None]`, *optional*):
                For each new class the old class to copy; `None` is the null class. All `None` by default.

        Raises:
            `ValueError`, `TypeError`: an argument is out of range or of the wrong type.
        """
        check_at_least("num_classes", num_classes, 1)
        null_class = self.config.num_classes
        sources = [None] * num_classes if source_classes is None else list(source_classes)
        if len(sources) != num_classes:
            raise ValueError(f"`source_classes` must hold {num_classes} classes, got {len(sources)}.")
        for source in sources:
            if source is not None:
                check_at_least("source_classes", source, 0)
                if source >= null_class:
                    raise ValueError(f"`source_classes` must be None or in [0, {null_class - 1}], got {source}.")
        rows = torch.tensor([null_class if source is None else source for source in [*sources, None]])
        old = self.class_embed.weight
        table = nn.Embedding(num_classes + 1, self.inner_dim, device=old.device, dtype=old.dtype)
        table.weight = nn.Parameter(old.detach()[rows.to(old.device)], requires_grad=old.requires_grad)
        self.class_embed = table
        self.register_to_config(num_classes=num_classes)

    def _conditioning(
        self,
        timestep: torch.Tensor,  # (B,)
        class_labels: torch.Tensor,  # (B,)
        prior_embeds: torch.Tensor | None,  # (K, T, d_l)
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """SiLU(c) with c = time + class + (projected prior of the token or S) (paper, Eq. 5): (K * T + B - K, d)."""
        embedding = self.time_embed(timestep)
        embedding = embedding + self.class_embed(class_labels).to(embedding.dtype)  # (B, d)
        if self.config.prior_embed_dim is not None:
            num_priors = 0 if prior_embeds is None else prior_embeds.shape[0]
            rows = [embedding[num_priors:] + self.sample_token] if num_priors < embedding.shape[0] else []
            if num_priors > 0:
                rows = [(embedding[:num_priors, None] + self.prior_proj(prior_embeds)).flatten(0, 1), *rows]
            embedding = torch.cat(rows) if len(rows) > 1 else rows[0]
        return nn.functional.silu(embedding).to(dtype)

    def _check_inputs(self, hidden_states, timestep, class_labels, prior_embeds) -> None:
        config = self.config
        check_type("class_labels", class_labels, torch.Tensor)
        check_type("prior_embeds", prior_embeds, (torch.Tensor, type(None)))
        if class_labels.is_floating_point() or class_labels.is_complex() or class_labels.dtype == torch.bool:
            raise TypeError(f"`class_labels` must be integers, got {class_labels.dtype}.")
        check_latents("hidden_states", hidden_states, config.in_channels, config.patch_size)
        batch_size, _, height, width = hidden_states.shape
        if timestep.ndim > 1 or (timestep.ndim == 1 and timestep.shape[0] not in (1, batch_size)):
            raise ValueError(f"`timestep` must be a scalar or of shape ({batch_size},), got {tuple(timestep.shape)}.")
        if class_labels.shape != (batch_size,):
            raise ValueError(f"`class_labels` must have shape ({batch_size},), got {tuple(class_labels.shape)}.")
        # On an accelerator the check would wait for it; pipeline and trainer check labels before they go there. Labels
        # that are only traced or counted have no values.
        has_values = not torch.compiler.is_compiling() and type(class_labels) is torch.Tensor
        if has_values and class_labels.device.type == "cpu":
            check_label_ids("class_labels", class_labels, config.num_classes)
        if prior_embeds is None:
            return
        if config.prior_embed_dim is None:
            raise ValueError(
                "`prior_embeds` must be None: this model has `prior_embed_dim=None` (a plain FiTv2), "
                f"got a tensor of shape {tuple(prior_embeds.shape)}."
            )
        num_tokens = (height // config.patch_size) * (width // config.patch_size)
        if (
            prior_embeds.ndim != 3
            or prior_embeds.shape[0] > batch_size
            or tuple(prior_embeds.shape[1:]) != (num_tokens, config.prior_embed_dim)
        ):
            raise ValueError(
                f"`prior_embeds` must have shape (K, {num_tokens}, {config.prior_embed_dim}) with "
                f"0 <= K <= {batch_size}, got {tuple(prior_embeds.shape)}."
            )

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor,
        prior_embeds: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        output_hidden_states: bool = False,
    ) -> DoDTransformerOutput | tuple[torch.Tensor, ...]:
        """
        Predicts the velocity (noise - data) of noisy latents.

        Args:
            hidden_states (`torch.Tensor` of shape `(B, C, H, W)`): Noisy latents.
            timestep (`float` or `torch.Tensor` of shape `()` or `(B,)`):
                Time 1000 * sigma in [0, 1000], 0 = data. Kept in fp32.
            class_labels (`torch.Tensor` of shape `(B,)`): Class ids in [0, num_classes]; `num_classes` is the null
                class. Their range is checked on a CPU alone: elsewhere this would wait for the device.
            prior_embeds (`torch.Tensor` of shape `(K, T, prior_embed_dim)`, *optional*):
                Visual priors of the *first* K samples, 0 <= K <= B, T = H/p * W/p. The other samples get the sample
                token S.
            attention_kwargs (`dict`, *optional*):
                `scale` scales LoRA adapters. Everything else goes to the attention processors.
            return_dict (`bool`, defaults to `True`): Whether to return a [`DoDTransformerOutput`].
            output_hidden_states (`bool`, defaults to `False`):
                Whether to return also the tokens after the embedding and after each block.

        Returns:
            [`DoDTransformerOutput`], or the tuple `(sample,)`; with the hidden states, `(sample, hidden_states)`.

        Raises:
            `ValueError`, `TypeError`: a shape or a type does not fit, or a label is out of range.
        """
        if not isinstance(timestep, torch.Tensor):
            check_type("timestep", timestep, (Real, torch.Tensor))
            timestep = torch.tensor(timestep, dtype=torch.float32)
        self._check_inputs(hidden_states, timestep, class_labels, prior_embeds)
        batch_size, _, height, width = hidden_states.shape
        patch_size = self.config.patch_size
        timestep = timestep.to(hidden_states.device).expand(batch_size)

        image_rotary_emb = self.pos_embed(
            height // patch_size,
            width // patch_size,
            hidden_states.device,
            trained_size=self.config.sample_size // patch_size,
            pos_interpolation=self.config.pos_interpolation,
            pos_interpolation_decoupled=self.config.pos_interpolation_decoupled,
        )
        hidden_states = hidden_states.to(self.x_embedder.weight.dtype)
        hidden_states = self._for_blocks(self.x_embedder(patchify(hidden_states, patch_size)))  # (B, T, d)
        conditioning = self._conditioning(timestep, class_labels, prior_embeds, hidden_states.dtype)
        global_modulation = self.adaln_global(conditioning)
        num_priors = 0 if prior_embeds is None else prior_embeds.shape[0]

        all_hidden_states = (hidden_states,) if output_hidden_states else None
        arguments = (conditioning, global_modulation, num_priors, image_rotary_emb, attention_kwargs)
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, *arguments)
            else:
                hidden_states = block(hidden_states, *arguments)
            if output_hidden_states:
                all_hidden_states += (hidden_states,)

        shift, scale = split_rows(self.adaln_out(conditioning), num_priors, hidden_states.shape[1], 2)
        hidden_states = self.proj_out(modulate(self.norm_out(hidden_states), shift, scale))
        sample = unpatchify(hidden_states, patch_size, height, width)

        if not return_dict:
            return (sample, all_hidden_states) if output_hidden_states else (sample,)
        return DoDTransformerOutput(sample=sample, hidden_states=all_hidden_states)


# Diffusers' block caches (FirstBlockCache, MagCache) must know what a block returns: the hidden states alone.
TransformerBlockRegistry.register(DoDTransformerBlock, TransformerBlockMetadata(return_hidden_states_index=0))
