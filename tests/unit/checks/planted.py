"""Datasets with one defect of every kind at a known place.

A plant changes a clean dataset and returns what the report must contain: a code, and the fields of
the finding that tell the place.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from tests.datasets import make_roboflow, make_yolo

ANNOTATIONS = "train/_annotations.coco.json"
SPLITS = {"train": 12, "valid": 6, "test": 6}


class Expected(NamedTuple):
    code: str
    place: dict[str, Any]


Plant = Callable[[Path], Expected]


class Coco:
    """The training annotations of a COCO dataset, written one record a line."""

    def __init__(self, root: Path, split: str = "train") -> None:
        self.path = root / split / "_annotations.coco.json"
        self.folder = root / split
        self.document = json.loads(self.path.read_text(encoding="utf-8"))

    @property
    def images(self) -> list[dict[str, Any]]:
        return self.document["images"]

    @property
    def annotations(self) -> list[dict[str, Any]]:
        return self.document["annotations"]

    @property
    def categories(self) -> list[dict[str, Any]]:
        return self.document["categories"]

    def save(self) -> None:
        self.path.write_text(json.dumps(self.document, indent=0), encoding="utf-8")

    def image_of(self, annotation: dict[str, Any]) -> dict[str, Any]:
        return next(i for i in self.images if i["id"] == annotation["image_id"])

    def line(self, section: str, number: int) -> int:
        """The line where a record begins in the written file."""
        text = self.path.read_text(encoding="utf-8")
        start = text.index(f'"{section}": [')
        decoder = json.JSONDecoder()
        position = text.index("[", start) + 1
        for _ in range(number + 1):
            while text[position] in " \n,":
                position += 1
            begin = position
            _, position = decoder.raw_decode(text, position)
        return text.count("\n", 0, begin) + 1


def make_clean_coco(root: Path) -> Path:
    make_roboflow(root, splits=SPLITS, segmentation=True, background=4, seed=5, size=(96, 64))
    for split in SPLITS:
        document = Coco(root, split)
        document.save()
    return root


def make_clean_yolo(root: Path, polygons: bool = False) -> Path:
    return make_yolo(root, splits=SPLITS, polygons=polygons, background=4, seed=5, size=(96, 64))


COCO: dict[str, Plant] = {}
YOLO: dict[str, Plant] = {}


def coco(plant: Plant) -> Plant:
    COCO[plant.__name__] = plant
    return plant


def yolo(plant: Plant) -> Plant:
    YOLO[plant.__name__] = plant
    return plant


def annotation_plant(name: str, code: str, change: Callable[[Coco, dict[str, Any]], None]) -> None:
    """Register a plant that changes the second annotation of train."""

    def plant(root: Path) -> Expected:
        data = Coco(root)
        annotation = data.annotations[1]
        change(data, annotation)
        data.save()
        place: dict[str, Any] = {"file": ANNOTATIONS, "line": data.line("annotations", 1)}
        if isinstance(annotation.get("id"), int):
            place["annotation_id"] = annotation["id"]
        return Expected(code, place)

    COCO[name] = plant


def _set(**values: Any) -> Callable[[Coco, dict[str, Any]], None]:
    return lambda _data, annotation: annotation.update(values)


def _without(key: str) -> Callable[[Coco, dict[str, Any]], None]:
    return lambda _data, annotation: annotation.pop(key)


def _shape(change: Callable[[float, float, dict[str, Any]], dict[str, Any]]) -> Any:
    def apply(data: Coco, annotation: dict[str, Any]) -> None:
        image = data.image_of(annotation)
        annotation.update(change(image["width"], image["height"], annotation))

    return apply


def _box(x: float, y: float, w: float, h: float) -> dict[str, Any]:
    return {"bbox": [x, y, w, h], "area": abs(w * h), "segmentation": []}


for _name, _code, _change in (
    ("box_nan", "box-nan", _set(bbox=[float("nan"), 1, 5, 5])),
    ("box_infinite", "box-nan", _set(bbox=[1, 1, float("inf"), 5])),
    ("box_text", "box-non-numeric", _set(bbox=["1", 1, 5, 5])),
    ("box_null_value", "box-non-numeric", _set(bbox=[None, 1, 5, 5])),
    ("box_three_numbers", "box-malformed", _set(bbox=[1, 1, 5])),
    ("box_object", "box-malformed", _set(bbox={"x": 1})),
    ("box_missing", "key-missing", _without("bbox")),
    ("image_id_missing", "key-missing", _without("image_id")),
    ("category_id_null", "key-missing", _set(category_id=None)),
    ("annotation_id_missing", "annotation-id-missing", _without("id")),
    ("category_id_text", "value-type", _set(category_id="one")),
    ("area_text", "value-type", _set(area="big")),
    ("iscrowd_text", "iscrowd-invalid", _set(iscrowd="no")),
    ("image_id_dangling", "image-id-unknown", _set(image_id=987654)),
    ("category_id_dangling", "category-id-unknown", _set(category_id=77)),
    ("annotation_id_zero", "annotation-id-zero", _set(id=0)),
    ("annotation_id_twice", "annotation-id-duplicate", _set(id=1)),
    ("box_negative", "box-negative", _shape(lambda w, h, a: _box(50, 40, -20, 10))),
    ("box_zero", "box-zero-area", _shape(lambda w, h, a: _box(5, 5, 0, 10))),
    ("box_partly_outside", "box-outside", _shape(lambda w, h, a: _box(w - 10, 5, 30, 10))),
    ("box_above", "box-outside", _shape(lambda w, h, a: _box(4, -6, 30, 20))),
    ("box_fully_outside", "box-outside-fully", _shape(lambda w, h, a: _box(w + 9, 5, 9, 9))),
    ("box_aspect", "box-aspect", _shape(lambda w, h, a: _box(1, 5, w - 2, 1.5))),
    ("area_wrong", "area-mismatch", _shape(lambda w, h, a: {"area": a["area"] * 3})),
    ("area_negative", "area-invalid", _set(area=-5)),
    ("area_missing", "area-invalid", _without("area")),
    ("polygon_two_points", "polygon-short", _set(segmentation=[[1, 1, 5, 5]])),
    ("polygon_odd", "polygon-malformed", _set(segmentation=[[1, 1, 5, 5, 7, 7, 3]])),
    ("polygon_text", "polygon-malformed", _set(segmentation=[["a", 1, 5, 5, 7, 7]])),
    ("polygon_flat", "polygon-malformed", _set(segmentation=[1, 1, 5, 5, 7, 7])),
    ("polygon_word", "polygon-malformed", _set(segmentation="none")),
    ("polygon_outside", "polygon-outside", _set(segmentation=[[1, 1, 500, 5, 7, 70]])),
    ("rle_short", "rle-malformed", _set(segmentation={"size": [64, 96], "counts": [5, 5]})),
    ("rle_no_size", "rle-malformed", _set(segmentation={"counts": [5, 5]})),
    ("rle_other_size", "rle-malformed", _set(segmentation={"size": [2, 5], "counts": [5, 5]})),
    ("rle_garbage", "rle-malformed", _set(segmentation={"size": [64, 96], "counts": "~~~é"})),
):
    annotation_plant(_name, _code, _change)


def image_plant(name: str, code: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Register a plant that changes the first image record of train."""

    def plant(root: Path) -> Expected:
        data = Coco(root)
        change(data.images[0])
        data.save()
        return Expected(code, {"file": ANNOTATIONS, "line": data.line("images", 0)})

    COCO[name] = plant


for _name, _code, _edit in (
    ("file_name_missing", "key-missing", lambda i: i.pop("file_name")),
    ("file_name_number", "file-name-invalid", lambda i: i.update(file_name=5)),
    ("file_name_empty", "file-name-invalid", lambda i: i.update(file_name="")),
    ("file_name_outside", "file-name-invalid", lambda i: i.update(file_name="../../secret.jpg")),
    ("file_name_absolute", "file-name-invalid", lambda i: i.update(file_name="/etc/x.jpg")),
    ("width_text", "image-size-invalid", lambda i: i.update(width="wide")),
    ("width_zero", "image-size-missing", lambda i: i.update(width=0)),
    ("height_missing", "image-size-missing", lambda i: i.pop("height")),
    ("image_id_text", "value-type", lambda i: i.update(id="first")),
):
    image_plant(_name, _code, _edit)


@coco
def image_id_twice(root: Path) -> Expected:
    data = Coco(root)
    data.images[2]["id"] = data.images[1]["id"]
    data.save()
    return Expected("image-id-duplicate", {"image_id": 2, "line": data.line("images", 2)})


@coco
def category_id_twice(root: Path) -> Expected:
    data = Coco(root)
    data.categories.append({"id": 1, "name": "spare", "supercategory": "none"})
    data.save()
    return Expected("category-id-duplicate", {"file": ANNOTATIONS})


@coco
def category_name_twice(root: Path) -> Expected:
    data = Coco(root)
    data.categories.append({"id": 9, "name": "bolt", "supercategory": "none"})
    data.save()
    return Expected("category-name-duplicate", {"file": ANNOTATIONS})


@coco
def category_name_empty(root: Path) -> Expected:
    data = Coco(root)
    data.categories.append({"id": 9, "name": "", "supercategory": "none"})
    data.save()
    return Expected("category-name-invalid", {"file": ANNOTATIONS})


@coco
def category_ghost(root: Path) -> Expected:
    for split in SPLITS:
        data = Coco(root, split)
        for category in data.categories:
            category["supercategory"] = "parts"
        data.categories.append({"id": 9, "name": "parts", "supercategory": "none"})
        data.save()
    return Expected("category-ghost", {"file": ANNOTATIONS})


@coco
def category_unused(root: Path) -> Expected:
    for split in SPLITS:
        data = Coco(root, split)
        data.categories.append({"id": 9, "name": "screw", "supercategory": "none"})
        data.save()
    return Expected("category-unused", {"file": ANNOTATIONS})


@coco
def category_renamed_in_valid(root: Path) -> Expected:
    data = Coco(root, "valid")
    data.categories[1]["name"] = "Bolt"
    data.save()
    return Expected("category-split-differs", {"split": "val"})


@coco
def class_missing_from_test(root: Path) -> Expected:
    data = Coco(root, "test")
    data.document["annotations"] = [a for a in data.annotations if a["category_id"] != 1]
    data.save()
    return Expected("class-missing", {"split": "test"})


@coco
def duplicate_box(root: Path) -> Expected:
    data = Coco(root)
    data.annotations.append({**data.annotations[0], "id": 900})
    data.save()
    return Expected("box-duplicate", {"annotation_id": 900})


@coco
def near_duplicate_box(root: Path) -> Expected:
    data = Coco(root)
    x, y, w, h = data.annotations[0]["bbox"]
    box = [x, y, w - 0.3, h]
    copy = {"bbox": box, "area": box[2] * box[3], "segmentation": [], "id": 900}
    data.annotations.append({**data.annotations[0], **copy})
    data.save()
    return Expected("box-near-duplicate", {"annotation_id": 900})


@coco
def conflicting_box(root: Path) -> Expected:
    data = Coco(root)
    first = data.annotations[0]
    data.annotations.append({**first, "id": 900, "category_id": (first["category_id"] + 1) % 3})
    data.save()
    return Expected("box-conflict", {"annotation_id": 900})


def text_plant(name: str, code: str, change: Callable[[str], str], line: int | None) -> None:
    def plant(root: Path) -> Expected:
        path = root / ANNOTATIONS
        path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
        return Expected(code, {"file": ANNOTATIONS, "line": line})

    COCO[name] = plant


text_plant("json_no_comma", "json-malformed", lambda t: t.replace(",\n", "\n", 1), 5)
text_plant("json_empty", "json-malformed", lambda t: "", None)
text_plant("json_list", "json-structure", lambda t: "[]", None)
text_plant("json_no_images", "key-missing", lambda t: t.replace('"images"', '"pictures"'), None)
text_plant("json_object_list", "json-structure", lambda t: '{"images": {}}', None)


@coco
def json_cut_off(root: Path) -> Expected:
    path = root / ANNOTATIONS
    text = path.read_text()[:700]
    path.write_text(text)
    return Expected("json-malformed", {"file": ANNOTATIONS, "line": text.count("\n") + 1})


def file_plant(name: str, code: str, change: Callable[[Path], Any]) -> None:
    """Register a plant in the second image file of train, in both layouts."""

    def in_coco(root: Path) -> Expected:
        path = root / "train" / "image_0001.jpg"
        change(path)
        return Expected(code, {"file": "train/image_0001.jpg", "image_id": 2})

    def in_yolo(root: Path) -> Expected:
        path = root / "train" / "images" / "image_0001.png"
        change(path)
        return Expected(code, {"file": "train/images/image_0001.png", "image_id": 1})

    COCO[name] = in_coco
    if name != "file_missing":
        YOLO[name] = in_yolo


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _bomb(path: Path) -> None:
    """A PNG whose header announces 1,600 million pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)
    chunks = (header, b"IDAT" + zlib.compress(bytes(1000)), b"IEND")
    body = b"".join(
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def _exif(path: Path) -> None:
    image = Image.open(path).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, exif=exif.tobytes())


def _sixteen_bits(path: Path) -> None:
    with Image.open(path) as image:
        values = np.asarray(image.convert("L")).astype(np.uint16) * 257
    Image.fromarray(values).save(path, "PNG")


def _cmyk(path: Path) -> None:
    with Image.open(path) as image:
        image.convert("CMYK").save(path, "JPEG")


def _as(format_name: str) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        with Image.open(path) as image:
            image.convert("RGB").save(path, format_name)

    return save


for _name, _code, _change_file in (
    ("file_missing", "file-missing", Path.unlink),
    ("file_empty", "file-empty", lambda p: p.write_bytes(b"")),
    ("file_garbage", "file-unreadable", lambda p: p.write_bytes(b"no image" * 99)),
    ("file_cut", "file-truncated", _cut),
    ("file_bomb", "file-bomb", _bomb),
    ("file_other_format", "file-extension", _as("BMP")),
    ("file_exif", "image-exif-rotated", _exif),
    ("file_sixteen_bits", "image-mode", _sixteen_bits),
    ("file_cmyk", "image-mode", _cmyk),
    ("file_black", "image-flat", lambda p: Image.new("RGB", (96, 64), (3, 2, 9)).save(p)),
    ("file_one_colour", "image-flat", lambda p: Image.new("RGB", (96, 64), "red").save(p)),
):
    file_plant(_name, _code, _change_file)
