"""Feed-forward layers: plain MLPs, and a two-layer block that needs less memory in training."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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
    (C_out,). Eager training without autocast stores one copy of the hidden layer instead of two.
    """
    rows = x.flatten(0, -2)  # (R, C_in)
    graph = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    if torch.is_grad_enabled() and not graph and not torch.is_autocast_enabled(x.device.type):
        y: Tensor = _FeedForward.apply(rows, *first, *second, act)  # type: ignore[no-untyped-call]
    else:
        hidden = F.linear(rows, *first)
        y = F.linear(F.relu(hidden) if act == "relu" else F.gelu(hidden), *second)
    return y.reshape(*x.shape[:-1], -1)


class _FeedForward(torch.autograd.Function):
    """Saves the hidden layer only, recomputes the activation, and works on chunks of rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *layers: Any) -> Tensor:
        w1, b1, w2, b2, act = layers
        hidden = x.new_empty(len(x), len(w1))
        y = x.new_empty(len(x), len(w2))
        for rows in _chunks(x):
            h = torch.addmm(b1, x[rows], w1.t(), out=hidden[rows])
            torch.addmm(b2, h.relu_() if act == "relu" else F.gelu(h), w2.t(), out=y[rows])
        ctx.save_for_backward(x, w1, w2, hidden)
        ctx.act = act
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, w2, hidden = ctx.saved_tensors
        first, second = ctx.needs_input_grad[1], ctx.needs_input_grad[3]  # False when frozen
        dx, dw1, dw2 = torch.empty_like(x), torch.zeros_like(w1), torch.zeros_like(w2)
        db1 = w1.new_zeros(len(w1))
        for rows in _chunks(x):
            h, dh = hidden[rows], grad[rows] @ w2
            if second:
                dw2.addmm_(grad[rows].t(), h if ctx.act == "relu" else F.gelu(h))
            if ctx.act == "relu":
                torch.ops.aten.threshold_backward.grad_input(dh, h, 0, grad_input=dh)
            else:
                torch.ops.aten.gelu_backward.grad_input(dh, h, grad_input=dh)
            if first:
                dw1.addmm_(dh.t(), x[rows])
                db1 += dh.sum(dim=0)
            torch.mm(dh, w1, out=dx[rows])
        return (
            dx,
            dw1 if first else None,
            db1 if first else None,
            dw2 if second else None,
            grad.sum(dim=0) if second else None,
            None,
        )


def _chunks(x: Tensor) -> list[slice]:
    size = _CPU_ROWS if x.device.type == "cpu" else max(1, len(x))
    return [slice(start, start + size) for start in range(0, len(x), size)]
