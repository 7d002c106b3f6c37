# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Checks of public arguments: every message names the argument, the accepted range and the value received."""

import math
import re
import reprlib
import sys
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any


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
    text = re.sub(r"\b(hf|api)_[A-Za-z0-9_]{3,}", r"\1_...", text)
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
    if not (abs(value) <= sys.float_info.max and above and below):  # `isfinite` takes no integer of 400 digits
        opening = "(" if open_minimum else "["
        closing = ")" if open_maximum or maximum == math.inf else "]"
        raise ValueError(
            f"`{name}` must be a finite number in {opening}{minimum}, {maximum}{closing}, got {shown(value)}."
        )


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
