"""Operating points: a score threshold per class, chosen for a target on one split.

A detection is accepted if its score is above the threshold of its class, everywhere: in an
evaluation, by `RFDETR.predict` and by the served model. Thresholds lie between two scores of the
split that they were chosen on, so rounding cannot move a detection across.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rfdetr.arrays import Bools, Floats, Integers
from rfdetr.errors import InputError
from rfdetr.evaluation.evidence import MatchEvidence
from rfdetr.evaluation.targets import Target, parse_target
from rfdetr.files import sha256_file

MIN_BOXES = 20  # classes with fewer boxes share one threshold
NEVER = 1.0  # no score is above
CARD = "model.json"


@dataclass(frozen=True)
class ClassPoint:
    """The threshold of one class, and what it gave where it was chosen, at IoU 0.5.

    `shared` is set for a class with few boxes, whose threshold comes from all such classes
    together. `reached` is False if no threshold meets the target: the nearest one was chosen.
    """

    label: int
    name: str
    threshold: float
    boxes: int
    precision: float
    recall: float
    shared: bool
    reached: bool


@dataclass(frozen=True)
class OperatingPoint:
    """The thresholds of a model for a `target`, chosen on `split`; `default` for other labels."""

    target: str
    split: str
    default: float
    classes: tuple[ClassPoint, ...]

    def thresholds(self, labels: Integers) -> Floats:
        """The threshold (n,) of each label."""
        known = {row.label: row.threshold for row in self.classes}
        values, place = np.unique(labels, return_inverse=True)
        table = np.array([known.get(int(label), self.default) for label in values])
        return table[place.reshape(-1)] if len(values) else np.zeros(0)

    def accepts(self, labels: Integers, scores: Any) -> Bools:
        """Which detections (n,) are above the threshold of their class."""
        above: Bools = np.asarray(scores, dtype=np.float64) > self.thresholds(labels)
        return above

    @property
    def below_lowest(self) -> float:
        """A number below all thresholds, also in float32: a first filter."""
        lowest = min([self.default, *(row.threshold for row in self.classes)])
        return float(np.nextafter(np.float32(lowest), np.float32(-1)))

    def relabelled(self, labels: Mapping[int, int], names: Mapping[int, str]) -> OperatingPoint:
        """The same thresholds for other labels: `labels` maps new to old ones.

        New labels that have a name but no old label get the default, all others are never accepted.
        """
        known = {row.label: row for row in self.classes}
        rows = []
        for label, name in names.items():
            row = known.get(labels.get(label, -1))
            if row is None:
                row = ClassPoint(label, name, self.default, 0, 0.0, 0.0, shared=True, reached=False)
            rows.append(replace(row, label=label))
        return replace(self, classes=tuple(rows), default=NEVER)

    def unreached(self) -> str:
        """Which classes miss the target, and what was chosen instead; empty if none."""
        kind = parse_target(self.target).kind
        missed = [
            f"{row.name} {getattr(row, kind):.3f} at score {row.threshold:.3f}"
            for row in self.classes
            if not row.reached and row.boxes
        ]
        if not missed:
            return ""
        text = "; ".join(missed)
        return f"{self.target} is not reached on {self.split}, the best was chosen: {text}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for model.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> OperatingPoint:
        """The inverse of `to_dict`. Raises InputError for anything else."""
        try:
            rows = tuple(ClassPoint(**row) for row in data["classes"])
            return cls(str(data["target"]), str(data["split"]), float(data["default"]), rows)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"the operating point cannot be read: {error}") from None


class PointNumbers(NamedTuple):
    """Numbers at an operating point, at IoU 0.5.

    `f1`, `precision` and `recall` are means over the classes with boxes. `false_alarms` are
    detections per image that are wrong. `detections` counts all that are accepted, also those on
    crowd regions. `class_precision` and `class_recall` follow the class axis.
    """

    f1: float
    precision: float
    recall: float
    false_alarms: float
    detections: int
    class_precision: list[float]
    class_recall: list[float]


def point_numbers(evidence: MatchEvidence) -> PointNumbers:
    """The numbers of the accepted detections."""
    counted = evidence.accepted & (evidence.ignored & 1 == 0)
    right = counted & (evidence.matched & 1 == 1)
    classes = evidence.positives.shape[1]
    true = np.bincount(evidence.label[right], minlength=classes)
    every = np.bincount(evidence.label[counted], minlength=classes)
    boxes = evidence.positives.sum(axis=0)
    precision, recall = true / np.maximum(every, 1), true / np.maximum(boxes, 1)
    f1 = 2 * true / np.maximum(every + boxes, 1)
    present = boxes > 0

    def mean(values: Floats) -> float:
        return float(values[present].mean()) if present.any() else 0.0

    return PointNumbers(
        f1=mean(f1),
        precision=mean(precision),
        recall=mean(recall),
        false_alarms=float((every - true).sum() / max(1, evidence.images)),
        detections=int(evidence.accepted.sum()),
        class_precision=precision.tolist(),
        class_recall=recall.tolist(),
    )


def read_point(weights: Path) -> OperatingPoint | None:
    """The operating point in the model.json beside a weights file; None if it has none.

    Raises InputError if model.json is damaged or describes other weights.
    """
    card = weights.with_name(CARD)
    if not card.is_file():
        return None
    try:
        details = json.loads(card.read_text(encoding="utf-8"))
        point = details.get("operating_point")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{card} cannot be read: {error}") from None
    if point is None:
        return None
    described = details.get("weights_sha256")
    if described is not None and described != sha256_file(weights):
        raise InputError(f"{card} describes other weights than {weights}: give a threshold.")
    return OperatingPoint.from_dict(point)


def choose_point(
    evidence: MatchEvidence, labels: Sequence[int], names: Sequence[str], target: str, split: str
) -> OperatingPoint:
    """The thresholds that meet `target` on the matches of `split`.

    For f1 the best F1; for a precision the lowest threshold that has it, which keeps most recall;
    for a recall the highest. `labels` and `names` follow the class axis of the evidence. Raises
    InputError if the split has no boxes.
    """
    aim, boxes = parse_target(target), evidence.positives.sum(axis=0).astype(int)
    if not boxes.any():
        raise InputError(f"the {split} split has no boxes to choose an operating point on")
    thin = np.flatnonzero(boxes < MIN_BOXES)
    pool = thin if boxes[thin].sum() >= MIN_BOXES else np.arange(len(boxes))
    counted, score = (evidence.ignored & 1) == 0, evidence.score.astype(np.float64)
    pooled = counted & np.isin(evidence.label, pool)
    shared = _threshold(evidence, pooled, int(boxes[pool].sum()), aim)
    rows = []
    for k, (label, name) in enumerate(zip(labels, names, strict=True)):
        is_thin = bool(boxes[k] < MIN_BOXES)
        own = counted & (evidence.label == k)
        found = shared if is_thin else _threshold(evidence, own, int(boxes[k]), aim)
        threshold, reached = found
        above = own & (score > threshold)
        true, every = int((above & (evidence.matched & 1 == 1)).sum()), int(above.sum())
        rows.append(
            ClassPoint(
                label=int(label),
                name=name,
                threshold=threshold,
                boxes=int(boxes[k]),
                precision=true / max(1, every),
                recall=true / max(1, int(boxes[k])),
                shared=is_thin,
                reached=reached,
            )
        )
    return OperatingPoint(target, split, shared[0], tuple(rows))


def _threshold(
    evidence: MatchEvidence, chosen: Bools, boxes: int, aim: Target
) -> tuple[float, bool]:
    """The threshold for detections `chosen` (D,) of `boxes` boxes, and whether it meets the aim."""
    score = evidence.score[chosen].astype(np.float64)
    order = np.argsort(-score, kind="stable")
    score, true = score[order], ((evidence.matched & 1) == 1)[chosen][order]
    if not len(score):
        return 0.5, aim.kind == "f1"
    last = np.flatnonzero(np.r_[score[1:] != score[:-1], True])  # one cut per distinct score
    found, every = np.cumsum(true)[last], last + 1
    precision, recall = found / every, found / max(1, boxes)
    if aim.kind == "f1":
        cut, reached = int(np.argmax(2 * found / (every + boxes))), True
    elif aim.kind == "precision":
        enough = np.flatnonzero((precision >= aim.least) & (found > 0))
        reached = len(enough) > 0
        best = np.flatnonzero(precision == precision.max())[-1]
        cut = int(enough[-1] if reached else best)
    else:
        reached = bool(recall[-1] >= aim.least)
        cut = int(np.argmax(recall >= min(aim.least, recall[-1])))
    low = score[last[cut] + 1] if last[cut] + 1 < len(score) else 0.0
    return _between(float(low), float(score[last[cut]])), reached


def _between(low: float, high: float) -> float:
    """A short number between two scores, also in float32; low <= t < high if there is none."""
    middle = (low + high) / 2
    for digits in range(3, 9):
        short = round(middle, digits)
        if np.float32(low) < np.float32(short) < np.float32(high):
            return short
    return middle
