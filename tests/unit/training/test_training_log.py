"""Training losses are logged as means over several steps; the mean of an epoch stays the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from rfdetr.training.training_log import TrainingLog
from tests.unit.training.helpers import Run, tiny_model, tiny_run


class Losses(pl.Callback):
    """Loss and number of images of every batch, and after which batches losses were logged."""

    def __init__(self) -> None:
        self.batches: list[tuple[float, int]] = []
        self.logged: list[int] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append((float(outputs["loss"]), len(batch[1])))
        if not module.training_log.state():
            self.logged.append(batch_idx)


def test_the_mean_of_an_epoch_counts_every_image(shapes: Path, tmp_path: Path) -> None:
    losses = Losses()
    config = tiny_run(shapes, tmp_path, epochs=1, batch_size=1)
    run = Run(tiny_model(), config, log_every_n_steps=3)
    run.trainer.callbacks.append(losses)  # type: ignore[attr-defined]
    run.fit()
    counts = [count for _, count in losses.batches]
    mean = sum(loss * count for loss, count in losses.batches) / sum(counts)
    assert run.metrics()["train/loss"] == pytest.approx(mean, rel=1e-5)
    last = len(counts) - 1
    assert last > 4
    assert losses.logged == sorted({0, last, *range(2, last, 3)})


def test_losses_are_weighted_by_their_images_and_survive_a_checkpoint() -> None:
    log = TrainingLog()
    log.add({"a": torch.tensor(2.0), "b": torch.tensor(5.0)}, 3)
    log = TrainingLog(log.state())
    log.add({"a": torch.tensor(4.0), "b": torch.tensor(1.0)}, 1)
    means, count = log.take()
    assert {name: float(value) for name, value in means.items()} == {"a": 2.5, "b": 4.0}
    assert count == 4
    assert log.state() == {}
