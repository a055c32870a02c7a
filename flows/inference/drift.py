"""Are recent images still what the champion was validated on? Measures, reports, records.

`python -m flows.inference.drift` runs as a child of the flow `drift-check`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from flows.core.errors import explain
from flows.core.process import die_with_parent, exit_on_sigterm
from flows.core.redact import redact
from flows.inference.images import Picture, fetch_picture, list_pictures, newest
from flows.inference.predict import find_version, load_detector
from flows.project.project import Project
from flows.registry.image_profile import PROFILE
from flows.registry.registry import Registry, Version, now
from flows.storage.s3 import is_s3, make_client, on_threads
from rfdetr.errors import CheckpointError
from rfdetr.files import write_text_atomic
from rfdetr.monitoring.drift_report import DriftReport

REPORT, TEXT, PICTURE = (Path(f"reports/drift.{kind}") for kind in ("json", "md", "png"))


class DriftParams(BaseModel):
    """What a person may choose about a check."""

    model_config = ConfigDict(extra="forbid")

    hours: float | None = Field(default=None, gt=0, description="Only images newer than this")
    limit: int = Field(default=512, ge=1, description="The newest images, at most so many")
    min_images: int = Field(default=30, ge=1, description="Fewer are not judged")
    thresholds: dict[str, float | None] = Field(
        default_factory=dict, description="Measure -> value from which it alarms; null for never"
    )
    model: str | None = Field(default=None, description="Alias or version (default: champion)")
    device: Literal["auto", "cpu", "cuda"] = "auto"


class DriftCheck(BaseModel, frozen=True):
    """`reports/drift.json`: one check. Without a report, `skipped` says why."""

    model: str
    version: int
    source: str
    at: str
    skipped: str | None = None
    report: DriftReport | None = None

    @property
    def drifted(self) -> bool:
        """Whether a measure is past its threshold."""
        return self.report is not None and self.report.drifted

    def to_markdown(self) -> str:
        """The report with what it is about."""
        body = self.skipped if self.report is None else self.report.to_markdown()
        return (
            f"# Drift of {self.model} version {self.version}\n\n{self.source}, {self.at}\n\n{body}"
        )


def check_drift(project: Project, source: str, params: DriftParams | None = None) -> DriftCheck:
    """Compare the newest images of `source` with the model's stored profile.

    Writes reports/drift.json, drift.md and drift.png, and records the numbers on the model's MLflow
    run and version. Raises ConfigError without a champion, CheckpointError when the version has no
    profile, DatasetError when the source does not exist or holds no image.
    """
    params = params or DriftParams()
    root = project.root
    registry = Registry(project.params.registry.name, project.tracking_uri)
    version = find_version(registry, params.model)
    pictures = newest(list_pictures([source]), hours=params.hours, limit=params.limit)
    if len(pictures) < params.min_images:
        newer = f" of the last {params.hours:g} hours" if params.hours else ""
        report, skipped = None, f"{len(pictures)} images{newer}; {params.min_images} are needed"
    else:
        report, skipped = _measure(root, registry, version, pictures, params), None
    check = DriftCheck(
        model=registry.name,
        version=version.number,
        source=redact(source),
        at=now(),
        skipped=skipped,
        report=report,
    )
    write_text_atomic(root / REPORT, check.model_dump_json(indent=2))
    write_text_atomic(root / TEXT, check.to_markdown())
    if check.report is not None:
        _record(root, registry, version, check)
    return check


def _measure(
    root: Path,
    registry: Registry,
    version: Version,
    pictures: Sequence[Picture],
    params: DriftParams,
) -> DriftReport:
    from rfdetr.monitoring.drift import compare
    from rfdetr.monitoring.drift_plot import draw_drift
    from rfdetr.monitoring.image_profile import ImageProfile, profile_images

    with tempfile.TemporaryDirectory(prefix="rfdetr-drift-") as temporary:
        artifacts = registry.fetch(version, Path(temporary)) / "artifacts"
        if not (artifacts / PROFILE).exists():
            raise CheckpointError(
                f"{registry.name} version {version.number} was registered without a profile of its "
                "images. Retrain and promote a new version, then check again."
            )
        reference = ImageProfile.load(artifacts / PROFILE)
        detector = load_detector(artifacts, device=params.device)
        files = _fetch(pictures, Path(temporary) / "pictures")
        recent = profile_images(detector, files, limit=params.limit, threshold=reference.threshold)
    report = compare(reference, recent, params.thresholds)
    draw_drift(reference, recent, report, root / PICTURE)
    return report


def _fetch(pictures: Sequence[Picture], folder: Path) -> list[Path]:
    """The images as files, named as in their source."""
    client = make_client() if any(is_s3(picture.place) for picture in pictures) else None
    files: dict[int, Path] = {}

    def fetch(item: tuple[int, Picture]) -> None:
        number, picture = item
        target = folder / str(number) / Path(picture.name).name
        files[number] = fetch_picture(picture, target, client)

    on_threads(fetch, enumerate(pictures))
    return [files[number] for number in range(len(pictures))]


def _record(root: Path, registry: Registry, version: Version, check: DriftCheck) -> None:
    """Numbers and reports on the version's run, the outcome on the version; alarms are kept."""
    assert check.report is not None
    alarms = ", ".join(check.report.alarms) or "none"
    registry.set_tags(version.number, {"drift.alarms": alarms, "drift.at": check.at})
    if version.run_id is None:
        return
    client = registry.client
    step = len(client.get_metric_history(version.run_id, "drift/embedding"))
    for measure in check.report.measures:
        client.log_metric(version.run_id, f"drift/{measure.name}", measure.value, step=step)
    folders = ["drift/latest"] + ([f"drift/{check.at[:19]}"] if check.drifted else [])
    for folder in folders:
        for file in (REPORT, TEXT, PICTURE):
            client.log_artifact(version.run_id, str(root / file), folder.replace(":", ""))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the flow's child."""
    parser = argparse.ArgumentParser(prog="python -m flows.inference.drift", description=__doc__)
    parser.add_argument("source", help="folder or s3:// prefix of recent images")
    parser.add_argument("--params", default="{}", help="fields of DriftParams as JSON")
    options = parser.parse_args(arguments)
    die_with_parent()
    exit_on_sigterm()
    try:
        params = DriftParams.model_validate_json(options.params)
        check = check_drift(Project(Path.cwd()), options.source, params)
    except Exception as error:  # noqa: BLE001 - the last line says what happened
        print(f"watch failed: {explain(error)}", file=sys.stderr)
        return 1
    print(check.skipped or ", ".join(check.report.alarms if check.report else ()) or "no drift")
    return 0


if __name__ == "__main__":
    sys.exit(main())
