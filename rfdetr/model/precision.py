"""Weights in the number format of the computation, and the choice of hand-written gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_STACKED = ("enc_output", "enc_output_norm", "enc_out_bbox_embed", "enc_out_class_embed")
_ALIGNMENT = 64  # elements: matrix products are faster on aligned weights


def own_gradients() -> bool:
    """Whether hand-written gradients apply: in eager training, not in compiled or traced code."""
    graph = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    return torch.is_grad_enabled() and not graph


def compute_dtype(x: Tensor) -> torch.dtype:
    """The number format of matrix products with `x`: that of autocast, or its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def cast_together(dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
    """The weights in `dtype`, converted by one multi-tensor kernel; so are their gradients."""
    if all(weight.dtype == dtype for weight in weights):
        return weights
    cast: tuple[Tensor, ...] = _Gather.apply(dtype, (), *weights)  # type: ignore[no-untyped-call]
    return cast


def call_with_cast_weights(module: nn.Module, *args: Any) -> Any:
    """module(*args); under autocast, its weights are converted together instead of one by one.

    The heads of query selection, which are stacked, keep theirs, and so do parameters of the module
    itself.
    """
    device = next(module.parameters()).device
    if not (own_gradients() and torch.is_autocast_enabled(device.type)):
        return module(*args)
    weights = {
        f"{prefix}.{name}".lstrip("."): parameter
        for prefix, part in module.named_modules()
        if prefix.split(".")[0] not in _STACKED
        if prefix or isinstance(module, nn.Linear)
        for name, parameter in part.named_parameters(recurse=False)
    }
    cast = cast_together(torch.get_autocast_dtype(device.type), *weights.values())
    return torch.func.functional_call(module, dict(zip(weights, cast, strict=True)), args)


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """norm(x) in the number format of x (..., C); autocast alone would convert to float32."""
    weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


def column_sums(x: Tensor) -> Tensor:
    """Sums over the rows of x (R, D); on a GPU a matrix product takes half of the time of `sum`."""
    return (x.new_ones(1, len(x)) @ x)[0] if x.is_cuda else x.sum(dim=0)


def stack_together(dtype: torch.dtype, stacks: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """Every sequence of equally shaped weights, stacked on a new first axis, in `dtype`."""
    counts = tuple(len(stack) for stack in stacks)
    if set(counts) == {1}:
        return tuple(weight[None] for weight in cast_together(dtype, *(s[0] for s in stacks)))
    weights = [weight for stack in stacks for weight in stack]
    stacked: tuple[Tensor, ...] = _Gather.apply(dtype, counts, *weights)  # type: ignore[no-untyped-call]
    return stacked


class _Gather(torch.autograd.Function):
    """Copies tensors into one new block of memory, in another dtype, and their gradients back.

    With `counts`, the results are stacks of so many consecutive tensors each.
    """

    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, counts: tuple[int, ...], *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.counts, ctx.shapes = counts, [weight.shape for weight in weights]
        ctx.dtype = weights[0].dtype
        results, parts = _allocate(weights[0], dtype, counts or (0,) * len(weights), ctx.shapes)
        torch._foreach_copy_(parts, list(weights))
        return tuple(results)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        parts: list[Tensor | None] = []
        for grad, count in zip(grads, ctx.counts or (0,) * len(grads), strict=True):
            if grad is None:
                parts.extend([None] * max(1, count))
            else:
                parts.extend(grad.unbind() if count else [grad])
        given = [part for part in parts if part is not None]
        if given and given[0].dtype != ctx.dtype:
            shapes = [part.shape for part in given]
            _, cast = _allocate(given[0], ctx.dtype, (0,) * len(given), shapes)
            torch._foreach_copy_(cast, given)
            converted = iter(cast)
            parts = [None if part is None else next(converted) for part in parts]
        return None, None, *parts


def _allocate(
    like: Tensor, dtype: torch.dtype, counts: Sequence[int], shapes: Sequence[torch.Size]
) -> tuple[list[Tensor], list[Tensor]]:
    """Uninitialised tensors in one block: the results, and their parts of the given shapes."""
    starts, total, first = [], 0, 0
    for count in counts:
        starts.append(total)
        elements = max(1, count) * shapes[first].numel()
        total += -(-elements // _ALIGNMENT) * _ALIGNMENT
        first += max(1, count)
    block = torch.empty(total, dtype=dtype, device=like.device)
    results: list[Tensor] = []
    parts: list[Tensor] = []
    first = 0
    for start, count in zip(starts, counts, strict=True):
        shape = shapes[first]
        stacked = (count, *shape) if count else tuple(shape)
        result = block[start : start + max(1, count) * shape.numel()].view(stacked)
        results.append(result)
        parts.extend(result.unbind() if count else [result])
        first += max(1, count)
    return results, parts
