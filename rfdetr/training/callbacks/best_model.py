"""The best weights of a run as `.pth` files, and a record that says what they are."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_only, rank_zero_warn
from torch import nn

from rfdetr.checkpoints.best_file import best_payload, stripped_payload
from rfdetr.checkpoints.record import read_checkpoint
from rfdetr.checkpoints.safe_io import load_file, save_file, verify_file
from rfdetr.files import write_text_atomic
from rfdetr.training.beside import Beside
from rfdetr.training.callbacks.best_score import BestScore, better_of
from rfdetr.training.callbacks.early_stopping import RFDETREarlyStopping
from rfdetr.training.callbacks.ema import ema_network, only_ema
from rfdetr.training.callbacks.fresh_metrics import FreshMetrics
from rfdetr.training.callbacks.stored_best import free_folder, is_newer, is_older
from rfdetr.training.failure import patience
from rfdetr.training.lightning_adapter import without_launcher

__all__ = ["BestModelCallback", "RFDETREarlyStopping"]  # as in the public package

REGULAR = "checkpoint_best_regular.pth"
EMA = "checkpoint_best_ema.pth"
TOTAL = "checkpoint_best_total.pth"
RECORD = "best_model.json"


class BestModelCallback(Checkpoint):
    """Keeps the best live and the best EMA weights, and the better of the two as the result.

    `checkpoint_best_regular.pth` (live) and `checkpoint_best_ema.pth` follow their metric after
    every evaluation of a fit; `checkpoint_best_total.pth` and `best_model.json` follow the better
    one, so an interrupted run has them too. They are written beside the training. With `run_test`
    the fit ends with a test of the best weights on all ranks; the module then gets its own weights
    back.
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
        self._writer = Beside("best model")
        self._total: BestScore | None = None  # what this run has written as the total file
        self._fits = True
        self._step: int | None = None  # of the checkpoint that is resumed
        self._validated = False
        total = self.output_dir / TOTAL
        self.best_model_path = str(total) if total.is_file() else ""  # for ckpt_path="best"

    @property
    def best(self) -> BestScore | None:
        """The best score so far."""
        return better_of(self.live, self.ema)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        """Note whether the state that is loaded next belongs to a fit, and to which step."""
        self._fits = trainer.state.fn == TrainerFn.FITTING
        self._step = checkpoint.get("global_step")

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the best files of a resumed run, restore them, or forget their scores.

        A new run in a used folder has no best file before its first evaluation. Best files that are
        newer than the checkpoint belong to a part of the run that is abandoned: they move to the
        folder `abandoned_N`. Those that are older were not written before the run was killed.
        """
        self._validated, self._total = False, None
        if trainer.fast_dev_run or not self.save_weights:
            return
        scores = [score for score in (self.live, self.ema) if score.value is not None]
        broadcast = trainer.strategy.broadcast
        newer = [s for s in scores if broadcast(is_newer(s, self.output_dir))]
        if newer:
            self._abandon(trainer, newer)
        absent = [s for s in scores if not broadcast(self._bring_file(trainer, s))]
        for score in absent:
            self._restore_file(trainer, pl_module, score, warn=score not in newer)
        if absent and self.best is not None:
            self._save_beside(trainer, {})
            self._writer.wait()
        if self.best is None:
            self.best_model_path = ""
        trainer.strategy.barrier("best files of the resumed run")

    def _abandon(self, trainer: Any, newer: list[BestScore]) -> None:
        """Move the files of later epochs, and what was chosen from them, to a folder."""
        folder = free_folder(self.output_dir)
        if trainer.is_global_zero:
            folder.mkdir()
            for name in (*(score.file for score in newer), TOTAL, RECORD):
                if (self.output_dir / name).is_file():
                    (self.output_dir / name).rename(folder / name)
        trainer.strategy.barrier("abandoned files")
        rank_zero_warn(
            f"{trainer.ckpt_path} is older than the best models in {self.output_dir}: they belong "
            f"to the part of the run that is abandoned and are now in {folder}."
        )

    def _bring_file(self, trainer: Any, score: BestScore) -> bool:
        """Whether the file of `score` is in the output folder, or was beside the checkpoint."""
        target = self.output_dir / score.file
        if target.is_file() and not is_older(score, self.output_dir):
            return True
        source = Path(trainer.ckpt_path or "").parent
        other_epoch = is_newer(score, source) or is_older(score, source)
        found = (source / score.file).is_file() and not other_epoch
        if found and trainer.is_global_zero:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / score.file, target)
        return found

    def _restore_file(self, trainer: Any, module: Any, score: BestScore, *, warn: bool) -> None:
        """Write the file of `score` if the checkpoint has its weights, else forget the score."""
        network = ema_network(trainer) if score.averaged else module.model
        if network is not None and score.step is not None and score.step == self._step:
            content = self._content(trainer, module, score, network)
            if content:
                save_file(content, self.output_dir / score.file)
                verify_file(self.output_dir / score.file)
            return
        if warn:
            rank_zero_warn(
                f"{score.file} of epoch {score.epoch} is neither in {self.output_dir} nor beside "
                "the checkpoint: the best model is tracked from this epoch on."
            )
        score.forget()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._metrics.start(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Save the weights that have improved."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        self._validated = True
        improved: dict[str, dict[str, Any]] = {}
        live = pl_module.model if only_ema(trainer, pl_module) is None else None
        for score, network in ((self.live, live), (self.ema, ema_network(trainer))):
            value = self._metrics.read(trainer, score.metric)
            if network is not None and score.observe(
                value, trainer.current_epoch, trainer.global_step
            ):
                improved[score.file] = self._content(trainer, pl_module, score, network)
        if improved:
            self._save_beside(trainer, improved)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        """A checkpoint of a later step is not written before the best files it refers to.

        One of the same step contains their weights.
        """
        if trainer.global_step not in (self.live.step, self.ema.step):
            self._writer.wait()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Wait for the best files."""
        self._writer.finish()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Let the best files be written; the training's own error comes first."""
        try:
            self._writer.finish(timeout=patience())
        except TimeoutError:
            rank_zero_warn("The best files of the last evaluation are still being written.")
        except Exception as error:  # noqa: BLE001
            rank_zero_warn(f"The best files of the last evaluation were not written: {error!r}")

    def _writes(self, trainer: Any) -> bool:
        return self.save_weights and trainer.is_global_zero and not trainer.fast_dev_run

    def _content(
        self, trainer: Any, module: Any, score: BestScore, network: nn.Module
    ) -> dict[str, Any]:
        """What the file of `score` contains, with a copy of the weights on the host."""
        if not self._writes(trainer):
            return {}
        weights = network.state_dict()
        return best_payload(
            {name: value.to("cpu", copy=True) for name, value in weights.items()},
            module.model_config,
            module.train_config,
            class_names=module.class_names,
            epoch=score.epoch,
            metric=score.metric,
            value=score.value,
            averaged=score.averaged,
            weights_epoch=score.epoch,
            global_step=score.step,
        )

    def _save_beside(self, trainer: Any, improved: Mapping[str, dict[str, Any]]) -> None:
        """Write and verify the files of improved scores and the better file, beside the training.

        Without improved scores the better file is that of a resumed run.
        """
        best = self.best
        if best is not None and self.save_weights:
            self.best_model_path = str(self.output_dir / TOTAL)
        if not self._writes(trainer):
            return
        contents = {name: content for name, content in improved.items() if content}
        scores = copy.deepcopy((best, self.live, self.ema))
        self._writer.run(self._write, contents, *scores)

    def _write(
        self,
        contents: Mapping[str, dict[str, Any]],
        best: BestScore | None,
        live: BestScore,
        ema: BestScore,
    ) -> None:
        for name, content in contents.items():
            save_file(content, self.output_dir / name)
            verify_file(self.output_dir / name)
        if best is None:
            return
        source, total = self.output_dir / best.file, self.output_dir / TOTAL
        if best.file in contents or self._total != best:
            payload = contents.get(best.file) or load_file(source)
            kind = {"best_total_source": "ema" if best.averaged else "regular"}
            save_file(stripped_payload(payload) | kind, total)
            verify_file(total, copy=source)
            self._total = best
        record = {
            "file": TOTAL,
            "source": best.file,
            "averaged": best.averaged,
            "metric": best.metric,
            "value": best.value,
            "epoch": best.epoch,
            **_state(live, ema),
        }
        write_text_atomic(self.output_dir / RECORD, json.dumps(record, indent=2) + "\n")
        for score in (live, ema):
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
        return _state(self.live, self.ema)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self._fits:  # a checkpoint that is only evaluated must not affect a later fit
            return
        for score, saved in ((self.live, "regular"), (self.ema, "ema")):
            if state_dict[saved]["metric"] == score.metric:
                score.value, score.epoch = state_dict[saved]["value"], state_dict[saved]["epoch"]
                score.step = state_dict[saved].get("step")  # newer than the first files


def _state(live: BestScore, ema: BestScore) -> dict[str, Any]:
    return {"regular": asdict(live), "ema": asdict(ema)}


@rank_zero_only
def _warn_without_best(metric: str, validated: bool) -> None:
    cause = (
        f"{metric} was never logged. Check that the validation split has ground truth."
        if validated
        else "no validation ran, because training ended before the first one (max_steps, max_time) "
        "or limit_val_batches is 0."
    )
    warnings.warn(f"No best model was written: {cause}", UserWarning, stacklevel=2)
