"""Confusion counts."""

from __future__ import annotations

import numpy as np
import pytest

from rfdetr.evaluation.box_table import data_from_coco
from rfdetr.evaluation.confusion import confusion_matrix
from rfdetr.evaluation.matching import box_iou
from tests.unit.evaluation.random_sets import random_set


def greedy(document, results, labels, threshold):
    """The definition, one image at a time."""
    counts = np.zeros((len(labels) + 1, len(labels) + 1), dtype=int)
    for image in document["images"]:
        own = [a for a in document["annotations"] if a["image_id"] == image["id"]]
        found = [r for r in results if r["image_id"] == image["id"]]
        found = [r for r in found if np.float64(np.float32(r["score"])) >= threshold]
        pairs = []
        crowded = set()
        for i, r in enumerate(found):
            for j, a in enumerate(own):
                crowd = bool(a["iscrowd"])
                boxes = np.array([r["bbox"]]), np.array([a["bbox"]])
                iou = box_iou(*boxes, np.array([crowd]))[0]
                if iou >= 0.5 and crowd:
                    crowded.add(i)
                elif iou >= 0.5:
                    pairs.append((-iou, -r["score"], i, j))
        partner = {}
        for *_, i, j in sorted(pairs):
            if i not in partner and j not in partner.values():
                partner[i] = j
        for i, r in enumerate(found):
            column = labels.index(r["category_id"])
            if i in partner:
                counts[labels.index(own[partner[i]]["category_id"]), column] += 1
            elif i not in crowded:
                counts[-1, column] += 1
        for j, a in enumerate(own):
            if j not in partner.values() and not a["iscrowd"]:
                counts[labels.index(a["category_id"]), -1] += 1
    return counts


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_counts_follow_the_definition(seed, threshold):
    document, results = random_set(seed)
    # Distinct scores: the order of equal pairs is arbitrary.
    for number, row in enumerate(results):
        row["score"] = (row["score"] + number * 1e-3) % 1
    labels = [category["id"] for category in document["categories"]]
    columns = data_from_coco(document, results)
    counts = confusion_matrix(columns, np.array(labels), threshold)
    np.testing.assert_array_equal(counts, greedy(document, results, labels, threshold))
    real = sum(not row["iscrowd"] for row in document["annotations"])
    assert counts[:-1].sum() == real
