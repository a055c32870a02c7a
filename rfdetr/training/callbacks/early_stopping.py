"""Early stopping on the better of the live and the EMA metric."""

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
    `use_ema` (`monitor` if EMA is disabled). An improvement exceeds the best value by more than
    `min_delta`, compared in float32; only an improvement changes the best value. Epochs without a
    metric are ignored.
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
        """Note whether the state that is loaded next belongs to a fit."""
        self._fits = trainer.state.fn == TrainerFn.FITTING

    def observe(self, live: float | None, ema: float | None) -> bool:
        """Take the values of one evaluation; True when training should end."""
        values = [value for value in (live, ema) if value is not None]
        if not values:
            return False
        value = ema if self.use_ema and ema is not None else max(values)
        if np.float32(value) - np.float32(self.min_delta) > np.float32(self.best):
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        return self.waited >= self.patience

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End a resumed run that had been stopped early already."""
        if self.waited >= self.patience:
            trainer.should_stop = True
            rank_zero_info(
                f"This run was stopped early (no improvement in {self.waited} evaluations). "
                "Increase early_stopping_patience to continue."
            )

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._metrics.start(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        live = self._metrics.read(trainer, self.monitor)
        ema = self._metrics.read(trainer, self.monitor_ema)
        stop = trainer.strategy.reduce_boolean_decision(self.observe(live, ema), all=False)
        if stop:
            trainer.should_stop = True
            rank_zero_info(
                f"Early stopping: no improvement of more than {self.min_delta} over "
                f"{self.best:.4f} in {self.waited} evaluations."
            )

    def state_dict(self) -> dict[str, Any]:
        return {"best": float(self.best), "waited": self.waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self._fits:  # a checkpoint that is only evaluated must not affect a later fit
            return
        self.best = state_dict["best"]
        self.waited = state_dict["waited"]
