"""Mask losses at uncertain points of the matched pairs. See docs/model.md, "Mask losses".

The points are those of PointRend (Kirillov et al., CVPR 2020).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rfdetr.model.points import sample_logits, sample_masks
from rfdetr.model.targets import TargetMasks
from rfdetr.model.types import Masks

_OVERSAMPLE = 3
_UNCERTAIN_SHARE = 0.75


class Pairs(NamedTuple):
    """The N matched pairs of one layer, one image after the other; indices are (N,) int64."""

    batch_idx: Tensor
    query_idx: Tensor
    target_idx: Tensor  # position in the flat targets
    counts: list[int]  # pairs per image


def mask_losses(
    masks: Masks, pairs: Pairs, targets: TargetMasks, point_ratio: int
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and dice loss of the masks of one layer, summed over the matched pairs.

    There is one point per `point_ratio` pixels of the predicted mask, and at least one per row.
    """
    logits = _matched_logits(masks, pairs)[:, None]  # (N, 1, h, w)
    h, w = logits.shape[-2:]
    points = _uncertain_points(logits.detach(), max(h, h * w // point_ratio))  # (N, P, 2)
    z = sample_logits(logits, points)[:, 0]  # (N, P)
    truth = sample_masks(targets, pairs.target_idx, points)  # (N, P)
    cross_entropy = F.binary_cross_entropy_with_logits(z, truth, reduction="none")
    score = z.sigmoid()
    overlap = 2 * (score * truth).sum(-1) + 1
    dice = 1 - overlap / (score.sum(-1) + truth.sum(-1) + 1)  # (N,)
    return cross_entropy.mean(-1).sum(), dice.sum()


def _matched_logits(masks: Masks, pairs: Pairs) -> Tensor:
    """Dense logits (N, h, w) of the matched pairs only."""
    if isinstance(masks, Tensor):
        return masks[pairs.batch_idx, pairs.query_idx].float()
    spatial = masks["spatial_features"].float()  # (B, C, h, w)
    queries = masks["query_features"].float()[pairs.batch_idx, pairs.query_idx]  # (N, C)
    # One product per image: the numbers of pairs differ, and padding would compute unused masks.
    logits = [
        torch.einsum("nc,chw->nhw", q, x)
        for q, x in zip(torch.split(queries, pairs.counts), spatial, strict=True)
    ]
    return torch.cat(logits) + masks["bias"].float()


def _uncertain_points(logits: Tensor, count: int) -> Tensor:
    """(N, count, 2): the most uncertain of three times as many random points, and fresh ones."""
    N, device = len(logits), logits.device
    random = torch.rand(N, _OVERSAMPLE * count, 2, device=device)
    num_uncertain = int(_UNCERTAIN_SHARE * count)
    certainty = sample_logits(logits, random)[:, 0].abs()  # (N, 3 * count)
    index = certainty.topk(num_uncertain, dim=1, largest=False).indices
    uncertain = random.gather(1, index[..., None].expand(-1, -1, 2))  # (N, num_uncertain, 2)
    return torch.cat([uncertain, torch.rand(N, count - num_uncertain, 2, device=device)], dim=1)
