# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""The options of the trainer: from the command, from a recipe, and what they must be."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from diffusers.optimization import SchedulerType

from ..checks import check_at_least, check_number
from ..presets import PRESETS
from .encode_latents import add_data_arguments, find_data_errors
from .finetuning import TRAINABLE_PARAMETERS


# Diffusers' piecewise constant one needs rules of its own.
TRACKERS = ("tensorboard", "wandb", "trackio")
LR_SCHEDULERS = [kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT]


def read_config(path: Path) -> list[str]:
    """
    A recipe as the arguments of a command.

    Args:
        path (`Path`): A YAML file that maps names of options to values; `true` sets a flag, lists are several values.

    Returns:
        `list[str]`: What would stand on the command line.

    Raises:
        `OSError`: the file cannot be read.
        `ValueError`: it is not such a mapping.
    """
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"`config` must be YAML, got {path}: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"`config` must map names of options to values, got {path} with {options!r}.")
    argv: list[str] = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        if not isinstance(name, str) or not all(isinstance(entry, (bool, int, float, str)) for entry in values):
            raise ValueError(f"`config` must map names of options to values, got {name!r}: {value!r} in {path}.")
        if value is False:
            continue
        argv += [f"--{name}"] if value is True else [f"--{name}", *(str(entry) for entry in values)]
    return argv


def parse_args(argv: list[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """
    Parses and checks the arguments of the command.

    Args:
        argv (`list[str]`, *optional*): The arguments; those of the process if not given.
        description (`str`, *optional*): What `--help` says first.

    Returns:
        `argparse.Namespace`. All errors are reported at once, in the way of `argparse`.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--config",
        type=Path,
        help="YAML file of options under their names here; what the command gives as well takes its place.",
    )

    model = parser.add_argument_group("model")
    model.add_argument("--preset", default="DoD-B", choices=list(PRESETS), help="Size of backbone and LEM.")
    model.add_argument(
        "--pretrained_model_name_or_path",
        help="Start from the weights of this pipeline: one trained before, or a converted FiTv2, which becomes the "
        "backbone of a DoD with the preset's LEM. With other classes than its own each starts as its null class.",
    )
    model.add_argument(
        "--trainable_parameters",
        default="all",
        choices=TRAINABLE_PARAMETERS,
        help="What training changes: everything, or biases, norms and embeddings only (DiffFit).",
    )
    model.add_argument("--num_latent_tokens", type=int, help="Overrides the preset's number of latent tokens N.")
    model.add_argument("--latent_token_dim", type=int, help="Overrides the preset's width d_e of a latent token.")

    add_data_arguments(parser)

    optimization = parser.add_argument_group("optimization")
    optimization.add_argument("--train_batch_size", type=int, default=256, help="Samples per process and micro-batch.")
    optimization.add_argument("--gradient_accumulation_steps", type=int, default=1)
    optimization.add_argument("--max_train_steps", type=int, default=400_000, help="Number of optimizer steps.")
    optimization.add_argument("--learning_rate", type=float, default=1e-4)
    optimization.add_argument(
        "--latent_embedder_learning_rate", type=float, help="Learning rate of the LEM, `--learning_rate` by default."
    )
    optimization.add_argument("--lr_scheduler", default="constant_with_warmup", choices=LR_SCHEDULERS)
    optimization.add_argument("--lr_warmup_steps", type=int, default=0, help="In optimizer steps.")
    optimization.add_argument("--adam_beta1", type=float, default=0.9)
    optimization.add_argument("--adam_beta2", type=float, default=0.999)
    optimization.add_argument("--adam_epsilon", type=float, default=1e-8)
    optimization.add_argument("--adam_weight_decay", type=float, default=0.0)
    optimization.add_argument("--max_grad_norm", type=float, default=1.0)
    optimization.add_argument(
        "--ema_decay",
        type=float,
        nargs="+",
        default=[0.999],
        help="Of the averages of the weights; the first is that of pipelines and samples, checkpoints hold all.",
    )
    optimization.add_argument(
        "--ema_sigma_rel",
        type=float,
        nargs="*",
        default=[],
        help="Widths of power-function averages, e.g. 0.05 0.1, for `python -m diffusers_dod.training.posthoc_ema`.",
    )
    optimization.add_argument(
        "--max_nonfinite_steps",
        type=int,
        default=10,
        help="Steps in a row whose gradients are not finite, and which are left out, until the run gives up.",
    )
    optimization.add_argument("--allow_tf32", action="store_true", help="TF32 matrix products on NVIDIA GPUs.")
    optimization.add_argument("--compile", action="store_true", help="Compile the repeated blocks of both models.")
    optimization.add_argument("--label_dropout_prob", type=float, default=0.1, help="Share of null-class samples.")
    optimization.add_argument("--prior_dropout_prob", type=float, default=0.5, help="p_s, share without a prior.")
    optimization.add_argument(
        "--exact_dropout",
        action="store_true",
        help="Drop exactly these shares of the samples of each optimizer step, not each sample on its own.",
    )
    optimization.add_argument(
        "--mixed_precision", choices=["no", "bf16"], help="What `accelerate launch` is configured for, by default."
    )
    optimization.add_argument("--gradient_checkpointing", action="store_true")

    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", type=Path, required=True)
    output.add_argument("--logging_steps", type=int, default=50, help="Steps that a line of metrics averages over.")
    output.add_argument(
        "--report_to",
        nargs="*",
        choices=TRACKERS,
        help="Trackers that get the metrics, beside `metrics.jsonl` in `--output_dir`, which always does.",
    )
    output.add_argument("--validation_steps", type=int, default=1000, help="Sample a grid every so many steps.")
    output.add_argument("--validation_guidance_scale", type=float, help="From stage 2 on, the preset's by default.")
    output.add_argument("--validation_seed", type=int, default=0)
    output.add_argument("--checkpointing_steps", type=int, default=1000)
    output.add_argument("--checkpoints_total_limit", type=int, help="Keep only the newest so many checkpoints.")
    output.add_argument("--resume_from_checkpoint", help="A checkpoint folder, or `latest` for the newest valid one.")
    output.add_argument("--push_to_hub", action="store_true", help="Upload the finished pipeline.")
    output.add_argument("--hub_model_id", help="Repository, by default the name of `--output_dir`.")
    output.add_argument("--hub_token", help="Token, by default the one of the Hub's own login.")

    argv = sys.argv[1:] if argv is None else argv
    config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config.add_argument("--config", type=Path)
    path = config.parse_known_args(argv)[0].config
    try:
        from_config = [] if path is None else read_config(path)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    args = parser.parse_args([*from_config, *argv])
    if errors := find_errors(args):
        parser.error("\n".join(errors))
    return args


def find_errors(args: argparse.Namespace) -> list[str]:
    """
    All that is wrong with options.

    Args:
        args (`argparse.Namespace`): The options.

    Returns:
        `list[str]`: A message for each that is out of range or does not fit another one.
    """
    errors: list[str] = []

    def attempt(check: Callable, *arguments: Any, **kwargs: Any) -> None:
        try:
            check(*arguments, **kwargs)
        except (TypeError, ValueError) as error:
            errors.append(str(error))

    for name in (
        "train_batch_size",
        "gradient_accumulation_steps",
        "max_train_steps",
        "logging_steps",
        "validation_steps",
        "checkpointing_steps",
    ):
        attempt(check_at_least, name, getattr(args, name), 1)
    for name in ("lr_warmup_steps", "validation_seed", "max_nonfinite_steps"):
        attempt(check_at_least, name, getattr(args, name), 0)
    for name in ("num_latent_tokens", "latent_token_dim", "checkpoints_total_limit"):
        if getattr(args, name) is not None:
            attempt(check_at_least, name, getattr(args, name), 1)
    for name in ("learning_rate", "latent_embedder_learning_rate", "max_grad_norm", "adam_epsilon"):
        if getattr(args, name) is not None:
            attempt(check_number, name, getattr(args, name), 0, open_minimum=True)
    for name in ("adam_beta1", "adam_beta2"):
        attempt(check_number, name, getattr(args, name), 0, 1, open_maximum=True)
    for name in ("label_dropout_prob", "prior_dropout_prob"):
        attempt(check_number, name, getattr(args, name), 0, 1)
    for decay in args.ema_decay:
        attempt(check_number, "ema_decay", decay, 0, 1)
    for width in args.ema_sigma_rel:
        attempt(check_number, "ema_sigma_rel", width, 0, 12**-0.5, open_minimum=True, open_maximum=True)
    for name in ("ema_decay", "ema_sigma_rel"):
        if len(set(getattr(args, name))) < len(getattr(args, name)):
            errors.append(f"`{name}` must hold different numbers, got {getattr(args, name)}.")
    attempt(check_number, "adam_weight_decay", args.adam_weight_decay, 0)
    if args.validation_guidance_scale is not None:
        attempt(check_number, "validation_guidance_scale", args.validation_guidance_scale, 0)
    errors += find_data_errors(args, source_is_needed=args.latents_dir is None)
    overrides = args.num_latent_tokens or args.latent_token_dim or args.latent_embedder_learning_rate
    if overrides and PRESETS[args.preset].latent_embedder_config is None:
        errors.append(
            "`num_latent_tokens`, `latent_token_dim` and `latent_embedder_learning_rate` must not be given for "
            f"`preset` {args.preset!r}, which has no latent embedder."
        )
    return errors
