"""Generators as a pure function of integers."""

import numpy as np
import pytest
import torch
from helpers import says

from diffusers_dod.seeding import stateless_generator, stateless_noise


def draws(*ids: int, count: int = 16) -> torch.Tensor:
    return torch.randn(count, generator=stateless_generator(*ids))


def test_the_same_ids_give_the_same_stream_whatever_else_happens():
    expected = draws(3, 1, 7)
    torch.manual_seed(99)
    draws(3, 1, 8)
    before = torch.get_rng_state()
    assert torch.equal(draws(3, 1, 7), expected)
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is neither read nor moved


def test_two_generators_of_the_same_ids_do_not_share_their_state():
    first, second = stateless_generator(5), stateless_generator(5)
    torch.randn(100, generator=first)
    assert torch.equal(torch.randn(16, generator=second), draws(5))


@pytest.mark.parametrize("ids", [lambda i: (i,), lambda i: (i, 1, 0), lambda i: (0, 1, i), lambda i: (i, i)])
def test_neighbours_are_independent(ids):
    """A generator seeded by a sum or by the plain integers would show here: streams repeat or go together."""
    values = torch.stack([draws(*ids(i)) for i in range(2000)]).double()  # (stream, draw)
    assert len(torch.unique(values[:, 0])) == len(values)
    pairs = (values[1:] * values[:-1]).mean()  # mean over 2000 * 16 products of unit variance
    assert abs(pairs) < 4 / values[1:].numel() ** 0.5
    # The first draws of successive streams are themselves standard normal.
    assert abs(values[:, 0].mean()) < 4 / 2000**0.5
    assert values[:, 0].std() == pytest.approx(1.0, abs=4 / 4000**0.5)


def test_the_position_of_an_id_counts():
    assert not torch.equal(draws(1, 2), draws(2, 1))
    assert not torch.equal(draws(0, 1, 2), draws(1, 0, 2))
    assert not torch.equal(draws(3), draws(1, 2))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((1,), (1, 0)),
        ((0, 1), (0, 1, 0)),
        ((0,), (0, 0)),
        ((2**32,), (0, 1)),
        ((5 + 2**32, 7), (5, 1, 7)),
    ],
)
def test_ids_that_look_alike_are_different(one, other):
    """The number of ids counts, and ids of more than 32 bits do not run into their neighbours."""
    assert not torch.equal(draws(*one), draws(*other))


def test_large_ids():
    assert not torch.equal(draws(2**64 - 1), draws(2**63))
    with pytest.raises(ValueError, match=r"`ids` must be integers .*2\*\*64"):
        draws(2**64, 1)


@pytest.mark.parametrize("ids", [(-1,), (0, -3), (-(2**40), 5)])
def test_negative_ids_are_refused(ids):
    with pytest.raises(ValueError) as error:
        stateless_generator(*ids)
    assert "`ids` must be integers >= 0" in str(error.value) and str(ids) in str(error.value)


@pytest.mark.parametrize(
    ("call", "exception", "fragments"),
    [
        (lambda: stateless_generator(), ValueError, ["`ids`", "got none"]),
        (lambda: stateless_generator(1, 1.5), TypeError, ["`ids`", "int", "got 1.5"]),
        (lambda: stateless_generator(True), TypeError, ["`ids`", "int", "got True"]),
        (lambda: stateless_noise((2, 3), "7"), TypeError, ["`ids`", "int", "got '7'"]),
        (lambda: stateless_noise(5, 7), TypeError, ["`shape`", "tuple", "got 5"]),
        (lambda: stateless_noise((2, -3), 7), ValueError, ["`shape`", ">= 0", "got -3"]),
        (lambda: stateless_noise((2, 3.0), 7), TypeError, ["`shape`", "int", "got 3.0"]),
    ],
)
def test_what_is_no_integer_is_refused(call, exception, fragments):
    with pytest.raises(exception, match=says(*fragments)):
        call()


def test_integers_of_numpy_are_integers():
    assert torch.equal(stateless_noise((np.int64(2),), np.int64(7)), stateless_noise((2,), 7))
