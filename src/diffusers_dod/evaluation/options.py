# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Images and pipeline of a command that compares both, from its options."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from ..data.labelled_images import MAX_WORKERS, TRANSFORM, ImageOptions, LabelledImages, load_labelled_images
from ..data.latents import DTYPES
from ..options import option
from ..pipeline_dod import DoDPipeline
from ..seeding import stateless_generator
from ..shipped import find_shipped
from .images import image_identity


def check_device(name: str, device: str) -> None:
    """Raises a `ValueError` that names the argument `name` unless PyTorch has the `device` here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where PyTorch was built without CUDA
        raise ValueError(f"`{name}` must be one that PyTorch has here, got {device!r}: {error}") from error


def device_option() -> Any:
    """Declares the option of the device, a GPU by default if there is one."""
    return option("cuda" if torch.cuda.is_available() else "cpu", check=check_device, help="Device to compute on.")


@dataclass(frozen=True, kw_only=True)
class ComparisonOptions:
    """Pipeline and images of a command that compares both."""

    pretrained_model_name_or_path: str = option(help="The pipeline (folder or Hub id).")
    num_images: int = option(
        50_000, at_least=2, aliases=("num_pictures",), help="Number of images; drawn at random if there are more."
    )
    data_seed: int = option(
        1,
        at_least=0,
        below=2**64,
        help="Seed of that draw, and of procedural images; the trainer's is 0 by default, so these are others.",
    )
    seed: int = option(0, at_least=0, below=2**64, help="Seed of everything else that is random.")
    batch_size: int = option(64, at_least=1, help="Images at a time.")
    dataloader_num_workers: int = option(0, at_least=0, at_most=MAX_WORKERS, help="Processes that read images.")
    dtype: str = option("float32", choices=DTYPES, help="Data type of the weights.")
    device: str = device_option()
    output_file: Path = option(writes="file", help="JSON file of the results.")
    images: ImageOptions = field(default_factory=ImageOptions)

    def find_conflicts(self) -> list[str]:
        """Messages about options that do not fit each other."""
        return self.images.find_source_errors()


def draw_labelled_images(
    options: ComparisonOptions, num_images: int
) -> tuple[LabelledImages, list[int], dict[str, Any]]:
    """
    Draws some of the images that the options name.

    Args:
        options ([`ComparisonOptions`]): The options.
        num_images (`int`): Number of images to take.

    Returns:
        `tuple[LabelledImages, list[int], dict]`: The data set, that many different indices in random order, and the
        identity of both.

    Raises:
        `ValueError`: there are fewer images, or the data cannot be opened, see [`load_labelled_images`].
    """
    source = options.images
    try:
        images = load_labelled_images(source, num_images, options.data_seed)
    except FileNotFoundError as error:
        name = "dataset_name" if source.train_data_dir is None else "train_data_dir"
        raise ValueError(f"`{name}` must hold images, got {getattr(source, name)!r}: {error}") from error
    available = len(images.dataset)
    if num_images > available:
        raise ValueError(f"The number of images must be at most the {available} that there are, got {num_images}.")
    order = torch.randperm(available, generator=stateless_generator(options.data_seed, 0))
    description = {
        "name": source.dataset_name or source.train_data_dir,
        "images": image_identity(images, source.train_data_dir),
        "num_available": available,
        "num_images": num_images,
        "data_seed": options.data_seed,
        "transform": TRANSFORM,
        "resolution": source.resolution,
    }
    return images, order[:num_images].tolist(), description


def read_batches(
    images: LabelledImages, indices: list[int], batch_size: int, num_workers: int = 0
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """
    Reads some images of a data set, a batch at a time.

    Args:
        images ([`LabelledImages`]): The data set.
        indices (`list[int]`): Indices of the images, in the wanted order.
        batch_size (`int`): Images in a batch. The last batch may be smaller.
        num_workers (`int`, defaults to 0): Processes that read images; 0 reads in this process.

    Returns:
        `Iterator` of the indices of a batch, its images (B, H, W, 3) in uint8 and its labels (B,).

    Raises:
        `ValueError`: an image cannot be read; the message names it.
    """
    loader = DataLoader(Subset(images, indices), batch_size, num_workers=num_workers)
    for start, batch in zip(range(0, len(indices), batch_size), loader, strict=True):
        yield indices[start : start + batch_size], batch["image"], torch.as_tensor(batch["label"])


def load_pipeline(options: ComparisonOptions) -> DoDPipeline:
    """
    Loads the pipeline that the options name, without progress bars.

    Args:
        options ([`ComparisonOptions`]): The options.

    Returns:
        [`DoDPipeline`].

    Raises:
        `ValueError`: the pipeline has no latent embedder.
    """
    path = find_shipped(options.pretrained_model_name_or_path)
    pipeline = DoDPipeline.from_pretrained(path, dtype=DTYPES[options.dtype])
    if pipeline.latent_embedder is None:
        raise ValueError(
            "`pretrained_model_name_or_path` must hold a pipeline with a `latent_embedder`, "
            f"got {options.pretrained_model_name_or_path!r}."
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(options.device)
