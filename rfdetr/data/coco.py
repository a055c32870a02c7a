"""COCO annotation files to an AnnotationIndex."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from rfdetr.arrays import Bools, Floats, Integers, find_rows
from rfdetr.data.categories import CategoryTable, category_table, check_ids, check_same
from rfdetr.data.coco_json import Category, CocoFile, ImageTable, read_coco
from rfdetr.data.decode import file_size
from rfdetr.data.folders import missing_hints
from rfdetr.data.index import (
    SHOWN,
    AnnotationIndex,
    FileOutlines,
    PackedStrings,
    missing_files,
    raise_problems,
)
from rfdetr.data.layouts import Kind, Layout, SplitPaths, detect_layout
from rfdetr.data.ledger import (
    OUTSIDE,
    TRAINED,
    SplitLedger,
    coco_corners,
    count_files,
    count_rows,
    row_accounts,
)

MOST_READ = 5_000  # images whose headers setup reads: about a second
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


def dataset_categories(folder: str | Path, layout: Kind, split: str = "train") -> dict[int, int]:
    """Label -> category id of the annotation files; empty for YOLO, which has no ids."""
    found = detect_layout(folder, layout)
    if found.kind == "yolo":
        return {}
    splits = CocoSplits(found, check_files=False)
    splits.index(split if split in found.splits else "val")
    return splits.category_ids


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
        missing = list(missing_files(folder, images.names))
        hints = missing_hints(folder, missing[:SHOWN]) + [""] * len(missing[SHOWN:])
        for name, hint in zip(missing, hints, strict=True):
            reason = f" ({hint})" if hint else ""
            problems.append(f"image file {folder / name} does not exist{reason}")
    raise_problems(coco.path, problems, f"Fix the annotation file. {CHECKS}")
    _warn_dangling(coco, int((owner < 0).sum()))

    corners = coco_corners(rows.boxes)
    sizes = _sizes(images, folder if check_files else None)
    accounts = row_accounts(corners, _of_rows(sizes, owner), rows.crowd, owner)
    if check_files and _correct_sizes(sizes, owner, accounts == OUTSIDE, images, folder):
        accounts = row_accounts(corners, _of_rows(sizes, owner), rows.crowd, owner)
    kept = np.argsort(owner, kind="stable")[int((owner < 0).sum()) :]  # by image, in file order
    box_areas = rows.boxes[kept, 2] * rows.boxes[kept, 3]
    given = rows.areas[kept]
    areas = np.where(given > 0, given, box_areas)  # COCO evaluation ignores boxes of negative area
    starts, stops = rows.starts[kept], rows.stops[kept]
    return AnnotationIndex(
        root=folder,
        names=PackedStrings(images.names),
        image_ids=images.ids,
        first=np.searchsorted(owner[kept], np.arange(len(images.ids) + 1)),
        boxes=corners[kept],
        labels=labels[kept],
        areas=areas.astype(np.float32),
        crowd=rows.crowd[kept],
        class_names=table.class_names,
        num_classes=table.num_classes,
        outlines=FileOutlines.of(coco.path, starts, stops) if masks else None,
        masked=rows.outlined[kept] if masks else None,
        ledger=coco_ledger(folder, images.names, owner, accounts) if check_files else SplitLedger(),
    )


def coco_ledger(
    folder: Path,
    names: Sequence[str],
    owner: Integers,
    accounts: Integers,
    *,
    refused: int = 0,
    unusable: int = 0,
    broken: Collection[int] = (),
) -> SplitLedger:
    """The ledger of a split from the accounts of its rows and the images that they belong to.

    `refused` and `unusable` are the numbers of annotation rows and of image records that could not
    be read, `broken` are the images that cannot be decoded.
    """
    with_objects = np.zeros(len(names), bool)
    with_objects[owner[accounts == TRAINED]] = True
    paths = [os.path.join(folder, name) for name in names]  # noqa: PTH118 - a million names
    counts, _ = count_files([folder], paths, with_objects, broken=broken)
    return SplitLedger(counts, count_rows(accounts, refused=refused), len(set(names)) + unusable)


def _sizes(images: ImageTable, folder: Path | None) -> Floats:
    """Width and height (n, 2): of the annotation file, else of the image file, else NaN."""
    sizes = np.stack([images.widths, images.heights], axis=1).astype(np.float64)
    unknown = (sizes <= 0).any(axis=1)
    sizes[unknown] = np.nan
    for row in np.flatnonzero(unknown) if folder is not None else ():
        assert folder is not None
        sizes[row] = file_size(folder / images.names[row]) or (np.nan, np.nan)
    return sizes


def _of_rows(sizes: Floats, owner: Integers) -> Floats:
    """The image size of each row; NaN for an image that is not listed."""
    return np.asarray(np.vstack([sizes, [np.nan, np.nan]])[owner])


def _correct_sizes(
    sizes: Floats, owner: Integers, outside: Bools, images: ImageTable, folder: Path
) -> bool:
    """Take image sizes from the files, to which training clips boxes; return whether any differs.

    Of more than MOST_READ images only some are read, because all would take too long: those with
    boxes outside, and every n-th one. All are read if one of these differs.
    """

    def differs(rows: Integers) -> bool:
        before = sizes[rows]
        for row in rows.tolist():
            sizes[row] = file_size(folder / images.names[row]) or sizes[row]
        return not np.array_equal(before, sizes[rows], equal_nan=True)

    annotated = np.unique(owner[owner >= 0])
    some = annotated[:: 1 + len(annotated) // MOST_READ]
    if not differs(some):
        return differs(np.unique(owner[outside]))
    differs(np.setdiff1d(annotated, some))
    return True


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
