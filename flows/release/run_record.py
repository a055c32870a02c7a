"""Completes the MLflow run of a training with what the other stages wrote."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.core.digest import digest_of
from flows.core.files import read_object
from flows.core.redact import redact, redact_mapping
from flows.gate.report import HTML
from flows.gate.verdict import Verdict
from flows.project.project import Project
from flows.registry.registry import Registry, RegistryError
from flows.tracking.run import sync
from rfdetr.files import sha256_file
from rfdetr.tracking.client import experiment_id, tracking_client, valid_key
from rfdetr.tracking.delivery import deliver
from rfdetr.tracking.journal import Journal, flatten, read_state

if TYPE_CHECKING:
    from mlflow import MlflowClient

LOGGER = logging.getLogger(__name__)
REPORTS = ("per_class.csv", "curves", "pictures", "evaluation.md", "evaluation.html")
RECORDED = "pipeline.recorded"
MAX_PARAMS, MAX_METRICS = 100, 1000  # in one call, set by MLflow


def complete_run(project: Project, tags: Mapping[str, Any]) -> str:
    """Add metrics, reports and lineage to the run of the fit stage; returns its id.

    Unsent records of this store's trainings, and of this model's, are sent first. If the training
    never reached the server, its run is created now. Repeating the call changes nothing, unless the
    results have changed, for example after an evaluation with other settings.
    """
    from mlflow.entities import RunTag

    uri = project.tracking_uri
    for folder, problem in sync(project.env.state_dir, uri).items():
        if problem:
            LOGGER.warning("journal %s is still unsent: %s", folder, problem)
    needed = (project.lock_file, project.model_card, project.fit_metrics, project.test_metrics)
    missing = [str(file.relative_to(project.root)) for file in needed if not file.is_file()]
    if missing:
        raise RegistryError(
            f"the pipeline has not finished: {', '.join(missing)} missing in {project.root}. Run "
            "`rfdetr-pipeline retrain` or `dvc repro` first (stages that were run by hand do not "
            "write dvc.lock; `dvc commit -f` accepts their results)."
        )
    card = project.read_card()
    _send_journal(project, card, uri)
    client = tracking_client(uri)
    run_id = _known_run(client, card, project.env.state_dir) or _new_run(client, project, card)
    metrics = read_object(project.test_metrics)
    state = digest_of([sha256_file(project.lock_file), metrics])[:16]
    if client.get_run(run_id).data.tags.get(RECORDED) == state:
        return run_id
    _add_numbers(client, run_id, project)
    for file in (project.params_file, project.lock_file):  # written by users, who may add secrets
        client.log_text(run_id, redact(file.read_text(encoding="utf-8")), file.name)
    for path in _reports(project):
        _add_report(client, run_id, project, path)
    found = project.provenance
    if found.git_diff:
        client.log_text(run_id, found.git_diff, "git.diff")
    client.log_text(
        run_id, found.model_dump_json(indent=2, exclude={"git_diff"}), "environment.json"
    )
    known = redact_mapping({**found.tags(), **tags, RECORDED: state})
    client.log_batch(run_id, tags=[RunTag(key, str(value)) for key, value in known.items()])
    client.set_terminated(run_id, "FINISHED")
    return run_id


def _send_journal(project: Project, card: Mapping[str, Any], uri: str) -> None:
    """Send the rest of this model's journal, started for another address of the store."""
    folder = project.env.state_dir / "fit" / str(card.get("fingerprint"))
    state = read_state(folder)
    if state is None or state.uri not in (None, uri):
        return
    journal = Journal(folder, mask=redact)
    if journal.unsent:
        deliver(journal, uri)


def _reports(project: Project) -> list[Path]:
    """Files and folders of the stages that the run keeps, under the same relative paths."""
    return [
        *(project.validation.with_suffix(suffix) for suffix in (".json", ".md", ".html")),
        *(project.reports / name for name in REPORTS),
        project.fit_picture,
        project.initial / "model.json",
        project.model_card,
    ]


def _add_report(client: MlflowClient, run_id: str, project: Project, path: Path) -> None:
    """Add a file or a folder as artifacts, byte for byte: reports contain no secrets."""
    target = path.relative_to(project.root)
    if path.is_dir():
        client.log_artifacts(run_id, str(path), target.as_posix())
    elif path.exists():
        client.log_artifact(run_id, str(path), target.parent.as_posix())


def _known_run(client: MlflowClient, card: Mapping[str, Any], state_dir: Path) -> str | None:
    """The run in the model card, else the one in the training's journal, if it exists.

    A deleted run is restored.
    """
    from mlflow.exceptions import MlflowException

    state = read_state(state_dir / "fit" / str(card.get("fingerprint")))
    for run_id in filter(None, [card.get("mlflow_run_id"), state and state.run_id]):
        try:
            found = client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        else:
            if found.info.lifecycle_stage == "deleted":
                client.restore_run(run_id)
            return str(run_id)
    return None


def _new_run(client: MlflowClient, project: Project, card: Mapping[str, Any]) -> str:
    """A run for a model that was trained without tracking; created once per weights."""
    from mlflow.entities import Param

    name = f"rfdetr/{project.params.dataset.name}"
    experiment = experiment_id(client, name, project.tracking_uri)
    weights = card["weights_sha256"]
    known = client.search_runs([experiment], f"tags.`weights.sha256` = '{weights}'", max_results=1)
    if known:
        return str(known[0].info.run_id)
    tags = {"weights.sha256": weights, "pipeline.stage": "fit", "fit.reused": "true"}
    run = client.create_run(experiment, tags=tags, run_name=project.run_name())
    values = [Param(key, str(value)) for key, value in flatten(card["params"]).items()]
    for start in range(0, len(values), MAX_PARAMS):
        client.log_batch(run.info.run_id, params=values[start : start + MAX_PARAMS])
    return str(run.info.run_id)


def _add_numbers(client: MlflowClient, run_id: str, project: Project) -> None:
    from mlflow.entities import Metric

    numbers = {
        **{f"test.{k}": v for k, v in flatten(read_object(project.test_metrics)).items()},
        **{f"fit.{k}": v for k, v in flatten(read_object(project.fit_metrics)).items()},
    }
    price, seconds = project.params.runtime.price_per_hour, numbers.get("fit.seconds")
    if price is not None and isinstance(seconds, int | float):
        card = project.read_card()
        devices = card["params"]["batch"]["world"]
        numbers["cost"] = seconds / 3600 * price * devices
    at = int(time.time() * 1000)
    metrics = [
        Metric(_summary_key(key), float(value), at, 0)
        for key, value in numbers.items()
        if isinstance(value, int | float)
    ]
    for start in range(0, len(metrics), MAX_METRICS):
        client.log_batch(run_id, metrics=metrics[start : start + MAX_METRICS])


def _summary_key(name: str) -> str:
    """A metric of one value: without a slash, MLflow shows it below the charts of the training."""
    return valid_key(name.replace("/", "_"))


def add_comparison(registry: Registry, number: int, verdict: Verdict, report: Path) -> None:
    """Store the report on the version's run, and the change of each slice as metrics."""
    version = registry.version(number)
    for file in (report, report.with_suffix(HTML)):
        path = f"{report.parent.name}/{file.name}"
        registry.log_text(version, file.read_text(encoding="utf-8"), path)
    changes = {
        _summary_key(f"gate.slices.{name}.{end}"): float(getattr(change, end))
        for name, change in verdict.slices.items()
        for end in ("change", "lower", "upper")
    }
    if changes and version.run_id is not None:
        registry.append_metrics(version.run_id, changes)
