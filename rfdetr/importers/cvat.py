"""CVAT's own XML, "CVAT for images 1.1" (https://docs.cvat.ai/docs/manual/advanced/xml_format/)."""

from __future__ import annotations

import math
from xml.etree.ElementTree import Element

import numpy as np

from rfdetr.errors import DatasetError
from rfdetr.importers.masks import ellipse, rle_of, turned
from rfdetr.importers.records import (
    Collection,
    ImportedImage,
    ImportedObject,
    SourceFiles,
    around,
    bounds,
    split_of,
    split_word,
)
from rfdetr.importers.xml_files import roots

SHAPES = ("box", "polygon", "mask", "ellipse")


def read_cvat(files: SourceFiles) -> Collection:
    """Read every XML file whose root is <annotations>. Raises DatasetError for a video task."""
    found = Collection("CVAT for images", upright=True)
    for name, root in roots(files, "annotations", found):
        if root.find("track") is not None:
            raise DatasetError(
                f"{files.path(name)}: tracks of a video. In CVAT, export the task as 'CVAT for "
                "images 1.1' or 'COCO 1.0' with 'Save images', which has every frame as an image."
            )
        classes = [(n.text or "").strip() for n in root.iterfind(".//labels/label/name")]
        found.classes += [c for c in dict.fromkeys(classes) if c and c not in found.classes]
        for image in root.iterfind("image"):
            _add_image(image, name, files, found)
    found.skip_unlisted(files.images, {image.name for image in found.images})
    used = {item.label for image in found.images for item in image.objects}
    found.classes = [c for c in found.classes if c in used] or found.classes
    return found


def _add_image(element: Element, name: str, files: SourceFiles, found: Collection) -> None:
    stated = element.get("name") or ""
    split = split_word(element.get("subset") or "")
    image = files.find(stated, near=name, split=split) if stated else None
    if image is None:
        found.skip("images that are listed but missing", stated)
        return
    if any(known.name == image for known in found.images[-1:]):
        found.skip("images that are listed twice", image)
        return
    entry = ImportedImage(image, split=split or split_of(image), size=_size(element))
    for shape in element:
        made = _object(shape, entry)
        if made is not None:
            entry.objects.append(made)
        elif shape.tag != "tag":
            kind = shape.tag if shape.tag not in SHAPES else f"{shape.tag} with wrong numbers"
            found.skip(f"{kind} shapes, which are neither a box nor an outline", image)
    found.images.append(entry)


def _size(element: Element) -> tuple[int, int] | None:
    try:
        size = int(element.get("width") or 0), int(element.get("height") or 0)
    except ValueError:
        return None
    return size if min(size) > 0 else None


def _object(shape: Element, entry: ImportedImage) -> ImportedObject | None:
    label = (shape.get("label") or "").strip()
    if not label or shape.tag not in SHAPES:
        return None
    try:
        if shape.tag == "box":
            return _box(shape, label)
        if shape.tag == "mask":
            return _mask(shape, label, entry.size)
        points = _polygon(shape) if shape.tag == "polygon" else _ellipse(shape)
    except (ValueError, OverflowError, MemoryError):
        return None
    return ImportedObject(label, bounds(points), [points])


def _polygon(shape: Element) -> list[float]:
    points = [float(v) for pair in (shape.get("points") or "").split(";") for v in pair.split(",")]
    if len(points) < 6 or len(points) % 2 or not all(map(math.isfinite, points)):
        raise ValueError
    return points


def _ellipse(shape: Element) -> list[float]:
    cx, cy, rx, ry = _numbers(shape, "cx", "cy", "rx", "ry")
    return ellipse(cx, cy, rx, ry, float(shape.get("rotation") or 0))


def _numbers(shape: Element, *names: str) -> list[float]:
    values = [float(shape.get(name) or "nan") for name in names]
    if not all(map(math.isfinite, values)):
        raise ValueError
    return values


def _box(shape: Element, label: str) -> ImportedObject:
    x0, y0, x1, y1 = _numbers(shape, "xtl", "ytl", "xbr", "ybr")
    degrees = float(shape.get("rotation") or 0)
    if not degrees:
        return ImportedObject(label, (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)))
    w, h = (x1 - x0) / 2, (y1 - y0) / 2
    outline = [turned([(-w, -h), (w, -h), (w, h), (-w, h)], x0 + w, y0 + h, degrees)]
    return ImportedObject(label, around(outline), outline)


def _mask(shape: Element, label: str, size: tuple[int, int] | None) -> ImportedObject | None:
    """Run lengths of background and mask in turn, row by row within the mask's box."""
    left, top, width, height = (int(v) for v in _numbers(shape, "left", "top", "width", "height"))
    runs = [int(text) for text in (shape.get("rle") or "").split(",")]
    if size is None or min(runs) < 0 or not 0 < width * height <= size[0] * size[1]:
        return None
    if sum(runs) > width * height:
        return None
    flat = np.zeros(width * height, bool)
    at = 0
    for number, run in enumerate(runs):
        flat[at : at + run] = number % 2 == 1
        at += run
    made = rle_of(flat.reshape(height, width), left, top, size)
    return None if made is None else ImportedObject(label, *made)
