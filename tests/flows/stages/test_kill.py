"""`kill -9` of trainers, the flow, everything, at seeded moments: the next run repairs it."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from flows.registry.registry import Registry
from flows.release.audit import history
from flows.tracking.run import unsent_journals
from rfdetr.files import sha256_file
from tests.flows.mlflow_fixtures import runs
from tests.flows.prefect_fixtures import PrefectServer, Retrained, Webhook, make_retrainable
from tests.flows.projects import run, set_params

EPOCHS = 3
# Marks in the run's output after which a seeded delay begins, and who is killed then.
MOMENTS = [
    ("> python -m flows.stages.demo", "everything"),
    ("> python -m flows.stages.convert", "flow"),
    ("training in", "trainers"),
    ("training in", "flow"),
    ("epoch 1/3", "trainers"),
    ("epoch 1/3", "everything"),
    ("epoch 2/3", "flow"),
    ("epoch 3/3", "everything"),
    ("> python -m flows.stages.evaluate", "everything"),
    ("Finished in state Skipped('no DVC remote", "everything"),
]


def living(project: Retrained) -> dict[int, str]:
    """Processes that work in the project folder, by pid, with their command line."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "cwd").readlink() == project.root:
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
    return found


def kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def strike(project: Retrained, mark: str, whom: str, delay: float) -> None:
    """Start a run, wait for `mark` and `delay` more seconds, and kill."""
    flow = subprocess.Popen(
        [sys.executable, "-u", "-m", "flows.cli.main", "retrain"],
        cwd=project.root,
        env=project.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert flow.stdout is not None
    seen = any(mark in line for line in flow.stdout)
    assert seen, f"the run ended before {mark!r}"
    time.sleep(delay)
    processes = living(project)
    chosen = {
        "trainers": [
            pid for pid, command in processes.items() if "flows.fit_job.worker" in command
        ],
        "flow": [flow.pid],
        "everything": [flow.pid, *processes],
    }[whom]
    kill(chosen)
    flow.communicate()
    end = time.monotonic() + 90
    while living(project) and time.monotonic() < end:
        time.sleep(0.2)
    assert living(project) == {}, "orphans"


def check_repaired(project: Retrained) -> None:
    """One more run, and the result is that of a run without any fault."""
    project.pipeline("retrain")
    root = project.root
    card = json.loads((root / "models/trained/model.json").read_text())
    assert card["weights_sha256"] == sha256_file(root / "models/trained/model.pth")
    assert json.loads((root / "metrics/fit.json").read_text())["epochs"] == EPOCHS
    rows = csv.DictReader((root / "plots/fit.csv").read_text().splitlines())
    assert [int(row["epoch"]) for row in rows] == list(range(1, EPOCHS + 1))
    (record,) = runs(project.uri)
    assert record.info.status == "FINISHED"
    assert record.info.run_id == card["mlflow_run_id"] or card["mlflow_run_id"] is None
    registry = Registry("tiny", project.uri)
    assert [version.number for version in registry.versions()] == [1]
    assert registry.aliases() == {"champion": 1}
    assert len(history(registry)) == 1
    assert unsent_journals(root.parent / "state") == []
    assert run(root, "dvc", "status").stdout.strip().endswith("up to date.")
    places = (root / "models", root / "reports", root / "metrics", root.parent / "state")
    left = [path for place in places for path in place.rglob("*") if ".partial" in path.name]
    left += [path for place in places for path in place.rglob("*.tmp")]
    assert left == []


@pytest.fixture
def fresh(
    prefect_server: PrefectServer, webhook: Webhook, migrated_database: Path, tmp_path: Path
) -> Retrained:
    changes = {"fit": {"epochs": EPOCHS}}
    return make_retrainable(tmp_path, migrated_database, prefect_server, webhook, **changes)


def test_a_killed_flow_is_finished_by_the_next_run(retrained: Retrained, tmp_path: Path) -> None:
    """The quick case: only fit and what follows run; the flow dies inside the second epoch."""
    project = retrained.copy(tmp_path)
    registry = Registry("tiny", project.uri)
    before = len(runs(project.uri))
    set_params(project.root, fit={"epochs": EPOCHS})
    strike(project, "epoch 1/3", "everything", random.Random(7).uniform(0.0, 0.5))
    project.pipeline("retrain", "--set", f"runtime.gpu_slot=gpu-{tmp_path.name}")
    assert json.loads((project.root / "metrics/fit.json").read_text())["epochs"] == EPOCHS
    assert len(runs(project.uri)) == before + 1
    assert [version.number for version in registry.versions()] == [1, 2]
    assert run(project.root, "dvc", "status").stdout.strip().endswith("up to date.")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(MOMENTS)))
def test_the_next_run_repairs_every_kill(fresh: Retrained, number: int) -> None:
    mark, whom = MOMENTS[number]
    delay = random.Random(number).uniform(0.0, 3.0)
    strike(fresh, mark, whom, delay)
    check_repaired(fresh)


@pytest.mark.slow
def test_three_kills_in_one_run_are_repaired(fresh: Retrained) -> None:
    for seed, number in enumerate((4, 6, 7)):  # each mark is a later epoch than the one before
        mark, whom = MOMENTS[number]
        strike(fresh, mark, whom, random.Random(100 + seed).uniform(0.0, 1.0))
    check_repaired(fresh)
