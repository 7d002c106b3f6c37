# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""The training of a generator of latent tokens: what it learns, and the command."""

import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    assert_near,
    contents,
    fresh_accelerator,
    noise_image,
    normal,
    says,
    tiny_latent_embedder,
    tiny_pipeline,
    tiny_transformer,
)
from hub_server import Hub, Repo
from launch import run_command

from diffusers_dod import DoDPipeline, TokenPrior
from diffusers_dod.training.token_prior import STATE_FILE, TOKENS_FILE, TokenPriorStepOptions, TokenPriorTraining, main


OPTIONS = "--dataset_name textures --num_train_samples 48 --resolution 16 --train_batch_size 8 --hidden_dim 16".split()
OPTIONS += "--num_layers 1 --checkpointing_steps 2 --label_dropout_prob 0.5".split()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    transformer = tiny_transformer(num_classes=12)
    tiny_pipeline(transformer=transformer, latent_embedder=tiny_latent_embedder(), id2label=None).save_pretrained(
        folder
    )
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# A model\n")
    return folder


def run(source: Path, output_dir: Path, num_steps: int, *arguments: str) -> Path:
    options = ["--pretrained_model_name_or_path", str(source), "--output_dir", str(output_dir)]
    with fresh_accelerator():
        main([*OPTIONS, *options, "--max_train_steps", str(num_steps), *arguments])
    return output_dir


def test_the_flow_learns_a_mixture_of_two_classes():
    """Class 0 has two modes, class 1 has one: means, deviations, guidance and truncation are those of the data."""
    labels = torch.arange(2000) % 2
    mode = torch.where(torch.arange(2000) % 4 == 0, 3.0, -3.0)  # of class 0
    centre = torch.where(labels == 0, mode, 0.0)
    tokens = normal(2000, 2, 4) * 0.5 + torch.stack([centre, 5.0 * labels], dim=1)[:, :, None]
    torch.manual_seed(0)
    training = TokenPriorTraining(
        TokenPrior(2, 4, num_classes=2, hidden_dim=64, num_layers=2),
        tokens,
        labels,
        TokenPriorStepOptions(train_batch_size=64, ema_decay=0.97, learning_rate=4e-3),
        seed=0,
    )
    losses = [float(training.make_step()) for _ in range(200)]
    assert sum(losses[-30:]) < 0.7 * sum(losses[:30])
    prior = training.prior
    training.average.copy_to(prior.parameters())

    def generate(label: int, **kwargs) -> torch.Tensor:
        return prior.generate(torch.full((400,), label), normal(400, 2, 4, seed=1), 25, **kwargs)

    first, second = generate(0), generate(1)
    assert_near(second.mean(0), tokens[labels == 1].mean(0), rtol=0, atol=0.3)
    assert_near(second.std(0), torch.full((2, 4), 0.5), rtol=0, atol=0.15)
    positions = first[:, 0].mean(1)
    assert 0.4 < float((positions > 0).float().mean()) < 0.6
    assert_near(positions.abs().mean(), torch.tensor(3.0), rtol=0, atol=0.3)
    assert float((positions.abs() < 1.5).float().mean()) < 0.05  # few between the modes
    both = generate(2)[:, 1].mean(1)  # the null class has both classes
    assert 0.3 < float((both > 2.5).float().mean()) < 0.7
    guided = generate(1, guidance_scale=3.0)[:, 1].mean()
    assert float(guided) > float(second[:, 1].mean())  # away from what other classes have
    for share in (0.0, 0.5):
        truncated = generate(1, truncation=share)
        assert_near(truncated.std(0), share * second.std(0), rtol=1e-4, atol=1e-4)


def test_the_command_gives_a_pipeline_that_a_stopped_run_gives_too(source, tmp_path):
    whole = run(source, tmp_path / "whole", 5)
    resumed = run(source, tmp_path / "resumed", 2)
    tokens = (resumed / TOKENS_FILE).stat().st_mtime_ns
    run(source, resumed, 5)
    assert (resumed / TOKENS_FILE).stat().st_mtime_ns == tokens  # computed once
    assert contents(resumed / "token_prior") == contents(whole / "token_prior")
    assert (resumed / STATE_FILE).read_bytes() == (whole / STATE_FILE).read_bytes()
    pipe = DoDPipeline.from_pretrained(whole)
    assert pipe.token_prior.config.hidden_dim == 16 and pipe.token_prior.token_mean.abs().max() > 0
    assert len(pipe([0, 11], num_stages=2, use_token_prior=True, seed=0).images) == 2
    assert contents(whole / "transformer") == contents(source / "transformer")
    card = (resumed / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n\n# A model\n\n## Token prior\n")
    assert card.count("## Token prior") == 1 and "5 steps of 8 images, on the tokens of 48 images" in card


def test_other_settings_and_damaged_files_in_the_same_folder_are_refused(source, tmp_path):
    run(source, tmp_path, 2)
    with pytest.raises(ValueError, match=says(STATE_FILE, "`learning_rate` = 0.5", "got 0.001")):
        run(source, tmp_path, 4, "--learning_rate", "0.5")
    with pytest.raises(ValueError, match=says(TOKENS_FILE, "`images` = 'textures-16-48-1'", "got 'textures-16-48-0'")):
        run(source, tmp_path, 4, "--seed", "1", "--latents_dir", str(tmp_path / "others"))
    content = bytearray((tmp_path / TOKENS_FILE).read_bytes())
    content[-3] ^= 1
    (tmp_path / "copy").write_bytes((tmp_path / TOKENS_FILE).read_bytes())
    (tmp_path / TOKENS_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=says(TOKENS_FILE, "hash that its header states")):
        run(source, tmp_path, 4)
    (tmp_path / "copy").rename(tmp_path / TOKENS_FILE)
    with open(tmp_path / STATE_FILE, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match=STATE_FILE):
        run(source, tmp_path, 4)


def test_fewer_steps_than_are_done_are_refused(source, tmp_path):
    run(source, tmp_path, 4)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=says("`max_train_steps` must be at least the 4 steps", "got 2")):
        run(source, tmp_path, 2)
    assert contents(tmp_path) == before
    run(source, tmp_path, 4)


def test_another_pipeline_is_not_replaced(source, tmp_path, capsys):
    DoDPipeline.from_pretrained(source).save_pretrained(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(SystemExit):
        run(source, tmp_path, 2)
    assert "`output_dir` must be a new folder" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_a_training_that_has_not_ended_is_left_alone(source, tmp_path, capsys):
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(SystemExit):
        run(source, tmp_path, 2)
    assert f"got {tmp_path} with checkpoints of a training" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_a_class_without_images_is_found_before_the_tokens(source, tmp_path):
    with pytest.raises(ValueError, match=says("`labels` must hold all 12 classes", "[5, 6, 7, 8, 9]")):
        run(source, tmp_path, 2, "--num_train_samples", "5")
    assert not (tmp_path / TOKENS_FILE).exists()


@pytest.mark.slow  # the end point is read when huggingface_hub is imported, so that it takes a process
def test_a_pipeline_on_the_hub_brings_its_card(source, tmp_path):
    with Hub() as hub:
        files = {str(path.relative_to(source)): path for path in source.rglob("*") if path.is_file()}
        hub.repos["user/dod"] = Repo(files={name: hub.store(path.read_bytes()) for name, path in files.items()})
        command = [sys.executable, "-m", "diffusers_dod.training.token_prior", *OPTIONS, "--max_train_steps", "2"]
        command += ["--pretrained_model_name_or_path", "user/dod", "--output_dir", str(tmp_path / "run")]
        run_command(command, tmp_path / "log", {**hub.environment(tmp_path / "home"), "HF_HUB_OFFLINE": "0"})
    card = (tmp_path / "run/README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n\n# A model\n\n## Token prior\n")


def test_what_cannot_be_trained_is_refused(source, tmp_path, capsys):
    with pytest.raises(ValueError, match=says("model's 12 classes", "got 2")):
        for name in ("ant", "bee"):
            (tmp_path / "images" / name).mkdir(parents=True)
            noise_image(16, 16).save(tmp_path / "images" / name / "0.png")
        options = ["--pretrained_model_name_or_path", str(source), "--output_dir", str(tmp_path / "run")]
        with fresh_accelerator():
            main([*options, "--train_data_dir", str(tmp_path / "images"), "--resolution", "16"])
    DoDPipeline.from_pretrained(source, latent_embedder=None).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=says("`pretrained_model_name_or_path` must hold a latent embedder")):
        run(tmp_path / "plain", tmp_path / "other", 2)
    with pytest.raises((SystemExit, ValueError)):
        run(source, source, 2)
    assert "`output_dir` must be another folder" in capsys.readouterr().err
