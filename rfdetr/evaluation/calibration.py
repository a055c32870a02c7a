"""Whether scores are probabilities: the reliability curve and the expected calibration error.

Küppers et al., "Multivariate Confidence Calibration for Object Detection" (2020), with the score as
the only variable: of the detections with a score near s, a share of s should be right.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rfdetr.evaluation.evidence import MatchEvidence

BINS = 10
LOWEST_SCORE = 0.05  # the many detections below would hide all others


@dataclass(frozen=True)
class ReliabilityBin:
    """Detections with a score from `low` to `high`: mean score, and the share that is right."""

    low: float
    high: float
    detections: int
    score: float
    precision: float


@dataclass(frozen=True)
class Calibration:
    """The reliability curve at IoU 0.5, without empty bins, and its expected error `ece`.

    `ece` is the mean of |score - precision| over the bins, weighted by their detections: 0 is
    perfect. None without a detection of score 0.05 or more.
    """

    ece: float | None
    bins: tuple[ReliabilityBin, ...]


def calibration(evidence: MatchEvidence) -> Calibration:
    """The calibration of a detector from its matches; ignored detections do not count."""
    counted = (evidence.ignored & 1 == 0) & (evidence.score >= LOWEST_SCORE)
    score = evidence.score[counted].astype(np.float64)
    right = (evidence.matched & 1 == 1)[counted]
    place = np.minimum((score * BINS).astype(int), BINS - 1)
    bins = []
    for number in np.unique(place).tolist():
        own = place == number
        bins.append(
            ReliabilityBin(
                low=number / BINS,
                high=(number + 1) / BINS,
                detections=int(own.sum()),
                score=float(score[own].mean()),
                precision=float(right[own].mean()),
            )
        )
    if not bins:
        return Calibration(None, ())
    error = sum(row.detections * abs(row.score - row.precision) for row in bins) / len(score)
    return Calibration(error, tuple(bins))
