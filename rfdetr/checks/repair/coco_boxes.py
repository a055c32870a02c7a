"""Boxes of COCO annotations that can be read although they are not written as they must be."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rfdetr.checks.box_format import BoxFormat, box_corners

Record = dict[str, Any]
FLAGS = {"0": 0, "false": 0, "no": 0, "": 0, "1": 1, "true": 1, "yes": 1}


def restore_annotation(record: Record, image: Mapping[str, Any] | None) -> int:
    """Correct the values of one annotation in place; return how many were corrected."""
    changed = int(_restore_outline(record))
    box = plain_box(record.get("bbox"))
    outline = _outline_box(record.get("segmentation"))
    if box is not None and min(box[2:]) < 0:
        box = outline or _unflipped(box, image) or box
    elif box is None or min(box[2:]) == 0:
        box = outline or box
    if box is not None and box != record.get("bbox"):
        record["bbox"] = box
        changed += 1
    area = record.get("area")
    if area is not None and not is_number(area):
        del record["area"]
        changed += 1
    flag = record.get("iscrowd")
    if isinstance(flag, str) and flag.strip().lower() in FLAGS:
        record["iscrowd"] = FLAGS[flag.strip().lower()]
        changed += 1
    return changed


def _restore_outline(record: Record) -> bool:
    """Write polygons as lists of x, y, x, y ..., if that is what they mean."""
    given = value = record.get("segmentation")
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, list) and value and all(map(is_number, value)):
        value = [value]
    if isinstance(value, list):
        value = [_flat(ring) for ring in value]
    record_value = value if isinstance(value, list | dict) else given
    if record_value == given:
        return False
    record["segmentation"] = record_value
    return True


def _flat(ring: Any) -> Any:
    """A ring of points [x, y] or {"x": x, "y": y} as one list of numbers."""
    if not isinstance(ring, list) or not ring:
        return ring
    if all(isinstance(point, dict) and {"x", "y"} <= point.keys() for point in ring):
        ring = [[point["x"], point["y"]] for point in ring]
    if all(isinstance(point, list) and len(point) == 2 for point in ring):
        return [number for point in ring for number in point]
    numbers = [_number(item) for item in ring]
    return ring if None in numbers else numbers


def as_coco(box: Sequence[float], size: tuple[int, int], written: BoxFormat) -> list[float]:
    """A box that is written in another format as x, y, width, height in pixels."""
    (x0, y0, x1, y1), (width, height) = box_corners(box, size, written), size
    box = [x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height]
    return [round(value, 3) for value in box]


def is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300  # also False for NaN


def plain_box(value: Any) -> list[Any] | None:
    """Four finite numbers, also if they are text or in a list of their own."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        value = value[0]
    if not isinstance(value, list) or len(value) != 4:
        return None
    numbers = [_number(item) for item in value]
    return None if None in numbers else numbers


def _number(value: Any) -> float | int | None:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return value if is_number(value) else None


def _outline_box(segmentation: Any) -> list[float] | None:
    """The box around polygons, None if it has no area."""
    if not isinstance(segmentation, list) or not segmentation:
        return None
    xs: list[float] = []
    ys: list[float] = []
    for ring in segmentation:
        if not isinstance(ring, list) or len(ring) < 6 or len(ring) % 2:
            return None
        if not all(is_number(value) for value in ring):
            return None
        xs += ring[::2]
        ys += ring[1::2]
    box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    return box if min(box[2:]) > 0 else None


def _unflipped(box: list[float], image: Mapping[str, Any] | None) -> list[float] | None:
    """A box drawn from another corner, if it lies within the image."""
    x, y, w, h = box
    flipped = [x + min(w, 0), y + min(h, 0), abs(w), abs(h)]
    width, height = (image or {}).get("width"), (image or {}).get("height")
    if not is_number(width) or not is_number(height) or min(flipped[2:]) == 0:
        return None
    assert width is not None and height is not None
    inside = flipped[0] >= 0 and flipped[1] >= 0
    inside &= flipped[0] + flipped[2] <= width and flipped[1] + flipped[3] <= height
    return flipped if inside and all(map(math.isfinite, flipped)) else None
