"""Slices of a split: which images belong to which, and their numbers.

A slice is a group of images, or the boxes of one range of areas. Its numbers equal those of an
evaluation of only those images (or of only that area range): they come from the matches of the
evaluation, so nothing is matched again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from rfdetr.arrays import Bools, Floats
from rfdetr.data.index import AnnotationIndex
from rfdetr.data.layouts import Layout, SplitPaths
from rfdetr.errors import InputError
from rfdetr.evaluation.accumulate import average_precisions
from rfdetr.evaluation.evidence import MatchEvidence
from rfdetr.evaluation.matching import IOU_THRESHOLDS
from rfdetr.evaluation.resample import MacroF1
from rfdetr.evaluation.slice_rules import SliceRule, text_values

MOST_SLICES = 100  # of one rule


@dataclasses.dataclass(frozen=True)
class Slice:
    """Numbers of one slice; None where it has no boxes.

    `members` are the positions of its images, None for an area range, which has `evidence` of its
    own. `f1` is the best macro F1 over all thresholds. `false_alarms` counts detections per image
    that are wrong at IoU 0.5, at the operating point, or without one at the threshold of the best
    F1 of the split.
    """

    images: int
    boxes: int
    map_50_95: float | None
    map_50: float | None
    f1: float | None
    false_alarms: float
    members: tuple[int, ...] | None = None
    evidence: MatchEvidence | None = None


@dataclasses.dataclass(frozen=True)
class SplitImages:
    """The images of a split, by ascending id: paths below the images folder and the dataset."""

    names: list[str]
    full_names: list[str]
    attributes: list[Mapping[str, Any]]


def split_images(
    index: AnnotationIndex, split: SplitPaths, layout: Layout, *, attributes: bool
) -> SplitImages:
    """The images of `index`, the split `split` of `layout`.

    With `attributes`, the image entries of the annotation file are read; for YOLO that raises
    InputError.
    """
    order = np.argsort(index.image_ids, kind="stable").tolist()
    paths = [index.path(number) for number in order]
    entries: list[Mapping[str, Any]] = []
    if attributes:
        if split.annotations is None:
            raise InputError("slices by attribute need COCO annotations: YOLO has no attributes")
        rows = orjson.loads(split.annotations.read_bytes())["images"]
        by_id = {row["id"]: row for row in rows}
        entries = [by_id[number] for number in index.image_ids[order].tolist()]
    folders = [folder if folder.is_dir() else folder.parent for folder in split.images]
    return SplitImages(
        [_below(path, folders) for path in paths],
        [_below(path, [layout.root]) for path in paths],
        entries,
    )


def _below(path: Path, folders: Sequence[Path]) -> str:
    for folder in folders:
        if path.is_relative_to(folder):
            return path.relative_to(folder).as_posix()
    return path.as_posix()


def group_images(rules: Sequence[SliceRule], images: SplitImages) -> dict[str, Bools]:
    """Slice -> which images (I,) belong to it. Area ranges are left out.

    Slices of a rule with values are called `<rule>=<value>`. Raises InputError for a rule that
    makes more than 100 slices.
    """
    groups: dict[str, Bools] = {}
    for rule in rules:
        if rule.kind == "area":
            continue
        own: dict[str, Bools] = {}
        for number, values in enumerate(_values(rule, images)):
            for value in values:
                name = f"{rule.name}={value}" if value else rule.name
                own.setdefault(name, np.zeros(len(images.names), dtype=bool))[number] = True
        if len(own) > MOST_SLICES:
            raise InputError(
                f"slices.{rule.name} makes {len(own)} slices, for example "
                f"{', '.join(list(own)[:3])}; at most {MOST_SLICES} are possible"
            )
        groups |= {name: own[name] for name in sorted(own)}
    return groups


def _values(rule: SliceRule, images: SplitImages) -> list[Sequence[str]]:
    """Per image the values that name its slices; an empty text stands for the rule's own name."""
    if rule.kind == "path":
        assert rule.pattern is not None
        found = [rule.pattern.search(name) for name in images.names]
        if not rule.pattern.groups:
            return [[""] if match else [] for match in found]
        return [[match[1]] if match and match[1] else [] for match in found]
    if rule.kind == "file":
        both = zip(images.names, images.full_names, strict=True)
        return [[""] if rule.listed & {name, full} else [] for name, full in both]
    return [list(dict.fromkeys(text_values(_at(row, rule.value)))) for row in images.attributes]


def _at(entry: Any, path: str) -> Any:
    """The value at a key, or at a dotted path of keys."""
    if isinstance(entry, dict) and path in entry:
        return entry[path]
    for key in path.split("."):
        entry = entry.get(key) if isinstance(entry, dict) else None
    return entry


def score_slices(
    rules: Sequence[SliceRule],
    images: SplitImages,
    evidence: MatchEvidence,
    by_area: Sequence[MatchEvidence] = (),
) -> dict[str, Slice]:
    """The numbers of every slice, in the order of the rules.

    `evidence` are the matches of the whole split, `by_area` those of `area_ranges(rules)`.
    """
    found = {}
    for name, mask in group_images(rules, images).items():
        (members,) = np.nonzero(mask)
        numbers = _slice(evidence.take(members))
        found[name] = dataclasses.replace(numbers, members=tuple(members.tolist()))
    names = [rule.name for rule in rules if rule.area is not None]
    for name, own in zip(names, by_area, strict=True):
        with_boxes = int(own.positives.any(axis=1).sum())
        found[name] = dataclasses.replace(_slice(own), images=with_boxes, evidence=own)
    order = {rule.name: place for place, rule in enumerate(rules)}
    return dict(sorted(found.items(), key=lambda item: order[item[0].partition("=")[0]]))


def area_ranges(rules: Sequence[SliceRule]) -> list[tuple[float, float]]:
    """The lowest and highest area of each rule that has a range."""
    return [rule.area for rule in rules if rule.area is not None]


def _slice(part: MatchEvidence) -> Slice:
    """The numbers of the images of `part`."""
    precision = _class_precisions(part)[:, part.positives.any(axis=0)]
    f1 = MacroF1(part)(np.ones((1, part.images), dtype=np.int64))[0]
    wrong = part.accepted & ((part.matched | part.ignored) & 1 == 0)
    return Slice(
        images=part.images,
        boxes=int(part.positives.sum()),
        map_50_95=float(precision.mean()) if precision.size else None,
        map_50=float(precision[0].mean()) if precision.size else None,
        f1=None if np.isnan(f1) else float(f1),
        false_alarms=float(wrong.sum() / part.images),
    )


def _class_precisions(part: MatchEvidence) -> Floats:
    """AP (T, K) of every class at every IoU threshold; NaN without boxes."""
    positives = part.positives.sum(axis=0)
    starts = np.searchsorted(part.label, np.arange(len(positives)))
    (near,) = np.nonzero(part.matched & ~part.ignored)
    (apart,) = np.nonzero(part.ignored)
    table = []
    for bit in 1 << np.arange(len(IOU_THRESHOLDS), dtype=np.uint16):
        ignored = apart[part.ignored[apart] & bit > 0]
        hits = near[(part.matched[near] & ~part.ignored[near]) & bit > 0]
        label = part.label[hits]
        first = starts[label]
        skipped = np.searchsorted(ignored, hits) - np.searchsorted(ignored, first)
        table.append(average_precisions(label, hits - first - skipped + 1, positives))
    return np.array(table)
