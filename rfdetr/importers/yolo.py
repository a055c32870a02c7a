"""YOLO label files with or without splits: data.yaml, Darknet's obj.data, or only classes.txt."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from rfdetr.data.data_yaml import class_names, keypoint_values, read_data_yaml
from rfdetr.data.decode import file_size
from rfdetr.data.layouts import yolo_splits
from rfdetr.data.text import read_text, split_lines
from rfdetr.data.yolo import LabelFiles, image_files
from rfdetr.data.yolo_labels import read_labels
from rfdetr.errors import DatasetError
from rfdetr.importers.json_files import read_json
from rfdetr.importers.records import (
    Collection,
    ImportedImage,
    ImportedObject,
    SourceFiles,
    split_of,
)

NAME_FILES = ("classes.txt", "obj.names", "labels.txt", "_darknet.labels", "classes.names")
YAML_SUFFIXES = (".yaml", ".yml")


def read_yolo(files: SourceFiles) -> Collection:
    """Read the label files of all images; an image without one has no objects."""
    found = Collection("YOLO")
    content, yaml_file = find_yaml(files)
    problems: list[str] = []
    keypoints = keypoint_values(content, problems)
    names = list(class_names(content, problems)) if content else _names(files)
    if problems:
        raise DatasetError(f"{yaml_file}: {' '.join(problems)}")
    if not names:
        raise DatasetError(
            f"{files.root}: YOLO labels without class names. Add data.yaml with `names: [...]`, or "
            "classes.txt with one name per line, in the order of the class numbers."
        )
    found.classes = names
    splits = _yaml_splits(files, content, yaml_file, found)
    labels = LabelFiles()
    for image in files.images:
        if splits and image not in splits:
            found.skip("images that data.yaml does not list", image)
            continue
        rows, wrong = read_labels(labels.of(files.path(image)), len(names), keypoints)
        for problem in wrong:
            found.skip(f"label lines that cannot be read ({problem.code})", f"{image}: {problem}")
        entry = ImportedImage(image, split=splits.get(image) or split_of(image))
        size = file_size(files.path(image)) if rows else None
        if size:
            for row in rows:
                entry.objects.append(_object(names[row.label], row.box, row.polygon, size))
        found.images.append(entry)
    return found


def _object(
    label: str,
    box: tuple[float, float, float, float],
    polygon: list[float],
    size: tuple[int, int],
) -> ImportedObject:
    width, height = size
    x0, y0, x1, y1 = box
    outline = [v * (height if i % 2 else width) for i, v in enumerate(polygon)]
    pixels = (x0 * width, y0 * height, x1 * width, y1 * height)
    return ImportedObject(label, pixels, [outline] if outline else [])


def find_yaml(files: SourceFiles) -> tuple[Mapping[str, Any], Path]:
    """Content and place of the YAML file with `names`; empty without one."""
    for name in sorted(files.with_suffix(*YAML_SUFFIXES), key=lambda name: name.count("/")):
        try:
            content = read_data_yaml(files.path(name))
        except DatasetError:
            continue
        if "names" in content:
            return content, files.path(name)
    return {}, files.root / "data.yaml"


def has_names(files: SourceFiles) -> bool:
    """Whether a text file names the classes."""
    return any(PurePosixPath(name).name.lower() in NAME_FILES for name in files.names)


def _names(files: SourceFiles) -> list[str]:
    for name in files.names:
        if PurePosixPath(name).name.lower() in NAME_FILES:
            try:
                lines = split_lines(read_text(files.path(name)))
            except UnicodeError as error:
                raise DatasetError(f"{files.path(name)}: {error}.") from None
            return [line.strip() for line in lines if line.strip()]
    for name in files.names:  # of Label Studio
        if PurePosixPath(name).name == "notes.json":
            notes = read_json(files.path(name))
            if isinstance(notes, dict) and isinstance(notes.get("categories"), list):
                return list(_note_names(notes["categories"]))
    return []


def _note_names(categories: list[Any]) -> Iterator[str]:
    known = [c for c in categories if isinstance(c, dict) and isinstance(c.get("id"), int)]
    for category in sorted(known, key=lambda c: int(c["id"])):
        yield str(category.get("name"))


def _yaml_splits(
    files: SourceFiles, content: Mapping[str, Any], yaml_file: Path, found: Collection
) -> dict[str, str]:
    """Image -> split as data.yaml says, only images below the source folder."""
    if not any(content.get(key) for key in ("train", "val", "valid", "test")):
        return {}
    problems: list[str] = []
    known = {files.path(name).as_posix(): name for name in files.images}
    splits: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        listed = yolo_splits(yaml_file, content, problems, found.notes)
    found.notes += problems
    for split in listed.values():
        for path in image_files(split):
            if path.as_posix() in known:
                splits.setdefault(known[path.as_posix()], split.name)
    return splits
