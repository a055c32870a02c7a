"""A small real module that gives prepared detections, to test the metrics callback alone."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from rfdetr.data.batch import collate
from tests.unit.evaluation.random_sets import random_set
from tests.unit.evaluation.tensors import as_batch


class ReplaySet(Dataset):
    """Images whose first pixel is their number; `pairs` are (result, target)."""

    def __init__(self, pairs: list[Any], class_names: list[str] | None = None) -> None:
        self.pairs = pairs
        if class_names is not None:
            self.class_names = class_names

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        return torch.full((3, 32, 32), float(index)), self.pairs[index][1]


class ReplayNetwork(nn.Module):
    """Moves every prepared box by its only weight, in pixels."""

    def __init__(self, pairs: list[Any]) -> None:
        super().__init__()
        self.results = [result for result, _ in pairs]
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, samples: Any) -> dict[str, Any]:
        indexes = samples.tensors[:, 0, 0, 0].long().tolist()
        chosen = [self.results[index] for index in indexes]
        boxes = [result["boxes"] + self.shift.detach() for result in chosen]
        return {"detections": [r | {"boxes": b} for r, b in zip(chosen, boxes, strict=True)]}


class ReplayModule(pl.LightningModule):
    """Validates by replay; training moves the boxes of the live network by `speed` a step."""

    def __init__(self, pairs: list[Any], speed: float = 0.0) -> None:
        super().__init__()
        self.model = ReplayNetwork(pairs)
        self.speed = speed
        self.seen_modes: list[tuple[bool, torch.dtype]] = []

    def evaluation_forward(self, network: nn.Module, samples: Any) -> dict[str, Any]:
        probe = torch.ones(1, 1) @ torch.ones(1, 1)  # reveals autocast
        self.seen_modes.append((network.training, probe.dtype))
        return network(samples)

    def detect(self, outputs: dict[str, Any], targets: Any) -> list[dict[str, Tensor]]:
        assert len(outputs["detections"]) == len(targets)
        return outputs["detections"]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return -self.model.shift * self.speed

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        samples, targets = batch
        outputs = self.evaluation_forward(self.model, samples)
        return {"results": self.detect(outputs, targets), "targets": targets}

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        return batch


def make_job(seed: int = 0, **options: Any) -> tuple[dict, list, list[Any]]:
    """A random document, results on it, and both as (result, target) pairs."""
    document, results = random_set(seed, **options)
    return document, results, as_batch(document, results)


def make_loader(pairs: list[Any], batch_size: int = 3, **options: Any) -> DataLoader:
    return DataLoader(ReplaySet(pairs, **options), batch_size=batch_size, collate_fn=collate)


def make_trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    settings = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(callbacks=list(callbacks), **(settings | options))


def numbers(trainer: pl.Trainer) -> dict[str, float]:
    return {key: float(value) for key, value in trainer.callback_metrics.items()}
