from __future__ import annotations

import logging
from pathlib import Path
from unittest.mock import Mock

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from requests import HTTPError, Response

from flows.tracking.delivery import deliver, tracking_client, valid_key
from flows.tracking.journal import Journal, RunSpec
from flows.tracking.run import main, sync
from rfdetr.errors import ConfigError
from tests.flows.mlflow_fixtures import artifacts, history, runs

SPEC = RunSpec(experiment="rfdetr/demo", name="fit", tags={"fit.fingerprint": "abc"})
NOWHERE = "http://127.0.0.1:9"  # nothing listens on the discard port


def test_sync_reports_what_it_could_not_send(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    Journal(tmp_path / "fit", SPEC).log_metrics({"a": 1})
    assert main(["sync", "--uri", NOWHERE, "--state-dir", str(tmp_path)]) == 1
    assert "fit: MlflowException" in capsys.readouterr().out


def test_child_run_lies_under_its_parent_even_when_both_start_offline(
    tracking_uri: str, tmp_path: Path
) -> None:
    parent = Journal(tmp_path / "parent", RunSpec(experiment="rfdetr/demo", name="retrain"))
    spec = SPEC.model_copy(update={"parent": tmp_path / "parent"})
    child = Journal(tmp_path / "fit", spec)
    child.log_metrics({"a": 1})
    deliver(child, tracking_uri)
    found = {run.info.run_name: run for run in runs(tracking_uri)}
    assert found["fit"].data.tags["mlflow.parentRunId"] == found["retrain"].info.run_id
    assert parent.run_id == found["retrain"].info.run_id


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
    journal.set_tags({"t": "x" * 9000})
    deliver(journal, tracking_uri)
    (run,) = runs(tracking_uri)
    assert run.data.params == {"lr": "1", "good": "yes"}
    assert "refused params lr" in caplog.text
    assert run.data.metrics[valid_key("AP/a/../b<c>")] == 0.5
    assert set(run.data.metrics) == {"AP/b_c_", "nan"}
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
def test_an_artifact_waits_while_a_server_is_away_or_closed(
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
    journal.log_text("a note", "note.txt")
    journal.log_metrics({"after": 1}, 1)
    return journal


def test_torn_lines_of_a_killed_writer_are_passed_over(tracking_uri: str, tmp_path: Path) -> None:
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
    with pytest.raises(ConfigError, match="holds no journal"):
        Journal(tmp_path)


def test_sync_of_several_journals(tracking_uri: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        Journal(tmp_path / name, SPEC).log_metrics({"x": 1})
    assert set(sync(tmp_path, tracking_uri).values()) == {None}
    assert len(runs(tracking_uri)) == 2
