"""The ledger of a split: every file on disk and every annotation row in exactly one account.

Training and the dataset checks each keep one, by the rules below.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rfdetr.arrays import Bools, Integers
from rfdetr.data.decode import IMAGE_SUFFIXES
from rfdetr.data.folders import list_files

# Accounts of annotation rows; the first ones by the number that `row_accounts` returns.
TRAINED, CROWD, FLAT, OUTSIDE, UNLISTED, REFUSED, UNSEEN = range(7)
ROW_ACCOUNTS = (
    "trained",
    "crowd",
    "dropped: the box has no area",
    "dropped: the box lies outside the image",
    "ignored: the image is not listed",
    "refused: the row cannot be used",
    "refused: the image cannot be read",
)
LOST_ROWS = "ignored: the label file has no image"

# Accounts of files.
WITH_OBJECTS = "trained with objects"
BACKGROUND = "trained as background"
BROKEN = "refused: the image cannot be decoded"
HIDDEN = "ignored: hidden file or folder"
UNLISTED_IMAGE = "ignored: the image is not listed"
LABELS = "label file"
LOST_LABELS = "ignored: the label file has no image"
ANNOTATIONS = "annotation file"
OTHER = "ignored: not an image"
NOTES = frozenset({"classes.txt", "labels.txt"})


@dataclass(frozen=True)
class SplitLedger:
    """Number of files and of annotation rows per account; accounts without any are left out.

    `images` is the number of images that the split lists, missing ones included. `hint` says where
    annotations may be if there are none.
    """

    files: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    images: int = 0
    hint: str = field(default="", compare=False)

    @property
    def objects(self) -> int:
        """Annotation rows that are trained."""
        return self.rows.get(ROW_ACCOUNTS[TRAINED], 0)

    @property
    def rows_listed(self) -> int:
        """Annotation rows of the split, without those of label files that have no image."""
        return sum(self.rows.values()) - self.rows.get(LOST_ROWS, 0)

    def __str__(self) -> str:
        return f"files: {_text(self.files)}; annotations: {_text(self.rows)}"

    def without_objects(self) -> str:
        """Why there is nothing to train, as a clause."""
        hint = f"; {self.hint}" if self.hint else ""
        return f"no object to train (annotations: {_text(self.rows)}{hint})"


def is_lost(account: str) -> bool:
    """Whether training does not use what is in this account, although it may be meant to."""
    return account.startswith(("dropped", "ignored", "refused"))


def _text(accounts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in accounts.items()) or "none"


def row_accounts(
    boxes: npt.NDArray[np.floating],
    sizes: npt.NDArray[np.floating],
    crowd: Bools,
    owner: Integers,
    least: float = 0.0,
) -> Integers:
    """The account of each annotation row: a position in ROW_ACCOUNTS.

    `boxes` (n, 4) are x0, y0, x1, y1, `sizes` (n, 2) width and height of the image in the same
    unit, NaN if unknown, and `owner` is negative for an image that is not listed. A box counts as
    training clips it: what is left must be wider and higher than `least`.
    """
    known = np.where(np.isfinite(sizes), sizes, np.inf)
    low, high = np.maximum(boxes[:, :2], 0), np.minimum(boxes[:, 2:], known)
    with np.errstate(invalid="ignore"):  # inf - inf
        flat = ~(boxes[:, 2:] - boxes[:, :2] > least).all(axis=1)
        outside = ~(high - low > least).all(axis=1)
    accounts = np.full(len(boxes), TRAINED, np.int64)
    for account, chosen in (
        (OUTSIDE, outside),
        (FLAT, flat),
        (CROWD, crowd),
        (UNLISTED, owner < 0),
    ):
        accounts[chosen] = account
    return accounts


def coco_corners(boxes: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Boxes (n, 4) x, y, width, height as x0, y0, x1, y1, rounded as training uses them."""
    corners = boxes.astype(np.float32)
    corners[:, 2:] += corners[:, :2]
    return corners


def count_rows(accounts: Integers, *, refused: int = 0, lost: int = 0) -> dict[str, int]:
    """Rows per account, with those that could not be read and those of files without an image."""
    counts = np.bincount(accounts, minlength=len(ROW_ACCOUNTS))
    counts[REFUSED] += refused
    named = dict(zip(ROW_ACCOUNTS, counts.tolist(), strict=True))
    return {name: count for name, count in {**named, LOST_ROWS: lost}.items() if count}


def count_files(
    folders: Iterable[Path],
    images: Sequence[str | Path],
    with_objects: Bools,
    *,
    broken: Collection[int] = (),
    labels: Collection[str | Path] | None = None,
) -> tuple[dict[str, int], list[str]]:
    """Files per account, and the label files without an image.

    `folders` are those of the split's images and labels. `images` are the files of the image
    records, `with_objects` says which have an object, `broken` are the positions of those that
    cannot be decoded. `labels` are the label files of these images, None in a COCO layout.
    """
    present = _present(folders)
    account: dict[str, str] = {}
    for label in labels or ():
        account[os.path.normpath(label)] = LABELS
    for number, image in enumerate(images):
        path = os.path.normpath(image)
        if account.get(path) != WITH_OBJECTS:
            account[path] = WITH_OBJECTS if with_objects[number] else BACKGROUND
        if number in broken:
            account[path] = BROKEN
    counts: Counter[str] = Counter()
    for path, name in account.items():
        if path in present or os.path.isfile(path):  # noqa: PTH113 - a Path object per image
            counts[name] += 1
    lost = []
    for path, hidden in present.items():
        if path not in account:
            name = HIDDEN if hidden else _unused(path, yolo=labels is not None)
            counts[name] += 1
            if name == LOST_LABELS:
                lost.append(path)
    return dict(sorted(counts.items(), key=lambda item: _order(item[0]))), lost


def _present(folders: Iterable[Path]) -> dict[str, bool]:
    """Files below the folders, each with whether it is hidden."""
    present: dict[str, bool] = {}
    for folder in folders:
        base = os.path.normpath(folder) + os.sep
        found = list_files(folder)
        present.update(dict.fromkeys((base + name for name in found.visible), False))
        present.update(dict.fromkeys((base + name for name in found.hidden), True))
    return present


def _unused(path: str, *, yolo: bool) -> str:
    name = os.path.basename(path).lower()  # noqa: PTH119 - a Path object per file
    suffix = os.path.splitext(name)[1]  # noqa: PTH122
    if suffix in IMAGE_SUFFIXES:
        return UNLISTED_IMAGE
    if yolo and suffix == ".txt" and name not in NOTES and not name.startswith("readme"):
        return LOST_LABELS
    return ANNOTATIONS if suffix == ".json" and not yolo else OTHER


def _order(name: str) -> int:
    order = (WITH_OBJECTS, BACKGROUND, LABELS, ANNOTATIONS, BROKEN, UNLISTED_IMAGE, LOST_LABELS)
    return order.index(name) if name in order else len(order)
