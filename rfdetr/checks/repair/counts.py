"""What a dataset lists and what of it training uses, per split, from the ledger of its report."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from rfdetr.checks.dataset_report import DatasetReport
from rfdetr.data.ledger import SplitLedger


@dataclass(frozen=True)
class SplitCounts:
    """One split: what it lists, the objects that training can use, and its findings."""

    images: int = 0
    annotations: int = 0
    objects: int = 0
    errors: int = 0
    warnings: int = 0


def count_splits(report: DatasetReport) -> dict[str, SplitCounts]:
    """The counts of every split of a report that lists every finding; "" is for no split."""
    levels = Counter((finding.split or "", finding.severity) for finding in report.findings)
    names = {*report.ledger, *(split for split, _ in levels)}
    found = {}
    for name in sorted(names, key=("train", "val", "test", "").index):
        ledger = report.ledger.get(name, SplitLedger())
        found[name] = SplitCounts(
            images=ledger.images,
            annotations=ledger.rows_listed,
            objects=ledger.objects,
            errors=levels[name, "error"],
            warnings=levels[name, "warning"],
        )
    return found
