"""The query transformer: two-stage selection, then a post-norm decoder with deformable attention.

Axes: B images, S memory tokens, G query groups, Q queries per group, C channels, L levels.
See docs/model.md, "Decoder".
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfdetr.config import ModelConfig
from rfdetr.model.boxes import apply_box_delta
from rfdetr.model.deformable import DeformableAttention
from rfdetr.model.feedforward import MLP, feed_forward
from rfdetr.model.precision import compute_dtype, layer_norm
from rfdetr.model.selection import QuerySelection, Selection, make_proposals
from rfdetr.model.types import SpatialShapes


def sine_embedding(boxes: Tensor, dim: int) -> Tensor:
    """Sine embedding of boxes (..., 4), cxcywh as fractions: (..., 2 * dim).

    `dim // 2` numbers, sines and cosines in turn, for each of y, x, w, h (DAB-DETR, Liu et al.,
    ICLR 2022).
    """
    half = dim // 2
    step = torch.arange(0, half, 2, device=boxes.device, dtype=torch.float32)
    frequency = (2 * math.pi * 10000.0 ** (-step / half)).to(boxes.dtype)  # (dim/4,)
    yxwh = torch.cat([boxes[..., 1:2], boxes[..., 0:1], boxes[..., 2:]], dim=-1)
    angle = yxwh[..., None] * frequency  # (..., 4, dim/4)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-3)


class SelfAttention(nn.Module):
    """Multi-head self-attention with the parameter layout of nn.MultiheadAttention.

    Query and key are tgt + pos, the value is tgt. Query groups do not see each other.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, tgt: Tensor, pos: Tensor, num_groups: int) -> Tensor:
        """Queries tgt and their positions pos, both (B, G*Q, C), to (B, G*Q, C)."""
        B, GQ, C = tgt.shape
        qk_weight, v_weight = torch.split(self.in_proj_weight, [2 * C, C])
        qk_bias, v_bias = torch.split(self.in_proj_bias, [2 * C, C])
        # Groups become part of the batch: (B*G, Q, 2 or 1, heads, C/heads)
        split = (B * num_groups, GQ // num_groups, -1, self.num_heads, C // self.num_heads)
        qk = F.linear(tgt + pos, qk_weight, qk_bias).reshape(split)
        q, k = qk.permute(2, 0, 3, 1, 4).unbind()  # each (B*G, heads, Q, C/heads)
        v = F.linear(tgt, v_weight, v_bias).reshape(split).squeeze(2).transpose(1, 2)
        x = F.scaled_dot_product_attention(q, k, v)  # (B*G, heads, Q, C/heads)
        output: Tensor = self.out_proj(x.transpose(1, 2).reshape(B, GQ, C))
        return output


class DecoderContext(NamedTuple):
    """What every decoder layer attends to."""

    memory: Tensor  # (B, S, C)
    spatial_shapes: SpatialShapes
    padding_mask: Tensor | None  # (B, S) bool, True on padding
    reference_points: Tensor  # (B, G*Q, L or 1, 4) cxcywh as fractions of the padded levels


class DecoderLayer(nn.Module):
    """Self-attention, deformable cross-attention, feed-forward; a norm after each residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C = config.hidden_dim
        self.self_attn = SelfAttention(C, config.sa_nheads)
        self.norm1 = nn.LayerNorm(C)
        self.cross_attn = DeformableAttention(
            C, config.ca_nheads, len(config.projector_scale), config.dec_n_points
        )
        self.linear1 = nn.Linear(C, config.dim_feedforward)
        self.linear2 = nn.Linear(config.dim_feedforward, C)
        self.norm2 = nn.LayerNorm(C)
        self.norm3 = nn.LayerNorm(C)

    def forward(self, tgt: Tensor, pos: Tensor, context: DecoderContext, num_groups: int) -> Tensor:
        """Queries tgt and their position embeddings pos, both (B, G*Q, C), to (B, G*Q, C)."""
        tgt = layer_norm(tgt + self.self_attn(tgt, pos, num_groups), self.norm1)
        attended = self.cross_attn(
            tgt + pos,
            context.reference_points,
            context.memory,
            context.spatial_shapes,
            context.padding_mask,
        )
        tgt = layer_norm(tgt + attended, self.norm2)
        first, second = self.linear1, self.linear2
        ffn = feed_forward(tgt, (first.weight, first.bias), (second.weight, second.bias), "relu")
        return layer_norm(tgt + ffn, self.norm3)


class Decoder(nn.Module):
    """Layers with one shared output norm. All of them use the same reference boxes."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C = config.hidden_dim
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.dec_layers))
        self.norm = nn.LayerNorm(C)
        self.ref_point_head = MLP(2 * C, C, C)

    def forward(self, tgt: Tensor, context: DecoderContext, num_groups: int) -> list[Tensor]:
        """Queries (B, G*Q, C) to the normalised output of every layer, each (B, G*Q, C)."""
        sines = sine_embedding(context.reference_points[:, :, 0], tgt.shape[-1])  # (B, G*Q, 2*C)
        pos = self.ref_point_head(sines.to(tgt.dtype))  # (B, G*Q, C)
        hidden_states = []
        for layer in self.layers:
            tgt = layer(tgt, pos, context, num_groups)
            hidden_states.append(layer_norm(tgt, self.norm))
        return hidden_states


class TransformerOutput(NamedTuple):
    """Hidden states of the queries and the boxes that they refine."""

    hidden_states: list[Tensor]  # per decoder layer (B, G*Q, C)
    reference_points: Tensor  # (B, G*Q, 4) cxcywh
    selection: Selection


class Transformer(nn.Module):
    """Query selection and decoder."""

    selection: QuerySelection

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.decoder = Decoder(config)
        # Weight files name the selection's heads `transformer.enc_*`. They are registered here
        # under these names; the module that computes with them is kept out of the registry.
        selection = QuerySelection(config)
        for name, heads in selection.named_children():
            self.add_module(name, heads)
        self.__dict__["selection"] = selection

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
        srcs: list[Tensor],
        masks: list[Tensor] | None,
        refpoint_embed: Tensor,
        query_feat: Tensor,
        num_groups: int,
    ) -> TransformerOutput:
        """Decode feature maps `srcs`, each (B, C, h, w), with padding masks (B, h, w) bool.

        refpoint_embed (G*Q, 4) and query_feat (G*Q, C) are the learned queries.
        """
        spatial_shapes = [(int(src.shape[2]), int(src.shape[3])) for src in srcs]
        tokens = [src.flatten(2).transpose(1, 2) for src in srcs]  # each (B, h*w, C)
        memory = torch.cat(tokens, dim=1) if len(tokens) > 1 else tokens[0]  # (B, S, C)
        padding_mask = None if masks is None else torch.cat([m.flatten(1) for m in masks], dim=1)
        proposals, dropped = make_proposals(spatial_shapes, masks, memory)
        kept = memory if dropped is None else memory.masked_fill(dropped[..., None], 0.0)
        selection: Selection = self.selection(kept, proposals, num_groups)
        reference = self._reference_points(refpoint_embed, selection.boxes.detach())
        per_level = reference[:, :, None]  # (B, G*Q, 1, 4)
        if masks is not None:
            per_level = per_level * _valid_ratios(masks, reference)
        context = DecoderContext(memory, spatial_shapes, padding_mask, per_level)
        queries = query_feat.to(compute_dtype(memory))
        tgt = queries.expand(memory.shape[0], -1, -1)  # (B, G*Q, C)
        return TransformerOutput(self.decoder(tgt, context, num_groups), reference, selection)

    @staticmethod
    def _reference_points(refpoint_embed: Tensor, boxes: Tensor) -> Tensor:
        """Learned deltas (G*Q, 4) applied to selected boxes (B, N, 4): (B, G*Q, 4).

        With fewer tokens than queries, the surplus learned rows are boxes themselves.
        """
        selected, total = boxes.shape[1], refpoint_embed.shape[0]
        moved = apply_box_delta(refpoint_embed[:selected], boxes)
        if selected == total:
            return moved
        rest = refpoint_embed[selected:].to(moved.dtype).expand(boxes.shape[0], -1, -1)
        return torch.cat([moved, rest], dim=1)


def _valid_ratios(masks: list[Tensor], like: Tensor) -> Tensor:
    """Unpadded fraction of every level as (w, h, w, h): (B, 1, L, 4)."""
    ratios = []
    for mask in masks:
        valid = (~mask).to(like.dtype)
        ratios.append(torch.stack([valid[:, 0].mean(1), valid[:, :, 0].mean(1)] * 2, dim=-1))
    return torch.stack(ratios, dim=1)[:, None]
