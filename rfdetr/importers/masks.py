"""Outlines that foreign tools describe otherwise: circles, ellipses, rotated boxes, masks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from rfdetr.importers.records import Box

CORNERS = 32


def circle(x: float, y: float, radius: float) -> list[float]:
    """A circle as a polygon."""
    return ellipse(x, y, radius, radius)


def ellipse(x: float, y: float, rx: float, ry: float, degrees: float = 0.0) -> list[float]:
    """An ellipse around its centre, turned clockwise, as a polygon."""
    angles = [2 * math.pi * i / CORNERS for i in range(CORNERS)]
    corners = [(rx * math.cos(a), ry * math.sin(a)) for a in angles]
    return turned(corners, x, y, degrees)


def turned(corners: list[tuple[float, float]], x: float, y: float, degrees: float) -> list[float]:
    """Points relative to (x, y), turned clockwise (the y axis points down), as x, y, x, y ..."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [v for dx, dy in corners for v in (x + dx * cos - dy * sin, y + dx * sin + dy * cos)]


def rle_of(
    part: npt.NDArray[np.bool_], left: int, top: int, size: tuple[int, int]
) -> tuple[Box, dict[str, Any]] | None:
    """Box and COCO RLE of a mask (h, w) at (left, top) in an image (width, height).

    None for an empty mask and one outside the image.
    """
    width, height = size
    x0, y0 = max(0, left), max(0, top)
    x1, y1 = min(width, left + part.shape[1]), min(height, top + part.shape[0])
    if x1 <= x0 or y1 <= y0:
        return None
    full = np.zeros((height, width), np.uint8, order="F")
    full[y0:y1, x0:x1] = part[y0 - top : y1 - top, x0 - left : x1 - left]
    if not full.any():
        return None
    code = coco_mask.encode(full)
    x, y, w, h = (float(value) for value in coco_mask.toBbox(code))
    return (x, y, x + w, y + h), {"size": [height, width], "counts": code["counts"].decode()}
