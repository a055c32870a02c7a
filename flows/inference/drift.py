"""Compares recent images with the image profile of a registered model, and records the result.

Internal: the flow `drift-check` runs `python -m flows.inference.drift` as a child process.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from flows.core.child_report import report_failure, report_start
from flows.core.garbage import exit_quickly
from flows.core.process import die_with_parent
from flows.core.redact import redact
from flows.core.stopping import exit_on_sigterm
from flows.inference.images import UNUSABLE, SourceImage, fetch_image, list_images, newest
from flows.inference.predict import find_version, load_detector
from flows.project.project import Project
from flows.registry.image_profile import PROFILE
from flows.registry.registry import Registry, Version, now
from flows.storage.s3 import is_s3, make_client, on_threads
from rfdetr.errors import CheckpointError
from rfdetr.files import write_text_atomic
from rfdetr.monitoring.drift_report import DriftReport

REPORT, TEXT, PLOT = (Path(f"reports/drift.{kind}") for kind in ("json", "md", "png"))


class DriftParams(BaseModel):
    """Options of a drift check."""

    model_config = ConfigDict(extra="forbid")

    hours: float | None = Field(default=None, gt=0, description="Only images newer than this")
    limit: int = Field(default=512, ge=1, description="At most this many images, the newest first")
    min_images: int = Field(default=30, ge=1, description="Skip the check with fewer images")
    thresholds: dict[str, float | None] = Field(
        default_factory=dict, description="Measure -> value that raises an alarm; null for never"
    )
    model: str | None = Field(default=None, description="Alias or version (default: champion)")
    device: Literal["auto", "cpu", "cuda"] = "auto"


class DriftCheck(BaseModel, frozen=True):
    """One check, as stored in `reports/drift.json`. Without a report, `skipped` is the reason."""

    model: str
    version: int
    source: str
    at: str
    skipped: str | None = None
    report: DriftReport | None = None

    @property
    def drifted(self) -> bool:
        """Whether a measure exceeds its threshold."""
        return self.report is not None and self.report.drifted

    def summary(self) -> dict[str, Any]:
        """The result as small plain data, for events and notifications."""
        assert self.report is not None
        return {
            "model": self.model,
            "version": self.version,
            "source": self.source,
            "drifted": self.drifted,
            "alarms": self.report.alarms,
            "recent_images": self.report.recent_images,
            "values": {measure.name: measure.value for measure in self.report.measures},
        }

    def to_markdown(self) -> str:
        """The report with a heading."""
        body = self.skipped if self.report is None else self.report.to_markdown()
        return (
            f"# Drift of {self.model} version {self.version}\n\n{self.source}, {self.at}\n\n{body}"
        )


def check_drift(
    project: Project, sources: Sequence[str], params: DriftParams | None = None
) -> DriftCheck:
    """Compare the newest images of `sources` with the model's image profile.

    Writes reports/drift.json, drift.md and drift.png, and records the numbers on the version and
    on an MLflow run of its drift checks. Raises ConfigError without a champion, CheckpointError if
    the version has no profile, and DatasetError if a source does not exist or contains no images.
    """
    params = params or DriftParams()
    root = project.root
    registry = Registry(project.params.registry.name, project.tracking_uri)
    version = find_version(registry, params.model)
    images = recent_images(sources, params)
    if len(images) < params.min_images:
        recent = f" in the last {params.hours:g} hours" if params.hours else ""
        report, skipped = None, f"{len(images)} images{recent}; {params.min_images} required"
    else:
        report, skipped = _measure(root, registry, version, images, params), None
    check = DriftCheck(
        model=registry.name,
        version=version.number,
        source=redact(", ".join(sources)),
        at=now(),
        skipped=skipped,
        report=report,
    )
    write_text_atomic(root / REPORT, check.model_dump_json(indent=2))
    write_text_atomic(root / TEXT, check.to_markdown())
    if check.report is not None:
        _record(project, registry, version, check)
    return check


def recent_images(sources: Sequence[str], params: DriftParams) -> list[SourceImage]:
    """The images to compare, newest first. Raises DatasetError if there are none at all."""
    return newest(list_images(sources), hours=params.hours, limit=params.limit)


def _measure(
    root: Path,
    registry: Registry,
    version: Version,
    images: Sequence[SourceImage],
    params: DriftParams,
) -> DriftReport:
    from rfdetr.monitoring.drift import compare
    from rfdetr.monitoring.drift_plot import draw_drift
    from rfdetr.monitoring.image_profile import ImageProfile
    from rfdetr.monitoring.profiling import profile_images

    with tempfile.TemporaryDirectory(prefix="rfdetr-drift-") as temporary:
        artifacts = registry.fetch(version, Path(temporary)) / "artifacts"
        if not (artifacts / PROFILE).exists():
            raise CheckpointError(
                f"{registry.name} version {version.number} was registered without an image "
                "profile. Retrain and promote a new version, then check again."
            )
        reference = ImageProfile.load(artifacts / PROFILE)
        detector = load_detector(artifacts, device=params.device)
        files = fetch_images(images, Path(temporary) / "images")
        recent = profile_images(
            detector,
            files,
            limit=params.limit,
            threshold=reference.threshold,
            point=reference.point,
        )
    report = compare(reference, recent, params.thresholds)
    draw_drift(reference, recent, report, root / PLOT)
    return report


def fetch_images(images: Sequence[SourceImage], folder: Path) -> list[Path]:
    """The paths of the images, downloaded to `folder` if they are on S3; vanished ones are skipped.

    Raises StorageError.
    """
    client = make_client() if any(is_s3(image.address) for image in images) else None
    files: dict[int, Path] = {}

    def fetch(item: tuple[int, SourceImage]) -> None:
        number, image = item
        target = folder / f"{number}{Path(image.name).suffix}"
        try:
            files[number] = fetch_image(image, target, client)
        except UNUSABLE as error:
            print(f"skipped: {redact(str(error))}", file=sys.stderr)

    on_threads(fetch, enumerate(images))
    return [files[number] for number in sorted(files)]


def _record(project: Project, registry: Registry, version: Version, check: DriftCheck) -> None:
    """Record the outcome on the version, and numbers and reports on the run of its drift checks.

    The run of the training stays as it is. The reports of checks with drift are kept;
    `drift/latest` is replaced by every check.
    """
    assert check.report is not None
    alarms = ", ".join(check.report.alarms) or "none"
    registry.set_tags(version.number, {"drift.alarms": alarms, "drift.at": check.at})
    run_id = registry.run_of_checks(f"rfdetr/{project.params.dataset.name}", version)
    values = {f"drift/{measure.name}": measure.value for measure in check.report.measures}
    registry.append_metrics(run_id, values)
    folders = ["drift/latest"] + ([f"drift/{check.at[:19]}"] if check.drifted else [])
    for folder in folders:
        for file in (REPORT, TEXT, PLOT):
            registry.log_artifact(run_id, project.root / file, folder.replace(":", ""))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the child process."""
    parser = argparse.ArgumentParser(prog="python -m flows.inference.drift", description=__doc__)
    parser.add_argument("sources", nargs="+", help="folders or s3:// prefixes of recent images")
    parser.add_argument("--params", default="{}", help="fields of DriftParams as JSON")
    options = parser.parse_args(arguments)
    die_with_parent()
    exit_on_sigterm()
    exit_quickly()
    report_start()
    try:
        params = DriftParams.model_validate_json(options.params)
        check = check_drift(Project(Path.cwd()), options.sources, params)
    except Exception as error:  # noqa: BLE001 - reported as the last line
        report_failure("drift check failed", error)
        return 1
    print(check.skipped or ", ".join(check.report.alarms if check.report else ()) or "no drift")
    return 0


if __name__ == "__main__":
    sys.exit(main())
