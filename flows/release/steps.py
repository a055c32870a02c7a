"""From a trained model to a champion: register, judge, promote. Every step may be repeated.

`python -m flows.release.steps register | judge VERSION` run as children of the flow, so that no
network and no GPU memory lives in the flow's process.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from flows.core.child_report import report_failure, report_start
from flows.core.files import read_json, write_json
from flows.core.process import die_with_parent, exit_on_sigterm
from flows.core.quiet import quiet_libraries
from flows.core.redact import redact
from flows.gate.decide import decide
from flows.gate.score_cache import champion_scores, scores_of
from flows.gate.verdict import GatePolicy, Verdict
from flows.orchestration.limits import registry_slot
from flows.orchestration.notify import notify
from flows.project.project import Project
from flows.registry.registry import Registry, now
from flows.release import champion
from flows.release.champion import AuditRecord
from flows.release.freshness import GATE_KEY, dataset_version, gate_key, registry_of
from rfdetr.files import write_text_atomic


class Registered(BaseModel, frozen=True):
    """`reports/registered.json`: the version of the trained model and the run that made it."""

    name: str
    number: int
    run_id: str
    model_id: str
    experiment: str
    uri: str
    export_parity: bool | None

    def links(self) -> list[tuple[str, str, str]]:
        """(key, address, text) of the pages of the run and of the version."""
        base = self.uri.rstrip("/")
        run = f"{base}/#/experiments/{self.experiment}/runs/{self.run_id}"
        version = f"{base}/#/models/{self.name}/versions/{self.number}"
        text = f"{self.name} version {self.number}"
        return [("mlflow-run", run, "MLflow run"), ("model-version", version, text)]


def register(project: Project, flow_run: str | None = None) -> Registered:
    """Complete the MLflow run, log the model with its export, make a version of it, once."""
    from flows.registry.image_profile import profile_once
    from flows.registry.model_folder import ModelFiles
    from flows.registry.onnx_export import export_once
    from flows.release.run_record import complete_run

    params, registry = project.params, registry_of(project)
    card = read_json(project.trained / "model.json")
    lineage = _lineage(project, card, flow_run)
    run_id = complete_run(project, lineage)
    weights = project.trained / card["weights"]
    exported = export_once(weights, project.env.state_dir)
    files = ModelFiles(
        weights=weights,
        card=project.trained / "model.json",
        onnx=exported.onnx,
        parity=exported.parity,
        profile=profile_once(
            project.dataset_dir,
            params.dataset,
            weights,
            card["dataset"]["digest"],
            project.env.state_dir,
        ),
    )
    numbers = read_json(project.test_metrics)
    metrics = {f"test/{k}": v for k, v in numbers.items() if isinstance(v, int | float)}
    quiet_libraries()  # Lightning's import made them talk again
    model_id = registry.log_model(
        files,
        experiment=f"rfdetr/{params.dataset.name}",
        run_id=run_id,
        metrics=metrics,
        dataset=(params.dataset.name, card["dataset"]["digest"]),
    )
    version = registry.register(model_id, run_id=run_id, tags=lineage)
    # The same content may have got a new version where it came from, and the model stayed the same.
    key = "lineage.dataset_version"
    registry.set_tags(version.number, {key: lineage[key]})
    registered = Registered(
        name=registry.name,
        number=version.number,
        run_id=run_id,
        model_id=model_id,
        experiment=registry.experiment_of(run_id),
        uri=redact(registry.uri),
        export_parity=exported.agrees,
    )
    write_json(project.registered, registered.model_dump())
    return registered


def judge(project: Project, number: int) -> Verdict:
    """Score champion and challenger on the same current test set and record the verdict."""
    params, registry = project.params, registry_of(project)
    digest = project.dataset_digest()
    card = read_json(project.trained / "model.json")
    weights = project.trained / card["weights"]
    challenger = scores_of(project, weights, f"version {number}", digest)
    parity = Registered.model_validate(read_json(project.registered)).export_parity
    challenger = challenger.model_copy(update={"export_parity": parity})
    champion = registry.champion()
    old = None
    if champion is not None:
        old = champion_scores(project, registry, champion, digest)
    tags = registry.version(number).tags
    taken_back = tags.get("promotion.rolled_back") == "true"
    why = tags.get("promotion.rolled_back_reason", "no reason on record") if taken_back else None
    policy = GatePolicy(**params.gate.model_dump(), rolled_back=why)
    verdict = decide(old, challenger, policy, champion.number if champion else None)
    record_verdict(registry, number, verdict)
    registry.set_tags(number, {GATE_KEY: gate_key(params, digest)})
    write_text_atomic(project.verdict, verdict.model_dump_json(indent=2))
    return verdict


def record_verdict(registry: Registry, number: int, verdict: Verdict) -> None:
    """Write a verdict, refusals included: tags of the version, JSON and Markdown on its run."""
    metric, champion = verdict.policy.metric, verdict.champion
    tags = {
        "gate.outcome": verdict.outcome,
        "gate.reason": verdict.reason,
        "gate.metric": metric,
        "gate.challenger": verdict.challenger.metrics.get(metric),
        "gate.champion": champion.metrics.get(metric) if champion else "none",
        "gate.champion_version": verdict.champion_version or "none",
        "gate.failed": ", ".join(r.name for r in verdict.rules if r.passed is False) or "none",
        "gate.at": now(),
    }
    registry.set_tags(number, tags)
    version, path = registry.version(number), f"gate/version-{number}"
    registry.log_text(version, verdict.model_dump_json(indent=2), f"{path}.json")
    registry.log_text(version, verdict.to_markdown(), f"{path}.md")


def last_verdict(project: Project) -> Verdict:
    """The verdict that `judge` wrote last."""
    return Verdict.model_validate(read_json(project.verdict))


def promote_winner(project: Project, number: int, verdict: Verdict) -> AuditRecord | None:
    """Make the gate's winner champion. Raises ChampionChangedError when another took its place."""
    if not verdict.promote:
        return None
    with registry_slot(project):
        record = champion.promote(
            registry_of(project),
            number,
            reason=verdict.reason,
            by=champion.actor(project.env.actor),
            expected_champion=verdict.champion_version,
        )
    return record and _announce(project, record)


def promote_by_hand(
    project: Project, number: int, *, reason: str, force: bool
) -> AuditRecord | None:
    """A person's promotion; it also gives the approval that a gate waits for.

    Raises RegistryError for a version without a verdict, or with one against it, and
    ChampionChangedError when the verdict is about another champion, unless `force`.
    """
    with registry_slot(project):
        record = champion.promote(
            registry_of(project),
            number,
            reason=reason,
            by=champion.actor(project.env.actor),
            expected_champion="judged",
            force=force,
        )
    return record and _announce(project, record)


def roll_back(
    project: Project, *, reason: str, name: str | None = None, to: int | None = None
) -> AuditRecord:
    """Move `champion` of `name` (default: params.yaml's) back, with a reason on record."""
    registry = registry_of(project, name)
    with registry_slot(project, name):
        record = champion.rollback(
            registry, reason=reason, by=champion.actor(project.env.actor), to=to
        )
    return _announce(project, record)


def _announce(project: Project, record: AuditRecord) -> AuditRecord:
    """Tell people of a move of the champion."""
    subject, text = "champion changed", f"version {record.version}: {record.reason}"
    if record.action == "rollback":
        subject = "champion rolled back"
        text = f"version {record.version} serves again: {record.reason}"
    notify(project.env, subject, text, record.model_dump(mode="json"))
    return record


def audit(project: Project) -> list[AuditRecord]:
    """Every move of the champion, oldest first."""
    return champion.history(registry_of(project))


def summarise(project: Project, number: int, verdict: Verdict) -> dict[str, Any]:
    """What a run came to, as plain data."""
    champion = registry_of(project).champion()
    return {
        "version": number,
        "outcome": verdict.outcome,
        "reason": verdict.reason,
        "champion": champion.number if champion else None,
        "metrics": dict(verdict.challenger.metrics),
    }


def what_next(project: Project) -> str:
    """Where the results are, for a person at a terminal."""
    registry = registry_of(project)
    champion = registry.champion()
    serves = f"version {champion.number}" if champion else "nobody yet"
    return "\n".join(
        [
            f"champion of {registry.name}: {serves}",
            f"  dataset report   {project.validation.with_suffix('.html')}",
            f"  detections       {project.reports / 'pictures/samples.png'}",
            f"  decision         {project.verdict}",
            f"  experiments      mlflow ui --backend-store-uri {redact(registry.uri)}",
            "  flow runs        prefect server start",
            "  who and why      rfdetr-pipeline history",
        ]
    )


def _lineage(project: Project, card: dict[str, Any], flow_run: str | None) -> dict[str, Any]:
    made = project.provenance
    return {
        "lineage.git_commit": made.git_commit,
        "lineage.git_dirty": made.git_dirty,
        "lineage.dvc_lock": made.dvc_lock_sha256,
        "lineage.data_digest": card["dataset"]["digest"],
        "lineage.dataset_version": dataset_version(project),
        "lineage.flow_run": flow_run,
        "weights.sha256": card["weights_sha256"],
    }


def main(arguments: list[str] | None = None) -> int:
    """Command line of the flow's children."""
    parser = argparse.ArgumentParser(prog="python -m flows.release.steps", description=__doc__)
    parser.add_argument("--flow-run", help="name of the flow run, for the lineage")
    commands = parser.add_subparsers(required=True)
    commands.add_parser("register").set_defaults(run=_register)
    scoring = commands.add_parser("judge")
    scoring.add_argument("version", type=int)
    scoring.set_defaults(run=_judge)
    options = parser.parse_args(arguments)
    die_with_parent()
    exit_on_sigterm()
    quiet_libraries()
    report_start()
    try:
        options.run(Project(Path.cwd()), options)
    except Exception as error:  # noqa: BLE001 - the last line says what happened
        report_failure("release failed", error)
        return 1
    return 0


def _register(project: Project, options: argparse.Namespace) -> None:
    registered = register(project, options.flow_run)
    print(f"registered {registered.name} version {registered.number}", flush=True)


def _judge(project: Project, options: argparse.Namespace) -> None:
    verdict = judge(project, options.version)
    print(f"gate: {verdict.outcome}: {verdict.reason}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
