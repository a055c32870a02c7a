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
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from pytorch_lightning.utilities.exceptions import SIGTERMException

from rfdetr.checkpoints.lightning_io import LegacyCheckpointIO, WriteBeside
from rfdetr.training.beside import Beside
from rfdetr.training.failure import patience
from rfdetr.training.lightning_adapter import repeat_validation
from rfdetr.training.rank_flags import RankFlags, largest

LAST = "last.ckpt"
TERMINATED = 128 + signal.SIGTERM


class CheckpointCallback(Checkpoint):
    """Writes full checkpoints into `output_dir`.

    `last.ckpt` at the end of every `last_epochs`-th epoch and of the fit, and inside long epochs at
    the first optimizer step after `every_minutes` or at every `every_n_steps`-th one; at epoch ends
    only if the latest is `last_minutes` old. `checkpoint_{epoch}.ckpt`, counted from 0, after every
    `interval` epochs. The state is copied and a thread writes it while training continues; the end
    of a fit, also by an error, waits for it. On SIGTERM the current optimizer step ends,
    `last.ckpt` is written and all ranks leave the fit; the main process exits with status 143.
    Several ranks tell each other about once a second, so that some steps may follow the signal.
    """

    def __init__(
        self,
        output_dir: str | Path,
        interval: int = 10,
        every_minutes: float | None = 5.0,
        every_n_steps: int | None = None,
        *,
        last_epochs: int = 1,
        last_minutes: float = 0.0,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.interval = interval
        self.every_minutes = every_minutes
        self.every_n_steps = every_n_steps
        self.last_epochs = last_epochs
        self.last_minutes = last_minutes
        self._beside = Beside("checkpoint")
        self._terminated = False
        self._handler: Any = None
        self._saved_at = 0.0
        self._latest_step = 0
        self._flags, self._validation_flags = RankFlags(), RankFlags()
        self._validated, self._shared = 0, 0.0  # batches of this validation, and those of all ranks

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock and install the signal handler."""
        self._saved_at, self._latest_step = time.monotonic(), trainer.global_step
        self._flags.restart(trainer.global_step)
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
        by_step = self.every_n_steps is not None and step % self.every_n_steps == 0
        due = self._older(self.every_minutes)
        stop, by_time = self._flags.at(trainer, step, self._terminated, due)
        if stop or by_step or by_time:
            self._save(trainer)
        if stop:
            self._leave(trainer)

    def _older(self, minutes: float | None) -> bool:
        """Whether the latest checkpoint is that old."""
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ranks with more batches than others keep to themselves at the end."""
        if self._handler is not None and not trainer.sanity_checking:
            self._validation_flags.restart(0)
            self._shared = -largest(trainer, [-float(sum(trainer.num_val_batches))])[0]
            self._validated = 0

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Save and leave if the run is terminated during validation."""
        if self._handler is None or trainer.sanity_checking:
            return
        self._validated += 1
        if self._validated > self._shared:
            return
        if any(self._validation_flags.at(trainer, self._validated, self._terminated)):
            repeat_validation(trainer)
            self._save(trainer)
            self._leave(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save at the end of the epoch, after its validation."""
        if self._is_smoke_run(trainer):
            return
        epoch = trainer.current_epoch + 1
        kept = f"checkpoint_{trainer.current_epoch}.ckpt" if epoch % self.interval == 0 else None
        stop, due = self._flags.now(trainer, self._terminated, self._older(self.last_minutes))
        steps_done = 0 < trainer.max_steps <= trainer.global_step
        last = self._is_last_epoch(trainer) or trainer.should_stop or steps_done
        if stop or last or kept or (due and epoch % self.last_epochs == 0):
            self._save(trainer, kept)
        if stop and not self._is_last_epoch(trainer):
            self._leave(trainer)

    @staticmethod
    def _is_last_epoch(trainer: pl.Trainer) -> bool:
        limit = trainer.max_epochs
        return limit is not None and 0 <= limit <= trainer.current_epoch + 1

    def _save(self, trainer: pl.Trainer, kept: str | None = None) -> None:
        """Write `last.ckpt` beside the training; `kept` is a second name for the same file."""
        if self._is_smoke_run(trainer):
            return
        self._saved_at = time.monotonic()
        options = None
        if isinstance(trainer.strategy.checkpoint_io, LegacyCheckpointIO):
            options = WriteBeside(self._beside.run, self.output_dir / kept if kept else None)
        path = self.output_dir / LAST
        trainer.save_checkpoint(path, weights_only=False, storage_options=options)
        if options is None and kept:
            trainer.save_checkpoint(self.output_dir / kept, weights_only=False)

    @staticmethod
    def _is_smoke_run(trainer: Any) -> bool:
        return bool(trainer.fast_dev_run) or trainer.state.fn != TrainerFn.FITTING

    def _leave(self, trainer: pl.Trainer) -> None:
        self._beside.finish()
        rank_zero_info(f"Terminated; resume this run from {self.output_dir / LAST}.")
        # ranks launched by Lightning must exit with 0, or it kills the main process at once
        raise SIGTERMException(TERMINATED if trainer.is_global_zero else 0)

    def _restore_handler(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
            self._handler = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait until the latest checkpoint is on disk."""
        self._restore_handler()
        self._beside.finish()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._restore_handler()
        try:
            self._beside.finish(timeout=patience())
        except TimeoutError:
            rank_zero_warn(f"{self.output_dir / LAST} is still being written.")
        except Exception as error:  # noqa: BLE001 - the training's own error comes first
            rank_zero_warn(f"{self.output_dir / LAST} was not written: {error}")
