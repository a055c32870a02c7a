"""COCO metrics of every validation and test epoch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_only, rank_zero_warn

from rfdetr.evaluation import report
from rfdetr.evaluation.box_table import IouType
from rfdetr.evaluation.evaluator import CocoEvaluator, EvaluationResult
from rfdetr.evaluation.plots import Sample
from rfdetr.training import sample_images
from rfdetr.training.beside import Beside
from rfdetr.training.callbacks.ema import ema_network, only_ema
from rfdetr.training.gathering import share_evaluators
from rfdetr.training.lightning_adapter import let_monitors_wait
from rfdetr.training.pictures import Pictures
from rfdetr.training.stored_settings import names_of_loader


class COCOEvalCallback(Callback):
    """Logs AP, AR, F1 and per-class AP of what `validation_step` and `test_step` return.

    The EMA weights of an `RFDETREMACallback` are evaluated on the same batches, as `val/ema_*`. In
    a fit, epochs with (epoch + 1) % `eval_interval` == 0 and the last one are evaluated; `validate`
    and `test` always are. Lightning's ModelCheckpoint and EarlyStopping wait for these epochs.
    With `eval_base_model=False` only the EMA weights are evaluated, as `val/*` and `val/ema_*`.
    Batches are prepared for the metrics in a thread beside the next batch's forward pass. Rank 0
    computes; values are equal on all ranks and identical to those of a single process; images that
    a sampler repeats count once. Without any ground truth nothing is logged. Beyond the documented
    keys there are `best_threshold`, `ema_mAP_50`, `ema_mAP_75`, `ema_mAR`, `ema_segm_*`, and in
    tests `coco_*` at 100 detections.

    segmentation: evaluate masks too; None follows the module's configuration. output_dir: images
    are drawn in its folder `plots` when a fit reaches its best value so far and after a test; None
    follows the module's configuration, and without one nothing is drawn.
    """

    def __init__(
        self,
        max_dets: int = 500,
        eval_interval: int = 1,
        *,
        log_per_class_metrics: bool = True,
        segmentation: bool | None = None,
        output_dir: str | Path | None = None,
        plots: bool = True,
    ) -> None:
        self.max_dets = max_dets
        self.eval_interval = eval_interval
        self.log_per_class_metrics = log_per_class_metrics
        self.segmentation = segmentation
        self.output_dir = output_dir
        self.plots = plots
        self.best = -math.inf
        self.results: list[EvaluationResult] = []  # of the live weights, then of the EMA weights
        self._beside = Beside("metrics")
        self._live: CocoEvaluator | None = None
        self._ema: CocoEvaluator | None = None
        self._names: report.ClassNames | None = None
        self._samples: list[Sample] = []
        self._pictures = Pictures()
        self._warned: set[str] = set()
        self._logged: set[str] = set()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let Lightning's own callbacks wait for the metrics of epochs that are evaluated."""
        if stage == "fit" and self.eval_interval > 1:
            let_monitors_wait(trainer.callbacks, self.waits_for)  # type: ignore[attr-defined]

    def waits_for(self, trainer: pl.Trainer, metric: str | None) -> bool:
        """Whether `metric` is one of this callback's that the latest validation left out."""
        if metric is None or self.results:
            return False
        missing = metric.startswith("val/") and metric not in trainer.callback_metrics
        return missing or metric in self._logged

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the evaluation if this epoch is to be evaluated."""
        self._live = self._ema = None
        self.results = []
        if not trainer.sanity_checking and self._due(trainer):
            self._start(trainer, pl_module)

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start(trainer, pl_module)

    def _due(self, trainer: pl.Trainer) -> bool:
        if trainer.state.fn != TrainerFn.FITTING:
            return True
        epoch = trainer.current_epoch + 1
        last = epoch == trainer.max_epochs or 0 < trainer.max_steps <= trainer.global_step
        return last or epoch % self.eval_interval == 0

    def _start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        masks = self.segmentation
        if masks is None:
            masks = bool(_setting(pl_module, "model_config", "segmentation_head"))
        types: tuple[IouType, ...] = ("bbox", "segm") if masks else ("bbox",)
        self._live = CocoEvaluator(types, self.max_dets)
        self._ema = None
        if ema_network(trainer) is not None and only_ema(trainer, pl_module) is None:
            self._ema = CocoEvaluator(types, self.max_dets)
        self._samples = []

    def on_validation_batch_end(  # noqa: PLR0917 - the signature of the hook
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect the detections of the live and of the EMA weights."""
        if self._live is None:
            return
        if dataloader_idx > 0:
            self._warn_once("COCO metrics cover the first of the given dataloaders only.")
            return
        results, targets = [outputs["results"]], outputs["targets"]
        if self._ema is not None:
            results.append(_ema_results(trainer, pl_module, batch[0], targets))
        self._beside.run(_update, self._evaluators(), results, targets)
        missing = sample_images.SAMPLES - len(self._samples)
        if missing > 0 and self._plots_folder(trainer, pl_module) is not None:
            self._samples += sample_images.take_samples(batch[0], targets, missing)

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._live is not None:
            self._finish(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish(trainer, pl_module, "test")

    def _evaluators(self) -> list[CocoEvaluator]:
        return [e for e in (self._live, self._ema) if e is not None]

    def _finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._beside.finish()
        self._names = class_names(trainer, pl_module, stage)
        known = report.named_labels(self._names)
        evaluators = self._evaluators()
        if share_evaluators(trainer, evaluators):
            self.results = [evaluator.compute(known) for evaluator in evaluators]
        self.results = trainer.strategy.broadcast(self.results)
        live = self.results[0]
        if not live.has_ground_truth:
            self._warn_once(f"The {stage} images have no ground truth: no metrics are logged.")
            self.results = []
            return
        metrics = report.main_metrics(live) | report.sweep_metrics(live)
        if self.log_per_class_metrics:
            metrics |= report.class_metrics(live, self._names)
        alone = stage == "val" and only_ema(trainer, pl_module) is not None
        for ema in self.results if alone else self.results[1:]:
            values = report.main_metrics(ema)
            metrics |= {f"ema_{name}": value for name, value in values.items()}
        if stage == "test":
            metrics |= report.standard_metrics(live)
            _print_table(live)
        self._logged.update(f"{stage}/{name}" for name in metrics)
        _log(trainer, pl_module, stage, metrics)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw images when this fit has reached its best value so far."""
        if self.results and trainer.state.fn == TrainerFn.FITTING:
            value = max(map(_monitored, self.results))
            if value > self.best:
                self.best = value
                self._draw(trainer, pl_module, "val")
        self._live = self._ema = None

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.results:
            self._draw(trainer, pl_module, "test")
            self._pictures.finish()
        self._live = self._ema = None

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._pictures.finish()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._beside.cancel()
        self._pictures.finish(timeout=0)

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Draw the better of live and EMA weights on rank 0, beside the training."""
        folder = self._plots_folder(trainer, pl_module)
        if folder is None:
            return
        pairs = zip(self.results, self._evaluators(), strict=True)
        result, evaluator = max(pairs, key=lambda pair: _monitored(pair[0]))
        labels = report.class_labels(self._names, result.class_ids.tolist())
        evaluation = result, evaluator.state()
        self._pictures.draw(
            evaluation,
            labels,
            self._samples,
            folder / stage,
            loggers=trainer.loggers,
            step=trainer.global_step,
        )

    def _plots_folder(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Path | None:
        """Where this rank draws; None on other ranks than 0 and in a smoke run."""
        folder = self.output_dir or _setting(pl_module, "train_config", "output_dir")
        smoke = getattr(trainer, "fast_dev_run", False)
        if not self.plots or folder is None or smoke or not trainer.is_global_zero:
            return None
        return Path(folder) / "plots"

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            rank_zero_warn(text, category=UserWarning)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]


def class_names(
    trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str
) -> report.ClassNames | None:
    """Class names of the loader's dataset, else of the data module or of the module."""
    loaders = trainer.val_dataloaders if stage == "val" else trainer.test_dataloaders
    names = names_of_loader(loaders)
    for source in (getattr(trainer, "datamodule", None), pl_module):
        if names is None:
            names = getattr(source, "class_names", None)
    return cast(report.ClassNames | None, names)


def _setting(pl_module: pl.LightningModule, config: str, name: str) -> Any:
    return getattr(getattr(pl_module, config, None), name, None)


def _monitored(result: EvaluationResult) -> float:
    """The value that selects the best epoch: mask AP if masks are evaluated, else box AP."""
    part = result.segm or result.bbox
    return part.summary.ap if part is not None else -1.0


def _update(evaluators: Sequence[CocoEvaluator], results: Sequence[Any], targets: Any) -> None:
    """Add the detections of the live and of the EMA weights; the truth is read once."""
    truth = None
    for evaluator, found in zip(evaluators, results, strict=True):
        truth = evaluator.update(found, targets, truth)


def _ema_results(
    trainer: pl.Trainer, pl_module: Any, samples: Any, targets: Sequence[Mapping[str, Any]]
) -> Any:
    """The EMA network's detections on a batch, in the precision of the live network."""
    network = ema_network(trainer)
    assert network is not None
    with trainer.precision_plugin.forward_context():
        return pl_module.detect(pl_module.evaluation_forward(network, samples), targets)


def _log(
    trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str, metrics: Mapping[str, float]
) -> None:
    dtype = torch.float32 if pl_module.device.type == "mps" else torch.float64
    for name, value in metrics.items():
        number = torch.tensor(value, dtype=dtype, device=pl_module.device)
        pl_module.log(f"{stage}/{name}", number, prog_bar=name == "mAP_50_95", batch_size=1)
    with warnings.catch_warnings():
        # Reading the values here triggers Lightning's advice to reduce them over the ranks, which
        # is dropped: they are equal on all ranks already.
        warnings.filterwarnings("ignore", message="It is recommended to use `self.log")
        _ = trainer.callback_metrics


@rank_zero_only
def _print_table(result: EvaluationResult) -> None:
    from rich.console import Console

    Console().print(report.summary_table(result, "Test"))
