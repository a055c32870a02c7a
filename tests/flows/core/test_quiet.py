"""Warnings of a command as its user sees them."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import warnings
from flows.core.quiet import readable_warnings
readable_warnings()
warnings.warn("3 images were skipped")
warnings.warn("The image has one colour: (0, 0, 0).")
warnings.warn("in a new release", FutureWarning)
"""


def test_a_warning_is_one_line_and_those_of_other_kinds_keep_their_place() -> None:
    command = [sys.executable, "-c", PROGRAM]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()
    assert lines == [
        "warning: 3 images were skipped",
        "<string>:7: FutureWarning: in a new release",
    ]
