"""The report as Markdown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from rfdetr.checks.codes import CODES
from rfdetr.checks.dataset_report import DatasetReport, Finding

SHOWN = 20


def to_markdown(report: DatasetReport) -> str:
    """Verdict, table of codes, the first findings of each code, statistics and comparison."""
    lines = [
        f"# Dataset report: {_cell(report.dataset)}",
        "",
        f"**{verdict(report)}** {report.errors} errors, {report.warnings} warnings, "
        f"{report.infos} notes. Layout `{report.layout}`, model `{report.variant}` at "
        f"{report.resolution} pixels.",
    ]
    if report.counts:
        rows = [
            [code, severity, str(count), CODES[code].title]
            for code, severity, count in code_rows(report)
        ]
        lines += ["", "## Findings", "", *_table(["Code", "Severity", "Count", "Meaning"], rows)]
    for code, findings in by_code(report.findings).items():
        lines += ["", f"### {code}", "", f"{CODES[code].title}. {CODES[code].fix}", ""]
        lines += [f"- {_cell(f.place())}: {_cell(f.message)}" for f in findings[:SHOWN]]
        more = report.counts.get(code, 0) - min(SHOWN, len(findings))
        if more > 0:
            lines.append(f"- and {more} more")
    lines += _statistics(report)
    lines += _comparison(report)
    return "\n".join(lines) + "\n"


def verdict(report: DatasetReport) -> str:
    """One sentence on whether training may start."""
    if report.errors:
        return "Not fit for training."
    return "Fit for training, look at the warnings." if report.warnings else "Fit for training."


def by_code(findings: Iterable[Finding]) -> dict[str, list[Finding]]:
    """Findings grouped by code, in their order."""
    groups: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        groups[finding.code].append(finding)
    return dict(groups)


def code_rows(report: DatasetReport) -> list[tuple[str, str, int]]:
    """(code, severity, count), in the order of the findings."""
    groups = by_code(report.findings)
    return [(c, found[0].severity, report.counts.get(c, 0)) for c, found in groups.items()]


def _statistics(report: DatasetReport) -> list[str]:
    if not report.statistics:
        return []
    header = ["Split", "Images", "Without boxes", "Boxes", "Boxes per image", "Under one patch"]
    rows = [
        [
            name,
            str(numbers.images),
            str(numbers.images_without_boxes),
            str(numbers.boxes),
            f"{numbers.boxes_per_image_mean:.2f}",
            str(numbers.boxes_below_patch),
        ]
        for name, numbers in report.statistics.items()
    ]
    splits = list(report.statistics)
    classes = [
        [name, *(str(report.statistics[split].class_counts.get(name, 0)) for split in splits)]
        for name in report.statistics[splits[0]].class_counts
    ]
    return [
        "",
        "## Statistics",
        "",
        *_table(header, rows),
        "",
        f"A patch is {report.patch_size} pixels at the model's resolution.",
        "",
        *_table(["Class", *splits], classes),
    ]


def _comparison(report: DatasetReport) -> list[str]:
    found = report.comparison
    if found is None:
        return []
    lines = [
        "",
        f"## Since {_cell(found.previous)}",
        "",
        f"{found.images_added} images added, {found.images_removed} removed, "
        f"{found.images_changed} changed, {found.annotations_changed} with other annotations.",
        "",
    ]
    shifts = [
        [name, f"{count:+d}", f"{found.class_share_shift.get(name, 0.0):+.2%}"]
        for name, count in found.class_count_shift.items()
        if count
    ]
    return lines + _table(["Class", "Boxes", "Share"], shifts) if shifts else lines


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]


def _cell(text: str) -> str:
    """Text that cannot break a table or become markup."""
    plain = " ".join(text.split()).replace("\\", "\\\\")
    for sign in "|<>`*_[]":
        plain = plain.replace(sign, f"\\{sign}" if sign not in "<>" else f"&#{ord(sign)};")
    return plain.encode("utf-8", "replace").decode("utf-8")
