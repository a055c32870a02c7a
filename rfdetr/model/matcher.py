"""Hungarian matching of predictions to targets (model specification, section 7.1).

The costs of all layers and groups are computed in one go and cross to the host in one transfer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from rfdetr.model.boxes import cxcywh_to_xyxy, iou_and_giou
from rfdetr.model.points import sample_logits, sample_masks
from rfdetr.model.targets import (
    FlatTargets,
    flatten_targets,
    raise_value_problems,
    value_problems,
)

Match = tuple[Tensor, Tensor]
_ALPHA = 0.25


class HungarianMatcher(nn.Module):
    """The cheapest assignment of queries to targets, per image and group of queries."""

    def __init__(
        self,
        *,
        cost_class: float = 2.0,
        cost_bbox: float = 5.0,
        cost_giou: float = 2.0,
        cost_mask_ce: float = 5.0,
        cost_mask_dice: float = 5.0,
        mask_point_sample_ratio: int = 16,
    ) -> None:
        super().__init__()
        self.cost_class, self.cost_bbox, self.cost_giou = cost_class, cost_bbox, cost_giou
        self.cost_mask_ce, self.cost_mask_dice = cost_mask_ce, cost_mask_dice
        self.mask_point_sample_ratio = mask_point_sample_ratio

    @torch.no_grad()
    def forward(
        self, outputs: dict[str, Any], targets: Sequence[dict[str, Any]], group_detr: int = 1
    ) -> list[Match]:
        """Match one layer: per image (query indices, target indices), int64 on the host."""
        logits = outputs["pred_logits"]
        masks = outputs.get("pred_masks")
        flat = flatten_targets(targets, len(logits), logits.device, with_masks=masks is not None)
        with torch.autocast(logits.device.type, enabled=False):
            matched = self.match_layers(
                logits.float()[None],
                outputs["pred_boxes"].float()[None],
                None if masks is None else [masks],
                flat,
                group_detr,
            )[0]
        return [(torch.from_numpy(a), torch.from_numpy(b)) for a, b in matched]

    @torch.no_grad()
    def match_layers(
        self,
        logits: Tensor,
        boxes: Tensor,
        masks: Sequence[Any] | None,
        targets: FlatTargets,
        groups: int,
    ) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        """Match every layer: result[layer][image] = (query indices, target indices within image).

        logits (L, B, Q', K) and boxes (L, B, Q', 4) float32, masks one entry per layer. Queries
        are offset by the start of their group and ascend within it. Raises InputError for labels
        outside the head and for broken boxes.
        """
        layers, _, queries, outputs = logits.shape
        if targets.total == 0:
            empty = np.zeros(0, dtype=np.int64)
            return [[(empty, empty) for _ in targets.counts] for _ in range(layers)]
        cost = self._box_and_class_cost(logits, boxes, targets)
        if masks is not None:
            cost += torch.stack([self._mask_cost(layer, targets) for layer in masks])
        packed = torch.cat([cost.flatten(), value_problems(targets, outputs)]).cpu().numpy()
        raise_value_problems(packed[cost.numel() :], targets, outputs)
        table = packed[: cost.numel()].reshape(layers, targets.total, queries)
        return [_assign(_finite(layer), targets.counts, groups) for layer in table]

    def _box_and_class_cost(self, logits: Tensor, boxes: Tensor, targets: FlatTargets) -> Tensor:
        """(L, T, Q') cost of every target against the queries of its own image."""
        labels = targets.labels.clamp(0, logits.shape[-1] - 1)
        z = logits[:, targets.image, :, labels].transpose(0, 1)
        score = z.sigmoid()
        positive = _ALPHA * (1 - score) ** 2 * -F.logsigmoid(z)
        negative = (1 - _ALPHA) * score**2 * -F.logsigmoid(-z)
        predicted, wanted = boxes[:, targets.image], targets.boxes[:, None]
        distance = (predicted - wanted).abs().sum(dim=-1)
        _, giou = iou_and_giou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(wanted))
        return (
            self.cost_bbox * distance
            + self.cost_class * (positive - negative)
            - self.cost_giou * giou
        )

    def _mask_cost(self, masks: Any, targets: FlatTargets) -> Tensor:
        """(T, Q') cost of the masks of one layer, at random points common to the call."""
        sparse = isinstance(masks, dict)
        maps = (masks["spatial_features"] if sparse else masks).float()
        count = max(1, maps.shape[-2] * maps.shape[-1] // self.mask_point_sample_ratio)
        points = torch.rand(1, count, 2, device=maps.device)
        z = sample_logits(maps, points.expand(len(maps), -1, -1))
        if sparse:
            z = masks["query_features"].float() @ z + masks["bias"].float()
        assert targets.masks is not None
        assert targets.mask_sizes is not None
        which = torch.arange(targets.total, device=maps.device)
        wanted = z.new_zeros(len(maps), max(targets.counts), count)
        wanted[targets.image, targets.slot] = sample_masks(
            targets.masks, targets.mask_sizes, which, points.expand(targets.total, -1, -1)
        )
        wanted = wanted.transpose(1, 2)
        score = z.sigmoid()
        cross_entropy = (F.softplus(z).sum(-1, keepdim=True) - z @ wanted) / count
        area = score.sum(-1, keepdim=True) + wanted.sum(1, keepdim=True)
        dice = 1 - (2 * (score @ wanted) + 1) / (area + 1)
        cost: Tensor = self.cost_mask_ce * cross_entropy + self.cost_mask_dice * dice
        return cost[targets.image, :, targets.slot]


def _finite(cost: np.ndarray) -> np.ndarray:
    """Replace non-finite costs by a value above every finite one."""
    good = np.isfinite(cost)
    if good.all():
        return cost
    known = cost[good]
    worst = known.max() + np.abs(known).max() + 1 if len(known) else 1.0
    return np.where(good, cost, worst).astype(cost.dtype)


def _assign(
    cost: np.ndarray, counts: list[int], groups: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Assignments per image for one layer; cost (T, groups * Q)."""
    size = cost.shape[1] // groups
    result, start = [], 0
    for count in counts:
        rows = cost[start : start + count]
        start += count
        queries, wanted = [], []
        for group in range(groups):
            target, query = linear_sum_assignment(rows[:, group * size : (group + 1) * size])
            order = np.argsort(query)
            queries.append(query[order] + group * size)
            wanted.append(target[order])
        result.append((np.concatenate(queries), np.concatenate(wanted)))
    return result
