"""The MLflow run of a training: a journal of `rfdetr.tracking`, with the pipeline's masking."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from flows.core.redact import redact
from rfdetr.tracking import sender
from rfdetr.tracking.journal import Journal, RunSpec, Status

if TYPE_CHECKING:
    from rfdetr.tracking.mlflow_logger import JournaledMLFlowLogger

ADVICE = "`rfdetr-pipeline sync` sends them."


def fit_logger(
    folder: Path, dataset: str, name: str, uri: str | None, store: str | None = None
) -> JournaledMLFlowLogger:
    """The logger of the training in `folder`: one run, continued by every attempt.

    Records are sent to `uri`; without one they are kept for `store`, the store of the project.
    """
    from rfdetr.tracking.mlflow_logger import JournaledMLFlowLogger  # imports torch

    spec = RunSpec(
        experiment=f"rfdetr/{dataset}",
        name=name,
        tags={"pipeline.stage": "fit", "fit.fingerprint": folder.name},
        store=redact(store) if store else None,
    )
    return JournaledMLFlowLogger(folder, spec, uri, mask=redact, advice=ADVICE)


def close_run(folder: str | os.PathLike[str], status: Status, uri: str | None) -> bool:
    """End the run of a training whose process died; whether everything has arrived."""
    return sender.close_run(folder, status, uri, advice=ADVICE, mask=redact)


def unsent_journals(state_dir: str | os.PathLike[str], store: str | None = None) -> list[Journal]:
    """Journals below `state_dir` with records that MLflow does not have; of one store, or all."""
    return sender.unsent_journals(state_dir, redact, store and redact(store))


def sync(state_dir: str | os.PathLike[str], uri: str) -> dict[Path, str | None]:
    """Send the unsent journals of the store `uri`: their folders -> None, or why not."""
    return sender.sync(state_dir, uri, redact)
