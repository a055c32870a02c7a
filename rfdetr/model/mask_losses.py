"""Mask losses at uncertain points of the matched pairs (model specification, section 7.5)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rfdetr.model.points import sample_logits, sample_masks
from rfdetr.model.targets import FlatTargets

_OVERSAMPLE = 3
_UNCERTAIN_SHARE = 0.75


class Pairs(NamedTuple):
    """Matched pairs of one layer, image-major; index tensors are (N,) int64."""

    image: Tensor
    query: Tensor
    wanted: Tensor  # position in the flat targets
    counts: list[int]  # pairs per image


def mask_losses(
    masks: Any, pairs: Pairs, targets: FlatTargets, ratio: int
) -> tuple[Tensor, Tensor]:
    """Summed cross entropy and dice loss of the matched pairs of one layer.

    masks are dense logits (B, Q, h, w) or the sparse dict. Points after PointRend (Kirillov et
    al., CVPR 2020); one point per `ratio` pixels of the predicted mask.
    """
    logits = _matched_logits(masks, pairs)[:, None]
    height, width = logits.shape[-2:]
    points = _choose_points(logits.detach(), max(height, height * width // ratio))
    predicted = sample_logits(logits, points)[:, 0]
    assert targets.masks is not None
    assert targets.mask_sizes is not None
    truth = sample_masks(targets.masks, targets.mask_sizes, pairs.wanted, points)
    entropy = F.binary_cross_entropy_with_logits(predicted, truth, reduction="none")
    score = predicted.sigmoid()
    overlap = 2 * (score * truth).sum(-1) + 1
    dice = 1 - overlap / (score.sum(-1) + truth.sum(-1) + 1)
    return entropy.mean(-1).sum(), dice.sum()


def _matched_logits(masks: Any, pairs: Pairs) -> Tensor:
    """Dense logits (N, h, w) of the matched pairs only."""
    if not isinstance(masks, dict):
        dense: Tensor = masks[pairs.image, pairs.query].float()
        return dense
    spatial = masks["spatial_features"].float()
    features = masks["query_features"].float()[pairs.image, pairs.query]
    # One product per image: pairs differ in number, and padding would compute unused masks.
    products = [
        chosen @ maps.flatten(1)
        for chosen, maps in zip(torch.split(features, pairs.counts), spatial, strict=True)
    ]
    logits: Tensor = torch.cat(products) + masks["bias"].float()
    return logits.reshape(-1, *spatial.shape[2:])


def _choose_points(logits: Tensor, count: int) -> Tensor:
    """(N, count, 2): the most uncertain of three times as many random points, and fresh ones."""
    pairs, device = len(logits), logits.device
    random = torch.rand(pairs, _OVERSAMPLE * count, 2, device=device)
    kept = int(_UNCERTAIN_SHARE * count)
    doubt = sample_logits(logits, random)[:, 0].abs()
    best = doubt.topk(kept, dim=1, largest=False).indices
    chosen = random.gather(1, best[..., None].expand(-1, -1, 2))
    return torch.cat([chosen, torch.rand(pairs, count - kept, 2, device=device)], dim=1)
