"""Defects of COCO annotation files: ids, sizes, boxes, segmentations, categories, structure."""

from __future__ import annotations

from typing import Any

from tests.random_datasets.base import HEIGHT, WIDTH, Case
from tests.random_datasets.images import Defect

NAN, INF = float("nan"), float("inf")
MISSING = object()
RUNS = [10, 5, WIDTH * HEIGHT - 15]


def _image(key: str, value: Any) -> Defect:
    """A value of an image record."""
    return lambda case, split, number: _set(case.record(split, number), key, value)


def _row(key: str, value: Any) -> Defect:
    """A value of an annotation."""
    return lambda case, split, number: _set(case.row(split, number), key, value)


def _every(key: str, value: Any) -> Defect:
    """A value of all annotations of a split."""

    def apply(case: Case, split: str, _number: int) -> None:
        for row in case.documents[split]["annotations"]:
            _set(row, key, value)

    return apply


def _set(record: dict[str, Any], key: str, value: Any) -> None:
    if value is MISSING:
        record.pop(key, None)
    else:
        record[key] = value


def _image_id(value: Any) -> Defect:
    """Another id of an image, to which its annotations refer."""

    def apply(case: Case, split: str, number: int) -> None:
        record = case.record(split, number)
        for row in case.documents[split]["annotations"]:
            if row.get("image_id") == record.get("id"):
                row["image_id"] = value
        record["id"] = value

    return apply


def _text_ids(case: Case, split: str, _number: int) -> None:
    for section, keys in (("images", ("id",)), ("annotations", ("id", "image_id"))):
        for record in case.documents[split][section]:
            for key in keys:
                if key in record:
                    record[key] = str(record[key])


def _category(key: str, value: Any) -> Defect:
    """A value of a category, in one split or (odd numbers) in all."""

    def apply(case: Case, split: str, number: int) -> None:
        for name in case.splits if number % 2 else [split]:
            categories = case.documents[name]["categories"]
            if categories:
                _set(categories[number // 2 % len(categories)], key, value)

    return apply


def _section(key: str, value: Any) -> Defect:
    """A section of the file, or a key beside them."""
    return lambda case, split, _number: _set(case.documents[split], key, value)


def _added(section: str, record: Any) -> Defect:
    return lambda case, split, _number: case.documents[split][section].append(record)


def _repeated(section: str) -> Defect:
    """A record twice."""

    def apply(case: Case, split: str, number: int) -> None:
        records = case.documents[split][section]
        if records:
            records.append(dict(records[number % len(records)]))

    return apply


def _same_file(case: Case, split: str, number: int) -> None:
    """Two records of one file with different ids."""
    first = case.record(split, number)
    case.documents[split]["images"].append({**first, "id": 77})
    case.row(split, number)["image_id"] = 77


def _encoded(encoding: str) -> Defect:
    def apply(case: Case, split: str, number: int) -> None:
        case.encoding = encoding
        case.documents[split]["info"] = {"note": "größer"}

    return apply


def _displayed_size(case: Case, split: str, number: int) -> None:
    """Width and height as a viewer shows a rotated image."""
    record = case.record(split, number)
    record["width"], record["height"] = HEIGHT, WIDTH


def _all_ids(value: Any) -> Defect:
    def apply(case: Case, split: str, _number: int) -> None:
        for row in case.documents[split]["annotations"]:
            row["id"] = value

    return apply


BOXES: dict[str, Any] = {
    "box-partly-outside": [-3, -3, 10, 10],
    "box-outside": [30, 3, 5, 5],
    "box-touching": [WIDTH, 0, 5, 5],
    "box-zero": [3, 3, 0, 4],
    "box-negative": [10, 10, -4, -4],
    "box-huge": [0, 0, 1e9, 1e9],
    "box-beyond-float": [0, 0, 1e39, 1e39],
    "box-far": [-1e300, 0, 2e300, 5],
    "box-thin": [1, 1, 1e-9, 5],
    "box-thin-32": [20.000001, 1, 1e-7, 5],
    "box-sliver": [WIDTH - 1e-7, 1, 5, 5],
    "box-nan": [NAN, 1, 5, 5],
    "box-infinite": [1, 1, INF, 5],
    "box-text": ["1", "1", "5", "5"],
    "box-short": [1, 1, 5],
    "box-nested": [[1, 1, 5, 5]],
    "box-null": None,
    "box-missing": MISSING,
    "box-beyond-64-bits": [1, 1, 10**30, 5],
    "box-true": [1, 1, True, 5],
    "box-minus-zero": [-0.0, -0.0, 5, 5],
    "box-exact": [0, 0, WIDTH, HEIGHT],
    "box-fractions": [0.1, 0.1, 0.5, 0.5],
    "box-half-pixel": [WIDTH - 0.5, HEIGHT - 0.5, 0.25, 0.25],
    "box-object": {"x": 1, "y": 1, "w": 3, "h": 3},
}
SEGMENTATIONS: dict[str, Any] = {
    "polygon-missing": MISSING,
    "polygon-empty": [],
    "polygon-null": None,
    "polygon-odd": [[2, 2, 10, 2, 10, 8, 2]],
    "polygon-odd-second": [[2, 2, 10, 2, 10, 8], [1, 1, 5, 1, 5, 5, 9]],
    "polygon-short": [[2, 2, 10, 8]],
    "polygon-empty-ring": [[]],
    "polygon-crossing": [[2, 2, 10, 8, 10, 2, 2, 8]],
    "polygon-flat": [[2, 2, 5, 2, 10, 2]],
    "polygon-outside": [[-50, -50, 100, -50, 100, 100]],
    "polygon-far": [[1e30, 1, 5, 5, 1, 5]],
    "polygon-nan": [[2, 2, NAN, 2, 10, 8]],
    "polygon-text": [["2", "2", "10", "2", "10", "8"]],
    "polygon-points": [[[2, 2], [10, 2], [10, 8]]],
    "polygon-flat-list": [2, 2, 10, 2, 10, 8],
    "polygon-null-ring": [None],
    "polygon-mixed": [[2, 2, 10, 2, 10, 8], {"size": [HEIGHT, WIDTH], "counts": RUNS}],
    "polygon-true": [[True, 2, 10, 2, 10, 8]],
    "polygon-beyond-float": [[10**400, 2, 10, 2, 10, 8]],
    "polygon-beyond-64-bits": [[10**30, 2, 10, 2, 10, 8]],
    "polygon-deep": [[[[2, 2, 10, 2, 10, 8]]]],
    "polygon-spaced": [[], []],
    "polygon-null-number": [[None, 2, 10, 2, 10, 8]],
    "segmentation-true": True,
    "segmentation-zero": 0,
    "segmentation-blank": "",
    "rle-true": {"size": [HEIGHT, WIDTH], "counts": [True, 383]},
    "rle-null": {"size": None, "counts": None},
    "rle-empty-counts": {"size": [HEIGHT, WIDTH], "counts": []},
    "rle-zero-size": {"size": [0, 0], "counts": []},
    "rle-bytes": {"size": [HEIGHT, WIDTH], "counts": "b':5a;'"},
    "rle-huge": {"size": [2**40, 2**40], "counts": [2**80]},
    "segmentation-text": "polygon",
    "segmentation-number": 7,
    "rle": {"size": [HEIGHT, WIDTH], "counts": RUNS},
    "rle-compressed": {"size": [HEIGHT, WIDTH], "counts": ":5a;"},
    "rle-floats": {"size": [16.0, 24.0], "counts": [10.0, 5.0, 369.0]},
    "rle-swapped": {"size": [WIDTH, HEIGHT], "counts": RUNS},
    "rle-short": {"size": [HEIGHT, WIDTH], "counts": [10, 5]},
    "rle-negative": {"size": [HEIGHT, WIDTH], "counts": [10, -5, 379]},
    "rle-garbage": {"size": [HEIGHT, WIDTH], "counts": "\x7f~}"},
    "rle-no-size": {"counts": RUNS},
    "rle-no-counts": {"size": [HEIGHT, WIDTH]},
    "rle-empty": {},
}
COCO_DEFECTS: dict[str, Defect] = {
    **{name: _row("bbox", value) for name, value in BOXES.items()},
    **{name: _row("segmentation", value) for name, value in SEGMENTATIONS.items()},
    "id-missing": _all_ids(None),
    "id-same": _all_ids(5),
    "id-zero": _row("id", 0),
    "id-text": _row("id", "seven"),
    "id-float": _row("id", 7.0),
    "id-half": _row("id", 7.5),
    "id-huge": _row("id", 2**70),
    "text-ids": _text_ids,
    "image-id-text": _image_id("first"),
    "image-id-float": _image_id(1.0),
    "image-id-half": _image_id(1.5),
    "image-id-huge": _image_id(2**64),
    "image-id-negative": _image_id(-9),
    "image-id-missing": _image("id", MISSING),
    "image-id-null": _image("id", None),
    "image-id-boolean": _image("id", True),
    "image-id-unknown": _row("image_id", 999),
    "image-id-of-row-text": _row("image_id", "train0"),
    "category-unknown": _row("category_id", 9),
    "category-text": _row("category_id", "a"),
    "category-null": _row("category_id", None),
    "category-missing": _row("category_id", MISSING),
    "crowd": _row("iscrowd", 1),
    "crowd-text": _row("iscrowd", "1"),
    "crowd-true": _row("iscrowd", True),
    "crowd-two": _row("iscrowd", 2),
    "crowd-null": _row("iscrowd", None),
    "crowd-every": _every("iscrowd", 1),
    "crowd-zero-float": _row("iscrowd", 0.0),
    "crowd-half": _row("iscrowd", 0.5),
    "category-float": _row("category_id", 1.0),
    "category-half": _row("category_id", 1.5),
    "category-huge": _row("category_id", 2**70),
    "image-id-of-row-float": _row("image_id", 1.0),
    "image-id-of-row-list": _row("image_id", [1]),
    "area-list": _row("area", [1]),
    "area-negative": _row("area", -5),
    "width-true": _image("width", True),
    "width-negative": _image("width", -24),
    "width-half": _image("width", 24.5),
    "area-text": _row("area", "big"),
    "area-zero": _row("area", 0),
    "area-nan": _row("area", NAN),
    "area-missing": _row("area", MISSING),
    "area-huge": _row("area", 1e300),
    "no-polygons": _every("segmentation", []),
    "width-missing": _image("width", MISSING),
    "width-zero": _image("width", 0),
    "width-text": _image("width", "24"),
    "width-float": _image("width", 24.0),
    "width-wrong": _image("width", 48),
    "width-huge": _image("width", 2**63),
    "height-null": _image("height", None),
    "displayed-size": _displayed_size,
    "name-missing": _image("file_name", MISSING),
    "name-null": _image("file_name", None),
    "name-number": _image("file_name", 5),
    "name-surrogate": _image("file_name", "\ud800.png"),
    "category-id-zero": _category("id", 0),
    "category-id-text": _category("id", "x"),
    "category-id-far": _category("id", 123_456),
    "category-id-same": _category("id", 2),
    "category-name-same": _category("name", "b"),
    "category-name-blank": _category("name", " "),
    "category-name-number": _category("name", 7),
    "category-name-null": _category("name", None),
    "category-parent": _category("supercategory", "a"),
    "category-parent-number": _category("supercategory", 4),
    "category-other": _category("name", "c"),
    "category-added": _added("categories", {"id": 3, "name": "c"}),
    "category-ghost": _added("categories", {"id": 0, "name": "none", "supercategory": "none"}),
    "category-missing-key": _category("name", MISSING),
    "category-id-null": _category("id", None),
    "category-id-half": _category("id", 1.5),
    "category-parent-other": _category("supercategory", "thing"),
    "category-parent-null": _category("supercategory", None),
    "category-entry-null": _added("categories", None),
    "image-null": _added("images", None),
    "image-empty": _added("images", {}),
    "image-of-other-split": _added("images", {"id": 50, "file_name": "../valid/val0.png"}),
    "image-hidden": _added("images", {"id": 51, "file_name": ".ipynb_checkpoints/copy.png"}),
    "image-folder": _added("images", {"id": 52, "file_name": "."}),
    "no-images-listed": _section("images", []),
    "images-object": _section("images", {"1": {}}),
    "categories-object": _section("categories", {"1": "a"}),
    "no-categories": _section("categories", []),
    "categories-missing": _section("categories", MISSING),
    "no-annotations": _section("annotations", []),
    "annotations-missing": _section("annotations", MISSING),
    "annotations-object": _section("annotations", {}),
    "images-missing": _section("images", MISSING),
    "image-number": _added("images", 5),
    "annotation-null": _added("annotations", None),
    "image-twice": _repeated("images"),
    "annotation-twice": _repeated("annotations"),
    "category-twice": _repeated("categories"),
    "same-file": _same_file,
    "latin-1": _encoded("latin-1"),
    "utf-16": _encoded("utf-16"),
    "utf-8-mark": _encoded("utf-8-sig"),
}
