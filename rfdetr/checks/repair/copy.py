"""Writes a repaired copy of a dataset that is never worse than the dataset.

First what the dataset means is restored: file names, ids, values. Then what cannot be saved is
dropped. What only the user can decide stays and is listed. Unchanged files are hard links if the
file system supports them, otherwise copies; every changed file is new. The source is never written
to, and the copy appears in one step, after it was checked.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import uuid
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from rfdetr.checks.box_format import BoxFormat
from rfdetr.checks.check import check_dataset
from rfdetr.checks.dataset_report import DatasetReport, Finding
from rfdetr.checks.options import CheckConfig
from rfdetr.checks.repair.coco_file import repair_coco_file
from rfdetr.checks.repair.counts import count_splits
from rfdetr.checks.repair.image_files import converted
from rfdetr.checks.repair.plan import REPAIRS, Planned, Planner
from rfdetr.checks.repair.restore import CocoSplit, restore_coco
from rfdetr.checks.repair.result import RepairResult, refusal
from rfdetr.checks.repair.tree import copy_tree, link_or_copy, replace_bytes
from rfdetr.checks.repair.yolo_files import (
    detach_yaml,
    listed_images,
    repair_label_file,
    repair_lists,
    restore_labels,
    restore_lists,
)
from rfdetr.data.layouts import Layout, detect_layout
from rfdetr.data.yolo import label_path
from rfdetr.errors import DatasetError

PASSES = 5  # a repair can uncover a finding; each pass repairs what the check before it found
FILE_REMOVALS = frozenset({"drop-image", "leave-out-file"})
EVERY_FINDING = 10**9

Check = Callable[[Path], DatasetReport]


def repair_dataset(
    dataset_dir: str | os.PathLike[str],
    report: DatasetReport,
    out_dir: str | os.PathLike[str],
    *,
    check: Check | None = None,
    allow_drop: bool = False,
) -> RepairResult:
    """Write a repaired copy of the dataset to the new folder `out_dir`.

    `report` must list every finding (`max_findings_per_code` above the counts); `check` makes such
    a report of the copy (None: with the default thresholds). Objects that training uses are never
    dropped, and at most 5 % of the images or annotations of a split are, unless `allow_drop`.
    Raises DatasetError, and writes nothing, if more would have to be dropped, if the copy would be
    worse, if `out_dir` exists or overlaps the dataset, or if the report lacks findings.
    """
    source, target = (Path(path).expanduser().resolve() for path in (dataset_dir, out_dir))
    _check_target(source, target, report)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _work_folder(target) as work:
        copy = partial(copy_tree, source, work, link_or_copy)
        result = _repair(source, work, report, check=check, allow_drop=allow_drop, copy=copy)
        if result.refusal:
            raise DatasetError(f"{source}: no copy was written. {result.refusal}")
        work.rename(target)
    return RepairResult(**{**vars(result), "folder": target})


def plan_repair(
    dataset_dir: str | os.PathLike[str],
    report: DatasetReport,
    *,
    check: Check | None = None,
    allow_drop: bool = False,
) -> RepairResult:
    """What `repair_dataset` would do; nothing stays on the disk."""
    source = Path(dataset_dir).expanduser().resolve()
    _require_complete(report)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder).resolve() / source.name
        copy = partial(copy_tree, source, work, _symlink)
        return _repair(source, work, report, check=check, allow_drop=allow_drop, copy=copy)


def _symlink(source: Path, target: Path) -> None:
    target.symlink_to(source)


@contextlib.contextmanager
def _work_folder(target: Path) -> Iterator[Path]:
    """A folder next to the target that is gone afterwards, whatever happens."""
    work = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check_target(source: Path, target: Path, report: DatasetReport) -> None:
    if target.exists():
        raise DatasetError(f"{target} already exists. Choose a new folder for the repaired copy.")
    if source == target or source in target.parents or target in source.parents:
        raise DatasetError(f"{target} overlaps the dataset {source}. Choose a folder next to it.")
    _require_complete(report)


def _require_complete(report: DatasetReport) -> None:
    if len(report.findings) < sum(report.counts.values()):
        raise DatasetError(
            "The report lists only some of its findings. Check again with a larger "
            "max_findings_per_code to repair the dataset."
        )


def _repair(
    source: Path,
    work: Path,
    report: DatasetReport,
    *,
    check: Check | None,
    allow_drop: bool,
    copy: Callable[[], list[str]],
) -> RepairResult:
    """Fill `work` with the repaired dataset."""
    check = check or partial(
        check_dataset,
        dataset_file=report.layout,  # type: ignore[arg-type]  # text in the report's JSON
        config=CheckConfig.model_validate({"max_findings_per_code": EVERY_FINDING}),
        progress=False,
    )
    before = count_splits(report)
    broken_links = copy()
    restored = _restore(source, work, report)
    found = check(work)
    actions: list[str] = []
    for _ in range(PASSES):
        planner = Planner(work, found, allow_drop=allow_drop)
        repairs = planner.repairs()
        lines = [f"{f.place()}: {REPAIRS.get(f.repair, f.repair)} ({f.code})" for f, _ in repairs]
        if not lines or set(lines) <= set(actions):
            break
        actions += lines
        _apply(work, found, repairs, planner.new_names)
        found = check(work)
    after = count_splits(found)
    return RepairResult(
        folder=None,
        before=before,
        after=after,
        restored=dict(sorted(restored.items())),
        repaired=dict(sorted((Counter(report.counts) - Counter(found.counts)).items())),
        left=dict(sorted(found.counts.items())),
        actions=tuple(dict.fromkeys(actions)),
        broken_links=tuple(broken_links),
        refusal=refusal(before, after, allow_drop),
    )


def _restore(source: Path, work: Path, report: DatasetReport) -> Counter[str]:
    """Correct what the dataset means but does not say."""
    formats = {
        str(finding.split): BoxFormat(*finding.details["format"])
        for finding in report.of("box-format")
        if finding.details
    }
    if report.layout != "yolo":
        splits = [
            CocoSplit(name, work / file, report.image_folders[name])
            for name, file in report.annotation_files.items()
        ]
        return restore_coco(work, splits, formats)
    detach_yaml(source, work)
    layout = _yolo_layout(work)
    if layout is None:
        return Counter()
    return restore_lists(source, work, layout) + restore_labels(work, layout, formats)


def _yolo_layout(work: Path) -> Layout | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the check reports the paths of data.yaml
        try:
            return detect_layout(work, "yolo")
        except DatasetError:
            return None


def _apply(work: Path, report: DatasetReport, repairs: Planned, names: dict[str, str]) -> None:
    gone = set()
    for finding, repair in repairs:
        file = _file_of(finding)
        if repair in FILE_REMOVALS and file:
            gone.add(file)
        elif repair == "convert-rgb" and file and (image := _inside(work, file)) is not None:
            pixels = converted(image.read_bytes())
            if pixels is not None:
                replace_bytes(image, pixels)
    names = {old: new for old, new in names.items() if old not in gone}
    if report.layout == "yolo":
        _repair_yolo(work, repairs, gone, names)
    else:
        _repair_coco(work, report, repairs, names)
    for file in gone:
        if (place := _inside(work, file)) is not None and not place.is_dir():
            place.unlink(missing_ok=True)
    for old, new in names.items():
        (work / old).rename(work / new)


def _file_of(finding: Finding) -> str | None:
    """The image or other file that a repair of the finding removes or changes."""
    file = finding.details.get("image", None if finding.details else finding.file)
    return str(file) if file else None


def _inside(work: Path, name: str) -> Path | None:
    """The file in the copy; None if it is elsewhere on the disk, where nothing may change."""
    place = Path(os.path.normpath(work / name))
    return place if place.is_relative_to(work) else None


def _repair_coco(
    work: Path, report: DatasetReport, repairs: Planned, names: dict[str, str]
) -> None:
    for split, name in report.annotation_files.items():
        own = [(finding, repair) for finding, repair in repairs if finding.split == split]
        folder = report.image_folders[split]
        new_names = {
            os.path.relpath(old, folder): os.path.relpath(new, folder) for old, new in names.items()
        }
        if own:
            repair_coco_file(work / name, work / folder, own, new_names)


def _repair_yolo(work: Path, repairs: Planned, gone: set[str], names: dict[str, str]) -> None:
    by_label: dict[Path, Planned] = defaultdict(list)
    for finding, repair in repairs:
        label = _inside(work, finding.file) if finding.file else None
        if finding.line is not None and label is not None and label.suffix == ".txt":
            by_label[label].append((finding, repair))
    for label, own in by_label.items():
        if label.is_file():
            repair_label_file(label, own)
    layout = _yolo_layout(work)
    if layout is None:
        return
    images = set(listed_images(layout))
    left_out = {work / file for file in gone}
    kept = {label_path(image) for image in images - left_out}
    for label in {label_path(image) for image in images & left_out} - kept:
        if label.is_relative_to(work):
            label.unlink(missing_ok=True)
    repair_lists(work, layout, gone, names)
