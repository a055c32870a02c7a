"""Pairs of detectors whose true difference is known, to count what the gate makes of them.

    python -m tests.flows.gate.simulation [--images 5000 --differences 0 --evidence superior]

prints the table of docs/evaluation.md, with 95 % intervals of the rates (Wilson, 1927). A trial
with 5,000 images takes about five seconds on one core where the gate promotes, and one where not.

A test set has `images` images with about three boxes of three classes each. How hard an image is
both detectors share, which is why their scores are compared in pairs; which boxes they find, and
how well, is drawn for each. Test sets are drawn again in every trial.
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass
from typing import get_args

import numpy as np

from flows.config.sections import GateEvidence
from flows.gate.case import EPSILON
from flows.gate.decide import decide
from flows.gate.verdict import GatePolicy, Scores
from rfdetr.evaluation.bootstrap import CONFIDENCE, RESAMPLES, paired_bootstrap
from rfdetr.evaluation.evidence import MatchEvidence
from rfdetr.evaluation.resample import statistic

CLASSES, BOXES, FALSE = 3, 3.0, 4.0  # FALSE: false alarms per image, most with low scores
QUALITY = 0.9  # of the champion: a mAP of about 0.6
THRESHOLDS = 10
FIRST = (104, 260)  # resamples that are enough for most refusals


@dataclass(frozen=True)
class TestSet:
    """Boxes of a test set: image (n,), label (n,), and how easy each image is (images,)."""

    image: np.ndarray
    label: np.ndarray
    ease: np.ndarray


def draw_test_set(images: int, random: np.random.Generator) -> TestSet:
    count = random.poisson(BOXES, images)
    image = np.repeat(np.arange(images), count)
    label = random.integers(0, CLASSES, len(image))
    return TestSet(image, label, random.normal(0, 0.7, images))


def detect(test: TestSet, quality: float, random: np.random.Generator) -> MatchEvidence:
    """The matches of a detector: IoU and score of a box rise with its ease and the quality."""
    images, boxes = len(test.ease), len(test.image)
    fit = quality + test.ease[test.image] + random.normal(0, 1.2, boxes)
    level = np.clip(np.floor(4 + 3 * fit), 0, THRESHOLDS).astype(int)  # thresholds reached
    false = random.poisson(FALSE, images)
    image = np.r_[test.image, np.repeat(np.arange(images), false)]
    label = np.r_[test.label, random.integers(0, CLASSES, false.sum())]
    score = np.r_[fit + random.normal(0, 0.8, boxes), random.normal(-1.5, 1.2, false.sum())]
    matched = np.r_[(1 << level) - 1, np.zeros(false.sum(), dtype=int)]
    positives = np.zeros((images, CLASSES), dtype=np.int32)
    np.add.at(positives, (test.image, test.label), 1)
    order = np.argsort(-score, kind="stable")
    return MatchEvidence(
        positives=positives,
        image=image[order].astype(np.int32),
        label=label[order].astype(np.int32),
        score=(1 / (1 + np.exp(-score[order]))).astype(np.float32),
        matched=matched[order].astype(np.uint16),
        ignored=np.zeros(len(order), dtype=np.uint16),
        accepted=np.zeros(len(order), dtype=bool),
    )


def mean_average_precision(evidence: MatchEvidence) -> float:
    return float(statistic(evidence, "map_50_95")(np.ones((1, evidence.images), dtype=int))[0])


@functools.cache
def quality_of(difference: float) -> float:
    """The quality whose true mAP differs by `difference` from the champion's (bisection)."""
    if difference == 0:
        return QUALITY
    test = draw_test_set(60_000, np.random.default_rng(1))

    def measured(quality: float) -> float:
        return mean_average_precision(detect(test, quality, np.random.default_rng(2)))

    target, low, high = measured(QUALITY) + difference, QUALITY - 2, QUALITY + 2
    for _ in range(14):
        middle = (low + high) / 2
        low, high = (middle, high) if measured(middle) < target else (low, middle)
    return (low + high) / 2


def scores(name: str, matches: MatchEvidence) -> Scores:
    return Scores(
        model=name,
        weights_sha256=name,
        dataset_sha256="test set",
        settings="settings",
        class_names=("a", "b", "c"),
        images=matches.images,
        metrics={"map_50_95": mean_average_precision(matches)},
        export_parity=True,
        evidence=matches,
    )


def wins(difference: float, images: int, trials: int, evidence: GateEvidence) -> int:
    """How often the gate promotes a challenger that is better by `difference`."""
    quality, policy = quality_of(difference), GatePolicy(evidence=evidence)
    found = 0
    for trial in range(trials):
        random = np.random.default_rng([trial, images])
        test = draw_test_set(images, random)
        old, new = detect(test, QUALITY, random), detect(test, quality, random)
        found += promoted(old, new, policy)
    return found


def promoted(old: MatchEvidence, new: MatchEvidence, policy: GatePolicy) -> bool:
    """The decision of the gate, from fewer resamples where they are enough to know it."""
    champion, challenger = scores("champion", old), scores("challenger", new)
    if challenger.metrics["map_50_95"] <= champion.metrics["map_50_95"]:
        return False
    if policy.evidence == "point":
        return True
    if any(surely_refused(old, new, policy, first) for first in FIRST):
        return False
    return decide(champion, challenger, policy).promote


def surely_refused(old: MatchEvidence, new: MatchEvidence, policy: GatePolicy, first: int) -> bool:
    """Whether so many of the gate's `first` resamples are below the limit that it refuses.

    The lower end of the gate's interval has 2.5 % of its resamples below it, so it is below the
    limit if that many are among the first ones, which are the same for any number of resamples.
    """
    limit = -policy.tolerance if policy.evidence == "non_inferior" else policy.min_delta
    below = int((1 - CONFIDENCE) / 2 * RESAMPLES) + 1
    share = below / (first - 1)
    found = paired_bootstrap(old, new, resamples=first, confidence=1 - 2 * share)
    return found.lower < limit - 2 * EPSILON


def wilson(wins: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a rate."""
    z = 1.959964
    centre, spread = wins + z**2 / 2, z * np.sqrt(wins * (trials - wins) / trials + z**2 / 4)
    return (centre - spread) / (trials + z**2), (centre + spread) / (trials + z**2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=400)
    parser.add_argument("--images", type=int, nargs="+", default=[200, 1000, 5000])
    parser.add_argument("--differences", type=float, nargs="+", default=[0.0, -0.011, 0.02])
    parser.add_argument("--evidence", nargs="+", default=get_args(GateEvidence))
    options = parser.parse_args()
    print("| Test images | Difference | " + " | ".join(options.evidence) + " |")
    for images in options.images:
        for difference in options.differences:
            counts = [wins(difference, images, options.trials, e) for e in options.evidence]
            row = " | ".join(_cell(count, options.trials) for count in counts)
            print(f"| {images:,} | {difference:+.3f} | {row} |", flush=True)


def _cell(count: int, trials: int) -> str:
    low, high = wilson(count, trials)
    rate = f"{100 * count / trials:.1f} % ({100 * max(0.0, low):.1f} to {100 * high:.1f})"
    return f"{rate} of {trials:,}"


if __name__ == "__main__":
    main()
