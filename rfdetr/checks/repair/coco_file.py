"""Repairs of a COCO annotation file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rfdetr.checks.dataset_report import Finding
from rfdetr.checks.image_probe import probe_bytes, read_content
from rfdetr.checks.repair.coco_ids import hashable
from rfdetr.checks.repair.plan import Planned
from rfdetr.checks.repair.restore import SECTIONS, read_document, write_document

DROPS = frozenset({"drop-annotation", "drop-record", "drop-image"})
Record = dict[str, Any]


def repair_coco_file(
    file: Path, images_dir: Path, repairs: Planned, new_names: Mapping[str, str]
) -> None:
    """Repair an annotation file of the copy; `new_names` are renamed images."""
    document = read_document(file)
    if document is None:
        return
    sections = {name: _records(document, name) for name in SECTIONS}
    dropped, merged = _repair_records(sections, repairs, _Sizes(sections["images"], images_dir))
    for image in sections["images"]:
        name = image.get("file_name") if isinstance(image, dict) else None
        if isinstance(name, str) and name in new_names:
            image["file_name"] = Path(new_names[name]).as_posix()
    kept = {
        name: [record for i, record in enumerate(records) if i not in dropped[name]]
        for name, records in sections.items()
    }
    for annotation in kept["annotations"]:
        if isinstance(annotation, dict) and hashable(annotation.get("image_id")) in merged:
            annotation["image_id"] = merged[hashable(annotation["image_id"])]
    if dropped["images"]:
        kept["annotations"] = _linked(kept, sections)
    document.update({name: kept[name] for name in SECTIONS if name in document})
    write_document(file, document)


def _records(document: Record, section: str) -> list[Any]:
    records = document.get(section)
    return list(records) if isinstance(records, list) else []


def _repair_records(
    sections: Mapping[str, list[Any]], repairs: Planned, sizes: _Sizes
) -> tuple[dict[str, set[int]], dict[Any, Any]]:
    """Repair records in place; return the positions to drop, and the new ids of merged images."""
    dropped: dict[str, set[int]] = {name: set() for name in sections}
    merged: dict[Any, Any] = {}
    for finding, repair in repairs:
        section, number = str(finding.details.get("section")), finding.details.get("record")
        if section not in sections or not isinstance(number, int):
            continue
        if repair in DROPS:
            dropped[section].add(number)
        elif repair == "merge-images":
            _merge(sections["images"], number, merged)
            dropped["images"].add(number)
        else:
            record, annotations = sections[section][number], sections["annotations"]
            _repair_record(finding, repair, record, sizes, annotations)
    return dropped, merged


class _Sizes:
    """Image sizes by id: from the annotation file, else from the image file."""

    def __init__(self, images: Sequence[Any], folder: Path) -> None:
        self._images = {hashable(i.get("id")): i for i in reversed(images) if isinstance(i, dict)}
        self.folder = folder

    def of_image(self, image: Record) -> tuple[int, int] | None:
        width, height = image.get("width"), image.get("height")
        if isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0:
            return width, height
        data, _, _ = read_content(str(self.folder / str(image.get("file_name"))))
        facts = probe_bytes(data)
        return (facts.width, facts.height) if facts.width else None

    def of_annotation(self, annotation: Record) -> tuple[int, int] | None:
        image = self._images.get(hashable(annotation.get("image_id")))
        return self.of_image(image) if image is not None else None


def _repair_record(
    finding: Finding, repair: str, record: Record, sizes: _Sizes, annotations: Sequence[Any]
) -> None:
    if repair == "set-size":
        _set_size(record, sizes)
    elif repair == "rescale":
        _rescale(finding, record, annotations)
    elif repair == "strip-exif":
        _turn(record, sizes, annotations)
    elif repair == "use-disk-name":
        record["file_name"] = finding.details["actual"]
    elif repair == "set-area":
        record["area"] = record["bbox"][2] * record["bbox"][3]
    elif repair == "clip-box":
        _clip_box(record, sizes.of_annotation(record))
    elif repair in ("clip-polygon", "drop-polygon"):
        _repair_polygons(repair, record, sizes.of_annotation(record))


def _set_size(record: Record, sizes: _Sizes) -> None:
    found = sizes.of_image({"file_name": record.get("file_name")})
    if found is not None:
        record["width"], record["height"] = found


def _rescale(finding: Finding, record: Record, annotations: Sequence[Any]) -> None:
    """Take the size of the image file and scale the annotations to it."""
    width, height = finding.details["width"], finding.details["height"]
    scale = width / record["width"], height / record["height"]
    record["width"], record["height"] = width, height
    for annotation in annotations:
        if not isinstance(annotation, dict) or annotation.get("image_id") != record.get("id"):
            continue
        if _is_numbers(annotation.get("bbox")):
            annotation["bbox"] = _scaled(annotation["bbox"], scale)
        if _is_numbers([annotation.get("area")]):
            annotation["area"] *= scale[0] * scale[1]
        rings = annotation.get("segmentation")
        if isinstance(rings, list) and all(_is_numbers(ring) for ring in rings):
            annotation["segmentation"] = [_scaled(ring, scale) for ring in rings]
        else:
            annotation["segmentation"] = []


def _turn(record: Record, sizes: _Sizes, annotations: Sequence[Any]) -> None:
    """Move annotations of the view that EXIF asks for to the pixels as they are stored."""
    data, _, _ = read_content(str(sizes.folder / str(record.get("file_name"))))
    orientation = probe_bytes(data).orientation
    width, height = record["height"], record["width"]
    record["width"], record["height"] = width, height
    for annotation in annotations:
        if not isinstance(annotation, dict) or annotation.get("image_id") != record.get("id"):
            continue
        box, rings = annotation.get("bbox"), annotation.get("segmentation")
        if _is_numbers(box) and box and len(box) == 4:
            corners = [box[0], box[1], box[0] + box[2], box[1] + box[3]]
            x0, y0, x1, y1 = _stored(corners, orientation, width, height)
            annotation["bbox"] = [min(x0, x1), min(y0, y1), abs(x1 - x0), abs(y1 - y0)]
        if isinstance(rings, list) and all(_is_ring(ring) for ring in rings):
            annotation["segmentation"] = [_stored(r, orientation, width, height) for r in rings]


def _stored(points: Sequence[float], orientation: int, width: int, height: int) -> list[float]:
    """Points x, y, x, y ... of the rotated view in an image stored as `width` x `height`.

    Orientations 5 to 8 of the EXIF standard: the view swaps the axes and mirrors none (5), the
    vertical (6), both (7) or the horizontal axis (8) of the stored image.
    """
    found: list[float] = []
    for x, y in zip(points[::2], points[1::2], strict=True):
        found += [width - y if orientation in (7, 8) else y]
        found += [height - x if orientation in (6, 7) else x]
    return found


def _scaled(numbers: Sequence[float], scale: tuple[float, float]) -> list[float]:
    return [round(number * scale[i % 2], 3) for i, number in enumerate(numbers)]


def _clip_box(record: Record, size: tuple[int, int] | None) -> None:
    if size is None:
        return
    x, y, w, h = record["bbox"]
    left, top = min(max(x, 0), size[0]), min(max(y, 0), size[1])
    right, bottom = min(max(x + w, 0), size[0]), min(max(y + h, 0), size[1])
    record["bbox"] = [left, top, right - left, bottom - top]
    area = record.get("area")
    if isinstance(area, int | float):
        record["area"] = min(area, (right - left) * (bottom - top))


def _repair_polygons(repair: str, record: Record, size: tuple[int, int] | None) -> None:
    value = record.get("segmentation")
    if not isinstance(value, list):
        record["segmentation"] = []
        return
    if repair == "drop-polygon":
        value = [ring for ring in value if _is_ring(ring)]
    elif size is not None:
        value = [
            [min(max(number, 0), size[i % 2]) for i, number in enumerate(ring)] for ring in value
        ]
    record["segmentation"] = value


def _is_ring(ring: Any) -> bool:
    return _is_numbers(ring) and len(ring) >= 6 and len(ring) % 2 == 0


def _is_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e300 for v in values
    )


def _merge(images: Sequence[Record], number: int, merged: dict[Any, Any]) -> None:
    name = images[number].get("file_name")
    first = next(i for i in images if isinstance(i, dict) and i.get("file_name") == name)
    merged[hashable(images[number].get("id"))] = first.get("id")


def _linked(kept: Mapping[str, Sequence[Any]], listed: Mapping[str, Sequence[Any]]) -> list[Any]:
    """Annotations except those of images that were dropped."""
    images = {hashable(i.get("id")) for i in kept["images"] if isinstance(i, dict)}
    gone = {hashable(i.get("id")) for i in listed["images"] if isinstance(i, dict)} - images
    return [
        a
        for a in kept["annotations"]
        if not isinstance(a, dict) or hashable(a.get("image_id")) not in gone
    ]
