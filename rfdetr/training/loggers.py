"""The loggers of a run: CSV always, the others by flag."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

from pytorch_lightning.loggers import Logger

from rfdetr.config import TrainConfig
from rfdetr.errors import MissingDependencyError
from rfdetr.tracking.client import local_store
from rfdetr.tracking.journal import RunSpec
from rfdetr.tracking.mlflow_logger import JournaledMLFlowLogger
from rfdetr.training.csv_logger import HistoryCSVLogger
from rfdetr.training.run_loggers import RunTensorBoardLogger, RunWandbLogger


def build_loggers(train_config: TrainConfig) -> list[Logger]:
    """The loggers that `train_config` requests.

    Raises MissingDependencyError when a requested logger cannot be imported. TensorBoard, which is
    on by default, is skipped with a warning then, unless it was requested explicitly.
    """
    output = train_config.output_dir
    loggers: list[Logger] = [HistoryCSVLogger(output)]
    if train_config.tensorboard:
        requested = "tensorboard" in train_config.model_fields_set
        loggers += _try("tensorboard", requested, lambda: RunTensorBoardLogger(output))
    if train_config.wandb:
        loggers += _try(
            "wandb",
            True,
            lambda: RunWandbLogger(output, name=train_config.run, project=train_config.project),
        )
    if train_config.mlflow:
        loggers += _try("mlflow", True, lambda: _mlflow_logger(train_config))
    return loggers


def _mlflow_logger(train_config: TrainConfig) -> Logger:
    """To the server of MLFLOW_TRACKING_URI, else to a SQLite store in the output folder."""
    folder = Path(train_config.output_dir) / "mlflow"
    uri = os.environ.get("MLFLOW_TRACKING_URI") or local_store(folder)
    spec = RunSpec(experiment=train_config.project or "rfdetr", name=train_config.run)
    advice = f'the next training there sends them, or rfdetr.tracking.sender.sync("{folder}", uri).'
    return JournaledMLFlowLogger(folder, spec, uri, run_per_fit=True, advice=advice)


def _try(package: str, requested: bool, make: Callable[[], Logger]) -> list[Logger]:
    try:
        return [make()]
    except (ImportError, AttributeError) as error:
        text = f"The {package} logger is unavailable ({error}). Install it: pip install {package}"
        if requested:
            raise MissingDependencyError(f"{text}, or set {package}=False.") from error
        warnings.warn(f"{text}. Training continues without it.", UserWarning, stacklevel=3)
        return []
