"""The report as one HTML file that needs nothing from the network."""

from __future__ import annotations

import os
from collections.abc import Iterable
from html import escape
from pathlib import Path

from rfdetr.checks.charts import bar_chart
from rfdetr.checks.codes import CODES
from rfdetr.checks.dataset_report import DatasetReport, Finding, SplitStatistics
from rfdetr.checks.markdown import by_code, code_rows, verdict
from rfdetr.checks.thumbnails import worst_pictures
from rfdetr.files import write_text_atomic

LISTED = 100
STYLE = """
body{font:15px/1.45 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222}
h1{margin-bottom:.2em}table{border-collapse:collapse;margin:.6em 0}
td,th{border:1px solid #ddd;padding:.25em .6em;text-align:left;vertical-align:top}
th{background:#f4f4f4}td.n{text-align:right}summary{cursor:pointer;padding:.2em 0}
.error{color:#b3261e;font-weight:600}.warning{color:#9a6700;font-weight:600}.info{color:#4a5a6a}
.verdict{font-size:1.15em;padding:.5em .8em;border-left:6px solid #4f9d69;background:#f2f8f4}
.verdict.bad{border-color:#b3261e;background:#fbf1f0}
.pictures{display:flex;flex-wrap:wrap;gap:14px}figure{margin:0;width:256px}
figcaption{font-size:12px;overflow-wrap:anywhere}img{max-width:256px}
svg text{font:12px system-ui,sans-serif;fill:#222}svg .title{font-weight:600;font-size:13px}
"""


def write_html(
    report: DatasetReport, path: str | os.PathLike[str], dataset_dir: str | os.PathLike[str]
) -> None:
    """Write the report with charts, and thumbnails of images in `dataset_dir`, in one step."""
    text = to_html(report, dataset_dir)
    write_text_atomic(path, text.encode("utf-8", "replace").decode("utf-8"))


def to_html(report: DatasetReport, dataset_dir: str | os.PathLike[str]) -> str:
    """The report as one HTML document."""
    bad = " bad" if report.errors else ""
    name = escape(report.dataset)
    parts = [
        f"<h1>Dataset report: {name}</h1>",
        f'<p class="verdict{bad}">{verdict(report)} {report.errors} errors, {report.warnings} '
        f"warnings, {report.infos} notes.</p>",
        f"<p>Layout {report.layout}, {len(report.class_names)} classes, model "
        f"{escape(report.variant)} at {report.resolution} pixels.</p>",
        _pictures(report, Path(dataset_dir)),
        _findings(report),
        _statistics(report),
        _comparison(report),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>Dataset report: {name}</title><style>{STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _pictures(report: DatasetReport, folder: Path) -> str:
    figures = [
        f'<figure><img src="{picture.url}" alt=""><figcaption><span '
        f'class="{picture.finding.severity}">{picture.finding.code}</span> '
        f"{escape(picture.finding.message)}</figcaption></figure>"
        for picture in worst_pictures(report, folder)
    ]
    return (
        f'<h2>Worst findings</h2><div class="pictures">{"".join(figures)}</div>' if figures else ""
    )


def _findings(report: DatasetReport) -> str:
    if not report.findings:
        return "<h2>Findings</h2><p>None.</p>"
    groups = by_code(report.findings)
    parts = ["<h2>Findings</h2>"]
    for code, severity, count in code_rows(report):
        info = CODES[code]
        parts.append(
            f'<details><summary><span class="{severity}">{severity}</span> <b>{code}</b> '
            f"({count:,}): {escape(info.title)}</summary><p>{escape(info.fix)}</p>"
            f"{_listing(groups[code], count)}</details>"
        )
    return "".join(parts)


def _listing(findings: list[Finding], count: int) -> str:
    rows = [[escape(f.place()), escape(f.message)] for f in findings[:LISTED]]
    more = count - len(rows)
    note = f"<p>and {more:,} more, see report.json</p>" if more > 0 else ""
    return _table(["Place", "What was found"], rows) + note


def _statistics(report: DatasetReport) -> str:
    splits = report.statistics
    if not splits:
        return ""
    rows = [[escape(name), *_numbers(numbers)] for name, numbers in splits.items()]
    header = [
        "Split",
        "Images",
        "Without boxes",
        "Boxes",
        "Crowd",
        "Per image",
        "Most",
        "Imbalance",
    ]
    header += ["Under one patch", "Colour mean"]
    charts = (
        bar_chart("Boxes per class", {n: s.class_counts for n, s in splits.items()}),
        bar_chart(
            f"Box side (square root of the area) in pixels at {report.resolution}; "
            f"a patch is {report.patch_size}",
            {n: s.box_side_histogram for n, s in splits.items()},
        ),
        bar_chart("Boxes per image", {n: s.boxes_per_image for n, s in splits.items()}),
    )
    return "<h2>Statistics</h2>" + _table(header, rows) + "".join(f"<p>{c}</p>" for c in charts)


def _numbers(numbers: SplitStatistics) -> list[str]:
    mean = numbers.colour_mean
    colour = "" if mean is None else "rgb({:.0f}, {:.0f}, {:.0f})".format(*mean)
    swatch = f'<span style="background:{colour};padding:0 .6em"></span> {colour}' if mean else ""
    share = numbers.boxes_below_patch / numbers.boxes if numbers.boxes else 0.0
    return [
        f"{numbers.images:,}",
        f"{numbers.images_without_boxes:,}",
        f"{numbers.boxes:,}",
        f"{numbers.crowd_regions:,}",
        f"{numbers.boxes_per_image_mean:.2f}",
        f"{numbers.boxes_per_image_max:,}",
        "" if numbers.imbalance is None else f"{numbers.imbalance:.1f} : 1",
        f"{numbers.boxes_below_patch:,} ({share:.1%})",
        swatch,
    ]


def _comparison(report: DatasetReport) -> str:
    found = report.comparison
    if found is None:
        return ""
    shifts = [
        [escape(name), f"{count:+d}", f"{found.class_share_shift.get(name, 0.0):+.2%}"]
        for name, count in found.class_count_shift.items()
        if count
    ]
    table = _table(["Class", "Boxes", "Share"], shifts) if shifts else ""
    examples = "".join(
        f"<details><summary>{name}</summary><p>{escape(', '.join(files))}</p></details>"
        for name, files in found.examples.items()
    )
    return (
        f"<h2>Since {escape(found.previous)}</h2><p>{found.images_added} images added, "
        f"{found.images_removed} removed, {found.images_changed} changed, "
        f"{found.annotations_changed} with other annotations.</p>{table}{examples}"
    )


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
