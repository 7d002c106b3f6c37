# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Trains a DoD (backbone and latent embedding module together, paper, Section 3.3) or, with a FiTv2 preset, its baseline.

    accelerate launch training/train_dod.py --preset DoD-B --train_data_dir path/to/images --resolution 256 \
        --pretrained_vae_name_or_path stabilityai/sd-vae-ft-ema --train_batch_size 256 --max_train_steps 400000 \
        --mixed_precision bf16 --output_dir dod-b

The images are encoded once, into `output_dir/latents`. The run writes `metrics.jsonl`, `samples/`,
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
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from huggingface_hub import create_repo, upload_folder
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..autoencoders import Autoencoder, spatial_factor
from ..conversion import add_prior_projection
from ..latent_embedding import LatentEmbeddingModule
from ..losses import DoDJointModel
from ..pipeline_dod import DoDPipeline
from ..presets import PRESETS, Preset
from ..scheduling_dod import DoDFlowMatchScheduler
from ..transformer_dod import DoDAttention, DoDTransformer2DModel
from .arguments import parse_args
from .checkpoints import (
    find_damage,
    find_latest_checkpoint,
    list_checkpoints,
    load_averages,
    load_training_state,
    save_averages,
    save_checkpoint,
    save_training_state,
)
from .data import (
    SampleDraws,
    StreamSampler,
    TrainingStream,
    collate_priors_first,
)
from .ema import PowerFunctionEMA
from .encode_latents import encode_data, load_autoencoder
from .finetuning import difffit_parameters, freeze_all_but
from .foreign_latents import open_latents
from .image_grid import stage_grid
from .latents import LatentDataset, check_settings, describe_autoencoder
from .model_card import write_model_card


logger = get_logger(__name__, log_level="INFO")

NUM_TIME_BINS = 4  # parts of [0, 1] whose losses are logged apart


def prepare_latents(args: argparse.Namespace, accelerator: Accelerator, vae: Autoencoder | None) -> LatentDataset:
    """
    The latents to train on: those of `--latents_dir`, or of the pictures, which all processes encode unless this has
    been done.

    Args:
        args (`argparse.Namespace`): The run's arguments.
        accelerator (`Accelerator`): The processes, which share the shards.
        vae ([`Autoencoder`] or `None`): The autoencoder; without one the latents are the pixels.

    Returns:
        [`LatentDataset`].

    Raises:
        `ValueError`: the folder has the latents of other pictures or of another autoencoder, or a picture cannot be
            read.
    """
    if args.dataset_name is None and args.train_data_dir is None:
        latents = open_latents(args.latents_dir, vae)
        if not isinstance(latents, LatentDataset):
            logger.warning(
                f"{args.latents_dir} does not say which autoencoder it comes from: it is taken for the given."
            )
            return latents
        expected = {"autoencoder": describe_autoencoder(vae)} | ({"random_flip": True} if args.random_flip else {})
        check_settings(args.latents_dir, latents.manifest, expected)
        return latents
    folder = args.output_dir / "latents" if args.latents_dir is None else args.latents_dir
    return encode_data(args, accelerator, vae, folder)


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


def time_losses(totals: list[float]) -> dict[str, float]:
    """The mean loss by time from `totals`, the sums of each part of [0, 1] and then the counts; NaN where none is."""
    sums, counts = totals[:NUM_TIME_BINS], totals[NUM_TIME_BINS:]
    return {
        f"loss_sigma_{index / NUM_TIME_BINS:.2f}_{(index + 1) / NUM_TIME_BINS:.2f}": total / count
        if count
        else math.nan
        for index, (total, count) in enumerate(zip(sums, counts, strict=True))
    }


def build_emas(args: argparse.Namespace, model: DoDJointModel) -> dict[str, EMAModel]:
    """The averages of the weights of `model` that `args` ask for, by name; the first is that of the pipeline."""
    emas: dict[str, EMAModel] = {
        f"decay-{decay}": EMAModel(model.parameters(), decay=decay, foreach=True) for decay in args.ema_decay
    }
    for width in args.ema_sigma_rel:
        emas[f"sigma-rel-{width}"] = PowerFunctionEMA(model.parameters(), width, foreach=True)
    return emas


def find_nonfinite_gradients(model: DoDJointModel) -> list[str]:
    """Names of the weights of `model` whose gradients are not finite."""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return [name for name, gradient in gradients.items() if not gradient.isfinite().all()]


def write_nonfinite_report(
    path: Path, step: int, images_per_step: int, sums: torch.Tensor, model: DoDJointModel, suspects: list[str]
) -> None:
    """
    Writes what is known of a step whose gradients are not finite.

    Args:
        path (`Path`): The JSON file.
        step (`int`): The step, counted from 1.
        images_per_step (`int`): Samples per step.
        sums (`torch.Tensor` of shape `(5,)`): Loss and count of samples with and without a prior, and gradient norm.
        model ([`DoDJointModel`]): The model.
        suspects (`list[str]`): What [`find_nonfinite_gradients`] found.
    """
    report = {
        "step": step,
        "stream_positions": [(step - 1) * images_per_step, step * images_per_step],
        "loss_with_prior_sum_and_count": [str(value) for value in sums[:2].tolist()],
        "loss_without_prior_sum_and_count": [str(value) for value in sums[2:4].tolist()],
        "nonfinite_weights": [name for name, value in model.named_parameters() if not value.isfinite().all()],
        "nonfinite_gradients": suspects,
    }
    path.write_text(json.dumps(report, indent=2) + "\n")


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
    """
    The command.

    Args:
        argv (`list[str]`, *optional*): Its arguments, the process's by default.

    Raises:
        `ValueError`: they do not fit the data, the models or what is in the folders.
        `FloatingPointError`: the gradients of too many steps in a row are not finite.
    """
    args = parse_args(argv, __doc__)

    # 1. Processes, data, autoencoder
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.report_to,
        project_dir=args.output_dir,
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
    if args.allow_tf32:
        torch.set_float32_matmul_precision("high")
    if accelerator.is_main_process:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    repo_id = None
    if args.push_to_hub and accelerator.is_main_process:  # before training, so that a refusal costs nothing
        repo_id = create_repo(args.hub_model_id or args.output_dir.name, exist_ok=True, token=args.hub_token).repo_id

    vae = load_autoencoder(args.pretrained_vae_name_or_path, accelerator.device)
    latents = prepare_latents(args, accelerator, vae)
    args.resolution = latents.manifest["resolution"] or latents.latent_shape[1] * (spatial_factor(vae) if vae else 1)
    args.random_flip = latents.manifest["random_flip"]
    class_names = tuple(latents.manifest["class_names"])
    num_classes = len(class_names)

    # 2. Models, optimizer, EMA
    model = build_models(args, latents.latent_shape, num_classes)
    optimizer = build_optimizer(args, model)
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )  # not prepared by accelerate, which would step it once per process
    if args.compile:
        for module in model.children():
            module.compile_repeated_blocks()
    model, optimizer = accelerator.prepare(model, optimizer)
    joint_model: DoDJointModel = accelerator.unwrap_model(model)
    use_fast_attention(joint_model, accelerator.device)
    emas = build_emas(args, joint_model)
    ema = next(iter(emas.values()))  # of pipelines and samples

    # 3. Resume
    start_step = num_nonfinite_steps = 0
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
            load_averages(checkpoint, joint_model, dict(list(emas.items())[1:]))
            start_step, num_nonfinite_steps = state["step"], state.get("num_nonfinite_steps", 0)
            for average in emas.values():
                average.optimization_step = start_step
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
    images_per_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    sampler = StreamSampler(
        start_step,
        args.max_train_steps,
        args.train_batch_size,
        args.gradient_accumulation_steps,
        accelerator.process_index,
        accelerator.num_processes,
    )
    draws = SampleDraws(
        num_classes,
        args.seed,
        args.label_dropout_prob,
        1.0 if joint_model.latent_embedder is None else args.prior_dropout_prob,
        images_per_step if args.exact_dropout else None,
    )
    stream = TrainingStream(latents, draws)
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
        id2label=dict(enumerate(class_names)),
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
            state = {"step": step, "num_nonfinite_steps": num_nonfinite_steps}
            save_training_state(folder, joint_model, optimizer, state)
            save_averages(folder, joint_model, dict(list(emas.items())[1:]))

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
    parameters = sum(parameter.numel() for parameter in joint_model.parameters())
    logger.info(
        f"{args.preset}: {parameters:,} parameters, {len(latents):,} pictures of {num_classes} classes, "
        f"{accelerator.num_processes} process(es) on {accelerator.device}, {images_per_step} images per step."
    )

    if args.report_to:
        settings = {name: str(value) for name, value in vars(args).items() if name != "hub_token"}
        accelerator.init_trackers("diffusers_dod", config=settings)

    # 6. Train
    progress = tqdm(
        total=args.max_train_steps, initial=start_step, desc="Training", disable=not accelerator.is_main_process
    )
    # Sums since the last line of metrics: loss and count of samples with and without a prior, the gradient norm, then
    # losses and counts by time.
    sums = torch.zeros(5 + 2 * NUM_TIME_BINS, device=accelerator.device)
    interval_start, interval_step, data_seconds = time.perf_counter(), start_step, 0.0
    nonfinite_in_a_row = num_finite_steps = 0  # the latter since the last line of metrics
    for step in range(start_step + 1, args.max_train_steps + 1):
        step_sums = torch.zeros_like(sums)
        for _ in range(args.gradient_accumulation_steps):
            wait_start = time.perf_counter()
            batch = next(batches)
            data_seconds += time.perf_counter() - wait_start
            num_priors = batch.pop("num_priors")
            batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
            with accelerator.accumulate(model):
                losses = model(**batch, num_priors=num_priors)  # (B,)
                accelerator.backward(losses.mean())
                is_finite = True
                if accelerator.sync_gradients:
                    if nonfinite_in_a_row == args.max_nonfinite_steps:  # clipping would spread what is not finite
                        suspects = find_nonfinite_gradients(joint_model)
                    grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                    is_finite = bool(torch.isfinite(grad_norm))  # the same on all processes, which share gradients
                if is_finite:
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            losses = losses.detach()
            step_sums[0] += losses[:num_priors].sum()
            step_sums[1] += num_priors
            step_sums[2] += losses[num_priors:].sum()
            step_sums[3] += len(losses) - num_priors
            bins = (batch["sigmas"] * NUM_TIME_BINS).long().clamp(max=NUM_TIME_BINS - 1)
            step_sums.index_add_(0, 5 + bins, losses)
            step_sums.index_add_(0, 5 + NUM_TIME_BINS + bins, torch.ones_like(losses))
        step_sums[4] += grad_norm
        learning_rate = optimizer.param_groups[0]["lr"]  # of this step
        lr_scheduler.step()
        for average in emas.values():
            average.step(joint_model.parameters())
        progress.update()
        if is_finite:
            sums += step_sums
            num_finite_steps += 1
            nonfinite_in_a_row = 0
        else:
            num_nonfinite_steps += 1
            nonfinite_in_a_row += 1
            logger.warning(f"Step {step} is left out: the norm of its gradients is {float(grad_norm)}.")
            if nonfinite_in_a_row > args.max_nonfinite_steps:
                report = args.output_dir / f"nonfinite-step-{step}.json"
                if accelerator.is_main_process:
                    write_nonfinite_report(report, step, images_per_step, step_sums, joint_model, suspects)
                raise FloatingPointError(
                    f"The gradients of {nonfinite_in_a_row} steps in a row are not finite, up to step {step}: more "
                    f"than `max_nonfinite_steps` = {args.max_nonfinite_steps}. See {report}."
                )

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
                "loss": (totals[0] + totals[2]) / count if (count := totals[1] + totals[3]) else math.nan,
                "loss_with_prior": with_prior,
                "loss_without_prior": without_prior,
                **time_losses(totals[5:]),
                "grad_norm": totals[4] / (num_finite_steps * accelerator.num_processes or math.nan),
                "learning_rate": learning_rate,
                "images_per_second": round(num_steps * images_per_step / seconds, 1),
                "data_wait": round(data_seconds / seconds, 4),
            }
            progress.set_postfix(loss=f"{metrics['loss']:.4f}", images_per_s=metrics["images_per_second"])
            if accelerator.is_main_process:
                # JSON has no NaN: the loss of no samples is null.
                line = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
                with open(metrics_path, "a") as file:
                    file.write(json.dumps(line) + "\n")
                accelerator.log({name: value for name, value in line.items() if value is not None}, step=step)
            sums.zero_()
            num_finite_steps = 0
            interval_start, interval_step, data_seconds = time.perf_counter(), step, 0.0

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
        write_model_card(args.output_dir, args, class_names, images_per_step)
        if repo_id is not None:
            upload_folder(
                repo_id=repo_id,
                folder_path=args.output_dir,
                token=args.hub_token,
                commit_message="End of training",
                ignore_patterns=["checkpoint-*", ".unfinished-*", "latents/*", "latents.*"],
            )
    accelerator.end_training()


if __name__ == "__main__":
    main()
