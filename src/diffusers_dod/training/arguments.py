# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""The options of the trainer: from the command, from a recipe, and what they must be."""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import yaml
from diffusers.optimization import SchedulerType

from ..checks import attempt, check_at_least, check_number
from ..compute import OPTIMIZERS
from ..finetuning import TRAINABLE_PARAMETERS
from ..presets import PRESETS
from ..processes import DISTRIBUTED_TYPES
from .encode_latents import add_data_arguments, find_data_errors


# What a recipe that is published does not name.
LOCAL_OPTIONS = ("config", "train_data_dir", "latents_dir", "output_dir", "resume_from_checkpoint", "class_names_file")
LOCAL_OPTIONS += ("fid_extractor", "fid_reference")
LOCAL_OPTIONS += ("push_to_hub", "push_every", "push_training_state", "hub_model_id", "hub_token")
# What it does not name where it is a folder of this machine.
PLACES = ("dataset_name", "pretrained_model_name_or_path", "pretrained_vae_name_or_path", "repa_model_name_or_path")
REPA_OPTIONS = ("repa_weight", "repa_layer", "repa_prior_weight", "repa_stop_step")
STORAGE_OPTIONS = ("latents_dir", "latents_dtype", "max_aspect_ratio", "shard_size", "encoding_batch_size")
TRACKERS = ("tensorboard", "wandb", "trackio")
# Diffusers' piecewise constant one needs rules of its own.
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


def build_parser(description: str | None = None) -> argparse.ArgumentParser:
    """The options of the trainer, without what they must be; `description` is what `--help` says first."""
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
    model.add_argument("--patch_size", type=int, help="Overrides the preset's patch size, 2 latent pixels a side.")
    model.add_argument("--num_latent_tokens", type=int, help="Overrides the preset's number of latent tokens N.")
    model.add_argument("--latent_token_dim", type=int, help="Overrides the preset's width d_e of a latent token.")

    add_data_arguments(parser)

    parser.add_argument(
        "--streaming",
        action="store_true",
        help="Read the pictures of a data set of the Hub, or of a folder of Parquet or tar files, while training, in "
        "place of encoding them first. Exact on the same number of processes and workers.",
    )
    parser.add_argument(
        "--class_names_file",
        type=Path,
        help="Text file with the name of a class in each line, for a stream whose labels are not of type ClassLabel.",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="Say what the run would be and what it would cost, and end."
    )

    repa = parser.add_argument_group("representation alignment (REPA)")
    repa.add_argument(
        "--repa_model_name_or_path",
        help="Vision model of transformers (folder or Hub id) whose features of the pictures tokens are aligned with: "
        "those stored with the latents if there are any, else computed in each step.",
    )
    repa.add_argument("--repa_weight", type=float, default=0.5, help="Weight of the loss of the backbone's tokens.")
    repa.add_argument(
        "--repa_layer", type=int, default=8, help="Blocks after which these are taken; REPA has 4 of 12."
    )
    repa.add_argument("--repa_prior_weight", type=float, default=0.0, help="Weight of the loss of the LEM's tokens.")
    repa.add_argument("--repa_stop_step", type=int, help="Align for so many steps only; to the end by default.")

    optimization = parser.add_argument_group("optimization")
    optimization.add_argument("--train_batch_size", type=int, default=256, help="Samples per process and micro-batch.")
    optimization.add_argument("--gradient_accumulation_steps", type=int, default=1)
    optimization.add_argument("--max_train_steps", type=int, default=400_000, help="Number of optimizer steps.")
    optimization.add_argument("--learning_rate", type=float, default=1e-4)
    optimization.add_argument(
        "--latent_embedder_learning_rate", type=float, help="Learning rate of the LEM, `--learning_rate` by default."
    )
    optimization.add_argument(
        "--optimizer",
        default="adamw",
        choices=OPTIMIZERS,
        help="AdamW, or torchao's with moments of 8 bits (needs `pip install 'diffusers-dod[quantization]'`).",
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
    optimization.add_argument("--logit_mean", type=float, default=0.0, help="Mean of the logit of training times.")
    optimization.add_argument("--logit_std", type=float, default=1.0, help="Standard deviation of that logit.")
    optimization.add_argument(
        "--time_shift",
        type=float,
        default=1.0,
        help="Shift of training times towards noise, for latents of many dimensions; 1 is none.",
    )
    optimization.add_argument(
        "--mixed_precision",
        choices=["no", "fp16", "bf16"],
        help="What `accelerate launch` is configured for, by default. fp16 needs a GPU, and bf16 is better.",
    )
    optimization.add_argument("--gradient_checkpointing", action="store_true")

    processes = parser.add_argument_group("processes", "Refused where the launcher has made others.")
    processes.add_argument("--num_processes", type=int, help="How many there must be.")
    processes.add_argument("--distributed_type", choices=DISTRIBUTED_TYPES, help="Of what kind.")

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
    output.add_argument(
        "--fid_extractor",
        help="`inception`, `package.module:attribute` or `file.py:attribute`, which turns pictures (B, 3, H, W) in "
        "uint8 into features (B, d). With it the Fréchet distance of each stage is computed with every grid.",
    )
    output.add_argument("--fid_reference", type=Path, help="npz file with the `mu` and `sigma` of those features.")
    output.add_argument("--fid_num_samples", type=int, default=1000)
    output.add_argument("--checkpointing_steps", type=int, default=1000)
    output.add_argument("--checkpoints_total_limit", type=int, help="Keep only the newest so many checkpoints.")
    output.add_argument("--resume_from_checkpoint", help="A checkpoint folder, or `latest` for the newest valid one.")
    output.add_argument("--push_to_hub", action="store_true", help="Upload the finished pipeline.")
    output.add_argument(
        "--push_every", type=int, help="Upload every so many checkpoints too, in the background, while training."
    )
    output.add_argument(
        "--push_training_state", action="store_true", help="Upload with them what a resumed run needs."
    )
    output.add_argument("--hub_model_id", help="Repository, by default the name of `--output_dir`.")
    output.add_argument("--hub_token", help="Token, by default the one of the Hub's own login.")
    return parser


def parse_args(argv: list[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """
    Parses and checks the arguments of the command.

    Args:
        argv (`list[str]`, *optional*): The arguments; those of the process if not given.
        description (`str`, *optional*): What `--help` says first.

    Returns:
        `argparse.Namespace`. All errors are reported at once, in the way of `argparse`.
    """
    parser = build_parser(description)
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


def to_recipe(args: argparse.Namespace) -> dict[str, Any]:
    """
    Options as a recipe that anybody may see: what differs from the defaults, but for what belongs to one machine.

    Args:
        args (`argparse.Namespace`): The options.

    Returns:
        `dict`: What YAML can hold and `--config` takes. Folders of this machine and everything private are left out.
    """
    parser = build_parser()
    recipe = {}
    for name, value in vars(args).items():
        is_local = name in PLACES and value is not None and Path(value).exists()
        if name in LOCAL_OPTIONS or is_local or value == parser.get_default(name):
            continue
        recipe[name] = str(value) if isinstance(value, Path) else value
    return recipe


def find_errors(args: argparse.Namespace) -> list[str]:
    """
    All that is wrong with options.

    Args:
        args (`argparse.Namespace`): The options.

    Returns:
        `list[str]`: A message for each that is out of range or does not fit another one.
    """
    errors: list[str] = []
    for name in (
        "train_batch_size",
        "gradient_accumulation_steps",
        "max_train_steps",
        "logging_steps",
        "validation_steps",
        "checkpointing_steps",
    ):
        attempt(errors, check_at_least, name, getattr(args, name), 1)
    for name in ("lr_warmup_steps", "validation_seed", "max_nonfinite_steps"):
        attempt(errors, check_at_least, name, getattr(args, name), 0)
    for name in (
        "patch_size",
        "num_latent_tokens",
        "latent_token_dim",
        "checkpoints_total_limit",
        "num_processes",
        "push_every",
    ):
        if getattr(args, name) is not None:
            attempt(errors, check_at_least, name, getattr(args, name), 1)
    for name in ("learning_rate", "latent_embedder_learning_rate", "max_grad_norm", "adam_epsilon"):
        if getattr(args, name) is not None:
            attempt(errors, check_number, name, getattr(args, name), 0, open_minimum=True)
    for name in ("adam_beta1", "adam_beta2"):
        attempt(errors, check_number, name, getattr(args, name), 0, 1, open_maximum=True)
    for name in ("label_dropout_prob", "prior_dropout_prob"):
        attempt(errors, check_number, name, getattr(args, name), 0, 1)
    for decay in args.ema_decay:
        attempt(errors, check_number, "ema_decay", decay, 0, 1)
    for width in args.ema_sigma_rel:
        attempt(errors, check_number, "ema_sigma_rel", width, 0, 12**-0.5, open_minimum=True, open_maximum=True)
    for name in ("ema_decay", "ema_sigma_rel"):
        if len(set(getattr(args, name))) < len(getattr(args, name)):
            errors.append(f"`{name}` must hold different numbers, got {getattr(args, name)}.")
    attempt(errors, check_number, "adam_weight_decay", args.adam_weight_decay, 0)
    attempt(errors, check_number, "logit_mean", args.logit_mean, -math.inf)
    for name in ("logit_std", "time_shift"):
        attempt(errors, check_number, name, getattr(args, name), 0, open_minimum=True)
    attempt(errors, check_at_least, "repa_layer", args.repa_layer, 1)
    if args.repa_stop_step is not None:
        attempt(errors, check_at_least, "repa_stop_step", args.repa_stop_step, 1)
    for name in ("repa_weight", "repa_prior_weight"):
        attempt(errors, check_number, name, getattr(args, name), 0)
    if args.repa_prior_weight > 0 and PRESETS[args.preset].latent_embedder_config is None:
        errors.append(
            f"`repa_prior_weight` must be 0 for `preset` {args.preset!r}, which has no latent embedder, "
            f"got {args.repa_prior_weight}."
        )
    if args.patch_size is not None and args.pretrained_model_name_or_path is not None:
        errors.append(
            "`patch_size` must not be given with `pretrained_model_name_or_path`, whose model has its own, "
            f"got {args.patch_size}."
        )
    num_layers = PRESETS[args.preset].transformer_config["num_layers"]
    if args.repa_model_name_or_path is not None and args.repa_layer > num_layers:
        errors.append(f"`repa_layer` must be at most the {num_layers} blocks of the preset, got {args.repa_layer}.")
    defaults = build_parser()
    for names, is_used, condition in (
        (REPA_OPTIONS, args.repa_model_name_or_path is not None, "with `repa_model_name_or_path` only"),
        (STORAGE_OPTIONS, not args.streaming, "without `streaming` only, which stores no latents"),
    ):
        given = {name: getattr(args, name) for name in names if getattr(args, name) != defaults.get_default(name)}
        if given and not is_used:
            values = " and ".join(map(str, given.values()))
            errors.append(f"{' and '.join(f'`{name}`' for name in given)} must be given {condition}, got {values}.")
    if args.class_names_file is not None and not args.class_names_file.is_file():
        errors.append(f"`class_names_file` must be a file, got {args.class_names_file}.")
    if args.class_names_file is not None and not args.streaming:
        errors.append(f"`class_names_file` must be given with `streaming` only, got {args.class_names_file}.")
    if (args.push_every is not None or args.push_training_state) and not args.push_to_hub:
        errors.append(
            "`push_every` and `push_training_state` must be given with `push_to_hub` only, "
            f"got {args.push_every} and {args.push_training_state}."
        )
    attempt(errors, check_at_least, "fid_num_samples", args.fid_num_samples, 2)
    if (args.fid_extractor is None) != (args.fid_reference is None):
        errors.append(
            "`fid_extractor` and `fid_reference` must be given together, "
            f"got {args.fid_extractor!r} and {args.fid_reference}."
        )
    if args.validation_guidance_scale is not None:
        attempt(errors, check_number, "validation_guidance_scale", args.validation_guidance_scale, 0)
    errors += find_data_errors(args, source_is_needed=args.latents_dir is None)
    overrides = args.num_latent_tokens or args.latent_token_dim or args.latent_embedder_learning_rate
    if overrides and PRESETS[args.preset].latent_embedder_config is None:
        errors.append(
            "`num_latent_tokens`, `latent_token_dim` and `latent_embedder_learning_rate` must not be given for "
            f"`preset` {args.preset!r}, which has no latent embedder."
        )
    return errors
