# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Counts what a compiler saves in a block of DoD-XL: bytes and kernels of forward and backward pass, eager and compiled.

    python benchmarks/count_compiled.py

The counts of the compiled block are inductor's own for a CPU, where it may fuse less than for a GPU. In the last
column, the first row is `COMPILED_BYTES` and the last one `COMPILED_LAUNCHES` of `diffusers_dod.training.cost`. It
takes some minutes, and a C++ compiler.
"""

from collections.abc import Callable

import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._functorch.config import patch as patch_autograd
from torch._inductor import config, metrics
from torch._inductor.compile_fx import compile_fx
from torch._inductor.scheduler import NopKernelSchedulerNode
from torch._subclasses.fake_tensor import FakeTensorMode

from diffusers_dod.operations import OperationCounter
from diffusers_dod.presets import PRESETS
from diffusers_dod.tables import format_table


BATCH_SIZE, NUM_PRIORS, NUM_TOKENS = 4, 2, 256


class _Compiled(Exception):
    """Raised in place of running what is compiled."""


def _only_compile(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> None:
    with patch_autograd(force_non_lazy_backward_lowering=True), config.patch(force_disable_caches=True):
        compile_fx(graph, inputs)
    raise _Compiled


def _step(run: Callable[..., torch.Tensor], dim: int, head_dim: int) -> None:
    """Runs a block and its backward pass on outputs of other layers, in the dtype that autocast gives them."""
    rows = NUM_PRIORS * NUM_TOKENS + BATCH_SIZE - NUM_PRIORS
    shapes = (BATCH_SIZE, NUM_TOKENS, dim), (rows, dim), (rows, 6 * dim)
    inputs = [torch.ones(shape, dtype=torch.bfloat16).requires_grad_() for shape in shapes]
    with torch.autocast("cpu", torch.bfloat16):
        output = run(*inputs, NUM_PRIORS, torch.ones(NUM_TOKENS, head_dim // 2, 2))
    output.backward(torch.ones_like(output))


def main() -> None:
    preset = PRESETS["DoD-XL"].override(num_layers=1)
    head_dim = preset.transformer_config["attention_head_dim"]
    with FakeTensorMode():
        transformer = preset.build()[0]
        with OperationCounter() as counter:
            _step(transformer.transformer_blocks[0], transformer.inner_dim, head_dim)
    products = {operation: count for operation, count in counter.work.items() if operation.flops > 0}
    product_bytes = sum(operation.num_bytes * count for operation, count in products.items())
    torch._logging.set_logs(inductor_metrics=True)  # without which it does not count
    metrics.reset()
    try:
        block = preset.build()[0].transformer_blocks[0]
        _step(torch.compile(block, fullgraph=True, backend=_only_compile), transformer.inner_dim, head_dim)
    except BackendCompilerFailed as error:
        if not isinstance(error.inner_exception, _Compiled):
            raise
    kernels = [node for node, _ in metrics.nodes_num_elem if not isinstance(node, NopKernelSchedulerNode)]
    counts = {
        "elementwise bytes, MB": (counter.work.num_bytes - product_bytes, metrics.num_bytes_accessed - product_bytes),
        "all bytes, MB": (counter.work.num_bytes, metrics.num_bytes_accessed),
        "operations": (counter.work.num_operations * 10**6, len(kernels) * 10**6),
    }
    table = [
        [name, f"{eager / 1e6:.0f}", f"{compiled / 1e6:.0f}", f"{compiled / eager:.2f}"]
        for name, (eager, compiled) in counts.items()
    ]
    print(format_table(["a block, forward and backward", "eager", "compiled", "compiled / eager"], table))


if __name__ == "__main__":
    main()
