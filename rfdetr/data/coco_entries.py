"""What an entry of a COCO file must contain.

Typed structs for the fast reading, rules per key for the slow reading (`coco_problems.py`).
Format: https://cocodataset.org/#format-data
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

# What is wrong with a file or an entry; the dataset checks report findings under the same codes.
ProblemCode = Literal[
    "json-malformed",
    "json-structure",
    "key-missing",
    "value-type",
    "file-name-invalid",
    "image-size-invalid",
    "iscrowd-invalid",
    "category-name-invalid",
    "box-malformed",
    "box-nan",
    "box-non-numeric",
]

Raw = msgspec.Raw
Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
NO_BYTES = Raw(b"")


class ImageEntry(msgspec.Struct, gc=False):
    """An entry of "images"."""

    id: Int64
    file_name: Annotated[str, msgspec.Meta(min_length=1)]
    width: Int64 | None = None
    height: Int64 | None = None


class AnnotationEntry(msgspec.Struct, gc=False):
    """An entry of "annotations"; the segmentation stays JSON text."""

    image_id: Int64
    category_id: Int64
    bbox: tuple[float, float, float, float]
    id: Int64 | None = None
    area: float | None = None
    iscrowd: bool | Int64 | None = 0
    segmentation: Raw = NO_BYTES


class CategoryEntry(msgspec.Struct, gc=False):
    """An entry of "categories"."""

    id: Int64
    name: Annotated[str, msgspec.Meta(min_length=1)]
    supercategory: str | None = None


class Document(msgspec.Struct, gc=False):
    """A valid file, decoded in one pass."""

    images: list[ImageEntry]
    annotations: list[AnnotationEntry]
    categories: list[CategoryEntry]


class SegmentationText(msgspec.Struct, gc=False):
    """The segmentation alone, of an entry that is not valid as it is."""

    segmentation: Raw = NO_BYTES


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise TypeError
    if not -(2**63) <= value < 2**63:
        raise OverflowError
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError
    return float(value)


def _box(value: Any) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) != 4:
        raise TypeError
    return tuple(_number(v) for v in value)


def _any_text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value.encode("utf-16", "surrogatepass").decode("utf-16")


def _text(value: Any) -> str:
    if not value:
        raise TypeError
    return _any_text(value)


def _flag(value: Any) -> int:
    return int(value) if isinstance(value, bool) else _integer(value)


KINDS: dict[str, type[msgspec.Struct]] = {
    "images": ImageEntry,
    "annotations": AnnotationEntry,
    "categories": CategoryEntry,
}


class FieldRule(NamedTuple):
    """What the slow reading requires of one key; `convert` raises for a value that it refuses."""

    convert: Callable[[Any], Any]
    expected: str
    required: bool = False
    code: ProblemCode = "value-type"


FIELDS: dict[type[msgspec.Struct], dict[str, FieldRule]] = {
    ImageEntry: {
        "id": FieldRule(_integer, "an integer", required=True),
        "file_name": FieldRule(_text, "a string", required=True, code="file-name-invalid"),
        "width": FieldRule(_integer, "an integer", code="image-size-invalid"),
        "height": FieldRule(_integer, "an integer", code="image-size-invalid"),
    },
    AnnotationEntry: {
        "image_id": FieldRule(_integer, "an integer", required=True),
        "category_id": FieldRule(_integer, "an integer", required=True),
        "bbox": FieldRule(
            _box, "a list of four finite numbers [x, y, width, height]", required=True
        ),
        "id": FieldRule(_integer, "an integer"),
        "area": FieldRule(_number, "a finite number"),
        "iscrowd": FieldRule(_flag, "0 or 1", code="iscrowd-invalid"),
    },
    CategoryEntry: {
        "id": FieldRule(_integer, "an integer", required=True),
        "name": FieldRule(_text, "a string", required=True, code="category-name-invalid"),
        "supercategory": FieldRule(_any_text, "a string"),
    },
}


def value_code(key: str, value: Any, rule: FieldRule) -> ProblemCode:
    """The code of a value that its rule refuses."""
    return _box_code(value) if key == "bbox" else rule.code


def _box_code(value: Any) -> ProblemCode:
    if not isinstance(value, list):
        return "box-malformed"
    if any(isinstance(number, float) and not math.isfinite(number) for number in value):
        return "box-nan"
    nested = any(isinstance(number, list) for number in value)
    return "box-malformed" if len(value) != 4 and not nested else "box-non-numeric"
