"""The complete check of a dataset: read, inspect, check, count, compare."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rfdetr.arrays import Integers
from rfdetr.checks.cache import FactsCache
from rfdetr.checks.check_boxes import check_boxes
from rfdetr.checks.check_categories import check_categories, training_table
from rfdetr.checks.check_files import SplitFiles, check_files, find_files
from rfdetr.checks.check_format import check_format, check_outlines
from rfdetr.checks.check_ledger import check_ledger, split_ledger
from rfdetr.checks.check_segmentations import check_segmentations
from rfdetr.checks.check_sizes import check_sizes
from rfdetr.checks.check_splits import check_leaks
from rfdetr.checks.collector import Collector
from rfdetr.checks.compare import compare_versions
from rfdetr.checks.dataset_report import DatasetReport
from rfdetr.checks.inspection import inspect_images
from rfdetr.checks.options import CheckConfig
from rfdetr.checks.sampling import draw_samples
from rfdetr.checks.sources import Sources, read_sources
from rfdetr.checks.statistics import check_shares, fingerprints, split_statistics
from rfdetr.checks.table import SplitTable
from rfdetr.config import ModelConfig, RFDETRNanoConfig
from rfdetr.data.decode import Levels
from rfdetr.data.layouts import Kind
from rfdetr.data.ledger import SplitLedger
from rfdetr.data.levels import dataset_levels

Previous = DatasetReport | str | os.PathLike[str] | None


def check_dataset(
    dataset_dir: str | os.PathLike[str],
    dataset_file: Kind = "roboflow",
    *,
    config: CheckConfig | None = None,
    model_config: ModelConfig | None = None,
    previous: Previous = None,
    workers: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> DatasetReport:
    """Check a dataset completely and return every finding at once.

    `model_config` gives the resolution and patch size for box sizes (default: nano). `previous` is
    a report, a report.json or the folder of an older version. `workers` limits the processes (None:
    all cores). Results of unchanged images come from `cache_dir` (default: in the user's cache
    folder). Nothing is written to the dataset. Raises DatasetError if there is no dataset to check.
    """
    config = config or CheckConfig()
    model = model_config or RFDETRNanoConfig.model_validate({"pretrain_weights": None})
    if isinstance(previous, str | os.PathLike) and Path(previous).is_dir():
        previous = check_dataset(
            previous,
            dataset_file,
            config=config,
            model_config=model,
            workers=workers,
            cache_dir=cache_dir,
            progress=progress,
        )
    elif isinstance(previous, str | os.PathLike):
        previous = DatasetReport.read(previous)
    collector = Collector(config)
    sources = read_sources(dataset_dir, dataset_file, collector, config, workers)
    levels = model.grey_levels
    if config.check_images:
        splits = [find_files(table, collector) for table in sources.tables]
        levels = levels or _train_levels(splits)
        _inspect(
            splits,
            cache_dir,
            levels,
            max_pixels=config.max_pixels,
            workers=workers,
            progress=progress,
        )
        for split in splits:
            check_files(split, collector)
        check_leaks(splits, collector, config)
    else:
        splits = [SplitFiles.unread(table) for table in sources.tables]
    check_format(splits, collector)
    check_sizes(splits, collector)
    checked = [_check_split(split, sources.tables[0], collector, model) for split in splits]
    check_categories(sources.tables, collector, config)
    ledgers = {split.table.name: ledger for split, (ledger, _) in zip(splits, checked, strict=True)}
    accounts = [rows for _, rows in checked]
    report = _report(sources, splits, collector, model, previous, ledgers=ledgers)
    classes = training_table(sources.tables)
    report.samples = draw_samples(splits, accounts, classes, model.resolution)
    report.samples.levels = levels
    return report


def _check_split(
    split: SplitFiles, first: SplitTable, collector: Collector, model: ModelConfig
) -> tuple[SplitLedger, Integers]:
    """The ledger of a split and the account of each annotation, after the checks of its boxes."""
    ledger, rows = split_ledger(split, first)
    check_ledger(split.table, ledger, rows, collector, model)
    split.table.scale_boxes(model.resolution)
    check_boxes(split.table, collector, collector.config, model)
    check_outlines(split.table, collector, model)
    check_segmentations(split.table, rows, collector, model)
    return ledger, rows


def _train_levels(splits: Sequence[SplitFiles]) -> Levels | None:
    """The grey levels that training would use."""
    first = next((split for split in splits if split.table.name == "train"), None)
    if first is None:
        return None
    return dataset_levels(path for path in first.paths if path is not None)


def _inspect(
    splits: Sequence[SplitFiles],
    cache_dir: str | os.PathLike[str] | None,
    levels: Levels | None,
    *,
    max_pixels: int,
    workers: int | None,
    progress: bool,
) -> None:
    """Fill in the facts of all images; one call, so that all splits share one pool of processes."""
    paths = [path for split in splits for path in split.paths if path is not None]
    found = iter(
        inspect_images(
            paths,
            FactsCache(cache_dir, max_pixels, levels),
            max_pixels=max_pixels,
            levels=levels,
            workers=workers,
            progress=progress,
        )
    )
    for split in splits:
        split.facts = [next(found) if path is not None else None for path in split.paths]


def _report(
    sources: Sources,
    splits: Sequence[SplitFiles],
    collector: Collector,
    model: ModelConfig,
    older: DatasetReport | None,
    *,
    ledgers: dict[str, SplitLedger],
) -> DatasetReport:
    config = collector.config
    classes = training_table(sources.tables)
    named = [classes.class_names[label] for label in sorted(classes.labels.values())]
    statistics = {}
    for split in splits:
        numbers = split_statistics(split, named, model)
        check_shares(split.table, numbers, collector, config)
        statistics[split.table.name] = numbers
    prints = {split.table.name: fingerprints(split) for split in splits}
    comparison = None
    if older is not None:
        comparison = compare_versions(older, prints, statistics, collector, config)
    return DatasetReport(
        dataset=sources.layout.root.name,
        layout=sources.layout.kind,
        variant=type(model).variant,
        resolution=model.resolution,
        patch_size=model.patch_size,
        images_checked=config.check_images,
        ledger=ledgers,
        class_names=list(classes.class_names),
        annotation_files={
            table.name: table.source for table in sources.tables if table.source is not None
        },
        image_folders={table.name: table.show(table.images_dir) for table in sources.tables},
        counts=dict(sorted(collector.counts.items())),
        severities=collector.severities(),
        findings=collector.findings(),
        statistics=statistics,
        comparison=comparison,
        fingerprints=prints,
    )
