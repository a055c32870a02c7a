"""A mended copy of a dataset: what the findings say can be repaired without a person's judgement.

Untouched files are hard links where the file system allows it, otherwise copies; every file that
changes is new. The source is never written to, and the copy appears in one step.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from rfdetr.checks.dataset_report import DatasetReport, Finding
from rfdetr.checks.repair.coco_file import mend_coco_file
from rfdetr.checks.repair.image_files import mended_image, renamed
from rfdetr.checks.repair.yolo_files import detach_yaml, mend_label_file, mend_list_file
from rfdetr.data.layouts import YAML_NAMES
from rfdetr.data.yolo import label_path
from rfdetr.errors import DatasetError

# repair -> what it does
MENDS = {
    "drop-image": "leave the image and its annotations out",
    "drop-annotation": "remove the annotation",
    "drop-record": "remove the record",
    "drop-polygon": "remove the polygon or mask",
    "clip-box": "clip the box to the image",
    "clip-polygon": "clip the polygon to the image",
    "set-area": "compute the area from the box",
    "set-size": "take width and height from the image file",
    "rescale": "take the size from the image file and scale the boxes",
    "renumber": "give the annotation a new id",
    "merge-images": "join the two image records",
    "rename-file": "rename the file to its real format",
    "use-disk-name": "spell the name as on disk",
    "strip-exif": "remove the EXIF rotation tag; pixels stay as annotated",
    "convert-rgb": "convert the image to 8-bit RGB",
    "leave-out-file": "leave the file out",
}
MENDS_OF_PIXELS = frozenset({"strip-exif", "convert-rgb"})
MENDS_OF_FILES = frozenset({"drop-image", "leave-out-file"})


@dataclass(frozen=True)
class FixResult:
    """What was mended, and the codes of findings that need a person."""

    folder: Path
    mended: dict[str, int]
    left: dict[str, int]

    def text(self) -> str:
        """A few lines for a terminal."""
        lines = [f"mended copy: {self.folder}"]
        lines += [f"  mended {count:6,} {code}" for code, count in self.mended.items()]
        lines += [f"  left   {count:6,} {code}" for code, count in self.left.items()]
        return "\n".join(lines)


def plan_text(report: DatasetReport) -> str:
    """One line per repair that `mend_dataset` would make, and what is left to a person."""
    lines = []
    for finding in report.findings:
        if finding.mend:
            lines.append(f"{finding.place()}: {MENDS[finding.mend]} ({finding.code})")
    left = Counter(finding.code for finding in report.findings if not finding.mend)
    lines += [f"by hand: {count} x {code}" for code, count in sorted(left.items())]
    return "\n".join(lines) or "nothing to mend"


def mend_dataset(
    dataset_dir: str | os.PathLike[str], report: DatasetReport, out_dir: str | os.PathLike[str]
) -> FixResult:
    """Write a mended copy of the dataset to the new folder `out_dir`.

    `report` must list every finding (`max_findings_per_code` beyond the counts). Raises
    DatasetError when `out_dir` exists, overlaps the dataset, or the report is cut.
    """
    source = Path(dataset_dir).expanduser().resolve()
    target = Path(out_dir).expanduser().resolve()
    _check_target(source, target, report)
    by_file: dict[str, list[Finding]] = defaultdict(list)
    for finding in report.findings:
        key = finding.details.get("image", None if finding.details else finding.file)
        if finding.mend and key:
            by_file[str(key)].append(finding)
    gone = {
        file
        for file, findings in by_file.items()
        if any(finding.mend in MENDS_OF_FILES for finding in findings)
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        work.mkdir()
        names = _copy_files(source, work, by_file, gone)
        if report.layout == "yolo":
            _mend_yolo(source, work, report, gone, names)
        else:
            _mend_coco(source, work, report, names)
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    mended = Counter(finding.code for finding in report.findings if finding.mend)
    left = Counter(finding.code for finding in report.findings if not finding.mend)
    return FixResult(target, dict(sorted(mended.items())), dict(sorted(left.items())))


def _check_target(source: Path, target: Path, report: DatasetReport) -> None:
    if target.exists():
        raise DatasetError(f"{target} exists already. Name a new folder for the mended copy.")
    if source == target or source in target.parents or target in source.parents:
        raise DatasetError(f"{target} overlaps the dataset {source}. Choose a folder beside it.")
    if len(report.findings) < sum(report.counts.values()):
        raise DatasetError(
            "The report lists only some of its findings; check again with a larger "
            "max_findings_per_code to mend the dataset."
        )


def _copy_files(
    source: Path, work: Path, by_file: dict[str, list[Finding]], gone: set[str]
) -> dict[str, str]:
    """Copy all files but those left out; return the new names of renamed ones."""
    names: dict[str, str] = {}
    for place, folders, files in os.walk(source):
        folders.sort()
        relative = Path(place).relative_to(source)
        (work / relative).mkdir(parents=True, exist_ok=True)
        for name in sorted(files):
            key = new = (relative / name).as_posix()
            if key in gone:
                continue
            mends = {finding.mend for finding in by_file.get(key, ())}
            if "rename-file" in mends:
                wanted = next(f for f in by_file[key] if f.mend == "rename-file").details["format"]
                new = names[key] = renamed(source, key, str(wanted))
            data = mended_image(source / key, mends) if mends & MENDS_OF_PIXELS else None
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


def _mend_coco(source: Path, work: Path, report: DatasetReport, names: dict[str, str]) -> None:
    for split, name in report.annotation_files.items():
        findings = [f for f in report.findings if f.mend and f.split == split]
        folder = report.image_folders[split]
        new_names = {
            os.path.relpath(old, folder): os.path.relpath(new, folder) for old, new in names.items()
        }
        if findings:
            mend_coco_file(source / name, work / name, source / folder, findings, new_names)


def _mend_yolo(
    source: Path, work: Path, report: DatasetReport, gone: set[str], names: dict[str, str]
) -> None:
    for yaml_file in (work / name for name in YAML_NAMES):
        if yaml_file.is_file():
            detach_yaml(yaml_file, source)
    by_label: dict[str, list[Finding]] = defaultdict(list)
    for finding in report.findings:
        if finding.mend and finding.line is not None and finding.file:
            by_label[finding.file].append(finding)
    for label, findings in by_label.items():
        if label.endswith(".txt") and (work / label).is_file():
            mend_label_file(source / label, work / label, findings)
    images = {name for prints in report.fingerprints.values() for name in prints}
    kept = {label_path(source / image) for image in images - gone}
    for label_file in {label_path(source / image) for image in images & gone} - kept:
        if source in label_file.parents:
            (work / label_file.relative_to(source)).unlink(missing_ok=True)
    for listing in sorted(path for path in work.rglob("*.txt") if path.parent == work):
        mend_list_file(source, listing, gone, names)
