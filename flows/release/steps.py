"""From a trained model to a champion: register, judge, promote. Every step may be repeated.

`python -m flows.release.steps register | judge VERSION` run as children of the flow, so that no network
and no GPU memory lives in the flow's process.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from flows.config.environment import Environment
from flows.config.params import load_params
from flows.core.errors import explain
from flows.core.files import read_json, write_json
from flows.core.process import die_with_parent, exit_on_sigterm
from flows.core.quiet import quiet_libraries
from flows.core.redact import redact
from flows.gate.decide import decide
from flows.gate.score_cache import champion_scores, data_digest, scores_of
from flows.gate.verdict import GatePolicy, Verdict
from flows.orchestration.limits import registry_slot
from flows.orchestration.notify import notify
from flows.release import champion
from flows.release.champion import AuditRecord
from flows.release.freshness import GATE_KEY, TRAINED, dataset_version, gate_key, registry_of
from rfdetr.files import write_text_atomic

REGISTERED, VERDICT = Path("reports/registered.json"), Path("reports/verdict.json")


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


def register(root: Path, flow_run: str | None = None) -> Registered:
    """Complete the MLflow run, log the model with its export, make a version of it, once."""
    from flows.registry.image_profile import profile_once
    from flows.registry.model_folder import ModelFiles
    from flows.registry.onnx_export import export_once
    from flows.release.run_record import complete_run

    params, registry = load_params(root / "params.yaml"), registry_of(root)
    card = read_json(root / TRAINED / "model.json")
    lineage = _lineage(root, card, flow_run)
    run_id = complete_run(root, params, registry.uri, lineage)
    weights = root / TRAINED / card["weights"]
    exported = export_once(weights, Environment.read().state_dir)
    files = ModelFiles(
        weights=weights,
        card=root / TRAINED / "model.json",
        onnx=exported.onnx,
        parity=exported.parity,
        profile=profile_once(root, params, weights, card["dataset"]["digest"]),
    )
    numbers = read_json(root / "metrics/test.json")
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
        experiment=str(registry.client.get_run(run_id).info.experiment_id),
        uri=redact(registry.uri),
        export_parity=exported.agrees,
    )
    write_json(root / REGISTERED, registered.model_dump())
    return registered


def judge(root: Path, number: int) -> Verdict:
    """Score champion and challenger on the same current test set and record the verdict."""
    params, registry = load_params(root / "params.yaml"), registry_of(root)
    env = Environment.read()
    digest = data_digest(root, params, env)
    card = read_json(root / TRAINED / "model.json")
    weights = root / TRAINED / card["weights"]
    challenger = scores_of(root, params, weights, f"version {number}", digest)
    parity = Registered.model_validate(read_json(root / REGISTERED)).export_parity
    challenger = challenger.model_copy(update={"export_parity": parity})
    champion = registry.champion()
    old = None
    if champion is not None:
        old = champion_scores(root, params, registry, champion, digest)
    tags = registry.version(number).tags
    taken_back = tags.get("promotion.rolled_back") == "true"
    why = tags.get("promotion.rolled_back_reason", "no reason on record") if taken_back else None
    verdict = decide(old, challenger, GatePolicy(**params.gate.model_dump(), rolled_back=why))
    registry.record_verdict(number, verdict)
    registry.set_tags(number, {GATE_KEY: gate_key(params, digest)})
    write_text_atomic(root / VERDICT, verdict.model_dump_json(indent=2))
    return verdict


def last_verdict(root: Path) -> Verdict:
    """The verdict that `judge` wrote last."""
    return Verdict.model_validate(read_json(root / VERDICT))


def promote_winner(root: Path, number: int, verdict: Verdict) -> AuditRecord | None:
    """Make the gate's winner champion. Raises ChampionChangedError when another took its place."""
    if not verdict.promote:
        return None
    with registry_slot(root):
        record = champion.promote(
            registry_of(root),
            number,
            reason=verdict.reason,
            by=champion.actor(),
            expected_champion=verdict.champion_version,
        )
    return record and _announce(record)


def promote_by_hand(root: Path, number: int, *, reason: str, force: bool) -> AuditRecord | None:
    """A person's promotion; it also gives the approval that a gate waits for.

    Raises RegistryError for a version without a verdict, or with one against it, and
    ChampionChangedError when the verdict is about another champion, unless `force`.
    """
    with registry_slot(root):
        record = champion.promote(
            registry_of(root),
            number,
            reason=reason,
            by=champion.actor(),
            expected_champion="judged",
            force=force,
        )
    return record and _announce(record)


def roll_back(
    root: Path, *, reason: str, name: str | None = None, to: int | None = None
) -> AuditRecord:
    """Move `champion` of `name` (default: params.yaml's) back, with a reason on record."""
    registry = registry_of(root, name)
    with registry_slot(root, name):
        record = champion.rollback(registry, reason=reason, by=champion.actor(), to=to)
    return _announce(record)


def _announce(record: AuditRecord) -> AuditRecord:
    """Tell people of a move of the champion."""
    subject, text = "champion changed", f"version {record.version}: {record.reason}"
    if record.action == "rollback":
        subject = "champion rolled back"
        text = f"version {record.version} serves again: {record.reason}"
    notify(subject, text, record.model_dump(mode="json"))
    return record


def audit(root: Path) -> list[AuditRecord]:
    """Every move of the champion, oldest first."""
    return champion.history(registry_of(root))


def summarise(root: Path, number: int, verdict: Verdict) -> dict[str, Any]:
    """What a run came to, as plain data."""
    champion = registry_of(root).champion()
    return {
        "version": number,
        "outcome": verdict.outcome,
        "reason": verdict.reason,
        "champion": champion.number if champion else None,
        "metrics": dict(verdict.challenger.metrics),
    }


def what_next(root: Path) -> str:
    """Where the results are, for a person at a terminal."""
    registry = registry_of(root)
    champion = registry.champion()
    serves = f"version {champion.number}" if champion else "nobody yet"
    return "\n".join(
        [
            f"champion of {registry.name}: {serves}",
            f"  dataset report   {root / 'reports/validation.html'}",
            f"  detections       {root / 'reports/pictures/samples.png'}",
            f"  decision         {root / VERDICT}",
            f"  experiments      mlflow ui --backend-store-uri {redact(registry.uri)}",
            "  flow runs        prefect server start",
            "  who and why      rfdetr-pipeline history",
        ]
    )


def _lineage(root: Path, card: dict[str, Any], flow_run: str | None) -> dict[str, Any]:
    from flows.tracking.provenance import collect_provenance

    made = collect_provenance(root)
    return {
        "lineage.git_commit": made.git_commit,
        "lineage.git_dirty": made.git_dirty,
        "lineage.dvc_lock": made.dvc_lock_sha256,
        "lineage.data_digest": card["dataset"]["digest"],
        "lineage.dataset_version": dataset_version(root),
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
    try:
        options.run(options)
    except Exception as error:  # noqa: BLE001 - the last line says what happened
        print(f"release failed: {explain(error)}", file=sys.stderr)
        return 1
    return 0


def _register(options: argparse.Namespace) -> None:
    registered = register(Path.cwd(), options.flow_run)
    print(f"registered {registered.name} version {registered.number}", flush=True)


def _judge(options: argparse.Namespace) -> None:
    verdict = judge(Path.cwd(), options.version)
    print(f"gate: {verdict.outcome}: {verdict.reason}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
