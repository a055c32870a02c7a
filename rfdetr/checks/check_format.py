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
    impossible,
    other_formats,
    overlaps,
)
from rfdetr.checks.check_files import SplitFiles
from rfdetr.checks.codes import Severity
from rfdetr.checks.collector import Collector
from rfdetr.checks.table import SplitTable
from rfdetr.config import ModelConfig

ENOUGH_BOXES = 16  # fewer may fit another format by chance; small splits are judged together
FEW_BOXES = 4  # different ones are enough if half of them cannot be objects as they are read
MOST_BOXES = 20_000  # of a larger split, every second, third ... box is judged
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
        found = other_formats(boxes, native) if _enough(boxes, native) else []
        if found:
            _report(split.table, native, found, collector)


def _enough(boxes: Written, native: BoxFormat) -> bool:
    count = len(boxes.values)
    if count >= ENOUGH_BOXES:
        return True
    different = len(np.unique(boxes.values, axis=0))
    return different >= FEW_BOXES and 2 * impossible(boxes, native) >= count


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
    left_out = table.masked if table.relative else table.crowd
    rows = np.flatnonzero((table.image_rows >= 0) & ~left_out)
    rows = rows[:: 1 + len(rows) // MOST_BOXES]
    values, sizes = table.boxes[rows], _sizes(files)[table.image_rows[rows]]
    if table.relative:
        values = np.concatenate([values[:, :2] + values[:, 2:] / 2, values[:, 2:]], axis=1)
        return Written(values, sizes, np.full((len(values), 4), np.nan), np.full(len(rows), np.nan))
    outlines = table.outline_boxes[rows] / np.concatenate([sizes, sizes], axis=1)
    known = finite_rows(values, sizes)
    areas = np.full(len(rows), np.nan) if table.areas is None else table.areas[rows]
    return Written(values[known], sizes[known], outlines[known], areas[known])


def _sizes(files: SplitFiles) -> Floats:
    """Image sizes (n + 1, 2): the larger of the annotation file and the image file.

    A box is not in the wrong format if it fits either. The last row is unknown.
    """
    sizes = np.vstack([files.table.sizes, [np.nan, np.nan]])
    for row, found in enumerate(files.facts):
        if found is not None and found.facts.width:
            sizes[row] = np.fmax(sizes[row], (found.facts.width, found.facts.height))
    return sizes


def check_outlines(table: SplitTable, collector: Collector, model: ModelConfig) -> None:
    """Report boxes that hardly overlap what their polygons extend over. Boxes are in pixels."""
    if table.label_files is not None:  # the box is that of the polygon
        return
    outlines = table.outline_boxes
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
