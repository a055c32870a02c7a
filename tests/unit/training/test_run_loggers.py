"""metrics.csv across resumes, and MLflow with `train_config.mlflow`."""

from __future__ import annotations

from pathlib import Path

from pytorch_lightning.loggers import MLFlowLogger

from rfdetr.tracking import sender
from rfdetr.tracking.client import local_store, tracking_client
from rfdetr.tracking.journal import read_state
from rfdetr.training.csv_logger import HistoryCSVLogger
from tests.unit.training.helpers import Run, tiny_model, tiny_run

NOWHERE = "http://127.0.0.1:9"  # nothing listens on the discard port


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


def test_training_continues_without_the_server_and_everything_arrives_later(
    shapes, tmp_path, monkeypatch, caplog, tracking_uri
):
    monkeypatch.setattr(sender, "CLOSE_SECONDS", 1.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOWHERE)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    run = Run(tiny_model(), tiny_run(shapes, tmp_path, epochs=1, mlflow=True, run="first"))
    run.fit()
    assert run.trainer.global_step == 5
    assert "run_1/journal.jsonl have not reached MLflow" in caplog.text

    assert set(sender.sync(tmp_path, tracking_uri).values()) == {None}
    assert sender.sync(tmp_path, tracking_uri) == {}  # nothing is sent twice
    client = tracking_client(tracking_uri)
    run_id = read_state(tmp_path / "mlflow/run_1").run_id
    found = client.get_run(run_id)
    assert (found.info.status, found.info.run_name) == ("FINISHED", "first")
    assert found.data.params["train_config/epochs"] == "1"
    assert {"train/loss", "val/mAP_50_95", "val/AP/bolt"} <= set(found.data.metrics)
    assert len(client.get_metric_history(run_id, "val/loss")) == 1


def test_without_a_server_the_runs_are_in_a_store_in_the_output_folder(shapes, tmp_path):
    config = tiny_run(shapes, tmp_path, epochs=1, mlflow=True)
    first = Run(tiny_model(), config).fit()
    config = config.model_copy(update={"epochs": 2})
    resumed = Run(tiny_model(), config)
    resumed.trainer.fit(resumed.module, resumed.data, ckpt_path=str(tmp_path / "last.ckpt"))
    Run(tiny_model(), config.model_copy(update={"epochs": 1})).fit()
    client = tracking_client(local_store(tmp_path / "mlflow"))
    runs = client.search_runs([client.get_experiment_by_name("rfdetr").experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"]
    logger = next(log for log in first.trainer.loggers if isinstance(log, MLFlowLogger))
    continued = client.get_run(logger.run_id)
    assert continued.data.tags["changed.train_config/epochs"] == "2"
    assert len(client.get_metric_history(logger.run_id, "val/loss")) == 2
