"""Tiny components with random weights, and the form of error messages, for the tests."""

import inspect
import io
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import AutoencoderKL
from PIL import Image

from diffusers_dod import (
    DoDFlowMatchScheduler,
    DoDPipeline,
    DoDTransformer2DModel,
    LatentEmbeddingModule,
    TokenPrior,
)
from diffusers_dod.metrics.inception import InceptionV3
from diffusers_dod.presets import PRESETS


# Id 0 has two names, and one name ("crane") belongs to two ids, as in ImageNet.
ID2LABEL = {
    0: "tench, Tinca tinca",
    1: "goldfish",
    2: "crane",
    3: "ostrich",
    4: "brambling",
    5: "crane",
    6: "house finch",
    7: "junco",
    8: "indigo bunting",
    9: "robin",
}


# Evaluations per interval.
ODE_SOLVERS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}
SDE_SOLVERS = {"euler_maruyama": 1, "stochastic_heun": 2}
FIXED_STEP_SOLVERS = ODE_SOLVERS | SDE_SOLVERS


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal numbers, the same for the same arguments."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def noise(seed: int, batch_size: int = 2, channels: int = 4, height: int = 8, width: int = 8) -> torch.Tensor:
    """Noise of the shape of the tiny models' latents."""
    return normal(batch_size, channels, height, width, seed=seed)


def noise_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """An image of noise, the same for the same arguments."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """
    Overwrites every parameter with random numbers that keep the activations near unit size.

    A fresh DoD model outputs exact zeros (its AdaLN starts at zero), so that nothing about its conditioning, guidance
    or integration would show in a test.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                noise = noise / parameter[0].numel() ** 0.5
            elif name.endswith("weight"):  # a norm's
                noise = 1 + 0.1 * noise
            else:
                noise = 0.1 * noise
            parameter.copy_(noise)
    return module.eval()


def write_images(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    """Two classes of noise, with an image of each size (height, width) in `folder/<class>`."""
    rng = np.random.default_rng(0)
    for name in ("newt", "ant"):
        (folder / name).mkdir()
        for i, size in enumerate(sizes):
            Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


def tiny_transformer(seed: int = 0, **overrides) -> DoDTransformer2DModel:
    config = dict(
        sample_size=8,
        in_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        num_classes=10,
        prior_embed_dim=32,
    )
    return randomize(DoDTransformer2DModel(**{**config, **overrides}), seed)


def tiny_latent_embedder(seed: int = 1, **overrides) -> LatentEmbeddingModule:
    config = dict(
        sample_size=8,
        in_channels=4,
        num_latent_tokens=4,
        latent_token_dim=8,
        num_encoder_layers=1,
        num_decoder_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
    )
    return randomize(LatentEmbeddingModule(**{**config, **overrides}), seed)


def tiny_token_prior(seed: int = 3, **overrides) -> TokenPrior:
    """A token prior that fits the other tiny models, whose tokens have a mean and a deviation of their own."""
    config = dict(num_latent_tokens=4, latent_token_dim=8, num_classes=10, hidden_dim=16, num_layers=2)
    prior = randomize(TokenPrior(**{**config, **overrides}), seed)
    labels = torch.arange(200) % prior.config.num_classes
    tokens = normal(200, *prior.token_shape, seed=seed) * 2 + 1
    prior.set_statistics(tokens + labels[:, None, None] / 10, labels)
    return prior


def tiny_vae(seed: int = 2, **overrides) -> AutoencoderKL:
    """An autoencoder with factor 2 whose latents have a mean and a standard deviation of their own per channel."""
    config = dict(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        latents_mean=[0.5, -0.25, 0.0, 0.125],
        latents_std=[1.0, 2.0, 0.5, 1.5],
    )
    return randomize(AutoencoderKL(**{**config, **overrides}), seed)


def tiny_pipeline(in_channels: int = 4, **overrides) -> DoDPipeline:
    """
    A two-stage pipeline for 16 x 16 images in 10 classes.

    Args:
        in_channels: Channels of transformer and latent embedder; 3 together with `vae=None` is a pixel-space model.
        overrides: Arguments of `DoDPipeline`. `latent_embedder=None` makes the transformer a plain FiTv2.
    """
    if "latent_embedder" in overrides and overrides["latent_embedder"] is None:
        transformer = tiny_transformer(in_channels=in_channels, prior_embed_dim=None)
    else:
        transformer = tiny_transformer(in_channels=in_channels)
    components = dict(transformer=transformer, scheduler=DoDFlowMatchScheduler(), id2label=ID2LABEL)
    if "latent_embedder" not in overrides:
        components["latent_embedder"] = tiny_latent_embedder(in_channels=in_channels)
    if "vae" not in overrides:
        components["vae"] = tiny_vae()
    defaults = dict(default_guidance_scale=2.0, default_num_inference_steps=2)
    pipe = DoDPipeline(**{**components, **defaults, **overrides})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_trainer(options: Sequence[str], output_dir: Path, *arguments: object) -> Path:
    """Runs the trainer with `options` and then `arguments`, and returns the folder of the run."""
    from diffusers_dod.training.train import main  # most tests need no trainer

    with fresh_accelerator():
        main([*options, "--output_dir", str(output_dir), *map(str, arguments)])
    return output_dir


def contents(folder: Path) -> dict[str, bytes]:
    """The content of each file in a folder, by its relative name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def record_calls(module: torch.nn.Module) -> list[SimpleNamespace]:
    """The arguments of every later forward pass of `module`, by name."""
    calls = []
    signature = inspect.signature(module.forward)

    def record(module, args, kwargs):
        calls.append(SimpleNamespace(**{"prior_embeds": None, **signature.bind(*args, **kwargs).arguments}))

    module.register_forward_pre_hook(record, with_kwargs=True)
    return calls


def assert_near(actual: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def quicken_training(patch: pytest.MonkeyPatch) -> None:
    """
    Shortens what takes most of the time of a short run.

    Models of desk size have few blocks, the card has an empty plot, and samples have one step.
    """
    from diffusers_dod.training import model_card, train

    blocks = {"num_layers": 2, "num_encoder_layers": 1, "num_decoder_layers": 1}
    patch.setitem(PRESETS, "DoD-Desk", PRESETS["DoD-Desk"].override(**blocks))
    patch.setitem(PRESETS, "FiTv2-Desk", PRESETS["FiTv2-Desk"].override(num_layers=2))

    patch.setattr(model_card, "plot_metrics", lambda runs, path, **kwargs: Image.new("RGB", (1, 1)).save(path))
    patch.setattr(train, "stage_grid", partial(train.stage_grid, num_inference_steps=1))


@contextmanager
def fresh_accelerator():
    """The state of accelerate outlives a run; each run of these tests is the first one of its process, and quick."""
    with pytest.MonkeyPatch.context() as patch:
        quicken_training(patch)
        patch.setenv("ACCELERATE_USE_CPU", "true")
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        yield
        AcceleratorState._reset_state(True)
        GradientState._reset_state()


def says(*fragments: str) -> str:
    """A pattern for `pytest.raises(match=...)`: the message holds every fragment, in any order."""
    return "(?s)" + "".join(f"(?=.*{re.escape(fragment)})" for fragment in fragments)


def assert_none(violations: Iterable[str], num_shown: int = 20) -> None:
    """Fails if there are any, with the first ones, one a line, and their number."""
    violations = list(violations)
    if violations:
        shown = [violation[:300] for violation in violations[:num_shown]]
        more = [f"... and {len(violations) - num_shown} more"] if len(violations) > num_shown else []
        pytest.fail("\n".join([f"{len(violations)} must be none:", *shown, *more]), pytrace=False)


def check_all(check: Callable, cases: Iterable[tuple]) -> None:
    """Calls `check(*case)` for every case, and fails with all that fail."""
    failures = []
    for case in cases:
        try:
            with redirect_stderr(io.StringIO()) as messages:  # of a parser that exits
                check(*case)
        except (Exception, SystemExit) as error:
            failures.append(f"{case}: {type(error).__name__}: {error} {messages.getvalue()}")
    assert_none(failures)


def table(rows: Iterable[tuple]) -> pytest.MarkDecorator:
    """Rows (argument, kwargs, exception, *fragments) as parameters named after the argument."""
    return pytest.mark.parametrize(
        ("argument", "kwargs", "exception", "fragments"),
        [
            pytest.param(argument, kwargs, exception, fragments, id=f"{argument}-{number}")
            for number, (argument, kwargs, exception, *fragments) in enumerate(rows)
        ],
    )


def constant_inception_weights() -> dict[str, torch.Tensor]:
    """Weights of Inception whose file is small: one number for each tensor, another one for each."""
    with torch.device("meta"):
        state = InceptionV3().state_dict()
    for i, (name, tensor) in enumerate(state.items()):
        number = (1 + i / 1000) / (tensor[0].numel() if tensor.ndim > 1 else 1)
        state[name] = torch.tensor(number, dtype=tensor.dtype).expand(tensor.shape)
    return state
