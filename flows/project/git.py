"""Git commands as child processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flows.core.process import CommandFailed, Line, run_streaming
from rfdetr.errors import ConfigError

SECONDS = 600.0


def git(root: Path, *args: str, on_line: Line, **limits: Any) -> list[str]:
    """Run one git command in `root` as a child process, for at most ten minutes."""
    return run_streaming(["git", *args], on_line, cwd=root, **{"timeout": SECONDS, **limits})


def head_commit(root: Path) -> str | None:
    """The commit that is checked out; None outside of git."""
    try:
        return git(root, "rev-parse", "HEAD", on_line=lambda _: None)[-1]
    except CommandFailed:
        return None


def checkout(root: Path, ref: str, on_line: Line) -> None:
    """Check out a commit, tag or branch of the origin in the clone `root`.

    Raises ConfigError if the origin does not know `ref`.
    """
    try:
        try:
            git(root, "fetch", "--quiet", "origin", ref, on_line=on_line)
            wanted = "FETCH_HEAD"
        except (
            CommandFailed
        ):  # only branches and tags can be fetched by name; a commit needs the history
            shallow = (root / ".git" / "shallow").exists()
            unshallow = ["--unshallow"] if shallow else []
            everything = "+refs/heads/*:refs/remotes/origin/*"
            git(root, "fetch", "--quiet", *unshallow, "origin", everything, on_line=on_line)
            wanted = ref
        git(root, "checkout", "--quiet", "--detach", wanted, on_line=on_line)
    except CommandFailed as error:
        why = error.tail[-1] if error.tail else error.reason
        raise ConfigError(
            f"ref '{ref}' is not a commit, tag or branch of the origin, or the origin is "
            f"unreachable ({why})."
        ) from error
