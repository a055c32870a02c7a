"""The registered model on MLflow: versions, aliases and tags.

Every operation can be repeated after a failure at any point; nothing is created twice.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from flows.core.redact import redact, redact_mapping
from flows.registry.artifacts import global_tracking_uri, has_files
from rfdetr.errors import RFDETRError
from rfdetr.tracking.client import experiment_id, tracking_client

if TYPE_CHECKING:
    from mlflow.entities.model_registry import RegisteredModel

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous_champion"
PAGE, SHOWN = 50, 20
MISSING_FILES = (
    "cannot be loaded: its files are missing from MLflow's artifacts. `rfdetr-pipeline doctor "
    "--repair` restores them if models/trained still holds this model; otherwise restore the "
    "artifacts from a backup, or promote a version that can be loaded."
)
POINT = "operating_point"


class RegistryError(RFDETRError):
    """The registry refuses an operation, or an item does not exist."""


class Version(BaseModel):
    """One version of the registered model."""

    model_config = ConfigDict(frozen=True)

    number: int
    model_id: str
    run_id: str | None
    tags: dict[str, str]

    @property
    def weights_sha256(self) -> str | None:
        """Content hash of the weights."""
        return self.tags.get("weights.sha256")

    @property
    def operating_point(self) -> str | None:
        """Target and digest of the operating point in the version's model.json, if it has one."""
        return self.tags.get(POINT)


class Registry:
    """The registered model `name` on the tracking server (or SQLite file) `uri`."""

    def __init__(self, name: str, uri: str) -> None:
        self.name, self.uri = name, uri
        self.client = tracking_client(uri)

    # --- registering

    def register(
        self, model_id: str, *, run_id: str | None, tags: Mapping[str, Any] | None = None
    ) -> Version:
        """The version of a logged model, created if missing. It becomes `challenger`.

        `tags` are those of a new version, such as lineage.git_commit or lineage.data_digest. A
        version that is champion does not become challenger.
        """
        self._ensure_model()
        source = f"models:/{model_id}"
        query = f"name='{self.name}' and source_path='{source}'"
        known = self.client.search_model_versions(query)
        model = self.client.get_logged_model(model_id)
        if known:
            number = min(int(version.version) for version in known)
        else:
            given = {k: str(v) for k, v in redact_mapping(tags or {}).items() if v is not None}
            given["weights.sha256"] = str(model.params.get("weights_sha256"))
            with global_tracking_uri(self.uri):
                made = self.client.create_model_version(
                    self.name, source, run_id=run_id, tags=given, model_id=model_id
                )
            number = int(made.version)
        point, before = model.tags.get(POINT), self.version(number).operating_point
        if point is not None and point != before:
            self.set_tags(number, {POINT: point})
        elif point is None and before is not None:
            self.delete_tag(number, POINT)
        aliases = self.aliases()
        if aliases.get(CHAMPION) != number and aliases.get(CHALLENGER) != number:
            self.set_alias(CHALLENGER, number)
        return self.version(number)

    def _ensure_model(self) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self.client.get_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            try:
                self.client.create_registered_model(self.name)
            except MlflowException as again:
                if again.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise

    # --- reading

    def aliases(self) -> dict[str, int]:
        """Alias -> version number; empty if the model does not exist."""
        model = self._model()
        return {alias: int(number) for alias, number in model.aliases.items()} if model else {}

    def model_tags(self) -> dict[str, str]:
        """Tags of the registered model itself; empty if it does not exist."""
        model = self._model()
        return dict(model.tags) if model else {}

    def _model(self) -> RegisteredModel | None:
        """The registered model. A search, because MLflow's direct request loads all versions."""
        found = self.client.search_registered_models(f"name = '{self.name}'", max_results=1)
        return found[0] if found else None

    def version(self, number: int) -> Version:
        """A version by number. Raises RegistryError if it does not exist."""
        from mlflow.exceptions import MlflowException

        try:
            found = self.client.get_model_version(self.name, str(number))
        except MlflowException as error:
            if error.error_code not in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
                raise
            newest = [v.number for v in itertools.islice(self.tagged({}), SHOWN + 1)]
            known = f"{'..., ' * (len(newest) > SHOWN)}{sorted(newest[:SHOWN]) or 'none'}"
            raise RegistryError(
                f"{self.name} has no version {number}; known versions: {known}."
            ) from None
        return _version(found)

    def exists(self, number: int) -> bool:
        """Whether there is a version of this number."""
        try:
            self.version(number)
        except RegistryError:
            return False
        return True

    def versions(self) -> list[Version]:
        """All versions, oldest first. Slow for a thousand: prefer `tagged`."""
        return sorted(self.tagged({}), key=lambda version: version.number)

    def tagged(self, tags: Mapping[str, str | None]) -> Iterator[Version]:
        """The versions that have all these tags, newest first; None stands for any value.

        The registry is asked for one page at a time, when it is needed.
        """
        query = f"name='{self.name}'"
        for key, value in tags.items():
            query += f" AND tags.`{key}` " + ("LIKE '%'" if value is None else f"= '{value}'")
        token = None
        while True:
            page = self.client.search_model_versions(
                query, max_results=PAGE, order_by=["version_number DESC"], page_token=token
            )
            yield from map(_version, page)
            token = page.token
            if not token:
                return

    def by_alias(self, alias: str) -> Version | None:
        """The version behind an alias, or None."""
        number = self.aliases().get(alias)
        return None if number is None else self.version(number)

    def champion(self) -> Version | None:
        """The version in production, or None."""
        return self.by_alias(CHAMPION)

    def fetch(self, version: Version, folder: Path) -> Path:
        """Download a version's model folder into `folder`; weights and card are in `artifacts`.

        Raises RegistryError if its files are missing.
        """
        import mlflow.artifacts

        if not has_files(self.client, version.model_id):
            raise RegistryError(f"{self.name} version {version.number} {MISSING_FILES}")
        with global_tracking_uri(self.uri):
            path = mlflow.artifacts.download_artifacts(
                artifact_uri=f"models:/{version.model_id}", dst_path=str(folder)
            )
        return Path(path)

    def active_run(self, version: Version) -> str | None:
        """The id of the run that trained a version, or None if it was deleted."""
        from mlflow.exceptions import MlflowException

        if version.run_id is None:
            return None
        try:
            stage = self.client.get_run(version.run_id).info.lifecycle_stage
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return version.run_id if stage == "active" else None

    def experiment_of(self, run_id: str) -> str:
        """The id of the experiment that holds a run."""
        return str(self.client.get_run(run_id).info.experiment_id)

    # --- writing

    def set_alias(self, alias: str, number: int) -> None:
        """Point an alias at a version."""
        self.client.set_registered_model_alias(self.name, alias, str(number))

    def describe(self, number: int, text: str) -> None:
        """Set the description of a version, with secrets masked."""
        self.client.update_model_version(self.name, str(number), redact(text))

    def delete_alias(self, alias: str) -> None:
        """Remove an alias."""
        self.client.delete_registered_model_alias(self.name, alias)

    def set_tags(self, number: int, tags: Mapping[str, Any]) -> None:
        """Set tags of a version, with secrets masked. MLflow takes them one by one."""
        for key, value in redact_mapping(tags).items():
            self.client.set_model_version_tag(self.name, str(number), key, str(value))

    def set_model_tag(self, key: str, value: str) -> None:
        """Set a tag of the registered model itself, with secrets masked."""
        for name, text in redact_mapping({key: value}).items():
            self.client.set_registered_model_tag(self.name, name, str(text))

    def delete_tag(self, number: int, key: str) -> None:
        """Remove a tag of a version."""
        self.client.delete_model_version_tag(self.name, str(number), key)

    def run_of_checks(self, experiment: str, version: Version) -> str:
        """The id of the run that records the drift checks of a version, created if missing."""
        where = experiment_id(self.client, experiment, self.uri)
        tags = {"pipeline.stage": "drift", "drift.model": self.name}
        tags["drift.version"] = str(version.number)
        query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        known = self.client.search_runs([where], query, max_results=1)
        if known:
            return str(known[0].info.run_id)
        name = f"drift of {self.name} version {version.number}"
        run = self.client.create_run(where, tags=tags, run_name=name)
        self.client.set_terminated(run.info.run_id, "FINISHED")
        return str(run.info.run_id)

    def append_metrics(self, run_id: str, values: Mapping[str, float]) -> None:
        """Add a value to each metric of a run, at the step after the last one."""
        from mlflow.entities import Metric

        first = next(iter(values))
        step = len(self.client.get_metric_history(run_id, first))
        at = int(time.time() * 1000)
        points = [Metric(key, value, at, step) for key, value in values.items()]
        self.client.log_batch(run_id, metrics=points)

    def log_artifact(self, run_id: str, file: Path, folder: str) -> None:
        """Store a file in a folder of the run's artifacts."""
        self.client.log_artifact(run_id, str(file), folder)

    def log_text(self, version: Version, text: str, path: str) -> None:
        """Store a text as an artifact of the version's run, if it has one."""
        if version.run_id:
            self.client.log_text(version.run_id, text, path)

    def read_text(self, version: Version, path: str) -> str | None:
        """The text of an artifact of the version's run; None if it has no such file."""
        run_id, folder = self.active_run(version), path.rpartition("/")[0]
        if run_id is None:
            return None
        if path not in {file.path for file in self.client.list_artifacts(run_id, folder)}:
            return None
        with tempfile.TemporaryDirectory() as place:
            return Path(self.client.download_artifacts(run_id, path, place)).read_text("utf-8")


def now() -> str:
    """The current UTC time, sortable as text."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _version(found: Any) -> Version:
    source = str(found.source or "")
    return Version(
        number=int(found.version),
        model_id=str(found.model_id or source.rpartition("/")[2]),
        run_id=found.run_id or None,
        tags=dict(found.tags),
    )
