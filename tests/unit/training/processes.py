"""Start `train_script.py` in separate processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
SCRIPT = Path(__file__).with_name("train_script.py")


def command(job: dict[str, Any], torchrun: int = 0) -> list[str]:
    launcher = [sys.executable]
    if torchrun:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={torchrun}"]
    job = {"config": {}, "trainer": {}, "do": ["fit"], **job}
    return [*launcher, str(SCRIPT), json.dumps(job, default=str)]


@contextmanager
def started(job: dict[str, Any], torchrun: int = 0) -> Iterator[subprocess.Popen[str]]:
    """A running training in a separate session, killed at the end in any case."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command(job, torchrun),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run(job: dict[str, Any], torchrun: int = 0, timeout: float = 150) -> tuple[int, str]:
    """(exit status, output) of a training."""
    with started(job, torchrun) as process:
        output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def wait_for(process: subprocess.Popen[str], text: str) -> str:
    """Output up to the line that contains `text`."""
    seen = []
    for line in process.stdout:
        seen.append(line)
        if text in line:
            return "".join(seen)
    raise AssertionError(f"{text!r} never came:\n{''.join(seen)}")


def group_is_gone(group: int, within: float) -> bool:
    """Whether every process of the session ends in time."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.2)
    return False
