"""From a judged version to a champion: promotion, rollback, history. All can be repeated.

Internal: the flow `retrain` runs `python -m flows.release.steps register | judge VERSION` as child
processes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from flows.core.child_report import report_failure, report_start
from flows.core.garbage import exit_quickly
from flows.core.process import die_with_parent
from flows.core.quiet import quiet_libraries
from flows.core.stopping import exit_on_sigterm
from flows.gate.verdict import Verdict
from flows.orchestration.limits import registry_slot
from flows.orchestration.notify import notify
from flows.project.project import Project
from flows.registry.registry import Registry
from flows.release import champion
from flows.release.audit import AuditRecord, actor, history
from flows.release.card_files import complete_cards
from flows.release.freshness import registry_of


def promote_winner(project: Project, number: int, verdict: Verdict) -> AuditRecord | None:
    """Make the gate's winner champion. Raises ChampionChangedError if the champion has changed."""
    if not verdict.promote:
        return None
    with registry_slot(project):
        record = champion.promote(
            registry_of(project),
            number,
            reason=verdict.reason,
            by=actor(project.env.actor),
            expected_champion=verdict.champion_version,
        )
    return record and _announce(project, registry_of(project), record)


def promote_by_hand(
    project: Project, number: int, *, reason: str, force: bool
) -> AuditRecord | None:
    """Promote a version manually, which also gives the manual approval that the gate may require.

    Unless `force` is set, raises RegistryError if the gate has not judged the version or refused
    it, and ChampionChangedError if it was compared with another champion.
    """
    registry = registry_of(project)
    with registry_slot(project):
        record = champion.promote(
            registry,
            number,
            reason=reason,
            by=actor(project.env.actor),
            expected_champion="judged",
            force=force,
        )
    return record and _announce(project, registry, record)


def roll_back(
    project: Project, *, reason: str, name: str | None = None, to: int | None = None
) -> AuditRecord:
    """Restore an earlier champion of the registered model `name` (default: params.yaml's)."""
    registry = registry_of(project, name)
    with registry_slot(project, name):
        record = champion.rollback(registry, reason=reason, by=actor(project.env.actor), to=to)
    return _announce(project, registry, record)


def _announce(project: Project, registry: Registry, record: AuditRecord) -> AuditRecord:
    """Complete the model card after a change of the champion, and send a notification."""
    complete_cards(project, registry, record)
    subject, text = "champion changed", f"version {record.version}: {record.reason}"
    if record.action == "rollback":
        subject = "champion rolled back"
        text = f"version {record.version} is champion again: {record.reason}"
    notify(project.env, subject, text, record.model_dump(mode="json"))
    return record


def audit(project: Project) -> list[AuditRecord]:
    """Every promotion and rollback, oldest first."""
    return history(registry_of(project))


def summarise(project: Project, number: int, verdict: Verdict) -> dict[str, Any]:
    """The outcome of a flow run as plain data."""
    current = registry_of(project).champion()
    return {
        "version": number,
        "outcome": verdict.outcome,
        "reason": verdict.reason,
        "champion": current.number if current else None,
        "metrics": dict(verdict.challenger.metrics),
    }


def main(arguments: list[str] | None = None) -> int:
    """Command line of the child processes."""
    parser = argparse.ArgumentParser(prog="python -m flows.release.steps", description=__doc__)
    commands = parser.add_subparsers(required=True)
    registering = commands.add_parser("register")
    registering.add_argument("--flow-run", help="name of the flow run, for the lineage")
    registering.set_defaults(run=_register)
    scoring = commands.add_parser("judge")
    scoring.add_argument("version", type=int)
    scoring.set_defaults(run=_judge)
    options = parser.parse_args(arguments)
    die_with_parent()
    exit_on_sigterm()
    exit_quickly()
    quiet_libraries()
    report_start()
    try:
        options.run(Project(Path.cwd()), options)
    except Exception as error:  # noqa: BLE001 - reported as the last line
        report_failure("release failed", error)
        return 1
    return 0


def _register(project: Project, options: argparse.Namespace) -> None:
    from flows.release.registration import register

    registered = register(project, options.flow_run)
    print(f"registered {registered.name} version {registered.number}", flush=True)


def _judge(project: Project, options: argparse.Namespace) -> None:
    from flows.release.judgement import judge

    verdict = judge(project, options.version)
    print(f"gate: {verdict.outcome}: {verdict.reason}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
