# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Loading and saving of a DoD pipeline."""

import os
from pathlib import Path
from typing import Any, Self

from diffusers.configuration_utils import ConfigMixin, FrozenDict
from huggingface_hub.errors import HFValidationError

from .checkpoint_manifest import CHECKPOINT_MANIFEST, check_checkpoint
from .latent_embedding import list_visual_prior_classes
from .modeling_utils import without_local_paths
from .records import FileName, StrictConfigMixin, check_record


class DoDPipelineLoadingMixin(StrictConfigMixin):
    """Loads a [`DoDPipeline`] with errors that name the missing part, and saves it without local paths."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self:
        """
        Loads a pipeline as `DiffusionPipeline.from_pretrained` does.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A folder or a repository on the Hub.
            kwargs: Passed on: components and sampling defaults that replace the saved ones (`None` leaves a component
                out), `dtype`, `variant`, `device_map`, `local_files_only`, `revision`, ...

        Raises:
            `OSError`: there is no such folder or repository, or a file is missing or cannot be read.
            `ValueError`: the files belong to something else, or they are a checkpoint of a training that is damaged.
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
    def _get_signature_types(cls) -> dict[str, tuple[type, ...]]:
        """Types of the components. `from_pipe` keeps a model only if its very class is among them."""
        types = super()._get_signature_types()
        return {**types, "latent_embedder": (*types["latent_embedder"], *list_visual_prior_classes())}

    @classmethod
    def _not_found(cls, path: str | os.PathLike, reason: str) -> str:
        return (
            f"`pretrained_model_name_or_path` must be a folder with a {cls.config_name} or a repository on the Hub, "
            f"got {str(path)!r}, {reason}"
        )

    @classmethod
    def _check_folder(cls, path: str, given: dict[str, Any]) -> None:
        """
        Raises an `OSError` unless the folder has an index, and a folder for each component that is not `given`; a
        `ValueError` if it is a checkpoint of a training that is damaged.
        """
        index_file = os.path.join(path, cls.config_name)
        if not os.path.isfile(index_file):
            raise OSError(cls._not_found(path, "which has none."))
        try:
            index = cls._dict_from_json_file(index_file)
            check_record([name for name, entry in index.items() if isinstance(entry, list)], list[FileName], "index")
        except ValueError as error:
            raise OSError(f"{index_file} must be JSON: {error}") from error
        if os.path.isfile(os.path.join(path, CHECKPOINT_MANIFEST)):
            parts = [cls.config_name, *(name for name in index if name not in given)]
            check_checkpoint("pretrained_model_name_or_path", Path(path), parts)
        for name, entry in index.items():
            is_component = (
                isinstance(entry, list) and name != "_class_name" and len(entry) == 2 and entry[0] is not None
            )
            if is_component and name not in given and not os.path.isdir(os.path.join(path, name)):
                raise OSError(
                    f"`pretrained_model_name_or_path` must hold a folder for each component in {cls.config_name}, "
                    f"got {path!r} without `{name}` ({entry[1]})."
                )

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """
        Saves the pipeline as `DiffusionPipeline` does, without the local paths that it was loaded from.

        Args:
            save_directory (`str` or `os.PathLike`): The folder. It is made if needed.
            args, kwargs: Passed on: `safe_serialization`, `variant`, `max_shard_size`, `push_to_hub`, ...
        """
        components = [component for component in self.components.values() if isinstance(component, ConfigMixin)]
        with without_local_paths([self, *components]):
            if self.token_prior is None:  # versions without this component load the pipeline, too
                config = {name: value for name, value in self._internal_dict.items() if name != "token_prior"}
                self._internal_dict = FrozenDict(config)
            super().save_pretrained(save_directory, *args, **kwargs)
