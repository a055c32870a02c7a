"""COCO documents as the tensors that validation steps return."""

from __future__ import annotations

import torch
from pycocotools import mask as mask_api


def as_batch(document, results):
    """One (result, target) pair per image, as a validation step gives them."""
    pairs = []
    for image in document["images"]:
        height, width = image["height"], image["width"]
        own = [row for row in document["annotations"] if row["image_id"] == image["id"]]
        plain = [row for row in own if not row["iscrowd"]]
        crowds = [row for row in own if row["iscrowd"]]
        found = [row for row in results if row["image_id"] == image["id"]]
        result = {
            "scores": torch.tensor([row["score"] for row in found], dtype=torch.float64),
            "labels": torch.tensor([row["category_id"] for row in found], dtype=torch.int64),
            "boxes": corners([row.get("bbox", [0, 0, 1, 1]) for row in found]),
        }
        box = torch.tensor([row["bbox"] for row in plain], dtype=torch.float64).reshape(-1, 4)
        box[:, :2] += box[:, 2:] / 2
        target = {
            "boxes": box / torch.tensor([width, height, width, height]),
            "labels": torch.tensor([row["category_id"] for row in plain], dtype=torch.int64),
            "area": torch.tensor([row["area"] for row in plain], dtype=torch.float64) / 4,
            "iscrowd": torch.zeros(len(plain), dtype=torch.int64),
            "image_id": torch.tensor([image["id"]]),
            "orig_size": torch.tensor([height, width]),
            "size": torch.tensor([height // 2, width // 2]),
        }
        if crowds:
            target["crowd_boxes"] = corners([row["bbox"] for row in crowds])
            target["crowd_labels"] = torch.tensor([row["category_id"] for row in crowds])
        if found and "segmentation" in found[0]:
            result["masks"] = bitmaps(found)[:, None]
        elif any("segmentation" in row for row in own):
            result["masks"] = torch.zeros(0, 1, height, width, dtype=torch.bool)
        if any("segmentation" in row for row in results):
            result.setdefault("masks", torch.zeros(0, 1, height, width, dtype=torch.bool))
            target["masks"] = bitmaps(plain) if plain else torch.zeros(0, height, width).bool()
            target["crowd_masks"] = [row["segmentation"] for row in crowds]
        pairs.append((result, target))
    return pairs


def corners(boxes):
    box = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    box[:, 2:] += box[:, :2]
    return box


def bitmaps(rows):
    decoded = mask_api.decode([row["segmentation"] for row in rows])
    return torch.from_numpy(decoded).permute(2, 0, 1).bool()
