"""The plot of a drift report: the histogram of every measure, reference against recent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rfdetr.files import atomic_path
from rfdetr.monitoring.drift import values_of
from rfdetr.monitoring.drift_report import DriftReport
from rfdetr.monitoring.image_profile import ImageProfile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS, BINS = 4, 20
QUIET, ALARM = "#4c78a8", "#e45756"


def draw_drift(
    reference: ImageProfile, recent: ImageProfile, report: DriftReport, path: Path
) -> None:
    """Write a PNG; the recent images are red where a measure alarms. Needs matplotlib."""
    from matplotlib.figure import Figure

    shown = [measure for measure in report.measures if measure.name != "embedding"]
    rows = -(-len(shown) // COLUMNS)
    figure = Figure(figsize=(2.4 * COLUMNS, 1.7 * rows), layout="constrained")
    grid = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axes, measure in zip(grid, shown, strict=False):
        _histogram(axes, measure.name, reference, recent, ALARM if measure.drifted else QUIET)
        axes.set_title(f"{measure.name} {measure.value:.2f}", fontsize=8)
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=80)


def _histogram(
    axes: Axes, name: str, reference: ImageProfile, recent: ImageProfile, colour: str
) -> None:
    values = [values_of(name, profile)[0] for profile in (reference, recent)]
    edges = np.histogram_bin_edges(np.concatenate(values), BINS)
    for part, shade, filled in zip(values, ("#999999", colour), (True, False), strict=True):
        if len(part):
            shares = np.histogram(part, edges)[0] / len(part)
            axes.stairs(shares, edges, fill=filled, color=shade)
    axes.tick_params(labelsize=6)
    axes.set_yticks([])
