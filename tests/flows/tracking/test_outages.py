"""Prefect or MLflow unreachable before, during and after training: nothing is repeated or lost."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from flows.registry.registry import Registry
from rfdetr.progress import EpochProgress
from tests.flows.mlflow_fixtures import MlflowServer, runs
from tests.flows.prefect_fixtures import PrefectServer, Retrained
from tests.flows.projects import run, set_params

pytestmark = pytest.mark.slow


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[PrefectServer]:
    server = PrefectServer(tmp_path / "prefect")
    yield server
    server.kill()


def test_prefect_dies_while_training(
    retrained: Retrained, own_server: PrefectServer, tmp_path: Path
) -> None:
    project = replace(retrained.copy(tmp_path / "copy"), server=own_server)
    set_params(project.root, fit={"epochs": 2})
    own_server.start()
    flow = subprocess.Popen(
        [sys.executable, "-u", "-m", "flows.cli.main", "retrain"],
        cwd=project.root,
        env=project.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert flow.stdout is not None
    assert any("training in" in line for line in flow.stdout)
    own_server.kill()
    flow.communicate()
    assert json.loads((project.root / "metrics/fit.json").read_text())["epochs"] == 2
    own_server.start()
    done = project.pipeline("retrain")
    assert "training in" not in done.stdout + done.stderr
    assert len(Registry("tiny", project.uri).versions()) == 2
    assert run(project.root, "dvc", "status").stdout.strip().endswith("up to date.")


def test_prefect_is_unreachable_before_the_run(retrained: Retrained, tmp_path: Path) -> None:
    """The stages need no server; the flow that comes later finds them done."""
    project = replace(retrained.copy(tmp_path), server=PrefectServer(tmp_path / "stopped"))
    set_params(project.root, fit={"epochs": 2})
    done = project.pipeline("retrain", check=False)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert project.server.url in done.stderr
    assert project.pipeline("evaluate").returncode == 0
    assert json.loads((project.root / "metrics/fit.json").read_text())["epochs"] == 2


@pytest.mark.parametrize("moment", ["before", "during", "after"])
def test_an_outage_of_mlflow_loses_nothing(
    retrained: Retrained,
    mlflow_server: MlflowServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    """fit and evaluate end well; registering works when the server is back."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    project = retrained.copy(tmp_path / "copy")
    set_params(project.root, fit={"epochs": 3})
    if moment != "before":
        mlflow_server.start()
    stages = subprocess.Popen(
        [sys.executable, "-u", "-m", "flows.cli.main", "evaluate"],
        cwd=project.root,
        env=project.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert stages.stdout is not None
    if moment == "during":
        assert any(map(EpochProgress.parse, stages.stdout))
        mlflow_server.kill()
    stages.communicate()
    assert stages.returncode == 0
    mlflow_server.kill()
    refused = project.pipeline("register", check=False)
    assert refused.returncode == 1
    mlflow_server.start()
    project.pipeline("register")
    (record,) = [r for r in runs(mlflow_server.uri) if r.info.status == "FINISHED"]
    assert record.data.metrics["fit/epochs"] == 3
    assert record.data.params["fit.epochs"] == "3"
    assert [v.number for v in Registry("tiny", mlflow_server.uri).versions()] == [1]
    assert project.pipeline("sync").returncode == 0
