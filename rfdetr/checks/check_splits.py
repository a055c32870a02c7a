"""The same or nearly the same image in two splits."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rfdetr.checks.cache import Inspected
from rfdetr.checks.check_files import SplitFiles
from rfdetr.checks.codes import Severity
from rfdetr.checks.collector import Collector
from rfdetr.checks.image_probe import THUMB_SIDE
from rfdetr.checks.neardup import near_pairs
from rfdetr.checks.options import CheckConfig

# A leaked image is removed from the split that comes first here.
ORDER = {"train": 0, "val": 1, "test": 2}


class _Member(NamedTuple):
    rank: int
    split: SplitFiles
    row: int

    @property
    def file(self) -> str:
        return self.split.table.image_file(self.row)


def check_leaks(splits: Sequence[SplitFiles], collector: Collector, config: CheckConfig) -> None:
    """Exact duplicates by content hash, near-duplicates by perceptual hash."""
    _check_exact(splits, collector)
    ordered = sorted(splits, key=lambda split: ORDER[split.table.name])
    for i, first in enumerate(ordered):
        for second in ordered[i + 1 :]:
            _check_near(first, second, collector, config)


def _check_exact(splits: Sequence[SplitFiles], collector: Collector) -> None:
    groups: dict[str, list[_Member]] = defaultdict(list)
    for split in splits:
        for row, found in enumerate(split.facts):
            if found is not None and found.hash:
                groups[found.hash].append(_Member(ORDER[split.table.name], split, row))
    shared = [group for group in groups.values() if len(group) > 1]
    leaking = _leaking(splits, shared, collector.config.max_leak_share)
    for group in shared:
        last = max(group, key=lambda member: member.rank)
        seen: dict[int, _Member] = {}
        for member in sorted(group, key=lambda member: (member.rank, member.file)):
            twin = seen.setdefault(member.rank, member)
            if member.rank != last.rank:
                level: Severity = "error" if last.split.table.name in leaking else "warning"
                _note(collector, "split-duplicate-image", member, last, severity=level)
            if twin is not member and twin.file != member.file:
                _note(collector, "image-duplicate", member, twin)


def _leaking(
    splits: Sequence[SplitFiles], groups: Sequence[Sequence[_Member]], most: float
) -> set[str]:
    """Splits of which a larger share than `most` is in an earlier split.

    Their metrics show what the model remembers, and the wrong weights are chosen as the best.
    """
    copies: Counter[str] = Counter()
    for group in groups:
        first = min(member.rank for member in group)
        later = {(m.split.table.name, m.file) for m in group if m.rank > first}
        copies.update(name for name, _ in later)
    sizes = {split.table.name: len(split.table.file_names) for split in splits}
    return {name for name, count in copies.items() if count > most * sizes[name]}


def _note(
    collector: Collector,
    code: str,
    member: _Member,
    twin: _Member,
    how: str = "is the same image",
    *,
    severity: Severity | None = None,
) -> None:
    place = member.split.table.file_place(member.row)
    place["details"] |= {"other_file": twin.file, "other_split": twin.split.table.name}
    collector.add(code, f"{member.file} {how} as {twin.file}", severity=severity, **place)


def _check_near(
    first: SplitFiles, second: SplitFiles, collector: Collector, config: CheckConfig
) -> None:
    left, right = first.usable(), second.usable()
    if not left or not right:
        return
    queries, matches, correlation = near_pairs(
        _hashes(left),
        _thumbs(left),
        _hashes(right),
        _thumbs(right),
        max_bits=config.near_duplicate_bits,
        min_correlation=config.near_duplicate_correlation,
    )
    different = np.array(
        [left[q][1].hash != right[m][1].hash for q, m in zip(queries, matches, strict=True)], bool
    )
    queries, matches, correlation = queries[different], matches[different], correlation[different]
    order = np.lexsort((matches, -correlation, queries))
    _, best = np.unique(queries[order], return_index=True)
    for pair in order[best]:
        member = _Member(0, first, left[queries[pair]][0])
        twin = _Member(0, second, right[matches[pair]][0])
        how = f"looks the same (correlation {correlation[pair]:.3f})"
        _note(collector, "split-near-duplicate", member, twin, how)


def _hashes(images: Sequence[tuple[int, Inspected]]) -> npt.NDArray[np.uint64]:
    return np.array([found.facts.dhash for _, found in images], np.uint64)


def _thumbs(images: Sequence[tuple[int, Inspected]]) -> npt.NDArray[np.uint8]:
    parts = [found.facts.thumb for _, found in images]
    return np.frombuffer(b"".join(parts), np.uint8).reshape(len(parts), THUMB_SIDE * THUMB_SIDE)
