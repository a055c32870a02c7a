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
)
from rfdetr.model.types import ImageTarget, LayerOutputs, Masks

Match = tuple[np.ndarray, np.ndarray]  # query indices, target indices within the image; int64
_FOCAL_ALPHA = 0.25
_PAIRS_AT_ONCE = 1 << 21  # of a query and a target; bounds the temporaries to about 200 MiB


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
        T, G = targets.total, num_groups
        sizes = [L * T * GQ, L * T * G, L * T * G, T, 4 * T]
        packed = logits.new_empty(sum(sizes))  # for a single transfer
        parts = torch.split(packed, sizes)
        cost = parts[0].view(L, T, GQ)
        step = max(1, _PAIRS_AT_ONCE // (L * GQ))
        chunks = [slice(start, start + step) for start in range(0, T, step)]
        for rows in chunks:
            cost[:, rows] = self._class_and_box_cost(logits, boxes, targets, rows)
        if masks is not None:
            assert targets.masks is not None
            for layer, layer_masks in zip(cost, masks, strict=True):
                self._add_mask_cost(layer, layer_masks, targets, targets.masks)
        table, cheapest, minima = cost.view(L, T, G, -1), *(p.view(L, T, G) for p in parts[1:3])
        for rows in chunks:
            lowest, cheapest[:, rows] = table[:, rows].min(dim=-1)
            equal = table[:, rows] == lowest[..., None]  # all False if the lowest is NaN
            minima[:, rows] = torch.count_nonzero(equal, dim=-1)
        parts[3].copy_(targets.labels)
        parts[4].copy_(targets.boxes.flatten())
        costs, nearest, times, labels, boxes_on_host = _to_host(packed, sizes)
        raise_value_problems(labels, boxes_on_host.reshape(T, 4), targets, K)
        shape = (L, T, G)
        return _assign(
            costs.reshape(*shape, -1),
            nearest.reshape(shape).astype(np.int64),
            times.reshape(shape) != 1,
            targets.counts,
        )

    def _class_and_box_cost(
        self, logits: Tensor, boxes: Tensor, targets: FlatTargets, rows: slice
    ) -> Tensor:
        """(L, t, G*Q) cost of the t targets in `rows` with the queries of their images."""
        batch_idx = targets.batch_idx[rows]
        labels = targets.labels[rows].clamp(0, logits.shape[-1] - 1)
        z = logits[:, batch_idx, :, labels].transpose(0, 1)  # (t, L, G*Q) -> (L, t, G*Q)
        score, background = z.sigmoid(), F.softplus(z)  # softplus(z) is -log(1 - score)
        positive = (1 - score).square() * (background - z)
        negative = score.square() * background
        focal = torch.sub(_FOCAL_ALPHA * positive, negative, alpha=1 - _FOCAL_ALPHA)
        src, tgt = boxes[:, batch_idx], targets.boxes[rows, None]  # (L, t, G*Q, 4), (t, 1, 4)
        distance = (src - tgt).abs().sum(dim=-1)
        _, giou = iou_and_giou(cxcywh_to_xyxy(src), cxcywh_to_xyxy(tgt))
        cost = torch.add(self.cost_bbox * distance, focal, alpha=self.cost_class)
        return cost.sub_(giou, alpha=self.cost_giou)

    def _add_mask_cost(
        self, cost: Tensor, masks: Masks, targets: FlatTargets, target_masks: TargetMasks
    ) -> None:
        """Add the cost of the masks of one layer at P random points, the same for all pairs.

        cost (T, G*Q) is changed in place.
        """
        maps = (masks if isinstance(masks, Tensor) else masks["spatial_features"]).float()
        P = max(1, maps.shape[-2] * maps.shape[-1] // self.mask_point_sample_ratio)
        points = torch.rand(1, P, 2, device=maps.device)
        z = sample_logits(maps, points.expand(len(maps), -1, -1))  # (B, G*Q or C, P)
        which = torch.arange(targets.total, device=maps.device)
        sampled = sample_masks(target_masks, which, points.expand(targets.total, -1, -1))  # (T, P)
        largest, stop = max(targets.counts), 0
        step = max(1, _PAIRS_AT_ONCE // (cost.shape[1] * max(largest, P)))
        for first in range(0, len(maps), step):
            images = slice(first, first + step)
            start, stop = stop, stop + sum(targets.counts[images])
            image, slot = targets.batch_idx[start:stop] - first, targets.slot[start:stop]
            logits = z[images]  # (b, G*Q or C, P)
            if not isinstance(masks, Tensor):
                queries = masks["query_features"][images].float()  # (b, G*Q, C)
                logits = torch.einsum("bqc,bcp->bqp", queries, logits) + masks["bias"].float()
            truth = logits.new_zeros(len(logits), largest, P)
            truth[image, slot] = sampled[start:stop]  # (b, Tmax, P), padded with empty masks
            cost[start:stop] += self._pairwise_mask_cost(logits, truth)[image, :, slot]

    def _pairwise_mask_cost(self, z: Tensor, truth: Tensor) -> Tensor:
        """(b, q, t) cost of logits (b, q, P) and masks (b, t, P) of the same images."""
        score = z.sigmoid()
        overlap = torch.einsum("bqp,btp->bqt", score, truth)
        agreement = torch.einsum("bqp,btp->bqt", z, truth)
        cross_entropy = (F.softplus(z).sum(-1, keepdim=True) - agreement) / z.shape[-1]
        area = score.sum(-1, keepdim=True) + truth.sum(-1)[:, None]  # (b, q, t)
        dice = 1 - (2 * overlap + 1) / (area + 1)
        cost: Tensor = self.cost_mask_ce * cross_entropy + self.cost_mask_dice * dice
        return cost


def _to_host(packed: Tensor, sizes: Sequence[int]) -> list[np.ndarray]:
    """Parts of a flat tensor on the host, in one transfer through page-locked memory."""
    on_host = packed.to("cpu", non_blocking=True)
    if packed.is_cuda:
        torch.cuda.current_stream(packed.device).synchronize()
    return np.split(on_host.numpy(), np.cumsum(sizes[:-1]))


def _assign(
    table: np.ndarray, cheapest: np.ndarray, unsure: np.ndarray, counts: Sequence[int]
) -> list[list[Match]]:
    """The cheapest matches of every layer and image, from costs (L, T, G, Q).

    `cheapest` (L, T, G) is the cheapest query of every target, `unsure` marks those that have
    another equally cheap one or a cost that is not a number. If the cheapest queries of all targets
    of an image differ and none is unsure, they are the only optimum. Only the groups of which this
    is not true are solved.
    """
    L, T, G, Q = table.shape
    B = len(counts)
    start = np.cumsum([0, *counts])
    image = np.repeat(np.arange(B), counts)
    layer_and_image = np.arange(L)[:, None] * B + image  # (L, T)
    problem = layer_and_image[..., None] * G + np.arange(G)  # (L, T, G), one per image and group
    keys = (problem * Q + cheapest).ravel()
    order = keys.argsort(kind="stable")  # by layer, image, group, query
    keys = keys[order]
    shared = keys[1:][keys[1:] == keys[:-1]] // Q
    query = keys % (G * Q)
    target = (order // G) % T - start[image[(order // G) % T]]
    for index in np.unique(np.concatenate([shared, problem[unsure]])).tolist():
        layer, b, group = index // G // B, index // G % B, index % G
        row, column = linear_sum_assignment(_finite(table, layer, start[b : b + 2], group))
        by_query = column.argsort()
        first = (layer * T + start[b]) * G + group * counts[b]
        own = slice(first, first + len(row))
        query[own], target[own] = column[by_query] + group * Q, row[by_query]
    matches: list[list[Match]] = [[] for _ in range(L)]
    for layer, b in np.ndindex(L, B):
        own = slice((layer * T + start[b]) * G, (layer * T + start[b + 1]) * G)
        # With more targets than queries, the last ones of every group are not matched.
        q, t = (values[own].reshape(G, counts[b])[:, :Q].ravel() for values in (query, target))
        matches[layer].append((q, t))
    return matches


def _finite(table: np.ndarray, layer: int, rows: np.ndarray, group: int) -> np.ndarray:
    """The costs (n, Q) of a group; those that are not finite are above all others of the layer."""
    costs: np.ndarray = table[layer, rows[0] : rows[1], group]
    finite = np.isfinite(costs)
    if finite.all():
        return costs
    known = table[layer][np.isfinite(table[layer])]
    return np.where(finite, costs, known.max() + np.abs(known).max() + 1 if len(known) else 1.0)
