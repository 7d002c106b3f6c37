# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Writes results into the metadata of a model card, as the `model-index` that the Hub shows:

    python -m diffusers_dod.evaluation.cards outputs/dod-b/README.md outputs/evaluation.json
"""

import argparse
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from .results import read_results


# The names of metrics on the Hub, where they differ; ours may go on after `_` or `/`.
METRIC_TYPES = {"is": "inception_score", "top1": "accuracy", "knn": "accuracy", "rfid": "fid"}
TASK_TYPES = {"linear_probe": "image-classification"}


def to_eval_results(results: dict[str, Any]) -> list[EvalResult]:
    """
    Results as the Hub's cards take them.

    Args:
        results (`dict`): What [`read_results`] returns.

    Returns:
        `list[EvalResult]`: One for each number; its name says the settings that it depends on.
    """
    dataset = str(results["data"].get("name", "unnamed data"))
    sampling = results["data"].get("samples", {}).get("manifest", {}).get("settings", {})
    settings = ", ".join(
        f"{name} {value}" for name, value in sorted((sampling | results["settings"]).items()) if value is not None
    )
    evaluated = []
    for name, metric in results["metrics"].items():
        interval = metric["interval"]
        shown = "" if interval is None else f" (95 %: {interval[0]:.4g} to {interval[1]:.4g})"
        evaluated.append(
            EvalResult(
                task_type=TASK_TYPES.get(results["task"], "unconditional-image-generation"),
                dataset_type=dataset,
                dataset_name=dataset,
                metric_type=METRIC_TYPES.get(kind := re.split("[_/]", name)[0], kind),
                metric_name=f"{name}{shown}",
                metric_value=metric["value"],
                metric_config=settings or None,
            )
        )
    return evaluated


def add_results(card: Path, paths: list[Path]) -> None:
    """
    Puts results into a model card, in place of those that it has.

    Args:
        card (`Path`): The `README.md`.
        paths (`list[Path]`): Files of results.

    Raises:
        `OSError`: a file cannot be read.
        `ValueError`: a file is none of results, or is of another checkpoint than the first one.
    """
    all_results = [read_results(path) for path in paths]
    hashes = [results["checkpoint"] and results["checkpoint"]["sha256"] for results in all_results]
    if len(set(hashes)) > 1:
        raise ValueError(
            f"`paths` must be results of one checkpoint, got {dict(zip(map(str, paths), hashes, strict=True))}."
        )
    model_card = ModelCard.load(card)
    model_card.data.model_name = model_card.data.model_name or card.resolve().parent.name
    model_card.data.eval_results = [entry for results in all_results for entry in to_eval_results(results)]
    model_card.save(card)


def main(argv: list[str] | None = None) -> None:
    """The command; `argv` are its arguments, the process's by default. Raises a `ValueError` where they do not fit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("card", type=Path, help="The model card.")
    parser.add_argument("results", type=Path, nargs="+", help="Files of results.")
    args = parser.parse_args(argv)
    add_results(args.card, args.results)


if __name__ == "__main__":
    main()
