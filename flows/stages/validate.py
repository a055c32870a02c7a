"""The stage `validate`: finds every problem of the dataset before training starts."""

from __future__ import annotations

import sys
from pathlib import Path

from flows.config.params import Params
from flows.gate.slice_images import add_findings
from flows.project.project import Project
from flows.stages.runner import run_stage
from flows.storage.packs import open_dataset
from rfdetr.checks import CheckConfig, DatasetReport, check_dataset
from rfdetr.errors import DatasetError
from rfdetr.files import write_text_atomic

SECTIONS = ["dataset", "model", "validate", "slices"]
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


def validate(project: Project) -> None:
    """Check the dataset and write the report as JSON, Markdown and HTML, even if it fails.

    Raises DatasetError with the first findings if training must not start.
    """
    from rfdetr.checks.html import write_html
    from rfdetr.checks.markdown import to_markdown

    params, env, file = project.params, project.env, project.validation
    config = CheckConfig(**params.validate.model_dump(include=set(CheckConfig.model_fields)))
    data = open_dataset(project.dataset_dir, env.state_dir)
    report = check_dataset(
        data,
        params.dataset.layout,
        config=config,
        model_config=params.model.config(),
        previous=_previous(file),
        cache_dir=env.state_dir / "checks",
        progress=sys.stderr.isatty(),
    )
    report = add_findings(report, data, params.dataset, project.slices)
    report.write(file)
    write_text_atomic(file.with_suffix(".md"), to_markdown(report))
    write_html(report, file.with_suffix(".html"), data)
    problems = reasons_to_stop(report, params)
    images = sum(split.images for split in report.statistics.values())
    classes = len(report.class_names)
    print(
        f"{params.dataset.name}: {images} images, {classes} class{'' if classes == 1 else 'es'}, "
        f"{report.errors} errors, {report.warnings} warnings; see {file.with_suffix('.html')}",
        flush=True,
    )
    if problems:
        raise DatasetError(_text(report, problems, file))


def _previous(file: Path) -> Path | None:
    """The last report, unless it is damaged or of another version."""
    try:
        DatasetReport.read(file)
    except DatasetError:
        return None
    return file


def reasons_to_stop(report: DatasetReport, params: Params) -> list[str]:
    """Why training must not start with this dataset; empty if it may."""
    settings, problems = params.validate, []
    train = report.statistics.get("train")
    found = train.images if train else 0
    if found < settings.min_images:
        problems.append(
            f"the train split has {found} images, validate.min_images is {settings.min_images}"
        )
    errors = [finding for finding in report.findings if finding.severity == "error"]
    total = max(1, sum(split.images for split in report.statistics.values()))
    listed = {(finding.split, finding.file) for finding in errors if finding.image_id is not None}
    not_listed = report.errors - len(errors)  # a report lists only the first findings of a kind
    bad = min(total, len(listed) + not_listed)  # at worst, each is in another image
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


def _text(report: DatasetReport, problems: list[str], file: Path) -> str:
    lines = [f"the dataset {report.dataset} cannot be used for training: {'; '.join(problems)}."]
    errors = [finding for finding in report.findings if finding.severity == "error"]
    for finding in errors[:SHOWN]:
        lines.append(f"- {finding.code} ({finding.place()}): {finding.message} {finding.advice}")
    if report.errors > SHOWN:
        lines.append(f"- and {report.errors - SHOWN} more in {file.with_suffix('.html')}")
    return "\n".join(lines)


def require_valid(project: Project) -> None:
    """Raise DatasetError unless the dataset passed the stage `validate`."""
    problems = reasons_to_stop(DatasetReport.read(project.validation), project.params)
    if problems:
        raise DatasetError(f"{project.validation} forbids training: {'; '.join(problems)}.")


if __name__ == "__main__":
    raise SystemExit(run_stage("validate", SECTIONS, validate, sys.argv[1:]))
