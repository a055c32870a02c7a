"""Numbers of real runs: 300 queries, 80 classes, batches of 64, 1,000 images of random sizes."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_api
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from rfdetr.config import RFDETRSegNanoConfig, SegmentationTrainConfig
from rfdetr.data.batch import NestedTensor
from rfdetr.training import COCOEvalCallback, RFDETRModule, build_trainer

IMAGES, CLASSES, QUERIES, BATCH = 1000, 80, 300, 64
FOUND = 60  # classes whose objects are detected; the others are missed
GRID = 12  # of the mask logits
LARGE = 4  # images of 300 x 400 pixels: their masks have more than 65,535


class Scene:
    """Image `number` with its objects, and what the network predicts for it."""

    def __init__(self, number: int) -> None:
        random = np.random.default_rng(number)
        small = random.integers(16, 90, 2).tolist()
        self.height, self.width = (300, 400) if number < LARGE else small
        count = int(random.integers(0, 15))
        self.labels = torch.from_numpy(random.integers(0, CLASSES, count))
        side = torch.from_numpy(random.uniform(0.2, 0.5, (QUERIES, 2)))
        corner = torch.from_numpy(random.uniform(0, 0.5, (QUERIES, 2)))
        self.boxes = torch.cat([corner + side / 2, side], dim=1).float()
        steps = (torch.arange(GRID) + 0.5) / GRID
        x, y, w, h = self.boxes.T[:, :, None]
        across, down = w / 2 - (steps - x).abs(), h / 2 - (steps - y).abs()
        self.masks = torch.minimum(across[:, None, :], down[:, :, None])
        classes = torch.from_numpy(random.integers(0, FOUND, QUERIES))
        classes[:count] = self.labels
        score = torch.from_numpy(random.uniform(-9, -5, QUERIES)).float()
        score[:count] = torch.where(self.labels < FOUND, 3.0, -30.0)
        self.logits = torch.full((QUERIES, CLASSES + 1), -40.0)
        self.logits[torch.arange(QUERIES), classes] = score

    def target(self, number: int) -> dict[str, Any]:
        count = len(self.labels)
        size = (self.height, self.width)
        masks = F.interpolate(self.masks[None], size, mode="bilinear")[0, :count] > 0
        return {
            "image_id": torch.tensor([number]),
            "orig_size": torch.tensor(size),
            "size": torch.tensor(size),
            "boxes": self.boxes[:count],
            "labels": self.labels,
            "mask_codes": [
                mask_api.encode(np.asfortranarray(mask.numpy().astype(np.uint8))) for mask in masks
            ],
        }


@lru_cache(maxsize=2 * BATCH)
def scene(number: int) -> Scene:
    """The data loader and the network ask for the same scenes."""
    return Scene(number)


class Scenes(Dataset[Any]):
    class_names = tuple(f"class {label}" for label in range(CLASSES))

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, number: int) -> tuple[Tensor, dict[str, Any]]:
        return torch.full((3, 8, 8), float(number)), scene(number).target(number)


class GivenDetections(nn.Module):
    """In place of the network: the predictions of the scenes whose number the pixels hold."""

    def forward(self, samples: NestedTensor) -> dict[str, Tensor]:
        scenes = [scene(int(image[0, 0, 0])) for image in samples.tensors]
        return {
            "pred_logits": torch.stack([scene.logits for scene in scenes]),
            "pred_boxes": torch.stack([scene.boxes for scene in scenes]),
            "pred_masks": torch.stack([scene.masks for scene in scenes]),
        }


def collate(items: list[Any]) -> tuple[NestedTensor, list[Any]]:
    images, targets = zip(*items, strict=True)
    return NestedTensor(torch.stack(images), None), list(targets)


def test_boxes_and_masks_through_the_test_loop(tmp_path: Path) -> None:
    model = RFDETRSegNanoConfig(pretrain_weights=None, num_classes=CLASSES, num_queries=QUERIES)
    config = SegmentationTrainConfig(
        dataset_dir=tmp_path,
        output_dir=tmp_path / "out",
        accelerator="cpu",
        compute_test_loss=False,
        tensorboard=False,
        progress_bar=None,
    )
    given: Any = GivenDetections()
    module = RFDETRModule(model, config, network=given)
    trainer = build_trainer(config, model, enable_model_summary=False)
    trainer.test(module, DataLoader(Scenes(), batch_size=BATCH, collate_fn=collate))

    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    share = FOUND / CLASSES
    for name in ("mAP_50_95", "mAP_50", "mAP_75", "mAR", "segm_mAP_50_95", "segm_mAP_50", "recall"):
        assert metrics[f"test/{name}"] == pytest.approx(share, abs=1e-9), name
    assert metrics["test/coco_segm_mAP_50_95"] == pytest.approx(share, abs=1e-9)
    assert metrics["test/AP/class 0"] == 1
    assert metrics["test/AP/class 79"] == 0
    (evaluation,) = (c for c in trainer.callbacks if isinstance(c, COCOEvalCallback))
    (result,) = evaluation.results
    scenes = [Scene(number) for number in range(IMAGES)]
    assert result.images == IMAGES
    labels = torch.cat([scene.labels for scene in scenes])
    assert result.sweep.positives.tolist() == torch.bincount(labels, minlength=CLASSES).tolist()
    found = result.confusion.diagonal()[:CLASSES]
    assert found.sum() >= int((labels < FOUND).sum()) * 0.99  # boxes of one class can coincide
    assert (tmp_path / "out" / "plots" / "test" / "samples.png").is_file()
