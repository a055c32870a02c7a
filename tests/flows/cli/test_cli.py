"""The command line in process: plans, registry, predictions, errors, exit codes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.cli.main import main, parser
from flows.config import params
from flows.registry.artifacts import global_tracking_uri
from flows.registry.registry import Registry
from flows.release.audit import history
from flows.tracking import provenance
from tests.flows.prefect_fixtures import Retrained

ROOT = Path(__file__).parents[3]
COMMANDS = (
    "retrain", "plan", "validate", "convert", "fit", "evaluate", "register", "promote", "rollback",
    "history", "predict", "export", "drift", "demo", "sync", "doctor",
)  # fmt: skip


@pytest.fixture
def project(retrained: Retrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Retrained:
    """A copy to work in; the current folder is below its root, as a user's may be."""
    copy = retrained.copy(tmp_path)
    for name, value in copy.environment().items():
        if name.startswith(("RFDETR_", "PREFECT_")):
            monkeypatch.setenv(name, value)
    monkeypatch.chdir(copy.root / "weights")
    return copy


def listing(root: Path) -> dict[str, int]:
    return {
        str(path.relative_to(root)): path.stat().st_mtime_ns
        for path in root.rglob("*")
        if ".dvc/tmp" not in str(path) and "__pycache__" not in str(path)
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"rfdetr-pipeline {command}" in capsys.readouterr().out


def test_the_overview_names_every_command_and_examples() -> None:
    text = parser().format_help()
    assert all(command in text for command in COMMANDS)
    assert "rfdetr-pipeline retrain --set fit.epochs=20" in text


@pytest.mark.parametrize("arguments", [[], ["retran"], ["rollback"], ["promote", "one"]])
def test_a_wrong_call_exits_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


def test_nothing_to_do_is_said_at_once(
    project: Retrained, capsys: pytest.CaptureFixture[str]
) -> None:
    before = len(project.server.read("flow_runs"))
    assert main(["retrain"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("nothing to do")
    assert "version 1 of tiny is champion" in out
    assert len(project.server.read("flow_runs")) == before


def test_plan_names_the_reason_and_changes_nothing(
    project: Retrained, capsys: pytest.CaptureFixture[str]
) -> None:
    before = listing(project.root)
    assert main(["plan", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert {stage["state"] for stage in plan["stages"]} == {"up to date"}
    assert plan["released"] is True
    assert listing(project.root) == before
    file = project.root / "params.yaml"
    file.write_text(file.read_text().replace("lr: 0.001", "lr: 0.002"))
    before = listing(project.root)
    assert main(["plan"]) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.splitlines() if not line.startswith(" ")}
    assert lines["convert"].endswith("up to date")
    assert lines["fit"].endswith(" runs")
    assert lines["evaluate"].endswith("may run")
    assert "fit modified" in out
    assert lines["release"].endswith("runs")
    assert listing(project.root) == before


@pytest.mark.parametrize(("command", "asked"), [("plan", 0), ("register", 1)])
def test_a_process_reads_params_and_asks_git_once(
    project: Retrained, monkeypatch: pytest.MonkeyPatch, command: str, asked: int
) -> None:
    calls: list[str] = []

    def counted(real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(" ".join(map(str, [real.__name__, *arguments[1:]])))
            return real(*arguments, **options)

        return call

    monkeypatch.setattr(params, "parse_params", counted(params.parse_params))
    monkeypatch.setattr(provenance, "_git", counted(provenance._git))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", project.uri)
    assert main([command]) == 0
    assert calls.count("parse_params") == 1
    assert calls.count("_git rev-parse HEAD") == asked


def test_plan_of_a_fresh_checkout_makes_no_registry(
    project: Retrained, capsys: pytest.CaptureFixture[str]
) -> None:
    (project.root / "mlflow.db").unlink()
    assert main(["plan"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["release", "runs"]
    assert not (project.root / "mlflow.db").exists()


@pytest.mark.slow
def test_the_champion_moves_by_hand_and_back(
    project: Retrained, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second version with its own record, made from the registered model."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", project.uri)
    registry = Registry("tiny", project.uri)
    first = registry.version(1)
    own = {k: v for k, v in first.tags.items() if k.startswith(("gate.", "lineage.", "weights."))}
    tags = {**own, "gate.outcome": "approval", "gate.champion_version": "1"}
    with global_tracking_uri(project.uri):
        registry.client.create_model_version(
            "tiny", f"models:/{first.model_id}", run_id=first.run_id, tags=tags
        )
    assert main(["rollback", "--reason", "too early"]) == 1
    assert "previous champion" in capsys.readouterr().err
    assert main(["promote", "9", "--reason", "typo"]) == 1
    assert "known versions: [1, 2]" in capsys.readouterr().err
    assert main(["promote", "2", "--reason", "looks better"]) == 0
    assert registry.aliases() == {"champion": 2, "previous_champion": 1}
    assert main(["rollback", "--reason", "misses small parts"]) == 0
    assert "version 1 serves again" in capsys.readouterr().out
    assert registry.aliases()["champion"] == 1
    assert main(["history"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["promote", "promote", "rollback"]
    assert "1 -> 2  by tester: looks better" in lines[1]
    assert "2 -> 1  by tester: misses small parts" in lines[2]
    assert main(["promote", "2", "--reason", "again"]) == 1
    assert "force" in capsys.readouterr().err
    assert main(["history", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(history(registry)) == 3


def test_registering_again_changes_nothing(
    project: Retrained, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["register"]) == 0
    registry = Registry("tiny", project.uri)
    assert [version.number for version in registry.versions()] == [1]
    assert registry.aliases() == {"champion": 1}
    assert "no-op" in capsys.readouterr().out


def test_the_champion_finds_things_in_pictures(
    project: Retrained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in sorted((project.root / "data/demo/test").glob("*.jpg"))[:2]:
        shutil.copy(path, folder)
    out = tmp_path / "found"
    assert main(["predict", str(folder), "--out", str(out), "--threshold", "0.0"]) == 0
    assert "2 images" in capsys.readouterr().out
    assert (out / "detections.json").exists()


def unreadable_params(root: Path) -> list[str]:
    (root / "params.yaml").write_text("fit: {epochs: 0, lrr: 1}\n")
    return ["fit.epochs", "fit.lrr"]


def no_params(root: Path) -> list[str]:
    (root / "params.yaml").unlink()
    return ["params.yaml is missing"]


@pytest.mark.parametrize("spoil", [unreadable_params, no_params])
@pytest.mark.parametrize("command", ["plan", "retrain", "fit"])
def test_wrong_params_are_one_readable_error(
    project: Retrained,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], list[str]],
    command: str,
) -> None:
    said = spoil(project.root)
    assert main([command]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert all(part in error for part in said)
    assert "Traceback" not in error


@pytest.mark.parametrize("value", ["[1", "{a: [", "'"])
def test_a_value_that_is_not_yaml_is_one_readable_error(
    value: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["retrain", "--set", f"fit.epochs={value}"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: --set fit.epochs={value}: '{value}' is not valid YAML")
    assert "Traceback" not in error


def test_retry_reaches_the_stage_and_leaves_its_command_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    command = "python -c \"import os; print('retry is', os.environ.get('RFDETR_FIT_RETRY'))\""
    (tmp_path / "dvc.yaml").write_text(json.dumps({"stages": {"fit": {"cmd": command}}}))
    (tmp_path / "params.yaml").write_text("{}")
    (tmp_path / ".dvc").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["fit"]) == 0
    lock = (tmp_path / "dvc.lock").read_text()
    assert "retry is None" in capfd.readouterr().out
    assert main(["fit", "--retry"]) == 0
    assert "retry is 1" in capfd.readouterr().out
    assert (tmp_path / "dvc.lock").read_text() == lock


def test_outside_a_project_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan"]) == 1
    assert "not inside a project" in capsys.readouterr().err


def test_a_failed_stage_command_names_the_cause(
    project: Retrained, capfd: pytest.CaptureFixture[str]
) -> None:
    file = project.root / "params.yaml"
    file.write_text(file.read_text().replace("min_images: 10", "min_images: 1000"))
    assert main(["validate"]) == 1
    assert "1000" in capfd.readouterr().out
