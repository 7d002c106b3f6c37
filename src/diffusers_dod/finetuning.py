# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Choice of the weights that a fine-tuning changes: all, or few as in DiffFit (Xie et al. 2023, arXiv:2304.06648)."""

import torch.nn as nn


TRAINABLE_PARAMETERS = ("all", "difffit")

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
