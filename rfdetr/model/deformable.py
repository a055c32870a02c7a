"""Multi-scale deformable attention (Zhu et al., ICLR 2021; model specification, section 5.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shapes = Sequence[tuple[int, int]]


def sample_levels(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of bilinear samples, zero outside the maps.

    value (B, S, H, d) holds the levels one after the other, each (h, w) of `shapes` row-major;
    locations (B, Q, H, N, P, 2) as (x, y) in [0, 1]; weights (B, Q, H, N * P). Returns (B, Q, H*d).
    """
    batch, _, heads, width = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    grids = (2 * locations - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)
    sampled, start = [], 0
    for level, (rows, columns) in enumerate(shapes):
        part = value[:, start : start + rows * columns].permute(0, 2, 3, 1)
        part = part.reshape(batch * heads, width, rows, columns)
        sampled.append(F.grid_sample(part, grids[level], align_corners=False))
        start += rows * columns
    weights = weights.transpose(1, 2).reshape(batch * heads, 1, queries, len(shapes) * points)
    samples = torch.cat(sampled, dim=-1) if len(sampled) > 1 else sampled[0]
    mixed = (samples * weights).sum(-1)
    return mixed.reshape(batch, heads * width, queries).transpose(1, 2)


class DeformableAttention(nn.Module):
    """Each query looks at a few learned points of every level."""

    def __init__(self, width: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        samples = heads * levels * points
        self.sampling_offsets = nn.Linear(width, samples * 2)
        self.attention_weights = nn.Linear(width, samples)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)

    def initialise(self) -> None:
        """Offsets in a star, even weights (model specification, section 9)."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angles = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        star = torch.stack([angles.cos(), angles.sin()], dim=-1)
        star = star / star.abs().amax(dim=-1, keepdim=True)
        reach = torch.arange(1, self.points + 1, dtype=torch.float32)
        offsets = star[:, None, None, :] * reach[:, None]
        offsets = offsets.expand(self.heads, self.levels, self.points, 2)
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
        reference: Tensor,
        memory: Tensor,
        shapes: Shapes,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Query (B, Q, C), reference (B, Q, N or 1, 4), memory (B, S, C), padding (B, S) bool."""
        batch, queries, width = query.shape
        value = self.value_proj(memory)
        if padding is not None:
            value = value.masked_fill(padding[..., None], 0.0)
        value = value.reshape(batch, -1, self.heads, width // self.heads)
        offsets = self.sampling_offsets(query).reshape(
            batch, queries, self.heads, self.levels, self.points, 2
        )
        weights = self.attention_weights(query)
        weights = weights.reshape(batch, queries, self.heads, -1).softmax(dim=-1)
        centre = reference[:, :, None, :, None, :2]
        step = reference[:, :, None, :, None, 2:] * (0.5 / self.points)
        locations = torch.addcmul(centre, offsets.to(step.dtype), step)
        dtype = locations.dtype  # coordinates need more than bfloat16 under autocast
        mixed = sample_levels(value.to(dtype), shapes, locations, weights.to(dtype))
        output: Tensor = self.output_proj(mixed.to(query.dtype))
        return output
