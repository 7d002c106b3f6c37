# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Checks of public arguments: every message names the argument, the accepted range and the value received."""

import math
import re
import reprlib
import sys
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch


# Upper ends of arguments that have no natural one: beyond them a call would run out of memory, or never end.
MAX_SIZE = 32768  # widths, sides in latents, and numbers of tokens
MAX_SIDE = 65536  # pixels of a side of an image
MAX_CLASSES = 1_000_000
MAX_STEPS = 1_000_000  # of a solver
MAX_SHIFT = 1000  # of times towards noise
MAX_IMAGES = 1_000_000  # of a call


class _Repr(reprlib.Repr):
    def __init__(self):
        super().__init__()
        self.maxlevel = 4
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdict = self.maxarray = 20
        self.maxstring = self.maxother = 300

    def repr_int(self, value: int, level: int) -> str:
        return repr(value) if value.bit_length() < 256 else f"an integer of {value.bit_length()} bits"


def hide_secrets(text: str) -> str:
    """Replaces in a message, `text`, what looks like a token of the Hugging Face Hub or a password in an address."""
    text = re.sub(r"\b(hf|api)_(?=[A-Za-z]*[0-9A-Z])[A-Za-z0-9]{8,}", r"\1_...", text)
    return re.sub(r"(://[^/\s:@]*):[^/\s@]+@", r"\1:...@", text)


def shown(value: Any) -> str:
    """The text of a `value` in a message: never longer than a few lines, and without tokens."""
    return hide_secrets(_Repr().repr(value))


def check_type(name: str, value: Any, types: type | tuple[type, ...]) -> None:
    """
    Raises a `TypeError` that names the argument `name` unless `value` has one of `types`. A bool is no number here.
    """
    types = types if isinstance(types, tuple) else (types,)
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        names = {Integral: "int", Real: "int or float"}  # NumPy's numbers count as well
        accepted = " or ".join(names.get(type_, type_.__name__) for type_ in types)
        raise TypeError(f"`{name}` must be of type {accepted}, got {shown(value)} of type {type(value).__name__}.")


def to_plain(values: dict[str, Any]) -> dict[str, Any]:
    """Converts NumPy's numbers among the `values` of a config to those of Python, which JSON can hold."""
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}


def check_at_least(name: str, value: Any, minimum: int, maximum: int | None = None) -> None:
    """
    Raises unless an argument is an integer of at least `minimum`, and at most `maximum` if that is given.

    Args:
        name (`str`): Name of the argument, for the message.
        value (`Any`): The value received.
        minimum (`int`): The least value accepted.
        maximum (`int`, *optional*): The largest value accepted.

    Raises:
        `TypeError`: the value is no integer.
        `ValueError`: the value is out of range.
    """
    check_type(name, value, Integral)
    if maximum is not None and value > maximum:
        raise ValueError(f"`{name}` must be an integer in [{minimum}, {maximum}], got {shown(value)}.")
    if value < minimum:
        raise ValueError(f"`{name}` must be an integer >= {minimum}, got {shown(value)}.")


def check_number(
    name: str,
    value: Any,
    minimum: float,
    maximum: float = math.inf,
    open_minimum: bool = False,
    open_maximum: bool = False,
) -> None:
    """
    Raises unless an argument is a finite number within an interval.

    Args:
        name (`str`): Name of the argument, for the message.
        value (`Any`): The value received.
        minimum (`float`): Lower end of the interval.
        maximum (`float`, defaults to `math.inf`): Upper end of the interval. Infinity itself is never accepted.
        open_minimum (`bool`, defaults to `False`): Whether the lower end is excluded.
        open_maximum (`bool`, defaults to `False`): Whether the upper end is excluded.

    Raises:
        `TypeError`: the value is no number.
        `ValueError`: the value is outside the interval or not finite.
    """
    check_type(name, value, Real)
    above = value > minimum if open_minimum else value >= minimum
    below = value < maximum if open_maximum else value <= maximum
    is_finite = abs(value) <= sys.float_info.max if isinstance(value, int) else math.isfinite(value)
    if not (is_finite and above and below):
        opening = "(" if open_minimum else "["
        closing = ")" if open_maximum or maximum == math.inf else "]"
        raise ValueError(
            f"`{name}` must be a finite number in {opening}{minimum}, {maximum}{closing}, got {shown(value)}."
        )


def check_tensor(name: str, value: Any, shape: Sequence[int | None] | None = None) -> None:
    """
    Raises unless an argument is a tensor of floating-point numbers.

    Args:
        name (`str`): Name of the argument, for the message.
        value (`Any`): The value received.
        shape (`Sequence[int | None]`, *optional*):
            Lengths of its dimensions; `None` stands for any of at least 1. By default they are not checked.

    Raises:
        `TypeError`: the value is no tensor, or one of other numbers.
        `ValueError`: the shape does not match.
    """
    check_type(name, value, torch.Tensor)
    if not value.is_floating_point():
        raise TypeError(f"`{name}` must hold floating-point numbers, got {value.dtype}.")
    if shape is None:
        return
    lengths = zip(value.shape, shape, strict=False)
    if value.ndim != len(shape) or any(has == 0 if wants is None else has != wants for has, wants in lengths):
        wanted = ", ".join("any" if wants is None else str(wants) for wants in shape)
        raise ValueError(f"`{name}` must have shape ({wanted}), got {tuple(value.shape)}.")


def check_latents(name: str, latents: torch.Tensor, in_channels: int, patch_size: int) -> None:
    """
    Raises unless an argument is a batch of latents that can be cut into patches.

    Args:
        name (`str`): Name of the argument, for the message.
        latents (`torch.Tensor`): The tensor received. Its shape must be `(B, in_channels, H, W)`.
        in_channels (`int`): Number of channels.
        patch_size (`int`): Side of a patch. H and W must be positive multiples of it.

    Raises:
        `TypeError`: the argument is no tensor of floating-point numbers.
        `ValueError`: the shape does not match.
    """
    check_tensor(name, latents)
    if latents.ndim != 4 or latents.shape[1] != in_channels:
        raise ValueError(
            f"`{name}` must have shape (batch, {in_channels}, height, width), got {tuple(latents.shape)}."
        )
    height, width = latents.shape[2:]
    if height == 0 or width == 0 or height % patch_size or width % patch_size:
        raise ValueError(
            f"The height and width of `{name}` must be positive multiples of `patch_size` = {patch_size}, "
            f"got {height} x {width}."
        )


def check_label_ids(name: str, labels: torch.Tensor, num_classes: int) -> None:
    """
    Raises unless labels are ids of classes or of the null class; this waits for their device.

    Args:
        name (`str`): Name of the argument, for the message.
        labels (`torch.Tensor` of shape `(B,)`): The ids.
        num_classes (`int`): Number of classes, and the id of the null class.

    Raises:
        `ValueError`: an id is out of range.
    """
    is_bad = (labels < 0) | (labels > num_classes)
    if bool(is_bad.any()):
        raise ValueError(f"`{name}` must be in [0, {num_classes}], got {labels[is_bad].tolist()[:5]}.")


def check_device(name: str, value: Any) -> None:
    """Raises a `ValueError` that names the argument `name` unless `value` names a kind of device, or is `None`."""
    try:
        torch.device("cpu" if value is None else value)
    except (RuntimeError, TypeError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"`{name}` must be a device of PyTorch, got {shown(value)}: {reason}") from error


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises a `ValueError` that names the argument `name` unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {shown(value)}.")


def attempt(errors: list[str], check: Callable, *arguments: Any, **kwargs: Any) -> None:
    """
    Calls a check and collects the message of its error, so that all errors can be reported at once.

    Args:
        errors (`list[str]`): List that gets the message of a `TypeError` or a `ValueError`.
        check (`Callable`): The check.
        arguments (`Any`): Arguments of the check.
        kwargs (`Any`): Keyword arguments of the check.
    """
    try:
        check(*arguments, **kwargs)
    except (TypeError, ValueError) as error:
        errors.append(str(error))


def abbreviate(names: Sequence[str], number: int = 5) -> str:
    """Lists the first `number` of `names` in a message, and says how many more there are."""
    return ", ".join(names[:number]) + (f" and {len(names) - number} more" if len(names) > number else "")
