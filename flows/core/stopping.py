"""How a process ends on Ctrl-C, SIGTERM or a closed terminal: soon, and with all its children.

The first signal raises an exception, so that children save their state and `finally` blocks run. In
a command, a second Ctrl-C or the end of a time limit kills every process below it, and ends it.
When nothing runs below it any more, little is left to do: a longer wait is one for a dead server.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

import psutil

from rfdetr.progress import EpochProgress

INTERRUPT_SECONDS = 8.0  # from Ctrl-C to the end of the command
TERMINATE_SECONDS = 600.0  # from SIGTERM or SIGHUP: `runtime.grace_s` ends the trainers before
ALONE_SECONDS = 10.0  # from the end of the last process below a command that was told to stop
SAME_SECONDS = 0.5  # a wrapper such as `make` or `uv run` may pass on the Ctrl-C of the terminal

_received: list[int] = []
_handler: Callable[[int, FrameType | None], None] | None = None  # of a command
_reached: EpochProgress | None = None


class Terminated(SystemExit):
    """SIGTERM or SIGHUP arrived: the process cleans up and exits with 128 + its number."""

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__(128 + number)


def exit_on_sigterm() -> None:
    """Turn SIGTERM into the exception `Terminated`, so that `finally` blocks run."""

    def handler(number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated(number)

    signal.signal(signal.SIGTERM, handler)


def stop_on_signals() -> None:
    """Install the handlers of a command: SIGINT raises KeyboardInterrupt, the others Terminated.

    A signal that the process was started to ignore (`nohup`, a background job) stays ignored.
    """
    global _handler  # noqa: PLW0603 - signals belong to the process
    started = 0.0

    def end(status: int) -> None:
        say_last_words()
        below = [process.pid for process in _below(os.getpid())]
        sys.setswitchinterval(60)  # no other thread may act on the death of its children
        for pid in below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        os._exit(status)

    def limit(status: int, seconds: float) -> None:
        until, alone = time.monotonic() + seconds, 0.0
        while time.monotonic() < until and alone < ALONE_SECONDS:
            time.sleep(0.5)
            alone = 0.0 if _below(os.getpid()) else alone + 0.5
        end(status)

    def handler(number: int, _frame: FrameType | None) -> None:
        nonlocal started
        if _received:
            if number == signal.SIGINT and time.monotonic() - started > SAME_SECONDS:
                end(128 + number)
            return
        _received.append(number)
        started = time.monotonic()
        seconds = INTERRUPT_SECONDS if number == signal.SIGINT else TERMINATE_SECONDS
        threading.Thread(target=limit, args=(128 + number, seconds), daemon=True).start()
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)
    _handler = handler


def reclaim_sigterm() -> None:
    """Handle SIGTERM again as `stop_on_signals` said; Prefect takes it over during a flow run.

    Its handler reports every step of the crash, where one sentence is enough.
    """
    if _handler is not None and signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
        signal.signal(signal.SIGTERM, _handler)


def note_progress(line: str) -> None:
    """Remember the epoch that a line of output reports, for the last words."""
    global _reached  # noqa: PLW0603 - what this process has seen
    _reached = EpochProgress.parse(line) or _reached


def say_last_words() -> None:
    """One sentence on standard error: how far the command came, and how to resume."""
    where = "" if _reached is None else f" after epoch {_reached.epoch} of {_reached.of}"
    with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
        print(f"\nstopped{where}; run the same command to resume", file=sys.stderr, flush=True)


def stopping() -> bool:
    """Whether this command was told to stop."""
    return bool(_received)


def stopped_status() -> int | None:
    """The exit status of a command that was told to stop; None for another one."""
    return 128 + _received[0] if _received else None


def in_a_hurry() -> bool:
    """Whether the user of this command pressed Ctrl-C and waits."""
    return signal.SIGINT in _received


def kill_below(pid: int) -> None:
    """SIGKILL to every descendant of a process, whatever its process group or session is."""
    for process in _below(pid):
        with contextlib.suppress(psutil.Error):
            process.kill()


def _below(pid: int) -> list[psutil.Process]:
    try:
        found = psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        found = []
    return [process for process in found if not _is_dead(process)]


def _is_dead(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
