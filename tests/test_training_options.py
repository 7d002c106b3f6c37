"""Options of a run: their ranges, what does not fit, recipes, and that every option of every command has a range."""

import dataclasses
import importlib
import math
import pkgutil
import re
import shlex
from pathlib import Path

import pytest
import yaml
from helpers import says

import diffusers_dod
from diffusers_dod.data.labelled_images import ImageOptions
from diffusers_dod.options import (
    build_parser,
    find_errors,
    from_values,
    list_options,
    parse_options,
    read_recipe,
    replace_values,
    to_recipe,
    to_values,
)
from diffusers_dod.training_options import DataOptions, OutputOptions, TrainingOptions


ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "training" / "recipes").glob("*.yaml"))
SOURCE = ["--train_data_dir", "images"]
ACCEPTED = TrainingOptions(
    data=DataOptions(images=ImageOptions(dataset_name="textures")), output=OutputOptions(output_dir=Path("run"))
)


def parse(*argv: str) -> TrainingOptions:
    return parse_options(TrainingOptions, list(argv))


def error_of(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        parse(*argv)
    assert caught.value.code == 2
    return capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ ranges

# What is refused for each number, and the range that the message states.
OUT_OF_RANGE = {
    "num_train_samples": {0: ">= 1"},
    "resolution": {0: ">= 1"},
    "max_aspect_ratio": {0.5: "[1, inf)"},
    "shard_size": {0: ">= 1"},
    "dataloader_num_workers": {-1: "[0, 1024]"},
    "encoding_batch_size": {0: ">= 1"},
    "seed": {-1: "[0, 18446744073709551616)", 2**64: "[0, 18446744073709551616)"},
    "patch_size": {0: ">= 1"},
    "lora_rank": {0: ">= 1"},
    "lora_alpha": {0.0: "(0, inf)"},
    "num_latent_tokens": {0: ">= 1"},
    "latent_token_dim": {0: ">= 1"},
    "repa_weight": {-1.0: "[0, inf)"},
    "repa_layer": {0: ">= 1"},
    "repa_prior_weight": {-1.0: "[0, inf)"},
    "repa_stop_step": {0: ">= 1"},
    "train_batch_size": {0: ">= 1", -4: ">= 1", 2.5: "int"},
    "gradient_accumulation_steps": {0: ">= 1"},
    "max_train_steps": {0: ">= 1"},
    "learning_rate": {0.0: "(0, inf)", math.inf: "(0, inf)", math.nan: "(0, inf)"},
    "latent_embedder_learning_rate": {0.0: "(0, inf)"},
    "lr_warmup_steps": {-1: ">= 0"},
    "lr_decay_steps": {0: ">= 1"},
    "adam_beta1": {-0.1: "[0, 1)", 1.0: "[0, 1)"},  # AdamW divides by 1 - beta^step
    "adam_beta2": {-0.1: "[0, 1)", 1.0: "[0, 1)"},
    "adam_epsilon": {0.0: "(0, inf)"},
    "adam_weight_decay": {-0.1: "[0, inf)"},
    "max_grad_norm": {0.0: "(0, inf)"},
    "max_nonfinite_steps": {-1: ">= 0"},
    "ema_decay": {-0.1: "[0, 1]", 1.1: "[0, 1]", math.nan: "[0, 1]"},
    "ema_sigma_rel": {0.0: "(0, 0.288", 0.3: "(0, 0.288"},
    "label_dropout_prob": {-0.1: "[0, 1]", 1.1: "[0, 1]"},
    "prior_dropout_prob": {-0.1: "[0, 1]", 1.1: "[0, 1]"},
    "prior_noise": {-0.1: "[0, 1]", 1.1: "[0, 1]"},
    "logit_mean": {math.inf: "[-inf, inf)"},
    "logit_std": {0.0: "(0, inf)"},
    "time_shift": {0.0: "(0, 1000]", 1001.0: "(0, 1000]"},
    "num_processes": {0: ">= 1"},
    "logging_steps": {0: ">= 1"},
    "checkpointing_steps": {0: ">= 1"},
    "checkpoints_total_limit": {0: ">= 1"},
    "validation_steps": {0: ">= 1"},
    "validation_guidance_scale": {-0.1: "[0, inf)", math.inf: "[0, inf)"},
    "validation_seed": {-1: "[0, 18446744073709551616)", 2**64: "[0, 18446744073709551616)"},
    "fid_num_samples": {1: ">= 2"},
    "push_every": {0: ">= 1"},
}


def test_numbers_out_of_range_are_refused():
    assert find_errors(ACCEPTED) == []
    missed = []
    for name, values in OUT_OF_RANGE.items():
        for value, accepted in values.items():
            several = isinstance(to_values(ACCEPTED)[name], tuple)
            errors = find_errors(replace_values(ACCEPTED, **{name: (value,) if several else value}))
            found = [error for error in errors if re.match(f"`{name}` must be (an integer|a finite|of type)", error)]
            if len(found) != 1 or accepted not in found[0] or f"got {value}" not in found[0]:
                missed.append((name, value, errors))
    assert missed == []


def test_the_table_above_names_every_number():
    assert {name for name, field in list_options(TrainingOptions).items() if field.type in (int, float)} == set(
        OUT_OF_RANGE
    )


def find_option_classes() -> list[type]:
    """All dataclasses of options in the package."""
    modules = [module.name for module in pkgutil.walk_packages(diffusers_dod.__path__, "diffusers_dod.")]
    modules.remove("diffusers_dod.demo._page")  # which needs Gradio
    members = [member for name in modules for member in vars(importlib.import_module(name)).values()]
    classes = {member for member in members if isinstance(member, type) and dataclasses.is_dataclass(member)}
    return [kind for kind in classes if any("option" in field.metadata for field in dataclasses.fields(kind))]


# Any finite number; and what is checked by the class or the function that takes it.
WITHOUT_RANGE = {"logit_mean", "num_attention_heads", "in_channels", "sample_size", "time_shifting"}
WITHOUT_RANGE |= {"prior_guidance_scale", "guidance_channels", "guidance_interval", "guidance_power"}
WITHOUT_RANGE |= {"guidance_rescale", "guidance_cosine_threshold"}


def test_every_number_of_every_command_has_a_range():
    found = {}
    for kind in find_option_classes():
        for name, field in list_options(kind).items():
            if field.type in (int, float):
                found[name] = found.get(name, True) and (field.option.at_least, field.option.above) != (None, None)
    assert len(found) > 80 and {name for name, has_range in found.items() if not has_range} == WITHOUT_RANGE


def test_every_command_shows_all_of_its_options():
    for kind in find_option_classes():
        text = build_parser(kind).format_help()
        for name, field in list_options(kind).items():
            assert re.search(rf"(?<!\w){name}(?!\w)", text), (kind, name)
            assert re.fullmatch(r"\S.*[.)]", field.option.help), (kind, name, field.option.help)


# --------------------------------------------------------------------------------------------------- what does not fit


def test_all_errors_are_said_at_once(capsys):
    bad = "--learning_rate -1 --ema_decay 2 --adam_beta1 1 --resolution 0 --seed -1 --num_latent_tokens 4".split()
    message = error_of(capsys, *bad, "--preset", "FiTv2-B", "--output_dir", "run")
    names = ["learning_rate", "ema_decay", "adam_beta1", "resolution", "seed", "num_latent_tokens", "dataset_name"]
    assert all(f"`{name}`" in message for name in names), message


@pytest.mark.parametrize("name", ["num_train_samples", "train_batch_size", "seed", "num_latent_tokens"])
def test_counts_are_integers(name, capsys):
    assert f"--{name}" in error_of(capsys, *SOURCE, "--output_dir", "run", f"--{name}=2.5")


def test_images_are_not_needed_beside_their_latents(capsys):
    options = parse("--latents_dir", "latents", "--output_dir", "run")
    assert options.data.images.dataset_name is None and find_errors(options) == []
    message = error_of(capsys, "--latents_dir", "latents", *SOURCE, "--dataset_name", "x", "--output_dir", "run")
    assert "or none beside `latents_dir`" in message


# ----------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_opens_with_the_command_that_runs_it(recipe):
    comment = re.match(r"(#.*\n)+", recipe.read_text())[0]
    command = re.search(r"training/train_dod\.py((?:.*\\\n)*.*)", comment)[1].replace("\\\n#", " ")
    argv = shlex.split(command)
    assert argv[argv.index("--config") + 1] == f"training/recipes/{recipe.name}"
    argv[argv.index("--config") + 1] = str(recipe)
    values = to_values(parse(*argv))
    for name, value in yaml.safe_load(recipe.read_text()).items():
        # YAML takes 1e-4 for a name.
        value = float(value) if name.endswith("learning_rate") else value
        assert values[name] == (tuple(value) if isinstance(value, list) else value)
    assert "Expected time" in comment or "expected time" in comment
    assert "Expected result" in comment


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dod-s-imagenet256", ("DoD-S", 1_500_000, 32, 0.5)),
        ("dod-b-imagenet256", ("DoD-B", 1_500_000, 32, 0.5)),
        ("dod-xl-imagenet256", ("DoD-XL", 1_000_000, 32, 0.5)),
        ("dod-b-imagenet256-n16", ("DoD-B", 400_000, 16, 0.5)),
        ("dod-b-imagenet256-n64", ("DoD-B", 400_000, 64, 0.5)),
        ("dod-b-imagenet256-n256", ("DoD-B", 400_000, 256, 0.5)),
        ("dod-b-imagenet256-ps25", ("DoD-B", 400_000, 32, 0.25)),
        ("dod-b-imagenet256-ps75", ("DoD-B", 400_000, 32, 0.75)),
    ],
)
def test_the_papers_recipes(name, expected):
    options = parse("--config", str(ROOT / f"training/recipes/{name}.yaml"), *SOURCE, "--output_dir", "run")
    model, optimizer, dropout = options.model, options.optimizer, options.dropout
    found = (model.preset, optimizer.max_train_steps, model.num_latent_tokens, dropout.prior_dropout_prob)
    assert found == expected
    assert 8 * optimizer.train_batch_size * optimizer.gradient_accumulation_steps == 256
    schedule = (optimizer.learning_rate, optimizer.lr_scheduler, optimizer.lr_warmup_steps)
    assert schedule == (1e-4, "constant_with_warmup", 0)
    assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_weight_decay) == (0.9, 0.999, 0.0)
    assert options.averages.ema_decay == (0.999, 0.9999) and dropout.label_dropout_prob == 0.1
    assert options.data.images.resolution == 256 and options.data.encoding.random_flip
    assert options.precision.mixed_precision == "bf16"


def test_a_schedule_has_the_steps_it_needs(capsys):
    decay = ["--lr_scheduler", "warmup_stable_decay", "--max_train_steps", "10", "--lr_warmup_steps", "4"]
    assert parse(*SOURCE, "--output_dir", "run", *decay, "--lr_decay_steps", "6").optimizer.lr_decay_steps == 6
    for options, words in (
        (decay, ["must be given", "'warmup_stable_decay'", "got None"]),
        (["--lr_decay_steps", "3"], ["must not be given", "'constant_with_warmup'", "got 3"]),
        ([*decay, "--lr_decay_steps", "7"], ["`lr_warmup_steps`", "at most", "together, 10", "got 4 and 7"]),
    ):
        assert re.search(says("`lr_decay_steps`", *words), error_of(capsys, *SOURCE, "--output_dir", "run", *options))


def test_recipes_without_an_embedder_say_nothing_of_it():
    for name in ("fitv2-b-imagenet256", "fitv2-xl-imagenet256"):
        options = read_recipe(ROOT / f"training/recipes/{name}.yaml")
        assert "--num_latent_tokens" not in options and "--prior_dropout_prob" not in options


def test_what_is_left_to_the_device():
    """On CUDA all is fast that can be; what was asked for stays, and a CPU changes nothing."""
    undecided = from_values(TrainingOptions, {"output_dir": Path("run")})
    assert undecided.for_device("cpu") == undecided
    chosen = undecided.for_device("cuda")
    assert chosen.precision.compile is True and chosen.dropout.exact_dropout is True
    off = replace_values(undecided, compile=False, exact_dropout=False)
    assert off.for_device("cuda") == off
    assert to_recipe(chosen) == {"compile": True, "exact_dropout": True}  # which another device would not choose
