from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.config.sections import GateSettings
from flows.gate.decide import RULES, decide
from flows.gate.verdict import ClassScore, GatePolicy, Scores, Verdict
from rfdetr.evaluation.evidence import MatchEvidence

CLASSES = ("0", "1", "4")


def scores(value: float = 0.6, **changes: Any) -> Scores:
    fields: dict[str, Any] = {
        "model": "rfdetr-demo",
        "weights_sha256": f"weights of {value}",
        "dataset_sha256": "test set",
        "settings": "test/500/v1",
        "class_names": CLASSES,
        "images": 200,
        "metrics": {"map_50_95": value, "map_50": 0.9, "f1": 0.8},
        "per_class": {name: ClassScore(ap=value, boxes=100) for name in CLASSES},
        "latency_ms": 20.0,
        "size_mb": 12.0,
        "export_parity": True,
    }
    return Scores(**{**fields, **changes})


def matches(hit_rate: float, seed: int = 0, images: int = 60) -> MatchEvidence:
    """One box and one detection per image. With one seed, a higher rate finds the same and more."""
    random = np.random.default_rng(seed)
    hit = random.random(images) < hit_rate
    return MatchEvidence(
        positives=np.ones((images, 1), dtype=np.int32),
        image=np.arange(images, dtype=np.int32),
        label=np.zeros(images, dtype=np.int32),
        score=np.linspace(1, 0.5, images, dtype=np.float32),
        matched=np.where(hit, 1023, 0).astype(np.uint16),
        ignored=np.zeros(images, dtype=np.uint16),
        accepted=np.zeros(images, dtype=bool),
    )


def rule(verdict: Verdict, name: str) -> Any:
    return next(r for r in verdict.rules if r.name == name)


def failed(verdict: Verdict) -> set[str]:
    return {r.name for r in verdict.rules if r.passed is False}


def judge(champion: Scores | None, challenger: Scores, **policy: Any) -> Verdict:
    """The verdict by the difference itself; test_evidence.py judges by intervals."""
    return decide(champion, challenger, GatePolicy(**{"evidence": "point", **policy}))


def test_every_verdict_lists_every_rule_with_its_reason() -> None:
    for champion in (None, scores(0.5)):
        verdict = judge(champion, scores(0.6))
        assert len(verdict.rules) == len(RULES)
        assert all(r.reason for r in verdict.rules)
        assert all(r.name in verdict.to_markdown() for r in verdict.rules)


@pytest.mark.parametrize(("floor", "outcome"), [(0.6, "promote"), (0.61, "refuse")])
def test_first_champion_needs_the_floor(floor: float, outcome: str) -> None:
    verdict = judge(None, scores(0.6), floor=floor)
    assert verdict.outcome == outcome
    assert failed(verdict) == (set() if verdict.promote else {"floor"})


def test_win_and_loss() -> None:
    win = judge(scores(0.5), scores(0.6))
    assert win.promote and "gain +0.1000" in win.reason
    loss = judge(scores(0.6), scores(0.59))
    assert loss.outcome == "refuse"
    assert failed(loss) == {"gain"}
    assert "0.6000 -> 0.5900" in loss.reason


def test_tie_keeps_the_champion() -> None:
    verdict = judge(scores(0.6), scores(0.6, weights_sha256="others"))
    assert verdict.outcome == "refuse"
    assert "tie" in verdict.reason


@pytest.mark.parametrize(
    ("delta", "gain", "promoted"),
    [(0.1, 0.1, True), (0.1, 0.0999, False), (-0.02, -0.02, True), (-0.02, 0.0, True)],
)
def test_margin_is_reached_at_its_value(delta: float, gain: float, promoted: bool) -> None:
    assert judge(scores(0.6), scores(0.6 + gain, weights_sha256="x"), min_delta=delta).promote is (
        promoted
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
@pytest.mark.parametrize("who", ["challenger", "champion", "first"])
def test_missing_and_non_finite_metrics_are_refused(value: float | None, who: str) -> None:
    bad = scores(0.6, metrics={} if value is None else {"map_50_95": value}, weights_sha256="bad")
    champion = {"challenger": scores(0.1), "champion": bad, "first": None}[who]
    verdict = judge(champion, scores(0.9) if who == "champion" else bad)
    assert verdict.outcome == "refuse"
    assert "finite" in failed(verdict)
    assert "map_50_95 of the " in verdict.reason


def test_changed_class_list_needs_consent() -> None:
    other = scores(0.9, class_names=("0", "1", "7"))
    refused = judge(scores(0.5), other)
    assert failed(refused) == {"same_classes"}
    assert "added ['7'], removed ['4']" in refused.reason
    assert judge(scores(0.5), other, allow_class_change=True).promote


def test_a_champion_of_another_dataset_is_named_as_that() -> None:
    origin = "version 3 of trees was trained on the dataset oaks"
    refused = judge(scores(0.5), scores(0.9, class_names=("7",)), champion_origin=origin)
    assert failed(refused) == {"same_classes"}
    assert f"{origin} with the classes 0, 1, 4: choose another registry.name" in refused.reason
    assert judge(scores(0.5), scores(0.9), champion_origin=origin).promote  # a renamed dataset


def test_one_class_may_not_drop_too_far() -> None:
    per_class = {**scores(0.7).per_class, "4": ClassScore(ap=0.4, boxes=100)}
    worse = scores(0.7, per_class=per_class)
    verdict = judge(scores(0.5), worse)
    assert failed(verdict) == {"class_drop"}
    assert "4 0.5000 -> 0.4000" in verdict.reason
    assert judge(scores(0.5), worse, max_class_drop=0.1).promote
    assert judge(scores(0.5), worse, class_min_boxes=101).promote
    for broken in ({}, {**per_class, "4": ClassScore(ap=math.nan, boxes=100)}):
        assert "class_drop" in failed(judge(scores(0.5), scores(0.7, per_class=broken)))


def test_a_version_that_was_rolled_back_is_refused_with_its_reason() -> None:
    verdict = judge(scores(0.5), scores(0.6), rolled_back="misses small parts")
    assert verdict.outcome == "refuse"
    assert failed(verdict) == {"not_rolled_back"}
    assert "misses small parts" in verdict.reason
    assert judge(scores(0.5), scores(0.6)).promote


def test_masks_are_not_compared_with_boxes() -> None:
    verdict = judge(scores(0.5, iou_type="bbox"), scores(0.6, iou_type="segm"))
    assert failed(verdict) == {"same_test_set"}
    assert "champion is scored by boxes, the challenger by masks" in verdict.reason
    assert rule(verdict, "gain").passed is None
    assert judge(scores(0.5, iou_type="segm"), scores(0.6, iou_type="segm")).promote


def test_small_test_sets_do_not_decide() -> None:
    verdict = judge(scores(0.5, images=49), scores(0.6, images=49))
    assert failed(verdict) == {"min_images"}
    assert "49 images, 50 required" in verdict.reason


@pytest.mark.parametrize("change", [{"dataset_sha256": "older"}, {"settings": "test/100/v1"}])
def test_numbers_of_other_sets_or_settings_are_not_compared(change: dict[str, str]) -> None:
    verdict = judge(scores(0.5, **change), scores(0.6))
    assert failed(verdict) == {"same_test_set"}
    assert "score the champion again" in verdict.reason
    assert rule(verdict, "gain").passed is None


@pytest.mark.parametrize(
    ("field", "budget"), [("latency_ms", "max_latency_ms"), ("size_mb", "max_size_mb")]
)
def test_budgets(field: str, budget: str) -> None:
    def outcome(value: float | None) -> str:
        return judge(None, scores(0.6, **{field: value}), **{budget: 30.0}).outcome

    assert [outcome(30.0), outcome(30.1), outcome(None)] == ["promote", "refuse", "refuse"]


@pytest.mark.parametrize("parity", [False, None])
def test_export_must_agree(parity: bool | None) -> None:
    challenger = scores(0.6, export_parity=parity)
    assert failed(judge(None, challenger)) == {"export_parity"}
    assert judge(None, challenger, require_export_parity=False).promote


def test_manual_approval_is_the_last_step() -> None:
    waiting = judge(scores(0.5), scores(0.6), manual_approval=True)
    assert waiting.outcome == "approval" and not waiting.promote
    lost = judge(scores(0.6), scores(0.5), manual_approval=True)
    assert lost.outcome == "refuse"


def test_same_weights_are_a_no_op() -> None:
    verdict = judge(scores(0.6), scores(0.6))
    assert verdict.outcome == "no-op"
    assert verdict.reason == "already champion: same weights"


def test_records_survive_json() -> None:
    champion = scores(0.5, evidence=matches(0.5), metrics={"map_50_95": 0.5, "f1": math.nan})
    copy = Scores.model_validate_json(champion.model_dump_json())
    assert copy.evidence is not None
    assert np.array_equal(copy.evidence.matched, champion.evidence.matched)  # type: ignore[union-attr]
    assert math.isnan(copy.metrics["f1"])
    verdict = judge(champion, scores(0.6, evidence=matches(0.8)), evidence="superior")
    assert verdict.champion is not None and verdict.champion.evidence is None
    again = Verdict.model_validate_json(verdict.model_dump_json())
    assert again.model_dump_json() == verdict.model_dump_json()
    assert again.outcome == verdict.outcome and again.interval == verdict.interval


def test_policy_takes_the_gate_section() -> None:
    section = GateSettings(min_delta=0.02, manual_approval=True)
    policy = GatePolicy(**section.model_dump(), rolled_back="misses small parts")
    assert policy.min_delta == 0.02 and policy.rolled_back == "misses small parts"


number = st.floats(allow_nan=True, allow_infinity=True)
share = st.floats(0, 1)


@given(old=number, new=number, ap=number, delta=st.floats(-1, 1))
def test_never_promotes_without_finite_numbers(
    old: float, new: float, ap: float, delta: float
) -> None:
    per_class = {name: ClassScore(ap=ap, boxes=100) for name in CLASSES}
    challenger = scores(0.5, metrics={"map_50_95": new}, per_class=per_class, weights_sha256="n")
    verdict = judge(
        scores(0.5, metrics={"map_50_95": old}), challenger, min_delta=delta, max_class_drop=1.0
    )
    if verdict.promote:
        assert math.isfinite(old) and math.isfinite(new) and new - old >= delta - 1e-6


@given(old=share, new=share, more=share, delta=st.floats(-1, 1), first=st.booleans())
def test_a_higher_metric_never_turns_promotion_into_refusal(
    old: float, new: float, more: float, delta: float, first: bool
) -> None:
    champion = None if first else scores(old, per_class={})

    def promoted(value: float) -> bool:
        challenger = scores(value, per_class={}, weights_sha256="new")
        return judge(champion, challenger, min_delta=delta, floor=0.3).promote

    assert promoted(max(new, more)) or not promoted(min(new, more))


@settings(max_examples=50)
@given(st.data())
def test_stricter_policies_never_promote_more(data: st.DataObject) -> None:
    old, new = scores(data.draw(share)), scores(data.draw(share), weights_sha256="new")
    loose, strict = sorted(data.draw(st.tuples(share, share)))
    if judge(old, new, min_delta=strict, max_class_drop=loose).promote:
        # zero as a margin means "any gain", which a gain of rounding size does not reach
        assert judge(old, new, min_delta=loose, max_class_drop=strict).promote or strict < 1e-8
