"""Two-stage query selection: the best cells of the memory become references of the queries.

Model specification, section 4. The ranking looks at every cell without recording gradients; only
the selected cells are computed again with them, for all query groups in one batched product.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfdetr.model.boxes import apply_box_delta
from rfdetr.model.deformable import Shapes

_LOW, _HIGH = 0.01, 0.99
_SAFE_SIDE = 49  # unpadded grids up to this side have every cell centre inside (0.01, 0.99)


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(
            0, -2
        )  # the in-place ReLU is free on a plain product, not on a view of one
        for layer in self.layers[:-1]:
            rows = F.relu(layer(rows), inplace=True)
        last: Tensor = self.layers[-1](rows)
        return last.reshape(*x.shape[:-1], -1)


class Selection(NamedTuple):
    """Selected cells, groups one after the other along the query axis."""

    cells: Tensor  # (B, G*Q) int64, position in the memory
    memory: Tensor  # (B, G*Q, C)
    boxes: Tensor  # (B, G*Q, 4) cxcywh
    logits: Tensor  # (B, G*Q, K)


def cell_proposals(
    shapes: Shapes, masks: list[Tensor] | None, like: Tensor
) -> tuple[Tensor, Tensor | None]:
    """One box (cxcywh) per memory cell, and which cells are dropped (None: none of them).

    `masks` holds one (B, h, w) bool per level, True on padding. Returns (B or 1, S, 4) and
    (B or 1, S) bool. Proposals of dropped cells are 0.
    """
    boxes, padding = [], []
    for level, (rows, columns) in enumerate(shapes):
        y = torch.arange(rows, device=like.device, dtype=torch.float32) + 0.5
        x = torch.arange(columns, device=like.device, dtype=torch.float32) + 0.5
        grid = torch.stack([x.expand(rows, columns), y[:, None].expand(rows, columns)], dim=-1)
        if masks is None:
            centre = (grid / grid.new_tensor([columns, rows])).reshape(1, -1, 2)
        else:
            valid = ~masks[level]
            extent = torch.stack([valid[:, 0].sum(1), valid[:, :, 0].sum(1)], dim=-1)
            centre = (grid / extent[:, None, None]).flatten(1, 2)
            padding.append(masks[level].flatten(1))
        boxes.append(torch.cat([centre, torch.full_like(centre, 0.05 * 2.0**level)], dim=-1))
    proposals = torch.cat(boxes, dim=1)  # float32 until here: low precision merges wide grids
    largest = max(side for shape in shapes for side in shape)
    if masks is None and largest <= _SAFE_SIDE:
        return proposals.to(like.dtype), None
    dropped = ~((proposals > _LOW) & (proposals < _HIGH)).all(dim=-1)
    if padding:
        dropped = dropped | torch.cat(padding, dim=1)
    return proposals.masked_fill(dropped[..., None], 0.0).to(like.dtype), dropped


def select_queries(
    transformer: nn.Module,
    memory: Tensor,
    proposals: Tensor,
    num_queries: int,
    groups: int,
) -> Selection:
    """The best `min(num_queries, S)` cells of each group, in descending order of their score.

    `transformer` owns the `enc_*` lists; memory (B, S, C) is already zero at dropped cells.
    """
    heads = _GroupHeads(transformer, groups)
    batch, cells, width = memory.shape
    with torch.no_grad():
        scores = heads.scores(memory.detach())
        index = scores.topk(min(num_queries, cells), dim=-1).indices  # (G, B, Q)
    rows = index + torch.arange(batch, device=index.device)[:, None] * cells
    chosen = F.embedding(rows.reshape(groups, -1), memory.reshape(-1, width))
    embedded = heads.embed(chosen)
    logits = heads.classify(embedded)
    delta = heads.regress(embedded)
    anchors = proposals.expand(batch, -1, -1).reshape(-1, 4)[rows.reshape(groups, -1)]
    boxes = apply_box_delta(delta, anchors)

    def join(x: Tensor) -> Tensor:
        """(G, B*Q, X) -> (B, G*Q, X)."""
        return x.reshape(groups, batch, -1, x.shape[-1]).transpose(0, 1).flatten(1, 2)

    return Selection(index.transpose(0, 1).flatten(1), join(embedded), join(boxes), join(logits))


class _GroupHeads:
    """The `enc_*` layers of the first `groups` query groups, stacked for batched products."""

    def __init__(self, transformer: nn.Module, groups: int) -> None:
        lists: Any = transformer
        self.project = _stack(lists.enc_output, groups)
        self.norm = _stack(lists.enc_output_norm, groups)
        self.score = _stack(lists.enc_out_class_embed, groups)
        mlps: list[MLP] = list(lists.enc_out_bbox_embed)[:groups]
        depth = len(mlps[0].layers)
        self.mlp = [_stack([mlp.layers[i] for mlp in mlps], groups) for i in range(depth)]

    def embed(self, rows: Tensor) -> Tensor:
        """(G, R, C) -> (G, R, C): linear and norm of each group."""
        return self._normalise(_grouped(rows, *self.project))

    def classify(self, rows: Tensor) -> Tensor:
        return _grouped(rows, *self.score)

    def regress(self, rows: Tensor) -> Tensor:
        for weight, bias in self.mlp[:-1]:
            rows = F.relu(_grouped(rows, weight, bias), inplace=True)
        return _grouped(rows, *self.mlp[-1])

    def scores(self, memory: Tensor) -> Tensor:
        """Best class logit of every cell: (B, S, C) -> (G, B, S)."""
        batch, cells, width = memory.shape
        weight, bias = (part.detach() for part in self.project)
        rows = F.linear(memory.reshape(-1, width), weight.flatten(0, 1), bias.flatten())
        rows = rows.reshape(batch * cells, -1, width).transpose(0, 1)
        logits = _grouped(self._normalise(rows), *(part.detach() for part in self.score))
        return logits.amax(dim=-1).reshape(-1, batch, cells)

    def _normalise(self, rows: Tensor) -> Tensor:
        weight, bias = self.norm
        normed = F.layer_norm(rows, (int(rows.shape[-1]),), eps=1e-5)
        return torch.addcmul(bias[:, None].to(normed.dtype), normed, weight[:, None])


def _stack(layers: Any, groups: int) -> tuple[Tensor, Tensor]:
    """Weights and biases of the first layers, stacked on a new first axis."""
    chosen = list(layers)[:groups]
    return torch.stack([layer.weight for layer in chosen]), torch.stack([x.bias for x in chosen])


def _grouped(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Rows (G, R, I), weight (G, O, I), bias (G, O) -> (G, R, O)."""
    return torch.baddbmm(bias[:, None], rows, weight.transpose(1, 2))
