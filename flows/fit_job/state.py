"""Resume state of one training, outside every clone: its folder, its lock, its attempts.

The folder's name is a fingerprint of everything that must not differ between the parts of one
training. A changed value starts a new folder; foreign state is never resumed silently.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from flows.core.digest import digest_of
from flows.core.files import read_json, write_json
from flows.core.locks import StateError
from rfdetr.errors import RFDETRError

MAX_ATTEMPTS = 3
TAIL_LINES = 30


class RunRecord(BaseModel):
    """`run.json`: what the parts of one training share.

    `attempts` counts those without a new finished epoch. The MLflow run stands in journal.json.
    """

    fingerprint: str
    inputs: dict[str, Any] = {}
    attempts: int = 0
    finished_epochs: int = 0
    epochs_at_start: int = 0
    seconds: float = 0.0  # of training, all parts together


class FitState:
    """The folder `<state dir>/fit/<fingerprint>`."""

    def __init__(self, state_dir: Path, inputs: dict[str, Any]) -> None:
        self.fingerprint = digest_of(inputs)[:24]
        self.inputs = inputs
        self.folder = state_dir / "fit" / self.fingerprint
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def record_file(self) -> Path:
        return self.folder / "run.json"

    @property
    def log_file(self) -> Path:
        return self.folder / "fit.log"

    @property
    def last_checkpoint(self) -> Path:
        return self.folder / "last.ckpt"

    @property
    def done(self) -> bool:
        return (self.folder / "done").exists()

    def mark_done(self) -> None:
        write_json(self.folder / "done", {"time": time.time()})

    def read(self) -> RunRecord:
        """The record; a new one when the file is missing or unreadable."""
        if self.record_file.exists():
            with contextlib.suppress(ValidationError, RFDETRError):
                return RunRecord.model_validate(read_json(self.record_file))
        return RunRecord(fingerprint=self.fingerprint, inputs=self.inputs)

    def write(self, record: RunRecord) -> None:
        write_json(self.record_file, record.model_dump(mode="json"))

    def update(self, **fields: Any) -> RunRecord:
        """Change fields of the record on disk and return it."""
        record = self.read().model_copy(update=fields)
        self.write(record)
        return record

    def begin_attempt(self) -> RunRecord:
        """Count an attempt. Raises StateError after three without a new finished epoch."""
        record = self.read()
        progressed = record.finished_epochs > record.epochs_at_start
        attempts = 0 if progressed else record.attempts
        if attempts >= MAX_ATTEMPTS:
            raise StateError(
                f"{attempts} attempts ended without finishing a new epoch (epoch "
                f"{record.finished_epochs} was the last one). Last lines of {self.log_file}:\n"
                f"{self.log_tail()}\nMend the cause, then run `rfdetr-pipeline fit --retry`."
            )
        return self.update(attempts=attempts + 1, epochs_at_start=record.finished_epochs)

    def forgive_attempt(self) -> None:
        """A stop on request is no failure."""
        self.update(attempts=max(0, self.read().attempts - 1))

    def log_tail(self) -> str:
        """The last lines that the trainer printed."""
        if not self.log_file.exists():
            return "  (no output)"
        lines = self.log_file.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(f"  {line}" for line in lines[-TAIL_LINES:])

    def clear(self) -> None:
        """Forget the training; used when its state is unusable or no longer needed."""
        for path in self.folder.iterdir():
            if path.name != ".lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
