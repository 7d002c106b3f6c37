# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Randomness without state: a generator is a pure function of the integers that name what it is for."""

import numpy as np
import torch


def _seed_sequence(ids: tuple[int, ...]) -> np.random.SeedSequence:
    ids = tuple(int(number) for number in ids)  # those of NumPy have a width
    if not all(0 <= number < 2**64 for number in ids):
        raise ValueError(f"`ids` must be integers >= 0 and < 2**64, got {ids}.")
    # SeedSequence cuts ids into 32-bit words and ignores zeros at the end: a fixed width and the count keep ids apart.
    words = [word for number in ids for word in (number & 0xFFFFFFFF, number >> 32)]
    return np.random.SeedSequence([len(ids), *words])


def stateless_generator(*ids: int) -> torch.Generator:
    """
    A CPU generator seeded by non-negative integers, e.g. (seed, position in the data stream).

    The same tuple gives the same stream in any process, in any order. Different tuples give independent streams, but
    for rare coincidences: torch's CPU generator keeps 32 bits of its seed.

    Args:
        ids (`int`): One or more integers in [0, 2^64 - 1].

    Raises:
        `ValueError`: an id is out of range.
    """
    return torch.Generator().manual_seed(int(_seed_sequence(ids).generate_state(1, np.uint64)[0]))


def stateless_noise(shape: tuple[int, ...], *ids: int) -> torch.Tensor:
    """
    Standard normal noise that belongs to non-negative integers, e.g. (seed, image, stage, step).

    Unlike torch's CPU generator, which keeps 32 bits of its seed, it has a key of 128 bits: no two tuples share their
    noise.

    Args:
        shape (`tuple[int, ...]`): Shape of the noise.
        ids (`int`): One or more integers in [0, 2^64 - 1].

    Returns:
        `torch.Tensor` of that shape, in fp32 on the CPU.

    Raises:
        `ValueError`: an id is out of range.
    """
    generator = np.random.Generator(np.random.Philox(_seed_sequence(ids)))
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
