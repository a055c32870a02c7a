"""The report as Markdown: a summary of the page, small enough for a server that shows it."""

from __future__ import annotations

import jinja2

from rfdetr.checks.charts import class_chart
from rfdetr.checks.codes import CODES
from rfdetr.checks.dataset_report import DatasetReport
from rfdetr.checks.html import ACTIONS, short

LISTED = 5  # findings per code
ROWS = 30  # of tables with a row per class


def to_markdown(report: DatasetReport) -> str:
    """Verdict, ledger, findings by what one does about them, statistics and comparison."""
    environment = jinja2.Environment(  # noqa: S701 - markdown_text escapes every value
        loader=jinja2.PackageLoader("rfdetr.checks"),
        finalize=markdown_text,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.md.j2").render(
        report=report,
        codes=CODES,
        actions=ACTIONS,
        classes=class_chart(report),
        listed=LISTED,
        max_rows=ROWS,
    )


def markdown_text(value: object) -> str:
    """Text that cannot break a table or become markup, with the middle of a long one left out."""
    plain = " ".join(short(value, 600).split()).replace("\\", "\\\\")
    for sign in "|<>`*_[]":
        plain = plain.replace(sign, f"\\{sign}" if sign not in "<>" else f"&#{ord(sign)};")
    return plain.encode("utf-8", "replace").decode("utf-8")
