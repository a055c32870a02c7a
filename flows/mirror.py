"""A copy of the resume state on S3, for machines whose disk dies with them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from flows.redact import redact
from flows.s3 import StorageError, list_objects
from flows.storage import download, upload

EVERY_SECONDS = 10.0
# Weights first, the counters that refer to them last.
PATTERNS = ("*.pth", "best_model.json", "metrics.csv", "journal.json*", "run.json", "last.ckpt")


class Mirror:
    """Uploads changed state files in the background while the block runs; never raises there.

    With `url` None it does nothing.
    """

    def __init__(self, folder: Path, url: str | None) -> None:
        self.folder = folder
        self.url = f"{url.rstrip('/')}/{folder.name}" if url else None
        self._sent: dict[Path, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="state-mirror", daemon=True)

    def fetch(self) -> None:
        """Bring the copy here when the local state is missing. Raises StorageError."""
        if self.url is None or (self.folder / "last.ckpt").exists():
            return
        for address, _ in list_objects(self.url):
            download(address, self.folder / address.rsplit("/", 1)[-1], progress=False)

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
                upload(path, f"{self.url}/{path.name}", progress=False)
            except (StorageError, OSError) as error:
                print(f"warning: {redact(str(error))}", file=sys.stderr, flush=True)
                return
            self._sent[path] = time

    def _changed(self) -> Iterable[Path]:
        for pattern in PATTERNS:
            for path in sorted(self.folder.glob(pattern)):
                if self._sent.get(path) != path.stat().st_mtime_ns:
                    yield path
