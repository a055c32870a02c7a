"""The report as Markdown."""

from __future__ import annotations

import jinja2

from rfdetr.checks.codes import CODES
from rfdetr.checks.dataset_report import DatasetReport

LISTED = 20  # findings per code


def to_markdown(report: DatasetReport) -> str:
    """Verdict, table of codes, the first findings of each code, statistics and comparison."""
    environment = jinja2.Environment(  # noqa: S701 - markdown_text escapes every value
        loader=jinja2.PackageLoader("rfdetr.checks"),
        finalize=markdown_text,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    template = environment.get_template("report.md.j2")
    return template.render(report=report, codes=CODES, listed=LISTED)


def markdown_text(value: object) -> str:
    """Text that cannot break a table or become markup."""
    plain = " ".join(str(value).split()).replace("\\", "\\\\")
    for sign in "|<>`*_[]":
        plain = plain.replace(sign, f"\\{sign}" if sign not in "<>" else f"&#{ord(sign)};")
    return plain.encode("utf-8", "replace").decode("utf-8")
