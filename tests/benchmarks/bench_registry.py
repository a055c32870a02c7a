"""Times `plan`, `history`, `promote`, `rollback` and `doctor` with 1,200 versions and 10,000 runs.

`python -m tests.benchmarks.bench_registry PROJECT` copies PROJECT, a project folder in which
`rfdetr-pipeline retrain` ran with the SQLite store, and the rows of its model and run in mlflow.db.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LEFT = (".venv", "__pycache__", ".ruff_cache", ".mypy_cache", ".pytest_cache")
COMMANDS = (
    ("plan",),
    ("history",),
    ("promote", "7", "--reason", "a refused version"),
    ("rollback", "--reason", "nothing to go back to"),
    ("doctor",),
)


def multiply(database: Path, versions: int, runs: int) -> None:
    """Copy version 1 and its run, with tags and metrics; the copies were refused by the gate."""
    with sqlite3.connect(database) as store:
        (run,) = store.execute("SELECT run_id FROM model_versions WHERE version = 1").fetchone()
        for table, owner in (("runs", "run_uuid"), ("tags", "run_uuid"), ("params", "run_uuid")):
            _copies(store, table, owner, run, [f"{n:032d}" for n in range(runs)])
        _copies(store, "latest_metrics", "run_uuid", run, [f"{n:032d}" for n in range(runs)])
        numbers = [str(n) for n in range(2, versions + 1)]
        for table in ("model_versions", "model_version_tags"):
            _copies(store, table, "version", "1", numbers)
        store.execute("UPDATE model_versions SET source = source || version WHERE version > 1")
        store.execute(
            "UPDATE model_version_tags SET value = 'refuse' "
            "WHERE key = 'gate.outcome' AND version > 1"
        )
        store.execute(
            "DELETE FROM model_version_tags WHERE version > 1 AND (key LIKE 'audit.%' "
            "OR key LIKE 'promotion.%')"
        )
        store.execute(
            "UPDATE model_version_tags SET value = value || version "
            "WHERE key IN ('weights.sha256', 'lineage.dataset_version') AND version > 1"
        )


def _copies(
    store: sqlite3.Connection, table: str, column: str, owner: str, owners: list[str]
) -> None:
    """Copy the rows of `owner` for each of `owners`."""
    found = store.execute(f"SELECT * FROM {table} WHERE {column} = ?", (owner,))
    names = [description[0] for description in found.description]
    place = names.index(column)
    rows = found.fetchall()
    store.executemany(
        f"INSERT INTO {table} VALUES ({', '.join('?' * len(names))})",
        ((*row[:place], new, *row[place + 1 :]) for new in owners for row in rows),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("project", type=Path)
    parser.add_argument("--versions", type=int, default=1200)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=2, help="the first fills caches")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-registry-") as temporary:
        copy = Path(temporary) / "project"
        ignored = shutil.ignore_patterns(*LEFT)
        shutil.copytree(options.project, copy, symlinks=True, ignore=ignored)
        multiply(copy / "mlflow.db", options.versions, options.runs)
        here = str(Path(__file__).parents[2])  # -P: this code, not the project's own copy
        env = {**os.environ, "RFDETR_STATE_DIR": str(Path(temporary) / "state"), "PYTHONPATH": here}
        for command in COMMANDS * options.repeats:
            started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
            done = subprocess.run(
                [sys.executable, "-P", "-m", "flows.cli.main", *command],
                cwd=copy, env=env, capture_output=True, text=True,
            )  # fmt: skip
            seconds = time.monotonic() - started
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            last = (done.stdout + done.stderr).strip().splitlines()[-1:]
            print(
                f"{command[0]:10}{seconds:6.1f} s, processor {busy:4.1f} s  "
                f"status {done.returncode}  {last}",
                flush=True,
            )


if __name__ == "__main__":
    main()
