"""Signals of a command: an orderly end, an end by force, and what happens to its processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.flows.core.test_process import alive, heed_signals, wait_for

# A command whose child, in a session of its own, ignores requests to stop.
COMMAND = """
import os, subprocess, sys, time
from flows.core import stopping
stopping.INTERRUPT_SECONDS = {limit}
stopping.ALONE_SECONDS = 1.0
stopping.stop_on_signals()
stopping.note_progress("epoch 1/6  loss 4.0000  mAP 0.5000  10s left")
child = subprocess.Popen(
    ["sh", "-c", "trap '' INT TERM; while :; do sleep 0.1; done"], start_new_session=True
)
try:
    open({pids!r}, "w").write(str(child.pid))
    time.sleep(600)
except BaseException as error:
    print(type(error).__name__, flush=True)
    {then}
"""


class Command:
    def __init__(self, folder: Path, then: str, limit: float = 60.0, ignored: int = 0) -> None:
        pids = folder / "pids"
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMAND.format(pids=str(pids), then=then, limit=limit)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: (
                signal.signal(ignored, signal.SIG_IGN) if ignored else heed_signals()
            ),
        )
        assert wait_for(lambda: pids.exists() and pids.read_text() != "")
        self.child = int(pids.read_text())

    def signal(self, *numbers: int) -> float:
        """Send the signals, each when the one before was handled; seconds to the end."""
        for position, number in enumerate(numbers):
            if position:
                time.sleep(0.7)
            started = time.monotonic()
            os.kill(self.process.pid, number)
        self.output, self.errors = self.process.communicate(timeout=20)
        return time.monotonic() - started


WAIT = "child.wait()"
END = "child.kill(); stopping.say_last_words(); sys.exit(getattr(error, 'code', 130))"


@pytest.mark.parametrize(
    ("number", "name", "status"),
    [
        (signal.SIGINT, "KeyboardInterrupt", 130),
        (signal.SIGTERM, "Terminated", 143),
        (signal.SIGHUP, "Terminated", 129),
    ],
)
def test_the_first_signal_lets_the_command_end_in_order(
    tmp_path: Path, number: int, name: str, status: int
) -> None:
    command = Command(tmp_path, END)
    command.signal(number)
    assert command.process.returncode == status
    assert command.output.split() == [name]
    said = "stopped after epoch 1 of 6; run the same command to resume"
    assert command.errors.split("\n") == ["", said, ""]


def test_a_second_interrupt_ends_everything_at_once(tmp_path: Path) -> None:
    command = Command(tmp_path, WAIT)
    assert command.signal(signal.SIGINT, signal.SIGINT) < 3
    assert command.process.returncode == 130
    assert "stopped after epoch 1 of 6" in command.errors
    assert "Traceback" not in command.errors
    assert wait_for(lambda: not alive(command.child))


def test_the_same_interrupt_passed_on_by_a_wrapper_counts_once(tmp_path: Path) -> None:
    command = Command(tmp_path, f"time.sleep(0.4); {END}")  # it is still there for the second one
    os.kill(command.process.pid, signal.SIGINT)
    command.signal(signal.SIGINT)
    assert command.output.split() == ["KeyboardInterrupt"]
    assert command.process.returncode == 130


def test_a_child_that_does_not_end_is_killed_after_the_limit(tmp_path: Path) -> None:
    command = Command(tmp_path, WAIT, limit=1.0)
    assert command.signal(signal.SIGINT) < 5
    assert command.process.returncode == 130
    assert "run the same command to resume" in command.errors
    assert wait_for(lambda: not alive(command.child))


def test_a_command_without_processes_does_not_wait_for_a_dead_server(tmp_path: Path) -> None:
    """Its child has ended, and was not waited for; Prefect would retry for a minute."""
    command = Command(tmp_path, "child.kill(); time.sleep(60)")
    assert command.signal(signal.SIGTERM) < 5
    assert command.process.returncode == 143
    assert "run the same command to resume" in command.errors


def test_a_signal_ignored_from_the_start_stays_ignored(tmp_path: Path) -> None:
    """`nohup` and background jobs."""
    command = Command(tmp_path, END, ignored=signal.SIGHUP)
    command.signal(signal.SIGHUP, signal.SIGTERM)
    assert command.process.returncode == 143
