"""Checks of category tables: within a split, between splits and against the annotations."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import TypeVar

import numpy as np

from rfdetr.checks.codes import Severity
from rfdetr.checks.collector import Collector
from rfdetr.checks.options import CheckConfig
from rfdetr.checks.table import SplitTable
from rfdetr.data.categories import (
    HIGHEST_RAW_ID,
    CategoryTable,
    category_differences,
    category_table,
    id_problems,
    is_raw_label,
)

Key = TypeVar("Key", int, str)


def check_categories(
    tables: Sequence[SplitTable], collector: Collector, config: CheckConfig
) -> None:
    """Ghosts, unused, duplicated and differing categories, missing and rare classes."""
    tables = [table for table in tables if table.readable]
    if not tables:
        return
    labels = training_table(tables).labels
    _check_table(tables[0], labels, collector)
    _check_equal(tables, labels, collector)
    counts = {table.name: counts_by_id(table) for table in tables}
    ghosts = ghost_categories(tables)
    first = tables[0]
    if not first.categories and first.label_files is None:
        text = f"{first.name} lists no categories"
        collector.add("categories-missing", text, split=first.name, file=first.source)
    for row, category in enumerate(first.categories):
        if row in ghosts:
            text = (
                f"category {category.id} '{category.name}' is only the parent of other categories"
            )
            collector.add("category-ghost", text, **_place(first, row))
            continue
        found = {table.name: int(counts[table.name].get(category.id, 0)) for table in tables}
        _check_presence(first, row, found, collector)
    _check_balance(first, ghosts, counts[first.name], collector, config)


def training_table(tables: Sequence[SplitTable]) -> CategoryTable:
    """The classes as training reads them; every category if training refuses the list."""
    if not tables:
        return CategoryTable({}, ())
    first = tables[0]
    raw = first.raw_ids or first.label_files is not None
    if id_problems(first.categories, first.raw_ids):
        listed = sorted(first.categories, key=lambda category: category.id)
        return CategoryTable({c.id: i for i, c in enumerate(listed)}, tuple(c.name for c in listed))
    used = np.flatnonzero(np.bincount(first.category_rows[first.category_rows >= 0])).tolist()
    return category_table(first.categories, {first.categories[row].id for row in used}, raw=raw)


def ghost_categories(tables: Sequence[SplitTable]) -> set[int]:
    """Rows of the first table that training drops, because they are only parents of others."""
    labels = training_table(tables).labels
    return {row for row, c in enumerate(tables[0].categories) if c.id not in labels}


def _place(table: SplitTable, row: int) -> dict[str, object]:
    category = table.categories[row]
    return {
        "split": table.name,
        "file": table.source,
        "details": {"category_id": category.id, "category": category.name},
    }


def _check_table(table: SplitTable, labels: Container[int], collector: Collector) -> None:
    """Ids and names of one table; names only of the categories that training has `labels` for."""
    ids: dict[int, str] = {}
    names: dict[str, int] = {}
    for row, category in enumerate(table.categories):
        place = _place(table, row)
        if table.raw_ids and not is_raw_label(category.id):
            text = (
                f"category '{category.name}' has the id {category.id}; ids of plain COCO are "
                f"used as labels and must be in 0..{HIGHEST_RAW_ID}"
            )
            collector.add("category-id-range", text, **place)
        if category.id in ids:
            text = (
                f"category id {category.id} is used by '{ids[category.id]}' and '{category.name}'"
            )
            collector.add("category-id-duplicate", text, **place)
        ids.setdefault(category.id, category.name)
        name = category.name.strip()
        if not name:
            text = f"category {category.id} has no name"
            collector.add("category-name-invalid", text, **place)
        elif category.id not in labels:
            continue
        elif name in names:
            _report_same_name(table, names[name], row, collector)
        names.setdefault(name, row)


def _report_same_name(table: SplitTable, first: int, row: int, collector: Collector) -> None:
    """An error if training would learn one class as two: both are used, with the same parent."""
    one, other = table.categories[first], table.categories[row]
    counts = counts_by_id(table)
    both = bool(counts[one.id] and counts[other.id])
    text = f"'{one.name}' is the name of the categories {one.id} and {other.id}"
    if both and one.supercategory == other.supercategory:
        text += ", and both have annotations: training learns them as two classes"
        severity: Severity = "error"
    else:
        severity = "warning"
        text += f" of '{one.supercategory}' and '{other.supercategory}'" if both else ""
    collector.add("category-name-duplicate", text, severity=severity, **_place(table, row))


def _check_equal(
    tables: Sequence[SplitTable], labels: Container[int], collector: Collector
) -> None:
    """Other meanings of an id, and annotations of categories that train does not have."""
    for table in tables[1:]:
        if table.label_files is not None or not table.file_names:  # one data.yaml, or unused
            continue
        found = category_differences(table.categories, tables[0].categories)
        differing = {category_id for category_id, _ in found}
        for category_id, count in counts_by_id(table, crowd=True).items():
            if count and category_id not in labels and category_id not in differing:
                text = (
                    f"{count} annotation(s) have the category {category_id}, not a class of train"
                )
                found.append((category_id, text))
        for category_id, text in found:
            collector.add(
                "category-split-differs",
                text,
                split=table.name,
                file=table.source,
                details={"category_id": category_id},
            )


def _check_presence(
    table: SplitTable, row: int, found: dict[str, int], collector: Collector
) -> None:
    category = table.categories[row]
    if not any(found.values()):
        text = f"class {category.id} '{category.name}' has no annotation"
        collector.add("category-unused", text, **_place(table, row))
        return
    for split, count in found.items():
        if not count:
            place = {**_place(table, row), "split": split}
            text = f"class {category.id} '{category.name}' has no annotation in {split}"
            collector.add("class-missing", text, **place)


def _check_balance(
    table: SplitTable,
    ghosts: set[int],
    counts: dict[int, int],
    collector: Collector,
    config: CheckConfig,
) -> None:
    filled = [
        (counts[category.id], category.name)
        for row, category in enumerate(table.categories)
        if row not in ghosts and counts.get(category.id)
    ]
    if len(filled) < 2:
        return
    most, least = max(filled), min(filled)
    if most[0] > config.max_imbalance * least[0]:
        text = f"'{most[1]}' has {most[0]} annotations, '{least[1]}' has {least[0]} in {table.name}"
        collector.add("class-imbalance", text, split=table.name)


def counts_by_name(table: SplitTable) -> dict[str, int]:
    """Number of annotations per class name, without crowd regions."""
    return _counts_by([category.name for category in table.categories], table)


def counts_by_id(table: SplitTable, *, crowd: bool = False) -> dict[int, int]:
    """Number of annotations per category id, with crowd regions if `crowd`."""
    return _counts_by([category.id for category in table.categories], table, crowd=crowd)


def _counts_by(keys: Sequence[Key], table: SplitTable, *, crowd: bool = False) -> dict[Key, int]:
    """Annotations per key of the category; several categories may have one key."""
    rows = table.category_rows[(~table.crowd | crowd) & (table.category_rows >= 0)]
    per_row = np.bincount(rows, minlength=len(keys))
    counts: dict[Key, int] = {}
    for key, count in zip(keys, per_row.tolist(), strict=True):
        counts[key] = counts.get(key, 0) + count
    return counts
