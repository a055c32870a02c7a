"""Stopping the local stack: only the process that holds the folder's lock is signalled."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra import stack

SUPERVISOR = """
import sys, time
from pathlib import Path
from infra import stack
with stack._only_supervisor(Path(sys.argv[1])):
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], text=True)
    yield process
    process.kill()
    process.wait()


def test_a_process_that_reuses_the_number_of_a_dead_supervisor_is_left_alone(
    tmp_path: Path, bystander: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("ready", stack.LOCK):
        (tmp_path / name).write_text(str(bystander.pid))
    assert stack.main(["--folder", str(tmp_path), "down"]) == 0
    assert "no stack is running" in capsys.readouterr().out
    assert bystander.poll() is None


def test_the_supervisor_is_stopped_and_a_second_one_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-c", SUPERVISOR, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout is not None
        assert supervisor.stdout.readline() == "ready\n"
        assert stack.main(["--folder", str(tmp_path), "up"]) == 1
        assert f"already running in {tmp_path}" in capsys.readouterr().err
        assert stack.supervisor_of(tmp_path) == supervisor.pid
        assert stack.main(["--folder", str(tmp_path), "down"]) == 0
        assert supervisor.wait() != 0
    assert stack.supervisor_of(tmp_path) is None
