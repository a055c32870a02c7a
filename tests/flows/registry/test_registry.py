from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from flows.registry.logged_model import log_model
from flows.registry.model_folder import ModelFiles
from flows.registry.registry import Registry, Version
from flows.release import champion as promotion
from flows.release.champion import history, promote
from rfdetr.errors import CheckpointError
from rfdetr.tracking.client import experiment_id
from tests.flows.mlflow_fixtures import MlflowServer

EXPERIMENT = "rfdetr/demo"


@pytest.fixture
def registry(tracking_uri: str) -> Registry:
    return Registry("rfdetr-demo", tracking_uri)


def model_files(folder: Path, content: str) -> ModelFiles:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "best.pth").write_text(content)
    (folder / "model.json").write_text(json.dumps({"variant": "nano", "class_names": ["a", "b"]}))
    return ModelFiles(weights=folder / "best.pth", card=folder / "model.json")


def new_run(registry: Registry) -> str:
    where = experiment_id(registry.client, EXPERIMENT, registry.uri)
    return str(registry.client.create_run(where).info.run_id)


def register(registry: Registry, folder: Path, content: str, run_id: str | None = None) -> Version:
    run_id = run_id or new_run(registry)
    files = model_files(folder / content, content)
    model_id = log_model(registry, files, experiment=EXPERIMENT, run_id=run_id)
    return registry.register(model_id, run_id=run_id, tags={"lineage.git_commit": "c0ffee"})


def test_registering_the_same_run_twice_makes_one_version(
    registry: Registry, tmp_path: Path
) -> None:
    first = register(registry, tmp_path, "one")
    again = register(registry, tmp_path, "one", first.run_id)
    assert again == first
    assert len(registry.versions()) == 1
    experiment = registry.client.get_experiment_by_name(EXPERIMENT)
    assert len(registry.client.search_logged_models([experiment.experiment_id])) == 1
    assert first.weights_sha256 == hashlib.sha256(b"one").hexdigest()
    assert first.tags["lineage.git_commit"] == "c0ffee"
    assert registry.aliases() == {"challenger": 1}
    second = register(registry, tmp_path, "two")
    assert second.number == 2
    assert registry.aliases() == {"challenger": 2}


def test_interrupted_upload_and_registration_are_completed(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = new_run(registry)
    for step in ("log_model_artifacts", "finalize_logged_model", "create_model_version"):
        with monkeypatch.context() as patch, pytest.raises(ConnectionError):
            patch.setattr(registry.client, step, _broken)
            register(registry, tmp_path, "one", run_id)
    with monkeypatch.context() as patch, pytest.raises(ConnectionError):
        patch.setattr(registry.client, "set_registered_model_alias", _broken)
        register(registry, tmp_path, "one", run_id)
    version = register(registry, tmp_path, "one", run_id)
    assert version.number == 1
    experiment = registry.client.get_experiment_by_name(EXPERIMENT)
    (model,) = registry.client.search_logged_models([experiment.experiment_id])
    assert str(model.status) == "READY"
    folder = registry.fetch(version, tmp_path / "fetched")
    assert (folder / "artifacts" / "best.pth").read_text() == "one"


def _broken(*_: Any, **__: Any) -> None:
    raise ConnectionError("the server is unreachable")


def test_the_model_folder_holds_no_pickle_and_needs_no_code_of_the_pipeline(
    registry: Registry, tmp_path: Path
) -> None:
    folder = registry.fetch(register(registry, tmp_path, "one"), tmp_path / "fetched")
    names = {path.name for path in folder.rglob("*") if path.is_file()}
    assert {"MLmodel", "served_model.py", "best.pth", "model.json", "input_example.json"} <= names
    assert not [name for name in names if name.endswith((".pkl", ".pickle"))]
    code = (folder / "served_model.py").read_text()
    assert "import flows" not in code and "from flows" not in code


def test_metrics_of_the_test_set_are_logged_on_the_model(
    registry: Registry, tmp_path: Path
) -> None:
    run_id = new_run(registry)
    model_id = log_model(
        registry,
        model_files(tmp_path, "one"),
        experiment=EXPERIMENT,
        run_id=run_id,
        metrics={"test/mAP_50": 0.9},
        dataset=("demo", "d" * 32),
    )
    (metric,) = registry.client.get_logged_model(model_id).metrics
    assert (metric.key, metric.value, metric.dataset_name) == ("test/mAP_50", 0.9, "demo")


def test_missing_files_and_an_export_without_proof_are_named(
    registry: Registry, tmp_path: Path
) -> None:
    files = model_files(tmp_path, "one")
    (tmp_path / "x.onnx").write_bytes(b"onnx")
    lonely = files.model_copy(update={"onnx": tmp_path / "x.onnx"})
    with pytest.raises(CheckpointError, match="needs its parity file"):
        log_model(registry, lonely, experiment=EXPERIMENT, run_id=None)
    files.weights.unlink()
    with pytest.raises(CheckpointError, match=r"best\.pth is missing"):
        log_model(
            registry,
            ModelFiles(weights=files.weights, card=files.card),
            experiment=EXPERIMENT,
            run_id=None,
        )


def test_the_same_over_a_real_server(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    mlflow_server.start()
    registry = Registry("rfdetr-demo", mlflow_server.uri)
    first = register(registry, tmp_path, "one")
    assert register(registry, tmp_path, "one", first.run_id) == first
    promote(registry, 1, reason="first", by="ada")
    register(registry, tmp_path, "two")
    promote(registry, 2, reason="better", by="ada", expected_champion=1)
    assert registry.aliases() == {"champion": 2, "previous_champion": 1}
    folder = registry.fetch(first, tmp_path / "fetched")
    assert (folder / "artifacts" / "best.pth").read_text() == "one"


def test_errors_of_the_server_are_not_mistaken_for_a_missing_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    unreachable = Registry("rfdetr-demo", "http://127.0.0.1:9")
    with pytest.raises(MlflowException):
        unreachable.champion()


def test_hundred_versions_and_thousand_runs_answer_within_two_seconds(
    registry: Registry, tmp_path: Path
) -> None:
    from mlflow.entities import Metric
    from sqlalchemy import create_engine, text

    first = register(registry, tmp_path, "one")
    experiment = registry.client.get_experiment_by_name(EXPERIMENT)
    run = registry.client.get_run(first.run_id)
    registry.client.log_batch(run.info.run_id, [Metric("m", i, i, i) for i in range(50)])
    with create_engine(registry.uri).begin() as connection:
        for index in range(1000):
            row = {"id": f"{index:032x}", "e": experiment.experiment_id, "n": f"r{index}"}
            connection.execute(text(RUN_ROW), row)
            tag = {"id": row["id"], "v": f"key-{index}"}
            connection.execute(
                text(
                    "insert into tags (key, value, run_uuid) values ('pipeline.journal', :v, :id)"
                ),
                tag,
            )
    for index in range(2, 101):
        version = registry.client.create_model_version(
            registry.name, f"file:///models/{index}", run_id=first.run_id, tags={"t": "x" * 200}
        )
        audit = promotion.AuditRecord(
            action="promote", version=index, previous=index - 1, reason="r", by="b", at=f"{index}"
        )
        registry.set_tags(int(version.version), {audit.key: audit.model_dump_json()})
    start = time.monotonic()
    assert len(history(registry)) == 99
    promote(registry, 100, reason="better", by="ada")
    assert registry.champion() is not None
    again = register(registry, tmp_path, "one", first.run_id)
    assert again.number == 1
    assert time.monotonic() - start < 2


RUN_ROW = """
insert into runs (run_uuid, name, source_type, source_name, entry_point_name, user_id, status,
  start_time, end_time, source_version, lifecycle_stage, artifact_uri, experiment_id)
values (:id, :n, 'LOCAL', '', '', 'u', 'FINISHED', 1, 2, '', 'active', 'x', :e)
"""
