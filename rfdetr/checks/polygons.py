"""Segmentations: extents of every polygon without a Python object per number, and RLE masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import simdjson

from rfdetr.checks.inspection import process_context, usable_cores
from rfdetr.checks.table import Floats, Integers, Polygons
from rfdetr.data.coco_json import parse_segmentation

CHUNK = 8192
PARALLEL_FROM = 100_000  # segmentations; below, starting processes costs more than it saves
COMMA, OPEN, CLOSE, OBJECT = b",[]{"
SegmentationText = Any  # anything with the buffer protocol


@dataclass
class Measured:
    """What was found in the segmentations of one split."""

    owner: list[Integers] = field(default_factory=list)
    numbers: list[Integers] = field(default_factory=list)
    low: list[Floats] = field(default_factory=list)
    high: list[Floats] = field(default_factory=list)
    wrong: list[tuple[int, str]] = field(default_factory=list)
    masks: list[tuple[int, dict[str, Any]]] = field(default_factory=list)

    def add(self, owner: Integers, numbers: Integers, values: Floats) -> None:
        """Append rings whose numbers follow each other in `values`."""
        low, high = ring_extents(numbers, values)
        self.owner.append(owner)
        self.numbers.append(numbers)
        self.low.append(low)
        self.high.append(high)

    def extend(self, other: Measured) -> None:
        """Append the findings of another part."""
        for name in ("owner", "numbers", "low", "high", "wrong", "masks"):
            getattr(self, name).extend(getattr(other, name))

    def polygons(self) -> Polygons:
        """The columns of all rings."""
        none, corners = np.zeros(0, np.int64), np.zeros((0, 2))
        return Polygons(
            np.concatenate([none, *self.owner]),
            np.concatenate([none, *self.numbers]),
            np.concatenate([corners, *self.low]),
            np.concatenate([corners, *self.high]),
        )


def ring_extents(numbers: Integers, values: Floats) -> tuple[Floats, Floats]:
    """Lowest and highest x, y (k, 2) of rings with `numbers` values each; NaN under one point."""
    low = np.full((len(numbers), 2), np.nan)
    high = np.full((len(numbers), 2), np.nan)
    ends = np.cumsum(numbers)
    even = numbers - numbers % 2
    if (even != numbers).any():  # a lone last number is no point: leave it out
        lone = ends[even != numbers] - 1
        values = np.delete(values, lone)
        ends = np.cumsum(even)
    filled = even > 0
    starts = ((ends - even) // 2)[filled]
    if len(starts):
        points = values.reshape(-1, 2)
        for axis in (0, 1):
            column = points[:, axis]
            low[filled, axis] = np.minimum.reduceat(column, starts)
            high[filled, axis] = np.maximum.reduceat(column, starts)
    return low, high


def measure_segmentations(
    texts: Sequence[SegmentationText], workers: int | None = None
) -> Callable[[], Measured]:
    """Start measuring the JSON texts of all segmentations; call the result to wait for it.

    Long lists are shared among forked processes, which see the texts without a copy; where
    processes cannot be forked the work is done in this one.
    """
    starts = range(0, len(texts), CHUNK)
    context = process_context()
    workers = min(workers or usable_cores(), len(starts))
    if len(texts) < PARALLEL_FROM or workers < 2 or context.get_start_method() != "fork":
        return lambda: _joined(_measure_chunks(texts, starts) for _ in (0,))
    _shared[:] = [texts]
    pool = ProcessPoolExecutor(workers, mp_context=context)
    share = -(-len(starts) // workers)
    parts = [starts[i * share : (i + 1) * share] for i in range(workers)]
    futures = [pool.submit(_measure_shared, part) for part in parts]
    _shared.clear()

    def wait() -> Measured:
        with pool:
            return _joined(future.result() for future in futures)

    return wait


_shared: list[Sequence[SegmentationText]] = []


def _measure_shared(starts: range) -> Measured:
    return _measure_chunks(_shared[0], starts)


def _joined(parts: Any) -> Measured:
    total = Measured()
    for part in parts:
        total.extend(part)
    return total


def _measure_chunks(texts: Sequence[SegmentationText], starts: range) -> Measured:
    found = Measured()
    parser = simdjson.Parser()
    for start in starts:
        part = texts[start : start + CHUNK]
        first = _first_bytes(part)
        rows = np.flatnonzero(first == OPEN)
        lists = rows.tolist()
        chosen = part if len(rows) == len(part) else [part[row] for row in lists]
        if not _measure_lists(chosen, rows + start, parser, found):
            for row in lists:
                _measure_one(row + start, part[row], found)
        for row in np.flatnonzero((first != OPEN) & (first != 0)).tolist():
            _measure_one(row + start, part[row], found)
    return found


def _first_bytes(texts: Sequence[SegmentationText]) -> npt.NDArray[np.uint8]:
    """The first byte of each text, 0 for an empty one."""
    view_of: Any = memoryview
    views = list(map(view_of, texts))
    try:
        return np.fromiter(map(itemgetter(0), views), np.uint8, len(views))
    except IndexError:
        return np.array([view[0] if view.nbytes else 0 for view in views], np.uint8)


def _measure_lists(
    texts: Sequence[SegmentationText], rows: Integers, parser: Any, found: Measured
) -> bool:
    """Measure well-formed lists of lists of numbers; False when something else is among them."""
    if not len(texts):
        return True
    joined = b"[" + b",".join(texts) + b"]"
    try:
        buffer = parser.parse(joined).as_buffer(of_type="d")
    except (ValueError, TypeError, RuntimeError):
        return False
    values: Floats = np.frombuffer(buffer, np.float64)
    rings = _ring_counts(np.frombuffer(joined, np.uint8), len(texts))
    if rings is None or rings[1].sum() != len(values):
        return False
    found.add(rows[rings[0]], rings[1], values)
    return True


def _ring_counts(text: npt.NDArray[np.uint8], entries: int) -> tuple[Integers, Integers] | None:
    """Entry index and count of numbers of every ring in `[[[1,2],[3,4]],[[5,6]]]`."""
    marks = np.flatnonzero((text == COMMA) | (text == OPEN) | (text == CLOSE))
    kinds = text[marks]
    brackets = np.flatnonzero(kinds != COMMA)
    opening = kinds[brackets] == OPEN
    depth = np.cumsum(np.where(opening, 1, -1))
    if depth.max() > 3:
        return None
    ring = np.flatnonzero(opening & (depth == 3))
    owner = np.cumsum(opening & (depth == 2))
    if owner[-1] != entries:
        return None
    begin, end = brackets[ring], brackets[ring + 1]
    numbers = end - begin
    numbers[marks[end] - marks[begin] == 1] = 0
    return owner[ring] - 1, numbers


def _measure_one(row: int, text: SegmentationText, found: Measured) -> None:
    """Look at one segmentation of unknown make."""
    raw = bytes(text)
    value = parse_segmentation(raw)
    if value is None:
        if raw.strip() not in (b"null", b"[]", b"{}", b'""', b""):
            found.wrong.append((row, "cannot be read"))
        return
    if isinstance(value, dict):
        found.masks.append((row, value))
        return
    if not isinstance(value, list):
        found.wrong.append((row, f"is {type(value).__name__}, not a list of polygons"))
        return
    for ring in value:
        if not isinstance(ring, list) or not all(_is_number(number) for number in ring):
            found.wrong.append((row, "holds something that is not a list of numbers"))
            return
    counts = np.array([len(ring) for ring in value], np.int64)
    values = np.array(list(chain.from_iterable(value)), np.float64)
    found.add(np.full(len(value), row, np.int64), counts, values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def rle_problem(mask: dict[str, Any], width: float, height: float) -> str | None:
    """What is wrong with an RLE mask for an image of this size, None when it is sound.

    `counts` are run lengths, column by column, as a list or in COCO's compressed text.
    """
    size, counts = mask.get("size"), mask.get("counts")
    if not (isinstance(size, list) and len(size) == 2 and all(map(_is_number, size))):
        return f"size {size!r:.60} is not [height, width]"
    if isinstance(counts, str):
        runs = _decompress(counts)
    elif isinstance(counts, list) and all(map(_is_number, counts)):
        runs = counts
    else:
        return "counts are neither a list of numbers nor a text"
    if runs is None or any(run < 0 for run in runs):
        return "counts cannot be decoded"
    if sum(runs) != size[0] * size[1]:
        return f"counts cover {sum(runs):.0f} pixels, size {size} has {size[0] * size[1]}"
    if np.isfinite(width) and np.isfinite(height) and (size[0] != height or size[1] != width):
        return f"size {size} differs from the image's [{height:.0f}, {width:.0f}]"
    return None


def _decompress(text: str) -> list[int] | None:
    """Run lengths of COCO's compressed RLE: 5 bits a character, differences to the last but one."""
    runs: list[int] = []
    value = shift = 0
    for character in text:
        digit = ord(character) - 48
        if not 0 <= digit < 64 or shift > 60:
            return None
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    return runs if shift == 0 else None
