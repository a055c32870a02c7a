"""The MLflow client, experiments, and names that MLflow accepts."""

from __future__ import annotations

import logging
import os
import posixpath
import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from rfdetr.errors import ConfigError
from rfdetr.tracking.local_store import FOLDER, follow_database

if TYPE_CHECKING:
    from mlflow import MlflowClient

# MLflow 3.17 shows experiments of this kind in its model-training view; read from the enum in the
# JavaScript of its web interface, beside "genai_development".
MODEL_TRAINING = {"mlflow.experimentKind": "custom_model_development"}

SQLITE_PATH = 500  # its limit is 512, for the journal too


@lru_cache(maxsize=4)
def tracking_client(uri: str) -> MlflowClient:
    """A client with bounded waits; it neither reads nor changes MLflow's global tracking URI.

    Its waits draw no random numbers: they would come from the generator of a training that runs
    meanwhile, and a failing server would change its augmentations. The artifact locations of a
    SQLite store that was moved are corrected.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ["MLFLOW_HTTP_REQUEST_BACKOFF_JITTER"] = "0"
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow import MlflowClient

    # It logs the traceback of every database error, which the caller explains in one text.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    follow_database(uri)
    _forget_locations()
    _retry_briefly(uri)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _forget_locations() -> None:
    """Empty MLflow's cache of artifact folders, whose key is an id: copies of a store share ids."""
    from mlflow.tracking._tracking_service import utils  # read in 3.17

    getattr(utils, "_artifact_repos_cache", {}).clear()


def _retry_briefly(uri: str) -> None:
    """Open a database within seconds or not at all; MLflow would try for 100 seconds."""
    if uri.startswith(("sqlite", "postgresql", "mysql", "mssql")):
        from mlflow.store.db import utils  # read in 3.17

        utils.MAX_RETRY_COUNT = 5


def local_store(folder: str | os.PathLike[str]) -> str:
    """The URI of a SQLite store in `folder`. Raises ConfigError if a URI cannot name the folder."""
    file = Path(folder).absolute() / "mlflow.db"
    if "?" in str(file):
        raise ConfigError(
            f"{file.parent}: the address of a SQLite file cannot contain a question mark. Rename "
            "that folder, or set MLFLOW_TRACKING_URI to another store."
        )
    if len(os.fsencode(file)) > SQLITE_PATH:
        raise ConfigError(
            f"{file.parent}: SQLite opens no file whose path is longer than {SQLITE_PATH} bytes. "
            "Move that folder, or set MLFLOW_TRACKING_URI to another store."
        )
    return f"sqlite:///{file}"


def experiment_id(client: MlflowClient, name: str, uri: str) -> str:
    """The experiment of this name, created or restored if necessary.

    Without a server its artifacts are in `mlartifacts` beside the SQLite file.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        artifacts = None
        if uri.startswith("sqlite:"):
            root = Path(uri.removeprefix("sqlite:///")).absolute().parent / FOLDER
            artifacts = (root / re.sub(r"[^\w.-]+", "-", name)).as_uri()
        try:
            return str(
                client.create_experiment(name, artifact_location=artifacts, tags=MODEL_TRAINING)
            )
        except MlflowException:  # another process was faster
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def valid_key(key: str) -> str:
    """A name that MLflow accepts: letters, digits and `_-. :/`, a plain relative path."""
    name = posixpath.normpath(re.sub(r"[^\w.\- :/]", "_", key).strip("/") or "_")
    return name.replace("..", "_")[:250]
