"""What the annotation files of a dataset say; no image is opened."""

from __future__ import annotations

from pathlib import Path

from flows.config.starter import DatasetFacts
from flows.storage.packs import open_dataset
from rfdetr.data.categories import UNUSED
from rfdetr.data.layouts import SPLITS, Kind
from rfdetr.errors import DatasetError


def read_facts(
    folder: Path, layout: Kind, *, state_dir: Path, name: str, dir: str, source: Path
) -> DatasetFacts:
    """Class names and counts of `folder`, which will be `dir` in the project.

    Raises DatasetError, whose text names `source`, if nothing can be trained.
    """
    from rfdetr.checks.check_categories import training_table
    from rfdetr.checks.collector import Collector
    from rfdetr.checks.options import CheckConfig
    from rfdetr.checks.sources import read_sources

    config = CheckConfig(check_images=False)
    collector = Collector(config)
    tables = read_sources(open_dataset(folder, state_dir), layout, collector, config, None).tables
    for table in tables:
        if not table.readable:
            found = next(item for item in collector.findings() if item.split == table.name)
            raise DatasetError(
                f"{source}: {found.file}: {found.message.rstrip('.')}. {found.advice}"
            )
    by_name = {table.name: table for table in tables}
    if "train" not in by_name or not len(by_name["train"].boxes):
        raise DatasetError(f"{source}: the training split has no annotations; export it again.")
    objects = sum(len(table.boxes) for table in tables)
    masked = sum(int(table.masked.sum()) for table in tables)
    return DatasetFacts(
        name=name,
        dir=dir,
        layout=layout,
        class_names=[name for name in training_table(tables).class_names if name != UNUSED],
        images={s: len(by_name[s].file_names) for s in SPLITS if s in by_name},
        objects={s: len(by_name[s].boxes) for s in SPLITS if s in by_name},
        masks=masked / objects if objects else 0.0,
    )
