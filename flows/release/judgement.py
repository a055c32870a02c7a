"""The gate: scores challenger and champion on the test set, decides, and records the verdict."""

from __future__ import annotations

from pathlib import Path

from flows.core.files import read_object, read_record
from flows.gate.decide import decide
from flows.gate.report import write_report
from flows.gate.score_cache import champion_scores, scores_of
from flows.gate.verdict import GatePolicy, Verdict
from flows.project.project import Project
from flows.registry.registry import Registry, Version, now
from flows.release.card_files import publish_card
from flows.release.freshness import GATE_KEY, gate_key, registry_of
from flows.release.registration import DATASET, last_registered, profile_of
from flows.storage.packs import open_dataset
from rfdetr.files import write_text_atomic


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
        validation=read_object(validation) if validation.is_file() else None,
        profile=ImageProfile.load(profile_of(project, weights, digest)),
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


def last_verdict(project: Project) -> Verdict:
    """The result of the last `judge`."""
    return read_record(project.verdict, Verdict)
