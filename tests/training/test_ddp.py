"""
Two processes against one, with copies of the weights (DDP) and with shards of them (FSDP2). `work` is what each of two
processes does, once for all tests, which compare what they have written with one process that sees the joint batch.
"""

import contextlib
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from helpers import fresh_accelerator
from launch import run_forked
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from diffusers_dod import DoDTransformer2DModel, LatentEmbeddingModule, processes
from diffusers_dod.losses import DoDJointModel
from diffusers_dod.options import from_values
from diffusers_dod.processes import StopSignal
from diffusers_dod.training import train as training
from diffusers_dod.training.accelerator import gather_in_bf16, list_sharded_units
from diffusers_dod.training.train import main
from diffusers_dod.training_options import TrainingOptions


# Which of the two processes keeps the prior of its one sample, step by step. A reducer that still waits for a
# parameter of the step before raises in the next one, so the kinds of steps follow each other both ways.
KEPT = [(0, 0), (1, 1), (1, 0), (0, 1), (0, 0), (1, 0), (1, 1)]

ROOT = Path(__file__).parents[2]
TRAIN = "--preset DoD-Desk --resolution 8 --logging_steps 1".split()
# With this epsilon Adam's update is a smooth function of the gradient, so that rounding stays rounding.
TRAIN += "--learning_rate 1e-2 --adam_epsilon 1e-3".split()
RESUME = ["--resume_from_checkpoint", "latest"]


def tiny_model() -> DoDJointModel:
    torch.manual_seed(0)
    transformer = DoDTransformer2DModel(
        sample_size=4,
        in_channels=2,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_classes=3,
        prior_embed_dim=16,
    )
    latent_embedder = LatentEmbeddingModule(
        sample_size=4,
        in_channels=2,
        num_latent_tokens=2,
        latent_token_dim=4,
        num_encoder_layers=1,
        num_decoder_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
    )
    model = DoDJointModel(transformer, latent_embedder)
    with torch.no_grad():  # a fresh model has a gradient in its last layer only
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def draw_samples(step: int) -> dict[str, torch.Tensor]:
    """One sample for each of the two processes."""
    generator = torch.Generator().manual_seed(step)
    return {
        "latents": torch.randn(2, 2, 4, 4, generator=generator),
        "noise": torch.randn(2, 2, 4, 4, generator=generator),
        "sigmas": torch.rand(2, generator=generator),
        "class_labels": torch.randint(0, 4, (2,), generator=generator),
    }


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): parameter.grad.clone() for name, parameter in model.named_parameters()}


def timeouts() -> list[timedelta]:
    """Timeouts of the processes in a step, and of their long waits."""
    groups = torch.distributed.group.WORLD, processes._waiting_group(torch.distributed.group.WORLD)
    return [group._get_backend(torch.device("cpu")).options._timeout for group in groups]


def resume_apart(folder: Path, name: str, sees: list[str | None]) -> None:
    """Resumes in folders that the processes do not share, with the checkpoints of the runs in `sees`, or none."""
    rank = torch.distributed.get_rank()
    place = folder / name / f"place-{rank}"
    (place / "run").mkdir(parents=True)
    if sees[rank] is not None:
        shutil.copytree(folder / sees[rank] / "checkpoint-2", place / "run" / "checkpoint-2")
    with contextlib.chdir(place), pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError) as error:
        patch.setattr(Path, "absolute", lambda self: self)  # one path of two folders, as on two machines
        main([*TRAIN, "--latents_dir", str(folder / "two" / "latents"), "--output_dir", "run", *RESUME])
    (folder / name / f"error-{rank}").write_text(str(error.value))


@fresh_accelerator()
def work(folder: Path) -> None:
    accelerator = training.build_accelerator(from_values(TrainingOptions, {"output_dir": folder}))
    assert timeouts() == [timedelta(minutes=30), timedelta(hours=24)]
    # Some ways to launch two processes run one, and a test of one process would pass.
    assert accelerator.num_processes == torch.distributed.get_world_size() == 2
    rank = accelerator.process_index
    with StopSignal(accelerator) as stop:
        assert not stop.is_received(at_once=False)
        if rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        answers = [stop.is_received(at_once=False) for _ in range(2)]  # the first is that to the question before
        assert answers == [False, True] and stop.is_received() and stop.is_noted() == (rank == 0)
    model = accelerator.prepare(tiny_model())
    assert isinstance(model, torch.nn.parallel.DistributedDataParallel) and not model.find_unused_parameters
    assert model.gradient_as_bucket_view
    for step, kept in enumerate(KEPT):
        own = {name: tensor[rank : rank + 1] for name, tensor in draw_samples(step).items()}
        model.zero_grad()
        accelerator.backward(model(**own, num_priors=kept[rank]).mean())
        save_file(gradients(model), folder / f"gradients-{step}-{rank}.safetensors")
    model = accelerator.prepare(tiny_model())
    # DDP refuses the hook of this name without CUDA, but gloo sums bf16 as well.
    model.register_comm_hook(None, lambda group, bucket: bf16_compress_hook(group, bucket))
    for step, kept in enumerate(KEPT):
        own = {name: tensor[rank : rank + 1] for name, tensor in draw_samples(step).items()}
        model.zero_grad()
        model(**own, num_priors=kept[rank]).mean().backward()
        save_file(gradients(model), folder / f"bf16-gradients-{step}-{rank}.safetensors")

    with sharding():
        accelerator = training.build_accelerator(from_values(TrainingOptions, {"output_dir": folder}))
        assert accelerator.is_fsdp2 and accelerator.num_processes == 2
        sharded = prepare_shards(accelerator)
        for step, kept in enumerate(KEPT):
            own = {name: tensor[rank : rank + 1] for name, tensor in draw_samples(step).items()}
            sharded.zero_grad()
            sharded(**own, num_priors=kept[rank]).mean().backward()
            whole_gradients = {name: gradient.full_tensor() for name, gradient in gradients(sharded).items()}
            save_file(whole_gradients, folder / f"sharded-gradients-{step}-{rank}.safetensors")
    with sharding():
        in_bf16 = from_values(TrainingOptions, {"output_dir": folder, "mixed_precision": "bf16"})
        noted = note_dtypes(training.build_accelerator(in_bf16))
        (folder / f"dtypes-{rank}.json").write_text(json.dumps(noted))
    Accelerator.end_training = lambda self: None  # or the processes could not train again

    def train(name: str, *arguments: str) -> None:
        where = ["--train_data_dir", str(folder / "images"), "--output_dir", str(folder / name)]
        main([*TRAIN, *where, "--train_batch_size", "2", "--max_train_steps", "2", *arguments])

    train("two")
    micro = ["--train_batch_size", "1", "--gradient_accumulation_steps", "2"]  # with no or all priors
    for resumed, whole in (("two-resumed", "two"), ("sharded-resumed", "sharded")):
        averages = ["--ema_decay", "0.999", "0.9"] if whole == "sharded" else []
        with sharding() if whole == "sharded" else contextlib.nullcontext():
            if whole == "sharded":
                train(whole, *averages, "--checkpointing_steps", "1")
            train(resumed, *averages, "--max_train_steps", "1")
            train(resumed, *averages, "--resume_from_checkpoint", "latest")
            train(f"{whole}-micro", *micro)
    train("two-exact", "--exact_dropout")
    fail_to_write(folder, train)
    with pytest.raises(ValueError, match="`gradient_dtype` must be 'fp32' on CPUs.*got 'bf16'"):
        train("two-exact", "--gradient_dtype", "bf16")
    with sharding():
        train("sharded-bf16", "--exact_dropout", "--gradient_dtype", "bf16", "--mixed_precision", "bf16")
    resume_apart(folder, "missing", ["two", None])
    resume_apart(folder, "different", ["two", "two-micro"])
    (folder / f"finished-{rank}").touch()


def fail_to_write(folder: Path, train: Callable[..., None]) -> None:
    """The first process cannot write the checkpoint of step 1, while both go on: both stop, and say why."""
    rank = torch.distributed.get_rank()

    def refuse(*arguments) -> None:
        raise OSError("no such disk")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Exception, match="no such disk") as error:
        patch.setattr(training, "save_checkpoint", refuse)
        train("unwritten", "--max_train_steps", "1000", "--checkpointing_steps", "1")
    (folder / f"unwritten-{rank}").write_text(type(error.value).__name__)


@fresh_accelerator()
def work_hybrid(folder: Path) -> None:
    """Two groups of two processes, each with the whole model in shards; one step, then the other in a resumed run."""
    Accelerator.end_training = lambda self: None  # or the processes could not train again
    run = ["--train_data_dir", folder / "images", "--output_dir", folder / "hybrid", "--train_batch_size", 1]
    train, meshes = training.Trainer.train, []

    def note_mesh_and_train(trainer: training.Trainer) -> bool:
        meshes.append(next(trainer.model.parameters()).device_mesh.shape)
        return train(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Trainer, "train", note_mesh_and_train)
        patch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
        for name in read_configuration("fsdp2_multi_node")["parallelism_config"]:
            patch.setenv(name.upper(), "2")
        for options in (["--max_train_steps", 1], ["--max_train_steps", 2, *RESUME]):
            with sharding("fsdp2_multi_node"):
                main(list(map(str, [*TRAIN, *run, *options])))
    assert meshes == [(2, 2)] * 2


def read_configuration(name: str) -> dict:
    return yaml.safe_load((ROOT / "training" / "accelerate" / f"{name}.yaml").read_text())


@contextlib.contextmanager
def sharding(name: str = "fsdp2") -> Iterator[None]:
    """accelerate's FSDP2, as a file of training/accelerate has it; by itself accelerate makes copies on a CPU."""
    config = read_configuration(name)["fsdp_config"]
    wrapped = config.pop("fsdp_transformer_layer_cls_to_wrap")
    environment = {name.upper(): str(value).lower() for name, value in config.items()}
    environment |= {name: config[name.lower()] for name in ("FSDP_AUTO_WRAP_POLICY", "FSDP_STATE_DICT_TYPE")}
    environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_TRANSFORMER_CLS_TO_WRAP": wrapped}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ACCELERATE_USE_CPU")
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr(PartialState, "_prepare_backend", lambda *_: ("gloo", DistributedType.MULTI_GPU))
        patch.setattr(PartialState, "set_device", lambda self: setattr(self, "device", torch.device("cpu")))
        AcceleratorState._reset_state(True)
        yield
    AcceleratorState._reset_state(True)


def prepare_shards(accelerator: Accelerator, has_equal_priors: bool = False) -> DoDJointModel:
    model = tiny_model()
    units = list_sharded_units(model, has_equal_priors)
    accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = units
    model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return model


def note_dtypes(accelerator: Accelerator) -> dict[str, list[str]]:
    """Data types of some weights as they are gathered, and of all their gradients, in bf16."""
    model = prepare_shards(accelerator, has_equal_priors=True)
    gather_in_bf16(model)
    noted: dict[str, list[str]] = {
        "units": [name for name, part in model.named_modules() if isinstance(part, FSDPModule)]
    }
    for name in ("transformer_blocks.1.ff.net.2", "time_embed.mlp.linear_1", "proj_out"):
        part = model.get_submodule(f"transformer.{name}")
        part.register_forward_hook(lambda part, _, output, name=name: noted.update({name: [str(part.weight.dtype)]}))
    part = model.latent_embedder.decoder_blocks[0].ff.net[2]
    part.register_forward_hook(lambda part, _, output: noted.update({"embedder": [str(part.weight.dtype)]}))
    with accelerator.autocast():
        loss = model(**draw_samples(0), num_priors=1).mean()
    loss.backward()
    noted["gradients"] = sorted({str(parameter.grad.dtype) for parameter in model.parameters()})
    noted["loss"] = [str(loss.dtype)]
    return noted


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    for i, name in enumerate(("ant", "newt")):
        (folder / "images" / name).mkdir(parents=True)
        for j in range(4):
            Image.radial_gradient("L").rotate(40 * i + 90 * j).resize((20 + j, 20)).save(
                folder / "images" / name / f"{j}.png"
            )
    run_forked(work, folder, output=folder / "output")
    assert sorted(path.name for path in folder.glob("finished-*")) == ["finished-0", "finished-1"]
    return folder


@pytest.mark.parametrize("kind", ["", "sharded-"], ids=["DDP", "FSDP2"])
@pytest.mark.parametrize("step", range(len(KEPT)), ids=[f"{i}: {kept}" for i, kept in enumerate(KEPT)])
def test_gradients_are_those_of_the_joint_batch(folder, step, kind):
    first, second = (load_file(folder / f"{kind}gradients-{step}-{rank}.safetensors") for rank in range(2))
    kept = KEPT[step]
    order = [0, 1] if kept[0] >= kept[1] else [1, 0]  # priors first
    model = tiny_model()
    model(
        **{name: tensor[order] for name, tensor in draw_samples(step).items()}, num_priors=sum(kept)
    ).mean().backward()
    expected = gradients(model)
    assert first.keys() == second.keys() == expected.keys()
    for name in expected:
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: n + m)
    sample_token = expected["transformer.sample_token"].abs().max()
    embedder = expected["latent_embedder.latent_queries"].abs().max()
    assert (sample_token > 1e-4) == (sum(kept) < 2) and (embedder > 1e-4) == (sum(kept) > 0)


@pytest.mark.parametrize("step", range(len(KEPT)))
def test_gradients_that_are_exchanged_in_bf16_are_close(folder, step):
    kinds = "gradients", "bf16-gradients"
    exact, first = (load_file(folder / f"{kind}-{step}-0.safetensors") for kind in kinds)
    second = load_file(folder / f"bf16-gradients-{step}-1.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in exact)
    exact, first = (torch.cat([gradients[name].flatten() for name in exact]) for gradients in (exact, first))
    assert 0 < (first - exact).norm() < 2**-7 * exact.norm()


def weights(run: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoint-2" / name)


STATES = [
    "training_state/model.safetensors",
    "training_state/optimizer.safetensors",
    "transformer/diffusion_pytorch_model.safetensors",
    "latent_embedder/diffusion_pytorch_model.safetensors",
]


@pytest.mark.parametrize("kind", ["two", "sharded"])
def test_a_resumed_run_is_the_same_run(folder, kind):
    """One step, then the other in a run of its own: the files of the last checkpoint, metrics included, are equal."""
    ours, expected = (
        json.loads((folder / name / "checkpoint-2" / "manifest.json").read_text())["sha256"]
        for name in (f"{kind}-resumed", kind)
    )
    assert ours == expected and {*STATES, "training_state/state.json"} <= ours.keys()
    lines = [
        [
            {name: value for name, value in json.loads(line).items() if name not in ("images_per_second", "data_wait")}
            for line in (folder / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in (f"{kind}-resumed", kind)
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 2


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("kind", ["two-micro", "sharded", "sharded-micro"])
def test_shards_and_micro_batches_of_one_sample_change_nothing(folder, kind, name):
    ours, expected = weights(folder / kind, name), weights(folder / "two", name)
    assert ours.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(ours[key], expected[key], rtol=1e-4, atol=1e-5, msg=lambda m, k=key: k + m)


def test_blocks_are_gathered_in_bf16_and_the_embedding_of_times_in_fp32(folder):
    blocks = [f"transformer.transformer_blocks.{index}" for index in (0, 1)]
    blocks += [f"latent_embedder.{part}_blocks.0" for part in ("encoder", "decoder")]
    for rank in range(2):
        noted = json.loads((folder / f"dtypes-{rank}.json").read_text())
        assert set(noted.pop("units")) == {"", *blocks}
        assert noted == {
            "transformer_blocks.1.ff.net.2": ["torch.bfloat16"],
            "embedder": ["torch.bfloat16"],
            "time_embed.mlp.linear_1": ["torch.float32"],
            "proj_out": ["torch.float32"],
            "gradients": ["torch.float32"],
            "loss": ["torch.float32"],
        }


def test_a_checkpoint_that_cannot_be_written_ends_both(folder):
    names = [(folder / f"unwritten-{rank}").read_text() for rank in range(2)]
    assert names == ["OSError", "OtherProcessError"]
    assert not list((folder / "unwritten").glob("checkpoint-*"))


@pytest.mark.parametrize("name", STATES[:1])
def test_shards_in_bf16_are_close(folder, name):
    """As close as bf16 is, and not the same."""
    ours, expected = weights(folder / "sharded-bf16", name), weights(folder / "two-exact", name)
    assert any(not torch.equal(ours[key], expected[key]) for key in expected)
    for key in expected:
        torch.testing.assert_close(ours[key], expected[key], rtol=0, atol=5e-3, msg=lambda m, k=key: k + m)


@pytest.mark.slow
@pytest.mark.parametrize("name", STATES)
def test_copies_of_shards_change_nothing(folder, hybrid, name):
    ours, expected = weights(hybrid, name), weights(folder / "two", name)
    assert ours.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(ours[key], expected[key], rtol=1e-4, atol=1e-5, msg=lambda m, k=key: k + m)


@pytest.fixture(scope="module")
def hybrid(folder) -> Path:
    run_forked(work_hybrid, folder, output=folder / "hybrid-output", num_processes=4)
    return folder / "hybrid"


def test_an_average_of_shards_is_written_as_a_whole(folder):
    average = weights(folder / "sharded", "training_state/ema-decay-0.9.safetensors")
    first, last = (
        load_file(folder / "sharded" / f"checkpoint-{step}" / "training_state" / "model.safetensors")
        for step in (1, 2)
    )
    for name, value in average.items():  # the ramp's decay in step 2 is 2 / 11
        torch.testing.assert_close(value, 2 / 11 * first[name] + 9 / 11 * last[name], rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def one(folder) -> Path:
    """The same training by one process with twice the batch."""
    with fresh_accelerator():
        arguments = ["--train_data_dir", str(folder / "images"), "--output_dir", str(folder / "one")]
        main([*TRAIN, *arguments, "--train_batch_size", "4", "--max_train_steps", "2"])
    return folder / "one"


@pytest.mark.parametrize("name", STATES)
def test_weights_are_those_of_one_process(folder, one, name):
    ours, expected = weights(folder / "two", name), weights(one, name)
    assert ours.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(ours[key], expected[key], rtol=0, atol=1e-5, msg=lambda m, k=key: k + m)


@pytest.mark.parametrize("name", ["missing", "different"])
def test_processes_that_see_different_checkpoints_all_refuse(folder, name):
    for rank in range(2):
        error = (folder / name / f"error-{rank}").read_text()
        assert re.match(
            "`output_dir` must be a folder that all processes share, got run/checkpoint-2, .*1 sees", error
        )
        assert ("FileNotFoundError" in error) == (name == "missing")
        assert not (folder / name / f"place-{rank}" / "run" / "metrics.jsonl").exists()


def test_latents_are_those_of_one_process(folder, one):
    ours, expected = (
        {path.name: path.read_bytes() for path in (run / "latents").iterdir()} for run in (folder / "two", one)
    )
    assert ours == expected and "manifest.json" in ours


def test_metrics_are_those_of_one_process(folder, one):
    """Losses are averaged over the samples of all processes, and each line is written once."""
    ours, expected = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (folder / "two", one)
    )
    assert [line["step"] for line in ours] == [line["step"] for line in expected] == [1, 2]
    for our_line, line in zip(ours, expected, strict=True):
        for name in ("loss", "loss_with_prior", "loss_without_prior", "grad_norm", "learning_rate"):
            assert our_line[name] == pytest.approx(line[name], rel=1e-4), name
