"""The best weights of a run as `.pth` files, and a record that says what they are."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_only, rank_zero_warn
from torch import nn

from rfdetr.checkpoints.best_file import best_payload, stripped_payload
from rfdetr.checkpoints.safe_io import load_file, save_file
from rfdetr.files import write_text_atomic
from rfdetr.training.callbacks.ema import RFDETREMACallback
from rfdetr.training.callbacks.fresh_metrics import FreshMetrics

REGULAR = "checkpoint_best_regular.pth"
EMA = "checkpoint_best_ema.pth"
TOTAL = "checkpoint_best_total.pth"
RECORD = "best_model.json"


@dataclass
class Track:
    """The best value so far of one kind of weights, and its epoch."""

    metric: str
    file: str
    averaged: bool
    value: float | None = None
    epoch: int | None = None

    def observe(self, value: float | None, epoch: int) -> bool:
        """True when `value` is strictly better than all before; the first one always is."""
        if value is None or (self.value is not None and value <= self.value):
            return False
        self.value, self.epoch = value, epoch
        return True


def choose(regular: Track, averaged: Track) -> Track | None:
    """The better track; a tie is the regular one's; None before any evaluation."""
    if averaged.value is not None and (regular.value is None or averaged.value > regular.value):
        return averaged
    return regular if regular.value is not None else None


class BestModelCallback(Checkpoint):
    """Keeps the best live and the best averaged weights, and the better of the two as the result.

    `checkpoint_best_regular.pth` and `checkpoint_best_ema.pth` follow their metric after every
    evaluation in a fit; `checkpoint_best_total.pth` and `best_model.json` follow the better one,
    so that an interrupted run has them too. With `run_test` the fit ends with a test of the best
    weights, on all ranks; the module then has its own weights again.
    """

    def __init__(
        self,
        output_dir: str | Path,
        monitor: str = "val/mAP_50_95",
        monitor_ema: str = "val/ema_mAP_50_95",
        *,
        run_test: bool = False,
        save_weights: bool = True,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.run_test = run_test
        self.save_weights = save_weights
        self.regular = Track(monitor, REGULAR, averaged=False)
        self.averaged = Track(monitor_ema, EMA, averaged=True)
        self._metrics = FreshMetrics((monitor, monitor_ema))
        self._fits = True
        total = self.output_dir / TOTAL
        self.best_model_path = str(total) if total.is_file() else ""  # for ckpt_path="best"

    @property
    def best(self) -> Track | None:
        """The track that holds the best weights so far."""
        return choose(self.regular, self.averaged)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        self._fits = trainer.state.fn == TrainerFn.FITTING

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Fetch or forget best files of the resumed run that are not in the output folder.

        A new run in a used folder has no best file before its first evaluation.
        """
        if trainer.fast_dev_run or not self.save_weights:
            return
        for track in (self.regular, self.averaged):
            if track.value is not None and not self._bring(trainer, track):
                track.value = track.epoch = None
        if self.best is None:
            self.best_model_path = ""
        trainer.strategy.barrier("best files of the resumed run")

    def _bring(self, trainer: Any, track: Track) -> bool:
        target = self.output_dir / track.file
        source = Path(trainer.ckpt_path or "").parent / track.file
        found: bool = trainer.strategy.broadcast(target.is_file() or source.is_file())
        if not found:
            warnings.warn(
                f"{track.file} of epoch {track.epoch} is neither in {target.parent} nor beside the "
                "checkpoint: the best model is sought from here on.",
                UserWarning,
                stacklevel=2,
            )
        elif trainer.is_global_zero and not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        return found

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._metrics.start(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        averaged_model = _averaged_model(trainer)
        improved = False
        for track, network in ((self.regular, pl_module.model), (self.averaged, averaged_model)):
            value = self._metrics.read(trainer, track.metric)
            if network is not None and track.observe(value, trainer.current_epoch):
                self._save(trainer, pl_module, track, network)
                improved = True
        if improved:
            self._save_total(trainer)

    def _writes(self, trainer: Any) -> bool:
        return self.save_weights and trainer.is_global_zero and not trainer.fast_dev_run

    def _save(self, trainer: Any, module: Any, track: Track, network: nn.Module) -> None:
        if not self._writes(trainer):
            return
        payload = best_payload(
            network.state_dict(),
            module.model_config,
            module.train_config,
            class_names=module.class_names,
            epoch=trainer.current_epoch,
            metric=track.metric,
            value=track.value,
            averaged=track.averaged,
            global_step=trainer.global_step,
        )
        save_file(payload, self.output_dir / track.file)

    def _save_total(self, trainer: Any) -> None:
        """Copy the better file, stripped, and record which one it is."""
        best = self.best
        if best is not None and self.save_weights:
            self.best_model_path = str(self.output_dir / TOTAL)
        if best is None or not self._writes(trainer):
            return
        source = "ema" if best.averaged else "regular"
        payload = stripped_payload(load_file(self.output_dir / best.file))
        save_file(payload | {"best_total_source": source}, self.output_dir / TOTAL)
        record = {
            "file": TOTAL,
            "source": best.file,
            "averaged": best.averaged,
            "metric": best.metric,
            "value": best.value,
            "epoch": best.epoch,
            "regular": asdict(self.regular),
            "ema": asdict(self.averaged),
        }
        write_text_atomic(self.output_dir / RECORD, json.dumps(record, indent=2) + "\n")
        for track in (self.regular, self.averaged):
            if track.value is None:  # a file of a former run in this folder
                (self.output_dir / track.file).unlink(missing_ok=True)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.fast_dev_run or not self.save_weights:
            return
        if self.best is None:
            _warn_without_best(self.regular.metric)
        elif self.run_test and trainer.datamodule is None:
            rank_zero_warn(
                "run_test needs the data module; this fit was given loaders. Test the best "
                f"weights with trainer.test(module, loader, ckpt_path={self.best_model_path!r})."
            )
        elif self.run_test:
            self._test(trainer, pl_module)

    def _test(self, trainer: Any, pl_module: Any) -> None:
        """Test the best weights inside the ending fit, then give weights and state back."""
        from rfdetr.checkpoints.record import read_checkpoint

        trainer.strategy.barrier("best weights are written")
        network: nn.Module = pl_module.model
        kept = {name: value.clone() for name, value in network.state_dict().items()}
        best = read_checkpoint(self.output_dir / TOTAL).weights
        network.load_state_dict(best, strict=False)
        state = trainer.state.fn, trainer.state.status, trainer.state.stage
        strategy = trainer.strategy
        launcher, strategy._launcher = strategy._launcher, None  # the processes are there already
        try:
            trainer.test(pl_module, datamodule=trainer.datamodule)
        finally:
            strategy._launcher = launcher
            trainer.state.fn, trainer.state.status, trainer.state.stage = state
            network.load_state_dict(kept)

    def state_dict(self) -> dict[str, Any]:
        return {"regular": asdict(self.regular), "ema": asdict(self.averaged)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self._fits:  # a checkpoint that is only evaluated is not the run of a later fit
            return
        for track, saved in ((self.regular, "regular"), (self.averaged, "ema")):
            if state_dict[saved]["metric"] == track.metric:
                track.value, track.epoch = state_dict[saved]["value"], state_dict[saved]["epoch"]


@rank_zero_only
def _warn_without_best(metric: str) -> None:
    warnings.warn(
        f"No best model was written: {metric} was never logged. Is there ground truth in the "
        "validation split?",
        UserWarning,
        stacklevel=2,
    )


def _averaged_model(trainer: Any) -> nn.Module | None:
    for callback in trainer.callbacks:
        if isinstance(callback, RFDETREMACallback):
            return callback.averaged_model
    return None
