"""Fast reader of COCO annotation files: JSON to NumPy columns, polygons left as bytes in the file.

    coco = read_coco(path)                  # raises DatasetError that lists what is wrong
    coco = read_coco(path, tolerant=True)   # never raises for content: see coco.problems

    coco.images       ImageTable: ids, widths, heights (int64), names (list of str), rows
    coco.annotations  AnnotationTable: ids, image_ids, category_ids, boxes (n, 4) x y w h float64,
                      areas float64 (NaN where the file has none), crowd bool, starts and stops
                      (byte range of the segmentation, equal where there is none), rows
    coco.categories   list of Category(id, name, supercategory, row)
    coco.problems     list of Problem(code, section, row, key, value, reason, fatal, id, line)
    coco.segmentation(i)         the parsed segmentation of the i-th annotation kept, or None
    coco.lines("images", rows)   line numbers in the file of rows, on demand

`rows` number the entries of the file's lists from 0; an entry with a fatal problem is not in the
tables. An id, width or height that is missing is UNKNOWN, and a problem that is not fatal. Numbers
are not judged here: negative, zero-sized or dangling entries are in the tables.
"""

from __future__ import annotations

import codecs
import gc
import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from rfdetr.data.coco_entries import Document, ProblemCode
from rfdetr.data.coco_rows import (
    FAILURES,
    MAX_PROBLEMS,
    SECTIONS,
    UNKNOWN,
    Lines,
    Problem,
    Rows,
    byte_offset,
    outline,
    read_rows,
    section_rows,
)
from rfdetr.errors import DatasetError

__all__ = [
    "UNKNOWN",
    "AnnotationTable",
    "Category",
    "CocoFile",
    "ImageTable",
    "Problem",
    "parse_segmentation",
    "read_coco",
]

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
SHOWN = 20


@dataclass(frozen=True)
class Category:
    """One entry of the category list."""

    id: int
    name: str
    supercategory: str | None
    row: int


@dataclass(frozen=True)
class ImageTable:
    """Columns of the image list."""

    ids: Integers
    widths: Integers
    heights: Integers
    names: list[str]
    rows: Integers


@dataclass(frozen=True)
class AnnotationTable:
    """Columns of the annotation list."""

    ids: Integers
    image_ids: Integers
    category_ids: Integers
    boxes: Floats
    areas: Floats
    crowd: npt.NDArray[np.bool_]
    starts: Integers
    stops: Integers
    rows: Integers


@dataclass(frozen=True)
class CocoFile:
    """The content of one annotation file; `data` is its text, where byte ranges point.

    `texts` are the segmentations of the annotations as JSON text, empty where there is none.
    """

    path: Path
    images: ImageTable
    annotations: AnnotationTable
    categories: list[Category]
    problems: list[Problem]
    data: bytes = field(repr=False)
    texts: list[msgspec.Raw] = field(repr=False)

    def segmentation(self, index: int) -> Any:
        """Polygons (list of lists) or RLE (dict) of an annotation; None where it has none."""
        table = self.annotations
        return parse_segmentation(self.data[table.starts[index] : table.stops[index]])

    def lines(self, section: str, rows: Sequence[int]) -> list[int]:
        """Line numbers, from 1, where the given entries of a section begin in the file."""
        values, text, _ = outline(self.data)
        entries, _ = section_rows(values, section)
        lines = Lines(self.data)
        return [lines.at(byte_offset(entries[row], text)) for row in rows]


def parse_segmentation(text: bytes) -> Any:
    """A segmentation from its bytes in the file; None when it is absent, empty or not JSON."""
    try:
        return (msgspec.json.decode(text) or None) if text else None
    except FAILURES:
        return None


def read_coco(
    path: str | os.PathLike[str], *, tolerant: bool = False, segmentation: bool = True
) -> CocoFile:
    """Read a COCO annotation file.

    `segmentation=False` skips the byte ranges of segmentations, about half of the time. Strict mode
    raises DatasetError that lists the fatal problems; `tolerant` returns what could be read.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise DatasetError(f"{path}: the annotation file cannot be read: {reason}.") from error
    if data.startswith(codecs.BOM_UTF8):
        data = b"   " + data[3:]
    with _no_garbage_collection():
        sections, text, problems = _parse(data)
        images = _image_table(sections["images"])
        annotations = _annotation_table(sections["annotations"], text if segmentation else b"")
        categories = [
            Category(entry.id, entry.name, entry.supercategory, row)
            for entry, row in zip(*sections["categories"], strict=True)
        ]
    problems += _unknown_values(images, annotations)
    if not tolerant:
        _raise_fatal(path, problems)
    texts = [entry.segmentation for entry in sections["annotations"].entries]
    return CocoFile(path, images, annotations, categories, problems, data, texts)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A million new objects, none of them garbage: the collector would only walk over them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _parse(data: bytes) -> tuple[dict[str, Rows], bytes, list[Problem]]:
    if not data or data.isspace():
        empty = {name: Rows([], []) for name in SECTIONS}
        problem = Problem("json-malformed", "file", None, None, "", "the file is empty")
        return empty, data, [problem]
    try:
        document = msgspec.json.decode(data, type=Document)
    except FAILURES:
        return read_rows(data)
    lists: dict[str, list[Any]] = {name: getattr(document, name) for name in SECTIONS}
    return {n: Rows(part, range(len(part))) for n, part in lists.items()}, data, []


def _column(entries: list[Any], key: str) -> Integers:
    return np.fromiter(map(attrgetter(key), entries), np.int64, len(entries))


def _known(entries: list[Any], key: str) -> Integers:
    try:
        return _column(entries, key)
    except TypeError:  # some entries lack the value
        pass
    values = (UNKNOWN if v is None else v for v in map(attrgetter(key), entries))
    return np.fromiter(values, np.int64, len(entries))


def _image_table(rows: Rows) -> ImageTable:
    entries = rows.entries
    return ImageTable(
        ids=_column(entries, "id"),
        widths=_known(entries, "width"),
        heights=_known(entries, "height"),
        names=[entry.file_name for entry in entries],
        rows=np.asarray(rows.numbers, np.int64),
    )


def _annotation_table(rows: Rows, data: bytes) -> AnnotationTable:
    entries, count = rows.entries, len(rows.entries)
    boxes = itertools.chain.from_iterable(map(attrgetter("bbox"), entries))
    starts, stops = _byte_ranges(entries, data)
    return AnnotationTable(
        ids=_known(entries, "id"),
        image_ids=_column(entries, "image_id"),
        category_ids=_column(entries, "category_id"),
        boxes=np.fromiter(boxes, np.float64, 4 * count).reshape(count, 4),
        areas=_areas(entries),
        crowd=np.fromiter(map(bool, map(attrgetter("iscrowd"), entries)), np.bool_, count),
        starts=starts,
        stops=stops,
        rows=np.asarray(rows.numbers, np.int64),
    )


def _areas(entries: list[Any]) -> Floats:
    try:
        return np.fromiter(map(attrgetter("area"), entries), np.float64, len(entries))
    except TypeError:  # some entries lack the value
        values = (np.nan if entry.area is None else entry.area for entry in entries)
        return np.fromiter(values, np.float64, len(entries))


def _byte_ranges(entries: list[Any], text: bytes) -> tuple[Integers, Integers]:
    """Where in `text` each segmentation lies; (0, 0) for an entry without one.

    Asking every text for its address is slower than looking for it behind the next key.
    """
    starts, stops = np.zeros((2, len(entries)), np.int64)
    if not text:
        return starts, stops
    key, place = b'"segmentation"', 0
    for i, entry in enumerate(entries):
        segmentation = bytes(memoryview(entry.segmentation))
        if not segmentation:
            continue
        start = text.find(key, place) + len(key)
        while text[start : start + 1] in (b":", b" ", b"\n", b"\t", b"\r"):
            start += 1
        if not text.startswith(segmentation, start):  # the key also stands elsewhere
            start = byte_offset(entry.segmentation, text)
        place = start + len(segmentation)
        starts[i], stops[i] = start, place
    return starts, stops


def _unknown_values(images: ImageTable, annotations: AnnotationTable) -> list[Problem]:
    problems = []
    missing: list[tuple[ProblemCode, str, Any, tuple[str, ...]]] = [
        ("image-size-invalid", "images", images, ("widths", "heights")),
        ("key-missing", "annotations", annotations, ("ids",)),
    ]
    for code, section, table, keys in missing:
        for key in keys:
            for i in np.flatnonzero(getattr(table, key) == UNKNOWN)[:MAX_PROBLEMS]:
                row, own = int(table.rows[i]), int(table.ids[i])
                known = None if own == UNKNOWN else own
                reason = "the key is missing"
                problems.append(Problem(code, section, row, key[:-1], "", reason, False, known))
    return problems


def _raise_fatal(path: Path, problems: list[Problem]) -> None:
    fatal = [str(problem) for problem in problems if problem.fatal]
    if not fatal:
        return
    shown = "\n  ".join(fatal[:SHOWN])
    more = f"\n  and {len(fatal) - SHOWN} more" if len(fatal) > SHOWN else ""
    raise DatasetError(f"{path}: the annotation file has {len(fatal)} problem(s):\n  {shown}{more}")
