"""Bad input stops the flow early, names stage and cause, and leaves the champion alone."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from flows.registry.registry import Registry
from tests.flows.prefect_fixtures import Retrained
from tests.flows.projects import run, set_params

pytestmark = pytest.mark.slow  # several complete flow runs


def champion(project: Retrained) -> int | None:
    return Registry("tiny", project.uri).aliases().get("champion")


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


def test_a_broken_dataset_stops_before_training(retrained: Retrained, tmp_path: Path) -> None:
    project = retrained.copy(tmp_path)
    shutil.copytree(project.root / "data/demo", project.root / "data/bad")
    file = project.root / "data/bad/train/_annotations.coco.json"
    file.unlink()
    document = json.loads((project.root / "data/demo/train/_annotations.coco.json").read_text())
    document["annotations"][0]["category_id"] = 99
    file.write_text(json.dumps(document))
    run(project.root, "dvc", "add", "data/bad")
    set_params(project.root, dataset={"name": "bad", "dir": "data/bad"})
    done = project.pipeline("retrain", check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()
    assert any(line.startswith("error: stage validate failed: ") for line in last)
    assert "99" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    ended = retrained.server.last_run()
    assert ended["state"]["type"] == "FAILED"
    assert "stage validate failed" in ended["state"]["message"]
    assert retrained.server.states(ended["id"])["validate"] == "Failed"
    assert "fit" not in retrained.server.states(ended["id"])
    assert "99" in retrained.server.artifacts(ended["id"])["dataset-report"]
    assert champion(project) == 1
    told = [post for post in retrained.webhook.posts if post.get("run_id") == ended["id"]]
    assert [post["subject"] for post in told] == [f"{ended['name']} failed"]
    assert "stage validate failed" in told[0]["text"]


def test_a_malicious_checkpoint_is_named_and_runs_nothing(
    retrained: Retrained, tmp_path: Path
) -> None:
    project = retrained.copy(tmp_path)
    mark = tmp_path / "executed"
    with zipfile.ZipFile(project.root / "weights/evil.pth", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"model": Evil(mark)}, protocol=2))
        archive.writestr("archive/version", "3\n")
    set_params(project.root, convert={"source": "weights/evil.pth"})
    done = project.pipeline("retrain", check=False)
    assert done.returncode == 1
    assert "stage convert failed: " in done.stderr
    assert "weights/evil.pth" in done.stderr.partition("stage convert failed: ")[2]
    assert not mark.exists()
    assert champion(project) == 1


def test_wrong_params_are_all_named_before_anything_starts(
    retrained: Retrained, tmp_path: Path
) -> None:
    project = retrained.copy(tmp_path)
    before = len(retrained.server.read("flow_runs"))
    done = project.pipeline("retrain", "--set", "fit.epochs=0", "--set", "fit.lrr=1", check=False)
    assert done.returncode == 1
    assert "fit.epochs" in done.stderr
    assert "fit.lrr" in done.stderr
    assert "Traceback" not in done.stderr
    set_params(project.root, fit={"epoch": 1, "lr": -1}, model={"resolution": 65})
    done = project.pipeline("retrain", check=False)
    assert "params.yaml has 3 mistakes" in done.stderr
    assert len(retrained.server.read("flow_runs")) == before
    assert champion(project) == 1


def test_a_gpu_that_is_not_there_is_said(retrained: Retrained, tmp_path: Path) -> None:
    """`runtime` is not a dependency of any stage; the changed number of epochs makes fit run."""
    project = retrained.copy(tmp_path)
    done = project.pipeline(
        "retrain", "--set", "runtime.accelerator=gpu", "--set", "fit.epochs=2", check=False
    )
    assert done.returncode == 1
    assert "stage fit failed: " in done.stderr
    assert "gpu" in done.stderr.lower().partition("stage fit failed: ")[2]
    assert champion(project) == 1


def test_a_stage_that_hangs_is_ended_and_said(retrained: Retrained, tmp_path: Path) -> None:
    project = retrained.copy(tmp_path)
    limits = ("--set", "runtime.stage_timeout_s=0.2", "--set", "validate.min_images=2")
    done = project.pipeline("retrain", *limits, check=False)
    assert done.returncode == 1
    assert "stopped after its time limit of 0.2 s" in done.stderr
    assert champion(project) == 1


def test_a_flow_that_a_worker_starts_logs_no_traceback(
    retrained: Retrained, tmp_path: Path
) -> None:
    """Without the command line: each flow by itself, with an error of the user."""
    project = retrained.copy(tmp_path)
    code = """
from flows.batch_predict import batch_predict
from flows.config.overrides import RetrainParams
from flows.drift_check import drift_check
from flows.retrain import retrain
from flows.rollback import rollback
for state in (
    retrain(RetrainParams(ref="v1"), return_state=True),
    rollback("a reason", to=9, return_state=True),
    drift_check("nowhere", return_state=True),
    batch_predict("--nowhere", "found", return_state=True),
):
    print(state.type.value)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=project.root, env=project.environment(), capture_output=True, text=True
    )
    assert done.stdout.split() == ["FAILED"] * 4, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for flow in ("rollback", "drift-check", "batch-predict"):
        assert re.search(rf"Flow run 'tiny-{flow}-\d{{4}}-\d\d-\d\d-\d{{4}}'", done.stderr), flow
    for text in ("git checkout v1", "has no version 9", "drift check failed: ", "nowhere"):
        assert text in done.stderr
