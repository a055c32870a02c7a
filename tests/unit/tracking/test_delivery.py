"""Journals arrive in MLflow complete and once, whatever the server or the process does."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from unittest.mock import Mock

import pytest
from filelock import Timeout
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from requests import HTTPError, Response

from rfdetr.errors import ConfigError
from rfdetr.tracking.client import tracking_client, valid_key
from rfdetr.tracking.delivery import deliver
from rfdetr.tracking.journal import STATE, Journal, RunSpec, flatten
from rfdetr.tracking.sender import sync
from tests.flows.mlflow_fixtures import artifacts, history, runs

SPEC = RunSpec(experiment="rfdetr/demo", name="fit", tags={"fit.fingerprint": "abc"})
NOWHERE = "http://127.0.0.1:9"  # nothing listens on the discard port


def test_sync_reports_what_it_could_not_send(
    tracking_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for name in ("a", "b"):
        Journal(tmp_path / name, SPEC).log_metrics({"x": 1})
    problems = sync(tmp_path, NOWHERE, lambda text: text.upper())
    assert [str(problem)[:15] for problem in problems.values()] == ["MLFLOWEXCEPTION"] * 2
    assert set(sync(tmp_path, tracking_uri).values()) == {None}
    assert sync(tmp_path, tracking_uri) == {}
    assert len(runs(tracking_uri)) == 2


def test_a_journal_of_an_older_version_is_sent(tracking_uri: str, tmp_path: Path) -> None:
    journal = Journal(tmp_path, SPEC)
    journal.append("dataset", name="d", digest="1", source="data/d", context="training")
    state = json.loads((tmp_path / STATE).read_text())
    state["spec"]["parent"] = None
    (tmp_path / STATE).write_text(json.dumps(state))
    deliver(Journal(tmp_path), tracking_uri)
    (run,) = runs(tracking_uri)
    assert [entry.dataset.name for entry in run.inputs.dataset_inputs] == ["d"]


def test_run_is_found_again_when_its_id_was_never_written(
    tracking_uri: str, tmp_path: Path
) -> None:
    journal = Journal(tmp_path / "fit", SPEC)
    before = journal.state
    journal.log_metrics({"a": 1.0}, 3)
    deliver(journal, tracking_uri)
    journal.save(before)  # killed between create_run and the note of its id
    deliver(journal, tracking_uri)
    (run,) = runs(tracking_uri)
    assert history(tracking_uri, run.info.run_id, "a") == [(3, 1.0)]


def test_lost_database_receives_the_whole_journal_again(
    tracking_uri: str, migrated_database: Path, tmp_path: Path
) -> None:
    journal = Journal(tmp_path / "fit", SPEC)
    journal.log_metrics({"a": 1.0}, 1)
    deliver(journal, tracking_uri)
    MlflowClient(tracking_uri=tracking_uri).delete_run(str(journal.run_id))
    journal.log_metrics({"a": 2.0}, 2)
    deliver(journal, tracking_uri)
    assert history(tracking_uri, str(journal.run_id), "a") == [(1, 1.0), (2, 2.0)]
    other = tmp_path / "other.db"
    other.write_bytes(migrated_database.read_bytes())
    deliver(journal, f"sqlite:///{other}")
    assert history(f"sqlite:///{other}", str(journal.run_id), "a") == [(1, 1.0), (2, 2.0)]


def test_one_refused_record_does_not_hold_back_the_others(
    tracking_uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path / "fit", SPEC)
    journal.log_params({"lr": 1})
    deliver(journal, tracking_uri)
    journal.append("params", values={"lr": "2", "good": "yes"})
    journal.log_metrics({"AP/a/../b<c>": 0.5, "nan": float("nan"), "text": "no number"}, 1)
    journal.log_metrics({"val/AP/cat/": 0.1, "/val//AP/dog": 0.2}, 1)  # names of classes
    journal.set_tags({"t": "x" * 9000})
    deliver(journal, tracking_uri)
    (run,) = runs(tracking_uri)
    assert run.data.params == {"lr": "1", "good": "yes"}
    assert "refused params lr" in caplog.text
    assert run.data.metrics[valid_key("AP/a/../b<c>")] == 0.5
    assert set(run.data.metrics) == {"AP/b_c_", "nan", "val/AP/cat", "val/AP/dog"}
    assert not journal.unsent


def refusal(status: int) -> HTTPError:
    response = Response()
    response.status_code = status
    return HTTPError(f"{status} for the artifact", response=response)


@pytest.mark.parametrize(
    "error", [refusal(413), refusal(400), MlflowException("no such thing", INVALID_PARAMETER_VALUE)]
)
def test_a_refused_artifact_does_not_hold_back_what_follows(
    error: Exception,
    tracking_uri: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    journal = journal_with_artifact(tmp_path)
    monkeypatch.setattr(tracking_client(tracking_uri), "log_artifact", Mock(side_effect=error))
    deliver(journal, tracking_uri)
    assert "MLflow refused artifact" in caplog.text
    (run,) = runs(tracking_uri)
    assert run.data.metrics == {"after": 1}
    assert not journal.unsent


@pytest.mark.parametrize("status", [401, 403, 404, 429, 503])
def test_an_artifact_waits_while_the_server_is_unavailable(
    status: int, tracking_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = journal_with_artifact(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(HTTPError):
        failing = Mock(side_effect=refusal(status))
        patch.setattr(tracking_client(tracking_uri), "log_artifact", failing)
        deliver(journal, tracking_uri)
    assert journal.unsent
    deliver(journal, tracking_uri)
    (run,) = runs(tracking_uri)
    assert artifacts(tracking_uri, run.info.run_id) == {"note.txt"}


def journal_with_artifact(folder: Path) -> Journal:
    journal = Journal(folder / "fit", SPEC)
    (folder / "note.txt").write_text("a note")
    journal.log_artifact(folder / "note.txt")
    journal.log_metrics({"after": 1}, 1)
    return journal


def test_incomplete_lines_of_a_killed_writer_are_skipped(tracking_uri: str, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "fit", SPEC)
    journal.log_metrics({"a": 1.0}, 1)
    with open(journal.file, "ab") as stream:
        stream.write(b'{"t":17,"kind":"metr')
    again = Journal(tmp_path / "fit")
    deliver(again, tracking_uri)
    again.log_metrics({"a": 2.0}, 2)
    deliver(again, tracking_uri)
    assert history(tracking_uri, str(again.run_id), "a") == [(1, 1.0), (2, 2.0)]


def test_full_disk_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(tmp_path / "fit", SPEC)
    journal.file.symlink_to("/dev/full")
    with caplog.at_level(logging.WARNING):
        journal.log_metrics({"a": 1})
        journal.log_metrics({"a": 2})
    assert caplog.text.count("tracking records are lost") == 1


def test_a_folder_without_a_journal_needs_a_spec(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no journal"):
        Journal(tmp_path)


def test_another_server_gets_everything_but_the_artifacts(
    tracking_uri: str, migrated_database: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = journal_with_artifact(tmp_path)
    deliver(journal, tracking_uri)
    assert list((tmp_path / "fit" / "outbox").iterdir()) == []
    other = tmp_path / "other.db"
    other.write_bytes(migrated_database.read_bytes())
    deliver(journal, f"sqlite:///{other}")
    assert "note.txt was sent to an earlier run" in caplog.text
    assert history(f"sqlite:///{other}", str(journal.run_id), "after") == [(1, 1.0)]


def test_only_one_process_sends(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SPEC)
    with journal.sending(), pytest.raises(Timeout):
        Journal(tmp_path).sending().acquire(timeout=0.1)


def test_experiments_open_in_the_model_training_view(tracking_uri: str, tmp_path: Path) -> None:
    journal = Journal(tmp_path, SPEC)
    deliver(journal, tracking_uri)
    found = tracking_client(tracking_uri).get_experiment_by_name(SPEC.experiment)
    assert found.tags["mlflow.experimentKind"] == "custom_model_development"


def test_nested_values_are_flattened() -> None:
    nested = {"a": {"b": 1, "c": {"d": [2]}}, "e": {}}
    assert flatten(nested) == {"a.b": 1, "a.c.d": [2], "e": {}}
    assert set(flatten(nested, separator="/")) == {"a/b", "a/c/d", "e"}


def test_a_failing_server_leaves_the_random_numbers_of_a_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    client = tracking_client("http://127.0.0.1:9")
    before = random.getstate()
    with pytest.raises(MlflowException, match="Max retries exceeded"):
        client.get_experiment_by_name("x")
    assert random.getstate() == before
