"""The fit stage as a process: stopped, killed, resumed, locked out, out of disk space."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.config.environment import FIT_RETRY
from rfdetr.progress import EpochProgress
from tests.flows.mlflow_fixtures import runs
from tests.flows.projects import environment, make_project, run, write_params

EPOCHS = 12  # enough that the training outlives the requests to stop
STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose stages before fit have run."""
    root = make_project(tmp_path_factory.mktemp("fit") / "project")
    for command in (
        ("flows.stages.demo",),
        ("flows.stages.validate",),
        ("flows.stages.convert",),
    ):
        run(root, "python", "-m", *command)
    return root


@pytest.fixture(scope="module")
def project(ready: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(ready, tmp_path_factory.mktemp("resume") / "project", fit={"epochs": EPOCHS})


def copied(ready: Path, root: Path, **changes: dict) -> Path:
    shutil.copytree(ready, root)
    write_params(root, **changes)
    return root


def start(root: Path, limit: Callable[[], None] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "flows.stages.fit"],
        cwd=root,
        env=environment(root),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=limit,
    )


def epochs(process: subprocess.Popen[str], until: int = 10**6) -> list[int]:
    """Numbers of the epochs that the process reports, up to `until` or its end."""
    found: list[int] = []
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="")
        if progress := EpochProgress.parse(line):
            found.append(progress.epoch)
            if found[-1] >= until:
                break
    return found


def trainers(root: Path) -> list[int]:
    """Living processes that train in the state folder of `root`."""
    mark = f"flows.fit_job.worker\0{root.parent / 'state'}".encode()
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark in file.read_bytes():
                found.append(int(file.parent.name))
        except OSError:
            continue
    return found


def gone(root: Path, seconds: float = 40.0) -> bool:
    end = time.monotonic() + seconds
    while trainers(root) and time.monotonic() < end:
        time.sleep(0.1)
    return not trainers(root)


def state_of(root: Path) -> Path:
    (folder,) = (root.parent / "state" / "fit").iterdir()
    return folder


def test_stopped_and_killed_runs_resume_in_the_same_folder_and_run(project: Path) -> None:
    """SIGTERM after epoch 1, kill -9 after epoch 2; the third start finishes."""
    seen: list[int] = []
    keys = set()
    for number, until in ((signal.SIGTERM, 1), (signal.SIGKILL, 2)):
        process = start(project)
        seen += epochs(process, until)
        if number == signal.SIGTERM:
            second = run(project, "python", "-m", "flows.stages.fit", check=False)
            assert second.returncode == 1
            assert f"pid {process.pid} on" in second.stderr
        os.kill(process.pid, number)
        seen += epochs(process)
        assert process.wait(60) == STATUS[number]
        assert gone(project)
        state = state_of(project)
        assert (state / "last.ckpt").exists()
        assert not (project / "models" / "trained").exists()
        keys.add(json.loads((state / "journal.json").read_text())["key"])
    assert json.loads((state_of(project) / "run.json").read_text())["attempts"] == 1
    process = start(project)
    seen += epochs(process)
    assert process.wait(60) == 0
    assert max(seen) == EPOCHS  # the line of an epoch at whose end the stop came may be missing
    assert json.loads((project / "metrics/fit.json").read_text())["epochs"] == EPOCHS
    rows = (project / "plots/fit.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["epoch", *map(str, range(1, EPOCHS + 1))]
    keys.add(json.loads((state_of(project) / "journal.json").read_text())["key"])
    assert len(keys) == 1


def test_a_killed_trainer_leaves_no_running_record(
    ready: Path, tmp_path: Path, tracking_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 of the trainers; the stage, which is still there, closes their run."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    project = copied(ready, tmp_path / "project", fit={"epochs": EPOCHS})
    process = start(project)
    epochs(process, 1)
    for pid in trainers(project):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    epochs(process)
    assert process.wait(60) == 1
    (record,) = runs(tracking_uri)
    assert record.info.status == "FAILED"


def test_a_finished_training_is_not_repeated(project: Path) -> None:
    """Runs after the test above: the clone may have died before its outs were cached."""
    for name in ("models/trained/model.pth", "metrics/fit.json", "plots/fit.csv"):
        (project / name).unlink()
    done = run(project, "python", "-m", "flows.stages.fit")
    assert "already trained" in done.stdout
    assert (project / "models/trained/model.pth").exists()
    assert (project / "metrics/fit.json").exists()


def test_a_full_disk_is_named_and_the_training_can_be_retried(ready: Path, tmp_path: Path) -> None:
    """`rfdetr-pipeline fit --retry` sets the variable that forgets failed attempts."""
    root = copied(ready, tmp_path / "project", fit={"epochs": 1})

    def no_large_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    process = start(root, no_large_files)
    assert process.stdout is not None
    text = process.stdout.read()
    assert process.wait(60) == 1
    assert "fit failed" in text
    assert "no space left on the device" in text.splitlines()[-1]
    assert "Traceback" not in text
    assert not (root / "models" / "trained").exists()
    assert not list(state_of(root).glob("*.tmp"))
    record = state_of(root) / "run.json"
    content = json.loads(record.read_text())
    failed = {"attempts": 3, "epochs_at_start": content["finished_epochs"]}
    record.write_text(json.dumps(content | failed))
    refused = run(root, "python", "-m", "flows.stages.fit", check=False)
    assert "run `rfdetr-pipeline fit --retry`" in refused.stderr
    assert run(root, "python", "-m", "flows.stages.fit", **{FIT_RETRY: "1"}).returncode == 0


@pytest.mark.slow
def test_two_processes_keep_the_effective_batch_and_end_together(
    ready: Path, tmp_path: Path
) -> None:
    root = copied(ready, tmp_path / "project", runtime={"devices": 2}, fit={"epochs": 3})
    process = start(root)
    epochs(process, 1)
    ranks = [p for p in trainers(root) if "flows.fit_job.launcher" not in _command(p)]
    assert len(ranks) == 2
    os.kill(ranks[-1], signal.SIGKILL)
    started = time.monotonic()
    epochs(process)
    assert process.wait(90) == 1
    assert time.monotonic() - started < 60
    assert gone(root)
    again = start(root)
    assert epochs(again)[-1] == 3
    assert again.wait(60) == 0
    card = json.loads((root / "models/trained/model.json").read_text())
    batch = {"batch_size": 2, "grad_accum_steps": 1, "world": 2, "effective": 4}
    assert card["params"]["batch"] == batch


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
