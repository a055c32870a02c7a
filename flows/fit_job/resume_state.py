"""Resume state of one training, outside of every clone: its folder and its attempts.

The folder's name is a fingerprint of everything that must stay the same for a training to be
resumed. A changed value means a new folder and a training from scratch.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from flows.core.digest import digest_of
from flows.core.files import read_json, write_json
from flows.fit_job.job import JOB
from rfdetr.errors import RFDETRError

MAX_ATTEMPTS = 3
TAIL_LINES = 30
NOT_SETTINGS = {"code": "the code", "initial": "the starting weights"}  # inputs, and their names


class AttemptsError(RFDETRError):
    """A training keeps failing."""


class RunRecord(BaseModel):
    """`run.json`: what the attempts at one training share.

    `attempts` counts those since the last finished epoch. journal.json names the MLflow run.
    """

    fingerprint: str
    inputs: dict[str, Any] = {}
    attempts: int = 0
    finished_epochs: int = 0
    epochs_at_start: int = 0
    seconds: float = 0.0  # of training, in all attempts


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

    def superseded(self) -> tuple[Path, list[str]] | None:
        """An unfinished training with the same settings and data, and what has changed since."""
        wanted = _without_null(self.inputs)
        for file in self.folder.parent.glob("*/run.json"):
            if file.parent == self.folder or (file.parent / "done").exists():
                continue
            with contextlib.suppress(ValidationError, RFDETRError):
                other = _without_null(RunRecord.model_validate(read_json(file)).inputs)
                differing = {k for k in {*wanted, *other} if wanted.get(k) != other.get(k)}
                if differing and differing <= set(NOT_SETTINGS):
                    return file.parent, [NOT_SETTINGS[name] for name in sorted(differing)]
        return None

    def other_effective_batch(self) -> int | None:
        """The effective batch of a running training that differs in nothing else."""
        for file in self.folder.parent.glob(f"*/{JOB}"):
            with contextlib.suppress(ValidationError, RFDETRError):
                other = RunRecord.model_validate(read_json(file.with_name("run.json"))).inputs
                same = {
                    key for key in {*self.inputs, *other} if self.inputs.get(key) == other.get(key)
                }
                if {*self.inputs, *other} - same == {"effective_batch"}:
                    return int(other["effective_batch"])
        return None

    def mark_done(self) -> None:
        write_json(self.folder / "done", {"time": time.time()})

    def read(self) -> RunRecord:
        """The record; a new one if the file is missing or unreadable."""
        if self.record_file.exists():
            with contextlib.suppress(ValidationError, RFDETRError):
                return RunRecord.model_validate(read_json(self.record_file))
        return RunRecord(fingerprint=self.fingerprint, inputs=self.inputs)

    def write(self, record: RunRecord) -> None:
        write_json(self.record_file, record.model_dump(mode="json"))

    def update(self, **fields: Any) -> RunRecord:
        """Change fields of the record on disk and return the record."""
        record = self.read().model_copy(update=fields)
        self.write(record)
        return record

    def begin_attempt(self) -> RunRecord:
        """Count an attempt. Raises AttemptsError after three without a new finished epoch."""
        record = self.read()
        progressed = record.finished_epochs > record.epochs_at_start
        attempts = 0 if progressed else record.attempts
        if attempts >= MAX_ATTEMPTS:
            raise AttemptsError(
                f"{attempts} attempts ended without finishing a new epoch (epoch "
                f"{record.finished_epochs} was the last one). Last lines of {self.log_file}:\n"
                f"{self.log_tail()}\nFix the cause, then run `rfdetr-pipeline fit --retry`."
            )
        return self.update(attempts=attempts + 1, epochs_at_start=record.finished_epochs)

    def forgive_attempt(self) -> None:
        """Do not count an attempt that was stopped on request."""
        self.update(attempts=max(0, self.read().attempts - 1))

    def log_tail(self) -> str:
        """The last lines that the trainer printed."""
        if not self.log_file.exists():
            return "  (no output)"
        lines = self.log_file.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(f"  {line}" for line in lines[-TAIL_LINES:])


def _without_null(value: Any) -> Any:
    """Plain data without null fields: a field that a later version added is null by default."""
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return value
