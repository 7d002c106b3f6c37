# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Processes of a training run: as its launcher and its options ask for, and what they exchange."""

import torch
from accelerate import Accelerator
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from ..losses import DoDJointModel
from ..processes import check_processes, process_group_timeout
from ..training_options import TrainingOptions


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_accelerator(options: TrainingOptions) -> Accelerator:
    """
    Sets up the processes of a run, as its launcher and its options ask for.

    Args:
        options ([`TrainingOptions`]): The run's options.

    Returns:
        `Accelerator`.

    Raises:
        `ValueError`: the launcher made other processes, or the options do not fit them.
    """
    accelerator = Accelerator(
        mixed_precision=options.precision.mixed_precision,
        gradient_accumulation_steps=options.optimizer.gradient_accumulation_steps,
        log_with=options.output.report_to,
        project_dir=options.output.output_dir,
        kwargs_handlers=[
            process_group_timeout(),
            DistributedDataParallelKwargs(
                gradient_as_bucket_view=True,
                comm_hook=DDPCommunicationHookType[{"fp32": "NO", "bf16": "BF16"}[options.processes.gradient_dtype]],
            ),
        ],
    )
    check_processes(accelerator, options.processes.num_processes, options.processes.distributed_type)
    if accelerator.gradient_accumulation_steps != options.optimizer.gradient_accumulation_steps:
        raise ValueError(
            "`gradient_accumulation_steps` must be what the launcher is configured for, "
            f"{accelerator.gradient_accumulation_steps}, got {options.optimizer.gradient_accumulation_steps}."
        )
    if accelerator.mixed_precision not in ("no", "fp16", "bf16"):
        raise ValueError(f"`mixed_precision` must be 'no', 'fp16' or 'bf16', got {accelerator.mixed_precision!r}.")
    is_deepspeed = accelerator.distributed_type.value == "DEEPSPEED"
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None and not is_deepspeed:
        raise ValueError("`mixed_precision` must be 'no' or 'bf16' where gradients cannot be scaled, got 'fp16'.")
    if is_deepspeed and options.output.resume_from_checkpoint is not None:
        raise ValueError(
            "`resume_from_checkpoint` must not be given under DeepSpeed, whose optimizer is not saved, got "
            f"{options.output.resume_from_checkpoint!r}: start from a checkpoint's weights with "
            "`pretrained_model_name_or_path`."
        )
    if options.optimizer.optimizer != "adamw" and accelerator.distributed_type.value in ("FSDP", "DEEPSPEED"):
        raise ValueError(f"`optimizer` must be 'adamw' under FSDP and DeepSpeed, got {options.optimizer.optimizer!r}.")
    if options.model.lora.lora_rank is not None and accelerator.distributed_type.value in ("FSDP", "DEEPSPEED"):
        raise ValueError(
            f"`lora_rank` must not be given under FSDP and DeepSpeed, got {options.model.lora.lora_rank}: "
            "adapters need no shards."
        )
    if options.processes.gradient_dtype != "fp32" and accelerator.distributed_type.value in ("MULTI_CPU", "DEEPSPEED"):
        raise ValueError(
            "`gradient_dtype` must be 'fp32' on CPUs, and under DeepSpeed, which has a setting of its own, got "
            f"{options.processes.gradient_dtype!r}."
        )
    if is_deepspeed:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = options.optimizer.train_batch_size
        config["gradient_clipping"] = options.optimizer.max_grad_norm
        # Its own step would apply gradients of bf16 that are not finite.
        config["bf16"] = {**config.get("bf16", {}), "check_grad_overflow": True}
    elif accelerator.is_fsdp2:
        # Autocast does the rest. FSDP's own casts would round the times of the samples to bf16.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            reduce_dtype=DTYPES[options.processes.gradient_dtype], cast_forward_inputs=False
        )
    return accelerator


def list_sharded_units(model: DoDJointModel, has_equal_priors: bool) -> list[str]:
    """
    Lists what FSDP2 gathers piece by piece, while other pieces compute.

    All processes must gather the same in the same order. So the LEM's blocks are pieces only if no process ever has a
    micro-batch without priors; else the LEM is gathered with all that belongs to no piece.

    Args:
        model ([`DoDJointModel`]): The model.
        has_equal_priors (`bool`): Whether each micro-batch has priors, as many on all processes.

    Returns:
        `list[str]`: Names of classes of modules.
    """
    parts = [model.transformer, model.latent_embedder if has_equal_priors else None]
    return [name for part in parts for name in getattr(part, "_no_split_modules", None) or []]


def gather_in_bf16(model: DoDJointModel, reduce_dtype: torch.dtype = torch.float32) -> None:
    """
    Makes FSDP2 gather the weights of its pieces in bf16, half as many bytes, with shards in fp32 as before.

    All else is gathered in fp32, above all the embedding of times. Call it before the first pass.

    Args:
        model ([`DoDJointModel`]): The sharded model.
        reduce_dtype (`torch.dtype`, defaults to `torch.float32`): Data type in which gradients are summed.
    """
    policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype, cast_forward_inputs=False)
    for module in model.modules():
        if isinstance(module, FSDPModule) and module is not model:
            for group in module._get_fsdp_state()._fsdp_param_groups:  # accelerate gives all the same policy
                group.mp_policy = policy
