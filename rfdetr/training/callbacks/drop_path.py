"""Stochastic depth (drop path) over the course of training; Huang et al. 2016."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from rfdetr.training.schedule import planned_steps

Mode = Literal["standard", "early", "late"]
Schedule = Literal["constant", "linear"]


def drop_path_schedule(
    rate: float,
    epochs: int,
    steps_per_epoch: int,
    *,
    cutoff_epoch: int = 0,
    mode: Mode = "standard",
    schedule: Schedule = "constant",
) -> np.ndarray:
    """Drop rate at every optimizer step, (epochs * steps_per_epoch,).

    `standard` covers the complete run, `early` ends at `cutoff_epoch`, `late` starts there.
    `linear` falls to zero over the active part; with `late` it grows from zero.
    """
    total = epochs * steps_per_epoch
    cutoff = min(cutoff_epoch * steps_per_epoch, total)
    first, last = {"standard": (0, total), "early": (0, cutoff), "late": (cutoff, total)}[mode]
    ends = (
        (rate, rate) if schedule == "constant" else (0.0, rate) if mode == "late" else (rate, 0.0)
    )
    values = np.zeros(total)
    values[first:last] = np.linspace(*ends, last - first)
    return values


def layer_rates(value: float, layers: int) -> list[float]:
    """Rates of the encoder blocks: none in the first, `value` in the last."""
    rates: list[float] = np.linspace(0.0, value, layers).tolist()
    return rates


class DropPathCallback(Callback):
    """Sets the drop-path rates of the encoder blocks at the start of every training batch.

    The rate is constant by default; `mode`, `schedule` and `cutoff_epoch` anneal it.
    """

    def __init__(
        self,
        rate: float,
        mode: Mode = "standard",
        schedule: Schedule = "constant",
        cutoff_epoch: int = 0,
    ) -> None:
        self.rate = rate
        self.mode: Mode = mode
        self.schedule: Schedule = schedule
        self.cutoff_epoch = cutoff_epoch
        self.values = np.zeros(0)
        self._current: float | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compute the rate of every optimizer step of this fit."""
        total, per_epoch = planned_steps(trainer)
        self.values = drop_path_schedule(
            self.rate,
            -(-total // per_epoch),
            per_epoch,
            cutoff_epoch=self.cutoff_epoch,
            mode=self.mode,
            schedule=self.schedule,
        )
        self._current = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        value = float(self.values[min(trainer.global_step, len(self.values) - 1)])
        if value != self._current:
            layers = pl_module.model_config.encoder_size[1]
            pl_module.model.set_drop_path(layer_rates(value, layers))
            self._current = value
