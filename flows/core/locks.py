"""An exclusive lock on a folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from rfdetr.errors import RFDETRError


class StateError(RFDETRError):
    """State that another process holds, or a training that keeps failing."""


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold `<folder>/.lock` for the life of the block; `kill -9` frees it too.

    With `wait` stands in line, otherwise raises StateError that names the holder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+", encoding="utf-8") as stream:
        if wait:
            fcntl.flock(stream, fcntl.LOCK_EX)
        else:
            _lock(stream, folder)
        try:
            stream.truncate(0)
            stream.write(f"pid {os.getpid()} on {socket.gethostname()} since {time.ctime()}")
            stream.flush()
            yield
        finally:
            fcntl.flock(stream, fcntl.LOCK_UN)


def _lock(stream: IO[str], folder: Path) -> None:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.seek(0)
        holder = stream.read().strip() or "another process"
        raise StateError(
            f"The same training already runs: {holder} holds {folder / '.lock'}. Wait for it or "
            "stop it."
        ) from None
