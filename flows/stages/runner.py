"""Runs a stage: loads the project, reports errors, and checks that params.yaml did not change."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from flows.config.params import PARAMS_FILE, load_params
from flows.core.child_report import report_failure, report_start
from flows.core.errors import FAILED, INTERRUPTED, OK, USAGE
from flows.core.garbage import exit_quickly
from flows.core.process import die_with_parent
from flows.core.quiet import quiet_libraries, readable_warnings
from flows.core.stopping import Terminated, exit_on_sigterm
from flows.project.project import Project
from rfdetr.errors import ConfigError, RFDETRError

STOPPED = "it was told to stop (SIGTERM); run the same command to resume"


def run_stage(
    name: str,
    sections: Sequence[str | tuple[str, str]],
    body: Callable[[Project], None],
    arguments: Sequence[str] = (),
) -> int:
    """Run `body` on the project in the current folder. Returns the exit status of the process.

    A stage takes its settings from params.yaml only: any argument prints the usage. `sections` are
    those that dvc.yaml tracks for the stage. They are compared with params.yaml again at the end,
    because DVC records the values that are in the file then.
    """
    if arguments:
        asked = arguments[0] in {"-h", "--help"}
        print(
            f"usage: python -m flows.stages.{name}, without arguments; settings: {PARAMS_FILE}",
            file=sys.stdout if asked else sys.stderr,
        )
        return OK if asked else USAGE
    die_with_parent()
    exit_on_sigterm()
    exit_quickly()
    readable_warnings()
    quiet_libraries()
    report_start()
    try:
        project = Project()
        body(project)
        check_unchanged(project, sections)
    except KeyboardInterrupt:
        print(f"{name}: interrupted.", file=sys.stderr)
        return INTERRUPTED
    except Terminated:
        report_failure(f"{name} failed", RFDETRError(STOPPED))
        raise
    except Exception as error:  # noqa: BLE001 - the last line of a stage says what happened
        report_failure(f"{name} failed", error)
        return FAILED
    return OK


def check_unchanged(project: Project, sections: Sequence[str | tuple[str, str]]) -> None:
    """Raise ConfigError if params.yaml no longer holds the values that the stage used.

    `sections` are names of sections, or (section, field) for a single field.
    """
    only = {item if isinstance(item, str) else item[0]: item for item in sections}
    used = project.params.snapshot(*only)
    now = load_params(project.params_file).snapshot(*only)
    changed = [
        f"{section}.{field} was {value!r}, is {now[section].get(field)!r}"
        for section, fields in used.items()
        for field, value in fields.items()
        if only[section] in (section, (section, field)) and now[section].get(field) != value
    ]
    if changed:
        raise ConfigError(
            f"{PARAMS_FILE} changed while the stage ran: {'; '.join(changed)}. The result belongs "
            "to the old values; start the stage again."
        )
