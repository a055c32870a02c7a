"""`rfdetr-pipeline` as a process on a terminal of its own, and the processes below it."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class Command:
    """A command on a pseudo-terminal, in its foreground process group, as in a shell."""

    def __init__(self, root: Path, environment: Mapping[str, str], *arguments: str) -> None:
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.chdir(root)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            line = [sys.executable, "-u", "-m", "flows.cli.main", *arguments]
            os.execve(sys.executable, line, dict(environment))
        self.text = ""
        self.status: int | None = None
        self._seen: dict[tuple[int, float], psutil.Process] = {}

    def read(self, seconds: float = 0.05) -> None:
        """Take what the command prints within some seconds, and note the processes below it."""
        self.below()
        if self._terminal >= 0 and select.select([self._terminal], [], [], seconds)[0]:
            with contextlib.suppress(OSError):  # the command has closed the terminal
                data = os.read(self._terminal, 1 << 16)
                self.text += COLOURS.sub("", data.decode(errors="replace")).replace("\r", "")
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None

    def wait_for(self, mark: str, seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while mark not in self.text:
            self.read()
            assert self.status is None, f"ended before {mark!r}:\n{self.text}"
            assert time.monotonic() < end, f"no {mark!r}:\n{self.text}"

    def press_interrupt(self) -> None:
        """Ctrl-C: the terminal signals its foreground process group."""
        os.write(self._terminal, b"\x03")

    def close_terminal(self) -> None:
        os.close(self._terminal)
        self._terminal = -1

    def end(self, seconds: float = 240) -> int:
        """Wait for the exit status: negative for a signal, else what the command returned."""
        limit = time.monotonic() + seconds
        while self.status is None:
            self.read()
            if self._terminal < 0:
                time.sleep(0.05)
            assert time.monotonic() < limit, f"still running:\n{self.text}"
        for _ in range(20):
            self.read(0.02)
        return self.status

    def below(self) -> list[psutil.Process]:
        """The processes that were ever seen below this command and still run."""
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(self.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    self._seen[process.pid, process.create_time()] = process
        return [process for process in self._seen.values() if _runs(process)]

    def left(self, seconds: float = 20) -> list[str]:
        """Command lines of the processes that still run after some seconds."""
        end = time.monotonic() + seconds
        while self.below() and time.monotonic() < end:
            time.sleep(0.1)
        return [" ".join(process.cmdline()) for process in self.below()]


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
