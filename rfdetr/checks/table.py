"""The columns that all annotation checks work on, whatever the dataset layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rfdetr.arrays import Bools, Floats, Integers
from rfdetr.data.layouts import SplitPaths

HUGE = 1e12  # limit of numbers in a report: JSON has no infinity
NO_ID = np.iinfo(np.int64).min  # the record has no usable id


class CategoryRow(NamedTuple):
    """One entry of a split's category table."""

    id: int
    name: str
    supercategory: str = ""


@dataclass
class PolygonExtents:
    """Extents of polygons, one row each: the annotation's row, count of numbers, corners.

    `low` and `high` are (n, 2) x, y; NaN for a polygon without a point.
    """

    owner: Integers
    numbers: Integers
    low: Floats
    high: Floats


LineLookup = Callable[[Sequence[int]], Sequence[int | None]]


def no_outline(row: int) -> Any:
    """The outline of a row in a source without segmentations."""


def no_lines(rows: Sequence[int]) -> list[int | None]:
    """The lookup of a source without line numbers."""
    return [None] * len(rows)


@dataclass
class SplitTable:
    """One split as columns.

    Image columns have one entry per usable image record, annotation columns one per record whose
    box is numeric. `boxes` is (n, 4) x, y, w, h in pixels; those of a YOLO split are fractions
    until `scale_boxes`. `image_rows` and `category_rows` index the image and category lists, -1
    for an unknown id. `areas` is None for a layout without areas. `image_records` and
    `annotation_records` are positions in the lists of the file. A table that is not `readable`
    lacks an entire list, so nothing can be concluded from what is missing in it. `broken_names` are
    the files named by image records that are otherwise unusable. `raw_ids`: category ids are used
    as labels. `rejected` annotation rows and `rejected_images` image records could not be read.
    `outline` gives the polygons in pixels or the RLE of a row, as in COCO, once boxes are in
    pixels. `masks` are the RLE masks by row, `bad_segmentations` what is wrong with those that are
    neither polygons nor RLE. `split` has the folders of a YOLO split.
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
    crowd: Bools = field(default_factory=lambda: np.zeros(0, bool))
    masked: Bools = field(default_factory=lambda: np.zeros(0, bool))
    polygons: PolygonExtents | None = None
    label_files: list[str] | None = None
    image_records: Integers | None = None
    annotation_records: Integers | None = None
    image_lines: LineLookup = no_lines
    annotation_lines: LineLookup = no_lines
    broken_names: frozenset[str] = frozenset()
    relative: bool = False
    readable: bool = True
    outline: Callable[[int], Any] = no_outline
    raw_ids: bool = False
    rejected: int = 0
    rejected_images: int = 0
    bad_segmentations: list[tuple[int, str]] = field(default_factory=list)
    masks: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    split: SplitPaths | None = None

    def __post_init__(self) -> None:
        """Fill the boolean columns that a layout does not have."""
        for name in ("crowd", "masked"):
            if len(getattr(self, name)) != len(self.boxes):
                setattr(self, name, np.zeros(len(self.boxes), bool))

    @property
    def images_listed(self) -> int:
        """Images that the split lists."""
        return len(set(self.file_names)) + self.rejected_images

    @cached_property
    def source(self) -> str | None:
        """The annotation file, relative to the dataset folder."""
        return self.show(self.annotation_file) if self.annotation_file else None

    def show(self, path: Path) -> str:
        """A path relative to the dataset folder, with forward slashes."""
        try:
            return path.relative_to(self.folder).as_posix()
        except ValueError:
            return path.as_posix()

    def image_file(self, row: int) -> str:
        """The image file of a row, relative to the dataset folder."""
        name = self.file_names[row]
        if "/" in name or name in {"", ".", ".."} or self._images == ".":
            return self.show(self.images_dir / name)
        return f"{self._images}/{name}"  # a Path per finding costs more

    @cached_property
    def _images(self) -> str:
        return self.show(self.images_dir)

    def image_place(self, row: int) -> dict[str, Any]:
        """Location of an image record, as fields of a finding."""
        return {
            "split": self.name,
            "file": self._file_of(row),
            "line": self.image_lines([row])[0] if self.label_files is None else None,
            "image_id": identifier(self.image_ids[row]),
        }

    def file_place(self, row: int, file: str | None = None) -> dict[str, Any]:
        """Location of an image file, with details; `file` is its path if not the record's."""
        file = file or self.image_file(row)
        details = {**self.image_details(row), "image": file}
        return {**self.image_place(row), "file": file, "line": None, "details": details}

    def image_details(self, row: int) -> dict[str, Any]:
        """What thumbnails and repairs need to know about an image record."""
        record = None if self.image_records is None else int(self.image_records[row])
        return {"section": "images", "record": record, "image": self.image_file(row)}

    def annotation_details(self, row: int) -> dict[str, Any]:
        """What thumbnails and repairs need to know about an annotation."""
        image = int(self.image_rows[row])
        records = self.annotation_records
        return {
            "section": "annotations",
            "record": None if records is None else int(records[row]),
            "image": self.image_file(image) if image >= 0 else None,
            "box": np.nan_to_num(self.boxes[row]).clip(-HUGE, HUGE).round(3).tolist(),
        }

    def annotation_places(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Locations of annotations: file, line, image id and annotation id."""
        places = []
        for row, line in zip(rows, self.annotation_lines(rows), strict=True):
            image = int(self.image_rows[row])
            places.append(
                {
                    "split": self.name,
                    "file": self._file_of(image),
                    "line": line,
                    "image_id": identifier(self.image_ids[image]) if image >= 0 else None,
                    "annotation_id": identifier(self.annotation_ids[row]),
                }
            )
        return places

    def _file_of(self, image_row: int) -> str | None:
        if self.label_files is not None:
            return self.label_files[image_row] if image_row >= 0 else None
        return self.source

    def image_name(self, row: int) -> str:
        """File name of an annotation's image, or that it is unknown."""
        image = int(self.image_rows[row])
        return self.file_names[image] if image >= 0 else "unknown image"

    @cached_property
    def outline_boxes(self) -> Floats:
        """What the polygons of each row extend over, (n, 4) x0, y0, x1, y1; NaN without any.

        Training skips polygons of fewer than three points, and so are they here.
        """
        found = np.full((len(self.boxes), 4), np.nan, order="F")
        if self.polygons is None:
            return found
        filled = np.isfinite(self.polygons.low).all(axis=1) & (self.polygons.numbers >= 6)
        owner = self.polygons.owner[filled]  # ascending
        starts = np.flatnonzero(np.diff(owner, prepend=-1))
        if len(starts):
            rows = owner[starts]
            for axis in (0, 1):
                low, high = self.polygons.low[filled, axis], self.polygons.high[filled, axis]
                found[rows, axis] = np.minimum.reduceat(low, starts)
                found[rows, axis + 2] = np.maximum.reduceat(high, starts)
        return found

    def scale_boxes(self, nominal: int) -> None:
        """Turn fractions into pixels; `nominal` is the side of images of unknown size."""
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

    def image_sizes(self) -> Floats:
        """Width and height (n, 2) of each annotation's image; NaN where they are unknown."""
        known = (np.isfinite(self.sizes) & (self.sizes > 0)).all(axis=1, keepdims=True)
        sizes = np.where(known, self.sizes, np.nan)
        return np.vstack([sizes, [np.nan, np.nan]]).take(self.image_rows, axis=0)


def repeated_rows(values: npt.NDArray[Any]) -> Integers:
    """Positions whose value occurs earlier, ascending."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    return np.sort(order[1:][ordered[1:] == ordered[:-1]])


def identifier(value: np.int64 | int) -> int | None:
    """An id for a report, None if the record has none."""
    return None if value == NO_ID else int(value)
