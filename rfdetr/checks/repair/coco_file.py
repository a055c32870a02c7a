"""Repairs of a COCO annotation file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rfdetr.checks.dataset_report import Finding
from rfdetr.checks.image_probe import probe_bytes, read_content
from rfdetr.errors import DatasetError
from rfdetr.files import write_text_atomic

SECTIONS = ("images", "annotations", "categories")
DROPS = frozenset({"drop-annotation", "drop-record", "drop-image"})
Record = dict[str, Any]


def repair_coco_file(
    source: Path,
    target: Path,
    images_dir: Path,
    findings: Sequence[Finding],
    new_names: Mapping[str, str],
) -> None:
    """Write `source` to `target` with its findings repaired; `new_names` are renamed images."""
    try:
        document = json.loads(source.read_bytes().decode("utf-8-sig"))
    except ValueError as error:
        raise DatasetError(f"{source} cannot be repaired: not UTF-8 JSON ({error}).") from error
    sections = {name: _records(document, name) for name in SECTIONS}
    dropped, merged = _repair_records(sections, findings, _Sizes(sections["images"], images_dir))
    _renumber(sections["annotations"], findings)
    for image in sections["images"]:
        name = image.get("file_name") if isinstance(image, dict) else None
        if isinstance(name, str) and name in new_names:
            image["file_name"] = Path(new_names[name]).as_posix()
    kept = {
        name: [record for i, record in enumerate(records) if i not in dropped[name]]
        for name, records in sections.items()
    }
    for annotation in kept["annotations"]:
        if isinstance(annotation, dict) and _key(annotation.get("image_id")) in merged:
            annotation["image_id"] = merged[_key(annotation["image_id"])]
    document.update(kept, annotations=_linked(kept))
    target.unlink()  # it may be a hard link to the source
    write_text_atomic(target, json.dumps(document, ensure_ascii=False))


def _records(document: Record, section: str) -> list[Any]:
    records = document.get(section)
    return list(records) if isinstance(records, list) else []


def _repair_records(
    sections: Mapping[str, list[Any]], findings: Sequence[Finding], sizes: _Sizes
) -> tuple[dict[str, set[int]], dict[Any, Any]]:
    """Repair records in place; return the positions to drop, and the new ids of merged images."""
    dropped: dict[str, set[int]] = {name: set() for name in sections}
    merged: dict[Any, Any] = {}
    for finding in findings:
        section, number = str(finding.details.get("section")), finding.details.get("record")
        if section not in sections or not isinstance(number, int):
            continue
        if finding.repair in DROPS:
            dropped[section].add(number)
        elif finding.repair == "merge-images":
            _merge(sections["images"], number, merged)
            dropped["images"].add(number)
        else:
            _repair_record(finding, sections[section][number], sizes, sections["annotations"])
    return dropped, merged


class _Sizes:
    """Image sizes by id: from the annotation file, else from the image file."""

    def __init__(self, images: Sequence[Any], folder: Path) -> None:
        self._images = {_key(i.get("id")): i for i in reversed(images) if isinstance(i, dict)}
        self._folder = folder

    def of_image(self, image: Record) -> tuple[int, int] | None:
        width, height = image.get("width"), image.get("height")
        if isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0:
            return width, height
        data, _, _ = read_content(str(self._folder / str(image.get("file_name"))))
        facts = probe_bytes(data)
        return (facts.width, facts.height) if facts.width else None

    def of_annotation(self, annotation: Record) -> tuple[int, int] | None:
        image = self._images.get(_key(annotation.get("image_id")))
        return self.of_image(image) if image is not None else None


def _repair_record(
    finding: Finding, record: Record, sizes: _Sizes, annotations: Sequence[Any]
) -> None:
    if finding.repair == "set-size":
        _set_size(record, sizes)
    elif finding.repair == "rescale":
        _rescale(finding, record, annotations)
    elif finding.repair == "use-disk-name":
        record["file_name"] = finding.details["actual"]
    elif finding.repair == "set-area":
        record["area"] = record["bbox"][2] * record["bbox"][3]
    elif finding.repair == "clip-box":
        _clip_box(record, sizes.of_annotation(record))
    elif finding.repair in ("clip-polygon", "drop-polygon"):
        _repair_polygons(finding, record, sizes.of_annotation(record))


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


def _repair_polygons(finding: Finding, record: Record, size: tuple[int, int] | None) -> None:
    value = record.get("segmentation")
    if not isinstance(value, list):
        record["segmentation"] = []
        return
    if finding.repair == "drop-polygon":
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
    merged[_key(images[number].get("id"))] = first.get("id")


def _renumber(annotations: Sequence[Any], findings: Sequence[Finding]) -> None:
    used = [a["id"] for a in annotations if isinstance(a, dict) and type(a.get("id")) is int]
    following = max([0, *used]) + 1
    numbers = {f.details.get("record") for f in findings if f.repair == "renumber"}
    for number in sorted(n for n in numbers if isinstance(n, int)):
        annotations[number]["id"] = following
        following += 1


def _linked(kept: Mapping[str, Sequence[Any]]) -> list[Any]:
    """Annotations whose image and category still exist."""
    images = {_key(i.get("id")) for i in kept["images"] if isinstance(i, dict)}
    categories = {_key(c.get("id")) for c in kept["categories"] if isinstance(c, dict)}
    return [
        a
        for a in kept["annotations"]
        if isinstance(a, dict)
        and _key(a.get("image_id")) in images
        and _key(a.get("category_id")) in categories
    ]


def _key(value: Any) -> Any:
    """A hashable form of an id."""
    return value if isinstance(value, int | float | str) else repr(value)
