"""The validate stage: every problem of the dataset, before a GPU is used."""

from __future__ import annotations

import sys
from pathlib import Path

from flows.config.environment import Environment
from flows.config.params import Params
from flows.stages.runner import run_stage
from flows.storage.packs import open_dataset
from rfdetr.checks import CheckConfig, DatasetReport, check_dataset
from rfdetr.errors import DatasetError
from rfdetr.files import write_text_atomic

SECTIONS = ["dataset", "model", "validate"]
REPORT = Path("reports/validation.json")
SHOWN = 10
UNREADABLE = {
    "file-case",
    "file-bomb",
    "file-empty",
    "file-missing",
    "file-name-invalid",
    "file-truncated",
    "file-unreadable",
}


def validate(params: Params) -> None:
    """Check the dataset and write the report as JSON, Markdown and HTML, also when it fails.

    Raises DatasetError with the first findings when training must not start.
    """
    from rfdetr.checks.html import write_html
    from rfdetr.checks.markdown import to_markdown

    env = Environment.read()
    config = CheckConfig(**params.validate.model_dump(include=set(CheckConfig.model_fields)))
    data = open_dataset(params.dataset.dir, env.state_dir)
    report = check_dataset(
        data,
        params.dataset.layout,
        config=config,
        model_config=params.model.config(),
        previous=_previous(),
        cache_dir=env.state_dir / "checks",
        progress=sys.stderr.isatty(),
    )
    report.write(REPORT)
    write_text_atomic(REPORT.with_suffix(".md"), to_markdown(report))
    write_html(report, REPORT.with_suffix(".html"), data)
    problems = reasons_to_stop(report, params)
    images = sum(split.images for split in report.statistics.values())
    print(
        f"{params.dataset.name}: {images} images, {len(report.class_names)} classes, "
        f"{report.errors} errors, {report.warnings} warnings; see {REPORT.with_suffix('.html')}",
        flush=True,
    )
    if problems:
        raise DatasetError(_text(report, problems))


def _previous() -> Path | None:
    """The last report, unless it is cut off or of another version."""
    try:
        DatasetReport.read(REPORT)
    except DatasetError:
        return None
    return REPORT


def reasons_to_stop(report: DatasetReport, params: Params) -> list[str]:
    """Why training must not start with this dataset; empty when it may."""
    settings, problems = params.validate, []
    train = report.statistics.get("train")
    found = train.images if train else 0
    if found < settings.min_images:
        problems.append(
            f"the train split has {found} images, validate.min_images is {settings.min_images}"
        )
    errors = [finding for finding in report.findings if finding.severity == "error"]
    total = max(1, sum(split.images for split in report.statistics.values()))
    bad = len({(finding.split, finding.file) for finding in errors if finding.image_id is not None})
    bad = min(total, bad + report.errors - len(errors))  # those that are counted but not listed
    elsewhere = any(finding.image_id is None for finding in errors)
    unreadable = sorted({finding.code for finding in errors} & UNREADABLE)
    if unreadable:
        problems.append(
            f"training cannot skip images that it cannot read ({', '.join(unreadable)}), whatever "
            "validate.max_bad_fraction is: "
            f"`python -m rfdetr.checks {params.dataset.dir} --fix COPY` writes a dataset "
            "without them"
        )
    if not report.ok and (elsewhere or bad / total > settings.max_bad_fraction):
        problems.append(
            f"{report.errors} errors in {bad} of {total} images, validate.max_bad_fraction is "
            f"{settings.max_bad_fraction:g}"
        )
    return problems


def _text(report: DatasetReport, problems: list[str]) -> str:
    lines = [f"the dataset {report.dataset} is not fit for training: {'; '.join(problems)}."]
    errors = [finding for finding in report.findings if finding.severity == "error"]
    for finding in errors[:SHOWN]:
        place = ", ".join(
            f"{name} {value}"
            for name, value in (
                ("file", finding.file),
                ("line", finding.line),
                ("image", finding.image_id),
                ("annotation", finding.annotation_id),
            )
            if value is not None
        )
        lines.append(f"- {finding.code} ({place}): {finding.message} {finding.advice}")
    if report.errors > SHOWN:
        lines.append(f"- and {report.errors - SHOWN} more in {REPORT.with_suffix('.html')}")
    return "\n".join(lines)


def require_valid(params: Params) -> None:
    """Raise DatasetError unless the stage has passed the dataset."""
    problems = reasons_to_stop(DatasetReport.read(REPORT), params)
    if problems:
        raise DatasetError(f"{REPORT} forbids training: {'; '.join(problems)}.")


if __name__ == "__main__":
    raise SystemExit(run_stage("validate", SECTIONS, validate, sys.argv[1:]))
