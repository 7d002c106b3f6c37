# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
The Inception network that FID is defined on: TensorFlow's graph of 2015-12-05, with its published weights for PyTorch.

It is Inception-v3 (Szegedy et al., 2016) with 1,008 classes. Three things differ from later networks of that name, and
all change FID: average pools do not count the padding, the pool branch of the last block takes the maximum, and images
are resized as in TensorFlow 1.

    model, sha256 = load_inception()  # the file that INCEPTION_WEIGHTS names
    features, spatial_features, logits = model(images)
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..files import file_sha256


WEIGHTS_VARIABLE = "INCEPTION_WEIGHTS"
WEIGHTS_FILE = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS_FILE}"
WEIGHTS_SIZE = "91 MB"
WEIGHTS_SHA256 = "6726825d"  # the first digits, which the file's name has

INPUT_SIZE = 299
NUM_CLASSES = 1008
SPATIAL_CHANNELS = 7  # of sFID, as ADM takes them

Kernel = tuple[int, int, int]  # output channels, height, width
Branches = dict[str, list[list[Kernel]]]


def resize(images: torch.Tensor, size: int = INPUT_SIZE) -> torch.Tensor:
    """
    Bilinear resizing of TensorFlow 1, without aligned corners and without half-pixel centres.

    Pixel i of a row of n lies at i * n / size of the row of n pixels that it is made of. There is no low-pass filter.

    Args:
        images (`torch.Tensor` of shape `(B, C, H, W)`): The images, in a floating-point type.
        size (`int`, defaults to 299): Height and width of the result in pixels.

    Returns:
        `torch.Tensor` of shape `(B, C, size, size)`: The resized images.
    """
    for dim in (3, 2):
        length = images.shape[dim]
        positions = torch.arange(size, dtype=images.dtype, device=images.device) * (length / size)
        before = positions.long()
        after = (before + 1).clamp(max=length - 1)
        weights = (positions - before).reshape((size,) + (1,) * (3 - dim))
        first, second = images.index_select(dim, before), images.index_select(dim, after)
        images = first + (second - first) * weights
    return images


class Convolution(nn.Module):
    """
    Convolution without bias, batch normalisation and ReLU.

    Args:
        in_channels (`int`): Channels of the input.
        kernel (`tuple[int, int, int]`): Output channels, height and width.
        stride (`int`, defaults to 1): Stride in both directions.
        padded (`bool`, defaults to `True`): Whether the input is padded with zeros by half of the kernel.
    """

    def __init__(self, in_channels: int, kernel: Kernel, stride: int = 1, padded: bool = True):
        super().__init__()
        out_channels, height, width = kernel
        padding = (height // 2, width // 2) if padded else 0
        self.conv = nn.Conv2d(in_channels, out_channels, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Maps `hidden_states` (B, C, H, W) to (B, K, H', W')."""
        return F.relu(self.bn(self.conv(hidden_states)), inplace=True)


average_pool = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
max_pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
max_pool_by_two = partial(F.max_pool2d, kernel_size=3, stride=2)


class Mixed(nn.Module):
    """
    Branches that see the same input and whose outputs are put together.

    The convolutions have the names of the published weights: the branch, the number of the step if there are several,
    and a letter if the step has two kernels. An example is `branch3x3_2a`.

    Args:
        in_channels (`int`): Channels of the input.
        branches (`dict[str, list[list[tuple]]]`):
            Kernels of each branch, step after step. The outputs of the kernels of one step are put together.
        pool (`Callable`): Pooling at the start of the branch `branch_pool`.
        stride (`int`, defaults to 1): Stride of each branch's last convolution, which is not padded if it is 2.
    """

    def __init__(self, in_channels: int, branches: Branches, pool: Callable, stride: int = 1):
        super().__init__()
        self.pool = pool
        self.paths: dict[str, list[list[str]]] = {}  # the names of the convolutions
        for branch, steps in branches.items():
            self.paths[branch] = []
            channels = in_channels
            for i, kernels in enumerate(steps):
                number = f"_{i + 1}" if len(steps) > 1 else ""
                names = [f"{branch}{number}{'ab'[j] if len(kernels) > 1 else ''}" for j in range(len(kernels))]
                last_stride = stride if i == len(steps) - 1 else 1
                for name, kernel in zip(names, kernels, strict=True):
                    self.add_module(name, Convolution(channels, kernel, last_stride, padded=last_stride == 1))
                self.paths[branch].append(names)
                channels = sum(kernel[0] for kernel in kernels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Maps `hidden_states` (B, C, H, W) to (B, K, H', W')."""
        outputs = []
        for branch, steps in self.paths.items():
            output = self.pool(hidden_states) if branch == "branch_pool" else hidden_states
            for names in steps:
                output = torch.cat([self.get_submodule(name)(output) for name in names], dim=1)
            outputs.append(output)
        return torch.cat(outputs, dim=1)


def branches_35(pool_channels: int) -> Branches:
    """The branches of a block that works on 35 x 35 places, with `pool_channels` channels behind the pool."""
    return {
        "branch1x1": [[(64, 1, 1)]],
        "branch5x5": [[(48, 1, 1)], [(64, 5, 5)]],
        "branch3x3dbl": [[(64, 1, 1)], [(96, 3, 3)], [(96, 3, 3)]],
        "branch_pool": [[(pool_channels, 1, 1)]],
    }


def branches_17(inner: int) -> Branches:
    """The branches of a block that works on 17 x 17 places, with `inner` channels inside."""
    return {
        "branch1x1": [[(192, 1, 1)]],
        "branch7x7": [[(inner, 1, 1)], [(inner, 1, 7)], [(192, 7, 1)]],
        "branch7x7dbl": [[(inner, 1, 1)], [(inner, 7, 1)], [(inner, 1, 7)], [(inner, 7, 1)], [(192, 1, 7)]],
        "branch_pool": [[(192, 1, 1)]],
    }


BRANCHES_8: Branches = {
    "branch1x1": [[(320, 1, 1)]],
    "branch3x3": [[(384, 1, 1)], [(384, 1, 3), (384, 3, 1)]],
    "branch3x3dbl": [[(448, 1, 1)], [(384, 3, 3)], [(384, 1, 3), (384, 3, 1)]],
    "branch_pool": [[(192, 1, 1)]],
}
BRANCHES_35_TO_17: Branches = {
    "branch3x3": [[(384, 3, 3)]],
    "branch3x3dbl": [[(64, 1, 1)], [(96, 3, 3)], [(96, 3, 3)]],
    "branch_pool": [],
}
BRANCHES_17_TO_8: Branches = {
    "branch3x3": [[(192, 1, 1)], [(320, 3, 3)]],
    "branch7x7x3": [[(192, 1, 1)], [(192, 1, 7)], [(192, 7, 1)], [(192, 3, 3)]],
    "branch_pool": [],
}


class InceptionV3(nn.Module):
    """The network, with the names of its published weights."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, (32, 3, 3), stride=2, padded=False)
        self.Conv2d_2a_3x3 = Convolution(32, (32, 3, 3), padded=False)
        self.Conv2d_2b_3x3 = Convolution(32, (64, 3, 3))
        self.Conv2d_3b_1x1 = Convolution(64, (80, 1, 1))
        self.Conv2d_4a_3x3 = Convolution(80, (192, 3, 3), padded=False)
        self.Mixed_5b = Mixed(192, branches_35(32), average_pool)
        self.Mixed_5c = Mixed(256, branches_35(64), average_pool)
        self.Mixed_5d = Mixed(288, branches_35(64), average_pool)
        self.Mixed_6a = Mixed(288, BRANCHES_35_TO_17, max_pool_by_two, stride=2)
        self.Mixed_6b = Mixed(768, branches_17(128), average_pool)
        self.Mixed_6c = Mixed(768, branches_17(160), average_pool)
        self.Mixed_6d = Mixed(768, branches_17(160), average_pool)
        self.Mixed_6e = Mixed(768, branches_17(192), average_pool)
        self.Mixed_7a = Mixed(768, BRANCHES_17_TO_8, max_pool_by_two, stride=2)
        self.Mixed_7b = Mixed(1280, BRANCHES_8, average_pool)
        self.Mixed_7c = Mixed(2048, BRANCHES_8, max_pool)
        self.fc = nn.Linear(2048, NUM_CLASSES)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Features of images for FID, sFID and the Inception Score.

        Args:
            images (`torch.Tensor` of shape `(B, 3, H, W)`): The images, in uint8.

        Returns:
            `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: Features `pool_3` (B, 2048); spatial features
                (B, 17 * 17 * 7), the first 7 channels of `mixed_6/conv` in the order (row, column, channel); and
                logits (B, 1008) without the bias.

        Raises:
            `ValueError`: the images are not in uint8.
        """
        if images.dtype != torch.uint8:
            raise ValueError(f"`images` must be uint8 from 0 to 255, got {images.dtype}.")
        hidden_states = (resize(images.float()) - 128) / 128  # (B, 3, 299, 299)
        hidden_states = self.Conv2d_1a_3x3(hidden_states)  # (B, 32, 149, 149)
        hidden_states = self.Conv2d_2a_3x3(hidden_states)  # (B, 32, 147, 147)
        hidden_states = max_pool_by_two(self.Conv2d_2b_3x3(hidden_states))  # (B, 64, 73, 73)
        hidden_states = self.Conv2d_3b_1x1(hidden_states)  # (B, 80, 73, 73)
        hidden_states = max_pool_by_two(self.Conv2d_4a_3x3(hidden_states))  # (B, 192, 35, 35)
        hidden_states = self.Mixed_5b(hidden_states)  # (B, 256, 35, 35)
        hidden_states = self.Mixed_5c(hidden_states)  # (B, 288, 35, 35)
        hidden_states = self.Mixed_5d(hidden_states)
        hidden_states = self.Mixed_6a(hidden_states)  # (B, 768, 17, 17)
        hidden_states = self.Mixed_6b(hidden_states)
        hidden_states = self.Mixed_6c(hidden_states)
        hidden_states = self.Mixed_6d(hidden_states)
        # TensorFlow's `mixed_6/conv` is the first branch of its `mixed_6`, and TensorFlow has channels last.
        spatial_features = hidden_states[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        hidden_states = self.Mixed_6e(hidden_states)
        hidden_states = self.Mixed_7a(hidden_states)  # (B, 1280, 8, 8)
        hidden_states = self.Mixed_7b(hidden_states)  # (B, 2048, 8, 8)
        hidden_states = self.Mixed_7c(hidden_states)
        features = F.adaptive_avg_pool2d(hidden_states, 1).flatten(1)  # (B, 2048)
        return features, spatial_features, F.linear(features, self.fc.weight)


def _check_weights(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Raises unless `state` has finite weights of the names and shapes of `expected`."""
    missing = [name for name in expected if name not in state]
    unknown = [str(name)[:80] for name in state if name not in expected]
    if missing or unknown:
        raise ValueError(f"{len(missing)} weights are missing {missing[:3]}, {len(unknown)} are unknown {unknown[:3]}")
    for name, tensor in expected.items():
        found = state[name]
        if not isinstance(found, torch.Tensor) or found.layout != torch.strided or found.is_meta:
            raise ValueError(f"{name} is no tensor with values")
        if found.shape != tensor.shape:
            raise ValueError(f"{name} must have shape {tuple(tensor.shape)}, got {tuple(found.shape)}")
        if found.is_floating_point() != tensor.is_floating_point():
            raise ValueError(f"{name} must have the type {tensor.dtype}, got {found.dtype}")
        if not found.float().isfinite().all():
            raise ValueError(f"{name} has numbers that are not finite")


def _read_weights(file: Path, expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights in `file`, with the names, shapes and types of `expected`."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)  # noqa: TID251
    except Exception as error:  # a damaged or a hostile file can break its reader in any way
        raise ValueError(f"it cannot be read as weights ({type(error).__name__})") from error
    if not isinstance(state, dict):
        raise ValueError(f"it holds no weights by their names, but {type(state).__name__}")
    # Counters of training steps, which are not used and which some writers leave out.
    state = {name: torch.tensor(0) for name in expected if name.endswith(".num_batches_tracked")} | state
    _check_weights(state, expected)
    return {name: state[name].to(tensor.dtype).contiguous() for name, tensor in expected.items()}


def load_inception(path: Path | None = None, argument: str = "extractor") -> tuple[InceptionV3, str]:
    """
    Loads the network with weights from a file.

    Without `path` the file is the one that the environment variable `INCEPTION_WEIGHTS` names, or else the one in the
    cache of `torch.hub`. Then it must be the published one, by its SHA-256.

    Args:
        path (`Path`, *optional*): A file of any weights for this network.
        argument (`str`, defaults to `"extractor"`): Name of the option that asks for the network, for messages.

    Returns:
        `tuple[InceptionV3, str]`: The network in evaluation mode, and the SHA-256 of the file of its weights.

    Raises:
        `FileNotFoundError`: there is no such file.
        `ValueError`: the file is not the published one, or it does not hold the weights of this network.
    """
    cached = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_FILE
    file = Path(path or os.environ.get(WEIGHTS_VARIABLE) or cached).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"`{argument}` must find the weights of Inception, got no file {file}. Download {WEIGHTS_URL} "
            f"({WEIGHTS_SIZE}) as {cached}, or name the file in the environment variable {WEIGHTS_VARIABLE}."
        )
    sha256 = file_sha256(file)
    if path is None and not sha256.startswith(WEIGHTS_SHA256):
        raise ValueError(
            f"`{argument}` must find the published weights of Inception, whose SHA-256 begins with {WEIGHTS_SHA256}, "
            f"got {file} with {sha256}. Either it is damaged, or it has other weights, which only `inception:{file}` "
            "loads."
        )
    with torch.device("meta"):  # without drawing weights that are replaced
        model = InceptionV3()
    try:
        model.load_state_dict(_read_weights(file, model.state_dict()), assign=True)
    except ValueError as error:
        raise ValueError(
            f"`{argument}` must name a file of weights like {WEIGHTS_URL}, got {file}: {error}."
        ) from error
    return model.eval().requires_grad_(False), sha256
