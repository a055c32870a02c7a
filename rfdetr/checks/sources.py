"""Reads the splits of a dataset folder in any layout."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from rfdetr.checks.coco_source import read_coco_split
from rfdetr.checks.collector import Collector
from rfdetr.checks.options import CheckConfig
from rfdetr.checks.table import SplitTable
from rfdetr.checks.yolo_source import read_yolo_layout, read_yolo_split
from rfdetr.data.layouts import (
    ANNOTATIONS,
    FOLDERS,
    YAML_NAMES,
    Kind,
    Layout,
    SplitPaths,
    detect_layout,
    exported_splits,
    found_in,
)
from rfdetr.errors import DatasetError


class Sources(NamedTuple):
    """A dataset whose layout was recognised, and its splits."""

    layout: Layout
    tables: list[SplitTable]


def read_sources(
    dataset_dir: str | os.PathLike[str],
    dataset_file: Kind,
    collector: Collector,
    config: CheckConfig,
    workers: int | None,
) -> Sources:
    """Read every split tolerantly. Raises DatasetError when there is no dataset to check."""
    root = Path(dataset_dir).expanduser().absolute()
    layout = _find_layout(root, dataset_file, collector)
    tables = []
    for split in layout.splits.values():
        if split.annotations is None:
            tables.append(read_yolo_split(layout, split, collector))
        else:
            folder, file = split.images[0], split.annotations
            table = read_coco_split(
                split.name,
                root,
                folder,
                file,
                collector=collector,
                workers=workers,
                known=tables[0].categories if tables else (),
            )
            table.raw_ids = layout.kind == "coco"
            tables.append(table)
    if not tables and layout.kind != "yolo":
        raise DatasetError(f"{root}: no split was found. {found_in(root)}")
    _report_splits(layout, tables, collector)
    _report_proportions(tables, collector, config)
    return Sources(layout, tables)


def _find_layout(root: Path, dataset_file: Kind, collector: Collector) -> Layout:
    if not root.is_dir():
        return detect_layout(root, dataset_file)  # raises with the reason
    yaml_file = next((root / name for name in YAML_NAMES if (root / name).is_file()), None)
    exported = dict(exported_splits(root))
    if dataset_file == "coco" or (dataset_file == "yolo" and yaml_file is None):
        return detect_layout(root, dataset_file)
    if dataset_file == "roboflow" and exported:
        _report_bare_folders(root, exported, collector)
        return Layout("roboflow", root, exported)
    if yaml_file is not None:
        return read_yolo_layout(root, yaml_file, collector)
    return detect_layout(root, dataset_file)


def _report_bare_folders(root: Path, splits: dict[str, SplitPaths], collector: Collector) -> None:
    for name, folders in FOLDERS.items():
        bare = next((root / folder for folder in folders if (root / folder).is_dir()), None)
        if name not in splits and bare is not None and (name != "test" or any(bare.iterdir())):
            text = f"{bare.name}/ has no {ANNOTATIONS}"
            collector.add("annotation-file-missing", text, split=name, file=bare.name)


def _report_splits(layout: Layout, tables: list[SplitTable], collector: Collector) -> None:
    present = {table.name for table in tables}
    for name in ("train", "val"):
        if name not in present:
            text = f"no {name} split. {found_in(layout.root)}"
            collector.add("split-missing", text, split=name)
    if "test" not in present and layout.kind != "coco":
        collector.add("split-test-missing", "no test split", split="test")
    for table in tables:
        if not table.readable:
            continue
        if not table.file_names:
            code = "split-test-missing" if table.name == "test" else "split-empty"
            collector.add(code, f"{table.name} has no images", split=table.name, file=table.source)


def _report_proportions(
    tables: list[SplitTable], collector: Collector, config: CheckConfig
) -> None:
    sizes = {table.name: len(table.file_names) for table in tables}
    if not sizes.get("train") or not sizes.get("val"):
        return
    share = sizes["val"] / (sizes["train"] + sizes["val"])
    if not config.min_valid_share <= share <= config.max_valid_share:
        text = (
            f"val has {sizes['val']} images, train {sizes['train']}: {share:.1%} for validation "
            f"(expected {config.min_valid_share:.0%} to {config.max_valid_share:.0%})"
        )
        collector.add("split-size", text, split="val")
