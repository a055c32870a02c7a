"""An evaluation as named metrics for the loggers and as a table for the terminal."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence

from rich.table import Table

from rfdetr.evaluation.accumulate import Summary
from rfdetr.evaluation.evaluator import EvaluationResult

ClassNames = Sequence[str | None] | Mapping[int, str]


def class_labels(names: ClassNames | None, labels: Sequence[int]) -> list[str]:
    """A distinct name per label: the number if unnamed, name_<label> if the name repeats."""
    known = _by_label(names)
    given = [str(known.get(label) or label) for label in labels]
    repeats = collections.Counter(given)
    return [
        f"{name}_{label}" if repeats[name] > 1 else name
        for name, label in zip(given, labels, strict=True)
    ]


def _by_label(names: ClassNames | None) -> dict[int, str | None]:
    if names is None:
        return {}
    return dict(names) if isinstance(names, Mapping) else dict(enumerate(names))


def named_labels(names: ClassNames | None) -> list[int]:
    """The labels that have a name."""
    return [label for label, name in _by_label(names).items() if name]


def main_metrics(result: EvaluationResult) -> dict[str, float]:
    """Return mAP and mAR of boxes and masks, without prefix."""
    metrics: dict[str, float] = {}
    if result.bbox is not None:
        box = result.bbox.summary
        metrics |= {"mAP_50_95": box.ap, "mAP_50": box.ap50, "mAP_75": box.ap75, "mAR": box.ar}
    if result.segm is not None:
        mask = result.segm.summary
        metrics |= {"segm_mAP_50_95": mask.ap, "segm_mAP_50": mask.ap50}
    return metrics


def sweep_metrics(result: EvaluationResult) -> dict[str, float]:
    """Macro F1, precision and recall at the best threshold, and that threshold."""
    sweep = result.sweep
    return {
        "F1": float(sweep.macro_f1[sweep.best]),
        "precision": float(sweep.macro_precision[sweep.best]),
        "recall": float(sweep.macro_recall[sweep.best]),
        "best_threshold": sweep.best_threshold,
    }


def class_metrics(result: EvaluationResult, names: ClassNames | None) -> dict[str, float]:
    """`AP/<class name>` of each class with ground truth, box AP."""
    if result.bbox is None:
        return {}
    labels = class_labels(names, result.class_ids.tolist())
    return {
        f"AP/{name}": float(ap) for name, ap in zip(labels, result.bbox.ap, strict=True) if ap > -1
    }


def standard_metrics(result: EvaluationResult) -> dict[str, float]:
    """The twelve COCO numbers at 100 detections, `coco_*` and `coco_segm_*`, where defined."""
    metrics = {}
    for prefix, part in (("coco_", result.bbox), ("coco_segm_", result.segm)):
        if part is not None:
            for name, value in zip(_names(part.coco), part.coco.numbers(), strict=True):
                if value > -1:
                    metrics[prefix + name] = value
    return metrics


def _names(summary: Summary) -> list[str]:
    sizes = ("small", "medium", "large")
    precisions = ["mAP_50_95", "mAP_50", "mAP_75", *(f"mAP_{size}" for size in sizes)]
    recalls = ["mAR_1", "mAR_10", f"mAR_{summary.max_dets}", *(f"mAR_{size}" for size in sizes)]
    return precisions + recalls


def summary_table(result: EvaluationResult, title: str) -> Table:
    """Both sets of the twelve numbers side by side, each column saying its detection limit."""
    table = Table(title=f"{title}: {result.images} images")
    table.add_column("metric")
    columns: list[Summary] = []
    for kind, part in (("box", result.bbox), ("mask", result.segm)):
        if part is not None:
            limit = part.summary.max_dets
            table.add_column(f"{kind}, {limit} detections (as in training)", justify="right")
            table.add_column(f"{kind}, 100 detections (COCO standard)", justify="right")
            columns += [part.summary, part.coco]
    if columns:
        names = _names(columns[0])
        names[8] = "mAR at the limit"
        for name, *values in zip(names, *(c.numbers() for c in columns), strict=True):
            table.add_row(name, *("-" if value < 0 else f"{value:.4f}" for value in values))
    for name, value in sweep_metrics(result).items():
        table.add_row(name, f"{value:.4f}", *[""] * (len(columns) - 1))
    return table
