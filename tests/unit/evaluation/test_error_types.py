"""Error types against hand-made cases, and against numbers of the reference implementation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rfdetr.evaluation.box_table import EvaluationData, data_from_coco, make_box_table
from rfdetr.evaluation.error_types import ErrorTypes, error_types
from rfdetr.evaluation.evaluator import evaluate

OBJECT = (10.0, 10.0, 40.0, 40.0)
SHIFTED = (30.0, 10.0, 40.0, 40.0)  # IoU 1/3 with OBJECT
ELSEWHERE = (200.0, 200.0, 20.0, 20.0)
Box = tuple[float, float, float, float]


def _errors(
    detections: list[tuple[Box, int, float]],
    truth: list[tuple[Box, int]] | None = None,
    crowd: bool = False,
) -> ErrorTypes:
    truth = truth or [(OBJECT, 1)]
    data = EvaluationData(
        np.array([7]),
        make_box_table(
            [0] * len(detections),
            [label for _, label, _ in detections],
            [box for box, _, _ in detections],
            score=[score for _, _, score in detections],
        ),
        make_box_table(
            [0] * len(truth),
            [label for _, label in truth],
            [box for box, _ in truth],
            crowd=[False] * (len(truth) - 1) + [crowd],
        ),
    )
    return error_types(data, np.array([1, 2]))


@pytest.mark.parametrize(
    ("detection", "kind", "cost"),
    [
        ((OBJECT, 2, 0.9), "classification", 1.0),
        ((SHIFTED, 1, 0.9), "localisation", 1.0),
        ((SHIFTED, 2, 0.9), "both", 0.0),  # removed, but the object stays missed
        ((ELSEWHERE, 1, 0.9), "background", 0.0),
    ],
)
def test_one_detection(detection: tuple[Box, int, float], kind: str, cost: float) -> None:
    found = _errors([detection])
    fixable = kind in ("classification", "localisation")
    assert found.ap50 == 0
    assert found.counts == {
        **dict.fromkeys(found.counts, 0),
        kind: 1,
        "missed": 0 if fixable else 1,
    }
    assert found.costs[kind] == pytest.approx(cost)
    assert found.costs["missed"] == (0.0 if fixable else 1.0)


def test_a_duplicate_costs_only_what_ranks_behind_it() -> None:
    two = [(OBJECT, 1), (ELSEWHERE, 1)]
    found = _errors([(OBJECT, 1, 0.9), (OBJECT, 1, 0.8), (ELSEWHERE, 1, 0.7)], two)
    assert found.counts["duplicate"] == 1
    # Precision 1 up to recall 0.5 (51 points), then 2/3 instead of 1
    assert found.ap50 == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert found.costs["duplicate"] == pytest.approx(50 / 3 / 101)


def test_detections_on_crowd_regions_are_no_errors() -> None:
    found = _errors([(OBJECT, 1, 0.9), (ELSEWHERE, 1, 0.8)], [(OBJECT, 1), (ELSEWHERE, 1)], True)
    assert not any(found.counts.values())
    assert found.ap50 == 1


def test_of_two_errors_for_one_object_only_the_better_one_is_corrected() -> None:
    found = _errors([(SHIFTED, 1, 0.9), (OBJECT, 2, 0.8)])
    assert found.costs["localisation"] == 1.0
    assert found.costs["classification"] == 0.0


def test_nothing_to_evaluate() -> None:
    found = error_types(
        EvaluationData(np.array([1]), make_box_table([], [], []), make_box_table([], [], [])),
        np.array([1]),
    )
    assert found.ap50 == -1
    assert set(found.costs.values()) == {0.0}


def _scene(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    rng = np.random.default_rng(seed)
    truth: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []

    def box() -> list[float]:
        return [*rng.uniform(0, 140, 2).tolist(), *rng.uniform(15, 60, 2).tolist()]

    for image in range(1, 41):
        for _ in range(rng.integers(0, 7)):
            placed, label = box(), int(rng.integers(1, 5))
            truth.append({"image_id": image, "category_id": label, "bbox": placed})
            for _ in range(rng.integers(0, 3)):
                x, y, w, h = np.array(placed) + rng.normal(0, rng.choice([2, 12]), 4)
                other = label if rng.random() < 0.75 else int(rng.integers(1, 5))
                moved = [x, y, max(3, w), max(3, h)]
                found.append({"image_id": image, "category_id": other, "bbox": moved})
        for _ in range(rng.integers(0, 3)):
            label = int(rng.integers(1, 5))
            found.append({"image_id": image, "category_id": label, "bbox": box()})
    for row in found:
        row["score"] = float(rng.uniform(0.05, 1))
    images = [{"id": i, "width": 200, "height": 200} for i in range(1, 41)]
    categories = [{"id": c, "name": str(c)} for c in range(1, 5)]
    return {"images": images, "categories": categories, "annotations": truth}, found


REFERENCE = {  # of tidecv 1.0.1, in percent: AP50, counts, costs
    0: (14.5285, [17, 50, 15, 14, 52, 50], [6.3226, 23.0784, 1.7429, 0.3725, 3.4042, 9.4562]),
    1: (14.7973, [15, 32, 20, 3, 35, 41], [6.926, 14.9604, 1.4732, 0.1223, 5.0929, 8.9545]),
    3: (11.6556, [13, 40, 15, 8, 35, 46], [4.3668, 19.7968, 1.2335, 0.2922, 4.0791, 7.4089]),
    4: (14.0846, [12, 24, 17, 7, 44, 57], [5.5132, 10.4572, 1.8938, 0.3443, 6.4501, 11.4001]),
}


@pytest.mark.parametrize("seed", REFERENCE)
def test_numbers_equal_those_of_the_reference_implementation(seed: int) -> None:
    data = data_from_coco(*_scene(seed))
    labels = np.arange(1, 5)
    found = error_types(data, labels, 100)
    ap50, counts, costs = REFERENCE[seed]
    assert 100 * found.ap50 == pytest.approx(ap50, abs=1e-4)
    assert list(found.counts.values()) == counts
    assert [100 * cost for cost in found.costs.values()] == pytest.approx(costs, abs=1e-4)
    evaluated = evaluate(data, labels, max_dets=100).bbox
    assert evaluated is not None
    assert found.ap50 == pytest.approx(evaluated.summary.ap50, abs=1e-12)
