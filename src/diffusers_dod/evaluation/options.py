# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""The pictures and the pipeline of a command that compares both, from its options."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from ..checks import attempt, check_at_least
from ..data.latents import DTYPES
from ..data.pictures import TRANSFORM, Pictures, load_pictures
from ..files import check_output
from ..pipeline_dod import DoDPipeline
from ..seeding import stateless_generator
from .images import picture_identity


def add_picture_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of pictures, the model and what computes to `parser`."""
    parser.add_argument("--pretrained_model_name_or_path", required=True, help="The pipeline (folder or Hub id).")
    parser.add_argument("--dataset_name", help="`textures` (procedural) or a data set that `datasets` can load.")
    parser.add_argument("--train_data_dir", help="Folder with one sub-folder of pictures per class, of any split.")
    parser.add_argument("--image_column", default="image", help="Column of the pictures.")
    parser.add_argument("--label_column", default="label", help="Column of the class ids.")
    parser.add_argument(
        "--num_pictures", type=int, default=50_000, help="How many; drawn at random if there are more."
    )
    parser.add_argument(
        "--data_seed",
        type=int,
        default=1,
        help="Of that draw, and of procedural pictures; the trainer's default is 0, so these are others.",
    )
    parser.add_argument("--resolution", type=int, default=256, help="Side of the centre crop in pixels.")
    parser.add_argument("--seed", type=int, default=0, help="Of everything that is random beside the pictures.")
    parser.add_argument("--batch_size", type=int, default=64, help="Pictures at a time.")
    parser.add_argument("--dataloader_num_workers", type=int, default=0, help="Processes that read pictures.")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="Of the weights.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output_file", type=Path, required=True, help="JSON file of the results.")


def check_device(device: str) -> None:
    """Raises a `ValueError` unless PyTorch has the option `device` here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where PyTorch was built without CUDA
        raise ValueError(f"`device` must be one that PyTorch has here, got {device!r}: {error}") from error


def find_picture_errors(args: argparse.Namespace) -> list[str]:
    """All that is wrong with the options of [`add_picture_arguments`] in `args`, a message for each."""
    errors: list[str] = []
    minimums = {"num_pictures": 2, "data_seed": 0, "resolution": 1, "seed": 0, "batch_size": 1}
    for name, minimum in (minimums | {"dataloader_num_workers": 0}).items():
        attempt(errors, check_at_least, name, getattr(args, name), minimum)
    if (args.dataset_name is None) == (args.train_data_dir is None):
        errors.append(
            "Exactly one of `dataset_name` and `train_data_dir` must be given, "
            f"got {args.dataset_name!r} and {args.train_data_dir!r}."
        )
    attempt(errors, check_device, args.device)
    attempt(errors, check_output, "output_file", args.output_file)
    return errors


def open_pictures(args: argparse.Namespace, num_pictures: int) -> tuple[Pictures, list[int], dict[str, Any]]:
    """
    The pictures that the options name, and which of them to take.

    Args:
        args (`argparse.Namespace`): The options of [`add_picture_arguments`].
        num_pictures (`int`): How many to take.

    Returns:
        `tuple[Pictures, list[int], dict]`: The data set, that many different indices of it in random order, and what
        identifies both.

    Raises:
        `ValueError`: there are fewer, or the data cannot be opened, see [`load_pictures`].
    """
    try:
        pictures = load_pictures(
            args.dataset_name,
            args.train_data_dir,
            args.resolution,
            num_pictures,
            args.data_seed,
            args.image_column,
            args.label_column,
        )
    except FileNotFoundError as error:
        source = "dataset_name" if args.train_data_dir is None else "train_data_dir"
        raise ValueError(f"`{source}` must hold pictures, got {getattr(args, source)!r}: {error}") from error
    available = len(pictures.dataset)
    if num_pictures > available:
        raise ValueError(f"The number of pictures must be at most the {available} that there are, got {num_pictures}.")
    order = torch.randperm(available, generator=stateless_generator(args.data_seed, 0))
    description = {
        "name": args.dataset_name or args.train_data_dir,
        "pictures": picture_identity(pictures, args.train_data_dir),
        "num_available": available,
        "num_pictures": num_pictures,
        "data_seed": args.data_seed,
        "transform": TRANSFORM,
        "resolution": args.resolution,
    }
    return pictures, order[:num_pictures].tolist(), description


def read_batches(
    pictures: Pictures, indices: list[int], batch_size: int, num_workers: int = 0
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """
    Reads some pictures of a data set, a batch at a time.

    Args:
        pictures ([`Pictures`]): The data set.
        indices (`list[int]`): Which pictures, in the order wanted.
        batch_size (`int`): Pictures in a batch; the last one may be smaller.
        num_workers (`int`, defaults to 0): Processes that read; 0 reads in this one.

    Returns:
        `Iterator` of the indices of a batch, its images (B, H, W, 3) in uint8 and its labels (B,).
    """
    loader = DataLoader(Subset(pictures.dataset, indices), batch_size, num_workers=num_workers)
    for start, batch in zip(range(0, len(indices), batch_size), loader, strict=True):
        yield indices[start : start + batch_size], batch["image"], torch.as_tensor(batch["label"])


def load_pipeline(args: argparse.Namespace) -> DoDPipeline:
    """
    The pipeline that the options name, without progress bars.

    Args:
        args (`argparse.Namespace`): The options of [`add_picture_arguments`].

    Returns:
        [`DoDPipeline`].

    Raises:
        `ValueError`: it has no latent embedder.
    """
    pipeline = DoDPipeline.from_pretrained(args.pretrained_model_name_or_path, dtype=DTYPES[args.dtype])
    if pipeline.latent_embedder is None:
        raise ValueError(
            "`pretrained_model_name_or_path` must hold a pipeline with a `latent_embedder`, "
            f"got {args.pretrained_model_name_or_path!r}."
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(args.device)
