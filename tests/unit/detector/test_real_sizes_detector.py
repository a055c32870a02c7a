"""predict, evaluate, checks and export at 300 queries, 80 classes, batches of 64, 1,000 images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from rfdetr.checks import CheckConfig, check_dataset
from rfdetr.data.coco_names import COCO_NAMES
from tests.unit.detector.small import pixels, small

IMAGES, CLASSES, QUERIES, BATCH = 1000, 80, 300, 64


def dataset(root: Path) -> tuple[Path, int]:
    """A Roboflow export whose test split has 1,000 images of random sizes; number of objects."""
    random = np.random.default_rng(0)
    categories = [{"id": i, "name": name} for i, name in enumerate(COCO_NAMES)]
    counts = {"train": 80, "valid": 8, "test": IMAGES}
    total = 0
    for split, count in counts.items():
        (root / split).mkdir(parents=True)
        document: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}
        for number in range(count):
            width, height = random.integers(24, 200, 2).tolist()
            name = f"{split}-{number}.jpg"
            image = pixels(height, width, seed=total)
            Image.fromarray(image).save(root / split / name)
            entry = {"id": number, "file_name": name, "width": width, "height": height}
            document["images"].append(entry)
            for _ in range(int(random.integers(1, 9))):
                box = [width / 4, height / 4, width / 2, height / 2]
                label = number % CLASSES if split == "train" else int(random.integers(CLASSES))
                document["annotations"].append(
                    {"id": total, "image_id": number, "category_id": label, "bbox": box,
                     "area": box[2] * box[3], "iscrowd": 0}
                )  # fmt: skip
                total += 1
        (root / split / "_annotations.coco.json").write_text(json.dumps(document))
    return root, total


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_checks_predict_and_evaluate(tmp_path: Path) -> None:
    root, objects = dataset(tmp_path / "data")
    report = check_dataset(root, CheckConfig())
    numbers = list(report.statistics.values())
    assert sum(split.images for split in numbers) == IMAGES + 88
    assert sum(split.boxes for split in numbers) == objects

    detector = small(num_classes=CLASSES, num_queries=QUERIES, num_select=QUERIES)
    detector.model.class_names = list(COCO_NAMES)
    files = sorted((root / "test").glob("*.jpg"))
    found = detector.predict(files, 0.0, batch_size=BATCH)
    assert [len(one) for one in found] == [QUERIES] * IMAGES
    for file, one in list(zip(files, found, strict=True))[::97]:
        alone = detector.predict(file, 0.0)
        np.testing.assert_allclose(one.confidence, alone.confidence, atol=1e-5)
        with Image.open(file) as image:
            assert one.data["source_shape"][0].tolist() == [image.height, image.width]

    metrics = detector.evaluate(dataset_dir=root, batch_size=BATCH, num_workers=0)
    assert len([name for name in metrics if name.startswith("test/AP/")]) == CLASSES
    assert all(0 <= value <= 1 for value in metrics.values())


@pytest.mark.slow
def test_export(tmp_path: Path) -> None:
    detector = small(num_classes=CLASSES, num_queries=QUERIES, num_select=QUERIES, resolution=192)
    result = detector.export(tmp_path, batch_size=BATCH, dynamic_batch=True)
    assert result.max_difference is not None
    assert result.max_difference < 1e-4
    session = onnxruntime.InferenceSession(str(result), providers=["CPUExecutionProvider"])
    for batch in (1, BATCH):
        images = torch.rand(batch, 3, 192, 192, generator=torch.Generator().manual_seed(batch))
        boxes, logits = session.run(None, {"input": images.numpy()})
        assert boxes.shape == (batch, QUERIES, 4)
        assert logits.shape == (batch, QUERIES, CLASSES + 1)
