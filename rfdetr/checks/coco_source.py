"""A COCO annotation file as a split table, with a finding for each record that cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from rfdetr.checks.dataset_report import Collector
from rfdetr.checks.polygons import Measured, measure_segmentations, rle_problem
from rfdetr.checks.table import NO_ID, CategoryRow, Floats, Integers, SplitTable
from rfdetr.data.coco_json import UNKNOWN, CocoFile, Problem, parse_segmentation, read_coco
from rfdetr.data.coco_rows import Lines, byte_offset, outline, section_rows

TAIL = 64  # a newline this near to the end may close a file of one line


def read_coco_split(
    name: str,
    folder: Path,
    images_dir: Path,
    annotation_file: Path,
    *,
    collector: Collector,
    workers: int | None = None,
) -> SplitTable:
    """Read one annotation file tolerantly. DatasetError only where the file cannot be opened."""
    coco = read_coco(annotation_file, tolerant=True, segmentation=False)
    measured = measure_segmentations(coco.texts, workers)
    table = _table(name, folder, images_dir, coco)
    table.readable = all(problem.section != "file" for problem in coco.problems)
    table.broken_names = _broken_names(coco)
    _report_problems(coco.problems, table, collector)
    _report_image_records(table, coco, collector)
    _report_links(table, coco, collector)
    _add_segmentations(table, measured, collector)
    return table


def _table(name: str, folder: Path, images_dir: Path, coco: CocoFile) -> SplitTable:
    images, annotations = coco.images, coco.annotations
    sizes = np.stack([images.widths, images.heights], axis=1).astype(np.float64)
    sizes[(sizes <= 0)] = np.nan
    categories = [CategoryRow(c.id, c.name, c.supercategory or "") for c in coco.categories]
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
        image_rows=look_up(images.ids, annotations.image_ids),
        category_rows=look_up(category_ids, annotations.category_ids),
        boxes=annotations.boxes,
        areas=annotations.areas,
        crowd=annotations.crowd,
        categories=categories,
        image_records=images.rows,
        annotation_records=annotations.rows,
        image_lines=_line_finder(coco.data, "images", images.rows),
        annotation_lines=_line_finder(coco.data, "annotations", annotations.rows),
    )


def look_up(keys: Integers, wanted: Integers) -> Integers:
    """Row of the first equal key for each wanted value, -1 where there is none."""
    if not len(keys):
        return np.full(len(wanted), -1, np.int64)
    order = np.argsort(keys, kind="stable")
    place = np.searchsorted(keys[order], wanted).clip(max=len(keys) - 1)
    rows = order[place]
    return np.asarray(np.where(keys[rows] == wanted, rows, -1))


def _line_finder(
    data: bytes, section: str, numbers: Integers
) -> Callable[[Sequence[int]], list[int | None]]:
    """Lines of table rows, looked up in the file when they are first asked for."""
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
            entries, _ = section_rows(values, section)
            offsets.append(np.array([byte_offset(entry, text) for entry in entries], np.int64))
        lines = Lines(data)
        order = sorted(range(len(rows)), key=lambda i: rows[i])
        found: list[int | None] = [None] * len(rows)
        for i in order:
            found[i] = lines.at(int(offsets[0][numbers[rows[i]]]))
        return found

    return find


def _broken_names(coco: CocoFile) -> frozenset[str]:
    """File names of image records that could not be used."""
    rows = {p.row for p in coco.problems if p.section == "images" and p.fatal and p.row is not None}
    if not rows:
        return frozenset()
    values, _, _ = outline(coco.data)
    entries, _ = section_rows(values, "images")
    records = (parse_segmentation(bytes(entries[row])) for row in sorted(rows))
    names = (record.get("file_name") for record in records if isinstance(record, dict))
    return frozenset(name for name in names if isinstance(name, str))


def _report_problems(problems: Sequence[Problem], table: SplitTable, collector: Collector) -> None:
    for problem in problems:
        image = annotation = None
        if problem.section == "images":
            image = problem.id
        elif problem.section == "annotations":
            annotation = problem.id
        line = problem.line
        if line is None and problem.row is not None:
            line = _line_of_record(table, problem)
        mend = {} if problem.row is not None else {"mend": ""}
        collector.add(
            problem.code,
            str(problem),
            split=table.name,
            file=table.show(table.annotation_file) if table.annotation_file else None,
            line=line,
            image_id=image,
            annotation_id=annotation,
            details={"section": problem.section, "record": problem.row, "key": problem.key},
            **mend,
        )


def _line_of_record(table: SplitTable, problem: Problem) -> int | None:
    """Line of a record that is in the table but lacks a value."""
    finder, records = table.annotation_lines, table.annotation_records
    if problem.section == "images":
        finder, records = table.image_lines, table.image_records
    if records is None or problem.section == "categories":
        return None
    found = np.flatnonzero(records == problem.row)
    return finder([int(found[0])])[0] if len(found) else None


def _report_image_records(table: SplitTable, coco: CocoFile, collector: Collector) -> None:
    given = np.stack([coco.images.widths, coco.images.heights], axis=1)
    bad = np.flatnonzero(((given <= 0) & (given != UNKNOWN)).any(axis=1))
    for row in collector.take("image-size-invalid", bad):
        text = f"{table.file_names[row]} is given the size {given[row, 0]} x {given[row, 1]}"
        place = table.image_place(int(row))
        details = table.image_details(int(row))
        collector.note("image-size-invalid", text, details=details, **place)
    for code, values, what in (
        ("image-id-duplicate", table.image_ids, "image id"),
        ("file-repeated", np.array(table.file_names, object), "file name"),
    ):
        order = np.argsort(values, kind="stable")
        again = np.sort(order[1:][values[order][1:] == values[order][:-1]])
        for row in collector.take(code, again):
            text = f"{what} {values[row]} is used before"
            place = table.image_place(int(row))
            details = table.image_details(int(row))
            collector.note(code, text, details=details, **place)


def _report_links(table: SplitTable, coco: CocoFile, collector: Collector) -> None:
    for code, rows, wanted, what in (
        ("image-id-unknown", table.image_rows, coco.annotations.image_ids, "image_id"),
        ("category-id-unknown", table.category_rows, coco.annotations.category_ids, "category_id"),
    ):
        chosen = [int(row) for row in collector.take(code, np.flatnonzero(rows < 0))]
        for row, place in zip(chosen, table.annotation_places(chosen), strict=True):
            text = f"{what} {wanted[row]} is not listed, or its record cannot be read"
            collector.note(code, text, details=table.annotation_details(row), **place)


def _add_segmentations(
    table: SplitTable, measured: Callable[[], Measured], collector: Collector
) -> None:
    found = measured()
    table.polygons = found.polygons()
    table.masked[table.polygons.owner] = True
    table.masked[[row for row, _ in found.masks]] = True
    _note_rows(table, collector, "polygon-malformed", found.wrong)
    sizes: Floats = np.vstack([table.sizes, [np.nan, np.nan]])
    broken = []
    for row, mask in found.masks:
        width, height = sizes[table.image_rows[row]]
        reason = rle_problem(mask, width, height)
        if reason:
            broken.append((row, reason))
    _note_rows(table, collector, "rle-malformed", broken)


def _note_rows(
    table: SplitTable, collector: Collector, code: str, found: Sequence[tuple[int, str]]
) -> None:
    listed = collector.take(code, found)
    places = table.annotation_places([row for row, _ in listed])
    for (row, reason), place in zip(listed, places, strict=True):
        text = f"segmentation {reason} ({table.image_name(row)})"
        collector.note(code, text, details=table.annotation_details(row), **place)
