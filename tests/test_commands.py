"""
Published commands keep their meaning: every recipe, every command in the documentation, the study and each file of
results is parsed to the values in `golden/options.json`.

After a deliberate change of options, `python tests/test_commands.py` writes that file anew: what is in it is parsed
again and new commands are added, so that its diff shows what has changed.
"""

import argparse
import importlib
import json
import os
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffusers_dod_command import COMMANDS


ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "options.json"
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "checkpoints/dod-desk/README.md")]
DOCUMENTS += sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("model_cards/*.md")])
SCRIPTS = {"judges": "training/study/judge_priors.py"}  # tasks of results that are no evaluation of the package
RECIPES = sorted(ROOT.glob("training/recipes/*.yaml"))
sys.path.insert(0, str(ROOT / "training" / "study"))
import study  # noqa: E402


# ------------------------------------------------------------------------------------------------ what is published


def find_commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Scripts (`training/train_dod.py`) and modules (`diffusers_dod.conversion`) that are called, with arguments."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["dod"] and words[1:2] and words[1] in COMMANDS:
            yield f"diffusers_dod.{COMMANDS[words[1]][0]}", words[2:]
            continue
        if words[:1] == ["sbatch"]:  # whose script passes on to the trainer what follows its name
            (place,) = [place for place, word in enumerate(words) if word.endswith(".sbatch")]
            yield "training/train_dod.py", words[place + 1 :]
            continue
        launchers = [place for place, word in enumerate(words) if re.fullmatch(r"(.*/)?python|launch|torchrun", word)]
        if not launchers:
            continue
        words = words[launchers[0] + 1 :]
        for place, word in enumerate(words):
            if word.startswith("diffusers_dod.") or (word.endswith(".py") and (ROOT / word).is_file()):
                yield word, words[place + 1 :]
                break


def list_commands() -> Iterator[tuple[str, list[str]]]:
    """All published commands; the same one may come several times."""
    for document in DOCUMENTS:
        for block in re.findall(r"^```(?:bash|sh)\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL):
            yield from find_commands(block)
    makefile = (ROOT / "Makefile").read_text().replace(" $(OPTIONS)", "")
    yield from find_commands("\n".join(re.findall(r"^\t.*(?:\\\n.*)*", makefile, re.MULTILINE)))
    for recipe in RECIPES:
        comment = re.match(r"(#.*\n)+", recipe.read_text())[0]
        yield from find_commands(
            "\n".join(re.findall(r"(?:accelerate launch|python) (?:.*\\\n)*.*", comment.replace("\n#", "\n")))
        )
        name = recipe.relative_to(ROOT).as_posix()
        yield "training/train_dod.py", ["--config", name, "--train_data_dir", "images", "--output_dir", "run"]
    plan = study.load_study()
    for run in plan["runs"]:
        yield "training/train_dod.py", study.training_argv(plan, run)
        for step, names in study.evaluations_of(plan, run).items():
            for name in names:
                module, *argv = study.evaluation_argv(plan, run, step, name)
                yield module, argv
    data = {**plan["data"], "pretrained_vae_name_or_path": plan["vae"], "latents_dir": study.LATENTS}
    yield "training/encode_latents.py", study.to_argv(data)
    for path in sorted(ROOT.glob("docs/results/**/*.json")):
        results = json.loads(path.read_text())
        if "argv" in results:
            yield SCRIPTS.get(results["task"], f"diffusers_dod.evaluation.{results['task']}"), results["argv"]
            manifest = results["data"].get("samples", {}).get("manifest")
            if manifest is not None:
                yield "diffusers_dod.evaluation.sample", manifest["argv"]


# --------------------------------------------------------------------------------------------- what it is parsed to


class _Parsed(Exception):
    """Raised in place of doing what the command is there for."""


def to_json(value: Any) -> Any:
    """A value as JSON has it; a path is told from a text."""
    if isinstance(value, Path):
        return {"path": os.path.relpath(value, ROOT) if value.is_absolute() else str(value)}
    return list(map(to_json, value)) if isinstance(value, (list, tuple)) else value


def parse(command: str, argv: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `argparse` makes of the arguments of a command called in `ROOT`, and the defaults of its options."""

    def stop(parser: argparse.ArgumentParser, args: list[str] | None = None) -> None:
        values = vars(parse_args(parser, args))
        raise _Parsed(values, {action.dest: action.default for action in parser._actions if action.dest != "help"})

    parse_args = argparse.ArgumentParser.parse_args
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        try:
            if command.startswith("diffusers_dod."):
                importlib.import_module(command).main(argv)
            else:
                patch.setattr(sys, "argv", [command, *argv])
                patch.syspath_prepend(str((ROOT / command).parent))
                runpy.run_path(command, run_name="__main__")
        except _Parsed as parsed:
            values, defaults = parsed.args
    if "--device" not in argv:  # which depends on the machine
        values.pop("device", None)
    defaults.pop("device", None)
    return {name: to_json(value) for name, value in values.items()}, {
        name: to_json(value) for name, value in defaults.items()
    }


def read_golden() -> dict[str, dict[str, Any]]:
    """By command, the `defaults` of all options and, by arguments in one line, what differs from them."""
    return json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}


def write_golden() -> None:
    """Parses again what is in the file, and all that is published now."""
    known = [(command, shlex.split(line)) for command, entry in read_golden().items() for line in entry["argv"]]
    golden: dict[str, dict[str, Any]] = {}
    for command, argv in [*known, *list_commands()]:
        values, defaults = parse(command, argv)
        entry = golden.setdefault(command, {"defaults": defaults, "argv": {}})
        different = {name: value for name, value in values.items() if value != defaults.get(name)}
        entry["argv"][shlex.join(argv)] = dict(sorted(different.items()))
    lines = []
    for command, entry in sorted(golden.items()):
        argv = [f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(entry["argv"].items())]
        defaults = json.dumps(dict(sorted(entry["defaults"].items())))
        lines.append(f' {json.dumps(command)}: {{\n  "defaults": {defaults},\n  "argv": {{\n')
        lines[-1] += ",\n".join(argv) + "\n  }\n }"
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")


# ------------------------------------------------------------------------------------------------------------- tests


def test_published_commands_keep_their_values():
    differences = []
    golden = read_golden()
    for command, entry in golden.items():
        for line, different in entry["argv"].items():
            values, _ = parse(command, shlex.split(line))
            expected = entry["defaults"] | different
            # As text, in which 1 is not 1.0.
            found = {
                name for name in values | expected if json.dumps(values.get(name)) != json.dumps(expected.get(name))
            }
            differences += [
                f"{command} {line}: {name} was {expected.get(name, 'no option')!r}, is {values.get(name, 'none')!r}"
                for name in sorted(found)
            ]
    assert differences == []
    assert len(golden) > 15 and sum(len(entry["argv"]) for entry in golden.values()) > 150


def test_commands_of_today_are_accepted():
    commands = {(command, tuple(argv)) for command, argv in list_commands()}
    assert {command for command, _ in commands} <= read_golden().keys()
    for command, argv in sorted(commands):
        parse(command, list(argv))


if __name__ == "__main__":
    write_golden()
