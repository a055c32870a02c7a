"""Sampling of mask logits and of target masks at points (x, y) in 0..1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rfdetr.model.targets import TargetMasks


def sample_logits(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples with border padding: maps (N, C, h, w), points (N, P, 2) -> (N, C, P)."""
    grid = 2 * points[:, None] - 1  # (N, 1, P, 2)
    return F.grid_sample(maps, grid, padding_mode="border", align_corners=False)[:, :, 0]


def sample_masks(targets: TargetMasks, which: Tensor, points: Tensor) -> Tensor:
    """Nearest samples with border padding of the masks `which` (N,), as float32 (N, P).

    points (N, P, 2) are fractions of each mask's own size.
    """
    size = targets.sizes[which].flip(-1)[:, None]  # (N, 1, 2) width, height
    pixel = (((2 * points - 1) + 1) * size - 1) / 2  # rounds like grid_sample
    pixel = torch.minimum(pixel.clamp(min=0), size - 1).round().long()  # (N, P, 2)
    return targets.masks[which[:, None], pixel[..., 1], pixel[..., 0]].float()
