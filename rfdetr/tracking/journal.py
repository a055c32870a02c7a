"""Durable log of tracking records, written to disk before they are sent to MLflow.

Appending never raises and never waits for a server. `rfdetr.tracking.delivery` sends the records.
Parameters, metrics and tags stay in the file, so that a server that lost its database, or another
one, can receive them again. Artifacts do not: their copies are deleted once they have arrived.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError

from rfdetr.errors import ConfigError
from rfdetr.files import remove_leftovers, write_text_atomic

log = logging.getLogger(__name__)
JOURNAL, STATE, LOCK = "journal.jsonl", "journal.json", ".journal.lock"
LONGEST_WRITE_S = 10.0  # of the state, which is a few hundred bytes
Status = Literal["FINISHED", "FAILED", "KILLED"]
Mask = Callable[[str], str]
Record = dict[str, Any]


class RunSpec(BaseModel):
    """The MLflow run of a journal. Without a name MLflow makes one up.

    `store` names the tracking store of the run; only that one receives the journal
    later. None means any.
    """

    model_config = ConfigDict(frozen=True)

    experiment: str
    name: str | None = None
    tags: dict[str, str] = {}
    store: str | None = None


class JournalState(BaseModel):
    """`journal.json`: the run of the journal, and how many of its bytes the server `uri` has.

    `key` is a tag of the run; it identifies the run if the process died before noting its id.
    """

    spec: RunSpec
    key: str
    uri: str | None = None
    run_id: str | None = None
    offset: int = 0


def read_state(folder: str | os.PathLike[str]) -> JournalState | None:
    """The state of the journal in `folder`; None if there is none or it is unreadable."""
    path = Path(folder) / STATE
    try:
        return JournalState.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValidationError, UnicodeDecodeError) as error:
        log.warning("%s is unreadable (%s); its records go to a new run", path, error)
        return None


class Journal:
    """The journal in `folder`: continued, or created with `spec`. Safe for threads and processes.

    `mask` removes secrets from parameters, tags and errors before they reach the disk or a log.
    """

    def __init__(
        self, folder: str | os.PathLike[str], spec: RunSpec | None = None, mask: Mask = str
    ) -> None:
        self.folder = Path(folder).absolute()
        self.file = self.folder / JOURNAL
        self.mask = mask
        self._lock = threading.Lock()
        self._warned = False
        self._params: dict[str, str] | None = None
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder, STATE, idle_s=LONGEST_WRITE_S)
        if read_state(self.folder) is None:
            if spec is None:
                raise ConfigError(f"{self.folder} has no journal; start one with a RunSpec.")
            self.save(JournalState(spec=spec, key=uuid.uuid4().hex))
        elif spec is not None and spec.store is not None:  # a resumed run may have a new store
            kept = self.state
            moved = kept.spec.model_copy(update={"store": spec.store})
            if moved != kept.spec:
                self.save(kept.model_copy(update={"spec": moved}))

    # --- the state beside the journal

    @property
    def state(self) -> JournalState:
        """The state on disk. Raises ConfigError if it is missing."""
        state = read_state(self.folder)
        if state is None:
            raise ConfigError(f"{self.folder / STATE} is missing; the journal cannot be sent.")
        return state

    def save(self, state: JournalState) -> None:
        """Write the state in one step."""
        write_text_atomic(self.folder / STATE, state.model_dump_json(indent=2) + "\n")

    @property
    def run_id(self) -> str | None:
        """The MLflow run, None until a server was reached."""
        return self.state.run_id

    def belongs_to(self, store: str | None) -> bool:
        """Whether this is the store of the run."""
        return store is None or self.state.spec.store in (None, store)

    @property
    def unsent(self) -> int:
        """Bytes that have not arrived."""
        size = self.file.stat().st_size if self.file.exists() else 0
        return max(0, size - self.state.offset)

    def sending(self) -> FileLock:
        """A lock that one sender holds at a time, of all processes and threads."""
        return FileLock(self.folder / LOCK)

    # --- writing

    def append(self, kind: str, **fields: Any) -> None:
        """Add one record. A full disk is a warning, not the end of a training."""
        record = {"t": time.time_ns() // 1_000_000, "kind": kind, **fields}
        line = json.dumps(record, separators=(",", ":"), default=str).encode() + b"\n"
        try:
            with self._lock, open(self.file, "ab+") as stream:
                if stream.tell():
                    stream.seek(-1, os.SEEK_END)
                    if stream.read(1) != b"\n":  # a partial line left by a killed writer
                        line = b"\n" + line
                stream.write(line)
        except OSError as error:
            if not self._warned:
                log.warning("cannot write %s (%s); tracking records are lost", self.file, error)
            self._warned = True

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Numbers at a step; values that are not numbers are dropped."""
        values = {key: float(value) for key, value in metrics.items() if _is_number(value)}
        if values:
            self.append("metrics", step=step or 0, values=values)

    def log_params(self, params: Mapping[str, Any], separator: str = ".") -> None:
        """Nested parameters as flat texts. A parameter cannot change: a new value becomes a tag."""
        if self._params is None:
            self._params = self._logged_params()
        known = self._params
        flat = {k: self.mask(str(v)) for k, v in flatten(params, separator=separator).items()}
        new = {key: value for key, value in flat.items() if key not in known}
        changed = {k: v for k, v in flat.items() if k in known and v != known[k]}
        known.update(new)
        if new:
            self.append("params", values=new)
        if changed:
            self.set_tags({f"changed.{key}": value for key, value in changed.items()})

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Tags as text; a later value replaces an earlier one."""
        self.append("tags", values={key: self.mask(str(value)) for key, value in tags.items()})

    def log_artifact(self, path: str | os.PathLike[str], to: str | None = None) -> None:
        """A file, copied now, so that later changes of it do not matter."""
        source = Path(path)
        copy = Path("outbox") / uuid.uuid4().hex[:12] / source.name
        try:
            (self.folder / copy).parent.mkdir(parents=True)
            shutil.copyfile(source, self.folder / copy)
        except OSError as error:
            log.warning("artifact %s is not logged: %s", source, error)
            return
        self.append("artifact", file=copy.as_posix(), to=to)

    def log_dataset(self, name: str, digest: str, source: str) -> None:
        """The training data: name, content hash and location."""
        self.append("dataset", name=name, digest=digest, source=self.mask(source))

    def begin(self) -> None:
        """The run is running (again)."""
        self.append("begin")

    def end(self, status: Status) -> None:
        """The run has ended."""
        self.append("end", status=status)

    # --- reading

    def read(self, offset: int, limit: int = 500) -> tuple[list[Record], int]:
        """Up to `limit` complete records from byte `offset`, and the byte after them.

        A line that is not a record (left by a killed writer) is skipped with a warning.
        """
        records: list[Record] = []
        if not self.file.exists():
            return records, offset
        with open(self.file, "rb") as stream:
            stream.seek(offset)
            while len(records) < limit and (line := stream.readline()).endswith(b"\n"):
                offset += len(line)
                try:
                    record = json.loads(line)
                    if record["kind"] and record["t"]:
                        records.append(record)
                except (ValueError, KeyError, TypeError):
                    if line.strip():
                        log.warning("%s: an incomplete line before byte %d", self.file, offset)
        return records, offset

    @property
    def open(self) -> bool:
        """Whether the run was started and has not ended: it is running or was interrupted."""
        kinds = [r["kind"] for r in self._records() if r["kind"] in {"begin", "end"}]
        return kinds[-1:] == ["begin"]

    def _records(self) -> Iterator[Record]:
        offset = 0
        while True:
            records, offset = self.read(offset)
            if not records:
                return
            yield from records

    def _logged_params(self) -> dict[str, str]:
        params: dict[str, str] = {}
        for record in self._records():
            if record["kind"] == "params":
                params = {**record["values"], **params}
        return params


def flatten(values: Mapping[str, Any], prefix: str = "", separator: str = ".") -> dict[str, Any]:
    """Nested mappings as one level of keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{name}{separator}", separator))
        else:
            flat[name] = value
    return flat


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return not isinstance(value, str | bytes)
