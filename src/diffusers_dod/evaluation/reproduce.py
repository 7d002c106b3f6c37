# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Computes a published number again, from the file that came with it, and says whether it agrees:

    python -m diffusers_dod.evaluation.reproduce docs/results/desk_evaluation.json --rtol 0.01 --trust_extractor

It runs the commands in the file with their arguments. Paths are relative to the current folder, and samples are drawn
again. The exit code is 1 if a number does not agree. Another checkpoint than the published one is refused. Another
extractor, other samples and other data give warnings. An extractor in Python is code that the file names;
it runs with `--trust_extractor` only.
"""

import importlib
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..command_line import run_main
from ..files import file_sha256
from ..metrics.extractors import extractor_file, has_code
from ..options import build_parser, list_options, option, parse_options
from ..results import check_same_checkpoint, identify_checkpoint, read_results
from . import sample
from .compare import CompareOptions
from .compute import ComputeOptions
from .evaluate import EvaluationOptions
from .linear_probe import LinearProbeOptions
from .reconstruction import ReconstructionOptions
from .report import ReportOptions
from .sample import SamplingOptions
from .sweep import SweepOptions


# Commands whose results can be computed again, and their options.
TASKS: dict[str, type] = {
    "evaluate": EvaluationOptions,
    "compare": CompareOptions,
    "report": ReportOptions,
    "reconstruction": ReconstructionOptions,
    "linear_probe": LinearProbeOptions,
    "sweep": SweepOptions,
    "compute": ComputeOptions,
}
# Options for outputs. They get a folder of their own, so that nothing is read back and nothing overwritten.
OUTPUTS = {
    f"--{name}"
    for kind in (*TASKS.values(), SamplingOptions)
    for name, field in list_options(kind).items()
    if field.option.writes is not None
}
# Entries that identify images and statistics, wherever they are.
IDENTITIES = ("sha256", "fingerprint", "images")


def compare(published: dict[str, Any], measured: dict[str, Any], rtol: float) -> list[dict[str, Any]]:
    """
    Compares published numbers with measured ones.

    Args:
        published (`dict`): Results from [`read_results`].
        measured (`dict`): The same results, computed again.
        rtol (`float`): Largest difference that agrees, divided by the published value.

    Returns:
        `list[dict]`: For each published number its `name`, the values `published` and `measured` (`None` if there is
        none), and whether it `agrees`.
    """
    rows = []
    for name, metric in published["metrics"].items():
        value = measured["metrics"].get(name, {}).get("value")
        agrees = value is not None and abs(value - metric["value"]) <= rtol * abs(metric["value"])
        rows.append({"name": name, "published": metric["value"], "measured": value, "agrees": agrees})
    return rows


def _read_values(argv: list[str]) -> Iterator[tuple[int, str, str]]:
    """Yields the index of each word that may hold the value of an option, the option, and the value."""
    for index, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if equals:
            yield index, name, value
        elif index + 1 < len(argv):
            yield index + 1, word, argv[index + 1]


def _redirect(argv: list[str], folder: Path) -> list[str]:
    """Changes arguments so that outputs go to `folder`, named by their options; files keep their suffix."""
    redirected = list(argv)
    for index, name, value in _read_values(argv):
        if name in OUTPUTS:
            suffix = "" if name.endswith("_dir") else Path(value).suffix
            target = folder / f"{name.removeprefix('--')}{suffix}"
            redirected[index] = f"{argv[index].removesuffix(value)}{target}"
    return redirected


def _replace_samples(kind: type, argv: list[str], argument: str, samples: Path) -> list[str]:
    """Replaces the images of an argument of a command with options `kind`, and nothing else that is spelled alike."""
    parser = build_parser(kind)
    name = getattr(parser.parse_args(argv), argument)
    for index in (index for index, word in enumerate(argv) if word == name):
        replaced = [*argv[:index], str(samples), *argv[index + 1 :]]
        if getattr(parser.parse_args(replaced), argument) == str(samples):
            return replaced
    raise ValueError(f"`argv` must name the {argument} in a word of its own, got {argv}.")


def _sample_again(argument: str, argv: list[str], published: dict[str, Any], folder: Path) -> list[str]:
    """Draws the images of an argument again if a command of this package drew them, and returns the new `argv`."""
    manifest = published["data"].get(argument, {}).get("manifest") or {}
    if "argv" not in manifest:
        return argv
    sample.main(_redirect(manifest["argv"], folder / argument))
    again = folder / argument / "output_dir"
    if "--all_stages" in manifest["argv"]:
        if "settings" not in manifest:
            raise ValueError(f"`data.{argument}.manifest.settings` must be there for `--all_stages`, got none.")
        again /= f"stage-{manifest['settings']['stage']}"
    return _replace_samples(TASKS[published["task"]], argv, argument, again)


def _check_files(path: Path, data: dict[str, Any]) -> None:
    """Raises unless the files are there that the results say where to download."""
    for entry in data.values():
        if isinstance(entry, dict) and "url" in entry and not Path(entry["name"]).exists():
            raise ValueError(
                f"{entry['name']} of {path} must be there, got none: download it from {entry['url']} "
                f"into {Path.cwd()}."
            )


def _check_code(path: Path, argv: list[str]) -> None:
    """Raises if a command would run code that it names."""
    found = [value for _, name, value in _read_values(argv) if name == "--extractor" and has_code(value)]
    found += [word for word in argv if word.startswith("--trust")]
    if found:
        raise ValueError(
            f"`trust_extractor` must be given, since {path} has the code of {', '.join(found)} run, got none: read it "
            "first."
        )


def _check_extractor(published: dict[str, Any], measured: dict[str, Any]) -> None:
    """Warns if the extractor is not the published one; in older results its hash is that of its file alone."""
    wanted, found = (results["settings"].get("extractor_sha256") for results in (published, measured))
    if wanted != found and wanted is not None:
        name = published["settings"].get("extractor")
        file = None if name is None else extractor_file(str(name))
        if file is None or file_sha256(file) != wanted:
            warnings.warn(f"The extractor {name!r} is not the published one.", stacklevel=3)


def _find_identities(data: dict[str, Any], name: str = "data") -> dict[str, Any]:
    """Identities of data by their place in results; a manifest and its samples have the same ones."""
    found = {}
    for key, value in data.items():
        if isinstance(value, dict) and key != "manifest":
            found |= _find_identities(value, f"{name}.{key}")
        elif key in IDENTITIES:
            found[f"{name}.{key}"] = value
    return found


def _check_data(published: dict[str, Any], measured: dict[str, Any]) -> None:
    """Warns if the data are not the published ones."""
    found = _find_identities(measured["data"])
    for name, wanted in _find_identities(published["data"]).items():
        if found.get(name) != wanted:
            warnings.warn(f"`{name}` is not the published {wanted!r}, got {found.get(name)!r}.", stacklevel=3)


def reproduce(
    path: Path, rtol: float, output_file: Path | None = None, trust_extractor: bool = False
) -> list[dict[str, Any]]:
    """
    Computes published results again, the samples included.

    Args:
        path (`Path`): The file of results.
        rtol (`float`): Tolerance, see [`compare`].
        output_file (`Path`, *optional*): File for the new results.
        trust_extractor (`bool`, defaults to `False`): Whether code that the results name may be run.

    Returns:
        `list[dict]`: The comparison by [`compare`].

    Raises:
        `ValueError`: it is not a file of results, it names an unknown command or code that is not trusted, or the
            checkpoint is another one.
    """
    published = read_results(path)
    if published["task"] not in TASKS:
        raise ValueError(f"`task` of {path} must be one of {', '.join(TASKS)}, got {published['task']!r}.")
    if not trust_extractor:
        _check_code(path, published["argv"])
    if (checkpoint := published.get("checkpoint")) is not None:
        found = identify_checkpoint(checkpoint["path"], checkpoint.get("lora_weights", {}).get("path"))
        check_same_checkpoint(checkpoint, found, "the published one")
    _check_files(path, published["data"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        argv = list(published["argv"])
        if "--output_file" not in argv:
            argv += ["--output_file", "results.json"]
        argv = _redirect(argv, folder)
        for argument in ("samples", "others"):
            argv = _sample_again(argument, argv, published, folder)
        target = Path(argv[argv.index("--output_file") + 1])
        importlib.import_module(f"{__package__}.{published['task']}").main(argv)
        if output_file is not None:
            output_file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(target, output_file)
        measured = read_results(target)
        _check_extractor(published, measured)
        _check_data(published, measured)
        return compare(published, measured, rtol)


@dataclass(frozen=True, kw_only=True)
class ReproductionOptions:
    """Options of the command."""

    results: Path = option(is_positional=True, help="File of results.")
    rtol: float = option(1e-3, at_least=0, help="Accepted difference, as a share of the number.")
    output_file: Path | None = option(None, writes="file", help="JSON file of the new results.")
    trust_extractor: bool = option(False, help="Run the code that the results name, such as an extractor.")


def main(argv: list[str] | None = None) -> None:
    """Runs the command; `argv` defaults to the process's arguments. Raises a `ValueError` if they do not fit."""
    options = parse_options(ReproductionOptions, argv, __doc__)
    rows = reproduce(options.results, options.rtol, options.output_file, options.trust_extractor)
    print("| | published | measured | agrees |\n| --- | ---: | ---: | --- |")
    for row in rows:
        measured = "missing" if row["measured"] is None else f"{row['measured']:.6g}"
        print(f"| {row['name']} | {row['published']:.6g} | {measured} | {'yes' if row['agrees'] else 'NO'} |")
    if not all(row["agrees"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
