# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Encodes the images of a data set once, for any number of runs:

    accelerate launch training/encode_latents.py --train_data_dir path/to/imagenet/train --resolution 256 \\
        --random_flip --pretrained_vae_name_or_path stabilityai/sd-vae-ft-ema --latents_dtype float16 \\
        --latents_dir latents/imagenet

    accelerate launch training/train_dod.py --latents_dir latents/imagenet \\
        --pretrained_vae_name_or_path stabilityai/sd-vae-ft-ema --output_dir outputs/dod-b

All processes share the work. A run that was stopped continues where it was, on any number of processes.
"""

import logging
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoModel

from ..autoencoders import Autoencoder, check_autoencoder, spatial_factor
from ..checkpoint_manifest import CHECKPOINT_MANIFEST, check_checkpoint
from ..checks import abbreviate
from ..command_line import run_main
from ..data.buckets import bucket_sizes, encode_buckets
from ..data.encoding import Share, encode_latents, finish_latents, latent_settings
from ..data.image_folder import check_bad_images
from ..data.labelled_images import LabelledImages, load_labelled_images
from ..data.latents import LatentDataset, Latents, check_settings, find_damaged_shards, is_complete
from ..files import in_use
from ..options import option, parse_options
from ..pipeline_dod import DoDPipeline
from ..processes import (
    all_or_none,
    check_processes,
    choose_num_workers,
    end_processes,
    gather_patiently,
    process_group_timeout,
)
from ..shipped import find_shipped
from ..training_options import DataOptions
from ..vision_features import VisionFeatures


logger = logging.getLogger(__name__)

PATCH_SIZE = 2  # of all presets


def find_autoencoder(path: str | None, pipeline: str | None = None) -> tuple[str, str | None] | None:
    """
    Finds the autoencoder of a run.

    Args:
        path (`str` or `None`): A folder or a repository on the Hub with an autoencoder.
        pipeline (`str`, *optional*): A pipeline, whose own autoencoder is the default.

    Returns:
        `tuple[str, str | None] | None`: The folder or repository, and the sub-folder in it; `None` for a pixel-space
        model.

    Raises:
        `OSError`: the pipeline cannot be read.
    """
    if path is not None:
        return find_shipped(path), None
    pipeline = None if pipeline is None else find_shipped(pipeline)
    if pipeline is not None and (DoDPipeline.load_config(pipeline).get("vae") or [None])[0] is not None:
        return pipeline, "vae"
    return None


def load_autoencoder(path: str | None, device: torch.device, pipeline: str | None = None) -> Autoencoder | None:
    """
    Loads an autoencoder of any kind that the pipeline takes. A warning says if there is none.

    Args:
        path (`str` or `None`): A folder or a repository on the Hub with an autoencoder.
        device (`torch.device`): Device of the autoencoder.
        pipeline (`str`, *optional*): A pipeline, whose own autoencoder is the default.

    Returns:
        [`Autoencoder`], not trainable, or `None` for a pixel-space model.

    Raises:
        `OSError`: the autoencoder or the pipeline cannot be read.
        `TypeError`: the model is of another kind.
        `ValueError`: its settings give latents no finite mean, or no standard deviation above 0.
    """
    found = find_autoencoder(path, pipeline)
    if found is None:
        logger.warning(
            "NO AUTOENCODER: `pretrained_vae_name_or_path` is not given, so this is a model of pixels, not of latents."
        )
        return None
    path, subfolder = found
    if subfolder is not None:
        logger.info(f"The autoencoder is that of {path}, since `pretrained_vae_name_or_path` is not given.")
    if subfolder is not None and Path(path, CHECKPOINT_MANIFEST).is_file():
        check_checkpoint("pretrained_model_name_or_path", Path(path), [subfolder])
    vae = AutoModel.from_pretrained(path, subfolder=subfolder)
    check_autoencoder("pretrained_vae_name_or_path", vae)
    return vae.requires_grad_(False).eval().to(device)


def open_labelled_images(options: DataOptions, accelerator: Accelerator) -> LabelledImages:
    """
    Opens the images that the options name.

    Args:
        options ([`DataOptions`]): The options.
        accelerator (`Accelerator`): The processes.

    Returns:
        [`LabelledImages`].

    Raises:
        `ValueError`: see [`load_labelled_images`].
    """
    load = partial(
        load_labelled_images, options.images, options.num_train_samples, options.seed, options.encoding.on_bad_image
    )
    with all_or_none():  # the first process of each machine prepares what `datasets` caches
        images = load() if accelerator.is_local_main_process else None
    return load() if images is None else images


def encode_data(
    options: DataOptions,
    accelerator: Accelerator,
    vae: Autoencoder | None,
    folder: Path,
    vision: VisionFeatures | None = None,
) -> Latents:
    """
    Opens the latents of the images that the options name; all processes encode them unless this has been done.

    Args:
        options ([`DataOptions`]): The options.
        accelerator (`Accelerator`): The processes. They share the shards.
        vae ([`Autoencoder`] or `None`): The autoencoder; without one the latents are the pixels.
        folder (`Path`): Folder of the latents.
        vision ([`VisionFeatures`], *optional*): A vision model whose features of the images are stored too.

    Returns:
        [`Latents`].

    Raises:
        `ValueError`: the folder has the latents of other images, of another autoencoder or without the features, or
            an image cannot be read.
    """
    images, encoding = open_labelled_images(options, accelerator), options.encoding
    num_workers = choose_num_workers(encoding.dataloader_num_workers, accelerator.device, accelerator.num_processes)
    encoding = replace(encoding, dataloader_num_workers=num_workers)
    logger.info(images.describe())
    logger.info(f"Encoding with {accelerator.num_processes} process(es) on {accelerator.device.type}.")
    share = Share(accelerator.process_index, accelerator.num_processes)
    with ExitStack() as stack:
        with all_or_none():
            if accelerator.is_main_process:  # what another command is encoding is worth waiting for
                stack.enter_context(in_use(folder, "latents_dir", waits=True))
        if encoding.max_aspect_ratio is not None:
            multiple = PATCH_SIZE * (1 if vae is None else spatial_factor(vae))
            latents = encode_buckets(
                images,
                bucket_sizes(options.images.resolution, multiple, encoding.max_aspect_ratio),
                vae,
                folder,
                encoding,
                share=share,
                vision=vision,
                all_or_none=all_or_none,
            )
            _warn_of_bad_images(latents)
            return latents
        settings = latent_settings(images, vae, encoding, vision)
        is_done = all(gather_patiently(is_complete(folder)))  # all have looked before anyone writes
        if not is_done:
            with all_or_none():
                encode_latents(images, vae, folder, encoding, share=share, vision=vision)
            with all_or_none():
                if accelerator.is_main_process:
                    finish_latents(folder, settings, encoding.on_bad_image)
        latents = LatentDataset(folder)
        check_settings(folder, latents.manifest, settings)
        check_bad_images(latents.manifest["bad_images"], encoding.on_bad_image)
        _warn_of_bad_images(latents)
        return latents


def _warn_of_bad_images(latents: Latents) -> None:
    if latents.manifest["bad_images"]:
        logger.warning(f"{len(latents.manifest['bad_images'])} images that cannot be read are left out.")


@dataclass(frozen=True, kw_only=True)
class EncodeLatentsOptions:
    """Options of the command."""

    data: DataOptions = field(default_factory=DataOptions)
    repa_model_name_or_path: str | None = option(
        None, help="Vision model (folder or Hub id) whose features of the images are stored too, in float16."
    )

    allow_tf32: bool = option(
        False, help="TF32 products and convolutions on NVIDIA GPUs, which the manifest of the latents states."
    )

    def find_conflicts(self) -> list[str]:
        """Messages about options that do not fit each other."""
        found = self.data.images.find_source_errors()
        if self.data.latents_dir is None:
            found.append("`latents_dir` must be a folder, got None.")
        return found


def main(argv: list[str] | None = None) -> None:
    """Runs the command; `argv` defaults to the process's arguments. Raises a `ValueError` if they do not fit."""
    options = parse_options(EncodeLatentsOptions, argv, __doc__)
    folder = options.data.latents_dir
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.allow_tf32
    accelerator = Accelerator(kwargs_handlers=[process_group_timeout()])
    check_processes(accelerator)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("diffusers_dod").setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    vae = load_autoencoder(options.data.pretrained_vae_name_or_path, accelerator.device)
    vision = None
    if options.repa_model_name_or_path is not None:
        vision = VisionFeatures(options.repa_model_name_or_path, accelerator.device)
    latents = encode_data(options.data, accelerator, vae, folder, vision)
    with all_or_none():
        if accelerator.is_main_process:
            damaged = [str(part.folder / name) for part in latents.parts for name in find_damaged_shards(part.folder)]
            if damaged:
                raise ValueError(
                    f"{folder} must hold undamaged shards: remove {abbreviate(damaged)} and encode again."
                )
    size = sum(path.stat().st_size for path in folder.rglob("shard-*.safetensors"))
    logger.info(
        f"{folder}: {len(latents):,} images of {len(latents.manifest['class_names'])} classes, "
        f"{latents.num_views} view(s) of {latents.latent_shape}, {size / len(latents) / 1024:.1f} KiB an image."
    )
    end_processes(accelerator)


if __name__ == "__main__":
    run_main(main)
