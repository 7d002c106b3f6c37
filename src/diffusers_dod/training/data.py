# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Training data: pictures, their latents, and the stream of samples that is a function of (seed, position)."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

from ..autoencoders import latent_statistics, normalize_latents
from ..rectified_flow import logit_normal_sigma
from ..seeding import stateless_generator
from .textures import TEXTURE_CLASSES, TextureDataset


TEXTURES = "textures"


def center_crop(image: Image.Image, resolution: int) -> np.ndarray:
    """
    Scales the short side to `resolution` and crops the centre square, as in ADM: halved with a box filter while at
    least twice as large, then bicubic.

    Args:
        image (`PIL.Image.Image`): A picture of any mode and size.
        resolution (`int`): Side of the square in pixels.

    Returns:
        `np.ndarray` of shape `(resolution, resolution, 3)`, uint8 RGB.
    """
    image = image.convert("RGB")
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = resolution / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample=Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return np.array(image.crop((left, top, left + resolution, top + resolution)))


class PictureDataset(Dataset):
    """
    Labelled pictures of a `datasets.Dataset` as uint8 arrays, cropped by [`center_crop`].

    Args:
        dataset (`datasets.Dataset`): The data set.
        image_column (`str`): Its column of PIL images.
        label_column (`str`): Its column of class ids.
        resolution (`int`): Side of the pictures in pixels.
    """

    def __init__(self, dataset, image_column: str, label_column: str, resolution: int):
        self.dataset = dataset
        self.image_column = image_column
        self.label_column = label_column
        self.resolution = resolution

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        row = self.dataset[index]
        return {"image": center_crop(row[self.image_column], self.resolution), "label": row[self.label_column]}


@dataclass(frozen=True)
class Pictures:
    """
    A picture data set with what names it.

    Args:
        dataset (`torch.utils.data.Dataset`): Yields dicts with the `image`, uint8 (H, W, 3), and the `label`, an id.
        class_names (`tuple[str, ...]`): Names of the classes in the order of their ids.
        fingerprint (`str`): Another one for other pictures.
    """

    dataset: Dataset
    class_names: tuple[str, ...]
    fingerprint: str


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
    Opens the procedural `textures`, a data set of the Hub or a folder with one sub-folder of pictures per class.

    Args:
        dataset_name (`str` or `None`): `"textures"` or what `datasets.load_dataset` takes.
        train_data_dir (`str` or `None`): An image folder; exactly one of the two must be given.
        resolution (`int`): Side of the pictures in pixels.
        num_train_samples (`int`): Number of procedural pictures.
        seed (`int`): Seed of the procedural pictures.
        image_column (`str`, defaults to `"image"`): Column of the pictures.
        label_column (`str`, defaults to `"label"`): Column of the classes, of type `ClassLabel`.

    Returns:
        [`Pictures`].

    Raises:
        `ValueError`: both or neither source is given, or the data set has no such columns or no class names.
    """
    if (dataset_name is None) == (train_data_dir is None):
        raise ValueError(
            "Exactly one of `dataset_name` and `train_data_dir` must be given, "
            f"got dataset_name={dataset_name!r} and train_data_dir={train_data_dir!r}."
        )
    if dataset_name == TEXTURES:
        dataset = TextureDataset(num_train_samples, size=resolution, seed=seed)
        return Pictures(dataset, TEXTURE_CLASSES, f"{TEXTURES}-{resolution}-{num_train_samples}-{seed}")

    import datasets  # slow to import, and not needed for the procedural set

    if train_data_dir is not None:
        if not os.path.isdir(train_data_dir):
            raise ValueError(f"`train_data_dir` must be an existing folder, got {train_data_dir!r}.")
        source = datasets.load_dataset("imagefolder", data_dir=train_data_dir, split="train")
    else:
        source = datasets.load_dataset(dataset_name, split="train")
    for name, column in {"image_column": image_column, "label_column": label_column}.items():
        if column not in source.features:
            raise ValueError(
                f"`{name}` must be one of the columns {sorted(source.features)}, got {column!r}. "
                "An image folder needs one sub-folder per class."
            )
    names = getattr(source.features[label_column], "names", None)
    if names is None:
        raise ValueError(
            f"`label_column` must be a ClassLabel column, got {column!r} of type {source.features[label_column]}."
        )
    pictures = PictureDataset(source, image_column, label_column, resolution)
    return Pictures(pictures, tuple(names), f"{source._fingerprint}-{resolution}")


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """Pictures `images` (B, H, W, 3) in uint8 -> pixels (B, 3, H, W) in [-1, 1], fp32."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def latents_fingerprint(pictures: Pictures, vae: AutoencoderKL | None, random_flip: bool) -> str:
    """A hash of what encoded latents depend on: `pictures`, config and weights of `vae` and `random_flip`."""
    digest = hashlib.sha256(f"{pictures.fingerprint}-{random_flip}".encode())
    if vae is not None:
        config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
        for name, tensor in sorted(vae.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def encode_pictures(
    pictures: Pictures, vae: AutoencoderKL | None, path: Path, random_flip: bool, batch_size: int, num_workers: int
) -> None:
    """
    Writes the normalised posterior mean and standard deviation of every picture to `path` (safetensors), once for the
    picture and, with `random_flip`, once for its mirror image. Without an autoencoder the "latents" are the pixels.

    Args:
        pictures ([`Pictures`]): The pictures.
        vae (`AutoencoderKL` or `None`): The autoencoder.
        path (`Path`): The file, which [`LatentDataset`] opens. It is never half written.
        random_flip (`bool`): Whether to encode the mirror images too.
        batch_size (`int`): Pictures per pass of the autoencoder.
        num_workers (`int`): Processes that read pictures; 0 reads them in this one.
    """
    device = next(vae.parameters()).device if vae is not None else torch.device("cpu")
    chunks: dict[str, list[torch.Tensor]] = {"mean": [], "std": [], "labels": []}
    loader = DataLoader(pictures.dataset, batch_size=batch_size, num_workers=num_workers)
    for batch in tqdm(loader, desc="Encoding pictures"):
        pixels = to_pixels(batch["image"]).to(device)
        views = [pixels, pixels.flip(-1)] if random_flip else [pixels]
        if vae is None:
            means, stds = views, [torch.zeros_like(view) for view in views]
        else:
            posteriors = [vae.encode(view).latent_dist for view in views]
            means = [normalize_latents(posterior.mean, vae) for posterior in posteriors]
            stds = [posterior.std / latent_statistics(vae, posterior.std)[1] for posterior in posteriors]
        chunks["mean"].append(torch.stack(means, dim=1).cpu())  # (B, views, C, H, W)
        chunks["std"].append(torch.stack(stds, dim=1).cpu())
        chunks["labels"].append(batch["label"])
    tensors = {name: torch.cat(parts) for name, parts in chunks.items()}
    fingerprint = latents_fingerprint(pictures, vae, random_flip)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    save_file(tensors, unfinished, metadata={"fingerprint": fingerprint})
    os.replace(unfinished, path)


class LatentDataset:
    """The latents that [`encode_pictures`] wrote to `path`: `mean` and `std` (n, views, C, H, W), `labels` (n,)."""

    def __init__(self, path: Path):
        with safe_open(path, framework="pt") as file:
            self.fingerprint = file.metadata()["fingerprint"]
            self.mean = file.get_tensor("mean")
            self.std = file.get_tensor("std")
            self.labels = file.get_tensor("labels")

    def __len__(self) -> int:
        return len(self.labels)


class TrainingStream(Dataset):
    """
    The endless stream of training samples: what stands at a position, and every random draw that goes with it, is a
    function of (seed, position) alone. So a resumed run continues it exactly, and any number of processes share it.

    Each pass over the data set has its own order. Draws per sample: posterior noise, flow noise, logit-normal time
    (paper, Eq. 11), mirror image, dropped class, dropped prior (each independent).

    Args:
        latents ([`LatentDataset`]): The encoded pictures.
        num_classes (`int`): Id of the null class.
        seed (`int`): Seed of order and draws.
        label_dropout_prob (`float`, defaults to 0.1): Probability that the class is replaced by the null class.
        prior_dropout_prob (`float`, defaults to 0.5):
            The paper's p_s, the probability that a sample is trained without its prior.
    """

    def __init__(
        self,
        latents: LatentDataset,
        num_classes: int,
        seed: int,
        label_dropout_prob: float = 0.1,
        prior_dropout_prob: float = 0.5,
    ):
        self.latents = latents
        self.num_classes = num_classes
        self.seed = seed
        self.label_dropout_prob = label_dropout_prob
        self.prior_dropout_prob = prior_dropout_prob
        self._order: tuple[int, torch.Tensor] | None = None  # (epoch, permutation) of the latest access

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.latents))
        if self._order is None or self._order[0] != epoch:
            order = torch.randperm(len(self.latents), generator=stateless_generator(self.seed, 0, epoch))
            self._order = (epoch, order)
        return int(self._order[1][offset])

    def __getitem__(self, position: int) -> dict[str, torch.Tensor | bool | int]:
        index = self._index(position)
        generator = stateless_generator(self.seed, 1, position)
        mean, std = self.latents.mean[index], self.latents.std[index]  # (views, C, H, W)
        view, drop_label, drop_prior = torch.rand(3, generator=generator).tolist()
        view = int(view * mean.shape[0])
        sigma = logit_normal_sigma(torch.randn((), generator=generator))
        noise = torch.randn(mean.shape[1:], generator=generator)
        latents = mean[view] + std[view] * torch.randn(mean.shape[1:], generator=generator)
        return {
            "latents": latents,
            "noise": noise,
            "sigma": sigma,
            "class_label": self.num_classes
            if drop_label < self.label_dropout_prob
            else int(self.latents.labels[index]),
            "has_prior": drop_prior >= self.prior_dropout_prob,
        }


def collate_priors_first(samples: list[dict]) -> dict[str, torch.Tensor | int]:
    """Stacks `samples` of a [`TrainingStream`], those with a prior first, into the arguments of `DoDJointModel`."""
    samples = sorted(
        samples, key=lambda sample: not sample["has_prior"]
    )  # stable, so the order stays a function of it
    return {
        "latents": torch.stack([sample["latents"] for sample in samples]),
        "noise": torch.stack([sample["noise"] for sample in samples]),
        "sigmas": torch.stack([sample["sigma"] for sample in samples]),
        "class_labels": torch.tensor([sample["class_label"] for sample in samples]),
        "num_priors": sum(sample["has_prior"] for sample in samples),
    }


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
