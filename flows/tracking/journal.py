"""What a run has to say, on disk first: an append-only file that MLflow receives when it can.

Appending never raises and never waits for a server. Secrets are masked before they touch the disk.
`flows.tracking.delivery` sends the records; the file stays complete, so that another server, or the same
one after losing its database, can be given everything again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from flows.core.redact import redact, redact_mapping
from rfdetr.errors import ConfigError
from rfdetr.files import remove_leftovers, write_text_atomic

log = logging.getLogger(__name__)
JOURNAL, STATE = "journal.jsonl", "journal.json"
LONGEST_WRITE_S = 10.0  # of the state, which is a few hundred bytes
Status = Literal["FINISHED", "FAILED", "KILLED"]
Record = dict[str, Any]


class RunSpec(BaseModel):
    """The MLflow run of a journal. `parent` is the journal folder of the run above it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    experiment: str
    name: str
    tags: dict[str, str] = {}
    parent: Path | None = None


class JournalState(BaseModel):
    """`journal.json`: which run the journal belongs to and how much of it has arrived.

    `key` is a tag of the run, by which it is found again when its id was never written down.
    """

    spec: RunSpec
    key: str
    uri: str | None = None
    run_id: str | None = None
    offset: int = 0


class Journal:
    """The journal in `folder`, begun with `spec` or continued. Safe for threads and processes."""

    def __init__(self, folder: str | os.PathLike[str], spec: RunSpec | None = None) -> None:
        self.folder = Path(folder).absolute()
        self.file = self.folder / JOURNAL
        self._lock = threading.Lock()
        self._warned = False
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder, STATE, idle_s=LONGEST_WRITE_S)
        state = self._read_state()
        if state is None:
            if spec is None:
                raise ConfigError(f"{self.folder} holds no journal; start one with a RunSpec.")
            spec = spec.model_copy(update={"tags": redact_mapping(spec.tags)})
            self.save(JournalState(spec=spec, key=uuid.uuid4().hex))
        self._params = self._logged_params()

    # --- the state beside the journal

    def _read_state(self) -> JournalState | None:
        path = self.folder / STATE
        try:
            return JournalState.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (ValidationError, UnicodeDecodeError) as error:
            log.warning("%s is unreadable (%s); the run is begun anew", path, error)
            return None

    @property
    def state(self) -> JournalState:
        """The state as it is on disk now. Raises ConfigError when it is gone."""
        state = self._read_state()
        if state is None:
            raise ConfigError(f"{self.folder / STATE} is missing; the journal cannot be sent.")
        return state

    def save(self, state: JournalState) -> None:
        """Write the state in one step."""
        write_text_atomic(self.folder / STATE, state.model_dump_json(indent=2) + "\n")

    @property
    def run_id(self) -> str | None:
        """The MLflow run, None as long as no server was reached."""
        return self.state.run_id

    @property
    def unsent(self) -> int:
        """Bytes that have not arrived."""
        size = self.file.stat().st_size if self.file.exists() else 0
        return max(0, size - self.state.offset)

    @contextlib.contextmanager
    def sending(self) -> Iterator[None]:
        """Only one process or thread sends at a time; the others wait."""
        with open(self.folder / ".journal.lock", "a", encoding="utf-8") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    # --- writing

    def append(self, kind: str, **fields: Any) -> None:
        """Add one record. A full disk is a warning, not the end of a training."""
        record = {"t": time.time_ns() // 1_000_000, "kind": kind, **fields}
        line = json.dumps(record, separators=(",", ":"), default=str).encode() + b"\n"
        try:
            with self._lock:
                handle = os.open(self.file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
                try:
                    end = os.fstat(handle).st_size
                    torn = end and os.pread(handle, 1, end - 1) != b"\n"  # a killed writer's rest
                    data = b"\n" + line if torn else line
                    while data:
                        data = data[os.write(handle, data) :]
                finally:
                    os.close(handle)
        except OSError as error:
            if not self._warned:
                log.warning("cannot write %s (%s); tracking records are lost", self.file, error)
            self._warned = True

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Numbers at a step; what is no number is left out."""
        values = {key: float(value) for key, value in metrics.items() if _is_number(value)}
        if values:
            self.append("metrics", step=step or 0, values=values)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Parameters, flat and as text. They cannot change: a new value becomes a tag."""
        flat = flatten(redact_mapping(params))
        new = {key: value for key, value in flat.items() if key not in self._params}
        changed = {k: v for k, v in flat.items() if k in self._params and v != self._params[k]}
        self._params.update(new)
        if new:
            self.append("params", values=new)
        if changed:
            self.set_tags({f"changed.{key}": value for key, value in changed.items()})

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Tags as text; a later value replaces an earlier one."""
        self.append("tags", values={k: str(v) for k, v in redact_mapping(tags).items()})

    def log_artifact(self, path: str | os.PathLike[str], to: str | None = None) -> None:
        """A file or folder, copied now, so that later changes of it do not matter."""
        source = Path(path)
        if source.is_dir():
            for child in sorted(source.rglob("*")):
                if child.is_file():
                    inner = (Path(to or "") / source.name / child.relative_to(source)).parent
                    self.log_artifact(child, inner.as_posix())
            return
        place = Path("outbox") / uuid.uuid4().hex[:12] / source.name
        try:
            (self.folder / place).parent.mkdir(parents=True)
            _copy_masked(source, self.folder / place)
        except OSError as error:
            log.warning("artifact %s is not logged: %s", source, error)
            return
        self.append("artifact", file=place.as_posix(), to=to)

    def log_text(self, text: str, name: str) -> None:
        """A text as the artifact `name` (a path with forward slashes)."""
        place = Path("outbox") / uuid.uuid4().hex[:12] / Path(name).name
        try:
            write_text_atomic(self.folder / place, redact(text))
        except OSError as error:
            log.warning("artifact %s is not logged: %s", name, error)
            return
        parent = Path(name).parent.as_posix()
        self.append("artifact", file=place.as_posix(), to=None if parent == "." else parent)

    def log_dataset(self, name: str, digest: str, source: str, context: str = "training") -> None:
        """The data of the run: its name, content hash and where it lies."""
        fields = {"name": name, "digest": digest, "source": redact(source), "context": context}
        self.append("dataset", **fields)

    def begin(self) -> None:
        """The run is at work (again)."""
        self.append("begin")

    def end(self, status: Status) -> None:
        """The run is over."""
        self.append("end", status=status)

    # --- reading

    def read(self, offset: int, limit: int = 500) -> tuple[list[Record], int]:
        """Up to `limit` complete records from byte `offset`, and the byte after them.

        A line that is no record (the rest of a killed writer) is passed over with a warning.
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
        """Whether the run was begun and not ended: it is at work, or was cut off."""
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


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as one level of dotted keys with text values."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = str(value)
    return flat


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return not isinstance(value, str | bytes)


def _copy_masked(source: Path, target: Path) -> None:
    """Copy a file; secrets in text are masked, other files stay byte for byte."""
    with open(source, "rb") as stream:
        is_text = b"\0" not in stream.read(8192)
    if is_text:
        with contextlib.suppress(UnicodeDecodeError):
            text = source.read_bytes().decode("utf-8")
            target.write_bytes(redact(text).encode())
            return
    shutil.copyfile(source, target)
