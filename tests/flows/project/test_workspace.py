"""Workspaces: overrides, DVC settings, clones, the stages of a run, with real git and DVC."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from flows.config.environment import Environment
from flows.config.overrides import write_overrides
from flows.config.params import load_params
from flows.project.dvc import configure_dvc, dvc, forget_dead_locks, has_remote
from flows.project.git import checkout
from flows.project.project import Project
from flows.project.workspace import data_stage, prepare_workspace, require_dataset, stage_names
from flows.stages.runner import check_unchanged
from rfdetr.errors import ConfigError, DatasetError
from tests.flows.servers import S3Server

ROOT = Path(__file__).parents[3]


def quiet(line: str) -> None:
    """Where the lines of children go."""


def run(root: Path, *command: str) -> str:
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project's pipeline files in a new git repository."""
    root = tmp_path / "project"
    (root / ".dvc").mkdir(parents=True)
    for name in ("dvc.yaml", "params.yaml", ".gitignore", ".dvcignore", ".dvc/config",
                 "data/.gitignore"):  # fmt: skip
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text((ROOT / name).read_text())
    (root / ".dvc" / ".gitignore").write_text((ROOT / ".dvc" / ".gitignore").read_text())
    run(root, "git", "init", "-q")
    run(root, "git", "config", "user.email", "test@localhost")
    run(root, "git", "config", "user.name", "test")
    run(root, "git", "add", ".")
    run(root, "git", "commit", "-qm", "begin")
    return root


def environment(tmp_path: Path, **more: str) -> Environment:
    return Environment.read({"RFDETR_STATE_DIR": str(tmp_path / "state"), **more})


def test_overrides_change_values_and_keep_comments(project: Path) -> None:
    write_overrides(project, {"fit": {"epochs": 77, "precision": "32-true"}, "gate": {"floor": 0}})
    params = load_params(project / "params.yaml")
    assert (params.fit.epochs, params.fit.precision, params.gate.floor) == (77, "32-true", 0)
    text = (project / "params.yaml").read_text()
    assert "# kept on any number of devices" in text
    assert len(text.splitlines()) == (ROOT / "params.yaml").read_text().count("\n") + 1


def test_wrong_overrides_write_nothing(project: Path) -> None:
    before = (project / "params.yaml").read_text()
    with pytest.raises(ConfigError, match="2 mistakes"):
        write_overrides(project, {"fit": {"epochs": 0, "epoch": 1}})
    assert (project / "params.yaml").read_text() == before
    assert sorted(p.name for p in project.iterdir()) == [
        ".dvc", ".dvcignore", ".git", ".gitignore", "data", "dvc.yaml", "params.yaml",
    ]  # fmt: skip


def test_a_parameter_that_changes_during_a_stage_is_an_error(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    before = Project()
    assert before.params.fit.lr == 0.001
    check_unchanged(before, ["fit"])
    write_overrides(project, {"fit": {"lr": 0.5}, "gate": {"floor": 0.9}})
    check_unchanged(before, ["evaluate"])
    with pytest.raises(ConfigError, match=r"fit.lr was 0.001, is 0.5"):
        check_unchanged(before, ["fit"])


def test_the_run_uses_the_shared_cache_and_the_remote_of_the_environment(
    project: Path, tmp_path: Path, s3: S3Server
) -> None:
    env = environment(
        tmp_path,
        RFDETR_DVC_CACHE=str(tmp_path / "cache"),
        RFDETR_DVC_REMOTE="s3://data/dvc",
        AWS_ENDPOINT_URL=s3.url,
    )
    assert not has_remote(project)
    configure_dvc(project, env)
    assert has_remote(project)
    configure_dvc(project, environment(tmp_path))
    assert not has_remote(project), "the environment no longer names one"
    configure_dvc(project, env)
    local = (project / ".dvc" / "config.local").read_text()
    assert s3.secret not in local
    (project / "data" / "mine").mkdir(parents=True)
    (project / "data" / "mine" / "a.txt").write_text("content")
    dvc(project, "add", "data/mine", on_line=quiet)
    dvc(project, "push", on_line=quiet)
    assert list((tmp_path / "cache" / "files").rglob("*.dir"))
    run(project, "git", "add", ".")
    run(project, "git", "commit", "-qm", "data")
    assert run(project, "git", "ls-files", "data").split() == ["data/.gitignore", "data/mine.dvc"]

    copy = tmp_path / "copy"
    run(tmp_path, "git", "clone", "-q", str(project), str(copy))
    other = environment(
        tmp_path,
        RFDETR_DVC_CACHE=str(tmp_path / "empty"),
        RFDETR_DVC_REMOTE="s3://data/dvc",
        AWS_ENDPOINT_URL=s3.url,
    )
    changes = {"dataset": {"name": "mine", "dir": "data/mine"}}
    write_overrides(copy, changes)
    prepare_workspace(Project(copy, other), quiet)
    assert (copy / "data" / "mine" / "a.txt").read_text() == "content"
    assert stage_names(Project(copy)) == ["validate", "convert", "fit", "evaluate"]


def test_without_git_dvc_works_too(project: Path, tmp_path: Path) -> None:
    run(project, "rm", "-rf", ".git")
    configure_dvc(project, environment(tmp_path))
    lines: list[str] = []
    dvc(project, "status", on_line=lines.append)
    dvc(project, "stage", "list", on_line=lines.append)
    assert any(line.startswith("evaluate") for line in lines)


def test_a_missing_dataset_is_named_with_the_way_to_add_it(project: Path, tmp_path: Path) -> None:
    write_overrides(project, {"dataset": {"name": "mine", "dir": "data/mine"}})
    with pytest.raises(DatasetError, match="run `dvc add data/mine`"):
        prepare_workspace(Project(project, environment(tmp_path)), quiet)


def test_the_stage_that_makes_the_data_follows_the_settings(project: Path) -> None:
    assert stage_names(Project(project)) == ["demo", "validate", "convert", "fit", "evaluate"]
    text = (project / "params.yaml").read_text()
    text = text.replace("sources: {}", 'sources: {mine: {uri: "s3://data/sets/one"}}')
    (project / "params.yaml").write_text(text)
    write_overrides(project, {"dataset": {"dir": "data/mine"}})
    assert data_stage(Project(project)) == "fetch@mine"
    listed = run(project, "dvc", "stage", "list", "--name-only").split()
    assert set(stage_names(Project(project))) <= set(listed)


def test_stages_of_a_user_are_no_part_of_a_run_and_a_lost_one_is_named(tmp_path: Path) -> None:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    text = (ROOT / "dvc.yaml").read_text()
    (tmp_path / "dvc.yaml").write_text(f"{text}\n  mine:\n    cmd: echo\n")
    assert stage_names(Project(tmp_path))[-1] == "evaluate"
    (tmp_path / "dvc.yaml").write_text(text.replace("  evaluate:", "  evaluat:"))
    with pytest.raises(ConfigError, match="has no stage evaluate"):
        stage_names(Project(tmp_path))
    for odd in ("{}", "[1]", "stages:", "stages: {fit: 3}"):
        (tmp_path / "dvc.yaml").write_text(odd)
        with pytest.raises(ConfigError, match="has no `stages`"):
            stage_names(Project(tmp_path))


def test_the_order_of_stages_is_a_topological_order_of_the_graph(project: Path) -> None:
    stages = yaml.safe_load((project / "dvc.yaml").read_text())["stages"]
    made: set[str] = set()
    for name in ("demo", "validate", "convert", "fit", "evaluate"):
        stage = stages[name]
        outs = [o if isinstance(o, str) else next(iter(o)) for key in ("outs", "metrics", "plots")
                for o in stage.get(key, [])]  # fmt: skip
        needed = {d.replace("${dataset.dir}", "data/demo") for d in stage["deps"]}
        produced_later = {
            out for other in stages if other != "fetch"
            for out in stages[other]["outs"] if out not in made
        }  # fmt: skip
        assert not needed & produced_later, name
        made |= set(outs)


def test_a_shallow_clone_moves_to_commits_tags_and_branches(project: Path, tmp_path: Path) -> None:
    first = run(project, "git", "rev-parse", "HEAD").strip()
    run(project, "git", "tag", "v1")
    for name in ("other", "third"):
        run(project, "git", "checkout", "-qb", name)
        (project / f"{name}.txt").write_text("new")
        run(project, "git", "add", ".")
        run(project, "git", "commit", "-qm", name)
    copy = tmp_path / "copy"
    run(tmp_path, "git", "clone", "-q", "--depth", "1", f"file://{project}", str(copy))
    for ref in ("v1", "other", first[:12], "third", first):
        checkout(copy, ref, quiet)
        assert (copy / "other.txt").exists() == (ref in {"other", "third"})
        assert (copy / "third.txt").exists() == (ref == "third")
    with pytest.raises(ConfigError, match="'nothing' is not a commit, tag or branch"):
        checkout(copy, "nothing", quiet)
    run(copy, "git", "remote", "set-url", "origin", "file:///nowhere")
    with pytest.raises(ConfigError, match="or the origin is unreachable"):
        checkout(copy, "later", quiet)


def test_dvc_locks_of_killed_processes_are_forgotten(tmp_path: Path) -> None:
    """Of zombies, too: DVC itself believes that they still work."""
    file = tmp_path / ".dvc/tmp/rwlock"
    file.parent.mkdir(parents=True)
    zombie = subprocess.Popen([sys.executable, "-c", "pass", "dvc"])
    living = subprocess.Popen([sys.executable, "-c", "input()", "dvc"], stdin=subprocess.PIPE)
    other = {"pid": os.getppid(), "cmd": "a later process with that number"}
    try:
        while psutil.Process(zombie.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        dead, alive = ({"pid": p.pid, "cmd": "dvc repro"} for p in (zombie, living))
        held = {"write": {"/a": dead, "/b": alive}, "read": {"/c": [dead, alive], "/d": [other]}}
        file.write_text(json.dumps(held))
        forget_dead_locks(tmp_path)
        assert json.loads(file.read_text()) == {"write": {"/b": alive}, "read": {"/c": [alive]}}
        for damaged in (json.dumps(held)[:30], "[]", '{"write": {"/a": {"pid": "x"}}}'):
            file.write_text(damaged)
            forget_dead_locks(tmp_path)
            assert json.loads(file.read_text()) == {"write": {}, "read": {}}
    finally:
        living.communicate()
        zombie.wait()


def test_a_missing_dataset_comes_from_the_cache_or_is_explained(project: Path) -> None:
    (project / "data/mine").mkdir(parents=True)
    (project / "data/mine/a.txt").write_text("a")
    run(project, "dvc", "add", "data/mine")
    write_overrides(project, {"dataset": {"name": "mine", "dir": "data/mine"}})
    (project / "data/mine/a.txt").unlink()
    (project / "data/mine").rmdir()
    require_dataset(Project(project), quiet)
    assert (project / "data/mine/a.txt").read_text() == "a"
    write_overrides(project, {"dataset": {"dir": "data/unknown"}})
    with pytest.raises(DatasetError, match=r"data/unknown is missing.*run `dvc add data/unknown`"):
        require_dataset(Project(project), quiet)
