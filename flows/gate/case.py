"""The two sets of scores that the gate compares, and values that several rules need."""

from __future__ import annotations

import contextlib
import math

import numpy as np

from flows.gate.verdict import GatePolicy, Rule, Scores, SliceChange
from rfdetr.errors import InputError
from rfdetr.evaluation.bootstrap import Interval, paired_bootstrap
from rfdetr.evaluation.evidence import MatchEvidence

EPSILON = 1e-9  # smaller differences are rounding errors


class Case:
    """Champion (None before the first), challenger and policy.

    `interval` is the paired interval of the primary metric; without one, `no_interval` says why.
    `slices` has the change of each slice that both models have, with its interval.
    """

    def __init__(self, champion: Scores | None, challenger: Scores, policy: GatePolicy) -> None:
        self.champion, self.challenger, self.policy = champion, challenger, policy
        self.comparable = champion is not None and (
            (champion.dataset_sha256, champion.settings, champion.iou_type)
            == (challenger.dataset_sha256, challenger.settings, challenger.iou_type)
        )
        self.interval: Interval | None = None
        self.no_interval = not_compared(self)
        if self.comparable:
            self.interval, self.no_interval = self._paired()
        self.slices = self._slice_changes() if self.interval is not None else {}

    def _paired(self) -> tuple[Interval | None, str]:
        assert self.champion is not None
        old, new = self.champion.evidence, self.challenger.evidence
        if self.champion.weights_sha256 == self.challenger.weights_sha256:
            return None, "same weights"
        if old is None or new is None:
            return None, "no per-image matches were recorded"
        try:
            return paired_bootstrap(old, new, metric=self.policy.metric), ""
        except InputError as error:
            return None, str(error)

    def _slice_changes(self) -> dict[str, SliceChange]:
        assert self.champion is not None
        changes = {}
        for name in self.challenger.slices:
            pair = [slice_evidence(scores, name) for scores in (self.champion, self.challenger)]
            if pair[0] is None or pair[1] is None:
                continue
            with contextlib.suppress(InputError):  # too few or other boxes: see the slice's rule
                found = paired_bootstrap(pair[0], pair[1])
                changes[name] = SliceChange(
                    change=found.observed, lower=found.lower, upper=found.upper
                )
        return changes

    def value(self, scores: Scores) -> float:
        """The primary metric; NaN if missing."""
        return scores.metrics.get(self.policy.metric, math.nan)

    @property
    def old(self) -> float:
        """The champion's value; NaN without a champion."""
        return math.nan if self.champion is None else self.value(self.champion)

    @property
    def new(self) -> float:
        """The challenger's value."""
        return self.value(self.challenger)


def slice_evidence(scores: Scores, name: str) -> MatchEvidence | None:
    """The matches of one slice; None if they were not recorded."""
    found = scores.slices.get(name)
    if found is None or found.members is None or scores.evidence is None:
        return None if found is None else found.evidence
    return scores.evidence.take(np.array(found.members, dtype=np.int64))


def skip(name: str, reason: str) -> Rule:
    """A rule that does not apply."""
    return Rule(name=name, passed=None, reason=reason)


def not_compared(case: Case) -> str:
    """Why a comparing rule does not apply."""
    if case.champion is None:
        return "no champion yet"
    return "not scored on the same test set with the same settings"
