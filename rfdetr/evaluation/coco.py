"""COCO evaluation of detectors: AP, AR, F1 sweep and confusion of one set of images.

The default engine is our own vectorised one (matching.py, accumulate.py); pycocotools gives the
same numbers to 1e-9 and remains as `engine="pycocotools"`. Measured with
tests/benchmarks/bench_eval.py on 5,000 images and 450,000 detections.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from rfdetr.evaluation import f1
from rfdetr.evaluation.accumulate import Curves, Summary, accumulate, per_class, summarize
from rfdetr.evaluation.batches import Batch, columns_from_batch
from rfdetr.evaluation.columns import (
    Columns,
    Floats,
    Ints,
    IouType,
    columns_from_coco,
    concatenate,
)
from rfdetr.evaluation.confusion import confusion_matrix
from rfdetr.evaluation.matching import match
from rfdetr.evaluation.reference import evaluate_with_pycocotools

COCO_MAX_DETS = 100
Engine = Literal["fast", "pycocotools"]


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
    class_ids: Ints
    bbox: TypeResult | None
    segm: TypeResult | None
    sweep: f1.F1Sweep
    confusion: Ints

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
    columns: Columns,
    class_ids: Sequence[int] | Ints | None = None,
    *,
    iou_types: Sequence[IouType] = ("bbox",),
    max_dets: int = 500,
    engine: Engine = "fast",
    mask_areas: bool = False,
) -> EvaluationResult:
    """Evaluate `columns` for `class_ids` (default: the labels of the ground truth).

    Detections of other labels do not count, as in pycocotools. `mask_areas` sorts detections
    into the size ranges by the area of their masks, where masks are evaluated.
    """
    labels = np.unique(columns.truth.label if class_ids is None else np.asarray(class_ids))
    labels = labels.astype(np.int64)
    parts: dict[IouType, TypeResult] = {}
    for iou_type in sorted(iou_types):
        if iou_type == "segm" and mask_areas:
            sized = columns.detections.with_mask_areas()
            columns = dataclasses.replace(columns, detections=sized)
        if engine == "fast":
            matches = match(columns, labels, iou_type, max(max_dets, COCO_MAX_DETS))
            curves, coco = accumulate(matches, max_dets), accumulate(matches, COCO_MAX_DETS)
            true, false = f1.count_matches(matches, max_dets)
            positives = matches.positives
        else:
            coco = evaluate_with_pycocotools(columns, labels, iou_type, COCO_MAX_DETS)[0]
            curves, true, false, positives = evaluate_with_pycocotools(
                columns, labels, iou_type, max_dets
            )
        parts[iou_type] = _type_result(curves, coco)
        sweep = f1.sweep(true, false, positives[:, 0])  # the last type, masks, is kept
    return EvaluationResult(
        len(columns.image_ids),
        labels,
        parts.get("bbox"),
        parts.get("segm"),
        sweep,
        confusion_matrix(columns, labels, sweep.best_threshold),
    )


def _type_result(curves: Curves, coco: Curves) -> TypeResult:
    precision = curves.precision[..., 0]
    return TypeResult(
        summarize(curves),
        summarize(coco),
        per_class(precision, 2),
        per_class(precision[0], 1),
        per_class(curves.recall[:, :, 0, -1], 1),
        precision[0].T,
    )


def evaluate_coco(
    ground_truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    *,
    iou_types: Sequence[IouType] = ("bbox",),
    max_dets: int = 500,
    engine: Engine = "fast",
) -> EvaluationResult:
    """Evaluate a list in COCO results format against a COCO document, both as parsed JSON.

    Classes are those of the document's `categories`. Raises InputError on results of foreign
    images.
    """
    columns = columns_from_coco(ground_truth, results, masks="segm" in iou_types)
    class_ids = [category["id"] for category in ground_truth["categories"]]
    return evaluate(columns, class_ids, iou_types=iou_types, max_dets=max_dets, engine=engine)


class CocoEvaluator:
    """Collects validation batches and evaluates them; ranks exchange their `state()`."""

    def __init__(self, iou_types: Sequence[IouType] = ("bbox",), max_dets: int = 500) -> None:
        self.iou_types = tuple(sorted(iou_types))
        self.max_dets = max_dets
        self._parts: list[Columns] = []

    def update(self, results: Batch, targets: Batch) -> None:
        """Add a batch; see `columns_from_batch` for the contents. Nothing stays on the device."""
        keep = max(self.max_dets, COCO_MAX_DETS)
        masks = "segm" in self.iou_types
        self._parts.append(columns_from_batch(results, targets, max_dets=keep, masks=masks))

    def state(self) -> Columns:
        """Everything collected, each image once: compact and picklable."""
        self._parts = [concatenate(self._parts)]
        return self._parts[0]

    def merge(self, states: Iterable[Columns]) -> None:
        """Continue with the states of all ranks (this one's included) instead of the own."""
        self._parts = list(states)

    def compute(self, class_ids: Sequence[int] = (), engine: Engine = "fast") -> EvaluationResult:
        """Evaluate what was collected, for `class_ids` and all labels of the ground truth.

        Classes without ground truth are undefined (-1).
        """
        columns = self.state()
        return evaluate(
            columns,
            [*class_ids, *columns.truth.label],
            iou_types=self.iou_types,
            max_dets=self.max_dets,
            engine=engine,
            mask_areas=True,
        )
