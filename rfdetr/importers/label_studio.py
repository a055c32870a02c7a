"""Label Studio's JSON and JSON-MIN exports (https://labelstud.io/guide/export)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, urlsplit

from rfdetr.data.foreign import is_label_studio_task, is_region
from rfdetr.importers.json_files import read_json
from rfdetr.importers.masks import ellipse, turned
from rfdetr.importers.records import (
    Collection,
    ImportedImage,
    ImportedObject,
    SourceFiles,
    bounds,
    split_of,
)

UPLOAD_PREFIX = 8  # hexadecimal digits and a dash before the name of an uploaded file


def read_label_studio(files: SourceFiles) -> Collection:
    """Read the tasks of every JSON file: rectangles, polygons and ellipses, in percent."""
    found = Collection("Label Studio", upright=True)
    known, listed = set(), set()
    for name in files.with_suffix(".json"):
        tasks = read_json(files.path(name))
        if tasks is None:
            found.skip("JSON files that cannot be read", name)
        tasks = tasks if isinstance(tasks, list) else [tasks]
        for task in tasks:
            if not isinstance(task, dict) or not is_label_studio_task(task):
                continue
            entry = _image(task, name, files, found)
            if entry is None:
                continue
            listed.add(entry.name)
            if entry.name in known:
                found.skip("tasks of an image that has one already", entry.name)
                continue
            regions = _regions(task, entry.name, found)
            if regions is None:
                found.skip("tasks that nobody has annotated", entry.name)
                continue
            known.add(entry.name)
            _add_objects(regions, entry, found)
            found.images.append(entry)
    found.skip_unlisted(files.images, listed)
    return found


def _image(
    task: dict[str, Any], name: str, files: SourceFiles, found: Collection
) -> ImportedImage | None:
    data = task["data"] if isinstance(task.get("data"), dict) else task
    texts = [value for value in data.values() if isinstance(value, str)]
    if isinstance(task.get("file_upload"), str):
        texts.append(task["file_upload"])
    for text in texts:
        for wanted in _file_names(text):
            image = files.find(wanted, near=name)
            if image is not None:
                return ImportedImage(image, split=split_of(image))
    found.skip("tasks without their image", texts[0] if texts else f"task {task.get('id')}")
    return None


def _file_names(text: str) -> Iterator[str]:
    """Names that an address may have on disk: as it is, of a local file, without upload prefix."""
    try:
        parts = urlsplit(text)
    except ValueError:
        return
    local = parse_qs(parts.query).get("d", [])
    for path in (*local, parts.path, text):
        yield path
        folder, base = PurePosixPath(path).parent, PurePosixPath(path).name
        prefix, dash, rest = base.partition("-")
        if dash and rest and len(prefix) == UPLOAD_PREFIX:
            yield (folder / rest).as_posix()


def _regions(task: dict[str, Any], image: str, found: Collection) -> list[Any] | None:
    """The regions of the last annotation that was not cancelled; None without any."""
    annotations = task.get("annotations", task.get("completions"))
    if not isinstance(annotations, list):  # JSON-MIN
        lists = (v for v in task.values() if isinstance(v, list) and v and all(map(is_region, v)))
        return [{"value": value, **value} for value in next(lists, [])]
    done = [a for a in annotations if isinstance(a, dict) and not a.get("was_cancelled")]
    for _ in done[:-1]:
        found.skip("annotations of an image that has a later one", image)
    return list(done[-1].get("result") or []) if done else None


def _add_objects(regions: list[Any], entry: ImportedImage, found: Collection) -> None:
    seen: set[str] = set()
    for region in regions:
        if not isinstance(region, dict) or not isinstance(region.get("value"), dict):
            continue
        value, size = region["value"], _size(region)
        labels = next((v for k, v in value.items() if k.endswith("labels") and v), None)
        kind = str(region.get("type", ""))
        if not isinstance(labels, list):
            # the shape of a region whose label is another result with the same id
            continue
        identity = str(region.get("id", len(seen)))
        if identity in seen:
            continue
        made = _object(str(labels[0]).strip(), value, size) if size else None
        if made is None:
            what = kind or "other"
            found.skip(f"{what} regions, which are neither a box nor an outline", entry.name)
            continue
        seen.add(identity)
        entry.size = size
        entry.objects.append(made)


def _size(region: dict[str, Any]) -> tuple[int, int] | None:
    size = (region.get("original_width"), region.get("original_height"))
    if all(isinstance(v, int | float) and v > 0 for v in size):
        return int(size[0]), int(size[1])  # type: ignore[arg-type]
    return None


def _object(label: str, value: dict[str, Any], size: tuple[int, int]) -> ImportedObject | None:
    width, height = size[0] / 100, size[1] / 100
    try:
        if "points" in value:
            points = [
                float(v) * s for x, y in value["points"] for v, s in ((x, width), (y, height))
            ]
            usable = len(points) >= 6 and all(map(math.isfinite, points))
            return ImportedObject(label, bounds(points), [points]) if usable else None
        x, y = float(value["x"]) * width, float(value["y"]) * height
        degrees = float(value.get("rotation") or 0)
        if "radiusX" in value:
            rx, ry = float(value["radiusX"]) * width, float(value["radiusY"]) * height
            points = ellipse(x, y, rx, ry, degrees)
            return ImportedObject(label, bounds(points), [points])
        w, h = float(value["width"]) * width, float(value["height"]) * height
    except (KeyError, TypeError, ValueError):
        return None
    if not all(map(math.isfinite, (x, y, w, h, degrees))):
        return None
    if not degrees:
        return ImportedObject(label, (x, y, x + w, y + h))
    points = turned([(0, 0), (w, 0), (w, h), (0, h)], x, y, degrees)  # around its first corner
    return ImportedObject(label, bounds(points), [points])
