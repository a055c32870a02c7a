"""The ledger of each split, and findings about what training does not use."""

from __future__ import annotations

import os

import numpy as np

from rfdetr.arrays import Bools, Integers
from rfdetr.checks.check_categories import training_table
from rfdetr.checks.check_files import SplitFiles
from rfdetr.checks.collector import Collector
from rfdetr.checks.table import SplitTable
from rfdetr.config import ModelConfig
from rfdetr.data.coco import coco_ledger
from rfdetr.data.ledger import (
    CROWD,
    REFUSED,
    TRAINED,
    UNSEEN,
    SplitLedger,
    coco_corners,
    count_rows,
    row_accounts,
)
from rfdetr.data.yolo import label_accounts, yolo_ledger


def split_ledger(files: SplitFiles, first: SplitTable) -> tuple[SplitLedger, Integers]:
    """The ledger of a split, and the account of each row of its table.

    `first` is the table whose categories training uses. Call it when image sizes are known and
    before the boxes of a YOLO split are scaled. Without image checks the files are left out.
    """
    table = files.table
    accounts = _accounts(files)
    listed = table.image_rows >= 0
    accounts[~_known_categories(table, first) & listed] = REFUSED
    if not files.inspected:
        rows = count_rows(accounts, refused=table.rejected)
        return SplitLedger({}, rows, table.images_listed), accounts
    unread = np.array([found is None or found.facts.status != "ok" for found in files.facts], bool)
    accounts[listed & np.append(unread, False)[table.image_rows]] = UNSEEN
    broken = {
        row
        for row, found in enumerate(files.facts)
        if found is not None and found.facts.status not in ("ok", "missing")
    }
    if table.split is not None:
        paths = [table.images_dir / name for name in table.file_names]
        labels = [table.folder / name for name in table.label_files or ()]
        ledger = yolo_ledger(
            table.split,
            paths,
            labels,
            accounts,
            table.image_rows,
            root=table.folder,
            refused=table.rejected,
            broken=broken,
        )
        return ledger, accounts
    names = [
        name if path is None else os.path.relpath(path, table.images_dir)
        for name, path in zip(table.file_names, files.paths, strict=True)
    ]
    ledger = coco_ledger(
        table.images_dir,
        names,
        table.image_rows,
        accounts,
        refused=table.rejected,
        unusable=table.rejected_images,
        broken=broken,
    )
    return ledger, accounts


def _accounts(files: SplitFiles) -> Integers:
    """The account of each row by its box; boxes are clipped to the image as it is on disk."""
    table = files.table
    if table.relative:
        corners = np.concatenate([table.boxes[:, :2], table.boxes[:, :2] + table.boxes[:, 2:]], 1)
        return label_accounts(corners, table.image_rows)
    sizes = np.vstack([table.sizes, (np.nan, np.nan)])[table.image_rows]
    return row_accounts(coco_corners(table.boxes), sizes, table.crowd, table.image_rows)


def _known_categories(table: SplitTable, first: SplitTable) -> Bools:
    """Whether training knows the category of each row."""
    labels = training_table([first]).labels
    usable = np.array([category.id in labels for category in table.categories] + [False], bool)
    return np.asarray(usable[table.category_rows])


def check_ledger(
    table: SplitTable,
    ledger: SplitLedger,
    accounts: Integers,
    collector: Collector,
    model: ModelConfig,
) -> None:
    """Report nothing to train, many crowd regions, and objects without a mask."""
    if not table.readable or not table.file_names:
        return
    place = {"split": table.name, "file": table.source}
    if not ledger.objects:
        code = "split-nothing-to-train" if table.name == "train" else "split-unannotated"
        collector.add(code, f"{table.name} has {ledger.without_objects()}", **place)
    crowd, total = int((accounts == CROWD).sum()), len(accounts)
    if crowd > collector.config.max_crowd_share * total:
        text = (
            f"{table.name}: {crowd:,} of {total:,} annotations have iscrowd 1, which training "
            "ignores"
        )
        collector.add("crowd-share", text, **place)
    if model.segmentation_head:
        _check_masks(table, accounts, collector)


def _check_masks(table: SplitTable, accounts: Integers, collector: Collector) -> None:
    rows = np.flatnonzero((accounts == TRAINED) & ~table.masked)
    if table.name == "train" and len(table.masked) and not table.masked.any():
        text = "no annotation of train has a segmentation"
        collector.add("segmentation-none", text, split=table.name, file=table.source)
    else:
        collector.add_annotations(
            table, "segmentation-missing", rows, lambda _row: "the object has a box only"
        )
