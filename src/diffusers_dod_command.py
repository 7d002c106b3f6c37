# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
The command `dod`: one door to all commands of the package.

It lies beside the package, not in it, since the package imports PyTorch and Diffusers, which takes seconds. So help
and errors come at once, and only the command that is called is imported.
"""

import contextlib
import difflib
import importlib
import io
import os
import re
import sys
from collections.abc import Iterable
from importlib.metadata import version
from typing import NoReturn


PACKAGE = "diffusers_dod"
# Name of a command -> module whose `main` it is, and a line of help.
COMMANDS = {
    "sample": ("evaluation.draw", "Draw images of classes, or variations of an image, into a PNG file."),
    "info": ("evaluation.info", "Say what a folder or file is, and which commands go on with it."),
    "demo": ("demo.app", "Serve a page for the browser that samples a pipeline."),
    "download": ("download", "Download a pipeline from the Hugging Face Hub."),
    "sample-dataset": (
        "evaluation.sample",
        "Write many images for an evaluation, on any number of processes.",
    ),
    "train": ("training.train", "Train a model, from a recipe by name or by file."),
    "token-prior": ("training.token_prior", "Train a generator of latent tokens, which takes the place of stage 1."),
    "encode": ("training.encode_latents", "Encode images into latents for training."),
    "evaluate": ("evaluation.evaluate", "Compare samples with reference images: FID, IS, precision, recall, ..."),
    "compare": ("evaluation.compare", "Measure the difference of two sets of samples, with its interval."),
    "report": ("evaluation.report", "Measure all that samples and reference allow, as Markdown or LaTeX."),
    "sweep": ("evaluation.sweep", "Measure stages, steps and guidance scales in one table."),
    "probe": ("evaluation.linear_probe", "Measure what latent tokens know about classes."),
    "reconstruct": ("evaluation.reconstruction", "Measure what a visual prior keeps of an image."),
    "reproduce": ("evaluation.reproduce", "Measure a published result again."),
    "cost": ("training.cost", "Compute time, memory and price of a training."),
    "compute": ("evaluation.compute", "Compute the operations of sampling."),
    "plot": ("training.plot_metrics", "Plot the metrics of trainings."),
    "average": ("training.posthoc_ema", "Make another average of the weights after a training."),
    "card": ("training.model_card", "Write model cards."),
    "export": ("remote_code", "Write a pipeline with its code, for those who have not installed this package."),
    "convert": ("conversion", "Convert FiTv2 checkpoints, both ways."),
}
HELP = """\
usage: dod COMMAND [options]

Diffusion on Diffusion: images in stages, with visual priors.

  dod sample marble bricks -o images.png
  dod train --config desk --output_dir outputs/run
  dod train --help

{commands}
  {completion:{width}}Print a script that completes commands and options in bash and zsh.

options:
  --help, --version; after a command --help shows its options, and --debug the traceback of an error.
"""
COMPLETION = "completion"
SCRIPT = """\
# Completes commands and options of dod, and files. In zsh after: autoload -U +X bashcompinit && bashcompinit
_dod() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" words=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{commands}"
    else
        case "${{COMP_WORDS[1]}}" in
{cases}
        esac
        case "$word" in -*) ;; *) words="" ;; esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _dod dod
"""


def _fail(message: str) -> NoReturn:
    print(f"dod: error: {message}\nSee dod --help.", file=sys.stderr)
    sys.exit(2)


def _format_help() -> str:
    width = max(map(len, [*COMMANDS, COMPLETION])) + 2
    commands = "\n".join(f"  {name:{width}}{text}" for name, (_, text) in COMMANDS.items())
    return HELP.format(commands=f"commands:\n{commands}", completion=COMPLETION, width=width)


def _import_main(name: str):
    return importlib.import_module(f"{PACKAGE}.{COMMANDS[name][0]}").main


def list_option_names(name: str) -> list[str]:
    """
    Lists the options of a command, as its help has them.

    Args:
        name (`str`): Name of the command.

    Returns:
        `list[str]`: The options, such as `--seed`; none of a command that needs a package which is not installed.
    """
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit, ImportError):
        _import_main(name)(["--help"])
    names = "\n".join(re.findall(r"^  (-.*?)(?:  |$)", text.getvalue(), re.MULTILINE))  # without help and defaults
    return list(dict.fromkeys(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", names)))


def format_completion(options: dict[str, Iterable[str]]) -> str:
    """
    Writes the script that completes `dod` in a shell, with all names in it: it starts no Python.

    Args:
        options (`dict[str, Iterable[str]]`): The options of each command.

    Returns:
        `str`: The script.
    """
    cases = [f'            {name}) words="{" ".join(options[name])}" ;;' for name in options]
    return SCRIPT.format(commands=" ".join([*COMMANDS, COMPLETION]), cases="\n".join(cases))


def main(argv: list[str] | None = None) -> None:
    """Runs the command that the first of the arguments names; `argv` defaults to the process's."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name == "help" and arguments:
        name, arguments = arguments[0], ["--help"]
    if arguments and name in ("-h", "--help", "--version", COMPLETION):
        _fail(f"`{name}` must stand alone, got {' '.join(arguments)!r} behind it.")
    if name in ("-h", "--help", "help"):
        print(_format_help(), end="")
    elif name == "--version":
        print(version("diffusers-dod"))
    elif name == COMPLETION:
        print(format_completion({command: list_option_names(command) for command in COMMANDS}), end="")
    elif name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f" Did you mean {close[0]}?" if close else ""
        _fail(f"`COMMAND` must be one of {', '.join(COMMANDS)}, got {name!r}.{hint}")
    else:
        sys.argv = [f"dod {name}", *arguments]  # which usage and errors of the command begin with
        if not sys.stderr.isatty():  # bars of progress would fill a file
            os.environ.setdefault("TQDM_DISABLE", "1")
        try:
            from diffusers_dod.command_line import run_main
        except KeyboardInterrupt:
            sys.exit(130)
        run_main(lambda: _import_main(name)())


if __name__ == "__main__":
    main()
