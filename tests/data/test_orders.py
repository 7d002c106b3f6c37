"""The orders in which images are trained on: passes over all of them, and passes over each bucket."""

import pickle

import numpy as np
import pytest
from helpers import says

from diffusers_dod.data.orders import STEPS_PER_BLOCK, BucketOrder, EpochOrder


@pytest.mark.parametrize("start", [0, 3, 7, 20])
def test_passes_over_all_images(start):
    order = EpochOrder(7, seed=1)
    walked = walk(order, 0, 28)
    passes = [tuple(walked[i : i + 7]) for i in range(0, 28, 7)]
    assert all(sorted(one) == list(range(7)) for one in passes) and len(set(passes)) == 4
    assert walk(EpochOrder(7, seed=1), start, 28) == walked[start:]
    assert walk(EpochOrder(7, seed=2), 0, 28) != walked


LENGTHS = [5, 1, 40, 14]
STARTS = [0, 5, 6, 46]


def bucket_of(index: int) -> int:
    return int(np.searchsorted(STARTS, index, side="right")) - 1


def walk(order: BucketOrder | EpochOrder, first: int, last: int) -> list[int]:
    return [order(position) for position in range(first, last)]


def test_each_bucket_comes_in_passes_of_its_own():
    num_steps = 3 * STEPS_PER_BLOCK
    indices = walk(BucketOrder(LENGTHS, 3, seed=1), 0, 3 * num_steps)
    streams = {bucket: [] for bucket in range(4)}
    for step in range(num_steps):
        own = indices[3 * step : 3 * step + 3]
        assert len({bucket_of(index) for index in own}) == 1  # one shape in a step
        streams[bucket_of(own[0])] += own
    for bucket, stream in streams.items():
        length, start = LENGTHS[bucket], STARTS[bucket]
        passes = [tuple(stream[i : i + length]) for i in range(0, len(stream) - length + 1, length)]
        assert all(sorted(order) == list(range(start, start + length)) for order in passes)
        if length >= 14:
            assert len(set(passes)) == len(passes) > 20  # each pass in an order of its own


def test_buckets_are_drawn_by_their_share():
    count = 3 * STEPS_PER_BLOCK
    order = BucketOrder(LENGTHS, 1, seed=2)
    drawn = np.array([bucket_of(order(position)) for position in range(count)])
    for bucket, length in enumerate(LENGTHS):
        share = length / sum(LENGTHS)
        deviation = (share * (1 - share) / count) ** 0.5
        assert (drawn == bucket).mean() == pytest.approx(share, abs=4 * deviation)
    same = (drawn[1:] == drawn[:-1]).mean()  # a step says nothing about the next
    expected = sum((length / sum(LENGTHS)) ** 2 for length in LENGTHS)
    assert same == pytest.approx(expected, abs=5 * (expected / count) ** 0.5)
    blocks = drawn.reshape(3, -1)
    assert len({tuple(block[:50]) for block in blocks}) == 3


@pytest.mark.parametrize("start_step", [1, 7, STEPS_PER_BLOCK - 1, STEPS_PER_BLOCK, 2 * STEPS_PER_BLOCK + 5])
def test_a_resumed_order_goes_on(start_step):
    whole = BucketOrder(LENGTHS, 2, seed=3)
    walked = walk(whole, 0, 2 * (start_step + 20))
    assert walk(BucketOrder(LENGTHS, 2, seed=3), 2 * start_step, 2 * start_step + 40) == walked[2 * start_step :]
    for position in (0, 2 * start_step + 3, 4, 2 * start_step - 1):  # in any order
        assert whole(position) == walked[position]
    copy = pickle.loads(pickle.dumps(whole))
    assert walk(copy, 2 * start_step, 2 * start_step + 6) == walked[2 * start_step : 2 * start_step + 6]


def test_the_seed_decides():
    one, same, other = (walk(BucketOrder(LENGTHS, 2, seed), 0, 200) for seed in (0, 0, 1))
    assert one == same != other
    assert [bucket_of(index) for index in one] != [bucket_of(index) for index in other]
    alike = [walk(BucketOrder([30], 2, seed), 0, 30) for seed in (0, 1)]  # the passes too
    assert alike[0] != alike[1]
    twins = BucketOrder([30, 30], 30, seed=0)  # and buckets of one length
    passes = {0: None, 1: None}
    for step in range(50):
        indices = walk(twins, 30 * step, 30 * step + 30)
        passes[indices[0] // 30] = passes[indices[0] // 30] or [index % 30 for index in indices]
    assert passes[0] != passes[1]


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (([], 2, 0), ("`bucket_lengths`", "at least one", "none")),
        (([3, 0], 2, 0), ("`bucket_lengths`", ">= 1", "0")),
        (([3], 0, 0), ("`images_per_step`", ">= 1", "0")),
        (([3], 1, -1), ("`seed`", ">= 0", "-1")),
    ],
)
def test_orders_that_there_are_not(arguments, fragments):
    with pytest.raises(ValueError, match=says(*fragments)):
        BucketOrder(*arguments)
