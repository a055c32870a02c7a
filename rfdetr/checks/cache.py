"""Persistent results of image checks: path, size and time -> content hash -> facts.

The cache is in the user's cache folder by default. Copied or moved datasets are recognised by their
content. A cache that cannot be used costs time, never a result.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
from PIL import __version__ as pillow_version

from rfdetr.checks.image_probe import PROBE_VERSION, ImageFacts
from rfdetr.data.decode import Levels
from rfdetr.files import user_cache_folder

logger = logging.getLogger(__name__)

SCHEMA = """
CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, size INTEGER, mtime INTEGER, hash TEXT);
CREATE TABLE IF NOT EXISTS facts (hash TEXT, probe TEXT, size INTEGER, row BLOB,
                                  PRIMARY KEY (hash, probe));
"""


_decoder = msgspec.json.Decoder(ImageFacts)


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

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        max_pixels: int,
        levels: Levels | None = None,
    ) -> None:
        self._file = (Path(folder) if folder else user_cache_folder("checks")) / "images.sqlite"
        self._probe = f"{PROBE_VERSION}-{pillow_version}-{max_pixels}"
        if levels is not None:
            self._probe += f"-{levels[0]!r}-{levels[1]!r}"
        self._warned = False

    def known_files(self, stamps: Iterable[FileStamp]) -> dict[str, Inspected]:
        """Facts of the files whose path, size and time are unchanged."""
        query = (
            "SELECT facts.hash, facts.row FROM files JOIN facts ON facts.hash = files.hash "
            "WHERE path = ? AND files.size = ? AND mtime = ? AND probe = ?"
        )
        found: dict[str, Inspected] = {}
        with self._tolerated(), self._database() as database:
            for stamp in stamps:
                answer = database.execute(query, (*stamp, self._probe)).fetchone()
                if answer is not None:
                    found[stamp.path] = Inspected(answer[0], _decoder.decode(answer[1]))
        return found

    def known_sizes(self) -> frozenset[int]:
        """Sizes of all files with known facts; a file of another size cannot be known."""
        sizes: set[int] = set()
        with self._tolerated(), self._database() as database:
            query = "SELECT DISTINCT size FROM facts WHERE probe = ?"
            sizes.update(row[0] for row in database.execute(query, (self._probe,)))
        return frozenset(sizes)

    def known_contents(self, hashes: Iterable[str]) -> dict[str, ImageFacts]:
        """Facts by content hash."""
        query = "SELECT row FROM facts WHERE hash = ? AND probe = ?"
        found: dict[str, ImageFacts] = {}
        with self._tolerated(), self._database() as database:
            for content in hashes:
                answer = database.execute(query, (content, self._probe)).fetchone()
                if answer is not None:
                    found[content] = _decoder.decode(answer[0])
        return found

    def store(self, results: Iterable[tuple[FileStamp, Inspected]]) -> None:
        """Store the results of the files that could be read."""
        kept = [(stamp, found) for stamp, found in results if found.hash]
        with self._tolerated(), self._database() as database:
            database.executemany(
                "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)",
                [(*stamp, found.hash) for stamp, found in kept],
            )
            database.executemany(
                "INSERT OR REPLACE INTO facts VALUES (?, ?, ?, ?)",
                [
                    (found.hash, self._probe, stamp.size, msgspec.json.encode(found.facts))
                    for stamp, found in kept
                ],
            )

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """The database, in one transaction."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(self._file, timeout=30)) as database, database:
            database.executescript(SCHEMA)
            yield database

    @contextmanager
    def _tolerated(self) -> Iterator[None]:
        """Failures inside end the block with a warning, once."""
        try:
            yield
        except (sqlite3.Error, OSError, ValueError) as error:
            if not self._warned:
                logger.warning("%s: the image check cache is not used (%s).", self._file, error)
            self._warned = True
