"""The images of a dataset as slice rules see them, and the slices that cannot be evaluated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from flows.config.sections import DatasetSettings
from rfdetr.checks.codes import CODES
from rfdetr.checks.dataset_report import DatasetReport, Finding
from rfdetr.data.coco import CocoSplits
from rfdetr.data.index import AnnotationIndex
from rfdetr.data.layouts import Layout, detect_layout
from rfdetr.data.yolo import YoloSplits
from rfdetr.errors import ConfigError, InputError
from rfdetr.evaluation.slice_rules import SliceRule
from rfdetr.evaluation.slices import SplitImages, group_images, split_images

EMPTY = "slice-empty"
SHOWN = 3


def images_of(
    folder: Path, dataset: DatasetSettings, split: str, rules: Sequence[SliceRule]
) -> SplitImages:
    """The images of the split "test" or "valid"; without a test split, those of valid."""
    layout = detect_layout(folder, dataset.layout)
    return _images(layout, scored_split(layout) if split == "test" else "val", rules)[0]


def scored_split(layout: Layout) -> str:
    """The split that `evaluate.split: test` means."""
    return "test" if "test" in layout.splits else "val"


def _images(
    layout: Layout, name: str, rules: Sequence[SliceRule]
) -> tuple[SplitImages, AnnotationIndex]:
    if layout.kind == "yolo":
        index = YoloSplits(layout).index(name)
    else:
        index = CocoSplits(layout, check_files=False).index(name)
    wanted = any(rule.kind == "attribute" for rule in rules)
    return split_images(index, layout.splits[name], layout, attributes=wanted), index


def add_findings(
    report: DatasetReport, folder: Path, dataset: DatasetSettings, rules: Sequence[SliceRule]
) -> DatasetReport:
    """The report with a warning for each slice without images in the split that is scored.

    A dataset with errors is left alone. Raises ConfigError for a rule that does not fit it.
    """
    if not rules or not report.ok:
        return report
    layout = detect_layout(folder, dataset.layout)
    try:
        found = {name: _images(layout, name, rules) for name in layout.splits}
        counts = {name: _counts(rules, *pair) for name, pair in found.items()}
    except InputError as error:
        raise ConfigError(f"{error}.") from None
    scored = scored_split(layout)
    messages = [*_empty(rules, counts, scored)]
    messages += _unknown(rules, [images for images, _ in found.values()])
    if not messages:
        return report
    info = CODES[EMPTY]
    findings = [
        Finding(code=EMPTY, severity=info.severity, message=text, advice=info.advice, split=scored)
        for text in messages
    ]
    severities = dict(report.severities)
    severities[info.severity] = severities.get(info.severity, 0) + len(findings)
    return report.model_copy(
        update={
            "findings": [*report.findings, *findings],
            "counts": {**report.counts, EMPTY: len(findings)},
            "severities": severities,
        }
    )


def _counts(
    rules: Sequence[SliceRule], images: SplitImages, index: AnnotationIndex
) -> dict[str, int]:
    """Slice -> its images, or for an area range its boxes."""
    counts = {name: int(mask.sum()) for name, mask in group_images(rules, images).items()}
    for rule in rules:
        if rule.area is not None and index.areas is not None:
            low, high = rule.area
            inside = (index.areas >= low) & (index.areas <= high) & ~index.crowd
            counts[rule.name] = int(inside.sum())
    return {name: count for name, count in counts.items() if count}


def _empty(
    rules: Sequence[SliceRule], counts: Mapping[str, Mapping[str, int]], scored: str
) -> list[str]:
    """What is said about slices that the scored split lacks."""
    known = {name: None for split in counts.values() for name in split}
    texts = []
    for name in known:
        if name not in counts[scored]:
            others = {split: found[name] for split, found in counts.items() if name in found}
            places = " and ".join(f"{count} in {split}" for split, count in others.items())
            texts.append(f"the slice {name} has {places}, and none in {scored}")
    made = {name.partition("=")[0] for name in known}
    texts += [
        f"the slice rule {rule.name} matches nothing in the dataset (found {rule.value!r})"
        for rule in rules
        if rule.name not in made
    ]
    return texts


def _unknown(rules: Sequence[SliceRule], splits: Sequence[SplitImages]) -> list[str]:
    """What is said about list files that name images which the dataset does not have."""
    names = {name for images in splits for name in (*images.names, *images.full_names)}
    texts = []
    for rule in rules:
        missing = sorted(rule.listed - names)
        if missing:
            shown = ", ".join(missing[:SHOWN])
            texts.append(
                f"{len(missing)} of {len(rule.listed)} paths in {rule.value} are not images of the "
                f"dataset: {shown}"
            )
    return texts
