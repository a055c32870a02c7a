"""Fast reader of COCO annotation files: JSON to NumPy arrays, polygons left as bytes in the file.

    coco = read_coco(path)                  # raises DatasetError that lists what is wrong
    coco = read_coco(path, tolerant=True)   # never raises for content: see coco.problems

Entries are numbered from 0 in the lists of the file (`rows`). An entry with a problem is not in
the tables. A missing id, width or height is UNKNOWN. The tables contain numbers as the file gives
them: negative sizes, boxes without extent and ids that do not exist included.
"""

from __future__ import annotations

import codecs
import gc
import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from rfdetr.arrays import Bools, Floats, Integers
from rfdetr.data.coco_entries import Document
from rfdetr.data.coco_problems import (
    FAILURES,
    SECTIONS,
    Problem,
    Section,
    byte_offset,
    read_entries,
)
from rfdetr.errors import DatasetError

UNKNOWN = -(2**63)  # an id, width or height that the file does not give
LONG = 32  # bytes of a segmentation that cannot be empty
EMPTY = frozenset({b"", b"[]", b"{}", b"null", b'""', b"0", b"false"})
SHOWN = 20  # problems that an error lists


@dataclass(frozen=True)
class Category:
    """One entry of the category list."""

    id: int
    name: str
    supercategory: str | None
    row: int


@dataclass(frozen=True)
class ImageTable:
    """The image list: one array element per valid entry."""

    ids: Integers
    widths: Integers
    heights: Integers
    names: list[str]
    rows: Integers


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
    rows: Integers


@dataclass(frozen=True)
class CocoFile:
    """The content of one annotation file.

    `data` is its text, where byte ranges point. `rejected` and `rejected_images` are the numbers of
    annotation and image entries with a problem, which are not in the tables. `texts` are the
    segmentations of the annotations as JSON text, empty where there is none.
    """

    path: Path
    images: ImageTable
    annotations: AnnotationTable
    categories: list[Category]
    problems: list[Problem]
    data: bytes = field(repr=False)
    texts: list[msgspec.Raw] = field(repr=False)
    rejected: int = 0
    rejected_images: int = 0


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


def read_coco(
    path: str | os.PathLike[str], *, tolerant: bool = False, segmentation: bool = True
) -> CocoFile:
    """Read a COCO annotation file.

    `segmentation=False` skips the byte ranges of segmentations, which take about half of the time.
    Raises DatasetError that lists the problems of the file, or, if `tolerant`, only if the file
    cannot be opened.
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
            for entry, row in zip(*sections["categories"][:2], strict=True)
        ]
    if problems and not tolerant:
        raise _error(path, problems)
    texts = [entry.segmentation for entry in sections["annotations"].entries]
    lost = (sections[name].rejected for name in ("annotations", "images"))
    return CocoFile(path, images, annotations, categories, problems, data, texts, *lost)


def has_outline(text: bytes | msgspec.Raw) -> bool:
    """Whether the JSON text of a segmentation contains anything."""
    content = bytes(text)
    return len(content) > LONG or b"".join(content.split()) not in EMPTY


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Pause the collector: it would walk over a million new objects, none of them garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _parse(data: bytes) -> tuple[dict[str, Section], bytes, list[Problem]]:
    if not data or data.isspace():
        empty = {name: Section([], []) for name in SECTIONS}
        problem = Problem("json-malformed", "file", None, None, "", "the file is empty")
        return empty, data, [problem]
    try:
        document = msgspec.json.decode(data, type=Document)
    except FAILURES:
        return read_entries(data)
    lists: dict[str, list[Any]] = {name: getattr(document, name) for name in SECTIONS}
    return {n: Section(part, range(len(part))) for n, part in lists.items()}, data, []


def _column(entries: list[Any], key: str, dtype: Any = np.int64, missing: Any = UNKNOWN) -> Any:
    try:
        return np.fromiter(map(attrgetter(key), entries), dtype, len(entries))
    except TypeError:  # some entries have None
        pass
    values = (missing if v is None else v for v in map(attrgetter(key), entries))
    return np.fromiter(values, dtype, len(entries))


def _image_table(section: Section) -> ImageTable:
    entries = section.entries
    return ImageTable(
        ids=_column(entries, "id"),
        widths=_column(entries, "width"),
        heights=_column(entries, "height"),
        names=[entry.file_name for entry in entries],
        rows=np.asarray(section.numbers, np.int64),
    )


def _annotation_table(section: Section, data: bytes) -> AnnotationTable:
    entries, count = section.entries, len(section.entries)
    boxes = itertools.chain.from_iterable(map(attrgetter("bbox"), entries))
    starts, stops = _byte_ranges(entries, data)
    return AnnotationTable(
        ids=_column(entries, "id"),
        image_ids=_column(entries, "image_id"),
        category_ids=_column(entries, "category_id"),
        boxes=np.fromiter(boxes, np.float64, 4 * count).reshape(count, 4),
        areas=_column(entries, "area", np.float64, np.nan),
        crowd=np.fromiter(map(bool, map(attrgetter("iscrowd"), entries)), np.bool_, count),
        starts=starts,
        stops=stops,
        rows=np.asarray(section.numbers, np.int64),
    )


def _byte_ranges(entries: list[Any], text: bytes) -> tuple[Integers, Integers]:
    """Where in `text` each segmentation is; (0, 0) for an entry without one.

    Training reads a polygon from the file when it needs it: all polygons as text would take as
    much memory as the file in every loader worker. Searching for the next key is faster than
    asking every text for its address.
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
        if not text.startswith(segmentation, start):  # the key also occurs elsewhere
            start = byte_offset(entry.segmentation, text)
        place = start + len(segmentation)
        starts[i], stops[i] = start, place
    return starts, stops


def _error(path: Path, problems: list[Problem]) -> DatasetError:
    shown = "\n  ".join(map(str, problems[:SHOWN]))
    more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return DatasetError(
        f"{path}: the annotation file has {len(problems)} problem(s):\n  {shown}{more}"
    )
