"""Which annotation format a folder has, and what to do about those that are not read."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from rfdetr.data.foreign import ADVICE, SAMPLES, json_kind, root_tag
from rfdetr.data.layouts import found_in
from rfdetr.data.text import read_text
from rfdetr.data.yolo import LabelFiles
from rfdetr.errors import DatasetError
from rfdetr.importers.archive import ARCHIVES
from rfdetr.importers.coco import read_coco_files
from rfdetr.importers.cvat import read_cvat
from rfdetr.importers.label_studio import read_label_studio
from rfdetr.importers.labelme import read_labelme
from rfdetr.importers.pascal_voc import read_pascal_voc
from rfdetr.importers.records import Collection, SourceFiles
from rfdetr.importers.yolo import find_yaml, has_names, read_yolo

READERS: dict[str, Callable[[SourceFiles], Collection]] = {
    "coco": lambda files: read_coco_files(files, coco_names(files)),
    "cvat": read_cvat,
    "voc": read_pascal_voc,
    "labelme": read_labelme,
    "label-studio": read_label_studio,
    "yolo": read_yolo,
}


def read_source(root: Path, format_name: str | None = None) -> Collection:
    """Read a folder in the format that its files have, or in the one that is named.

    Raises DatasetError that names a format which cannot be read and the export that can.
    """
    files = SourceFiles(root)
    kinds = {kind for _, kind in _json_kinds(files)}
    present = list(_formats(files, kinds))
    name = format_name or next(iter(present), None)
    if name is None:
        raise DatasetError(f"{root}: {_foreign(files, kinds)}")
    found = READERS[name](files)
    found.root = files.root
    others = [other for other in present if other != name]
    if others and format_name is None:
        text = f"annotations in other formats are not read: {', '.join(others)}"
        found.notes.append(f"{text} (`import --format` reads one)")
    if not found.images:
        raise DatasetError(f"{root}: {_nothing(found, files)}")
    return found


def _formats(files: SourceFiles, json_kinds: set[str]) -> Iterator[str]:
    """The formats of which the folder has annotation files."""
    tags = {root_tag(files.path(name)) for name in files.with_suffix(".xml")[:SAMPLES]}
    if "coco" in json_kinds:
        yield "coco"
    if "annotations" in tags:
        yield "cvat"
    if "annotation" in tags:
        yield "voc"
    yield from (kind for kind in ("labelme", "label-studio") if kind in json_kinds)
    if _has_labels(files):
        yield "yolo"


def coco_names(files: SourceFiles) -> list[str]:
    """The JSON files whose content is COCO."""
    return [name for name, kind in _json_kinds(files) if kind == "coco"]


def _json_kinds(files: SourceFiles) -> Iterator[tuple[str, str]]:
    """JSON files with their formats; of many files, a part is opened.

    COCO files are few and lie at the top, files per image are many.
    """
    names = sorted(files.with_suffix(".json"), key=lambda name: (name.count("/"), name))
    per_folder = itertools.groupby(sorted(names, key=_folder), key=_folder)
    for _, inside in per_folder:
        for name in itertools.islice(inside, SAMPLES):
            if kind := json_kind(files.path(name)):
                yield name, kind


def _folder(name: str) -> str:
    return str(PurePosixPath(name).parent)


def _has_labels(files: SourceFiles) -> bool:
    """Whether images have YOLO label files, or a YAML file names classes.

    Where another file names the classes, empty label files count, too.
    """
    if find_yaml(files)[0]:
        return True
    labels = LabelFiles()
    step = max(1, len(files.images) // SAMPLES)
    paths = [labels.of(files.path(image)) for image in files.images[::step]]
    return any(map(_is_label, paths)) or (has_names(files) and any(p.is_file() for p in paths))


def _is_label(path: Path) -> bool:
    try:
        words = read_text(path).strip().split("\n", 1)[0].split()
        return len(words) >= 5 and all(map(_is_number, words))
    except (OSError, ValueError):
        return False


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _foreign(files: SourceFiles, json_kinds: set[str]) -> str:
    """A sentence about a folder in no format that is read."""
    if kind := next((kind for kind in ADVICE if kind in json_kinds), None):
        return f"this is {ADVICE[kind]}."
    if files.with_suffix(".tfrecord", ".tfrecords"):
        return "TFRecord files; export the dataset as COCO or Pascal VOC."
    if files.with_suffix(".csv") and not files.with_suffix(".xml", ".json"):
        return (
            "annotations in CSV files, which have no common form; export the dataset as COCO, "
            "Pascal VOC or YOLO."
        )
    return _without_annotations(files)


def _without_annotations(files: SourceFiles) -> str:
    """A sentence about a folder without annotation files."""
    archives = [name for name in files.names if name.lower().endswith(ARCHIVES)]
    if archives and not files.images:
        return (
            f"it contains only archives ({archives[0]}); unpack them, and name one of the folders."
        )
    if not files.names:
        return "it is empty; name the folder with the images and their annotations."
    if len(files.images) == len(files.names):
        return (
            f"images ({len(files.images)}) without annotations. Put the annotation files beside "
            "them, or label the images first, for example with CVAT, Label Studio or labelme."
        )
    known = "COCO, Pascal VOC, CVAT for images, labelme, Label Studio (JSON), YOLO"
    return f"no annotations in a format that is read ({known}). {found_in(files.root)}"


def _nothing(found: Collection, files: SourceFiles) -> str:
    if not files.images:
        return (
            f"{found.format} annotations, but no images. Export again with the images (CVAT: 'Save "
            "images'; Label Studio: a format 'with Images'), or put them into this folder."
        )
    why = "; ".join(f"{len(what)} {reason}" for reason, what in found.skipped.items())
    return f"{found.format}: no image can be used ({why or 'none is listed'})."
