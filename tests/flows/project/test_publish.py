"""dvc.lock and params.yaml on a new branch, pushed to a real bare repository."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from flows.core.process import CommandFailed
from flows.project.project import Project
from flows.project.publish import publish_lock
from tests.flows.projects import run


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone with a commit on `main` and a remote `origin`."""
    run(tmp_path, "git", "init", "-q", "--bare", "-b", "main", "remote.git")
    run(tmp_path, "git", "clone", "-q", "remote.git", "clone")
    root = tmp_path / "clone"
    run(root, "git", "config", "user.email", "test@localhost")
    run(root, "git", "config", "user.name", "test")
    for name in ("dvc.lock", "params.yaml", "code.py"):
        (root / name).write_text("old\n")
    run(root, "git", "add", ".")
    run(root, "git", "commit", "-qm", "first")
    run(root, "git", "push", "-q", "origin", "HEAD:main")
    return root


def branches(root: Path) -> dict[str, str]:
    lines = run(root, "git", "ls-remote", "--heads", "origin").stdout.splitlines()
    return {name.removeprefix("refs/heads/"): sha for sha, name in map(str.split, lines)}


def today(run_name: str) -> str:
    return f"retrain/{datetime.now(UTC):%Y-%m-%d}-{run_name}"


def test_only_lock_and_params_travel_and_the_folder_stays_as_it_is(clone: Path) -> None:
    head = run(clone, "git", "rev-parse", "HEAD").stdout
    for name in ("dvc.lock", "params.yaml", "code.py"):
        (clone / name).write_text("new\n")
    before = run(clone, "git", "status", "--porcelain").stdout
    branch = publish_lock(clone, "brave fox", print)
    assert branch == today("brave-fox")
    assert run(clone, "git", "rev-parse", "HEAD").stdout == head
    assert run(clone, "git", "status", "--porcelain").stdout == before
    sha = branches(clone)[branch]
    changed = run(clone, "git", "diff", "--name-only", "main", sha).stdout.split()
    assert changed == ["dvc.lock", "params.yaml"]


def test_nothing_changed_publishes_nothing(clone: Path) -> None:
    assert publish_lock(clone, "fox", print) is None
    assert set(branches(clone)) == {"main"}


def test_a_new_lock_file_is_published(clone: Path) -> None:
    run(clone, "git", "rm", "-q", "--cached", "dvc.lock")
    run(clone, "git", "commit", "-qm", "no lock yet")
    branch = publish_lock(clone, "fox", print)
    assert branch is not None
    assert run(clone, "git", "show", f"{branches(clone)[branch]}:dvc.lock").stdout == "old\n"


def test_a_taken_name_gets_a_number_and_nothing_is_forced(clone: Path) -> None:
    run(clone, "git", "checkout", "-q", "-b", "other")
    (clone / "code.py").write_text("somebody else\n")
    run(clone, "git", "commit", "-qam", "theirs")
    run(clone, "git", "push", "-q", "origin", f"other:refs/heads/{today('fox')}")
    run(clone, "git", "checkout", "-q", "main")
    theirs = branches(clone)[today("fox")]
    (clone / "dvc.lock").write_text("new\n")
    assert publish_lock(clone, "fox", print) == f"{today('fox')}-2"
    assert branches(clone)[today("fox")] == theirs


def test_what_an_earlier_run_published_is_not_published_again(clone: Path) -> None:
    for name in ("dvc.lock", "params.yaml"):
        (clone / name).write_text("new\n")
    first = publish_lock(clone, "fox", print)
    (clone / "code.py").write_text("other code\n")
    run(clone, "git", "commit", "-qm", "code", "code.py")
    said: list[str] = []
    assert publish_lock(clone, "hare", said.append) is None
    assert f"branch {first} has the same dvc.lock and params.yaml" in said
    assert set(branches(clone)) == {"main", first}
    (clone / "dvc.lock").write_text("newer\n")
    assert publish_lock(clone, "hare", print) == today("hare")


def test_without_a_dvc_remote_nothing_is_published(clone: Path) -> None:
    """Nobody could get the data that such a lock names."""
    from flows.retrain import publish

    (clone / ".dvc").mkdir()
    (clone / "dvc.lock").write_text("new\n")
    state = publish.fn(Project(clone))
    assert state.name == "Skipped"
    assert "no DVC remote" in str(state.message)
    assert set(branches(clone)) == {"main"}


def test_a_remote_that_refuses_is_an_error(clone: Path) -> None:
    """And the password in its address stays out of the error."""
    url = "http://bot:hunter2-planted@127.0.0.1:1/gone.git"
    run(clone, "git", "remote", "set-url", "origin", url)
    (clone / "dvc.lock").write_text("new\n")
    with pytest.raises(CommandFailed, match="origin") as failure:
        publish_lock(clone, "fox", print)
    assert "127.0.0.1" in str(failure.value)
    assert "hunter2" not in str(failure.value)
