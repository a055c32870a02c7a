"""Pushes dvc.lock and params.yaml of a finished run to a new git branch."""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime
from pathlib import Path

from flows.core.process import CommandFailed, Line
from flows.project.git import git

FILES = ("dvc.lock", "params.yaml")
TRIES = 3
BRANCHES, SEEN = "retrain/", "refs/rfdetr/retrain/"  # on the remote, and their local copies


def publish_lock(root: Path, run: str, on_line: Line) -> str | None:
    """Commit dvc.lock and params.yaml and push them to a new branch; None if nothing has changed.

    A branch of an earlier run with the same content also counts as unchanged. The data must already
    be on the DVC remote, or the published lock would be useless. The current branch does not move
    and nothing is forced; a branch name that exists gets a number. Raises CommandFailed.
    """
    present = [name for name in FILES if (root / name).exists()]
    status = git(root, "status", "--porcelain", "--", *present, on_line=on_line)
    if not [line for line in status if line.strip()]:
        return None
    safe = re.sub(r"[^A-Za-z0-9_-]+", "-", run).strip("-")  # git refuses some names with dots
    name = f"{BRANCHES}{datetime.now(UTC):%Y-%m-%d}-{safe}"
    commit = _commit(root, present, f"Retrained: {run}", on_line)
    known = _published(root, commit, present, on_line)
    if known is not None:
        on_line(f"branch {known} has the same {' and '.join(present)}")
        return None
    for attempt in range(1, TRIES + 1):
        branch = name if attempt == 1 else f"{name}-{attempt}"
        try:
            git(root, "push", "origin", f"{commit}:refs/heads/{branch}", on_line=on_line)
        except CommandFailed:
            if attempt == TRIES:
                raise
        else:
            return branch
    return None


def _commit(root: Path, files: list[str], message: str, on_line: Line) -> str:
    """A commit of `files` on top of HEAD; no branch moves and the index does not change."""
    index = root / git(root, "rev-parse", "--git-path", "publish-index", on_line=on_line)[-1]
    environment = {**os.environ, "GIT_INDEX_FILE": str(index)}
    for key, value in (("NAME", "rfdetr-pipeline"), ("EMAIL", "pipeline@localhost")):
        for role in ("AUTHOR", "COMMITTER"):
            environment.setdefault(f"GIT_{role}_{key}", value)
    try:
        git(root, "read-tree", "HEAD", on_line=on_line, env=environment)
        git(root, "update-index", "--add", "--", *files, on_line=on_line, env=environment)
        tree = git(root, "write-tree", on_line=on_line, env=environment)[-1]
        made = ["commit-tree", tree, "-p", "HEAD", "-m", message]
        return git(root, *made, on_line=on_line, env=environment)[-1]
    finally:
        index.unlink(missing_ok=True)


def _published(root: Path, commit: str, files: list[str], on_line: Line) -> str | None:
    """The branch of an earlier run with the same `files` as `commit`, or None."""
    wanted = f"+refs/heads/{BRANCHES}*:{SEEN}*"
    git(root, "fetch", "--quiet", "--no-tags", "--prune", "origin", wanted, on_line=on_line)
    seen: list[str] = []
    git(root, "for-each-ref", "--format=%(refname)", SEEN, on_line=seen.append)
    blobs = _blobs(root, commit, files)
    for name in seen:
        if _blobs(root, name, files) == blobs:
            return BRANCHES + name.removeprefix(SEEN)
    return None


def _blobs(root: Path, tree: str, files: list[str]) -> list[str]:
    """Mode, content hash and name of each file in a commit."""
    return git(root, "ls-tree", tree, "--", *files, on_line=lambda _: None)
