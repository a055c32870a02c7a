"""Content hashes of folders. Hashes of unchanged files (inode, size, time) are cached."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rfdetr.errors import DatasetError
from rfdetr.files import sha256_file

IGNORED = {"__pycache__"}


def digest_of(value: Any) -> str:
    """SHA-256 of plain data, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def list_files(folder: str | os.PathLike[str]) -> Iterator[tuple[str, os.stat_result]]:
    """(relative POSIX path, status) of every file under `folder`, in sorted order."""
    root = Path(folder)
    for base, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if name not in IGNORED)
        for name in sorted(names):
            path = Path(base) / name
            if not name.endswith((".pyc", ".pyo")):
                yield path.relative_to(root).as_posix(), path.stat()


def path_digest(path: str | os.PathLike[str], cache: Path | None = None) -> str:
    """SHA-256 over the names and contents of a folder, or of one file.

    `cache` is a SQLite file that keeps the hashes of unchanged files between calls.
    Raises DatasetError if `path` does not exist.
    """
    target = Path(path)
    if target.is_file():
        files = [(target.name, target.stat())]
        root = target.parent
    elif target.is_dir():
        files, root = list(list_files(target)), target
    else:
        raise DatasetError(f"{target} does not exist; build or fetch it first.")
    keys = {name: _key(status) for name, status in files}
    known = _read(cache, keys.values())
    new = [name for name, key in keys.items() if key not in known]
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        fresh = dict(zip(new, pool.map(lambda n: sha256_file(root / n), new), strict=True))
    _write(cache, {keys[name]: digest for name, digest in fresh.items()})
    return digest_of(sorted((name, fresh.get(name) or known[key]) for name, key in keys.items()))


def paths_digest(root: Path, paths: Iterable[str], cache: Path | None = None) -> str:
    """One hash over several files and folders, for example the code of a stage."""
    return digest_of({path: path_digest(root / path, cache) for path in sorted(paths)})


def _key(status: os.stat_result) -> str:
    return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"


def _open(cache: Path) -> sqlite3.Connection:
    cache.parent.mkdir(parents=True, exist_ok=True)
    try:
        return _connect(cache)
    except sqlite3.OperationalError:  # locked, disk full or no permission: the file is intact
        raise
    except sqlite3.DatabaseError:  # damaged
        cache.unlink()
        return _connect(cache)


def _connect(cache: Path) -> sqlite3.Connection:
    database = sqlite3.connect(cache, timeout=30)
    database.execute("CREATE TABLE IF NOT EXISTS digest (key TEXT PRIMARY KEY, sha256 TEXT)")
    return database


def _read(cache: Path | None, keys: Iterable[str]) -> dict[str, str]:
    if cache is None:
        return {}
    database = _open(cache)
    try:
        found = (
            database.execute("SELECT key, sha256 FROM digest WHERE key = ?", (key,)).fetchone()
            for key in keys
        )
        return {row[0]: row[1] for row in found if row}
    finally:
        database.close()


def _write(cache: Path | None, digests: dict[str, str]) -> None:
    if cache is None or not digests:
        return
    database = _open(cache)
    try:
        with database:
            database.executemany("INSERT OR REPLACE INTO digest VALUES (?, ?)", digests.items())
    finally:
        database.close()
