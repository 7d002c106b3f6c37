"""The toy in the plane learns, its distances are right, and its commands run."""

import math
import re
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]
TOY = runpy.run_path(str(ROOT / "examples" / "toy_2d.py"))
COMMANDS = [
    command
    for document in ("examples/toy_2d.py", "docs/how_dod_works.md")
    for command in re.findall(r"^.*python examples/toy_2d\.py(.*)$", (ROOT / document).read_text(), re.MULTILINE)
]


@pytest.fixture(autouse=True)
def fixed_seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="module")
def trained():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TOY["ToyDoD"](code_dim=1)
        TOY["train"](model, 400)
    return model


def labels(num_samples: int) -> torch.Tensor:
    return torch.arange(TOY["NULL_CLASS"]).repeat_interleave(num_samples)


def test_distances_of_moved_points():
    data = 100 * torch.rand(600, 2)
    assert TOY["distances"](data, data) == (0, 0)
    wasserstein, nearest = TOY["distances"](data + torch.tensor([0.01, 0.0]), data)
    assert wasserstein == pytest.approx(0.01 * 2 / math.pi, rel=1e-2)  # the mean of |cos|
    assert nearest == pytest.approx(0.01, rel=1e-2)


def test_distances_are_those_within_the_classes():
    data = torch.randn(300, 2)
    data[:, 0] += 10 * labels(100)
    wasserstein, nearest = TOY["distances"](data.roll(100, dims=0), data)  # the same points, of other classes
    assert wasserstein > 5 and nearest > 5


def test_a_short_training_brings_the_samples_to_the_data(trained):
    class_labels = labels(300)
    data, noise = TOY["draw_data"](class_labels), torch.randn(2, len(class_labels), 2)
    before, _ = TOY["distances"](TOY["sample"](TOY["ToyDoD"](code_dim=1), noise[0], class_labels), data)
    stage_1 = TOY["sample"](trained, noise[0], class_labels)
    stage_2 = TOY["sample"](trained, noise[1], class_labels, previous=stage_1)
    assert TOY["distances"](stage_1, data)[0] < 0.5 * before
    assert TOY["distances"](stage_2, data)[0] < 0.5 * before


def test_a_stage_knows_the_one_before_by_its_code_only(trained, monkeypatch):
    class_labels, (noise, previous) = labels(5), torch.randn(2, 15, 2)
    points = TOY["sample"](trained, noise, class_labels, previous=previous)
    assert (points - TOY["sample"](trained, noise, class_labels, previous=-previous)).abs().max() > 0.1
    encoder, decoder = trained.latent_embedder
    code = encoder(previous)
    assert code.shape == (15, 1)
    monkeypatch.setitem(trained._modules, "latent_embedder", decoder)
    torch.testing.assert_close(TOY["sample"](trained, noise, class_labels, previous=code), points)


def test_guidance_leaves_the_null_class_and_s_behind(trained):
    class_labels, (noise, previous) = labels(5), torch.randn(2, 15, 2)
    unguided = TOY["sample"](trained, noise, torch.full_like(class_labels, TOY["NULL_CLASS"]))
    torch.testing.assert_close(TOY["sample"](trained, noise, class_labels, 0, previous), unguided)


@pytest.mark.parametrize("command", COMMANDS)
def test_documented_commands_run(command, tmp_path, capsys):
    output = tmp_path / "folder" / "toy.png"
    quick = ["--max_train_steps", "2", "--num_samples", "30", "--output", str(output)]
    TOY["main"]([*shlex.split(command, comments=True), *quick])
    image = np.asarray(Image.open(output))
    assert all(
        (image == [int(color[i : i + 2], 16) for i in (1, 3, 5)] + [255]).all(-1).any() for color in TOY["COLORS"]
    )
    assert capsys.readouterr().out.count(" W = ") == 7


def test_there_are_commands():
    assert len(COMMANDS) == 2
