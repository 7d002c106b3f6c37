# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Encodes the pictures of a data set once, for any number of runs:

    accelerate launch training/encode_latents.py --train_data_dir path/to/imagenet/train --resolution 256 \\
        --random_flip --pretrained_vae_name_or_path stabilityai/sd-vae-ft-ema --latents_dtype float16 \\
        --latents_dir latents/imagenet

    accelerate launch training/train_dod.py --latents_dir latents/imagenet \\
        --pretrained_vae_name_or_path stabilityai/sd-vae-ft-ema --output_dir outputs/dod-b

All processes share the work. A run that was stopped goes on where it was, on any number of processes.
"""

import argparse
import logging
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import InitProcessGroupKwargs
from diffusers import AutoModel

from ..autoencoders import AUTOENCODERS, Autoencoder, spatial_factor
from ..checks import check_at_least, check_number
from ..data.buckets import bucket_sizes, encode_buckets
from ..data.encoding import ON_BAD_IMAGE, SHARD_SIZE, check_bad_images, encode_latents, finish_latents, latent_settings
from ..data.latents import DTYPES, LatentDataset, Latents, check_settings, find_damaged_shards, is_complete
from ..data.pictures import Pictures, load_pictures
from ..data.vision_features import VisionFeatures
from ..processes import all_or_none


logger = get_logger(__name__, log_level="INFO")

PATCH_SIZE = 2  # of all presets


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of pictures and latents to `parser`, for the commands that encode and that train."""
    data = parser.add_argument_group("data")
    data.add_argument("--dataset_name", help="`textures` (procedural) or a data set that `datasets` can load.")
    data.add_argument("--train_data_dir", help="Folder with one sub-folder of images per class.")
    data.add_argument("--image_column", default="image", help="Column of the images.")
    data.add_argument("--label_column", default="label", help="Column of the class ids.")
    data.add_argument("--num_train_samples", type=int, default=100_000, help="Number of procedural pictures.")
    data.add_argument("--resolution", type=int, default=256, help="Side of the centre crop in pixels.")
    data.add_argument("--random_flip", action="store_true", help="Mirror half of the images.")
    data.add_argument(
        "--max_aspect_ratio",
        type=float,
        help="Buckets of shapes up to this ratio of sides, about as large as the square, in place of squares.",
    )
    data.add_argument(
        "--pretrained_vae_name_or_path", help="Autoencoder (folder or Hub id); without one, a pixel-space model."
    )
    data.add_argument(
        "--latents_dir", type=Path, help="Folder of the latents; the trainer's default is `latents` in `--output_dir`."
    )
    data.add_argument("--latents_dtype", default="float32", choices=list(DTYPES), help="Of latents on disk.")
    data.add_argument(
        "--on_bad_image",
        default="error",
        choices=ON_BAD_IMAGE,
        help="Whether pictures that cannot be read are an error, or are left out and counted.",
    )
    data.add_argument("--shard_size", type=int, default=SHARD_SIZE, help="Pictures in a shard, the unit of the work.")
    data.add_argument("--dataloader_num_workers", type=int, default=0)
    data.add_argument("--encoding_batch_size", type=int, default=64, help="Images that are encoded at a time.")
    data.add_argument("--seed", type=int, default=0, help="Of procedural pictures, data stream and initial weights.")


def find_data_errors(args: argparse.Namespace, source_is_needed: bool) -> list[str]:
    """
    All that is wrong with the options of [`add_data_arguments`].

    Args:
        args (`argparse.Namespace`): The parsed options.
        source_is_needed (`bool`): Whether pictures must be given, not only their latents.

    Returns:
        `list[str]`: A message for each option that is out of range.
    """
    errors = []
    minimums = {"num_train_samples": 1, "resolution": 1, "encoding_batch_size": 1, "shard_size": 1}
    for name, minimum in (minimums | {"dataloader_num_workers": 0, "seed": 0}).items():
        try:
            check_at_least(name, getattr(args, name), minimum)
        except (TypeError, ValueError) as error:
            errors.append(str(error))
    if args.max_aspect_ratio is not None:
        try:
            check_number("max_aspect_ratio", args.max_aspect_ratio, 1)
        except ValueError as error:
            errors.append(str(error))
    sources = [args.dataset_name, args.train_data_dir]
    if all(source is not None for source in sources) or (source_is_needed and not any(sources)):
        errors.append(
            "Exactly one of `dataset_name` and `train_data_dir` must be given"
            f"{'' if source_is_needed else ', or none beside `latents_dir`'}, got {sources[0]!r} and {sources[1]!r}."
        )
    return errors


def load_autoencoder(path: str | None, device: torch.device) -> Autoencoder | None:
    """
    Loads an autoencoder of any kind that the pipeline takes.

    Args:
        path (`str` or `None`): A folder or a repository on the Hub; `None` for a pixel-space model.
        device (`torch.device`): Where it goes.

    Returns:
        [`Autoencoder`], not trainable, or `None`.

    Raises:
        `ValueError`: it is a model of another kind.
    """
    if path is None:
        return None
    vae = AutoModel.from_pretrained(path)
    if type(vae).__name__ not in AUTOENCODERS:
        raise ValueError(
            f"`pretrained_vae_name_or_path` must hold one of {', '.join(AUTOENCODERS)}, got {path!r}, "
            f"which holds a `{type(vae).__name__}`."
        )
    return vae.requires_grad_(False).eval().to(device)


def open_pictures(args: argparse.Namespace, accelerator: Accelerator) -> Pictures:
    """
    The pictures that the options name.

    Args:
        args (`argparse.Namespace`): The options of [`add_data_arguments`].
        accelerator (`Accelerator`): The processes.

    Returns:
        [`Pictures`].

    Raises:
        `ValueError`: see [`load_pictures`].
    """
    with accelerator.local_main_process_first():  # which prepares what `datasets` caches
        return load_pictures(
            args.dataset_name,
            args.train_data_dir,
            args.resolution,
            args.num_train_samples,
            args.seed,
            args.image_column,
            args.label_column,
        )


def encode_data(
    args: argparse.Namespace,
    accelerator: Accelerator,
    vae: Autoencoder | None,
    folder: Path,
    vision: VisionFeatures | None = None,
) -> Latents:
    """
    The latents of the pictures that the options name, encoded by all processes unless this has been done.

    Args:
        args (`argparse.Namespace`): The options of [`add_data_arguments`].
        accelerator (`Accelerator`): The processes, which share the shards.
        vae ([`Autoencoder`] or `None`): The autoencoder; without one the latents are the pixels.
        folder (`Path`): Where the latents are or go.
        vision ([`VisionFeatures`], *optional*): A vision model whose features of the pictures are stored too.

    Returns:
        [`Latents`].

    Raises:
        `ValueError`: the folder has the latents of other pictures, of another autoencoder or without the features, or
            a picture cannot be read.
    """
    pictures = open_pictures(args, accelerator)
    if args.max_aspect_ratio is not None:
        multiple = PATCH_SIZE * (1 if vae is None else spatial_factor(vae))
        latents = encode_buckets(
            pictures,
            bucket_sizes(args.resolution, multiple, args.max_aspect_ratio),
            vae,
            folder,
            args.random_flip,
            args.encoding_batch_size,
            args.dataloader_num_workers,
            args.latents_dtype,
            args.shard_size,
            args.on_bad_image,
            accelerator.process_index,
            accelerator.num_processes,
            vision=vision,
            all_or_none=all_or_none,
        )
        _warn_of_bad_images(latents)
        return latents
    settings = latent_settings(pictures, vae, args.random_flip, args.latents_dtype, vision)
    is_done = is_complete(folder)
    accelerator.wait_for_everyone()  # all have looked before anyone writes
    if not is_done:
        with all_or_none():
            encode_latents(
                pictures,
                vae,
                folder,
                args.random_flip,
                args.encoding_batch_size,
                args.dataloader_num_workers,
                args.latents_dtype,
                args.shard_size,
                args.on_bad_image,
                process_index=accelerator.process_index,
                num_processes=accelerator.num_processes,
                vision=vision,
            )
        with all_or_none():
            if accelerator.is_main_process:
                finish_latents(folder, settings, args.on_bad_image)
    latents = LatentDataset(folder)
    check_settings(folder, latents.manifest, settings)
    check_bad_images(latents.manifest["bad_images"], args.on_bad_image)
    _warn_of_bad_images(latents)
    return latents


def _warn_of_bad_images(latents: Latents) -> None:
    if latents.manifest["bad_images"]:
        logger.warning(f"{len(latents.manifest['bad_images'])} pictures that cannot be read are left out.")


def main(argv: list[str] | None = None) -> None:
    """The command; `argv` are its arguments, the process's by default. Raises a `ValueError` where they do not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument(
        "--repa_model_name_or_path",
        help="Vision model (folder or Hub id) whose features of the pictures are stored too, in float16.",
    )
    args = parser.parse_args(argv)
    errors = find_data_errors(args, source_is_needed=True)
    if args.latents_dir is None:
        errors.append("`latents_dir` must be a folder, got None.")
    if errors:
        parser.error("\n".join(errors))
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=24))])
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    vae = load_autoencoder(args.pretrained_vae_name_or_path, accelerator.device)
    vision = None
    if args.repa_model_name_or_path is not None:
        vision = VisionFeatures(args.repa_model_name_or_path, accelerator.device)
    latents = encode_data(args, accelerator, vae, args.latents_dir, vision)
    damaged = [part.folder / name for part in latents.parts for name in find_damaged_shards(part.folder)]
    if accelerator.is_main_process and damaged:
        raise ValueError(f"{args.latents_dir} must hold undamaged shards: remove {damaged} and encode again.")
    size = sum(path.stat().st_size for path in args.latents_dir.rglob("shard-*.safetensors"))
    logger.info(
        f"{args.latents_dir}: {len(latents):,} pictures of {len(latents.manifest['class_names'])} classes, "
        f"{latents.num_views} view(s) of {latents.latent_shape}, {size / len(latents) / 1024:.1f} KiB a picture."
    )
    accelerator.end_training()


if __name__ == "__main__":
    main()
