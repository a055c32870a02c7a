"""Checks of image files against the annotation file and the folder."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from rfdetr.checks.cache import Inspected
from rfdetr.checks.collector import Collector
from rfdetr.checks.image_probe import PLAIN_MODES, ImageFacts
from rfdetr.checks.table import SplitTable
from rfdetr.data.decode import (
    CONVERT,
    FORMAT_SUFFIXES,
    IMAGE_SUFFIXES,
    UNREAD_SUFFIXES,
    is_deep,
)
from rfdetr.data.folders import fold, list_files, missing_hints, spelling
from rfdetr.data.layouts import ANNOTATIONS, YAML_NAMES
from rfdetr.data.yolo import label_path

STATUS_CODES = {
    "missing": "file-missing",
    "unreadable": "file-unreadable",
    "truncated": "file-truncated",
    "empty": "file-empty",
    "bomb": "file-bomb",
}
ABSOLUTE, UPWARDS = "is an absolute path", "leads outside the images folder"
OUTSIDE = (ABSOLUTE, UPWARDS)
PLAIN_CHARACTERS = frozenset(
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./()+=,@#~"
)
SERVICE_FILES = frozenset({ANNOTATIONS, *YAML_NAMES, "Thumbs.db", "desktop.ini", "classes.txt"})
APPLE_DOUBLE = b"\0\5\x16\7"  # the first bytes
SERVICE_SUFFIXES = frozenset({".json", ".cache", ".yaml", ".yml"})


@dataclass
class SplitFiles:
    """Path of each image record of a split; None for a file name that cannot be used."""

    table: SplitTable
    paths: list[str | None]
    facts: list[Inspected | None]
    inspected: bool = True

    @classmethod
    def unread(cls, table: SplitTable) -> SplitFiles:
        """A split whose images are not opened."""
        count = len(table.file_names)
        return cls(table, [None] * count, [None] * count, inspected=False)

    def usable(self) -> list[tuple[int, Inspected]]:
        """Rows whose image could be decoded."""
        return [
            (row, found)
            for row, found in enumerate(self.facts)
            if found is not None and found.facts.status == "ok"
        ]


def find_files(table: SplitTable, collector: Collector) -> SplitFiles:
    """Locate the files of a split; report bad names, wrong case and unreferenced files."""
    if table.label_files is not None:
        paths: list[str | None] = [str(table.images_dir / name) for name in table.file_names]
        _report_names(table, collector)
        _report_yolo_strays(table, collector)
        return SplitFiles(table, paths, [None] * len(paths))
    present, hidden = list_files(table.images_dir)
    _report_hidden(table, [table.images_dir / name for name in hidden], collector)
    listed = frozenset((*present, *hidden))
    folded = {fold(name): name for name in reversed(present)}
    paths, used = [], set()
    for row, name in enumerate(table.file_names):
        problem = _name_problem(name)
        if problem in OUTSIDE and (table.images_dir / name).is_file():
            collector.add("file-outside", f"{name!r} {problem}", **_record_place(table, row))
            paths.append(str(table.images_dir / name))
            continue
        if problem:
            collector.add("file-name-invalid", f"{name!r} {problem}", **_record_place(table, row))
            paths.append(None)
            continue
        clean = str(PurePosixPath(name))
        if clean not in listed and fold(clean) in folded:
            clean = _report_spelling(table, row, folded[fold(clean)], collector)
        used.add(clean)
        paths.append(str(table.images_dir / clean))
    _report_names(table, collector)
    used |= table.broken_names
    if table.readable:
        for name in present:
            if name not in used:
                _report_stray(table, table.images_dir / name, collector)
    return SplitFiles(table, paths, [None] * len(paths))


def _name_problem(name: str) -> str | None:
    if not name.strip():
        return "is empty"
    if "\0" in name or any("\ud800" <= character <= "\udfff" for character in name):
        return "contains characters that no file name can have"
    path = PurePosixPath(name)
    if path.is_absolute() or (len(name) > 1 and name[1] == ":"):
        return ABSOLUTE
    if ".." in path.parts:
        return UPWARDS
    if str(path) == ".":
        return "is a folder"
    return None


def _record_place(table: SplitTable, row: int) -> dict[str, Any]:
    return {**table.image_place(row), "details": {**table.image_details(row), "image": None}}


def _report_spelling(table: SplitTable, row: int, actual: str, collector: Collector) -> str:
    name = table.file_names[row]
    details = {**table.image_details(row), "actual": actual}
    place = {**table.image_place(row), "details": details}
    text = f"'{name}' is '{actual}' on disk, which differs {spelling(name, actual)}"
    collector.add("file-case", text, **place)
    return actual


def _report_names(table: SplitTable, collector: Collector) -> None:
    odd = [
        row
        for row, name in enumerate(table.file_names)
        if not PLAIN_CHARACTERS.issuperset(name) and not _name_problem(name)
    ]
    for row in collector.take("file-name-portability", odd):
        name = table.file_names[row]
        found = sorted(set(name) - PLAIN_CHARACTERS)
        text = f"'{name}' has {', '.join(map(repr, found[:5]))}"
        collector.note("file-name-portability", text, **table.file_place(row))


def _report_stray(table: SplitTable, path: Path, collector: Collector) -> None:
    """Report a file that no record names, unless it belongs to a tool or to the dataset."""
    where = {"split": table.name, "file": table.show(path)}
    if path.suffix.lower() in IMAGE_SUFFIXES:
        source = "annotation file" if table.label_files is None else "split"
        collector.add("file-unreferenced", f"no {source} lists this image", **where)
    elif path.suffix.lower() in UNREAD_SUFFIXES:
        text = f"images of the format {path.suffix} are not read; {CONVERT.format(path.suffix)}"
        collector.add("file-format", text, **where)
    elif not _is_service(path):
        collector.add("file-stray", "neither an image nor an annotation file", **where)


def _report_hidden(table: SplitTable, paths: Collection[Path], collector: Collector) -> None:
    """Report hidden images: copies of a tool, or images that somebody misses in training."""
    for path in paths:
        if path.suffix.lower() in IMAGE_SUFFIXES and not _is_apple_double(path):
            where = {"split": table.name, "file": table.show(path)}
            text = "images in hidden files and folders are not trained"
            collector.add("file-hidden", text, **where)


def _is_apple_double(path: Path) -> bool:
    """Whether macOS keeps attributes of another file in this one."""
    if not path.name.startswith("._"):
        return False
    try:
        with path.open("rb") as stream:
            return stream.read(len(APPLE_DOUBLE)) == APPLE_DOUBLE
    except OSError:
        return False


def _is_service(path: Path) -> bool:
    hidden = path.name.startswith(".") or path.name.lower().startswith("readme")
    return hidden or path.name in SERVICE_FILES or path.suffix.lower() in SERVICE_SUFFIXES


def _report_yolo_strays(table: SplitTable, collector: Collector) -> None:
    """Report label files without an image and other files next to the images."""
    assert table.split is not None
    labels = {table.folder / label for label in table.label_files or ()}
    images = {table.images_dir / name for name in table.file_names}
    sources = [source for source in table.split.images if source.is_dir()]
    hidden = {source / name for source in sources for name in list_files(source).hidden}
    _report_hidden(table, sorted(hidden), collector)
    beside = {image.with_suffix(".txt") for image in images} - labels
    for path in _files_beside(images):
        if path in beside:
            where = {"split": table.name, "file": table.show(path)}
            text = f"training reads the labels of this image from {_labels_of(table, path)}"
            collector.add("label-beside", text, **where)
        elif path not in images and path not in labels and path.suffix.lower() != ".txt":
            _report_stray(table, path, collector)
    for path in _files_beside(labels):
        if path.suffix.lower() == ".txt" and path not in labels | beside and not _is_service(path):
            where = {"split": table.name, "file": table.show(path)}
            collector.add("label-unreferenced", "this label file has no image", **where)


def _labels_of(table: SplitTable, beside: Path) -> str:
    """The label file of the image that has another text file beside it."""
    return table.show(label_path(beside))


def _files_beside(paths: Collection[Path]) -> list[Path]:
    """All files in the folders of `paths`."""
    folders = sorted({path.parent for path in paths})
    return [folder / n for folder in folders for n in list_files(folder).visible if "/" not in n]


def check_files(files: SplitFiles, collector: Collector) -> None:
    """Report what the inspection of each image found."""
    hints = _missing_hints(files)
    for row, found in enumerate(files.facts):
        path = files.paths[row]
        if found is None or path is None:
            continue
        place = files.table.file_place(row, files.table.show(Path(path)))
        facts = found.facts
        if facts.status != "ok":
            text = facts.detail or files.table.file_names[row]
            suffix = Path(path).suffix.lower()
            if facts.status == "unreadable" and suffix in UNREAD_SUFFIXES:
                text = f"the format {suffix} is not read; {CONVERT.format(suffix)}"
            if row in hints:
                text += f" ({hints[row]})"
            collector.add(STATUS_CODES[facts.status], text, **place)
        if facts.format and facts.status not in ("missing", "empty"):
            _check_header(facts, collector, place)


def _missing_hints(files: SplitFiles) -> dict[int, str]:
    """What may be meant by the names of missing files, by row."""
    rows = [
        row
        for row, found in enumerate(files.facts)
        if found is not None and found.facts.status == "missing"
    ]
    names = [files.table.file_names[row] for row in rows]
    found_hints = missing_hints(files.table.images_dir, names)
    return {row: hint for row, hint in zip(rows, found_hints, strict=True) if hint}


def _check_header(facts: ImageFacts, collector: Collector, place: dict[str, Any]) -> None:
    path = PurePosixPath(place["file"])
    if path.suffix.lower() not in FORMAT_SUFFIXES.get(facts.format, frozenset()):
        text = f"the content is {facts.format}, the extension is {path.suffix or 'missing'}"
        details = {**place["details"], "format": facts.format}
        collector.add("file-extension", text, **{**place, "details": details})
    if facts.mode and is_deep(facts.mode):
        text = f"levels of mode {facts.mode} are scaled to 8 bits by the range of the dataset"
        collector.add("image-mode", text, severity="info", repair="", **place)
    elif facts.mode and facts.mode not in PLAIN_MODES:
        collector.add("image-mode", f"colour mode {facts.mode}", **place)
    if facts.flat:
        collector.add("image-flat", facts.flat, **place)
    if facts.orientation != 1:
        text = f"EXIF orientation {facts.orientation}, stored {facts.width} x {facts.height}"
        collector.add("image-exif-rotated", text, **place)
    if facts.frames > 1:
        collector.add("image-animated", f"{facts.frames} frames", **place)
