"""Image sizes in an annotation file that differ from the image files.

Training places boxes in the pixels of the file. A difference is an error where the boxes may belong
to the other size, so that training would learn wrong boxes. It is a warning where the boxes show
that they follow the file, or where the difference is a rounding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from rfdetr.arrays import Floats, Integers
from rfdetr.checks.check_files import SplitFiles
from rfdetr.checks.codes import Severity
from rfdetr.checks.collector import Collector

SAME_SHAPE = 0.02  # relative change of the aspect ratio that a resize may cause
ROUNDING_PX, ROUNDING = 2.0, 0.005  # a difference up to either, in pixels or of the side
SLACK_PX = 1.0  # a box may reach this far beyond the image
MUCH_SMALLER = 0.75  # boxes of an image this much larger would not all fit the file ...
ENOUGH_BOXES = 16  # ... if there are as many


class _Difference(NamedTuple):
    """An image whose annotated size is not that of the file; both are (width, height).

    `beyond_given` and `beyond_file` count the boxes that do not fit in either.
    """

    files: SplitFiles
    row: int
    given: Floats
    actual: Floats
    boxes: int
    beyond_given: int
    beyond_file: int

    def way(self) -> Hashable:
        """How the sizes differ."""
        found = self.files.facts[self.row]
        turned = tuple(self.actual) == tuple(self.given[::-1])
        signs = np.sign(self.actual - self.given).tolist()
        return turned, *signs, None if found is None else found.facts.orientation


def check_sizes(splits: Sequence[SplitFiles], collector: Collector) -> None:
    """Report sizes that differ from the files, then use the sizes of the files.

    Images whose sizes differ in the same way are judged together: an export has one mistake.
    """
    groups: dict[Hashable, list[_Difference]] = defaultdict(list)
    for files in splits:
        for difference in _differences(files):
            groups[difference.way()].append(difference)
    for group in groups.values():
        follows = _follow_the_file(group)
        for difference in group:
            _report(difference, collector, follows=follows)


def _differences(files: SplitFiles) -> list[_Difference]:
    table = files.table
    unknown = (np.nan, np.nan)
    actual = np.array(
        [
            (found.facts.width, found.facts.height) if found and found.facts.width else unknown
            for found in files.facts
        ],
        np.float64,
    ).reshape(-1, 2)
    given = table.sizes
    known = np.asarray(np.isfinite(actual).all(axis=1))
    table.sizes = np.where(known[:, None], actual, given)
    rows = np.flatnonzero(known & np.isfinite(given).all(axis=1) & np.any(given != actual, axis=1))
    if not len(rows):
        return []
    ends: Floats = table.boxes[:, :2] + table.boxes[:, 2:].clip(0)
    chosen = np.isin(table.image_rows, rows) & np.isfinite(ends).all(axis=1)
    owner, ends = table.image_rows[chosen], ends[chosen]

    def count(owners: Integers) -> Integers:
        return np.bincount(owners, minlength=len(table.file_names))

    beyond = [
        count(owner[np.any(ends > limits[owner] + SLACK_PX, axis=1)]) for limits in (given, actual)
    ]
    boxes = count(owner)
    return [
        _Difference(
            files, row, given[row], actual[row], int(boxes[row]), *(int(b[row]) for b in beyond)
        )
        for row in rows.tolist()
    ]


def _follow_the_file(group: Sequence[_Difference]) -> bool:
    """Whether the boxes must belong to the size of the file."""
    if any(difference.beyond_file for difference in group):
        return False
    if any(difference.beyond_given for difference in group):
        return True
    smaller = all((d.actual <= MUCH_SMALLER * d.given).any() for d in group)
    return smaller and sum(difference.boxes for difference in group) >= ENOUGH_BOXES


def _report(difference: _Difference, collector: Collector, *, follows: bool) -> None:
    given, (width, height) = difference.given, difference.actual.tolist()
    severity, reason, repair = _verdict(difference, follows=follows)
    text = (
        f"annotated as {given[0]:.0f} x {given[1]:.0f}, the file has {width:.0f} x {height:.0f} "
        f"pixels: {reason}"
    )
    if tuple(given) == (height, width):
        text += " (width and height are swapped: a rotated export?)"
    place = difference.files.table.file_place(difference.row)
    place["details"] |= {"width": int(width), "height": int(height)}
    collector.add("image-size-mismatch", text, severity=severity, repair=repair, **place)


def _verdict(difference: _Difference, *, follows: bool) -> tuple[Severity, str, str]:
    """Severity, reason and repair."""
    given, actual = difference.given, difference.actual
    if not difference.boxes:
        return "info", "the image has no box", "set-size"
    if (np.abs(actual - given) <= np.maximum(ROUNDING_PX, ROUNDING * given)).all():
        return "warning", "training uses the size of the file", "set-size"
    if follows:
        return "warning", "the boxes fit the file, as training uses them", "set-size"
    ratio = given[0] * actual[1] / (given[1] * actual[0])
    reason = "the boxes may belong to the annotated size; training uses them as pixels of the file"
    return "error", reason, "rescale" if abs(ratio - 1) < SAME_SHAPE else ""
