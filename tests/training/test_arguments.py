"""Options from recipes and the command, and that everything that is wrong with them is said at once."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from diffusers_dod.training.arguments import find_errors, parse_args, read_config


ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "training" / "recipes").glob("*.yaml"))
SOURCE = ["--train_data_dir", "pictures"]


def write(folder: Path, text: str) -> list[str]:
    (folder / "recipe.yaml").write_text(text)
    return ["--config", str(folder / "recipe.yaml"), "--output_dir", "run"]


def error_of(capsys, argv: list[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        parse_args(argv)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_a_recipe_gives_options_and_the_command_takes_their_place(tmp_path):
    text = "preset: DoD-S\nlearning_rate: 1e-3\nema_decay: [0.9, 0.99]\nrandom_flip: true\npush_to_hub: false\n"
    argv = write(tmp_path, text + "train_data_dir: pictures\nmixed_precision: 'no'\n")
    args = parse_args(argv)
    assert (args.preset, args.learning_rate, args.ema_decay) == ("DoD-S", 1e-3, [0.9, 0.99])
    assert args.random_flip is True and args.push_to_hub is False and args.mixed_precision == "no"
    args = parse_args([*argv, "--learning_rate", "2e-3", "--ema_decay", "0.5"])
    assert (args.preset, args.learning_rate, args.ema_decay) == ("DoD-S", 2e-3, [0.5])


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("a: b: c", ["`config`", "YAML", "recipe.yaml"]),
        ("- preset", ["`config`", "names of options to values", "['preset']"]),
        ("", ["`config`", "names of options to values", "None"]),
        ("preset: {size: large}", ["`config`", "'preset'", "'large'"]),
        ("preset: null", ["`config`", "'preset'", "None"]),
        ("1: 2", ["`config`", "got 1: 2"]),
        ("learning_rat: 1\ntrain_data_dir: x", ["unrecognized arguments", "--learning_rat"]),
        ("preset: DoD-XXL", ["--preset", "DoD-XXL"]),
        ("learning_rate: fast", ["--learning_rate", "fast"]),
    ],
)
def test_bad_recipes(tmp_path, capsys, text, fragments):
    message = error_of(capsys, write(tmp_path, text))
    assert all(fragment in message for fragment in fragments), message


def test_a_recipe_that_does_not_exist(capsys):
    assert "no-recipe.yaml" in error_of(capsys, ["--config", "no-recipe.yaml", "--output_dir", "run"])


def test_all_errors_are_said_at_once(capsys):
    bad = "--learning_rate -1 --ema_decay 2 --adam_beta1 1 --resolution 0 --seed -1 --num_latent_tokens 4".split()
    message = error_of(capsys, [*bad, "--preset", "FiTv2-B", "--output_dir", "run"])
    names = ["learning_rate", "ema_decay", "adam_beta1", "resolution", "seed", "num_latent_tokens", "dataset_name"]
    assert all(f"`{name}`" in message for name in names), message


def test_pictures_are_not_needed_beside_their_latents(capsys):
    args = parse_args(["--latents_dir", "latents", "--output_dir", "run"])
    assert args.dataset_name is None and args.train_data_dir is None and find_errors(args) == []
    message = error_of(capsys, ["--latents_dir", "latents", *SOURCE, "--dataset_name", "x", "--output_dir", "run"])
    assert "or none beside `latents_dir`" in message


# ----------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_opens_with_the_command_that_runs_it(recipe):
    comment = re.match(r"(#.*\n)+", recipe.read_text())[0]
    command = re.search(r"training/train_dod\.py((?:.*\\\n)*.*)", comment)[1].replace("\\\n#", " ")
    argv = shlex.split(command)
    assert argv[argv.index("--config") + 1] == f"training/recipes/{recipe.name}"
    argv[argv.index("--config") + 1] = str(recipe)
    args = parse_args(argv)
    for name, value in yaml.safe_load(recipe.read_text()).items():
        # YAML takes 1e-4 for a name.
        assert getattr(args, name) == (float(value) if name.endswith("learning_rate") else value)
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
    args = parse_args(["--config", str(ROOT / f"training/recipes/{name}.yaml"), *SOURCE, "--output_dir", "run"])
    assert (args.preset, args.max_train_steps, args.num_latent_tokens, args.prior_dropout_prob) == expected
    assert 8 * args.train_batch_size * args.gradient_accumulation_steps == 256
    assert (args.learning_rate, args.lr_scheduler, args.lr_warmup_steps) == (1e-4, "constant_with_warmup", 0)
    assert (args.adam_beta1, args.adam_beta2, args.adam_weight_decay) == (0.9, 0.999, 0.0)
    assert args.ema_decay == [0.999, 0.9999] and args.label_dropout_prob == 0.1
    assert args.resolution == 256 and args.random_flip and args.mixed_precision == "bf16"


def test_recipes_without_an_embedder_say_nothing_of_it():
    for name in ("fitv2-b-imagenet256", "fitv2-xl-imagenet256"):
        options = read_config(ROOT / f"training/recipes/{name}.yaml")
        assert "--num_latent_tokens" not in options and "--prior_dropout_prob" not in options
