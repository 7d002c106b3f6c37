# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""The DoD pipeline: sampling stage by stage, each guided by the visual prior of the one before (paper, Eq. 4)."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.guiders import BaseGuidance
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.utils import replace_example_docstring

from .autoencoders import (
    Autoencoder,
    spatial_factor,
)
from .checks import (
    MAX_IMAGES,
    MAX_STEPS,
    check_at_least,
    check_choice,
    check_label_ids,
    check_number,
    check_type,
    to_plain,
)
from .devices import send
from .guidance import Guidance, GuidedVelocity, check_guidance, warn_of_idle_arguments
from .latent_embedding import VisualPriorMixin
from .lora import DoDLoraLoaderMixin
from .pipeline_encoding import OUTPUT_TYPES, DoDPipelineEncodingMixin
from .pipeline_inputs import (
    GivenPrior,
    check_components,
    check_id2label,
    check_noise_source,
    check_noises,
    check_prior,
    check_replacement,
    check_token_settings,
    find_image_size,
    invert_id2label,
    to_label_ids,
)
from .pipeline_loading import DoDPipelineLoadingMixin
from .pipeline_output import DoDPipelineOutput, DoDStageStatistics
from .rectified_flow import NUM_TRAIN_TIMESTEPS, interpolate
from .scheduling_dod import DoDFlowMatchScheduler
from .seeding import PRIOR_NOISE, NoiseSource
from .stages import Stage, check_samples, find_sound, is_a, one_at_a_time, plan_stages
from .token_prior import TokenPrior
from .transformer_dod import DoDTransformer2DModel


MAX_STAGES = 1000

EXAMPLE_DOC_STRING = """
        Examples:
            ```py
            >>> from diffusers_dod import DoDPipeline

            >>> pipe = DoDPipeline.from_pretrained("checkpoints/dod-desk")
            >>> output = pipe(class_labels=["marble", "bricks"], num_stages=2, return_stages=True)
            >>> output.stages[0][1]  # the bricks of stage 1
            >>> output.images[1]  # the bricks of stage 2
            ```
"""


class DoDPipeline(DoDPipelineLoadingMixin, DoDPipelineEncodingMixin, DiffusionPipeline, DoDLoraLoaderMixin):
    r"""
    Class-conditional image generation with Diffusion on Diffusion.

    Stage 1 samples from noise, given the class. Every later stage samples again from fresh noise, given the class and
    the visual prior that the latent embedder extracts from the sample of the stage before (paper, Eq. 4). All stages
    share one transformer.

    Calls from several threads take turns, also those of pipelines that share a component: one runs, others wait.

    Args:
        transformer ([`DoDTransformer2DModel`]): Predicts the velocity.
        scheduler ([`DoDFlowMatchScheduler`]):
            Integrates the velocity. Diffusers' own flow-match schedulers can take its place.
        vae (`AutoencoderKL` or another autoencoder of images in Diffusers, *optional*):
            Decodes latents to images; `None` for a pixel-space model.
        latent_embedder ([`LatentEmbeddingModule`] or any other [`VisualPriorMixin`], *optional*):
            Extracts visual priors. Without it there is one stage, guided by `guidance_scale`.
        token_prior ([`TokenPrior`], *optional*):
            Draws latent tokens in place of stage 1, in calls with `use_token_prior=True`.
        id2label (`dict[int, str]`, *optional*): Class names by id. Commas separate several names of one class.
        default_guidance_scale (`float`, defaults to 5.5): Default scale from stage 2 on.
        default_num_inference_steps (`int`, defaults to 30): Default number of intervals of each stage.
        default_num_stages (`int`, defaults to 2): Default number of stages. Without a latent embedder there is only
            one.
        default_first_stage_guidance_scale (`float`, defaults to 1.0): Default scale of stage 1 with a latent embedder;
            1, the paper's, is no guidance.

    Raises:
        `ValueError`, `TypeError`: an argument is out of range or the components do not fit together.
    """

    model_cpu_offload_seq = "token_prior->latent_embedder->transformer->vae"
    _optional_components = ["vae", "latent_embedder", "token_prior"]
    _callback_tensor_inputs = ["latents", "prior_embeds", "class_labels"]

    def __init__(
        self,
        transformer: DoDTransformer2DModel,
        scheduler: DoDFlowMatchScheduler | SchedulerMixin,
        vae: Autoencoder | None = None,
        latent_embedder: VisualPriorMixin | None = None,
        token_prior: TokenPrior | None = None,
        id2label: dict | None = None,
        default_guidance_scale: float = 5.5,
        default_num_inference_steps: int = 30,
        default_num_stages: int = 2,
        default_first_stage_guidance_scale: float = 1.0,
    ):
        super().__init__()
        check_components(transformer, scheduler, vae, latent_embedder, token_prior)
        check_number("default_guidance_scale", default_guidance_scale, 0, 1_000_000)
        check_number("default_first_stage_guidance_scale", default_first_stage_guidance_scale, 0, 1_000_000)
        check_at_least("default_num_inference_steps", default_num_inference_steps, 1, MAX_STEPS)
        check_at_least("default_num_stages", default_num_stages, 1, MAX_STAGES)
        names = check_id2label(id2label, None if transformer is None else transformer.config.num_classes)
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae, latent_embedder=latent_embedder)
        self.register_modules(token_prior=token_prior)
        self.register_to_config(
            id2label=None if id2label is None else {str(int(key)): name for key, name in id2label.items()},
            **to_plain(
                {
                    "default_guidance_scale": default_guidance_scale,
                    "default_num_inference_steps": default_num_inference_steps,
                    "default_num_stages": default_num_stages,
                    "default_first_stage_guidance_scale": default_first_stage_guidance_scale,
                }
            ),
        )
        #: Class id -> name, in the order of the ids; the config has the ids as strings, in the order of JSON.
        self.id2label: dict[int, str] = names
        #: Class name -> ids that carry it.
        self.label2ids: dict[str, list[int]] = invert_id2label(names)

        self.vae_scale_factor = spatial_factor(vae) if vae is not None else 1
        # It only writes images. They are read by `preprocess_image`.
        self.image_processor = VaeImageProcessor(
            vae_scale_factor=self.vae_scale_factor, do_resize=False, do_convert_rgb=True
        )

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the current stage. It is read at every step, so a callback may set `_guidance_scale`."""
        return self._guidance_scale

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        """`attention_kwargs` of the latest call."""
        return self._attention_kwargs

    @property
    def num_timesteps(self) -> int | None:
        """Number of steps over all stages of the latest call; `None` if the solver chooses its own steps."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """Time of the current evaluation in [0, 1000], for caches that depend on it; `None` between calls."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Whether the call is to end: set `_interrupt` in a callback to end it with the current sample."""
        return self._interrupt

    # ------------------------------------------------------------------------------------------------- inputs

    def get_label_ids(self, class_labels: int | str | Sequence[int | str | None] | torch.Tensor) -> list[int]:
        """
        Converts class labels to a list of ids.

        Args:
            class_labels (`int`, `str`, `list` or `torch.Tensor`):
                Ids in [0, num_classes - 1] or names of `id2label`; `None` in a list is the null class.

        Returns:
            `list[int]`: One id per label, also for a single label. `num_classes` is the null class.

        Raises:
            `ValueError`: an id is out of range, a name is unknown or fits several ids, or the list is empty.
            `TypeError`: a label is neither an integer nor a name nor `None`.
        """
        return to_label_ids(class_labels, self.label2ids, self.transformer.config.num_classes)

    def check_inputs(
        self,
        num_stages: int,
        has_prior: bool,
        output_type: str,
        attention_kwargs: dict[str, Any] | None,
        callback_on_step_end: Callable | None,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> None:
        """
        Checks arguments of a call that do not depend on others, before anything is computed.

        Args:
            num_stages (`int`): At least 1; 1 without a latent embedder, at least 2 with a prior.
            has_prior (`bool`): Whether an `image`, `prior_latents`, `prior_tokens` or the token prior replaces
                stage 1.
            output_type (`str`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            attention_kwargs (`dict` or `None`): A dictionary.
            callback_on_step_end (`Callable` or `None`): Anything that can be called.
            callback_on_step_end_tensor_inputs (`Sequence[str]`): Names among `_callback_tensor_inputs`.

        Raises:
            `ValueError`, `TypeError`: an argument has another value. The message names the argument, the accepted
                values and the value received.
        """
        check_at_least("num_stages", num_stages, 1, MAX_STAGES)
        if num_stages > 1 and self.latent_embedder is None:
            raise ValueError(f"`num_stages` must be 1 without a `latent_embedder`, got {num_stages}.")
        if has_prior and num_stages < 2:
            raise ValueError(
                "`num_stages` must be >= 2 with an `image`, `prior_latents`, `prior_tokens` or `use_token_prior`, "
                f"which stand for stage 1, got {num_stages}."
            )
        check_choice("output_type", output_type, OUTPUT_TYPES)
        check_type("attention_kwargs", attention_kwargs, (dict, type(None)))
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise TypeError(
                "`callback_on_step_end` must be None or callable, "
                f"got {callback_on_step_end!r} of type {type(callback_on_step_end).__name__}."
            )
        check_type("callback_on_step_end_tensor_inputs", callback_on_step_end_tensor_inputs, (list, tuple))
        for name in callback_on_step_end_tensor_inputs:
            check_choice("callback_on_step_end_tensor_inputs", name, tuple(self._callback_tensor_inputs))

    def _find_given_prior(
        self,
        image: PipelineImageInput | None,
        prior_latents: torch.Tensor | None,
        prior_tokens: torch.Tensor | None,
        num_labels: int,
        height: int | None,
        width: int | None,
    ) -> GivenPrior | None:
        """Finds the argument that takes the place of stage 1's sample, if one is given."""
        priors = {"image": image, "prior_latents": prior_latents, "prior_tokens": prior_tokens}
        given = [name for name, prior in priors.items() if prior is not None]
        if len(given) > 1:
            raise ValueError(f"Only one of {', '.join(f'`{name}`' for name in priors)} must be given, got {given}.")
        if image is not None:
            return GivenPrior("image", self._read_image(image, num_labels, height, width))
        for name in given:
            check_prior(name, priors[name], num_labels, self.latent_embedder)
            return GivenPrior(name, priors[name])
        return None

    # ------------------------------------------------------------------------------------------------ sampling

    def set_pos_interpolation(
        self, pos_interpolation: str = "none", pos_interpolation_decoupled: bool = False
    ) -> None:
        """
        Chooses how backbone and latent embedder treat positions on grids larger than the trained one.

        Args:
            pos_interpolation (`str`, defaults to `"none"`): `"none"`, `"linear"`, `"ntk"` or `"yarn"`, see
                [`PosInterpolationMixin.set_pos_interpolation`].
            pos_interpolation_decoupled (`bool`, defaults to `False`):
                Whether rows and columns are scaled separately.

        Raises:
            `ValueError`, `TypeError`: an argument has another value or type.
        """
        for model in (self.transformer, self.latent_embedder):
            if hasattr(model, "set_pos_interpolation"):  # not every model has positions
                model.set_pos_interpolation(pos_interpolation, pos_interpolation_decoupled)

    @one_at_a_time
    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str | None] | torch.Tensor | None = None,
        num_stages: int | None = None,
        num_inference_steps: int | Sequence[int | None] | None = None,
        guidance_scale: float | Sequence[float | None] | None = None,
        guidance: Guidance | BaseGuidance | None = None,
        schedulers: str | SchedulerMixin | Sequence[str | SchedulerMixin | None] | None = None,
        sigmas: Sequence[float] | None = None,
        num_images_per_label: int = 1,
        image: PipelineImageInput | None = None,
        prior_latents: torch.Tensor | None = None,
        prior_tokens: torch.Tensor | None = None,
        use_token_prior: bool = False,
        token_prior_num_inference_steps: int | None = None,
        token_prior_guidance_scale: float | None = None,
        token_prior_truncation: float | None = None,
        num_images_per_prior: int = 1,
        prior_noise: float = 0.0,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seed: int | None = None,
        sample_indices: Sequence[int] | None = None,
        latents: torch.Tensor | list[torch.Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        return_stages: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[["DoDPipeline", int, torch.Tensor, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> DoDPipelineOutput | tuple:
        r"""
        Generates images of class labels.

        Each label in turn gives `num_images_per_label` images, and from stage 2 on each of these gives
        `num_images_per_prior`. B is the number of all images.

        Args:
            class_labels (`int`, `str`, `list` or `torch.Tensor`, *optional*):
                Class ids in [0, num_classes - 1] or names of `id2label`. `None`, also in a list, is the null class: an
                image of no particular class. The transformer knows it if it was trained with label dropout.
            num_stages (`int`, *optional*): Number of stages, >= 1. By default the checkpoint's.
            num_inference_steps (`int` or `Sequence[int | None]`, *optional*):
                Number of intervals, >= 1: one value for all stages, or one for each stage that is run. `None` is the
                checkpoint's default. Solvers of higher order evaluate the model several times per interval. Adaptive
                solvers choose their own steps and ignore it.
            guidance_scale (`float` or `Sequence[float | None]`, *optional*):
                Guidance scale, >= 0; 1 is no guidance. A single value applies from stage 2 on; a list has one value
                for each stage that is run. `None` is the checkpoint's default, which for stage 1 is 1 (paper) unless
                the checkpoint says otherwise. Without a latent embedder a single value guides the only stage.
            guidance ([`Guidance`] or one of Diffusers' guiders, *optional*):
                Settings of guidance. By default `Guidance()`: the null condition lacks class and prior. A guider has
                its own `guidance_scale`, which then is the default, also of stage 1 if the checkpoint guides that; a
                scale of 1 turns it off in a stage.
            schedulers (`str`, `SchedulerMixin` or `Sequence[str | SchedulerMixin | None]`, *optional*):
                The `solver` of a [`DoDFlowMatchScheduler`] or another flow-match scheduler: one value for all stages,
                or one for each stage that is run. `None` is the pipeline's scheduler.
            sigmas (`Sequence[float]`, *optional*):
                Strictly decreasing starts of the intervals in (0, 1], before the scheduler's shift, in place of
                `num_inference_steps`: one list, the same for all stages.
            num_images_per_label (`int`, defaults to 1): Number of images of each label, >= 1.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, `str` or a list of them, *optional*):
                One image, or one per label, in place of stage 1's sample: PIL images of any mode, paths, URLs, arrays
                (H, W) or (H, W, C) and tensors (C, H, W) in uint8 or in [0, 1]. It is read as the trainer reads
                images, and scaled and cropped to `height` x `width`. Stage 1 is not run, but `num_stages` counts it.
            prior_latents (`torch.Tensor` of shape `(1, C, h, w)` or `(number of labels, C, h, w)`, *optional*):
                Normalised latents in place of an image, such as `stage_latents` of an earlier call.
            prior_tokens (`torch.Tensor` of shape `(1, N, d_e)` or `(number of labels, N, d_e)`, *optional*):
                Latent tokens in place of an image, `num_latent_tokens` of `latent_token_dim`, see `get_prior_tokens`.
            use_token_prior (`bool`, defaults to `False`):
                Whether the `token_prior` draws latent tokens in place of stage 1, which then is not run.
            token_prior_num_inference_steps (`int`, *optional*): Number of its steps, >= 1. By default 50.
            token_prior_guidance_scale (`float`, *optional*): Scale of its class guidance, >= 0. By default 1, none.
            token_prior_truncation (`float`, *optional*):
                Share in [0, 1] of the distance between tokens and the mean of their class that is kept. By default 1.
            num_images_per_prior (`int`, defaults to 1):
                Number of stage-2 images for each sample of stage 1, or for each given image, >= 1. Later stages
                continue with all of them.
            prior_noise (`float`, defaults to 0.0):
                Level in [0, 1] of the noise that the latents of the previous stage, or given ones, are mixed with
                before the latent embedder sees them. It is for models that were trained with `prior_noise`.
            height (`int`, *optional*):
                Height in pixels. By default the height of `prior_latents`, else the trained height.
            width (`int`, *optional*): Width in pixels, with the same default.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of the noise. With one generator an image depends on its place in the batch, as in Diffusers.
                With one for each image of stage 1, an image depends on its own generator alone.
            seed (`int`, *optional*):
                Source of the noise in place of a generator, >= 0. An image depends on the seed and its index alone,
                not on the batch, its place in it, or the process.
            sample_indices (`Sequence[int]`, *optional*):
                Index of each image of stage 1, >= 0. By default 0, 1, 2, ...
            latents (`torch.Tensor` of shape `(B, C, h, w)` or a list of them, *optional*):
                Standard normal noise of the first stage that is run, or of each stage.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`, defaults to `True`): Whether to return a [`DoDPipelineOutput`].
            return_stages (`bool`, defaults to `False`): Whether to return also images and latents of every stage.
            attention_kwargs (`dict`, *optional*):
                `{"scale": ...}` scales LoRA adapters. Everything else goes to the attention processors.
            callback_on_step_end (`Callable`, *optional*):
                `callback(pipe, step_index, timestep, callback_kwargs)` is called after each step, with one index over
                all stages. It may return a dict with new values of the tensors in `callback_kwargs`. With an adaptive
                solver the latents cannot be replaced, and the time is that of the slowest sample. Between the
                evaluations of an interval the latents are a prediction; the last evaluation replaces it.
            callback_on_step_end_tensor_inputs (`Sequence[str]`, defaults to `("latents",)`):
                The tensors in `callback_kwargs`: `"latents"`, `"prior_embeds"`, `"class_labels"`. A `PipelineCallback`
                has its own.

        Returns:
            [`DoDPipelineOutput`], or the tuple `(images,)`, `(images, stages)` with `return_stages=True`.

        Raises:
            `ValueError`, `TypeError`: an argument is out of range or of the wrong type or shape.
            `FloatingPointError`: samples or decoded images are not finite, or absurdly large.

        Examples:
        """
        # 1. Inputs
        if self.transformer is None:
            raise ValueError("`transformer` must be loaded to generate images, got None.")
        label_ids = self.get_label_ids(class_labels)
        check_at_least("num_images_per_label", num_images_per_label, 1, MAX_IMAGES)
        check_at_least("num_images_per_prior", num_images_per_prior, 1, MAX_IMAGES)
        num_labels = len(label_ids)
        label_ids = [label for label in label_ids for _ in range(num_images_per_label)]
        batch_size = len(label_ids)
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if num_stages is None:
            num_stages = self.config.default_num_stages if self.latent_embedder is not None else 1
        prior = self._find_given_prior(image, prior_latents, prior_tokens, num_labels, height=height, width=width)
        self.check_inputs(
            num_stages=num_stages,
            has_prior=prior is not None or use_token_prior,
            output_type=output_type,
            attention_kwargs=attention_kwargs,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        check_number("prior_noise", prior_noise, 0, 1)
        if prior_noise > 0 and (prior_tokens is not None or use_token_prior):
            raise ValueError(f"`prior_noise` must be 0 with `prior_tokens` or `use_token_prior`, got {prior_noise}.")
        if prior_noise > 0 and num_stages == 1:
            raise ValueError(f"`prior_noise` must be 0 with one stage, got {prior_noise}.")
        token_settings = check_token_settings(
            use_token_prior,
            self.token_prior,
            self.latent_embedder,
            prior,
            num_inference_steps=token_prior_num_inference_steps,
            guidance_scale=token_prior_guidance_scale,
            truncation=token_prior_truncation,
        )
        if num_images_per_prior > 1 and num_stages == 1:
            raise ValueError(f"`num_images_per_prior` must be 1 with one stage, got {num_images_per_prior}.")
        sample_indices = check_noise_source(generator, seed, sample_indices, batch_size)
        guidance = Guidance() if guidance is None else guidance
        # A guider has a scale of its own, for every stage that is guided.
        default_scale = getattr(guidance, "guidance_scale", self.config.default_guidance_scale)
        first_scale = self.config.default_first_stage_guidance_scale
        first_scale = 1.0 if first_scale == 1 else getattr(guidance, "guidance_scale", first_scale)
        stages = plan_stages(
            range(1 if prior is None and not use_token_prior else 2, num_stages + 1),
            self.scheduler,
            self.config.default_num_inference_steps,
            default_scale,
            has_priors=self.latent_embedder is not None,
            default_first_stage_guidance_scale=first_scale,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            schedulers=schedulers,
            sigmas=sigmas,
        )
        check_guidance(guidance, self.transformer, num_stages, stages)
        warn_of_idle_arguments(
            stages, num_inference_steps, guidance_scale, guidance, has_priors=self.latent_embedder is not None
        )
        size = find_image_size(height, width, self.transformer, self.vae, prior)
        sides = (side // self.vae_scale_factor for side in size)
        shape = (self.transformer.config.in_channels, *sides)
        images_per_prior = {stage.number: 1 if stage.number == 1 else num_images_per_prior for stage in stages}
        noises = check_noises(latents, [(batch_size * number, *shape) for number in images_per_prior.values()])
        device = self._execution_device
        numbers_of_steps = [stage.lay_out(device) for stage in stages]

        # 2. What all stages share
        state: dict[str, torch.Tensor | None] = {
            "latents": None,
            "prior_embeds": None,
            "class_labels": torch.tensor(label_ids, device=device),
        }
        if prior is not None and prior.name == "image":
            state["latents"] = self.encode_image(prior.value.to(device))
            self.maybe_free_model_hooks()  # the autoencoder is not needed again before the end
        elif prior is not None and prior.name == "prior_latents":
            state["latents"] = prior.value
        elif use_token_prior:
            source = NoiseSource(0, batch_size, 1, generator=generator, seed=seed, sample_indices=sample_indices)
            prior_tokens = self._draw_prior_tokens(state["class_labels"], source, token_settings)
        self._num_timesteps = None if None in numbers_of_steps else sum(numbers_of_steps)
        self._attention_kwargs = attention_kwargs
        self._current_timestep = None
        self._step_index = 0  # over all stages
        self._interrupt = False
        results, statistics = [], []  # of each stage

        # 3. Stage by stage (paper, Eq. 4)
        for stage, noise in zip(stages, noises, strict=True):
            source = NoiseSource(
                stage=stage.number,
                batch_size=batch_size,
                images_per_prior=images_per_prior[stage.number],
                generator=generator,
                seed=seed,
                sample_indices=sample_indices,
            )
            if stage.number > 1:
                is_given = stage is stages[0] and prior is not None
                given_tokens = prior_tokens if stage is stages[0] else None
                copies = num_images_per_prior if stage.number == 2 else 1

                def spread(values: torch.Tensor, is_given: bool = is_given, copies: int = copies) -> torch.Tensor:
                    """Repeats what is given for each label, or for all, for each image of the stage."""
                    if is_given:
                        values = values.repeat_interleave(batch_size if len(values) == 1 else num_images_per_label, 0)
                    return values.repeat_interleave(copies, 0)

                if prior_noise > 0:  # of each image its own
                    noisy = spread(state["latents"]).to(device, torch.float32)
                    noisy = interpolate(noisy, source.draw(PRIOR_NOISE, noisy.shape[1:], device), prior_noise)
                    prior_embeds = self._prior_embeds(noisy, None, shape[1:], attention_kwargs)
                else:
                    prior_embeds = spread(
                        self._prior_embeds(state["latents"], given_tokens, shape[1:], attention_kwargs)
                    )
                state["class_labels"] = state["class_labels"].repeat_interleave(copies)
                state["prior_embeds"] = prior_embeds
            self._guidance_scale = stage.guidance_scale
            num_steps = stage.lay_out(device)
            noise = source.draw(0, shape, device) if noise is None else noise
            state["latents"] = noise.to(device=device, dtype=torch.float32) * getattr(
                stage.scheduler, "init_noise_sigma", 1.0
            )
            with self.progress_bar(total=num_steps or NUM_TRAIN_TIMESTEPS) as progress_bar:
                progress_bar.set_description(f"Stage {stage.number}/{num_stages}")
                statistics.append(
                    self._sample_stage(
                        stage,
                        guidance,
                        state,
                        source,
                        progress_bar=progress_bar,
                        callback_on_step_end=callback_on_step_end,
                        callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
                    )
                )
            results.append(state["latents"])
            if self.interrupt:
                break

        # 4. Images, all at the end: models that are offloaded in turn change places once
        self._current_timestep = None
        wanted = list(zip(stages, results, strict=False))[None if return_stages else -1 :]
        decoded = [
            self._decode(latents, output_type, f"Decoded images of stage {stage.number}", sample_indices)
            for stage, latents in wanted
        ]
        images = decoded[-1]
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images, decoded) if return_stages else (images,)
        return DoDPipelineOutput(
            images=images,
            stages=decoded if return_stages else None,
            stage_latents=results if return_stages else None,
            statistics=statistics,
        )

    def _sample_stage(
        self,
        stage: Stage,
        guidance: Guidance | BaseGuidance,
        state: dict[str, torch.Tensor | None],
        source: NoiseSource,
        progress_bar,
        callback_on_step_end: Callable | None,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> DoDStageStatistics:
        """Integrates `state["latents"]` from noise to data, in place of the entry, with callbacks in between."""
        scheduler = stage.scheduler
        if stage.number == 1 and is_a(guidance, "Guidance"):  # there is no prior to be guided by
            guidance = replace(guidance, null_condition="class_and_prior", prior_scale=None)
        batch_size = state["latents"].shape[0]
        are_sound: list[torch.Tensor] = []  # after each step, on the device
        guided_velocity = GuidedVelocity(
            self.transformer, batch_size, guidance, self.attention_kwargs, cache_name=f"stage_{stage.number}"
        )

        def velocity(latents: torch.Tensor, time: torch.Tensor, indices: torch.Tensor | None = None) -> torch.Tensor:
            self._current_timestep = time.max()  # that of the slowest sample, where each has its own
            labels, priors = state["class_labels"], state["prior_embeds"]
            if indices is not None and len(indices) < batch_size:
                rows = send(indices, latents.device)
                labels, priors = labels[rows], None if priors is None else priors[rows]
            return guided_velocity(latents, time, labels, priors, self.guidance_scale, indices=indices)

        def end_step(timestep: torch.Tensor) -> None:
            if callback_on_step_end is not None:
                inputs = {name: state[name] for name in callback_on_step_end_tensor_inputs}
                outputs = callback_on_step_end(self, self._step_index, timestep, inputs)
                check_type("callback_on_step_end", {} if outputs is None else outputs, dict)
                for name, tensor in (outputs or {}).items():
                    check_choice("callback_on_step_end", name, tuple(self._callback_tensor_inputs))
                    check_replacement(name, tensor, state[name])
                    if name == "class_labels" and tensor is not state[name]:
                        check_label_ids(name, tensor, self.transformer.config.num_classes)
                    state[name] = tensor
            are_sound.append(find_sound(state["latents"]))
            self._step_index += 1

        statistics = DoDStageStatistics(guided_velocity.num_evaluations, guided_velocity.num_guided_evaluations)
        if stage.is_adaptive:
            # The model's timestep is 1000 * sigma, whatever a scheduler calls its own.
            num_train_timesteps = scheduler.config.num_train_timesteps
            has_sound_velocities = torch.ones(batch_size, dtype=torch.bool, device=state["latents"].device)

            def model_time(timestep: torch.Tensor) -> torch.Tensor:
                return timestep / num_train_timesteps * NUM_TRAIN_TIMESTEPS

            def end_accepted_step(index: int, timestep: torch.Tensor, latents: torch.Tensor) -> bool:
                state["latents"] = latents
                end_step(timestep.max())  # that of the slowest sample
                are_sound[-1] &= has_sound_velocities
                if state["latents"] is not latents:
                    raise ValueError(
                        "`callback_on_step_end` must not replace `latents` under an adaptive solver, whose error "
                        f"control would not notice; got new ones in step {self._step_index - 1}."
                    )
                progress_bar.update(round(NUM_TRAIN_TIMESTEPS - float(model_time(timestep.max()))) - progress_bar.n)
                return not self.interrupt

            def sound_velocity(latents: torch.Tensor, timestep: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
                predicted = velocity(latents, model_time(timestep), indices)
                rows = send(indices, latents.device)
                has_sound_velocities[rows] = has_sound_velocities[rows] & find_sound(predicted)
                return predicted

            try:
                output = scheduler.solve(
                    sound_velocity, state["latents"], callback=end_accepted_step, times_on_cpu=True
                )
            except ValueError:  # which names no samples
                are_sound.append(has_sound_velocities)
                check_samples(f"Velocities of stage {stage.number}", torch.stack(are_sound), source.sample_indices)
                raise
            are_sound.append(has_sound_velocities)
            check_samples(f"Velocities of stage {stage.number}", torch.stack(are_sound), source.sample_indices)
            state["latents"] = output.prev_sample
            check_samples(f"Samples of stage {stage.number}", find_sound(state["latents"]), source.sample_indices)
            statistics["num_accepted_steps"] = output.num_accepted
            statistics["num_rejected_steps"] = output.num_rejected
            progress_bar.update(NUM_TRAIN_TIMESTEPS - progress_bar.n)
            return statistics

        accepts_generator = "generator" in inspect.signature(scheduler.step).parameters
        times = stage.sigmas * NUM_TRAIN_TIMESTEPS
        for index, (timestep, time) in enumerate(zip(scheduler.timesteps, times, strict=True)):
            guided_velocity.start_step(index, len(times), timestep)
            model_output = velocity(state["latents"], time)
            step_arguments = {}
            if stage.is_ours and scheduler.is_stochastic:
                noise = source.draw(index + 1, state["latents"].shape[1:], state["latents"].device)
                step_arguments = {"variance_noise": noise}
            elif accepts_generator and not stage.is_ours:  # those of Diffusers may be stochastic
                step_arguments = {"generator": source.generators(index + 1)}
            state["latents"] = scheduler.step(
                model_output, timestep, state["latents"], **step_arguments, return_dict=False
            )[0]
            end_step(timestep)
            progress_bar.update()
            if self.interrupt:
                break
        check_samples(f"Samples of stage {stage.number}", torch.stack(are_sound), source.sample_indices)
        return statistics


# `DiffusionPipeline.from_pretrained` takes the parameters without a default for components, and would load the saved
# ones in place of those it is given.
_signature = inspect.signature(DoDPipeline.__init__)
DoDPipeline.__init__.__signature__ = _signature.replace(
    parameters=[
        parameter.replace(default=inspect.Parameter.empty) if name in DoDPipeline._optional_components else parameter
        for name, parameter in _signature.parameters.items()
    ]
)
