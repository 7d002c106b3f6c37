"""Checkpoints: bit-identical, never half written, damage is found, and the last valid one stays."""

import json
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import contents, says
from launch import PATIENCE_S, wait_until

from diffusers_dod.checkpoint_manifest import CHECKPOINT_MANIFEST, STATE_FOLDER, find_damage
from diffusers_dod.training.checkpoints import (
    CheckpointWriter,
    checkpoint_step,
    find_latest_checkpoint,
    gather_training_state,
    list_checkpoints,
    load_training_state,
    save_checkpoint,
    save_training_state,
    set_aside_later,
)


# ---------------------------------------------------------------------------------------------------------------------
# The training state

STATE = {"step": 0, "num_nonfinite_steps": 0, "nonfinite_in_a_row": 0, "average": "0.9", "gradient_scaler": None}


def model_and_optimizer(seed: int) -> tuple[torch.nn.Module, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.SiLU(), torch.nn.Linear(7, 3))
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), "lr": 3e-3}]
    return model, torch.optim.AdamW(groups, lr=1e-2, fused=True)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_identical(first, second, where: str = "") -> None:
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and torch.equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_identical(first[key], second[key], f"{where}/{key}")
    else:
        assert first == second, where


def test_round_trip_is_bit_identical(tmp_path):
    model, optimizer = model_and_optimizer(seed=0)
    train(model, optimizer, steps=3)
    state = STATE | {"step": 3, "lr_scheduler": {"last_epoch": 3, "_last_lr": [0.1, 1 / 3]}}
    save_training_state(tmp_path, gather_training_state(model, optimizer), state)

    other_model, other_optimizer = model_and_optimizer(seed=1)
    assert load_training_state(tmp_path, other_model, other_optimizer) == state
    assert_identical(dict(other_model.state_dict()), dict(model.state_dict()))
    assert_identical(other_optimizer.state_dict()["state"], optimizer.state_dict()["state"])
    assert optimizer.state_dict()["state"][0]["step"] == 3  # there is something to compare

    # The next steps need both moments and the step count of every parameter.
    train(model, optimizer, steps=2)
    train(other_model, other_optimizer, steps=2)
    assert_identical(dict(other_model.state_dict()), dict(model.state_dict()))


def test_the_groups_are_those_of_the_run(tmp_path):
    """A run may be resumed with another learning rate."""
    model, optimizer = model_and_optimizer(seed=0)
    train(model, optimizer, steps=1)
    save_training_state(tmp_path, gather_training_state(model, optimizer), STATE)
    other_model, other_optimizer = model_and_optimizer(seed=0)
    other_optimizer.param_groups[0]["lr"] = 0.5
    load_training_state(tmp_path, other_model, other_optimizer)
    assert [group["lr"] for group in other_optimizer.param_groups] == [0.5, 3e-3]
    assert other_optimizer.param_groups[0]["fused"]


def test_a_state_before_the_first_step(tmp_path):
    model, optimizer = model_and_optimizer(seed=0)
    save_training_state(tmp_path, gather_training_state(model, optimizer), STATE)
    other_model, other_optimizer = model_and_optimizer(seed=1)
    assert load_training_state(tmp_path, other_model, other_optimizer) == STATE
    assert_identical(dict(other_model.state_dict()), dict(model.state_dict()))
    assert other_optimizer.state_dict()["state"] == {}


def test_moments_of_another_optimizer_are_refused(tmp_path):
    model, optimizer = model_and_optimizer(seed=0)
    train(model, optimizer, steps=1)
    save_training_state(tmp_path, gather_training_state(model, optimizer), STATE)
    plain = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match=says("`resume_from_checkpoint`", str(tmp_path), "0.exp_avg is left over")):
        load_training_state(tmp_path, model, plain)
    (tmp_path / STATE_FOLDER / "optimizer.safetensors").unlink()
    with pytest.raises(ValueError, match=says("`resume_from_checkpoint`", str(tmp_path), "without")):
        load_training_state(tmp_path, model, optimizer)


def test_loading_leaves_the_weights_as_saved_under_weight_decay(tmp_path):
    """Loading makes an optimizer step to create the moments; it must change nothing."""
    model, optimizer = model_and_optimizer(seed=0)
    train(model, optimizer, steps=1)
    save_training_state(tmp_path, gather_training_state(model, optimizer), STATE)
    other, _ = model_and_optimizer(seed=1)
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=0.3, weight_decay=0.5, fused=True)
    load_training_state(tmp_path, other, other_optimizer)
    assert_identical(dict(other.state_dict()), dict(model.state_dict()))
    assert other_optimizer.param_groups[0]["lr"] == 0.3
    assert all(parameter.grad is None for parameter in other.parameters())


def test_no_pickles(tmp_path):
    model, optimizer = model_and_optimizer(seed=0)
    train(model, optimizer, steps=1)
    save_training_state(tmp_path, gather_training_state(model, optimizer), STATE | {"step": 1})
    names = sorted(path.name for path in (tmp_path / STATE_FOLDER).iterdir())
    assert names == ["model.safetensors", "optimizer.safetensors", "state.json"]


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def write(folder: Path) -> None:
    (folder / "transformer").mkdir()
    (folder / "transformer" / "weights.safetensors").write_bytes(bytes(range(256)) * 20)
    (folder / "model_index.json").write_text("{}")


def save(output_dir: Path, step: int, **arguments) -> Path:
    return save_checkpoint(output_dir, step, write, **arguments)


def weights(checkpoint: Path) -> Path:
    return checkpoint / "transformer" / "weights.safetensors"


def remove_file(checkpoint: Path) -> None:
    weights(checkpoint).unlink()


def truncate(checkpoint: Path) -> None:
    weights(checkpoint).write_bytes(weights(checkpoint).read_bytes()[:-1])


def empty(checkpoint: Path) -> None:
    weights(checkpoint).write_bytes(b"")


def flip_a_bit(checkpoint: Path) -> None:
    """Same size, same time stamp as far as anybody looks: only a hash shows it."""
    content = bytearray(weights(checkpoint).read_bytes())
    content[2000] ^= 1
    weights(checkpoint).write_bytes(content)


def remove_manifest(checkpoint: Path) -> None:
    (checkpoint / CHECKPOINT_MANIFEST).unlink()


def manifest_of(content: str | bytes):
    def damage(checkpoint: Path) -> None:
        content_ = content.encode() if isinstance(content, str) else content
        (checkpoint / CHECKPOINT_MANIFEST).write_bytes(content_)

    return damage


def edit_manifest(edit):
    def damage(checkpoint: Path) -> None:
        manifest = json.loads((checkpoint / CHECKPOINT_MANIFEST).read_text())
        edit(manifest)
        (checkpoint / CHECKPOINT_MANIFEST).write_text(json.dumps(manifest))

    return damage


def add_index(checkpoint: Path) -> None:
    """With it the loader would take other weights."""
    (checkpoint / "transformer" / "model.safetensors.index.json").write_text("{}")


def add_folder(checkpoint: Path) -> None:
    (checkpoint / "vae").mkdir()
    (checkpoint / "vae" / "config.json").write_text("{}")


DAMAGES = {
    "missing file": (remove_file, "transformer/weights.safetensors"),
    "truncated file": (truncate, "transformer/weights.safetensors"),
    "empty file": (empty, "transformer/weights.safetensors"),
    "flipped bit": (flip_a_bit, "transformer/weights.safetensors"),
    "missing manifest": (remove_manifest, CHECKPOINT_MANIFEST),
    "empty manifest": (manifest_of(""), CHECKPOINT_MANIFEST),
    "torn manifest": (manifest_of('{"step": 1, "sha2'), CHECKPOINT_MANIFEST),
    "manifest of zero bytes": (manifest_of(b"\0" * 200), CHECKPOINT_MANIFEST),
    "manifest that is no text": (manifest_of(b"\xff\xfe\x81"), CHECKPOINT_MANIFEST),
    "manifest without hashes": (manifest_of('{"step": 1}'), CHECKPOINT_MANIFEST),
    "manifest of another shape": (manifest_of("[]"), CHECKPOINT_MANIFEST),
    "nested manifest": (manifest_of("[" * 100_000), CHECKPOINT_MANIFEST),
    "manifest with a list of hashes": (manifest_of('{"step": 10, "sha256": [1]}'), CHECKPOINT_MANIFEST),
    "manifest that is empty of hashes": (
        edit_manifest(lambda manifest: manifest["sha256"].clear()),
        "model_index.json",
    ),
    "manifest with fewer hashes": (
        edit_manifest(lambda manifest: manifest["sha256"].pop("transformer/weights.safetensors")),
        "transformer/weights.safetensors",
    ),
    "manifest of another step": (edit_manifest(lambda manifest: manifest.update(step=7)), "step 7"),
    "manifest with a file elsewhere": (
        edit_manifest(lambda manifest: manifest["sha256"].update({"../other.json": "0" * 64})),
        "'../other.json'",
    ),
    "unknown file": (add_index, "transformer/model.safetensors.index.json"),
    "unknown folder": (add_folder, "vae/config.json"),
}
each_damage = pytest.mark.parametrize(("damage", "culprit"), DAMAGES.values(), ids=DAMAGES)


def test_an_undamaged_checkpoint(tmp_path):
    checkpoint = save(tmp_path, 10)
    assert checkpoint == tmp_path / "checkpoint-10"
    assert find_damage(checkpoint) is None and find_latest_checkpoint(tmp_path) == checkpoint
    manifest = json.loads((checkpoint / CHECKPOINT_MANIFEST).read_text())
    assert manifest["step"] == 10 == checkpoint_step(checkpoint)
    assert set(manifest["sha256"]) == {"transformer/weights.safetensors", "model_index.json"}


def test_a_card_and_hidden_files_are_no_damage(tmp_path):
    """As the Hub, file managers and network file systems leave them."""
    checkpoint = save(tmp_path, 10)
    (checkpoint / "samples").mkdir()
    for name in ("README.md", "metrics.jsonl", ".gitattributes", "transformer/.DS_Store", "samples/step-1.png"):
        (checkpoint / name).write_text("...")
    assert find_damage(checkpoint) is None


@each_damage
def test_damage_is_found_and_named(tmp_path, damage, culprit):
    checkpoint = save(tmp_path, 10)
    damage(checkpoint)
    found = find_damage(checkpoint)
    assert found is not None and culprit in found


@each_damage
def test_the_newest_undamaged_checkpoint_is_taken(tmp_path, damage, culprit, caplog):
    checkpoints = [save(tmp_path, step) for step in (9, 10, 100)]  # 100 comes last by number, not by name
    assert find_latest_checkpoint(tmp_path) == checkpoints[2]
    damage(checkpoints[2])
    assert find_latest_checkpoint(tmp_path) == checkpoints[1]
    assert "checkpoint-100" in caplog.text and culprit in caplog.text  # and the user hears of it
    damage(checkpoints[1])
    assert find_latest_checkpoint(tmp_path) == checkpoints[0]
    damage(checkpoints[0])
    assert find_latest_checkpoint(tmp_path) is None


def test_no_checkpoint_at_all(tmp_path):
    assert find_latest_checkpoint(tmp_path) is None
    assert find_latest_checkpoint(tmp_path / "nothing") is None
    assert find_damage(tmp_path / "checkpoint-3") is not None


def test_only_finished_checkpoints_are_listed(tmp_path):
    save(tmp_path, 5)
    for name in (".unfinished-checkpoint-7", "checkpoint-8-copy", "checkpoint-best", "checkpoint-"):
        save(tmp_path / "elsewhere", 9).rename(tmp_path / name)  # all of them complete and undamaged
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-5"]
    assert find_latest_checkpoint(tmp_path).name == "checkpoint-5"


@pytest.mark.parametrize("file", ["model", "ema-decay-0.9", "optimizer"])
def test_a_checkpoint_that_is_not_finite_is_passed_over(tmp_path, file, caplog):
    def write_state(folder: Path, value: float) -> None:
        write(folder)
        names = ("model", "ema-decay-0.9", "optimizer")
        tensors = {name: {"weight": torch.tensor([1.0, value if name == file else 2.0])} for name in names}
        save_training_state(folder, tensors, {})

    sound = save_checkpoint(tmp_path, 1, partial(write_state, value=3.0))
    save_checkpoint(tmp_path, 2, partial(write_state, value=float("nan")))
    assert find_latest_checkpoint(tmp_path) == sound
    assert f"checkpoint-2: weight in training_state/{file}.safetensors is not finite" in caplog.text


def test_later_checkpoints_are_set_aside(tmp_path, caplog):
    for _ in range(2):  # the second branch is left, too
        for step in (1, 2, 10):
            save(tmp_path, step)
        set_aside_later(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-1",
        *(f"checkpoint-{step}-abandoned{number}" for step in (10, 2) for number in ("", "-2")),
    ]
    assert find_latest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert find_damage(tmp_path / "checkpoint-10-abandoned") is None
    assert "checkpoint-10 is now checkpoint-10-abandoned-2" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# A crash while writing


class Crash(Exception):
    pass


def write_half(folder: Path) -> None:
    write(folder)
    (folder / STATE_FOLDER).mkdir()
    (folder / STATE_FOLDER / "model.safetensors").write_bytes(b"half of i")
    raise Crash


@pytest.mark.parametrize("step", [20, 30], ids=["the same step", "a new step"])
def test_a_crash_while_writing_changes_nothing(tmp_path, step):
    earlier = [save(tmp_path, 10), save(tmp_path, 20)]
    before = [contents(checkpoint) for checkpoint in earlier]
    with pytest.raises(Crash):
        save_checkpoint(tmp_path, step, write_half, total_limit=1)
    assert list_checkpoints(tmp_path) == earlier
    assert [contents(checkpoint) for checkpoint in earlier] == before
    assert find_latest_checkpoint(tmp_path) == earlier[1]


def test_saving_again_after_a_crash(tmp_path):
    with pytest.raises(Crash):
        save_checkpoint(tmp_path, 20, write_half)
    checkpoint = save(tmp_path, 20)
    assert find_damage(checkpoint) is None
    assert set(contents(checkpoint)) == {"transformer/weights.safetensors", "model_index.json", CHECKPOINT_MANIFEST}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-20"]  # nothing unfinished is left


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path):
    truncate(save(tmp_path, 20))
    checkpoint = save(tmp_path, 20)
    assert find_damage(checkpoint) is None and find_latest_checkpoint(tmp_path) == checkpoint


# ---------------------------------------------------------------------------------------------------------------------
# In a thread


def test_copies_keep_the_values_of_their_step():
    model, optimizer = model_and_optimizer(seed=0)
    train(model, optimizer, steps=1)
    writer = CheckpointWriter(torch.device("cpu"))
    tensors = gather_training_state(model, optimizer)
    expected = {file: {name: t.clone() for name, t in entries.items()} for file, entries in tensors.items()}
    copies = writer.copy(tensors)
    train(model, optimizer, steps=1)
    assert_identical(copies, expected)
    again = writer.copy(gather_training_state(model, optimizer))
    assert_identical(again, gather_training_state(model, optimizer))
    places = [{t.data_ptr() for entries in copy.values() for t in entries.values()} for copy in (copies, again)]
    assert places[0] == places[1]  # the memory of the first copy is used again


def test_a_checkpoint_is_taken_once(tmp_path):
    writer = CheckpointWriter(torch.device("cpu"))
    assert writer.take() is None and not writer.is_whole
    writer.start(lambda: save(tmp_path, 10))
    wait_until(lambda: writer.is_whole)
    assert writer.take() == tmp_path / "checkpoint-10" and find_damage(tmp_path / "checkpoint-10") is None
    assert writer.take() is None and not writer.is_whole


def test_who_takes_a_checkpoint_gets_its_error(tmp_path, caplog):
    failed = threading.Event()
    writer = CheckpointWriter(torch.device("cpu"), on_error=failed.set)
    writer.start(lambda: save_checkpoint(tmp_path, 20, write_half))
    assert failed.wait(PATIENCE_S) and not writer.is_whole
    with pytest.raises(Crash):
        writer.take()
    assert not list(tmp_path.iterdir())
    writer.start(lambda: save_checkpoint(tmp_path, 20, write_half))
    writer.finish()
    assert "A checkpoint could not be written: " in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# Retention


def steps(output_dir: Path) -> list[int]:
    return [checkpoint_step(checkpoint) for checkpoint in list_checkpoints(output_dir)]


def test_all_are_kept_without_a_limit(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert steps(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize(("limit", "kept"), [(1, [[8], [9], [10], [11]]), (2, [[8], [8, 9], [9, 10], [10, 11]])])
def test_the_oldest_go_first(tmp_path, limit, kept):
    for step, expected in zip((8, 9, 10, 11), kept, strict=True):
        save(tmp_path, step, total_limit=limit)
        assert steps(tmp_path) == expected


def test_nothing_else_is_removed(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "latents.safetensors").write_bytes(b"latents")
    for step in (1, 2, 3):
        save(tmp_path, step, total_limit=1)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-best", "latents.safetensors", "checkpoint-3"}


@pytest.mark.parametrize("limit", [1, 2, 3])
@pytest.mark.parametrize("step", [15, 20], ids=["between", "in place of a damaged one"])
def test_the_last_valid_checkpoint_is_never_removed(tmp_path, step, limit):
    """A run that was resumed before damaged checkpoints saves its own below them: those must not push it out."""
    save(tmp_path, 10)
    for damaged in (20, 30, 40):
        truncate(save(tmp_path, damaged))
    saved = save(tmp_path, step, total_limit=limit)
    assert saved.exists() and find_damage(saved) is None
    assert find_latest_checkpoint(tmp_path) == saved


@pytest.mark.parametrize("name", sorted(STATE))
def test_a_state_that_lacks_an_entry_is_refused_by_name(tmp_path, name):
    model, optimizer = model_and_optimizer(seed=0)
    state = {key: value for key, value in STATE.items() if key != name}
    save_training_state(tmp_path, gather_training_state(model, optimizer), state)
    with pytest.raises(ValueError, match=says("state.json", f"`{name}` must be there")):
        load_training_state(tmp_path, model, optimizer)
