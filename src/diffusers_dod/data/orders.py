# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""The order of images in the stream of training samples, a function of (seed, position)."""

from collections.abc import Sequence

import torch

from ..checks import check_at_least
from ..seeding import stateless_generator


STEPS_PER_BLOCK = 4096


class EpochOrder:
    """
    Endless passes over a data set. The order of a pass is a function of (seed, pass).

    Args:
        num_samples (`int`): Size of the data set.
        seed (`int`): Seed of the orders.
    """

    def __init__(self, num_samples: int, seed: int):
        self.num_samples = num_samples
        self.seed = seed
        self._latest: tuple[int, torch.Tensor] | None = None  # (pass, permutation)

    def __call__(self, position: int) -> int:
        """Index of the sample at `position` of the stream."""
        epoch, offset = divmod(position, self.num_samples)
        if self._latest is None or self._latest[0] != epoch:
            order = torch.randperm(self.num_samples, generator=stateless_generator(self.seed, 0, epoch))
            self._latest = (epoch, order)
        return int(self._latest[1][offset])


class BucketOrder:
    """
    The order of images in buckets: all positions of an optimizer step come from one bucket.

    The bucket of a step is a function of (seed, step). Its probability is the bucket's share of the images. Its images
    come in endless passes; the order of a pass is a function of (seed, bucket, pass). So on average all images are
    used equally often, but not once per pass over all images.

    Args:
        bucket_lengths (`Sequence[int]`): Number of images of each bucket.
        images_per_step (`int`): Positions of an optimizer step. Another number gives another order.
        seed (`int`): Seed of the order.

    Raises:
        `ValueError`, `TypeError`: an argument is out of range or of the wrong type.
    """

    def __init__(self, bucket_lengths: Sequence[int], images_per_step: int, seed: int):
        if len(bucket_lengths) == 0:
            raise ValueError("`bucket_lengths` must hold at least one length, got none.")
        for length in bucket_lengths:
            check_at_least("bucket_lengths", length, 1)
        check_at_least("images_per_step", images_per_step, 1)
        check_at_least("seed", seed, 0)
        self.images_per_step = images_per_step
        self.seed = seed
        self._ends = torch.tensor(bucket_lengths).cumsum(0)
        self._orders = [
            EpochOrder(length, stateless_generator(seed, 0, 0, bucket).initial_seed())
            for bucket, length in enumerate(bucket_lengths)
        ]
        # Steps are drawn in blocks. Number of steps of each bucket before each block, for the known blocks.
        self._steps_before = [torch.zeros(len(bucket_lengths), dtype=torch.int64)]
        self._latest: tuple[int, torch.Tensor] | None = None  # (block, buckets of its steps)

    def _draw(self, block: int) -> torch.Tensor:
        """Draws the buckets of the steps of a block."""
        generator = stateless_generator(self.seed, 0, 1, block)
        images = torch.randint(int(self._ends[-1]), (STEPS_PER_BLOCK,), generator=generator)
        return torch.bucketize(images, self._ends, right=True)

    def _bucket_of(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and the number of earlier steps with the same bucket."""
        block, offset = divmod(step, STEPS_PER_BLOCK)
        while len(self._steps_before) <= block:
            counts = torch.bincount(self._draw(len(self._steps_before) - 1), minlength=len(self._orders))
            self._steps_before.append(self._steps_before[-1] + counts)
        if self._latest is None or self._latest[0] != block:
            self._latest = (block, self._draw(block))
        buckets = self._latest[1]
        bucket = int(buckets[offset])
        return bucket, int(self._steps_before[block][bucket] + (buckets[:offset] == bucket).sum())

    def __call__(self, position: int) -> int:
        """Index of the image at `position` of the stream."""
        step, offset = divmod(position, self.images_per_step)
        bucket, num_steps = self._bucket_of(step)
        order = self._orders[bucket]
        return int(self._ends[bucket]) - order.num_samples + order(num_steps * self.images_per_step + offset)
