"""Checks of boxes, areas and annotation ids, vectorised over the annotations of a split."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rfdetr.arrays import Bools, Floats, Integers
from rfdetr.checks.collector import Collector
from rfdetr.checks.options import CheckConfig
from rfdetr.checks.table import NO_ID, SplitTable, repeated_rows
from rfdetr.config import ModelConfig

MAX_LAG = 256  # successors each box is compared with; more in one place are duplicates anyway


def check_boxes(
    table: SplitTable, collector: Collector, config: CheckConfig, model: ModelConfig
) -> None:
    """Geometry, duplicates, areas, ids and density of one split."""
    sound = _check_shapes(table, collector, config)
    _check_outside(table, collector, config, sound)
    _check_areas(table, collector, config, sound)
    _check_ids(table, collector)
    _check_duplicates(table, collector, config, sound)
    _check_density(table, collector, model, sound)


def box_text(table: SplitTable, row: int) -> str:
    """The box of a row as [x, y, w, h]."""
    return "[" + ", ".join(f"{value:.6g}" for value in table.boxes[row]) + "]"


def _check_shapes(table: SplitTable, collector: Collector, config: CheckConfig) -> Bools:
    """Report impossible boxes; return which boxes have a positive area."""
    width, height = table.boxes[:, 2], table.boxes[:, 3]
    finite = np.isfinite(table.boxes).all(axis=1)
    negative = finite & ((width < 0) | (height < 0))
    thin = np.minimum(width, height) <= config.min_box_side
    flat = finite & ~negative & thin
    sound = finite & ~negative & ~flat

    def describe(what: str) -> Callable[[int], str]:
        return lambda row: f"bbox {box_text(table, row)} {what}"

    for code, flags, what in (
        ("box-nan", ~finite, "is not finite"),
        ("box-negative", negative, "has a negative size"),
        ("box-zero-area", flat, "has no area"),
    ):
        collector.add_annotations(table, code, np.flatnonzero(flags), describe(what))

    with np.errstate(divide="ignore", invalid="ignore"):
        aspect = np.maximum(width / height, height / width)
    odd = np.flatnonzero(sound & (aspect > config.max_aspect) & ~table.crowd)
    collector.add_annotations(
        table,
        "box-aspect",
        odd,
        lambda row: f"bbox {box_text(table, row)} has the aspect ratio {aspect[row]:.0f} : 1",
    )
    return np.asarray(sound)


def _check_outside(
    table: SplitTable, collector: Collector, config: CheckConfig, sound: Bools
) -> None:
    width, height = table.image_sizes().T
    usable = sound & np.isfinite(width)
    left, top = table.boxes[:, 0], table.boxes[:, 1]
    right, bottom = left + table.boxes[:, 2], top + table.boxes[:, 3]
    slack = config.outside_tolerance
    gone = usable & ((right <= 0) | (bottom <= 0) | (left >= width) | (top >= height))
    partly = (left < -slack) | (top < -slack) | (right > width + slack) | (bottom > height + slack)

    def describe(how: str) -> Callable[[int], str]:
        return lambda row: (
            f"bbox {box_text(table, row)} lies {how} the image of "
            f"{width[row]:.0f} x {height[row]:.0f} pixels"
        )

    collector.add_annotations(table, "box-outside-fully", np.flatnonzero(gone), describe("outside"))
    rows = np.flatnonzero(usable & partly & ~gone)
    collector.add_annotations(table, "box-outside", rows, describe("partly outside"))


def _check_areas(
    table: SplitTable, collector: Collector, config: CheckConfig, sound: Bools
) -> None:
    if table.areas is None:
        return
    area = table.areas
    box = table.boxes[:, 2] * table.boxes[:, 3]
    bad = sound & ~(area > 0)
    bad |= sound & ~np.isfinite(area)
    collector.add_annotations(
        table,
        "area-invalid",
        np.flatnonzero(bad),
        lambda row: (
            "area is missing or not a number" if np.isnan(area[row]) else f"area is {area[row]:.6g}"
        ),
    )
    slack = config.area_tolerance * box + 1.0
    low = np.where(table.masked, config.min_mask_fill * box - 1.0, box - slack)
    wrong = sound & ~bad & ((area > box + slack) | (area < low)) & ~table.crowd
    collector.add_annotations(
        table,
        "area-mismatch",
        np.flatnonzero(wrong),
        lambda row: f"area {area[row]:.6g} disagrees with the box of {box[row]:.6g} square pixels",
    )


def _check_ids(table: SplitTable, collector: Collector) -> None:
    if table.label_files is not None:
        return
    ids = table.annotation_ids
    collector.add_annotations(
        table,
        "annotation-id-zero",
        np.flatnonzero(ids == 0),
        lambda _row: "annotation id is 0",
    )
    again = repeated_rows(ids)
    collector.add_annotations(
        table,
        "annotation-id-duplicate",
        again[ids[again] != NO_ID],
        lambda row: f"annotation id {ids[row]} is already used",
    )


def _check_duplicates(
    table: SplitTable, collector: Collector, config: CheckConfig, sound: Bools
) -> None:
    rows = np.flatnonzero(sound & ~table.crowd & (table.image_rows >= 0))
    # Complex numbers are sorted by their real part first, five times faster than np.lexsort.
    order = np.argsort(table.image_rows[rows] + 1j * table.boxes[rows, 0])
    first, second, overlap = _close_pairs(
        rows[order], table.image_rows, table.boxes, config.near_duplicate_iou
    )
    first, second = np.minimum(first, second), np.maximum(first, second)
    same_class = table.category_rows[first] == table.category_rows[second]
    exact = (table.boxes[first] == table.boxes[second]).all(axis=1)
    for code, chosen in (
        ("box-duplicate", same_class & exact),
        ("box-near-duplicate", same_class & ~exact),
        ("box-conflict", ~same_class),
    ):
        pairs = first[chosen], second[chosen], overlap[chosen]
        _note_pairs(table, collector, code, pairs)


def _note_pairs(
    table: SplitTable,
    collector: Collector,
    code: str,
    pairs: tuple[Integers, Integers, Floats],
) -> None:
    """Report each later box once, with the earlier box it matches most closely."""
    first, second, overlap = pairs
    order = np.lexsort((first, -overlap, second))
    later, kept = np.unique(second[order], return_index=True)
    earlier = dict(zip(later.tolist(), first[order][kept].tolist(), strict=True))
    iou = dict(zip(later.tolist(), overlap[order][kept].tolist(), strict=True))

    def message(row: int) -> str:
        twin = table.annotation_places([earlier[row]])[0]
        name = f"annotation {twin['annotation_id']}"
        if table.label_files is not None:
            name = f"line {twin['line']}"
        return f"bbox {box_text(table, row)} repeats {name} (IoU {iou[row]:.3f})"

    collector.add_annotations(table, code, later, message)


def _close_pairs(
    order: Integers, groups: Integers, boxes: Floats, threshold: float
) -> tuple[Integers, Integers, Floats]:
    """Pairs of rows of one group with IoU >= threshold; `order` sorts rows by group and left edge.

    Two boxes whose left edges are more than (1 - threshold) widths of the left box apart cannot
    reach the threshold, so each row is compared with only a few successors.
    """
    group, box = groups[order], boxes[order]
    right = box[:, 0] + box[:, 2]
    bottom = box[:, 1] + box[:, 3]
    area = box[:, 2] * box[:, 3]
    reach = box[:, 0] + (1.0 - threshold) * box[:, 2] + 1e-9
    active = np.arange(len(order))
    found: list[tuple[Integers, Integers, Floats]] = []
    for lag in range(1, MAX_LAG + 1):
        active = active[active + lag < len(order)]
        other = active + lag
        near = (group[other] == group[active]) & (box[other, 0] <= reach[active])
        active, other = active[near], other[near]
        if not len(active):
            break
        across = np.minimum(right[active], right[other]) - box[other, 0]
        low = np.maximum(box[active, 1], box[other, 1])
        down = np.minimum(bottom[active], bottom[other]) - low
        shared = np.clip(across, 0, None) * np.clip(down, 0, None)
        overlap = shared / (area[active] + area[other] - shared)
        hit = overlap >= threshold
        found.append((order[active[hit]], order[other[hit]], overlap[hit]))
    if not found:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    first, second, overlaps = (np.concatenate(part) for part in zip(*found, strict=True))
    return first, second, overlaps


def _check_density(
    table: SplitTable, collector: Collector, model: ModelConfig, sound: Bools
) -> None:
    kept = sound & ~table.crowd & (table.image_rows >= 0)
    counts = np.bincount(table.image_rows[kept], minlength=len(table.file_names))
    crowded = np.flatnonzero(counts > model.num_queries)
    collector.add_images(
        table,
        "image-too-many-boxes",
        crowded,
        lambda row: (
            f"{table.file_names[row]} has {counts[row]} boxes, the model has "
            f"{model.num_queries} queries"
        ),
    )
    sides = input_sides(table, model.resolution)
    small = kept & (sides.min(axis=1) < 1.0)
    collector.add_annotations(
        table,
        "box-sub-pixel",
        np.flatnonzero(small),
        lambda row: (
            f"bbox {box_text(table, row)} becomes {sides[row, 0]:.2f} x {sides[row, 1]:.2f} pixels"
        ),
    )


def input_sides(table: SplitTable, resolution: int) -> Floats:
    """Width and height (n, 2) of every box after the square resize; NaN for unknown sizes."""
    return np.asarray(table.boxes[:, 2:] * (resolution / table.image_sizes()))
