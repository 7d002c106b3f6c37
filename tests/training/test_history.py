"""What a resumed run must have as its checkpoint, what it may change, and how it says so."""

import json
from functools import partial
from pathlib import Path

import pytest
from accelerate import Accelerator
from helpers import fresh_accelerator, run_trainer, says, write_images

from diffusers_dod.options import from_values, list_options
from diffusers_dod.training.checkpoints import read_state
from diffusers_dod.training.history import TrainingHistory, values_of_steps
from diffusers_dod.training_options import TrainingOptions


OPTIONS = list_options(TrainingOptions)
FREE = [name for name, field in OPTIONS.items() if field.option.is_free]
BOUND = [name for name in OPTIONS if name not in FREE]

train = partial(run_trainer, "--preset DoD-Desk --resolution 8 --train_batch_size 4 --checkpointing_steps 1".split())


# ------------------------------------------------------------------------------------------------ which are compared


def other_value(name: str):
    """A value that is not the default."""
    field = OPTIONS[name]
    if field.type is bool:
        return not field.default
    if field.option.choices is not None:
        value = next(choice for choice in field.option.choices if choice not in (field.default, None))
    else:
        number = (
            1 if isinstance(field.default, tuple) or not isinstance(field.default, (int, float)) else field.default
        )
        value = {int: 2 * int(number) + 1, float: 0.75 * number + 0.1, str: "other", Path: Path("other")}[field.type]
    return (value,) if field.nargs is not None else value


@pytest.fixture(scope="module")
def values():
    """Values of steps of a run with some options."""
    with fresh_accelerator():
        accelerator = Accelerator()
        yield lambda **given: values_of_steps(
            from_values(TrainingOptions, {"output_dir": Path("run"), "lr_scheduler": "cosine"} | given), accelerator
        )


@pytest.mark.parametrize("name", sorted(set(BOUND) - {"num_processes", "distributed_type", "mixed_precision"}))
def test_an_option_that_steps_depend_on_is_compared(values, name):
    history = TrainingHistory({"step": 7, "history": TrainingHistory({}).state() | {"values": values()}})
    history.go_on_with(values())
    with pytest.raises(ValueError, match=says(f"`{name}` must be", "resumed, got", f"--allow_changed {name}")):
        history.go_on_with(values(**{name: other_value(name)}))


@pytest.mark.parametrize("name", FREE)
def test_a_free_option_is_not_compared(values, name):
    assert values(**{name: other_value(name)}) == values()


def test_what_steps_depend_on():
    """Bits depend on all of these."""
    named = "preset seed train_batch_size gradient_accumulation_steps learning_rate lr_scheduler lr_warmup_steps"
    named += " optimizer adam_beta1 max_grad_norm ema_decay ema_sigma_rel label_dropout_prob prior_dropout_prob"
    named += " exact_dropout logit_mean logit_std time_shift repa_weight streaming num_processes mixed_precision"
    assert set(named.split()) <= set(BOUND)
    named = "logging_steps validation_steps push_to_hub dataloader_num_workers output_dir hub_token report_to"
    assert set(named.split()) <= set(FREE)


def test_more_steps_are_another_schedule_unless_it_is_constant(values):
    assert values(max_train_steps=5) != values(max_train_steps=6)
    constant = {"lr_scheduler": "constant_with_warmup"}
    assert values(max_train_steps=5, **constant) == values(max_train_steps=6, **constant)


def test_folders_of_this_machine_are_not_written(values, tmp_path):
    assert values(pretrained_model_name_or_path=str(tmp_path))["pretrained_model_name_or_path"] == "a local folder"
    assert values(pretrained_model_name_or_path="me/dod")["pretrained_model_name_or_path"] == "me/dod"


# --------------------------------------------------------------------------------------------------------- history


def checkpoint_of(values: dict, step: int = 210, num_images: int = 6720) -> dict:
    history = TrainingHistory({})
    history.go_on_with(values)
    history.add_step(num_images)
    return {"step": step, "history": json.loads(json.dumps(history.state()))}


def test_all_changes_are_refused_together():
    history = TrainingHistory(checkpoint_of({"seed": 0, "train_batch_size": 32, "preset": "DoD-B"}), ["preset"])
    new = {"seed": 1, "train_batch_size": 16, "preset": "DoD-S"}
    with pytest.raises(ValueError) as error:
        history.go_on_with(new)
    assert str(error.value).splitlines() == [
        "`seed` must be 0 as in the run that is resumed, got 1.",
        "`train_batch_size` must be 32 as in the run that is resumed, got 16.",
        "To go on with other values all the same: `--allow_changed seed train_batch_size`.",
    ]
    assert history.values == {} and history.changes == []


def test_classes_are_named_where_they_differ():
    many = list(map(str, range(1000)))
    for before, after, *fragments in (
        (["ant", "bee"], ["ant", "newt"], "['ant', 'bee']", "got ['ant', 'newt']"),
        (many, [*many[:3], "newt", *many[3:-1]], "1000 with ['3'] at 3", "got 1000 with ['newt'] at 3"),
    ):
        history = TrainingHistory(checkpoint_of({"class_names": before}))
        with pytest.raises(ValueError, match=says("`class_names` must be", *fragments)):
            history.go_on_with({"class_names": after})


def test_changes_are_stated_from_their_step_on():
    state = checkpoint_of({"train_batch_size": 32, "seed": 0})
    for size in (16, 8):
        history = TrainingHistory(state, ["train_batch_size"])
        history.go_on_with({"train_batch_size": size, "seed": 0})
        for _ in range(3):
            history.add_step(size)
        state = {"step": state["step"] + 3, "history": history.state()}
    assert history.num_images == 6720 + 3 * 16 + 3 * 8
    assert history.describe_changes() == [
        "From step 211 on `train_batch_size` is 16; before it was 32.",
        "From step 214 on `train_batch_size` is 8; before it was 16.",
    ]


def test_a_checkpoint_of_an_older_version(caplog):
    history = TrainingHistory({"step": 3})
    history.go_on_with({"seed": 1})
    history.add_step(4)
    assert "does not say which options" in caplog.text
    assert history.state() == {"values": {"seed": 1}, "num_images": None, "changes": []}


# -------------------------------------------------------------------------------------------------------- in the run


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list:
    return ["--train_data_dir", write_images(tmp_path_factory.mktemp("images"), [(18, 22)] * 3)]


@pytest.fixture(scope="module")
def started(tmp_path_factory, data) -> Path:
    """Two steps; read only."""
    return train(tmp_path_factory.mktemp("started") / "run", *data, "--max_train_steps", 2)


def test_what_a_run_changes(tmp_path, data, started):
    again = [*data, "--resume_from_checkpoint", started / "checkpoint-2", "--max_train_steps", 3]
    again += ["--learning_rate", 0.5, "--train_batch_size", 2]
    with pytest.raises(ValueError, match=says("`learning_rate` must be 0.0001", "got 0.5", "`train_batch_size`")):
        train(tmp_path / "run", *again)
    run = train(tmp_path / "run", *again, "--allow_changed", "learning_rate", "train_batch_size")
    history = read_state(run / "checkpoint-3")["history"]
    assert [(change["step"], change["name"]) for change in history["changes"]] == [
        (2, "train_batch_size"),
        (2, "learning_rate"),
    ]
    assert (history["num_images"], history["values"]["train_batch_size"]) == (2 * 4 + 2, 2)
    card, sentence = (run / "README.md").read_text(), "From step 3 on `learning_rate` is 0.5; before it was 0.0001."
    assert "3 steps of 10 images in all" in card and f"- {sentence}" in card
    assert f"# {sentence}" in (run / "recipe.yaml").read_text()
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["learning_rate"] == 0.5


def test_other_classes_of_the_same_number(tmp_path, data, started):
    """Their ids would mean something else."""
    images = tmp_path / "images"
    images.mkdir()
    write_images(images, [(18, 22)] * 3)
    (images / "newt").rename(images / "aardvark")
    again = ["--train_data_dir", images, "--max_train_steps", 3]
    expected = says("`class_names` must be ['ant', 'newt'] as in", "got ['aardvark', 'ant']")
    with pytest.raises(ValueError, match=expected):
        train(tmp_path / "run", *again, "--resume_from_checkpoint", started / "checkpoint-2")
