# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Computes a published number again, from the file that came with it, and says whether it agrees:

    python -m diffusers_dod.evaluation.reproduce docs/results/desk_evaluation.json --rtol 0.01 --trust_extractor

The commands and their arguments are those in the file, with its paths, relative to where it is called; samples are
drawn again. It ends with the exit code 1 if a number does not agree, and refuses another checkpoint than the published
one. Where the file names code, an extractor, it is run with `--trust_extractor` only; another one is warned of.
"""

import argparse
import importlib
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from ..checks import check_number
from . import sample
from .extractors import extractor_file
from .results import check_output, checkpoint_sha256, file_sha256, read_results


TASKS = ("evaluate", "reconstruction", "linear_probe", "sweep", "compute")
# What a command writes or keeps goes into a folder of its own, so that nothing is read back and nothing overwritten.
OUTPUTS = ("--output_file", "--output_dir", "--cache_dir", "--save_statistics", "--grid_file")
CODE = (".py", ".pt", ".ts")


def compare(published: dict[str, Any], measured: dict[str, Any], rtol: float) -> list[dict[str, Any]]:
    """
    Numbers beside each other.

    Args:
        published (`dict`): Results as [`read_results`] returns them.
        measured (`dict`): The same, computed again.
        rtol (`float`): By how much they may differ, over the published value.

    Returns:
        `list[dict]`: For each published number its `name`, the values `published` and `measured`, `None` where there
        is none, and whether it `agrees`.
    """
    rows = []
    for name, metric in published["metrics"].items():
        value = measured["metrics"].get(name, {}).get("value")
        agrees = value is not None and abs(value - metric["value"]) <= rtol * abs(metric["value"])
        rows.append({"name": name, "published": metric["value"], "measured": value, "agrees": agrees})
    return rows


def _redirect(argv: list[str], folder: Path) -> list[str]:
    """Arguments whose outputs go to `folder`."""
    redirected = list(argv)
    for index, word in enumerate(argv):
        option, equals, value = word.partition("=")
        if option not in OUTPUTS:
            continue
        target = folder / f"{option.removeprefix('--')}{Path(value if equals else argv[index + 1]).suffix}"
        if equals:
            redirected[index] = f"{option}={target}"
        else:
            redirected[index + 1] = str(target)
    return redirected


def _check_code(path: Path, argv: list[str]) -> None:
    """Raises if a command would run code out of a file that it names."""
    found = [word for word in argv if word.partition(":")[0].endswith(CODE) or word.startswith("--trust")]
    if found:
        raise ValueError(
            f"`trust_extractor` must be given, since {path} has the code of {', '.join(found)} run, got none: read it "
            "first."
        )


def _check_extractor(published: dict[str, Any], measured: dict[str, Any]) -> None:
    """Warns of another extractor than the published one, whose hash was that of its file alone in older results."""
    wanted, found = (results.get("settings", {}).get("extractor_sha256") for results in (published, measured))
    if wanted != found and wanted is not None:
        name = published["settings"]["extractor"]
        file = extractor_file(name)
        if file is None or file_sha256(file) != wanted:
            warnings.warn(f"The extractor {name!r} is not the published one.", stacklevel=3)


def reproduce(
    path: Path, rtol: float, output_file: Path | None = None, trust_extractor: bool = False
) -> list[dict[str, Any]]:
    """
    Computes published results again, the samples included.

    Args:
        path (`Path`): The file of results.
        rtol (`float`): See [`compare`].
        output_file (`Path`, *optional*): Where the new results go.
        trust_extractor (`bool`, defaults to `False`): Whether code in a file that the results name may be run.

    Returns:
        `list[dict]`: What [`compare`] returns.

    Raises:
        `ValueError`: the file is no such file, names no known command or code that is not trusted, or the checkpoint
            is another one.
    """
    published = read_results(path)
    if published["task"] not in TASKS:
        raise ValueError(f"`task` of {path} must be one of {', '.join(TASKS)}, got {published['task']!r}.")
    if not trust_extractor:
        _check_code(path, published["argv"])
    if (checkpoint := published.get("checkpoint")) is not None:
        found = checkpoint_sha256(checkpoint["path"])
        if found != checkpoint["sha256"]:
            raise ValueError(
                f"{checkpoint['path']} must be the published checkpoint, {checkpoint['sha256']}, got {found}."
            )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        argv = list(published["argv"])
        if "--output_file" not in argv:
            argv += ["--output_file", "results.json"]
        argv = _redirect(argv, folder)
        samples = published["data"].get("samples", {})
        if (manifest := samples.get("manifest")) is not None:
            sample.main(_redirect(manifest["argv"], folder / "samples"))
            again = folder / "samples" / "output_dir"
            if "--all_stages" in manifest["argv"]:
                again /= f"stage-{manifest['settings']['stage']}"
            argv = [str(again) if word == samples["name"] else word for word in argv]
        target = Path(argv[argv.index("--output_file") + 1])
        importlib.import_module(f"{__package__}.{published['task']}").main(argv)
        if output_file is not None:
            output_file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(target, output_file)
        measured = read_results(target)
        _check_extractor(published, measured)
        return compare(published, measured, rtol)


def main(argv: list[str] | None = None) -> None:
    """The command; `argv` are its arguments, the process's by default. Raises a `ValueError` where they do not fit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("results", type=Path, help="File of results.")
    parser.add_argument("--rtol", type=float, default=1e-3, help="Difference that is let pass, over the number.")
    parser.add_argument("--output_file", type=Path, help="Where the new results go.")
    parser.add_argument(
        "--trust_extractor", action="store_true", help="Run the code that the results name, such as an extractor."
    )
    args = parser.parse_args(argv)
    check_number("rtol", args.rtol, 0)
    check_output("output_file", args.output_file)
    rows = reproduce(args.results, args.rtol, args.output_file, args.trust_extractor)
    print("| | published | measured | agrees |\n| --- | ---: | ---: | --- |")
    for row in rows:
        measured = "missing" if row["measured"] is None else f"{row['measured']:.6g}"
        print(f"| {row['name']} | {row['published']:.6g} | {measured} | {'yes' if row['agrees'] else 'NO'} |")
    if not all(row["agrees"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
