"""The Lightning logger for MLflow: a training step never waits for the tracking server."""

from __future__ import annotations

import importlib.util
import os
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.loggers import Logger, MLFlowLogger
from pytorch_lightning.utilities import rank_zero_only

from rfdetr.errors import ConfigError
from rfdetr.tracking.client import tracking_client
from rfdetr.tracking.journal import STATE, Journal, Mask, RunSpec, Status, read_state
from rfdetr.tracking.sender import Sender, is_local, unsent_journals

FAILURE_S = 3.0
NEW_STORE_S = 40.0  # creating the schema takes half a minute on a busy machine


class LazyClient:
    """An MlflowClient that connects when it is used: Lightning reads `experiment` in every fit."""

    def __init__(self, uri: str | None) -> None:
        self._uri = uri

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if self._uri is None:
            raise ConfigError("This logger has no tracking server; set MLFLOW_TRACKING_URI.")
        return getattr(tracking_client(self._uri), name)


class JournaledMLFlowLogger(MLFlowLogger):
    """Writes records to a journal and returns; a thread sends them to the server `uri`.

    An unreachable or slow server does not slow the training down; the records are kept and sent
    later. A resumed fit continues its MLflow run. With `run_per_fit` each new fit gets its own
    journal `folder/run_N`, and the journals of earlier fits are sent as well; otherwise `folder`
    contains one journal. With `uri` None the records stay in the journal. Only rank 0 writes.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        spec: RunSpec,
        uri: str | None,
        *,
        run_per_fit: bool = False,
        mask: Mask = str,
        advice: str = "the next training in this folder sends them.",
    ) -> None:
        if importlib.util.find_spec("mlflow") is None:
            raise ModuleNotFoundError("No module named 'mlflow'")
        Logger.__init__(self)  # MLFlowLogger's own constructor connects to the server
        self._folder, self._spec, self._uri = Path(folder), spec, uri
        self._mask, self._advice = mask, advice
        self._number = _newest(self._folder) if run_per_fit else None
        self._continued = (self._run_folder / STATE).exists()
        self._started = self._open = False
        self._journal: Journal | None = None
        self._sender: Sender | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_journal": None, "_sender": None}

    @property
    def _run_folder(self) -> Path:
        return self._folder if self._number is None else self._folder / f"run_{self._number}"

    # --- reading: nothing here writes to the journal or reopens a run

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The MlflowClient of the server, connected at its first use; its calls block."""
        return LazyClient(self._uri)

    @property
    def run_id(self) -> str | None:
        """The MLflow run, None until a server was reached."""
        state = read_state(self._run_folder)
        return state.run_id if state else None

    version = run_id

    @property
    def name(self) -> str:
        """The experiment's name."""
        return self._spec.experiment

    @property
    def save_dir(self) -> str:
        """The folder of the journals."""
        return str(self._folder)

    @property
    def failure_seconds(self) -> float:
        """How long a failed run waits for `finalize`.

        A script's run that is not in its local store yet has the time to create the store, so that
        it does not disappear.
        """
        new = self._number is not None and self._uri is not None and self.run_id is None
        return NEW_STORE_S if new and is_local(str(self._uri)) else FAILURE_S

    # --- writing

    @rank_zero_only
    def begin_fit(self, resumed: bool, step: int | None) -> None:
        """Begin the run of a new fit, or continue the newest one. RFDETRModule calls this."""
        if self._number is not None and self._continued and not resumed:
            left = Journal(self._run_folder, mask=self._mask)
            if left.open:
                left.end("KILLED")
            self._number += 1
            self._journal = None
        self._continued = False
        if not self._open:
            self._started = False
        self._writable()

    @property
    def journal(self) -> Journal:
        """The journal of the run, for tags, the dataset and artifacts. Rank 0 only."""
        return self._writable()

    def _writable(self) -> Journal:
        """The journal with a running sender. A finished run stays so until the next fit begins."""
        if self._journal is None:
            self._journal = Journal(self._run_folder, self._spec, self._mask)
        if not self._started:
            self._journal.begin()
        self._started = self._open = True
        if self._sender is None and self._uri is not None:
            earlier = unsent_journals(self._folder, self._mask) if self._number else []
            others = [left for left in earlier if left.folder != self._journal.folder]
            self._sender = Sender([self._journal, *others], self._uri, self._advice)
            self._sender.start()
        return self._journal

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._writable().log_metrics(metrics, step)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        values = vars(params) if isinstance(params, Namespace) else params
        self._writable().log_params(values, separator="/")  # as Lightning's own logger

    @rank_zero_only
    def log_image(self, key: str, images: Sequence[Any], step: int | None = None) -> None:
        """Copy image files to the run's artifacts, `plots/<folder of the key>`."""
        for image in images:
            self._writable().log_artifact(image, f"plots/{key.rpartition('/')[0]}".rstrip("/"))

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Checkpoints are not uploaded."""

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """End the run and wait at most ten seconds for a server, two minutes for a local store.

        FAILED after an error, KILLED after Ctrl-C or SIGTERM: Lightning calls this while it
        handles the exception.
        """
        if not self._open or self._journal is None:
            return
        result: Status = "FINISHED"
        if status == "failed":
            error = sys.exception()
            result = "FAILED" if error is None or isinstance(error, Exception) else "KILLED"
            if error is not None:
                text = f"{type(error).__name__}: {error}"
                self._journal.set_tags({"pipeline.error": text})
        self._journal.end(result)
        self._open = False
        if self._sender is not None:
            self._sender.close()
            self._sender = None


def _newest(folder: Path) -> int:
    """The number of the newest journal in `folder`, 1 without any."""
    return max((int(path.name.removeprefix("run_")) for path in folder.glob("run_*")), default=1)
