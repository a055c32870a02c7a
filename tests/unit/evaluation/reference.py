"""The same evaluation by pycocotools, the oracle of the tests."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from rfdetr.arrays import Integers
from rfdetr.evaluation import f1
from rfdetr.evaluation.accumulate import Curves, detection_limits
from rfdetr.evaluation.box_table import BoxTable, EvaluationData, IouType, data_from_coco
from rfdetr.evaluation.confusion import confusion_matrix
from rfdetr.evaluation.evaluator import COCO_MAX_DETS, EvaluationResult, type_result


def evaluate_with_pycocotools(
    ground_truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    *,
    iou_type: IouType = "bbox",
    max_dets: int = 500,
) -> EvaluationResult:
    """`evaluate_coco` with the matches and curves of pycocotools."""
    data = data_from_coco(ground_truth, results, masks=iou_type == "segm")
    class_ids = np.unique([category["id"] for category in ground_truth["categories"]])
    coco = _curves(_run(data, class_ids, iou_type, COCO_MAX_DETS))
    evaluation = _run(data, class_ids, iou_type, max_dets)
    true, false, positives = _counts(evaluation, class_ids)
    sweep = f1.sweep(true, false, positives)
    part = type_result(_curves(evaluation), coco)
    return EvaluationResult(
        images=len(data.image_ids),
        class_ids=class_ids,
        bbox=part if iou_type == "bbox" else None,
        segm=part if iou_type == "segm" else None,
        sweep=sweep,
        confusion=confusion_matrix(data, class_ids, sweep.best_threshold),
    )


def _run(data: EvaluationData, class_ids: Integers, iou_type: IouType, max_dets: int) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(
            _coco(data, class_ids, data.truth), _coco(data, class_ids, data.detections), iou_type
        )
        evaluation.params.imgIds = data.image_ids.tolist()
        evaluation.params.catIds = class_ids.tolist()
        evaluation.params.maxDets = list(detection_limits(max_dets))
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def _coco(data: EvaluationData, class_ids: Integers, table: BoxTable) -> Any:
    # Ids start at 1: pycocotools stores the matched id and reads 0 as no match.
    annotations = [
        {
            "id": number + 1,
            "image_id": int(data.image_ids[table.image[number]]),
            "category_id": int(table.label[number]),
            "bbox": table.box[number].tolist(),
            "area": float(table.area[number]),
            "score": float(table.score[number]),
            "iscrowd": int(table.crowd[number]),
            "segmentation": [] if table.rle is None else table.rle[number],
        }
        for number in range(len(table))
    ]
    coco = COCO()
    coco.dataset = {
        "images": [{"id": int(image_id), "height": 0, "width": 0} for image_id in data.image_ids],
        "annotations": annotations,
        "categories": [{"id": int(label)} for label in class_ids],
    }
    coco.createIndex()
    return coco


def _curves(evaluation: Any) -> Curves:
    return Curves(
        max_dets=tuple(evaluation.params.maxDets),
        precision=evaluation.eval["precision"][..., -1],
        recall=evaluation.eval["recall"],
    )


def _counts(evaluation: Any, class_ids: Integers) -> tuple[Integers, Integers, Integers]:
    """True and false positives per class and threshold (K, 101), ground truth per class (K,)."""
    true = np.zeros((len(class_ids), len(f1.SCORE_THRESHOLDS)), dtype=np.int64)
    false = np.zeros_like(true)
    positives = np.zeros(len(class_ids), dtype=np.int64)
    every_size = evaluation.params.areaRng[0]
    for item in filter(None, evaluation.evalImgs):
        if item["aRng"] != every_size:
            continue
        index = int(np.searchsorted(class_ids, item["category_id"]))
        positives[index] += np.count_nonzero(item["gtIgnore"] == 0)
        score = np.array(item["dtScores"], dtype=np.float32).astype(np.float64)
        counted = (score >= f1.SCORE_THRESHOLDS[:, None]) & ~item["dtIgnore"][0]
        matched = item["dtMatches"][0] > 0
        true[index] += (counted & matched).sum(axis=1)
        false[index] += (counted & ~matched).sum(axis=1)
    return true, false, positives
