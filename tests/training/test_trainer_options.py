# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Options of the trainer in real runs: streams, alignment, buckets, distances, recipes, scaled gradients, 8 bits."""

import json
import shutil
from functools import partial
from pathlib import Path

import accelerate
import datasets
import numpy as np
import pytest
import torch
import transformers
import yaml
from helpers import fresh_accelerator, run_trainer, says, tiny_vae, write_images
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from diffusers_dod import DoDPipeline
from diffusers_dod.checkpoint_manifest import CHECKPOINT_MANIFEST, STATE_FOLDER, find_damage
from diffusers_dod.data.encoding import EncodingOptions
from diffusers_dod.data.labelled_images import ImageOptions
from diffusers_dod.data.sample_stream import SampleDraws
from diffusers_dod.data.streaming import ImageStream, open_stream
from diffusers_dod.options import parse_options, to_recipe
from diffusers_dod.training import accelerator as training_accelerator
from diffusers_dod.training import encode_latents
from diffusers_dod.training.train import main
from diffusers_dod.training_options import TrainingOptions


# A large epsilon makes Adam's update a smooth function of the gradient, so that rounding stays rounding.
TINY = "--preset DoD-Desk --resolution 8 --train_batch_size 4 --logging_steps 1 --learning_rate 1e-2".split()
TINY += ["--adam_epsilon", "1e-3"]
TIMINGS = ("images_per_second", "data_wait")
RECIPES = Path(__file__).parents[2] / "training" / "recipes"


run = partial(run_trainer, TINY)


def resume(whole: Path, target: Path, last_step: int, *arguments) -> Path:
    """Goes on from a step of a finished run as it is found after a crash."""
    shutil.copytree(whole, target)
    for checkpoint in target.glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > last_step:
            shutil.rmtree(checkpoint)
    return run(target, *arguments, "--resume_from_checkpoint", "latest")


def lines_of(path: Path) -> list[dict]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def metrics(run_dir: Path) -> list[dict]:
    """The metrics without timings."""
    return lines_of(run_dir / "metrics.jsonl")


def assert_same(ours: Path, expected: Path, step: int) -> None:
    """Bit by bit."""
    manifests = [path / f"checkpoint-{step}" / CHECKPOINT_MANIFEST for path in (ours, expected)]
    hashes = [json.loads(manifest.read_text())["sha256"] for manifest in manifests]
    assert hashes[0] == hashes[1]
    assert f"{STATE_FOLDER}/optimizer.safetensors" in hashes[0]
    assert metrics(ours) == metrics(expected)


def assert_close(ours: Path, expected: Path, rel: float) -> None:
    for line, wanted in zip(metrics(ours), metrics(expected), strict=True):
        assert {name for name in line if line[name] is None} == {name for name in wanted if wanted[name] is None}
        assert line == {name: value and pytest.approx(value, rel=rel) for name, value in wanted.items()}


def state(run_dir: Path, step: int) -> dict:
    return json.loads((run_dir / f"checkpoint-{step}" / STATE_FOLDER / "state.json").read_text())


def tensors(run_dir: Path, step: int, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(run_dir / f"checkpoint-{step}" / STATE_FOLDER / f"{name}.safetensors")


def says_at_start(capsys, *arguments) -> str:
    """What the command says of options that do not fit."""
    with pytest.raises(SystemExit) as error:
        parse_options(TrainingOptions, [*TINY, "--output_dir", "run", *map(str, arguments)])
    assert error.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Two classes of five images, of which some are wide and some are high."""
    sizes = [(18, 22), (12, 20), (20, 12), (16, 16), (24, 13)]
    return write_images(tmp_path_factory.mktemp("images"), sizes)


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    tiny_vae().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vision(tmp_path_factory) -> Path:
    """A vision transformer whose features have 2 x 2 places."""
    folder = tmp_path_factory.mktemp("vision")
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(**size, image_size=16, patch_size=8)
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Streams

STREAM = ["--streaming", "--train_batch_size", 2, "--gradient_accumulation_steps", 2, "--random_flip"]
STREAM += ["--checkpointing_steps", 2]


@pytest.fixture(scope="module")
def shards(images, tmp_path_factory) -> Path:
    """The images in Parquet files of four and less, with integers for classes."""
    folder = tmp_path_factory.mktemp("shards")
    paths = sorted(images.rglob("*.png"))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for i in range(0, len(paths), 4):
        rows = [{"image": str(path), "label": int(path.parent.name == "newt")} for path in paths[i : i + 4]]
        part = datasets.Dataset.from_list(rows, features=features)
        part.to_parquet(folder / f"{i}.parquet")
    (folder / "classes.txt").write_text("ant\nnewt\n")
    return folder


@pytest.fixture(scope="module")
def stream(shards) -> list:
    return [*STREAM, "--train_data_dir", shards, "--class_names_file", shards / "classes.txt"]


@pytest.fixture(scope="module")
def streamed(stream, tmp_path_factory) -> Path:
    """Four uninterrupted steps in pixel space; read only."""
    return run(tmp_path_factory.mktemp("streamed") / "run", *stream, "--max_train_steps", 4)


def loss_of_zero(shards: Path, vae: Path | None) -> float:
    """The loss of an untrained model, which answers zero, over the first four images of a stream."""
    opened, class_names = open_stream(ImageOptions(train_data_dir=str(shards)), ["ant", "newt"])
    shape = (3, 8, 8) if vae is None else (4, 4, 4)
    samples = iter(
        ImageStream(
            opened,
            class_names,
            SampleDraws(2, 0),
            shape,
            batch_size=2,
            images=ImageOptions(resolution=8),
            encoding=EncodingOptions(random_flip=True),
        )
    )
    losses = []
    for _, sample in zip(range(4), samples, strict=False):
        latents = sample["pixels"]
        if vae is not None:
            model = tiny_vae()
            with torch.no_grad():
                posterior = model.encode(latents[None]).latent_dist
            latents = posterior.mean + posterior.std * sample["posterior_noise"]
            mean, std = (torch.tensor(model.config[name]).view(4, 1, 1) for name in ("latents_mean", "latents_std"))
            latents = (latents[0] - mean) / std
        losses.append(float((sample["noise"] - latents).double().square().mean()))
    return float(np.mean(losses))


def test_a_stream_trains(streamed, shards):
    assert not (streamed / "latents").exists()
    assert [line["step"] for line in metrics(streamed)] == [1, 2, 3, 4]
    assert metrics(streamed)[0]["loss"] == pytest.approx(loss_of_zero(shards, None), rel=1e-5)
    assert state(streamed, 4)["stream"][0]["num_batches"] == 8
    pipe = DoDPipeline.from_pretrained(streamed)
    assert pipe.config.id2label == {"0": "ant", "1": "newt"} and pipe.vae is None


def test_a_resumed_stream_is_bit_identical(streamed, stream, tmp_path):
    run(tmp_path / "run", *stream, "--max_train_steps", 3)  # stops between two multiples of the steps to a checkpoint
    run(tmp_path / "run", *stream, "--max_train_steps", 4, "--resume_from_checkpoint", "latest")
    assert_same(tmp_path / "run", streamed, 4)


def test_a_stream_through_an_autoencoder(stream, shards, vae, tmp_path):
    arguments = [*stream, "--pretrained_vae_name_or_path", vae, "--max_train_steps", 3]
    whole = run(tmp_path / "whole", *arguments)
    assert metrics(whole)[0]["loss"] == pytest.approx(loss_of_zero(shards, vae), rel=1e-5)
    assert_same(resume(whole, tmp_path / "run", 2, *arguments), whole, 3)
    assert DoDPipeline.from_pretrained(whole).transformer.config.in_channels == 4


@pytest.mark.slow
def test_a_resumed_stream_with_workers_is_bit_identical(stream, vae, tmp_path):
    arguments = [*stream, "--dataloader_num_workers", 2, "--pretrained_vae_name_or_path", vae]
    whole = run(tmp_path / "whole", *arguments, "--max_train_steps", 6, "--gradient_accumulation_steps", 1)
    run(tmp_path / "run", *arguments, "--max_train_steps", 3, "--gradient_accumulation_steps", 1)
    assert state(tmp_path / "run", 3)["stream"][0]["num_batches"] == 3  # the next one is the second worker's
    arguments += ["--max_train_steps", 6, "--gradient_accumulation_steps", 1, "--resume_from_checkpoint", "latest"]
    assert_same(run(tmp_path / "run", *arguments), whole, 6)


def test_what_a_stream_refuses_when_it_is_resumed(streamed, stream, images, shards, tmp_path):
    again = ["--resume_from_checkpoint", streamed / "checkpoint-4", "--max_train_steps", 5]
    name = "gradient_accumulation_steps"
    other_accumulation = [f"--{name}", 1, "--allow_changed", name]
    cases = {
        "`num_workers` must be 1 as in the run that is resumed, got 2": [*stream, "--dataloader_num_workers", 2],
        "`seed` must be 0 as in the run that is resumed, got 1": [*stream, "--seed", 1],
        "`train_batch_size` must be 2 as in the run that is resumed, got 1": [*stream, "--train_batch_size", 1],
        "`streaming` must be True as in": ["--train_data_dir", images],
        "The stream must go on behind 4 micro-batches, got a checkpoint behind 8": [*stream, *other_accumulation],
    }
    for message, arguments in cases.items():
        with pytest.raises(ValueError, match=says(message)):
            run(tmp_path / "run", *arguments, *again)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_what_a_stream_refuses(stream, shards, images, vae, capsys, tmp_path):
    no_names = [*STREAM, "--train_data_dir", shards]
    with pytest.raises(ValueError, match=says("`class_names`", "ClassLabel", "got None")):
        run(tmp_path / "run", *no_names)
    with pytest.raises(ValueError, match=says("`resolution`", "multiple of 2", "got 9")):
        run(tmp_path / "run", *stream, "--resolution", 9, "--pretrained_vae_name_or_path", vae)
    with pytest.raises(ValueError, match=says("`num_shards`", "1 x 4", "got 3")):
        run(tmp_path / "run", *stream, "--dataloader_num_workers", 4)
    with pytest.raises(ValueError, match=says("`dataset_name`", "streamed", "'textures'")):
        run(tmp_path / "run", "--streaming", "--dataset_name", "textures")
    assert "`latents_dir`" in says_at_start(capsys, *stream, "--latents_dir", "latents")
    assert "`max_aspect_ratio`" in says_at_start(capsys, *stream, "--max_aspect_ratio", 2)
    said = says_at_start(capsys, *stream, "--latents_dtype", "float16", "--shard_size", 7)
    assert "`latents_dtype` and `streaming` must not both be given, got float16 and True." in said
    assert "`shard_size` and `streaming` must not both be given, got 7 and True." in said
    message = says_at_start(capsys, "--train_data_dir", images, "--class_names_file", "classes.txt")
    assert "`class_names_file` must be given with `streaming` only, got classes.txt" in message


# ---------------------------------------------------------------------------------------------------------------------
# Alignment

REPA = ["--random_flip", "--checkpointing_steps", 1, "--repa_layer", 1, "--repa_prior_weight", 0.25]
REPA += ["--repa_stop_step", 2, "--max_train_steps", 4, "--ema_decay", 0.2, 0.5]


@pytest.fixture(scope="module")
def repa(vision) -> list:
    return [*REPA, "--repa_model_name_or_path", vision]


@pytest.fixture(scope="module")
def aligned(images, repa, tmp_path_factory) -> Path:
    """Two steps with features of the images, two without; read only."""
    return run(tmp_path_factory.mktemp("aligned") / "run", "--train_data_dir", images, *repa)


@pytest.fixture(scope="module")
def features(images, vision, tmp_path_factory) -> Path:
    """Latents with features."""
    folder = tmp_path_factory.mktemp("features") / "latents"
    arguments = ["--train_data_dir", images, "--resolution", 8, "--random_flip", "--latents_dir", folder]
    with fresh_accelerator():
        encode_latents.main([*map(str, arguments), "--repa_model_name_or_path", str(vision)])
    return folder


def test_alignment_ends_with_its_last_step(aligned):
    lines = metrics(aligned)
    assert ["alignment" in line and "prior_alignment" in line for line in lines] == [True, True, False, False]
    assert all(-1 <= lines[i][name] <= 1 for i in (0, 1) for name in ("alignment", "prior_alignment"))
    assert lines[1]["alignment"] < lines[0]["alignment"]  # which is minimised
    second, third = tensors(aligned, 2), tensors(aligned, 3)
    assert not torch.equal(second["transformer.proj_out.weight"], third["transformer.proj_out.weight"])


def test_projectors_are_in_no_pipeline_and_no_average(aligned):
    raw, average = tensors(aligned, 4), tensors(aligned, 4, "ema-decay-0.5")
    projectors = {name for name in raw if name.split(".")[0] in ("projector", "prior_projector")}
    assert {name.split(".")[0] for name in projectors} == {"projector", "prior_projector"}
    assert average.keys() == raw.keys() - projectors
    pipe = DoDPipeline.from_pretrained(aligned / "checkpoint-4")
    assert set(pipe.components) == {"transformer", "latent_embedder", "token_prior", "scheduler", "vae"}
    parts = {"transformer": pipe.transformer, "latent_embedder": pipe.latent_embedder}
    names = {f"{part}.{name}" for part, model in parts.items() for name, _ in model.named_parameters()}
    assert names == average.keys()


@pytest.mark.slow
def test_a_resumed_run_ends_its_alignment_in_the_same_step(aligned, images, repa, tmp_path):
    ours = resume(aligned, tmp_path / "run", 1, "--train_data_dir", images, *repa)
    assert_same(ours, aligned, 4)


@pytest.mark.slow
def test_stored_features_give_the_same_losses(aligned, features, repa, tmp_path):
    """Within the precision of half a float."""
    ours = run(tmp_path / "run", "--latents_dir", features, *repa)
    assert_close(ours, aligned, rel=5e-3)
    assert metrics(ours)[0]["alignment"] != metrics(aligned)[0]["alignment"]


def test_alignment_with_accumulated_gradients(aligned, images, repa, tmp_path):
    halves = ["--train_batch_size", 2, "--gradient_accumulation_steps", 2]
    ours = run(tmp_path / "run", "--train_data_dir", images, *repa, *halves)
    assert_close(ours, aligned, rel=1e-4)


def test_alignment_of_a_stream(stream, vision, tmp_path):
    repa = ["--repa_model_name_or_path", vision, "--repa_layer", 1, "--repa_stop_step", 1]
    lines = metrics(run(tmp_path / "run", *stream, *repa, "--max_train_steps", 2))
    assert ["alignment" in line for line in lines] == [True, False]
    assert -1 <= lines[0]["alignment"] <= 1 and "prior_alignment" not in lines[0]


def test_what_alignment_refuses(aligned, features, images, vision, repa, capsys, tmp_path):
    other = tmp_path / "other"
    model = transformers.ViTModel.from_pretrained(vision, add_pooling_layer=False)
    with torch.no_grad():
        model.embeddings.cls_token += 1
    model.save_pretrained(other)
    with pytest.raises(ValueError, match=says(str(features), "`vision_model`", "another folder")):
        run(tmp_path / "run", "--latents_dir", features, *REPA, "--repa_model_name_or_path", other)
    with pytest.raises(ValueError, match=says("`repa_model_name_or_path`", "images", "stored features")):
        run(tmp_path / "run", "--latents_dir", aligned / "latents", *repa)
    with pytest.raises(ValueError, match=says("`path` must hold a model of `transformers`", "nowhere")):
        run(tmp_path / "run", "--train_data_dir", images, *REPA, "--repa_model_name_or_path", tmp_path / "nowhere")
    data = ["--train_data_dir", images, "--repa_model_name_or_path", vision]
    assert "`repa_layer` must be at most the 6 blocks" in says_at_start(capsys, *data)  # 8 by default
    said = says_at_start(capsys, "--train_data_dir", images, "--repa_stop_step", 7)
    assert "`repa_stop_step` must be given with `repa_model_name_or_path` only, got 7." in said
    fit = ["--preset", "FiTv2-Desk", "--repa_prior_weight", 1]
    assert "`repa_prior_weight` must be 0 for `preset` 'FiTv2-Desk'" in says_at_start(capsys, *data, *fit)


# ---------------------------------------------------------------------------------------------------------------------
# Buckets


@pytest.mark.slow
def test_buckets(images, vae, tmp_path):
    """Encoded by the trainer or by the command for it: the same run, which goes on as if it had not been stopped."""
    data = ["--train_data_dir", images, "--resolution", 16, "--max_aspect_ratio", 2]
    data += ["--pretrained_vae_name_or_path", vae]
    steps = ["--checkpointing_steps", 2, "--max_train_steps", 4]
    whole = run(tmp_path / "whole", *data, *steps)
    with fresh_accelerator():
        encode_latents.main([*map(str, data), "--latents_dir", str(tmp_path / "latents")])
    buckets = {path.name for path in (tmp_path / "latents").glob("bucket-*")}
    assert buckets == {path.name for path in (whole / "latents").glob("bucket-*")} and len(buckets) == 3
    taken = ["--latents_dir", tmp_path / "latents", "--pretrained_vae_name_or_path", vae]
    run(tmp_path / "run", *taken, "--checkpointing_steps", 2, "--max_train_steps", 2)
    run(tmp_path / "run", *taken, *steps, "--resume_from_checkpoint", "latest")
    assert_same(tmp_path / "run", whole, 4)


# ---------------------------------------------------------------------------------------------------------------------
# Fréchet distances


def colours(pixels: torch.Tensor) -> torch.Tensor:
    """Mean colours: features (B, 3) of images (B, 3, H, W) in uint8."""
    assert pixels.dtype == torch.uint8 and pixels.ndim == 4
    return pixels.float().mean(dim=(2, 3)) / 255


NO_FUNCTION = 3


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "statistics.npz"
    np.savez(path, mu=np.array([0.4, 0.5, 0.6]), sigma=np.diag([0.01, 0.02, 0.03]))
    return path


@pytest.fixture(scope="module")
def distances(images, reference) -> list:
    arguments = ["--train_data_dir", images, "--fid_extractor", f"{__name__}:colours", "--fid_reference", reference]
    arguments += ["--fid_num_samples", 5, "--validation_steps", 2, "--checkpointing_steps", 2]
    arguments += ["--learning_rate", 0.05, "--adam_epsilon", 1e-8]  # classes make a difference after two steps
    return [*arguments, "--validation_seed", 3, "--validation_guidance_scale", 2]


@pytest.fixture(scope="module")
def evaluated(distances, tmp_path_factory) -> Path:
    """Three steps, evaluated after the second and the last one; read only."""
    return run(tmp_path_factory.mktemp("evaluated") / "run", *distances, "--max_train_steps", 3)


def distance(features: np.ndarray) -> float:
    """Fréchet distance of these features to the reference, by the eigenvalues of the product of the covariances."""
    mean, cov = features.mean(0), np.cov(features, rowvar=False)
    other = np.diag([0.01, 0.02, 0.03])
    roots = np.sqrt(np.linalg.eigvals(cov @ other).astype(complex)).real.sum()
    return float(((mean - [0.4, 0.5, 0.6]) ** 2).sum() + np.trace(cov) + np.trace(other) - 2 * roots)


@pytest.mark.slow
def test_distances_are_those_of_the_checkpoint(evaluated):
    lines = lines_of(evaluated / "evaluations.jsonl")
    assert [line["step"] for line in lines] == [2, 3]
    for line in lines:
        assert list(line) == ["step", "num_samples", "fid_stage_1", "fid_stage_2"] and line["num_samples"] == 5
        pipe = DoDPipeline.from_pretrained(evaluated / f"checkpoint-{line['step']}")
        pipe.set_progress_bar_config(disable=True)
        settings = dict(seed=3, sample_indices=[0, 1, 2, 3, 4], guidance_scale=2.0)
        output = pipe([0, 1, 0, 1, 0], output_type="np", return_stages=True, **settings)
        for stage in (1, 2):
            features = (np.asarray(output.stages[stage - 1]) * 255).round().mean(axis=(1, 2)) / 255
            assert line[f"fid_stage_{stage}"] == pytest.approx(distance(features), rel=1e-3)


def test_the_card_has_the_last_distances(evaluated):
    line = lines_of(evaluated / "evaluations.jsonl")[-1]
    card = ModelCard.load(evaluated / "README.md")
    results = card.data.eval_results
    assert [result.metric_value for result in results] == [round(line[f"fid_stage_{i}"], 4) for i in (1, 2)]
    for stage, result in enumerate(results, 1):
        assert (result.metric_type, result.dataset_name) == ("fid", "own images")
        assert f"stage {stage}, 5 samples" in result.metric_name and "colours" in result.metric_name
    assert card.data.model_name == "run"
    assert "Fréchet distance after 3 steps" in card.text


@pytest.mark.slow
def test_evaluations_of_a_resumed_run_come_once(evaluated, distances, tmp_path):
    before = {path.name: path.stat().st_mtime_ns for path in (evaluated / "samples").iterdir()}
    ours = resume(evaluated, tmp_path / "run", 2, *distances, "--max_train_steps", 3)
    assert lines_of(ours / "evaluations.jsonl") == lines_of(evaluated / "evaluations.jsonl")
    after = {path.name: path.stat().st_mtime_ns for path in (ours / "samples").iterdir()}
    assert [after[name] != before[name] for name in sorted(before)] == [False, True]  # only the third step's


@pytest.mark.slow
@pytest.mark.parametrize("is_torn", [True, False])
def test_samples_that_a_crash_prevented_are_drawn_by_the_resumed_run(evaluated, distances, tmp_path, is_torn):
    """The checkpoint of a step is there before its samples."""
    ours = tmp_path / "run"
    shutil.copytree(evaluated, ours)
    shutil.rmtree(ours / "checkpoint-3")
    shutil.rmtree(ours / "samples")
    if is_torn:
        (ours / "evaluations.jsonl").write_text('{"step": 2, "num')
    run(ours, *distances, "--max_train_steps", 3, "--resume_from_checkpoint", "latest")
    assert lines_of(ours / "evaluations.jsonl") == lines_of(evaluated / "evaluations.jsonl")
    names = [sorted(path.name for path in (folder / "samples").iterdir()) for folder in (ours, evaluated)]
    assert names[0] == names[1]


def test_a_plain_fit_has_one_stage(distances, tmp_path):
    """Features are those of a file, whose folder is nobody's business."""
    (tmp_path / "features.py").write_text("def colours(pixels):\n    return pixels.float().mean(dim=(2, 3))\n")
    extractor = ["--fid_extractor", f"{tmp_path}/features.py:colours"]
    ours = run(tmp_path / "run", *distances, *extractor, "--preset", "FiTv2-Desk", "--max_train_steps", 1)
    (line,) = lines_of(ours / "evaluations.jsonl")
    assert list(line) == ["step", "num_samples", "fid_stage_1"]
    card = (ours / "README.md").read_text()
    assert "features of `features.py:colours`" in card and str(tmp_path) not in card
    assert "fid_extractor" not in yaml.safe_load((ours / "recipe.yaml").read_text())  # nor `fid_reference`


def test_what_distances_refuse(distances, reference, tmp_path, capsys):
    """Before the training starts."""
    np.savez(tmp_path / "no_mean.npz", sigma=np.eye(3))
    np.savez(tmp_path / "square.npz", mu=np.zeros(2), sigma=np.eye(3))
    np.savez(tmp_path / "wide.npz", mu=np.zeros(4), sigma=np.eye(4))
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("no archive")
    extractor = {
        f"{__name__}:nothing": ("no attribute", "'nothing'"),
        f"{__name__}:NO_FUNCTION": ("to call", "got 3"),
        "no_module_at_all:f": ("No module named",),
        "colours": ("package.module:attribute", "'colours'"),
        ".colours:f": ("package.module:attribute", "'.colours:f'"),
        "builtins:repr": ("(2, 3)", "repr"),  # takes images, and returns no features
    }
    statistics = {
        "no_mean.npz": ("`mu`", "['sigma']"),
        "square.npz": ("`mu`", "(2,)", "(3, 3)"),
        "wide.npz": ("(2, 4)", "(2, 3)"),
        "array.npy": ("npz", "array.npy"),
        "text.npz": ("npz", "text.npz"),
    }
    for name, fragments in extractor.items():
        with pytest.raises(ValueError, match=says("`fid_extractor`", *fragments)):
            run(tmp_path / "run", *distances, "--fid_extractor", name)
    for name, fragments in statistics.items():
        with pytest.raises(ValueError, match=says("`fid_reference`", *fragments)):
            run(tmp_path / "run", *distances, "--fid_reference", tmp_path / name)
    assert not list(tmp_path.glob("run/checkpoint-*"))
    message = says_at_start(capsys, "--dataset_name", "textures", "--fid_reference", reference)
    assert f"`fid_reference` must be given with `fid_extractor` only, got {reference}." in message
    message = says_at_start(capsys, "--dataset_name", "textures", "--fid_extractor", "inception")
    assert "`fid_extractor` must be given with `fid_reference` only, got inception." in message


def test_folders_that_a_run_writes_are_not_among_its_images(tmp_path, capsys):
    for path in (tmp_path, tmp_path / "run", tmp_path / "deep" / "run"):
        message = says_at_start(capsys, "--train_data_dir", tmp_path, "--output_dir", path)
        assert f"`output_dir` must be a folder outside of `train_data_dir`, {tmp_path}, got {path}" in message
    message = says_at_start(capsys, "--train_data_dir", tmp_path, "--latents_dir", tmp_path / "latents")
    assert "`latents_dir` must be a folder outside" in message
    (tmp_path / "images").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "images")
    message = says_at_start(capsys, "--train_data_dir", tmp_path / "images", "--output_dir", tmp_path / "link" / "run")
    assert "`output_dir` must be a folder outside" in message
    beside = ["--train_data_dir", tmp_path / "images", "--output_dir", tmp_path / "images-run"]
    parse_options(TrainingOptions, [*TINY, *map(str, beside)])


def test_code_of_a_recipe_is_not_run_without_trust(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("fid_extractor: os:system\nfid_reference: reference.npz")
    message = says_at_start(capsys, "--dataset_name", "textures", "--config", tmp_path / "recipe.yaml")
    assert "`fid_extractor` of a recipe" in message and "`--trust_extractor`" in message


# ---------------------------------------------------------------------------------------------------------------------
# Recipes


def test_the_recipe_of_a_run_repeats_it(images, vae, tmp_path, monkeypatch):
    data = ["--train_data_dir", images, "--pretrained_vae_name_or_path", vae, "--latents_dir", tmp_path / "latents"]
    options = ["--random_flip", "--logit_mean", -0.5, "--time_shift", 1.5, "--exact_dropout", "--seed", 5]
    options += ["--ema_decay", 0.3, 0.6, "--lr_scheduler", "cosine", "--lr_warmup_steps", 1, "--max_train_steps", 2]
    monkeypatch.chdir(tmp_path)
    whole = run(Path("DoD-Desk"), *data, *options, "--hub_token", "hf_secret")  # named like its preset
    text = (whole / "recipe.yaml").read_text()
    assert str(tmp_path) not in text and "secret" not in text
    assert yaml.safe_load(text)["preset"] == "DoD-Desk"
    with fresh_accelerator():
        main(["--config", str(whole / "recipe.yaml"), "--output_dir", "again", *map(str, data)])
    assert_same(Path("again"), whole, 2)
    assert (Path("again") / "recipe.yaml").read_text() == text


def test_a_recipe_names_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    arguments = ["--dataset_name", "owner/data", "--pretrained_vae_name_or_path", "models", "--output_dir", "run"]
    recipe = to_recipe(
        parse_options(TrainingOptions, [*arguments, "--repa_model_name_or_path", "facebook/dinov2-base"])
    )
    assert recipe == {"dataset_name": "owner/data", "repa_model_name_or_path": "facebook/dinov2-base"}


def test_a_dry_run_creates_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--config", RECIPES / "dod-b-imagenet256.yaml", "--train_data_dir", "images", "--dry_run"]
    main([*map(str, arguments), "--preset", "DoD-Desk", "--output_dir", "run"])
    assert "DoD-Desk" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


class ScalingAccelerator(accelerate.Accelerator):
    """Half precision with scaled gradients as on a GPU, which accelerate has for GPUs only."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**21, growth_interval=2)

    def prepare_model(self, model: torch.nn.Module, *args, **kwargs) -> torch.nn.Module:
        model = super().prepare_model(model, *args, **kwargs)
        model.forward = torch.autocast("cpu", dtype=torch.float16)(model.forward)
        return model

    def unscale_gradients(self, optimizer=None) -> None:
        for prepared in self._optimizers:
            self.scaler.unscale_(prepared.optimizer)


@pytest.mark.slow
def test_scaled_gradients(images, tmp_path, monkeypatch):
    data = ["--train_data_dir", images, "--preset", "FiTv2-Desk", "--train_batch_size", 2]
    data += ["--gradient_accumulation_steps", 2, "--checkpointing_steps", 1]
    plain = run(tmp_path / "plain", *data, "--max_train_steps", 1)
    monkeypatch.setattr(training_accelerator, "Accelerator", ScalingAccelerator)
    arguments = [*data, "--max_train_steps", 6]
    whole = run(tmp_path / "whole", *arguments)
    left_out = [line["loss"] is None for line in metrics(whole)]
    first = left_out.index(False)
    assert 1 < first < 5
    states = [state(whole, step) for step in range(1, 7)]
    counts = [entry["num_nonfinite_steps"] for entry in states]
    assert counts == np.cumsum(left_out).tolist()
    scales = [entry["gradient_scaler"]["scale"] for entry in states]
    assert scales[first - 1] == 2.0**21 / 2**first
    for step in range(2, first + 1):  # nothing moves
        assert torch.equal(tensors(whole, step)["transformer.proj_out.weight"], torch.zeros(12, 128))
    last = tensors(whole, 6)
    assert all(tensor.isfinite().all() for tensor in last.values())
    assert last["transformer.proj_out.weight"].abs().max() > 0
    # What is measured is not scaled. A model that answers zero has the mean square of noise - latents for a loss.
    assert 0.3 < metrics(whole)[first]["grad_norm"] / metrics(plain)[0]["grad_norm"] < 3
    assert_same(resume(whole, tmp_path / "run", first - 1, *arguments), whole, 6)  # between two falls of the scale


def test_half_precision_without_a_scaler_is_refused(images, tmp_path):
    with pytest.raises(ValueError, match=says("`mixed_precision`", "cannot be scaled", "got 'fp16'")):
        run(tmp_path / "run", "--train_data_dir", images, "--mixed_precision", "fp16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "expected"),
    [(["--logit_mean", -8], "0.00_0.25"), (["--logit_mean", 8], "0.75_1.00"), (["--time_shift", 1e3], "0.75_1.00")],
)
def test_the_distribution_of_times(images, tmp_path, option, expected):
    data = ["--train_data_dir", images, "--preset", "FiTv2-Desk", "--max_train_steps", 1]
    (line,) = metrics(run(tmp_path / "run", *data, *option))
    filled = [name for name, value in line.items() if name.startswith("loss_sigma") and value is not None]
    assert filled == [f"loss_sigma_{expected}"]


@pytest.mark.parametrize(
    ("option", "fragments"),
    [
        (["--ema_decay", 0.5], ("`ema_decay` must be [0.999]", "got [0.5]")),
        (
            ["--ema_decay", 0.5, 0.999, "--allow_changed", "ema_decay"],
            ("The first `ema_decay`", "decay-0.999", "got decay-0.5"),
        ),
        (["--optimizer", "adamw_8bit"], ("`optimizer` must be 'adamw'", "got 'adamw_8bit'")),
    ],
)
def test_what_a_resumed_run_must_have_as_before(streamed, stream, tmp_path, option, fragments):
    again = ["--max_train_steps", 5, "--resume_from_checkpoint", streamed / "checkpoint-4"]
    with pytest.raises(ValueError, match=says(*fragments)):
        run(tmp_path / "run", *stream, *option, *again)


@pytest.mark.slow
def test_moments_of_8_bits(images, tmp_path):
    pytest.importorskip("torchao")
    data = ["--train_data_dir", images, "--checkpointing_steps", 2, "--max_train_steps", 4]
    schedule = ["--lr_scheduler", "cosine", "--lr_warmup_steps", 1]
    eight = [*data, *schedule, "--optimizer", "adamw_8bit"]
    whole = run(tmp_path / "whole", *eight)
    moments = tensors(whole, 4, "optimizer")
    assert {name.rsplit(".", 1)[-1] for name in moments} == {"step", "codes", "scale", "qmap", "exp_avg", "exp_avg_sq"}
    assert {tensor.dtype for name, tensor in moments.items() if name.endswith(".codes")} == {torch.uint8}
    assert_same(resume(whole, tmp_path / "run", 2, *eight), whole, 4)
    plain = run(tmp_path / "plain", *data, *schedule)
    for line, expected in zip(metrics(whole), metrics(plain), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=0.05)
        assert line["learning_rate"] == pytest.approx(expected["learning_rate"])
    with pytest.raises(ValueError, match=says("`optimizer` must be 'adamw'", "resumed, got 'adamw_8bit'")):
        run(plain, *eight, "--max_train_steps", 5, "--resume_from_checkpoint", "latest")


@pytest.mark.slow
def test_compiled_blocks_compute_the_same(images, tmp_path):
    data = ["--train_data_dir", images, "--max_train_steps", 3, "--label_dropout_prob", 0.5]
    eager = run(tmp_path / "eager", *data)
    compiled = run(tmp_path / "compiled", *data, "--compile")
    assert_close(compiled, eager, rel=1e-3)
    ours, expected = tensors(compiled, 3), tensors(eager, 3)
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-4, msg=lambda m, n=name: n + m)
    assert find_damage(compiled / "checkpoint-3") is None
