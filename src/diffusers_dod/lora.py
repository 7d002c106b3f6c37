# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""LoRA adapters of a whole pipeline: one file for the backbone, the latent embedder or both."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LoraBaseMixin, _fetch_state_dict
from diffusers.utils import USE_PEFT_BACKEND
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open

from .checkpoint_manifest import ADAPTER, CHECKPOINT_MANIFEST, check_checkpoint
from .records import check_safetensors_header, parse_json


CLASSES = "classes"  # in front of the names of classes, among the metadata of adapters


def find_lora_file(lora_weights: str | os.PathLike) -> Path:
    """
    Finds the file of LoRA adapters.

    Args:
        lora_weights (`str` or `os.PathLike`): A folder with `pytorch_lora_weights.safetensors`, a safetensors file, or
            a repository on the Hub.

    Returns:
        `Path`: The file.

    Raises:
        `OSError`: there is no such folder, file or repository.
        `ValueError`: the folder has no such file or is a damaged checkpoint, or the file is no safetensors file.
    """
    wanted = f"`lora_weights` must be a folder or a repository on the Hub with {ADAPTER}, or a safetensors file"
    path = Path(lora_weights)
    if path.is_dir():
        if not (path / ADAPTER).is_file():
            raise ValueError(f"{wanted}, got {str(path)!r} without any.")
        if (path / CHECKPOINT_MANIFEST).is_file():
            check_checkpoint("lora_weights", path)
        path = path / ADAPTER
    elif not path.is_file():
        try:
            path = Path(hf_hub_download(str(lora_weights), ADAPTER))
        except (OSError, ValueError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise OSError(f"{wanted}, got {str(lora_weights)!r}, which is none here: {reason}") from error
    check_safetensors_header(path)
    return path


def read_lora_classes(file: Path) -> tuple[int | None, dict[str, str] | None]:
    """
    Reads which classes LoRA adapters are of, as far as their file says it.

    Args:
        file (`Path`): The file, from [`find_lora_file`].

    Returns:
        `tuple[int | None, dict[str, str] | None]`: Number of the classes, and their names by id.

    Raises:
        `ValueError`: the file is no safetensors file, or its metadata are damaged.
    """
    table = f"{DoDLoraLoaderMixin.transformer_name}.class_embed.lora_embedding_A"
    try:
        with safe_open(file, framework="pt") as weights:
            metadata = parse_json((weights.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}").encode())
            number = weights.get_slice(table).get_shape()[1] - 1 if table in weights.keys() else None
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"`lora_weights` must be an undamaged safetensors file, got {file}: {error}") from error
    names = metadata.get(f"{CLASSES}.id2label") if isinstance(metadata, dict) else None
    if not isinstance(names, (dict, type(None))):
        raise ValueError(f"`lora_weights` must name classes by their ids, got {names!r} in {file}.")
    return len(names) if names and number is None else number, names


def adapts(file: Path, component: str) -> bool:
    """
    Tells whether LoRA adapters change a component of a pipeline.

    Args:
        file (`Path`): The file, from [`find_lora_file`].
        component (`str`): Name of the component.

    Returns:
        `bool`.

    Raises:
        `ValueError`: the file is no safetensors file.
    """
    try:
        with safe_open(file, framework="pt") as weights:
            return any(name.startswith(f"{component}.") for name in weights.keys())
    except SafetensorError as error:
        raise ValueError(f"`lora_weights` must be an undamaged safetensors file, got {file}: {error}") from error


class DoDLoraLoaderMixin(LoraBaseMixin):
    """
    Loads, saves and fuses LoRA adapters of a [`DoDPipeline`]; needs the PEFT library.

    Names of parameters start with their component: `transformer.` or `latent_embedder.`.
    """

    _lora_loadable_modules = ["transformer", "latent_embedder"]
    transformer_name = "transformer"
    latent_embedder_name = "latent_embedder"

    @classmethod
    def lora_state_dict(
        cls,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        return_lora_metadata: bool = False,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor] | tuple[dict[str, torch.Tensor], dict | None]:
        """
        Reads the weights of an adapter.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict`):
                A folder, a file or a repository on the Hub, or the weights themselves.
            return_lora_metadata (`bool`, defaults to `False`): Whether to return the adapter's configuration too.
            kwargs: `weight_name`, `subfolder`, `revision`, `token`, `cache_dir`, `force_download`, `proxies`,
                `local_files_only` and `use_safetensors`. If `use_safetensors` is not given and there is no safetensors
                file, Diffusers' older `.bin` files are read by `torch.load(weights_only=True)`.

        Returns:
            `dict`, or a tuple with the metadata.

        Raises:
            `ValueError`: a weight is not a LoRA weight.
        """
        use_safetensors = kwargs.pop("use_safetensors", None)
        state_dict, metadata = _fetch_state_dict(
            pretrained_model_name_or_path_or_dict=pretrained_model_name_or_path_or_dict,
            weight_name=kwargs.pop("weight_name", None),
            use_safetensors=True if use_safetensors is None else use_safetensors,
            local_files_only=kwargs.pop("local_files_only", None),
            cache_dir=kwargs.pop("cache_dir", None),
            force_download=kwargs.pop("force_download", False),
            proxies=kwargs.pop("proxies", None),
            token=kwargs.pop("token", None),
            revision=kwargs.pop("revision", None),
            subfolder=kwargs.pop("subfolder", None),
            user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
            allow_pickle=use_safetensors is None,
        )
        foreign = sorted(key for key in state_dict if "lora" not in key)
        if foreign or not state_dict:
            raise ValueError(
                "`pretrained_model_name_or_path_or_dict` must hold LoRA weights, with 'lora' in their names, "
                f"got {foreign[:3] or 'none'}."
            )
        return (state_dict, metadata) if return_lora_metadata else state_dict

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Adds an adapter to the components that it has weights for, and activates it.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict`): As in `lora_state_dict`.
            adapter_name (`str`, *optional*): Name of the adapter; `"default_0"`, `"default_1"`, ... if not given.
            hotswap (`bool`, defaults to `False`): Whether to replace the weights of the adapter of that name in place.
            kwargs: As in `lora_state_dict`, and `low_cpu_mem_usage`.

        Raises:
            `ValueError`: PEFT is missing, a weight is not a LoRA weight, the pipeline lacks a component, or it has
                another number of classes.
        """
        if not USE_PEFT_BACKEND:
            raise ValueError("`load_lora_weights` needs the PEFT library: pip install peft.")
        low_cpu_mem_usage = kwargs.pop("low_cpu_mem_usage", False)
        state_dict, metadata = self.lora_state_dict(
            pretrained_model_name_or_path_or_dict, return_lora_metadata=True, **kwargs
        )
        prefixes = {key.split(".")[0] for key in state_dict}
        # Weights of other models are left to the backbone, which reports that it found none of its own.
        names = [name for name in self._lora_loadable_modules if name in prefixes] or [self.transformer_name]
        absent = [name for name in names if getattr(self, name) is None]
        if absent:
            raise ValueError(
                "`pretrained_model_name_or_path_or_dict` must hold LoRA weights for the components of this pipeline, "
                f"got some for `{absent[0]}`, which it has not."
            )
        table = state_dict.get(f"{self.transformer_name}.class_embed.lora_embedding_A")
        num_classes = self.transformer.config.num_classes
        if table is not None and table.shape[1] != num_classes + 1:
            raise ValueError(
                "`pretrained_model_name_or_path_or_dict` must hold LoRA weights for the classes of this pipeline, "
                f"{num_classes}, got some for {table.shape[1] - 1}: load its transformer with "
                f"`num_classes={table.shape[1] - 1}` first."
            )
        for name in names:
            getattr(self, name).load_lora_adapter(
                state_dict,
                prefix=name,
                adapter_name=adapter_name,
                metadata=metadata,
                hotswap=hotswap,
                low_cpu_mem_usage=low_cpu_mem_usage,
                _pipeline=self,
            )

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike,
        transformer_lora_layers: dict[str, torch.Tensor] | None = None,
        latent_embedder_lora_layers: dict[str, torch.Tensor] | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable | None = None,
        safe_serialization: bool = True,
        transformer_lora_adapter_metadata: dict | None = None,
        latent_embedder_lora_adapter_metadata: dict | None = None,
        id2label: Mapping[int | str, str] | None = None,
    ) -> None:
        """
        Saves the adapters of one or both components as one file.

        Args:
            save_directory (`str` or `os.PathLike`): The folder. It is made if needed.
            transformer_lora_layers (`dict[str, torch.Tensor]`, *optional*):
                The adapter of the backbone, from `peft.get_peft_model_state_dict`.
            latent_embedder_lora_layers (`dict[str, torch.Tensor]`, *optional*): The adapter of the latent embedder.
            is_main_process (`bool`, defaults to `True`): Whether this process is the one that writes.
            weight_name (`str`, *optional*): File name, `pytorch_lora_weights.safetensors` by default.
            save_function (`Callable`, *optional*): Writes the file in place of the safetensors library.
            safe_serialization (`bool`, defaults to `True`): Whether to write safetensors.
            transformer_lora_adapter_metadata (`dict`, *optional*):
                Configuration of the backbone's adapter, `transformer.peft_config["default"].to_dict()`. Without it
                the scale of the adapter, `lora_alpha / r`, is lost, with a warning.
            latent_embedder_lora_adapter_metadata (`dict`, *optional*):
                Configuration of the latent embedder's adapter.
            id2label (`Mapping[int | str, str]`, *optional*):
                Names of the classes of the adapters, for commands that load them. By default those of the pipeline
                that they are loaded into.

        Raises:
            `ValueError`: no adapter was given.
        """
        layers = {
            cls.transformer_name: transformer_lora_layers,
            cls.latent_embedder_name: latent_embedder_lora_layers,
        }
        metadata = {
            cls.transformer_name: transformer_lora_adapter_metadata,
            cls.latent_embedder_name: latent_embedder_lora_adapter_metadata,
        }
        layers = {name: weights for name, weights in layers.items() if weights}
        if not layers:
            raise ValueError("`transformer_lora_layers` or `latent_embedder_lora_layers` must be given, got neither.")
        if unknown := [name for name in layers if metadata[name] is None]:
            warnings.warn(
                f"`{unknown[0]}_lora_adapter_metadata` is not given: once loaded, the scale of the adapter is 1, "
                "whatever its `lora_alpha` and `r`.",
                stacklevel=2,
            )
        names = {} if id2label is None else {CLASSES: {"id2label": {str(key): id2label[key] for key in id2label}}}
        cls._save_lora_weights(
            save_directory=save_directory,
            lora_layers=layers,
            lora_metadata={name: metadata[name] for name in layers} | names,
            is_main_process=is_main_process,
            weight_name=weight_name,
            save_function=save_function,
            safe_serialization=safe_serialization,
        )

    def fuse_lora(
        self,
        components: Sequence[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Adds the adapters to the weights, so that they no longer cost compute.

        Args:
            components (`Sequence[str]`, *optional*): Names of the components. By default all that have adapters.
            lora_scale (`float`, defaults to 1.0): Scale of the adapters.
            safe_fusing (`bool`, defaults to `False`): Whether to refuse weights with NaN.
            adapter_names (`list[str]`, *optional*): The adapters. By default all active ones.
            kwargs: Passed on.
        """
        components = self._components_with_adapters() if components is None else list(components)
        super().fuse_lora(
            components=components,
            lora_scale=lora_scale,
            safe_fusing=safe_fusing,
            adapter_names=adapter_names,
            **kwargs,
        )

    def unfuse_lora(self, components: Sequence[str] | None = None, **kwargs: Any) -> None:
        """
        Undoes `fuse_lora`.

        Args:
            components (`Sequence[str]`, *optional*): Names of the components. By default all that have adapters.
            kwargs: Passed on.
        """
        components = self._components_with_adapters() if components is None else list(components)
        super().unfuse_lora(components=components, **kwargs)

    def _components_with_adapters(self) -> list[str]:
        names = [name for name in self._lora_loadable_modules if getattr(getattr(self, name), "peft_config", None)]
        return names or [self.transformer_name]
