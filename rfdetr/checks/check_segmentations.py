"""Checks of polygon extents."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rfdetr.arrays import Integers
from rfdetr.checks.collector import Collector
from rfdetr.checks.options import CheckConfig
from rfdetr.checks.table import PolygonExtents, SplitTable


def check_polygons(table: SplitTable, collector: Collector, config: CheckConfig) -> None:
    """Polygons with an odd count of numbers, with fewer than 3 points, or outside the image."""
    polygons = table.polygons
    if polygons is None or not len(polygons.owner):
        return
    odd = polygons.numbers % 2 == 1
    short = ~odd & (polygons.numbers < 6)
    sizes = table.image_sizes()[polygons.owner]
    slack = config.outside_tolerance
    outside = ((polygons.low < -slack) | (polygons.high > sizes + slack)).any(axis=1)
    for code, chosen, what in (
        ("polygon-malformed", odd, "has an odd count of numbers"),
        ("polygon-short", short, "has fewer than 3 points"),
        ("polygon-outside", outside, "extends beyond the image"),
    ):
        found = np.flatnonzero(chosen)
        owners, position = np.unique(polygons.owner[found], return_index=True)
        collector.add_annotations(table, code, owners, _describe(polygons, found[position], what))


def _describe(polygons: PolygonExtents, chosen: Integers, what: str) -> Callable[[int], str]:
    """The message of an annotation about the first of its chosen polygons."""
    first = dict(zip(polygons.owner[chosen].tolist(), chosen.tolist(), strict=True))

    def message(row: int) -> str:
        (x0, y0), (x1, y1) = polygons.low[first[row]], polygons.high[first[row]]
        return f"polygon from ({x0:.6g}, {y0:.6g}) to ({x1:.6g}, {y1:.6g}) {what}"

    return message
