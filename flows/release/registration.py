"""Registers the trained model: its MLflow run is completed, the model logged, a version created."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from flows.core.files import read_json, read_object, read_record, write_json
from flows.core.quiet import quiet_libraries
from flows.core.redact import redact
from flows.project.project import Project
from flows.registry.logged_model import log_model
from flows.registry.model_folder import ModelFiles
from flows.release import champion
from flows.release.description import description
from flows.release.freshness import pinned_version, registry_of
from rfdetr.evaluation.operating_point import OperatingPoint

DATASET_VERSION = "lineage.dataset_version"
DATASET = "lineage.dataset"


class Registered(BaseModel, frozen=True):
    """The version of the trained model and its run, as stored in `reports/registered.json`."""

    name: str
    number: int
    run_id: str
    model_id: str
    experiment: str
    uri: str
    export_parity: bool | None

    def links(self) -> list[tuple[str, str, str]]:
        """(key, URL, text) of the pages of the run and of the version."""
        base = self.uri.rstrip("/")
        view = "?workflowType=machine_learning"
        run = f"{base}/#/experiments/{self.experiment}/runs/{self.run_id}{view}"
        version = f"{base}/#/models/{self.name}/versions/{self.number}"
        text = f"{self.name} version {self.number}"
        return [("mlflow-run", run, "MLflow run"), ("model-version", version, text)]


def register(project: Project, flow_run: str | None = None) -> Registered:
    """Register the trained model: complete its MLflow run, log the model, create a version."""
    from flows.release.run_record import complete_run

    params, registry = project.params, registry_of(project)
    card = project.read_card()
    digest = card["dataset"]["digest"]
    lineage = _lineage(project, card, flow_run)
    run_id = complete_run(project, lineage)
    files, export_parity = model_files(project, project.trained / card["weights"], digest)
    numbers = read_object(project.test_metrics)
    metrics = {f"test.{k}": v for k, v in numbers.items() if isinstance(v, int | float)}
    quiet_libraries()  # importing Lightning resets the log levels
    model_id = log_model(
        registry,
        files,
        experiment=f"rfdetr/{params.dataset.name}",
        run_id=run_id,
        metrics=metrics,
        dataset=(params.dataset.name, digest),
    )
    restored = champion.restore_champion(registry)
    if restored is not None:
        print(f"the alias champion was missing: version {restored} is champion again", flush=True)
    version = registry.register(model_id, run_id=run_id, tags=lineage)
    # If the source has a new version with the same content, an existing version gets its name.
    registry.set_tags(version.number, {DATASET_VERSION: lineage[DATASET_VERSION]})
    registry.describe(version.number, description(project, card, numbers))
    registered = Registered(
        name=registry.name,
        number=version.number,
        run_id=run_id,
        model_id=model_id,
        experiment=registry.experiment_of(run_id),
        uri=redact(registry.uri),
        export_parity=export_parity,
    )
    write_json(project.registered, registered.model_dump())
    return registered


def model_files(project: Project, weights: Path, digest: str) -> tuple[ModelFiles, bool]:
    """The files of the model folder, and whether the ONNX export agrees with the weights."""
    from flows.registry.onnx_export import export_once

    exported = export_once(weights, project.env.state_dir)
    files = ModelFiles(
        weights=weights,
        card=_description(project, _operating_point(project)),
        onnx=exported.onnx,
        parity=exported.parity,
        profile=profile_of(project, weights, digest),
    )
    return files, exported.agrees


def profile_of(project: Project, weights: Path, digest: str) -> Path:
    """The image profile of the trained model; computed once."""
    from flows.registry.image_profile import profile_once

    folder, state = project.dataset_dir, project.env.state_dir
    point = _operating_point(project)
    return profile_once(folder, project.params.dataset, weights, digest, state, point=point)


def _operating_point(project: Project) -> OperatingPoint | None:
    """What the stage `evaluate` chose."""
    file = project.operating_point
    found = read_json(file) if file.exists() else None
    return found and OperatingPoint.from_dict(found)


def _description(project: Project, point: OperatingPoint | None) -> Path:
    """The model.json to register: that of the training, with the operating point if there is one.

    The outputs of `fit` stay as they are, so the description with a point is a file of its own.
    """
    if point is None:
        return project.model_card
    card = {**project.read_card(), "operating_point": point.to_dict()}
    write_json(project.registered_card, card)
    return project.registered_card


def last_registered(project: Project) -> Registered:
    """The result of the last `register`."""
    return read_record(project.registered, Registered)


def _lineage(project: Project, card: dict[str, Any], flow_run: str | None) -> dict[str, Any]:
    made = project.provenance
    return {
        "lineage.git_commit": made.git_commit,
        "lineage.git_dirty": made.git_dirty,
        "lineage.dvc_lock": made.dvc_lock_sha256,
        DATASET: card["dataset"]["name"],
        "lineage.data_digest": card["dataset"]["digest"],
        DATASET_VERSION: str(pinned_version(project)),
        "lineage.flow_run": flow_run,
        "weights.sha256": card["weights_sha256"],
    }
