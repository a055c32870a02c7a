"""Every way of ending `rfdetr-pipeline retrain`, with Prefect's temporary server."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import time
from pathlib import Path

import psutil
import pytest

from tests.flows.commands import Command
from tests.flows.projects import environment, make_project, run

pytestmark = pytest.mark.slow  # several starts of the pipeline


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, migrated_database: Path) -> Path:
    """Many epochs, so that every test stops the same training and the next one resumes it."""
    root = make_project(tmp_path_factory.mktemp("stopped") / "project", fit={"epochs": 500})
    shutil.copyfile(migrated_database, root / "mlflow.db")
    run(root, "git", "init", "-q")
    return root


def retrain(root: Path) -> Command:
    known = environment(root, PREFECT_HOME=str(root.parent / "prefect"))
    known.pop("PREFECT_API_URL", None)
    command = Command(root, known, "retrain")
    command.wait_for(" left\n")
    names = " ".join(" ".join(process.cmdline()) for process in command.below())
    assert "temporary_server" in names
    assert "flows.fit_job.worker" in names
    return command


def statuses(root: Path) -> list[str]:
    with sqlite3.connect(root / "mlflow.db") as database:
        return [status for (status,) in database.execute("select status from runs")]


def require_one_sentence(text: str) -> None:
    """Nothing but lines of progress, and how far the training came."""
    lines = text.replace("^C", "").split("\n")
    told = [line for line in lines if line.strip() and " left" not in line]
    assert len(told) == 1, told
    assert told[0].startswith("stopped after epoch ")
    assert told[0].endswith(" of 500; run the same command to resume")


def test_ctrl_c_is_one_sentence_within_ten_seconds(project: Path) -> None:
    command = retrain(project)
    printed, started = len(command.text), time.monotonic()
    command.press_interrupt()
    assert command.end() == 130
    assert time.monotonic() - started < 10
    require_one_sentence(command.text[printed:])
    assert command.left() == []
    assert statuses(project) == ["KILLED"]


def test_a_second_ctrl_c_ends_at_once(project: Path) -> None:
    command = retrain(project)
    command.press_interrupt()
    time.sleep(1.0)
    started = time.monotonic()
    command.press_interrupt()
    assert command.end() == 130
    assert time.monotonic() - started < 2
    assert command.text.count("run the same command to resume") == 1
    assert "Traceback" not in command.text
    assert command.left() == []


@pytest.mark.parametrize("victims", ["command", "group", "everything"])
def test_sigterm_leaves_nothing(project: Path, victims: str) -> None:
    command = retrain(project)
    printed, started = len(command.text), time.monotonic()
    below = command.below() if victims == "everything" else []
    (os.killpg if victims == "group" else os.kill)(command.pid, signal.SIGTERM)
    for process in below:  # Prefect's server too, to which nothing can be reported then
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    assert command.end() == 143
    assert time.monotonic() - started < 40
    assert command.left() == []
    require_one_sentence(command.text[printed:])
    assert statuses(project) == ["KILLED"]


def test_a_closed_terminal_leaves_nothing(project: Path) -> None:
    command = retrain(project)
    command.close_terminal()
    assert command.end() == 128 + signal.SIGHUP
    assert command.left() == []
    assert statuses(project) == ["KILLED"]


def test_kill_9_leaves_nothing(project: Path) -> None:
    command = retrain(project)
    os.kill(command.pid, signal.SIGKILL)
    assert command.end() == -signal.SIGKILL
    assert command.left() == []
