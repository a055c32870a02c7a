"""Writes a repaired copy of a dataset, with the repairs that need no decision by the user.

Unchanged files are hard links if the file system supports them, otherwise copies; every changed
file is new. The source is never written to, and the copy appears atomically.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from rfdetr.checks.dataset_report import DatasetReport, Finding
from rfdetr.checks.repair.coco_file import repair_coco_file
from rfdetr.checks.repair.image_files import renamed, repaired_image
from rfdetr.checks.repair.yolo_files import detach_yaml, repair_label_file, repair_list_file
from rfdetr.data.layouts import YAML_NAMES
from rfdetr.data.yolo import label_path
from rfdetr.errors import DatasetError

# repair -> what it does
REPAIRS = {
    "drop-image": "leave out the image and its annotations",
    "drop-annotation": "remove the annotation",
    "drop-record": "remove the record",
    "drop-polygon": "remove the polygon or mask",
    "clip-box": "clip the box to the image",
    "clip-polygon": "clip the polygon to the image",
    "set-area": "compute the area from the box",
    "set-size": "take width and height from the image file",
    "rescale": "take the size from the image file and scale the boxes",
    "renumber": "give the annotation a new id",
    "merge-images": "merge the two image records",
    "rename-file": "rename the file to the extension of its format",
    "use-disk-name": "use the file name on disk",
    "strip-exif": "remove the EXIF rotation tag; pixels stay as annotated",
    "convert-rgb": "convert the image to 8-bit RGB",
    "leave-out-file": "leave out the file",
}
PIXEL_REPAIRS = frozenset({"strip-exif", "convert-rgb"})
FILE_REMOVALS = frozenset({"drop-image", "leave-out-file"})


@dataclass(frozen=True)
class RepairResult:
    """Number of repaired findings per code, and of those left to the user."""

    folder: Path
    repaired: dict[str, int]
    left: dict[str, int]

    def text(self) -> str:
        """A summary for the terminal."""
        lines = [f"repaired copy: {self.folder}"]
        lines += [f"  repaired {count:6,} {code}" for code, count in self.repaired.items()]
        lines += [f"  left     {count:6,} {code}" for code, count in self.left.items()]
        return "\n".join(lines)


def plan_text(report: DatasetReport) -> str:
    """One line per repair that `repair_dataset` would make, and what is left to the user."""
    lines = []
    for finding in report.findings:
        if finding.repair:
            lines.append(f"{finding.place()}: {REPAIRS[finding.repair]} ({finding.code})")
    left = Counter(finding.code for finding in report.findings if not finding.repair)
    lines += [f"by hand: {count} x {code}" for code, count in sorted(left.items())]
    return "\n".join(lines) or "nothing to repair"


def repair_dataset(
    dataset_dir: str | os.PathLike[str], report: DatasetReport, out_dir: str | os.PathLike[str]
) -> RepairResult:
    """Write a repaired copy of the dataset to the new folder `out_dir`.

    `report` must list every finding (`max_findings_per_code` above the counts). Raises DatasetError
    if `out_dir` exists or overlaps the dataset, or if the report does not list every finding.
    """
    source = Path(dataset_dir).expanduser().resolve()
    target = Path(out_dir).expanduser().resolve()
    _check_target(source, target, report)
    by_file: dict[str, list[Finding]] = defaultdict(list)
    for finding in report.findings:
        key = finding.details.get("image", None if finding.details else finding.file)
        if finding.repair and key:
            by_file[str(key)].append(finding)
    gone = {
        file
        for file, findings in by_file.items()
        if any(finding.repair in FILE_REMOVALS for finding in findings)
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        work.mkdir()
        names = _copy_files(source, work, by_file, gone)
        if report.layout == "yolo":
            _repair_yolo(source, work, report, gone, names)
        else:
            _repair_coco(source, work, report, names)
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    repaired = Counter(finding.code for finding in report.findings if finding.repair)
    left = Counter(finding.code for finding in report.findings if not finding.repair)
    return RepairResult(target, dict(sorted(repaired.items())), dict(sorted(left.items())))


def _check_target(source: Path, target: Path, report: DatasetReport) -> None:
    if target.exists():
        raise DatasetError(f"{target} already exists. Choose a new folder for the repaired copy.")
    if source == target or source in target.parents or target in source.parents:
        raise DatasetError(f"{target} overlaps the dataset {source}. Choose a folder next to it.")
    if len(report.findings) < sum(report.counts.values()):
        raise DatasetError(
            "The report lists only some of its findings. Check again with a larger "
            "max_findings_per_code to repair the dataset."
        )


def _copy_files(
    source: Path, work: Path, by_file: dict[str, list[Finding]], gone: set[str]
) -> dict[str, str]:
    """Copy all files except those left out; return the new names of renamed files."""
    names: dict[str, str] = {}
    for place, folders, files in os.walk(source):
        folders.sort()
        relative = Path(place).relative_to(source)
        (work / relative).mkdir(parents=True, exist_ok=True)
        for name in sorted(files):
            key = new = (relative / name).as_posix()
            if key in gone:
                continue
            repairs = {finding.repair for finding in by_file.get(key, ())}
            if "rename-file" in repairs:
                finding = next(f for f in by_file[key] if f.repair == "rename-file")
                new = names[key] = renamed(source, key, str(finding.details["format"]))
            data = repaired_image(source / key, repairs) if repairs & PIXEL_REPAIRS else None
            if data is not None:
                (work / new).write_bytes(data)
            else:
                _link(source / key, work / new)
    return names


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _repair_coco(source: Path, work: Path, report: DatasetReport, names: dict[str, str]) -> None:
    for split, name in report.annotation_files.items():
        findings = [f for f in report.findings if f.repair and f.split == split]
        folder = report.image_folders[split]
        new_names = {
            os.path.relpath(old, folder): os.path.relpath(new, folder) for old, new in names.items()
        }
        if findings:
            repair_coco_file(source / name, work / name, source / folder, findings, new_names)


def _repair_yolo(
    source: Path, work: Path, report: DatasetReport, gone: set[str], names: dict[str, str]
) -> None:
    for yaml_file in (work / name for name in YAML_NAMES):
        if yaml_file.is_file():
            detach_yaml(yaml_file, source)
    by_label: dict[str, list[Finding]] = defaultdict(list)
    for finding in report.findings:
        if finding.repair and finding.line is not None and finding.file:
            by_label[finding.file].append(finding)
    for label, findings in by_label.items():
        if label.endswith(".txt") and (work / label).is_file():
            repair_label_file(source / label, work / label, findings)
    images = {name for prints in report.fingerprints.values() for name in prints}
    kept = {label_path(source / image) for image in images - gone}
    for label_file in {label_path(source / image) for image in images & gone} - kept:
        if source in label_file.parents:
            (work / label_file.relative_to(source)).unlink(missing_ok=True)
    for listing in sorted(path for path in work.rglob("*.txt") if path.parent == work):
        repair_list_file(source, listing, gone, names)
