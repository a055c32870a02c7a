"""A registry that was moved, edited or emptied by hand: every command tells the same story."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest

from flows.cli.main import main
from flows.registry.registry import Registry
from flows.release.audit import history
from rfdetr.tracking.local_store import follow_database
from tests.flows.prefect_fixtures import Retrained
from tests.flows.projects import ROOT


@pytest.fixture
def project(retrained: Retrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Retrained:
    copy = retrained.copy(tmp_path / "moved here")
    for name, value in copy.environment().items():
        if name.startswith(("RFDETR_", "PREFECT_")):
            monkeypatch.setenv(name, value)
    monkeypatch.chdir(copy.root)
    follow_database(copy.uri, copied=True)
    return copy


class Commands:
    def __init__(self, project: Retrained, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self.capsys = project.root, capsys
        self.registry = Registry("tiny", project.uri)
        capsys.readouterr()

    def run(self, *arguments: str) -> tuple[int, str]:
        status = main(arguments)
        done = self.capsys.readouterr()
        assert "Traceback" not in done.out + done.err
        return status, done.out + done.err

    def predict(self) -> tuple[int, str]:
        image = str(ROOT / "docs/detections.png")
        return self.run("predict", image, "--out", str(self.root.parent / "found"), "--no-draw")

    def doctor(self, *options: str) -> str:
        """The findings about the registry and its champion."""
        _, text = self.run("doctor", *options)
        return "\n".join(
            line for line in text.splitlines() if "registry:" in line or "champ" in line
        )

    def plan(self) -> str:
        return self.run("plan")[1].partition("release")[2]

    def assert_well(self) -> None:
        assert "problem" not in self.doctor()
        assert self.plan().split() == ["up", "to", "date"]
        status, text = self.predict()
        assert status == 0, text


@pytest.fixture
def commands(project: Retrained, capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(project, capsys)


def artifacts(commands: Commands) -> Path:
    return commands.root / "mlartifacts"


@pytest.mark.slow
def test_a_copied_project_uses_its_own_artifacts(commands: Commands, retrained: Retrained) -> None:
    commands.assert_well()
    with sqlite3.connect(commands.root / "mlflow.db") as store:
        found = [
            *store.execute("SELECT artifact_location FROM experiments WHERE name LIKE 'rfdetr%'"),
            *store.execute("SELECT artifact_uri FROM runs"),
            *store.execute("SELECT artifact_location FROM logged_models"),
            *store.execute("SELECT storage_location FROM model_versions"),
        ]
    here = artifacts(commands).as_uri()
    assert len(found) >= 4
    assert all(str(location).startswith(f"{here}/") for (location,) in found)
    assert commands.registry.client.get_logged_model(
        Registry("tiny", retrained.uri).versions()[0].model_id
    ).artifact_location.startswith(here)


def test_a_moved_project_still_works(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    commands.assert_well()
    moved = commands.root.with_name("renamed")
    commands.root.rename(moved)
    monkeypatch.chdir(moved)
    commands.assert_well()


@pytest.mark.parametrize(
    "command", [("register",), pytest.param(("doctor", "--repair"), marks=pytest.mark.slow)]
)
def test_deleted_artifacts_are_told_and_restored(
    commands: Commands, command: tuple[str, ...]
) -> None:
    shutil.rmtree(artifacts(commands))
    status, text = commands.predict()
    assert (status, "files are missing" in text) == (1, True), text
    assert "doctor --repair" in text
    assert "problem  champion: version 1 cannot be loaded" in commands.doctor()
    assert "the files of version 1 are missing" in commands.plan()
    status, text = commands.run(*command)
    assert status == 0 or command[0] == "doctor", text  # it reports the rest of the machine too
    assert [version.number for version in commands.registry.versions()] == [1]
    commands.assert_well()


@pytest.mark.slow
def test_damaged_weights_are_told_and_restored(commands: Commands) -> None:
    (weights,) = artifacts(commands).rglob("*.pth")
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "problem  champion: version 1 is damaged" in commands.doctor()
    assert "stored again" in commands.doctor("--repair")
    commands.assert_well()


@pytest.mark.parametrize(
    "command", [("doctor", "--repair"), pytest.param(("retrain",), marks=pytest.mark.slow)]
)
def test_a_deleted_alias_is_told_and_restored(commands: Commands, command: tuple[str, ...]) -> None:
    commands.registry.delete_alias("champion")
    before = history(commands.registry)
    status, text = commands.predict()
    assert (status, "doctor --repair" in text, "retrain" in text) == (1, True, False)
    assert "the alias champion was removed; the last champion was version 1" in commands.doctor()
    assert "the last champion was version 1" in commands.plan()
    status, text = commands.run(*command)
    assert status == 0 or command[0] == "doctor", text  # it reports the rest of the machine too
    assert commands.registry.aliases()["champion"] == 1
    assert history(commands.registry) == before
    commands.assert_well()


def test_a_mistyped_alias_is_named(commands: Commands) -> None:
    status, text = commands.run("predict", "x.jpg", "--model", "chmpion")
    assert (status, "Did you mean champion?" in text, "retrain" in text) == (1, True, False)


def test_edited_tags_are_passed_over(commands: Commands, caplog: pytest.LogCaptureFixture) -> None:
    (record,) = history(commands.registry)
    commands.registry.set_model_tag("audit.2026-edited", "by hand")
    commands.registry.set_tags(1, {"promotion.pending": "{", "gate.champion_version": "the last"})
    assert history(commands.registry) == [record]
    assert "the tag audit.2026-edited of tiny was edited" in caplog.text
    assert "by tester" in commands.run("history")[1]
    assert commands.run("promote", "1", "--reason", "x") == (0, "already champion\n")
    commands.registry.delete_alias("champion")
    status, text = commands.run("promote", "1", "--reason", "x")
    assert (status, "gate.champion_version is 'the last'" in text) == (1, True), text
    assert commands.run("doctor", "--repair")[1].count("version 1 is champion again") == 1


@pytest.mark.slow
def test_a_deleted_run_is_restored_and_blocks_nothing(commands: Commands) -> None:
    (version,) = commands.registry.versions()
    commands.registry.client.delete_run(version.run_id)
    commands.assert_well()
    assert commands.run("register")[0] == 0
    assert commands.registry.active_run(version) == version.run_id
    commands.assert_well()


@pytest.mark.slow
def test_a_deleted_version_is_registered_again(commands: Commands) -> None:
    commands.registry.client.delete_model_version("tiny", "1")
    assert "runs" in commands.plan()
    assert commands.run("register")[0] == 0
    assert commands.registry.aliases()["champion"] == 2
    commands.assert_well()
