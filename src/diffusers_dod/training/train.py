# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Trains a DoD (backbone and latent embedding module together, paper, Section 3.3) or, with a FiTv2 preset, its baseline.

    accelerate launch training/train_dod.py --preset DoD-B --train_data_dir path/to/images --resolution 256 \
        --pretrained_vae_name_or_path stabilityai/sd-vae-ft-ema --train_batch_size 256 --max_train_steps 400000 \
        --mixed_precision bf16 --output_dir dod-b

The images are encoded once, into `output_dir/latents.safetensors`. The run writes `metrics.jsonl`, `samples/`,
`checkpoint-<step>/` (each a `DoDPipeline` with EMA weights and all that a resumed run needs) and, at its end, the
pipeline itself into `output_dir`.
"""

import argparse
import json
import logging
import math
import os
import time
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import InitProcessGroupKwargs
from diffusers import AutoencoderKL
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from huggingface_hub import create_repo, upload_folder
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..checks import check_at_least, check_choice, check_number
from ..conversion import add_prior_projection
from ..latent_embedding import LatentEmbeddingModule
from ..losses import DoDJointModel
from ..pipeline_dod import DoDPipeline
from ..presets import PRESETS, Preset
from ..scheduling_dod import DoDFlowMatchScheduler
from ..transformer_dod import DoDAttention, DoDTransformer2DModel
from .checkpoints import (
    find_damage,
    find_latest_checkpoint,
    list_checkpoints,
    load_training_state,
    save_checkpoint,
    save_training_state,
)
from .data import (
    LatentDataset,
    Pictures,
    StreamSampler,
    TrainingStream,
    collate_priors_first,
    encode_pictures,
    latents_fingerprint,
    load_pictures,
)
from .finetuning import TRAINABLE_PARAMETERS, difffit_parameters, freeze_all_but
from .image_grid import stage_grid
from .model_card import write_model_card


logger = get_logger(__name__, log_level="INFO")

# Diffusers' piecewise constant one needs rules of its own.
LR_SCHEDULERS = [kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses and checks the arguments `argv` of the command, those of the process by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

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
    model.add_argument(
        "--pretrained_vae_name_or_path", help="Autoencoder (folder or Hub id); without one, a pixel-space model."
    )

    data = parser.add_argument_group("data")
    data.add_argument("--dataset_name", help="`textures` (procedural) or a data set that `datasets` can load.")
    data.add_argument("--train_data_dir", help="Folder with one sub-folder of images per class.")
    data.add_argument("--image_column", default="image", help="Column of the images.")
    data.add_argument("--label_column", default="label", help="Column of the class ids.")
    data.add_argument("--num_train_samples", type=int, default=100_000, help="Number of procedural pictures.")
    data.add_argument("--resolution", type=int, default=256, help="Side of the centre crop in pixels.")
    data.add_argument("--random_flip", action="store_true", help="Mirror half of the images.")
    data.add_argument("--dataloader_num_workers", type=int, default=0)
    data.add_argument("--encoding_batch_size", type=int, default=64, help="Images that are encoded at a time.")

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
    optimization.add_argument("--ema_decay", type=float, default=0.999)
    optimization.add_argument("--label_dropout_prob", type=float, default=0.1, help="Share of null-class samples.")
    optimization.add_argument("--prior_dropout_prob", type=float, default=0.5, help="p_s, share without a prior.")
    optimization.add_argument(
        "--mixed_precision", choices=["no", "bf16"], help="What `accelerate launch` is configured for, by default."
    )
    optimization.add_argument("--gradient_checkpointing", action="store_true")
    optimization.add_argument("--seed", type=int, default=0, help="Of the data stream and of the initial weights.")

    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", type=Path, required=True)
    output.add_argument("--logging_steps", type=int, default=50, help="Steps that a line of metrics averages over.")
    output.add_argument("--validation_steps", type=int, default=1000, help="Sample a grid every so many steps.")
    output.add_argument("--validation_guidance_scale", type=float, help="From stage 2 on, the preset's by default.")
    output.add_argument("--validation_seed", type=int, default=0)
    output.add_argument("--checkpointing_steps", type=int, default=1000)
    output.add_argument("--checkpoints_total_limit", type=int, help="Keep only the newest so many checkpoints.")
    output.add_argument("--resume_from_checkpoint", help="A checkpoint folder, or `latest` for the newest valid one.")
    output.add_argument("--push_to_hub", action="store_true", help="Upload the finished pipeline.")
    output.add_argument("--hub_model_id", help="Repository, by default the name of `--output_dir`.")
    output.add_argument("--hub_token", help="Token, by default the one of the Hub's own login.")

    args = parser.parse_args(argv)
    try:
        check_args(args)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    return args


def check_args(args: argparse.Namespace) -> None:
    """Raises a `ValueError` or `TypeError` that names the first of `args` that is out of range or of another type."""
    for name in (
        "num_train_samples",
        "resolution",
        "encoding_batch_size",
        "train_batch_size",
        "gradient_accumulation_steps",
        "max_train_steps",
        "logging_steps",
        "validation_steps",
        "checkpointing_steps",
    ):
        check_at_least(name, getattr(args, name), 1)
    for name in ("dataloader_num_workers", "lr_warmup_steps", "seed", "validation_seed"):
        check_at_least(name, getattr(args, name), 0)
    for name in ("num_latent_tokens", "latent_token_dim", "checkpoints_total_limit"):
        if getattr(args, name) is not None:
            check_at_least(name, getattr(args, name), 1)
    for name in ("learning_rate", "latent_embedder_learning_rate", "max_grad_norm", "adam_epsilon"):
        if getattr(args, name) is not None:
            check_number(name, getattr(args, name), 0, open_minimum=True)
    for name in ("adam_beta1", "adam_beta2"):
        check_number(name, getattr(args, name), 0, 1, open_maximum=True)
    for name in ("ema_decay", "label_dropout_prob", "prior_dropout_prob"):
        check_number(name, getattr(args, name), 0, 1)
    check_number("adam_weight_decay", args.adam_weight_decay, 0)
    if args.validation_guidance_scale is not None:
        check_number("validation_guidance_scale", args.validation_guidance_scale, 0)
    check_choice("preset", args.preset, tuple(PRESETS))
    check_choice("trainable_parameters", args.trainable_parameters, TRAINABLE_PARAMETERS)
    if (args.dataset_name is None) == (args.train_data_dir is None):
        raise ValueError(
            "Exactly one of `dataset_name` and `train_data_dir` must be given, "
            f"got {args.dataset_name!r} and {args.train_data_dir!r}."
        )
    overrides = args.num_latent_tokens or args.latent_token_dim or args.latent_embedder_learning_rate
    if overrides and PRESETS[args.preset].latent_embedder_config is None:
        raise ValueError(
            "`num_latent_tokens`, `latent_token_dim` and `latent_embedder_learning_rate` must not be given for "
            f"`preset` {args.preset!r}, which has no latent embedder."
        )


def prepare_latents(args: argparse.Namespace, accelerator: Accelerator, pictures: Pictures, vae) -> LatentDataset:
    """
    The encoded pictures; the main process encodes them unless the run's folder has them already.

    Args:
        args (`argparse.Namespace`): The run's arguments.
        accelerator (`Accelerator`): Lets the other processes wait for the main one.
        pictures ([`Pictures`]): What to encode.
        vae (`AutoencoderKL` or `None`): The autoencoder; without one the latents are the pixels.

    Returns:
        [`LatentDataset`].

    Raises:
        `ValueError`: the folder has the latents of other pictures or of another autoencoder.
    """
    path = args.output_dir / "latents.safetensors"
    with accelerator.main_process_first():
        if accelerator.is_main_process and not path.exists():
            encode_pictures(
                pictures, vae, path, args.random_flip, args.encoding_batch_size, args.dataloader_num_workers
            )
    latents = LatentDataset(path)
    fingerprint = latents_fingerprint(pictures, vae, args.random_flip)
    if latents.fingerprint != fingerprint:
        raise ValueError(
            f"{path} must hold the latents of these pictures and this autoencoder (fingerprint {fingerprint}), "
            f"got {latents.fingerprint}: remove it, or use another `output_dir`."
        )
    return latents


def build_models(args: argparse.Namespace, latent_shape: tuple[int, ...], num_classes: int) -> DoDJointModel:
    """
    Backbone and LEM: those of `--pretrained_model_name_or_path` if given, those of the preset, seeded by `--seed`, for
    the rest.

    Args:
        args (`argparse.Namespace`): The run's arguments.
        latent_shape (`tuple[int, ...]`): Shape (C, h, w) of the latents.
        num_classes (`int`): Number of classes.

    Returns:
        [`DoDJointModel`], all of it trainable unless `--trainable_parameters` says otherwise.

    Raises:
        `ValueError`: a saved pipeline does not fit the latents or the arguments.
    """
    torch.manual_seed(args.seed)
    preset: Preset = PRESETS[args.preset]
    channels, sample_size = latent_shape[0], latent_shape[1]
    shape = {"in_channels": channels, "sample_size": sample_size}
    transformer = latent_embedder = None
    if args.pretrained_model_name_or_path is not None:
        transformer, latent_embedder = load_pretrained(args.pretrained_model_name_or_path, shape, num_classes)
    if transformer is None:
        transformer = DoDTransformer2DModel(**(preset.transformer_config | shape | {"num_classes": num_classes}))
    given = {"num_latent_tokens": args.num_latent_tokens, "latent_token_dim": args.latent_token_dim}
    overrides = {name: value for name, value in given.items() if value is not None}
    if latent_embedder is not None and overrides:
        name, value = next(iter(overrides.items()))
        raise ValueError(
            f"`{name}` must not be given where `pretrained_model_name_or_path` has a latent embedder, "
            f"whose own is {latent_embedder.config[name]}, got {value}."
        )
    if latent_embedder is None and preset.latent_embedder_config is not None:
        overrides["patch_size"] = transformer.config.patch_size
        latent_embedder = LatentEmbeddingModule(**(preset.latent_embedder_config | shape | overrides))
        if transformer.config.prior_embed_dim is None:  # a FiTv2 becomes the backbone of a DoD
            transformer = with_priors(transformer, latent_embedder.inner_dim)
    model = DoDJointModel(transformer, latent_embedder)
    if args.gradient_checkpointing:
        for module in model.children():
            module.enable_gradient_checkpointing()
    if args.trainable_parameters == "difffit":
        freeze_all_but(model, difffit_parameters(model))
    return model


def load_pretrained(
    path: str, shape: dict[str, int], num_classes: int
) -> tuple[DoDTransformer2DModel, LatentEmbeddingModule | None]:
    """
    Backbone and, where it has one, LEM of a saved pipeline, in training mode.

    Args:
        path (`str`): A folder or a repository on the Hub.
        shape (`dict[str, int]`): The `in_channels` and the `sample_size` of the latents.
        num_classes (`int`): Number of classes; if it has another, each class starts as its null class.

    Returns:
        `tuple[DoDTransformer2DModel, LatentEmbeddingModule | None]`: The models.

    Raises:
        `ValueError`: a model has another number of channels, or a patch size that does not divide `sample_size`.
    """
    pipeline = DoDPipeline.from_pretrained(path, vae=None)
    models = [model for model in (pipeline.transformer, pipeline.latent_embedder) if model is not None]
    for model in models:
        if model.config.in_channels != shape["in_channels"] or shape["sample_size"] % model.config.patch_size:
            raise ValueError(
                "`pretrained_model_name_or_path` must hold a model for latents of the data's shape, "
                f"{shape['in_channels']} channels with sides that are multiples of its patch size, got {path!r} "
                f"for {model.config.in_channels} channels and patches of {model.config.patch_size}."
            )
        model.register_to_config(sample_size=shape["sample_size"])
        model.train()
    if pipeline.transformer.config.num_classes != num_classes:
        pipeline.transformer.resize_class_embed(num_classes)
    return pipeline.transformer, pipeline.latent_embedder


def with_priors(transformer: DoDTransformer2DModel, prior_embed_dim: int) -> DoDTransformer2DModel:
    """
    A plain FiTv2 as a backbone that takes priors, and that still predicts exactly the same at the start.

    Args:
        transformer ([`DoDTransformer2DModel`]): The FiTv2, with `prior_embed_dim=None`.
        prior_embed_dim (`int`): Width of the visual priors.

    Returns:
        [`DoDTransformer2DModel`], a new one.
    """
    model = DoDTransformer2DModel.from_config({**transformer.config, "prior_embed_dim": prior_embed_dim})
    model.load_state_dict(add_prior_projection(transformer.state_dict(), prior_embed_dim))
    return model


def use_fast_attention(model: DoDJointModel, device: torch.device) -> None:
    """
    Gives `model` unfused attention if `device` is a CPU.

    There the backward pass of the fused one takes longer than the rest of a short sequence's step together.
    """
    if device.type == "cpu":
        for module in model.modules():
            if isinstance(module, DoDAttention):  # the models' own method would change the default of all others too
                module.set_attention_backend("_native_math")


def build_optimizer(args: argparse.Namespace, model: DoDJointModel) -> torch.optim.AdamW:
    """AdamW with the settings in `args` for what is trainable in `model`; the LEM may have its own learning rate."""

    def trainable(module: torch.nn.Module) -> list[torch.nn.Parameter]:
        return [parameter for parameter in module.parameters() if parameter.requires_grad]

    groups = [{"params": trainable(model.transformer)}]
    if model.latent_embedder is not None:
        rate = args.latent_embedder_learning_rate or args.learning_rate
        groups.append({"params": trainable(model.latent_embedder), "lr": rate})
    return torch.optim.AdamW(
        groups,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.adam_weight_decay,
        fused=True,
    )


def drop_metrics_after(path: Path, step: int) -> None:
    """
    Removes from the metrics in `path`, if it exists, the lines after `step`, which a resumed run will write again, and
    the half of a line that a crash may have left.
    """

    def is_kept(line: str) -> bool:
        try:
            return json.loads(line)["step"] <= step
        except ValueError:
            return False

    if path.exists():
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text("".join(line + "\n" for line in path.read_text().splitlines() if is_kept(line)))
        os.replace(unfinished, path)


def main(argv: list[str] | None = None) -> None:
    """The command; `argv` are its arguments, the process's by default. Raises a `ValueError` where they do not fit."""
    args = parse_args(argv)

    # 1. Processes, data, autoencoder
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        # The other processes wait while the main one encodes the pictures.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=24))],
    )
    if accelerator.gradient_accumulation_steps != args.gradient_accumulation_steps:
        raise ValueError(
            "`gradient_accumulation_steps` must be what the launcher is configured for, "
            f"{accelerator.gradient_accumulation_steps}, got {args.gradient_accumulation_steps}."
        )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(f"`mixed_precision` must be 'no' or 'bf16', got {accelerator.mixed_precision!r}.")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("diffusers_dod").setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    if accelerator.is_main_process:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    repo_id = None
    if args.push_to_hub and accelerator.is_main_process:  # before training, so that a refusal costs nothing
        repo_id = create_repo(args.hub_model_id or args.output_dir.name, exist_ok=True, token=args.hub_token).repo_id

    pictures = load_pictures(
        args.dataset_name,
        args.train_data_dir,
        args.resolution,
        args.num_train_samples,
        args.seed,
        args.image_column,
        args.label_column,
    )
    vae = None
    if args.pretrained_vae_name_or_path is not None:
        vae = AutoencoderKL.from_pretrained(args.pretrained_vae_name_or_path).requires_grad_(False).eval()
        vae.to(accelerator.device)
    latents = prepare_latents(args, accelerator, pictures, vae)
    num_classes = len(pictures.class_names)

    # 2. Models, optimizer, EMA
    model = build_models(args, latents.mean.shape[2:], num_classes)
    optimizer = build_optimizer(args, model)
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )  # not prepared by accelerate, which would step it once per process
    model, optimizer = accelerator.prepare(model, optimizer)
    joint_model: DoDJointModel = accelerator.unwrap_model(model)
    use_fast_attention(joint_model, accelerator.device)
    ema = EMAModel(joint_model.parameters(), decay=args.ema_decay, foreach=True)

    # 3. Resume
    start_step = 0
    if args.resume_from_checkpoint is not None:
        if args.resume_from_checkpoint == "latest":
            checkpoint = find_latest_checkpoint(args.output_dir)
        else:
            checkpoint = Path(args.resume_from_checkpoint)
            if (damage := find_damage(checkpoint)) is not None:
                raise ValueError(
                    f"`resume_from_checkpoint` must be an undamaged checkpoint, got {checkpoint}: {damage}."
                )
        if checkpoint is None and list_checkpoints(args.output_dir):
            raise ValueError(
                f"`output_dir` {args.output_dir} must hold an undamaged checkpoint, got damaged ones only."
            )
        if checkpoint is None:
            logger.info(f"No checkpoint in {args.output_dir}, starting from scratch.")
        else:
            state = load_training_state(checkpoint, joint_model, optimizer)
            averaged = DoDTransformer2DModel.from_pretrained(checkpoint, subfolder="transformer")
            averaged_embedder = None
            if joint_model.latent_embedder is not None:
                averaged_embedder = LatentEmbeddingModule.from_pretrained(checkpoint, subfolder="latent_embedder")
            ema.shadow_params = [
                parameter.detach().to(accelerator.device)
                for parameter in DoDJointModel(averaged, averaged_embedder).parameters()
            ]
            ema.optimization_step = start_step = state["step"]
            # The learning rate is a function of the step and of this run's own arguments.
            lr_scheduler.last_epoch = start_step
            rates = [
                base_rate * factor(start_step)
                for base_rate, factor in zip(lr_scheduler.base_lrs, lr_scheduler.lr_lambdas, strict=True)
            ]
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            if start_step > args.max_train_steps:
                raise ValueError(
                    f"`max_train_steps` must be at least the step {start_step} of {checkpoint}, "
                    f"got {args.max_train_steps}."
                )
            logger.info(f"Resuming from {checkpoint} at step {start_step}.")
    elif list_checkpoints(args.output_dir):
        raise ValueError(
            f"`output_dir` {args.output_dir} holds checkpoints: continue with `--resume_from_checkpoint latest`, or "
            "use another folder."
        )

    # 4. Data stream
    sampler = StreamSampler(
        start_step,
        args.max_train_steps,
        args.train_batch_size,
        args.gradient_accumulation_steps,
        accelerator.process_index,
        accelerator.num_processes,
    )
    stream = TrainingStream(latents, num_classes, args.seed, args.label_dropout_prob, args.prior_dropout_prob)
    if joint_model.latent_embedder is None:
        stream.prior_dropout_prob = 1.0
    loader = DataLoader(
        stream,
        batch_size=args.train_batch_size,
        sampler=sampler,
        collate_fn=collate_priors_first,
        num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    batches = iter(loader)

    # 5. What is written on the way
    preset = PRESETS[args.preset]
    pipeline = DoDPipeline(
        transformer=joint_model.transformer,
        latent_embedder=joint_model.latent_embedder,
        scheduler=DoDFlowMatchScheduler(),
        vae=vae,
        id2label=dict(enumerate(pictures.class_names)),
        **preset.pipeline_config,
    )
    pipeline.set_progress_bar_config(disable=True)

    def with_ema_weights(action) -> None:
        ema.store(joint_model.parameters())
        ema.copy_to(joint_model.parameters())
        joint_model.eval()
        try:
            action()
        finally:
            ema.restore(joint_model.parameters())
            joint_model.train()

    def save(step: int) -> None:
        def write(folder: Path) -> None:
            with_ema_weights(lambda: pipeline.save_pretrained(folder))
            save_training_state(folder, joint_model, optimizer, {"step": step})

        save_checkpoint(args.output_dir, step, write, args.checkpoints_total_limit)

    def validate(step: int) -> None:
        def sample() -> None:
            with accelerator.autocast():
                grid = stage_grid(pipeline, args.validation_seed, guidance_scale=args.validation_guidance_scale)
            folder = args.output_dir / "samples"
            folder.mkdir(exist_ok=True)
            grid.save(folder / f"step-{step:07d}.png")

        with_ema_weights(sample)

    metrics_path = args.output_dir / "metrics.jsonl"
    if accelerator.is_main_process:
        drop_metrics_after(metrics_path, start_step)
    images_per_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    parameters = sum(parameter.numel() for parameter in joint_model.parameters())
    logger.info(
        f"{args.preset}: {parameters:,} parameters, {len(latents):,} pictures of {num_classes} classes, "
        f"{accelerator.num_processes} process(es) on {accelerator.device}, {images_per_step} images per step."
    )

    # 6. Train
    progress = tqdm(
        total=args.max_train_steps, initial=start_step, desc="Training", disable=not accelerator.is_main_process
    )
    # Sums since the last line of metrics: loss and count of samples with and without a prior, then the gradient norm.
    sums = torch.zeros(5, device=accelerator.device)
    interval_start, interval_step = time.perf_counter(), start_step
    for step in range(start_step + 1, args.max_train_steps + 1):
        for _ in range(args.gradient_accumulation_steps):
            batch = next(batches)
            num_priors = batch.pop("num_priors")
            batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
            with accelerator.accumulate(model):
                losses = model(**batch, num_priors=num_priors)  # (B,)
                accelerator.backward(losses.mean())
                if accelerator.sync_gradients:
                    grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            losses = losses.detach()
            sums[0] += losses[:num_priors].sum()
            sums[1] += num_priors
            sums[2] += losses[num_priors:].sum()
            sums[3] += len(losses) - num_priors
        learning_rate = optimizer.param_groups[0]["lr"]  # of this step
        lr_scheduler.step()
        ema.step(joint_model.parameters())
        sums[4] += grad_norm
        progress.update()

        is_last = step == args.max_train_steps
        is_checkpoint = step % args.checkpointing_steps == 0 or is_last
        # A line of metrics ends with each checkpoint, so that a resumed run goes on with the same lines.
        if step % args.logging_steps == 0 or is_checkpoint:
            totals = accelerator.reduce(sums).tolist()
            num_steps = step - interval_step
            seconds = time.perf_counter() - interval_start
            with_prior, without_prior = (
                total / count if count else math.nan for total, count in (totals[0:2], totals[2:4])
            )
            metrics = {
                "step": step,
                "loss": (totals[0] + totals[2]) / (totals[1] + totals[3]),
                "loss_with_prior": with_prior,
                "loss_without_prior": without_prior,
                "grad_norm": totals[4] / num_steps / accelerator.num_processes,
                "learning_rate": learning_rate,
                "images_per_second": round(num_steps * images_per_step / seconds, 1),
            }
            progress.set_postfix(loss=f"{metrics['loss']:.4f}", images_per_s=metrics["images_per_second"])
            if accelerator.is_main_process:
                # JSON has no NaN: the loss of no samples is null.
                line = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
                with open(metrics_path, "a") as file:
                    file.write(json.dumps(line) + "\n")
            sums.zero_()
            interval_start, interval_step = time.perf_counter(), step

        pause = time.perf_counter()
        if accelerator.is_main_process:
            if is_checkpoint:
                save(step)
            if step % args.validation_steps == 0 or is_last:
                validate(step)
        interval_start += time.perf_counter() - pause  # neither saving nor sampling counts as training time
    progress.close()

    # 7. The finished pipeline
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with_ema_weights(lambda: pipeline.save_pretrained(args.output_dir))
        write_model_card(args.output_dir, args, pictures.class_names, images_per_step)
        if repo_id is not None:
            upload_folder(
                repo_id=repo_id,
                folder_path=args.output_dir,
                token=args.hub_token,
                commit_message="End of training",
                ignore_patterns=["checkpoint-*", ".unfinished-*", "latents.*"],
            )
    accelerator.end_training()


if __name__ == "__main__":
    main()
