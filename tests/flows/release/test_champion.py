from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from mlflow import MlflowClient
from mlflow.cli import gc

from flows.gate.decide import decide
from flows.gate.verdict import GatePolicy, Scores
from flows.registry.registry import Registry, RegistryError, now
from flows.release import champion as promotion
from flows.release.audit import AuditRecord, actor, history
from flows.release.champion import ChampionChangedError, promote, rollback
from flows.release.judgement import record_verdict
from rfdetr.tracking.client import experiment_id

EXPERIMENT = "rfdetr/demo"
SECRET = "Zq8vX2mN4pL7rT1w"
WHO = {"reason": "better", "by": "ada"}


@pytest.fixture
def registry(tracking_uri: str) -> Registry:
    return Registry("rfdetr-demo", tracking_uri)


def new_run(registry: Registry) -> str:
    where = experiment_id(registry.client, EXPERIMENT, registry.uri)
    return str(registry.client.create_run(where).info.run_id)


def three(registry: Registry) -> None:
    """Versions 1, 2, 3 without files, which moving aliases does not need."""
    registry.client.create_registered_model(registry.name)
    for _ in range(3):
        run_id = new_run(registry)
        registry.client.create_model_version(registry.name, "file:///models/x", run_id=run_id)


def scores(value: float) -> Scores:
    return Scores(
        model="m", weights_sha256=str(value), dataset_sha256="d", settings="s", class_names=("a",),
        images=100, metrics={"map_50_95": value}, export_parity=True,
    )  # fmt: skip


def artifact(registry: Registry, run_id: str, path: str, folder: Path) -> str:
    return Path(registry.client.download_artifacts(run_id, path, str(folder))).read_text()


def test_promote_moves_the_three_aliases_and_repeats_as_a_no_op(registry: Registry) -> None:
    three(registry)
    registry.client.set_registered_model_alias(registry.name, "challenger", "1")
    assert promote(registry, 1, **WHO) is not None
    assert registry.aliases() == {"champion": 1}
    assert promote(registry, 1, **WHO) is None
    promote(registry, 2, reason="more data", by="flow run x", expected_champion=1)
    assert registry.aliases() == {"champion": 2, "previous_champion": 1}
    tags = registry.version(2).tags
    assert tags["promotion.reason"] == "more data" and tags["promotion.previous"] == "1"
    assert len(history(registry)) == 2


def test_promotion_is_refused_when_the_champion_changed_since_the_gate(registry: Registry) -> None:
    three(registry)
    promote(registry, 1, **WHO, expected_champion=None)
    promote(registry, 2, **WHO)
    with pytest.raises(ChampionChangedError, match="champion is version 2"):
        promote(registry, 3, **WHO, expected_champion=1)
    assert registry.aliases()["champion"] == 2


def test_verdicts_are_tags_and_json_and_a_refusal_blocks_promotion(
    registry: Registry, tmp_path: Path
) -> None:
    three(registry)
    promote(registry, 1, **WHO)
    refused = decide(scores(0.6), scores(0.5), GatePolicy(evidence="point"))
    record_verdict(registry, 2, refused)
    version = registry.version(2)
    assert version.tags["gate.outcome"] == "refuse"
    assert version.tags["gate.failed"] == "gain"
    assert "0.6000 -> 0.5000" in version.tags["gate.reason"]
    record = artifact(registry, str(version.run_id), "gate/version-2.json", tmp_path)
    assert json.loads(record)["outcome"] == "refuse"
    with pytest.raises(RegistryError, match="refused by the gate"):
        promote(registry, 2, **WHO)
    assert registry.aliases()["champion"] == 1
    forced = promote(registry, 2, **WHO, force=True)
    assert forced is not None and forced.forced
    record_verdict(registry, 3, decide(scores(0.5), scores(0.6), GatePolicy(evidence="point")))
    assert promote(registry, 3, **WHO) is not None


def test_rollback_restores_and_the_bad_version_stays_out(
    registry: Registry, tmp_path: Path
) -> None:
    three(registry)
    for number in (1, 2, 3):
        promote(registry, number, **WHO)
    record = rollback(registry, reason="bad recall", by="bob")
    assert (record.version, record.previous) == (2, 3)
    assert registry.aliases() == {"champion": 2, "previous_champion": 1}
    assert registry.version(3).tags["promotion.rolled_back"] == "true"
    with pytest.raises(RegistryError, match="rolled back: bad recall"):
        promote(registry, 3, **WHO)
    rollback(registry, reason="worse still", by="bob")
    assert registry.aliases() == {"champion": 1}
    with pytest.raises(RegistryError, match="no previous champion"):
        rollback(registry, reason="again", by="bob")
    promote(registry, 3, **WHO, force=True)
    assert registry.version(3).tags["promotion.rolled_back"] == "false"
    rollback(registry, reason="to a named one", by="bob", to=2)
    assert registry.aliases()["champion"] == 2
    actions = [(r.action, r.version, r.by) for r in history(registry)]
    assert actions[3:] == [
        ("rollback", 2, "bob"),
        ("rollback", 1, "bob"),
        ("promote", 3, "ada"),
        ("rollback", 2, "bob"),
    ]
    run_id = str(registry.version(2).run_id)
    names = [f.path for f in registry.client.list_artifacts(run_id, "audit")]
    assert len(names) == 3
    saved = json.loads(artifact(registry, run_id, names[-1], tmp_path))
    assert saved["reason"] == "to a named one"


STEPS = (
    "set_model_version_tag", "set_registered_model_alias", "delete_registered_model_alias",
    "log_text", "delete_model_version_tag",
)  # fmt: skip


@pytest.mark.parametrize("action", ["promote", "rollback"])
def test_a_move_interrupted_at_any_call_is_finished_by_repeating_it(
    registry: Registry, action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    three(registry)
    promote(registry, 1, **WHO)
    promote(registry, 2, **WHO)

    def move() -> Any:
        if action == "promote":
            return promote(registry, 3, **WHO, expected_champion=2)
        return rollback(registry, reason="bad", by="bob")

    cut = 0
    while True:
        with monkeypatch.context() as patch:
            calls = iter(range(1000))
            for step in STEPS:
                patch.setattr(registry.client, step, _until(registry.client, step, calls, cut))
            try:
                move()
                break
            except ConnectionError:
                cut += 1
    assert cut > 8
    expected = {"promote": {"champion": 3, "previous_champion": 2}, "rollback": {"champion": 1}}
    assert registry.aliases() == expected[action]
    assert [r.action for r in history(registry)] == ["promote", "promote", action]


def _until(client: MlflowClient, step: str, calls: Any, last: int) -> Any:
    real = getattr(client, step)

    def call(*arguments: Any, **options: Any) -> Any:
        if next(calls) >= last:
            raise ConnectionError("the process was killed")
        return real(*arguments, **options)

    return call


def test_a_stale_intent_does_not_act_after_another_promotion(registry: Registry) -> None:
    three(registry)
    promote(registry, 1, **WHO)
    stale = AuditRecord(action="promote", version=3, previous=None, reason="old", by="x", at="2020")
    registry.set_tags(3, {promotion.PENDING: stale.model_dump_json()})
    promote(registry, 2, **WHO)
    record = promote(registry, 3, reason="new", by="y")
    assert record is not None and (record.reason, record.previous) == ("new", 2)


def test_a_move_of_long_ago_that_was_cut_at_its_last_call_is_not_repeated(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    three(registry)
    promote(registry, 1, **WHO)
    with monkeypatch.context() as patch, pytest.raises(ConnectionError):
        patch.setattr(registry.client, "delete_model_version_tag", _broken)
        promote(registry, 2, **WHO)
    assert promotion.PENDING in registry.version(2).tags
    rollback(registry, reason="bad recall", by="bob")
    assert promotion.PENDING not in registry.version(2).tags
    with pytest.raises(RegistryError, match="rolled back: bad recall"):
        promote(registry, 2, **WHO)
    assert registry.aliases() == {"champion": 1}


def test_an_intent_whose_record_is_written_is_over(registry: Registry) -> None:
    three(registry)
    promote(registry, 1, **WHO)
    record = promote(registry, 2, **WHO)
    assert record is not None
    rollback(registry, reason="bad recall", by="bob")
    registry.set_tags(2, {promotion.PENDING: record.model_dump_json()})
    with pytest.raises(RegistryError, match="rolled back"):
        promote(registry, 2, **WHO)


def test_a_version_that_serves_again_is_no_longer_rolled_back(registry: Registry) -> None:
    three(registry)
    for number in (1, 2, 3):
        promote(registry, number, **WHO)
    rollback(registry, reason="bad recall", by="bob")
    assert registry.version(3).tags["promotion.rolled_back"] == "true"
    rollback(registry, reason="it was the camera", by="bob", to=3)
    assert registry.version(3).tags["promotion.rolled_back"] == "false"
    assert registry.version(2).tags["promotion.rolled_back"] == "true"


def moves(registry: Registry) -> list[tuple[int, int | None, str]]:
    return [(r.version, r.previous, r.reason) for r in history(registry) if r.action == "rollback"]


def test_a_deleted_predecessor_counts_as_none(registry: Registry) -> None:
    three(registry)
    for number in (1, 2, 3):
        promote(registry, number, **WHO)
    registry.client.delete_model_version(registry.name, "1")
    rollback(registry, reason="bad recall", by="bob")
    assert registry.aliases() == {"champion": 2}
    assert moves(registry) == [(2, 3, "bad recall")]
    assert promotion.PENDING not in registry.version(2).tags


def test_the_history_outlives_a_deleted_version(registry: Registry) -> None:
    three(registry)
    for number in (1, 2, 3):
        promote(registry, number, **WHO)
    before = promotion.history(registry)
    assert [record.version for record in before] == [1, 2, 3]
    registry.client.delete_model_version(registry.name, "1")
    assert promotion.history(registry) == before


@pytest.mark.parametrize("to", [None, 3])
def test_a_rollback_that_a_deleted_version_stopped_half_way_is_finished(
    registry: Registry, to: int | None
) -> None:
    """Aliases and tags as left behind by an earlier version of `rollback`."""
    three(registry)
    for number in (1, 2, 3):
        promote(registry, number, **WHO)
    registry.client.delete_model_version(registry.name, "1")
    stuck = AuditRecord(action="rollback", version=2, previous=3, reason="old", by="bob", at=now())
    registry.set_tags(2, {promotion.PENDING: stuck.model_dump_json()})
    registry.set_tags(3, {"promotion.rolled_back": "true"})
    registry.client.set_registered_model_alias(registry.name, "champion", "2")
    rollback(registry, reason="new", by="bob", to=to)
    again = [] if to is None else [(3, 2, "new")]
    assert moves(registry) == [(2, 3, "old"), *again]
    assert registry.aliases() == {"champion": to or 2}
    assert promotion.PENDING not in registry.version(2).tags


@pytest.mark.parametrize("action", ["promote", "rollback"])
def test_a_move_is_finished_when_the_version_it_left_was_deleted(
    registry: Registry, action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    three(registry)
    promote(registry, 1, **WHO)
    promote(registry, 2, **WHO)

    def move() -> Any:
        if action == "promote":
            return promote(registry, 3, **WHO)
        return rollback(registry, reason="bad", by="bob")

    with monkeypatch.context() as patch, pytest.raises(ConnectionError):
        patch.setattr(registry.client, "delete_model_version_tag", _broken)
        move()
    registry.client.delete_model_version(registry.name, "2")
    record = move()
    assert record.previous == 2 and history(registry)[-1] == record
    assert registry.aliases() == {"champion": record.version}
    assert promotion.PENDING not in registry.version(record.version).tags


def test_a_purged_run_does_not_stop_a_rollback(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    """Version 1 became champion without `promote`: a process that wrote to a run caches it."""
    three(registry)
    registry.client.set_registered_model_alias(registry.name, "champion", "1")
    promote(registry, 2, **WHO)
    run_id = str(registry.version(1).run_id)
    registry.client.delete_run(run_id)
    purged = CliRunner().invoke(
        gc,
        ["--backend-store-uri", registry.uri, "--run-ids", run_id],
        env={"MLFLOW_TRACKING_URI": registry.uri},
    )
    assert purged.exit_code == 0, purged.output
    rollback(registry, reason="bad recall", by="bob")
    assert registry.aliases() == {"champion": 1}
    assert moves(registry) == [(1, 2, "bad recall")]
    assert promotion.PENDING not in registry.version(1).tags
    assert f"no copy on run {run_id}" in caplog.text


@pytest.mark.parametrize("step", ["set_registered_model_alias", "delete_model_version_tag"])
@pytest.mark.parametrize("to", [None, 2, 1])
def test_an_interrupted_rollback_is_finished_before_another_one(
    registry: Registry, step: str, to: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    three(registry)
    for number in (1, 2, 3):
        promote(registry, number, **WHO)
    with monkeypatch.context() as patch, pytest.raises(ConnectionError):
        patch.setattr(registry.client, step, _broken)
        rollback(registry, reason="old", by="bob")
    record = rollback(registry, reason="new", by="eve", to=to)
    asked = [(1, 2, "new")] if to == 1 else []
    assert moves(registry) == [(2, 3, "old"), *asked]
    assert (record.version, record.by) == ((1, "eve") if to == 1 else (2, "bob"))
    assert registry.aliases()["champion"] == record.version


def test_an_interrupted_rollback_is_outdated_after_another_move(registry: Registry) -> None:
    three(registry)
    stale = AuditRecord(action="rollback", version=1, previous=3, reason="old", by="x", at=now())
    for number in (1, 2, 3):
        promote(registry, number, **WHO)
    registry.set_tags(1, {promotion.PENDING: stale.model_dump_json()})
    rollback(registry, reason="new", by="bob")
    assert moves(registry) == [(2, 3, "new")]


def test_a_user_without_a_name_acts_as_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RFDETR_ACTOR", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    assert actor() == f"uid 54321@{socket.gethostname()}"


def test_a_verdict_counts_only_against_the_champion_it_is_about(registry: Registry) -> None:
    three(registry)
    promote(registry, 1, **WHO)
    waiting = decide(
        scores(0.5), scores(0.6), GatePolicy(manual_approval=True, evidence="point"), 1
    )
    with pytest.raises(RegistryError, match="version 2 was not judged by the gate"):
        promote(registry, 2, **WHO, expected_champion="judged")
    record_verdict(registry, 2, waiting)
    assert registry.version(2).tags["gate.champion_version"] == "1"
    promote(registry, 3, **WHO)
    with pytest.raises(ChampionChangedError, match="compared version 2 with version 1"):
        promote(registry, 2, **WHO, expected_champion="judged")
    assert registry.aliases()["champion"] == 3
    assert promote(registry, 2, **WHO, expected_champion="judged", force=True) is not None
    assert promote(registry, 2, **WHO, expected_champion="judged") is None


def test_a_first_champion_by_hand_needs_a_verdict_without_one(registry: Registry) -> None:
    three(registry)
    record_verdict(
        registry, 1, decide(None, scores(0.6), GatePolicy(manual_approval=True, evidence="point"))
    )
    assert promote(registry, 1, **WHO, expected_champion="judged") is not None


def _broken(*_: Any, **__: Any) -> None:
    raise ConnectionError("the process was killed")


def test_unknown_versions_and_models_are_named(registry: Registry) -> None:
    assert registry.champion() is None and registry.aliases() == {} and history(registry) == []
    with pytest.raises(RegistryError, match="rfdetr-demo has no version 7; known versions: none"):
        promote(registry, 7, **WHO)
    with pytest.raises(RegistryError, match="no champion to roll back"):
        rollback(registry, reason="r", by="b")


def test_secrets_do_not_reach_tags(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPANY_API_KEY", SECRET)
    three(registry)
    registry.set_tags(1, {"lineage.remote": f"https://u:{SECRET}@host/r", "api_key": SECRET})
    promote(registry, 1, reason=f"token={SECRET}", by="ada")
    version = registry.version(1)
    assert SECRET not in json.dumps(version.tags)
    run_id = str(version.run_id)
    (entry,) = registry.client.list_artifacts(run_id, "audit")
    assert SECRET not in artifact(registry, run_id, entry.path, tmp_path)
