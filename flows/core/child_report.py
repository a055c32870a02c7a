"""How a child process reports to its parent: that it ran, and why it failed.

The parent passes the path of a file in an environment variable. The child creates the file when it
starts, and writes its error message into it when it fails, so the parent need not parse the output.
The first line says whether a retry can help.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flows.core.errors import explain, is_transient

VARIABLE = "RFDETR_REPORT_FILE"
TRANSIENT, FINAL = "transient", "final"


@dataclass(frozen=True)
class ChildReport:
    """The parent's side: the file that the child writes."""

    file: Path

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables for the child."""
        return {VARIABLE: str(self.file)}

    @property
    def ran(self) -> bool:
        """Whether the child was started."""
        return self.file.exists()

    @property
    def error(self) -> str:
        """The child's error message; empty if it did not report one."""
        return self._text.partition("\n")[2]

    @property
    def transient(self) -> bool:
        """Whether a retry can help; so it is for a child that was killed before it could report."""
        return not self._text.startswith(FINAL)

    @property
    def _text(self) -> str:
        return self.file.read_text(encoding="utf-8") if self.ran else ""


@contextlib.contextmanager
def child_report() -> Iterator[ChildReport]:
    """A report file for one child process."""
    with tempfile.TemporaryDirectory(prefix="rfdetr-report-") as folder:
        yield ChildReport(Path(folder) / "report.txt")


def report_start() -> None:
    """Tell the parent, if it wants to know, that this process runs."""
    _write("")


def report_failure(prefix: str, error: Exception) -> None:
    """Print `prefix: message` on standard error, and tell the parent the message."""
    message = explain(error)
    print(f"{prefix}: {message}", file=sys.stderr)
    _write(f"{TRANSIENT if is_transient(error) else FINAL}\n{message}")


def _write(text: str) -> None:
    if file := os.environ.get(VARIABLE):
        with contextlib.suppress(OSError):  # the output has the message too
            Path(file).write_text(text, encoding="utf-8")
