"""Compares challenger and champion: a pure decision over two sets of scores, rule by rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import get_args

from flows.config.sections import GateEvidence
from flows.gate.case import EPSILON, Case, skip
from flows.gate.drops import SLICE, class_drop, slice_drops
from flows.gate.gain import gain, images_needed
from flows.gate.verdict import GatePolicy, Outcome, Rule, Scores, Verdict

WOULD: dict[Outcome, str] = {
    "promote": "promote",
    "refuse": "refuse",
    "approval": "wait for approval",
    "no-op": "do nothing",
}


def decide(
    champion: Scores | None,
    challenger: Scores,
    policy: GatePolicy,
    champion_version: int | None = None,
) -> Verdict:
    """Judge a challenger. Reads and writes nothing, and does not raise on bad numbers.

    Every rule is evaluated and listed in the verdict. The outcome is `no-op` if the challenger has
    the champion's weights, `approval` if only manual approval is missing, `refuse` if any other
    rule fails, and `promote` otherwise. Comparing rules are skipped when the two models were not
    scored on the same test set with the same settings.
    """
    case = Case(champion, challenger, policy)
    rules = [*(rule(case) for rule in RULES), *slice_drops(case)]
    outcome, failed = _outcome(rules)
    why = "; ".join(map(_why, failed))
    if not failed:
        why = next(r for r in rules if r.name == ("gain" if champion else "floor")).reason
    others = _with_other_evidence(case, rules)
    if any(other != outcome for other in others.values()):
        why += "; " + ", ".join(f"{name} would {WOULD[other]}" for name, other in others.items())
    return Verdict(
        outcome=outcome,
        reason=why,
        rules=tuple(rules),
        challenger=challenger.without_evidence(),
        champion=champion and champion.without_evidence(),
        champion_version=champion_version,
        interval=case.interval,
        images_needed=images_needed(case, policy.evidence),
        other_evidence=others,
        slices=case.slices,
        policy=policy,
    )


def _outcome(rules: Sequence[Rule]) -> tuple[Outcome, list[Rule]]:
    """The outcome, and the rules that explain it."""
    failed = [rule for rule in rules if rule.passed is False]
    names = {rule.name for rule in failed}
    if "new_weights" in names:
        return "no-op", [rule for rule in failed if rule.name == "new_weights"]
    if not failed:
        return "promote", []
    return ("approval" if names == {"approval"} else "refuse"), failed


def _why(rule: Rule) -> str:
    """The reason of a failed rule, with the slice that it is about."""
    return f"{rule.name}: {rule.reason}" if rule.name.startswith(SLICE) else rule.reason


def _with_other_evidence(case: Case, rules: Sequence[Rule]) -> dict[GateEvidence, Outcome]:
    """What the gate would have decided with the other two values of `gate.evidence`."""
    if not case.comparable:
        return {}
    kinds: tuple[GateEvidence, ...] = get_args(GateEvidence)
    return {
        kind: _outcome([gain(case, kind) if rule.name == "gain" else rule for rule in rules])[0]
        for kind in kinds
        if kind != case.policy.evidence
    }


def _finite(case: Case) -> Rule:
    wrong = []
    for who, scores in (("challenger", case.challenger), ("champion", case.champion)):
        if scores is not None and not math.isfinite(case.value(scores)):
            found = scores.metrics.get(case.policy.metric, "missing")
            wrong.append(f"{case.policy.metric} of the {who} is {found}")
    reason = "; ".join(wrong) or f"{case.policy.metric} is a number"
    return Rule(name="finite", passed=not wrong, observed=case.new, reason=reason)


def _new_weights(case: Case) -> Rule:
    if case.champion is None:
        return skip("new_weights", "no champion yet")
    same = case.champion.weights_sha256 == case.challenger.weights_sha256
    reason = "already champion: same weights" if same else "weights differ from the champion's"
    short = case.challenger.weights_sha256[:12]
    return Rule(name="new_weights", passed=not same, observed=short, reason=reason)


def _not_rolled_back(case: Case) -> Rule:
    why = case.policy.rolled_back
    reason = "was not rolled back"
    if why is not None:
        reason = f"was rolled back: {why} (`promote --force` overrides this)"
    return Rule(name="not_rolled_back", passed=why is None, reason=reason)


def _same_test_set(case: Case) -> Rule:
    if case.champion is None:
        return skip("same_test_set", "no champion yet")
    reason = "scored on the same test set with the same settings"
    if not case.comparable:
        reason = _scoring_difference(case.champion, case.challenger)
    return Rule(
        name="same_test_set",
        passed=case.comparable,
        observed=case.challenger.dataset_sha256[:12],
        limit=case.champion.dataset_sha256[:12],
        reason=reason,
    )


def _scoring_difference(old: Scores, new: Scores) -> str:
    if old.iou_type != new.iou_type:
        by = {"bbox": "boxes", "segm": "masks"}
        return (
            f"the champion is scored by {by[old.iou_type]}, the challenger by {by[new.iou_type]}: "
            "not comparable (`promote --force` overrides this)"
        )
    what = "settings" if old.dataset_sha256 == new.dataset_sha256 else "test sets"
    return f"scored with different {what}: score the champion again before comparing"


def _same_classes(case: Case) -> Rule:
    if case.champion is None:
        return skip("same_classes", "no champion yet")
    old, new = set(case.champion.class_names), set(case.challenger.class_names)
    if old == new:
        return Rule(name="same_classes", passed=True, reason=f"same {len(new)} classes")
    reason = f"class list changed: added {sorted(new - old)}, removed {sorted(old - new)}"
    if origin := case.policy.champion_origin:
        reason = (
            f"{origin} with the classes {', '.join(sorted(old))}: choose another registry.name for "
            "this dataset"
        )
    if not case.policy.allow_class_change:
        reason += " (set gate.allow_class_change to accept it)"
    return Rule(name="same_classes", passed=case.policy.allow_class_change, reason=reason)


def _min_images(case: Case) -> Rule:
    found, limit = case.challenger.images, case.policy.min_images
    return Rule(
        name="min_images",
        passed=found >= limit,
        observed=float(found),
        limit=float(limit),
        reason=f"test set has {found} images, {limit} required",
    )


def _floor(case: Case) -> Rule:
    if case.champion is not None:
        return skip("floor", "applies only without a champion")
    return Rule(
        name="floor",
        passed=case.new >= case.policy.floor - EPSILON,
        observed=case.new,
        limit=case.policy.floor,
        reason=f"no champion yet: {case.policy.metric} {case.new:.4f}, "
        f"floor {case.policy.floor:.4f}",
    )


def _budget(name: str, field: str, unit: str) -> Callable[[Case], Rule]:
    def rule(case: Case) -> Rule:
        limit: float | None = getattr(case.policy, f"max_{field}")
        found: float | None = getattr(case.challenger, field)
        if limit is None:
            return skip(name, "no budget set")
        passed = found is not None and found <= limit
        shown = "not measured" if found is None else f"{found:.2f} {unit}"
        on = case.challenger.latency_on if name == "latency" else None
        reason = f"{name} {shown}{f' on {on}' if on else ''}, budget {limit:.2f} {unit}"
        return Rule(name=name, passed=passed, observed=found, limit=limit, reason=reason)

    return rule


def _false_alarms(case: Case) -> Rule:
    limit = case.policy.max_false_alarms_per_image
    if limit is None:
        return skip("false_alarms", "no budget set")
    point = case.challenger.operating_point
    found = None if point is None else point.false_alarms
    return Rule(
        name="false_alarms",
        passed=found is not None and found <= limit + EPSILON,
        observed=found,
        limit=limit,
        reason=f"false alarms per image at the operating point "
        f"{'not measured' if found is None else f'{found:.4f}'}, budget {limit:.4f}",
    )


def _export(case: Case) -> Rule:
    if not case.policy.require_export_parity:
        return skip("export_parity", "not required")
    parity = case.challenger.export_parity
    reason = "the export was not compared with the weights"
    if parity is not None:
        reason = f"the export {'agrees with' if parity else 'differs from'} the weights"
    return Rule(name="export_parity", passed=parity is True, reason=reason)


def _approval(case: Case) -> Rule:
    if not case.policy.manual_approval:
        return skip("approval", "not required")
    return Rule(name="approval", passed=False, reason="awaiting manual approval")


RULES: tuple[Callable[[Case], Rule], ...] = (
    _finite,
    _new_weights,
    _not_rolled_back,
    _same_test_set,
    _same_classes,
    _min_images,
    _floor,
    gain,
    class_drop,
    _budget("latency", "latency_ms", "ms"),
    _budget("size", "size_mb", "MB"),
    _false_alarms,
    _export,
    _approval,
)
