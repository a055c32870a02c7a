"""A deployment on real servers: from the dataset on S3 to a champion in the registry."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from mlflow import MlflowClient
from PIL import Image

from flows.registry.registry import Registry
from infra.services import listens
from infra.settings import HOST
from rfdetr.data.demo import build_demo
from tests.services.deployed import git, start, stop
from tests.services.fitting import Fitting, next_run
from tests.services.live import LiveStack, command_of, processes_of, wait_for

pytestmark = [pytest.mark.services, pytest.mark.timeout(2400)]
MODEL = "service-test"


def watch(live: LiveStack, *parameters: str) -> tuple[int, str]:
    """`prefect deployment run retrain/manual --watch`; exit status and output."""
    words = [word for text in parameters for word in ("--param", text)]
    command = [sys.executable, "-m", "prefect", "deployment", "run", "retrain/manual", "--watch"]
    done = live.run(*command, *words, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def trained(live: LiveStack) -> str:
    """The id of a flow run that was started and watched from the command line."""
    status, text = watch(live, 'params={"publish": true}')
    run = live.runs()[0]["id"]
    assert status == 0, f"{text}\n{live.log(run)}"
    return str(run)


def test_the_watched_run_did_every_step(live: LiveStack, trained: str) -> None:
    states = live.task_states(trained)
    done = {"prepare", "validate", "convert", "fit", "evaluate", "push_data", "register", "gate"}
    assert {states[name] for name in done} == {"Completed"}
    assert states["promote"] == "Completed"
    assert states["publish"] == "Completed"
    assert live.slots() == 0
    assert live.slots(f"registry-{MODEL}") == 0


def test_artifacts_and_records_are_on_the_servers(live: LiveStack, trained: str) -> None:
    registry = Registry(MODEL, live.settings.url("mlflow"))
    version = registry.champion()
    assert version is not None
    client = MlflowClient(tracking_uri=live.settings.url("mlflow"))
    assert version.run_id is not None
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.artifact_uri.startswith("mlflow-artifacts:")
    stored = {path.name for path in (live.folder / "s3" / "mlflow").rglob("*") if path.is_file()}
    assert {"MLmodel", "model.pth"} <= stored
    weights = [p for p in (live.folder / "s3/mlflow").rglob("model.pth") if p.stat().st_size]
    assert weights
    body = {"artifacts": {"flow_run_id": {"any_": [trained]}}}
    keys = {artifact["key"] for artifact in live.api("POST", "/artifacts/filter", body)}
    assert len(keys) >= 5, keys


def test_results_were_pushed_and_the_lock_published(live: LiveStack, trained: str) -> None:
    branches = git(live.project, "branch", "--list", "retrain/*").split()
    assert len(branches) == 1
    files = git(live.project, "diff", "--name-only", "main", branches[0]).split()
    assert files == ["dvc.lock"]
    clone = live.folder.parent / "clone"
    git(live.project, "clone", "--quiet", "--branch", branches[0], str(live.project), str(clone))
    config = (live.project / ".dvc/config.local").read_text()
    (clone / ".dvc/config.local").write_text(config)
    here = LiveStack(live.folder, clone)
    here.module("dvc", "pull", "--allow-missing")
    assert (clone / "models/trained/model.pth").stat().st_size > 0
    assert (clone / "data/tiny/train/_annotations.coco.json").exists()
    assert "up to date" in here.module("dvc", "status", "evaluate").stdout


def test_a_second_run_finds_everything_done(live: LiveStack, trained: str) -> None:
    started = time.monotonic()
    run = live.start()
    live.wait_final(run, "COMPLETED")
    states = live.task_states(run)
    stages = ("validate", "convert", "fit", "evaluate")
    assert {states[name] for name in stages} == {"Cached"}, states
    assert [v.number for v in Registry(MODEL, live.settings.url("mlflow")).versions()] == [1]
    print(f"unchanged pipeline: {time.monotonic() - started:.0f} s")


def test_a_scheduled_run_finishes(live: LiveStack, trained: str) -> None:
    """A schedule of prefect.yaml, every minute here, starts a run; the champion knows the data."""
    deployment = live.api("GET", "/deployments/name/retrain/on-new-data")
    schedule = deployment["schedules"][0]
    assert schedule["schedule"]["cron"] == "* * * * *"
    path = f"/deployments/{deployment['id']}/schedules/{schedule['id']}"
    live.api("PATCH", path, {"active": True})

    def scheduled() -> list[str]:
        ours = [r for r in live.runs() if r["deployment_id"] == deployment["id"]]
        return [r["id"] for r in ours if r["auto_scheduled"] and r["state_type"] == "RUNNING"]

    try:
        run = wait_for("a scheduled run to start", scheduled)[0]
    finally:
        live.api("PATCH", path, {"active": False})
    state = live.wait_final(run, "COMPLETED")
    assert state["name"] == "Skipped"
    assert state["message"].startswith("version 1 was trained on this dataset already")


def test_drift_found_by_the_worker_starts_a_retraining(
    live: LiveStack, trained: str, tmp_path: Path
) -> None:
    noise = np.random.default_rng(0)
    for number in range(40):
        pixels = noise.integers(0, 256, (96, 160, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    known = {run["id"] for run in live.runs()}
    check = live.start_with("drift-check/drift-hourly", source=str(tmp_path))
    live.wait_final(check, "COMPLETED")
    retraining = next_run(live, known | {check}, None)
    state = live.wait_final(retraining, "COMPLETED")
    assert state["message"].startswith("version 1 was trained on this dataset already")


def test_batch_prediction_on_the_worker_writes_to_s3(
    live: LiveStack, trained: str, tmp_path: Path
) -> None:
    build_demo(tmp_path / "data", train=1, valid=1, test=12)
    run = live.start_with(
        "batch-predict/batch-predict",
        source=str(tmp_path / "data/test"),
        out="s3://data/found",
        threshold=0.0,
    )
    live.wait_final(run, "COMPLETED")
    results = json.loads((live.folder / "s3/data/found/results.json").read_text())
    assert len({row["image_id"] for row in results}) == 12


def test_wrong_parameters_are_refused_before_a_run_exists(live: LiveStack, trained: str) -> None:
    before = len(live.runs())
    status, text = watch(live, 'params={"overrides": {"fit": {"epochs": 0}}}')
    assert status == 1
    assert "less than the minimum of 1" in text.replace("\n", " ")
    assert len(live.runs()) == before


def test_deploying_again_doubles_nothing(live: LiveStack) -> None:
    live.module("infra.deploy")
    shipped = yaml.safe_load((live.project / "infra/prefect/automations.yaml").read_text())[
        "automations"
    ]
    automations = [a["name"] for a in live.api("POST", "/automations/filter", {})]
    assert sorted(automations) == sorted(entry["name"] for entry in shipped)
    declared = yaml.safe_load((live.project / "prefect.yaml").read_text())["deployments"]
    deployments = {d["name"]: d for d in live.api("POST", "/deployments/filter", {})}
    assert set(deployments) == {entry["name"] for entry in declared}
    assert len(deployments["nightly"]["schedules"]) == 1


def test_everything_listens_on_loopback(live: LiveStack) -> None:
    listening = [
        connection.laddr
        for process in live.everything()
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert {address.port for address in listening} >= set(live.settings.ports.values())
    assert {address.ip for address in listening} == {HOST}


def test_nothing_is_left_after_a_stop_and_a_start_resumes(
    live: LiveStack, begin: Callable[..., Fitting]
) -> None:
    fitting = begin(epochs=8)
    known = {r["id"] for r in live.runs()}
    stop(live)
    assert [command_of(p) for p in processes_of(live.folder)] == []
    assert not any(listens(port) for port in live.settings.ports.values())
    stop(live)  # stopping a stopped stack succeeds

    start(live)
    assert wait_for("health", lambda: all(live.health().values()))
    state = live.wait_final(fitting.run)
    if state["type"] == "CRASHED":
        live.wait_final(next_run(live, known, fitting.run), "COMPLETED")
    else:  # the worker had the time to tell that it ended the run
        overrides = live.parameters(fitting.run)["overrides"]
        live.wait_final(live.start(overrides=overrides), "COMPLETED")
    fitting.assert_trained_once()
    # A finished run that looks lost is answered by one run that refuses, never by a chain of them.
    answers = {r["id"]: r for r in live.runs() if r["parameters"].get("resumes")}
    resumed = [answers.get(r["parameters"]["resumes"]) for r in answers.values()]
    assert [run for run in resumed if run and run["state_name"] == "Skipped"] == []
