"""Progress as lines of text: the expected duration, then one line per epoch."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint

from rfdetr.progress import EpochProgress, duration

WARM_UP, MEASURED = 3, 12  # batches
SLOW_S = 20.0  # so long is measured if the batches take longer
EVALUATION = 0.5  # time of a validation batch in training batches, until it has been measured


class ProgressLines(Checkpoint):
    """Prints how long the training will take, measured on the first batches, and each epoch.

    On every machine, since rank 0 can be on any of them. It is a Checkpoint so that Lightning calls
    it after the state for last.ckpt is taken.
    """

    def __init__(self, metric: str = "mAP_50_95") -> None:
        self.metrics = (f"val/{metric}", f"val/ema_{metric}")
        self._started, self._first_epoch = 0.0, 0
        self._batches, self._measured, self._measured_from = 0, 0, 0.0

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._started, self._first_epoch = time.monotonic(), trainer.current_epoch
        self._batches = self._measured = 0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        """Measure the batches after the first ones, or after the first one if they are slow."""
        if self._batches < 0:
            return
        self._batches += 1
        now = time.monotonic()
        if self._batches == 1 or (self._batches == WARM_UP and now - self._measured_from < SLOW_S):
            self._measured, self._measured_from = self._batches, now
            return
        count, seconds = self._batches - self._measured, now - self._measured_from
        if count == MEASURED or seconds >= SLOW_S:
            self._batches = -1
            if trainer.local_rank == 0:
                print(self._expected(trainer, seconds / count), flush=True)  # noqa: T201

    def _expected(self, trainer: pl.Trainer, seconds: float) -> str:
        """The duration of all epochs, from the seconds of a training batch."""
        epochs = (trainer.max_epochs or 0) - self._first_epoch
        batches = int(trainer.num_training_batches)
        evaluated = EVALUATION * sum(int(number) for number in trainer.num_val_batches)
        total = epochs * (batches + evaluated) * seconds
        return (
            f"about {duration(total)} for {epochs} epoch{'s' * (epochs != 1)} of {batches} "
            f"batches, at {seconds:.2g} s per batch"
        )

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.local_rank != 0 or trainer.sanity_checking:
            return
        done, total = trainer.current_epoch + 1, trainer.max_epochs or 0
        known = trainer.callback_metrics
        values = [float(known[name]) for name in self.metrics if name in known]
        loss = known.get("train/loss")
        per_epoch = (time.monotonic() - self._started) / max(1, done - self._first_epoch)
        progress = EpochProgress(
            epoch=done,
            of=total,
            loss=None if loss is None else float(loss),
            mAP=max(values) if values else None,
            left_s=round(per_epoch * max(0, total - done)),
        )
        print(progress.line(), flush=True)  # noqa: T201
