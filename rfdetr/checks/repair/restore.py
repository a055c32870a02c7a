"""Restores what a COCO dataset means: file names, ids and values, before anything is dropped."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from rfdetr.checks.box_format import BoxFormat
from rfdetr.checks.repair.coco_boxes import as_coco, plain_box, restore_annotation
from rfdetr.checks.repair.coco_ids import (
    IdMap,
    agree_on_categories,
    is_id,
    number_annotations,
    unique_names,
)
from rfdetr.checks.repair.file_names import ImageFinder, Wanted, claimed_files
from rfdetr.checks.repair.tree import is_utf8, replace_text
from rfdetr.data.decode import file_size
from rfdetr.data.folders import list_files

Record = dict[str, Any]
SECTIONS = ("images", "annotations", "categories")


class CocoSplit(NamedTuple):
    """One annotation file of the copy, and its images folder relative to the copy."""

    name: str
    file: Path
    folder: str


class Document(NamedTuple):
    """The content of an annotation file and its three lists of objects."""

    split: CocoSplit
    content: Record
    images: list[Record]
    annotations: list[Record]
    categories: list[Record]


def read_document(file: Path) -> Record | None:
    """The object in an annotation file; None if it cannot be read."""
    data = file.read_bytes()
    for encoding in (None, "cp1252"):
        try:
            content = json.loads(data if encoding is None else data.decode(encoding))
        except (ValueError, RecursionError):
            continue
        return content if isinstance(content, dict) else None
    return None


def write_document(file: Path, content: Record) -> None:
    """Write an annotation file of the copy; the file may be a link to the source."""
    text = json.dumps(content, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(content)
    replace_text(file, text)


def restore_coco(
    root: Path, splits: list[CocoSplit], formats: Mapping[str, BoxFormat]
) -> Counter[str]:
    """Correct the annotation files of the copy `root` in place; return what was done how often.

    `formats` are those in which the boxes of a split are written, if not in that of COCO.
    """
    documents = []
    for split in splits:
        content = read_document(split.file)
        if content is not None:
            lists = ([r for r in _listed(content, s) if isinstance(r, dict)] for s in SECTIONS)
            documents.append(Document(split, content, *lists))
    done: Counter[str] = Counter()
    changed = _restore_names(root, documents, done)
    moved = agree_on_categories([(d.categories, d.annotations) for d in documents])
    done["made categories those of the first split"] += sum(moved)
    categories = _category_ids(documents)
    for document, agreed in zip(documents, moved, strict=True):
        before = done.total() - agreed
        if not is_utf8(document.split.file):
            done["saved as UTF-8"] += 1
        _restore_ids(document, categories, done)
        if document.split.name in formats:
            _convert_boxes(root, document, formats[document.split.name], done)
        _restore_values(document, done)
        if done.total() > before or document.split.name in changed:
            write_document(document.split.file, document.content)
    return +done


def _listed(content: Record, section: str) -> list[Any]:
    records = content.get(section)
    return records if isinstance(records, list) else []


def _restore_names(root: Path, documents: list[Document], done: Counter[str]) -> set[str]:
    """Use the files that the names mean; return the splits that changed."""
    folders = {document.split.name: document.split.folder for document in documents}
    present = {
        name: frozenset(list_files(root / folder).visible) for name, folder in folders.items()
    }
    names = {
        document.split.name: {
            str(PurePosixPath(image["file_name"])): image
            for image in document.images
            if isinstance(image.get("file_name"), str) and image["file_name"].strip()
        }
        for document in documents
    }
    claimed = claimed_files(
        folders, {name: [n for n in found if n in present[name]] for name, found in names.items()}
    )
    finder = ImageFinder(root, claimed)
    changed = set()
    for document in documents:
        name, folder = document.split.name, document.split.folder
        wanted = [
            Wanted(image["file_name"], _size(image))
            for file, image in names[name].items()
            if file not in present[name]
        ]
        found = finder.find_all(folder, wanted) if wanted else {}
        moved = {given: _within(root, folder, file) for given, file in found.items()}
        for image in document.images:
            given = image.get("file_name")
            new = moved.get(given) if isinstance(given, str) else None
            if new is not None:
                image["file_name"] = new
                done["found the file that a name means"] += 1
                changed.add(name)
    return changed


def _size(image: Record) -> tuple[int, int] | None:
    width, height = image.get("width"), image.get("height")
    if not is_id(width) or not is_id(height) or min(width, height) <= 0:
        return None
    return int(width), int(height)


def _within(root: Path, folder: str, file: str) -> str:
    """The name of a file relative to the images folder; it is moved there from elsewhere."""
    base = PurePosixPath(folder)
    path = PurePosixPath(file)
    if folder == "." or path.is_relative_to(base):
        return path.relative_to(base).as_posix()
    name, number = path.name, 1
    while (root / folder / name).exists():
        name = f"{path.stem}-{number}{path.suffix}"
        number += 1
    (root / file).rename(root / folder / name)
    return name


def _category_ids(documents: list[Document]) -> IdMap:
    """One table for all splits, so that they keep agreeing."""
    records = [record for document in documents for record in document.categories]
    first = {(repr(record.get("id")), record.get("name")): record for record in reversed(records)}
    names = unique_names(first.values(), "name", lambda name: (name,))
    return IdMap((record.get("id") for record in records), names)


def _restore_ids(document: Document, categories: IdMap, done: Counter[str]) -> None:
    names = unique_names(document.images, "file_name", _stems)
    ids = IdMap((image.get("id") for image in document.images), names)
    for record in document.images:
        _translate(record, "id", ids.of_record(record.get("id")), "image ids", done)
    for record in document.categories:
        _translate(record, "id", categories.of_record(record.get("id")), "category ids", done)
    for record in document.annotations:
        image = ids.of_reference(record.get("image_id"))
        _translate(record, "image_id", image, "image ids of annotations", done)
        category = categories.of_reference(record.get("category_id"))
        _translate(record, "category_id", category, "category ids of annotations", done)
    _free_duplicates(document, ids, done)
    numbered = number_annotations(document.annotations)
    if numbered:
        done["gave annotations an id of their own"] += numbered


def _stems(name: str) -> tuple[str, ...]:
    path = PurePosixPath(name.replace("\\", "/"))
    return name, path.name, path.stem


def _translate(record: Record, key: str, value: Any, what: str, done: Counter[str]) -> None:
    if key in record and value is not record[key] and value != record[key]:
        record[key] = value
        done[f"made integers of {what}"] += 1


def _free_duplicates(document: Document, ids: IdMap, done: Counter[str]) -> None:
    """New ids for images with an id that another image has, if no annotation refers to it."""
    referred = {record.get("image_id") for record in document.annotations if _hashable(record)}
    seen: set[Any] = set()
    for image in document.images:
        number = image.get("id")
        if not is_id(number):
            continue
        if number in seen and number not in referred:
            image["id"] = ids.free()
            done["gave images an id of their own"] += 1
        seen.add(number)


def _hashable(record: Record) -> bool:
    return isinstance(record.get("image_id"), int | float | str)


def _convert_boxes(root: Path, document: Document, written: BoxFormat, done: Counter[str]) -> None:
    images = {image["id"]: image for image in document.images if is_id(image.get("id"))}
    sizes: dict[Any, tuple[int, int] | None] = {}
    for record in document.annotations:
        number, box = record.get("image_id"), plain_box(record.get("bbox"))
        image = images.get(number) if is_id(number) else None
        if image is None or box is None:
            continue
        if number not in sizes:
            file = root / document.split.folder / str(image.get("file_name"))
            sizes[number] = _size(image) or file_size(file)
        size = sizes[number]
        if size is not None:
            record["bbox"] = as_coco(box, size, written)
            done["converted boxes"] += 1


def _restore_values(document: Document, done: Counter[str]) -> None:
    images: Mapping[Any, Record] = {
        image["id"]: image for image in document.images if is_id(image.get("id"))
    }
    for image in document.images:
        for key in ("width", "height"):
            if image.get(key) is not None and not is_id(image[key]):
                del image[key]
                done["corrected values"] += 1
    for category in document.categories:
        name, parent = category.get("name"), category.get("supercategory")
        if isinstance(name, int) and not isinstance(name, bool):
            category["name"] = str(name)
            done["corrected values"] += 1
        if parent is not None and not isinstance(parent, str):
            category["supercategory"] = "none"
            done["corrected values"] += 1
    for record in document.annotations:
        number = record.get("image_id")
        corrected = restore_annotation(record, images.get(number) if is_id(number) else None)
        if corrected:
            done["corrected values"] += corrected
