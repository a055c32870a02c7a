"""The rule `gain`: whether the challenger is better, by the evidence that the policy asks for.

| gate.evidence | the challenger passes if                                              |
|---------------|-----------------------------------------------------------------------|
| superior      | the lower end of the interval is at least `min_delta`                 |
| non_inferior  | the difference is above 0 and the lower end is at least `-tolerance`  |
| point         | the difference is at least `min_delta`                                |

Where the limit is 0, a difference of exactly 0 is a tie, and the champion stays.
"""

from __future__ import annotations

from flows.config.sections import GateEvidence
from flows.gate.case import EPSILON, Case, not_compared, skip
from flows.gate.verdict import Rule

MANY_IMAGES = 10_000_000  # larger estimates are shown as this one


def gain(case: Case, evidence: GateEvidence | None = None) -> Rule:
    """The rule, by `evidence` (default: the policy's)."""
    if not case.comparable:
        return skip("gain", not_compared(case))
    policy = case.policy
    evidence = evidence or policy.evidence
    limit = -policy.tolerance if evidence == "non_inferior" else policy.min_delta
    change = case.new - case.old
    observed: float | None = change
    if evidence != "point":
        observed = None if case.interval is None else case.interval.lower
    passed = observed is not None and observed >= limit - EPSILON
    if evidence == "non_inferior" or limit == 0:  # a tie keeps the proven champion
        passed = passed and change > EPSILON
    return Rule(
        name="gain",
        passed=passed,
        observed=observed,
        limit=limit,
        reason=_reason(case, evidence, limit, passed=passed),
    )


def _reason(case: Case, evidence: GateEvidence, limit: float, *, passed: bool) -> str:
    change, interval = case.new - case.old, case.interval
    text = f"{case.policy.metric} {case.old:.4f} -> {case.new:.4f}, gain {change:+.4f}"
    if interval is not None:
        text += f" in [{interval.lower:+.4f}, {interval.upper:+.4f}] at 95 %"
    required = {
        "superior": f"its lower end must be at least {limit:+.4f}",
        "non_inferior": f"more than 0 and its lower end at least {limit:+.4f} required",
        "point": f"required {'more than 0' if limit == 0 else f'{limit:+.4f}'}",
    }
    text += f", {required[evidence]}"
    if interval is None and evidence != "point":
        text += f"; there is no interval: {case.no_interval}"
    if not passed and abs(change) <= EPSILON:
        text += " (tie: the champion stays)"
    elif not passed and (needed := images_needed(case, evidence)):
        size = f"more than {MANY_IMAGES:,}" if needed >= MANY_IMAGES else f"about {needed:,}"
        text += (
            f"; {case.challenger.images} test images are too few to tell: {size} would do if the "
            "difference stays"
        )
    return text


def images_needed(case: Case, evidence: GateEvidence) -> int | None:
    """How many test images would decide, to two digits; None if the present ones do."""
    if case.interval is None or evidence == "point":
        return None
    limit = -case.policy.tolerance if evidence == "non_inferior" else case.policy.min_delta
    needed = case.interval.images_needed(limit, case.challenger.images)
    if needed is None:
        return None
    needed = min(needed, MANY_IMAGES)
    step = int(10 ** max(0, len(str(needed)) - 2))
    return min(MANY_IMAGES, -(-needed // step) * step)
