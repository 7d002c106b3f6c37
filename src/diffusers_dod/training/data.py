# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Training data: pictures, their latents, and the stream of samples that is a function of (seed, position)."""

import hashlib
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset, Sampler, default_collate

from ..rectified_flow import logit_normal_sigma, shift_sigma
from ..seeding import stateless_generator
from .textures import TEXTURE_CLASSES, TextureDataset


if TYPE_CHECKING:
    import datasets

    from .latents import Latents

TEXTURES = "textures"


def to_rgb(image: Image.Image) -> Image.Image:
    """
    A picture as 8-bit RGB: turned as its EXIF orientation says, what is transparent on white, grey in 16 bits scaled.

    Args:
        image (`PIL.Image.Image`): A picture of any mode.

    Returns:
        `PIL.Image.Image` of mode RGB.

    Raises:
        `ValueError`: it is a picture of floats.
    """
    if image.mode == "F":
        raise ValueError("a picture of floats has no range that is known")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image).astype(np.float64)  # Pillow would clip them at 255
        image = Image.fromarray(np.clip(values / 257, 0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def cover_and_crop(image: Image.Image, height: int, width: int) -> np.ndarray:
    """
    Scales a picture to the smallest size that covers a rectangle and crops its centre: halved with a box filter while
    at least twice as large, then bicubic.

    Args:
        image (`PIL.Image.Image`): A picture of any mode and size.
        height (`int`): Height of the rectangle in pixels.
        width (`int`): Width of the rectangle in pixels.

    Returns:
        `np.ndarray` of shape `(height, width, 3)`, uint8 RGB.
    """
    image = to_rgb(image)
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample=Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.array(image.crop((left, top, left + width, top + height)))


def center_crop(image: Image.Image, resolution: int) -> np.ndarray:
    """
    ADM's centre crop: [`cover_and_crop`] for a square.

    Args:
        image (`PIL.Image.Image`): A picture of any mode and size.
        resolution (`int`): Side of the square in pixels.

    Returns:
        `np.ndarray` of shape `(resolution, resolution, 3)`, uint8 RGB.
    """
    return cover_and_crop(image, resolution, resolution)


class PictureDataset(Dataset):
    """
    Labelled pictures of a `datasets.Dataset` as uint8 arrays, cropped by [`center_crop`].

    Args:
        dataset (`datasets.Dataset`): The data set.
        image_column (`str`): Its column of pictures.
        label_column (`str`): Its column of class ids.
        resolution (`int`): Side of the pictures in pixels.
        class_ids (`dict`, *optional*): The id of each label, where it is not the label itself.
    """

    def __init__(self, dataset, image_column: str, label_column: str, resolution: int, class_ids: dict | None = None):
        import datasets

        # Read here, so that what cannot be read has a path and a reason.
        self.dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
        self.image_column = image_column
        self.label_column = label_column
        self.resolution = resolution
        self.class_ids = class_ids

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        row = self.dataset[index]
        source, label = row[self.image_column], row[self.label_column]
        if source is None or label is None:
            raise ValueError(f"row {index} lacks its {'picture' if source is None else 'label'}")
        data = source["path"] if source["bytes"] is None else io.BytesIO(source["bytes"])
        with Image.open(data) as image:
            pixels = center_crop(image, self.resolution)
        return {"image": pixels, "label": label if self.class_ids is None else self.class_ids[label]}

    def path_of(self, index: int) -> str:
        """The path of the picture at `index`, or its place in the data set if it has none."""
        source = self.dataset[index][self.image_column]
        return (source or {}).get("path") or f"row {index}"


@dataclass(frozen=True)
class Pictures:
    """
    A picture data set with what names it.

    Args:
        dataset (`torch.utils.data.Dataset`): Yields dicts with the `image`, uint8 (H, W, 3), and the `label`, an id.
        class_names (`tuple[str, ...]`): Names of the classes in the order of their ids.
        fingerprint (`str`): Another one for other pictures.
        resolution (`int`): Side of the pictures in pixels.
    """

    dataset: Dataset
    class_names: tuple[str, ...]
    fingerprint: str
    resolution: int

    def path_of(self, index: int) -> str:
        """The path of the picture at `index`, or its place in the data set if it has none."""
        return self.dataset.path_of(index) if hasattr(self.dataset, "path_of") else f"row {index}"


def load_pictures(
    dataset_name: str | None,
    train_data_dir: str | None,
    resolution: int,
    num_train_samples: int,
    seed: int,
    image_column: str = "image",
    label_column: str = "label",
) -> Pictures:
    """
    Opens the procedural `textures`, a data set of the Hub, or a folder: with one sub-folder of pictures per class,
    or, without sub-folders, with Parquet files or tar files in the form of WebDataset.

    Args:
        dataset_name (`str` or `None`): `"textures"` or what `datasets.load_dataset` takes.
        train_data_dir (`str` or `None`): A folder; exactly one of the two must be given.
        resolution (`int`): Side of the pictures in pixels.
        num_train_samples (`int`): Number of procedural pictures.
        seed (`int`): Seed of the procedural pictures.
        image_column (`str`, defaults to `"image"`): Column of the pictures.
        label_column (`str`, defaults to `"label"`):
            Column of the classes: of type `ClassLabel`, or names, whose ids are in alphabetical order, or ids from 0.

    Returns:
        [`Pictures`].

    Raises:
        `ValueError`: both or neither source is given, it cannot be opened, or it has no such columns or no classes.
    """
    if (dataset_name is None) == (train_data_dir is None):
        raise ValueError(
            "Exactly one of `dataset_name` and `train_data_dir` must be given, "
            f"got dataset_name={dataset_name!r} and train_data_dir={train_data_dir!r}."
        )
    if dataset_name == TEXTURES:
        dataset = TextureDataset(num_train_samples, size=resolution, seed=seed)
        return Pictures(dataset, TEXTURE_CLASSES, f"{TEXTURES}-{resolution}-{num_train_samples}-{seed}", resolution)

    source = _open_folder(train_data_dir) if dataset_name is None else open_dataset(dataset_name)
    for name, column in {"image_column": image_column, "label_column": label_column}.items():
        if column not in source.features:
            raise ValueError(
                f"`{name}` must be one of the columns {sorted(source.features)}, got {column!r}. "
                "An image folder needs one sub-folder per class."
            )
    class_names, class_ids = _classes(source, label_column)
    if train_data_dir is not None and label_column == "label":
        # Folders without a picture are classes too, so that the ids stay when pictures come and go.
        folders = _class_folders(train_data_dir)
        if set(class_names) <= set(folders):
            class_ids = {label: folders.index(name) for label, name in enumerate(class_names)}
            class_names = folders
    pictures = PictureDataset(source, image_column, label_column, resolution, class_ids)
    identity = source._fingerprint if train_data_dir is None else _folder_fingerprint(train_data_dir)
    fingerprint = f"{identity}-{image_column}-{label_column}"
    return Pictures(pictures, tuple(class_names), fingerprint, resolution)


def _open_folder(folder: str) -> "datasets.Dataset":
    import datasets  # slow to import, and not needed for the procedural set

    if not os.path.isdir(folder):
        raise ValueError(f"`train_data_dir` must be an existing folder, got {folder!r}.")
    has_folders = bool(_class_folders(folder))
    if not has_folders:
        for builder, pattern in (("parquet", "*.parquet"), ("webdataset", "*.tar")):
            files = sorted(str(path) for path in Path(folder).glob(pattern))
            if files:
                return datasets.load_dataset(builder, data_files=files, split="train")
    return datasets.load_dataset(
        "imagefolder", data_dir=folder, split="train", drop_labels=False if has_folders else None
    )


def _class_folders(folder: str) -> list[str]:
    """Names of the sub-folders, but for those that `datasets` passes over."""
    names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    return sorted(name for name in names if not name.startswith((".", "__")))


def _folder_fingerprint(folder: str) -> str:
    """A hash of names, sizes and times of all files, wherever the folder lies."""
    digest = hashlib.sha256()
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(parent, name)
            status = os.stat(path)
            digest.update(f"{os.path.relpath(path, folder)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def open_dataset(name: str, **options: Any) -> "datasets.Dataset | datasets.IterableDataset":
    """
    Opens the training split of a data set of the Hub.

    Args:
        name (`str`): What `datasets.load_dataset` takes.
        options (`Any`): Further arguments of that.

    Returns:
        `datasets.Dataset`, or with `streaming=True` a `datasets.IterableDataset`.

    Raises:
        `ValueError`: there is none, or its licence has not been accepted.
    """
    import datasets

    try:
        return datasets.load_dataset(name, split="train", **options)
    except datasets.exceptions.DatasetNotFoundError as error:
        hint = ""
        if "gated" in str(error):
            hint = f" Accept its licence at https://huggingface.co/datasets/{name}, then log in with `hf auth login`."
        raise ValueError(
            f"`dataset_name` must be a data set that can be opened, got {name!r}: {error}{hint}"
        ) from error


def _classes(source: "datasets.Dataset", label_column: str) -> tuple[list[str], dict | None]:
    """Names of the classes of a data set by id, and the id of each label where it is not the label itself."""
    feature = source.features[label_column]
    if getattr(feature, "names", None) is not None:
        return list(feature.names), None
    labels = {label for label in source.unique(label_column) if label is not None}
    if labels and all(isinstance(label, str) for label in labels):
        names = sorted(labels)
        return names, {name: index for index, name in enumerate(names)}
    if labels and all(isinstance(label, int) and label >= 0 for label in labels):
        return [str(index) for index in range(max(labels) + 1)], None
    raise ValueError(
        "`label_column` must be a column of class labels, names or ids from 0, "
        f"got {label_column!r} of type {feature}."
    )


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """Pictures `images` (B, H, W, 3) in uint8 -> pixels (B, 3, H, W) in [-1, 1], fp32."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


@dataclass
class SampleDraw:
    """
    The random draws of one training sample, but for those whose shape is that of its latents.

    Args:
        view (`float`): In [0, 1): which view of the picture, its first half the picture itself.
        sigma (`torch.Tensor` of shape `()`): Time in [0, 1].
        drops_label (`bool`): Whether the null class takes the place of its class.
        drops_prior (`bool`): Whether it is trained without its prior.
        generator (`torch.Generator`): Draws its noise and then its posterior noise.
    """

    view: float
    sigma: torch.Tensor
    drops_label: bool
    drops_prior: bool
    generator: torch.Generator


class SampleDraws:
    """
    Every random draw of the training sample at a position of the stream, as a function of (seed, position) alone.

    Draws per sample: mirror image, dropped class, dropped prior (each independent), logit-normal time (paper, Eq. 11),
    flow noise, posterior noise.

    Args:
        num_classes (`int`): Id of the null class.
        seed (`int`): Seed of the draws.
        label_dropout_prob (`float`, defaults to 0.1): Probability that the class is replaced by the null class.
        prior_dropout_prob (`float`, defaults to 0.5):
            The paper's p_s, the probability that a sample is trained without its prior.
        exact_dropout_size (`int`, *optional*):
            Drops exactly these shares, to the nearest sample, of every so many samples in a row, chosen at random for
            class and prior apart; each sample on its own if not given, as in the paper.
        logit_mean (`float`, defaults to 0.0): Mean of the logit of the time, see [`logit_normal_sigma`].
        logit_std (`float`, defaults to 1.0): Its standard deviation.
        time_shift (`float`, defaults to 1.0): Shift of the time towards noise, see [`shift_sigma`].
    """

    def __init__(
        self,
        num_classes: int,
        seed: int,
        label_dropout_prob: float = 0.1,
        prior_dropout_prob: float = 0.5,
        exact_dropout_size: int | None = None,
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        time_shift: float = 1.0,
    ):
        self.num_classes = num_classes
        self.seed = seed
        self.label_dropout_prob = label_dropout_prob
        self.prior_dropout_prob = prior_dropout_prob
        self.exact_dropout_size = exact_dropout_size
        self.logit_mean = logit_mean
        self.logit_std = logit_std
        self.time_shift = time_shift

    def _is_dropped(self, position: int, uniform: float, probability: float, kind: int) -> bool:
        """Whether a sample lacks its class (`kind` 2) or its prior (3)."""
        size = self.exact_dropout_size
        if size is None:
            return uniform < probability
        group, offset = divmod(position, size)
        rank = torch.randperm(size, generator=stateless_generator(self.seed, kind, group))[offset]
        return int(rank) < round(probability * size)

    def __call__(self, position: int) -> SampleDraw:
        """The [`SampleDraw`] of the sample at `position`."""
        generator = stateless_generator(self.seed, 1, position)
        view, drop_label, drop_prior = torch.rand(3, generator=generator).tolist()
        normal = torch.randn((), generator=generator)
        return SampleDraw(
            view=view,
            sigma=shift_sigma(logit_normal_sigma(normal, self.logit_mean, self.logit_std), self.time_shift),
            drops_label=self._is_dropped(position, drop_label, self.label_dropout_prob, kind=2),
            drops_prior=self._is_dropped(position, drop_prior, self.prior_dropout_prob, kind=3),
            generator=generator,
        )


class EpochOrder:
    """
    Endless passes over a data set, each in an order of its own, which is a function of (seed, pass).

    Args:
        num_samples (`int`): Size of the data set.
        seed (`int`): Seed of the orders.
    """

    def __init__(self, num_samples: int, seed: int):
        self.num_samples = num_samples
        self.seed = seed
        self._latest: tuple[int, torch.Tensor] | None = None  # (pass, permutation)

    def __call__(self, position: int) -> int:
        """The index of the sample that stands at `position` of the stream."""
        epoch, offset = divmod(position, self.num_samples)
        if self._latest is None or self._latest[0] != epoch:
            order = torch.randperm(self.num_samples, generator=stateless_generator(self.seed, 0, epoch))
            self._latest = (epoch, order)
        return int(self._latest[1][offset])


class TrainingStream(Dataset):
    """
    The endless stream of training samples: what stands at a position, and every random draw that goes with it, is a
    function of (seed, position) alone. So a resumed run continues it exactly, and any number of processes share it.

    Args:
        latents ([`Latents`]): The encoded pictures.
        draws ([`SampleDraws`]): The random draws.
        order (`Callable[[int], int]`, *optional*):
            The index of the picture at a position, [`EpochOrder`] with the seed of `draws` if not given.
        num_aligned (`int`, defaults to 0):
            How many samples have, beside the rest, what their tokens are aligned with: the `features` that are stored
            with the latents, or `pixels` (3, H, W) in [-1, 1] where there are `pictures`.
        pictures (`torch.utils.data.Dataset`, *optional*): Dicts with the `image` (H, W, 3), uint8, of each latent.
    """

    def __init__(
        self,
        latents: "Latents",
        draws: SampleDraws,
        order: Callable[[int], int] | None = None,
        num_aligned: int = 0,
        pictures: Dataset | None = None,
    ):
        self.latents = latents
        self.draws = draws
        self.order = EpochOrder(len(latents), draws.seed) if order is None else order
        self.num_aligned = num_aligned
        self.pictures = pictures

    def __getitem__(self, position: int) -> dict[str, torch.Tensor | bool | int]:
        index = self.order(position)
        draw = self.draws(position)
        view = int(draw.view * self.latents.num_views)
        mean, std = self.latents.read(index, view)
        noise = torch.randn(mean.shape, generator=draw.generator)
        if std is not None:
            mean = mean + std * torch.randn(mean.shape, generator=draw.generator)
        sample = {
            "latents": mean,
            "noise": noise,
            "sigma": draw.sigma,
            "class_label": self.draws.num_classes if draw.drops_label else int(self.latents.labels[index]),
            "has_prior": not draw.drops_prior,
        }
        if position < self.num_aligned and self.pictures is None:
            sample["features"] = self.latents.read_features(index, view)
        elif position < self.num_aligned:
            pixels = to_pixels(torch.from_numpy(self.pictures[index]["image"])[None])[0]
            sample["pixels"] = pixels.flip(-1) if view else pixels
        return sample


def collate_priors_first(samples: list[dict]) -> dict[str, torch.Tensor | int]:
    """Stacks `samples` of a stream, those with a prior first, under the names that `DoDJointModel` uses."""
    # Stable, so that the order stays a function of it.
    batch = default_collate(sorted(samples, key=lambda sample: not sample["has_prior"]))
    batch["sigmas"] = batch.pop("sigma")
    batch["class_labels"] = batch.pop("class_label")
    batch["num_priors"] = int(batch.pop("has_prior").sum())
    return batch


class StreamSampler(Sampler[int]):
    """
    The stream positions of one process, in order. Optimizer step s covers the positions [s * G, (s + 1) * G), where
    G = processes * accumulation * batch size; its micro-batches are dealt to the processes in turn.

    Args:
        start_step (`int`): Number of optimizer steps that are done already.
        num_steps (`int`): Number of optimizer steps at the end, those included.
        batch_size (`int`): Samples in a micro-batch of one process.
        accumulation (`int`, defaults to 1): Micro-batches of a process in an optimizer step.
        process_index (`int`, defaults to 0): Which process this is.
        num_processes (`int`, defaults to 1): Number of processes.
    """

    def __init__(
        self,
        start_step: int,
        num_steps: int,
        batch_size: int,
        accumulation: int = 1,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        self.start_micro_step = start_step * accumulation
        self.end_micro_step = num_steps * accumulation
        self.batch_size = batch_size
        self.process_index = process_index
        self.num_processes = num_processes

    def __len__(self) -> int:
        return (self.end_micro_step - self.start_micro_step) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        for micro_step in range(self.start_micro_step, self.end_micro_step):
            first = (micro_step * self.num_processes + self.process_index) * self.batch_size
            yield from range(first, first + self.batch_size)
