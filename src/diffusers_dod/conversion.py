# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Converts FiTv2 checkpoints to pipelines, and back.

    python -m diffusers_dod.conversion --checkpoint_path FiTv2_XL/model_ema.safetensors \
        --config config_fitv2_xl.yaml --vae path/to/sd-vae-ft-ema --output_dir fitv2-xl
    python -m diffusers_dod.conversion --to fitv2 --checkpoint_path fitv2-xl --output_dir fitv2-xl-original

The first command writes a complete [`DoDPipeline`] of one stage. The second one writes `model.safetensors` and
`config.json` for FiT.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.utils import logging
from safetensors.torch import load_file, save_file

from .checks import abbreviate, check_at_least, check_choice
from .command_line import run_main
from .files import replacing, replacing_contents, write_json
from .options import find_given, option, parse_options
from .pipeline_dod import DoDPipeline
from .presets import PRESETS
from .records import check_safetensors_header, parse_json, read_yaml
from .scheduling_dod import DoDFlowMatchScheduler
from .transformer_dod import DoDTransformer2DModel


logger = logging.get_logger(__name__)

# FiTv2's layers -> ours; `{}` is the index of the block. Each layer has a weight and a bias, the class table only a
# weight. Where a side names several layers, their rows are concatenated.
_CLASS_TABLE = "y_embedder.embedding_table"
_NAMES = {
    ("x_embedder.proj",): ("x_embedder",),
    ("t_embedder.mlp.0",): ("time_embed.mlp.linear_1",),
    ("t_embedder.mlp.2",): ("time_embed.mlp.linear_2",),
    (_CLASS_TABLE,): ("class_embed",),
    ("global_adaLN_modulation.1",): ("adaln_global",),
    ("blocks.{}.attn.qkv",): tuple(f"transformer_blocks.{{}}.attn.to_{name}" for name in "qkv"),
    ("blocks.{}.attn.proj",): ("transformer_blocks.{}.attn.to_out.0",),
    ("blocks.{}.mlp.fc1_x", "blocks.{}.mlp.fc1_g"): ("transformer_blocks.{}.ff.net.0.proj",),  # value, gate
    ("blocks.{}.mlp.fc2",): ("transformer_blocks.{}.ff.net.2",),
    ("blocks.{}.adaLN_modulation.1",): ("transformer_blocks.{}.adaln_down",),
    ("blocks.{}.adaLN_modulation.2",): ("transformer_blocks.{}.adaln_up",),
    ("final_layer.adaLN_modulation.1",): ("adaln_out",),
    ("final_layer.linear",): ("proj_out",),
}
# Weights that a DoD has and a FiTv2 has not.
_PRIORS = ("sample_token", *(f"prior_proj.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")))

# Checkpoints keep their weights in files of these names, or in one file under these keys. FiT's releases and the
# folders of its training have such files. In the latter `accelerate` numbers the models, and the second is the EMA.
_FILES = {
    "ema": ("model_ema.safetensors", "model_ema.bin", "model_1.safetensors", "pytorch_model_1.bin"),
    "model": ("model.safetensors", "pytorch_model.bin"),
}
_KEYS = {"ema": ("ema", "ema_model"), "model": ("model", "state_dict", "module")}
_PREFIXES = ("module.", "_orig_mod.")  # added by DistributedDataParallel and torch.compile, in any order
_COUNTERS = ("n_averaged",)  # beside the weights, of torch.optim.swa_utils.AveragedModel

# Settings of FiT's configs: the value that a DoD transformer requires, and FiT's default for a missing one.
_FIT_SETTINGS = {
    # name             required      FiT's default
    "use_sit": (True, False),
    "learn_sigma": (False, True),
    "use_swiglu": (True, False),
    "norm_type": ("layernorm", "layernorm"),
    "q_norm": ("layernorm", None),
    "k_norm": ("layernorm", None),
    "qk_norm_weight": (False, False),
    "adaln_type": ("lora", "normal"),
    "rel_pos_embed": ("rope", "rope"),
    "rope_theta": (10000.0, 10000.0),
    "custom_freqs": ("normal", "normal"),
    "add_rel_pe_to_v": (False, False),
    "time_shifting": (1, 1),
}
_FIT_TRANSPORT = {"path_type": "Linear", "prediction": "velocity"}  # required, and FiT's default
# FiT's names of sizes -> FiT's default and our name.
_FIT_SIZES = {
    "depth": (28, "num_layers"),
    "num_heads": (16, "num_attention_heads"),
    "patch_size": (2, "patch_size"),
    "in_channels": (4, "in_channels"),
    "num_classes": (1000, "num_classes"),
    "adaln_lora_dim": (None, "adaln_lora_dim"),
}


Pair = tuple[list[str], list[str]]  # names of the same weights in one model and in the other


def _pairs(num_blocks: int) -> list[Pair]:
    """Pairs of names: FiTv2's weights and ours."""
    return [
        tuple([f"{name.format(index)}.{kind}" for name in names] for names in pair)
        for pair in _NAMES.items()
        for index in (range(num_blocks) if "{}" in pair[0][0] else [0])
        for kind in (("weight", "bias") if pair[0] != (_CLASS_TABLE,) else ("weight",))
    ]


def _count_blocks(state_dict: Mapping[str, torch.Tensor], prefix: str, model: str) -> int:
    blocks = sorted({int(match[1]) for key in state_dict if (match := re.match(rf"{prefix}\.(\d+)\.", key))})
    if blocks != list(range(len(blocks))) or not blocks:
        raise ValueError(f"`state_dict` must have blocks 0, 1, ... of a {model} model, got blocks {blocks}.")
    return len(blocks)


def _check_names(state_dict: Mapping[str, torch.Tensor], names: Sequence[str], model: str) -> None:
    """Raises a `ValueError` unless the weights have exactly these names."""
    if missing := [name for name in names if name not in state_dict]:
        raise ValueError(f"`state_dict` must hold the weights of a {model} model, got none named {missing[0]!r}.")
    if unknown := sorted(state_dict.keys() - set(names)):
        raise ValueError(f"`state_dict` must hold nothing but a {model} model, got also {unknown}.")


def _rename(state_dict: Mapping[str, torch.Tensor], pairs: Sequence[Pair], model: str) -> dict[str, torch.Tensor]:
    """Renames weights of `model` from the first to the second names of `pairs`; each weight is used once."""
    _check_names(state_dict, [name for names, _ in pairs for name in names], model)
    renamed = {}
    for names, new_names in pairs:
        rows = torch.cat([state_dict[name] for name in names])
        for name, part in zip(new_names, rows.chunk(len(new_names)), strict=True):
            renamed[name] = part.clone()
    return renamed


def _check_is_fitv2(state_dict: Mapping[str, torch.Tensor]) -> None:
    """Raises a `ValueError` unless these are weights of a FiTv2; the message lists the differences."""
    is_lora = any(
        f"{name}.weight" in state_dict for name in ("global_adaLN_modulation.1", "blocks.0.adaLN_modulation.2")
    )
    if "blocks.0.adaLN_modulation.1.weight" in state_dict and not is_lora:
        differences = ["an AdaLN of full rank in each block instead of a global one plus LoRA", "no QK-norm"]
        is_fit = "pos_embed" not in state_dict
        if not is_fit:
            differences.append("a fixed sin-cos `pos_embed` instead of 2D rotary embedding")
        if "blocks.0.mlp.fc1.weight" in state_dict:
            differences.append("a GELU MLP (`mlp.fc1`) instead of SwiGLU (`mlp.fc1_x`, `mlp.fc1_g`)")
        inputs, outputs = (state_dict.get(f"{name}.weight") for name in ("x_embedder.proj", "final_layer.linear"))
        if inputs is not None and outputs is not None and len(outputs) == 2 * inputs[0].numel():
            differences.append(
                f"a learned sigma, so twice the channels ({len(outputs)} outputs per patch instead of "
                f"{len(outputs) // 2})"
            )
        epsilon = "noise (epsilon) at timesteps 0 to 999 instead of velocity at times 0 to 1"
        differences.append(epsilon if is_fit else f"if a DiT, {epsilon}")
        found = "FiT (version 1)" if is_fit else "DiT or SiT, which have the same names and shapes"
        raise ValueError(
            f"`state_dict` must hold the weights of a FiTv2 model, got those of a {found}. What differs: "
            f"{'; '.join(differences)}."
        )
    expected = [name for names, _ in _pairs(1) for name in names]
    if not any(name in state_dict for name in expected):
        raise ValueError(
            f"`state_dict` must hold the weights of a FiTv2 model, with names such as {abbreviate(expected)}, "
            f"got {abbreviate(sorted(state_dict)) or 'an empty one'}."
        )


def reverse_time(weight: torch.Tensor) -> torch.Tensor:
    """
    Rewrites the first Linear of the time MLP for the time 1 - t. Its inputs are the features [cos(f t), sin(f t)].

    cos(f (1 - t)) and sin(f (1 - t)) are combinations of cos(f t) and sin(f t), so the new weight gives exactly the
    old output. Applying the function twice gives the weight back. It computes in fp64.

    Args:
        weight (`torch.Tensor` of shape `(d, 2n)`): The weight for n frequencies f, the cosines first.

    Returns:
        `torch.Tensor` of shape `(d, 2n)`, in the dtype of `weight`.
    """
    half = weight.shape[1] // 2
    frequencies = torch.arange(half, dtype=torch.float64, device=weight.device)
    frequencies = torch.exp(-math.log(10000) * frequencies / half)
    cos, sin = torch.cos(frequencies), torch.sin(frequencies)
    weight_cos, weight_sin = weight.double().split(half, dim=1)
    reversed_weight = torch.cat([weight_cos * cos + weight_sin * sin, weight_cos * sin - weight_sin * cos], dim=1)
    return reversed_weight.to(weight.dtype)


# Weights whose values differ, under our names. Each change is its own inverse.
_CHANGES = {
    "time_embed.mlp.linear_1.weight": reverse_time,
    "proj_out.weight": torch.neg,
    "proj_out.bias": torch.neg,
}


def fitv2_to_dod(state_dict: dict[str, torch.Tensor], prior_embed_dim: int | None = None) -> dict[str, torch.Tensor]:
    """
    Maps the weights of a FiTv2 model to [`DoDTransformer2DModel`].

    FiTv2 predicts data - noise at the time t = 1 - sigma. Both differences are absorbed into the weights: the last
    Linear changes its sign, and [`reverse_time`] rewrites the first Linear of the time MLP.

    Args:
        state_dict (`dict`): FiTv2's weights under its own names.
        prior_embed_dim (`int`, *optional*):
            Width of visual priors. If given, the weights get S and a projection by [`add_prior_projection`].

    Returns:
        `dict`: Weights for a `DoDTransformer2DModel` of the same size and `prior_embed_dim`.

    Raises:
        `ValueError`: names are missing or unknown, or the weights are those of another model, such as DiT.
    """
    _check_is_fitv2(state_dict)
    converted = _rename(state_dict, _pairs(_count_blocks(state_dict, "blocks", "FiTv2")), "FiTv2")
    for name, change in _CHANGES.items():
        converted[name] = change(converted[name])
    return converted if prior_embed_dim is None else add_prior_projection(converted, prior_embed_dim)


def dod_to_fitv2(state_dict: dict[str, torch.Tensor], drop_priors: bool = False) -> dict[str, torch.Tensor]:
    """
    Maps the weights of a [`DoDTransformer2DModel`] to a FiTv2 model. The inverse of [`fitv2_to_dod`].

    Args:
        state_dict (`dict`): Weights of the transformer.
        drop_priors (`bool`, defaults to `False`):
            Whether to accept a transformer with priors and keep only its stage 1. There c = time + class + S, so S is
            added to every row of the class table. The projection of priors is left out.

    Returns:
        `dict`: Weights of a FiTv2 under its own names.

    Raises:
        `ValueError`: names are missing or unknown, or the transformer has priors and `drop_priors` is `False`.
    """
    num_blocks = _count_blocks(state_dict, "transformer_blocks", "DoD")
    pairs = [(ours, theirs) for theirs, ours in _pairs(num_blocks)]
    has_priors = any(name in state_dict for name in _PRIORS)
    if has_priors and not drop_priors:
        raise ValueError(
            "`drop_priors` must be True for a transformer with visual priors, got False. FiTv2 has no place for "
            f"{', '.join(_PRIORS)}: S would be added to the class table, which keeps stage 1, and the projection of "
            "the priors, that is every later stage, would be lost."
        )
    names = [name for ours, _ in pairs for name in ours]
    _check_names(state_dict, [*names, *_PRIORS] if has_priors else names, "DoD")
    changed = {name: state_dict[name] for name in names}
    for name, change in _CHANGES.items():
        changed[name] = change(changed[name])
    if has_priors:
        changed["class_embed.weight"] = changed["class_embed.weight"] + state_dict["sample_token"]
    return _rename(changed, pairs, "DoD")


def add_prior_projection(state_dict: dict[str, torch.Tensor], prior_embed_dim: int) -> dict[str, torch.Tensor]:
    """
    Adds the sample token S and a projection of priors to the weights of a plain [`DoDTransformer2DModel`].

    S and the projection's last layer are zero, so that the training of a DoD starts from exactly this model.

    Args:
        state_dict (`dict`): Weights of a transformer with `prior_embed_dim=None`.
        prior_embed_dim (`int`): Width of the visual priors.

    Returns:
        `dict`: Weights for a transformer with this `prior_embed_dim`.

    Raises:
        `ValueError`, `TypeError`: the weights have a projection already, or the width is out of range.
    """
    check_at_least("prior_embed_dim", prior_embed_dim, 1)
    if present := [name for name in _PRIORS if name in state_dict]:
        raise ValueError(f"`state_dict` must be without visual priors, got {', '.join(present)}.")
    if "x_embedder.weight" not in state_dict:
        raise ValueError("`state_dict` must hold the weights of a DoD model, got none named 'x_embedder.weight'.")
    like = state_dict["x_embedder.weight"]
    dim = like.shape[0]
    return {
        **state_dict,
        "sample_token": like.new_zeros(1, dim),
        "prior_proj.linear_1.weight": torch.nn.init.xavier_uniform_(like.new_empty(dim, prior_embed_dim)),
        "prior_proj.linear_1.bias": like.new_zeros(dim),
        "prior_proj.linear_2.weight": like.new_zeros(dim, dim),
        "prior_proj.linear_2.bias": like.new_zeros(dim),
    }


def _load_pickle(path: Path) -> Any:
    """Reads a pickle of tensors and plain containers, without running code; nothing else reads pickles."""
    with open(path, "rb") as file:  # with a path, `torch.load` would judge by the name
        return torch.load(file, map_location="cpu", weights_only=True)  # noqa: TID251


def _load_file(path: Path) -> Any:
    try:
        with open(path, "rb") as file:
            is_zip = file.read(2) == b"PK"  # written by `torch.save`; some of FiT's .safetensors are such files
        if path.suffix != ".safetensors" or is_zip:
            return _load_pickle(path)
        check_safetensors_header(path)
        return load_file(path)
    except Exception as error:  # damaged and foreign files fail in many ways
        raise ValueError(
            "`checkpoint_path` must be a readable file of tensors (.safetensors, .bin, .pt or .pth), "
            f"got {str(path)!r}: {error}"
        ) from error


def _choose(found: Mapping[str, Any], weights: str | None, described: str) -> Any:
    """Picks `weights`, EMA or raw, out of those that were found; by default the EMA if there is one."""
    if weights is None:
        weights = "ema" if "ema" in found else next(iter(found))
    if weights not in found:
        raise ValueError(f"`weights` must be {' or '.join(map(repr, found))} for {described}, got {weights!r}.")
    return found[weights]


def load_fitv2_checkpoint(checkpoint_path: str | os.PathLike, weights: str | None = None) -> dict[str, torch.Tensor]:
    """
    Reads the weights of a FiTv2 checkpoint.

    Pickles are read with `weights_only=True`: they cannot run code.

    Args:
        checkpoint_path (`str` or `os.PathLike`):
            A file (.safetensors, .bin, .pt or .pth) with the weights at its top or under `ema`, `ema_model`, `model`,
            `state_dict` or `module`; or a folder of FiT's training or of its releases.
        weights (`str`, *optional*):
            `"ema"` or `"model"` (not averaged), for checkpoints that have both. By default the EMA if there is one.

    Returns:
        `dict`: FiTv2's weights under its own names.

    Raises:
        `ValueError`: there is no such file, it cannot be read, or it holds something else.
    """
    if weights is not None:
        check_choice("weights", weights, tuple(_KEYS))
    path = Path(checkpoint_path)
    if path.is_dir():
        present = {kind: [path / name for name in names if (path / name).is_file()] for kind, names in _FILES.items()}
        files = {kind: paths[0] for kind, paths in present.items() if paths}
        if not files:
            names = [name for names in _FILES.values() for name in names]
            raise ValueError(
                f"`checkpoint_path` must be a file or a folder with one of {', '.join(names)}, got {str(path)!r} with "
                f"{abbreviate(sorted(entry.name for entry in path.iterdir())) or 'nothing'}."
            )
        path = _choose(files, weights, f"the folder {str(path)!r}")
        weights = None  # the file has no choice left
    elif not path.is_file():
        raise ValueError(f"`checkpoint_path` must be an existing file or folder, got {str(path)!r}.")

    checkpoint = _load_file(path)
    if not isinstance(checkpoint, Mapping):
        raise ValueError(
            f"`checkpoint_path` must hold a dict of tensors, got {str(path)!r} with a {type(checkpoint).__name__}."
        )
    if not all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        found = {
            kind: checkpoint[key]
            for kind, keys in _KEYS.items()
            for key in reversed(keys)
            if isinstance(checkpoint.get(key), Mapping)
        }
        if not found:
            raise ValueError(
                "`checkpoint_path` must hold tensors at its top or under one of the keys "
                f"{', '.join(key for keys in _KEYS.values() for key in keys)}, "
                f"got {str(path)!r} with the keys {abbreviate([str(key) for key in checkpoint], 20)}."
            )
        checkpoint = _choose(found, weights, repr(str(path)))
    checkpoint = {name: weight for name, weight in checkpoint.items() if name not in _COUNTERS}
    others = [str(name) for name, weight in checkpoint.items() if not isinstance(weight, torch.Tensor)]
    if others:
        raise ValueError(
            f"`checkpoint_path` must hold tensors only as weights, got {str(path)!r} with {abbreviate(others)}."
        )
    while prefix := next((p for p in _PREFIXES if checkpoint and all(str(n).startswith(p) for n in checkpoint)), None):
        checkpoint = {name.removeprefix(prefix): weight for name, weight in checkpoint.items()}
    return checkpoint


def _load_json(name: str, path: Path) -> dict:
    """Reads the object in a JSON or YAML file that was given as the argument `name`."""
    try:
        content = read_yaml(path) if path.suffix in (".yaml", ".yml") else parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"`{name}` must be a readable file, got {str(path)!r}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"`{name}` must be a file with one object, got {str(path)!r} with {type(content).__name__}.")
    return content


def load_fit_config(config: str | os.PathLike) -> dict[str, Any]:
    """
    Reads a config of FiT, YAML or JSON, and checks that it describes a possible [`DoDTransformer2DModel`].

    Args:
        config (`str` or `os.PathLike`): The file, with `diffusion.network_config.params`.

    Returns:
        `dict`: The parameters of the network, for [`infer_fitv2_config`].

    Raises:
        `ValueError`: the file cannot be read, or it describes another model than a FiTv2. All differences are named.
    """
    content = _load_json("config", Path(config))
    diffusion = content.get("diffusion")
    network = diffusion.get("network_config") if isinstance(diffusion, dict) else None
    params = network.get("params") if isinstance(network, dict) else None
    if not isinstance(params, dict):
        raise ValueError(
            "`config` must be a config of FiT, with `diffusion.network_config.params`, "
            f"got {str(config)!r} with the keys {abbreviate([str(key) for key in content], 20)}."
        )
    settings = [(name, required, params.get(name, default)) for name, (required, default) in _FIT_SETTINGS.items()]
    transport = diffusion.get("transport") or {}
    settings += [(name, required, transport.get(name, required)) for name, required in _FIT_TRANSPORT.items()]
    differences = [f"`{name}` {required!r}, got {given!r}" for name, required, given in settings if given != required]
    if differences:
        raise ValueError(f"`config` must be that of a FiTv2 that a DoD transformer can be: {'; '.join(differences)}.")
    return params


def infer_fitv2_config(
    state_dict: dict[str, torch.Tensor],
    num_attention_heads: int | None = None,
    in_channels: int | None = None,
    sample_size: int = 32,
    fit_params: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """
    Infers the arguments of [`DoDTransformer2DModel`] from the shapes of FiTv2's weights.

    Args:
        state_dict (`dict`): FiTv2's weights under its own names.
        num_attention_heads (`int`, *optional*):
            Number of heads, which the shapes do not show. By default the number in `fit_params`, else the number of
            the preset of the same width.
        in_channels (`int`, *optional*): Channels of the latents. By default the number in `fit_params`, else 4.
        sample_size (`int`, defaults to 32): Height and width of the latents that the model was trained on.
        fit_params (`dict`, *optional*): Parameters from FiT's config. They are checked against the weights.

    Returns:
        `dict`: Arguments of `DoDTransformer2DModel`, without `prior_embed_dim`.

    Raises:
        `ValueError`, `TypeError`: the weights belong to another model, an argument does not fit them, or the number of
            heads is unknown.
    """
    _check_is_fitv2(state_dict)
    num_layers = _count_blocks(state_dict, "blocks", "FiTv2")
    _check_names(state_dict, [name for names, _ in _pairs(num_layers) for name in names], "FiTv2")
    dim, patch_dim = len(state_dict["x_embedder.proj.weight"]), state_dict["x_embedder.proj.weight"][0].numel()
    ff_inner_dim = len(state_dict["blocks.0.mlp.fc1_x.weight"])

    fit_sizes = {}
    if fit_params is not None:
        fit_sizes = {name: fit_params.get(name, default) for name, (default, _) in _FIT_SIZES.items()}
    if in_channels is None:
        in_channels = fit_sizes.get("in_channels", 4)
    check_at_least("in_channels", in_channels, 1)
    patch_size = math.isqrt(patch_dim // in_channels)
    if in_channels * patch_size**2 != patch_dim:
        raise ValueError(
            f"`in_channels` must be {patch_dim} (the inputs per patch) over a square number, got {in_channels}."
        )
    if num_attention_heads is None:
        transformers = [preset.transformer_config for preset in PRESETS.values()]
        heads = {c["num_attention_heads"] * c["attention_head_dim"]: c["num_attention_heads"] for c in transformers}
        num_attention_heads = fit_sizes.get("num_heads", heads.get(dim))
    if num_attention_heads is None:
        raise ValueError(
            f"`num_attention_heads` must be given for a width of {dim}, which no preset has (they have "
            f"{', '.join(map(str, sorted(heads)))}), got None."
        )
    check_at_least("num_attention_heads", num_attention_heads, 1)
    if dim % (4 * num_attention_heads):
        raise ValueError(
            f"`num_attention_heads` must divide the width {dim} into heads whose width is a multiple of 4, "
            f"got {num_attention_heads}."
        )
    # The SwiGLU is int(mlp_ratio * d) * 2 // 3 wide. Take a round ratio if there is one, else one safe from rounding.
    mlp_dim = -(-3 * ff_inner_dim // 2)
    ratios = (4.0, mlp_dim / dim, (mlp_dim + 0.5) / dim)
    config = {
        "sample_size": sample_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "num_layers": num_layers,
        "num_attention_heads": num_attention_heads,
        "attention_head_dim": dim // num_attention_heads,
        "num_classes": len(state_dict[f"{_CLASS_TABLE}.weight"]) - 1,
        "mlp_ratio": next(ratio for ratio in ratios if int(ratio * dim) * 2 // 3 == ff_inner_dim),
        "adaln_lora_dim": len(state_dict["blocks.0.adaLN_modulation.1.weight"]),
    }

    if fit_params is not None:
        given = {**fit_sizes, "hidden_size": fit_params.get("hidden_size", 1152)}
        given_mlp_dim = int(dim * fit_params.get("mlp_ratio", 4.0))
        is_large = fit_params.get("use_swiglu_large", False)
        given["width of the SwiGLU"] = given_mlp_dim if is_large else given_mlp_dim * 2 // 3
        inferred = {name: config[ours] for name, (_, ours) in _FIT_SIZES.items()}
        inferred |= {"hidden_size": dim, "width of the SwiGLU": ff_inner_dim}
        names = [name for name in given if given[name] != inferred[name]]
        if names:
            differences = [f"{name} {inferred[name]}, got {given[name]}" for name in names]
            raise ValueError(f"`config` must fit the weights and the other arguments: {'; '.join(differences)}.")

    with torch.device("meta"):
        model = DoDTransformer2DModel(**config)
        expected = dod_to_fitv2(model.state_dict())
    differences = [
        f"{name} {tuple(weight.shape)}, got {tuple(state_dict[name].shape)}"
        for name, weight in expected.items()
        if weight.shape != state_dict[name].shape
    ]
    if differences:
        raise ValueError(f"`state_dict` must have the shapes of one FiTv2 model: {'; '.join(differences[:5])}.")
    return config


def _fit_config(config: Mapping[str, Any]) -> dict:
    """FiT's config of a plain FiTv2, with the sizes in the config of a DoD transformer."""
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    params = {name: required for name, (required, _) in _FIT_SETTINGS.items()}
    params |= {name: config[ours] for name, (_, ours) in _FIT_SIZES.items()}
    params["adaln_lora_dim"] = params["adaln_lora_dim"] or max(dim // 4, 1)
    params |= {"hidden_size": dim, "mlp_ratio": config["mlp_ratio"], "use_swiglu_large": False}
    network = {"target": "fit.model.fit_model.FiT", "params": params}
    return {"diffusion": {"transport": _FIT_TRANSPORT, "network_config": network}}


@dataclass(frozen=True, kw_only=True)
class ToDoDOptions:
    """Options of `--to dod`."""

    weights: str | None = option(
        None, choices=tuple(_KEYS), help="Weights to take if a checkpoint has both; the EMA by default."
    )
    config: Path | None = option(None, help="FiT's config (YAML or JSON), checked against the weights.")
    num_attention_heads: int | None = option(
        None, help="By default from the config, or from the preset of the same width."
    )
    in_channels: int | None = option(None, help="Channels of the latents, 4 without a config.")
    sample_size: int = option(32, help="Side of the latents in the training.")
    time_shifting: float = option(1.0, help="FiT's setting, if there is no config.")
    vae: str | None = option(None, help="Autoencoder (folder or Hub id) to put into the pipeline.")
    id2label: Path | None = option(None, help="JSON file of class ids and names.")


@dataclass(frozen=True, kw_only=True)
class ToFiTv2Options:
    """Options of `--to fitv2`."""

    drop_priors: bool = option(False, help="Keep only stage 1 of a DoD.")


@dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """Options of the command."""

    to: str = option("dod", choices=("dod", "fitv2"), help="What is written.")
    checkpoint_path: Path = option(
        help="FiTv2's file or folder; with `--to fitv2` the folder of a pipeline or a transformer."
    )
    output_dir: Path = option(help="Folder that it goes to.")
    to_dod: ToDoDOptions = field(default_factory=ToDoDOptions)
    to_fitv2: ToFiTv2Options = field(default_factory=ToFiTv2Options)

    def find_conflicts(self) -> list[str]:
        """Messages about options that do not fit each other."""
        found = [
            f"`{name}` must be given with `--to {direction}` only, got `--to {self.to}`."
            for direction, group in {"dod": self.to_dod, "fitv2": self.to_fitv2}.items()
            for name in find_given(group)
            if direction != self.to
        ]
        if self.output_dir.is_file():
            found.append(f"`output_dir` must be a folder, got the file {str(self.output_dir)!r}.")
        return found


def convert_to_dod(checkpoint_path: Path, output_dir: Path, options: ToDoDOptions) -> None:
    """
    Converts FiTv2's checkpoint to a pipeline of one stage.

    Args:
        checkpoint_path (`Path`): The file or the folder of the checkpoint.
        output_dir (`Path`): The folder that the pipeline goes to.
        options ([`ToDoDOptions`]): All else.

    Raises:
        `ValueError`: the checkpoint, its config or the class names cannot be read or do not belong to a FiTv2, or the
            model was trained with a time shifting.
    """
    if options.time_shifting != 1:
        raise ValueError(
            "`time_shifting` must be 1, got "
            f"{options.time_shifting}: another one cannot be absorbed into the weights, as it is no linear map of the "
            "time's features."
        )
    fit_params = None if options.config is None else load_fit_config(options.config)
    if fit_params is None:
        logger.warning(
            "Without a `config` the weights are taken for those of a FiTv2 at its base resolution: they do not show "
            "the number of heads, the time shifting, the QK-norm and the frequencies of the rotary embedding."
        )
    state_dict = load_fitv2_checkpoint(checkpoint_path, options.weights)
    state_dict = {name: weight.float() for name, weight in state_dict.items()}
    config = infer_fitv2_config(
        state_dict, options.num_attention_heads, options.in_channels, options.sample_size, fit_params=fit_params
    )
    with torch.device("meta"):
        transformer = DoDTransformer2DModel(**config)
    transformer.load_state_dict(fitv2_to_dod(state_dict), assign=True)
    pipeline = DoDPipeline(
        transformer=transformer,
        scheduler=DoDFlowMatchScheduler(),
        vae=None if options.vae is None else AutoencoderKL.from_pretrained(options.vae),
        id2label=None if options.id2label is None else _load_json("id2label", options.id2label),
        **PRESETS["FiTv2-B"].pipeline_config,
    )
    with replacing_contents(output_dir, DoDPipeline.config_name) as unfinished:
        pipeline.save_pretrained(unfinished)
    print(f"DoDPipeline of one stage, {transformer.num_parameters():,} parameters: {output_dir}")


def convert_to_fitv2(checkpoint_path: Path, output_dir: Path, drop_priors: bool = False) -> None:
    """
    Converts a pipeline's transformer, or a transformer alone, to FiTv2's checkpoint.

    Args:
        checkpoint_path (`Path`): The folder of the pipeline or of the transformer.
        output_dir (`Path`): The folder that the checkpoint goes to.
        drop_priors (`bool`, defaults to `False`): Whether a transformer that takes priors loses them.

    Raises:
        `OSError`, `ValueError`: there is no such transformer, or it has priors and `drop_priors` is `False`.
    """
    is_pipeline = (checkpoint_path / DoDPipeline.config_name).is_file()
    transformer = DoDTransformer2DModel.from_pretrained(
        checkpoint_path, subfolder="transformer" if is_pipeline else None, local_files_only=True
    )
    state_dict = dod_to_fitv2(transformer.state_dict(), drop_priors)
    with replacing(output_dir / "model.safetensors") as unfinished:
        save_file(state_dict, unfinished, metadata={"format": "pt"})
    write_json(output_dir / "config.json", _fit_config(transformer.config))
    print(f"FiTv2, {sum(weight.numel() for weight in state_dict.values()):,} parameters: {output_dir}")


def main(argv: list[str] | None = None) -> None:
    """Runs the command; `argv` defaults to the process's arguments. Raises a `ValueError` if they do not fit."""
    options = parse_options(ConversionOptions, argv, __doc__)
    if options.to == "dod":
        convert_to_dod(options.checkpoint_path, options.output_dir, options.to_dod)
    else:
        convert_to_fitv2(options.checkpoint_path, options.output_dir, options.to_fitv2.drop_priors)


if __name__ == "__main__":
    run_main(main)
