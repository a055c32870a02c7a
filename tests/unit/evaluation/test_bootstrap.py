from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from rfdetr.errors import InputError
from rfdetr.evaluation.bootstrap import paired_bootstrap
from rfdetr.evaluation.box_table import data_from_coco
from rfdetr.evaluation.evaluator import evaluate_coco
from rfdetr.evaluation.evidence import MatchEvidence, collect_evidence
from rfdetr.evaluation.resample import Metric, statistic

CLASSES = (3, 7, 9)


def scene(seed: int, images: int = 12) -> tuple[list[dict], np.random.Generator]:
    random = np.random.default_rng(seed)
    truth = []
    for image in range(1, images + 1):
        for _ in range(random.integers(0, 5)):
            box = [*random.uniform(0, 60, 2), *random.uniform(10, 40, 2)]
            truth.append(
                {
                    "image_id": image,
                    "category_id": int(random.choice(CLASSES[:2])),
                    "bbox": [float(v) for v in box],
                    "area": float(box[2] * box[3]),
                    "iscrowd": int(random.random() < 0.1),
                }
            )
    return truth, random


def detector(truth: list[dict], random: np.random.Generator, jitter: float) -> list[dict]:
    found = []
    for row in truth:
        for _ in range(random.integers(0, 3)):
            found.append(
                {
                    "image_id": row["image_id"],
                    "category_id": row["category_id"]
                    if random.random() < 0.8
                    else int(random.choice(CLASSES)),
                    "bbox": [float(v + random.normal(0, jitter)) for v in row["bbox"]],
                    "score": float(np.round(random.random(), 1)),  # many ties
                }
            )
    return found


def document(truth: list[dict], images: int) -> dict:
    return {
        "images": [{"id": i, "width": 128, "height": 128} for i in range(1, images + 1)],
        "annotations": [{**row, "id": n} for n, row in enumerate(truth, 1)],
        "categories": [{"id": c, "name": str(c)} for c in CLASSES],
    }


def oracle(truth: list[dict], found: list[dict], images: int) -> dict[Metric, float]:
    """The mAP of pycocotools with 500 detections."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = document(truth, images)
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
        evaluation.params.maxDets = [1, 10, 500]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    valid = precision[:, :, precision[0, 0] > -1]
    return {
        "map_50_95": float(valid.mean()),
        "map_50": float(valid[0].mean()),
        "map_75": float(valid[5].mean()),
    }


def value(record: MatchEvidence, metric: Metric = "map_50_95", weights=None) -> float:
    ones = np.ones(record.images, dtype=np.int64)
    return float(statistic(record, metric)(np.array([ones if weights is None else weights]))[0])


def evidence(truth: list[dict], found: list[dict], images: int) -> MatchEvidence:
    return collect_evidence(data_from_coco(document(truth, images), found), CLASSES)


@pytest.mark.parametrize("seed", range(5))
def test_without_resampling_it_is_the_map_of_pycocotools(seed: int) -> None:
    truth, random = scene(seed)
    found = detector(truth, random, 4.0)
    record = evidence(truth, found, 12)
    for metric, expected in oracle(truth, found, 12).items():
        assert value(record, metric) == pytest.approx(expected, abs=1e-9)
    sweep = evaluate_coco(document(truth, 12), found).sweep
    assert value(record, "f1") == pytest.approx(sweep.macro_f1[sweep.best], abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_weighted_images_equal_copied_images(seed: int) -> None:
    truth, random = scene(seed)
    found = detector(truth, random, 3.0)
    seen: dict[int, int] = {}
    for row in found:  # ties between images only: their order within one is arbitrary
        seen[row["image_id"]] = seen.get(row["image_id"], 0) + 1
        row["score"] += seen[row["image_id"]] / 1000
    weights = random.integers(0, 4, 12)
    copies = [image for image in range(1, 13) for _ in range(weights[image - 1])]

    def copied(rows: list[dict]) -> list[dict]:
        return [
            {**row, "image_id": new}
            for new, old in enumerate(copies, 1)
            for row in rows
            if row["image_id"] == old
        ]

    expected = oracle(copied(truth), copied(found), len(copies))["map_50_95"]
    record = evidence(truth, found, 12)
    assert value(record, weights=weights) == pytest.approx(expected, abs=1e-9)
    copies_of = document(copied(truth), len(copies))
    sweep = evaluate_coco(copies_of, copied(found)).sweep
    assert value(record, "f1", weights) == pytest.approx(sweep.macro_f1[sweep.best], abs=1e-9)


def test_a_batch_of_resamples_gives_the_numbers_of_single_ones() -> None:
    truth, random = scene(6, images=30)
    record = evidence(truth, detector(truth, random, 4.0), 30)
    weights = random.integers(0, 3, (50, 30))
    for metric in ("map_50_95", "f1"):
        alone = [value(record, metric, row) for row in weights]
        assert statistic(record, metric)(weights).tolist() == alone


def test_interval_holds_zero_for_equals_and_leaves_it_for_a_clear_winner() -> None:
    truth, random = scene(1, images=80)
    noisy = evidence(truth, detector(truth, random, 5.0), 80)
    equal = evidence(truth, detector(truth, random, 5.0), 80)
    better = evidence(truth, [{**row, "score": 1.0} for row in truth], 80)
    same = paired_bootstrap(noisy, equal, resamples=200)
    assert same.lower < 0 < same.upper
    won = paired_bootstrap(noisy, better, resamples=200)
    assert 0 < won.lower < won.observed < won.upper
    itself = paired_bootstrap(noisy, noisy, resamples=20)
    assert (itself.lower, itself.observed, itself.upper) == (0, 0, 0)


def test_same_seed_gives_the_same_interval_and_swapping_mirrors_it() -> None:
    truth, random = scene(2, images=40)
    one = evidence(truth, detector(truth, random, 5.0), 40)
    two = evidence(truth, detector(truth, random, 2.0), 40)
    first = paired_bootstrap(one, two, resamples=100)
    assert first == paired_bootstrap(one, two, resamples=100)
    mirrored = paired_bootstrap(two, one, resamples=100)
    assert mirrored.upper == pytest.approx(-first.lower)
    assert mirrored.observed == pytest.approx(-first.observed)


def test_evidence_survives_its_text_form_and_refuses_foreign_text() -> None:
    truth, random = scene(3)
    record = evidence(truth, detector(truth, random, 4.0), 12)
    copy = MatchEvidence.decode(record.encode())
    assert value(copy) == value(record)
    assert np.array_equal(copy.positives, record.positives)
    for text in ("", "not base64!", "aGVsbG8="):
        with pytest.raises(InputError, match="cannot be decoded"):
            MatchEvidence.decode(text)


def test_different_ground_truth_and_empty_sets_are_refused() -> None:
    truth, random = scene(4)
    found = detector(truth, random, 4.0)
    record = evidence(truth, found, 12)
    with pytest.raises(InputError, match="same images and boxes"):
        paired_bootstrap(record, evidence(truth[1:], found, 12))
    for rows in ([], [row for row in truth if row["image_id"] == truth[0]["image_id"]]):
        few = evidence(rows, found, 12)
        with pytest.raises(InputError, match="fewer than two images have boxes"):
            paired_bootstrap(few, few)


def test_a_detector_without_detections_scores_zero() -> None:
    truth, random = scene(5)
    nothing = evidence(truth, [], 12)
    assert value(nothing) == value(nothing, "f1") == 0.0
    some = evidence(truth, detector(truth, random, 1.0), 12)
    assert paired_bootstrap(nothing, some, resamples=50).lower > 0
