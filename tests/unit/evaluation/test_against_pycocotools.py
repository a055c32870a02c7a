"""The engine against pycocotools: stored reference numbers, and random sets side by side."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from rfdetr.errors import InputError
from rfdetr.evaluation.evaluator import evaluate_coco
from tests.unit.evaluation.random_sets import random_set
from tests.unit.evaluation.reference import evaluate_with_pycocotools

EXACT = 1e-9
SUMMARY = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large", "mar_1", "mar_10")


def pycocotools_numbers(document, results, iou_type, max_dets):
    """The twelve numbers and per-class (AP, AP50, AR), straight from pycocotools."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(document)
        truth.createIndex()
        run = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), iou_type)
        run.params.maxDets = [1, 10, max_dets]
        run.evaluate()
        run.accumulate()
    precision, recall = run.eval["precision"][..., -1], run.eval["recall"]

    def mean(values):
        return values[values > -1].mean() if (values > -1).any() else -1.0

    twelve = [mean(precision[..., 0]), mean(precision[0, ..., 0]), mean(precision[5, ..., 0])]
    twelve += [mean(precision[..., a]) for a in (1, 2, 3)]
    twelve += [mean(recall[:, :, 0, m]) for m in (0, 1, 2)]
    twelve += [mean(recall[:, :, a, 2]) for a in (1, 2, 3)]
    classes = [
        (mean(precision[:, :, k, 0]), mean(precision[0, :, k, 0]), mean(recall[:, k, 0, 2]))
        for k in range(precision.shape[2])
    ]
    return np.array(twelve), np.array(classes)


@pytest.mark.parametrize("max_dets", [100, 500])
@pytest.mark.parametrize("masks", [False, True], ids=["bbox", "segm"])
@pytest.mark.parametrize("seed", range(8))
def test_random_sets(seed, masks, max_dets):
    document, results = random_set(seed, masks=masks)
    kind = "segm" if masks else "bbox"
    result = evaluate_coco(document, results, iou_types=[kind], max_dets=max_dets)
    part = result.segm if masks else result.bbox
    twelve, classes = pycocotools_numbers(document, results, kind, max_dets)
    assert 0.02 < twelve[0] < 0.9  # the set tests something
    np.testing.assert_allclose(part.summary.numbers(), twelve, atol=EXACT, rtol=0)
    per_class = np.stack([part.ap, part.ap50, part.ar], axis=1)
    np.testing.assert_allclose(per_class, classes, atol=EXACT, rtol=0)
    standard, _ = pycocotools_numbers(document, results, kind, 100)
    np.testing.assert_allclose(part.coco.numbers(), standard, atol=EXACT, rtol=0)


@pytest.mark.parametrize("max_dets", [10, 15])
def test_detection_limit_cuts_each_class_of_an_image(max_dets):
    document, results = random_set(3, classes=2, per_image=80)
    result = evaluate_coco(document, results, max_dets=max_dets)
    twelve, _ = pycocotools_numbers(document, results, "bbox", max_dets)
    np.testing.assert_allclose(result.bbox.summary.numbers(), twelve, atol=EXACT, rtol=0)
    unlimited, _ = pycocotools_numbers(document, results, "bbox", 500)
    assert abs(unlimited - twelve).max() > 1e-3


@pytest.mark.parametrize("seed", range(20, 24))
@pytest.mark.parametrize("masks", [False, True], ids=["bbox", "segm"])
def test_sweep_and_curves_equal_those_of_pycocotools(seed, masks):
    document, results = random_set(seed, masks=masks)
    kind = "segm" if masks else "bbox"
    ours = evaluate_coco(document, results, iou_types=[kind])
    theirs = evaluate_with_pycocotools(document, results, iou_type=kind)
    assert ours.to_dict() == theirs.to_dict()
    for name in ("positives", "f1", "precision", "recall"):
        np.testing.assert_array_equal(getattr(ours.sweep, name), getattr(theirs.sweep, name))


@pytest.mark.parametrize(
    ("case", "kind"),
    [("s1_boxes", "bbox"), ("s2_crowd_dense", "bbox"), ("s3_segm", "bbox"), ("s3_segm", "segm")],
)
def test_stored_numbers(parity: Path, case, kind):
    folder = parity / "training" / "metrics" / case
    document, results, expected = (
        json.loads((folder / name).read_text())
        for name in ("ground_truth.coco.json", "results.json", "expected.json")
    )
    result = evaluate_coco(document, results, iou_types=[kind])
    part = getattr(result, kind)
    for summary, limit in ((part.summary, 500), (part.coco, 100)):
        wanted = expected[kind][f"pycocotools_maxdets_1_10_{limit}"]
        names = [*SUMMARY, f"mar_{limit}", "mar_small", "mar_medium", "mar_large"]
        np.testing.assert_allclose(
            summary.numbers(), [wanted[name] for name in names], atol=EXACT, rtol=0
        )
    wanted = expected[kind]["pycocotools_maxdets_1_10_500"]["per_class"]
    for k, label in enumerate(result.class_ids):
        numbers = wanted[str(label)]
        found = (part.ap[k], part.ap50[k], part.ar[k])
        assert found == pytest.approx((numbers["ap"], numbers["ap50"], numbers["ar"]), abs=EXACT)
    check_sweep(result, expected[kind]["f1_from_pycocotools_matches"])


def check_sweep(result, wanted):
    sweep = result.sweep
    assert sweep.best_threshold == pytest.approx(wanted["threshold"], abs=EXACT)
    best = (
        sweep.macro_f1[sweep.best],
        sweep.macro_precision[sweep.best],
        sweep.macro_recall[sweep.best],
    )
    names = ("macro_f1", "macro_precision", "macro_recall")
    assert best == pytest.approx([wanted[name] for name in names], abs=EXACT)
    for k, label in enumerate(result.class_ids):
        numbers = wanted["per_class"][str(label)]
        assert sweep.positives[k] == numbers["total_gt"]
        assert sweep.f1[k, sweep.best] == pytest.approx(numbers["f1"], abs=EXACT)


def test_no_detections_is_zero_and_no_ground_truth_is_undefined():
    document, results = random_set(1)
    nothing = evaluate_coco(document, [])
    assert nothing.bbox.summary.ap == 0.0
    assert nothing.bbox.summary.ar == 0.0
    assert nothing.sweep.macro_f1.max() == 0.0
    bare = evaluate_coco(document | {"annotations": []}, results)
    assert bare.bbox.summary.numbers() == [-1.0] * 12
    assert (bare.bbox.ap == -1).all()
    assert not bare.has_ground_truth
    empty = evaluate_coco({"images": [], "annotations": [], "categories": []}, [])
    assert empty.bbox.summary.ap == -1.0


def test_crowds_alone_are_not_ground_truth():
    document, results = random_set(1)
    for row in document["annotations"]:
        row["iscrowd"] = 1
    assert evaluate_coco(document, results).bbox.summary.numbers() == [-1.0] * 12


def test_results_of_foreign_images_are_refused():
    document, results = random_set(1)
    results[0]["image_id"] = 777
    with pytest.raises(InputError, match="777"):
        evaluate_coco(document, results)


def test_results_without_mask_are_refused_for_mask_metrics():
    document, results = random_set(1, masks=True)
    del results[0]["segmentation"]
    with pytest.raises(InputError, match="segmentation"):
        evaluate_coco(document, results, iou_types=["segm"])


def test_more_than_255_masks_in_one_image_and_class():
    """With crowds, repeated scores, objects without detections and detections without objects."""
    document, results = random_set(5, images=2, classes=2, masks=True)
    random = np.random.default_rng(0)
    (first, *_) = document["categories"]
    template = next(row for row in document["annotations"] if not row["iscrowd"])
    for number in range(300):
        row = random.choice(results)
        results.append(row | {"score": float(random.integers(0, 20) / 20)})
        copied = random.choice(document["annotations"]) | {"id": 1000 + number}
        document["annotations"].append(copied | {"category_id": first["id"]})
    results += [row | {"image_id": template["image_id"]} for row in results]
    result = evaluate_coco(document, results, iou_types=["segm"], max_dets=500)
    twelve, _ = pycocotools_numbers(document, results, "segm", 500)
    assert max(np.bincount([row["image_id"] for row in results])) > 255
    assert 0.02 < twelve[0] < 0.98
    np.testing.assert_allclose(result.segm.summary.numbers(), twelve, atol=EXACT, rtol=0)
