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
from rfdetr.checkpoints.record import read_checkpoint
from rfdetr.checkpoints.safe_io import load_file, save_file
from rfdetr.files import write_text_atomic
from rfdetr.training.callbacks.ema import ema_network
from rfdetr.training.callbacks.fresh_metrics import FreshMetrics
from rfdetr.training.lightning_adapter import without_launcher

REGULAR = "checkpoint_best_regular.pth"
EMA = "checkpoint_best_ema.pth"
TOTAL = "checkpoint_best_total.pth"
RECORD = "best_model.json"


@dataclass
class BestScore:
    """The best value so far of the live or of the EMA weights, its epoch and its file.

    The field `averaged` (EMA weights) keeps the name that it has in checkpoints and records.
    """

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


def better_of(live: BestScore, ema: BestScore) -> BestScore | None:
    """The better score, the live one in a tie; None before the first evaluation."""
    if ema.value is not None and (live.value is None or ema.value > live.value):
        return ema
    return live if live.value is not None else None


class BestModelCallback(Checkpoint):
    """Keeps the best live and the best EMA weights, and the better of the two as the result.

    `checkpoint_best_regular.pth` (live) and `checkpoint_best_ema.pth` follow their metric after
    every evaluation of a fit; `checkpoint_best_total.pth` and `best_model.json` follow the better
    one, so an interrupted run has them too. With `run_test` the fit ends with a test of the best
    weights on all ranks; the module then gets its own weights back.
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
        self.live = BestScore(monitor, REGULAR, averaged=False)
        self.ema = BestScore(monitor_ema, EMA, averaged=True)
        self._metrics = FreshMetrics((monitor, monitor_ema))
        self._fits = True
        self._validated = False
        total = self.output_dir / TOTAL
        self.best_model_path = str(total) if total.is_file() else ""  # for ckpt_path="best"

    @property
    def best(self) -> BestScore | None:
        """The best score so far."""
        return better_of(self.live, self.ema)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        """Note whether the state that is loaded next belongs to a fit."""
        self._fits = trainer.state.fn == TrainerFn.FITTING

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Copy best files of a resumed run into the output folder; forget those that are missing.

        A new run in a used folder has no best file before its first evaluation.
        """
        self._validated = False
        if trainer.fast_dev_run or not self.save_weights:
            return
        for score in (self.live, self.ema):
            if score.value is not None and not self._bring_file(trainer, score):
                score.value = score.epoch = None
        if self.best is None:
            self.best_model_path = ""
        trainer.strategy.barrier("best files of the resumed run")

    def _bring_file(self, trainer: Any, score: BestScore) -> bool:
        """Whether the file of `score` is in the output folder, or beside the checkpoint."""
        target = self.output_dir / score.file
        source = Path(trainer.ckpt_path or "").parent / score.file
        found: bool = trainer.strategy.broadcast(target.is_file() or source.is_file())
        if not found:
            warnings.warn(
                f"{score.file} of epoch {score.epoch} is neither in {target.parent} nor beside the "
                "checkpoint: the best model is tracked from this epoch on.",
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
        """Save the weights that have improved."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        self._validated = True
        improved = False
        for score, network in ((self.live, pl_module.model), (self.ema, ema_network(trainer))):
            value = self._metrics.read(trainer, score.metric)
            if network is not None and score.observe(value, trainer.current_epoch):
                self._save(trainer, pl_module, score, network)
                improved = True
        if improved:
            self._save_total(trainer)

    def _writes(self, trainer: Any) -> bool:
        return self.save_weights and trainer.is_global_zero and not trainer.fast_dev_run

    def _save(self, trainer: Any, module: Any, score: BestScore, network: nn.Module) -> None:
        if not self._writes(trainer):
            return
        payload = best_payload(
            network.state_dict(),
            module.model_config,
            module.train_config,
            class_names=module.class_names,
            epoch=trainer.current_epoch,
            metric=score.metric,
            value=score.value,
            averaged=score.averaged,
            weights_epoch=trainer.current_epoch,
            global_step=trainer.global_step,
        )
        save_file(payload, self.output_dir / score.file)

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
            **self.state_dict(),
        }
        write_text_atomic(self.output_dir / RECORD, json.dumps(record, indent=2) + "\n")
        for score in (self.live, self.ema):
            if score.value is None:  # a file of an earlier run in this folder
                (self.output_dir / score.file).unlink(missing_ok=True)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Test the best weights if requested."""
        if trainer.fast_dev_run or not self.save_weights:
            return
        if self.best is None:
            _warn_without_best(self.live.metric, self._validated)
        elif self.run_test and trainer.datamodule is None:
            rank_zero_warn(
                "run_test needs the data module, but this fit was given loaders. Test the best "
                f"weights with trainer.test(module, loader, ckpt_path={self.best_model_path!r})."
            )
        elif self.run_test:
            self._test(trainer, pl_module)

    def _test(self, trainer: Any, pl_module: Any) -> None:
        """Test the best weights before the fit returns, then restore weights and state."""
        trainer.strategy.barrier("best weights are written")
        network: nn.Module = pl_module.model
        kept = {name: value.clone() for name, value in network.state_dict().items()}
        best = read_checkpoint(self.output_dir / TOTAL).weights
        network.load_state_dict(best, strict=False)
        try:
            with without_launcher(trainer):
                trainer.test(pl_module, datamodule=trainer.datamodule)
        finally:
            network.load_state_dict(kept)

    def state_dict(self) -> dict[str, Any]:
        return {"regular": asdict(self.live), "ema": asdict(self.ema)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self._fits:  # a checkpoint that is only evaluated must not affect a later fit
            return
        for score, saved in ((self.live, "regular"), (self.ema, "ema")):
            if state_dict[saved]["metric"] == score.metric:
                score.value, score.epoch = state_dict[saved]["value"], state_dict[saved]["epoch"]


@rank_zero_only
def _warn_without_best(metric: str, validated: bool) -> None:
    cause = (
        f"{metric} was never logged. Check that the validation split has ground truth."
        if validated
        else "no validation ran, because training ended before the first one (max_steps, max_time) "
        "or limit_val_batches is 0."
    )
    warnings.warn(f"No best model was written: {cause}", UserWarning, stacklevel=2)
