"""Feed-forward layers: plain MLPs, and a two-layer block that needs less memory in training."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rfdetr.model.precision import cast_together, column_sums, compute_dtype, own_gradients

Activation = Literal["relu", "gelu"]
_CPU_ROWS = 1024  # rows of the hidden layer that fit into the cache between two products


class MLP(nn.Module):
    """Linear layers of the widths `dims`, input first, with ReLU between them."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(dims))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dims[0]) to (..., dims[-1])."""
        y = x.flatten(0, -2)  # (R, dims[0]): an in-place ReLU is only free on the product of a 2D x
        for layer in self.layers[:-1]:
            y = F.relu(layer(y), inplace=True)
        last: Tensor = self.layers[-1](y)
        return last.reshape(*x.shape[:-1], -1)


def feed_forward(
    x: Tensor, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], act: Activation
) -> Tensor:
    """Linear, activation, linear over the last axis: (..., C_in) to (..., C_out).

    `first` and `second` are (weight, bias): (C_hidden, C_in), (C_hidden,) and (C_out, C_hidden),
    (C_out,). Eager training stores one copy of the hidden layer instead of two.
    """
    rows = x.flatten(0, -2)  # (R, C_in)
    if own_gradients():
        dtype = compute_dtype(x)
        weights = cast_together(dtype, *first, *second)
        with torch.autocast(x.device.type, enabled=False):
            y: Tensor = _FeedForward.apply(rows.to(dtype), *weights, act)  # type: ignore[no-untyped-call]
    else:
        hidden = F.linear(rows, *first)
        y = F.linear(F.relu(hidden) if act == "relu" else F.gelu(hidden), *second)
    return y.reshape(*x.shape[:-1], -1)


class _FeedForward(torch.autograd.Function):
    """Saves the hidden layer only and recomputes the activation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *layers: Any) -> Tensor:
        w1, b1, w2, b2, act = layers
        y, hidden = feed_forward_rows(x, (w1, b1), (w2, b2), act)
        ctx.save_for_backward(x, hidden, w1, w2)
        ctx.act = act
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):
            gradients = feed_forward_gradients(
                grad, ctx.saved_tensors, ctx.act, weights=any(ctx.needs_input_grad[1:])
            )
        return *gradients, None


def feed_forward_rows(
    x: Tensor, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], act: Activation
) -> tuple[Tensor, Tensor]:
    """Output (R, C_out) and hidden layer (R, C_hidden) of rows x (R, C_in), without gradients.

    The hidden layer is that before GELU, or that after ReLU.
    """
    (w1, b1), (w2, b2) = first, second
    hidden = x.new_empty(len(x), len(w1))
    y = x.new_empty(len(x), len(w2))
    for rows in _chunks(x):
        h = torch.addmm(b1, x[rows], w1.t(), out=hidden[rows])
        torch.addmm(b2, h.relu_() if act == "relu" else F.gelu(h), w2.t(), out=y[rows])
    return y, hidden


def feed_forward_gradients(
    grad: Tensor, saved: Sequence[Tensor], act: Activation, *, weights: bool
) -> tuple[Tensor | None, ...]:
    """Gradients of x, w1, b1, w2, b2 from that of the output (R, C_out) of `feed_forward_rows`.

    `saved` are x, the hidden layer, w1 and w2. Without `weights`, only x has a gradient.
    """
    x, hidden, w1, w2 = saved
    dx = torch.empty_like(x)
    dw1 = db1 = dw2 = None
    for rows in _chunks(x):
        h, dh = hidden[rows], grad[rows] @ w2
        if weights:
            activated = h if act == "relu" else F.gelu(h)
            dw2 = _add_product(dw2, grad[rows], activated)
        if act == "relu":
            torch.ops.aten.threshold_backward.grad_input(dh, h, 0, grad_input=dh)
        else:
            torch.ops.aten.gelu_backward.grad_input(dh, h, grad_input=dh)
        if weights:
            dw1 = _add_product(dw1, dh, x[rows])
            db1 = column_sums(dh) if db1 is None else db1.add_(column_sums(dh))
        torch.mm(dh, w1, out=dx[rows])
    return dx, dw1, db1, dw2, column_sums(grad) if weights else None


def _add_product(total: Tensor | None, grad: Tensor, x: Tensor) -> Tensor:
    """Add grad^T x to `total`, in place unless it is None."""
    return grad.t() @ x if total is None else total.addmm_(grad.t(), x)


def _chunks(x: Tensor) -> list[slice]:
    size = _CPU_ROWS if x.device.type == "cpu" else max(1, len(x))
    return [slice(start, start + size) for start in range(0, len(x), size)]
