"""The stage `evaluate`: metrics, tables and plots of the trained model on the test split."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flows.core.files import read_object, write_csv, write_json
from flows.gate import score_cache
from flows.gate.report import write_report
from flows.gate.scored_model import ScoredModel
from flows.gate.scoring import score_model
from flows.project.project import Project
from flows.stages.runner import run_stage
from flows.storage.packs import open_dataset
from rfdetr.errors import ConfigError
from rfdetr.evaluation.accumulate import RECALL_POINTS
from rfdetr.evaluation.f1 import SCORE_THRESHOLDS
from rfdetr.evaluation.plots import draw_class_precision, draw_evaluation
from rfdetr.evaluation.report import class_labels, standard_metrics
from rfdetr.files import atomic_path, new_folder, sha256_file

SECTIONS = ["dataset", "evaluate", "slices"]


def evaluate(project: Project) -> None:
    """Score models/trained and write metrics, tables, curves, detections, pictures and the report.

    | file                                   | contents                                           |
    |----------------------------------------|----------------------------------------------------|
    | metrics/test.json                      | `numbers`                                          |
    | reports/evaluation.md, evaluation.html | the report, from `Scores`; the gate adds the       |
    |                                        | comparison with the champion                       |
    | reports/operating_point.json           | `OperatingPoint.to_dict()` for the model's labels, |
    |                                        | or null                                            |
    | reports/detections.json                | detections in COCO's results format                |
    | reports/per_class.csv, curves, pictures| tables, and the pictures that `dvc plots` shows     |

    The record of everything, `Scores`, is kept in the state folder for the gate.

    Raises ConfigError if the weights are not those that model.json describes.
    """
    params, reports = project.params, project.reports
    digest = project.dataset_digest()
    data = Path(open_dataset(project.dataset_dir, project.env.state_dir))
    scored = score_model(
        trained_weights(project.trained),
        data,
        params.dataset,
        params.evaluate,
        slices=project.slices,
        accelerator=params.runtime.accelerator,
        num_workers=params.runtime.num_workers,
    )
    threshold = params.evaluate.score_threshold
    write_detections(scored, reports / "detections.json", threshold)
    write_csv(reports / "per_class.csv", list(scored.per_class()))
    metrics = numbers(scored)
    names = class_labels(scored.class_names, scored.result.class_ids.tolist())
    with new_folder(reports / "curves") as folder:
        write_curves(scored, names, folder)
    with new_folder(reports / "pictures") as folder:
        draw_evaluation(scored.result, scored.columns, names, scored.samples, folder)
        draw_class_precision(metrics["per_class"], folder / "class_precision.png")
    write_json(project.test_metrics, metrics)
    point = scored.model_point
    write_json(project.operating_point, None if point is None else point.to_dict())
    # the gate need not score it again
    kept = score_cache.keep(project, scored, str(project.trained), digest)
    write_report(kept, project.evaluation, title=params.dataset.name, images=data)
    main = scored.metrics()
    print(
        f"{params.evaluate.split} split, {scored.result.images} images: mAP "
        f"{main['map_50_95']:.4f}, mAP50 {main['map_50']:.4f}, F1 {main['f1']:.4f} at score "
        f"{main['best_threshold']:.2f}; see {project.evaluation.with_suffix('.html')}",
        flush=True,
    )
    if kept.operating_point is not None and kept.operating_point.note:
        print(f"operating point: {kept.operating_point.note}", flush=True)


def trained_weights(folder: Path) -> Path:
    """The weights of a model folder, verified against its model.json."""
    card = read_object(folder / "model.json", "weights", "weights_sha256")
    weights = folder / str(card["weights"])
    if not weights.is_file() or sha256_file(weights) != card["weights_sha256"]:
        raise ConfigError(
            f"{weights} is missing or not the file that {folder / 'model.json'} describes; run "
            "`dvc checkout` or the fit stage again."
        )
    return weights


def numbers(scored: ScoredModel) -> dict[str, Any]:
    """metrics/test.json: metrics at `max_dets`, the COCO standard at 100, and AP per class."""
    return {
        "images": scored.result.images,
        **scored.metrics(),
        "max_dets": scored.part.summary.max_dets,
        "coco_100": {
            name.removeprefix("coco_"): value
            for name, value in standard_metrics(scored.result).items()
        },
        "per_class": {row["class"]: row["ap_50_95"] for row in scored.per_class() if row["boxes"]},
        "latency_ms": scored.latency_ms,
        "latency_on": scored.latency_on,
        "size_mb": scored.size_mb,
        **_optional(scored),
    }


def _optional(scored: ScoredModel) -> dict[str, Any]:
    """Numbers of what params.yaml asks for: slices and the operating point."""
    names = ("images", "boxes", "map_50_95", "map_50", "f1", "false_alarms")
    found: dict[str, Any] = {}
    if scored.slices:
        found["slices"] = {
            slice_name: {name: getattr(row, name) for name in names}
            for slice_name, row in scored.slices.items()
        }
    if (at_point := scored.at_point()) is not None:
        found["operating_point"] = {
            **at_point.model_dump(exclude={"classes", "note"}),
            "thresholds": {name: row.threshold for name, row in at_point.classes.items()},
        }
    return found


def write_detections(scored: ScoredModel, target: Path, threshold: float) -> None:
    """Write a list in COCO's results format, one detection per line."""
    lines = (json.dumps(row, separators=(",", ":")) for row in scored.detections(threshold))
    with atomic_path(target) as temporary, open(temporary, "w", encoding="utf-8") as stream:
        stream.write("[\n" + ",\n".join(lines) + "\n]\n")


def write_curves(scored: ScoredModel, names: Sequence[str], folder: Path) -> None:
    """Write precision_recall.csv, f1_threshold.csv and confusion_matrix.csv."""
    part, sweep = scored.part, scored.result.sweep
    curves = [
        {"class": name, "recall": round(float(r), 2), "precision": round(float(p), 5)}
        for name, curve, boxes in zip(names, part.precision_curve, sweep.positives, strict=True)
        if boxes
        for r, p in zip(RECALL_POINTS, curve, strict=True)
    ]
    write_csv(folder / "precision_recall.csv", curves)
    triples = zip(
        SCORE_THRESHOLDS, sweep.macro_f1, sweep.macro_precision, sweep.macro_recall, strict=True
    )
    keys = ("threshold", "f1", "precision", "recall")
    rows = [
        dict(zip(keys, (round(float(v), 5) for v in values), strict=True)) for values in triples
    ]
    write_csv(folder / "f1_threshold.csv", rows)
    axis = [*names, "background"]
    cells = [
        {"actual": axis[i], "predicted": axis[j], "boxes": int(scored.result.confusion[i, j])}
        for i in range(len(axis))
        for j in range(len(axis))
    ]
    write_csv(folder / "confusion_matrix.csv", cells)


if __name__ == "__main__":
    raise SystemExit(run_stage("evaluate", SECTIONS, evaluate, sys.argv[1:]))
