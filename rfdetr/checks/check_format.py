"""Boxes in another format than that of the layout, and boxes that disagree with their outlines."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rfdetr.arrays import Floats
from rfdetr.checks.box_format import (
    COCO,
    YOLO,
    BoxFormat,
    Written,
    finite_rows,
    other_formats,
    overlaps,
)
from rfdetr.checks.check_files import SplitFiles
from rfdetr.checks.codes import Severity
from rfdetr.checks.collector import Collector
from rfdetr.checks.table import SplitTable
from rfdetr.config import ModelConfig

ENOUGH_BOXES = 16  # fewer may fit another format by chance; small splits are judged together
LEAST_IOU = 0.3  # of a box and what its outline extends over
MOST_DIFFER = 0.5  # share of outlines that differ from which on they are wrong rather than odd


def check_format(splits: Sequence[SplitFiles], collector: Collector) -> None:
    """Report splits whose boxes fit their images only in another format.

    Training does not refuse them: it learns wrong boxes. Call it before sizes are those of the
    files and before the boxes of a YOLO split are scaled.
    """
    own = [_written(split) for split in splits]
    for split, alone in zip(splits, own, strict=True):
        if not len(alone.values):
            continue
        boxes = alone
        if len(alone.values) < ENOUGH_BOXES:
            boxes = Written(*(np.concatenate(columns) for columns in zip(*own, strict=True)))
        native = YOLO if split.table.relative else COCO
        found = other_formats(boxes, native) if len(boxes.values) >= ENOUGH_BOXES else []
        if found:
            _report(split.table, native, found, collector)


def _report(
    table: SplitTable, native: BoxFormat, found: Sequence[BoxFormat], collector: Collector
) -> None:
    text = (
        f"the boxes of {table.name} do not fit their images as {native}, which training reads, "
        f"but as {' or '.join(map(str, found))}"
    )
    certain = len(found) == 1
    collector.add(
        "box-format",
        text,
        split=table.name,
        file=table.source,
        repair="convert-boxes" if certain else "",
        details={"format": list(found[0])} if certain else {},
    )


def _written(files: SplitFiles) -> Written:
    """The boxes of a split as they are written, without those of polygons in a YOLO layout."""
    table = files.table
    values, sizes = table.boxes, _sizes(files)[table.image_rows]
    if table.relative:
        values = np.concatenate([values[:, :2] + values[:, 2:] / 2, values[:, 2:]], axis=1)
        outlines = np.full((len(values), 4), np.nan)
        chosen = ~table.masked
    else:
        outlines = outline_boxes(table) / np.concatenate([sizes, sizes], axis=1)
        chosen = finite_rows(values, sizes) & (table.image_rows >= 0) & ~table.crowd
    return Written(values[chosen], sizes[chosen], outlines[chosen])


def _sizes(files: SplitFiles) -> Floats:
    """Image sizes (n + 1, 2): the larger of the annotation file and the image file.

    A box is not in the wrong format if it fits either. The last row is unknown.
    """
    sizes = np.vstack([files.table.sizes, [np.nan, np.nan]])
    for row, found in enumerate(files.facts):
        if found is not None and found.facts.width:
            sizes[row] = np.fmax(sizes[row], (found.facts.width, found.facts.height))
    return sizes


def outline_boxes(table: SplitTable) -> Floats:
    """What the polygons of each row extend over, (n, 4) x0, y0, x1, y1; NaN without a polygon."""
    polygons = table.polygons
    if polygons is None:
        return np.full((len(table.boxes), 4), np.nan)
    low, high = np.full((len(table.boxes), 2), np.inf), np.full((len(table.boxes), 2), -np.inf)
    filled = np.isfinite(polygons.low).all(axis=1)
    np.minimum.at(low, polygons.owner[filled], polygons.low[filled])
    np.maximum.at(high, polygons.owner[filled], polygons.high[filled])
    found = np.concatenate([low, high], axis=1)
    return np.where(np.isfinite(found), found, np.nan)


def check_outlines(table: SplitTable, collector: Collector, model: ModelConfig) -> None:
    """Report boxes that hardly overlap what their polygons extend over. Boxes are in pixels."""
    if table.label_files is not None:  # the box is that of the polygon
        return
    outlines = outline_boxes(table)
    boxes = np.concatenate([table.boxes[:, :2], table.boxes[:, :2] + table.boxes[:, 2:]], axis=1)
    judged = finite_rows(boxes, outlines) & ~table.crowd & (table.image_rows >= 0)
    judged &= (table.boxes[:, 2:] > 0).all(axis=1)
    rows = np.flatnonzero(judged)
    overlap = np.zeros(len(boxes))
    overlap[rows] = overlaps(boxes[rows], outlines[rows])
    differing = rows[overlap[rows] < LEAST_IOU]
    wrong = model.segmentation_head and len(differing) > MOST_DIFFER * len(rows)
    severity: Severity = "error" if wrong else "warning"
    collector.add_annotations(
        table,
        "box-outline",
        differing,
        lambda row: (
            "the polygons extend over ["
            + ", ".join(f"{value:.6g}" for value in outlines[row])
            + f"], IoU {overlap[row]:.2f} with the box"
        ),
        severity,
    )
