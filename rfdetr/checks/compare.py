"""Compares a dataset with its previous version, by file name and content."""

from __future__ import annotations

from collections.abc import Mapping

from rfdetr.checks.collector import Collector
from rfdetr.checks.dataset_report import Comparison, DatasetReport, SplitStatistics
from rfdetr.checks.options import CheckConfig

EXAMPLES = 20
Fingerprints = Mapping[str, Mapping[str, tuple[str, str]]]


def compare_versions(
    previous: DatasetReport,
    fingerprints: Fingerprints,
    statistics: Mapping[str, SplitStatistics],
    collector: Collector,
    config: CheckConfig,
) -> Comparison:
    """Added, removed and changed images, changed annotations and the shift of class counts."""
    old, new = _flat(previous.fingerprints), _flat(fingerprints)
    both = sorted(old.keys() & new.keys())
    content = all(old[key][0] for key in both[:1]) and all(new[key][0] for key in both[:1])
    changed = [k for k in both if old[k][0] and new[k][0] and old[k][0] != new[k][0]]
    relabelled = [k for k in both if old[k][1] != new[k][1]]
    added, removed = sorted(new.keys() - old.keys()), sorted(old.keys() - new.keys())
    counts_then, counts_now = _class_counts(previous.statistics), _class_counts(statistics)
    names = sorted(counts_then.keys() | counts_now.keys())
    shares = _share_shift(counts_then, counts_now, names)
    if removed:
        text = f"{len(removed)} image(s) of the previous version were removed, first {removed[0]}"
        collector.add("version-images-removed", text)
    for name in names:
        if abs(shares[name]) > config.max_class_shift:
            text = (
                f"the share of '{name}' changed by {shares[name]:+.1%} of all boxes "
                f"({counts_then.get(name, 0)} to {counts_now.get(name, 0)})"
            )
            collector.add("version-class-shift", text, details={"category": name})
    groups = {"added": added, "removed": removed, "changed": changed, "relabelled": relabelled}
    return Comparison(
        previous=previous.dataset,
        content_compared=bool(content),
        images_added=len(added),
        images_removed=len(removed),
        images_changed=len(changed),
        annotations_changed=len(relabelled),
        class_count_shift={
            name: counts_now.get(name, 0) - counts_then.get(name, 0) for name in names
        },
        class_share_shift=shares,
        examples={name: keys[:EXAMPLES] for name, keys in groups.items() if keys},
    )


def _flat(fingerprints: Fingerprints) -> dict[str, tuple[str, str]]:
    return {
        f"{split}/{name}": parts
        for split in fingerprints
        for name, parts in fingerprints[split].items()
    }


def _class_counts(statistics: Mapping[str, SplitStatistics]) -> dict[str, int]:
    total: dict[str, int] = {}
    for numbers in statistics.values():
        for name, count in numbers.class_counts.items():
            total[name] = total.get(name, 0) + count
    return total


def _share_shift(
    then: Mapping[str, int], now: Mapping[str, int], names: list[str]
) -> dict[str, float]:
    before, after = max(1, sum(then.values())), max(1, sum(now.values()))
    return {name: round(now.get(name, 0) / after - then.get(name, 0) / before, 6) for name in names}
