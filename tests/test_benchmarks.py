"""The benchmark of all speed goals, small and on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_every_goal_gets_a_number() -> None:
    script = ROOT / "tests/benchmarks/bench_goals.py"
    done = subprocess.run(
        [sys.executable, script, "--smoke", "--modes", "eager"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert rows[0].startswith("| What | own, eager |")
    assert len(rows) == 11  # two batch sizes of nano are one here
    for row in rows[1:]:
        assert float(row.split("|")[2]) > 0, row
