"""The retrain flow against a real Prefect server: a first run, one without work, a refused one."""

from __future__ import annotations

import json
import re
import sqlite3
from pathlib import Path

import pytest
from mlflow import MlflowClient

from flows.registry.registry import Registry
from flows.release.audit import history
from rfdetr.progress import EpochProgress
from tests.flows.mlflow_fixtures import artifacts, runs
from tests.flows.prefect_fixtures import SECRET, Retrained
from tests.flows.projects import run, write_params

pytestmark = pytest.mark.slow  # several complete flow runs

STAGES = ["demo", "validate", "convert", "fit", "evaluate"]


def registry(project: Retrained) -> Registry:
    return Registry("tiny", project.uri)


def log_of_first_run(project: Retrained) -> str:
    return (project.root.parent / "first.log").read_text()


@pytest.fixture(scope="module")
def first(retrained: Retrained) -> dict:
    """The flow run that made the champion."""
    number = (retrained.root.parent / "first.id").read_text()
    return next(r for r in retrained.server.read("flow_runs") if r["id"] == number)


def test_the_first_run_ends_with_a_champion(retrained: Retrained, first: dict) -> None:
    assert first["state"]["name"] == "Completed"
    states = retrained.server.states(first["id"])
    assert [states[name] for name in STAGES] == ["Completed"] * 5
    assert registry(retrained).aliases() == {"champion": 1}
    (record,) = history(registry(retrained))
    assert (record.action, record.version, record.previous) == ("promote", 1, None)
    assert record.by == "tester"
    assert run(retrained.root, "dvc", "status").stdout.strip().endswith("up to date.")


def test_prefect_shows_report_progress_numbers_and_images(
    retrained: Retrained, first: dict
) -> None:
    shown = retrained.server.artifacts(first["id"])
    assert "0 errors" in shown["dataset-report"] or "Dataset" in shown["dataset-report"]
    assert float(shown["training"]) == 100
    assert "promote" in shown["gate-decision"]
    rows = json.loads(shown["champion-against-challenger"])
    assert {"map_50_95", "AP zero"} <= {row["metric"] for row in rows}
    assert {"samples", "confusion-matrix", "precision-recall", "training-curves"} <= set(shown)
    log = log_of_first_run(retrained)
    assert any(map(EpochProgress.parse, (line.rpartition(" - ")[2] for line in log.splitlines())))
    assert "checkpoints need about" in log


def test_the_command_ends_with_the_model_and_how_to_use_it(
    retrained: Retrained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The printed lines of Python run."""
    end = log_of_first_run(retrained).partition("version 1 of tiny is champion: ")[2]
    assert str(retrained.root / "models/trained/model.pth") in end
    lines = re.findall(r"^ {4}(\S.*)$", end, re.MULTILINE)
    assert len(lines) == 3
    image = next((retrained.root / "data/demo/test").glob("*.jpg"))
    known: dict = {}
    exec("\n".join(lines).replace("photo.jpg", str(image)), known)
    assert known["detector"].class_names == ["zero", "one", "four"]
    assert known["detections"].xyxy.shape[1] == 4
    (experiment,) = re.findall(r"#/experiments/(\d+)\?workflowType=machine_learning", end)
    client = MlflowClient(tracking_uri=retrained.uri)
    assert client.get_experiment(experiment).name == "rfdetr/demo"
    for file in ("validation.html", "training_curves.png", "pictures/samples.png"):
        assert str(retrained.root / "reports" / file) in end


def test_runs_and_versions_can_be_told_apart(retrained: Retrained, first: dict) -> None:
    name = r"demo-nano-\d{4}-\d\d-\d\d-\d{4}"
    assert re.fullmatch(name, first["name"])
    (record,) = runs(retrained.uri)
    assert re.fullmatch(name, record.info.run_name)
    client = MlflowClient(tracking_uri=retrained.uri)
    text = client.get_model_version("tiny", "1").description
    assert text.startswith(
        "RF-DETR nano at 64 pixels, trained on demo (3 classes: zero, one, four)"
    )
    assert "Test split, 8 images: mAP 0." in text


def test_one_mlflow_run_holds_the_record(retrained: Retrained, first: dict) -> None:
    (record,) = runs(retrained.uri)
    assert record.info.status == "FINISHED"
    version = registry(retrained).version(1)
    assert version.run_id == record.info.run_id
    assert version.tags["lineage.flow_run"] == first["name"]
    assert version.tags["lineage.dataset_version"].startswith("demo:")
    assert version.tags["gate.outcome"] == "promote"
    numbers = json.loads((retrained.root / "metrics/test.json").read_text())
    assert record.data.metrics["test.map_50_95"] == pytest.approx(numbers["map_50_95"])
    assert record.data.metrics["fit.epochs"] == 1
    charts = {name.rpartition("/")[0] for name in record.data.metrics} - {"", "system"}
    assert min(charts) == "train"  # MLflow sorts the sections of a run
    assert {"params.yaml", "dvc.lock", "environment.json", "git.diff", "gate"} <= artifacts(
        retrained.uri, record.info.run_id
    )
    pictures = artifacts(retrained.uri, record.info.run_id, "reports/pictures")
    assert "reports/pictures/samples.png" in pictures


def test_the_log_is_free_of_the_noise_of_libraries(retrained: Retrained) -> None:
    log = log_of_first_run(retrained)
    for noise in ("Tip:", "Downloading artifacts", "it/s]", "git add dvc.lock", "Warning"):
        assert noise not in log


def test_a_new_champion_is_announced(retrained: Retrained) -> None:
    said = [post for post in retrained.webhook.posts if post["subject"] == "champion changed"]
    assert said[0]["version"] == 1
    assert said[0]["by"] == "tester"


def test_no_secret_is_written_anywhere(retrained: Retrained) -> None:
    """Planted: the remote's URL, an uncommitted change, a variable, the webhook's address."""
    assert SECRET in (retrained.root / ".git/config").read_text()
    assert SECRET in (retrained.root / "params.yaml").read_text()
    inputs = {retrained.root / "params.yaml", retrained.root / ".git/config"}
    places = [retrained.root, retrained.root.parent / "state", retrained.server.folder]
    files = [f for place in places for f in place.rglob("*") if f.is_file() and f not in inputs]
    assert len(files) > 100
    assert [f for f in files if SECRET.encode() in f.read_bytes()] == []
    assert SECRET not in log_of_first_run(retrained)
    assert SECRET not in json.dumps(retrained.server.read("logs"))


def test_a_second_flow_run_shows_cached_stages_and_adds_nothing(
    retrained: Retrained, tmp_path: Path
) -> None:
    """The flow itself, which the command line skips when there is nothing to do."""
    project = retrained.copy(tmp_path)
    script = "from flows.retrain import retrain; retrain()"
    run(project.root, "python", "-c", script, **project.environment())
    states = retrained.server.states(retrained.server.last_run()["id"])
    assert [states[name] for name in STAGES] == ["Cached"] * 5
    assert states["promote"] == "Kept"
    assert [v.number for v in registry(project).versions()] == [1]
    assert len(runs(project.uri)) == 1
    assert len(history(registry(project))) == 1


def test_other_classes_train_again_and_leave_the_champion(
    retrained: Retrained, tmp_path: Path
) -> None:
    """Changed data is noticed, `only_if_data_changed` skips before and runs after."""
    project = retrained.copy(tmp_path)
    project.pipeline("retrain", "--only-if-data-changed", "--set", "gate.min_images=6")
    skipped = retrained.server.last_run()
    assert skipped["state"]["name"] == "Skipped"
    assert retrained.server.states(skipped["id"]) == {}
    done = project.pipeline("retrain", "--only-if-data-changed", "--set", "demo.classes=[0, 1, 7]")
    ran = retrained.server.last_run()
    states = retrained.server.states(ran["id"])
    assert [states[name] for name in ("demo", "fit", "evaluate")] == ["Completed"] * 3
    assert states["promote"] == "Kept"
    version = registry(project).version(2)
    assert version.tags["gate.outcome"] == "refuse"
    assert "class" in version.tags["gate.reason"]
    assert registry(project).aliases() == {"champion": 1, "challenger": 2}
    assert "version 2 of tiny is not champion (champion: version 1): " in done.stdout
    assert "rfdetr-pipeline predict IMAGES --model challenger" in done.stdout
    assert 'rfdetr-pipeline promote 2 --reason "..." --force' in done.stdout
    assert len(runs(project.uri)) == 2
    client = MlflowClient(tracking_uri=project.uri)
    verdict = f"gate/version-{version.number}.json"
    assert verdict in artifacts(project.uri, str(version.run_id), "gate")
    assert client.get_run(str(version.run_id)).data.params["dataset.name"] == "demo"


def test_sqlite_of_the_servers_is_sound(retrained: Retrained) -> None:
    with sqlite3.connect(retrained.root / "mlflow.db") as database:
        assert database.execute("pragma integrity_check").fetchone() == ("ok",)


def test_the_challenger_is_not_promoted_without_leave(retrained: Retrained, tmp_path: Path) -> None:
    """`retrain --no-promote` registers the same model under a name that has no champion."""
    project = retrained.copy(tmp_path)
    changes = {"registry": {"name": "other"}, "gate": {"min_images": 4}}
    write_params(project.root, fit={"epochs": 1}, **changes)
    project.pipeline("retrain", "--no-promote")
    states = retrained.server.states(retrained.server.last_run()["id"])
    assert states["promote"] == "Kept"
    other = Registry("other", project.uri)
    assert other.version(1).number == 1 and other.champion() is None
