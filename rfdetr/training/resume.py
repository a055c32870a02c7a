"""Exact resume: what a checkpoint needs beyond Lightning's own state."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_warn

from rfdetr.training import lightning_adapter as adapter
from rfdetr.training.rng import random_state, restore_random_state
from rfdetr.training.schedule import planned_steps
from rfdetr.training.training_log import TrainingLog

KEY = "rfdetr_resume"


class ResumeCallback(Callback):
    """Continues an interrupted fit exactly where its checkpoint was written.

    Lightning restores weights, optimizer, scheduler, callbacks and counters. This callback adds the
    position in the data, the random number generators, the schedule when the length of the run or
    the number of devices has changed, the epoch means, and the history that loggers keep in files.
    `RFDETRModule.configure_callbacks` adds it to every trainer.
    """

    def __init__(self) -> None:
        self._record: dict[str, Any] | None = None  # of the checkpoint that is being resumed

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget an earlier fit; the checkpoint of this one is loaded next."""
        self._record = None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Add this run's record, under KEY."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._add_earlier_sums(trainer)
        earlier = self._record.get("epoch_sums", {}) if self._record is not None else {}
        checkpoint[KEY] = {
            "random": random_state(),
            "samples_per_batch": _samples_per_batch(trainer, pl_module),
            "steps_per_epoch": planned_steps(trainer)[1],
            "epoch_sums": {**earlier, **adapter.epoch_sums(trainer)},
            "training_log": pl_module.training_log.state(),
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the record for the start of training, and adjust the loops' counters."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._record = {**(checkpoint.get(KEY) or {}), "step": checkpoint.get("global_step")}
        _drop_empty_lambda_states(checkpoint)
        loops = (checkpoint.get("loops") or {}).get("fit_loop")
        if loops:
            _end_if_complete(trainer, loops)
            now = _samples_per_batch(trainer, pl_module)
            saved = self._record.get("samples_per_batch") or now
            _rescale_position(loops, saved, now, trainer.accumulate_grad_batches)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell loggers that keep files whether this fit continues them, and from which step."""
        record = self._record
        step = record.get("step") if record and "random" in record else None
        for logger in trainer.loggers:
            begin = getattr(logger, "begin_fit", None)
            if callable(begin):
                begin(resumed=record is not None or trainer.global_step > 0, step=step)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Continue schedule, data order and random numbers where the checkpoint left them."""
        state = (self._record or {}).get("training_log") if trainer.is_global_zero else None
        pl_module.training_log = TrainingLog(state)  # the sums are those of rank 0
        if self._record is not None:
            _restore_global_step(trainer)
            _restore_schedule(trainer, self._record)
            _restore_data(trainer, self._record.get("random"))
        if not adapter.resumed_batches(trainer):
            self._record = None  # otherwise its epoch sums are needed after the first batch

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self._add_earlier_sums(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._record = None

    def _add_earlier_sums(self, trainer: pl.Trainer) -> None:
        """Once the resumed part of an epoch has logged, add the sums of the part before it."""
        if self._record is not None:
            sums = self._record.get("epoch_sums", {})
            if adapter.add_epoch_sums(trainer, sums):
                self._record = None


def prepare_loggers(trainer: pl.Trainer) -> None:
    """Tell loggers with one run per fit, before they open it, whether the fit resumes one."""
    if trainer.state.fn != TrainerFn.FITTING:
        return
    resumed = adapter.selected_checkpoint(trainer) is not None or trainer.global_step > 0
    for logger in trainer.loggers:
        prepare = getattr(logger, "prepare_fit", None)
        if callable(prepare):
            prepare(resumed=resumed)


def _samples_per_batch(trainer: pl.Trainer, module: Any) -> int:
    return int(module.train_config.batch_size * trainer.world_size)


def _drop_empty_lambda_states(checkpoint: dict[str, Any]) -> None:
    """Drop the schedule's empty entry per parameter group: the groups may have changed."""
    for state in checkpoint.get("lr_schedulers") or ():
        if not any(state.get("lr_lambdas") or ()):
            state["lr_lambdas"] = []


def _end_if_complete(trainer: pl.Trainer, loops: dict[str, Any]) -> None:
    done = loops["epoch_progress"]["current"]["processed"]
    requested = trainer.max_epochs
    if requested is None or requested < 0 or done < requested:
        return
    rank_zero_warn(
        f"{trainer.ckpt_path} is already complete: {done} epochs are done, epochs is {requested}. "
        "Increase epochs to continue training."
    )
    trainer.fit_loop.max_epochs = done  # Lightning refuses a checkpoint beyond max_epochs


def _rescale_position(loops: dict[str, Any], saved: int, now: int, window: int) -> None:
    """Convert the batches done in an interrupted epoch to the current batch size and devices.

    `saved` and `now` are samples per batch over all devices; a position is a complete `window`.
    """
    current = loops.get("epoch_loop.batch_progress", {}).get("current")
    epoch = loops["epoch_progress"]["current"]
    if saved == now or not current or epoch["ready"] == epoch["processed"]:
        return
    done = current["processed"] * saved // now // window * window
    open_hooks = current["processed"] - current["completed"]
    current.update(ready=done, started=done, processed=done, completed=done - open_hooks)


def _restore_global_step(trainer: pl.Trainer) -> None:
    """Legacy files record their epoch but not their step."""
    if trainer.current_epoch and not trainer.global_step:
        adapter.set_global_step(trainer, trainer.current_epoch * planned_steps(trainer)[1])


def _restore_schedule(trainer: pl.Trainer, record: dict[str, Any]) -> None:
    """Set the learning rates of the current configuration for the next step.

    With another number of steps per epoch (devices, batch size) the position in epochs is kept, not
    the number of steps.
    """
    now = planned_steps(trainer)[1]
    position = round(trainer.global_step * now / (record.get("steps_per_epoch") or now))
    for config in trainer.lr_scheduler_configs:
        adapter.set_schedule_position(config.scheduler, position)


def _restore_data(trainer: pl.Trainer, state: dict[str, Any] | None) -> None:
    """Restart the loader's iterator at the right epoch and batch, and restore the generators.

    Making the iterator draws random numbers. The saved run made it after its checkpoint at the end
    of an epoch, but before a checkpoint inside one, so the generators are restored on that side.
    """
    fit_loop: Any = trainer.fit_loop
    inside = fit_loop.restarted_mid_epoch
    if state is not None and not inside:
        restore_random_state(state, trainer.global_rank)
    done = adapter.resumed_batches(trainer)
    for loader in adapter.train_loaders(trainer):
        sampler: Any = getattr(loader, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(fit_loop.epoch_progress.current.processed)
        if hasattr(loader, "load_state_dict"):
            loader.load_state_dict({"batches": done})
    adapter.restart_train_iterator(trainer)
    if state is not None and inside:
        restore_random_state(state, trainer.global_rank)
