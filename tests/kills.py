"""Kills `rfdetr-pipeline retrain` at random moments, starts it again, and checks what is left.

    python -m tests.kills --count 50 --seed 0

Each row: a new copy of a tiny project, in a folder of its own and with Prefect's temporary server,
is killed once (SIGKILL, SIGTERM or SIGINT; the command, its process group, or everything that runs)
after a random time, and then runs to its end. The reference is a run without a kill. Every number
depends on the seed, the row and the duration of the reference, so `--first 20 --count 5` repeats
five rows. Ends with status 1 if a row is not clean. `--keep` leaves the folders of those rows.

A row takes more than a minute. With `--rows FILE --minutes 8`, the command adds rows to the file
until the time is over, and the next one continues there.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dvc.repo import Repo
from mlflow import MlflowClient

from flows.cli.doctor import examine
from flows.config.environment import Environment
from flows.project.project import Project
from flows.registry.registry import Registry
from tests.flows.commands import Command
from tests.flows.mlflow_fixtures import runs
from tests.flows.projects import environment, make_project, run

EPOCHS = 4
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
VICTIMS = ("command", "group", "everything")


@dataclass
class Row:
    """One kill: what was planned, and what was wrong after the restart."""

    number: int
    signal: signal.Signals
    victim: str
    after: float
    reached: str = ""
    status: int = 0
    seconds: float = 0.0  # from the signal to the end of the last process
    faults: tuple[str, ...] = ()

    def cells(self) -> str:
        verdict = "; ".join(self.faults) or "clean"
        return (
            f"{self.number:>3}  {self.signal.name:8}{self.victim:11}{self.after:>6.1f}  "
            f"{self.reached:10}{self.status:>6}{self.seconds:>7.1f}  {verdict}"
        )


def plan(seed: int, number: int, duration: float) -> Row:
    """The kill of a row; the moment lies anywhere in a run of `duration` seconds."""
    chance = random.Random(f"{seed}-{number}")
    moment = chance.uniform(0.02, 0.98) * duration
    return Row(number, chance.choice(SIGNALS), chance.choice(VICTIMS), moment)


def retrain(root: Path) -> Command:
    """The command; all rows share the folder of Prefect's temporary server, as for one user."""
    known = environment(root, PREFECT_HOME=str(root.parents[1] / "prefect"))
    known.pop("PREFECT_API_URL", None)
    return Command(root, known, "retrain")


def strike(root: Path, row: Row) -> None:
    """Start a run and kill it; `reached` says how far it came."""
    command = retrain(root)
    end = time.monotonic() + row.after
    while time.monotonic() < end and command.status is None:
        command.read()
    row.reached = last_mark(command.text)
    victims = [command.pid]
    if row.victim == "everything":
        victims += [process.pid for process in command.below()]
    started = time.monotonic()
    for pid in victims if command.status is None else ():
        try:
            (os.killpg if row.victim == "group" else os.kill)(pid, row.signal)
        except ProcessLookupError:
            continue
    row.status = command.end()
    left = command.left(seconds=75)
    row.seconds = time.monotonic() - started
    row.faults += tuple(f"left running: {line[:60]}" for line in left)


def last_mark(text: str) -> str:
    """The last stage or epoch that the output shows."""
    marks = [f"epoch {n}" for n in range(1, EPOCHS + 1)]
    marks += [f"stages.{s}" for s in ("demo", "validate", "convert", "fit", "evaluate")]
    marks += ["registered", "gate:", "is champion"]
    found = [(text.rfind(mark), mark) for mark in marks if mark in text]
    return max(found)[1] if found else "start"


def finish(root: Path) -> list[str]:
    """Run to the end; what is wrong with the outcome."""
    command = retrain(root)
    if command.end(400) != 0:
        return [f"the restart failed: {command.text.strip().splitlines()[-1][:80]}"]
    return [f"left running: {line[:60]}" for line in command.left()]


def numbers(root: Path) -> tuple[float, float]:
    """The best mAP, which a tiny model may not raise above 0, and the last validation loss."""
    card = json.loads((root / "models/trained/model.json").read_text())
    last = list(csv.DictReader((root / "plots/fit.csv").read_text().splitlines()))[-1]
    return float(card["best"]["value"]), float(last["val/loss"])


def faults(root: Path, expected: tuple[float, float]) -> list[str]:
    """What differs from a run without a kill."""
    uri = f"sqlite:///{root / 'mlflow.db'}"
    found = []
    pairs = zip(numbers(root), expected, strict=True)
    if not all(math.isclose(value, wanted, rel_tol=1e-4) for value, wanted in pairs):
        found.append(f"best value and loss {numbers(root)} instead of {expected}")
    tracked = [record.info.status for record in runs(uri)]
    if tracked != ["FINISHED"]:
        found.append(f"MLflow runs: {tracked}")
    registry = Registry("tiny", uri)
    if [version.number for version in registry.versions()] != [1]:
        found.append(f"versions: {[version.number for version in registry.versions()]}")
    if registry.aliases() != {"champion": 1}:
        found.append(f"aliases: {registry.aliases()}")
    client = MlflowClient(tracking_uri=uri)
    models = client.search_logged_models([e.experiment_id for e in client.search_experiments()])
    if len(models) != 1:
        found.append(f"{len(models)} logged models")
    with Repo(str(root)) as repo:
        status = repo.status()
    if status:
        found.append(f"dvc status: {str(status)[:60]}")
    findings = examine(Project(root, Environment.read(environment(root))))
    wrong = [f for f in findings if f.level == "problem" or f.repair]
    return found + [f"doctor: {finding.subject}: {finding.text}" for finding in wrong]


@dataclass
class Known:
    """What is known so far: the run without a kill, and the rows."""

    seed: int
    expected: tuple[float, float]
    duration: float
    rows: list[Row]

    @classmethod
    def read(cls, file: Path) -> Known:
        data = json.loads(file.read_text())
        rows = [
            Row(**{**row, "signal": signal.Signals(row["signal"]), "faults": tuple(row["faults"])})
            for row in data.pop("rows")
        ]
        return cls(**{**data, "expected": tuple(data["expected"])}, rows=rows)

    def add(self, row: Row, file: Path | None) -> None:
        self.rows.append(row)
        if file is not None:
            file.write_text(json.dumps(asdict(self), indent=1))


def reference(template: Path, folder: Path) -> tuple[tuple[float, float], float]:
    """Numbers and duration of a run without a kill."""
    root = copied(template, folder)
    started = time.monotonic()
    wrong = finish(root)
    seconds = time.monotonic() - started
    wrong = wrong or faults(root, numbers(root))
    if wrong:
        raise SystemExit(f"the run without a kill is not clean: {wrong}")
    return numbers(root), seconds


def make_template(folder: Path) -> Path:
    root = make_project(folder / "project", fit={"epochs": EPOCHS})
    run(root, "git", "init", "-q")
    run(root, "git", "config", "user.email", "test@localhost")
    run(root, "git", "config", "user.name", "test")
    run(root, "git", "add", ".")
    run(root, "git", "commit", "-qm", "first")
    MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}").search_experiments()
    return folder


def copied(template: Path, folder: Path) -> Path:
    shutil.copytree(template, folder)
    return folder / "project"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first row")
    parser.add_argument("--minutes", type=float, help="start no row after this time")
    parser.add_argument("--keep", action="store_true", help="keep the folders of faulty rows")
    parser.add_argument("--rows", type=Path, help="file with the rows so far, to which to add")
    options = parser.parse_args(arguments)
    began, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="rfdetr-kills-"))
    template = make_template(folder / "template")
    if options.rows and options.rows.exists():
        known = Known.read(options.rows)
    else:
        known = Known(options.seed, *reference(template, folder / "reference"), rows=[])
    print(f"seed {known.seed}; without a kill: {known.duration:.0f} s, {known.expected}")
    print(" no  signal  victim       after  reached   status  ended  after the restart", flush=True)
    done = {row.number for row in known.rows}
    for number in range(options.first, options.first + options.count):
        if options.minutes and time.monotonic() - began > 60 * options.minutes:
            break
        if number in done:
            continue
        row = plan(known.seed, number, known.duration)
        root = copied(template, folder / str(number))
        strike(root, row)
        row.faults += tuple(finish(root) or faults(root, known.expected))
        known.add(row, options.rows)
        print(row.cells(), flush=True)
        if not (row.faults and options.keep):
            shutil.rmtree(root.parent)
    clean = sum(not row.faults for row in known.rows)
    print(f"{clean} of {len(known.rows)} clean")
    if not options.keep:
        shutil.rmtree(folder)
    return int(clean < len(known.rows))


if __name__ == "__main__":
    sys.exit(main())
