"""What the fit stage leaves behind: the model with its description, its numbers, its curves."""

from __future__ import annotations

import csv
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flows.core.files import copy_atomic, read_json, write_json
from flows.fit_job.job import FitJob, FitResult
from flows.project.project import Project
from flows.tracking.provenance import Provenance
from rfdetr.errors import ConfigError
from rfdetr.files import atomic_path, sha256_file

WEIGHTS, CARD = "model.pth", "model.json"
CURVES = ("train/loss", "val/loss", "val/mAP_50_95", "val/mAP_50", "val/ema_mAP_50_95", "val/F1")


def collect(project: Project, state: Path, seconds: float) -> None:
    """Copy the result of the training in `state` to the outs of the stage, each complete."""
    job, result = FitJob.read(state), FitResult.read(state)
    target = project.trained
    work = target.with_name(f".{target.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    copy_atomic(state / "checkpoint_best_total.pth", work / WEIGHTS)
    digest = sha256_file(work / WEIGHTS)
    write_json(
        work / CARD, {**_card(job, result, digest, project.provenance), "fingerprint": state.name}
    )
    rows = list(epoch_rows(state / "metrics.csv"))
    _write_curves(rows, project.fit_curves)
    write_json(project.fit_metrics, _numbers(result, rows, seconds))
    shutil.rmtree(target, ignore_errors=True)
    work.replace(target)


def _card(job: FitJob, result: FitResult, digest: str, made: Provenance) -> dict[str, Any]:
    source = read_json(Path(job.initial).with_name(CARD))
    return {
        "variant": job.model.variant,
        "class_names": result.class_names,
        "num_classes": result.num_classes,
        "resolution": result.resolution,
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
        "params": job.params,
        "git_commit": made.git_commit,
        "git_dirty": made.git_dirty,
        "packages": {name: version for name, version in made.packages.items() if name in _MAIN},
    }


_MAIN = {"rfdetr-pipeline", "torch", "torchvision", "timm", "pytorch-lightning", "numpy"}


def _numbers(
    result: FitResult, rows: list[dict[str, float]], seconds: float
) -> dict[str, float | int]:
    name = result.best_metric.split("/")[-1].removeprefix("ema_")
    numbers: dict[str, float | int] = {
        name: result.best_value,
        "best_epoch": result.best_epoch,
        "epochs": result.epochs,
        "seconds": round(seconds, 1),
    }
    if rows and "train/loss" in rows[-1]:
        numbers["train_loss"] = rows[-1]["train/loss"]
    return numbers


def epoch_rows(file: Path) -> Iterator[dict[str, float]]:
    """One row per epoch, counted from 1, of a metrics.csv that has rows per step and per epoch."""
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
    with (
        atomic_path(target) as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as stream,
    ):
        writer = csv.writer(stream)
        writer.writerow(["epoch", *names])
        for row in rows:
            values = [row.get(name, math.nan) for name in names]
            shown = ["" if math.isnan(value) else f"{value:.6g}" for value in values]
            writer.writerow([int(row["epoch"]), *shown])
