"""What costs AP: errors by type, as TIDE (Bolya et al., ECCV 2020) defines them.

A false detection is compared with all ground truth of its image, by the IoU of boxes:

    localisation     right class, IoU between 0.1 and 0.5
    classification   wrong class, IoU of 0.5 or more
    duplicate        right class, IoU of 0.5 or more with an object that a better detection has
    background       IoU below 0.1 with everything
    both             the rest: wrong class and badly placed

An object without a detection is `missed`, unless a localisation or classification error explains
it. What a type costs is the mean AP50 that correcting all its errors would add. A corrected error
becomes true if its object is still free and no better error of any type points to it; otherwise it
disappears. Costs do not add up to 1 - AP50.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from rfdetr.arrays import Bools, Floats, Integers, find_rows
from rfdetr.evaluation.accumulate import average_precisions
from rfdetr.evaluation.box_table import EvaluationData
from rfdetr.evaluation.matching import Matches, box_pairs, match

FOREGROUND, BACKGROUND = 0.5, 0.1
TYPES = ("classification", "localisation", "both", "duplicate", "background", "missed")
_NONE = -1


@dataclasses.dataclass(frozen=True)
class ErrorTypes:
    """Number of errors and cost in AP50 (fractions) per type, in the order of TYPES."""

    ap50: float
    counts: dict[str, int]
    costs: dict[str, float]


@dataclasses.dataclass(frozen=True)
class _Classified:
    """Detections that count, by class and descending score, and the objects that count.

    label, score, true: (D,). kind: (D,) index into TYPES, or -1. target: (D,) row of the object
    that a correction would match, or -1. truth_label: (M,) class index. taken: (M,) detected.
    """

    label: Integers
    score: Floats
    true: Bools
    kind: Integers
    target: Integers
    truth_label: Integers
    taken: Bools


def error_types(data: EvaluationData, class_ids: Integers, max_dets: int = 500) -> ErrorTypes:
    """Errors of the boxes of `data` for the classes `class_ids` (K,), ascending.

    Crowd regions and detections on them do not count. `ap50` equals that of `evaluate`.
    """
    found = _classify(data, class_ids, max_dets)
    classes = len(class_ids)
    positives = np.bincount(found.truth_label, minlength=classes)
    base = _mean_ap(found.label, found.score, found.true, positives)
    counts, costs = {}, {}
    for number, name in enumerate(TYPES[:-1]):
        counts[name] = int((found.kind == number).sum())
        label, score, true = _corrected(found, number)
        costs[name] = _mean_ap(label, score, true, positives) - base
    explained = np.zeros(len(found.taken), dtype=bool)
    explained[found.target[found.target >= 0]] = True
    missed = ~found.taken & ~explained
    counts["missed"] = int(missed.sum())
    fewer = positives - np.bincount(found.truth_label[missed], minlength=classes)
    costs["missed"] = _mean_ap(found.label, found.score, found.true, fewer, positives) - base
    return ErrorTypes(base, counts, {name: float(costs[name]) for name in TYPES})


def _classify(data: EvaluationData, class_ids: Integers, max_dets: int) -> _Classified:
    matches = match(data, class_ids, "bbox", max_dets)
    true, ignored = _flags(matches)
    kept = ~ignored
    row, label = matches.row[kept], matches.label[kept]
    true, score = true[kept], matches.score[kept]
    truth = data.truth.take((find_rows(class_ids, data.truth.label) >= 0) & ~data.truth.crowd)
    truth = truth.take(np.argsort(truth.image, kind="stable"))
    truth_label = find_rows(class_ids, truth.label)
    detections = data.detections.take(row)
    det, box, iou = box_pairs(detections, detections.image, truth, truth.image, BACKGROUND)
    same = label[det] == truth_label[box]
    own, own_iou = _best(det[same], box[same], iou[same], len(row))
    other, other_iou = _best(det[~same], box[~same], iou[~same], len(row))
    taken = _taken(true, score, (det[same], box[same], iou[same]), len(truth))
    kind = np.full(len(row), TYPES.index("both"))
    kind[np.maximum(own_iou, other_iou) < BACKGROUND] = TYPES.index("background")
    kind[own_iou >= FOREGROUND] = TYPES.index("duplicate")
    kind[other_iou >= FOREGROUND] = TYPES.index("classification")
    localisation = (own_iou >= BACKGROUND) & (own_iou < FOREGROUND)
    kind[localisation] = TYPES.index("localisation")
    kind[true] = _NONE
    target = np.full(len(row), _NONE)
    target[kind == TYPES.index("localisation")] = own[kind == TYPES.index("localisation")]
    target[kind == TYPES.index("classification")] = other[kind == TYPES.index("classification")]
    return _Classified(label, score, true, kind, target, truth_label, taken)


def _flags(matches: Matches) -> tuple[Bools, Bools]:
    """Whether each detection is true, and whether it is ignored, at IoU 0.5 and for all areas."""
    true = np.zeros(len(matches.row), dtype=bool)
    ignored = np.zeros_like(true)
    true[matches.candidate] = matches.matched[:, 0, 0] & ~matches.ignored[:, 0, 0]
    ignored[matches.candidate] = matches.ignored[:, 0, 0]
    return true, ignored


def _best(det: Integers, box: Integers, iou: Floats, detections: int) -> tuple[Integers, Floats]:
    """The object with the highest IoU of each detection, -1 and 0 if there is none."""
    order = np.lexsort((iou, det))
    best, value = np.full(detections, _NONE), np.zeros(detections)
    best[det[order]], value[det[order]] = box[order], iou[order]  # the last one remains
    return best, value


def _taken(
    true: Bools, score: Floats, pairs: tuple[Integers, Integers, Floats], objects: int
) -> Bools:
    """The objects that true detections have, by the greedy rule that made them true."""
    det, box, iou = pairs
    kept = true[det] & (iou >= FOREGROUND)
    det, box, iou = det[kept], box[kept], iou[kept]
    order = np.lexsort((box, iou, -det, score[det]))[::-1]  # by score, then IoU, both descending
    taken = np.zeros(objects, dtype=bool)
    done: set[int] = set()
    for d, b in zip(det[order].tolist(), box[order].tolist(), strict=True):
        if d not in done and not taken[b]:
            done.add(d)
            taken[b] = True
    return taken


def _corrected(found: _Classified, kind: int) -> tuple[Integers, Floats, Bools]:
    """Class, score and truth of the detections after the errors of one type are corrected."""
    wrong = found.kind == kind
    fixable = found.target >= 0
    fixable[fixable] = ~found.taken[found.target[fixable]]
    rows = np.flatnonzero(fixable)
    rows = rows[np.argsort(-found.score[rows], kind="stable")]
    _, first = np.unique(found.target[rows], return_index=True)  # of each object, the best
    rows = rows[first]
    rows = rows[wrong[rows]]
    true, label = found.true.copy(), found.label.copy()
    true[rows], label[rows] = True, found.truth_label[found.target[rows]]
    kept = ~wrong | true
    order = np.argsort(-found.score[kept], kind="stable")
    return label[kept][order], found.score[kept][order], true[kept][order]


def _mean_ap(
    label: Integers,
    score: Floats,
    true: Bools,
    positives: Integers,
    defined_by: Integers | None = None,
) -> float:
    """Mean AP over the classes with ground truth, 101 recall points; 1 for a class left empty."""
    order = np.lexsort((-score, label))
    label, (hits,) = label[order], np.nonzero(true[order])
    counted = hits - np.searchsorted(label, label[hits]) + 1
    values = average_precisions(label[hits], counted, positives)
    values[positives == 0] = 1.0
    values = values[(positives if defined_by is None else defined_by) > 0]
    return float(values.mean()) if len(values) else -1.0
