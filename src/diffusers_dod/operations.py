# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Operations that a model runs, the bytes they move, and the time of both on a GPU (its roofline).

Models may be fake, so that nothing is computed.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop


@dataclass(frozen=True)
class Operation:
    """
    An operation on tensors of certain shapes: a kernel that a GPU runs.

    Args:
        name (`str`): Name in `torch.ops.aten`.
        flops (`int`): FLOPs of a matrix product, 0 of all else.
        num_bytes (`int`): Bytes that it reads and writes.
        dtype (`torch.dtype`): Dtype that it reads.
    """

    name: str
    flops: int
    num_bytes: int
    dtype: torch.dtype


class Work(Counter):
    """How often each [`Operation`] runs."""

    @property
    def num_operations(self) -> int:
        """Number of operations, each of which is launched."""
        return self.total()

    @property
    def num_bytes(self) -> int:
        """Bytes that all operations read and write."""
        return sum(count * operation.num_bytes for operation, count in self.items())

    def seconds(self, peak_flops: Mapping[torch.dtype, float], bandwidth: float) -> dict[bool, float]:
        """
        Roofline of a GPU: an operation takes the longer of its time to compute and its time to move bytes.

        Args:
            peak_flops (`Mapping[torch.dtype, float]`): FLOP/s of matrix products of a dtype.
            bandwidth (`float`): Bytes per second of the memory.

        Returns:
            `dict[bool, float]`: Seconds of matrix products under `True`, and of all else under `False`.
        """
        total = {True: 0.0, False: 0.0}
        for operation, count in self.items():
            computing = operation.flops / peak_flops[operation.dtype] if operation.flops else 0.0
            total[operation.flops > 0] += count * max(computing, operation.num_bytes / bandwidth)
        return total


_ATEN = torch.ops.aten
FLOP_FORMULAS = flop_registry | {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}
# What runs no kernel: `is_view` is about an operator's schema, and these return views or fresh memory nonetheless.
_NO_KERNELS = {"_unsafe_view", "_reshape_alias", "detach", "lift_fresh", "empty", "empty_like", "empty_strided"}
_NO_KERNELS |= {"new_empty", "new_empty_strided", "is_same_size", "_local_scalar_dense"}


def _num_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor; numbers that `expand` repeats count once."""
    if 0 not in tensor.stride():
        return tensor.nbytes
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


class OperationCounter(TorchDispatchMode):
    """
    Counts the operations that run inside of it, and the bytes they move.

    Views are not counted. An argument is read once, also if it is given twice; an `out` is only written. A LayerNorm
    copies an input that is not contiguous.
    """

    def __init__(self):
        super().__init__()
        #: The [`Work`] so far.
        self.work = Work()

    def __torch_dispatch__(
        self, func: Callable, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs and counts an operation."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.is_view or name in _NO_KERNELS:
            return result
        only_written = {argument.name for argument in func._schema.arguments if argument.is_out}
        read = [args[1:] if name == "copy_" else args]
        read.append({name: value for name, value in kwargs.items() if name not in only_written})
        sources = {id(tensor): tensor for tensor in tree_leaves(read) if isinstance(tensor, torch.Tensor)}
        results = [tensor for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor)]
        if not results:
            return result
        dtype = next(iter(sources.values()), results[0]).dtype
        num_bytes = sum(map(_num_bytes, [*sources.values(), *results]))
        formula = FLOP_FORMULAS.get(func.overloadpacket)
        flops = 0 if formula is None else formula(*args, **kwargs, out_val=result)
        self.work[Operation(name, flops, num_bytes, dtype)] += 1
        if name.startswith("native_layer_norm") and not args[0].is_contiguous():
            self.work[Operation("clone", 0, 2 * args[0].nbytes, dtype)] += 1
        return result
