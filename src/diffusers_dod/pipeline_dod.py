# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""The DoD pipeline: sampling stage by stage, each guided by the visual prior of the one before (paper, Eq. 4)."""

import difflib
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.configuration_utils import ConfigMixin
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.utils import BaseOutput, logging, replace_example_docstring
from diffusers.utils.torch_utils import is_compiled_module, randn_tensor
from huggingface_hub.errors import HFValidationError

from .autoencoders import (
    AUTOENCODERS,
    Autoencoder,
    check_image_size,
    decode_pixels,
    encode_moments,
    latent_channels,
    spatial_factor,
)
from .checks import check_at_least, check_choice, check_number, check_type
from .guidance import Guidance, GuidedVelocity
from .latent_embedding import LatentEmbeddingModule
from .lora import DoDLoraLoaderMixin
from .modeling_utils import without_local_paths
from .rectified_flow import NUM_TRAIN_TIMESTEPS
from .scheduling_dod import DoDFlowMatchScheduler, check_starts
from .seeding import stateless_generator, stateless_noise
from .transformer_dod import DoDTransformer2DModel


logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

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


@dataclass
class DoDStageStatistics(BaseOutput):
    """
    What a stage cost, by sample.

    Args:
        num_evaluations (`torch.Tensor` of shape `(B,)`): Evaluations of the conditional velocity, int64.
        num_guided_evaluations (`torch.Tensor` of shape `(B,)`):
            How many of them were guided. The difference is what guidance intervals and thresholds saved.
        num_accepted_steps (`torch.Tensor` of shape `(B,)`, *optional*): Steps that an adaptive solver accepted.
        num_rejected_steps (`torch.Tensor` of shape `(B,)`, *optional*): Steps that an adaptive solver took again.
    """

    num_evaluations: torch.Tensor
    num_guided_evaluations: torch.Tensor
    num_accepted_steps: torch.Tensor | None = None
    num_rejected_steps: torch.Tensor | None = None


@dataclass
class DoDPipelineOutput(BaseOutput):
    """
    Output of [`DoDPipeline`].

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            The images of the last stage: a list of B PIL images, an array (B, H, W, 3) or a tensor (B, 3, H, W) in
            [0, 1], or with `output_type="latent"` the normalised latents (B, C, h, w).
        stages (`list`, *optional*): With `return_stages=True`, what `images` is for every stage that was run.
        stage_latents (`list[torch.Tensor]`, *optional*):
            With `return_stages=True`, the normalised latents (B, C, h, w) of every stage that was run.
        statistics (`list[DoDStageStatistics]`, *optional*): What every stage that was run did cost.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    stages: list | None = None
    stage_latents: list[torch.Tensor] | None = None
    statistics: list[DoDStageStatistics] | None = None


def _is_a(component: Any, name: str) -> bool:
    """
    Whether the class of a component, compiled or not, is the one of that name or derived from it.

    Asked by name, as the classes of a repository that is loaded with its own code are none of this package's.
    """
    component = component._orig_mod if is_compiled_module(component) else component
    return name in {base.__name__ for base in type(component).__mro__}


@dataclass
class _NoiseSource:
    """Where the noise of a stage comes from: that of each image of stage 1, and of its replicas from stage 2 on."""

    stage: int
    batch_size: int
    num_replicas: int
    generator: torch.Generator | list[torch.Generator] | None
    seed: int | None
    sample_indices: Sequence[int]

    def _ids(self, step: int) -> list[tuple[int, ...]]:
        return [
            (self.seed, int(index), replica, self.stage, step)
            for index in self.sample_indices
            for replica in range(self.num_replicas)
        ]

    def generators(self, step: int) -> torch.Generator | list[torch.Generator] | None:
        """What a scheduler of Diffusers draws the noise of a step from."""
        if self.seed is not None:
            return [stateless_generator(*ids) for ids in self._ids(step)]
        if isinstance(self.generator, list):
            return [generator for generator in self.generator for _ in range(self.num_replicas)]
        return self.generator

    def draw(self, step: int, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """Standard normal noise of all samples, each of `shape`: the initial one for step 0."""
        if self.seed is not None:
            return torch.stack([stateless_noise(tuple(shape), *ids) for ids in self._ids(step)]).to(device)
        shape = (self.batch_size * self.num_replicas, *shape)
        return randn_tensor(shape, self.generators(step), device=device, dtype=torch.float32)


class DoDPipeline(DiffusionPipeline, DoDLoraLoaderMixin):
    r"""
    Class-conditional image generation with Diffusion on Diffusion.

    Stage 1 samples from noise, given the class. Every later stage samples again from fresh noise, given the class and
    the visual prior that the latent embedder extracts from the sample of the stage before (paper, Eq. 4). All stages
    share one transformer.

    Args:
        transformer ([`DoDTransformer2DModel`]): Predicts the velocity.
        scheduler ([`DoDFlowMatchScheduler`]):
            Integrates it. Diffusers' own flow-match schedulers can take its place.
        vae (`AutoencoderKL`, `AutoencoderDC` or `AutoencoderRAE`, *optional*):
            Decodes latents to images; `None` for a pixel-space model.
        latent_embedder ([`LatentEmbeddingModule`], *optional*):
            Extracts visual priors; without it there is one stage, guided by `guidance_scale`.
        id2label (`dict[int, str]`, *optional*): Class names, several for one class separated by commas.
        default_guidance_scale (`float`, defaults to 5.5): Scale from stage 2 on when a call gives none.
        default_num_inference_steps (`int`, defaults to 30): Intervals of each stage when a call gives none.
        default_num_stages (`int`, defaults to 2): Stages when a call gives none; without a latent embedder there is
            only one.

    Raises:
        `ValueError`, `TypeError`: an argument is out of range or the components do not fit together.
    """

    model_cpu_offload_seq = "latent_embedder->transformer->vae"
    _optional_components = ["vae", "latent_embedder"]
    _callback_tensor_inputs = ["latents", "prior_embeds", "class_labels"]

    def __init__(
        self,
        transformer: DoDTransformer2DModel,
        scheduler: DoDFlowMatchScheduler | SchedulerMixin,
        vae: Autoencoder | None = None,
        latent_embedder: LatentEmbeddingModule | None = None,
        id2label: dict | None = None,
        default_guidance_scale: float = 5.5,
        default_num_inference_steps: int = 30,
        default_num_stages: int = 2,
    ):
        super().__init__()
        self._check_components(transformer, scheduler, vae, latent_embedder)
        check_number("default_guidance_scale", default_guidance_scale, 0)
        check_at_least("default_num_inference_steps", default_num_inference_steps, 1)
        check_at_least("default_num_stages", default_num_stages, 1)
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae, latent_embedder=latent_embedder)
        id2label = self._check_id2label(id2label, None if transformer is None else transformer.config.num_classes)
        self.register_to_config(
            id2label=id2label,
            default_guidance_scale=default_guidance_scale,
            default_num_inference_steps=default_num_inference_steps,
            default_num_stages=default_num_stages,
        )
        #: Class id -> name, in the order of the ids; the config has the ids as strings, in the order of JSON.
        self.id2label: dict[int, str] = dict(sorted((int(key), name) for key, name in (id2label or {}).items()))
        #: Class name -> ids that carry it.
        self.label2ids: dict[str, list[int]] = {}
        for key, names in self.id2label.items():
            for name in {names: None, **dict.fromkeys(name.strip() for name in names.split(","))}:
                self.label2ids.setdefault(name, []).append(key)

        self.vae_scale_factor = spatial_factor(vae) if vae is not None else 1
        # Sizes are checked here and never changed: no resizing, no rounding.
        self.image_processor = VaeImageProcessor(
            vae_scale_factor=self.vae_scale_factor, do_resize=False, do_convert_rgb=True
        )

    @staticmethod
    def _check_id2label(id2label: dict | None, num_classes: int | None) -> dict[str, str] | None:
        if id2label is None:
            return None
        check_type("id2label", id2label, dict)
        checked: dict[str, str] = {}  # JSON has no integer keys
        for key, name in id2label.items():
            known = str(key).isdecimal() and str(int(key)) not in checked
            known = known and (num_classes is None or int(key) < num_classes)
            if not known or not isinstance(name, str) or not all(part.strip() for part in name.split(",")):
                raise ValueError(
                    f"`id2label` must map ids {'>= 0' if num_classes is None else f'in [0, {num_classes - 1}]'}, "
                    "each once, to names (str, not empty), "
                    f"got {key!r}: {name!r}."
                )
            checked[str(int(key))] = name
        return checked

    @staticmethod
    def _check_components(transformer, scheduler, vae, latent_embedder) -> None:
        """Raises a `TypeError` or `ValueError` unless the components are what they should be and fit together."""
        components = {
            "transformer": (transformer, ("DoDTransformer2DModel",)),
            "vae": (vae, AUTOENCODERS),
            "latent_embedder": (latent_embedder, ("LatentEmbeddingModule",)),
        }
        for name, (component, expected) in components.items():
            if component is not None and not any(_is_a(component, cls) for cls in expected):
                received = type(component).__name__ if isinstance(component, torch.nn.Module) else repr(component)
                raise TypeError(f"`{name}` must be of type {' or '.join(expected)}, got {received}.")
        check_type("scheduler", scheduler, SchedulerMixin)
        if transformer is None:
            return
        config = transformer.config
        if vae is not None and latent_channels(vae) != config.in_channels:
            raise ValueError(
                f"`vae` must have `latent_channels` = {config.in_channels}, the transformer's `in_channels`, "
                f"got {latent_channels(vae)}."
            )
        if latent_embedder is not None:
            embedder_config = latent_embedder.config
            for name, expected, received in (
                ("width", config.prior_embed_dim, latent_embedder.inner_dim),
                ("in_channels", config.in_channels, embedder_config.in_channels),
                ("patch_size", config.patch_size, embedder_config.patch_size),
            ):
                if received != expected:
                    described = "`prior_embed_dim`" if name == "width" else f"`{name}`"
                    raise ValueError(
                        f"`latent_embedder` must have the {name} {expected}, the transformer's {described}, "
                        f"got {received}."
                    )

    def _get_schedulers(self, stage_solvers: Sequence[str | SchedulerMixin | None] | None, num_runs: int) -> list:
        """The scheduler of each stage that is run."""
        schedulers = []
        for solver in self._check_stage_values("stage_solvers", stage_solvers, num_runs):
            if solver is not None and not isinstance(solver, SchedulerMixin):
                check_type("stage_solvers", solver, (str, SchedulerMixin))
                if not _is_a(self.scheduler, "DoDFlowMatchScheduler"):
                    raise ValueError(
                        "`stage_solvers` must hold schedulers where that of the pipeline is no "
                        f"`DoDFlowMatchScheduler` but a `{type(self.scheduler).__name__}`, got {solver!r}."
                    )
                try:
                    scheduler = type(self.scheduler).from_config(self.scheduler.config, solver=solver)
                except ValueError as error:
                    raise ValueError(f"`stage_solvers` must hold schedulers or solvers: {error}") from error
            else:
                scheduler = self.scheduler if solver is None else solver
            self._check_scheduler("scheduler" if solver is None else "stage_solvers", scheduler)
            schedulers.append(scheduler)
        return schedulers

    @staticmethod
    def _check_stage_values(name: str, values: Sequence | None, num_runs: int) -> list:
        """One value for each stage that is run, `None` where none is given."""
        if values is None:
            return [None] * num_runs
        check_type(name, values, (list, tuple))
        if len(values) != num_runs:
            raise ValueError(f"`{name}` must hold {num_runs} values (one per stage that is run), got {len(values)}.")
        return list(values)

    @staticmethod
    def _check_scheduler(name: str, scheduler: SchedulerMixin) -> None:
        """Raises unless the scheduler is a flow-match one: others would step along another path."""
        check_type(name, scheduler, SchedulerMixin)
        if _is_a(scheduler, "DoDFlowMatchScheduler"):
            return
        accepted: dict[str, tuple] = {
            "invert_sigmas": (False,),
            "use_dynamic_shifting": (False,),
            "scale_factors": (None,),
            "final_sigmas_type": ("zero",),
            "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
        }
        if not type(scheduler).__name__.startswith("FlowMatch"):
            accepted |= {"use_flow_sigmas": (True,), "prediction_type": ("flow_prediction",)}
            accepted |= dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), (False,))
        for setting, values in accepted.items():
            received = scheduler.config.get(setting, False if setting == "use_flow_sigmas" else values[0])
            if received not in values:
                raise ValueError(
                    f"`{name}` must be a `DoDFlowMatchScheduler`, one of Diffusers' `FlowMatch...` or one with "
                    f"`use_flow_sigmas=True, prediction_type='flow_prediction'`, where `{setting}` is "
                    f"{' or '.join(map(repr, values))}, got {type(scheduler).__name__} with {received!r}."
                )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "DoDPipeline":
        """
        Loads a pipeline as `DiffusionPipeline.from_pretrained` does.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A folder or a repository on the Hub.
            kwargs: Passed on: components and sampling defaults that take the place of the saved ones (`None` leaves a
                component out), `dtype`, `variant`, `device_map`, `local_files_only`, `revision`, ...

        Raises:
            `OSError`: there is no such folder or repository, or a file is missing or cannot be read.
            `ValueError`: the files are those of something else.
        """
        path = os.fspath(pretrained_model_name_or_path)
        if os.path.isdir(path):
            cls._check_folder(path, kwargs)
        elif os.path.exists(path) or os.path.isabs(path) or path.startswith(".") or path.count("/") > 1:
            raise OSError(cls._not_found(path, "which is no folder here, nor a name that the Hub knows"))
        return super().from_pretrained(path, **kwargs)

    @classmethod
    def download(cls, pretrained_model_name: str | os.PathLike, **kwargs: Any) -> str:
        """
        Downloads the files of a pipeline as `DiffusionPipeline.download` does.

        Args:
            pretrained_model_name (`str` or `os.PathLike`): A repository on the Hub.
            kwargs: Passed on.

        Returns:
            `str`: The folder in the cache.

        Raises:
            `OSError`: there is no such repository, or it cannot be reached.
        """
        try:
            return super().download(pretrained_model_name, **kwargs)
        except (OSError, HFValidationError) as error:
            raise OSError(cls._not_found(pretrained_model_name, f"which is no folder here: {error}")) from error

    @classmethod
    def _not_found(cls, path: str | os.PathLike, reason: str) -> str:
        return (
            f"`pretrained_model_name_or_path` must be a folder with a {cls.config_name} or a repository on the Hub, "
            f"got {str(path)!r}, {reason}"
        )

    @classmethod
    def _check_folder(cls, path: str, given: dict[str, Any]) -> None:
        """Raises an `OSError` unless the folder has an index, and a folder for each component that is not `given`."""
        index_file = os.path.join(path, cls.config_name)
        if not os.path.isfile(index_file):
            raise OSError(cls._not_found(path, "which has none."))
        try:
            index = cls._dict_from_json_file(index_file)
        except ValueError as error:
            raise OSError(f"{index_file} must be JSON: {error}") from error
        for name, entry in index.items():
            is_component = isinstance(entry, list) and name != "_class_name" and entry[0] is not None
            if is_component and name not in given and not os.path.isdir(os.path.join(path, name)):
                raise OSError(
                    f"`pretrained_model_name_or_path` must hold a folder for each component in {cls.config_name}, "
                    f"got {path!r} without `{name}` ({entry[1]})."
                )

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """
        Saves the pipeline as `DiffusionPipeline` does, without the local paths that it was loaded from.

        Args:
            save_directory (`str` or `os.PathLike`): The folder, made if needed.
            args, kwargs: Passed on: `safe_serialization`, `variant`, `max_shard_size`, `push_to_hub`, ...
        """
        components = [component for component in self.components.values() if isinstance(component, ConfigMixin)]
        with without_local_paths([self, *components]):
            super().save_pretrained(save_directory, *args, **kwargs)

    @property
    def guidance_scale(self) -> float:
        """The guidance scale from stage 2 on, read at every step; a callback may set `_guidance_scale`."""
        return self._guidance_scale

    @property
    def first_stage_guidance_scale(self) -> float:
        """The guidance scale of stage 1, likewise; a callback may set `_first_stage_guidance_scale`."""
        return self._first_stage_guidance_scale

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        """Those of the latest call."""
        return self._attention_kwargs

    @property
    def num_timesteps(self) -> int | None:
        """Number of steps over all stages of the latest call, `None` when the solver chooses its own steps."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """Time of the evaluation under way, in [0, 1000], `None` between calls; for caches that depend on it."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt` to `True` in a callback to end the call with the sample reached so far."""
        return self._interrupt

    # ------------------------------------------------------------------------------------------------- inputs

    def get_label_ids(self, class_labels: int | str | Sequence[int | str | None] | torch.Tensor) -> list[int]:
        """
        Class labels as a list of ids.

        Args:
            class_labels (`int`, `str`, `list` or `torch.Tensor`):
                Ids in [0, num_classes - 1] or names of `id2label`; `None` in a list is the null class.

        Returns:
            `list[int]`: One id per label, a single label too; `num_classes` is the null class.

        Raises:
            `ValueError`: an id is out of range, a name is unknown or fits several ids, or the list is empty.
            `TypeError`: a label is neither an integer nor a name nor `None`.
        """
        if isinstance(class_labels, (torch.Tensor, np.ndarray)):
            if isinstance(class_labels, torch.Tensor):
                dtype = class_labels.dtype
                is_integer = not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
            else:
                is_integer = np.issubdtype(class_labels.dtype, np.integer)
            if not is_integer or (class_labels.ndim > 1 and tuple(class_labels.shape[1:]) != (1,)):
                raise ValueError(
                    "`class_labels` as a tensor must be an integer scalar or vector, "
                    f"got {class_labels.dtype} of shape {tuple(class_labels.shape)}."
                )
            class_labels = class_labels.reshape(-1).tolist()
        elif isinstance(class_labels, (int, str, np.integer)):
            class_labels = [class_labels]
        elif not isinstance(class_labels, (list, tuple)):
            raise TypeError(
                "`class_labels` must be an int, a str, a list of them (`None` in it is the null class) or a tensor, "
                f"got {class_labels!r} of type {type(class_labels).__name__}."
            )
        if len(class_labels) == 0:
            raise ValueError(f"`class_labels` must hold at least one label, got {class_labels!r}.")
        return [self._get_label_id(label) for label in class_labels]

    def _get_label_id(self, label: int | str | None) -> int:
        num_classes = self.transformer.config.num_classes
        if label is None:
            return num_classes
        if isinstance(label, str):
            ids = self.label2ids.get(label, [])
            if len(ids) > 1:
                raise ValueError(f"`class_labels` has the name {label!r}, which fits the ids {ids}: pass one of them.")
            if not ids:
                close = difflib.get_close_matches(label, self.label2ids, n=5, cutoff=0.4) or list(self.label2ids)[:5]
                raise ValueError(
                    f"`class_labels` must be among the {len(self.label2ids)} names in `label2ids`"
                    f"{', such as ' + ', '.join(map(repr, close)) if close else ''}, got {label!r}."
                )
            return ids[0]
        if isinstance(label, (torch.Tensor, np.ndarray)) and label.ndim == 0:
            label = label.item()
        elif isinstance(label, (list, tuple)) and len(label) == 1:  # a column of labels
            return self._get_label_id(label[0])
        if isinstance(label, bool) or not isinstance(label, (int, np.integer)):
            raise TypeError(f"`class_labels` must be integers or names, got {label!r} of type {type(label).__name__}.")
        if not 0 <= label < num_classes:
            null = " (the null class, `None` in a list)" if label == num_classes else ""
            raise ValueError(f"`class_labels` must be in [0, {num_classes - 1}], got {label}{null}.")
        return int(label)

    def check_inputs(
        self,
        num_stages: int,
        num_inference_steps: int,
        guidance_scale: float,
        first_stage_guidance_scale: float,
        has_prior: bool,
        height: int | None,
        width: int | None,
        generator: torch.Generator | list[torch.Generator] | None,
        seed: int | None,
        sample_indices: Sequence[int] | None,
        output_type: str,
        callback_on_step_end: Callable | None,
        callback_on_step_end_tensor_inputs: Sequence[str],
        batch_size: int,
    ) -> None:
        """
        Checks arguments of a call, the defaults filled in, before anything is computed.

        Args:
            num_stages (`int`): At least 1; 1 without a latent embedder, at least 2 with a prior.
            num_inference_steps (`int`): At least 1.
            guidance_scale (`float`): At least 0.
            first_stage_guidance_scale (`float`): At least 0.
            has_prior (`bool`): Whether an `image`, `prior_latents` or `prior_tokens` stand for stage 1.
            height (`int` or `None`): A multiple of the autoencoder's factor times `patch_size`.
            width (`int` or `None`): Likewise.
            generator (`torch.Generator`, `list[torch.Generator]` or `None`): One, or `batch_size` of them.
            seed (`int` or `None`): At least 0; not beside a generator.
            sample_indices (`Sequence[int]` or `None`): `batch_size` of them, at least 0; only beside a seed.
            output_type (`str`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            callback_on_step_end (`Callable` or `None`): Anything that can be called.
            callback_on_step_end_tensor_inputs (`Sequence[str]`): Names among `_callback_tensor_inputs`.
            batch_size (`int`): Number B of images.

        Raises:
            `ValueError`, `TypeError`: an argument is something else; the message names it, what it may be and what it
                is.
        """
        check_at_least("num_stages", num_stages, 1)
        if num_stages > 1 and self.latent_embedder is None:
            raise ValueError(f"`num_stages` must be 1 without a `latent_embedder`, got {num_stages}.")
        if has_prior and num_stages < 2:
            raise ValueError(
                "`num_stages` must be >= 2 with an `image`, `prior_latents` or `prior_tokens`, which stand for "
                f"stage 1, got {num_stages}."
            )
        check_at_least("num_inference_steps", num_inference_steps, 1)
        check_number("guidance_scale", guidance_scale, 0)
        check_number("first_stage_guidance_scale", first_stage_guidance_scale, 0)
        if seed is not None:
            check_at_least("seed", seed, 0)
            if generator is not None:
                raise ValueError(f"Only one of `generator` and `seed` must be given, got {generator} and {seed}.")
        if sample_indices is not None:
            if seed is None:
                raise ValueError(f"`sample_indices` must be None without a `seed`, got {sample_indices!r}.")
            check_type("sample_indices", sample_indices, (list, tuple, range))
            if len(sample_indices) != batch_size:
                raise ValueError(
                    f"`sample_indices` must hold {batch_size} integers (one per image), got {len(sample_indices)}."
                )
            for index in sample_indices:
                check_at_least("sample_indices", index, 0)
        for name, values in (("seed", [seed or 0]), ("sample_indices", sample_indices or [])):
            if max(values, default=0) >= 2**64:
                raise ValueError(f"`{name}` must be an integer >= 0 and < 2**64, got {max(values)}.")
        multiple = self.vae_scale_factor * self.transformer.config.patch_size
        for name, size in {"height": height, "width": width}.items():
            if size is not None:
                check_at_least(name, size, 1)
                if size % multiple:
                    raise ValueError(
                        f"`{name}` must be a multiple of {multiple} pixels (the autoencoder's factor "
                        f"{self.vae_scale_factor} times `patch_size`), got {size}."
                    )
        if generator is not None:
            generators = generator if isinstance(generator, list) else [generator]
            for entry in generators:
                check_type("generator", entry, torch.Generator)
            if isinstance(generator, list) and len(generator) != batch_size:
                raise ValueError(
                    f"`generator` must be one generator or a list of {batch_size} (one per label), "
                    f"got a list of {len(generator)}."
                )
        check_choice("output_type", output_type, OUTPUT_TYPES)
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise TypeError(
                "`callback_on_step_end` must be None or callable, "
                f"got {callback_on_step_end!r} of type {type(callback_on_step_end).__name__}."
            )
        check_type("callback_on_step_end_tensor_inputs", callback_on_step_end_tensor_inputs, (list, tuple))
        for name in callback_on_step_end_tensor_inputs:
            check_choice("callback_on_step_end_tensor_inputs", name, tuple(self._callback_tensor_inputs))

    def _check_image(self, image: PipelineImageInput, batch_size: int | None) -> torch.Tensor:
        """
        The pictures of the visual prior as pixels (1 or B, C, H, W) in [-1, 1]; one picture serves all labels. Any
        number if `batch_size` is `None`.
        """
        entries = list(image) if isinstance(image, (list, tuple)) else [image]
        if not entries:
            number = "at least one picture" if batch_size is None else f"1 or {batch_size} pictures (one per label)"
            raise ValueError(f"`image` must hold {number}, got {image!r}.")
        pictures = [self._to_tensor(entry) for entry in entries]  # each (n, C, H, W) in [0, 1]
        if len({picture.shape[1:] for picture in pictures}) > 1:
            shapes = [tuple(picture.shape[1:]) for picture in pictures]
            raise ValueError(f"`image` must hold pictures of one size, got (channels, height, width) {shapes}.")
        pixels = self.image_processor.normalize(torch.cat(pictures))
        channels = (
            self.vae.config.get("in_channels", 3) if self.vae is not None else self.transformer.config.in_channels
        )
        multiple = self.vae_scale_factor * self.transformer.config.patch_size
        size = tuple(pixels.shape[2:])
        if pixels.shape[1] != channels or any(side % multiple for side in size):
            raise ValueError(
                f"`image` must have {channels} channels and a height and width that are multiples of {multiple}, "
                f"got {pixels.shape[1]} channels and {size[0]} x {size[1]}."
            )
        if batch_size is not None and pixels.shape[0] not in (1, batch_size):
            raise ValueError(f"`image` must hold 1 or {batch_size} pictures (one per label), got {pixels.shape[0]}.")
        return pixels

    def _to_tensor(self, picture: PIL.Image.Image | np.ndarray | torch.Tensor) -> torch.Tensor:
        """One picture, or a batch of them, as an fp32 tensor (n, C, H, W) in [0, 1]."""
        processor = self.image_processor
        if isinstance(picture, PIL.Image.Image):
            return processor.numpy_to_pt(processor.pil_to_numpy(processor.convert_to_rgb(picture)))
        if not isinstance(picture, (np.ndarray, torch.Tensor)):
            raise TypeError(
                "`image` must be a PIL image, an array (H, W, 3), a tensor (3, H, W), a batch or a list of them, "
                f"got {picture!r} of type {type(picture).__name__}."
            )
        if picture.ndim not in (3, 4) or 0 in picture.shape:
            raise ValueError(
                "`image` must have the shape (H, W, 3) or (B, H, W, 3) as an array, (3, H, W) or (B, 3, H, W) as a "
                f"tensor, none of them 0, got {tuple(picture.shape)}."
            )
        tensor = torch.as_tensor(picture)
        tensor = tensor[None] if tensor.ndim == 3 else tensor
        if isinstance(picture, np.ndarray):
            tensor = tensor.permute(0, 3, 1, 2)
        if tensor.dtype == torch.uint8:
            return tensor.float() / 255
        low, high = float(tensor.min()), float(tensor.max())
        if not tensor.is_floating_point() or not (0 <= low and high <= 1):  # NaN compares false
            raise ValueError(f"`image` must be uint8 or floats in [0, 1], got {tensor.dtype} in [{low}, {high}].")
        return tensor.float()

    def _check_noises(
        self, latents: torch.Tensor | list[torch.Tensor] | None, shapes: list[tuple[int, ...]]
    ) -> list[torch.Tensor | None]:
        """The noise of each stage that is run, `None` where it is to be drawn."""
        if latents is None:
            return [None] * len(shapes)
        if not isinstance(latents, (list, tuple)):
            latents = [latents]
        elif len(latents) != len(shapes):
            raise ValueError(
                f"`latents` must be a tensor or a list of {len(shapes)} (one per stage that is run), "
                f"got a list of {len(latents)}."
            )
        for entry, shape in zip(latents, shapes, strict=False):
            self._check_tensor("latents", entry, shape)
        return list(latents) + [None] * (len(shapes) - len(latents))

    @staticmethod
    def _check_tensor(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
        check_type(name, tensor, torch.Tensor)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"`{name}` must have shape {shape}, got {tuple(tensor.shape)}.")
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"`{name}` must be finite floating-point numbers, got {tensor.dtype} with {tensor}.")

    def _check_prior(self, name: str, prior: torch.Tensor, num_labels: int) -> None:
        """Raises unless the latents or tokens of a prior are one, or one per label."""
        check_type(name, prior, torch.Tensor)
        if self.latent_embedder is None:
            raise ValueError(f"`{name}` must be None without a `latent_embedder`, got shape {tuple(prior.shape)}.")
        config = self.latent_embedder.config
        if name == "prior_tokens":
            expected = (config.num_latent_tokens, config.latent_token_dim)
        else:
            expected = (config.in_channels, *prior.shape[2:])
            if prior.ndim != 4 or 0 in prior.shape or any(side % config.patch_size for side in prior.shape[2:]):
                raise ValueError(
                    f"`{name}` must have shape (1 or {num_labels}, {config.in_channels}, height, width) with sides "
                    f"that are multiples of {config.patch_size}, got {tuple(prior.shape)}."
                )
        if prior.ndim == 0 or prior.shape[0] not in (1, num_labels):
            raise ValueError(
                f"`{name}` must have shape (1 or {num_labels}, {', '.join(map(str, expected))}), "
                f"got {tuple(prior.shape)}."
            )
        self._check_tensor(name, prior, (prior.shape[0], *expected))

    # ------------------------------------------------------------------------------------------------ sampling

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """
        Encodes pictures by the mean of the autoencoder's posterior; a pixel-space model takes them as they are.

        Args:
            pixels (`torch.Tensor` of shape `(B, 3, H, W)`): Pixels in [-1, 1].

        Returns:
            `torch.Tensor` of shape `(B, C, h, w)`: Normalised latents in fp32.
        """
        return encode_moments(pixels, self.vae)[0]

    @torch.no_grad()
    def get_prior_tokens(
        self,
        image: PipelineImageInput | None = None,
        latents: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """
        The latent tokens of pictures or latents, for `prior_tokens`; `torch.lerp` of two of them lies between two
        priors.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them, *optional*):
                Pictures: arrays (H, W, 3) and tensors (3, H, W), uint8 or in [0, 1].
            latents (`torch.Tensor` of shape `(B, C, h, w)`, *optional*):
                Normalised latents, such as `stage_latents` of [`DoDPipelineOutput`], in place of pictures.
            attention_kwargs (`dict`, *optional*): `{"scale": ...}` is the scale of LoRA adapters.

        Returns:
            `torch.Tensor` of shape `(B, num_latent_tokens, latent_token_dim)`.

        Raises:
            `ValueError`, `TypeError`: not one of both is given, it does not fit, or there is no latent embedder.
        """
        if self.latent_embedder is None:
            raise ValueError("`latent_embedder` must be loaded to extract tokens, got None.")
        if (image is None) == (latents is None):
            raise ValueError(
                f"One of `image` and `latents` must be given, got {'neither' if image is None else 'both'}."
            )
        device = self._execution_device
        if latents is None:
            latents = self.encode_image(self._check_image(image, None).to(device))
        else:
            check_type("latents", latents, torch.Tensor)
            self._check_prior("latents", latents, latents.shape[0] if latents.ndim > 0 else 1)
        tokens = self.latent_embedder.encode(latents.to(device), attention_kwargs=attention_kwargs)
        self.maybe_free_model_hooks()
        return tokens

    @torch.no_grad()
    def decode_latents(
        self, latents: torch.Tensor, output_type: str
    ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        """
        Decodes latents to images.

        Args:
            latents (`torch.Tensor` of shape `(B, C, h, w)`): Normalised latents.
            output_type (`str`): `"pil"`, `"np"`, `"pt"`, or `"latent"` for the latents as they are.

        Returns:
            `list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`, as in [`DoDPipelineOutput`].
        """
        if output_type == "latent":
            return latents
        pixels = decode_pixels(latents, self.vae)
        return self.image_processor.postprocess(pixels, output_type=output_type)

    def set_pos_interpolation(
        self, pos_interpolation: str = "none", pos_interpolation_decoupled: bool = False
    ) -> None:
        """
        Chooses how backbone and latent embedder treat positions on grids larger than the trained one.

        Args:
            pos_interpolation (`str`, defaults to `"none"`): `"none"`, `"linear"`, `"ntk"` or `"yarn"`, see
                [`DoDModelMixin.set_pos_interpolation`].
            pos_interpolation_decoupled (`bool`, defaults to `False`):
                Whether rows and columns are as much larger as they are each; both as the longer side if not.

        Raises:
            `ValueError`, `TypeError`: an argument is none of these.
        """
        for model in (self.transformer, self.latent_embedder):
            if model is not None:
                model.set_pos_interpolation(pos_interpolation, pos_interpolation_decoupled)

    def _set_timesteps(self, scheduler: SchedulerMixin, num_inference_steps: int, grid: dict[str, Any]) -> int | None:
        """
        Lays out one stage, on the `sigmas` or `timesteps` of `grid` if it has some; returns its number of steps,
        `None` when the solver chooses them.
        """
        device = self._execution_device
        is_ours = _is_a(scheduler, "DoDFlowMatchScheduler")
        accepted = inspect.signature(scheduler.set_timesteps).parameters
        is_adaptive = getattr(scheduler, "is_adaptive", False)
        for name, values in grid.items():
            if is_adaptive or name not in accepted or (name == "timesteps" and not is_ours):
                solver = scheduler.config.solver if is_adaptive else type(scheduler).__name__
                raise ValueError(f"`{name}` must be None for {solver!r}, which has a grid of its own, got {values!r}.")
        if is_adaptive:
            return None
        if grid and not is_ours:
            starts = check_starts("sigmas", grid["sigmas"], 1)
            scheduler.set_timesteps(sigmas=starts.numpy(), device=device)
        elif grid:
            scheduler.set_timesteps(**grid, device=device)
        elif "sigmas" in accepted and not is_ours:
            # Diffusers' own default ends at 1 / num_train_timesteps; N intervals of 1 / N are those of our scheduler.
            sigmas = np.linspace(1, 1 / num_inference_steps, num_inference_steps)
            scheduler.set_timesteps(sigmas=sigmas, device=device)
        else:
            scheduler.set_timesteps(num_inference_steps, device=device)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        return len(scheduler.timesteps)

    def _prior_embeds(
        self,
        latents: torch.Tensor | None,
        latent_tokens: torch.Tensor | None,
        size: tuple[int, int],
        attention_kwargs: dict[str, Any] | None,
    ) -> torch.Tensor:
        """The visual priors of latents, or of latent tokens, for the next stage."""
        embedder, device = self.latent_embedder, self._execution_device
        scale = {name: value for name, value in (attention_kwargs or {}).items() if name == "scale"}
        if latent_tokens is None:
            prior_embeds = embedder(latents.to(device, embedder.dtype), attention_kwargs=scale).prior_embeds
        else:
            prior_embeds = embedder.decode(latent_tokens.to(device), *size, attention_kwargs=scale)
        return prior_embeds.to(self.transformer.dtype)

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str | None] | torch.Tensor,
        num_stages: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        first_stage_guidance_scale: float = 1.0,
        num_images_per_label: int = 1,
        image: PipelineImageInput | None = None,
        prior_latents: torch.Tensor | None = None,
        prior_tokens: torch.Tensor | None = None,
        num_images_per_prior: int = 1,
        stage_inference_steps: Sequence[int | None] | None = None,
        stage_solvers: Sequence[str | SchedulerMixin | None] | None = None,
        stage_guidance_scales: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        null_condition: str = "class_and_prior",
        prior_guidance_scale: float | None = None,
        guidance_channels: int | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_power: float | None = None,
        guidance_rescale: float = 0.0,
        guidance_cosine_threshold: float | None = None,
        guidance_transformer: DoDTransformer2DModel | None = None,
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
        Generates images of class labels, B of them: `num_images_per_label` of each label in turn, and from stage 2 on
        `num_images_per_prior` of each of those.

        Args:
            class_labels (`int`, `str`, `list` or `torch.Tensor`):
                Class ids in [0, num_classes - 1] or names of `id2label`. `None` in a list is the null class: an
                image of no class in particular, known to a transformer that was trained with label dropout.
            num_stages (`int`, *optional*): Number of stages, >= 1; the checkpoint's default if not given.
            num_inference_steps (`int`, *optional*):
                Number of intervals of each stage, >= 1. Solvers of higher order evaluate the model several times per
                interval; adaptive ones choose their own steps and ignore it.
            guidance_scale (`float`, *optional*):
                Classifier-free guidance scale from stage 2 on, >= 0; 1 is no guidance. The checkpoint's default if not
                given. It does not apply to stage 1, not even when that is the only one, unless the pipeline has no
                latent embedder: then it is the scale of the only stage.
            first_stage_guidance_scale (`float`, defaults to 1.0): Guidance scale of stage 1 (paper: none).
            num_images_per_label (`int`, defaults to 1): Number of images of each label, >= 1.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them, *optional*):
                One picture, or one per label, that takes the place of stage 1's sample: arrays (H, W, 3) and tensors
                (3, H, W), uint8 or in [0, 1]. Stage 1 is not run, though `num_stages` counts it.
            prior_latents (`torch.Tensor` of shape `(1, C, h, w)` or `(number of labels, C, h, w)`, *optional*):
                Normalised latents in place of a picture, such as `stage_latents` of an earlier call.
            prior_tokens (`torch.Tensor` of shape `(1, N, d_e)` or `(number of labels, N, d_e)`, *optional*):
                Latent tokens in place of a picture, `num_latent_tokens` of `latent_token_dim`, see `get_prior_tokens`.
            num_images_per_prior (`int`, defaults to 1):
                Number of stage-2 images of each sample of stage 1, or of each picture, >= 1. Later stages go on with
                all of them.
            stage_inference_steps (`Sequence[int | None]`, *optional*):
                `num_inference_steps` of each stage that is run; `None` is the default.
            stage_solvers (`Sequence[str | SchedulerMixin | None]`, *optional*):
                For each stage that is run the `solver` of a [`DoDFlowMatchScheduler`] or another flow-match scheduler;
                `None` is the pipeline's.
            stage_guidance_scales (`Sequence[float]`, *optional*):
                The scale of each stage that is run, in place of the two others.
            sigmas (`Sequence[float]`, *optional*):
                Strictly decreasing starts of the intervals of each stage in (0, 1], before the scheduler's shift.
            timesteps (`Sequence[float]`, *optional*):
                The same as times of the scheduler, in (0, `num_train_timesteps`], after the shift.
            null_condition (`str`, defaults to `"class_and_prior"`):
                What the unconditional half lacks from stage 2 on: `"class_and_prior"` (paper), `"class"` or `"prior"`.
            prior_guidance_scale (`float`, *optional*):
                A scale of the prior's own from stage 2 on, in three evaluations; `guidance_scale` is then that of the
                class.
            guidance_channels (`int`, *optional*):
                Guides the first channels only; all if not given. DiT, SiT and FiT guide 3 of 4.
            guidance_interval (`tuple[float, float]`, defaults to `(0.0, 1.0)`):
                Guides where low <= sigma <= high only, and computes no unconditional half elsewhere.
            guidance_power (`float`, *optional*):
                Lets the scale rise from 1 in pure noise to the full one at the data, by a power-cosine schedule of
                this power (1 is the plain cosine, larger ones rise later).
            guidance_rescale (`float`, defaults to 0.0):
                From 0 to 1, how far the guided prediction's standard deviation is taken back to the conditional one's,
                against oversaturation.
            guidance_cosine_threshold (`float`, *optional*):
                Adaptive Guidance: stops to guide a sample, for the rest of the stage, once its conditional and
                unconditional velocities agree to this cosine. Its fixed form is `guidance_interval`.
            guidance_transformer ([`DoDTransformer2DModel`], *optional*):
                A weaker model under the same condition in place of the unconditional half.
            height (`int`, *optional*):
                Height in pixels; that of `image` or `prior_latents`, else the trained size, if not given.
            width (`int`, *optional*): Width in pixels, likewise.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of the noise. One for all images: an image depends on its place in the batch, as in Diffusers.
                Or one for each image of stage 1: an image depends on its own generator alone.
            seed (`int`, *optional*):
                Source of the noise in place of a generator, >= 0: an image depends on the seed and its index alone,
                not on the batch, its place in it, or the process.
            sample_indices (`Sequence[int]`, *optional*):
                Index of each image of stage 1, >= 0; 0, 1, 2, ... if not given.
            latents (`torch.Tensor` of shape `(B, C, h, w)` or a list of them, *optional*):
                Standard normal noise of the first stage that is run, or of each.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`, defaults to `True`): Whether to return a [`DoDPipelineOutput`].
            return_stages (`bool`, defaults to `False`): Whether to return images and latents of every stage too.
            attention_kwargs (`dict`, *optional*):
                `{"scale": ...}` is the scale of LoRA adapters; anything else goes to the attention processors.
            callback_on_step_end (`Callable`, *optional*):
                `callback(pipe, step_index, timestep, callback_kwargs)` after each step, with one index over all
                stages. It may return a dict with new values of the tensors it was given. Under an adaptive solver the
                latents cannot be replaced, and the time is that of the slowest sample; between the evaluations of an
                interval they are a prediction that the last one replaces.
            callback_on_step_end_tensor_inputs (`Sequence[str]`, defaults to `("latents",)`):
                The tensors in `callback_kwargs`: `"latents"`, `"prior_embeds"`, `"class_labels"`. A `PipelineCallback`
                brings its own.

        Returns:
            [`DoDPipelineOutput`], or the tuple `(images,)`, `(images, stages)` with `return_stages=True`.

        Raises:
            `ValueError`, `TypeError`: an argument is out of range or of the wrong type or shape.

        Examples:
        """
        # 1. Inputs
        if self.transformer is None:
            raise ValueError("`transformer` must be loaded to generate images, got None.")
        label_ids = self.get_label_ids(class_labels)
        check_at_least("num_images_per_label", num_images_per_label, 1)
        check_at_least("num_images_per_prior", num_images_per_prior, 1)
        num_labels = len(label_ids)
        label_ids = [label for label in label_ids for _ in range(num_images_per_label)]
        batch_size = len(label_ids)
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if num_stages is None:
            num_stages = self.config.default_num_stages if self.latent_embedder is not None else 1
        if self.latent_embedder is not None and num_stages == 1 and guidance_scale is not None:
            logger.warning(
                f"`guidance_scale` = {guidance_scale} has no effect with one stage: it applies from stage 2 on. "
                "Use `first_stage_guidance_scale`."
            )
        if self.latent_embedder is None and first_stage_guidance_scale != 1:
            logger.warning(
                f"`first_stage_guidance_scale` = {first_stage_guidance_scale} has no effect without a latent "
                "embedder: the only stage is guided by `guidance_scale`."
            )
        if stage_guidance_scales is not None and (guidance_scale is not None or first_stage_guidance_scale != 1):
            raise ValueError(
                "`stage_guidance_scales` must be None beside `guidance_scale` or `first_stage_guidance_scale`, "
                f"got {stage_guidance_scales!r}."
            )
        steps_are_given = num_inference_steps is not None
        if guidance_scale is None:
            guidance_scale = self.config.default_guidance_scale
        if num_inference_steps is None:
            num_inference_steps = self.config.default_num_inference_steps
        priors = {"image": image, "prior_latents": prior_latents, "prior_tokens": prior_tokens}
        given_priors = [name for name, prior in priors.items() if prior is not None]
        if len(given_priors) > 1:
            raise ValueError(
                f"Only one of {', '.join(f'`{name}`' for name in priors)} must be given, got {given_priors}."
            )
        self.check_inputs(
            num_stages,
            num_inference_steps,
            guidance_scale,
            first_stage_guidance_scale,
            bool(given_priors),
            height,
            width,
            generator,
            seed,
            sample_indices,
            output_type,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            batch_size,
        )
        check_type("attention_kwargs", attention_kwargs, (dict, type(None)))
        first_stage = 2 if given_priors else 1
        stage_numbers = range(first_stage, num_stages + 1)
        if num_images_per_prior > 1 and num_stages == 1:
            raise ValueError(f"`num_images_per_prior` must be 1 with one stage, got {num_images_per_prior}.")
        guidance = Guidance(
            null_condition=null_condition,
            prior_scale=prior_guidance_scale,
            channels=guidance_channels,
            interval=guidance_interval,
            power=guidance_power,
            rescale=guidance_rescale,
            cosine_threshold=guidance_cosine_threshold,
            transformer=guidance_transformer,
        )
        self._check_guidance(guidance, num_stages)
        schedulers = self._get_schedulers(stage_solvers, len(stage_numbers))
        steps = self._check_stage_values("stage_inference_steps", stage_inference_steps, len(stage_numbers))
        for value in steps:
            if value is not None:
                check_at_least("stage_inference_steps", value, 1)
        steps = [num_inference_steps if value is None else value for value in steps]
        scales = self._check_stage_values("stage_guidance_scales", stage_guidance_scales, len(stage_numbers))
        for value in scales:
            if stage_guidance_scales is not None:
                check_number("stage_guidance_scales", value, 0)
        grid = {name: value for name, value in (("sigmas", sigmas), ("timesteps", timesteps)) if value is not None}
        if grid and (steps_are_given or stage_inference_steps is not None or len(grid) > 1):
            raise ValueError(
                "Only one of `sigmas`, `timesteps` and numbers of steps must be given, "
                f"got {', '.join(f'`{name}`' for name in grid)}"
                f"{' and a number of steps' if steps_are_given or stage_inference_steps is not None else ''}."
            )
        is_adaptive = [getattr(scheduler, "is_adaptive", False) for scheduler in schedulers]
        if steps_are_given and all(is_adaptive):
            logger.warning(
                f"`num_inference_steps` = {num_inference_steps} has no effect: the solver chooses its own steps."
            )
        if stage_inference_steps is not None and any(
            adaptive and value is not None for adaptive, value in zip(is_adaptive, stage_inference_steps, strict=True)
        ):
            logger.warning(
                f"`stage_inference_steps` = {stage_inference_steps} has no effect in stages whose solver chooses its "
                "own steps."
            )
        device = self._execution_device
        factor = self.vae_scale_factor
        prior_size = None
        if image is not None:
            pixels = self._check_image(image, num_labels)
            prior_size = tuple(pixels.shape[2:])
        elif given_priors:
            self._check_prior(given_priors[0], priors[given_priors[0]], num_labels)
            if prior_latents is not None:
                prior_size = (prior_latents.shape[2] * factor, prior_latents.shape[3] * factor)
        if prior_size is not None:
            for name, size, prior_side in (("height", height, prior_size[0]), ("width", width, prior_size[1])):
                if size not in (None, prior_side):
                    raise ValueError(
                        f"`{name}` must be None or that of `{given_priors[0]}`, {prior_side}, got {size}."
                    )
            height, width = prior_size
        trained_size = self.transformer.config.sample_size * factor
        height = trained_size if height is None else height
        width = trained_size if width is None else width
        if self.vae is not None:
            check_image_size(self.vae, height, width)
        shape = (self.transformer.config.in_channels, height // factor, width // factor)
        batch_sizes = [batch_size * (1 if stage == 1 else num_images_per_prior) for stage in stage_numbers]
        noises = self._check_noises(latents, [(number, *shape) for number in batch_sizes])
        numbers_of_steps = [
            self._set_timesteps(scheduler, number, grid) for scheduler, number in zip(schedulers, steps, strict=True)
        ]

        # 2. What all stages share
        state: dict[str, torch.Tensor | None] = {
            "latents": prior_latents,
            "prior_embeds": None,
            "class_labels": torch.tensor(label_ids, device=device),
        }
        if image is not None:
            state["latents"] = self.encode_image(pixels.to(device))
            self.maybe_free_model_hooks()  # the autoencoder is not needed again before the end
        self._num_timesteps = None if None in numbers_of_steps else sum(numbers_of_steps)
        self._guidance_scale = float(guidance_scale)
        self._first_stage_guidance_scale = float(first_stage_guidance_scale)
        self._attention_kwargs = attention_kwargs
        self._current_timestep = None
        self._step_index = 0  # over all stages
        self._interrupt = False
        results, statistics = [], []  # of each stage
        sample_indices = range(batch_size) if sample_indices is None else sample_indices

        # 3. Stage by stage (paper, Eq. 4)
        for run, (stage, scheduler) in enumerate(zip(stage_numbers, schedulers, strict=True)):
            if stage > 1:
                is_given = run == 0 and bool(given_priors)
                prior_embeds = self._prior_embeds(
                    state["latents"], prior_tokens if is_given else None, shape[1:], attention_kwargs
                )
                if is_given:
                    is_shared = prior_embeds.shape[0] == 1
                    prior_embeds = prior_embeds.repeat_interleave(batch_size if is_shared else num_images_per_label, 0)
                if stage == 2:
                    prior_embeds = prior_embeds.repeat_interleave(num_images_per_prior, 0)
                    state["class_labels"] = state["class_labels"].repeat_interleave(num_images_per_prior)
                state["prior_embeds"] = prior_embeds
            num_replicas = 1 if stage == 1 else num_images_per_prior
            source = _NoiseSource(stage, batch_size, num_replicas, generator, seed, sample_indices)
            if scales[run] is not None:
                if self._has_own_scale(stage):
                    self._first_stage_guidance_scale = float(scales[run])
                else:
                    self._guidance_scale = float(scales[run])
            self._set_timesteps(scheduler, steps[run], grid)
            noise = source.draw(0, shape, device) if noises[run] is None else noises[run]
            state["latents"] = noise.to(device=device, dtype=torch.float32) * getattr(
                scheduler, "init_noise_sigma", 1.0
            )
            with self.progress_bar(total=numbers_of_steps[run] or NUM_TRAIN_TIMESTEPS) as progress_bar:
                progress_bar.set_description(f"Stage {stage}/{num_stages}")
                statistics.append(
                    self._sample_stage(
                        stage,
                        scheduler,
                        guidance,
                        state,
                        source,
                        progress_bar,
                        callback_on_step_end,
                        callback_on_step_end_tensor_inputs,
                    )
                )
            results.append(state["latents"])
            if self.interrupt:
                break

        # 4. Images, all at the end: models that are offloaded in turn change places once
        self._current_timestep = None
        stages = [self.decode_latents(latents, output_type) for latents in results[None if return_stages else -1 :]]
        images = stages[-1]
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images, stages) if return_stages else (images,)
        return DoDPipelineOutput(
            images=images,
            stages=stages if return_stages else None,
            stage_latents=results if return_stages else None,
            statistics=statistics,
        )

    def _has_own_scale(self, stage: int) -> bool:
        """Whether a stage is guided by `first_stage_guidance_scale`."""
        return stage == 1 and self.latent_embedder is not None

    def _check_guidance(self, guidance: Guidance, num_stages: int) -> None:
        """Raises unless the guidance fits the models and the stages."""
        config = self.transformer.config
        if guidance.channels is not None and guidance.channels > config.in_channels:
            raise ValueError(f"`guidance_channels` must be in [1, {config.in_channels}], got {guidance.channels}.")
        for name, value, default in (
            ("null_condition", guidance.null_condition, "class_and_prior"),
            ("prior_guidance_scale", guidance.prior_scale, None),
        ):
            if value != default and num_stages == 1:
                raise ValueError(f"`{name}` must be {default!r} with one stage, which has no prior, got {value!r}.")
        weak = guidance.transformer
        if weak is None:
            return
        if not _is_a(weak, "DoDTransformer2DModel"):
            raise TypeError(
                f"`guidance_transformer` must be of type DoDTransformer2DModel, got {type(weak).__name__}."
            )
        for name in ("in_channels", "num_classes", "patch_size"):
            if weak.config[name] != config[name]:
                raise ValueError(
                    f"`guidance_transformer` must have the transformer's `{name}`, {config[name]}, "
                    f"got {weak.config[name]}."
                )
        if config.prior_embed_dim is not None and weak.config.prior_embed_dim not in (None, config.prior_embed_dim):
            raise ValueError(
                "`guidance_transformer` must have the transformer's `prior_embed_dim`, "
                f"{config.prior_embed_dim}, or None, got {weak.config.prior_embed_dim}."
            )

    @staticmethod
    def _check_replacement(name: str, tensor: torch.Tensor | None, current: torch.Tensor | None) -> None:
        shapes = [None if value is None else tuple(getattr(value, "shape", ())) for value in (tensor, current)]
        if not isinstance(tensor, (torch.Tensor, type(None))) or shapes[0] != shapes[1]:
            received = f"shape {shapes[0]}" if isinstance(tensor, torch.Tensor) else repr(tensor)
            raise ValueError(f"`callback_on_step_end` must return `{name}` of shape {shapes[1]}, got {received}.")

    def _sample_stage(
        self,
        stage: int,
        scheduler: SchedulerMixin,
        guidance: Guidance,
        state: dict[str, torch.Tensor | None],
        source: "_NoiseSource",
        progress_bar,
        callback_on_step_end: Callable | None,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> DoDStageStatistics:
        """Integrates `state["latents"]` from noise to data, in place of the entry, with callbacks in between."""
        is_ours = _is_a(scheduler, "DoDFlowMatchScheduler")
        # The model's timestep is 1000 * sigma, whatever a scheduler calls its own; some of Diffusers' round theirs.
        num_train_timesteps = scheduler.config.num_train_timesteps
        if stage == 1:  # where no prior is to be guided by
            guidance = replace(guidance, null_condition="class_and_prior", prior_scale=None)
        batch_size = state["latents"].shape[0]
        guided_velocity = GuidedVelocity(
            self.transformer, batch_size, guidance, self.attention_kwargs, cache_name=f"stage_{stage}"
        )

        def model_time(timestep: torch.Tensor) -> torch.Tensor:
            return timestep / num_train_timesteps * NUM_TRAIN_TIMESTEPS

        def velocity(latents: torch.Tensor, time: torch.Tensor, indices: torch.Tensor | None = None) -> torch.Tensor:
            self._current_timestep = time.max()  # that of the slowest sample, where each has its own
            labels, priors = state["class_labels"], state["prior_embeds"]
            if indices is not None and len(indices) < batch_size:
                labels, priors = labels[indices], None if priors is None else priors[indices]
            scale = self.first_stage_guidance_scale if self._has_own_scale(stage) else self.guidance_scale
            return guided_velocity(latents, time, labels, priors, scale, indices)

        def end_step(timestep: torch.Tensor) -> None:
            if callback_on_step_end is not None:
                inputs = {name: state[name] for name in callback_on_step_end_tensor_inputs}
                outputs = callback_on_step_end(self, self._step_index, timestep, inputs)
                check_type("callback_on_step_end", {} if outputs is None else outputs, dict)
                for name, tensor in (outputs or {}).items():
                    check_choice("callback_on_step_end", name, tuple(self._callback_tensor_inputs))
                    self._check_replacement(name, tensor, state[name])
                    state[name] = tensor
            self._step_index += 1

        statistics = DoDStageStatistics(guided_velocity.num_evaluations, guided_velocity.num_guided_evaluations)
        if getattr(scheduler, "is_adaptive", False):

            def end_accepted_step(index: int, timestep: torch.Tensor, latents: torch.Tensor) -> bool:
                state["latents"] = latents
                end_step(timestep.max())  # that of the slowest sample
                if state["latents"] is not latents:
                    raise ValueError(
                        "`callback_on_step_end` must not replace `latents` under an adaptive solver, whose error "
                        f"control would not notice; got new ones in step {self._step_index - 1}."
                    )
                progress_bar.update(round(NUM_TRAIN_TIMESTEPS - float(model_time(timestep.max()))) - progress_bar.n)
                return not self.interrupt

            output = scheduler.solve(
                lambda latents, timestep, indices: velocity(latents, model_time(timestep), indices),
                state["latents"],
                callback=end_accepted_step,
            )
            state["latents"] = output.prev_sample
            statistics["num_accepted_steps"] = output.num_accepted
            statistics["num_rejected_steps"] = output.num_rejected
            progress_bar.update(NUM_TRAIN_TIMESTEPS - progress_bar.n)
            return statistics

        accepts_generator = "generator" in inspect.signature(scheduler.step).parameters
        for index, timestep in enumerate(scheduler.timesteps):
            time = model_time(timestep) if is_ours else scheduler.sigmas[index] * NUM_TRAIN_TIMESTEPS
            model_output = velocity(state["latents"], time)
            step_arguments = {}
            if is_ours and scheduler.is_stochastic:
                noise = source.draw(index + 1, state["latents"].shape[1:], state["latents"].device)
                step_arguments = {"variance_noise": noise}
            elif accepts_generator and not is_ours:  # those of Diffusers may be stochastic
                step_arguments = {"generator": source.generators(index + 1)}
            state["latents"] = scheduler.step(
                model_output, timestep, state["latents"], **step_arguments, return_dict=False
            )[0]
            end_step(timestep)
            progress_bar.update()
            if self.interrupt:
                break
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
