"""The command `dod`: every command is behind it, and nothing is imported before it is needed."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launch import ENVIRONMENT, run_command

import diffusers_dod_command
from diffusers_dod_command import COMMANDS, format_completion, list_option_names


ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src" / "diffusers_dod"


def run(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        diffusers_dod_command.main(list(arguments))
    return ended.value.code


def test_every_command_of_the_package_has_a_door():
    found = {
        ".".join(path.relative_to(SOURCES).with_suffix("").parts).removesuffix(".__init__")
        for path in SOURCES.rglob("*.py")
        if re.search(r"^def main\(argv", path.read_text(), re.MULTILINE)
    }
    assert {module for module, _ in COMMANDS.values()} == found


def test_help_imports_nothing_heavy():
    code = "import sys, diffusers_dod_command as c; c.main(['--help']); print(*sorted(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = {name.partition(".")[0] for name in done.stderr.split()}
    assert modules.isdisjoint({"torch", "diffusers", "transformers", "numpy", "diffusers_dod"})
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


def test_an_unknown_command_is_one_block(capsys):
    assert run("trian") == 2
    text = capsys.readouterr().err
    assert text.startswith("dod: error: `COMMAND` must be one of ") and "'trian'. Did you mean train?\n" in text


@pytest.mark.parametrize("name", ["--help", "--version", "completion"])
def test_words_that_nothing_takes_are_refused(name, capsys):
    assert run(name, "zsh") == 2
    assert capsys.readouterr().err.startswith(f"dod: error: `{name}` must stand alone, got 'zsh' behind it.")


def test_usage_and_errors_have_the_name_of_the_command(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dod"])
    assert run("cost", "--help") == 0
    assert capsys.readouterr().out.startswith("usage: dod cost [-h]")
    assert run("help", "cost") == 0
    assert capsys.readouterr().out.startswith("usage: dod cost [-h]")
    assert run("cost", "--no_such_option") == 2
    assert capsys.readouterr().err.startswith("dod cost: error: ")
    assert run("export", "none", "/dev/null/none") == 2
    assert capsys.readouterr().err.startswith("dod export: error: ")


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_and_options(tmp_path, monkeypatch):
    monkeypatch.setitem(COMMANDS, "other", ("of_a_package_that_is_missing", "Help."))
    assert list_option_names("other") == []
    names = list_option_names("cost")
    assert {"--gpu", "--price", "--help", "-h"} <= set(names) and "--debug" not in names
    script = tmp_path / "dod"
    script.write_text(format_completion({"cost": names}))
    assert "python" not in script.read_text().lower()

    def complete(*words: str) -> list[str]:
        call = f'. {script}; COMP_WORDS=("$@"); COMP_CWORD={len(words) - 1}; _dod; echo "${{COMPREPLY[@]}}"'
        done = subprocess.run(["bash", "-c", call, "bash", *words], capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert complete("dod", "ev") == ["evaluate"] and complete("dod", "sam") == ["sample", "sample-dataset"]
    assert complete("dod", "cost", "--g") == ["--gpu"]
    assert complete("dod", "cost", "") == []  # files, then


@pytest.mark.slow
def test_the_module_runs_a_command(tmp_path):
    assert importlib.util.find_spec("diffusers_dod_command")
    text = run_command(
        [sys.executable, "-m", "diffusers_dod_command", "cost", "--gpu", "none"], tmp_path / "log", ENVIRONMENT, False
    )
    assert text.splitlines()[-1] == "See dod cost --help."
