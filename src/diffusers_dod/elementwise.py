# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
The elementwise parts of a transformer block, in few passes over memory.

Each function has its formula, which a compiler fuses, and a form for eager execution that moves and keeps fewer bytes.
The eager form has first derivatives in reverse mode only, and its results must not be changed in place. `torch.func`
and compilers get the formula.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import FunctionCtx, once_differentiable


# The conditioning of a batch has rows of one width, (K * T + B - K, d): K samples with a prior have one row per token,
# and come first; the other samples have one row each. Linears take all rows at once. Elementwise, rows come in parts:
# (K, T, d) and (B - K, 1, d), or only one of them. Each part meets its own samples only, so that nothing is ever
# broadcast to T tokens.
Parts = tuple[torch.Tensor, ...]


class _NoContext:
    """Stands in for the context of a function whose gradient nobody wants."""

    def save_for_backward(self, *tensors: torch.Tensor) -> None:
        """Keeps nothing."""


def _apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    # The bookkeeping of autograd takes longer than a kernel of a small model.
    return function.apply(*args) if torch.is_grad_enabled() else function.forward(_NoContext(), *args)


def _part_views(rows: torch.Tensor, num_priors: int, num_tokens: int, chunks: int) -> list[list[torch.Tensor]]:
    """Views of `rows` by part and chunk."""
    per_token = num_priors * num_tokens
    parts = [rows[:per_token].unflatten(0, (num_priors, num_tokens))] if num_priors > 0 else []
    if rows.shape[0] > per_token:
        parts.append(rows[per_token:, None])
    return [list(part.chunk(chunks, dim=-1)) for part in parts]


def _collect(grads: tuple[torch.Tensor, ...], num_priors: int, num_tokens: int, chunks: int) -> torch.Tensor:
    """
    Puts the gradients of all views of rows together, in one pass.

    Autograd would concatenate chunks first and then parts.
    """
    parts = [grads[begin : begin + chunks] for begin in range(0, len(grads), chunks)]
    num_rows = sum(part[0].shape[0] * part[0].shape[1] for part in parts)
    rows_grad = grads[0].new_empty(num_rows, sum(grad.shape[-1] for grad in parts[0]))
    for part, (view,) in zip(parts, _part_views(rows_grad, num_priors, num_tokens, 1), strict=True):
        torch.cat(part, dim=-1, out=view)
    return rows_grad


class _SplitRows(torch.autograd.Function):
    """Views of rows, by part and chunk."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, rows: torch.Tensor, num_priors: int, num_tokens: int, chunks: int
    ) -> tuple[torch.Tensor, ...]:
        ctx.layout = (num_priors, num_tokens, chunks)
        return tuple(view for part in _part_views(rows, *ctx.layout) for view in part)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _collect(grads, *ctx.layout), None, None, None


class _AddRows(torch.autograd.Function):
    """Views of a sum. Shifts have a memory of their own: the backward pass does not need it."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, own: torch.Tensor, shared: torch.Tensor, num_priors: int, num_tokens: int
    ) -> tuple[torch.Tensor, ...]:
        ctx.layout = (num_priors, num_tokens, 6)
        own, shared = (rows.unflatten(-1, (2, 3, -1)) for rows in (own, shared))
        shifts, others = own[:, :, 0] + shared[:, :, 0], own[:, :, 1:] + shared[:, :, 1:]
        views = []
        for (shift_0, shift_1), (scale_0, gate_0, scale_1, gate_1) in zip(
            _part_views(shifts.flatten(1), num_priors, num_tokens, 2),
            _part_views(others.flatten(1), num_priors, num_tokens, 4),
            strict=True,
        ):
            views += [shift_0, scale_0, gate_0, shift_1, scale_1, gate_1]
        return tuple(views)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows_grad = _collect(grads, *ctx.layout)
        return rows_grad, rows_grad, None, None


def split_rows(rows: torch.Tensor, num_priors: int, num_tokens: int, chunks: int) -> list[Parts]:
    """
    Cuts rows of conditioning into chunks of channels, each of them in parts.

    Args:
        rows (`torch.Tensor` of shape `(K * T + B - K, chunks * d)`): A row for each token of K samples, and a row for
            each of the others.
        num_priors (`int`): Number K of samples with a row per token.
        num_tokens (`int`): Number T of tokens of a sample.
        chunks (`int`): Number of chunks.

    Returns:
        `list[tuple[torch.Tensor, ...]]`: For each chunk its parts, of shapes `(K, T, d)` and `(B - K, 1, d)`; a part
        without samples is left out.
    """
    if _needs_formula():
        parts = _part_views(rows, num_priors, num_tokens, chunks)
    else:
        views = _apply(_SplitRows, rows, num_priors, num_tokens, chunks)
        parts = [views[begin : begin + chunks] for begin in range(0, len(views), chunks)]
    return list(zip(*parts, strict=True))


def add_modulations(own: torch.Tensor, shared: torch.Tensor, num_priors: int, num_tokens: int) -> list[Parts]:
    """
    Adds two modulations of a block, and cuts the sum into its six chunks, each of them in parts.

    Args:
        own (`torch.Tensor` of shape `(K * T + B - K, 6 * d)`): Shift, scale and gate of the attention, then those of
            the SwiGLU: a row for each token of K samples, and a row for each of the others.
        shared (`torch.Tensor` of shape `(K * T + B - K, 6 * d)`): The same.
        num_priors (`int`): Number K of samples with a row per token.
        num_tokens (`int`): Number T of tokens of a sample.

    Returns:
        `list[tuple[torch.Tensor, ...]]`: As from [`split_rows`].
    """
    if _needs_formula() or not torch.is_grad_enabled():
        return split_rows(own + shared, num_priors, num_tokens, 6)
    views = _apply(_AddRows, own, shared, num_priors, num_tokens)
    return list(zip(views[:6], views[6:], strict=True)) if len(views) > 6 else [(view,) for view in views]


def without_autocast(device_type: str) -> AbstractContextManager:
    """
    A context in which operations keep the dtypes of their inputs.

    Args:
        device_type (`str`): Type of the device of the operations.

    Returns:
        `contextlib.AbstractContextManager`: The context.
    """
    # The meta device has no autocast; costs are counted on it.
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _needs_formula() -> bool:
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


class PlainLayerNorm(nn.LayerNorm):
    """
    A LayerNorm without weights that returns the dtype of its input and has its statistics in at least fp32.

    Kernels of bf16 and fp16 compute in fp32; autocast would only add copies of input and output.

    Args:
        dim (`int`): Width of the last dimension.
        eps (`float`, defaults to 1e-6): Added to the variance.
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__(dim, eps=eps, elementwise_affine=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalises the last dimension of `input` (..., dim)."""
        with without_autocast(input.device.type):
            return F.layer_norm(input, self.normalized_shape, None, None, self.eps)


class _Rotate(torch.autograd.Function):
    """Complex product of pairs with unit numbers; nothing of the input is kept."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, rotation: torch.Tensor, heads: int) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(rotation)
        x_float = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
        return _complex_product(x_float, torch.view_as_complex(rotation)).to(x.dtype).split(heads, dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (rotation,) = ctx.saved_tensors
        batch_size, num_tokens, heads, head_dim = grads[0].shape
        dtype = torch.promote_types(grads[0].dtype, torch.float32)
        grad_float = grads[0].new_empty(batch_size, num_tokens, len(grads) * heads, head_dim, dtype=dtype)
        for part, grad in zip(grad_float.split(heads, dim=2), grads, strict=True):
            part.copy_(grad)
        grad_float = _complex_product(grad_float, torch.view_as_complex(rotation).conj())
        return grad_float.to(grads[0].dtype), None, None


def _complex_product(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * factor[:, None]).flatten(-2)


def rotate(x: torch.Tensor, rotation: torch.Tensor, heads: int) -> tuple[torch.Tensor, ...]:
    """
    Rotates neighbouring channels of queries or keys, in fp32.

    Args:
        x (`torch.Tensor` of shape `(B, T, n * heads, head_dim)`): Queries, keys or both.
        rotation (`torch.Tensor` of shape `(T, head_dim / 2, 2)`): Cosines and sines in fp32.
        heads (`int`): Number of heads of the queries, and of the keys.

    Returns:
        `tuple[torch.Tensor, ...]`: Each of the n, of shape `(B, T, heads, head_dim)`, in the dtype of `x`.
    """
    if not _needs_formula():
        return _apply(_Rotate, x, rotation, heads)
    first, second = x.to(rotation.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation[:, None].unbind(-1)
    rotated = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return rotated.flatten(-2).to(x.dtype).split(heads, dim=2)


def _sum_to(grad: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Sums the gradient (b, T, d) over the tokens that shared a row of `part`."""
    return grad if part.shape[1] == grad.shape[1] else grad.sum(dim=1, keepdim=True)


def _sizes(parts: Parts) -> list[int]:
    return [part.shape[0] for part in parts]


class _Modulate(torch.autograd.Function):
    """Writes all parts into one tensor; keeps the input and the scales."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, *modulation: torch.Tensor) -> torch.Tensor:
        shift, scale = modulation[: len(modulation) // 2], modulation[len(modulation) // 2 :]
        ctx.save_for_backward(x, *scale)
        modulated = torch.empty_like(x)
        for x_, out, shift_, scale_ in zip(
            x.split(_sizes(scale)), modulated.split(_sizes(scale)), shift, scale, strict=True
        ):
            torch.addcmul(x_, x_, scale_, out=out).add_(shift_)
        return modulated

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, *scale = ctx.saved_tensors
        x_grad, product = torch.empty_like(grad), grad * x
        shift_grads, scale_grads = [], []
        for grad_, product_, out, scale_ in zip(
            *(tensor.split(_sizes(scale)) for tensor in (grad, product, x_grad)), scale, strict=True
        ):
            torch.addcmul(grad_, grad_, scale_, out=out)
            shift_grads.append(_sum_to(grad_, scale_))
            scale_grads.append(_sum_to(product_, scale_))
        return x_grad, *shift_grads, *scale_grads


def modulate(x: torch.Tensor, shift: Parts, scale: Parts) -> torch.Tensor:
    """
    x (1 + scale) + shift, each part for its own samples.

    Args:
        x (`torch.Tensor` of shape `(B, T, d)`): Normalised tokens.
        shift (`tuple[torch.Tensor, ...]`): Parts of shapes `(K, T, d)` and `(B - K, 1, d)`; either may be missing.
        scale (`tuple[torch.Tensor, ...]`): Parts of the same shapes.

    Returns:
        `torch.Tensor` of shape `(B, T, d)`.
    """
    if not _needs_formula():
        return _apply(_Modulate, x, *shift, *scale)
    samples = x.split(_sizes(scale))
    return torch.cat([x_ + x_ * scale_ + shift_ for x_, shift_, scale_ in zip(samples, shift, scale, strict=True)])


class _AddGated(torch.autograd.Function):
    """Writes all parts into one tensor; the gradient of the residual is that of the sum."""

    @staticmethod
    def forward(ctx: FunctionCtx, residual: torch.Tensor, x: torch.Tensor, *gate: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, *gate)
        total = torch.empty_like(residual)
        for residual_, x_, out, gate_ in zip(
            *(tensor.split(_sizes(gate)) for tensor in (residual, x, total)), gate, strict=True
        ):
            torch.addcmul(residual_, x_, gate_, out=out)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, *gate = ctx.saved_tensors
        x_grad, product = torch.empty_like(x), grad * x
        gate_grads = []
        for grad_, product_, out, gate_ in zip(
            *(tensor.split(_sizes(gate)) for tensor in (grad, product, x_grad)), gate, strict=True
        ):
            torch.mul(grad_, gate_, out=out)
            gate_grads.append(_sum_to(product_, gate_))
        return grad, x_grad, *gate_grads


def add_gated(residual: torch.Tensor, x: torch.Tensor, gate: Parts) -> torch.Tensor:
    """
    residual + gate x, each part for its own samples.

    Args:
        residual (`torch.Tensor` of shape `(B, T, d)`): The tokens.
        x (`torch.Tensor` of shape `(B, T, d)`): What a layer adds to them.
        gate (`tuple[torch.Tensor, ...]`): Parts of shapes `(K, T, d)` and `(B - K, 1, d)`; either may be missing.

    Returns:
        `torch.Tensor` of shape `(B, T, d)`.
    """
    if not _needs_formula():
        return _apply(_AddGated, residual, x, *gate)
    samples = x.split(_sizes(gate))
    return residual + torch.cat([x_ * gate_ for x_, gate_ in zip(samples, gate, strict=True)])


class _GatedSilu(torch.autograd.Function):
    """Keeps the input alone: SiLU is cheap to compute again."""

    @staticmethod
    def forward(ctx: FunctionCtx, hidden_states: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden_states)
        value, gate = hidden_states.chunk(2, dim=-1)
        return F.silu(gate).mul_(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> torch.Tensor:
        (hidden_states,) = ctx.saved_tensors
        value, gate = hidden_states.chunk(2, dim=-1)
        hidden_grad = torch.empty_like(hidden_states)
        value_grad, gate_grad = hidden_grad.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad, out=value_grad)
        torch.ops.aten.silu_backward.grad_input(grad * value, gate, grad_input=gate_grad)
        return hidden_grad


class GatedSilu(nn.Module):
    """
    Diffusers' `SwiGLU`, which keeps less for the backward pass.

    Args:
        proj (`nn.Linear`): Maps tokens to value and gate, of equal width. Its name in a model is that of `SwiGLU`.
    """

    def __init__(self, proj: nn.Linear):
        super().__init__()
        self.proj = proj

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Maps `hidden_states` (..., dim) to `value * SiLU(gate)`, half as wide as the projection."""
        hidden_states = self.proj(hidden_states)
        if not _needs_formula():
            return _apply(_GatedSilu, hidden_states)
        value, gate = hidden_states.chunk(2, dim=-1)
        return value * F.silu(gate)
