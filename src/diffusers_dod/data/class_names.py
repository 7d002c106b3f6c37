# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Names of classes, in a form that pipelines, checkpoints and cards can have."""

import logging
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..checks import abbreviate
from ..pipeline_dod import DoDPipeline


logger = logging.getLogger(__name__)

NUM_SHOWN = 20  # classes that a list names


def clean_class_name(name: str) -> str:
    """
    Removes from the name of a class what only a mistake puts there, so that a pipeline can have it.

    Args:
        name (`str`): The name. Commas separate several names of one class.

    Returns:
        `str`: The name in its composed form (NFC), without line breaks and other control characters, byte order marks,
        outer blanks, and commas with nothing between them. It may be empty.
    """
    name = unicodedata.normalize("NFC", name.replace("\ufeff", ""))
    name = re.sub(r"\s*[\x00-\x1f\x7f-\x9f\u2028\u2029]\s*", " ", name)
    return ",".join(part for part in name.split(",") if part.strip()).strip()


def clean_class_names(names: Sequence[str]) -> tuple[str, ...]:
    """
    Applies [`clean_class_name`] to names of classes. A warning says which ones it changes.

    Args:
        names (`Sequence[str]`): The names in the order of their ids.

    Returns:
        `tuple[str, ...]`: The names that pipelines, checkpoints and cards can have.

    Raises:
        `ValueError`: nothing is left of a name, different names become the same, or a name is no UTF-8.
    """
    cleaned = tuple(map(clean_class_name, names))
    origins: dict[str, str] = {}
    for index, (name, clean) in enumerate(zip(names, cleaned, strict=True)):
        if not clean:
            raise ValueError(f"`class_names` must not be blank, got {name!r} for class {index}.")
        if origins.setdefault(clean, name) != name:
            raise ValueError(f"`class_names` must differ by more than blanks, got {origins[clean]!r} and {name!r}.")
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"`class_names` must be UTF-8, got {name!r} for class {index}.") from error
    changed = [f"{name!r} to {clean!r}" for name, clean in zip(names, cleaned, strict=True) if name != clean]
    if changed:
        logger.warning(f"Names of classes are changed: {abbreviate(changed)}.")
    return cleaned


def read_class_names(file: Path) -> list[str]:
    """
    Reads the names of classes, one in each line; blank lines at the end do not count.

    Args:
        file (`Path`): The file, in UTF-8.

    Returns:
        `list[str]`: The names in the order of the lines.

    Raises:
        `ValueError`: the file is not UTF-8, or a line in between is blank.
    """
    try:
        names = file.read_text(encoding="utf-8-sig").rstrip().split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"`class_names_file` must be a text file in UTF-8, got {file}: {error}.") from error
    for line, name in enumerate(names, start=1):
        if not name.strip():
            raise ValueError(f"`class_names_file` must have a name in each line, got {file} with none in line {line}.")
    return names


def list_classes(class_names: Sequence[str], counts: Mapping[int, int] | None = None) -> list[str]:
    """
    Lists the first classes, one in a line, and how many more there are.

    Args:
        class_names (`Sequence[str]`): Their names in the order of their ids.
        counts (`Mapping[int, int]`, *optional*): Number of images by id, if it is known.

    Returns:
        `list[str]`: The lines.
    """
    lines = [f"  class {label}, {name}" for label, name in enumerate(class_names[:NUM_SHOWN])]
    if counts is not None:
        lines = [f"{line}: {counts.get(label, 0):,} images" for label, line in enumerate(lines)]
    if more := len(class_names) - len(lines):
        lines.append(f"  and {more:,} more classes")
    return lines


def check_classes(pipeline: DoDPipeline, class_names: tuple[str, ...]) -> None:
    """
    Raises unless the class ids of images can be class ids of a model.

    Args:
        pipeline ([`DoDPipeline`]): The model.
        class_names (`tuple[str, ...]`): Names of the images' classes by id.

    Raises:
        `ValueError`: there are more or fewer classes, or the same names in another order.
    """
    num_classes = pipeline.transformer.config.num_classes
    if len(class_names) != num_classes:
        raise ValueError(f"The images must be of the model's {num_classes} classes, got {len(class_names)}.")
    names = [clean_class_name(pipeline.id2label.get(label, "")) for label in range(num_classes)]
    if set(names) == set(class_names) and names != list(class_names):
        label = next(i for i in range(num_classes) if names[i] != class_names[i])
        raise ValueError(
            "The images' classes must have the ids of the model, "
            f"got {class_names[label]!r} for {label}, which is {names[label]!r}."
        )
