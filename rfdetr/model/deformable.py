"""Multi-scale deformable attention (Zhu et al., Deformable DETR, ICLR 2021)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfdetr.model.types import SpatialShapes


def sample_levels(
    value: Tensor, spatial_shapes: SpatialShapes, locations: Tensor, weights: Tensor
) -> Tensor:
    """Weighted sum of bilinear samples of L levels, zero outside the maps.

    value (B, S, heads, D) holds the levels one after the other, each (h, w) row-major; locations
    (B, Q, heads, L, P, 2) as (x, y) in 0..1; weights (B, Q, heads, L*P). Returns (B, Q, heads*D).
    """
    B, _, heads, D = value.shape
    Q, L, P = locations.shape[1], locations.shape[3], locations.shape[4]
    # Queries are the last axis throughout: sums over the few samples are fast then.
    grids = (2 * locations - 1).permute(3, 0, 2, 4, 1, 5).flatten(1, 2)  # (L, B*heads, P, Q, 2)
    samples, start = [], 0
    for level, (h, w) in enumerate(spatial_shapes):
        x = value[:, start : start + h * w].permute(0, 2, 3, 1)  # (B, heads, D, h*w)
        x = x.reshape(B * heads, D, h, w)
        samples.append(F.grid_sample(x, grids[level], align_corners=False))  # (B*heads, D, P, Q)
        start += h * w
    sampled = torch.cat(samples, dim=2) if L > 1 else samples[0]  # (B*heads, D, L*P, Q)
    weights = weights.permute(0, 2, 3, 1).reshape(B * heads, 1, L * P, Q)
    # An einsum makes this one batched product per query, which is slower than product and sum.
    output = (sampled * weights).sum(2)  # (B*heads, D, Q)
    return output.reshape(B, heads * D, Q).transpose(1, 2)


class DeformableAttention(nn.Module):
    """Cross-attention of every query to a few learned points of every level."""

    def __init__(self, dim: int, num_heads: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(dim, samples * 2)
        self.attention_weights = nn.Linear(dim, samples)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)

    def initialise(self) -> None:
        """Offsets that spread from the centre, one direction per head, and equal weights."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)  # (heads, 2)
        directions = directions / directions.abs().amax(dim=-1, keepdim=True)
        steps = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        offsets = directions[:, None, None, :] * steps[:, None]  # (heads, 1, P, 2)
        offsets = offsets.expand(self.num_heads, self.num_levels, self.num_points, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        memory: Tensor,
        spatial_shapes: SpatialShapes,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Query (B, Q, C) attends to memory (B, S, C); returns (B, Q, C).

        reference_points (B, Q, L or 1, 4) are boxes, cxcywh as fractions of the level;
        padding_mask (B, S) is True on tokens that must not be seen.
        """
        B, Q, C = query.shape
        heads, L, P = self.num_heads, self.num_levels, self.num_points
        value = self.value_proj(memory)
        if padding_mask is not None:
            value = value.masked_fill(padding_mask[..., None], 0.0)
        value = value.reshape(B, -1, heads, C // heads)
        offsets = self.sampling_offsets(query).reshape(B, Q, heads, L, P, 2)
        weights = self.attention_weights(query).reshape(B, Q, heads, L * P).softmax(dim=-1)
        centre = reference_points[:, :, None, :, None, :2]  # (B, Q, 1, L, 1, 2)
        # P points in a row, one offset unit apart, end at the edge of the reference box.
        unit = reference_points[:, :, None, :, None, 2:] * (0.5 / P)
        locations = torch.addcmul(centre, offsets.to(unit.dtype), unit)  # (B, Q, heads, L, P, 2)
        # Under autocast the references stay float32, and so must the sampling: bfloat16 could not
        # tell neighbouring pixels of a large map apart.
        dtype = locations.dtype
        sampled = sample_levels(value.to(dtype), spatial_shapes, locations, weights.to(dtype))
        output: Tensor = self.output_proj(sampled.to(query.dtype))
        return output
