"""`last.ckpt`, numbered checkpoints, and a checkpoint when the run is terminated."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.exceptions import SIGTERMException

from rfdetr.training.lightning_adapter import repeat_validation

LAST = "last.ckpt"
TERMINATED = 128 + signal.SIGTERM


class CheckpointCallback(Checkpoint):
    """Writes full checkpoints into `output_dir`.

    `last.ckpt` at every epoch end, and inside long epochs at the first optimizer step after
    `every_minutes` or at every `every_n_steps`-th one. `checkpoint_{epoch}.ckpt`, counted from 0,
    after every `interval` epochs. On SIGTERM the current optimizer step ends, `last.ckpt` is
    written and all ranks leave the fit; the main process exits with status 143.
    """

    def __init__(
        self,
        output_dir: str | Path,
        interval: int = 10,
        every_minutes: float | None = 5.0,
        every_n_steps: int | None = None,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.interval = interval
        self.every_minutes = every_minutes
        self.every_n_steps = every_n_steps
        self._terminated = False
        self._handler: Any = None
        self._saved_at = 0.0
        self._latest_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock and install the signal handler."""
        self._saved_at, self._latest_step = time.monotonic(), trainer.global_step
        self._terminated = False
        if threading.current_thread() is threading.main_thread():
            # replaces Lightning's handler, which enters a collective wherever the signal arrives
            self._handler = signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, *_: Any) -> None:
        self._terminated = True

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Save after an optimizer step if it is time to, or if the run is being terminated."""
        step = trainer.global_step
        inside_window, self._latest_step = step == self._latest_step, step
        # a checkpoint after the last step would make the resumed run skip this epoch's validation
        last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if last or inside_window:
            return
        stop = self._any_rank(trainer, self._terminated)
        if stop or self._due(trainer, step):
            self._save(trainer, LAST)
        if stop:
            self._leave(trainer)

    def _due(self, trainer: pl.Trainer, step: int) -> bool:
        if self.every_n_steps is not None and step % self.every_n_steps == 0:
            return True
        elapsed = time.monotonic() - self._saved_at
        by_time = self.every_minutes is not None and elapsed >= 60 * self.every_minutes
        return self._any_rank(trainer, by_time)

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Save and leave if the run is terminated during validation."""
        if self._handler is None or trainer.sanity_checking:
            return
        if self._any_rank(trainer, self._terminated):
            repeat_validation(trainer)
            self._save(trainer, LAST)
            self._leave(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save at the end of the epoch, after its validation."""
        if self._is_smoke_run(trainer):
            return
        self._save(trainer, LAST)
        if (trainer.current_epoch + 1) % self.interval == 0:
            self._save(trainer, f"checkpoint_{trainer.current_epoch}.ckpt")
        if self._any_rank(trainer, self._terminated) and not self._is_last_epoch(trainer):
            self._leave(trainer)

    @staticmethod
    def _is_last_epoch(trainer: pl.Trainer) -> bool:
        limit = trainer.max_epochs
        return limit is not None and 0 <= limit <= trainer.current_epoch + 1

    def _save(self, trainer: pl.Trainer, name: str) -> None:
        if self._is_smoke_run(trainer):
            return
        trainer.save_checkpoint(self.output_dir / name, weights_only=False)
        self._saved_at = time.monotonic()

    @staticmethod
    def _is_smoke_run(trainer: Any) -> bool:
        return bool(trainer.fast_dev_run) or trainer.state.fn != TrainerFn.FITTING

    @staticmethod
    def _any_rank(trainer: pl.Trainer, flag: bool) -> bool:
        return trainer.strategy.reduce_boolean_decision(flag, all=False)

    def _leave(self, trainer: pl.Trainer) -> None:
        rank_zero_info(f"Terminated; resume this run from {self.output_dir / LAST}.")
        # ranks launched by Lightning must exit with 0, or it kills the main process at once
        raise SIGTERMException(TERMINATED if trainer.is_global_zero else 0)

    def _restore_handler(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
            self._handler = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore_handler()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._restore_handler()
