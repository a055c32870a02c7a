"""Random COCO documents with everything that makes matching hard."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as mask_api

Document = dict[str, Any]
Results = list[dict[str, Any]]


def random_set(
    seed: int, *, images: int = 8, classes: int = 4, per_image: int = 14, masks: bool = False
) -> tuple[Document, Results]:
    """A ground-truth document and results on it.

    Boxes lie on a coarse grid, so that IoU values repeat and thresholds are met exactly; scores
    repeat; some images have no boxes or no detections; class ids are sparse; some ground truth is
    crowd, some is a copy of another box.
    """
    random = np.random.default_rng(seed)
    ids = np.sort(random.choice(60, classes, replace=False)) + 1
    side = 48 if masks else 240
    truth: list[dict[str, Any]] = []
    results: Results = []
    for image in range(1, images + 1):
        own = [_box(random, side) for _ in range(random.integers(0, 7))]
        own += [list(box) for box in own[:1]] if random.random() < 0.4 else []
        for box in own:
            row = {
                "id": len(truth) + 1,
                "image_id": image * 3,
                "category_id": int(random.choice(ids[: max(1, classes - 1)])),
                "bbox": box,
                "area": box[2] * box[3] * random.choice([1.0, 0.6]),
                "iscrowd": int(random.random() < 0.2),
            }
            truth.append(row | ({"segmentation": _mask(random, box, side)} if masks else {}))
        in_image = [row for row in truth if row["image_id"] == image * 3]
        for _ in range(random.integers(0, per_image)):
            box, label = _near(random, in_image, side)
            row = {
                "image_id": image * 3,
                "category_id": label or int(random.choice(ids)),
                "score": float(random.choice([random.random(), random.integers(0, 11) / 10])),
            }
            extra = {"segmentation": _mask(random, box, side)} if masks else {"bbox": box}
            results.append(row | extra)
    document = {
        "images": [{"id": i * 3, "height": side, "width": side} for i in range(1, images + 1)],
        "annotations": truth,
        "categories": [{"id": int(i), "name": f"class {i}"} for i in ids],
    }
    return document, results


def _box(random: np.random.Generator, side: int) -> list[float]:
    size = random.choice([4, 8, 20, 40, 120], 2)
    size = np.minimum(size, side - 4)
    corner = random.integers(0, (side - size) // 4 + 1) * 4
    return [float(v) for v in (*corner, *size)]


def _near(random: np.random.Generator, own: Results, side: int) -> tuple[list[float], int]:
    """A box near one of `own`, mostly with its class; anywhere and without class (0) otherwise."""
    if not own or random.random() < 0.3:
        return _box(random, side), 0
    row = own[random.integers(len(own))]
    x, y, w, h = row["bbox"]
    dx, dy, dw, dh = random.integers(-1, 2, 4) * 4 * (random.random() < 0.7)
    box = [float(x + dx), float(y + dy), float(max(2, w + dw)), float(max(2, h + dh))]
    return box, row["category_id"] if random.random() < 0.8 else 0


def _mask(random: np.random.Generator, box: list[float], side: int) -> dict[str, Any]:
    bitmap = np.zeros((side, side), dtype=np.uint8, order="F")
    x, y, w, h = (int(v) for v in box)
    bitmap[max(0, y) : y + h, max(0, x) : x + w] = 1
    bitmap[random.random((side, side)) < 0.05] = 0
    return dict(mask_api.encode(bitmap))
