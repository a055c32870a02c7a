"""Charts of the page: bars as HTML, maps of boxes as small pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from PIL import Image

from rfdetr.arrays import Integers
from rfdetr.checks.dataset_report import DatasetReport

MAX_ROWS = 100  # labels of a chart
OPEN_ROWS = 25  # further rows are folded
SHADE = (58, 122, 200)  # visible on white and on black


class Chart(NamedTuple):
    """Grouped horizontal bars: per label, the count and the length in percent for each series."""

    title: str
    series: list[str]
    rows: list[tuple[str, list[tuple[int, float]]]]
    left_out: int
    opened: int = OPEN_ROWS


class HeatMap(NamedTuple):
    """A picture of counts with a description and the ends of both axes."""

    url: str
    alt: str
    across: tuple[str, str, str]
    up: tuple[str, str, str]


def class_chart(report: DatasetReport) -> Chart:
    """Boxes per class, the most frequent first; bars show shares of the boxes of a split."""
    counts = {name: split.class_counts for name, split in report.statistics.items()}
    total: dict[str, int] = {}
    for found in counts.values():
        for label, count in found.items():
            total[label] = total.get(label, 0) + count
    order = sorted(total, key=lambda label: -total[label])
    ordered = {n: {label: found.get(label, 0) for label in order} for n, found in counts.items()}
    return bar_chart("Boxes per class, as shares of each split", ordered)


def distribution_charts(report: DatasetReport) -> list[Chart]:
    """Box sides at the model's resolution and boxes per image, as shares of each split."""
    splits = report.statistics
    size = f"Box side (square root of the area) in pixels at {report.resolution}"
    return [
        bar_chart(size, {n: s.box_side_histogram for n, s in splits.items()}),
        bar_chart("Boxes per image", {n: s.boxes_per_image for n, s in splits.items()}),
    ]


def bar_chart(title: str, series: Mapping[str, Mapping[str, int]]) -> Chart:
    """A chart of series name -> label -> count, with at most 100 labels.

    Lengths are shares of the sum of a series, so that series of different size compare.
    """
    labels = list(dict.fromkeys(label for values in series.values() for label in values))
    sums = [sum(values.values()) or 1 for values in series.values()]
    counts = {label: [values.get(label, 0) for values in series.values()] for label in labels}
    shares = {
        label: [count / total for count, total in zip(row, sums, strict=True)]
        for label, row in counts.items()
    }
    top = max((share for row in shares.values() for share in row), default=0) or 1
    lengths = {
        label: [round(100 * share / top, 1) for share in row] for label, row in shares.items()
    }
    rows = [
        (label, list(zip(counts[label], lengths[label], strict=True)))
        for label in labels[:MAX_ROWS]
    ]
    return Chart(title, list(series), rows, max(0, len(labels) - MAX_ROWS))


def heat_maps(report: DatasetReport) -> dict[str, tuple[HeatMap, HeatMap]]:
    """Box sizes and box positions of each split that has boxes."""
    found = {}
    side = str(report.resolution)
    for name, maps in report.samples.maps.items():
        if not maps.places.any():
            continue
        median = report.statistics[name].median_box_input or (0, 0)
        size = (
            f"Box widths and heights in {name} at {report.resolution} pixels; the median is "
            f"{median[0]:.0f} x {median[1]:.0f}"
        )
        place = f"Where the boxes of {name} lie in their images; {_centre(maps.places)}"
        found[name] = (
            HeatMap(_picture(maps.sizes[::-1]), size, ("1", "width", side), ("1", "height", side)),
            HeatMap(_picture(maps.places), place, ("left", "", "right"), ("bottom", "", "top")),
        )
    return found


def _centre(places: Integers) -> str:
    """The centre of mass of the covered cells, as text."""
    total = places.sum()
    x = (places.sum(axis=0) * (np.arange(places.shape[1]) + 0.5)).sum() / total
    y = (places.sum(axis=1) * (np.arange(places.shape[0]) + 0.5)).sum() / total
    across, down = x / places.shape[1], y / places.shape[0]
    return f"on average at {across:.0%} of the width and {down:.0%} of the height"


def _picture(counts: Integers) -> str:
    """A PNG with one pixel per cell, more opaque the higher the count."""
    share = np.sqrt(counts / max(1, int(counts.max())))
    pixels = np.empty((*counts.shape, 4), np.uint8)
    pixels[..., :3] = SHADE
    pixels[..., 3] = np.rint(255 * share)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
