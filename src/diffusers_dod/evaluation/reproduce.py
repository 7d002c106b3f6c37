# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Computes a published number again, from the file that came with it, and says whether it agrees:

    python -m diffusers_dod.evaluation.reproduce docs/results/desk_fid.json --rtol 0.01

The command and its arguments are those in the file, with its paths, relative to where it is called. It ends with the
exit code 1 if a number does not agree, and refuses another checkpoint than the published one. A file of results may
name code to run, its extractor: trust it as you would a script.
"""

import argparse
import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..checks import check_number
from .results import checkpoint_sha256, read_results


OUTPUT_OPTION = "--output_file"
TASKS = ("evaluate", "reconstruction", "linear_probe", "sweep", "compute")


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


def reproduce(path: Path, rtol: float, output_file: Path | None = None) -> list[dict[str, Any]]:
    """
    Computes published results again.

    Args:
        path (`Path`): The file of results.
        rtol (`float`): See [`compare`].
        output_file (`Path`, *optional*): Where the new results go.

    Returns:
        `list[dict]`: What [`compare`] returns.

    Raises:
        `ValueError`: the file is no such file, names no known command, or the checkpoint is another one.
    """
    published = read_results(path)
    if published["task"] not in TASKS:
        raise ValueError(f"`task` of {path} must be one of {', '.join(TASKS)}, got {published['task']!r}.")
    if (checkpoint := published.get("checkpoint")) is not None:
        found = checkpoint_sha256(checkpoint["path"])
        if found != checkpoint["sha256"]:
            raise ValueError(
                f"{checkpoint['path']} must be the published checkpoint, {checkpoint['sha256']}, got {found}."
            )
    argv = list(published["argv"])
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "results.json" if output_file is None else output_file
        if OUTPUT_OPTION in argv:
            argv[argv.index(OUTPUT_OPTION) + 1] = str(target)
        else:
            argv += [OUTPUT_OPTION, str(target)]
        importlib.import_module(f"{__package__}.{published['task']}").main(argv)
        return compare(published, read_results(target), rtol)


def main(argv: list[str] | None = None) -> None:
    """The command; `argv` are its arguments, the process's by default. Raises a `ValueError` where they do not fit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("results", type=Path, help="File of results.")
    parser.add_argument("--rtol", type=float, default=1e-3, help="Difference that is let pass, over the number.")
    parser.add_argument("--output_file", type=Path, help="Where the new results go.")
    args = parser.parse_args(argv)
    check_number("rtol", args.rtol, 0)
    rows = reproduce(args.results, args.rtol, args.output_file)
    print("| | published | measured | agrees |\n| --- | ---: | ---: | --- |")
    for row in rows:
        measured = "missing" if row["measured"] is None else f"{row['measured']:.6g}"
        print(f"| {row['name']} | {row['published']:.6g} | {measured} | {'yes' if row['agrees'] else 'NO'} |")
    if not all(row["agrees"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
