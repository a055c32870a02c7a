"""Network outputs to detections in pixels (model specification, section 8)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfdetr.errors import InputError
from rfdetr.model.boxes import cxcywh_to_xyxy

_PIXELS_AT_ONCE = 1 << 24  # of resized mask logits; bounds their memory to 64 MiB or one mask


class PostProcess(nn.Module):
    """The `num_select` best (query, class) pairs of each image, without suppression."""

    def __init__(self, num_select: int = 300) -> None:
        super().__init__()
        self.num_select = num_select

    @torch.no_grad()
    def forward(
        self, outputs: dict[str, Any], target_sizes: Tensor, threshold: float | None = None
    ) -> list[dict[str, Tensor]]:
        """Per image: scores (n,), labels (n,) int64, boxes (n, 4) xyxy pixels, maybe masks.

        outputs hold pred_logits, pred_boxes and dense pred_masks for masks (n, 1, H, W) bool;
        target_sizes (B, 2) are the heights and widths that boxes and masks are scaled to.
        Scores descend, ties ascend by flat (query, class) index. With `threshold` only scores above
        it stay, and only their masks are resized. Raises InputError when target_sizes do not fit
        the batch or the masks are in the sparse form of training.
        """
        logits, boxes = outputs["pred_logits"].float(), outputs["pred_boxes"].float()
        masks = outputs.get("pred_masks")
        if tuple(target_sizes.shape) != (len(logits), 2):
            raise InputError(
                f"target_sizes {tuple(target_sizes.shape)} must be ({len(logits)}, 2): "
                "height and width of every image."
            )
        if isinstance(masks, dict):
            raise InputError("Masks of a network in training mode; call .eval() first.")
        classes = logits.shape[-1]
        ordered = logits.sigmoid().flatten(1).sort(dim=1, descending=True, stable=True)
        scores, flat = (part[:, : self.num_select] for part in ordered)
        query, labels = flat // classes, flat % classes
        scale = target_sizes.to(boxes).flip(1).repeat(1, 2)[:, None]
        corners = cxcywh_to_xyxy(boxes) * scale
        corners = torch.minimum(corners.clamp(min=0), scale)
        chosen = corners.gather(1, query[..., None].expand(-1, -1, 4))
        counts = [scores.shape[1]] * len(scores)
        if threshold is not None:
            counts = (scores > threshold).sum(1).tolist()
        results = [
            {"scores": s[:n], "labels": k[:n], "boxes": b[:n]}
            for s, k, b, n in zip(scores, labels, chosen, counts, strict=True)
        ]
        if masks is not None:
            for i, (height, width) in enumerate(target_sizes.tolist()):
                kept = masks[i][query[i, : counts[i]]]
                results[i]["masks"] = resize_masks(kept, int(height), int(width))
        return results


def resize_masks(logits: Tensor, height: int, width: int) -> Tensor:
    """Logits (n, h, w) to bool masks (n, 1, height, width), bilinear, above 0."""
    masks = torch.empty(len(logits), 1, height, width, dtype=torch.bool, device=logits.device)
    step = max(1, _PIXELS_AT_ONCE // (height * width))
    for start in range(0, len(logits), step):
        chunk = logits[start : start + step, None].float()
        masks[start : start + step] = F.interpolate(chunk, (height, width), mode="bilinear") > 0
    return masks
