"""The F1 sweep: which scores count, ties, classes that are averaged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from rfdetr.evaluation.evaluator import evaluate_coco
from rfdetr.evaluation.f1 import SCORE_THRESHOLDS, sweep


def one_box_each(scores: list[float]) -> tuple[dict, list[dict]]:
    """One image per score, with one box that is found exactly."""
    images = range(1, len(scores) + 1)
    box = [10.0, 10.0, 20.0, 20.0]
    truth = [
        {"id": i, "image_id": i, "category_id": 1, "bbox": box, "area": 400.0, "iscrowd": 0}
        for i in images
    ]
    results = [
        {"image_id": i, "category_id": 1, "bbox": box, "score": s}
        for i, s in zip(images, scores, strict=True)
    ]
    document = {
        "images": [{"id": i} for i in images],
        "annotations": truth,
        "categories": [{"id": 1}],
    }
    return document, results


def test_scores_on_the_grid_count_as_float32(parity: Path):
    case = json.loads((parity / "training/metrics/grid_ties.json").read_text())
    for score, (widened, above) in zip(case["scores"], case["above"], strict=True):
        assert float(np.float32(score)) == widened
        result = evaluate_coco(*one_box_each([score])).sweep
        index = int(np.argmin(abs(SCORE_THRESHOLDS - score)))
        assert bool(result.recall[0, index]) is above
        assert result.recall[0, index - 1] == 1.0


def test_lowest_of_equal_thresholds_is_chosen():
    result = evaluate_coco(*one_box_each([0.9, 0.73])).sweep
    assert result.macro_f1.max() == 1.0
    assert result.best_threshold == 0.0


def test_macro_is_the_mean_over_classes_with_ground_truth():
    true = np.zeros((3, 101), dtype=int)
    false = np.zeros_like(true)
    true[0, :51], false[0, :51] = 4, 4
    true[1, :51] = 1
    false[2] = 50  # a class without ground truth: its false positives do not count
    result = sweep(true, false, np.array([8, 2, 0]))
    assert result.f1[0, 0] == 0.5
    assert result.f1[1, 0] == 2 * 0.5 / 1.5
    assert result.macro_f1[0] == (result.f1[0, 0] + result.f1[1, 0]) / 2
    assert result.macro_precision[0] == 0.75
    assert result.macro_recall[0] == 0.5
    # not the F1 of the macro precision and recall
    assert result.macro_f1[0] != 2 * 0.75 * 0.5 / 1.25
    assert result.best == 0


def test_raising_the_threshold_removes_false_positives():
    document, results = one_box_each([0.8])
    wrong = results[0] | {"bbox": [100.0, 100.0, 5.0, 5.0], "score": 0.405}
    result = evaluate_coco(document, [*results, wrong]).sweep
    assert result.best_threshold == SCORE_THRESHOLDS[41]
    assert result.macro_precision[40] == 0.5
    assert result.macro_precision[41] == 1.0
