"""The training losses (model specification, section 7), vectorised over layers and images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from rfdetr.config import ModelConfig, SegmentationTrainConfig, TrainConfig
from rfdetr.model.boxes import cxcywh_to_xyxy, iou_and_giou
from rfdetr.model.mask_losses import Pairs, mask_losses
from rfdetr.model.matcher import HungarianMatcher
from rfdetr.model.targets import FlatTargets, flatten_targets

_QUALITY_SHARE = 0.25  # exponent of the score in the class target; the IoU has the rest
_LOWEST_TARGET = 0.01


class SetCriterion(nn.Module):
    """Unweighted loss terms of all layers; `weight_dict` holds the weights of those that train.

    Matching splits the queries into `group_detr` groups in training mode and one in eval mode.
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

    def forward(
        self, outputs: dict[str, Any], targets: Sequence[dict[str, Any]]
    ) -> dict[str, Tensor]:
        """Terms of the last layer without suffix, then `_0 ...` and `_enc`; float32 scalars.

        targets per image: labels (n,) int64, boxes (n, 4) relative cxcywh, and masks (n, H, W)
        for a network with masks. Raises InputError for targets that do not fit.
        """
        layers = {"": outputs}
        layers |= {f"_{i}": part for i, part in enumerate(outputs.get("aux_outputs", []))}
        if "enc_outputs" in outputs:
            layers["_enc"] = outputs["enc_outputs"]
        alike: dict[int, dict[str, Any]] = {}  # a grid with few cells proposes fewer queries
        for suffix, part in layers.items():
            alike.setdefault(part["pred_logits"].shape[1], {})[suffix] = part
        losses: dict[str, Tensor] = {}
        with torch.autocast(outputs["pred_logits"].device.type, enabled=False):
            for same in alike.values():
                losses |= self._losses(same, targets)
        return losses

    def _losses(
        self, layers: dict[str, dict[str, Any]], targets: Sequence[dict[str, Any]]
    ) -> dict[str, Tensor]:
        parts = list(layers.values())
        logits = torch.stack([part["pred_logits"].float() for part in parts])
        boxes = torch.stack([part["pred_boxes"].float() for part in parts])
        masks = [part["pred_masks"] for part in parts] if "pred_masks" in parts[0] else None
        flat = flatten_targets(
            targets, logits.shape[1], logits.device, with_masks=masks is not None
        )
        groups = self.group_detr if self.training else 1
        detached = None if masks is None else [_detach(mask) for mask in masks]
        matches = self.matcher.match_layers(logits.detach(), boxes.detach(), detached, flat, groups)
        image, query, wanted = _pair_indices(matches, flat, logits.device)
        number = _mean_over_processes(flat.total * groups, logits.device)
        terms = _class_and_box_terms(logits, boxes, (image, query, wanted), flat, number)
        losses: dict[str, Tensor] = {}
        counts = [len(found) for found, _ in matches[0]]
        for i, suffix in enumerate(layers):
            for name, values in terms.items():
                if name != "class_error" or suffix == "":
                    losses[name + suffix] = values[i]
            if masks is not None:
                pairs = Pairs(image[i], query[i], wanted[i], counts)
                entropy, dice = mask_losses(masks[i], pairs, flat, self.mask_point_sample_ratio)
                losses["loss_mask_ce" + suffix] = entropy / number
                losses["loss_mask_dice" + suffix] = dice / number
        return losses


def build_criterion(
    model_config: ModelConfig, train_config: TrainConfig | None = None
) -> SetCriterion:
    """The criterion of a model; loss weights and mask points follow the training configuration."""
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


def _class_and_box_terms(
    logits: Tensor,
    boxes: Tensor,
    pairs: tuple[Tensor, Tensor, Tensor],
    flat: FlatTargets,
    number: Tensor | float,
) -> dict[str, Tensor]:
    """Terms (L,) from logits (L, B, Q, K), boxes (L, B, Q, 4) and pair indices (L, N)."""
    image, query, wanted = pairs
    layer = torch.arange(len(logits), device=logits.device)[:, None]
    predicted, truth, labels = boxes[layer, image, query], flat.boxes[wanted], flat.labels[wanted]
    iou, giou = iou_and_giou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(truth))
    distance = (predicted - truth).abs().sum(dim=(1, 2))
    z = logits[layer, image, query, labels]
    matched = _matched_class_loss(z, iou.detach()).sum(dim=1)
    return {
        "loss_ce": (_sum_background_loss(logits) + matched) / number,
        "class_error": _class_error(logits, (layer, image, query), labels),
        "loss_bbox": distance / number,
        "loss_giou": (1 - giou).sum(dim=1) / number,
        "cardinality_error": _cardinality_error(logits.detach(), flat),
    }


class _BackgroundLoss(torch.autograd.Function):
    """Sum of -s^2 log(1 - s) over all but the first axis, s = sigmoid(z).

    The class loss of entries that are no query's target (section 7.3). Written by hand because
    the tensor is the largest of the losses: it saves z alone and works in place.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.sigmoid().square_().mul_(F.softplus(z)).flatten(1).sum(dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        score = z.sigmoid()
        slope = F.softplus(z).mul_(1 - score).mul_(2).add_(score).mul_(score.square_())
        return slope.mul_(grads[0].reshape(-1, *[1] * (z.ndim - 1)))


def _sum_background_loss(z: Tensor) -> Tensor:
    """Sums (L,) over everything but the layers."""
    total: Tensor = _BackgroundLoss.apply(z)  # type: ignore[no-untyped-call]
    return total


def _background_loss(z: Tensor) -> Tensor:
    """-s^2 log(1 - s), element by element."""
    return z.sigmoid().square() * F.softplus(z)


def _matched_class_loss(z: Tensor, iou: Tensor) -> Tensor:
    """What matched entries add to the background loss: -t log s - (1 - t) log(1 - s) instead."""
    share = _QUALITY_SHARE
    quality = z.detach().sigmoid() ** share * iou.clamp(min=0) ** (1 - share)
    t = quality.clamp(min=_LOWEST_TARGET)
    return t * F.softplus(-z) + (1 - t) * F.softplus(z) - _background_loss(z)


@torch.no_grad()
def _class_error(logits: Tensor, where: tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """100 - top-1 accuracy in percent over matched queries; 100 without any. (L,)."""
    right = logits[where].argmax(dim=-1) == labels
    return 100 - 100 * right.sum(dim=1) / max(1, labels.shape[1])


@torch.no_grad()
def _cardinality_error(logits: Tensor, flat: FlatTargets) -> Tensor:
    """Mean over images of | queries with a best score above 0.5 - targets |. (L,)."""
    confident = (logits.amax(dim=-1) > 0).sum(dim=-1)
    counts = torch.zeros(logits.shape[1], device=logits.device)
    counts = counts.index_add(0, flat.image, torch.ones_like(flat.image, dtype=counts.dtype))
    return (confident - counts).abs().mean(dim=1)


def _pair_indices(
    matches: list[list[tuple[np.ndarray, np.ndarray]]], flat: FlatTargets, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Image, query and flat target of every pair, each (L, N); one host-to-device transfer."""
    starts = np.cumsum([0, *flat.counts[:-1]])
    counts = [len(found) for found, _ in matches[0]]
    image = np.repeat(np.arange(len(counts)), counts)
    rows = [
        (
            image,
            np.concatenate([query for query, _ in layer]),
            np.concatenate(
                [target + start for (_, target), start in zip(layer, starts, strict=True)]
            ),
        )
        for layer in matches
    ]
    packed = torch.from_numpy(np.array(rows, dtype=np.int64)).to(device, non_blocking=True)
    return packed[:, 0], packed[:, 1], packed[:, 2]


def _mean_over_processes(count: int, device: torch.device) -> Tensor | float:
    """max(1, count averaged over the processes of a distributed run) (section 7.2)."""
    if not (dist.is_available() and dist.is_initialized()):
        return float(max(1, count))
    total = torch.tensor(float(count), device=device)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).clamp(min=1)


def _detach(masks: Any) -> Any:
    if isinstance(masks, dict):
        return {name: tensor.detach() for name, tensor in masks.items()}
    return masks.detach()
