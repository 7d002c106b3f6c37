"""`dod info`: everything that the package writes is recognised, and nothing else is."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers import noise_image, says, tiny_pipeline
from safetensors.torch import save_file

from diffusers_dod import DoDPipeline, desk_checkpoint
from diffusers_dod.checkpoint_manifest import write_manifest
from diffusers_dod.evaluation.info import count_parameters, describe, main
from diffusers_dod.files import METRICS_FILE, file_sha256
from diffusers_dod.image_settings import save_with_settings
from diffusers_dod.results import checkpoint_sha256


ROOT = Path(__file__).parents[2]


def test_a_pipeline(capsys):
    pipe = DoDPipeline.from_pretrained(desk_checkpoint())
    parameters = pipe.transformer.num_parameters()
    assert count_parameters(desk_checkpoint() / "transformer") == parameters
    main(["checkpoints/dod-desk", "--hash"])
    text = capsys.readouterr().out
    assert text.startswith("Pipeline of a training run\n")
    for line in (
        f"transformer DoDTransformer2DModel, {parameters:,} parameters",
        "classes 12: stripes, checks, dots,",
        "size 32 x 32 pixels, latents 4 x 8 x 8, patches of 2",
        "defaults 2 stages of 20 steps, guidance scale 3.0",
        "steps 40,000",
        f"sha256 {checkpoint_sha256(desk_checkpoint())}",
        "dod sample stripes --checkpoint checkpoints/dod-desk -o image.png",
    ):
        assert line in " ".join(text.split()), line


def test_trainings_and_their_checkpoints(tmp_path):
    with pytest.raises(ValueError, match=says("`path` must be something", "none of model_index.json")):
        describe(str(tmp_path))
    (tmp_path / METRICS_FILE).write_text('{"step": 100, "loss": 0.5}\n{"step": 200}\n')
    found = describe(str(tmp_path))
    assert found.kind == "Training run that has not finished"
    assert found.facts == {"steps": "200", "loss": "0.5000 at step 100", "checkpoints": None}
    assert found.commands == [f"dod plot {tmp_path} --output curves.png"]
    checkpoint = tmp_path / "checkpoint-200"
    DoDPipeline.from_pretrained(desk_checkpoint()).save_pretrained(checkpoint)
    write_manifest(checkpoint, 200)
    assert describe(str(tmp_path)).facts["checkpoints"] == "200"
    found = describe(str(checkpoint), with_hash=True)
    assert found.kind == "Training checkpoint"
    assert (found.facts["step"], found.facts["training state"], found.facts["damage"]) == ("200", "no", "none")
    (checkpoint / "transformer" / "config.json").write_text("{}")
    assert "config.json" in describe(str(checkpoint), with_hash=True).facts["damage"]
    weights = checkpoint / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="must be a safetensors file"):
        describe(str(checkpoint))


def test_adapters(tmp_path):
    weights = {"transformer.a.lora_A.weight": torch.zeros(2, 3), "latent_embedder.a.lora_A.weight": torch.zeros(4)}
    (tmp_path / METRICS_FILE).write_text('{"step": 200, "loss": 0.5}\n')
    checkpoint = tmp_path / "checkpoint-200"
    checkpoint.mkdir()
    for folder in (tmp_path, checkpoint):
        save_file(weights, folder / "pytorch_lora_weights.safetensors")
    write_manifest(checkpoint, 200)
    run, saved = describe(str(tmp_path)), describe(str(checkpoint), with_hash=True)
    assert run.kind == saved.kind == "LoRA adapters"
    assert run.facts["transformer"] == "6 parameters of adapters" and run.facts["steps"] == "200"
    assert (saved.facts["step"], saved.facts["damage"]) == ("200", "none")
    assert saved.commands[0].startswith(f"pipe.load_lora_weights('{checkpoint}')")


def test_samples_and_latents(tmp_path):
    settings = {"checkpoint_sha256": "0" * 64, "num_images": 4, "seed": 0, "height": None}
    (tmp_path / "chunks").mkdir()
    (tmp_path / "chunks" / "settings.json").write_text(json.dumps(settings))
    assert describe(str(tmp_path)).kind == "Samples that are not complete"
    (tmp_path / "manifest.json").write_text(json.dumps({"settings": settings, "sha256": "1" * 64, "versions": []}))
    found = describe(str(tmp_path))
    assert found.kind == "Samples" and found.facts["num_images"] == 4 and "height" not in found.facts
    assert found.commands == [f"dod evaluate {tmp_path} --reference path/to/images"]
    manifest = {"format": 1, "class_names": ["a", "b"], "num_samples": 9, "num_views": 2, "latent_shape": [4, 8, 8]}
    manifest |= {"bad_images": [], "latents_dtype": "float16", "shards": []}
    manifest["shards"] = [{"file": "shard-00000.safetensors", "num_samples": 9, "sha256": "2" * 64}]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    found = describe(str(tmp_path), with_hash=True)
    assert found.kind == "Latents" and found.facts["shape"] == "4 x 8 x 8 in float16"
    assert found.facts["damage"] == "shard-00000.safetensors"


def test_results_and_images(tmp_path):
    path = ROOT / "docs" / "results" / "desk_evaluation.json"
    found = describe(str(path), with_hash=True)
    metrics = json.loads(path.read_text())["metrics"]
    assert found.facts["fid"].startswith(f"{metrics['fid']['value']:.6g}") and set(metrics) <= set(found.facts)
    assert found.facts["file"] == f"SHA-256 {file_sha256(path)}" and found.commands == [
        f"dod reproduce {path} --trust_extractor"
    ]
    image = tmp_path / "image.png"
    checkpoint = {"path": "user/name", "sha256": "0" * 64}
    options = {"class_labels": ["marble"], "seed": 3}
    save_with_settings(noise_image(8, 8), image, "sample", options, checkpoint=checkpoint, device="cpu")
    found = describe(str(image))
    assert found.facts["seed"] == "3" and found.commands == [f"dod sample --like {image} -o again.png"]
    noise_image(8, 8).save(image)
    with pytest.raises(ValueError, match="without any"):
        describe(str(image))


@pytest.mark.parametrize(
    ("task", "options", "fragments"),
    [
        ("other", {}, ["drawn by `dod sample` or `dod demo`", "'other'"]),
        ("sample", {"class_labels": ["marble"], "image": "gone.jpg"}, ["an image that is still there", "gone.jpg"]),
        ("sample", {"class_labels": ["marble"], "count": 1_000_001}, ["`count`", "at most 1000000", "1000001"]),
        ("demo", {"mode": "variations"}, ["an image of a photo"]),
        ("demo", {"mode": "between", "photos": [0]}, ["an image of a photo"]),
        ("demo", {"num_images": 10_001}, ["`num_images`", "at most 10000", "10001"]),
    ],
)
def test_an_image_that_cannot_be_drawn_again_is_not_suggested(tmp_path, task, options, fragments):
    image, checkpoint = tmp_path / "image.png", {"path": "user/name", "sha256": "0" * 64}
    save_with_settings(noise_image(8, 8), image, task, options, checkpoint=checkpoint, device="cpu")
    found = describe(str(image))
    assert found.commands == [] and re.search(says(*fragments), found.facts["drawn again"])


def test_an_image_of_a_demo_of_a_folder_needs_its_checkpoint(tmp_path):
    image, part = tmp_path / "image.png", {"path": "own", "sha256": "0" * 64}
    checkpoint = part | {"lora_weights": part | {"path": "my adapters"}}
    save_with_settings(noise_image(8, 8), image, "demo", {"seed": 3}, checkpoint=checkpoint, device="cpu")
    others = "--checkpoint .../own --lora_weights '.../my adapters'"
    assert describe(str(image)).commands == [f"dod sample --like {image} {others} -o again.png"]


def test_what_is_nothing_of_the_package(tmp_path, capsys, monkeypatch):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="which is neither results nor a PNG file"):
        describe(str(tmp_path / "other.json"))
    with pytest.raises(OSError, match=says("`path` must be a folder", "'user/name', which is none here")):
        describe("user/name")
    monkeypatch.chdir(tmp_path)
    main(["training/accelerate/ddp.yaml", "--path"])
    assert capsys.readouterr().out == f"{ROOT / 'training' / 'accelerate' / 'ddp.yaml'}\n"
    with pytest.raises(ValueError, match=says("`path` must be a file or folder that is there", "none.yaml")):
        main(["training/accelerate/none.yaml", "--path"])
    tiny_pipeline().save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    with pytest.raises(ValueError, match=says("`path` must be a pipeline of this package", "DiTPipeline")):
        describe(str(tmp_path / "other"))
