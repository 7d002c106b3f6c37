# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Randomness without state: a generator is a pure function of the integers that name what it is for."""

import numpy as np
import torch


def stateless_generator(*ids: int) -> torch.Generator:
    """
    A CPU generator seeded by non-negative integers, e.g. (seed, position in the data stream).

    Different tuples give independent streams, and the same tuple gives the same stream in any process, in any order.

    Args:
        ids (`int`): One or more integers in [0, 2^64 - 1].

    Raises:
        `ValueError`: an id is out of range.
    """
    if not all(0 <= number < 2**64 for number in ids):
        raise ValueError(f"`ids` must be integers >= 0 and < 2**64, got {ids}.")
    # SeedSequence cuts ids into 32-bit words and ignores zeros at the end: a fixed width and the count keep ids apart.
    words = [word for number in ids for word in (number & 0xFFFFFFFF, number >> 32)]
    state = np.random.SeedSequence([len(ids), *words]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))
