"""Precision, recall and the twelve COCO numbers from matches.

Definitions are those of pycocotools: 101 recall points, precision made monotonic from the right,
means over the classes that have ground truth, -1 where there is none.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from rfdetr.evaluation.columns import Bools, Floats, Ints
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
    """The twelve numbers of COCO detection; -1 means that there is no such ground truth.

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

    `matches` must have been made with at least as many.
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


def _add_by_label(total: Ints, label: Ints, flags: Bools) -> None:
    """Add `flags` (C, T, A), sorted by label, to `total` (K, T, A)."""
    if len(label):
        starts = np.flatnonzero(np.r_[True, label[1:] != label[:-1]])
        total[label[starts]] += np.add.reduceat(flags, starts, axis=0, dtype=np.int64)


def _false_before(matches: Matches, max_dets: int) -> Ints:
    """False positives of the class ranked before each candidate, (C, T, A)."""
    counted = matches.rank < max_dets
    alone = matches.inside & counted[:, None]
    alone[matches.candidate] = False
    plain = np.cumsum(alone, axis=0, dtype=np.int32)
    wrong = ~matches.matched & ~matches.ignored & counted[matches.candidate][:, None, None]
    false = np.cumsum(wrong, axis=0, dtype=np.int32)
    false += plain[matches.candidate][:, None, :]
    # Subtract what the classes before contributed.
    label = matches.label[matches.candidate]
    class_start = np.searchsorted(matches.label, label)
    first_candidate = np.searchsorted(label, label)
    zero_plain = np.concatenate([np.zeros((1, plain.shape[1]), np.int32), plain])
    total_wrong = np.concatenate(
        [np.zeros((1, *wrong.shape[1:]), np.int32), np.cumsum(wrong, axis=0, dtype=np.int32)]
    )
    false -= zero_plain[class_start][:, None, :] + total_wrong[first_candidate]
    return false.astype(np.int64)


def _precision_at(needed: Ints, false: Ints) -> Floats:
    """Precision at the recall points.

    `false` (n,): false positives before the n-th true positive; `needed` (101,): true positives
    that reach each recall point. Precision is highest where it has just risen, so the monotonic
    curve needs no other detections than the true positives.
    """
    result = np.zeros(len(needed))
    if len(false):
        count = np.arange(1.0, len(false) + 1)
        value = count / (false + count + FLOAT_SPACING)
        value = np.maximum.accumulate(value[::-1])[::-1]
        reached = needed <= len(false)
        result[reached] = value[np.maximum(needed[reached] - 1, 0)]
    return result


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
