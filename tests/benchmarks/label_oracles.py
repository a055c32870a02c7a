"""Rankings of suspected labels by other tools: cleanlab's object-detection scores and hotcoco.

Used by bench_labels.py. A ranking has, most suspicious first, rows of the ground truth for the
kinds `swap` and `shift`, and rows of the detections for `delete`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rfdetr.arrays import Integers
from rfdetr.evaluation.box_table import EvaluationData
from rfdetr.evaluation.suspects import KINDS as OUR_KINDS
from rfdetr.evaluation.suspects import find_suspects

OURS = {"swap": "wrong_class", "shift": "badly_placed", "delete": "missing"}
Ranking = dict[str, Integers]


def by_us(data: EvaluationData) -> Ranking:
    """The suspects of one kind each."""
    found = find_suspects(data)
    rows = {"swap": found.truth, "shift": found.truth, "delete": found.detection}
    return {k: rows[k][found.kind == OUR_KINDS.index(OURS[k])] for k in rows}  # type: ignore[arg-type]


def by_cleanlab(data: EvaluationData, confident: float) -> Ranking:
    """The per-box scores of ObjectLab (Tkachenko et al., 2023).

    `confident` is its high_probability_threshold; 0.95 by default, which few detectors reach.
    """
    from cleanlab.object_detection import rank

    classes = np.unique(data.truth.label)
    labels, predictions, truth_rows, det_rows = [], [], [], []
    for image in range(len(data.image_ids)):
        (mine,) = np.nonzero(data.truth.image == image)
        (seen,) = np.nonzero(data.detections.image == image)
        names = np.searchsorted(classes, data.truth.label[mine])
        labels.append({"bboxes": _corners(data.truth.box[mine]), "labels": names})
        of_class = [seen[data.detections.label[seen] == name] for name in classes]
        found = [
            np.c_[_corners(data.detections.box[rows]), data.detections.score[rows]]
            for rows in of_class
        ]
        array = np.empty(len(found), dtype=object)
        array[:] = found
        predictions.append(array)
        truth_rows.append(mine)
        det_rows.append(np.concatenate(of_class))
    given = {"labels": labels, "predictions": predictions}
    sure = {"high_probability_threshold": confident}
    scores = {
        "swap": rank.compute_swap_box_scores(**given, **sure),
        "shift": rank.compute_badloc_box_scores(**given, low_probability_threshold=confident),
        "delete": rank.compute_overlooked_box_scores(**given, **sure),
    }
    rows = {"swap": truth_rows, "shift": truth_rows, "delete": det_rows}
    return {kind: _ascending(rows[kind], scores[kind]) for kind in scores}


def _corners(boxes: Any) -> Any:
    return np.c_[boxes[:, :2], boxes[:, :2] + boxes[:, 2:]]


def _ascending(rows: list[Any], scores: list[Any]) -> Integers:
    """The rows by ascending score; NaN is no suspect."""
    row, score = np.concatenate(rows), np.concatenate(scores).astype(float)
    order = np.argsort(score, kind="stable")
    return row[order[~np.isnan(score[order])]]


def by_hotcoco(data: EvaluationData, confident: float) -> Ranking:
    """The label error candidates of `COCOeval.image_diagnostics`, by score; it knows no shifts."""
    import hotcoco

    truth, detections = data.truth, data.detections
    names = sorted({*truth.label.tolist(), *detections.label.tolist()})
    document = {
        "images": [
            {"id": i + 1, "width": 4096, "height": 4096} for i in range(len(data.image_ids))
        ],
        "annotations": [
            {
                "id": i + 1,
                "image_id": int(truth.image[i]) + 1,
                "category_id": int(truth.label[i]) + 1,
                "bbox": truth.box[i].tolist(),
                "area": float(truth.area[i]),
                "iscrowd": 0,
            }
            for i in range(len(truth))
        ],
        "categories": [{"id": name + 1, "name": str(name)} for name in names],
    }
    results = [
        {
            "image_id": int(detections.image[i]) + 1,
            "category_id": int(detections.label[i]) + 1,
            "bbox": detections.box[i].tolist(),
            "score": float(detections.score[i]),
        }
        for i in range(len(detections))
    ]
    ground_truth = hotcoco.COCO(document)
    run = hotcoco.COCOeval(ground_truth, ground_truth.load_res(results), "bbox")
    run.evaluate()
    found = run.image_diagnostics(0.5, confident)["label_errors"]
    found = sorted(found, key=lambda row: -row["dt_score"])
    wrong = [row["gt_id"] - 1 for row in found if row["gt_id"] is not None]
    missing = [row["dt_id"] - 1 for row in found if row["gt_id"] is None]
    none = np.zeros(0, dtype=np.int64)
    return {
        "swap": np.array(list(dict.fromkeys(wrong)), dtype=np.int64),
        "shift": none,
        "delete": np.array(missing, dtype=np.int64),
    }
