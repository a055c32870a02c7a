"""One finished run that many tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.datasets import make_roboflow
from tests.flows.mlflow_fixtures import migrated_database, tracking_uri  # noqa: F401
from tests.unit.training.helpers import Run, tiny_model, tiny_run


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Roboflow COCO export with train, valid and test."""
    return make_roboflow(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="session")
def finished(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two epochs of the tiny detector with the default callbacks and loggers."""
    config = tiny_run(shapes, tmp_path_factory.mktemp("finished"), tensorboard=True)
    return Run(tiny_model(), config).fit()
