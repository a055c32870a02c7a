"""One Project per process; nothing below the command line reads the environment."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.config.environment import Environment
from flows.project.project import Project
from rfdetr.errors import ConfigError

ROOT = Path(__file__).parents[3]

# Where a process starts: the command line, the flows.
ENTRIES = {"cli", "retrain.py", "rollback.py", "drift_check.py", "batch_predict.py"}
READERS = {
    "config/environment.py": "the settings of the machine are read here",
    "project/project.py": "an entry that gives no environment gets that of the process",
    "fit_job/worker.py": "main of each rank, which torchrun numbers in RANK",
    "core/process.py": "the environment of children",
    "orchestration/temporary_server.py": "the environment of the server",
    "core/child_report.py": "the parent names the report file",
    "fit_job/job.py": "the environment of the trainers",
    "project/dvc.py": "the environment of DVC",
    "project/publish.py": "the environment of git",
    "orchestration/children.py": "the environment of children",
    "orchestration/notify.py": "Prefect calls the hooks of a flow",
    "orchestration/gpus.py": "claims GPUs for children through CUDA_VISIBLE_DEVICES",
    "registry/artifacts.py": "restores what MLflow changes",
    "core/redact.py": "masks the values of secret variables",
    "core/quiet.py": "sets defaults of MLflow",
}


def readers(tree: ast.AST) -> Iterator[int]:
    """Lines that read the environment: os.environ, os.getenv, Environment.read."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            if name in {"os.environ", "os.getenv", "Environment.read"}:
                yield node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (node.lineno for alias in node.names if alias.name in {"environ", "getenv"})


def test_nothing_below_the_command_line_reads_the_environment() -> None:
    wrong = []
    for file in sorted((ROOT / "flows").rglob("*.py")):
        name = file.relative_to(ROOT / "flows").as_posix()
        if name.partition("/")[0] in ENTRIES or name in READERS:
            continue
        lines = list(readers(ast.parse(file.read_text(encoding="utf-8"))))
        wrong += [f"flows/{name}:{line}" for line in lines]
    assert not wrong


@pytest.fixture
def project(tmp_path: Path) -> Project:
    (tmp_path / "params.yaml").write_text("fit: {epochs: 5} # few\n")
    return Project(tmp_path, Environment(state_dir=tmp_path / "state"))


def test_params_are_read_once_and_again_after_an_override(project: Project) -> None:
    assert project.params is project.params
    before = project.params
    project.override({"fit": {"epochs": 7}})
    assert (before.fit.epochs, project.params.fit.epochs) == (5, 7)
    assert "# few" in project.params_file.read_text()
    project.params_file.write_text("fit: {epochs: 9}")
    assert project.params.fit.epochs == 7
    project.reload()
    assert project.params.fit.epochs == 9
    with pytest.raises(ConfigError, match="epochs"):
        project.override({"fit": {"epochs": 0}})
    assert project.params.fit.epochs == 9


def test_the_tracking_server_is_the_environments_or_a_file_of_the_project(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert project.tracking_uri == f"sqlite:///{tmp_path / 'mlflow.db'}"
    server = Environment(state_dir=tmp_path, tracking_uri="http://mlflow")
    assert Project(tmp_path, server).tracking_uri == "http://mlflow"
    monkeypatch.chdir(tmp_path)
    assert Project(env=project.env).tracking_uri == project.tracking_uri


def test_a_folder_that_a_store_address_cannot_name_is_told(tmp_path: Path) -> None:
    state = {"state_dir": tmp_path / "state"}
    with pytest.raises(ConfigError, match="cannot contain a question mark"):
        _ = Project(tmp_path / "what?", Environment(**state)).tracking_uri
    with pytest.raises(ConfigError, match="longer than 500 bytes"):
        _ = Project(tmp_path / "/".join(["long" * 50] * 3), Environment(**state)).tracking_uri
    elsewhere = Environment(**state, tracking_uri="http://127.0.0.1:5000")
    assert Project(tmp_path / "what?", elsewhere).tracking_uri == "http://127.0.0.1:5000"
    odd = tmp_path / "a b#%20ä"
    assert Project(odd, Environment(**state)).tracking_uri == f"sqlite:///{odd / 'mlflow.db'}"
