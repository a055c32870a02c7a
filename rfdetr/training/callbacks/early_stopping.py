"""Early stopping on the better of the regular and the averaged metric (specification, 11.4)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_info

from rfdetr.training.callbacks.fresh_metrics import FreshMetrics


class RFDETREarlyStopping(Callback):
    """Ends training after `patience` evaluated epochs in a row without improvement.

    The monitored value is the larger of `monitor` and `monitor_ema`, or `monitor_ema` alone with
    `use_ema` (the regular one where no average is evaluated). An improvement exceeds the best value
    by more than `min_delta`, compared in float32; only an improvement moves the best value. Epochs
    without a metric count for nothing.
    """

    def __init__(
        self,
        patience: int = 10,
        min_delta: float = 0.001,
        use_ema: bool = False,
        monitor: str = "val/mAP_50_95",
        monitor_ema: str = "val/ema_mAP_50_95",
    ) -> None:
        self.patience = patience
        self.min_delta = min_delta
        self.use_ema = use_ema
        self.monitor = monitor
        self.monitor_ema = monitor_ema
        self.best = -np.inf
        self.waited = 0
        self._metrics = FreshMetrics((monitor, monitor_ema))
        self._fits = True

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._fits = trainer.state.fn == TrainerFn.FITTING

    def observe(self, regular: float | None, averaged: float | None) -> bool:
        """Take the values of one evaluation; True when training should end."""
        values = [value for value in (regular, averaged) if value is not None]
        if not values:
            return False
        value = averaged if self.use_ema and averaged is not None else max(values)
        if np.float32(value) - np.float32(self.min_delta) > np.float32(self.best):
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        return self.waited >= self.patience

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.waited >= self.patience:
            trainer.should_stop = True
            rank_zero_info(
                f"Early stopping had ended this run: no gain for {self.waited} evaluations. Raise "
                "early_stopping_patience to go on."
            )

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._metrics.start(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        regular = self._metrics.read(trainer, self.monitor)
        averaged = self._metrics.read(trainer, self.monitor_ema)
        stop = trainer.strategy.reduce_boolean_decision(self.observe(regular, averaged), all=False)
        if stop:
            trainer.should_stop = True
            rank_zero_info(
                f"Early stopping: no gain above {self.min_delta} over {self.best:.4f} for "
                f"{self.waited} evaluations."
            )

    def state_dict(self) -> dict[str, Any]:
        return {"best": float(self.best), "waited": self.waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self._fits:  # a checkpoint that is only evaluated is not the run of a later fit
            return
        self.best = state_dict["best"]
        self.waited = state_dict["waited"]
