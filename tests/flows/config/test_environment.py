from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flows.config.environment import Environment, may_name_prefect_server
from rfdetr.errors import ConfigError


@pytest.mark.parametrize(
    ("file", "text", "named"),
    [
        ("home/profiles.toml", 'active = "local"\n', False),
        ("home/profiles.toml", '[profiles.x]\nPREFECT_API_URL = "http://a/api"\n', True),
        (".env", "OTHER=1\n", False),
        (".env", "PREFECT_API_URL=http://a/api\n", True),
        ("prefect.toml", '[api]\nurl = "http://a/api"\n', True),
        ("pyproject.toml", 'dependencies = ["prefect"]\n', False),
        ("pyproject.toml", '[tool.prefect.api]\nurl = "http://a/api"\n', True),
    ],
)
def test_prefect_is_asked_where_its_settings_may_name_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, text: str, named: bool
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / file).write_text(text)
    monkeypatch.chdir(tmp_path)
    env = {"PREFECT_HOME": str(tmp_path / "home")}
    assert may_name_prefect_server(env) is named
    assert may_name_prefect_server({**env, "PREFECT_API_URL": "http://a/api"})
    assert may_name_prefect_server({**env, "PREFECT_PROFILE": "local"})


def test_commands_on_the_registry_import_neither_prefect_nor_torch(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
import flows.cli.commands, flows.cli.doctor, flows.release.model_card, flows.release.repair
import flows.release.steps
from flows.orchestration.limits import slot
with slot("registry-x", 1, Path("state")):
    pass
print([name for name in ("prefect", "torch", "mlflow") if name in sys.modules])
"""
    env = {"PATH": "", "PYTHONPATH": ":".join(sys.path), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.mark.parametrize(
    "address",
    ["garbage", "./mlruns", "::::", "http://", "http://[::1", "http://h:99999", "file:///x"],
)
def test_what_cannot_be_a_tracking_server_is_refused_by_name(address: str) -> None:
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI is"):
        Environment.read({"HOME": "/", "MLFLOW_TRACKING_URI": address})


@pytest.mark.parametrize(
    "address", ["http://[::1]:5000", "https://user:x@h/mlflow", "sqlite:///a b.db", "databricks"]
)
def test_addresses_of_tracking_servers_are_read(address: str) -> None:
    assert Environment.read({"HOME": "/", "MLFLOW_TRACKING_URI": address}).tracking_uri == address
    assert Environment.read({"HOME": "/", "MLFLOW_TRACKING_URI": " "}).tracking_uri is None
