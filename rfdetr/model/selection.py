"""Two-stage query selection: the best memory tokens provide the reference boxes of the queries.

Two-stage Deformable DETR (Zhu et al., ICLR 2021) with separate heads for every query group (Group
DETR, Chen et al., ICCV 2023). See docs/model.md, "Query selection".

Axes: B images, S memory tokens, G query groups, Q queries per group, C channels, K class logits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rfdetr.config import ModelConfig
from rfdetr.model.boxes import apply_box_delta
from rfdetr.model.feedforward import MLP
from rfdetr.model.precision import compute_dtype, own_gradients, stack_together
from rfdetr.model.types import SpatialShapes

_LOW, _HIGH = 0.01, 0.99  # limits of valid proposals
_SAFE_SIDE = 49  # unpadded levels up to this side have every token centre within the limits

Affine = tuple[Tensor, Tensor]  # weight and bias of a layer, stacked over the groups


class Selection(NamedTuple):
    """Selected tokens; the groups follow each other along the query axis."""

    indices: Tensor  # (B, G*Q) int64, position in the memory
    memory: Tensor  # (B, G*Q, C) tokens after the projection of their group
    boxes: Tensor  # (B, G*Q, 4) cxcywh
    logits: Tensor  # (B, G*Q, K)


def make_proposals(
    spatial_shapes: SpatialShapes, masks: list[Tensor] | None, memory: Tensor
) -> tuple[Tensor, Tensor | None]:
    """One box (cxcywh) per memory token, and the tokens to drop (None: keep all).

    `masks` has one (B, h, w) bool per level, True on padding. Returns (B or 1, S, 4) in the dtype
    of `memory` and (B or 1, S) bool. Proposals of dropped tokens are 0.
    """
    boxes, padding = [], []
    for level, (h, w) in enumerate(spatial_shapes):
        y = torch.arange(h, device=memory.device, dtype=torch.float32) + 0.5
        x = torch.arange(w, device=memory.device, dtype=torch.float32) + 0.5
        if masks is None:
            x, y = x / w, y / h
        grid = torch.stack([x.expand(h, w), y[:, None].expand(h, w)], dim=-1)  # (h, w, 2)
        centre = grid.reshape(1, -1, 2)
        if masks is not None:
            valid = ~masks[level]
            extent = torch.stack([valid[:, 0].sum(1), valid[:, :, 0].sum(1)], dim=-1)  # (B, 2)
            centre = centre / extent[:, None]  # (B, h*w, 2)
            padding.append(masks[level].flatten(1))
        boxes.append(torch.cat([centre, torch.full_like(centre, 0.05 * 2.0**level)], dim=-1))
    proposals = torch.cat(boxes, dim=1)  # float32: bfloat16 would merge the centres of wide levels
    if masks is None and max(side for shape in spatial_shapes for side in shape) <= _SAFE_SIDE:
        return proposals.to(memory.dtype), None
    dropped = ~((proposals > _LOW) & (proposals < _HIGH)).all(dim=-1)
    if padding:
        dropped = dropped | torch.cat(padding, dim=1)
    return proposals.masked_fill(dropped[..., None], 0.0).to(memory.dtype), dropped


class QuerySelection(nn.Module):
    """Scores every memory token and selects the best ones, separately for every query group.

    All tokens are scored without gradients; only the selected ones are computed again with them.
    The heads of all groups run as one batched product.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C, G, K = config.hidden_dim, config.group_detr, config.num_classes + 1
        self.num_queries = config.num_queries
        self.enc_output = nn.ModuleList(nn.Linear(C, C) for _ in range(G))
        self.enc_output_norm = nn.ModuleList(nn.LayerNorm(C) for _ in range(G))
        self.enc_out_bbox_embed = nn.ModuleList(MLP(C, C, C, 4) for _ in range(G))
        self.enc_out_class_embed = nn.ModuleList(nn.Linear(C, K) for _ in range(G))

    def forward(self, memory: Tensor, proposals: Tensor, num_groups: int) -> Selection:
        """The best `min(num_queries, S)` tokens of each of the first `num_groups` groups.

        memory (B, S, C), already 0 at dropped tokens; proposals (B or 1, S, 4) cxcywh. Within a
        group the scores descend: the i-th token belongs to the i-th learned query.
        """
        B, S, C = memory.shape
        G = num_groups
        project, norm, classify, *box_layers = self._stacked(G, memory)
        with torch.no_grad():
            scores = _best_logits(memory, project, norm, classify)  # (G, B, S)
            indices = scores.topk(min(self.num_queries, S), dim=-1).indices  # (G, B, Q)
        rows = indices + torch.arange(B, device=indices.device)[:, None] * S
        rows = rows.reshape(G, -1)  # (G, B*Q), position in the memory of all images
        tokens = F.embedding(rows, memory.reshape(-1, C))  # (G, B*Q, C)
        tokens = _layer_norm(_linear(tokens, *project), *norm)
        logits = _linear(tokens, *classify)  # (G, B*Q, K)
        anchors = proposals.expand(B, -1, -1).reshape(-1, 4)[rows]  # (G, B*Q, 4)
        boxes = apply_box_delta(_box_delta(tokens, box_layers), anchors)

        def join_groups(x: Tensor) -> Tensor:
            """(G, B*Q, X) to (B, G*Q, X)."""
            return x.reshape(G, B, -1, x.shape[-1]).transpose(0, 1).flatten(1, 2)

        indices = indices.transpose(0, 1).flatten(1)  # (B, G*Q)
        return Selection(indices, join_groups(tokens), join_groups(boxes), join_groups(logits))

    def _stacked(self, num_groups: int, memory: Tensor) -> list[Affine]:
        """Projection, norm, class head and box layers of the first groups, stacked."""
        mlps = [mlp.layers for mlp in self.enc_out_bbox_embed if isinstance(mlp, MLP)]
        kinds: list[Iterable[Any]] = [
            self.enc_output,
            self.enc_output_norm,
            self.enc_out_class_embed,
            *zip(*mlps, strict=True),
        ]
        stacks = []
        for kind in kinds:
            layers = list(kind)[:num_groups]
            stacks += [[layer.weight for layer in layers], [layer.bias for layer in layers]]
        if own_gradients():
            stacked = stack_together(compute_dtype(memory), stacks)
        else:
            stacked = tuple(torch.stack(stack) for stack in stacks)
        return list(zip(stacked[::2], stacked[1::2], strict=True))


def _box_delta(tokens: Tensor, layers: list[Affine]) -> Tensor:
    """The box MLP of every group: (G, R, C) to (G, R, 4)."""
    *hidden, last = layers
    for weight, bias in hidden:
        tokens = F.relu(_linear(tokens, weight, bias), inplace=True)
    return _linear(tokens, *last)


def _best_logits(memory: Tensor, project: Affine, norm: Affine, classify: Affine) -> Tensor:
    """The highest class logit of every token in every group: (B, S, C) to (G, B, S)."""
    B, S, C = memory.shape
    weight, bias = project
    tokens = F.linear(memory.reshape(-1, C), weight.flatten(0, 1), bias.flatten())  # (B*S, G*C)
    tokens = tokens.reshape(B * S, -1, C).transpose(0, 1)  # (G, B*S, C)
    logits = _linear(_layer_norm(tokens, *norm), *classify)  # (G, B*S, K)
    return logits.amax(dim=-1).reshape(-1, B, S)


class _GroupLinear(torch.autograd.Function):
    """`_linear` whose weight gradient has the layout of the weights, so that no copy is made."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.transpose(1, 2) @ x, grad.sum(dim=1)


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """One linear layer per group: x (G, R, in), weight (G, out, in), bias (G, out)."""
    if not own_gradients():
        return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))  # (G, R, out)
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = _GroupLinear.apply(x.to(weight.dtype), weight, bias)  # type: ignore[no-untyped-call]
    return y


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """One LayerNorm per group: x (G, R, C), weight and bias (G, C)."""
    with torch.autocast(x.device.type, enabled=False):  # it would convert to float32
        x = F.layer_norm(x, (int(x.shape[-1]),), eps=1e-5)
    return torch.addcmul(bias[:, None].to(x.dtype), x, weight[:, None].to(x.dtype))
