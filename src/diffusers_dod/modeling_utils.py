# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""What the models share: checked weights, clean configs, layers kept out of quantization, and Linears in fp32."""

import copy
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, FrozenDict
from diffusers.models.model_loading_utils import _add_variant
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError

from .checkpoint_manifest import CHECKPOINT_MANIFEST, check_checkpoint
from .checks import abbreviate, to_plain
from .records import StrictConfigMixin, check_safetensors_header


RECOMPILE_LIMIT = 64  # graphs of the blocks of a model


@contextmanager
def without_local_paths(objects: Sequence[ConfigMixin]) -> Iterator[None]:
    """Removes from the configs of `objects`, within the context, the local path that they were loaded from."""
    configs = [object_._internal_dict for object_ in objects]
    for object_, config in zip(objects, configs, strict=True):
        object_._internal_dict = FrozenDict({key: value for key, value in config.items() if key != "_name_or_path"})
    try:
        yield
    finally:
        for object_, config in zip(objects, configs, strict=True):
            object_._internal_dict = config


def _reason(error: BaseException) -> str:
    """The message of `error`, and the message of the safetensors error behind it, which Diffusers leaves out."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, SafetensorError):
        cause = cause.__cause__ or cause.__context__
    return str(error) if cause is None or cause is error else f"{error} ({cause})"


@torch.compiler.assume_constant_result
def _is_tf32_allowed() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


class FP32Linear(nn.Linear):
    """A Linear that computes in at least fp32, whatever the dtype of its weights, and never in TF32."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Maps `input` (..., in_features) to (..., out_features) in fp32, or in fp64 if the weights are fp64."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        # There is no TF32 in products of fp64, and these are small.
        exact = torch.float64 if input.device.type in ("cpu", "cuda") and _is_tf32_allowed() else dtype
        return F.linear(input.to(exact), self.weight.to(exact), self.bias.to(exact)).to(dtype)


class DoDModelMixin(StrictConfigMixin, ModelMixin, ConfigMixin):
    """
    Base class of both models: `ModelMixin` and `ConfigMixin` with stricter loading and cleaner saving.

    - Loading raises where Diffusers would warn and go on with random weights.
    - Saved configs lack the local path that the model was loaded from.
    - The layers in `_skip_quantization_modules` are never quantized.
    """

    _skip_quantization_modules: list[str] = []
    _has_compiled_blocks = False

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """
        Loads a config as `ConfigMixin.load_config` does.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A folder or a repository on the Hub.
            args, kwargs: Passed on.

        Raises:
            `ValueError`: the config belongs to another class.
        """
        loaded = super().load_config(pretrained_model_name_or_path, *args, **kwargs)
        found = (loaded[0] if isinstance(loaded, tuple) else loaded).get("_class_name")
        if found is not None and found not in {base.__name__ for base in cls.__mro__}:
            raise ValueError(
                f"`pretrained_model_name_or_path` must hold a `{cls.__name__}`, "
                f"got {str(pretrained_model_name_or_path)!r}, whose config is that of a `{found}`."
            )
        return loaded

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any):
        """
        Loads a model as `ModelMixin.from_pretrained` does, in evaluation mode.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A folder or a repository on the Hub.
            kwargs: Passed on: `subfolder`, `dtype`, `variant`, `device_map`, `quantization_config`, ... Incomplete
                weights are accepted with `ignore_mismatched_sizes=True` or `output_loading_info=True`, as the caller
                then knows of them.

        Raises:
            `OSError`: there is no such folder or repository, or a file is missing or cannot be read.
            `ValueError`: the weights belong to another model, or to a checkpoint of a training that is damaged.
        """
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "").absolute()
        if folder.is_dir() and (folder.parent / CHECKPOINT_MANIFEST).is_file():
            check_checkpoint("pretrained_model_name_or_path", folder.parent, [folder.name])
        for path in sorted(folder.glob("*.safetensors")):
            check_safetensors_header(path)
        wants_info = kwargs.pop("output_loading_info", False)
        quantization_config = kwargs.get("quantization_config")
        if quantization_config is not None and cls._skip_quantization_modules:
            kwargs["quantization_config"] = cls._skip_in(quantization_config)
        expected = f"`pretrained_model_name_or_path` must hold the config and the weights of a `{cls.__name__}`"
        try:
            model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        except (OSError, ValueError) as error:
            kind = OSError if isinstance(error, OSError) else ValueError
            if kind is ValueError and not str(error).startswith("Cannot load"):  # another argument is wrong
                raise
            raise kind(f"{expected}, got {str(pretrained_model_name_or_path)!r}: {_reason(error)}") from error
        missing, unexpected = info["missing_keys"], info["unexpected_keys"]
        if (missing or unexpected) and not (wants_info or kwargs.get("ignore_mismatched_sizes", False)):
            raise ValueError(
                f"{expected}, got {str(pretrained_model_name_or_path)!r}, where {len(missing)} weights are missing "
                f"({abbreviate(sorted(missing), 3)}) and {len(unexpected)} are unknown "
                f"({abbreviate(sorted(unexpected), 3)})."
            )
        return (model, info) if wants_info else model

    @classmethod
    def _skip_in(cls, quantization_config: Any) -> Any:
        """Copies `quantization_config` and adds `_skip_quantization_modules` to the layers that it skips."""
        quantization_config = copy.deepcopy(quantization_config)
        values = quantization_config if isinstance(quantization_config, dict) else vars(quantization_config)
        is_bitsandbytes = (
            "bitsandbytes" in str(values.get("quant_method")).lower() or "llm_int8_skip_modules" in values
        )
        name = "llm_int8_skip_modules" if is_bitsandbytes else "modules_to_not_convert"
        given = values.get(name) or []
        given = [given] if isinstance(given, str) else list(given)
        values[name] = list(dict.fromkeys([*given, *cls._skip_quantization_modules]))
        return quantization_config

    def compile_repeated_blocks(self, *args: Any, recompile_limit: int = RECOMPILE_LIMIT, **kwargs: Any) -> None:
        """
        Compiles the repeated blocks as `ModelMixin.compile_repeated_blocks` does, for more kinds of batches.

        All blocks of a model share their graphs. Batches without priors, with one, some or all of them have graphs of
        their own, and so have the first sizes, before sizes become symbols. With PyTorch's own limit of 8, blocks
        would silently run without compilation from the ninth kind of batch on.

        Args:
            args: Passed on to `torch.compile`.
            recompile_limit (`int`, defaults to 64): Number of graphs of the blocks. Older versions of PyTorch have one
                limit for all that is compiled, which is raised to it.
            kwargs: Passed on to `torch.compile`.
        """
        if "recompile_limit" in inspect.signature(torch.compile).parameters:
            kwargs["recompile_limit"] = recompile_limit
        else:
            torch._dynamo.config.recompile_limit = max(recompile_limit, torch._dynamo.config.recompile_limit)
        super().compile_repeated_blocks(*args, **kwargs)
        self._has_compiled_blocks = True

    def _for_blocks(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """A copy for compiled blocks, which would be compiled once more for the view that a Linear returns."""
        return hidden_states.clone() if self._has_compiled_blocks else hidden_states

    def register_to_config(self, **kwargs: Any) -> None:
        """
        Adds entries to the config as `ConfigMixin.register_to_config` does, and marks them as chosen.

        `from_config` drops entries that were defaults of the constructor. Entries that were set later must stay,
        and so must positional arguments, which Diffusers takes for defaults.

        Args:
            kwargs: The entries.
        """
        super().register_to_config(**to_plain(kwargs))
        defaults = self._internal_dict.get("_use_default_values", [])
        if "_use_default_values" in kwargs:  # from the constructor
            parameters = inspect.signature(type(self).__init__).parameters
            chosen = {name for name, value in parameters.items() if value.default != self._internal_dict.get(name)}
        else:
            chosen = set(kwargs)
        if not chosen.isdisjoint(defaults):
            super().register_to_config(_use_default_values=[name for name in defaults if name not in chosen])

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        save_function: Callable | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Saves the model as `ModelMixin.save_pretrained` does, such that it can be loaded from the folder.

        Args:
            save_directory (`str` or `os.PathLike`): The folder. It is made if needed.
            is_main_process (`bool`, defaults to `True`): Whether this process is the one that writes.
            save_function (`Callable`, *optional*): Writes a file in place of the library.
            safe_serialization (`bool`, defaults to `True`): Whether to write safetensors.
            variant (`str`, *optional*): Part of the names of the files, such as `fp16`.
            kwargs: Passed on: `max_shard_size`, `push_to_hub`, ...

        Raises:
            `ValueError`: the model has adapters in its layers, so that its weights have other names.
        """
        if adapters := sorted(getattr(self, "peft_config", None) or {}):
            raise ValueError(
                f"`{type(self).__name__}` must have no adapters to be saved, got {abbreviate(adapters)}: save them "
                "alone, or fuse them and call `unload_lora_weights` or `unload_lora`."
            )
        if is_main_process:  # the index of shards that were there before would be believed
            weights = SAFETENSORS_WEIGHTS_NAME if safe_serialization else WEIGHTS_NAME
            Path(save_directory, _add_variant(f"{weights}.index.json", variant)).unlink(missing_ok=True)
        super().save_pretrained(
            save_directory,
            is_main_process=is_main_process,
            save_function=save_function,
            safe_serialization=safe_serialization,
            variant=variant,
            **kwargs,
        )

    def save_config(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """
        Saves the config as `ConfigMixin.save_config` does, without the local path that the model was loaded from.

        Args:
            save_directory (`str` or `os.PathLike`): Folder of `config.json`.
            args, kwargs: Passed on.
        """
        with without_local_paths([self]):
            super().save_config(save_directory, *args, **kwargs)
