# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Linear probe: how much of the class is in the latent tokens (paper, Table 2, Top-1)?

    python -m diffusers_dod.evaluation.linear_probe --pretrained_model_name_or_path outputs/dod-b \\
        --train_data_dir path/to/imagenet/train --num_images 100000 \\
        --test_data_dir path/to/imagenet/val --num_test_images 50000 \\
        --cache_dir outputs/probe --output_file results/linear_probe.json

It trains a linear classifier, and looks up nearest neighbours, on three kinds of features:

    lem         the tokens of the latent embedder
    random_lem  the tokens of a latent embedder with random weights, for comparison
    latents     the latents, averaged on a square grid with about as many values as the tokens, for comparison

Features come from the posterior mean of an image's latents, without augmentation. By default all tokens are joined
(N * d_e numbers); `--pooling mean` averages them. The paper does not say which.

Every feature is standardised by mean and standard deviation of the training images. For each seed a tenth of the
training images is set apart. One classifier per learning rate is trained on the others. The classifier that is best on
the tenth is tested on the test images, which choose nothing. Accuracies are means over seeds. `interval` is the 95 %
Wilson interval for the number of test images, and `standard_error` that of the mean over seeds.
"""

import hashlib
import json
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..checks import check_at_least, check_choice
from ..command_line import run_main
from ..metrics.intervals import wilson_interval
from ..metrics.table import METRICS
from ..options import option, parse_options, replace_values
from ..results import as_metric, identify_checkpoint, write_results
from ..seeding import stateless_generator
from ..tables import format_table
from .options import ComparisonOptions, draw_labelled_images, load_with_embedder
from .token_features import FEATURES, RANDOM_LEM_SEED, cache_path, compute_tokens, read_tokens, write_tokens


POOLING = ("flatten", "mean")
VALIDATION_SHARE = 0.1
TOP_5_MIN_CLASSES = 10


def to_features(tokens: torch.Tensor, pooling: str) -> torch.Tensor:
    """
    Makes one row of features per image.

    Args:
        tokens (`torch.Tensor` of shape `(n, N, width)`): The tokens.
        pooling (`str`): `"flatten"` joins them, `"mean"` averages them.

    Returns:
        `torch.Tensor` of shape `(n, N * width)` or `(n, width)`.

    Raises:
        `ValueError`: the pooling is neither of these.
    """
    check_choice("pooling", pooling, POOLING)
    return tokens.flatten(1) if pooling == "flatten" else tokens.mean(dim=1)


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """Classifiers of the probe."""

    learning_rates: tuple[float, ...] = option(
        (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0), above=0, help="Learning rates to choose from."
    )
    num_epochs: int = option(50, at_least=1, help="Passes of each classifier over its images.")
    probe_batch_size: int = option(256, at_least=1, help="Images per step of a classifier.")
    num_seeds: int = option(3, at_least=1, help="Number of seeds, from `--seed` on, each with a classifier.")
    num_neighbors: int = option(20, at_least=1, help="The k of k-NN.")


def standardise(train: torch.Tensor, test: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Shifts and scales each feature to mean 0 and standard deviation 1 on the training images.

    Args:
        train (`torch.Tensor` of shape `(n, d)`): Features of the training images.
        test (`torch.Tensor` of shape `(m, d)`): Features of the test images.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Features of both sets, standardised by the training images. A feature
        that is the same for all of these is only shifted.
    """
    std, mean = torch.std_mean(train, dim=0, correction=0)
    std = torch.where(std > 0, std, 1)
    return (train - mean) / std, (test - mean) / std


def split_validation(num_samples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Divides training samples at random.

    Args:
        num_samples (`int`): Number of samples, at least 2.
        seed (`int`): Seed of the division.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Indices to train on, and a tenth (at least one) to choose by.

    Raises:
        `ValueError`: there are fewer than 2 samples.
    """
    check_at_least("num_samples", num_samples, 2)
    order = torch.randperm(num_samples, generator=stateless_generator(seed, 0))
    num_validation = max(1, round(VALIDATION_SHARE * num_samples))
    return order[num_validation:], order[:num_validation]


def train_classifiers(
    features: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    options: ProbeOptions,
    seed: int,
) -> list[nn.Linear]:
    """
    Trains a linear classifier for each learning rate, all on the same batches.

    It uses cross-entropy, AdamW without weight decay, a cosine schedule to 0, and zero weights at the start.

    Args:
        features (`torch.Tensor` of shape `(n, d)`): Standardised features.
        labels (`torch.Tensor` of shape `(n,)`): Class ids.
        num_classes (`int`): Number of classes.
        options ([`ProbeOptions`]): Learning rates, passes over the samples and samples per step.
        seed (`int`): Seed of the order of the samples.

    Returns:
        `list[nn.Linear]`: A classifier per learning rate.
    """
    classifiers = [nn.Linear(features.shape[1], num_classes).to(features.device) for _ in options.learning_rates]
    for parameter in nn.ModuleList(classifiers).parameters():
        nn.init.zeros_(parameter)
    groups = [
        {"params": list(classifier.parameters()), "lr": rate}
        for classifier, rate in zip(classifiers, options.learning_rates, strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    num_steps = options.num_epochs * -(-len(features) // options.probe_batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for epoch in range(options.num_epochs):
        order = torch.randperm(len(features), generator=stateless_generator(seed, 1, epoch))
        for batch in order.to(features.device).split(options.probe_batch_size):
            # Each loss has its own parameters, so the gradient of the sum is the gradient of each.
            sum(F.cross_entropy(classifier(features[batch]), labels[batch]) for classifier in classifiers).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return classifiers


def top_k_accuracy(scores: torch.Tensor, labels: torch.Tensor, k: int) -> float:
    """Share of rows of `scores` (n, classes) that have their label in `labels` (n,) among the `k` largest."""
    return float((scores.topk(k, dim=1).indices == labels[:, None]).any(dim=1).float().mean())


@torch.no_grad()
def knn_scores(
    train: torch.Tensor,
    train_labels: torch.Tensor,
    test: torch.Tensor,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
    batch_size: int = 1024,
) -> torch.Tensor:
    """
    Votes of the nearest neighbours by cosine similarity s, each of weight exp(s / temperature) (Wu et al. 2018; DINO).

    Args:
        train (`torch.Tensor` of shape `(n, d)`): Features of the neighbours.
        train_labels (`torch.Tensor` of shape `(n,)`): Class ids of the neighbours.
        test (`torch.Tensor` of shape `(m, d)`): Features to classify.
        num_classes (`int`): Number of classes.
        k (`int`, defaults to 20): Number of neighbours.
        temperature (`float`, defaults to 0.07): The temperature.
        batch_size (`int`, defaults to 1024): Rows of `test` at a time; a batch needs batch_size * n numbers of memory.

    Returns:
        `torch.Tensor` of shape `(m, num_classes)`: The votes for each class.

    Raises:
        `ValueError`: there are fewer than k neighbours.
    """
    if not 1 <= k <= len(train):
        raise ValueError(f"`k` must be in [1, {len(train)}], the number of training samples, got {k}.")
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    votes = torch.zeros(len(test), num_classes, device=test.device)
    for rows, found in zip(votes.split(batch_size), test.split(batch_size), strict=True):
        similarities, neighbours = (found @ train.T).topk(k, dim=1)
        rows.scatter_add_(1, train_labels[neighbours], (similarities / temperature).exp())
    return votes


def probe(
    train: tuple[torch.Tensor, torch.Tensor],
    test: tuple[torch.Tensor, torch.Tensor],
    num_classes: int,
    options: ProbeOptions,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """
    Measures the accuracies of a linear classifier and of nearest neighbours. The test images choose nothing.

    Args:
        train (`tuple[torch.Tensor, torch.Tensor]`): Features (n, d) of the training images, and their class ids (n,).
        test (`tuple[torch.Tensor, torch.Tensor]`): Features (m, d) of the test images, and their class ids (m,).
        num_classes (`int`): Number of classes.
        options ([`ProbeOptions`]): Settings of the classifiers. Each seed chooses among their learning rates by
            validation images of its own.
        seed (`int`, defaults to 0): First seed of the validation images and of the order of the others.

    Returns:
        `dict[str, dict]`: An [`as_metric`] for `top1`, `top5` (with at least 10 classes) and `knn`, in [0, 1].
    """
    (train, train_labels), (test, test_labels) = train, test
    train, test = standardise(train, test)
    learning_rates = options.learning_rates
    top = [1, 5] if num_classes >= TOP_5_MIN_CLASSES else [1]
    accuracies: list[list[float]] = []
    chosen, validation_accuracies = [], []
    for current_seed in range(seed, seed + options.num_seeds):
        fit, validation = split_validation(len(train), current_seed)
        fit, validation = fit.to(train.device), validation.to(train.device)
        classifiers = train_classifiers(train[fit], train_labels[fit], num_classes, options, current_seed)
        with torch.no_grad():
            found = [top_k_accuracy(model(train[validation]), train_labels[validation], 1) for model in classifiers]
            best = int(np.argmax(found))  # the first of equal ones
            scores = classifiers[best](test)
        is_at_end = learning_rates[best] in (min(learning_rates), max(learning_rates))
        if is_at_end and len(learning_rates) > 2 and found.count(found[best]) == 1:
            warnings.warn(
                f"The best of `learning_rates` is at their end, {learning_rates[best]:g}: others may be better.",
                stacklevel=2,
            )
        chosen.append(learning_rates[best])
        validation_accuracies.append(found[best])
        accuracies.append([top_k_accuracy(scores, test_labels, count) for count in top])
    metrics = {}
    for count, values in zip(top, np.array(accuracies).T, strict=True):
        mean = float(values.mean())
        error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
        metrics[f"top{count}"] = as_metric(
            mean, wilson_interval(mean, len(test)), standard_error=error, values=values.tolist()
        )
    metrics["top1"] |= {"learning_rates": chosen, "validation_accuracies": validation_accuracies}
    knn = top_k_accuracy(knn_scores(train, train_labels, test, num_classes, options.num_neighbors), test_labels, 1)
    return metrics | {"knn": as_metric(knn, wilson_interval(knn, len(test)))}


def to_table(rows: dict[str, dict[str, dict[str, Any]]], num_values: dict[str, int]) -> str:
    """Formats `rows`, a [`probe`] for each kind of features, and their `num_values` as a Markdown table."""
    names = [name for name in ("top1", "top5", "knn") if name in next(iter(rows.values()))]
    lines = []
    for kind, metrics in rows.items():
        cells = [kind, str(num_values[kind])]
        for name in names:
            error = metrics[name].get("standard_error")
            cells.append(f"{100 * metrics[name]['value']:.1f} %" + ("" if error is None else f" ± {100 * error:.1f}"))
        lines.append([*cells, ", ".join(f"{rate:g}" for rate in metrics["top1"]["learning_rates"])])
    return format_table(["features", "numbers", *(METRICS[name].title for name in names), "learning rates"], lines)


@dataclass(frozen=True, kw_only=True)
class LinearProbeOptions:
    """Options of the command."""

    comparison: ComparisonOptions
    test_data_dir: str | None = option(
        None,
        needs="train_data_dir",
        help="Folder of the test images, in the form of `--train_data_dir`; others of the same data if not given.",
    )
    num_test_images: int = option(
        10_000, at_least=1, aliases=("num_test_pictures",), help="Number of images to test on."
    )
    features: tuple[str, ...] = option(FEATURES, choices=FEATURES, help="What to probe.")
    pooling: str = option("flatten", choices=POOLING, help="How tokens become features.")
    cache_dir: Path | None = option(
        None,
        writes="folder",
        help="Where tokens are kept for other calls of this command.",
    )
    probe: ProbeOptions = field(default_factory=ProbeOptions)

    def find_conflicts(self) -> list[str]:
        """Messages about options that do not fit each other."""
        num_images, num_neighbors = self.comparison.num_images, self.probe.num_neighbors
        if num_neighbors <= num_images:
            return []
        return [f"`num_neighbors` must be at most `num_images` = {num_images}, got {num_neighbors}."]


def main(argv: list[str] | None = None) -> None:
    """Runs the command; `argv` defaults to the process's arguments. Raises a `ValueError` if they do not fit."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse_options(LinearProbeOptions, argv, __doc__)
    comparison, probe_options = options.comparison, options.probe
    if options.test_data_dir is None:
        images, chosen, data = draw_labelled_images(comparison, comparison.num_images + options.num_test_images)
        test_images, test_data = images, data
        train_indices, test_indices = (
            sorted(chosen[: comparison.num_images]),
            sorted(chosen[comparison.num_images :]),
        )
    else:
        images, train_indices, data = draw_labelled_images(comparison, comparison.num_images)
        others = replace_values(comparison, train_data_dir=options.test_data_dir)
        test_images, test_indices, test_data = draw_labelled_images(others, options.num_test_images)
        if test_images.class_names != images.class_names:
            raise ValueError(
                "`test_data_dir` must have the classes of `train_data_dir`, "
                f"got {len(test_images.class_names)} and {len(images.class_names)} that are not the same."
            )
        if test_data["images"] == data["images"]:
            raise ValueError(
                "`test_data_dir` must hold other images than `train_data_dir`, "
                f"got the same in {options.test_data_dir} and {comparison.images.train_data_dir}."
            )
        train_indices.sort()
        test_indices.sort()

    checkpoint = identify_checkpoint(comparison.pretrained_model_name_or_path, comparison.lora_weights)
    sha256 = {"checkpoint": checkpoint["sha256"]}
    if "lora_weights" in checkpoint:
        sha256["lora_weights"] = checkpoint["lora_weights"]["sha256"]
    pipeline = None
    tokens = []
    for source, indices, description in ((images, train_indices, data), (test_images, test_indices, test_data)):
        settings = {
            **sha256,
            "data": {name: value for name, value in description.items() if name != "name"},  # wherever it lies
            "indices": hashlib.sha256(json.dumps(indices).encode()).hexdigest(),
            "columns": [comparison.images.image_column, comparison.images.label_column],
            "dtype": comparison.dtype,
            "device": torch.device(comparison.device).type,
            "batch_size": comparison.batch_size,
            "random_lem_seed": RANDOM_LEM_SEED,
        }
        path = None if options.cache_dir is None else cache_path(options.cache_dir, settings)
        if path is not None and path.exists():
            tokens.append(read_tokens(path, settings))
            continue
        pipeline = load_with_embedder(comparison) if pipeline is None else pipeline
        tokens.append(
            compute_tokens(pipeline, source, indices, comparison.batch_size, comparison.dataloader_num_workers)
        )
        if path is not None:
            write_tokens(path, tokens[-1], settings)

    train, test = ({name: values.to(comparison.device) for name, values in part.items()} for part in tokens)
    rows, num_values = {}, {}
    for kind in options.features:
        features = [to_features(part[kind], options.pooling) for part in (train, test)]
        num_values[kind] = features[0].shape[1]
        rows[kind] = probe(
            (features[0], train["labels"]),
            (features[1], test["labels"]),
            len(images.class_names),
            probe_options,
            comparison.seed,
        )
    print(to_table(rows, num_values))
    write_results(
        comparison.output_file,
        task="linear_probe",
        argv=argv,
        metrics={f"{name}_{kind}": metric for kind, metrics in rows.items() for name, metric in metrics.items()},
        data={
            "name": data["name"],
            "train": data,
            "test": test_data,
            "num_images": comparison.num_images,
            "num_test": options.num_test_images,
        },
        settings={
            "features": num_values,
            "pooling": options.pooling,
            "classifier": "linear, AdamW without weight decay, cosine schedule to 0, standardised features",
            "learning_rates": probe_options.learning_rates,
            "num_epochs": probe_options.num_epochs,
            "probe_batch_size": probe_options.probe_batch_size,
            "seeds": list(range(comparison.seed, comparison.seed + probe_options.num_seeds)),
            "validation_share": VALIDATION_SHARE,
            "knn": f"k = {probe_options.num_neighbors}, cosine of standardised features, temperature 0.07",
            "batch_size": comparison.batch_size,
            "dtype": comparison.dtype,
        },
        device=comparison.device,
        checkpoint=checkpoint,
    )


if __name__ == "__main__":
    run_main(main)
