# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Training data of a run: latents on disk, or images that are read and encoded while the model trains."""

import copy
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset, Subset

from ..autoencoders import Autoencoder, encode_moments, latent_channels, spatial_factor
from ..data.class_names import clean_class_names, list_classes, read_class_names
from ..data.encoding import EncodingOptions, Share, describe_autoencoder
from ..data.foreign_latents import open_latents
from ..data.labelled_images import TRANSFORM, ImageOptions, find_shards
from ..data.latents import Latents, check_settings, images_of
from ..data.sample_stream import PositionSampler, SampleDraws, TrainingSamples, collate_priors_first
from ..data.streaming import ImageStream, build_stream_loader, open_stream
from ..devices import send
from ..processes import choose_num_workers, worker_settings
from ..training_options import DataOptions, TrainingOptions
from ..vision_features import VisionFeatures
from .encode_latents import encode_data, open_labelled_images


logger = get_logger(__name__, log_level="INFO")


class TrainingData(ABC):
    """
    Base class of training data: images with their classes, as inputs of [`DoDJointModel`].

    Args:
        class_names (`tuple[str, ...]`): Names of the classes in the order of their ids.
        latent_shape (`tuple[int, int, int]`): Shape (C, h, w) of the latents of a square image.
        resolution (`int`): Side of a square image in pixels.
        random_flip (`bool`): Whether half of the images are mirrored.
        device (`torch.device`): Device of the inputs.
        vision ([`VisionFeatures`], *optional*): The vision model whose features tokens are aligned with.
        in_bf16 (`bool`, defaults to `False`): Whether frozen models compute their products in bf16.
    """

    def __init__(
        self,
        class_names: tuple[str, ...],
        latent_shape: tuple[int, int, int],
        resolution: int,
        random_flip: bool,
        device: torch.device,
        vision: VisionFeatures | None = None,
        in_bf16: bool = False,
    ):
        self.class_names = class_names
        self.latent_shape = latent_shape
        self.resolution = resolution
        self.random_flip = random_flip
        self.device = device
        self.vision = vision
        self.in_bf16 = in_bf16

    @abstractmethod
    def batches(
        self,
        draws: SampleDraws,
        positions: PositionSampler,
        num_aligned_steps: int = 0,
        num_workers: int | None = 0,
        state: dict[str, Any] | None = None,
    ) -> Iterator[dict[str, Any]]:
        """
        The micro-batches of this process, read ahead by its workers.

        Args:
            draws ([`SampleDraws`]): The random draws.
            positions ([`PositionSampler`]): Positions of the samples of this process.
            num_aligned_steps (`int`, defaults to 0): Number of optimizer steps that align tokens with features.
            num_workers (`int` or `None`, defaults to 0):
                Processes that read images; 0 reads in this process, and `None` is the default of the device.
            state (`dict`, *optional*): The [`TrainingData.state`] of the step from which the run continues.

        Returns:
            `Iterator[dict]`: Micro-batches for [`TrainingData.to_inputs`].

        Raises:
            `ValueError`: the data or the state do not fit the other arguments.
        """

    def to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """
        Starts the copy of a micro-batch to the device, which nothing waits for.

        Args:
            batch (`dict`): A micro-batch from [`TrainingData.batches`].

        Returns:
            `dict`: The same for [`TrainingData.to_inputs`].
        """
        return {
            name: send(value, self.device) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }

    @abstractmethod
    def to_inputs(self, batch: dict[str, Any]) -> dict[str, torch.Tensor | int]:
        """
        Moves a micro-batch to the device, encodes images if needed, and computes features that are not stored.

        Args:
            batch (`dict`): A micro-batch from [`TrainingData.batches`] or [`TrainingData.to_device`].

        Returns:
            `dict`: Arguments of [`DoDJointModel`], with `features` in steps that align tokens.
        """

    def state(self) -> dict[str, Any]:
        """
        Position of the data behind the latest micro-batch of [`TrainingData.to_inputs`]; all processes must call it.

        Returns:
            `dict`: The state, ready for JSON. It is empty if the step alone gives the position.
        """
        return {}

    @property
    def identity(self) -> dict[str, Any]:
        """What the samples depend on, whatever options name it, ready for JSON; a resumed run compares it."""
        return {
            "class_names": list(self.class_names),
            "resolution": self.resolution,
            "random_flip": self.random_flip,
            "vision_model": None if self.vision is None else self.vision.describe(),
        }

    @abstractmethod
    def describe(self) -> str:
        """Describes the number of images in words."""

    @property
    def latent_shapes(self) -> list[tuple[int, int, int]]:
        """All shapes of the latents."""
        return [self.latent_shape]

    def check_patch_size(self, patch_size: int) -> None:
        """Raises a `ValueError` unless the sides of all latents are multiples of the model's `patch_size`."""
        for shape in self.latent_shapes:
            if any(side % patch_size for side in shape[1:]):
                raise ValueError(
                    f"The latents must have sides that are multiples of the model's patch size {patch_size}, "
                    f"got {shape}."
                )

    def _precision(self) -> torch.autocast:
        """The context in which frozen models compute."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.in_bf16)


class StoredLatents(TrainingData):
    """
    Latents on disk: of this package, of another project, or of images in buckets.

    Args:
        latents ([`Latents`]): The latents.
        factor (`int`): Pixels per latent pixel along a side.
        device (`torch.device`): Device of the inputs.
        vision ([`VisionFeatures`], *optional*): The vision model whose features tokens are aligned with.
        images (`torch.utils.data.Dataset`, *optional*):
            Dicts with the `image` (H, W, 3), uint8, of each latent, for features that are not stored with the latents.
        in_bf16 (`bool`, defaults to `False`): Whether the vision model computes its products in bf16.

    Raises:
        `ValueError`: the stored features belong to another vision model, or a vision model has neither features nor
            images.
    """

    def __init__(
        self,
        latents: Latents,
        factor: int,
        device: torch.device,
        vision: VisionFeatures | None = None,
        images: Dataset | None = None,
        in_bf16: bool = False,
    ):
        manifest = latents.manifest
        if vision is not None and "vision_model" in manifest:
            check_settings(latents.folder, manifest, {"vision_model": vision.describe()})
        elif vision is not None and images is None:
            raise ValueError(
                "`repa_model_name_or_path` must be given with square images, or with latents that "
                f"`encode_latents.py` has stored features beside, got latents without them in {latents.folder}."
            )
        super().__init__(
            clean_class_names(manifest["class_names"]),
            latents.latent_shape,
            resolution=manifest["resolution"] or latents.latent_shape[1] * factor,
            random_flip=manifest["random_flip"],
            device=device,
            vision=vision,
            in_bf16=in_bf16,
        )
        self.latents = latents
        self.images = images

    @property
    def latent_shapes(self) -> list[tuple[int, int, int]]:
        """Shapes of the latents, one for each bucket."""
        return [part.latent_shape for part in self.latents.parts]

    def batches(
        self,
        draws: SampleDraws,
        positions: PositionSampler,
        num_aligned_steps: int = 0,
        num_workers: int | None = 0,
        state: dict[str, Any] | None = None,
    ) -> Iterator[dict[str, Any]]:
        num_aligned = num_aligned_steps * positions.images_per_step
        samples = TrainingSamples(self.latents, draws, positions.images_per_step, num_aligned, self.images)
        return iter(
            DataLoader(
                samples,
                batch_size=positions.batch_size,
                sampler=positions,
                collate_fn=collate_priors_first,
                pin_memory=self.device.type == "cuda",
                **worker_settings(choose_num_workers(num_workers, self.device, positions.num_processes)),
            )
        )

    @property
    def identity(self) -> dict[str, Any]:
        """What the samples depend on, as the manifest of the latents states it."""
        manifest = self.latents.manifest
        stated = ("images", "transform", "autoencoder", "latents_dtype", "buckets")
        return {
            **super().identity,
            "num_images": len(self.latents),
            **{name: manifest[name] for name in stated if name in manifest},
        }

    def to_inputs(self, batch: dict[str, Any]) -> dict[str, torch.Tensor | int]:
        inputs = self.to_device(batch)
        if "pixels" in inputs:
            with self._precision():
                inputs["features"] = self.vision(inputs.pop("pixels"))
        return inputs

    def describe(self) -> str:
        return f"{len(self.latents):,} images of {len(self.class_names)} classes"


class StreamedImages(TrainingData):
    """
    Images that are read, cropped and encoded while the model trains.

    Args:
        stream (`datasets.IterableDataset`): A stream from [`open_stream`].
        class_names (`tuple[str, ...]`): Names of the classes in the order of their ids.
        vae ([`Autoencoder`] or `None`): The autoencoder; without one the latents are the pixels.
        images ([`ImageOptions`]): Columns of the stream, and the side of the images in pixels.
        encoding ([`EncodingOptions`]): Whether half of the images are mirrored, and the treatment of bad ones.
        device (`torch.device`): Device of the inputs.
        vision ([`VisionFeatures`], *optional*): The vision model whose features tokens are aligned with.
        in_bf16 (`bool`, defaults to `False`): Whether autoencoder and vision model compute their products in bf16.

    Raises:
        `ValueError`: the autoencoder does not take images of this resolution.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        class_names: tuple[str, ...],
        vae: Autoencoder | None,
        images: ImageOptions,
        encoding: EncodingOptions,
        device: torch.device,
        vision: VisionFeatures | None = None,
        in_bf16: bool = False,
    ):
        resolution = images.resolution
        channels, factor = (3, 1) if vae is None else (latent_channels(vae), spatial_factor(vae))
        if resolution % factor:
            raise ValueError(f"`resolution` must be a multiple of {factor} for this `vae`, got {resolution}.")
        side = resolution // factor
        super().__init__(
            class_names,
            (channels, side, side),
            resolution=resolution,
            random_flip=encoding.random_flip,
            device=device,
            vision=vision,
            in_bf16=in_bf16,
        )
        self.stream = stream
        self.vae = vae
        self.images = images
        self.encoding = encoding

    def batches(
        self,
        draws: SampleDraws,
        positions: PositionSampler,
        num_aligned_steps: int = 0,
        num_workers: int | None = 0,
        state: dict[str, Any] | None = None,
    ) -> Iterator[dict[str, Any]]:
        states = (state or {}).get("stream")
        if num_workers is None and states is not None:
            num_workers = states[0]["num_workers"]  # a stream is exact with these only
        elif num_workers is None:  # each worker reads shards of its own
            most = self.stream.num_shards // positions.num_processes
            num_workers = min(choose_num_workers(None, self.device, positions.num_processes), most)
        samples = ImageStream(
            self.stream,
            self.class_names,
            draws,
            self.latent_shape,
            batch_size=positions.batch_size,
            images=self.images,
            encoding=replace(self.encoding, dataloader_num_workers=num_workers),
            share=Share(positions.process_index, positions.num_processes),
            # With other processes than before, the error names what does not fit.
            state=None if states is None else states[positions.process_index % len(states)],
        )
        self._position = samples.state
        if self._position.num_batches != positions.start_micro_step:
            raise ValueError(
                f"The stream must go on behind {positions.start_micro_step} micro-batches, got a checkpoint behind "
                f"{self._position.num_batches}: `streaming` and `gradient_accumulation_steps` must be as in the run "
                "that is resumed."
            )
        loader = iter(build_stream_loader(samples, pin_memory=self.device.type == "cuda"))
        return self._follow(loader, num_aligned_steps * positions.accumulation)

    def _follow(self, loader: Iterator[dict[str, Any]], num_aligned: int) -> Iterator[dict[str, Any]]:
        """Yields the batches of a loader, with the state behind each; the first batches are aligned."""
        position = copy.deepcopy(self._position)
        for batch in loader:
            position.update(batch)
            yield {**batch, "is_aligned": position.num_batches <= num_aligned, "position": copy.deepcopy(position)}

    @torch.no_grad()
    def to_inputs(self, batch: dict[str, Any]) -> dict[str, torch.Tensor | int]:
        inputs = self.to_device(batch)
        self._position = inputs.pop("position")
        pixels, posterior_noise = inputs.pop("pixels"), inputs.pop("posterior_noise")
        if self.in_bf16:  # where convolutions of channels that come last are faster
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        with self._precision():
            mean, std = encode_moments(pixels, self.vae)
            if inputs.pop("is_aligned"):
                inputs["features"] = self.vision(pixels)
        inputs["latents"] = mean if std is None else mean + std * posterior_noise
        return inputs

    @property
    def identity(self) -> dict[str, Any]:
        """What the samples depend on, as far as a stream tells it in advance."""
        name = self.images.dataset_name
        return {
            **super().identity,
            "dataset_name": name if name is None or not Path(name).exists() else "a local folder",
            "image_column": self.images.image_column,
            "label_column": self.images.label_column,
            "autoencoder": describe_autoencoder(self.vae),
        }

    def state(self) -> dict[str, Any]:
        if num_bad := sum(gather_object([self._position.num_bad_images])):
            logger.warning(f"{num_bad} images that cannot be read have been left out so far.")
        return {"stream": gather_object([self._position.state_dict()])}

    def describe(self) -> str:
        return f"streamed images of {len(self.class_names)} classes"


def open_stored_latents(
    data: DataOptions, accelerator: Accelerator, vae: Autoencoder | None, output_dir: Path
) -> Latents:
    """
    Opens the latents of `--latents_dir`, or of images; all processes encode these unless that has been done.

    Args:
        data ([`DataOptions`]): The options of the data.
        accelerator (`Accelerator`): The processes. They share the work of encoding.
        vae ([`Autoencoder`] or `None`): The autoencoder; without one the latents are the pixels.
        output_dir (`Path`): Folder of the run. Without `--latents_dir` the latents of images are in `latents` there.

    Returns:
        [`Latents`].

    Raises:
        `ValueError`: a folder has the latents of other images or of another autoencoder, or an image cannot be read.
    """
    folder = data.latents_dir
    if data.images.has_source:
        return encode_data(data, accelerator, vae, folder or output_dir / "latents")
    latents = open_latents(folder, vae)
    class_names = latents.manifest["class_names"]
    counts = Counter(latents.labels.tolist())
    lines = [f"{folder}: latents of {len(latents):,} images of {len(class_names)} classes"]
    logger.info("\n".join(lines + list_classes(class_names, counts)))
    if "autoencoder" not in latents.manifest:
        logger.warning(f"{folder} does not say which autoencoder it comes from: it is taken for the given.")
        return latents
    expected: dict[str, Any] = {"autoencoder": describe_autoencoder(vae)}
    if data.encoding.random_flip:
        expected["random_flip"] = True
    check_settings(folder, latents.manifest, expected)
    return latents


def open_training_data(
    options: TrainingOptions,
    accelerator: Accelerator,
    vae: Autoencoder | None,
    vision: VisionFeatures | None = None,
) -> TrainingData:
    """
    Opens the data that the options name.

    Args:
        options ([`TrainingOptions`]): The run's options.
        accelerator (`Accelerator`): The processes. They share the work of encoding.
        vae ([`Autoencoder`] or `None`): The autoencoder; without one the latents are the pixels.
        vision ([`VisionFeatures`], *optional*): The vision model whose features tokens are aligned with.

    Returns:
        [`TrainingData`].

    Raises:
        `ValueError`: the data cannot be opened, a folder has latents of other images or of another autoencoder, or an
            image cannot be read.
    """
    in_bf16 = options.precision.encoder_precision == "bf16"
    if options.precision.encoder_precision is None:
        in_bf16 = accelerator.device.type == "cuda" and accelerator.mixed_precision == "bf16"
    if options.stream.streaming:
        file = options.stream.class_names_file
        names = None if file is None else read_class_names(file)
        stream, class_names = open_stream(options.data.images, names)
        logger.info("\n".join([f"A stream of {len(class_names)} classes", *list_classes(class_names)]))
        folder = options.data.images.train_data_dir
        for reason, part in (find_shards(folder).left_out if folder is not None else {}).items():
            logger.info(f"Left out of {folder}, {reason}: {part}")
        return StreamedImages(
            stream,
            class_names,
            vae,
            images=options.data.images,
            encoding=options.data.encoding,
            device=accelerator.device,
            vision=vision,
            in_bf16=in_bf16,
        )
    latents = open_stored_latents(options.data, accelerator, vae, options.output.output_dir)
    images = None
    needs_images = vision is not None and "vision_model" not in latents.manifest
    if options.data.images.has_source and needs_images and latents.manifest["transform"] == TRANSFORM:
        source = open_labelled_images(options.data, accelerator)
        images = Subset(source.dataset, images_of(latents, source).tolist())
    factor = 1 if vae is None else spatial_factor(vae)
    return StoredLatents(latents, factor, accelerator.device, vision=vision, images=images, in_bf16=in_bf16)
