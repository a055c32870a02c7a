"""Which repairs of a report are made, and which need a decision by the user."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

from rfdetr.checks.dataset_report import DatasetReport, Finding
from rfdetr.checks.image_probe import probe_bytes
from rfdetr.checks.repair.image_files import CONVERTED_MODES, decodes, renamed, viewed_orientation
from rfdetr.checks.repair.restore import read_document
from rfdetr.checks.repair.result import MOST_DROPPED

# repair -> what it does
REPAIRS = {
    "drop-image": "leave out the image and its annotations",
    "drop-annotation": "remove the annotation",
    "drop-record": "remove the record",
    "drop-polygon": "remove the polygon or mask",
    "convert-boxes": "convert the boxes to the format of the layout",
    "clip-box": "clip the box to the image",
    "clip-polygon": "clip the polygon to the image",
    "set-area": "compute the area from the box",
    "set-size": "take width and height from the image file",
    "rescale": "take the size from the image file and scale the boxes",
    "renumber": "give the annotation a new id",
    "merge-images": "merge the two image records",
    "rename-file": "rename the file to the extension of its format",
    "use-disk-name": "use the file name on disk",
    "strip-exif": "turn the boxes to the stored pixels, since they follow the rotated view",
    "convert-rgb": "convert the image to 8-bit RGB",
    "leave-out-file": "leave out the file",
}
# Training uses these objects; only the user can decide which one to lose.
TRAINABLE = frozenset({"box-duplicate", "box-near-duplicate", "split-duplicate-image"})
# Nobody reads these files now, but they may be meant for training.
UNUSED = frozenset({"file-unreferenced", "label-unreferenced"})
# What is certain was restored before; the rest is a decision.
RESTORED = frozenset({"box-format", "image-id-duplicate"})
# Where the size of the image or the format of the boxes is in doubt, so is what lies outside.
DOUBTFUL = frozenset({"box-outside", "box-outside-fully", "polygon-outside", "rle-malformed"})

Planned = list[tuple[Finding, str]]


class Planner:
    """Chooses the repairs of one report of the copy `root`."""

    def __init__(self, root: Path, report: DatasetReport, *, allow_drop: bool) -> None:
        self._root = root
        self._report = report
        self._allow_drop = allow_drop
        self._documents = {
            split: read_document(root / name) or {}
            for split, name in report.annotation_files.items()
            if report.layout != "yolo"
        }
        sizes = report.of("image-size-mismatch")
        self._doubtful = {f.details.get("image") for f in sizes if f.severity == "error"}
        drops = Counter(f.split for f in report.findings if f.repair == "drop-polygon")
        self._masks_at_risk = {
            split
            for split, ledger in report.ledger.items()
            if drops[split] > MOST_DROPPED * ledger.rows_listed
        }
        self._formats = {f.split for f in report.of("box-format")}
        self.new_names: dict[str, str] = {}

    def repairs(self) -> Planned:
        """The findings that are repaired, each with its repair."""
        chosen = ((finding, self._choose(finding)) for finding in self._report.findings)
        return [(finding, repair) for finding, repair in chosen if repair]

    def _choose(self, finding: Finding) -> str:
        repair, image = finding.repair, finding.details.get("image")
        if not repair or self._undecided(finding):
            return ""
        if repair in ("strip-exif", "convert-rgb", "rename-file"):
            return self._of_file(finding, repair) if image and self._own(str(image)) else ""
        if repair == "rescale" and self._masks(finding, self._record(finding)):
            return ""
        return repair

    def _undecided(self, finding: Finding) -> bool:
        """Whether the repair would lose something that may be of use."""
        image, code = finding.details.get("image"), finding.code
        if code in TRAINABLE and image == finding.details.get("other_file"):
            return True
        if code in TRAINABLE | UNUSED:
            return not self._allow_drop
        if finding.repair == "drop-polygon" and finding.split in self._masks_at_risk:
            return not self._allow_drop
        if finding.repair == "drop-image":
            file = self._root / str(image)
            return image is not None and file.is_file() and decodes(file)
        if code == "box-zero-area":
            box = self._record(finding).get("bbox")
            return isinstance(box, list) and min(box[2:]) > 0
        doubtful = image in self._doubtful or finding.split in self._formats
        return (
            code in RESTORED
            or finding.details.get("section") == "categories"
            or (code in DOUBTFUL and doubtful)
        )

    def _own(self, name: str) -> bool:
        """Whether the file is in the copy, and not elsewhere on the disk."""
        return Path(os.path.normpath(self._root / name)).is_relative_to(self._root)

    def _record(self, finding: Finding) -> dict[str, Any]:
        section, number = str(finding.details.get("section")), finding.details.get("record")
        records = self._documents.get(str(finding.split), {}).get(section)
        if not isinstance(records, list) or not isinstance(number, int):
            return {}
        record = records[number]
        return record if isinstance(record, dict) else {}

    def _of_file(self, finding: Finding, repair: str) -> str:
        image = str(finding.details["image"])
        data = (self._root / image).read_bytes()
        if repair == "rename-file":
            taken = list(self.new_names.values())
            new = renamed(self._root, image, str(finding.details["format"]), taken)
            if new is None:
                return ""
            self.new_names[image] = new
            return repair
        if repair == "convert-rgb":
            return repair if probe_bytes(data).mode in CONVERTED_MODES else ""
        record = self._record(finding)
        size = record.get("width"), record.get("height")
        proved = image in self._doubtful and viewed_orientation(data, size) is not None
        return repair if proved and not self._masks(finding, record) else ""

    def _annotations(self, finding: Finding, image: dict[str, Any]) -> list[dict[str, Any]]:
        found = self._documents.get(str(finding.split), {}).get("annotations")
        return [
            annotation
            for annotation in (found if isinstance(found, list) else ())
            if isinstance(annotation, dict) and annotation.get("image_id") == image.get("id")
        ]

    def _masks(self, finding: Finding, image: dict[str, Any]) -> bool:
        """Whether an annotation of the image has an RLE mask, which cannot be moved."""
        own = self._annotations(finding, image)
        return any(isinstance(annotation.get("segmentation"), dict) for annotation in own)
