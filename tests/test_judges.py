"""The judges of the study that were not trained on the labels of the textures."""

import base64
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusers_dod.metrics.inception import Convolution


sys.path.insert(0, str(Path(__file__).parents[1] / "training" / "desk"))


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """The module of the ImageNet judge, as a command: its weights may be missing."""
    import runpy
    import types

    path = Path(__file__).parents[1] / "training" / "desk" / "imagenet_features.py"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("empty"))
        with pytest.raises(FileNotFoundError, match="run python training/desk/imagenet_features.py"):
            runpy.run_path(str(path), run_name="imported")
    source = path.read_text().split('\nif __name__ == "__main__":')[0]
    module = types.ModuleType("imagenet_features")
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module


def package(arrays: dict[str, np.ndarray], scale: float, minimum: float, imagenet) -> bytes:
    """An npm package like the published one, of 8-bit arrays."""
    entries = ",".join(
        f'{{name:"{name}",shape:{json.dumps(list(array.shape), separators=(",", ":"))},dtype:"float32",'
        f'quantization:{{min:{minimum},scale:{scale},dtype:"uint8"}}}}'
        for name, array in arrays.items()
    )
    content = b"".join(array.tobytes() for array in arrays.values())
    size = -(-len(content) // imagenet.NUM_SHARDS)
    files = {"model.min.js": f"!function(a){{}}({{weights:[{entries}]}})"}
    for i in range(imagenet.NUM_SHARDS):
        text = base64.b64encode(content[i * size : (i + 1) * size]).decode()
        files[f"group1-shard{i + 1}of{imagenet.NUM_SHARDS}.min.js"] = f'module.exports="{text}"'
    with io.BytesIO() as buffer:
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            for name, text in files.items():
                member = tarfile.TarInfo(f"{imagenet.FOLDER}/{name}")
                member.size = len(text)
                archive.addfile(member, io.BytesIO(text.encode()))
        return buffer.getvalue()


def test_arrays_of_the_package(imagenet):
    arrays = {"conv2d_1/kernel": np.arange(24, dtype=np.uint8).reshape(2, 3, 4), "b": np.uint8([0, 255])}
    found = imagenet.read_arrays(package(arrays, 0.5, -1.0, imagenet))
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array * 0.5 - 1)


def test_weights_go_to_the_convolutions_in_their_order(imagenet):
    trunk = imagenet.ImageNetTrunk()
    convolutions = {name: layer for name, layer in trunk.named_modules() if isinstance(layer, Convolution)}
    arrays = {}
    for number, layer in enumerate(convolutions.values(), 1):
        out_channels, in_channels, height, width = layer.conv.weight.shape
        arrays[f"conv2d_{number}/kernel"] = np.full((height, width, in_channels, out_channels), number, np.float32)
        for name in ("beta", "moving_mean", "moving_variance"):
            arrays[f"batch_normalization_{number}/{name}"] = np.full(out_channels, number + 0.5, np.float32)
    state = imagenet.to_state(arrays)
    trunk.load_state_dict(state, assign=True)
    # 5 of the stem, 7 of each of three blocks, 4 of the reduction and 10 of each of two blocks.
    assert len(convolutions) == 50
    names = list(convolutions)
    assert names[5] == "network.Mixed_5b.branch1x1" and names[-1] == "network.Mixed_6c.branch_pool"
    assert float(state["network.Mixed_6c.branch_pool.conv.weight"].mean()) == 50
    features = trunk.eval()(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    assert features.shape == (2, 288 + 768)


def test_the_spectrum_sees_contrast_size_and_colour():
    from spectrum_features import extractor

    x = torch.arange(32)
    wave = torch.cos(2 * torch.pi * 4 * x / 32).expand(3, 32, 32)  # grey, four periods
    images = [
        (127.5 + 40 * wave),
        (127.5 + 80 * wave),
        (127.5 + 40 * wave * torch.tensor([1.0, 0, -1])[:, None, None]),
    ]
    weak, strong, coloured = extractor(torch.stack(images).round().to(torch.uint8)).unflatten(1, (3, 18))
    assert weak[0].argmax() == 0 and weak[0, 1:].argmax() + 1 == 4
    assert strong[0, 4] - weak[0, 4] == pytest.approx(np.log(4), abs=0.05)
    assert (weak[1:, 4] < -13).all() and (coloured[1:, 4] > -9).all()
