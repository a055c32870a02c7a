"""An MLflow logger that never waits for its server (training specification, section 13)."""

from __future__ import annotations

import importlib.util
import os
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_fabric.utilities.logger import _convert_params, _flatten_dict
from pytorch_lightning.loggers import MLFlowLogger
from pytorch_lightning.utilities import rank_zero_only

from rfdetr.training.journal import Journal, Record, Sender

DRAIN_S = 10.0
PARAMS_AT_ONCE = 100  # limits of the MLflow server
METRICS_AT_ONCE = 1000
PARAM_LENGTH = 6000
STATUS = {"success": "FINISHED", "finished": "FINISHED", "failed": "FAILED"}


class JournaledMLFlowLogger(MLFlowLogger):
    """Writes to `output_dir/mlflow/journal_N.jsonl`; a thread sends to the server from there.

    With the server down or slow training goes on at full speed. The rest is sent when the server
    is back, by the next training in this folder, or by `sync_journals`. A resumed fit continues
    its MLflow run. Without `MLFLOW_TRACKING_URI` the runs go to a local store in `output_dir`.
    """

    def __init__(
        self,
        output_dir: str | Path,
        experiment_name: str = "rfdetr",
        run_name: str | None = None,
        tracking_uri: str | None = None,
    ) -> None:
        # MLFlowLogger's own constructor would open the store here and now
        if importlib.util.find_spec("mlflow") is None:
            raise ModuleNotFoundError("No module named 'mlflow'")
        self._folder = Path(output_dir) / "mlflow"
        self._store = MLflowStore(self._folder, experiment_name, run_name, tracking_uri)
        self._journal = Journal(self._newest())
        self._continued = self._journal.path.exists()
        self._sender = self._new_sender()

    def _new_sender(self) -> Sender:
        return Sender("MLflow", lambda: self._store.send_all(self._folder))

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_sender"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._sender = self._new_sender()

    def _newest(self) -> Path:
        journals = _journals(self._folder)
        return journals[-1] if journals else self._folder / "journal_1.jsonl"

    @property
    def name(self) -> str:
        return self._store.experiment_name

    @property
    def run_id(self) -> str | None:
        """The MLflow run, None until the server has given one."""
        found: str | None = self._journal.state().get("run_id")
        return found

    version = run_id

    @property
    def save_dir(self) -> str:
        return str(self._folder.parent)

    @property
    def experiment(self) -> Any:
        """A client of the store, connected at its first use."""
        return self._store

    @rank_zero_only
    def begin_fit(self, resumed: bool, step: int | None) -> None:
        """Go on with the run of this folder, or start another one."""
        if not resumed and self._continued:
            number = int(self._journal.path.stem.rpartition("_")[2]) + 1
            self._journal = Journal(self._folder / f"journal_{number}.jsonl")
            self._continued = False

    def _put(self, kind: str, **values: Any) -> None:
        self._journal.append({"kind": kind, "time": int(time.time() * 1000), **values})
        self._sender.notify()

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        flat = _flatten_dict(_convert_params(params))
        self._put("params", params={key: str(value) for key, value in flat.items()})

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._put("metrics", metrics={k: float(v) for k, v in metrics.items()}, step=step or 0)

    @rank_zero_only
    def log_image(self, key: str, images: Sequence[Any], step: int | None = None) -> None:
        """Send picture files to the run's artifacts, below `plots/`."""
        folder = f"plots/{key.rpartition('/')[0]}"
        for path in images:
            self._put("file", path=str(path), folder=folder)

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Checkpoints are not uploaded."""

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        if not self._sender.is_alive():
            return
        self._put("status", status=STATUS.get(status, "FINISHED"))
        if not self._sender.drain(DRAIN_S):
            warnings.warn(
                f"MLflow has not taken everything yet; the rest is in {self._journal.path}. It is "
                "sent by the next training in this folder or by "
                "rfdetr.training.mlflow_logger.sync_journals(output_dir).",
                UserWarning,
                stacklevel=2,
            )


def sync_journals(output_dir: str | Path, tracking_uri: str | None = None) -> None:
    """Send what earlier trainings in `output_dir` could not; raises when the server fails."""
    folder = Path(output_dir) / "mlflow"
    MLflowStore(folder, tracking_uri=tracking_uri).send_all(folder)


def _journals(folder: Path) -> list[Path]:
    return sorted(folder.glob("journal_*.jsonl"), key=lambda p: int(p.stem.rpartition("_")[2]))


class MLflowStore:
    """Sends journals to MLflow; other attributes are those of its client."""

    def __init__(
        self,
        folder: Path,
        experiment_name: str = "rfdetr",
        run_name: str | None = None,
        tracking_uri: str | None = None,
    ) -> None:
        self.folder = folder
        self.experiment_name = experiment_name
        self.run_name = run_name
        self.tracking_uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        self._client: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_client": None}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.client(), name)

    def client(self) -> Any:
        """The MLflow client, with bounded waits."""
        if self._client is None:
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
            from mlflow.tracking import MlflowClient

            self.folder.mkdir(parents=True, exist_ok=True)
            self._client = MlflowClient(self.tracking_uri or self._local_uri())
        return self._client

    def _local_uri(self) -> str:
        return f"sqlite:///{self.folder.absolute()}/mlflow.db"

    def send_all(self, folder: Path) -> None:
        """Send what is pending in every journal of `folder`, oldest first."""
        for path in _journals(folder):
            journal = Journal(path)
            records, end = journal.pending()
            if records:
                run_id = journal.state().get("run_id") or self._create_run(journal)
                self._send(run_id, records)
                journal.note(sent=end)

    def _create_run(self, journal: Journal) -> str:
        client = self.client()
        experiment = client.get_experiment_by_name(self.experiment_name)
        if experiment is None:
            place = None if self.tracking_uri else (self.folder / "artifacts").absolute().as_uri()
            experiment_id = client.create_experiment(self.experiment_name, artifact_location=place)
        else:
            experiment_id = experiment.experiment_id
        run_id: str = client.create_run(experiment_id, run_name=self.run_name).info.run_id
        journal.note(run_id=run_id)
        return run_id

    def _send(self, run_id: str, records: list[Record]) -> None:
        from mlflow.entities import Metric

        client, metrics = self.client(), []
        for record in records:
            if record["kind"] == "metrics":
                for key, value in record["metrics"].items():
                    name = re.sub(r"[^/\w.\- :]", "_", key)
                    metrics.append(Metric(name, value, record["time"], record["step"]))
            elif record["kind"] == "params":
                self._send_params(run_id, record["params"])
            elif record["kind"] == "file" and Path(record["path"]).is_file():
                client.log_artifact(run_id, record["path"], record["folder"])
        for first in range(0, len(metrics), METRICS_AT_ONCE):
            client.log_batch(run_id, metrics=metrics[first : first + METRICS_AT_ONCE])
        states = [record["status"] for record in records if record["kind"] == "status"]
        if states:
            client.set_terminated(run_id, states[-1])

    def _send_params(self, run_id: str, params: dict[str, str]) -> None:
        """Parameters of a run cannot change: differences of a resumed fit become tags."""
        from mlflow.entities import Param, RunTag

        known = self.client().get_run(run_id).data.params
        new = [Param(k, v[:PARAM_LENGTH]) for k, v in params.items() if k not in known]
        changed = [
            RunTag(f"resumed.{k}", v)
            for k, v in params.items()
            if k in known and known[k] != v[:PARAM_LENGTH]
        ]
        for first in range(0, max(len(new), len(changed)), PARAMS_AT_ONCE):
            part = slice(first, first + PARAMS_AT_ONCE)
            self.client().log_batch(run_id, params=new[part], tags=changed[part])
