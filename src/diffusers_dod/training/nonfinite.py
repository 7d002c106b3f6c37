# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Steps that are left out as their gradients are not finite: counted on the device, and read now and then."""

from dataclasses import astuple, dataclass

import torch

from ..devices import send


@dataclass(frozen=True)
class NonfiniteCounts:
    """
    What has been counted up to a step.

    Args:
        total (`int`, defaults to 0): All steps that were left out.
        in_a_row (`int`, defaults to 0): The latest ones that follow each other up to that step.
        longest (`int`, defaults to 0): The most that followed each other since the counts were last read.
        latest (`int`, defaults to 0): The latest step that was left out, 0 if there was none.
    """

    total: int = 0
    in_a_row: int = 0
    longest: int = 0
    latest: int = 0


class NonfiniteSteps:
    """
    Counts the steps that are left out; the host waits for the device only where it reads the counts.

    Args:
        device (`torch.device`): Device of the counts.
        counts ([`NonfiniteCounts`], *optional*): The counts to continue from.
    """

    def __init__(self, device: torch.device, counts: NonfiniteCounts | None = None):
        #: The counts when they were last read.
        self.known: NonfiniteCounts = counts or NonfiniteCounts()
        self._counts = send(torch.tensor(astuple(self.known)), device)
        self._total, self._in_a_row, self._longest, self._latest = self._counts  # views

    def add(self, step: int, is_finite: torch.Tensor) -> None:
        """
        Counts a step.

        Args:
            step (`int`): Number of the step, from 1 on.
            is_finite (`torch.Tensor` of shape `()`): Whether its gradients are finite, on the device of the counts.
        """
        is_left_out = (~is_finite).long()
        self._total += is_left_out
        self._in_a_row.add_(1).mul_(is_left_out)
        self._longest.copy_(torch.maximum(self._longest, self._in_a_row))
        self._latest += is_left_out * (step - self._latest)

    def read_in_a_row(self) -> int:
        """Reads how many of the latest steps were left out, which waits for the device."""
        return int(self._in_a_row)

    def read(self) -> NonfiniteCounts:
        """Reads the counts, which waits for the device, and starts the longest row anew."""
        self.known = NonfiniteCounts(*self._counts.tolist())
        self._longest.copy_(self._in_a_row)
        return self.known
