"""The columns that all annotation checks work on, whatever layout they came from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

HUGE = 1e12  # numbers in a report stay below it: JSON has no infinity
NO_ID = np.iinfo(np.int64).min  # the record has no usable id


class CategoryRow(NamedTuple):
    """One entry of a split's category table."""

    id: int
    name: str
    supercategory: str = ""


@dataclass
class Polygons:
    """Extent of every polygon ring: owner row, count of numbers, corners (NaN when empty)."""

    owner: Integers
    numbers: Integers
    low: Floats
    high: Floats


def no_lines(rows: Sequence[int]) -> list[int | None]:
    """Line lookup of a source without lines."""
    return [None] * len(rows)


Lines = Callable[[Sequence[int]], Sequence[int | None]]


@dataclass
class SplitTable:
    """One split as columns.

    Image columns have one entry per usable image record, annotation columns one per record whose
    box is numeric. `boxes` is (n, 4) x, y, w, h in pixels; a YOLO split holds fractions until
    `scale_boxes`. `image_rows` and `category_rows` point into the image and category lists, -1 for
    an unknown id. `areas` is None for a layout without areas. `image_records` and
    `annotation_records` are positions in the file's own lists. A table that is not `readable` lacks
    a whole list: what is absent from it says nothing. `broken_names` are files that image records
    name which could not be used otherwise. `raw_ids`: the ids of categories are their labels.
    """

    name: str
    folder: Path
    images_dir: Path
    annotation_file: Path | None
    image_ids: Integers
    file_names: list[str]
    sizes: Floats
    annotation_ids: Integers
    image_rows: Integers
    category_rows: Integers
    boxes: Floats
    categories: list[CategoryRow]
    areas: Floats | None = None
    crowd: Flags = field(default_factory=lambda: np.zeros(0, bool))
    masked: Flags = field(default_factory=lambda: np.zeros(0, bool))
    polygons: Polygons | None = None
    label_files: list[str] | None = None
    image_records: Integers | None = None
    annotation_records: Integers | None = None
    image_lines: Lines = no_lines
    annotation_lines: Lines = no_lines
    broken_names: frozenset[str] = frozenset()
    relative: bool = False
    readable: bool = True
    raw_ids: bool = False

    def __post_init__(self) -> None:
        """Fill the flag columns that a layout does not have."""
        for name in ("crowd", "masked"):
            if len(getattr(self, name)) != len(self.boxes):
                setattr(self, name, np.zeros(len(self.boxes), bool))

    def show(self, path: Path) -> str:
        """A path relative to the dataset folder, with forward slashes."""
        try:
            return path.relative_to(self.folder).as_posix()
        except ValueError:
            return path.as_posix()

    def image_file(self, row: int) -> str:
        """The image file of a row, relative to the dataset folder."""
        return self.show(self.images_dir / self.file_names[row])

    def image_place(self, row: int) -> dict[str, Any]:
        """Where an image record stands, for a finding."""
        return {
            "split": self.name,
            "file": self._source(row),
            "line": self.image_lines([row])[0] if self.label_files is None else None,
            "image_id": identifier(self.image_ids[row]),
        }

    def image_details(self, row: int) -> dict[str, Any]:
        """What pictures and repairs need of an image record."""
        record = None if self.image_records is None else int(self.image_records[row])
        return {"section": "images", "record": record, "image": self.image_file(row)}

    def annotation_details(self, row: int) -> dict[str, Any]:
        """What pictures and repairs need of an annotation."""
        image = int(self.image_rows[row])
        records = self.annotation_records
        return {
            "section": "annotations",
            "record": None if records is None else int(records[row]),
            "image": self.image_file(image) if image >= 0 else None,
            "box": np.nan_to_num(self.boxes[row]).clip(-HUGE, HUGE).round(3).tolist(),
        }

    def annotation_places(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Where annotations stand: file, line, image and annotation id."""
        places = []
        for row, line in zip(rows, self.annotation_lines(rows), strict=True):
            image = int(self.image_rows[row])
            places.append(
                {
                    "split": self.name,
                    "file": self._source(image),
                    "line": line,
                    "image_id": identifier(self.image_ids[image]) if image >= 0 else None,
                    "annotation_id": identifier(self.annotation_ids[row]),
                }
            )
        return places

    def _source(self, image_row: int) -> str | None:
        if self.label_files is not None:
            return self.label_files[image_row] if image_row >= 0 else None
        return self.show(self.annotation_file) if self.annotation_file else None

    def image_name(self, row: int) -> str:
        """File name of the image of an annotation, or a note that there is none."""
        image = int(self.image_rows[row])
        return self.file_names[image] if image >= 0 else "unknown image"

    def scale_boxes(self, nominal: int) -> None:
        """Turn fractions into pixels; `nominal` stands in for the side of an unknown image."""
        if not self.relative:
            return
        self.sizes = np.where(np.isfinite(self.sizes), self.sizes, float(nominal))
        scale = self.sizes[self.image_rows]
        self.boxes = self.boxes * np.concatenate([scale, scale], axis=1)
        if self.polygons is not None:
            ring_scale = scale[self.polygons.owner]
            self.polygons.low = self.polygons.low * ring_scale
            self.polygons.high = self.polygons.high * ring_scale
        self.relative = False

    def known_sizes(self) -> Flags:
        """Which images have a positive finite size."""
        return np.asarray((np.isfinite(self.sizes) & (self.sizes > 0)).all(axis=1))


def identifier(value: np.int64 | int) -> int | None:
    """An id for a report, None where the record has none."""
    return None if value == NO_ID else int(value)
