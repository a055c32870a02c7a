"""A copy of the resume state on S3, for machines with ephemeral disks.

The checkpoint is uploaded to two objects in turn. A small third object, the pointer, then names
the newer one. So one of the two checkpoints is always intact, whatever is interrupted.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Self

from flows.core.names import check_names
from flows.core.redact import redact
from flows.storage.objects import download, upload
from flows.storage.s3 import DamagedError, NotFoundError, StorageError, list_objects
from rfdetr.files import remove_leftovers

EVERY_SECONDS = 10.0
# Weights first, then the counters that refer to them.
PATTERNS = ("*.pth", "best_model.json", "metrics.csv", "journal.json*", "run.json", "last.ckpt")
LAST = "last.ckpt"
SLOTS = ("last.0.ckpt", "last.1.ckpt")
POINTER = "last.txt"
REPLACED = {".pth", ".ckpt"}  # large, and never modified in place


class Mirror:
    """Uploads changed state files in the background while the block runs.

    A failed upload is a warning and is repeated later. With `url` None nothing happens.
    """

    def __init__(self, folder: Path, url: str | None) -> None:
        self.folder = folder
        self.url = f"{url.rstrip('/')}/{folder.name}" if url else None
        self._sent: dict[Path, int] = {}
        self._newest: int | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="state-mirror", daemon=True)

    def fetch(self) -> None:
        """Download the copy if the local state is missing.

        A damaged object is skipped with a warning: the older checkpoint replaces the newer one,
        and without any the training starts from scratch. Raises StorageError if S3 does not
        answer, because a training from scratch would overwrite the copy.
        """
        if self.url is None or (self.folder / LAST).exists():
            return
        remove_leftovers(self.folder, f".{LAST}.fetched")
        try:
            self._fetch_all()
        except StorageError as error:
            raise StorageError(
                f"{error} The training's state may be there. Start again when it can be read, or "
                "without RFDETR_STATE_URL."
            ) from None

    def _fetch_all(self) -> None:
        listed = (item.address.rpartition("/")[2] for item in list_objects(str(self.url)))
        known = (*PATTERNS, *SLOTS, POINTER)
        names = {name for name in listed if any(fnmatch(name, pattern) for pattern in known)}
        check_names(names, self.folder, str(self.url))
        arrived = self.folder / f".{LAST}.fetched"
        newest = self._newest_slot()
        slots = [slot for slot in (SLOTS[newest], SLOTS[1 - newest]) if slot in names]
        if slots and not any(self._fetch(slot, arrived) for slot in slots):
            _warn(f"{self.url}: no intact checkpoint; the training starts from scratch")
            return
        for name in sorted(names - {*SLOTS, POINTER}):
            self._fetch(name, self.folder / name)
        if slots:  # last: its absence makes an interrupted fetch start over
            arrived.replace(self.folder / LAST)
            self._sent[self.folder / LAST] = (self.folder / LAST).stat().st_mtime_ns

    def _fetch(self, name: str, target: Path) -> bool:
        try:
            download(f"{self.url}/{name}", target, progress=False)
        except DamagedError as error:
            _warn(str(error))
            return False
        return True

    def _newest_slot(self) -> int:
        """The slot of the newest checkpoint; 0 if there is no pointer or it is damaged."""
        if self._newest is None:
            file = self.folder / f".{POINTER}"
            try:
                download(f"{self.url}/{POINTER}", file, progress=False)
                self._newest = SLOTS.index(file.read_text())
            except (NotFoundError, DamagedError, ValueError):
                self._newest = 0
            finally:
                file.unlink(missing_ok=True)
        return self._newest

    def __enter__(self) -> Self:
        if self.url is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
            self.send()

    def _work(self) -> None:
        while not self._stop.wait(EVERY_SECONDS):
            self.send()

    def send(self) -> None:
        """Upload the files that changed; after a failure, the next call tries again."""
        try:
            for path, time in self._changed():
                with _snapshot(path) as copy:
                    self._upload(copy, path.name)
                self._sent[path] = time
        except (StorageError, OSError) as error:
            _warn(str(error))

    def _upload(self, copy: Path, name: str) -> None:
        if name != LAST:
            upload(copy, f"{self.url}/{name}", progress=False)
            return
        slot = 1 - self._newest_slot()
        upload(copy, f"{self.url}/{SLOTS[slot]}", progress=False)
        pointer = self.folder / f".{POINTER}"
        pointer.write_text(SLOTS[slot])
        upload(pointer, f"{self.url}/{POINTER}", progress=False)
        pointer.unlink()
        self._newest = slot

    def _changed(self) -> Iterator[tuple[Path, int]]:
        """Files that are new or changed since they were sent, with their time of change."""
        for pattern in PATTERNS:
            for path in sorted(self.folder.glob(pattern)):
                time = path.stat().st_mtime_ns
                if self._sent.get(path) != time:
                    yield path, time


@contextlib.contextmanager
def _snapshot(path: Path) -> Iterator[Path]:
    """A copy that does not change while it is read several times; the training continues."""
    copy = path.with_name(f".{path.name}.sending")
    copy.unlink(missing_ok=True)
    try:
        if path.suffix not in REPLACED or not _link(path, copy):
            shutil.copyfile(path, copy)
        yield copy
    finally:
        copy.unlink(missing_ok=True)


def _link(path: Path, copy: Path) -> bool:
    """Hard-link the file; False if the file system does not support it."""
    try:
        os.link(path, copy)
    except OSError:
        return False
    return True


def _warn(text: str) -> None:
    print(f"warning: {redact(text)}", file=sys.stderr, flush=True)
