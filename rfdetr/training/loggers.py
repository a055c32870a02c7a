"""The loggers of a run: CSV always, the others by flag."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger

from rfdetr.config import TrainConfig
from rfdetr.errors import MissingDependencyError
from rfdetr.training.history import HistoryCSVLogger


def build_loggers(train_config: TrainConfig) -> list[Logger]:
    """The loggers that `train_config` requests.

    Raises MissingDependencyError when a requested logger cannot be imported. TensorBoard, which is
    on by default, is skipped with a warning then, unless it was requested explicitly.
    """
    output = train_config.output_dir
    loggers: list[Logger] = [HistoryCSVLogger(output)]
    if train_config.tensorboard:
        requested = "tensorboard" in train_config.model_fields_set
        loggers += _try("tensorboard", requested, lambda: TensorBoardLogger(output, "", ""))
    if train_config.wandb:
        loggers += _try(
            "wandb",
            True,
            lambda: WandbLogger(
                name=train_config.run, project=train_config.project, save_dir=output
            ),
        )
    if train_config.mlflow:
        from rfdetr.training.mlflow_logger import JournaledMLFlowLogger

        loggers += _try(
            "mlflow",
            True,
            lambda: JournaledMLFlowLogger(
                output, train_config.project or "rfdetr", train_config.run
            ),
        )
    return loggers


def _try(package: str, requested: bool, make: Callable[[], Logger]) -> list[Logger]:
    try:
        return [make()]
    except (ImportError, AttributeError) as error:
        text = f"The {package} logger is unavailable ({error}). Install it: pip install {package}"
        if requested:
            raise MissingDependencyError(f"{text}, or set {package}=False.") from error
        warnings.warn(f"{text}. Training continues without it.", UserWarning, stacklevel=3)
        return []
