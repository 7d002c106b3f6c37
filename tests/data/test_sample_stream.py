"""The stream of training samples as a function of (seed, position)."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import says
from torch.utils.data import DataLoader

from diffusers_dod.data.latents import Latents
from diffusers_dod.data.sample_stream import PositionSampler, SampleDraws, TrainingSamples, collate_priors_first


# ---------------------------------------------------------------------------------------------------------------------
# The stream


NUM_CLASSES = 9


class NumberedLatents(Latents):
    """Latents whose mean is everywhere 10 * image + view, so that a sample shows where it comes from."""

    def __init__(self, count: int = 7, views: int = 1, std: float | None = None):
        manifest = {"num_views": views, "latent_shape": (2, 4, 4)}
        super().__init__(Path("numbered"), manifest, torch.arange(count) % NUM_CLASSES)
        self.std = std

    def read(self, index: int, view: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert 0 <= view < self.num_views
        mean = torch.full(self.latent_shape, 10.0 * index + view)
        return mean, None if self.std is None else torch.full(self.latent_shape, self.std)


def image_and_view(sample: dict) -> tuple[int, int]:
    """For latents without posterior noise."""
    return divmod(int(sample["latents"].flatten()[0]), 10)


def assert_same_sample(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for name in first:
        if isinstance(first[name], torch.Tensor):
            assert torch.equal(first[name], second[name]), name
        else:
            assert first[name] == second[name], name


def test_a_sample_does_not_depend_on_the_order_of_access():
    latents = NumberedLatents(views=2, std=1.0)
    forwards = [TrainingSamples(latents, SampleDraws(NUM_CLASSES, seed=5))[position] for position in range(30)]
    stream = TrainingSamples(latents, SampleDraws(NUM_CLASSES, seed=5))
    torch.manual_seed(123)
    for position in [29, 3, 3, 17, 0, 28, 8, 6, 7]:  # back and forth between five passes over the data
        assert_same_sample(stream[position], forwards[position])


def test_noise_of_priors_leaves_all_other_draws_alone():
    latents = NumberedLatents(std=1.0)
    plain, noisy = (
        TrainingSamples(latents, SampleDraws(NUM_CLASSES, seed=5, prior_noise=level)) for level in (0.0, 0.5)
    )
    samples = [noisy[position] for position in range(200)]
    for position, sample in enumerate(samples):
        added = {name: sample.pop(name) for name in ("prior_noise", "prior_sigma")}
        assert_same_sample(sample, plain[position])
        sample |= added
    sigmas = torch.stack([sample["prior_sigma"] for sample in samples])
    assert 0 <= sigmas.min() < 0.05 and 0.45 < sigmas.max() <= 0.5 and sigmas.mean() == pytest.approx(0.25, abs=0.03)
    noise = torch.stack([sample["prior_noise"] for sample in samples])
    assert noise.std() == pytest.approx(1, abs=0.03)
    together = torch.stack([torch.stack([sample["noise"], sample["prior_noise"]]).flatten(1) for sample in samples])
    assert torch.corrcoef(together.transpose(0, 1).flatten(1))[0, 1].abs() < 0.05  # of each other independent
    batch = collate_priors_first(samples[:8])
    assert batch["prior_noise"].shape == batch["noise"].shape and batch["prior_sigmas"].shape == (8,)


def test_workers_see_the_same_stream():
    stream = TrainingSamples(NumberedLatents(std=1.0), SampleDraws(NUM_CLASSES, seed=5))
    batches = [
        list(DataLoader(stream, 4, sampler=range(12), collate_fn=collate_priors_first, num_workers=workers))
        for workers in (0, 2)
    ]
    for one, other in zip(*batches, strict=True):
        assert_same_sample(one, other)


def test_every_image_once_per_pass_and_every_pass_in_its_own_order():
    stream = TrainingSamples(NumberedLatents(count=20), SampleDraws(NUM_CLASSES, seed=0))
    passes = [[image_and_view(stream[20 * epoch + i])[0] for i in range(20)] for epoch in range(4)]
    for order in passes:
        assert sorted(order) == list(range(20)) and order != list(range(20))
    assert len({tuple(order) for order in passes}) == 4


def correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([first.double().flatten(), second.double().flatten()]))[0, 1])


COUNT = 4000


@pytest.fixture(scope="module")
def drawn() -> list[dict]:
    """4,000 samples of two views with posterior noise of standard deviation 0.01, which leaves the mean readable."""
    latents = NumberedLatents(views=2, std=0.01)
    stream = TrainingSamples(latents, SampleDraws(NUM_CLASSES, seed=1, label_dropout_prob=0.1, prior_dropout_prob=0.3))
    return [stream[position] for position in range(COUNT)]


def origin(sample: dict) -> tuple[int, int]:
    return divmod(round(float(sample["latents"].mean())), 10)


def events(drawn: list[dict]) -> dict[str, torch.Tensor]:
    return {
        "dropped label": torch.tensor([sample["class_label"] == NUM_CLASSES for sample in drawn]).double(),
        "dropped prior": torch.tensor([not sample["has_prior"] for sample in drawn]).double(),
        "mirrored": torch.tensor([origin(sample)[1] for sample in drawn]).double(),
    }


@pytest.mark.parametrize(("event", "share"), [("dropped label", 0.1), ("dropped prior", 0.3), ("mirrored", 0.5)])
def test_shares(drawn, event, share):
    assert float(events(drawn)[event].mean()) == pytest.approx(share, abs=4 * (share * (1 - share) / COUNT) ** 0.5)


def test_draws_are_independent_of_each_other(drawn):
    values = events(drawn)
    values["time"] = torch.stack([sample["sigma"] for sample in drawn]).double()
    values["noise"] = torch.stack([sample["noise"].flatten()[0] for sample in drawn]).double()
    values["posterior"] = torch.stack([sample["latents"].std() for sample in drawn]).double()
    values["image"] = torch.tensor([origin(sample)[0] for sample in drawn]).double()
    names = list(values)
    for i, name in enumerate(names):
        for other in names[:i]:
            assert abs(correlation(values[name], values[other])) < 4 / COUNT**0.5, (name, other)
        # Nor does a position say anything about the next one.
        if name != "image":  # which must not come twice in a pass
            assert abs(correlation(values[name][1:], values[name][:-1])) < 4 / COUNT**0.5, name


def test_a_dropped_class_is_the_null_class_and_others_keep_their_own(drawn):
    for sample in drawn:
        assert sample["class_label"] in (NUM_CLASSES, origin(sample)[0] % NUM_CLASSES)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_certain_events(probability):
    latents = NumberedLatents()
    stream = TrainingSamples(
        latents, SampleDraws(NUM_CLASSES, seed=0, label_dropout_prob=probability, prior_dropout_prob=probability)
    )
    for sample in (stream[position] for position in range(100)):
        assert (sample["class_label"] == NUM_CLASSES) == (probability == 1)
        assert sample["has_prior"] == (probability == 0)


def assert_standard_normal(values: torch.Tensor) -> None:
    """Mean, variance and fourth moment within four standard errors."""
    values = values.double().flatten()
    count = len(values)
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (4, 3, 96)):
        assert float((values**power).mean()) == pytest.approx(expected, abs=4 * (variance / count) ** 0.5), power


def test_noises_and_time_are_normal_and_their_own_at_every_position():
    std = 3.0
    stream = TrainingSamples(NumberedLatents(count=1, std=std), SampleDraws(NUM_CLASSES, seed=2))  # mean 0
    samples = [stream[position] for position in range(2000)]
    posterior = torch.stack([sample["latents"] for sample in samples]) / std
    noise = torch.stack([sample["noise"] for sample in samples])
    sigma = torch.stack([sample["sigma"] for sample in samples])
    assert noise.shape == posterior.shape == (2000, 2, 4, 4) and sigma.shape == (2000,)
    assert_standard_normal(posterior)
    assert_standard_normal(noise)
    assert 0 < sigma.min() and sigma.max() < 1
    assert_standard_normal(torch.logit(sigma.double()))  # paper, Eq. 11

    limit = 4 / noise.numel() ** 0.5
    assert abs(correlation(posterior, noise)) < limit
    assert abs(correlation(posterior[1:], posterior[:-1])) < limit
    assert abs(correlation(noise[1:], noise[:-1])) < limit
    assert len(torch.unique(sigma)) == 2000


def test_the_same_image_has_new_noise_in_every_pass():
    stream = TrainingSamples(NumberedLatents(count=1, std=1.0), SampleDraws(NUM_CLASSES, seed=2))
    first, second = stream[0], stream[1]
    for name in ("latents", "noise", "sigma"):
        assert not torch.equal(first[name], second[name]), name


def test_the_seed_decides():
    latents = NumberedLatents(count=20, views=2)
    one, same, other = (TrainingSamples(latents, SampleDraws(NUM_CLASSES, seed=seed)) for seed in (0, 0, 1))
    for position in range(25):
        assert_same_sample(one[position], same[position])
        assert not torch.equal(one[position]["noise"], other[position]["noise"])
    orders = [[image_and_view(stream[i])[0] for i in range(20)] for stream in (one, other)]
    assert orders[0] != orders[1]


def test_samples_with_a_prior_come_first_in_their_own_order():
    has_prior = [False, True, False, True, True]
    samples = [
        {
            "latents": torch.full((2, 4, 4), float(i)),
            "noise": torch.full((2, 4, 4), 10.0 + i),
            "sigma": torch.tensor(i / 10),
            "class_label": i + 20,
            "has_prior": kept,
        }
        for i, kept in enumerate(has_prior)
    ]
    batch = collate_priors_first(samples)
    order = torch.tensor([1, 3, 4, 0, 2])
    assert batch["num_priors"] == 3
    assert batch["latents"].shape == batch["noise"].shape == (5, 2, 4, 4)
    assert torch.equal(batch["latents"][:, 0, 0, 0], order.float())
    assert torch.equal(batch["noise"][:, 0, 0, 0], 10.0 + order)
    torch.testing.assert_close(batch["sigmas"], order / 10)
    assert torch.equal(batch["class_labels"], 20 + order) and batch["class_labels"].dtype == torch.int64
    assert [sample["class_label"] for sample in samples] == [20, 21, 22, 23, 24]  # the caller's list is untouched


@pytest.mark.parametrize("kept", [True, False])
def test_all_or_none_with_a_prior(kept):
    stream = TrainingSamples(
        NumberedLatents(), SampleDraws(NUM_CLASSES, seed=0, prior_dropout_prob=0.0 if kept else 1.0)
    )
    batch = collate_priors_first([stream[position] for position in range(4)])
    assert batch["num_priors"] == (4 if kept else 0)
    expected = torch.stack([stream[position]["noise"] for position in range(4)])
    assert torch.equal(batch["noise"], expected)


# ---------------------------------------------------------------------------------------------------------------------
# Who gets which position


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (2, 1), (1, 2), (2, 2), (3, 4)])
def test_processes_and_accumulation_share_the_positions_of_one_batch(processes, accumulation):
    batch_size, num_steps = 3, 4
    sizes = (0, num_steps, batch_size, accumulation)
    samplers = [PositionSampler(*sizes, index, processes) for index in range(processes)]
    together = processes * accumulation * batch_size
    alone = list(PositionSampler(0, num_steps, together))
    per_step = accumulation * batch_size
    positions = [list(sampler) for sampler in samplers]
    for sampler, own in zip(samplers, positions, strict=True):
        assert len(own) == len(sampler) == num_steps * per_step
    for step in range(num_steps):
        shared = [position for own in positions for position in own[step * per_step : (step + 1) * per_step]]
        assert sorted(shared) == alone[step * together : (step + 1) * together]
    assert alone == list(range(num_steps * together))


@pytest.mark.parametrize("start_step", [0, 1, 3, 5])
def test_a_resumed_sampler_goes_on_where_it_stopped(start_step):
    whole = list(PositionSampler(0, 5, 3, accumulation=2, process_index=1, num_processes=2))
    rest = PositionSampler(start_step, 5, 3, accumulation=2, process_index=1, num_processes=2)
    assert list(rest) == whole[start_step * 6 :]
    assert len(rest) == (5 - start_step) * 6
    assert list(rest) == list(rest)  # a sampler may be read twice


# ---------------------------------------------------------------------------------------------------------------------
# Exact shares


@pytest.mark.parametrize(("size", "dropped_labels", "dropped_priors"), [(10, 1, 5), (20, 2, 10), (30, 3, 15)])
def test_exact_shares_of_each_group_are_dropped(size, dropped_labels, dropped_priors):
    stream = TrainingSamples(NumberedLatents(), SampleDraws(NUM_CLASSES, seed=3, exact_dropout_size=size))
    patterns = set()
    for group in range(6):
        samples = [stream[position] for position in range(group * size, (group + 1) * size)]
        labels = [sample["class_label"] == NUM_CLASSES for sample in samples]
        priors = [not sample["has_prior"] for sample in samples]
        assert (sum(labels), sum(priors)) == (dropped_labels, dropped_priors)
        patterns.add((tuple(labels), tuple(priors)))
    assert len(patterns) > 3  # others in each group


@pytest.mark.parametrize("micro_batch_size", [2, 3, 6])
def test_every_micro_batch_of_a_step_drops_as_many_priors(micro_batch_size):
    """A share that is no whole number is rounded up or down for the whole step, so that it is met on average."""
    draws = SampleDraws(
        NUM_CLASSES, 3, prior_dropout_prob=0.4, exact_dropout_size=12, micro_batch_size=micro_batch_size
    )
    drops = torch.tensor([draws(position).drops_prior for position in range(12 * 100)])
    counts = drops.reshape(100, -1, micro_batch_size).sum(dim=2)
    assert (counts == counts[:, :1]).all()
    share = 0.4 * micro_batch_size
    assert set(counts.flatten().tolist()) == {math.floor(share), math.ceil(share)}
    assert abs(counts.double().mean().item() - share) < 0.15  # 3 standard errors of a fair coin
    assert len({tuple(row) for row in drops.reshape(-1, micro_batch_size).tolist()}) > 2


def test_classes_are_dropped_on_average_where_a_step_is_small():
    """A tenth of 4 samples, rounded, would be no sample ever."""
    draws = SampleDraws(NUM_CLASSES, 3, exact_dropout_size=4)
    assert 0.07 < sum(draws(position).drops_label for position in range(1000)) / 1000 < 0.13


def test_exact_shares_change_nothing_else():
    exact = TrainingSamples(NumberedLatents(std=1.0), SampleDraws(NUM_CLASSES, seed=3, exact_dropout_size=4))
    independent = TrainingSamples(NumberedLatents(std=1.0), SampleDraws(NUM_CLASSES, seed=3))
    for position in (0, 5, 13):
        for name in ("latents", "noise", "sigma"):
            assert torch.equal(exact[position][name], independent[position][name])


def test_nothing_or_everything_is_dropped_exactly():
    for probability in (0.0, 1.0):
        stream = TrainingSamples(
            NumberedLatents(), SampleDraws(NUM_CLASSES, 3, probability, probability, exact_dropout_size=6)
        )
        assert {stream[position]["has_prior"] for position in range(12)} == {probability == 0}


def test_time_of_another_distribution():
    """logit(sigma) ~ N(mean, std^2), and then shifted: the logit gains log(shift)."""
    plain = SampleDraws(NUM_CLASSES, 3)
    moved = SampleDraws(NUM_CLASSES, 3, logit_mean=-0.4, logit_std=1.5, time_shift=3.0)
    for position in range(20):
        normal = torch.logit(plain(position).sigma.double())
        logit = torch.logit(moved(position).sigma.double())
        torch.testing.assert_close(logit, -0.4 + 1.5 * normal + np.log(3.0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("replaced", "exception", "fragments"),
    [
        ({"num_classes": 0}, ValueError, [">= 1", "got 0"]),
        ({"num_classes": "2"}, TypeError, ["int", "got '2'"]),
        ({"seed": -1}, ValueError, [">= 0", "-1"]),
        ({"seed": 2**64}, ValueError, ["2**64"]),
        ({"label_dropout_prob": 1.1}, ValueError, ["[0, 1]", "got 1.1"]),
        ({"prior_dropout_prob": float("nan")}, ValueError, ["[0, 1]", "got nan"]),
        ({"exact_dropout_size": 0}, ValueError, [">= 1", "got 0"]),
        ({"micro_batch_size": 4, "exact_dropout_size": 6}, ValueError, ["divide 6", "got 4"]),
        ({"logit_mean": float("inf")}, ValueError, ["finite", "got inf"]),
        ({"logit_std": -1.0}, ValueError, ["[0, inf)", "got -1.0"]),
        ({"time_shift": 0.0}, ValueError, ["(0, inf)", "got 0.0"]),
    ],
)
def test_settings_of_draws_that_make_no_sense(replaced, exception, fragments):
    name = "ids" if "seed" in replaced else next(iter(replaced))
    with pytest.raises(exception, match=says(f"`{name}`", *fragments)):
        SampleDraws(**{"num_classes": 2, "seed": 0, **replaced})


@pytest.mark.parametrize(
    ("name", "value"),
    [("start_step", -1), ("num_steps", None), ("batch_size", 0), ("accumulation", 0), ("num_processes", 0.5)],
)
def test_numbers_of_positions_are_checked(name, value):
    with pytest.raises((TypeError, ValueError), match=says(f"`{name}`", str(value))):
        PositionSampler(**{"start_step": 0, "num_steps": 3, "batch_size": 2, name: value})
