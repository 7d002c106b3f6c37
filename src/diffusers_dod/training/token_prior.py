# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Trains a generator of latent tokens for a pipeline, so that an image takes one stage instead of two:

    python -m diffusers_dod.training.token_prior --pretrained_model_name_or_path outputs/own \\
        --train_data_dir path/to/images --resolution 256 --output_dir outputs/own-tokens

The latent embedder computes the tokens of all images once, into `output_dir/tokens.safetensors`. A small MLP learns to
draw them, which takes minutes on a CPU. The pipeline with it goes into `output_dir`; its calls take
`use_token_prior=True`. A run that was stopped continues from its last saved step, with the same result; one that was
stopped before all tokens were there computes them again.
"""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ..command_line import run_main
from ..data.class_names import check_classes, clean_class_names
from ..data.latents import Latents
from ..files import in_use, replacing, replacing_contents, sha256_of_weights
from ..latent_embedding import VisualPriorMixin
from ..options import option, parse_options
from ..pipeline_dod import DoDPipeline
from ..processes import check_processes, end_processes
from ..records import check_safetensors_header
from ..rectified_flow import NUM_TRAIN_TIMESTEPS, interpolate, logit_normal_sigma, velocity_target
from ..results import checkpoint_sha256, find_checkpoint
from ..seeding import stateless_generator, stateless_noise
from ..shipped import find_shipped
from ..token_prior import TokenPrior, count_classes
from ..training_options import DataOptions, find_mixed_folders
from .checkpoints import list_checkpoints
from .ema import WeightAverage
from .encode_latents import load_autoencoder
from .training_data import open_stored_latents


logger = logging.getLogger(__name__)

TOKENS_FILE = "tokens.safetensors"
STATE_FILE = "token_prior_state.safetensors"
CARD = "README.md"
HEADING = "\n## Token prior\n"
POSTERIOR, STEP = range(2)  # what random numbers are for


@dataclass(frozen=True, kw_only=True)
class TokenPriorModelOptions:
    """Token prior."""

    hidden_dim: int = option(256, at_least=1, help="Width of the MLP.")
    num_layers: int = option(3, at_least=1, help="Residual blocks of the MLP.")


@dataclass(frozen=True, kw_only=True)
class TokenPriorStepOptions:
    """Training of the token prior."""

    train_batch_size: int = option(256, at_least=1, help="Images of a step.")
    learning_rate: float = option(1e-3, above=0, help="Learning rate of Adam.")
    label_dropout_prob: float = option(0.1, above=0, below=1, help="Share of samples of the null class.")
    ema_decay: float = option(0.999, at_least=0, below=1, help="Decay of the average of the weights, which is saved.")


@dataclass(frozen=True, kw_only=True)
class TokenPriorOptions:
    """Options of the command."""

    pretrained_model_name_or_path: str = option(help="Pipeline (folder or Hub id) with a latent embedder.")
    data: DataOptions = field(default_factory=DataOptions)
    model: TokenPriorModelOptions = field(default_factory=TokenPriorModelOptions)
    steps: TokenPriorStepOptions = field(default_factory=TokenPriorStepOptions)
    max_train_steps: int = option(10_000, at_least=1, help="Number of optimizer steps. A resumed run may have more.")
    checkpointing_steps: int = option(1000, at_least=1, help="Save the state every so many steps.")
    output_dir: Path = option(writes="folder", help="Folder of the run, which the pipeline goes to.")

    def find_conflicts(self) -> list[str]:
        """Messages about options that do not fit each other."""
        found = self.data.images.find_source_errors(is_needed=self.data.latents_dir is None)
        found += find_mixed_folders(self.data.images, "output_dir", self.output_dir)
        if self.output_dir.resolve() == Path(find_shipped(self.pretrained_model_name_or_path)).resolve():
            found.append(f"`output_dir` must be another folder than that of the pipeline, got {self.output_dir}.")
        elif list_checkpoints(self.output_dir):
            found.append(
                "`output_dir` must be a new folder, or that of a run of this command, got "
                f"{self.output_dir} with checkpoints of a training, whose pipeline goes there."
            )
        elif (self.output_dir / DoDPipeline.config_name).exists() and not (self.output_dir / TOKENS_FILE).exists():
            found.append(
                "`output_dir` must be a new folder, or that of a run of this command, got "
                f"{self.output_dir} with another pipeline, which would be lost."
            )
        return found


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
    """Writes a safetensors file atomically, with a record of JSON and the hash of the tensors in its header."""
    with replacing(path) as unfinished:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        record = {**record, "sha256": sha256_of_weights(tensors)}
        save_file(tensors, unfinished, metadata={"record": json.dumps(record, sort_keys=True)})


def _read_tensors(path: Path, settings: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Reads a file of [`_write_tensors`]; a `ValueError` says what is wrong with it, or which setting differs."""
    check_safetensors_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {}).get("record", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} must be an undamaged file of this command, got {error}: remove it.") from error
    if record.get("sha256") != sha256_of_weights(tensors):
        raise ValueError(f"{path} must have the hash that its header states, got another: remove it.")
    found = record.get("settings", {})
    for name in sorted(settings.keys() | found.keys()):
        if found.get(name) != settings.get(name):
            raise ValueError(
                f"{path} must be of a run with `{name}` = {settings.get(name)!r}, got {found.get(name)!r}: continue "
                "with the options of that run, or use another folder."
            )
    return tensors, record


@torch.no_grad()
def compute_latent_tokens(
    latent_embedder: VisualPriorMixin, latents: Latents, seed: int, batch_size: int = 256
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Computes the latent tokens of images and of stored mirror images, from one draw of each posterior.

    Args:
        latent_embedder ([`VisualPriorMixin`]): The encoder.
        latents ([`Latents`]): The latents of the images.
        seed (`int`): Seed of the draws.
        batch_size (`int`, defaults to 256): Images at a time.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Tokens (n, N, d_e) in fp32 on the CPU, and class ids (n,).

    Raises:
        `ValueError`: the tokens are not finite.
    """
    tokens, labels = [], []
    for number, part in enumerate(latents.parts):  # of one shape each
        for view in range(part.num_views):
            for rows in tqdm(torch.arange(len(part)).split(batch_size), desc="Tokens", disable=None):
                samples = []
                for index in rows.tolist():
                    mean, std = part.read(index, view)
                    if std is not None:
                        mean = mean + std * stateless_noise(tuple(mean.shape), seed, POSTERIOR, number, view, index)
                    samples.append(mean)
                batch = torch.stack(samples).to(latent_embedder.device)
                tokens.append(latent_embedder.encode(batch).float().cpu())
                labels.append(part.labels[rows])
    tokens = torch.cat(tokens)
    if not bool(tokens.isfinite().all()):
        raise ValueError("`latent_embedder` must give finite tokens, got others.")
    return tokens, torch.cat(labels)


class TokenPriorTraining:
    """
    The training of a token prior: its weights, their average, and the moments of its optimizer.

    Step s depends on seed and s alone, whatever process makes it.

    Args:
        prior ([`TokenPrior`]): The model, on the device of the training.
        tokens (`torch.Tensor` of shape `(n, N, d_e)`): Latent tokens of images of all classes.
        labels (`torch.Tensor` of shape `(n,)`): Class ids.
        options ([`TokenPriorStepOptions`]): Settings of the steps.
        seed (`int`): Seed of the steps.

    Raises:
        `ValueError`, `TypeError`: see [`TokenPrior.set_statistics`].
    """

    def __init__(
        self,
        prior: TokenPrior,
        tokens: torch.Tensor,
        labels: torch.Tensor,
        options: TokenPriorStepOptions,
        seed: int,
    ):
        self.prior, self.options, self.seed = prior.train(), options, seed
        prior.set_statistics(tokens, labels)
        self.tokens = ((tokens.to(prior.device) - prior.token_mean) / prior.token_std).float()
        self.labels = labels.to(prior.device)
        self.optimizer = torch.optim.Adam(prior.parameters(), lr=options.learning_rate)
        self.average = WeightAverage(prior.parameters(), decay=options.ema_decay)
        #: Number of finished steps.
        self.step = 0

    def make_step(self) -> torch.Tensor:
        """
        Makes the next step.

        Returns:
            `torch.Tensor` of shape `()`: The loss, the mean squared error of the velocity.
        """
        generator = stateless_generator(self.seed, STEP, self.step)
        batch_size, device = self.options.train_batch_size, self.tokens.device
        rows = torch.randint(len(self.tokens), (batch_size,), generator=generator).to(device)
        noise = torch.randn(batch_size, *self.prior.token_shape, generator=generator).to(device)
        sigma = logit_normal_sigma(torch.randn(batch_size, generator=generator)).to(device)
        is_dropped = (torch.rand(batch_size, generator=generator) < self.options.label_dropout_prob).to(device)
        labels = torch.where(is_dropped, self.prior.config.num_classes, self.labels[rows])
        tokens = self.tokens[rows]
        velocity = self.prior(interpolate(tokens, noise, sigma), NUM_TRAIN_TIMESTEPS * sigma, labels)
        loss = F.mse_loss(velocity, velocity_target(tokens, noise))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.step(self.prior.parameters())
        self.step += 1
        return loss.detach()

    def save(self, path: Path, settings: dict[str, Any]) -> None:
        """
        Saves all that a resumed run needs, atomically.

        Args:
            path (`Path`): A safetensors file.
            settings (`dict`): Settings that the run depends on, ready for JSON.

        Raises:
            `FloatingPointError`: the weights are not finite. The file stays as it is.
        """
        names = [name for name, _ in self.prior.named_parameters()]
        tensors = {f"model.{name}": parameter for name, parameter in self.prior.named_parameters()}
        averages = zip(names, self.average.shadow_params, strict=True)
        tensors |= {f"average.{name}": parameter for name, parameter in averages}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise FloatingPointError(f"The weights must be finite, got others in step {self.step}.")
        _write_tensors(path, tensors, {"step": self.step, "settings": settings})

    def load(self, path: Path, settings: dict[str, Any]) -> None:
        """
        Loads what [`TokenPriorTraining.save`] has written.

        Args:
            path (`Path`): The safetensors file.
            settings (`dict`): Settings that it must depend on.

        Raises:
            `ValueError`: the file is damaged, or has other settings.
        """
        tensors, record = _read_tensors(path, settings)
        names = [name for name, _ in self.prior.named_parameters()]
        weights = {name: tensors[f"model.{name}"] for name in names}
        self.prior.load_state_dict(weights, strict=False)  # the statistics are those of the tokens
        self.average.shadow_params = [tensors[f"average.{name}"].to(self.tokens.device) for name in names]
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, moment = name.split(".")
                state.setdefault(int(index), {})[moment] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.step = self.average.optimization_step = record["step"]


def _describe_latents(latents: Latents) -> dict[str, Any]:
    """What the tokens depend on, as the manifest of the latents states it."""
    stated = ("images", "transform", "autoencoder", "latents_dtype", "buckets", "class_names")
    found = {name: latents.manifest[name] for name in stated if name in latents.manifest}
    return {"num_images": len(latents), "num_views": latents.num_views, **found}


def _write_card(folder: Path, source: Path, training: TokenPriorTraining) -> None:
    """Copies the card of the pipeline, if it has one, with a section about the token prior."""
    if not (source / CARD).is_file():
        return
    text = (source / CARD).read_text(encoding="utf-8").partition(HEADING)[0].rstrip("\n")
    section = (
        f"{HEADING}\n`token_prior/` draws the latent tokens of an image of a class, so that an image takes one stage "
        "instead of two:\n\n```python\npipe(class_labels=0, num_stages=2, use_token_prior=True)\n```\n\n"
        f"It has {training.prior.num_parameters():,} parameters and was trained for {training.step:,} steps of "
        f"{training.options.train_batch_size:,} images, on the tokens of {len(training.tokens):,} images.\n"
    )
    (folder / CARD).write_text(f"{text}\n{section}", encoding="utf-8")


def train_token_prior(options: TokenPriorOptions, accelerator: Accelerator) -> DoDPipeline:
    """
    Trains a token prior, or goes on with the training in `output_dir`, and writes the pipeline with it.

    Args:
        options ([`TokenPriorOptions`]): The options of the command.
        accelerator (`Accelerator`): The process; there must be one alone.

    Returns:
        [`DoDPipeline`]: The pipeline with the token prior.

    Raises:
        `ValueError`: there are several processes, the pipeline has no latent embedder or other classes than the
            images, a class has no images, or the folder has a run with other settings or of more steps.
        `FloatingPointError`: the weights are not finite.
    """
    if accelerator.num_processes > 1:
        raise ValueError(f"The command must run in one process, got {accelerator.num_processes}.")
    folder, device, seed = options.output_dir, accelerator.device, options.data.seed
    name = find_shipped(options.pretrained_model_name_or_path)
    vae = load_autoencoder(options.data.pretrained_vae_name_or_path, device, pipeline=name)
    pipeline = DoDPipeline.from_pretrained(name)
    embedder = pipeline.latent_embedder
    if embedder is None:
        raise ValueError(f"`pretrained_model_name_or_path` must hold a latent embedder, got {name!r} without.")
    latents = open_stored_latents(options.data, accelerator, vae, folder)
    check_classes(pipeline, clean_class_names(latents.manifest["class_names"]))
    count_classes(latents.labels, pipeline.transformer.config.num_classes)
    settings = {"checkpoint": checkpoint_sha256(name), "seed": seed, **_describe_latents(latents)}
    path = folder / TOKENS_FILE
    if not path.exists():
        tokens, labels = compute_latent_tokens(embedder.to(device), latents, seed)
        _write_tensors(path, {"tokens": tokens, "labels": labels}, {"settings": settings})
    data, _ = _read_tensors(path, settings)

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        prior = TokenPrior(*embedder.token_shape, pipeline.transformer.config.num_classes, **vars(options.model)).to(
            device
        )
    training = TokenPriorTraining(prior, data["tokens"], data["labels"], options.steps, seed)
    settings |= vars(options.model) | vars(options.steps)
    path = folder / STATE_FILE
    if path.exists():
        training.load(path, settings)
        if training.step > options.max_train_steps:
            raise ValueError(
                f"`max_train_steps` must be at least the {training.step} steps of the run in {folder}, "
                f"got {options.max_train_steps}."
            )
        logger.info(f"Going on from step {training.step:,}.")
    losses: list[torch.Tensor] = []
    for _ in tqdm(range(training.step, options.max_train_steps), desc="Training", disable=None):
        losses.append(training.make_step())
        if training.step % options.checkpointing_steps == 0 or training.step == options.max_train_steps:
            logger.info(f"Step {training.step:,}: loss {float(torch.stack(losses).mean()):.4f}")
            losses.clear()
            training.save(path, settings)
    training.average.copy_to(prior.parameters())
    pipeline.to("cpu").register_modules(token_prior=prior.to("cpu").eval())
    with replacing_contents(folder, DoDPipeline.config_name) as unfinished:
        pipeline.save_pretrained(unfinished)
        _write_card(unfinished, find_checkpoint(name), training)
    return pipeline


def main(argv: list[str] | None = None) -> None:
    """Runs the command; `argv` defaults to the process's arguments. Raises a `ValueError` if they do not fit."""
    options = parse_options(TokenPriorOptions, argv, __doc__)
    accelerator = Accelerator()
    check_processes(accelerator)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("diffusers_dod").setLevel(logging.INFO)
    with in_use(options.output_dir):
        train_token_prior(options, accelerator)
    logger.info(f"The pipeline is in {options.output_dir}: `pipe(..., num_stages=2, use_token_prior=True)`.")
    end_processes(accelerator)


if __name__ == "__main__":
    run_main(main)
