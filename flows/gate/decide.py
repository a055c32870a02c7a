"""Compares challenger and champion: a pure decision over two sets of scores, rule by rule."""

from __future__ import annotations

import math
from collections.abc import Callable

from flows.gate.verdict import GatePolicy, Outcome, Rule, Scores, Verdict
from rfdetr.errors import InputError
from rfdetr.evaluation.bootstrap import Interval, Metric, paired_bootstrap

EPSILON = 1e-9  # smaller differences are rounding errors
DEFAULT_RESAMPLES = 1000


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
    case = _Case(champion, challenger, policy)
    rules = tuple(rule(case) for rule in RULES)
    failed = [rule for rule in rules if rule.passed is False]
    names = {rule.name for rule in failed}
    outcome: Outcome = "refuse"
    if "new_weights" in names:
        outcome = "no-op"
        failed = [rule for rule in failed if rule.name == "new_weights"]
    elif not failed:
        outcome = "promote"
    elif names == {"approval"}:
        outcome = "approval"
    why = "; ".join(rule.reason for rule in failed)
    if not failed:
        why = next(r for r in rules if r.name == ("gain" if champion else "floor")).reason
    return Verdict(
        outcome=outcome,
        reason=why,
        rules=rules,
        challenger=challenger.model_copy(update={"evidence": None}),
        champion=champion and champion.model_copy(update={"evidence": None}),
        champion_version=champion_version,
        interval=case.interval,
        policy=policy,
    )


class _Case:
    """The two sets of scores, and values that several rules need."""

    def __init__(self, champion: Scores | None, challenger: Scores, policy: GatePolicy) -> None:
        self.champion, self.challenger, self.policy = champion, challenger, policy
        self.comparable = champion is not None and (
            (champion.dataset_sha256, champion.settings, champion.iou_type)
            == (challenger.dataset_sha256, challenger.settings, challenger.iou_type)
        )
        self.same_classes = champion is None or (
            sorted(champion.class_names) == sorted(challenger.class_names)
        )
        self.interval: Interval | None = None

    def value(self, scores: Scores) -> float:
        """The primary metric; NaN if missing."""
        return scores.metrics.get(self.policy.metric, math.nan)

    @property
    def old(self) -> float:
        return math.nan if self.champion is None else self.value(self.champion)

    @property
    def new(self) -> float:
        return self.value(self.challenger)


def _skip(name: str, reason: str) -> Rule:
    return Rule(name=name, passed=None, reason=reason)


def _not_compared(case: _Case) -> str:
    if case.champion is None:
        return "no champion yet"
    return "not scored on the same test set with the same settings"


def _finite(case: _Case) -> Rule:
    wrong = []
    for who, scores in (("challenger", case.challenger), ("champion", case.champion)):
        if scores is not None and not math.isfinite(case.value(scores)):
            found = scores.metrics.get(case.policy.metric, "missing")
            wrong.append(f"{case.policy.metric} of the {who} is {found}")
    reason = "; ".join(wrong) or f"{case.policy.metric} is a number"
    return Rule(name="finite", passed=not wrong, observed=case.new, reason=reason)


def _new_weights(case: _Case) -> Rule:
    if case.champion is None:
        return _skip("new_weights", "no champion yet")
    same = case.champion.weights_sha256 == case.challenger.weights_sha256
    reason = "already champion: same weights" if same else "weights differ from the champion's"
    short = case.challenger.weights_sha256[:12]
    return Rule(name="new_weights", passed=not same, observed=short, reason=reason)


def _not_rolled_back(case: _Case) -> Rule:
    why = case.policy.rolled_back
    reason = "was not rolled back"
    if why is not None:
        reason = f"was rolled back: {why} (`promote --force` overrides this)"
    return Rule(name="not_rolled_back", passed=why is None, reason=reason)


def _same_test_set(case: _Case) -> Rule:
    if case.champion is None:
        return _skip("same_test_set", "no champion yet")
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


def _same_classes(case: _Case) -> Rule:
    if case.champion is None:
        return _skip("same_classes", "no champion yet")
    old, new = set(case.champion.class_names), set(case.challenger.class_names)
    if case.same_classes:
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


def _min_images(case: _Case) -> Rule:
    found, limit = case.challenger.images, case.policy.min_images
    return Rule(
        name="min_images",
        passed=found >= limit,
        observed=float(found),
        limit=float(limit),
        reason=f"test set has {found} images, {limit} required",
    )


def _floor(case: _Case) -> Rule:
    if case.champion is not None:
        return _skip("floor", "applies only without a champion")
    return Rule(
        name="floor",
        passed=case.new >= case.policy.floor - EPSILON,
        observed=case.new,
        limit=case.policy.floor,
        reason=f"no champion yet: {case.policy.metric} {case.new:.4f}, "
        f"floor {case.policy.floor:.4f}",
    )


def _gain(case: _Case) -> Rule:
    if not case.comparable:
        return _skip("gain", _not_compared(case))
    gain, limit = case.new - case.old, case.policy.min_delta
    # without a margin, a tie keeps the champion, which is proven in production
    passed = gain > EPSILON if limit == 0 else gain >= limit - EPSILON
    tie = " (tie: the champion stays)" if not passed and abs(gain) <= EPSILON else ""
    return Rule(
        name="gain",
        passed=passed,
        observed=gain,
        limit=limit,
        reason=f"{case.policy.metric} {case.old:.4f} -> {case.new:.4f}, gain {gain:+.4f}, "
        f"required {'more than 0' if limit == 0 else f'{limit:+.4f}'}{tie}",
    )


def _class_drop(case: _Case) -> Rule:
    if not case.comparable or case.champion is None:
        return _skip("class_drop", _not_compared(case))
    limit, worst, bad = case.policy.max_class_drop, 0.0, []
    kept = set(case.challenger.class_names)
    for name, old in case.champion.per_class.items():
        if name not in kept or old.boxes < case.policy.class_min_boxes or math.isnan(old.ap):
            continue
        new = case.challenger.per_class.get(name)
        drop = old.ap - new.ap if new else math.nan
        if math.isnan(drop) or drop > limit + EPSILON:
            bad.append(f"{name} {old.ap:.4f} -> {new.ap if new else math.nan:.4f}")
        if not math.isnan(drop):
            worst = max(worst, drop)
    reason = f"largest drop of a class {worst:.4f}, allowed {limit:.4f}"
    if bad:
        reason = f"classes dropped by more than {limit:.4f}: " + ", ".join(bad)
    return Rule(name="class_drop", passed=not bad, observed=worst, limit=limit, reason=reason)


def _no_interval(case: _Case) -> str | None:
    """Why the difference has no confidence interval, or None."""
    if not case.comparable:
        return _not_compared(case)
    if not case.same_classes:
        return "class lists differ: no confidence interval"
    assert case.champion is not None
    if case.champion.evidence is None or case.challenger.evidence is None:
        return "no per-image matches were recorded"
    return None


def _bootstrap(case: _Case) -> Rule:
    policy, tolerance = case.policy, case.policy.tolerance
    if not policy.bootstrap and tolerance is None:
        return _skip("bootstrap", "not requested")
    if case.champion is None:
        return _skip("bootstrap", _not_compared(case))
    required = None if tolerance is None else False
    missing = _no_interval(case)
    if missing is not None:
        return Rule(name="bootstrap", passed=required, reason=missing)
    old, new = case.champion.evidence, case.challenger.evidence
    assert old is not None and new is not None
    metric: Metric = "map_50_95" if policy.metric == "f1" else policy.metric
    try:
        case.interval = paired_bootstrap(
            old, new, metric=metric, resamples=policy.bootstrap or DEFAULT_RESAMPLES
        )
    except InputError as error:
        return Rule(name="bootstrap", passed=required, reason=str(error))
    lower, upper = case.interval.lower, case.interval.upper
    limit = None if tolerance is None else -tolerance
    needed = "" if limit is None else f", lower bound must be at least {limit:+.4f}"
    return Rule(
        name="bootstrap",
        passed=None if limit is None else lower >= limit - EPSILON,
        observed=lower,
        limit=limit,
        reason=f"{metric} difference in [{lower:+.4f}, {upper:+.4f}] at 95 %{needed}",
    )


def _budget(name: str, field: str, unit: str) -> Callable[[_Case], Rule]:
    def rule(case: _Case) -> Rule:
        limit: float | None = getattr(case.policy, f"max_{field}")
        found: float | None = getattr(case.challenger, field)
        if limit is None:
            return _skip(name, "no budget set")
        passed = found is not None and found <= limit
        shown = "not measured" if found is None else f"{found:.2f} {unit}"
        reason = f"{name} {shown}, budget {limit:.2f} {unit}"
        return Rule(name=name, passed=passed, observed=found, limit=limit, reason=reason)

    return rule


def _export(case: _Case) -> Rule:
    if not case.policy.require_export_parity:
        return _skip("export_parity", "not required")
    parity = case.challenger.export_parity
    reason = "the export was not compared with the weights"
    if parity is not None:
        reason = f"the export {'agrees with' if parity else 'differs from'} the weights"
    return Rule(name="export_parity", passed=parity is True, reason=reason)


def _approval(case: _Case) -> Rule:
    if not case.policy.manual_approval:
        return _skip("approval", "not required")
    return Rule(name="approval", passed=False, reason="awaiting manual approval")


RULES: tuple[Callable[[_Case], Rule], ...] = (
    _finite,
    _new_weights,
    _not_rolled_back,
    _same_test_set,
    _same_classes,
    _min_images,
    _floor,
    _gain,
    _class_drop,
    _bootstrap,
    _budget("latency", "latency_ms", "ms"),
    _budget("size", "size_mb", "MB"),
    _export,
    _approval,
)
