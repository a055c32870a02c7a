"""Segmentations of a split: the extents of all polygons, and what is wrong with the others."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import msgspec
import numpy as np
import orjson
from PIL.ImagePath import Path as PointPath

from rfdetr.arrays import Integers
from rfdetr.checks.table import PolygonExtents
from rfdetr.data.coco_annotations import parse_segmentation
from rfdetr.data.coco_entries import NO_BYTES
from rfdetr.data.coco_problems import FAILURES
from rfdetr.data.masks import checked_rle
from rfdetr.errors import DatasetError

CHUNK = 2048  # segmentations decoded together: few enough that their numbers stay in the cache
NO_POINTS = (np.nan, np.nan)
NO_POLYGONS = b"[]"
# Of null, true, false and texts: without them, lists of numbers are the only JSON that is left.
LETTERS = (b"l", b"t", b'"')
SegmentationText = Any  # anything with the buffer protocol

_decoder = msgspec.json.Decoder(list[list[list[float]] | dict[str, Any] | None])


class Segmentations(NamedTuple):
    """The polygons of a split, and the masks and unusable segmentations by annotation row."""

    polygons: PolygonExtents
    masks: list[tuple[int, dict[str, Any]]]
    wrong: list[tuple[int, str]]


def measure_segmentations(texts: Sequence[SegmentationText]) -> Segmentations:
    """Measure the JSON texts of segmentations, empty where there is none."""
    firsts = range(0, len(texts), CHUNK)
    return joined([(first, _measure_chunk(texts[first : first + CHUNK])) for first in firsts])


def joined(parts: Sequence[tuple[int, Segmentations]]) -> Segmentations:
    """What was measured of consecutive segmentations, each part with its first row."""
    if len(parts) == 1 and not parts[0][0]:
        return parts[0][1]
    none, corners = np.zeros(0, np.int64), np.zeros((0, 2))
    extents = [part.polygons for _, part in parts]
    return Segmentations(
        PolygonExtents(
            np.concatenate([none, *(part.polygons.owner + first for first, part in parts)]),
            np.concatenate([none, *(part.numbers for part in extents)]),
            np.concatenate([corners, *(part.low for part in extents)]),
            np.concatenate([corners, *(part.high for part in extents)]),
        ),
        [(first + row, mask) for first, part in parts for row, mask in part.masks],
        [(first + row, text) for first, part in parts for row, text in part.wrong],
    )


def _measure_chunk(texts: Sequence[SegmentationText]) -> Segmentations:
    text = b"[" + b",".join([NO_POLYGONS if one is NO_BYTES else one for one in texts]) + b"]"
    if not any(letter in text for letter in LETTERS):
        try:
            return _polygons(orjson.loads(text), text.count(b"["))
        except (ValueError, TypeError):
            pass  # something else is among them
    return _anything(texts)


def _polygons(values: Any, lists: int) -> Segmentations:
    """Rings of numbers, from a text of that many `lists`. Raises ValueError or TypeError."""
    if set(map(type, values)) - {list}:
        raise TypeError
    if lists != 1 + len(values) + sum(map(len, values)):  # points may be lists, or rings missing
        raise TypeError
    return _segmentations(values, [], [])


def _segmentations(
    shapes: Sequence[Sequence[Any]],
    masks: list[tuple[int, dict[str, Any]]],
    wrong: list[tuple[int, str]],
) -> Segmentations:
    rings = list(chain.from_iterable(shapes))
    owner = np.repeat(np.arange(len(shapes)), list(map(len, shapes)))
    return Segmentations(ring_extents(owner, rings), masks, wrong)


def ring_extents(owner: Integers, rings: Sequence[Sequence[float]]) -> PolygonExtents:
    """The extents of rings [x, y, x, y, ...] with the rows they belong to."""
    numbers = np.fromiter(map(len, rings), np.int64, len(rings))
    if (numbers % 2 > 0).any() or not numbers.all():  # a last number without a partner, or no point
        rings = [ring[: len(ring) // 2 * 2] or NO_POINTS for ring in rings]
    corners = np.array([PointPath(ring).getbbox() for ring in rings]).reshape(-1, 4)
    return PolygonExtents(owner, numbers, corners[:, :2], corners[:, 2:])


def _anything(texts: Sequence[SegmentationText]) -> Segmentations:
    """Segmentations of which some are masks, empty or malformed."""
    parts = [bytes(text) or b"null" for text in texts]
    wrong: list[tuple[int, str]] = []
    try:
        values = _decoder.decode(b"[" + b",".join(parts) + b"]")
    except FAILURES:  # something else is among them: decode each on its own
        values = []
        for row, text in enumerate(parts):
            try:
                values += _decoder.decode(b"[" + text + b"]")
            except FAILURES:
                values.append(None)
                wrong += [(row, problem) for problem in _problems(text)]
    masks = [(row, v) for row, v in enumerate(values) if isinstance(v, dict) and v]
    shapes = [value if isinstance(value, list) else () for value in values]
    return _segmentations(shapes, masks, wrong)


def _problems(text: bytes) -> list[str]:
    """What is wrong with a segmentation that could not be decoded; nothing if it is empty."""
    value = parse_segmentation(text)
    if value is None:
        return []
    if not isinstance(value, list):
        return [f"is {type(value).__name__}, not a list of polygons"]
    return ["contains something that is not a list of numbers"]


def rle_problem(mask: dict[str, Any], width: float, height: float) -> str | None:
    """What is wrong with an RLE mask of an image of this size (NaN if unknown), or None."""
    try:
        size, _ = checked_rle(mask)
    except DatasetError as error:
        return str(error)
    if np.isfinite(width) and np.isfinite(height) and (size[0] != height or size[1] != width):
        return f"size {size} differs from the image's [{height:.0f}, {width:.0f}]"
    return None
