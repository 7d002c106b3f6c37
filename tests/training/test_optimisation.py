"""Averages of the weights beside the first one, steps that are not finite, compiled blocks."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import contents, run_trainer, says, tiny_latent_embedder, tiny_transformer
from safetensors.torch import load_file

from diffusers_dod import DoDPipeline, DoDTransformer2DModel, LatentEmbeddingModule
from diffusers_dod.checkpoint_manifest import STATE_FOLDER
from diffusers_dod.data.sample_stream import TrainingSamples
from diffusers_dod.losses import DoDJointModel
from diffusers_dod.options import parse_options
from diffusers_dod.training import posthoc_ema
from diffusers_dod.training.models import use_fast_attention
from diffusers_dod.training.run_metrics import TrainingMetrics
from diffusers_dod.training.train import Trainer
from diffusers_dod.training_options import TrainingOptions
from diffusers_dod.transformer_dod import DoDAttention


TINY = "--preset DoD-Desk --train_batch_size 4 --logging_steps 1 --learning_rate 1e-2 --adam_epsilon 1e-3 "
TINY = (TINY + "--dataset_name textures --num_train_samples 16 --resolution 8 --checkpointing_steps 1").split()
AVERAGES = "--ema_decay 0.5 0.9 --ema_sigma_rel 0.1 0.2".split()
RARE = ["--checkpointing_steps", 100]
NAMES = ("decay-0.9", "sigma-rel-0.1", "sigma-rel-0.2")


train = partial(run_trainer, TINY)


def state(run: Path, step: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoint-{step}" / STATE_FOLDER / f"{name}.safetensors")


def assert_equal(tensors: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert list(tensors) == list(others)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Four uninterrupted steps; read only."""
    return train(tmp_path_factory.mktemp("finished") / "run", *AVERAGES, "--max_train_steps", 4)


# ---------------------------------------------------------------------------------------------------------- averages


def test_averages_follow_the_raw_weights(finished):
    raw = [state(finished, step, "model") for step in range(1, 5)]
    for name, decay in (("decay-0.9", lambda step: min(0.9, step / (9 + step)) if step > 1 else 0.0),):
        expected = raw[0]
        for step in range(2, 5):
            rate = decay(step)
            expected = {key: rate * expected[key] + (1 - rate) * raw[step - 1][key] for key in expected}
        for key, value in state(finished, 4, f"ema-{name}").items():
            torch.testing.assert_close(value, expected[key])
    differing = {name: state(finished, 4, f"ema-{name}") for name in NAMES}
    key = "transformer.proj_out.weight"
    assert len({tensors[key].sum().item() for tensors in differing.values()}) == 3


@pytest.mark.slow
def test_a_resumed_run_has_the_same_averages(finished, tmp_path):
    run = train(tmp_path / "run", *AVERAGES, "--max_train_steps", 2)
    train(run, *AVERAGES, "--max_train_steps", 4, "--resume_from_checkpoint", "latest")
    for name in ("model", "optimizer", *(f"ema-{name}" for name in NAMES)):
        assert_equal(state(run, 4, name), state(finished, 4, name))


def test_an_average_cannot_start_in_the_middle(finished, tmp_path):
    run = train(tmp_path / "run", "--max_train_steps", 1)
    with pytest.raises(ValueError, match=says("`resume_from_checkpoint`", "'sigma-rel-0.1'", "middle of a run")):
        again = ["--max_train_steps", 2, "--resume_from_checkpoint", "latest", "--allow_changed", "ema_sigma_rel"]
        train(run, "--ema_sigma_rel", 0.1, *again)


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--ema_decay", 1.5], ["`ema_decay`", "[0, 1]", "got 1.5"]),
        (["--ema_decay", 0.9, 0.9], ["`ema_decay`", "different", "got [0.9, 0.9]"]),
        (["--ema_sigma_rel", 0.3], ["`ema_sigma_rel`", "(0, 0.288", "got 0.3"]),
        (["--ema_sigma_rel", 0], ["`ema_sigma_rel`", "(0, 0.288", "got 0"]),
        (["--ema_sigma_rel", 0.1, 0.1], ["`ema_sigma_rel`", "different", "got [0.1, 0.1]"]),
        (["--max_nonfinite_steps", -1], ["`max_nonfinite_steps`", ">= 0", "got -1"]),
    ],
)
def test_bad_options(tmp_path, capsys, arguments, fragments):
    with pytest.raises(SystemExit):
        parse_options(TrainingOptions, [*TINY, "--output_dir", str(tmp_path), *map(str, arguments)])
    message = capsys.readouterr().err
    assert all(fragment in message for fragment in fragments), message


def test_a_recorded_average_is_reconstructed(finished):
    pipeline, rest = posthoc_ema.reconstruct(finished, 0.2, step=3)
    model = DoDJointModel(pipeline.transformer, pipeline.latent_embedder)
    assert rest < 1e-3
    for name, value in state(finished, 3, "ema-sigma-rel-0.2").items():
        torch.testing.assert_close(model.state_dict()[name], value, atol=1e-4, rtol=1e-3)


def test_the_command_writes_a_pipeline(finished, tmp_path, capsys):
    posthoc_ema.main(["--run_dir", str(finished), "--sigma_rel", "0.15", "--output_dir", str(tmp_path / "out")])
    assert "Error of the profile" in capsys.readouterr().out
    pipeline = DoDPipeline.from_pretrained(tmp_path / "out")
    weight = pipeline.transformer.proj_out.weight
    recorded = [state(finished, 4, f"ema-sigma-rel-{width}")["transformer.proj_out.weight"] for width in (0.1, 0.2)]
    assert all((weight - other).abs().max() > 1e-6 for other in recorded)
    # Between the two.
    assert (weight - recorded[0]).norm() < (recorded[1] - recorded[0]).norm()


def test_a_run_without_snapshots_is_refused(tmp_path):
    run = train(tmp_path / "run", "--max_train_steps", 1)
    with pytest.raises(ValueError, match=says("`run_dir`", "--ema_sigma_rel", f"got {run}")):
        posthoc_ema.reconstruct(run, 0.1)


# ---------------------------------------------------------------------------------------------- steps without numbers


@pytest.fixture
def spoil(monkeypatch):
    """Makes the gradient of one weight infinite or NaN in chosen steps."""

    def choose(steps):
        forward, calls = DoDJointModel.forward, []

        def spoiled(self, *args, **kwargs):
            calls.append(None)
            losses = forward(self, *args, **kwargs)
            if len(calls) in steps:  # a finite loss, but for what one weight gets
                losses = losses + (self.transformer.x_embedder.bias * 0).sqrt().sum()
            return losses

        monkeypatch.setattr(DoDJointModel, "forward", spoiled)

    return choose


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path, spoil, caplog):
    spoil({2})
    run = train(tmp_path / "run", "--max_train_steps", 3)
    first, second, third = (state(run, step, "model") for step in (1, 2, 3))
    assert_equal(first, second)
    assert all(tensor.isfinite().all() for tensor in third.values())
    assert any(not torch.equal(third[name], second[name]) for name in third)
    folder = run / "checkpoint-3" / STATE_FOLDER
    assert json.loads((folder / "state.json").read_text())["num_nonfinite_steps"] == 1
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] is None for line in lines] == [line["grad_norm"] is None for line in lines]
    assert [line["loss"] is None for line in lines] == [False, True, False]  # not a loss of nothing


def test_too_many_of_them_end_the_run_with_a_report(tmp_path, spoil):
    spoil({2, 3, 4})
    with pytest.raises(FloatingPointError, match=says("3 steps in a row", "step 4", "`max_nonfinite_steps` = 2")):
        train(tmp_path / "run", "--max_train_steps", 9, "--max_nonfinite_steps", 2)
    report = json.loads((tmp_path / "run" / "nonfinite-step-4.json").read_text())
    assert report["step"] == 4 and report["stream_positions"] == [12, 16]
    assert report["nonfinite_weights"] == []
    assert report["nonfinite_gradients"] == ["transformer.x_embedder.bias"]


def test_they_end_the_run_with_the_next_line(tmp_path, spoil):
    spoil({1, 2})
    with pytest.raises(
        FloatingPointError, match=says("2 steps in a row", "up to step 2", "`max_nonfinite_steps` = 1")
    ):
        train(tmp_path / "run", "--max_train_steps", 9, "--max_nonfinite_steps", 1, "--logging_steps", 3, *RARE)
    report = json.loads((tmp_path / "run" / "nonfinite-step-2.json").read_text())
    assert report["step"] == 2 and report["stream_positions"] == [4, 8]
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.slow
def test_good_steps_in_between_start_the_count_anew(tmp_path, spoil):
    spoil({1, 3, 5})
    run = train(tmp_path / "run", "--max_train_steps", 6, "--max_nonfinite_steps", 1)
    folder = run / "checkpoint-6" / STATE_FOLDER
    assert json.loads((folder / "state.json").read_text())["num_nonfinite_steps"] == 3


@pytest.mark.parametrize(("every", "what"), [(1, "weight"), (4, "average")])
def test_weights_that_are_not_finite_reach_no_checkpoint(tmp_path, monkeypatch, finished, every, what):
    """The run ends with an error, the good checkpoint stays though it is one too many, and nothing is finished."""
    step = Trainer.train_step

    def spoiled(self):
        step(self)
        if self.step == 3:
            weights = self.joint_model.parameters() if what == "weight" else self.emas["sigma-rel-0.1"].shadow_params
            next(iter(weights)).data.view(-1)[0] = float("nan")

    run = train(tmp_path / "run", *AVERAGES, "--max_train_steps", 2, "--checkpoints_total_limit", 1)
    arguments = [*AVERAGES, "--max_train_steps", 4, "--resume_from_checkpoint", "latest"]
    arguments += ["--checkpoints_total_limit", 1, "--checkpointing_steps", every]
    before = contents(run / "checkpoint-2")
    (run / "model_index.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", spoiled)
        found = says("not finite", "sigma-rel-0.1" if what == "average" else "transformer.", "checkpoint-2")
        with pytest.raises(FloatingPointError, match=found):
            train(run, *arguments)
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-2"]
    assert contents(run / "checkpoint-2") == before and not (run / "model_index.json").exists()
    train(run, *arguments)
    assert_equal(state(run, 4, "model"), state(finished, 4, "model"))


def test_a_checkpoint_that_is_not_finite_is_not_resumed(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_check_weights", spoil_average)
        run = train(tmp_path / "run", "--max_train_steps", 1)
    again = ["--max_train_steps", 1, "--resume_from_checkpoint"]
    with pytest.raises(FloatingPointError, match=says("not finite", "transformer.", "decay-", "checkpoint-1")):
        train(tmp_path / "other", *again, run / "checkpoint-1")
    with pytest.raises(ValueError, match=says("`output_dir`", "finite weights, got none")):
        train(run, *again, "latest")


def spoil_average(trainer: Trainer) -> None:
    trainer.ema.shadow_params[0].view(-1)[0] = float("inf")


# -------------------------------------------------------------------------------------------------------------- speed


def test_the_next_batch_is_read_before_a_line_is_written(tmp_path, monkeypatch):
    read, seen, write, getitem = [], [], TrainingMetrics.write, TrainingSamples.__getitem__
    monkeypatch.setattr(TrainingSamples, "__getitem__", lambda self, i: read.append(i) or getitem(self, i))
    monkeypatch.setattr(TrainingMetrics, "write", lambda *args: seen.append(len(read)) or write(*args))
    train(tmp_path / "run", "--max_train_steps", 3, *RARE)
    assert seen == [8, 12, 12]  # batches of 4


def test_an_error_of_the_data_costs_no_checkpoint_before_it(tmp_path, monkeypatch):
    getitem = TrainingSamples.__getitem__

    def damaged(self, position):
        if position >= 8:  # the third step
            raise OSError("damaged")
        return getitem(self, position)

    monkeypatch.setattr(TrainingSamples, "__getitem__", damaged)
    with pytest.raises(OSError, match="damaged"):
        train(tmp_path / "run", "--max_train_steps", 4)
    assert (tmp_path / "run" / "checkpoint-2").exists()


@pytest.mark.slow
def test_blocks_are_compiled_when_asked_for(tmp_path, monkeypatch):
    compiled = []
    for cls in (DoDTransformer2DModel, LatentEmbeddingModule):
        monkeypatch.setattr(cls, "compile_repeated_blocks", lambda self, cls=cls: compiled.append(cls))
    train(tmp_path / "plain", "--max_train_steps", 1)
    assert compiled == []
    train(tmp_path / "run", "--max_train_steps", 1, "--compile")
    assert compiled == [DoDTransformer2DModel, LatentEmbeddingModule]


def test_tf32_when_asked_for(tmp_path):
    before = torch.get_float32_matmul_precision()
    try:
        train(tmp_path / "run", "--max_train_steps", 1, "--allow_tf32")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("backend", [None, "_native_efficient"])
def test_attention_of_a_device(backend):
    """cuDNN, which makes a plan for each new shape, is no choice on CUDA, and a backend is one for both models."""
    model = DoDJointModel(tiny_transformer(), tiny_latent_embedder())

    def backends(part: torch.nn.Module) -> set[str]:
        processors = [module.processor for module in part.modules() if isinstance(module, DoDAttention)]
        return {processor._attention_backend and processor._attention_backend.value for processor in processors}

    try:
        use_fast_attention(model, torch.device("cuda"), backend)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert backends(model.transformer) == backends(model.latent_embedder) == {backend}
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
    use_fast_attention(model, torch.device("cpu"))
    assert backends(model.transformer) == {"_native_math"} and backends(model.latent_embedder) == {backend}
