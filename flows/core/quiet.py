"""Silences what libraries say and nobody of this pipeline can act on."""

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
    """Tips, seeds, progress bars and advice of Lightning and MLflow; their warnings stay.

    Call it after Lightning is imported: its import sets the levels.
    """
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in ADVICE:
        warnings.filterwarnings("ignore", message=message)
