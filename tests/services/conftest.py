"""One local stack for all tests of a process.

RFDETR_TEST_STACK=FOLDER keeps it running there for the next `pytest`, which then starts at once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from tests.services.deployed import bring_up, take_down
from tests.services.fitting import Fitting
from tests.services.live import LiveStack

SEEDS = count(int(time.time()))  # a new seed is a new training


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveStack]:
    """Servers, a worker, and the project deployed."""
    kept = os.environ.get("RFDETR_TEST_STACK")
    own = os.environ.get("PYTEST_XDIST_WORKER", "")  # each pytest process has its own stack
    folder = Path(kept) / own if kept else tmp_path_factory.mktemp("services")
    stack = LiveStack(folder / "stack", folder / "project")
    try:
        if not (stack.folder / "ready").exists():
            bring_up(folder)
        yield stack
    finally:
        if not kept:
            take_down(stack)


@pytest.fixture
def begin(live: LiveStack) -> Iterator[Callable[..., Fitting]]:
    """Start a flow run with a new training and wait for its first epoch."""
    started: list[str] = []

    def start(epochs: int, **params: bool) -> Fitting:
        known = set(live.trainings())
        run = live.start(overrides={"fit": {"epochs": epochs, "seed": next(SEEDS)}}, **params)
        started.append(run)
        return Fitting(live, run, live.wait_training(known), epochs)

    yield start
    for run in live.runs():
        if run["state_type"] in {"RUNNING", "PENDING", "SCHEDULED", "PAUSED"}:
            body = {"state": {"type": "CANCELLING"}, "force": True}
            live.api("POST", f"/flow_runs/{run['id']}/set_state", body)
    for run in live.runs():
        live.wait_final(run["id"])
