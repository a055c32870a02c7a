"""COCOEvalCallback with the real module, data and trainer."""

from __future__ import annotations

import json

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from rfdetr.data.masks import rasterise
from rfdetr.evaluation.evaluator import CocoEvaluator, evaluate_coco
from rfdetr.training import RFDETRDataModule
from rfdetr.training.callbacks.coco_eval import COCOEvalCallback
from tests.datasets import make_coco
from tests.unit.training.helpers import Run, tiny_model, tiny_run


def results_of(predictions, loader):
    """COCO results of what `trainer.predict` returned for the images of `loader`."""
    images = [int(t["image_id"]) for _, targets in loader for t in targets]
    detections = [found for batch in predictions for found in batch]
    rows = []
    for image, found in zip(images, detections, strict=True):
        boxes = found["boxes"].double()
        boxes[:, 2:] -= boxes[:, :2]
        rows += [
            {"image_id": image, "category_id": int(label), "bbox": box, "score": float(score)}
            for label, box, score in zip(
                found["labels"], boxes.tolist(), found["scores"], strict=True
            )
        ]
    return rows


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = make_coco(tmp_path_factory.mktemp("data"), splits={"train": 12, "val": 7}, crowd=True)
    output = tmp_path_factory.mktemp("output")
    config = tiny_run(root, output, dataset_file="coco", epochs=15, batch_size=4, eval_interval=10)
    run = Run(tiny_model(num_queries=16, num_select=40), config).fit()
    return root, run, run.metrics()


def test_validation_equals_predictions_scored_against_the_file(trained):
    root, run, _ = trained
    run.trainer.validate(run.module, run.data, verbose=False)
    found = run.metrics()
    loader = run.data.val_dataloader()
    predictions = run.trainer.predict(run.module, dataloaders=loader)
    (file,) = root.rglob("*val*.json")
    document = json.loads(file.read_text())
    assert any(row["iscrowd"] for row in document["annotations"])
    result = evaluate_coco(document, results_of(predictions, loader))
    assert found["val/mAP_50_95"] == pytest.approx(result.bbox.summary.ap, abs=1e-6)
    assert found["val/mAR"] == pytest.approx(result.bbox.summary.ar, abs=1e-6)
    assert result.bbox.summary.ar > 0


def test_fit_logs_live_and_ema_values_and_draws(trained):
    _, run, found = trained
    for key in ("mAP_50_95", "mAP_50", "mAP_75", "mAR", "F1", "ema_mAP_50_95", "best_threshold"):
        assert 0 <= found[f"val/{key}"] <= 1
    assert len(list((run.output / "plots/val").glob("*.png"))) == 4


def test_validate_of_a_fresh_module_names_the_classes(trained):
    _, run, _ = trained
    fresh = Run(tiny_model(), run.config)
    fresh.trainer.validate(fresh.module, run.data.val_dataloader(), verbose=False)
    names = set(run.data.class_names)
    logged = {key.removeprefix("val/AP/") for key in fresh.metrics() if "/AP/" in key}
    assert logged
    assert logged <= names


def test_masks_are_scored_in_the_original_size(tmp_path):
    """The metric's truth is that of the file, not the masks resized with the image."""
    root = make_coco(
        tmp_path / "data", splits={"train": 4, "val": 4}, crowd=True, segmentation=True
    )
    config = tiny_run(root, tmp_path / "output", dataset_file="coco")
    data = RFDETRDataModule(tiny_model(segmentation_head=True), config)
    data.setup("validate")
    (file,) = root.rglob("*val*.json")
    document = json.loads(file.read_text())
    evaluator = CocoEvaluator(("segm",))
    for _, targets in data.val_dataloader():
        evaluator.update([perfect(document, target) for target in targets], targets)
    result = evaluator.compute()
    assert result.segm.summary.ap == pytest.approx(1.0)


class Collected(pl.Callback):
    """Keeps the data of the live and the EMA evaluator when an epoch ends."""

    def on_validation_epoch_end(self, trainer, pl_module):
        (callback,) = [c for c in trainer.callbacks if isinstance(c, COCOEvalCallback)]
        self.states = [evaluator.state() for evaluator in callback._evaluators()]


def test_ema_masks_equal_those_of_the_same_live_weights(tmp_path):
    """EMA masks are processed image by image, live ones by batch."""
    root = make_coco(tmp_path / "data", splits={"train": 4, "val": 5}, segmentation=True)
    config = tiny_run(root, tmp_path / "output", dataset_file="coco", batch_size=3, ema_decay=0)
    model = tiny_model(segmentation_head=True, num_queries=16, num_select=40)
    run = Run(model, config)
    run.trainer.callbacks.append(collected := Collected())
    run.fit()
    live, ema = (state.detections for state in collected.states)
    assert len(live) == 5 * 40
    assert ema.image.tolist() == live.image.tolist()
    np.testing.assert_allclose(ema.score, live.score, rtol=1e-6)
    areas = live.with_mask_areas().area
    assert areas.any()
    np.testing.assert_array_equal(ema.with_mask_areas().area, areas)


def perfect(document, target):
    """The file's own masks as detections."""
    rows = [
        row
        for row in document["annotations"]
        if row["image_id"] == int(target["image_id"]) and not row["iscrowd"]
    ]
    height, width = target["orig_size"].tolist()
    masks = [rasterise(row["segmentation"], height, width) for row in rows]
    return {
        "scores": torch.ones(len(rows)),
        "labels": torch.tensor([row["category_id"] for row in rows]),
        "boxes": torch.zeros(len(rows), 4),
        "masks": torch.from_numpy(np.array(masks).reshape(-1, 1, height, width)).bool(),
    }
