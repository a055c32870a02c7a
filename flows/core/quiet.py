"""Silences library messages on which a user of the pipeline cannot act."""

from __future__ import annotations

import logging
import os
import warnings

LOGGERS = ("pytorch_lightning", "lightning_fabric", "lightning", "alembic")
ADVICE = (
    "You have overridden `transfer_batch_to_device`",
    ".*smaller than the logging interval",
    "It is recommended to use .self.log.* when logging on epoch level in distributed",
    ".*isinstance\\(treespec, LeafSpec\\)",
    ".*does not have many workers which may be a bottleneck",
    "SOCKS support in urllib3",  # requests' own filter is lost when two threads import
)


def quiet_libraries() -> None:
    """Silence tips, seeds and progress bars of Lightning and MLflow; real warnings stay.

    Call it after the import of Lightning, which sets the levels of its loggers.
    """
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in ADVICE:
        warnings.filterwarnings("ignore", message=message)
