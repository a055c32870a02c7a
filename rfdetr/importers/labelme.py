"""labelme, AnyLabeling and X-AnyLabeling: one JSON file per image."""

from __future__ import annotations

import base64
import binascii
import io
import math
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from rfdetr.data.decode import FAILURES, open_image
from rfdetr.importers.json_files import read_json
from rfdetr.importers.masks import circle, rle_of
from rfdetr.importers.records import (
    Collection,
    ImportedImage,
    ImportedObject,
    SourceFiles,
    around,
    bounds,
    split_of,
)

SUFFIX = {"JPEG": ".jpg", "PNG": ".png", "BMP": ".bmp", "TIFF": ".tif", "WEBP": ".webp"}


def read_labelme(files: SourceFiles) -> Collection:
    """Read every JSON file with `shapes`. Shapes of one label and group are one object."""
    found = Collection("labelme", upright=True)
    annotated = set()
    for name in files.with_suffix(".json"):
        data = read_json(files.path(name))
        if data is None:
            found.skip("JSON files that cannot be read", name)
        if not isinstance(data, dict) or not isinstance(data.get("shapes"), list):
            continue
        entry = _image(data, name, files, found)
        if entry is None:
            continue
        if entry.name in annotated:
            found.skip("annotation files of an image that has one already", name)
            continue
        annotated.add(entry.name)
        entry.objects = list(_objects(data["shapes"], entry, name, found))
        found.images.append(entry)
    for image in files.images:
        if image not in annotated:
            found.skip("images without an annotation file", image)
    return found


def _image(
    data: dict[str, Any], name: str, files: SourceFiles, found: Collection
) -> ImportedImage | None:
    split = split_of(name)
    image = files.find_of(name, data.get("imagePath"), split)
    size = (data.get("imageWidth"), data.get("imageHeight"))
    known = (size[0], size[1]) if all(type(v) is int and v > 0 for v in size) else None
    if image is not None:
        return ImportedImage(image, split=split or split_of(image), size=known)  # type: ignore[arg-type]
    content = data.get("imageData")
    try:
        raw = base64.b64decode(content or "", validate=True)
        with open_image(raw) as opened:
            suffix = SUFFIX.get(opened.format or "", ".png")
    except (*FAILURES, binascii.Error, TypeError):
        found.skip("annotation files without their image", name)
        return None
    own = PurePosixPath(name).with_suffix(suffix).as_posix()
    return ImportedImage(own, split=split, size=known, content=raw)  # type: ignore[arg-type]


def _objects(
    shapes: list[Any], entry: ImportedImage, name: str, found: Collection
) -> list[ImportedObject]:
    objects: list[ImportedObject] = []
    groups: dict[tuple[str, Any], int] = {}
    for shape in shapes:
        made = _object(shape, entry, name, found)
        if made is None:
            continue
        group = shape.get("group_id")
        key = (made.label, group)
        joinable = isinstance(made.outline, list) and made.outline
        if isinstance(group, int | str) and joinable and key in groups:
            before = objects[groups[key]]
            assert isinstance(before.outline, list) and isinstance(made.outline, list)
            outline = [*before.outline, *made.outline]
            objects[groups[key]] = ImportedObject(made.label, around(outline), outline)
            continue
        if isinstance(group, int | str) and joinable:
            groups[key] = len(objects)
        objects.append(made)
    return objects


def _object(
    shape: Any, entry: ImportedImage, name: str, found: Collection
) -> ImportedObject | None:
    label = shape.get("label") if isinstance(shape, dict) else None
    if not isinstance(label, str) or not label.strip():
        found.skip("objects without a class name", name)
        return None
    kind = shape.get("shape_type") or "polygon"
    points = _points(shape.get("points"))
    made = _mask(shape, points, entry) if kind == "mask" else None
    if made is not None:
        return ImportedObject(label.strip(), *made)
    if kind == "rectangle" and len(points) >= 4:  # two or four corners
        return ImportedObject(label.strip(), bounds(points))
    if kind == "circle" and len(points) == 4:
        x, y, edge_x, edge_y = points
        points = circle(x, y, math.hypot(edge_x - x, edge_y - y))
    if kind in ("polygon", "rotation", "circle") and len(points) >= 6:
        return ImportedObject(label.strip(), bounds(points), [points])
    found.skip(f"{kind} shapes, which are neither a box nor an outline", name)
    return None


def _points(value: Any) -> list[float]:
    """x, y, x, y ...; empty if anything is not a finite number."""
    try:
        points = [float(number) for pair in value for number in (pair[0], pair[1])]
    except (TypeError, ValueError, IndexError, KeyError):
        return []
    return points if all(map(math.isfinite, points)) else []


def _mask(
    shape: dict[str, Any], points: list[float], entry: ImportedImage
) -> tuple[tuple[float, float, float, float], dict[str, Any]] | None:
    """Box and RLE of a mask that is stored as a PNG of its box."""
    if len(points) != 4 or entry.size is None:
        return None
    try:
        raw = base64.b64decode(shape.get("mask") or "", validate=True)
        with Image.open(io.BytesIO(raw), formats=["PNG"]) as image:
            part = np.asarray(image.convert("L")) > 0
    except (*FAILURES, binascii.Error, TypeError):
        return None
    return rle_of(part, int(points[0]), int(points[1]), entry.size)
