"""metrics.csv over resumes, and an MLflow server that is away or slow."""

from __future__ import annotations

import json
import pickle
import threading
import time
import warnings
from pathlib import Path

import pytest

from rfdetr.training import mlflow_logger
from rfdetr.training.history import HistoryCSVLogger
from rfdetr.training.journal import Journal, Sender
from rfdetr.training.mlflow_logger import JournaledMLFlowLogger, sync_journals
from tests.unit.training.helpers import Run, tiny_model, tiny_run

AWAY = "http://127.0.0.1:9"  # nobody listens on the discard port


def csv_lines(folder: Path) -> list[str]:
    return (folder / "metrics.csv").read_text().splitlines()


def test_columns_are_united_and_a_resumed_fit_continues_from_its_step(tmp_path):
    first = HistoryCSVLogger(str(tmp_path))
    for step in (0, 1, 2):
        first.log_metrics({"a": step}, step)
    first.save()
    second = HistoryCSVLogger(str(tmp_path))
    second.begin_fit(resumed=True, step=2)
    second.log_metrics({"b": 7.0}, 2)
    second.finalize("success")
    assert csv_lines(tmp_path) == ["a,b,step", "0,,0", "1,,1", ",7.0,2"]


def test_a_new_fit_puts_the_old_history_aside(tmp_path):
    for value in (1, 2, 3):
        logger = HistoryCSVLogger(str(tmp_path))
        logger.begin_fit(resumed=False, step=None)
        logger.log_metrics({"a": value}, 0)
        logger.finalize("success")
    assert csv_lines(tmp_path)[1] == "3,0"
    assert (tmp_path / "metrics_1.csv").read_text().splitlines()[1] == "1,0"
    assert (tmp_path / "metrics_2.csv").is_file()


def test_evaluations_append_to_the_history_of_the_fit(shapes, tmp_path):
    run = Run(tiny_model(), tiny_run(shapes, tmp_path, epochs=1)).fit()
    lines = csv_lines(tmp_path)
    again = Run(tiny_model(), run.config)
    again.trainer.validate(again.module, again.data)
    assert len(csv_lines(tmp_path)) > len(lines)


def test_training_goes_on_while_mlflow_is_away_and_everything_arrives_later(
    shapes, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", AWAY)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setattr(mlflow_logger, "DRAIN_S", 0.5)
    run = Run(tiny_model(), tiny_run(shapes, tmp_path, epochs=1, mlflow=True, run="first"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit()
    assert run.trainer.global_step == 5
    assert any("journal_1.jsonl" in str(w.message) for w in caught)

    from mlflow.tracking import MlflowClient

    store = f"sqlite:///{tmp_path}/store.db"
    monkeypatch.chdir(tmp_path)
    sync_journals(tmp_path, store)
    sync_journals(tmp_path, store)  # nothing is sent twice
    client = MlflowClient(store)
    run_id = json.loads((tmp_path / "mlflow/journal_1.state.json").read_text())["run_id"]
    data = client.get_run(run_id).data
    assert data.params["train_config/epochs"] == "1"
    assert {"train/loss", "val/mAP_50_95", "val/AP/bolt"} <= set(data.metrics)
    assert len(client.get_metric_history(run_id, "val/loss")) == 1
    assert client.get_run(run_id).info.status == "FINISHED"

    resumed = JournaledMLFlowLogger(tmp_path, tracking_uri=store)
    resumed.begin_fit(resumed=True, step=5)
    resumed.log_hyperparams({"train_config": {"epochs": 2}})
    resumed.log_metrics({"val/loss": 1.0}, 9)
    assert resumed._sender.drain(60)
    assert resumed.run_id == run_id
    data = client.get_run(run_id).data
    assert data.tags["resumed.train_config/epochs"] == "2"
    assert len(client.get_metric_history(run_id, "val/loss")) == 2
    fresh = pickle.loads(pickle.dumps(JournaledMLFlowLogger(tmp_path, tracking_uri=store)))
    fresh.begin_fit(resumed=False, step=None)
    assert fresh.run_id is None


def test_a_slow_receiver_delays_nobody(tmp_path):
    journal, release, taken = Journal(tmp_path / "journal_1.jsonl"), threading.Event(), []

    def send() -> None:
        release.wait(30)
        records, end = journal.pending()
        taken.extend(records)
        journal.note(sent=end)

    sender = Sender("server", send)
    start = time.monotonic()
    for step in range(200):
        journal.append({"step": step})
        sender.notify()
    assert time.monotonic() - start < 5
    assert not sender.drain(0.1)
    release.set()
    assert sender.drain(10)
    assert [record["step"] for record in taken] == list(range(200))


def test_a_receiver_that_fails_is_warned_about_once_and_asked_again(monkeypatch):
    monkeypatch.setattr("rfdetr.training.journal.FIRST_PAUSE_S", 0.01)
    calls = []

    def send() -> None:
        calls.append(1)
        if len(calls) < 3:
            raise ConnectionError("refused")

    sender = Sender("server", send)
    with pytest.warns(UserWarning, match="cannot be reached") as caught:
        sender.notify()
        assert sender.drain(10)
    assert len(calls) == 3
    assert len([w for w in caught if "cannot be reached" in str(w.message)]) == 1


def test_a_torn_line_of_a_killed_process_waits(tmp_path):
    journal = Journal(tmp_path / "journal_1.jsonl")
    journal.append({"a": 1})
    with open(journal.path, "a") as stream:
        stream.write('{"b": ')
    records, end = journal.pending()
    assert records == [{"a": 1}]
    assert end == len('{"a": 1}\n')
