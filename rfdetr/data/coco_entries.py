"""What an entry of a COCO file must hold: typed for the fast reading, key by key for the slow."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any

import msgspec

Raw = msgspec.Raw
Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
NO_BYTES = Raw(b"")


class ImageRow(msgspec.Struct, gc=False):
    """An entry of "images"."""

    id: Int64
    file_name: Annotated[str, msgspec.Meta(min_length=1)]
    width: Int64 | None = None
    height: Int64 | None = None


class AnnotationRow(msgspec.Struct, gc=False):
    """An entry of "annotations"; the segmentation stays text."""

    image_id: Int64
    category_id: Int64
    bbox: tuple[float, float, float, float]
    id: Int64 | None = None
    area: float | None = None
    iscrowd: bool | Int64 | None = 0
    segmentation: Raw = NO_BYTES


class CategoryRow(msgspec.Struct, gc=False):
    """An entry of "categories"."""

    id: Int64
    name: Annotated[str, msgspec.Meta(min_length=1)]
    supercategory: str | None = None


class Document(msgspec.Struct, gc=False):
    """A well-formed file in one pass."""

    images: list[ImageRow]
    annotations: list[AnnotationRow]
    categories: list[CategoryRow]


class SegmentationText(msgspec.Struct, gc=False):
    """The segmentation of an entry whose other values are wrong."""

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
    "images": ImageRow,
    "annotations": AnnotationRow,
    "categories": CategoryRow,
}
# key -> (conversion, what it must be, whether it must be there)
FIELDS: dict[type[msgspec.Struct], dict[str, tuple[Callable[[Any], Any], str, bool]]] = {
    ImageRow: {
        "id": (_integer, "an integer", True),
        "file_name": (_text, "a text", True),
        "width": (_integer, "an integer", False),
        "height": (_integer, "an integer", False),
    },
    AnnotationRow: {
        "image_id": (_integer, "an integer", True),
        "category_id": (_integer, "an integer", True),
        "bbox": (_box, "a list of four finite numbers [x, y, width, height]", True),
        "id": (_integer, "an integer", False),
        "area": (_number, "a finite number", False),
        "iscrowd": (_flag, "0 or 1", False),
    },
    CategoryRow: {
        "id": (_integer, "an integer", True),
        "name": (_text, "a text", True),
        "supercategory": (_any_text, "a text", False),
    },
}
