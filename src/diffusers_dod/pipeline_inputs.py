# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Inputs of the DoD pipeline: components that fit together, class names, images and visual priors, noise."""

import difflib
import heapq
import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from PIL import Image

from .autoencoders import Autoencoder, check_autoencoder, check_image_size, latent_channels, spatial_factor
from .checks import (
    MAX_CLASSES,
    MAX_SIDE,
    MAX_STEPS,
    check_at_least,
    check_number,
    check_tensor,
    check_type,
    shown,
)
from .image_reading import cover_and_crop, to_image, to_pixels
from .latent_embedding import VisualPriorMixin, check_visual_prior
from .records import MAX_DIGITS
from .stages import LARGEST, find_sound, is_a
from .token_prior import TokenPrior
from .transformer_dod import DoDTransformer2DModel


def check_components(
    transformer: DoDTransformer2DModel | None,
    scheduler: SchedulerMixin,
    vae: Autoencoder | None,
    latent_embedder: VisualPriorMixin | None,
    token_prior: TokenPrior | None = None,
) -> None:
    """
    Raises unless the components of a pipeline have the right classes and fit together.

    Args:
        transformer ([`DoDTransformer2DModel`] or `None`): The backbone.
        scheduler (`SchedulerMixin`): The scheduler.
        vae ([`Autoencoder`] or `None`): The autoencoder.
        latent_embedder ([`VisualPriorMixin`] or `None`): The latent embedder.
        token_prior ([`TokenPrior`], *optional*): The generator of latent tokens.

    Raises:
        `TypeError`: a component has another class.
        `ValueError`: two components do not fit together.
    """
    components = {
        "transformer": (transformer, "DoDTransformer2DModel"),
        "latent_embedder": (latent_embedder, "VisualPriorMixin"),
        "token_prior": (token_prior, "TokenPrior"),
    }
    for name, (component, expected) in components.items():
        if component is not None and not is_a(component, expected):
            received = type(component).__name__ if isinstance(component, torch.nn.Module) else repr(component)
            raise TypeError(f"`{name}` must be of type {expected}, got {received}.")
    if vae is not None:
        check_autoencoder("vae", vae)
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
        check_visual_prior(latent_embedder, transformer)
    if token_prior is not None and token_prior.config.num_classes != config.num_classes:
        raise ValueError(
            f"`token_prior` must have the transformer's `num_classes` = {config.num_classes}, "
            f"got {token_prior.config.num_classes}."
        )
    if None not in (token_prior, latent_embedder) and token_prior.token_shape != latent_embedder.token_shape:
        raise ValueError(
            f"`token_prior` must have tokens of shape {latent_embedder.token_shape}, the latent embedder's, "
            f"got {token_prior.token_shape}."
        )


def check_id2label(id2label: dict | None, num_classes: int | None) -> dict[int, str]:
    """
    Checks names of classes by id, and turns ids that JSON has made strings into integers.

    Args:
        id2label (`dict` or `None`): Class id -> name. Commas separate several names of one class.
        num_classes (`int` or `None`): Number of classes. `None` accepts any number.

    Returns:
        `dict[int, str]`: The names by integer id, in the order of the ids; empty if there are no names.

    Raises:
        `TypeError`, `ValueError`: the value is no dictionary, an id is out of range or given twice, or a name is
            empty.
    """
    if id2label is None:
        return {}
    check_type("id2label", id2label, dict)
    checked: dict[int, str] = {}
    end = MAX_CLASSES if num_classes is None else num_classes
    for key, name in id2label.items():
        text = str(key)
        known = text.isdecimal() and len(text) <= MAX_DIGITS and int(text) < end and int(text) not in checked
        if not known or not isinstance(name, str) or not all(part.strip() for part in name.split(",")):
            raise ValueError(
                f"`id2label` must map ids in [0, {end - 1}], each once, to names (str, not empty), "
                f"got {shown(key)}: {shown(name)}."
            )
        checked[int(key)] = name
    return dict(sorted(checked.items()))


def invert_id2label(id2label: dict[int, str]) -> dict[str, list[int]]:
    """Inverts `id2label`: gives the list of ids that carry each name, in its composed form (NFC)."""
    label2ids: dict[str, list[int]] = {}
    for key, names in id2label.items():
        for name in {names: None, **dict.fromkeys(name.strip() for name in names.split(","))}:
            label2ids.setdefault(unicodedata.normalize("NFC", name), []).append(key)
    return label2ids


def to_label_ids(
    class_labels: int | str | Sequence[int | str | None] | torch.Tensor | None,
    label2ids: dict[str, list[int]],
    num_classes: int,
) -> list[int]:
    """
    Converts class labels of any form to a list of ids.

    Args:
        class_labels (`int`, `str`, `list`, `torch.Tensor` or `None`): Ids or names; `None` is the null class.
        label2ids (`dict[str, list[int]]`): Class name -> ids that carry it.
        num_classes (`int`): Number of classes. It is also the id of the null class.

    Returns:
        `list[int]`: One id per label.

    Raises:
        `TypeError`, `ValueError`: a label has another type, is out of range or unknown, or fits several ids.
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
    elif class_labels is None or isinstance(class_labels, (int, str, np.integer)):
        class_labels = [class_labels]
    elif not isinstance(class_labels, (list, tuple)):
        raise TypeError(
            "`class_labels` must be an int, a str, None (the null class), a list of them or a tensor, "
            f"got {shown(class_labels)} of type {type(class_labels).__name__}."
        )
    if len(class_labels) == 0:
        raise ValueError(f"`class_labels` must hold at least one label, got {shown(class_labels)}.")
    return [_to_label_id(label, label2ids, num_classes) for label in class_labels]


def _find_similar(label: str, names: Iterable[str]) -> list[str]:
    """Finds up to five names like `label`, among the hundred with most of its pairs of letters: difflib is slow."""
    pairs = {label[i : i + 2] for i in range(len(label))}
    likely = heapq.nlargest(100, names, key=lambda name: (sum(pair in name for pair in pairs), -len(name)))
    return difflib.get_close_matches(label, likely, n=5, cutoff=0.4)


def _to_label_id(label: Any, label2ids: dict[str, list[int]], num_classes: int) -> int:
    if label is None:
        return num_classes
    if isinstance(label, str):
        ids = label2ids.get(unicodedata.normalize("NFC", label), [])
        if len(ids) > 1:
            raise ValueError(
                f"`class_labels` has the name {shown(label)}, which fits the ids {ids}: pass one of them."
            )
        if not ids:
            close = _find_similar(label, label2ids) or list(label2ids)[:5]
            raise ValueError(
                f"`class_labels` must be among the {len(label2ids)} names in `label2ids`"
                f"{', such as ' + ', '.join(map(repr, close)) if close else ''}, got {shown(label)}."
            )
        return ids[0]
    if isinstance(label, (torch.Tensor, np.ndarray)) and label.ndim == 0:
        label = label.item()
    elif isinstance(label, (list, tuple)) and len(label) == 1:  # a column of labels
        return _to_label_id(label[0], label2ids, num_classes)
    if isinstance(label, bool) or not isinstance(label, (int, np.integer)):
        raise TypeError(
            f"`class_labels` must be integers or names, got {shown(label)} of type {type(label).__name__}."
        )
    if not 0 <= label < num_classes:
        null = " (the null class, `None` in a list)" if label == num_classes else ""
        raise ValueError(f"`class_labels` must be in [0, {num_classes - 1}], got {shown(label)}{null}.")
    return int(label)


def _take_as_it_is(image: Any, shape: tuple[int, int, int]) -> torch.Tensor | None:
    """Converts an array or a tensor of this shape (C, H, W) to pixels in [-1, 1]; `None` for anything else."""
    if not isinstance(image, (np.ndarray, torch.Tensor)) or image.ndim != 3:
        return None
    tensor = image if isinstance(image, torch.Tensor) else torch.tensor(image.copy()).permute(2, 0, 1)
    is_known = tensor.dtype == torch.uint8 or (
        tensor.is_floating_point() and bool(((tensor >= 0) & (tensor <= 1)).all())
    )
    if tuple(tensor.shape) != shape or not is_known:
        return None
    return VaeImageProcessor.normalize(tensor.float() / 255 if tensor.dtype == torch.uint8 else tensor.float())


def _read_pixels(image: Any, shape: tuple[int, int, int]) -> torch.Tensor:
    """Reads one image as pixels of this shape (C, H, W) in [-1, 1]."""
    if (pixels := _take_as_it_is(image, shape)) is not None:
        return pixels
    channels, height, width = shape
    name = repr(os.fspath(image)) if isinstance(image, (str, os.PathLike)) else "another"
    try:
        opened = to_image(image)
    except (OSError, Image.DecompressionBombError) as error:
        if getattr(error, "filename", None) is not None:  # of a file that is missing or forbidden
            raise
        raise ValueError(f"`image` must be one that can be read, got {name}: {error}") from error
    if channels != 3:
        raise ValueError(
            f"`image` must be an array or a tensor of {channels} channels and {height} x {width} pixels, in uint8 or "
            f"in floats in [0, 1], got {shown(image)}."
        )
    try:
        cropped = cover_and_crop(opened, height, width)
    except (ValueError, OSError, Image.DecompressionBombError) as error:  # a file is decoded here
        raise ValueError(f"`image` must be one that can be read and cropped, got {name}: {error}") from error
    return to_pixels(torch.from_numpy(cropped)[None])[0]


def preprocess_image(
    image: PipelineImageInput | str | os.PathLike, batch_size: int | None, shape: tuple[int, int, int]
) -> torch.Tensor:
    """
    Converts images of a visual prior to pixels, scaled and cropped as for training by [`cover_and_crop`].

    Numbers that have the shape already are taken as they are, without rounding floats to 8 bits.

    Args:
        image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, `str`, `os.PathLike` or a list of them):
            The images, see [`to_image`]; arrays and tensors may have a first dimension more, for a batch.
        batch_size (`int` or `None`): Number of labels. There must be one image, or as many; `None` accepts any number.
        shape (`tuple[int, int, int]`): Channels, height and width of the result. Only 3 channels are scaled.

    Returns:
        `torch.Tensor` of shape `(n, C, H, W)`: Pixels in [-1, 1], on the CPU.

    Raises:
        `TypeError`, `ValueError`: the number of images, or the type, shape or range of one, does not fit.
        `OSError`: a file cannot be read.
    """
    entries = list(image) if isinstance(image, (list, tuple)) else [image]
    images: list[Any] = []
    for entry in entries:
        is_batch = isinstance(entry, (np.ndarray, torch.Tensor)) and entry.ndim == 4
        images += list(entry) if is_batch else [entry]
    if not images or (batch_size is not None and len(images) not in (1, batch_size)):
        number = "at least one image" if batch_size is None else f"1 or {batch_size} images (one per label)"
        raise ValueError(f"`image` must hold {number}, got {len(images)}.")
    return torch.stack([_read_pixels(entry, shape).cpu() for entry in images])


def _check_sound_tensor(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    check_tensor(name, tensor, shape)
    if not bool(find_sound(tensor).all()):
        bad = tensor[~(tensor.abs() <= LARGEST)][:5].tolist()  # NaN compares false
        found = ", ".join(f"{number:.6g}" for number in bad)
        raise ValueError(f"`{name}` must hold finite numbers of at most {LARGEST} in size, got {found}.")


def check_prior(
    name: str, prior: torch.Tensor, num_labels: int | None, latent_embedder: VisualPriorMixin | None
) -> None:
    """
    Raises unless there are latents or latent tokens for one visual prior, or for one per label.

    Args:
        name (`str`): Name of the argument, `"prior_tokens"` for tokens.
        prior (`torch.Tensor`): The value received.
        num_labels (`int` or `None`): Number of labels. `None` accepts any number of latents.
        latent_embedder ([`VisualPriorMixin`] or `None`): The model that makes a prior of the value.

    Raises:
        `TypeError`, `ValueError`: the value has another type, shape or range, or there is no latent embedder.
    """
    check_type(name, prior, torch.Tensor)
    if latent_embedder is None:
        raise ValueError(f"`{name}` must be None without a `latent_embedder`, got shape {tuple(prior.shape)}.")
    if num_labels is None:
        num_labels = prior.shape[0] if prior.ndim > 0 else 1
    config = latent_embedder.config
    if name == "prior_tokens":
        expected = latent_embedder.token_shape
    else:
        expected = (config.in_channels, *prior.shape[2:])
        if prior.ndim != 4 or 0 in prior.shape or any(side % config.patch_size for side in prior.shape[2:]):
            raise ValueError(
                f"`{name}` must have shape (1 or {num_labels}, {config.in_channels}, height, width) with sides "
                f"that are multiples of {config.patch_size}, got {tuple(prior.shape)}."
            )
    if prior.ndim == 0 or prior.shape[0] not in (1, num_labels):
        raise ValueError(
            f"`{name}` must have shape (1 or {num_labels}, {', '.join(map(str, expected))}), got {tuple(prior.shape)}."
        )
    _check_sound_tensor(name, prior, (prior.shape[0], *expected))


@dataclass(frozen=True)
class GivenPrior:
    """
    Argument of a call that takes the place of stage 1's sample.

    Args:
        name (`str`): Name of the argument: `"image"`, `"prior_latents"` or `"prior_tokens"`.
        value (`torch.Tensor`): Pixels in [-1, 1], latents or latent tokens.
    """

    name: str
    value: torch.Tensor


def check_token_settings(
    use_token_prior: bool,
    token_prior: TokenPrior | None,
    latent_embedder: VisualPriorMixin | None,
    prior: GivenPrior | None,
    **settings: int | float | None,
) -> dict[str, Any]:
    """
    Checks the arguments of a call that concern the token prior, and returns the settings that are given.

    Args:
        use_token_prior (`bool`): Whether the token prior takes the place of stage 1.
        token_prior ([`TokenPrior`] or `None`): The generator of latent tokens.
        latent_embedder ([`VisualPriorMixin`] or `None`): The latent embedder, which makes a visual prior of tokens.
        prior ([`GivenPrior`] or `None`): Another argument that takes the place of stage 1.
        settings (`int`, `float` or `None`): Arguments of [`TokenPrior.generate`]; `None` is the default.

    Returns:
        `dict[str, Any]`: The settings that are not `None`.

    Raises:
        `ValueError`, `TypeError`: a component is missing, or an argument is out of range or does not fit the others.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if not use_token_prior:
        for name, value in given.items():
            raise ValueError(f"`token_prior_{name}` must be None without `use_token_prior`, got {shown(value)}.")
        return {}
    for name, component in {"token_prior": token_prior, "latent_embedder": latent_embedder}.items():
        if component is None:
            raise ValueError(f"`use_token_prior` must be False without a `{name}`, got True.")
    if prior is not None:
        raise ValueError(f"Only one of `{prior.name}` and `use_token_prior` must be given, got both.")
    for name, value in given.items():
        if name == "num_inference_steps":
            check_at_least(f"token_prior_{name}", value, 1, MAX_STEPS)
        else:
            check_number(f"token_prior_{name}", value, 0, *([1] if name == "truncation" else []))
    return given


def find_image_size(
    height: int | None,
    width: int | None,
    transformer: DoDTransformer2DModel,
    vae: Autoencoder | None,
    prior: GivenPrior | None = None,
) -> tuple[int, int]:
    """
    Finds the size of the images of a call. By default it is that of given latents, else the trained size.

    Args:
        height (`int` or `None`): The height asked for, in pixels.
        width (`int` or `None`): The width asked for.
        transformer ([`DoDTransformer2DModel`]): The model.
        vae ([`Autoencoder`] or `None`): The autoencoder.
        prior ([`GivenPrior`], *optional*): What takes the place of stage 1's sample.

    Returns:
        `tuple[int, int]`: Height and width in pixels.

    Raises:
        `TypeError`, `ValueError`: a size is out of range, is not that of given latents, or none that the autoencoder
            takes.
    """
    factor = 1 if vae is None else spatial_factor(vae)
    multiple = factor * transformer.config.patch_size
    sizes = {"height": height, "width": width}
    for name, size in sizes.items():
        if size is not None:
            check_at_least(name, size, 1, MAX_SIDE)
            if size % multiple:
                raise ValueError(
                    f"`{name}` must be a multiple of {multiple} pixels (the autoencoder's factor {factor} times "
                    f"`patch_size`), got {size}."
                )
    default = [transformer.config.sample_size * factor] * 2
    if prior is not None and prior.name == "prior_latents":
        default = [side * factor for side in prior.value.shape[2:]]
        for (name, size), side in zip(sizes.items(), default, strict=True):
            if size not in (None, side):
                raise ValueError(f"`{name}` must be None or that of `{prior.name}`, {side}, got {size}.")
    height, width = default[0] if height is None else int(height), default[1] if width is None else int(width)
    if vae is not None:
        check_image_size(vae, height, width)
    return height, width


def check_noise_source(
    generator: torch.Generator | list[torch.Generator] | None,
    seed: int | None,
    sample_indices: Sequence[int] | None,
    batch_size: int,
) -> Sequence[int]:
    """
    Checks the arguments that determine the noise: they must be in range and fit together.

    Args:
        generator (`torch.Generator`, `list[torch.Generator]` or `None`): One generator, or `batch_size` generators.
        seed (`int` or `None`): Seed of at least 0. It excludes a generator.
        sample_indices (`Sequence[int]` or `None`): `batch_size` indices of at least 0, also as an array or a tensor.
            They need a seed.
        batch_size (`int`): Number of images of the first stage.

    Returns:
        `Sequence[int]`: The index of each image; 0, 1, ... by default.

    Raises:
        `TypeError`, `ValueError`: an argument has another type or value.
    """
    if seed is not None:
        check_at_least("seed", seed, 0)
        if generator is not None:
            raise ValueError(f"Only one of `generator` and `seed` must be given, got {generator} and {shown(seed)}.")
    if sample_indices is not None:
        if seed is None:
            raise ValueError(f"`sample_indices` must be None without a `seed`, got {shown(sample_indices)}.")
        check_type("sample_indices", sample_indices, (list, tuple, range, np.ndarray, torch.Tensor))
        if isinstance(sample_indices, (np.ndarray, torch.Tensor)):
            sample_indices = sample_indices.tolist() if sample_indices.ndim > 0 else [sample_indices.item()]
        if len(sample_indices) != batch_size:
            raise ValueError(
                f"`sample_indices` must hold {batch_size} integers (one per image), got {len(sample_indices)}."
            )
        for index in sample_indices:
            check_at_least("sample_indices", index, 0)
    for name, values in (("seed", [seed or 0]), ("sample_indices", sample_indices or [])):
        if max(values, default=0) >= 2**64:
            raise ValueError(f"`{name}` must be an integer >= 0 and < 2**64, got {shown(max(values))}.")
    if generator is not None:
        for entry in generator if isinstance(generator, list) else [generator]:
            check_type("generator", entry, torch.Generator)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` must be one generator or a list of {batch_size} (one per label), "
                f"got a list of {len(generator)}."
            )
    return range(batch_size) if sample_indices is None else sample_indices


def check_noises(
    latents: torch.Tensor | list[torch.Tensor] | None, shapes: list[tuple[int, ...]]
) -> list[torch.Tensor | None]:
    """
    Checks the given noise of the stages of a call.

    Args:
        latents (`torch.Tensor`, `list[torch.Tensor]` or `None`): Noise of the first stage, or of each stage.
        shapes (`list[tuple[int, ...]]`): Shape of the noise of each stage.

    Returns:
        `list[torch.Tensor | None]`: The noise of each stage; `None` if it is to be drawn.

    Raises:
        `TypeError`, `ValueError`: the number of noises, or the type or shape of one, does not fit.
    """
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
        _check_sound_tensor("latents", entry, shape)
    return list(latents) + [None] * (len(shapes) - len(latents))


def check_replacement(name: str, tensor: torch.Tensor | None, current: torch.Tensor | None) -> None:
    """Raises a `ValueError` unless a callback's new `tensor` of this `name` is like the `current` one."""
    shapes = [None if value is None else tuple(getattr(value, "shape", ())) for value in (tensor, current)]
    if not isinstance(tensor, (torch.Tensor, type(None))) or shapes[0] != shapes[1]:
        received = f"shape {shapes[0]}" if isinstance(tensor, torch.Tensor) else repr(tensor)
        raise ValueError(f"`callback_on_step_end` must return `{name}` of shape {shapes[1]}, got {received}.")
    if tensor is not None and tensor.is_floating_point() != current.is_floating_point():
        raise ValueError(f"`callback_on_step_end` must return `{name}` like {current.dtype}, got {tensor.dtype}.")
