"""YOLO label files and data.yaml as split tables, with a finding for each bad line."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rfdetr.checks.codes import Severity
from rfdetr.checks.collector import Collector
from rfdetr.checks.label_kinds import check_label_kind
from rfdetr.checks.polygons import ring_extents
from rfdetr.checks.table import CategoryRow, SplitTable
from rfdetr.data.data_yaml import class_names, keypoint_values, parse_yaml
from rfdetr.data.layouts import Layout, SplitPaths, yolo_splits
from rfdetr.data.text import read_text
from rfdetr.data.yolo import LabelFiles, image_files
from rfdetr.data.yolo_labels import LabelRow, read_labels
from rfdetr.errors import DatasetError

ANY_CLASS = 1 << 31  # number of classes when data.yaml has no usable names
MAX_DEPTH = 100
MANY_MISSING = 0.3  # share of the images without a label file


def read_yolo_layout(root: Path, yaml_file: Path, collector: Collector) -> Layout:
    """The splits that data.yaml defines, as far as it can be read."""
    content, text = _load_yaml(root, yaml_file, collector)
    problems: list[str] = []
    notes: list[str] = []
    names = class_names(content, problems)
    keypoints = keypoint_values(content, problems)
    splits = yolo_splits(yaml_file, content, problems, notes)
    for code, found in (("yaml-structure", problems), ("yaml-path", notes)):
        for problem in found if text is not None else ():
            line = _line_of_key(text or "", problem)
            collector.add(code, problem, file=_show(root, yaml_file), line=line)
    return Layout("yolo", root, splits, yaml_file, names, keypoints)


def _load_yaml(root: Path, path: Path, collector: Collector) -> tuple[dict[str, Any], str | None]:
    """Content and text; the text is None if the file is unusable, which findings then report."""
    where = _show(root, path)
    try:
        text = read_text(path)
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeError as error:
        collector.add("yaml-malformed", str(error), file=where)
        return {}, None
    deep = _too_deep(text)
    if deep is not None:
        collector.add("yaml-malformed", "brackets are nested too deeply", file=where, line=deep)
        return {}, None
    try:
        content = parse_yaml(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        found = mark.line + 1 if mark else None
        collector.add("yaml-malformed", error.problem or "not valid YAML", file=where, line=found)
        return {}, None
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        place = _line_of_character(text, error)
        collector.add("yaml-malformed", reason[:200], file=where, line=place)
        return {}, None
    if not isinstance(content, dict):
        kind = type(content).__name__
        text = f"expected keys such as names: and train:, found {kind}"
        collector.add("yaml-structure", text, file=where, line=1)
        return {}, None
    return content, text


def _too_deep(text: str) -> int | None:
    """Line where brackets are nested too deeply, on which PyYAML would spend minutes."""
    depth = 0
    for found in re.finditer(r"[\[\]{}]", text):
        depth += 1 if found.group() in "[{" else -1
        if depth > MAX_DEPTH:
            return text.count("\n", 0, found.start()) + 1
    return None


def _line_of_character(text: str, error: Exception) -> int | None:
    position = getattr(error, "position", None)
    return text.count("\n", 0, position) + 1 if isinstance(position, int) else None


def _line_of_key(text: str, problem: str) -> int | None:
    """Line of the key that a problem mentions."""
    for key in re.findall(r"([A-Za-z_]+):", problem):
        found = re.search(rf"^[ \t\"']*{key}[\"']?\s*:", text, re.MULTILINE)
        if found:
            return text.count("\n", 0, found.start()) + 1
    return 1


def _show(root: Path, path: Path) -> str:
    return Path(os.path.relpath(path, root)).as_posix()


def read_yolo_split(layout: Layout, split: SplitPaths, collector: Collector) -> SplitTable:
    """Read the label files of one split; boxes are fractions until the image sizes are known."""
    files = _image_list(layout, split, collector)
    rows: list[LabelRow] = []
    owners: list[int] = []
    rejected = 0
    labels = LabelFiles()
    paths = [labels.of(file) for file in files]
    for number, (file, path) in enumerate(zip(files, paths, strict=True)):
        classes = len(layout.names) or ANY_CLASS
        found, problems = read_labels(path, classes, layout.keypoint_values)
        rejected += len(problems)
        rows += found
        owners += [number] * len(found)
        for problem in problems:
            collector.add(
                problem.code,
                f"{problem.reason}: {problem.text!r}",
                split=split.name,
                file=_show(layout.root, path),
                line=problem.line,
                image_id=number,
                repair="drop-annotation",
                details={"image": _show(layout.root, file)},
            )
    table = _table(layout, split, (files, paths), rows, owners)
    table.rejected = rejected
    table.readable = bool(layout.names)
    _report_shared_labels(table, collector)
    _report_missing_labels(table, paths, owners, collector)
    check_label_kind(table, rows, collector)
    return table


def _image_list(layout: Layout, split: SplitPaths, collector: Collector) -> list[Path]:
    """Images of the split, each once."""
    try:
        files = list(image_files(split))
    except DatasetError as error:
        place = _show(layout.root, split.images[0])
        collector.add("yaml-structure", str(error), split=split.name, file=place)
        return []
    seen = dict.fromkeys(files)
    for file in collector.take("file-repeated", _repeated(files)):
        place = _show(layout.root, file)
        text = "the image is listed twice"
        collector.note("file-repeated", text, split=split.name, file=place, repair="")
    return list(seen)


def _repeated(files: Sequence[Path]) -> list[Path]:
    seen: set[Path] = set()
    again = []
    for file in files:
        if file in seen:
            again.append(file)
        seen.add(file)
    return again


def _table(
    layout: Layout,
    split: SplitPaths,
    paths: tuple[Sequence[Path], Sequence[Path]],
    rows: Sequence[LabelRow],
    owners: Sequence[int],
) -> SplitTable:
    files, labels = paths
    corners = np.array([row.box for row in rows], np.float64).reshape(-1, 4)
    classes = np.array([row.label for row in rows], np.int64)
    rings = np.array([i for i, row in enumerate(rows) if row.polygon], np.int64)
    polygons = [rows[i].polygon for i in rings]
    lines = [row.line for row in rows]
    masked = np.zeros(len(rows), bool)
    masked[rings] = True

    def outline(row: int) -> list[list[float]] | None:
        if not masked[row]:
            return None
        points = np.reshape(rows[row].polygon, (-1, 2))
        return [(points * table.sizes[owners[row]]).ravel().tolist()]

    table = SplitTable(
        name=split.name,
        folder=layout.root,
        images_dir=layout.root,
        annotation_file=layout.yaml_file,
        image_ids=np.arange(len(files), dtype=np.int64),
        file_names=[_show(layout.root, file) for file in files],
        sizes=np.full((len(files), 2), np.nan),
        annotation_ids=np.arange(len(rows), dtype=np.int64),
        image_rows=np.array(owners, np.int64),
        category_rows=np.where(classes < len(layout.names), classes, -1),
        boxes=np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1),
        masked=masked,
        polygons=ring_extents(rings, polygons),
        categories=[CategoryRow(i, name) for i, name in enumerate(layout.names)],
        label_files=[_show(layout.root, label) for label in labels],
        split=split,
        annotation_lines=lambda chosen: [lines[row] for row in chosen],
        outline=outline,
        relative=True,
    )
    return table


def _report_missing_labels(
    table: SplitTable, labels: Sequence[Path], owners: Sequence[int], collector: Collector
) -> None:
    """Report images without a label file, which training takes as background.

    They are suspicious if they are many, or if background elsewhere has an empty label file.
    """
    exists = [label.is_file() for label in labels]
    missing = [number for number, found in enumerate(exists) if not found]
    if not missing or len(missing) == len(labels):  # none at all: there is nothing to train
        return
    filled = set(owners)
    empty = any(found and number not in filled for number, found in enumerate(exists))
    text = (
        f"{len(missing)} of {len(labels)} images of {table.name} have no label file, so they are "
        f"trained as background, such as {table.file_names[missing[0]]}"
    )
    text += "; other images have an empty one" if empty else ""
    suspicious = empty or len(missing) > MANY_MISSING * len(labels)
    severity: Severity = "warning" if suspicious else "info"
    collector.add("label-missing", text, severity=severity, split=table.name, file=table.source)


def _report_shared_labels(table: SplitTable, collector: Collector) -> None:
    first: dict[str, int] = {}
    for row, label in enumerate(table.label_files or ()):
        other = first.setdefault(label, row)
        if other != row:
            names = f"{table.file_names[other]} and {table.file_names[row]}"
            collector.add("label-shared", f"{names} share {label}", **table.image_place(row))
