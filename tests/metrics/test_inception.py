"""Inception against an independent implementation, and the files of its weights."""

import math
import pickle
from pathlib import Path

import pytest
import torch
from golden_data import golden
from helpers import constant_inception_weights, says

from diffusers_dod.files import file_sha256
from diffusers_dod.metrics import inception
from diffusers_dod.metrics.inception import InceptionV3, average_pool, load_inception, resize


SIZES = [(32, 32), (40, 72), (256, 256)]
NAMES = ("features", "spatial_features", "logits")


def draw_weights() -> dict[str, torch.Tensor]:
    """Weights that keep activations near unit size: uniform numbers, which are the same on every machine."""
    with torch.device("meta"):
        state = InceptionV3().state_dict()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            state[name] = torch.zeros(tensor.shape, dtype=tensor.dtype)
            continue
        numbers = torch.rand(tensor.shape, generator=generator)
        if tensor.ndim > 1:
            state[name] = (2 * numbers - 1) * math.sqrt(6 / tensor[0].numel())
        elif name.endswith(("bn.weight", "running_var")):
            state[name] = 0.5 + numbers
        else:
            state[name] = 0.4 * numbers - 0.2
    return state


def draw_images(height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * width)
    return torch.randint(0, 256, (1, 3, height, width), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def model() -> InceptionV3:
    with torch.device("meta"):
        model = InceptionV3()
    model.load_state_dict(draw_weights(), assign=True)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_features_are_those_of_torch_fidelity(model, size):
    expected = golden("inception_io")
    for name, values in zip(NAMES, model(draw_images(*size)), strict=True):
        wanted = expected[f"{name}/{size[0]}x{size[1]}"]
        assert values.shape == wanted.shape and wanted.std() > 0.3
        torch.testing.assert_close(values, wanted, rtol=1e-4, atol=1e-4)


def test_images_do_not_depend_on_their_batch(model):
    expected = golden("inception_io")
    for name, values in zip(NAMES, model(torch.cat([255 - draw_images(32, 32), draw_images(32, 32)])), strict=True):
        torch.testing.assert_close(values[1:], expected[f"{name}/32x32"], rtol=1e-4, atol=1e-4)
        assert (values[0] - values[1]).abs().max() > 0.1


def test_resizing_of_tensorflow_1():
    row = torch.tensor([0.0, 8.0, 4.0]).repeat(1, 1, 3, 1)
    # Pixel i of 6 is at i / 2, and the last one, at 2.5, has no right neighbour; half-pixel centres give 0, 2, 6, ...
    assert resize(row, 6)[0, 0, 0].tolist() == [0, 4, 8, 6, 4, 4]
    assert resize(row.transpose(2, 3), 6)[0, 0, :, 0].tolist() == [0, 4, 8, 6, 4, 4]
    assert resize(row, 2)[0, 0, 0].tolist() == [0, 6]  # at 0 and 1.5: no average over what is left out

    images = torch.rand(1, 2, 5, 700, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = resize(images)
    assert found.shape == (1, 2, 299, 299) and found.dtype == torch.float64
    for row, column in [(0, 0), (1, 298), (150, 7), (298, 298)]:
        y, x = row * 5 / 299, column * 700 / 299
        top, left = int(y), int(x)
        bottom, right = min(top + 1, 4), min(left + 1, 699)
        upper = (1 - x % 1) * images[0, :, top, left] + x % 1 * images[0, :, top, right]
        lower = (1 - x % 1) * images[0, :, bottom, left] + x % 1 * images[0, :, bottom, right]
        torch.testing.assert_close(found[0, :, row, column], (1 - y % 1) * upper + y % 1 * lower)
    whole = draw_images(299, 299).float()
    assert torch.equal(resize(whole), whole)


def test_average_pools_do_not_count_the_padding():
    assert torch.equal(average_pool(torch.ones(1, 1, 4, 4)), torch.ones(1, 1, 4, 4))


def test_images_must_be_in_bytes(model):
    with pytest.raises(ValueError, match=says("`images` must be uint8 from 0 to 255, got torch.float32")):
        model(torch.rand(1, 3, 8, 8))


def save(path: Path, state: object, **options) -> Path:
    torch.save(state, path, **options)
    return path


def test_weights_come_from_the_file_that_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.delenv("INCEPTION_WEIGHTS", raising=False)
    cached = tmp_path / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
    instructions = ("`fid_extractor`", "https://github.com/", cached.name, "(91 MB)", "INCEPTION_WEIGHTS")
    with pytest.raises(FileNotFoundError, match=says(f"got no file {cached}", *instructions)):
        load_inception(argument="fid_extractor")
    with pytest.raises(FileNotFoundError, match=says(f"got no file {tmp_path}", *instructions)):
        load_inception(tmp_path, "fid_extractor")

    state = constant_inception_weights()
    cached.parent.mkdir()
    sha256 = file_sha256(save(cached, state))
    with pytest.raises(ValueError, match=says("6726825d", f"got {cached} with {sha256}", f"`inception:{cached}`")):
        load_inception()
    monkeypatch.setattr(inception, "WEIGHTS_SHA256", sha256[:8])
    model, found = load_inception()
    assert found == sha256 and not model.training
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())

    other = {name: tensor for name, tensor in state.items() if "num_batches" not in name}
    other["fc.bias"] = torch.ones(1008)
    path = save(tmp_path / "other.pt", other, _use_new_zipfile_serialization=False)  # as PyTorch wrote them until 2020
    monkeypatch.setenv("INCEPTION_WEIGHTS", str(path))
    with pytest.raises(ValueError, match=says("`extractor`", str(path), sha256[:8])):
        load_inception()
    model, found = load_inception(path)
    assert found == file_sha256(path) and bool((model.fc.bias == 1).all())
    assert model.Conv2d_1a_3x3.bn.num_batches_tracked == 0


class Program:
    def __reduce__(self):
        return (pytest.fail, ("A file of weights was run.",))


def test_files_of_other_weights_are_refused(tmp_path):
    state = constant_inception_weights()
    good = save(tmp_path / "good.pth", state).read_bytes()
    name = "Mixed_7c.branch3x3_2b.conv.weight"
    contents = {
        "cannot be read as weights (RuntimeError)": good[: len(good) // 2],
        "cannot be read as weights (EOFError)": b"",
        "cannot be read as weights (UnpicklingError)": pickle.dumps(Program(), protocol=2),
        "no weights by their names, but list": [state],
        "1 weights are missing ['fc.bias'], 1 are unknown ['head.bias']": {
            key.replace("fc.bias", "head.bias"): value for key, value in state.items()
        },
        f"1 weights are missing ['{name}'], 0 are unknown": {key: state[key] for key in state if key != name},
        "0 weights are missing [], 1 are unknown ['1']": state | {1: state[name]},
        f"{name} must have shape (384, 384, 3, 1), got (384, 384, 1, 3)": state | {name: state[name].mT},
        f"{name} must have the type torch.float32, got torch.int64": state | {name: state[name].long()},
        f"{name} has numbers that are not finite": state | {name: state[name] * torch.nan},
        f"{name} is no tensor with values": state | {name: [1.0]},
        "fc.bias is no tensor with values": state | {"fc.bias": state["fc.bias"].to("meta")},
    }
    for fragment, content in contents.items():
        path = tmp_path / "bad.pth"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            save(path, content)
        with pytest.raises(ValueError, match=says("`extractor`", f"got {path}", fragment)):
            load_inception(path)
