"""Validation and prediction are the same detector: mAP from `predict` equals the logged one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from rfdetr.config import TrainConfig
from rfdetr.detector import RFDETR
from rfdetr.training import RFDETRDataModule, RFDETRModule, build_trainer
from tests.unit.detector.small import pixels, small

SIZES = [(50, 70), (96, 64), (64, 64), (40, 120), (77, 33), (128, 128)]


def _detector() -> RFDETR:
    """Random weights that still tell images and classes apart."""
    torch.manual_seed(3)
    detector = small(num_classes=3, num_queries=16, num_select=30)
    with torch.no_grad():
        network = detector.model.model
        network.class_embed.weight.mul_(8)
        network.bbox_embed.layers[-1].weight.normal_(std=0.3)
        network.refpoint_embed.weight.normal_(std=0.4)
    return detector


def _dataset(folder: Path, detector: RFDETR) -> Path:
    """Noise images whose true boxes are some of the detections, slightly shifted."""
    generator = np.random.default_rng(0)
    for split in ("train", "valid"):
        target = folder / split
        target.mkdir(parents=True)
        images, annotations = [], []
        for number, (height, width) in enumerate(SIZES, start=1):
            image = pixels(height, width, seed=number)
            Image.fromarray(image).save(target / f"{number}.png")
            images.append(
                {"id": number, "file_name": f"{number}.png", "height": height, "width": width}
            )
            found = detector.predict(image, threshold=0.0)
            known = np.flatnonzero(found.class_id < 3)[::2][:8]
            for box, label in zip(found.xyxy[known], found.class_id[known], strict=True):
                moved = box + generator.normal(0, 0.06, 4) * (box[2:] - box[:2]).mean()
                x0, y0, x1, y1 = np.clip(moved, 0, [width, height, width, height]).tolist()
                if x1 - x0 > 1 and y1 - y0 > 1:
                    annotations.append({
                        "id": len(annotations) + 1, "image_id": number, "iscrowd": 0,
                        "category_id": int(label) + 1, "bbox": [x0, y0, x1 - x0, y1 - y0],
                        "area": (x1 - x0) * (y1 - y0),
                    })  # fmt: skip
        categories = [{"id": i, "name": f"class {i}", "supercategory": "none"} for i in (1, 2, 3)]
        document = {"images": images, "annotations": annotations, "categories": categories}
        (target / "_annotations.coco.json").write_text(json.dumps(document))
    return folder


def _map_of_predict(detector: RFDETR, split: Path) -> float:
    truth = COCO(str(split / "_annotations.coco.json"))
    results: list[dict[str, Any]] = []
    for number in truth.getImgIds():
        found = detector.predict(split / f"{number}.png", threshold=0.0)
        for box, score, label in zip(found.xyxy, found.confidence, found.class_id, strict=True):
            x0, y0, x1, y1 = box.astype(float)
            results.append({
                "image_id": number, "category_id": int(label) + 1, "score": float(score),
                "bbox": [x0, y0, x1 - x0, y1 - y0],
            })  # fmt: skip
    evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
    evaluation.params.maxDets = [1, 10, 500]
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    return float(precision[precision > -1].mean())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("optimized", "square"), [(False, True), (True, True), (False, False)])
def test_map_of_predict_equals_validation(optimized: bool, square: bool, tmp_path: Path) -> None:
    detector = _detector()
    detector.model.square = square
    data = _dataset(tmp_path / "data", detector)
    config = TrainConfig(
        dataset_dir=data, output_dir=tmp_path / "out", batch_size=4 if square else 1,
        num_workers=0, tensorboard=False, accelerator="cpu", square_resize_div_64=square,
    )  # fmt: skip
    module = RFDETRModule(detector.model_config, config, network=detector.model.model)
    trainer = build_trainer(config, detector.model_config, enable_model_summary=False)
    datamodule = RFDETRDataModule(detector.model_config, config)
    logged = trainer.validate(module, datamodule, verbose=False)[0]["val/mAP_50_95"]
    detector.model.model.eval()
    if optimized:
        detector.optimize_for_inference()
    assert 0.1 < logged < 0.95
    assert _map_of_predict(detector, data / "valid") == pytest.approx(logged, abs=1e-6)
