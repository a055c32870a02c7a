"""Logged models on MLflow: the model folder of a training, uploaded once."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.registry.artifacts import has_files
from flows.registry.model_folder import ModelFiles, build_model
from flows.registry.registry import POINT, Registry
from rfdetr.tracking.client import experiment_id

MODEL_NAME = "detector"


def log_model(
    registry: Registry,
    files: ModelFiles,
    *,
    experiment: str,
    run_id: str | None,
    metrics: Mapping[str, float] | None = None,
    dataset: tuple[str, str] | None = None,
) -> str:
    """Log the model, unless one with these weights exists; returns the id of the logged model.

    `metrics` are the test metrics and `dataset` the (name, digest) of the dataset they belong
    to. A model whose upload was interrupted, whose files were deleted, or whose operating point
    is another one, is uploaded again.
    """
    where = [experiment_id(registry.client, experiment, registry.uri)]
    model, ready = _logged(registry, where, files.weights_sha256, run_id)
    same = ready and model.tags.get(POINT) == files.operating_point
    if same and has_files(registry.client, model.model_id):
        return str(model.model_id)
    if model is None:
        model = registry.client.create_logged_model(
            where[0], MODEL_NAME, run_id, params=files.params(), model_type="detector"
        )
    upload_model(registry, model.model_id, model.source_run_id, files)
    if not ready:
        _log_metrics(registry, model.model_id, run_id, metrics or {}, dataset)
        registry.client.finalize_logged_model(model.model_id, "READY")
    return str(model.model_id)


def upload_model(registry: Registry, model_id: str, run_id: str | None, files: ModelFiles) -> None:
    """Store the model folder of a logged model, or store it again."""
    with tempfile.TemporaryDirectory(prefix="rfdetr-model-") as folder:
        path = Path(folder) / "model"
        build_model(path, files, model_id=model_id, run_id=run_id)
        registry.client.log_model_artifacts(model_id, str(path))
    _tag_point(registry, model_id, files)


def _logged(
    registry: Registry, where: list[str], weights: str, run_id: str | None
) -> tuple[Any, bool]:
    """The logged model of these weights, and whether it was finished; (None, False) if new."""
    query = f"params.weights_sha256 = '{weights}' AND name = '{MODEL_NAME}'"
    found = registry.client.search_logged_models(where, filter_string=query)
    ready = [m for m in found if str(m.status) == "READY"]
    same_run = [m for m in found if m.source_run_id == run_id]
    for model in ([m for m in ready if m in same_run] or ready)[:1]:
        return model, True
    return (same_run[0] if same_run else None), False


def _tag_point(registry: Registry, model_id: str, files: ModelFiles) -> None:
    if files.operating_point is not None:
        registry.client.set_logged_model_tags(model_id, {POINT: files.operating_point})
    elif POINT in registry.client.get_logged_model(model_id).tags:
        registry.client.delete_logged_model_tag(model_id, POINT)


def _log_metrics(
    registry: Registry,
    model_id: str,
    run_id: str | None,
    metrics: Mapping[str, float],
    dataset: tuple[str, str] | None,
) -> None:
    from mlflow.entities import Metric

    if run_id is None or not metrics:
        return
    name, digest = dataset or (None, None)
    about = {
        "model_id": model_id,
        "dataset_name": name,
        "dataset_digest": digest and digest[:36],
    }
    at = int(time.time() * 1000)
    points = [Metric(key, value, at, 0, **about) for key, value in metrics.items()]
    registry.client.log_batch(run_id, metrics=points)
