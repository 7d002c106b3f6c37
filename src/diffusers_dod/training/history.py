# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""What the steps of a run are trained with. A resumed run goes on with the same, or states what it changes."""

import logging
from collections.abc import Collection, Mapping
from typing import Any, TypedDict

from accelerate import Accelerator

from ..data.latents import describe_difference
from ..options import find_places, list_options, to_json, to_values
from ..records import Count
from ..training_options import TrainingOptions


logger = logging.getLogger(__name__)

LONGEST_LIST = 8  # that is shown as a whole


class Change(TypedDict):
    """A value that differs between the steps up to `step` and those after it."""

    step: Count
    name: str
    before: Any
    after: Any


class HistoryRecord(TypedDict):
    """What the state of a checkpoint says of its steps, see [`TrainingHistory`]."""

    values: dict[str, Any]
    num_images: Count | None
    changes: list[Change]


def values_of_steps(options: TrainingOptions, accelerator: Accelerator) -> dict[str, Any]:
    """
    Values that the steps of a run depend on: those of all options that are not free, see [`Option`].

    Args:
        options ([`TrainingOptions`]): The run's options.
        accelerator (`Accelerator`): The run's processes.

    Returns:
        `dict`: Values by name, ready for JSON, with the processes and the precision that the run has. What is in a
        folder of this machine has no path.
    """
    known = list_options(TrainingOptions)
    values = {name: value for name, value in to_values(options).items() if not known[name].option.is_free}
    values |= {name: "a local folder" for name in find_places(options) if name in values}
    values |= {name: bool(values[name]) for name in ("compile", "exact_dropout")}  # on a CPU `None` is off
    values["num_processes"] = accelerator.num_processes
    values["distributed_type"] = accelerator.distributed_type.value.lower()
    values["mixed_precision"] = accelerator.mixed_precision
    if "constant" in options.optimizer.lr_scheduler:  # then more steps change none of the earlier ones
        del values["max_train_steps"]
    return to_json(values)


class TrainingHistory:
    """
    What the steps of a run were and are trained with.

    Args:
        state (`Mapping`): The state of the checkpoint that the run goes on from; empty at its start.
        allowed (`Collection[str]`, defaults to `()`): Names of values that may differ from the checkpoint's.
    """

    def __init__(self, state: Mapping[str, Any], allowed: Collection[str] = ()):
        recorded = state.get("history", {})
        self._recorded = recorded.get("values", {})
        self._allowed = allowed
        self._step = state.get("step", 0)
        #: Values of the next steps, by name.
        self.values: dict[str, Any] = {}
        #: Of each change its `name`, the last `step` before it, and the values `before` and `after`.
        self.changes: list[Change] = list(recorded.get("changes", []))
        #: Number of images in all finished steps; `None` if the checkpoint does not say it.
        self.num_images: int | None = recorded.get("num_images", None if state else 0)
        if state and not recorded:
            logger.warning(
                "The checkpoint does not say which options it was trained with, as those of older versions: they are "
                "not compared with those of this run."
            )

    def go_on_with(self, values: Mapping[str, Any]) -> None:
        """
        Takes values for the next steps, and notes which of them have changed.

        Args:
            values (`Mapping`): Values by name, ready for JSON.

        Raises:
            `ValueError`: a value differs from the checkpoint's and is not allowed to. The message names all of them.
        """
        before = self._recorded
        changed = [name for name, value in values.items() if name in before and before[name] != value]
        if refused := [name for name in changed if name not in self._allowed]:
            differences = {name: _describe(before[name], values[name]) for name in refused}
            lines = [
                f"`{name}` must be {expected} as in the run that is resumed, got {received}."
                for name, (expected, received) in differences.items()
            ]
            lines.append(f"To go on with other values all the same: `--allow_changed {' '.join(refused)}`.")
            raise ValueError("\n".join(lines))
        self.values |= values
        self.changes += [
            {"step": self._step, "name": name, "before": before[name], "after": values[name]} for name in changed
        ]

    def add_step(self, num_images: int) -> None:
        """Counts a finished step of `num_images` images."""
        if self.num_images is not None:
            self.num_images += num_images

    def state(self) -> HistoryRecord:
        """The history for the state of a checkpoint, ready for JSON."""
        return {"values": self.values, "num_images": self.num_images, "changes": self.changes}

    def describe_changes(self) -> list[str]:
        """Describes each change in a sentence."""
        sentences = []
        for change in self.changes:
            before, after = _describe(change["before"], change["after"])
            sentences.append(
                f"From step {change['step'] + 1:,} on `{change['name']}` is {after}; before it was {before}."
            )
        return sentences


def _describe(before: Any, after: Any) -> tuple[str, str]:
    """Texts of both values."""
    if isinstance(before, list) and isinstance(after, list) and max(len(before), len(after)) <= LONGEST_LIST:
        return repr(before), repr(after)
    return describe_difference(before, after)
