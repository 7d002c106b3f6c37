# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Settings of a visitor of the demo, the link that holds them, and the limits of the server."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

from ..checks import check_at_least, check_number, shown
from ..evaluation.options import device_option
from ..options import check_options, from_values, list_options, option, to_values
from ..pipeline_dod import DoDPipeline
from ..tableaus import SOLVERS


MODES = ("classes", "variations", "between", "grid")
FIXED_SOLVERS = tuple(name for name, solver in SOLVERS.items() if not solver.is_adaptive)
MAX_TEXT = 1000  # characters of a value in a link
MAX_SCALE = 20.0
OF_ONE_MODE = {"num_between": "between", "grid_scales": "grid", "first_scales": "grid"}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The most that a visitor may ask for at once. The server checks it, whatever the page allows."""

    max_stages: int = option(4, at_least=1, at_most=8, help="Stages.")
    max_inference_steps: int = option(100, at_least=1, help="Steps of a stage.")
    max_images: int = option(32, at_least=1, help="Images of the last stage.")
    max_batch_size: int = option(16, at_least=1, help="Images at a time; more are drawn one batch after the other.")
    max_size_factor: float = option(2.0, at_least=1, help="Sides of an image, as a multiple of the trained ones.")
    max_upload_mb: int = option(20, at_least=1, help="Megabytes of a photo.")
    max_megapixels: int = option(50, at_least=1, help="Millions of pixels of a photo.")
    max_waiting: int = option(50, at_least=1, help="Visitors who wait for their turn; others are sent away.")


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Options of the command that serves the demo."""

    checkpoint: str | None = option(
        None, help="The pipeline (folder or Hub id); by default the one that comes with the package."
    )
    device: str = device_option()
    host: str = option("127.0.0.1", help="Address to listen at; 0.0.0.0 is every one of the machine.")
    port: int = option(7860, at_least=0, at_most=65535, help="Port to listen at; 0 is any that is free.")
    share: bool = option(False, help="Whether Gradio makes a public link, through a server of its own.")
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that the images of a visitor depend on, but for the photos."""

    mode: str = option("classes", choices=MODES, help="What is drawn.")
    classes: tuple[int, ...] = option((0,), at_least=0, is_distinct=True, help="Ids of the classes.")
    num_images: int = option(4, at_least=1, help="Images of each class.")
    num_between: int = option(6, at_least=2, help="Images from one start to the other.")
    num_stages: int = option(2, at_least=1, help="Number of stages.")
    steps: int = option(20, at_least=1, help="Intervals of a stage.")
    solver: str = option("euler", choices=FIXED_SOLVERS, help="Solver of all stages.")
    scales: tuple[float, ...] = option((1.0, 3.0), at_least=0, at_most=MAX_SCALE, help="Guidance scale of each stage.")
    grid_scales: tuple[float, ...] = option(
        (1.0, 2.0, 3.0, 5.0, 8.0), at_least=0, at_most=MAX_SCALE, is_distinct=True, help="Columns of the grid."
    )
    first_scales: tuple[float, ...] | None = option(
        None,
        at_least=0,
        at_most=MAX_SCALE,
        is_distinct=True,
        help="Guidance scales of stage 1, a row of the grid each.",
    )
    size: int | None = option(None, at_least=1, help="Side of the images in pixels; the trained one by default.")
    seed: int = option(0, at_least=0, below=2**32, help="Seed of the noise.")


def check_settings(settings: Settings, limits: Limits, pipe: DoDPipeline) -> None:
    """
    Raises unless settings are in range, fit the pipeline and are within the limits of the server.

    Args:
        settings ([`Settings`]): The settings of a visitor.
        limits ([`Limits`]): The limits.
        pipe ([`DoDPipeline`]): The pipeline.

    Raises:
        `ValueError`, `TypeError`: they are not; the message is for the visitor.
    """
    for name, known in list_options(Settings).items():
        if known.default is not None and getattr(settings, name) is None:
            raise ValueError(f"`{name}` must be given, got None.")
    check_options(settings)
    num_classes = pipe.transformer.config.num_classes
    for label in settings.classes:
        check_at_least("classes", label, 0, num_classes - 1)
    most = limits.max_stages if pipe.latent_embedder is not None else 1
    check_at_least("num_stages", settings.num_stages, 1, most)
    if settings.mode in ("variations", "between"):
        check_at_least("num_stages", settings.num_stages, 2, most)
    if len(settings.scales) != settings.num_stages:
        raise ValueError(f"`scales` must hold one for each of {settings.num_stages} stages, got {settings.scales}.")
    check_at_least("steps", settings.steps, 1, limits.max_inference_steps)
    if settings.size is not None:
        largest = trained_size(pipe) * limits.max_size_factor
        check_number("size", settings.size, 1, largest)
    if (total := count_images(settings)) > limits.max_images:
        raise ValueError(f"This server draws at most {limits.max_images} images at once, got {total}.")


def count_images(settings: Settings) -> int:
    """Number of images of the last stage that `settings` ask for."""
    if settings.mode == "between":
        return settings.num_between
    columns = len(settings.grid_scales) * len(settings.first_scales or (1,)) if settings.mode == "grid" else 1
    return len(settings.classes) * settings.num_images * columns


def trained_size(pipe: DoDPipeline) -> int:
    """Side in pixels of the images that a pipeline, `pipe`, was trained on."""
    return pipe.transformer.config.sample_size * pipe.vae_scale_factor


def default_settings(pipe: DoDPipeline, limits: Limits, **values: Any) -> Settings:
    """
    Finds the settings that the page has at first.

    Args:
        pipe ([`DoDPipeline`]): The pipeline, whose own defaults they are.
        limits ([`Limits`]): The limits of the server, which they keep.
        values (`Any`): Settings that are known already.

    Returns:
        [`Settings`]: The settings, which may still be out of range if `values` are.
    """
    config, num_classes = pipe.config, pipe.transformer.config.num_classes
    has_priors = pipe.latent_embedder is not None
    num_stages = values.get("num_stages", min(config.default_num_stages, limits.max_stages) if has_priors else 1)
    solver = pipe.scheduler.config.get("solver", "euler")
    scale = min(config.default_guidance_scale, MAX_SCALE)
    scales = (1.0, *[scale] * min(num_stages - 1, limits.max_stages)) if has_priors else (scale,)
    defaults = {
        "classes": tuple(sorted({num_classes // 3, num_classes // 2}))[: limits.max_images],
        "num_images": 1 if limits.max_images < 4 else 2,
        "num_between": max(2, min(6, limits.max_images)),
        "num_stages": num_stages,
        "steps": min(config.default_num_inference_steps, limits.max_inference_steps),
        "solver": solver if solver in FIXED_SOLVERS else "euler",
        "scales": scales,
    }
    return from_values(Settings, defaults | values)


# --------------------------------------------------------------------------------------------------------------- link


def to_query(settings: Settings) -> str:
    """Writes what `settings` of a mode depend on as the query of a link: `?mode=classes&classes=5,7&...`"""
    values = {
        name: value
        for name, value in to_values(settings).items()
        if value is not None and OF_ONE_MODE.get(name, settings.mode) == settings.mode
    }
    texts = {
        name: ",".join(map(_to_text, value)) if isinstance(value, tuple) else _to_text(value)
        for name, value in values.items()
    }
    return "?" + urlencode(texts, safe=",")


def _to_text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def from_query(query: Mapping[str, str]) -> dict[str, Any]:
    """
    Reads the settings in the query of a link; names that are none of a setting are ignored.

    Args:
        query (`Mapping[str, str]`): The names and texts of the query.

    Returns:
        `dict`: Values of the settings by name, whose range is not checked yet.

    Raises:
        `ValueError`: a text is too long, or no number where one is needed.
    """
    known, values = list_options(Settings), {}
    for name, text in query.items():
        if name not in known:
            continue
        if len(text) > MAX_TEXT:
            raise ValueError(f"`{name}` of the link must have at most {MAX_TEXT} characters, got {len(text)}.")
        if known[name].nargs is None:
            values[name] = _parse(name, text, known[name].type)
        else:
            values[name] = parse_numbers(name, text, known[name].type)
    return values


def parse_numbers(name: str, text: str, kind: type = float) -> tuple[Any, ...]:
    """
    Reads numbers that commas or spaces separate.

    Args:
        name (`str`): Name of the setting, for the message.
        text (`str`): The text.
        kind (`type`, defaults to `float`): Type of a number.

    Returns:
        `tuple`: The numbers.

    Raises:
        `ValueError`: a word is none.
    """
    return tuple(_parse(name, word, kind) for word in text.replace(",", " ").split())


def _parse(name: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        kinds = {int: "an integer", float: "a number"}
        raise ValueError(f"`{name}` must be {kinds[kind]}, got {shown(text)}.") from error
