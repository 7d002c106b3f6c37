# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Images and pipeline of a command that compares both, from its options."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import is_peft_available
from torch.utils.data import DataLoader, Subset

from ..data.labelled_images import MAX_WORKERS, TRANSFORM, ImageOptions, LabelledImages, load_labelled_images
from ..data.latents import DTYPES
from ..lora import adapts, find_lora_file, read_lora_classes
from ..options import option
from ..pipeline_dod import DoDPipeline
from ..seeding import stateless_generator
from ..shipped import find_shipped
from ..transformer_dod import DoDTransformer2DModel
from .images import image_identity


DESK_CHECKPOINT = "checkpoints/dod-desk"  # which comes with the package


def check_device(name: str, device: str) -> None:
    """Raises a `ValueError` that names the argument `name` unless PyTorch has the `device` here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where PyTorch was built without CUDA
        raise ValueError(f"`{name}` must be one that PyTorch has here, got {device!r}: {error}") from error


def device_option() -> Any:
    """Declares the option of the device, a GPU by default if there is one."""
    return option("cuda" if torch.cuda.is_available() else "cpu", check=check_device, help="Device to compute on.")


def lora_weights_option() -> Any:
    """Declares the option of the LoRA adapters that the pipeline of a command gets."""
    return option(
        None,
        help="LoRA adapters for the pipeline: folder of a training with `--lora_rank`, safetensors file or Hub id "
        "(needs `pip install 'diffusers-dod[lora]'`).",
    )


@dataclass(frozen=True, kw_only=True)
class ComparisonOptions:
    """Pipeline and images of a command that compares both."""

    pretrained_model_name_or_path: str = option(help="The pipeline (folder or Hub id).")
    lora_weights: str | None = lora_weights_option()
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


def load_pipeline(
    path: str, lora_weights: str | None = None, dtype: str = "float32", use_token_prior: bool = False
) -> DoDPipeline:
    """
    Loads the pipeline of a command, without a bar of its progress.

    Args:
        path (`str`): The pipeline, a folder or a Hub id.
        lora_weights (`str`, *optional*): LoRA adapters that it gets, see [`find_lora_file`]. If they are of other
            number of classes, it gets these, too, each from its null class. It has no token prior if they are of other
            classes, by number or name, or change the latent embedder.
        dtype (`str`, defaults to `"float32"`): Name of the data type of the weights.
        use_token_prior (`bool`, defaults to `False`): Whether the command needs the pipeline's token prior.

    Returns:
        [`DoDPipeline`], on the CPU.

    Raises:
        `OSError`: there is no such pipeline, or there are no such adapters.
        `ValueError`: a file is something else or damaged, the adapters do not fit the pipeline, or they do not fit the
            token prior that is needed.
        `ImportError`: PEFT is not installed.
    """
    path, loading = find_shipped(path), {"dtype": DTYPES[dtype]}
    if lora_weights is None:
        pipeline = DoDPipeline.from_pretrained(path, **loading)
    else:
        if not is_peft_available():
            raise ImportError("`lora_weights` needs PEFT: `pip install 'diffusers-dod[lora]'`.")
        file = find_lora_file(lora_weights)
        index = DoDPipeline.load_config(path)
        arguments = _find_class_arguments(path, file, loading)
        has_token_prior = (index.get("token_prior") or [None])[0] is not None
        names, reason = index.get("id2label"), None
        if "transformer" in arguments or arguments.get("id2label", names) != names:
            reason = f"of other classes than those of {path}"
        elif adapts(file, DoDPipeline.latent_embedder_name):
            reason = f"that change the latent embedder of {path}"
        if has_token_prior and reason is not None:
            arguments["token_prior"] = None
            if use_token_prior:
                raise ValueError(
                    f"`use_token_prior` must be False with adapters {reason}, for which its token prior was trained, "
                    f"got True with {lora_weights}."
                )
        pipeline = DoDPipeline.from_pretrained(path, **arguments, **loading)
        try:
            pipeline.load_lora_weights(file)
        except (RuntimeError, ValueError) as error:  # the former of PyTorch, for weights of other shapes
            raise ValueError(f"`lora_weights` must be adapters of {path}, got {lora_weights}: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _find_class_arguments(path: str, file: Path, loading: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `from_pretrained` that give a pipeline the classes of the adapters in a file."""
    num_classes, names = read_lora_classes(file)
    arguments: dict[str, Any] = {} if names is None else {"id2label": names}
    if num_classes not in (None, DoDTransformer2DModel.load_config(path, subfolder="transformer")["num_classes"]):
        loading = loading | {"subfolder": "transformer", "num_classes": num_classes}
        transformer = DoDTransformer2DModel.from_pretrained(path, **loading)
        arguments = {"transformer": transformer, "id2label": names}
    return arguments


def load_with_embedder(options: ComparisonOptions) -> DoDPipeline:
    """
    Loads the pipeline that the options name, which must have a latent embedder.

    Args:
        options ([`ComparisonOptions`]): The options.

    Returns:
        [`DoDPipeline`], on the device of the options.

    Raises:
        `OSError`, `ValueError`, `ImportError`: see [`load_pipeline`]; or the pipeline has no latent embedder.
    """
    pipeline = load_pipeline(options.pretrained_model_name_or_path, options.lora_weights, options.dtype)
    if pipeline.latent_embedder is None:
        raise ValueError(
            "`pretrained_model_name_or_path` must hold a pipeline with a `latent_embedder`, "
            f"got {options.pretrained_model_name_or_path!r}."
        )
    return pipeline.to(options.device)
