"""Hungarian matching of predictions to targets. See docs/model.md, "Matching".

The costs of all layers and groups are computed together and copied to the host in one transfer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from rfdetr.model.boxes import cxcywh_to_xyxy, iou_and_giou
from rfdetr.model.points import sample_logits, sample_masks
from rfdetr.model.targets import (
    FlatTargets,
    TargetMasks,
    flatten_targets,
    raise_value_problems,
    value_problems,
)
from rfdetr.model.types import ImageTarget, LayerOutputs, Masks

Match = tuple[np.ndarray, np.ndarray]  # query indices, target indices within the image; int64
_FOCAL_ALPHA = 0.25


class HungarianMatcher(nn.Module):
    """The cheapest assignment of queries to targets, per image and query group.

    Cost of a pair: the weighted sum of a focal class cost (Lin et al., ICCV 2017, as in Deformable
    DETR), the L1 distance of the boxes, -GIoU, and for masks cross-entropy and dice at random
    points (as in Mask2Former, Cheng et al., CVPR 2022).
    """

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
        self, outputs: LayerOutputs, targets: Sequence[ImageTarget], group_detr: int = 1
    ) -> list[tuple[Tensor, Tensor]]:
        """Match one layer: per image (query indices, target indices), int64 on the host."""
        logits = outputs["pred_logits"]
        masks = outputs.get("pred_masks")
        flat = flatten_targets(targets, len(logits), logits.device, with_masks=masks is not None)
        with torch.autocast(logits.device.type, enabled=False):
            matches = self.match_layers(
                logits.float()[None],
                outputs["pred_boxes"].float()[None],
                None if masks is None else [masks],
                flat,
                group_detr,
            )[0]
        return [(torch.from_numpy(query), torch.from_numpy(target)) for query, target in matches]

    @torch.no_grad()
    def match_layers(
        self,
        logits: Tensor,
        boxes: Tensor,
        masks: Sequence[Masks] | None,
        targets: FlatTargets,
        num_groups: int,
    ) -> list[list[Match]]:
        """Match L layers: result[layer][image] = (query indices, target indices within the image).

        logits (L, B, G*Q, K) and boxes (L, B, G*Q, 4) are float32, `masks` has one entry per layer.
        Query indices ascend within their group; groups follow each other. Raises InputError for
        labels outside the class head and for invalid boxes.
        """
        L, _, GQ, K = logits.shape
        if targets.total == 0:
            empty = np.zeros(0, dtype=np.int64)
            return [[(empty, empty) for _ in targets.counts] for _ in range(L)]
        cost = self._class_and_box_cost(logits, boxes, targets)  # (L, T, G*Q)
        if masks is not None:
            assert targets.masks is not None
            cost += torch.stack([self._mask_cost(m, targets, targets.masks) for m in masks])
        packed = torch.cat([cost.flatten(), value_problems(targets, K)]).cpu().numpy()
        raise_value_problems(packed[cost.numel() :], targets, K)
        table = packed[: cost.numel()].reshape(L, targets.total, GQ)
        return [_assign(_finite(layer), targets.counts, num_groups) for layer in table]

    def _class_and_box_cost(self, logits: Tensor, boxes: Tensor, targets: FlatTargets) -> Tensor:
        """(L, T, G*Q) cost of every target with the queries of its image."""
        labels = targets.labels.clamp(0, logits.shape[-1] - 1)
        z = logits[:, targets.batch_idx, :, labels].transpose(0, 1)  # (T, L, G*Q) -> (L, T, G*Q)
        score = z.sigmoid()
        positive = _FOCAL_ALPHA * (1 - score) ** 2 * -F.logsigmoid(z)
        negative = (1 - _FOCAL_ALPHA) * score**2 * -F.logsigmoid(-z)
        src, tgt = boxes[:, targets.batch_idx], targets.boxes[:, None]  # (L, T, G*Q, 4), (T, 1, 4)
        distance = (src - tgt).abs().sum(dim=-1)
        _, giou = iou_and_giou(cxcywh_to_xyxy(src), cxcywh_to_xyxy(tgt))
        return (
            self.cost_bbox * distance
            + self.cost_class * (positive - negative)
            - self.cost_giou * giou
        )

    def _mask_cost(self, masks: Masks, targets: FlatTargets, target_masks: TargetMasks) -> Tensor:
        """(T, G*Q) cost of the masks of one layer at P random points, the same for all pairs."""
        maps = (masks if isinstance(masks, Tensor) else masks["spatial_features"]).float()
        P = max(1, maps.shape[-2] * maps.shape[-1] // self.mask_point_sample_ratio)
        points = torch.rand(1, P, 2, device=maps.device)
        z = sample_logits(maps, points.expand(len(maps), -1, -1))  # (B, G*Q or C, P)
        if not isinstance(masks, Tensor):
            queries = masks["query_features"].float()  # (B, G*Q, C)
            z = torch.einsum("bqc,bcp->bqp", queries, z) + masks["bias"].float()
        which = torch.arange(targets.total, device=maps.device)
        sampled = sample_masks(target_masks, which, points.expand(targets.total, -1, -1))  # (T, P)
        truth = z.new_zeros(len(maps), max(targets.counts), P)
        truth[targets.batch_idx, targets.slot] = sampled  # (B, Tmax, P), padded with empty masks
        score = z.sigmoid()
        overlap = torch.einsum("bqp,btp->bqt", score, truth)
        agreement = torch.einsum("bqp,btp->bqt", z, truth)
        cross_entropy = (F.softplus(z).sum(-1, keepdim=True) - agreement) / P
        area = score.sum(-1, keepdim=True) + truth.sum(-1)[:, None]  # (B, G*Q, Tmax)
        dice = 1 - (2 * overlap + 1) / (area + 1)
        cost: Tensor = self.cost_mask_ce * cross_entropy + self.cost_mask_dice * dice
        return cost[targets.batch_idx, :, targets.slot]


def _finite(cost: np.ndarray) -> np.ndarray:
    """Replace non-finite costs by a value above every finite one."""
    finite = np.isfinite(cost)
    if finite.all():
        return cost
    known = cost[finite]
    worst = known.max() + np.abs(known).max() + 1 if len(known) else 1.0
    return np.where(finite, cost, worst).astype(cost.dtype)


def _assign(cost: np.ndarray, counts: list[int], num_groups: int) -> list[Match]:
    """One assignment per image and group for one layer; cost (T, G*Q)."""
    Q = cost.shape[1] // num_groups
    matches, start = [], 0
    for count in counts:
        rows = cost[start : start + count]  # (targets of the image, G*Q)
        start += count
        queries, targets = [], []
        for group in range(num_groups):
            target, query = linear_sum_assignment(rows[:, group * Q : (group + 1) * Q])
            order = np.argsort(query)
            queries.append(query[order] + group * Q)
            targets.append(target[order])
        matches.append((np.concatenate(queries), np.concatenate(targets)))
    return matches
