"""The files of a logged model in MLflow's artifact store: present, and the right ones?"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rfdetr.files import sha256_file

if TYPE_CHECKING:
    from mlflow import MlflowClient

WEIGHTS = (".pth", ".ckpt")
NEEDED = {"MLmodel", "artifacts"}


def has_files(client: MlflowClient, model_id: str) -> bool:
    """Whether the files of a logged model are there, without reading them."""
    return _names(client, model_id, None) >= NEEDED and _weights(client, model_id) is not None


def weights_digest(client: MlflowClient, model_id: str) -> str | None:
    """SHA-256 of the stored weights, which are read completely; None if they are missing."""
    import mlflow.artifacts

    path = _weights(client, model_id)
    if path is None:
        return None
    location = str(client.get_logged_model(model_id).artifact_location)
    with tempfile.TemporaryDirectory(prefix="rfdetr-check-") as folder:
        return sha256_file(
            mlflow.artifacts.download_artifacts(
                artifact_uri=f"{location}/{path}", dst_path=folder, tracking_uri=client.tracking_uri
            )
        )


def _weights(client: MlflowClient, model_id: str) -> str | None:
    found = _names(client, model_id, "artifacts")
    return next((name for name in sorted(found) if name.endswith(WEIGHTS)), None)


def _names(client: MlflowClient, model_id: str, folder: str | None) -> set[str]:
    """Paths in a folder of the model's artifacts; empty if the model or the folder is missing."""
    from mlflow.exceptions import MlflowException

    try:
        found: list[Any] = client.list_logged_model_artifacts(model_id, folder)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return set()
    except FileNotFoundError:
        return set()
    return {str(file.path) for file in found}


@contextlib.contextmanager
def global_tracking_uri(uri: str) -> Iterator[None]:
    """Set MLflow's global tracking URI, through which its SQL store resolves `models:/`.

    MLflow exports it to the environment as well; both are restored.
    """
    import mlflow

    before, variable = mlflow.get_tracking_uri(), os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)
        if variable is None:
            os.environ.pop("MLFLOW_TRACKING_URI", None)
        else:
            os.environ["MLFLOW_TRACKING_URI"] = variable
