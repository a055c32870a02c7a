"""COCO evaluation of detectors: AP, AR, F1 sweep and confusion matrix of one set of images.

The numbers equal those of pycocotools to 1e-9 (tests/unit/evaluation). Speed is measured by
tests/benchmarks/bench_eval.py on 5,000 images and 450,000 detections.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rfdetr.arrays import Floats, Integers
from rfdetr.evaluation import f1
from rfdetr.evaluation.accumulate import Curves, Summary, accumulate, per_class, summarize
from rfdetr.evaluation.batches import Batch, BatchTruth, data_from_batch
from rfdetr.evaluation.box_table import EvaluationData, IouType, concatenate, data_from_coco
from rfdetr.evaluation.confusion import confusion_matrix
from rfdetr.evaluation.matching import match

COCO_MAX_DETS = 100  # detections per image and class of the standard COCO numbers


@dataclasses.dataclass(frozen=True)
class TypeResult:
    """Numbers of one IoU type; arrays are per class (K,), -1 without ground truth.

    `summary` is at the evaluator's `max_dets`, `coco` at the standard 100 detections.
    `precision_curve` (K, 101) is precision over recall at IoU 0.5.
    """

    summary: Summary
    coco: Summary
    ap: Floats
    ap50: Floats
    ar: Floats
    precision_curve: Floats


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """The evaluation of one detector on one set of images.

    `class_ids` (K,) are the labels that the arrays follow. The F1 sweep matches by mask IoU when
    masks were evaluated. `confusion` (K + 1, K + 1) is taken at the sweep's best threshold.
    """

    images: int
    class_ids: Integers
    bbox: TypeResult | None
    segm: TypeResult | None
    sweep: f1.F1Sweep
    confusion: Integers

    @property
    def has_ground_truth(self) -> bool:
        """Whether any number is defined."""
        return bool((self.sweep.positives > 0).any())

    def to_dict(self) -> dict[str, Any]:
        """Summaries, per-class numbers and the best threshold as plain JSON values."""
        best = self.sweep.best
        record: dict[str, Any] = {
            "images": self.images,
            "best_threshold": self.sweep.best_threshold,
            "f1": float(self.sweep.macro_f1[best]),
            "precision": float(self.sweep.macro_precision[best]),
            "recall": float(self.sweep.macro_recall[best]),
        }
        for name, part in (("bbox", self.bbox), ("segm", self.segm)):
            if part is not None:
                record[name] = {
                    "summary": dataclasses.asdict(part.summary),
                    "coco": dataclasses.asdict(part.coco),
                    "per_class": [
                        {
                            "label": int(label),
                            "ground_truth": int(self.sweep.positives[k]),
                            "ap": float(part.ap[k]),
                            "ap50": float(part.ap50[k]),
                            "ar": float(part.ar[k]),
                        }
                        for k, label in enumerate(self.class_ids)
                    ],
                }
        return record


def evaluate(
    data: EvaluationData,
    class_ids: Sequence[int] | Integers | None = None,
    *,
    iou_types: Sequence[IouType] = ("bbox",),
    max_dets: int = 500,
    mask_areas: bool = False,
) -> EvaluationResult:
    """Evaluate `data` for `class_ids` (default: the labels of the ground truth).

    Detections of other labels do not count, as in pycocotools. With `mask_areas`, detections are
    sorted into the area ranges by the area of their masks when masks are evaluated.
    """
    labels = np.unique(data.truth.label if class_ids is None else np.asarray(class_ids))
    labels = labels.astype(np.int64)
    parts: dict[IouType, TypeResult] = {}
    for iou_type in sorted(iou_types):
        if iou_type == "segm" and mask_areas:
            data = dataclasses.replace(data, detections=data.detections.with_mask_areas())
        matches = match(data, labels, iou_type, max(max_dets, COCO_MAX_DETS))
        parts[iou_type] = type_result(
            accumulate(matches, max_dets), accumulate(matches, COCO_MAX_DETS)
        )
        true, false = f1.count_matches(matches, max_dets)
        sweep = f1.sweep(true, false, matches.positives[:, 0])  # "segm" comes last and is kept
    return EvaluationResult(
        images=len(data.image_ids),
        class_ids=labels,
        bbox=parts.get("bbox"),
        segm=parts.get("segm"),
        sweep=sweep,
        confusion=confusion_matrix(data, labels, sweep.best_threshold),
    )


def type_result(curves: Curves, coco: Curves) -> TypeResult:
    """The numbers of one IoU type, from curves at the evaluator's limit and at 100 detections."""
    precision = curves.precision[..., 0]
    return TypeResult(
        summary=summarize(curves),
        coco=summarize(coco),
        ap=per_class(precision, 2),
        ap50=per_class(precision[0], 1),
        ar=per_class(curves.recall[:, :, 0, -1], 1),
        precision_curve=precision[0].T,
    )


def evaluate_coco(
    ground_truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    *,
    iou_types: Sequence[IouType] = ("bbox",),
    max_dets: int = 500,
) -> EvaluationResult:
    """Evaluate a list in COCO results format against a COCO document, both as parsed JSON.

    Classes are those of the document's `categories`. Raises InputError for results of images that
    the document does not list.
    """
    data = data_from_coco(ground_truth, results, masks="segm" in iou_types)
    class_ids = [category["id"] for category in ground_truth["categories"]]
    return evaluate(data, class_ids, iou_types=iou_types, max_dets=max_dets)


class CocoEvaluator:
    """Collects validation batches and evaluates them; ranks exchange their `state()`."""

    def __init__(self, iou_types: Sequence[IouType] = ("bbox",), max_dets: int = 500) -> None:
        self.iou_types = tuple(sorted(iou_types))
        self.max_dets = max_dets
        self._parts: list[EvaluationData] = []

    def update(self, results: Batch, targets: Batch, truth: BatchTruth | None = None) -> BatchTruth:
        """Add a batch as described in `data_from_batch`. Nothing stays on the device.

        Returns the ground truth of the batch, for evaluators of other weights.
        """
        keep = max(self.max_dets, COCO_MAX_DETS)
        masks = "segm" in self.iou_types
        data = data_from_batch(results, targets, max_dets=keep, masks=masks, truth=truth)
        self._parts.append(data)
        return BatchTruth(data.image_ids, data.truth)

    def state(self) -> EvaluationData:
        """Everything collected, each image once; compact and picklable."""
        self._parts = [concatenate(self._parts)]
        return self._parts[0]

    def merge(self, states: Iterable[EvaluationData]) -> None:
        """Replace what was collected by the states of all ranks, this rank's included."""
        self._parts = list(states)

    def compute(self, class_ids: Sequence[int] = ()) -> EvaluationResult:
        """Evaluate what was collected, for `class_ids` and all labels of the ground truth.

        Classes without ground truth are undefined (-1).
        """
        data = self.state()
        return evaluate(
            data,
            [*class_ids, *data.truth.label],
            iou_types=self.iou_types,
            max_dets=self.max_dets,
            mask_areas=True,
        )
