"""Options out of the fields of dataclasses: what is parsed, what is refused and in which words, what is written."""

import math
import re
from dataclasses import FrozenInstanceError, dataclass, field
from pathlib import Path

import pytest
import yaml
from helpers import says

from diffusers_dod.options import (
    _help,
    build_parser,
    check_options,
    describe,
    find_errors,
    find_places,
    from_values,
    list_options,
    option,
    parse_options,
    replace_values,
    to_argv,
    to_recipe,
    to_values,
)


def is_even(name: str, value: int) -> None:
    if value % 2:
        raise ValueError(f"`{name}` must be even, got {value}.")


@dataclass(frozen=True, kw_only=True)
class Rates:
    """
    Learning rates.

    They hold for the whole run.
    """

    learning_rate: float = option(1e-4, above=0, help="Learning rate.")
    decays: tuple[float, ...] = option((0.999,), at_least=0, at_most=1, is_distinct=True, help="Decays.")
    widths: tuple[float, ...] = option((), nargs="*", above=0, below=0.5, help="Widths, 5 % or more.")
    interval: tuple[float, float] = option((0.0, 1.0), metavar=("LOW", "HIGH"), help="Between which sigmas.")
    warmup: int = option(0, at_least=0, help="Steps of warm-up.", aliases=("warmup_steps",))
    seed: int = option(0, at_least=0, below=2**64, help="Seed.")
    total: int | None = option(None, at_least=1, check=is_even, help="Number of steps.")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Source of images."""

    name: str | None = option(None, is_place=True, help="Name of the data.")
    kind: str = option("large", choices=("large", "small"), help="Which images.")
    stream: bool = option(False, help="Stream them.")
    crop: bool | None = option(None, help="Crop them; by default large ones.")
    classes: Path | None = option(None, needs="stream", help="File of class names.")
    shard_size: int = option(16, at_least=1, excludes="stream", help="Images of a shard.")

    def find_conflicts(self) -> list[str]:
        if self.kind == "small" and self.shard_size > 100:
            return [f"`shard_size` must be at most 100 for `kind` 'small', got {self.shard_size}."]
        return []


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a test."""

    folders: tuple[Path, ...] = option(is_positional=True, help="Folders.")
    config: Path | None = option(None, is_recipe=True, is_private=True, help="Recipe.")
    output_file: Path = option(help="Where results go.", is_private=True, writes="file", suffix=".json")
    token: str | None = option(None, is_secret=True, help="Token.")
    rates: Rates = field(default_factory=Rates)
    source: Source = field(default_factory=Source)

    def find_conflicts(self) -> list[str]:
        return ["`folders` must not be `name`."] if Path(self.source.name or "") in self.folders else []


REQUIRED = ["a", "b", "--output_file", "r.json"]


def parse(*argv: object, required: bool = True) -> Options:
    return parse_options(Options, [*REQUIRED * required, *map(str, argv)])


def error_of(capsys, *argv: object, required: bool = True) -> str:
    with pytest.raises(SystemExit) as caught:
        parse(*argv, required=required)
    assert caught.value.code == 2
    return capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ command line


def test_options_have_types_and_defaults_of_their_fields():
    options = parse()
    assert options == Options(folders=(Path("a"), Path("b")), output_file=Path("r.json"))
    options = parse(*"--decays 0.9 0.99 --widths --interval 0.2 0.5 --total 4 --stream --classes c --token s".split())
    assert options.rates == Rates(decays=(0.9, 0.99), interval=(0.2, 0.5), total=4)
    assert options.source == Source(stream=True, classes=Path("c")) and options.token == "s"
    with pytest.raises(FrozenInstanceError):
        options.token = "t"


def test_an_older_name_is_accepted():
    assert parse("--warmup_steps", 7).rates.warmup == parse("--warmup", 7).rates.warmup == 7


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        (["--decay", "0.9"], ["unrecognized arguments", "--decay"]),  # an abbreviation
        (["--learning_rate", "fast"], ["--learning_rate", "'fast'"]),
        (["--warmup", "2.5"], ["--warmup", "'2.5'"]),
        (["--kind", "tiny"], ["--kind", "'tiny'", "large"]),
        (["--interval", "1"], ["--interval", "expected 2 arguments"]),
        (["--learning_rate", "0"], ["`learning_rate` must be a finite number in (0, inf), got 0.0."]),
        (["--learning_rate", "nan"], ["`learning_rate` must be a finite number in (0, inf), got nan."]),
        (["--decays", "0.5", "1.5"], ["`decays` must be a finite number in [0, 1], got 1.5."]),
        (["--decays", "0.5", "0.5"], ["`decays` must hold different values, got [0.5, 0.5]."]),
        (["--widths", "0.5"], ["`widths` must be a finite number in (0, 0.5), got 0.5."]),
        (["--interval", "0", "inf"], ["`interval` must be a finite number in [-inf, inf), got inf."]),
        (["--warmup", "-1"], ["`warmup` must be an integer >= 0, got -1."]),
        (
            ["--seed", str(2**64)],
            ["`seed` must be a finite number in [0, 18446744073709551616), got 1844674407370955"],
        ),
        (["--total", "3"], ["`total` must be even, got 3."]),
        (["--total", "0"], ["`total` must be an integer >= 1, got 0."]),
        (["--classes", "c"], ["`classes` must be given with `stream` only, got c."]),
        (["--stream", "--shard_size", "4"], ["`shard_size` and `stream` must not both be given, got 4 and True."]),
        (["--kind", "small", "--shard_size", "200"], ["`shard_size` must be at most 100", "got 200"]),
        (["--name", "a"], ["`folders` must not be `name`."]),
        (["--output_file", "r.txt"], ["`output_file` must end with .json, got r.txt."]),
        (["--output_file", "/dev/null/r.json"], ["`output_file` must be a file that can be written", "/dev/null/r"]),
    ],
)
def test_what_is_wrong_is_refused_in_clear_words(capsys, argv, fragments):
    message = error_of(capsys, *argv)
    assert all(fragment in message for fragment in fragments), message


def test_all_errors_are_said_at_once(capsys):
    argv = "--learning_rate -1 --decays 2 --warmup -1 --classes c --shard_size 0 --name b"
    message = error_of(capsys, *argv.split())
    for name in ("learning_rate", "decays", "warmup", "classes", "shard_size", "folders"):
        assert f"`{name}` must" in message


def test_what_has_no_default_must_be_given(capsys):
    assert "--output_file" in error_of(capsys, "a", required=False)
    assert "folders" in error_of(capsys, "--output_file", "r.json", required=False)


def test_help_shows_every_text_every_default_and_every_group():
    parser = build_parser(Options, "What the command does.")
    text = " ".join(parser.format_help().split())
    assert text.count("What the command does.") == 1
    for name, field_of_option in list_options(Options).items():
        assert field_of_option.option.help in text
        assert re.search("default|Default: |Required$", _help(field_of_option)), name
    for fragment in ("Default: 0.0001", "Default: 0.999", "Default: 0.0 1.0", "Default: 0", "Default: large"):
        assert fragment in text
    assert "Default: off" in text and "Default: none" in text
    assert "Default: False" not in text and "Default: None" not in text
    assert "Learning rates: They hold for the whole run." in text and "Source of images:" in text


def test_values_that_depend_on_more_are_filled_in(capsys):
    def complete(options: Options) -> Options:
        if options.token is None:
            raise ValueError("`token` must be given, got none.")
        return replace_values(options, total=len(options.token))

    assert parse_options(Options, [*REQUIRED, "--token", "abcd"], complete=complete).rates.total == 4
    with pytest.raises(SystemExit):
        parse_options(Options, [*REQUIRED, "--warmup", "-1"], complete=complete)
    message = capsys.readouterr().err
    assert "`token` must be given, got none." in message and "`warmup` must be an integer" in message


def test_arguments_give_the_options_again():
    for argv in (
        [],
        ["--learning_rate", 1e-300, "--decays", 0.1, 1 / 3, "--widths", 0.25, "--interval", 1, 2],
        ["--stream", "--classes", "a file", "--token", "x y", "--total", 2, "--kind", "small", "--seed", 2**64 - 1],
    ):
        options = parse(*argv)
        assert parse_options(Options, to_argv(options)) == options
    assert to_argv(parse("--stream")) == ["a", "b", "--output_file", "r.json", "--stream"]


# ------------------------------------------------------------------------------------------------------------ values


def test_values_by_name_and_back():
    options = parse("--stream", "--decays", 0.5, 0.6)
    values = to_values(options)
    assert list(values) == list(list_options(Options)) and values["decays"] == (0.5, 0.6) and values["stream"] is True
    assert from_values(Options, values) == options == from_values(Options, values | {"decays": [0.5, 0.6]})
    changed = replace_values(options, learning_rate=0.5, kind="small", token="t")
    assert changed.rates.learning_rate == 0.5 and changed.source.kind == "small" and changed.token == "t"
    assert changed.rates.decays == (0.5, 0.6)


def test_unknown_and_missing_names_are_refused():
    with pytest.raises(TypeError, match=says("learning_rat", "learning_rate")):
        replace_values(parse(), learning_rat=1)
    with pytest.raises(TypeError, match="output_file"):
        from_values(Options, {"folders": ()})


def test_two_options_of_one_name_are_refused():
    @dataclass(frozen=True, kw_only=True)
    class Twice:
        kind: str = option("x", help="Another kind.")
        source: Source = field(default_factory=Source)

    with pytest.raises(TypeError, match=says("kind", "twice")):
        build_parser(Twice)


def test_options_made_by_hand_are_checked_as_those_of_a_command():
    assert find_errors(Rates(decays=())) == ["`decays` must hold at least one value, got none."]
    with pytest.raises(ValueError, match=says("`kind` must be one of 'large', 'small', got 'x'", "`warmup`", "2.5")):
        check_options(Options(folders=(), output_file=Path("x"), source=Source(kind="x"), rates=Rates(warmup=2.5)))
    with pytest.raises(ValueError, match=says("`learning_rate`", "int or float", "'1'")):
        check_options(Rates(learning_rate="1"))
    check_options(Rates(widths=(0.1, math.nextafter(0.5, 0))))


# ----------------------------------------------------------------------------------------------------------- recipes


def write(folder: Path, text: str) -> list[str]:
    (folder / "recipe.yaml").write_text(text)
    return ["--config", str(folder / "recipe.yaml")]


def test_a_recipe_gives_options_and_the_command_takes_their_place(tmp_path):
    argv = write(tmp_path, "learning_rate: 1e-3\ndecays: [0.9, 0.99]\nstream: true\nwarmup_steps: 3\nkind: small\n")
    options = parse(*argv)
    assert options.rates == Rates(learning_rate=1e-3, decays=(0.9, 0.99), warmup=3)
    assert options.source == Source(stream=True, kind="small") and options.config == tmp_path / "recipe.yaml"
    changed = parse(*argv, "--decays", 0.5, "--kind", "large")
    assert changed.rates == Rates(learning_rate=1e-3, decays=(0.5,), warmup=3) and changed.source.kind == "large"
    assert parse(*write(tmp_path, "stream: false\n")).source.stream is False
    assert parse(*write(tmp_path, "stream: true\n"), "--no-stream").source.stream is False


def test_a_flag_may_be_left_to_the_command(tmp_path, capsys):
    assert [parse(*argv).source.crop for argv in ([], ["--crop"], ["--no-crop"])] == [None, True, False]
    assert parse(*write(tmp_path, "crop: false\n")).source.crop is False
    for argv in ([], ["--crop"], ["--no-crop"]):
        assert parse_options(Options, to_argv(parse(*argv))) == parse(*argv)
    assert "--no-kind" in error_of(capsys, *write(tmp_path, "kind: no\n"))  # a word in YAML, if it is not quoted


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("a: b: c", ["`config`", "YAML", "recipe.yaml"]),
        ("- kind", ["`config`", "names of options to values", "['kind']"]),
        ("", ["`config`", "names of options to values", "None"]),
        ("kind: {size: large}", ["`config`", "'kind'", "'large'"]),
        ("kind: null", ["`config`", "'kind'", "None"]),
        ("1: 2", ["`config`", "got 1: 2"]),
        ("learning_rat: 1", ["unrecognized arguments", "--learning_rat"]),
        ("learning_rate: fast", ["--learning_rate", "fast"]),
        ("learning_rate: -1", ["`learning_rate`", "got -1.0"]),
    ],
)
def test_bad_recipes(tmp_path, capsys, text, fragments):
    message = error_of(capsys, *write(tmp_path, text))
    assert all(fragment in message for fragment in fragments), message


def test_a_recipe_that_does_not_exist(capsys):
    assert "no-recipe.yaml" in error_of(capsys, "--config", "no-recipe.yaml")


def test_a_published_recipe_holds_what_anybody_can_use(tmp_path):
    changes = ["--decays", 0.5, 0.6, "--stream", "--classes", "c.txt", "--token", "secret"]
    public = parse(*changes, "--name", "org/data")
    assert find_places(public) == []
    recipe = to_recipe(public)
    assert recipe["name"] == "org/data" and recipe["decays"] == [0.5, 0.6] and recipe["classes"] == "c.txt"
    assert not {"output_file", "token", "config", "learning_rate"} & recipe.keys()
    recipe.pop("folders")
    again = parse(*write(tmp_path, yaml.safe_dump(recipe)))
    assert replace_values(again, config=None, token="secret") == public
    own = parse(*changes, "--name", tmp_path)
    assert find_places(own) == ["name"] and "name" not in to_recipe(own)


def test_secrets_are_not_shown():
    shown = describe(parse("--token", "secret", "--decays", 0.5))
    assert "token" not in shown and shown["decays"] == "[0.5]" and "secret" not in str(shown)


@dataclass(frozen=True, kw_only=True)
class Trusting:
    """Options with code."""

    extractor: str | None = option(None, names_code=lambda name: name != "inception", help="An extractor.")
    trust_extractor: bool = option(False, is_trust=True, help="Trust.")
    config: Path | None = option(None, is_recipe=True, help="Recipe.")


@pytest.mark.parametrize(
    ("recipe", "argv", "refused"),
    [
        ("extractor: os:system", "", ["`extractor` of a recipe", "got 'os:system'", "`--trust_extractor`"]),
        ("extractor: os:system", "--trust_extractor", []),
        ("extractor: os:system", "--extractor file.py:mine", []),
        ("extractor: os:system", "--extractor=file.py:mine", []),
        ("extractor: inception", "", []),
        ("trust_extractor: true", "--extractor file.py:mine", ["`trust_extractor` must be given on the command line"]),
        ("extractor: os:system\ntrust_extractor: true", "", ["`trust_extractor` must be", "`extractor` of a recipe"]),
    ],
)
def test_code_of_a_recipe_needs_trust_on_the_command_line(tmp_path, capsys, recipe, argv, refused):
    (tmp_path / "recipe.yaml").write_text(recipe)
    argv = ["--config", str(tmp_path / "recipe.yaml"), *argv.split()]
    if not refused:
        assert parse_options(Trusting, argv).extractor is not None
        return
    with pytest.raises(SystemExit):
        parse_options(Trusting, argv)
    message = capsys.readouterr().err
    assert all(fragment in message for fragment in refused), message
