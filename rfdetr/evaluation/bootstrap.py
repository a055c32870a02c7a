"""Paired bootstrap over images: a confidence interval for the difference of two detectors' mAP.

The evidence of one detector is every detection with the IoU thresholds at which it matched. A
resample draws images with replacement (Efron and Tibshirani, "An Introduction to the Bootstrap",
1993); an image drawn k times counts k times. The copies of a detection follow each other, and
precision is read at the last copy, where its envelope is highest, so weighting an image gives the
same number as evaluating copies of it. Only equal scores of one class within one image, whose
order is arbitrary anyway, can differ.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rfdetr.arrays import Integers
from rfdetr.errors import InputError
from rfdetr.evaluation.accumulate import RECALL_POINTS
from rfdetr.evaluation.box_table import EvaluationData, IouType
from rfdetr.evaluation.matching import IOU_THRESHOLDS, match

Metric = Literal["map_50_95", "map_50", "map_75"]
METRIC_THRESHOLDS: dict[Metric, slice] = {  # positions in IOU_THRESHOLDS
    "map_50_95": slice(None),
    "map_50": slice(0, 1),
    "map_75": slice(5, 6),
}
_FIELDS = ("positives", "image", "label", "score", "matched", "ignored")


@dataclass(frozen=True, eq=False)
class MatchEvidence:
    """The matches of one detector on one test set, image by image.

    positives: (I, K) ground-truth boxes that count, per image and class.
    image, label: (D,) image and class index of each detection, in the order of evaluation.
    score: (D,). matched, ignored: (D,) bit t is set when the detection matched (or is ignored,
    e.g. because of a crowd region) at IoU 0.5 + 0.05 t.
    """

    positives: NDArray[np.int32]
    image: NDArray[np.int32]
    label: NDArray[np.int32]
    score: NDArray[np.float32]
    matched: NDArray[np.uint16]
    ignored: NDArray[np.uint16]

    def __post_init__(self) -> None:
        lengths = {len(getattr(self, name)) for name in _FIELDS[1:]}
        if self.positives.ndim != 2 or len(lengths) != 1:
            raise InputError(
                "match evidence needs positives (images, classes) and five arrays of one length; "
                f"found positives {self.positives.shape} and arrays of lengths {sorted(lengths)}"
            )
        for name, limit in (("image", self.positives.shape[0]), ("label", self.positives.shape[1])):
            column = getattr(self, name)
            if len(column) and (column.min() < 0 or column.max() >= limit):
                raise InputError(f"match evidence: {name} index outside 0..{limit - 1}")

    @property
    def images(self) -> int:
        """Number of images of the test set, images without boxes included."""
        return int(self.positives.shape[0])

    def encode(self) -> str:
        """Compressed base64 text for a JSON record."""
        stream = io.BytesIO()
        arrays: dict[str, Any] = {name: getattr(self, name) for name in _FIELDS}
        np.savez_compressed(stream, **arrays)
        return base64.b64encode(stream.getvalue()).decode("ascii")

    @classmethod
    def decode(cls, text: str) -> MatchEvidence:
        """The inverse of `encode`. Raises InputError for any other text; never unpickles."""
        try:
            with np.load(
                io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False
            ) as z:
                return cls(**{name: z[name] for name in _FIELDS})
        except (ValueError, KeyError, OSError, EOFError) as error:
            raise InputError(f"match evidence cannot be decoded: {error}") from error


def collect_evidence(
    data: EvaluationData,
    class_ids: Sequence[int],
    *,
    iou_type: IouType = "bbox",
    max_dets: int = 500,
) -> MatchEvidence:
    """Match detections to ground truth as the evaluator does and keep the flags per image.

    The class axis follows ascending `class_ids`.
    """
    ids = np.unique(np.asarray(class_ids, dtype=np.int64))
    matches = match(data, ids, iou_type, max_dets)
    truth = data.truth
    counted = ~truth.crowd & np.isin(truth.label, ids)
    positives = np.zeros((len(data.image_ids), len(ids)), dtype=np.int32)
    np.add.at(positives, (truth.image[counted], np.searchsorted(ids, truth.label[counted])), 1)
    bits = 1 << np.arange(len(IOU_THRESHOLDS), dtype=np.uint16)
    flags = np.zeros((2, len(matches.row)), dtype=np.uint16)  # zero unless near ground truth
    flags[0, matches.candidate] = matches.matched[:, :, 0] @ bits
    flags[1, matches.candidate] = matches.ignored[:, :, 0] @ bits
    return MatchEvidence(
        positives=positives,
        image=data.detections.image[matches.row].astype(np.int32),
        label=matches.label.astype(np.int32),
        score=matches.score.astype(np.float32),
        matched=flags[0],
        ignored=flags[1],
    )


@dataclass(frozen=True)
class Interval:
    """The mAP difference, challenger minus champion, and its percentile interval."""

    observed: float
    lower: float
    upper: float
    confidence: float
    resamples: int


class _ClassCurve:
    """The detections of one class, sorted once and weighted many times."""

    def __init__(self, evidence: MatchEvidence, label: int, thresholds: slice) -> None:
        chosen = np.flatnonzero(evidence.label == label)
        chosen = chosen[np.argsort(-evidence.score[chosen], kind="stable")]
        bits = np.arange(len(IOU_THRESHOLDS))[thresholds, None]
        matched = (evidence.matched[chosen][None] >> bits & 1).astype(bool)  # (T, n)
        ignored = (evidence.ignored[chosen][None] >> bits & 1).astype(bool)
        hits = matched & ~ignored
        near = np.flatnonzero((matched | ignored).any(axis=0))
        self._near = evidence.image[chosen][near]
        self._hits = hits[:, near].astype(np.int32)
        self._misses = (~matched & ~ignored)[:, near].astype(np.int32)
        # All others are false at every threshold, so one running sum serves all thresholds.
        far = np.setdiff1d(np.arange(len(chosen)), near)
        self._far = evidence.image[chosen][far]
        self._far_before = np.searchsorted(far, near)
        self._positives = evidence.positives[:, label]

    def average_precision(self, weights: Integers) -> float:
        """AP of this class, mean over the thresholds; NaN when no positive was drawn."""
        total = int(self._positives @ weights)
        if total == 0 or not self._hits.size:
            return float("nan") if total == 0 else 0.0
        weight = weights[self._near].astype(np.int32)
        far = np.concatenate([[0], np.cumsum(weights[self._far])])[self._far_before]
        true = np.cumsum(self._hits * weight, axis=1)
        false = np.cumsum(self._misses * weight, axis=1) + far
        precision = true / np.maximum(true + false, 1)
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        # COCO reads precision at the first detection whose recall reaches the point. Comparing
        # counts of true positives instead of recalls is exact.
        needed = np.searchsorted(np.arange(total + 1) / total, RECALL_POINTS)
        found = 0.0
        for counts, values in zip(true, precision, strict=True):
            place = np.searchsorted(counts, needed)
            found += values[place[place < len(counts)]].sum()
        return float(found / (len(true) * len(RECALL_POINTS)))


class Resampler:
    """The mAP of one detector under image weights."""

    def __init__(self, evidence: MatchEvidence, metric: Metric = "map_50_95") -> None:
        classes = np.flatnonzero(evidence.positives.sum(axis=0) > 0)
        self._curves = [
            _ClassCurve(evidence, int(label), METRIC_THRESHOLDS[metric]) for label in classes
        ]
        self._images = evidence.images

    def mean_average_precision(self, weights: Integers | None = None) -> float:
        """The mAP with image i counted `weights[i]` times (default 1); NaN without any box."""
        if weights is None:
            weights = np.ones(self._images, dtype=np.int64)
        values = np.array([curve.average_precision(weights) for curve in self._curves])
        values = values[~np.isnan(values)]
        return float(values.mean()) if len(values) else float("nan")


def paired_bootstrap(
    champion: MatchEvidence,
    challenger: MatchEvidence,
    *,
    metric: Metric = "map_50_95",
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile interval of the mAP difference, both detectors on the same resampled images.

    `confidence` is two-sided. Deterministic for a seed. Raises InputError when the two were not
    scored on the same boxes, image by image, or when there are none.
    """
    if not np.array_equal(champion.positives, challenger.positives):
        raise InputError("the two detectors were not scored on the same images and boxes")
    if not challenger.positives.any():
        raise InputError("the test set has no boxes: there is nothing to resample")
    old, new = Resampler(champion, metric), Resampler(challenger, metric)
    random = np.random.default_rng(seed)
    images = challenger.images
    differences = np.empty(resamples)
    for index in range(resamples):
        weights = np.bincount(random.integers(0, images, images), minlength=images)
        differences[index] = new.mean_average_precision(weights) - old.mean_average_precision(
            weights
        )
    differences = differences[~np.isnan(differences)]
    tail = (1.0 - confidence) / 2
    lower, upper = np.quantile(differences, [tail, 1.0 - tail])
    observed = new.mean_average_precision() - old.mean_average_precision()
    return Interval(float(observed), float(lower), float(upper), confidence, resamples)
