"""Persistent results of image checks: path, size and time -> content hash -> facts.

The cache is in the user's cache folder by default. Copied or moved datasets are recognised by their
content. A cache that cannot be used costs time, never a result.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import orjson
from PIL import __version__ as pillow_version

from rfdetr.checks.image_probe import PROBE_VERSION, ImageFacts
from rfdetr.files import user_cache_folder

logger = logging.getLogger(__name__)

SCHEMA = """
CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, size INTEGER, mtime INTEGER, hash TEXT);
CREATE TABLE IF NOT EXISTS facts (hash TEXT, probe TEXT, size INTEGER, row BLOB,
                                  PRIMARY KEY (hash, probe));
"""


class FileStamp(NamedTuple):
    """Identifies an unchanged file without reading it."""

    path: str
    size: int
    mtime_ns: int


class Inspected(NamedTuple):
    """One file's content hash (empty when it cannot be read) and facts."""

    hash: str
    facts: ImageFacts


class FactsCache:
    """A small database of facts. If it fails, nothing is known and one warning is logged."""

    def __init__(self, folder: str | os.PathLike[str] | None, max_pixels: int) -> None:
        self._file = (Path(folder) if folder else user_cache_folder("checks")) / "images.sqlite"
        self._probe = f"{PROBE_VERSION}-{pillow_version}-{max_pixels}"
        self._warned = False

    def known_files(self, stamps: Iterable[FileStamp]) -> dict[str, Inspected]:
        """Facts of the files whose path, size and time are unchanged."""
        query = (
            "SELECT facts.hash, facts.row FROM files JOIN facts ON facts.hash = files.hash "
            "WHERE path = ? AND files.size = ? AND mtime = ? AND probe = ?"
        )
        found: dict[str, Inspected] = {}
        try:
            with closing(self._open()) as database:
                for stamp in stamps:
                    answer = database.execute(query, (*stamp, self._probe)).fetchone()
                    if answer is not None:
                        found[stamp.path] = Inspected(answer[0], _facts(answer[1]))
        except (sqlite3.Error, OSError, ValueError, TypeError) as error:
            self._warn(error)
        return found

    def known_sizes(self) -> frozenset[int]:
        """Sizes of all files with known facts; a file of another size cannot be known."""
        try:
            with closing(self._open()) as database:
                query = "SELECT DISTINCT size FROM facts WHERE probe = ?"
                return frozenset(row[0] for row in database.execute(query, (self._probe,)))
        except (sqlite3.Error, OSError) as error:
            self._warn(error)
            return frozenset()

    def known_contents(self, hashes: Iterable[str]) -> dict[str, ImageFacts]:
        """Facts by content hash."""
        query = "SELECT row FROM facts WHERE hash = ? AND probe = ?"
        found: dict[str, ImageFacts] = {}
        try:
            with closing(self._open()) as database:
                for content in hashes:
                    answer = database.execute(query, (content, self._probe)).fetchone()
                    if answer is not None:
                        found[content] = _facts(answer[0])
        except (sqlite3.Error, OSError, ValueError, TypeError) as error:
            self._warn(error)
        return found

    def store(self, results: Iterable[tuple[FileStamp, Inspected]]) -> None:
        """Store the results of the files that could be read."""
        kept = [(stamp, found) for stamp, found in results if found.hash]
        try:
            with closing(self._open()) as database, database:
                database.executemany(
                    "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)",
                    [(*stamp, found.hash) for stamp, found in kept],
                )
                database.executemany(
                    "INSERT OR REPLACE INTO facts VALUES (?, ?, ?, ?)",
                    [
                        (found.hash, self._probe, stamp.size, orjson.dumps(found.facts.to_row()))
                        for stamp, found in kept
                    ],
                )
        except (sqlite3.Error, OSError, UnicodeError) as error:
            self._warn(error)

    def _open(self) -> sqlite3.Connection:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(self._file, timeout=30)
        database.executescript(SCHEMA)
        return database

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            logger.warning("%s: the cache of image checks is not used (%s).", self._file, error)
        self._warned = True


def _facts(blob: bytes) -> ImageFacts:
    return ImageFacts.from_row(orjson.loads(blob))
