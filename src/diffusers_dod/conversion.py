# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""FiTv2 weights as weights of [`DoDTransformer2DModel`]."""

import math
import re

import torch


# FiTv2's name -> ours, for what is only renamed. `{}` is the index of the block.
_RENAMED = {
    "x_embedder.proj": "x_embedder",
    "t_embedder.mlp.2": "time_embed.mlp.linear_2",
    "global_adaLN_modulation.1": "adaln_global",
    "final_layer.adaLN_modulation.1": "adaln_out",
    "blocks.{}.attn.proj": "transformer_blocks.{}.attn.to_out.0",
    "blocks.{}.mlp.fc2": "transformer_blocks.{}.ff.net.2",
    "blocks.{}.adaLN_modulation.1": "transformer_blocks.{}.adaln_down",
    "blocks.{}.adaLN_modulation.2": "transformer_blocks.{}.adaln_up",
}
# What is changed on the way: the sign, the time, and matrices that are split or joined.
_OUTPUT = "final_layer.linear"
_FIRST_TIME_LAYER = "t_embedder.mlp.0"
_CLASS_TABLE = "y_embedder.embedding_table"
_QKV = "blocks.{}.attn.qkv"
_SWIGLU_VALUE, _SWIGLU_GATE = "blocks.{}.mlp.fc1_x", "blocks.{}.mlp.fc1_g"


def reverse_time(weight: torch.Tensor) -> torch.Tensor:
    """
    Rewrites the first Linear of the time MLP, (d, 2n) on the features [cos(f t), sin(f t)], for the time 1 - t.

    cos(f (1 - t)) and sin(f (1 - t)) are combinations of cos(f t) and sin(f t), so the new weight gives exactly the
    old output. Applying it twice gives the weight back. Computed in fp64.
    """
    half = weight.shape[1] // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64) / half)
    cos, sin = torch.cos(frequencies), torch.sin(frequencies)
    weight_cos, weight_sin = weight.double().split(half, dim=1)
    reversed_weight = torch.cat([weight_cos * cos + weight_sin * sin, weight_cos * sin - weight_sin * cos], dim=1)
    return reversed_weight.to(weight.dtype)


def fitv2_to_dod(state_dict: dict[str, torch.Tensor], prior_embed_dim: int | None = None) -> dict[str, torch.Tensor]:
    """
    Maps the weights of a FiTv2 model to [`DoDTransformer2DModel`].

    FiTv2 predicts data - noise at the time t = 1 - sigma. Both differences are absorbed into the weights: the last
    Linear changes its sign, and the first one of the time MLP is rewritten by [`reverse_time`].

    Args:
        state_dict (`dict`): FiTv2's weights under its own names.
        prior_embed_dim (`int`, *optional*):
            Adds the sample token S = 0 and a projection of priors of this width whose last layer is zero, so that the
            training of a DoD starts from exactly this FiTv2.

    Returns:
        `dict`: weights for a `DoDTransformer2DModel` of the same size and `prior_embed_dim`.

    Raises:
        `ValueError`: names are missing or unknown.
    """
    blocks = sorted({int(match[1]) for key in state_dict if (match := re.match(r"blocks\.(\d+)\.", key))})
    if blocks != list(range(len(blocks))) or not blocks:
        raise ValueError(f"`state_dict` must have blocks 0, 1, ... of a FiTv2 model, got blocks {blocks}.")
    remaining = dict(state_dict)
    converted: dict[str, torch.Tensor] = {}

    def take(name: str) -> torch.Tensor:
        if name not in remaining:
            raise ValueError(f"`state_dict` must hold the weights of a FiTv2 model, got none named {name!r}.")
        return remaining.pop(name)

    for fit_name, our_name in _RENAMED.items():
        for index in blocks if "{}" in fit_name else [0]:
            for kind in ("weight", "bias"):
                converted[f"{our_name.format(index)}.{kind}"] = take(f"{fit_name.format(index)}.{kind}")

    converted["class_embed.weight"] = take(f"{_CLASS_TABLE}.weight")
    converted["time_embed.mlp.linear_1.weight"] = reverse_time(take(f"{_FIRST_TIME_LAYER}.weight"))
    converted["time_embed.mlp.linear_1.bias"] = take(f"{_FIRST_TIME_LAYER}.bias")
    for kind in ("weight", "bias"):
        converted[f"proj_out.{kind}"] = -take(f"{_OUTPUT}.{kind}")
        for index in blocks:
            qkv = take(f"{_QKV.format(index)}.{kind}")
            for name, part in zip(("to_q", "to_k", "to_v"), qkv.chunk(3), strict=True):
                converted[f"transformer_blocks.{index}.attn.{name}.{kind}"] = part.clone()
            value = take(f"{_SWIGLU_VALUE.format(index)}.{kind}")
            gate = take(f"{_SWIGLU_GATE.format(index)}.{kind}")
            converted[f"transformer_blocks.{index}.ff.net.0.proj.{kind}"] = torch.cat([value, gate])
    if remaining:
        raise ValueError(f"`state_dict` must hold nothing but a FiTv2 model, got also {sorted(remaining)}.")

    if prior_embed_dim is not None:
        like = converted["x_embedder.weight"]
        dim = like.shape[0]
        first = torch.empty(dim, prior_embed_dim, dtype=like.dtype, device=like.device)
        converted["sample_token"] = like.new_zeros(1, dim)
        converted["prior_proj.linear_1.weight"] = torch.nn.init.xavier_uniform_(first)
        converted["prior_proj.linear_1.bias"] = like.new_zeros(dim)
        converted["prior_proj.linear_2.weight"] = like.new_zeros(dim, dim)
        converted["prior_proj.linear_2.bias"] = like.new_zeros(dim)
    return converted
