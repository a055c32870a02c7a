"""The outputs of the stage `fit`: the model with its description, its metrics, its curves."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flows.core.files import copy_atomic, read_json, write_csv, write_json
from flows.fit_job.job import FitJob, FitResult
from flows.project.project import Project
from flows.tracking.provenance import MAIN_PACKAGES, Provenance
from rfdetr.data.coco import dataset_categories
from rfdetr.errors import ConfigError
from rfdetr.evaluation.plots import draw_history
from rfdetr.files import new_folder, sha256_file

PACKAGES = sorted({*MAIN_PACKAGES, "numpy"} - {"mlflow"})  # those that compute the weights
WEIGHTS, CARD = "model.pth", "model.json"
CURVES = ("train/loss", "val/loss", "val/mAP_50_95", "val/mAP_50", "val/ema_mAP_50_95", "val/F1")


def collect(project: Project, job: FitJob, state: Path, seconds: float) -> None:
    """Write the outputs of the stage from the finished training in the folder `state`.

    A copy of the project that was since moved or removed may have trained it, so files are those of
    `job`, the plan of this project; only the parameters are those of the training.
    """
    result, params = FitResult.read(state), FitJob.read(state).params
    with new_folder(project.trained) as folder:
        copy_atomic(state / "checkpoint_best_total.pth", folder / WEIGHTS)
        digest = sha256_file(folder / WEIGHTS)
        card = _card(job, params, result, digest, project.provenance)
        write_json(folder / CARD, {**card, "fingerprint": state.name})
        rows = list(epoch_rows(state / "metrics.csv"))
        _write_curves(rows, project.fit_curves)
        draw_history(rows, project.fit_picture)
        write_json(project.fit_metrics, _metrics(result, rows, seconds))


def _card(
    job: FitJob, params: dict[str, Any], result: FitResult, digest: str, made: Provenance
) -> dict[str, Any]:
    source = read_json(Path(job.initial).with_name(CARD))
    ids = dataset_categories(job.train["dataset_dir"], job.train["dataset_file"])
    return {
        "variant": job.model.variant,
        "class_names": result.class_names,
        "category_ids": [ids.get(label, label) for label in range(len(result.class_names))],
        "num_classes": result.num_classes,
        "resolution": result.resolution,
        "grey_levels": result.grey_levels,
        "weights": WEIGHTS,
        "weights_sha256": digest,
        "epochs": result.epochs,
        "stopped_early": result.stopped_early,
        "best": {
            "epoch": result.best_epoch,
            "metric": result.best_metric,
            "value": result.best_value,
            "averaged": result.averaged,
        },
        "dataset": job.dataset,
        "source": {key: source.get(key) for key in ("source", "kind", "source_sha256")},
        "mlflow_run_id": result.mlflow_run_id,
        "params": params,
        "git_commit": made.git_commit,
        "git_dirty": made.git_dirty,
        "packages": {name: made.packages[name] for name in PACKAGES if name in made.packages},
    }


def _metrics(
    result: FitResult, rows: list[dict[str, float]], seconds: float
) -> dict[str, float | int]:
    name = result.best_metric.split("/")[-1].removeprefix("ema_")
    metrics: dict[str, float | int] = {
        name: result.best_value,
        "best_epoch": result.best_epoch,
        "epochs": result.epochs,
        "seconds": round(seconds, 1),
    }
    if rows and "train/loss" in rows[-1]:
        metrics["train_loss"] = rows[-1]["train/loss"]
    return metrics


def epoch_rows(file: Path) -> Iterator[dict[str, float]]:
    """One row per epoch, counted from 1, of a metrics.csv with rows per step and per epoch."""
    if not file.is_file():
        raise ConfigError(f"{file} is missing: the training wrote no history.")
    epochs: dict[int, dict[str, float]] = {}
    with open(file, newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            if row.get("epoch"):
                kept = epochs.setdefault(int(float(row["epoch"])) + 1, {})
                kept |= {key: float(value) for key, value in row.items() if value and key in CURVES}
    for epoch in sorted(epochs):
        yield {"epoch": float(epoch), **epochs[epoch]}


def _write_curves(rows: list[dict[str, float]], target: Path) -> None:
    names = [name for name in CURVES if any(name in row for row in rows)]
    lines = [
        {"epoch": int(row["epoch"])}
        | {name: f"{row[name]:.6g}" for name in names if not math.isnan(row.get(name, math.nan))}
        for row in rows
    ]
    write_csv(target, lines, ["epoch", *names])
