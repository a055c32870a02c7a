"""Tracking that never stops a training: the bookkeeping of one MLflow run over its journal.

`python -m flows.tracking.run sync` sends what could not be sent.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from flows.config.environment import Environment
from flows.core.redact import redact
from flows.tracking.delivery import Sender, deliver
from flows.tracking.journal import JOURNAL, Journal, RunSpec, Status
from flows.tracking.provenance import Provenance, collect_provenance, command_line
from flows.tracking.system_metrics import SystemSampler
from rfdetr.errors import ConfigError

log = logging.getLogger(__name__)
CLOSE_SECONDS = 10.0


class TrackedRun:
    """One MLflow run with its journal in `folder`; continued when the journal exists.

    As a context manager it closes the run: FINISHED, FAILED on an Exception, KILLED on any other
    BaseException (interrupt, cancellation). With `uri` None everything stays in the journal.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        spec: RunSpec | None = None,
        *,
        uri: str | None = None,
        system_metrics_every: float | None = None,
    ) -> None:
        self.journal = Journal(folder, spec)
        self.uri = uri
        self._sender = Sender(self.journal, uri) if uri else None
        self._sampler = (
            SystemSampler(self.journal, system_metrics_every) if system_metrics_every else None
        )
        self._started = time.monotonic()

    @property
    def run_id(self) -> str | None:
        """The MLflow run, None until a server was reached."""
        return self.journal.run_id

    def begin(self) -> None:
        """Mark the run as running and start sending."""
        self._started = time.monotonic()
        self.journal.begin()
        if self._sampler:
            self._sampler.start()
        if self._sender:
            self._sender.start()

    def close(self, status: Status = "FINISHED", timeout: float = CLOSE_SECONDS) -> bool:
        """End the run and wait at most `timeout` seconds; whether everything has arrived."""
        if self._sampler:
            self._sampler.stop()
        self.journal.end(status)
        return self._sender.close(timeout) if self._sender else True

    def log_provenance(self, root: str | os.PathLike[str] = ".") -> Provenance:
        """Environment, hardware, git commit with the uncommitted difference, dvc.lock."""
        found = collect_provenance(root)
        self.journal.set_tags({**found.tags(), "pipeline.command": command_line()})
        self.journal.log_text(
            found.model_dump_json(indent=2, exclude={"git_diff"}), "environment.json"
        )
        if found.git_diff:
            self.journal.log_text(found.git_diff, "git.diff")
        return found

    def log_cost(self, seconds: float, price_per_hour: float | None, devices: int = 1) -> None:
        """Duration, and cost when the price of one device per hour is known."""
        values = {"duration_seconds": seconds}
        if price_per_hour is not None:
            values["cost"] = seconds / 3600 * price_per_hour * devices
        self.journal.log_metrics(values)

    def __enter__(self) -> Self:
        self.begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self.journal.set_tags({"pipeline.error": redact(f"{kind and kind.__name__}: {error}")})
        failed: Status = "FAILED" if isinstance(error, Exception) else "KILLED"
        self.close("FINISHED" if error is None else failed)


def close_run(folder: str | os.PathLike[str], status: Status, uri: str | None) -> bool:
    """Close the run of a journal whose process is gone (crash hooks); whether it has arrived."""
    run = TrackedRun(folder, uri=uri)
    if run._sender:
        run._sender.start()
    return run.close(status)


def unsent_journals(state_dir: str | os.PathLike[str]) -> list[Journal]:
    """Journals below `state_dir` that hold records MLflow does not have."""
    found = []
    for file in sorted(Path(state_dir).rglob(JOURNAL)):
        try:
            journal = Journal(file.parent)
            if journal.unsent:
                found.append(journal)
        except (ConfigError, OSError) as error:
            log.warning("%s cannot be sent: %s", file, error)
    return found


def sync(state_dir: str | os.PathLike[str], uri: str) -> dict[Path, str | None]:
    """Send every unsent journal below `state_dir`; folder -> None, or why it could not be sent."""
    results: dict[Path, str | None] = {}
    for journal in unsent_journals(state_dir):
        try:
            deliver(journal, uri)
            results[journal.folder] = None
        except Exception as error:  # noqa: BLE001 - the other journals are still sent
            results[journal.folder] = redact(f"{type(error).__name__}: {error}")
    return results


def _default_uri() -> str:
    return Environment.read().tracking_uri or f"sqlite:///{Path('mlflow.db').absolute()}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of `python -m flows.tracking.run`; status 1 when something is still unsent."""
    parser = argparse.ArgumentParser(prog="python -m flows.tracking.run", description=__doc__)
    command = parser.add_subparsers(required=True).add_parser("sync", help="send unsent journals")
    command.add_argument("--uri", default=_default_uri(), help="MLflow tracking URI")
    command.add_argument("--state-dir", type=Path, default=Environment.read().state_dir)
    options = parser.parse_args(arguments)
    results = sync(options.state_dir, options.uri)
    lines = [f"{folder}: {problem or 'sent'}" for folder, problem in results.items()]
    sys.stdout.write("\n".join(lines or [f"{options.state_dir}: nothing to send"]) + "\n")
    return int(any(results.values()))


if __name__ == "__main__":
    sys.exit(main())
