"""Labels that are probably wrong, found by comparing them with the detections of a model.

Every kind of mistake leaves a trace when the model has not seen the label:

    wrong_class    a detection of another class on the label, and hardly one of its own class
    badly_placed   a detection of the label's class that overlaps it, but does not fit it
    missing        a detection where no label is
    duplicate      two labels of one class on one object
    spurious       a label on which nothing is detected

The suspicion (0..1) grows with the score of the detection that contradicts the label, and falls
with what confirms it; how well detections usually fit is taken from the split itself. Recall of
planted mistakes: tests/benchmarks/bench_labels.py. A label without any detection is the weakest
evidence, because models overlook objects: its suspicion is the share of spurious labels among
undetected ones, for the recall of the model on that class.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from rfdetr.arrays import Bools, Floats, Integers
from rfdetr.evaluation.box_table import BoxTable, EvaluationData
from rfdetr.evaluation.matching import Pairs, box_pairs

Kind = Literal["wrong_class", "badly_placed", "missing", "duplicate", "spurious"]
KINDS: tuple[Kind, ...] = ("wrong_class", "badly_placed", "missing", "duplicate", "spurious")
_LOWEST = 0.1  # suspicion that is worth a look
STRONG = 0.5  # suspicion from which a label is counted as a strong suspect

_TOUCHES = 0.1  # IoU from which a detection may mean a label
_FITS = 0.5  # IoU from which it shows what is at the label
_SAME = 0.8  # IoU of two labels for one object
_SEEN = 0.2  # score from which the model sees an object
_LOWEST_SCORE = 0.05
_SPURIOUS_SHARE = 0.02  # of all labels, before anything is known


@dataclasses.dataclass(frozen=True)
class Suspects:
    """Suspected labels by descending suspicion; arrays (n,).

    kind: index into KINDS. truth: row of the label in `data.truth`, -1 if it is missing.
    detection: row of the contradicting detection in `data.detections`, -1 if there is none.
    image: position in `data.image_ids`. suspicion: 0..1.
    """

    kind: Integers
    truth: Integers
    detection: Integers
    image: Integers
    suspicion: Floats

    def __len__(self) -> int:
        return len(self.kind)

    @property
    def strong(self) -> int:
        """Number of suspects with a suspicion of at least STRONG."""
        return int((self.suspicion >= STRONG).sum())


def find_suspects(data: EvaluationData) -> Suspects:
    """At most one suspicion per label, and one per detection where a label may be missing.

    Boxes are compared, also for segmentation models. Crowd regions are not suspected, and hide
    missing labels inside them.
    """
    (det_rows,) = np.nonzero(data.detections.score >= _LOWEST_SCORE)
    det_rows = det_rows[np.argsort(data.detections.image[det_rows], kind="stable")]
    (truth_rows,) = np.nonzero(~data.truth.crowd)
    truth_rows = truth_rows[np.argsort(data.truth.image[truth_rows], kind="stable")]
    detections, truth = data.detections.take(det_rows), data.truth.take(truth_rows)
    pairs = box_pairs(detections, detections.image, truth, truth.image, _TOUCHES)
    meant = _meant(detections, truth, pairs)
    of_label = _of_labels(detections, truth, pairs, meant)
    missing, score = _missing(detections, data.truth, truth, pairs, meant)
    kind, suspicion, cause = of_label
    chosen = np.flatnonzero(suspicion >= _LOWEST)
    enough = score >= _LOWEST
    missing, score = missing[enough], score[enough]
    found = Suspects(
        kind=np.r_[kind[chosen], np.full(len(missing), KINDS.index("missing"))],
        truth=np.r_[truth_rows[chosen], np.full(len(missing), -1)],
        detection=np.r_[
            np.where(cause[chosen] >= 0, det_rows[cause[chosen]] if len(det_rows) else -1, -1),
            det_rows[missing],
        ],
        image=np.r_[truth.image[chosen], detections.image[missing]],
        suspicion=np.r_[suspicion[chosen], score],
    )
    order = np.argsort(-found.suspicion, kind="stable")
    return Suspects(*(getattr(found, field.name)[order] for field in dataclasses.fields(found)))


def _meant(detections: BoxTable, truth: BoxTable, pairs: Pairs) -> Bools:
    """Whether each pair is the label that its detection means: that of the highest IoU.

    A label of the detection's own class is preferred to a better fitting one of another class,
    unless it is out of place.
    """
    det, box, iou = pairs
    same = detections.label[det] == truth.label[box]
    preference = iou + (same & (iou >= _FITS))
    order = np.lexsort((preference, det))
    last = np.r_[det[order][1:] != det[order][:-1], True] if len(det) else np.zeros(0, dtype=bool)
    meant = np.zeros(len(det), dtype=bool)
    meant[order[last]] = True
    return meant


def _of_labels(
    detections: BoxTable, truth: BoxTable, pairs: Pairs, meant: Bools
) -> tuple[Integers, Floats, Integers]:
    """Kind, suspicion and contradicting detection of every label; suspicion 0: none."""
    det, box, iou = pairs
    same = detections.label[det] == truth.label[box]
    score = detections.score[det]
    fits = iou >= _FITS
    count = len(truth)
    own, _ = _highest(box, score, same & fits, count)
    other, other_pair = _highest(box, score, ~same & fits & meant, count)
    # The label says that there is an object: only the share of the other class counts, unless the
    # model hardly sees one
    share = other / np.maximum(other + own, 1e-9)
    wrong_class = share**2 * np.minimum(1, other / _SEEN)
    # One detection of the right class that fits as well as they usually do confirms the place
    seen = same & (score >= _SEEN)
    agreement, _ = _highest(box, iou, seen, count)
    usual = np.median(agreement[own >= _SEEN]) if (own >= _SEEN).any() else _FITS
    strength, placed_pair = _highest(box, score, seen & meant, count)
    badly_placed = strength**0.25 * np.clip(1 - agreement / usual, 0, 1)
    explained, _ = _highest(box, score, np.ones(len(det), dtype=bool), count)
    spurious = (1 - explained) * _spurious_share(truth.label, explained)
    duplicate = _duplicates(detections, truth, pairs)
    rows = [wrong_class, badly_placed, np.zeros(count), duplicate, spurious]
    suspicion = np.stack(rows)
    kind = suspicion.argmax(axis=0) if count else np.zeros(0, dtype=np.int64)
    cause = np.full(count, -1)
    for number, pair in ((0, other_pair), (1, placed_pair)):
        chosen = (kind == number) & (pair >= 0)
        cause[chosen] = det[pair[chosen]]
    return kind, suspicion.max(axis=0, initial=0.0), cause


def _highest(box: Integers, value: Floats, where: Bools, count: int) -> tuple[Floats, Integers]:
    """The highest value of each label over the pairs `where`, and that pair: 0 and -1 if none."""
    (pair,) = np.nonzero(where)
    order = pair[np.argsort(value[pair], kind="stable")]
    best, which = np.zeros(count), np.full(count, -1)
    best[box[order]], which[box[order]] = value[order], order  # the last one remains
    return best, which


def _spurious_share(label: Integers, explained: Floats) -> Floats:
    """The share of spurious labels among undetected ones of each label's class, by Bayes' rule."""
    classes, index = np.unique(label, return_inverse=True)
    undetected = np.bincount(index, explained < 0.3, len(classes))
    missed = (undetected + 1) / (np.bincount(index, minlength=len(classes)) + 2)
    share: Floats = (_SPURIOUS_SHARE / (_SPURIOUS_SHARE + missed))[index]
    return share


def _duplicates(detections: BoxTable, truth: BoxTable, pairs: Pairs) -> Floats:
    """Suspicion of the later one of two labels of one class in one place: their IoU.

    Less the score of a second detection there: two objects can overlap that much.
    """
    suspicion = np.zeros(len(truth))
    first, second, iou = box_pairs(truth, truth.image, truth, truth.image, _SAME)
    twins = (first < second) & (truth.label[first] == truth.label[second])
    det, box, overlap = pairs
    for a, b, value in zip(first[twins], second[twins], iou[twins], strict=True):
        there = (box == a) & (overlap >= _FITS) & (detections.label[det] == truth.label[a])
        scores = np.sort(detections.score[det[there]])[::-1]
        suspicion[b] = max(suspicion[b], value * (1 - (scores[1] if len(scores) > 1 else 0.0)))
    return suspicion


def _missing(
    detections: BoxTable, every_label: BoxTable, truth: BoxTable, pairs: Pairs, meant: Bools
) -> tuple[Integers, Floats]:
    """Detections that mean no label, and their suspicion: the score outside of crowd regions.

    A detection also means none if another one explains its label better. Of several in one place
    the best is kept.
    """
    det, box, iou = pairs
    quality = np.where(meant, iou * detections.score[det], 0.0)
    best, which = _highest(box, quality, meant, len(truth))
    explains = np.zeros(len(detections), dtype=bool)
    explains[det[which[best > 0]]] = True
    touched = np.zeros(len(detections))
    np.maximum.at(touched, det, iou)
    loose = ~explains & (touched < _FITS)
    row = np.flatnonzero(loose | explains)
    row = row[np.argsort(-(detections.score[row] + explains[row]), kind="stable")]
    kept = _suppress(detections.take(row))
    row = row[kept]
    row = row[loose[row]]
    crowd = every_label.take(every_label.crowd)
    crowd = crowd.take(np.argsort(crowd.image, kind="stable"))
    free = np.ones(len(detections))
    inside, _, share = box_pairs(detections, detections.image, crowd, crowd.image, 1e-6)
    np.minimum.at(free, inside, 1 - share)
    return row, detections.score[row] * free[row]


def _suppress(boxes: BoxTable) -> Bools:
    """Whether each box has no better (earlier) kept one of its image with an IoU of 0.5 or more."""
    place = np.argsort(boxes.image, kind="stable")
    grouped = boxes.take(place)
    first, second, _ = box_pairs(grouped, grouped.image, grouped, grouped.image, _FITS)
    first, second = place[first], place[second]
    earlier = first < second
    first, second = first[earlier], second[earlier]
    order = np.lexsort((first, second))
    kept = np.ones(len(boxes), dtype=bool)
    for better, worse in zip(first[order].tolist(), second[order].tolist(), strict=True):
        if kept[better]:
            kept[worse] = False
    return kept
