"""Errors of commands: one block of lines, exit code 2, no traceback; faults of the program keep theirs."""

import ast
import importlib
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from launch import run_command, torchrun

from diffusers_dod import command_line
from diffusers_dod.command_line import run_main


ROOT = Path(__file__).parents[1]
COMMANDS = sorted(
    path
    for path in (ROOT / "src" / "diffusers_dod").rglob("*.py")
    if re.search(r"^def main\(argv", path.read_text(), re.MULTILINE)
)


def run(main, monkeypatch, *arguments: str) -> int | str | None:
    """Exit code of a command."""
    monkeypatch.setattr(sys, "argv", ["folder/command.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        run_main(main)
    return ended.value.code


def failing(error: BaseException):
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    "error",
    [
        ValueError("`a` must be 1, got 2.\n`b` must be 3, got 4."),
        TypeError("`a` must be of type int, got '1'."),
        FileNotFoundError(2, "No such file or directory", "images"),
        FloatingPointError("Weights are not finite."),
        ImportError("plots need matplotlib."),
        torch.OutOfMemoryError("CUDA out of memory."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_expected_error_is_one_block(monkeypatch, capsys, error):
    assert run(failing(error), monkeypatch) == 2
    assert capsys.readouterr().err == f"command.py: error: {error}\n"
    assert run(failing(error), monkeypatch, "--debug") == 2
    text = capsys.readouterr().err
    assert text.startswith("Traceback") and text.endswith(f"{type(error).__name__}: {error}\n")


def test_a_warning_of_this_package_is_a_line(monkeypatch, capsys):
    def main():
        for place in (command_line.__file__, "elsewhere.py"):
            warnings.showwarning(UserWarning("few samples"), UserWarning, place, 7)

    monkeypatch.setattr(sys, "argv", ["folder/command.py"])
    before = warnings.showwarning
    run_main(main)
    assert capsys.readouterr().err == "command.py: warning: few samples\nelsewhere.py:7: UserWarning: few samples\n"
    monkeypatch.setattr(sys, "argv", ["folder/command.py", "--debug"])
    seen = []
    run_main(lambda: seen.append(warnings.showwarning))
    assert seen == [before] and warnings.showwarning is before


def test_an_error_without_words_has_its_name(monkeypatch, capsys):
    assert run(failing(ValueError()), monkeypatch) == 2
    assert capsys.readouterr().err == "command.py: error: ValueError\n"


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["command.py"])
    with pytest.raises(KeyError):
        run_main(failing(KeyError("name")))


def test_other_exit_codes_stay(monkeypatch, capsys):
    assert run(failing(SystemExit(143)), monkeypatch) == 143
    assert run(failing(KeyboardInterrupt()), monkeypatch) == 130
    assert capsys.readouterr().err == ""


def test_the_command_does_not_see_debug(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "argv", ["command.py", "--debug", "--steps", "2"])
    run_main(lambda: seen.extend(sys.argv[1:]))
    assert seen == ["--steps", "2"]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_every_command_starts_here(path, monkeypatch, capsys):
    """The option `--debug` is in the help, and wrong arguments are one block of lines, once for each machine."""
    start = path.with_name("__main__.py")
    starts = [start if start.exists() else path]
    starts += [door for door in ROOT.glob("training/*.py") if f".{path.stem} import main" in door.read_text()]
    for start in starts:
        call = ast.unparse(ast.parse(start.read_text()).body[-1].body[-1])
        assert call in ("run_main(main)", "run_main(partial(main, launcher=launcher))"), start
    module = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)
    main = importlib.import_module(module).main
    assert run(main, monkeypatch, "--help") == 0 and "--debug" in capsys.readouterr().out
    assert run(main, monkeypatch, "--no_such_option") == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("command.py: error: ") and lines[-1] == "See command.py --help."
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run(main, monkeypatch, "--no_such_option") == 2 and capsys.readouterr().err == ""


@pytest.mark.slow
def test_of_several_processes_one_says_why(tmp_path):
    """All fail in the first run, one of them in the second, which the other hears of."""
    command = [*torchrun(tmp_path / "logs"), __file__]
    text = run_command([*command, "both"], tmp_path / "both", succeeds=False)
    assert text.count("error: `name` must be 1, got 2.") == 1 and f"{Path(__file__).name}: error: " in text
    text = run_command([*command, "second"], tmp_path / "second", succeeds=False)
    assert text.count("`name` must be 1, got 2.") == 1


if __name__ == "__main__":
    from accelerate import Accelerator

    from diffusers_dod.processes import all_or_none

    def main() -> None:
        accelerator = Accelerator()
        if sys.argv[1] == "both":
            raise ValueError("`name` must be 1, got 2.")
        with all_or_none():
            if accelerator.process_index == 1:
                raise ValueError("`name` must be 1, got 2.")

    run_main(main)
