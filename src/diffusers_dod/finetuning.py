# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Choice of the weights that a fine-tuning changes: all, few as in DiffFit (arXiv:2304.06648), or LoRA adapters."""

import hashlib
from dataclasses import dataclass

import torch
import torch.nn as nn

from .options import option


TRAINABLE_PARAMETERS = ("all", "difffit")

# The layers of attention, the MLPs, and the table of classes, which data of other classes cannot do without.
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "class_embed")
LORA_MARK = ".lora_"  # in the names of all weights of adapters, and of no others

# The embeddings of the two models: weights that belong to no Linear.
_EMBEDDINGS = ("class_embed.weight", "sample_token", "latent_queries", "mask_token")


def difffit_parameters(model: nn.Module) -> list[str]:
    """
    Names of the parameters that a DiffFit fine-tuning trains: biases, norms and embeddings.

    DiffFit also scales the output of each branch of a block by a factor that starts at 1. Here the gates of the
    modulation are such factors, one for each channel, and their biases are trained.

    Args:
        model (`nn.Module`): Backbone, latent embedder, or a module with both.

    Returns:
        `list[str]`: Names as in `model.named_parameters()`.
    """
    norms = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm) and module.weight is not None
    }
    return [
        name
        for name, _ in model.named_parameters()
        if name.endswith(".bias") or name in norms or name.endswith(_EMBEDDINGS)
    ]


def freeze_all_but(model: nn.Module, names: list[str]) -> None:
    """
    Freezes all parameters but the named ones.

    Args:
        model (`nn.Module`): The model, changed in place.
        names (`list[str]`): Names as in `model.named_parameters()`.

    Raises:
        `ValueError`: a name is unknown, or there are no names.
    """
    known = dict(model.named_parameters())
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(f"`names` must be names of parameters of the model, at least one, got {unknown or names}.")
    model.requires_grad_(False)
    for name in names:
        known[name].requires_grad_(True)


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """LoRA adapters."""

    lora_rank: int | None = option(
        None,
        at_least=1,
        needs="pretrained_model_name_or_path",
        excludes="trainable_parameters",
        help="Train LoRA adapters of this rank in place of the weights of `--pretrained_model_name_or_path`. The run "
        "ends in an adapter for `load_lora_weights` (needs `pip install 'diffusers-dod[lora]'`).",
    )
    lora_alpha: float | None = option(
        None, above=0, needs="lora_rank", help="The adapters count `lora_alpha / lora_rank`, 1 by default."
    )
    lora_target_modules: tuple[str, ...] = option(
        LORA_TARGETS, needs="lora_rank", is_distinct=True, help="Ends of the names of the layers with adapters."
    )
    lora_latent_embedder: bool = option(False, needs="lora_rank", help="Train adapters of the LEM, too.")


def add_lora(model: nn.Module, options: LoraOptions) -> None:
    """
    Freezes backbone and latent embedder, and adds trainable LoRA adapters that change nothing at first.

    Args:
        model (`nn.Module`): Module with both as `transformer` and `latent_embedder`, changed in place.
        options ([`LoraOptions`]): The adapters, with a `lora_rank`.

    Raises:
        `ImportError`: PEFT is not installed.
        `ValueError`: there is no such layer, or no latent embedder that takes adapters.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("`lora_rank` needs PEFT: `pip install 'diffusers-dod[lora]'`.") from error
    parts = [model.transformer]
    if options.lora_latent_embedder:
        if not hasattr(model.latent_embedder, "add_adapter"):
            raise ValueError(
                "`lora_latent_embedder` must be given with a latent embedder that takes adapters, got "
                f"{type(model.latent_embedder).__name__}."
            )
        parts.append(model.latent_embedder)
    layers = [_find_layers(part, options.lora_target_modules) for part in parts]
    unknown = [target for target in options.lora_target_modules if not any(target in found for found in layers)]
    if unknown or not all(layers):
        raise ValueError(
            "`lora_target_modules` must be ends of the names of Linear or Embedding layers, some in each part with "
            f"adapters, got {unknown or list(options.lora_target_modules)}."
        )
    rank = options.lora_rank
    for part in (model.transformer, model.latent_embedder):
        if part is not None:
            part.requires_grad_(False)
    for part, targets in zip(parts, layers, strict=True):
        part.add_adapter(LoraConfig(r=rank, lora_alpha=options.lora_alpha or rank, target_modules=targets))


def _find_layers(model: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """Finds the targets that are ends of the names of layers of a model."""
    layers = [f".{name}" for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))]
    return [target for target in targets if any(name.endswith(f".{target}") for name in layers)]


def has_lora(model: nn.Module) -> bool:
    """Whether a `model` has LoRA adapters in its layers."""
    return any(LORA_MARK in name for name, _ in model.named_parameters())


def frozen_sha256(model: nn.Module) -> str:
    """Computes a hash of the names and the numbers of all frozen parameters of a `model`."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
