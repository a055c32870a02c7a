"""The annotation list of a COCO file as columns, read in parts.

A valid file is cut between annotations into parts of PART bytes. Each part becomes columns while
its text is in the processor's cache, and its objects are dropped before the next part is read.
"""

from __future__ import annotations

import itertools
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from operator import attrgetter
from typing import Any, NamedTuple, overload

import msgspec
import numpy as np

from rfdetr.arrays import Bools, Floats, Integers
from rfdetr.data.coco_entries import AnnotationEntry, Document
from rfdetr.data.coco_problems import FAILURES, byte_offset
from rfdetr.data.masks import checked_polygons
from rfdetr.errors import DatasetError

UNKNOWN = -(2**63)  # an id, width or height that the file does not give
PART = 256 * 1024  # bytes

Measure = Callable[[Sequence[msgspec.Raw]], Any]
Part = tuple[int, int]  # first and last + 1 byte
Runner = Callable[[Callable[[Sequence[Part]], Any], Sequence[Part]], list[Any]]

_KEY = b'"annotations"'
_START = re.compile(_KEY + rb"\s*:\s*\[")
_STOP = re.compile(rb"\}\s*\]")
_BETWEEN = re.compile(rb"\}\s*(,)\s*\{")


@dataclass(frozen=True)
class AnnotationTable:
    """The annotation list: one array element per valid entry."""

    ids: Integers
    image_ids: Integers
    category_ids: Integers
    boxes: Floats  # (n, 4) x, y, width, height in pixels
    areas: Floats  # pixels, NaN where the file has none
    crowd: Bools
    starts: Integers  # byte range of the segmentation in the file, empty where there is none
    stops: Integers
    outlined: Bools  # whether the segmentation contains anything
    rows: Integers


class Annotations(NamedTuple):
    """Columns, the JSON texts of the segmentations, and what was measured: (first row, result)."""

    table: AnnotationTable
    texts: Sequence[msgspec.Raw]
    measured: list[tuple[int, Any]]


def cut_document(data: bytes) -> tuple[Document, list[Part]] | None:
    """The document without its annotations, and the parts of the annotation list.

    None if the list is not found where it usually is. The text before a part that is valid ends
    between two annotations, so the places that are guessed here are proven once every part and
    the rest have been decoded.
    """
    found = _START.match(data, max(data.find(_KEY), 0))
    last = max(data.rfind(b'"bbox"'), data.rfind(b'"image_id"'), 0)
    end = _STOP.search(data, last)
    if not found or not end or end.end() < found.end():
        return None
    start, stop = found.end(), end.end() - 1
    rest = data[:start] + data[stop:]
    if rest.count(_KEY) != 1:
        return None
    try:
        document = msgspec.json.decode(rest, type=Document)
    except FAILURES:
        return None
    return None if document.annotations else (document, list(_parts(data, start, stop)))


def _parts(data: bytes, start: int, stop: int) -> Iterable[Part]:
    while stop - start > PART and (comma := _BETWEEN.search(data, start + PART, stop)):
        yield start, comma.start(1)
        start = comma.end(1)
    yield start, stop


def _as_list(data: bytes, start: int, stop: int) -> bytes:
    return b"".join((b"[", memoryview(data)[start:stop], b"]"))


def serial(read: Callable[[Sequence[Part]], Any], parts: Sequence[Part]) -> list[Any]:
    """Read all parts in this process."""
    return [read(parts)]


def read_parts(
    data: bytes, parts: Sequence[Part], *, ranges: bool, measure: Measure | None, run: Runner
) -> Annotations | None:
    """The annotations of all parts; None if one cannot be decoded.

    `ranges` fills in the byte ranges. `run` calls a function with all parts, or in several
    processes with consecutive shares of them.
    """
    decoder = msgspec.json.Decoder(list[AnnotationEntry])

    def read(share: Sequence[Part]) -> tuple[AnnotationTable, list[Any]] | None:
        tables, measured = [], []
        for start, stop in share:
            text = _as_list(data, start, stop)
            try:
                entries = decoder.decode(text)
            except FAILURES:
                return None
            tables.append(annotation_table(entries, text if ranges else b"", start - 1))
            found = measure([entry.segmentation for entry in entries]) if measure else None
            measured.append((len(entries), found))
        return _joined(tables), measured

    shares = run(read, parts)
    if any(share is None for share in shares):
        return None
    table = _joined([columns for columns, _ in shares])
    counts = [count for _, measured in shares for count, _ in measured]
    firsts = [0, *itertools.accumulate(counts)]
    results = [found for _, measured in shares for _, found in measured]
    texts = PartTexts(data, parts, firsts)
    return Annotations(table, texts, list(zip(firsts, results, strict=False)))


class PartTexts(Sequence[msgspec.Raw]):
    """The segmentations of all annotations; the part of one is decoded when it is asked for."""

    def __init__(self, data: bytes, parts: Sequence[Part], firsts: Sequence[int]) -> None:
        self._firsts = firsts

        @lru_cache(maxsize=2)
        def decoded(part: int) -> list[AnnotationEntry]:
            start, stop = parts[part]
            return msgspec.json.decode(_as_list(data, start, stop), type=list[AnnotationEntry])

        self._decoded = decoded

    def __len__(self) -> int:
        return self._firsts[-1]

    @overload
    def __getitem__(self, row: int) -> msgspec.Raw: ...
    @overload
    def __getitem__(self, row: slice) -> list[msgspec.Raw]: ...
    def __getitem__(self, row: int | slice) -> msgspec.Raw | list[msgspec.Raw]:
        """The segmentation of one row or of several; empty where there is none."""
        if isinstance(row, slice):
            return [self[i] for i in range(len(self))[row]]
        row = range(len(self))[row]
        part = bisect_right(self._firsts, row) - 1
        return self._decoded(part)[row - self._firsts[part]].segmentation


def annotation_table(entries: list[AnnotationEntry], text: bytes, offset: int) -> AnnotationTable:
    """Columns of entries that were decoded from `text`, which begins at `offset` in the file.

    Without `text` there are no byte ranges.
    """
    count = len(entries)
    numbers = itertools.chain.from_iterable(map(attrgetter("bbox"), entries))
    boxes = np.fromiter(numbers, np.float64, 4 * count).reshape(count, 4)
    starts, stops, outlined = _byte_ranges(entries, text, offset)
    return AnnotationTable(
        ids=column(entries, "id"),
        image_ids=column(entries, "image_id"),
        category_ids=column(entries, "category_id"),
        boxes=np.asfortranarray(boxes),  # the checks work on columns
        areas=column(entries, "area", np.float64, np.nan),
        crowd=np.fromiter(map(bool, map(attrgetter("iscrowd"), entries)), np.bool_, count),
        starts=starts,
        stops=stops,
        outlined=outlined,
        rows=np.arange(count),
    )


def _joined(tables: Sequence[AnnotationTable]) -> AnnotationTable:
    if len(tables) == 1:
        return tables[0]
    names = [part.name for part in fields(AnnotationTable)]
    columns = {n: np.concatenate([getattr(table, n) for table in tables]) for n in names}
    columns["rows"] = np.arange(len(columns["ids"]))
    return AnnotationTable(**columns)


def column(entries: Sequence[Any], key: str, dtype: Any = np.int64, missing: Any = UNKNOWN) -> Any:
    """One attribute of all entries as an array."""
    try:
        return np.fromiter(map(attrgetter(key), entries), dtype, len(entries))
    except TypeError:  # some entries have None
        pass
    values = (missing if v is None else v for v in map(attrgetter(key), entries))
    return np.fromiter(values, dtype, len(entries))


def _byte_ranges(
    entries: list[AnnotationEntry], text: bytes, offset: int
) -> tuple[Integers, Integers, Bools]:
    """Where in the file each segmentation is, (0, 0) for an entry without one, and if it is filled.

    Training reads a polygon from the file when it needs it: all polygons as text would take as
    much memory as the file in every loader worker. Searching for the next key is faster than
    asking every text for its address.
    """
    starts, stops = np.zeros((2, len(entries)), np.int64)
    outlined = np.zeros(len(entries), bool)
    key, place = b'"segmentation"', 0
    for i, entry in enumerate(entries) if text else ():
        segmentation = bytes(memoryview(entry.segmentation))
        if not segmentation:
            continue
        start = text.find(key, place) + len(key)
        while text[start : start + 1] in (b":", b" ", b"\n", b"\t", b"\r"):
            start += 1
        if not text.startswith(segmentation, start):  # the key also occurs elsewhere
            start = byte_offset(entry.segmentation, text)
        place = start + len(segmentation)
        starts[i], stops[i] = start + offset, place + offset
        outlined[i] = has_outline(segmentation)
    return starts, stops, outlined


def parse_segmentation(text: bytes) -> Any:
    """Polygons (list of lists) or RLE (dict) from JSON text; None if it is absent or empty.

    Anything else comes as it is, also NaN, which JSON forbids; text that is not JSON as text.
    """
    if not text:
        return None
    for decode in (msgspec.json.decode, json.loads):
        try:
            return decode(text) or None
        except FAILURES:
            continue
    return text.decode("utf-8", "replace")


def has_outline(text: bytes) -> bool:
    """Whether the JSON text of a segmentation has a polygon of three points or anything else.

    Without one, an object has a box only.
    """
    if text.count(b"]") == 2 and text.count(b",") >= 5:  # one polygon
        return True
    value = parse_segmentation(text)
    if not isinstance(value, list):
        return value is not None
    try:
        return any(len(ring) >= 6 for ring in checked_polygons(value))
    except DatasetError:  # raised again where it is used
        return True
