"""Confusion matrix: detected classes against true classes."""

from __future__ import annotations

import numpy as np

from rfdetr.arrays import Floats, Integers
from rfdetr.evaluation.box_table import BoxTable, EvaluationData
from rfdetr.evaluation.matching import box_pairs


def confusion_matrix(data: EvaluationData, class_ids: Integers, threshold: float) -> Integers:
    """Counts (K + 1, K + 1): row = true class, column = detected class, last = background.

    Detections with score >= `threshold` and ground truth pair up one to one by descending box
    IoU from 0.5, whatever their classes. The last row counts detections without ground truth, the
    last column missed objects. Unpaired detections on a crowd region do not count. `class_ids`
    (K,) ascend.
    """
    detections = _of_classes(data.detections, class_ids)
    score = detections.score.astype(np.float32).astype(np.float64)
    detections = detections.take(score >= threshold)
    truth = _of_classes(data.truth, class_ids)
    truth = truth.take(np.argsort(truth.image, kind="stable"))
    det, box, iou = box_pairs(detections, detections.image, truth, truth.image)
    on_crowd = np.zeros(len(detections), dtype=bool)
    on_crowd[det[truth.crowd[box]]] = True
    real = ~truth.crowd[box]
    partner = _pair_up(det[real], box[real], iou[real], detections.score, len(truth))

    paired = partner >= 0
    found = np.zeros(len(truth), dtype=bool)
    found[partner[paired]] = True
    detected = np.searchsorted(class_ids, detections.label)
    true = np.searchsorted(class_ids, truth.label)
    matrix = np.zeros((len(class_ids) + 1, len(class_ids) + 1), dtype=np.int64)
    np.add.at(matrix, (true[partner[paired]], detected[paired]), 1)
    np.add.at(matrix[-1], detected[~paired & ~on_crowd], 1)
    np.add.at(matrix[:, -1], true[~found & ~truth.crowd], 1)
    return matrix


def _of_classes(table: BoxTable, class_ids: Integers) -> BoxTable:
    return table.take(np.isin(table.label, class_ids))


def _pair_up(det: Integers, box: Integers, iou: Floats, score: Floats, boxes: int) -> Integers:
    """Partner of each detection or -1: greedy by IoU, then score, then order.

    A pair that is the best of both its members is chosen regardless of all other pairs, so every
    such pair is taken in one round.
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
        left = (partner[det] < 0) & ~taken[box]
        det, box = det[left], box[left]
    return partner
