"""Box geometry. Boxes are (..., 4): `cxcywh` centre and size, `xyxy` corners."""

from __future__ import annotations

import torch
from torch import Tensor

_MIN_AREA = 1e-7


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Corners of centre-size boxes; negative sizes count as 0."""
    centre, size = boxes.chunk(2, dim=-1)
    half = size.clamp(min=0) * 0.5
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
    move, stretch = delta.to(reference.dtype).chunk(2, dim=-1)
    centre, size = reference.chunk(2, dim=-1)
    return torch.cat([torch.addcmul(centre, move, size), stretch.exp() * size], dim=-1)


def iou_and_giou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU of corner boxes, element by element with broadcasting.

    Union and enclosing area are at least 1e-7. GIoU: Rezatofighi et al., CVPR 2019.
    """
    (low_a, high_a), (low_b, high_b) = a.chunk(2, dim=-1), b.chunk(2, dim=-1)
    overlap = torch.minimum(high_a, high_b) - torch.maximum(low_a, low_b)
    intersection = _area(overlap.clamp(min=0))
    union = _area(high_a - low_a) + _area(high_b - low_b) - intersection
    iou = intersection / union.clamp(min=_MIN_AREA)
    enclosing = _area((torch.maximum(high_a, high_b) - torch.minimum(low_a, low_b)).clamp(min=0))
    return iou, iou - (enclosing - union) / enclosing.clamp(min=_MIN_AREA)


def _area(size: Tensor) -> Tensor:
    """Width times height, (..., 2) to (...); the gradient of `prod` takes ten times the kernels."""
    width, height = size.unbind(-1)
    return width * height
