"""Git as a child process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flows.core.process import CommandFailed, Line, run_streaming
from rfdetr.errors import ConfigError


def git(root: Path, *args: str, on_line: Line, **limits: Any) -> list[str]:
    """Run one git command in `root` as a child process."""
    return run_streaming(["git", *args], on_line, cwd=root, **limits)


def checkout(root: Path, ref: str, on_line: Line) -> None:
    """Move the clone in `root` to a commit, tag or branch of its origin.

    Raises ConfigError for a name that the origin does not know.
    """
    try:
        try:
            git(root, "fetch", "--quiet", "origin", ref, on_line=on_line)
            wanted = "FETCH_HEAD"
        except CommandFailed:  # servers give branches and tags by name; a commit needs the history
            shallow = (root / ".git" / "shallow").exists()
            unshallow = ["--unshallow"] if shallow else []
            everything = "+refs/heads/*:refs/remotes/origin/*"
            git(root, "fetch", "--quiet", *unshallow, "origin", everything, on_line=on_line)
            wanted = ref
        git(root, "checkout", "--quiet", "--detach", wanted, on_line=on_line)
    except CommandFailed as error:
        raise ConfigError(f"ref '{ref}' is no commit, tag or branch of the origin.") from error
