"""LoRA adapters of commands: loaded as in Python, with their classes, and part of what images are known by."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ID2LABEL, fresh_accelerator, says, tiny_pipeline, tiny_token_prior
from PIL import Image
from safetensors.torch import save_file

from diffusers_dod import DoDPipeline
from diffusers_dod.demo.settings import DemoOptions, open_pipeline
from diffusers_dod.evaluation import draw, sample
from diffusers_dod.evaluation.info import describe
from diffusers_dod.evaluation.options import load_pipeline
from diffusers_dod.files import file_sha256
from diffusers_dod.results import check_same_checkpoint, identify_checkpoint


peft = pytest.importorskip("peft")
FILE = "pytorch_lora_weights.safetensors"
NAMES = {0: "newt", 1: "ant", 2: "crane"}


PARTS = ("transformer", "latent_embedder")


def save_adapters(
    folder: Path, seed: int, targets=("to_q", "ff.net.2"), num_classes: int = 10, parts=PARTS, **names
) -> Path:
    """Adapters of the tiny pipeline with random weights, in a folder as a training leaves it."""
    pipe = tiny_pipeline()
    if num_classes != 10:
        pipe.transformer.resize_class_embed(num_classes)
    weights, metadata = {}, {}
    for part in parts:
        model = getattr(pipe, part)
        own = [target for target in targets if part == "transformer" or target != "class_embed"]
        model.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, target_modules=own))
        found = peft.get_peft_model_state_dict(model, adapter_name="default")
        generator = torch.Generator().manual_seed(seed)
        weights[f"{part}_lora_layers"] = {
            name: 0.3 * torch.randn(weight.shape, generator=generator) for name, weight in found.items()
        }
        config = model.peft_config["default"].to_dict()
        metadata[f"{part}_lora_adapter_metadata"] = config | {"target_modules": own}
    DoDPipeline.save_lora_weights(folder, **weights, **metadata, **names)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny_pipeline(token_prior=tiny_token_prior()).save_pretrained(folder / "pipeline")
    for seed, name in enumerate(("one", "two")):
        save_adapters(folder / name, seed)
    save_adapters(folder / "classes", 2, ("to_q", "class_embed"), num_classes=3, id2label=NAMES)
    return folder


def draw_pixels(pipe: DoDPipeline, label: str) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return np.asarray(pipe(label, num_inference_steps=1, seed=0).images[0])


def call(*arguments: object) -> None:
    draw.main([*map(str, arguments), "--device", "cpu", "--steps", "1"])


@pytest.mark.parametrize("place", ["one", f"one/{FILE}"])
def test_adapters_are_loaded_as_in_python(world, place):
    expected = DoDPipeline.from_pretrained(world / "pipeline")
    plain = draw_pixels(expected, "goldfish")
    expected.load_lora_weights(world / "one")
    pipe = load_pipeline(str(world / "pipeline"), str(world / place))
    found = draw_pixels(pipe, "goldfish")
    assert np.array_equal(found, draw_pixels(expected, "goldfish")) and not np.array_equal(found, plain)
    assert pipe.id2label == expected.id2label
    in_bf16 = load_pipeline(str(world / "pipeline"), str(world / place), "bfloat16")
    weights = in_bf16.transformer.named_parameters()
    assert {weight.dtype for name, weight in weights if ".lora_" in name} == {torch.bfloat16}


def test_adapters_bring_their_classes(world):
    pipe = load_pipeline(str(world / "pipeline"), str(world / "classes"))
    assert pipe.id2label == NAMES and pipe.transformer.config.num_classes == 3 and pipe.token_prior is None
    images = [draw_pixels(pipe, name) for name in NAMES.values()]
    assert not np.array_equal(images[0], images[1]) and not np.array_equal(images[1], images[2])
    assert describe(str(world / "classes")).facts["classes"] == "3: newt, ant, crane"


def test_a_token_prior_of_other_classes_than_the_adapters_is_the_reason(world, tmp_path):
    arguments = ["--use_token_prior", "--lora_weights", world / "classes", "-o", tmp_path / "image.png"]
    with pytest.raises(ValueError, match=says("`use_token_prior`", "adapters of other classes", "classes")):
        call("newt", "--checkpoint", world / "pipeline", *arguments)
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    with pytest.raises(ValueError, match=says("`use_token_prior`", "without a `token_prior`")):
        call("newt", "--checkpoint", tmp_path / "pipeline", *arguments)


@pytest.mark.parametrize(
    ("parts", "names", "reason"),
    [
        (PARTS[:1], None, None),
        (PARTS[:1], ID2LABEL, None),
        (PARTS[:1], {key: f"class {key}" for key in range(10)}, "adapters of other classes"),
        (PARTS[:1], {key: ID2LABEL[9 - key] for key in range(10)}, "adapters of other classes"),
        (PARTS[1:], ID2LABEL, "adapters that change the latent embedder"),
    ],
)
def test_a_token_prior_stays_with_its_classes_and_latent_embedder(world, tmp_path, parts, names, reason):
    arguments = (str(world / "pipeline"), str(save_adapters(tmp_path, 0, parts=parts, id2label=names)))
    assert (load_pipeline(*arguments).token_prior is None) == (reason is not None)
    if reason is None:
        assert load_pipeline(*arguments, use_token_prior=True).token_prior is not None
    else:
        with pytest.raises(ValueError, match=says("`use_token_prior` must be False with", reason)):
            load_pipeline(*arguments, use_token_prior=True)


@pytest.mark.parametrize(
    ("names", "expected"), [({}, {}), ({"id2label": {key: f"class {key}" for key in range(10)}}, "class 1")]
)
def test_names_of_as_many_classes(world, tmp_path, names, expected):
    """The adapters' own names count; without any, those of the pipeline stay."""
    pipe = load_pipeline(str(world / "pipeline"), str(save_adapters(tmp_path, 0, **names)))
    assert pipe.id2label[1] == (expected or "goldfish")


def test_what_are_no_adapters_of_the_pipeline_is_refused(world, tmp_path):
    def refuse(error: type, place: Path, *fragments: str) -> None:
        with pytest.raises(error, match=says("`lora_weights`", *fragments)):
            load_pipeline(str(world / "pipeline"), str(place))

    refuse(ValueError, world / "pipeline", FILE, "without any")
    refuse(OSError, tmp_path / "none", "which is none here")
    (tmp_path / "text.safetensors").write_text("none")
    refuse(ValueError, tmp_path / "text.safetensors", "safetensors file")
    save_file({"transformer.blocks.0.attn.to_q.weight": torch.ones(2)}, tmp_path / "weights.safetensors")
    refuse(ValueError, tmp_path / "weights.safetensors", "'lora' in their names")
    key = "transformer.transformer_blocks.0.attn.to_q.lora_{}.weight"
    save_file({key.format("A"): torch.ones(2, 7), key.format("B"): torch.ones(32, 2)}, tmp_path / "shape.safetensors")
    refuse(ValueError, tmp_path / "shape.safetensors", "adapters of", "size mismatch")


def test_samples_of_other_adapters_are_refused(world, tmp_path):
    def run(*options: object) -> dict:
        argv = ["--pretrained_model_name_or_path", world / "pipeline", "--output_dir", tmp_path / "samples"]
        with fresh_accelerator():
            sample.main([*map(str, [*argv, "--num_images", 2, "--num_inference_steps", 1, *options])])
        return json.loads((tmp_path / "samples/manifest.json").read_text())

    manifest = run("--lora_weights", world / "one")
    assert manifest["settings"]["lora_weights_sha256"] == file_sha256(world / "one" / FILE)
    assert manifest["checkpoint"] == identify_checkpoint(world / "pipeline", world / "one")
    assert run("--lora_weights", world / "one") == manifest
    for options in ([], ["--lora_weights", world / "two"]):
        with pytest.raises(ValueError, match=says("`output_dir`", "`lora_weights_sha256`")):
            run(*options)


def test_an_image_is_drawn_again_with_its_adapters(world, tmp_path, capsys):
    output, again = tmp_path / "image.png", ["-o", tmp_path / "again.png", "--device", "cpu"]
    call("goldfish", "--checkpoint", world / "pipeline", "--lora_weights", world / "one", "-o", output)
    argv = [*map(str, ["--like", output, *again])]
    draw.main(argv)
    assert "bit for bit" in capsys.readouterr().out
    assert str(world / "one") in describe(str(output)).facts["lora_weights"]
    with Image.open(output) as image, Image.open(tmp_path / "again.png") as other:
        assert image.text == other.text
    with pytest.raises(ValueError, match=says("`lora_weights`", file_sha256(world / "one" / FILE), "two")):
        draw.main([*argv, "--lora_weights", str(world / "two")])


def test_an_image_of_the_demo_is_drawn_again_with_its_adapters(world, tmp_path, capsys):
    from diffusers_dod.evaluation import gallery

    options = {"checkpoint": str(world / "pipeline"), "lora_weights": str(world / "one"), "device": "cpu"}
    pipe, identity = open_pipeline(DemoOptions(**options))
    assert (identity["path"], identity["lora_weights"]["path"]) == ("pipeline", "one")
    sampler = gallery.Sampler(pipe, gallery.Limits(), identity)
    settings = gallery.Settings(num_images=1, steps=1)
    assert "FLOP</b> without the adapters." in sampler.cost(settings).to_html()
    assert "FLOP</b>." in gallery.Sampler(pipe, gallery.Limits(), {}).cost(settings).to_html()
    result = sampler.sample(settings)
    sampler.save(result.rows[0][1], tmp_path / "demo.png")
    argv = ["--like", str(tmp_path / "demo.png"), "-o", str(tmp_path / "again.png"), "--device", "cpu"]
    draw.main([*argv, "--checkpoint", options["checkpoint"], "--lora_weights", options["lora_weights"]])
    assert "bit for bit" in capsys.readouterr().out


def test_results_with_adapters_are_those_of_another_checkpoint(world):
    plain, one, two = (identify_checkpoint(world / "pipeline", name and world / name) for name in (None, "one", "two"))
    for wanted, found in ((plain, one), (one, plain), (one, two)):
        with pytest.raises(ValueError, match=says("`lora_weights` must be those of the results", "got")):
            check_same_checkpoint(wanted, found, "those of the results")
    check_same_checkpoint(one, {**one, "path": "elsewhere"}, "the same")
