"""Pushes what a run changed in git: dvc.lock and params.yaml, on a branch of its own."""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime
from pathlib import Path

from flows.process import CommandFailed
from flows.workspace import Line, git

FILES = ("dvc.lock", "params.yaml")
TRIES = 3


def publish_lock(root: Path, run: str, on_line: Line) -> str | None:
    """Commit dvc.lock and params.yaml and push them to a new branch; None if nothing changed.

    Data must be on the DVC remote already: a published lock has to be resolvable. The folder's own
    branch stays where it is, nothing is forced; a name that is taken gets a number.
    """
    present = [name for name in FILES if (root / name).exists()]
    status = git(root, "status", "--porcelain", "--", *present, on_line=on_line)
    if not [line for line in status if line.strip()]:
        return None
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", run).strip("-.")
    name = f"retrain/{datetime.now(UTC):%Y-%m-%d}-{safe}"
    commit = _commit(root, present, f"Retrained: {run}", on_line)
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
    """A commit of `files` on top of HEAD that moves no branch and leaves the index alone."""
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
