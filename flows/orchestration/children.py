"""Child processes of a task, and why they failed."""

from __future__ import annotations

from typing import Any

from prefect import get_run_logger, runtime

from flows.core.process import CommandFailed
from flows.core.redact import redact
from rfdetr.errors import RFDETRError


class StageFailedError(RFDETRError):
    """A stage of the pipeline ended with an error; the text names the stage and the cause."""


def flow_run_name() -> str | None:
    return runtime.flow_run.name if runtime.flow_run.id else None


def log_line() -> Any:
    """Lines of a child process as log records of the run, without secrets."""
    logger = get_run_logger()
    return lambda line: logger.info("%s", redact(line))


def cause(stage: str, error: CommandFailed) -> str:
    """The stage's own last words: from the line that says it failed to DVC's."""
    name, tail = stage.partition("@")[0], error.tail
    starts = [i for i, line in enumerate(tail) if line.startswith(f"{name} failed:")]
    words = tail[starts[-1] :] if starts else tail[-5:]
    ends = [i for i, line in enumerate(words) if line.startswith("ERROR: failed to reproduce")]
    said = "\n".join(words[: ends[0]] if ends and ends[0] else words)
    return said if error.reason.startswith("failed") else f"it {error.reason}\n{said}"
