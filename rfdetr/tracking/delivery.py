"""Brings a journal to MLflow: creates the run once, then sends what is new.

A record that arrives twice is ignored by MLflow. The byte offset may therefore lag behind what was
sent, but never runs ahead of it.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

from rfdetr.tracking.client import experiment_id, tracking_client, valid_key
from rfdetr.tracking.journal import Journal, Record

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)
KEY_TAG = "pipeline.journal"
PER_BATCH = {"metrics": 1000, "params": 50, "tags": 50}  # limits of MLflow's servers
PARAM_LENGTH, TAG_LENGTH, DIGEST_LENGTH = 6000, 5000, 36
# error codes of MlflowException for which a retry is pointless
FINAL_CODES = {
    "INVALID_PARAMETER_VALUE",
    "BAD_REQUEST",
    "RESOURCE_ALREADY_EXISTS",
    "MALFORMED_REQUEST",
}
FINAL_STATUS = {400, 413, 415, 422}  # HTTP status of an artifact store that answers itself
LOST_RUN = re.compile(
    r"run .*(?:not found|must be in the 'active' state)", re.IGNORECASE | re.DOTALL
)


def deliver(journal: Journal, uri: str, *, keep_going: Callable[[], bool] = lambda: True) -> int:
    """Send everything that has not arrived, until `keep_going` says no; the records sent.

    Raises whatever the client raises if the server is unreachable; nothing is lost then. A record
    that the server refuses is skipped with a warning. If the run is gone (deleted, or the database
    is new), a new run receives the complete journal.
    """
    client = tracking_client(uri)
    sent = 0
    with journal.sending():
        run_id = ensure_run(client, journal, uri)
        while keep_going():
            records, offset = journal.read(journal.state.offset)
            if offset == journal.state.offset:
                break
            try:
                _send(client, run_id, journal, records)
            except Exception as error:
                if not _is_lost(error):
                    raise
                run_id = _replace_run(client, journal, uri)
                continue
            journal.save(journal.state.model_copy(update={"offset": offset}))
            sent += len(records)
            _clear_outbox(journal, records)
    return sent


def ensure_run(client: MlflowClient, journal: Journal, uri: str) -> str:
    """The id of the journal's run on the server `uri`; found by its key, created once."""
    state = journal.state
    if state.uri == uri and state.run_id:
        return state.run_id
    experiment = experiment_id(client, state.spec.experiment, uri)
    known = client.search_runs([experiment], f"tags.`{KEY_TAG}` = '{state.key}'", max_results=1)
    if known:
        run_id = str(known[0].info.run_id)
    else:
        first, _ = journal.read(0, limit=1)
        tags = {key: journal.mask(value) for key, value in state.spec.tags.items()}
        run = client.create_run(
            experiment,
            start_time=first[0]["t"] if first else None,
            tags={**tags, KEY_TAG: state.key},
            run_name=state.spec.name,
        )
        run_id = str(run.info.run_id)
    offset = state.offset if state.uri in (None, uri) else 0
    journal.save(state.model_copy(update={"uri": uri, "run_id": run_id, "offset": offset}))
    return run_id


def _replace_run(client: MlflowClient, journal: Journal, uri: str) -> str:
    log.warning("run %s is gone; its journal goes to a new run", journal.run_id)
    journal.save(journal.state.model_copy(update={"run_id": None, "offset": 0}))
    return ensure_run(client, journal, uri)


def _is_lost(error: Exception) -> bool:
    code = getattr(error, "error_code", "")
    return code in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"} and bool(
        LOST_RUN.search(str(error))
    )


def _is_refused(error: Exception) -> bool:
    """Whether the record itself is invalid; not an outage, not a failed login, not a lost run."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    final = getattr(error, "error_code", None) in FINAL_CODES or status in FINAL_STATUS
    return final and not _is_lost(error)


def _send(client: MlflowClient, run_id: str, journal: Journal, records: list[Record]) -> None:
    for kind, group in groupby(records, key=lambda record: record["kind"]):
        if kind in PER_BATCH:
            entities = iter([e for record in group for e in _entities(kind, record)])
            while batch := list(islice(entities, PER_BATCH[kind])):
                _send_batch(client, run_id, journal, kind, batch)
        else:
            for record in group:
                _try_one(client, run_id, journal, record)


def _entities(kind: str, record: Record) -> Iterator[Any]:
    from mlflow.entities import Metric, Param, RunTag

    for key, value in record["values"].items():
        name = valid_key(key)
        if kind == "metrics":
            yield Metric(name, value, record["t"], int(record["step"]))
        elif kind == "params":
            yield Param(name, value[:PARAM_LENGTH])
        else:
            yield RunTag(name, value[:TAG_LENGTH])


def _send_batch(
    client: MlflowClient, run_id: str, journal: Journal, kind: str, batch: list[Any]
) -> None:
    """Send a batch; if it is refused, its halves, down to the one record that is to blame."""
    try:
        entities: dict[str, Any] = {kind: batch}
        client.log_batch(run_id, **entities)
    except Exception as error:
        if not _is_refused(error):
            raise
        if len(batch) == 1:
            log.warning("MLflow refused %s %s: %s", kind, batch[0].key, journal.mask(str(error)))
            return
        middle = len(batch) // 2
        _send_batch(client, run_id, journal, kind, batch[:middle])
        _send_batch(client, run_id, journal, kind, batch[middle:])


def _try_one(client: MlflowClient, run_id: str, journal: Journal, record: Record) -> None:
    """Send one record; if it is refused, those after it still go."""
    try:
        _send_one(client, run_id, journal, record)
    except Exception as error:
        if not _is_refused(error):
            raise
        what = record.get("file") or record.get("name") or record.get("status", "")
        log.warning("MLflow refused %s %s: %s", record["kind"], what, journal.mask(str(error)))


def _send_one(client: MlflowClient, run_id: str, journal: Journal, record: Record) -> None:
    kind = record["kind"]
    if kind == "artifact":
        path = journal.folder / record["file"]
        if path.exists():
            client.log_artifact(run_id, str(path), record["to"])
        else:
            log.warning("artifact %s was sent to an earlier run; no copy is left", path.name)
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
    dataset = Dataset(record["name"], record["digest"][:DIGEST_LENGTH], kind, source)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])


def _clear_outbox(journal: Journal, records: list[Record]) -> None:
    for record in records:
        if record["kind"] == "artifact":
            path = journal.folder / record["file"]
            path.unlink(missing_ok=True)
            if path.parent.exists():
                path.parent.rmdir()
