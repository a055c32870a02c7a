"""Batches of tensors in, the numbers of the equivalent documents out."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_api

from rfdetr.errors import InputError
from rfdetr.evaluation.batches import encode_masks
from rfdetr.evaluation.evaluator import CocoEvaluator, evaluate_coco
from tests.unit.evaluation.random_sets import random_set
from tests.unit.evaluation.tensors import as_batch


def collect(pairs, batch=3, **options):
    evaluator = CocoEvaluator(**options)
    for start in range(0, len(pairs), batch):
        part = pairs[start : start + batch]
        evaluator.update([result for result, _ in part], [target for _, target in part])
    return evaluator


def labels_of(document):
    return [category["id"] for category in document["categories"]]


@pytest.mark.parametrize("seed", range(4))
def test_tensors_give_the_numbers_of_the_documents(seed):
    document, results = random_set(seed)
    evaluator = collect(as_batch(document, results))
    expected = evaluate_coco(document, results)
    assert evaluator.compute(labels_of(document)).to_dict() == expected.to_dict()


@pytest.mark.parametrize("seed", range(4))
def test_masks_give_the_numbers_of_the_documents(seed):
    document, results = random_set(seed, masks=True)
    evaluator = collect(as_batch(document, results), iou_types=("bbox", "segm"))
    expected = evaluate_coco(document, results, iou_types=["segm"])
    result = evaluator.compute(labels_of(document))
    assert result.segm.summary == expected.segm.summary
    np.testing.assert_array_equal(result.sweep.f1, expected.sweep.f1)


def test_ranks_and_repeated_images_change_nothing():
    document, results = random_set(5, images=9)
    pairs = as_batch(document, results)
    whole = collect(pairs).compute(labels_of(document))
    # Three ranks: two take turns, images repeat as a sampler pads, one rank has nothing.
    ranks = [collect(pairs[0::2] + pairs[:1]), collect(pairs[1::2] + pairs[:2]), collect([])]
    states = [pickle.loads(pickle.dumps(rank.state())) for rank in ranks]
    for rank in ranks:
        rank.merge(states)
        assert rank.compute(labels_of(document)).to_dict() == whole.to_dict()


def test_masks_of_ranks_and_repeated_images_change_nothing():
    document, results = random_set(5, images=6, masks=True)
    pairs = as_batch(document, results)
    kinds = {"iou_types": ("bbox", "segm")}
    whole = collect(pairs, **kinds).compute()
    first, second, third = (
        collect(pairs[:4], **kinds),
        collect(pairs[3:], **kinds),
        collect([], **kinds),
    )
    first.merge([first.state(), second.state(), third.state()])
    assert first.compute().to_dict() == whole.to_dict()


def test_state_stays_small():
    """A few dozen bytes per detection, and no mask bitmap."""
    document, results = random_set(2, images=20, per_image=100)
    box_bytes = len(pickle.dumps(collect(as_batch(document, results)).state()))
    assert box_bytes < 70 * (len(results) + len(document["annotations"])) + 3000


def test_detections_beyond_the_limit_are_dropped_at_once():
    document, results = random_set(3, classes=1, per_image=400)
    pairs = as_batch(document, results)
    evaluator = collect(pairs, max_dets=50)
    largest = np.bincount(evaluator.state().detections.image).max()
    assert largest == 100  # the COCO-standard numbers need a hundred
    assert max(len(result["scores"]) for result, _ in pairs) > 100
    expected = evaluate_coco(document, results, max_dets=50)
    assert evaluator.compute(labels_of(document)).to_dict() == expected.to_dict()


def test_unnamed_labels_of_the_ground_truth_are_evaluated():
    document, results = random_set(0)
    result = collect(as_batch(document, results)).compute([0])
    assert 0 in result.class_ids
    assert {row["category_id"] for row in document["annotations"]} <= set(result.class_ids.tolist())


def test_half_precision_and_empty_batches():
    evaluator = CocoEvaluator()
    evaluator.update([], [])
    result = {
        "scores": torch.ones(1, dtype=torch.bfloat16),
        "labels": torch.ones(1),
        "boxes": torch.tensor([[0, 0, 64, 64]], dtype=torch.bfloat16),
    }
    target = {
        "boxes": torch.tensor([[0.5, 0.5, 1.0, 1.0]]),
        "labels": torch.tensor([1]),
        "image_id": 7,
        "orig_size": torch.tensor([64, 64]),
    }
    evaluator.update([result], [target])
    assert evaluator.compute().bbox.summary.ap == pytest.approx(1.0)


def test_ground_truth_masks_of_the_resized_image_are_scaled_back():
    mask = torch.zeros(1, 32, 32, dtype=torch.bool)
    mask[0, 8:24, 4:20] = True
    large = mask.repeat_interleave(2, 1).repeat_interleave(3, 2)
    target = {
        "boxes": torch.tensor([[12 / 32, 0.5, 0.5, 0.5]]),
        "labels": torch.tensor([0]),
        "image_id": torch.tensor([1]),
        "orig_size": torch.tensor([64, 96]),
        "size": torch.tensor([32, 32]),
        "masks": mask,
    }
    result = {
        "scores": torch.ones(1),
        "labels": torch.zeros(1),
        "boxes": torch.tensor([[12.0, 16.0, 60.0, 48.0]]),
        "masks": large[:, None],
    }
    evaluator = CocoEvaluator(("bbox", "segm"))
    evaluator.update([result], [target])
    assert evaluator.compute().segm.summary.ap == pytest.approx(1.0)


def test_run_length_codes_are_those_of_pycocotools():
    masks = torch.rand(3, 17, 29) > 0.5
    for code, mask in zip(encode_masks(masks), masks, strict=True):
        assert code == mask_api.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))


@pytest.mark.parametrize("broken", ["image_id", "masks", "count"])
def test_incomplete_batches_are_refused(broken):
    document, results = random_set(1, masks=True)
    (result, target), *_ = as_batch(document, results)
    evaluator = CocoEvaluator(("bbox", "segm"))
    if broken == "count":
        with pytest.raises(InputError, match="one each"):
            evaluator.update([result], [])
        return
    incomplete = {key: value for key, value in target.items() if key != broken}
    with pytest.raises(InputError, match=broken):
        evaluator.update([result], [incomplete])


def one_box(scores):
    """An image of 100 x 100 pixels with one object, and detections exactly on it."""
    count = len(scores)
    result = {
        "scores": torch.tensor(scores),
        "labels": torch.zeros(count, dtype=torch.int64),
        "boxes": torch.tensor([[40.0, 40, 60, 60]]).repeat(count, 1),
        "masks": torch.zeros(count, 1, 100, 100, dtype=torch.bool),
    }
    result["masks"][..., 40:60, 40:60] = True
    target = {
        "image_id": torch.tensor([1]),
        "orig_size": torch.tensor([100, 100]),
        "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]]),
        "labels": torch.tensor([0]),
        "masks": result["masks"][:1, 0].clone() if count else torch.zeros(1, 100, 100),
    }
    return result, target


@pytest.mark.parametrize("kinds", [("bbox",), ("bbox", "segm")])
def test_nan_scores_are_not_detections(kinds):
    nan = float("nan")
    for scores, ap in (([nan], 0.0), ([nan, 0.9, nan], 1.0)):
        evaluator = CocoEvaluator(kinds)
        result, target = one_box(scores)
        evaluator.update([result], [target])
        found = evaluator.compute([0])
        assert found.bbox.summary.ap == pytest.approx(ap)
        assert found.bbox.summary.ar == found.sweep.macro_f1.max() == ap
        assert found.confusion[0].tolist() == [int(ap), int(1 - ap)]


def test_nan_scores_of_a_results_file_are_not_detections():
    document, results = random_set(2)
    extra = [row | {"score": float("nan")} for row in results]
    expected = evaluate_coco(document, results)
    found = evaluate_coco(document, [*extra, *results])
    assert found.to_dict() == expected.to_dict()
