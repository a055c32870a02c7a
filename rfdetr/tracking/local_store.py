"""The SQLite store of a folder that was moved or copied.

MLflow stores absolute artifact locations. A store without a server keeps its artifacts in
`mlartifacts` beside the database (see `rfdetr.tracking.client.experiment_id`), so the locations
follow the database.
"""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from urllib.parse import unquote, urlsplit

from rfdetr.errors import ConfigError

FOLDER = "mlartifacts"
LOCATIONS = {
    "experiments": "artifact_location",
    "runs": "artifact_uri",
    "logged_models": "artifact_location",
    "model_versions": "storage_location",
}


def follow_database(uri: str, *, copied: bool = False) -> None:
    """Correct the artifact locations of a SQLite store whose folder was moved.

    Locations that exist are kept; with `copied` only if the artifacts are not beside the database
    too. A database that is locked, or of another version, is left alone. Raises ConfigError if the
    path is not a file.
    """
    kind, _, path = uri.partition(":///")
    database = Path(path)
    if kind != "sqlite" or not database.exists():
        return
    if not database.is_file():
        raise ConfigError(
            f"{database} is not a file, so it cannot be MLflow's database. Move it away, or set "
            "MLFLOW_TRACKING_URI to another store."
        )
    new = (database.absolute().parent / FOLDER).as_uri()
    with contextlib.suppress(sqlite3.Error), contextlib.closing(_open(database)) as store:
        for old in _moved(store, new, copied=copied):
            with store:
                for table, column in LOCATIONS.items():
                    store.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) "  # noqa: S608
                        f"WHERE substr({column}, 1, ?) = ?",
                        (new, len(old) + 1, len(old) + 1, f"{old}/"),
                    )


def _open(database: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{database.absolute().as_uri()}?mode=rw", uri=True, timeout=5)


def _moved(store: sqlite3.Connection, new: str, *, copied: bool) -> set[str]:
    """The former artifact folders that the experiments name and that are no longer right."""
    found = set()
    for (location,) in store.execute("SELECT artifact_location FROM experiments"):
        root, middle, name = str(location).partition(f"/{FOLDER}/")
        old = f"{root}/{FOLDER}"
        if not middle or old == new or not old.startswith("file:///"):
            continue
        here = copied and _path(f"{new}/{name}").exists()
        if here or not _path(str(location)).exists():
            found.add(old)
    return found


def _path(uri: str) -> Path:
    return Path(unquote(urlsplit(uri).path))
