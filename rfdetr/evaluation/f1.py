"""F1, precision and recall over 101 score thresholds, from the matches of COCO evaluation.

A detection is true when pycocotools' `COCOeval` records a match for it at IoU 0.5; matches with
crowd regions and detections beyond the limit per image and class do not count.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from rfdetr.arrays import Bools, Floats, Integers
from rfdetr.evaluation.matching import Matches

SCORE_THRESHOLDS: Floats = np.linspace(0.0, 1.0, 101)


@dataclasses.dataclass(frozen=True)
class F1Sweep:
    """Per class and threshold: `f1`, `precision`, `recall` (K, 101), at IoU 0.5.

    `macro_*` (101,) are plain means over the classes with `positives` (K,) above zero.
    `best` is the index of the highest macro F1, the lowest threshold among equals.
    """

    positives: Integers
    f1: Floats
    precision: Floats
    recall: Floats
    macro_f1: Floats
    macro_precision: Floats
    macro_recall: Floats
    best: int

    @property
    def best_threshold(self) -> float:
        """The score threshold with the highest macro F1."""
        return float(SCORE_THRESHOLDS[self.best])


def score_bins(score: NDArray[np.floating]) -> Integers:
    """The number of SCORE_THRESHOLDS that each score reaches."""
    # Compare scores in the precision of the network's output: float32 0.29 is below 0.29.
    exact = score.astype(np.float32).astype(np.float64)
    return np.searchsorted(SCORE_THRESHOLDS, exact, side="right")


def count_matches(matches: Matches, max_dets: int) -> tuple[Integers, Integers]:
    """True and false positives with score >= threshold, per class and threshold (K, 101).

    Counts the `max_dets` best detections of each image and class.
    """
    bins = score_bins(matches.score)
    true = np.zeros(len(bins), dtype=bool)
    counted = matches.inside[:, 0].copy()
    true[matches.candidate] = matches.matched[:, 0, 0] & ~matches.ignored[:, 0, 0]
    counted[matches.candidate] = ~matches.ignored[:, 0, 0]
    counted &= matches.rank < max_dets
    true &= counted
    classes, size = len(matches.positives), len(SCORE_THRESHOLDS) + 1
    cell = matches.label * size + bins

    def count(flags: Bools) -> Integers:
        return at_or_above(np.bincount(cell[flags], minlength=classes * size), classes)

    return count(true), count(counted & ~true)


def at_or_above(table: Integers, *shape: int) -> Integers:
    """How many reach each threshold (*shape, S), from a flat table of counts per `score_bins`."""
    table = table.reshape(*shape, len(SCORE_THRESHOLDS) + 1)
    return np.cumsum(table[..., :0:-1], axis=-1)[..., ::-1]


def best_macro_f1(true: Integers, every: Integers, positives: Integers) -> Floats:
    """The best F1 (...) over the thresholds, a mean over the classes with boxes; NaN without boxes.

    `true` and `every` (..., K, S) are true positives and all detections that reach a threshold,
    `positives` (..., K) the boxes.
    """
    # F1 = 2 TP / (2 TP + FP + FN), without a division by zero where nothing was detected
    f1 = 2 * true / np.maximum(every + positives[..., None], 1)
    present = positives > 0
    count = present.sum(axis=-1)
    total = np.where(present[..., None], f1, 0.0).sum(axis=-2)
    best = (total / np.maximum(count, 1)[..., None]).max(axis=-1)
    return np.where(count > 0, best, np.nan)


def sweep(true: Integers, false: Integers, positives: Integers) -> F1Sweep:
    """The sweep from counts (K, 101) and the number of ground-truth boxes per class (K,)."""
    precision = _ratio(true, true + false)
    recall = _ratio(true, np.broadcast_to(positives[:, None], true.shape))
    f1 = _ratio(2 * precision * recall, precision + recall)
    present = positives > 0
    macro_f1 = _macro(f1, present)
    return F1Sweep(
        positives=positives,
        f1=f1,
        precision=precision,
        recall=recall,
        macro_f1=macro_f1,
        macro_precision=_macro(precision, present),
        macro_recall=_macro(recall, present),
        best=int(np.argmax(macro_f1)),
    )


def _macro(table: Floats, present: Bools) -> Floats:
    return table[present].mean(axis=0) if present.any() else np.zeros(len(SCORE_THRESHOLDS))


def _ratio(top: Floats | Integers, bottom: Floats | Integers) -> Floats:
    ratio = np.zeros(top.shape)
    np.divide(top, bottom, out=ratio, where=bottom > 0)
    return ratio
