"""An exclusive lock on a folder, shared by processes."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import filelock

from rfdetr.errors import RFDETRError

LOGGER = logging.getLogger(__name__)
QUIET_SECONDS = 5.0  # of waiting


class BusyError(RFDETRError):
    """Another process holds what is needed."""


def _content(file: Path) -> str:
    with contextlib.suppress(OSError):
        return file.read_text(encoding="utf-8", errors="replace")
    return ""


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of `folder` while the block runs; it ends with the process, however that dies.

    With `wait`, blocks until the lock is free, and says for whom it waits. Otherwise raises
    BusyError that names the holder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, holder = filelock.FileLock(folder / ".lock"), folder / ".lock.holder"
    try:
        lock.acquire(timeout=QUIET_SECONDS if wait else 0)
    except filelock.Timeout:
        name = _content(holder) or "another process"
        if not wait:
            raise BusyError(
                f"{folder} is in use by {name}. Wait until that process ends, or stop it."
            ) from None
        LOGGER.warning("waiting for %s, which is in use by %s", folder, name)
        lock.acquire()
    try:
        text = f"pid {os.getpid()} on {socket.gethostname()} since {time.ctime()}"
        holder.write_text(text, encoding="utf-8")
        yield
    finally:
        lock.release()
