"""Metrics of a detector with weighted images: what the bootstrap evaluates again and again.

The copies of a detection follow each other, and precision is read at the last copy, where its
envelope is highest, so weighting an image gives the same number as evaluating copies of it. Only
equal scores of one class within one image, whose order is arbitrary anyway, can differ.

Axes: B resamples, I images, K classes, D detections.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rfdetr.arrays import Bools, Floats, Integers
from rfdetr.evaluation.accumulate import RECALL_POINTS
from rfdetr.evaluation.evidence import MatchEvidence
from rfdetr.evaluation.f1 import SCORE_THRESHOLDS, at_or_above, best_macro_f1, score_bins
from rfdetr.evaluation.matching import IOU_THRESHOLDS

Metric = Literal["map_50_95", "map_50", "map_75", "f1", "f1_at_point"]
METRIC_THRESHOLDS: dict[str, slice] = {  # positions in IOU_THRESHOLDS
    "map_50_95": slice(None),
    "map_50": slice(0, 1),
    "map_75": slice(5, 6),
}
CELLS_AT_ONCE = 1 << 18  # bounds the memory of one batch of resamples

Counts = NDArray[np.int32]
Statistic = Callable[[Integers], Floats]  # image weights (B, I) -> values (B,)


def statistic(evidence: MatchEvidence, metric: Metric) -> Statistic:
    """The function that computes `metric`, NaN where no box was drawn."""
    if metric == "f1_at_point":
        return MacroF1AtPoint(evidence)
    return MacroF1(evidence) if metric == "f1" else MeanAveragePrecision(evidence, metric)


class _ClassCurve:
    """The detections of one class, sorted once and weighted many times."""

    def __init__(self, evidence: MatchEvidence, label: int, thresholds: slice) -> None:
        chosen = np.flatnonzero(evidence.label == label)
        chosen = chosen[np.argsort(-evidence.score[chosen], kind="stable")]
        bits = np.arange(len(IOU_THRESHOLDS))[thresholds, None]
        ignored = (evidence.ignored[chosen][None] >> bits & 1).astype(bool)  # (T, n)
        true = (evidence.matched[chosen][None] >> bits & 1).astype(bool) & ~ignored
        self._true = [np.flatnonzero(row) for row in true]
        self._ignored = [np.flatnonzero(row) for row in ignored]
        # Precision peaks at true positives: nothing after the last one matters.
        last = max((int(hits[-1]) + 1 for hits in self._true if len(hits)), default=0)
        self._image = evidence.image[chosen[:last]]
        self._positives = evidence.positives[:, label].astype(np.int64)

    @property
    def size(self) -> int:
        """Number of detections that one evaluation reads."""
        return len(self._image)

    def average_precision(self, weights: Integers) -> Floats:
        """AP (B, T) of this class at the thresholds; NaN where no positive was drawn."""
        total = weights @ self._positives
        needed = _needed(total)
        weight = weights[:, self._image].astype(np.int32)
        rank = np.cumsum(weight, axis=1, dtype=np.int32)
        found = np.zeros((len(weights), len(self._true)))
        for t, (hits, ignored) in enumerate(zip(self._true, self._ignored, strict=True)):
            if len(hits):
                true = np.cumsum(weight[:, hits], axis=1, dtype=np.int32)
                before = rank[:, hits]
                if len(ignored) and ignored[0] < hits[-1]:
                    skipped = np.cumsum(
                        weight[:, ignored[ignored < hits[-1]]], axis=1, dtype=np.int32
                    )
                    skipped = np.pad(skipped, ((0, 0), (1, 0)))
                    before = before - skipped[:, np.searchsorted(ignored, hits)]
                found[:, t] = _area(true, before, needed) / len(RECALL_POINTS)
        return np.where(total[:, None] > 0, found, np.nan)


def _needed(total: Integers) -> Integers:
    """True positives (B, 101) that reach each recall point: the first k with k / total >= point.

    COCO reads precision at the first detection whose recall reaches the point; comparing counts
    is exact.
    """
    count = np.maximum(total, 1)[:, None]
    needed = np.maximum(np.ceil(RECALL_POINTS * count) - 1, 0)
    for _ in range(2):
        needed += needed / count < RECALL_POINTS
    return np.asarray(needed, dtype=np.int64)


def _area(true: Counts, before: Counts, needed: Integers) -> Floats:
    """Sum (B,) over the recall points of the precision envelope.

    `true` (B, H): running count of true positives, `before` (B, H): of all that count.
    """
    resamples, hits = true.shape
    precision = true / np.maximum(before, 1)
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    # One search for all resamples: an offset per row makes the rows one ascending sequence.
    offset = np.arange(resamples)[:, None] * (max(int(true.max()), int(needed.max())) + 1)
    place = np.searchsorted((true + offset).ravel(), (needed + offset).ravel())
    place = place.reshape(needed.shape)
    reached = place < (np.arange(resamples)[:, None] + 1) * hits
    values = np.where(reached, precision.ravel()[np.minimum(place, true.size - 1)], 0.0)
    return np.asarray(values.sum(axis=1))


class MeanAveragePrecision:
    """The mAP of one detector under image weights."""

    def __init__(self, evidence: MatchEvidence, metric: Metric = "map_50_95") -> None:
        classes = np.flatnonzero(evidence.positives.sum(axis=0) > 0)
        self._curves = [
            _ClassCurve(evidence, int(label), METRIC_THRESHOLDS[metric]) for label in classes
        ]

    def __call__(self, weights: Integers) -> Floats:
        """The mAP (B,) with image i counted `weights[b, i]` times; NaN without any box."""
        table = np.full((len(self._curves), len(weights)), np.nan)
        for row, curve in zip(table, self._curves, strict=True):
            step = max(1, CELLS_AT_ONCE // max(1, curve.size))
            for start in range(0, len(weights), step):
                part = curve.average_precision(weights[start : start + step])
                row[start : start + step] = part.mean(axis=1)
        return _mean_of_defined(table)


class MacroF1:
    """The best macro F1 over the score thresholds, at IoU 0.5, under image weights."""

    def __init__(self, evidence: MatchEvidence) -> None:
        bins, size = score_bins(evidence.score), len(SCORE_THRESHOLDS) + 1
        counted = (evidence.ignored & 1) == 0
        cell = (evidence.label * size + bins)[counted]
        self._true = ((evidence.matched & 1) == 1)[counted]
        self._cell, self._image = cell, evidence.image[counted]
        self._positives = evidence.positives.astype(np.int64)

    def __call__(self, weights: Integers) -> Floats:
        """The F1 (B,) with image i counted `weights[b, i]` times; NaN without any box."""
        return np.array([self._value(row) for row in weights])

    def _value(self, weights: Integers) -> float:
        weight = weights[self._image]
        true, every = self._count(weight * self._true), self._count(weight)
        return float(best_macro_f1(true, every, weights @ self._positives))

    def _count(self, weight: Integers) -> Integers:
        classes, size = self._positives.shape[1], len(SCORE_THRESHOLDS) + 1
        return at_or_above(np.bincount(self._cell, weight, minlength=classes * size), classes)


class MacroF1AtPoint:
    """The macro F1 of the accepted detections, at IoU 0.5, under image weights."""

    def __init__(self, evidence: MatchEvidence) -> None:
        counted = evidence.accepted & (evidence.ignored & 1 == 0)
        self._positives = evidence.positives.astype(np.int64)
        self._every = self._per_image(evidence, counted)
        self._true = self._per_image(evidence, counted & (evidence.matched & 1 == 1))

    @staticmethod
    def _per_image(evidence: MatchEvidence, chosen: Bools) -> Integers:
        table = np.zeros(evidence.positives.shape, dtype=np.int64)
        np.add.at(table, (evidence.image[chosen], evidence.label[chosen]), 1)
        return table

    def __call__(self, weights: Integers) -> Floats:
        """The F1 (B,) with image i counted `weights[b, i]` times; NaN without any box."""
        positives, true, every = (weights @ t for t in (self._positives, self._true, self._every))
        f1 = np.where(positives > 0, 2 * true / np.maximum(every + positives, 1), np.nan)
        return _mean_of_defined(f1.T)


def _mean_of_defined(table: Floats) -> Floats:
    """Mean (B,) over the classes (K, B) that are not NaN."""
    defined: Bools = ~np.isnan(table)
    count = defined.sum(axis=0)
    total = np.where(defined, table, 0.0).sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
