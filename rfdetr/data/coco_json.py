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
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from rfdetr.arrays import Integers
from rfdetr.data.coco_annotations import (
    Annotations,
    AnnotationTable,
    Measure,
    Runner,
    annotation_table,
    column,
    cut_document,
    read_parts,
    serial,
)
from rfdetr.data.coco_entries import Document
from rfdetr.data.coco_problems import (
    FAILURES,
    SECTIONS,
    Problem,
    Section,
    read_entries,
)
from rfdetr.data.text import read_file
from rfdetr.errors import DatasetError

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
class CocoFile:
    """The content of one annotation file.

    `data` is its text, where byte ranges point. `rejected` and `rejected_images` are the numbers of
    annotation and image entries with a problem, which are not in the tables. `texts` are the
    segmentations of the annotations as JSON text, empty where there is none, and `measured` what
    was measured from consecutive ones, with the first row of each result.
    """

    path: Path
    images: ImageTable
    annotations: AnnotationTable
    categories: list[Category]
    problems: list[Problem]
    data: bytes = field(repr=False)
    texts: Sequence[msgspec.Raw] = field(repr=False)
    measured: list[tuple[int, Any]] = field(repr=False)
    rejected: int = 0
    rejected_images: int = 0


def read_coco(
    path: str | os.PathLike[str],
    *,
    tolerant: bool = False,
    segmentation: bool = True,
    measure: Measure | None = None,
    run: Runner = serial,
) -> CocoFile:
    """Read a COCO annotation file.

    `segmentation=False` skips the byte ranges of segmentations, which take about half of the time.
    `measure` is called with the segmentations of consecutive annotations, `run` divides the work
    among processes. Raises DatasetError that lists the problems of the file, or, if `tolerant`,
    only if the file cannot be opened.
    """
    path = Path(path)
    try:
        data = read_file(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DatasetError(f"{path}: the annotation file cannot be read: {reason}.") from error
    if data.startswith(codecs.BOM_UTF8):
        data = b"   " + data[3:]
    with _no_garbage_collection():
        sections, found, problems = _parse(data, ranges=segmentation, measure=measure, run=run)
        images = _image_table(sections["images"])
        categories = [
            Category(entry.id, entry.name, entry.supercategory, row)
            for entry, row in zip(*sections["categories"][:2], strict=True)
        ]
    if problems and not tolerant:
        raise _error(path, problems)
    lost = (sections[name].rejected for name in ("annotations", "images"))
    return CocoFile(
        path, images, found.table, categories, problems, data, found.texts, found.measured, *lost
    )


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


def _parse(
    data: bytes, *, ranges: bool, measure: Measure | None, run: Runner
) -> tuple[dict[str, Section], Annotations, list[Problem]]:
    """The sections, the annotations as columns, and the problems."""
    if not data or data.isspace():
        sections = {name: Section([], []) for name in SECTIONS}
        problem = Problem("json-malformed", "file", None, None, "", "the file is empty")
        return sections, _entry_by_entry(sections, data, ranges, measure), [problem]
    cut = cut_document(data)
    if cut is not None:
        document, parts = cut
        found = read_parts(data, parts, ranges=ranges, measure=measure, run=run)
        if found is not None:
            return _sections(document), found, []
    try:
        sections, text = _sections(msgspec.json.decode(data, type=Document)), data
        problems: list[Problem] = []
    except FAILURES:
        sections, text, problems = read_entries(data)
    return sections, _entry_by_entry(sections, text, ranges, measure), problems


def _sections(document: Document) -> dict[str, Section]:
    lists: dict[str, list[Any]] = {name: getattr(document, name) for name in SECTIONS}
    return {name: Section(part, range(len(part))) for name, part in lists.items()}


def _entry_by_entry(
    sections: dict[str, Section], text: bytes, ranges: bool, measure: Measure | None
) -> Annotations:
    """The annotations of a file that cannot be read in parts."""
    entries, numbers, _ = sections["annotations"]
    table = annotation_table(entries, text if ranges else b"", 0)
    texts = [entry.segmentation for entry in entries]
    rows = np.asarray(numbers, np.int64)
    return Annotations(replace(table, rows=rows), texts, [(0, measure(texts))] if measure else [])


def _image_table(section: Section) -> ImageTable:
    entries = section.entries
    return ImageTable(
        ids=column(entries, "id"),
        widths=column(entries, "width"),
        heights=column(entries, "height"),
        names=[entry.file_name for entry in entries],
        rows=np.asarray(section.numbers, np.int64),
    )


def _error(path: Path, problems: list[Problem]) -> DatasetError:
    shown = "\n  ".join(map(str, problems[:SHOWN]))
    more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return DatasetError(
        f"{path}: the annotation file has {len(problems)} problem(s):\n  {shown}{more}"
    )
