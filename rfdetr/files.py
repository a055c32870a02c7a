"""Atomic file writing, content hashes and the user's cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import platformdirs

CHUNK_BYTES = 1 << 20
TAG = 12  # characters that make a temporary name unique


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` on success and is removed on failure.

    The parent folder is created; the caller creates the temporary file by opening it for writing.
    Readers see the old file or the complete new one, never a partial one.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:TAG]}.tmp")
    try:
        yield temporary
        to_disk(temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def to_disk(path: Path) -> None:
    """Flush the content of `path` to the disk."""
    with open(path, "rb") as written:
        os.fsync(written.fileno())


def remove_leftovers(folder: Path, name: str = "*", *, idle_s: float = 0.0) -> None:
    """Remove temporary files of killed writers of `name`, if unmodified for `idle_s` seconds.

    Only safe when no process is writing these files, or when writing takes less than `idle_s`.
    """
    for left in folder.glob(f".{name}.{'?' * TAG}.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime >= idle_s:
                left.unlink()


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 `text` to `path` in one step."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def user_cache_folder(name: str) -> Path:
    """The folder `name` in this package's part of the user's cache, on every system."""
    return platformdirs.user_cache_path("rfdetr") / name


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
