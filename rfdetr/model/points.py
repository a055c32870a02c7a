"""Sampling of mask logits and of target masks at points (x, y) in [0, 1]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_logits(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples with border padding: maps (N, C, h, w), points (N, P, 2) -> (N, C, P)."""
    grid = 2 * points[:, None] - 1
    return F.grid_sample(maps, grid, padding_mode="border", align_corners=False)[:, :, 0]


def sample_masks(masks: Tensor, sizes: Tensor, which: Tensor, points: Tensor) -> Tensor:
    """Nearest samples with border padding of the masks `which`, as float32 (N, P).

    masks (T, H, W) bool, sizes (T, 2) their own height and width, which (N,), points (N, P, 2).
    """
    sides = sizes[which].flip(-1)[:, None]
    place = (((2 * points - 1) + 1) * sides - 1) / 2
    place = torch.minimum(place.clamp(min=0), sides - 1).round().long()
    return masks[which[:, None], place[..., 1], place[..., 0]].float()
