"""The report as one HTML file without external resources.

The parts that grow with the dataset are limited, so that the page stays below 5 MB: pictures in
number and bytes (pictures.py), listed findings, classes and the length of names here.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from rfdetr.checks.charts import class_chart, distribution_charts, heat_maps
from rfdetr.checks.codes import CODES
from rfdetr.checks.dataset_report import DatasetReport
from rfdetr.checks.drawing import colour
from rfdetr.checks.pictures import (
    finding_pictures,
    object_pictures,
    sample_pictures,
    twin_pictures,
)
from rfdetr.checks.sampling import OBJECTS
from rfdetr.data.ledger import is_lost
from rfdetr.files import write_text_atomic

LISTED = 30  # findings per code
ROWS = 100  # of tables with a row per class
TEXT = 160  # characters of a message
ACTIONS = {
    "fix": ("Fix before training", "Correct these at their source, then export again."),
    "repair": (
        "Run --fix",
        "`python -m rfdetr.checks DATASET --fix COPY` corrects these, or leaves out what cannot be "
        "used, in a copy. The dataset itself is not changed.",
    ),
    "decide": ("Decide yourself", "These may be intended. Look at them once."),
    "info": ("For information", "Nothing to do."),
}


def write_html(
    report: DatasetReport, path: str | os.PathLike[str], dataset_dir: str | os.PathLike[str]
) -> None:
    """Write the report with charts, and pictures of images in `dataset_dir`, atomically.

    A page that the same code has written for the same report and images stays as it is.
    """
    mark = f"<!-- {_state(report)} -->\n"
    if report.images_checked and _ends_with(Path(path), mark.encode()):
        return
    text = to_html(report, dataset_dir)
    write_text_atomic(path, text.encode("utf-8", "replace").decode("utf-8") + mark)


def _state(report: DatasetReport) -> str:
    """A hash of what the page depends on; the report has the content hashes of the images."""
    shown = report.samples
    found = hashlib.sha256(report.to_json().encode())
    found.update(repr((shown.images, shown.objects, shown.levels)).encode("utf-8", "replace"))
    here = Path(__file__).parent
    for file in sorted((*here.glob("*.py"), *here.glob("templates/*"))):
        found.update(file.read_bytes())
    return found.hexdigest()


def _ends_with(path: Path, mark: bytes) -> bool:
    try:
        with path.open("rb") as stream:
            stream.seek(-len(mark), os.SEEK_END)
            return stream.read() == mark
    except OSError:  # missing, or shorter than the mark
        return False


def to_html(report: DatasetReport, dataset_dir: str | os.PathLike[str]) -> str:
    """The report as one HTML document."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rfdetr.checks"),
        autoescape=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["short"] = short
    environment.filters["code"] = code
    environment.filters["number"] = "{:,}".format
    samples = report.samples
    return environment.get_template("report.html.j2").render(
        report=report,
        codes=CODES,
        actions=ACTIONS,
        listed=LISTED,
        max_rows=ROWS,
        most_objects=OBJECTS,
        is_lost=is_lost,
        colour=colour,
        samples={
            name: sample_pictures(images, samples.levels) for name, images in samples.images.items()
        },
        objects=object_pictures(samples.objects, samples.levels),
        pictures=finding_pictures(report, dataset_dir),
        twins=twin_pictures(report, dataset_dir),
        heat_maps=heat_maps(report),
        classes=class_chart(report),
        charts=distribution_charts(report),
    )


def code(text: str) -> Markup:
    """Escaped text, with what is in backquotes as code."""
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text)))
    return Markup(marked)  # noqa: S704 - escaped above


def short(text: object, length: int = TEXT) -> str:
    """A text with the middle left out if it is longer than `length`."""
    full = str(text)
    half = length // 2
    return full if len(full) <= length else f"{full[: half - 1]} … {full[2 - half :]}"
