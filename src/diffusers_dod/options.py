# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Options of a command, declared once: a field of a dataclass has type, default, help and range of an option.

    @dataclass(frozen=True, kw_only=True)
    class AverageOptions:
        \"""Averages of the weights.\"""

        ema_decay: tuple[float, ...] = option((0.999,), at_least=0, at_most=1, help="Decay of each average.")

    @dataclass(frozen=True, kw_only=True)
    class TrainingOptions:
        average: AverageOptions = field(default_factory=AverageOptions)

    options = parse_options(TrainingOptions)  # --ema_decay 0.9 0.99
    options.average.ema_decay  # (0.9, 0.99)

A field of type `bool` is a flag, which `--no-NAME` switches off again; without a default it may also be `None`, for
what the command decides. A tuple takes several values, and a field whose type is such a dataclass is a group.
Names of options are those of fields, without that of their group: no two groups of a command share one. A method
`find_conflicts` of a dataclass may return messages about options that do not fit each other.
"""

import argparse
import dataclasses
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from .checks import attempt, check_at_least, check_choice, check_number, check_type, hide_secrets, shown
from .files import check_output
from .records import read_yaml
from .shipped import find_recipe


T = TypeVar("T")

DEBUG = "--debug"  # of every command, see `run_main`


@dataclass(frozen=True, kw_only=True)
class Option:
    """
    An option apart from its name, type and default, which are those of its field.

    Args:
        help (`str`): Text in `--help`, to which the default is added.
        choices (`Collection[str]`, *optional*): Accepted values.
        at_least (`float`, *optional*): Lower end of the accepted numbers, which is one of them.
        above (`float`, *optional*): Lower end of the accepted numbers, which is none of them.
        at_most (`float`, *optional*): Upper end of the accepted numbers, which is one of them.
        below (`float`, *optional*): Upper end of the accepted numbers, which is none of them.
        is_distinct (`bool`, defaults to `False`): Whether several values must differ from each other.
        check (`Callable`, *optional*): Raises unless it accepts name and value.
        writes (`str`, *optional*): `"file"` or `"folder"` if the value is one that the command writes.
        suffix (`str`, defaults to `""`): End of the name of that file, such as `.npz`.
        needs (`str`, *optional*): Name of another option, without which this one must not be given.
        excludes (`str`, *optional*): Name of another option, with which this one must not be given.
        nargs (`str`, *optional*): Number of values in the words of `argparse`, if the type does not tell it.
        metavar (`tuple[str, ...]`, *optional*): Names of the values in `--help`.
        aliases (`tuple[str, ...]`, defaults to `()`): Other names, such as older ones, which commands and recipes may
            use; one of a single letter has a single dash.
        is_positional (`bool`, defaults to `False`): Whether the value comes without the name.
        is_recipe (`bool`, defaults to `False`): Whether the value is a file of more options, see [`read_recipe`].
        is_private (`bool`, defaults to `False`): Whether published recipes go without it.
        is_place (`bool`, defaults to `False`): Whether they go without it where it is a path of this machine.
        is_secret (`bool`, defaults to `False`): Whether nothing but the command itself may see it.
        is_free (`bool`, defaults to `False`): Whether a resumed training may have another value: no step depends on
            it, or what it names is compared itself.
        is_trust (`bool`, defaults to `False`): Whether it is a flag of trust, which recipes must not hold.
        names_code (`Callable`, *optional*): Whether a value names code. That of a recipe needs a flag of trust.
    """

    help: str
    choices: Collection[str] | None = None
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    is_distinct: bool = False
    check: Callable[[str, Any], None] | None = None
    writes: str | None = None
    suffix: str = ""
    needs: str | None = None
    excludes: str | None = None
    nargs: str | None = None
    metavar: tuple[str, ...] | None = None
    aliases: tuple[str, ...] = ()
    is_positional: bool = False
    is_recipe: bool = False
    is_private: bool = False
    is_place: bool = False
    is_secret: bool = False
    is_free: bool = False
    is_trust: bool = False
    names_code: Callable[[Any], bool] | None = None


def option(default: Any = MISSING, **description: Any) -> Any:
    """
    Declares an option.

    Args:
        default (`Any`, defaults to `MISSING`): Default of the option; without one the option must be given.
        description (`Any`): Arguments of [`Option`].

    Returns:
        `dataclasses.Field` of a dataclass of options.
    """
    return dataclasses.field(default=default, metadata={"option": Option(**description)})


@dataclass(frozen=True)
class OptionField:
    """
    An option of a command, read from a field.

    Args:
        name (`str`): Name of the option.
        type (`type`): Type of a single value.
        nargs (`str`, `int` or `None`): Number of values in the words of `argparse`; `None` for one.
        default (`Any`): Default, `dataclasses.MISSING` if the option must be given.
        option ([`Option`]): All else.
    """

    name: str
    type: type
    nargs: str | int | None
    default: Any
    option: Option

    def find_errors(self, value: Any) -> list[str]:
        """All that is wrong with a `value`, whatever other options are; `None` is always accepted."""
        errors: list[str] = []
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        for single in values:
            attempt(errors, self._check, single)
        if self.nargs == "+" and value == ():
            errors.append(f"`{self.name}` must hold at least one value, got none.")
        if self.option.is_distinct and len(set(values)) < len(values):
            errors.append(f"`{self.name}` must hold different values, got {list(values)}.")
        if self.option.check is not None and value is not None:
            attempt(errors, self.option.check, self.name, value)
        if self.option.writes is not None:
            is_folder = self.option.writes == "folder"
            attempt(errors, check_output, self.name, value, is_folder=is_folder, suffix=self.option.suffix)
        return errors

    def _check(self, value: Any) -> None:
        """Raises unless a single value is one of the choices or in the range."""
        option = self.option
        minimum = option.at_least if option.above is None else option.above
        maximum = option.at_most if option.below is None else option.below
        if option.choices is not None:
            check_choice(self.name, value, tuple(option.choices))
        elif self.type is int and (minimum, maximum) == (option.at_least, None):
            check_type(self.name, value, Integral)
            if minimum is not None:
                check_at_least(self.name, value, minimum)
            if abs(value) >= 2**63:
                raise ValueError(f"`{self.name}` must be an integer below 2^63, got {shown(value)}.")
        elif self.type in (int, float):
            check_number(
                self.name,
                value,
                minimum=-math.inf if minimum is None else minimum,
                maximum=math.inf if maximum is None else maximum,
                open_minimum=option.above is not None,
                open_maximum=option.below is not None,
            )


def _read_type(hint: Any) -> tuple[type, str | int | None]:
    """Type of a single value and number of values: `tuple[float, ...] | None` is `float` and `+`."""
    if isinstance(hint, types.UnionType):
        (hint,) = (part for part in typing.get_args(hint) if part is not types.NoneType)
    if typing.get_origin(hint) is tuple:
        single, *others = typing.get_args(hint)
        return single, "+" if others == [...] else 1 + len(others)
    return hint, None


def _list_fields(kind: type) -> Iterator[tuple[str, type | OptionField]]:
    """Name of each field of a dataclass and, in order, its group or its option."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if is_dataclass(hint):
            yield field.name, hint
        else:
            option = field.metadata["option"]
            single, nargs = _read_type(hint)
            yield field.name, OptionField(field.name, single, option.nargs or nargs, field.default, option)


def list_options(kind: type) -> dict[str, OptionField]:
    """
    Lists the options of a command.

    Args:
        kind (`type`): A dataclass of options.

    Returns:
        `dict[str, OptionField]`: The options of the dataclass and of its groups, by name.

    Raises:
        `TypeError`: two options have the same name.
    """
    found: dict[str, OptionField] = {}
    for name, part in _list_fields(kind):
        own = {name: part} if isinstance(part, OptionField) else list_options(part)
        if twice := found.keys() & own.keys():
            raise TypeError(f"Options must have different names, got {', '.join(sorted(twice))} twice in {kind}.")
        found |= own
    return found


def to_values(options: Any) -> dict[str, Any]:
    """Values of `options`, a dataclass, and of its groups, by name."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        values |= to_values(value) if is_dataclass(value) else {field.name: value}
    return values


def to_json(value: Any) -> Any:
    """Returns a `value` of an option, or values by name, in the form of JSON: tuples are lists, paths are texts."""
    if isinstance(value, Mapping):
        return {name: to_json(entry) for name, entry in value.items()}
    if isinstance(value, tuple):
        return list(map(to_json, value))
    return str(value) if isinstance(value, Path) else value


def find_given(options: Any) -> dict[str, Any]:
    """Values of those `options`, a dataclass, and of its groups, that differ from their defaults, by name."""
    known = list_options(type(options))
    return {name: value for name, value in to_values(options).items() if value != known[name].default}


def from_values(kind: type[T], values: Mapping[str, Any]) -> T:
    """
    Makes options out of their values.

    Args:
        kind (`type`): A dataclass of options.
        values (`Mapping[str, Any]`): Values by name, of whatever group; a list is taken for a tuple.

    Returns:
        `kind`, with defaults for all that has no value.

    Raises:
        `TypeError`: a name is of no option, or an option without a default has no value.
    """
    known = list_options(kind)
    if unknown := sorted(values.keys() - known.keys()):
        raise TypeError(f"Options must be among {', '.join(known)}, got {', '.join(unknown)}.")
    arguments: dict[str, Any] = {}
    for name, part in _list_fields(kind):
        if not isinstance(part, OptionField):
            own = list_options(part)
            arguments[name] = from_values(part, {key: value for key, value in values.items() if key in own})
        elif name in values:
            arguments[name] = tuple(values[name]) if isinstance(values[name], list) else values[name]
    return kind(**arguments)


def check_types(kind: type, values: Mapping[str, Any]) -> None:
    """
    Raises unless values of options, which come from a file in JSON, have the types of the options.

    Args:
        kind (`type`): A dataclass of options.
        values (`Mapping[str, Any]`): Values by name; others than those of options are not looked at.

    Raises:
        `TypeError`: a value has another type.
    """
    types = {float: Real, int: Integral, Path: str}
    for name, known in list_options(kind).items():
        if name in values and not (values[name] is None and known.default is None):
            entries = [values[name]] if known.nargs is None else values[name]
            check_type(name, entries, list)
            for entry in entries:
                check_type(name, entry, types.get(known.type, known.type))


def replace_values(options: T, **values: Any) -> T:
    """Returns `options`, a dataclass, with other `values` of some options, of whatever group."""
    return from_values(type(options), to_values(options) | values)


# ------------------------------------------------------------------------------------------------------------ errors


def find_errors(options: Any) -> list[str]:
    """
    Finds all that is wrong with options, as far as they tell themselves.

    Args:
        options (`Any`): A dataclass of options.

    Returns:
        `list[str]`: A message for each option that is out of range or does not fit another one.
    """
    known, values, given = list_options(type(options)), to_values(options), find_given(options)
    errors: list[str] = []
    for name, field in known.items():
        errors += field.find_errors(values[name])
        needed, excluded = field.option.needs, field.option.excludes
        if name in given and needed in known and needed not in given:
            errors.append(f"`{name}` must be given with `{needed}` only, got {values[name]}.")
        if name in given and excluded in given:
            errors.append(
                f"`{name}` and `{excluded}` must not both be given, got {values[name]} and {values[excluded]}."
            )
    return errors + _find_conflicts(options)


def _find_conflicts(options: Any) -> list[str]:
    found = list(options.find_conflicts()) if hasattr(options, "find_conflicts") else []
    for field in dataclasses.fields(options):
        if is_dataclass(group := getattr(options, field.name)):
            found += _find_conflicts(group)
    return found


def check_options(options: Any) -> None:
    """
    Raises unless options are in range and fit each other.

    Args:
        options (`Any`): A dataclass of options.

    Raises:
        `ValueError`: they are not; the message names all that is wrong.
    """
    if errors := find_errors(options):
        raise ValueError("\n".join(errors))


# ------------------------------------------------------------------------------------------------------ command line


class _Parser(argparse.ArgumentParser):
    """Parser that says what is wrong, and where the usage is, without the usage of a hundred options."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with exit code 2; of the processes of a machine, which fail alike, one says why."""
        is_first = int(os.environ.get("LOCAL_RANK") or 0) == 0
        message = f"{self.prog}: error: {hide_secrets(message)}\nSee {self.prog} --help.\n"
        self.exit(2, message if is_first else None)


def build_parser(kind: type, description: str | None = None) -> argparse.ArgumentParser:
    """
    Makes a parser of options.

    Args:
        kind (`type`): A dataclass of options. Docstrings of its groups are the headings in `--help`.
        description (`str`, *optional*): Text at the head of `--help`.

    Returns:
        `argparse.ArgumentParser`, which takes no abbreviations.
    """
    list_options(kind)  # refuses names that come twice
    parser = _Parser(
        description=description,
        epilog=f"{DEBUG} shows the traceback of an error, too.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_options(parser, kind)
    return parser


def _add_options(parser: argparse._ActionsContainer, kind: type) -> None:
    for _, part in _list_fields(kind):
        if isinstance(part, OptionField):
            _add_option(parser, part)
        else:
            title, _, text = (part.__doc__ or "").strip().partition("\n")
            _add_options(parser.add_argument_group(title.rstrip("."), " ".join(text.split()) or None), part)


def _add_option(parser: argparse._ActionsContainer, field: OptionField) -> None:
    option = field.option
    arguments: dict[str, Any] = {"help": _help(field)}
    if field.type is bool:
        arguments["action"] = argparse.BooleanOptionalAction
    else:
        choices = None if option.choices is None else list(option.choices)
        arguments |= {"type": field.type, "choices": choices, "nargs": field.nargs, "metavar": option.metavar}
        arguments["default"] = None if field.default is MISSING else field.default
    if option.is_positional:
        parser.add_argument(field.name, **arguments)
    else:
        names = [f"{'-' if len(name) == 1 else '--'}{name}" for name in (field.name, *option.aliases)]
        action = parser.add_argument(*names, dest=field.name, required=field.default is MISSING, **arguments)
        action.default = arguments.get("default", field.default)  # only now, as older Pythons add it to the help


def _help(field: OptionField) -> str:
    text, default = field.option.help, field.default
    if default is MISSING:
        text += " Required"
    elif default is None or default == () or default is False:
        if "default" not in text:  # else the text says more about it
            text += f" Default: {'off' if default is False else 'none'}"
    else:
        text += f" Default: {' '.join(map(str, default)) if isinstance(default, tuple) else default}"
    return text.replace("%", "%%")


def parse_options(
    kind: type[T],
    argv: list[str] | None = None,
    description: str | None = None,
    complete: Callable[[T], T] | None = None,
) -> T:
    """
    Parses and checks the arguments of a command. All errors are reported at once, in the way of `argparse`.

    Args:
        kind (`type`): A dataclass of options.
        argv (`list[str]`, *optional*): The arguments; those of the process if not given.
        description (`str`, *optional*): Text at the head of `--help`.
        complete (`Callable`, *optional*):
            Returns the options with values that depend on more than the options; its `ValueError` is reported too.

    Returns:
        `kind`.
    """
    parser = build_parser(kind, description)
    argv = sys.argv[1:] if argv is None else argv
    try:
        recipe = _read_recipes(kind, argv)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    options = from_values(kind, vars(parser.parse_args([*recipe, *argv])))
    errors = find_errors(options) + _find_untrusted(options, _names(recipe), _names(argv))
    try:
        options = options if complete is None else complete(options)
    except ValueError as error:
        errors.append(str(error))
    if errors:
        parser.error("\n".join(errors))
    return options


def to_argv(options: Any) -> list[str]:
    """
    Turns options into arguments of their command.

    Args:
        options (`Any`): A dataclass of options.

    Returns:
        `list[str]`: All that differs from the defaults, such that [`parse_options`] gives the same options again.
    """
    known = list_options(type(options))
    positional: list[str] = []
    named: list[str] = []
    for name, value in find_given(options).items():
        words = [] if isinstance(value, bool) else list(map(str, value if isinstance(value, tuple) else (value,)))
        if known[name].option.is_positional:
            positional += words
        else:
            named += [f"--no-{name}" if value is False else f"--{name}", *words]
    return positional + named


# ----------------------------------------------------------------------------------------------------------- recipes


def read_recipe(path: Path) -> list[str]:
    """
    Reads options from a file.

    Args:
        path (`Path`): A YAML file that maps names of options to values, or the name of a recipe, see
            [`find_recipe`]; `true` sets a flag and `false` switches it off, lists are several values.

    Returns:
        `list[str]`: The same options as arguments of a command.

    Raises:
        `OSError`: the file cannot be read.
        `ValueError`: there is no such file, or it is not such a mapping.
    """
    path = find_recipe(path)
    try:
        options = read_yaml(path)
    except ValueError as error:
        raise ValueError(f"`config` must be YAML: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"`config` must map names of options to values, got {path} with {shown(options)}.")
    argv: list[str] = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        if not isinstance(name, str) or not all(isinstance(entry, (bool, int, float, str)) for entry in values):
            raise ValueError(
                f"`config` must map names of options to values, got {shown(name)}: {shown(value)} in {path}."
            )
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no-{name}")
        else:
            argv += [f"--{name}", *(str(entry) for entry in values)]
    return argv


def _read_recipes(kind: type, argv: list[str]) -> list[str]:
    """Arguments out of the file that `argv` names by an option with `is_recipe`, if there is one."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    for field in list_options(kind).values():
        if field.option.is_recipe:
            _add_option(parser, field)
    return [word for path in vars(parser.parse_known_args(argv)[0]).values() if path for word in read_recipe(path)]


def _names(words: list[str]) -> set[str]:
    """Names of the options among `words`, arguments of a command."""
    return {word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--")}


def _find_untrusted(options: Any, of_recipe: set[str], of_command: set[str]) -> list[str]:
    """Messages about code that a recipe names without a flag of trust, and about such a flag in a recipe."""
    known, values = list_options(type(options)), to_values(options)
    flags = {name for name, field in known.items() if field.option.is_trust}
    errors = [f"`{name}` must be given on the command line, not by a recipe." for name in sorted(flags & of_recipe)]
    for name in [name for name in known if name in of_recipe - of_command and not flags & of_command]:
        names_code = known[name].option.names_code
        if names_code is not None and names_code(values[name]):
            errors.append(
                f"`{name}` of a recipe must not name code that is not trusted, got {values[name]!r}: read that code, "
                f"then give {' or '.join(f'`--{flag}`' for flag in sorted(flags))} on the command line."
            )
    return errors


def find_places(options: Any) -> list[str]:
    """Names of the `options`, a dataclass, that name a path of this machine where they could name something public."""
    known = list_options(type(options))
    values = {name: value for name, value in to_values(options).items() if value is not None}
    return [name for name, value in values.items() if known[name].option.is_place and Path(value).exists()]


def to_recipe(options: Any) -> dict[str, Any]:
    """
    Turns options into a recipe that can be published.

    Args:
        options (`Any`): A dataclass of options.

    Returns:
        `dict`: All that differs from the defaults, as YAML can hold it. Private options and paths of this machine are
        left out.
    """
    known, places = list_options(type(options)), find_places(options)
    recipe = {}
    for name, value in find_given(options).items():
        option = known[name].option
        if not (option.is_private or option.is_secret or name in places):
            recipe[name] = (
                str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
            )
    return recipe


def describe(options: Any) -> dict[str, str]:
    """
    Lists options to be shown or logged.

    Args:
        options (`Any`): A dataclass of options.

    Returns:
        `dict[str, str]`: Values as text by name, but for secrets.
    """
    known = list_options(type(options))
    return {
        name: str(to_json(value)) for name, value in to_values(options).items() if not known[name].option.is_secret
    }
