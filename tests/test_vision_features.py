"""Features of vision models: which tokens, from which pixels, and with the latents on disk."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers import fresh_accelerator, says, tiny_latent_embedder, tiny_transformer, tiny_vae
from PIL import Image
from safetensors.torch import load_file

from diffusers_dod.data.encoding import EncodingOptions, Share, encode_latents, finish_latents, latent_settings
from diffusers_dod.data.labelled_images import LabelledImages
from diffusers_dod.data.latents import LatentDataset, images_of
from diffusers_dod.data.textures import TEXTURE_CLASSES, TextureDataset
from diffusers_dod.image_reading import to_pixels
from diffusers_dod.losses import DoDJointModel, RepresentationProjector
from diffusers_dod.training import encode_latents as command
from diffusers_dod.vision_features import IMAGENET_MEAN, IMAGENET_STD, VisionFeatures


SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
VISION = {**SIZE, "image_size": 28, "patch_size": 7}
TEXT = {**SIZE, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
PREPROCESSOR = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.5]}


def make(kind: str, **overrides) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    vision = {**VISION, **overrides}
    if kind == "CLIP":
        config = transformers.CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=8)
    elif kind == "Siglip":
        config = transformers.SiglipConfig(text_config=TEXT, vision_config=vision)
    elif kind == "Dinov2WithRegisters":
        config = transformers.Dinov2WithRegistersConfig(**vision, num_register_tokens=3)
    else:
        config = getattr(transformers, f"{kind}Config")(**vision)
    return getattr(transformers, f"{kind}Model")(config).eval()


KINDS = ["ViT", "Dinov2", "Dinov2WithRegisters", "SiglipVision", "Siglip", "CLIPVision", "CLIP"]


def save(folder: Path, model: transformers.PreTrainedModel, **preprocessor) -> Path:
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR, **preprocessor}))
    return folder


def draw_images(count: int = 3, size: int = 28) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


# ---------------------------------------------------------------------------------------------------------------------
# The model


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_patches_of_the_last_hidden_state(tmp_path, kind):
    model = make(kind)
    vision = VisionFeatures(save(tmp_path, model))
    pixels = draw_images()
    found = vision(pixels)
    assert found.shape == (3, 4, 4, 32) and found.dtype == torch.float32 and not found.requires_grad
    assert (vision.grid, vision.feature_dim, vision.image_size) == ((4, 4), 32, 28)

    mean, std = (torch.tensor(PREPROCESSOR[name])[:, None, None] for name in ("image_mean", "image_std"))
    tower = getattr(model, "vision_model", model)
    with torch.no_grad():
        tokens = tower(pixel_values=((pixels + 1) / 2 - mean) / std).last_hidden_state
    extra = {"SiglipVision": 0, "Siglip": 0, "Dinov2WithRegisters": 4}.get(kind, 1)
    assert tokens.shape[1] == 16 + extra
    torch.testing.assert_close(found, tokens[:, extra:].reshape(3, 4, 4, 32), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_columns_are_those_of_the_image(tmp_path, kind):
    """The tokens of a model with small random weights are mostly those of their own patch."""
    vision = VisionFeatures(save(tmp_path, make(kind)))
    pixels = draw_images(1)
    changed = pixels.clone()
    changed[:, :, 7:14, 21:28] *= -1
    difference = (vision(pixels) - vision(changed)).norm(dim=-1)[0]
    assert divmod(int(difference.argmax()), 4) == (1, 3)


def test_the_model_is_frozen_and_its_features_can_be_trained_with(tmp_path):
    vision = VisionFeatures(save(tmp_path, make("Dinov2", hidden_dropout_prob=0.5)))
    assert not any(parameter.requires_grad for parameter in vision.model.parameters())
    pixels = draw_images().requires_grad_(True)
    features = vision(pixels)
    assert torch.equal(features, vision(pixels))  # no dropout
    weight = torch.ones(32, requires_grad=True)
    (features * weight).sum().backward()  # what is made in inference mode could not be saved for this
    assert weight.grad is not None and pixels.grad is None
    with pytest.raises(ValueError, match=says("`pixels` must have shape (batch, 3, height, width)", "(3, 28, 28)")):
        vision(pixels[0])


def test_half_precision(tmp_path):
    folder = save(tmp_path, make("Dinov2"))
    exact, rounded = VisionFeatures(folder), VisionFeatures(folder, dtype=torch.bfloat16)
    assert rounded.model.dtype == torch.bfloat16
    features = rounded(draw_images())
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, exact(draw_images()), rtol=0.1, atol=0.1)
    assert rounded.describe() != exact.describe()


# ---------------------------------------------------------------------------------------------------------------------
# What the model sees


def seen_by(vision: VisionFeatures, pixels: torch.Tensor) -> torch.Tensor:
    seen = []
    hook = vision.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    vision(pixels)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("size", [56, 41, 20])
def test_images_are_resized_as_by_pillow(tmp_path, size):
    """Up to the rounding of Pillow, in 8 bits."""
    image = Image.fromarray(np.random.default_rng(0).integers(80, 176, (size, size, 3), dtype=np.uint8))
    vision = VisionFeatures(save(tmp_path, make("ViT")))
    found = seen_by(vision, to_pixels(torch.from_numpy(np.array(image))[None]))
    resized = np.asarray(image.resize((28, 28), Image.Resampling.BICUBIC)) / 255
    expected = ((resized - PREPROCESSOR["image_mean"]) / PREPROCESSOR["image_std"]).transpose(2, 0, 1)[None]
    assert expected.shape == found.shape == (1, 3, 28, 28)
    assert np.abs(found.numpy() - expected).max() < 1.01 / 255 / 0.2
    assert expected.std() > 0.2


def test_nothing_is_brighter_than_white(tmp_path):
    """Nor darker than black, where bicubic interpolation overshoots at an edge."""
    vision = VisionFeatures(save(tmp_path, make("ViT"), image_mean=[0.0] * 3, image_std=[1.0] * 3))
    edge = torch.ones(1, 3, 41, 41)
    edge[:, :, :, :20] = -1
    seen = seen_by(vision, edge)
    assert (float(seen.min()), float(seen.max())) == (0, 1)


def test_images_of_the_models_own_size_are_not_resampled(tmp_path):
    pixels = draw_images()
    mean, std = (torch.tensor(PREPROCESSOR[name])[:, None, None] for name in ("image_mean", "image_std"))
    vision = VisionFeatures(save(tmp_path, make("ViT")))
    torch.testing.assert_close(seen_by(vision, pixels), ((pixels + 1) / 2 - mean) / std, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("preprocessor", "side"),
    [
        ({}, 28),  # that of the config
        ({"size": {"height": 21, "width": 21}}, 21),
        ({"size": 21}, 21),
        ({"size": {"shortest_edge": 40}, "crop_size": {"height": 35, "width": 35}, "do_center_crop": True}, 35),
        ({"size": {"shortest_edge": 40}, "crop_size": 35}, 35),
        ({"size": {"shortest_edge": 21}, "crop_size": 35, "do_center_crop": False}, 21),
        ({"size": {"height": 21, "width": 21}, "crop_size": None, "do_center_crop": None}, 21),
        ({"size": {"height": 30, "width": 30}}, 30),  # two pixels are left over
    ],
)
@pytest.mark.parametrize("kind", ["ViT", "Dinov2", "CLIP"])
def test_the_size_of_images_is_that_of_the_image_processor(tmp_path, kind, preprocessor, side):
    vision = VisionFeatures(save(tmp_path, make(kind), **preprocessor))
    assert vision.image_size == side and vision.grid == (side // 7, side // 7)
    assert seen_by(vision, draw_images()).shape == (3, 3, side, side)
    assert vision(draw_images(size=50)).shape == (3, side // 7, side // 7, 32)


def test_the_size_of_images_can_be_chosen(tmp_path):
    folder = save(tmp_path, make("ViT"), size={"height": 21, "width": 21})
    assert VisionFeatures(folder, image_size=56)(draw_images()).shape == (3, 8, 8, 32)
    assert VisionFeatures(folder).describe() != VisionFeatures(folder, image_size=56).describe()
    for wrong, error in ((6, ValueError), (28.0, TypeError)):
        with pytest.raises(error, match=says("`image_size` must be", f"got {wrong}")):
            VisionFeatures(folder, image_size=wrong)


@pytest.mark.parametrize("preprocessor", [None, {}, {"image_mean": [0.5] * 3}])
def test_a_model_without_statistics_gets_those_of_imagenet(tmp_path, preprocessor, caplog):
    make("ViT").save_pretrained(tmp_path)
    if preprocessor is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    vision = VisionFeatures(tmp_path)
    assert f"{tmp_path} does not say how images are normalised" in caplog.text
    grey = seen_by(vision, torch.zeros(1, 3, 28, 28))[0, :, 0, 0]
    expected = (0.5 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    np.testing.assert_allclose(grey, expected, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def test_models_without_tokens_of_patches_are_refused(tmp_path):
    bert = transformers.BertModel(transformers.BertConfig(**SIZE, vocab_size=50))
    resnet = transformers.ResNetModel(transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]))
    swin = transformers.SwinModel(
        transformers.SwinConfig(
            image_size=28, patch_size=7, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=2
        )
    )
    audio = transformers.ASTModel(transformers.ASTConfig(**SIZE, patch_size=16, max_length=64))
    for model in (bert, resnet, audio):
        folder = save(tmp_path / type(model).__name__, model)
        with pytest.raises(ValueError, match=says("`path` must hold a vision", repr(str(folder)), "Model`")):
            VisionFeatures(folder)
    for model, shape in ((swin, "(1, 4, 16)"), (make("ViTMAE"), "(1, 5, 32)")):
        with pytest.raises(ValueError, match=says("16 patches", f"last hidden state of shape {shape}", "Model`")):
            VisionFeatures(save(tmp_path / type(model).__name__, model))


def test_a_folder_without_a_model_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match=says("`path` must hold a model of `transformers`", f"got {str(path)!r}")):
            VisionFeatures(path)


def test_a_model_without_some_of_its_weights_is_refused(tmp_path):
    model = make("ViT")
    weights = {name: tensor for name, tensor in model.state_dict().items() if "layernorm.weight" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=says("`path` must hold all weights", "without ['layernorm.weight']")):
        VisionFeatures(tmp_path)


def test_the_pooler_does_not_count(tmp_path):
    """A classifier is saved without it, and it starts as something else every time."""
    model = make("ViT")
    classifier = transformers.ViTForImageClassification(model.config)
    classifier.vit.load_state_dict({k: v for k, v in model.state_dict().items() if "pooler" not in k})
    first = VisionFeatures(save(tmp_path / "classifier", classifier)).describe()
    torch.manual_seed(3)
    assert VisionFeatures(tmp_path / "classifier").describe() == first
    assert VisionFeatures(save(tmp_path / "model", model)).describe() == first
    with torch.no_grad():
        model.layernorm.bias[0] += 0.125
    assert VisionFeatures(save(tmp_path / "other", model)).describe() != first


# ---------------------------------------------------------------------------------------------------------------------
# Features beside the latents


class Spoilt(TextureDataset):
    """Textures of which some cannot be read."""

    bad: tuple[int, ...] = ()

    def __getitem__(self, index: int) -> dict:
        if index in self.bad:
            raise OSError(f"number {index} is bad")
        return super().__getitem__(index)


def textures(count: int = 11, bad: tuple[int, ...] = ()) -> LabelledImages:
    dataset = Spoilt(count, size=16)
    dataset.bad = bad
    return LabelledImages(dataset, TEXTURE_CLASSES, f"textures-{count}", 16)


def write(
    folder: Path, images: LabelledImages, vision=None, random_flip=False, vae=None, processes=(0,)
) -> LatentDataset:
    options = EncodingOptions(random_flip=random_flip, encoding_batch_size=3, shard_size=4, on_bad_image="skip")
    for process in processes:
        encode_latents(images, vae, folder, options, share=Share(process, len(processes)), vision=vision)
    finish_latents(folder, latent_settings(images, vae, options, vision), on_bad_image="skip")
    return LatentDataset(folder)


@pytest.fixture
def vision(tmp_path) -> VisionFeatures:
    return VisionFeatures(save(tmp_path / "vision", make("Dinov2")))


@pytest.mark.parametrize("processes", [(0,), (1, 0)])
def test_features_are_stored_with_the_latents(tmp_path, vision, processes):
    images, vae = textures(bad=(1, 6)), tiny_vae()
    latents = write(tmp_path / "latents", images, vision, random_flip=True, vae=vae, processes=processes)
    assert latents.manifest["vision_model"] == vision.describe()
    assert latents.manifest["vision_model"]["model_type"] == "dinov2"
    assert load_file(latents.folder / "shard-00000.safetensors")["features"].dtype == torch.float16
    indices = images_of(latents, images)
    assert indices.tolist() == [0, 2, 3, 4, 5, 7, 8, 9, 10]
    for ours, index in enumerate(indices):
        pixels = to_pixels(torch.from_numpy(images.dataset[int(index)]["image"])[None])
        for view, image in enumerate((pixels, pixels.flip(-1))):
            found = latents.read_features(ours, view)
            assert found.shape == (4, 4, 32) and found.dtype == torch.float32
            torch.testing.assert_close(found, vision(image)[0], rtol=2e-3, atol=2e-3)
        assert (latents.read_features(ours, 0) - latents.read_features(ours, 1)).abs().max() > 0.1

    # Nothing else is different from latents alone.
    plain = write(tmp_path / "plain", images, random_flip=True, vae=vae)
    assert plain.read_features(0) is None and "vision_model" not in plain.manifest
    for shard in range(3):
        name = f"shard-0000{shard}.safetensors"
        ours, theirs = load_file(latents.folder / name), load_file(plain.folder / name)
        assert ours.keys() - theirs.keys() == {"features"}
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    extra = {"vision_model", "shards"}
    assert {k: v for k, v in latents.manifest.items() if k not in extra} == {
        k: v for k, v in plain.manifest.items() if k not in extra
    }


def test_features_of_another_model_are_refused(tmp_path, vision):
    images = textures()
    write(tmp_path / "latents", images, vision)
    write(tmp_path / "plain", images)
    other = VisionFeatures(save(tmp_path / "other", make("ViT")))
    with pytest.raises(ValueError, match=says(str(tmp_path / "latents"), "`vision_model`", "'vit'", "'dinov2'")):
        encode_latents(images, None, tmp_path / "latents", EncodingOptions(shard_size=4), vision=other)
    with pytest.raises(ValueError, match=says(str(tmp_path / "plain"), "`vision_model`", "got None")):
        encode_latents(images, None, tmp_path / "plain", EncodingOptions(shard_size=4), vision=vision)


def test_features_that_float16_cannot_hold_are_refused(tmp_path, vision):
    with torch.no_grad():
        vision.model.layernorm.bias.fill_(1e5)
    with pytest.raises(ValueError, match=says("`vision`", "float16")):
        encode_latents(textures(), None, tmp_path / "latents", vision=vision)


def test_images_of_latents(tmp_path):
    latents = write(tmp_path / "latents", textures(bad=(0, 4, 5, 6, 7)))
    indices = images_of(latents, textures())
    assert indices.tolist() == latents.labels.tolist() == [1, 2, 3, 8, 9, 10]
    with pytest.raises(ValueError, match=says("`images` = 'textures-12'", "got 'textures-11'")):
        images_of(latents, textures(12))
    with pytest.raises(ValueError, match=says("`resolution` = 8", "got 16")):
        images_of(latents, LabelledImages(TextureDataset(11, size=8), TEXTURE_CLASSES, "textures-11", 8))


def test_the_command_stores_features(tmp_path, vision):
    def encode(*arguments) -> LatentDataset:
        options = "--dataset_name textures --num_train_samples 5 --resolution 8 --latents_dir".split()
        with fresh_accelerator():
            command.main([*options, *map(str, arguments)])
        return LatentDataset(arguments[0])

    latents = encode(tmp_path / "latents", "--repa_model_name_or_path", tmp_path / "vision")
    assert latents.manifest["vision_model"] == vision.describe()
    pixels = latents.read(3)[0]
    torch.testing.assert_close(latents.read_features(3), vision(pixels[None])[0], rtol=2e-3, atol=2e-3)
    assert encode(tmp_path / "plain").read_features(3) is None
    with pytest.raises(ValueError, match=says("`vision_model`", "got None")):
        encode(tmp_path / "plain", "--repa_model_name_or_path", tmp_path / "vision")


# ---------------------------------------------------------------------------------------------------------------------
# Training


def test_a_model_learns_to_tell_images_as_the_vision_model_does(tmp_path, vision):
    """Tokens become similar to the features of their own image, not only to those of all images."""
    latents = write(tmp_path / "latents", textures(8), vision, vae=tiny_vae())
    batch = torch.stack([latents.read(index)[0] for index in range(8)])
    features = torch.stack([latents.read_features(index) for index in range(8)])
    projectors = [RepresentationProjector(32, 32, hidden_dim=64) for _ in range(2)]
    model = DoDJointModel(tiny_transformer(), tiny_latent_embedder(), *projectors, alignment_layer=1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    noise = torch.randn(batch.shape, generator=torch.Generator().manual_seed(0))
    arguments = (batch, noise, torch.full((8,), 0.2), torch.arange(8), 4)
    for _ in range(80):
        loss, alignment, prior_alignment = model(*arguments, features=features)
        (loss.mean() + alignment.mean() + prior_alignment.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        own = model(*arguments, features=features)
        others = model(*arguments, features=features.roll(1, dims=0))
    for ours, theirs in zip(own[1:], others[1:], strict=True):
        assert ours.mean() < theirs.mean() - 0.1 and ours.mean() < -0.5
