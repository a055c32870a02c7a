"""Pascal VOC: one XML file per image (http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/)."""

from __future__ import annotations

import math
from pathlib import PurePosixPath
from xml.etree.ElementTree import Element

from rfdetr.importers.records import (
    Box,
    Collection,
    ImportedImage,
    ImportedObject,
    SourceFiles,
    around,
    split_of,
)
from rfdetr.importers.xml_files import roots

LISTS = {"train": "train", "val": "val", "test": "test"}
CORNERS = ("xmin", "ymin", "xmax", "ymax")


def read_pascal_voc(files: SourceFiles) -> Collection:
    """Read all XML files whose root is <annotation>.

    Coordinates count from 1 and the last pixel is inside, as the standard says, unless a corner at
    0 or between pixels shows that the tool counts from 0.
    """
    found = Collection("Pascal VOC")
    lists = _image_sets(files)
    annotated = set()
    for name, root in roots(files, "annotation", found):
        split = split_of(name)
        image = files.find_of(name, root.findtext("filename"), split)
        if image is None:
            found.skip("annotation files without their image", name)
            continue
        if image in annotated:
            found.skip("annotation files of an image that has one already", name)
            continue
        annotated.add(image)
        stem = PurePosixPath(name).stem
        if lists and stem not in lists:
            found.skip("images that ImageSets does not list", image)
            continue
        entry = ImportedImage(image, split=lists.get(stem) or split or split_of(image))
        entry.size = _size(root)
        entry.objects = list(_objects(root, name, found))
        found.images.append(entry)
    for image in files.images:
        if image not in annotated and _is_photo(image):
            found.skip("images without an annotation file", image)
    _count_from_zero(found)
    return found


def _is_photo(name: str) -> bool:
    return not {"SegmentationClass", "SegmentationObject"} & set(PurePosixPath(name).parts)


def _size(root: Element) -> tuple[int, int] | None:
    try:
        width, height = (int(float(root.findtext(f"size/{k}") or 0)) for k in ("width", "height"))
    except (ValueError, OverflowError):
        return None
    return (width, height) if width > 0 and height > 0 else None


def _objects(root: Element, name: str, found: Collection) -> list[ImportedObject]:
    objects = []
    for item in root.iter("object"):
        label = (item.findtext("name") or "").strip()
        if not label:
            found.skip("objects without a class name", name)
            continue
        polygons = [points for part in item.findall("polygon") if (points := _polygon(part))]
        box = _box(item) or (around(polygons) if polygons else None)
        if box is None:
            found.skip("objects without a box of four numbers", name)
            continue
        objects.append(ImportedObject(label, box, polygons))
    return objects


def _box(item: Element) -> Box | None:
    try:
        x0, y0, x1, y1 = (float(item.findtext(f"bndbox/{key}") or "nan") for key in CORNERS)
    except ValueError:
        return None
    if not all(map(math.isfinite, (x0, y0, x1, y1))):
        return None
    return min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)


def _polygon(part: Element) -> list[float]:
    """x1, y1, x2, y2 ... as Roboflow and supervision write them, or <pt><x/><y/></pt> elements."""
    values: list[float] = []
    try:
        if part.find("pt") is not None:
            texts = [t for p in part.findall("pt") for t in (p.findtext("x"), p.findtext("y"))]
        else:
            numbers = range(1, len(part) // 2 + 1)
            texts = [t for i in numbers for t in (part.findtext(f"x{i}"), part.findtext(f"y{i}"))]
        values = [float(text or "nan") for text in texts]
    except ValueError:
        return []
    return values if len(values) >= 6 and all(map(math.isfinite, values)) else []


def _image_sets(files: SourceFiles) -> dict[str, str]:
    """Stem -> split, from ImageSets/Main; empty without a train and a val list."""
    lists: dict[str, str] = {}
    seen = set()
    for name in files.with_suffix(".txt"):
        path = PurePosixPath(name)
        if "ImageSets" in path.parts and path.stem.lower() in LISTS:
            split = LISTS[path.stem.lower()]
            seen.add(split)
            for line in files.path(name).read_text("utf-8", "replace").splitlines():
                listed = PurePosixPath(line.strip())  # mostly without a suffix
                for key in {listed.name, listed.stem} - {""}:
                    lists.setdefault(key, split)
    return lists if {"train", "val"} <= seen else {}


def _count_from_zero(found: Collection) -> None:
    """Turn corners that count from 1 into edges that count from 0, for the complete dataset."""
    boxes = [item.box for image in found.images for item in image.objects]
    from_zero = any(min(box[:2]) <= 0 or any(v != int(v) for v in box) for box in boxes)
    if from_zero:
        found.notes.append("coordinates count from 0 (a corner at 0 or between pixels shows it)")
        return
    for image in found.images:
        image.objects = [_shifted(item) for item in image.objects]


def _shifted(item: ImportedObject) -> ImportedObject:
    x0, y0, x1, y1 = item.box
    outline = item.outline
    if isinstance(outline, list):
        outline = [[value - 1 for value in polygon] for polygon in outline]
    return ImportedObject(item.label, (x0 - 1, y0 - 1, x1, y1), outline, item.crowd)
