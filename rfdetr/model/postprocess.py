"""Network outputs to detections in pixels. See docs/model.md, "Post-processing"."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfdetr.errors import InputError
from rfdetr.model.boxes import cxcywh_to_xyxy
from rfdetr.model.types import HostDetections, ImageDetections, LayerOutputs

_PIXELS_AT_ONCE = 1 << 24  # of resized mask logits; bounds their memory to 64 MiB or one mask


class Selection(NamedTuple):
    """The S best (query, class) pairs of B images, scores descending; -1 is not a detection."""

    scores: Tensor  # (B, S) in 0..1
    labels: Tensor  # (B, S) int64
    boxes: Tensor  # (B, S, 4) xyxy in pixels
    queries: Tensor  # (B, S) int64

    def to_host(self) -> Selection:
        """The same on the CPU, in one copy."""
        whole = torch.stack([self.scores, self.labels, self.queries], dim=2)  # exact to 2^24
        packed = torch.cat([whole, self.boxes], dim=2).cpu()
        scores, labels, queries = packed[..., :3].unbind(2)
        return Selection(scores, labels.long(), packed[..., 3:], queries.long())


class PostProcess(nn.Module):
    """The `num_select` best (query, class) pairs of each image, without suppression."""

    def __init__(self, num_select: int = 300) -> None:
        super().__init__()
        self.num_select = num_select

    @torch.no_grad()
    def forward(
        self, outputs: LayerOutputs, target_sizes: Tensor, threshold: float | None = None
    ) -> list[ImageDetections]:
        """Detections of every image, scores descending, ties ascending by (query, class).

        A pair with the score NaN is not a detection.

        target_sizes (B, 2) are the heights and widths in pixels that boxes and masks are scaled
        to. With `threshold`, only scores above it are returned and only their masks are resized.
        Raises InputError if target_sizes does not fit the batch or the masks are not dense.
        """
        found = self.select(outputs, target_sizes)
        kept = _kept(found.scores, threshold)
        packed = torch.stack([kept.sum(1), *target_sizes.to(found.labels).unbind(1)])
        counts, heights, widths = packed.tolist()  # one transfer to the host
        results: list[ImageDetections] = [
            {"scores": s[:n], "labels": k[:n], "boxes": b[:n]}
            for s, k, b, n in zip(found.scores, found.labels, found.boxes, counts, strict=True)
        ]
        masks = _dense_masks(outputs)
        if masks is not None:
            for i, result in enumerate(results):
                chosen = masks[i][found.queries[i, : counts[i]]]  # (n, h, w)
                result["masks"] = resize_masks(chosen, heights[i], widths[i])
        return results

    @torch.no_grad()
    def on_host(
        self, outputs: LayerOutputs, target_sizes: Tensor, threshold: float | None = None
    ) -> list[HostDetections]:
        """As `forward`, with everything but the masks on the CPU in one copy for the batch.

        Masks stay logits of the network's size, on its device: `mask_logits` (Q, h, w) of all
        queries, of which `queries` (n,) are the detections'. `image_masks` makes them masks.
        """
        found = self.select(outputs, target_sizes).to_host()
        masks = _dense_masks(outputs)
        results: list[HostDetections] = []
        for i, kept in enumerate(_kept(found.scores, threshold).sum(1).tolist()):
            result: HostDetections = {
                "scores": found.scores[i, :kept],
                "labels": found.labels[i, :kept],
                "boxes": found.boxes[i, :kept],
            }
            if masks is not None:
                result["queries"] = found.queries[i, :kept]
                result["mask_logits"] = masks[i]
            results.append(result)
        return results

    @torch.no_grad()
    def select(self, outputs: LayerOutputs, target_sizes: Tensor) -> Selection:
        """The best pairs of every image, on the device of the outputs. Errors as of `forward`."""
        logits, boxes = outputs["pred_logits"].float(), outputs["pred_boxes"].float()
        if tuple(target_sizes.shape) != (len(logits), 2):
            raise InputError(
                f"target_sizes {tuple(target_sizes.shape)} must be ({len(logits)}, 2): "
                "height and width of every image."
            )
        _dense_masks(outputs)
        K = logits.shape[-1]
        known = logits.sigmoid().nan_to_num(nan=-1.0).flatten(1)  # NaN sorts last
        flat = _stable_topk(known, self.num_select)  # (B, num_select)
        queries = flat // K
        scale = target_sizes.to(boxes).flip(1).repeat(1, 2)[:, None]  # (B, 1, 4) as W, H, W, H
        corners = cxcywh_to_xyxy(boxes) * scale
        corners = torch.minimum(corners.clamp(min=0), scale)
        return Selection(
            scores=known.gather(1, flat),
            labels=flat % K,
            boxes=corners.gather(1, queries[..., None].expand(-1, -1, 4)),
            queries=queries,
        )


def _dense_masks(outputs: LayerOutputs) -> Tensor | None:
    """Mask logits (B, Q, h, w); InputError for their factors."""
    masks = outputs.get("pred_masks")
    if isinstance(masks, dict):
        raise InputError(
            "pred_masks come from a network in training mode; call .eval() on it first."
        )
    return masks


def _kept(scores: Tensor, threshold: float | None) -> Tensor:
    return scores >= 0 if threshold is None else scores > max(threshold, -1.0)


def _stable_topk(scores: Tensor, k: int) -> Tensor:
    """Indices (B, min(k, n)) of the first columns of a stable descending sort of (B, n).

    `topk` alone leaves the order of ties open. It selects among int64 keys here: the bits of a
    score, which order scores in 0..1 like their values and -1 below, above the inverted index.
    """
    n = scores.shape[1]
    bits = scores.view(torch.int32).to(torch.int64)
    inverted = torch.arange(n - 1, -1, -1, device=scores.device)
    keys = (bits << 32) + inverted
    return n - 1 - (keys.topk(min(k, n), dim=1).values & 0xFFFFFFFF)


def image_masks(result: HostDetections, height: int, width: int) -> Tensor:
    """Masks (n, 1, height, width) bool of the detections of an image, on the network's device."""
    return resize_masks(result["mask_logits"][result["queries"]], height, width)


def resize_masks(logits: Tensor, height: int, width: int) -> Tensor:
    """Logits (n, h, w) to bool masks (n, 1, height, width), bilinear, above 0."""
    masks = torch.empty(len(logits), 1, height, width, dtype=torch.bool, device=logits.device)
    step = max(1, _PIXELS_AT_ONCE // (height * width))
    for start in range(0, len(logits), step):
        chunk = logits[start : start + step, None].float()
        masks[start : start + step] = F.interpolate(chunk, (height, width), mode="bilinear") > 0
    return masks
