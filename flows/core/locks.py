"""An exclusive lock on a folder, shared by processes."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import filelock

from rfdetr.errors import RFDETRError


class BusyError(RFDETRError):
    """Another process holds what is needed."""


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of `folder` while the block runs; it ends with the process, however that dies.

    With `wait`, blocks until the lock is free. Otherwise raises BusyError that names the holder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, holder = filelock.FileLock(folder / ".lock"), folder / ".lock.holder"
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except filelock.Timeout:
        name = holder.read_text(encoding="utf-8") if holder.exists() else "another process"
        raise BusyError(
            f"{folder} is in use by {name}. Wait until that process ends, or stop it."
        ) from None
    try:
        text = f"pid {os.getpid()} on {socket.gethostname()} since {time.ctime()}"
        holder.write_text(text, encoding="utf-8")
        yield
    finally:
        lock.release()
