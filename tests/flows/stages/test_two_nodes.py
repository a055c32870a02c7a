"""`fit` over two nodes: torchrun's c10d rendezvous between two loopback addresses, shared state."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from rfdetr.progress import EpochProgress
from tests.flows.projects import ROOT, environment, make_project, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
EPOCHS = 6
JOB_FILE = ROOT / "infra/kubernetes/multi-node-job.yaml"


def launch(node: Path, index: int) -> subprocess.Popen[str]:
    """What a pod of the shipped job runs: the command of the manifest, with its index."""
    job = next(d for d in yaml.safe_load_all(JOB_FILE.read_text()) if d["kind"] == "Job")
    container = job["spec"]["template"]["spec"]["containers"][0]
    with open(node.parent / f"node{index}.log", "a") as log:
        return subprocess.Popen(
            [*container["command"], *container["args"]],
            cwd=node,
            env=environment(node, JOB_COMPLETION_INDEX=str(index)),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )


def epochs_told(log: Path) -> list[int]:
    return [p.epoch for p in map(EpochProgress.parse, log.read_text().splitlines()) if p]


def finished_epochs(folder: Path) -> int:
    files = list((folder / "state/fit").glob("*/run.json"))
    return json.loads(files[0].read_text())["finished_epochs"] if files else 0


@pytest.fixture
def nodes(tmp_path: Path) -> tuple[Path, Path]:
    """Two checkouts with the same data, ready to train, on one state folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.2", 0))
        endpoint = f"127.0.0.2:{probe.getsockname()[1]}"
    first = make_project(
        tmp_path / "first",
        fit={"epochs": EPOCHS},
        runtime={"nodes": 2, "rendezvous": endpoint},
    )
    run(first, "dvc", "config", "--local", "core.no_scm", "true")
    run(first, "dvc", "repro", "convert", "validate")
    second = tmp_path / "second"
    shutil.copytree(first, second, symlinks=True)
    return first, second


def test_a_lost_node_ends_the_other_and_both_resume_together(nodes: tuple[Path, Path]) -> None:
    first, second = nodes
    pair = [launch(first, 0), launch(second, 1)]
    try:
        until = time.monotonic() + 400
        while finished_epochs(first.parent) < 2:
            assert time.monotonic() < until, (first.parent / "node0.log").read_text()
            assert pair[0].poll() is None, (first.parent / "node0.log").read_text()
            time.sleep(0.2)
        family = [psutil.Process(pair[1].pid)]
        family += family[0].children(recursive=True)
        for process in family:
            process.kill()
        assert pair[0].wait(120) != 0
        assert not (first / "models/trained/model.json").exists()
        reached = finished_epochs(first.parent)
        assert 2 <= reached < EPOCHS

        # The node that joins comes first, and finds what a killed attempt leaves: an open job.
        for file in (first.parent / "state/fit").glob("*/error.json"):
            file.unlink()
        joining = launch(second, 1)
        time.sleep(30)
        below = psutil.Process(joining.pid).children(recursive=True)
        assert not [p for p in below if "flows.fit_job.launcher" in p.cmdline()]
        pair = [launch(first, 0), joining]
        assert [node.wait(400) for node in pair] == [0, 0], (
            first.parent / "node0.log"
        ).read_text()[-3000:]
    finally:
        for node in pair:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)
                node.wait()
    card = json.loads((first / "models/trained/model.json").read_text())
    assert card["epochs"] == EPOCHS
    states = list((first.parent / "state/fit").glob("*/run.json"))
    assert len(states) == 1, "both nodes and both attempts are one training"
    told = [epochs_told(first.parent / f"node{index}.log") for index in (0, 1)]
    assert sorted(set(told[0])) == list(range(1, EPOCHS + 1))
    assert len(told[0]) <= EPOCHS + 1, f"finished epochs were trained again: {told[0]}"
    assert told[1][-1] == EPOCHS, "each node reports the progress"


def test_a_node_that_comes_after_the_end_has_nothing_to_do(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project", fit={"epochs": 1})
    run(project, "dvc", "config", "--local", "core.no_scm", "true")
    run(project, "dvc", "repro", "fit")
    done = run(project, sys.executable, "-m", "flows.stages.fit", "--join")
    assert "nothing to join" in done.stdout
