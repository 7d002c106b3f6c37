"""The trainer as it is called: what it computes, writes and refuses, and that a resumed run is the same run."""

import errno
import json
import os
import re
import shlex
import shutil
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import contents, run_trainer, says, write_images
from launch import PATIENCE_S, wait_until
from PIL import Image
from safetensors.torch import load_file

from diffusers_dod import DoDPipeline
from diffusers_dod.checkpoint_manifest import CHECKPOINT_MANIFEST, STATE_FOLDER
from diffusers_dod.data.image_grid import LINE
from diffusers_dod.data.latents import LatentDataset
from diffusers_dod.data.sample_stream import SampleDraws, TrainingSamples
from diffusers_dod.evaluation.evaluate import EvaluationOptions
from diffusers_dod.evaluation.sample import SamplingOptions
from diffusers_dod.losses import DoDJointModel
from diffusers_dod.options import parse_options
from diffusers_dod.presets import PRESETS
from diffusers_dod.training import train as train_module
from diffusers_dod.training.train import Trainer, main


# A large epsilon makes Adam's update a smooth function of the gradient, so that rounding stays rounding.
TINY = "--preset DoD-Desk --train_batch_size 4 --logging_steps 1 --learning_rate 1e-2 --adam_epsilon 1e-3".split()


EMA = ["--ema_decay", 0.2]
TIMINGS = ("images_per_second", "data_wait")


train = partial(run_trainer, TINY)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), [(18, 22)] * 5)


@pytest.fixture(scope="module")
def data(images) -> list:
    return ["--train_data_dir", images, "--resolution", 16]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data) -> Path:
    """Four uninterrupted steps with a checkpoint after each; read only."""
    output_dir = tmp_path_factory.mktemp("finished") / "run"
    return train(output_dir, *data, "--max_train_steps", 4, "--checkpointing_steps", 1, "--ema_decay", 0.2)


def raw_weights(output_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(output_dir / f"checkpoint-{step}" / STATE_FOLDER / "model.safetensors")


def averaged_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a pipeline's folder under their names in the joint model."""
    return {
        f"{part}.{name}": tensor
        for part in ("transformer", "latent_embedder")
        if (folder / part).exists()
        for name, tensor in load_file(folder / part / "diffusion_pytorch_model.safetensors").items()
    }


def hashes(output_dir: Path, step: int) -> dict[str, str]:
    return json.loads((output_dir / f"checkpoint-{step}" / CHECKPOINT_MANIFEST).read_text())["sha256"]


def read_metrics(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def without_speed(metrics: list[dict]) -> list[dict]:
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in metrics]


def copy_of(output_dir: Path, target: Path, last_step: int) -> Path:
    """A run as it is found after a crash: everything is there but the checkpoints after `last_step`."""
    shutil.copytree(output_dir, target)
    for checkpoint in target.glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > last_step:
            shutil.rmtree(checkpoint)
    return target


# ---------------------------------------------------------------------------------------------------------------------
# What a run writes


def test_finished_pipeline(finished):
    pipe = DoDPipeline.from_pretrained(finished)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.config.id2label == {"0": "ant", "1": "newt"}
    assert pipe.vae is None and pipe.config.default_num_stages == 2
    assert pipe.transformer.config.num_classes == 2
    image = pipe(["newt"], num_inference_steps=1, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (16, 16)


def test_finished_weights_are_the_average_of_the_last_step(finished):
    last, final = averaged_weights(finished / "checkpoint-4"), averaged_weights(finished)
    assert final.keys() == last.keys() == raw_weights(finished, 4).keys()
    for name in final:
        assert torch.equal(final[name], last[name]), name


def test_metrics(finished):
    metrics = read_metrics(finished)
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    for line in metrics:
        assert list(line) == [
            *("step", "loss", "loss_with_prior", "loss_without_prior"),
            *("loss_sigma_0.00_0.25", "loss_sigma_0.25_0.50", "loss_sigma_0.50_0.75", "loss_sigma_0.75_1.00"),
            *("grad_norm", "learning_rate", "images_per_second", "data_wait"),
        ]
        assert line["loss"] > 0 and line["grad_norm"] > 0 and line["images_per_second"] > 0
        assert 0 <= line["data_wait"] <= 1
        assert line["learning_rate"] == 1e-2


def test_loss_of_the_first_step(finished):
    """An untrained model answers zero, so its loss is the mean square of noise - latents over the first samples."""
    stream = TrainingSamples(LatentDataset(finished / "latents"), SampleDraws(num_classes=2, seed=0))
    samples = [stream[position] for position in range(4)]
    losses = [float((sample["noise"] - sample["latents"]).double().square().mean()) for sample in samples]
    kept = [loss for loss, sample in zip(losses, samples, strict=True) if sample["has_prior"]]
    dropped = [loss for loss, sample in zip(losses, samples, strict=True) if not sample["has_prior"]]
    assert kept and dropped  # seed 0 has both
    first = read_metrics(finished)[0]
    assert first["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert first["loss_with_prior"] == pytest.approx(np.mean(kept), rel=1e-5)
    assert first["loss_without_prior"] == pytest.approx(np.mean(dropped), rel=1e-5)


def test_every_weight_is_trained(finished):
    """After four steps nothing is still where it was after the first, in the backbone or in the LEM."""
    first, last = raw_weights(finished, 1), raw_weights(finished, 4)
    # The keys' bias in a LEM block cancels in the softmax, so that its gradient is rounding.
    still = [
        name
        for name in first
        if torch.equal(first[name], last[name]) and not (name.startswith("latent") and name.endswith("to_k.bias"))
    ]
    assert still == []


def test_average_of_the_weights(finished):
    """EMA with diffusers' ramp: the decay of step n is min(ema_decay, n / (n + 9)), and none in the first step."""
    average = raw_weights(finished, 1)
    for step in (1, 2, 3, 4):
        raw = raw_weights(finished, step)
        decay = 0.0 if step == 1 else min(0.2, step / (step + 9))
        average = {name: decay * average[name] + (1 - decay) * raw[name] for name in raw}
        written = averaged_weights(finished / f"checkpoint-{step}")
        for name in raw:
            torch.testing.assert_close(written[name], average[name], rtol=0, atol=1e-6, msg=lambda m, n=name: n + m)
    assert any((written[name] - raw[name]).abs().max() > 1e-4 for name in raw)


def test_checkpoints_hold_only_safetensors_and_json(finished):
    files = [path for path in finished.glob("checkpoint-*/**/*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    assert sorted(path.name for path in finished.glob("checkpoint-*")) == [f"checkpoint-{i}" for i in (1, 2, 3, 4)]
    assert not list(finished.glob(".unfinished*"))


def test_a_checkpoint_is_a_pipeline(finished):
    pipe = DoDPipeline.from_pretrained(finished / "checkpoint-2")
    assert pipe.config.id2label == {"0": "ant", "1": "newt"}


def test_a_run_says_what_it_reads_and_writes_and_what_comes_next(tmp_path, data, caplog):
    caplog.set_level("INFO", logger="diffusers_dod")
    run = tmp_path / "my run"
    train(run, *data, "--max_train_steps", 1)
    assert "10 images of 2 classes\n  class 0, ant: 5 images\n  class 1, newt: 5 images" in caplog.text
    assert re.search(rf"Checkpoint written: {re.escape(str(run))}/checkpoint-1 \(\d+\.\d s\)", caplog.text)
    (end,) = [message for message in caplog.messages if f"The pipeline is in {run}." in message]
    sampling, evaluation = [shlex.split(line) for line in end.splitlines()[1:]]
    assert sampling[:3] == ["python", "-m", "diffusers_dod.evaluation.sample"]
    assert evaluation[:3] == ["python", "-m", "diffusers_dod.evaluation.evaluate"]
    options = parse_options(SamplingOptions, sampling[3:])
    assert options.pretrained_model_name_or_path == str(run)
    judged = parse_options(EvaluationOptions, evaluation[3:])
    assert judged.samples == str(options.output_dir) and judged.judge.reference == str(data[1])
    assert judged.judge.resolution == 16


def test_a_run_does_not_depend_on_names_links_and_the_working_folder(tmp_path, images, monkeypatch):
    """Characters of patterns in names, a link in the place of a checkpoint, and a relative folder that is left."""
    shutil.copytree(images, tmp_path / "images [1]*?")
    monkeypatch.chdir(tmp_path)
    run, elsewhere = tmp_path / "run [1]", tmp_path / "elsewhere"
    elsewhere.mkdir()

    class Leaving(Trainer):
        def train_step(self):
            os.chdir(elsewhere)
            if self.step == 1:
                self.finish_saving()
                shutil.move(run / "checkpoint-1", elsewhere)
                (run / "checkpoint-1").symlink_to(elsewhere / "checkpoint-1")
            super().train_step()

    monkeypatch.setattr("diffusers_dod.training.train.Trainer", Leaving)
    steps = ["--max_train_steps", 2, "--checkpointing_steps", 1, "--checkpoints_total_limit", 1]
    train(Path(run.name), "--train_data_dir", "images [1]*?", "--resolution", 16, *steps)
    names = {path.name for path in run.iterdir()}
    assert {"checkpoint-2", "metrics.jsonl", "samples", "model_index.json"} <= names and "checkpoint-1" not in names
    assert (elsewhere / "checkpoint-1" / "model_index.json").exists() and len(list(elsewhere.iterdir())) == 1
    DoDPipeline.from_pretrained(run)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints that are written while the training goes on


EVERY_SECOND = ["--max_train_steps", 6, "--checkpointing_steps", 2, *EMA, "--ema_sigma_rel", 0.1]


class HeldWriter:
    """Holds back the writing of the first checkpoint of a run, which is that of step 2, and may make it fail."""

    def __init__(self, patch: pytest.MonkeyPatch, error: Exception | None = None):
        self.is_free = threading.Event()
        self.num_at_work, self.most_at_work = 0, 0
        self.error = error
        self.save_checkpoint, self.train_step = train_module.save_checkpoint, Trainer.train_step
        patch.setattr(train_module, "save_checkpoint", self._save)

    def _save(self, output_dir, step, *args):
        self.num_at_work += 1
        self.most_at_work = max(self.most_at_work, self.num_at_work)
        try:
            if step == 2:
                assert self.is_free.wait(PATIENCE_S)
                if self.error is not None:
                    raise self.error
            return self.save_checkpoint(output_dir, step, *args)
        finally:
            self.num_at_work -= 1

    def at_step(self, patch: pytest.MonkeyPatch, step: int, act: Callable[[Trainer], None]) -> None:
        """Calls `act` behind a step."""

        def train_step(trainer):
            self.train_step(trainer)
            if trainer.step == step:
                act(trainer)

        patch.setattr(Trainer, "train_step", train_step)


@pytest.fixture(scope="module")
def waited_for(tmp_path_factory, data) -> Path:
    """Six steps that wait for their three checkpoints; read only."""
    return train(tmp_path_factory.mktemp("waited") / "run", *data, *EVERY_SECOND, "--no-async_checkpoints")


@pytest.mark.parametrize("step", [3, 4])
def test_steps_go_on_while_a_checkpoint_is_written(tmp_path, data, waited_for, monkeypatch, step):
    """The checkpoint has the bits of its own step, and the next one waits until it is whole."""
    writer = HeldWriter(monkeypatch)
    writer.at_step(monkeypatch, step, lambda trainer: writer.is_free.set())
    run = train(tmp_path / "run", *data, *EVERY_SECOND)
    assert writer.most_at_work == 1
    for number in (2, 4, 6):
        assert hashes(run, number) == hashes(waited_for, number)
    assert without_speed(read_metrics(run)) == without_speed(read_metrics(waited_for))


def test_a_checkpoint_that_cannot_be_written_ends_the_run(tmp_path, data, monkeypatch):
    writer = HeldWriter(monkeypatch, OSError(errno.ENOSPC, "No space left on device", "checkpoint-2"))
    steps = []

    def fail(trainer):
        writer.is_free.set()
        wait_until(trainer.stop.is_noted)
        steps.append(trainer)

    writer.at_step(monkeypatch, 3, fail)
    with pytest.raises(OSError, match="No space left on device: 'checkpoint-2'"):
        train(tmp_path / "run", *data, *EVERY_SECOND)
    assert [trainer.step for trainer in steps] == [3]  # and not the next checkpoint's
    assert not [path.name for path in (tmp_path / "run").iterdir() if "checkpoint" in path.name]
    assert not (tmp_path / "run" / "model_index.json").exists()


@pytest.mark.parametrize("fails_too", [False, True])
def test_an_error_of_a_step_waits_for_the_checkpoint(tmp_path, data, waited_for, monkeypatch, caplog, fails_too):
    writer = HeldWriter(monkeypatch, OSError("no such disk") if fails_too else None)

    def fail(trainer):
        writer.is_free.set()
        raise RuntimeError("out of memory")

    writer.at_step(monkeypatch, 3, fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(tmp_path / "run", *data, *EVERY_SECOND)
    if fails_too:
        assert "A checkpoint could not be written: no such disk" in caplog.text
    else:
        assert hashes(tmp_path / "run", 2) == hashes(waited_for, 2)


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process by SIGTERM at once")
def test_a_signal_waits_for_the_checkpoint(tmp_path, data, waited_for, monkeypatch):
    writer = HeldWriter(monkeypatch)

    def stop(trainer):
        os.kill(os.getpid(), signal.SIGTERM)
        writer.is_free.set()

    writer.at_step(monkeypatch, 3, stop)
    with pytest.raises(SystemExit):
        train(tmp_path / "run", *data, *EVERY_SECOND)
    monkeypatch.undo()
    run = tmp_path / "run"
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert hashes(run, 2) == hashes(waited_for, 2)
    train(run, *data, *EVERY_SECOND, "--resume_from_checkpoint", "latest")
    assert hashes(run, 6) == hashes(waited_for, 6)


# ---------------------------------------------------------------------------------------------------------------------
# What a run writes, continued


def test_latents_alone_are_described_too(tmp_path, finished, caplog):
    caplog.set_level("INFO", logger="diffusers_dod")
    train(tmp_path / "run", "--latents_dir", finished / "latents", "--max_train_steps", 1)
    assert "latents of 10 images of 2 classes\n  class 0, ant: 5 images" in caplog.text


def test_sample_grid(finished):
    """Two classes beside each other; two samples of two stages above each other; enlarged to 64, two pixels apart."""
    assert [path.name for path in (finished / "samples").iterdir()] == ["step-0000004.png"]
    with Image.open(finished / "samples" / "step-0000004.png") as grid:
        left, top = grid.width - (2 * 66 - 2), grid.height - (4 * 66 - 2)  # of the images; captions take the rest
        assert grid.format == "PNG" and left > 30 and top == 2 * LINE
        assert grid.convert("L").crop((0, 0, grid.width, top)).getextrema()[0] < 128
        assert len(grid.getcolors(maxcolors=1 << 20)) > 50


def text_files(output_dir: Path) -> list[Path]:
    return [path for path in output_dir.rglob("*") if path.suffix in (".json", ".jsonl", ".md")]


def test_no_paths_of_this_machine_are_written(finished, images):
    assert finished / "README.md" in text_files(finished)
    for path in text_files(finished):
        text = path.read_text()
        assert str(finished.parent) not in text and str(images) not in text, path


def test_model_card(finished):
    card = (finished / "README.md").read_text()
    assert "2 classes: ant, newt" in card and "max_train_steps: 4" in card and "DoD-Desk" in card


# ---------------------------------------------------------------------------------------------------------------------
# Resuming


def test_resuming_is_bit_identical(tmp_path, data, finished):
    """Two steps, a new process' worth of state, two more steps: the files of the last checkpoint have equal hashes."""
    shared = [*data, "--checkpointing_steps", 2, "--ema_decay", 0.2, "--resume_from_checkpoint", "latest"]
    train(tmp_path / "run", *shared, "--max_train_steps", 2)  # nothing to resume yet: it starts from scratch
    assert hashes(tmp_path / "run", 2) == hashes(finished, 2)
    # A grid on the way must not move anything either.
    train(tmp_path / "run", *shared, "--max_train_steps", 4, "--validation_steps", 3)
    assert hashes(tmp_path / "run", 4) == hashes(finished, 4)
    assert {f"{STATE_FOLDER}/model.safetensors", f"{STATE_FOLDER}/optimizer.safetensors"} < hashes(finished, 4).keys()
    assert without_speed(read_metrics(tmp_path / "run")) == without_speed(read_metrics(finished))
    final, expected = averaged_weights(tmp_path / "run"), averaged_weights(finished)
    for name in expected:
        assert torch.equal(final[name], expected[name]), name


def test_resuming_after_a_crash(tmp_path, data, finished):
    """The newest checkpoint is damaged, its metrics are written again, and no line comes twice."""
    run = copy_of(finished, tmp_path / "run", last_step=4)
    weights = run / "checkpoint-4" / STATE_FOLDER / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    arguments = ["--max_train_steps", 4, "--checkpointing_steps", 1, "--ema_decay", 0.2]
    train(run, *data, *arguments, "--resume_from_checkpoint", "latest")
    assert hashes(run, 4) == hashes(finished, 4)
    assert without_speed(read_metrics(run)) == without_speed(read_metrics(finished))


def test_a_rate_that_is_stable_before_it_falls(tmp_path, data, finished):
    schedule = ["--lr_scheduler", "warmup_stable_decay", "--lr_warmup_steps", 1, "--lr_decay_steps", 2]
    run = train(tmp_path / "run", *data, *schedule, "--max_train_steps", 5, "--checkpointing_steps", 3)
    assert [line["learning_rate"] for line in read_metrics(run)] == pytest.approx([0.0, 1e-2, 1e-2, 1e-2, 0.5e-2])
    longer = ["--max_train_steps", 7, "--allow_changed", "max_train_steps"]  # from before it fell
    train(run, *data, *schedule, *longer, "--resume_from_checkpoint", "checkpoint-3")
    rates = [line["learning_rate"] for line in read_metrics(run)]
    assert rates == pytest.approx([0.0, 1e-2, 1e-2, 1e-2, 1e-2, 1e-2, 0.5e-2])


@pytest.mark.slow
def test_resuming_with_a_schedule_of_the_learning_rate(tmp_path, images):
    """A cosine with warm-up: the first step after the interruption has its own rate, not that of the first step."""
    arguments = ["--train_data_dir", images, "--resolution", 8]
    arguments += ["--lr_scheduler", "cosine", "--lr_warmup_steps", 2, "--max_train_steps", 4]
    whole = train(tmp_path / "whole", *arguments, "--checkpointing_steps", 2)
    rates = [line["learning_rate"] for line in read_metrics(whole)]
    assert rates == pytest.approx([0.0, 0.5e-2, 1e-2, 0.5e-2])
    run = copy_of(whole, tmp_path / "run", last_step=2)
    train(run, *arguments, "--checkpointing_steps", 2, "--resume_from_checkpoint", "latest")
    assert without_speed(read_metrics(run)) == without_speed(read_metrics(whole))
    assert hashes(run, 4) == hashes(whole, 4)


def test_resuming_with_another_learning_rate(tmp_path, data, finished):
    """The rate is that of the run that goes on, not that of the one which wrote the checkpoint."""
    run = copy_of(finished, tmp_path / "run", last_step=2)
    again = ["--max_train_steps", 3, "--resume_from_checkpoint", "latest", "--allow_changed", "learning_rate"]
    train(run, *data, *EMA, *again, "--learning_rate", 0.5)
    assert [line["learning_rate"] for line in read_metrics(run)] == pytest.approx([1e-2, 1e-2, 0.5])


def test_latest_is_on_the_branch_of_the_last_run(tmp_path, data, finished, monkeypatch):
    """Back to the first checkpoint and killed at once: the next run does not go on from the last one."""

    def killed(self):
        raise KeyboardInterrupt

    run = copy_of(finished, tmp_path / "run", last_step=4)
    again = [*data, *EMA, "--resume_from_checkpoint"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "train_step", killed)
        train(run, *again, run / "checkpoint-1", "--max_train_steps", 4)
    train(run, *again, "latest", "--max_train_steps", 2)
    assert hashes(run, 2) == hashes(finished, 2)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == [
        *("checkpoint-1", "checkpoint-2"),
        *(f"checkpoint-{step}-abandoned" for step in (2, 3, 4)),
    ]


def test_resuming_past_the_end_is_refused(tmp_path, data, finished):
    run = copy_of(finished, tmp_path / "run", last_step=4)
    with pytest.raises(ValueError, match=r"`max_train_steps` must be at least the step 4 of .*checkpoint-4, got 3"):
        train(run, *data, *EMA, "--max_train_steps", 3, "--resume_from_checkpoint", "latest")


def test_damaged_checkpoints_alone_are_not_started_over(tmp_path, data, finished):
    run = copy_of(finished, tmp_path / "run", last_step=1)
    (run / "checkpoint-1" / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match=r"`output_dir` .* must hold an undamaged checkpoint with finite weights"):
        train(run, *data, *EMA, "--max_train_steps", 4, "--resume_from_checkpoint", "latest")


def test_metrics_of_a_resumed_run_between_two_lines(tmp_path, images):
    """Two steps to a checkpoint, three to a line of metrics: the interrupted interval is averaged as in one go."""
    arguments = ["--train_data_dir", images, "--resolution", 8, "--logging_steps", 3, "--checkpointing_steps", 2]
    whole = train(tmp_path / "whole", *arguments, "--max_train_steps", 4)
    run = copy_of(whole, tmp_path / "run", last_step=2)
    train(run, *arguments, "--max_train_steps", 4, "--resume_from_checkpoint", "latest")
    assert without_speed(read_metrics(run)) == without_speed(read_metrics(whole))


def test_resuming_with_a_torn_line_of_metrics(tmp_path, data, finished):
    """A run that was killed while it wrote a line of metrics goes on all the same."""
    run = copy_of(finished, tmp_path / "run", last_step=4)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    train(run, *data, *EMA, "--max_train_steps", 4, "--resume_from_checkpoint", "latest")
    assert read_metrics(run) == read_metrics(finished)


def test_a_named_checkpoint_is_taken_only_undamaged(tmp_path, data, finished):
    run = copy_of(finished, tmp_path / "run", last_step=4)
    (run / "checkpoint-3" / "transformer" / "config.json").unlink()
    with pytest.raises(ValueError, match="`resume_from_checkpoint` must be an undamaged checkpoint") as error:
        train(run, *data, *EMA, "--max_train_steps", 4, "--resume_from_checkpoint", run / "checkpoint-3")
    assert "checkpoint-3" in str(error.value) and "transformer/config.json" in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Other ways to train


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path, data, finished):
    arguments = ["--train_batch_size", 2, "--gradient_accumulation_steps", 2, "--max_train_steps", 2]
    run = train(tmp_path / "run", *data, *arguments, "--ema_decay", 0.2)
    for weights in (lambda folder: raw_weights(folder, 2), lambda folder: averaged_weights(folder / "checkpoint-2")):
        ours, expected = weights(run), weights(finished)
        for name in expected:
            torch.testing.assert_close(ours[name], expected[name], rtol=0, atol=1e-5, msg=lambda m, n=name: n + m)
    first, second = raw_weights(finished, 1), raw_weights(finished, 2)
    assert max((first[name] - second[name]).abs().max() for name in first) > 1e-3  # a step is much more than that
    for ours, expected in zip(read_metrics(run), read_metrics(finished), strict=False):
        for name in ("step", "loss", "loss_with_prior", "loss_without_prior", "grad_norm", "learning_rate"):
            assert ours[name] == pytest.approx(expected[name], rel=1e-4), name


def test_own_rate_for_the_latent_embedder(tmp_path, data, finished):
    """With nearly no rate of its own the LEM stays where it is, and the backbone moves."""
    run = train(tmp_path / "run", *data, "--max_train_steps", 2, "--latent_embedder_learning_rate", 1e-12)
    initial = raw_weights(finished, 1)  # zero-initialised modulation: the first step moves only the output layer
    for name, tensor in raw_weights(run, 2).items():
        if name.startswith("latent_embedder"):
            torch.testing.assert_close(tensor, initial[name], rtol=0, atol=1e-8, msg=lambda m, n=name: n + m)
    moved = raw_weights(run, 2)["transformer.proj_out.weight"] - initial["transformer.proj_out.weight"]
    assert moved.abs().max() > 1e-3


def test_latents_of_an_autoencoder(tmp_path, images):
    """Mirrored images, bf16, gradient checkpointing: the finished pipeline holds the autoencoder too."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
        latents_mean=[0.5, -0.25, 0.0, 0.125],
        latents_std=[1.0, 2.0, 0.5, 1.5],
    )
    vae.save_pretrained(tmp_path / "vae")
    arguments = ["--train_data_dir", images, "--resolution", 16, "--random_flip", "--mixed_precision", "bf16"]
    arguments += ["--gradient_checkpointing", "--pretrained_vae_name_or_path", tmp_path / "vae"]
    arguments += ["--max_train_steps", 2, "--checkpointing_steps", 1, "--checkpoints_total_limit", 1]
    run = train(tmp_path / "run", *arguments)
    latents = LatentDataset(run / "latents")
    assert (len(latents), latents.num_views, latents.latent_shape) == (10, 2, (4, 8, 8))
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-2"]
    assert {tensor.dtype for tensor in raw_weights(run, 2).values()} == {torch.float32}
    pipe = DoDPipeline.from_pretrained(run)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer.config.in_channels == pipe.latent_embedder.config.in_channels == 4
    for name, tensor in vae.state_dict().items():
        assert torch.equal(pipe.vae.state_dict()[name], tensor), name
    assert pipe(["ant"], num_inference_steps=1).images[0].size == (16, 16)
    leaks = [str(path.relative_to(run)) for path in text_files(run) if str(tmp_path) in path.read_text()]
    assert leaks == []


def test_a_plain_fit_trains(tmp_path):
    arguments = ["--preset", "FiTv2-Desk", "--dataset_name", "textures", "--num_train_samples", 48, "--resolution", 8]
    run = train(tmp_path / "run", *arguments, "--max_train_steps", 2, "--checkpointing_steps", 1)
    for line in read_metrics(run):
        assert line["loss_with_prior"] is None and line["loss"] == line["loss_without_prior"] > 0
    first, last = raw_weights(run, 1), raw_weights(run, 2)
    assert not any(name.startswith("latent_embedder") for name in last)
    assert not torch.equal(
        first["transformer.transformer_blocks.0.adaln_up.weight"],
        last["transformer.transformer_blocks.0.adaln_up.weight"],
    )
    pipe = DoDPipeline.from_pretrained(run)
    assert pipe.latent_embedder is None and pipe.config.default_num_stages == 1
    assert pipe.config.id2label["5"] == "marble" and len(pipe.config.id2label) == 12


# ---------------------------------------------------------------------------------------------------------------------
# What a run refuses


def test_a_folder_with_checkpoints_is_not_overwritten(data, finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    with pytest.raises(ValueError, match="`output_dir` .*holds checkpoints.*`--resume_from_checkpoint latest`"):
        train(finished, *data, "--max_train_steps", 4)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (["--random_flip"], "random_flip"),
        (["--resolution", 8], "resolution"),
        (["--latents_dtype", "bfloat16"], "latents_dtype"),
        (["--dataset_name", "textures", "--num_train_samples", 4], "class_names"),
        (["--train_data_dir", "fewer"], "num_images"),
        (["--train_data_dir", "renamed"], "images"),
    ],
)
def test_latents_of_other_images_are_refused(tmp_path, images, finished, other, name):
    run = tmp_path / "run"
    shutil.copytree(finished / "latents", run / "latents")
    for copy in ("fewer", "renamed"):
        shutil.copytree(images, tmp_path / copy)
        path = next((tmp_path / copy).glob("*/*.png"))
        path.unlink() if copy == "fewer" else path.rename(path.with_name("another.png"))
    source = [] if "--dataset_name" in other else ["--train_data_dir", images]
    if "--train_data_dir" in other:
        source, other = ["--train_data_dir", tmp_path / other[1]], []
    with pytest.raises(ValueError, match=says("latents", f"`{name}`", "use another folder")):
        train(run, "--resolution", 16, *source, *other, "--max_train_steps", 1)
    assert [path.name for path in run.iterdir()] == ["latents"]


def test_a_folder_in_which_a_run_trains(tmp_path, data, monkeypatch):
    """A second run is refused before it writes anything, and the first goes on."""
    step, refused = Trainer.train_step, []

    def step_while_another_starts(self):
        step(self)
        before = contents(tmp_path)
        monkeypatch.setattr(Trainer, "train_step", step)
        for arguments in ([], ["--resume_from_checkpoint", "latest"]):
            with pytest.raises(ValueError, match=says("`output_dir`", "another command", f"process {os.getpid()} on")):
                train(tmp_path / "run", *data, "--max_train_steps", 2, *arguments)
            refused.append(contents(tmp_path) == before)

    monkeypatch.setattr(Trainer, "train_step", step_while_another_starts)
    train(tmp_path / "run", *data, "--max_train_steps", 2)
    assert refused == [True, True] and (tmp_path / "run" / "model_index.json").exists()


ACCEPTED = ["--preset", "DoD-Desk", "--dataset_name", "textures", "--output_dir", "run"]


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--output_dir", "run"], ["`dataset_name`", "`train_data_dir`"]),
        ([*ACCEPTED, "--train_data_dir", "here"], ["`dataset_name`", "`train_data_dir`", "'here'"]),
        ([*ACCEPTED, "--preset", "DoD-Huge"], ["--preset", "DoD-Huge", *PRESETS]),
        ([*ACCEPTED, "--preset", "FiTv2-Desk", "--num_latent_tokens", "4"], ["`num_latent_tokens`", "'FiTv2-Desk'"]),
        ([*ACCEPTED, "--preset", "FiTv2-B", "--latent_token_dim", "8"], ["`latent_token_dim`", "'FiTv2-B'"]),
        ([*ACCEPTED, "--lr_scheduler", "none"], ["--lr_scheduler", "cosine"]),
        ([*ACCEPTED, "--mixed_precision", "fp8"], ["--mixed_precision", "bf16"]),
        (["--dataset_name", "textures"], ["--output_dir"]),
    ],
)
def test_arguments_that_do_not_fit(arguments, fragments, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    message = capsys.readouterr().err
    for fragment in fragments:
        assert fragment in message


# ---------------------------------------------------------------------------------------------------------------------
# Watching


def test_losses_by_time_are_those_of_the_samples(finished):
    """The first step's loss is that of a model that answers zero, which each sample's time only sorts."""
    stream = TrainingSamples(LatentDataset(finished / "latents"), SampleDraws(num_classes=2, seed=0))
    by_time: dict[int, list[float]] = {}
    for position in range(4):
        sample = stream[position]
        loss = float((sample["noise"] - sample["latents"]).double().square().mean())
        by_time.setdefault(int(sample["sigma"] * 4), []).append(loss)
    first = read_metrics(finished)[0]
    for index in range(4):
        found = first[f"loss_sigma_{index / 4:.2f}_{(index + 1) / 4:.2f}"]
        assert found == (pytest.approx(np.mean(by_time[index]), rel=1e-4) if index in by_time else None)


def test_trackers_get_the_metrics(tmp_path, data):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = train(tmp_path / "run", *data, "--max_train_steps", 2, "--report_to", "tensorboard", "--hub_token", "secret")
    (folder,) = {path.parent for path in run.rglob("events.out.tfevents.*") if path.parent.name == "diffusers_dod"}
    events = event_accumulator.EventAccumulator(str(folder)).Reload()
    for name in ("loss", "grad_norm", "images_per_second"):
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [step for step, _ in logged] == [1, 2]
        assert [value for _, value in logged] == pytest.approx([line[name] for line in lines], rel=1e-5)
    assert not any(b"secret" in path.read_bytes() for path in run.rglob("*") if path.is_file())


def test_curves_are_drawn(tmp_path, finished, capsys):
    pytest.importorskip("matplotlib")
    from diffusers_dod.training.plot_metrics import main as plot
    from diffusers_dod.training.plot_metrics import smooth

    plot([str(finished), "--output", str(tmp_path / "one.png")])
    plot([str(finished), str(finished), "--output", str(tmp_path / "smooth.png"), "--smoothing", "3"])
    one, smoothed = (np.asarray(Image.open(tmp_path / name)) for name in ("one.png", "smooth.png"))
    assert one.shape == smoothed.shape and one.std() > 5 and (one != smoothed).any()
    np.testing.assert_allclose(smooth(np.array([1.0, 2.0, 3.0, 8.0]), 2), [1, 1.5, 2.5, 5.5])
    with pytest.raises(ValueError, match=says("`run_dirs`", f"got {tmp_path}", "metrics.jsonl")):
        plot([str(tmp_path), "--output", str(tmp_path / "none.png")])


def test_curves_of_evaluations_and_alignment(tmp_path, finished):
    """Panels are there for what a run has: six, and a third row for what not every run has."""
    pytest.importorskip("matplotlib")
    from diffusers_dod.training.plot_metrics import main as plot

    run = tmp_path / "run"
    run.mkdir()
    lines = [line | {"alignment": -0.1} for line in read_metrics(finished)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "evaluations.jsonl").write_text(json.dumps({"step": 4, "num_samples": 9, "fid_stage_1": 5.0}) + "\n")
    for folder, height in ((finished, 960), (run, 1440)):
        plot([str(folder), "--output", str(tmp_path / "curves.png")])
        with Image.open(tmp_path / "curves.png") as image:
            assert image.size == (1800, height)


def test_exact_shares_of_each_micro_batch(tmp_path, data, monkeypatch):
    sizes = []
    forward = DoDJointModel.forward

    def record(self, latents, noise, sigmas, class_labels, num_priors=0):
        sizes.append((len(latents), num_priors))
        return forward(self, latents, noise, sigmas, class_labels, num_priors)

    monkeypatch.setattr(DoDJointModel, "forward", record)
    options = ["--gradient_accumulation_steps", 2, "--max_train_steps", 3, "--exact_dropout"]
    train(tmp_path / "run", *data, *options)
    assert sizes == [(4, 2)] * 6
