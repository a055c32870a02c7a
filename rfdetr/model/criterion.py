"""The training losses, computed for all layers and images at once. See docs/model.md, "Losses".

Axes: L layers (decoder layers and query selection), B images, Q queries of all groups, K class
logits, N matched pairs, T targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from rfdetr.config import ModelConfig, SegmentationTrainConfig, TrainConfig
from rfdetr.model.boxes import cxcywh_to_xyxy, iou_and_giou
from rfdetr.model.mask_losses import Pairs, mask_losses
from rfdetr.model.matcher import HungarianMatcher, Match
from rfdetr.model.targets import FlatTargets, flatten_targets
from rfdetr.model.types import ImageTarget, LayerOutputs, Masks, Outputs

_ALPHA = 0.25  # exponent of the score in the class target of a pair; that of the IoU is 1 - alpha
_MIN_CLASS_TARGET = 0.01


class SetCriterion(nn.Module):
    """Unweighted losses of all layers; `weight_dict` has the weights of those that are trained.

    Queries are matched in `group_detr` groups in training mode and as one group in eval mode.
    """

    def __init__(
        self,
        matcher: HungarianMatcher,
        weight_dict: dict[str, float],
        *,
        group_detr: int = 1,
        mask_point_sample_ratio: int = 16,
    ) -> None:
        super().__init__()
        self.matcher = matcher
        self.weight_dict = weight_dict
        self.group_detr = group_detr
        self.mask_point_sample_ratio = mask_point_sample_ratio

    def forward(self, outputs: Outputs, targets: Sequence[ImageTarget]) -> dict[str, Tensor]:
        """Losses of the last layer, of earlier layers (`_0`, ...) and of the selection (`_enc`).

        All are float32 scalars. Raises InputError for targets that do not fit.
        """
        layers: dict[str, LayerOutputs] = {"": outputs}
        layers |= {f"_{i}": layer for i, layer in enumerate(outputs.get("aux_outputs", []))}
        if "enc_outputs" in outputs:
            layers["_enc"] = outputs["enc_outputs"]
        # With fewer memory tokens than queries the selection has fewer queries than the decoder.
        by_queries: dict[int, dict[str, LayerOutputs]] = {}
        for suffix, layer in layers.items():
            by_queries.setdefault(layer["pred_logits"].shape[1], {})[suffix] = layer
        losses: dict[str, Tensor] = {}
        with torch.autocast(outputs["pred_logits"].device.type, enabled=False):
            for same in by_queries.values():
                losses |= self._losses(same, targets)
        return losses

    def _losses(
        self, layers: Mapping[str, LayerOutputs], targets: Sequence[ImageTarget]
    ) -> dict[str, Tensor]:
        parts = list(layers.values())
        logits = torch.stack([part["pred_logits"].float() for part in parts])  # (L, B, Q, K)
        boxes = torch.stack([part["pred_boxes"].float() for part in parts])  # (L, B, Q, 4)
        masks = [part["pred_masks"] for part in parts] if "pred_masks" in parts[0] else None
        flat = flatten_targets(
            targets, logits.shape[1], logits.device, with_masks=masks is not None
        )
        num_groups = self.group_detr if self.training else 1
        mean_count = _MeanOverProcesses(flat.total * num_groups, logits.device)
        detached = None if masks is None else [_detach(m) for m in masks]
        matches = self.matcher.match_layers(
            logits.detach(), boxes.detach(), detached, flat, num_groups
        )
        indices = _pair_indices(matches, flat, logits.device)
        num_boxes = mean_count.result()
        terms = _class_and_box_losses(logits, boxes, indices, flat, num_boxes)
        losses: dict[str, Tensor] = {}
        counts = [len(query) for query, _ in matches[0]]
        of_layers = {name: values.unbind() for name, values in terms.items()}
        for i, suffix in enumerate(layers):
            for name, values in of_layers.items():
                if name != "class_error" or suffix == "":
                    losses[name + suffix] = values[i]
            if masks is not None:
                assert flat.masks is not None
                batch_idx, query_idx, target_idx = (index[i] for index in indices)
                pairs = Pairs(batch_idx, query_idx, target_idx, counts)
                cross_entropy, dice = mask_losses(
                    masks[i], pairs, flat.masks, self.mask_point_sample_ratio
                )
                losses["loss_mask_ce" + suffix] = cross_entropy / num_boxes
                losses["loss_mask_dice" + suffix] = dice / num_boxes
        return losses


def build_criterion(
    model_config: ModelConfig, train_config: TrainConfig | None = None
) -> SetCriterion:
    """The criterion of a model with the loss weights and mask points of the train config."""
    segmentation = model_config.segmentation_head
    weights = {
        "loss_ce": 1.0 if train_config is None else train_config.cls_loss_coef,
        "loss_bbox": 5.0,
        "loss_giou": 2.0,
    }
    ratio = 16
    if segmentation:
        weights |= {"loss_mask_ce": 5.0, "loss_mask_dice": 5.0}
        if isinstance(train_config, SegmentationTrainConfig):
            weights["loss_mask_ce"] = train_config.mask_ce_loss_coef
            weights["loss_mask_dice"] = train_config.mask_dice_loss_coef
            ratio = train_config.mask_point_sample_ratio
    suffixes = ["", *(f"_{i}" for i in range(model_config.dec_layers - 1)), "_enc"]
    return SetCriterion(
        HungarianMatcher(mask_point_sample_ratio=ratio),
        {name + suffix: weight for suffix in suffixes for name, weight in weights.items()},
        group_detr=model_config.group_detr,
        mask_point_sample_ratio=ratio,
    )


def _class_and_box_losses(
    logits: Tensor,
    boxes: Tensor,
    indices: tuple[Tensor, Tensor, Tensor],
    targets: FlatTargets,
    num_boxes: Tensor | float,
) -> dict[str, Tensor]:
    """Losses (L,) from logits (L, B, Q, K), boxes (L, B, Q, 4) and pair indices (L, N)."""
    batch_idx, query_idx, target_idx = indices
    layer = torch.arange(len(logits), device=logits.device)[:, None]  # (L, 1)
    src, tgt = boxes[layer, batch_idx, query_idx], targets.boxes[target_idx]  # (L, N, 4)
    labels = targets.labels[target_idx]  # (L, N)
    iou, giou = iou_and_giou(cxcywh_to_xyxy(src), cxcywh_to_xyxy(tgt))  # (L, N)
    distance = (src - tgt).abs().sum(dim=(1, 2))
    z = logits[layer, batch_idx, query_idx, labels]  # (L, N)
    matched = _matched_class_loss(z, iou.detach()).sum(dim=1)
    return {
        "loss_ce": (_sum_background_loss(logits) + matched) / num_boxes,
        "class_error": _class_error(logits.detach()[layer, batch_idx, query_idx], labels),
        "loss_bbox": distance / num_boxes,
        "loss_giou": (1 - giou).sum(dim=1) / num_boxes,
        "cardinality_error": _cardinality_error(logits.detach(), targets),
    }


class _BackgroundLoss(torch.autograd.Function):
    """Sum of -s^2 log(1 - s) over all axes but the first, s = sigmoid(z).

    The class loss of all entries as if none were matched. It has its own gradient because z is the
    largest tensor of the losses: nothing else is saved, and temporaries are reused in place.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.sigmoid().square_().mul_(F.softplus(z)).flatten(1).sum(dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        score = z.sigmoid()
        # d/dz = s^2 (s + 2 (1 - s) softplus(z))
        slope = F.softplus(z).mul_(1 - score).mul_(2).add_(score).mul_(score.square_())
        return slope.mul_(grads[0].reshape(-1, *[1] * (z.ndim - 1)))


def _sum_background_loss(z: Tensor) -> Tensor:
    """Background loss of every layer: (L, ...) to (L,)."""
    total: Tensor = _BackgroundLoss.apply(z)  # type: ignore[no-untyped-call]
    return total


def _matched_class_loss(z: Tensor, iou: Tensor) -> Tensor:
    """What matched entries add to the background loss, which counted them too.

    IoU-aware BCE (Align-DETR, Cai et al., 2023): -t log s - (1 - t) log(1 - s) with the target
    t = s^alpha IoU^(1 - alpha), detached and at least 0.01.
    """
    score, background = z.sigmoid(), F.softplus(z)  # softplus(z) is -log(1 - s)
    quality = score.detach() ** _ALPHA * iou.clamp(min=0) ** (1 - _ALPHA)
    t = quality.clamp(min=_MIN_CLASS_TARGET)
    # -t log s - (1 - t) log(1 - s) = softplus(z) - t z
    return (1 - score.square()) * background - t * z


@torch.no_grad()
def _class_error(logits: Tensor, labels: Tensor) -> Tensor:
    """100 - top-1 accuracy in percent of matched logits (L, N, K), 100 if there are none: (L,)."""
    correct = logits.argmax(dim=-1) == labels
    return 100 - 100 * correct.sum(dim=1) / max(1, labels.shape[1])


@torch.no_grad()
def _cardinality_error(logits: Tensor, targets: FlatTargets) -> Tensor:
    """Mean over images of | queries with a best score above 0.5 - targets |: (L,)."""
    confident = (logits.amax(dim=-1) > 0).sum(dim=-1)  # (L, B)
    return (confident - targets.counts_on_device).abs().float().mean(dim=1)


def _pair_indices(
    matches: list[list[Match]], targets: FlatTargets, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Image, query and flat target of every pair, each (L, N), in one host-to-device transfer."""
    starts = np.cumsum([0, *targets.counts[:-1]])
    counts = [len(query) for query, _ in matches[0]]
    batch_idx = np.repeat(np.arange(len(counts)), counts)
    rows = [
        (
            batch_idx,
            np.concatenate([query for query, _ in layer]),
            np.concatenate([tgt + start for (_, tgt), start in zip(layer, starts, strict=True)]),
        )
        for layer in matches
    ]
    packed = torch.from_numpy(np.array(rows, dtype=np.int64)).to(device, non_blocking=True)
    return packed[:, 0], packed[:, 1], packed[:, 2]


class _MeanOverProcesses:
    """max(1, count averaged over the processes of a distributed run), computed beside the matching.

    DDP averages the gradients of the processes. With this normalisation the average equals the
    gradient of one process that has all images.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self._count = float(count)
        self._total: Tensor | None = None
        if dist.is_available() and dist.is_initialized():
            self._total = torch.full((), self._count, device=device)
            self._work: Any = dist.all_reduce(self._total, async_op=True)

    def result(self) -> Tensor | float:
        if self._total is None:
            return max(1.0, self._count)
        self._work.wait()
        return (self._total / dist.get_world_size()).clamp(min=1)


def _detach(masks: Masks) -> Masks:
    if isinstance(masks, Tensor):
        return masks.detach()
    return {
        "spatial_features": masks["spatial_features"].detach(),
        "query_features": masks["query_features"].detach(),
        "bias": masks["bias"].detach(),
    }
