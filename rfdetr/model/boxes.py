"""Box geometry. Boxes are (..., 4): `cxcywh` centre and size, `xyxy` corners."""

from __future__ import annotations

import torch
from torch import Tensor

_MIN_AREA = 1e-7


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Corners of centre-size boxes; negative sizes count as 0."""
    centre, half = boxes[..., :2], boxes[..., 2:].clamp(min=0) * 0.5
    return torch.cat([centre - half, centre + half], dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Centre and size of corner boxes."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) * 0.5, high - low], dim=-1)


def apply_box_delta(delta: Tensor, reference: Tensor) -> Tensor:
    """Move `reference` boxes (cxcywh) by `delta` (dx, dy, dw, dh), both (..., 4).

    cx = dx * w_ref + cx_ref and w = exp(dw) * w_ref, likewise for y and h: the parametrisation of
    R-CNN (Girshick et al., CVPR 2014). Results are not clamped. Computed in the reference's dtype.
    """
    delta = delta.to(reference.dtype)
    size = reference[..., 2:]
    return torch.cat([delta[..., :2] * size + reference[..., :2], delta[..., 2:].exp() * size], -1)


def iou_and_giou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU of corner boxes, element by element with broadcasting.

    Union and enclosing area are at least 1e-7. GIoU: Rezatofighi et al., CVPR 2019.
    """
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    intersection = _area((high - low).clamp(min=0))
    area_a, area_b = _area(a[..., 2:] - a[..., :2]), _area(b[..., 2:] - b[..., :2])
    union = area_a + area_b - intersection
    iou = intersection / union.clamp(min=_MIN_AREA)
    low, high = torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])
    enclosing = _area((high - low).clamp(min=0))
    return iou, iou - (enclosing - union) / enclosing.clamp(min=_MIN_AREA)


def _area(size: Tensor) -> Tensor:
    """Width times height, (..., 2) to (...); the gradient of `prod` takes ten times the kernels."""
    width, height = size.unbind(-1)
    return width * height
