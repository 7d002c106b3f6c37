# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Trains a DoD (backbone and latent embedding module together, paper, Section 3.3) or, with a FiTv2 preset, its baseline.

    python training/train_dod.py --preset DoD-B --train_data_dir path/to/images --resolution 256 \
        --pretrained_vae_name_or_path stabilityai/sd-vae-ft-ema --train_batch_size 256 --max_train_steps 400000 \
        --mixed_precision bf16 --output_dir dod-b

The images are encoded once, into `output_dir/latents`. The run writes `metrics.jsonl`, `samples/` and
`checkpoint-<step>/`: a `DoDPipeline` with EMA weights and all that a resumed run needs. At its end it writes the
pipeline itself into `output_dir`.
"""

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from ..checkpoint_manifest import ADAPTER
from ..command_line import run_main
from ..data.sample_stream import PositionSampler, SampleDraws
from ..files import METRICS_FILE, flush, in_use, replacing, replacing_contents, write_json
from ..finetuning import frozen_sha256, has_lora
from ..losses import DoDJointModel
from ..metrics.extractors import check_extractor, load_extractor, load_statistics
from ..options import describe, parse_options, replace_values
from ..pipeline_dod import DoDPipeline
from ..processes import (
    STOPPED_EXIT_CODE,
    StopSignal,
    all_or_none,
    end_processes,
    end_with_launcher,
    find_nonfinite,
    full_tensor,
)
from ..training_options import TrainingOptions
from ..vision_features import VisionFeatures
from .accelerator import DTYPES, build_accelerator, gather_in_bf16, list_sharded_units
from .checkpoints import (
    CheckpointWriter,
    agree_on_checkpoint,
    checkpoint_step,
    gather_training_state,
    load_average,
    load_training_state,
    read_state,
    save_checkpoint,
    save_training_state,
    set_aside_later,
)
from .cost import describe_run, find_preset
from .ema import averaged_parameters, build_averages
from .encode_latents import load_autoencoder
from .history import TrainingHistory, values_of_steps
from .model_card import CARD_FILES, describe_end, write_model_card
from .models import (
    build_lr_scheduler,
    build_models,
    build_optimizer,
    build_pipeline,
    save_pipeline,
    set_learning_rates,
    step_optimizer,
    use_fast_attention,
)
from .nonfinite import NonfiniteCounts, NonfiniteSteps
from .push import HubPusher, remove_snapshots
from .run_metrics import EVALUATIONS, TrainingMetrics, append_line, drop_metrics_after
from .training_data import open_training_data
from .validation import stage_distances, stage_grid


logger = get_logger(__name__, log_level="INFO")

PUSH_TIMEOUT_S = 3600.0  # longest wait for the upload at the end of a run


class Trainer:
    """
    A training run: its data and models, its steps, and its output.

    Args:
        options ([`TrainingOptions`]): The run's options.
        accelerator (`Accelerator`): The run's processes.

    Raises:
        `ValueError`: the arguments do not fit the data, the models or the content of the folders.
    """

    def __init__(self, options: TrainingOptions, accelerator: Accelerator):
        self.options = options = options.for_device(accelerator.device.type)
        self.accelerator = accelerator
        self.pusher = None
        self.checkpoint = agree_on_checkpoint(
            options.output.output_dir, options.output.resume_from_checkpoint, accelerator
        )  # the latest
        state = {} if self.checkpoint is None else read_state(self.checkpoint)
        self.history = TrainingHistory(state, options.output.allow_changed)
        self.history.go_on_with(values_of_steps(options, accelerator))
        if accelerator.is_main_process:
            remove_snapshots(options.output.output_dir)
        if options.hub.push_to_hub:  # before anything else, so that a refusal costs nothing
            with all_or_none():
                if accelerator.is_main_process:
                    name = options.hub.hub_model_id or options.output.output_dir.resolve().name
                    self.pusher = HubPusher(name, options.output.output_dir, options.hub.hub_token)
                    self.pusher.check(write_model_card(options), private=options.hub.hub_private_repo or None)
        self.fid = None
        if options.validation.fid_extractor is not None:
            self.fid = (
                load_extractor(
                    options.validation.fid_extractor, options.validation.trust_extractor, accelerator.device
                ),
                load_statistics(options.validation.fid_reference),
            )

        self.vae = load_autoencoder(
            options.data.pretrained_vae_name_or_path,
            accelerator.device,
            pipeline=options.model.pretrained_model_name_or_path,
        )
        vision = None
        if options.alignment.repa_model_name_or_path is not None:
            vision = VisionFeatures(options.alignment.repa_model_name_or_path, accelerator.device)
        self.data = open_training_data(options, accelerator, self.vae, vision)
        self.history.go_on_with(self.data.identity)
        if self.fid is not None:
            check_extractor(self.fid[0], len(self.fid[1][0]), self.data.resolution, accelerator.device)
        feature_dim = None if vision is None else vision.feature_dim
        model = build_models(
            options.model,
            self.data.latent_shape,
            len(self.data.class_names),
            seed=options.data.seed,
            feature_dim=feature_dim,
            alignment=options.alignment,
        )
        self.sampling_defaults = find_preset(options)[0].pipeline_config
        self.is_lora = has_lora(model)
        if self.is_lora:  # what a checkpoint of adapters does not hold
            self.history.go_on_with({"base_weights": frozen_sha256(model)})
        self.data.check_patch_size(model.transformer.config.patch_size)
        optimizer = build_optimizer(options.optimizer, model)
        # Not prepared by accelerate, which would step it once per process.
        self.lr_scheduler = build_lr_scheduler(options.optimizer, optimizer)
        if options.precision.compile:
            model.transformer.compile_repeated_blocks()
            if model.latent_embedder is not None and model.latent_embedder._repeated_blocks:
                model.latent_embedder.compile_repeated_blocks()
        if accelerator.is_fsdp2:
            units = list_sharded_units(model, options.has_equal_priors)
            accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = units
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        if accelerator.is_fsdp2 and accelerator.mixed_precision == "bf16":
            gather_in_bf16(self.model, DTYPES[options.processes.gradient_dtype])
        self.joint_model: DoDJointModel = accelerator.unwrap_model(self.model)
        use_fast_attention(self.joint_model, accelerator.device, options.precision.attention_backend)
        averaged = list(averaged_parameters(self.joint_model).values())
        #: The averages of the weights by name; pipelines and samples use the first.
        self.emas: dict[str, EMAModel] = build_averages(options.averages, averaged)
        self.stop = StopSignal(accelerator)
        self.writer = CheckpointWriter(accelerator.device, lambda: self.stop.note("a failed checkpoint"))
        self.saved_step = self.step = 0
        self.nonfinite = NonfiniteSteps(accelerator.device)
        if self.checkpoint is not None:
            self._resume(self.checkpoint, state)
        positions = PositionSampler(
            start_step=self.step,
            num_steps=options.optimizer.max_train_steps,
            batch_size=options.optimizer.train_batch_size,
            accumulation=options.optimizer.gradient_accumulation_steps,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )
        self.images_per_step = positions.images_per_step
        self.metrics = TrainingMetrics(
            options.output.output_dir / METRICS_FILE,
            accelerator,
            self.images_per_step,
            self.step,
            state.get("metrics"),
        )
        self._ahead: dict[str, Any] | Exception | None = None  # what has been read of the next pass
        self.batches = self.data.batches(
            self._build_draws(),
            positions,
            num_aligned_steps=self._num_aligned_steps,
            num_workers=options.data.encoding.dataloader_num_workers,
            state=state,
        )

    @property
    def ema(self) -> EMAModel:
        """The average that pipelines and samples use."""
        return next(iter(self.emas.values()))

    @property
    def other_emas(self) -> dict[str, EMAModel]:
        """All averages but the first, by name."""
        return dict(list(self.emas.items())[1:])

    def _build_draws(self) -> SampleDraws:
        options = self.options
        return SampleDraws(
            num_classes=len(self.data.class_names),
            seed=options.data.seed,
            label_dropout_prob=options.dropout.label_dropout_prob,
            prior_dropout_prob=1.0 if self.joint_model.latent_embedder is None else options.dropout.prior_dropout_prob,
            prior_noise=options.dropout.prior_noise,
            exact_dropout_size=self.images_per_step if options.dropout.exact_dropout else None,
            micro_batch_size=options.optimizer.train_batch_size if options.dropout.exact_dropout else None,
            logit_mean=options.times.logit_mean,
            logit_std=options.times.logit_std,
            time_shift=options.times.time_shift,
        )

    @property
    def _num_aligned_steps(self) -> int:
        """Number of steps that align tokens with features."""
        if self.data.vision is None:
            return 0
        return self.options.alignment.repa_stop_step or self.options.optimizer.max_train_steps

    # ------------------------------------------------------------------------------------------------- checkpoints

    def _resume(self, checkpoint: Path, state: dict) -> None:
        """Loads the checkpoint to resume from, whose JSON state is `state`."""
        first = next(iter(self.emas))
        if state["average"] != first:
            raise ValueError(
                f"The first `ema_decay` must be that of the pipeline in {checkpoint}, {state['average']}, got {first}."
            )
        if state["step"] > self.options.optimizer.max_train_steps:
            raise ValueError(
                f"`max_train_steps` must be at least the step {state['step']} of {checkpoint}, "
                f"got {self.options.optimizer.max_train_steps}."
            )
        averages = self.emas if self.is_lora else self.other_emas
        load_training_state(checkpoint, self.joint_model, self.optimizer, averages)
        if not self.is_lora:
            self.ema.shadow_params = load_average(checkpoint, self.joint_model)
        self.saved_step = self.step = state["step"]
        in_a_row = state["nonfinite_in_a_row"]
        counts = NonfiniteCounts(state["num_nonfinite_steps"], in_a_row, latest=self.step if in_a_row else 0)
        self.nonfinite = NonfiniteSteps(self.accelerator.device, counts)
        for average in self.emas.values():
            average.optimization_step = self.step
        if self.accelerator.scaler is not None and state["gradient_scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["gradient_scaler"])
        # The learning rate is a function of the step and of this run's own arguments.
        self.lr_scheduler.last_epoch = self.step
        rates = [
            float(base_rate * factor(self.step))
            for base_rate, factor in zip(self.lr_scheduler.base_lrs, self.lr_scheduler.lr_lambdas, strict=True)
        ]
        set_learning_rates(self.optimizer, rates)
        self._check_weights()
        logger.info(f"Resuming from {checkpoint} at step {self.step}.")
        for change in self.history.describe_changes():
            logger.info(change)

    def averaged_pipeline(self, weights: dict[str, torch.Tensor] | None = None) -> DoDPipeline:
        """Builds the pipeline of the average, sharing its memory; without its `weights` all processes must call it."""
        if weights is None:
            names = averaged_parameters(self.joint_model)
            weights = {name: full_tensor(tensor) for name, tensor in zip(names, self.ema.shadow_params, strict=True)}
        id2label = dict(enumerate(self.data.class_names))
        components = {"vae": self.vae, "id2label": id2label, **self.sampling_defaults}
        return build_pipeline(self.joint_model, weights, self.options, **components)

    def _check_weights(self) -> None:
        """Raises a `FloatingPointError` unless weights and averages are finite; all processes must call it."""
        names = list(averaged_parameters(self.joint_model))
        tensors = dict(self.joint_model.named_parameters())
        for average, ema in self.emas.items():
            tensors |= {
                f"{name} in the average {average}": w for name, w in zip(names, ema.shadow_params, strict=True)
            }
        if nonfinite := find_nonfinite(tensors, self.accelerator):
            raise FloatingPointError(
                f"{len(nonfinite)} weights and averages of step {self.step} are not finite: {', '.join(nonfinite[:3])}"
                f"{', ...' if len(nonfinite) > 3 else ''}. The last checkpoint is {self.checkpoint}: resume from a "
                "good one with a smaller `learning_rate`."
            )

    def save(self, is_end: bool = False) -> None:
        """
        Writes a checkpoint of the current step, or starts to; all processes must call it.

        Args:
            is_end (`bool`, defaults to `False`): Whether no step follows. Then the checkpoint is waited for.

        Raises:
            `FloatingPointError`: weights or averages are not finite. Earlier checkpoints stay.
        """
        start = time.perf_counter()
        self.finish_saving(is_end)  # of the one before
        self._check_weights()
        is_main = self.accelerator.is_main_process
        is_sharded = self.accelerator.distributed_type.value in ("FSDP", "DEEPSPEED")
        is_deepspeed = self.accelerator.distributed_type.value == "DEEPSPEED"
        optimizer = None if is_deepspeed else self.optimizer  # its shards are in no form that could be taken up
        tensors = gather_training_state(self.joint_model, optimizer, self.emas, keep=is_main)
        scaler = self.accelerator.scaler
        self._check_nonfinite_steps()
        first = next(iter(self.emas))
        state = {
            "step": self.step,
            "num_nonfinite_steps": self.nonfinite.known.total,
            "average": first,
            "history": self.history.state(),
            "nonfinite_in_a_row": self.nonfinite.known.in_a_row,
            "gradient_scaler": None if scaler is None else scaler.state_dict(),
            "metrics": self.metrics.state(),
            **self.data.state(),
        }

        self.saved_step = self.step
        is_waited_for = is_end or is_sharded or not self.options.output.async_checkpoints
        with all_or_none():
            if is_main:
                if not is_waited_for:
                    tensors = self.writer.copy(tensors)
                pipeline = self.averaged_pipeline(tensors[f"ema-{first}"])
                if not self.is_lora:  # whose pipeline is none, and its file has other names
                    del tensors[f"ema-{first}"]

                def write(folder: Path) -> None:
                    save_pipeline(pipeline, folder)
                    save_training_state(folder, tensors, state)

                self.writer.start(partial(self._write_checkpoint, state["step"], write, start))
        if is_waited_for:
            self.finish_saving(is_end)

    def _write_checkpoint(self, step: int, write: Callable[[Path], None], start: float) -> Path:
        output = self.options.output
        for name in (METRICS_FILE, EVALUATIONS):  # lines up to this step, which no resumed run writes again
            if (path := output.output_dir / name).exists():
                flush(path)
        checkpoint = save_checkpoint(output.output_dir, step, write, output.checkpoints_total_limit)
        logger.info(f"Checkpoint written: {checkpoint} ({time.perf_counter() - start:.1f} s)")
        return checkpoint

    def finish_saving(self, is_end: bool = False) -> None:
        """
        Waits until the latest checkpoint is whole; all processes must call it.

        Args:
            is_end (`bool`, defaults to `False`): Whether no step follows. If one does, the upload starts if it is due.

        Raises:
            `OSError`: it cannot be written, in the main process; the others raise [`OtherProcessError`].
        """
        with all_or_none():
            self._take_checkpoint(is_end)

    def _take_checkpoint(self, is_end: bool = False) -> None:
        """Waits for the checkpoint that is being written, if there is one, and starts its upload if it is due."""
        checkpoint = self.writer.take()
        if checkpoint is not None:
            self.checkpoint = checkpoint
            if not is_end:
                self._push_checkpoint()

    # ------------------------------------------------------------------------------------------------------- steps

    def _read_ahead(self) -> None:
        """Reads the next micro-batch, if that is still to be done, and starts its copy to the device."""
        if self._ahead is not None:
            return
        wait_start = time.perf_counter()
        try:
            self._ahead = self.data.to_device(next(self.batches))
        except Exception as error:  # of a step that may come after a checkpoint
            self._ahead = error
        self.metrics.data_seconds += time.perf_counter() - wait_start

    def _next_batch(self) -> dict[str, torch.Tensor | int]:
        """Arguments of the model's next pass, on its device."""
        self._read_ahead()
        batch, self._ahead = self._ahead, None
        if isinstance(batch, Exception):
            raise batch
        return self.data.to_inputs(batch)

    def _forward(self, batch: dict[str, torch.Tensor | int]) -> torch.Tensor:
        """Computes the objective of a micro-batch, and adds its losses to the metrics."""
        with self.accelerator.autocast():  # accelerate adds it to all models but those of FSDP2
            output = self.model(**batch)
        losses = output[0] if "features" in batch else output  # (B,)
        loss = losses.mean()
        if "features" in batch:
            _, alignment, prior_alignment = output
            loss = loss + self.options.alignment.repa_weight * alignment.mean()
            # Over the whole batch, so that micro-batches with few priors weigh no more than others.
            loss = loss + self.options.alignment.repa_prior_weight * prior_alignment.sum() / len(losses)
            self.metrics.add_alignment(alignment.detach(), prior_alignment.detach())
        self.metrics.add_losses(losses.detach(), batch["sigmas"], batch["num_priors"])
        return loss

    def train_step(self) -> None:
        """Makes one optimizer step; it changes no weight if its gradients are not finite."""
        options, accelerator = self.options, self.accelerator
        for _ in range(options.optimizer.gradient_accumulation_steps):
            batch = self._next_batch()
            with accelerator.accumulate(self.model):
                accelerator.backward(self._forward(batch))
                if accelerator.sync_gradients:
                    suspects = self._find_nonfinite_gradients()  # before clipping, which spreads them
                    grad_norm = self._clip_gradients()
                    is_finite = torch.isfinite(grad_norm)  # the same on all processes, which share gradients
                    step_optimizer(self.optimizer, is_finite)
                self.optimizer.zero_grad(set_to_none=True)
        self.learning_rate = float(self.optimizer.param_groups[0]["lr"])  # of this step
        self.lr_scheduler.step()
        self.step += 1
        self.history.add_step(self.images_per_step)
        self._step_averages(is_finite)
        self.nonfinite.add(self.step, is_finite)
        if self._has_line(self.step):
            self._check_nonfinite_steps(suspects)
        self.metrics.end_step(grad_norm, is_finite)

    def _step_averages(self, is_finite: torch.Tensor) -> None:
        # The weights of a step that is left out are those before it, but DeepSpeed's may not be.
        if self.accelerator.distributed_type.value != "DEEPSPEED" or bool(is_finite):
            parameters = list(averaged_parameters(self.joint_model).values())
            for average in self.emas.values():
                average.step(parameters)

    def _has_line(self, step: int) -> bool:
        """Whether a line of metrics is written after a step, for which all wait for their devices."""
        return step % self.options.output.logging_steps == 0 or step == self.options.optimizer.max_train_steps

    def _clip_gradients(self) -> torch.Tensor:
        """Clips the gradients to `--max_grad_norm`, and returns their norm before clipping."""
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.options.optimizer.max_grad_norm)
        if not isinstance(norm, torch.Tensor):  # DeepSpeed clips on its own, and does not know the norm at first
            return torch.tensor(norm or 0.0, device=self.accelerator.device)
        return full_tensor(norm)

    def _find_nonfinite_gradients(self) -> list[str]:
        """Finds the weights whose gradients are not finite, by name, if they may end the run in this step."""
        is_checked = self._has_line(self.step + 1)
        if not is_checked or self.nonfinite.read_in_a_row() < self.options.optimizer.max_nonfinite_steps:
            return []
        gradients = {name: p.grad for name, p in self.joint_model.named_parameters() if p.grad is not None}
        return find_nonfinite(gradients, self.accelerator)

    def _check_nonfinite_steps(self, suspects: Sequence[str] = ()) -> None:
        """Says how many steps have been left out, and ends the run with a report if too many followed each other."""
        before, counts = self.nonfinite.known, self.nonfinite.read()
        if counts.total > before.total:
            number = counts.total - before.total
            logger.warning(f"Left out, as gradients are not finite: {number} step(s) up to step {counts.latest}.")
        if counts.longest <= self.options.optimizer.max_nonfinite_steps:
            return
        report = {
            "step": counts.latest,
            "stream_positions": [(counts.latest - 1) * self.images_per_step, counts.latest * self.images_per_step],
            **{
                f"{name}_sum_and_count": [str(value) for value in self.metrics.step_sum(name)]
                for name in ("loss_with_prior", "loss_without_prior")
            },
            "nonfinite_weights": find_nonfinite(dict(self.joint_model.named_parameters()), self.accelerator),
            "nonfinite_gradients": list(suspects),
        }
        path = self.options.output.output_dir / f"nonfinite-step-{counts.latest}.json"
        if self.accelerator.is_main_process:
            write_json(path, report)
        raise FloatingPointError(
            f"The gradients of {counts.longest} steps in a row are not finite, up to step {counts.latest}: more than "
            f"`max_nonfinite_steps` = {self.options.optimizer.max_nonfinite_steps}. See {path}."
        )

    def validate(self) -> None:
        """
        Draws a grid of samples and, if asked to, computes Fréchet distances; all processes share the work.

        Training goes on without them if samples are not finite.
        """
        try:
            self._validate()
        except FloatingPointError as error:
            logger.warning(f"Step {self.step} has no samples. {error}")
        except InterruptedError:
            logger.info(f"The samples of step {self.step} are left to the resumed run.")

    def _validate(self) -> None:
        options, accelerator = self.options, self.accelerator
        pipeline = self.averaged_pipeline()
        use_fast_attention(pipeline, accelerator.device)
        call = {"guidance_scale": options.validation.validation_guidance_scale, "is_stopped": self.stop.is_noted}
        if self.fid is not None:
            distances = stage_distances(
                pipeline,
                *self.fid,
                options.validation.fid_num_samples,
                options.validation.validation_seed,
                accelerator,
                **call,
            )
            line = {"step": self.step, "num_samples": options.validation.fid_num_samples, **distances}
            if accelerator.is_main_process:
                drop_metrics_after(options.output.output_dir / EVALUATIONS, self.step - 1)
            append_line(options.output.output_dir / EVALUATIONS, line, accelerator)
        title = f"{options.model.preset}, step {self.step:,}, seed {options.validation.validation_seed}"
        grid = stage_grid(pipeline, options.validation.validation_seed, accelerator, title=title, **call)
        if accelerator.is_main_process:  # at last, so that what has a grid has all of it
            with replacing(self._grid_path) as unfinished:
                grid.save(unfinished)

    @property
    def _grid_path(self) -> Path:
        return self.options.output.output_dir / "samples" / f"step-{self.step:07d}.png"

    @property
    def _is_to_be_validated(self) -> bool:
        return self.step > 0 and (
            self.step % self.options.validation.validation_steps == 0
            or self.step == self.options.optimizer.max_train_steps
        )

    def train(self) -> bool:
        """
        Trains to the last step, with checkpoints and samples on the way.

        Returns:
            `bool`: Whether the run reached its end. If not, a signal has stopped it, with a checkpoint.
        """
        options, accelerator = self.options, self.accelerator
        if accelerator.is_main_process:
            for name in (METRICS_FILE, EVALUATIONS):
                drop_metrics_after(options.output.output_dir / name, self.step)
            set_aside_later(options.output.output_dir, self.step)
        if options.output.report_to:
            accelerator.init_trackers("diffusers_dod", config=describe(self._resolved_options()))
        parameters = sum(parameter.numel() for parameter in self.joint_model.parameters())
        logger.info(
            f"{options.model.preset}: {parameters:,} parameters, {self.data.describe()}, {accelerator.num_processes} "
            f"process(es) on {accelerator.device}, {self.images_per_step} images per step."
        )
        progress = tqdm(
            total=options.optimizer.max_train_steps,
            initial=self.step,
            desc="Training",
            disable=None if accelerator.is_main_process else True,
        )
        with progress, self.stop as stop:
            if self._is_to_be_validated and not any(gather_object([self._grid_path.exists()])):
                self.validate()  # the run was ended between its checkpoint and its samples
            is_stopped = stop.is_received()
            while self.step < options.optimizer.max_train_steps and not is_stopped:
                self.train_step()
                progress.update()
                is_last = self.step == options.optimizer.max_train_steps
                is_stopped = stop.is_received(at_once=False)
                if not is_last and not is_stopped:  # before anything waits for the device
                    self._read_ahead()
                if self._has_line(self.step):
                    line = self.metrics.write(self.step, self.learning_rate)
                    loss = math.nan if line["loss"] is None else line["loss"]
                    progress.set_postfix(loss=f"{loss:.4f}", images_per_s=line["images_per_second"])
                pause = time.perf_counter()
                if self.writer.is_whole:
                    self._take_checkpoint(is_last or is_stopped)
                if self.step % options.output.checkpointing_steps == 0 or is_last or is_stopped:
                    self.save(is_last or is_stopped)
                if self._is_to_be_validated and not is_stopped:
                    self.validate()
                    is_stopped = stop.is_received()
                    if is_stopped and self.saved_step < self.step:
                        self.save(is_end=True)
                self.metrics.pause(time.perf_counter() - pause)
            self.finish_saving(is_end=True)
            if is_stopped:
                logger.warning(f"Stopped by {stop.name or 'a signal'} after step {self.step}, with a checkpoint.")
        return not is_stopped

    def _push_checkpoint(self) -> None:
        """Starts the upload of the latest checkpoint, with the card of its step, if it is due."""
        every, step = self.options.hub.push_every, checkpoint_step(self.checkpoint)
        number = step // self.options.output.checkpointing_steps
        if self.pusher is not None and every is not None and number % every == 0:
            try:
                self._push(f"Step {step}", step, TrainingHistory(read_state(self.checkpoint)))
            except (OSError, ValueError) as error:  # in the main process only, so the others would wait for it
                logger.warning(f"{self.checkpoint.name} is not pushed: {error}")

    def _resolved_options(self) -> TrainingOptions:
        """The run's options with the settings of latents on disk."""
        return replace_values(self.options, resolution=self.data.resolution, random_flip=self.data.random_flip)

    def _write_card(self, step: int, history: TrainingHistory) -> None:
        write_model_card(self._resolved_options(), self.data.class_names, self.images_per_step, step, history)

    def _push(self, message: str, step: int, history: TrainingHistory) -> None:
        folder = self.options.output.output_dir
        self._write_card(step, history)
        names = ("README.md", METRICS_FILE, EVALUATIONS, "samples", *CARD_FILES)
        self.pusher.push(
            self.checkpoint, [folder / name for name in names], message, self.options.hub.push_training_state
        )

    def finish(self) -> None:
        """Writes the finished pipeline with its model card and, if asked to, uploads them."""
        options = self.options
        pipeline = self.averaged_pipeline()
        with all_or_none():
            if self.accelerator.is_main_process:
                index = ADAPTER if self.is_lora else DoDPipeline.config_name
                with replacing_contents(options.output.output_dir, index) as unfinished:
                    save_pipeline(pipeline, unfinished)
                self._write_card(self.step, self.history)
                logger.info(describe_end(options, self.data.resolution, self.data.class_names))
                if self.pusher is not None:
                    self._push("End of training", self.step, self.history)


def main(argv: list[str] | None = None, launcher: int | None = None) -> None:
    """
    Runs the command. Its exit code is 143 if a signal has stopped it; then it has written a checkpoint.

    Args:
        argv (`list[str]`, *optional*): Arguments of the command. By default those of the process.
        launcher (`int`, *optional*): Id of the process that has started this one, see [`end_with_launcher`].

    Raises:
        `ValueError`: the arguments do not fit the processes, the data, the models or the content of the folders.
        `FloatingPointError`: the gradients of too many steps in a row are not finite, or weights are not.
    """
    options = parse_options(TrainingOptions, argv, __doc__)
    # So that the run does not depend on the working folder, which may change meanwhile.
    paths = {"output_dir": options.output.output_dir, "latents_dir": options.data.latents_dir}
    options = replace_values(options, **{name: path and path.absolute() for name, path in paths.items()})
    if options.dry_run:
        if int(os.environ.get("RANK", 0)) == 0:
            print(describe_run(options))
        return
    end_with_launcher(launcher)
    accelerator = build_accelerator(options)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("diffusers_dod").setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    torch.backends.cudnn.allow_tf32 = options.precision.allow_tf32  # of convolutions; PyTorch allows it by default
    if options.precision.allow_tf32:
        torch.set_float32_matmul_precision("high")
    is_finished = False
    with ExitStack() as stack:
        with all_or_none():
            if accelerator.is_main_process:
                stack.enter_context(in_use(options.output.output_dir))
        trainer = Trainer(options, accelerator)
        try:
            if trainer.train():
                trainer.finish()
                is_finished = True
        except Exception:  # not a second SIGINT, which ends the process at once
            trainer.writer.finish()
            raise
        finally:
            if trainer.pusher is not None:  # a run that fails or is stopped gives up a running upload
                trainer.pusher.finish(PUSH_TIMEOUT_S if is_finished else 0.0)
    end_processes(accelerator)
    if not is_finished:
        sys.exit(STOPPED_EXIT_CODE)


if __name__ == "__main__":
    run_main(main)
