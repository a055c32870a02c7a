"""YOLO labels of other tasks, which are read as polygons: keypoints and rotated boxes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rfdetr.arrays import Bools, Floats
from rfdetr.checks.collector import Collector
from rfdetr.checks.table import SplitTable
from rfdetr.data.yolo_labels import POSE_HINT, LabelRow

ENOUGH_ROWS = 4  # fewer polygons may look like keypoints by chance
MOST = 0.95  # share of labels that are like keypoints
APART = 0.4  # share of labels whose second point is far from the others, as only a size can be
HALF = 0.5  # share of labels with three keypoints or more that are no polygons
AMID = 0.2  # share of the extent of the other points on each side of a point amid them
BEYOND = 0.1  # keypoints may lie this share of the box beside it


def check_label_kind(table: SplitTable, rows: Sequence[LabelRow], collector: Collector) -> None:
    """Report a split whose labels have keypoints, or four corners as YOLO OBB writes them."""
    lengths = np.array([len(row.polygon) for row in rows])
    usual = int(np.bincount(lengths).argmax()) if len(lengths) else 0
    place = {"split": table.name, "file": table.source}
    values = np.array([row.polygon for row in rows if row.polygon and len(row.polygon) == usual])
    if ENOUGH_ROWS <= len(values) >= MOST * len(rows):
        for numbers in (2, 3):
            if usual > 4 and (usual - 4) % numbers == 0 and _keypoints(values, numbers):
                count = (usual - 4) // numbers
                text = (
                    f"the labels of {table.name} are read as polygons, but look like a box and "
                    f"{count} keypoints of {numbers} numbers; {POSE_HINT}, here "
                    f"kpt_shape: [{count}, {numbers}]"
                )
                collector.add("label-pose", text, **place)
                return
    if len(values) == len(rows) and usual == 8:
        text = f"all {len(rows):,} labels of {table.name} have four corners"
        collector.add("label-rotated", text, **place)


def _keypoints(values: Floats, numbers: int) -> bool:
    """Whether the values (n, k) are a box in the image, then points of `numbers` values in it."""
    centre, side = values[:, :2], values[:, 2:4]
    points = values[:, 4:].reshape(len(values), -1, numbers)
    if numbers == 3 and not np.isin(points[..., 2], (0, 1, 2)).all():
        return False
    places = points[..., :2]
    hidden = (places == 0).all(axis=2)
    reach = (side * (0.5 + BEYOND))[:, None]
    inside = (np.abs(places - centre[:, None]) <= reach).all(axis=2) | hidden
    box = (centre - side / 2 > -0.01) & (centre + side / 2 < 1.01) & (side > 0)
    shown = ~hidden.all(axis=1)
    fits = inside.all(axis=1) & box.all(axis=1)
    if shown.sum() < ENOUGH_ROWS or fits.mean() < MOST:
        return False
    return numbers == 3 or _is_no_polygon(centre[shown], side[shown], places[shown], hidden[shown])


def _is_no_polygon(centre: Floats, side: Floats, places: Floats, hidden: Bools) -> bool:
    """Whether the second point is often far from the others, or the first one amid the others.

    Points of a polygon are neither: the second one is near, the first one at the edge.
    """
    seen = np.where(hidden[..., None], np.nan, places)
    others = np.concatenate([centre[:, None], seen], axis=1)
    low, high = np.nanmin(others, axis=1), np.nanmax(others, axis=1)
    margin = (high - low).max(axis=1, keepdims=True)
    apart = ((side < low - margin) | (side > high + margin)).any(axis=1)
    if places.shape[1] < 3:
        return bool(apart.mean() >= (APART if places.shape[1] == 2 else MOST))
    low, high = np.nanmin(seen, axis=1), np.nanmax(seen, axis=1)
    edge = AMID * (high - low)
    amid = ((centre > low + edge) & (centre < high - edge)).all(axis=1)
    return bool((apart | amid).mean() >= HALF)
