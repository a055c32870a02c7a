"""Slices of a split: which images belong to which, and their numbers.

A slice is a group of images, or the boxes of one range of areas. Its numbers equal those of an
evaluation of only those images (or of only that area range): they come from the matches of the
evaluation, so nothing is matched again.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from rfdetr.arrays import Bools, Floats, Integers
from rfdetr.data.index import AnnotationIndex
from rfdetr.data.layouts import Layout, SplitPaths
from rfdetr.errors import InputError
from rfdetr.evaluation.accumulate import average_precisions
from rfdetr.evaluation.evidence import MatchEvidence
from rfdetr.evaluation.f1 import SCORE_THRESHOLDS, at_or_above, best_macro_f1, score_bins
from rfdetr.evaluation.matching import IOU_THRESHOLDS
from rfdetr.evaluation.slice_rules import SliceRule, text_values

MOST_SLICES = 100  # of one rule
COLUMNS = ("label", "score", "matched", "ignored", "accepted")


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
        groups |= {name: own[name] for name in sorted(own, key=_natural)}
    return groups


def _natural(name: str) -> list[str]:
    """A sort key that puts site=9 before site=10."""
    return [part.zfill(20) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


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
    groups = group_images(rules, images)
    for rule in rules:
        own = {name: mask for name, mask in groups.items() if name.partition("=")[0] == rule.name}
        for (name, mask), row in zip(own.items(), _numbers(evidence, [*own.values()]), strict=True):
            members = tuple(np.flatnonzero(mask).tolist())
            found[name] = dataclasses.replace(row, members=members)
    names = [rule.name for rule in rules if rule.area is not None]
    for name, own_matches in zip(names, by_area, strict=True):
        (row,) = _numbers(own_matches, [np.ones(own_matches.images, dtype=bool)])
        with_boxes = int(own_matches.positives.any(axis=1).sum())
        found[name] = dataclasses.replace(row, images=with_boxes, evidence=own_matches)
    order = {rule.name: place for place, rule in enumerate(rules)}
    return dict(sorted(found.items(), key=lambda item: order[item[0].partition("=")[0]]))


def area_ranges(rules: Sequence[SliceRule]) -> list[tuple[float, float]]:
    """The lowest and highest area of each rule that has a range."""
    return [rule.area for rule in rules if rule.area is not None]


def _numbers(evidence: MatchEvidence, groups: Sequence[Bools]) -> list[Slice]:
    """The numbers of each group of images (I,)."""
    if not groups:
        return []
    row, image = _rows_of(evidence, groups)
    part = MatchEvidence(
        positives=np.stack([evidence.positives[g].sum(axis=0, dtype=np.int32) for g in groups]),
        image=image,
        **{name: getattr(evidence, name)[row] for name in COLUMNS},
    )
    cell = part.image.astype(np.int64) * part.positives.shape[1] + part.label
    precision = _class_precisions(part, cell)
    f1 = _best_f1(part, cell, score_bins(evidence.score)[row])
    wrong = part.accepted & ((part.matched | part.ignored) & 1 == 0)
    false_alarms = np.bincount(part.image[wrong], minlength=part.images)
    rows = []
    for number, mask in enumerate(groups):
        own = precision[:, number, part.positives[number] > 0]
        images = int(mask.sum())
        rows.append(
            Slice(
                images=images,
                boxes=int(part.positives[number].sum()),
                map_50_95=float(own.mean()) if own.size else None,
                map_50=float(own[0].mean()) if own.size else None,
                f1=float(f1[number]) if own.size else None,
                false_alarms=float(false_alarms[number] / images),
            )
        )
    return rows


def _rows_of(
    evidence: MatchEvidence, groups: Sequence[Bools]
) -> tuple[Integers, NDArray[np.int32]]:
    """The detections of each group, group by group: their rows in `evidence`, and their group."""
    if np.sum(groups, axis=0).max() > 1:  # an image can be in several groups
        rows = [np.flatnonzero(mask[evidence.image]) for mask in groups]
        counts = [len(own) for own in rows]
        return np.concatenate(rows), np.repeat(np.arange(len(groups), dtype=np.int32), counts)
    group_of = np.full(evidence.images, len(groups), dtype=np.uint16)
    for number, mask in enumerate(groups):
        group_of[mask] = number
    found = group_of[evidence.image]
    row = np.argsort(found, kind="stable")[: int((found < len(groups)).sum())]
    return row, found[row].astype(np.int32)


def _class_precisions(part: MatchEvidence, cell: Integers) -> Floats:
    """AP (T, I, K) of every image and class at every IoU threshold; NaN without boxes.

    `cell` (D,) numbers the image and class of each detection, ascending.
    """
    positives = part.positives.ravel().astype(np.int64)
    starts = np.searchsorted(cell, np.arange(len(positives)))
    (near,) = np.nonzero(part.matched & ~part.ignored)
    (apart,) = np.nonzero(part.ignored)
    true, not_counted = (part.matched & ~part.ignored)[near], part.ignored[apart]
    table = []
    for bit in 1 << np.arange(len(IOU_THRESHOLDS), dtype=np.uint16):
        ignored, hits = apart[not_counted & bit > 0], near[true & bit > 0]
        first = starts[cell[hits]]
        skipped = np.searchsorted(ignored, hits) - np.searchsorted(ignored, first)
        table.append(average_precisions(cell[hits], hits - first - skipped + 1, positives))
    return np.array(table).reshape(len(IOU_THRESHOLDS), *part.positives.shape)


def _best_f1(part: MatchEvidence, cell: Integers, bins: Integers) -> Floats:
    """The best macro F1 (I,) of every image over the score thresholds; NaN without boxes.

    `bins` (D,) are the thresholds that each detection reaches.
    """
    size = len(SCORE_THRESHOLDS) + 1
    counted = part.ignored & 1 == 0
    place = (cell * size + bins)[counted]
    true = (part.matched & 1 == 1)[counted]

    def count(places: Integers) -> Integers:
        table = np.bincount(places, minlength=part.positives.size * size)
        return at_or_above(table, *part.positives.shape)

    return best_macro_f1(count(place[true]), count(place), part.positives.astype(np.int64))
