# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Reading of the JSON, JSONL and YAML files of this package: strict, and checked against a typed dict.

    class CheckpointManifest(TypedDict):
        step: Count
        sha256: dict[FileName, Sha256]

    read_record(path, CheckpointManifest)  # {"step": 7, "sha256": {...}}, or an error with the file and the field

Libraries for this, msgspec and pydantic, take a key that comes twice, and pydantic a number that becomes infinite. So
they would save the fifty lines that compare types, for a dependency.
"""

import json
import logging
import math
import os
import re
import types
import typing
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from functools import lru_cache, partial
from numbers import Real
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import numpy as np
import yaml

from .checks import check_number, check_type, shown


_logger = logging.getLogger(__name__)

MAX_COMPRESSION = 1100  # deflate's limit is 1032
MAX_SAFETENSORS_HEADER = 8 << 20
DAMAGED_ZIP = (zipfile.BadZipFile, zlib.error)
MAX_DIGITS = 20  # of an integer: those of 2**64


def _check_file_name(name: str, value: str) -> None:
    parts = value.split("/")
    if "" in parts or "." in parts or ".." in parts or set(value) & set("\\:\0"):
        raise ValueError(f"`{name}` must be the name of a file in the same folder or below it, got {shown(value)}.")


def _check_sha256(name: str, value: str) -> None:
    if not re.fullmatch("[0-9a-f]{64}", value):
        raise ValueError(f"`{name}` must be a SHA-256 of 64 hexadecimal digits, got {shown(value)}.")


def _check_one_of(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be {' or '.join(map(repr, choices))}, got {shown(value)}.")


def within(minimum: float, maximum: float = math.inf) -> Callable[[str, Any], None]:
    """A check that an entry is a number in [`minimum`, `maximum`], to annotate its type with."""
    return partial(check_number, minimum=minimum, maximum=maximum)


def one_of(*choices: Any) -> Callable[[str, Any], None]:
    """A check that an entry is one of `choices`, to annotate its type with."""
    return partial(_check_one_of, choices=choices)


# Types of entries, beside those of Python.
FileName = Annotated[str, _check_file_name]
Sha256 = Annotated[str, _check_sha256]
Count = Annotated[int, within(0)]


def _find_twice(names: list[str]) -> str:
    return shown(Counter(names).most_common(1)[0][0])


def _read_integer(text: str) -> int:
    if len(text.removeprefix("-")) > MAX_DIGITS:
        raise ValueError(f"a number of more than {MAX_DIGITS} digits")
    return int(text)


def _read_float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"a number that is not finite, {text[:MAX_DIGITS]}")
    return value


def _read_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{_find_twice([name for name, _ in pairs])} twice in an object")
    return found


def parse_json(content: bytes) -> Any:
    """
    Parses JSON in UTF-8; a key that comes twice in an object and a number that is not finite are errors.

    Args:
        content (`bytes`): The text.

    Returns:
        `Any`: The value.

    Raises:
        `ValueError`: it is no such JSON.
    """
    hooks = {"parse_int": _read_integer, "parse_float": _read_float, "parse_constant": _read_float}
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=_read_pairs, **hooks)
    except RecursionError as error:
        raise ValueError("lists or objects that are nested too deep") from error


_find_entries = lru_cache(partial(typing.get_type_hints, include_extras=True))


def check_record(value: Any, schema: Any, name: str = "") -> None:
    """
    Raises unless a value that came out of a file has the type that a schema wants.

    Args:
        value (`Any`): The value.
        schema (`Any`): A `TypedDict`; entries that it does not name pass. Or another type: `list[...]`,
            `dict[..., ...]`, one that may be `None`, a plain type, or one that is annotated with checks of a name and
            a value.
        name (`str`, defaults to `""`): Place of the value in the file, for the message.

    Raises:
        `TypeError`, `ValueError`: it has another type, or an entry is missing.
    """
    origin, arguments = typing.get_origin(schema), typing.get_args(schema)
    if schema is Any:
        return
    if origin is NotRequired:
        check_record(value, arguments[0], name)
    elif origin is Annotated:
        check_record(value, arguments[0], name)
        for check in arguments[1:]:
            check(name, value)
    elif origin in (typing.Union, types.UnionType):
        others = [kind for kind in arguments if kind is not types.NoneType]
        if value is not None or len(others) == len(arguments):
            check_record(value, others[0], name)  # no file of this package has unions of two types
    elif origin is list:
        check_type(name or "content", value, list)
        for index, entry in enumerate(value):
            check_record(entry, arguments[0], f"{name}[{index}]")
    elif origin is dict or schema is dict:
        check_type(name or "content", value, dict)
        for key, entry in value.items() if arguments else ():
            check_record(key, arguments[0], name)
            check_record(entry, arguments[1], f"{name}.{key}" if name else key)
    elif typing.is_typeddict(schema):
        check_type(name or "content", value, dict)
        for key, kind in _find_entries(schema).items():
            place = f"{name}.{key}" if name else key
            if key in value:
                check_record(value[key], kind, place)
            elif key in schema.__required_keys__:
                raise ValueError(f"`{place}` must be there, got {shown(sorted(value))}.")
    else:
        check_type(name, value, Real if schema is float else schema)


def read_record(path: Path, schema: Any) -> dict[str, Any]:
    """
    Reads a JSON file.

    Args:
        path (`Path`): The file.
        schema (`Any`): The type of its content, see [`check_record`].

    Returns:
        `dict`: The content, with entries that the schema does not name.

    Raises:
        `OSError`: the file cannot be read.
        `ValueError`: it has another content; the message names the file and the entry.
    """
    path = Path(path)
    content = path.read_bytes()
    try:
        record = parse_json(content)
        check_record(record, schema)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return record


def find_record(path: Path, schema: Any) -> dict[str, Any] | None:
    """Reads the JSON file `path` as [`read_record`] does; `None` if it is missing or has not the type `schema`."""
    try:
        return read_record(path, schema)
    except (OSError, ValueError):
        return None


class StrictConfigMixin:
    """Base class, before `ConfigMixin`, whose configs are read as strictly as all files of this package."""

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        return read_record(Path(json_file), dict[str, Any])


class MetricsLine(TypedDict):
    """What each line of metrics has. Its other entries are numbers, or `null` where there was nothing to count."""

    step: Count


def read_lines(path: Path) -> list[dict[str, Any]]:
    """
    Reads a file of JSON lines.

    Args:
        path (`Path`): The file. It may be missing.

    Returns:
        `list[dict]`: The [`MetricsLine`]s. Other lines, as a crash may leave, are left out with a warning.
    """

    def parse(line: bytes) -> dict[str, Any] | None:
        try:
            content = parse_json(line)
            check_record(content, MetricsLine)
            check_record(content, dict[str, float | None])
            return content
        except (TypeError, ValueError):
            return None

    lines = [parse(line) for line in path.read_bytes().split(b"\n") if line] if path.exists() else []
    if num_dropped := lines.count(None):
        _logger.warning(f"{num_dropped} lines of {path} are no metrics, and left out.")
    return [line for line in lines if line is not None]


class _YamlLoader(yaml.SafeLoader):
    """Refuses aliases, with which a short file says something endless, and names that come twice in a mapping."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, f"an alias, *{event.anchor[:40]}", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if len(set(names)) < len(names):
                raise yaml.constructor.ConstructorError(None, None, f"{_find_twice(names)} twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """
    Reads a YAML file without aliases.

    Args:
        path (`Path`): The file.

    Returns:
        `Any`: The content.

    Raises:
        `OSError`: the file cannot be read.
        `ValueError`: it is no such YAML.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8-sig"), _YamlLoader)  # noqa: S506, it is a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise ValueError(f"{path} must be YAML in UTF-8, without aliases, got {reason}") from error


def read_npz_headers(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """
    Reads what an npz file says of its arrays, and none of their numbers.

    NumPy makes room for what a header says before it reads, so shapes and types are to be checked first.

    Args:
        path (`Path`): The file.

    Returns:
        `dict[str, tuple]`: Shape and type of each array, by name.

    Raises:
        `OSError`: the file cannot be read.
        `ValueError`: it is no npz file, or an array cannot be as large as its header says.
    """
    headers = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if not member.filename.endswith(".npy"):
                    continue
                with archive.open(member) as file:
                    is_old = np.lib.format.read_magic(file) == (1, 0)
                    read = np.lib.format.read_array_header_1_0 if is_old else np.lib.format.read_array_header_2_0
                    shape, _, dtype = read(file)
                size = math.prod(shape) * dtype.itemsize
                if size > member.file_size or size > member.compress_size * MAX_COMPRESSION:
                    raise ValueError(f"`{member.filename}` of shape {shape} in {dtype}, which its bytes cannot hold")
                headers[member.filename.removesuffix(".npy")] = (shape, dtype)
    # What zipfile and NumPy raise for damaged, encrypted and unknown content.
    except (KeyError, TypeError, ValueError, NotImplementedError, RuntimeError, EOFError, *DAMAGED_ZIP) as error:
        raise ValueError(f"{path} is no npz file: {error}") from error
    return headers


def check_safetensors_header(path: Path) -> None:
    """
    Raises unless the header of a safetensors file is of a size that can be read in no time.

    Args:
        path (`Path`): The file.

    Raises:
        `OSError`: the file cannot be read.
        `ValueError`: its header is larger than that of tens of thousands of tensors.
    """
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if MAX_SAFETENSORS_HEADER < size < path.stat().st_size:  # safetensors itself refuses one that ends nowhere
        raise ValueError(
            f"{path} must be a safetensors file with a header of at most {MAX_SAFETENSORS_HEADER >> 20} MiB, "
            f"got {size} bytes."
        )
