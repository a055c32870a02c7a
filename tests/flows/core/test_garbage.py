from __future__ import annotations

import subprocess
import sys

CYCLE = """
import sys
from flows.core.garbage import exit_quickly
class Part:
    def __del__(self): print("collected")
part = Part()
part.itself = part
if sys.argv[1:]: exit_quickly()
del part
"""


def test_a_process_ends_without_a_last_collection() -> None:
    def output(*arguments: str) -> str:
        command = [sys.executable, "-c", CYCLE, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert output() == "collected\n"
    assert output("quickly") == ""
