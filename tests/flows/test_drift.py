"""The drift check: reports, records, the event and its automation, what cannot be checked."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL
from prefect.testing.utilities import prefect_test_harness

from flows.drift import EVENT, drift_check
from flows.registry import Registry
from flows.trees import upload_tree
from flows.watch import PICTURE, REPORT, TEXT, DriftCheck, DriftParams, check_drift
from rfdetr import RFDETR
from rfdetr.errors import CheckpointError, ConfigError, DatasetError
from rfdetr.evaluation.profile import profile_images
from tests.datasets import scenes
from tests.flows.mlflow_fixtures import artifacts
from tests.flows.models import register_champion, write_model
from tests.flows.projects import ROOT, write_params
from tests.flows.servers import S3Server

CPU = DriftParams(device="cpu")


def write_photos(folder: Path, count: int, *, seed: int, light: float = 1.0) -> Path:
    folder.mkdir()
    for number, scene in enumerate(scenes(count, 3, seed=seed)):
        scene.image.point(lambda level: level * light).save(folder / f"{number:03d}.png")
    return folder


@pytest.fixture(scope="module")
def project(migrated_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder whose registry has a champion with a profile; recent images beside it."""
    root = tmp_path_factory.mktemp("drift")
    write_params(root)
    (root / "dvc.yaml").write_text("stages: {}\n")
    (root / "mlflow.db").write_bytes(migrated_database.read_bytes())
    (root / "model").mkdir()
    files = write_model(root / "model")
    detector = RFDETR.from_checkpoint(str(files.weights), device="cpu")
    known = write_photos(root / "known", 100, seed=0)
    profile_images(detector, sorted(known.iterdir())).save(root / "model/profile.npz")
    files = files.model_copy(update={"profile": root / "model/profile.npz"})
    register_champion(f"sqlite:///{root / 'mlflow.db'}", files)
    write_photos(root / "same", 40, seed=1)
    write_photos(root / "dark", 40, seed=2, light=0.4)
    return root


@pytest.fixture
def registry(project: Path) -> Registry:
    return Registry("rfdetr-demo", f"sqlite:///{project / 'mlflow.db'}")


def test_images_of_the_same_kind_are_no_drift(project: Path, registry: Registry) -> None:
    check = check_drift(project, str(project / "same"), CPU)
    assert check.report is not None
    assert (check.drifted, check.report.alarms) == (False, [])
    assert (check.report.reference_images, check.report.recent_images) == (100, 40)
    assert DriftCheck.model_validate_json((project / REPORT).read_text()) == check
    assert "**No drift.**" in (project / TEXT).read_text()
    assert registry.version(1).tags["drift.alarms"] == "none"


def test_drift_is_reported_and_recorded_on_the_champion(project: Path, registry: Registry) -> None:
    check = check_drift(project, str(project / "dark"), CPU)
    assert check.report is not None
    assert {"brightness", "embedding"} <= set(check.report.alarms)
    version = registry.version(1)
    assert "brightness" in version.tags["drift.alarms"]
    assert version.run_id is not None
    run = registry.client.get_run(version.run_id)
    assert run.data.metrics["drift/brightness"] > 0.5
    kept = artifacts(registry.uri, version.run_id, "drift")
    assert "drift/latest" in kept
    (alarm,) = kept - {"drift/latest"}
    names = {Path(name).name for name in artifacts(registry.uri, version.run_id, alarm)}
    assert names == {REPORT.name, TEXT.name, PICTURE.name}
    with Image.open(project / PICTURE) as picture:
        assert picture.format == "PNG"


def test_s3_prefix_gives_the_folders_numbers(project: Path, s3: S3Server) -> None:
    upload_tree(project / "same", "s3://data/recent", progress=False)
    here = check_drift(project, str(project / "same"), CPU)
    there = check_drift(project, "s3://data/recent", CPU)
    assert here.report is not None and there.report is not None
    assert {m.name: m.value for m in there.report.measures} == pytest.approx(
        {m.name: m.value for m in here.report.measures}, abs=1e-9
    )


def test_too_few_recent_images_are_not_judged(project: Path, tmp_path: Path) -> None:
    folder = write_photos(tmp_path / "old", 35, seed=3, light=0.2)
    for file in list(folder.iterdir())[:20]:
        os.utime(file, (time.time() - 7200,) * 2)
    assert check_drift(project, str(folder), CPU).drifted
    check = check_drift(project, str(folder), DriftParams(device="cpu", hours=1))
    assert check.report is None
    assert check.skipped == "15 images of the last 1 hours; 30 are needed"
    assert "15 images" in (project / TEXT).read_text()


def test_what_cannot_be_checked_is_said(
    project: Path, tmp_path: Path, migrated_database: Path
) -> None:
    with pytest.raises(DatasetError, match="does not exist"):
        check_drift(project, str(tmp_path / "nowhere"), CPU)
    with pytest.raises(ConfigError, match="Unknown measures"):
        check_drift(project, str(project / "same"), DriftParams(thresholds={"colour": 1.0}))
    (tmp_path / "mlflow.db").write_bytes(migrated_database.read_bytes())
    write_params(tmp_path)
    with pytest.raises(ConfigError, match="no version with the alias 'champion'"):
        check_drift(tmp_path, str(project / "same"), CPU)
    register_champion(f"sqlite:///{tmp_path / 'mlflow.db'}", write_model(tmp_path))
    with pytest.raises(CheckpointError, match="registered without a profile"):
        check_drift(tmp_path, str(project / "same"), CPU)


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What the notification webhook received."""
    received: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("RFDETR_NOTIFY_URL", f"http://127.0.0.1:{server.server_port}")
    yield received
    server.shutdown()
    server.server_close()


def test_the_flow_emits_the_event_that_automations_wait_for(
    project: Path, listener: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One server: a check with drift, one without, one without a source."""
    monkeypatch.chdir(project)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with prefect_test_harness(server_startup_timeout=240):
        drifted = drift_check(str(project / "dark"), CPU)
        assert drifted["drifted"] is True
        monkeypatch.setenv("RFDETR_RECENT_IMAGES", str(project / "same"))
        assert drift_check(params=CPU)["drifted"] is False
        monkeypatch.delenv("RFDETR_RECENT_IMAGES")
        assert drift_check(params=CPU, return_state=True).name == "Skipped"
        (event,) = _events()
        with get_client(sync_client=True) as client:
            keys = {artifact.key for artifact in client.read_artifacts()}
    assert event["resource"]["prefect.resource.id"] == "rfdetr.model.rfdetr-demo"
    assert "brightness" in event["payload"]["alarms"]
    roles = {r["prefect.resource.role"] for r in event["related"]}
    assert "flow-run" in roles
    assert {"drift-report", "drift"} <= keys
    assert [message["subject"] for message in listener] == ["drift detected"]


def _events() -> list[dict[str, Any]]:
    """The drift events that the server has stored; it does so a moment after they are sent."""
    import httpx

    body = {"filter": {"event": {"name": [EVENT]}}}
    found: list[dict[str, Any]] = []
    for _ in range(60):
        answer = httpx.post(f"{PREFECT_API_URL.value()}/events/filter", json=body, timeout=20)
        found = answer.raise_for_status().json()["events"]
        if found:
            break
        time.sleep(0.5)
    return found
