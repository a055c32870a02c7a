"""Checks of segmentations: what training refuses, and polygons of odd extents."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rfdetr.arrays import Bools, Integers
from rfdetr.checks.codes import Severity
from rfdetr.checks.collector import Collector
from rfdetr.checks.polygons import rle_problem
from rfdetr.checks.table import PolygonExtents, SplitTable
from rfdetr.config import ModelConfig
from rfdetr.data.ledger import CROWD, TRAINED


def check_segmentations(
    table: SplitTable, accounts: Integers, collector: Collector, model: ModelConfig
) -> None:
    """Malformed segmentations, and polygons with fewer than 3 points or outside the image.

    `accounts` are those of the rows. A malformed segmentation that training does not read is a
    warning.
    """
    used = _used(table, accounts, model)
    bad = {row: f"segmentation {problem}" for row, problem in table.bad_segmentations}
    _report_malformed(table, collector, "polygon-malformed", bad, used)
    sizes = table.image_sizes()
    problems = ((row, rle_problem(mask, *sizes[row])) for row, mask in table.masks)
    bad = {row: f"segmentation {problem}" for row, problem in problems if problem}
    _report_malformed(table, collector, "rle-malformed", bad, used)
    if table.polygons is not None and len(table.polygons.owner):
        _check_polygons(table, table.polygons, collector, used)


def _used(table: SplitTable, accounts: Integers, model: ModelConfig) -> Bools:
    """Rows whose segmentation is made a mask: objects, and the crowd regions of the metric."""
    if not model.segmentation_head:
        return np.zeros(len(accounts), bool)
    used = (accounts == TRAINED) | ((accounts == CROWD) & (table.name != "train"))
    return np.asarray(used)


def _report_malformed(
    table: SplitTable, collector: Collector, code: str, bad: dict[int, str], used: Bools
) -> None:
    rows = np.array(list(bad), np.int64)
    levels: tuple[tuple[Severity | None, Bools], ...] = (
        (None, used[rows]),
        ("warning", ~used[rows]),
    )
    for severity, chosen in levels:
        collector.add_annotations(table, code, rows[chosen], bad.__getitem__, severity)


def _check_polygons(
    table: SplitTable, polygons: PolygonExtents, collector: Collector, used: Bools
) -> None:
    odd = polygons.numbers % 2 == 1
    short = (polygons.numbers < 6) & ~odd
    sizes = table.image_sizes()[polygons.owner]
    slack = collector.config.outside_tolerance
    beyond = (polygons.low < -slack) | (polygons.high > sizes + slack)
    outside = np.asarray(beyond.any(axis=1))
    rows, describe = _first_polygons(polygons, odd, "has an odd count of numbers")
    bad = {row: describe(row) for row in rows.tolist()}
    _report_malformed(table, collector, "polygon-malformed", bad, used)
    for code, chosen, what in (
        ("polygon-short", short, "has fewer than 3 points"),
        ("polygon-outside", outside, "extends beyond the image"),
    ):
        collector.add_annotations(table, code, *_first_polygons(polygons, chosen, what))


def _first_polygons(
    polygons: PolygonExtents, chosen: Bools, what: str
) -> tuple[Integers, Callable[[int], str]]:
    """The annotations with chosen polygons, and the message about the first one of each."""
    found = np.flatnonzero(chosen)
    owners, position = np.unique(polygons.owner[found], return_index=True)
    first = dict(zip(owners.tolist(), found[position].tolist(), strict=True))

    def message(row: int) -> str:
        (x0, y0), (x1, y1) = polygons.low[first[row]], polygons.high[first[row]]
        return f"polygon from ({x0:.6g}, {y0:.6g}) to ({x1:.6g}, {y1:.6g}) {what}"

    return owners, message
