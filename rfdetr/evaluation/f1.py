"""F1, precision and recall over 101 score thresholds (training specification, section 12.3 A)."""

from __future__ import annotations

import dataclasses

import numpy as np

from rfdetr.evaluation.columns import Bools, Floats, Ints
from rfdetr.evaluation.matching import Matches

THRESHOLDS: Floats = np.linspace(0.0, 1.0, 101)


@dataclasses.dataclass(frozen=True)
class F1Sweep:
    """Per class and threshold: `f1`, `precision`, `recall` (K, 101), at IoU 0.5.

    `macro_*` (101,) are plain means over the classes with `positives` (K,) above zero.
    `best` is the index of the highest macro F1, the lowest threshold among equals.
    """

    positives: Ints
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
        return float(THRESHOLDS[self.best])


def count_matches(matches: Matches, max_dets: int) -> tuple[Ints, Ints]:
    """True and false positives with score >= threshold, per class and threshold (K, 101).

    Counts the `max_dets` best detections of each image and class.
    """
    # Scores count with the precision that the network gives them (float32 0.29 is below 0.29).
    score = matches.score.astype(np.float32).astype(np.float64)
    bins = np.searchsorted(THRESHOLDS, score, side="right")
    true = np.zeros(len(score), dtype=bool)
    counted = matches.inside[:, 0].copy()
    true[matches.candidate] = matches.matched[:, 0, 0] & ~matches.ignored[:, 0, 0]
    counted[matches.candidate] = ~matches.ignored[:, 0, 0]
    counted &= matches.rank < max_dets
    true &= counted
    classes, size = len(matches.positives), len(THRESHOLDS) + 1
    cell = matches.label * size + bins

    def at_or_above(flags: Bools) -> Ints:
        table = np.bincount(cell[flags], minlength=classes * size).reshape(classes, size)
        return np.cumsum(table[:, :0:-1], axis=1)[:, ::-1]

    return at_or_above(true), at_or_above(counted & ~true)


def sweep(true: Ints, false: Ints, positives: Ints) -> F1Sweep:
    """The sweep from counts (K, 101) and the number of ground-truth boxes per class (K,)."""
    precision = _ratio(true, true + false)
    recall = _ratio(true, np.broadcast_to(positives[:, None], true.shape))
    f1 = _ratio(2 * precision * recall, precision + recall)
    present = positives > 0
    macro_f1 = _macro(f1, present)
    return F1Sweep(
        positives,
        f1,
        precision,
        recall,
        macro_f1,
        _macro(precision, present),
        _macro(recall, present),
        int(np.argmax(macro_f1)),
    )


def _macro(table: Floats, present: Bools) -> Floats:
    return table[present].mean(axis=0) if present.any() else np.zeros(len(THRESHOLDS))


def _ratio(top: Floats | Ints, bottom: Floats | Ints) -> Floats:
    ratio = np.zeros(top.shape)
    np.divide(top, bottom, out=ratio, where=bottom > 0)
    return ratio
