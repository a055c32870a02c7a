"""Runs a child process, streams its lines, enforces time limits, and leaves no orphan.

On Linux, parent-death signals tie children to their parents: when the flow, DVC or torchrun is
killed, so is the trainer. `run_streaming` covers exceptions and signals, `die_with_parent` covers
`kill -9`.
"""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import os
import selectors
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Self

from flows.core.redact import redact
from flows.core.stopping import in_a_hurry, kill_below
from rfdetr.errors import RFDETRError

PR_SET_PDEATHSIG = 1
TAIL_LINES = 30
WAKE_SECONDS = 0.2
DRAIN_SECONDS = 5.0
HURRY = (4.0, 1.5)  # seconds after the first and the second SIGINT, if the user waits
LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

Line = Callable[[str], None]


class CommandFailed(RFDETRError):  # noqa: N818 - reads as what happened
    """A child failed, or was stopped because it exceeded a limit.

    `returncode` is negative for a signal, `tail` holds the last lines, `reason` says what happened.
    Secrets are masked, because the text is logged and sent to Prefect.
    """

    transient = True

    def __init__(self, cmd: Sequence[str], returncode: int, tail: Sequence[str], reason: str):
        self.cmd, self.returncode, self.tail, self.reason = (
            [redact(word) for word in cmd],
            returncode,
            [redact(line) for line in tail],
            reason,
        )
        last = "\n".join(f"  {line}" for line in self.tail) or "  (no output)"
        super().__init__(f"`{shlex.join(self.cmd)}` {reason}. Last lines:\n{last}")

    def __reduce__(self) -> tuple[type, tuple[list[str], int, list[str], str]]:
        return type(self), (self.cmd, self.returncode, self.tail, self.reason)


def terminate_with(parent: int) -> None:
    """Have the kernel send this process SIGTERM when `parent` dies (Linux).

    For use between fork and exec: it makes two system calls and allocates nothing.
    """
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)


def signal_group(group: int, number: int) -> None:
    """Send a signal to a process group, if it still exists."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def die_with_parent(*, grace: float = 60.0) -> None:
    """Get SIGTERM when the parent dies, and SIGKILL `grace` seconds later.

    A thread that watches the parent's pid sends the second signal: a process may hang in a
    collective, and not every system has parent-death signals. Call it first in `main`.
    """
    parent = os.getppid()
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        if LIBC is None:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def run_streaming(
    cmd: Sequence[str],
    on_line: Line,
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    timeout: float | None = None,
    silence_timeout: float | None = None,
    watched: Sequence[Path] = (),
    grace: float = 30.0,
) -> list[str]:
    """Run `cmd` in its own process group and pass each line of its output to `on_line`.

    `timeout` limits the duration in seconds, `silence_timeout` the seconds without a line of
    output and without a change of one of the `watched` files. When a limit is exceeded, or on any
    exception, the group gets SIGINT and, after `grace` seconds, SIGKILL. Returns the last lines;
    raises CommandFailed.
    """
    with _Group(_start(cmd, env, cwd), on_line, grace) as group:
        limits = _Limits(timeout, silence_timeout, watched)
        reason = None
        while not group.leader_ended() and not reason:
            if group.output.read(WAKE_SECONDS):
                limits.heard()
            reason = limits.exceeded()
        if reason:
            group.stop()
        group.kill()
        group.output.drain()
        code = group.child.wait()
    if code and not reason:
        reason = f"was killed by signal {-code}" if code < 0 else f"failed with exit status {code}"
    if reason:
        raise CommandFailed(cmd, code, group.output.tail, reason)
    return list(group.output.tail)


def _start(
    cmd: Sequence[str], env: Mapping[str, str] | None, cwd: str | os.PathLike[str] | None
) -> subprocess.Popen[bytes]:
    parent = os.getpid()

    def tie() -> None:
        # A background job (`&`, nohup) ignores SIGINT, and its children would inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        terminate_with(parent)

    try:
        return subprocess.Popen(
            list(cmd),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env={**(os.environ if env is None else env), "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
            preexec_fn=tie,  # noqa: PLW1509 - two system calls, prepared before the fork
        )
    except OSError as error:
        raise CommandFailed(cmd, 127, [str(error)], "could not be started") from error


class _Output:
    """Splits a pipe into lines at newline and carriage return, and keeps the last ones."""

    def __init__(self, pipe: IO[bytes] | None, on_line: Line) -> None:
        assert pipe is not None
        self.pipe, self.on_line = pipe, on_line
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.closed = False
        self._text = ""
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._selector = selectors.DefaultSelector()
        self._selector.register(pipe, selectors.EVENT_READ)
        os.set_blocking(pipe.fileno(), False)

    def read(self, seconds: float) -> bool:
        """Wait up to `seconds` for output and pass it on. True if there was any."""
        if self.closed:
            time.sleep(seconds)
            return False
        if not self._selector.select(seconds):
            return False
        data = os.read(self.pipe.fileno(), 1 << 16)
        self.closed = not data
        self._pass_on(self._decode(data, final=self.closed), last=self.closed)
        return bool(data)

    def drain(self) -> None:
        """Pass on what is in the pipe now, without waiting for a grandchild that keeps it open."""
        deadline = time.monotonic() + DRAIN_SECONDS
        while not self.closed and time.monotonic() < deadline and self.read(0):
            pass
        self._pass_on("", last=True)

    def close(self) -> None:
        self._selector.close()
        self.pipe.close()

    def _pass_on(self, text: str, *, last: bool) -> None:
        *lines, self._text = (self._text + text).replace("\r", "\n").split("\n")
        if last:
            lines.append(self._text)
            self._text = ""
        for line in lines:
            if line.strip():
                self.tail.append(line.rstrip())
                self.on_line(line.rstrip())


class _Limits:
    def __init__(
        self, timeout: float | None, silence: float | None, watched: Sequence[Path]
    ) -> None:
        self.timeout, self.silence, self.watched = timeout, silence, watched
        self.start = self.last = time.monotonic()
        self.seen = self._times()

    def heard(self) -> None:
        self.last = time.monotonic()

    def exceeded(self) -> str | None:
        """The limit that the child exceeded, if any."""
        now = time.monotonic()
        if self.timeout is not None and now - self.start > self.timeout:
            return f"was stopped after its time limit of {self.timeout:g} s"
        if self.silence is None or now - self.last <= self.silence:
            return None
        if (times := self._times()) != self.seen:
            self.seen, self.last = times, now
            return None
        return f"was stopped: no sign of life for {self.silence:g} s"

    def _times(self) -> list[int]:
        return [path.stat().st_mtime_ns if path.exists() else 0 for path in self.watched]


def _unheard(_line: str) -> None:
    """What children print while they are stopped on request interests nobody."""


class _Group:
    """A child with its process group. The group is dead when the block ends, whatever happens."""

    def __init__(self, child: subprocess.Popen[bytes], on_line: Line, grace: float) -> None:
        self.child, self.grace = child, grace
        self.output = _Output(child.stdout, on_line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        try:
            if error is not None:
                if not isinstance(error, Exception):  # a request to stop
                    self.output.on_line = _unheard
                self.stop()
        finally:
            self.kill()
            self.child.wait()
            self.output.close()

    def stop(self) -> None:
        """SIGINT to the group (DVC ignores it and waits for its child), SIGKILL after `grace`.

        After Ctrl-C, a second SIGINT comes soon, on which the child stops waiting for its own.
        """
        limits = HURRY if in_a_hurry() else (self.grace,)
        for seconds in limits:
            self._signal(signal.SIGINT)
            self._wait(seconds)
        self.kill()

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.leader_ended():
            with contextlib.suppress(Exception):  # a failing on_line must not keep children
                self.output.read(WAKE_SECONDS)

    def kill(self) -> None:
        if self.child.returncode is None:
            kill_below(self.child.pid)
        self._signal(signal.SIGKILL)

    def leader_ended(self) -> bool:
        """Whether the child ended. It stays a zombie, so that its group id cannot be reused."""
        if self.child.returncode is not None:
            return True
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.child.pid, flags) is not None

    def _signal(self, number: int) -> None:
        if self.child.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.child.pid, number)
