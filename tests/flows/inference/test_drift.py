"""The drift check: reports, records, the event and its automation, what cannot be checked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from prefect.server.events.schemas.automations import EventTrigger
from prefect.server.events.schemas.events import ReceivedEvent

from flows.config.overrides import RetrainParams
from flows.drift_check import EVENT, drift_check
from flows.inference.drift import PLOT, REPORT, TEXT, DriftCheck, DriftParams, check_drift
from flows.project.project import Project
from flows.registry.registry import Registry
from flows.storage.prefixes import upload_tree
from infra.deploy import AUTOMATIONS
from rfdetr import RFDETR
from rfdetr.errors import CheckpointError, ConfigError, DatasetError
from rfdetr.monitoring.profiling import profile_images
from tests.datasets import scenes
from tests.flows.mlflow_fixtures import artifacts
from tests.flows.models import register_champion, write_model
from tests.flows.prefect_fixtures import PrefectServer, Webhook
from tests.flows.projects import ROOT, environment, write_params
from tests.flows.servers import S3Server

CPU = DriftParams(device="cpu")


def write_images(folder: Path, count: int, *, seed: int, light: float = 1.0) -> Path:
    folder.mkdir()
    for number, scene in enumerate(scenes(count, 3, seed=seed)):
        scene.image.point(lambda level: level * light).save(
            folder / f"{folder.name}-{number:03d}.png"
        )
    return folder


@pytest.fixture(scope="module")
def project(migrated_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder whose registry has a champion with a profile; recent images beside it."""
    root = tmp_path_factory.mktemp("drift")
    write_params(root, registry={"name": "rfdetr-demo"})
    (root / "dvc.yaml").write_text("stages: {}\n")
    (root / "mlflow.db").write_bytes(migrated_database.read_bytes())
    (root / "model").mkdir()
    files = write_model(root / "model")
    detector = RFDETR.from_checkpoint(str(files.weights), device="cpu")
    known = write_images(root / "known", 100, seed=0)
    profile_images(detector, sorted(known.iterdir())).save(root / "model/profile.npz")
    files = files.model_copy(update={"profile": root / "model/profile.npz"})
    register_champion(f"sqlite:///{root / 'mlflow.db'}", files)
    write_images(root / "same", 40, seed=1)
    write_images(root / "dark", 40, seed=2, light=0.4)
    return root


@pytest.fixture
def registry(project: Path) -> Registry:
    return Registry("rfdetr-demo", f"sqlite:///{project / 'mlflow.db'}")


def test_images_of_the_same_kind_are_no_drift(project: Path, registry: Registry) -> None:
    check = check_drift(Project(project), [str(project / "same")], CPU)
    assert check.report is not None
    assert (check.drifted, check.report.alarms) == (False, [])
    assert (check.report.reference_images, check.report.recent_images) == (100, 40)
    assert DriftCheck.model_validate_json((project / REPORT).read_text()) == check
    assert "**No drift.**" in (project / TEXT).read_text()
    assert registry.version(1).tags["drift.alarms"] == "none"


def test_drift_is_reported_and_recorded_beside_the_champion(
    project: Path, registry: Registry
) -> None:
    check = check_drift(Project(project), [str(project / "dark")], CPU)
    assert check.report is not None
    assert {"brightness", "embedding"} <= set(check.report.alarms)
    version = registry.version(1)
    assert "brightness" in version.tags["drift.alarms"]
    assert version.run_id is not None
    trained = registry.client.get_run(version.run_id)
    assert not [name for name in trained.data.metrics if name.startswith("drift")]
    own = registry.run_of_checks("rfdetr/demo", version)
    run = registry.client.get_run(own)
    assert (run.info.run_name, run.info.status) == ("drift of rfdetr-demo version 1", "FINISHED")
    assert run.data.metrics["drift/brightness"] > 0.5
    kept = artifacts(registry.uri, own, "drift")
    assert "drift/latest" in kept
    (alarm,) = kept - {"drift/latest"}
    names = {Path(name).name for name in artifacts(registry.uri, own, alarm)}
    assert names == {REPORT.name, TEXT.name, PLOT.name}
    with Image.open(project / PLOT) as plot:
        assert plot.format == "PNG"


def test_every_check_of_a_version_is_a_step_of_one_run(project: Path, registry: Registry) -> None:
    own = registry.run_of_checks("rfdetr/demo", registry.version(1))
    before = len(registry.client.get_metric_history(own, "drift/brightness"))
    both = [str(project / "same"), str(project / "dark")]
    check = check_drift(Project(project), both, CPU)
    assert check.report is not None
    assert check.report.recent_images == 80
    assert check.source == ", ".join(both)
    assert registry.run_of_checks("rfdetr/demo", registry.version(1)) == own
    assert len(registry.client.get_metric_history(own, "drift/brightness")) == before + 1


def test_drift_is_found_when_the_run_of_the_champion_was_deleted(
    project: Path, registry: Registry
) -> None:
    run_id = str(registry.version(1).run_id)
    registry.client.delete_run(run_id)
    try:
        assert check_drift(Project(project), [str(project / "dark")], CPU).drifted
    finally:
        registry.client.restore_run(run_id)
    assert "brightness" in registry.version(1).tags["drift.alarms"]


def test_s3_prefix_gives_the_folders_numbers(project: Path, s3: S3Server) -> None:
    upload_tree(project / "same", "s3://data/recent", progress=False)
    here = check_drift(Project(project), [str(project / "same")], CPU)
    there = check_drift(Project(project), ["s3://data/recent"], CPU)
    assert here.report is not None and there.report is not None
    assert {m.name: m.value for m in there.report.measures} == pytest.approx(
        {m.name: m.value for m in here.report.measures}, abs=1e-9
    )


def test_too_few_recent_images_are_not_judged(project: Path, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "old", 35, seed=3, light=0.2)
    for file in list(folder.iterdir())[:20]:
        os.utime(file, (time.time() - 7200,) * 2)
    assert check_drift(Project(project), [str(folder)], CPU).drifted
    check = check_drift(Project(project), [str(folder)], DriftParams(device="cpu", hours=1))
    assert check.report is None
    assert check.skipped == "15 images in the last 1 hours; 30 required"
    assert "15 images" in (project / TEXT).read_text()


def test_what_cannot_be_checked_is_said(
    project: Path, tmp_path: Path, migrated_database: Path
) -> None:
    with pytest.raises(DatasetError, match="does not exist"):
        check_drift(Project(project), [str(tmp_path / "nowhere")], CPU)
    with pytest.raises(ConfigError, match="Unknown measures"):
        check_drift(
            Project(project), [str(project / "same")], DriftParams(thresholds={"colour": 1.0})
        )
    (tmp_path / "mlflow.db").write_bytes(migrated_database.read_bytes())
    write_params(tmp_path, registry={"name": "rfdetr-demo"})
    with pytest.raises(ConfigError, match="no version with the alias 'champion'"):
        check_drift(Project(tmp_path), [str(project / "same")], CPU)
    register_champion(f"sqlite:///{tmp_path / 'mlflow.db'}", write_model(tmp_path))
    with pytest.raises(CheckpointError, match="registered without an image profile"):
        check_drift(Project(tmp_path), [str(project / "same")], CPU)


def test_the_command_emits_the_event_that_automations_wait_for(
    project: Path, prefect_server: PrefectServer, webhook: Webhook
) -> None:
    """Through a real server: one check with drift, one without."""
    notified = len(webhook.posts)
    done = drift_command(project, prefect_server, webhook, "dark", "--exit-code")
    assert done.returncode == 3, done.stderr
    assert "**Drift: " in done.stdout
    run = prefect_server.last_run()
    assert {"drift-report", "drift"} <= set(prefect_server.artifacts(run["id"]))
    done = drift_command(project, prefect_server, webhook, "same", "--exit-code")
    assert done.returncode == 0, done.stderr
    (event,) = drift_events(prefect_server)
    assert event["resource"]["prefect.resource.id"] == "rfdetr.model.rfdetr-demo"
    assert "brightness" in event["payload"]["alarms"]
    related = {r["prefect.resource.role"]: r["prefect.resource.id"] for r in event["related"]}
    assert related["flow-run"] == f"prefect.flow-run.{run['id']}"
    (post,) = webhook.posts[notified:]
    assert post["subject"] == "drift detected"


def test_a_missing_champion_is_one_sentence_without_a_server(
    project: Path, tmp_path: Path, migrated_database: Path
) -> None:
    (tmp_path / "mlflow.db").write_bytes(migrated_database.read_bytes())
    write_params(tmp_path, registry={"name": "rfdetr-demo"})
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    command = [sys.executable, "-m", "flows.cli.main", "drift", str(project / "same")]
    env = environment(tmp_path, PYTHONPATH=str(ROOT), PREFECT_API_URL="http://127.0.0.1:9/api")
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert "no version with the alias 'champion'" in line


def test_the_automation_takes_that_event_and_retrains() -> None:
    """The installed trigger takes exactly this event, for any model."""
    entries = yaml.safe_load(AUTOMATIONS.read_text())["automations"]
    (entry,) = [e for e in entries if EVENT in e["trigger"]["expect"]]
    trigger = EventTrigger.model_validate(
        {k: v for k, v in entry["trigger"].items() if k != "type"}
    )
    resource = {"prefect.resource.id": "rfdetr.model.rfdetr-demo"}
    made = {"occurred": datetime.now(UTC), "id": uuid.uuid4(), "resource": resource}
    assert trigger.covers(ReceivedEvent(event=EVENT, **made))
    assert not trigger.covers(ReceivedEvent(event="rfdetr.other", **made))
    (action,) = entry["actions"]
    checked = RetrainParams.model_validate(action["parameters"]["params"])
    assert checked.only_if_data_changed, "drift alone must not train on the same data again"


def test_without_a_source_the_flow_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RFDETR_RECENT_IMAGES", raising=False)
    state = drift_check.fn()
    assert state.name == "Skipped"
    assert "RFDETR_RECENT_IMAGES" in state.message


def drift_command(
    root: Path, server: PrefectServer, webhook: Webhook, *arguments: str
) -> subprocess.CompletedProcess[str]:
    env = environment(
        root,
        PYTHONPATH=str(ROOT),
        PREFECT_API_URL=server.url,
        PREFECT_HOME=str(server.folder),
        RFDETR_NOTIFY_URL=webhook.url,
    )
    command = [sys.executable, "-m", "flows.cli.main", "drift", *arguments]
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)


def drift_events(server: PrefectServer) -> list[dict[str, Any]]:
    """The drift events that the server has stored; it does so a moment after they are sent."""
    body = json.dumps({"filter": {"event": {"name": [EVENT]}}}).encode()
    header = {"Content-Type": "application/json"}
    for _ in range(60):
        request = urllib.request.Request(f"{server.url}/events/filter", body, header)
        with urllib.request.urlopen(request, timeout=60) as answer:
            found = json.load(answer)["events"]
        if found:
            break
        time.sleep(0.5)
    return found
