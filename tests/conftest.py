"""Settings that hold for every test: no phoning home, no pickle, no user caches."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

os.environ.update(
    DO_NOT_TRACK="1",
    DVC_NO_ANALYTICS="true",
    MLFLOW_DISABLE_TELEMETRY="true",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    MLFLOW_ALLOW_PICKLE_DESERIALIZATION="false",
    NO_ALBUMENTATIONS_UPDATE="1",
    # `dvc` and `uvicorn` are found when the environment is not activated, too.
    PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
)
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each of many children would compile again

PARITY = Path(__file__).parent / "parity"


class OnePrefectServer(LoadFileScheduling):
    """`--dist loadfile`, with all files that use the Prefect server on one worker.

    The project that was retrained once through that server is the most expensive fixture of all.
    (`--dist loadgroup` of pytest-xdist 3.8 has no effect under pytest 9.2.)
    """

    def _split_scope(self, nodeid: str) -> str:
        return _server_of(super()._split_scope(nodeid))


@functools.cache
def _server_of(file: str) -> str:
    text = (PARITY.parents[1] / file).read_text(encoding="utf-8")
    return "prefect" if "from tests.flows.prefect_fixtures import" in text else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    return OnePrefectServer(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture(scope="session")
def parity() -> Path:
    """The folder of reference numbers."""
    return PARITY


@pytest.fixture(autouse=True)
def _own_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's caches, state or servers."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("RF_HOME", str(home / "weights"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    monkeypatch.setenv("RFDETR_STATE_DIR", str(home / "state"))
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PL_GLOBAL_SEED"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def exact_float32() -> Iterator[None]:
    """No TF32: a GPU then computes what the CPU computes."""
    import torch

    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    kept = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    yield
    matmul.allow_tf32, cudnn.allow_tf32 = kept
