# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Options of a training run, one dataclass per concern."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from diffusers.optimization import SchedulerType

from .checks import MAX_SHIFT
from .compute import OPTIMIZERS, TrainingStep
from .data.encoding import EncodingOptions
from .data.labelled_images import ImageOptions
from .finetuning import TRAINABLE_PARAMETERS, LoraOptions
from .options import option, replace_values
from .presets import PRESETS
from .processes import DISTRIBUTED_TYPES


TRACKERS = ("tensorboard", "wandb", "trackio")
WSD = "warmup_stable_decay"
# Diffusers' piecewise constant schedule needs rules of its own.
LR_SCHEDULERS = (*(kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT), WSD)


def check_is_file(name: str, path: Path) -> None:
    """Raises a `ValueError` that names the argument `name` unless `path` is a file."""
    if not path.is_file():
        raise ValueError(f"`{name}` must be a file, got {path}.")


# Backends of Diffusers with a backward pass that take no code from the Hub.
ATTENTION_BACKENDS = (
    "native",
    "_native_cudnn",
    "_native_efficient",
    "_native_flash",
    "_native_math",
    "flash",
    "_flash_3",
    "flex",
)


def find_mixed_folders(images: ImageOptions, name: str, folder: Path | None) -> list[str]:
    """
    Finds out whether a folder that a command writes lies among the images that it reads.

    Args:
        images ([`ImageOptions`]): Source of the images.
        name (`str`): Name of the option of the folder that is written.
        folder (`Path` or `None`): That folder.

    Returns:
        `list[str]`: A message if it does, since its files would be taken for images of a class.
    """
    if images.train_data_dir is None or folder is None:
        return []
    if Path(images.train_data_dir).resolve() not in [folder.resolve(), *folder.resolve().parents]:
        return []
    return [f"`{name}` must be a folder outside of `train_data_dir`, {images.train_data_dir}, got {folder}."]


def names_code(extractor: str) -> bool:
    """Whether the name of an `extractor` is that of code, not of Inception or of a model of `transformers`."""
    return extractor.partition(":")[0] not in ("inception", "dinov2", "transformers")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Model."""

    preset: str = option("DoD-B", choices=PRESETS, help="Size of backbone and LEM.")
    pretrained_model_name_or_path: str | None = option(
        None,
        is_place=True,
        help="Start from the weights of this pipeline: one trained before, or a converted FiTv2, which becomes the "
        "backbone of a DoD with the preset's LEM. With other classes than its own each starts as its null class.",
    )
    trainable_parameters: str = option(
        "all",
        choices=TRAINABLE_PARAMETERS,
        help="Which parameters to train: all, or biases, norms and embeddings only (DiffFit).",
    )
    lora: LoraOptions = field(default_factory=LoraOptions)
    patch_size: int | None = option(None, at_least=1, help="Override the preset's patch size, 2 latent pixels a side.")
    num_latent_tokens: int | None = option(None, at_least=1, help="Override the preset's number of latent tokens N.")
    latent_token_dim: int | None = option(None, at_least=1, help="Override the preset's width d_e of a latent token.")
    gradient_checkpointing: bool = option(
        False, is_free=True, help="Compute blocks again in the backward pass, which needs less memory and more time."
    )

    def find_conflicts(self) -> list[str]:
        """Messages about options that do not fit each other."""
        found = []
        if self.patch_size is not None and self.pretrained_model_name_or_path is not None:
            found.append(
                "`patch_size` must not be given with `pretrained_model_name_or_path`, whose model has its own, "
                f"got {self.patch_size}."
            )
        return found


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Images, and their latents."""

    images: ImageOptions = field(default_factory=ImageOptions)
    num_train_samples: int = option(100_000, at_least=1, is_free=True, help="Number of procedural images.")
    pretrained_vae_name_or_path: str | None = option(
        None,
        is_place=True,
        is_free=True,
        help="Autoencoder (folder or Hub id), by default that of `--pretrained_model_name_or_path`, if it has one; "
        "without one, a pixel-space model.",
    )
    latents_dir: Path | None = option(
        None,
        is_private=True,
        excludes="streaming",
        is_free=True,
        help="Folder of the latents; the trainer's default is `latents` in `--output_dir`.",
    )
    encoding: EncodingOptions = field(default_factory=EncodingOptions)
    seed: int = option(
        0, at_least=0, below=2**64, help="Seed of procedural images, of the order of data and of initial weights."
    )

    def find_conflicts(self) -> list[str]:
        """Messages about options that do not fit each other."""
        return find_mixed_folders(self.images, "latents_dir", self.latents_dir)


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """Images that are read while the model trains."""

    streaming: bool = option(
        False,
        help="Read the images of a data set of the Hub, or of a folder of Parquet or tar files, while training, "
        "instead of encoding them first. Exact on the same number of processes and workers.",
    )
    class_names_file: Path | None = option(
        None,
        needs="streaming",
        is_private=True,
        check=check_is_file,
        is_free=True,
        help="Text file with the name of a class in each line, for a stream whose labels are not of type ClassLabel.",
    )


@dataclass(frozen=True, kw_only=True)
class AlignmentOptions:
    """Representation alignment (REPA)."""

    repa_model_name_or_path: str | None = option(
        None,
        is_place=True,
        is_free=True,
        help="Vision model of transformers (folder or Hub id) with whose features of the images tokens are aligned: "
        "features stored with the latents if there are any, else computed in each step.",
    )
    repa_weight: float = option(
        0.5, at_least=0, needs="repa_model_name_or_path", help="Weight of the loss of the backbone's tokens."
    )
    repa_layer: int = option(
        8,
        at_least=1,
        needs="repa_model_name_or_path",
        help="Number of blocks after which the backbone's tokens are taken; REPA has 4 of 12.",
    )
    repa_prior_weight: float = option(
        0.0, at_least=0, needs="repa_model_name_or_path", help="Weight of the loss of the LEM's tokens."
    )
    repa_stop_step: int | None = option(
        None, at_least=1, needs="repa_model_name_or_path", help="Last aligned step; the last of all by default."
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """Optimization."""

    train_batch_size: int = option(256, at_least=1, help="Samples per process and micro-batch.")
    gradient_accumulation_steps: int = option(1, at_least=1, help="Micro-batches per optimizer step.")
    max_train_steps: int = option(400_000, at_least=1, help="Number of optimizer steps.")
    learning_rate: float = option(1e-4, above=0, help="Learning rate.")
    latent_embedder_learning_rate: float | None = option(
        None, above=0, help="Learning rate of the LEM, `--learning_rate` by default."
    )
    optimizer: str = option(
        "adamw",
        choices=OPTIMIZERS,
        help="AdamW, or torchao's with moments of 8 bits (needs `pip install 'diffusers-dod[quantization]'`).",
    )
    lr_scheduler: str = option(
        "constant_with_warmup",
        choices=LR_SCHEDULERS,
        help=f"Schedule of the learning rate, see Diffusers; `{WSD}` is constant until the last `--lr_decay_steps`.",
    )
    lr_warmup_steps: int = option(0, at_least=0, help="Optimizer steps of warm-up.")
    lr_decay_steps: int | None = option(
        None, at_least=1, help=f"Last optimizer steps, in which the rate of `{WSD}` falls to zero in a straight line."
    )
    adam_beta1: float = option(0.9, at_least=0, below=1, help="Decay of the first moments.")
    adam_beta2: float = option(0.999, at_least=0, below=1, help="Decay of the second moments.")
    adam_epsilon: float = option(1e-8, above=0, help="Number added to the root of the second moments.")
    adam_weight_decay: float = option(0.0, at_least=0, help="Weight decay.")
    max_grad_norm: float = option(1.0, above=0, help="Norm that gradients are clipped to.")
    max_nonfinite_steps: int = option(
        10,
        at_least=0,
        is_free=True,
        help="Steps in a row with gradients that are not finite, which are left out, until the run gives up.",
    )

    def find_conflicts(self) -> list[str]:
        """Messages about options that do not fit each other."""
        needs_decay = self.lr_scheduler == WSD
        if needs_decay != (self.lr_decay_steps is not None):
            must, schedule = "must" if needs_decay else "must not", self.lr_scheduler
            return [f"`lr_decay_steps` {must} be given with `lr_scheduler` {schedule!r}, got {self.lr_decay_steps}."]
        if needs_decay and self.lr_warmup_steps + self.lr_decay_steps > self.max_train_steps:
            return [
                "`lr_warmup_steps` and `lr_decay_steps` must be at most `max_train_steps` together, "
                f"{self.max_train_steps:,}, got {self.lr_warmup_steps:,} and {self.lr_decay_steps:,}."
            ]
        return []


@dataclass(frozen=True, kw_only=True)
class AverageOptions:
    """Averages of the weights."""

    ema_decay: tuple[float, ...] = option(
        (0.999,),
        at_least=0,
        at_most=1,
        is_distinct=True,
        help="Decays of the averages; pipelines and samples have the first one, checkpoints hold all.",
    )
    ema_sigma_rel: tuple[float, ...] = option(
        (),
        nargs="*",
        above=0,
        below=12**-0.5,
        is_distinct=True,
        help="Widths of power-function averages, e.g. 0.05 0.1, for `python -m diffusers_dod.training.posthoc_ema`.",
    )


@dataclass(frozen=True, kw_only=True)
class DropoutOptions:
    """Dropout of conditions."""

    label_dropout_prob: float = option(0.1, at_least=0, at_most=1, help="Share of samples of the null class.")
    prior_dropout_prob: float = option(0.5, at_least=0, at_most=1, help="Share p_s of samples without a prior.")
    prior_noise: float = option(
        0.0,
        at_least=0,
        at_most=1,
        help="Largest level of noise in the latents that the LEM sees, uniform from 0 on for each sample "
        "(conditioning augmentation); sampling then has a level, too.",
    )
    exact_dropout: bool | None = option(
        None,
        help="Drop exactly these shares, of classes in each optimizer step and of priors in each micro-batch, so that "
        "all processes have equal work; not each sample on its own, as in the paper. By default on CUDA only.",
    )


@dataclass(frozen=True, kw_only=True)
class TimeOptions:
    """Times (sigma) of training samples."""

    logit_mean: float = option(0.0, help="Mean of the logit of training times.")
    logit_std: float = option(1.0, above=0, help="Standard deviation of that logit.")
    time_shift: float = option(
        1.0,
        above=0,
        at_most=MAX_SHIFT,
        help="Shift of training times towards noise, for latents of many dimensions; 1 is none.",
    )


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions:
    """Precision and speed."""

    mixed_precision: str | None = option(
        None,
        choices=("no", "fp16", "bf16"),
        help="Precision of matrix products; the configuration of `accelerate launch` by default. fp16 needs a GPU, "
        "and bf16 is better.",
    )
    encoder_precision: str | None = option(
        None,
        choices=("no", "bf16"),
        help="Precision of frozen models in a step, the autoencoder of a stream and the vision model. By default bf16 "
        "on CUDA if `--mixed_precision` is, else no.",
    )
    allow_tf32: bool = option(False, help="TF32 matrix products on NVIDIA GPUs.")
    attention_backend: str | None = option(
        None,
        choices=ATTENTION_BACKENDS,
        help="Diffusers' backend of attention in training; by default PyTorch chooses, on CUDA without cuDNN, which "
        "makes a plan for each new shape.",
    )
    compile: bool | None = option(
        None, help="Compile the repeated blocks of both models, by default on CUDA only (where it needs Triton)."
    )


@dataclass(frozen=True, kw_only=True)
class ProcessOptions:
    """
    Processes.

    Refused where the launcher has made others.
    """

    num_processes: int | None = option(None, at_least=1, help="Number of processes.")
    distributed_type: str | None = option(None, choices=DISTRIBUTED_TYPES, help="Kind of processes.")
    gradient_dtype: str = option(
        "fp32",
        choices=("fp32", "bf16"),
        help="Data type in which processes exchange gradients; bf16 is half as much, for slow networks.",
    )


@dataclass(frozen=True, kw_only=True)
class ValidationOptions:
    """Samples on the way."""

    validation_steps: int = option(1000, at_least=1, is_free=True, help="Sample a grid every so many steps.")
    validation_guidance_scale: float | None = option(
        None, at_least=0, is_free=True, help="Guidance scale from stage 2 on, the preset's by default."
    )
    validation_seed: int = option(0, at_least=0, below=2**64, is_free=True, help="Seed of the samples.")
    fid_extractor: str | None = option(
        None,
        needs="fid_reference",
        is_private=True,
        is_free=True,
        names_code=names_code,
        help="`inception`, `dinov2`, `transformers:FOLDER_OR_ID`, `package.module:attribute` or "
        "`file.py:attribute`, which turns images (B, 3, H, W) in "
        "uint8 into features (B, d). With it the Fréchet distance of each stage is computed with every grid.",
    )
    fid_reference: Path | None = option(
        None,
        needs="fid_extractor",
        is_private=True,
        is_free=True,
        help="npz file with the `mu` and `sigma` of those features.",
    )
    trust_extractor: bool = option(
        False,
        is_private=True,
        is_trust=True,
        is_free=True,
        help="Run the code that the `fid_extractor` of a recipe names, or a TorchScript file.",
    )
    fid_num_samples: int = option(1000, at_least=2, is_free=True, help="Number of samples of a Fréchet distance.")


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Output."""

    output_dir: Path = option(is_private=True, is_free=True, help="Folder of the run.")
    logging_steps: int = option(50, at_least=1, is_free=True, help="Steps that a line of metrics averages over.")
    report_to: tuple[str, ...] | None = option(
        None,
        nargs="*",
        choices=TRACKERS,
        is_free=True,
        help="Trackers that get the metrics, beside `metrics.jsonl` in `--output_dir`, which always does.",
    )
    checkpointing_steps: int = option(1000, at_least=1, is_free=True, help="Write a checkpoint every so many steps.")
    checkpoints_total_limit: int | None = option(
        None, at_least=1, is_free=True, help="Keep only the newest so many checkpoints."
    )
    async_checkpoints: bool = option(
        True,
        is_free=True,
        help="Write checkpoints in a thread, from copies in memory of the host, while the training goes on. The last "
        "one, and those of FSDP2 and DeepSpeed, are waited for.",
    )
    resume_from_checkpoint: str | None = option(
        None,
        is_private=True,
        is_free=True,
        help="A checkpoint folder, its name in `--output_dir`, or `latest` for the newest valid one.",
    )
    allow_changed: tuple[str, ...] = option(
        (),
        nargs="*",
        needs="resume_from_checkpoint",
        is_private=True,
        is_free=True,
        help="Names of options whose values may differ from those that the checkpoint was trained with, and of data: "
        "`class_names`, `images` and what else the error names. Without them a resumed run equals one that was never "
        "stopped.",
    )


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """Hugging Face Hub."""

    push_to_hub: bool = option(False, is_private=True, is_free=True, help="Upload the finished pipeline.")
    push_every: int | None = option(
        None,
        at_least=1,
        needs="push_to_hub",
        is_private=True,
        is_free=True,
        help="Upload every so many checkpoints too, in the background, while training.",
    )
    push_training_state: bool = option(
        False, needs="push_to_hub", is_private=True, is_free=True, help="Upload with them what a resumed run needs."
    )
    hub_model_id: str | None = option(
        None, is_private=True, is_free=True, help="Repository, by default the name of `--output_dir`."
    )
    hub_token: str | None = option(
        None, is_secret=True, is_free=True, help="Token, by default the one of the Hub's own login."
    )
    hub_private_repo: bool = option(
        False,
        needs="push_to_hub",
        is_private=True,
        is_free=True,
        help="Push to a private repository only, and make a new one so; by default the owner's settings decide.",
    )


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Options of the trainer."""

    config: Path | None = option(
        None,
        is_recipe=True,
        is_private=True,
        is_free=True,
        help="YAML file of options under their names here, or name of a recipe that comes with the package, such as "
        "dod-b-imagenet256; options of the command take precedence.",
    )
    dry_run: bool = option(
        False, is_private=True, is_free=True, help="Print the options and the cost of the run, and end."
    )
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    stream: StreamOptions = field(default_factory=StreamOptions)
    alignment: AlignmentOptions = field(default_factory=AlignmentOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    averages: AverageOptions = field(default_factory=AverageOptions)
    dropout: DropoutOptions = field(default_factory=DropoutOptions)
    times: TimeOptions = field(default_factory=TimeOptions)
    precision: PrecisionOptions = field(default_factory=PrecisionOptions)
    processes: ProcessOptions = field(default_factory=ProcessOptions)
    output: OutputOptions
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    hub: HubOptions = field(default_factory=HubOptions)

    def find_conflicts(self) -> list[str]:
        """Messages about options that do not fit each other."""
        model, alignment, preset = self.model, self.alignment, PRESETS.get(self.model.preset)
        found = self.data.images.find_source_errors(is_needed=self.data.latents_dir is None)
        found += find_mixed_folders(self.data.images, "output_dir", self.output.output_dir)
        if preset is None:
            return found  # its own message says so
        if preset.latent_embedder_config is None:
            if alignment.repa_prior_weight > 0:
                found.append(
                    f"`repa_prior_weight` must be 0 for `preset` {model.preset!r}, which has no latent embedder, "
                    f"got {alignment.repa_prior_weight}."
                )
            overrides = {"num_latent_tokens": model.num_latent_tokens, "latent_token_dim": model.latent_token_dim}
            overrides["latent_embedder_learning_rate"] = self.optimizer.latent_embedder_learning_rate
            overrides["prior_noise"] = self.dropout.prior_noise or None
            found += [
                f"`{name}` must not be given for `preset` {model.preset!r}, which has no latent embedder, got {value}."
                for name, value in overrides.items()
                if value is not None
            ]
        if model.lora.lora_rank is not None:
            found += self._find_conflicts_of_lora()
        num_layers = preset.transformer_config["num_layers"]
        if alignment.repa_model_name_or_path is not None and alignment.repa_layer > num_layers:
            found.append(
                f"`repa_layer` must be at most the {num_layers} blocks of the preset, got {alignment.repa_layer}."
            )
        return found

    def _find_conflicts_of_lora(self) -> list[str]:
        """Messages about options that do not fit LoRA adapters."""
        found = []
        if self.averages.ema_sigma_rel:
            found.append(
                "`ema_sigma_rel` must not be given with `lora_rank`: sums of adapters' averages are no averages of "
                f"what they add, got {list(self.averages.ema_sigma_rel)}."
            )
        rate = self.optimizer.latent_embedder_learning_rate
        if rate is not None and not self.model.lora.lora_latent_embedder:
            found.append(
                "`latent_embedder_learning_rate` must not be given with `lora_rank` without `lora_latent_embedder`, "
                f"as the LEM is not trained, got {rate}."
            )
        return found

    def for_device(self, device_type: str) -> "TrainingOptions":
        """
        Decides what is left to the device.

        Args:
            device_type (`str`): Type of the device that trains, such as `"cuda"`.

        Returns:
            [`TrainingOptions`]: On CUDA, with the values of options that are fast there. On a CPU `None` is off.
        """
        values = {"compile": self.precision.compile, "exact_dropout": self.dropout.exact_dropout}
        undecided = [name for name, value in values.items() if value is None and device_type == "cuda"]
        return replace_values(self, **dict.fromkeys(undecided, True))

    @property
    def has_equal_priors(self) -> bool:
        """Whether every micro-batch has samples with priors, as many on all processes."""
        dropped = self.dropout.prior_dropout_prob * self.optimizer.train_batch_size
        return bool(self.dropout.exact_dropout) and math.ceil(dropped - 1e-9) < self.optimizer.train_batch_size

    @property
    def training_step(self) -> TrainingStep:
        """The work of a training step, for [`training_cost`]."""
        return TrainingStep(
            batch_size=self.optimizer.train_batch_size,
            prior_dropout_prob=self.dropout.prior_dropout_prob,
            gradient_checkpointing=self.model.gradient_checkpointing,
            num_averages=len(self.averages.ema_decay) + len(self.averages.ema_sigma_rel),
            trainable_parameters=self.model.trainable_parameters,
            optimizer=self.optimizer.optimizer,
            lora=self.model.lora,
        )
