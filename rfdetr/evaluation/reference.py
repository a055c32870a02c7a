"""The same evaluation by pycocotools: the oracle of the tests and the fallback engine."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np

from rfdetr.evaluation.accumulate import Curves, detection_limits
from rfdetr.evaluation.columns import Columns, Ints, IouType, Rows
from rfdetr.evaluation.f1 import THRESHOLDS


def evaluate_with_pycocotools(
    columns: Columns, class_ids: Ints, iou_type: IouType, max_dets: int
) -> tuple[Curves, Ints, Ints, Ints]:
    """Curves, true and false positives per class and threshold (K, 101), ground truth (K, A)."""
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(
            _coco(columns, class_ids, columns.truth),
            _coco(columns, class_ids, columns.detections),
            iou_type,
        )
        evaluation.params.imgIds = columns.image_ids.tolist()
        evaluation.params.catIds = class_ids.tolist()
        evaluation.params.maxDets = list(detection_limits(max_dets))
        evaluation.evaluate()
        evaluation.accumulate()
    curves = Curves(
        detection_limits(max_dets),
        evaluation.eval["precision"][..., -1],
        evaluation.eval["recall"],
    )
    return curves, *_counts(evaluation, class_ids)


def _coco(columns: Columns, class_ids: Ints, rows: Rows) -> Any:
    from pycocotools.coco import COCO

    # Ids start at 1: pycocotools writes the matched id and reads 0 as no match.
    annotations = [
        {
            "id": number + 1,
            "image_id": int(columns.image_ids[rows.image[number]]),
            "category_id": int(rows.label[number]),
            "bbox": rows.box[number].tolist(),
            "area": float(rows.area[number]),
            "score": float(rows.score[number]),
            "iscrowd": int(rows.crowd[number]),
            "segmentation": [] if rows.rle is None else rows.rle[number],
        }
        for number in range(len(rows))
    ]
    coco = COCO()
    coco.dataset = {
        "images": [
            {"id": int(image_id), "height": 0, "width": 0} for image_id in columns.image_ids
        ],
        "annotations": annotations,
        "categories": [{"id": int(label)} for label in class_ids],
    }
    coco.createIndex()
    return coco


def _counts(evaluation: Any, class_ids: Ints) -> tuple[Ints, Ints, Ints]:
    true = np.zeros((len(class_ids), len(THRESHOLDS)), dtype=np.int64)
    false = np.zeros_like(true)
    ranges = evaluation.params.areaRng
    positives = np.zeros((len(class_ids), len(ranges)), dtype=np.int64)
    for item in filter(None, evaluation.evalImgs):
        index = int(np.searchsorted(class_ids, item["category_id"]))
        area = ranges.index(item["aRng"])
        positives[index, area] += np.count_nonzero(item["gtIgnore"] == 0)
        if area == 0:
            score = np.array(item["dtScores"], dtype=np.float32).astype(np.float64)
            counted = (score >= THRESHOLDS[:, None]) & ~item["dtIgnore"][0]
            matched = item["dtMatches"][0] > 0
            true[index] += (counted & matched).sum(axis=1)
            false[index] += (counted & ~matched).sum(axis=1)
    return true, false, positives
