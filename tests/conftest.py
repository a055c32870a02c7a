"""Settings that hold for every test: no phoning home, no pickle, no user caches."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Groups of `--dist loadgroup`: each file, and together all that share a Prefect server.

    The project that was retrained once through that server is the most expensive fixture of all.
    """
    default = [item for item in items if not item.get_closest_marker("slow")]
    sharing = {i.path for i in default if "prefect_server" in getattr(i, "fixturenames", ())}
    for item in items:
        file = item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group("prefect" if item.path in sharing else file))


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
