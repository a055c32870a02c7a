"""Which class is taken for which: counts of detections against ground truth across classes."""

from __future__ import annotations

import numpy as np

from rfdetr.evaluation.columns import Columns, Ints, Rows
from rfdetr.evaluation.matching import box_pairs


def confusion_matrix(columns: Columns, class_ids: Ints, threshold: float) -> Ints:
    """Counts (K + 1, K + 1): row = true class, column = detected class, last = background.

    Detections with score >= `threshold` and ground truth pair up one to one by descending box
    IoU from 0.5, whatever their classes. The last row holds detections of nothing, the last
    column missed objects. Unpaired detections on a crowd region do not count.
    """
    detections = _known(columns.detections, class_ids)
    score = detections.score.astype(np.float32).astype(np.float64)
    detections = detections.take(score >= threshold)
    truth = _known(columns.truth, class_ids)
    truth = truth.take(np.argsort(truth.image, kind="stable"))
    det, box, iou = box_pairs(detections, detections.image, truth, truth.image)
    on_crowd = np.zeros(len(detections), dtype=bool)
    on_crowd[det[truth.crowd[box]]] = True
    real = ~truth.crowd[box]
    partner = _pair_up(det[real], box[real], iou[real], detections.score, len(truth))

    size = len(class_ids) + 1
    rows, columns_ = [], []
    paired = partner >= 0
    found = np.zeros(len(truth), dtype=bool)
    found[partner[paired]] = True
    detected = np.searchsorted(class_ids, detections.label)
    true = np.searchsorted(class_ids, truth.label)
    rows = [true[partner[paired]], np.full(int((~paired & ~on_crowd).sum()), size - 1)]
    columns_ = [detected[paired], detected[~paired & ~on_crowd]]
    missed = true[~found & ~truth.crowd]
    rows.append(missed)
    columns_.append(np.full(len(missed), size - 1))
    cells = np.concatenate(rows) * size + np.concatenate(columns_)
    return np.bincount(cells, minlength=size * size).reshape(size, size)


def _known(rows: Rows, class_ids: Ints) -> Rows:
    return rows.take(np.isin(rows.label, class_ids))


def _pair_up(det: Ints, box: Ints, iou: np.ndarray, score: np.ndarray, boxes: int) -> Ints:
    """Partner of each detection or -1: greedy by IoU, then score, then order.

    A pair that is the best of both its members is chosen whatever the others do, so all such
    pairs of a round are taken at once.
    """
    order = np.lexsort((box, det, -score[det], -iou))
    det, box = det[order], box[order]
    partner = np.full(len(score), -1)
    while len(det):
        place = np.arange(len(det))
        best_of_det = np.full(len(score), len(det))
        best_of_box = np.full(boxes, len(det))
        np.minimum.at(best_of_det, det, place)
        np.minimum.at(best_of_box, box, place)
        chosen = (best_of_det[det] == place) & (best_of_box[box] == place)
        partner[det[chosen]] = box[chosen]
        taken = np.zeros(boxes, dtype=bool)
        taken[box[chosen]] = True
        alive = (partner[det] < 0) & ~taken[box]
        det, box = det[alive], box[alive]
    return partner
