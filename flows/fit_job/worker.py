"""The process of each torchrun rank: trains a job, resuming from its last checkpoint.

Only rank 0 writes. SIGTERM and SIGINT save `last.ckpt` and end with status 143, never with 0.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from flows.config.environment import Environment
from flows.core.errors import FAILED, OK, USAGE, explain
from flows.core.files import read_json, write_json
from flows.core.garbage import exit_quickly
from flows.core.process import die_with_parent
from flows.core.quiet import quiet_libraries
from flows.fit_job.job import ERROR, STOPPED, FitJob, FitResult, newest_checkpoint
from flows.project.project import Project
from flows.tracking.run import fit_logger
from flows.tracking.system_metrics import SystemMetrics
from rfdetr.config import SegmentationTrainConfig, TrainConfig
from rfdetr.errors import DatasetError
from rfdetr.files import write_text_atomic
from rfdetr.training import RFDETRDataModule, RFDETRModule, build_trainer
from rfdetr.training.callbacks.best_model import RECORD
from rfdetr.training.callbacks.progress_lines import ProgressLines

STOPPED_STATUS = 128 + signal.SIGTERM
SYSTEM_METRICS_SECONDS = 30.0


def train(folder: Path, env: Environment) -> FitResult | None:
    """Train the job in `folder`. Returns the result on rank 0; SystemExit(143) if stopped."""
    job = FitJob.read(folder)
    kind = SegmentationTrainConfig if job.model.config().segmentation_head else TrainConfig
    train_config = kind(**job.train, output_dir=str(folder))
    datamodule = RFDETRDataModule(job.model.config(), train_config)
    datamodule.setup("fit")
    names, classes = datamodule.class_names or [], datamodule.num_classes
    model_config = job.model.config(
        num_classes=classes,
        pretrain_weights=job.initial,
        **({"amp": False} if job.precision == "32-true" else {}),
    )
    train_config = train_config.model_copy(update={"class_names": names})
    datamodule.model_config, datamodule.train_config = model_config, train_config
    module = RFDETRModule(model_config, train_config)
    store = Project(env=env).tracking_uri
    logger = fit_logger(folder, job.dataset["name"], job.run_name, env.tracking_uri, store)
    trainer = _trainer(job, train_config, model_config, logger)
    checkpoint, problems = newest_checkpoint(folder)
    for problem in problems:
        warnings.warn(problem, UserWarning, stacklevel=2)
    if trainer.is_global_zero:
        logger.journal.log_params(job.params)
        logger.journal.log_dataset(**job.dataset)
    trainer.fit(module, datamodule, ckpt_path=checkpoint and str(checkpoint), weights_only=True)
    early = train_config.early_stopping and trainer.should_stop
    if trainer.current_epoch < train_config.epochs and not early:
        raise SystemExit(STOPPED_STATUS)  # Lightning returns normally from an interrupted fit
    if not trainer.is_global_zero:
        return None
    if not (folder / RECORD).exists():
        raise DatasetError(
            "No epoch had a validation metric, so no best model was saved: no image of the valid "
            "split has boxes. Add some and start again."
        )
    best = read_json(folder / RECORD)
    return FitResult(
        epochs=trainer.current_epoch,
        stopped_early=trainer.current_epoch < train_config.epochs,
        best_epoch=best["epoch"] + 1,
        best_metric=best["metric"],
        best_value=best["value"],
        averaged=best["averaged"],
        class_names=names,
        num_classes=int(classes or len(names)),
        resolution=model_config.resolution,
        grey_levels=module.model_config.grey_levels,
        mlflow_run_id=logger.run_id,
    )


def _trainer(job: FitJob, train_config: TrainConfig, model_config: Any, logger: Any) -> pl.Trainer:
    given: dict[str, Any] = {
        "accelerator": job.accelerator,
        "devices": job.devices,
        "num_nodes": job.nodes,
        "strategy": "ddp" if job.devices * job.nodes > 1 else "auto",
        "enable_model_summary": False,
    }
    if job.precision != "auto":
        given["precision"] = job.precision
    trainer = build_trainer(train_config, model_config, **given)
    trainer.loggers.append(logger)
    metric = "segm_mAP_50_95" if model_config.segmentation_head else "mAP_50_95"
    extra = [ProgressLines(metric), SystemMetrics(logger, SYSTEM_METRICS_SECONDS)]
    trainer.callbacks.extend(extra)  # type: ignore[attr-defined]
    return trainer


def _stop_on_sigint() -> None:
    """Treat Ctrl-C like SIGTERM, a request to stop: the state is saved first."""
    signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))


def main(arguments: list[str]) -> int:
    """`torchrun ... -m flows.fit_job.worker FOLDER`: status 0 only if the training finished."""
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        print("usage: torchrun ... -m flows.fit_job.worker FOLDER", file=sys.stderr)
        return USAGE
    die_with_parent()
    _stop_on_sigint()
    exit_quickly()
    quiet_libraries()
    folder = Path(arguments[0])
    rank = int(os.environ.get("RANK", "0"))
    try:
        result = train(folder, Environment.read())
    except SystemExit:
        if rank == 0:
            write_text_atomic(folder / STOPPED, "")
        raise
    except Exception as error:  # noqa: BLE001 - the parent reports it
        text = explain(error)
        print(f"rank {rank}: {text}", file=sys.stderr)
        if not (folder / ERROR).exists():  # the first rank that fails knows the cause
            write_json(folder / ERROR, {"rank": rank, "text": text})
        return FAILED
    if result is not None:
        result.write(folder)
    return OK


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
