# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Models of a training run and their optimizer."""

import copy
from pathlib import Path

import torch
from accelerate.optimizer import AcceleratedOptimizer
from diffusers.optimization import get_scheduler

from ..conversion import add_prior_projection
from ..finetuning import add_lora, difffit_parameters, freeze_all_but, has_lora
from ..latent_embedding import VisualPriorMixin
from ..losses import DoDJointModel, RepresentationProjector
from ..options import find_given
from ..pipeline_dod import DoDPipeline
from ..presets import PRESETS, Preset
from ..scheduling_dod import DoDFlowMatchScheduler
from ..shipped import find_shipped
from ..training_options import WSD, AlignmentOptions, ModelOptions, OptimizerOptions, TrainingOptions
from ..transformer_dod import DoDAttention, DoDTransformer2DModel


def build_models(
    options: ModelOptions,
    latent_shape: tuple[int, ...],
    num_classes: int,
    seed: int = 0,
    feature_dim: int | None = None,
    alignment: AlignmentOptions | None = None,
) -> DoDJointModel:
    """
    Builds backbone and LEM.

    They come from `--pretrained_model_name_or_path` as far as it has them, else from the preset.

    Args:
        options ([`ModelOptions`]): The options of the model.
        latent_shape (`tuple[int, ...]`): Shape (C, h, w) of the latents.
        num_classes (`int`): Number of classes.
        seed (`int`, defaults to 0): Seed of the weights that come from the preset.
        feature_dim (`int`, *optional*): Width of the features, if tokens are aligned.
        alignment ([`AlignmentOptions`], *optional*): The options of the alignment; the defaults if not given.

    Returns:
        [`DoDJointModel`]. All of it is trainable unless `--trainable_parameters` says otherwise.

    Raises:
        `ValueError`: a saved pipeline does not fit the latents or the options.
    """
    torch.manual_seed(seed)
    alignment = alignment or AlignmentOptions()
    preset: Preset = PRESETS[options.preset]
    names = ("num_latent_tokens", "latent_token_dim")
    overrides = {name: value for name, value in find_given(options).items() if name in names}
    if options.pretrained_model_name_or_path is None:
        if options.patch_size is not None:
            overrides["patch_size"] = options.patch_size
        transformer, latent_embedder = preset.build(latent_shape, num_classes, **overrides)
    else:
        shape = {"in_channels": latent_shape[0], "sample_size": latent_shape[1]}
        transformer, latent_embedder = load_pretrained(options.pretrained_model_name_or_path, shape, num_classes)
        if latent_embedder is not None and overrides:
            name, value = next(iter(overrides.items()))
            raise ValueError(
                f"`{name}` must not be given where `pretrained_model_name_or_path` has a latent embedder, "
                f"whose own is {latent_embedder.config.get(name)}, got {value}."
            )
        if (
            options.lora.lora_rank is not None
            and latent_embedder is None
            and preset.latent_embedder_config is not None
        ):
            raise ValueError(
                f"`lora_rank` must be given for a pipeline with a latent embedder, as `preset` {options.preset!r} has "
                f"one that would not be trained, got {options.pretrained_model_name_or_path!r} without."
            )
        if latent_embedder is None and preset.latent_embedder_config is not None:
            overrides |= {**shape, "patch_size": transformer.config.patch_size}
            latent_embedder = preset.override(**overrides).build_latent_embedder()
            if transformer.config.prior_embed_dim is None:  # a FiTv2 becomes the backbone of a DoD
                transformer = with_priors(transformer, latent_embedder.inner_dim)
    projector = prior_projector = None
    if feature_dim is not None:
        projector = RepresentationProjector(transformer.inner_dim, feature_dim)
        if latent_embedder is not None and alignment.repa_prior_weight > 0:
            prior_projector = RepresentationProjector(latent_embedder.inner_dim, feature_dim)
    model = DoDJointModel(transformer, latent_embedder, projector, prior_projector, alignment.repa_layer)
    if options.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if options.trainable_parameters == "difffit":
        projectors = [name for name, _ in model.named_parameters() if name.split(".")[0].endswith("projector")]
        freeze_all_but(model, sorted({*difffit_parameters(model), *projectors}))
    if options.lora.lora_rank is not None:
        add_lora(model, options.lora)
    return model


def load_pretrained(
    path: str, shape: dict[str, int], num_classes: int
) -> tuple[DoDTransformer2DModel, VisualPriorMixin | None]:
    """
    Loads the backbone of a saved pipeline, and its LEM if it has one, in training mode.

    Args:
        path (`str`): A folder or a repository on the Hub.
        shape (`dict[str, int]`): The `in_channels` and the `sample_size` of the latents.
        num_classes (`int`): Number of classes. If the pipeline has another number, each class starts as its null
            class.

    Returns:
        `tuple[DoDTransformer2DModel, VisualPriorMixin | None]`: The models.

    Raises:
        `ValueError`: a model has another number of channels, or a patch size that does not divide `sample_size`.
    """
    pipeline = DoDPipeline.from_pretrained(find_shipped(path), vae=None)
    models = [model for model in (pipeline.transformer, pipeline.latent_embedder) if model is not None]
    for model in models:
        if model.config.in_channels != shape["in_channels"] or shape["sample_size"] % model.config.patch_size:
            raise ValueError(
                "`pretrained_model_name_or_path` must hold a model for latents of the data's shape, "
                f"{shape['in_channels']} channels with sides that are multiples of its patch size, got {path!r} "
                f"for {model.config.in_channels} channels and patches of {model.config.patch_size}."
            )
        if "sample_size" in model.config:
            model.register_to_config(sample_size=shape["sample_size"])
        model.train()
    if pipeline.transformer.config.num_classes != num_classes:
        pipeline.transformer.resize_class_embed(num_classes)
    return pipeline.transformer, pipeline.latent_embedder


def with_priors(transformer: DoDTransformer2DModel, prior_embed_dim: int) -> DoDTransformer2DModel:
    """
    Turns a plain FiTv2 into a backbone that takes priors; at the start it predicts exactly the same.

    Args:
        transformer ([`DoDTransformer2DModel`]): The FiTv2, with `prior_embed_dim=None`.
        prior_embed_dim (`int`): Width of the visual priors.

    Returns:
        [`DoDTransformer2DModel`]: A new model.
    """
    model = DoDTransformer2DModel.from_config({**transformer.config, "prior_embed_dim": prior_embed_dim})
    model.load_state_dict(add_prior_projection(transformer.state_dict(), prior_embed_dim))
    return model


def build_pipeline(
    model: DoDJointModel, weights: dict[str, torch.Tensor], options: TrainingOptions, **components
) -> DoDPipeline:
    """
    Builds the pipeline of a run from averaged weights, sharing their memory.

    Args:
        model ([`DoDJointModel`]): The model that is trained, whose parts have the form of the pipeline's.
        weights (`dict[str, torch.Tensor]`): The weights of all parts, by their names in that model.
        options ([`TrainingOptions`]): The run's options.
        components: Passed on to the pipeline: `vae`, `id2label`, sampling defaults.

    Returns:
        [`DoDPipeline`]: The pipeline, without a progress bar.
    """
    for part in ("transformer", "latent_embedder"):
        trained = getattr(model, part)
        components[part] = None
        if trained is not None:
            with torch.device("meta"):
                components[part] = averaged = type(trained).from_config(trained.config)
                if has_lora(trained):
                    averaged.add_adapter(copy.deepcopy(trained.peft_config["default"]))
            own = {name.removeprefix(f"{part}."): w for name, w in weights.items() if name.startswith(f"{part}.")}
            if has_lora(model):  # averages are those of adapters, all else is frozen
                own = trained.state_dict() | own
            averaged.load_state_dict(own, assign=True)
            averaged.requires_grad_(False).eval()
    pipeline = DoDPipeline(scheduler=DoDFlowMatchScheduler(shift=options.times.time_shift), **components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_pipeline(pipeline: DoDPipeline, folder: Path) -> None:
    """
    Saves a pipeline, or its LoRA adapters alone if it has some.

    Args:
        pipeline ([`DoDPipeline`]): The pipeline.
        folder (`Path`): The folder.
    """
    parts = {name: getattr(pipeline, name) for name in ("transformer", "latent_embedder")}
    parts = {name: part for name, part in parts.items() if part is not None and has_lora(part)}
    if not parts:
        pipeline.save_pretrained(folder)
        return
    from peft import get_peft_model_state_dict

    adapters = {}
    for name, part in parts.items():
        adapters[f"{name}_lora_layers"] = get_peft_model_state_dict(part, adapter_name="default")
        config = part.peft_config["default"].to_dict()
        # A set has another order in each process.
        config["target_modules"] = sorted(config["target_modules"])
        adapters[f"{name}_lora_adapter_metadata"] = config
    pipeline.save_lora_weights(folder, **adapters, id2label=pipeline.config.id2label)


def use_fast_attention(model: DoDJointModel | DoDPipeline, device: torch.device, backend: str | None = None) -> None:
    """
    Gives a model the attention that is fast on its device, or another one.

    On a CPU, the backward pass of fused attention takes longer than all the rest of a short sequence's step, so that
    the backbone gets unfused attention. On CUDA, cuDNN is left out of PyTorch's choice: it makes a plan for each new
    shape, which takes up to a second, and the number of priors, sizes of buckets and adaptive solvers bring many.

    Args:
        model ([`DoDJointModel`] or [`DoDPipeline`]): The model.
        device (`torch.device`): Device of the model.
        backend (`str`, *optional*): One of Diffusers' backends, for backbone and LEM.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
    parts = [model.transformer]
    if backend is not None and model.latent_embedder is not None:
        parts.append(model.latent_embedder)
    if backend is None and device.type == "cpu":
        backend = "_native_math"
    for module in (module for part in parts for module in part.modules()):
        if backend is not None and isinstance(module, DoDAttention):
            module.set_attention_backend(backend)  # the models' own method would change other models' default too


def build_optimizer(options: OptimizerOptions, model: DoDJointModel) -> torch.optim.Optimizer:
    """
    Builds AdamW for the trainable weights; the LEM may have its own learning rate.

    Args:
        options ([`OptimizerOptions`]): The options of the optimizer.
        model ([`DoDJointModel`]): The model.

    Returns:
        `torch.optim.Optimizer`: PyTorch's fused AdamW, or torchao's with moments of 8 bits.

    Raises:
        `ImportError`: torchao is not installed.
    """

    def trainable(module: torch.nn.Module) -> list[torch.nn.Parameter]:
        return [parameter for parameter in module.parameters() if parameter.requires_grad]

    rates = {"latent_embedder": options.latent_embedder_learning_rate or options.learning_rate}
    groups = [
        {"params": trainable(module), "lr": rates.get(name, options.learning_rate)}
        for name, module in model.named_children()
    ]
    settings = {
        "lr": options.learning_rate,
        "betas": (options.adam_beta1, options.adam_beta2),
        "eps": options.adam_epsilon,
        "weight_decay": options.adam_weight_decay,
    }
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, **settings, fused=True)
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise ImportError(
            "`optimizer` 'adamw_8bit' needs torchao: `pip install 'diffusers-dod[quantization]'`."
        ) from error
    for group in groups:
        group["lr"] = torch.tensor(group["lr"])  # a number would be compiled into the step
    return AdamW8bit(groups, **settings)


def build_lr_scheduler(
    options: OptimizerOptions, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LambdaLR:
    """
    Builds the schedule of the learning rate, whose factors are functions of the step.

    Args:
        options ([`OptimizerOptions`]): Options of the schedule.
        optimizer (`torch.optim.Optimizer`): The optimizer, with the rates that the factors are for.

    Returns:
        `torch.optim.lr_scheduler.LambdaLR`: The schedule, of Diffusers or, with a stable rate before it falls, of
        Transformers.
    """
    steps = {"num_warmup_steps": options.lr_warmup_steps, "num_training_steps": options.max_train_steps}
    if options.lr_scheduler != WSD:
        return get_scheduler(options.lr_scheduler, optimizer, **steps)
    from transformers import get_wsd_schedule

    return get_wsd_schedule(optimizer, num_decay_steps=options.lr_decay_steps, decay_type="linear", **steps)


def step_optimizer(optimizer: AcceleratedOptimizer, is_finite: torch.Tensor) -> None:
    """
    Makes a step of an optimizer, unless its gradients are not finite: then weights and moments stay as they are.

    Fused AdamW leaves the step out on its device, which nothing waits for; others wait for the device. A scaler of
    gradients leaves it out itself, and learns from it.

    Args:
        optimizer (`AcceleratedOptimizer`): The optimizer, with gradients.
        is_finite (`torch.Tensor` of shape `()`): Whether they are finite, on their device.
    """
    is_fused = bool(optimizer.param_groups[0].get("fused"))
    if optimizer.scaler is None and is_fused:
        optimizer.optimizer.found_inf = (~is_finite).float()
    if optimizer.scaler is not None or is_fused or bool(is_finite):
        optimizer.step()


def set_learning_rates(optimizer: torch.optim.Optimizer, rates: list[float]) -> None:
    """Sets the learning rate of each parameter group of `optimizer` from `rates`."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
