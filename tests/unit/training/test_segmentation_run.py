"""A segmentation model trained on images that resemble microscopy: many touching cells."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter
from pycocotools import mask as mask_api

from rfdetr import RFDETR
from rfdetr.training import COCOEvalCallback
from tests.unit.training.helpers import Run, tiny_masks, tiny_run, with_masks

SPLITS = {"train": 24, "valid": 12, "test": 12}
QUERIES = 60


def cells(root: Path) -> Path:
    """Images of random sizes with 5 to 40 ellipses of two kinds, and in some a crowd region."""
    for offset, (split, images) in enumerate(SPLITS.items()):
        random = np.random.default_rng(offset)
        document: dict[str, Any] = {"images": [], "annotations": []}
        document["categories"] = [{"id": i + 1, "name": n} for i, n in enumerate(("cell", "core"))]
        (root / split).mkdir(parents=True)
        for number in range(1, images + 1):
            width, height = random.integers(96, 320, 2).tolist()
            noise = random.normal(40, 8, (height, width, 3)).clip(0, 255).astype(np.uint8)
            image = Image.fromarray(noise)
            entry = {"id": number, "file_name": f"{number}.png", "width": width, "height": height}
            document["images"].append(entry)
            for _ in range(random.integers(5, 41)):
                kind = int(random.integers(2))
                polygon = ellipse(random, width, height, kind)
                colour = [(90, 150, 100), (190, 90, 160)][kind]
                ImageDraw.Draw(image).polygon(polygon, fill=colour, outline=(20, 20, 20))
                add(document, number, kind + 1, [polygon], height, width)
            if number % 5 == 0:
                region = np.zeros((height, width), np.uint8, order="F")
                region[: height // 4] = 1
                add(document, number, 1, mask_api.encode(region), height, width)
            image.filter(ImageFilter.GaussianBlur(1)).save(root / split / f"{number}.png")
        (root / split / "_annotations.coco.json").write_text(json.dumps(document))
    return root


def ellipse(random: np.random.Generator, width: int, height: int, kind: int) -> list[float]:
    radius = random.uniform(4, 9, 2) if kind else random.uniform(9, 20, 2)
    centre = random.uniform([0, 0], [width, height])
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    outline = centre + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    limited: list[float] = outline.clip(0, [width - 1, height - 1]).ravel().round(2).tolist()
    return limited


def add(document: Any, image: int, category: int, shape: Any, height: int, width: int) -> None:
    crowd = isinstance(shape, dict)
    code = shape if crowd else mask_api.merge(mask_api.frPyObjects(shape, height, width))
    if not crowd and mask_api.area(code) < 4:
        return
    document["annotations"].append(
        {
            "id": len(document["annotations"]) + 1,
            "image_id": image,
            "category_id": category,
            "bbox": mask_api.toBbox(code).tolist(),
            "area": float(mask_api.area(code)),
            "segmentation": {**shape, "counts": shape["counts"].decode()} if crowd else shape,
            "iscrowd": int(crowd),
        }
    )


@pytest.mark.slow
def test_fit_validate_test_and_predict(tmp_path: Path) -> None:
    data = cells(tmp_path / "cells")
    model = tiny_masks(num_queries=QUERIES, num_select=QUERIES, num_classes=2, resolution=96)
    config = with_masks(tiny_run(data, tmp_path / "out", epochs=8, run_test=True, lr=2e-3))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        run = Run(model, config).fit()
        (first,) = run.trainer.validate(run.module, run.data)

    rows = [line.split(",") for line in (run.output / "metrics.csv").read_text().splitlines()]
    column = rows[0].index("train/loss")
    losses = [float(row[column]) for row in rows[1:] if row[column]]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    assert 0 <= first["val/segm_mAP_50"] <= 1
    assert {"val/ema_segm_mAP_50_95", "test/segm_mAP_50_95"} <= set(rows[0])
    (evaluation,) = (c for c in run.trainer.callbacks if isinstance(c, COCOEvalCallback))
    assert evaluation.results[0].images == SPLITS["valid"]
    assert SPLITS["valid"] * QUERIES > 255  # detections at once
    assert (run.output / "plots" / "test" / "samples.png").is_file()

    detector = RFDETR.from_checkpoint(run.output / "checkpoint_best_total.pth", device="cpu")
    image = Image.open(data / "test" / "1.png")
    found = detector.predict(image, threshold=0.0)
    assert found.mask.shape == (QUERIES, image.height, image.width)
    assert detector.class_names == ["cell", "core"]
