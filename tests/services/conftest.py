"""One local stack for all tests of this folder.

RFDETR_TEST_STACK=FOLDER keeps it running there for the next `pytest`, which then starts at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.services.deployed import bring_up, take_down
from tests.services.live import LiveStack


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveStack]:
    """Servers, a worker, and the project deployed."""
    kept = os.environ.get("RFDETR_TEST_STACK")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("services")
    stack = LiveStack(folder / "stack", folder / "project")
    try:
        if not (stack.folder / "ready").exists():
            bring_up(folder)
        yield stack
    finally:
        if not kept:
            take_down(stack)
