"""COCO annotation files to an AnnotationIndex."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from rfdetr.arrays import Integers, find_rows
from rfdetr.data.categories import CategoryTable, category_table, check_ids, check_same
from rfdetr.data.coco_json import Category, CocoFile, read_coco
from rfdetr.data.index import (
    AnnotationIndex,
    FileOutlines,
    PackedStrings,
    missing_files,
    raise_problems,
)
from rfdetr.data.layouts import Layout, SplitPaths

CHECKS = "`python -m rfdetr.checks` reports all problems of the dataset."


class CocoSplits:
    """Reads the splits of a COCO layout; all use the category table of the training split."""

    def __init__(self, layout: Layout, *, masks: bool = False, check_files: bool = True) -> None:
        self.layout = layout
        self.masks = masks
        self.check_files = check_files
        self._train: tuple[list[Category], CategoryTable, Path] | None = None

    def index(self, name: str) -> AnnotationIndex:
        """The index of one split. Raises DatasetError that lists its problems."""
        split = self.layout.require(name)
        assert split.annotations is not None
        coco = read_coco(split.annotations, segmentation=self.masks)
        table = self._table(split, coco)
        return build_index(
            coco, split.images[0], table, masks=self.masks, check_files=self.check_files
        )

    @property
    def category_ids(self) -> dict[int, int]:
        """Label -> category id of the annotation files; empty until an index has been read."""
        if self._train is None:
            return {}
        return {label: number for number, label in self._train[1].labels.items()}

    def _table(self, split: SplitPaths, coco: CocoFile) -> CategoryTable:
        if self._train is None:
            train = self.layout.splits.get("train", split)
            assert train.annotations is not None
            source = coco if train is split else read_coco(train.annotations, segmentation=False)
            raw = self.layout.kind == "coco"
            check_ids(source.path, source.categories, raw)
            used = set(np.unique(source.annotations.category_ids).tolist())
            table = category_table(source.categories, used, raw=raw)
            self._train = (source.categories, table, source.path)
        categories, table, path = self._train
        check_same(coco.path, coco.categories, categories, path)
        return table


def build_index(
    coco: CocoFile,
    folder: Path,
    table: CategoryTable,
    *,
    masks: bool = False,
    check_files: bool = True,
) -> AnnotationIndex:
    """The arrays of one annotation file.

    `folder` contains the images; `check_files` verifies that each one exists. Raises DatasetError
    that lists every problem.
    """
    images, rows = coco.images, coco.annotations
    owner = find_rows(images.ids, rows.image_ids)
    labels = table.lookup(rows.category_ids)
    problems = _duplicates(images.ids)
    for i in np.flatnonzero((labels < 0) & (owner >= 0)):
        problems.append(
            f"annotation {rows.ids[i]}: category {rows.category_ids[i]} is not one of "
            f"{sorted(table.labels)}"
        )
    if check_files:
        missing = missing_files(folder, images.names)
        problems += [f"image file {folder / name} does not exist" for name in missing]
    raise_problems(coco.path, problems, f"Fix the annotation file. {CHECKS}")
    _warn_dangling(coco, int((owner < 0).sum()))

    kept = np.argsort(owner, kind="stable")[int((owner < 0).sum()) :]  # by image, in file order
    corners = rows.boxes[kept].astype(np.float32)
    corners[:, 2:] += corners[:, :2]
    box_areas = rows.boxes[kept, 2] * rows.boxes[kept, 3]
    given = rows.areas[kept]
    areas = np.where(given > 0, given, box_areas)  # COCO evaluation ignores boxes of negative area
    starts, stops = rows.starts[kept], rows.stops[kept]
    return AnnotationIndex(
        root=folder,
        names=PackedStrings(images.names),
        image_ids=images.ids,
        first=np.searchsorted(owner[kept], np.arange(len(images.ids) + 1)),
        boxes=corners,
        labels=labels[kept],
        areas=areas.astype(np.float32),
        crowd=rows.crowd[kept],
        class_names=table.class_names,
        num_classes=table.num_classes,
        outlines=FileOutlines.of(coco.path, starts, stops) if masks else None,
    )


def _duplicates(ids: Integers) -> list[str]:
    values, counts = np.unique(ids, return_counts=True)
    return [f"image id {i} occurs more than once" for i in values[counts > 1].tolist()]


def _warn_dangling(coco: CocoFile, count: int) -> None:
    if count:
        warnings.warn(
            f"{coco.path}: {count} annotation(s) refer to image ids that the file does not list; "
            f"they are ignored. {CHECKS}",
            stacklevel=3,
        )
