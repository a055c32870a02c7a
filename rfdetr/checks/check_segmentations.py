"""Checks of polygon extents."""

from __future__ import annotations

import numpy as np

from rfdetr.checks.dataset_report import Collector
from rfdetr.checks.options import CheckConfig
from rfdetr.checks.table import Flags, SplitTable


def check_polygons(table: SplitTable, collector: Collector, config: CheckConfig) -> None:
    """Rings with odd counts, with fewer than 3 points, or outside the image."""
    polygons = table.polygons
    if polygons is None or not len(polygons.owner):
        return
    odd = polygons.numbers % 2 == 1
    short = ~odd & (polygons.numbers < 6)
    _note(table, collector, "polygon-malformed", np.asarray(odd), "has an odd count of numbers")
    _note(table, collector, "polygon-short", np.asarray(short), "has fewer than 3 points")
    sizes = np.vstack([table.sizes, [np.nan, np.nan]])[table.image_rows[polygons.owner]]
    slack = config.outside_tolerance
    outside = ((polygons.low < -slack) | (polygons.high > sizes + slack)).any(axis=1)
    _note(table, collector, "polygon-outside", np.asarray(outside), "leaves the image")


def _note(table: SplitTable, collector: Collector, code: str, rings: Flags, what: str) -> None:
    if table.polygons is None:
        return
    found = np.flatnonzero(rings)
    owners, first = np.unique(table.polygons.owner[found], return_index=True)
    listed: list[int] = collector.take(code, owners).tolist()
    for row, ring, place in zip(
        listed, found[first], table.annotation_places(listed), strict=False
    ):
        low, high = table.polygons.low[ring], table.polygons.high[ring]
        text = (
            f"polygon from ({low[0]:.6g}, {low[1]:.6g}) to ({high[0]:.6g}, {high[1]:.6g}) {what} "
            f"({table.image_name(row)})"
        )
        collector.note(code, text, details=table.annotation_details(row), **place)
