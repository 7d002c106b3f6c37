"""The checkpoint that ships: small, loadable, and judged good by a classifier that knows nothing of it."""

import runpy
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffusers_dod import DoDPipeline
from diffusers_dod.autoencoders import encode_moments
from diffusers_dod.data.textures import TEXTURE_CLASSES


ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "checkpoints" / "dod-desk"
sys.path.insert(0, str(ROOT / "training" / "desk"))
import train_autoencoder  # noqa: E402
from texture_classifier import JudgeFeatures  # noqa: E402


@pytest.fixture(scope="module")
def pipeline() -> DoDPipeline:
    pipeline = DoDPipeline.from_pretrained(CHECKPOINT)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_size_and_format():
    files = [path for path in CHECKPOINT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20_000_000
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jsonl", ".md"}


def test_it_knows_its_classes_and_defaults(pipeline):
    assert list(pipeline.label2ids) == [pipeline.config.id2label[str(i)] for i in range(12)]
    assert tuple(pipeline.label2ids) == TEXTURE_CLASSES
    assert pipeline.config.default_num_stages == 2


def test_an_independent_classifier_recognises_both_stages(pipeline):
    judge = JudgeFeatures("texture-classifier")
    labels = torch.arange(12).repeat(3)
    stages = pipeline(
        labels,
        num_inference_steps=12,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        return_stages=True,
    ).stages
    with torch.no_grad():
        first, second = ((judge(images * 255).logits.argmax(dim=1) == labels).float().mean() for images in stages)
    assert second >= 0.7  # 1/12 by chance; 36 samples
    assert first >= 0.4  # without guidance, as in the paper


def test_the_demo_draws_its_image(tmp_path):
    main = runpy.run_path(str(ROOT / "examples" / "quickstart.py"))["main"]
    main(["--samples_per_class", "1", "--output", str(tmp_path / "demo.png")])
    with Image.open(tmp_path / "demo.png") as image:
        assert image.width > 700
        assert len(set(image.resize((64, 64)).getdata())) > 500  # not a blank page


@pytest.mark.parametrize(("name", "resolution", "channels"), [("textures", 32, 4), ("scenes", 64, 16)])
def test_autoencoders_of_procedural_images(name, resolution, channels):
    torch.manual_seed(0)
    vae = train_autoencoder.build_autoencoder(name, resolution)
    pixels = torch.rand(2, 3, resolution, resolution) * 2 - 1
    latents, penalty = train_autoencoder.encode(vae, pixels)
    assert latents.shape == (2, channels, 8, 8) and penalty.item() > 0
    assert vae.decode(latents).sample.shape == pixels.shape
    mean, std = encode_moments(pixels, vae)
    assert mean.shape == latents.shape and (std is None) == (name == "scenes")


def test_latents_of_scenes_are_drawn_to_mean_0_and_variance_1():
    """The config of their autoencoder has one scale for all channels."""
    vae = train_autoencoder.build_autoencoder("scenes", 64)
    latents = torch.randn(4, 16, 8, 8)
    latents = (latents - latents.mean((0, 2, 3), keepdim=True)) / latents.std((0, 2, 3), keepdim=True)
    penalties = []
    for values in (latents, 3 * latents, latents + 0.5):
        vae.encode = lambda _, values=values: Namespace(latent=values)
        penalties.append(train_autoencoder.encode(vae, None)[1].item())
    assert penalties == pytest.approx([0.0, 0.04, 0.0025], abs=1e-6)
