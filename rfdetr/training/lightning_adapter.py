"""Every private name of Lightning and torch that this package uses, one function each.

Read from pytorch_lightning 2.6.6 and torch 2.14.1. The pins in pyproject.toml keep to these minor
releases; check this module, and nothing else, before a pin moves. The loops' progress counters are
public by name but undocumented, so they are handled here too.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.trainer.call import _call_and_handle_interrupt
from pytorch_lightning.trainer.connectors.checkpoint_connector import _CheckpointConnector
from torch import Tensor

FindCheckpoint = Callable[[pl.Trainer, str], str | None]
Waits = Callable[[pl.Trainer, str | None], bool]


def attached_trainer(module: pl.LightningModule) -> pl.Trainer | None:
    """The trainer of `module`, or None; its public property raises outside of a trainer.

    LightningModule._trainer, core/module.py.
    """
    return module._trainer


def find_checkpoints_with(trainer: pl.Trainer, find: FindCheckpoint) -> None:
    """Resolve `ckpt_path` "last" and "best" with `find` first; Lightning knows ModelCheckpoint.

    Trainer._checkpoint_connector, trainer/connectors/checkpoint_connector.py.
    """
    trainer._checkpoint_connector = _CheckpointFinder(trainer, find)


def finds_checkpoints(trainer: pl.Trainer) -> bool:
    """Whether `find_checkpoints_with` was applied, as `build_trainer` does."""
    return isinstance(trainer._checkpoint_connector, _CheckpointFinder)


def selected_checkpoint(trainer: pl.Trainer) -> Any:
    """The resolved `ckpt_path` of the running entry point, also before it is loaded, or None.

    Only for trainers of `find_checkpoints_with`.
    """
    return getattr(trainer._checkpoint_connector, "selected", None)


class _CheckpointFinder(_CheckpointConnector):
    """_CheckpointConnector._parse_ckpt_path and ._select_ckpt_path.

    trainer/connectors/checkpoint_connector.py
    """

    def __init__(self, trainer: pl.Trainer, find: FindCheckpoint) -> None:
        super().__init__(trainer)
        self._find = find
        self.selected: Any = None

    def _select_ckpt_path(self, *args: Any, **kwargs: Any) -> Any:
        self.selected = super()._select_ckpt_path(*args, **kwargs)
        return self.selected

    def _parse_ckpt_path(self, state_fn: Any, ckpt_path: Any, *args: Any, **kwargs: Any) -> Any:
        if ckpt_path in ("last", "best"):
            ckpt_path = self._find(self.trainer, ckpt_path) or ckpt_path
        return super()._parse_ckpt_path(state_fn, ckpt_path, *args, **kwargs)


def let_monitors_wait(callbacks: Iterable[Callback], waits: Waits) -> None:
    """Let Lightning's ModelCheckpoint and EarlyStopping do nothing while `waits` for their metric.

    ModelCheckpoint._should_skip_saving_checkpoint, callbacks/model_checkpoint.py;
    EarlyStopping._should_skip_check, callbacks/early_stopping.py.
    """
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint):
            callback._should_skip_saving_checkpoint = _SkipTest(  # type: ignore[method-assign]
                callback, "_should_skip_saving_checkpoint", waits
            )
        elif isinstance(callback, EarlyStopping):
            callback._should_skip_check = _SkipTest(  # type: ignore[method-assign]
                callback, "_should_skip_check", waits
            )


class _SkipTest:
    """A callback's own method `name`, or `waits` for its metric; a class, so that it pickles."""

    def __init__(self, callback: Any, name: str, waits: Waits) -> None:
        self._callback = callback
        self._name = name
        self._waits = waits

    def __call__(self, trainer: pl.Trainer) -> bool:
        own = getattr(type(self._callback), self._name)
        return bool(own(self._callback, trainer) or self._waits(trainer, self._callback.monitor))


@contextlib.contextmanager
def without_launcher(trainer: pl.Trainer) -> Iterator[None]:
    """Let an entry point such as `trainer.test` run inside a fit, in the processes of the fit.

    Strategy._launcher, strategies/strategy.py. The trainer's state is restored afterwards.
    """
    strategy = trainer.strategy
    state = trainer.state.fn, trainer.state.status, trainer.state.stage
    launcher, strategy._launcher = strategy._launcher, None
    try:
        yield
    finally:
        strategy._launcher = launcher
        trainer.state.fn, trainer.state.status, trainer.state.stage = state


def epoch_sums(trainer: Any) -> dict[str, list[Tensor]]:
    """Sum and count behind every epoch mean of the running training epoch.

    _TrainingEpochLoop._results, loops/training_epoch_loop.py; _ResultMetric,
    trainer/connectors/logger_connector/result.py.
    """
    return {
        key: [metric.value.detach().cpu(), metric.cumulated_batch_size.cpu()]
        for key, metric in trainer.fit_loop.epoch_loop._results.items()
        if metric.meta.on_epoch and metric.meta.is_mean_reduction
    }


def add_epoch_sums(trainer: Any, sums: Mapping[str, list[Tensor]]) -> bool:
    """Add the sums of an earlier part of this epoch, on rank 0; False if they are not logged yet.

    The private names are those of `epoch_sums`.
    """
    results = trainer.fit_loop.epoch_loop._results
    if not sums.keys() <= results.keys():
        return False
    for key, (value, count) in sums.items() if trainer.is_global_zero else ():
        results[key].value += value.to(results[key].value)
        results[key].cumulated_batch_size += count.to(results[key].cumulated_batch_size)
    return True


def set_global_step(trainer: Any, step: int) -> None:
    """Set the number of optimizer steps done.

    _TrainingEpochLoop._batches_that_stepped, loops/training_epoch_loop.py.
    """
    loop = trainer.fit_loop.epoch_loop
    total = loop.automatic_optimization.optim_progress.optimizer.step.total
    total.ready = total.completed = step
    loop._batches_that_stepped = trainer.global_step


def train_loaders(trainer: Any) -> list[Any]:
    """The training loaders as a flat list. _FitLoop._combined_loader, loops/fit_loop.py."""
    combined = trainer.fit_loop._combined_loader
    return list(combined.flattened) if combined is not None else []


def end_loader_workers(trainer: Any) -> None:
    """Kill the workers of the trainer's loaders, whatever they do, without waiting for them.

    torch would wait up to five seconds for each, and for its pinning thread without a limit.
    _FitLoop._combined_loader, _EvaluationLoop._combined_loader, loops/*.py; DataLoader._iterator,
    _MultiProcessingDataLoaderIter._workers and what its _shutdown_workers does,
    torch/utils/data/dataloader.py.
    """
    fit = trainer.fit_loop
    loops = (fit, fit.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop)
    for loop in (*loops, trainer.predict_loop):
        combined = getattr(loop, "_combined_loader", None)
        for loader in combined.flattened if combined is not None else ():
            iterator: Any = getattr(loader, "_iterator", None)
            if hasattr(iterator, "_workers") and not iterator._shutdown:
                _kill_workers(iterator)


def handles_failure(thread: threading.Thread, trainer: pl.Trainer | None) -> bool:
    """Whether `thread` is still inside an entry point of `trainer`.

    _call_and_handle_interrupt, trainer/call.py.
    """
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        if frame.f_code is _call_and_handle_interrupt.__code__:
            return frame.f_locals.get("trainer") is trainer
        frame = frame.f_back
    return False


def _kill_workers(iterator: Any) -> None:
    iterator._shutdown = True  # torch leaves the iterator alone from now on
    torch._C._remove_worker_pids(id(iterator))  # they end as expected
    iterator._worker_pids_set = False
    if hasattr(iterator, "_pin_memory_thread"):
        iterator._pin_memory_thread_done_event.set()
    for worker in iterator._workers:
        worker.kill()
    for queue in (*iterator._index_queues, iterator._worker_result_queue):
        queue.cancel_join_thread()
        queue.close()


def restart_train_iterator(trainer: Any) -> None:
    """Replace the iterator that Lightning made before it restored the epoch.

    _FitLoop._data_fetcher, loops/fit_loop.py.
    """
    if trainer.fit_loop._data_fetcher is not None:
        iter(trainer.fit_loop._data_fetcher)


def resumed_batches(trainer: Any) -> int:
    """Batches of an interrupted epoch that are done; 0 if the epoch was not interrupted.

    Also 0 when only its validation is left. loops/fit_loop.py, loops/training_epoch_loop.py.
    """
    if not trainer.fit_loop.restarted_mid_epoch:
        return 0
    done: int = trainer.fit_loop.epoch_loop.batch_progress.current.processed
    return done if done < trainer.num_training_batches else 0


def repeat_validation(trainer: Any) -> None:
    """Mark the running validation as just started, so that a resumed run repeats it.

    _EvaluationLoop.batch_progress, loops/evaluation_loop.py.
    """
    progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    for part in (progress.total, progress.current):
        part.ready = part.started = 1
        part.processed = part.completed = 0


def set_schedule_position(scheduler: Any, step: int) -> None:
    """Continue a LambdaLR at `step`, with the base rates of its optimizer.

    LRScheduler._last_lr, torch/optim/lr_scheduler.py.
    """
    groups = scheduler.optimizer.param_groups
    scheduler.base_lrs = [group["initial_lr"] for group in groups]
    scheduler.last_epoch = step
    for group, factor in zip(groups, scheduler.lr_lambdas, strict=True):
        group["lr"] = group["initial_lr"] * factor(step)
    scheduler._last_lr = [group["lr"] for group in groups]


def unscales_gradients(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer is fused: Lightning refuses to clip its gradients.

    Optimizer._step_supports_amp_scaling, torch/optim/adam.py.
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


class CsvWriter(ExperimentWriter):
    """Lightning's CSV writer with two of its private steps as overridable methods.

    ExperimentWriter, loggers/csv_logs.py.
    """

    def open_history(self) -> None:
        """Prepare for a file that may exist; Lightning deletes it."""
        raise NotImplementedError

    def rewrite(self, columns: list[str]) -> None:
        """Rewrite the existing file with more columns."""
        raise NotImplementedError

    def _check_log_dir_exists(self) -> None:
        self.open_history()

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self.rewrite(fieldnames)
