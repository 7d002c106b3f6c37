# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Runs that push to the Hub: the trainer with the real client, against a server on the loopback interface."""

import json
import logging
import re
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import run_trainer, says, write_images
from hub_server import Hub
from huggingface_hub import ModelCard
from launch import PATIENCE_S, wait_until
from PIL import Image

from diffusers_dod import DoDPipeline
from diffusers_dod.checkpoint_manifest import CHECKPOINT_MANIFEST, STATE_FOLDER, find_damage
from diffusers_dod.training import train
from diffusers_dod.training.push import HubPusher


TOKEN = "hf_secretOfThisTest"
REPO = "user/run"
COMMIT = f"POST /api/models/{REPO}/commit/"
PIPELINE = {"model_index.json", "transformer", "scheduler"}
CARD = {"README.md", "recipe.yaml", "curves.png", "metrics.jsonl", "samples"}

TINY = "--preset FiTv2-Desk --resolution 8 --train_batch_size 4 --logging_steps 1 --checkpointing_steps 1".split()
PUSH = ["--push_to_hub", "--push_every", 1, "--hub_model_id", REPO, "--hub_token", TOKEN]


run = partial(run_trainer, TINY)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), [(8, 8)] * 3)


@pytest.fixture
def hub(monkeypatch, tmp_path, caplog, capfd):
    """A server that the client's processes take for the Hub; the token gets into no output, log or file."""
    caplog.set_level(logging.INFO)
    with Hub(tokens={TOKEN: "write"}) as hub:
        hub.set_environment(monkeypatch, tmp_path / "home")
        yield hub
    assert TOKEN not in caplog.text + "".join(capfd.readouterr())
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert not any(TOKEN.encode() in content for content in hub.contents.values())


@pytest.fixture
def wait(monkeypatch) -> Callable:
    """Sets how long the trainer and its pusher wait."""

    def choose(finish_s: float, **pusher) -> None:
        monkeypatch.setattr(train, "PUSH_TIMEOUT_S", finish_s)
        monkeypatch.setattr(train, "HubPusher", partial(HubPusher, first_wait_s=0.05, **pusher))

    return choose


def download(hub: Hub, folder: Path) -> Path:
    """What anybody gets from the repository."""
    for path, file in hub.repos[REPO].files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(hub.contents[file.sha256])
    return folder


def at_the_root(hub: Hub) -> set[str]:
    return {path.split("/")[0] for path in hub.repos[REPO].files}


def test_a_run_is_pushed_and_goes_on_from_its_repository(hub, wait, images, tmp_path):
    wait(PATIENCE_S)
    data = ["--train_data_dir", images]
    first = run(tmp_path / "first", *data, *PUSH, "--push_training_state", "--max_train_steps", 3)
    # One that a newer one overtakes is left out.
    messages = list(hub.repos[REPO].messages)
    assert messages[:2] == ["Start of training", "Step 1"] and messages[-1] == "End of training"
    assert messages[2:-1] in ([], ["Step 2"])
    assert at_the_root(hub) == PIPELINE | CARD | {STATE_FOLDER, CHECKPOINT_MANIFEST}
    assert not list(first.glob(".push-*"))

    repository = download(hub, tmp_path / "repository")
    assert find_damage(repository) is None
    card = ModelCard.load(repository / "README.md")
    assert "3 steps of 4 images (12 in all)" in card.text and "2 classes: ant, newt" in card.text
    for name in ("curves.png", "samples/step-0000003.png"):
        assert f"({name})" in card.text
        with Image.open(repository / name) as image:
            assert image.format == "PNG"
    recipe = (repository / "recipe.yaml").read_text()
    assert recipe.strip() in card.text and str(tmp_path) not in card.text and REPO not in recipe
    lines = (repository / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    pushed, local = (DoDPipeline.from_pretrained(folder).transformer.state_dict() for folder in (repository, first))
    assert all(torch.equal(pushed[name], tensor) for name, tensor in local.items())

    # Somebody else goes on with it, and pushes the pipeline only: the state of training would not fit it.
    whole = run(tmp_path / "whole", *data, "--max_train_steps", 4)
    again = ["--resume_from_checkpoint", repository, "--max_train_steps", 4]
    second = run(tmp_path / "second", *data, *PUSH, *again)
    manifests = [json.loads((folder / "checkpoint-4" / CHECKPOINT_MANIFEST).read_text()) for folder in (second, whole)]
    assert manifests[0] == manifests[1]
    assert at_the_root(hub) == PIPELINE | CARD
    assert hub.repos[REPO].messages[len(messages) :] == ["Start of training", "End of training"]


def test_the_card_of_a_push_is_that_of_its_checkpoint(hub, images, tmp_path, monkeypatch):
    """The push starts when the checkpoint is whole, some steps later."""
    pushed, is_free, save = {}, threading.Event(), train.save_checkpoint

    def push(pusher, checkpoint, others, message, with_training_state):
        card = (checkpoint.parent / "README.md").read_text()
        assert find_damage(checkpoint) is None and is_free.is_set()
        pushed[message] = (
            checkpoint.name,
            re.findall(r"([\d,]+(?: of \d+)?) steps of 4 images \(([\d,]+) in all\)", card),
        )

    def step(trainer):
        train_step(trainer)
        if trainer.step == 3:
            is_free.set()
            wait_until(lambda: trainer.writer.is_whole)

    def save_held_back(*args):
        assert is_free.wait(PATIENCE_S)
        return save(*args)

    train_step = train.Trainer.train_step
    monkeypatch.setattr(train.Trainer, "train_step", step)
    monkeypatch.setattr(train, "save_checkpoint", save_held_back)
    monkeypatch.setattr(HubPusher, "push", push)
    run(tmp_path / "run", "--train_data_dir", images, *PUSH, "--max_train_steps", 4, "--checkpointing_steps", 2)
    assert pushed == {
        "Step 2": ("checkpoint-2", [("2 of 4", "8")]),
        "End of training": ("checkpoint-4", [("4", "16")]),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", [503, "hold"])
def test_a_hub_that_fails_later_does_not_stop_the_training(hub, wait, images, tmp_path, caplog, monkeypatch, kind):
    wait(0.5, max_attempts=2)
    hub.fail(COMMIT, "hold").release.set()  # the first one passes
    failure = hub.fail(COMMIT, kind, times=100)
    finish = HubPusher.finish

    def finish_after_an_attempt(pusher, timeout_s):
        wait_until(lambda: failure.times < 100)
        return finish(pusher, timeout_s)

    monkeypatch.setattr(HubPusher, "finish", finish_after_an_attempt)
    folder = run(tmp_path / "run", "--train_data_dir", images, *PUSH, "--max_train_steps", 3)
    assert hub.repos[REPO].messages == ["Start of training"]
    assert "was not pushed to user/run. To do so by hand" in caplog.text
    assert [find_damage(folder / f"checkpoint-{step}") for step in (1, 2, 3)] == [None] * 3
    (snapshot,) = folder.glob(".push-*")  # for the command
    for complete in (folder, snapshot):
        assert CARD | PIPELINE <= {path.name for path in complete.iterdir()}
        assert DoDPipeline.from_pretrained(complete).config.id2label == {"0": "ant", "1": "newt"}
    assert "3 steps" in (folder / "README.md").read_text()


def test_a_refusal_comes_before_the_images(hub, tmp_path):
    hub.tokens = {}
    with pytest.raises(RuntimeError, match=says("Cannot push to 'user/run'", "401", "`hub_token`")):
        run(tmp_path / "run", "--train_data_dir", tmp_path / "nowhere", *PUSH)
    assert not hub.repos
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"README.md", "recipe.yaml"}


def test_a_finished_run_is_refused_untouched(hub, images, tmp_path):
    folder = run(tmp_path / "run", "--train_data_dir", images, "--max_train_steps", 1)
    (folder / ".push-1-left").mkdir()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(ValueError, match=says("`output_dir`", "holds checkpoints")):
        run(folder, "--train_data_dir", images, *PUSH, "--max_train_steps", 1)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert hub.requests == []
    run(folder, "--train_data_dir", images, "--max_train_steps", 1, "--resume_from_checkpoint", "latest")
    assert not (folder / ".push-1-left").exists()  # also by a run that pushes nothing


@pytest.mark.slow
def test_a_run_without_metrics_is_pushed(hub, wait, images, tmp_path):
    """The run is resumed before its first line, and beside an evaluation of which a crash has left a half."""
    wait(PATIENCE_S)
    data = ["--train_data_dir", images]
    folder = run(tmp_path / "run", *data, "--max_train_steps", 1, "--logging_steps", 9)
    (folder / "metrics.jsonl").write_text('{"st')
    (folder / "evaluations.jsonl").write_text('{"st')
    again = ["--max_train_steps", 3, "--logging_steps", 9, "--resume_from_checkpoint", "latest"]
    run(folder, *data, *PUSH, *again)
    assert hub.repos[REPO].messages[:2] == ["Start of training", "Step 2"]
    assert (folder / "evaluations.jsonl").read_text() == ""
