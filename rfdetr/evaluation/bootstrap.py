"""Paired bootstrap over images: a confidence interval for the difference of two detectors.

A resample draws images with replacement (Efron and Tibshirani, "An Introduction to the Bootstrap",
1993); an image drawn k times counts k times, for both detectors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from rfdetr.errors import InputError
from rfdetr.evaluation.evidence import MatchEvidence
from rfdetr.evaluation.resample import CELLS_AT_ONCE, Metric, statistic

RESAMPLES = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """The difference of a metric, challenger minus champion, and its percentile interval."""

    observed: float
    lower: float
    upper: float
    confidence: float
    resamples: int

    def images_needed(self, limit: float, images: int) -> int | None:
        """How many images would decide on which side of `limit` the difference lies.

        None if those from which the interval was computed, `images`, do: it does not contain the
        limit. Assumes that the observed difference stays, and that the interval shrinks with the
        square root of the number of images.
        """
        if not self.lower < limit <= self.upper:
            return None
        distance = max(abs(self.observed - limit), 1e-9)
        reach = self.observed - self.lower if self.observed >= limit else self.upper - self.observed
        return math.ceil(round(images * (reach / distance) ** 2, 6))


def paired_bootstrap(
    champion: MatchEvidence,
    challenger: MatchEvidence,
    *,
    metric: Metric = "map_50_95",
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval:
    """Percentile interval of the difference, both detectors on the same resampled images.

    `confidence` is two-sided. Deterministic for a seed. Raises InputError when the two were not
    scored on the same boxes, image by image, or when fewer than two images have boxes.
    """
    if not np.array_equal(champion.positives, challenger.positives):
        raise InputError("the two detectors were not scored on the same images and boxes")
    if np.count_nonzero(challenger.positives.any(axis=1)) < 2:
        raise InputError("fewer than two images have boxes: there is nothing to resample")
    old, new = statistic(champion, metric), statistic(challenger, metric)
    random = np.random.default_rng(seed)
    images = challenger.images
    step = max(1, CELLS_AT_ONCE // images)
    differences = np.empty(resamples)
    for start in range(0, resamples, step):
        part = differences[start : start + step]
        drawn = [random.integers(0, images, images) for _ in part]
        weights = np.array([np.bincount(row, minlength=images) for row in drawn])
        part[:] = new(weights) - old(weights)
    differences = differences[~np.isnan(differences)]
    tail = (1.0 - confidence) / 2
    lower, upper = np.quantile(differences, [tail, 1.0 - tail])
    once = np.ones((1, images), dtype=np.int64)
    observed = new(once)[0] - old(once)[0]
    return Interval(float(observed), float(lower), float(upper), confidence, resamples)
