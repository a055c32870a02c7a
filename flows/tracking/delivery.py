"""Brings journals to MLflow: creates the run once, sends what is new, tries again later.

Points that arrive twice are equal and the store ignores them, so the byte offset may lag behind
what was sent, never run ahead of it.
"""

from __future__ import annotations

import json
import logging
import os
import posixpath
import re
import threading
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.core.redact import redact
from flows.tracking.journal import Journal, Record

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)
KEY_TAG = "pipeline.journal"
PER_BATCH = {"metrics": 1000, "params": 50, "tags": 50}
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
# codes of MlflowException that another try would only repeat
FINAL_CODES = {
    "INVALID_PARAMETER_VALUE",
    "BAD_REQUEST",
    "RESOURCE_ALREADY_EXISTS",
    "MALFORMED_REQUEST",
}
FINAL_STATUS = {400, 413, 415, 422}  # of HTTP, where an artifact store answers itself
LOST_RUN = re.compile(
    r"run .*(?:not found|must be in the 'active' state)", re.IGNORECASE | re.DOTALL
)


@lru_cache(maxsize=4)
def tracking_client(uri: str) -> MlflowClient:
    """A client with bounded waits; it neither reads nor changes MLflow's global tracking URI."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def experiment_id(client: MlflowClient, name: str, uri: str) -> str:
    """The experiment of this name, created or restored when needed.

    Without a server its artifacts lie in `mlartifacts` beside the SQLite file.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        place = None
        if uri.startswith("sqlite:"):
            root = Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts"
            place = (root / re.sub(r"[^\w.-]+", "-", name)).as_uri()
        tags = {"mlflow.experimentKind": "custom_model_development"}
        try:
            return str(client.create_experiment(name, artifact_location=place, tags=tags))
        except MlflowException:  # another process was faster
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def ensure_run(client: MlflowClient, journal: Journal, uri: str) -> str:
    """The id of the journal's run on the server `uri`; found by its key, created once."""
    state = journal.state
    if state.uri == uri and state.run_id:
        return state.run_id
    spec = state.spec
    tags = {**spec.tags, KEY_TAG: state.key}
    if spec.parent is not None:
        above = Journal(spec.parent)
        with above.sending():
            tags["mlflow.parentRunId"] = ensure_run(client, above, uri)
    experiment = experiment_id(client, spec.experiment, uri)
    known = client.search_runs([experiment], f"tags.`{KEY_TAG}` = '{state.key}'", max_results=1)
    if known:
        run_id = known[0].info.run_id
    else:
        first, _ = journal.read(0, limit=1)
        start = first[0]["t"] if first else None
        run = client.create_run(experiment, start_time=start, tags=tags, run_name=spec.name)
        run_id = run.info.run_id
    offset = state.offset if state.uri in (None, uri) else 0
    journal.save(state.model_copy(update={"uri": uri, "run_id": run_id, "offset": offset}))
    return str(run_id)


def deliver(journal: Journal, uri: str, *, keep_going: Callable[[], bool] = lambda: True) -> int:
    """Send everything that has not arrived; the number of records sent.

    Raises whatever the client raises when the server cannot be reached; nothing is lost then.
    A record that the server refuses for good is left out with a warning. When the run is gone
    (deleted, or the database is new), a new one receives the whole journal.
    """
    client = tracking_client(uri)
    sent = 0
    with journal.sending():
        run_id = ensure_run(client, journal, uri)
        while keep_going():
            state = journal.state
            records, offset = journal.read(state.offset)
            if offset == state.offset:
                break
            try:
                _send(client, run_id, journal.folder, records)
            except Exception as error:
                if not _is_lost(error):
                    raise
                log.warning("run %s is gone; its journal goes to a new run", run_id)
                journal.save(state.model_copy(update={"run_id": None, "offset": 0}))
                run_id = ensure_run(client, journal, uri)
                continue
            journal.save(state.model_copy(update={"offset": offset}))
            sent += len(records)
            _clear_outbox(journal.folder, records)
    return sent


def _is_lost(error: Exception) -> bool:
    code = getattr(error, "error_code", "")
    return code in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"} and bool(
        LOST_RUN.search(str(error))
    )


def _send(client: MlflowClient, run_id: str, folder: Path, records: list[Record]) -> None:
    for kind, group in groupby(records, key=lambda record: record["kind"]):
        if kind in PER_BATCH:
            entities = iter([e for record in group for e in _entities(kind, record)])
            while batch := list(islice(entities, PER_BATCH[kind])):
                _send_batch(client, run_id, kind, batch)
        else:
            for record in group:
                _try_one(client, run_id, folder, record)


def _entities(kind: str, record: Record) -> Iterator[Any]:
    from mlflow.entities import Metric, Param, RunTag

    for key, value in record["values"].items():
        name = valid_key(key)
        if kind == "metrics":
            yield Metric(name, value, record["t"], int(record["step"]))
        else:
            yield Param(name, value[:6000]) if kind == "params" else RunTag(name, value[:5000])


def valid_key(key: str) -> str:
    """A name that MLflow accepts: letters, digits and `_-. :/`, a plain relative path."""
    name = posixpath.normpath(re.sub(r"[^\w.\- :/]", "_", key).strip("/") or "_")
    return name.replace("..", "_")[:250]


def _send_batch(client: MlflowClient, run_id: str, kind: str, batch: list[Any]) -> None:
    try:
        entities: dict[str, Any] = {kind: batch}
        client.log_batch(run_id, **entities)
    except Exception as error:
        if _is_lost(error) or not _is_final(error):
            raise
        if len(batch) > 1:  # find the one that is refused
            middle = len(batch) // 2
            _send_batch(client, run_id, kind, batch[:middle])
            _send_batch(client, run_id, kind, batch[middle:])
        else:
            log.warning("MLflow refused %s %s: %s", kind, batch[0].key, redact(str(error)))


def _is_final(error: Exception) -> bool:
    """Whether the server calls the record itself invalid; not a refused sign-in, not an outage."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return getattr(error, "error_code", None) in FINAL_CODES or status in FINAL_STATUS


def _try_one(client: MlflowClient, run_id: str, folder: Path, record: Record) -> None:
    """Send one record; one that is refused for good must not hold back those after it."""
    try:
        _send_one(client, run_id, folder, record)
    except Exception as error:
        if _is_lost(error) or not _is_final(error):
            raise
        what = record.get("file") or record.get("name") or record.get("status", "")
        log.warning("MLflow refused %s %s: %s", record["kind"], what, redact(str(error)))


def _send_one(client: MlflowClient, run_id: str, folder: Path, record: Record) -> None:
    kind = record["kind"]
    if kind == "artifact":
        path = folder / record["file"]
        if path.exists():
            client.log_artifact(run_id, str(path), record["to"])
        else:
            log.warning("artifact %s was removed before it could be sent", path.name)
    elif kind == "dataset":
        client.log_inputs(run_id, datasets=[_dataset(record)])
    elif kind == "begin":
        client.update_run(run_id, status="RUNNING")
    elif kind == "end":
        client.set_terminated(run_id, status=record["status"], end_time=record["t"])


def _dataset(record: Record) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    uri = record["source"]
    kind = uri.partition("://")[0] if "://" in uri else "local"
    source = json.dumps({"url" if kind in {"http", "https"} else "uri": uri})
    dataset = Dataset(record["name"], record["digest"][:36], kind, source)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", record["context"])])


def _clear_outbox(folder: Path, records: list[Record]) -> None:
    for record in records:
        if record["kind"] == "artifact":
            path = folder / record["file"]
            path.unlink(missing_ok=True)
            if path.parent.exists():
                path.parent.rmdir()


class Sender:
    """A daemon thread that delivers a journal every few seconds and never raises."""

    def __init__(self, journal: Journal, uri: str, interval: float = 2.0) -> None:
        self.journal, self.uri, self.interval = journal, uri, interval
        self._closing = threading.Event()
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._work, name="journal-sender", daemon=True)

    def start(self) -> None:
        """Begin sending; a second call does nothing."""
        if self._thread.ident is None:
            self._thread.start()

    def close(self, timeout: float = 10.0) -> bool:
        """Send what is left for at most `timeout` seconds; whether everything has arrived."""
        self._deadline = time.monotonic() + timeout
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        left = self.journal.unsent
        if left:
            log.warning(
                "%d bytes of %s have not reached MLflow; the next run sends them, or "
                "`python -m flows.tracking.run sync`",
                left,
                self.journal.file,
            )
        return not left

    def _in_time(self) -> bool:
        return time.monotonic() < self._deadline

    def _work(self) -> None:
        pause = 0.0
        while True:
            last = self._closing.is_set()
            try:
                deliver(self.journal, self.uri, keep_going=self._in_time)
                pause = 0.0
            except Exception as error:  # noqa: BLE001 - tracking never ends a training
                level = logging.DEBUG if pause else logging.WARNING
                text = redact(f"{type(error).__name__}: {error}")
                log.log(level, "MLflow cannot be reached, trying again later: %s", text)
                pause = min(LONGEST_PAUSE, pause * 2 or FIRST_PAUSE)
            if last and (not pause or not self._in_time()):
                return
            if last:
                time.sleep(min(pause, 0.5))
            else:
                self._closing.wait(pause or self.interval)
