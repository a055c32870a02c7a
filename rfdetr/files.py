"""Atomic files and folders, content hashes and the user's cache folder."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import filelock
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
    except OSError as error:
        full = error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or (error.filename == str(temporary) and error.filename2 is None):
            error.filename = str(target)
        raise
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


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that replaces `target` at the end of the block, unless that raises."""
    with scratch_folder(target) as work:
        yield work
        shutil.rmtree(target, ignore_errors=True)
        work.replace(target)


@contextlib.contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target` that is removed at the end.

    Its name is `.<target>.<tag>.partial`. A lock beside it tells a running process from a killed
    one, whose folder the next call for this target removes.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_dead_folders(target.parent, target.name)
    work = target.with_name(f".{target.name}.{uuid.uuid4().hex[:TAG]}.partial")
    with filelock.FileLock(_lock_of(work)):
        try:
            work.mkdir()
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)
            _lock_of(work).unlink(missing_ok=True)


def dead_folders(parent: Path, name: str = "*") -> Iterator[Path]:
    """The scratch folders in `parent` whose process was killed, each locked until the next one."""
    stem = name if name == "*" else glob.escape(name)
    for folder in parent.glob(f".{stem}.{'[0-9a-f]' * TAG}.partial"):
        with contextlib.suppress(filelock.Timeout), filelock.FileLock(_lock_of(folder), timeout=0):
            yield folder


def remove_dead_folders(parent: Path, name: str = "*") -> int:
    """Remove the scratch folders in `parent` whose process was killed; how many there were."""
    count = 0
    for folder in dead_folders(parent, name):
        shutil.rmtree(folder, ignore_errors=True)
        _lock_of(folder).unlink(missing_ok=True)
        count += 1
    return count


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


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
