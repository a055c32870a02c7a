"""Two linear layers with an activation between them, thrifty with memory in training."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Activation = Literal["relu", "gelu"]
_CPU_ROWS = 1024  # rows of the hidden layer that stay in the cache between two products


def feed_forward(
    x: Tensor, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], act: Activation
) -> Tensor:
    """Linear, activation, linear over the last axis of x; `first` and `second` are weight, bias.

    Eager training without autocast keeps only one copy of the hidden layer for the gradient.
    """
    rows = x.flatten(0, -2)
    graph = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    if torch.is_grad_enabled() and not graph and not torch.is_autocast_enabled(x.device.type):
        y: Tensor = _FeedForward.apply(rows, *first, *second, act)  # type: ignore[no-untyped-call]
    else:
        hidden = F.linear(rows, *first)
        y = F.linear(F.relu(hidden) if act == "relu" else F.gelu(hidden), *second)
    return y.reshape(*x.shape[:-1], -1)


class _FeedForward(torch.autograd.Function):
    """The gradient recomputes the activation and passes over the rows in pieces."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *layers: Any) -> Tensor:
        w1, b1, w2, b2, act = layers
        hidden = x.new_empty(len(x), len(w1))
        y = x.new_empty(len(x), len(w2))
        for part in _pieces(x):
            piece = torch.addmm(b1, x[part], w1.t(), out=hidden[part])
            torch.addmm(b2, piece.relu_() if act == "relu" else F.gelu(piece), w2.t(), out=y[part])
        ctx.save_for_backward(x, w1, w2, hidden)
        ctx.act = act
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, w2, hidden = ctx.saved_tensors
        first, second = ctx.needs_input_grad[1], ctx.needs_input_grad[3]  # frozen layers need none
        dx, dw1, dw2 = torch.empty_like(x), torch.zeros_like(w1), torch.zeros_like(w2)
        db1 = w1.new_zeros(len(w1))
        for part in _pieces(x):
            piece, slope = hidden[part], grad[part] @ w2
            if second:
                dw2.addmm_(grad[part].t(), piece if ctx.act == "relu" else F.gelu(piece))
            if ctx.act == "relu":
                torch.ops.aten.threshold_backward.grad_input(slope, piece, 0, grad_input=slope)
            else:
                torch.ops.aten.gelu_backward.grad_input(slope, piece, grad_input=slope)
            if first:
                dw1.addmm_(slope.t(), x[part])
                db1 += slope.sum(dim=0)
            torch.mm(slope, w1, out=dx[part])
        return (
            dx,
            dw1 if first else None,
            db1 if first else None,
            dw2 if second else None,
            grad.sum(dim=0) if second else None,
            None,
        )


def _pieces(x: Tensor) -> list[slice]:
    size = _CPU_ROWS if x.device.type == "cpu" else max(1, len(x))
    return [slice(start, start + size) for start in range(0, len(x), size)]
