"""The report as one HTML file without external resources."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

import jinja2

from rfdetr.checks.codes import CODES
from rfdetr.checks.dataset_report import DatasetReport
from rfdetr.checks.thumbnails import worst_findings
from rfdetr.files import write_text_atomic

LISTED = 100  # findings per code
MAX_ROWS = 60  # labels of a chart


class Chart(NamedTuple):
    """Grouped horizontal bars: per label, the count and the length in percent for each series."""

    title: str
    series: list[str]
    rows: list[tuple[str, list[tuple[int, float]]]]
    left_out: int


def write_html(
    report: DatasetReport, path: str | os.PathLike[str], dataset_dir: str | os.PathLike[str]
) -> None:
    """Write the report with charts, and thumbnails of images in `dataset_dir`, atomically."""
    text = to_html(report, dataset_dir)
    write_text_atomic(path, text.encode("utf-8", "replace").decode("utf-8"))


def to_html(report: DatasetReport, dataset_dir: str | os.PathLike[str]) -> str:
    """The report as one HTML document."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rfdetr.checks"),
        autoescape=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html.j2").render(
        report=report,
        codes=CODES,
        listed=LISTED,
        thumbnails=worst_findings(report, dataset_dir),
        charts=_charts(report),
    )


def _charts(report: DatasetReport) -> list[Chart]:
    splits = report.statistics
    size = f"Box side (square root of the area) in pixels at {report.resolution}"
    return [
        bar_chart("Boxes per class", {n: s.class_counts for n, s in splits.items()}),
        bar_chart(size, {n: s.box_side_histogram for n, s in splits.items()}),
        bar_chart("Boxes per image", {n: s.boxes_per_image for n, s in splits.items()}),
    ]


def bar_chart(title: str, series: Mapping[str, Mapping[str, int]]) -> Chart:
    """A chart of series name -> label -> count, with at most 60 labels."""
    labels = list(dict.fromkeys(label for values in series.values() for label in values))
    counts = {label: [values.get(label, 0) for values in series.values()] for label in labels}
    top = max((count for row in counts.values() for count in row), default=0) or 1
    rows = [
        (label, [(count, round(100 * count / top, 1)) for count in counts[label]])
        for label in labels[:MAX_ROWS]
    ]
    return Chart(title, list(series), rows, max(0, len(labels) - MAX_ROWS))
