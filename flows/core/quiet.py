"""Warnings as one line each; library messages on which a user cannot act are silenced."""

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
    "The image has one colour",  # the warning of its file has been shown
)


_standard = warnings.formatwarning


def readable_warnings() -> None:
    """Show a warning as one line without its place in the code; ignore those of `ADVICE`.

    For processes of their own, whose standard error users read.
    """
    warnings.formatwarning = _one_line
    _ignore_advice()


def _one_line(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    if category is UserWarning:
        return f"warning: {message}\n"
    return _standard(message, category, filename, lineno, line)


def _ignore_advice() -> None:
    for text in ADVICE:
        warnings.filterwarnings("ignore", message=text)


def quiet_libraries() -> None:
    """Silence tips, seeds and progress bars of Lightning and MLflow; real warnings stay.

    Call it after the import of Lightning, which sets the levels of its loggers.
    """
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    _ignore_advice()
