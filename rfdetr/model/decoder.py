"""The query transformer: two-stage selection and a post-norm decoder (specification, section 5)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfdetr.config import ModelConfig
from rfdetr.model.boxes import apply_box_delta
from rfdetr.model.deformable import DeformableAttention, Shapes
from rfdetr.model.feedforward import feed_forward
from rfdetr.model.selection import MLP, Selection, cell_proposals, select_queries


def sine_embedding(boxes: Tensor, width: int) -> Tensor:
    """Sines of (..., 4) boxes: `width // 2` numbers for each of y, x, w, h -> (..., 2 * width)."""
    half = width // 2
    step = torch.arange(0, half, 2, device=boxes.device, dtype=torch.float32)
    frequency = (2 * math.pi * 10000.0 ** (-step / half)).to(boxes.dtype)
    ordered = torch.cat([boxes[..., 1:2], boxes[..., 0:1], boxes[..., 2:]], dim=-1)
    angle = ordered[..., None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-3)


class SelfAttention(nn.Module):
    """Multi-head attention with the parameter layout of nn.MultiheadAttention.

    Query and key are state plus position, the value is the state. `groups` equal chunks of the
    query axis attend only within themselves.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, state: Tensor, placed: Tensor, groups: int) -> Tensor:
        """State and state plus position, both (B, groups * Q, C)."""
        batch, queries, width = state.shape
        cut = 2 * width
        weight, value_weight = self.in_proj_weight[:cut], self.in_proj_weight[cut:]
        bias, value_bias = self.in_proj_bias[:cut], self.in_proj_bias[cut:]
        chunk = (batch * groups, queries // groups, -1, self.heads, width // self.heads)
        query, key = F.linear(placed, weight, bias).reshape(chunk).permute(2, 0, 3, 1, 4).unbind()
        value = F.linear(state, value_weight, value_bias).reshape(chunk).squeeze(2).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, key, value)
        attended: Tensor = self.out_proj(mixed.transpose(1, 2).reshape(batch, queries, width))
        return attended


class DecoderLayer(nn.Module):
    """Self attention, deformable cross attention, feed-forward; a norm after each residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_dim
        self.self_attn = SelfAttention(width, config.sa_nheads)
        self.norm1 = nn.LayerNorm(width)
        self.cross_attn = DeformableAttention(
            width, config.ca_nheads, len(config.projector_scale), config.dec_n_points
        )
        self.linear1 = nn.Linear(width, config.dim_feedforward)
        self.linear2 = nn.Linear(config.dim_feedforward, width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, state: Tensor, position: Tensor, memory: Memory, groups: int) -> Tensor:
        state = self.norm1(state + self.self_attn(state, state + position, groups))
        crossed = self.cross_attn(
            state + position, memory.reference, memory.cells, memory.shapes, memory.padding
        )
        state = self.norm2(state + crossed)
        first, second = self.linear1, self.linear2
        fed = feed_forward(state, (first.weight, first.bias), (second.weight, second.bias), "relu")
        output: Tensor = self.norm3(state + fed)
        return output


class Memory(NamedTuple):
    """What every decoder layer looks at."""

    cells: Tensor  # (B, S, C)
    shapes: Shapes
    padding: Tensor | None  # (B, S) bool
    reference: Tensor  # (B, Q, N or 1, 4) reference boxes per level


class Decoder(nn.Module):
    """Layers with one shared output norm; references stay fixed ("lite" refinement)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_dim
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.dec_layers))
        self.norm = nn.LayerNorm(width)
        self.ref_point_head = MLP(2 * width, width, width)

    def forward(self, state: Tensor, memory: Memory, groups: int) -> list[Tensor]:
        """Normalised hidden states (B, Q, C), one per layer."""
        sines = sine_embedding(memory.reference[:, :, 0], state.shape[-1])
        position = self.ref_point_head(sines.to(state.dtype))
        hidden = []
        for layer in self.layers:
            state = layer(state, position, memory, groups)
            hidden.append(self.norm(state))
        return hidden


class TransformerOutput(NamedTuple):
    hidden: list[Tensor]  # per layer (B, G*Q, C)
    reference: Tensor  # (B, G*Q, 4)
    selection: Selection


class Transformer(nn.Module):
    """Levels of the backbone to hidden states of the queries."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, groups, rows = config.hidden_dim, config.group_detr, config.num_classes + 1
        self.num_queries = config.num_queries
        self.decoder = Decoder(config)
        self.enc_output = nn.ModuleList(nn.Linear(width, width) for _ in range(groups))
        self.enc_output_norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(groups))
        self.enc_out_bbox_embed = nn.ModuleList(MLP(width, width, width, 4) for _ in range(groups))
        self.enc_out_class_embed = nn.ModuleList(nn.Linear(width, rows) for _ in range(groups))

    def initialise(self) -> None:
        """Xavier uniform for every matrix, then the deformable attention's own rule."""
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.initialise()

    def forward(
        self,
        levels: list[Tensor],
        masks: list[Tensor] | None,
        learned: tuple[Tensor, Tensor],
        groups: int,
    ) -> TransformerOutput:
        """Levels (B, C, h, w), their padding masks, learned (references (G*Q, 4), features)."""
        shapes = [(int(level.shape[2]), int(level.shape[3])) for level in levels]
        rows = [level.flatten(2).transpose(1, 2) for level in levels]
        cells = torch.cat(rows, dim=1) if len(rows) > 1 else rows[0]
        padding = None if masks is None else torch.cat([m.flatten(1) for m in masks], dim=1)
        proposals, dropped = cell_proposals(shapes, masks, cells)
        candidates = cells if dropped is None else cells.masked_fill(dropped[..., None], 0.0)
        selection = select_queries(self, candidates, proposals, self.num_queries, groups)
        reference = self._references(learned[0], selection.boxes.detach())
        ratios = None if masks is None else _valid_ratios(masks, reference)
        spread = reference[:, :, None] if ratios is None else reference[:, :, None] * ratios
        state = learned[1].expand(cells.shape[0], -1, -1)
        hidden = self.decoder(state, Memory(cells, shapes, padding, spread), groups)
        return TransformerOutput(hidden, reference, selection)

    @staticmethod
    def _references(learned: Tensor, boxes: Tensor) -> Tensor:
        """Learned offsets applied to selected boxes; surplus learned rows are used as they are."""
        selected, total = boxes.shape[1], learned.shape[0]
        moved = apply_box_delta(learned[:selected], boxes)
        if selected == total:
            return moved
        rest = learned[selected:].to(moved.dtype).expand(boxes.shape[0], -1, -1)
        return torch.cat([moved, rest], dim=1)


def _valid_ratios(masks: list[Tensor], like: Tensor) -> Tensor:
    """Unpadded fraction of every level as (w, h, w, h): (B, 1, N, 4)."""
    ratios = []
    for mask in masks:
        valid = (~mask).to(like.dtype)
        ratios.append(torch.stack([valid[:, 0].mean(1), valid[:, :, 0].mean(1)] * 2, dim=-1))
    return torch.stack(ratios, dim=1)[:, None]
