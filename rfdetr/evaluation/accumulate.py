"""Precision, recall and the twelve COCO numbers from matches.

Definitions are those of `COCOeval.accumulate` and `summarize` in pycocotools: 101 recall points,
precision made monotonic from the right, means over the classes that have ground truth, -1 where
there is none.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from rfdetr.arrays import Bools, Floats, Integers
from rfdetr.evaluation.matching import AREA_RANGES, IOU_THRESHOLDS, Matches

RECALL_POINTS: Floats = np.linspace(0.0, 1.0, 101)
FLOAT_SPACING = float(np.spacing(1))


@dataclasses.dataclass(frozen=True)
class Curves:
    """`precision` (T, 101, K, A) at `max_dets[-1]`; `recall` (T, K, A, M) for each of `max_dets`.

    T = IoU thresholds 0.50:0.05:0.95, K = classes, A = areas all, small, medium, large.
    """

    max_dets: tuple[int, ...]
    precision: Floats
    recall: Floats


@dataclasses.dataclass(frozen=True)
class Summary:
    """The twelve numbers of COCO detection (fractions); -1 where there is no such ground truth.

    `ar_1`, `ar_10` and `ar` are recalls at 1, 10 and `max_dets` detections per image and class.
    """

    max_dets: int
    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar_1: float
    ar_10: float
    ar: float
    ar_small: float
    ar_medium: float
    ar_large: float

    def numbers(self) -> list[float]:
        """The twelve numbers in the order in which pycocotools prints them."""
        return list(dataclasses.astuple(self)[1:])


def detection_limits(max_dets: int) -> tuple[int, ...]:
    """1, 10 and `max_dets`; the smaller ones never exceed the largest."""
    return (min(1, max_dets), min(10, max_dets), max_dets)


def accumulate(matches: Matches, max_dets: int) -> Curves:
    """Curves over the `max_dets` best detections per image and class.

    `matches` must contain at least as many.
    """
    limits = detection_limits(max_dets)
    classes = len(matches.positives)
    shape = (len(IOU_THRESHOLDS), classes, len(AREA_RANGES))
    precision = np.full((shape[0], len(RECALL_POINTS), *shape[1:]), -1.0)
    recall = np.full((*shape, len(limits)), -1.0)

    true = matches.matched & ~matches.ignored
    rank = matches.rank[matches.candidate]
    label = matches.label[matches.candidate]
    for m, limit in enumerate(limits):
        found = np.zeros((classes, *true.shape[1:]), dtype=np.int64)
        _add_by_label(found, label, true & (rank < limit)[:, None, None])
        defined = matches.positives > 0
        share = found / np.maximum(matches.positives, 1)[:, None, :]
        recall[..., m] = np.where(defined[:, None, :], share, -1.0).transpose(1, 0, 2)

    true &= (rank < max_dets)[:, None, None]
    false = _false_before(matches, max_dets)
    starts = np.searchsorted(label, np.arange(classes + 1))
    for k, a in np.argwhere(matches.positives > 0):
        span = slice(starts[k], starts[k + 1])
        positives = matches.positives[k, a]
        needed = np.searchsorted(np.arange(positives + 1) / positives, RECALL_POINTS)
        for t in range(shape[0]):
            hits = false[span, t, a][true[span, t, a]]
            precision[t, :, k, a] = _precision_at(needed, hits)
    return Curves(limits, precision, recall)


def _add_by_label(total: Integers, label: Integers, flags: Bools) -> None:
    """Add `flags` (C, T, A), sorted by label, to `total` (K, T, A)."""
    if len(label):
        starts = np.flatnonzero(np.r_[True, label[1:] != label[:-1]])
        total[label[starts]] += np.add.reduceat(flags, starts, axis=0, dtype=np.int64)


def _false_before(matches: Matches, max_dets: int) -> Integers:
    """False positives of the same class ranked before each candidate, (C, T, A).

    A detection that is not a candidate is false at every IoU threshold, so one running count per
    area range serves all thresholds; only the candidates are counted per threshold. One class at
    one threshold, by descending score:

        detection            0   1   2   3   4
        candidate            -   yes -   yes yes
        true or false        fp  tp  fp  fp  tp
        plain_fp_before          1       2   2     non-candidates among the earlier ones
        candidate_fp_before      0       1   1     false candidates up to this one
        result                   1       3   3     only read where the candidate is true: 1, 3
    """
    counted = matches.rank < max_dets
    plain = matches.inside & counted[:, None]
    plain[matches.candidate] = False
    class_start = np.searchsorted(matches.label, matches.label)
    plain_fp_before = _running_count(plain, class_start)[matches.candidate]

    wrong = ~matches.matched & ~matches.ignored & counted[matches.candidate][:, None, None]
    label = matches.label[matches.candidate]
    candidate_fp_before = _running_count(wrong, np.searchsorted(label, label))
    return (plain_fp_before[:, None, :] + candidate_fp_before).astype(np.int64)


def _running_count(flags: Bools, start: Integers) -> NDArray[np.int32]:
    """Cumulative count along the first axis; row i counts from row `start[i]` to i, inclusive."""
    total = np.cumsum(flags, axis=0, dtype=np.int32)
    before = np.concatenate([np.zeros((1, *flags.shape[1:]), np.int32), total])
    counts: NDArray[np.int32] = total - before[start]
    return counts


def _precision_at(needed: Integers, false: Integers) -> Floats:
    """Precision (101,) at the recall points.

    `false` (n,): false positives before the n-th true positive; `needed` (101,): true positives
    that reach each recall point. Precision peaks at true positives, so the monotonic curve needs
    no other detections.
    """
    result = np.zeros(len(needed))
    if len(false):
        count = np.arange(1.0, len(false) + 1)
        value = count / (false + count + FLOAT_SPACING)
        value = np.maximum.accumulate(value[::-1])[::-1]
        reached = needed <= len(false)
        result[reached] = value[np.maximum(needed[reached] - 1, 0)]
    return result


def average_precisions(group: Integers, counted: Integers, positives: Integers) -> Floats:
    """AP (G,) of groups of detections, from their true positives; NaN without ground truth.

    group: (H,) of each true positive, ascending, by descending score within a group.
    counted: (H,) detections of the group that count, up to and including this one.
    positives: (G,) ground-truth boxes.
    """
    found = np.arange(1, len(group) + 1) - np.searchsorted(group, np.arange(len(positives)))[group]
    # One running maximum from the right for all groups: earlier groups lie above later ones.
    offset = 2.0 * (len(positives) - group)
    precision = found / counted + offset
    envelope = np.maximum.accumulate(precision[::-1])[::-1] - offset
    reached = np.searchsorted(RECALL_POINTS, found / positives[group], side="right")
    points = np.where(found > 1, np.diff(reached, prepend=0), reached)
    area = np.bincount(group, points * envelope, len(positives)) / len(RECALL_POINTS)
    return np.where(positives > 0, area, np.nan)


def summarize(curves: Curves) -> Summary:
    """The twelve numbers of `curves`."""
    precision, recall = curves.precision, curves.recall
    return Summary(
        curves.max_dets[-1],
        defined_mean(precision[..., 0]),
        defined_mean(precision[0, ..., 0]),
        defined_mean(precision[5, ..., 0]),
        *(defined_mean(precision[..., area]) for area in (1, 2, 3)),
        *(defined_mean(recall[:, :, 0, m]) for m in range(3)),
        *(defined_mean(recall[:, :, area, 2]) for area in (1, 2, 3)),
    )


def defined_mean(values: Floats) -> float:
    """Mean of the entries above -1, or -1 without any."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else -1.0


def per_class(values: Floats, axis: int) -> Floats:
    """Mean over all axes but `axis`, -1 for classes without ground truth."""
    table = np.moveaxis(values, axis, 0)
    return np.array([defined_mean(row) for row in table])
