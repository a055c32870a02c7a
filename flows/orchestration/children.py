"""Child processes of a task: DVC stages and internal commands, their log and their errors.

Models run in child processes only, so no network and no GPU memory stays in the flow's process.
"""

from __future__ import annotations

import os
import re
import sys
from typing import Any

from prefect import get_run_logger, runtime
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State

from flows.core.child_report import ChildReport, child_report
from flows.core.errors import is_transient
from flows.core.process import CommandFailed, Line, run_streaming
from flows.core.redact import redact
from flows.project.dvc import dvc
from flows.project.project import Project
from rfdetr.errors import RFDETRError

# What DVC prints for users at a terminal.
DVC_ADVICE = re.compile(
    r"To (track|enable) .*run:$|\s+(git add|dvc config) |Use `dvc push` to send|^\s*$"
)
TAIL_LINES = 5  # shown for a child that did not report its error


class StageFailedError(RFDETRError):
    """A stage of the pipeline failed; the message names the stage and the cause."""

    def __init__(self, text: str, *, transient: bool = False) -> None:
        super().__init__(text)
        self.transient = transient


def retry_can_help(_task: Any, _task_run: Any, state: State) -> bool:
    """A retry condition: not after an error that only the user can fix."""
    return not isinstance(state.data, BaseException) or is_transient(state.data)


def flow_run_name() -> str | None:
    """The name of the current flow run."""
    return runtime.flow_run.name if runtime.flow_run.id else None


def log_line() -> Line:
    """A function that logs lines of output to the flow run, without secrets."""
    logger = get_run_logger()
    return lambda line: logger.info("%s", redact(line))


def run_dvc_stage(project: Project, stage: str, watch: Line, **limits: Any) -> bool:
    """Run `dvc repro` for one stage; returns whether its command ran or its results were reused.

    Lines of output are logged, and passed to `watch`. `limits` are those of `run_streaming`. Raises
    StageFailedError.
    """
    log = log_line()

    def on_line(line: str) -> None:
        if not DVC_ADVICE.match(line):
            watch(line)
            log(line)

    repro = ("--wait-for-lock", "repro", "--single-item", stage)
    with child_report() as report:
        try:
            dvc(project.root, *repro, on_line=on_line, variables=report.variables, **limits)
        except CommandFailed as error:
            raise _failed(f"stage {stage}", report, error) from error
        return report.ran


def run_module(
    project: Project,
    what: str,
    *command: str,
    on_line: Line | None = None,
    timeout: float | None = None,
) -> None:
    """Run `python -m` with `command` in the project. Raises StageFailedError: `what` failed."""
    with child_report() as report:
        try:
            run_streaming(
                [sys.executable, "-m", *command],
                on_line or log_line(),
                cwd=project.root,
                env={**os.environ, **report.variables},
                timeout=timeout,
            )
        except CommandFailed as error:
            raise _failed(what, report, error) from error


RETRIED: dict[str, Any] = {  # options of a task that may be tried again
    "retries": 3,
    "retry_delay_seconds": [5, 30, 120],
    "retry_condition_fn": retry_can_help,
    "cache_policy": NO_CACHE,
}


def _failed(what: str, report: ChildReport, error: CommandFailed) -> StageFailedError:
    """The error with the child's message, or with the end of its output."""
    text = report.error or "\n".join(error.tail[-TAIL_LINES:])
    cause = text if error.reason.startswith("failed") else f"it {error.reason}\n{text}"
    return StageFailedError(f"{what} failed: {cause}", transient=report.transient)
