# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Randomness without state: a generator is a pure function of the integers that name what it is for."""

import numpy as np
import torch


def stateless_generator(*ids: int) -> torch.Generator:
    """
    A CPU generator seeded by non-negative integers, e.g. (seed, position in the data stream).

    Different tuples give independent streams, and the same tuple gives the same stream in any process, in any order.

    Args:
        ids (`int`): One or more integers >= 0.

    Raises:
        `ValueError`: an id is negative.
    """
    if min(ids) < 0:
        raise ValueError(f"`ids` must be integers >= 0, got {ids}.")
    state = np.random.SeedSequence(ids).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))
