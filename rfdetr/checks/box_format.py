"""Ways in which boxes are written, and which of them fits a dataset.

COCO boxes are the top left corner and the size in pixels, YOLO boxes the centre and the size in
fractions of the image. Converters write corners, centres, or another unit by mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from rfdetr.arrays import Bools, Floats

SLACK = 0.01  # a box may reach this share of the image beyond it, and one pixel
FITS = 0.99  # share of the boxes that fit in the way in which they were written
FITS_AS_READ = 0.95  # boxes are taken as read from this share on
FILLS = 0.5  # of many boxes, one ends beyond this share of its image
SAME_IOU = 0.8  # of a box and its outline
SAME_AREA = 0.01  # relative difference of an area in the file and that of its box
SWAPPED = "y, x, height, width"


def _top_left(values: Floats) -> Floats:
    return np.concatenate([values[:, :2], values[:, :2] + values[:, 2:]], axis=1)


def _centre(values: Floats) -> Floats:
    half = values[:, 2:] / 2
    return np.concatenate([values[:, :2] - half, values[:, :2] + half], axis=1)


# Four numbers as they are written -> x0, y0, x1, y1.
FORMS: dict[str, Callable[[Floats], Floats]] = {
    "x, y, width, height": _top_left,
    "centre x, centre y, width, height": _centre,
    "x0, y0, x1, y1": lambda values: values,
    SWAPPED: lambda values: _top_left(values[:, [1, 0, 3, 2]]),
}
# What a number is divided by to be a fraction of the image; None: the side in pixels.
UNITS = {"pixels": None, "fractions": 1.0, "percent": 100.0, "thousandths": 1000.0}


class BoxFormat(NamedTuple):
    """A form of FORMS in a unit of UNITS."""

    form: str
    unit: str

    def __str__(self) -> str:
        return f"[{self.form}] in {self.unit}"

    def fractions(self, values: Floats, sizes: Floats) -> Floats:
        """Boxes (n, 4) x0, y0, x1, y1 in fractions of images of `sizes` (n, 2) width, height."""
        divisor = UNITS[self.unit]
        scale = sizes if divisor is None else np.full_like(sizes, divisor)
        return np.asarray(FORMS[self.form](values) / np.concatenate([scale, scale], axis=1))


def box_corners(
    box: Sequence[float], size: tuple[int, int], written: BoxFormat
) -> tuple[float, float, float, float]:
    """One box as x0, y0, x1, y1 in fractions of an image of `size` (width, height)."""
    x0, y0, x1, y1 = written.fractions(np.array([box], float), np.array([size], float))[0].tolist()
    return x0, y0, x1, y1


COCO = BoxFormat("x, y, width, height", "pixels")
YOLO = BoxFormat("centre x, centre y, width, height", "fractions")


class Written(NamedTuple):
    """Boxes as they are written, `values` (n, 4), with the sizes (n, 2) of their images, what their
    outlines extend over (n, 4) x0, y0, x1, y1 in fractions, and their areas (n,) in the file; NaN
    if unknown.
    """

    values: Floats
    sizes: Floats
    outlines: Floats
    areas: Floats


def other_formats(boxes: Written, native: BoxFormat) -> list[BoxFormat]:
    """The formats in which the boxes fit their images, if they do not fit as `native`.

    Where half of the boxes have outlines, these decide; else whether the boxes are in the image.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        known = finite_rows(boxes.outlines)
        if 2 * known.sum() >= len(known):
            return _by_outline(Written(*(column[known] for column in boxes)), native)
        if _fits(boxes, native, FITS_AS_READ):
            return []
        found = [other for other in _others(native) if _fits(boxes, other, FITS)]
        swapped = BoxFormat(SWAPPED, native.unit) if _may_be_swapped(boxes) else None
        found = [other for other in found if other.form != SWAPPED or other == swapped]
        likely = [other for other in found if other.unit == native.unit and other != swapped]
        return likely or found


def impossible(boxes: Written, native: BoxFormat) -> int:
    """How many boxes cannot be objects as `native`: beyond the image, or of less than one pixel.

    Of boxes that are known by their outlines, those in another place.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        corners = native.fractions(boxes.values, boxes.sizes)
        inside = _inside(corners, boxes.sizes)
        pixels = (corners[:, 2:] - corners[:, :2]) * boxes.sizes
        known = finite_rows(boxes.outlines)
        differs = known & (overlaps(corners, boxes.outlines) < SAME_IOU)
        return int((~inside | ~(pixels >= 1).all(axis=1) | differs).sum())


def _others(native: BoxFormat) -> Iterator[BoxFormat]:
    formats = (BoxFormat(form, unit) for unit in UNITS for form in FORMS)
    return (other for other in formats if other != native)


def _may_be_swapped(boxes: Written) -> bool:
    """Whether the last two numbers of the boxes are their sides, as the areas in the file prove."""
    area = boxes.values[:, 2] * boxes.values[:, 3]
    same = np.abs(boxes.areas - area) <= SAME_AREA * area
    return bool(same.mean() >= FITS)


def _fits(boxes: Written, written: BoxFormat, share: float) -> bool:
    """Whether this share of the boxes lies in the images, and some are not in a corner of them."""
    corners = written.fractions(boxes.values, boxes.sizes)
    inside = _inside(corners, boxes.sizes)
    return bool(inside.mean() >= share and corners[inside, 2:].max(initial=0) > FILLS)


def _inside(corners: Floats, sizes: Floats) -> Bools:
    slack = SLACK + np.nan_to_num(1 / np.concatenate([sizes, sizes], axis=1))
    inside = ((corners > -slack) & (corners < 1 + slack)).all(axis=1)
    return np.asarray(inside & (corners[:, 2:] > corners[:, :2]).all(axis=1))


def _by_outline(boxes: Written, native: BoxFormat) -> list[BoxFormat]:
    def share(written: BoxFormat) -> float:
        corners = written.fractions(boxes.values, boxes.sizes)
        return float((overlaps(corners, boxes.outlines) >= SAME_IOU).mean())

    if share(native) >= 1 - FITS_AS_READ:
        return []
    return [found for found in _others(native) if share(found) >= FITS_AS_READ]


def overlaps(first: Floats, second: Floats) -> Floats:
    """IoU (n,) of boxes (n, 4) x0, y0, x1, y1, one by one; 0 for a box without area."""

    def area(low: Floats, high: Floats) -> Floats:
        width, height = (high - low).clip(0).T
        return np.asarray(width * height)

    low = np.maximum(first[:, :2], second[:, :2])
    high = np.minimum(first[:, 2:], second[:, 2:])
    shared = area(low, high)
    areas = [area(box[:, :2], box[:, 2:]) for box in (first, second)]
    union = areas[0] + areas[1] - shared
    return np.asarray(np.divide(shared, union, out=np.zeros(len(union)), where=union > 0))


def finite_rows(*columns: Floats) -> Bools:
    """Rows in which every column is finite."""
    return np.asarray(np.logical_and.reduce([np.isfinite(c).all(axis=1) for c in columns]))
