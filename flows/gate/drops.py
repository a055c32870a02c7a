"""Rules against a better mean that hides a worse class or a worse slice."""

from __future__ import annotations

import math

from flows.gate.case import EPSILON, Case, not_compared, skip
from flows.gate.verdict import Rule

SLICE = "slice "  # rules of slices begin with it


def class_drop(case: Case) -> Rule:
    """No class with enough boxes may lose more than `max_class_drop` of its AP."""
    if not case.comparable or case.champion is None:
        return skip("class_drop", not_compared(case))
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


def slice_drops(case: Case) -> list[Rule]:
    """One rule per slice: with enough boxes, it may lose `max_slice_drop` of its mAP at most."""
    names = dict.fromkeys(case.challenger.slices)
    if case.champion is not None and case.comparable:
        names |= dict.fromkeys(case.champion.slices)
    return [_slice_drop(case, name) for name in names]


def _slice_drop(case: Case, name: str) -> Rule:
    title, limit = f"{SLICE}{name}", case.policy.max_slice_drop
    if not case.comparable or case.champion is None:
        return skip(title, not_compared(case))
    old, new = case.champion.slices.get(name), case.challenger.slices.get(name)
    if old is None or new is None:
        who = "champion" if old is None else "challenger"
        return Rule(name=title, passed=False, reason=f"the {who} was not scored on this slice")
    if new.boxes < case.policy.slice_min_boxes:
        few = f"{new.boxes} boxes, {case.policy.slice_min_boxes} required to judge"
        return skip(title, few)
    values = [math.nan if s.map_50_95 is None else s.map_50_95 for s in (old, new)]
    drop = values[0] - values[1]
    reason = f"mAP {values[0]:.4f} -> {values[1]:.4f}, largest accepted drop {limit:.4f}"
    if name in case.slices:
        reason += f", change in [{case.slices[name].lower:+.4f}, {case.slices[name].upper:+.4f}]"
    passed = math.isfinite(drop) and drop <= limit + EPSILON
    return Rule(name=title, passed=passed, observed=-drop, limit=-limit, reason=reason)
