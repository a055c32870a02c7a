"""What doctor says about a machine before a run fails on it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from flows.cli import machine
from flows.cli.machine import machine_notes, machine_problems, project_problems
from flows.config.environment import Environment, bypass_proxies
from flows.project.dvc import configure_dvc, knows_git
from flows.project.project import Project
from rfdetr.errors import ConfigError
from tests.flows.projects import ROOT


@pytest.fixture
def project(tmp_path: Path) -> Project:
    root = tmp_path / "project"
    (root / ".dvc").mkdir(parents=True)
    (root / ".dvc/config").write_text((ROOT / ".dvc/config").read_text())
    return Project(root, Environment.read({"RFDETR_STATE_DIR": str(tmp_path / "state")}))


def test_an_ordinary_machine_has_no_problems(project: Project) -> None:
    assert list(machine_problems(project)) == []


def test_files_and_folders_in_each_others_place_are_named(project: Project) -> None:
    for name in ("params.yaml", "dvc.yaml"):
        (project.root / name).write_text((ROOT / name).read_text())
    assert list(project_problems(project)) == []
    (project.root / "models").write_text("")
    (project.root / "mlflow.db").mkdir()
    (project.root / "dvc.lock").write_text("- 1\n")
    texts = " ".join(project_problems(project))
    for told in ("models is not a folder", "mlflow.db is not a file", "dvc.lock is damaged"):
        assert told in texts


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    env = Environment.read({"RFDETR_STATE_DIR": str(tmp_path / "file/state")})
    (found,) = machine_problems(Project(tmp_path, env))
    assert found.startswith(f"{tmp_path}/file/state cannot be written (Not a directory)")
    assert "set RFDETR_STATE_DIR" in found


def test_a_full_disk_is_named(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "FREE_BYTES", 1 << 60)
    found = list(machine_problems(project))
    assert len(found) == 3
    assert all("MiB free" in text for text in found)


def test_the_checkout_of_another_user_is_named(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["git", "init", "-q", str(project.root)], check=True)
    assert list(machine_problems(project)) == []
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    (found,) = machine_problems(project)
    assert f"git config --global --add safe.directory {project.root}" in found


def test_an_address_without_a_scheme_is_named(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9000")
    assert list(machine_problems(project)) == [
        "AWS_ENDPOINT_URL must start with http:// or https://"
    ]


def test_a_name_that_no_resolver_knows_is_a_note(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    (note,) = machine_notes(project)
    assert "no-such-host.invalid" in note


def test_what_a_killed_import_left_is_a_note(project: Project) -> None:
    left = project.root / "data/.trees.0123456789ab.partial"
    left.mkdir(parents=True)
    (note,) = (note for note in machine_notes(project) if "killed import" in note)
    assert str(left) in note and left.is_dir()


def test_local_servers_are_reached_without_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "internal.example.com")
    monkeypatch.delenv("http_proxy", raising=False)
    bypass_proxies()
    assert os.environ["NO_PROXY"] == "internal.example.com"
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    bypass_proxies()
    bypass_proxies()
    assert os.environ["NO_PROXY"] == "internal.example.com,127.0.0.1,localhost,::1"
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"]


def test_a_user_without_a_home_folder_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(ConfigError, match="Set RFDETR_STATE_DIR"):
        Environment.read({})
    assert Environment.read({"RFDETR_STATE_DIR": "/x"}).state_dir == Path("/x")


def test_dvc_learns_that_git_has_come(project: Project) -> None:
    configure_dvc(project.root, project.env)
    assert "no_scm = True" in (project.root / ".dvc/config.local").read_text()
    assert knows_git(project.root)
    subprocess.run(["git", "init", "-q", str(project.root)], check=True)
    assert not knows_git(project.root)
    configure_dvc(project.root, project.env)
    assert "no_scm" not in (project.root / ".dvc/config.local").read_text()
    assert knows_git(project.root)


def test_a_name_that_the_terminal_cannot_show_is_escaped(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files/a.txt").write_text("a")
    out = os.fsencode(tmp_path) + "/pä-".encode() + b"\xff"
    command = [sys.executable, "-m", "flows.cli.main", "pack", tmp_path / "files", out]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("p\\xe4-\\udcff\n")
