"""Children: lines, failures, limits, signals, and no orphan, counted by pid."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from flows.core.process import CommandFailed, run_streaming
from flows.core.stopping import Terminated, exit_on_sigterm


def python(code: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code)]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_for(condition, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


# A leader with a stubborn grandchild: both ignore SIGINT; pids go to a file.
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open({pids!r} + ".tmp", "w") as f: f.write(f"{{os.getpid()}} {{child.pid}}")
os.replace({pids!r} + ".tmp", {pids!r})
print("ready", flush=True)
time.sleep(600)
"""


def pids_of(path: Path) -> list[int]:
    assert wait_for(path.exists)
    return [int(pid) for pid in path.read_text().split()]


def test_lines_of_both_streams_arrive_in_order_and_live() -> None:
    times: list[tuple[str, float]] = []
    run_streaming(
        python("""
            import sys, time
            print("one"); time.sleep(0.7); print("two", file=sys.stderr)
            sys.stdout.write("10%\\r20%\\r"); sys.stdout.write("süß without newline")
        """),
        lambda line: times.append((line, time.monotonic())),
    )
    assert [line for line, _ in times] == ["one", "two", "10%", "20%", "süß without newline"]
    assert times[1][1] - times[0][1] > 0.4


def test_failure_tells_status_command_and_the_last_thirty_lines() -> None:
    with pytest.raises(CommandFailed) as caught:
        run_streaming(python("for i in range(50): print('line', i)\nraise SystemExit(7)"), print)
    error = caught.value
    assert error.returncode == 7
    assert error.tail == [f"line {i}" for i in range(20, 50)]
    assert "exit status 7" in str(error)
    assert "line 49" in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert (again.returncode, again.tail, str(again)) == (7, error.tail, str(error))


def test_a_missing_program_is_a_command_failure() -> None:
    with pytest.raises(CommandFailed, match="could not be started"):
        run_streaming(["no-such-program-here"], print)


def test_death_by_signal_is_named() -> None:
    with pytest.raises(CommandFailed, match="killed by signal 9") as caught:
        run_streaming(python("import os; os.kill(os.getpid(), 9)"), print)
    assert caught.value.returncode == -9


def test_time_limit_stops_a_child_that_keeps_talking() -> None:
    start = time.monotonic()
    with pytest.raises(CommandFailed, match="time limit of 1 s"):
        run_streaming(
            python("import time\nwhile True: print('x'); time.sleep(0.05)"),
            lambda line: None,
            timeout=1,
            grace=5,
        )
    assert time.monotonic() - start < 30


def test_silence_limit_stops_a_silent_child_and_its_group(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    with pytest.raises(CommandFailed, match="no sign of life for 3 s"):
        run_streaming(
            python(STUBBORN.format(pids=str(pids))),
            lambda line: None,
            silence_timeout=3,
            grace=0.5,
        )
    assert wait_for(lambda: not any(alive(pid) for pid in pids_of(pids)))


def test_a_changing_watched_file_is_a_sign_of_life(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    code = f"""
        import time, pathlib
        for i in range(12):
            pathlib.Path({str(file)!r}).write_text(str(i))
            time.sleep(0.35)
    """
    run_streaming(python(code), lambda line: None, silence_timeout=3, watched=[file])


def test_an_exception_in_the_reader_stops_the_group_with_sigint_first(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    code = f"""
        import pathlib, time
        try:
            print("go", flush=True)
            time.sleep(600)
        except KeyboardInterrupt: pathlib.Path({str(mark)!r}).write_text("graceful")
    """

    def stop(line: str) -> None:
        raise Terminated

    with pytest.raises(Terminated):
        run_streaming(python(code), stop, grace=10)
    assert mark.read_text() == "graceful"


def test_what_the_child_leaves_in_its_group_is_killed(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    code = f"""
        import subprocess, sys, pathlib
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        pathlib.Path({str(pids)!r}).write_text(str(child.pid))
    """
    start = time.monotonic()
    run_streaming(python(code), lambda line: None)
    assert time.monotonic() - start < 10
    assert wait_for(lambda: not any(alive(pid) for pid in pids_of(pids)))


def heed_signals() -> None:
    """These tests may run as a background job or under nohup, which ignore SIGINT and SIGHUP."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_a_background_job_can_still_stop_its_child_gracefully() -> None:
    """A shell starts background jobs with SIGINT ignored; children must not inherit that."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        lines: list[str] = []
        run_streaming(python("import signal; print(signal.getsignal(signal.SIGINT))"), lines.append)
    finally:
        signal.signal(signal.SIGINT, before)
    assert "default_int_handler" in lines[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_orphan_when_the_parent_gets_a_signal(tmp_path: Path, number: int) -> None:
    """kill -9 included: the child is tied to its parent and ends itself."""
    pids = tmp_path / "pids"
    child = f"""
import os, sys, time
from flows.core.process import die_with_parent
die_with_parent(grace=1)
open({str(pids)!r}, "w").write(str(os.getpid()))
time.sleep(600)
"""
    parent = f"""
import sys
from flows.core.process import run_streaming
from flows.core.stopping import exit_on_sigterm
exit_on_sigterm()
run_streaming([sys.executable, "-c", {child!r}], print, grace=2)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", parent], stderr=subprocess.DEVNULL, preexec_fn=heed_signals
    )
    assert wait_for(lambda: pids.exists() and pids.read_text() != "")
    os.kill(process.pid, number)
    code = process.wait(timeout=20)
    assert code == {signal.SIGTERM: 143, signal.SIGINT: -2, signal.SIGKILL: -9}[number]
    assert wait_for(lambda: not any(alive(pid) for pid in pids_of(pids)))


def test_a_child_that_ignores_sigterm_dies_after_its_parent(tmp_path: Path) -> None:
    """A rank that hangs in a collective cannot answer; its watch thread ends it."""
    pids = tmp_path / "pids"
    child = f"""
import os, signal, time
from flows.core.process import die_with_parent
die_with_parent(grace=0.5)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open({str(pids)!r}, "w").write(str(os.getpid()))
time.sleep(600)
"""
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]).wait()"
    process = subprocess.Popen([sys.executable, "-c", parent])
    assert wait_for(lambda: pids.exists() and pids.read_text() != "")
    process.kill()
    process.wait()
    assert wait_for(lambda: not any(alive(pid) for pid in pids_of(pids)))


def test_works_in_a_thread_and_survives_a_flood() -> None:
    count = 0

    def add(line: str) -> None:
        nonlocal count
        count += 1

    thread = threading.Thread(
        target=run_streaming, args=(python("for i in range(20000): print('x' * 80)"), add)
    )
    thread.start()
    thread.join(20)
    assert count == 20000


def test_sigterm_handler_raises_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        exit_on_sigterm()
        with pytest.raises(Terminated) as caught:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        assert caught.value.code == 143
    finally:
        signal.signal(signal.SIGTERM, before)
