# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Vision transformers as extractors, against Pillow and the models' own definition."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import randomize, says
from PIL import Image

from diffusers_dod.evaluation import evaluate
from diffusers_dod.metrics.extractors import extract, extractor_file, extractor_sha256, load_extractor
from diffusers_dod.results import read_results


TINY = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, mlp_ratio=2)
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def save(folder: Path, kind: str = "Dinov2", preprocessor: dict = IMAGENET, **config) -> Path:
    """A tiny model with random weights, and positions that matter."""
    config = {**TINY, "image_size": 70, "patch_size": 14, **config}
    model = randomize(getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**config)))
    for name, parameter in model.named_parameters():
        if "position_embedding" in name or "cls_token" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def draw(number: int = 3, height: int = 40, width: int = 50, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, size=(number, 5, 5, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(image).resize((width, height))) for image in coarse])


def to_images(arrays: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(arrays).permute(0, 3, 1, 2)


def by_definition(folder: Path, arrays: np.ndarray) -> torch.Tensor:
    """
    DINOv2's class token after the last norm, of images that Pillow resizes to 224 x 224.

    Positions are interpolated by the scale (16 + 0.1) / 5 on each axis, as in the code of DINOv2.
    """
    model = transformers.Dinov2Model.from_pretrained(folder).eval()
    small = model.embeddings.position_embeddings.detach()[0, 1:].reshape(5, 5, -1)
    patches = F.interpolate(small.permute(2, 0, 1)[None], scale_factor=(16.1 / 5, 16.1 / 5), mode="bicubic")
    assert patches.shape[2:] == (16, 16)
    rows = []
    for array in arrays:
        resized = np.asarray(Image.fromarray(array).resize((224, 224), Image.Resampling.BICUBIC)) / 255.0
        pixels = torch.tensor((resized - IMAGENET["image_mean"]) / IMAGENET["image_std"], dtype=torch.float32)
        tokens = model.embeddings.patch_embeddings(pixels.permute(2, 0, 1)[None])[0]
        tokens = tokens + patches[0].flatten(1).T
        first = model.embeddings.cls_token[0] + model.embeddings.position_embeddings[0, :1]
        hidden = torch.cat([first, tokens])[None]
        for layer in model.encoder.layer:
            output = layer(hidden)
            hidden = output[0] if isinstance(output, tuple) else output
        rows.append(model.layernorm(hidden)[0, 0].detach())
    return torch.stack(rows)


@pytest.mark.parametrize("size", [(40, 50), (300, 260)])
def test_dinov2_is_the_class_token_of_what_pillow_resizes(tmp_path, size):
    folder, images = save(tmp_path), np.random.default_rng(0).integers(0, 256, size=(2, *size, 3), dtype=np.uint8)
    extractor = load_extractor(f"dinov2:{folder}")
    found = extract(extractor, to_images(images)).features
    # The rest is Pillow's fixed point, and differs with versions; without the offset of positions it is 1e-3.
    torch.testing.assert_close(found, by_definition(folder, images), rtol=0, atol=8e-4)
    other = extract(load_extractor(f"transformers:{folder}"), to_images(images)).features
    assert (other - found).abs().max() > 1e-3  # 70 x 70 pixels, as the config says
    assert not any(parameter.requires_grad for parameter in extractor.parameters())


def test_other_models_have_their_own_size_and_normalization(tmp_path):
    preprocessor = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"height": 70, "width": 70}}
    images = to_images(draw(2, 70, 70))
    pixels = (images / 255 - 0.5) / 0.25
    for kind, pool in {"ViT": lambda tokens: tokens[:, 0], "SiglipVision": lambda tokens: tokens.mean(dim=1)}.items():
        folder = tmp_path / kind
        folder.mkdir()
        save(folder, kind, preprocessor)
        found = extract(load_extractor(f"transformers:{folder}"), images).features
        model = transformers.AutoModel.from_pretrained(folder)
        with torch.no_grad():
            expected = pool(getattr(model, "vision_model", model)(pixel_values=pixels).last_hidden_state)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_hash_is_that_of_weights_and_of_the_preparation(tmp_path):
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
        save(folder)
    save(folders[1], preprocessor={**IMAGENET, "size": {"height": 56, "width": 56}})
    model = transformers.AutoModel.from_pretrained(folders[2])
    model.embeddings.cls_token.data += 1e-3
    model.save_pretrained(folders[2])
    names = [f"transformers:{folder}" for folder in folders] + [f"dinov2:{folders[0]}"]
    hashes = [extractor_sha256(name, load_extractor(name)) for name in names]
    assert len(set(hashes)) == 4
    assert hashes[0] == extractor_sha256(names[0], load_extractor(names[0])) and extractor_file(names[0]) is None


def test_what_is_no_vision_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=says("`extractor`", "transformers:", "`path`")):
        load_extractor(f"transformers:{tmp_path}", argument="extractor")
    save(tmp_path, preprocessor={**IMAGENET, "image_std": [0.5] * 3})
    with pytest.raises(ValueError, match=says("`fid_extractor`", "DINOv2", "[0.229, 0.224, 0.225]", "0.5")):
        load_extractor(f"dinov2:{tmp_path}")
    save(tmp_path, "ViT")
    with pytest.raises(ValueError, match=says("`fid_extractor`", "DINOv2", "'vit'")):
        load_extractor(f"dinov2:{tmp_path}")


@pytest.mark.filterwarnings("ignore:FID of", "ignore:The covariance")
def test_the_distance_on_dinov2_has_its_name(tmp_path, capsys):
    folder = save(tmp_path)
    for name, seed in (("samples", 1), ("reference", 2)):
        np.savez(tmp_path / f"{name}.npz", arr_0=draw(12, 8, 8, seed))
    for kind, name in (("dinov2", "fd-dinov2"), ("transformers", "fid")):
        argv = [str(tmp_path / "samples.npz"), "--reference", str(tmp_path / "reference.npz"), "--num_groups", "3"]
        argv += ["--extractor", f"{kind}:{folder}", "--device", "cpu", "--output_file", str(tmp_path / "results.json")]
        evaluate.main(argv)
        assert list(read_results(tmp_path / "results.json")["metrics"]) == [name, f"{name}_corrected"]
        assert f"| {name} |" in capsys.readouterr().out
