"""Speed of the metric engine against pycocotools on a job of the size of COCO val2017.

    python tests/benchmarks/bench_eval.py [--scale 0.1] [--others] [--at-least 20]

Both start from the same parsed documents and build everything that they need themselves; the
twelve numbers must agree. The last line but one is the ratio. A third figure starts from
the tensors that validation steps return. `--others` also times faster-coco-eval.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import time
from typing import Any

import numpy as np
import torch

from rfdetr.evaluation.evaluator import CocoEvaluator, evaluate_coco

IMAGES, BOXES, DETECTIONS, CLASSES = 5000, 36000, 450000, 80
WIDTH, HEIGHT = 640, 480
BATCH = 16


def make_job(scale: float, seed: int = 0) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ground truth and results: skewed classes, few classes per image, 1 % crowd regions."""
    random = np.random.default_rng(seed)
    images, boxes, detections = (int(n * scale) for n in (IMAGES, BOXES, DETECTIONS))
    share = 1 / np.arange(1, CLASSES + 1)
    favourite = random.choice(CLASSES, (images, 3), p=share / share.sum())
    image, label, box = _truth(random, favourite, boxes)
    crowd = random.random(boxes) < 0.012
    found_image = np.repeat(np.arange(images), detections // images)
    found, found_label, score = _detections(random, favourite, (image, label, box), found_image)
    truth = [
        {
            "id": k + 1,
            "image_id": int(image[k]) + 1,
            "category_id": int(label[k]) + 1,
            "bbox": box[k].tolist(),
            "area": float(box[k, 2] * box[k, 3] * 0.7),
            "iscrowd": int(crowd[k]),
        }
        for k in range(boxes)
    ]
    results = [
        {"image_id": i + 1, "category_id": c + 1, "bbox": b, "score": s}
        for i, c, b, s in zip(
            found_image.tolist(), found_label.tolist(), found.tolist(), score.tolist(), strict=True
        )
    ]
    document = {
        "images": [{"id": i + 1, "width": WIDTH, "height": HEIGHT} for i in range(images)],
        "annotations": truth,
        "categories": [{"id": i + 1, "name": f"class {i}"} for i in range(CLASSES)],
    }
    return document, results


def _truth(random, favourite, boxes):
    images = len(favourite)
    count = random.multinomial(boxes, random.dirichlet(np.full(images, 0.8)))
    image = np.repeat(np.arange(images), count)
    label = favourite[image, random.integers(0, 3, boxes)]
    size = np.exp(random.normal(4.2, 0.9, (boxes, 2))).clip(4, 470)
    corner = random.random((boxes, 2)) * ([WIDTH, HEIGHT] - size)
    return image, label, np.c_[corner, size].round(2)


def _detections(random, favourite, truth, image):
    """A third of them near a true box, mostly with its class; boxes as float32 gives them."""
    true_image, true_label, true_box = truth
    n = len(image)
    share = 1 / np.arange(1, CLASSES + 1)
    anything = random.choice(CLASSES, n, p=share / share.sum())
    label = np.where(random.random(n) < 0.6, favourite[image, random.integers(0, 3, n)], anything)
    box = np.c_[
        random.random((n, 2)) * [500, 380], np.exp(random.normal(4.2, 0.9, (n, 2))).clip(4, 470)
    ]
    score = random.beta(1, 8, n)
    start = np.searchsorted(true_image, image)
    count = np.searchsorted(true_image, image, side="right") - start
    near = (count > 0) & (random.random(n) < 0.35)
    own = start[near] + (random.random(near.sum()) * count[near]).astype(int)
    size = true_box[own][:, [2, 3, 2, 3]]
    box[near] = true_box[own] + random.normal(0, 0.08, size.shape) * size
    label[near] = np.where(random.random(len(own)) < 0.9, true_label[own], label[near])
    score[near] = random.beta(2, 3, len(own))
    box[:, 2:] = box[:, 2:].clip(1)
    return box.astype(np.float32).astype(float), label, score.astype(np.float32).astype(float)


def run_library(document, results, coco, evaluator) -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco()
        truth.dataset = document
        truth.createIndex()
        run = evaluator(truth, truth.loadRes(results), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return [float(number) for number in run.stats[:12]]


def make_batches(document, results):
    """The same job as the tensors of validation steps."""
    detections = {image["id"]: [] for image in document["images"]}
    truth = {image["id"]: [] for image in document["images"]}
    for row in results:
        detections[row["image_id"]].append(row)
    for row in document["annotations"]:
        truth[row["image_id"]].append(row)
    scale = torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT], dtype=torch.float64)
    outputs, targets = [], []
    for image, rows in detections.items():
        box = torch.tensor([row["bbox"] for row in rows]).reshape(-1, 4)
        box[:, 2:] += box[:, :2]
        outputs.append(
            {
                "scores": torch.tensor([row["score"] for row in rows]),
                "labels": torch.tensor([row["category_id"] for row in rows]),
                "boxes": box,
            }
        )
        own = torch.tensor([row["bbox"] for row in truth[image]], dtype=torch.float64).reshape(
            -1, 4
        )
        own[:, :2] += own[:, 2:] / 2
        targets.append(
            {
                "boxes": (own / scale).float(),
                "labels": torch.tensor([r["category_id"] for r in truth[image]], dtype=torch.int64),
                "area": torch.tensor([row["area"] for row in truth[image]]),
                "iscrowd": torch.tensor([row["iscrowd"] for row in truth[image]]),
                "image_id": torch.tensor([image]),
                "orig_size": torch.tensor([HEIGHT, WIDTH]),
            }
        )
    return [(outputs[i : i + BATCH], targets[i : i + BATCH]) for i in range(0, len(outputs), BATCH)]


def timed(function, *args) -> tuple[float, Any]:
    start = time.perf_counter()
    value = function(*args)
    return time.perf_counter() - start, value


def evaluate_batches(batches) -> Any:
    evaluator = CocoEvaluator()
    for outputs, targets in batches:
        evaluator.update(outputs, targets)
    return evaluator.compute()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the val2017 job")
    parser.add_argument("--others", action="store_true", help="also time faster-coco-eval")
    parser.add_argument("--at-least", type=float, default=0.0, help="fail below this ratio")
    options = parser.parse_args()
    document, results = make_job(options.scale)
    print(
        f"{len(document['images'])} images, {len(document['annotations'])} boxes, "
        f"{len(results)} detections, {CLASSES} classes, {torch.get_num_threads()} threads"
    )
    evaluate_coco(*make_job(0.01))  # imports are not measured
    ours, result = min(
        (timed(evaluate_coco, document, results) for _ in range(3)), key=lambda t: t[0]
    )
    print(f"rfdetr.evaluation from documents   {ours:8.2f} s")
    seconds, _ = timed(evaluate_batches, make_batches(document, results))
    print(f"rfdetr.evaluation from tensors     {seconds:8.2f} s")
    if options.others:
        from faster_coco_eval import COCO as FasterCOCO
        from faster_coco_eval import COCOeval_faster

        seconds, numbers = timed(run_library, document, results, FasterCOCO, COCOeval_faster)
        print(f"faster-coco-eval                   {seconds:8.2f} s")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    theirs, numbers = timed(run_library, document, results, COCO, COCOeval)
    print(f"pycocotools                        {theirs:8.2f} s")
    difference = np.abs(np.subtract(result.bbox.coco.numbers(), numbers)).max()
    print(f"largest difference of the twelve numbers: {difference:.1e}")
    print(f"ratio pycocotools / rfdetr.evaluation: {theirs / ours:.1f}x")
    return int(difference > 1e-9 or theirs / ours < options.at_least)


if __name__ == "__main__":
    sys.exit(main())
