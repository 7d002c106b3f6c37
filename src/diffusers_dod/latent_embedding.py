# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Encoders of the visual prior: latents -> a few narrow tokens -> a visual prior per patch.

The paper's own is the Latent Embedding Module (Section 3.2). Any other [`VisualPriorMixin`] can take its place.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, FeedForward
from diffusers.models.embeddings import get_1d_sincos_pos_embed_from_grid
from diffusers.models.normalization import FP32LayerNorm
from diffusers.utils import BaseOutput, apply_lora_scale
from diffusers.utils.accelerate_utils import apply_forward_hook

from .checks import MAX_SIZE, check_at_least, check_latents, check_number, check_tensor
from .modeling_utils import DoDModelMixin
from .pos_interpolation import PosInterpolationMixin, PositionTables, grid_scales, interpolate_frequencies
from .transformer_dod import (
    MAX_LAYERS,
    MAX_RATIO,
    DoDAttention,
    DoDTransformer2DModel,
    patchify,
)


@dataclass
class LatentEmbeddingOutput(BaseOutput):
    """
    Output of [`LatentEmbeddingModule`] and of any other [`VisualPriorMixin`].

    Args:
        prior_embeds (`torch.Tensor` of shape `(B, T, inner_dim)`): The visual prior e_s of every patch (paper, Eq. 7).
        latent_tokens (`torch.Tensor` of shape `(B, num_latent_tokens, latent_token_dim)`, *optional*):
            The code (paper, Eq. 6). Models always return it.
    """

    prior_embeds: torch.Tensor
    latent_tokens: torch.Tensor | None = None  # never None; the default lets accelerate's hooks rebuild the output


def sincos_pos_embed(
    dim: int,
    rows: int,
    columns: int,
    device: torch.device,
    dtype: torch.dtype,
    trained_size: int | None = None,
    pos_interpolation: str = "none",
    pos_interpolation_decoupled: bool = False,
) -> torch.Tensor:
    """
    Frozen 2D sine-cosine positions: [sin column, cos column, sin row, cos row].

    Args:
        dim (`int`): Width of an embedding, a multiple of 4.
        rows (`int`): Rows of the grid.
        columns (`int`): Columns of the grid.
        device (`torch.device`): Device of the result.
        dtype (`torch.dtype`): Dtype of the result.
        trained_size (`int`, *optional*): Rows of the trained grid, equal to its columns. Interpolation needs it.
        pos_interpolation (`str`, defaults to `"none"`): Mode of interpolation, see [`interpolate_frequencies`].
        pos_interpolation_decoupled (`bool`, defaults to `False`):
            Whether rows and columns are scaled separately, see [`grid_scales`].

    Returns:
        `torch.Tensor` of shape `(rows * columns, dim)`, row-major.
    """
    scales = (1.0, 1.0)
    if pos_interpolation != "none":
        scales = grid_scales(rows, columns, trained_size, pos_interpolation_decoupled)
    row = torch.arange(rows, device=device).repeat_interleave(columns)
    column = torch.arange(columns, device=device).repeat(rows)
    parts = []
    for position, scale in ((column, scales[1]), (row, scales[0])):
        if scale == 1:
            parts.append(get_1d_sincos_pos_embed_from_grid(dim // 2, position, output_type="pt"))
            continue
        exponents = torch.arange(dim // 4, device=device, dtype=torch.float32) / (dim // 4)
        frequencies = interpolate_frequencies(10000**-exponents, scale, pos_interpolation, trained_size)
        angles = torch.outer(position.float(), frequencies)
        parts.append(torch.cat([angles.sin(), angles.cos()], dim=1))
    return torch.cat(parts, dim=-1).to(dtype)


def _apply_offload_hooks(method: Callable) -> Callable:
    """Runs offloading hooks around a method other than `forward`; group offloading knows `forward` only."""

    @functools.wraps(method)
    def wrapper(self, *args, **kwargs):
        registry = getattr(self, "_diffusers_hook", None)
        hook = None if registry is None else registry.get_hook("group_offloading")
        if hook is None:
            return method(self, *args, **kwargs)
        args, kwargs = hook.pre_forward(self, *args, **kwargs)
        return hook.post_forward(self, method(self, *args, **kwargs))

    return apply_forward_hook(wrapper)


def _check_attention_kwargs(attention_kwargs: dict[str, Any] | None) -> None:
    """Raises if anything is left once `apply_lora_scale` has taken `scale` out."""
    if attention_kwargs:
        raise ValueError(f"`attention_kwargs` must hold nothing but 'scale', got {attention_kwargs}.")


class VisualPriorMixin(DoDModelMixin, PeftAdapterMixin, ABC):
    r"""
    Interface of an encoder of visual priors, for the pipeline, training and evaluation.

    An encoder of one's own is a class with this base. Its constructor, under `register_to_config`, takes at least
    `patch_size` and `in_channels` of the latents, and sets two attributes:

    - `inner_dim` (`int`): Width of a visual prior, the same as the backbone's `prior_embed_dim`.
    - `token_shape` (`tuple[int, int]`): Number and width of the latent tokens.

    It defines [`~VisualPriorMixin.encode`] and [`~VisualPriorMixin.decode`]. Saved pipelines name the class. They can
    be loaded once the module that defines it has been imported; no file makes anything import it.
    """

    inner_dim: int
    token_shape: tuple[int, int]

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        for name in ("encode", "decode"):
            if name in vars(cls):
                setattr(cls, name, _apply_offload_hooks(vars(cls)[name]))

    @abstractmethod
    def encode(self, latents: torch.Tensor, attention_kwargs: dict[str, Any] | None = None) -> torch.Tensor:
        """
        Compresses latents into latent tokens (paper, Eq. 6).

        Args:
            latents (`torch.Tensor` of shape `(B, C, H, W)`): Clean, normalised latents of any floating dtype.
            attention_kwargs (`dict`, *optional*): `scale` is that of LoRA adapters.

        Returns:
            `torch.Tensor` of shape `(B, *token_shape)`.
        """

    @abstractmethod
    def decode(
        self, latent_tokens: torch.Tensor, height: int, width: int, attention_kwargs: dict[str, Any] | None = None
    ) -> torch.Tensor:
        """
        Spreads latent tokens over the patches (paper, Eq. 7).

        Args:
            latent_tokens (`torch.Tensor` of shape `(B, *token_shape)`): The code, of any floating dtype.
            height (`int`): Height in latent pixels, a multiple of `patch_size`.
            width (`int`): Width in latent pixels, a multiple of `patch_size`.
            attention_kwargs (`dict`, *optional*): `scale` is that of LoRA adapters.

        Returns:
            `torch.Tensor` of shape `(B, T, inner_dim)` with T = height/p * width/p patches, row by row.
        """

    @apply_lora_scale("attention_kwargs")
    def forward(
        self, latents: torch.Tensor, attention_kwargs: dict[str, Any] | None = None, return_dict: bool = True
    ) -> LatentEmbeddingOutput | tuple[torch.Tensor, torch.Tensor]:
        """
        Extracts the visual prior of latents: `decode(encode(latents))`.

        Args:
            latents (`torch.Tensor` of shape `(B, C, H, W)`): Clean, normalised latents.
            attention_kwargs (`dict`, *optional*): `scale` is that of LoRA adapters; nothing else is known here.
            return_dict (`bool`, defaults to `True`): Whether to return a [`LatentEmbeddingOutput`].

        Returns:
            [`LatentEmbeddingOutput`], or the tuple `(prior_embeds, latent_tokens)`.

        Raises:
            `ValueError`: the shape does not fit, or `attention_kwargs` holds anything but `scale`.
        """
        _check_attention_kwargs(attention_kwargs)
        latent_tokens = self.encode(latents)
        prior_embeds = self.decode(latent_tokens, *latents.shape[2:])
        if not return_dict:
            return prior_embeds, latent_tokens
        return LatentEmbeddingOutput(prior_embeds=prior_embeds, latent_tokens=latent_tokens)


def list_visual_prior_classes() -> list[type[VisualPriorMixin]]:
    """Lists all encoder classes in modules that have been imported."""
    classes: list[type[VisualPriorMixin]] = [VisualPriorMixin]
    for cls in classes:  # grows
        classes += cls.__subclasses__()
    return classes[1:]


def find_visual_prior_class(name: str) -> type[VisualPriorMixin]:
    """
    Finds an encoder class by its name in a saved pipeline.

    Args:
        name (`str`): Name of a [`VisualPriorMixin`] in a module that has been imported.

    Returns:
        `type[VisualPriorMixin]`: The class that was defined last, if several have the name.

    Raises:
        `ValueError`: there is no such class, or its module has not been imported.
    """
    known = {cls.__name__: cls for cls in list_visual_prior_classes()}
    if name not in known:
        raise ValueError(
            f"`latent_embedder` must be of a class that has been imported ({', '.join(sorted(known))}), got {name!r}: "
            "import the module that defines it first."
        )
    return known[name]


def check_visual_prior(latent_embedder: VisualPriorMixin, transformer: DoDTransformer2DModel) -> None:
    """
    Raises unless an encoder of visual priors has the interface and fits the backbone.

    Args:
        latent_embedder ([`VisualPriorMixin`]): The encoder.
        transformer ([`DoDTransformer2DModel`]): The backbone.

    Raises:
        `TypeError`: an attribute is missing.
        `ValueError`: the two have other widths, channels or patches.
    """
    for name in ("inner_dim", "token_shape"):
        if not hasattr(latent_embedder, name):
            raise TypeError(
                f"`latent_embedder` must have the attribute `{name}`, got {type(latent_embedder).__name__}."
            )
    for name, argument, received in (
        ("width", "prior_embed_dim", latent_embedder.inner_dim),
        ("in_channels", "in_channels", latent_embedder.config.get("in_channels")),
        ("patch_size", "patch_size", latent_embedder.config.get("patch_size")),
    ):
        expected = transformer.config[argument]
        if received != expected:
            raise ValueError(
                f"`latent_embedder` must have the {name} {expected}, the transformer's `{argument}`, got {received}."
            )


class LatentEmbeddingBlock(nn.Module):
    """
    A pre-norm vision transformer block: plain self-attention and a GELU MLP.

    Args:
        dim (`int`): Width of the tokens.
        num_attention_heads (`int`): Number of attention heads.
        attention_head_dim (`int`): Width of a head.
        mlp_ratio (`float`): Width of the MLP divided by `dim`.
    """

    def __init__(self, dim: int, num_attention_heads: int, attention_head_dim: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = FP32LayerNorm(dim, eps=1e-6)
        self.attn = DoDAttention(dim, num_attention_heads, attention_head_dim, qk_norm=False)
        self.norm2 = FP32LayerNorm(dim, eps=1e-6)
        self.ff = FeedForward(dim, inner_dim=int(mlp_ratio * dim), activation_fn="gelu")

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Maps `hidden_states` (B, T, dim) to the same shape."""
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states))
        return hidden_states + self.ff(self.norm2(hidden_states))


class LatentEmbeddingModule(VisualPriorMixin, AttentionMixin, PosInterpolationMixin):
    r"""
    The Latent Embedding Module (LEM): compresses clean latents into a few tokens and makes a visual prior of them.

    The encoder gives `num_latent_tokens` tokens of width `latent_token_dim` (paper, Eq. 6). The decoder spreads them
    over the patches, as one visual prior per patch (Eq. 7).

    Args:
        sample_size (`int`, defaults to 32):
            Height and width of the latents that the module was trained on. It takes any height and width.
        patch_size (`int`, defaults to 2): Side of a patch in latent pixels, the same as the backbone's.
        in_channels (`int`, defaults to 4): Channels of the latents.
        num_latent_tokens (`int`, defaults to 32): Number N of latent tokens.
        latent_token_dim (`int`, defaults to 16): Width d_e of a latent token, a multiple of 4.
        num_encoder_layers (`int`, defaults to 8): Transformer blocks of the encoder.
        num_decoder_layers (`int`, defaults to 4): Transformer blocks of the decoder.
        num_attention_heads (`int`, defaults to 12): Number of attention heads.
        attention_head_dim (`int`, defaults to 64):
            Width of a head. The module's width d_l is `num_attention_heads` times this. It must be a multiple of 4 and
            equal the backbone's `prior_embed_dim`.
        mlp_ratio (`float`, defaults to 4.0): Width of the blocks' MLP divided by d_l.
        pos_interpolation (`str`, defaults to `"none"`):
            Treatment of positions on grids larger than the trained one: `"none"`, `"linear"`, `"ntk"` or `"yarn"`, see
            `set_pos_interpolation`.
        pos_interpolation_decoupled (`bool`, defaults to `False`): Whether rows and columns are scaled separately.

    Raises:
        `ValueError`, `TypeError`: an argument is out of range or of the wrong type.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["LatentEmbeddingBlock"]
    _repeated_blocks = ["LatentEmbeddingBlock"]
    _skip_layerwise_casting_patterns = ["x_embedder", "to_latent", "from_latent", "norm"]
    _skip_quantization_modules = ["to_latent", "from_latent"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        num_latent_tokens: int = 32,
        latent_token_dim: int = 16,
        num_encoder_layers: int = 8,
        num_decoder_layers: int = 4,
        num_attention_heads: int = 12,
        attention_head_dim: int = 64,
        mlp_ratio: float = 4.0,
        pos_interpolation: str = "none",
        pos_interpolation_decoupled: bool = False,
    ):
        super().__init__()
        self._check_pos_interpolation(pos_interpolation, pos_interpolation_decoupled)
        for name, value in {
            "sample_size": sample_size,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "num_latent_tokens": num_latent_tokens,
            "latent_token_dim": latent_token_dim,
            "num_encoder_layers": num_encoder_layers,
            "num_decoder_layers": num_decoder_layers,
            "num_attention_heads": num_attention_heads,
            "attention_head_dim": attention_head_dim,
        }.items():
            check_at_least(name, value, 1, MAX_LAYERS if "layers" in name else MAX_SIZE)
        check_at_least(
            "num_attention_heads * attention_head_dim", num_attention_heads * attention_head_dim, 1, MAX_SIZE
        )
        minimum = 1 / (num_attention_heads * attention_head_dim)  # at least one unit
        check_number("mlp_ratio", mlp_ratio, minimum, MAX_RATIO)
        if sample_size % patch_size:
            raise ValueError(f"`sample_size` must be a multiple of `patch_size` = {patch_size}, got {sample_size}.")
        dim = num_attention_heads * attention_head_dim
        if dim % 4:
            raise ValueError(
                "`num_attention_heads` * `attention_head_dim` must be a multiple of 4 (2D sine-cosine positions), "
                f"got {num_attention_heads} * {attention_head_dim}."
            )
        if latent_token_dim % 4:
            raise ValueError(
                f"`latent_token_dim` must be a multiple of 4 (2D sine-cosine positions), got {latent_token_dim}."
            )
        self.inner_dim = dim
        self.token_shape = (num_latent_tokens, latent_token_dim)
        self._tables = PositionTables()

        def blocks(num_layers: int) -> nn.ModuleList:
            return nn.ModuleList(
                [
                    LatentEmbeddingBlock(dim, num_attention_heads, attention_head_dim, mlp_ratio)
                    for _ in range(num_layers)
                ]
            )

        self.x_embedder = nn.Linear(in_channels * patch_size**2, dim)
        self.latent_queries = nn.Parameter(torch.empty(num_latent_tokens, dim))
        self.encoder_blocks = blocks(num_encoder_layers)
        self.encoder_norm = FP32LayerNorm(dim, eps=1e-6)
        self.to_latent = nn.Linear(dim, latent_token_dim)
        self.mask_token = nn.Parameter(torch.empty(latent_token_dim))
        self.from_latent = nn.Linear(latent_token_dim, dim)
        self.decoder_blocks = blocks(num_decoder_layers)
        self.decoder_norm = FP32LayerNorm(dim, eps=1e-6)
        self.proj_out = nn.Linear(dim, dim)

        self.gradient_checkpointing = False
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.latent_queries, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def _run_blocks(self, blocks: nn.ModuleList, hidden_states: torch.Tensor) -> torch.Tensor:
        for block in blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states)
            else:
                hidden_states = block(hidden_states)
        return hidden_states

    def _pos_embed(self, dim: int, rows: int, columns: int, tokens: torch.Tensor) -> torch.Tensor:
        config = self.config
        key = (
            dim,
            rows,
            columns,
            tokens.device,
            tokens.dtype,
            config.sample_size // config.patch_size,
            config.pos_interpolation,
            config.pos_interpolation_decoupled,
        )
        return self._tables.find(key, lambda: sincos_pos_embed(*key))

    @apply_lora_scale("attention_kwargs")
    def encode(self, latents: torch.Tensor, attention_kwargs: dict[str, Any] | None = None) -> torch.Tensor:
        """
        Compresses latents into latent tokens (paper, Eq. 6): Linear(Enc((patches + PE) (+) queries)).

        Args:
            latents (`torch.Tensor` of shape `(B, C, H, W)`): Clean, normalised latents.
            attention_kwargs (`dict`, *optional*): `scale` is that of LoRA adapters; nothing else is known here.

        Returns:
            `torch.Tensor` of shape `(B, num_latent_tokens, latent_token_dim)`.

        Raises:
            `ValueError`: the shape does not fit, or `attention_kwargs` holds anything but `scale`.
        """
        _check_attention_kwargs(attention_kwargs)
        patch_size = self.config.patch_size
        check_latents("latents", latents, self.config.in_channels, patch_size)
        rows, columns = latents.shape[2] // patch_size, latents.shape[3] // patch_size
        latents = latents.to(self.x_embedder.weight.dtype)
        patches = self.x_embedder(patchify(latents, patch_size))  # (B, T, d_l)
        patches = patches + self._pos_embed(self.inner_dim, rows, columns, patches)
        queries = self.latent_queries.to(patches.dtype).expand(patches.shape[0], -1, -1)
        hidden_states = torch.cat([patches, queries], dim=1)  # (B, T + N, d_l)
        hidden_states = self._run_blocks(self.encoder_blocks, hidden_states)
        return self.to_latent(self.encoder_norm(hidden_states[:, patches.shape[1] :]))

    @apply_lora_scale("attention_kwargs")
    def decode(
        self, latent_tokens: torch.Tensor, height: int, width: int, attention_kwargs: dict[str, Any] | None = None
    ) -> torch.Tensor:
        """
        Spreads latent tokens over the patches (paper, Eq. 7): Linear(Dec((mask + PE) (+) tokens)).

        Args:
            latent_tokens (`torch.Tensor` of shape `(B, num_latent_tokens, latent_token_dim)`): The code.
            height (`int`): Height in latent pixels, a multiple of `patch_size`.
            width (`int`): Width in latent pixels, a multiple of `patch_size`.
            attention_kwargs (`dict`, *optional*): `scale` is that of LoRA adapters; nothing else is known here.

        Returns:
            `torch.Tensor` of shape `(B, T, inner_dim)` with T = height/p * width/p.

        Raises:
            `ValueError`, `TypeError`: a shape or size does not fit, or `attention_kwargs` holds anything but `scale`.
        """
        _check_attention_kwargs(attention_kwargs)
        config = self.config
        check_tensor("latent_tokens", latent_tokens)
        if latent_tokens.ndim != 3 or tuple(latent_tokens.shape[1:]) != self.token_shape:
            raise ValueError(
                f"`latent_tokens` must have shape (batch, {self.token_shape[0]}, {self.token_shape[1]}), "
                f"got {tuple(latent_tokens.shape)}."
            )
        for name, size in {"height": height, "width": width}.items():
            if not isinstance(size, torch.SymInt):  # torch.export passes one in place of an int
                check_at_least(name, size, 1)
            if size % config.patch_size:
                raise ValueError(f"`{name}` must be a multiple of `patch_size` = {config.patch_size}, got {size}.")
        latent_tokens = latent_tokens.to(self.from_latent.weight.dtype)
        rows, columns = height // config.patch_size, width // config.patch_size
        position = self._pos_embed(config.latent_token_dim, rows, columns, latent_tokens)
        mask_tokens = (self.mask_token.to(latent_tokens.dtype) + position).expand(latent_tokens.shape[0], -1, -1)
        hidden_states = self.from_latent(torch.cat([mask_tokens, latent_tokens], dim=1))  # (B, T + N, d_l)
        hidden_states = self._for_blocks(hidden_states)
        hidden_states = self._run_blocks(self.decoder_blocks, hidden_states)
        return self.proj_out(self.decoder_norm(hidden_states[:, : rows * columns]))
