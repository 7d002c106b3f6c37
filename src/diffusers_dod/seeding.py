# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Randomness without state: a generator is a pure function of integers, such as seed, image and step."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

from .checks import check_at_least, check_type
from .devices import send


#: The step of [`NoiseSource.draw`] for the noise in the latents that priors are made of; no solver has so many steps.
PRIOR_NOISE = 2**32


def _seed_sequence(ids: tuple[int, ...]) -> np.random.SeedSequence:
    if not ids:
        raise ValueError("`ids` must hold at least one integer, got none.")
    for number in ids:
        check_type("ids", number, Integral)
    ids = tuple(int(number) for number in ids)  # those of NumPy have a width
    if not all(0 <= number < 2**64 for number in ids):
        raise ValueError(f"`ids` must be integers >= 0 and < 2**64, got {ids}.")
    # SeedSequence cuts ids into 32-bit words and ignores zeros at the end: a fixed width and the count keep ids apart.
    words = [word for number in ids for word in (number & 0xFFFFFFFF, number >> 32)]
    return np.random.SeedSequence([len(ids), *words])


def stateless_generator(*ids: int) -> torch.Generator:
    """
    A CPU generator seeded by non-negative integers, e.g. (seed, position in the data stream).

    The same tuple gives the same stream in any process, in any order. Different tuples give independent streams, with
    rare exceptions, as torch's CPU generator keeps 32 bits of its seed.

    Args:
        ids (`int`): One or more integers in [0, 2^64 - 1].

    Raises:
        `ValueError`, `TypeError`: there is no id, or one is no integer or out of range.
    """
    return torch.Generator().manual_seed(int(_seed_sequence(ids).generate_state(1, np.uint64)[0]))


def stateless_noise(shape: tuple[int, ...], *ids: int) -> torch.Tensor:
    """
    Standard normal noise that belongs to non-negative integers, e.g. (seed, image, stage, step).

    Its key has 128 bits, so that no two tuples share their noise. (torch's CPU generator keeps 32 bits of its seed.)

    Args:
        shape (`tuple[int, ...]`): Shape of the noise.
        ids (`int`): One or more integers in [0, 2^64 - 1].

    Returns:
        `torch.Tensor` of that shape, in fp32 on the CPU.

    Raises:
        `ValueError`, `TypeError`: there is no id, or one, or a length of the shape, is no integer or out of range.
    """
    check_type("shape", shape, (tuple, list))
    for length in shape:
        check_at_least("shape", length, 0)
    generator = np.random.Generator(np.random.Philox(_seed_sequence(ids)))
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


@dataclass
class NoiseSource:
    """
    Source of the noise of one stage, for each image of stage 1 and for each image of its prior from stage 2 on.

    Args:
        stage (`int`): Number of the stage.
        batch_size (`int`): Number of images of the first stage that is run.
        images_per_prior (`int`): Number of images that the stage makes of each of them.
        generator (`torch.Generator`, `list[torch.Generator]` or `None`): One for all images, or one for each.
        seed (`int` or `None`): Noise is a function of seed, index, copy, stage and step in place of a generator.
        sample_indices (`Sequence[int]`): Index of each image.
    """

    stage: int
    batch_size: int
    images_per_prior: int
    generator: torch.Generator | list[torch.Generator] | None
    seed: int | None
    sample_indices: Sequence[int]

    def _ids(self, step: int) -> list[tuple[int, ...]]:
        return [
            (self.seed, int(index), number, self.stage, step)
            for index in self.sample_indices
            for number in range(self.images_per_prior)
        ]

    def generators(self, step: int) -> torch.Generator | list[torch.Generator] | None:
        """The generators from which a scheduler of Diffusers draws the noise of `step`."""
        if self.seed is not None:
            return [stateless_generator(*ids) for ids in self._ids(step)]
        if isinstance(self.generator, list):
            return [generator for generator in self.generator for _ in range(self.images_per_prior)]
        return self.generator

    def draw(self, step: int, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """
        Standard normal noise of all samples.

        Args:
            step (`int`): The step that it is for; 0 is the initial noise.
            shape (`tuple[int, ...]`): Shape of the noise of one sample.
            device (`torch.device`): Device of the noise.

        Returns:
            `torch.Tensor` of shape `(batch_size * images_per_prior, *shape)`, in fp32.
        """
        if self.seed is not None:
            return send(torch.stack([stateless_noise(tuple(shape), *ids) for ids in self._ids(step)]), device)
        shape = (self.batch_size * self.images_per_prior, *shape)
        return randn_tensor(shape, self.generators(step), device=device, dtype=torch.float32)
