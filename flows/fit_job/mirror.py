"""A copy of the resume state on S3, for machines whose disk dies with them.

The checkpoint is written to two objects in turns, and the name of the newer one to a small object
afterwards: whatever is cut off, one checkpoint is whole.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from flows.core.redact import redact
from flows.storage.objects import download, upload
from flows.storage.s3 import DamagedError, NotFoundError, StorageError, list_objects
from rfdetr.files import remove_leftovers

EVERY_SECONDS = 10.0
# Weights first, the counters that refer to them last.
PATTERNS = ("*.pth", "best_model.json", "metrics.csv", "journal.json*", "run.json", "last.ckpt")
LAST = "last.ckpt"
SLOTS = ("last.0.ckpt", "last.1.ckpt")
POINTER = "last.txt"
REPLACED = {".pth", ".ckpt"}  # large, and never changed in place


class Mirror:
    """Uploads changed state files in the background while the block runs; never raises there.

    With `url` None it does nothing.
    """

    def __init__(self, folder: Path, url: str | None) -> None:
        self.folder = folder
        self.url = f"{url.rstrip('/')}/{folder.name}" if url else None
        self._sent: dict[Path, int] = {}
        self._newest: int | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="state-mirror", daemon=True)

    def fetch(self) -> None:
        """Bring the copy here when the local state is missing.

        A damaged object is passed over with a warning: the older checkpoint takes the place of the
        newer one, and without any the training starts anew. Raises StorageError when S3 does not
        answer: a training that started anew would write over the copy.
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
        names = {item.address.rpartition("/")[2] for item in list_objects(str(self.url))}
        arrived = self.folder / f".{LAST}.fetched"
        newest = self._slot()
        slots = [slot for slot in (SLOTS[newest], SLOTS[1 - newest]) if slot in names]
        if slots and not any(self._fetch(slot, arrived) for slot in slots):
            _warn(f"{self.url}: no checkpoint is whole; the training starts anew")
            return
        for name in sorted(names - {*SLOTS, POINTER}):
            self._fetch(name, self.folder / name)
        if slots:  # at the end: a fetch that is cut off is repeated as a whole
            arrived.replace(self.folder / LAST)
            self._sent[self.folder / LAST] = (self.folder / LAST).stat().st_mtime_ns

    def _fetch(self, name: str, target: Path) -> bool:
        try:
            download(f"{self.url}/{name}", target, progress=False)
        except DamagedError as error:
            _warn(str(error))
            return False
        return True

    def _slot(self) -> int:
        """The slot of the newest checkpoint, by the pointer; 0 without one."""
        if self._newest is None:
            file = self.folder / f".{POINTER}"
            try:
                download(f"{self.url}/{POINTER}", file, progress=False)
            except (NotFoundError, DamagedError):
                file.write_text("")
            self._newest = int(file.read_text() == SLOTS[1])
            file.unlink()
        return self._newest

    def __enter__(self) -> Self:
        if self.url is not None:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
            self.send()

    def _work(self) -> None:
        while not self._stop.wait(EVERY_SECONDS):
            self.send()

    def send(self) -> None:
        """Upload what changed; a failure is a warning, the next round tries again."""
        for path in self._changed():
            time = path.stat().st_mtime_ns
            try:
                with _frozen(path) as copy:
                    self._send(copy, path.name)
            except (StorageError, OSError) as error:
                _warn(str(error))
                return
            self._sent[path] = time

    def _send(self, copy: Path, name: str) -> None:
        if name != LAST:
            upload(copy, f"{self.url}/{name}", progress=False)
            return
        slot = 1 - self._slot()
        upload(copy, f"{self.url}/{SLOTS[slot]}", progress=False)
        pointer = self.folder / f".{POINTER}"
        pointer.write_text(SLOTS[slot])
        upload(pointer, f"{self.url}/{POINTER}", progress=False)
        pointer.unlink()
        self._newest = slot

    def _changed(self) -> Iterable[Path]:
        for pattern in PATTERNS:
            for path in sorted(self.folder.glob(pattern)):
                if self._sent.get(path) != path.stat().st_mtime_ns:
                    yield path


@contextlib.contextmanager
def _frozen(path: Path) -> Iterator[Path]:
    """The content of this moment: the training goes on while it is read several times."""
    copy = path.with_name(f".{path.name}.sending")
    copy.unlink(missing_ok=True)
    try:
        if path.suffix not in REPLACED or not _link(path, copy):
            shutil.copyfile(path, copy)
        yield copy
    finally:
        copy.unlink(missing_ok=True)


def _link(path: Path, copy: Path) -> bool:
    """A second name for the file; False where the file system has none."""
    try:
        os.link(path, copy)
    except OSError:
        return False
    return True


def _warn(text: str) -> None:
    print(f"warning: {redact(text)}", file=sys.stderr, flush=True)
