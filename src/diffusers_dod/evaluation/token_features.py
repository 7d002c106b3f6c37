# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Tokens of images for a linear probe, and a file that keeps them."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm

from ..data.labelled_images import LabelledImages
from ..files import replacing
from ..image_reading import to_pixels
from ..pipeline_dod import DoDPipeline
from ..records import check_safetensors_header
from .options import read_batches


FEATURES = ("lem", "random_lem", "latents")
RANDOM_LEM_SEED = 0


def random_latent_embedder(embedder: nn.Module, seed: int) -> nn.Module:
    """
    Makes an untrained latent embedder.

    Args:
        embedder ([`VisualPriorMixin`]): The model for config, device and dtype.
        seed (`int`): Seed of the weights.

    Returns:
        [`VisualPriorMixin`].
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh = type(embedder).from_config(embedder.config)
    return fresh.to(embedder.device, embedder.dtype).eval()


def pool_latents(latents: torch.Tensor, num_values: int) -> torch.Tensor:
    """
    Averages latents on a square grid, with about a given number of values and no finer than the latents.

    Args:
        latents (`torch.Tensor` of shape `(B, C, h, w)`): The latents.
        num_values (`int`): Wanted number of values per image. The nearest possible one is taken.

    Returns:
        `torch.Tensor` of shape `(B, side * side, C)`: The places of the grid as tokens.
    """
    channels, *size = latents.shape[1:]
    side = min(range(1, min(size) + 1), key=lambda side: abs(side**2 * channels - num_values))
    return F.adaptive_avg_pool2d(latents, side).flatten(2).transpose(1, 2)


@torch.no_grad()
def compute_tokens(
    pipeline: DoDPipeline, images: LabelledImages, indices: list[int], batch_size: int, num_workers: int = 0
) -> dict[str, torch.Tensor]:
    """
    Computes the tokens of images, for each kind of features.

    Args:
        pipeline ([`DoDPipeline`]): The model.
        images ([`LabelledImages`]): The data set.
        indices (`list[int]`): Indices of the images.
        batch_size (`int`): Images at a time.
        num_workers (`int`, defaults to 0): Processes that read images; 0 reads in this process.

    Returns:
        `dict[str, torch.Tensor]`: `lem`, `random_lem` and `latents`, (n, tokens, width) in fp32, and `labels` (n,).

    Raises:
        `ValueError`: a label is not the id of a class, or a feature is not finite.
    """
    embedder = pipeline.latent_embedder
    untrained = random_latent_embedder(embedder, RANDOM_LEM_SEED)
    num_values = math.prod(embedder.token_shape)
    chunks: dict[str, list[torch.Tensor]] = {name: [] for name in (*FEATURES, "labels")}
    batches = read_batches(images, indices, batch_size, num_workers)
    for _, batch, labels in tqdm(batches, desc="Features", total=-(-len(indices) // batch_size), disable=None):
        latents = pipeline.encode_image(to_pixels(batch).to(pipeline.device))
        found = (embedder.encode(latents), untrained.encode(latents), pool_latents(latents, num_values), labels)
        for name, values in zip(chunks, found, strict=True):
            chunks[name].append(values.cpu() if name == "labels" else values.float().cpu())
    tokens = {name: torch.cat(parts).contiguous() for name, parts in chunks.items()}
    for name in FEATURES:
        if not bool(torch.isfinite(tokens[name]).all()):
            raise ValueError(f"`pipeline` must give finite features, got others for {name!r}.")
    num_classes, labels = len(images.class_names), tokens["labels"]
    if not bool(((labels >= 0) & (labels < num_classes)).all()):
        raise ValueError(f"Labels must be in [0, {num_classes - 1}], got {int(labels.min())} to {int(labels.max())}.")
    return tokens


def cache_path(folder: Path, settings: dict[str, Any]) -> Path:
    """The file in `folder` for the tokens that depend on `settings`, whose hash is in its name."""
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    return folder / f"tokens-{key}.safetensors"


def write_tokens(path: Path, tokens: dict[str, torch.Tensor], settings: dict[str, Any]) -> None:
    """
    Writes tokens atomically.

    Args:
        path (`Path`): A safetensors file.
        tokens (`dict[str, torch.Tensor]`): Tokens from [`compute_tokens`].
        settings (`dict`): Settings that the tokens depend on, ready for JSON.
    """
    with replacing(path) as unfinished:
        save_file(tokens, unfinished, metadata={"settings": json.dumps(settings, sort_keys=True)})


def read_tokens(path: Path, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """
    Reads a file of [`write_tokens`].

    Args:
        path (`Path`): The safetensors file.
        settings (`dict`): Settings that the tokens must depend on.

    Returns:
        `dict[str, torch.Tensor]`: The tokens and labels.

    Raises:
        `ValueError`: the settings differ, and the message names the difference; or the file is damaged.
    """
    check_safetensors_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {}).get("settings", "{}"))
            for name in sorted(settings.keys() | found.keys()):
                if found.get(name) != settings.get(name):
                    raise ValueError(
                        f"{path} must hold tokens with `{name}` = {settings.get(name)!r}, got {found.get(name)!r}: "
                        "remove it, or use another folder."
                    )
            return {name: file.get_tensor(name) for name in (*FEATURES, "labels")}
    except SafetensorError as error:
        raise ValueError(f"{path} must be an undamaged file of tokens, got {error}: remove it.") from error
