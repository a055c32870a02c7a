"""The table from category ids of annotation files to labels of the network."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from rfdetr.arrays import Integers, find_rows
from rfdetr.data.coco_json import Category
from rfdetr.errors import DatasetError

HIGHEST_RAW_ID = 10_000  # of plain COCO, where the id is the label
UNUSED = "N/A"  # name of a label without a category, where raw ids have gaps


class CategoryLike(Protocol):
    """A category as this module needs it; the readers and the dataset checks have own classes."""

    @property
    def id(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def supercategory(self) -> str | None: ...


@dataclass(frozen=True)
class CategoryTable:
    """`labels` maps category ids to labels; `class_names[i]` is the name of label i."""

    labels: Mapping[int, int]
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """The smallest `ModelConfig.num_classes` that fits.

        The classification head has `num_classes` + 1 outputs, so raw ids 1..90 fit 90.
        """
        highest = max(self.labels.values(), default=0)
        return max(1, highest + 1 if 0 in self.labels.values() else highest)

    def lookup(self, ids: Integers) -> Integers:
        """Labels of an array of category ids; -1 where the table has none."""
        known = np.fromiter(self.labels.keys(), np.int64, len(self.labels))
        labels = np.fromiter(self.labels.values(), np.int64, len(self.labels))
        rows = find_rows(known, ids)
        return np.append(labels, -1)[rows]  # row -1 is the appended -1


def category_table(
    categories: Sequence[CategoryLike], used_ids: Collection[int], *, raw: bool
) -> CategoryTable:
    """The table of a training split: of plain COCO if `raw`, else of a COCO export.

    `used_ids` are the category ids of all annotations of the file, crowd regions included. Call
    `check_ids` first.
    """
    return raw_table(categories) if raw else exported_table(categories, used_ids)


def exported_table(categories: Sequence[CategoryLike], used_ids: Collection[int]) -> CategoryTable:
    """The table of a COCO export: ids ascending, without categories that only group others.

    Roboflow exports list the project as a parent category, also when it has the name of its only
    class. A category is dropped when its name is the supercategory of another one and no annotation
    uses it; if that leaves nothing, all are kept.
    """
    children: dict[str | None, set[int]] = defaultdict(set)
    for c in categories:
        if c.supercategory not in (None, "", "none"):
            children[c.supercategory].add(c.id)
    used = set(used_ids)
    kept = [c for c in categories if c.id in used or not children[c.name] - {c.id}]
    kept = kept or list(categories)
    kept = sorted(kept, key=lambda category: category.id)
    return CategoryTable({c.id: i for i, c in enumerate(kept)}, tuple(c.name for c in kept))


def raw_table(categories: Sequence[CategoryLike]) -> CategoryTable:
    """The table of plain COCO: labels are the ids themselves; gaps are named "N/A"."""
    names = {c.id: c.name for c in categories}
    class_names = tuple(names.get(i, UNUSED) for i in range(max(names, default=-1) + 1))
    return CategoryTable({i: i for i in names}, class_names)


def check_ids(path: Path, categories: Sequence[CategoryLike], raw: bool) -> None:
    """Raise DatasetError for a category list that cannot become a table."""
    problems = id_problems(categories, raw)
    if problems:
        raise DatasetError(f"{path}: the categories cannot be used: {'; '.join(problems)}.")


def id_problems(categories: Sequence[CategoryLike], raw: bool) -> list[str]:
    """Why a category list cannot become a table; empty when it can."""
    problems = []
    seen: dict[int, str] = {}
    for category in categories:
        if category.id in seen:
            problems.append(f"id {category.id} is both {seen[category.id]!r} and {category.name!r}")
        seen.setdefault(category.id, category.name)
        if not category.name.strip():
            problems.append(f"id {category.id} has no name")
    if raw and not all(map(is_raw_label, seen)):
        problems.append(f"ids of plain COCO become labels and must be in 0..{HIGHEST_RAW_ID}")
    if not categories:
        problems.append("the list is empty")
    return problems


def is_raw_label(category_id: int) -> bool:
    """Whether the id of a plain COCO category can be a label."""
    return 0 <= category_id <= HIGHEST_RAW_ID


def check_same(
    path: Path, categories: Sequence[Category], train: Sequence[Category], train_path: Path
) -> None:
    """Raise DatasetError where a split gives a category of train another id or another name."""
    problems = [problem for _, problem in category_differences(categories, train)]
    if problems:
        raise DatasetError(
            f"{path}: the categories differ from those of {train_path}: {'; '.join(problems)}. "
            "Export the splits again with one category list."
        )


def category_differences(
    categories: Sequence[CategoryLike], train: Sequence[CategoryLike]
) -> list[tuple[int, str]]:
    """The ids to which a split gives another meaning than train, each with a sentence.

    A split may list a part of the categories, and further ones that it does not use.
    """
    names = {c.id: c.name for c in train}
    ids = {c.name: c.id for c in train}
    found = []
    for c in categories:
        if names.get(c.id, c.name) != c.name:
            found.append((c.id, f"id {c.id} is {c.name!r} here and {names[c.id]!r} in train"))
        elif ids.get(c.name, c.id) != c.id and c.id not in names:
            text = f"{c.name!r} has id {c.id} here and id {ids[c.name]} in train"
            found.append((c.id, text))
    return found
