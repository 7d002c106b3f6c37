# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Options of the demo, the settings that its page has at first, and the link that holds those of a visitor."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from ..checks import shown
from ..evaluation.gallery import FIXED_SOLVERS, MAX_SCALE, Limits, Settings
from ..evaluation.options import DESK_CHECKPOINT, device_option, load_pipeline, lora_weights_option
from ..options import from_values, list_options, option, to_values
from ..pipeline_dod import DoDPipeline
from ..results import CheckpointIdentity, identify_checkpoint


MAX_TEXT = 1000  # characters of a value in a link
OF_ONE_MODE = {"num_between": "between", "grid_scales": "grid", "first_scales": "grid"}


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Options of the command that serves the demo."""

    checkpoint: str = option(DESK_CHECKPOINT, help="Pipeline (folder or Hub id); this one comes with the package.")
    lora_weights: str | None = lora_weights_option()
    device: str = device_option()
    host: str = option("127.0.0.1", help="Address to listen at; 0.0.0.0 is every one of the machine.")
    port: int = option(7860, at_least=0, at_most=65535, help="Port to listen at; 0 is any that is free.")
    share: bool = option(False, help="Whether Gradio makes a public link, through a server of its own.")
    limits: Limits = field(default_factory=Limits)


def open_pipeline(options: DemoOptions) -> tuple[DoDPipeline, CheckpointIdentity]:
    """
    Loads the pipeline of the demo.

    Args:
        options ([`DemoOptions`]): The options.

    Returns:
        `tuple[DoDPipeline, CheckpointIdentity]`: The pipeline, and what visitors may know of it: no path.

    Raises:
        `OSError`, `ValueError`, `ImportError`: see [`load_pipeline`].
    """
    pipe = load_pipeline(options.checkpoint, options.lora_weights).to(options.device)
    identity = identify_checkpoint(options.checkpoint, options.lora_weights)
    for part in (identity, identity.get("lora_weights")):
        if part is not None and part["path"] != DESK_CHECKPOINT and Path(part["path"]).exists():
            part["path"] = Path(part["path"]).resolve().name
    return pipe, identity


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
    first_scale = min(config.default_first_stage_guidance_scale, MAX_SCALE)
    scales = (first_scale, *[scale] * min(num_stages - 1, limits.max_stages)) if has_priors else (scale,)
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
