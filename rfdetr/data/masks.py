"""Polygons and run-length codes to masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from rfdetr.arrays import Floats
from rfdetr.errors import DatasetError

Mask = npt.NDArray[np.bool_]
RLE = dict[str, Any]
FAR = 16  # image sides: pycocotools walks along outlines, so a point at 1e9 would take minutes
MAX_SHIFT = 60  # bits of one run length in compressed RLE
# pycocotools 2.0.11 stores the number of masks in a uint8; with NumPy 2, `area` of more raises
AREAS_AT_ONCE = 255


def to_rle(segmentation: Any, height: int, width: int) -> RLE:
    """A COCO segmentation as compressed RLE {"size", "counts"} of an image `height` x `width`.

    Takes polygons in pixels (their union; those of fewer than three points are skipped),
    uncompressed or compressed RLE, or None (an empty mask). Raises DatasetError for anything else.
    """
    if isinstance(segmentation, dict):
        return _run_lengths(segmentation, height, width)
    polygons = polygons_of(segmentation, height, width) or []
    if not polygons:
        return dict(coco_mask.encode(np.zeros((height, width), np.uint8, order="F")))
    lists = [points.ravel().tolist() for points in polygons]
    return dict(coco_mask.merge(coco_mask.frPyObjects(lists, height, width)))


def polygons_of(segmentation: Any, height: int, width: int) -> list[Floats] | None:
    """The polygons (n, 2) x, y in pixels of a COCO segmentation; None for RLE.

    Polygons of fewer than three points are skipped. Raises DatasetError for anything else.
    """
    if isinstance(segmentation, dict):
        return None
    limit = FAR * max(height, width)
    rings = [] if segmentation is None else checked_polygons(segmentation)
    return [ring.clip(-limit, limit).reshape(-1, 2) for ring in rings if len(ring) >= 6]


def encode(mask: Mask) -> RLE:
    """A mask (H, W) as compressed RLE."""
    return dict(coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8)))


def mask_areas(codes: Sequence[RLE]) -> Floats:
    """Pixels (n,) of n compressed RLE masks."""
    areas = np.zeros(len(codes))
    for start in range(0, len(codes), AREAS_AT_ONCE):
        chunk = list(codes[start : start + AREAS_AT_ONCE])
        areas[start : start + len(chunk)] = coco_mask.area(chunk)
    return areas


def checked_polygons(segmentation: Any) -> list[Floats]:
    """The numbers x, y, x, y ... of each polygon. Raises DatasetError that says what is wrong."""
    if not isinstance(segmentation, list):
        raise DatasetError(f"a segmentation must be polygons or RLE, found {segmentation!r:.60}.")
    rings = []
    for polygon in segmentation:
        try:
            values = np.array(msgspec.convert(polygon, list[float]), np.float64)
        except (msgspec.ValidationError, OverflowError):
            values = np.array([np.nan])
        if not np.isfinite(values).all():
            raise DatasetError(
                f"a polygon must be a list of finite numbers, found {polygon!r:.60}."
            )
        if len(values) % 2:
            raise DatasetError(
                f"a polygon has {len(values)} numbers, an odd count: {polygon!r:.60}. Write x, y "
                "for each point."
            )
        rings.append(values)
    return rings


def _run_lengths(segmentation: RLE, height: int, width: int) -> RLE:
    size, counts = checked_rle(segmentation)
    if size != [height, width]:
        raise DatasetError(f"RLE size {size} is not the image's [{height}, {width}].")
    return dict(coco_mask.frPyObjects({"size": size, "counts": counts}, height, width))


def checked_rle(segmentation: RLE) -> tuple[list[int], list[int]]:
    """[height, width] and the run lengths, column by column, of an RLE mask.

    Integers may be written as 7.0. Raises DatasetError that says what is wrong.
    """
    size, counts = _integers(segmentation.get("size")), segmentation.get("counts")
    if size is None or len(size) != 2:
        raise DatasetError(f"RLE size {segmentation.get('size')!r:.60} is not [height, width].")
    runs = decode_counts(counts) if isinstance(counts, str) else _integers(counts)
    if runs is None or min(runs, default=0) < 0:
        raise DatasetError(
            f"RLE counts must be run lengths or compressed text, found {counts!r:.60}."
        )
    if sum(runs) != size[0] * size[1]:
        raise DatasetError(
            f"RLE counts cover {sum(runs)} pixels, its size {size} has {size[0] * size[1]}."
        )
    return size, runs


def _integers(values: Any) -> list[int] | None:
    """A list of integers, also if written as 7.0; None for anything else."""
    if not isinstance(values, list):
        return None
    if not all(type(v) is int or (type(v) is float and v.is_integer()) for v in values):
        return None
    return [int(value) for value in values]


def decode_counts(text: str) -> list[int]:
    """Run lengths from the compressed text form of COCO RLE (`rleFrString` in pycocotools).

    Each character holds five bits and a continuation flag; from the third run on, a run is stored
    as the difference to the run two before. Decoded here because pycocotools trusts the text and
    can write outside its memory. Raises DatasetError; run lengths may still be negative.
    """
    counts: list[int] = []
    value = shift = 0
    for code in text.encode("ascii", "replace"):
        bits = code - 48
        if not 0 <= bits < 64:
            raise DatasetError(f"RLE counts contain the character {chr(code)!r}.")
        if shift > MAX_SHIFT:
            raise DatasetError("RLE counts contain a number of more than 64 bits.")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value |= -1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift:
        raise DatasetError("RLE counts end in the middle of a number.")
    return counts


def rasterise(segmentation: Any, height: int, width: int) -> Mask:
    """A COCO segmentation, as in `to_rle`, as a mask (height, width)."""
    mask: Mask = coco_mask.decode(to_rle(segmentation, height, width)).astype(bool)
    return mask


def fill_polygon(points: npt.NDArray[np.floating[Any]], height: int, width: int) -> Mask:
    """A mask (height, width) of a polygon (n, 2) x, y in pixels, outline included."""
    canvas = Image.new("1", (width, height))
    inside = np.clip(points, 0, [width - 1, height - 1])
    ImageDraw.Draw(canvas).polygon([(float(x), float(y)) for x, y in inside], fill=1, outline=1)
    return np.array(canvas)
