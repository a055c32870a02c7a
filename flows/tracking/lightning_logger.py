"""The journal as a Lightning logger: a training step never waits for a tracking server."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from flows.tracking.journal import Journal, RunSpec
from flows.tracking.run import TrackedRun


class JournalLogger(Logger):
    """A Lightning logger that writes to a journal and returns; rank 0 sends in the background."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        spec: RunSpec | None = None,
        *,
        uri: str | None = None,
        system_metrics_every: float | None = None,
    ) -> None:
        super().__init__()
        self._arguments = (folder, spec)
        self._options = {"uri": uri, "system_metrics_every": system_metrics_every}
        self._folder = Path(folder)
        self._run: TrackedRun | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> Journal:
        """The journal: `log_artifact`, `log_text`, `set_tags`, `log_dataset`. Rank 0 only."""
        return self._tracked().journal

    def _tracked(self) -> TrackedRun:
        if self._run is None:
            self._run = TrackedRun(*self._arguments, **self._options)  # type: ignore[arg-type]
            self._run.begin()
        return self._run

    @property
    def name(self) -> str:
        """The run's name."""
        spec = self._arguments[1]
        return spec.name if spec else self._folder.name

    @property
    def version(self) -> str | None:
        """The MLflow run id, None until a server was reached."""
        return self._run.run_id if self._run else None

    @property
    def save_dir(self) -> str:
        """The folder of the journal."""
        return str(self._folder)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append numbers; returns at once."""
        self._tracked().journal.log_metrics(metrics, step)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """Append parameters, each once."""
        self._tracked().journal.log_params(
            vars(params) if isinstance(params, Namespace) else params
        )

    @rank_zero_only
    def log_image(self, key: str, images: Sequence[Any], **_: Any) -> None:
        """Queue picture files as artifacts under `plots/<folder of the key>`."""
        for image in images:
            self._tracked().journal.log_artifact(
                image, f"plots/{key.rpartition('/')[0]}".rstrip("/")
            )

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the run; waits at most ten seconds for the server."""
        if self._run is None:
            return
        self._run.close("FINISHED" if status == "success" else "FAILED")
        self._run = None  # validate and test after fit begin it again
