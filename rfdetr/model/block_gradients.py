"""The layers of an encoder block around its attention, with hand-written gradients.

Compared with one autograd node per layer they launch about half of the kernels, store fewer
activations, and convert the weights of a block to the format of autocast in one kernel. Axes: W
windows, N tokens, D encoder width, R = W * N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rfdetr.model.feedforward import feed_forward_gradients, feed_forward_rows
from rfdetr.model.precision import cast_together, column_sums, compute_dtype

if TYPE_CHECKING:
    from rfdetr.model.encoder_block import EncoderBlock


def norm_linear(x: Tensor, norm: nn.LayerNorm, linear: nn.Linear) -> Tensor:
    """linear(norm(x)): (W, N, D) to (W, N, D_out)."""
    dtype = compute_dtype(x)
    weights = cast_together(dtype, norm.weight, norm.bias, linear.weight, linear.bias)
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = _NormLinear.apply(x.to(dtype).flatten(0, 1), norm.eps, *weights)  # type: ignore[no-untyped-call]
    return y.reshape(*x.shape[:2], -1)


def finish_block(
    block: EncoderBlock, x: Tensor, heads: Tensor, kept: tuple[Tensor | None, Tensor | None]
) -> Tensor:
    """x1 = x + ls1(proj(heads)), then x1 + ls2(mlp(norm2(x1))), all (W, N, D).

    `kept` are the drop path factors (W, 1, 1) of the two branches.
    """
    dtype = compute_dtype(x)
    proj, norm, mlp = block.attn.proj, block.norm2, block.mlp
    weights = cast_together(
        dtype,
        *(proj.weight, proj.bias, block.ls1.gamma, norm.weight, norm.bias),
        *(mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias, block.ls2.gamma),
    )
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = _FinishBlock.apply(x.to(dtype), heads, *kept, norm.eps, *weights)  # type: ignore[no-untyped-call]
    return y


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, *weights: Tensor) -> Tensor:
        gain, shift, weight, bias = weights
        n, mean, rstd = torch.native_layer_norm(x, (x.shape[-1],), gain, shift, eps)
        ctx.save_for_backward(x, n, weight, mean, rstd, gain, shift)
        return torch.addmm(bias, n, weight.t())

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, n, weight, *norm = ctx.saved_tensors
        train = any(ctx.needs_input_grad[2:])
        with torch.autocast(grad.device.type, enabled=False):
            dx, dgain, dshift = _norm_gradients(grad @ weight, x, norm, train=train)
            if not train:
                return dx, None, None, None, None, None
            return dx, None, dgain, dshift, grad.t() @ n, column_sums(grad)


class _FinishBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, heads: Tensor, *others: Any) -> Tensor:
        kept1, kept2, eps, *weights = others
        wp, bp, gamma1, gain, shift, w1, b1, w2, b2, gamma2 = weights
        W, N, D = x.shape
        heads = heads.reshape(-1, D)
        branch = torch.addmm(bp, heads, wp.t()).view(W, N, D)
        x1 = torch.addcmul(x, branch if kept1 is None else branch.mul_(kept1), gamma1)
        x1 = x1.view(-1, D)
        n, mean, rstd = torch.native_layer_norm(x1, (D,), gain, shift, eps)
        branch, hidden = feed_forward_rows(n, (w1, b1), (w2, b2), "gelu")
        branch = branch.view(W, N, D)
        ctx.save_for_backward(heads, x1, mean, rstd, n, hidden, kept1, kept2, *weights)
        branch = branch if kept2 is None else branch.mul_(kept2)
        return torch.addcmul(x1.view(W, N, D), branch, gamma2)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        heads, x1, mean, rstd, n, hidden, kept1, kept2, *weights = ctx.saved_tensors
        wp, bp, gamma1, gain, shift, w1, _, w2, b2, gamma2 = weights
        D = grad.shape[-1]
        train = any(ctx.needs_input_grad[5:])
        with torch.autocast(grad.device.type, enabled=False):
            branch = _rows(grad, kept2)
            # The layer scale goes into the weights: no scaled copy of the branch is needed.
            dn, dw1, db1, dw2, db2 = feed_forward_gradients(
                branch, (n, hidden, w1, gamma2[:, None] * w2), "gelu", weights=train
            )
            assert dn is not None
            dx, dgain, dshift = _norm_gradients(dn, x1, (mean, rstd, gain, shift), train=train)
            dx = dx.add_(grad.reshape(-1, D)).view_as(grad)
            branch = _rows(dx, kept1)
            dheads = (branch @ (gamma1[:, None] * wp)).view_as(grad)
            if not train:
                return dx, dheads, *[None] * 13
            dwp, dbp, dgamma1 = _scaled_gradients(
                branch.t() @ heads, column_sums(branch), wp, bp, gamma1
            )
            assert dw2 is not None and db2 is not None
            dw2, db2, dgamma2 = _scaled_gradients(dw2, db2, w2, b2, gamma2)
        of_weights = dwp, dbp, dgamma1, dgain, dshift, dw1, db1, dw2, db2, dgamma2
        return dx, dheads, None, None, None, *of_weights


def _rows(grad: Tensor, kept: Tensor | None) -> Tensor:
    """The gradient (R, D) of a branch, from that of its block (W, N, D)."""
    return (grad if kept is None else grad * kept).reshape(-1, grad.shape[-1])


def _norm_gradients(
    grad: Tensor, x: Tensor, saved: Sequence[Tensor], *, train: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the input, gain and shift of a LayerNorm over the last axis of x (R, D).

    `saved` are mean, inverse standard deviation, gain and shift.
    """
    found: tuple[Tensor, Tensor | None, Tensor | None] = torch.ops.aten.native_layer_norm_backward(
        grad, x, (x.shape[-1],), *saved, [True, train, train]
    )
    return found


def _scaled_gradients(
    dw: Tensor, db: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight, bias and gamma in gamma * (x weight^T + bias).

    `dw` and `db` are those of weight and bias without the factor gamma.
    """
    products = (dw[:, None] @ weight[:, :, None]).flatten()  # row by row, without a temporary
    dgamma = torch.addcmul(products, db, bias)
    return dw * gamma[:, None], db * gamma, dgamma
