# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Options of commands for guidance, made of the fields of `Guidance`. Manifests and cards use the same names."""

import dataclasses
from collections.abc import Mapping
from typing import Any, get_type_hints

from .checks import attempt
from .guidance import NULL_CONDITIONS, Guidance
from .options import option, to_values


# Options whose names do not start with `guidance_`.
_OTHER_NAMES = {"null_condition": "null_condition", "prior_scale": "prior_guidance_scale"}
#: Name of an option -> the field of [`Guidance`] that it sets. The weaker model is an object, so it has no option.
GUIDANCE_FIELDS = {
    _OTHER_NAMES.get(field.name, f"guidance_{field.name}"): field
    for field in dataclasses.fields(Guidance)
    if field.name != "transformer"
}


def build_guidance(values: Mapping[str, Any]) -> Guidance:
    """
    Builds the guidance that options describe.

    Args:
        values (`Mapping[str, Any]`): Values of options by name. A missing option has its default.

    Returns:
        [`Guidance`].

    Raises:
        `TypeError`, `ValueError`: see [`Guidance`]; the message names the options.
    """
    try:
        return Guidance(**{field.name: values[name] for name, field in GUIDANCE_FIELDS.items() if name in values})
    except (TypeError, ValueError) as error:
        message = str(error)
        for name, field in GUIDANCE_FIELDS.items():
            message = message.replace(f"`{field.name}`", f"`{name}`")
        raise type(error)(message) from error


class _ToGuidance:
    """Methods of [`GuidanceOptions`]."""

    def to_guidance(self) -> Guidance:
        """Returns the [`Guidance`] that the options describe. Raises a `ValueError` or `TypeError` as it does."""
        return build_guidance(to_values(self))

    def find_conflicts(self) -> list[str]:
        """Messages about options that are out of range or do not fit each other."""
        errors: list[str] = []
        attempt(errors, self.to_guidance)
        return errors


def guidance_option(name: str) -> Any:
    """
    Declares an option for guidance in a dataclass of options.

    Args:
        name (`str`): Name of the option, a key of `GUIDANCE_FIELDS`.

    Returns:
        `dataclasses.Field` with default, help and choices of the field of [`Guidance`].
    """
    field = GUIDANCE_FIELDS[name]
    choices = tuple(NULL_CONDITIONS) if field.name == "null_condition" else None
    return option(field.default, choices=choices, **field.metadata)


# Its fields come from those of `Guidance`, so type checkers do not see them: read them by `to_guidance`.
GuidanceOptions = dataclasses.make_dataclass(
    "GuidanceOptions",
    [(name, get_type_hints(Guidance)[field.name], guidance_option(name)) for name, field in GUIDANCE_FIELDS.items()],
    bases=(_ToGuidance,),
    namespace={
        "__doc__": "Guidance.\n\nSettings of `Guidance`, see docs/sampling.md.",
        "__module__": __name__,
    },
    frozen=True,
    kw_only=True,
)
