"""What every stage shares: its parameters, its end, and the promise that both belong together."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from flows.config.params import PARAMS_FILE, load_params
from flows.core.errors import INTERRUPTED, explain
from flows.core.process import die_with_parent, exit_on_sigterm
from flows.core.quiet import quiet_libraries
from flows.project.project import Project
from rfdetr.errors import ConfigError


def run_stage(
    name: str,
    sections: Sequence[str],
    body: Callable[[Project], None],
    arguments: Sequence[str] = (),
) -> int:
    """Run `body` on the project in the current folder; the exit status of the process.

    A stage reads params.yaml alone: with `arguments` it says so and does nothing.
    `sections` are those that dvc.yaml tracks for the stage. They are compared with params.yaml
    again at the end: DVC records the values it finds then, and they must be those that acted.
    """
    if arguments:
        print(f"usage: python -m flows.{name}, without arguments: {PARAMS_FILE} has the settings")
        return 0 if arguments[0] in {"-h", "--help"} else 2
    die_with_parent()
    exit_on_sigterm()
    quiet_libraries()
    try:
        project = Project()
        body(project)
        check_unchanged(project, sections)
    except KeyboardInterrupt:
        print(f"{name}: interrupted.", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the last line of a stage says what happened
        print(f"{name} failed: {explain(error)}", file=sys.stderr)
        return 1
    return 0


def check_unchanged(project: Project, sections: Sequence[str]) -> None:
    """Raise ConfigError if params.yaml no longer holds the values that the stage used."""
    now = load_params(project.params_file).snapshot(*sections)
    used = project.params.snapshot(*sections)
    changed = [
        f"{section}.{field} was {value!r}, is {now[section].get(field)!r}"
        for section, fields in used.items()
        for field, value in fields.items()
        if now[section].get(field) != value
    ]
    if changed:
        raise ConfigError(
            f"{PARAMS_FILE} changed while the stage ran: {'; '.join(changed)}. The result belongs "
            "to the old values; start the stage again."
        )
