"""Sends journals: in the background during a training, or what earlier trainings left behind."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from rfdetr.errors import ConfigError
from rfdetr.tracking.delivery import deliver
from rfdetr.tracking.journal import JOURNAL, Journal, Mask, Status

log = logging.getLogger(__name__)
CLOSE_SECONDS = 10.0
# Creating the schema of a local store can take half a minute on a busy machine.
CLOSE_LOCAL_SECONDS = 120.0
INTERVAL, FIRST_PAUSE, LONGEST_PAUSE = 2.0, 1.0, 30.0  # seconds


class Sender:
    """A daemon thread that delivers journals every few seconds and never raises.

    A process that exits without `close` lets it send the rest, see there.
    """

    def __init__(self, journals: Sequence[Journal], uri: str, advice: str) -> None:
        """`advice` tells the user how to send what is left."""
        self.journals, self.uri, self.advice = journals, uri, advice
        self._closing = threading.Event()
        self._deadline = self._retry_until = float("inf")
        self._thread = threading.Thread(target=self._work, name="journal-sender", daemon=True)

    def start(self) -> None:
        """Start sending."""
        atexit.register(self.close)
        self._thread.start()

    def close(self, timeout: float | None = None) -> bool:
        """Send the rest for at most `timeout` seconds; whether everything has arrived.

        By default ten seconds for a server, and two minutes for a local store as long as it does
        not fail.
        """
        retry = CLOSE_SECONDS if timeout is None else timeout
        if timeout is None:
            timeout = CLOSE_LOCAL_SECONDS if is_local(self.uri) else CLOSE_SECONDS
        atexit.unregister(self.close)
        self._deadline = time.monotonic() + timeout
        self._retry_until = time.monotonic() + retry
        self._closing.set()
        self._thread.join(timeout)
        waiting = [journal for journal in self.journals if journal.unsent]
        for journal in waiting:
            log.warning(
                "%d bytes of %s have not reached MLflow. They are kept; %s",
                journal.unsent,
                journal.file,
                self.advice,
            )
        return not waiting

    def _in_time(self) -> bool:
        return time.monotonic() < self._deadline

    def _work(self) -> None:
        pause = 0.0  # 0: the last attempt succeeded
        while True:
            last = self._closing.is_set()  # before sending: nothing is appended after it
            try:
                for journal in self.journals:
                    deliver(journal, self.uri, keep_going=self._in_time)
                pause = 0.0
            except Exception as error:  # noqa: BLE001 - tracking never ends a training
                level = logging.DEBUG if pause else logging.WARNING
                text = self.journals[0].mask(f"{type(error).__name__}: {error}")
                log.log(level, "MLflow is unreachable, retrying in the background: %s", text)
                pause = min(LONGEST_PAUSE, pause * 2 or FIRST_PAUSE)
            if last and (not pause or time.monotonic() >= self._retry_until):
                return
            if last:
                time.sleep(min(pause, 0.5))
            else:
                self._closing.wait(pause or INTERVAL)


def is_local(uri: str) -> bool:
    """Whether the store is on this machine, without a server."""
    return uri.startswith(("sqlite:", "file:", "/", "."))


def unsent_journals(
    folder: str | os.PathLike[str], mask: Mask = str, store: str | None = None
) -> list[Journal]:
    """Journals below `folder` with records that MLflow does not have; of one store, or of all."""
    found = []
    for file in sorted(Path(folder).rglob(JOURNAL)):
        try:
            journal = Journal(file.parent, mask=mask)
            if journal.unsent and journal.belongs_to(store):
                found.append(journal)
        except (ConfigError, OSError) as error:
            log.warning("%s cannot be sent: %s", file, error)
    return found


def sync(folder: str | os.PathLike[str], uri: str, mask: Mask = str) -> dict[Path, str | None]:
    """Send the unsent journals of the store `uri` below `folder`.

    Returns the folder of each -> None, or why it was not sent.
    """
    results: dict[Path, str | None] = {}
    for journal in unsent_journals(folder, mask, mask(uri)):
        try:
            deliver(journal, uri)
            results[journal.folder] = None
        except Exception as error:  # noqa: BLE001 - the other journals are still sent
            results[journal.folder] = mask(f"{type(error).__name__}: {error}")
    return results


def close_run(
    folder: str | os.PathLike[str],
    status: Status,
    uri: str | None,
    *,
    advice: str,
    mask: Mask = str,
) -> bool:
    """End the run of a process that died, unless it has ended; whether everything has arrived."""
    journal = Journal(folder, mask=mask)
    if journal.open:
        journal.end(status)
    if uri is None:
        return not journal.unsent
    sender = Sender([journal], uri, advice)
    sender.start()
    return sender.close(timeout=30)  # nothing else waits: the process has died
