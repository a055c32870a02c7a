"""Paired bootstrap over images: how sure is the difference of two detectors' mAP?

The evidence of one detector is every detection with the thresholds at which it matched. A resample
draws images with replacement; an image drawn k times counts k times. Copies of a detection stand
side by side, so that weighting gives the very number that evaluating copied images would give
(precision is read at the last copy, where its envelope has its maximum); only equal scores of one
class within one image, whose order is arbitrary anyway, can differ.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from rfdetr.errors import InputError

if TYPE_CHECKING:
    from rfdetr.evaluation.columns import Columns, IouType

THRESHOLDS = 10  # IoU 0.50, 0.55 ... 0.95
RECALL_POINTS = np.linspace(0.0, 1.0, 101)
Metric = Literal["map_50_95", "map_50", "map_75"]
COLUMNS: dict[Metric, slice] = {
    "map_50_95": slice(0, THRESHOLDS),
    "map_50": slice(0, 1),
    "map_75": slice(5, 6),
}
_FIELDS = ("positives", "image", "label", "score", "matched", "ignored")


@dataclass(frozen=True, eq=False)
class MatchEvidence:
    """What one detector did on one test set, image by image.

    positives: (I, K) int, ground-truth boxes that count, per image and class.
    image, label: (D,) int, image and class index of each detection, in the order of evaluation.
    score: (D,) float. matched, ignored: (D,) int, bit t is set when the detection matched
    (or is ignored, e.g. by a crowd region) at IoU 0.5 + 0.05 t.
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
                "match evidence needs positives (images, classes) and five columns of one length; "
                f"found positives {self.positives.shape} and columns of lengths {sorted(lengths)}"
            )
        for name, limit in (("image", self.positives.shape[0]), ("label", self.positives.shape[1])):
            column = getattr(self, name)
            if len(column) and (column.min() < 0 or column.max() >= limit):
                raise InputError(f"match evidence: {name} index outside 0..{limit - 1}")

    @property
    def images(self) -> int:
        """Number of images of the test set, empty ones too."""
        return int(self.positives.shape[0])

    def encode(self) -> str:
        """Compressed base64 text for a JSON record."""
        stream = io.BytesIO()
        arrays: dict[str, Any] = {name: getattr(self, name) for name in _FIELDS}
        np.savez_compressed(stream, **arrays)
        return base64.b64encode(stream.getvalue()).decode("ascii")

    @classmethod
    def decode(cls, text: str) -> MatchEvidence:
        """The inverse of `encode`; refuses pickled objects. Raises InputError on foreign text."""
        try:
            with np.load(
                io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False
            ) as z:
                return cls(**{name: z[name] for name in _FIELDS})
        except (ValueError, KeyError, OSError, EOFError) as error:
            raise InputError(f"match evidence cannot be decoded: {error}") from error


def collect_evidence(
    columns: Columns, class_ids: Sequence[int], *, iou_type: IouType = "bbox", max_dets: int = 500
) -> MatchEvidence:
    """Match detections to ground truth as the metric engine does and keep the flags per image.

    The class axis follows ascending `class_ids`. Only detections near a box carry flags.
    """
    from rfdetr.evaluation.matching import match

    ids = np.unique(np.asarray(class_ids, dtype=np.int64))
    matches = match(columns, ids, iou_type, max_dets)
    truth = columns.truth
    counted = ~truth.crowd & np.isin(truth.label, ids)
    positives = np.zeros((len(columns.image_ids), len(ids)), dtype=np.int32)
    np.add.at(positives, (truth.image[counted], np.searchsorted(ids, truth.label[counted])), 1)
    bits = 1 << np.arange(THRESHOLDS, dtype=np.uint16)
    flags = np.zeros((2, len(matches.row)), dtype=np.uint16)
    flags[0, matches.candidate] = matches.matched[:, :, 0] @ bits
    flags[1, matches.candidate] = matches.ignored[:, :, 0] @ bits
    return MatchEvidence(
        positives,
        columns.detections.image[matches.row].astype(np.int32),
        matches.label.astype(np.int32),
        matches.score.astype(np.float32),
        *flags,
    )


@dataclass(frozen=True)
class Interval:
    """Difference challenger minus champion with its percentile interval."""

    observed: float
    lower: float
    upper: float
    confidence: float
    resamples: int


class _ClassCurve:
    """One class of one detector, sorted once, ready to be weighted many times."""

    def __init__(self, evidence: MatchEvidence, label: int, columns: slice) -> None:
        chosen = np.flatnonzero(evidence.label == label)
        chosen = chosen[np.argsort(-evidence.score[chosen], kind="stable")]
        thresholds = np.arange(THRESHOLDS)[columns, None]
        matched = (evidence.matched[chosen][None] >> thresholds & 1).astype(bool)
        ignored = (evidence.ignored[chosen][None] >> thresholds & 1).astype(bool)
        hits = matched & ~ignored
        near = np.flatnonzero((matched | ignored).any(axis=0))
        self._near = evidence.image[chosen][near]
        self._hits = hits[:, near].astype(np.int32)
        self._misses = (~matched & ~ignored)[:, near].astype(np.int32)
        # the others are false at every threshold: one running sum serves all of them
        far = np.setdiff1d(np.arange(len(chosen)), near)
        self._far = evidence.image[chosen][far]
        self._far_before = np.searchsorted(far, near)
        self._positives = evidence.positives[:, label]

    def average_precision(self, weights: NDArray[np.int64]) -> float:
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
        # COCO takes the first detection whose recall reaches the point; counts keep this exact,
        # and one offset per threshold makes one sorted search of all of them
        needed = np.searchsorted(np.arange(total + 1) / total, RECALL_POINTS, side="left")
        rows = np.arange(len(true))[:, None]
        offset = rows * (max(total, int(true[:, -1].max())) + 1)
        place = np.searchsorted((true + offset).ravel(), (needed + offset).ravel(), side="left")
        place = place.reshape(len(true), -1) - rows * true.shape[1]
        reached = place < true.shape[1]
        return float(precision[np.nonzero(reached)[0], place[reached]].sum() / place.size)


class Resampler:
    """mAP of one detector under image weights."""

    def __init__(self, evidence: MatchEvidence, metric: Metric = "map_50_95") -> None:
        classes = np.flatnonzero(evidence.positives.sum(axis=0) > 0)
        self._curves = [_ClassCurve(evidence, int(label), COLUMNS[metric]) for label in classes]
        self._images = evidence.images

    def mean_average_precision(self, weights: NDArray[np.int64] | None = None) -> float:
        """The mAP with image i counted `weights[i]` times (default once); NaN without any box."""
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
