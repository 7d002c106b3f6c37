# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""The stream of training samples, a function of (seed, position): random draws and shares of processes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset, Sampler, default_collate

from ..checks import check_at_least, check_number
from ..image_reading import to_pixels
from ..rectified_flow import logit_normal_sigma, shift_sigma
from ..seeding import stateless_generator
from .latents import Latents


@dataclass
class SampleDraw:
    """
    The random numbers of one training sample, and the generator of its noise.

    Args:
        view (`float`): Number in [0, 1) that chooses the view. The first half is the image itself.
        sigma (`torch.Tensor` of shape `()`): Time in [0, 1].
        drops_label (`bool`): Whether the null class takes the place of the class.
        drops_prior (`bool`): Whether the sample is trained without its prior.
        generator (`torch.Generator`): Draws the flow noise and then the posterior noise.
    """

    view: float
    sigma: torch.Tensor
    drops_label: bool
    drops_prior: bool
    generator: torch.Generator


class SampleDraws:
    """
    All random draws of the training sample at a position, as a function of (seed, position) alone.

    A sample has independent draws of mirror image, dropped class, dropped prior, logit-normal time (paper, Eq. 11),
    flow noise and posterior noise.

    Args:
        num_classes (`int`): Id of the null class.
        seed (`int`): Seed of the draws.
        label_dropout_prob (`float`, defaults to 0.1): Probability that the class is replaced by the null class.
        prior_dropout_prob (`float`, defaults to 0.5):
            The paper's p_s, the probability that a sample is trained without its prior.
        exact_dropout_size (`int`, *optional*):
            Length of blocks of samples in which exactly these shares are dropped: those of an optimizer step. They are
            chosen at random, for class and prior separately. A share of a block that is no whole number is met on
            average. By default each sample decides alone, as in the paper.
        micro_batch_size (`int`, *optional*):
            Length of shorter blocks, a divisor of `exact_dropout_size`: exact shares of priors are dropped in each of
            them, as many in all blocks of a step. So all processes have equal work, and batches have one shape.
        logit_mean (`float`, defaults to 0.0): Mean of the logit of the time, see [`logit_normal_sigma`].
        logit_std (`float`, defaults to 1.0): Standard deviation of the logit of the time.
        time_shift (`float`, defaults to 1.0): Shift of the time towards noise, see [`shift_sigma`].
        prior_noise (`float`, defaults to 0.0):
            Largest level in [0, 1] of the noise in the latents that the LEM sees (conditioning augmentation, Ho et al.
            2022, arXiv:2106.15282). The level of each sample is uniform from 0 on.

    Raises:
        `ValueError`, `TypeError`: an argument is out of range.
    """

    def __init__(
        self,
        num_classes: int,
        seed: int,
        label_dropout_prob: float = 0.1,
        prior_dropout_prob: float = 0.5,
        exact_dropout_size: int | None = None,
        micro_batch_size: int | None = None,
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        time_shift: float = 1.0,
        prior_noise: float = 0.0,
    ):
        check_number("prior_noise", prior_noise, 0, 1)
        check_at_least("num_classes", num_classes, 1)
        stateless_generator(seed)  # which checks it
        check_number("label_dropout_prob", label_dropout_prob, 0, 1)
        check_number("prior_dropout_prob", prior_dropout_prob, 0, 1)
        if exact_dropout_size is not None:
            check_at_least("exact_dropout_size", exact_dropout_size, 1)
            micro_batch_size = exact_dropout_size if micro_batch_size is None else micro_batch_size
            check_at_least("micro_batch_size", micro_batch_size, 1)
            if exact_dropout_size % micro_batch_size:
                raise ValueError(f"`micro_batch_size` must divide {exact_dropout_size}, got {micro_batch_size}.")
        check_number("logit_mean", logit_mean, -math.inf)
        check_number("logit_std", logit_std, 0)
        check_number("time_shift", time_shift, 0, open_minimum=True)
        self.num_classes = num_classes
        self.seed = seed
        self.label_dropout_prob = label_dropout_prob
        self.prior_dropout_prob = prior_dropout_prob
        self.exact_dropout_size = exact_dropout_size
        self.micro_batch_size = micro_batch_size
        self.logit_mean = logit_mean
        self.logit_std = logit_std
        self.time_shift = time_shift
        self.prior_noise = prior_noise

    def _is_dropped(self, position: int, uniform: float, probability: float, kind: int) -> bool:
        """Whether a sample lacks its class (`kind` 2) or its prior (3)."""
        if self.exact_dropout_size is None:
            return uniform < probability
        size = self.micro_batch_size if kind == 3 else self.exact_dropout_size
        group, offset = divmod(position, size)
        rank = torch.randperm(size, generator=stateless_generator(self.seed, kind, group))[offset]
        share = probability * size
        number = round(share)
        if abs(share - number) > 1e-9:  # rounded up or down in all blocks of a step together
            generator = stateless_generator(self.seed, kind, position // self.exact_dropout_size, 1)
            number = math.floor(share + torch.rand((), generator=generator).item())
        return int(rank) < number

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

    def draw_prior_noise(self, draw: SampleDraw, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """
        Draws the noise in the latents that the LEM sees, after all else of a sample.

        Args:
            draw ([`SampleDraw`]): The draws of the sample.
            shape (`tuple[int, ...]`): Shape (C, h, w) of the latents.

        Returns:
            `dict[str, torch.Tensor]`: `prior_noise` of this shape and its level `prior_sigma`; empty if there is none.
        """
        if self.prior_noise == 0:
            return {}
        sigma = self.prior_noise * torch.rand((), generator=draw.generator)
        return {"prior_noise": torch.randn(shape, generator=draw.generator), "prior_sigma": sigma}


class TrainingSamples(Dataset):
    """
    The endless stream of training samples.

    The sample at a position and all its random draws are functions of (seed, position) alone. So a resumed run
    continues the stream exactly, and any number of processes can share it.

    Args:
        latents ([`Latents`]): The encoded images. Their order has the seed of `draws`.
        draws ([`SampleDraws`]): The random draws.
        images_per_step (`int`, defaults to 1):
            Positions of an optimizer step. They all come from one bucket where there are buckets.
        num_aligned (`int`, defaults to 0):
            Number of samples that also get targets of alignment: the `features` that are stored with the latents, or
            `pixels` (3, H, W) in [-1, 1] if there are `images`.
        images (`torch.utils.data.Dataset`, *optional*): Dicts with the `image` (H, W, 3), uint8, of each latent.
    """

    def __init__(
        self,
        latents: Latents,
        draws: SampleDraws,
        images_per_step: int = 1,
        num_aligned: int = 0,
        images: Dataset | None = None,
    ):
        self.latents = latents
        self.draws = draws
        self.order = latents.order(images_per_step, draws.seed)
        self.num_aligned = num_aligned
        self.images = images

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
            **self.draws.draw_prior_noise(draw, mean.shape),
        }
        if position < self.num_aligned and self.images is None:
            sample["features"] = self.latents.read_features(index, view)
        elif position < self.num_aligned:
            pixels = to_pixels(torch.from_numpy(self.images[index]["image"])[None])[0]
            sample["pixels"] = pixels.flip(-1) if view else pixels
        return sample


def collate_priors_first(samples: list[dict]) -> dict[str, torch.Tensor | int]:
    """Stacks `samples` of a stream, samples with a prior first, under the names of `DoDJointModel`."""
    # The sort is stable, so that the order stays a function of the positions.
    batch = default_collate(sorted(samples, key=lambda sample: not sample["has_prior"]))
    batch["sigmas"] = batch.pop("sigma")
    batch["class_labels"] = batch.pop("class_label")
    if "prior_sigma" in batch:
        batch["prior_sigmas"] = batch.pop("prior_sigma")
    batch["num_priors"] = int(batch.pop("has_prior").sum())
    return batch


class PositionSampler(Sampler[int]):
    """
    Positions of the stream for one process, in order.

    Optimizer step s covers the positions [s * G, (s + 1) * G) with G = processes * accumulation * batch size. Its
    micro-batches are dealt to the processes in turn.

    Args:
        start_step (`int`): Number of optimizer steps that are done already.
        num_steps (`int`): Number of optimizer steps at the end, including those already done.
        batch_size (`int`): Samples in a micro-batch of one process.
        accumulation (`int`, defaults to 1): Micro-batches of a process in an optimizer step.
        process_index (`int`, defaults to 0): Index of this process.
        num_processes (`int`, defaults to 1): Number of processes.

    Raises:
        `ValueError`, `TypeError`: an argument is out of range or no integer.
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
        check_at_least("start_step", start_step, 0)
        check_at_least("num_steps", num_steps, 0)
        check_at_least("batch_size", batch_size, 1)
        check_at_least("accumulation", accumulation, 1)
        check_at_least("num_processes", num_processes, 1)
        check_at_least("process_index", process_index, 0, num_processes - 1)
        self.start_micro_step = start_step * accumulation
        self.end_micro_step = num_steps * accumulation
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.process_index = process_index
        self.num_processes = num_processes

    @property
    def images_per_step(self) -> int:
        """G, the positions of an optimizer step over all processes."""
        return self.batch_size * self.accumulation * self.num_processes

    def __len__(self) -> int:
        return (self.end_micro_step - self.start_micro_step) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        for micro_step in range(self.start_micro_step, self.end_micro_step):
            first = (micro_step * self.num_processes + self.process_index) * self.batch_size
            yield from range(first, first + self.batch_size)
