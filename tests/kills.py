"""Kills `rfdetr-pipeline retrain` at random moments, starts it again, and checks what is left.

    python -m tests.kills --count 50 --seed 0

Each row: a new copy of a tiny project, in a folder of its own and with Prefect's temporary server,
is killed once (SIGKILL, SIGTERM or SIGINT; the command, its process group, or everything that runs)
after a random time, and then runs to its end. The reference is a run without a kill. Every number
depends on the seed and the row only, so `--first 20 --count 5` repeats five rows. Ends with status
1 if a row is not clean. `--keep` leaves the folders of those rows.
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
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient

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
    known = environment(root, PREFECT_HOME=str(root.parent / "prefect"))
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
    status = run(root, "dvc", "status", check=False).stdout.strip()
    if not status.endswith("up to date."):
        found.append(f"dvc status: {status[:60]}")
    doctor = run(root, "python", "-m", "flows.cli.main", "doctor", check=False)
    wrong = [line for line in doctor.stdout.splitlines() if line.startswith("problem")]
    wrong += [line for line in doctor.stdout.splitlines() if "--repair" in line or "sync" in line]
    return found + [f"doctor: {line}" for line in wrong]


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
    options = parser.parse_args(arguments)
    began, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="rfdetr-kills-"))
    template = make_template(folder / "template")
    expected, duration = reference(template, folder / "reference")
    print(f"seed {options.seed}; without a kill: {duration:.0f} s, best value and loss {expected}")
    print(" no  signal  victim       after  reached   status  ended  after the restart", flush=True)
    rows = []
    for number in range(options.first, options.first + options.count):
        if options.minutes and time.monotonic() - began > 60 * options.minutes:
            break
        row = plan(options.seed, number, duration)
        root = copied(template, folder / str(number))
        strike(root, row)
        row.faults += tuple(finish(root) or faults(root, expected))
        rows.append(row)
        print(row.cells(), flush=True)
        if not (row.faults and options.keep):
            shutil.rmtree(root.parent)
    clean = sum(not row.faults for row in rows)
    print(f"{clean} of {len(rows)} clean")
    if not options.keep:
        shutil.rmtree(folder)
    return int(clean < len(rows))


if __name__ == "__main__":
    sys.exit(main())
