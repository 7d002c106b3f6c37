"""
A judge that never saw the textures: the first half of an InceptionV3 that was trained on ImageNet.

    python training/desk/imagenet_features.py    # 25 MB from npm, outputs/imagenet-trunk.safetensors
    python training/evaluate_dod.py outputs/desk-samples --reference textures:8000:101 --resolution 32 \
        --extractor training/desk/imagenet_features.py:extractor --metrics fid kid

The npm package nsfwjs 4.3.0 (MIT) has a Keras InceptionV3 whose blocks up to `mixed5` were never trained further. Its
weights have 8 bits. Features are the means over all places after `mixed2` and `mixed5`, for images of 96 pixels a
side, to which smaller ones are enlarged.
"""

import argparse
import base64
import hashlib
import io
import re
import tarfile
import urllib.request
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from diffusers_dod.metrics.inception import Convolution, InceptionV3, max_pool_by_two


PACKAGE = "https://registry.npmjs.org/nsfwjs/-/nsfwjs-4.3.0.tgz"
PACKAGE_SHA256 = "4496790efc9bdc6f3e85a826a8e482c1fa1e9db4b3d18c095e98cc0c73cfb12f"
FOLDER = "package/dist/models/inception_v3"
NUM_SHARDS = 6
WEIGHTS = Path("outputs/imagenet-trunk.safetensors")
SIZE = 96
UNUSED = ("Mixed_6d", "Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c", "fc")


class ImageNetTrunk(torch.nn.Module):
    """Images (B, 3, H, W) in uint8 -> 288 features after `mixed2` and 768 after `mixed5`."""

    def __init__(self):
        super().__init__()
        with torch.device("meta"):
            network = InceptionV3()
        for name in UNUSED:
            delattr(network, name)
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden_states = images.float() / 127.5 - 1
        hidden_states = F.interpolate(hidden_states, (SIZE, SIZE), mode="bilinear", antialias=True)
        features = []
        for name, block in self.network.named_children():
            hidden_states = block(hidden_states)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                hidden_states = max_pool_by_two(hidden_states)
            elif name in ("Mixed_5d", "Mixed_6c"):  # Keras calls them mixed2 and mixed5
                features.append(hidden_states.mean(dim=(2, 3)))
        return torch.cat(features, dim=1)


def read_arrays(package: bytes) -> dict[str, np.ndarray]:
    """Reads the arrays of the Keras model in the npm package: 8-bit numbers, with a minimum and a scale for each."""
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:

        def read(name: str) -> str:
            return archive.extractfile(f"{FOLDER}/{name}").read().decode()

        model = read("model.min.js")
        shards = [read(f"group1-shard{i + 1}of{NUM_SHARDS}.min.js") for i in range(NUM_SHARDS)]
    content = b"".join(base64.b64decode(max(re.findall(r'"([A-Za-z0-9+/=]*)"', shard), key=len)) for shard in shards)
    entry = (
        r'\{name:"([^"]+)",shape:\[([\d,]*)\],dtype:"float32",quantization:\{min:([^,]+),scale:([^,]+),dtype:"uint8"'
    )
    arrays, start = {}, 0
    for name, shape, minimum, scale in re.findall(entry, model):
        lengths = [int(length) for length in shape.split(",")]
        end = start + int(np.prod(lengths))
        values = np.frombuffer(content[start:end], dtype=np.uint8).reshape(lengths)
        arrays[name] = (values * float(scale) + float(minimum)).astype(np.float32)
        start = end
    if start != len(content):
        raise ValueError(f"The package must hold {start} bytes of weights, got {len(content)}.")
    return arrays


def to_state(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Names the arrays as [`ImageNetTrunk`] does: both count convolutions in the same order, Keras from 1 on."""
    state = {}
    convolutions = [name for name, layer in ImageNetTrunk().named_modules() if isinstance(layer, Convolution)]
    for number, name in enumerate(convolutions, 1):
        norm = f"batch_normalization_{number}"
        state[f"{name}.conv.weight"] = torch.from_numpy(arrays[f"conv2d_{number}/kernel"]).permute(3, 2, 0, 1)
        state[f"{name}.bn.bias"] = torch.from_numpy(arrays[f"{norm}/beta"])
        state[f"{name}.bn.weight"] = torch.ones_like(state[f"{name}.bn.bias"])  # Keras's has none
        state[f"{name}.bn.running_mean"] = torch.from_numpy(arrays[f"{norm}/moving_mean"])
        state[f"{name}.bn.running_var"] = torch.from_numpy(arrays[f"{norm}/moving_variance"])
        state[f"{name}.bn.num_batches_tracked"] = torch.tensor(0)
    return {name: tensor.contiguous() for name, tensor in state.items()}


def main() -> None:
    """Downloads the package and writes the weights."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with urllib.request.urlopen(PACKAGE) as response:  # noqa: S310, the address is a constant
        package = response.read()
    if (found := hashlib.sha256(package).hexdigest()) != PACKAGE_SHA256:
        raise ValueError(f"{PACKAGE} must have the SHA-256 {PACKAGE_SHA256}, got {found}.")
    state = to_state(read_arrays(package))
    ImageNetTrunk().load_state_dict(state, assign=True)  # raises if a name or a shape differs
    WEIGHTS.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, WEIGHTS)
    print(f"{WEIGHTS}: {sum(tensor.numel() for tensor in state.values()):,} numbers")


if __name__ == "__main__":
    main()
elif not WEIGHTS.is_file():
    raise FileNotFoundError(f"{WEIGHTS} must be there: run python training/desk/imagenet_features.py")
else:
    extractor = ImageNetTrunk()
    extractor.load_state_dict(load_file(WEIGHTS), assign=True)
    extractor.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # 1.5 times as fast on a CPU
