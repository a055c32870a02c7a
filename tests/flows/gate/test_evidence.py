"""The rule `gain`: what an interval decides, what it cannot, and how often noise is promoted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flows.config.params import parse_params
from flows.gate import case
from flows.gate.decide import decide
from flows.gate.verdict import GatePolicy, Scores, Verdict
from rfdetr.errors import ConfigError
from rfdetr.evaluation.bootstrap import RESAMPLES, Interval, paired_bootstrap
from tests.flows.gate.simulation import (
    detect,
    draw_test_set,
    promoted,
    surely_refused,
    wilson,
    wins,
)
from tests.flows.gate.simulation import scores as simulated
from tests.flows.gate.test_gate import failed, matches, rule, scores


def judge(interval: tuple[float, float, float] | None, **policy: Any) -> Verdict:
    """The verdict on a challenger whose gain, lower and upper end are given."""
    gain = 0.03 if interval is None else interval[0]
    found = (None, "no per-image matches were recorded")
    if interval is not None:
        found = (Interval(*interval, confidence=0.95, resamples=RESAMPLES), "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(case.Case, "_paired", lambda self: found)
        new = scores(0.6 + gain, weights_sha256="new", per_class={})
        return decide(scores(0.6, per_class={}), new, GatePolicy(**policy))


WIN, UNSURE, TIE = (0.03, 0.01, 0.05), (0.01, -0.005, 0.025), (0.0, 0.0, 0.0)
LOSS, UNLUCKY = (-0.03, -0.05, -0.01), (-0.002, -0.008, 0.004)
WIDE = (0.01, -0.02, 0.04)


@pytest.mark.parametrize(
    ("interval", "policy", "superior", "non_inferior", "point"),
    [
        (WIN, {}, True, True, True),
        (UNSURE, {}, False, True, True),
        (WIDE, {}, False, False, True),
        (UNLUCKY, {}, False, False, False),
        (LOSS, {}, False, False, False),
        (TIE, {}, False, False, False),
        (None, {}, False, False, True),
        (WIN, {"min_delta": 0.01}, True, True, True),
        (WIN, {"min_delta": 0.02}, False, True, True),
        (WIN, {"min_delta": 0.04}, False, True, False),
        (UNLUCKY, {"min_delta": -0.01}, True, False, True),
        (UNSURE, {"tolerance": 0.005}, False, True, True),
        (UNSURE, {"tolerance": 0.004}, False, False, True),
        (UNSURE, {"tolerance": 0.0}, False, False, True),
        (WIN, {"tolerance": 0.0}, True, True, True),
        (TIE, {"tolerance": 0.0}, False, False, False),
    ],
)
def test_the_table_of_evidence(
    interval: Any, policy: Any, superior: bool, non_inferior: bool, point: bool
) -> None:
    expected = {"superior": superior, "non_inferior": non_inferior, "point": point}
    outcomes = {kind: "promote" if passed else "refuse" for kind, passed in expected.items()}
    for kind, passed in expected.items():
        verdict = judge(interval, evidence=kind, **policy)
        assert verdict.promote is passed, verdict.reason
        assert failed(verdict) == (set() if passed else {"gain"})
        assert verdict.other_evidence == {k: o for k, o in outcomes.items() if k != kind}
        assert (verdict.interval is None) == (interval is None)  # shown whatever decides
        if interval is not None:
            assert f"in [{interval[1]:+.4f}, {interval[2]:+.4f}]" in verdict.reason
    assert judge(interval, **policy).promote is superior  # the default


def test_a_missing_interval_is_named_and_refuses_unless_the_difference_decides() -> None:
    verdict = judge(None)
    assert "there is no interval: no per-image matches were recorded" in verdict.reason
    assert "non_inferior would refuse, point would promote" in verdict.reason


def test_the_verdict_says_what_the_other_evidence_would_have_decided() -> None:
    verdict = judge(UNSURE)
    assert verdict.reason.endswith("non_inferior would promote, point would promote")
    assert "Decided by `superior`" in verdict.to_markdown()
    assert "`non_inferior`: promote, `point`: promote" in verdict.to_markdown()
    assert "would" not in judge(WIN).reason  # all agree
    assert decide(None, scores(), GatePolicy()).other_evidence == {}


def test_a_test_set_that_is_too_small_is_told_how_many_images_would_do() -> None:
    verdict = judge(UNSURE)  # 200 images, 0.015 from the gain to the lower end, gain 0.01
    assert verdict.images_needed == 450
    assert "200 test images are too few to tell: about 450 would do" in verdict.reason
    assert judge(UNSURE, min_delta=0.005).images_needed == 1800
    assert judge(UNSURE, min_delta=0.015).images_needed == 1800  # from above: no superiority
    assert judge(UNSURE, min_delta=0.01).images_needed == 10_000_000
    assert "more than 10,000,000" in judge(UNSURE, min_delta=0.01).reason
    assert judge(UNSURE, evidence="non_inferior", tolerance=0.0).images_needed == 450
    for interval in (WIN, LOSS):
        assert judge(interval).images_needed is None
        assert "too few" not in judge(interval).reason
    assert judge(UNSURE, evidence="point").images_needed is None


def test_the_number_of_images_is_enough_when_it_is_provided() -> None:
    random = np.random.default_rng(1)
    test = draw_test_set(4000, random)
    old, new = detect(test, 0.9, random), detect(test, 1.1, random)
    small = paired_bootstrap(_first(old, 60), _first(new, 60))
    needed = small.images_needed(0.0, 60)
    assert small.lower < 0 and needed is not None and 60 < needed < 2000
    assert paired_bootstrap(_first(old, 2 * needed), _first(new, 2 * needed)).lower > 0


def _first(evidence: Any, images: int) -> Any:
    return evidence.take(np.arange(images))


def test_the_interval_is_of_the_metric_that_is_compared() -> None:
    old, new = matches(0.5), matches(0.9)
    for metric in ("map_50_95", "map_50", "map_75", "f1"):
        values = {metric: 0.5}, {metric: 0.6}
        verdict = decide(
            scores(0.5, metrics=values[0], evidence=old),
            scores(0.6, metrics=values[1], evidence=new),
            GatePolicy(metric=metric),
        )
        assert verdict.promote and verdict.interval == paired_bootstrap(old, new, metric=metric)
        assert verdict.interval.resamples == 1000


def test_matches_of_other_boxes_are_refused_and_a_new_class_list_is_not() -> None:
    champion = scores(0.5, evidence=matches(0.5))
    verdict = decide(champion, scores(0.9, evidence=matches(0.9, images=30)), GatePolicy())
    assert "same images and boxes" in rule(verdict, "gain").reason
    other = scores(0.9, class_names=("0", "1", "7"), evidence=matches(0.9))
    assert decide(champion, other, GatePolicy(allow_class_change=True)).promote


def test_the_old_switch_is_explained() -> None:
    with pytest.raises(ConfigError, match=r"gate.bootstrap: cannot be set here; the interval is"):
        parse_params({"gate": {"bootstrap": 1000}})
    with pytest.raises(ConfigError, match=r"gate.tolerance"):
        parse_params({"gate": {"tolerance": None}})
    with pytest.raises(ConfigError, match=r"gate.evidence: .*superior.*non_inferior"):
        parse_params({"gate": {"evidence": "bayes"}})


@pytest.mark.slow
def test_noise_is_promoted_in_at_most_five_percent_and_a_real_gain_is_seen() -> None:
    for difference, evidence in ((0.0, "superior"), (-0.011, "non_inferior")):
        for images, trials in ((200, 1500), (1000, 400)):
            count = wins(difference, images, trials, evidence)  # type: ignore[arg-type]
            low, high = wilson(count, trials)
            print(f"{evidence}, {images} images, {difference:+}: {low:.3f} to {high:.3f}")
            assert count <= 0.05 * trials
    assert wins(0.0, 200, 200, "point") > 80  # what the default used to promote
    assert wins(0.02, 1000, 60, "superior") > 30


def test_a_known_refusal_needs_fewer_resamples() -> None:
    policies = [GatePolicy(evidence="superior"), GatePolicy(evidence="non_inferior")]
    outcomes = set()
    for seed, quality in enumerate((0.9, 0.95, 1.0, 1.05, 1.1)):
        random = np.random.default_rng(seed)
        test = draw_test_set(60, random)
        old, new = detect(test, 0.9, random), detect(test, quality, random)
        for policy in policies:
            complete = decide(simulated("a", old), simulated("b", new), policy).promote
            assert promoted(old, new, policy) is complete
            early = [surely_refused(old, new, policy, first) for first in (60, 104, 260)]
            outcomes.add((complete, *early))
    assert {any(outcome[1:]) for outcome in outcomes} == {True, False}
    assert all(not any(early) for complete, *early in outcomes if complete)


def test_the_simulation_draws_detectors_that_are_compared_on_the_same_boxes() -> None:
    random = np.random.default_rng(0)
    test = draw_test_set(100, random)
    old, new = detect(test, 0.0, random), detect(test, 2.0, random)
    verdict = decide(simulated("a", old), simulated("b", new), GatePolicy())
    assert verdict.promote and isinstance(verdict.challenger, Scores)
