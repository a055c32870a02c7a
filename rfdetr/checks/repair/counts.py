"""What a dataset contains and what of it training loads, per split."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rfdetr.checks.dataset_report import DatasetReport
from rfdetr.checks.repair.image_files import decodes
from rfdetr.checks.repair.restore import read_document
from rfdetr.data.coco import CocoSplits
from rfdetr.data.decode import ImageFile
from rfdetr.data.geometry import ImageObjects, clip
from rfdetr.data.index import AnnotationIndex
from rfdetr.data.layouts import Layout, detect_layout
from rfdetr.data.yolo import YoloSplits, image_files, label_path
from rfdetr.errors import DatasetError

UNREADABLE = ("file-unreadable", "file-truncated", "file-empty", "file-bomb")
SIDE = 1000  # of the images that relative boxes are clipped to; their real size does not matter


@dataclass(frozen=True)
class SplitCounts:
    """One split: what its annotation files list, what training loads, and its findings.

    `objects` is the number of boxes that the loader returns; 0 if training refuses the split.
    """

    images: int = 0
    annotations: int = 0
    objects: int = 0
    errors: int = 0
    warnings: int = 0


def count_splits(root: Path, report: DatasetReport) -> dict[str, SplitCounts]:
    """The counts of every split of the dataset that `report` describes; "" is for no split."""
    layout = _layout(root, report)
    levels = Counter((finding.split or "", finding.severity) for finding in report.findings)
    names = list(dict.fromkeys([*report.image_folders, *(split for split, _ in levels)]))
    unreadable = {
        str(finding.details["image"])
        for finding in report.of(*UNREADABLE)
        if finding.details.get("image") and not decodes(root / finding.details["image"])
    }
    found = {}
    for name in sorted(names, key=("train", "val", "test", "").index):
        images, annotations = _listed(root, name, report, layout)
        found[name] = SplitCounts(
            images=images,
            annotations=annotations,
            objects=_objects(root, name, layout, unreadable),
            errors=levels[name, "error"],
            warnings=levels[name, "warning"],
        )
    return found


def _layout(root: Path, report: DatasetReport) -> Layout | None:
    kind: Any = report.layout
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return detect_layout(root, kind)
        except DatasetError:
            return None


def _listed(root: Path, name: str, report: DatasetReport, layout: Layout | None) -> tuple[int, int]:
    """Images and annotations that the annotation file or the label files list."""
    if report.layout != "yolo":
        file = report.annotation_files.get(name)
        content = read_document(root / file) if file else None
        images, annotations = (
            records if isinstance(records := (content or {}).get(section), list) else []
            for section in ("images", "annotations")
        )
        names = {repr(i.get("file_name")) if isinstance(i, dict) else id(i) for i in images}
        return len(names), len(annotations)
    if layout is None or name not in layout.splits:
        return 0, 0
    try:
        files = set(image_files(layout.splits[name]))
    except (OSError, UnicodeDecodeError):
        return 0, 0
    labels = {label_path(file) for file in files}
    lines = [
        line for label in labels if label.is_file() for line in label.read_bytes().split(b"\n")
    ]
    return len(files), sum(1 for line in lines if line.strip())


def _objects(root: Path, name: str, layout: Layout | None, unreadable: Collection[str]) -> int:
    if layout is None or name not in layout.splits:
        return 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            splits = YoloSplits(layout) if layout.kind == "yolo" else CocoSplits(layout)
            index = splits.index(name)
        except DatasetError:
            return 0
    broken = {(root / file).resolve() for file in unreadable}
    return sum(
        _objects_of_image(index, image)
        for image in np.flatnonzero(np.diff(index.first)).tolist()
        if not broken or index.path(image).resolve() not in broken
    )


def _objects_of_image(index: AnnotationIndex, image: int) -> int:
    rows = index.rows(image)
    rows = rows[~index.crowd[rows]]
    height = width = SIDE
    if not index.relative:
        try:
            file = ImageFile(index.path(image))
        except DatasetError:
            return 0
        height, width = file.height, file.width
    boxes = index.pixel_boxes(rows, width, height)
    areas = np.zeros(len(rows), np.float32)
    return len(clip(ImageObjects(boxes, areas, rows, height, width)).rows)
