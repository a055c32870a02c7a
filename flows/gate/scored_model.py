"""The results of one model on one split, and the records made of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from flows.gate.verdict import AtPoint, ClassAtPoint, ClassScore, Scores
from rfdetr.evaluation import report
from rfdetr.evaluation.box_table import EvaluationData, IouType
from rfdetr.evaluation.calibration import calibration
from rfdetr.evaluation.error_types import ErrorTypes, error_types
from rfdetr.evaluation.evaluator import EvaluationResult, TypeResult
from rfdetr.evaluation.evidence import MatchEvidence
from rfdetr.evaluation.operating_point import OperatingPoint, point_numbers
from rfdetr.evaluation.plots import Sample
from rfdetr.evaluation.slices import Slice
from rfdetr.evaluation.suspects import find_suspects

CHOSEN_HERE = (
    "the thresholds were chosen on the images that they are reported on, so these numbers are "
    "optimistic; a test split would tell"
)


@dataclasses.dataclass(frozen=True)
class ScoredModel:
    """The results of one model on one split. All labels are those of the dataset.

    `latency_ms` is the median time of a batch, per image, with the device `latency_on`, after a
    warm-up; `size_mb` the file size in 10^6 bytes. `settings` is a key of everything that affects
    the numbers. `evidence` are the matches per image, `slices` the numbers of each slice, and
    `point` the operating point, chosen on the validation split, if one is asked for; `model_point`
    is the same point for the model's own labels. `chosen_here` is set if these are the images that
    it was chosen on.
    """

    weights_sha256: str
    size_mb: float
    class_names: list[str]
    model_class_names: list[str]
    result: EvaluationResult
    columns: EvaluationData
    samples: list[Sample]
    latency_ms: float
    latency_on: str
    settings: str
    category_ids: dict[int, int]
    evidence: MatchEvidence
    slices: dict[str, Slice]
    point: OperatingPoint | None = None
    model_point: OperatingPoint | None = None
    chosen_here: bool = False

    @property
    def part(self) -> TypeResult:
        """The numbers that decide: of masks for segmentation models, else of boxes."""
        part = self.result.segm or self.result.bbox
        assert part is not None
        return part

    def metrics(self) -> dict[str, float]:
        """Named metrics at `max_dets` detections: of boxes, or of masks for segmentation models."""
        main = self.part.summary
        best = self.result.sweep.best
        numbers = {
            "map_50_95": main.ap,
            "map_50": main.ap50,
            "map_75": main.ap75,
            "mar": main.ar,
            "f1": float(self.result.sweep.macro_f1[best]),
            "precision": float(self.result.sweep.macro_precision[best]),
            "recall": float(self.result.sweep.macro_recall[best]),
            "best_threshold": self.result.sweep.best_threshold,
        }
        if self.point is not None:
            there = point_numbers(self.evidence)
            numbers |= {"f1_at_point": there.f1, "false_alarms_per_image": there.false_alarms}
        return {name: float(value) for name, value in numbers.items() if value > -1}

    def per_class(self) -> Iterator[dict[str, Any]]:
        """One row per class of the dataset; AP and AR are None for a class without boxes."""
        part, labels = self.part, self.result.class_ids.tolist()
        for k, name in enumerate(report.class_labels(self.class_names, labels)):
            boxes = int(self.result.sweep.positives[k])
            values = {"ap_50_95": part.ap[k], "ap_50": part.ap50[k], "ar": part.ar[k]}
            shown = {key: float(v) if boxes else None for key, v in values.items()}
            yield {"class": name, "label": labels[k], "boxes": boxes, **shown}

    def detections(self, threshold: float = 0.0) -> Iterator[dict[str, Any]]:
        """Detections with a score of at least `threshold`, in the COCO results format."""
        rows = self.columns.detections
        for i in np.flatnonzero(rows.score >= threshold).tolist():
            label = int(rows.label[i])
            row: dict[str, Any] = {
                "image_id": int(self.columns.image_ids[rows.image[i]]),
                "category_id": self.category_ids.get(label, label),
                "bbox": [round(value, 3) for value in rows.box[i].tolist()],
                "score": round(float(rows.score[i]), 6),
            }
            if rows.rle is not None:
                code = rows.rle[i]
                row["segmentation"] = {"size": code["size"], "counts": code["counts"].decode()}
            yield row

    def scores(self, model: str, dataset_sha256: str) -> Scores:
        """The record that the gate compares."""
        kind: IouType = "bbox" if self.result.segm is None else "segm"
        classes = {
            row["class"]: ClassScore(ap=row["ap_50_95"], boxes=row["boxes"])
            for row in self.per_class()
            if row["boxes"]
        }
        return Scores(
            model=model,
            weights_sha256=self.weights_sha256,
            dataset_sha256=dataset_sha256,
            settings=self.settings,
            iou_type=kind,
            class_names=tuple(self.model_class_names),
            images=self.result.images,
            metrics=self.metrics(),
            per_class=classes,
            latency_ms=self.latency_ms,
            latency_on=self.latency_on,
            size_mb=self.size_mb,
            evidence=self.evidence,
            slices=self.slices,
            operating_point=self.at_point(),
            calibration=calibration(self.evidence),
            error_types=self.error_types(),
            suspected_labels=find_suspects(self.columns).strong,
        )

    def error_types(self) -> ErrorTypes:
        """What costs AP, by the boxes."""
        return error_types(self.columns, self.result.class_ids, self.part.summary.max_dets)

    def at_point(self) -> AtPoint | None:
        """What the operating point gives on this split; None without one."""
        if self.point is None:
            return None
        there, chosen = point_numbers(self.evidence), self.point.classes
        notes = [self.point.unreached(), CHOSEN_HERE if self.chosen_here else ""]
        return AtPoint(
            target=self.point.target,
            chosen_on=self.point.split,
            f1=there.f1,
            precision=there.precision,
            recall=there.recall,
            false_alarms=there.false_alarms,
            detections=there.detections,
            note="; ".join(filter(None, notes)),
            classes={
                row.name: ClassAtPoint(
                    threshold=row.threshold,
                    shared=row.shared,
                    reached=row.reached,
                    precision=there.class_precision[k],
                    recall=there.class_recall[k],
                )
                for k, row in enumerate(chosen)
            },
        )
