"""Writes a dataset as a COCO export: one folder per split with _annotations.coco.json."""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
import numpy as np
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask

from rfdetr.data.layouts import ANNOTATIONS
from rfdetr.importers.records import ImportedImage, ImportedObject

FOLDER = {"train": "train", "val": "valid", "test": "test"}


class Prepared(msgspec.Struct):
    """An image that can be written, with its file and size (width, height) in pixels as stored.

    `rotate` says that the written image must be turned as its EXIF tag says.
    """

    image: ImportedImage
    path: Path
    width: int
    height: int
    rotate: bool = False


def write_split(folder: Path, prepared: Sequence[Prepared], classes: Sequence[str]) -> None:
    """Copy the images of a split into `folder` and write their annotation file."""
    folder.mkdir(parents=True)
    ids = {name: number for number, name in enumerate(classes, 1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    taken: set[str] = set()
    for number, item in enumerate(prepared, 1):
        name = _file_name(item.image.name, taken)
        width, height = (item.height, item.width) if _swaps(item) else (item.width, item.height)
        _write_image(item, folder / name)
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        for found in item.image.objects:
            row = {"id": len(annotations) + 1, "image_id": number, "category_id": ids[found.label]}
            annotations.append(row | _geometry(found))
    categories = [{"id": ids[name], "name": name, "supercategory": "none"} for name in classes]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (folder / ANNOTATIONS).write_bytes(msgspec.json.encode(document))


def _file_name(name: str, taken: set[str]) -> str:
    """The last part of the name; with the folders before it if that is taken in any case."""
    parts = PurePosixPath(name).parts
    for start in range(len(parts) - 1, -1, -1):
        wanted = "__".join(parts[start:])
        if wanted.lower() not in taken:
            taken.add(wanted.lower())
            return wanted
    wanted = f"{len(taken)}-{parts[-1]}"
    taken.add(wanted.lower())
    return wanted


def _swaps(item: Prepared) -> bool:
    if not item.rotate:
        return False
    with Image.open(item.path) as image:
        return bool(image.getexif().get(0x0112, 1) >= 5)


def _write_image(item: Prepared, target: Path) -> None:
    if item.rotate:
        with Image.open(item.path) as image:
            upright, kind = ImageOps.exif_transpose(image), image.format
        stream = io.BytesIO()
        options = {"quality": 95, "subsampling": 0} if kind in ("JPEG", "MPO") else {}
        upright.save(stream, "JPEG" if kind == "MPO" else kind, **options)
        target.write_bytes(stream.getvalue())
    elif item.image.content is not None:
        target.write_bytes(item.image.content)
    else:
        shutil.copyfile(item.path, target)


def _geometry(found: ImportedObject) -> dict[str, Any]:
    x0, y0, x1, y1 = (round(value, 3) for value in found.box)
    box = [x0, y0, round(x1 - x0, 3), round(y1 - y0, 3)]
    outline: Any = found.outline
    area = box[2] * box[3]
    if isinstance(outline, dict):
        area = _rle_area(outline) or area
    elif outline:
        outline = [[round(float(v), 3) for v in polygon] for polygon in outline]
        area = sum(map(_polygon_area, outline)) or area
    return {
        "bbox": box,
        "area": round(float(area), 3),
        "segmentation": outline,
        "iscrowd": int(found.crowd),
    }


def _polygon_area(points: Sequence[float]) -> float:
    xs, ys = np.array(points[::2]), np.array(points[1::2])
    return float(abs(np.dot(xs, np.roll(ys, -1)) - np.dot(ys, np.roll(xs, -1))) / 2)


def _rle_area(outline: dict[str, Any]) -> float:
    """Pixels of an RLE, compressed or not; 0 if it is not valid, which the checks report."""
    counts = outline["counts"]
    if isinstance(counts, list):
        return float(sum(run for run in counts[1::2] if isinstance(run, int)))
    try:
        return float(coco_mask.area({"size": outline["size"], "counts": counts.encode()}))
    except (TypeError, ValueError, AttributeError):
        return 0.0
