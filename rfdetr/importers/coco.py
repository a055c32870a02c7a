"""COCO files under any name, with or without splits (https://cocodataset.org/#format-data)."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import numpy as np

from rfdetr.data.categories import exported_table
from rfdetr.data.coco_annotations import parse_segmentation
from rfdetr.data.coco_json import CocoFile, read_coco
from rfdetr.importers.records import (
    Collection,
    ImportedImage,
    ImportedObject,
    Polygons,
    SourceFiles,
    split_of,
    split_word,
)

OTHER_TASKS = ("person_keypoints", "captions", "stuff", "panoptic", "image_info")


def read_coco_files(files: SourceFiles, names: list[str]) -> Collection:
    """Read COCO files; `names` are those whose content is COCO.

    The file of an image is found by its name in any folder. A file name with "train", "val" or
    "test", or its folder, gives the split.
    """
    found = Collection("COCO")
    chosen = _detection_files(names)
    for name in names:
        if name not in chosen:
            found.notes.append(f"{name} is not read: it describes another task")
    seen: set[str] = set()
    classes: dict[str, None] = {}
    splits = {name: split_word(PurePosixPath(name).stem) or split_of(name) for name in chosen}
    for name in sorted(chosen, key=lambda name: (splits[name] is None, name)):
        coco = read_coco(files.path(name), tolerant=True, segmentation=False)
        _add_file(coco, name, splits[name], files=files, found=found, seen=seen, classes=classes)
    found.classes = list(classes)
    found.skip_unlisted(files.images, seen)
    return found


def _detection_files(names: list[str]) -> list[str]:
    stems = {name: PurePosixPath(name).stem.lower() for name in names}
    instances = [name for name in names if stems[name].startswith("instances")]
    return instances or [n for n in names if not stems[n].startswith(OTHER_TASKS)] or names


def _add_file(
    coco: CocoFile,
    name: str,
    split: str | None,
    *,
    files: SourceFiles,
    found: Collection,
    seen: set[str],
    classes: dict[str, None],
) -> None:
    for problem in coco.problems:
        found.skip(f"entries of {name} that cannot be read ({problem.code})", str(problem))
    table = exported_table(coco.categories, set(coco.annotations.category_ids.tolist()))
    names = {c.id: c.name.strip() for c in coco.categories if c.id in table.labels}
    classes.update(dict.fromkeys(names[key] for key in sorted(names)))
    entries: dict[int, ImportedImage | None] = {}
    for row, stated in enumerate(coco.images.names):
        image = files.find(stated, near=name, split=split)
        number = int(coco.images.ids[row])
        entries[number] = None
        if image is None:
            found.skip("images that are listed but missing", stated)
        elif image in seen:
            found.skip("images that are listed twice", image)
        else:
            seen.add(image)
            size = int(coco.images.widths[row]), int(coco.images.heights[row])
            entry = ImportedImage(image, split=split or split_of(image))
            entry.size = size if min(size) > 0 else None
            entries[number] = entry
            found.images.append(entry)
    _add_objects(coco, entries, names, found, name)


def _add_objects(
    coco: CocoFile,
    entries: dict[int, ImportedImage | None],
    names: dict[int, str],
    found: Collection,
    name: str,
) -> None:
    table = coco.annotations
    boxes = table.boxes.copy()
    boxes[:, 2:] += boxes[:, :2]
    for row in range(len(table.ids)):
        image = int(table.image_ids[row])
        label = names.get(int(table.category_ids[row]))
        if image not in entries:
            found.skip("annotations of an image that is not listed", f"{name}, image {image}")
        elif label is None:
            text = f"{name}, category {int(table.category_ids[row])}"
            found.skip("annotations of a category that is not listed", text)
        elif (entry := entries[image]) is not None and np.isfinite(boxes[row]).all():
            x0, y0, x1, y1 = boxes[row].tolist()
            outline = _outline(parse_segmentation(bytes(coco.texts[row])))
            crowd = bool(table.crowd[row])
            entry.objects.append(ImportedObject(label, (x0, y0, x1, y1), outline, crowd))


def _outline(value: Any) -> Polygons | dict[str, Any]:
    """Polygons or RLE; empty if the segmentation has another form."""
    if isinstance(value, dict) and "counts" in value and "size" in value:
        return value
    if isinstance(value, list) and all(isinstance(polygon, list) for polygon in value):
        return [polygon for polygon in value if len(polygon) >= 6 and len(polygon) % 2 == 0]
    return []
