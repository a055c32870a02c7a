"""A COCO annotation file as a split table, with a finding for each unreadable record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rfdetr.arrays import Integers, find_rows
from rfdetr.checks.collector import Collector
from rfdetr.checks.inspection import in_forks
from rfdetr.checks.polygons import Segmentations, joined, measure_segmentations
from rfdetr.checks.table import NO_ID, CategoryRow, SplitTable, repeated_rows
from rfdetr.data.coco_annotations import UNKNOWN, Part, parse_segmentation
from rfdetr.data.coco_json import CocoFile, read_coco
from rfdetr.data.coco_problems import (
    LineCounter,
    Problem,
    byte_offset,
    outline,
    section_entries,
)
from rfdetr.data.spawn import usable_cores

MANY_PARTS = 128  # of a file; with fewer, starting processes costs more than it saves
TAIL = 64  # a newline this close to the end may only terminate a file of one line


def read_coco_split(
    name: str,
    folder: Path,
    images_dir: Path,
    annotation_file: Path,
    *,
    collector: Collector,
    workers: int | None = None,
    known: Sequence[CategoryRow] = (),
) -> SplitTable:
    """Read one annotation file tolerantly. DatasetError only if the file cannot be opened.

    `known` are the categories of the first split, which this one need not list.
    """
    coco = read_coco(
        annotation_file,
        tolerant=True,
        segmentation=False,
        measure=measure_segmentations,
        run=partial(_in_processes, workers=workers or usable_cores()),
    )
    table = _table(name, folder, images_dir, coco, known)
    table.readable = all(problem.section != "file" for problem in coco.problems)
    table.broken_names = _broken_names(coco)
    _report_problems(coco.problems, table, collector)
    _report_missing(table, coco, collector)
    _report_image_records(table, coco, collector)
    _report_links(table, coco, collector)
    _add_segmentations(table, joined(coco.measured))
    return table


def _in_processes(
    read: Callable[[Sequence[Part]], Any], parts: Sequence[Part], *, workers: int
) -> list[Any]:
    return in_forks(read, parts, workers=workers if len(parts) >= MANY_PARTS else 1)


def _table(
    name: str, folder: Path, images_dir: Path, coco: CocoFile, known: Sequence[CategoryRow]
) -> SplitTable:
    images, annotations = coco.images, coco.annotations
    sizes = np.stack([images.widths, images.heights], axis=1).astype(np.float64)
    sizes[(sizes <= 0)] = np.nan
    categories = [CategoryRow(c.id, c.name, c.supercategory or "") for c in coco.categories]
    listed = {category.id for category in categories}
    categories += [category for category in known if category.id not in listed]
    category_ids = np.array([category.id for category in categories], np.int64)
    return SplitTable(
        name=name,
        folder=folder,
        images_dir=images_dir,
        annotation_file=coco.path,
        image_ids=images.ids,
        file_names=images.names,
        sizes=sizes,
        annotation_ids=np.where(annotations.ids == UNKNOWN, NO_ID, annotations.ids),
        image_rows=find_rows(images.ids, annotations.image_ids),
        category_rows=find_rows(category_ids, annotations.category_ids),
        boxes=annotations.boxes,
        areas=annotations.areas,
        crowd=annotations.crowd,
        categories=categories,
        image_records=images.rows,
        annotation_records=annotations.rows,
        image_lines=_line_finder(coco.data, "images", images.rows),
        annotation_lines=_line_finder(coco.data, "annotations", annotations.rows),
        rejected=coco.rejected,
        rejected_images=coco.rejected_images,
        outline=lambda row: parse_segmentation(bytes(coco.texts[row])),
    )


def _line_finder(
    data: bytes, section: str, numbers: Integers
) -> Callable[[Sequence[int]], list[int | None]]:
    """Line numbers of table rows; the file is searched when they are first needed."""
    offsets: list[Integers] = []
    single_line: list[bool] = []

    def find(rows: Sequence[int]) -> list[int | None]:
        if not single_line:
            end = data.find(b"\n")
            single_line.append(end < 0 or (len(data) - end < TAIL and data[end:].isspace()))
        if single_line[0]:
            return [1] * len(rows)
        if not offsets:
            values, text, _ = outline(data)
            entries, _ = section_entries(values, section)
            offsets.append(np.array([byte_offset(entry, text) for entry in entries], np.int64))
        lines = LineCounter(data)
        order = sorted(range(len(rows)), key=lambda i: rows[i])
        found: list[int | None] = [None] * len(rows)
        for i in order:
            found[i] = lines.at(int(offsets[0][numbers[rows[i]]]))
        return found

    return find


def _broken_names(coco: CocoFile) -> frozenset[str]:
    """File names of the image records that could not be read."""
    rows = {p.row for p in coco.problems if p.section == "images" and p.row is not None}
    if not rows:
        return frozenset()
    values, _, _ = outline(coco.data)
    entries, _ = section_entries(values, "images")
    records = (parse_segmentation(bytes(entries[row])) for row in sorted(rows))
    names = (record.get("file_name") for record in records if isinstance(record, dict))
    return frozenset(name for name in names if isinstance(name, str))


def _report_problems(problems: Sequence[Problem], table: SplitTable, collector: Collector) -> None:
    for problem in problems:
        repair = {} if problem.row is not None else {"repair": ""}
        collector.add(
            problem.code,
            str(problem),
            split=table.name,
            file=table.source,
            line=problem.line,
            image_id=problem.id if problem.section == "images" else None,
            annotation_id=problem.id if problem.section == "annotations" else None,
            details={"section": problem.section, "record": problem.row, "key": problem.key},
            **repair,
        )


def _report_missing(table: SplitTable, coco: CocoFile, collector: Collector) -> None:
    """Report absent sizes and annotation ids, which training can do without."""
    no_width, no_height, no_id = (
        np.flatnonzero(values == UNKNOWN)
        for values in (coco.images.widths, coco.images.heights, coco.annotations.ids)
    )
    code = "image-size-missing"
    collector.add_images(table, code, no_width, lambda _row: "width is missing")
    collector.add_images(table, code, no_height, lambda _row: "height is missing")
    collector.add_annotations(table, "annotation-id-missing", no_id, lambda _row: "id is missing")


def _report_image_records(table: SplitTable, coco: CocoFile, collector: Collector) -> None:
    names = table.file_names
    given = np.stack([coco.images.widths, coco.images.heights], axis=1)
    collector.add_images(
        table,
        "image-size-missing",
        np.flatnonzero(((given <= 0) & (given != UNKNOWN)).any(axis=1)),
        lambda row: f"{names[row]} has the size {given[row, 0]} x {given[row, 1]}",
    )
    collector.add_images(
        table,
        "image-id-duplicate",
        repeated_rows(table.image_ids),
        lambda row: f"image id {table.image_ids[row]} is already used",
    )
    collector.add_images(
        table,
        "file-repeated",
        repeated_rows(np.array(names, object)),
        lambda row: f"file name {names[row]} is already used",
    )


def _report_links(table: SplitTable, coco: CocoFile, collector: Collector) -> None:
    def describe(key: str, ids: Integers) -> Callable[[int], str]:
        return lambda row: f"{key} {ids[row]} is not listed, or its record cannot be read"

    for code, rows, key, ids in (
        ("image-id-unknown", table.image_rows, "image_id", coco.annotations.image_ids),
        ("category-id-unknown", table.category_rows, "category_id", coco.annotations.category_ids),
    ):
        collector.add_annotations(table, code, np.flatnonzero(rows < 0), describe(key, ids))


def _add_segmentations(table: SplitTable, found: Segmentations) -> None:
    table.polygons, table.masks, table.bad_segmentations = found
    numbers = table.polygons.numbers
    table.masked[table.polygons.owner[(numbers >= 6) | (numbers % 2 == 1)]] = True
    table.masked[[row for row, _ in (*table.masks, *table.bad_segmentations)]] = True
