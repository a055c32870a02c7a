"""Freed memory stays in the process: counted as page faults of a separate process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from rfdetr.training import allocator
kept = allocator.keep_freed_memory() if sys.argv[1] == "keep" else None
def step():
    blocks = [torch.ones(16 << 20) for _ in range(3)]
for _ in range(4):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 20 * 3 * (64 << 20) // 4096  # of twenty steps

pytestmark = pytest.mark.skipif(
    not (sys.platform.startswith("linux") and os.confstr("CS_GNU_LIBC_VERSION")),
    reason="needs glibc",
)


def run(mode: str, **variables: str) -> tuple[str, int]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", PROGRAM, mode]
    done = subprocess.run(
        command, env=environment | variables, capture_output=True, text=True, check=True
    )
    kept, faults = done.stdout.split()
    return kept, int(faults)


def test_steps_reuse_their_memory() -> None:
    kept, faults = run("keep")
    assert kept == "True"
    assert faults < PAGES / 10  # the heap may still grow by a few of the sixty blocks
    assert run("plain")[1] > PAGES / 2


def test_settings_of_the_user_stay() -> None:
    kept, faults = run("keep", MALLOC_MMAP_THRESHOLD_="65536")
    assert kept == "False"
    assert faults > PAGES / 2
