# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
The elementwise parts of a transformer block, in few passes over memory.

Each function has its formula, which a compiler fuses, and a form for eager execution that moves and keeps fewer bytes.
The eager form has first derivatives only; `torch.func` and compilers get the formula.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.amp import is_autocast_available
from torch.autograd.function import FunctionCtx, once_differentiable


# The conditioning of a batch has rows of one width, (K * T + B - K, d): K samples with a prior have one row per token,
# and come first; the other samples have one row each. Linears take all rows at once. Elementwise, rows come in parts:
# (K, T, d) and (B - K, 1, d), or only one of them. Each part meets its own samples only, so that nothing is ever
# broadcast to T tokens.
Parts = tuple[torch.Tensor, ...]


def _part_views(rows: torch.Tensor, num_priors: int, num_tokens: int, chunks: int) -> list[list[torch.Tensor]]:
    """Views of `rows` by part and chunk."""
    per_token = num_priors * num_tokens
    parts = [rows[:per_token].unflatten(0, (num_priors, num_tokens))] if num_priors > 0 else []
    if rows.shape[0] > per_token:
        parts.append(rows[per_token:, None])
    return [list(part.chunk(chunks, dim=-1)) for part in parts]


class _SplitRows(torch.autograd.Function):
    """Collects the gradients of all views in one pass; autograd would concatenate chunks first and then parts."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, rows: torch.Tensor, num_priors: int, num_tokens: int, chunks: int
    ) -> tuple[torch.Tensor, ...]:
        ctx.layout = (num_priors, num_tokens, chunks)
        return tuple(view for part in _part_views(rows, *ctx.layout) for view in part)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        num_priors, num_tokens, chunks = ctx.layout
        parts = [grads[begin : begin + chunks] for begin in range(0, len(grads), chunks)]
        num_rows = sum(part[0].shape[0] * part[0].shape[1] for part in parts)
        rows_grad = grads[0].new_empty(num_rows, sum(grad.shape[-1] for grad in parts[0]))
        for part, (view,) in zip(parts, _part_views(rows_grad, num_priors, num_tokens, 1), strict=True):
            torch.cat(part, dim=-1, out=view)
        return rows_grad, None, None, None


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
        views = _SplitRows.apply(rows, num_priors, num_tokens, chunks)
        parts = [views[begin : begin + chunks] for begin in range(0, len(views), chunks)]
    return list(zip(*parts, strict=True))


def without_autocast(device_type: str) -> AbstractContextManager:
    """
    A context in which operations keep the dtypes of their inputs.

    Args:
        device_type (`str`): Type of the device of the operations.

    Returns:
        `contextlib.AbstractContextManager`: The context.
    """
    # The meta device has no autocast; costs are counted on it.
    if is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
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
    def forward(ctx: FunctionCtx, x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rotation)
        return _complex_product(x, torch.view_as_complex(rotation))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (rotation,) = ctx.saved_tensors
        return _complex_product(grad, torch.view_as_complex(rotation).conj()), None


def _complex_product(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    x_float = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    pairs = torch.view_as_complex(x_float.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * factor[:, None]).flatten(-2).to(x.dtype)


def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """
    Rotates neighbouring channels of queries or keys, in fp32.

    Args:
        x (`torch.Tensor` of shape `(B, T, heads, head_dim)`): Queries or keys.
        rotation (`torch.Tensor` of shape `(T, head_dim / 2, 2)`): Cosines and sines in fp32.

    Returns:
        `torch.Tensor` of shape `(B, T, heads, head_dim)`, in the dtype of `x`.
    """
    if not _needs_formula():
        return _Rotate.apply(x, rotation)
    first, second = x.to(rotation.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation[:, None].unbind(-1)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2).to(x.dtype)


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
        x_grad = torch.empty_like(grad)
        shift_grads, scale_grads = [], []
        for x_, grad_, out, scale_ in zip(
            *(tensor.split(_sizes(scale)) for tensor in (x, grad, x_grad)), scale, strict=True
        ):
            torch.addcmul(grad_, grad_, scale_, out=out)
            shift_grads.append(_sum_to(grad_, scale_))
            scale_grads.append(_sum_to(grad_ * x_, scale_))
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
        return _Modulate.apply(x, *shift, *scale)
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
        x_grad = torch.empty_like(x)
        gate_grads = []
        for x_, grad_, out, gate_ in zip(
            *(tensor.split(_sizes(gate)) for tensor in (x, grad, x_grad)), gate, strict=True
        ):
            torch.mul(grad_, gate_, out=out)
            gate_grads.append(_sum_to(grad_ * x_, gate_))
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
        return _AddGated.apply(residual, x, *gate)
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
            return _GatedSilu.apply(hidden_states)
        value, gate = hidden_states.chunk(2, dim=-1)
        return value * F.silu(gate)
