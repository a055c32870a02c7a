"""The steps from a trained model to a champion: register, judge, promote. All can be repeated.

Internal: the flow `retrain` runs `python -m flows.release.steps register | judge VERSION` as child
processes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from flows.core.child_report import report_failure, report_start
from flows.core.files import read_json, read_record, write_json
from flows.core.garbage import exit_quickly
from flows.core.process import die_with_parent
from flows.core.quiet import quiet_libraries
from flows.core.redact import redact
from flows.core.stopping import exit_on_sigterm
from flows.gate.decide import decide
from flows.gate.report import write_report
from flows.gate.score_cache import champion_scores, scores_of
from flows.gate.verdict import GatePolicy, Verdict
from flows.orchestration.limits import registry_slot
from flows.orchestration.notify import notify
from flows.project.project import Project
from flows.registry.model_folder import ModelFiles
from flows.registry.registry import Registry, Version, now
from flows.release import champion
from flows.release.audit import AuditRecord, actor, history
from flows.release.card_files import complete_cards, publish_card
from flows.release.description import description
from flows.release.freshness import GATE_KEY, gate_key, pinned_version, registry_of
from flows.storage.packs import open_dataset
from rfdetr.evaluation.operating_point import OperatingPoint
from rfdetr.files import write_text_atomic

DATASET_VERSION = "lineage.dataset_version"
DATASET = "lineage.dataset"


class Registered(BaseModel, frozen=True):
    """The version of the trained model and its run, as stored in `reports/registered.json`."""

    name: str
    number: int
    run_id: str
    model_id: str
    experiment: str
    uri: str
    export_parity: bool | None

    def links(self) -> list[tuple[str, str, str]]:
        """(key, URL, text) of the pages of the run and of the version."""
        base = self.uri.rstrip("/")
        view = "?workflowType=machine_learning"
        run = f"{base}/#/experiments/{self.experiment}/runs/{self.run_id}{view}"
        version = f"{base}/#/models/{self.name}/versions/{self.number}"
        text = f"{self.name} version {self.number}"
        return [("mlflow-run", run, "MLflow run"), ("model-version", version, text)]


def register(project: Project, flow_run: str | None = None) -> Registered:
    """Register the trained model: complete its MLflow run, log the model, create a version."""
    from flows.release.run_record import complete_run

    params, registry = project.params, registry_of(project)
    card = project.read_card()
    digest = card["dataset"]["digest"]
    lineage = _lineage(project, card, flow_run)
    run_id = complete_run(project, lineage)
    files, export_parity = model_files(project, project.trained / card["weights"], digest)
    numbers = read_json(project.test_metrics)
    metrics = {f"test.{k}": v for k, v in numbers.items() if isinstance(v, int | float)}
    quiet_libraries()  # importing Lightning resets the log levels
    model_id = registry.log_model(
        files,
        experiment=f"rfdetr/{params.dataset.name}",
        run_id=run_id,
        metrics=metrics,
        dataset=(params.dataset.name, digest),
    )
    restored = champion.restore_champion(registry)
    if restored is not None:
        print(f"the alias champion was missing: version {restored} is champion again", flush=True)
    version = registry.register(model_id, run_id=run_id, tags=lineage)
    # If the source has a new version with the same content, an existing version gets its name.
    registry.set_tags(version.number, {DATASET_VERSION: lineage[DATASET_VERSION]})
    registry.describe(version.number, description(project, card, numbers))
    registered = Registered(
        name=registry.name,
        number=version.number,
        run_id=run_id,
        model_id=model_id,
        experiment=registry.experiment_of(run_id),
        uri=redact(registry.uri),
        export_parity=export_parity,
    )
    write_json(project.registered, registered.model_dump())
    return registered


def model_files(project: Project, weights: Path, digest: str) -> tuple[ModelFiles, bool]:
    """The files of the model folder, and whether the ONNX export agrees with the weights."""
    from flows.registry.onnx_export import export_once

    exported = export_once(weights, project.env.state_dir)
    files = ModelFiles(
        weights=weights,
        card=_description(project, _operating_point(project)),
        onnx=exported.onnx,
        parity=exported.parity,
        profile=_profile(project, weights, digest),
    )
    return files, exported.agrees


def _profile(project: Project, weights: Path, digest: str) -> Path:
    """The image profile of the trained model; computed once."""
    from flows.registry.image_profile import profile_once

    folder, state = project.dataset_dir, project.env.state_dir
    point = _operating_point(project)
    return profile_once(folder, project.params.dataset, weights, digest, state, point=point)


def _operating_point(project: Project) -> OperatingPoint | None:
    """What the stage `evaluate` chose."""
    file = project.operating_point
    found = read_json(file) if file.exists() else None
    return found and OperatingPoint.from_dict(found)


def _description(project: Project, point: OperatingPoint | None) -> Path:
    """The model.json to register: that of the training, with the operating point if there is one.

    The outputs of `fit` stay as they are, so the description with a point is a file of its own.
    """
    if point is None:
        return project.model_card
    card = {**project.read_card(), "operating_point": point.to_dict()}
    write_json(project.registered_card, card)
    return project.registered_card


def judge(project: Project, number: int) -> Verdict:
    """Score challenger and champion on the current test set, decide, and record the verdict."""
    from flows.release.run_record import add_comparison

    params, registry = project.params, registry_of(project)
    digest = project.dataset_digest()
    card = project.read_card()
    weights = project.trained / card["weights"]
    challenger = scores_of(project, weights, f"version {number}", digest)
    parity = last_registered(project).export_parity
    challenger = challenger.model_copy(update={"export_parity": parity})
    current = registry.champion()
    old = None if current is None else champion_scores(project, registry, current, digest)
    tags = registry.version(number).tags
    reason = None
    if tags.get("promotion.rolled_back") == "true":
        reason = tags.get("promotion.rolled_back_reason", "no reason recorded")
    policy = GatePolicy(
        **params.gate.model_dump(),
        rolled_back=reason,
        champion_origin=other_origin(project, registry.name, current) if current else None,
    )
    verdict = decide(old, challenger, policy, current.number if current else None)
    record_verdict(registry, number, verdict)
    registry.set_tags(number, {GATE_KEY: gate_key(project, digest)})
    write_text_atomic(project.verdict, verdict.model_dump_json(indent=2))
    write_report(
        challenger,
        project.evaluation,
        title=params.dataset.name,
        verdict=verdict,
        images=Path(open_dataset(project.dataset_dir, project.env.state_dir)),
    )
    add_comparison(registry, number, verdict, project.evaluation)
    _new_card(project, registry, number, verdict)
    return verdict


def _new_card(project: Project, registry: Registry, number: int, verdict: Verdict) -> None:
    """Write the model card to reports/ and to the run of the version."""
    from flows.release.model_card import make_card
    from rfdetr.monitoring.image_profile import ImageProfile

    card, version = project.read_card(), registry.version(number)
    if version.weights_sha256 != card["weights_sha256"]:
        return
    weights, digest = project.trained / card["weights"], card["dataset"]["digest"]
    validation = project.validation.with_suffix(".json")
    made = make_card(
        registry.name,
        number,
        card,
        verdict,
        validation=read_json(validation) if validation.is_file() else None,
        profile=ImageProfile.load(_profile(project, weights, digest)),
    )
    publish_card(project, registry, number, made)


def other_origin(project: Project, name: str, champion: Version) -> str | None:
    """Which dataset the champion was trained on, as a clause; None if it is the current one."""
    trained_on = champion.tags.get(DATASET)
    if trained_on in (None, project.params.dataset.name):
        return None
    return f"version {champion.number} of {name} was trained on the dataset {trained_on}"


def record_verdict(registry: Registry, number: int, verdict: Verdict) -> None:
    """Write a verdict, refusals included: tags of the version, JSON and Markdown on its run."""
    metric, compared = verdict.policy.metric, verdict.champion
    tags = {
        "gate.outcome": verdict.outcome,
        "gate.reason": verdict.reason,
        "gate.metric": metric,
        "gate.challenger": verdict.challenger.metrics.get(metric),
        "gate.champion": compared.metrics.get(metric) if compared else "none",
        "gate.champion_version": verdict.champion_version or "none",
        "gate.failed": ", ".join(r.name for r in verdict.rules if r.passed is False) or "none",
        "gate.at": now(),
    }
    registry.set_tags(number, tags)
    version, path = registry.version(number), f"gate/version-{number}"
    if registry.active_run(version) is None:
        return  # it was deleted; the tags of the version say the same
    registry.log_text(version, verdict.model_dump_json(indent=2), f"{path}.json")
    registry.log_text(version, verdict.to_markdown(), f"{path}.md")


def last_registered(project: Project) -> Registered:
    """The result of the last `register`."""
    return read_record(project.registered, Registered)


def last_verdict(project: Project) -> Verdict:
    """The result of the last `judge`."""
    return read_record(project.verdict, Verdict)


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


def _lineage(project: Project, card: dict[str, Any], flow_run: str | None) -> dict[str, Any]:
    made = project.provenance
    return {
        "lineage.git_commit": made.git_commit,
        "lineage.git_dirty": made.git_dirty,
        "lineage.dvc_lock": made.dvc_lock_sha256,
        DATASET: card["dataset"]["name"],
        "lineage.data_digest": card["dataset"]["digest"],
        DATASET_VERSION: str(pinned_version(project)),
        "lineage.flow_run": flow_run,
        "weights.sha256": card["weights_sha256"],
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
    registered = register(project, options.flow_run)
    print(f"registered {registered.name} version {registered.number}", flush=True)


def _judge(project: Project, options: argparse.Namespace) -> None:
    verdict = judge(project, options.version)
    print(f"gate: {verdict.outcome}: {verdict.reason}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
